//! The task of fine-tuning: queries and their passages, compared by an objective over embeddings.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::batches::BatchSource;
use super::checkpoint::finetuning_settings;
use super::config::TrainConfig;
use super::step::{Chunking, accumulate_gradients_with};
use super::step_input::StepInput;
use super::task::{Task, TaskInput};
use crate::Result;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::{Dataset, Draw};
use crate::dist::Collective;
use crate::loss::{Contrastive, Objective, ObjectiveContext};
use crate::model::{GradientsReady, LoraConfig};

/// Fine-tuning on a dataset of queries with positives and hard negatives.
pub struct Finetuning<'r, B: Backend> {
    batches: BatchSource<'r>,
    objective: Box<dyn Objective<B>>,
}

impl<'r, B: Backend> Finetuning<'r, B> {
    /// The task of one process of a group. Sets the lengths and instructions of the model's recipe.
    ///
    /// # Errors
    /// When a setting is out of its range or the lengths leave no room for text.
    pub fn new(
        model: &mut BiEncoderModel<B>,
        dataset: &'r Dataset,
        config: &'r TrainConfig,
        collective: &Arc<dyn Collective<B>>,
    ) -> Result<Self> {
        let sampler = config.sampler(dataset, collective.size())?;
        model.set_max_lens(config.query_max_len, config.passage_max_len)?;
        model.set_instructions(&config.query_instruction, &config.passage_instruction);
        model.add_tasks(dataset.sources().tasks(&config.instructions())?);
        dataset.check_group(config.group_size)?;
        config.objective.check(&ObjectiveContext {
            dimension: model.dimension(),
            group_size: config.group_size,
            negatives_cross_device: model.options().negatives_cross_device,
        })?;
        let info_nce = model.objective(Arc::clone(collective))?;
        let objective = Box::new(Contrastive { options: config.objective.clone(), ..info_nce });
        let batches = BatchSource {
            dataset,
            config,
            sampler,
            prompts: model.shared_prompts(),
            deduplicate: model.options().shortcuts.dedup_sequences,
            has_dropout: model.adapter().is_some_and(LoraConfig::has_dropout),
            rank: (collective.rank(), collective.size()),
        };
        Ok(Finetuning { batches, objective })
    }
}

impl<B: Backend> Task<B> for Finetuning<'_, B> {
    type Input = StepInput;

    const TERMS: &'static [&'static str] = &[];

    fn dataset(&self) -> &Dataset {
        self.batches.dataset
    }

    fn steps_per_epoch(&self) -> u64 {
        self.batches.sampler.steps_per_epoch()
    }

    fn settings(&self, model: &BiEncoderModel<B>) -> Map<String, Value> {
        let BatchSource { config, dataset, rank: (_, ranks), .. } = self.batches;
        finetuning_settings(model.options(), config, dataset, ranks)
    }

    fn input(&self, step: u64) -> Result<StepInput> {
        self.batches.input(step)
    }

    fn accumulate_gradients(
        &self,
        model: &mut BiEncoderModel<B>,
        input: &StepInput,
        chunking: &Chunking,
        ready: &mut dyn GradientsReady<B>,
    ) -> Result<B::Tensor> {
        accumulate_gradients_with(model, self.objective.as_ref(), input, chunking, ready)
    }
}

impl TaskInput for StepInput {
    fn rows(&self) -> &[Draw] {
        &self.rows
    }

    fn tokens(&self) -> u64 {
        self.tokens as u64
    }

    fn loss_weight(&self, rank: usize) -> f64 {
        self.rows_per_rank.share(rank)
    }
}
