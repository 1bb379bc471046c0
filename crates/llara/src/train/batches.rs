//! The batch of each step: rows drawn, read and tokenized.

use std::sync::Arc;

use super::config::TrainConfig;
use crate::Result;
use crate::data::{Batch, Dataset, Draw, Sampler};
use crate::text::{PromptEncoder, Role};

/// What one step trains on.
pub(super) struct StepBatch {
    /// From 0.
    pub(super) step: u64,
    /// The rows that it was made from.
    pub(super) draws: Vec<Draw>,
    /// `(B, …)`
    pub(super) query: Batch,
    /// `(B·G, …)`: in row order, each row's positive first.
    pub(super) passage: Batch,
}

/// Makes the batch of any step, whatever was made before, without the model: a thread of its own
/// can do it while the model computes.
pub(super) struct BatchSource<'r> {
    pub(super) dataset: &'r Dataset,
    pub(super) config: &'r TrainConfig,
    pub(super) sampler: Sampler,
    pub(super) prompts: Arc<PromptEncoder>,
}

impl BatchSource<'_> {
    /// # Errors
    /// When a row is no longer what was checked, or a text is refused by the tokenizer.
    pub(super) fn batch(&self, step: u64) -> Result<StepBatch> {
        let draws = self.sampler.batch(step);
        let mut queries = Vec::with_capacity(draws.len());
        let mut passages = Vec::with_capacity(draws.len() * self.config.group_size);
        for draw in &draws {
            let row = self.dataset.row(draw.row)?;
            let group = self.sampler.group(draw, &row)?;
            queries.push(self.config.query_text(group.prompt, group.query));
            passages.extend(group.passages.iter().map(|text| self.config.passage_text(text)));
        }
        Ok(StepBatch {
            step,
            draws,
            query: self.tokenize(Role::Query, &queries, self.config.query_max_len)?,
            passage: self.tokenize(Role::Passage, &passages, self.config.passage_max_len)?,
        })
    }

    /// On all threads: where a device computes they are idle, and where they compute themselves it is
    /// no more work than it would be between two steps.
    fn tokenize(&self, role: Role, texts: &[String], max_len: usize) -> Result<Batch> {
        Batch::from_sequences(self.prompts.encode_all(role, texts, max_len)?)
    }
}
