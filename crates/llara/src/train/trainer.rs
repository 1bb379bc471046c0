//! The loop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batches::{BatchSource, StepBatch};
use super::config::TrainConfig;
use super::optimizer::AdamW;
use super::schedule::Schedule;
use super::step::accumulate_gradients;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::{Dataset, Draw, Prefetched, prefetch};
use crate::{Error, ErrorKind, Result};

/// What one step did, or several where the log is not written at every step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRecord {
    /// Number of the last of these steps, from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
    /// How often the data was gone through.
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
    /// Tokens through forward, backward and update in a second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Told what happens during a run.
pub trait Observer {
    /// After every step.
    fn on_step(&mut self, record: &StepRecord) -> Result<()>;
    /// When a record for the log is due: the steps since the last one.
    fn on_log(&mut self, record: &StepRecord) -> Result<()>;
    /// After a model was saved on the way.
    fn on_save(&mut self, folder: &Path) -> Result<()>;
}

/// How a run ended.
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
}

/// Trains one model on one dataset.
pub struct Trainer<'r, B: Backend> {
    model: &'r mut BiEncoderModel<B>,
    config: &'r TrainConfig,
    /// Shared with the thread that makes batches.
    batches: Arc<BatchSource<'r>>,
    optimizer: AdamW<B>,
    schedule: Schedule,
    total_steps: u64,
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
        let sampler = config.sampler(dataset.len(), model.collective().size())?;
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
        let backend = model.backend().clone();
        let optimizer = AdamW::new(&backend, model.decoder_mut(), config.adamw)?;
        model.train();
        let prompts = model.shared_prompts();
        let batches = Arc::new(BatchSource { dataset, config, sampler, prompts });
        Ok(Trainer { model, config, batches, optimizer, schedule, total_steps })
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
    /// When a loss or a gradient norm is not finite (with the step and its rows; the weights stay as
    /// they were before it), when the data changed under the run, or when saving fails.
    pub fn run(&mut self, observer: &mut dyn Observer) -> Result<Summary> {
        let batches = Arc::clone(&self.batches);
        let made_ahead = (0..self.total_steps).map(|step| batches.batch(step));
        let summary = prefetch(made_ahead, |batches| self.make_steps(batches, observer))?;
        self.model.eval();
        Ok(summary)
    }

    fn make_steps(
        &mut self,
        batches: &mut Prefetched<Result<StepBatch>>,
        observer: &mut dyn Observer,
    ) -> Result<Summary> {
        let mut summary = Summary { steps: 0, loss: f32::NAN, tokens: 0, elapsed: Duration::ZERO };
        let mut unlogged = Vec::new();
        // Of a step: to have to wait for a batch is a part of it.
        let mut start = Instant::now();
        for batch in batches {
            let record = self.step(&batch?, start)?;
            summary = Summary {
                steps: record.step,
                loss: record.loss,
                tokens: summary.tokens + record.tokens,
                elapsed: summary.elapsed + record.elapsed,
            };
            observer.on_step(&record)?;
            unlogged.push(record);
            let last = record.step == self.total_steps;
            if record.step.is_multiple_of(self.config.logging_steps) || last {
                observer.on_log(&joined(&unlogged, record))?;
                unlogged.clear();
            }
            if self.config.saving.every.is_some_and(|every| record.step.is_multiple_of(every)) {
                observer.on_save(&self.save_on_the_way(record.step)?)?;
            }
            start = Instant::now();
        }
        Ok(summary)
    }

    /// Gradients and update. The step began at `start`, when it had to ask for its batch.
    fn step(&mut self, batch: &StepBatch, start: Instant) -> Result<StepRecord> {
        let StepBatch { step, draws, query, passage } = batch;
        let learning_rate = self.schedule.rate(*step);

        self.model.set_dropout(self.config.seed, *step);
        let loss = accumulate_gradients(self.model, query, passage, &self.config.chunking)?;
        let backend = self.model.backend().clone();
        let clip = self.optimizer.step(&backend, self.model.decoder_mut(), learning_rate)?;

        // The only reads from the device, after everything has been asked of it.
        let loss = backend.download(&loss)?[0];
        let grad_norm = backend.download(&clip)?[0];
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Err(self.diverged(*step, draws, loss, grad_norm));
        }
        Ok(StepRecord {
            step: step + 1,
            total_steps: self.total_steps,
            epoch: (step + 1) as f64 / self.batches.sampler.steps_per_epoch() as f64,
            loss,
            grad_norm,
            learning_rate,
            tokens: (query.tokens() + passage.tokens()) as u64,
            elapsed: start.elapsed(),
        })
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

    fn save_on_the_way(&self, step: u64) -> Result<PathBuf> {
        let folder = self.config.output_dir.join(format!("checkpoint-{step}"));
        match self.model.adapter() {
            Some(_) => self.model.write_adapter(&folder)?,
            None => self.model.write_folder(&folder, self.config.saving.dtype)?,
        }
        if let (Some(every), Some(keep)) = (self.config.saving.every, self.config.saving.keep)
            && let Some(oldest) = step.checked_sub(every * keep as u64).filter(|&step| step > 0)
        {
            let old = self.config.output_dir.join(format!("checkpoint-{oldest}"));
            // Renamed first: interrupted half-way, no incomplete checkpoint keeps its name.
            let hidden = self.config.output_dir.join(format!(".partial-checkpoint-{oldest}"));
            match std::fs::rename(&old, &hidden).and_then(|()| std::fs::remove_dir_all(&hidden)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::io("remove an old checkpoint", &old, e));
                }
                _ => {}
            }
        }
        Ok(folder)
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
