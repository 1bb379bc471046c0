//! Memory for packed operands, kept by each thread from one product to the next.

use std::cell::RefCell;

/// A cache line of cells, so that no vector of a panel crosses a cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Line([u32; LINE]);

/// Cells of a [`Line`].
const LINE: usize = 16;

/// Cells that start at a cache line; grows, never shrinks.
#[derive(Default)]
pub(super) struct CellBuffer(Vec<Line>);

impl CellBuffer {
    /// `len` cells with unspecified contents.
    pub(super) fn cells(&mut self, len: usize) -> &mut [u32] {
        let lines = len.div_ceil(LINE);
        if self.0.len() < lines {
            self.0.resize(lines, Line([0; LINE]));
        }
        // SAFETY: a Line is 16 u32 without padding, and there are enough of them.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }

    /// A pointer to the first cell; valid for the requested number of cells.
    pub(super) fn as_ptr(&self) -> *const u32 {
        self.0.as_ptr().cast()
    }
}

/// The buffers of a task.
#[derive(Default)]
pub(super) struct Scratch {
    /// Packed rows of the left operand.
    pub(super) left: CellBuffer,
    /// Packed panels of the right operand.
    pub(super) right: CellBuffer,
    /// f32 sums of a bf16 result between blocks of the inner dimension.
    pub(super) sums: CellBuffer,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Runs `work`, which must not multiply matrices itself, with this thread's memory.
pub(super) fn with_scratch<R>(work: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with_borrow_mut(work)
}
