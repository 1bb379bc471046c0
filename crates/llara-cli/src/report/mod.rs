//! `llara report`: training runs as one HTML file.

mod chart;
mod facts;
mod own;
mod page;
mod run_data;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::{Error, ErrorKind, Result, replace_file};

use super::paths::check_replaceable;
use super::talk::{print, say};
pub(super) use facts::{Lengths, ReportFacts};
pub(super) use own::OwnReport;
use run_data::RunData;

/// Name of the report in an output folder.
const REPORT_FILE: &str = "report.html";

/// Plot training runs in one HTML file: loss, learning rate, metrics, memory, settings
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara report tuned
  llara report runs/full runs/lora --output comparison.html

The file needs no network and no other file. `llara finetune` writes report.html of its own run while it
goes on. Several runs are drawn over one another.

Prints one JSON object: output, runs.")]
pub(super) struct Args {
    /// Output folders of `llara finetune`
    #[arg(value_name = "DIR", required = true, help_heading = "Input")]
    folders: Vec<PathBuf>,
    /// Output file [default: report.html in the folder; needed for several runs]
    #[arg(long, value_name = "FILE.html", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Replace the output file even if it is not a report
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    #[arg(help_heading = "Output")]
    overwrite: bool,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let output = match (&args.output, args.folders.as_slice()) {
        (Some(output), _) => output.clone(),
        (None, [folder]) => folder.join(REPORT_FILE),
        (None, folders) => {
            return Err(Error::new(ErrorKind::Argument, "several runs need --output")
                .expected("--output FILE.html")
                .got(format!("{} folders", folders.len()))
                .into());
        }
    };
    check_replaceable(&output, ("a report of this program", is_report), args.overwrite)?;
    let runs: Vec<RunData> =
        args.folders.iter().map(|folder| RunData::read(folder)).collect::<Result<_>>()?;
    replace_file(&output, page::page(&runs).as_bytes())?;
    say!("{}: {}", output.display(), super::talk::counted(runs.len(), "run"));
    Ok(print(serde_json::json!({
        "output": output.to_string_lossy(),
        "runs": runs.iter().map(|run| &run.name).collect::<Vec<_>>(),
    }))?)
}

/// Refuses a file that exists and is no report.
fn check_is_own(output: &Path) -> Result<()> {
    check_replaceable(output, ("a report of this program", is_report), false)
}

/// Whether a file begins like a report.
fn is_report(path: &Path) -> std::io::Result<bool> {
    let mut start = String::new();
    File::open(path)?.take(page::MARK.len() as u64).read_to_string(&mut start).or_else(|e| {
        // Not text, so no report.
        if e.kind() == std::io::ErrorKind::InvalidData { Ok(0) } else { Err(e) }
    })?;
    Ok(start == page::MARK)
}
