//! JSON Lines files as one indexed list of rows: checked once, then read row by row from disk.

mod other_rows;

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::file_batches::FileRows;
use super::files::{data_files, open_data_file, read_rows};
use super::{DataSource, DataSources, TrainingRow};
use crate::storage::Fingerprint;
use crate::{Error, ErrorKind, Result};

/// What to do with a malformed row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadRows {
    /// Fail with an error that names the row.
    Error,
    /// Skip the row and count it.
    Skip,
}

/// The rows that [`BadRows::Skip`] skipped.
#[derive(Debug, Default)]
pub struct Skipped {
    /// The number of rows.
    pub count: u64,
    /// The reasons for the first few, each with its file and line.
    pub reasons: Vec<String>,
}

/// Training rows in files. Each row takes 24 bytes of memory; its text is read from disk. [`Dataset::row`]
/// reads a row from disk and may be called from several threads.
#[derive(Debug)]
pub struct Dataset {
    sources: DataSources,
    files: Vec<SourceFile>,
    rows: Vec<IndexEntry>,
    /// Indices of rows without hard negatives, ascending.
    without_negatives: Vec<usize>,
    skipped: Skipped,
}

/// The identity of a file of a [`Dataset`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// The path, as it was given or found.
    pub path: PathBuf,
    /// Number of rows that are used.
    pub rows: u64,
    /// A hash of these rows and their order. It is the same on every machine.
    pub fingerprint: u64,
}

#[derive(Debug)]
struct SourceFile {
    path: PathBuf,
    /// Index of its [`DataSource`].
    source_index: usize,
    file: OpenFile,
    /// Index of the file's first row.
    first_row: usize,
}

/// A file between reads. The first files of a dataset are kept open, so that the checked contents are read even if
/// another file replaces the path; the others are opened for each read, because the number of open files is limited.
/// A row that changed is recognized either way.
#[derive(Debug)]
enum OpenFile {
    Kept(File),
    Reopened,
}

/// The position of a row's line.
#[derive(Debug, Clone, Copy)]
struct IndexEntry {
    /// Offset from the start of the file, in bytes.
    offset: u64,
    /// Hash of the line's bytes, to detect that the file was written to.
    checksum: u64,
    /// Length in bytes, without the line ending.
    length: u32,
    /// Line number, from 1.
    line: u32,
}

/// Number of files that are kept open; the usual limit of a process is 1024.
const MAX_OPEN_FILES: usize = 256;

/// Number of reasons that are stored for skipped rows.
const MAX_REASONS: usize = 10;

impl Dataset {
    /// [`open_sources`](Self::open_sources) for the sources that `paths` name (see [`DataSources::read`]).
    ///
    /// The batching and the general instructions of a data set file are settings of a run: the caller applies
    /// them, from [`sources`](Self::sources) and [`weights_of_files`](Self::weights_of_files).
    ///
    /// # Errors
    /// As for both.
    pub fn open(paths: &[PathBuf], on_bad_row: BadRows) -> Result<Dataset> {
        Self::open_sources(DataSources::read(paths)?, on_bad_row)
    }

    /// Reads and checks every row once. Each source is a file, or a folder, of which the `.jsonl` and `.json`
    /// files are read in the order of their names, without hidden ones. Empty lines, a byte-order mark and
    /// CRLF line endings are allowed.
    ///
    /// # Errors
    /// A source cannot be read; a folder has no such file; a file is empty, is one JSON array, or has a
    /// malformed row that is not to be skipped; or no row remains.
    pub fn open_sources(sources: DataSources, on_bad_row: BadRows) -> Result<Dataset> {
        let files = data_files(&sources.sources)?;
        let mut dataset = Dataset::empty(sources);
        for (source_index, path) in files {
            dataset.index_file(source_index, path, on_bad_row)?;
        }
        dataset.check_not_empty()?;
        Ok(dataset)
    }

    fn empty(sources: DataSources) -> Dataset {
        Dataset {
            sources,
            files: Vec::new(),
            rows: Vec::new(),
            without_negatives: Vec::new(),
            skipped: Skipped::default(),
        }
    }

    fn check_not_empty(&self) -> Result<()> {
        if !self.rows.is_empty() {
            return Ok(());
        }
        let error = Error::new(ErrorKind::Data, "there are no training rows");
        Err(match self.skipped.reasons.first() {
            Some(first) => error.got(format!(
                "{} rows, all skipped; the reason for the first: {first}",
                self.skipped.count
            )),
            None => error.hint("give at least one file or folder of training rows"),
        })
    }

    /// Checks that every row can fill a group of `group_size` passages. If a row has fewer negatives than
    /// the group needs, they are repeated; a row without negatives can only fill a group of 1.
    ///
    /// # Errors
    /// [`ErrorKind::Data`] with the first row without negatives, if `group_size` is 2 or more.
    pub fn check_group(&self, group_size: usize) -> Result<()> {
        match self.without_negatives.first() {
            Some(&index) if group_size > 1 => Err(self.no_negatives(index, group_size)),
            _ => Ok(()),
        }
    }

    /// Removes the rows that [`check_group`](Self::check_group) refuses, and counts them as skipped.
    ///
    /// # Errors
    /// No row remains.
    pub fn skip_short_groups(&mut self, group_size: usize) -> Result<()> {
        if group_size <= 1 || self.without_negatives.is_empty() {
            return Ok(());
        }
        let removed = std::mem::take(&mut self.without_negatives);
        for &index in &removed {
            let reason = self.no_negatives(index, group_size);
            self.skipped.add(&reason);
        }
        for file in &mut self.files {
            file.first_row -= removed.partition_point(|&index| index < file.first_row);
        }
        let mut index = 0;
        self.rows.retain(|_| {
            index += 1;
            removed.binary_search(&(index - 1)).is_err()
        });
        self.check_not_empty()
    }

    fn no_negatives(&self, index: usize, group_size: usize) -> Error {
        let error = Error::new(ErrorKind::Data, "the row has no hard negatives")
            .expected(format!(
                "at least one passage in `neg`: a group of {group_size} is 1 positive and {} hard \
                 negatives",
                group_size - 1
            ))
            .hint(
                "use only the passages of the other rows as negatives (--train-group-size 1), or mine hard \
                 negatives for these rows first",
            );
        match self.location(index) {
            Some((path, line)) => error.line(path, line),
            None => error,
        }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Always false: opening a dataset without rows is an error.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows that were skipped.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// The file and line (from 1) of a row; `None` if there is no such row.
    pub fn location(&self, index: usize) -> Option<(&Path, u64)> {
        let (source, entry) = self.find(index)?;
        Some((&source.path, u64::from(entry.line)))
    }

    /// Reads a row. A row without a `prompt` has the query instruction of its source.
    ///
    /// # Errors
    /// There is no such row, reading failed, or the file was changed since it was checked.
    pub fn row(&self, index: usize) -> Result<TrainingRow> {
        let (file, entry) = self.entry(index)?;
        let row = TrainingRow::parse(&self.line(index)?, &file.path, entry.line.into())?;
        Ok(row.with_instructions(&self.sources.sources[file.source_index]))
    }

    /// Reads the line of a row.
    ///
    /// # Errors
    /// Those of [`row`](Self::row).
    pub(crate) fn line(&self, index: usize) -> Result<Vec<u8>> {
        let (source, entry) = self.entry(index)?;
        let changed = || {
            Error::new(ErrorKind::Data, "the file was changed after it was checked")
                .line(&source.path, entry.line.into())
                .hint("do not change training data during a run; start the run again")
        };
        let mut bytes = vec![0; entry.length as usize];
        source.read_at(&mut bytes, entry.offset)?.map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(),
            _ => Error::io("read training data", &source.path, e),
        })?;
        if checksum(&bytes) != entry.checksum {
            return Err(changed());
        }
        Ok(bytes)
    }

    fn entry(&self, index: usize) -> Result<(&SourceFile, &IndexEntry)> {
        self.find(index).ok_or_else(|| {
            Error::new(ErrorKind::Argument, format!("there is no row {index}"))
                .expected(format!("0 to {}", self.rows.len().saturating_sub(1)))
        })
    }

    /// A hash of the rows and their order. It does not depend on the machine or on the paths of the files.
    /// A resumed run can compare it to check that its data did not change.
    pub fn fingerprint(&self) -> u64 {
        fingerprint(&self.rows)
    }

    /// The identities of the files, in the order of the files.
    pub fn files(&self) -> Vec<DataFile> {
        let ends = self.files.iter().skip(1).map(|file| file.first_row).chain([self.rows.len()]);
        let file = |(file, end): (&SourceFile, usize)| {
            let rows = &self.rows[file.first_row..end];
            let fingerprint = fingerprint(rows);
            DataFile { path: file.path.clone(), rows: rows.len() as u64, fingerprint }
        };
        self.files.iter().zip(ends).map(file).collect()
    }

    /// The source of each file of [`files`](Self::files).
    pub fn sources_of_files(&self) -> impl Iterator<Item = &DataSource> {
        self.files.iter().map(|file| &self.sources.sources[file.source_index])
    }

    /// The files that have rows, with their number of rows.
    fn files_with_rows(&self) -> impl Iterator<Item = (&SourceFile, usize)> {
        let ends = self.files.iter().skip(1).map(|file| file.first_row).chain([self.rows.len()]);
        let files = self.files.iter().zip(ends).map(|(file, end)| (file, end - file.first_row));
        files.filter(|&(_, rows)| rows > 0)
    }

    /// The number of rows of each file that has any, in the order of the files.
    pub fn rows_of_files(&self) -> Vec<FileRows<'_>> {
        self.files_with_rows().map(|(file, rows)| FileRows { path: &file.path, rows }).collect()
    }

    /// The sources of the rows.
    pub fn sources(&self) -> &DataSources {
        &self.sources
    }

    /// The weight of each file of [`rows_of_files`](Self::rows_of_files): those of the sources, divided among the
    /// files of a folder in proportion to their rows. Empty: there are no weights.
    pub fn weights_of_files(&self) -> Vec<f64> {
        let mut rows_of_source = vec![0; self.sources.sources.len()];
        self.files_with_rows().for_each(|(file, rows)| rows_of_source[file.source_index] += rows);
        let weight = |(file, rows): (&SourceFile, usize)| {
            let weight = self.sources.sources[file.source_index].weight?;
            Some(weight * (rows as f64 / rows_of_source[file.source_index] as f64))
        };
        self.files_with_rows().map(weight).collect::<Option<_>>().unwrap_or_default()
    }

    fn find(&self, index: usize) -> Option<(&SourceFile, &IndexEntry)> {
        let entry = self.rows.get(index)?;
        // A file whose rows were all skipped has the same first row as the next file.
        let after = self.files.partition_point(|file| file.first_row <= index);
        Some((self.files.get(after.checked_sub(1)?)?, entry))
    }

    fn index_file(
        &mut self,
        source_index: usize,
        path: PathBuf,
        on_bad_row: BadRows,
    ) -> Result<()> {
        let file = open_data_file(&path)?;
        let first_row = self.rows.len();
        read_rows(&path, &file, |line| {
            let parse = |bytes| Ok((bytes, TrainingRow::parse(bytes, &path, line.number.into())?));
            match (line.bytes.and_then(parse), on_bad_row) {
                (Ok((bytes, row)), _) => {
                    if row.neg.is_empty() {
                        self.without_negatives.push(self.rows.len());
                    }
                    self.rows.push(IndexEntry {
                        offset: line.offset,
                        checksum: checksum(bytes),
                        length: bytes.len() as u32, // at most MAX_LINE_BYTES
                        line: line.number,
                    });
                }
                (Err(reason), BadRows::Error) => return Err(reason),
                (Err(reason), BadRows::Skip) => self.skipped.add(&reason),
            }
            Ok(())
        })?;
        self.add_file(path, source_index, (file, first_row));
        Ok(())
    }

    /// Adds a file whose rows have been added.
    fn add_file(&mut self, path: PathBuf, source_index: usize, (file, first_row): (File, usize)) {
        let file = match self.files.len() < MAX_OPEN_FILES {
            true => OpenFile::Kept(file),
            false => OpenFile::Reopened,
        };
        self.files.push(SourceFile { path, source_index, file, first_row });
    }
}

impl SourceFile {
    /// Reads exactly these bytes.
    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<std::io::Result<()>> {
        Ok(match &self.file {
            OpenFile::Kept(file) => read_at(file, bytes, offset),
            OpenFile::Reopened => read_at(&open_data_file(&self.path)?, bytes, offset),
        })
    }
}

impl Skipped {
    fn add(&mut self, reason: &Error) {
        self.count += 1;
        if self.reasons.len() < MAX_REASONS {
            self.reasons.push(reason.to_string());
        }
    }
}

fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// A hash of rows and their order.
fn fingerprint(rows: &[IndexEntry]) -> u64 {
    let mut fingerprint = Fingerprint::new();
    rows.iter().for_each(|row| fingerprint.add(&row.checksum.to_le_bytes()));
    fingerprint.short()
}

/// A hash of one line.
fn checksum(bytes: &[u8]) -> u64 {
    let mut fingerprint = Fingerprint::new();
    fingerprint.add(bytes);
    fingerprint.short()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::storage::MAX_LINE_BYTES;
    use proptest::prelude::*;

    fn row(query: &str) -> String {
        format!(r#"{{"query": "{query}", "pos": ["right"], "neg": ["wrong"]}}"#)
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    fn open(path: impl AsRef<Path>, on_bad_row: BadRows) -> Result<Dataset> {
        Dataset::open(&[path.as_ref().to_owned()], on_bad_row)
    }

    fn queries(dataset: &Dataset) -> Vec<String> {
        (0..dataset.len()).map(|i| dataset.row(i).unwrap().query).collect()
    }

    #[test]
    fn rows_without_negatives_fill_only_groups_of_one() {
        let bare = |query: &str| format!(r#"{{"query": "{query}", "pos": ["right"]}}"#);
        let dir = folder(&[
            ("1.jsonl", &format!("{}\n{}\n", bare("a"), row("b"))),
            ("2.jsonl", &format!("{}\n{}\n{}\n", row("c"), bare("d"), row("e"))),
        ]);
        let mut dataset = open(&dir, BadRows::Error).unwrap();
        assert_eq!(queries(&dataset), ["a", "b", "c", "d", "e"]);
        dataset.check_group(1).unwrap();
        let e = dataset.check_group(2).unwrap_err().to_string();
        assert!(e.contains("1.jsonl:1: ") && e.contains("--train-group-size 1"), "{e}");

        dataset.skip_short_groups(1).unwrap();
        assert_eq!((dataset.len(), dataset.skipped().count), (5, 0));
        dataset.skip_short_groups(2).unwrap();
        dataset.check_group(2).unwrap();
        assert_eq!(queries(&dataset), ["b", "c", "e"]);
        assert_eq!(dataset.location(1), Some((dir.path().join("2.jsonl").as_path(), 1)));
        assert_eq!(dataset.location(2), Some((dir.path().join("2.jsonl").as_path(), 3)));
        assert_eq!(dataset.skipped().count, 2);
        assert!(dataset.skipped().reasons[1].contains("2.jsonl:2: "));

        let none = folder(&[("1.jsonl", &bare("a"))]);
        assert!(open(&none, BadRows::Error).unwrap().skip_short_groups(2).is_err());
    }

    #[test]
    fn the_files_of_a_folder_are_read_in_the_order_of_their_names() {
        let [a, b, c] = ["a", "b", "c"].map(row);
        let dir = folder(&[
            ("2.json", &format!("\n{c}")),
            ("1.jsonl", &format!("\u{feff}{a}\r\n  \r\n{b}\n\n")),
            ("notes.txt", "not data"),
            (".hidden.jsonl", "not data"),
        ]);
        fs::create_dir(dir.path().join("0.jsonl")).unwrap();
        let dataset = open(&dir, BadRows::Error).unwrap();
        assert_eq!(queries(&dataset), ["a", "b", "c"]);
        assert_eq!(dataset.location(1), Some((dir.path().join("1.jsonl").as_path(), 3)));
        assert_eq!(dataset.location(2), Some((dir.path().join("2.json").as_path(), 2)));
        assert_eq!(dataset.location(3), None);
        assert!(dataset.row(3).unwrap_err().to_string().contains("0 to 2"));
        assert_eq!(dataset.skipped().count, 0);
    }

    #[test]
    fn bad_rows_are_refused_or_counted() {
        let (a, b) = (row("a"), row("b"));
        let bad = "{\"query\": 3}\n".repeat(12);
        let dir = folder(&[("x.jsonl", &format!("{a}\n{bad}{b}\n")), ("w.jsonl", &bad)]);
        let path = dir.path().join("x.jsonl");
        let e = open(&path, BadRows::Error).unwrap_err().to_string();
        assert!(e.contains("x.jsonl:2: `query`"), "{e}");
        let dataset = open(&dir, BadRows::Skip).unwrap();
        assert_eq!(queries(&dataset), ["a", "b"]);
        assert_eq!(dataset.location(1).unwrap(), (path.as_path(), 14));
        assert_eq!((dataset.skipped().count, dataset.skipped().reasons.len()), (24, MAX_REASONS));
        assert!(dataset.skipped().reasons[0].contains("w.jsonl:1"));
        let e = open(dir.path().join("w.jsonl"), BadRows::Skip).unwrap_err().to_string();
        assert!(e.contains("12 rows, all skipped"), "{e}");
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        let dir = folder(&[("empty", ""), ("blank", " \n\r\n"), ("array", "\n [\n{}\n]\n")]);
        let refuse =
            |name: &str| open(dir.path().join(name), BadRows::Skip).unwrap_err().to_string();
        assert!(refuse("empty").contains("empty: the file has no rows"));
        assert!(refuse("blank").contains("no rows"));
        assert!(refuse("array").contains("array:2: the file is a JSON array"));
        assert!(refuse("").contains("no training data"));
        assert!(refuse("nowhere").contains("check the path"));
        assert!(Dataset::open(&[], BadRows::Error).is_err());
        assert!(open("/dev/null", BadRows::Error).unwrap_err().to_string().contains("neither"));
    }

    #[test]
    fn a_line_beyond_the_limit_is_not_held_in_memory() {
        let long = " ".repeat(MAX_LINE_BYTES as usize + 5);
        let dir = folder(&[("x.jsonl", &format!("{}\n{long}\n{}", row("a"), row("b")))]);
        let path = dir.path().join("x.jsonl");
        let e = open(&path, BadRows::Error).unwrap_err().to_string();
        assert!(e.contains("x.jsonl:2: the line is too long"), "{e}");
        let dataset = open(&path, BadRows::Skip).unwrap();
        assert_eq!(queries(&dataset), ["a", "b"]);
        assert_eq!(dataset.location(1).unwrap().1, 3);
        fs::write(&path, format!("[{long}]")).unwrap();
        let e = open(&path, BadRows::Skip).unwrap_err().to_string();
        assert!(e.contains("x.jsonl:1: the file is a JSON array"), "{e}");
    }

    #[test]
    fn a_changed_file_is_detected() {
        let (a, b) = (row("a"), row("b"));
        let dir = folder(&[("x.jsonl", &format!("{a}\n{b}\n"))]);
        let path = dir.path().join("x.jsonl");
        let dataset = open(&path, BadRows::Error).unwrap();
        let fingerprint = dataset.fingerprint();
        fs::write(&path, format!("{a}\n{}\n", row("x"))).unwrap();
        assert_eq!(dataset.row(0).unwrap().query, "a");
        let e = dataset.row(1).unwrap_err().to_string();
        assert!(e.contains("x.jsonl:2: the file was changed"), "{e}");
        assert_ne!(open(&path, BadRows::Error).unwrap().fingerprint(), fingerprint);
        fs::write(&path, &a).unwrap();
        assert!(dataset.row(1).unwrap_err().to_string().contains("was changed"));
        // Rows with another path and other empty lines are the same.
        let moved = folder(&[("y.jsonl", &format!("{a}\n\n{b}"))]);
        assert_eq!(open(&moved, BadRows::Error).unwrap().fingerprint(), fingerprint);
    }

    #[test]
    fn rows_are_read_from_many_threads() {
        let text: String = (0..500).map(|i| row(&format!("q{i}")) + "\n").collect();
        let dir = folder(&[("x.jsonl", &text)]);
        let dataset = open(&dir, BadRows::Error).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for i in 0..500 {
                        assert_eq!(dataset.row(i).unwrap().query, format!("q{i}"));
                    }
                });
            }
        });
    }

    /// Lines of a file: valid rows, invalid rows, empty lines, any bytes.
    fn line() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            4 => "[a-zäß ]{0,9}x".prop_map(|q| row(&q).into_bytes()),
            1 => Just(b" \t".to_vec()),
            1 => Just(b"{\"query\": \"q\"}".to_vec()),
            1 => prop::collection::vec(any::<u8>().prop_filter("ends a line", |&b| b != b'\n'), 0..20),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_index_equals_reading_the_entire_file(
            lines in prop::collection::vec(line(), 0..20), crlf: bool, ended: bool, mark: bool,
        ) {
            let mut bytes = if mark { b"\xef\xbb\xbf".to_vec() } else { Vec::new() };
            // One valid row, so that the file is not refused.
            let first = row("first").into_bytes();
            let all: Vec<&[u8]> = [first.as_slice()].into_iter().chain(lines.iter().map(Vec::as_slice)).collect();
            bytes.extend(all.join(if crlf { &b"\r\n"[..] } else { &b"\n"[..] }));
            if ended {
                bytes.push(b'\n');
            }
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.jsonl");
            fs::write(&path, &bytes).unwrap();

            let dataset = open(&path, BadRows::Skip).unwrap();
            let naive: Vec<(u64, Result<TrainingRow>)> = all
                .iter()
                .zip(1u64..)
                .filter(|(line, _)| !line.trim_ascii().is_empty())
                .map(|(line, n)| (n, TrainingRow::parse(line, &path, n)))
                .collect();
            let good: Vec<(u64, &TrainingRow)> =
                naive.iter().filter_map(|(n, r)| Some((*n, r.as_ref().ok()?))).collect();
            prop_assert_eq!(dataset.len(), good.len());
            prop_assert_eq!(dataset.skipped().count as usize, naive.len() - good.len());
            for (i, (line, row)) in good.iter().enumerate() {
                prop_assert_eq!(&dataset.row(i).unwrap(), *row);
                prop_assert_eq!(dataset.location(i).unwrap().1, *line);
            }
        }
    }
}
