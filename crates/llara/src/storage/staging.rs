//! Writing a model folder atomically: files are written to a hidden folder and moved in together.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::generated::CARD_FILE;
use super::output::write_failed;
use super::replace::{self, Guard, PARTIAL, POOLING_FILE, POOLING_FOLDER};
use crate::{Error, ErrorKind, Result};

/// A model or adapter folder being written.
///
/// Files are written to a hidden folder inside the target. [`commit`] flushes them to the disk and
/// replaces the model in the target by renames; see [`replace`](super::replace) for the states after a
/// crash. [`keep_unverified`] moves them to a sibling of the target instead. If this value is dropped
/// without either, the target is unchanged, and removed if it was created here.
///
/// [`commit`]: Staging::commit
/// [`keep_unverified`]: Staging::keep_unverified
pub(crate) struct Staging {
    target: PathBuf,
    /// `None` once committed or kept.
    folder: Option<PathBuf>,
    /// The staged folder, opened and locked: only the folder of a process that has ended is removed.
    _lock: File,
    created_target: bool,
    /// The file by which tools recognize a complete folder.
    last: &'static str,
}

impl Staging {
    /// Creates `target` if it does not exist, and an empty hidden folder in it. `last` is the file by which
    /// tools recognize a complete folder. Interrupted saves in `target` are finished or removed.
    pub(crate) fn new(target: &Path, last: &'static str) -> Result<Self> {
        let created_target = !target.exists();
        let io = |e| Error::io("write to the folder", target, e);
        fs::create_dir_all(target).map_err(|e| Error::io("create the folder", target, e))?;
        // Held until the new folder has its own lock, so that no other process removes it.
        let _guard = Guard::lock(target)?;
        replace::finish_locked(target)?;
        let folder = tempfile::Builder::new().prefix(PARTIAL).tempdir_in(target).map_err(io)?;
        let lock = File::open(folder.path()).map_err(io)?;
        // Fails only if the file system does not support locks.
        let _ = lock.try_lock();
        let folder = Some(folder.keep());
        Ok(Staging { target: target.to_owned(), folder, _lock: lock, created_target, last })
    }

    /// The final folder.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// The hidden folder to write to.
    pub(crate) fn path(&self) -> &Path {
        self.folder.as_deref().unwrap_or(&self.target)
    }

    /// Writes a small file. `name` may contain the folder `1_Pooling`.
    pub(crate) fn write(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.path().join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)
                .map_err(|e| write_failed("create the folder of", &self.target.join(name), e))?;
        }
        fs::write(&path, contents).map_err(|e| write_failed("write", &self.target.join(name), e))
    }

    /// Replaces the model or adapter in the target by the staged one. Other files of the target remain.
    ///
    /// # Errors
    /// A file cannot be flushed or renamed. Then either the target is unchanged, or the new model is
    /// complete in a hidden folder and the next save or load of the target moves it into place.
    pub(crate) fn commit(mut self) -> Result<()> {
        self.flush()?;
        let _guard = Guard::lock(&self.target)?;
        self.refuse_folders()?;
        let Some(folder) = self.folder.clone() else { return Ok(()) };
        let replaced = replace::replace(&self.target, &folder);
        if !folder.exists() {
            // Renamed to `.ready-X`: it is complete and must not be removed.
            self.folder = None;
            self.created_target = false;
        }
        replaced.map_err(|e| {
            let error = Error::io("move the saved model into place", &self.target, e);
            match self.folder {
                Some(_) => error,
                None => error.hint(
                    "the new model is complete in a hidden folder inside this one: the next load or save \
                     of this folder moves it into place",
                ),
            }
        })
    }

    /// Moves the files of a model that failed its verification to `TARGET.unverified-N`, or to
    /// `TARGET/unverified-N` if the parent folder is not writable. The target is not changed.
    pub(crate) fn keep_unverified(mut self) -> Result<PathBuf> {
        self.flush()?;
        let Some(folder) = self.folder.clone() else { return Ok(self.target.clone()) };
        let absolute = std::path::absolute(&self.target);
        let target = absolute.map_err(|e| Error::io("find", &self.target, e))?;
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".unverified");
        let kept = move_to_numbered(&folder, &target.with_file_name(name))
            .or_else(|_| move_to_numbered(&folder, &self.target.join("unverified")))
            .map_err(|e| Error::io("keep the unverified model in", &self.target, e))?;
        self.folder = None;
        if let Some(parent) = kept.parent() {
            replace::sync(parent).map_err(|e| Error::io("flush the folder", parent, e))?;
        }
        Ok(kept)
    }

    /// Makes all files and their names durable.
    fn flush(&self) -> Result<()> {
        let io = |e| write_failed("flush the saved files of", &self.target, e);
        let names = replace::names(self.path()).map_err(io)?;
        for name in &names {
            let path = self.path().join(name);
            if path.is_dir() {
                for name in replace::names(&path).map_err(io)? {
                    replace::sync(&path.join(name)).map_err(io)?;
                }
            }
            replace::sync(&path).map_err(io)?;
        }
        replace::sync(self.path()).map_err(io)?;
        replace::sync(&self.target).map_err(io)?;
        if let Some(parent) = self.target.parent().filter(|path| !path.as_os_str().is_empty()) {
            // Makes the target's own name durable. This user may lack permission to read the parent.
            let _ = replace::sync(parent);
        }
        if names.iter().any(|name| name == self.last) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Config, format!("the saved folder lacks {}", self.last))
            .file(&self.target))
    }

    /// A folder with the name of a file belongs to the user and is not moved; this is an error.
    fn refuse_folders(&self) -> Result<()> {
        let io = |e| Error::io("read the folder", self.path(), e);
        for name in replace::names(self.path()).map_err(io)? {
            if name == CARD_FILE {
                continue; // Whatever a user has in its place stays.
            }
            let path = self.target.join(&name);
            if path.is_dir() && name != POOLING_FOLDER {
                return Err(Error::new(
                    ErrorKind::Io,
                    "a folder has the name of a file to be written",
                )
                .file(path)
                .expected("a file, or nothing")
                .hint("rename it, or choose another output folder"));
            }
        }
        self.refuse_files_beside_pooling()
    }

    /// The pooling folder of an earlier model is removed with it: nothing else may be in it.
    fn refuse_files_beside_pooling(&self) -> Result<()> {
        let folder = self.target.join(POOLING_FOLDER);
        if !folder.is_dir() {
            return Ok(());
        }
        let io = |e| Error::io("read the folder", &folder, e);
        let other = |name: &std::ffi::OsString| {
            name != POOLING_FILE || !folder.join(name).is_file() || folder.is_symlink()
        };
        match replace::names(&folder).map_err(io)?.into_iter().find(other) {
            None => Ok(()),
            Some(name) => {
                Err(Error::new(ErrorKind::Io, "another file is in the folder of the pooling")
                    .file(folder.join(name))
                    .expected(format!("at most {POOLING_FILE} in {POOLING_FOLDER}"))
                    .hint("move it away, or choose another folder"))
            }
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(folder) = self.folder.take() {
            // The caller reports an earlier error; this one would hide it.
            let _ = fs::remove_dir_all(folder);
        }
        if self.created_target {
            // Fails if another program has created a file there; the folder must then remain.
            let _ = fs::remove_dir(&self.target);
        }
    }
}

/// Renames a folder to the first unused name of `NAME-1`, `NAME-2`, ….
fn move_to_numbered(folder: &Path, name: &Path) -> std::io::Result<PathBuf> {
    for number in 1u32.. {
        let mut numbered = name.as_os_str().to_owned();
        numbered.push(format!("-{number}"));
        let numbered = PathBuf::from(numbered);
        // Creating it reserves the name; a rename replaces an empty folder.
        match fs::create_dir(&numbered) {
            Ok(()) => {
                return match fs::rename(folder, &numbered) {
                    Ok(()) => Ok(numbered),
                    Err(e) => {
                        let _ = fs::remove_dir(&numbered);
                        Err(e)
                    }
                };
            }
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
    }
    Err(std::io::Error::other("all numbers are in use"))
}

#[cfg(test)]
mod tests {
    use super::super::generated::with_seal;
    use super::super::replace::{crash, finish_interrupted};
    use super::*;

    /// Files of a complete model; old and new differ in shards and contents.
    const OLD: [&str; 7] = [
        "1_Pooling/config.json",
        "modules.json",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "llara_probes.json",
        "tokenizer.json",
    ];
    const NEW: [&str; 4] = ["config.json", "model.safetensors", "tokenizer.json", "llara.json"];

    fn names(dir: &Path) -> Vec<String> {
        let names = replace::names(dir).unwrap();
        names.into_iter().map(|name| name.into_string().unwrap()).collect()
    }

    fn is_complete(dir: &Path, files: &[&str], contents: &str) -> bool {
        files.iter().all(|name| fs::read_to_string(dir.join(name)).is_ok_and(|c| c == contents))
    }

    /// A folder with an old model and files of the user.
    fn old_model(target: &Path) {
        fs::create_dir_all(target.join(POOLING_FOLDER)).unwrap();
        OLD.iter().for_each(|name| fs::write(target.join(name), "old").unwrap());
        fs::write(target.join("notes.txt"), "mine").unwrap();
    }

    fn stage_new(target: &Path) -> Staging {
        let staging = Staging::new(target, "config.json").unwrap();
        NEW.iter().for_each(|name| staging.write(name, b"new").unwrap());
        staging
    }

    #[test]
    fn dropping_removes_the_staged_folder_and_a_created_target() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        drop(stage_new(&target));
        assert!(!target.exists());
    }

    #[test]
    fn commit_replaces_the_earlier_model_and_keeps_other_files() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        old_model(&target);
        fs::write(target.join("corpus.safetensors"), "mine").unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            fs::write(target.join(name), "old").unwrap();
        }
        stage_new(&target).commit().unwrap();
        let mut expected = NEW.to_vec();
        expected.extend(["corpus.safetensors", "notes.txt"]);
        expected.sort_unstable();
        assert_eq!(names(&target), expected);
        assert!(is_complete(&target, &NEW, "new"));
    }

    #[test]
    fn a_crash_at_any_step_leaves_a_complete_model_and_is_finished_later() {
        let mut steps = 0;
        loop {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("model");
            old_model(&target);
            let staging = stage_new(&target);
            crash::after(Some(steps));
            let result = staging.commit();
            crash::after(None);
            // The old one in its place or moved away, or the new one before or after its move.
            let inside = || names(&target).into_iter().map(|name| target.join(name));
            let folders: Vec<_> = inside().filter(|path| path.is_dir()).collect();
            let in_place = is_complete(&target, &OLD, "old") || is_complete(&target, &NEW, "new");
            let aside = |d: &PathBuf| is_complete(d, &OLD, "old") || is_complete(d, &NEW, "new");
            assert!(in_place || folders.iter().any(aside), "after {steps} steps");
            if result.is_ok() {
                assert!(folders.is_empty());
                break;
            }
            // The next save first finishes the replacement; dropping it keeps the finished model.
            let never_ready = steps == 0;
            drop(Staging::new(&target, "config.json").unwrap());
            let (files, contents): (&[&str], _) =
                if never_ready { (&OLD, "old") } else { (&NEW, "new") };
            assert!(is_complete(&target, files, contents), "after {steps} steps");
            let first = |name: &&'static str| name.split('/').next().unwrap();
            let mut expected: Vec<&str> = files.iter().map(first).collect();
            expected.push("notes.txt");
            expected.sort_unstable();
            assert_eq!(names(&target), expected, "after {steps} steps");
            steps += 1;
        }
        assert!(steps > OLD.len() + NEW.len(), "only {steps} steps");
    }

    #[test]
    fn the_pooling_folder_is_replaced_at_any_crash_unless_other_files_are_in_it() {
        const POOLING: &str = "1_Pooling/config.json";
        for steps in 0.. {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("model");
            old_model(&target);
            let staging = stage_new(&target);
            staging.write(POOLING, b"new").unwrap();
            crash::after(Some(steps));
            let result = staging.commit();
            crash::after(None);
            drop(Staging::new(&target, "config.json").unwrap());
            let contents = if steps == 0 { "old" } else { "new" };
            assert!(is_complete(&target, &[POOLING, "config.json"], contents), "{steps}");
            if result.is_ok() {
                break;
            }
        }
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        old_model(&target);
        fs::write(target.join("1_Pooling/notes.txt"), "mine").unwrap();
        let message = stage_new(&target).commit().unwrap_err().to_string();
        assert!(message.contains("1_Pooling/notes.txt"), "{message}");
        assert!(is_complete(&target, &OLD, "old"));
    }

    #[test]
    fn a_new_model_interrupted_in_an_empty_folder_is_finished() {
        for steps in 1.. {
            let root = tempfile::tempdir().unwrap();
            let target = root.path().join("model");
            let staging = stage_new(&target);
            crash::after(Some(steps));
            let result = staging.commit();
            crash::after(None);
            if result.is_ok() {
                break;
            }
            assert!(finish_interrupted(&target).unwrap().finished || names(&target).len() == 4);
            assert!(is_complete(&target, &NEW, "new"), "after {steps} steps");
            assert_eq!(names(&target).len(), NEW.len());
        }
    }

    #[test]
    fn only_leftovers_of_processes_that_have_ended_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        fs::create_dir_all(target.join(".partial-killed")).unwrap();
        fs::write(target.join(".partial-killed/model.safetensors"), "half").unwrap();
        let alive = stage_new(&target);
        assert_eq!(finish_interrupted(&target).unwrap(), Default::default());
        assert!(!target.join(".partial-killed").exists() && alive.path().is_dir());
        alive.commit().unwrap();
        assert!(is_complete(&target, &NEW, "new"));
    }

    #[test]
    fn an_unverified_model_is_kept_next_to_the_target() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        for number in 1..3 {
            let kept = stage_new(&target).keep_unverified().unwrap();
            assert_eq!(kept.file_name().unwrap(), &*format!("model.unverified-{number}"));
            assert!(is_complete(&kept, &NEW, "new"));
        }
        assert!(!target.exists());
        old_model(&target);
        stage_new(&target).keep_unverified().unwrap();
        assert!(is_complete(&target, &OLD, "old"));
    }

    #[test]
    fn a_card_of_the_user_stays_at_any_crash_and_a_generated_one_is_replaced() {
        let card = |text: &str| with_seal(text.to_owned());
        let edited = card("old").replace("old", "mine");
        for (before, after) in [
            (card("old"), card("new")),
            ("mine".to_owned(), "mine".to_owned()),
            (edited.clone(), edited),
        ] {
            for steps in 0.. {
                let root = tempfile::tempdir().unwrap();
                let target = root.path().join("model");
                old_model(&target);
                fs::write(target.join(CARD_FILE), &before).unwrap();
                let staging = stage_new(&target);
                staging.write(CARD_FILE, card("new").as_bytes()).unwrap();
                crash::after(Some(steps));
                let result = staging.commit();
                crash::after(None);
                drop(Staging::new(&target, "config.json").unwrap());
                let now = fs::read_to_string(target.join(CARD_FILE)).unwrap();
                let never_ready = steps == 0;
                assert_eq!(now, if never_ready { &before } else { &after }.as_str(), "{steps}");
                if result.is_ok() {
                    break;
                }
            }
        }
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        fs::create_dir_all(target.join(CARD_FILE)).unwrap();
        let staging = stage_new(&target);
        staging.write(CARD_FILE, card("new").as_bytes()).unwrap();
        staging.commit().unwrap();
        assert!(target.join(CARD_FILE).is_dir() && is_complete(&target, &NEW, "new"));
    }

    #[test]
    fn a_folder_with_the_name_of_a_file_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        fs::create_dir_all(target.join("llara.json/of the user")).unwrap();
        let message = stage_new(&target).commit().unwrap_err().to_string();
        assert!(message.contains("llara.json") && message.contains("has the name"), "{message}");
        assert_eq!(names(&target), ["llara.json"]);
    }
}
