//! The input of one step of pretraining on the host.

use std::ops::Range;

use super::sequences::{SetObjective, TrainingSequence};
use crate::data::{Batch, BatchView, Draw};
use crate::loss::RowsPerRank;
use crate::model::Dropout;
use crate::train::task::TaskInput;
use crate::{Error, ErrorKind, Result};

/// The part of the batch of one step that one process computes.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainingInput {
    /// The rows of the dataset; empty if the input is not from a dataset.
    pub(super) rows: Vec<Draw>,
    /// The sequences, packed. Tokens that all sequences of a row start with are encoded once.
    pub(super) batch: Batch,
    /// What each sequence has to predict. `[S]`
    pub(super) targets: Vec<SequenceTargets>,
    /// Index of each sequence in the whole step; dropout masks depend on it. `[S]`
    pub(super) sequence_numbers: Vec<u32>,
    pub(super) dropout: Option<Dropout>,
    pub(super) bag_rows: usize,
}

/// What a sequence has to predict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SequenceTargets {
    /// Positions of the tokens that are predicted from those before them.
    pub(super) labels: Range<usize>,
    pub(super) objective: SetObjective,
    /// Distinct ids, ascending.
    pub(super) set: Vec<u32>,
}

/// Numbers of targets of one process, or of all.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct TargetCounts {
    /// Tokens that are predicted from the one before them.
    pub(super) labels: f64,
    /// Sequences with a set to predict, by objective: EBAE, EBAR.
    pub(super) sets: [f64; 2],
}

impl PretrainingInput {
    /// Packs the sequences of each row; a row may have none. `bag_rows` is the number of pooled tokens of a
    /// sequence.
    ///
    /// The second sequence of a row branches off the first: the tokens that both start with are encoded once, as far
    /// as their hidden states predict nothing in the second one.
    ///
    /// # Errors
    /// A sequence is empty or has labels beyond its ids, a row has more than two sequences or two of one objective,
    /// or there are too many tokens.
    pub fn new(
        rows: &[Vec<TrainingSequence>],
        bag_rows: usize,
        dropout: Option<Dropout>,
    ) -> Result<Self> {
        Self::share(rows, (&RowsPerRank::one(rows.len(), 1), 0), bag_rows, dropout)
    }

    /// [`new`](Self::new) for the part of process `rank` in a step whose rows are divided by `rows_per_rank`.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub(in crate::train) fn share(
        rows: &[Vec<TrainingSequence>],
        (rows_per_rank, rank): (&RowsPerRank, usize),
        bag_rows: usize,
        dropout: Option<Dropout>,
    ) -> Result<Self> {
        (0..).zip(rows).try_for_each(|(row, sequences)| check(row, sequences, bag_rows))?;
        let branches = rows.iter().flat_map(|sequences| {
            sequences.iter().enumerate().map(move |(at, sequence)| {
                let shared = match at {
                    0 => 0,
                    _ => shared_tokens(&sequences[0], sequence, bag_rows),
                };
                (&sequence.ids[shared..], shared)
            })
        });
        let batch = Batch::from_branches(branches)?;
        let targets = rows.iter().flatten().map(|sequence| SequenceTargets {
            labels: sequence.labels.clone(),
            objective: sequence.objective,
            set: sequence.targets.clone(),
        });
        let first = rows_per_rank.before(rank) as u32;
        let numbers = (first..).zip(rows).flat_map(|(row, sequences)| {
            sequences.iter().map(move |sequence| 2 * row + sequence.objective as u32)
        });
        Ok(PretrainingInput {
            rows: Vec::new(),
            batch,
            targets: targets.collect(),
            sequence_numbers: numbers.collect(),
            dropout,
            bag_rows,
        })
    }

    /// The packed sequences.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    pub(super) fn counts(&self) -> TargetCounts {
        let mut counts = TargetCounts::default();
        for targets in &self.targets {
            counts.labels += targets.labels.len() as f64;
            if !targets.set.is_empty() {
                counts.sets[targets.objective as usize] += 1.0;
            }
        }
        counts
    }
}

/// Checks the sequences of a row.
fn check(row: usize, sequences: &[TrainingSequence], bag_rows: usize) -> Result<()> {
    let bad = |what: &str| Error::new(ErrorKind::Argument, format!("row {row}: {what}"));
    if let [first, others @ ..] = sequences
        && others.iter().any(|other| others.len() > 1 || other.objective == first.objective)
    {
        return Err(bad("too many sequences").expected("one of each objective at most").got(
            sequences.iter().map(|s| format!("{:?}", s.objective)).collect::<Vec<_>>().join(", "),
        ));
    }
    for TrainingSequence { ids, labels, targets, .. } in sequences {
        let rows = output_rows(ids.len(), labels, bag_rows);
        if !labels.is_empty() && (labels.start == 0 || labels.end > ids.len()) {
            return Err(bad("labels beyond the sequence")
                .expected(format!("positions from 1 to {}", ids.len().saturating_sub(1)))
                .got(format!("{labels:?}")));
        }
        if !targets.is_empty() && (bag_rows == 0 || bag_rows > rows) {
            return Err(bad("a sequence without room for the pooled tokens")
                .expected(format!("at least {} tokens, labels before them", bag_rows.max(1)))
                .got(format!("{} tokens, labels {labels:?}, {bag_rows} pooled", ids.len())));
        }
    }
    Ok(())
}

/// Number of tokens that the second sequence of a row shares with the first. At least one token is its own, and so are
/// those whose hidden states predict something.
fn shared_tokens(first: &TrainingSequence, second: &TrainingSequence, bag_rows: usize) -> usize {
    let length = second.ids.len();
    let own = output_rows(length, &second.labels, bag_rows).max(1);
    let equal = first.ids.iter().zip(&second.ids).take_while(|(a, b)| a == b).count();
    equal.min(length.saturating_sub(own))
}

/// Number of last positions of a sequence of `length` tokens whose hidden states are needed.
fn output_rows(length: usize, labels: &Range<usize>, bag_rows: usize) -> usize {
    match labels.is_empty() {
        true => bag_rows.min(length),
        false => length + 1 - labels.start,
    }
}

/// Rows of the decoder's output in one chunk, and what they predict.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct ChunkTargets {
    /// Number of last positions of each sequence in the output. `[S]`
    pub(super) output_rows: Vec<usize>,
    /// Rows of the output that predict one token each, and these tokens.
    pub(super) labels: (Vec<u32>, Vec<u32>),
    /// By objective: the rows of each bag, and its set.
    pub(super) bags: [Vec<(Vec<u32>, Vec<u32>)>; 2],
}

impl ChunkTargets {
    pub(super) fn new(batch: BatchView<'_>, targets: &[SequenceTargets], bag_rows: usize) -> Self {
        let mut chunk = ChunkTargets::default();
        let mut end = 0;
        let sequences = batch.bounds().zip(batch.shared());
        for ((bounds, &shared), targets) in sequences.zip(targets) {
            let own = &batch.ids()[bounds.start as usize..bounds.end as usize];
            let shared = shared as usize;
            let rows = output_rows(shared + own.len(), &targets.labels, bag_rows);
            let labels = targets.labels.clone();
            chunk.labels.0.extend((end as u32..).take(labels.len()));
            chunk.labels.1.extend(labels.map(|position| own[position - shared]));
            end += rows;
            if !targets.set.is_empty() {
                let bag = (end - bag_rows.min(rows)) as u32..end as u32;
                let bags = &mut chunk.bags[targets.objective as usize];
                bags.push((bag.collect(), targets.set.clone()));
            }
            chunk.output_rows.push(rows);
        }
        chunk
    }
}

impl TaskInput for PretrainingInput {
    fn rows(&self) -> &[Draw] {
        &self.rows
    }

    fn tokens(&self) -> u64 {
        self.batch.tokens() as u64
    }

    /// A process's loss is its part of the global one.
    fn loss_weight(&self, _rank: usize) -> f64 {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_the_output_predict_the_right_tokens() {
        let sequence = |ids: &[u32], labels, objective, targets: &[u32]| TrainingSequence {
            ids: ids.to_vec(),
            labels,
            objective,
            targets: targets.to_vec(),
        };
        let (encode, regress) = (SetObjective::AutoEncode, SetObjective::AutoRegress);
        let rows = [
            vec![
                sequence(&[1, 2, 30, 31, 8, 9], 2..4, encode, &[30, 31]),
                sequence(&[1, 2, 30, 31, 6, 7], 0..0, regress, &[40]),
            ],
            Vec::new(),
            vec![sequence(&[1, 2, 50, 8, 9], 2..3, encode, &[])],
        ];
        let input = PretrainingInput::new(&rows, 2, None).unwrap();
        // The second sequence has its two pooled tokens only.
        assert_eq!(input.batch.ids(), [1, 2, 30, 31, 8, 9, 6, 7, 1, 2, 50, 8, 9]);
        assert_eq!(input.batch.shared(), [0, 4, 0]);
        assert_eq!(input.sequence_numbers, [0, 1, 4]);
        assert_eq!(input.counts(), TargetCounts { labels: 3.0, sets: [1.0, 1.0] });
        let chunk = ChunkTargets::new(input.batch.view(), &input.targets, 2);
        assert_eq!(
            chunk,
            ChunkTargets {
                // Positions 1..6, 4..6 and 1..5.
                output_rows: vec![5, 2, 4],
                labels: (vec![0, 1, 7], vec![30, 31, 50]),
                bags: [vec![(vec![3, 4], vec![30, 31])], vec![(vec![5, 6], vec![40])]],
            }
        );
    }
}
