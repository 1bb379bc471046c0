//! The output folder of a verb: locking, checks for earlier contents and for free disk space.

use std::fs;
use std::path::{Path, PathBuf};

use llara::train::remove_unfinished;
use llara::{Error, ErrorKind, FolderLock, Result, finish_interrupted, free_disk_bytes};

use super::talk::{bytes, say};

/// Maximum number of file names in an error.
const SHOWN: usize = 5;
/// Files that a run writes besides its log, models and checkpoints.
const RUN_FILES: [&str; 8] = [
    "runs",
    "run.json",
    "report.html",
    "eval_queries.json",
    ".run.json.new",
    ".report.html.new",
    ".log.jsonl.new",
    ".eval_queries.json.new",
];
/// Prefix of folders with incomplete files.
const PARTIAL: &str = ".partial-";

/// Creates the output folder if it does not exist, and locks it for this process. Refuses a folder that is
/// not empty unless `overwrite` is set. Interrupted saves in it are finished or removed.
pub(super) fn claim(path: &Path, overwrite: bool) -> Result<FolderLock> {
    let lock = claim_with_contents(path)?;
    check(path, overwrite, &[])?;
    Ok(lock)
}

/// [`claim`] without a check of the contents, for a run that may continue from a checkpoint in the folder.
pub(super) fn claim_with_contents(path: &Path) -> Result<FolderLock> {
    if path.exists() && !path.is_dir() {
        return Err(Error::new(ErrorKind::Io, "the output folder is a file")
            .file(path)
            .hint("choose another folder"));
    }
    let lock = FolderLock::acquire(path)?;
    let recovered = finish_interrupted(path)?;
    if recovered.finished {
        say!(
            "note: {}: an earlier run was interrupted while it moved its complete model into place; the \
             move is now finished",
            path.display()
        );
    }
    for name in recovered.removed {
        let removed = path.join(name);
        say!("note: removed {}, incomplete files of an interrupted run", removed.display());
    }
    for name in remove_unfinished(path)? {
        let removed = path.join(name);
        say!("note: removed {}, an incomplete checkpoint of an interrupted run", removed.display());
    }
    Ok(lock)
}

/// Refuses a folder without checkpoints that contains more than the logs of an interrupted run, unless
/// `overwrite` is set.
pub(super) fn check_resumable(path: &Path, overwrite: bool) -> Result<()> {
    check(path, overwrite, &[&["log.jsonl"], &RUN_FILES[..]].concat())
}

/// Refuses a folder with other files than `allowed` unless `overwrite` is set.
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
        .expected("a new or empty folder")
        .got(format!("{}{more}", names[..names.len().min(SHOWN)].join(", ")))
        .hint(if names.iter().any(|name| name.starts_with("checkpoint-")) {
            "continue the run with --resume-from-checkpoint, or choose another folder. \
             --overwrite-output-dir deletes the checkpoints and replaces the model"
        } else {
            "choose another folder, or replace its model with --overwrite-output-dir"
        }))
}

/// Refuses a run whose output exceeds the free disk space. `what` describes the output.
pub(super) fn check_space(path: &Path, needed: u64, what: &str) -> Result<()> {
    let freed = earlier_checkpoints(path).iter().map(|folder| size(folder)).sum();
    let free = free_disk_bytes(path)?.saturating_add(freed);
    if needed <= free {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Io, "there is not enough free disk space for the output")
        .file(path)
        .expected(format!("{} ({what})", bytes(needed)))
        .got(format!("{} free", bytes(free)))
        .hint(
            "free some space, choose another folder, or keep fewer checkpoints with \
             --save-total-limit and --save-steps",
        ))
}

/// Removes the checkpoints of an earlier run from a folder that may be overwritten. Their step numbers could
/// be mistaken for those of the new run.
pub(super) fn remove_earlier_checkpoints(path: &Path) -> Result<()> {
    for folder in earlier_checkpoints(path) {
        let fail = |e| Error::io("remove the checkpoint of an earlier run", &folder, e);
        // Renamed first, so that an interruption leaves no incomplete folder with a checkpoint's name.
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let hidden = path.join(format!("{PARTIAL}{name}"));
        fs::rename(&folder, &hidden).and_then(|()| fs::remove_dir_all(&hidden)).map_err(fail)?;
        say!("note: removed {}, a checkpoint of an earlier run", folder.display());
    }
    Ok(())
}

/// Prints which models exist after the last save of a run failed.
pub(super) fn say_what_is_left(path: &Path) {
    let number = |folder: &PathBuf| folder.to_str()?.rsplit_once('-')?.1.parse::<u64>().ok();
    match earlier_checkpoints(path).into_iter().max_by_key(number) {
        Some(newest) => say!("note: the latest saved model of this run is {}", newest.display()),
        None => say!(
            "note: this run saved no checkpoint; --save-steps N saves one every N steps. Its log is in \
             {}",
            path.display()
        ),
    }
}

/// Folders named checkpoint-N that contain a model or an adapter.
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

/// The total size of the files in a folder, in bytes.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len())).sum()
}

/// Removes a folder that contains only an empty log, so that the same run can be started again.
pub(super) fn discard_if_nothing_was_logged(path: &Path) {
    let Ok(mut entries) = fs::read_dir(path) else { return };
    let idle = entries.all(|entry| {
        entry.is_ok_and(|entry| match entry.file_name().to_str() {
            Some("log.jsonl") => entry.metadata().is_ok_and(|log| log.len() == 0),
            name => name.is_some_and(|name| name == ".llara.lock" || RUN_FILES.contains(&name)),
        })
    });
    if idle {
        // The error of the run is reported; this one would hide it.
        let _ = fs::remove_dir_all(path);
    }
}
