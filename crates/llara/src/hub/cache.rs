//! The local cache of one model, in the layout of the Hub's own tools:
//! `models--org--name/{refs/<revision>, blobs/<etag>, snapshots/<commit>/<file> → ../../blobs/<etag>}`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use super::names::{ModelId, is_commit};
use crate::storage::read_limited;
use crate::{Error, Result};

/// The cache of one model.
pub(super) struct RepoCache {
    folder: PathBuf,
    revision: String,
}

impl RepoCache {
    pub(super) fn new(cache: &Path, id: &ModelId) -> Self {
        let folder = cache.join(format!("models--{}--{}", id.org, id.name));
        RepoCache { folder, revision: id.revision.clone() }
    }

    /// The commit to which the revision referred at the last download.
    pub(super) fn commit(&self) -> Option<String> {
        if is_commit(&self.revision) {
            return Some(self.revision.clone());
        }
        let path = self.folder.join("refs").join(&self.revision);
        let text = String::from_utf8(read_limited(&path, "read the reference", 1024).ok()?).ok()?;
        Some(text.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    /// The folder with the files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The path of a file of the snapshot, if it exists.
    pub(super) fn file(&self, commit: &str, name: &str) -> Option<PathBuf> {
        Some(self.snapshot(commit).join(name)).filter(|path| path.is_file())
    }

    /// The path of a blob. `etag` must have been checked.
    fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Whether the blob exists and has this length.
    pub(super) fn has_blob(&self, etag: &str, length: u64) -> bool {
        self.blob(etag).metadata().is_ok_and(|m| m.is_file() && m.len() == length)
    }

    /// An empty temporary file in the folder of the blobs; removed when dropped.
    pub(super) fn new_blob(&self) -> Result<NamedTempFile> {
        temporary(&self.folder.join("blobs"))
    }

    /// Renames a complete file to the name of its blob.
    pub(super) fn keep_blob(&self, file: NamedTempFile, etag: &str) -> Result<()> {
        let path = self.blob(etag);
        let fail = |e| Error::io("write to the Hub's cache", &path, e);
        file.as_file().sync_all().map_err(fail)?;
        file.persist(&path).map_err(|e| fail(e.error))?;
        Ok(())
    }

    /// Links the file `name` of the snapshot to a blob.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<PathBuf> {
        let path = self.snapshot(commit).join(name);
        let fail = |e| Error::io("write to the Hub's cache", &path, e);
        let folder = self.snapshot(commit);
        fs::create_dir_all(&folder).map_err(fail)?;
        // Created under another name and renamed, so that a broken link is replaced.
        let target = Path::new("../../blobs").join(etag);
        let linked = tempfile::Builder::new()
            .prefix(".link-")
            .make_in(&folder, |path| symlink(&target, path))
            .and_then(|link| link.persist(&path).map_err(|e| e.error));
        if linked.is_err() {
            // A file system without symbolic links.
            fs::copy(self.blob(etag), &path).map_err(fail)?;
        }
        Ok(path)
    }

    /// Records the commit to which the revision refers.
    pub(super) fn write_commit(&self, commit: &str) -> Result<()> {
        if is_commit(&self.revision) {
            return Ok(());
        }
        let path = self.folder.join("refs").join(&self.revision);
        let mut file = temporary(path.parent().unwrap_or(&self.folder))?;
        let fail = |e| Error::io("write to the Hub's cache", &path, e);
        file.write_all(commit.as_bytes()).map_err(fail)?;
        file.persist(&path).map_err(|e| fail(e.error))?;
        Ok(())
    }
}

/// A temporary file in `folder`, which is created if it does not exist, with ordinary permissions.
fn temporary(folder: &Path) -> Result<NamedTempFile> {
    let fail = |e| Error::io("write to the Hub's cache", folder, e);
    fs::create_dir_all(folder).map_err(fail)?;
    let mut builder = tempfile::Builder::new();
    builder.prefix(".fetch-").suffix(".incomplete");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder).map_err(fail)
}

#[cfg(unix)]
fn symlink(target: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn symlink(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}
