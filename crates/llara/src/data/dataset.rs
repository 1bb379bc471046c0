//! JSON-lines files as one indexed list of rows: checked once, then read row by row from disk.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::TrainingRow;
use crate::storage::{LineReader, MAX_LINE_BYTES};
use crate::{Error, ErrorKind, Result};

/// What to do with a row that is malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadRows {
    /// Refuse the data, naming the row.
    Error,
    /// Leave the row out and count it.
    Skip,
}

/// Rows that [`BadRows::Skip`] left out.
#[derive(Debug, Default)]
pub struct Skipped {
    /// How many.
    pub count: u64,
    /// Why, for the first few, each with its file and line.
    pub reasons: Vec<String>,
}

/// Training rows in files. Memory holds 24 bytes for each row, not its text; [`Dataset::row`] is
/// one read from disk and may be called from many threads.
#[derive(Debug)]
pub struct Dataset {
    files: Vec<SourceFile>,
    rows: Vec<IndexEntry>,
    /// Indices of rows without hard negatives, ascending.
    without_negatives: Vec<usize>,
    skipped: Skipped,
}

/// What identifies a file of a [`Dataset`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataFile {
    /// As it was given or found.
    pub path: PathBuf,
    /// Rows that are used.
    pub rows: u64,
    /// A number that tells other rows, or another order of them, from these: the same on every machine.
    pub fingerprint: u64,
}

#[derive(Debug)]
struct SourceFile {
    path: PathBuf,
    /// Kept open: what was checked stays readable though the path be replaced.
    file: File,
    /// Index of the file's first row.
    first_row: usize,
}

/// Where a row's line is.
#[derive(Debug, Clone, Copy)]
struct IndexEntry {
    /// Bytes from the start of the file.
    offset: u64,
    /// Of the line's bytes, to notice that the file was written to.
    checksum: u64,
    /// Bytes, without the end of the line.
    length: u32,
    /// From 1.
    line: u32,
}

/// Reasons kept of skipped rows.
const MAX_REASONS: usize = 10;

impl Dataset {
    /// Reads and checks every row once. Each path is a file, or a folder whose `.jsonl` and `.json`
    /// files are taken in the order of their names, hidden ones left out. Blank lines, a byte-order
    /// mark and CRLF are allowed.
    ///
    /// # Errors
    /// A path cannot be read; a folder has no such file; a file is empty, one JSON array, or has a
    /// malformed row that is not to be skipped; no row is left.
    pub fn open(paths: &[PathBuf], on_bad_row: BadRows) -> Result<Dataset> {
        let mut dataset = Dataset {
            files: Vec::new(),
            rows: Vec::new(),
            without_negatives: Vec::new(),
            skipped: Skipped::default(),
        };
        for path in data_files(paths)? {
            dataset.index_file(path, on_bad_row)?;
        }
        dataset.check_not_empty()?;
        Ok(dataset)
    }

    fn check_not_empty(&self) -> Result<()> {
        if !self.rows.is_empty() {
            return Ok(());
        }
        let error = Error::new(ErrorKind::Data, "there is no row to train on");
        Err(match self.skipped.reasons.first() {
            Some(first) => error.got(format!(
                "{} rows, all skipped, the first for this reason: {first}",
                self.skipped.count
            )),
            None => error.hint("name at least one file or folder of training rows"),
        })
    }

    /// Checks that every row can fill a group of `group_size` passages. A row with fewer negatives
    /// than that repeats them; a row without any fits only a group of 1.
    ///
    /// # Errors
    /// The first row without negatives, where the group needs one.
    pub fn check_group(&self, group_size: usize) -> Result<()> {
        match self.without_negatives.first() {
            Some(&index) if group_size > 1 => Err(self.no_negatives(index, group_size)),
            _ => Ok(()),
        }
    }

    /// Leaves out the rows that [`check_group`](Self::check_group) refuses, and counts them as
    /// skipped.
    ///
    /// # Errors
    /// When no row is left.
    pub fn skip_short_groups(&mut self, group_size: usize) -> Result<()> {
        if group_size <= 1 || self.without_negatives.is_empty() {
            return Ok(());
        }
        let left_out = std::mem::take(&mut self.without_negatives);
        for &index in &left_out {
            let reason = self.no_negatives(index, group_size);
            self.skipped.add(&reason);
        }
        for file in &mut self.files {
            file.first_row -= left_out.partition_point(|&index| index < file.first_row);
        }
        let mut index = 0;
        self.rows.retain(|_| {
            index += 1;
            left_out.binary_search(&(index - 1)).is_err()
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
                "train with the other rows of the batch as negatives alone: --train-group-size 1; or \
                 mine hard negatives for these rows first",
            );
        match self.location(index) {
            Some((path, line)) => error.line(path, line),
            None => error,
        }
    }

    /// How many rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Never true: a dataset without rows does not open.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// What was left out.
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    /// The file and line (from 1) of a row; `None` beyond the last.
    pub fn location(&self, index: usize) -> Option<(&Path, u64)> {
        let (source, entry) = self.find(index)?;
        Some((&source.path, u64::from(entry.line)))
    }

    /// Reads a row.
    ///
    /// # Errors
    /// There is no such row, reading failed, or the file is no longer what was checked.
    pub fn row(&self, index: usize) -> Result<TrainingRow> {
        let (source, entry) = self.find(index).ok_or_else(|| {
            Error::new(ErrorKind::Argument, format!("there is no row {index}"))
                .expected(format!("0 to {}", self.rows.len().saturating_sub(1)))
        })?;
        let changed = || {
            Error::new(ErrorKind::Data, "the file was changed after it had been checked")
                .line(&source.path, entry.line.into())
                .hint("leave training data alone while a run reads it; start again")
        };
        let mut bytes = vec![0; entry.length as usize];
        read_at(&source.file, &mut bytes, entry.offset).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => changed(),
            _ => Error::io("read training data", &source.path, e),
        })?;
        if fnv1a(FNV_START, &bytes) != entry.checksum {
            return Err(changed());
        }
        TrainingRow::parse(&bytes, &source.path, entry.line.into())
    }

    /// A number that tells other rows, or another order of them, from these: the same on every
    /// machine, wherever the files are. A resumed run can check that its data did not change.
    pub fn fingerprint(&self) -> u64 {
        fingerprint(&self.rows)
    }

    /// The files in their order, with what identifies their rows.
    pub fn files(&self) -> Vec<DataFile> {
        let ends = self.files.iter().skip(1).map(|file| file.first_row).chain([self.rows.len()]);
        let file = |(file, end): (&SourceFile, usize)| {
            let rows = &self.rows[file.first_row..end];
            let fingerprint = fingerprint(rows);
            DataFile { path: file.path.clone(), rows: rows.len() as u64, fingerprint }
        };
        self.files.iter().zip(ends).map(file).collect()
    }

    fn find(&self, index: usize) -> Option<(&SourceFile, &IndexEntry)> {
        let entry = self.rows.get(index)?;
        // A file whose rows were all skipped starts where the next one does.
        let after = self.files.partition_point(|file| file.first_row <= index);
        Some((self.files.get(after.checked_sub(1)?)?, entry))
    }

    fn index_file(&mut self, path: PathBuf, on_bad_row: BadRows) -> Result<()> {
        let failed = |e| Error::io("read training data", &path, e);
        let file = crate::storage::open_file(&path).map_err(failed)?;
        let first_row = self.rows.len();
        let mut lines = LineReader::new(BufReader::with_capacity(1 << 18, &file));
        let mut blank = true;
        while let Some(line) = lines.next_line().map_err(failed)? {
            if line.number == 1
                && let Some(error) = crate::storage::compressed(&path, line.start)
            {
                return Err(error);
            }
            if line.content.is_some_and(|content| content.trim_ascii().is_empty()) {
                continue;
            }
            let number = u32::try_from(line.number).map_err(|_| {
                Error::new(ErrorKind::Data, "the file has more lines than can be counted")
                    .file(&path)
            })?;
            if blank && line.start.trim_ascii_start().first() == Some(&b'[') {
                return Err(Error::new(ErrorKind::Data, "the file is one JSON array")
                    .line(&path, line.number)
                    .expected("one JSON object per line")
                    .hint("convert it: jq -c '.[]' old.json > new.jsonl"));
            }
            blank = false;
            let checked = match line.content {
                Some(bytes) => TrainingRow::parse(bytes, &path, line.number)
                    .map(|row| (bytes, row.neg.is_empty())),
                None => Err(Error::new(ErrorKind::Data, "the line is too long")
                    .line(&path, line.number)
                    .expected(format!("at most {} MiB, one row", MAX_LINE_BYTES >> 20))),
            };
            match (checked, on_bad_row) {
                (Ok((bytes, no_negatives)), _) => {
                    if no_negatives {
                        self.without_negatives.push(self.rows.len());
                    }
                    self.rows.push(IndexEntry {
                        offset: line.offset,
                        checksum: fnv1a(FNV_START, bytes),
                        length: bytes.len() as u32, // at most MAX_LINE_BYTES
                        line: number,
                    });
                }
                (Err(reason), BadRows::Error) => return Err(reason),
                (Err(reason), BadRows::Skip) => self.skipped.add(&reason),
            }
        }
        if blank {
            return Err(Error::new(ErrorKind::Data, "the file has no rows").file(&path));
        }
        drop(lines);
        self.files.push(SourceFile { path, file, first_row });
        Ok(())
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

/// Files as they are, folders as the files in them.
fn data_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        let failed = |e| Error::io("read training data", path, e);
        let kind = fs::metadata(path).map_err(failed)?;
        if kind.is_file() {
            files.push(path.clone());
        } else if kind.is_dir() {
            let before = files.len();
            for entry in fs::read_dir(path).map_err(failed)? {
                let file = entry.map_err(failed)?.path();
                if is_data_file(&file) {
                    files.push(file);
                }
            }
            if files.len() == before {
                return Err(Error::new(ErrorKind::Data, "the folder has no training data")
                    .file(path)
                    .expected("files whose names end in .jsonl or .json"));
            }
            files[before..].sort();
        } else {
            return Err(Error::new(ErrorKind::Data, "neither a file nor a folder")
                .file(path)
                .hint("rows are read in any order, so a pipe will not do: write a file first"));
        }
    }
    Ok(files)
}

fn is_data_file(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
    !hidden && matches!(extension, "jsonl" | "json") && path.is_file()
}

fn read_at(file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

fn fingerprint(rows: &[IndexEntry]) -> u64 {
    rows.iter().fold(FNV_START, |hash, row| fnv1a(hash, &row.checksum.to_le_bytes()))
}

const FNV_START: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, 64 bits: enough to notice a change, and the same everywhere.
fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn a_folder_is_its_files_in_the_order_of_their_names() {
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
        assert!(refuse("array").contains("array:2: the file is one JSON array"));
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
        assert!(e.contains("x.jsonl:1: the file is one JSON array"), "{e}");
    }

    #[test]
    fn a_changed_file_is_noticed() {
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
        // Moved and spaced otherwise, the rows are the same.
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

    /// Pieces that make a file: good rows, bad ones, blank ones, any bytes.
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
        fn the_index_equals_reading_all_of_it(
            lines in prop::collection::vec(line(), 0..20), crlf: bool, ended: bool, mark: bool,
        ) {
            let mut bytes = if mark { b"\xef\xbb\xbf".to_vec() } else { Vec::new() };
            // So that the file is none that is refused whole.
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
