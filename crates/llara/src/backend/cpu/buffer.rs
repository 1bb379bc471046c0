//! Matrices in main memory, allocated from one arena, so that only the first step requests memory of the system.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::element::Element;
use super::reserved::Reserved;
use super::unit::Unit;
use crate::backend::{Dtype, OffsetAllocator, PreparedWeight, Shape, View, ViewMut};
use crate::{Error, ErrorKind, Result};

/// Main memory for tensors: a large range of virtual addresses. The operating system assigns physical memory to
/// a page when it is first accessed.
///
/// The first access to a page is a page fault, and a training step uses gigabytes; pages that were used before
/// have no such cost. One range for all sizes wastes less memory than lists of free buffers by size, because
/// the lengths of batches differ.
#[derive(Default)]
pub(super) struct Arena {
    ranges: Mutex<Vec<AddressRange>>,
}

struct AddressRange {
    memory: Reserved,
    offsets: OffsetAllocator,
}

/// Bytes of addresses reserved at a time. Only pages that are accessed use memory.
const RESERVED: usize = if cfg!(miri) { 1 << 20 } else { 1 << 38 };

/// Bytes of a page, or of several where pages are smaller.
const PAGE: usize = 1 << 16;

/// Bytes by which an allocator may round a request up.
const SLACK: usize = 64;

impl AddressRange {
    /// Reserves a range of at least `bytes`; smaller than `RESERVED` if the system refuses that.
    fn reserve(bytes: usize) -> std::io::Result<Self> {
        let mut length = bytes.checked_next_power_of_two().unwrap_or(bytes).max(RESERVED);
        loop {
            match Reserved::new(length) {
                Ok(memory) => {
                    return Ok(AddressRange { memory, offsets: OffsetAllocator::default() });
                }
                Err(_) if length / 2 >= bytes => length /= 2,
                Err(error) => return Err(error),
            }
        }
    }

    fn fits(&self, bytes: usize) -> bool {
        // The worst case: allocation at the end.
        let end = self.offsets.end().checked_add(bytes).and_then(|end| end.checked_add(SLACK));
        end.is_some_and(|end| end <= self.memory.len())
    }
}

impl Arena {
    /// # Errors
    /// If the system refuses the range of addresses, or if `LLARA_CPU` is invalid. In the latter case no tensor
    /// can be created, so no kernel runs.
    fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Block> {
        Unit::selected()?;
        let mut ranges = self.lock();
        let range = match ranges.iter().position(|range| range.fits(bytes)) {
            Some(range) => range,
            None => {
                let least = bytes.checked_add(SLACK).ok_or_else(|| too_large(bytes))?;
                let range = AddressRange::reserve(least);
                ranges.push(range.map_err(|error| too_large(bytes).because(error))?);
                ranges.len() - 1
            }
        };
        let AddressRange { memory, offsets } = &mut ranges[range];
        let offset = offsets.allocate(bytes);
        // SAFETY: `fits` and `reserve` checked that the range has `offset + bytes` bytes.
        let start = unsafe { memory.start().add(offset) };
        Ok(Block { start, bytes, range, offset, arena: Arc::clone(self) })
    }

    /// Returns the memory of all free blocks to the system, as far as that takes it.
    pub(super) fn release_unused(&self) {
        for AddressRange { memory, offsets } in self.lock().iter() {
            for free in offsets.free_ranges() {
                let start = free.start.next_multiple_of(PAGE);
                let end = free.end / PAGE * PAGE;
                if start >= end {
                    continue;
                }
                // SAFETY: the lock is held, so no block is allocated here meanwhile; a freed block has no owner.
                unsafe { memory.discard(start, end - start) };
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<AddressRange>> {
        // A panic in another thread cannot leave the list partially updated.
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn too_large(bytes: usize) -> Error {
    Error::new(ErrorKind::Backend, format!("cannot allocate {bytes} bytes of main memory"))
        .hint("lower --memory-budget or the tokens of a chunk, use a smaller batch, or raise the process's memory limit (ulimit -v)")
}

/// An empty vector in host memory, outside any arena.
///
/// # Errors
/// If there is no memory for it.
pub(super) fn with_capacity<T>(len: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    vector.try_reserve_exact(len).map_err(|error| too_large(bytes).because(error))?;
    Ok(vector)
}

/// A copy in host memory, outside any arena.
///
/// # Errors
/// If there is no memory for it.
pub(super) fn copied<T: Copy>(data: &[T]) -> Result<Vec<T>> {
    let mut vector = with_capacity(data.len())?;
    vector.extend_from_slice(data);
    Ok(vector)
}

/// A block of an arena, with a single owner.
struct Block {
    start: *mut u8,
    bytes: usize,
    range: usize,
    offset: usize,
    arena: Arc<Arena>,
}

// SAFETY: a block owns its bytes like a Vec; it is not Send automatically because of the raw pointer.
unsafe impl Send for Block {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        self.arena.lock()[self.range].offsets.free(self.offset, self.bytes);
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
    /// A matrix with unspecified (but initialized) contents, for kernels that write every element.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub(super) fn unspecified(
        arena: &Arc<Arena>,
        (rows, cols): (usize, usize),
        dtype: Dtype,
    ) -> Result<Self> {
        let bytes = rows.checked_mul(cols).and_then(|elements| elements.checked_mul(dtype.bytes()));
        let Some(bytes) = bytes else {
            return Err(too_large(usize::MAX)
                .expected("fewer elements")
                .got(format!("{rows} x {cols}")));
        };
        Ok(CpuTensor { block: arena.allocate(bytes)?, rows, cols, dtype })
    }

    /// The elements, in row-major order.
    ///
    /// # Panics
    /// If the elements have another dtype.
    pub(super) fn elements<T: Element>(&self) -> &[T] {
        assert_eq!(self.dtype, T::DTYPE, "a matrix of another dtype");
        // SAFETY: this tensor owns the bytes of the block, which are aligned to a cache line. They are zeros
        // from the mapping or elements written later; every bit pattern is a valid f32 or bf16.
        unsafe { std::slice::from_raw_parts(self.block.start.cast(), self.rows * self.cols) }
    }

    /// The elements, mutable.
    ///
    /// # Panics
    /// If the elements have another dtype.
    pub(super) fn elements_mut<T: Element>(&mut self) -> &mut [T] {
        assert_eq!(self.dtype, T::DTYPE, "a matrix of another dtype");
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

    /// All bytes, for either dtype, mutable.
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

/// The CPU keeps no copies of weights: packing the values is a small part of a product, and a copy would need
/// as much memory as the weights.
impl PreparedWeight<CpuTensor> for CpuTensor {
    fn values(&self) -> &CpuTensor {
        self
    }

    fn into_values(self) -> CpuTensor {
        self
    }
}

impl<'t> View<'t, CpuTensor> {
    /// The elements of its rows, with the columns outside the view.
    ///
    /// # Panics
    /// If the elements have another dtype.
    pub(super) fn rows_of<T: Element>(self) -> &'t [T] {
        let cols = self.tensor.cols;
        &self.tensor.elements()[self.row * cols..(self.row + self.rows) * cols]
    }
}

impl<'t> ViewMut<'t, CpuTensor> {
    /// The elements of its rows, with the columns outside the view, mutable.
    ///
    /// # Panics
    /// If the elements have another dtype.
    pub(super) fn rows_of<T: Element>(self) -> &'t mut [T] {
        let cols = self.tensor.cols;
        &mut self.tensor.elements_mut()[self.row * cols..(self.row + self.rows) * cols]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(arena: &Arc<Arena>, rows: usize, cols: usize) -> CpuTensor {
        CpuTensor::unspecified(arena, (rows, cols), Dtype::F32).expect("memory")
    }

    #[test]
    fn the_memory_of_a_dropped_matrix_is_reused() {
        let arena = Arc::default();
        let first = matrix(&arena, 10, 100);
        let address = first.as_slice().as_ptr();
        drop(first);
        let mut second = matrix(&arena, 10, 101);
        assert_eq!((second.as_slice().as_ptr(), second.as_slice().len()), (address, 1010));
        second.as_mut_slice().fill(7.0);
        let mut third = CpuTensor::unspecified(&arena, (3, 5), Dtype::Bf16).expect("memory");
        third.elements_mut().fill(half::bf16::from_f32(2.0));
        assert!(second.as_slice().iter().all(|&x| x == 7.0));
        assert_eq!(third.bytes_mut().len(), 30);
    }

    /// Under Miri: a new matrix must not invalidate borrows of those before it.
    #[test]
    fn a_matrix_can_be_created_while_others_are_borrowed() {
        let arena = Arc::default();
        let (mut first, second) = (matrix(&arena, 3, 7), matrix(&arena, 2, 2));
        let (written, read) = (first.as_mut_slice(), second.as_slice());
        let third = matrix(&arena, 5, 5);
        written.fill(2.0);
        assert_eq!(read.len() + third.as_slice().len(), 29);
        drop(third);
        assert!(written.iter().all(|&x| x == 2.0));
    }

    #[test]
    fn unused_memory_is_returned_and_matrices_keep_their_contents() {
        let arena = Arc::default();
        // Several pages.
        let side = if cfg!(miri) { 9 } else { 300 };
        let mut between: Vec<CpuTensor> = (0..3).map(|_| matrix(&arena, side, side)).collect();
        for (value, matrix) in (1u8..).zip(&mut between) {
            matrix.as_mut_slice().fill(f32::from(value));
        }
        let freed = between.remove(1);
        let address = freed.as_slice().as_ptr();
        drop(freed);
        arena.release_unused();
        let [first, last] = [&between[0], &between[1]];
        assert!(first.as_slice().iter().all(|&x| x == 1.0));
        assert!(last.as_slice().iter().all(|&x| x == 3.0));
        let again = matrix(&arena, side, side);
        assert_eq!(again.as_slice().as_ptr(), address);
        // Whole pages of it are new ones.
        if cfg!(all(target_os = "linux", not(miri))) {
            assert_eq!(again.as_slice()[side * side / 2], 0.0);
        }
    }

    #[test]
    fn running_out_of_memory_is_an_error() {
        let arena = Arc::default();
        let kept = matrix(&arena, 2, 3);
        let huge = [1 << 50, (isize::MAX as usize - 100) / 4, usize::MAX / 4, usize::MAX];
        for rows in huge {
            let Err(error) = CpuTensor::unspecified(&arena, (rows, 1), Dtype::F32) else {
                panic!("{rows} rows")
            };
            assert_eq!(error.kind(), ErrorKind::Backend);
            let text = error.to_string();
            assert!(
                text.contains("bytes of main memory") && text.contains("--memory-budget"),
                "{text}"
            );
        }
        assert_eq!(matrix(&arena, 4, 4).as_slice().len() + kept.as_slice().len(), 22);
    }

    #[test]
    fn a_matrix_may_be_empty() {
        let arena = Arc::default();
        let (a, b) = (matrix(&arena, 0, 9), matrix(&arena, 4, 0));
        assert!(a.as_slice().is_empty() && b.as_slice().is_empty());
    }
}
