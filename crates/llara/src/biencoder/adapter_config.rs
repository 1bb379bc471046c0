//! `adapter_config.json` of PEFT: reading it, with everything refused that changes the computation, and writing it.

use std::collections::HashSet;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::model::{LoraConfig, PROJECTIONS, SavedTokens};
use crate::{Error, ErrorKind, Result};

pub(crate) const ADAPTER_CONFIG_FILE: &str = "adapter_config.json";

/// The name of the embedding table's module in PEFT.
const EMBEDDINGS: &str = "embed_tokens";
const TOKEN_INDICES: &str = "trainable_token_indices";
const MODULES_TO_SAVE: &str = "modules_to_save";

/// More tokens than any model has.
const MAX_VOCAB_SIZE: usize = 1 << 28;

/// `adapter_config.json` of an adapter of the model `base`.
pub(super) fn config_json(config: &LoraConfig, base: Option<String>) -> Value {
    // As the user wrote it: 0.1, and not the digits of the nearest f32.
    let dropout: f64 = config.dropout.to_string().parse().unwrap_or(config.dropout.into());
    let (indices, modules) = match (config.trained_tokens.as_slice(), config.saved_tokens) {
        ([], _) => (None, None),
        (ids, SavedTokens::TrainableTokenIndices) => (Some(ids), None),
        (_, SavedTokens::ModulesToSave) => (None, Some([EMBEDDINGS])),
    };
    let mut json = json!({
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
    });
    // Adapters without trained tokens can also be read by versions of PEFT that do not know the first key.
    if let Some(ids) = indices {
        json[TOKEN_INDICES] = json!(ids);
    }
    if let Some(modules) = modules {
        json[MODULES_TO_SAVE] = json!(modules);
    }
    json
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
const UNSUPPORTED: [&str; 8] = [
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layers_to_transform",
    "target_parameters",
    "exclude_modules",
];

impl LoraConfig {
    /// Reads the configuration of a PEFT folder. The tokens that it trains are not known with `modules_to_save`:
    /// they depend on the weights.
    ///
    /// # Errors
    /// If the file is missing or damaged, or the adapter uses a method that is not supported.
    pub fn from_peft(dir: &Path) -> Result<Self> {
        Ok(AdapterConfig::read(dir)?.lora)
    }
}

/// What `adapter_config.json` says.
pub(crate) struct AdapterConfig {
    pub(crate) lora: LoraConfig,
    /// `trainable_token_indices`, in the order of the rows in the file.
    pub(crate) token_indices: Vec<u32>,
}

impl AdapterConfig {
    /// Reads the configuration of a PEFT folder.
    ///
    /// # Errors
    /// If the file is missing or damaged, or the adapter uses a method that is not supported.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        read_config(&dir.join(ADAPTER_CONFIG_FILE))
    }
}

fn read_config(path: &Path) -> Result<AdapterConfig> {
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
    let has_table = saves_embeddings(raw.rest.get(MODULES_TO_SAVE)).map_err(|e| e.file(path))?;
    let token_indices = token_indices(raw.rest.get(TOKEN_INDICES)).map_err(|e| e.file(path))?;
    if has_table && !token_indices.is_empty() {
        return refuse("`modules_to_save` with `trainable_token_indices`", EMBEDDINGS);
    }
    let mut trained_tokens = token_indices.clone();
    trained_tokens.sort_unstable();
    let lora = LoraConfig {
        rank: raw.r,
        // rsLoRA divides alpha by the square root of the rank, which equals LoRA with a larger alpha.
        alpha: if rank_stabilised {
            raw.lora_alpha * (raw.r as f64).sqrt()
        } else {
            raw.lora_alpha
        },
        dropout: raw.lora_dropout,
        target_modules,
        trained_tokens,
        saved_tokens: match has_table {
            true => SavedTokens::ModulesToSave,
            false => SavedTokens::TrainableTokenIndices,
        },
    };
    lora.check().map_err(|e| e.file(path))?;
    Ok(AdapterConfig { lora, token_indices })
}

/// Whether a name of a module, such as `model.embed_tokens`, means `module`.
fn names_module(name: &str, module: &str) -> bool {
    name.rsplit('.').next() == Some(module)
}

/// The head of a causal language model, which has no part in embeddings.
const HEAD: &str = "lm_head";

/// Whether `modules_to_save` contains the token embeddings.
fn saves_embeddings(value: Option<&Value>) -> Result<bool> {
    let refuse = |got: &Value| {
        Error::new(
            ErrorKind::Config,
            format!("`{MODULES_TO_SAVE}` has a module that is not supported"),
        )
        .expected(format!("a list of {EMBEDDINGS} and {HEAD}"))
        .got(got)
    };
    match value {
        None | Some(Value::Null | Value::Bool(false)) => Ok(false),
        Some(Value::Array(modules)) => {
            let mut found = false;
            for module in modules {
                match module.as_str() {
                    Some(name) if names_module(name, EMBEDDINGS) => found = true,
                    Some(name) if names_module(name, HEAD) => {}
                    _ => return Err(refuse(module)),
                }
            }
            Ok(found)
        }
        Some(other) => Err(refuse(other)),
    }
}

/// The ids of `trainable_token_indices`: a list, or a list for each module.
fn token_indices(value: Option<&Value>) -> Result<Vec<u32>> {
    let refuse = |what: &str, got: &Value| {
        Error::new(ErrorKind::Config, format!("`{TOKEN_INDICES}` {what}"))
            .expected(format!("token ids, or {{\"{EMBEDDINGS}\": token ids}}, each id once"))
            .got(got)
    };
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(Value::Object(modules)) => {
            let mut found: Option<&Vec<Value>> = None;
            for (module, list) in modules {
                if names_module(module, HEAD) {
                    continue;
                }
                match list.as_array() {
                    Some(list) if names_module(module, EMBEDDINGS) && found.is_none() => {
                        found = Some(list);
                    }
                    _ => return Err(refuse("has a module that is not supported", &json!(module))),
                }
            }
            match found {
                Some(list) => list,
                None => return Ok(Vec::new()),
            }
        }
        Some(other) => return Err(refuse("is not a list", other)),
    };
    let mut known = HashSet::new();
    let id = |value: &Value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) if (id as usize) < MAX_VOCAB_SIZE && known.insert(id) => Ok(id),
        _ => Err(refuse("has an id that is not valid or occurs twice", value)),
    };
    list.iter().map(id).collect()
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
