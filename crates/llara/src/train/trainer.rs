//! The loop.

mod group;
mod saving;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::checkpoint::{BackgroundSave, Checkpoint, Identity, RunProgress, remove_surplus};
use super::config::TrainConfig;
use super::evaluation::{EvalHistory, EvalState, Evaluation, evaluate};
use super::finetuning::Finetuning;
use super::loss_terms::LossTerms;
use super::observer::{EvalEvent, Observer, Progress, StepRecord, Summary};
use super::schedule::Schedule;
use super::state::TrainState;
use super::task::{Task, TaskInput};
use super::traffic::StepTraffic;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::{Dataset, Draw, Prefetched, prefetch};
use crate::dist::{Collective, Solo};
use crate::model::Parameter;
use crate::{Error, ErrorKind, Result};
use group::{agree_on, check_same, hash};

/// Trains one model for one [`Task`].
pub struct Trainer<'r, B: Backend, T: Task<B> = Finetuning<'r, B>> {
    model: &'r mut BiEncoderModel<B>,
    config: &'r TrainConfig,
    /// Shared with the thread that makes its inputs.
    task: Arc<T>,
    collective: Arc<dyn Collective<B>>,
    state: TrainState<B>,
    schedule: Schedule,
    total_steps: u64,
    /// What the run is, for its checkpoints.
    identity: Identity,
    /// Of the steps before a resumed run.
    summary: Summary,
    /// The checkpoint that the run continues from.
    resumed_from: Option<PathBuf>,
    evaluation: EvalState<'r>,
    /// The checkpoint that is being finished while training goes on.
    unfinished: BackgroundSave,
    /// Whether the last checkpoint that ended in the background was saved; not agreed between processes yet.
    save_status: Result<()>,
}

/// How a run goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// With the next step, if there is one.
    Step,
    /// An observer stopped it, and a checkpoint was saved.
    Stopped,
    /// It ends before its last step, because the model has not improved.
    EarlyStopping,
}

/// A step that was asked of the device and whose results were not read yet.
struct PendingStep<B: Backend> {
    /// Everything but loss and gradient norm.
    record: StepRecord,
    rows: Vec<Draw>,
    /// The factor of this process's loss in the global one.
    weight: f64,
    /// The loss and its terms, on their way to the host. `[1, 1 + terms]`
    loss: B::Download,
    /// `[norm, factor]`, on its way to the host.
    clip: B::Download,
}

impl<'r, B: Backend> Trainer<'r, B> {
    /// Checks the settings against model and data, and makes the optimizer's state.
    ///
    /// # Errors
    /// When a setting is out of its range or the lengths leave no room for text.
    pub fn new(
        model: &'r mut BiEncoderModel<B>,
        dataset: &'r Dataset,
        config: &'r TrainConfig,
    ) -> Result<Self> {
        Self::in_group(model, dataset, config, Arc::new(Solo), None).map(|(trainer, _)| trainer)
    }

    /// [`new`](Trainer::new) that goes on from a checkpoint: weights, moments and position are its own. The
    /// model is the one that the interrupted run started from. Also returns notes about differences from
    /// that run that are allowed.
    ///
    /// # Errors
    /// As for [`new`](Trainer::new); when settings or data differ from those of the interrupted run; when
    /// the checkpoint does not fit the model.
    pub fn resumed(
        model: &'r mut BiEncoderModel<B>,
        dataset: &'r Dataset,
        config: &'r TrainConfig,
        checkpoint: &Checkpoint,
    ) -> Result<(Self, Vec<String>)> {
        Self::in_group(model, dataset, config, Arc::new(Solo), Some(checkpoint))
    }

    /// [`new`](Trainer::new) or [`resumed`](Trainer::resumed) for one process of a group. Every process has the same model, data and
    /// settings. The loss and gradient norm that an observer receives are those of the global batch, tokens
    /// are those of all processes. All take part in saving checkpoints.
    ///
    /// # Errors
    /// As for [`resumed`](Trainer::resumed), or when another process fails.
    pub fn in_group(
        model: &'r mut BiEncoderModel<B>,
        dataset: &'r Dataset,
        config: &'r TrainConfig,
        collective: Arc<dyn Collective<B>>,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<(Self, Vec<String>)> {
        let task = Finetuning::new(model, dataset, config, &collective)?;
        Self::with_task(model, task, config, collective, checkpoint)
    }
}

impl<'r, B: Backend, T: Task<B>> Trainer<'r, B, T> {
    /// The trainer of a task, of one process of a group, from the start or from a checkpoint; see
    /// [`in_group`](Trainer::in_group).
    ///
    /// # Errors
    /// As for [`resumed`](Trainer::resumed), or when another process fails.
    pub fn with_task(
        model: &'r mut BiEncoderModel<B>,
        task: T,
        config: &'r TrainConfig,
        collective: Arc<dyn Collective<B>>,
        checkpoint: Option<&Checkpoint>,
    ) -> Result<(Self, Vec<String>)> {
        let rank = (collective.rank(), collective.size());
        let settle = |model: &BiEncoderModel<B>| {
            let total_steps = config.length.steps(task.steps_per_epoch())?;
            let schedule =
                Schedule::new(config.learning_rate, config.decay, config.warmup, total_steps)?;
            check_intervals(config)?;
            let identity = Identity::of(model, &task, config, (total_steps, rank.1))?;
            Ok((total_steps, schedule, identity))
        };
        let settled = agree_on(settle(model), collective.as_ref())?;
        let (total_steps, schedule, identity) = settled;
        check_same(identity.hash(), "settings, data or another model", collective.as_ref())?;
        model.set_run_facts(identity.facts());
        let mut notes = Vec::new();
        if let Some(checkpoint) = checkpoint {
            notes = checkpoint.check(&identity)?;
            // Before gradients and moments take their memory: this needs that of a second model.
            checkpoint.restore_weights(model)?;
        }
        let mut state = TrainState::new(model, config, rank)?;
        let mut summary = Summary {
            steps: 0,
            loss: f32::NAN,
            tokens: 0,
            elapsed: Duration::ZERO,
            stopped: false,
        };
        if let Some(checkpoint) = checkpoint {
            checkpoint.restore_moments(model, state.optimizer_mut())?;
            let RunProgress { step: steps, loss, tokens, elapsed, .. } = *checkpoint.progress();
            summary = Summary { steps, loss, tokens, elapsed, stopped: false };
        }
        model.train();
        let trainer = Trainer {
            model,
            config,
            task: Arc::new(task),
            collective,
            state,
            schedule,
            total_steps,
            identity,
            summary,
            resumed_from: checkpoint.map(|checkpoint| checkpoint.dir().to_owned()),
            evaluation: EvalState::new(
                checkpoint.and_then(|checkpoint| checkpoint.evaluation().cloned()),
                total_steps,
            ),
            unfinished: BackgroundSave::default(),
            save_status: Ok(()),
        };
        Ok((trainer, notes))
    }

    /// Evaluates the model during the run. A resumed run continues with the figures in its checkpoint; the
    /// steps that it makes are the same with and without evaluation, unless early stopping ends it.
    ///
    /// # Errors
    /// When a setting is out of its range; when the metric or a set differs from that of the interrupted run;
    /// when the best checkpoint so far is to be kept for the end and is missing or damaged.
    pub fn set_evaluation(&mut self, evaluation: &'r Evaluation) -> Result<()> {
        self.evaluation.set(evaluation)?;
        if evaluation.save_best
            && let Some(best) = self.best_checkpoint()
        {
            Checkpoint::open(&best).map_err(|error| {
                error.hint(
                    "this is the best checkpoint of the run so far, whose weights are to be loaded at the \
                     end: restore it, or resume with --load-best-model-at-end false",
                )
            })?;
        }
        Ok(())
    }

    /// The figures of all evaluations so far; `None`: there was none.
    pub fn history(&self) -> Option<&EvalHistory> {
        self.evaluation.history()
    }

    /// The state between two steps.
    pub fn state(&mut self) -> &mut TrainState<B> {
        &mut self.state
    }

    /// The model's device.
    pub fn backend(&self) -> &B {
        self.model.backend()
    }

    /// What the processes exchange in a step with a full batch.
    pub fn traffic(&self) -> StepTraffic {
        StepTraffic::of_task::<B, T>(
            self.config,
            self.state.layout().clone(),
            self.model.dimension(),
            self.model.options().negatives_cross_device,
        )
    }

    /// Computes the gradients of a step, counted from 0, and passes every trainable parameter with its gradient to
    /// `visit`: the gradient of the global loss, before clipping. No weight changes. All processes of the group call it, and
    /// each gets all gradients.
    ///
    /// # Errors
    /// When the step's rows cannot be read, an operation of the device or of the group fails, or `visit` does.
    pub fn visit_gradients(
        &mut self,
        step: u64,
        mut visit: impl FnMut(&Parameter<B>, &B::Tensor) -> Result<()>,
    ) -> Result<()> {
        let (task, collective) = (Arc::clone(&self.task), Arc::clone(&self.collective));
        let input = self.agreed(task.input(step))?;
        let chunking = &self.config.chunking;
        self.state.sum_gradients(self.model, task.as_ref(), &input, chunking, &*collective)?;
        let decoder = self.model.decoder_mut();
        self.state.gather_gradients(decoder, &*collective)?;
        let visited = decoder
            .trainable_parameters()
            .try_for_each(|parameter| visit(parameter, parameter.grad()?));
        decoder.clear_gradients();
        visited
    }

    /// Steps that the run will make.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Checks that all processes save and evaluate at the same steps, and evaluate on the same sets: otherwise some would
    /// wait for others in the middle of the run. All processes of the group call it.
    ///
    /// # Errors
    /// The first rank that differs from rank 0, on every rank.
    pub fn check_processes(&self) -> Result<()> {
        let settings = (self.config.saving, self.evaluation.evaluation().map(Evaluation::settings));
        let hash = hash(&format!("{settings:?}"));
        check_same(hash, "settings of saving or evaluation", self.collective.as_ref())
    }

    /// Makes all steps. The model in memory is then the trained one; saving it is the caller's.
    ///
    /// While a step computes, the next one's rows are read and tokenized on another thread.
    ///
    /// # Errors
    /// When a loss or a gradient norm is not finite (with the step and its rows; that step changes no
    /// weight, and nothing is saved after it), when the data changed under the run, when an evaluation fails
    /// (a checkpoint is saved then), or when saving fails.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let summary = self.run_steps(observer);
        let saved = self.wait_for_checkpoint(observer);
        let summary = summary?;
        if let Err(error) = self.collective.agree(saved) {
            // Without this checkpoint, weights would be lost.
            if summary.stopped || self.evaluation.loads_other_weights(summary.steps) {
                return Err(error);
            }
            observer.on_save_failed(error)?;
        }
        if self.collective.rank() == 0 {
            let best = self.evaluation.best_step();
            remove_surplus(self.config, summary.steps, best)
                .or_else(|error| observer.on_save_failed(error))?;
        }
        self.model.eval();
        self.set_progress(&summary);
        Ok(summary)
    }

    fn run_steps(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let (step, mut summary) = (self.state.step(), self.summary);
        // The starting model, or an evaluation that was interrupted.
        let next = match self.evaluation.is_due(step) {
            true => self.after_step(step, &summary, observer)?,
            false if self.evaluation.is_exhausted() => Next::EarlyStopping,
            false => Next::Step,
        };
        match next {
            Next::Step => {
                let task = Arc::clone(&self.task);
                let inputs = (step..self.total_steps).map(|step| task.input(step));
                summary = prefetch(inputs, |inputs| self.make_steps(inputs, observer))?;
            }
            Next::Stopped => summary.stopped = true,
            Next::EarlyStopping => {}
        }
        Ok(summary)
    }

    fn make_steps(
        &mut self,
        inputs: &mut Prefetched<Result<T::Input>>,
        observer: &mut dyn Observer,
    ) -> Result<Summary> {
        let mut progress = Progress::new(self.config.logging_steps, self.total_steps, self.summary);
        let mut pending: Option<PendingStep<B>> = None;
        // A step's time includes waiting for its input.
        let mut start = Instant::now();
        for (step, input) in (self.state.step()..self.total_steps).zip(inputs) {
            self.collective.begin_step(step + 1);
            let input = self.agreed(input)?;
            let next = self.start_step(step, input)?;
            // An asynchronous device gets its next step before the results of this one are read, so
            // that it never waits for the host.
            if let Some(previous) = pending.replace(next) {
                self.finish_step(previous, &mut start, &mut progress, observer)?;
            }
            // Nothing is saved or evaluated of a run that has diverged.
            let waits = self.save_is_due(step + 1)
                || self.evaluation.is_due(step + 1)
                || progress.summary.stopped;
            if (waits || !self.model.backend().is_asynchronous())
                && let Some(last) = pending.take()
            {
                self.finish_step(last, &mut start, &mut progress, observer)?;
            }
            // Found out while this step was being computed, a wish to stop is met after the next one.
            if pending.is_some() {
                continue;
            }
            match self.after_step(step + 1, &progress.summary, observer)? {
                Next::Step => start = Instant::now(),
                Next::Stopped => return Ok(Summary { stopped: true, ..progress.summary }),
                Next::EarlyStopping => {
                    progress.log(observer)?;
                    break;
                }
            }
        }
        if let Some(last) = pending {
            self.finish_step(last, &mut start, &mut progress, observer)?;
        }
        progress.summary.stopped = false;
        Ok(progress.summary)
    }

    /// Evaluates the model and saves a checkpoint after a step, as far as they are due; before the first step
    /// nothing is saved.
    ///
    /// A wish to stop is met at once: the evaluation is then left to the resumed run. After the last step it is
    /// ignored if only the model remains to be saved.
    fn after_step(
        &mut self,
        step: u64,
        summary: &Summary,
        observer: &mut dyn Observer,
    ) -> Result<Next> {
        let evaluates = self.evaluation.is_due(step);
        let mut stopped = summary.stopped && (step < self.total_steps || evaluates);
        let mut saves = self.save_is_due(step);
        if evaluates && !stopped {
            match self.evaluate(step, observer) {
                Ok(Some(keeps)) => saves |= keeps,
                Ok(None) => stopped = true,
                Err(error) => {
                    if step > 0 {
                        self.save_after_error(step, summary, observer)?;
                    }
                    return Err(error);
                }
            }
        }
        let is_exhausted = self.evaluation.is_exhausted();
        // When the best weights are loaded at the end, the last ones are not lost.
        let is_last = step == self.total_steps || is_exhausted;
        saves |= is_last && self.evaluation.loads_other_weights(step);
        if step > 0 && (saves || stopped) {
            self.save(step, summary, observer)?;
        }
        Ok(match (stopped, is_exhausted) {
            (true, _) => Next::Stopped,
            (false, true) => Next::EarlyStopping,
            (false, false) => Next::Step,
        })
    }

    /// Whether a checkpoint is saved after a step, whatever an evaluation finds.
    fn save_is_due(&self, step: u64) -> bool {
        step > 0 && self.config.saving.every.is_some_and(|every| step.is_multiple_of(every))
    }

    /// Evaluates the model and reports the figures; returns whether its checkpoint is to be kept for the end,
    /// and `None` if an observer stopped the evaluation.
    fn evaluate(&mut self, step: u64, observer: &mut dyn Observer) -> Result<Option<bool>> {
        let Some(evaluation) = self.evaluation.evaluation() else { return Ok(Some(false)) };
        let tasks = self.task.dataset().sources().tasks(&self.config.instructions())?;
        let found = evaluate(
            (evaluation, &tasks),
            self.model,
            (step, self.epoch(step)),
            self.collective.as_ref(),
            &mut |done, total| {
                observer.on_evaluation_progress(done, total);
                observer.stops()
            },
        )?;
        let Some((evaluated, reports)) = found else { return Ok(None) };
        let (is_kept, history) = self.evaluation.add(evaluation, evaluated.clone());
        let told = observer.on_evaluate(&EvalEvent {
            evaluated: &evaluated,
            reports: &reports,
            history,
            total_steps: self.total_steps,
        });
        self.collective.agree(told)?;
        Ok(Some(is_kept))
    }

    /// The epoch, with its fraction, after `step` steps.
    fn epoch(&self, step: u64) -> f64 {
        step as f64 / self.task.steps_per_epoch() as f64
    }

    /// The input of a step, if all processes have theirs and no checkpoint failed in the background.
    fn agreed(&mut self, input: Result<T::Input>) -> Result<T::Input> {
        agree_on(self.take_save_status().and(input), self.collective.as_ref())
    }

    /// Asks the device for gradients and update of a step, counted from 0.
    fn start_step(&mut self, step: u64, input: T::Input) -> Result<PendingStep<B>> {
        let learning_rate = self.schedule.rate(step);
        let result = self.state.advance(
            self.model,
            self.task.as_ref(),
            &input,
            (&self.config.chunking, learning_rate),
            self.collective.as_ref(),
        )?;
        let record = StepRecord {
            step: step + 1,
            total_steps: self.total_steps,
            epoch: self.epoch(step + 1),
            loss: f32::NAN,
            terms: LossTerms::new(&[], &[]),
            grad_norm: f32::NAN,
            learning_rate,
            tokens: input.tokens(),
            elapsed: Duration::ZERO,
        };
        let weight = input.loss_weight(self.collective.rank());
        // Asked for now, so that reading them later does not wait for the next step.
        let backend = self.model.backend();
        let loss = backend.start_download(&result.loss)?;
        let clip = backend.start_download(&result.clip)?;
        Ok(PendingStep { record, rows: input.rows().to_vec(), weight, loss, clip })
    }

    /// Reads what a step has computed, reports it, and notes whether any process wants to stop.
    fn finish_step(
        &mut self,
        step: PendingStep<B>,
        start: &mut Instant,
        progress: &mut Progress,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let (record, stops) = self.read(step, start, observer.stops())?;
        progress.summary.stopped |= stops;
        progress.report(record, observer)?;
        if self.unfinished.is_finished() {
            self.save_status = self.finish_checkpoint(observer);
        }
        Ok(())
    }

    /// Reads what a step has computed on all processes, and whether any of them `stops`. The step's time is
    /// that since `start`, which becomes now.
    fn read(
        &self,
        step: PendingStep<B>,
        start: &mut Instant,
        stops: bool,
    ) -> Result<(StepRecord, bool)> {
        let backend = self.model.backend();
        let losses = backend.finish_download(step.loss)?;
        let grad_norm = backend.finish_download(step.clip)?[0];
        let mut totals = vec![step.record.tokens as f64, f64::from(u8::from(stops))];
        totals.extend(losses.iter().map(|&loss| f64::from(loss) * step.weight));
        self.collective.all_reduce_scalars(&mut totals)?;
        let (tokens, stops) = (totals[0] as u64, totals[1] > 0.0);
        let losses: Vec<f32> = totals[2..].iter().map(|&loss| loss as f32).collect();
        let (loss, terms) = (losses[0], LossTerms::new(T::TERMS, &losses[1..]));
        if !(loss.is_finite() && grad_norm.is_finite()) {
            // On every process: loss and norm are those of the global batch.
            let error = self.diverged(step.record.step - 1, &step.rows, loss, grad_norm);
            return agree_on(Err(error), self.collective.as_ref());
        }
        let elapsed = std::mem::replace(start, Instant::now()).elapsed();
        let record = StepRecord { loss, terms, grad_norm, tokens, elapsed, ..step.record };
        Ok((record, stops))
    }

    fn diverged(&self, step: u64, draws: &[Draw], loss: f32, grad_norm: f32) -> Error {
        let rows: Vec<String> = draws
            .iter()
            .filter_map(|draw| self.task.dataset().location(draw.row))
            .map(|(path, line)| format!("{}:{line}", path.display()))
            .collect();
        Error::new(ErrorKind::Numeric, format!("training diverged at step {}", step + 1))
            .expected("a finite loss and gradient norm")
            .got(format!("loss {loss}, gradient norm {grad_norm}, on rows {}", rows.join(", ")))
            .hint("lower the learning rate, lengthen the warm-up, or raise the temperature")
    }
}

fn check_intervals(config: &TrainConfig) -> Result<()> {
    if config.logging_steps > 0 && config.saving.every != Some(0) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Argument, "logging and saving need a positive interval")
        .expected("1 step or more")
        .got(0))
}
