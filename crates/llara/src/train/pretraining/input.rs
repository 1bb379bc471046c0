//! The input of one step of pretraining on the host.

use super::sequences::{SetObjective, TrainingSequence};
use crate::Result;
use crate::data::{Batch, BatchView, Draw};
use crate::loss::RowsPerRank;
use crate::model::Dropout;
use crate::train::task::TaskInput;

/// The part of the batch of one step that one process computes.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainingInput {
    /// The rows of the dataset; empty if the input is not from a dataset.
    pub(super) rows: Vec<Draw>,
    /// The sequences, packed.
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
    /// Position of the first token that is predicted from the one before it.
    pub(super) first_label: u32,
    /// Number of these tokens.
    pub(super) labels: u32,
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
    /// # Errors
    /// A sequence is empty, or there are too many tokens.
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
    pub fn share(
        rows: &[Vec<TrainingSequence>],
        (rows_per_rank, rank): (&RowsPerRank, usize),
        bag_rows: usize,
        dropout: Option<Dropout>,
    ) -> Result<Self> {
        let batch = Batch::from_sequences(rows.iter().flatten().map(|sequence| &sequence.ids))?;
        let targets = rows.iter().flatten().map(|sequence| SequenceTargets {
            first_label: sequence.labels.start as u32,
            labels: sequence.labels.len() as u32,
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
            counts.labels += f64::from(targets.labels);
            if !targets.set.is_empty() {
                counts.sets[targets.objective as usize] += 1.0;
            }
        }
        counts
    }
}

impl SequenceTargets {
    /// Number of last positions of a sequence of `length` tokens whose hidden states are needed.
    pub(super) fn output_rows(&self, length: usize, bag_rows: usize) -> usize {
        match self.labels {
            0 => bag_rows.min(length),
            _ => length + 1 - self.first_label as usize,
        }
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
        for (bounds, targets) in batch.bounds().zip(targets) {
            let ids = &batch.ids()[bounds.start as usize..bounds.end as usize];
            let rows = targets.output_rows(ids.len(), bag_rows);
            let labels = (targets.first_label as usize..).take(targets.labels as usize);
            chunk.labels.0.extend((end as u32..).take(labels.clone().count()));
            chunk.labels.1.extend(labels.map(|position| ids[position]));
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
