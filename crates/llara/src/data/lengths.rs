//! The lengths of many texts: percentiles, the share of truncated texts, a histogram.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Tokens of a text of which more are not counted, where lengths are measured on a sample: a longer text has this length.
/// Tokenizing a text of many megabytes would take minutes.
pub const LONGEST_MEASURED: usize = 1 << 14;

/// How many texts have each length. Its memory grows with the number of different lengths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lengths {
    texts: u64,
    /// Number of texts by length.
    counts: BTreeMap<usize, u64>,
}

/// Statistics of lengths, in the unit in which the lengths were measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LengthSummary {
    /// Number of texts.
    pub texts: u64,
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
}

/// A histogram of lengths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Histogram {
    /// Lower bound of the first bin: the shortest length.
    pub first: usize,
    /// Width of a bin.
    pub width: usize,
    /// Number of texts in each bin. The last bin also has all longer texts.
    pub counts: Vec<u64>,
}

impl Lengths {
    /// Adds a text.
    pub fn add(&mut self, length: usize) {
        self.texts += 1;
        *self.counts.entry(length).or_default() += 1;
    }

    /// Adds the texts of `other`.
    pub fn merge(&mut self, other: &Lengths) {
        self.texts += other.texts;
        for (&length, &texts) in &other.counts {
            *self.counts.entry(length).or_default() += texts;
        }
    }

    /// The number of texts.
    pub fn texts(&self) -> u64 {
        self.texts
    }

    /// The number of texts that are longer than `length`.
    pub fn longer_than(&self, length: usize) -> u64 {
        let shorter: u64 = self.counts.range(..=length).map(|(_, texts)| texts).sum();
        self.texts - shorter
    }

    /// The smallest length that this fraction of the texts does not exceed; 0 without texts.
    pub fn percentile(&self, share: f64) -> usize {
        let rank = ((share * self.texts as f64).ceil() as u64).clamp(1, self.texts.max(1));
        let mut seen = 0;
        let reached = self.counts.iter().find(|(_, texts)| {
            seen += **texts;
            seen >= rank
        });
        reached.map_or(0, |(&length, _)| length)
    }

    /// The lengths in `bins` ranges of equal width, up to the 99.5th percentile.
    pub fn histogram(&self, bins: usize) -> Histogram {
        let first = self.counts.keys().next().copied().unwrap_or(0);
        let width = (self.percentile(0.995) + 1 - first).div_ceil(bins.max(1)).max(1);
        let mut counts = vec![0; bins.max(1)];
        let last = counts.len() - 1;
        for (&length, &texts) in &self.counts {
            counts[((length - first) / width).min(last)] += texts;
        }
        Histogram { first, width, counts }
    }

    /// Statistics of the lengths.
    pub fn summary(&self) -> LengthSummary {
        let sum: u128 = self.counts.iter().map(|(&len, &n)| len as u128 * u128::from(n)).sum();
        LengthSummary {
            texts: self.texts,
            mean: sum as f64 / self.texts.max(1) as f64,
            p50: self.percentile(0.5),
            p90: self.percentile(0.9),
            p99: self.percentile(0.99),
            max: self.counts.keys().next_back().copied().unwrap_or(0),
        }
    }
}

impl FromIterator<usize> for Lengths {
    fn from_iter<I: IntoIterator<Item = usize>>(lengths: I) -> Self {
        let mut all = Lengths::default();
        lengths.into_iter().for_each(|length| all.add(length));
        all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn statistics_and_bins_agree_with_the_lengths() {
        let lengths: Lengths = (1..=100).collect();
        let summary = lengths.summary();
        assert_eq!((summary.p50, summary.p90, summary.p99, summary.max), (50, 90, 99, 100));
        assert!((summary.mean - 50.5).abs() < 1e-9);
        assert_eq!((lengths.longer_than(80), lengths.longer_than(100)), (20, 0));
        let Histogram { first, width, counts } = lengths.histogram(9);
        assert_eq!((first, width, counts.iter().sum()), (1, 12, 100));
        assert_eq!((counts[0], counts[1], counts[8]), (12, 12, 4));
        let none = Lengths::default();
        assert_eq!((none.summary().max, none.histogram(4).counts), (0, vec![0; 4]));
    }

    proptest! {
        #[test]
        fn percentiles_are_those_of_the_sorted_list(
            mut all in prop::collection::vec(0usize..30, 1..60), cut in 0usize..60, share in 0.0f64..=1.0,
        ) {
            let cut = cut.min(all.len());
            let mut lengths: Lengths = all[..cut].iter().copied().collect();
            lengths.merge(&all[cut..].iter().copied().collect());
            all.sort_unstable();
            let rank = ((share * all.len() as f64).ceil() as usize).max(1);
            prop_assert_eq!(lengths.percentile(share), all[rank - 1]);
            prop_assert_eq!(lengths.longer_than(9) as usize, all.iter().filter(|&&l| l > 9).count());
            prop_assert_eq!(lengths.summary().max, *all.last().unwrap());
        }
    }
}
