//! Reading the values of a tensor block by block, to find those that are not finite.

use super::number::{is_readable, to_f32};
use super::safetensors::SafetensorsFile;
use crate::{Error, ErrorKind, Result};

/// Bytes that are read at a time; a multiple of the size of every number format.
const BLOCK_BYTES: usize = 4 << 20;

/// What a pass over the values of a tensor found.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct TensorScan {
    /// Number of values that are NaN or infinite.
    pub(crate) not_finite: u64,
    /// The first of them: its position in the row-major tensor, and the value.
    pub(crate) first: Option<(u64, f32)>,
    /// Whether a value is not zero.
    pub(crate) has_nonzero: bool,
}

impl SafetensorsFile {
    /// Reads a tensor in blocks of 4 MiB. `on_bytes` receives the size of each block.
    ///
    /// # Errors
    /// There is no such tensor, its type is not f32, f16 or bf16, or the file cannot be read.
    pub(crate) fn scan(&self, name: &str, on_bytes: &dyn Fn(u64)) -> Result<TensorScan> {
        let missing = || Error::new(ErrorKind::Weights, "no such tensor").tensor(self.path(), name);
        let info = self.info(name).ok_or_else(missing)?;
        if !is_readable(info.dtype) {
            return Err(Error::new(ErrorKind::Weights, "weights of an unsupported type")
                .tensor(self.path(), name)
                .expected("F32, F16 or BF16")
                .got(format!("{:?}", info.dtype)));
        }
        let (start, end) = info.data_offsets;
        let mut block = vec![0; BLOCK_BYTES.min(end - start)];
        let (mut scan, mut done, mut element) = (TensorScan::default(), start, 0);
        while done < end {
            let size = (end - done).min(BLOCK_BYTES);
            let block = &mut block[..size];
            self.read_at(done, block)?;
            let values = to_f32(block, info.dtype);
            for (at, &value) in values.iter().enumerate().filter(|(_, x)| !x.is_finite()) {
                scan.not_finite += 1;
                scan.first.get_or_insert((element + at as u64, value));
            }
            scan.has_nonzero |= values.iter().any(|&x| x != 0.0);
            element += values.len() as u64;
            done += size;
            on_bytes(size as u64);
        }
        Ok(scan)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use safetensors::Dtype;

    use super::super::safetensors_writer::SafetensorsWriter;
    use super::*;

    #[test]
    fn values_that_are_not_finite_are_found_in_every_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let elements = BLOCK_BYTES / 4 + 3;
        let declared = vec![
            ("w".to_owned(), Dtype::F32, vec![elements]),
            ("z".to_owned(), Dtype::BF16, vec![2]),
        ];
        let mut writer = SafetensorsWriter::create_at(&path, declared).unwrap();
        let mut values = vec![0.0f32; elements];
        (values[5], values[elements - 1]) = (f32::NEG_INFINITY, f32::NAN);
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write_bytes("w", &bytes).unwrap();
        writer.write_bytes("z", &[0; 4]).unwrap();
        let _ = writer.finish().unwrap();

        let file = SafetensorsFile::open(&path).unwrap();
        let read = Cell::new(0);
        let scan = file.scan("w", &|bytes| read.set(read.get() + bytes)).unwrap();
        assert_eq!((scan.not_finite, scan.first), (2, Some((5, f32::NEG_INFINITY))));
        assert!(scan.has_nonzero && read.get() == bytes.len() as u64);
        assert_eq!(file.scan("z", &|_| ()).unwrap(), TensorScan::default());
        assert!(file.scan("none", &|_| ()).is_err());
    }
}
