//! Reading safetensors files: the header is checked against the file's length, and only one
//! tensor at a time is in memory.

use std::fs::{File, Metadata as FileMetadata};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use blake3::Hash;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::input::open_file;
use super::number::{is_readable, to_f32};
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
    pub(super) fn hash(&self, (start, end): (usize, usize)) -> Result<Hash> {
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

#[cfg(test)]
mod tests {
    use super::super::safetensors_writer::SafetensorsWriter;
    use super::super::staging::Staging;
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
