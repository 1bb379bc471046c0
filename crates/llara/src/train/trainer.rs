//! The loop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batches::BatchSource;
use super::checkpoint::{Checkpoint, Identity, RunProgress, Saved, write};
use super::config::TrainConfig;
use super::schedule::Schedule;
use super::state::TrainState;
use super::step_input::StepInput;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::{Dataset, Draw, Prefetched, prefetch};
use crate::dist::{Collective, Solo};
use crate::loss::{Contrastive, Objective, ObjectiveContext};
use crate::model::LoraConfig;
use crate::{Error, ErrorKind, Result};

/// The results of one step, or of several where not every step is logged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Number of the last of these steps, from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// Epoch, with its fraction.
    pub epoch: f64,
    /// Mean loss of these steps, before their updates.
    pub loss: f32,
    /// Global gradient norm of the last step, before clipping.
    pub grad_norm: f32,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Tokens of these steps, queries and passages.
    pub tokens: u64,
    /// Time that these steps took.
    pub elapsed: Duration,
}

impl StepRecord {
    /// Tokens per second through forward, backward and update.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Receives the events of a run.
pub trait Observer {
    /// After every step.
    fn on_step(&mut self, record: &StepRecord) -> Result<()>;
    /// When a record for the log is due: the steps since the last one.
    fn on_log(&mut self, record: &StepRecord) -> Result<()>;
    /// After a checkpoint was saved.
    fn on_save(&mut self, folder: &Path) -> Result<()>;
    /// Asked after every step: whether the run should save a checkpoint and stop.
    fn stops(&mut self) -> bool {
        false
    }
}

/// How a run ended. A resumed run counts what was done before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Steps made.
    pub steps: u64,
    /// Loss of the last step, before its update.
    pub loss: f32,
    /// Tokens, queries and passages.
    pub tokens: u64,
    /// Wall time of the steps.
    pub elapsed: Duration,
    /// Whether an observer stopped the run before its last step; a checkpoint was saved then.
    pub stopped: bool,
}

/// Trains one model on one dataset.
pub struct Trainer<'r, B: Backend> {
    model: &'r mut BiEncoderModel<B>,
    config: &'r TrainConfig,
    /// Shared with the thread that makes batches.
    batches: Arc<BatchSource<'r>>,
    objective: Box<dyn Objective<B>>,
    collective: Arc<dyn Collective<B>>,
    state: TrainState<B>,
    schedule: Schedule,
    total_steps: u64,
    /// What the run is, for its checkpoints.
    identity: Identity,
    /// Of the steps before a resumed run.
    summary: Summary,
}

/// A step that was asked of the device and whose results were not read yet.
struct PendingStep<B: Backend> {
    /// Everything but loss and gradient norm.
    record: StepRecord,
    rows: Vec<Draw>,
    /// This process's share of the global batch.
    share: f64,
    /// `[1, 1]`, on its way to the host.
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
        let sampler = config.sampler(dataset, collective.size())?;
        let total_steps = config.length.steps(sampler.steps_per_epoch())?;
        let schedule =
            Schedule::new(config.learning_rate, config.decay, config.warmup, total_steps)?;
        if config.logging_steps == 0 || config.saving.every == Some(0) {
            return Err(Error::new(
                ErrorKind::Argument,
                "logging and saving need a positive interval",
            )
            .expected("1 step or more")
            .got(0));
        }
        model.set_max_lens(config.query_max_len, config.passage_max_len)?;
        model.set_instructions(&config.query_instruction, &config.passage_instruction);
        dataset.check_group(config.group_size)?;
        config.objective.check(&ObjectiveContext {
            dimension: model.dimension(),
            group_size: config.group_size,
            negatives_cross_device: model.options().negatives_cross_device,
        })?;
        let rank = (collective.rank(), collective.size());
        let identity = Identity::of(model, dataset, config, (total_steps, collective.size()))?;
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
        let prompts = model.shared_prompts();
        let info_nce = model.objective(Arc::clone(&collective))?;
        let objective = Box::new(Contrastive { options: config.objective.clone(), ..info_nce });
        let batches = Arc::new(BatchSource {
            dataset,
            config,
            sampler,
            prompts,
            deduplicate: model.options().shortcuts.dedup_sequences,
            has_dropout: model.adapter().is_some_and(LoraConfig::has_dropout),
            rank,
        });
        let trainer = Trainer {
            model,
            config,
            batches,
            objective,
            collective,
            state,
            schedule,
            total_steps,
            identity,
            summary,
        };
        Ok((trainer, notes))
    }

    /// The state between two steps.
    pub fn state(&mut self) -> &mut TrainState<B> {
        &mut self.state
    }

    /// Steps that the run will make.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Makes all steps. The model in memory is then the trained one; saving it is the caller's.
    ///
    /// While a step computes, the next one's rows are read and tokenized on another thread.
    ///
    /// # Errors
    /// When a loss or a gradient norm is not finite (with the step and its rows; that step changes no
    /// weight, and nothing is saved after it), when the data changed under the run, or when saving fails.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let batches = Arc::clone(&self.batches);
        let inputs = (self.state.step()..self.total_steps).map(|step| batches.input(step));
        let summary = prefetch(inputs, |inputs| self.make_steps(inputs, observer))?;
        self.model.eval();
        Ok(summary)
    }

    fn make_steps(
        &mut self,
        inputs: &mut Prefetched<Result<StepInput>>,
        observer: &mut dyn Observer,
    ) -> Result<Summary> {
        let mut progress = Progress::new(self.config.logging_steps, self.total_steps, self.summary);
        let mut pending: Option<PendingStep<B>> = None;
        // A step's time includes waiting for its input.
        let mut start = Instant::now();
        for (step, input) in (self.state.step()..self.total_steps).zip(inputs) {
            let next = self.start_step(step, self.agreed(input)?)?;
            // An asynchronous device gets its next step before the results of this one are read, so
            // that it never waits for the host.
            if let Some(previous) = pending.replace(next) {
                self.finish_step(previous, &mut start, &mut progress, observer)?;
            }
            let saves =
                self.config.saving.every.is_some_and(|every| (step + 1).is_multiple_of(every));
            // Nothing is saved of a run that has diverged.
            let waits = saves || progress.summary.stopped;
            if (waits || !self.model.backend().is_asynchronous())
                && let Some(last) = pending.take()
            {
                self.finish_step(last, &mut start, &mut progress, observer)?;
            }
            // The last step's model is saved anyway. Found out while this step was being computed, a wish to
            // stop is met after the next one.
            let stops =
                progress.summary.stopped && pending.is_none() && step + 1 < self.total_steps;
            if saves || stops {
                observer.on_save(&self.save(step + 1, &progress.summary)?)?;
                start = Instant::now();
            }
            if stops {
                return Ok(progress.summary);
            }
        }
        if let Some(last) = pending {
            self.finish_step(last, &mut start, &mut progress, observer)?;
        }
        progress.summary.stopped = false;
        Ok(progress.summary)
    }

    /// The input of a step, if all processes have theirs.
    fn agreed(&self, input: Result<StepInput>) -> Result<StepInput> {
        match input {
            Ok(input) => self.collective.agree(Ok(())).map(|()| input),
            Err(error) => {
                let kind = error.kind();
                self.collective.agree(Err(error))?;
                Err(Error::new(kind, "the input of a step failed"))
            }
        }
    }

    /// Asks the device for gradients and update of a step, counted from 0.
    fn start_step(&mut self, step: u64, input: StepInput) -> Result<PendingStep<B>> {
        let learning_rate = self.schedule.rate(step);
        let result = self.state.advance(
            self.model,
            self.objective.as_ref(),
            &input,
            (&self.config.chunking, learning_rate),
            self.collective.as_ref(),
        )?;
        let record = StepRecord {
            step: step + 1,
            total_steps: self.total_steps,
            epoch: (step + 1) as f64 / self.batches.sampler.steps_per_epoch() as f64,
            loss: f32::NAN,
            grad_norm: f32::NAN,
            learning_rate,
            tokens: input.tokens as u64,
            elapsed: Duration::ZERO,
        };
        let share = input.rows_per_rank.share(self.collective.rank());
        // Asked for now, so that reading them later does not wait for the next step.
        let backend = self.model.backend();
        let loss = backend.start_download(&result.loss)?;
        let clip = backend.start_download(&result.clip)?;
        Ok(PendingStep { record, rows: input.rows, share, loss, clip })
    }

    /// Reads what a step has computed, reports it, and notes whether any process wants to stop.
    fn finish_step(
        &self,
        step: PendingStep<B>,
        start: &mut Instant,
        progress: &mut Progress,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let (record, stops) = self.read(step, start, observer.stops())?;
        progress.summary.stopped |= stops;
        progress.report(record, observer)
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
        let loss = backend.finish_download(step.loss)?[0];
        let grad_norm = backend.finish_download(step.clip)?[0];
        let wish = f64::from(u8::from(stops));
        let mut totals = [f64::from(loss) * step.share, step.record.tokens as f64, wish];
        self.collective.all_reduce_scalars(&mut totals)?;
        let (loss, tokens) = (totals[0] as f32, totals[1] as u64);
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Err(self.diverged(step.record.step - 1, &step.rows, loss, grad_norm));
        }
        let elapsed = std::mem::replace(start, Instant::now()).elapsed();
        let record = StepRecord { loss, grad_norm, tokens, elapsed, ..step.record };
        Ok((record, totals[2] > 0.0))
    }

    fn diverged(&self, step: u64, draws: &[Draw], loss: f32, grad_norm: f32) -> Error {
        let rows: Vec<String> = draws
            .iter()
            .filter_map(|draw| self.batches.dataset.location(draw.row))
            .map(|(path, line)| format!("{}:{line}", path.display()))
            .collect();
        Error::new(ErrorKind::Numeric, format!("training diverged at step {}", step + 1))
            .expected("a finite loss and gradient norm")
            .got(format!("loss {loss}, gradient norm {grad_norm}, on rows {}", rows.join(", ")))
            .hint("lower the learning rate, lengthen the warm-up, or raise the temperature")
    }

    /// Saves a checkpoint of the run as it is after so many steps.
    fn save(&self, step: u64, summary: &Summary) -> Result<PathBuf> {
        let progress = RunProgress {
            step,
            epoch: step as f64 / self.batches.sampler.steps_per_epoch() as f64,
            loss: summary.loss,
            tokens: summary.tokens,
            elapsed: summary.elapsed,
        };
        let saved = Saved {
            model: self.model,
            state: &self.state,
            config: self.config,
            identity: &self.identity,
            progress,
        };
        write(&saved, self.collective.as_ref())
    }
}

/// What a run has done so far, and the steps that its log does not have yet.
struct Progress {
    logging_steps: u64,
    total_steps: u64,
    summary: Summary,
    unlogged: Vec<StepRecord>,
}

impl Progress {
    fn new(logging_steps: u64, total_steps: u64, summary: Summary) -> Self {
        Progress { logging_steps, total_steps, summary, unlogged: Vec::new() }
    }

    fn report(&mut self, record: StepRecord, observer: &mut dyn Observer) -> Result<()> {
        self.summary = Summary {
            steps: record.step,
            loss: record.loss,
            tokens: self.summary.tokens + record.tokens,
            elapsed: self.summary.elapsed + record.elapsed,
            ..self.summary
        };
        observer.on_step(&record)?;
        self.unlogged.push(record);
        if record.step.is_multiple_of(self.logging_steps) || record.step == self.total_steps {
            observer.on_log(&joined(&self.unlogged, record))?;
            self.unlogged.clear();
        }
        Ok(())
    }
}

/// One record for several steps: mean loss, sums of tokens and time, the rest of the last.
fn joined(records: &[StepRecord], last: StepRecord) -> StepRecord {
    let mean = records.iter().map(|r| f64::from(r.loss)).sum::<f64>() / records.len() as f64;
    StepRecord {
        loss: mean as f32,
        tokens: records.iter().map(|r| r.tokens).sum(),
        elapsed: records.iter().map(|r| r.elapsed).sum(),
        ..last
    }
}
