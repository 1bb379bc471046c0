//! An output file that is written atomically: a temporary file in the same folder, fsync, rename.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use crate::{Error, ErrorKind, Result};

/// A file being written to a temporary file in the folder of its target. [`commit`](Self::commit)
/// replaces the target by it. If it is dropped before, the target is unchanged and the temporary file is
/// removed.
#[derive(Debug)]
pub(crate) struct OutputFile {
    writer: BufWriter<NamedTempFile>,
    target: PathBuf,
    written: u64,
}

impl OutputFile {
    /// Creates the temporary file. Errors that [`commit`](Self::commit) would report are reported here
    /// where that is possible.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let target = regular_target(path)?;
        let temp = temporary_sibling(&target)
            .map_err(|e| Error::io("create a temporary file in the folder of", path, e))?;
        Ok(OutputFile { writer: BufWriter::with_capacity(1 << 18, temp), target, written: 0 })
    }

    /// The final path.
    pub(crate) fn path(&self) -> &Path {
        &self.target
    }

    /// Bytes written so far.
    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_all(bytes).map_err(|e| write_failed("write", &self.target, e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Flushes the file to the disk and renames it to the final path.
    pub(crate) fn commit(self) -> Result<()> {
        let OutputFile { writer, target, written } = self;
        let fail = |e| write_failed("write", &target, e);
        let temp = writer.into_inner().map_err(|e| fail(e.into_error()))?;
        temp.as_file().sync_all().map_err(fail)?;
        let length = temp.as_file().metadata().map_err(fail)?.len();
        if length != written {
            // A write failed and the caller continued.
            return Err(Error::new(
                ErrorKind::Io,
                "the file does not have the length that was written",
            )
            .file(&target)
            .expected(format!("{written} bytes"))
            .got(length));
        }
        temp.persist(&target).map_err(|e| fail(e.error))?;
        sync_folder(&target).map_err(fail)
    }
}

/// Replaces the file at `path` by one with these contents, or creates it; after a failure or a crash the
/// earlier file is complete.
///
/// # Errors
/// The file cannot be written, or something other than a regular file is there.
pub fn replace_file(path: &Path, contents: &[u8]) -> Result<()> {
    let mut file = OutputFile::create(path)?;
    file.write(contents)?;
    file.commit()
}

/// Replaces a file in a folder that one process writes to. After a crash the earlier or the new file
/// is complete, but it is not flushed to the disk: for what can be made again. The new file has the fixed name
/// `.NAME.new` while it is written, so that the next run overwrites what a killed process leaves.
///
/// # Errors
/// The file cannot be written.
pub fn refresh_file(path: &Path, contents: &[u8]) -> Result<()> {
    let new = unfinished_name(path);
    std::fs::write(&new, contents).and_then(|()| std::fs::rename(&new, path)).map_err(|e| {
        // The error of writing is reported; this one would hide it.
        let _ = std::fs::remove_file(&new);
        write_failed("write", path, e)
    })
}

/// Removes what a process leaves that was killed in [`refresh_file`].
pub(crate) fn remove_unfinished_file(path: &Path) {
    // If it cannot be removed, it is overwritten.
    let _ = std::fs::remove_file(unfinished_name(path));
}

fn unfinished_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

/// Fails for a path at which no file can be written: something other than a regular file is there, the path
/// has no file name, or the folder does not exist or is read-only. Leaves no file.
pub(crate) fn check_output_path(path: &Path) -> Result<()> {
    OutputFile::create(path).map(drop)
}

/// The file that writing to `path` replaces: the target of a symbolic link, otherwise `path` itself.
///
/// # Errors
/// Something other than a regular file is there, or `path` ends in a separator or `..`.
pub(super) fn regular_target(path: &Path) -> Result<PathBuf> {
    let bytes = path.as_os_str().as_encoded_bytes();
    if path.file_name().is_none() || bytes.ends_with(b"/") || bytes.ends_with(b"/.") {
        return Err(Error::new(ErrorKind::Io, "cannot write: this is the path of a folder")
            .file(path)
            .hint("give the path of a file"));
    }
    let target = match std::fs::canonicalize(path) {
        Ok(target) => target,
        Err(_) => path.to_owned(),
    };
    if std::fs::metadata(&target).is_ok_and(|m| !m.is_file()) {
        return Err(Error::new(ErrorKind::Io, "cannot write: this is not a regular file")
            .file(path)
            .hint("give the path of a file; folders, pipes and devices cannot be replaced"));
    }
    Ok(target)
}

/// A new file in the folder of `target`, with the permissions of an ordinary new file.
fn temporary_sibling(target: &Path) -> std::io::Result<NamedTempFile> {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(target.file_name().unwrap_or_default());
    prefix.push(".");
    let mut builder = Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(std::fs::Permissions::from_mode(0o666)); // less the umask
    }
    builder.tempfile_in(folder(target))
}

fn folder(target: &Path) -> &Path {
    target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename or a removal in the folder of `target` durable. Only Unix can open a folder for that.
pub(super) fn sync_folder(target: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder(target))?.sync_all() } else { Ok(()) }
}

/// The error of a failed write to a file that is removed when a write fails.
pub(super) fn write_failed(action: &str, path: &Path, source: std::io::Error) -> Error {
    use std::io::ErrorKind as Io;
    let full = matches!(source.kind(), Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge);
    let error = Error::io(action, path, source);
    if full {
        error.hint("free some space or choose another folder; the incomplete file was removed")
    } else {
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_changes_only_at_commit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.txt");
        std::fs::write(&path, "old").unwrap();
        let mut dropped = OutputFile::create(&path).unwrap();
        dropped.write(b"half").unwrap();
        drop(dropped);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
        let mut kept = OutputFile::create(&path).unwrap();
        kept.write(b"new").unwrap();
        kept.commit().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file remains");
    }

    #[test]
    fn folders_devices_and_missing_parents_are_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(OutputFile::create(dir.path()).is_err());
        for end in ["/", "/.", "/.."] {
            let path = PathBuf::from(format!("{}/new.npy{end}", dir.path().display()));
            let error = check_output_path(&path).unwrap_err().to_string();
            assert!(error.contains("the path of a folder"), "{error}");
        }
        check_output_path(&dir.path().join("new.npy")).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = OutputFile::create(&dir.path().join("no/such/file")).unwrap_err();
        assert!(error.to_string().contains("check the path"), "{error}");
        #[cfg(unix)]
        assert!(OutputFile::create(Path::new("/dev/null")).is_err());
    }

    #[cfg(unix)]
    #[test]
    fn symbolic_links_are_followed_and_permissions_are_ordinary() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (file, link, plain) =
            (dir.path().join("file"), dir.path().join("link"), dir.path().join("plain"));
        std::fs::write(&file, "old").unwrap();
        std::fs::write(&plain, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut output = OutputFile::create(&link).unwrap();
        output.write(b"new").unwrap();
        output.commit().unwrap();
        assert_eq!(std::fs::read(&file).unwrap(), b"new");
        assert!(link.is_symlink());
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&file), mode(&plain));
    }
}
