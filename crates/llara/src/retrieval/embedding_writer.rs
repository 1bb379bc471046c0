//! Writing files of embeddings row by row, atomically or resumably.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::Origin;
use super::embeddings::{BLOCK, Format, header, require_finite};
use crate::storage::{Fingerprint, OutputFile, PartialFile, check_output_path};
use crate::{Error, ErrorKind, Result};

/// Writes a matrix of embeddings, whose size is known, a few rows at a time.
///
/// The rows are written to a temporary file, which [`finish`](Self::finish) renames to the output path;
/// until then the path is unchanged. If the writer is dropped before, or the process is killed:
///
/// - a file of [`create`](Self::create) is removed;
/// - of a file of [`begin`](Self::begin) or [`resume`](Self::resume), the rows before the last call of
///   [`keep`](Self::keep) remain as `OUTPUT.partial`, with a manifest `OUTPUT.partial.json`, and
///   [`resume`](Self::resume) continues after them. Without such a call the file is removed.
#[derive(Debug)]
pub struct EmbeddingWriter {
    file: Destination,
    header_bytes: u64,
    rows: usize,
    cols: usize,
    written: usize,
    /// Hash of the rows since the last [`keep`](Self::keep).
    block: Fingerprint,
    /// Kept rows of an interrupted run that were damaged.
    discarded: usize,
}

/// The temporary file.
#[derive(Debug)]
enum Destination {
    Atomic(OutputFile),
    Resumable(PartialFile, Origin, Vec<Block>),
}

/// `OUTPUT.partial.json`: the contents of `OUTPUT.partial` and the inputs that determine them.
#[derive(Serialize, Deserialize)]
struct Manifest {
    rows_done: usize,
    rows: usize,
    dimension: usize,
    origin: Origin,
    /// Consecutive blocks of rows. Rows that are in no block are discarded.
    #[serde(default)]
    blocks: Vec<Block>,
}

/// Rows that were written between two calls of [`EmbeddingWriter::keep`].
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Block {
    /// The first row after the block.
    end: usize,
    /// Hash of its rows, in order.
    fingerprint: String,
}

impl EmbeddingWriter {
    /// Starts a file of `rows` embeddings of `cols` f32 numbers. The extension selects the format:
    /// `.safetensors` (one tensor, `embeddings`) or `.npy` (version 1.0, little endian, C order).
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: another extension, `cols` 0, or a size that exceeds 64 bits;
    /// [`ErrorKind::Io`]: no file can be written to `path`.
    pub fn create(path: impl AsRef<Path>, rows: usize, cols: usize) -> Result<Self> {
        let path = path.as_ref();
        let header = header(path, rows, cols)?;
        let mut file = OutputFile::create(path)?;
        file.write(&header)?;
        let header_bytes = file.written();
        Ok(Self::of(Destination::Atomic(file), header_bytes, (rows, cols)))
    }

    /// Checks that [`create`](Self::create) can write to `path`, without leaving a file.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: another extension; [`ErrorKind::Io`]: no file can be written to `path`.
    pub fn check_path(path: impl AsRef<Path>) -> Result<()> {
        Format::of(path.as_ref())?;
        check_output_path(path.as_ref())
    }

    /// Starts a file that can be resumed. `origin` describes the inputs that determine the embeddings. Rows
    /// of an interrupted run are discarded.
    ///
    /// # Errors
    /// Those of [`create`](Self::create); [`ErrorKind::Io`]: another run is writing the file.
    pub fn begin(path: impl AsRef<Path>, rows: usize, cols: usize, origin: Origin) -> Result<Self> {
        let path = path.as_ref();
        let header = header(path, rows, cols)?;
        Self::start(PartialFile::open(path)?, &header, (rows, cols), origin)
    }

    /// Continues after the rows that an interrupted run kept, or does the same as [`begin`](Self::begin) if
    /// there are none. [`written`](Self::written) is their number. The finished file has the same bytes as
    /// the file of an uninterrupted run.
    ///
    /// The kept rows are compared with the hashes of their blocks. The first damaged block and all later rows
    /// are discarded; [`discarded`](Self::discarded) is their number.
    ///
    /// # Errors
    /// Those of [`begin`](Self::begin); [`ErrorKind::Argument`]: the interrupted run had other inputs, which
    /// the error lists; [`ErrorKind::Data`]: the header or the manifest is damaged. The files are not changed
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
            return Self::start(file, &header, (rows, cols), origin);
        };
        let damaged = |what: &str| {
            Error::new(ErrorKind::Data, what)
                .file(file.path())
                .hint("start over without --resume, or remove the file")
        };
        let manifest: Manifest = serde_json::from_slice(&manifest)
            .map_err(|e| damaged("the manifest of the interrupted run is not valid").because(e))?;
        // The shape is compared like the other values.
        let with_shape = |origin: &Origin, rows: usize, cols: usize| {
            origin.clone().with("texts", rows).with("dimension", cols)
        };
        let now = with_shape(&origin, rows, cols);
        let before = with_shape(&manifest.origin, manifest.rows, manifest.dimension);
        let differences = now.differences(&before);
        if !differences.is_empty() {
            let list = |shown: Vec<String>| shown.join(", ");
            return Err(Error::new(ErrorKind::Argument, "the interrupted run had other inputs")
                .file(file.path())
                .expected(list(differences.iter().map(|d| d.now().to_string()).collect()))
                .got(list(differences.iter().map(|d| d.before().to_string()).collect()))
                .hint(
                    "resume with the same model, texts and options, or start over without --resume",
                ));
        }
        let header_bytes = header.len() as u64;
        let length = header_bytes + (manifest.rows_done.min(rows) * cols * size_of::<f32>()) as u64;
        let mut start = vec![0; header.len()];
        let fits = manifest.rows_done <= rows && file.written() >= length;
        if !fits || file.read_at(&mut start, 0).is_err() || start != header {
            return Err(damaged("the file of the interrupted run does not match its manifest"));
        }
        let Manifest { rows_done, mut blocks, .. } = manifest;
        let intact = intact_blocks(&file, header_bytes, cols, &blocks, rows_done)?;
        blocks.truncate(intact);
        let written = blocks.last().map_or(0, |block| block.end);
        file.cut(header_bytes + (written * cols * size_of::<f32>()) as u64)?;
        let mut writer =
            Self::of(Destination::Resumable(file, origin, blocks), header_bytes, (rows, cols));
        writer.written = written;
        writer.discarded = rows_done - written;
        if writer.discarded > 0 {
            // The manifest must not contain the discarded rows while they are being rewritten.
            writer.keep()?;
        }
        Ok(writer)
    }

    fn of(file: Destination, header_bytes: u64, (rows, cols): (usize, usize)) -> Self {
        let block = Fingerprint::new();
        EmbeddingWriter { file, header_bytes, rows, cols, written: 0, block, discarded: 0 }
    }

    /// The number of rows that an interrupted run kept; `None` if there is nothing to resume.
    pub fn kept(path: impl AsRef<Path>) -> Option<usize> {
        let manifest = PartialFile::manifest_of(path.as_ref())?;
        Some(serde_json::from_slice::<Manifest>(&manifest).ok()?.rows_done)
    }

    fn start(
        mut file: PartialFile,
        header: &[u8],
        (rows, cols): (usize, usize),
        origin: Origin,
    ) -> Result<Self> {
        file.clear()?;
        file.write(header)?;
        let header_bytes = file.written();
        let file = Destination::Resumable(file, origin, Vec::new());
        Ok(Self::of(file, header_bytes, (rows, cols)))
    }

    /// The number of embeddings of the finished file.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The dimension of each embedding.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The number of embeddings that are written already.
    pub fn written(&self) -> usize {
        self.written
    }

    /// The number of kept rows that [`resume`](Self::resume) discarded because of damage.
    pub fn discarded(&self) -> usize {
        self.discarded
    }

    /// Appends rows; `values` are complete rows, concatenated.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: `values` are not complete rows, or there are more rows than the file has;
    /// [`ErrorKind::Numeric`]: a number is not finite (then no row is appended); [`ErrorKind::Io`]: the write
    /// failed.
    pub fn append(&mut self, values: &[f32]) -> Result<()> {
        let invalid = |what: &str| Error::new(ErrorKind::Argument, what).file(self.file.target());
        if !values.len().is_multiple_of(self.cols) {
            return Err(invalid("the numbers are not complete rows")
                .expected(format!("a multiple of {}", self.cols))
                .got(values.len()));
        }
        let rows = values.len() / self.cols;
        if rows > self.rows - self.written {
            return Err(invalid("there are more rows than the file has")
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
        values.chunks(self.cols).for_each(|row| self.block.add_numbers(row));
        self.written += rows;
        Ok(())
    }

    /// Makes the rows so far durable, so that a later run can resume after them. Does nothing for a file of
    /// [`create`](Self::create).
    ///
    /// # Errors
    /// [`ErrorKind::Io`]: the write failed; rows that were kept before remain kept.
    pub fn keep(&mut self) -> Result<()> {
        let Destination::Resumable(file, origin, blocks) = &mut self.file else { return Ok(()) };
        if blocks.last().map_or(0, |block| block.end) < self.written {
            let block = std::mem::replace(&mut self.block, Fingerprint::new());
            blocks.push(Block { end: self.written, fingerprint: block.to_string() });
        }
        let manifest = Manifest {
            rows_done: self.written,
            rows: self.rows,
            dimension: self.cols,
            origin: origin.clone(),
            blocks: blocks.clone(),
        };
        let manifest = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| Error::new(ErrorKind::Io, "cannot serialize the manifest").because(e))?;
        file.keep(&manifest)
    }

    /// Completes the file: flushes it to the disk and renames it to the output path.
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
            Destination::Atomic(file) => file.commit(),
            Destination::Resumable(file, ..) => file.commit(),
        }
    }
}

impl Destination {
    fn target(&self) -> &Path {
        match self {
            Destination::Atomic(file) => file.path(),
            Destination::Resumable(file, ..) => file.target(),
        }
    }

    fn written(&self) -> u64 {
        match self {
            Destination::Atomic(file) => file.written(),
            Destination::Resumable(file, ..) => file.written(),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match self {
            Destination::Atomic(file) => file.write(bytes),
            Destination::Resumable(file, ..) => file.write(bytes),
        }
    }
}

/// The number of leading `blocks` whose hashes equal those in the manifest.
fn intact_blocks(
    file: &PartialFile,
    header_bytes: u64,
    cols: usize,
    blocks: &[Block],
    rows_done: usize,
) -> Result<usize> {
    let row_bytes = cols * size_of::<f32>();
    let rows_at_a_time = (BLOCK * size_of::<f32>() / row_bytes).max(1);
    let (mut bytes, mut numbers) = (Vec::new(), Vec::new());
    let mut row = 0;
    for (index, block) in blocks.iter().enumerate() {
        if block.end <= row || block.end > rows_done {
            return Ok(index);
        }
        let mut fingerprint = Fingerprint::new();
        while row < block.end {
            let rows = rows_at_a_time.min(block.end - row);
            bytes.resize(rows * row_bytes, 0);
            file.read_at(&mut bytes, header_bytes + (row * row_bytes) as u64)
                .map_err(|e| Error::io("read the file", file.path(), e))?;
            numbers.clear();
            numbers.extend(bytes.as_chunks().0.iter().map(|&number| f32::from_le_bytes(number)));
            numbers.chunks(cols).for_each(|row| fingerprint.add_numbers(row));
            row += rows;
        }
        if fingerprint.to_string() != block.fingerprint {
            return Ok(index);
        }
    }
    Ok(blocks.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NAMES: [&str; 2] = ["v.safetensors", "v.npy"];

    #[test]
    fn incomplete_and_invalid_rows_leave_the_target_unchanged() {
        let dir = tempfile::tempdir().unwrap();
        for name in NAMES {
            let path = dir.path().join(name);
            std::fs::write(&path, "old").unwrap();
            let mut writer = EmbeddingWriter::create(&path, 3, 2).unwrap();
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
    fn invalid_arguments_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["v.csv", "v", ".npy"] {
            let error =
                EmbeddingWriter::create(dir.path().join(name), 1, 1).unwrap_err().to_string();
            assert!(error.contains(".safetensors or .npy"), "{error}");
        }
        let path = dir.path().join("v.npy");
        assert!(EmbeddingWriter::create(&path, 1, 0).is_err());
        assert!(EmbeddingWriter::create(&path, usize::MAX, 2).is_err());
        assert!(EmbeddingWriter::create(dir.path().join("no/v.npy"), 1, 1).is_err());
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
            let mut writer = EmbeddingWriter::create(&whole, rows, 2).unwrap();
            writer.append(&values(0, rows)).unwrap();
            writer.finish().unwrap();

            let path = dir.path().join(NAMES[usize::from(npy)]);
            let mut expected = 0;
            for (kept, unkept, torn) in cuts {
                let mut writer = EmbeddingWriter::resume(&path, rows, 2, origin()).unwrap();
                prop_assert_eq!(writer.written(), expected);
                prop_assert_eq!(EmbeddingWriter::kept(&path).unwrap_or(0), expected);
                let kept = (expected + kept).min(rows);
                if kept > expected {
                    writer.append(&values(expected, kept)).unwrap();
                    writer.keep().unwrap();
                }
                writer.append(&values(kept, (kept + unkept).min(rows))).unwrap();
                drop(writer);
                prop_assert!(!path.exists());
                if kept > 0 {
                    // Bytes that a killed process had written after the last `keep`.
                    let partial = dir.path().join(format!("{}.partial", NAMES[usize::from(npy)]));
                    let bytes = [std::fs::read(&partial).unwrap(), torn].concat();
                    std::fs::write(&partial, bytes).unwrap();
                } else {
                    prop_assert_eq!(names(dir.path()).len(), 1);
                }
                expected = kept;
            }
            let mut writer = EmbeddingWriter::resume(&path, rows, 2, origin()).unwrap();
            writer.append(&values(expected, rows)).unwrap();
            writer.finish().unwrap();
            prop_assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(&whole).unwrap());
            prop_assert_eq!(names(dir.path()).len(), 2);
        }
    }

    /// A file of 4 rows of which 2 are kept.
    fn interrupted(path: &Path) {
        let mut writer = EmbeddingWriter::begin(path, 4, 2, origin()).unwrap();
        writer.append(&values(0, 2)).unwrap();
        writer.keep().unwrap();
    }

    #[test]
    fn a_file_of_other_inputs_is_refused_and_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.npy");
        interrupted(&path);
        let refuse = |rows, cols, origin| {
            let error = EmbeddingWriter::resume(&path, rows, cols, origin).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Argument);
            assert_eq!(EmbeddingWriter::kept(&path), Some(2));
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
        // `begin` discards it.
        let mut writer = EmbeddingWriter::begin(&path, 1, 2, Origin::new()).unwrap();
        assert_eq!(EmbeddingWriter::kept(&path), None);
        writer.append(&values(0, 1)).unwrap();
        writer.finish().unwrap();
        assert_eq!(names(dir.path()), ["v.npy"]);
    }

    #[test]
    fn rows_from_the_first_damaged_block_on_are_written_again() {
        let dir = tempfile::tempdir().unwrap();
        for name in NAMES {
            let path = dir.path().join(name);
            let mut writer = EmbeddingWriter::create(&path, 6, 2).unwrap();
            writer.append(&values(0, 6)).unwrap();
            writer.finish().unwrap();
            let whole = std::fs::read(&path).unwrap();
            let header = whole.len() - 6 * 8;
            for (byte, intact) in [(0, 0), (15, 0), (16, 2), (39, 2), (40, 5)] {
                let mut writer = EmbeddingWriter::begin(&path, 6, 2, origin()).unwrap();
                for (from, to) in [(0, 1), (1, 2), (2, 5)] {
                    writer.append(&values(from, to)).unwrap();
                    if from != 0 {
                        writer.keep().unwrap();
                        writer.keep().unwrap();
                    }
                }
                drop(writer);
                let partial = dir.path().join(format!("{name}.partial"));
                let mut bytes = std::fs::read(&partial).unwrap();
                if let Some(byte) = bytes.get_mut(header + byte) {
                    *byte ^= 1;
                }
                std::fs::write(&partial, bytes).unwrap();
                let writer = EmbeddingWriter::resume(&path, 6, 2, origin()).unwrap();
                assert_eq!((writer.written(), writer.discarded()), (intact, 5 - intact), "{byte}");
                drop(writer);
                assert_eq!(EmbeddingWriter::kept(&path), Some(intact));
                let mut writer = EmbeddingWriter::resume(&path, 6, 2, origin()).unwrap();
                assert_eq!((writer.written(), writer.discarded()), (intact, 0));
                writer.append(&values(intact, 6)).unwrap();
                writer.finish().unwrap();
                assert_eq!(std::fs::read(&path).unwrap(), whole);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_manifest_is_refused_or_resumed(
            text in "\\PC{0,60}", rows_done in any::<usize>(), ends in prop::collection::vec(any::<usize>(), 0..4),
            changed in any::<prop::sample::Index>(), byte: u8, kind in 0..3,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (path, manifest) = (dir.path().join("v.npy"), dir.path().join("v.npy.partial.json"));
            interrupted(&path);
            let mut bytes = std::fs::read(&manifest).unwrap();
            match kind {
                0 => bytes = text.into_bytes(),
                1 => {
                    let at = changed.index(bytes.len());
                    bytes[at] = byte;
                }
                _ => {
                    let mut json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
                    json["rows_done"] = rows_done.into();
                    json["blocks"] = ends.iter().map(|end| serde_json::json!({"end": end, "fingerprint": ""})).collect();
                    bytes = json.to_string().into_bytes();
                }
            }
            std::fs::write(&manifest, bytes).unwrap();
            match EmbeddingWriter::resume(&path, 4, 2, origin()) {
                Ok(writer) => prop_assert!(matches!(writer.written(), 0 | 2)),
                Err(e) => prop_assert!(matches!(e.kind(), ErrorKind::Data | ErrorKind::Argument), "{}", e),
            }
        }
    }

    #[test]
    fn a_damaged_file_is_refused_and_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, partial) = (dir.path().join("v.npy"), dir.path().join("v.npy.partial"));
        let manifest = dir.path().join("v.npy.partial.json");
        interrupted(&path);
        let refuse = |file: &Path, change: &dyn Fn(&mut Vec<u8>)| {
            let whole = std::fs::read(file).unwrap();
            let mut changed = whole.clone();
            change(&mut changed);
            std::fs::write(file, &changed).unwrap();
            let error = EmbeddingWriter::resume(&path, 4, 2, origin()).unwrap_err();
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
        assert_eq!(EmbeddingWriter::resume(&path, 4, 2, origin()).unwrap().written(), 2);
    }
}
