//! `llara merge`: merge an adapter into the weights of its model.

use std::path::{Path, PathBuf};

use clap::ArgAction;
use clap::builder::BoolishValueParser;

use llara::backend::{Backend, Dtype};
use llara::hub;

use super::compute::{Compute, on_device};
use super::save_dtype::SavedAs;
use super::talk::{print, say};
use super::trained_model::Source;
use super::{output_folder, paths};

/// Merge an adapter into the weights of its model, and save the merged model.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  llara merge --model base --adapter tuned --output-dir merged

Prints one JSON object: model, adapter, output_dir.")]
pub(super) struct Args {
    #[command(flatten)]
    source: Source,
    /// Template of queries and passages: llara, e5-mistral, qwen3-embedding, or a TOML file; saved with
    /// the model [default: that of the adapter folder, or llara]
    #[arg(long, value_name = "NAME|FILE.toml", help_heading = "Model")]
    template: Option<String>,
    /// Output folder of the model; new or empty
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    output_dir: PathBuf,
    /// Replace an earlier model in the output folder
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set, help_heading = "Output")]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    overwrite_output_dir: bool,
    /// Number format of saved weights: f32, bf16, f16, or auto (that of the loaded weights)
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = SavedAs::Auto)]
    #[arg(hide_possible_values = true, help_heading = "Output")]
    save_dtype: SavedAs,
    #[command(flatten)]
    compute: Compute,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let adapter = args.source.require_adapter()?;
    let model_dir = Path::new(args.source.name());
    paths::check_apart(&args.output_dir, &[("the model", model_dir), ("the adapter", adapter)])?;
    let _lock = output_folder::claim(&args.output_dir, args.overwrite_output_dir)?;
    on_device!(args.compute, backend => merge(args, backend))?;
    say!("{}: merged, saved and verified", args.output_dir.display());
    Ok(print(serde_json::json!({
        "model": args.source.name(),
        "adapter": adapter.to_string_lossy(),
        "output_dir": args.output_dir.to_string_lossy(),
    }))?)
}

fn merge(args: &Args, backend: impl Backend) -> llara::Result<()> {
    let mut model = args.source.load((backend, Dtype::F32), args.template.as_deref(), None)?;
    let size = model.saved_bytes(args.save_dtype.into())?;
    output_folder::check_space(&args.output_dir, size, "the merged model")?;
    model.merge_adapter()?;
    model.set_base_name(hub::model_name(args.source.name()));
    model.save_as(&args.output_dir, args.save_dtype.into())
}
