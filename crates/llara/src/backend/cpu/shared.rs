//! A slice that several tasks write, each in its own elements.

use std::marker::PhantomData;

/// A mutable slice for parallel tasks; each task must access only its own elements.
///
/// Rayon splits slices into contiguous chunks; attention heads and blocks of columns are strided, so they are
/// not chunks.
pub(super) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer is only dereferenced through `slice_mut`, whose callers guarantee that no two
// tasks access the same element.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}
// SAFETY: as above; the borrow keeps the memory alive and otherwise unused.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        SharedSlice { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// During the lifetime of the result, no other slice of these elements may exist.
    #[expect(clippy::mut_from_ref, reason = "that is the purpose; see Safety")]
    pub(super) unsafe fn slice_mut(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "shared slice out of bounds");
        // SAFETY: in bounds by the assert; not aliased, as guaranteed by the caller.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
