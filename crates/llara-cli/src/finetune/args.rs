//! The options of `llara finetune`, those about model and data, and their conversion to settings of the
//! library.

use std::path::PathBuf;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::data::{BadRows, BatchRows, DataSources, Dataset, Instructions, Sampling};
use llara::train::{Batching, TrainConfig};
use llara::{BiEncoderOptions, Error, ErrorKind, Recipe, Result, Shortcuts};

use super::contrastive_args::{ContrastiveArgs, DistributedArgs};
use super::objective_args::ObjectiveArgs;
use crate::training::{CommonArgs, ModelArgs};

/// Fine-tune a model on queries with positive and negative passages.
#[derive(clap::Args)]
#[command(after_help = "\
By default a LoRA adapter is trained, and the output folder contains only the adapter;
--use-lora false trains all weights and saves a model. The defaults are those of the reference
(FlagEmbedding's LLARA). All flags of the reference and of transformers.TrainingArguments are
recognized: those without an effect in this program (--deepspeed, --fp16, --gradient_checkpointing,
…) print a note, those that ask for an unsupported feature are errors. --no_FLAG sets a flag to
false.

Ctrl-C (SIGINT), SIGTERM, SIGUSR1 and --max-time stop the run after the current step and save a
checkpoint; the exit code is then 130, 143, 138 or 75. A second signal stops it immediately. The same
command with --resume-from-checkpoint continues the run; its model has the same bytes as that of an
uninterrupted run.

Examples:
  llara finetune --model base --train-data train.jsonl --output-dir tuned --use-lora false
  llara finetune --model Qwen/Qwen3-0.6B --template qwen3-embedding --train-data data/ \\
      --output-dir tuned --max-steps 1000 --warmup-ratio 0.1 --save-steps 200 --save-total-limit 2
  llara finetune --model base --train-data train.jsonl --output-dir tuned --eval-dataset beir/nfcorpus \
      --eval-steps 200 --load-best-model-at-end --early-stopping-patience 5
  llara finetune --config run.toml --resume-from-checkpoint --max-time 3h50m
  mpirun -n 4 llara finetune --config run.toml --negatives-cross-device

run.toml contains options without the leading dashes; options of the command line override it:
  model = \"base\"
  train-data = [\"a.jsonl\", \"b.jsonl\"]
  output-dir = \"tuned\"
  learning-rate = 1e-4
  use-lora = false

With --eval-dataset the model is evaluated during training. Figures are written to log.jsonl, and the
queries that the model answers best and worst to eval_queries.json.

Prints one JSON object: steps, loss, tokens, tokens_per_second, output_dir; with --eval-dataset also
eval: the figures of the starting model, the last and the best ones.")]
pub(crate) struct Args {
    /// TOML file with any of these options; options of the command line override it
    #[arg(long, value_name = "FILE")]
    #[arg(help_heading = "Model")]
    pub(super) config: Option<PathBuf>,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) data: DataArgs,
    #[command(flatten)]
    pub(super) contrastive: ContrastiveArgs,
    #[command(flatten)]
    pub(super) objective: ObjectiveArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
    #[command(flatten)]
    pub(super) distributed: DistributedArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArgs {
    /// Training rows: JSONL files with `query`, `pos` and optionally `neg`, folders of them, or data set
    /// files (.toml), which give each file a weight and instructions
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "config")]
    pub(super) train_data: Vec<PathBuf>,
    /// What to do with a malformed row: error (stop) or skip (skip it and count it)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::bad_rows(), default_value = "error")]
    #[arg(hide_possible_values = true)]
    pub(super) on_bad_row: BadRows,
    /// Number of passages per query: 1 positive and N − 1 hard negatives, which are repeated if a row has
    /// fewer; with 1, the passages of the other rows are the only negatives
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
    /// Instruction that is prepended to queries without a `prompt` or an instruction of their file; saved
    /// with the model [default: as the data set file says, as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    pub(super) query_instruction_for_retrieval: Option<String>,
    /// Instruction that is prepended to passages without an instruction of their file; saved with the model
    /// [default: as the data set file says, as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    pub(super) passage_instruction_for_retrieval: Option<String>,
    /// Order of the rows: random (shuffled every epoch, random passages) or sequential (in file order,
    /// the first passages)
    #[arg(long, value_name = "HOW", value_parser = crate::values::sampling(), default_value = "random")]
    #[arg(hide_possible_values = true)]
    pub(super) sampling: Sampling,
    /// Rows of a batch: mixed (from all files together) or per-file (from one file each; an epoch is one pass
    /// over every file) [default: as the data set file says, or mixed]
    #[arg(long, value_name = "HOW", value_parser = crate::values::batch_rows())]
    #[arg(hide_possible_values = true)]
    pub(super) batching: Option<BatchRows>,
    /// Shares of the batches of each file with --batching per-file, in the order of the files, such as 2,1,1
    /// [default: proportional to their rows]
    #[arg(long, value_name = "X", value_delimiter = ',', num_args = 1..)]
    pub(super) file_weights: Vec<f64>,
    /// Skip the last batch of an epoch if it is incomplete
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(super) dataloader_drop_last: bool,
}

impl DataArgs {
    /// Which rows batches have: as the options or the data set files say.
    ///
    /// # Errors
    /// Weights are given twice, or for mixed batches.
    pub(super) fn batching(&self, dataset: &Dataset) -> Result<Batching> {
        let of_files = dataset.weights_of_files();
        let has_weights = !of_files.is_empty();
        if has_weights && !self.file_weights.is_empty() {
            return Err(Error::new(ErrorKind::Argument, "weights of files are given twice")
                .expected("--file-weights, or `weight` in a data set file")
                .got("both"));
        }
        let rows = self.batching.or(dataset.sources().batching).unwrap_or(BatchRows::Mixed);
        let weights = if has_weights { of_files } else { self.file_weights.clone() };
        match rows {
            BatchRows::PerFile => Ok(Batching::PerFile { weights }),
            BatchRows::Mixed if weights.is_empty() => Ok(Batching::Mixed),
            BatchRows::Mixed => Err(Error::new(
                ErrorKind::Argument,
                "weights of files have no effect on mixed batches",
            )
            .expected("--batching per-file with weights")
            .got(match has_weights {
                true => "--batching mixed with a data set file that has weights",
                false => "--file-weights without --batching per-file",
            })),
        }
    }
}

impl Args {
    /// The recipe of the trained model: `recipe`, that of the initial model, changed by the data set files and the
    /// given options.
    ///
    /// # Errors
    /// Two sources have the same task and different instructions.
    pub(super) fn recipe(&self, mut recipe: Recipe, sources: &DataSources) -> Result<Recipe> {
        let data = &self.data;
        recipe.query_max_len = data.query_max_len.unwrap_or(recipe.query_max_len);
        recipe.passage_max_len = data.passage_max_len.unwrap_or(recipe.passage_max_len);
        let query = data.query_instruction_for_retrieval.as_ref();
        if let Some(instruction) = query.or(sources.query_instruction.as_ref()) {
            recipe.query_instruction.clone_from(instruction);
        }
        let passage = data.passage_instruction_for_retrieval.as_ref();
        if let Some(instruction) = passage.or(sources.passage_instruction.as_ref()) {
            recipe.passage_instruction.clone_from(instruction);
        }
        recipe.normalized = self.model.normalized.unwrap_or(recipe.normalized);
        let of_run = Instructions {
            query: recipe.query_instruction.clone(),
            passage: recipe.passage_instruction.clone(),
        };
        recipe.tasks.extend(sources.tasks(&of_run)?);
        Ok(recipe)
    }

    /// The settings of the run. An epoch has `steps_per_epoch` steps.
    pub(super) fn train_config(
        &self,
        output_dir: PathBuf,
        recipe: &Recipe,
        steps_per_epoch: u64,
    ) -> TrainConfig {
        let data = &self.data;
        TrainConfig {
            group_size: data.train_group_size,
            sampling: data.sampling,
            drop_last: data.dataloader_drop_last,
            ..self.common.train_config(output_dir, recipe, steps_per_epoch)
        }
    }

    /// Rows of a step of one process.
    pub(crate) fn batch_size(&self) -> usize {
        self.common.training.per_device_train_batch_size
    }

    /// Passages of a query.
    pub(crate) fn group_size(&self) -> usize {
        self.data.train_group_size
    }

    /// Whether queries are scored against the passages of all processes.
    pub(crate) fn has_cross_device_negatives(&self) -> bool {
        self.contrastive.negatives_cross_device
    }

    /// The options of the model in a run on so many processes. With one, `--negatives-cross-device` has no effect.
    pub(super) fn model_options(&self, recipe: &Recipe, processes: usize) -> BiEncoderOptions {
        BiEncoderOptions {
            normalized: recipe.normalized,
            negatives_cross_device: self.contrastive.negatives_cross_device && processes > 1,
            temperature: self.contrastive.temperature,
            sub_batch_size: None,
            shortcuts: Shortcuts {
                last_layer_at_pooled: self.common.training.last_layer_at_pooled,
                dedup_sequences: self.contrastive.dedup_sequences,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use llara::train::{RunLength, Saving, Warmup};

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
        let recipe = args.recipe(recipe(), &DataSources::default()).unwrap();
        args.train_config("o".into(), &recipe, 7)
    }

    #[test]
    fn the_initial_models_recipe_is_the_default() {
        let trained = Recipe {
            normalized: false,
            query_max_len: 44,
            query_instruction: "find: ".into(),
            ..recipe()
        };
        let none = DataSources::default();
        assert_eq!(parse(&[]).recipe(trained.clone(), &none).unwrap(), trained);
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
        assert_eq!(given.recipe(trained, &none).unwrap(), expected);
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
    fn defaults_are_the_references() {
        let saving = Saving { every: Some(500), ..Saving::default() };
        let expected = TrainConfig { warmup: Warmup::Ratio(0.0), saving, ..TrainConfig::new("o") };
        assert_eq!(config(&[]), expected);
        assert_eq!(parse(&[]).model_options(&recipe(), 1), BiEncoderOptions::default());
    }

    #[test]
    fn cross_device_negatives_need_several_processes() {
        let given = parse(&["--negatives-cross-device"]);
        let of = |args: &Args, processes| {
            args.model_options(&recipe(), processes).negatives_cross_device
        };
        assert_eq!([of(&given, 1), of(&given, 2), of(&parse(&[]), 2)], [false, true, false]);
    }

    #[test]
    fn some_options_override_others() {
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
