//! `llara evaluate`: how well a model finds what it should, on a test collection.

use std::path::{Path, PathBuf};

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::retrieval::{BeirDataset, Metrics, SearchOptions, evaluate_dataset, write_trec_run};
use llara::{Error, ErrorKind};

use super::progress::TextProgress;
use super::talk::{count, counted, print, say};
use super::trained_model::{Roles, TrainedModel, check_top_k};

/// Measure retrieval on a test collection: exact search, metrics as trec_eval defines them.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara evaluate --model tuned --dataset beir/scifact --split test
  llara evaluate --model tuned --dataset beir/arguana --ignore-identical-ids --run-file run.trec

Prints one JSON object: model, dataset, split, ndcg@10, mrr@10, recall@10, recall@100, map and
queries.")]
pub(super) struct Args {
    #[command(flatten)]
    model: TrainedModel,
    /// BEIR folder: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    dataset: PathBuf,
    /// Which judgments to use
    #[arg(long, value_name = "SPLIT", default_value = "test", help_heading = "Data")]
    split: String,
    /// Passages retrieved for a query
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = "Data")]
    top_k: usize,
    /// Leave out the passage whose id is the query's own (ArguAna, Quora)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true, help_heading = "Data")]
    ignore_identical_ids: bool,
    /// Write the rankings here, in trec_eval's format
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    run_file: Option<PathBuf>,
    #[command(flatten)]
    roles: Roles,
}

pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    args.model.check()?;
    check_top_k(args.top_k)?;
    if let Some(path) = &args.run_file {
        check_folder_of(path)?;
    }
    let dataset = BeirDataset::open(&args.dataset, &args.split)?;
    let model = args.model.load()?;
    let mut embedder = args.model.embedder(&model);
    args.roles.apply(&mut embedder)?;

    let progress = TextProgress::new(dataset.queries.len() + dataset.corpus.len());
    let on_batch = |texts| progress.add(texts);
    embedder.on_batch = Some(&on_batch);
    let options =
        SearchOptions { top_k: args.top_k, ignore_identical_ids: args.ignore_identical_ids };
    let (metrics, run) = evaluate_dataset(&embedder, &embedder, &dataset, options, &mut |_| ())?;
    drop(embedder);
    progress.finish();
    if metrics.queries == 0 {
        return Err(Error::new(
            ErrorKind::Data,
            "no judged query is in the run, so nothing can be measured",
        )
        .file(&args.dataset)
        .hint("check that queries.jsonl and qrels use the same ids")
        .into());
    }
    if let Some(path) = &args.run_file {
        write_trec_run(path, &run, "llara")?;
    }
    table(args, &dataset, &metrics);
    let mut result = serde_json::json!({
        "model": args.model.name(),
        "dataset": args.dataset,
        "split": args.split,
    });
    let metrics = serde_json::to_value(metrics)?;
    if let (Some(result), Some(metrics)) = (result.as_object_mut(), metrics.as_object()) {
        result.extend(metrics.clone());
    }
    Ok(print(result)?)
}

fn table(args: &Args, dataset: &BeirDataset, metrics: &Metrics) {
    say!(
        "{} ({}): {} {}, {}",
        args.dataset.display(),
        args.split,
        count(metrics.queries),
        if metrics.queries == 1 { "query" } else { "queries" },
        counted(dataset.corpus.len(), "passage")
    );
    for (name, value) in [
        ("nDCG@10", metrics.ndcg_at_10),
        ("MRR@10", metrics.mrr_at_10),
        ("Recall@10", metrics.recall_at_10),
        ("Recall@100", metrics.recall_at_100),
        ("MAP", metrics.map),
    ] {
        say!("  {name:<10} {value:.4}");
    }
}

/// A run file that cannot be written should not take an evaluation to be found out.
fn check_folder_of(path: &Path) -> llara::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if folder.is_dir() && !path.is_dir() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Argument, "the run file cannot be written there")
        .file(path)
        .hint("give the path of a file in a folder that exists"))
}
