//! Builds a decoder from weight files. Every mismatch with the configuration is found before any weight
//! is read, and all are reported together.

use std::collections::HashSet;
use std::fmt;

use rand::{Rng, RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::files::WeightFiles;
use crate::backend::{Backend, Dtype};
use crate::model::decoder::NamedShape;
use crate::model::{Decoder, DecoderConfig, HEAD_WEIGHT, ParameterValues};
use crate::storage::is_readable;
use crate::{Error, ErrorKind, Result};

/// Prefix of the decoder's names in the files of a causal language model.
const CAUSAL_LM_PREFIX: &str = "model.";

/// Whether a folder may have this tensor in addition to those of the decoder: the language-model head, and
/// buffers in old exports.
fn is_ignored(name: &str) -> bool {
    name == HEAD_WEIGHT
        || name == "lm_head.bias"
        || name.ends_with(".rotary_emb.inv_freq")
        || name == "rotary_emb.inv_freq"
}

/// The prefix of names in this folder's files: `model.`, or none if a bare decoder was saved.
pub(crate) fn prefix_of(files: &WeightFiles) -> &'static str {
    if files.info("embed_tokens.weight").is_some() { "" } else { CAUSAL_LM_PREFIX }
}

/// Builds the decoder of `config` from `files`, its matrices stored as `matrices`, all other tensors as f32.
///
/// # Errors
/// If tensors are missing, unknown, of another shape or of an unsupported dtype (all listed in one
/// error), or one contains NaN or infinity.
pub fn load_decoder<B: Backend>(
    backend: &B,
    config: &DecoderConfig,
    files: &WeightFiles,
    matrices: Dtype,
) -> Result<Decoder<B>> {
    let prefix = prefix_of(files);
    compare(files, prefix, &config.parameter_shapes()?)?;
    Decoder::build(backend, config.clone(), &mut |name, shape| {
        let dtype = if shape.len() == 2 { matrices } else { Dtype::F32 };
        files.values(&format!("{prefix}{name}"), dtype)
    })
}

/// Reads the language-model head of `files` and attaches it to the decoder that was loaded from them.
///
/// # Errors
/// The head is not tied to the embedding table, and the files have no weight for it, or one of another shape; it
/// has a bias; or the weight cannot be read.
pub(crate) fn load_head<B: Backend>(
    backend: &B,
    decoder: &mut Decoder<B>,
    files: &WeightFiles,
) -> Result<()> {
    let bad = |what: &str| Error::new(ErrorKind::Weights, what).file(files.path());
    if files.info("lm_head.bias").is_some() {
        return Err(bad("the language-model head has a bias, which is not supported")
            .got("a tensor `lm_head.bias`"));
    }
    let shape = [decoder.config().vocab_size, decoder.config().hidden_size];
    if !decoder.config().tie_word_embeddings {
        let Some(info) = files.info(HEAD_WEIGHT) else {
            return Err(bad("the model has no language-model head")
                .expected(format!(
                    "a tensor `{HEAD_WEIGHT}` {shape:?}, or `\"tie_word_embeddings\": true` in config.json"
                ))
                .hint("use a causal language model (…ForCausalLM), not a model without its head"));
        };
        if info.shape != shape || !is_readable(info.dtype) {
            return Err(bad("the language-model head does not fit config.json")
                .expected(format!("`{HEAD_WEIGHT}` {shape:?} in F32, F16 or BF16"))
                .got(format!("{:?} in {:?}", info.shape, info.dtype)));
        }
    }
    decoder.attach_head(backend, &mut |name, _| files.values(name, Dtype::F32))
}

/// A decoder initialized as a new model of Hugging Face: matrices from a normal
/// distribution, norms one, biases zero. The same seed gives the same weights.
pub fn random_decoder<B: Backend>(
    backend: &B,
    config: &DecoderConfig,
    standard_deviation: f32,
    seed: u64,
) -> Result<Decoder<B>> {
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    Decoder::build(backend, config.clone(), &mut |name, shape| {
        let elements: usize = shape.iter().product();
        let values = match (shape.len(), name.ends_with(".bias")) {
            (2, _) => (0..elements)
                .map(|_| standard_normal(&mut generator) * standard_deviation)
                .collect(),
            (_, true) => vec![0.0; elements],
            _ => vec![1.0; elements],
        };
        Ok(ParameterValues::F32(values))
    })
}

/// One sample of the standard normal distribution (Box and Muller 1958).
pub(crate) fn standard_normal(generator: &mut impl Rng) -> f32 {
    let radius: f64 = 1.0 - generator.random::<f64>();
    let angle: f64 = generator.random::<f64>() * 2.0 * std::f64::consts::PI;
    ((-2.0 * radius.ln()).sqrt() * angle.cos()) as f32
}

fn compare(files: &WeightFiles, prefix: &str, expected: &[NamedShape]) -> Result<()> {
    let faults = mismatches(files, prefix, expected);
    if faults.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = faults.iter().map(Mismatch::to_string).collect();
    Err(Error::new(
        ErrorKind::Weights,
        format!("the weights do not fit config.json in {} places", faults.len()),
    )
    .file(files.path())
    .got(format!("\n    {}", lines.join("\n    ")))
    .hint("config.json and the weights must come from the same export"))
}

/// A tensor that does not fit the configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Mismatch {
    /// Not in the files.
    Missing { name: String, shape: Vec<usize> },
    /// Of another shape.
    Shape { name: String, expected: Vec<usize>, got: Vec<usize> },
    /// Of a type that cannot be read.
    Dtype { name: String, got: String },
    /// Not a tensor of the model.
    Unknown { name: String },
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Missing { name, shape } => write!(f, "missing: {name} {shape:?}"),
            Mismatch::Shape { name, expected, got } => {
                write!(f, "misshapen: {name}: expected {expected:?}, got {got:?}")
            }
            Mismatch::Dtype { name, got } => {
                write!(f, "unsupported dtype: {name}: {got}; F32, F16 and BF16 can be read")
            }
            Mismatch::Unknown { name } => write!(f, "unknown: {name}"),
        }
    }
}

/// All tensors of `files` that do not fit the model of `config`.
///
/// # Errors
/// When the configuration describes no decoder.
pub(crate) fn misfits(files: &WeightFiles, config: &DecoderConfig) -> Result<Vec<Mismatch>> {
    Ok(mismatches(files, prefix_of(files), &config.parameter_shapes()?))
}

fn mismatches(files: &WeightFiles, prefix: &str, expected: &[NamedShape]) -> Vec<Mismatch> {
    let mut faults = Vec::new();
    let mut known = HashSet::new();
    for (name, shape) in expected {
        let name = format!("{prefix}{name}");
        known.insert(name.clone());
        match files.info(&name) {
            None => faults.push(Mismatch::Missing { name, shape: shape.clone() }),
            Some(info) if info.shape != *shape => {
                let (expected, got) = (shape.clone(), info.shape.clone());
                faults.push(Mismatch::Shape { name, expected, got });
            }
            Some(info) if !is_readable(info.dtype) => {
                faults.push(Mismatch::Dtype { name, got: format!("{:?}", info.dtype) });
            }
            Some(_) => {}
        }
    }
    let extra = files.names().filter(|name| !known.contains(*name) && !is_ignored(name));
    faults.extend(extra.map(|name| Mismatch::Unknown { name: name.to_owned() }));
    faults
}
