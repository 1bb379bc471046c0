//! The options of `llara finetune`, as they are given, and the settings that they make.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{ArgAction, ValueEnum};
use llara::backend::Dtype;
use llara::data::{BadRows, Sampling};
use llara::train::plan::{Cut, MemoryBudget};
use llara::train::{AdamWConfig, Chunking, Decay, RunLength, Saving, TrainConfig, Warmup};
use llara::{BiEncoderOptions, Recipe, Shortcuts};

use super::lora_args::LoraArgs;
use super::trainer_flags::TrainerFlags;
use crate::compute::{Compute, Precision};
use crate::save_dtype::SavedAs;

/// Train a model on queries with positives and hard negatives.
#[derive(clap::Args)]
#[command(after_help = "\
Defaults are those of the reference: LoRA adapters are trained, and the output folder holds them
without the model; --use-lora false trains all weights and writes a model. All flags of the
reference and of transformers.TrainingArguments are known: those without meaning here (--deepspeed,
--fp16, --gradient_checkpointing, …) are accepted with a note, those that ask for a feature that is
not supported (--gradient_accumulation_steps, …) are refused by name. --no_FLAG sets a flag to false.
Ctrl-C (SIGINT), SIGTERM, SIGUSR1 and --max-time finish the current step, save a checkpoint and stop; the
exit code is then 130, 143, 138 or 75. The same command with --resume-from-checkpoint continues the
run, to the same bytes that it would have ended with. A second signal stops at once.

Examples:
  llara finetune --model base --train-data train.jsonl --output-dir tuned --use-lora false
  llara finetune --model Qwen/Qwen3-0.6B --template qwen3-embedding --train-data data/ \\
      --output-dir tuned --max-steps 1000 --warmup-ratio 0.1 --save-steps 200 --save-total-limit 2
  llara finetune --config run.toml --resume-from-checkpoint --max-time 3h50m

run.toml has the same keys without the dashes; the command line overrides it:
  model = \"base\"
  train-data = [\"a.jsonl\", \"b.jsonl\"]
  output-dir = \"tuned\"
  learning-rate = 1e-4
  use-lora = false

Prints one JSON object: steps, loss, tokens, tokens_per_second, output_dir.")]
pub(crate) struct Args {
    /// TOML file with any of these options; those of the command line override it
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
    /// Template of queries and passages: llara, e5-mistral, qwen3-embedding, or a TOML file
    /// [default: as the model was trained, or llara]
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub(super) template: Option<String>,
    /// Add the template's tokens that the tokenizer lacks, and grow the vocabulary for them
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) add_special_tokens: bool,
    /// Whether embeddings are L2-normalised [default: as the model was trained, or true]
    #[arg(long, alias = "normlized", value_name = "BOOL", num_args = 0..=1)]
    #[arg(default_missing_value = "true", value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true)]
    pub(super) normalized: Option<bool>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArgs {
    /// Training rows: JSONL files with `query`, `pos` and, if any, `neg`, or folders of them
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "config")]
    pub(super) train_data: Vec<PathBuf>,
    /// What to do with a malformed row: error (refuse the data) or skip (leave it out and count it)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::bad_rows(), default_value = "error")]
    #[arg(hide_possible_values = true)]
    pub(super) on_bad_row: BadRows,
    /// Passages of a query: 1 positive and N − 1 hard negatives, repeated where a row has fewer; 1:
    /// the other rows of the batch are the only negatives
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(super) train_group_size: usize,
    /// Maximum length of a query in tokens, template included [default: as the model was trained,
    /// or 32]
    #[arg(long, value_name = "N")]
    pub(super) query_max_len: Option<usize>,
    /// Maximum length of a passage in tokens, template included [default: as the model was trained,
    /// or 128]
    #[arg(long, value_name = "N")]
    pub(super) passage_max_len: Option<usize>,
    /// Text put in front of every query that has no `prompt` of its own; saved with the model
    /// [default: as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    pub(super) query_instruction_for_retrieval: Option<String>,
    /// Text put in front of every passage; saved with the model [default: as the model was trained,
    /// or none]
    #[arg(long, value_name = "TEXT")]
    pub(super) passage_instruction_for_retrieval: Option<String>,
    /// How rows are drawn: random (shuffled, with random passages) or sequential (in file order,
    /// repeated, with the first passages)
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
    /// Steps of the run, instead of --num-train-epochs; −1: off
    #[arg(long, value_name = "N", default_value_t = -1)]
    pub(super) max_steps: i64,
    /// Epochs: passes over the data
    #[arg(long, value_name = "X", default_value_t = 3.0)]
    pub(super) num_train_epochs: f64,
    /// Queries in a step
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(super) per_device_train_batch_size: usize,
    /// Divides similarities in the loss; 1.0 is used with --normalized false
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    pub(super) temperature: f32,
    /// Score queries against the passages of all processes; no effect with one process
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) negatives_cross_device: bool,
    /// Tokens of a batch that are encoded at a time: fewer need less memory and more work, the
    /// gradient is the same; auto: the whole batch if it fits in memory, else the cheapest division
    #[arg(long, value_name = "N|auto", default_value = "auto", value_parser = chunk_tokens)]
    pub(super) chunk_tokens: ChunkTokens,
    /// Memory that the process may use, such as 8GiB, 800MB or 50% [default: the free memory]
    #[arg(long, value_name = "SIZE", value_parser = memory_budget)]
    pub(super) memory_budget: Option<MemoryBudget>,
    /// Sequences of a batch that are encoded at a time; −1: all
    #[arg(long, value_name = "N", default_value_t = -1)]
    pub(super) sub_batch_size: i64,
    /// Compute the last layer (except keys and values) only at the pooled positions: the same
    /// result with less work
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) last_layer_at_pooled: bool,
    /// Encode equal texts of a batch once; has no effect with dropout
    #[arg(long, alias = "equal-once", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) dedup_sequences: bool,
    /// The reference's name for --dtype bf16
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set, hide = true)]
    #[arg(value_parser = BoolishValueParser::new(), conflicts_with = "dtype")]
    pub(super) bf16: bool,
    /// Stop after this time since the start, such as 3h50m or 90m, as after a signal
    #[arg(long, value_name = "TIME", value_parser = crate::values::duration)]
    pub(super) max_time: Option<Duration>,
    /// Seed of all random draws
    #[arg(long, value_name = "N", default_value_t = 42, value_parser = whole_number)]
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
    /// Steps in which the learning rate rises from 0; if not 0, used instead of the ratio
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = whole_steps)]
    pub(super) warmup_steps: u64,
    /// Decoupled weight decay, on every parameter but norms and biases
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
    /// When models are saved during training, as checkpoint-N: steps (every --save-steps), epoch
    /// (at the end of each) or no (only the final model is saved)
    #[arg(long, value_name = "WHEN", value_enum, default_value_t = SaveStrategy::Steps)]
    #[arg(hide_possible_values = true)]
    pub(super) save_strategy: SaveStrategy,
    /// Steps between two saved models; 0: only the final model is saved
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = whole_steps)]
    pub(super) save_steps: u64,
    /// Number of checkpoints that are kept, the newest; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(super) save_total_limit: usize,
    /// Continue an interrupted run: from its newest undamaged checkpoint in the output folder (latest,
    /// which starts a new run if there is none), or from the checkpoint folder DIR
    #[arg(long, value_name = "latest|DIR", num_args = 0..=1, default_missing_value = "latest")]
    #[arg(value_parser = resume_from)]
    pub(super) resume_from_checkpoint: Option<ResumeFrom>,
    /// Number format of saved weights: f32, bf16, f16, or auto: that of the loaded weights
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

/// When models are saved during training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum SaveStrategy {
    /// Only at the end
    No,
    /// Every `--save-steps`
    Steps,
    /// At the end of each epoch
    Epoch,
}

/// Which checkpoint a run continues from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ResumeFrom {
    /// None; so that a script can turn it off.
    Nothing,
    /// The newest one in the output folder, if there is one.
    Latest,
    /// This folder.
    Folder(PathBuf),
}

fn resume_from(text: &str) -> Result<ResumeFrom, String> {
    Ok(match &*text.to_ascii_lowercase() {
        "latest" | "true" | "yes" | "on" | "1" => ResumeFrom::Latest,
        "" | "false" | "no" | "off" | "0" | "none" => ResumeFrom::Nothing,
        _ => ResumeFrom::Folder(text.into()),
    })
}

fn whole_number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected a whole number from 0 to {}", u64::MAX))
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
        Ok(share) if share > 0.0 && share < 1.0 => Err("a fraction of the run is not supported: \
             give whole steps (for the warm-up, use --warmup-ratio)"
            .into()),
        _ => Err("not a number of steps, 0 or more".into()),
    }
}

/// Size of the chunks of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ChunkTokens {
    /// Chosen by the available memory.
    Auto,
    /// At most this number of tokens.
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
    /// Which chunk sizes are given and which may be chosen. With a given size, no activations are
    /// kept between the passes, unless a memory budget is given too.
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

    /// Whether a warm-up is given with a scheduler that has none.
    pub(super) fn warmup_is_lost(&self) -> bool {
        self.lr_scheduler_type == Scheduler::Constant
            && (self.warmup_steps > 0 || self.warmup_ratio > 0.0)
    }
}

impl Args {
    /// The recipe of the trained model: that of the model that training starts from, with the
    /// options that are given.
    pub(super) fn recipe(&self, mut recipe: Recipe) -> Recipe {
        let data = &self.data;
        recipe.query_max_len = data.query_max_len.unwrap_or(recipe.query_max_len);
        recipe.passage_max_len = data.passage_max_len.unwrap_or(recipe.passage_max_len);
        if let Some(instruction) = &data.query_instruction_for_retrieval {
            recipe.query_instruction.clone_from(instruction);
        }
        if let Some(instruction) = &data.passage_instruction_for_retrieval {
            recipe.passage_instruction.clone_from(instruction);
        }
        recipe.normalized = self.model.normalized.unwrap_or(recipe.normalized);
        recipe
    }

    /// The settings of the run, whose epochs have `steps_per_epoch` steps.
    pub(super) fn train_config(
        &self,
        output_dir: PathBuf,
        recipe: &Recipe,
        steps_per_epoch: u64,
    ) -> TrainConfig {
        let (data, training, optimizer) = (&self.data, &self.training, &self.optimizer);
        TrainConfig {
            output_dir,
            length: match u64::try_from(training.max_steps) {
                Ok(steps) => RunLength::Steps(steps),
                Err(_) => RunLength::Epochs(training.num_train_epochs),
            },
            batch_size: training.per_device_train_batch_size,
            group_size: data.train_group_size,
            query_max_len: recipe.query_max_len,
            passage_max_len: recipe.passage_max_len,
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
            query_instruction: recipe.query_instruction.clone(),
            passage_instruction: recipe.passage_instruction.clone(),
            chunking: Chunking::default(), // chosen once the data is known
            logging_steps: self.output.logging_steps,
            saving: Saving {
                every: match self.output.save_strategy {
                    SaveStrategy::No => None,
                    SaveStrategy::Steps => Some(self.output.save_steps),
                    SaveStrategy::Epoch => Some(steps_per_epoch),
                }
                .filter(|&steps| steps > 0),
                keep: Some(self.output.save_total_limit).filter(|&limit| limit > 0),
                dtype: self.output.save_dtype.into(),
            },
        }
    }

    /// What activations are computed in: `--dtype`, or bf16 where the reference's flag asks for it.
    pub(super) fn precision(&self) -> Dtype {
        if self.training.bf16 { Dtype::Bf16 } else { self.precision.dtype() }
    }

    /// Whether the program chooses what activations are computed in.
    pub(super) fn chooses_precision(&self) -> bool {
        !self.training.bf16 && self.precision.is_auto()
    }

    /// How embeddings are computed and compared, in one process: it has no other devices, so
    /// `--negatives-cross-device` changes nothing.
    pub(super) fn model_options(&self, recipe: &Recipe) -> BiEncoderOptions {
        BiEncoderOptions {
            normalized: recipe.normalized,
            negatives_cross_device: false,
            temperature: self.training.temperature,
            sub_batch_size: None,
            shortcuts: Shortcuts {
                last_layer_at_pooled: self.training.last_layer_at_pooled,
                dedup_sequences: self.training.dedup_sequences,
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

    fn parse(rest: &[&str]) -> Args {
        let required = ["--model", "m", "--train-data", "d", "--output-dir", "o"];
        Only::try_parse_from(required.iter().chain(rest)).unwrap().args
    }

    fn recipe() -> Recipe {
        Recipe::new(llara::text::Template::preset("llara").unwrap())
    }

    fn config(rest: &[&str]) -> TrainConfig {
        let args = parse(rest);
        args.train_config("o".into(), &args.recipe(recipe()), 7)
    }

    #[test]
    fn what_the_model_was_trained_with_is_the_default() {
        let trained = Recipe {
            normalized: false,
            query_max_len: 44,
            query_instruction: "find: ".into(),
            ..recipe()
        };
        assert_eq!(parse(&[]).recipe(trained.clone()), trained);
        let given = parse(&[
            "--query-max-len",
            "50",
            "--query-instruction-for-retrieval",
            "",
            "--passage-max-len",
            "60",
            "--passage-instruction-for-retrieval",
            "p: ",
            "--normalized",
        ]);
        let expected = Recipe {
            normalized: true,
            query_max_len: 50,
            passage_max_len: 60,
            query_instruction: String::new(),
            passage_instruction: "p: ".into(),
            ..recipe()
        };
        assert_eq!(given.recipe(trained), expected);
    }

    #[test]
    fn models_are_saved_by_steps_by_epochs_or_only_at_the_end() {
        let every = |rest: &[&str]| config(rest).saving.every;
        assert_eq!(every(&[]), Some(500));
        assert_eq!(every(&["--save-steps", "0"]), None);
        assert_eq!(every(&["--save-strategy", "no", "--save-steps", "5"]), None);
        assert_eq!(every(&["--save-strategy", "epoch"]), Some(7));
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
        let saving = Saving { every: Some(500), ..Saving::default() };
        let expected = TrainConfig { warmup: Warmup::Ratio(0.0), saving, ..TrainConfig::new("o") };
        assert_eq!(config(&[]), expected);
        assert_eq!(parse(&[]).model_options(&recipe()), BiEncoderOptions::default());
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
