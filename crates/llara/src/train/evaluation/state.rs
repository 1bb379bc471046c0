//! What a run evaluates, and the figures that it has so far.

use super::history::{EvalHistory, Evaluated};
use super::settings::Evaluation;
use crate::Result;

/// The evaluations of a run.
pub(in crate::train) struct EvalState<'r> {
    evaluation: Option<&'r Evaluation>,
    /// Those of a resumed run are kept even if it does not evaluate.
    history: Option<EvalHistory>,
    /// Steps of the run.
    total_steps: u64,
}

impl<'r> EvalState<'r> {
    /// A run that does not evaluate and continues with the figures of a checkpoint.
    pub(in crate::train) fn new(history: Option<EvalHistory>, total_steps: u64) -> Self {
        EvalState { evaluation: None, history, total_steps }
    }

    /// Evaluates from now on.
    ///
    /// # Errors
    /// When a setting is out of its range, or the metric or a set differs from that of the figures so far.
    pub(in crate::train) fn set(&mut self, evaluation: &'r Evaluation) -> Result<()> {
        evaluation.check()?;
        self.history.iter().try_for_each(|history| history.check(evaluation))?;
        self.evaluation = Some(evaluation);
        Ok(())
    }

    /// What is evaluated, if anything.
    pub(in crate::train) fn evaluation(&self) -> Option<&'r Evaluation> {
        self.evaluation
    }

    /// The figures so far; `None`: there are none.
    pub(in crate::train) fn history(&self) -> Option<&EvalHistory> {
        self.history.as_ref()
    }

    /// Whether the model is to be evaluated after a step and was not yet.
    pub(in crate::train) fn is_due(&self, step: u64) -> bool {
        let last = self.history.as_ref().and_then(|history| history.last.as_ref());
        self.evaluation.is_some_and(|evaluation| evaluation.is_due(step, self.total_steps))
            && last.is_none_or(|last| last.step != step)
    }

    /// Adds figures of `evaluation`. Returns whether the checkpoint of their step is to be kept for the end, and
    /// the figures so far.
    pub(in crate::train) fn add(
        &mut self,
        evaluation: &Evaluation,
        evaluated: Evaluated,
    ) -> (bool, &EvalHistory) {
        let history = self.history.get_or_insert_with(|| EvalHistory::new(evaluation));
        let is_best = history.add(evaluated, evaluation.early_stopping);
        (is_best && evaluation.save_best, history)
    }

    /// Whether early stopping ends the run.
    pub(in crate::train) fn is_exhausted(&self) -> bool {
        let early_stopping = self.evaluation.and_then(|evaluation| evaluation.early_stopping);
        self.history.as_ref().is_some_and(|history| history.is_exhausted(early_stopping))
    }

    /// The best evaluated step so far.
    pub(in crate::train) fn best_step(&self) -> Option<u64> {
        Some(self.history.as_ref()?.best.as_ref()?.step)
    }

    /// Whether the weights of another step than this one are loaded at the end.
    pub(in crate::train) fn loads_other_weights(&self, step: u64) -> bool {
        self.evaluation.is_some_and(|evaluation| evaluation.save_best)
            && self.best_step().is_some_and(|best| best != step)
    }
}
