//! The lengths of the training texts in tokens, before truncation.

use crate::Result;
use crate::data::{Dataset, LONGEST_MEASURED, Lengths};
use crate::text::{PromptEncoder, Role};
use crate::train::config::TrainConfig;

/// Lengths of texts of one role, in tokens, template included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextLengths {
    /// The role of the texts.
    pub role: Role,
    /// Maximum length in tokens.
    pub max_len: usize,
    /// The lengths before truncation, up to [`LONGEST_MEASURED`] or one more than the maximum length.
    pub lengths: Lengths,
}

impl TextLengths {
    /// Measures the queries and passages of rows at regular intervals, about `texts` texts in total.
    ///
    /// # Errors
    /// A row cannot be read or tokenized.
    pub fn sample(
        dataset: &Dataset,
        prompts: &PromptEncoder,
        config: &TrainConfig,
        texts: usize,
    ) -> Result<[TextLengths; 2]> {
        let (mut queries, mut passages) = (Vec::new(), Vec::new());
        let first = dataset.row(0)?;
        let rows = (texts / (1 + first.pos.len() + first.neg.len())).clamp(1, dataset.len());
        for i in 0..rows {
            let row = dataset.row((i as u128 * dataset.len() as u128 / rows as u128) as usize)?;
            queries.push(config.query_text(row.prompt.as_deref(), &row.query));
            let of_row = row.pos.iter().chain(&row.neg);
            let instruction = row.passage_instruction.as_deref();
            passages.extend(of_row.map(|passage| config.passage_text(instruction, passage)));
            if queries.len() + passages.len() >= texts {
                break;
            }
        }
        let lengths = |role, texts: &[String], max_len| -> Result<TextLengths> {
            let most = LONGEST_MEASURED.max(max_len + 1);
            let lengths = prompts.encode_all(role, texts, most)?.iter().map(Vec::len).collect();
            Ok(TextLengths { role, max_len, lengths })
        };
        Ok([
            lengths(Role::Query, &queries, config.query_max_len)?,
            lengths(Role::Passage, &passages, config.passage_max_len)?,
        ])
    }

    /// The fraction of texts that are truncated.
    pub fn truncated_share(&self) -> f64 {
        let truncated = self.lengths.longer_than(self.max_len);
        truncated as f64 / self.lengths.texts().max(1) as f64
    }
}
