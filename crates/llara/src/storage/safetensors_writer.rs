//! Writing safetensors files: tensor by tensor, in parts, and the comparison with what was written.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use blake3::Hash;
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::number::from_f32;
use super::output::write_failed;
use super::safetensors::{PART_ELEMENTS, SafetensorsFile};
use super::staging::Staging;
use crate::{Error, ErrorKind, Result};

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
        let path = self.path.clone();
        let encoded = parts.into_iter().map(|part| {
            let part = part?;
            let bytes = encoded(&path, name, dtype, (done, part.as_ref()))?;
            done += part.as_ref().len();
            Ok(bytes)
        });
        self.write(declared, encoded)
    }

    /// Writes the next declared tensor from bytes of its declared type.
    #[cfg(test)]
    pub(crate) fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let declared = self.next(name)?;
        self.write(declared, [Ok(bytes.to_vec())])
    }

    /// Copies the next declared tensor, which has the same type and shape in `file`.
    pub(crate) fn copy_from(&mut self, name: &str, file: &SafetensorsFile) -> Result<()> {
        let declared = self.next(name)?;
        self.write(declared, file.parts(name)?)
    }

    /// Writes the bytes of a tensor, which are those of its declared type and shape.
    fn write(
        &mut self,
        declared: Declaration,
        parts: impl IntoIterator<Item = Result<Vec<u8>>>,
    ) -> Result<()> {
        let elements = declared.2.iter().product::<usize>();
        let mut hasher = blake3::Hasher::new();
        let mut done = 0;
        for bytes in parts {
            let bytes = bytes?;
            done += 8 * bytes.len() / declared.1.bitsize();
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
}
