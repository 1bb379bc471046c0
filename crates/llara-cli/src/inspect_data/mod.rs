//! `llara inspect-data`: look at training data before a run.

mod denied;
mod table;

use std::path::PathBuf;
use std::sync::Arc;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::data::{BadRows, DataSources};
use llara::inspect::{Settings, inspect};
use llara::text::PromptEncoder;
use llara::{Error, ErrorKind, Loader, Recipe, Result, Role};
use serde_json::json;

use super::compute::Threads;
use super::progress::InspectionProgress;
use super::talk::{print, say};
use super::trained_model::{self, MAX_LEN};
use denied::Denied;
pub(super) use table::noteworthy;

/// Look at training data before a run: lengths, duplicates, contradictions, short groups, scripts.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(super) struct Args {
    /// Folder of the model that will be trained, or its name on the Hugging Face Hub (org/name): its
    /// tokenizer and its saved lengths are used; without it lengths are in characters and words
    #[arg(long, alias = "model-name-or-path", value_name = "DIR|HUB_ID", help_heading = "Model")]
    model: Option<String>,
    /// Cache folder of the Hub [default: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    cache_dir: Option<PathBuf>,
    /// Template of queries and passages: llara, e5-mistral, qwen3-embedding, or a TOML file
    /// [default: as the model was trained, or llara]
    #[arg(long, value_name = "NAME|FILE.toml", help_heading = "Model")]
    template: Option<String>,
    /// Folder of a PEFT adapter to train further, whose saved lengths and template are the defaults
    #[arg(long, alias = "peft-model-path", value_name = "DIR", help_heading = "Model")]
    from_peft: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    checks: CheckArgs,
    #[command(flatten)]
    threads: Threads,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Data")]
struct DataArgs {
    /// Training rows: JSONL files with `query`, `pos` and optionally `neg`, folders of them, or data set
    /// files (.toml)
    #[arg(long, value_name = "PATH", num_args = 1.., required = true)]
    train_data: Vec<PathBuf>,
    /// What to do with a malformed row: skip (count it) or error (stop at the first one)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::bad_rows(), default_value = "skip")]
    #[arg(hide_possible_values = true)]
    on_bad_row: BadRows,
    /// Number of passages per query: 1 positive and N − 1 hard negatives
    #[arg(long, value_name = "N", default_value_t = 8)]
    train_group_size: usize,
    /// Maximum length of a query in tokens, template included [default: as the model was trained,
    /// or 32]
    #[arg(long, value_name = "N")]
    query_max_len: Option<usize>,
    /// Maximum length of a passage in tokens, template included [default: as the model was trained,
    /// or 128]
    #[arg(long, value_name = "N")]
    passage_max_len: Option<usize>,
    /// Instruction that is prepended to every query without a `prompt` [default: as the model was
    /// trained, or none]
    #[arg(long, value_name = "TEXT")]
    query_instruction_for_retrieval: Option<String>,
    /// Instruction that is prepended to every passage [default: as the model was trained, or none]
    #[arg(long, value_name = "TEXT")]
    passage_instruction_for_retrieval: Option<String>,
}

#[derive(clap::Args)]
#[command(next_help_heading = "Checks")]
struct CheckArgs {
    /// Findings that make the exit code 1, separated by commas; all: every kind
    #[arg(long, value_name = "WHAT", value_delimiter = ',', value_parser = denied::kinds())]
    #[arg(hide_possible_values = true)]
    deny: Vec<String>,
    /// Findings that --deny all leaves out
    #[arg(long, value_name = "WHAT", value_delimiter = ',', value_parser = denied::kinds())]
    #[arg(hide_possible_values = true)]
    allow: Vec<String>,
    /// Search for near duplicates, too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    near_duplicates: bool,
    /// Number of rows that are tokenized, drawn at random
    #[arg(long, value_name = "N", default_value_t = 5_000)]
    sample: usize,
    /// Folder of temporary files, for large data: about 32 bytes for each query, each passage and each
    /// row [default: TMPDIR or /tmp]
    #[arg(long, value_name = "DIR")]
    temp_dir: Option<PathBuf>,
}

const AFTER_HELP: &str = "\
Findings, for --deny and --allow:
  malformed-rows            rows that finetune refuses, or skips with --on-bad-row skip
  empty-texts               texts without a letter or digit
  one-word-texts            texts of one word
  duplicate-rows            rows equal to an earlier row: query, prompt, positives, negatives
  duplicate-queries         rows with the query and prompt of an earlier row
  duplicate-passages        passages of a row that an earlier row has, too
  duplicate-passages-in-row passages that are repeated in pos or in neg of a row
  near-duplicate-rows, near-duplicate-queries, near-duplicate-passages
                            texts (for rows: query and positives) that have at least 80 % of the
                            sequences of 5 characters in common with an earlier different one
  positive-in-negatives     negatives that are a positive of the same row
  positive-in-negatives-of-equal-query
                            negatives that are a positive of another row with the same query
  positive-in-negatives-of-other-query
                            negatives that are a positive of a row with another query; common
  no-negatives              rows without negatives, if --train-group-size is 2 or more
  few-negatives             rows whose negatives are repeated to fill a group
  special-tokens            texts that contain a special token of the template or the tokenizer
  truncated-queries, truncated-passages
                            texts longer than --query-max-len, --passage-max-len; need --model

All counts are exact, except those of near duplicates (searched among up to 65,536 different texts
of each kind) and of truncated texts (in --sample rows); the report says what they are based on.
Memory does not depend on the size of the data.

Examples:
  llara inspect-data --model base --train-data train.jsonl
  llara inspect-data --train-data data/ --deny malformed-rows,positive-in-negatives
  llara inspect-data --train-data data/ --deny all --allow duplicate-passages,one-word-texts

Prints one JSON object: rows, files, texts, lengths, tokenized, scripts, special_tokens, findings,
denied. The exit code is 1 if a denied finding was found.";

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let denied = Denied::new(&args.checks.deny, &args.checks.allow)?;
    args.check()?;
    args.threads.start()?;
    let sources = DataSources::read(&args.data.train_data)?;
    let settings = args.settings(&sources)?;
    denied.check(&settings)?;

    let mut progress = InspectionProgress::new();
    let inspected = inspect(&sources, &settings, &mut |p| progress.show(p));
    progress.finish();
    let report = inspected?;
    for line in table::lines(&report, &settings) {
        say!("{line}");
    }
    let found = denied.found(&report);
    let mut result = json!(report);
    result["denied"] = found.iter().map(|finding| finding.name()).collect();
    print(result)?;
    match denied::error(&found, &report) {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

impl Args {
    /// Checks the numbers, before files are read.
    fn check(&self) -> Result<()> {
        let require = |fits: bool, (option, value): (&str, usize), what: &str, expected: &str| {
            let error = || Error::new(ErrorKind::Argument, what).expected(expected);
            if fits { Ok(()) } else { Err(error().got(format!("{option} {value}"))) }
        };
        let DataArgs { train_group_size, query_max_len, passage_max_len, .. } = self.data;
        require(
            train_group_size >= 1,
            ("--train-group-size", train_group_size),
            "the group size is too small",
            "at least 1: 1 positive and group size − 1 hard negatives",
        )?;
        for (option, value) in
            [("--query-max-len", query_max_len), ("--passage-max-len", passage_max_len)]
        {
            let value = value.unwrap_or(1);
            let expected = format!("1 to {MAX_LEN} tokens");
            let fits = (1..=MAX_LEN).contains(&value);
            require(fits, (option, value), "the maximum length is out of range", &expected)?;
        }
        require(
            self.checks.sample >= 1,
            ("--sample", self.checks.sample),
            "the sample is empty",
            "1 or more rows",
        )
    }

    /// The settings: those of the options, of the adapter, of the model, or the defaults.
    fn settings(&self, sources: &DataSources) -> Result<Settings> {
        let given = self.template.as_deref().map(trained_model::template).transpose()?;
        let dir = match &self.model {
            Some(model) => {
                let cache = self.cache_dir.as_deref();
                Some(trained_model::find_outline(model, cache, "--from-peft")?)
            }
            None => None,
        };
        let of_adapter = match &self.from_peft {
            Some(dir) => Recipe::read(dir)?,
            None => None,
        };
        let mut recipe = match (of_adapter, &dir) {
            (Some(recipe), _) => recipe,
            (None, Some(dir)) => Loader::new(dir)?.recipe().clone(),
            (None, None) => Recipe::new(trained_model::template("llara")?),
        };
        recipe.template = given.unwrap_or(recipe.template);
        let data = &self.data;
        recipe.query_max_len = data.query_max_len.unwrap_or(recipe.query_max_len);
        recipe.passage_max_len = data.passage_max_len.unwrap_or(recipe.passage_max_len);
        let prompts = match &dir {
            Some(dir) => {
                // Tokens that the tokenizer lacks are added in memory: lengths are as after training.
                let mut loader = Loader::new(dir)?.with_recipe(recipe.clone());
                if let Some(adapter) = &self.from_peft {
                    loader = loader.with_adapter(adapter);
                }
                let prompts = loader.add_special_tokens(true).outline()?.prompts;
                check_lengths(&prompts, &recipe)?;
                Some(prompts)
            }
            None => None,
        };
        let query_instruction = data.query_instruction_for_retrieval.as_ref();
        let query_instruction = query_instruction.or(sources.query_instruction.as_ref()).cloned();
        let passage_instruction = data.passage_instruction_for_retrieval.as_ref();
        let passage_instruction =
            passage_instruction.or(sources.passage_instruction.as_ref()).cloned();
        let defaults = Settings::new(recipe.template);
        Ok(Settings {
            group_size: data.train_group_size,
            query_max_len: recipe.query_max_len,
            passage_max_len: recipe.passage_max_len,
            query_instruction: query_instruction.unwrap_or(recipe.query_instruction),
            passage_instruction: passage_instruction.unwrap_or(recipe.passage_instruction),
            prompts,
            on_bad_row: data.on_bad_row,
            sample_rows: self.checks.sample,
            near_duplicates: self.checks.near_duplicates,
            temp_dir: self.checks.temp_dir.clone().unwrap_or_else(|| defaults.temp_dir.clone()),
            ..defaults
        })
    }
}

fn check_lengths(prompts: &Arc<PromptEncoder>, recipe: &Recipe) -> Result<()> {
    for (role, option) in [(Role::Query, "--query-max-len"), (Role::Passage, "--passage-max-len")] {
        let max_len = recipe.max_len(role);
        let checked = prompts.check_max_len(role, max_len);
        checked.map_err(|e| e.got(format!("{option} {max_len}")))?;
    }
    Ok(())
}
