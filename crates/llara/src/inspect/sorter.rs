//! Sorting more records than fit into memory: sorted runs in a temporary file, which are merged.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::record::{RECORD_BYTES, Record};
use crate::{Error, Result};

/// Bytes of all read buffers of a merge together, as long as each has at least [`MIN_READ_RECORDS`].
const MERGE_BYTES: usize = 16 << 20;

/// The smallest number of records that are read at a time.
const MIN_READ_RECORDS: usize = 64;

/// Collects records and returns them sorted.
pub(super) struct Sorter {
    /// The folder of the temporary file.
    folder: PathBuf,
    /// Number of records in memory before they are written.
    capacity: usize,
    buffer: Vec<Record>,
    /// The runs, one after another, and their lengths in records. The file has no name: the system removes
    /// it when the process ends, however it ends.
    spilled: Option<File>,
    runs: Vec<u64>,
}

impl Sorter {
    /// A sorter with at most `capacity` records in memory and the others in a file in `folder`.
    pub(super) fn new(folder: &Path, capacity: usize) -> Self {
        let (buffer, runs) = (Vec::new(), Vec::new());
        Sorter { folder: folder.to_owned(), capacity: capacity.max(1), buffer, spilled: None, runs }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// The temporary file cannot be written.
    pub(super) fn add(&mut self, record: Record) -> Result<()> {
        if self.buffer.len() == self.capacity {
            self.spill()?;
        }
        self.buffer.push(record);
        Ok(())
    }

    fn spill(&mut self) -> Result<()> {
        let folder = &self.folder;
        let failed = |e| {
            Error::io("write temporary data", folder, e)
                .hint("choose a folder on a disk with more free space: --temp-dir")
        };
        self.buffer.par_sort_unstable();
        let file = match &mut self.spilled {
            Some(file) => file,
            none => none.insert(tempfile::tempfile_in(folder).map_err(failed)?),
        };
        let mut writer = BufWriter::with_capacity(1 << 18, file);
        for record in &self.buffer {
            writer.write_all(&record.to_bytes()).map_err(failed)?;
        }
        writer.flush().map_err(failed)?;
        drop(writer);
        self.runs.push(self.buffer.len() as u64);
        self.buffer.clear();
        Ok(())
    }

    /// Calls `on_record` with all records in ascending order.
    ///
    /// # Errors
    /// The temporary file cannot be written or read.
    pub(super) fn for_each(mut self, mut on_record: impl FnMut(Record)) -> Result<()> {
        if self.runs.is_empty() {
            self.buffer.par_sort_unstable();
            self.buffer.into_iter().for_each(on_record);
            return Ok(());
        }
        if !self.buffer.is_empty() {
            self.spill()?;
        }
        self.buffer = Vec::new();
        let Some(file) = &self.spilled else { return Ok(()) };
        let records = MERGE_BYTES / RECORD_BYTES / self.runs.len();
        let mut start = 0;
        let mut runs = Vec::with_capacity(self.runs.len());
        for &length in &self.runs {
            let end = start + length;
            runs.push(Run::new(start..end, records.max(MIN_READ_RECORDS)));
            start = end;
        }
        let failed = |e| Error::io("read temporary data", &self.folder, e);
        let mut heads = BinaryHeap::with_capacity(runs.len());
        for (i, run) in runs.iter_mut().enumerate() {
            heads.extend(run.next(file).map_err(failed)?.map(|record| Reverse((record, i))));
        }
        while let Some(mut head) = heads.peek_mut() {
            let Reverse((record, i)) = *head;
            on_record(record);
            match runs[i].next(file).map_err(failed)? {
                Some(next) => *head = Reverse((next, i)),
                None => drop(std::collections::binary_heap::PeekMut::pop(head)),
            }
        }
        Ok(())
    }
}

/// A sorted part of the temporary file.
struct Run {
    /// The records that are not read yet, by their index in the file.
    rest: std::ops::Range<u64>,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are used up.
    used: usize,
    /// Number of records to read at a time.
    records: usize,
}

impl Run {
    fn new(rest: std::ops::Range<u64>, records: usize) -> Self {
        Run { rest, buffer: Vec::new(), used: 0, records }
    }

    fn next(&mut self, file: &File) -> std::io::Result<Option<Record>> {
        if self.used == self.buffer.len() {
            let records = (self.rest.end - self.rest.start).min(self.records as u64);
            if records == 0 {
                return Ok(None);
            }
            self.buffer.resize(records as usize * RECORD_BYTES, 0);
            file.read_exact_at(&mut self.buffer, self.rest.start * RECORD_BYTES as u64)?;
            self.rest.start += records;
            self.used = 0;
        }
        let record = self.buffer[self.used..].first_chunk().map(Record::from_bytes);
        self.used += RECORD_BYTES;
        Ok(record)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::record::Side;
    use super::*;

    proptest! {
        #[test]
        fn records_come_back_sorted(
            numbers in prop::collection::vec((0u128..20, 0u64..3, 0u64..1 << 40, any::<bool>()), 0..400),
            capacity in 1usize..90,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut sorter = Sorter::new(folder.path(), capacity);
            let mut expected: Vec<Record> = numbers
                .into_iter()
                .map(|(hash, query, place, neg)| {
                    Record::new(hash << 100, query, place, if neg { Side::Neg } else { Side::Pos })
                })
                .collect();
            for &record in &expected {
                sorter.add(record).unwrap();
            }
            // The last records stay in memory.
            prop_assert_eq!(sorter.runs.is_empty(), expected.len() <= capacity);
            let mut sorted = Vec::new();
            sorter.for_each(|record| sorted.push(record)).unwrap();
            expected.sort();
            prop_assert_eq!(sorted, expected);
            prop_assert_eq!(folder.path().read_dir().unwrap().count(), 0);
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let mut sorter = Sorter::new(Path::new("/no/such/folder"), 1);
        let record = Record::new(1, 1, 1, Side::Pos);
        sorter.add(record).unwrap();
        let e = sorter.add(record).unwrap_err().to_string();
        assert!(e.contains("/no/such/folder") && e.contains("--temp-dir"), "{e}");
    }
}
