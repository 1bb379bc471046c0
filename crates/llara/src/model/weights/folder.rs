//! Saving a model folder: the files that were loaded, with the trained tensors in place of the original ones.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rand::{SeedableRng, rngs::ChaCha8Rng};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::files::{WeightFiles, index_name, single_name};
use super::load::{load_decoder, load_head, prefix_of, standard_normal};
use crate::backend::{Backend, Shape, View};
use crate::model::{Decoder, DecoderConfig, HEAD_WEIGHT, NamedTensor};
use crate::storage::{
    Declaration, PART_ELEMENTS, SafetensorsFile, SafetensorsWriter, Staging, WrittenFile, read_file,
};
use crate::{Error, ErrorKind, Result};

/// Files of a model folder that are copied unchanged; the tokenizer writes its own files.
const COPIED: [&str; 14] = [
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "USE_POLICY.md",
];

/// The number format in which weights are saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SaveDtype {
    /// Each tensor in the dtype in which it was loaded; f32 for a new model.
    #[default]
    AsLoaded,
    /// All tensors in f32.
    F32,
    /// All tensors in bf16.
    Bf16,
    /// All tensors in f16.
    F16,
}

impl SaveDtype {
    fn dtype(self) -> Option<Dtype> {
        match self {
            SaveDtype::AsLoaded => None,
            SaveDtype::F32 => Some(Dtype::F32),
            SaveDtype::Bf16 => Some(Dtype::BF16),
            SaveDtype::F16 => Some(Dtype::F16),
        }
    }
}

/// The layout of a model folder: the tensors of each file, and the other files.
#[derive(Debug)]
pub struct ModelFolder {
    /// `None` for a new model.
    source: Option<(PathBuf, WeightFiles)>,
    /// `config.json` as it was read, with the order of its keys.
    config: Value,
    /// Prefix of the decoder's tensors in the files.
    prefix: &'static str,
    /// Other files of a new model: name and contents.
    other_files: Vec<(&'static str, Vec<u8>)>,
}

/// A tensor of a file to be written.
struct Planned {
    declaration: Declaration,
    /// Name within the decoder; `None`: copied from the source.
    parameter: Option<String>,
}

impl ModelFolder {
    /// Reads the configuration and the weights of `dir`; matrices are stored as `matrices`.
    pub fn load<B: Backend>(
        backend: &B,
        dir: &Path,
        matrices: crate::backend::Dtype,
    ) -> Result<(Self, Decoder<B>)> {
        if !dir.is_dir() {
            return Err(Error::new(ErrorKind::Io, "there is no such model folder")
                .file(dir)
                .hint("give a folder as `save_pretrained` writes it, or a model id of the Hub"));
        }
        let path = dir.join("config.json");
        let config = DecoderConfig::from_file(&path)?;
        let text = read_file(&path).map_err(|e| Error::io("read", &path, e))?;
        let json = serde_json::from_slice(&text)
            .map_err(|e| Error::new(ErrorKind::Config, "not JSON").file(&path).because(e))?;
        let files = WeightFiles::open(dir)?;
        let decoder = load_decoder(backend, &config, &files, matrices)?;
        let prefix = prefix_of(&files);
        let source = Some((dir.to_owned(), files));
        Ok((ModelFolder { source, config: json, prefix, other_files: Vec::new() }, decoder))
    }

    /// Reads the language-model head from the files of `decoder`'s model and attaches it.
    ///
    /// # Errors
    /// The model is new, or has no head that can be read.
    pub(crate) fn load_head<B: Backend>(
        &self,
        backend: &B,
        decoder: &mut Decoder<B>,
    ) -> Result<()> {
        match &self.source {
            Some((_, files)) => load_head(backend, decoder, files),
            None => Err(Error::new(ErrorKind::Argument, "a new model has no files yet")),
        }
    }

    /// The layout of a new causal language model with this `config.json`.
    pub fn new(config: Value) -> Self {
        ModelFolder { source: None, config, prefix: "model.", other_files: Vec::new() }
    }

    /// The same with one more JSON file, such as `generation_config.json`.
    pub(crate) fn with_json(mut self, name: &'static str, value: &Value) -> Self {
        self.other_files.push((name, pretty(value).into_bytes()));
        self
    }

    /// The folder that the model was loaded from.
    pub fn source(&self) -> Option<&Path> {
        self.source.as_ref().map(|(dir, _)| dir.as_path())
    }

    /// Whether saving with `dtype` keeps all bits of the trained weights.
    pub(crate) fn keeps_f32(&self, dtype: SaveDtype) -> bool {
        match (dtype, &self.source) {
            (SaveDtype::AsLoaded, Some((_, files))) => {
                let dtype_of = |name| files.info(name).map(|info| info.dtype);
                files.names().all(|name| dtype_of(name) == Some(Dtype::F32))
            }
            (SaveDtype::AsLoaded, None) | (SaveDtype::F32, _) => true,
            (SaveDtype::Bf16 | SaveDtype::F16, _) => false,
        }
    }

    /// The name in the weight files of a tensor of the decoder.
    pub(crate) fn name_in_files(&self, parameter: &str) -> String {
        match parameter {
            HEAD_WEIGHT => parameter.to_owned(),
            _ => format!("{}{parameter}", self.prefix),
        }
    }

    /// Bytes of the files that [`write`](Self::write) writes, without those of the tokenizer.
    pub(crate) fn saved_bytes<B: Backend>(&self, decoder: &Decoder<B>, dtype: SaveDtype) -> u64 {
        let tensors = named(decoder);
        let plan = self.plan(decoder, &tensors, dtype);
        let tensors = plan.iter().flat_map(|(_, tensors)| tensors);
        let weights: u64 = tensors
            .map(|Planned { declaration: (name, dtype, shape), .. }| {
                let header = name.len() as u64 + 100; // name, type, shape and offsets as JSON
                shape.iter().product::<usize>() as u64 * dtype.bitsize() as u64 / 8 + header
            })
            .sum();
        let copied = self.source.iter().flat_map(|(dir, _)| COPIED.map(|name| dir.join(name)));
        weights + copied.filter_map(|path| Some(std::fs::metadata(path).ok()?.len())).sum::<u64>()
    }

    /// The values of a weight before it was rounded in memory: those of the file that it was loaded from, if
    /// rounding them gives the bf16 values in memory.
    ///
    /// The second value is false if the weight is bf16 in memory and there is no such file.
    pub(crate) fn exact_values<B: Backend>(
        &self,
        backend: &B,
        tensor: &NamedTensor<'_, B>,
    ) -> Result<(Vec<f32>, bool)> {
        let values = backend.download_view(tensor.values())?;
        if tensor.values().dtype() == crate::backend::Dtype::F32 {
            return Ok((values, true));
        }
        let name = self.name_in_files(tensor.name());
        let files = self.source.as_ref().map(|(_, files)| files);
        let Some(files) = files.filter(|files| files.info(&name).is_some()) else {
            return Ok((values, false));
        };
        let exact = files.read_f32(&name)?;
        let rounded = |x: &f32| half::bf16::from_f32(*x).to_f32().to_bits();
        let same = exact.len() == values.len()
            && exact.iter().zip(&values).all(|(exact, x)| rounded(exact) == x.to_bits());
        Ok(if same { (exact, true) } else { (values, false) })
    }

    /// Writes weights, configuration and copied files of `decoder` into `staging`. Returns a description
    /// of what was written to each weight file.
    pub(crate) fn write<B: Backend>(
        &self,
        backend: &B,
        decoder: &Decoder<B>,
        dtype: SaveDtype,
        staging: &Staging,
    ) -> Result<Vec<WrittenFile>> {
        let in_memory = named(decoder);
        let plan = self.plan(decoder, &in_memory, dtype);
        let mut weight_map = BTreeMap::new();
        let mut total_size = 0;
        let mut written = Vec::with_capacity(plan.len());
        for (file, tensors) in &plan {
            let declared = tensors.iter().map(|t| t.declaration.clone()).collect();
            let mut writer = SafetensorsWriter::create(staging, file, declared)?;
            for Planned { declaration: (name, dtype, shape), parameter } in tensors {
                match parameter.as_deref().and_then(|p| in_memory.get(p)) {
                    Some(t) if t.values().dtype() == crate::backend::Dtype::F32 => {
                        writer.write_parts(name, parts(backend, t.values()))?;
                    }
                    Some(t) => writer.write_f32(name, &self.exact_values(backend, t)?.0)?,
                    None => self.copy_tensor(name, *dtype, shape, &mut writer)?,
                }
                weight_map.insert(name.clone(), file.clone());
                total_size += shape.iter().product::<usize>() * dtype.bitsize() / 8;
            }
            written.push(writer.finish()?);
        }
        if self.source.as_ref().is_some_and(|(_, files)| files.is_sharded()) {
            let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
            staging.write(index_name(), pretty(&index).as_bytes())?;
        }
        if let Some((dir, _)) = &self.source {
            carry_files(dir, staging)?;
        }
        for (name, contents) in &self.other_files {
            staging.write(name, contents)?;
        }
        staging.write("config.json", pretty(&self.config_for(decoder, dtype)).as_bytes())?;
        Ok(written)
    }

    /// The tensors of each file: the layout of the source, or all tensors in one file.
    fn plan<B: Backend>(
        &self,
        decoder: &Decoder<B>,
        in_memory: &HashMap<String, NamedTensor<'_, B>>,
        save: SaveDtype,
    ) -> Vec<(String, Vec<Planned>)> {
        let planned = |name: String, loaded: Dtype, shape: Vec<usize>, parameter| Planned {
            declaration: (name, save.dtype().unwrap_or(loaded), shape),
            parameter,
        };
        let Some((_, files)) = &self.source else {
            let all = decoder.tensors().map(|p| {
                let name = self.name_in_files(p.name());
                planned(name, Dtype::F32, p.shape().to_vec(), Some(p.name().to_owned()))
            });
            return vec![(single_name().to_owned(), all.collect())];
        };
        let config = decoder.config();
        let tensors = |file: &SafetensorsFile| {
            let mut tensors = Vec::new();
            for name in file.names() {
                let Some(info) = file.info(&name) else { continue };
                let bare = name.strip_prefix(self.prefix).unwrap_or(&name);
                match in_memory.get(bare) {
                    Some(p) => {
                        let parameter = Some(bare.to_owned());
                        tensors.push(planned(name, info.dtype, p.shape().to_vec(), parameter));
                    }
                    // A tied head is the embedding table; the copy in the source is not up to date.
                    None if name == HEAD_WEIGHT && config.tie_word_embeddings => {}
                    None => {
                        let mut shape = info.shape.clone();
                        if name.starts_with("lm_head.") && !shape.is_empty() {
                            shape[0] = shape[0].max(config.vocab_size);
                        }
                        tensors.push(planned(name, info.dtype, shape, None));
                    }
                }
            }
            tensors
        };
        files
            .files()
            .iter()
            .map(|file| {
                let name = file.path().file_name().unwrap_or_default().to_string_lossy();
                (name.into_owned(), tensors(file))
            })
            .collect()
    }

    /// Copies a tensor that training does not change: its bytes, unless dtype or size change.
    fn copy_tensor(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[usize],
        writer: &mut SafetensorsWriter,
    ) -> Result<()> {
        let source = self.source.as_ref().and_then(|(_, files)| files.file_of(name));
        let (Some(file), Some(info)) = (source, source.and_then(|f| f.info(name))) else {
            return Err(Error::new(
                ErrorKind::Weights,
                format!(
                    "`{name}` is neither in the model nor in the files that it was loaded from"
                ),
            ));
        };
        if info.dtype == dtype && info.shape == shape {
            return writer.copy_from(name, file);
        }
        let rows = info.shape.first().copied().unwrap_or(1);
        let added = shape.first().copied().unwrap_or(1) - rows;
        if added == 0 {
            return writer.write_parts(name, file.parts_f32(name)?);
        }
        let elements = info.shape.iter().product::<usize>();
        let mut statistics = RowStatistics::new(rows, elements / rows.max(1));
        file.parts_f32(name)?.try_for_each(|part| {
            statistics.add(&part?);
            Ok::<(), Error>(())
        })?;
        let added = std::iter::once_with(|| Ok(statistics.new_rows(added)));
        writer.write_parts(name, file.parts_f32(name)?.chain(added))
    }

    fn config_for<B: Backend>(&self, decoder: &Decoder<B>, dtype: SaveDtype) -> Value {
        let mut config = self.config.clone();
        config["vocab_size"] = json!(decoder.config().vocab_size);
        if decoder.has_head() {
            let class = decoder.config().family.causal_lm_class();
            config["architectures"] = json!([class]);
        }
        let name = match dtype {
            SaveDtype::AsLoaded => return config,
            SaveDtype::F32 => "float32",
            SaveDtype::Bf16 => "bfloat16",
            SaveDtype::F16 => "float16",
        };
        let key = if config.get("torch_dtype").is_some() { "torch_dtype" } else { "dtype" };
        config[key] = json!(name);
        config
    }
}

impl<B: Backend> Decoder<B> {
    /// Adds rows to the embedding table, and to an untied head that is attached, if they have fewer than
    /// `vocab_size`.
    pub(crate) fn grow_vocabulary(&mut self, backend: &B, vocab_size: usize) -> Result<()> {
        let rows = self.embeddings().values().rows();
        if vocab_size <= rows {
            return Ok(());
        }
        let grown = |matrix: &B::Tensor| -> Result<Vec<f32>> {
            let mut values = backend.download(matrix)?;
            values.extend(new_rows(&values, rows, vocab_size - rows));
            Ok(values)
        };
        let table = grown(self.embeddings().values())?;
        let head = self.untied_head().map(grown).transpose()?;
        self.replace_vocabulary(backend, vocab_size, &table, head.as_deref())
    }

    /// The rows that the tokens `ids`, ascending, have in the embedding table, or would have if the vocabulary
    /// grew to contain them. `[ids, d]`
    pub(crate) fn initial_embeddings(&self, backend: &B, ids: &[u32]) -> Result<Vec<f32>> {
        let Some(&last) = ids.last() else { return Ok(Vec::new()) };
        let table = self.embeddings().values();
        let (rows, cols) = table.shape();
        let mut values = backend.download(table)?;
        values.extend(new_rows(&values, rows, (last as usize + 1).saturating_sub(rows)));
        let row = |&id: &u32| &values[id as usize * cols..][..cols];
        Ok(ids.iter().flat_map(row).copied().collect())
    }
}

/// The values of a block of an f32 matrix, a part at a time, on the host.
fn parts<'t, B: Backend>(
    backend: &'t B,
    block: View<'t, B::Tensor>,
) -> impl Iterator<Item = Result<Vec<f32>>> + 't {
    let View { tensor, row, rows, col, cols } = block;
    let stride = tensor.cols();
    // The rows of a matrix follow each other; so do the elements of a part of a vector.
    let (lines, length) = if cols == stride || rows == 1 { (1, rows * cols) } else { (rows, cols) };
    (0..lines).flat_map(move |line| {
        let start = (row + line) * stride + col;
        element_parts(backend, tensor, start..start + length)
    })
}

/// Elements of an f32 matrix, in row-major order, a part at a time, on the host.
pub(crate) fn element_parts<'t, B: Backend>(
    backend: &'t B,
    matrix: &'t B::Tensor,
    range: Range<usize>,
) -> impl Iterator<Item = Result<Vec<f32>>> + 't {
    range.clone().step_by(PART_ELEMENTS).map(move |start| {
        backend.read_elements(matrix, start..(start + PART_ELEMENTS).min(range.end))
    })
}

/// The tensors of a decoder by name.
fn named<B: Backend>(decoder: &Decoder<B>) -> HashMap<String, NamedTensor<'_, B>> {
    decoder.tensors().map(|tensor| (tensor.name().to_owned(), tensor)).collect()
}

/// Rows for new tokens, from a whole table: see [`RowStatistics::new_rows`].
fn new_rows(table: &[f32], rows: usize, count: usize) -> Vec<f32> {
    let mut statistics = RowStatistics::new(rows, table.len() / rows.max(1));
    statistics.add(table);
    statistics.new_rows(count)
}

/// The mean of the rows of a table, and the mean square of its elements.
struct RowStatistics {
    rows: usize,
    mean: Vec<f64>,
    square: f64,
}

impl RowStatistics {
    fn new(rows: usize, cols: usize) -> Self {
        RowStatistics { rows, mean: vec![0.0; cols], square: 0.0 }
    }

    /// Adds whole rows of the table.
    fn add(&mut self, part: &[f32]) {
        let cols = self.mean.len();
        let elements = (self.rows * cols) as f64;
        for row in part.chunks_exact(cols.max(1)) {
            for (mean, &x) in self.mean.iter_mut().zip(row) {
                *mean += f64::from(x) / self.rows as f64;
                self.square += f64::from(x) * f64::from(x) / elements;
            }
        }
    }

    /// Rows for new tokens: the mean of the existing rows, plus noise of a tenth of their standard deviation, so
    /// that no two are equal.
    fn new_rows(&self, count: usize) -> Vec<f32> {
        let mean_square =
            self.mean.iter().map(|m| m * m).sum::<f64>() / self.mean.len().max(1) as f64;
        let noise = 0.1 * (self.square - mean_square).max(0.0).sqrt();
        let mut generator = ChaCha8Rng::seed_from_u64(self.rows as u64);
        (0..count)
            .flat_map(|_| self.mean.iter())
            .map(|m| (m + noise * f64::from(standard_normal(&mut generator))) as f32)
            .collect()
    }
}

fn carry_files(from: &Path, staging: &Staging) -> Result<()> {
    for name in COPIED {
        let path = from.join(name);
        if path.is_file() {
            let contents = read_file(&path).map_err(|e| Error::io("read", &path, e))?;
            staging.write(name, &contents)?;
        }
    }
    Ok(())
}

/// Indented JSON, as `save_pretrained` writes it.
fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
