//! The buffers of this backend: matrices, prepared weights, lists of indices.

use std::sync::Arc;

use super::memory::Buffer;
use crate::backend::{Dtype, PreparedWeight, Shape, View, ViewMut};

/// A row-major matrix on the device.
pub struct CudaTensor {
    pub(super) buffer: Buffer,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: Dtype,
}

impl CudaTensor {
    pub(super) fn pointer(&self) -> u64 {
        self.buffer.pointer()
    }

    /// Number of elements.
    pub(super) fn len(&self) -> usize {
        self.rows * self.cols
    }

    pub(super) fn bytes(&self) -> usize {
        self.len() * self.dtype.bytes()
    }
}

impl Shape for CudaTensor {
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

/// A parameter on the device.
pub struct CudaWeight {
    pub(super) values: CudaTensor,
    /// The values rounded to bf16, if they are f32 and multiplied by bf16 activations.
    pub(super) working: Option<CudaTensor>,
}

impl Shape for CudaWeight {
    fn rows(&self) -> usize {
        self.values.rows
    }

    fn cols(&self) -> usize {
        self.values.cols
    }

    fn dtype(&self) -> Dtype {
        self.values.dtype
    }
}

impl PreparedWeight<CudaTensor> for CudaWeight {
    fn values(&self) -> &CudaTensor {
        &self.values
    }

    fn into_values(self) -> CudaTensor {
        self.values
    }
}

/// A list of u32 on the device. Lists that were uploaded together share memory.
pub struct CudaIndex {
    pub(super) buffer: Arc<Buffer>,
    /// Bytes from the start of the buffer.
    pub(super) offset: usize,
    pub(super) len: usize,
}

impl CudaIndex {
    pub(super) fn pointer(&self) -> u64 {
        self.buffer.pointer() + self.offset as u64
    }
}

/// Rows of equal length at equal distances: the kernel's view of a matrix or of a block of one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block {
    /// Address of the first element.
    pub(super) pointer: u64,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    pub(super) dtype: Dtype,
}

impl Block {
    /// Elements that one thread of a kernel loads at a time.
    pub(super) const OCTET: usize = 8;

    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Whether there are no elements.
    pub(super) fn is_empty(&self) -> bool {
        self.rows == 0 || self.cols == 0
    }

    /// Whether every row consists of whole octets of elements that can be loaded 16 bytes at a time.
    pub(super) fn is_wide(&self) -> bool {
        self.is_aligned() && self.cols.is_multiple_of(Self::OCTET)
    }

    /// Whether every octet of columns can be loaded 16 bytes at a time.
    pub(super) fn is_aligned(&self) -> bool {
        self.pointer.is_multiple_of(16)
            && (self.rows <= 1 || self.stride.is_multiple_of(Self::OCTET))
    }

    /// The same elements as rows of `cols` columns, if they are contiguous.
    pub(super) fn reshaped(self, cols: usize) -> Option<Block> {
        let whole = self.stride == self.cols || self.rows <= 1;
        if !whole || cols == 0 || !(self.rows * self.cols).is_multiple_of(cols) {
            return None;
        }
        Some(Block { rows: self.rows * self.cols / cols, cols, stride: cols, ..self })
    }
}

impl From<&CudaTensor> for Block {
    fn from(x: &CudaTensor) -> Self {
        let (rows, cols, dtype) = (x.rows, x.cols, x.dtype);
        Block { pointer: x.pointer(), rows, cols, stride: cols, dtype }
    }
}

impl From<&mut CudaTensor> for Block {
    fn from(x: &mut CudaTensor) -> Self {
        Block::from(&*x)
    }
}

impl From<View<'_, CudaTensor>> for Block {
    fn from(x: View<'_, CudaTensor>) -> Self {
        block(x.tensor, (x.row, x.rows), (x.col, x.cols))
    }
}

impl From<&ViewMut<'_, CudaTensor>> for Block {
    fn from(x: &ViewMut<'_, CudaTensor>) -> Self {
        block(x.tensor, (x.row, x.rows), (x.col, x.cols))
    }
}

/// A block of rows and columns: first and count of each.
pub(super) fn block(
    x: &CudaTensor,
    (row, rows): (usize, usize),
    (col, cols): (usize, usize),
) -> Block {
    assert!(row + rows <= x.rows && col + cols <= x.cols, "a view beyond its matrix");
    let first = row * x.cols + col;
    let pointer = x.pointer() + (first * x.dtype.bytes()) as u64;
    Block { pointer, rows, cols, stride: x.cols, dtype: x.dtype }
}

/// A range of elements, in row-major order, as one row.
pub(super) fn elements(x: &CudaTensor, range: std::ops::Range<usize>) -> Block {
    assert!(range.start <= range.end && range.end <= x.len(), "elements beyond their matrix");
    let pointer = x.pointer() + (range.start * x.dtype.bytes()) as u64;
    let cols = range.len();
    Block { pointer, rows: 1, cols, stride: cols, dtype: x.dtype }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(pointer: u64, rows: usize, cols: usize, stride: usize) -> Block {
        Block { pointer, rows, cols, stride, dtype: Dtype::Bf16 }
    }

    #[test]
    fn octets_are_loaded_at_once_only_if_every_row_is_aligned() {
        assert!(block(256, 3, 16, 24).is_wide());
        assert!(!block(256, 3, 15, 24).is_wide(), "an incomplete octet");
        assert!(block(256, 3, 15, 24).is_aligned());
        assert!(!block(256, 3, 16, 20).is_aligned(), "the second row");
        assert!(block(256, 1, 16, 20).is_aligned(), "there is no second row");
        assert!(!block(258, 1, 16, 16).is_aligned());
        assert!(block(256, 0, 16, 20).is_empty());
    }

    #[test]
    fn only_contiguous_rows_are_reshaped() {
        let whole = block(256, 6, 4, 4).reshaped(8).unwrap();
        assert_eq!((whole.rows, whole.cols, whole.stride, whole.pointer), (3, 8, 8, 256));
        assert_eq!(block(256, 1, 24, 99).reshaped(24).unwrap().rows, 1);
        assert!(block(256, 6, 4, 5).reshaped(8).is_none());
        assert!(block(256, 6, 4, 4).reshaped(7).is_none());
        assert!(block(256, 6, 0, 0).reshaped(0).is_none());
    }
}
