//! `llara merge`: a model and its adapter to one model.

use std::path::PathBuf;

use clap::ArgAction;
use clap::builder::BoolishValueParser;

use super::output_folder;
use super::talk::say;
use super::trained_model::TrainedModel;

/// Add an adapter to the weights of its model, and save the whole.
#[derive(clap::Args)]
#[command(after_help = "\
Example:
  llara merge --model base --adapter tuned --output-dir merged")]
pub(super) struct Args {
    #[command(flatten)]
    model: TrainedModel,
    /// Folder for the model; new or empty
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    output_dir: PathBuf,
    /// Replace an earlier model in the output folder
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set, help_heading = "Output")]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    overwrite_output_dir: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    args.model.check()?;
    args.model.require_adapter()?;
    output_folder::check(&args.output_dir, args.overwrite_output_dir)?;
    let mut model = args.model.load()?;
    model.merge_adapter()?;
    model.save(&args.output_dir)?;
    say!("{}: merged, saved and checked", args.output_dir.display());
    Ok(())
}
