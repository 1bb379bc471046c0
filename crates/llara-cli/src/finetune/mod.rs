//! `llara finetune`: train a model. All inputs are checked before files are written.

mod args;
mod distributed_args;
mod eval_args;
mod flag_table;
mod forecast;
mod lengths;
mod lora_args;
mod objective_args;
mod optimizer_args;
mod output_args;
mod prepare;
mod ranges;
mod report_facts;
mod resume;
mod run;
mod steps;
mod traffic;
mod trainer_flags;
mod training_args;

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
use super::{inspect_data, trained_model};
pub(super) use args::{Args, ModelArgs};
pub(super) use distributed_args::ProcessArgs;
pub(super) use eval_args::EvalArgs;
pub(super) use flag_table::OwnSettings;
pub(super) use forecast::{Forecast, Remedies, group_shape};
pub(super) use lengths::warnings as length_warnings;
pub(super) use lora_args::{Adapter, LoraArgs};
pub(super) use optimizer_args::OptimizerArgs;
pub(super) use output_args::OutputArgs;
pub(super) use prepare::{
    Prepared, Purpose, check_evaluated_texts, loader, missing, required, starting_recipe,
};
pub(super) use ranges::{check_loop, require};
pub(super) use report_facts::{adapter as adapter_setting, common_settings};
pub(super) use resume::Claimed;
pub(super) use run::{Run, say_skipped};
pub(super) use trainer_flags::TrainerFlags;
pub(super) use training_args::TrainingArgs;

/// Number of texts whose lengths are measured before training.
const TEXTS: usize = 2_000;

/// Bytes of the first rows that are inspected before training. It takes a tenth of a second.
const INSPECTED_BYTES: usize = 8 << 20;

pub(super) fn run(mut args: Args) -> anyhow::Result<()> {
    let deadline = args.training.max_time.and_then(|time| Instant::now().checked_add(time));
    let output_dir = args.output.output_dir.clone().ok_or_else(|| missing("--output-dir"))?;
    required(&args)?;
    let processes = Processes::start(args.collective_timeout())?;
    args.compute.set_default_threads(processes.placement().threads);
    let result = run_on_device(&args, output_dir, deadline, &processes);
    processes.end(result)
}

fn run_on_device(
    args: &Args,
    output_dir: PathBuf,
    deadline: Option<Instant>,
    processes: &Processes,
) -> anyhow::Result<()> {
    on_device!(args.compute, backend => finetune(args, output_dir, deadline, backend, processes))
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
        saves_merged: args.lora.save_merged_lora_model,
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
    let forecast = Forecast::new(args, prepared, prepared.ranks)?;
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

/// The smallest chunks that any process has chosen for its memory: with equal chunks, results are equal.
pub(super) fn smallest_chunking(
    chunking: Chunking,
    processes: &Processes,
) -> llara::Result<Chunking> {
    let Chunking { max_tokens, max_sequences, kept_tokens } = chunking;
    let [max_tokens, max_sequences, kept_tokens] =
        processes.smallest([max_tokens, max_sequences, kept_tokens])?;
    Ok(Chunking { max_tokens, max_sequences, kept_tokens })
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
    if args.lora.are_ignored() {
        say!("note: --use-lora is false, so other options of adapters have no effect");
    }
    if args.contrastive.negatives_cross_device && ranks == 1 {
        say!("note: --negatives-cross-device has no effect with one process");
    }
    if !normalized {
        say!("note: embeddings are not normalized, so the temperature is 1.0");
    }
    if args.optimizer.ignores_warmup() {
        say!("note: the schedule `constant` has no warm-up; use constant_with_warmup");
    }
}

/// Prints how the work is divided.
pub(super) fn announce_processes(config: &TrainConfig, processes: &Processes) {
    let (ranks, placement) = (processes.size(), processes.placement());
    say!(
        "processes {ranks}, {} on the first host with {} each by default; {} per step each; moments {}",
        placement.local_processes,
        counted(placement.threads, "thread"),
        counted(config.batch_size, "row"),
        if config.shard_optimizer { "divided among them" } else { "on every process" },
    );
}
