//! The flat index space of all trainable parameters, divided among ranks.

use std::ops::Range;

use crate::backend::{Backend, Shape};
use crate::dist::Bucket;
use crate::model::Decoder;

/// Elements of a bucket with few ranks: 25 MB of f32, as in PyTorch's DistributedDataParallel.
const LEAST_ELEMENTS: usize = 25 * (1 << 20) / 4;
/// The least elements of a rank's share of a bucket: 256 KiB of f32. Smaller messages take longer than their bytes.
const LEAST_SHARE: usize = 1 << 16;

/// The usual number of elements of a bucket.
pub fn bucket_elements(ranks: usize) -> usize {
    LEAST_ELEMENTS.max(ranks * LEAST_SHARE)
}

/// Maps the elements of the trainable parameters of a decoder, concatenated in row-major order, to flat indices
/// from 0, and divides these into buckets. Each rank owns a part of every bucket: it has moments for these elements only,
/// and only that rank updates them.
///
/// Since every bucket belongs to all ranks, all of them receive gradients and send weights at the same time. If a rank
/// owned one range of the whole space, they would do so one after the other.
///
/// The order is that of [`Decoder::trainable_parameters`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatLayout {
    /// Flat index of the first element of each parameter, then the number of all elements. `[P + 1]`
    starts: Vec<usize>,
    ranks: usize,
    /// Elements of a bucket.
    bucket_elements: usize,
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
    /// The layout of parameters with these numbers of elements, in buckets of at most `bucket_elements`.
    ///
    /// # Panics
    /// If there are no ranks.
    pub fn new(
        sizes: impl IntoIterator<Item = usize>,
        ranks: usize,
        bucket_elements: usize,
    ) -> Self {
        assert!(ranks > 0, "a layout for no ranks");
        let mut starts = vec![0];
        let mut end = 0;
        for size in sizes {
            end += size;
            starts.push(end);
        }
        FlatLayout { starts, ranks, bucket_elements: bucket_elements.max(1) }
    }

    /// The layout of a decoder's trainable parameters.
    pub fn of<B: Backend>(decoder: &Decoder<B>, ranks: usize, bucket_elements: usize) -> Self {
        let sizes = decoder.trainable_parameters().map(|parameter| {
            let (rows, cols) = parameter.values().shape();
            rows * cols
        });
        Self::new(sizes, ranks, bucket_elements)
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.starts.len() - 1
    }

    /// Elements of all parameters.
    pub fn elements(&self) -> usize {
        self.starts.last().copied().unwrap_or_default()
    }

    /// The flat indices that a rank owns, in ascending order: a part of every bucket, or all with one rank.
    pub fn owned(&self, rank: usize) -> Vec<Range<usize>> {
        match self.ranks {
            1 => std::iter::once(0..self.elements()).collect(),
            _ => self.buckets().iter().rev().map(|bucket| bucket.owned_by(rank)).collect(),
        }
    }

    /// Number of elements that a rank owns.
    pub fn owned_elements(&self, rank: usize) -> usize {
        self.owned(rank).iter().map(ExactSizeIterator::len).sum()
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

    /// All elements in buckets, the last one first: in the order in which a backward pass completes the gradients. A
    /// parameter may be in several buckets.
    pub fn buckets(&self) -> Vec<Bucket> {
        let (size, ranks) = (self.bucket_elements, self.ranks);
        let mut end = self.elements();
        let mut buckets = Vec::with_capacity(end.div_ceil(size));
        while end > 0 {
            let start = end.saturating_sub(size);
            buckets.push(Bucket { range: start..end, ranks });
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
            let layout = FlatLayout::new(sizes.iter().copied(), ranks, bucket);
            let buckets = layout.buckets();
            let slices = |range: &Range<usize>| layout.slices(range.clone());
            let mut by_rank: Vec<_> =
                (0..ranks).flat_map(|rank| layout.owned(rank)).flat_map(|range| slices(&range)).collect();
            by_rank.sort_by_key(|slice| slice.start);
            let by_bucket: Vec<_> =
                buckets.iter().rev().flat_map(|bucket| slices(&bucket.range)).collect();
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
                    // The shares of ranks are about equal.
                    prop_assert!(own.len() <= bucket.range.len().div_ceil(ranks) + 63);
                    prop_assert!(ranks == 1 || own.is_empty() || layout.owned(rank).contains(&own));
                }
                prop_assert_eq!(next, bucket.range.end);
            }
            let of_ranks: usize = (0..ranks).map(|rank| layout.owned_elements(rank)).sum();
            prop_assert_eq!(of_ranks, layout.elements());
        }
    }

    #[test]
    fn one_rank_owns_whole_parameters() {
        let layout = FlatLayout::new([5, 0, 7], 1, 4);
        let slice = |parameter, size, start| ParameterSlice { parameter, elements: 0..size, start };
        assert_eq!(layout.owned(0).as_slice(), std::slice::from_ref(&(0..12)));
        assert_eq!(layout.slices(0..12), [slice(0, 5, 0), slice(2, 7, 5)]);
    }
}
