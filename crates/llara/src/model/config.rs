//! `config.json` in the format of Hugging Face, parsed and checked.

mod fields;

use std::path::Path;

use serde_json::{Map, Value};

use self::fields::{Fields, quote, quote_text};
use super::rope::{RopeScaling, inverse_frequencies};
use crate::storage::read_limited;
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
    /// The class in transformers of a model with a language-model head.
    pub(crate) fn causal_lm_class(self) -> &'static str {
        match self {
            Family::Llama => "LlamaForCausalLM",
            Family::Mistral => "MistralForCausalLM",
            Family::Qwen2 => "Qwen2ForCausalLM",
            Family::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    const ALL: [(&'static str, Family); 4] = [
        ("llama", Family::Llama),
        ("mistral", Family::Mistral),
        ("qwen2", Family::Qwen2),
        ("qwen3", Family::Qwen3),
    ];
}

/// The configuration of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// The model family.
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
    /// Scaling of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Sliding window of each layer, in tokens; `None`: no window.
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
    /// Maximum sequence length of the model, in tokens.
    pub max_position_embeddings: usize,
}

/// Ranges of the numbers in `config.json`. They are far beyond any published model and small enough that
/// no product of a few of them overflows 64 bits.
mod range {
    use std::ops::RangeInclusive;

    /// `vocab_size`, `hidden_size`, `intermediate_size`.
    pub(super) const DIMENSION: RangeInclusive<usize> = 1..=1 << 28;
    /// `num_hidden_layers`.
    pub(super) const LAYERS: RangeInclusive<usize> = 1..=1 << 16;
    /// `num_attention_heads`, `num_key_value_heads`.
    pub(super) const HEADS: RangeInclusive<usize> = 1..=1 << 16;
    /// `head_dim`.
    pub(super) const HEAD_DIM: RangeInclusive<usize> = 2..=1 << 16;
    /// Lengths and positions in tokens.
    pub(super) const TOKENS: RangeInclusive<usize> = 1..=(1 << 31) - 1;
    /// `rms_norm_eps`: positive in f32, too.
    pub(super) const EPS: RangeInclusive<f64> = 1e-30..=1.0;
    /// `rope_theta`.
    pub(super) const THETA: RangeInclusive<f64> = 1.0..=1e15;
    /// `factor` of the rope scaling.
    pub(super) const FACTOR: RangeInclusive<f64> = 1.0..=1e6;
    /// `low_freq_factor`, `high_freq_factor`.
    pub(super) const FREQUENCY_FACTOR: RangeInclusive<f64> = 1e-3..=1e6;
    /// `original_max_position_embeddings`.
    pub(super) const CONTEXT: RangeInclusive<f64> = 1.0..=2147483647.0;
    /// Parameters of a model.
    pub(super) const MOST_PARAMETERS: u128 = 1 << 44;
}

/// Largest `config.json` that is read, in bytes.
const MOST_BYTES: u64 = 16 << 20;

impl DecoderConfig {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// If the file is missing or not JSON, the architecture is not one of [`Family`], a number is out of range,
    /// or a setting that affects the results is not supported.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text =
            read_limited(path, "read the model's configuration", MOST_BYTES).map_err(|e| {
                if path.exists() {
                    return e;
                }
                e.hint("a model folder as `save_pretrained` writes it has a config.json")
            })?;
        Self::from_json(&text).map_err(|error| error.file(path))
    }

    /// Parses the text of a `config.json`.
    ///
    /// # Errors
    /// Those of [`from_file`](Self::from_file).
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let object: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|e| Error::new(ErrorKind::Config, "not a model configuration").because(e))?;
        let raw = Fields::new(&object);
        let family = family(raw)?;
        refuse_unsupported(raw)?;
        let heads = raw.required("num_attention_heads", range::HEADS)?;
        let hidden_size = raw.required("hidden_size", range::DIMENSION)?;
        let layers = raw.required("num_hidden_layers", range::LAYERS)?;
        let missing_kv_heads = match family {
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 | Family::Qwen3 => 32,
        };
        let kv_heads = match raw.whole("num_key_value_heads", range::HEADS)? {
            Some(given) => given,
            None if raw.has("num_key_value_heads") => heads,
            None => missing_kv_heads,
        };
        let default_head_dim = if family == Family::Qwen3 { 128 } else { hidden_size / heads };
        let (rope_theta, rope_scaling) = rope(raw)?;
        let attention_bias = raw.flag("attention_bias")?.unwrap_or(false);
        let biased = matches!(family, Family::Llama | Family::Qwen3) && attention_bias;
        let mlp_bias = raw.flag("mlp_bias")?.unwrap_or(false);
        let config = DecoderConfig {
            family,
            vocab_size: raw.required("vocab_size", range::DIMENSION)?,
            hidden_size,
            intermediate_size: raw.required("intermediate_size", range::DIMENSION)?,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: raw.whole("head_dim", range::HEAD_DIM)?.unwrap_or(default_head_dim),
            rms_norm_eps: raw.real("rms_norm_eps", range::EPS)?.unwrap_or(1e-6) as f32,
            rope_theta,
            rope_scaling,
            windows: windows(family, raw, layers)?,
            qkv_bias: biased || family == Family::Qwen2,
            output_bias: biased,
            mlp_bias: family == Family::Llama && mlp_bias,
            qk_norm: family == Family::Qwen3,
            tie_word_embeddings: raw.flag("tie_word_embeddings")?.unwrap_or(false),
            max_position_embeddings: raw
                .whole("max_position_embeddings", range::TOKENS)?
                .unwrap_or(usize::MAX),
        };
        config.check()?;
        Ok(config)
    }

    /// Checks conditions on more than one field.
    fn check(&self) -> Result<()> {
        if self.num_key_value_heads == 0
            || !self.num_attention_heads.is_multiple_of(self.num_key_value_heads)
        {
            return Err(Error::new(
                ErrorKind::Config,
                "the query heads cannot be divided among the key and value heads",
            )
            .expected("num_key_value_heads to divide num_attention_heads")
            .got(format!("{} and {}", self.num_key_value_heads, self.num_attention_heads)));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(Error::new(ErrorKind::Config, "`head_dim` cannot be rotated in pairs")
                .expected("an even number")
                .got(self.head_dim));
        }
        let queries = self.num_attention_heads * self.head_dim;
        let parameters = self.parameters();
        if !range::DIMENSION.contains(&queries) || parameters > range::MOST_PARAMETERS {
            return Err(Error::new(ErrorKind::Config, "the model is too large")
                .expected(format!(
                    "num_attention_heads · head_dim up to {} and at most {} parameters",
                    range::DIMENSION.end(),
                    range::MOST_PARAMETERS
                ))
                .got(format!("{queries} and {parameters}")));
        }
        Ok(())
    }

    /// Approximate number of parameters: the elements of all matrices, each counted once.
    fn parameters(&self) -> u128 {
        let wide = |n: usize| n as u128;
        let (d, head) = (wide(self.hidden_size), wide(self.head_dim));
        let heads = wide(self.num_attention_heads) + wide(self.num_key_value_heads);
        let layer = 2 * d * head * heads + 3 * d * wide(self.intermediate_size);
        wide(self.vocab_size) * d + wide(self.num_hidden_layers) * layer
    }

    pub(crate) fn inverse_frequencies(&self) -> Vec<f32> {
        inverse_frequencies(self.rope_theta, self.head_dim, self.rope_scaling)
    }
}

fn family(raw: Fields<'_>) -> Result<Family> {
    let known = Family::ALL.map(|(name, _)| name).join(", ");
    let Some(name) = raw.text("model_type")? else {
        return Err(raw.missing("model_type", format!("one of {known}")));
    };
    Family::ALL.iter().find(|(known, _)| *known == name).map(|&(_, family)| family).ok_or_else(
        || {
            let shown = quote_text(name);
            let shown = shown.trim_matches('"');
            Error::new(ErrorKind::Config, format!("unknown architecture `{shown}`"))
                .expected(format!("`model_type` one of {known}"))
                .got(quote_text(name))
                .hint("choose a decoder of one of these families")
        },
    )
}

/// Rejects settings that affect the results and are not implemented.
fn refuse_unsupported(raw: Fields<'_>) -> Result<()> {
    let refuse = |what: &str, got: String, hint: &str| {
        Err(Error::new(ErrorKind::Config, format!("{what} is not supported")).got(got).hint(hint))
    };
    if let Some(act) = raw.text("hidden_act")?.filter(|act| !["silu", "swish"].contains(act)) {
        let got = format!("`hidden_act`: {}", quote_text(act));
        return refuse("this activation", got, "only silu is supported: choose another model");
    }
    if let Some(p) = raw.real("attention_dropout", 0.0..=1.0)?.filter(|&p| p != 0.0) {
        return refuse("attention dropout", p.to_string(), "set `attention_dropout` to 0.0");
    }
    let factor = raw.value("partial_rotary_factor");
    if let Some(factor) = factor.filter(|factor| factor.as_f64() != Some(1.0)) {
        return refuse("a partial rotary embedding", quote(factor), "choose another model");
    }
    if let Some(q) = raw.value("quantization_config") {
        let method = q.get("quant_method").map_or("unnamed".to_owned(), quote);
        return refuse("a quantized model", method, "use the f32, f16 or bf16 original");
    }
    Ok(())
}

/// The base and the scaling of the rotary frequencies: from `rope_parameters` (transformers 5), or from
/// `rope_theta` and `rope_scaling` (transformers 4).
fn rope(raw: Fields<'_>) -> Result<(f64, RopeScaling)> {
    let malformed = |what: &str, got: &Value| Error::new(ErrorKind::Config, what).got(quote(got));
    let scaling = match raw.value("rope_parameters") {
        Some(_) => raw.object("rope_parameters", " of `rope_parameters`")?,
        None => raw.object("rope_scaling", " of `rope_scaling`")?,
    };
    if let Some((_, layer)) = scaling.values().find(|(_, value)| value.is_object()) {
        return Err(malformed("rope settings per layer are not supported", layer));
    }
    let outer = raw.real("rope_theta", range::THETA)?;
    let theta = scaling.real("rope_theta", range::THETA)?.or(outer).unwrap_or(10_000.0);
    let factor = scaling.value("partial_rotary_factor");
    if let Some(factor) = factor.filter(|factor| factor.as_f64() != Some(1.0)) {
        return Err(malformed("a partial rotary embedding is not supported", factor));
    }
    let kind = match scaling.text("rope_type")? {
        Some(kind) => kind,
        None => scaling.text("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: scaling.required_real("factor", range::FACTOR)? },
        "llama3" => {
            let part = |name| scaling.required_real(name, range::FREQUENCY_FACTOR);
            let (low_freq_factor, high_freq_factor) =
                (part("low_freq_factor")?, part("high_freq_factor")?);
            if high_freq_factor <= low_freq_factor {
                return Err(Error::new(ErrorKind::Config, "`high_freq_factor` is out of range")
                    .expected(format!("a number above low_freq_factor, {low_freq_factor}"))
                    .got(high_freq_factor));
            }
            RopeScaling::Llama3 {
                factor: scaling.required_real("factor", range::FACTOR)?,
                low_freq_factor,
                high_freq_factor,
                original_context: scaling
                    .required_real("original_max_position_embeddings", range::CONTEXT)?,
            }
        }
        other => {
            return Err(Error::new(ErrorKind::Config, "this rope scaling is not supported")
                .expected("default, linear or llama3")
                .got(quote_text(other)));
        }
    };
    Ok((theta, scaling))
}

/// The sliding window of each layer, by the rules of each family in transformers.
fn windows(family: Family, raw: Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>> {
    // A missing field means the default of 4,096 tokens, `null` no window.
    let window = || match raw.whole("sliding_window", range::TOKENS) {
        Ok(None) if !raw.has("sliding_window") => Ok(Some(4096)),
        Ok(window) => Ok(window),
        Err(e) => Err(e.hint("null means no window")),
    };
    let window = match family {
        Family::Llama => return Ok(vec![None; layers]),
        Family::Mistral => return Ok(vec![window()?; layers]),
        Family::Qwen2 | Family::Qwen3 if raw.flag("use_sliding_window")? == Some(true) => window()?,
        Family::Qwen2 | Family::Qwen3 => None,
    };
    let first_sliding = raw.whole("max_window_layers", 0..=*range::TOKENS.end())?.unwrap_or(28);
    let types = match raw.value("layer_types") {
        None => &[][..],
        Some(Value::Array(types)) => types,
        Some(other) => {
            return Err(Error::new(ErrorKind::Config, "`layer_types` is not a list")
                .expected("a list of strings")
                .got(quote(other)));
        }
    };
    let slides = |layer: usize| match types.get(layer) {
        Some(Value::String(kind)) if kind == "sliding_attention" => Ok(true),
        Some(Value::String(kind)) if kind == "full_attention" => Ok(false),
        Some(kind) => Err(Error::new(ErrorKind::Config, format!("unknown type of layer {layer}"))
            .expected("`layer_types` of full_attention or sliding_attention")
            .got(quote(kind))),
        None => Ok(layer >= first_sliding),
    };
    (0..layers).map(|layer| Ok(if slides(layer)? { window } else { None })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small configuration with `settings`, the members of a JSON object, added or replaced.
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
    fn rope_settings_of_transformers_4_and_5_are_read() {
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
    fn unsupported_settings_are_refused_by_name() {
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

    /// Every number of the file with values out of its range: the error names the field and the range,
    /// and nothing is allocated for the value.
    #[test]
    fn numbers_out_of_range_are_refused_by_name() {
        let whole =
            ["0", "-1", "1.5", "1e3", "\"3\"", "1099511627776", "18446744073709551615", "[]"];
        let layers = ["10000000000", "1000000000", "1152921504606846976", "1000000000000"];
        let real = ["0", "-1e-3", "1e-300", "1e300", "\"NaN\"", "\"1e4\"", "true"];
        let sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"];
        let refuse = |family: &str, name: &str, value: &str| {
            let setting = format!(r#""model_type": "{family}", "{name}": {value}"#);
            let e = parse(&setting).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Config);
            let e = e.to_string();
            assert!(e.starts_with(&format!("`{name}` is out of range")), "{setting}: {e}");
            assert!(e.contains("number from "), "{setting}: {e}");
        };
        for value in whole {
            let others = ["num_key_value_heads", "head_dim", "max_position_embeddings"];
            sizes.iter().chain(&others).for_each(|name| refuse("llama", name, value));
            refuse("mistral", "sliding_window", value);
        }
        for value in whole.iter().chain(&layers) {
            ["llama", "mistral", "qwen2", "qwen3"]
                .iter()
                .for_each(|family| refuse(family, "num_hidden_layers", value));
        }
        for value in real {
            refuse("llama", "rope_theta", value);
            refuse("llama", "rms_norm_eps", value);
            for setting in [
                format!(r#""rope_parameters": {{"rope_theta": {value}}}"#),
                format!(r#""rope_scaling": {{"type": "linear", "factor": {value}}}"#),
            ] {
                let setting = format!(r#""model_type": "llama", {setting}"#);
                let e = parse(&setting).unwrap_err().to_string();
                assert!(e.contains("` of `rope_") && e.contains("is out of range"), "{e}");
            }
        }
        // A number beyond f64 is rejected by the JSON parser.
        let e = DecoderConfig::from_json(br#"{"rope_theta": 1e999}"#).unwrap_err().to_string();
        assert!(e.contains("number out of range"), "{e}");
    }

    #[test]
    fn a_window_of_0_tokens_is_refused_if_it_would_be_used() {
        for setting in [
            r#""model_type": "mistral", "sliding_window": 0"#,
            r#""model_type": "qwen2", "use_sliding_window": true, "sliding_window": 0"#,
        ] {
            let e = parse(setting).unwrap_err().to_string();
            assert!(e.contains("`sliding_window` is out of range") && e.contains("null"), "{e}");
        }
        let unused = parse(r#""model_type": "qwen2", "sliding_window": 0"#).unwrap();
        assert_eq!(unused.windows, [None; 3]);
    }

    #[test]
    fn sizes_whose_product_is_too_large_are_refused() {
        let large = 1 << 28;
        for setting in [
            format!(r#""vocab_size": {large}, "hidden_size": {large}"#),
            r#""num_attention_heads": 65536, "head_dim": 65536"#.to_owned(),
            format!(r#""intermediate_size": {large}, "num_hidden_layers": 65536"#),
        ] {
            let e = parse(&format!(r#""model_type": "llama", {setting}"#)).unwrap_err();
            assert!(e.to_string().contains("too large"), "{e}");
        }
    }

    #[test]
    fn control_characters_of_the_file_are_not_printed() {
        for setting in [
            r#""model_type": "\u001b[31m\u009b""#,
            r#""model_type": "llama", "hidden_act": "\u001b[31m\u009b""#,
            r#""model_type": "llama", "hidden_size": "\u001b[31m\u009b""#,
            r#""model_type": "llama", "rope_scaling": {"type": "\u001b[31m\u009b"}"#,
        ] {
            let e = parse(setting).unwrap_err().to_string();
            assert!(!e.contains(['\u{1b}', '\u{9b}']), "{e:?}");
        }
    }
}
