//! The folder that a verb fills: refused when there is something in it, made when all else is known
//! to be well.

use std::fs;
use std::path::Path;

use llara::{Error, ErrorKind, Result};

/// Names shown of what is in the way.
const SHOWN: usize = 5;

/// Removes a folder that holds nothing but an empty log, so that the same run can be started again.
pub(super) fn discard_if_nothing_was_logged(path: &Path) {
    let Ok(mut entries) = fs::read_dir(path) else { return };
    let idle = entries.all(|entry| {
        entry.is_ok_and(|entry| match entry.file_name().to_str() {
            Some("log.jsonl") => entry.metadata().is_ok_and(|log| log.len() == 0),
            name => name == Some("runs"),
        })
    });
    if idle {
        // Why the run failed is what is to be told, not this.
        let _ = fs::remove_dir_all(path);
    }
}

/// Refuses a folder that is not empty, unless it may be overwritten, and whatever is not a folder.
pub(super) fn check(path: &Path, overwrite: bool) -> Result<()> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io("use this as the output folder", path, e)),
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect();
    if names.is_empty() || overwrite {
        return Ok(());
    }
    names.sort_unstable();
    let more = if names.len() > SHOWN { ", …" } else { "" };
    Err(Error::new(ErrorKind::Argument, "the output folder is not empty")
        .file(path)
        .expected("a new or an empty folder")
        .got(format!("{}{more}", names[..names.len().min(SHOWN)].join(", ")))
        .hint("choose another folder, or replace what is there with --overwrite-output-dir"))
}
