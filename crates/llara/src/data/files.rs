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

/// The files of a folder that are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct FilesOfFolder {
    /// Their extensions. Hidden files are left out.
    pub(super) extensions: &'static [&'static str],
    /// Whether those in subfolders are read too; hidden folders and links to folders are left out.
    pub(super) subfolders: bool,
}

/// Files of training rows.
pub(super) const ROW_FILES: FilesOfFolder =
    FilesOfFolder { extensions: &["jsonl", "json"], subfolders: false };

/// The files of sources, with folders replaced by the files of training rows in them: the index of the source, and
/// the path.
pub(crate) fn data_files(sources: &[DataSource]) -> Result<Vec<(usize, PathBuf)>> {
    files_of(sources, ROW_FILES)
}

/// The same for files of another kind.
pub(super) fn files_of(
    sources: &[DataSource],
    kind_of_files: FilesOfFolder,
) -> Result<Vec<(usize, PathBuf)>> {
    let mut files = Vec::new();
    for (index, DataSource { path, .. }) in sources.iter().enumerate() {
        let failed = |e| Error::io("read training data", path, e);
        let kind = fs::metadata(path).map_err(failed)?;
        if kind.is_file() {
            files.push((index, path.clone()));
        } else if kind.is_dir() {
            let mut found = Vec::new();
            let has_subfolders = add_files(path, kind_of_files, &mut found)?;
            if found.is_empty() {
                let FilesOfFolder { extensions, subfolders } = kind_of_files;
                let error = Error::new(ErrorKind::Data, "the folder has no training data")
                    .file(path)
                    .expected(format!("files whose names end in .{}", extensions.join(" or .")));
                return Err(match has_subfolders && !subfolders {
                    true => error.hint("files in subfolders are not read: give the subfolders"),
                    false => error,
                });
            }
            found.sort();
            files.extend(found.into_iter().map(|file| (index, file)));
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

/// Adds the files of a folder. Returns whether it has subfolders.
fn add_files(folder: &Path, kind: FilesOfFolder, files: &mut Vec<PathBuf>) -> Result<bool> {
    let mut folders = vec![folder.to_owned()];
    let mut has_subfolders = false;
    while let Some(folder) = folders.pop() {
        let failed = |e| Error::io("read training data", &folder, e);
        for entry in fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            // The type of a link is not that of its target, so that no cycle is followed.
            if entry.file_type().map_err(failed)?.is_dir() {
                has_subfolders = true;
                folders.extend(kind.subfolders.then_some(path));
            } else if has_extension(&path, kind.extensions) && path.is_file() {
                files.push(path);
            }
        }
    }
    Ok(has_subfolders)
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    extensions.contains(&extension)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subfolders_are_read_for_texts_only_and_links_to_folders_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for folder in ["b/c", ".hidden", "d"] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        for file in
            ["b/c/2.txt", "b/1.txt", "a.txt", "3.md", ".hidden/4.txt", "d/5.TXT", "d/.6.txt"]
        {
            fs::write(at(file), "text").unwrap();
        }
        std::os::unix::fs::symlink(dir.path(), at("b/cycle")).unwrap();
        let texts = |subfolders| FilesOfFolder { extensions: &["txt"], subfolders };
        let found = |kind| -> Vec<PathBuf> {
            let files = files_of(&[DataSource::from(dir.path().to_owned())], kind).unwrap();
            files.into_iter().map(|(_, path)| path).collect()
        };
        assert_eq!(found(texts(true)), ["a.txt", "b/1.txt", "b/c/2.txt"].map(at));
        assert_eq!(found(texts(false)), [at("a.txt")]);
        fs::remove_file(at("a.txt")).unwrap();
        let source = [DataSource::from(dir.path().to_owned())];
        let error = files_of(&source, texts(false)).unwrap_err().to_string();
        assert!(error.contains("give the subfolders"), "{error}");
    }
}
