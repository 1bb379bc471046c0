//! The options of `llara pretrain`, and their conversion to settings of the library.

use std::path::PathBuf;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::data::{BadRows, Sampling};
use llara::text::StopWords;
use llara::train::{LossWeights, PretrainingOptions, TrainConfig};
use llara::{BiEncoderOptions, Error, ErrorKind, Recipe, Result, Shortcuts};

use crate::training::{CommonArgs, ModelArgs};

/// Adapt a plain language model to embedding texts, on texts alone (Llama2Vec)
#[derive(clap::Args)]
#[command(after_help = "\
Before it is fine-tuned, a language model learns to say in its summary tokens which words a text
contains, and in its prediction tokens which words the following text contains, beside predicting
each next word. `llara finetune` then starts from the saved model; transformers loads it as a causal
language model. All weights are trained, and missing special tokens of the template are added.

--text reads plain text files or JSONL files with `text` and cuts them into consecutive pieces;
--train-data reads rows in the form of the reference (FlagEmbedding's LLARA): `input`,
`output_summarize` and `output_predict`. Flags of the reference and of transformers.TrainingArguments
are treated as by `llara finetune`.

Examples:
  llara pretrain --model Qwen/Qwen3-0.6B --text wiki/ --output-dir pretrained --dtype bf16
  llara pretrain --model base --train-data rows.jsonl --cutoff-len 128 --remove-stop-words \\
      --learning-rate 1e-5 --num-train-epochs 1 --warmup-ratio 0.1 --output-dir pretrained
  llara finetune --model pretrained --train-data train.jsonl --output-dir tuned

log.jsonl has the loss and its terms: loss_language_model, loss_auto_encode, loss_auto_regress.
Signals, --max-time, --resume-from-checkpoint and mpirun work as for `llara finetune`.

Prints one JSON object: steps, loss, tokens, tokens_per_second, output_dir; with --eval-dataset also
eval: the figures of the starting model, the last and the best ones.")]
pub(crate) struct Args {
    /// TOML file with any of these options; options of the command line override it
    #[arg(long, value_name = "FILE")]
    #[arg(help_heading = "Model")]
    config: Option<PathBuf>,
    #[command(flatten)]
    pub(super) model: ModelArgs,
    #[command(flatten)]
    pub(super) data: DataArgs,
    #[command(flatten)]
    pub(super) objective: ObjectiveArgs,
    #[command(flatten)]
    pub(crate) common: CommonArgs,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArgs {
    /// Rows with `input`, `output_summarize` and `output_predict`: JSONL files, or folders of them
    #[arg(long, value_name = "PATH", num_args = 1.., conflicts_with = "text")]
    pub(super) train_data: Vec<PathBuf>,
    /// Texts: JSONL files with `text`, plain text files (one text each), or folders of these (.jsonl, .json,
    /// .txt, .md), subfolders included
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(super) text: Vec<PathBuf>,
    /// Length of the pieces of --text in characters; they end at white space [default: what --cutoff-len has
    /// room for, measured on the first texts]
    #[arg(long, value_name = "N")]
    pub(super) piece_characters: Option<usize>,
    /// Maximum number of tokens of a text with its prefix and both suffixes, and of its target texts
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(super) cutoff_len: usize,
    /// What to do with a malformed row or text: error (stop) or skip (skip it and count it)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::bad_rows(), default_value = "error")]
    #[arg(hide_possible_values = true)]
    pub(super) on_bad_row: BadRows,
    /// Order of the rows: random (shuffled every epoch) or sequential (in file order)
    #[arg(long, value_name = "HOW", value_parser = crate::values::sampling(), default_value = "random")]
    #[arg(hide_possible_values = true)]
    sampling: Sampling,
    /// Skip the last batch of an epoch if it is incomplete
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    dataloader_drop_last: bool,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Objective")]
pub(super) struct ObjectiveArgs {
    /// Leave stop words out of the targets: the built-in English ones, or those of --stop-words
    /// [default: false, or true with --stop-words]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    remove_stop_words: Option<bool>,
    /// File with one stop word per line, instead of the built-in list; implies --remove-stop-words
    #[arg(long, value_name = "FILE")]
    pub(super) stop_words: Option<PathBuf>,
    /// Factor of the language-model loss
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    language_model_weight: f32,
    /// Factor of the loss of the text's own words (EBAE), relative to the reference's
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    auto_encode_weight: f32,
    /// Factor of the loss of the following text's words (EBAR), relative to the reference's
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    auto_regress_weight: f32,
}

impl Args {
    /// The settings of pretraining.
    ///
    /// # Errors
    /// The file of stop words cannot be read or is not to be used, or a weight is out of range.
    pub(super) fn options(&self) -> Result<PretrainingOptions> {
        let objective = &self.objective;
        let weights = LossWeights {
            language_model: objective.language_model_weight,
            auto_encode: objective.auto_encode_weight,
            auto_regress: objective.auto_regress_weight,
        };
        weights.check()?;
        let stop_words = match (&objective.stop_words, objective.remove_stop_words) {
            (Some(_), Some(false)) => {
                return Err(Error::new(ErrorKind::Argument, "the stop words would not be removed")
                    .expected("--stop-words without --remove-stop-words false")
                    .got("both")
                    .hint("omit one of them"));
            }
            (Some(path), _) => Some(StopWords::from_file(path)?),
            (None, remove) => remove.unwrap_or(false).then(StopWords::english),
        };
        Ok(PretrainingOptions { cutoff_len: self.data.cutoff_len, stop_words, weights })
    }

    /// The settings of the run. An epoch has `steps_per_epoch` steps.
    pub(super) fn train_config(
        &self,
        output_dir: PathBuf,
        recipe: &Recipe,
        steps_per_epoch: u64,
    ) -> TrainConfig {
        TrainConfig {
            sampling: self.data.sampling,
            drop_last: self.data.dataloader_drop_last,
            ..self.common.train_config(output_dir, recipe, steps_per_epoch)
        }
    }

    /// The options of the model.
    pub(super) fn model_options(&self, recipe: &Recipe) -> BiEncoderOptions {
        let last_layer_at_pooled = self.common.training.last_layer_at_pooled;
        BiEncoderOptions {
            normalized: recipe.normalized,
            shortcuts: Shortcuts { last_layer_at_pooled, ..Shortcuts::default() },
            ..BiEncoderOptions::default()
        }
    }
}
