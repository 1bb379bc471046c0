//! Everything that determines a run besides the model and the data.

use std::path::PathBuf;

use super::optimizer::AdamWConfig;
use super::schedule::{Decay, Warmup};
use super::step::Chunking;
use crate::data::{Dataset, Instructions, Sampler, SamplerConfig, Sampling};
use crate::loss::ObjectiveOptions;
use crate::model::weights::SaveDtype;
use crate::{Error, ErrorKind, Result};

/// When a run ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RunLength {
    /// After this many epochs; 0.5 is half of the data.
    Epochs(f64),
    /// After this many steps.
    Steps(u64),
}

impl RunLength {
    /// Number of steps of a run whose epochs have `steps_per_epoch` steps.
    ///
    /// # Errors
    /// When there would be none.
    pub fn steps(self, steps_per_epoch: u64) -> Result<u64> {
        match self {
            RunLength::Steps(steps) if steps > 0 => Ok(steps),
            RunLength::Epochs(epochs) if epochs.is_finite() && epochs > 0.0 => {
                Ok((epochs * steps_per_epoch as f64).ceil() as u64)
            }
            other => Err(Error::new(ErrorKind::Argument, "a run of no steps")
                .expected("a positive number of steps or epochs")
                .got(format!("{other:?}"))),
        }
    }
}

/// What is saved while a run goes on, besides the model at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Saving {
    /// Number of steps between two checkpoints; `None`: only the final model is saved.
    pub every: Option<u64>,
    /// How many of those are kept, the newest; `None`: all.
    pub keep: Option<usize>,
    /// Number format of saved weights.
    pub dtype: SaveDtype,
}

/// From which files the rows of a batch come.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Batching {
    /// From all files together.
    #[default]
    Mixed,
    /// From one file each.
    PerFile {
        /// The share of batches of each file; empty: proportional to its rows.
        weights: Vec<f64>,
    },
}

/// Settings of a training run. The defaults are those of the reference and its trainer.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainConfig {
    /// Where the model and the log go.
    pub output_dir: PathBuf,
    /// When the run ends.
    pub length: RunLength,
    /// Rows in a batch of one process.
    pub batch_size: usize,
    /// Passages of a row: one positive and hard negatives.
    pub group_size: usize,
    /// Tokens that a query with its template is cut to.
    pub query_max_len: usize,
    /// Tokens that a passage with its template is cut to.
    pub passage_max_len: usize,
    /// The terms of the loss.
    pub objective: ObjectiveOptions,
    /// How rows and passages are drawn.
    pub sampling: Sampling,
    /// From which files the rows of a batch come.
    pub batching: Batching,
    /// Whether the last, shorter batch of an epoch is left out.
    pub drop_last: bool,
    /// Seed of all random draws.
    pub seed: u64,
    /// Learning rate after the warm-up.
    pub learning_rate: f64,
    /// How the learning rate falls.
    pub decay: Decay,
    /// How the learning rate rises at first.
    pub warmup: Warmup,
    /// Moments, weight decay and clipping.
    pub adamw: AdamWConfig,
    /// Put in front of every query that has no `prompt` of its own.
    pub query_instruction: String,
    /// Put in front of every passage.
    pub passage_instruction: String,
    /// How a batch is split into chunks.
    pub chunking: Chunking,
    /// Steps between two lines of the log.
    pub logging_steps: u64,
    /// Models saved on the way.
    pub saving: Saving,
    /// Whether the optimizer's moments are divided among the processes (ZeRO stage 1); otherwise every process
    /// has all of them. No effect with one process.
    pub shard_optimizer: bool,
    /// Elements of a bucket, whose gradients are summed over processes at once; `None`: as
    /// [`bucket_elements`](super::bucket_elements) says.
    pub bucket_elements: Option<usize>,
}

impl TrainConfig {
    /// What draws the batches of all `processes` from a dataset.
    ///
    /// # Errors
    /// When a setting is out of its range.
    pub fn sampler(&self, dataset: &Dataset, processes: usize) -> Result<Sampler> {
        let config = SamplerConfig {
            seed: self.seed,
            sampling: self.sampling,
            rows: dataset.len(),
            batch_size: self.batch_size * processes,
            group_size: self.group_size,
            drop_last: self.drop_last,
        };
        match &self.batching {
            Batching::Mixed => Sampler::new(config),
            Batching::PerFile { weights } => {
                Sampler::per_file(config, &dataset.rows_of_files(), weights)
            }
        }
    }

    /// The instructions of texts whose row and file have none.
    pub fn instructions(&self) -> Instructions {
        Instructions {
            query: self.query_instruction.clone(),
            passage: self.passage_instruction.clone(),
        }
    }

    /// A query behind its row's own `prompt`, or the instruction for all.
    pub fn query_text(&self, prompt: Option<&str>, query: &str) -> String {
        format!("{}{query}", prompt.unwrap_or(&self.query_instruction))
    }

    /// A passage behind the instruction of its file, or the instruction for all.
    pub fn passage_text(&self, instruction: Option<&str>, passage: &str) -> String {
        format!("{}{passage}", instruction.unwrap_or(&self.passage_instruction))
    }

    /// The reference's settings.
    pub fn new(output_dir: impl Into<PathBuf>) -> Self {
        TrainConfig {
            output_dir: output_dir.into(),
            length: RunLength::Epochs(3.0),
            batch_size: 8,
            group_size: 8,
            query_max_len: 32,
            passage_max_len: 128,
            objective: ObjectiveOptions::default(),
            sampling: Sampling::Random,
            batching: Batching::default(),
            drop_last: false,
            seed: 42,
            learning_rate: 5e-5,
            decay: Decay::Linear,
            warmup: Warmup::Steps(0),
            adamw: AdamWConfig::default(),
            query_instruction: String::new(),
            passage_instruction: String::new(),
            chunking: Chunking::default(),
            logging_steps: 10,
            saving: Saving::default(),
            shard_optimizer: true,
            bucket_elements: None,
        }
    }
}
