//! Lengths in tokens, of a random sample of rows.

use std::collections::BinaryHeap;

use rayon::prelude::*;

use super::example::{Example, Found, Subject};
use super::minhash::mix;
use super::progress::{Phase, Progress};
use super::record::{Place, Side};
use super::settings::Settings;
use super::sources::Rows;
use crate::data::{Lengths, TrainingRow};
use crate::text::{PromptEncoder, Role};
use crate::{Error, Result};

/// Number of rows that are tokenized between two reports of progress.
const BLOCK_ROWS: usize = 128;

/// A uniform sample of rows, drawn while they are read. It is the same in every run.
#[derive(Debug)]
pub(super) struct RowSample {
    capacity: usize,
    /// The rows with the smallest pseudo-random numbers, the largest of them on top.
    rows: BinaryHeap<(u64, Place)>,
    /// Number of rows so far.
    seen: u64,
}

impl RowSample {
    pub(super) fn new(capacity: usize) -> Self {
        RowSample { capacity, rows: BinaryHeap::new(), seen: 0 }
    }

    pub(super) fn add(&mut self, place: Place) {
        self.seen += 1;
        let number = mix(self.seen);
        if self.rows.len() < self.capacity {
            self.rows.push((number, place));
        } else if let Some(mut largest) = self.rows.peek_mut()
            && number < largest.0
        {
            *largest = (number, place);
        }
    }

    /// The rows in the order of the data.
    pub(super) fn places(self) -> Vec<Place> {
        let mut places: Vec<Place> = self.rows.into_iter().map(|(_, place)| place).collect();
        places.sort_unstable();
        places
    }
}

/// Lengths in tokens, template included, and the texts that are longer than the maximum lengths.
#[derive(Default)]
pub(super) struct TokenCounts {
    pub(super) query: Lengths,
    pub(super) passage: Lengths,
    pub(super) truncated_queries: Found,
    pub(super) truncated_passages: Found,
}

impl TokenCounts {
    /// Tokenizes the rows at `places`.
    ///
    /// # Errors
    /// A row cannot be read or tokenized.
    pub(super) fn new(
        places: &[Place],
        rows: &impl Rows,
        prompts: &PromptEncoder,
        settings: &Settings,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Self> {
        let mut counts = TokenCounts::default();
        let total = places.len() as u64;
        for (block, first) in places.chunks(BLOCK_ROWS).zip((0..).step_by(BLOCK_ROWS)) {
            progress(Progress { phase: Phase::Tokenizing, done: first, total });
            let lengths: Vec<Result<Vec<(Subject, usize)>>> = block
                .par_iter()
                .map(|&place| {
                    let lengths = row_lengths(&rows.row(place)?, prompts, settings);
                    lengths.map_err(|e| locate(e, place, rows))
                })
                .collect();
            for (&place, lengths) in block.iter().zip(lengths) {
                lengths?.into_iter().for_each(|(subject, len)| {
                    counts.add(place, subject, len, settings);
                });
            }
        }
        progress(Progress { phase: Phase::Tokenizing, done: total, total });
        Ok(counts)
    }

    fn add(&mut self, place: Place, subject: Subject, len: usize, settings: &Settings) {
        let (lengths, truncated, max_len) = match subject {
            Subject::Query => {
                (&mut self.query, &mut self.truncated_queries, settings.query_max_len)
            }
            _ => (&mut self.passage, &mut self.truncated_passages, settings.passage_max_len),
        };
        lengths.add(len);
        if len > max_len {
            truncated.add(Example::new(place, subject).detail(format!("{len} tokens")));
        }
    }
}

fn row_lengths(
    row: &TrainingRow,
    prompts: &PromptEncoder,
    settings: &Settings,
) -> Result<Vec<(Subject, usize)>> {
    let len = |role, instruction: &str, text: &str| -> Result<usize> {
        Ok(prompts.encode(role, &format!("{instruction}{text}"), usize::MAX)?.len())
    };
    let instruction = row.prompt.as_deref().unwrap_or(&settings.query_instruction);
    let of_file = row.passage_instruction.as_deref();
    let passage_instruction = of_file.unwrap_or(&settings.passage_instruction);
    let mut lengths = vec![(Subject::Query, len(Role::Query, instruction, &row.query)?)];
    for (side, texts) in [(Side::Pos, &row.pos), (Side::Neg, &row.neg)] {
        for (i, text) in texts.iter().enumerate() {
            let len = len(Role::Passage, passage_instruction, text)?;
            lengths.push((Subject::Passage(side, i), len));
        }
    }
    Ok(lengths)
}

fn locate(error: Error, place: Place, rows: &impl Rows) -> Error {
    match rows.location(place) {
        Ok((path, line)) => error.line(path, line),
        Err(_) => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_sampled_with_the_same_probability() {
        let mut sample = RowSample::new(1000);
        (0..10_000).for_each(|place| sample.add(place));
        let places = sample.places();
        assert_eq!(places.len(), 1000);
        assert!(places.is_sorted());
        for tenth in 0..10 {
            let count = places.iter().filter(|&&place| place / 1000 == tenth).count();
            // The standard deviation is 9.
            assert!((64..136).contains(&count), "{count}");
        }
        let mut few = RowSample::new(5);
        (0..3).for_each(|place| few.add(place));
        assert_eq!(few.places(), [0, 1, 2]);
    }
}
