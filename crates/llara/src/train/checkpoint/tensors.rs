//! The optimizer's files of a checkpoint: moments, and f32 weights if those of the model folder are rounded.
//!
//! Each rank writes the elements that it owns. The moments of a model's tensor are named `KIND.TENSOR`, or
//! `KIND.TENSOR[START..END]` where they are a part of it, with elements in row-major order. A parameter of
//! several tensors (q, k and v) is written as these, so that the file does not depend on which are stored as one.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype;

use crate::backend::{Backend, Shape};
use crate::model::weights::element_parts;
use crate::model::{Decoder, Parameter};
use crate::storage::{SafetensorsFile, SafetensorsWriter};
use crate::train::flat_layout::ParameterSlice;
use crate::train::optimizer::AdamW;
use crate::{Error, ErrorKind, Result};

const FIRST: &str = "first_moment";
const SECOND: &str = "second_moment";
const MASTER: &str = "weight";

/// The name of a rank's file.
pub(super) fn file_name(rank: usize, ranks: usize) -> String {
    match ranks {
        1 => "optimizer.safetensors".to_owned(),
        _ => format!("optimizer-{:05}-of-{ranks:05}.safetensors", rank + 1),
    }
}

/// Bytes that all ranks together write, within some kilobytes.
pub(super) fn bytes<B: Backend>(decoder: &Decoder<B>, with_weights: bool) -> u64 {
    let each = if with_weights { 12 } else { 8 };
    decoder
        .trainable_parameters()
        .map(|parameter| {
            let (rows, cols) = parameter.values().shape();
            each * (rows * cols) as u64 + 400
        })
        .sum()
}

/// Writes the moments that this rank owns and, with `with_weights`, the weights in f32.
pub(super) fn write<B: Backend>(
    folder: &Path,
    file: &str,
    (backend, decoder): (&B, &Decoder<B>),
    optimizer: &AdamW<B>,
    with_weights: bool,
) -> Result<()> {
    let parameters: Vec<_> = decoder.trainable_parameters().collect();
    let kinds = [FIRST, SECOND, MASTER];
    let kinds = if with_weights { &kinds[..] } else { &kinds[..2] };
    let mut declared = Vec::new();
    for owned in optimizer.owned() {
        for kind in kinds {
            for part in parts(parameters[owned.slice.parameter], &owned.slice.elements) {
                declared.push((part.file_name(kind), Dtype::F32, vec![part.elements.len()]));
            }
        }
    }
    let mut writer = SafetensorsWriter::create_at(&folder.join(file), declared)?;
    for owned in optimizer.owned() {
        let parameter = parameters[owned.slice.parameter];
        for &kind in kinds {
            let (matrix, offset) = match kind {
                FIRST => (&owned.first, 0),
                SECOND => (&owned.second, 0),
                _ => (parameter.values(), owned.slice.elements.start),
            };
            for part in parts(parameter, &owned.slice.elements) {
                let Range { start, end } = part.of_range;
                let values = element_parts(backend, matrix, offset + start..offset + end);
                writer.write_parts(&part.file_name(kind), values)?;
            }
        }
    }
    // The manifest has the hash of the file.
    drop(writer.finish()?);
    Ok(())
}

/// Elements of one tensor among a range of a parameter's elements.
struct Part<'p> {
    tensor: &'p str,
    /// Number of elements of the tensor.
    tensor_len: usize,
    /// Elements of the tensor, row by row.
    elements: Range<usize>,
    /// The same, counted from the start of the range.
    of_range: Range<usize>,
}

impl Part<'_> {
    fn file_name(&self, kind: &str) -> String {
        let (Range { start, end }, tensor) = (&self.elements, self.tensor);
        match self.elements.len() == self.tensor_len {
            true => format!("{kind}.{tensor}"),
            false => format!("{kind}.{tensor}[{start}..{end}]"),
        }
    }
}

/// The tensors that have elements in `range` of a parameter's elements, in order.
fn parts<'p, B: Backend>(parameter: &'p Parameter<B>, range: &Range<usize>) -> Vec<Part<'p>> {
    let mut first = 0;
    let mut parts = Vec::new();
    for tensor in parameter.tensors() {
        let end = first + tensor.elements();
        let (from, to) = (range.start.max(first), range.end.min(end));
        if from < to {
            parts.push(Part {
                tensor: tensor.name(),
                tensor_len: tensor.elements(),
                elements: from - first..to - first,
                of_range: from - range.start..to - range.start,
            });
        }
        first = end;
    }
    parts
}

/// The files of all ranks of a checkpoint.
pub(super) struct SavedTensors {
    files: Vec<SafetensorsFile>,
    /// Parts of each tensor `KIND.TENSOR`: first element, file and name there.
    parts: HashMap<String, Vec<(usize, usize, String)>>,
    folder: PathBuf,
}

impl SavedTensors {
    pub(super) fn open(folder: &Path, ranks: usize) -> Result<Self> {
        let mut files = Vec::with_capacity(ranks);
        let mut parts: HashMap<String, Vec<_>> = HashMap::new();
        for rank in 0..ranks {
            let file = SafetensorsFile::open(&folder.join(file_name(rank, ranks)))?;
            for name in file.names() {
                let (tensor, start) = match name.split_once('[') {
                    None => (name.clone(), 0),
                    Some((tensor, range)) => {
                        let start =
                            range.split_once("..").and_then(|(start, _)| start.parse().ok());
                        (tensor.to_owned(), start.unwrap_or(usize::MAX))
                    }
                };
                parts.entry(tensor).or_default().push((start, rank, name));
            }
            files.push(file);
        }
        parts.values_mut().for_each(|parts| parts.sort());
        Ok(SavedTensors { files, parts, folder: folder.to_owned() })
    }

    /// Elements of a parameter.
    fn read<B: Backend>(
        &self,
        kind: &str,
        parameter: &Parameter<B>,
        range: &Range<usize>,
    ) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(range.len());
        for part in parts(parameter, range) {
            values.extend(self.read_tensor(format!("{kind}.{}", part.tensor), &part.elements)?);
        }
        Ok(values)
    }

    /// The elements `range` of a tensor.
    fn read_tensor(&self, tensor: String, range: &Range<usize>) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(range.len());
        for (start, file, name) in self.parts.get(&tensor).into_iter().flatten() {
            let length = self.files[*file].info(name).map_or(0, |info| info.shape.iter().product());
            let end = start.saturating_add(length);
            let (first, last) = ((*start).max(range.start), end.min(range.end));
            if first >= last || first != range.start + values.len() {
                continue;
            }
            let part = self.files[*file].read_f32(name)?;
            values.extend_from_slice(&part[first - start..last - start]);
        }
        if values.len() == range.len() {
            return Ok(values);
        }
        Err(Error::new(ErrorKind::Weights, "the optimizer's state does not fit the model")
            .tensor(&self.folder, tensor)
            .expected(format!("elements {range:?}"))
            .got(format!("{} of them", values.len()))
            .hint("resume with the model and the adapter settings of the interrupted run"))
    }

    /// Sets the weights of all trainable parameters.
    pub(super) fn restore_weights<B: Backend>(
        &self,
        backend: &B,
        decoder: &mut Decoder<B>,
    ) -> Result<()> {
        for parameter in decoder.trainable_parameters_mut() {
            let (rows, cols) = parameter.values().shape();
            let values = self.read(MASTER, parameter, &(0..rows * cols))?;
            parameter.set_values(backend, backend.upload(&values, rows, cols)?)?;
        }
        Ok(())
    }

    /// The moments of the slices that a rank owns, in the order of the slices.
    pub(super) fn restore_moments<B: Backend>(
        &self,
        backend: &B,
        decoder: &Decoder<B>,
        optimizer: &mut AdamW<B>,
    ) -> Result<()> {
        let parameters: Vec<_> = decoder.trainable_parameters().collect();
        for owned in optimizer.owned_mut() {
            let ParameterSlice { parameter, elements, .. } = &owned.slice;
            for (kind, moment) in [(FIRST, &mut owned.first), (SECOND, &mut owned.second)] {
                let values = self.read(kind, parameters[*parameter], elements)?;
                backend.write_elements(moment, 0, &values)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::backend::{Cpu, Dtype as Stored};
    use crate::model::{DecoderConfig, ParameterValues};
    use crate::storage::PART_ELEMENTS;
    use crate::train::flat_layout::FlatLayout;
    use crate::train::optimizer::AdamWConfig;

    /// A decoder of which two parameters have more elements than are written at a time.
    fn decoder(cpu: &Cpu) -> Decoder<Cpu> {
        let config = json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 9000,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": 17_000, "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
        });
        let config = DecoderConfig::from_json(config.to_string().as_bytes()).unwrap();
        let mut next = 0u32;
        Decoder::build(cpu, config, &mut |_, shape| {
            let values = (0..shape.iter().product::<usize>()).map(|_| {
                next += 1;
                next as f32
            });
            Ok(ParameterValues::F32(values.collect()))
        })
        .unwrap()
    }

    #[test]
    fn large_tensors_of_several_ranks_are_read_back_in_any_division() {
        let (cpu, dir) = (Cpu::new(), tempfile::tempdir().unwrap());
        let mut decoder = decoder(&cpu);
        let parameters = || decoder.trainable_parameters();
        let largest = parameters().map(|p| p.values().rows() * p.values().cols()).max().unwrap();
        assert!(largest > PART_ELEMENTS + 5);
        let total: usize = parameters().map(|p| p.values().rows() * p.values().cols()).sum();
        // A number that says where an element is.
        let first = |at: usize| at as f32 + 0.25;
        let ranks = 3;
        for rank in 0..ranks {
            let layout = FlatLayout::of(&decoder, ranks, 1 << 22);
            let config = AdamWConfig::default();
            let mut adamw = AdamW::sharded(&cpu, &mut decoder, config, layout, rank).unwrap();
            let mut starts = Vec::new();
            for range in adamw.layout().clone().owned(rank) {
                starts.extend(range);
            }
            let mut starts = starts.into_iter();
            for owned in adamw.owned_mut() {
                let values: Vec<f32> =
                    starts.by_ref().take(owned.slice.elements.len()).map(first).collect();
                cpu.write_elements(&mut owned.first, 0, &values).unwrap();
                let second: Vec<f32> = values.iter().map(|x| -x).collect();
                cpu.write_elements(&mut owned.second, 0, &second).unwrap();
            }
            let file = file_name(rank, ranks);
            write(dir.path(), &file, (&cpu, &decoder), &adamw, true).unwrap();
        }

        let saved = SavedTensors::open(dir.path(), ranks).unwrap();
        let mut restored = AdamW::new(&cpu, &mut decoder, AdamWConfig::default()).unwrap();
        saved.restore_moments(&cpu, &decoder, &mut restored).unwrap();
        let mut at = 0;
        for owned in restored.owned() {
            let (one, two) =
                (cpu.download(&owned.first).unwrap(), cpu.download(&owned.second).unwrap());
            for (x, y) in one.into_iter().zip(two) {
                assert_eq!((x, y), (first(at), -first(at)), "element {at} of {total}");
                at += 1;
            }
        }
        assert_eq!(at, total);

        let want: Vec<Vec<f32>> =
            decoder.trainable_parameters().map(|p| cpu.download(p.values()).unwrap()).collect();
        for parameter in decoder.trainable_parameters_mut() {
            let (rows, cols) = parameter.values().shape();
            parameter.set_values(&cpu, cpu.zeros(rows, cols, Stored::F32).unwrap()).unwrap();
        }
        saved.restore_weights(&cpu, &mut decoder).unwrap();
        for (parameter, want) in decoder.trainable_parameters().zip(want) {
            assert!(
                cpu.download(parameter.values()).unwrap() == want,
                "{:?}",
                parameter.values().shape()
            );
        }
    }
}
