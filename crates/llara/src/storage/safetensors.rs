//! One safetensors file: its header checked against its length, tensors read one at a time, and
//! written one at a time, so that neither direction ever holds more than one tensor.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::number::{from_f32, is_readable, to_f32};
use super::staging::Staging;
use crate::{Error, ErrorKind, Result};

/// Bytes of the length that a file begins with.
const LENGTH_BYTES: u64 = 8;
/// The format's own limit on headers.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A safetensors file whose header has been read and found consistent with the file's length.
#[derive(Debug)]
pub(crate) struct SafetensorsFile {
    path: PathBuf,
    metadata: Metadata,
    data_start: u64,
}

impl SafetensorsFile {
    /// Reads and checks the header.
    ///
    /// # Errors
    /// When the file is missing, shorter or longer than its header says, or the header is damaged.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let damaged = |what: &str| {
            Error::new(ErrorKind::Weights, what)
                .file(path)
                .hint("the file is damaged or was not copied in full: fetch or export it again")
        };
        let io = |e| Error::io("read weights", path, e);
        let mut file = super::open_file(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut prefix = [0; LENGTH_BYTES as usize];
        if length < LENGTH_BYTES {
            return Err(damaged("not a safetensors file")
                .expected("at least 8 bytes")
                .got(format!("{length} bytes")));
        }
        file.read_exact(&mut prefix).map_err(io)?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > (length - LENGTH_BYTES).min(MAX_HEADER_BYTES) {
            return Err(damaged("the header's length reaches beyond the file")
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
        Ok(SafetensorsFile { path: path.to_owned(), metadata, data_start })
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

    /// The bytes of a tensor as they stand in the file.
    pub(crate) fn read_bytes(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.info(name).ok_or_else(|| {
            Error::new(ErrorKind::Weights, "no such tensor").tensor(&self.path, name)
        })?;
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        let mut read = || {
            let mut file = File::open(&self.path)?;
            file.seek(SeekFrom::Start(self.data_start + start as u64))?;
            file.read_exact(&mut bytes)
        };
        read().map_err(|e| Error::io("read weights", &self.path, e))?;
        Ok(bytes)
    }

    /// A tensor as f32.
    ///
    /// # Errors
    /// When its type is not f32, f16 or bf16, or when it holds NaN or infinity.
    pub(crate) fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.read_bytes(name)?;
        let dtype = self.info(name).map_or(Dtype::F32, |info| info.dtype);
        if !is_readable(dtype) {
            return Err(Error::new(ErrorKind::Weights, "weights of an unsupported type")
                .tensor(&self.path, name)
                .expected("F32, F16 or BF16")
                .got(format!("{dtype:?}")));
        }
        let values = to_f32(&bytes, dtype);
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::new(ErrorKind::Weights, "weights that are not finite")
                .tensor(&self.path, name)
                .expected("finite numbers")
                .got(format!("{} at element {at}", values[at]))
                .hint("the training run that wrote this file had diverged: use an earlier one"));
        }
        Ok(values)
    }
}

/// What a file is going to contain: name, type and shape of each tensor, in order.
pub(crate) type Declaration = (String, Dtype, Vec<usize>);

/// What a file begins with: the header's length and the header, padded so that data is aligned to 8.
pub(crate) fn safetensors_header(path: &Path, declared: &[Declaration]) -> Result<Vec<u8>> {
    let too_large = || Error::new(ErrorKind::Argument, "a tensor beyond 64 bits").file(path);
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
    // transformers refuses weights that do not say which framework's layout they follow.
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
}

impl SafetensorsWriter {
    /// Creates `name` in a staged folder and writes the header of what will follow. Errors name the
    /// file by the place that it will have.
    pub(crate) fn create(
        staging: &Staging,
        name: &str,
        declared: Vec<Declaration>,
    ) -> Result<Self> {
        let path = staging.target().join(name);
        let header = safetensors_header(&path, &declared)?;
        let io = |e| Error::io("write weights", &path, e);
        let file = File::create(staging.path().join(name)).map_err(io)?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&header).map_err(io)?;
        Ok(SafetensorsWriter { path, file, declared: declared.into_iter() })
    }

    /// Writes the next declared tensor from f32 values, rounding to its declared type.
    pub(crate) fn write_f32(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let (dtype, elements) = self.next(name)?;
        if elements != values.len() {
            return Err(Error::new(ErrorKind::Weights, "another size than declared")
                .tensor(&self.path, name)
                .expected(elements)
                .got(values.len()));
        }
        let bytes = from_f32(values, dtype).map_err(|at| {
            let value = values[at];
            let (what, hint) = if value.is_finite() {
                ("a weight is too large for the file's number format", "save as f32 or bf16")
            } else {
                ("a weight is not finite: training has diverged", "lower the learning rate")
            };
            Error::new(ErrorKind::Numeric, what)
                .tensor(&self.path, name)
                .expected(format!("a finite {dtype:?}"))
                .got(format!("{value} at element {at}"))
                .hint(hint)
        })?;
        self.write(&bytes)
    }

    /// Writes the next declared tensor from bytes of its declared type.
    pub(crate) fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (dtype, elements) = self.next(name)?;
        if elements * dtype.bitsize() / 8 != bytes.len() {
            return Err(Error::new(ErrorKind::Weights, "another size than declared")
                .tensor(&self.path, name)
                .got(format!("{} bytes", bytes.len())));
        }
        self.write(bytes)
    }

    fn next(&mut self, name: &str) -> Result<(Dtype, usize)> {
        match self.declared.next() {
            Some((declared, dtype, shape)) if declared == name => {
                Ok((dtype, shape.iter().product()))
            }
            other => Err(Error::new(ErrorKind::Weights, "written out of order")
                .tensor(&self.path, name)
                .expected(other.map_or("the end of the file".to_owned(), |(name, ..)| name))),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io("write weights", &self.path, e))
    }

    /// Flushes everything to the disk; an error unless all declared tensors were written.
    pub(crate) fn finish(mut self) -> Result<()> {
        if let Some((missing, ..)) = self.declared.next() {
            return Err(Error::new(ErrorKind::Weights, "declared but not written")
                .tensor(&self.path, missing));
        }
        let io = |e| Error::io("write weights", &self.path, e);
        self.file.flush().map_err(io)?;
        self.file.get_ref().sync_all().map_err(io)
    }
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
        writer.finish().unwrap();
        std::fs::rename(staging.path().join(name), path).unwrap();
    }

    #[test]
    fn what_is_written_is_read_back_and_is_what_the_format_crate_reads() {
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
    fn a_file_cut_anywhere_is_refused() {
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
