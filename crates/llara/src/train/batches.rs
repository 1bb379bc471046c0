//! The input of each step: rows drawn, read, tokenized and packed.

use std::sync::Arc;

use super::config::TrainConfig;
use super::step_input::StepInput;
use crate::Result;
use crate::data::{Dataset, Draw, Sampler};
use crate::loss::RowsPerRank;
use crate::model::Dropout;
use crate::text::{PromptEncoder, Role};

/// The token ids of the texts of one step.
pub(super) struct Tokenized {
    /// The rows of the texts: this process's part of the batch.
    pub(super) rows: Vec<Draw>,
    /// How many rows of the batch each process has.
    pub(super) rows_per_rank: RowsPerRank,
    /// `B` queries.
    pub(super) queries: Vec<Vec<u32>>,
    /// `B·G` passages, in the order of rows; the positive of each row is first.
    pub(super) passages: Vec<Vec<u32>>,
    /// All positives of each row, if the objective compares texts.
    pub(super) positives: Option<Vec<Vec<Vec<u32>>>>,
    /// A teacher's score of each passage, if the objective has one. `[B·G]`
    pub(super) teacher_scores: Option<Vec<f32>>,
}

/// Prepares the input of any step, independently of other steps and without the model, so that another thread
/// can do this while the model computes.
pub(super) struct BatchSource<'r> {
    pub(super) dataset: &'r Dataset,
    pub(super) config: &'r TrainConfig,
    pub(super) sampler: Sampler,
    pub(super) prompts: Arc<PromptEncoder>,
    /// Whether equal sequences are encoded once.
    pub(super) deduplicate: bool,
    /// Whether the model has adapters with dropout.
    pub(super) has_dropout: bool,
    /// The rank of this process, and the number of processes.
    pub(super) rank: (usize, usize),
}

impl BatchSource<'_> {
    /// The input of a step, counted from 0.
    ///
    /// # Errors
    /// If a row has changed since it was checked, or the tokenizer rejects a text.
    pub(super) fn input(&self, step: u64) -> Result<StepInput> {
        let Tokenized { rows, rows_per_rank, queries, passages, positives, teacher_scores } =
            self.tokenized(step)?;
        let dropout = self.has_dropout.then_some(Dropout { seed: self.config.seed, step });
        let share = (rows_per_rank, self.rank.0);
        let input = StepInput::share(&queries, &passages, share, self.deduplicate, dropout)?;
        let input = match positives {
            Some(positives) => input.with_text_keys(&positives),
            None => input,
        };
        Ok(StepInput { rows, teacher_scores, ..input })
    }

    /// The token ids of the texts of this process's part of a step, counted from 0. Of a global batch of
    /// `W·b` rows, rank `r` takes rows `r·b..(r + 1)·b`.
    ///
    /// # Errors
    /// As for [`input`](Self::input).
    pub(super) fn tokenized(&self, step: u64) -> Result<Tokenized> {
        let (rank, ranks) = self.rank;
        let all = self.sampler.batch(step);
        let (batch_size, group_size) = (self.config.batch_size, self.config.group_size);
        let rows_per_rank = RowsPerRank::divided(all.len(), batch_size, ranks, group_size);
        let first = rows_per_rank.before(rank);
        let rows = all[first..first + rows_per_rank.queries[rank]].to_vec();
        let mut queries = Vec::with_capacity(rows.len());
        let mut passages = Vec::with_capacity(rows.len() * self.config.group_size);
        let objective = &self.config.objective;
        let mut positives = objective.false_negatives.mask_equal.then(Vec::new);
        let mut teacher_scores = objective.distillation.map(|_| Vec::new());
        for draw in &rows {
            let row = self.dataset.row(draw.row)?;
            let group = self.sampler.group(draw, &row)?;
            queries.push(self.config.query_text(group.prompt, group.query));
            let instruction = row.passage_instruction.as_deref();
            let passage = |text: &str| self.config.passage_text(instruction, text);
            passages.extend(group.passages.iter().map(|text| passage(text)));
            if let Some(positives) = &mut positives {
                let texts: Vec<String> = row.pos.iter().map(|text| passage(text)).collect();
                let max_len = self.config.passage_max_len;
                positives.push(self.prompts.encode_all(Role::Passage, &texts, max_len)?);
            }
            if let Some(scores) = &mut teacher_scores {
                let of_group = group.teacher_scores;
                scores.extend(of_group.ok_or_else(|| self.dataset.no_teacher_scores(draw.row))?);
            }
        }
        // On all threads: with a GPU they are idle, and on a CPU this work has to be done in any case.
        let (query_len, passage_len) = (self.config.query_max_len, self.config.passage_max_len);
        Ok(Tokenized {
            rows,
            rows_per_rank,
            queries: self.prompts.encode_all(Role::Query, &queries, query_len)?,
            passages: self.prompts.encode_all(Role::Passage, &passages, passage_len)?,
            positives,
            teacher_scores,
        })
    }
}
