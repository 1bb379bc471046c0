//! Writing a checkpoint: its files are written in a hidden folder, then flushed, then the folder is renamed into
//! place, and older checkpoints are removed after that. All but the first part can be done on another thread.

use std::fs::{self, File};
use std::io::ErrorKind as Io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::format::{
    FORMAT, RunProgress, STATE_FILE, State, checkpoint_name, is_checkpoint, list, step_of,
};
use super::identity::Identity;
use super::{manifest, tensors};
use crate::backend::Backend;
use crate::biencoder::{BiEncoderModel, StagedFolder};
use crate::dist::Collective;
use crate::train::config::{Saving, TrainConfig};
use crate::train::evaluation::EvalHistory;
use crate::train::state::TrainState;
use crate::{Error, ErrorKind, Result};

/// Prefix of the name of the folder in which a checkpoint is written.
const WRITING: &str = ".writing-";
/// Prefix of the name of a checkpoint that is being removed.
const REMOVED: &str = ".removed-";

/// The contents of a checkpoint.
pub(in crate::train) struct Saved<'s, B: Backend> {
    pub(in crate::train) model: &'s BiEncoderModel<B>,
    pub(in crate::train) state: &'s TrainState<B>,
    pub(in crate::train) config: &'s TrainConfig,
    pub(in crate::train) identity: &'s Identity,
    pub(in crate::train) progress: RunProgress,
    pub(in crate::train) evaluation: Option<&'s EvalHistory>,
}

/// A checkpoint whose files are written, but not flushed to the disk, and that is not in its place yet. What is left
/// to do needs no model: until the files are flushed, the page cache of the operating system is the snapshot of the
/// weights.
#[must_use]
pub(in crate::train) struct StagedCheckpoint {
    hidden: PathBuf,
    folder: PathBuf,
    model_files: StagedFolder,
    saving: Saving,
    step: u64,
    /// The best evaluated step.
    best: Option<u64>,
}

/// A complete checkpoint.
pub(in crate::train) struct Finished {
    pub(in crate::train) folder: PathBuf,
    /// Whether old checkpoints could be removed.
    pub(in crate::train) removal: Result<()>,
}

/// Writes the files of `checkpoint-N` to a hidden folder: each rank its moments, rank 0 all other files. Returns what
/// rank 0 has to finish; no unfinished checkpoint may be left when this is called.
///
/// # Errors
/// If a file cannot be written. Earlier checkpoints are then unchanged.
pub(in crate::train) fn write<B: Backend>(
    saved: &Saved<'_, B>,
    collective: &dyn Collective<B>,
) -> Result<Option<StagedCheckpoint>> {
    let Saved { config, progress, evaluation, .. } = saved;
    let name = checkpoint_name(progress.step);
    let hidden = config.output_dir.join(format!("{WRITING}{name}"));
    let model_files = write_hidden(saved, collective, &hidden);
    if model_files.is_err() && collective.rank() == 0 {
        // The original error is reported.
        let _ = fs::remove_dir_all(&hidden);
    }
    let best = evaluation.and_then(|history| history.best.as_ref()).map(|best| best.step);
    Ok(model_files?.map(|model_files| StagedCheckpoint {
        folder: config.output_dir.join(name),
        hidden,
        model_files,
        saving: config.saving,
        step: progress.step,
        best,
    }))
}

impl StagedCheckpoint {
    /// Compares the weights in the files with those that were written, flushes all files and writes the manifest,
    /// renames the checkpoint into place, and then removes the oldest checkpoints beyond the number that is kept,
    /// except the best one.
    ///
    /// # Errors
    /// If a file cannot be read, flushed or renamed. Earlier checkpoints are then unchanged.
    pub(in crate::train) fn finish(self) -> Result<Finished> {
        let StagedCheckpoint { hidden, folder, model_files, saving, step, best } = self;
        let complete = model_files.commit().and_then(|()| manifest::write(&hidden));
        if complete.is_err() {
            // The original error is reported.
            let _ = fs::remove_dir_all(&hidden);
        }
        complete?;
        put_in_place(&hidden, &folder)?;
        let removal = remove_old(folder.parent().unwrap_or(Path::new("")), &saving, step, best);
        Ok(Finished { folder, removal })
    }
}

/// Writes all files but the manifest. Returns the files of the model on rank 0.
fn write_hidden<B: Backend>(
    saved: &Saved<'_, B>,
    collective: &dyn Collective<B>,
    hidden: &Path,
) -> Result<Option<StagedFolder>> {
    let Saved { model, state, config, .. } = saved;
    let first = collective.rank() == 0;
    let new_folder = || {
        remove_unfinished(&config.output_dir)?;
        fs::create_dir_all(hidden).map_err(|e| Error::io("create the folder", hidden, e))
    };
    collective.agree(if first { new_folder() } else { Ok(()) })?;
    let dtype = config.saving.dtype;
    // Without a sharded optimizer, the first rank has all moments.
    let shards = state.optimizer().layout().ranks();
    let parts = (model.backend(), model.decoder());
    let files = || {
        let of_model = match (first, model.adapter()) {
            (false, _) => None,
            (true, Some(_)) => Some(model.stage_adapter(hidden)?),
            (true, None) => Some(model.stage(hidden, dtype)?),
        };
        let with_weights = !model.saves_exactly(dtype);
        if collective.rank() < shards {
            let file = tensors::file_name(collective.rank(), shards);
            tensors::write(hidden, &file, parts, state.optimizer(), with_weights)?;
        }
        if first {
            write_state(saved, shards, hidden)?;
        }
        Ok(of_model)
    };
    let (of_model, status) = match files() {
        Ok(of_model) => (of_model, Ok(())),
        Err(error) => (None, Err(error)),
    };
    collective.agree(status)?;
    let present = || match first {
        true => check_present(hidden, shards),
        false => Ok(()),
    };
    collective.agree(present())?;
    Ok(of_model)
}

/// Checks that the moments of every rank are in the folder of the first one.
fn check_present(hidden: &Path, shards: usize) -> Result<()> {
    let missing = (0..shards).map(|rank| tensors::file_name(rank, shards));
    match missing.map(|name| hidden.join(name)).find(|path| !path.is_file()) {
        None => Ok(()),
        Some(path) => Err(Error::new(ErrorKind::Io, "the file of another process is not there")
            .file(path)
            .expected("an output folder that all hosts share")
            .hint("give --output-dir on a file system that is the same on every host")),
    }
}

/// Removes the remains of checkpoints that a killed process was writing or removing in an output folder; returns
/// their names. No other process may be writing there.
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
    let Saved { model, config, identity, progress, evaluation, .. } = saved;
    let state = State {
        format: FORMAT,
        progress: *progress,
        ranks,
        weights_in_optimizer: !model.saves_exactly(config.saving.dtype),
        chunking: config.chunking.into(),
        dtype: model.precision(),
        identity: (*identity).clone(),
        evaluation: evaluation.cloned(),
    };
    let path = hidden.join(STATE_FILE);
    let io = |e| Error::io("write the state of the run", &path, e);
    let json = serde_json::to_vec_pretty(&state).map_err(|e| io(e.into()))?;
    fs::write(&path, json).map_err(io)
}

/// Renames a complete hidden folder to its final name. A checkpoint with that name (a damaged one, or one of an
/// earlier attempt) is exchanged with it in one operation and then removed; anything else with that name is renamed.
fn put_in_place(hidden: &Path, folder: &Path) -> Result<()> {
    let io = |e| Error::io("move the checkpoint into place", folder, e);
    if fs::symlink_metadata(folder).is_ok() && !is_checkpoint(folder) {
        move_aside(folder).map_err(io)?;
    }
    if fs::symlink_metadata(folder).is_err() {
        fs::rename(hidden, folder).map_err(io)?;
        return sync_parent(folder);
    }
    if renameat_with(CWD, hidden, CWD, folder, RenameFlags::EXCHANGE).is_ok() {
        sync_parent(folder)?;
        return fs::remove_dir_all(hidden).map_err(io);
    }
    // The file system does not support exchange. If interrupted in between, an older checkpoint is the newest.
    let old = hidden_name(folder);
    fs::rename(folder, &old).and_then(|()| fs::rename(hidden, folder)).map_err(io)?;
    sync_parent(folder)?;
    fs::remove_dir_all(&old).map_err(io)
}

/// Removes the oldest checkpoints beyond the number that is kept; that of `step` is the newest. Checkpoints of
/// later steps are from an earlier attempt of this run, which will replace them.
///
/// As in `transformers`, the checkpoint of the step `best` is kept and counts as one of the number; if only one
/// is to be kept, the newest is kept as well.
fn remove_old(output_dir: &Path, saving: &Saving, step: u64, best: Option<u64>) -> Result<()> {
    let Some(keep) = saving.keep else { return Ok(()) };
    let mut older = list(output_dir)?;
    older.retain(|(of, _)| *of < step);
    let before = older.len();
    older.retain(|(of, _)| Some(*of) != best);
    let stays = before - older.len();
    let surplus = older.len().saturating_sub(keep.saturating_sub(1 + stays));
    for (_, folder) in &older[..surplus] {
        // Renamed first, so that after an interruption no incomplete checkpoint has this name.
        let old = hidden_name(folder);
        fs::rename(folder, &old)
            .and_then(|()| fs::remove_dir_all(&old))
            .map_err(|e| Error::io("remove an old checkpoint", folder, e))?;
    }
    Ok(())
}

/// Removes what [`remove_old`] would have removed after the newest checkpoint of a run of `steps` steps: the process
/// may have been killed in between.
pub(in crate::train) fn remove_surplus(
    config: &TrainConfig,
    steps: u64,
    best: Option<u64>,
) -> Result<()> {
    if config.saving.keep.is_none() {
        return Ok(());
    }
    let checkpoints = list(&config.output_dir)?;
    let newest = checkpoints.iter().map(|(step, _)| *step).filter(|&step| step <= steps).max();
    newest.map_or(Ok(()), |step| remove_old(&config.output_dir, &config.saving, step, best))
}

/// Renames a file or folder that has the name of a checkpoint but is none, to the first unused name of
/// `NAME.earlier-1`, `NAME.earlier-2`, ….
fn move_aside(path: &Path) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let free = (1u32..)
        .map(|number| path.with_file_name(format!("{name}.earlier-{number}")))
        .find(|free| fs::symlink_metadata(free).is_err());
    free.map_or(Ok(()), |free| fs::rename(path, free))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(root: &Path, name: &str, files: &[&str]) -> PathBuf {
        let path = root.join(name);
        fs::create_dir_all(&path).unwrap();
        files.iter().for_each(|file| fs::write(path.join(file), name).unwrap());
        path
    }

    fn names(root: &Path) -> Vec<String> {
        let entries = fs::read_dir(root).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn only_old_checkpoints_are_removed() {
        for (keep, left) in [
            (1, &["checkpoint-20"][..]),
            (2, &["checkpoint-10", "checkpoint-20"]),
            (9, &["checkpoint-10", "checkpoint-20", "checkpoint-5", "checkpoint-9"]),
        ] {
            let root = tempfile::tempdir().unwrap();
            for step in [5, 9, 10, 20, 30] {
                folder(root.path(), &format!("checkpoint-{step}"), &["manifest.json"]);
            }
            // Not checkpoints: folders of the user, or of another program.
            let own = ["checkpoint-7", "checkpoint-x", "checkpoint-007", "checkpoint-best"];
            own.iter().for_each(|name| drop(folder(root.path(), name, &["notes.txt"])));
            let saving = Saving { keep: Some(keep), ..Saving::default() };
            remove_old(root.path(), &saving, 20, None).unwrap();
            let mut want: Vec<_> = left
                .iter()
                .chain(&own)
                .chain(&["checkpoint-30"])
                .map(|n| (*n).to_owned())
                .collect();
            want.sort();
            assert_eq!(names(root.path()), want);
        }
    }

    #[test]
    fn the_best_checkpoint_is_kept_with_the_newest() {
        for (keep, best, left) in [
            (1, 5, &["checkpoint-20", "checkpoint-5"][..]),
            (2, 5, &["checkpoint-20", "checkpoint-5"]),
            (3, 5, &["checkpoint-10", "checkpoint-20", "checkpoint-5"]),
            (1, 20, &["checkpoint-20"]),
            (2, 20, &["checkpoint-10", "checkpoint-20"]),
            (2, 9, &["checkpoint-20", "checkpoint-9"]),
        ] {
            let root = tempfile::tempdir().unwrap();
            for step in [5, 9, 10, 20] {
                folder(root.path(), &format!("checkpoint-{step}"), &["manifest.json"]);
            }
            let saving = Saving { keep: Some(keep), ..Saving::default() };
            remove_old(root.path(), &saving, 20, Some(best)).unwrap();
            assert_eq!(names(root.path()), left, "{keep} {best}");
        }
    }

    #[test]
    fn a_checkpoint_replaces_one_of_the_same_step() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("checkpoint-3");
        for new in ["first", "second"] {
            let hidden = folder(root.path(), ".writing-checkpoint-3", &[]);
            fs::write(hidden.join("manifest.json"), new).unwrap();
            put_in_place(&hidden, &target).unwrap();
            assert_eq!(fs::read_to_string(target.join("manifest.json")).unwrap(), new);
            assert_eq!(names(root.path()), ["checkpoint-3"]);
        }
    }

    #[test]
    fn a_folder_that_is_no_checkpoint_is_renamed() {
        let root = tempfile::tempdir().unwrap();
        let elsewhere = folder(root.path(), "elsewhere", &["manifest.json"]);
        for number in 1..=2 {
            let target = root.path().join("checkpoint-3");
            match number {
                1 => drop(folder(root.path(), "checkpoint-3", &["notes.txt"])),
                _ => {
                    fs::remove_dir_all(&target).unwrap();
                    std::os::unix::fs::symlink(&elsewhere, &target).unwrap();
                }
            }
            let hidden = folder(root.path(), ".writing-checkpoint-3", &["manifest.json"]);
            put_in_place(&hidden, &target).unwrap();
            assert!(target.join("manifest.json").is_file() && !target.is_symlink());
        }
        assert!(root.path().join("checkpoint-3.earlier-1/notes.txt").is_file());
        assert!(root.path().join("checkpoint-3.earlier-2").is_symlink());
        assert!(elsewhere.join("manifest.json").is_file());
    }

    #[test]
    fn only_unfinished_checkpoints_are_removed() {
        let root = tempfile::tempdir().unwrap();
        for name in
            [".writing-checkpoint-3", ".removed-checkpoint-1", ".writing-notes", "checkpoint-2"]
        {
            folder(root.path(), name, &["model.safetensors"]);
        }
        fs::write(root.path().join(".writing-checkpoint-4"), "a file").unwrap();
        let mut removed = remove_unfinished(root.path()).unwrap();
        removed.sort();
        assert_eq!(removed, [".removed-checkpoint-1", ".writing-checkpoint-3"]);
        assert_eq!(names(root.path()), [".writing-checkpoint-4", ".writing-notes", "checkpoint-2"]);
        assert_eq!(remove_unfinished(&root.path().join("none")).unwrap(), [""; 0]);
    }
}
