//! The files of training data: folders replaced by the files in them, and the lines of a file that hold rows.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use super::DataSource;
use crate::storage::{LineReader, MAX_LINE_BYTES, compressed, open_file};
use crate::{Error, ErrorKind, Result};

/// Bytes that are read from a file at a time.
const READ_BYTES: usize = 1 << 18;

/// A line of a file that is not blank.
pub(crate) struct RowLine<'l> {
    /// Line number, from 1.
    pub(crate) number: u32,
    /// Offset of its first byte from the start of the file.
    pub(crate) offset: u64,
    /// The line without its line ending, or the error if it is too long.
    pub(crate) bytes: Result<&'l [u8]>,
}

/// Opens a file of training data.
///
/// # Errors
/// The file cannot be opened, or is not a regular file.
pub(crate) fn open_data_file(path: &Path) -> Result<File> {
    open_file(path).map_err(|e| Error::io("read training data", path, e))
}

/// Calls `on_row` with each line of a file that is not blank, in order.
///
/// # Errors
/// Reading fails; the file is empty, compressed, one JSON array, or has too many lines; or `on_row` fails.
pub(crate) fn read_rows(
    path: &Path,
    file: &File,
    on_row: impl FnMut(RowLine<'_>) -> Result<()>,
) -> Result<()> {
    match read_lines(path, file, on_row)? {
        true => Ok(()),
        false => Err(no_rows(path)),
    }
}

/// The error of a file of rows without any.
pub(super) fn no_rows(path: &Path) -> Error {
    Error::new(ErrorKind::Data, "the file has no rows").file(path)
}

/// [`read_rows`] of a file that may be blank; returns whether it has a row.
///
/// # Errors
/// As for [`read_rows`].
pub(super) fn read_lines(
    path: &Path,
    file: &File,
    mut on_row: impl FnMut(RowLine<'_>) -> Result<()>,
) -> Result<bool> {
    let failed = |e| Error::io("read training data", path, e);
    let mut lines = LineReader::new(BufReader::with_capacity(READ_BYTES, file));
    let mut blank = true;
    while let Some(line) = lines.next_line().map_err(failed)? {
        if line.number == 1
            && let Some(error) = compressed(path, line.start)
        {
            return Err(error);
        }
        if line.content.is_some_and(|content| content.trim_ascii().is_empty()) {
            continue;
        }
        let number = u32::try_from(line.number).map_err(|_| {
            Error::new(ErrorKind::Data, "the file has too many lines")
                .file(path)
                .expected(format!("at most {}", u32::MAX))
                .hint("split the file")
        })?;
        if blank && line.start.trim_ascii_start().first() == Some(&b'[') {
            return Err(Error::new(ErrorKind::Data, "the file is a JSON array")
                .line(path, line.number)
                .expected("one JSON object per line")
                .hint("convert it: jq -c '.[]' old.json > new.jsonl"));
        }
        blank = false;
        let bytes = line.content.ok_or_else(|| {
            Error::new(ErrorKind::Data, "the line is too long")
                .line(path, line.number)
                .expected(format!("one row of at most {} MiB", MAX_LINE_BYTES >> 20))
        });
        on_row(RowLine { number, offset: line.offset, bytes })?;
    }
    Ok(!blank)
}

/// Extensions of files of training rows.
pub(super) const ROW_FILES: &[&str] = &["jsonl", "json"];

/// The files of sources, with folders replaced by the files of training rows in them: the index of the source, and
/// the path.
pub(crate) fn data_files(sources: &[DataSource]) -> Result<Vec<(usize, PathBuf)>> {
    files_with_extensions(sources, ROW_FILES)
}

/// The same for files that have one of these extensions.
pub(super) fn files_with_extensions(
    sources: &[DataSource],
    extensions: &[&str],
) -> Result<Vec<(usize, PathBuf)>> {
    let mut files = Vec::new();
    for (index, DataSource { path, .. }) in sources.iter().enumerate() {
        let failed = |e| Error::io("read training data", path, e);
        let kind = fs::metadata(path).map_err(failed)?;
        if kind.is_file() {
            files.push((index, path.clone()));
        } else if kind.is_dir() {
            let before = files.len();
            for entry in fs::read_dir(path).map_err(failed)? {
                let file = entry.map_err(failed)?.path();
                if is_data_file(&file, extensions) {
                    files.push((index, file));
                }
            }
            if files.len() == before {
                return Err(Error::new(ErrorKind::Data, "the folder has no training data")
                    .file(path)
                    .expected(format!("files whose names end in .{}", extensions.join(" or ."))));
            }
            files[before..].sort();
        } else {
            return Err(Error::new(ErrorKind::Data, "this is neither a file nor a folder")
                .file(path)
                .hint(
                    "rows are read in random order, so a pipe cannot be used: write a file first",
                ));
        }
    }
    Ok(files)
}

fn is_data_file(path: &Path, extensions: &[&str]) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    !hidden && extensions.contains(&extension) && path.is_file()
}
