//! `llara pretrain`: adapt a language model to embedding texts. All inputs are checked before files are written.

mod args;
mod prepare;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use llara::backend::Backend;
use llara::data::Sampling;
use llara::train::plan::{EvaluationShape, LargestBatch, PlannedTask, RunShape};
use llara::train::{Chunking, Pretraining, PretrainingOptions};
use llara::{Result, hub};

use crate::compute::on_device;
use crate::processes::Processes;
use crate::report::{Lengths, ReportFacts};
use crate::talk::{count, counted, say};
use crate::training::{
    Forecast, Purpose, Remedies, Run, adapter_setting, announce_processes, common_settings,
    group_shape, missing, smallest_chunking,
};
pub(super) use args::Args;
pub(super) use prepare::Prepared;
use prepare::lora_config;

/// Bins of the histogram of text lengths.
const BINS: usize = 24;
/// The largest fraction of truncated texts without a warning.
const TRUNCATED_SHARE: f64 = 0.2;

pub(super) fn run(mut args: Args) -> anyhow::Result<()> {
    let deadline = args.common.training.max_time.and_then(|time| Instant::now().checked_add(time));
    let output_dir =
        args.common.output.output_dir.clone().ok_or_else(|| missing("--output-dir"))?;
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
    on_device!(args.common.compute, backend => pretrain(args, output_dir, deadline, backend, processes))
}

fn pretrain(
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
    model.set_max_lens(prepared.recipe.query_max_len, prepared.recipe.passage_max_len)?;
    let Prepared { config, options, data, checkpoint, evaluation, .. } = &prepared;
    let positions = model.decoder().config().max_position_embeddings;
    if options.cutoff_len > positions {
        say!(
            "warning: --cutoff-len is {} tokens, but the model supports {positions} \
             (max_position_embeddings)",
            options.cutoff_len
        );
    }
    let run = Run {
        config,
        dataset: data.dataset(),
        checkpoint: checkpoint.as_ref(),
        evaluation: evaluation.as_ref(),
        model_name: &prepared.model_name,
        saves_merged: args.common.lora.save_merged_lora_model,
        created_output_dir: prepared.created_output_dir(),
        deadline,
        processes,
    };
    run.complete(
        model,
        facts,
        |model, collective| Pretraining::new(model, data, config, options, Arc::clone(collective)),
        |steps| announce(args, &prepared, steps, processes),
    )
}

/// Estimates the memory of the run, and prints what is noteworthy about memory and data. Returns the facts for the
/// report, and the chunks of a batch.
fn foresee<B: Backend>(
    args: &Args,
    prepared: &Prepared<B>,
) -> anyhow::Result<(ReportFacts, Chunking)> {
    let forecast = forecast(args, prepared, prepared.ranks)?;
    forecast.refuse_if_too_large()?;
    for line in forecast.lines() {
        say!("{line}");
    }
    for line in length_warnings(prepared) {
        say!("{line}");
    }
    Ok((facts(prepared, &forecast)?, forecast.plan.chunks.chunking))
}

/// Plans a step of the largest expected batch, in each of so many processes.
pub(super) fn forecast<B: Backend>(
    args: &Args,
    prepared: &Prepared<B>,
    processes: usize,
) -> Result<Forecast> {
    let Prepared { config, options, data, evaluation, outline, .. } = prepared;
    let prompts = &outline.prompts;
    let shape = |e| EvaluationShape::of(e, config, prompts, &prepared.recipe.tasks);
    let evaluation = evaluation.as_ref().map(shape).transpose()?;
    let shape = RunShape {
        decoder: outline.decoder.clone(),
        prompts: prompts.clone(),
        lora: lora_config(&prepared.adapter)?,
        precision: prepared.precision,
        options: args.model_options(&prepared.recipe),
        evaluation,
        task: PlannedTask::Pretraining,
        group: group_shape(config, processes, false),
        memory: prepared.backend.memory(),
        process_bytes: 0,
        saves_merged: args.common.lora.save_merged_lora_model,
    };
    let batch = LargestBatch::of_pretraining(data, prompts, config, options)?;
    let remedies = Remedies {
        max_len_option: "--cutoff-len",
        max_len: options.cutoff_len,
        smallest_max_len: options.cutoff_len - prepared.sample.text_tokens + 1,
        // An adapter is refused where tokens are added.
        adapter: outline.added_tokens.is_empty(),
    };
    let checkpoint = prepared.checkpoint.as_ref();
    let machine = (&prepared.backend, prepared.local_processes);
    Forecast::new(shape, batch, (&args.common.training, checkpoint), remedies, machine)
}

/// A warning if many texts are truncated.
pub(super) fn length_warnings<B: Backend>(prepared: &Prepared<B>) -> Vec<String> {
    let share = prepared.sample.truncated_share();
    if share <= TRUNCATED_SHARE {
        return Vec::new();
    }
    let cutoff_len = prepared.options.cutoff_len;
    let option = match prepared.data.piece_length() {
        Some(_) => "decrease --piece-characters",
        None => "increase --cutoff-len",
    };
    vec![format!(
        "warning: {:.0} % of the texts are longer than the {} that --cutoff-len {cutoff_len} leaves and are \
         truncated: {option}",
        100.0 * share,
        counted(prepared.sample.text_tokens, "token"),
    )]
}

fn announce<B: Backend>(args: &Args, prepared: &Prepared<B>, steps: u64, processes: &Processes) {
    let Prepared { config, options, data, .. } = prepared;
    let batch = config.batch_size * processes.size();
    if processes.size() > 1 {
        announce_processes(config, processes);
    }
    if let Some(length) = data.piece_length() {
        say!("pieces    of at most {}", counted(length.characters(), "character"));
    }
    say!(
        "steps     {}: {} with at most {} of text each",
        count(steps as usize),
        counted(batch, "row"),
        counted(prepared.sample.text_tokens, "token")
    );
    say!("targets   {}", targets(options));
    if config.sampling == Sampling::Random && batch > data.dataset().len() {
        say!(
            "note: the batch size {batch} is larger than the data: a step has only {}",
            counted(data.dataset().len(), "row"),
        );
    }
    if args.common.lora.are_ignored() {
        say!("note: --use-lora is false, so other options of adapters have no effect");
    }
    if args.common.optimizer.ignores_warmup() {
        say!("note: the schedule `constant` has no warm-up; use constant_with_warmup");
    }
}

fn targets(options: &PretrainingOptions) -> String {
    match options.stop_words {
        Some(_) => "all words but stop words".to_owned(),
        None => "all words".to_owned(),
    }
}

/// What the report says of a run that is about to start.
fn facts<B: Backend>(prepared: &Prepared<B>, forecast: &Forecast) -> Result<ReportFacts> {
    let Prepared { config, options, data, sample, .. } = prepared;
    let dataset = data.dataset();
    let steps_per_epoch = config.sampler(dataset, prepared.ranks)?.steps_per_epoch();
    let plan = &forecast.plan;
    let weights = &options.weights;
    let mut settings = vec![
        ("model", prepared.model_name.clone()),
        ("task", "pretraining".to_owned()),
        ("adapter", adapter_setting(lora_config(&prepared.adapter)?)),
        ("device", prepared.backend.description()),
        ("dtype", prepared.precision.to_string()),
        ("template", prepared.recipe.template.name.clone()),
        ("rows per step", (config.batch_size * prepared.ranks).to_string()),
        ("cutoff length", options.cutoff_len.to_string()),
        ("targets", targets(options)),
        (
            "weights",
            format!(
                "language model {}, auto-encode {}, auto-regress {}",
                weights.language_model, weights.auto_encode, weights.auto_regress
            ),
        ),
    ];
    if let Some(length) = data.piece_length() {
        settings.push(("pieces", counted(length.characters(), "character")));
    }
    settings.extend(common_settings(config));
    let files = dataset.files().into_iter().map(|file| {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name, file.rows)
    });
    Ok(ReportFacts {
        llara: env!("CARGO_PKG_VERSION").to_owned(),
        settings: settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        data: files.collect(),
        total_steps: config.length.steps(steps_per_epoch)?,
        planned_memory: plan.training.named().map(|(name, part)| (name.to_owned(), part)).into(),
        planned_peak: (plan.peak_bytes(), plan.peak_phase().to_owned()),
        measured_peak: None,
        lengths: vec![Lengths {
            role: "texts".to_owned(),
            max_len: sample.text_tokens,
            truncated_share: sample.truncated_share(),
            summary: sample.lengths.summary(),
            histogram: sample.lengths.histogram(BINS),
        }],
    })
}
