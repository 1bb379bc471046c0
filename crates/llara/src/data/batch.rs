//! Packed batches: the token ids of all sequences are concatenated, without padding.

use std::collections::hash_map::Entry;
use std::ops::Range;

use ndarray::ArrayView2;

use crate::{Error, ErrorKind, Result};

/// Packed sequences. Sequence `s` is `ids[offsets[s]..offsets[s + 1]]`. No sequence is empty; the batch
/// may have no sequences.
///
/// A sequence may branch off an earlier one: the tokens that it shares with the start of that one are encoded once, and
/// it has only those that follow them ([`from_branches`](Batch::from_branches)).
///
/// ```
/// # use llara::data::Batch;
/// let batch = Batch::from_sequences([vec![5, 6, 7], vec![8]])?;
/// assert_eq!((batch.ids(), batch.offsets()), ([5, 6, 7, 8].as_slice(), [0, 3, 4].as_slice()));
/// assert_eq!(batch.positions(), [0, 1, 2, 0]);
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Token ids, `[tokens]`.
    ids: Vec<u32>,
    /// Boundaries of the sequences, `[sequences + 1]`; the first is 0, the last `tokens`.
    offsets: Vec<u32>,
    /// Number of tokens that each sequence shares with the last sequence before it that shares none. `[sequences]`
    shared: Vec<u32>,
}

impl Batch {
    fn without_sequences() -> Batch {
        Batch { ids: Vec::new(), offsets: vec![0], shared: Vec::new() }
    }

    /// Concatenates sequences.
    ///
    /// # Errors
    /// A sequence is empty, or there are more than `u32::MAX` tokens.
    pub fn from_sequences(sequences: impl IntoIterator<Item: AsRef<[u32]>>) -> Result<Batch> {
        let mut batch = Batch::without_sequences();
        for sequence in sequences {
            batch.ids.extend_from_slice(sequence.as_ref());
            batch.close_sequence(0)?;
        }
        Ok(batch)
    }

    /// Concatenates sequences that may share tokens. `(ids, shared)` is a sequence of `shared + ids.len()` tokens: the
    /// first `shared` tokens of the last sequence before it that shares none, and `ids`.
    ///
    /// ```
    /// # use llara::data::Batch;
    /// // The sequences 5 6 7 8 and 5 6 9.
    /// let batch = Batch::from_branches([(vec![5, 6, 7, 8], 0), (vec![9], 2)])?;
    /// assert_eq!((batch.tokens(), batch.longest()), (5, 4));
    /// assert_eq!(batch.positions(), [0, 1, 2, 3, 2]);
    /// # Ok::<(), llara::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`from_sequences`](Self::from_sequences), or a sequence shares more tokens than the earlier one has.
    pub fn from_branches(
        sequences: impl IntoIterator<Item = (impl AsRef<[u32]>, usize)>,
    ) -> Result<Batch> {
        let mut batch = Batch::without_sequences();
        let mut root = 0;
        for (ids, shared) in sequences {
            let ids = ids.as_ref();
            if shared > root {
                let what = format!("sequence {} shares too many tokens", batch.len());
                return Err(Error::new(ErrorKind::Argument, what)
                    .expected(format!("at most {root}, the length of the one it branches off"))
                    .got(shared));
            }
            if shared == 0 {
                root = ids.len();
            }
            batch.ids.extend_from_slice(ids);
            batch.close_sequence(shared as u32)?;
        }
        Ok(batch)
    }

    /// Packs a padded batch: takes the ids at which the mask is 1. Both arrays have the shape
    /// `(sequences, length)`. The padding may be on either side, or on both; the ids there are ignored.
    ///
    /// # Errors
    /// The shapes differ; a row has no token whose mask is 1, padding between such tokens, a mask value
    /// other than 0 and 1, or an id that is negative or exceeds `u32::MAX`.
    pub fn from_padded(
        input_ids: ArrayView2<i64>,
        attention_mask: ArrayView2<i64>,
    ) -> Result<Batch> {
        if input_ids.dim() != attention_mask.dim() {
            return Err(Error::new(
                ErrorKind::Argument,
                "`attention_mask` and `input_ids` differ in shape",
            )
            .expected(format!("shape {:?}", input_ids.dim()))
            .got(format!("{:?}", attention_mask.dim())));
        }
        let mut batch = Batch::without_sequences();
        for (row, (ids, mask)) in
            input_ids.rows().into_iter().zip(attention_mask.rows()).enumerate()
        {
            let bad = |what: String| Error::new(ErrorKind::Argument, format!("row {row}: {what}"));
            let mut last_real = None;
            for (column, (&id, &real)) in ids.iter().zip(mask).enumerate() {
                match real {
                    0 => continue,
                    1 => {}
                    other => {
                        return Err(
                            bad(format!("attention_mask[{column}] is {other}")).expected("0 or 1")
                        );
                    }
                }
                if last_real.is_some_and(|last| last + 1 != column) {
                    return Err(bad(format!("padding in the middle, before column {column}"))
                        .expected("padding on the left, on the right or on both sides"));
                }
                last_real = Some(column);
                batch.ids.push(u32::try_from(id).map_err(|_| {
                    bad(format!("input_ids[{column}] is not a token id"))
                        .expected("0 to 2³² − 1")
                        .got(id)
                })?);
            }
            if last_real.is_none() {
                return Err(bad("no token: all values of its attention mask are 0".into()));
            }
            batch.close_sequence(0)?;
        }
        Ok(batch)
    }

    /// The ids of each sequence, in order; without those that it shares.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = &[u32]> {
        self.offsets.windows(2).map(|w| &self.ids[w[0] as usize..w[1] as usize])
    }

    /// The number of sequences.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of tokens in all sequences.
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// All token ids, `[tokens]`.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Boundaries of the sequences, `[sequences + 1]`.
    pub fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// The position of each token in its sequence, from 0, `[tokens]`.
    pub fn positions(&self) -> Vec<u32> {
        let sequences = self.offsets.windows(2).zip(&self.shared);
        sequences.flat_map(|(w, &shared)| shared..shared + w[1] - w[0]).collect()
    }

    /// The length of the longest sequence in tokens, with those that it shares; 0 if there is none.
    pub fn longest(&self) -> usize {
        self.view().longest()
    }

    /// The number of tokens that each sequence shares with the last sequence before it that shares none. `[sequences]`
    pub fn shared(&self) -> &[u32] {
        &self.shared
    }

    /// Ranges of sequences that [`slice`](Self::slice) must not separate: each sequence with those that branch off it.
    pub fn trees(&self) -> impl Iterator<Item = Range<usize>> {
        let mut start = 0;
        self.shared.chunk_by(|_, &shared| shared > 0).map(move |tree| {
            let first = start;
            start += tree.len();
            first..start
        })
    }

    /// The highest token id; `None` if there is no sequence.
    pub fn max_id(&self) -> Option<u32> {
        self.ids.iter().copied().max()
    }

    /// Packs each distinct sequence once, in the order of first occurrence. Returns the batch and, for each
    /// input sequence, its index in the batch.
    ///
    /// # Errors
    /// As for [`Batch::from_sequences`].
    pub fn deduplicated<'s>(
        sequences: impl IntoIterator<Item = &'s [u32]>,
    ) -> Result<(Batch, Vec<u32>)> {
        let mut seen = std::collections::HashMap::new();
        let mut batch = Batch::without_sequences();
        let mut indices = Vec::new();
        for sequence in sequences {
            let index = match seen.entry(sequence) {
                Entry::Occupied(index) => *index.get(),
                Entry::Vacant(index) => {
                    batch.ids.extend_from_slice(sequence);
                    batch.close_sequence(0)?;
                    *index.insert(batch.len() as u32 - 1)
                }
            };
            indices.push(index);
        }
        Ok((batch, indices))
    }

    /// All sequences, without a copy.
    pub fn view(&self) -> BatchView<'_> {
        BatchView { ids: &self.ids, offsets: &self.offsets, shared: &self.shared }
    }

    /// A range of sequences, without a copy.
    ///
    /// # Panics
    /// If the range ends after [`Batch::len`] or before its start, or its first sequence branches off one before it.
    pub fn slice(&self, sequences: Range<usize>) -> BatchView<'_> {
        let offsets = &self.offsets[sequences.start..=sequences.end];
        let (first, last) = (offsets[0], offsets[offsets.len() - 1]);
        let shared = &self.shared[sequences];
        assert!(shared.first().is_none_or(|&shared| shared == 0), "a branch without its root");
        BatchView { ids: &self.ids[first as usize..last as usize], offsets, shared }
    }

    /// Ends a sequence that consists of `shared` earlier tokens and of the ids since the last offset.
    fn close_sequence(&mut self, shared: u32) -> Result<()> {
        let sequence = self.len();
        let end = u32::try_from(self.ids.len()).map_err(|_| {
            Error::new(ErrorKind::Argument, "a batch has too many tokens")
                .expected(format!("at most {}", u32::MAX))
                .got(format!("{} in the first {} sequences", self.ids.len(), sequence + 1))
                .hint("use smaller batches")
        })?;
        if self.offsets.last() == Some(&end) {
            return Err(Error::new(ErrorKind::Argument, format!("sequence {sequence} is empty"))
                .expected("at least one token"));
        }
        self.offsets.push(end);
        self.shared.push(shared);
        Ok(())
    }
}

/// The index of each query's positive, the first of its group of passages.
///
/// # Errors
/// There is no query, or the number of passages is not a multiple of the number of queries.
pub(crate) fn positives(queries: usize, passages: usize) -> Result<Vec<u32>> {
    if queries == 0 || passages == 0 || !passages.is_multiple_of(queries) {
        return Err(Error::new(ErrorKind::Argument, "passages cannot be grouped by query")
            .expected("the same number of passages for every query, at least one")
            .got(format!("{queries} queries and {passages} passages")));
    }
    let group = passages / queries;
    Ok((0..queries).map(|query| (query * group) as u32).collect())
}

/// A view of consecutive sequences of a [`Batch`].
#[derive(Debug, Clone, Copy)]
pub struct BatchView<'b> {
    /// Token ids of these sequences, `[tokens]`.
    ids: &'b [u32],
    /// Boundaries in the ids of the batch, `[sequences + 1]`.
    offsets: &'b [u32],
    /// See [`Batch::shared`]. `[sequences]`
    shared: &'b [u32],
}

impl<'b> BatchView<'b> {
    /// All token ids, `[tokens]`.
    pub fn ids(&self) -> &'b [u32] {
        self.ids
    }

    /// The number of sequences.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The number of tokens that each sequence shares; see [`Batch::shared`]. `[sequences]`
    pub fn shared(&self) -> &'b [u32] {
        self.shared
    }

    /// The range of each sequence in [`ids`](Self::ids), without the tokens that it shares.
    pub fn bounds(&self) -> impl Iterator<Item = Range<u32>> {
        let first = self.offsets[0];
        self.offsets.windows(2).map(move |w| w[0] - first..w[1] - first)
    }

    /// The length of the longest sequence in tokens, with those that it shares; 0 if there is none.
    pub fn longest(&self) -> usize {
        let sequences = self.offsets.windows(2).zip(self.shared);
        sequences.map(|(w, shared)| (shared + w[1] - w[0]) as usize).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array2, array};
    use proptest::prelude::*;

    #[test]
    fn padding_on_any_side_is_removed() {
        let ids = array![[9i64, 9, 1, 2], [3, 9, 9, -100], [-1, 4, 5, 9], [6, 7, 8, 0]];
        let mask = array![[0i64, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]];
        let batch = Batch::from_padded(ids.view(), mask.view()).unwrap();
        let rows: Vec<&[u32]> = batch.sequences().collect();
        assert_eq!(rows, [&[1, 2][..], &[3], &[4, 5], &[6, 7, 8, 0]]);
        assert_eq!((batch.len(), batch.tokens(), batch.longest()), (4, 9, 4));
        assert_eq!(batch.max_id(), Some(8));
    }

    #[test]
    fn bad_rows_are_named() {
        let ids = array![[1i64, 2, 3], [4, 5, 6]];
        let refuse = |ids: &Array2<i64>, mask: Array2<i64>| {
            let e = Batch::from_padded(ids.view(), mask.view()).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Argument);
            e.to_string()
        };
        assert!(
            refuse(&ids, array![[1, 1, 1], [1, 0, 1]]).contains("row 1: padding in the middle")
        );
        assert!(refuse(&ids, array![[0, 0, 0], [1, 1, 1]]).contains("row 0: no token"));
        assert!(refuse(&ids, array![[1, 2, 1], [1, 1, 1]]).contains("attention_mask[1] is 2"));
        assert!(refuse(&ids, array![[1, -1, 1], [1, 1, 1]]).contains("attention_mask[1] is -1"));
        assert!(refuse(&ids, array![[1, 1], [1, 1]]).contains("shape (2, 3)"));
        let negative = array![[1i64, 2, 3], [4, 5, -6]];
        assert!(refuse(&negative, array![[1, 1, 1], [1, 1, 1]]).contains("row 1: input_ids[2]"));
        let large = array![[1i64 << 32]];
        assert!(refuse(&large, array![[1]]).contains("input_ids[0]"));
        assert!(refuse(&Array2::zeros((2, 0)), Array2::zeros((2, 0))).contains("row 0"));
        assert!(
            Batch::from_sequences([vec![1], vec![]])
                .unwrap_err()
                .to_string()
                .contains("1 is empty")
        );
    }

    #[test]
    fn no_sequences_are_an_empty_batch() {
        let none = Batch::from_sequences(Vec::<Vec<u32>>::new()).unwrap();
        assert!(none.is_empty() && none.offsets() == [0] && none.positions().is_empty());
        assert_eq!((none.longest(), none.max_id()), (0, None));
        let padded = Array2::zeros((0, 5));
        assert_eq!(Batch::from_padded(padded.view(), padded.view()).unwrap(), none);
    }

    proptest! {
        #[test]
        fn packing_keeps_every_sequence(
            sequences in prop::collection::vec(prop::collection::vec(any::<u32>(), 1..9), 0..9),
            cut in (0usize..9, 0usize..9),
        ) {
            let batch = Batch::from_sequences(&sequences).unwrap();
            prop_assert!(batch.sequences().eq(sequences.iter().map(Vec::as_slice)));
            let positions: Vec<u32> = sequences.iter().flat_map(|s| 0..s.len() as u32).collect();
            prop_assert_eq!(batch.positions(), positions);
            let end = cut.0.max(cut.1).min(batch.len());
            let start = cut.0.min(cut.1).min(end);
            let expected = Batch::from_sequences(&sequences[start..end]).unwrap();
            let view = batch.slice(start..end);
            prop_assert_eq!(view.ids(), expected.ids());
            let ends: Vec<u32> = view.bounds().map(|bounds| bounds.end).collect();
            prop_assert_eq!(&ends, &expected.offsets()[1..]);
            prop_assert_eq!((view.len(), view.longest()), (expected.len(), expected.longest()));
        }

        #[test]
        fn padded_and_packed_agree(
            rows in prop::collection::vec((0usize..4, prop::collection::vec(any::<u32>(), 1..9)), 1..9),
        ) {
            let width = rows.iter().map(|(left, ids)| left + ids.len()).max().unwrap();
            let mut ids = Array2::from_elem((rows.len(), width), -7i64);
            let mut mask = Array2::zeros((rows.len(), width));
            for (r, (left, sequence)) in rows.iter().enumerate() {
                for (c, &id) in sequence.iter().enumerate() {
                    ids[[r, left + c]] = i64::from(id);
                    mask[[r, left + c]] = 1;
                }
            }
            let packed = Batch::from_sequences(rows.iter().map(|(_, ids)| ids)).unwrap();
            prop_assert_eq!(Batch::from_padded(ids.view(), mask.view()).unwrap(), packed);
        }
    }

    #[test]
    fn branches_have_their_own_tokens_only() {
        let batch = Batch::from_branches([
            (vec![1, 2, 3, 4], 0),
            (vec![5, 6], 3),
            (vec![7], 1),
            (vec![8, 9], 0),
            (vec![10, 11, 12], 2),
        ])
        .unwrap();
        assert_eq!((batch.len(), batch.tokens(), batch.longest()), (5, 12, 5));
        assert_eq!(batch.positions(), [0, 1, 2, 3, 3, 4, 1, 0, 1, 2, 3, 4]);
        assert_eq!(batch.trees().collect::<Vec<_>>(), [0..3, 3..5]);
        let last = batch.slice(3..5);
        assert_eq!((last.ids(), last.shared()), (&[8, 9, 10, 11, 12][..], &[0, 2][..]));
        assert!(last.bounds().eq([0..2, 2..5]));
        assert_eq!(last.longest(), 5);

        let refused = |sequences: Vec<(Vec<u32>, usize)>| {
            Batch::from_branches(sequences).unwrap_err().to_string()
        };
        assert!(refused(vec![(vec![1], 1)]).contains("sequence 0 shares too many tokens"));
        let far = refused(vec![(vec![1, 2], 0), (vec![1, 2, 3], 2), (vec![4], 3)]);
        assert!(far.contains("sequence 2 shares too many tokens"), "{far}");
        assert!(refused(vec![(vec![1, 2], 0), (vec![], 2)]).contains("1 is empty"));
    }

    #[test]
    #[should_panic(expected = "a branch without its root")]
    fn a_branch_is_not_separated_from_its_root() {
        Batch::from_branches([(vec![1, 2], 0), (vec![3], 1)]).unwrap().slice(1..2);
    }

    #[test]
    fn equal_sequences_are_packed_once() {
        let batch =
            Batch::from_sequences([vec![1, 2], vec![3], vec![1, 2], vec![1], vec![3]]).unwrap();
        let (distinct, indices) = Batch::deduplicated(batch.sequences()).unwrap();
        assert_eq!(distinct, Batch::from_sequences([vec![1, 2], vec![3], vec![1]]).unwrap());
        assert_eq!(indices, [0, 1, 0, 2, 1]);
    }
}
