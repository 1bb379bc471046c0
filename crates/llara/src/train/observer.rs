//! The events of a run, who receives them, and what is counted for them.

use std::path::Path;
use std::time::Duration;

use super::evaluation::{EvalHistory, Evaluated, SetReport};
use super::loss_terms::LossTerms;
use crate::{Error, Result};

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
    /// The terms of the loss, if the task has several.
    pub terms: LossTerms,
    /// Global gradient norm of the last step, before clipping.
    pub grad_norm: f32,
    /// Learning rate of the last step.
    pub learning_rate: f64,
    /// Tokens of these steps.
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
    /// After a checkpoint was saved, on rank 0. It is finished in the background: some steps may have been made
    /// since.
    fn on_save(&mut self, folder: &Path) -> Result<()>;
    /// When an old checkpoint could not be removed, or when all steps were made and the last checkpoint could not
    /// be saved. The run could go on, and the model in memory is complete; the default is to end with the error.
    fn on_save_failed(&mut self, error: Error) -> Result<()> {
        Err(error)
    }
    /// While the model is evaluated: texts encoded so far, of all texts of all sets.
    fn on_evaluation_progress(&mut self, _done: usize, _total: usize) {}
    /// After the model was evaluated.
    fn on_evaluate(&mut self, _event: &EvalEvent<'_>) -> Result<()> {
        Ok(())
    }
    /// Asked after every step and every batch of an evaluation: whether the run should save a checkpoint and
    /// stop. An evaluation that is interrupted by this is made when the run is resumed.
    fn stops(&mut self) -> bool {
        false
    }
}

/// What an observer receives of an evaluation.
#[derive(Debug, Clone, Copy)]
pub struct EvalEvent<'e> {
    /// The figures.
    pub evaluated: &'e Evaluated,
    /// The best and the worst queries of each set.
    pub reports: &'e [SetReport],
    /// The figures of the run so far, these included.
    pub history: &'e EvalHistory,
    /// Steps of the whole run.
    pub total_steps: u64,
}

/// How a run ended. A resumed run counts what was done before.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Steps made.
    pub steps: u64,
    /// Loss of the last step, before its update.
    pub loss: f32,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Wall time of the steps.
    pub elapsed: Duration,
    /// Whether an observer stopped the run before its last step; a checkpoint was saved then.
    pub stopped: bool,
}

/// What a run has done so far, and the steps that its log does not have yet.
pub(super) struct Progress {
    logging_steps: u64,
    total_steps: u64,
    pub(super) summary: Summary,
    unlogged: Vec<StepRecord>,
}

impl Progress {
    pub(super) fn new(logging_steps: u64, total_steps: u64, summary: Summary) -> Self {
        Progress { logging_steps, total_steps, summary, unlogged: Vec::new() }
    }

    pub(super) fn report(&mut self, record: StepRecord, observer: &mut dyn Observer) -> Result<()> {
        self.summary = Summary {
            steps: record.step,
            loss: record.loss,
            tokens: self.summary.tokens.saturating_add(record.tokens),
            elapsed: self.summary.elapsed.saturating_add(record.elapsed),
            ..self.summary
        };
        observer.on_step(&record)?;
        self.unlogged.push(record);
        match record.step.is_multiple_of(self.logging_steps) || record.step == self.total_steps {
            true => self.log(observer),
            false => Ok(()),
        }
    }

    /// Reports the steps that the log does not have yet.
    pub(super) fn log(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let Some(last) = self.unlogged.last() else { return Ok(()) };
        observer.on_log(&joined(&self.unlogged, *last))?;
        self.unlogged.clear();
        Ok(())
    }
}

/// One record for several steps: mean loss, sums of tokens and time, the rest of the last.
fn joined(records: &[StepRecord], last: StepRecord) -> StepRecord {
    let mean = records.iter().map(|r| f64::from(r.loss)).sum::<f64>() / records.len() as f64;
    StepRecord {
        loss: mean as f32,
        terms: LossTerms::mean(records.iter().map(|r| &r.terms)),
        tokens: records.iter().map(|r| r.tokens).sum(),
        elapsed: records.iter().map(|r| r.elapsed).sum(),
        ..last
    }
}
