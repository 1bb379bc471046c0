//! Memory of the device: one growing range of addresses. [`OffsetAllocator`] computes the offsets of buffers,
//! both here and in the memory prediction.
//!
//! The memory of a dropped buffer can be reused at once, although the device may not have reached its last use:
//! all work is on one stream, so the next use of the memory runs after the last one. No memory is released to
//! the driver before the backend is dropped, and no operation waits for the device.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys as cu;

use super::driver::{Context, check, error};
use crate::Result;
use crate::backend::OffsetAllocator;

/// Alignment of every buffer in bytes: matrix products of cuBLASLt are fastest with it.
pub(super) const ALIGNMENT: usize = 256;
/// Bytes per unit of the offset allocator, which aligns offsets to 64 units.
const UNIT: usize = ALIGNMENT / 64;
/// The range grows by multiples of this many bytes.
const GROWTH: usize = 64 << 20;

/// The device's memory as this backend uses it.
pub(super) struct Memory {
    context: Arc<Context>,
    state: Mutex<State>,
}

enum State {
    /// One range of addresses; memory is mapped from its start.
    Range(MappedRange),
    /// The stream-ordered pool of the driver, if memory cannot be mapped.
    Pool,
}

struct MappedRange {
    base: u64,
    reserved: usize,
    mapped: usize,
    /// Handle and bytes of each mapped part, contiguous from `base`.
    parts: Vec<(cu::CUmemGenericAllocationHandle, usize)>,
    granularity: usize,
    offsets: OffsetAllocator,
}

impl Memory {
    /// Memory without allocations. `LLARA_CUDA_ALLOCATOR=pool` selects the driver's pool.
    pub(super) fn new(context: Arc<Context>) -> Result<Arc<Self>> {
        use cu::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED as MAPS;
        let wants_pool = std::env::var_os("LLARA_CUDA_ALLOCATOR").is_some_and(|v| v == "pool");
        let range =
            if wants_pool || !context.has(MAPS) { None } else { MappedRange::reserve(&context)? };
        let state = match range {
            Some(range) => State::Range(range),
            None => {
                keep_pooled_memory(&context)?;
                State::Pool
            }
        };
        Ok(Arc::new(Memory { context, state: Mutex::new(state) }))
    }

    /// Memory with unspecified contents.
    pub(super) fn allocate(self: &Arc<Self>, bytes: usize) -> Result<Buffer> {
        self.context.enter()?;
        let pointer = match &mut *self.lock() {
            State::Range(range) => range.allocate(&self.context, bytes)?,
            State::Pool => {
                let mut pointer = 0;
                // SAFETY: writes a pointer that `free` releases.
                let result = unsafe {
                    cu::cuMemAllocAsync(&mut pointer, bytes.max(1), self.context.stream())
                };
                check(result, &format!("allocate {bytes} bytes of GPU memory"))?;
                pointer
            }
        };
        Ok(Buffer { memory: self.clone(), pointer, bytes })
    }

    fn free(&self, pointer: u64, bytes: usize) {
        match &mut *self.lock() {
            State::Range(range) => range.free(pointer, bytes),
            State::Pool => {
                // A failure cannot be reported here; the memory is then leaked.
                let _ = self.context.enter();
                // SAFETY: allocated from the same pool, and freed once.
                let _ = unsafe { cu::cuMemFreeAsync(pointer, self.context.stream()) };
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in another thread cannot leave the state partially updated.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _ = self.context.synchronize();
        if let State::Range(range) = &mut *self.lock() {
            range.release();
        }
    }
}

impl MappedRange {
    /// Reserves addresses for all memory of the device and for fragmentation; `None` if the driver refuses.
    fn reserve(context: &Context) -> Result<Option<Self>> {
        context.enter()?;
        let mut granularity = 0;
        let properties = properties(context);
        use cu::CUmemAllocationGranularity_flags_enum::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED as BEST;
        // SAFETY: writes one number.
        let result =
            unsafe { cu::cuMemGetAllocationGranularity(&mut granularity, &properties, BEST) };
        if check(result, "map memory").is_err() || granularity == 0 {
            return Ok(None);
        }
        let reserved = (2 * context.total_memory).next_multiple_of(granularity);
        let mut base = 0;
        // SAFETY: writes the address of a range that `release` releases.
        let result = unsafe { cu::cuMemAddressReserve(&mut base, reserved, 0, 0, 0) };
        if check(result, "reserve addresses").is_err() {
            return Ok(None);
        }
        let mut range = MappedRange {
            base,
            reserved,
            mapped: 0,
            parts: Vec::new(),
            granularity,
            offsets: OffsetAllocator::default(),
        };
        // Some drivers reserve addresses and then cannot map memory.
        if range.grow(context, 1).is_err() {
            range.release();
            return Ok(None);
        }
        Ok(Some(range))
    }

    fn allocate(&mut self, context: &Context, bytes: usize) -> Result<u64> {
        let units = bytes.div_ceil(UNIT);
        let offset = self.offsets.allocate(units);
        let end = self.offsets.end() * UNIT;
        if end > self.mapped
            && let Err(cause) = self.grow(context, end)
        {
            self.offsets.free(offset, units);
            let allocated = self.offsets.allocated() * UNIT;
            let (free, total) = context.memory_info()?;
            return Err(cause.expected(format!("{} free", mebibytes(bytes))).got(format!(
                "{} in use by this process, {} free of {}",
                mebibytes(allocated),
                mebibytes(free),
                mebibytes(total)
            )));
        }
        Ok(self.base + (offset * UNIT) as u64)
    }

    fn free(&mut self, pointer: u64, bytes: usize) {
        self.offsets.free((pointer - self.base) as usize / UNIT, bytes.div_ceil(UNIT));
    }

    /// Maps memory up to `end` at least.
    fn grow(&mut self, context: &Context, end: usize) -> Result<()> {
        let step = GROWTH.max(self.granularity);
        // Less than a whole step if the device has less memory left.
        let result = self.map(context, (end - self.mapped).next_multiple_of(step));
        if result.is_ok() {
            return result;
        }
        self.map(context, (end - self.mapped).next_multiple_of(self.granularity))
    }

    fn map(&mut self, context: &Context, bytes: usize) -> Result<()> {
        let bytes = bytes.next_multiple_of(self.granularity);
        if self.mapped + bytes > self.reserved {
            return Err(error(
                "CUDA: cannot allocate GPU memory: the range of addresses is used up",
            ));
        }
        let properties = properties(context);
        let mut handle = 0;
        // SAFETY: writes a handle that `release` or the code below releases.
        let result = unsafe { cu::cuMemCreate(&mut handle, bytes, &properties, 0) };
        check(result, &format!("take {} of GPU memory", mebibytes(bytes)))?;
        let at = self.base + self.mapped as u64;
        let access = cu::CUmemAccessDesc {
            location: properties.location,
            flags: cu::CUmemAccess_flags_enum::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
        };
        // SAFETY: the addresses are reserved and not mapped yet.
        let result = check(unsafe { cu::cuMemMap(at, bytes, 0, handle, 0) }, "map GPU memory");
        let result = result.and_then(|()| {
            // SAFETY: just mapped.
            let result = unsafe { cu::cuMemSetAccess(at, bytes, &access, 1) };
            check(result, "get access to GPU memory").inspect_err(|_| {
                // SAFETY: just mapped, and not used yet.
                let _ = unsafe { cu::cuMemUnmap(at, bytes) };
            })
        });
        if let Err(e) = result {
            // SAFETY: created above, and not mapped.
            let _ = unsafe { cu::cuMemRelease(handle) };
            return Err(e);
        }
        self.parts.push((handle, bytes));
        self.mapped += bytes;
        Ok(())
    }

    fn release(&mut self) {
        let mut at = self.base;
        for (handle, bytes) in self.parts.drain(..) {
            // SAFETY: mapped by `map` at this address; the device has finished.
            unsafe {
                let _ = cu::cuMemUnmap(at, bytes);
                let _ = cu::cuMemRelease(handle);
            }
            at += bytes as u64;
        }
        // SAFETY: reserved by `reserve`, and nothing is mapped any more.
        let _ = unsafe { cu::cuMemAddressFree(self.base, self.reserved) };
        self.mapped = 0;
    }
}

/// Properties of ordinary device memory.
fn properties(context: &Context) -> cu::CUmemAllocationProp {
    // SAFETY: a struct of numbers and pointers, for which all zeros is a value.
    let mut properties: cu::CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = cu::CUmemAllocationType_enum::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type_ = cu::CUmemLocationType_enum::CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = context.device();
    properties
}

/// Freed memory stays in the pool of the driver, so that it can be allocated again without cost.
fn keep_pooled_memory(context: &Context) -> Result<()> {
    context.enter()?;
    let mut pool = std::ptr::null_mut();
    // SAFETY: writes a handle of the device's own pool.
    let result = unsafe { cu::cuDeviceGetDefaultMemPool(&mut pool, context.device()) };
    check(result, "find the memory pool")?;
    let mut threshold = u64::MAX;
    use cu::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD as THRESHOLD;
    // SAFETY: this attribute is a u64, which is read before the call returns.
    let result = unsafe {
        cu::cuMemPoolSetAttribute(pool, THRESHOLD, std::ptr::from_mut(&mut threshold).cast())
    };
    check(result, "set up the memory pool")
}

fn mebibytes(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Memory of the device with one owner.
pub(super) struct Buffer {
    memory: Arc<Memory>,
    pointer: u64,
    bytes: usize,
}

impl Buffer {
    /// Its address on the device.
    pub(super) fn pointer(&self) -> u64 {
        self.pointer
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory.free(self.pointer, self.bytes);
    }
}
