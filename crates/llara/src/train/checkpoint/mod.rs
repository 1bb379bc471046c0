//! Checkpoints: folders from which an interrupted run goes on to the same bytes.
//!
//! `checkpoint-N` in the output folder, N being the steps made, is a model or adapter folder that loads in
//! transformers or PEFT, with three more kinds of files:
//!
//! - `optimizer.safetensors` (one for each rank): moments by parameter name, and the weights in f32 where
//!   the folder has them rounded;
//! - `trainer_state.json`: the step, and what the run is ([`identity`]);
//! - `manifest.json`: each file's length and hash, written last.
//!
//! No random state and no position in the data are needed besides the step; see
//! [`TrainState`](super::TrainState).

mod identity;
mod manifest;
mod tensors;
mod write;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::optimizer::AdamW;
use super::step::Chunking;
use crate::backend::{Backend, Dtype};
use crate::biencoder::BiEncoderModel;
use crate::data::Dataset;
use crate::model::weights::SaveDtype;
use crate::storage::read_limited;
use crate::{Error, ErrorKind, Result};

use identity::Identity;
use tensors::SavedTensors;
pub use write::remove_unfinished;
pub(super) use write::{Saved, write};

/// Name of the file with the run's state.
const STATE_FILE: &str = "trainer_state.json";
/// No such file is larger; it lists the data files.
const MAX_STATE_BYTES: u64 = 64 << 20;
/// Version of the format.
const FORMAT: u32 = 1;
/// What a checkpoint's name begins with; the number of steps follows.
const PREFIX: &str = "checkpoint-";

/// How far a run has come.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RunProgress {
    /// Steps made.
    pub step: u64,
    /// Epoch, with its fraction.
    pub epoch: f64,
    /// Loss of the last step.
    pub loss: f32,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Time that all steps took.
    pub elapsed: Duration,
}

/// `trainer_state.json`.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    format: u32,
    progress: RunProgress,
    /// Processes, each with its file of moments.
    ranks: usize,
    /// Whether the optimizer's files have the weights, because the folder has them rounded.
    weights_in_optimizer: bool,
    /// As the run was planned; a resumed run takes the same unless told otherwise.
    chunking: SavedChunking,
    dtype: Dtype,
    identity: Identity,
}

/// [`Chunking`] with `None` for no limit.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct SavedChunking {
    max_tokens: Option<usize>,
    max_sequences: Option<usize>,
    kept_tokens: Option<usize>,
}

impl From<Chunking> for SavedChunking {
    fn from(chunking: Chunking) -> Self {
        let limit = |limit: usize| (limit != usize::MAX).then_some(limit);
        SavedChunking {
            max_tokens: limit(chunking.max_tokens),
            max_sequences: limit(chunking.max_sequences),
            kept_tokens: limit(chunking.kept_tokens),
        }
    }
}

impl From<SavedChunking> for Chunking {
    fn from(saved: SavedChunking) -> Self {
        let limit = |limit: Option<usize>| limit.unwrap_or(usize::MAX);
        Chunking {
            max_tokens: limit(saved.max_tokens),
            max_sequences: limit(saved.max_sequences),
            kept_tokens: limit(saved.kept_tokens),
        }
    }
}

/// A checkpoint whose files have been verified.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    state: State,
}

/// What [`Checkpoint::latest`] found.
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
    /// When it is incomplete or a file is damaged, with the file's name.
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

    /// How far the run had come.
    pub fn progress(&self) -> &RunProgress {
        &self.state.progress
    }

    /// How the run's batches were split into chunks. Another division gives other roundings.
    pub fn chunking(&self) -> Chunking {
        self.state.chunking.into()
    }

    /// What the run's activations were computed in.
    pub fn dtype(&self) -> Dtype {
        self.state.dtype
    }

    /// What was used to compute; compare [`Backend::kernels`].
    pub fn kernels(&self) -> &str {
        self.state.identity.rounding.get("kernels").and_then(|text| text.as_str()).unwrap_or("")
    }

    /// Checks that training data is that of the run.
    ///
    /// # Errors
    /// The first file that is not.
    pub fn check_data(&self, dataset: &Dataset) -> Result<()> {
        self.state.identity.check_data(&dataset.files())
    }

    /// Checks that a run with these settings continues the checkpoint's; returns notes about differences that
    /// are allowed.
    ///
    /// # Errors
    /// The settings that differ, or the first data file that does.
    pub(super) fn check<B: Backend>(
        &self,
        model: &BiEncoderModel<B>,
        dataset: &Dataset,
        config: &TrainConfig,
        (total_steps, processes): (u64, usize),
    ) -> Result<Vec<String>> {
        let now = Identity::of(model, dataset, config, (total_steps, processes))?;
        self.state.identity.check(&now, &self.dir)
    }

    /// Sets the model's trainable weights to those of the checkpoint.
    ///
    /// # Errors
    /// When they do not fit the model.
    pub(super) fn restore_weights<B: Backend>(&self, model: &mut BiEncoderModel<B>) -> Result<()> {
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
    /// When they do not fit the model.
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

/// Bytes that a checkpoint has besides the model or adapter folder, within some kilobytes.
pub fn state_bytes<B: Backend>(model: &BiEncoderModel<B>, dtype: SaveDtype) -> u64 {
    tensors::bytes(model.decoder(), !model.saves_exactly(dtype))
}

/// The checkpoints in an output folder by their steps, ascending: folders named `checkpoint-N`. They may be
/// damaged.
///
/// # Errors
/// When the folder exists and cannot be read.
pub(super) fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let io = |e| Error::io("look for checkpoints in", output_dir, e);
    let entries = match fs::read_dir(output_dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        // A link is somebody's own; it is neither read nor removed.
        if let Some(step) = name.to_str().and_then(step_of)
            && entry.file_type().map_err(io)?.is_dir()
        {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The steps of a checkpoint's name, written as this program writes it.
fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?;
    let step: u64 = digits.parse().ok()?;
    (step.to_string() == digits).then_some(step)
}
