//! `llara evaluate`: retrieval metrics of a model on a test collection.

use std::cell::Cell;
use std::path::PathBuf;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::backend::Backend;
use llara::retrieval::{
    BeirDataset, Metrics, Run, SearchOptions, SharedEmbedder, UnknownIds, begins_like_trec_run,
    check_trec_run, evaluate_dataset, write_trec_run,
};
use llara::{Error, ErrorKind, Role};

use super::compute::on_device;
use super::paths::{check_apart, check_replaceable};
use super::processes::{CollectiveArgs, Processes};
use super::progress::TextProgress;
use super::talk::{count, counted, print, say};
use super::trained_model::{Roles, TrainedModel, check_top_k};

/// Evaluate retrieval on a test collection with exact search and trec_eval's metrics.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  llara evaluate --model tuned --dataset beir/scifact --split test
  llara evaluate --model tuned --dataset beir/arguana --ignore-identical-ids --run-file run.trec

Prints one JSON object: model, dataset, split, ndcg@10, mrr@10, recall@10, recall@100, map and
queries; with --on-unknown-id skip also skipped_judgments. Metrics at a cutoff above --top-k are
omitted.")]
pub(super) struct Args {
    #[command(flatten)]
    model: TrainedModel,
    /// BEIR folder: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv
    #[arg(long, value_name = "DIR", help_heading = "Data")]
    dataset: PathBuf,
    /// Split of the dataset: the name of a file in qrels/
    #[arg(long, value_name = "SPLIT", default_value = "test", help_heading = "Data")]
    split: String,
    /// Number of passages that are retrieved per query
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = "Data")]
    top_k: usize,
    /// Exclude the passage with the query's id (for ArguAna and Quora)
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true, help_heading = "Data")]
    ignore_identical_ids: bool,
    /// What to do with a judgment whose query or document is not in the dataset: error (stop) or skip
    /// (ignore the judgment and count it)
    #[arg(long, value_name = "ACTION", value_parser = crate::values::unknown_ids(), default_value = "error")]
    #[arg(hide_possible_values = true, help_heading = "Data")]
    on_unknown_id: UnknownIds,
    /// Output file of the rankings, in trec_eval's format; an earlier run file is replaced
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    run_file: Option<PathBuf>,
    /// Replace the run file even if it is a file of another kind
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new())]
    #[arg(hide_possible_values = true, help_heading = "Output")]
    overwrite: bool,
    #[command(flatten)]
    roles: Roles,
    #[command(flatten)]
    collective: CollectiveArgs,
}

pub(super) fn run(mut args: Args) -> anyhow::Result<()> {
    let processes = Processes::start(args.collective.collective_timeout)?;
    args.model.compute.set_default_threads(processes.placement().threads);
    let result = evaluate(&args, &processes);
    processes.end(result)
}

fn evaluate(args: &Args, processes: &Processes) -> anyhow::Result<()> {
    let dataset = processes.agree(open(args).map_err(Into::into))?;
    let (dataset, skipped) = dataset;
    if skipped > 0 {
        say!(
            "warning: {} of unknown queries or documents ignored; the metrics do not include them",
            counted(skipped, "judgment")
        );
    }
    let (metrics, run) =
        on_device!(args.model.compute, backend => rank(args, &dataset, backend, processes))?;
    processes.first(|| report(args, (&dataset, skipped), &metrics, &run))?;
    Ok(())
}

/// Checks the options and reads the dataset; also returns the number of skipped judgments.
fn open(args: &Args) -> llara::Result<(BeirDataset, usize)> {
    args.model.check()?;
    check_top_k(args.top_k)?;
    if let Some(path) = &args.run_file {
        let mut inputs = args.model.inputs();
        inputs.push(("the dataset", &args.dataset));
        check_apart(path, &inputs)?;
        check_replaceable(path, ("a run file", |path| begins_like_trec_run(path)), args.overwrite)?;
        check_trec_run(path, [])?;
    }
    let (dataset, skipped) =
        BeirDataset::open_with(&args.dataset, &args.split, args.on_unknown_id)?;
    if let Some(path) = &args.run_file {
        check_trec_run(path, dataset.queries.ids.iter().chain(dataset.corpus.ids.iter()))?;
    }
    Ok((dataset, skipped))
}

/// Writes the run file and prints the metrics.
fn report(
    args: &Args,
    (dataset, skipped): (&BeirDataset, usize),
    metrics: &Metrics,
    run: &Run,
) -> anyhow::Result<()> {
    if metrics.queries == 0 {
        return Err(Error::new(ErrorKind::Data, "no query has judgments, so there are no metrics")
            .file(&args.dataset)
            .hint("check that queries.jsonl and qrels use the same ids")
            .into());
    }
    if let Some(path) = &args.run_file {
        write_trec_run(path, run, "llara")?;
    }
    table(args, dataset, metrics);
    let mut result = serde_json::json!({
        "model": args.model.name(),
        "dataset": args.dataset.to_string_lossy(),
        "split": args.split,
    });
    for (_, key, value) in metrics.measured(args.top_k, dataset.corpus.len()) {
        result[key] = value.into();
    }
    result["queries"] = metrics.queries.into();
    if args.on_unknown_id == UnknownIds::Skip {
        result["skipped_judgments"] = skipped.into();
    }
    Ok(print(result)?)
}

/// Encodes queries and passages, and ranks the passages for each query.
fn rank(
    args: &Args,
    dataset: &BeirDataset,
    backend: impl Backend,
    processes: &Processes,
) -> anyhow::Result<(Metrics, Run)> {
    let collective = processes.collective(&backend);
    let model = processes.agree(args.model.load_on(backend, processes))?;
    let mut embedder = args.model.embedder(&model);
    processes.agree(args.roles.apply(&mut embedder).map_err(Into::into))?;
    processes.check_same("model or dataset", || {
        let tables = [&dataset.queries, &dataset.corpus].into_iter();
        let texts = tables.flat_map(|table| table.ids.iter().chain(&table.texts));
        let origin = embedder.model_origin(Role::Passage)?;
        Ok(origin.with_texts("texts", texts.map(String::as_str)).hash())
    })?;

    let progress = TextProgress::new(dataset.queries.len() + dataset.corpus.len());
    let (done, stopped) = (Cell::new(0), Cell::new(false));
    let on_batch = |texts| {
        done.set(done.get() + texts);
        progress.set(done.get());
        Ok(())
    };
    embedder.on_batch = Some(&on_batch);
    let options =
        SearchOptions { top_k: args.top_k, ignore_identical_ids: args.ignore_identical_ids };
    let shared = SharedEmbedder {
        inner: &embedder,
        collective: collective.as_ref(),
        stopped: &stopped,
        done: &done,
    };
    let on_progress = &mut |_| progress.set(done.get());
    let ranked = evaluate_dataset(&shared, &embedder, dataset, options, on_progress)?;
    drop(embedder);
    progress.finish();
    Ok(ranked)
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
    let measured = metrics.measured(args.top_k, dataset.corpus.len());
    for (name, _, value) in &measured {
        say!("  {name:<10} {value:.4}");
    }
    if args.top_k < 100.min(dataset.corpus.len()) {
        say!(
            "note: metrics at a cutoff above --top-k {} are omitted; MAP is over the first {}",
            args.top_k,
            counted(args.top_k, "passage")
        );
    }
}
