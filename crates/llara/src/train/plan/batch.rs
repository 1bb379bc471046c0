//! The largest batch that a run is likely to meet.

use std::sync::Arc;

use crate::Result;
use crate::data::{Batch, Dataset};
use crate::text::PromptEncoder;
use crate::train::batches::{BatchSource, Tokenized};
use crate::train::config::TrainConfig;

/// Batches of a run that are looked at, spread over it.
const STEPS: u64 = 32;

/// Texts that are looked at, where batches are large.
const TEXTS: usize = 1 << 13;

/// How many standard deviations above the mean a batch may have that was not looked at.
const DEVIATIONS: f64 = 4.0;

/// A batch as large as any that a run is likely to draw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LargestBatch {
    /// `B` queries.
    pub query: Batch,
    /// `B·G` passages.
    pub passage: Batch,
    /// Steps of the run.
    pub steps: u64,
    /// Steps whose batches were looked at.
    pub looked_at: u64,
}

/// A batch of the run that was looked at.
struct Seen {
    query: Batch,
    passage: Batch,
    /// Tokens that are encoded.
    encoded: usize,
}

impl LargestBatch {
    /// Draws some of the run's own batches. Where all were looked at it is the largest of them; else
    /// the largest made longer, to four standard deviations above the mean, if it is not that long.
    /// `dedup_sequences` says whether equal sequences are encoded once.
    ///
    /// # Errors
    /// When a setting is out of its range or a row cannot be read or tokenized.
    pub fn of_run(
        dataset: &Dataset,
        prompts: &Arc<PromptEncoder>,
        config: &TrainConfig,
        dedup_sequences: bool,
    ) -> Result<Self> {
        let sampler = config.sampler(dataset.len(), 1)?;
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
        let look = |step| -> Result<Seen> {
            let Tokenized { queries, passages, .. } = batches.tokenized(step)?;
            let query = Batch::from_sequences(queries)?;
            let passage = Batch::from_sequences(passages)?;
            let encoded = encoded_tokens(&query, &passage, dedup_sequences)?;
            Ok(Seen { query, passage, encoded })
        };
        let looked_at = STEPS.min((TEXTS / texts) as u64).clamp(1, steps);
        let mut tokens_of_rows = Vec::new();
        let mut mean_encoded = 0.0;
        let mut largest: Option<Seen> = None;
        for i in 0..looked_at {
            let step = (u128::from(i) * u128::from(steps) / u128::from(looked_at)) as u64;
            let seen = look(step)?;
            tokens_of_rows.extend(row_tokens(&seen));
            mean_encoded += seen.encoded as f64 / looked_at as f64;
            if largest.as_ref().is_none_or(|largest| seen.encoded > largest.encoded) {
                largest = Some(seen);
            }
        }
        let largest = match largest {
            Some(largest) => largest,
            None => look(0)?,
        };
        let rows = largest.query.len() as f64;
        let margin = DEVIATIONS * deviation(&tokens_of_rows) * rows.sqrt();
        let wanted = if looked_at < steps { (mean_encoded + margin) as usize } else { 0 };
        let Seen { query, passage, encoded } = largest;
        let (query, passage) = match wanted > encoded {
            true => lengthened(&query, &passage, config, wanted, dedup_sequences)?,
            false => (query, passage),
        };
        Ok(LargestBatch { query, passage, steps, looked_at })
    }

    /// The same with no passage longer than `max_len` tokens.
    ///
    /// # Errors
    /// When `max_len` is 0.
    pub fn with_passages_cut(&self, max_len: usize) -> Result<Self> {
        let cut = self.passage.sequences().map(|passage| &passage[..max_len.min(passage.len())]);
        Ok(LargestBatch { passage: Batch::from_sequences(cut)?, ..self.clone() })
    }
}

fn encoded_tokens(query: &Batch, passage: &Batch, dedup_sequences: bool) -> Result<usize> {
    if !dedup_sequences {
        return Ok(query.tokens() + passage.tokens());
    }
    let both = query.sequences().chain(passage.sequences());
    Ok(Batch::deduplicated(both)?.0.tokens())
}

/// Tokens of each row, its query and its passages.
fn row_tokens(seen: &Seen) -> Vec<f64> {
    let lengths: Vec<usize> = seen.passage.sequences().map(<[u32]>::len).collect();
    let groups = lengths.chunks(lengths.len() / seen.query.len().max(1));
    let rows = seen.query.sequences().zip(groups);
    rows.map(|(query, group)| (query.len() + group.iter().sum::<usize>()) as f64).collect()
}

fn deviation(values: &[f64]) -> f64 {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count).sqrt()
}

/// The batch with its sequences longer in proportion, none beyond its role's length, until `wanted`
/// tokens are encoded or all are as long as they may be.
fn lengthened(
    query: &Batch,
    passage: &Batch,
    config: &TrainConfig,
    wanted: usize,
    dedup_sequences: bool,
) -> Result<(Batch, Batch)> {
    let by = |factor: f64| -> Result<(Batch, Batch)> {
        Ok((
            stretched(query, factor, config.query_max_len)?,
            stretched(passage, factor, config.passage_max_len)?,
        ))
    };
    // At the greatest length of all, every sequence is cut to its role's.
    let (mut short, mut long) = (1.0, config.query_max_len.max(config.passage_max_len) as f64);
    for _ in 0..16 {
        let middle = f64::midpoint(short, long);
        let (query, passage) = by(middle)?;
        match encoded_tokens(&query, &passage, dedup_sequences)? < wanted {
            true => short = middle,
            false => long = middle,
        }
    }
    by(long)
}

/// Equal sequences stay equal: each is filled up with its first id.
fn stretched(batch: &Batch, factor: f64, max_len: usize) -> Result<Batch> {
    Batch::from_sequences(batch.sequences().map(|sequence| {
        let length = ((sequence.len() as f64 * factor) as usize).min(max_len);
        let mut sequence = sequence.to_vec();
        let first = sequence.first().copied().unwrap_or_default();
        sequence.resize(length.max(sequence.len()), first);
        sequence
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(lengths: &[usize]) -> Batch {
        let sequence = |(i, &n): (usize, &usize)| vec![i as u32 % 3 + 1; n];
        Batch::from_sequences(lengths.iter().enumerate().map(sequence)).unwrap()
    }

    #[test]
    fn a_batch_grows_to_what_is_wanted_and_no_further_than_it_may() {
        let config = TrainConfig { query_max_len: 10, passage_max_len: 40, ..TrainConfig::new("") };
        let (query, passage) = (batch(&[4, 9]), batch(&[10, 20, 30, 40]));
        for wanted in [113, 120, 140, 170] {
            let (q, p) = lengthened(&query, &passage, &config, wanted, false).unwrap();
            let tokens = q.tokens() + p.tokens();
            assert!((wanted..wanted + 8).contains(&tokens), "{wanted}: {tokens}");
            assert_eq!((q.len(), p.len()), (2, 4));
        }
        let (q, p) = lengthened(&query, &passage, &config, 100_000, false).unwrap();
        assert_eq!((q.tokens(), p.tokens()), (20, 160));
        // Passages 0 and 3 are one text.
        let twice = Batch::from_sequences([vec![1; 10], vec![2; 20], vec![1; 10]]).unwrap();
        let (q, p) = lengthened(&query, &twice, &config, 60, true).unwrap();
        assert_eq!(p.sequences().next(), p.sequences().nth(2));
        assert!((60..66).contains(&encoded_tokens(&q, &p, true).unwrap()));
    }
}
