//! The memory of an evaluation while a model is trained, with gradients and optimizer state in memory.

use std::collections::BTreeMap;

use crate::Result;
use crate::backend::{Backend, CountingBackend, Dtype};
use crate::biencoder::BiEncoderModel;
use crate::data::{Batch, Instructions};
use crate::retrieval::BLOCK_TEXTS;
use crate::text::{PromptEncoder, Role};
use crate::train::config::TrainConfig;
use crate::train::evaluation::Evaluation;

/// Bytes of a retrieved passage, twice: rankings are copied when a search ends.
const HIT_BYTES: usize = 2 * 8;

/// What determines the memory of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvaluationShape {
    /// Maximum number of tokens in a batch; a longer text is a batch of its own.
    pub batch_tokens: usize,
    /// Tokens of the longest text, at most.
    pub longest: usize,
    /// Queries of the largest set.
    pub queries: usize,
    /// Passages of the largest set.
    pub passages: usize,
}

impl EvaluationShape {
    /// The shape of a run's evaluation; `tasks` are those of the recipe. No text is tokenized: a token is at least one byte.
    ///
    /// # Errors
    /// The template cannot be tokenized.
    pub fn of(
        evaluation: &Evaluation,
        config: &TrainConfig,
        prompts: &PromptEncoder,
        tasks: &BTreeMap<String, Instructions>,
    ) -> Result<Self> {
        let of_tasks = tasks.values().map(Instructions::bytes).max().unwrap_or(0);
        let datasets = || evaluation.sets.iter().map(|set| &set.dataset);
        let longest = |role, instruction: &str, texts: &mut dyn Iterator<Item = &String>| {
            let template = prompts.encode(role, "", usize::MAX)?.len();
            let bytes = texts.map(String::len).max().unwrap_or(0);
            let max_len = match role {
                Role::Query => config.query_max_len,
                Role::Passage => config.passage_max_len,
            };
            Ok::<usize, crate::Error>(
                max_len.min(template + instruction.len().max(of_tasks) + bytes),
            )
        };
        let query = longest(
            Role::Query,
            &config.query_instruction,
            &mut datasets().flat_map(|dataset| &dataset.queries.texts),
        )?;
        let passage = longest(
            Role::Passage,
            &config.passage_instruction,
            &mut datasets().flat_map(|dataset| &dataset.corpus.texts),
        )?;
        Ok(EvaluationShape {
            batch_tokens: evaluation.batch_tokens,
            longest: query.max(passage),
            queries: datasets().map(|dataset| dataset.queries.len()).max().unwrap_or(0),
            passages: datasets().map(|dataset| dataset.corpus.len()).max().unwrap_or(0),
        })
    }

    /// Memory of the host: the token ids and embeddings of a block of texts, the embeddings of all queries, and
    /// their rankings.
    pub(super) fn host_bytes(&self, dimension: usize) -> usize {
        let block = self.passages.max(self.queries).min(BLOCK_TEXTS.get());
        4 * block * (dimension + self.longest) + self.queries * (4 * dimension + 100 * HIT_BYTES)
    }

    /// Peak memory of tensors in bytes, those that there are before included.
    pub(super) fn tensor_bytes(
        &self,
        counting: &CountingBackend,
        model: &BiEncoderModel<CountingBackend>,
    ) -> Result<usize> {
        counting.reset_peak();
        let longest = self.longest.max(1);
        let texts = self.passages.max(self.queries).max(1);
        let sequences = (self.batch_tokens / longest).clamp(1, texts);
        let batch = Batch::from_sequences((0..sequences).map(|_| vec![0; longest]))?;
        drop(model.encode_batch(&batch)?);
        let dimension = model.dimension();
        let rows = |texts: usize| counting.zeros(texts.max(1), dimension, Dtype::F32);
        let block = |texts: usize| rows(texts.min(BLOCK_TEXTS.get()));
        drop(counting.scores(&rows(self.queries.min(256))?, &block(self.passages)?, 1.0)?);
        Ok(counting.peak())
    }
}
