//! Replacing the model in a folder by renames, so that a crash at any point leaves a complete model.
//!
//! A staged folder inside the target has one of three names. Each change of name is one atomic rename, so
//! the name records the progress of the replacement:
//!
//! 1. `.partial-X`: being written, incomplete. It is deleted when its process has ended.
//! 2. `.ready-X`: complete and verified. The earlier model's files are moved to `.replaced-X`.
//! 3. `.moving-X`: the earlier model is complete in `.replaced-X`. The new files are moved into the
//!    target, `config.json` last. Then both folders are removed.
//!
//! [`finish_interrupted`] continues from state 2 or 3. A model card that a user wrote or edited stays.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::generated::{CARD_FILE, is_unchanged};
use crate::{Error, ErrorKind, Result};

/// The file name of weights that are not sharded.
pub(crate) const WEIGHTS_FILE: &str = "model.safetensors";
/// The file name of the index of sharded weights.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The only folder among the files of a model: the pooling of sentence-transformers.
pub(super) const POOLING_FOLDER: &str = "1_Pooling";
/// The only file in it.
pub(super) const POOLING_FILE: &str = "config.json";

/// Being written.
pub(super) const PARTIAL: &str = ".partial-";
/// Complete; the earlier model is not moved to `.replaced-X` yet.
pub(super) const READY: &str = ".ready-";
/// Complete; the earlier model is in `.replaced-X`.
const MOVING: &str = ".moving-";
/// The earlier model.
const REPLACED: &str = ".replaced-";

/// The files by which tools recognize a model or an adapter. They are moved out of the target first and
/// into it last.
const MARKERS: [&str; 2] = ["config.json", "adapter_config.json"];

/// How long to wait for another process that is replacing a model in the same folder.
const WAIT: Duration = Duration::from_secs(20);

/// A lock on the target folder itself, held for milliseconds while its files are renamed.
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
    /// Whether an interrupted replacement by a complete model was finished.
    pub finished: bool,
    /// Names of incomplete folders that were removed.
    pub removed: Vec<String>,
}

/// Cleans up after a process that was killed while it saved a model in `folder`: a complete model is moved
/// into place, an incomplete one is removed. Files that a running process is writing are not touched. Does
/// nothing if the folder does not exist.
///
/// # Errors
/// [`ErrorKind::Io`]: files cannot be renamed or removed. No complete model is lost in that case.
pub fn finish_interrupted(folder: &Path) -> Result<Recovered> {
    if !has_leftovers(folder) {
        return Ok(Recovered::default());
    }
    let _guard = Guard::lock(folder)?;
    finish_locked(folder)
}

/// Whether a name is one of a folder of a save that is in progress or was interrupted.
pub(crate) fn is_leftover(name: &str) -> bool {
    [PARTIAL, READY, MOVING, REPLACED].iter().any(|prefix| name.starts_with(prefix))
}

fn has_leftovers(folder: &Path) -> bool {
    let ours = |name: &OsStr| is_leftover(&name.to_string_lossy());
    fs::read_dir(folder)
        .is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(|e| ours(&e.file_name()))))
}

/// [`finish_interrupted`] while the [`Guard`] is held.
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
        // Locked by the process that writes it, if the file system supports locks.
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
        // The model that replaces it is in place; otherwise the loop above would have found it.
        if !in_use && name.to_string_lossy().starts_with(REPLACED) {
            fs::remove_dir_all(folder.join(name)).map_err(io)?;
        }
    }
    Ok(recovered)
}

/// Replaces the model in `target` by the files of `partial`, which is complete and flushed to the disk.
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
    leave_card_of_user(target, staged)?;
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

/// Removes the staged model card if the target has one that a user wrote or edited.
fn leave_card_of_user(target: &Path, staged: &Path) -> io::Result<()> {
    let (own, new) = (target.join(CARD_FILE), staged.join(CARD_FILE));
    if fs::symlink_metadata(&own).is_err() || is_unchanged(&own) || !new.exists() {
        return Ok(());
    }
    step()?;
    fs::remove_file(new)
}

/// Moves the earlier model's files, and every file with the name of a new file, into `replaced`.
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

/// Whether a file name is one that saving a model or an adapter writes. Other `.safetensors` files belong
/// to the user.
fn belongs_to_a_model(name: &OsStr) -> bool {
    // Those of sentence-transformers too: they would give a new model the pooling of an earlier one.
    // An earlier tokenizer would be taken for that of an adapter, which has one only if it has more tokens.
    const NAMES: [&str; 10] = [
        WEIGHTS_FILE,
        INDEX_FILE,
        "adapter_model.safetensors",
        "llara_probes.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modules.json",
        POOLING_FOLDER,
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    ];
    let name = name.to_string_lossy();
    let shard = name.strip_prefix("model-").and_then(|rest| rest.strip_suffix(".safetensors"));
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    let numbers = shard.and_then(|shard| shard.split_once("-of-"));
    NAMES.contains(&&*name)
        || MARKERS.contains(&&*name)
        || numbers.is_some_and(|(n, of)| is_number(n) && is_number(of))
}

/// The path with `to` in place of the prefix `from` of its last component.
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
