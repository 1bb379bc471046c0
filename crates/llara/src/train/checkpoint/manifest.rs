//! The manifest of a checkpoint: length and hash of each file. It is written last, so a folder without a manifest
//! is incomplete. Files that have changed since are detected.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::storage::{CARD_FILE, open_file, read_limited};
use crate::{Error, ErrorKind, Result};

/// Name of the manifest in a checkpoint.
pub(super) const MANIFEST_FILE: &str = "manifest.json";
/// Maximum size of a manifest in bytes.
const MAX_BYTES: u64 = 16 << 20;
/// Version of the format.
const FORMAT: u32 = 1;

/// The contents of the manifest: written by [`write`], checked by [`verify`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    format: u32,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    bytes: u64,
    blake3: String,
}

/// Flushes every file of `folder` to the disk, then writes and flushes the manifest.
///
/// # Errors
/// When a file cannot be read or flushed, or the manifest cannot be written.
pub(crate) fn write(folder: &Path) -> Result<()> {
    let mut files = BTreeMap::new();
    for name in names(folder)? {
        let path = folder.join(&name);
        let io = |e| Error::io("flush", &path, e);
        File::open(&path).and_then(|file| file.sync_all()).map_err(io)?;
        let name = name.into_string().map_err(|name| {
            Error::new(ErrorKind::Io, "a file's name is not UTF-8").file(folder.join(name))
        })?;
        files.insert(name, entry(&path).map_err(io)?);
    }
    let manifest = Manifest { format: FORMAT, files };
    let path = folder.join(MANIFEST_FILE);
    let io = |e| Error::io("write", &path, e);
    let json = serde_json::to_vec_pretty(&manifest).map_err(|e| io(e.into()))?;
    fs::write(&path, json).map_err(io)?;
    File::open(&path).and_then(|file| file.sync_all()).map_err(io)?;
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io)
}

/// Checks that `folder` is complete and that every file is the one that was written.
///
/// # Errors
/// If a file is missing or differs; the error has the name of the file.
pub(super) fn verify(folder: &Path) -> Result<()> {
    let manifest = read(folder)?;
    manifest.files.iter().try_for_each(|(name, entry)| check_file(folder, name, entry))?;
    unlisted(folder, &manifest)?.into_iter().next().map_or(Ok(()), Err)
}

/// Every file that is missing or differs; [`verify`] stops at the first.
pub(super) fn faults(folder: &Path) -> Vec<Error> {
    let manifest = match read(folder) {
        Ok(manifest) => manifest,
        Err(error) => return vec![error],
    };
    let files = manifest.files.iter();
    let mut faults: Vec<Error> =
        files.filter_map(|(name, entry)| check_file(folder, name, entry).err()).collect();
    match unlisted(folder, &manifest) {
        Ok(unlisted) => faults.extend(unlisted),
        Err(error) => faults.push(error),
    }
    faults
}

fn damaged(what: &str, path: &Path) -> Error {
    Error::new(ErrorKind::Io, what).file(path)
}

fn read(folder: &Path) -> Result<Manifest> {
    let path = folder.join(MANIFEST_FILE);
    if !path.exists() {
        return Err(damaged("the checkpoint has no manifest", &path)
            .expected("a manifest.json, which is written when all other files are complete"));
    }
    let text = read_limited(&path, "read the manifest", MAX_BYTES)?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|e| damaged("the manifest of the checkpoint is damaged", &path).because(e))?;
    if manifest.format != FORMAT {
        return Err(damaged("the checkpoint has another format", &path)
            .expected(format!("format {FORMAT}"))
            .got(manifest.format));
    }
    Ok(manifest)
}

fn check_file(folder: &Path, name: &str, expected: &Entry) -> Result<()> {
    // The manifest is untrusted input: its names must not be paths out of the folder.
    if Path::new(name).file_name() != Some(name.as_ref()) {
        let path = folder.join(MANIFEST_FILE);
        return Err(damaged("the manifest names a file outside of the checkpoint", &path)
            .expected("names without a folder")
            .got(name.escape_debug()));
    }
    let file = folder.join(name);
    let got = entry(&file).map_err(|e| Error::io("read a file of the checkpoint", &file, e))?;
    if got == *expected {
        return Ok(());
    }
    let show = |entry: &Entry| format!("{} bytes, blake3 {}", entry.bytes, entry.blake3);
    Err(damaged("a file of the checkpoint is damaged", &file)
        .expected(show(expected))
        .got(show(&got)))
}

/// Files that the manifest does not list: they would be read without a check.
fn unlisted(folder: &Path, manifest: &Manifest) -> Result<Vec<Error>> {
    let mut faults = Vec::new();
    for name in names(folder)? {
        let text = name.to_string_lossy();
        if is_read(&text) && !manifest.files.contains_key(&*text) {
            let error =
                damaged("the manifest of the checkpoint does not list a file", &folder.join(&name));
            faults
                .push(error.expected("every .json and .safetensors file with its length and hash"));
        }
    }
    Ok(faults)
}

fn is_read(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    matches!(extension, Some("json" | "safetensors"))
}

/// The files of a folder except the manifest and the model card, sorted by name.
fn names(folder: &Path) -> Result<Vec<OsString>> {
    let io = |e| Error::io("read the checkpoint", folder, e);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        // A user may edit the model card.
        let listed = name != MANIFEST_FILE && name != CARD_FILE;
        if listed && entry.file_type().map_err(io)?.is_file() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn entry(path: &Path) -> std::io::Result<Entry> {
    let mut file = open_file(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            read => {
                hasher.update(&buffer[..read]);
                bytes += read as u64;
            }
        }
    }
    Ok(Entry { bytes, blake3: hasher.finalize().to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("a.json", "{}"), ("model.safetensors", "weights"), ("notes.txt", "")]
        {
            fs::write(dir.path().join(name), text).unwrap();
        }
        write(dir.path()).unwrap();
        verify(dir.path()).unwrap();
        dir
    }

    fn refused(dir: &Path) -> String {
        verify(dir).unwrap_err().to_string()
    }

    #[test]
    fn every_kind_of_damage_is_detected_and_the_file_is_named() {
        let change = |name: &str, text: &str| {
            let dir = checkpoint();
            fs::write(dir.path().join(name), text).unwrap();
            refused(dir.path())
        };
        assert!(change("model.safetensors", "weighty").contains("model.safetensors: a file"));
        assert!(change("model.safetensors", "weight").contains("6 bytes"));
        assert!(change("new.safetensors", "").contains("new.safetensors: the manifest"));
        for lie in [
            "",
            "[]",
            r#"{"format": 1}"#,
            r#"{"format": 2, "files": {}}"#,
            r#"{"format": 1, "files": {}}"#,
            r#"{"format": 1, "files": {"../a.json": {"bytes": 2, "blake3": "x"}}}"#,
            r#"{"format": 1, "files": {"/etc/passwd": {"bytes": 2, "blake3": "x"}}}"#,
            r#"{"format": 1, "files": {"a.json": {"bytes": 2, "blake3": "x"}}}"#,
            r#"{"format": 1, "files": {"gone.json": {"bytes": 2, "blake3": "x"}}}"#,
        ] {
            let text = change(MANIFEST_FILE, lie);
            assert!(text.contains(".json"), "{lie}: {text}");
        }
        let dir = checkpoint();
        fs::remove_file(dir.path().join("a.json")).unwrap();
        assert!(refused(dir.path()).contains("a.json"));
        let dir = checkpoint();
        fs::remove_file(dir.path().join(MANIFEST_FILE)).unwrap();
        assert!(refused(dir.path()).contains("no manifest"));
    }

    #[test]
    fn other_files_of_the_user_are_ignored() {
        let dir = checkpoint();
        fs::write(dir.path().join("remarks.md"), "good run").unwrap();
        verify(dir.path()).unwrap();
    }
}
