//! The folder that a command writes to: locked, checked for earlier contents and for free space.

use std::fs;
use std::path::{Path, PathBuf};

use llara::train::remove_unfinished;
use llara::{Error, ErrorKind, FolderLock, Result, finish_interrupted, free_disk_bytes};

use super::talk::{bytes, say};

/// How many names of an earlier content are shown.
const SHOWN: usize = 5;
/// What the names of folders begin with that hold incomplete files.
const PARTIAL: &str = ".partial-";

/// Locks the output folder for this process and creates it if need be. Refuses a folder that is not
/// empty, unless it may be overwritten. What a killed process left in it is finished or removed.
pub(super) fn claim(path: &Path, overwrite: bool) -> Result<FolderLock> {
    let lock = claim_with_contents(path)?;
    check(path, overwrite, &[])?;
    Ok(lock)
}

/// [`claim`] for a run that may continue what is in the folder; [`check_resumable`] refuses other contents.
pub(super) fn claim_with_contents(path: &Path) -> Result<FolderLock> {
    if path.exists() && !path.is_dir() {
        return Err(Error::new(
            ErrorKind::Io,
            "cannot use this as the output folder: it is a file",
        )
        .file(path)
        .hint("choose another folder"));
    }
    let lock = FolderLock::acquire(path)?;
    let recovered = finish_interrupted(path)?;
    if recovered.finished {
        say!(
            "note: {}: an earlier run was interrupted while its complete model was moved into place; \
             the move is now finished",
            path.display()
        );
    }
    for name in recovered.removed {
        let removed = path.join(name);
        say!("note: removed {}, incomplete files of an interrupted run", removed.display());
    }
    for name in remove_unfinished(path)? {
        let removed = path.join(name);
        say!(
            "note: removed {}, a checkpoint of an interrupted run that was unfinished",
            removed.display()
        );
    }
    Ok(lock)
}

/// Refuses a folder without a checkpoint that holds more than the log of an interrupted run, unless it may be
/// overwritten.
pub(super) fn check_resumable(path: &Path, overwrite: bool) -> Result<()> {
    check(path, overwrite, &["log.jsonl", "runs"])
}

/// Refuses a folder that has other files than `allowed`, unless it may be overwritten.
fn check(path: &Path, overwrite: bool, allowed: &[&str]) -> Result<()> {
    let entries = fs::read_dir(path);
    let entries = entries.map_err(|e| Error::io("use this as the output folder", path, e))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .filter(|name| name != ".llara.lock" && !name.starts_with(PARTIAL))
        .filter(|name| !allowed.contains(&&**name))
        .collect();
    if names.is_empty() || overwrite {
        return Ok(());
    }
    names.sort_unstable();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    Err(Error::new(ErrorKind::Argument, "the output folder is not empty")
        .file(path)
        .expected("a new or an empty folder")
        .got(format!("{}{more}", names[..names.len().min(SHOWN)].join(", ")))
        .hint(if names.iter().any(|name| name.starts_with("checkpoint-")) {
            "continue the run with --resume-from-checkpoint, or choose another folder. \
             --overwrite-output-dir deletes the checkpoints and replaces the model"
        } else {
            "choose another folder, or replace its model with --overwrite-output-dir"
        }))
}

/// Refuses work whose results need more than the free disk space. `largest` says what takes most of it.
pub(super) fn check_space(path: &Path, needed: u64, largest: &str) -> Result<()> {
    let freed = earlier_checkpoints(path).iter().map(|folder| size(folder)).sum();
    let free = free_disk_bytes(path)?.saturating_add(freed);
    if needed <= free {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Io, "there is not enough free disk space for what will be saved")
        .file(path)
        .expected(format!("{} ({largest})", bytes(needed)))
        .got(format!("{} free", bytes(free)))
        .hint(
            "free some space, choose another folder, or keep fewer checkpoints with \
             --save-total-limit and --save-steps",
        ))
}

/// Removes the checkpoints of an earlier run from a folder that may be overwritten: the new run's
/// numbers begin again, so they would be mistaken for its own.
pub(super) fn remove_earlier_checkpoints(path: &Path) -> Result<()> {
    for folder in earlier_checkpoints(path) {
        let fail = |e| Error::io("remove the checkpoint of an earlier run", &folder, e);
        // Renamed first: interrupted half-way, no incomplete checkpoint keeps its name.
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let hidden = path.join(format!("{PARTIAL}{name}"));
        fs::rename(&folder, &hidden).and_then(|()| fs::remove_dir_all(&hidden)).map_err(fail)?;
        say!("note: removed {}, a checkpoint of an earlier run", folder.display());
    }
    Ok(())
}

/// Says what a run whose last save failed has left.
pub(super) fn say_what_is_left(path: &Path) {
    let number = |folder: &PathBuf| folder.to_str()?.rsplit_once('-')?.1.parse::<u64>().ok();
    match earlier_checkpoints(path).into_iter().max_by_key(number) {
        Some(newest) => say!("note: the newest saved model of this run is {}", newest.display()),
        None => say!(
            "note: this run saved no checkpoint; --save-steps N saves one every N steps. Its log is \
             in {}",
            path.display()
        ),
    }
}

/// Folders named checkpoint-N that hold a model or an adapter.
fn earlier_checkpoints(path: &Path) -> Vec<PathBuf> {
    let is_checkpoint = |folder: &PathBuf| {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let number = name.strip_prefix("checkpoint-").unwrap_or_default();
        !number.is_empty()
            && number.bytes().all(|b| b.is_ascii_digit())
            && !folder.is_symlink()
            && ["config.json", "adapter_config.json"].iter().any(|f| folder.join(f).is_file())
    };
    let entries = fs::read_dir(path).into_iter().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_checkpoint).collect();
    found.sort();
    found
}

/// Bytes of the files in a folder.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum()
}

/// Removes a folder that holds nothing but an empty log, so that the same run can be started again.
pub(super) fn discard_if_nothing_was_logged(path: &Path) {
    let Ok(mut entries) = fs::read_dir(path) else { return };
    let idle = entries.all(|entry| {
        entry.is_ok_and(|entry| match entry.file_name().to_str() {
            Some("log.jsonl") => entry.metadata().is_ok_and(|log| log.len() == 0),
            name => matches!(name, Some("runs" | ".llara.lock")),
        })
    });
    if idle {
        // Why the run failed is the error to report, not a failure to remove this.
        let _ = fs::remove_dir_all(path);
    }
}
