//! An output file that appears complete or not at all: temporary sibling, fsync, rename.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use super::write_failed;
use crate::{Error, ErrorKind, Result};

/// A file being written beside its target. [`commit`](Self::commit) puts it in the target's place;
/// dropped without it, the target stays as it was and nothing is left behind.
#[derive(Debug)]
pub(crate) struct OutputFile {
    writer: BufWriter<NamedTempFile>,
    target: PathBuf,
    written: u64,
}

impl OutputFile {
    /// Starts writing `path`. Errors that would occur at the end are found here where possible.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let target = regular_target(path)?;
        let temp = temporary_sibling(&target)
            .map_err(|e| Error::io("create a file beside this one", path, e))?;
        Ok(OutputFile { writer: BufWriter::with_capacity(1 << 18, temp), target, written: 0 })
    }

    /// The file that will appear.
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

    /// Flushes everything to the disk and gives the file its name.
    pub(crate) fn commit(self) -> Result<()> {
        let OutputFile { writer, target, written } = self;
        let fail = |e| write_failed("write", &target, e);
        let temp = writer.into_inner().map_err(|e| fail(e.into_error()))?;
        temp.as_file().sync_all().map_err(fail)?;
        let length = temp.as_file().metadata().map_err(fail)?.len();
        if length != written {
            // A write failed and the caller continued.
            return Err(Error::new(ErrorKind::Io, "the file has not the length that was written")
                .file(&target)
                .expected(format!("{written} bytes"))
                .got(length));
        }
        temp.persist(&target).map_err(|e| fail(e.error))?;
        sync_folder(&target).map_err(fail)
    }
}

/// Refuses a path at which no file can be written: no regular file, no file name, or a folder that does
/// not exist or is read-only. Nothing stays behind.
pub(crate) fn check_output_path(path: &Path) -> Result<()> {
    OutputFile::create(path).map(drop)
}

/// The file that writing `path` replaces: the target of a symbolic link, else `path` itself.
///
/// # Errors
/// There is something other than a regular file, or `path` ends in a separator or `..`.
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

/// A new file in the folder of `target`, with the permissions that a plain new file would have.
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

/// Makes a rename or a removal durable; only Unix can open a folder for that.
pub(super) fn sync_folder(target: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(folder(target))?.sync_all() } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn appears_whole_or_not_at_all() {
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
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "a temporary file stayed");
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
    fn links_are_written_through_and_permissions_are_ordinary() {
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
