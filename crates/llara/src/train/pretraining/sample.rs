//! What a sample of the rows says about a run before it starts.

use super::sequences::{PretrainingEncoder, SetObjective};
use crate::Result;
use crate::data::{Lengths, PretrainingData, PretrainingRow};

/// Lengths and targets of rows at regular intervals.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PretrainingSample {
    /// Tokens of the texts before they are cut, without template.
    pub lengths: Lengths,
    /// Tokens to which they are cut.
    pub text_tokens: usize,
    /// Number of rows.
    pub rows: usize,
    /// How many of them have a target of EBAE, and of EBAR.
    pub with_targets: [usize; 2],
}

impl PretrainingSample {
    /// Encodes at most `rows` rows.
    ///
    /// # Errors
    /// A row cannot be read or tokenized.
    pub fn of(data: &PretrainingData, encoder: &PretrainingEncoder, rows: usize) -> Result<Self> {
        let all = data.dataset().len();
        let rows = rows.clamp(1, all);
        let mut lengths = Vec::with_capacity(rows);
        let mut with_targets = [0; 2];
        for i in 0..rows {
            let row: PretrainingRow =
                data.row((i as u128 * all as u128 / rows as u128) as usize)?;
            lengths.push(encoder.length(&row)?);
            for sequence in encoder.encode(&row)? {
                if !sequence.targets.is_empty() {
                    with_targets[sequence.objective as usize] += 1;
                }
            }
        }
        let lengths = lengths.into_iter().collect();
        Ok(PretrainingSample { lengths, text_tokens: encoder.text_tokens(), rows, with_targets })
    }

    /// The fraction of texts that are truncated.
    pub fn truncated_share(&self) -> f64 {
        let truncated = self.lengths.longer_than(self.text_tokens);
        truncated as f64 / self.lengths.texts().max(1) as f64
    }

    /// Number of rows that have a target of an objective.
    pub fn with(&self, objective: SetObjective) -> usize {
        self.with_targets[objective as usize]
    }
}
