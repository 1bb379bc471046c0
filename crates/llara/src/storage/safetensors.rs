//! Reading and writing safetensors files: the header is checked against the file's length, and only one
//! tensor at a time is in memory.

use std::fs::{File, Metadata as FileMetadata};
use std::io::{BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use blake3::Hash;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::input::open_file;
use super::number::{from_f32, is_readable, to_f32};
use super::output::write_failed;
use super::staging::Staging;
use crate::{Error, ErrorKind, Result};

/// Bytes of the header length at the beginning of a file.
const LENGTH_BYTES: u64 = 8;
/// The format's limit on headers.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes that are read at a time to compare a tensor.
const HASHED_BYTES: usize = 1 << 20;

/// A safetensors file whose header was read and is consistent with the file's length.
///
/// The file stays open: if another file replaces it, the data of this one is still read, never the new data
/// with the old header. A write to the open file is detected by its length and modification time.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    metadata: Metadata,
    data_start: u64,
}

/// Length and modification time, which change when a file is written to.
#[derive(Debug, PartialEq)]
struct Stamp {
    length: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(metadata: &FileMetadata) -> Self {
        Stamp { length: metadata.len(), modified: metadata.modified().ok() }
    }
}

impl SafetensorsFile {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// The file is missing, its length does not match its header, or the header is damaged.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let damaged = |what: &str| {
            Error::new(ErrorKind::Weights, what)
                .file(path)
                .hint("the file is damaged or was not copied in full: fetch or export it again")
        };
        let io = |e| Error::io("read weights", path, e);
        let mut file = open_file(path).map_err(io)?;
        let stamp = Stamp::of(&file.metadata().map_err(io)?);
        let length = stamp.length;
        let mut prefix = [0; LENGTH_BYTES as usize];
        if length < LENGTH_BYTES {
            return Err(damaged("not a safetensors file")
                .expected("at least 8 bytes")
                .got(format!("{length} bytes")));
        }
        file.read_exact(&mut prefix).map_err(io)?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > (length - LENGTH_BYTES).min(MAX_HEADER_BYTES) {
            return Err(damaged("the header is longer than the file")
                .expected(format!("at most {} bytes", length - LENGTH_BYTES))
                .got(format!("{header_length} bytes")));
        }
        let mut header = vec![0; header_length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let metadata: Metadata = serde_json::from_slice(&header)
            .map_err(|e| damaged("the header is not a safetensors header").because(e))?;
        let data_start = LENGTH_BYTES + header_length;
        // Offsets may reach 2^64.
        let expected = data_start.saturating_add(metadata.data_len() as u64);
        if length != expected {
            let what = if length < expected { "truncated" } else { "followed by other data" };
            return Err(damaged(&format!("the weights are {what}"))
                .expected(format!("{expected} bytes"))
                .got(format!("{length} bytes")));
        }
        Ok(SafetensorsFile { path: path.to_owned(), file, stamp, metadata, data_start })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Names in the order of the data.
    pub(crate) fn names(&self) -> Vec<String> {
        self.metadata.offset_keys()
    }

    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.metadata.info(name)
    }

    /// The bytes of a tensor, in the file's number format.
    pub(crate) fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for part in self.parts(name)? {
            bytes.extend_from_slice(&part?);
        }
        Ok(bytes)
    }

    /// The same in consecutive parts of whole rows.
    ///
    /// # Errors
    /// There is no such tensor. An item is an error if it cannot be read.
    pub(crate) fn parts(
        &self,
        name: &str,
    ) -> Result<impl Iterator<Item = Result<Vec<u8>>> + use<'_>> {
        let info = self.info(name).ok_or_else(|| {
            Error::new(ErrorKind::Weights, "no such tensor").tensor(&self.path, name)
        })?;
        let (start, end) = info.data_offsets;
        // Of an empty tensor, the other dimensions may be any numbers.
        let row = info.shape.iter().skip(1).fold(1usize, |n, &d| n.saturating_mul(d)).max(1);
        let elements = (PART_ELEMENTS / row).max(1).saturating_mul(row);
        let part = (elements.saturating_mul(info.dtype.bitsize()) / 8).max(1);
        Ok((start..end).step_by(part).map(move |at| {
            let mut bytes = vec![0; part.min(end - at)];
            self.read_at(at, &mut bytes)?;
            Ok(bytes)
        }))
    }

    /// Fills `bytes` from an offset of the data.
    pub(super) fn read_at(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        let io = |e| Error::io("read weights", &self.path, e);
        self.refuse_change()?;
        self.file.read_exact_at(bytes, self.data_start + offset as u64).map_err(io)?;
        // Checked again, because the file may have been written to during the read.
        self.refuse_change()
    }

    /// Hash of a range of the data, read in blocks: a whole tensor can be large.
    fn hash(&self, (start, end): (usize, usize)) -> Result<Hash> {
        let mut hasher = blake3::Hasher::new();
        let mut block = vec![0; HASHED_BYTES.min(end - start)];
        for at in (start..end).step_by(HASHED_BYTES) {
            let block = &mut block[..HASHED_BYTES.min(end - at)];
            self.read_at(at, block)?;
            hasher.update(block);
        }
        Ok(hasher.finalize())
    }

    /// Fails if the open file was written to since its header was read.
    fn refuse_change(&self) -> Result<()> {
        let io = |e| Error::io("read weights", &self.path, e);
        let now = Stamp::of(&self.file.metadata().map_err(io)?);
        if now == self.stamp {
            return Ok(());
        }
        let got = match now.length == self.stamp.length {
            true => "another modification time".to_owned(),
            false => format!("{} bytes", now.length),
        };
        Err(Error::new(ErrorKind::Weights, "the weights changed while they were in use")
            .file(&self.path)
            .expected(format!("the file of {} bytes that was opened", self.stamp.length))
            .got(got)
            .hint("load the model again; write a new model to another folder"))
    }

    /// A tensor as f32, in consecutive parts of whole rows.
    ///
    /// # Errors
    /// The tensor's type is not f32, f16 or bf16. An item is an error if it cannot be read or contains NaN or infinity.
    pub(crate) fn parts_f32(
        &self,
        name: &str,
    ) -> Result<impl Iterator<Item = Result<Vec<f32>>> + use<'_>> {
        let dtype = self.info(name).map_or(Dtype::F32, |info| info.dtype);
        if !is_readable(dtype) {
            return Err(Error::new(ErrorKind::Weights, "weights of an unsupported type")
                .tensor(&self.path, name)
                .expected("F32, F16 or BF16")
                .got(format!("{dtype:?}")));
        }
        let (mut first, name) = (0, name.to_owned());
        let parts = self.parts(&name)?;
        Ok(parts.map(move |bytes| {
            let values = to_f32(&bytes?, dtype);
            if let Some(at) = values.iter().position(|x| !x.is_finite()) {
                return Err(Error::new(ErrorKind::Weights, "weights that are not finite")
                    .tensor(&self.path, &name)
                    .expected("finite numbers")
                    .got(format!("{} at element {}", values[at], first + at))
                    .hint(
                        "the training run that wrote this file had diverged: use an earlier one",
                    ));
            }
            first += values.len();
            Ok(values)
        }))
    }

    /// A tensor as f32.
    ///
    /// # Errors
    /// As of [`parts_f32`](Self::parts_f32), and if there is no memory for it.
    pub(crate) fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let parts = self.parts_f32(name)?;
        let elements = self.info(name).map_or(0, |info| info.shape.iter().product::<usize>());
        let mut values = Vec::new();
        values.try_reserve_exact(elements).map_err(|error| {
            Error::new(ErrorKind::Weights, "there is no memory for the weights")
                .tensor(&self.path, name)
                .got(format!("{elements} elements"))
                .because(error)
        })?;
        for part in parts {
            values.extend_from_slice(&part?);
        }
        Ok(values)
    }
}

/// Elements of a part of a tensor that is converted or copied at a time: 4 MiB of f32.
pub(crate) const PART_ELEMENTS: usize = 1 << 20;

/// A tensor to be written: name, type and shape.
pub(crate) type Declaration = (String, Dtype, Vec<usize>);

/// The first bytes of a file: header length and header, padded so that the data is aligned to 8 bytes.
pub(crate) fn safetensors_header(path: &Path, declared: &[Declaration]) -> Result<Vec<u8>> {
    let too_large =
        || Error::new(ErrorKind::Argument, "the size of a tensor exceeds 64 bits").file(path);
    let mut end = 0usize;
    let mut infos = Vec::with_capacity(declared.len());
    for (name, dtype, shape) in declared {
        let start = end;
        let elements = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
        let bytes =
            elements.and_then(|n| n.checked_mul(dtype.bitsize())).ok_or_else(too_large)? / 8;
        end = end.checked_add(bytes).ok_or_else(too_large)?;
        let data_offsets = (start, end);
        infos
            .push((name.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets }));
    }
    // transformers rejects weights whose metadata does not name the framework (`format`).
    let format = [("format".to_owned(), "pt".to_owned())].into();
    let invalid = |e: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Weights, format!("cannot describe the tensors: {e}")).file(path)
    };
    let metadata = Metadata::new(Some(format), infos).map_err(|e| invalid(&e))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| invalid(&e))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.append(&mut json);
    Ok(header)
}

/// Writes a safetensors file tensor by tensor.
pub(crate) struct SafetensorsWriter {
    path: PathBuf,
    file: BufWriter<File>,
    declared: std::vec::IntoIter<Declaration>,
    /// Whether tensors are hashed.
    hashes: bool,
    /// Declaration and hash of every tensor written so far.
    written: Vec<(Declaration, Hash)>,
}

/// The tensors that [`SafetensorsWriter`] wrote, for the comparison with the file.
#[must_use]
pub(crate) struct WrittenFile {
    /// Name within the folder.
    name: String,
    tensors: Vec<(Declaration, Hash)>,
}

impl WrittenFile {
    /// The type in which a tensor was written.
    pub(crate) fn dtype(&self, tensor: &str) -> Option<Dtype> {
        let found = self.tensors.iter().find(|((name, ..), _)| name == tensor);
        found.map(|((_, dtype, _), _)| *dtype)
    }

    /// Reads the file back, tensor by tensor, and compares it with the tensors that were written.
    ///
    /// # Errors
    /// A tensor is missing or unexpected, or its type, shape or any byte differs.
    pub(crate) fn verify(&self, folder: &Path) -> Result<()> {
        let file = SafetensorsFile::open(&folder.join(&self.name))?;
        let differs = |name: &str, what: &str| {
            Error::new(
                ErrorKind::Weights,
                format!("the saved weights differ from the model: {what}"),
            )
            .tensor(file.path(), name)
            .hint("the disk or its file system may be faulty: save to another one")
        };
        for ((name, dtype, shape), hash) in &self.tensors {
            let range = match file.info(name) {
                Some(info) if info.dtype == *dtype && info.shape == *shape => info.data_offsets,
                _ => return Err(differs(name, "a tensor is missing or has another type or shape")),
            };
            if file.hash(range)? != *hash {
                return Err(differs(name, "a tensor has other bytes than were written"));
            }
        }
        match file.names().len() == self.tensors.len() {
            true => Ok(()),
            false => Err(differs("*", "the file has more tensors than were written")),
        }
    }
}

impl SafetensorsWriter {
    /// Creates `name` in a staged folder and writes the header. Errors name the file by its final path.
    pub(crate) fn create(
        staging: &Staging,
        name: &str,
        declared: Vec<Declaration>,
    ) -> Result<Self> {
        let (at, path) = (staging.path().join(name), staging.target().join(name));
        Self::create_as(&at, path, declared, true)
    }

    /// Creates a file that is not compared with what was written, and writes the header.
    pub(crate) fn create_at(path: &Path, declared: Vec<Declaration>) -> Result<Self> {
        Self::create_as(path, path.to_owned(), declared, false)
    }

    fn create_as(
        at: &Path,
        path: PathBuf,
        declared: Vec<Declaration>,
        hashes: bool,
    ) -> Result<Self> {
        let header = safetensors_header(&path, &declared)?;
        let io = |e| write_failed("write weights", &path, e);
        let file = File::create(at).map_err(io)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(io)?;
        let written = Vec::with_capacity(declared.len());
        Ok(SafetensorsWriter { path, file, declared: declared.into_iter(), hashes, written })
    }

    /// Writes the next declared tensor from f32 values, rounding to its declared type.
    pub(crate) fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        if let Some((.., shape)) = self.declared.as_slice().first()
            && shape.iter().product::<usize>() != values.len()
        {
            let elements = values.len().to_string();
            return Err(self.wrong_size(name, shape.iter().product(), elements));
        }
        self.write_parts(name, values.chunks(PART_ELEMENTS).map(Ok))
    }

    /// Writes the next declared tensor from consecutive parts of its f32 values, rounding to its declared type. One part
    /// is in memory at a time.
    pub(crate) fn write_parts<V: AsRef<[f32]>>(
        &mut self,
        name: &str,
        parts: impl IntoIterator<Item = Result<V>>,
    ) -> Result<()> {
        let declared = self.next(name)?;
        let dtype = declared.1;
        let mut done = 0;
        let (path, bits) = (self.path.clone(), dtype.bitsize());
        let encoded = parts.into_iter().map(|part| {
            let part = part?;
            let bytes = encoded(&path, name, dtype, (done, part.as_ref()))?;
            done += part.as_ref().len();
            Ok(bytes)
        });
        self.write(declared, bits, encoded)
    }

    /// Writes the next declared tensor from bytes of its declared type.
    #[cfg(test)]
    pub(crate) fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let declared = self.next(name)?;
        let bits = declared.1.bitsize();
        self.write(declared, bits, [Ok(bytes.to_vec())])
    }

    /// Copies the next declared tensor, which has the same type and shape in `file`.
    pub(crate) fn copy_from(&mut self, name: &str, file: &SafetensorsFile) -> Result<()> {
        let declared = self.next(name)?;
        let bits = declared.1.bitsize();
        self.write(declared, bits, file.parts(name)?)
    }

    /// Writes the bytes of a tensor, whose elements have so many bits.
    fn write(
        &mut self,
        declared: Declaration,
        bits: usize,
        parts: impl IntoIterator<Item = Result<Vec<u8>>>,
    ) -> Result<()> {
        let elements = declared.2.iter().product::<usize>();
        let mut hasher = blake3::Hasher::new();
        let mut done = 0;
        for bytes in parts {
            let bytes = bytes?;
            done += 8 * bytes.len() / bits;
            if done > elements {
                break;
            }
            if self.hashes {
                hasher.update(&bytes);
            }
            self.file
                .write_all(&bytes)
                .map_err(|e| write_failed("write weights", &self.path, e))?;
        }
        if done != elements {
            // Parts after the first one that is too much are not counted.
            let more = if done > elements { " or more" } else { "" };
            return Err(self.wrong_size(&declared.0, elements, format!("{done}{more}")));
        }
        if self.hashes {
            self.written.push((declared, hasher.finalize()));
        }
        Ok(())
    }

    fn wrong_size(&self, name: &str, declared: usize, elements: String) -> Error {
        Error::new(ErrorKind::Weights, "another size than declared")
            .tensor(&self.path, name)
            .expected(format!("{declared} elements"))
            .got(elements)
    }

    fn next(&mut self, name: &str) -> Result<Declaration> {
        match self.declared.next() {
            Some(declared) if declared.0 == name => Ok(declared),
            other => Err(Error::new(ErrorKind::Weights, "written out of order")
                .tensor(&self.path, name)
                .expected(other.map_or("the end of the file".to_owned(), |(name, ..)| name))),
        }
    }

    /// Writes what is buffered. The file is not flushed to the disk: [`Staging::commit`] and the manifest of a
    /// checkpoint do that, the latter while training goes on. Fails unless all declared tensors were written.
    pub(crate) fn finish(mut self) -> Result<WrittenFile> {
        if let Some((missing, ..)) = self.declared.next() {
            return Err(Error::new(ErrorKind::Weights, "declared but not written")
                .tensor(&self.path, missing));
        }
        let io = |e| write_failed("write weights", &self.path, e);
        self.file.flush().map_err(io)?;
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(WrittenFile { name, tensors: self.written })
    }
}

/// The bytes of a part of a tensor, which starts at element `first`.
fn encoded(
    path: &Path,
    name: &str,
    dtype: Dtype,
    (first, part): (usize, &[f32]),
) -> Result<Vec<u8>> {
    from_f32(part, dtype).map_err(|at| {
        let value = part[at];
        let (what, hint) = if value.is_finite() {
            ("a weight is too large for the file's number format", "save as f32 or bf16")
        } else {
            ("a weight is not finite: training has diverged", "lower the learning rate")
        };
        Error::new(ErrorKind::Numeric, what)
            .tensor(path, name)
            .expected(format!("a finite {dtype:?}"))
            .got(format!("{value} at element {}", first + at))
            .hint(hint)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(path: &Path, values: &[f32]) {
        let declared = vec![
            ("a".to_owned(), Dtype::BF16, vec![1]),
            ("b".to_owned(), Dtype::F32, vec![values.len()]),
        ];
        let (dir, name) = (path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap());
        let staging = Staging::new(dir, "config.json").unwrap();
        let mut writer = SafetensorsWriter::create(&staging, name, declared).unwrap();
        writer.write_f32("a", &[0.5]).unwrap();
        writer.write_f32("b", values).unwrap();
        writer.finish().unwrap().verify(staging.path()).unwrap();
        std::fs::rename(staging.path().join(name), path).unwrap();
    }

    #[test]
    fn one_changed_bit_of_a_written_file_is_detected() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(dir.path(), "config.json").unwrap();
        let declared = vec![("a".to_owned(), Dtype::BF16, vec![4])];
        let mut writer = SafetensorsWriter::create(&staging, "w.safetensors", declared).unwrap();
        writer.write_f32("a", &[1.0, 2.0, 3.0, 4.0]).unwrap();
        let written = writer.finish().unwrap();
        written.verify(staging.path()).unwrap();
        let path = staging.path().join("w.safetensors");
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let message = written.verify(staging.path()).unwrap_err().to_string();
        assert!(message.contains("tensor `a`") && message.contains("other bytes"), "{message}");
    }

    #[test]
    fn a_file_replaced_while_open_is_not_read_and_one_rewritten_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("w.safetensors"), dir.path().join("v.safetensors"));
        write(&path, &[1.0, 2.0]);
        write(&other, &[3.0, 4.0]);
        // Another file in its place: the one that was opened is still read.
        let file = SafetensorsFile::open(&path).unwrap();
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(file.read_f32("b").unwrap(), [1.0, 2.0]);

        let file = SafetensorsFile::open(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let message = file.read_bytes("a").unwrap_err().to_string();
        assert!(message.contains("w.safetensors: the weights changed"), "{message}");

        write(&path, &[1.0, 2.0]);
        let file = SafetensorsFile::open(&path).unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        File::options().write(true).open(&path).unwrap().set_modified(later).unwrap();
        assert!(file.read_bytes("a").unwrap_err().to_string().contains("weights changed"));

        // Saving a model over the folder that it was read from removes the file.
        write(&path, &[1.0, 2.0]);
        let file = SafetensorsFile::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.read_f32("b").unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn written_files_are_read_back_and_readable_by_the_safetensors_crate() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        write(&path, &[1.0, -2.5]);
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.names(), ["a", "b"]);
        assert_eq!(file.read_f32("b").unwrap(), [1.0, -2.5]);
        let bytes = std::fs::read(&path).unwrap();
        let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("a").unwrap().dtype(), Dtype::BF16);
    }

    #[test]
    fn a_tensor_in_parts_is_that_of_one_piece_and_has_the_declared_size() {
        let dir = tempfile::tempdir().unwrap();
        let elements = PART_ELEMENTS + 5;
        let values: Vec<f32> = (0..elements).map(|i| i as f32 * 0.5).collect();
        let declared = || vec![("x".to_owned(), Dtype::F32, vec![elements])];
        let staging = Staging::new(&dir.path().join("model"), "config.json").unwrap();
        let writer = |name: &str| SafetensorsWriter::create(&staging, name, declared()).unwrap();

        let mut whole = writer("whole.safetensors");
        whole.write_f32("x", &values).unwrap();
        let mut parts = writer("parts.safetensors");
        let uneven =
            [&values[..7], &values[7..7], &values[7..elements - 1], &values[elements - 1..]];
        parts.write_parts("x", uneven.map(Ok)).unwrap();
        for (written, name) in [(whole, "whole"), (parts, "parts")] {
            written.finish().unwrap().verify(staging.path()).unwrap();
            let path = staging.path().join(format!("{name}.safetensors"));
            let read = SafetensorsFile::open(&path).unwrap().read_f32("x").unwrap();
            assert!(read == values, "{name}");
        }

        let wrong = |parts: &[&[f32]]| {
            let parts = parts.iter().map(|part| Ok(*part));
            writer("wrong.safetensors").write_parts("x", parts).unwrap_err().to_string()
        };
        for (error, got) in [
            (wrong(&[&values[..9]]), "got: 9"),
            (wrong(&[&values, &values[..1], &values]), &format!("got: {} or more", elements + 1)),
        ] {
            assert!(error.contains("another size than declared") && error.contains(got), "{error}");
        }
        let short = writer("wrong.safetensors").write_f32("x", &values[1..]).unwrap_err();
        assert!(short.to_string().contains(&format!("got: {}", elements - 1)), "{short}");
        let mut with_nan = values.clone();
        with_nan[PART_ELEMENTS + 3] = f32::NAN;
        let error = writer("wrong.safetensors").write_f32("x", &with_nan).unwrap_err().to_string();
        assert!(error.contains(&format!("NaN at element {}", PART_ELEMENTS + 3)), "{error}");
    }

    #[test]
    fn an_empty_tensor_with_impossible_dimensions_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.safetensors");
        let header =
            br#"{"x":{"dtype":"F32","shape":[0,9223372036854775807,8],"data_offsets":[0,0]}}"#;
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(&path, [&length[..], header].concat()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert!(file.read_f32("x").unwrap().is_empty());
    }

    #[test]
    fn a_file_truncated_anywhere_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        write(&path, &[1.0, 2.0, 3.0]);
        let whole = std::fs::read(&path).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert_eq!(SafetensorsFile::open(&path).unwrap_err().kind(), ErrorKind::Weights);
        }
    }

    #[test]
    fn weights_that_are_not_finite_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        write(&path, &[1.0, 2.0]);
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let message = SafetensorsFile::open(&path).unwrap().read_f32("b").unwrap_err().to_string();
        assert!(message.contains("tensor `b`") && message.contains("NaN at element 1"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("w.safetensors");
            std::fs::write(&path, bytes).unwrap();
            if let Ok(file) = SafetensorsFile::open(&path) {
                for name in file.names() {
                    let _ = file.read_f32(&name);
                }
            }
        }

        #[test]
        fn a_header_with_any_byte_changed_never_panics(at in 0usize..120, to in any::<u8>()) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("w.safetensors");
            write(&path, &[1.0, 2.0, 3.0]);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = at % bytes.len();
            bytes[at] = to;
            std::fs::write(&path, bytes).unwrap();
            if let Ok(file) = SafetensorsFile::open(&path) {
                for name in file.names() {
                    let _ = file.read_f32(&name);
                }
            }
        }
    }
}
