//! The flat index space of all trainable parameters, divided among ranks.

use std::ops::Range;

use crate::backend::{Backend, Shape};
use crate::dist::Bucket;
use crate::model::Decoder;

/// The length of each rank's range is a multiple of this many elements.
const ALIGNMENT: usize = 64;

/// Maps the elements of the trainable parameters of a decoder, concatenated in row-major order, to flat indices
/// from 0. The index space is padded so that each rank owns a range of the same length.
///
/// The order is that of [`Decoder::trainable_parameters`]. A rank has moments only for the range that it owns,
/// and only that rank updates it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatLayout {
    /// Flat index of the first element of each parameter, then the number of all elements. `[P + 1]`
    starts: Vec<usize>,
    /// Elements that each rank owns.
    shard: usize,
    ranks: usize,
}

/// Consecutive elements of one parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParameterSlice {
    /// Index of the parameter among the trainable ones.
    pub parameter: usize,
    /// The range of its elements, in row-major order.
    pub elements: Range<usize>,
    /// Flat index of the first element.
    pub start: usize,
}

impl FlatLayout {
    /// The layout of parameters with these numbers of elements.
    ///
    /// # Panics
    /// If there are no ranks.
    pub fn new(sizes: impl IntoIterator<Item = usize>, ranks: usize) -> Self {
        assert!(ranks > 0, "a layout for no ranks");
        let mut starts = vec![0];
        let mut end = 0;
        for size in sizes {
            end += size;
            starts.push(end);
        }
        let shard = end.div_ceil(ranks).next_multiple_of(ALIGNMENT);
        FlatLayout { starts, shard, ranks }
    }

    /// The layout of a decoder's trainable parameters.
    pub fn of<B: Backend>(decoder: &Decoder<B>, ranks: usize) -> Self {
        let sizes = decoder.trainable_parameters().map(|parameter| {
            let (rows, cols) = parameter.values().shape();
            rows * cols
        });
        Self::new(sizes, ranks)
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.starts.len() - 1
    }

    /// Elements of all parameters, without padding.
    pub fn elements(&self) -> usize {
        self.starts.last().copied().unwrap_or_default()
    }

    /// Elements with padding.
    pub fn padded_elements(&self) -> usize {
        self.shard * self.ranks
    }

    /// The flat indices that a rank owns, padding included.
    pub fn owned(&self, rank: usize) -> Range<usize> {
        rank * self.shard..(rank + 1) * self.shard
    }

    /// The elements of parameters in a flat range, in order.
    pub fn slices(&self, range: Range<usize>) -> Vec<ParameterSlice> {
        (0..self.parameters()).filter_map(|parameter| self.slice(parameter, &range)).collect()
    }

    /// The elements of one parameter in a flat range; `None` if there are none.
    pub fn slice(&self, parameter: usize, range: &Range<usize>) -> Option<ParameterSlice> {
        let [first, end] = [self.starts[parameter], self.starts[parameter + 1]];
        let start = range.start.max(first);
        let elements = start - first..range.end.min(end).max(start) - first;
        (!elements.is_empty()).then_some(ParameterSlice { parameter, elements, start })
    }

    /// All elements in buckets of at most `bucket_elements`, the last one first: in the order in which a
    /// backward pass completes the gradients. A parameter may be in several buckets, a bucket in several
    /// ranks' ranges.
    pub fn buckets(&self, bucket_elements: usize) -> Vec<Bucket> {
        let size = bucket_elements.max(1);
        let mut end = self.elements();
        let mut buckets = Vec::with_capacity(end.div_ceil(size));
        while end > 0 {
            let start = end.saturating_sub(size);
            buckets.push(Bucket { range: start..end, shard: self.shard });
            end = start;
        }
        buckets
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_element_is_in_one_rank_and_one_bucket(
            sizes in prop::collection::vec(0usize..300, 0..12), ranks in 1usize..9, bucket in 1usize..500,
        ) {
            let layout = FlatLayout::new(sizes.iter().copied(), ranks);
            prop_assert_eq!(layout.padded_elements() % (ranks * ALIGNMENT), 0);
            prop_assert!(layout.padded_elements() < layout.elements() + ranks * 2 * ALIGNMENT);
            let buckets = layout.buckets(bucket);
            let by_rank: Vec<_> = (0..ranks).flat_map(|rank| layout.slices(layout.owned(rank))).collect();
            let by_bucket: Vec<_> =
                buckets.iter().rev().flat_map(|bucket| layout.slices(bucket.range.clone())).collect();
            for slices in [by_rank, by_bucket] {
                let mut seen = sizes.iter().map(|&size| vec![0; size]).collect::<Vec<_>>();
                let mut next = 0;
                for slice in slices {
                    prop_assert_eq!(slice.start, next);
                    next += slice.elements.len();
                    slice.elements.for_each(|at| seen[slice.parameter][at] += 1);
                }
                prop_assert_eq!(next, layout.elements());
                prop_assert!(seen.iter().flatten().all(|&count| count == 1));
            }
            for bucket in &buckets {
                let mut next = bucket.range.start;
                for rank in 0..ranks {
                    let own = bucket.owned_by(rank);
                    prop_assert_eq!(own.start, next);
                    next = own.end;
                    let owned = layout.owned(rank);
                    prop_assert!(own.is_empty() || owned.start <= own.start && own.end <= owned.end);
                }
                prop_assert_eq!(next, bucket.range.end);
            }
        }
    }

    #[test]
    fn one_rank_owns_whole_parameters() {
        let layout = FlatLayout::new([5, 0, 7], 1);
        let slice = |parameter, size, start| ParameterSlice { parameter, elements: 0..size, start };
        assert_eq!(layout.slices(layout.owned(0)), [slice(0, 5, 0), slice(2, 7, 5)]);
        assert_eq!(layout.padded_elements(), 64);
    }
}
