//! Batches of rows from one file each: which file every step of an epoch has, and which of its batches.

use std::path::Path;

use crate::{Error, ErrorKind, Result};

/// A file of a dataset, as far as batches depend on it.
#[derive(Debug, Clone, Copy)]
pub struct FileRows<'f> {
    /// For errors.
    pub path: &'f Path,
    /// Number of rows; the rows of the files follow one another.
    pub rows: usize,
}

/// The batches of each file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileBatches {
    files: Vec<FileShare>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileShare {
    /// Index of the first row in the dataset.
    first_row: usize,
    rows: usize,
    /// Batches of one pass over the rows.
    per_pass: u64,
    /// Batches of one epoch.
    per_epoch: u64,
}

/// A batch of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileBatch {
    /// Number of the file.
    pub(super) file: usize,
    /// Index of its first row in the dataset.
    pub(super) first_row: usize,
    /// Its number of rows.
    pub(super) rows: usize,
    /// Passes over the file before this one.
    pub(super) pass: u64,
    /// Number of the batch within the pass.
    pub(super) number: usize,
}

impl FileBatches {
    /// Without `weights` an epoch is one pass over every file. With them, an epoch has as many batches, up to
    /// rounding, and each file has its share of them, at least one.
    ///
    /// # Errors
    /// The weights are not one positive number for each file, or a file has no complete batch and incomplete
    /// ones are dropped.
    pub(super) fn new(
        files: &[FileRows<'_>],
        weights: &[f64],
        batch_size: usize,
        drop_last: bool,
    ) -> Result<Self> {
        let list = || {
            let names: Vec<String> = files.iter().map(|f| f.path.display().to_string()).collect();
            names.join(", ")
        };
        if !weights.is_empty() && weights.len() != files.len() {
            return Err(Error::new(ErrorKind::Argument, "the weights do not fit the files")
                .expected(format!("{} weights, in the order of {}", files.len(), list()))
                .got(weights.len()));
        }
        if let Some(wrong) = weights.iter().find(|weight| !(weight.is_finite() && **weight > 0.0)) {
            return Err(Error::new(ErrorKind::Argument, "the weight of a file is out of range")
                .expected("a positive number")
                .got(wrong)
                .hint("leave out files that are not to be used"));
        }
        let mut first_row = 0;
        let mut shares = Vec::with_capacity(files.len());
        for file in files {
            let per_pass = match drop_last {
                true => file.rows / batch_size,
                false => file.rows.div_ceil(batch_size),
            };
            if per_pass == 0 {
                return Err(Error::new(
                    ErrorKind::Argument,
                    "the file has no complete batch, and incomplete ones are dropped",
                )
                .file(file.path)
                .expected(format!("at least {batch_size} rows, one batch"))
                .got(file.rows)
                .hint("use a smaller batch, do not drop the last batch, or leave the file out"));
            }
            let per_pass = per_pass as u64;
            shares.push(FileShare { first_row, rows: file.rows, per_pass, per_epoch: per_pass });
            first_row += file.rows;
        }
        let batches: u64 = shares.iter().map(|share| share.per_pass).sum();
        // Relative to the largest one, the sum is finite.
        let largest = weights.iter().fold(0.0f64, |max, &weight| max.max(weight));
        let total: f64 = weights.iter().map(|weight| weight / largest).sum();
        for (share, weight) in shares.iter_mut().zip(weights) {
            let part = weight / largest / total;
            share.per_epoch = ((part * batches as f64).round() as u64).max(1);
        }
        Ok(FileBatches { files: shares })
    }

    /// Batches of an epoch.
    pub(super) fn steps_per_epoch(&self) -> u64 {
        self.files.iter().map(|share| share.per_epoch).sum()
    }

    /// The number of the file of each batch of an epoch, file by file.
    pub(super) fn files_of_epoch(&self) -> Vec<usize> {
        let of = |(file, share): (usize, &FileShare)| {
            std::iter::repeat_n(file, usize::try_from(share.per_epoch).unwrap_or(usize::MAX))
        };
        self.files.iter().enumerate().flat_map(of).collect()
    }

    /// The batches of the first steps of an epoch, which have these `files`: the beginning of a permutation of
    /// [`files_of_epoch`](Self::files_of_epoch). A file continues where it was at the end of the last epoch.
    pub(super) fn batches(&self, epoch: u64, files: &[usize]) -> Vec<FileBatch> {
        let mut next: Vec<u64> = self.files.iter().map(|share| epoch * share.per_epoch).collect();
        let batch = |&file: &usize| {
            let FileShare { first_row, rows, per_pass, .. } = self.files[file];
            let at = next[file];
            next[file] += 1;
            let (pass, number) = (at / per_pass, (at % per_pass) as usize);
            FileBatch { file, first_row, rows, pass, number }
        };
        files.iter().map(batch).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(rows: &[usize]) -> Vec<FileRows<'static>> {
        rows.iter().map(|&rows| FileRows { path: Path::new("f.jsonl"), rows }).collect()
    }

    #[test]
    fn weights_are_shares_of_the_batches_of_an_epoch() {
        let batches =
            FileBatches::new(&files(&[100, 20, 5]), &[1.0, 2.0, 1e-9], 10, false).unwrap();
        // 10 + 2 + 1 batches in proportion to the rows.
        let counts: Vec<u64> = batches.files.iter().map(|share| share.per_epoch).collect();
        assert_eq!((counts, batches.steps_per_epoch()), (vec![4, 9, 1], 14));
        let order = batches.files_of_epoch();
        let passes = |epoch, file| -> Vec<(u64, usize)> {
            let of = batches.batches(epoch, &order).into_iter().filter(|b| b.file == file);
            of.map(|batch| (batch.pass, batch.number)).collect()
        };
        // A rare file goes on in the next epoch, a frequent one begins again within one.
        assert_eq!(passes(0, 0), [(0, 0), (0, 1), (0, 2), (0, 3)]);
        assert_eq!(passes(2, 0), [(0, 8), (0, 9), (1, 0), (1, 1)]);
        assert_eq!(passes(0, 1)[..3], [(0, 0), (0, 1), (1, 0)]);
        assert_eq!(passes(1, 1)[0], (4, 1));
    }

    #[test]
    fn large_and_small_weights_are_shares() {
        for scale in [f64::MIN_POSITIVE, 1.0, f64::MAX] {
            let batches =
                FileBatches::new(&files(&[100, 100]), &[scale, scale], 10, false).unwrap();
            assert_eq!(batches.steps_per_epoch(), 20);
        }
    }

    #[test]
    fn settings_that_do_not_fit_are_refused() {
        for (rows, weights, drop_last, part) in [
            (&[5, 5][..], &[1.0][..], false, "2 weights"),
            (&[5, 5], &[1.0, 0.0], false, "a positive number"),
            (&[5, 5], &[1.0, f64::NAN], false, "a positive number"),
            (&[5, 3], &[], true, "at least 4 rows"),
        ] {
            let error = FileBatches::new(&files(rows), weights, 4, drop_last).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }
}
