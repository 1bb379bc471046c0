//! An exclusive lock on an output folder, held by one process at a time and released by the
//! operating system when that process ends.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::partial::is_at;
use crate::{Error, ErrorKind, Result};

/// Name of the lock file in the locked folder.
pub(crate) const LOCK_FILE: &str = ".llara.lock";
/// How often a lock file that another process removes at the same moment is created again.
const ATTEMPTS: usize = 100;

/// The exclusive right to write into a folder.
///
/// The lock is an advisory `flock` on `.llara.lock` inside the folder, which also records the process
/// id of the holder. It ends with the process, also after a crash or SIGKILL; a lock file that such a
/// process left is reused. On a file system without locks every call succeeds.
///
/// ```
/// let dir = std::env::temp_dir().join(format!("llara-lock-{}", std::process::id()));
/// let lock = llara::FolderLock::acquire(&dir)?;
/// assert!(llara::FolderLock::acquire(&dir).is_err());
/// drop(lock);
/// assert!(!dir.exists(), "a folder that the lock created is removed if nothing was written to it");
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Debug)]
pub struct FolderLock {
    /// Open for as long as the lock is held.
    _file: File,
    path: PathBuf,
    /// Folders that were created for the lock, outermost first.
    created: Vec<PathBuf>,
}

impl FolderLock {
    /// Creates the folder if it does not exist, and locks it.
    ///
    /// # Errors
    /// When another process holds the lock (its process id is named), or the folder cannot be
    /// created or written to.
    pub fn acquire(folder: &Path) -> Result<Self> {
        let mut created: Vec<PathBuf> = folder
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
            .map(Path::to_owned)
            .collect();
        created.reverse();
        let locked = fs::create_dir_all(folder)
            .map_err(|e| Error::io("create the output folder", folder, e))
            .and_then(|()| lock(folder));
        match locked {
            Ok(file) => Ok(FolderLock { _file: file, path: folder.join(LOCK_FILE), created }),
            Err(error) => {
                remove_if_empty(&created);
                Err(error)
            }
        }
    }

    /// Whether the folder did not exist before it was locked.
    pub fn created_folder(&self) -> bool {
        !self.created.is_empty()
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        // Removed while still locked: a process that has opened this file finds that it is gone.
        let _ = fs::remove_file(&self.path);
        remove_if_empty(&self.created);
    }
}

fn remove_if_empty(folders: &[PathBuf]) {
    for folder in folders.iter().rev() {
        let _ = fs::remove_dir(folder);
    }
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK_FILE);
    let fail = |e| Error::io("lock the output folder", folder, e);
    for _ in 0..ATTEMPTS {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // A link in this place must not redirect the write below, a pipe must not block.
            .custom_flags(
                (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32
            )
            .open(&path)
            .map_err(fail)?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => return Err(held(folder, &mut file)),
            // The file system has no locks.
            Err(TryLockError::Error(_)) | Ok(()) => {}
        }
        if is_at(&file, &path).map_err(fail)? {
            let id = format!("{}\n", std::process::id());
            file.set_len(0).and_then(|()| file.write_all(id.as_bytes())).map_err(fail)?;
            return Ok(file);
        }
    }
    Err(held(folder, &mut File::open(&path).map_err(fail)?))
}

fn held(folder: &Path, file: &mut File) -> Error {
    let mut id = String::new();
    let read = file.take(20).read_to_string(&mut id);
    let id = read.ok().and_then(|_| id.trim().parse::<u32>().ok());
    Error::new(ErrorKind::Io, "another process is writing into this folder")
        .file(folder)
        .expected("one process for each output folder")
        .got(match id {
            Some(id) => format!("a lock held by process {id}"),
            None => format!("a lock on {LOCK_FILE}"),
        })
        .hint("wait until it has ended, or choose another folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_and_told_the_process_id() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b");
        let lock = FolderLock::acquire(&folder).unwrap();
        assert!(lock.created_folder());
        let message = FolderLock::acquire(&folder).unwrap_err().to_string();
        let id = format!("process {}", std::process::id());
        assert!(message.contains("another process") && message.contains(&id), "{message}");
        drop(lock);
        assert!(!root.path().join("a").exists());
    }

    #[test]
    fn a_lock_file_of_a_process_that_has_ended_is_reused() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join(LOCK_FILE), "4000000000\n").unwrap();
        let lock = FolderLock::acquire(root.path()).unwrap();
        assert!(!lock.created_folder());
        let id = fs::read_to_string(root.path().join(LOCK_FILE)).unwrap();
        assert_eq!(id, format!("{}\n", std::process::id()));
        drop(lock);
        assert!(root.path().is_dir() && !root.path().join(LOCK_FILE).exists());
    }

    #[test]
    fn a_link_in_the_place_of_the_lock_file_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("own.txt");
        fs::write(&own, "mine").unwrap();
        std::os::unix::fs::symlink(&own, root.path().join(LOCK_FILE)).unwrap();
        assert!(FolderLock::acquire(root.path()).is_err());
        assert_eq!(fs::read_to_string(&own).unwrap(), "mine");
    }
}
