//! Options of `llara finetune` about evaluation during training.

use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use clap::{ArgAction, ValueEnum};
use llara::retrieval::{BeirDataset, UnknownIds};
use llara::train::{EarlyStopping, EvalSet, Evaluation};
use llara::{Error, ErrorKind, Result};

use super::output_args::OutputArgs;
use super::steps::whole_steps;
use crate::talk::{counted, say};

#[derive(clap::Args)]
#[command(next_help_heading = "Evaluation")]
pub(crate) struct EvalArgs {
    /// Test collections on which the model is evaluated during training: folders as for `llara evaluate`;
    /// NAME is used in the log [default: the folder's name]
    #[arg(long, value_name = "[NAME=]DIR", num_args = 1.., value_parser = named_folder)]
    eval_dataset: Vec<NamedFolder>,
    /// Split of the collections: the name of a file in qrels/
    #[arg(long, value_name = "SPLIT", default_value = "dev")]
    eval_split: String,
    /// When the model is evaluated: steps (every --eval-steps), epoch (at the end of each epoch) or no;
    /// steps and epoch include the end of the run [default: as --save-strategy; no without
    /// --eval-dataset]
    #[arg(long, alias = "evaluation-strategy", value_name = "WHEN", value_enum)]
    #[arg(hide_possible_values = true)]
    eval_strategy: Option<EvalStrategy>,
    /// Number of steps between two evaluations; 0: only the end of the run [default: --save-steps]
    #[arg(long, value_name = "N", value_parser = whole_steps)]
    eval_steps: Option<u64>,
    /// Evaluate the starting model too, before the first step [default: true with --eval-dataset]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    eval_on_start: Option<bool>,
    /// Maximum number of tokens in a batch of an evaluation; figures do not depend on it
    #[arg(long, value_name = "N", default_value_t = 8192)]
    eval_batch_tokens: usize,
    /// Exclude the passage with the query's id from evaluations (for ArguAna and Quora)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    ignore_identical_ids: bool,
    /// What to do with a judgment whose query or document is not in the collection: error (stop) or skip
    /// (ignore the judgment and count it)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::unknown_ids(), default_value = "error")]
    #[arg(hide_possible_values = true)]
    on_unknown_id: UnknownIds,
    /// The metric by which models are compared: ndcg@10, mrr@10 or recall@100, the mean over all
    /// collections, or NAME/METRIC for one of them [default: ndcg@10]
    #[arg(long, value_name = "[NAME/]METRIC")]
    metric_for_best_model: Option<String>,
    /// Save the model of the best evaluated step at the end instead of the last one; a checkpoint is then
    /// also saved after each evaluation that is the best so far
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    load_best_model_at_end: bool,
    /// End the run after N evaluations in a row without an improvement of the metric
    #[arg(long, value_name = "N")]
    early_stopping_patience: Option<u64>,
    /// Increase of the metric over the best value so far that counts as an improvement [default: 0]
    #[arg(long, value_name = "X")]
    early_stopping_threshold: Option<f64>,
}

/// When the model is evaluated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EvalStrategy {
    /// Never
    No,
    /// Every `--eval-steps`
    Steps,
    /// At the end of each epoch
    Epoch,
}

/// A test collection on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NamedFolder {
    name: Option<String>,
    folder: PathBuf,
}

/// Parses `NAME=DIR` or `DIR`. A folder whose name contains `=` can be given as it is.
fn named_folder(text: &str) -> Result<NamedFolder, String> {
    match text.split_once('=') {
        _ if text.is_empty() => Err("expected a folder".into()),
        Some((name, folder)) if !name.contains('/') && !Path::new(text).exists() => {
            Ok(NamedFolder { name: Some(name.to_owned()), folder: folder.into() })
        }
        _ => Ok(NamedFolder { name: None, folder: text.into() }),
    }
}

impl NamedFolder {
    fn name(&self) -> String {
        let name_of = |path: &Path| Some(path.file_name()?.to_string_lossy().into_owned());
        self.name.clone().unwrap_or_else(|| {
            let resolved = || name_of(&self.folder.canonicalize().ok()?);
            name_of(&self.folder).or_else(resolved).unwrap_or_default()
        })
    }
}

impl EvalArgs {
    /// Whether the model is evaluated during the run.
    pub(crate) fn evaluates(&self) -> bool {
        !self.eval_dataset.is_empty() && self.eval_strategy != Some(EvalStrategy::No)
    }

    /// The folders of the collections.
    pub(crate) fn folders(&self) -> impl Iterator<Item = &Path> {
        self.eval_dataset.iter().map(|set| set.folder.as_path())
    }

    /// A note for each option that has no effect.
    ///
    /// # Errors
    /// An option needs an evaluation, and there is no `--eval-dataset`; a number is out of range.
    pub(crate) fn check(&self) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        if let Some(EvalStrategy::Steps | EvalStrategy::Epoch) = self.eval_strategy
            && self.eval_dataset.is_empty()
        {
            return Err(without_evaluation("--eval-strategy", "omit it"));
        }
        if !self.evaluates() {
            for (option, is_given) in [
                ("--load-best-model-at-end", self.load_best_model_at_end),
                ("--eval-on-start", self.eval_on_start == Some(true)),
                ("--early-stopping-patience", self.early_stopping_patience.is_some()),
            ] {
                if is_given {
                    let without = "omit it; --save-steps keeps models for llara evaluate";
                    return Err(without_evaluation(option, without));
                }
            }
            for (option, is_given) in [
                ("--eval-dataset with --eval-strategy no", !self.eval_dataset.is_empty()),
                ("--eval-steps", self.eval_steps.is_some()),
                ("--metric-for-best-model", self.metric_for_best_model.is_some()),
                ("--early-stopping-threshold", self.early_stopping_threshold.is_some()),
            ] {
                if is_given {
                    notes.push(format!(
                        "{option} has no effect: there is no evaluation during training"
                    ));
                }
            }
            return Ok(notes);
        }
        if self.eval_batch_tokens == 0 {
            return Err(Error::new(ErrorKind::Argument, "`--eval-batch-tokens` is 0")
                .expected("1 or more")
                .hint("omit --eval-batch-tokens to use the default"));
        }
        match (self.early_stopping_patience, self.early_stopping_threshold) {
            (Some(_), _) if !self.load_best_model_at_end => notes.push(
                "early stopping without --load-best-model-at-end saves the model of the last step, not \
                 of the best one"
                    .to_owned(),
            ),
            (None, Some(_)) => notes.push(
                "--early-stopping-threshold has no effect without --early-stopping-patience".to_owned(),
            ),
            _ => {}
        }
        Ok(notes)
    }

    /// Opens the collections; prints how many judgments were skipped. `None`: the model is not evaluated. An
    /// epoch has `steps_per_epoch` steps.
    ///
    /// # Errors
    /// A collection cannot be read, or does not have the split; a setting is out of its range.
    pub(crate) fn open(
        &self,
        output: &OutputArgs,
        steps_per_epoch: u64,
    ) -> Result<Option<Evaluation>> {
        if !self.evaluates() {
            return Ok(None);
        }
        let by_epoch = match self.eval_strategy {
            Some(strategy) => strategy == EvalStrategy::Epoch,
            None => self.eval_steps.is_none() && output.saves_by_epoch(),
        };
        let every = match by_epoch {
            true => steps_per_epoch,
            false => self.eval_steps.unwrap_or(output.save_steps),
        };
        let metric = self.metric_for_best_model.as_deref().map(str::parse).transpose()?;
        let mut evaluation = Evaluation {
            every: Some(every).filter(|&steps| steps > 0),
            on_start: self.eval_on_start.unwrap_or(true),
            batch_tokens: self.eval_batch_tokens,
            metric: metric.unwrap_or_default(),
            save_best: self.load_best_model_at_end,
            early_stopping: self.early_stopping_patience.map(|patience| EarlyStopping {
                patience,
                threshold: self.early_stopping_threshold.unwrap_or(0.0),
            }),
            ..Evaluation::new(Vec::new())
        };
        for set in &self.eval_dataset {
            evaluation.sets.push(self.open_set(set)?);
        }
        evaluation.check()?;
        Ok(Some(evaluation))
    }

    fn open_set(&self, set: &NamedFolder) -> Result<EvalSet> {
        let (dataset, skipped) =
            BeirDataset::open_with(&set.folder, &self.eval_split, self.on_unknown_id)?;
        let name = set.name();
        if skipped > 0 {
            say!(
                "warning: {name}: {} of unknown queries or documents ignored; the metrics do not include \
                 them",
                counted(skipped, "judgment")
            );
        }
        Ok(EvalSet {
            name,
            split: self.eval_split.clone(),
            dataset,
            ignore_identical_ids: self.ignore_identical_ids,
        })
    }
}

/// The error of an option that needs an evaluation.
fn without_evaluation(option: &str, otherwise: &str) -> Error {
    Error::new(ErrorKind::Argument, "there is no evaluation during training")
        .expected("--eval-dataset DIR, a test collection, and --eval-strategy steps or epoch")
        .got(format!("{option} without it"))
        .hint(otherwise)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    #[command(no_binary_name = true)]
    struct Only {
        #[command(flatten)]
        eval: EvalArgs,
    }

    fn parse(args: &[&str]) -> EvalArgs {
        Only::try_parse_from(args).unwrap().eval
    }

    #[test]
    fn a_set_has_the_given_name_or_the_folders() {
        let sets =
            parse(&["--eval-dataset", "beir/nfcorpus/", "own=beir/x", "./a=b/c"]).eval_dataset;
        let names: Vec<String> = sets.iter().map(NamedFolder::name).collect();
        assert_eq!(names, ["nfcorpus", "own", "c"]);
        assert_eq!(sets[1].folder, Path::new("beir/x"));
        let here = std::env::current_dir().unwrap();
        let here = here.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(named_folder(".").unwrap().name(), here);
    }

    #[test]
    fn options_that_need_an_evaluation_are_refused_without_one() {
        for args in [
            &["--eval-strategy", "steps"][..],
            &["--load-best-model-at-end"],
            &["--load-best-model-at-end", "--eval-dataset", "x", "--eval-strategy", "no"],
            &["--eval-on-start"],
            &["--early-stopping-patience", "3"],
        ] {
            let error = parse(args).check().unwrap_err().to_string();
            assert!(error.contains("--eval-dataset DIR") && error.contains(args[0]), "{error}");
        }
        for args in [
            &["--eval-steps", "100"][..],
            &["--metric-for-best-model", "loss"],
            &["--eval-dataset", "x", "--evaluation-strategy", "no"],
        ] {
            let notes = parse(args).check().unwrap();
            assert!(notes.len() == 1 && notes[0].contains(args[0]), "{notes:?}");
        }
        let off = ["--eval-strategy", "no", "--eval-on-start", "false"];
        assert_eq!(parse(&off).check().unwrap().len(), 0);
        let zero = parse(&["--eval-dataset", "x", "--eval-batch-tokens", "0"]).check();
        assert!(zero.unwrap_err().to_string().contains("--eval-batch-tokens"));
    }
}
