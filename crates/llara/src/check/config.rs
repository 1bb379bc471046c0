//! `config.json`: whether it describes a supported model, and whether its token ids exist.

use std::path::Path;

use serde_json::Value;

use super::report::{Finding, Findings, Status};
use crate::model::DecoderConfig;
use crate::storage::read_limited;

const CHECK: &str = "config";
const FILE: &str = "config.json";
/// Largest `config.json`, in bytes; the reader of the configuration has the same limit.
const MAX_BYTES: u64 = 16 << 20;

/// A valid `config.json`.
pub(super) struct Config {
    pub(super) decoder: DecoderConfig,
    /// All of it, for what the decoder does not need.
    pub(super) json: Value,
}

impl Config {
    /// The same with a vocabulary of at least `vocab_size`.
    pub(super) fn with_vocab_size(&self, vocab_size: usize) -> Self {
        let mut decoder = self.decoder.clone();
        decoder.vocab_size = decoder.vocab_size.max(vocab_size);
        Config { decoder, json: self.json.clone() }
    }
}

/// Reads the `config.json` of `dir`.
pub(super) fn check_config(dir: &Path, findings: &mut Findings<'_>) -> Option<Config> {
    let path = dir.join(FILE);
    let decoder = match DecoderConfig::from_file(&path) {
        Ok(decoder) => decoder,
        Err(error) => {
            findings.fail(CHECK, &error);
            return None;
        }
    };
    let text = read_limited(&path, "read the model's configuration", MAX_BYTES).ok()?;
    let json: Value = serde_json::from_slice(&text).ok()?;
    findings.ok(
        CHECK,
        FILE,
        format!(
            "{:?}: {} layers, hidden_size {}, vocab_size {}",
            decoder.family, decoder.num_hidden_layers, decoder.hidden_size, decoder.vocab_size
        ),
    );
    if json.get("architectures").and_then(Value::as_array).is_none_or(Vec::is_empty) {
        let what =
            "`architectures` is missing; some tools select the model's class by it".to_owned();
        let finding = Finding::new(Status::Warning, CHECK, FILE, what);
        findings.push(finding.expected("a list with one name, such as [\"LlamaForCausalLM\"]"));
    }
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        let ids = match json.get(key) {
            Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_i64).collect(),
            Some(id) => id.as_i64().into_iter().collect::<Vec<_>>(),
            None => Vec::new(),
        };
        let size = decoder.vocab_size;
        // -1 stands for no token in old configurations.
        let outside = |id: &&i64| **id >= 0 && !usize::try_from(**id).is_ok_and(|id| id < size);
        if let Some(id) = ids.iter().find(outside) {
            let what = format!("`{key}` is not a token of the vocabulary");
            let finding = Finding::new(Status::Warning, CHECK, FILE, what);
            findings.push(finding.expected(format!("an id below {size}")).got(id));
        }
    }
    Some(Config { decoder, json })
}
