//! Matrices in main memory, recycled through a pool so that a step after the first allocates nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{Dtype, Shape};

/// Buffers that no tensor uses, by capacity.
///
/// Fresh memory costs a page fault for every 4 KiB, and a training step would touch gigabytes of it
/// anew each time; a recycled buffer costs nothing.
#[derive(Default)]
pub(super) struct BufferPool {
    free: Mutex<HashMap<usize, Vec<Vec<f32>>>>,
}

impl BufferPool {
    /// A buffer of `len` elements whose contents are left over from earlier use.
    fn take(&self, len: usize) -> Vec<f32> {
        let capacity = size_class(len);
        let recycled = self.lock().get_mut(&capacity).and_then(Vec::pop);
        match recycled {
            Some(mut buffer) => {
                buffer.resize(len, 0.0);
                buffer
            }
            None => {
                let mut buffer = vec![0.0; capacity];
                buffer.truncate(len);
                buffer
            }
        }
    }

    fn put(&self, buffer: Vec<f32>) {
        if buffer.capacity() > 0 {
            self.lock().entry(size_class(buffer.capacity())).or_default().push(buffer);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Vec<Vec<f32>>>> {
        // A panic elsewhere cannot leave the map half-changed.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Rounds up so that batches of slightly different lengths share buffers: at most 1/8 is wasted.
fn size_class(len: usize) -> usize {
    let grain = (len.next_power_of_two() / 16).max(64);
    len.div_ceil(grain) * grain
}

/// A row-major `[rows, cols]` matrix of f32 in main memory.
pub struct CpuTensor {
    data: Vec<f32>,
    rows: usize,
    cols: usize,
    pool: Arc<BufferPool>,
}

impl CpuTensor {
    /// A matrix with unspecified (but initialised) contents, for kernels that write every element.
    pub(super) fn unspecified(pool: &Arc<BufferPool>, rows: usize, cols: usize) -> Self {
        CpuTensor { data: pool.take(rows * cols), rows, cols, pool: Arc::clone(pool) }
    }

    pub(super) fn as_slice(&self) -> &[f32] {
        &self.data
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for CpuTensor {
    fn drop(&mut self) {
        self.pool.put(std::mem::take(&mut self.data));
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
        Dtype::F32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_used_again() {
        let pool = Arc::new(BufferPool::default());
        let first = CpuTensor::unspecified(&pool, 10, 100);
        let address = first.as_slice().as_ptr();
        drop(first);
        let second = CpuTensor::unspecified(&pool, 10, 101);
        assert_eq!(second.as_slice().as_ptr(), address);
        assert_eq!(second.as_slice().len(), 1010);
    }

    #[test]
    fn a_size_class_is_its_own_class() {
        for len in [1, 63, 64, 65, 1000, 4097, 1 << 20, (1 << 20) + 1] {
            let class = size_class(len);
            assert!(class >= len && class <= len + len / 8 + 64, "{len} -> {class}");
            assert_eq!(size_class(class), class);
        }
    }
}
