//! The options of `llara finetune`, as they are given, and the settings that they make.

use std::path::PathBuf;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, ValueEnum};
use llara::backend::Dtype;
use llara::data::{BadRows, Sampling};
use llara::train::plan::{Cut, MemoryBudget};
use llara::train::{AdamWConfig, Chunking, Decay, RunLength, Saving, TrainConfig, Warmup};
use llara::{BiEncoderOptions, Shortcuts};

use super::lora_args::LoraArgs;
use super::trainer_flags::TrainerFlags;
use crate::compute::{Compute, Precision};
use crate::save_dtype::SavedAs;

/// Train a model on queries with positives and hard negatives.
#[derive(clap::Args)]
#[command(after_help = "\
Defaults are the reference's, so adapters are trained, and the output folder holds them without the
model; --use-lora false trains all weights and writes a model. The reference's other flags are understood too: those that mean nothing here
(--deepspeed, --fp16, --gradient_checkpointing, …) are accepted, each with a line that says what
stands in its place; those that ask for what is not there (--resume_from_checkpoint, …) are refused by name.

Examples:
  llara finetune --model base --train-data train.jsonl --output-dir tuned --use-lora false
  llara finetune --model Qwen/Qwen3-0.6B --template qwen3-embedding --train-data data/ \\
      --output-dir tuned --max-steps 1000 --warmup-ratio 0.1 --save-steps 200 --save-total-limit 2
  llara finetune --config run.toml --seed 7

run.toml has the same keys without the dashes; what the command line gives wins:
  model = \"base\"
  train-data = [\"a.jsonl\", \"b.jsonl\"]
  output-dir = \"tuned\"
  learning-rate = 1e-4
  use-lora = false

Prints one JSON object: steps, loss, tokens, tokens_per_second, output_dir.")]
pub(crate) struct Args {
    /// TOML file with any of these options; those of the command line win
    #[arg(long, value_name = "FILE")]
    #[arg(help_heading = "Model")]
    pub(super) config: Option<PathBuf>,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) data: DataArgs,
    #[command(flatten)]
    pub(super) training: TrainingArgs,
    #[command(flatten)]
    pub(super) lora: LoraArgs,
    #[command(flatten)]
    pub(super) optimizer: OptimizerArgs,
    #[command(flatten)]
    pub(super) output: OutputArgs,
    #[command(flatten)]
    pub(super) compute: Compute,
    #[command(flatten)]
    pub(super) precision: Precision,
    #[command(flatten)]
    pub(super) trainer_flags: TrainerFlags,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Model")]
pub(super) struct ModelArgs {
    /// Folder of the model to start from, or its name on the Hugging Face Hub (org/name)
    #[arg(long, alias = "model-name-or-path", value_name = "DIR|HUB_ID")]
    #[arg(required_unless_present = "config")]
    pub(super) model: Option<String>,
    /// Cache of the Hub [default: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR")]
    pub(super) cache_dir: Option<PathBuf>,
    /// What is put around texts: llara, e5-mistral, qwen3-embedding, or a TOML file
    /// [default: the model folder's own, or llara]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub(super) template: Option<String>,
    /// Add the template's tokens that the tokenizer lacks, and grow the vocabulary for them
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) add_special_tokens: bool,
    /// Whether vectors are brought to length 1
    #[arg(long, alias = "normlized", value_name = "BOOL", num_args = 0..=1)]
    #[arg(default_missing_value = "true", default_value = "true")]
    #[arg(action = ArgAction::Set, value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true)]
    pub(super) normalized: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArgs {
    /// Training rows: JSONL files with `query`, `pos` and `neg`, or folders of them
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "config")]
    pub(super) train_data: Vec<PathBuf>,
    /// What to do with a malformed row: error (refuse the data) or skip (leave it out and count it)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::bad_rows(), default_value = "error")]
    #[arg(hide_possible_values = true)]
    pub(super) on_bad_row: BadRows,
    /// Passages of a query: 1 positive and N − 1 hard negatives
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(super) train_group_size: usize,
    /// Tokens that a query with its template is cut to
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub(super) query_max_len: usize,
    /// Tokens that a passage with its template is cut to
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) passage_max_len: usize,
    /// Text put in front of every query that has no `prompt` of its own [default: none]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(super) query_instruction_for_retrieval: String,
    /// Text put in front of every passage [default: none]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub(super) passage_instruction_for_retrieval: String,
    /// How rows are drawn: random (shuffled, with random passages) or sequential (in file order,
    /// with the first passages, over and over)
    #[arg(long, value_name = "HOW", value_parser = crate::values::sampling(), default_value = "random")]
    #[arg(hide_possible_values = true)]
    pub(super) sampling: Sampling,
    /// Leave out the last, shorter batch of an epoch
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) dataloader_drop_last: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Training")]
pub(super) struct TrainingArgs {
    /// Steps of the run; wins over epochs; −1: off
    #[arg(long, value_name = "N", default_value_t = -1)]
    pub(super) max_steps: i64,
    /// How often the data is gone through
    #[arg(long, value_name = "X", default_value_t = 3.0)]
    pub(super) num_train_epochs: f64,
    /// Queries of a step
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(super) per_device_train_batch_size: usize,
    /// Divides similarities in the loss; 1.0 is used with --normalized false
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    pub(super) temperature: f32,
    /// Score queries against the passages of all processes; needs several
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) negatives_cross_device: bool,
    /// Tokens of a batch that go through the model at a time: less memory for more work, the same
    /// gradient; auto: the whole batch where it fits in memory, else what costs least
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = chunk_tokens)]
    pub(super) chunk_tokens: ChunkTokens,
    /// Memory that the process may take, such as 8GiB, 800MB or 50% [default: what is free]
    #[arg(long, value_name = "SIZE", value_parser = memory_budget)]
    pub(super) memory_budget: Option<MemoryBudget>,
    /// Sequences of a batch that go through the model at a time; −1: all
    #[arg(long, value_name = "N", default_value_t = -1)]
    pub(super) sub_batch_size: i64,
    /// Compute the last layer, but for keys and values, at the pooled positions alone: the same result
    /// for less work
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) last_layer_at_pooled: bool,
    /// Encode equal texts of a batch once, where no dropout tells them apart
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) equal_once: bool,
    /// The reference's name for --dtype bf16
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set, hide = true)]
    #[arg(value_parser = BoolishValueParser::new(), conflicts_with = "dtype")]
    pub(super) bf16: bool,
    /// Seed of all random draws
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub(super) seed: u64,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Optimizer")]
pub(super) struct OptimizerArgs {
    /// Learning rate after the warm-up
    #[arg(long, value_name = "X", default_value_t = 5e-5)]
    pub(super) learning_rate: f64,
    /// How the learning rate changes after the warm-up: linear (to 0), cosine (to 0),
    /// constant_with_warmup; or constant, which has no warm-up
    #[arg(long, value_name = "NAME", value_enum, default_value_t = Scheduler::Linear)]
    #[arg(hide_possible_values = true)]
    pub(super) lr_scheduler_type: Scheduler,
    /// Share of the steps in which the learning rate rises from 0
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(super) warmup_ratio: f64,
    /// Steps in which the learning rate rises from 0; wins over the ratio if not 0
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole_steps)]
    pub(super) warmup_steps: u64,
    /// Decoupled weight decay, on every parameter
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(super) weight_decay: f64,
    /// Decay of AdamW's first moment
    #[arg(long, value_name = "X", default_value_t = 0.9)]
    pub(super) adam_beta1: f64,
    /// Decay of AdamW's second moment
    #[arg(long, value_name = "X", default_value_t = 0.999)]
    pub(super) adam_beta2: f64,
    /// Added to the root of AdamW's second moment
    #[arg(long, value_name = "X", default_value_t = 1e-8)]
    pub(super) adam_epsilon: f64,
    /// Largest global norm of the gradients; 0: not clipped
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub(super) max_grad_norm: f64,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Output")]
pub(super) struct OutputArgs {
    /// Folder for the model and the log; new or empty
    #[arg(long, value_name = "DIR")] // required, except of `llara plan`; see `cli::command`
    pub(super) output_dir: Option<PathBuf>,
    /// Replace an earlier run in the output folder: its log and its checkpoint-N folders when training
    /// starts, its model when the new one is saved and verified
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) overwrite_output_dir: bool,
    /// Steps between two lines of log.jsonl
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = whole_steps)]
    pub(super) logging_steps: u64,
    /// Steps between two models saved on the way, as checkpoint-N; 0: only the last is saved
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole_steps)]
    pub(super) save_steps: u64,
    /// How many of those are kept, the newest; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) save_total_limit: usize,
    /// Number format of saved weights: f32, bf16, f16, or auto, as they were loaded
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = SavedAs::Auto)]
    #[arg(hide_possible_values = true)]
    pub(super) save_dtype: SavedAs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Scheduler {
    /// Rises, then falls in a straight line to 0
    Linear,
    /// Rises, then falls along half a cosine to 0
    Cosine,
    /// Stays; without warm-up
    Constant,
    /// Rises, then stays
    #[value(name = "constant_with_warmup", alias = "constant-with-warmup")]
    ConstantWithWarmup,
}

/// A number of steps. The reference's trainer takes a share of the run as well, below 1.
fn whole_steps(text: &str) -> Result<u64, String> {
    if let Ok(steps) = text.parse() {
        return Ok(steps);
    }
    match text.parse::<f64>() {
        Ok(steps) if steps >= 0.0 && steps < u64::MAX as f64 && steps.fract() == 0.0 => {
            Ok(steps as u64)
        }
        Ok(share) if share > 0.0 && share < 1.0 => {
            Err("a share of the run is not in this version: \
             give whole steps (for the warm-up there is --warmup-ratio)"
                .into())
        }
        _ => Err("not a number of steps, 0 or more".into()),
    }
}

/// Size of the pieces of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkTokens {
    /// As memory allows.
    Auto,
    /// So many tokens at most.
    Tokens(usize),
}

fn chunk_tokens(text: &str) -> Result<ChunkTokens, String> {
    match (text, text.parse()) {
        ("auto", _) => Ok(ChunkTokens::Auto),
        (_, Ok(tokens)) => Ok(ChunkTokens::Tokens(tokens)),
        _ => Err("a number of tokens, or auto".into()),
    }
}

fn memory_budget(text: &str) -> Result<MemoryBudget, String> {
    text.parse().map_err(|_| "such as 8GiB, 8GB, 800MB, or 50% of the machine's memory".into())
}

impl TrainingArgs {
    /// What of the pieces of a batch is given, and what may be chosen. Nothing of pieces whose size
    /// is given is kept between the passes, unless a budget says how much may be.
    pub(super) fn cut(&self) -> Cut {
        let sequences = usize::try_from(self.sub_batch_size).ok().filter(|&n| n > 0);
        let max_sequences = sequences.unwrap_or(usize::MAX);
        let pieces = |max_tokens| Chunking { max_tokens, max_sequences, kept_tokens: 0 };
        match (self.chunk_tokens, sequences) {
            (ChunkTokens::Auto, None) => Cut::Free,
            (ChunkTokens::Auto, Some(_)) => Cut::Fixed(pieces(usize::MAX)),
            (ChunkTokens::Tokens(tokens), None) if self.memory_budget.is_some() => {
                Cut::Size(pieces(tokens))
            }
            (ChunkTokens::Tokens(tokens), _) => Cut::Fixed(pieces(tokens)),
        }
    }
}

impl OptimizerArgs {
    fn warmup(&self) -> Warmup {
        match (self.lr_scheduler_type, self.warmup_steps) {
            (Scheduler::Constant, _) => Warmup::Steps(0),
            (_, 0) => Warmup::Ratio(self.warmup_ratio),
            (_, steps) => Warmup::Steps(steps),
        }
    }

    /// Whether a warm-up was asked for that this scheduler does not have.
    pub(super) fn warmup_is_lost(&self) -> bool {
        self.lr_scheduler_type == Scheduler::Constant
            && (self.warmup_steps > 0 || self.warmup_ratio > 0.0)
    }
}

impl Args {
    /// The settings of the run.
    pub(super) fn train_config(&self, output_dir: PathBuf) -> TrainConfig {
        let (data, training, optimizer) = (&self.data, &self.training, &self.optimizer);
        TrainConfig {
            output_dir,
            length: match u64::try_from(training.max_steps) {
                Ok(steps) => RunLength::Steps(steps),
                Err(_) => RunLength::Epochs(training.num_train_epochs),
            },
            batch_size: training.per_device_train_batch_size,
            group_size: data.train_group_size,
            query_max_len: data.query_max_len,
            passage_max_len: data.passage_max_len,
            sampling: data.sampling,
            drop_last: data.dataloader_drop_last,
            seed: training.seed,
            learning_rate: optimizer.learning_rate,
            decay: match optimizer.lr_scheduler_type {
                Scheduler::Linear => Decay::Linear,
                Scheduler::Cosine => Decay::Cosine,
                Scheduler::Constant | Scheduler::ConstantWithWarmup => Decay::Constant,
            },
            warmup: optimizer.warmup(),
            adamw: AdamWConfig {
                beta1: optimizer.adam_beta1,
                beta2: optimizer.adam_beta2,
                epsilon: optimizer.adam_epsilon,
                weight_decay: optimizer.weight_decay,
                max_grad_norm: Some(optimizer.max_grad_norm as f32).filter(|&norm| norm != 0.0),
            },
            query_instruction: data.query_instruction_for_retrieval.clone(),
            passage_instruction: data.passage_instruction_for_retrieval.clone(),
            chunking: Chunking::default(), // chosen once the data is known
            logging_steps: self.output.logging_steps,
            saving: Saving {
                every: Some(self.output.save_steps).filter(|&steps| steps > 0),
                keep: Some(self.output.save_total_limit).filter(|&limit| limit > 0),
                dtype: self.output.save_dtype.into(),
            },
        }
    }

    /// What activations are computed in: `--dtype`, or bf16 where the reference's flag asks for it.
    pub(super) fn precision(&self) -> Dtype {
        if self.training.bf16 { Dtype::Bf16 } else { self.precision.dtype() }
    }

    /// How vectors are made and compared.
    pub(super) fn model_options(&self) -> BiEncoderOptions {
        BiEncoderOptions {
            normalized: self.model.normalized,
            negatives_cross_device: self.training.negatives_cross_device,
            temperature: self.training.temperature,
            sub_batch_size: None,
            shortcuts: Shortcuts {
                last_layer_at_pooled: self.training.last_layer_at_pooled,
                equal_once: self.training.equal_once,
            },
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
        args: Args,
    }

    fn config(rest: &[&str]) -> TrainConfig {
        let required = ["--model", "m", "--train-data", "d", "--output-dir", "o"];
        Only::try_parse_from(required.iter().chain(rest)).unwrap().args.train_config("o".into())
    }

    #[test]
    fn steps_are_whole() {
        assert_eq!(["0", "7", "500.0", "1e3"].map(whole_steps), [0, 7, 500, 1000].map(Ok));
        assert!(whole_steps("0.1").unwrap_err().contains("--warmup-ratio"));
        for text in ["-1", "1.5", "nan", "inf", "", "x"] {
            assert!(whole_steps(text).is_err(), "{text}");
        }
    }

    #[test]
    fn defaults_are_the_references() {
        let expected = TrainConfig { warmup: Warmup::Ratio(0.0), ..TrainConfig::new("o") };
        assert_eq!(config(&[]), expected);
        let args = ["--model", "m", "--train-data", "d", "--output-dir", "o"];
        let options = Only::try_parse_from(args).unwrap().args.model_options();
        assert_eq!(options, BiEncoderOptions::default());
    }

    #[test]
    fn pieces_are_chosen_unless_they_are_given() {
        let cut = |rest: &[&str]| {
            let required = ["--model", "m", "--train-data", "d", "--output-dir", "o"];
            let all = required.iter().chain(rest);
            Only::try_parse_from(all).unwrap().args.training.cut()
        };
        let pieces = Chunking { kept_tokens: 0, ..Chunking::default() };
        let tokens = Chunking { max_tokens: 512, ..pieces };
        assert_eq!(cut(&[]), Cut::Free);
        assert_eq!(cut(&["--memory-budget", "4GiB"]), Cut::Free);
        assert_eq!(cut(&["--chunk-tokens", "512"]), Cut::Fixed(tokens));
        let budget = ["--chunk-tokens", "512", "--memory-budget", "50%"];
        assert_eq!(cut(&budget), Cut::Size(tokens));
        let two = Chunking { max_sequences: 2, ..pieces };
        assert_eq!(cut(&["--sub-batch-size", "2", "--memory-budget", "1GB"]), Cut::Fixed(two));
        assert!(chunk_tokens("many").is_err() && memory_budget("a lot").is_err());
    }

    #[test]
    fn some_options_win_over_others() {
        let steps = ["--max-steps", "5", "--num-train-epochs", "9", "--warmup-ratio", "0.5"];
        assert_eq!(config(&steps).length, RunLength::Steps(5));
        assert_eq!(config(&["--max-steps=-1"]).length, RunLength::Epochs(3.0));
        assert_eq!(config(&steps).warmup, Warmup::Ratio(0.5));
        let both = ["--warmup-steps", "3", "--warmup-ratio", "0.5"];
        assert_eq!(config(&both).warmup, Warmup::Steps(3));
        let constant = [&both[..], &["--lr-scheduler-type", "constant"]].concat();
        assert_eq!(config(&constant).warmup, Warmup::Steps(0));
        assert_eq!(config(&["--max-grad-norm", "0"]).adamw.max_grad_norm, None);
    }
}
