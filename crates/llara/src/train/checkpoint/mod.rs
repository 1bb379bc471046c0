//! Checkpoints: folders from which an interrupted run is resumed with bit-identical results.
//!
//! `checkpoint-N` in the output folder, where N is the number of steps, is a model or adapter folder that loads in
//! transformers or PEFT, with three more kinds of files:
//!
//! - `optimizer.safetensors` (one for each rank): moments by tensor name, and the weights in f32 if
//!   those of the folder are rounded;
//! - `trainer_state.json`: the step, the identity of the run ([`identity`]), and the results of its
//!   evaluations;
//! - `manifest.json`: each file's length and hash, written last.
//!
//! No generator state and no position in the data are needed in addition to the step; see
//! [`TrainState`](super::TrainState).

mod background;
mod format;
mod identity;
mod manifest;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use manifest::write as write_checkpoint_manifest;
mod tensors;
mod write;

use std::path::{Path, PathBuf};

use super::evaluation::EvalHistory;
use super::optimizer::AdamW;
use super::step::Chunking;
use crate::backend::{Backend, Dtype};
use crate::biencoder::BiEncoderModel;
use crate::data::Dataset;
use crate::model::weights::SaveDtype;
use crate::storage::read_limited;
use crate::{Error, ErrorKind, Result};

pub(super) use background::BackgroundSave;
pub use format::RunProgress;
pub(super) use format::checkpoint_name;
use format::{FORMAT, MAX_STATE_BYTES, STATE_FILE, State, list};
pub(super) use identity::{Identity, decimal, finetuning_settings};
use tensors::SavedTensors;
pub use write::remove_unfinished;
pub(super) use write::{Finished, Saved, remove_surplus, write};

/// A checkpoint whose files have been verified.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    state: State,
}

/// The result of [`Checkpoint::latest`].
#[derive(Debug)]
pub struct Latest {
    /// The newest checkpoint that is complete and undamaged.
    pub checkpoint: Option<Checkpoint>,
    /// Why newer ones were skipped, the newest first.
    pub skipped: Vec<Error>,
}

impl Checkpoint {
    /// Opens a checkpoint and compares every file with the manifest.
    ///
    /// # Errors
    /// If it is incomplete or a file is damaged; the error has the name of the file.
    pub fn open(dir: &Path) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::new(ErrorKind::Io, "there is no such checkpoint folder")
                .file(dir)
                .expected("a folder checkpoint-N of an earlier run"));
        }
        manifest::verify(dir)?;
        let path = dir.join(STATE_FILE);
        let text = read_limited(&path, "read the state of the run", MAX_STATE_BYTES)?;
        let state: State = serde_json::from_slice(&text).map_err(|e| {
            Error::new(ErrorKind::Io, "the state of the run cannot be read")
                .file(&path)
                .because(e)
                .hint("the checkpoint may be of another version of this program")
        })?;
        if state.format != FORMAT || state.ranks == 0 || state.ranks > 1 << 16 {
            return Err(Error::new(ErrorKind::Io, "the state of the run has another format")
                .file(&path)
                .expected(format!("format {FORMAT}"))
                .got(format!("format {}, {} ranks", state.format, state.ranks)));
        }
        Ok(Checkpoint { dir: dir.to_owned(), state })
    }

    /// Compares every file with the manifest, as [`open`](Self::open) does, and returns all faults.
    pub fn faults(dir: &Path) -> Vec<Error> {
        manifest::faults(dir)
    }

    /// The newest checkpoint in an output folder that is complete and undamaged, and why newer ones are not.
    /// A folder that does not exist has none.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn latest(output_dir: &Path) -> Result<Latest> {
        let mut skipped = Vec::new();
        for (_, dir) in list(output_dir)?.into_iter().rev() {
            match Self::open(&dir) {
                Ok(checkpoint) => return Ok(Latest { checkpoint: Some(checkpoint), skipped }),
                Err(error) => skipped.push(error),
            }
        }
        Ok(Latest { checkpoint: None, skipped })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The progress of the run.
    pub fn progress(&self) -> &RunProgress {
        &self.state.progress
    }

    /// How the run's batches were split into chunks. Another division changes results by rounding errors.
    pub fn chunking(&self) -> Chunking {
        self.state.chunking.into()
    }

    /// The dtype of the run's activations.
    pub fn dtype(&self) -> Dtype {
        self.state.dtype
    }

    /// The kernels of the run; compare with [`Backend::kernels`].
    pub fn kernels(&self) -> &str {
        self.state.identity.rounding.get("kernels").and_then(|text| text.as_str()).unwrap_or("")
    }

    /// Checks that the training data is that of the run.
    ///
    /// # Errors
    /// The first file that is not.
    pub fn check_data(&self, dataset: &Dataset) -> Result<()> {
        self.state.identity.check_data(&dataset.files())
    }

    /// Checks that a run has the identity of the checkpoint's run; returns notes about allowed differences.
    ///
    /// # Errors
    /// The settings that differ, or the first data file that does.
    pub(super) fn check(&self, run: &Identity) -> Result<Vec<String>> {
        self.state.identity.check(run, &self.dir)
    }

    /// Figures of evaluations so far.
    pub(super) fn evaluation(&self) -> Option<&EvalHistory> {
        self.state.evaluation.as_ref()
    }

    /// Sets the model's trainable weights to those of the checkpoint. Needs the memory of a second model.
    ///
    /// # Errors
    /// If they do not have the shapes of the model.
    pub fn restore_weights<B: Backend>(&self, model: &mut BiEncoderModel<B>) -> Result<()> {
        if !self.state.weights_in_optimizer {
            return model.read_trained_weights(&self.dir);
        }
        let backend = model.backend().clone();
        let tensors = SavedTensors::open(&self.dir, self.state.ranks)?;
        tensors.restore_weights(&backend, model.decoder_mut())
    }

    /// Sets the optimizer's moments and number of updates to those of the checkpoint.
    ///
    /// # Errors
    /// If they do not have the shapes of the model.
    pub(super) fn restore_moments<B: Backend>(
        &self,
        model: &BiEncoderModel<B>,
        optimizer: &mut AdamW<B>,
    ) -> Result<()> {
        let tensors = SavedTensors::open(&self.dir, self.state.ranks)?;
        tensors.restore_moments(model.backend(), model.decoder(), optimizer)?;
        optimizer.set_steps(self.state.progress.step);
        Ok(())
    }
}

/// Bytes of a checkpoint without those of the model or adapter folder, within some kilobytes.
pub fn state_bytes<B: Backend>(model: &BiEncoderModel<B>, dtype: SaveDtype) -> u64 {
    tensors::bytes(model.decoder(), !model.saves_exactly(dtype))
}
