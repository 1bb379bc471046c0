//! Datasets of rows of another form than [`TrainingRow`](super::TrainingRow), which the caller reads.

use std::fs::File;
use std::path::{Path, PathBuf};

use super::{BadRows, Dataset, IndexEntry, checksum};
use crate::Result;
use crate::data::files::{FilesOfFolder, RowLine, files_of, open_data_file};
use crate::data::{DataSource, DataSources};

/// Reads the rows of a file and passes them on in order; see [`Dataset::open_with`].
pub(in crate::data) type ReadFile<'r> =
    dyn FnMut(&Path, &File, &mut dyn FnMut(RowLine<'_>) -> Result<()>) -> Result<()> + 'r;

impl Dataset {
    /// Indexes rows of another form, in files of this kind: `read` calls its last argument with each row of
    /// a file, in order.
    ///
    /// # Errors
    /// A path cannot be read, `read` fails, a row is an error and not to be skipped, or no row remains.
    pub(in crate::data) fn open_with(
        (paths, kind): (&[PathBuf], FilesOfFolder),
        on_bad_row: BadRows,
        read: &mut ReadFile<'_>,
    ) -> Result<Dataset> {
        let sources = paths.iter().cloned().map(DataSource::from).collect();
        let sources = DataSources { sources, ..DataSources::default() };
        let files = files_of(&sources.sources, kind)?;
        let mut dataset = Dataset::empty(sources);
        for (source_index, path) in files {
            let file = open_data_file(&path)?;
            let first_row = dataset.rows.len();
            read(&path, &file, &mut |line| match (line.bytes, on_bad_row) {
                (Ok(bytes), _) => {
                    dataset.rows.push(IndexEntry {
                        offset: line.offset,
                        checksum: checksum(bytes),
                        length: bytes.len() as u32, // at most MAX_LINE_BYTES
                        line: line.number,
                    });
                    Ok(())
                }
                (Err(reason), BadRows::Error) => Err(reason),
                (Err(reason), BadRows::Skip) => {
                    dataset.skipped.add(&reason);
                    Ok(())
                }
            })?;
            dataset.add_file(path, source_index, (file, first_row));
        }
        dataset.check_not_empty()?;
        Ok(dataset)
    }
}
