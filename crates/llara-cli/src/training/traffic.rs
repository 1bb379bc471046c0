//! The bytes that the first of several processes sends in a step: counted, and by the formula.

use std::path::Path;

use llara::train::{EvalEvent, Observer, StepRecord};
use llara::{Error, Result};
use serde_json::{Map, Value};

use crate::processes::Processes;

/// What the first process has sent in the steps of a run, and while checkpoints were saved between them.
pub(super) struct Traffic {
    processes: usize,
    /// Bytes in all steps since the start.
    sent: u64,
    steps: u64,
    /// Bytes of a step with a full batch, by the formula.
    expected: u64,
}

impl Traffic {
    /// Adds the figures to the result of a run.
    pub(super) fn add_to(&self, result: &mut Map<String, Value>) {
        result.insert("processes".into(), self.processes.into());
        let per_step = self.sent / self.steps.max(1);
        result.insert("bytes_sent_per_step".into(), per_step.into());
        result.insert("expected_bytes_sent_per_step".into(), self.expected.into());
    }
}

/// Passes all events on, and counts the bytes that are sent until the end of each step.
pub(super) struct CountingObserver<'o> {
    inner: &'o mut dyn Observer,
    processes: &'o Processes,
    /// Bytes that were sent before the current step.
    before: u64,
    sent: u64,
    steps: u64,
}

impl<'o> CountingObserver<'o> {
    pub(super) fn new(inner: &'o mut dyn Observer, processes: &'o Processes) -> Self {
        CountingObserver { inner, processes, before: processes.bytes_sent(), sent: 0, steps: 0 }
    }

    /// The figures, if there are several processes. A step with a full batch sends `expected` bytes.
    pub(super) fn traffic(&self, expected: u64) -> Option<Traffic> {
        let CountingObserver { processes, sent, steps, .. } = *self;
        let processes = processes.size();
        (processes > 1).then_some(Traffic { processes, sent, steps, expected })
    }
}

impl Observer for CountingObserver<'_> {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        let now = self.processes.bytes_sent();
        self.sent += now - self.before;
        self.before = now;
        self.steps += 1;
        self.inner.on_step(record)
    }

    fn on_log(&mut self, record: &StepRecord) -> Result<()> {
        self.inner.on_log(record)
    }

    fn on_save(&mut self, folder: &Path) -> Result<()> {
        self.inner.on_save(folder)
    }

    fn on_save_failed(&mut self, error: Error) -> Result<()> {
        self.inner.on_save_failed(error)
    }

    fn on_evaluation_progress(&mut self, done: usize, total: usize) {
        self.inner.on_evaluation_progress(done, total);
    }

    fn on_evaluate(&mut self, event: &EvalEvent<'_>) -> Result<()> {
        // Those of the evaluation are not of a step.
        self.before = self.processes.bytes_sent();
        self.inner.on_evaluate(event)
    }

    fn stops(&mut self) -> bool {
        self.inner.stops()
    }
}
