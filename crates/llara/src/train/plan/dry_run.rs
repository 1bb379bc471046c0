//! A dry run: a step of the training code on the [`CountingBackend`].

use std::sync::Arc;

use serde_json::Value;

use super::batch::LargestBatch;
use super::evaluation::EvaluationShape;
use super::group::GroupShape;
use super::work::needed_flops;
use super::{Chunks, Parts, Plan, Work};
use crate::Result;
use crate::backend::{CountingBackend, DeviceMemory, Dtype, KernelSizes};
use crate::biencoder::{BiEncoderModel, BiEncoderOptions, Parts as ModelParts, Recipe};
use crate::data::Batch;
use crate::dist::Solo;
use crate::loss::{Contrastive, ObjectiveOptions};
use crate::model::weights::ModelFolder;
use crate::model::{
    Decoder, DecoderConfig, Dropout, Input, LoraConfig, ParameterValues, SavedTokens,
    embed_streamed,
};
use crate::text::{PromptEncoder, Role};
use crate::train::optimizer::{AdamW, AdamWConfig};
use crate::train::pretraining::{
    LossWeights, PretrainingInput, PretrainingLoss, SetObjective, TrainingSequence,
    accumulate_pretraining_gradients,
};
use crate::train::step::{Chunking, accumulate_gradients};
use crate::train::step_input::StepInput;

/// Host memory of a part of a tensor while it is read: its bytes in the file, as f32, and rounded.
const PART_BYTES: u64 = 10 << 20;

/// The properties of a run, other than the batch, that determine its memory and work.
#[derive(Clone)]
pub struct RunShape {
    /// The decoder's configuration.
    pub decoder: DecoderConfig,
    /// Tokenizer and template.
    pub prompts: Arc<PromptEncoder>,
    /// The adapter, if one is trained.
    pub lora: Option<LoraConfig>,
    /// Number format of activations and of frozen matrices.
    pub precision: Dtype,
    /// Options of the model.
    pub options: BiEncoderOptions,
    /// The evaluation during the run, if there is one.
    pub evaluation: Option<EvaluationShape>,
    /// What is trained for.
    pub task: PlannedTask,
    /// The processes, if there are several.
    pub group: Option<GroupShape>,
    /// How the device of the run allocates memory.
    pub memory: DeviceMemory,
    /// Memory of the process before the weights are read, in bytes.
    pub process_bytes: u64,
    /// Whether the model with the merged adapter is saved too.
    pub saves_merged: bool,
}

/// The task of a run, as far as it determines memory and work.
#[derive(Debug, Clone, PartialEq)]
pub enum PlannedTask {
    /// Fine-tuning with these terms of the loss.
    Finetuning(ObjectiveOptions),
    /// Pretraining, with the language-model head.
    Pretraining,
}

impl RunShape {
    /// Whether equal sequences of a batch are encoded once.
    pub fn dedups_sequences(&self) -> bool {
        self.options.shortcuts.dedup_sequences && !self.has_dropout()
    }

    fn has_dropout(&self) -> bool {
        self.lora.as_ref().is_some_and(LoraConfig::has_dropout)
    }
}

/// A model and its optimizer on the [`CountingBackend`].
pub struct DryRun {
    shape: RunShape,
    counting: CountingBackend,
    model: BiEncoderModel<CountingBackend>,
    optimizer: AdamW<CountingBackend>,
    weights: usize,
    gradients: usize,
    moments: usize,
    /// Peak memory of tensors while weights are read, in bytes.
    loading: usize,
    /// Peak memory of tensors while the trained model is saved and verified, in bytes.
    saving: usize,
    /// Peak memory of tensors while the model is evaluated, in bytes.
    evaluation: usize,
}

/// Memory and work of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Counted {
    /// Peak memory of tensors in bytes.
    pub(super) peak: usize,
    pub(super) flops: u64,
}

impl DryRun {
    /// Allocates a model of this shape and its optimizer state.
    ///
    /// # Errors
    /// The shape is not valid.
    pub fn new(shape: RunShape) -> Result<Self> {
        let saving = {
            let counting = CountingBackend::new(shape.memory);
            let mut trained = load(&counting, &shape)?;
            match &shape.lora {
                // The saved adapter is verified with the weights that it was trained on.
                Some(lora) => {
                    let adapters = trained.decoder_mut().detach_adapters();
                    trained.attach_zero_adapter(lora)?;
                    drop(adapters);
                }
                None => verify(&counting, &shape)?,
            }
            counting.peak().max(if shape.saves_merged { merged_bytes(&shape)? } else { 0 })
        };
        let counting = CountingBackend::new(shape.memory);
        let mut model = load(&counting, &shape)?;
        let (weights, loading) = (counting.allocated(), counting.peak());
        let optimizer = AdamW::new(&counting, model.decoder_mut(), AdamWConfig::default())?;
        let moments = (counting.allocated() - weights) / 3 * 2;
        let gradients = counting.allocated() - weights - moments;
        let evaluation = match &shape.evaluation {
            Some(evaluation) => evaluation.tensor_bytes(&counting, &model)?,
            None => 0,
        };
        Ok(DryRun {
            shape,
            counting,
            model,
            optimizer,
            weights,
            gradients,
            moments,
            loading,
            saving,
            evaluation,
        })
    }

    /// The properties of the run.
    pub fn shape(&self) -> &RunShape {
        &self.shape
    }

    /// Memory and work of a run with batches like `batch`, divided into chunks by `chunking`.
    ///
    /// # Errors
    /// The batch is not valid.
    pub fn plan(&mut self, batch: &LargestBatch, chunking: Chunking) -> Result<Plan> {
        let counted = self.step(batch, &chunking)?;
        let encoded = self.encoded(batch)?;
        let chunks = chunking.chunks(&encoded);
        let end_of = |chunk: &std::ops::Range<usize>| encoded.offsets()[chunk.end] as usize;
        let kept: Vec<_> =
            chunks.iter().take_while(|chunk| end_of(chunk) <= chunking.kept_tokens).collect();
        let kept_tokens = kept.last().map_or(0, |chunk| end_of(chunk));
        let size = |chunk: &std::ops::Range<usize>| {
            end_of(chunk) - encoded.offsets()[chunk.start] as usize
        };
        let host = self.host_bytes();
        let process = self.shape.process_bytes;
        let largest_tokens = chunks.iter().map(size).max().unwrap_or(0);
        let workspace = self.shape.memory.workspace(&KernelSizes {
            rows: largest_tokens,
            longest: encoded.longest(),
            head_dim: self.shape.decoder.head_dim,
            activations: self.shape.precision,
        }) as u64;
        let fixed = self.weights + self.gradients + self.moments;
        let lengths: Vec<usize> = encoded.sequences().map(<[u32]>::len).collect();
        let pooled = self.shape.prompts.template().pooled_tokens;
        let (group, dimension) = (self.shape.group, self.shape.decoder.hidden_size);
        let (gradients, moments) = (self.gradients as u64, self.moments as u64);
        let training = Parts {
            weights: self.weights as u64,
            gradients,
            optimizer: group.map_or(moments, |group| group.optimizer(moments)),
            activations: counted.peak.saturating_sub(fixed) as u64,
            workspace,
            communication: group.map_or(0, |group| group.communication(gradients, dimension)),
            process,
        };
        Ok(Plan {
            training,
            loading_bytes: process + self.loading as u64 + host.min(PART_BYTES),
            saving_bytes: match self.saved_table_bytes() {
                Some(table) => training.total() + table,
                None => process + self.saving as u64 + host,
            },
            evaluation_bytes: self.evaluation_bytes(),
            chunks: Chunks {
                chunking,
                count: chunks.len(),
                kept: kept.len(),
                largest_tokens,
                tokens: encoded.tokens(),
                recomputed_share: match self.shape.task {
                    PlannedTask::Finetuning(_) => {
                        1.0 - kept_tokens as f64 / encoded.tokens().max(1) as f64
                    }
                    PlannedTask::Pretraining => 0.0,
                },
            },
            work: Work {
                needed_flops: match self.shape.task {
                    PlannedTask::Finetuning(_) => needed_flops(
                        &self.shape.decoder,
                        self.shape.lora.as_ref(),
                        pooled,
                        &lengths,
                    )?,
                    // Nothing is computed twice.
                    PlannedTask::Pretraining => counted.flops,
                },
                done_flops: counted.flops,
            },
        })
    }

    /// Runs one step including the optimizer's update.
    pub(super) fn step(&mut self, batch: &LargestBatch, chunking: &Chunking) -> Result<Counted> {
        let input = self.input(batch)?;
        self.counting.reset_peak();
        let before = self.counting.flops();
        match input {
            PlannedInput::Finetuning(input, options) => {
                let info_nce = self.model.objective(Arc::new(Solo))?;
                let objective = Contrastive { options, ..info_nce };
                drop(accumulate_gradients(&mut self.model, &objective, &input, chunking)?);
            }
            PlannedInput::Pretraining(input) => {
                let weights = LossWeights::default();
                let loss = PretrainingLoss { weights, collective: Arc::new(Solo) };
                let model = &mut self.model;
                let ready = &mut ();
                drop(accumulate_pretraining_gradients(model, &loss, &input, chunking, ready)?);
            }
        }
        drop(self.optimizer.step(&self.counting, self.model.decoder_mut(), 0.0)?);
        Ok(Counted { peak: self.counting.peak(), flops: self.counting.flops() - before })
    }

    /// The sequences that a step encodes, in order.
    pub(super) fn encoded(&self, batch: &LargestBatch) -> Result<Batch> {
        Ok(match self.input(batch)? {
            PlannedInput::Finetuning(input, _) => input.batch,
            PlannedInput::Pretraining(input) => input.batch().clone(),
        })
    }

    fn input(&self, batch: &LargestBatch) -> Result<PlannedInput> {
        let dropout = self.shape.has_dropout().then_some(Dropout { seed: 0, step: 0 });
        let objective = match &self.shape.task {
            PlannedTask::Finetuning(objective) => objective,
            PlannedTask::Pretraining => return self.pretraining_input(batch, dropout),
        };
        let deduplicate = self.shape.options.shortcuts.dedup_sequences;
        let mut input =
            StepInput::from_batches(&batch.query, &batch.passage, deduplicate, dropout)?;
        if objective.false_negatives.mask_equal {
            input = input.with_text_keys(&vec![Vec::new(); batch.query.len()]);
        }
        if objective.distillation.is_some() {
            input.teacher_scores = Some(vec![0.0; batch.passage.len()]);
        }
        Ok(PlannedInput::Finetuning(Box::new(input), objective.clone()))
    }

    /// The texts of `batch`, each with a set of one target per sequence; a set takes no memory of the device to speak
    /// of.
    fn pretraining_input(
        &self,
        batch: &LargestBatch,
        dropout: Option<Dropout>,
    ) -> Result<PlannedInput> {
        let prompts = &self.shape.prompts;
        let (prefix, suffix) = prompts.affixes(Role::Passage);
        let (_, query_suffix) = prompts.affixes(Role::Query);
        let sequence = |ids, labels, objective| {
            let targets = vec![0];
            TrainingSequence { ids, labels, objective, targets }
        };
        let batch = &batch.passage;
        let sequences: Vec<&[u32]> = batch.sequences().collect();
        let rows = batch.trees().map(|tree| {
            let root = sequences[tree.start];
            // Where queries begin otherwise than passages, the two sequences of a text share nothing.
            if suffix != query_suffix && root.ends_with(query_suffix) {
                return vec![sequence(root.to_vec(), 0..0, SetObjective::AutoRegress)];
            }
            let end = root.len().saturating_sub(suffix.len()).max(1);
            let labels = prefix.len().clamp(1, end)..end;
            let passage = sequence(root.to_vec(), labels, SetObjective::AutoEncode);
            let branches = tree.skip(1).map(|branch| {
                let shared = &root[..batch.shared()[branch] as usize];
                let ids = [shared, sequences[branch]].concat();
                sequence(ids, 0..0, SetObjective::AutoRegress)
            });
            std::iter::once(passage).chain(branches).collect()
        });
        let rows: Vec<Vec<TrainingSequence>> = rows.collect();
        let pooled = prompts.template().pooled_tokens;
        Ok(PlannedInput::Pretraining(PretrainingInput::new(&rows, pooled, dropout)?))
    }

    /// Memory of the process while the model is evaluated, in bytes.
    fn evaluation_bytes(&self) -> u64 {
        let Some(evaluation) = &self.shape.evaluation else { return 0 };
        let config = &self.shape.decoder;
        let workspace = self.shape.memory.workspace(&KernelSizes {
            rows: evaluation.batch_tokens.max(evaluation.longest),
            longest: evaluation.longest,
            head_dim: config.head_dim,
            activations: self.shape.precision,
        });
        let host = evaluation.host_bytes(config.hidden_size);
        self.shape.process_bytes + (self.evaluation + workspace + host) as u64
    }

    /// Host memory while a checkpoint of an adapter with the whole embedding table is written: the table of the base
    /// model from memory and from its file, and the merged one. `None`: no such table is saved.
    fn saved_table_bytes(&self) -> Option<u64> {
        let decoder = &self.shape.decoder;
        match &self.shape.lora {
            Some(lora)
                if lora.saved_tokens == SavedTokens::ModulesToSave
                    && !lora.trained_tokens.is_empty() =>
            {
                Some(12 * (decoder.vocab_size * decoder.hidden_size) as u64)
            }
            _ => None,
        }
    }

    /// Host memory while saved weights are compared: those of the largest tensor, in memory and rounded.
    fn host_bytes(&self) -> u64 {
        let tensors = self.model.decoder().tensors();
        tensors.map(|tensor| tensor.elements()).max().unwrap_or(0) as u64 * 8
    }
}

/// The verification of saved weights, one layer at a time.
fn verify(counting: &CountingBackend, shape: &RunShape) -> Result<()> {
    let text = shape.prompts.encode(Role::Passage, "", usize::MAX)?;
    let batch = Batch::from_sequences([text])?;
    let pooled = shape.prompts.template().pooled_tokens;
    let input = Input::new(counting, batch.view(), [pooled], &[0], &[])?;
    let zeros = &mut |_: &str, _: &[usize]| Ok(ParameterValues::Zeros(Dtype::F32));
    embed_streamed(counting, &shape.decoder, zeros, &input).map(drop)
}

/// Peak memory of tensors while the merged model is made and saved: its weights are f32.
fn merged_bytes(shape: &RunShape) -> Result<usize> {
    let counting = CountingBackend::new(shape.memory);
    let shape = RunShape { precision: Dtype::F32, ..shape.clone() };
    let merged = load(&counting, &shape)?;
    verify(&counting, &shape)?;
    drop(merged);
    Ok(counting.peak())
}

/// The input of the step that is counted.
enum PlannedInput {
    Finetuning(Box<StepInput>, ObjectiveOptions),
    Pretraining(PretrainingInput),
}

/// Allocates a model like loading does: frozen matrices in the run's number format, then the adapter.
fn load(counting: &CountingBackend, shape: &RunShape) -> Result<BiEncoderModel<CountingBackend>> {
    let matrices = if shape.lora.is_some() { shape.precision } else { Dtype::F32 };
    let mut decoder = Decoder::build(counting, shape.decoder.clone(), &mut |_, sizes| {
        Ok(ParameterValues::Zeros(if sizes.len() == 2 { matrices } else { Dtype::F32 }))
    })?;
    if shape.task == PlannedTask::Pretraining {
        decoder.attach_head(counting, &mut |_, _| Ok(ParameterValues::Zeros(Dtype::F32)))?;
    }
    let parts = ModelParts {
        backend: counting.clone(),
        decoder,
        folder: ModelFolder::new(Value::Null),
        prompts: Arc::clone(&shape.prompts),
        recipe: Recipe::new(shape.prompts.template().clone()),
    };
    // The memory of each process is that of a single one, except for the gathered embeddings.
    let options = BiEncoderOptions { negatives_cross_device: false, ..shape.options };
    let mut model = BiEncoderModel::new(parts, options)?;
    if let Some(lora) = &shape.lora {
        model.attach_zero_adapter(lora)?;
    }
    model.set_precision(shape.precision)?;
    Ok(model)
}
