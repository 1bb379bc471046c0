//! Writing a checkpoint: complete in a hidden folder, then renamed into place; older ones are removed after
//! that.

use std::fs::{self, File};
use std::io::ErrorKind as Io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::identity::Identity;
use super::{FORMAT, PREFIX, RunProgress, STATE_FILE, State, list, manifest, step_of, tensors};
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::Dataset;
use crate::dist::Collective;
use crate::train::config::{Saving, TrainConfig};
use crate::train::state::TrainState;
use crate::{Error, Result};

/// Begins the name of the folder that a checkpoint is written in.
const WRITING: &str = ".writing-";
/// Begins the name of a checkpoint that is being removed.
const REMOVED: &str = ".removed-";

/// What is saved.
pub(in crate::train) struct Saved<'s, B: Backend> {
    pub(in crate::train) model: &'s BiEncoderModel<B>,
    pub(in crate::train) state: &'s TrainState<B>,
    pub(in crate::train) dataset: &'s Dataset,
    pub(in crate::train) config: &'s TrainConfig,
    pub(in crate::train) total_steps: u64,
    pub(in crate::train) progress: RunProgress,
}

/// Writes `checkpoint-N` and then removes the oldest checkpoints beyond the number that is kept. Every rank
/// writes its own moments, rank 0 everything else. Returns the folder.
///
/// # Errors
/// When a file cannot be written. Earlier checkpoints are as they were then.
pub(in crate::train) fn write<B: Backend>(
    saved: &Saved<'_, B>,
    collective: &dyn Collective<B>,
) -> Result<PathBuf> {
    let output_dir = &saved.config.output_dir;
    let name = format!("{PREFIX}{}", saved.progress.step);
    let hidden = output_dir.join(format!("{WRITING}{name}"));
    let folder = output_dir.join(&name);
    let first = collective.rank() == 0;
    let written = write_hidden(saved, collective, &hidden);
    if written.is_err() && first {
        // What went wrong is the error to report.
        let _ = fs::remove_dir_all(&hidden);
    }
    written?;
    collective.agree(if first {
        put_in_place(&hidden, &folder).and_then(|()| remove_old(output_dir, &saved.config.saving))
    } else {
        Ok(())
    })?;
    Ok(folder)
}

/// All files, with the manifest, flushed to the disk.
fn write_hidden<B: Backend>(
    saved: &Saved<'_, B>,
    collective: &dyn Collective<B>,
    hidden: &Path,
) -> Result<()> {
    let Saved { model, state, config, .. } = saved;
    let first = collective.rank() == 0;
    let new_folder = || {
        remove_unfinished(&config.output_dir)?;
        fs::create_dir_all(hidden).map_err(|e| Error::io("create the folder", hidden, e))
    };
    collective.agree(if first { new_folder() } else { Ok(()) })?;
    let exact = model.saves_exactly(config.saving.dtype);
    let model_files = || match (first, model.adapter()) {
        (false, _) => Ok(()),
        (true, Some(_)) => model.write_adapter(hidden),
        (true, None) => model.write_folder(hidden, config.saving.dtype),
    };
    let file = tensors::file_name(collective.rank(), collective.size());
    let parts = (model.backend(), model.decoder());
    collective.agree(
        model_files()
            .and_then(|()| tensors::write(hidden, &file, parts, state.optimizer(), !exact)),
    )?;
    let rest = || {
        write_state(saved, collective.size(), hidden)?;
        manifest::write(hidden)
    };
    collective.agree(if first { rest() } else { Ok(()) })
}

/// Removes what a killed process left of checkpoints that it was writing or removing in an output folder;
/// returns the names. No other process may be writing there.
///
/// # Errors
/// When the folder cannot be read or something cannot be removed.
pub fn remove_unfinished(output_dir: &Path) -> Result<Vec<String>> {
    let io = |e| Error::io("remove an unfinished checkpoint in", output_dir, e);
    let entries = match fs::read_dir(output_dir) {
        Err(e) if e.kind() == Io::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io)?,
    };
    let mut removed = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let rest = name.strip_prefix(WRITING).or_else(|| name.strip_prefix(REMOVED));
        if rest.is_some_and(|rest| step_of(rest).is_some())
            && entry.file_type().map_err(io)?.is_dir()
        {
            fs::remove_dir_all(entry.path()).map_err(io)?;
            removed.push(name);
        }
    }
    Ok(removed)
}

fn write_state<B: Backend>(saved: &Saved<'_, B>, ranks: usize, hidden: &Path) -> Result<()> {
    let Saved { model, dataset, config, total_steps, progress, .. } = saved;
    let state = State {
        format: FORMAT,
        progress: *progress,
        ranks,
        weights_in_optimizer: !model.saves_exactly(config.saving.dtype),
        chunking: config.chunking.into(),
        dtype: model.precision(),
        identity: Identity::of(model, dataset, config, (*total_steps, ranks))?,
    };
    let path = hidden.join(STATE_FILE);
    let io = |e| Error::io("write the state of the run", &path, e);
    let json = serde_json::to_vec_pretty(&state).map_err(|e| io(e.into()))?;
    fs::write(&path, json).map_err(io)
}

/// Gives a complete hidden folder its name. A checkpoint of the same step (a damaged one, or the same one of
/// an earlier attempt) is exchanged with it in one operation and then removed.
fn put_in_place(hidden: &Path, folder: &Path) -> Result<()> {
    let io = |e| Error::io("move the checkpoint into place", folder, e);
    if fs::symlink_metadata(folder).is_err() {
        fs::rename(hidden, folder).map_err(io)?;
        return sync_parent(folder);
    }
    if renameat_with(CWD, hidden, CWD, folder, RenameFlags::EXCHANGE).is_ok() {
        sync_parent(folder)?;
        return fs::remove_dir_all(hidden).map_err(io);
    }
    // A file system that cannot exchange. Interrupted in between, an older checkpoint is the newest.
    let old = hidden_name(folder);
    fs::rename(folder, &old).and_then(|()| fs::rename(hidden, folder)).map_err(io)?;
    sync_parent(folder)?;
    fs::remove_dir_all(&old).map_err(io)
}

/// Removes the oldest checkpoints beyond the number that is kept.
fn remove_old(output_dir: &Path, saving: &Saving) -> Result<()> {
    let Some(keep) = saving.keep else { return Ok(()) };
    let checkpoints = list(output_dir)?;
    let surplus = checkpoints.len().saturating_sub(keep.max(1));
    for (_, folder) in &checkpoints[..surplus] {
        // Renamed first: interrupted half-way, no incomplete checkpoint keeps its name.
        let old = hidden_name(folder);
        fs::rename(folder, &old)
            .and_then(|()| fs::remove_dir_all(&old))
            .map_err(|e| Error::io("remove an old checkpoint", folder, e))?;
    }
    Ok(())
}

fn hidden_name(folder: &Path) -> PathBuf {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    folder.with_file_name(format!("{REMOVED}{name}"))
}

/// Makes a rename durable.
fn sync_parent(folder: &Path) -> Result<()> {
    let parent = folder.parent().filter(|path| !path.as_os_str().is_empty());
    let parent = parent.unwrap_or(Path::new("."));
    let sync = File::open(parent).and_then(|parent| parent.sync_all());
    sync.map_err(|e| Error::io("flush the folder", parent, e))
}
