//! Reading files of embeddings into memory: `.safetensors` and `.npy`.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use ndarray::Array2;
use safetensors::Dtype;

use super::lines::{excerpt, open_regular};
use crate::storage::{SafetensorsFile, open_file, safetensors_header};
use crate::{Error, ErrorKind, Result};

/// The name of the tensor in a `.safetensors` file of embeddings.
pub(super) const TENSOR: &str = "embeddings";
pub(super) const NPY_MAGIC: &[u8] = b"\x93NUMPY";
/// Longest header that is read, in bytes; safetensors has the same limit.
const MAX_HEADER: u64 = 100_000_000;
/// Numbers that are converted at a time between memory and file.
pub(super) const BLOCK: usize = 16 * 1024;

/// Reads an f32 matrix of embeddings (n, d) from a `.safetensors` file (its tensor `embeddings`) or from a
/// `.npy` file.
///
/// # Errors
/// [`ErrorKind::Argument`]: another extension; [`ErrorKind::Data`], or [`ErrorKind::Weights`] for a damaged
/// safetensors header: the file is damaged or contains something else; [`ErrorKind::Numeric`]: a number is
/// not finite; the error states its row.
pub fn read_embeddings(path: impl AsRef<Path>) -> Result<Array2<f32>> {
    let path = path.as_ref();
    let format = Format::of(path)?;
    let file = open_regular(path)?;
    match format {
        Format::Safetensors => read_safetensors(path),
        Format::Npy => {
            let length = file.metadata().map_err(|e| Error::io("read the file", path, e))?.len();
            let mut source = Source { reader: BufReader::new(file), path, length };
            let layout = source.npy_layout()?;
            source.read_matrix(layout)
        }
    }
}

fn read_safetensors(path: &Path) -> Result<Array2<f32>> {
    let damaged = |what: String| Error::new(ErrorKind::Data, what).file(path);
    let file = SafetensorsFile::open(path)?;
    let Some(tensor) = file.info(TENSOR) else {
        return Err(damaged(format!("there is no tensor `{TENSOR}`"))
            .got(excerpt(&file.names().join(", ")))
            .hint("check the path: this may be a file of weights"));
    };
    let (Dtype::F32, &[rows, cols]) = (tensor.dtype, tensor.shape.as_slice()) else {
        return Err(damaged(format!("`{TENSOR}` is not a matrix of f32"))
            .expected("F32 [n, d]")
            .got(format!("{:?} {:?}", tensor.dtype, tensor.shape)));
    };
    let bytes = file.read_bytes(TENSOR)?;
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    require_finite(&values, cols, 0, path)?;
    Array2::from_shape_vec((rows, cols), values)
        .map_err(|e| damaged("the shape is invalid".to_owned()).because(e))
}

/// Whether the file at `path` begins like a file of embeddings. True for a truncated file, too.
pub fn begins_like_embeddings(path: impl AsRef<Path>) -> std::io::Result<bool> {
    let mut start = Vec::new();
    open_file(path.as_ref())?.take(256).read_to_end(&mut start)?;
    let tensor = format!("\"{TENSOR}\":{{");
    let header = String::from_utf8_lossy(start.get(8..).unwrap_or_default());
    Ok(start.starts_with(NPY_MAGIC) || header.starts_with('{') && header.contains(&tensor))
}

/// The format, by the file name's extension.
pub(super) enum Format {
    Safetensors,
    Npy,
}

impl Format {
    pub(super) fn of(path: &Path) -> Result<Self> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default();
        match extension.to_ascii_lowercase().as_str() {
            "safetensors" => Ok(Format::Safetensors),
            "npy" => Ok(Format::Npy),
            _ => Err(Error::new(ErrorKind::Argument, "unknown format of embeddings")
                .file(path)
                .expected("a name that ends in .safetensors or .npy")),
        }
    }
}

/// The position of a matrix in its file: the offset of its first number, and its shape.
struct Layout {
    start: u64,
    rows: usize,
    cols: usize,
}

/// A file being read. Lengths in its header are compared with the length of the file before they are used.
struct Source<'a> {
    reader: BufReader<File>,
    path: &'a Path,
    length: u64,
}

impl Source<'_> {
    fn damaged(&self, what: impl Into<String>) -> Error {
        Error::new(ErrorKind::Data, what).file(self.path)
    }

    fn bytes(&mut self, count: u64) -> Result<Vec<u8>> {
        if count > self.length.min(MAX_HEADER) {
            return Err(self.damaged("the header is too long").got(format!("{count} bytes")));
        }
        let mut bytes = Vec::new();
        let read = (&mut self.reader).take(count).read_to_end(&mut bytes);
        read.map_err(|e| Error::io("read the file", self.path, e))?;
        if bytes.len() as u64 == count {
            Ok(bytes)
        } else {
            Err(self.damaged("the file ends within its header"))
        }
    }

    /// An unsigned little-endian integer of `width` bytes.
    fn number(&mut self, width: u64) -> Result<u64> {
        let bytes = self.bytes(width)?;
        Ok(bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn npy_layout(&mut self) -> Result<Layout> {
        if self.bytes(NPY_MAGIC.len() as u64).ok().as_deref() != Some(NPY_MAGIC) {
            return Err(self.damaged("this is not a .npy file"));
        }
        let version = self.bytes(2)?;
        let width = match version.as_slice() {
            [1, 0] => 2,
            [2 | 3, 0] => 4,
            _ => return Err(self.damaged("unknown version of .npy").got(format!("{version:?}"))),
        };
        let length = self.number(width)?;
        let header = self.bytes(length)?;
        let text = String::from_utf8_lossy(&header);
        let (rows, cols) = parse_npy_dict(&text).ok_or_else(|| {
            self.damaged("this is not a matrix of f32 in C order")
                .expected("'descr': '<f4', 'fortran_order': False, 'shape': (n, d)")
                .got(excerpt(text.trim()))
                .hint("save it with numpy.save(path, numpy.ascontiguousarray(x, '<f4'))")
        })?;
        let start = NPY_MAGIC.len() as u64 + 2 + width + length;
        let end = (rows as u64)
            .checked_mul(cols as u64)
            .and_then(|numbers| numbers.checked_mul(4)?.checked_add(start))
            .ok_or_else(|| self.damaged("the size of the matrix exceeds 64 bits"))?;
        if end != self.length {
            return Err(self.wrong_length(end));
        }
        Ok(Layout { start, rows, cols })
    }

    fn wrong_length(&self, expected: u64) -> Error {
        self.damaged("the length of the file does not match its header")
            .expected(format!("{expected} bytes"))
            .got(format!("{} bytes", self.length))
            .hint("the file is truncated or damaged; copy or write it again")
    }

    /// Reads the numbers. The layout must have been checked against the length of the file.
    fn read_matrix(mut self, layout: Layout) -> Result<Array2<f32>> {
        let Layout { start, rows, cols } = layout;
        let fail = |e| Error::io("read the file", self.path, e);
        self.reader.seek(SeekFrom::Start(start)).map_err(fail)?;
        let mut left = rows * cols;
        let mut values = Vec::new();
        values.try_reserve_exact(left).map_err(|e| fail(e.into()))?;
        let mut bytes = vec![0; BLOCK.min(left) * size_of::<f32>()];
        while left > 0 {
            let count = BLOCK.min(left);
            let bytes = &mut bytes[..count * size_of::<f32>()];
            self.reader.read_exact(bytes).map_err(fail)?;
            let (numbers, _) = bytes.as_chunks();
            values.extend(numbers.iter().map(|&number| f32::from_le_bytes(number)));
            left -= count;
        }
        require_finite(&values, cols, 0, self.path)?;
        Array2::from_shape_vec((rows, cols), values)
            .map_err(|e| self.damaged("the shape is invalid").because(e))
    }
}

/// The shape in the header of a `.npy` file, if it is a little-endian f32 matrix in C order.
///
/// The header is a Python dict literal. numpy writes its keys sorted, other programs may not, so the order
/// is ignored.
fn parse_npy_dict(text: &str) -> Option<(usize, usize)> {
    let dict = text.trim().strip_prefix('{')?.strip_suffix('}')?.replace('"', "'");
    let value = |key: &str| {
        let (_, rest) = dict.split_once(&format!("'{key}'"))?;
        Some(rest.trim_start().strip_prefix(':')?.trim_start())
    };
    if !value("descr")?.starts_with("'<f4'") || !value("fortran_order")?.starts_with("False") {
        return None;
    }
    let (shape, _) = value("shape")?.strip_prefix('(')?.split_once(')')?;
    let (rows, cols) = shape.trim().trim_end_matches(',').split_once(',')?;
    Some((rows.trim().parse().ok()?, cols.trim().parse().ok()?))
}

/// The header of a file with this shape.
///
/// # Errors
/// [`ErrorKind::Argument`]: an unknown extension, `cols` 0, or a size that exceeds 64 bits.
pub(super) fn header(path: &Path, rows: usize, cols: usize) -> Result<Vec<u8>> {
    let format = Format::of(path)?;
    let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(size_of::<f32>()));
    if bytes.is_none() || cols == 0 {
        return Err(Error::new(ErrorKind::Argument, "the shape is invalid")
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

/// Magic, version, length (u16, little endian), then a Python dict with a newline at the end, padded so
/// that the data is aligned to 64 bytes.
pub(super) fn npy_header(rows: usize, cols: usize) -> Vec<u8> {
    let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {cols}), }}");
    let before = NPY_MAGIC.len() + 2 + 2;
    let length = (before + dict.len() + 1).next_multiple_of(64) - before;
    let mut header = NPY_MAGIC.to_vec();
    header.extend_from_slice(&[1, 0]);
    header.extend_from_slice(&(length as u16).to_le_bytes()); // about 100: it fits in 16 bits
    header.extend_from_slice(format!("{dict:<width$}\n", width = length - 1).as_bytes());
    header
}

/// Fails if a number is not finite. `values` are complete rows, the first of which is row `first`.
pub(super) fn require_finite(values: &[f32], cols: usize, first: usize, path: &Path) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let (row, column) = (first + at / cols, at % cols);
            let what = format!("embedding {row} is not finite (rows counted from 0)");
            Err(Error::new(ErrorKind::Numeric, what)
                .file(path)
                .got(format!("{} in column {column}", values[at])))
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::array;
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;
    use crate::retrieval::EmbeddingWriter;

    const NAMES: [&str; 2] = ["v.safetensors", "v.npy"];

    fn write(dir: &TempDir, name: &str, matrix: &Array2<f32>) -> std::path::PathBuf {
        let path = dir.path().join(name);
        let mut writer = EmbeddingWriter::create(&path, matrix.nrows(), matrix.ncols()).unwrap();
        for row in matrix.rows() {
            writer.append(row.as_slice().unwrap()).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    #[test]
    fn safetensors_reads_what_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = write(&dir, NAMES[0], &array![[1.0, -2.0, 0.5], [0.0, 3.0, 4.0]]);
        let bytes = std::fs::read(path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = file.tensor("embeddings").unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (Dtype::F32, [2, 3].as_slice()));
        assert_eq!(tensor.data()[4..8], (-2.0f32).to_le_bytes());
        assert_eq!((bytes.len() - 24) % 8, 0, "data is not aligned");
    }

    #[test]
    fn npy_bytes_are_those_of_numpy() {
        // numpy.save of numpy.array([[1, -2]], '<f4').
        let dir = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(write(&dir, NAMES[1], &array![[1.0, -2.0]])).unwrap();
        let mut expected =
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2), }"
                .to_vec();
        expected.resize(127, b' ');
        expected.extend_from_slice(b"\n\x00\x00\x80\x3f\x00\x00\x00\xc0");
        assert_eq!(bytes, expected);
    }

    #[test]
    fn other_layouts_of_npy_are_understood_or_refused() {
        let shape = |text: &str| parse_npy_dict(text);
        assert_eq!(shape("{\"shape\":(2,3),'fortran_order':False,'descr':'<f4'}"), Some((2, 3)));
        assert_eq!(
            shape("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3,)}\n"),
            Some((2, 3))
        );
        for bad in [
            "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }",
            "{'descr': '>f4', 'fortran_order': False, 'shape': (2, 3), }",
            "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3, 4), }",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 3), }",
            "{'descr': '<f4', 'fortran_order': False}",
        ] {
            assert_eq!(shape(bad), None, "{bad}");
        }
    }

    #[test]
    fn tensors_of_other_names_and_types_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.safetensors");
        for (name, dtype, shape, expected) in [
            ("weight", Dtype::F32, vec![2, 1], "no tensor `embeddings`"),
            ("embeddings", Dtype::F16, vec![2, 2], "not a matrix of f32"),
            ("embeddings", Dtype::F32, vec![2], "not a matrix of f32"),
        ] {
            let view = safetensors::tensor::TensorView::new(dtype, shape, &[0; 8]).unwrap();
            std::fs::write(&path, safetensors::serialize([(name, view)], None).unwrap()).unwrap();
            let error = read_embeddings(&path).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(begins_like_embeddings(&path).unwrap(), name == TENSOR);
        }
    }

    #[test]
    fn huge_shapes_are_refused_before_memory_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let rows = (1u64 << 61) - 1; // two f32 columns: 2^64 - 8 bytes
        let bytes = u64::MAX - 7;
        let json = format!(
            r#"{{"embeddings":{{"dtype":"F32","shape":[{rows},2],"data_offsets":[0,{bytes}]}}}}"#
        );
        let path = dir.path().join(NAMES[0]);
        std::fs::write(&path, [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat())
            .unwrap();
        assert_eq!(read_embeddings(&path).unwrap_err().kind(), ErrorKind::Weights);
        for rows in [rows, 1 << 40] {
            let path = dir.path().join(NAMES[1]);
            std::fs::write(&path, npy_header(rows as usize, 2)).unwrap();
            assert_eq!(read_embeddings(&path).unwrap_err().kind(), ErrorKind::Data);
        }
        let path = dir.path().join(NAMES[0]);
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert_eq!(read_embeddings(&path).unwrap_err().kind(), ErrorKind::Weights);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn matrices_come_back(values in prop::collection::vec(-1e30f32..1e30, 0..60), cols in 1..6usize) {
            let rows = values.len() / cols;
            let matrix = Array2::from_shape_vec((rows, cols), values[..rows * cols].to_vec()).unwrap();
            let dir = tempfile::tempdir().unwrap();
            for name in NAMES {
                let path = write(&dir, name, &matrix);
                prop_assert!(begins_like_embeddings(&path).unwrap());
                prop_assert_eq!(&read_embeddings(path).unwrap(), &matrix);
            }
        }

        #[test]
        fn damaged_files_are_read_or_refused(
            npy: bool,
            changes in prop::collection::vec((0..160usize, any::<u8>()), 0..4),
            length in prop::option::of(0..160usize),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = write(&dir, NAMES[usize::from(npy)], &array![[1.0, 2.0], [3.0, 4.0]]);
            let mut bytes = std::fs::read(&path).unwrap();
            for (place, byte) in changes {
                if let Some(old) = bytes.get_mut(place) {
                    *old = byte;
                }
            }
            bytes.truncate(length.unwrap_or(usize::MAX));
            std::fs::write(&path, bytes).unwrap();
            match read_embeddings(&path) {
                Ok(matrix) => prop_assert!(matrix.iter().all(|value| value.is_finite())),
                Err(e) => {
                    use ErrorKind::{Data, Numeric, Weights};
                    prop_assert!(matches!(e.kind(), Data | Numeric | Weights), "{e}");
                }
            }
        }
    }
}
