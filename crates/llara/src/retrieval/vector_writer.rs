//! Writing files of embeddings row by row: whole or not at all, or so that an interrupted run can
//! go on.

use std::path::Path;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::Origin;
use super::vectors::{BLOCK, Format, NPY_MAGIC, TENSOR, require_finite};
use crate::storage::{OutputFile, PartialFile, safetensors_header};
use crate::{Error, ErrorKind, Result};

/// Writes an embedding matrix whose size is known, a few rows at a time.
///
/// The file is written beside its place and moved there by [`finish`](Self::finish); until then
/// what was there stays. What becomes of it if the writer is dropped before, or the process killed:
///
/// - made by [`create`](Self::create), it is removed;
/// - made by [`begin`](Self::begin) or [`resume`](Self::resume), the rows of the last
///   [`keep`](Self::keep) stay as `OUTPUT.partial`, with a manifest `OUTPUT.partial.json`, and
///   [`resume`](Self::resume) goes on behind them. Without any, nothing stays.
#[derive(Debug)]
pub struct VectorWriter {
    file: Destination,
    header_bytes: u64,
    rows: usize,
    cols: usize,
    written: usize,
}

/// Where the bytes go until the file is complete.
#[derive(Debug)]
enum Destination {
    Fleeting(OutputFile),
    Lasting(PartialFile, Origin),
}

/// `OUTPUT.partial.json`: what is in `OUTPUT.partial`, and what it was made from.
#[derive(Serialize, Deserialize)]
struct Manifest {
    rows_done: usize,
    rows: usize,
    dimension: usize,
    origin: Origin,
}

impl VectorWriter {
    /// Starts a file of `rows` embeddings of `cols` f32 numbers, as the extension says:
    /// `.safetensors` (one tensor, `embeddings`) or `.npy` (version 1.0, little endian, C order).
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: another extension, `cols` 0, or a size beyond 64 bits;
    /// [`ErrorKind::Io`]: the file cannot be written there.
    pub fn create(path: impl AsRef<Path>, rows: usize, cols: usize) -> Result<Self> {
        let path = path.as_ref();
        let header = header(path, rows, cols)?;
        let mut file = OutputFile::create(path)?;
        file.write(&header)?;
        let header_bytes = file.written();
        Ok(VectorWriter { file: Destination::Fleeting(file), header_bytes, rows, cols, written: 0 })
    }

    /// [`create`](Self::create), so that the run can be resumed. `origin` is what the embeddings
    /// follow from. What an interrupted run left of the same file is forgotten.
    ///
    /// # Errors
    /// Those of [`create`](Self::create); [`ErrorKind::Io`]: another run is writing the file.
    pub fn begin(path: impl AsRef<Path>, rows: usize, cols: usize, origin: Origin) -> Result<Self> {
        let path = path.as_ref();
        let header = header(path, rows, cols)?;
        Self::anew(PartialFile::open(path)?, &header, (rows, cols), origin)
    }

    /// Goes on behind the rows that an interrupted run has kept; [`begin`](Self::begin)s where
    /// there are none. [`written`](Self::written) says how many there are. The file will have the
    /// bytes of one that was never interrupted.
    ///
    /// # Errors
    /// Those of [`begin`](Self::begin); [`ErrorKind::Argument`]: what is there was made from
    /// something else, which is named; [`ErrorKind::Data`]: it is damaged. It is left as it was
    /// then.
    pub fn resume(
        path: impl AsRef<Path>,
        rows: usize,
        cols: usize,
        origin: Origin,
    ) -> Result<Self> {
        let path = path.as_ref();
        let header = header(path, rows, cols)?;
        let mut file = PartialFile::open(path)?;
        let Some(manifest) = file.manifest()? else {
            return Self::anew(file, &header, (rows, cols), origin);
        };
        let damaged = |what: &str| {
            Error::new(ErrorKind::Data, what)
                .file(file.path())
                .hint("start over: leave out --resume, or remove the file")
        };
        let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|e| {
            damaged("what the interrupted run left cannot be understood").because(e)
        })?;
        // As facts like any other.
        let whole = |origin: &Origin, rows: usize, cols: usize| {
            origin.clone().with("texts", rows).with("dimension", cols)
        };
        let ours = whole(&origin, rows, cols);
        let theirs = whole(&manifest.origin, manifest.rows, manifest.dimension);
        let differences = ours.differences(&theirs);
        if !differences.is_empty() {
            let list = |shown: Vec<String>| shown.join(", ");
            return Err(Error::new(
                ErrorKind::Argument,
                "what the interrupted run left was made from something else",
            )
            .file(file.path())
            .expected(list(differences.iter().map(|d| d.now().to_string()).collect()))
            .got(list(differences.iter().map(|d| d.then().to_string()).collect()))
            .hint("go on with the same model, texts and options, or start over without --resume"));
        }
        let header_bytes = header.len() as u64;
        let length = header_bytes + (manifest.rows_done.min(rows) * cols * size_of::<f32>()) as u64;
        let mut start = vec![0; header.len()];
        let fits = manifest.rows_done <= rows && file.written() >= length;
        if !fits || file.read_start(&mut start).is_err() || start != header {
            return Err(damaged("what the interrupted run left is not what its manifest says"));
        }
        file.cut(length)?;
        Ok(VectorWriter {
            file: Destination::Lasting(file, origin),
            header_bytes,
            rows,
            cols,
            written: manifest.rows_done,
        })
    }

    /// How many rows of a file an interrupted run has kept; `None` if there is nothing to resume.
    pub fn kept(path: impl AsRef<Path>) -> Option<usize> {
        let manifest = PartialFile::manifest_of(path.as_ref())?;
        Some(serde_json::from_slice::<Manifest>(&manifest).ok()?.rows_done)
    }

    fn anew(
        mut file: PartialFile,
        header: &[u8],
        (rows, cols): (usize, usize),
        origin: Origin,
    ) -> Result<Self> {
        file.clear()?;
        file.write(header)?;
        let header_bytes = file.written();
        Ok(VectorWriter {
            file: Destination::Lasting(file, origin),
            header_bytes,
            rows,
            cols,
            written: 0,
        })
    }

    /// The number of embeddings that the file will have.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The width of each.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How many embeddings it has already.
    pub fn written(&self) -> usize {
        self.written
    }

    /// Appends whole rows, end to end.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: not a multiple of the width, or more rows than announced;
    /// [`ErrorKind::Numeric`]: a number that is not finite, with its row (nothing of this call is
    /// written then); [`ErrorKind::Io`]: the write failed.
    pub fn append(&mut self, values: &[f32]) -> Result<()> {
        let invalid = |what: &str| Error::new(ErrorKind::Argument, what).file(self.file.target());
        if !values.len().is_multiple_of(self.cols) {
            return Err(invalid("the numbers are not whole rows")
                .expected(format!("a multiple of {}", self.cols))
                .got(values.len()));
        }
        let rows = values.len() / self.cols;
        if rows > self.rows - self.written {
            return Err(invalid("there are more rows than were announced")
                .expected(self.rows)
                .got(self.written + rows));
        }
        require_finite(values, self.cols, self.written, self.file.target())?;
        let mut bytes = Vec::with_capacity(BLOCK.min(values.len()) * size_of::<f32>());
        for block in values.chunks(BLOCK) {
            bytes.clear();
            bytes.extend(block.iter().flat_map(|value| value.to_le_bytes()));
            self.file.write(&bytes)?;
        }
        self.written += rows;
        Ok(())
    }

    /// Makes the rows so far outlive an interruption, a power cut too. Does nothing to a file that
    /// was made by [`create`](Self::create).
    ///
    /// # Errors
    /// [`ErrorKind::Io`]: the write failed; what was kept before is kept still.
    pub fn keep(&mut self) -> Result<()> {
        let Destination::Lasting(file, origin) = &mut self.file else { return Ok(()) };
        let manifest = Manifest {
            rows_done: self.written,
            rows: self.rows,
            dimension: self.cols,
            origin: origin.clone(),
        };
        let manifest = serde_json::to_vec_pretty(&manifest).map_err(|e| {
            Error::new(ErrorKind::Io, "cannot describe what was written").because(e)
        })?;
        file.keep(&manifest)
    }

    /// Completes the file: flushes it to the disk and puts it in its place.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: rows are missing; [`ErrorKind::Io`]: the write failed.
    pub fn finish(self) -> Result<()> {
        let expected = (self.rows * self.cols * size_of::<f32>()) as u64;
        if self.written != self.rows || self.file.written() - self.header_bytes != expected {
            return Err(Error::new(ErrorKind::Argument, "the embeddings are incomplete")
                .file(self.file.target())
                .expected(format!("{} rows", self.rows))
                .got(self.written));
        }
        match self.file {
            Destination::Fleeting(file) => file.commit(),
            Destination::Lasting(file, _) => file.commit(),
        }
    }
}

impl Destination {
    fn target(&self) -> &Path {
        match self {
            Destination::Fleeting(file) => file.path(),
            Destination::Lasting(file, _) => file.target(),
        }
    }

    fn written(&self) -> u64 {
        match self {
            Destination::Fleeting(file) => file.written(),
            Destination::Lasting(file, _) => file.written(),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Destination::Fleeting(file) => file.write(bytes),
            Destination::Lasting(file, _) => file.write(bytes),
        }
    }
}

/// What stands in front of the numbers; refuses impossible shapes.
fn header(path: &Path, rows: usize, cols: usize) -> Result<Vec<u8>> {
    let format = Format::of(path)?;
    let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(size_of::<f32>()));
    if bytes.is_none() || cols == 0 {
        return Err(Error::new(ErrorKind::Argument, "embeddings cannot have this shape")
            .file(path)
            .got(format!("{rows} rows of {cols}")));
    }
    match format {
        Format::Safetensors => {
            safetensors_header(path, &[(TENSOR.to_owned(), Dtype::F32, vec![rows, cols])])
        }
        Format::Npy => Ok(npy_header(rows, cols)),
    }
}

/// Magic, version, length (u16, little endian), then a Python dict, padded so that the data is
/// aligned to 64 and ended by a newline.
pub(super) fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let before = NPY_MAGIC.len() + 2 + 2;
    let length = (before + dict.len() + 1).next_multiple_of(64) - before;
    let mut header = NPY_MAGIC.to_vec();
    header.extend_from_slice(&[1, 0]);
    header.extend_from_slice(&(length as u16).to_le_bytes()); // two numbers: some 100 bytes
    header.extend_from_slice(format!("{dict:<width$}\n", width = length - 1).as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 2] = ["v.safetensors", "v.npy"];

    #[test]
    fn unfinished_and_wrong_rows_leave_the_target_untouched() {
        let dir = tempfile::tempdir().unwrap();
        for name in NAMES {
            let path = dir.path().join(name);
            std::fs::write(&path, "old").unwrap();
            let mut writer = VectorWriter::create(&path, 3, 2).unwrap();
            assert_eq!(writer.append(&[1.0]).unwrap_err().kind(), ErrorKind::Argument);
            assert_eq!(writer.append(&[1.0; 8]).unwrap_err().kind(), ErrorKind::Argument);
            writer.append(&[1.0; 2]).unwrap();
            let error = writer.append(&[1.0, 1.0, 1.0, f32::NAN]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Numeric);
            assert!(error.to_string().contains("embedding 2 "), "{error}");
            assert_eq!(writer.finish().unwrap_err().kind(), ErrorKind::Argument);
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), NAMES.len());
    }

    #[test]
    fn impossible_requests_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["v.csv", "v", ".npy"] {
            let error = VectorWriter::create(dir.path().join(name), 1, 1).unwrap_err().to_string();
            assert!(error.contains(".safetensors or .npy"), "{error}");
        }
        let path = dir.path().join("v.npy");
        assert!(VectorWriter::create(&path, 1, 0).is_err());
        assert!(VectorWriter::create(&path, usize::MAX, 2).is_err());
        assert!(VectorWriter::create(dir.path().join("no/v.npy"), 1, 1).is_err());
    }

    fn origin() -> Origin {
        Origin::new().with("role", "query")
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Rows `from` to `to`, two wide.
    fn values(from: usize, to: usize) -> Vec<f32> {
        (2 * from..2 * to).map(|i| i as f32).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn resumed_after_any_interruptions_the_bytes_are_the_same(
            npy: bool, rows in 1usize..12,
            cuts in prop::collection::vec((0usize..12, 0usize..3, prop::collection::vec(any::<u8>(), 0..30)), 0..4),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let whole = dir.path().join("whole").with_extension(if npy { "npy" } else { "safetensors" });
            let mut writer = VectorWriter::create(&whole, rows, 2).unwrap();
            writer.append(&values(0, rows)).unwrap();
            writer.finish().unwrap();

            let path = dir.path().join(NAMES[usize::from(npy)]);
            let mut expected = 0;
            for (kept, unkept, torn) in cuts {
                let mut writer = VectorWriter::resume(&path, rows, 2, origin()).unwrap();
                prop_assert_eq!(writer.written(), expected);
                prop_assert_eq!(VectorWriter::kept(&path).unwrap_or(0), expected);
                let kept = (expected + kept).min(rows);
                if kept > expected {
                    writer.append(&values(expected, kept)).unwrap();
                    writer.keep().unwrap();
                }
                writer.append(&values(kept, (kept + unkept).min(rows))).unwrap();
                drop(writer);
                prop_assert!(!path.exists());
                if kept > 0 {
                    // What a killed process had sent off without waiting for it.
                    let partial = dir.path().join(format!("{}.partial", NAMES[usize::from(npy)]));
                    let bytes = [std::fs::read(&partial).unwrap(), torn].concat();
                    std::fs::write(&partial, bytes).unwrap();
                } else {
                    prop_assert_eq!(names(dir.path()).len(), 1);
                }
                expected = kept;
            }
            let mut writer = VectorWriter::resume(&path, rows, 2, origin()).unwrap();
            writer.append(&values(expected, rows)).unwrap();
            writer.finish().unwrap();
            prop_assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&whole).unwrap());
            prop_assert_eq!(names(dir.path()).len(), 2);
        }
    }

    /// A file of 4 rows of which 2 are kept.
    fn interrupted(path: &Path) {
        let mut writer = VectorWriter::begin(path, 4, 2, origin()).unwrap();
        writer.append(&values(0, 2)).unwrap();
        writer.keep().unwrap();
    }

    #[test]
    fn what_was_made_from_something_else_is_refused_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.npy");
        interrupted(&path);
        let refuse = |rows, cols, origin| {
            let error = VectorWriter::resume(&path, rows, cols, origin).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Argument);
            assert_eq!(VectorWriter::kept(&path), Some(2));
            error.to_string()
        };
        let error = refuse(4, 2, origin().with("role", "passage"));
        for part in
            ["v.npy.partial", "expected: role \"passage\"", "got: role \"query\"", "--resume"]
        {
            assert!(error.contains(part), "{error}");
        }
        assert!(refuse(5, 2, origin()).contains("expected: texts 5\n  got: texts 4"));
        assert!(refuse(4, 3, origin()).contains("expected: dimension 3\n  got: dimension 2"));
        // Begun anew, all of it is forgotten.
        let mut writer = VectorWriter::begin(&path, 1, 2, Origin::new()).unwrap();
        assert_eq!(VectorWriter::kept(&path), None);
        writer.append(&values(0, 1)).unwrap();
        writer.finish().unwrap();
        assert_eq!(names(dir.path()), ["v.npy"]);
    }

    #[test]
    fn what_is_damaged_is_refused_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (path, partial) = (dir.path().join("v.npy"), dir.path().join("v.npy.partial"));
        let manifest = dir.path().join("v.npy.partial.json");
        interrupted(&path);
        let refuse = |file: &Path, change: &dyn Fn(&mut Vec<u8>)| {
            let whole = std::fs::read(file).unwrap();
            let mut changed = whole.clone();
            change(&mut changed);
            std::fs::write(file, &changed).unwrap();
            let error = VectorWriter::resume(&path, 4, 2, origin()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Data);
            assert!(error.to_string().contains("hint: start over"), "{error}");
            assert_eq!(std::fs::read(file).unwrap(), changed);
            std::fs::write(file, whole).unwrap();
        };
        refuse(&partial, &|bytes| bytes.truncate(bytes.len() - 1));
        refuse(&partial, &|bytes| bytes[3] ^= 1);
        refuse(&manifest, &|bytes| bytes.truncate(20));
        refuse(&manifest, &|bytes| {
            let text = String::from_utf8(bytes.clone()).unwrap();
            *bytes = text.replace("\"rows_done\": 2", "\"rows_done\": 9").into_bytes();
        });
        assert_eq!(VectorWriter::resume(&path, 4, 2, origin()).unwrap().written(), 2);
    }
}
