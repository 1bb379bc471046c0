//! Checking a complete file of embeddings against its texts and its model.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use super::embeddings::{BLOCK, header, require_finite};
use super::{BLOCK_TEXTS, Embedder, TextFile, embed_texts};
use crate::storage::open_file;
use crate::text::Role;
use crate::{Error, ErrorKind, Result};

/// Maximum number of embeddings that are recomputed.
const SAMPLES: usize = 64;
/// Largest allowed difference of a component, relative to the largest component of the embedding.
const TOLERANCE: f32 = 1e-5;

/// Checks that the file at `path` is complete and contains the embeddings of `texts`: its header and length,
/// that all numbers are finite, and that up to 64 embeddings at regular intervals equal recomputed ones.
/// Returns the number of recomputed embeddings. Memory use is bounded.
///
/// # Errors
/// [`ErrorKind::Data`]: the file has another shape or format, or an embedding differs;
/// [`ErrorKind::Numeric`]: a number is not finite; and the errors of the embedder and of reading.
pub fn verify_embeddings(
    embedder: &(impl Embedder + ?Sized),
    role: Role,
    texts: &TextFile,
    path: impl AsRef<Path>,
) -> Result<usize> {
    let path = path.as_ref();
    let (rows, cols) = (texts.len(), embedder.dimension());
    let differs = |what: &str| {
        Error::new(ErrorKind::Data, what)
            .file(path)
            .expected(format!("{rows} embeddings of {cols} numbers, of the same model and texts"))
            .hint("encode again without --resume, or choose another output")
    };
    let fail = |e| Error::io("read the file", path, e);
    let file = open_file(path).map_err(fail)?;
    let header = header(path, rows, cols)?;
    let length = file.metadata().map_err(fail)?.len();
    let mut reader = BufReader::new(file);
    let mut start = Vec::new();
    (&mut reader).take(header.len() as u64).read_to_end(&mut start).map_err(fail)?;
    let bytes = rows as u64 * cols as u64 * size_of::<f32>() as u64;
    if start != header || length != header.len() as u64 + bytes {
        return Err(differs("the file is not a complete file of these embeddings"));
    }
    let stored = read_samples(&mut reader, (rows, cols), path)?;

    let mut sampled = Vec::with_capacity(stored.len());
    let mut index = 0;
    for block in texts.chunks(BLOCK_TEXTS)? {
        for text in block? {
            if stored.contains_key(&index) {
                sampled.push(text);
            }
            index += 1;
        }
    }
    let computed = embed_texts(embedder, role, &sampled)?;
    for ((row, stored), computed) in stored.iter().zip(computed.rows()) {
        let largest = computed.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= TOLERANCE * largest;
        if !stored.iter().zip(computed).all(close) {
            let what =
                format!("embedding {} (counted from 1) differs from that of its text", row + 1);
            return Err(differs(&what));
        }
    }
    Ok(stored.len())
}

/// Reads all rows and returns the samples by row number. The reader must be at the first row.
fn read_samples(
    reader: &mut BufReader<File>,
    (rows, cols): (usize, usize),
    path: &Path,
) -> Result<BTreeMap<usize, Vec<f32>>> {
    let fail = |e| Error::io("read the file", path, e);
    let step = rows.div_ceil(SAMPLES).max(1);
    let rows_at_a_time = (BLOCK / cols).max(1);
    let mut samples = BTreeMap::new();
    let mut bytes = Vec::new();
    for first in (0..rows).step_by(rows_at_a_time) {
        let count = rows_at_a_time.min(rows - first);
        bytes.resize(count * cols * size_of::<f32>(), 0);
        reader.read_exact(&mut bytes).map_err(fail)?;
        let values: Vec<f32> = bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        require_finite(&values, cols, first, path)?;
        for (row, values) in (first..).zip(values.chunks(cols)) {
            if row % step == 0 || row + 1 == rows {
                samples.insert(row, values.to_vec());
            }
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;
    use crate::retrieval::EmbeddingWriter;

    struct Numbers;
    impl Embedder for Numbers {
        fn dimension(&self) -> usize {
            2
        }

        fn embed(&self, _: Role, texts: &[String]) -> Result<Array2<f32>> {
            let number = |text: &String| text.parse::<f32>().unwrap();
            Ok(Array2::from_shape_fn((texts.len(), 2), |(i, j)| 1.0 + j as f32 * number(&texts[i])))
        }
    }

    #[test]
    fn only_complete_files_are_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let (input, path) = (dir.path().join("texts.txt"), dir.path().join("v.npy"));
        for rows in [1, 10, 300] {
            std::fs::write(&input, (0..rows).map(|i| format!("{i}\n")).collect::<String>())
                .unwrap();
            let texts = TextFile::open(&input).unwrap();
            let mut writer = EmbeddingWriter::create(&path, rows, 2).unwrap();
            let values: Vec<f32> = (0..rows).flat_map(|i| [1.0, 1.0 + i as f32]).collect();
            writer.append(&values).unwrap();
            writer.finish().unwrap();
            let verify = || verify_embeddings(&Numbers, Role::Query, &texts, &path);
            let samples = verify().unwrap();
            assert!(samples == rows || (60..=65).contains(&samples), "{samples} of {rows}");

            let whole = std::fs::read(&path).unwrap();
            let refuse = |change: &dyn Fn(&mut Vec<u8>), kind| {
                let mut bytes = whole.clone();
                change(&mut bytes);
                std::fs::write(&path, bytes).unwrap();
                assert_eq!(verify().unwrap_err().kind(), kind);
                std::fs::write(&path, &whole).unwrap();
            };
            refuse(&|bytes| bytes.truncate(bytes.len() - 1), ErrorKind::Data);
            refuse(&|bytes| bytes.push(0), ErrorKind::Data);
            refuse(&|bytes| bytes[0] ^= 1, ErrorKind::Data);
            refuse(&|bytes| *bytes.last_mut().unwrap() ^= 1, ErrorKind::Data);
            let nan = |bytes: &mut Vec<u8>| {
                let end = bytes.len();
                bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
            };
            refuse(&nan, ErrorKind::Numeric);
        }
    }
}
