//! The free space of a file system.

use std::path::Path;

use crate::{Error, Result};

/// The number of bytes that this user can still write to the file system of `path`. The path and its
/// parent folders need not exist yet.
///
/// # Errors
/// [`ErrorKind::Io`](crate::ErrorKind::Io): the file system does not report its free space.
pub fn free_disk_bytes(path: &Path) -> Result<u64> {
    let absolute = std::path::absolute(path).map_err(|e| Error::io("find", path, e))?;
    let existing = absolute.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let stat = rustix::fs::statvfs(existing)
        .map_err(|e| Error::io("read the free disk space of", existing, e.into()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_does_not_exist_yet_has_the_space_of_its_file_system() {
        let dir = tempfile::tempdir().unwrap();
        assert!(free_disk_bytes(&dir.path().join("a/b/c")).unwrap() > 0);
    }
}
