//! Options of a training run about its length, the batch and its chunks.

use std::time::Duration;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::backend::{Backend, Dtype};
use llara::train::plan::{ChunkPolicy, MemoryBudget};
use llara::train::{Chunking, RunLength};

use crate::compute::Precision;

#[derive(clap::Args)]
#[command(next_help_heading = "Training")]
pub(crate) struct TrainingArgs {
    /// Number of steps, instead of --num-train-epochs; −1: not set
    #[arg(long, value_name = "N", default_value_t = -1)]
    pub(crate) max_steps: i64,
    /// Number of epochs
    #[arg(long, value_name = "X", default_value_t = 3.0)]
    pub(crate) num_train_epochs: f64,
    /// Number of rows per step and process
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) per_device_train_batch_size: usize,
    /// Maximum number of tokens in a chunk of a batch: smaller chunks need less memory and more work,
    /// the gradient is the same; auto: one chunk if it fits in memory, otherwise the cheapest division
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = chunk_tokens)]
    pub(crate) chunk_tokens: ChunkTokens,
    /// Memory limit of the process, such as 8GiB, 800MB or 50% [default: 90 % of the free memory]
    #[arg(long, value_name = "SIZE", value_parser = memory_budget)]
    pub(crate) memory_budget: Option<MemoryBudget>,
    /// Maximum number of sequences in a chunk of a batch; −1: no limit
    #[arg(long, value_name = "N", default_value_t = -1)]
    pub(crate) sub_batch_size: i64,
    /// Compute the last layer, except keys and values, only at the pooled positions: less work, the same
    /// result
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(crate) last_layer_at_pooled: bool,
    /// The reference's name for --dtype bf16
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set, hide = true)]
    #[arg(value_parser = BoolishValueParser::new(), conflicts_with = "dtype")]
    pub(crate) bf16: bool,
    /// Stop after this time since the start, such as 3h50m or 90m, in the same way as after a signal
    #[arg(long, value_name = "TIME", value_parser = crate::values::duration)]
    pub(crate) max_time: Option<Duration>,
    /// Seed of all random numbers
    #[arg(long, value_name = "N", default_value_t = 42, value_parser = whole_number)]
    pub(crate) seed: u64,
}

/// The size of the chunks of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChunkTokens {
    /// Depends on the available memory.
    Auto,
    /// At most this number of tokens.
    Tokens(usize),
}

fn chunk_tokens(text: &str) -> Result<ChunkTokens, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(ChunkTokens::Auto),
        (_, Ok(tokens)) => Ok(ChunkTokens::Tokens(tokens)),
        _ => Err("expected a number of tokens, or auto".into()),
    }
}

fn memory_budget(text: &str) -> Result<MemoryBudget, String> {
    let expected = "expected an amount such as 8GiB, 8GB or 800MB, or 50% of the machine's memory";
    text.parse().map_err(|_| expected.into())
}

fn whole_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected an integer from 0 to {}", u64::MAX))
}

impl TrainingArgs {
    /// The length of the run.
    pub(crate) fn length(&self) -> RunLength {
        match u64::try_from(self.max_steps) {
            Ok(steps) => RunLength::Steps(steps),
            Err(_) => RunLength::Epochs(self.num_train_epochs),
        }
    }

    /// The number format of activations: `--dtype`, or bf16 with the reference's flag `--bf16`.
    pub(crate) fn dtype(&self, precision: &Precision, backend: &impl Backend) -> Dtype {
        if self.bf16 { Dtype::Bf16 } else { precision.dtype(backend) }
    }

    /// Which properties of the chunks are chosen. With a given size, no activations are kept between the
    /// passes, unless a memory budget is given too.
    pub(crate) fn chunk_policy(&self) -> ChunkPolicy {
        let sequences = usize::try_from(self.sub_batch_size).ok().filter(|&n| n > 0);
        let max_sequences = sequences.unwrap_or(usize::MAX);
        let chunks_of = |max_tokens| Chunking { max_tokens, max_sequences, kept_tokens: 0 };
        match (self.chunk_tokens, sequences) {
            (ChunkTokens::Auto, None) => ChunkPolicy::Auto,
            (ChunkTokens::Auto, Some(_)) => ChunkPolicy::Fixed(chunks_of(usize::MAX)),
            (ChunkTokens::Tokens(tokens), None) if self.memory_budget.is_some() => {
                ChunkPolicy::FixedSize(chunks_of(tokens))
            }
            (ChunkTokens::Tokens(tokens), _) => ChunkPolicy::Fixed(chunks_of(tokens)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    #[command(no_binary_name = true)]
    struct Only {
        #[command(flatten)]
        training: TrainingArgs,
        #[arg(long)]
        dtype: Option<String>,
    }

    #[test]
    fn chunks_are_chosen_unless_they_are_given() {
        let policy = |args: &[&str]| Only::try_parse_from(args).unwrap().training.chunk_policy();
        let nothing_kept = Chunking { kept_tokens: 0, ..Chunking::default() };
        let tokens = Chunking { max_tokens: 512, ..nothing_kept };
        assert_eq!(policy(&[]), ChunkPolicy::Auto);
        assert_eq!(policy(&["--memory-budget", "4GiB"]), ChunkPolicy::Auto);
        assert_eq!(policy(&["--chunk-tokens", "512"]), ChunkPolicy::Fixed(tokens));
        let budget = ["--chunk-tokens", "512", "--memory-budget", "50%"];
        assert_eq!(policy(&budget), ChunkPolicy::FixedSize(tokens));
        let two = Chunking { max_sequences: 2, ..nothing_kept };
        let sequences = ["--sub-batch-size", "2", "--memory-budget", "1GB"];
        assert_eq!(policy(&sequences), ChunkPolicy::Fixed(two));
        assert!(chunk_tokens("many").is_err() && memory_budget("a lot").is_err());
    }
}
