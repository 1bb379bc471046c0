//! `llara finetune`: train a model. All inputs are checked before files are written.

mod args;
mod contrastive_args;
mod forecast;
mod lengths;
mod objective_args;
mod prepare;
mod ranges;
mod report_facts;

use std::path::PathBuf;
use std::time::Instant;

use llara::backend::Backend;
use llara::data::{Dataset, Sampling};
use llara::inspect::{Settings, inspect_first_rows};
use llara::train::{Chunking, Finetuning, TrainConfig};
use llara::{Role, hub};

use super::compute::on_device;
use super::processes::Processes;
use super::report::ReportFacts;
use super::talk::{count, counted, say};
use super::training::{Purpose, Run, announce_processes, missing, smallest_chunking};
use super::{inspect_data, trained_model};
pub(super) use args::Args;
pub(super) use forecast::forecast;
pub(super) use lengths::warnings as length_warnings;
pub(super) use prepare::Prepared;
use prepare::required;

/// Number of texts whose lengths are measured before training.
const TEXTS: usize = 2_000;

/// Bytes of the first rows that are inspected before training. It takes a tenth of a second.
const INSPECTED_BYTES: usize = 8 << 20;

pub(super) fn run(mut args: Args) -> anyhow::Result<()> {
    let deadline = args.common.training.max_time.and_then(|time| Instant::now().checked_add(time));
    let output_dir =
        args.common.output.output_dir.clone().ok_or_else(|| missing("--output-dir"))?;
    required(&args)?;
    let processes = Processes::start(args.common.processes.collective.collective_timeout)?;
    args.common.compute.set_default_threads(processes.placement().threads);
    let result = run_on_device(&args, output_dir, deadline, &processes);
    processes.end(result)
}

fn run_on_device(
    args: &Args,
    output_dir: PathBuf,
    deadline: Option<Instant>,
    processes: &Processes,
) -> anyhow::Result<()> {
    on_device!(args.common.compute, backend => finetune(args, output_dir, deadline, backend, processes))
}

fn finetune(
    args: &Args,
    output_dir: PathBuf,
    deadline: Option<Instant>,
    backend: impl Backend,
    processes: &Processes,
) -> anyhow::Result<()> {
    let mut prepared = Prepared::new(args, Purpose::Run(output_dir), backend, processes)?;
    let (facts, chunking) = processes.agree(foresee(args, &prepared))?;
    prepared.config.chunking = smallest_chunking(chunking, processes)?;

    let mut model = processes.agree(prepared.load(args).map_err(Into::into))?;
    model.set_base_name(hub::model_name(&prepared.model_name));
    let Prepared { config, dataset, checkpoint, evaluation, .. } = &prepared;
    let run = Run {
        config,
        dataset,
        checkpoint: checkpoint.as_ref(),
        evaluation: evaluation.as_ref(),
        model_name: args.model.model.as_deref().unwrap_or_default(),
        saves_merged: args.common.lora.save_merged_lora_model,
        created_output_dir: prepared.created_output_dir(),
        deadline,
        processes,
    };
    for (role, max_len) in
        [(Role::Query, config.query_max_len), (Role::Passage, config.passage_max_len)]
    {
        trained_model::warn_if_too_long(&model, role, max_len);
    }
    let normalized = model.options().normalized;
    run.complete(
        model,
        facts,
        |model, collective| Finetuning::new(model, dataset, config, collective),
        |total| announce(args, normalized, (config, dataset), total, processes),
    )
}

/// Estimates the memory of the run, and prints what is noteworthy about memory and data. Returns the facts for the
/// report, and the chunks of a batch.
fn foresee(
    args: &Args,
    prepared: &Prepared<impl Backend>,
) -> anyhow::Result<(ReportFacts, Chunking)> {
    let forecast = forecast(args, prepared, prepared.ranks)?;
    forecast.refuse_if_too_large()?;
    for line in forecast.lines() {
        say!("{line}");
    }
    let lengths = prepared.lengths(TEXTS)?;
    for line in lengths::warnings(&lengths, &prepared.outline.prompts)? {
        say!("{line}");
    }
    for line in noteworthy(prepared)? {
        say!("{line}");
    }
    let facts = report_facts::facts(args, prepared, &forecast, &lengths)?;
    Ok((facts, forecast.plan.chunks.chunking))
}

/// What is noteworthy about the data, from its first rows: `llara inspect-data` has the rest.
fn noteworthy(prepared: &Prepared<impl Backend>) -> llara::Result<Vec<String>> {
    let Prepared { config, dataset, outline, .. } = prepared;
    let settings = Settings {
        group_size: config.group_size,
        prompts: Some(outline.prompts.clone()),
        // Lengths are measured on a sample of all rows.
        sample_rows: 0,
        near_duplicates: false,
        ..Settings::new(outline.prompts.template().clone())
    };
    let report = inspect_first_rows(dataset, &settings, INSPECTED_BYTES)?;
    Ok(inspect_data::noteworthy(&report, dataset.len()))
}

fn announce(
    args: &Args,
    normalized: bool,
    (config, dataset): (&TrainConfig, &Dataset),
    steps: u64,
    processes: &Processes,
) {
    let ranks = processes.size();
    if ranks > 1 {
        announce_processes(config, processes);
        say!(
            "          negatives of {}",
            match args.has_cross_device_negatives() {
                true => "all processes",
                false => "the own process",
            }
        );
    }
    let (batch, group) = (config.batch_size.saturating_mul(ranks), config.group_size);
    let of_row = group.saturating_mul(config.passage_max_len).saturating_add(config.query_max_len);
    let tokens = batch.saturating_mul(of_row);
    say!(
        "steps     {}: {batch} {} with {} each, at most {} per step",
        count(steps as usize),
        if batch == 1 { "query" } else { "queries" },
        counted(group, "passage"),
        counted(tokens, "token")
    );
    if config.sampling == Sampling::Random && batch > dataset.len() {
        say!(
            "note: the batch size {batch} is larger than the data: a step has only {}",
            counted(dataset.len(), "row"),
        );
    }
    if args.common.lora.are_ignored() {
        say!("note: --use-lora is false, so other options of adapters have no effect");
    }
    if args.contrastive.negatives_cross_device && ranks == 1 {
        say!("note: --negatives-cross-device has no effect with one process");
    }
    if !normalized {
        say!("note: embeddings are not normalized, so the temperature is 1.0");
    }
    if args.common.optimizer.ignores_warmup() {
        say!("note: the schedule `constant` has no warm-up; use constant_with_warmup");
    }
}
