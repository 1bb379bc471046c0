//! The rows of an inspection by their place, to read examples and sampled rows again.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::record::Place;
use crate::data::{DataSource, Dataset, TrainingRow, open_data_file};
use crate::storage::LineReader;
use crate::{Error, ErrorKind, Result};

/// Rows that can be read again.
pub(super) trait Rows: Sync {
    /// The file and the line (from 1) of a row.
    fn location(&self, place: Place) -> Result<(&Path, u64)>;

    /// Reads a row again.
    fn row(&self, place: Place) -> Result<TrainingRow>;
}

/// The files of an inspection. A place is an offset in the concatenation of all files.
#[derive(Debug, Default)]
pub(super) struct Sources {
    files: Vec<Source>,
}

#[derive(Debug)]
struct Source {
    path: PathBuf,
    /// What holds for its rows.
    of_rows: DataSource,
    /// The place of the file's first byte.
    start: Place,
    /// Offset and number of some lines, ascending.
    lines: Vec<(u64, u64)>,
    /// Offset after the start of the last row.
    end: u64,
}

/// Bytes between two lines whose numbers are kept.
const INDEX_INTERVAL: u64 = 1 << 20;

impl Sources {
    /// Starts the next file.
    pub(super) fn start(&mut self, path: &Path, source: &DataSource) {
        let start = self.files.last().map_or(0, |last| last.start + last.end);
        let (path, lines) = (path.to_owned(), Vec::new());
        self.files.push(Source { path, of_rows: source.clone(), start, lines, end: 0 });
    }

    /// Adds a row of the last file, and returns its place.
    pub(super) fn add(&mut self, offset: u64, line: u64) -> Place {
        let Some(file) = self.files.last_mut() else { return offset };
        if file.lines.last().is_none_or(|last| offset - last.0 >= INDEX_INTERVAL) {
            file.lines.push((offset, line));
        }
        file.end = offset + 1;
        file.start + offset
    }

    /// The file of a place, and the offset in it.
    fn find(&self, place: Place) -> Result<(&Source, u64)> {
        let after = self.files.partition_point(|file| file.start <= place);
        let file = after.checked_sub(1).and_then(|i| self.files.get(i));
        let file = file.ok_or_else(|| Error::new(ErrorKind::Argument, "there is no such row"))?;
        Ok((file, place - file.start))
    }
}

impl Rows for Sources {
    fn location(&self, place: Place) -> Result<(&Path, u64)> {
        let (source, offset) = self.find(place)?;
        let known = source.lines.partition_point(|line| line.0 <= offset).checked_sub(1);
        let (start, line) = known.map_or((0, 1), |i| source.lines[i]);
        let failed = |e| Error::io("read training data", &source.path, e);
        let mut file = open_at(&source.path, start)?;
        let mut between = Vec::new();
        (&mut file).take(offset - start).read_to_end(&mut between).map_err(failed)?;
        let more = between.iter().filter(|&&byte| byte == b'\n').count();
        Ok((&source.path, line + more as u64))
    }

    fn row(&self, place: Place) -> Result<TrainingRow> {
        let (source, offset) = self.find(place)?;
        let failed = |e| Error::io("read training data", &source.path, e);
        let mut lines = LineReader::new(BufReader::new(open_at(&source.path, offset)?));
        let line = lines.next_line().map_err(failed)?;
        let bytes = line.and_then(|line| line.content).unwrap_or_default();
        let row = TrainingRow::parse(bytes, &source.path, 0).map_err(|_| {
            Error::new(ErrorKind::Data, "the file was changed while it was inspected")
                .file(&source.path)
                .hint("inspect it again when nothing writes to it")
        })?;
        Ok(row.with_instructions(&source.of_rows))
    }
}

fn open_at(path: &Path, offset: u64) -> Result<File> {
    let mut file = open_data_file(path)?;
    file.seek(SeekFrom::Start(offset)).map_err(|e| Error::io("read training data", path, e))?;
    Ok(file)
}

/// The place of a row is its index.
impl Rows for &Dataset {
    fn location(&self, place: Place) -> Result<(&Path, u64)> {
        Dataset::location(self, place as usize)
            .ok_or_else(|| Error::new(ErrorKind::Argument, "there is no such row"))
    }

    fn row(&self, place: Place) -> Result<TrainingRow> {
        Dataset::row(self, place as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_in_every_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut sources = Sources::default();
        let mut expected = Vec::new();
        for (name, rows) in [("a", 300), ("b", 1), ("c", 2)] {
            let path = folder.path().join(name);
            let mut text = "\u{feff}".to_owned();
            sources.start(&path, &path.clone().into());
            let mut line = 0;
            for i in 0..rows {
                line += 1;
                // A blank line in front of every third row.
                if i % 3 == 2 {
                    text.push_str("\r\n");
                    line += 1;
                }
                let place = sources.add(text.len() as u64, line);
                let query = format!("{name}{i}{}", "x".repeat(9000));
                text.push_str(&format!("{{\"query\": \"{query}\", \"pos\": [\"p\"]}}\r\n"));
                expected.push((place, path.clone(), line, query));
            }
            std::fs::write(&path, text).unwrap();
        }
        assert!(sources.files[0].lines.len() > 2);
        for (place, path, line, query) in expected {
            assert_eq!(sources.location(place).unwrap(), (path.as_path(), line));
            assert_eq!(sources.row(place).unwrap().query, query);
        }
        std::fs::write(folder.path().join("c"), "").unwrap();
        let e = sources.row(sources.files[2].start).unwrap_err().to_string();
        assert!(e.contains("was changed"), "{e}");
    }
}
