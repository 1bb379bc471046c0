//! Replacing the model in a folder by renames, so that a crash at any point leaves a complete model.
//!
//! A staged folder passes through three names inside its target. Each change of name is one atomic
//! rename, so the name tells how far the replacement came:
//!
//! 1. `.partial-X`: being written. Incomplete; deleted when its process has ended.
//! 2. `.ready-X`: complete and verified. The earlier model's files are moved to `.replaced-X`.
//! 3. `.moving-X`: the earlier model is complete in `.replaced-X`; the new files move into the target,
//!    `config.json` last. Then both folders are removed.
//!
//! [`finish_interrupted`] continues from 2 or 3.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::{Error, ErrorKind, Result};

/// Being written.
pub(super) const PARTIAL: &str = ".partial-";
/// Complete, the earlier model not yet moved away.
pub(super) const READY: &str = ".ready-";
/// Complete, the earlier model moved away.
const MOVING: &str = ".moving-";
/// The earlier model.
const REPLACED: &str = ".replaced-";

/// The files without which no tool takes a folder for a model or an adapter: moved away first and
/// moved in last.
const MARKERS: [&str; 2] = ["config.json", "adapter_config.json"];

/// How long to wait for another process that is replacing a model in the same folder.
const WAIT: Duration = Duration::from_secs(20);

/// A lock on the target folder itself while its files are renamed, a matter of milliseconds.
pub(super) struct Guard {
    _folder: File,
}

impl Guard {
    pub(super) fn lock(target: &Path) -> Result<Self> {
        let folder = File::open(target).map_err(|e| Error::io("open the folder", target, e))?;
        let start = Instant::now();
        while let Err(TryLockError::WouldBlock) = folder.try_lock() {
            if start.elapsed() > WAIT {
                return Err(Error::new(ErrorKind::Io, "another process has locked this folder")
                    .file(target)
                    .hint("wait until it has ended, or choose another folder"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Guard { _folder: folder })
    }
}

/// What [`finish_interrupted`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Whether a complete model was found whose move into the folder had been interrupted, and was
    /// moved in.
    pub finished: bool,
    /// Names of incomplete folders that were removed.
    pub removed: Vec<String>,
}

/// Finishes what a killed process left in a model folder: a complete model is moved into place, an
/// incomplete one is removed. What a running process is writing is left alone. Does nothing for a
/// folder that does not exist.
///
/// # Errors
/// When files cannot be renamed or removed. No complete model is lost then.
pub fn finish_interrupted(folder: &Path) -> Result<Recovered> {
    if !has_leftovers(folder) {
        return Ok(Recovered::default());
    }
    let _guard = Guard::lock(folder)?;
    finish_locked(folder)
}

fn has_leftovers(folder: &Path) -> bool {
    let ours = |name: &OsStr| {
        let name = name.to_string_lossy();
        [PARTIAL, READY, MOVING, REPLACED].iter().any(|prefix| name.starts_with(prefix))
    };
    fs::read_dir(folder)
        .is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(|e| ours(&e.file_name()))))
}

/// The same while the [`Guard`] is held.
pub(super) fn finish_locked(folder: &Path) -> Result<Recovered> {
    let io = |e| Error::io("finish an interrupted save in", folder, e);
    let mut recovered = Recovered::default();
    let mut in_use = false;
    for name in names(folder).map_err(io)? {
        let text = name.to_string_lossy().into_owned();
        let path = folder.join(&name);
        let partial = text.starts_with(PARTIAL);
        if !partial && !text.starts_with(READY) && !text.starts_with(MOVING) {
            continue;
        }
        // Locked by the process that writes it. Where there are no locks nobody can tell.
        let dir = File::open(&path).map_err(io)?;
        if dir.try_lock().is_err() || !path.is_dir() {
            in_use = true;
        } else if partial {
            fs::remove_dir_all(&path).map_err(io)?;
            recovered.removed.push(text);
        } else {
            roll_forward(folder, &path).map_err(io)?;
            recovered.finished = true;
        }
    }
    for name in names(folder).map_err(io)? {
        // The model that replaces it is in place: otherwise it would have been found above.
        if !in_use && name.to_string_lossy().starts_with(REPLACED) {
            fs::remove_dir_all(folder.join(name)).map_err(io)?;
        }
    }
    Ok(recovered)
}

/// Puts the files of `partial`, which is complete and on the disk, in place of the model in `target`.
pub(super) fn replace(target: &Path, partial: &Path) -> io::Result<()> {
    let ready = renamed(partial, PARTIAL, READY);
    rename(partial, &ready)?;
    sync(target)?;
    roll_forward(target, &ready)
}

/// Continues a replacement from a folder named `.ready-X` or `.moving-X`.
fn roll_forward(target: &Path, staged: &Path) -> io::Result<()> {
    let is_ready = staged.file_name().is_some_and(|n| n.to_string_lossy().starts_with(READY));
    let (from, moving) = if is_ready {
        (READY, renamed(staged, READY, MOVING))
    } else {
        (MOVING, staged.to_owned())
    };
    let replaced = renamed(staged, from, REPLACED);
    if is_ready {
        move_away(target, &names(staged)?, &replaced)?;
        rename(staged, &moving)?;
        sync(target)?;
    }
    let mut new = names(&moving)?;
    new.sort_by_key(|name| is_marker(name));
    for name in new {
        rename(&moving.join(&name), &target.join(&name))?;
    }
    sync(target)?;
    step()?;
    fs::remove_dir(&moving)?;
    step()?;
    if replaced.exists() {
        fs::remove_dir_all(&replaced)?;
    }
    sync(target)
}

/// Moves the earlier model's files, and whatever has the name of a new file, into `replaced`.
fn move_away(target: &Path, new: &[OsString], replaced: &Path) -> io::Result<()> {
    let mut old = names(target)?;
    old.retain(|name| belongs_to_a_model(name) || new.contains(name));
    if old.is_empty() {
        return Ok(());
    }
    old.sort_by_key(|name| !is_marker(name));
    fs::create_dir_all(replaced)?;
    for name in old {
        rename(&target.join(&name), &replaced.join(&name))?;
    }
    sync(replaced)?;
    sync(target)
}

fn is_marker(name: &OsStr) -> bool {
    MARKERS.iter().any(|marker| name == *marker)
}

/// Whether a file is a part of a model or adapter as they are saved here, and nothing else of that
/// name could be: other `.safetensors` files are the user's own.
fn belongs_to_a_model(name: &OsStr) -> bool {
    const NAMES: [&str; 4] = [
        "model.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "llara_probes.json",
    ];
    let name = name.to_string_lossy();
    let shard = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let numbers = shard.and_then(|shard| shard.split_once("-of-"));
    NAMES.contains(&&*name)
        || MARKERS.contains(&&*name)
        || numbers.is_some_and(|(n, of)| is_number(n) && is_number(of))
}

/// The path with another prefix of its last part.
fn renamed(path: &Path, from: &str, to: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{to}{}", name.strip_prefix(from).unwrap_or(&name)))
}

pub(super) fn names(folder: &Path) -> io::Result<Vec<OsString>> {
    let mut names: Vec<OsString> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
    names.sort();
    Ok(names)
}

/// Makes renames within a folder durable.
pub(super) fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn rename(from: &Path, to: &Path) -> io::Result<()> {
    step()?;
    fs::rename(from, to)
}

/// A point at which a test can stop the replacement as a crash would.
#[cfg(not(test))]
fn step() -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
pub(super) use crash::step;

#[cfg(test)]
pub(super) mod crash {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static STEPS_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Stops the replacement of this thread at the step after the first `steps`; `None`: never.
    pub(crate) fn after(steps: Option<usize>) {
        STEPS_LEFT.set(steps);
    }

    pub(crate) fn step() -> io::Result<()> {
        match STEPS_LEFT.get() {
            Some(0) => Err(io::Error::other("a crash")),
            Some(left) => {
                STEPS_LEFT.set(Some(left - 1));
                Ok(())
            }
            None => Ok(()),
        }
    }
}
