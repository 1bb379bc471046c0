//! `config.json`, read as Hugging Face writes it and checked into one plain description.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::rope::{RopeScaling, inverse_frequencies};
use crate::{Error, ErrorKind, Result};

/// A family of models; what distinguishes it is data in [`DecoderConfig`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 1, 2 and 3.
    Llama,
    /// Mistral: sliding window, free head size.
    Mistral,
    /// Qwen2: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: norms on the heads of queries and keys.
    Qwen3,
}

impl Family {
    const ALL: [(&'static str, Family); 4] = [
        ("llama", Family::Llama),
        ("mistral", Family::Mistral),
        ("qwen2", Family::Qwen2),
        ("qwen3", Family::Qwen3),
    ];
}

/// Everything that determines a decoder's computation.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// The family, for messages.
    pub family: Family,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Features of the residual stream, `d`.
    pub hidden_size: usize,
    /// Features inside the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Features of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Stretching of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Sliding window of each layer, in tokens; `None`: the whole past.
    pub windows: Vec<Option<usize>>,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Norms on each head of queries and keys.
    pub qk_norm: bool,
    /// Whether the language-model head shares the embedding table.
    pub tie_word_embeddings: bool,
    /// Longest sequence that the model was made for, in tokens.
    pub max_position_embeddings: usize,
}

/// The fields of `config.json` that matter here, before they are checked.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: Option<usize>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    #[serde(default, deserialize_with = "present")]
    num_key_value_heads: Option<Option<usize>>,
    head_dim: Option<usize>,
    hidden_act: Option<String>,
    rms_norm_eps: Option<f64>,
    max_position_embeddings: Option<usize>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<usize>>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    attention_dropout: Option<f64>,
    partial_rotary_factor: Option<f64>,
    quantization_config: Option<Value>,
}

/// Tells `"sliding_window": null` from a missing key, which stands for the family's default.
fn present<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Option<usize>>, D::Error> {
    Option::deserialize(d).map(Some)
}

impl DecoderConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// When the file is missing or not JSON, when the architecture is not one of [`Family`], or when
    /// it asks for something that would change the numbers and is not computed here.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = crate::storage::read_file(path).map_err(|e| {
            Error::io("read the model's configuration", path, e)
                .hint("a model folder as `save_pretrained` writes it has a config.json")
        })?;
        Self::from_json(&text).map_err(|error| error.file(path))
    }

    /// Parses the text of a `config.json`.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let raw: Raw = serde_json::from_slice(text)
            .map_err(|e| Error::new(ErrorKind::Config, "not a model configuration").because(e))?;
        let family = family(&raw)?;
        refuse_unsupported(&raw)?;
        let heads = required(raw.num_attention_heads, "num_attention_heads")?;
        let hidden_size = required(raw.hidden_size, "hidden_size")?;
        let layers = required(raw.num_hidden_layers, "num_hidden_layers")?;
        let missing_kv_heads = match family {
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
        };
        let kv_heads = match raw.num_key_value_heads {
            None => missing_kv_heads,
            Some(given) => given.unwrap_or(heads),
        };
        let default_head_dim = if family == Family::Qwen3 { 128 } else { hidden_size / heads };
        let (rope_theta, rope_scaling) = rope(&raw)?;
        let attention_bias = raw.attention_bias.unwrap_or(false);
        let biased = matches!(family, Family::Llama | Family::Qwen3) && attention_bias;
        let config = DecoderConfig {
            family,
            vocab_size: required(raw.vocab_size, "vocab_size")?,
            hidden_size,
            intermediate_size: required(raw.intermediate_size, "intermediate_size")?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: raw.head_dim.unwrap_or(default_head_dim),
            rms_norm_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope_theta,
            rope_scaling,
            windows: windows(family, &raw, layers)?,
            qkv_bias: biased || family == Family::Qwen2,
            output_bias: biased,
            mlp_bias: family == Family::Llama && raw.mlp_bias.unwrap_or(false),
            qk_norm: family == Family::Qwen3,
            tie_word_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            max_position_embeddings: raw.max_position_embeddings.unwrap_or(usize::MAX),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        if self.num_key_value_heads == 0
            || !self.num_attention_heads.is_multiple_of(self.num_key_value_heads)
        {
            return Err(Error::new(ErrorKind::Config, "heads cannot be grouped")
                .expected("num_key_value_heads to divide num_attention_heads")
                .got(format!("{} and {}", self.num_key_value_heads, self.num_attention_heads)));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(Error::new(ErrorKind::Config, "`head_dim` cannot be rotated in pairs")
                .expected("an even number")
                .got(self.head_dim));
        }
        let largest = [self.vocab_size, self.hidden_size, self.intermediate_size]
            .into_iter()
            .chain([self.num_attention_heads.saturating_mul(self.head_dim)])
            .max()
            .unwrap_or(0);
        if largest > 1 << 28 || self.num_hidden_layers > 1 << 16 {
            return Err(Error::new(ErrorKind::Config, "the sizes of the model are not credible")
                .got(format!("a dimension of {largest}, {} layers", self.num_hidden_layers)));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0) {
            return Err(Error::new(ErrorKind::Config, "`rms_norm_eps` is out of range")
                .expected("a positive number")
                .got(self.rms_norm_eps));
        }
        Ok(())
    }

    pub(crate) fn inverse_frequencies(&self) -> Vec<f32> {
        inverse_frequencies(self.rope_theta, self.head_dim, self.rope_scaling)
    }
}

fn required(value: Option<usize>, name: &str) -> Result<usize> {
    value.filter(|&n| n > 0).ok_or_else(|| {
        let got = value.map_or("nothing".to_owned(), |n| n.to_string());
        Error::new(ErrorKind::Config, format!("`{name}` is missing or zero"))
            .expected("a positive whole number")
            .got(got)
    })
}

fn family(raw: &Raw) -> Result<Family> {
    let known = Family::ALL.map(|(name, _)| name).join(", ");
    let Some(name) = &raw.model_type else {
        return Err(Error::new(ErrorKind::Config, "`model_type` is missing").expected(known));
    };
    Family::ALL.iter().find(|(known, _)| known == name).map(|&(_, family)| family).ok_or_else(
        || {
            Error::new(ErrorKind::Config, format!("unknown architecture `{name}`"))
                .expected(format!("`model_type` one of {known}"))
                .got(name)
                .hint("choose a decoder of one of these families")
        },
    )
}

/// Settings that would change the numbers in ways that are not computed here.
fn refuse_unsupported(raw: &Raw) -> Result<()> {
    let refuse = |what: &str, got: String, hint: &str| {
        Err(Error::new(ErrorKind::Config, format!("{what} is not supported")).got(got).hint(hint))
    };
    if let Some(act) = raw.hidden_act.as_ref().filter(|act| !["silu", "swish"].contains(&&***act)) {
        return refuse("this activation", format!("`hidden_act`: {act}"), "silu is");
    }
    if let Some(p) = raw.attention_dropout.filter(|&p| p != 0.0) {
        return refuse("attention dropout", p.to_string(), "set `attention_dropout` to 0.0");
    }
    if let Some(f) = raw.partial_rotary_factor.filter(|&f| f != 1.0) {
        return refuse("a partial rotary embedding", f.to_string(), "choose another model");
    }
    if let Some(q) = raw.quantization_config.as_ref().filter(|q| !q.is_null()) {
        let method = q.get("quant_method").map_or("unnamed".to_owned(), Value::to_string);
        return refuse("a quantised model", method, "use the f32, f16 or bf16 original");
    }
    Ok(())
}

/// From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
fn rope(raw: &Raw) -> Result<(f64, RopeScaling)> {
    let malformed = |what: &str, got: &Value| Error::new(ErrorKind::Config, what).got(got);
    let none = Value::Null;
    let scaling = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).unwrap_or(&none);
    if !(scaling.is_object() || scaling.is_null()) {
        return Err(malformed("the rope settings are not an object", scaling));
    }
    if scaling.as_object().is_some_and(|o| o.values().any(Value::is_object)) {
        return Err(malformed("rope settings per layer are not supported", scaling));
    }
    let positive = |name: &str| match scaling.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let number = value.as_f64().filter(|x| x.is_finite() && *x > 0.0);
            number.map(Some).ok_or_else(|| {
                malformed(&format!("`{name}` of the rope settings is not a positive number"), value)
            })
        }
    };
    let theta = positive("rope_theta")?.or(raw.rope_theta).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(Error::new(ErrorKind::Config, "`rope_theta` is out of range")
            .expected("a positive number")
            .got(theta));
    }
    if positive("partial_rotary_factor")?.is_some_and(|factor| factor != 1.0) {
        return Err(malformed("a partial rotary embedding is not supported", scaling));
    }
    let need = |name: &str| {
        positive(name)?
            .ok_or_else(|| malformed(&format!("the rope settings lack `{name}`"), scaling))
    };
    let kind = match scaling.get("rope_type").or_else(|| scaling.get("type")) {
        None | Some(Value::Null) => None,
        Some(Value::String(kind)) => Some(kind.as_str()),
        Some(other) => return Err(malformed("`rope_type` is not a name", other)),
    };
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => {
            let low_freq_factor = need("low_freq_factor")?;
            let high_freq_factor = need("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(Error::new(ErrorKind::Config, "rope scaling cannot be blended")
                    .expected("high_freq_factor above low_freq_factor")
                    .got(format!("{high_freq_factor} and {low_freq_factor}")));
            }
            RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_context: need("original_max_position_embeddings")?,
            }
        }
        other => {
            return Err(Error::new(ErrorKind::Config, "this rope scaling is not supported")
                .expected("default, linear or llama3")
                .got(other));
        }
    };
    Ok((theta, scaling))
}

/// The sliding window of each layer, by the rules of each family in transformers.
fn windows(family: Family, raw: &Raw, layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match family {
        Family::Llama => return Ok(vec![None; layers]),
        // A Mistral configuration that does not speak of its window has one of 4,096 tokens.
        Family::Mistral => return Ok(vec![raw.sliding_window.unwrap_or(Some(4096)); layers]),
        Family::Qwen2 | Family::Qwen3 if raw.use_sliding_window == Some(true) => {
            raw.sliding_window.unwrap_or(Some(4096))
        }
        Family::Qwen2 | Family::Qwen3 => None,
    };
    let first_sliding = raw.max_window_layers.unwrap_or(28);
    let slides = |layer: usize| match raw.layer_types.as_ref().and_then(|t| t.get(layer)) {
        Some(kind) if kind == "sliding_attention" => Ok(true),
        Some(kind) if kind == "full_attention" => Ok(false),
        Some(kind) => Err(Error::new(ErrorKind::Config, format!("unknown type of layer {layer}"))
            .expected("full_attention or sliding_attention")
            .got(kind)),
        None => Ok(layer >= first_sliding),
    };
    (0..layers).map(|layer| Ok(if slides(layer)? { window } else { None })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small configuration with `settings`, an object's inside, added or put in place.
    fn parse(settings: &str) -> Result<DecoderConfig> {
        let mut config = serde_json::json!({
            "hidden_size": 64, "intermediate_size": 96, "vocab_size": 100, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2
        });
        let settings: Value = serde_json::from_str(&format!("{{{settings}}}")).unwrap();
        for (key, value) in settings.as_object().unwrap() {
            config[key] = value.clone();
        }
        DecoderConfig::from_json(config.to_string().as_bytes())
    }

    #[test]
    fn a_missing_window_differs_from_a_null_one() {
        let missing = parse(r#""model_type": "mistral""#).unwrap();
        assert_eq!(missing.windows, [Some(4096); 3]);
        let null = parse(r#""model_type": "mistral", "sliding_window": null"#).unwrap();
        assert_eq!(null.windows, [None; 3]);
    }

    #[test]
    fn qwen_windows_follow_layer_types_and_then_max_window_layers() {
        let by_count = r#""model_type": "qwen2", "use_sliding_window": true,
            "sliding_window": 7, "max_window_layers": 1"#;
        assert_eq!(parse(by_count).unwrap().windows, [None, Some(7), Some(7)]);
        let by_type = format!(
            r#"{by_count}, "layer_types": ["sliding_attention", "full_attention", "full_attention"]"#
        );
        assert_eq!(parse(&by_type).unwrap().windows, [Some(7), None, None]);
        let off = r#""model_type": "qwen3", "use_sliding_window": false, "sliding_window": 7"#;
        assert_eq!(parse(off).unwrap().windows, [None; 3]);
    }

    #[test]
    fn rope_is_read_in_the_old_form_and_the_new() {
        let old = parse(
            r#""model_type": "llama", "rope_theta": 5e5,
               "rope_scaling": {"type": "linear", "factor": 2.0}"#,
        );
        let new = parse(
            r#""model_type": "llama",
               "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}"#,
        );
        assert_eq!(old.unwrap(), new.unwrap());
    }

    #[test]
    fn what_would_change_the_numbers_is_refused_by_name() {
        for (setting, word) in [
            (r#""model_type": "gpt2""#, "gpt2"),
            (r#""model_type": "llama", "hidden_act": "gelu""#, "gelu"),
            (r#""model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 4}"#, "yarn"),
            (r#""model_type": "llama", "attention_dropout": 0.1"#, "attention_dropout"),
            (r#""model_type": "llama", "num_key_value_heads": 3"#, "divide"),
            (r#""model_type": "llama", "head_dim": 15"#, "even"),
            (r#""model_type": "llama", "rope_theta": -1"#, "rope_theta"),
            (r#""model_type": "llama", "rope_parameters": {"rope_theta": "1e4"}"#, "rope_theta"),
            (r#""model_type": "llama", "rope_parameters": "none""#, "not an object"),
            (r#""model_type": "llama", "rope_scaling": "linear""#, "not an object"),
            (r#""model_type": "llama", "rope_parameters": {"rope_type": 3}"#, "rope_type"),
            (
                r#""model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}"#,
                "partial",
            ),
            (r#""model_type": "llama", "rms_norm_eps": -1"#, "rms_norm_eps"),
            (r#""model_type": "llama", "hidden_size": 0"#, "hidden_size"),
        ] {
            let message = parse(setting).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
