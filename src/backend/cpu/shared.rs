//! A slice that several tasks write at places that do not overlap.

use std::marker::PhantomData;

/// A mutable slice handed to parallel tasks, each of which promises to keep to its own elements.
///
/// Rayon splits slices into contiguous chunks; heads of an attention and column blocks are strided,
/// so no chunking describes them.
pub(super) struct SharedSlice<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: the pointer is only dereferenced through `slice_mut`, whose callers promise that no two
// tasks touch the same element.
unsafe impl Sync for SharedSlice<'_> {}
// SAFETY: as above; the borrow keeps the memory alive and otherwise unused.
unsafe impl Send for SharedSlice<'_> {}

impl<'a> SharedSlice<'a> {
    pub(super) fn new(slice: &'a mut [f32]) -> Self {
        SharedSlice { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// While the result lives, no other slice of these elements may exist.
    #[expect(clippy::mut_from_ref, reason = "that is the purpose; see Safety")]
    pub(super) unsafe fn slice_mut(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.len, "shared slice out of bounds");
        // SAFETY: in bounds by the assert; unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
