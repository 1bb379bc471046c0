//! Exclusive locks on an output folder or an output file. A lock is held by one process at a time and
//! released by the operating system when that process ends.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::output::regular_target;
use crate::{Error, ErrorKind, Result};

/// Name of the lock file in a locked folder.
const LOCK_FILE: &str = ".llara.lock";
/// How often a lock file that another process removes at the same moment is created again.
const ATTEMPTS: usize = 100;

/// The exclusive right to write to a folder.
///
/// The lock is an advisory `flock` on the file `.llara.lock` inside the folder, which also records the
/// process id of the holder. It ends with the process, also after a crash or SIGKILL; a lock file that
/// remains after that is reused. If the file system does not support locks, every call succeeds.
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
    lock: Option<LockFile>,
    /// Folders that were created for the lock, outermost first.
    created: Vec<PathBuf>,
}

impl FolderLock {
    /// Creates the folder if it does not exist, and locks it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]: another process holds the lock (the error states its process id), or the folder
    /// cannot be created or written to.
    pub fn acquire(folder: &Path) -> Result<Self> {
        let mut created: Vec<PathBuf> = folder
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists())
            .map(Path::to_owned)
            .collect();
        created.reverse();
        let locked = fs::create_dir_all(folder)
            .map_err(|e| Error::io("create the output folder", folder, e))
            .and_then(|()| {
                LockFile::acquire(folder.join(LOCK_FILE), |lock| match lock {
                    Failed::Held(got) => held("another process is writing to this folder", got)
                        .file(folder)
                        .expected("one process for each output folder")
                        .hint("wait until it has ended, or choose another folder"),
                    Failed::Io(e) => Error::io("lock the output folder", folder, e),
                })
            });
        match locked {
            Ok(lock) => Ok(FolderLock { lock: Some(lock), created }),
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
        // First the lock file: a folder that contains it is not empty.
        drop(self.lock.take());
        remove_if_empty(&self.created);
    }
}

/// The exclusive right to write an output file. The lock file is `.NAME.lock` in the folder of the file;
/// otherwise the same as [`FolderLock`].
///
/// ```
/// # let dir = tempfile::tempdir().unwrap();
/// let path = dir.path().join("embeddings.npy");
/// let lock = llara::OutputLock::acquire(&path)?;
/// assert!(llara::OutputLock::acquire(&path).is_err());
/// drop(lock);
/// assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Debug)]
pub struct OutputLock {
    _lock: LockFile,
}

impl OutputLock {
    /// Locks the output file `path`, which need not exist. Its folder must exist.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]: another process holds the lock (the error states its process id), `path` names
    /// something other than a regular file, or its folder is missing or read-only.
    pub fn acquire(path: &Path) -> Result<Self> {
        let target = regular_target(path)?;
        let mut name = OsString::from(".");
        name.push(target.file_name().unwrap_or_default());
        name.push(".lock");
        let lock = LockFile::acquire(target.with_file_name(name), |lock| match lock {
            Failed::Held(got) => held("another process is writing this file", got)
                .file(path)
                .expected("one process for each output file")
                .hint("wait until it has ended, or choose another output"),
            Failed::Io(e) => Error::io("lock the output file", path, e),
        })?;
        Ok(OutputLock { _lock: lock })
    }
}

/// A locked file. It is removed when this value is dropped.
#[derive(Debug)]
struct LockFile {
    /// Open for as long as the lock is held.
    _file: File,
    path: PathBuf,
}

/// Why a file could not be locked.
enum Failed {
    /// Another process holds the lock. With its process id or the name of the lock file.
    Held(String),
    Io(io::Error),
}

impl LockFile {
    /// Creates the file if it does not exist, and locks it; `error` converts a failure.
    fn acquire(path: PathBuf, error: impl Fn(Failed) -> Error) -> Result<Self> {
        Self::try_acquire(path).map_err(error)
    }

    fn try_acquire(path: PathBuf) -> Result<Self, Failed> {
        for _ in 0..ATTEMPTS {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                // A symbolic link must not redirect the write below; a named pipe must not block.
                .custom_flags(
                    (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits() as i32
                )
                .open(&path)
                .map_err(Failed::Io)?;
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => return Err(holder(&path, &mut file)),
                // The file system does not support locks.
                Err(TryLockError::Error(_)) | Ok(()) => {}
            }
            if is_at(&file, &path).map_err(Failed::Io)? {
                let id = format!("{}\n", std::process::id());
                file.set_len(0).and_then(|()| file.write_all(id.as_bytes())).map_err(Failed::Io)?;
                return Ok(LockFile { _file: file, path });
            }
        }
        Err(holder(&path, &mut File::open(&path).map_err(Failed::Io)?))
    }
}

impl Drop for LockFile {
    fn drop(&mut self) {
        // Removed while still locked: a process that has opened this file detects that it is gone.
        let _ = fs::remove_file(&self.path);
    }
}

/// The process that holds a lock, as its lock file records it.
fn holder(path: &Path, file: &mut File) -> Failed {
    let mut id = String::new();
    let read = file.take(20).read_to_string(&mut id);
    Failed::Held(match read.ok().and_then(|_| id.trim().parse::<u32>().ok()) {
        Some(id) => format!("a lock held by process {id}"),
        None => format!("a lock on {}", path.display()),
    })
}

fn held(what: &str, got: String) -> Error {
    Error::new(ErrorKind::Io, what).got(got)
}

fn remove_if_empty(folders: &[PathBuf]) {
    for folder in folders.iter().rev() {
        let _ = fs::remove_dir(folder);
    }
}

/// Whether an open file is the file that `path` names.
pub(super) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (open.dev(), open.ino())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_holder_is_refused_with_the_process_id_of_the_first() {
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
    fn a_symbolic_link_named_as_the_lock_file_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("own.txt");
        fs::write(&own, "mine").unwrap();
        std::os::unix::fs::symlink(&own, root.path().join(LOCK_FILE)).unwrap();
        assert!(FolderLock::acquire(root.path()).is_err());
        assert_eq!(fs::read_to_string(&own).unwrap(), "mine");
    }

    #[test]
    fn an_output_file_is_locked_by_its_resolved_path() {
        let root = tempfile::tempdir().unwrap();
        let (file, link) = (root.path().join("v.npy"), root.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let lock = OutputLock::acquire(&file).unwrap();
        let message = OutputLock::acquire(&link).unwrap_err().to_string();
        assert!(message.contains(&format!("process {}", std::process::id())), "{message}");
        let other = OutputLock::acquire(&root.path().join("w.npy")).unwrap();
        drop((lock, other));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 2);
        assert!(OutputLock::acquire(&root.path().join("no/v.npy")).is_err());
        assert!(OutputLock::acquire(root.path()).is_err());
    }
}
