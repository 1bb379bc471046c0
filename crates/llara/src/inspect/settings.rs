//! What an inspection needs to know about the run that the data is for.

use std::path::PathBuf;
use std::sync::Arc;

use crate::data::BadRows;
use crate::text::{PromptEncoder, Template};

/// The settings of an inspection.
#[derive(Clone)]
pub struct Settings {
    /// Number of passages per query: 1 positive and the others negatives.
    pub group_size: usize,
    /// Maximum length of a query in tokens, template included.
    pub query_max_len: usize,
    /// Maximum length of a passage in tokens, template included.
    pub passage_max_len: usize,
    /// Prepended to every query without a `prompt`, for lengths in tokens.
    pub query_instruction: String,
    /// Prepended to every passage, for lengths in tokens.
    pub passage_instruction: String,
    /// The template, whose special tokens should not be in texts.
    pub template: Template,
    /// Tokenizer and template. Without them there are no lengths in tokens.
    pub prompts: Option<Arc<PromptEncoder>>,
    /// Whether a malformed row is counted, or ends the inspection with its error.
    pub on_bad_row: BadRows,
    /// Number of rows that are tokenized.
    pub sample_rows: usize,
    /// Whether near duplicates are searched for.
    pub near_duplicates: bool,
    /// The folder of temporary files, for data whose hashes do not fit into memory. Each query, each passage
    /// and each row needs 32 bytes.
    pub temp_dir: PathBuf,
}

impl Settings {
    /// The defaults of a training run with this template, without a tokenizer.
    pub fn new(template: Template) -> Self {
        Settings {
            group_size: 8,
            query_max_len: 32,
            passage_max_len: 128,
            query_instruction: String::new(),
            passage_instruction: String::new(),
            template,
            prompts: None,
            on_bad_row: BadRows::Skip,
            sample_rows: 5_000,
            near_duplicates: true,
            temp_dir: std::env::temp_dir(),
        }
    }

    /// The special tokens of the template and of the tokenizer, each once.
    pub(super) fn special_tokens(&self) -> Vec<String> {
        let mut tokens = self.template.special_tokens();
        let of_tokenizer = self.prompts.iter().flat_map(|p| p.tokenizer().special_tokens());
        tokens.extend(of_tokenizer);
        tokens.sort();
        tokens.dedup();
        tokens
    }
}
