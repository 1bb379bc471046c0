//! `llara init`: create a small untrained model from training data.

use std::path::PathBuf;

use clap::ArgAction;
use clap::ValueEnum;
use clap::builder::BoolishValueParser;
use llara::backend::Backend;
use llara::data::{BadRows, DataSources, Dataset};
use llara::init::{Preset, new_model};
use llara::model::weights::SaveDtype;
use llara::text::Template;

use super::compute::{Compute, on_device};
use super::talk::{count, counted, print, say};
use super::training::say_skipped;
use super::{output_folder, paths, trained_model};

/// Create a small untrained model with random weights and a tokenizer trained on the data.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara init --preset tiny --train-data train.jsonl --output-dir base
  llara init --preset small --train-data data/ --output-dir base --vocab-size 8192 --seed 7

transformers can load the model, too (AutoModelForCausalLM, AutoTokenizer).
Prints one JSON object: output_dir, parameters, vocab_size, query_max_len, passage_max_len.")]
pub(super) struct Args {
    /// Size of the model: tiny (0.7 M parameters, for experiments) or small (4.2 M parameters, for a
    /// collection of some thousand texts)
    #[arg(long, value_name = "SIZE", value_enum, hide_possible_values = true)]
    #[arg(help_heading = "Model")]
    preset: Size,
    /// Maximum vocabulary size of the tokenizer [default: 2048 for tiny, 4096 for small]
    #[arg(long, value_name = "N", help_heading = "Model")]
    vocab_size: Option<usize>,
    /// Template of queries and passages: llara, e5-mistral, qwen3-embedding, or a TOML file; its special
    /// tokens are added to the tokenizer
    #[arg(long, value_name = "NAME|FILE.toml", default_value = "llara", help_heading = "Model")]
    template: String,
    /// Seed of the random weights
    #[arg(long, value_name = "N", default_value_t = 42, help_heading = "Model")]
    seed: u64,
    /// Training rows: JSONL files with `query`, `pos` and optionally `neg`, or folders of them
    #[arg(long, value_name = "PATH", num_args = 1.., required = true, help_heading = "Data")]
    train_data: Vec<PathBuf>,
    /// What to do with a malformed row: error (stop) or skip (skip it and count it)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::bad_rows(), default_value = "error")]
    #[arg(hide_possible_values = true, help_heading = "Data")]
    on_bad_row: BadRows,
    /// Output folder of the model; new or empty
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    output_dir: PathBuf,
    /// Replace an earlier model in the output folder
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true, help_heading = "Output")]
    overwrite_output_dir: bool,
    #[command(flatten)]
    compute: Compute,
}

#[derive(Clone, Copy, ValueEnum)]
enum Size {
    Tiny,
    Small,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let template = trained_model::template(&args.template)?;
    let sources = DataSources::read(&args.train_data)?;
    let mut data: Vec<_> =
        args.train_data.iter().map(|path| ("training data", path.as_path())).collect();
    data.extend(sources.paths().map(|path| ("training data", path)));
    paths::check_apart(&args.output_dir, &data)?;
    let _lock = output_folder::claim(&args.output_dir, args.overwrite_output_dir)?;
    let dataset = Dataset::open_sources(sources, args.on_bad_row)?;
    say_skipped(&dataset);
    let mut preset = match args.preset {
        Size::Tiny => Preset::TINY,
        Size::Small => Preset::SMALL,
    };
    preset.vocab_size = args.vocab_size.unwrap_or(preset.vocab_size);
    on_device!(args.compute, backend => make(args, &dataset, (template, preset), backend))
}

fn make(
    args: &Args,
    dataset: &Dataset,
    (template, preset): (Template, Preset),
    backend: impl Backend,
) -> anyhow::Result<()> {
    let model = new_model(backend, dataset, template, preset, args.seed)?;
    let size = model.saved_bytes(SaveDtype::AsLoaded)?;
    output_folder::check_space(&args.output_dir, size, "the new model")?;
    model.save(&args.output_dir)?;

    let parameters: usize = model.decoder().tensors().map(|tensor| tensor.elements()).sum();
    let vocab_size = model.decoder().config().vocab_size;
    let recipe = model.recipe();
    say!(
        "{}: a new Llama model with {} parameters and a vocabulary of {}, from {}",
        args.output_dir.display(),
        count(parameters),
        count(vocab_size),
        counted(dataset.len(), "row")
    );
    let result = serde_json::json!({
        "output_dir": args.output_dir.to_string_lossy(),
        "parameters": parameters,
        "vocab_size": vocab_size,
        "query_max_len": recipe.query_max_len,
        "passage_max_len": recipe.passage_max_len,
    });
    Ok(print(result)?)
}
