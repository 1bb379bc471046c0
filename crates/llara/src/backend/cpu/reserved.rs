//! One range of addresses, of which the blocks of an arena are raw pointers. No reference to the whole range is created,
//! because it would alias the blocks.

#[cfg(not(miri))]
pub(super) use mapped::Reserved;
#[cfg(miri)]
pub(super) use on_heap::Reserved;

#[cfg(not(miri))]
mod mapped {
    use memmap2::{MmapOptions, MmapRaw};

    pub(in crate::backend::cpu) struct Reserved(MmapRaw);

    impl Reserved {
        pub(in crate::backend::cpu) fn new(length: usize) -> std::io::Result<Self> {
            if length > isize::MAX as usize {
                return Err(std::io::ErrorKind::OutOfMemory.into());
            }
            let memory = MmapOptions::new().len(length).no_reserve_swap().map_anon()?;
            // Requests huge pages; the system may ignore this.
            #[cfg(target_os = "linux")]
            let _ = memory.advise(memmap2::Advice::HugePage);
            Ok(Reserved(MmapRaw::from(memory)))
        }

        pub(in crate::backend::cpu) fn start(&self) -> *mut u8 {
            self.0.as_mut_ptr()
        }

        pub(in crate::backend::cpu) fn len(&self) -> usize {
            self.0.len()
        }

        /// Returns the physical memory of a range to the system, if that takes it. Its contents are zeros afterwards, or
        /// what they were.
        ///
        /// # Safety
        /// No reference to the range exists, and its contents are not needed.
        pub(in crate::backend::cpu) unsafe fn discard(&self, offset: usize, length: usize) {
            // Elsewhere the contents would be undefined after this.
            #[cfg(target_os = "linux")]
            // SAFETY: as required from the caller; anonymous private pages are zeros after MADV_DONTNEED.
            let _ = unsafe {
                self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, length)
            };
            #[cfg(not(target_os = "linux"))]
            let _ = (offset, length);
        }
    }
}

/// The same on the heap, for Miri, which does not support memory mapping.
#[cfg(miri)]
mod on_heap {
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    pub(in crate::backend::cpu) struct Reserved {
        start: *mut u8,
        layout: Layout,
    }

    // SAFETY: this value is the only owner of the memory, and its pointer is only copied.
    unsafe impl Send for Reserved {}

    impl Reserved {
        pub(in crate::backend::cpu) fn new(length: usize) -> std::io::Result<Self> {
            let none = || std::io::Error::from(std::io::ErrorKind::OutOfMemory);
            let layout = Layout::from_size_align(length, 64).map_err(|_| none())?;
            if length > 1 << 30 {
                return Err(none());
            }
            // SAFETY: the length is at least RESERVED, so it is not zero.
            let start = unsafe { alloc_zeroed(layout) };
            if start.is_null() { Err(none()) } else { Ok(Reserved { start, layout }) }
        }

        pub(in crate::backend::cpu) fn start(&self) -> *mut u8 {
            self.start
        }

        pub(in crate::backend::cpu) fn len(&self) -> usize {
            self.layout.size()
        }

        pub(in crate::backend::cpu) unsafe fn discard(&self, _: usize, _: usize) {}
    }

    impl Drop for Reserved {
        fn drop(&mut self) {
            // SAFETY: allocated in `new` with this layout; blocks keep the arena alive.
            unsafe { dealloc(self.start, self.layout) };
        }
    }
}
