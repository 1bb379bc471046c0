//! The bi-encoder: one decoder encodes queries and passages as embeddings, which are compared.

mod adapter;
mod adapter_config;
mod adapter_tokens;
mod card;
mod folder;
mod output;
mod probes;
mod recipe;
mod restore;
mod run_facts;
mod sentence_transformers;
mod staged;

use std::collections::BTreeMap;
use std::sync::Arc;

use ndarray::Array2;

pub(crate) use adapter::{ADAPTER_WEIGHTS_FILE, adapter_tokenizer, prefix_in_adapter};
pub(crate) use adapter_config::{ADAPTER_CONFIG_FILE, AdapterConfig};
pub(crate) use adapter_tokens::TokenNames;
pub use folder::{Loader, Outline};
pub use output::{EncoderOutput, Features, compute_similarity};
pub use probes::Probes;
pub(crate) use probes::{PROBES_FILE, SAME_WEIGHTS};
pub(crate) use recipe::RECIPE_FILE;
pub use recipe::Recipe;
pub use run_facts::RunFacts;
pub(crate) use run_facts::setting;
pub(crate) use sentence_transformers::{Obstacle, StLayout};
pub(crate) use staged::StagedFolder;

use crate::backend::{Backend, Cpu, Dtype, Shape, View};
use crate::data::{Batch, BatchView, Instructions, positives};
use crate::dist::{Collective, Solo};
use crate::loss::{Contrastive, Embeddings, InfoNce, ObjectiveOptions};
use crate::model::weights::ModelFolder;
use crate::model::{
    Decoder, Dropout, GradientsReady, Input, LoraConfig, SavedDecoder, Values, embed_streamed,
    mean_pool, mean_pool_backward,
};
use crate::text::{PromptEncoder, Role};
use crate::{Error, ErrorKind, Result};

/// How embeddings are computed and compared.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BiEncoderOptions {
    /// Whether embeddings are L2-normalized.
    pub normalized: bool,
    /// Whether a query is scored against the passages of every process. Needs a process group.
    pub negatives_cross_device: bool,
    /// Divides similarities in the loss; 1.0 is used if embeddings are not normalized.
    pub temperature: f32,
    /// Number of sequences encoded at a time; `None`: all sequences of a batch at once. The result is the same.
    pub sub_batch_size: Option<usize>,
    /// Optimizations of the computation.
    pub shortcuts: Shortcuts,
}

/// Optimizations that change results by rounding errors at most. All are on by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortcuts {
    /// The last layer is computed at the pooled positions only, except keys and values.
    pub last_layer_at_pooled: bool,
    /// Equal sequences of a training batch are encoded once, unless dropout makes them different.
    pub dedup_sequences: bool,
}

impl Default for Shortcuts {
    fn default() -> Self {
        Shortcuts { last_layer_at_pooled: true, dedup_sequences: true }
    }
}

impl Default for BiEncoderOptions {
    fn default() -> Self {
        BiEncoderOptions {
            normalized: true,
            negatives_cross_device: false,
            temperature: 0.02,
            sub_batch_size: None,
            shortcuts: Shortcuts::default(),
        }
    }
}

impl BiEncoderOptions {
    /// The temperature of the loss: 1.0 unless embeddings are normalized.
    pub fn effective_temperature(&self) -> f32 {
        if self.normalized { self.temperature } else { 1.0 }
    }

    fn check(&self, processes: usize) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::new(ErrorKind::Argument, "the temperature is out of range")
                .expected("a positive number, such as 0.02")
                .got(self.temperature));
        }
        if self.sub_batch_size == Some(0) {
            return Err(Error::new(ErrorKind::Argument, "a sub-batch needs at least one sequence")
                .expected("1 or more")
                .got(0));
        }
        if self.negatives_cross_device && processes < 2 {
            return Err(Error::new(
                ErrorKind::Distributed,
                "cross-device negatives need a process group",
            )
            .expected("at least 2 processes")
            .got("one process")
            .hint("leave `negatives_cross_device` off, or start the run with several processes"));
        }
        Ok(())
    }
}

/// Whether `forward` computes a training loss or plain similarities.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Train,
    Eval,
}

/// A decoder that encodes queries and passages as embeddings.
///
/// ```no_run
/// use llara::{BiEncoderModel, BiEncoderOptions, Role};
///
/// let model = BiEncoderModel::from_folder("models/mine", BiEncoderOptions::default())?;
/// let passages = model.batch(Role::Passage, &["Tin melts at 232 °C.", "Owls hunt at night."], 64)?;
/// let query = model.batch(Role::Query, &["When does tin melt?"], 32)?;
/// let scores = model.forward(Some(&query), Some(&passages))?.scores;
/// # Ok::<(), llara::Error>(())
/// ```
pub struct BiEncoderModel<B: Backend = Cpu> {
    backend: B,
    decoder: Decoder<B>,
    prompts: Arc<PromptEncoder>,
    recipe: Recipe,
    options: BiEncoderOptions,
    folder: ModelFolder,
    mode: Mode,
    /// The adapters that are attached, if any.
    adapter: Option<LoraConfig>,
    /// Name of the base model on the Hub.
    base_name: Option<String>,
    run_facts: RunFacts,
}

/// The parts of a model, before they have been checked against each other.
pub(crate) struct Parts<B: Backend> {
    pub(crate) backend: B,
    pub(crate) decoder: Decoder<B>,
    pub(crate) folder: ModelFolder,
    pub(crate) prompts: Arc<PromptEncoder>,
    pub(crate) recipe: Recipe,
}

/// The embeddings of some sequences, and the state that their backward pass needs.
pub(crate) struct Encoding<B: Backend> {
    /// `[S, d]`
    pub(crate) embeddings: B::Tensor,
    input: Input<B>,
    decoder: SavedDecoder<B>,
    /// Reciprocal lengths before normalization. `[S, 1]`
    inv_norm: Option<B::Tensor>,
}

impl<B: Backend> BiEncoderModel<B> {
    /// A model in evaluation mode, in a group of one process.
    pub(crate) fn new(parts: Parts<B>, options: BiEncoderOptions) -> Result<Self> {
        options.check(1)?;
        let Parts { backend, mut decoder, folder, prompts, mut recipe } = parts;
        decoder.set_last_block_at_pooled_rows(options.shortcuts.last_layer_at_pooled);
        let activations = decoder.activations();
        decoder.set_activations(&backend, activations, false)?;
        recipe.normalized = options.normalized;
        let mode = Mode::Eval;
        Ok(BiEncoderModel {
            backend,
            decoder,
            prompts,
            recipe,
            options,
            folder,
            mode,
            adapter: None,
            base_name: None,
            run_facts: RunFacts::default(),
        })
    }

    /// Makes [`forward`](Self::forward) return the loss, and scores divided by the temperature.
    pub fn train(&mut self) {
        self.mode = Mode::Train;
    }

    /// Makes [`forward`](Self::forward) return similarities, not divided by the temperature, and no loss.
    pub fn eval(&mut self) {
        self.mode = Mode::Eval;
    }

    /// The options of the model.
    pub fn options(&self) -> &BiEncoderOptions {
        &self.options
    }

    /// Scores queries against the passages of every process, in a run on several processes. In one
    /// process [`forward`](Self::forward) then fails in training mode.
    pub fn set_negatives_cross_device(&mut self, on: bool) {
        self.options.negatives_cross_device = on;
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The decoder, for its parameters and their gradients.
    pub fn decoder(&self) -> &Decoder<B> {
        &self.decoder
    }

    /// The decoder, mutable.
    pub fn decoder_mut(&mut self) -> &mut Decoder<B> {
        &mut self.decoder
    }

    /// Tokenizer and template.
    pub fn prompts(&self) -> &PromptEncoder {
        &self.prompts
    }

    /// The same, shared, for another thread that tokenizes.
    pub(crate) fn shared_prompts(&self) -> Arc<PromptEncoder> {
        Arc::clone(&self.prompts)
    }

    /// The recipe: template, lengths, instructions and normalization.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// The folder that the model was loaded from; `None` for a new model.
    pub fn source(&self) -> Option<&std::path::Path> {
        self.folder.source()
    }

    /// Sets the maximum lengths, in tokens, that are saved with the model.
    ///
    /// # Errors
    /// If a length is not larger than the template, so that no tokens are left for text.
    pub fn set_max_lens(&mut self, query: usize, passage: usize) -> Result<()> {
        self.prompts.check_max_len(Role::Query, query)?;
        self.prompts.check_max_len(Role::Passage, passage)?;
        (self.recipe.query_max_len, self.recipe.passage_max_len) = (query, passage);
        Ok(())
    }

    /// Sets the instructions that are saved with the model.
    pub fn set_instructions(&mut self, query: &str, passage: &str) {
        query.clone_into(&mut self.recipe.query_instruction);
        passage.clone_into(&mut self.recipe.passage_instruction);
    }

    /// Adds the instructions of tasks that are saved with the model; those of a task of the same name are
    /// replaced.
    pub fn add_tasks(&mut self, tasks: BTreeMap<String, Instructions>) {
        self.recipe.tasks.extend(tasks);
    }

    /// Sets what the model card says about the training.
    pub fn set_run_facts(&mut self, facts: RunFacts) {
        self.run_facts = facts;
    }

    /// What the model card says about the training.
    pub fn run_facts(&self) -> &RunFacts {
        &self.run_facts
    }

    /// Sets the name of the base model on the Hub, `org/name`, for the model card and the adapter's
    /// configuration. Without it neither card nor metadata name the base model.
    pub fn set_base_name(&mut self, name: Option<String>) {
        self.base_name = name;
    }

    /// Name of the base model on the Hub.
    pub fn base_name(&self) -> Option<&str> {
        self.base_name.as_deref()
    }

    /// Sets the dtype of activations and their gradients. With bf16, frozen matrices are also rounded to bf16
    /// permanently; trainable ones stay f32.
    pub fn set_precision(&mut self, precision: Dtype) -> Result<()> {
        self.decoder.set_activations(&self.backend, precision, precision == Dtype::Bf16)
    }

    /// Makes all weights not trainable, for a model that only encodes.
    pub fn freeze(&mut self) -> Result<()> {
        self.decoder.freeze(&self.backend)
    }

    /// The dtype of activations.
    pub fn precision(&self) -> Dtype {
        self.decoder.activations()
    }

    /// The adapters that are attached, if any.
    pub fn adapter(&self) -> Option<&LoraConfig> {
        self.adapter.as_ref()
    }

    /// Dimension of the embeddings, `d`.
    pub fn dimension(&self) -> usize {
        self.decoder.config().hidden_size
    }

    /// Texts in their template, truncated to `max_len` tokens, as a batch.
    pub fn batch(
        &self,
        role: Role,
        texts: &[impl AsRef<str> + Sync],
        max_len: usize,
    ) -> Result<Batch> {
        Batch::from_sequences(self.prompts.encode_all(role, texts, max_len)?)
    }

    /// Embeddings of all sequences, `(sequences, d)`; `None` for [`Features::None`].
    ///
    /// # Errors
    /// When a token id is beyond the model's vocabulary.
    pub fn encode<'b>(&self, features: impl Into<Features<'b>>) -> Result<Option<Array2<f32>>> {
        let batches = match features.into() {
            Features::None => return Ok(None),
            Features::Batches(batches) => batches,
        };
        let mut values = Vec::new();
        for batch in batches {
            values.extend(self.backend.download(&self.encode_batch(batch)?)?);
        }
        let rows = values.len() / self.dimension();
        Ok(Some(output::matrix(values, rows, self.dimension())))
    }

    /// The embeddings of queries `(B, d)` and passages `(B·G, d)`, and if both are given, their scores and loss.
    ///
    /// In evaluation mode, scores are similarities `(B, B·G)`, and there is no loss. In training mode, scores are
    /// divided by the temperature, and the loss is computed from them. The positive of query `i` is passage `i·G`.
    ///
    /// # Errors
    /// When the passages are not a multiple of the queries, or a token id is beyond the vocabulary.
    pub fn forward(&self, query: Option<&Batch>, passage: Option<&Batch>) -> Result<EncoderOutput> {
        if self.mode == Mode::Train && query.is_some() && passage.is_some() {
            self.options.check(1)?;
        }
        let encode = |batch: Option<&Batch>| batch.map(|b| self.encode_batch(b)).transpose();
        self.compare(encode(query)?, encode(passage)?)
    }

    /// The output for the embeddings of queries and passages.
    fn compare(&self, q: Option<B::Tensor>, p: Option<B::Tensor>) -> Result<EncoderOutput> {
        let host = |x: &B::Tensor| -> Result<Array2<f32>> {
            Ok(output::matrix(self.backend.download(x)?, x.rows(), x.cols()))
        };
        let mut out = EncoderOutput {
            q_reps: q.as_ref().map(host).transpose()?,
            p_reps: p.as_ref().map(host).transpose()?,
            loss: None,
            scores: None,
        };
        let (Some(q), Some(p)) = (q, p) else { return Ok(out) };
        let positives = positives(q.rows(), p.rows())?;
        match self.mode {
            Mode::Eval => out.scores = Some(host(&self.backend.scores(&q, &p, 1.0)?)?),
            Mode::Train => {
                let embeddings = Embeddings { queries: q, passages: p };
                // All passages are here already.
                let objective = Contrastive {
                    negatives_cross_device: false,
                    ..self.objective_in(Arc::new(Solo))
                };
                let scored = objective.score(&self.backend, embeddings, &positives)?;
                out.scores = Some(host(&scored.scores)?);
                out.loss = self.backend.download(&scored.loss)?.first().copied();
            }
        }
        Ok(out)
    }

    /// [`forward`](Self::forward) of a process of a group, in which every process has as many queries and
    /// passages. In training mode with cross-device negatives, all results are those of the batches of all `W`
    /// processes, end to end, and equal on every rank: embeddings of queries `(W·B, d)` and passages `(W·B·G, d)`,
    /// scores `(W·B, W·B·G)`, and their loss. Otherwise they are those of the own batch.
    ///
    /// # Errors
    /// As for [`forward`](Self::forward), or when the group fails.
    pub fn forward_in_group(
        &self,
        query: &Batch,
        passage: &Batch,
        collective: &dyn Collective<B>,
    ) -> Result<EncoderOutput> {
        self.options.check(collective.size())?;
        if self.mode == Mode::Eval || !self.options.negatives_cross_device {
            return self
                .compare(Some(self.encode_batch(query)?), Some(self.encode_batch(passage)?));
        }
        let gathered = |batch: &Batch| {
            let counts = vec![batch.len(); collective.size()];
            collective.all_gather_rows(self.encode_batch(batch)?, &counts)
        };
        self.compare(Some(gathered(query)?), Some(gathered(passage)?))
    }

    /// InfoNCE as the options describe it, for a run on the processes of `collective`. Further terms are
    /// set in [`Contrastive::options`].
    ///
    /// # Errors
    /// If cross-device negatives are enabled and there is only one process.
    pub fn objective(&self, collective: Arc<dyn Collective<B>>) -> Result<Contrastive<B>> {
        self.options.check(collective.size())?;
        Ok(self.objective_in(collective))
    }

    fn objective_in(&self, collective: Arc<dyn Collective<B>>) -> Contrastive<B> {
        Contrastive {
            info_nce: InfoNce { temperature: self.options.effective_temperature() },
            options: ObjectiveOptions::default(),
            normalized: self.options.normalized,
            negatives_cross_device: self.options.negatives_cross_device,
            collective,
            block_scores: Contrastive::<B>::BLOCK_SCORES,
        }
    }

    /// Embeddings of one batch, without state for a backward pass. `[S, d]`
    pub(crate) fn encode_batch(&self, batch: &Batch) -> Result<B::Tensor> {
        let chunk = self.options.sub_batch_size.unwrap_or(batch.len()).max(1);
        if chunk >= batch.len() {
            return self.encode_training(batch.view(), &vec![0; batch.len()], None);
        }
        let mut all = self.backend.zeros(batch.len(), self.dimension(), Dtype::F32)?;
        for start in (0..batch.len()).step_by(chunk) {
            let chunk = start..(start + chunk).min(batch.len());
            let sequences = batch.slice(chunk.clone());
            let embeddings = self.encode_training(sequences, &vec![0; chunk.len()], None)?;
            self.backend.copy(embeddings.view(), all.view_mut().with_rows(chunk))?;
        }
        Ok(all)
    }

    /// Embeddings of some sequences of a training batch, without state for a backward pass.
    /// `sequence_numbers` are their indices in the whole step. `[S, d]`
    pub(crate) fn encode_training(
        &self,
        batch: BatchView<'_>,
        sequence_numbers: &[u32],
        dropout: Option<Dropout>,
    ) -> Result<B::Tensor> {
        let input = self.input(batch, sequence_numbers)?;
        let hidden = self.decoder.forward(&self.backend, &input, dropout)?;
        let pooled = mean_pool(&self.backend, &hidden, &input)?;
        if self.options.normalized { Ok(self.backend.normalize(&pooled)?.0) } else { Ok(pooled) }
    }

    /// [`encode_training`](Self::encode_training), also returning the state that [`backward`](Self::backward) needs.
    pub(crate) fn encode_saving(
        &self,
        batch: BatchView<'_>,
        sequence_numbers: &[u32],
        dropout: Option<Dropout>,
    ) -> Result<Encoding<B>> {
        let input = self.input(batch, sequence_numbers)?;
        let (hidden, decoder) = self.decoder.forward_saving(&self.backend, &input, dropout)?;
        let pooled = mean_pool(&self.backend, &hidden, &input)?;
        let (embeddings, inv_norm) = if self.options.normalized {
            let (embeddings, inv_norm) = self.backend.normalize(&pooled)?;
            (embeddings, Some(inv_norm))
        } else {
            (pooled, None)
        };
        Ok(Encoding { embeddings, input, decoder, inv_norm })
    }

    /// Accumulates the gradients of all trainable parameters, from the gradient with respect to the embeddings
    /// `[S, d]`; `ready` receives parameters as in [`Decoder::backward`].
    pub(crate) fn backward(
        &mut self,
        encoding: Encoding<B>,
        gradient: View<'_, B::Tensor>,
        ready: &mut dyn GradientsReady<B>,
    ) -> Result<()> {
        let Encoding { embeddings, input, decoder, inv_norm } = encoding;
        let backend = &self.backend;
        let dpooled = match inv_norm {
            Some(inv_norm) => backend.normalize_backward(gradient, &embeddings, &inv_norm)?,
            None => {
                let mut copy = backend.zeros(gradient.rows, gradient.cols, Dtype::F32)?;
                backend.copy(gradient, copy.view_mut())?;
                copy
            }
        };
        let dhidden = mean_pool_backward(&self.backend, &dpooled, &input)?;
        self.decoder.backward(&self.backend, &input, &dhidden, decoder, ready)
    }

    /// Embeddings of one batch with other weights, in f32, on the host; see [`embed_streamed`].
    fn embed_with(&self, batch: &Batch, values: &mut Values<'_>) -> Result<Vec<f32>> {
        let input = self.input(batch.view(), &vec![0; batch.len()])?;
        let pooled = embed_streamed(&self.backend, self.decoder.config(), values, &input)?;
        match self.options.normalized {
            true => self.backend.download(&self.backend.normalize(&pooled)?.0),
            false => self.backend.download(&pooled),
        }
    }

    fn input(&self, batch: BatchView<'_>, sequence_numbers: &[u32]) -> Result<Input<B>> {
        let pooled_tokens = self.prompts.template().pooled_tokens;
        let counts = std::iter::repeat_n(pooled_tokens, batch.len());
        self.input_with_output_rows(batch, counts, sequence_numbers)
    }

    /// Some sequences of a training batch on the device; the decoder returns the hidden states of the last
    /// `counts[s]` positions of each sequence.
    pub(crate) fn input_with_output_rows(
        &self,
        batch: BatchView<'_>,
        counts: impl IntoIterator<Item = usize>,
        sequence_numbers: &[u32],
    ) -> Result<Input<B>> {
        let vocab_size = self.decoder.config().vocab_size;
        if let Some(id) = batch.ids().iter().find(|&&id| id as usize >= vocab_size) {
            return Err(Error::new(ErrorKind::Data, "a token id is beyond the model's vocabulary")
                .expected(format!("ids below {vocab_size}"))
                .got(id)
                .hint("the tokenizer and the weights must come from the same model"));
        }
        self.decoder.input(&self.backend, batch, counts, sequence_numbers)
    }
}
