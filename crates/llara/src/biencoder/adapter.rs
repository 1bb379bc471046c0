//! LoRA adapters of a bi-encoder: attaching, merging, and saving and loading in the format of PEFT.

use std::path::Path;

use super::adapter_config::{ADAPTER_CONFIG_FILE, AdapterConfig, config_json};
use super::adapter_tokens::{AdapterTokens, TABLE, TokenNames};
use super::card::model_card;
use super::recipe::RECIPE_FILE;
use super::staged::{StagedFolder, keep_unverified};
use super::{BiEncoderModel, Probes};
use crate::backend::{Backend, Dtype};
use crate::model::{
    DecoderConfig, LoraConfig, NamedTensor, ParameterValues, SavedTokens, TRAINED_TOKENS,
};
use crate::storage::{
    CARD_FILE, Declaration, SafetensorsFile, SafetensorsWriter, Staging, read_file,
};
use crate::text::{PromptEncoder, TOKENIZER_FILE, TextTokenizer};
use crate::{Error, ErrorKind, Result};

pub(crate) const ADAPTER_WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Prefix of the decoder's parameter names in PEFT's files.
const PREFIX: &str = "base_model.model.";
/// The same if the base model of the adapter is a causal language model.
const CAUSAL_LM_PREFIX: &str = "base_model.model.model.";

impl<B: Backend> BiEncoderModel<B> {
    /// Freezes the model and attaches new adapters, whose product is zero before training, and the embeddings
    /// of the tokens that are trained with them. The model must have been loaded with
    /// [`Loader::vocabulary_in_adapter`](super::Loader::vocabulary_in_adapter) if some of these are new.
    ///
    /// # Errors
    /// If a setting is out of range or the targets match no projection.
    pub fn attach_new_adapter(&mut self, config: &LoraConfig, seed: u64) -> Result<()> {
        self.refuse_second_adapter()?;
        self.decoder.attach_new_adapters(&self.backend, config, seed)?;
        self.adapter = Some(config.clone());
        Ok(())
    }

    /// Freezes the model and attaches adapters of zeros, for the counting backend.
    pub(crate) fn attach_zero_adapter(&mut self, config: &LoraConfig) -> Result<()> {
        let backend = self.backend.clone();
        self.decoder.attach_adapters(&backend, config, &mut |_, _| {
            Ok(ParameterValues::Zeros(Dtype::F32))
        })?;
        self.adapter = Some(config.clone());
        Ok(())
    }

    /// Freezes the model and attaches the adapter of a PEFT folder. Where the folder has token embeddings, those
    /// that differ from the base model's are attached too, and are trained if the adapter is trained further.
    ///
    /// # Errors
    /// If a file is missing or damaged, the adapter uses a method that is not supported, or its matrices do not
    /// have the shapes of the model (all listed).
    pub fn attach_adapter(&mut self, dir: &Path) -> Result<()> {
        self.attach_saved(dir, None)
    }

    /// [`attach_adapter`](Self::attach_adapter) with the embeddings of the tokens `only`, ascending, if it is given.
    pub(super) fn attach_saved(&mut self, dir: &Path, only: Option<&[u32]>) -> Result<()> {
        self.refuse_second_adapter()?;
        let config = AdapterConfig::read(dir)?;
        let file = SafetensorsFile::open(&dir.join(ADAPTER_WEIGHTS_FILE))?;
        let prefix = prefix_in_adapter(&file.names());
        let names = TokenNames::new(&file, prefix, &config);
        let mut faults = names.faults(&config, self.dimension());
        let tokens = match faults.is_empty() {
            true => names.read(&config, self.dimension(), &mut || self.base_table(), only)?,
            false => AdapterTokens::default(),
        };
        let mut embeddings = tokens.rows;
        let config = LoraConfig { trained_tokens: tokens.ids, ..config.lora };
        let mut used = std::collections::HashSet::new();
        let backend = self.backend.clone();
        let attached = self.decoder.attach_adapters(&backend, &config, &mut |name, shape| {
            if name == TRAINED_TOKENS {
                return Ok(ParameterValues::F32(std::mem::take(&mut embeddings)));
            }
            let name = format!("{prefix}{name}");
            let found = file.info(&name).map(|info| info.shape.clone());
            used.insert(name.clone());
            if found.as_deref() == Some(shape) {
                return Ok(ParameterValues::F32(file.read_f32(&name)?));
            }
            faults.push(match found {
                None => format!("missing: {name} {shape:?}"),
                Some(found) => format!("misshapen: {name}: expected {shape:?}, got {found:?}"),
            });
            Ok(ParameterValues::Zeros(Dtype::F32))
        });
        attached.map_err(|e| e.file(file.path()))?;
        let unknown =
            file.names().into_iter().filter(|name| !used.contains(name) && !names.contain(name));
        faults.extend(unknown.map(|name| format!("unknown: {name}")));
        if !faults.is_empty() {
            return Err(misfit(&file, &faults));
        }
        self.adapter = Some(config);
        Ok(())
    }

    /// Adds the adapter to the weights, `W += scale · B · A`, in f32, and writes its token embeddings to the
    /// table, whose vocabulary grows if it has no rows for them. Weights that are stored as bf16 in memory
    /// are read again from the model's files, so that the adapter is not added to rounded weights.
    ///
    /// # Errors
    /// If a weight is stored as bf16 and differs from the model's files, or there are no files. The model is
    /// then unchanged.
    pub fn merge_adapter(&mut self) -> Result<()> {
        let (backend, folder) = (self.backend.clone(), &self.folder);
        self.decoder.merge_adapters(&backend, &mut |weight| {
            let (values, exact) = folder.exact_values(&backend, weight)?;
            if exact {
                return Ok(values);
            }
            let error = Error::new(
                ErrorKind::Weights,
                format!(
                    "`{}` is rounded to bf16: an adapter added to it would lose precision",
                    weight.name()
                ),
            )
            .expected(
                "f32 weights, or bf16 weights that equal the rounded weights of the model's files",
            )
            .hint("load the model in f32, attach the adapter, then merge it");
            Err(match folder.source() {
                Some(dir) => error.file(dir),
                None => error,
            })
        })?;
        self.adapter = None;
        Ok(())
    }

    /// Saves only the adapter, as PEFT does, and the recipe in the same folder. Then loads it onto the frozen
    /// weights of this model and compares the embeddings of probe texts, which stay in the folder.
    ///
    /// # Errors
    /// If no adapter is attached, a file cannot be written, or the embeddings differ; in the last case the folder
    /// is kept as `DIR.unverified-N`.
    pub fn save_adapter(&mut self, dir: &Path) -> Result<()> {
        let StagedFolder { staging, written } = self.stage_adapter(dir)?;
        let verified = written
            .iter()
            .try_for_each(|file| file.verify(staging.path()))
            .and_then(|()| self.reload(staging.path()));
        match verified.and_then(|probes| probes.write(&staging)) {
            Ok(()) => staging.commit(),
            Err(error) => Err(keep_unverified(staging, error)),
        }
    }

    /// Computes probes, loads the adapter in `dir` in place of the attached one, and compares.
    fn reload(&mut self, dir: &Path) -> Result<Probes> {
        let probes = Probes::take(self)?;
        if let Some(tokenizer) = adapter_tokenizer(dir)? {
            let (template, vocab_size) = (self.recipe.template.clone(), self.vocab_size());
            let saved = PromptEncoder::new(tokenizer, template, vocab_size)?;
            probes.check_tokens(&saved, &self.recipe)?;
        }
        let (config, trained) = (self.adapter.take(), self.decoder.detach_adapters());
        let tokens = config.as_ref().map(|config| config.trained_tokens.as_slice());
        let same = self.attach_saved(dir, tokens).and_then(|()| probes.check(self));
        self.decoder.restore_adapters(trained);
        self.adapter = config;
        same.map(|()| probes)
    }

    /// Bytes that [`save_adapter`](Self::save_adapter) writes, within some kilobytes.
    ///
    /// # Errors
    /// The tokenizer cannot be written as JSON.
    pub fn saved_adapter_bytes(&self) -> Result<u64> {
        let weights: u64 = self
            .declared()
            .iter()
            .map(|(_, _, shape)| 4 * shape.iter().product::<usize>() as u64 + 200)
            .sum();
        let tokenizer = match self.has_own_tokenizer()? {
            true => self.prompts.tokenizer().contents()?.len() as u64,
            false => 0,
        };
        Ok(weights + tokenizer)
    }

    /// The tensors of the adapter's file. With `modules_to_save`, the embedding table takes the place of the
    /// trained rows.
    fn declared(&self) -> Vec<Declaration> {
        let declaration = |t: NamedTensor<'_, B>| match self.saves_table(&t) {
            true => (format!("{PREFIX}{TABLE}"), vec![self.vocab_size(), self.dimension()]),
            false => (format!("{PREFIX}{}", t.name()), t.shape().to_vec()),
        };
        let declared = self.decoder.adapter_tensors().map(declaration);
        declared.map(|(name, shape)| (name, safetensors::Dtype::F32, shape)).collect()
    }

    /// Whether `tensor` is the trained token embeddings, and the table is saved in their place.
    fn saves_table(&self, tensor: &NamedTensor<'_, B>) -> bool {
        let saved = self.adapter.as_ref().map(|config| config.saved_tokens);
        tensor.name() == TRAINED_TOKENS && saved == Some(SavedTokens::ModulesToSave)
    }

    /// Number of token embeddings.
    fn vocab_size(&self) -> usize {
        self.decoder.config().vocab_size
    }

    /// The base model's embedding table, row-major: before rounding, if it is bf16 in memory.
    fn base_table(&self) -> Result<Vec<f32>> {
        let Some(table) = self.decoder.embeddings().tensors().next() else {
            unreachable!("a parameter has a tensor")
        };
        Ok(self.folder.exact_values(&self.backend, &table)?.0)
    }

    /// Whether the tokenizer is not the base model's, as after adding tokens.
    pub(crate) fn has_own_tokenizer(&self) -> Result<bool> {
        let Some(base) = self.folder.source() else { return Ok(true) };
        let of_base = read_file(&base.join(TOKENIZER_FILE)).ok();
        Ok(of_base.as_deref() != Some(&*self.prompts.tokenizer().contents()?))
    }

    /// Writes the files to a hidden folder inside `dir`.
    pub(crate) fn stage_adapter(&self, dir: &Path) -> Result<StagedFolder> {
        let Some(config) = &self.adapter else {
            return Err(Error::new(ErrorKind::Argument, "there is no adapter to save")
                .hint("save the whole model instead"));
        };
        let same = |a: &Path, b: &Path| {
            a.canonicalize().ok().is_some_and(|a| b.canonicalize().ok() == Some(a))
        };
        if self.folder.source().is_some_and(|base| same(base, dir)) {
            return Err(Error::new(
                ErrorKind::Argument,
                "an adapter cannot be saved in its base model's folder",
            )
            .file(dir)
            .expected("another folder than the base model's"));
        }
        let staging = Staging::new(dir, ADAPTER_CONFIG_FILE)?;
        let declared = self.declared();
        let names: Vec<String> = declared.iter().map(|(name, ..)| name.clone()).collect();
        let mut writer = SafetensorsWriter::create(&staging, ADAPTER_WEIGHTS_FILE, declared)?;
        for (name, tensor) in names.iter().zip(self.decoder.adapter_tensors()) {
            let values = match self.decoder.trained_tokens().filter(|_| self.saves_table(&tensor)) {
                Some(tokens) => tokens.merged_into(&self.backend, self.base_table()?)?,
                None => self.backend.download_view(tensor.values())?,
            };
            writer.write_f32(name, &values)?;
        }
        let written = writer.finish()?;
        if self.has_own_tokenizer()? {
            self.prompts.tokenizer().save(staging.path())?;
        }
        // A name of the Hub is valid on every machine.
        let source = || self.folder.source().map(|dir| dir.display().to_string());
        let base = self.base_name.clone().or_else(source);
        let json = format!("{:#}\n", config_json(config, base));
        staging.write(RECIPE_FILE, &self.recipe.to_json()?)?;
        staging.write(CARD_FILE, model_card(self)?.as_bytes())?;
        staging.write(ADAPTER_CONFIG_FILE, json.as_bytes())?;
        Ok(StagedFolder { staging, written: vec![written] })
    }

    fn refuse_second_adapter(&self) -> Result<()> {
        if self.adapter.is_none() {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Argument, "an adapter is attached already")
            .hint("merge it first"))
    }
}

/// What precedes the decoder's parameter names in an adapter's file with these tensors.
pub(crate) fn prefix_in_adapter(names: &[String]) -> &'static str {
    match names.iter().any(|name| name.starts_with(CAUSAL_LM_PREFIX)) {
        true => CAUSAL_LM_PREFIX,
        false => PREFIX,
    }
}

/// The tokenizer of an adapter's folder, if it has one: then it is not the base model's.
pub(crate) fn adapter_tokenizer(dir: &Path) -> Result<Option<TextTokenizer>> {
    match dir.join(TOKENIZER_FILE).exists() {
        true => TextTokenizer::from_folder(dir).map(Some),
        false => Ok(None),
    }
}

/// Number of token embeddings that the model of `base` has with the adapter in `dir`.
///
/// # Errors
/// If the adapter's configuration or header is damaged, or its token embeddings do not fit the model.
pub(super) fn vocab_size_with_adapter(base: &DecoderConfig, dir: &Path) -> Result<usize> {
    let config = AdapterConfig::read(dir)?;
    let file = SafetensorsFile::open(&dir.join(ADAPTER_WEIGHTS_FILE))?;
    let names = TokenNames::new(&file, prefix_in_adapter(&file.names()), &config);
    let faults = names.faults(&config, base.hidden_size);
    if !faults.is_empty() {
        return Err(misfit(&file, &faults));
    }
    names.check_gaps(&config, base.vocab_size).map_err(|e| e.file(file.path()))?;
    Ok(base.vocab_size.max(names.vocab_size(&config)))
}

/// The error for tensors that the model does not have, or has in another shape.
fn misfit(file: &SafetensorsFile, faults: &[String]) -> Error {
    let what = format!("the adapter does not fit the model in {} places", faults.len());
    Error::new(ErrorKind::Weights, what)
        .file(file.path())
        .got(format!("\n    {}", faults.join("\n    ")))
        .hint("use the base model that the adapter was trained on")
}
