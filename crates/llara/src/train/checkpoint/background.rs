//! Finishing a checkpoint on another thread while training goes on.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use super::write::{Finished, StagedCheckpoint};
use crate::{Error, ErrorKind, Result};

/// The checkpoint that is being finished, if there is one. Dropping it waits, so that a checkpoint is not lost when
/// training fails.
#[derive(Default)]
pub(in crate::train) struct BackgroundSave {
    thread: Option<JoinHandle<Option<Result<Finished>>>>,
    /// The result, if no thread could be started.
    finished: Option<Result<Finished>>,
}

impl BackgroundSave {
    /// Finishes a checkpoint in the background. An earlier one must have been waited for. If no thread can be
    /// started, it is finished before this returns.
    pub(in crate::train) fn start(&mut self, staged: StagedCheckpoint) {
        debug_assert!(self.thread.is_none(), "an earlier checkpoint is not finished");
        // If starting a thread fails, the closure is lost, but not what it shares.
        let staged = Arc::new(Mutex::new(Some(staged)));
        let finish = move |staged: &Mutex<Option<StagedCheckpoint>>| {
            let taken = staged.lock().unwrap_or_else(PoisonError::into_inner).take();
            taken.map(StagedCheckpoint::finish)
        };
        let shared = Arc::clone(&staged);
        let builder = thread::Builder::new().name("checkpoint".to_owned());
        match builder.spawn(move || finish(&shared)) {
            Ok(thread) => self.thread = Some(thread),
            Err(_) => self.finished = finish(&staged),
        }
    }

    /// Whether [`wait`](Self::wait) would return a result immediately.
    pub(in crate::train) fn is_finished(&self) -> bool {
        self.finished.is_some() || self.thread.as_ref().is_some_and(JoinHandle::is_finished)
    }

    /// Waits for the checkpoint; returns `None` if there is none to wait for.
    ///
    /// # Errors
    /// The checkpoint could not be finished.
    pub(in crate::train) fn wait(&mut self) -> Result<Option<Finished>> {
        let Some(thread) = self.thread.take() else { return self.finished.take().transpose() };
        let panicked = Error::new(ErrorKind::Io, "the thread that saves checkpoints panicked");
        thread.join().map_err(|_| panicked)?.transpose()
    }
}

impl Drop for BackgroundSave {
    fn drop(&mut self) {
        // An error of training is reported instead.
        let _ = self.wait();
    }
}
