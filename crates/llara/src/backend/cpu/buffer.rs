//! Matrices in main memory, all in one arena, so that a step after the first allocates nothing.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::{MmapMut, MmapOptions};

use super::element::Element;
use crate::backend::{Dtype, Shape, Space};

/// Main memory for tensors: a large range of addresses, of which the system backs what is touched.
///
/// Fresh memory costs a page fault for every page, and a training step would touch gigabytes of it
/// anew each time; a place that was used before costs nothing. One range for all sizes wastes less
/// than lists of free buffers by size would, for batches differ in length.
#[derive(Default)]
pub(super) struct Arena {
    ranges: Mutex<Vec<AddressRange>>,
}

struct AddressRange {
    memory: MmapMut,
    space: Space,
}

/// Addresses reserved at a time. Only as many as are used cost memory.
const RESERVED: usize = 1 << 38;

impl AddressRange {
    /// A range for at least `bytes`; a smaller one where the system grants no more.
    fn reserve(bytes: usize) -> Self {
        let mut length = RESERVED.max(bytes.next_power_of_two());
        loop {
            match MmapOptions::new().len(length).no_reserve_swap().map_anon() {
                Ok(memory) => {
                    // Fewer, larger pages where the system has them; it may well decline.
                    #[cfg(target_os = "linux")]
                    let _ = memory.advise(memmap2::Advice::HugePage);
                    return AddressRange { memory, space: Space::default() };
                }
                Err(_) if length / 2 >= bytes => length /= 2,
                Err(_) => {
                    let layout = std::alloc::Layout::array::<u8>(bytes);
                    std::alloc::handle_alloc_error(
                        layout.unwrap_or(std::alloc::Layout::new::<u8>()),
                    )
                }
            }
        }
    }

    fn fits(&self, bytes: usize) -> bool {
        // The worst case, at the end; 64 for rounding up.
        self.space.end() + bytes + 64 <= self.memory.len()
    }
}

impl Arena {
    fn take(self: &Arc<Self>, bytes: usize) -> Block {
        let mut ranges = self.lock();
        let range = match ranges.iter().position(|range| range.fits(bytes)) {
            Some(range) => range,
            None => {
                ranges.push(AddressRange::reserve(bytes + 64));
                ranges.len() - 1
            }
        };
        let AddressRange { memory, space } = &mut ranges[range];
        let offset = space.take(bytes);
        let start = memory[offset..offset + bytes].as_mut_ptr();
        Block { start, bytes, range, offset, arena: Arc::clone(self) }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<AddressRange>> {
        // A panic elsewhere cannot leave the list half-changed.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A part of an arena that nobody else has.
struct Block {
    start: *mut u8,
    bytes: usize,
    range: usize,
    offset: usize,
    arena: Arc<Arena>,
}

// SAFETY: a block owns its bytes as a Vec would; the pointer is what keeps this from being derived.
unsafe impl Send for Block {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        self.arena.lock()[self.range].space.put(self.offset, self.bytes);
    }
}

/// A row-major `[rows, cols]` matrix of f32 or bf16 in main memory.
pub struct CpuTensor {
    block: Block,
    rows: usize,
    cols: usize,
    dtype: Dtype,
}

impl CpuTensor {
    /// A matrix with unspecified (but initialised) contents, for kernels that write every element.
    pub(super) fn unspecified(
        arena: &Arc<Arena>,
        (rows, cols): (usize, usize),
        dtype: Dtype,
    ) -> Self {
        let block = arena.take(rows * cols * dtype.bytes());
        CpuTensor { block, rows, cols, dtype }
    }

    /// The elements, row by row.
    ///
    /// # Panics
    /// If they are of another type.
    pub(super) fn elements<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "a matrix of another type");
        // SAFETY: the block has these bytes for this tensor alone, aligned to a cache line; it was
        // zeros when mapped and has been written as f32 or bf16 since, of which all bits are valid.
        unsafe { std::slice::from_raw_parts(self.block.start.cast(), self.rows * self.cols) }
    }

    /// The elements, to be written.
    ///
    /// # Panics
    /// If they are of another type.
    pub(super) fn elements_mut<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "a matrix of another type");
        // SAFETY: as in `elements`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.block.start.cast(), self.rows * self.cols) }
    }

    /// [`elements`](Self::elements) of an f32 matrix.
    pub(super) fn as_slice(&self) -> &[f32] {
        self.elements()
    }

    /// [`elements_mut`](Self::elements_mut) of an f32 matrix.
    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        self.elements_mut()
    }

    /// All bytes, of either type.
    pub(super) fn bytes(&self) -> &[u8] {
        // SAFETY: as in `elements`.
        unsafe { std::slice::from_raw_parts(self.block.start, self.block.bytes) }
    }

    /// All bytes, of either type, to be written.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `elements`, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.block.start, self.block.bytes) }
    }
}

impl Shape for CpuTensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(arena: &Arc<Arena>, rows: usize, cols: usize) -> CpuTensor {
        CpuTensor::unspecified(arena, (rows, cols), Dtype::F32)
    }

    #[test]
    fn a_dropped_matrix_makes_room_for_the_next() {
        let arena = Arc::default();
        let first = matrix(&arena, 10, 100);
        let address = first.as_slice().as_ptr();
        drop(first);
        let mut second = matrix(&arena, 10, 101);
        assert_eq!((second.as_slice().as_ptr(), second.as_slice().len()), (address, 1010));
        second.as_mut_slice().fill(7.0);
        let mut third = CpuTensor::unspecified(&arena, (3, 5), Dtype::Bf16);
        third.elements_mut().fill(half::bf16::from_f32(2.0));
        assert!(second.as_slice().iter().all(|&x| x == 7.0));
        assert_eq!(third.bytes().len(), 30);
    }

    #[test]
    fn nothing_is_a_matrix_too() {
        let arena = Arc::default();
        let (a, b) = (matrix(&arena, 0, 9), matrix(&arena, 4, 0));
        assert!(a.as_slice().is_empty() && b.as_slice().is_empty());
    }
}
