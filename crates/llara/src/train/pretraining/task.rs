//! The task of pretraining: rows drawn, read and tokenized, and their gradients.

use std::sync::Arc;

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::gradients::{PretrainingLoss, accumulate_pretraining_gradients};
use super::input::PretrainingInput;
use super::options::{LossWeights, PretrainingOptions};
use super::sequences::{PretrainingEncoder, TrainingSequence};
use crate::Result;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::{Dataset, Draw, PretrainingData, Sampler};
use crate::dist::Collective;
use crate::loss::RowsPerRank;
use crate::model::{Dropout, GradientsReady, LoraConfig};
use crate::train::checkpoint::decimal;
use crate::train::config::TrainConfig;
use crate::train::step::Chunking;
use crate::train::task::Task;

/// Pretraining on texts.
pub struct Pretraining<'r, B: Backend> {
    pub(in crate::train) source: PretrainingSource<'r>,
    options: &'r PretrainingOptions,
    loss: PretrainingLoss<B>,
    /// Whether the model has adapters with dropout.
    has_dropout: bool,
}

/// Draws, reads and encodes rows. Of a global batch of `W·b` rows, rank `r` takes rows `r·b..(r + 1)·b`.
pub(in crate::train) struct PretrainingSource<'r> {
    pub(in crate::train) data: &'r PretrainingData,
    pub(in crate::train) config: &'r TrainConfig,
    pub(in crate::train) sampler: Sampler,
    pub(in crate::train) encoder: PretrainingEncoder,
    /// The rank of this process, and the number of processes.
    pub(in crate::train) rank: (usize, usize),
}

impl<'r, B: Backend> Pretraining<'r, B> {
    /// The task of one process of a group. Of `config`, the settings of fine-tuning have no effect; its group size
    /// is 1.
    ///
    /// # Errors
    /// When a setting is out of its range, or the template is unfit for pretraining.
    pub fn new(
        model: &BiEncoderModel<B>,
        data: &'r PretrainingData,
        config: &'r TrainConfig,
        options: &'r PretrainingOptions,
        collective: Arc<dyn Collective<B>>,
    ) -> Result<Self> {
        let encoder = PretrainingEncoder::new(model.shared_prompts(), options)?;
        let sampler = config.sampler(data.dataset(), collective.size())?;
        let rank = (collective.rank(), collective.size());
        Ok(Pretraining {
            source: PretrainingSource { data, config, sampler, encoder, rank },
            options,
            loss: PretrainingLoss { weights: options.weights, collective },
            has_dropout: model.adapter().is_some_and(LoraConfig::has_dropout),
        })
    }
}

impl PretrainingSource<'_> {
    /// The rows of this process's part of a step, how many rows each process has, and the sequences of each row.
    ///
    /// # Errors
    /// If a row has changed since it was checked, or the tokenizer rejects a text.
    pub(in crate::train) fn encoded(
        &self,
        step: u64,
    ) -> Result<(Vec<Draw>, RowsPerRank, Vec<Vec<TrainingSequence>>)> {
        let (rank, ranks) = self.rank;
        let all = self.sampler.batch(step);
        let rows_per_rank = RowsPerRank::divided(all.len(), self.config.batch_size, ranks, 1);
        let first = rows_per_rank.before(rank);
        let rows = all[first..first + rows_per_rank.queries[rank]].to_vec();
        // All results are collected first: the reported error must not depend on the threads.
        let encode = |draw: &Draw| self.encoder.encode(&self.data.row(draw.row)?);
        let sequences: Vec<Result<_>> = rows.par_iter().map(encode).collect();
        let sequences = sequences.into_iter().collect::<Result<_>>()?;
        Ok((rows, rows_per_rank, sequences))
    }
}

impl<B: Backend> Task<B> for Pretraining<'_, B> {
    type Input = PretrainingInput;

    const TERMS: &'static [&'static str] = &["language_model", "auto_encode", "auto_regress"];

    /// Tokens to predict, and texts with targets of each kind.
    const COUNTS: usize = 3;

    fn dataset(&self) -> &Dataset {
        self.source.data.dataset()
    }

    fn steps_per_epoch(&self) -> u64 {
        self.source.sampler.steps_per_epoch()
    }

    fn settings(&self, model: &BiEncoderModel<B>) -> Map<String, Value> {
        let PretrainingOptions { cutoff_len, stop_words, weights } = self.options;
        let LossWeights { language_model, auto_encode, auto_regress } = weights;
        let pieces = self.source.data.piece_length().map(|length| length.characters());
        let stop_words = stop_words.as_ref().map(|words| format!("{:016x}", words.fingerprint()));
        let value = json!({
            "task": "pretraining",
            "normalized": model.options().normalized,
            "cutoff-len": cutoff_len,
            "stop-words": stop_words,
            "piece-characters": pieces,
            "language-model-weight": decimal(*language_model),
            "auto-encode-weight": decimal(*auto_encode),
            "auto-regress-weight": decimal(*auto_regress),
        });
        match value {
            Value::Object(settings) => settings,
            _ => unreachable!("`json!` was given an object"),
        }
    }

    fn input(&self, step: u64) -> Result<PretrainingInput> {
        let (rows, rows_per_rank, sequences) = self.source.encoded(step)?;
        let dropout = self.has_dropout.then_some(Dropout { seed: self.source.config.seed, step });
        let bag_rows = self.source.encoder.pooled_tokens();
        let share = (&rows_per_rank, self.source.rank.0);
        let input = PretrainingInput::share(&sequences, share, bag_rows, dropout)?;
        Ok(PretrainingInput { rows, ..input })
    }

    fn accumulate_gradients(
        &self,
        model: &mut BiEncoderModel<B>,
        input: &PretrainingInput,
        chunking: &Chunking,
        ready: &mut dyn GradientsReady<B>,
    ) -> Result<B::Tensor> {
        accumulate_pretraining_gradients(model, &self.loss, input, chunking, ready)
    }
}
