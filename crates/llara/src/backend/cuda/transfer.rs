//! Copies between the host and the device, through pinned memory if the host must not wait.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys as cu;
use half::bf16;

use super::driver::{Context, Event, Pinned, check};
use super::memory::Memory;
use super::tensor::{Block, CudaIndex};
use crate::Result;
use crate::backend::{Dtype, Elements};

/// Pinned memory that is kept for later transfers, in bytes; memory beyond this is released.
const KEPT_BYTES: usize = 256 << 20;
/// Lists of indices start at multiples of this many elements, which are 256 bytes.
const INDEX_ALIGNMENT: usize = 64;

/// Pinned buffers: free ones, and those that the device is still reading.
pub(super) struct Staging {
    context: Arc<Context>,
    state: Mutex<StagingState>,
}

#[derive(Default)]
struct StagingState {
    free: Vec<Pinned>,
    /// With the event after the copy that reads them, oldest first.
    in_flight: Vec<(Pinned, Event)>,
}

impl Staging {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Staging { context, state: Mutex::default() }
    }

    /// A buffer that the device does not read.
    fn take(&self, bytes: usize) -> Result<Pinned> {
        let mut state = self.lock();
        while let Some((_, event)) = state.in_flight.first() {
            if !event.is_reached()? {
                break;
            }
            let (pinned, _) = state.in_flight.remove(0);
            state.keep(pinned);
        }
        let fits = |pinned: &Pinned| pinned.capacity() >= bytes;
        let smallest = (0..state.free.len())
            .filter(|&i| fits(&state.free[i]))
            .min_by_key(|&i| state.free[i].capacity());
        match smallest {
            Some(i) => Ok(state.free.swap_remove(i)),
            // A power of two, so that steps of different lengths need few sizes.
            None => Pinned::new(&self.context, bytes.next_power_of_two().max(4096)),
        }
    }

    /// Keeps a buffer until the device has read it.
    fn lend(&self, pinned: Pinned) -> Result<()> {
        let event = Event::new(&self.context)?;
        self.context.record(&event)?;
        self.lock().in_flight.push((pinned, event));
        Ok(())
    }

    fn put(&self, pinned: Pinned) {
        self.lock().keep(pinned);
    }

    fn lock(&self) -> MutexGuard<'_, StagingState> {
        // A panic in another thread cannot leave the lists partially updated.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StagingState {
    fn keep(&mut self, pinned: Pinned) {
        let kept: usize = self.free.iter().map(Pinned::capacity).sum();
        if kept + pinned.capacity() <= KEPT_BYTES {
            self.free.push(pinned);
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Buffers in flight may be freed only when the device has read them.
        let _ = self.context.synchronize();
    }
}

/// A pending copy of a matrix to the host.
pub struct CudaDownload {
    /// Taken when the download is finished.
    pinned: Option<Pinned>,
    event: Event,
    len: usize,
    dtype: Dtype,
}

impl Drop for CudaDownload {
    fn drop(&mut self) {
        if self.pinned.is_some() {
            // The device may still be writing to it.
            let _ = self.event.wait();
        }
    }
}

/// Uploads all lists in one copy, without waiting for it.
pub(super) fn upload_indices<const N: usize>(
    context: &Context,
    memory: &Arc<Memory>,
    staging: &Staging,
    lists: [&[u32]; N],
) -> Result<[CudaIndex; N]> {
    let mut offsets = [0; N];
    let mut end = 0;
    for (offset, list) in offsets.iter_mut().zip(lists) {
        *offset = 4 * end;
        end += list.len().next_multiple_of(INDEX_ALIGNMENT);
    }
    let bytes = 4 * end;
    let buffer = Arc::new(memory.allocate(bytes)?);
    if bytes > 0 {
        let mut pinned = staging.take(bytes)?;
        for (&offset, list) in offsets.iter().zip(lists) {
            let to = pinned.as_mut_slice()[offset..offset + 4 * list.len()].as_chunks_mut().0;
            to.iter_mut().zip(list).for_each(|(to, value)| *to = value.to_ne_bytes());
        }
        copy_to_device(context, buffer.pointer(), &pinned.as_slice()[..bytes])?;
        staging.lend(pinned)?;
    }
    let mut ends = offsets.iter().zip(lists);
    Ok(std::array::from_fn(|_| {
        let (&offset, list) = ends.next().expect("one offset a list");
        CudaIndex { buffer: buffer.clone(), offset, len: list.len() }
    }))
}

/// Copies elements to a block of the same dtype and shape. From pageable memory, so the driver has read
/// it when this returns.
pub(super) fn upload(context: &Context, data: Elements<'_>, to: Block) -> Result<()> {
    assert_eq!(data.dtype(), to.dtype, "upload: dtype");
    assert_eq!(data.len(), to.rows * to.cols, "upload: elements");
    if to.is_empty() {
        return Ok(());
    }
    let bytes = host_bytes(data);
    if to.rows == 1 || to.stride == to.cols {
        return copy_to_device(context, to.pointer, bytes);
    }
    let row = to.cols * to.dtype.bytes();
    let pitch = (to.stride * to.dtype.bytes()) as u64;
    for (at, row) in (0..).zip(bytes.chunks_exact(row)) {
        copy_to_device(context, to.pointer + at * pitch, row)?;
    }
    Ok(())
}

fn host_bytes(data: Elements<'_>) -> &[u8] {
    let (start, bytes) = match data {
        Elements::F32(x) => (x.as_ptr().cast::<u8>(), size_of_val(x)),
        Elements::Bf16(x) => (x.as_ptr().cast(), size_of_val(x)),
    };
    // SAFETY: numbers without padding, read as bytes for as long as they are borrowed.
    unsafe { std::slice::from_raw_parts(start, bytes) }
}

fn copy_to_device(context: &Context, to: u64, bytes: &[u8]) -> Result<()> {
    context.enter()?;
    // SAFETY: `to` is the address of a buffer with that many bytes. Pageable memory is read before the
    // call returns; pinned memory is kept by the caller until the device has read it.
    let result = unsafe {
        cu::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), context.stream())
    };
    check(result, "copy to the GPU")
}

pub(super) fn start_download(
    context: &Arc<Context>,
    staging: &Staging,
    x: Block,
) -> Result<CudaDownload> {
    assert!(x.rows <= 1 || x.stride == x.cols, "download: rows must be contiguous");
    let len = x.rows * x.cols;
    let bytes = len * x.dtype.bytes();
    let mut pinned = staging.take(bytes)?;
    if bytes > 0 {
        context.enter()?;
        // SAFETY: the tensor has that many bytes, and so has the pinned buffer, which is not read
        // before the event.
        let result = unsafe {
            cu::cuMemcpyDtoHAsync_v2(pinned.as_mut_ptr(), x.pointer, bytes, context.stream())
        };
        check(result, "copy from the GPU")?;
    }
    let event = Event::new(context)?;
    context.record(&event)?;
    Ok(CudaDownload { pinned: Some(pinned), event, len, dtype: x.dtype })
}

pub(super) fn finish_download(staging: &Staging, mut download: CudaDownload) -> Result<Vec<f32>> {
    let (len, dtype) = (download.len, download.dtype);
    download.event.wait()?;
    let Some(pinned) = download.pinned.take() else { return Ok(Vec::new()) };
    let bytes = &pinned.as_slice()[..len * dtype.bytes()];
    let mut elements = Vec::new();
    elements.try_reserve_exact(len).map_err(|e| {
        super::driver::error(format!("cannot allocate host memory for {len} elements")).because(e)
    })?;
    match dtype {
        Dtype::F32 => {
            elements.extend(bytes.as_chunks().0.iter().map(|&bytes| f32::from_ne_bytes(bytes)));
        }
        Dtype::Bf16 => {
            let narrow = bytes.as_chunks().0.iter().map(|&bytes| bf16::from_ne_bytes(bytes));
            elements.extend(narrow.map(bf16::to_f32));
        }
    }
    staging.put(pinned);
    Ok(elements)
}
