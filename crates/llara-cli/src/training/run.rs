//! A training run of any task once its model is in memory: the loop with its log, report and checkpoints, then saving
//! the model.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use llara::backend::{Backend, Dtype};
use llara::data::Dataset;
use llara::dist::Collective;
use llara::train::{
    Checkpoint, EvalHistory, Evaluated, Evaluation, Observer, RunLog, Summary, Task, TrainConfig,
    Trainer, state_bytes,
};
use llara::{BiEncoderModel, BiEncoderOptions, Error, Loader};

use super::traffic::{CountingObserver, Traffic};
use crate::processes::Processes;
use crate::progress::{Follower, TrainingProgress};
use crate::report::{OwnReport, ReportFacts};
use crate::talk::{count, counted, print, say};
use crate::{eval_report, interrupt, output_folder};

/// A run that has been checked and planned.
pub(crate) struct Run<'r> {
    pub(crate) config: &'r TrainConfig,
    pub(crate) dataset: &'r Dataset,
    /// The checkpoint that the run continues from.
    pub(crate) checkpoint: Option<&'r Checkpoint>,
    /// The evaluation during the run, if there is one.
    pub(crate) evaluation: Option<&'r Evaluation>,
    pub(crate) model_name: &'r str,
    /// Whether the model with the merged adapter is saved too.
    pub(crate) saves_merged: bool,
    pub(crate) created_output_dir: bool,
    /// When the run stops.
    pub(crate) deadline: Option<Instant>,
    /// The processes that train the model together; the first one logs and saves.
    pub(crate) processes: &'r Processes,
}

impl Run<'_> {
    /// Trains and saves the model, and prints the result. Every process calls it. `make_task` makes the task of a
    /// process of a group, `announce` prints its settings; its argument is the number of steps.
    pub(crate) fn complete<B: Backend, T: Task<B>>(
        &self,
        mut model: BiEncoderModel<B>,
        facts: ReportFacts,
        make_task: impl FnOnce(&mut BiEncoderModel<B>, &Arc<dyn Collective<B>>) -> llara::Result<T>,
        announce: impl FnOnce(u64),
    ) -> anyhow::Result<()> {
        let Run { config, saves_merged, processes, .. } = *self;
        let collective = processes.collective(model.backend());
        let task = processes.agree(make_task(&mut model, &collective).map_err(Into::into))?;
        let steps_per_epoch = task.steps_per_epoch();
        processes.first(|| Ok(self.check_space(&model, config.length.steps(steps_per_epoch)?)?))?;
        let trained = self.train((&mut model, task, collective), facts, announce);
        // Saving needs main memory of its own; that of activations, gradients and moments is unused now.
        model.decoder_mut().drop_gradients();
        model.backend().release_unused_memory();
        let trained = trained.and_then(|trained| {
            if trained.summary.stopped {
                return Err(processes.stopped());
            }
            processes.first(|| {
                Ok(load_best(&mut model, &trained)
                    .and_then(|()| save(model, config, saves_merged))
                    .inspect_err(|_| output_folder::say_what_is_left(&config.output_dir))?)
            })?;
            Ok(trained)
        });
        if trained.is_err() && self.created_output_dir {
            output_folder::discard_if_nothing_was_logged(&config.output_dir);
        }
        report(&config.output_dir, &trained?)
    }

    /// Refuses a run whose model and checkpoints exceed the free disk space. `steps` is its number of steps.
    fn check_space<B: Backend>(&self, model: &BiEncoderModel<B>, steps: u64) -> llara::Result<()> {
        let Run { config, evaluation, .. } = self;
        let saving = &config.saving;
        let regular = saving.every.map_or(0, |every| steps / every.max(1));
        // Each evaluation may be the best so far.
        let best = evaluation.filter(|evaluation| evaluation.save_best);
        let made = steps.min(regular + best.map_or(0, |evaluation| evaluation.remaining(0, steps)));
        // The oldest checkpoint is removed after the next one is complete, hence limit + 1. Without a limit all
        // are kept, and a full disk would end the run after days.
        let least = if evaluation.is_some() { 2 } else { 1 };
        let kept = saving.keep.map_or(made, |keep| made.min(keep.max(least) as u64 + 1));
        let whole = model.saved_bytes(saving.dtype)?;
        let (one, merged) = match model.adapter() {
            Some(_) => (model.saved_adapter_bytes()?, if self.saves_merged { whole } else { 0 }),
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

    /// Runs all steps. The optimizer state is freed when this returns, before the model is saved.
    fn train<B: Backend, T: Task<B>>(
        &self,
        (model, task, collective): (&mut BiEncoderModel<B>, T, Arc<dyn Collective<B>>),
        facts: ReportFacts,
        announce: impl FnOnce(u64),
    ) -> anyhow::Result<Trained> {
        let Run { config, dataset, checkpoint, evaluation, deadline, processes, .. } = *self;
        let about_model = describe(model, self.model_name);
        let in_process = model.backend().free_and_total_bytes()?.is_none();
        let made = Trainer::with_task(model, task, config, collective, checkpoint);
        let made = made.map_err(anyhow::Error::from).and_then(|(mut trainer, notes)| {
            if let Some(evaluation) = evaluation {
                trainer.set_evaluation(evaluation)?;
            }
            Ok((trainer, notes))
        });
        let (mut trainer, notes) = processes.agree(made)?;
        trainer.check_processes()?;
        let (first, total) = (trainer.state().step(), trainer.total_steps());
        say!("{about_model}");
        say!("data      {}, {} skipped", counted(dataset.len(), "row"), dataset.skipped().count);
        say_skipped(dataset);
        announce(total);
        announce_evaluation(evaluation, dataset);
        for note in notes {
            say!("note: {note}");
        }
        let last = trainer.history().and_then(|history| history.last.as_ref());
        let evaluated = last.map(|evaluated| evaluated.step);
        let log = processes.first(|| match checkpoint {
            Some(checkpoint) => {
                let folder = checkpoint.dir().display();
                say!("resumed   after step {first} of {total}, from {folder}");
                Ok(open_log(&config.output_dir, |output_dir| {
                    RunLog::resume(output_dir, first, evaluated)
                })?)
            }
            None => {
                output_folder::remove_earlier_checkpoints(&config.output_dir)?;
                Ok(open_log(&config.output_dir, RunLog::create)?)
            }
        })?;
        interrupt::stop_after_step()?;
        let evaluations = evaluation.map(|evaluation| (evaluation, last.map(Evaluated::seconds)));
        let mut follower = Follower { deadline };
        let mut progress = log.map(|log| {
            let report = OwnReport::new(config.output_dir.clone(), facts, in_process);
            TrainingProgress::new(log, report, (first, total), evaluations, deadline)
        });
        let observer: &mut dyn Observer = match &mut progress {
            Some(progress) => progress,
            None => &mut follower,
        };
        let mut counting = CountingObserver::new(observer, processes);
        let result = trainer.run(&mut counting);
        let traffic = counting.traffic(trainer.traffic().bytes_sent(0));
        if let Some(progress) = progress {
            progress.finish();
        }
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
        Ok(Trained { summary, traffic, history, best_checkpoint })
    }
}

/// Takes the weights of the best evaluated step, if that is wanted and it is not the last one.
fn load_best<B: Backend>(model: &mut BiEncoderModel<B>, trained: &Trained) -> llara::Result<()> {
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
            let backend = model.backend().clone();
            let options = BiEncoderOptions { negatives_cross_device: false, ..*model.options() };
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
    /// What was sent, if there are several processes.
    traffic: Option<Traffic>,
    /// The figures of its evaluations.
    history: Option<EvalHistory>,
    /// The checkpoint whose weights are to be saved instead of those of the last step.
    best_checkpoint: Option<PathBuf>,
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

/// Prints the reasons for the first few skipped rows, and the number of the others.
pub(crate) fn say_skipped(dataset: &Dataset) {
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
    let Trained { summary, traffic, history, .. } = trained;
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
    if let Some(traffic) = traffic {
        result.as_object_mut().into_iter().for_each(|result| traffic.add_to(result));
    }
    if let Some(history) = history {
        result["eval"] = eval_report::json(history);
    }
    Ok(print(result)?)
}
