//! The largest expected batch of a run.

use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::data::{Batch, Dataset, PretrainingData};
use crate::text::PromptEncoder;
use crate::train::batches::{BatchSource, Tokenized};
use crate::train::config::TrainConfig;
use crate::train::pretraining::{
    PretrainingEncoder, PretrainingInput, PretrainingOptions, PretrainingSource,
};

/// Number of batches that are sampled, at regular intervals.
const STEPS: u64 = 32;

/// Maximum number of texts in all sampled batches.
const TEXTS: usize = 1 << 13;

/// The largest expected batch exceeds the mean of the sampled ones by this number of standard deviations.
const DEVIATIONS: f64 = 4.0;

/// The largest expected batch of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LargestBatch {
    /// `B` queries; none in pretraining.
    pub query: Batch,
    /// `B·G` passages; in pretraining, the sequences of all texts.
    pub passage: Batch,
    /// Number of steps of the run.
    pub steps: u64,
    /// Number of steps whose batches were sampled.
    pub sampled_steps: u64,
}

/// A sampled batch.
struct Sample {
    query: Batch,
    passage: Batch,
    /// Number of tokens that are encoded.
    encoded: usize,
}

impl LargestBatch {
    /// Samples batches of the run. If all batches were sampled, the result is the largest one. Otherwise it
    /// is the largest one with its sequences lengthened to four standard deviations above the mean, if it is
    /// shorter. `dedup_sequences` is whether equal sequences are encoded once.
    ///
    /// # Errors
    /// A setting is out of range, or a row cannot be read or tokenized.
    pub fn of_run(
        dataset: &Dataset,
        prompts: &Arc<PromptEncoder>,
        config: &TrainConfig,
        dedup_sequences: bool,
    ) -> Result<Self> {
        let sampler = config.sampler(dataset, 1)?;
        let steps = config.length.steps(sampler.steps_per_epoch())?;
        let texts = config.batch_size.min(dataset.len()).max(1) * (1 + config.group_size);
        let batches = BatchSource {
            dataset,
            config,
            sampler,
            prompts: Arc::clone(prompts),
            deduplicate: dedup_sequences,
            has_dropout: false,
            rank: (0, 1),
        };
        let max_lens = (config.query_max_len, config.passage_max_len);
        Self::sampled((steps, texts), max_lens, dedup_sequences, &mut |step| {
            let Tokenized { queries, passages, .. } = batches.tokenized(step)?;
            Ok((Batch::from_sequences(queries)?, Batch::from_sequences(passages)?))
        })
    }

    /// [`of_run`](Self::of_run) for a run of pretraining.
    ///
    /// # Errors
    /// As for [`of_run`](Self::of_run).
    pub fn of_pretraining(
        data: &PretrainingData,
        prompts: &Arc<PromptEncoder>,
        config: &TrainConfig,
        options: &PretrainingOptions,
    ) -> Result<Self> {
        let sampler = config.sampler(data.dataset(), 1)?;
        let steps = config.length.steps(sampler.steps_per_epoch())?;
        let texts = config.batch_size.min(data.dataset().len()).max(1) * 2;
        let encoder = PretrainingEncoder::new(Arc::clone(prompts), options)?;
        let bag_rows = encoder.pooled_tokens();
        let source = PretrainingSource { data, config, sampler, encoder, rank: (0, 1) };
        let none = Batch::from_sequences(Vec::<Vec<u32>>::new())?;
        // The cutoff includes the own tokens of all sequences of a text.
        let max_lens = (options.cutoff_len, options.cutoff_len);
        Self::sampled((steps, texts), max_lens, false, &mut |step| {
            let (_, _, rows) = source.encoded(step)?;
            let input = PretrainingInput::new(&rows, bag_rows, None)?;
            Ok((none.clone(), input.batch().clone()))
        })
    }

    /// The largest expected batch of `steps` steps with `texts` texts each, from samples of them.
    fn sampled(
        (steps, texts): (u64, usize),
        max_lens: (usize, usize),
        dedup_sequences: bool,
        batch_of_step: &mut dyn FnMut(u64) -> Result<(Batch, Batch)>,
    ) -> Result<Self> {
        let mut sample = |step| -> Result<Sample> {
            let (query, passage) = batch_of_step(step)?;
            let encoded = encoded_tokens(&query, &passage, dedup_sequences)?;
            Ok(Sample { query, passage, encoded })
        };
        let sampled_steps = STEPS.min((TEXTS / texts) as u64).clamp(1, steps);
        let mut tokens_of_rows = Vec::new();
        let mut mean_encoded = 0.0;
        let mut largest: Option<Sample> = None;
        for i in 0..sampled_steps {
            let step = (u128::from(i) * u128::from(steps) / u128::from(sampled_steps)) as u64;
            let batch = sample(step)?;
            tokens_of_rows.extend(row_tokens(&batch));
            mean_encoded += batch.encoded as f64 / sampled_steps as f64;
            if largest.as_ref().is_none_or(|largest| batch.encoded > largest.encoded) {
                largest = Some(batch);
            }
        }
        let largest = match largest {
            Some(largest) => largest,
            None => sample(0)?,
        };
        let rows = row_tokens(&largest).len().max(1) as f64;
        let margin = DEVIATIONS * deviation(&tokens_of_rows) * rows.sqrt();
        let expected = if sampled_steps < steps { (mean_encoded + margin) as usize } else { 0 };
        let Sample { query, passage, encoded } = largest;
        let (query, passage) = match expected > encoded {
            true => lengthened(&query, &passage, max_lens, expected, dedup_sequences)?,
            false => (query, passage),
        };
        Ok(LargestBatch { query, passage, steps, sampled_steps })
    }

    /// The same batch with passages of at most `max_len` tokens; in pretraining, the sequences of a text together.
    ///
    /// # Errors
    /// None, for a batch of a run.
    pub fn with_passages_truncated(&self, max_len: usize) -> Result<Self> {
        Ok(LargestBatch { passage: truncated(&self.passage, max_len)?, ..self.clone() })
    }
}

/// The batch with sequences of at most `max_len` tokens, those of their branches included; a branch itself is not
/// shortened.
fn truncated(batch: &Batch, max_len: usize) -> Result<Batch> {
    with_lengths(batch, |length| length.min(max_len))
}

/// The batch with another number of tokens of each sequence, those of its branches included. They are removed or added
/// at the start of the sequence; added ones repeat its first id, so that equal sequences remain equal.
fn with_lengths(batch: &Batch, new_length: impl Fn(usize) -> usize) -> Result<Batch> {
    let sequences: Vec<&[u32]> = batch.sequences().collect();
    let mut resized = Vec::with_capacity(batch.len());
    for tree in batch.trees() {
        let length = sequences[tree.clone()].iter().map(|own| own.len()).sum();
        let (root, wanted) = (sequences[tree.start], new_length(length));
        // Every branch keeps a token that it shares: otherwise it would be none.
        let shared = batch.shared()[tree.clone()].iter().filter(|&&shared| shared > 0).min();
        let most = shared.map_or(root.len(), |&shared| shared as usize).saturating_sub(1);
        let removed = length.saturating_sub(wanted).min(most);
        let added = wanted.saturating_sub(length);
        let first = root.first().copied().unwrap_or_default();
        let root = std::iter::repeat_n(first, added).chain(root[removed..].iter().copied());
        resized.push((root.collect::<Vec<u32>>(), 0));
        for branch in tree.skip(1) {
            let shared = batch.shared()[branch] as usize + added - removed;
            resized.push((sequences[branch].to_vec(), shared));
        }
    }
    Batch::from_branches(resized)
}

fn encoded_tokens(query: &Batch, passage: &Batch, dedup_sequences: bool) -> Result<usize> {
    if !dedup_sequences {
        return Ok(query.tokens() + passage.tokens());
    }
    let both = query.sequences().chain(passage.sequences());
    Ok(Batch::deduplicated(both)?.0.tokens())
}

/// The number of tokens of each row: its query and its passages, or the sequences of a text.
fn row_tokens(batch: &Sample) -> Vec<f64> {
    let lengths: Vec<usize> = batch.passage.sequences().map(<[u32]>::len).collect();
    if batch.query.is_empty() {
        let tokens = |tree: Range<usize>| lengths[tree].iter().sum::<usize>() as f64;
        return batch.passage.trees().map(tokens).collect();
    }
    let groups = lengths.chunks((lengths.len() / batch.query.len().max(1)).max(1));
    let rows = batch.query.sequences().zip(groups);
    rows.map(|(query, group)| (query.len() + group.iter().sum::<usize>()) as f64).collect()
}

fn deviation(values: &[f64]) -> f64 {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt()
}

/// The batch with all sequences lengthened by the same factor, up to the maximum length of their role, so
/// that at least `tokens` tokens are encoded if the maximum lengths allow it.
fn lengthened(
    query: &Batch,
    passage: &Batch,
    (query_max_len, passage_max_len): (usize, usize),
    tokens: usize,
    dedup_sequences: bool,
) -> Result<(Batch, Batch)> {
    let by = |factor: f64| -> Result<(Batch, Batch)> {
        Ok((stretched(query, factor, query_max_len)?, stretched(passage, factor, passage_max_len)?))
    };
    // With the factor `long`, every sequence has the maximum length of its role.
    let (mut short, mut long) = (1.0, query_max_len.max(passage_max_len) as f64);
    for _ in 0..16 {
        let middle = f64::midpoint(short, long);
        let (query, passage) = by(middle)?;
        match encoded_tokens(&query, &passage, dedup_sequences)? < tokens {
            true => short = middle,
            false => long = middle,
        }
    }
    by(long)
}

/// Lengthens sequences by a factor, up to `max_len` tokens.
fn stretched(batch: &Batch, factor: f64, max_len: usize) -> Result<Batch> {
    let stretch = |length: usize| ((length as f64 * factor) as usize).min(max_len).max(length);
    with_lengths(batch, stretch)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(lengths: &[usize]) -> Batch {
        let sequence = |(i, &n): (usize, &usize)| vec![i as u32 % 3 + 1; n];
        Batch::from_sequences(lengths.iter().enumerate().map(sequence)).unwrap()
    }

    #[test]
    fn a_batch_is_lengthened_within_the_maximum_lengths() {
        let max_lens = (10, 40);
        let (query, passage) = (batch(&[4, 9]), batch(&[10, 20, 30, 40]));
        for wanted in [113, 120, 140, 170] {
            let (q, p) = lengthened(&query, &passage, max_lens, wanted, false).unwrap();
            let tokens = q.tokens() + p.tokens();
            assert!((wanted..wanted + 8).contains(&tokens), "{wanted}: {tokens}");
            assert_eq!((q.len(), p.len()), (2, 4));
        }
        let (q, p) = lengthened(&query, &passage, max_lens, 100_000, false).unwrap();
        assert_eq!((q.tokens(), p.tokens()), (20, 160));
        // Passages 0 and 2 are equal.
        let twice = Batch::from_sequences([vec![1; 10], vec![2; 20], vec![1; 10]]).unwrap();
        let (q, p) = lengthened(&query, &twice, max_lens, 60, true).unwrap();
        assert_eq!(p.sequences().next(), p.sequences().nth(2));
        assert!((60..66).contains(&encoded_tokens(&q, &p, true).unwrap()));
    }

    #[test]
    fn the_common_part_of_branches_is_resized() {
        let branches = [(vec![7, 1, 2, 3, 4], 0), (vec![5, 6], 3), (vec![8, 9], 0)];
        let batch = Batch::from_branches(branches).unwrap();
        let longer = stretched(&batch, 1.5, 100).unwrap();
        assert_eq!(longer.ids(), [7, 7, 7, 7, 1, 2, 3, 4, 5, 6, 8, 8, 9]);
        assert_eq!(longer.shared(), [0, 6, 0]);
        assert_eq!(stretched(&batch, 1.5, 8).unwrap().tokens(), 8 + 3);
        assert_eq!(stretched(&batch, 1.5, 2).unwrap(), batch);
        let shorter = truncated(&batch, 6).unwrap();
        assert_eq!(
            (shorter.ids(), shorter.shared()),
            (&[1, 2, 3, 4, 5, 6, 8, 9][..], &[0, 2, 0][..])
        );
        // Branches keep a common token.
        assert_eq!(truncated(&batch, 1).unwrap().shared(), [0, 1, 0]);
        let sample = Sample { query: self::batch(&[]), passage: batch, encoded: 9 };
        assert_eq!(row_tokens(&sample), [7.0, 2.0]);
    }
}
