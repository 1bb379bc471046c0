//! Offsets of buffers in one range of memory: best fit, with adjacent free blocks merged.
//!
//! It only computes offsets. The CPU allocates its memory by it, and the memory prediction runs the same
//! requests through it.

use std::collections::{BTreeMap, BTreeSet};

/// A range of memory from 0 up, part of it taken.
#[derive(Debug, Clone, Default)]
pub struct OffsetAllocator {
    /// Free holes below `end`: length by offset.
    holes: BTreeMap<usize, usize>,
    /// The same as (length, offset), for the best fit.
    by_length: BTreeSet<(usize, usize)>,
    /// Everything from here on is free.
    end: usize,
    taken: usize,
    peak: usize,
}

impl OffsetAllocator {
    /// Offsets and lengths are rounded up to this many bytes: a cache line.
    pub const ALIGNMENT: usize = 64;

    /// Takes `bytes` and returns their offset: in the smallest hole that holds them, or at the end.
    pub fn take(&mut self, bytes: usize) -> usize {
        let length = rounded(bytes);
        self.taken += length;
        if let Some(&(hole, offset)) = self.by_length.range((length, 0)..).next() {
            self.remove_hole(offset, hole);
            if hole > length {
                self.add_hole(offset + length, hole - length);
            }
            return offset;
        }
        let offset = self.end;
        self.end += length;
        self.peak = self.peak.max(self.end);
        offset
    }

    /// Gives back what [`take`](OffsetAllocator::take) gave for so many bytes.
    pub fn put(&mut self, mut offset: usize, bytes: usize) {
        let mut length = rounded(bytes);
        self.taken -= length;
        if let Some((&before, &size)) = self.holes.range(..offset).next_back()
            && before + size == offset
        {
            self.remove_hole(before, size);
            (offset, length) = (before, length + size);
        }
        if let Some(&size) = self.holes.get(&(offset + length)) {
            self.remove_hole(offset + length, size);
            length += size;
        }
        if offset + length == self.end {
            self.end = offset;
        } else {
            self.add_hole(offset, length);
        }
    }

    /// Bytes that are taken now.
    pub fn taken(&self) -> usize {
        self.taken
    }

    /// Where the taken part ends now.
    pub fn end(&self) -> usize {
        self.end
    }

    /// The highest end that the taken part has had, holes included: what has been touched.
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// Lets the peak begin anew from where the taken part ends now.
    pub fn forget_peak(&mut self) {
        self.peak = self.end;
    }

    fn add_hole(&mut self, offset: usize, length: usize) {
        self.holes.insert(offset, length);
        self.by_length.insert((length, offset));
    }

    fn remove_hole(&mut self, offset: usize, length: usize) {
        self.holes.remove(&offset);
        self.by_length.remove(&(length, offset));
    }
}

/// An empty buffer takes some bytes as well, so that no two buffers share an offset.
fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(OffsetAllocator::ALIGNMENT)
}

/// How a device allocates and what its kernels take: see [`Backend::memory`](super::Backend::memory).
#[derive(Debug, Clone, Copy)]
pub struct DeviceMemory {
    /// Every allocation takes a multiple of this many bytes.
    pub alignment: usize,
    /// Bytes that are taken before the first tensor: the device's context, workspaces of products.
    pub fixed_bytes: usize,
    /// f32 elements of an attention's state for each query and head.
    pub attention_state: usize,
    /// Elements of a norm's input that are summed into one partial gradient of its weight.
    pub norm_task_elements: usize,
    /// Whether a trainable matrix that is multiplied by bf16 activations has a bf16 copy.
    pub has_working_copies: bool,
    /// Scratch memory of a kernel, for sequences of so many tokens and heads of so many features.
    pub scratch_bytes: fn(longest: usize, head_dim: usize) -> usize,
    /// How many kernels may have scratch memory at the same time.
    pub threads: usize,
}

impl DeviceMemory {
    /// Memory that kernels take besides tensors, in bytes, at most, for sequences of `longest` tokens
    /// and heads of `head_dim` features.
    pub fn workspace(&self, longest: usize, head_dim: usize) -> usize {
        self.fixed_bytes + self.threads * (self.scratch_bytes)(longest, head_dim)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_smallest_hole_is_taken_and_neighbours_join() {
        let mut space = OffsetAllocator::default();
        let [a, b, c, d] = [640, 64, 128, 64].map(|bytes| space.take(bytes));
        space.put(a, 640);
        space.put(c, 128);
        assert_eq!(space.take(100), c);
        space.put(c, 100);
        space.put(b, 64);
        assert_eq!(space.take(640 + 64 + 128), a);
        assert_eq!((space.peak(), space.taken()), (896, 896));
        space.put(d, 64);
        space.put(a, 832);
        assert_eq!((space.take(1), space.taken(), space.peak()), (0, 64, 896));
        space.forget_peak();
        assert_eq!(space.peak(), 64);
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "contains no unsafe code, and takes minutes")]
        fn nothing_overlaps_and_all_comes_back(
            requests in prop::collection::vec((0usize..5000, any::<prop::sample::Index>()), 1..80),
        ) {
            let mut space = OffsetAllocator::default();
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for (bytes, which) in requests {
                if bytes % 3 == 0 && !taken.is_empty() {
                    let (offset, bytes) = taken.swap_remove(which.index(taken.len()));
                    space.put(offset, bytes);
                    continue;
                }
                let offset = space.take(bytes);
                let end = offset + bytes.max(1);
                prop_assert!(taken.iter().all(|&(at, len)| end <= at || at + len.max(1) <= offset));
                prop_assert!(offset.is_multiple_of(OffsetAllocator::ALIGNMENT) && end <= space.peak());
                taken.push((offset, bytes));
            }
            taken.into_iter().for_each(|(offset, bytes)| space.put(offset, bytes));
            prop_assert_eq!((space.taken(), space.end, space.holes.len()), (0, 0, 0));
        }
    }
}
