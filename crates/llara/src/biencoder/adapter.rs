//! LoRA adapters of a bi-encoder: attaching, merging, and saving and loading in the format of PEFT.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::card::model_card;
use super::recipe::RECIPE_FILE;
use super::staged::{StagedFolder, keep_unverified};
use super::{BiEncoderModel, Probes};
use crate::backend::{Backend, Dtype};
use crate::model::{LoraConfig, NamedTensor, PROJECTIONS, ParameterValues};
use crate::storage::{CARD_FILE, SafetensorsFile, SafetensorsWriter, Staging};
use crate::{Error, ErrorKind, Result};

pub(crate) const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";
pub(crate) const ADAPTER_WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Prefix of the decoder's parameter names in PEFT's files.
const PREFIX: &str = "base_model.model.";
/// The same if the base model of the adapter is a causal language model.
const CAUSAL_LM_PREFIX: &str = "base_model.model.model.";

impl<B: Backend> BiEncoderModel<B> {
    /// Freezes the model and attaches new adapters, whose product is zero before training.
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

    /// Freezes the model and attaches the adapter of a PEFT folder.
    ///
    /// # Errors
    /// If a file is missing or damaged, the adapter uses a method that is not supported, or its matrices do not
    /// have the shapes of the model (all listed).
    pub fn attach_adapter(&mut self, dir: &Path) -> Result<()> {
        self.refuse_second_adapter()?;
        let config = read_config(&dir.join(ADAPTER_CONFIG_FILE))?;
        let file = SafetensorsFile::open(&dir.join(ADAPTER_WEIGHTS_FILE))?;
        let prefix = prefix_in_adapter(&file.names());
        let mut faults = Vec::new();
        let mut used = std::collections::HashSet::new();
        let backend = self.backend.clone();
        self.decoder.attach_adapters(&backend, &config, &mut |name, shape| {
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
        })?;
        let unknown = file.names().into_iter().filter(|name| !used.contains(name));
        faults.extend(unknown.map(|name| format!("unknown: {name}")));
        if !faults.is_empty() {
            let what = format!("the adapter does not fit the model in {} places", faults.len());
            return Err(Error::new(ErrorKind::Weights, what)
                .file(file.path())
                .got(format!("\n    {}", faults.join("\n    ")))
                .hint("use the base model that the adapter was trained on"));
        }
        self.adapter = Some(config);
        Ok(())
    }

    /// Adds the adapter to the weights, `W += scale · B · A`, in f32. Weights that are stored as bf16 in memory
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
        let (config, trained) = (self.adapter.take(), self.decoder.detach_adapters());
        let same = self.attach_adapter(dir).and_then(|()| probes.check(self));
        self.decoder.restore_adapters(trained);
        self.adapter = config;
        same.map(|()| probes)
    }

    /// Bytes that [`save_adapter`](Self::save_adapter) writes, within some kilobytes.
    pub fn saved_adapter_bytes(&self) -> u64 {
        self.decoder.adapter_tensors().map(|t| 4 * t.elements() as u64 + 200).sum()
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
        let named = |t: &NamedTensor<'_, B>| format!("{PREFIX}{}", t.name());
        let declared = self
            .decoder
            .adapter_tensors()
            .map(|t| (named(&t), safetensors::Dtype::F32, t.shape().to_vec()))
            .collect();
        let mut writer = SafetensorsWriter::create(&staging, ADAPTER_WEIGHTS_FILE, declared)?;
        for tensor in self.decoder.adapter_tensors() {
            writer.write_f32(&named(&tensor), &self.backend.download_view(tensor.values())?)?;
        }
        let written = writer.finish()?;
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

fn config_json(config: &LoraConfig, base: Option<String>) -> Value {
    // As the user wrote it: 0.1, and not the digits of the nearest f32.
    let dropout: f64 = config.dropout.to_string().parse().unwrap_or(config.dropout.into());
    json!({
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": config.alpha,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": config.rank,
        "target_modules": config.target_modules,
        "task_type": "FEATURE_EXTRACTION",
        "use_dora": false,
        "use_rslora": false,
    })
}

/// The fields of `adapter_config.json` that are used.
#[derive(Deserialize)]
struct Raw {
    peft_type: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f32,
    target_modules: Value,
    bias: Option<String>,
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// Settings that must be absent, false or empty, because they change the computation.
const UNSUPPORTED: [&str; 9] = [
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layers_to_transform",
    "target_parameters",
    "exclude_modules",
];

impl LoraConfig {
    /// Reads the configuration of a PEFT folder.
    ///
    /// # Errors
    /// If the file is missing or damaged, or the adapter uses a method that is not supported.
    pub fn from_peft(dir: &Path) -> Result<Self> {
        read_config(&dir.join(ADAPTER_CONFIG_FILE))
    }
}

fn read_config(path: &Path) -> Result<LoraConfig> {
    let text = crate::storage::read_file(path).map_err(|e| {
        Error::io("read the adapter's configuration", path, e)
            .hint("an adapter folder as PEFT writes it has an adapter_config.json")
    })?;
    let raw: Raw = serde_json::from_slice(&text).map_err(|e| {
        Error::new(ErrorKind::Config, "not an adapter's configuration").file(path).because(e)
    })?;
    let refuse = |what: &str, got: &str| {
        let what = format!("{what} is not supported in an adapter");
        Err(Error::new(ErrorKind::Config, what).file(path).got(got))
    };
    if let Some(kind) = raw.peft_type.as_deref().filter(|&kind| kind != "LORA") {
        return refuse("this method", kind);
    }
    if let Some(bias) = raw.bias.as_deref().filter(|&bias| bias != "none") {
        return refuse("a trained bias", bias);
    }
    for name in UNSUPPORTED {
        let off = match raw.rest.get(name) {
            None | Some(Value::Null | Value::Bool(false)) => true,
            Some(Value::Array(list)) => list.is_empty(),
            Some(Value::Object(map)) => map.is_empty(),
            Some(_) => false,
        };
        if !off {
            return refuse(&format!("`{name}`"), &raw.rest[name].to_string());
        }
    }
    match raw.rest.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => {}
        Some(Value::String(way)) if ["gaussian", "orthogonal"].contains(&way.as_str()) => {}
        // These initializations change the base weights, and the adapter's files do not contain that change.
        Some(other) => return refuse("this initialization of the weights", &other.to_string()),
    }
    let target_modules = target_modules(&raw.target_modules);
    if let Some(name) = target_modules.iter().find(|name| name.contains('.')) {
        return refuse("a target in some layers only", name);
    }
    let rank_stabilised = raw.rest.get("use_rslora") == Some(&Value::Bool(true));
    let config = LoraConfig {
        rank: raw.r,
        // rsLoRA divides alpha by the square root of the rank, which equals LoRA with a larger alpha.
        alpha: if rank_stabilised {
            raw.lora_alpha * (raw.r as f64).sqrt()
        } else {
            raw.lora_alpha
        },
        dropout: raw.lora_dropout,
        target_modules,
    };
    config.check().map_err(|e| e.file(path))?;
    Ok(config)
}

/// A list of names, or the keyword of PEFT for all projections.
fn target_modules(value: &Value) -> Vec<String> {
    match value {
        Value::String(all) if all == "all-linear" => PROJECTIONS.map(str::to_owned).to_vec(),
        Value::String(one) => vec![one.clone()],
        Value::Array(names) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
        _ => Vec::new(),
    }
}
