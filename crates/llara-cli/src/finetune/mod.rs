//! `llara finetune`: train a model. All inputs are checked before files are written.

mod args;
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
mod steps;
mod trainer_flags;
mod training_args;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use llara::backend::{Backend, Dtype};
use llara::data::{Dataset, Sampling};
use llara::inspect::{Settings, inspect_first_rows};
use llara::train::{
    Checkpoint, EvalHistory, Evaluated, Evaluation, RunLog, Summary, TrainConfig, Trainer,
    state_bytes,
};
use llara::{BiEncoderModel, Error, Loader, Role, hub};

use super::compute::on_device;
use super::progress::TrainingProgress;
use super::report::{OwnReport, ReportFacts};
use super::talk::{count, counted, print, say};
use super::{eval_report, inspect_data, interrupt, output_folder, trained_model};
pub(super) use args::Args;
pub(super) use forecast::Forecast;
pub(super) use lengths::warnings as length_warnings;
use prepare::missing;
pub(super) use prepare::{Prepared, Purpose};

/// Number of texts whose lengths are measured before training.
const TEXTS: usize = 2_000;

/// Bytes of the first rows that are inspected before training. It takes a tenth of a second.
const INSPECTED_BYTES: usize = 8 << 20;

pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let deadline = args.training.max_time.and_then(|time| Instant::now().checked_add(time));
    let output_dir = args.output.output_dir.clone().ok_or_else(|| missing("--output-dir"))?;
    on_device!(args.compute, backend => finetune(&args, output_dir, deadline, backend))
}

fn finetune(
    args: &Args,
    output_dir: PathBuf,
    deadline: Option<Instant>,
    backend: impl Backend,
) -> anyhow::Result<()> {
    let mut prepared = Prepared::new(args, Purpose::Run(output_dir), backend)?;
    let forecast = Forecast::new(args, &prepared)?;
    forecast.refuse_if_too_large(&prepared)?;
    for line in forecast.lines() {
        say!("{line}");
    }
    let lengths = prepared.lengths(TEXTS)?;
    for line in lengths::warnings(&lengths, &prepared.outline.prompts)? {
        say!("{line}");
    }
    for line in noteworthy(&prepared)? {
        say!("{line}");
    }
    let facts = report_facts::facts(args, &prepared, &forecast, &lengths)?;
    prepared.config.chunking = forecast.plan.chunks.chunking;

    let mut model = prepared.load(args)?;
    model.set_base_name(hub::model_name(&prepared.model_name));
    check_space(&prepared, &model, args.lora.save_merged_lora_model)?;
    let config = &prepared.config;
    let trained = train(args, &prepared, &mut model, facts, deadline).and_then(|trained| {
        if trained.summary.stopped {
            return Err(interrupt::Stopped::now().into());
        }
        load_best(&mut model, &trained)
            .and_then(|()| save(model, config, args.lora.save_merged_lora_model))
            .inspect_err(|_| output_folder::say_what_is_left(&config.output_dir))?;
        Ok(trained)
    });
    if trained.is_err() && prepared.created_output_dir() {
        output_folder::discard_if_nothing_was_logged(&config.output_dir);
    }
    report(&config.output_dir, &trained?)
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

/// Refuses a run whose model and checkpoints exceed the free disk space.
fn check_space<B: Backend>(
    prepared: &Prepared<B>,
    model: &BiEncoderModel<B>,
    merged: bool,
) -> llara::Result<()> {
    let Prepared { config, dataset, evaluation, .. } = prepared;
    let steps = config.length.steps(config.sampler(dataset, 1)?.steps_per_epoch())?;
    let saving = &config.saving;
    let regular = saving.every.map_or(0, |every| steps / every.max(1));
    // Each evaluation may be the best so far.
    let best = evaluation.as_ref().filter(|evaluation| evaluation.save_best);
    let made = steps.min(regular + best.map_or(0, |evaluation| evaluation.remaining(0, steps)));
    // The oldest checkpoint is removed after the next one is complete, hence limit + 1. Without a limit all
    // are kept, and a full disk would end the run after days.
    let least = if evaluation.is_some() { 2 } else { 1 };
    let kept = saving.keep.map_or(made, |keep| made.min(keep.max(least) as u64 + 1));
    let whole = model.saved_bytes(saving.dtype)?;
    let (one, merged) = match model.adapter() {
        Some(_) => (model.saved_adapter_bytes()?, if merged { whole } else { 0 }),
        None => (whole, 0),
    };
    let checkpoint = one.saturating_add(state_bytes(model, saving.dtype));
    let needed = checkpoint.saturating_mul(kept).saturating_add(one).saturating_add(merged);
    let largest = match kept {
        0 => "the trained model".to_owned(),
        kept => format!("the trained model and {}", counted(kept as usize, "checkpoint")),
    };
    output_folder::check_space(&config.output_dir, needed, &largest)
}

/// Takes the weights of the best evaluated step, if that is wanted and it is not the last one.
fn load_best<B: Backend>(model: &mut BiEncoderModel<B>, trained: &Trained) -> llara::Result<()> {
    model.decoder_mut().drop_gradients();
    let Some(best) = &trained.best_checkpoint else { return Ok(()) };
    Checkpoint::open(best)?.restore_weights(model)?;
    say!("loaded    the weights of the best evaluated step, from {}", best.display());
    Ok(())
}

/// Saves the model, or its adapter and, if `merged` is set, the model with the merged adapter.
fn save<B: Backend>(
    mut model: BiEncoderModel<B>,
    config: &TrainConfig,
    merged: bool,
) -> llara::Result<()> {
    if model.adapter().is_none() {
        return model.save_as(&config.output_dir, config.saving.dtype);
    }
    model.save_adapter(&config.output_dir)?;
    if merged {
        if model.precision() != Dtype::F32
            && let Some(base) = model.source().map(Path::to_owned)
        {
            // The weights in memory were rounded; the adapter must be added to the original ones.
            let (backend, options) = (model.backend().clone(), *model.options());
            let (facts, base_name) =
                (model.run_facts().clone(), model.base_name().map(str::to_owned));
            let loader = Loader::new(&base)?.with_recipe(model.recipe().clone());
            drop(model);
            model = loader.with_adapter(&config.output_dir).load(backend, options)?;
            model.set_run_facts(facts);
            model.set_base_name(base_name);
            model.attach_adapter(&config.output_dir)?;
        }
        model.merge_adapter()?;
        model.save_as(&config.output_dir.join("merged_model"), config.saving.dtype)?;
    }
    Ok(())
}

/// The result of a run.
struct Trained {
    summary: Summary,
    /// The figures of its evaluations.
    history: Option<EvalHistory>,
    /// The checkpoint whose weights are to be saved instead of those of the last step.
    best_checkpoint: Option<PathBuf>,
}

/// Runs all steps. The optimizer state is freed when this returns, before the model is saved.
fn train<B: Backend>(
    args: &Args,
    prepared: &Prepared<B>,
    model: &mut BiEncoderModel<B>,
    facts: ReportFacts,
    deadline: Option<Instant>,
) -> anyhow::Result<Trained> {
    let Prepared { config, dataset, checkpoint, evaluation, .. } = prepared;
    let evaluation = evaluation.as_ref();
    let about_model = describe(model, args.model.model.as_deref().unwrap_or_default());
    for (role, max_len) in
        [(Role::Query, config.query_max_len), (Role::Passage, config.passage_max_len)]
    {
        trained_model::warn_if_too_long(model, role, max_len);
    }
    let normalized = model.options().normalized;
    let in_process = model.backend().free_and_total_bytes()?.is_none();
    let (mut trainer, notes) = match checkpoint {
        Some(checkpoint) => Trainer::resumed(model, dataset, config, checkpoint)?,
        None => (Trainer::new(model, dataset, config)?, Vec::new()),
    };
    if let Some(evaluation) = evaluation {
        trainer.set_evaluation(evaluation)?;
    }
    let (first, total) = (trainer.state().step(), trainer.total_steps());
    say!("{about_model}");
    announce(args, normalized, (config, dataset), total);
    announce_evaluation(evaluation, dataset);
    for note in notes {
        say!("note: {note}");
    }
    let last = trainer.history().and_then(|history| history.last.as_ref());
    let evaluated = last.map(|evaluated| evaluated.step);
    let log = match checkpoint {
        Some(checkpoint) => {
            say!("resumed   after step {first} of {total}, from {}", checkpoint.dir().display());
            open_log(&config.output_dir, |output_dir| RunLog::resume(output_dir, first, evaluated))?
        }
        None => {
            output_folder::remove_earlier_checkpoints(&config.output_dir)?;
            open_log(&config.output_dir, RunLog::create)?
        }
    };
    interrupt::stop_after_step()?;
    let report = OwnReport::new(config.output_dir.clone(), facts, in_process);
    let last = trainer.history().and_then(|history| history.last.as_ref());
    let evaluations = evaluation.map(|evaluation| (evaluation, last.map(Evaluated::seconds)));
    let mut progress = TrainingProgress::new(log, report, (first, total), evaluations, deadline);
    let result = trainer.run(&mut progress);
    progress.finish();
    let summary = result?;
    match summary.stopped {
        true => say_stopped(&summary, total, &config.output_dir),
        false if summary.steps < total => {
            say!("stopped early, after step {} of {total}", summary.steps);
        }
        false => {}
    }
    let history = trainer.history().filter(|_| evaluation.is_some()).cloned();
    let best = history.as_ref().and_then(|history| history.best.as_ref());
    let loads = evaluation.is_some_and(|evaluation| evaluation.save_best)
        && best.is_some_and(|best| best.step != summary.steps);
    let best_checkpoint = trainer.best_checkpoint().filter(|_| loads);
    Ok(Trained { summary, history, best_checkpoint })
}

/// Prints why the run was stopped and how to continue it.
fn say_stopped(summary: &Summary, total: u64, output_dir: &Path) {
    let (step, folder) = (summary.steps, output_dir.display());
    let why = if interrupt::received() { "" } else { ", because --max-time has passed" };
    if step == 0 {
        say!("stopped before the first step{why}; nothing was saved");
        return;
    }
    say!("stopped after step {step} of {total}{why}");
    say!(
        "to continue the run from {folder}/checkpoint-{step}, repeat the command with \
         --resume-from-checkpoint"
    );
}

/// Prints what is evaluated and when.
fn announce_evaluation(evaluation: Option<&Evaluation>, dataset: &Dataset) {
    let Some(evaluation) = evaluation else { return };
    let when = match evaluation.every {
        Some(1) => "after every step".to_owned(),
        Some(every) => format!("every {} and at the end", counted(every as usize, "step")),
        None => "at the end".to_owned(),
    };
    let is_task = |name: &str| {
        dataset.sources().sources.iter().any(|source| source.task.as_deref() == Some(name))
    };
    for set in &evaluation.sets {
        say!(
            "evaluate  {} ({}), {when}: {}, {}{}",
            set.name,
            set.split,
            match set.dataset.queries.len() {
                1 => "1 query".to_owned(),
                queries => format!("{} queries", count(queries)),
            },
            counted(set.dataset.corpus.len(), "passage"),
            if is_task(&set.name) { ", with the instructions of this task" } else { "" }
        );
    }
}

/// Creates the output folder and opens the log.
fn open_log(
    output_dir: &Path,
    open: impl FnOnce(&Path) -> llara::Result<RunLog>,
) -> llara::Result<RunLog> {
    fs::create_dir_all(output_dir)
        .map_err(|e| Error::io("create the output folder", output_dir, e))?;
    open(output_dir)
}

fn describe(model: &BiEncoderModel<impl Backend>, name: &str) -> String {
    let decoder = model.decoder();
    let parameters: usize = decoder.tensors().map(|tensor| tensor.elements()).sum();
    let trained = decoder.tensors().filter(|tensor| tensor.is_trainable());
    let trainable: usize = trained.map(|tensor| tensor.elements()).sum();
    let training = match model.adapter() {
        Some(lora) => {
            let tokens = match lora.trained_tokens.len() {
                0 => String::new(),
                tokens => format!(" and embeddings of {}", counted(tokens, "token")),
            };
            format!("adapter of rank {}{tokens}, {} parameters", lora.rank, count(trainable))
        }
        None => "all weights".to_owned(),
    };
    let config = decoder.config();
    let template = model.prompts().template();
    format!(
        "device    {}; {}\nmodel     {name}: {:?}, {}, {}, hidden {}, vocabulary {}\n\
         training  {training}\ntemplate  {}: mean of the last {}",
        model.backend().description(),
        model.backend().describe_products(model.precision()),
        config.family,
        counted(parameters, "parameter"),
        counted(config.num_hidden_layers, "layer"),
        config.hidden_size,
        count(config.vocab_size),
        template.name,
        counted(template.pooled_tokens, "token"),
    )
}

fn announce(
    args: &Args,
    normalized: bool,
    (config, dataset): (&TrainConfig, &Dataset),
    steps: u64,
) {
    say!("data      {}, {} skipped", counted(dataset.len(), "row"), dataset.skipped().count);
    say_skipped(dataset);
    let (batch, group) = (config.batch_size, config.group_size);
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
    if args.training.negatives_cross_device {
        say!("note: --negatives-cross-device has no effect with one process");
    }
    if !normalized {
        say!("note: embeddings are not normalized, so the temperature is 1.0");
    }
    if args.optimizer.ignores_warmup() {
        say!("note: the schedule `constant` has no warm-up; use constant_with_warmup");
    }
}

/// Prints the reasons for the first few skipped rows, and the number of the others.
pub(super) fn say_skipped(dataset: &Dataset) {
    let skipped = dataset.skipped();
    for reason in &skipped.reasons {
        say!("skipped: {reason}");
    }
    let more = skipped.count.saturating_sub(skipped.reasons.len() as u64);
    if more > 0 {
        say!("skipped: {}", counted(more as usize, "more row"));
    }
}

fn report(output_dir: &Path, trained: &Trained) -> anyhow::Result<()> {
    let Trained { summary, history, .. } = trained;
    let seconds = summary.elapsed.as_secs_f64();
    let tokens_per_second = summary.tokens as f64 / seconds.max(1e-9);
    say!(
        "{}: {} in {seconds:.1} s, last loss {:.4}, {} tokens/s; saved and verified",
        output_dir.display(),
        counted(summary.steps as usize, "step"),
        summary.loss,
        count(tokens_per_second as usize)
    );
    let mut result = serde_json::json!({
        "steps": summary.steps,
        "loss": summary.loss,
        "tokens": summary.tokens,
        "tokens_per_second": tokens_per_second,
        "output_dir": output_dir.to_string_lossy(),
    });
    if let Some(history) = history {
        result["eval"] = eval_report::json(history);
    }
    Ok(print(result)?)
}
