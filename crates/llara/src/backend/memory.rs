//! Offsets of buffers in one range of memory: best fit, with adjacent free blocks merged.
//!
//! The allocator only computes offsets. The backends allocate memory at these offsets, and the memory
//! prediction passes the same requests to it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::Dtype;

/// A best-fit allocator for a range of memory that starts at offset 0.
#[derive(Debug, Clone, Default)]
pub struct OffsetAllocator {
    /// Free blocks below `end`: offset to length.
    free_blocks: BTreeMap<usize, usize>,
    /// The same as (length, offset), for the best fit.
    by_length: BTreeSet<(usize, usize)>,
    /// All memory from this offset on is free.
    end: usize,
    allocated: usize,
    peak: usize,
}

impl OffsetAllocator {
    /// Offsets and lengths are rounded up to this many bytes: a cache line.
    pub const ALIGNMENT: usize = 64;

    /// Allocates `bytes` and returns their offset: in the smallest free block that is large enough, or at the
    /// end.
    pub fn allocate(&mut self, bytes: usize) -> usize {
        let length = rounded(bytes);
        self.allocated += length;
        if let Some(&(size, offset)) = self.by_length.range((length, 0)..).next() {
            self.remove_free_block(offset, size);
            if size > length {
                self.add_free_block(offset + length, size - length);
            }
            return offset;
        }
        let offset = self.end;
        self.end += length;
        self.peak = self.peak.max(self.end);
        offset
    }

    /// Frees the `bytes` at `offset`, which [`allocate`](OffsetAllocator::allocate) returned for the same
    /// number of bytes.
    pub fn free(&mut self, mut offset: usize, bytes: usize) {
        let mut length = rounded(bytes);
        self.allocated -= length;
        if let Some((&before, &size)) = self.free_blocks.range(..offset).next_back()
            && before + size == offset
        {
            self.remove_free_block(before, size);
            (offset, length) = (before, length + size);
        }
        if let Some(&size) = self.free_blocks.get(&(offset + length)) {
            self.remove_free_block(offset + length, size);
            length += size;
        }
        if offset + length == self.end {
            self.end = offset;
        } else {
            self.add_free_block(offset, length);
        }
    }

    /// Number of bytes currently allocated.
    pub fn allocated(&self) -> usize {
        self.allocated
    }

    /// The end of the last allocated block.
    pub fn end(&self) -> usize {
        self.end
    }

    /// The largest value that [`end`](OffsetAllocator::end) has had: the memory in use at its peak, with the
    /// free blocks between allocated ones.
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// The free blocks below the peak, as ranges of offsets.
    pub fn free_ranges(&self) -> impl Iterator<Item = Range<usize>> {
        let blocks = self.free_blocks.iter().map(|(&offset, &length)| offset..offset + length);
        blocks.chain(std::iter::once(self.end..self.peak))
    }

    /// Resets the peak to the current end.
    pub fn reset_peak(&mut self) {
        self.peak = self.end;
    }

    fn add_free_block(&mut self, offset: usize, length: usize) {
        self.free_blocks.insert(offset, length);
        self.by_length.insert((length, offset));
    }

    fn remove_free_block(&mut self, offset: usize, length: usize) {
        self.free_blocks.remove(&offset);
        self.by_length.remove(&(length, offset));
    }
}

/// An empty buffer is also given some bytes, so that no two buffers share an offset.
fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(OffsetAllocator::ALIGNMENT)
}

/// The largest inputs of kernels, on which their scratch memory depends.
#[derive(Debug, Clone, Copy)]
pub struct KernelSizes {
    /// Rows of a matrix: tokens of a chunk.
    pub rows: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// Features of an attention head.
    pub head_dim: usize,
    /// Dtype of activations.
    pub activations: Dtype,
}

/// How a device allocates memory and how much its kernels need: see
/// [`Backend::memory`](super::Backend::memory).
#[derive(Debug, Clone, Copy)]
pub struct DeviceMemory {
    /// The size of every allocation is a multiple of this many bytes.
    pub alignment: usize,
    /// Bytes allocated before the first tensor: the device's context, workspaces of matrix products.
    pub fixed_bytes: usize,
    /// f32 elements of the attention state per query and head.
    pub attention_state: usize,
    /// Elements of a norm's input that are summed into one partial gradient of its weight.
    pub norm_task_elements: usize,
    /// Whether a trainable matrix that is multiplied by bf16 activations has a bf16 copy.
    pub has_working_copies: bool,
    /// Scratch memory of a kernel, in bytes.
    pub scratch_bytes: fn(&KernelSizes) -> usize,
    /// Maximum number of kernels that have scratch memory at the same time.
    pub threads: usize,
}

impl DeviceMemory {
    /// Maximum memory of kernels in addition to tensors, in bytes.
    pub fn workspace(&self, sizes: &KernelSizes) -> usize {
        self.fixed_bytes + self.threads * (self.scratch_bytes)(sizes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn allocation_is_best_fit_and_adjacent_free_blocks_are_merged() {
        let mut allocator = OffsetAllocator::default();
        let [a, b, c, d] = [640, 64, 128, 64].map(|bytes| allocator.allocate(bytes));
        allocator.free(a, 640);
        allocator.free(c, 128);
        assert_eq!(allocator.allocate(100), c);
        allocator.free(c, 100);
        allocator.free(b, 64);
        assert_eq!(allocator.free_ranges().collect::<Vec<_>>(), [a..d, 896..896]);
        assert_eq!(allocator.allocate(640 + 64 + 128), a);
        assert_eq!((allocator.peak(), allocator.allocated()), (896, 896));
        allocator.free(d, 64);
        allocator.free(a, 832);
        assert_eq!((allocator.allocate(1), allocator.allocated(), allocator.peak()), (0, 64, 896));
        assert_eq!(allocator.free_ranges().collect::<Vec<_>>(), vec![64..896]);
        allocator.reset_peak();
        assert_eq!(allocator.peak(), 64);
    }

    proptest! {
        #[test]
        #[cfg_attr(miri, ignore = "contains no unsafe code, and takes minutes")]
        fn allocations_do_not_overlap_and_all_memory_is_freed(
            requests in prop::collection::vec((0usize..5000, any::<prop::sample::Index>()), 1..80),
        ) {
            let mut allocator = OffsetAllocator::default();
            let mut taken: Vec<(usize, usize)> = Vec::new();
            for (bytes, which) in requests {
                if bytes % 3 == 0 && !taken.is_empty() {
                    let (offset, bytes) = taken.swap_remove(which.index(taken.len()));
                    allocator.free(offset, bytes);
                    continue;
                }
                let offset = allocator.allocate(bytes);
                let end = offset + bytes.max(1);
                prop_assert!(taken.iter().all(|&(at, len)| end <= at || at + len.max(1) <= offset));
                prop_assert!(offset.is_multiple_of(OffsetAllocator::ALIGNMENT) && end <= allocator.peak());
                taken.push((offset, bytes));
            }
            taken.into_iter().for_each(|(offset, bytes)| allocator.free(offset, bytes));
            prop_assert_eq!((allocator.allocated(), allocator.end, allocator.free_blocks.len()), (0, 0, 0));
        }
    }
}
