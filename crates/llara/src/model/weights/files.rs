//! The weight files of a folder: one `model.safetensors`, or shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use crate::backend::Dtype;
use crate::model::ParameterValues;
use crate::storage::{INDEX_FILE, SafetensorsFile, WEIGHTS_FILE};
use crate::{Error, ErrorKind, Result};

/// All tensors of a model folder, by name.
#[derive(Debug)]
pub struct WeightFiles {
    files: Vec<SafetensorsFile>,
    /// Name of a tensor → position in `files`.
    place: BTreeMap<String, usize>,
    index: Option<Index>,
}

/// `model.safetensors.index.json`
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Index {
    weight_map: BTreeMap<String, String>,
}

impl WeightFiles {
    /// Opens the weight files of `dir` and reads their headers.
    ///
    /// # Errors
    /// If there are none, a file is damaged, or the index and the shards disagree.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join(WEIGHTS_FILE);
        if single.exists() {
            return Self::from_parts(vec![SafetensorsFile::open(&single)?], None);
        }
        let index_path = dir.join(INDEX_FILE);
        if !index_path.exists() {
            return Err(no_weights(dir));
        }
        let index = read_index(&index_path)?;
        let shards: BTreeSet<&String> = index.weight_map.values().collect();
        let files = shards
            .iter()
            .map(|shard| SafetensorsFile::open(&dir.join(shard)))
            .collect::<Result<_>>()?;
        let weights = Self::from_parts(files, Some(index.clone()))?;
        weights.check_against(&index, &index_path)?;
        Ok(weights)
    }

    /// [`open`](Self::open) that goes on after a fault: the files that can be read, and all faults.
    pub(crate) fn open_readable(dir: &Path) -> (Self, Vec<Error>) {
        let none = || WeightFiles { files: Vec::new(), place: BTreeMap::new(), index: None };
        let whole = match Self::open(dir) {
            Ok(files) => return (files, Vec::new()),
            Err(error) => error,
        };
        if dir.join(WEIGHTS_FILE).exists() {
            return (none(), vec![whole]);
        }
        let Ok(index) = read_index(&dir.join(INDEX_FILE)) else { return (none(), vec![whole]) };
        let (mut files, mut faults) = (Vec::new(), Vec::new());
        for shard in index.weight_map.values().collect::<BTreeSet<_>>() {
            match SafetensorsFile::open(&dir.join(shard)) {
                Ok(file) => files.push(file),
                Err(error) => faults.push(error),
            }
        }
        // Every shard can be read: they disagree with the index or with each other.
        if faults.is_empty() {
            faults.push(whole);
        }
        let files = Self::from_parts(files, Some(index));
        (files.unwrap_or_else(|_| none()), faults)
    }

    fn from_parts(files: Vec<SafetensorsFile>, index: Option<Index>) -> Result<Self> {
        let mut place = BTreeMap::new();
        for (at, file) in files.iter().enumerate() {
            for name in file.names() {
                if let Some(earlier) = place.insert(name.clone(), at) {
                    return Err(Error::new(ErrorKind::Weights, "a tensor is in two files")
                        .tensor(file.path(), name)
                        .got(format!("also in {}", files[earlier].path().display())));
                }
            }
        }
        Ok(WeightFiles { files, place, index })
    }

    fn check_against(&self, index: &Index, path: &Path) -> Result<()> {
        let wrong: Vec<_> = index
            .weight_map
            .iter()
            .filter(|(name, shard)| {
                let found = self.place.get(*name).map(|&at| self.files[at].path());
                found.and_then(Path::file_name) != Some(shard.as_ref())
            })
            .map(|(name, shard)| format!("{name} (in {shard})"))
            .collect();
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Weights, "tensors of the index are missing in its shards")
            .file(path)
            .got(wrong.join(", "))
            .hint("index and shards come from different exports: fetch the folder again"))
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// Dtype and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.files[*self.place.get(name)?].info(name)
    }

    /// The file that contains a tensor.
    pub(crate) fn file_of(&self, name: &str) -> Option<&SafetensorsFile> {
        Some(&self.files[*self.place.get(name)?])
    }

    /// A tensor as f32, row-major.
    ///
    /// # Errors
    /// If there is no such tensor, its dtype is not f32, f16 or bf16, or a value is not finite.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        match self.file_of(name) {
            Some(file) => file.read_f32(name),
            None => Err(Error::new(ErrorKind::Weights, format!("there is no tensor `{name}`"))),
        }
    }

    /// A tensor, rounded to `dtype` as it is read.
    ///
    /// # Errors
    /// As of [`read_f32`](Self::read_f32).
    pub(crate) fn values(&self, name: &str, dtype: Dtype) -> Result<ParameterValues<'_>> {
        match self.file_of(name) {
            Some(file) => Ok(ParameterValues::Parts(dtype, Box::new(file.parts_f32(name)?))),
            None => Err(Error::new(ErrorKind::Weights, format!("there is no tensor `{name}`"))),
        }
    }

    /// The files, each with its tensors in order.
    pub(crate) fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    pub(super) fn is_sharded(&self) -> bool {
        self.index.is_some()
    }

    /// The first file, for messages about the weights as a whole.
    pub(crate) fn path(&self) -> PathBuf {
        match self.files.as_slice() {
            [only] => only.path().to_owned(),
            many => many
                .first()
                .and_then(|f| f.path().parent())
                .unwrap_or(Path::new(""))
                .join(INDEX_FILE),
        }
    }
}

/// Name of the index file.
pub(super) const fn index_name() -> &'static str {
    INDEX_FILE
}

/// Name of the only weight file of a folder without shards.
pub(super) const fn single_name() -> &'static str {
    WEIGHTS_FILE
}

fn read_index(path: &Path) -> Result<Index> {
    let text = crate::storage::read_file(path)
        .map_err(|e| Error::io("read the index of shards", path, e))?;
    let index: Index = serde_json::from_slice(&text).map_err(|e| {
        Error::new(ErrorKind::Weights, "not an index of shards")
            .file(path)
            .because(e)
            .expected("an object with `weight_map`: tensor name → file name")
    })?;
    if index.weight_map.is_empty() {
        return Err(Error::new(ErrorKind::Weights, "the index names no tensors").file(path));
    }
    for (name, shard) in &index.weight_map {
        let mut parts = Path::new(shard).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
        if !plain || !shard.ends_with(".safetensors") {
            return Err(Error::new(ErrorKind::Weights, "a shard outside the model folder")
                .tensor(path, name)
                .expected("the name of a .safetensors file in the same folder, without a path")
                .got(format!("{shard:?}"))
                .hint("do not load this folder unless you trust its source"));
        }
    }
    Ok(index)
}

fn no_weights(dir: &Path) -> Error {
    let error = Error::new(ErrorKind::Weights, "no weights in this folder")
        .file(dir)
        .expected(format!("{WEIGHTS_FILE}, or shards with {INDEX_FILE}"));
    if dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists() {
        error
            .got("weights in PyTorch's pickle format")
            .hint("load it with transformers once and `save_pretrained` it to a new folder")
    } else {
        error.hint("check the path, and that the download of the model is complete")
    }
}
