//! The files and names of a checkpoint: the contents of `trainer_state.json`, the names of folders.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::identity::Identity;
use crate::backend::Dtype;
use crate::train::evaluation::EvalHistory;
use crate::train::step::Chunking;
use crate::{Error, Result};

/// Name of the file with the run's state.
pub(super) const STATE_FILE: &str = "trainer_state.json";
/// Maximum size of the file, which lists the data files, in bytes.
pub(super) const MAX_STATE_BYTES: u64 = 64 << 20;
/// Version of the format.
pub(super) const FORMAT: u32 = 1;
/// Files of which a checkpoint has at least one, even if it is damaged or of an earlier version. A folder without
/// any of them is not a checkpoint and may belong to the user.
pub(super) const MARKS: [&str; 4] =
    ["manifest.json", STATE_FILE, "config.json", "adapter_config.json"];
/// Prefix of the name of a checkpoint; the number of steps follows.
pub(super) const PREFIX: &str = "checkpoint-";

/// The progress of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RunProgress {
    /// Number of steps so far.
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
pub(super) struct State {
    pub(super) format: u32,
    pub(super) progress: RunProgress,
    /// Number of processes; each has a file of moments.
    pub(super) ranks: usize,
    /// Whether the optimizer's files also contain the weights, because those of the folder are rounded.
    pub(super) weights_in_optimizer: bool,
    /// The chunking of the run; a resumed run uses the same unless another is given.
    pub(super) chunking: SavedChunking,
    pub(super) dtype: Dtype,
    pub(super) identity: Identity,
    /// Figures of evaluations so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) evaluation: Option<EvalHistory>,
}

/// [`Chunking`] with `None` for no limit.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct SavedChunking {
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

/// The checkpoints in an output folder by their steps, ascending: folders named `checkpoint-N` that contain a
/// checkpoint's files. They may be damaged.
///
/// # Errors
/// When the folder exists and cannot be read.
pub(super) fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let io = |e| Error::io("search for checkpoints in", output_dir, e);
    let entries = match fs::read_dir(output_dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        if let Some(step) = name.to_str().and_then(step_of)
            && is_checkpoint(&entry.path())
        {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a folder has a file of a checkpoint. A symbolic link is not a checkpoint; it is neither read nor removed.
pub(super) fn is_checkpoint(folder: &Path) -> bool {
    let is_folder = fs::symlink_metadata(folder).is_ok_and(|metadata| metadata.is_dir());
    is_folder && MARKS.iter().any(|file| folder.join(file).is_file())
}

/// The name of the checkpoint after `step` steps.
pub(in crate::train) fn checkpoint_name(step: u64) -> String {
    format!("{PREFIX}{step}")
}

/// The number of steps in the name of a checkpoint, if it is in the exact form that this program writes.
pub(super) fn step_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix(PREFIX)?;
    let step: u64 = digits.parse().ok()?;
    (step.to_string() == digits).then_some(step)
}
