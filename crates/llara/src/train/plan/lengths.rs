//! The lengths of the training texts in tokens, before truncation.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::data::Dataset;
use crate::text::{PromptEncoder, Role};
use crate::train::config::TrainConfig;

/// Lengths of texts of one role, template included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextLengths {
    /// The role of the texts.
    pub role: Role,
    /// Maximum length in tokens.
    pub max_len: usize,
    /// Length of each text in tokens, ascending.
    lengths: Vec<usize>,
}

/// Statistics of lengths, in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LengthSummary {
    /// Number of texts.
    pub texts: usize,
    /// Maximum length.
    pub max_len: usize,
    /// Mean length.
    pub mean: f64,
    /// Median.
    pub p50: usize,
    /// 90th percentile.
    pub p90: usize,
    /// 99th percentile.
    pub p99: usize,
    /// Length of the longest text.
    pub max: usize,
    /// Fraction of texts that are truncated.
    pub cut_share: f64,
}

/// A histogram of lengths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Lower bound of the first bin: the shortest length.
    pub first: usize,
    /// Width of a bin.
    pub width: usize,
    /// Number of texts in each bin. The last bin also has all longer texts.
    pub counts: Vec<usize>,
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
            passages.extend(of_row.map(|passage| config.passage_text(passage)));
            if queries.len() + passages.len() >= texts {
                break;
            }
        }
        let lengths = |role, texts: &[String], max_len| -> Result<TextLengths> {
            let mut lengths: Vec<usize> =
                prompts.encode_all(role, texts, usize::MAX)?.iter().map(Vec::len).collect();
            lengths.sort_unstable();
            Ok(TextLengths { role, max_len, lengths })
        };
        Ok([
            lengths(Role::Query, &queries, config.query_max_len)?,
            lengths(Role::Passage, &passages, config.passage_max_len)?,
        ])
    }

    /// The smallest length that this fraction of the texts does not exceed.
    pub fn percentile(&self, share: f64) -> usize {
        let rank = (share * self.lengths.len() as f64).ceil() as usize;
        self.lengths.get(rank.max(1) - 1).or(self.lengths.last()).copied().unwrap_or(0)
    }

    /// The lengths in `bins` ranges of equal width, up to the 99.5th percentile.
    pub fn histogram(&self, bins: usize) -> Histogram {
        let first = self.lengths.first().copied().unwrap_or(0);
        let width = (self.percentile(0.995) + 1 - first).div_ceil(bins.max(1)).max(1);
        let mut counts = vec![0; bins.max(1)];
        for &length in &self.lengths {
            let last = counts.len() - 1;
            counts[((length - first) / width).min(last)] += 1;
        }
        Histogram { first, width, counts }
    }

    /// Statistics of the lengths.
    pub fn summary(&self) -> LengthSummary {
        let texts = self.lengths.len();
        let cut = texts - self.lengths.partition_point(|&length| length <= self.max_len);
        let share = |count: usize| count as f64 / texts.max(1) as f64;
        LengthSummary {
            texts,
            max_len: self.max_len,
            mean: share(self.lengths.iter().sum()),
            p50: self.percentile(0.5),
            p90: self.percentile(0.9),
            p99: self.percentile(0.99),
            max: self.percentile(1.0),
            cut_share: share(cut),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_and_bins_agree_with_the_lengths() {
        let lengths: Vec<usize> = (1..=100).collect();
        let texts = TextLengths { role: Role::Query, max_len: 80, lengths };
        let summary = texts.summary();
        assert_eq!((summary.p50, summary.p90, summary.p99, summary.max), (50, 90, 99, 100));
        assert!((summary.cut_share - 0.2).abs() < 1e-9 && (summary.mean - 50.5).abs() < 1e-9);
        let Histogram { first, width, counts } = texts.histogram(9);
        assert_eq!((first, width, counts.iter().sum()), (1, 12, 100));
        assert_eq!((counts[0], counts[1], counts[8]), (12, 12, 4));
        let none = TextLengths { role: Role::Query, max_len: 8, lengths: Vec::new() };
        assert_eq!((none.summary().max, none.histogram(4).counts), (0, vec![0; 4]));
    }
}
