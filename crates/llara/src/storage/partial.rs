//! A resumable output file: the bytes written so far beside the target, and a manifest that describes
//! them.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind as Io, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::OutputFile;
use super::output::{regular_target, sync_folder};
use super::staging::remove_if_there;
use crate::{Error, ErrorKind, Result};

/// A file being written as `TARGET.partial`, with a manifest `TARGET.partial.json` as soon as there
/// is something worth keeping. [`commit`](Self::commit) puts it in the target's place and removes
/// the manifest.
///
/// The manifest is replaced atomically, and only after the bytes it describes are on the disk, so it
/// is correct after a crash. Dropped without a manifest, the file is removed; dropped with one, both
/// files stay.
///
/// The file is locked while this exists, so that two runs cannot write the same target (where the file
/// system supports locks).
#[derive(Debug)]
pub(crate) struct PartialFile {
    file: File,
    paths: Paths,
    written: u64,
    /// Whether there is a manifest of this file.
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
        let beside = |ending: &str| {
            let mut name = OsString::from(target.as_os_str());
            name.push(ending);
            PathBuf::from(name)
        };
        Ok(Paths { data: beside(".partial"), manifest: beside(".partial.json"), target })
    }
}

impl PartialFile {
    /// Opens the file that an interrupted run left, or a new empty one.
    ///
    /// # Errors
    /// When another run has it open, or it cannot be created.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let paths = Paths::of(path)?;
        let fail = |e| Error::io("create a file beside this one", path, e);
        if !paths.data.exists() {
            // Left by a run that was interrupted after its last rename.
            remove_if_there(&paths.manifest).map_err(fail)?;
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
        // Between opening and locking, another run may have put the file in its place.
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
        let path = &self.paths.manifest;
        fs::read(path).map(Some).map_err(|e| Error::io("read the manifest", path, e))
    }

    /// The manifest that an interrupted run left for `path`, without opening its file.
    pub(crate) fn manifest_of(path: &Path) -> Option<Vec<u8>> {
        let paths = Paths::of(path).ok()?;
        if paths.data.is_file() { fs::read(paths.manifest).ok() } else { None }
    }

    /// Empties the file.
    pub(crate) fn clear(&mut self) -> Result<()> {
        if self.kept {
            // First, and durably: the manifest must never describe what is written from now on.
            let path = &self.paths.manifest;
            remove_if_there(path)
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

    /// Flushes everything to the disk and gives the file its name.
    pub(crate) fn commit(mut self) -> Result<()> {
        let Paths { target, data, manifest } = &self.paths;
        let fail = |e| Error::io("write", target, e);
        self.file.sync_all().map_err(fail)?;
        let length = self.file.metadata().map_err(fail)?.len();
        if length != self.written {
            return Err(Error::new(ErrorKind::Io, "the file has not the length that was written")
                .file(target)
                .expected(format!("{} bytes", self.written))
                .got(length));
        }
        fs::rename(data, target).map_err(fail)?;
        self.committed = true;
        // Last: if interrupted before this, the manifest describes a file that no longer exists.
        if self.kept {
            remove_if_there(manifest).map_err(fail)?;
        }
        sync_folder(target).map_err(fail)
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.committed && !self.kept {
            // An earlier error is the one to report.
            let _ = fs::remove_file(&self.paths.data);
        }
    }
}

/// Whether an open file is the one at a path.
pub(super) fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (open.dev(), open.ino())),
        Err(e) if e.kind() == Io::NotFound => Ok(false),
        Err(e) => Err(e),
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
    fn without_a_manifest_nothing_stays() {
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
    fn what_was_kept_is_found_again() {
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
    fn cleared_its_manifest_goes_before_its_bytes() {
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
        // A manifest without its file must not come to speak of another.
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
