//! Folders that are complete or not there.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Error, ErrorKind, Result};

/// The files without which no tool takes a folder for a model or an adapter: they leave first, and the
/// new one comes last.
const MARKERS: [&str; 2] = ["config.json", "adapter_config.json"];
/// What the hidden folder's name begins with.
const PREFIX: &str = ".partial-";

/// A folder being written next to its final place.
///
/// Files are made in a hidden folder inside the target and flushed to the disk; [`commit`] then moves
/// them, the one that makes a folder look complete last. Dropped before that, it leaves the target as it was, and gone if it was
/// not there.
///
/// [`commit`]: Staging::commit
pub(crate) struct Staging {
    target: PathBuf,
    /// `None` once committed.
    folder: Option<TempDir>,
    made_target: bool,
    /// The file without which no tool takes the folder for complete: it leaves first and comes last.
    last: &'static str,
}

impl Staging {
    /// Makes `target` if need be, and an empty hidden folder in it; `last` is the file that makes the
    /// folder look complete. What a killed run left half-written is cleared away.
    pub(crate) fn new(target: &Path, last: &'static str) -> Result<Self> {
        let made_target = !target.exists();
        let io = |e| Error::io("write to the folder", target, e);
        fs::create_dir_all(target).map_err(|e| Error::io("create the folder", target, e))?;
        for entry in fs::read_dir(target).map_err(io)? {
            let entry = entry.map_err(io)?;
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                fs::remove_dir_all(entry.path()).map_err(io)?;
            }
        }
        let folder = tempfile::Builder::new().prefix(PREFIX).tempdir_in(target).map_err(io)?;
        Ok(Staging { target: target.to_owned(), folder: Some(folder), made_target, last })
    }

    /// Where the files will be.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Where to write.
    pub(crate) fn path(&self) -> &Path {
        self.folder.as_ref().map_or(&self.target, TempDir::path)
    }

    /// Writes a small file in full.
    pub(crate) fn write(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.path().join(name);
        fs::write(&path, contents).map_err(|e| Error::io("write", self.target.join(name), e))
    }

    /// Moves everything into place. What an earlier model or adapter left in the target is removed: its
    /// weights must not be taken for the new one's.
    pub(crate) fn commit(mut self) -> Result<()> {
        let Some(folder) = self.folder.take() else { return Ok(()) };
        let mut names = Vec::new();
        let io = |e| Error::io("save the model", &self.target, e);
        for entry in fs::read_dir(folder.path()).map_err(io)? {
            let entry = entry.map_err(io)?;
            File::open(entry.path()).and_then(|file| file.sync_all()).map_err(io)?;
            names.push(entry.file_name());
        }
        if !names.iter().any(|name| name == self.last) {
            return Err(Error::new(ErrorKind::Config, format!("a folder without {}", self.last))
                .file(&self.target));
        }
        names.sort_by_key(|name| name == self.last);
        for marker in MARKERS {
            remove_if_there(&self.target.join(marker)).map_err(io)?;
        }
        for entry in fs::read_dir(&self.target).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            if belongs_to_a_model(&name) && !names.contains(&name) {
                remove_if_there(&self.target.join(name)).map_err(io)?;
            }
        }
        for name in names {
            fs::rename(folder.path().join(&name), self.target.join(&name)).map_err(io)?;
        }
        self.made_target = false;
        drop(folder);
        File::open(&self.target).and_then(|dir| dir.sync_all()).map_err(io)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        drop(self.folder.take());
        if self.made_target {
            // Fails, as it should, when something else has been put there meanwhile.
            let _ = fs::remove_dir(&self.target);
        }
    }
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
    NAMES.contains(&&*name) || numbers.is_some_and(|(n, of)| is_number(n) && is_number(of))
}

pub(super) fn remove_if_there(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_it_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        let staging = Staging::new(&target, "config.json").unwrap();
        staging.write("config.json", b"{}").unwrap();
        drop(staging);
        assert!(!target.exists());
    }

    #[test]
    fn committed_it_replaces_an_earlier_model() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("model-00001-of-00002.safetensors"), "old").unwrap();
        for name in ["notes.txt", "corpus.safetensors"] {
            fs::write(target.join(name), "mine").unwrap();
        }
        for name in ["adapter_config.json", "adapter_model.safetensors", "llara_probes.json"] {
            fs::write(target.join(name), "old").unwrap();
        }
        fs::create_dir(target.join(".partial-killed")).unwrap();
        let staging = Staging::new(&target, "config.json").unwrap();
        staging.write("config.json", b"{}").unwrap();
        staging.write("model.safetensors", b"new").unwrap();
        staging.commit().unwrap();
        let mut names: Vec<_> =
            fs::read_dir(&target).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["config.json", "corpus.safetensors", "model.safetensors", "notes.txt"]);
    }
}
