//! Token embeddings in an adapter's file: trained rows, or a whole table of which some rows differ from the base
//! model's.

use std::collections::BTreeMap;

use super::adapter_config::AdapterConfig;
use crate::Result;
use crate::model::{SavedTokens, TRAINED_TOKENS, check_gaps, place_rows};
use crate::storage::SafetensorsFile;

/// The embedding table, in files with `modules_to_save` and in those of a model whose vocabulary was resized.
pub(super) const TABLE: &str = "embed_tokens.weight";
/// The table beside trained rows, if the vocabulary was resized.
const TABLE_BESIDE_ROWS: &str = "embed_tokens.token_adapter.base_layer.weight";
/// Copies that PEFT also writes with `modules_to_save` if the vocabulary was resized. It reads [`TABLE`].
const COPIES: [&str; 2] =
    ["embed_tokens.modules_to_save.weight", "embed_tokens.original_module.weight"];
/// The head of a causal language model has no part in embeddings.
const HEAD: &str = "base_model.model.lm_head.";

/// The names in an adapter's file that concern token embeddings.
pub(crate) struct TokenNames<'f> {
    file: &'f SafetensorsFile,
    /// What precedes the decoder's names.
    prefix: &'static str,
    /// The trained rows, if the configuration has `trainable_token_indices`.
    rows: Option<String>,
    /// The table, if there is one.
    table: Option<String>,
}

/// The tokens whose embeddings are not those of the base model.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct AdapterTokens {
    /// Token ids, ascending.
    pub(crate) ids: Vec<u32>,
    /// Their embeddings, row-major. `[ids, d]`
    pub(crate) rows: Vec<f32>,
}

impl AdapterTokens {
    /// Writes the embeddings to a base model's table, row-major, which grows if it has no rows for them.
    pub(crate) fn place_in(&self, table: &mut Vec<f32>) {
        place_rows(table, &self.ids, &self.rows);
    }
}

/// The row of an adapter's file with a token's embedding.
enum Source {
    Rows(usize),
    Table(usize),
    /// The base model's row.
    Base(usize),
}

impl<'f> TokenNames<'f> {
    pub(crate) fn new(
        file: &'f SafetensorsFile,
        prefix: &'static str,
        config: &AdapterConfig,
    ) -> Self {
        let rows = (!config.token_indices.is_empty()).then(|| format!("{prefix}{TRAINED_TOKENS}"));
        let table = [TABLE, TABLE_BESIDE_ROWS].map(|name| format!("{prefix}{name}"));
        let required = config.lora.saved_tokens == SavedTokens::ModulesToSave;
        let found = table.iter().find(|name| file.info(name).is_some());
        let table = found.or(required.then_some(&table[0])).cloned();
        TokenNames { file, prefix, rows, table }
    }

    /// Whether a tensor belongs to the token embeddings or to the head.
    pub(crate) fn contain(&self, name: &str) -> bool {
        let is = |known: &Option<String>| known.as_deref() == Some(name);
        let bare = name.strip_prefix(self.prefix).unwrap_or(name);
        let beside_table = self.table.is_some()
            && (COPIES.contains(&bare) || [TABLE, TABLE_BESIDE_ROWS].contains(&bare));
        is(&self.rows) || beside_table || name.starts_with(HEAD)
    }

    /// One past the largest token id with an embedding in the file; 0 if there is none.
    pub(crate) fn vocab_size(&self, config: &AdapterConfig) -> usize {
        let of_table = self.table.as_ref().and_then(|name| self.file.info(name));
        let of_table = of_table.and_then(|info| info.shape.first().copied()).unwrap_or(0);
        let of_rows = config.lora.trained_tokens.last().map_or(0, |&id| id as usize + 1);
        of_table.max(of_rows)
    }

    /// The hidden size, by the shapes of the file; 0 if it has no token embeddings.
    pub(crate) fn hidden_size(&self) -> usize {
        let infos = [&self.rows, &self.table].map(|name| self.file.info(name.as_deref()?));
        let sizes = infos.into_iter().flatten().map(|info| info.shape.last().copied());
        sizes.flatten().next().unwrap_or(0)
    }

    /// Checks that no token is without an embedding, beside a base model with `rows` token embeddings.
    ///
    /// # Errors
    /// The first id that has none, below the largest one.
    pub(crate) fn check_gaps(&self, config: &AdapterConfig, rows: usize) -> Result<()> {
        let table = self.table.as_ref().and_then(|name| self.file.info(name));
        let of_table = table.and_then(|info| info.shape.first().copied()).unwrap_or(0);
        check_gaps(&config.lora.trained_tokens, rows.max(of_table))
    }

    /// What is wrong with the shapes: one line for each tensor. d is the hidden size.
    pub(crate) fn faults(&self, config: &AdapterConfig, d: usize) -> Vec<String> {
        let mut faults = Vec::new();
        let mut check = |name: &Option<String>, rows: Option<usize>| {
            let Some(name) = name else { return };
            let expected = rows.map_or("rows".to_owned(), |rows| rows.to_string());
            match self.file.info(name).map(|info| info.shape.as_slice()) {
                None => faults.push(format!("missing: {name} [{expected}, {d}]")),
                Some(&[found, cols]) if cols == d && found == rows.unwrap_or(found) => {}
                Some(found) => faults
                    .push(format!("misshapen: {name}: expected [{expected}, {d}], got {found:?}")),
            }
        };
        check(&self.rows, Some(config.token_indices.len()));
        check(&self.table, None);
        faults
    }

    /// Reads the embeddings that are not those of the base model, whose table `base` returns, row-major; it is
    /// called only if the file has a table. `only` are the tokens to read, ascending: without it, all of them.
    /// The shapes have no [`faults`](Self::faults).
    ///
    /// # Errors
    /// If a tensor cannot be read, or has a value that is not finite.
    pub(crate) fn read(
        &self,
        config: &AdapterConfig,
        d: usize,
        base: &mut dyn FnMut() -> Result<Vec<f32>>,
        only: Option<&[u32]>,
    ) -> Result<AdapterTokens> {
        let read =
            |name: &Option<String>| name.as_ref().map(|name| self.file.read_f32(name)).transpose();
        let (rows, table) = (read(&self.rows)?.unwrap_or_default(), read(&self.table)?);
        let base = if table.is_some() { base()? } else { Vec::new() };
        let table = table.unwrap_or_default();
        let row =
            |matrix: &'_ [f32], at: usize| matrix.chunks_exact(d).nth(at).map(<[f32]>::to_vec);
        let equal = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
        let mut sources = BTreeMap::new();
        for (at, own) in table.chunks_exact(d).enumerate() {
            let same = base.chunks_exact(d).nth(at).is_some_and(|of_base| equal(of_base, own));
            if !same {
                sources.insert(at as u32, Source::Table(at));
            }
        }
        for (at, &id) in config.token_indices.iter().enumerate() {
            sources.insert(id, Source::Rows(at));
        }
        if let Some(only) = only {
            sources.retain(|id, _| only.binary_search(id).is_ok());
            for &id in only {
                sources.entry(id).or_insert(Source::Base(id as usize));
            }
        }
        let mut tokens = AdapterTokens::default();
        for (id, source) in sources {
            let found = match source {
                Source::Rows(at) => row(&rows, at),
                Source::Table(at) => row(&table, at),
                Source::Base(at) => row(&base, at),
            };
            if let Some(found) = found {
                tokens.ids.push(id);
                tokens.rows.extend(found);
            }
        }
        Ok(tokens)
    }
}
