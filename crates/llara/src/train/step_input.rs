//! The input of one step on the host, prepared in advance on another thread.

use crate::data::{Batch, Draw, positives};
use crate::loss::{Labels, RowsPerRank, TextKeys};
use crate::model::Dropout;
use crate::storage::Fingerprint;
use crate::{Error, ErrorKind, Result};

/// The part of the batch of one step that one process computes.
#[derive(Debug, Clone, PartialEq)]
pub struct StepInput {
    /// The rows of the dataset; empty if the input is not from a dataset.
    pub rows: Vec<Draw>,
    /// The sequences to encode: queries first, then passages. Equal ones are packed once, unless
    /// dropout makes them different.
    pub batch: Batch,
    /// Index of each sequence of `batch` in the whole step; dropout masks depend on it.
    pub sequence_numbers: Vec<u32>,
    /// Index of each query in `batch`. `[B]`
    pub queries: Vec<u32>,
    /// Index of each passage in `batch`, grouped by query, the positive first. `[B·G]`
    pub passages: Vec<u32>,
    /// For each query, the index of its positive among the passages. `[B]`
    pub positives: Vec<u32>,
    /// How many rows of the step each process has.
    pub rows_per_rank: RowsPerRank,
    /// Tokens of all queries and passages, equal ones counted each time.
    pub tokens: usize,
    /// The dropout state of the adapters; `None`: no dropout.
    pub dropout: Option<Dropout>,
    /// Keys of the texts, if the objective compares texts.
    pub text_keys: Option<TextKeys>,
    /// A teacher's score of each passage, if the objective has one. `[B·G]`
    pub teacher_scores: Option<Vec<f32>>,
}

impl StepInput {
    /// Packs the token ids of queries and of their passages, grouped by query. With `deduplicate` and without
    /// dropout, equal sequences are packed once.
    ///
    /// # Errors
    /// When the passages are not a positive multiple of the queries, or a sequence is empty.
    pub fn new<Q, P>(
        queries: Q,
        passages: P,
        deduplicate: bool,
        dropout: Option<Dropout>,
    ) -> Result<Self>
    where
        Q: IntoIterator<Item: AsRef<[u32]>>,
        P: IntoIterator<Item: AsRef<[u32]>>,
    {
        let queries: Vec<_> = queries.into_iter().collect();
        let passages: Vec<_> = passages.into_iter().collect();
        positives(queries.len(), passages.len())?;
        let rows = RowsPerRank::one(queries.len(), passages.len() / queries.len());
        Self::share(&queries, &passages, (rows, 0), deduplicate, dropout)
    }

    /// [`StepInput::new`] for the part of process `rank` in a step whose rows are divided by `rows`; it may
    /// be empty. The global batch has the queries of all processes, then all passages, and its sequences
    /// are numbered in that order.
    ///
    /// # Errors
    /// If the numbers of queries and passages differ from those of `rows`, or a sequence is empty.
    pub fn share<S: AsRef<[u32]>, T: AsRef<[u32]>>(
        queries: &[S],
        passages: &[T],
        (rows_per_rank, rank): (RowsPerRank, usize),
        deduplicate: bool,
        dropout: Option<Dropout>,
    ) -> Result<Self> {
        let count = rows_per_rank.queries[rank];
        let group_size = rows_per_rank.group_size;
        if (queries.len(), passages.len()) != (count, count * group_size) {
            return Err(Error::new(ErrorKind::Argument, "wrong number of texts for this process")
                .expected(format!("{count} queries and {} passages", count * group_size))
                .got(format!("{} and {}", queries.len(), passages.len())));
        }
        let first = rows_per_rank.before(rank) as u32;
        let first_passage = rows_per_rank.total() as u32 + first * group_size as u32;
        let all = || queries.iter().map(AsRef::as_ref).chain(passages.iter().map(AsRef::as_ref));
        let tokens = all().map(<[u32]>::len).sum();
        let (batch, mut places) = match deduplicate && dropout.is_none() {
            true => Batch::deduplicated(all())?,
            false => {
                let batch = Batch::from_sequences(all())?;
                let places = (0..batch.len() as u32).collect();
                (batch, places)
            }
        };
        let passages = places.split_off(queries.len());
        let numbers = (first..)
            .take(queries.len())
            .chain((first_passage..).take(passages.len()))
            .take(batch.len());
        Ok(StepInput {
            rows: Vec::new(),
            sequence_numbers: numbers.collect(),
            batch,
            queries: places,
            passages,
            positives: (0..count).map(|query| (query * group_size) as u32).collect(),
            rows_per_rank,
            tokens,
            dropout,
            text_keys: None,
            teacher_scores: None,
        })
    }

    /// Adds the keys of the texts. `positives` are the token ids of all positives of each row.
    ///
    /// # Panics
    /// If there are not as many lists of positives as queries.
    #[must_use]
    pub fn with_text_keys(mut self, positives: &[Vec<Vec<u32>>]) -> Self {
        assert_eq!(positives.len(), self.queries.len(), "lists of positives");
        let keys: Vec<u64> = self.batch.sequences().map(text_key).collect();
        let of = |places: &[u32]| places.iter().map(|&place| keys[place as usize]).collect();
        self.text_keys = Some(TextKeys {
            queries: of(&self.queries),
            passages: of(&self.passages),
            positives: positives
                .iter()
                .map(|row| row.iter().map(|ids| text_key(ids)).collect())
                .collect(),
        });
        self
    }

    /// What the objective is told about the rows.
    pub fn labels(&self) -> Labels<'_> {
        Labels {
            positives: &self.positives,
            text_keys: self.text_keys.as_ref(),
            teacher_scores: self.teacher_scores.as_deref(),
        }
    }

    /// [`StepInput::new`] from two packed batches.
    ///
    /// # Errors
    /// As for [`StepInput::new`].
    pub fn from_batches(
        query: &Batch,
        passage: &Batch,
        deduplicate: bool,
        dropout: Option<Dropout>,
    ) -> Result<Self> {
        Self::new(query.sequences(), passage.sequences(), deduplicate, dropout)
    }
}

/// The key of a text, the same in every process.
fn text_key(ids: &[u32]) -> u64 {
    let mut key = Fingerprint::new();
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    key.add(&bytes);
    key.short()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sequences_are_packed_once_unless_dropout_makes_them_different() {
        let (queries, passages) =
            ([vec![1u32, 2], vec![3]], [vec![3u32], vec![4, 5], vec![1, 2], vec![6]]);
        let input = StepInput::new(&queries, &passages, true, None).unwrap();
        assert_eq!(
            input.batch,
            Batch::from_sequences([vec![1, 2], vec![3], vec![4, 5], vec![6]]).unwrap()
        );
        assert_eq!((&input.queries[..], &input.passages[..]), (&[0, 1][..], &[1, 2, 0, 3][..]));
        assert_eq!((&input.positives[..], input.tokens), (&[0, 2][..], 9));
        let dropout = Some(Dropout { seed: 1, step: 2 });
        let input = StepInput::new(&queries, &passages, true, dropout).unwrap();
        assert_eq!((input.batch.len(), &input.passages[..]), (6, &[2, 3, 4, 5][..]));
        assert_eq!(input.sequence_numbers, [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn groups_of_different_sizes_are_refused() {
        for (queries, passages) in [(2, 3), (0, 0), (0, 4), (2, 0)] {
            let sequences = |n: usize| vec![vec![1u32]; n];
            let result = StepInput::new(sequences(queries), sequences(passages), true, None);
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Argument);
        }
    }
}
