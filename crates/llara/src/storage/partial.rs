//! A resumable output file: the bytes written so far in `TARGET.partial`, and a manifest that describes
//! them.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind as Io, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::input::read_limited;
use super::lock::is_at;
use super::output::{OutputFile, regular_target, sync_folder};
use crate::{Error, ErrorKind, Result};

/// Largest manifest that is read, in bytes.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// A file being written as `TARGET.partial`, with a manifest `TARGET.partial.json` after the first
/// [`keep`](Self::keep). [`commit`](Self::commit) renames the file to the target and removes the
/// manifest.
///
/// The manifest is replaced atomically, and only after the bytes it describes are on the disk, so it
/// is correct after a crash. When this value is dropped without a commit, both files remain if there is a
/// manifest; otherwise the file is removed.
///
/// The file is locked while this value exists, so that two runs cannot write the same target (where the
/// file system supports locks).
#[derive(Debug)]
pub(crate) struct PartialFile {
    file: File,
    paths: Paths,
    written: u64,
    /// Whether there is a manifest for this file.
    kept: bool,
    committed: bool,
}

#[derive(Debug)]
struct Paths {
    target: PathBuf,
    data: PathBuf,
    manifest: PathBuf,
}

impl Paths {
    fn of(path: &Path) -> Result<Self> {
        let target = regular_target(path)?;
        let with_ending = |ending: &str| {
            let mut name = OsString::from(target.as_os_str());
            name.push(ending);
            PathBuf::from(name)
        };
        Ok(Paths { data: with_ending(".partial"), manifest: with_ending(".partial.json"), target })
    }
}

impl PartialFile {
    /// Opens the file of an interrupted run, or creates an empty one.
    ///
    /// # Errors
    /// Another run has the file open, or it cannot be created.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let paths = Paths::of(path)?;
        let fail = |e| Error::io("create the incomplete file of", path, e);
        if !paths.data.exists() {
            // The manifest of a run that was interrupted after its last rename.
            remove_if_exists(&paths.manifest).map_err(fail)?;
        }
        let mut options = File::options();
        options.read(true).write(true);
        let (file, new) = match options.clone().create_new(true).open(&paths.data) {
            Ok(file) => (file, true),
            Err(e) if e.kind() == Io::AlreadyExists => {
                (options.open(&paths.data).map_err(fail)?, false)
            }
            Err(e) => return Err(fail(e)),
        };
        // Between opening and locking, another run may have renamed the file to the target.
        let in_use = matches!(file.try_lock(), Err(TryLockError::WouldBlock))
            || !is_at(&file, &paths.data).map_err(fail)?;
        if in_use {
            return Err(Error::new(ErrorKind::Io, "another run is writing this file")
                .file(path)
                .got(format!("a lock on {}", paths.data.display()))
                .hint("wait for it, or give another output"));
        }
        let kept = !new && paths.manifest.is_file();
        let written = file.metadata().map_err(fail)?.len();
        Ok(PartialFile { file, paths, written, kept, committed: false })
    }

    /// The final path.
    pub(crate) fn target(&self) -> &Path {
        &self.paths.target
    }

    /// The path of the incomplete file.
    pub(crate) fn path(&self) -> &Path {
        &self.paths.data
    }

    /// Bytes in the file.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// The manifest of the file, if there is one.
    pub(crate) fn manifest(&self) -> Result<Option<Vec<u8>>> {
        if !self.kept {
            return Ok(None);
        }
        read_limited(&self.paths.manifest, "read the manifest", MAX_MANIFEST_BYTES).map(Some)
    }

    /// The manifest of an interrupted run for `path`, without opening the incomplete file.
    pub(crate) fn manifest_of(path: &Path) -> Option<Vec<u8>> {
        let paths = Paths::of(path).ok()?;
        let manifest =
            || read_limited(&paths.manifest, "read the manifest", MAX_MANIFEST_BYTES).ok();
        if paths.data.is_file() { manifest() } else { None }
    }

    /// Empties the file.
    pub(crate) fn clear(&mut self) -> Result<()> {
        if self.kept {
            // Removed first, and durably: it must not describe bytes that are written later.
            let path = &self.paths.manifest;
            remove_if_exists(path)
                .and_then(|()| sync_folder(path))
                .map_err(|e| Error::io("remove", path, e))?;
            self.kept = false;
        }
        self.cut(0)
    }

    /// Truncates the file to `length` bytes, at most as many as it has, and continues there.
    pub(crate) fn cut(&mut self, length: u64) -> Result<()> {
        let mut cut = || {
            self.file.set_len(length)?;
            self.file.seek(SeekFrom::Start(length))
        };
        self.written = cut().map_err(|e| Error::io("write", &self.paths.data, e))?;
        Ok(())
    }

    /// Fills `buffer` with the bytes from `offset` on. The position for writing does not change.
    pub(crate) fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buffer, offset)
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io("write", &self.paths.target, e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Flushes what was written so far to the disk, then replaces the manifest.
    pub(crate) fn keep(&mut self, manifest: &[u8]) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io("write", &self.paths.target, e))?;
        let mut file = OutputFile::create(&self.paths.manifest)?;
        file.write(manifest)?;
        file.commit()?;
        self.kept = true;
        Ok(())
    }

    /// Flushes the file to the disk and renames it to the target.
    pub(crate) fn commit(mut self) -> Result<()> {
        let Paths { target, data, manifest } = &self.paths;
        let fail = |e| Error::io("write", target, e);
        self.file.sync_all().map_err(fail)?;
        let length = self.file.metadata().map_err(fail)?.len();
        if length != self.written {
            return Err(Error::new(
                ErrorKind::Io,
                "the file does not have the length that was written",
            )
            .file(target)
            .expected(format!("{} bytes", self.written))
            .got(length));
        }
        fs::rename(data, target).map_err(fail)?;
        self.committed = true;
        // Removed last: after an interruption here it describes a file that no longer exists.
        if self.kept {
            remove_if_exists(manifest).map_err(fail)?;
        }
        sync_folder(target).map_err(fail)
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.committed && !self.kept {
            // The caller reports an earlier error; this one would hide it.
            let _ = fs::remove_file(&self.paths.data);
        }
    }
}

fn remove_if_exists(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != Io::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn without_a_manifest_the_incomplete_file_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "old").unwrap();
        let mut file = PartialFile::open(&path).unwrap();
        file.clear().unwrap();
        file.write(b"half").unwrap();
        drop(file);
        assert_eq!(names(dir.path()), ["out"]);
        let mut file = PartialFile::open(&path).unwrap();
        file.write(b"whole").unwrap();
        file.commit().unwrap();
        assert_eq!(names(dir.path()), ["out"]);
        assert_eq!(fs::read(&path).unwrap(), b"whole");
    }

    #[test]
    fn kept_bytes_are_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = PartialFile::open(&path).unwrap();
        assert_eq!(file.manifest().unwrap(), None);
        file.write(b"one").unwrap();
        file.keep(b"3").unwrap();
        file.write(b"torn").unwrap();
        drop(file);
        assert_eq!(names(dir.path()), ["out.partial", "out.partial.json"]);
        assert_eq!(PartialFile::manifest_of(&path).unwrap(), b"3");

        let mut file = PartialFile::open(&path).unwrap();
        assert_eq!((file.manifest().unwrap().unwrap(), file.written()), (b"3".to_vec(), 7));
        file.cut(3).unwrap();
        file.write(b"two").unwrap();
        file.commit().unwrap();
        assert_eq!(names(dir.path()), ["out"]);
        assert_eq!(fs::read(&path).unwrap(), b"onetwo");
    }

    #[test]
    fn clearing_removes_the_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let mut file = PartialFile::open(&path).unwrap();
        file.write(b"one").unwrap();
        file.keep(b"3").unwrap();
        drop(file);
        let mut file = PartialFile::open(&path).unwrap();
        file.clear().unwrap();
        assert_eq!((file.manifest().unwrap(), file.written()), (None, 0));
        assert_eq!(names(dir.path()), ["out.partial"]);
        drop(file);
        assert_eq!(names(dir.path()), [""; 0]);
        // A manifest without its file must not be used for a new file.
        fs::write(dir.path().join("out.partial.json"), "3").unwrap();
        assert_eq!(PartialFile::manifest_of(&path), None);
        assert_eq!(PartialFile::open(&path).unwrap().manifest().unwrap(), None);
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn two_runs_do_not_write_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        let file = PartialFile::open(&path).unwrap();
        let error = PartialFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("another run is writing this file"), "{error}");
        drop(file);
        PartialFile::open(&path).unwrap();
    }
}
