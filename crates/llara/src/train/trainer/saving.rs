//! Checkpoints of a run: written between two steps, finished in the background, reported when they are complete.

use std::path::PathBuf;

use super::Trainer;
use crate::Result;
use crate::backend::Backend;
use crate::biencoder::RunFacts;
use crate::train::checkpoint::{Finished, RunProgress, Saved, checkpoint_name, write};
use crate::train::observer::{Observer, Summary};
use crate::train::task::Task;

impl<B: Backend, T: Task<B>> Trainer<'_, B, T> {
    /// The folder that the checkpoint of the best evaluated step has, if it was saved.
    pub fn best_checkpoint(&self) -> Option<PathBuf> {
        let best = self.evaluation.best_step()?;
        let folder = match &self.resumed_from {
            // The best one of a resumed run is beside the checkpoint that the run continues from, or is that.
            Some(folder) if best == self.summary.steps => return Some(folder.clone()),
            Some(folder) if best < self.summary.steps => folder.parent()?,
            _ => &self.config.output_dir,
        };
        Some(folder.join(checkpoint_name(best)))
    }

    /// Sets what the model card says of the progress.
    pub(super) fn set_progress(&mut self, summary: &Summary) {
        let (steps, loss) = (Some(summary.steps), Some(summary.loss));
        let facts = RunFacts { steps, loss, ..self.identity.facts() };
        self.model.set_run_facts(facts);
    }

    /// Writes a checkpoint of the run after `step` steps, and starts finishing it in the background.
    pub(super) fn save(
        &mut self,
        step: u64,
        summary: &Summary,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let earlier = self.wait_for_checkpoint(observer);
        self.collective.agree(earlier)?;
        self.set_progress(summary);
        let progress = RunProgress {
            step,
            epoch: self.epoch(step),
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
            evaluation: self.evaluation.history(),
        };
        if let Some(unfinished) = write(&saved, self.collective.as_ref())? {
            self.unfinished.start(unfinished);
        }
        Ok(())
    }

    /// [`save`](Trainer::save) after an error that the run ends with, which a failure to save must not replace.
    pub(super) fn save_after_error(
        &mut self,
        step: u64,
        summary: &Summary,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let saved = self.save(step, summary, observer);
        saved.or_else(|error| observer.on_save_failed(error))
    }

    /// Waits for the checkpoint that is being finished, and reports it.
    ///
    /// # Errors
    /// It could not be finished, or an earlier one failed since the last agreement.
    pub(super) fn wait_for_checkpoint(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let last = self.finish_checkpoint(observer);
        self.take_save_status().and(last)
    }

    /// What is to be agreed about checkpoints that ended in the background.
    pub(super) fn take_save_status(&mut self) -> Result<()> {
        std::mem::replace(&mut self.save_status, Ok(()))
    }

    /// Waits for the checkpoint that is being finished, and reports it.
    ///
    /// # Errors
    /// It could not be finished.
    pub(super) fn finish_checkpoint(&mut self, observer: &mut dyn Observer) -> Result<()> {
        match self.unfinished.wait()? {
            Some(Finished { folder, removal }) => {
                observer.on_save(&folder)?;
                removal.or_else(|error| observer.on_save_failed(error))
            }
            None => Ok(()),
        }
    }
}
