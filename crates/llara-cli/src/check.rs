//! `llara check`: report everything that is wrong with a model or adapter folder.

use std::fmt;
use std::path::PathBuf;

use llara::backend::Backend;
use llara::check::{CheckOptions, Report, Status, Tool, bytes_to_read, check_folder};
use llara::{Error, ErrorKind};

use super::compute::{Compute, on_device};
use super::progress::ByteProgress;
use super::talk::{counted, print, say};
use super::trained_model;

/// Check a model or adapter folder: files, weights, tokenizer, template, probes, and which tools can serve it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara check tuned
  llara check adapter --model base
  llara check tuned/checkpoint-500 2>/dev/null | jq '.findings[] | select(.status == \"error\")'

Every check is made; the first fault does not end the report. Weights are read in small parts, so the check
of a large model needs little memory. Nothing in the folder is changed. Standard error has a table, standard
output one JSON object:
  folder, kind (model, adapter or unknown), checkpoint, errors, warnings,
  findings: status (ok, warning or error), check, file, what, expected, got, hint,
  tools: name, serves, settings, reasons, hint.
The exit code is 1 if there are errors.")]
pub(super) struct Args {
    /// Folder of a model, an adapter or a checkpoint
    #[arg(value_name = "DIR", help_heading = "Model")]
    folder: PathBuf,
    /// The base model of an adapter: a folder, or a name on the Hugging Face Hub (org/name)
    #[arg(long, alias = "model-name-or-path", value_name = "DIR|HUB_ID", help_heading = "Model")]
    model: Option<String>,
    /// Cache folder of the Hub [default: HF_HUB_CACHE, HF_HOME/hub or ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR", help_heading = "Model")]
    cache_dir: Option<PathBuf>,
    #[command(flatten)]
    compute: Compute,
}

/// The error of a folder whose faults were printed.
#[derive(Debug)]
pub(super) struct Faulty;

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the folder has errors")
    }
}

impl std::error::Error for Faulty {}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    if !args.folder.is_dir() {
        return Err(Error::new(ErrorKind::Io, "there is no such folder")
            .file(&args.folder)
            .hint("give the folder of a model, an adapter or a checkpoint")
            .into());
    }
    on_device!(args.compute, backend => check(args, backend))
}

fn check(args: &Args, backend: impl Backend) -> anyhow::Result<()> {
    let base = args.model.as_deref();
    let base = base.map(|model| trained_model::find(model, args.cache_dir.as_deref(), "DIR"));
    let base = base.transpose()?;
    let progress = ByteProgress::new(bytes_to_read(&args.folder, base.as_deref()));
    let on_bytes = |bytes| progress.add(bytes);
    let options = CheckOptions { base: base.as_deref(), on_bytes: &on_bytes };
    let report = check_folder(&backend, &args.folder, &options);
    progress.finish();
    show(&report);
    let (errors, warnings) = (report.count(Status::Error), report.count(Status::Warning));
    let folder = args.folder.display();
    say!("{folder}: {}, {}", counted(errors, "error"), counted(warnings, "warning"));
    print(serde_json::json!({
        "folder": args.folder.to_string_lossy(),
        "kind": report.kind,
        "checkpoint": report.checkpoint,
        "errors": errors,
        "warnings": warnings,
        "findings": report.findings,
        "tools": report.tools,
    }))?;
    if errors > 0 { Err(Faulty.into()) } else { Ok(()) }
}

/// Prints a table of the findings and the tools.
fn show(report: &Report) {
    let width = report.findings.iter().map(|finding| finding.check.len()).max().unwrap_or(0);
    for finding in &report.findings {
        let status = match finding.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Error => "error",
        };
        say!("{status:<7}  {:<width$}  {}: {}", finding.check, finding.file, finding.what);
        for (label, text) in
            [("expected", &finding.expected), ("got", &finding.got), ("hint", &finding.hint)]
        {
            if let Some(text) = text {
                say!("{:>width$}{label}: {text}", "", width = width + 11);
            }
        }
    }
    for Tool { name, serves, settings, reasons, hint } in &report.tools {
        let serves = if *serves { "yes" } else { "no" };
        say!("{name}: {serves}");
        for (key, value) in settings {
            say!("  {key}: {value}");
        }
        for reason in reasons {
            say!("  note: {reason}");
        }
        if let Some(hint) = hint {
            say!("  hint: {hint}");
        }
    }
}
