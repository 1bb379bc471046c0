//! What a prediction of memory needs to know of this backend.

use super::attention::TILE_ROWS;
use super::vector::TASK_ELEMENTS;
use crate::backend::{DeviceMemory, OffsetAllocator};

/// Packed panels of three operands that each thread keeps.
const PACKED_BYTES: usize = 5 << 19;

pub(super) fn device_memory(threads: usize) -> DeviceMemory {
    DeviceMemory {
        alignment: OffsetAllocator::ALIGNMENT,
        fixed_bytes: threads * PACKED_BYTES,
        attention_state: 1,
        norm_task_elements: TASK_ELEMENTS,
        has_working_copies: false,
        // In attention each thread has a tile's scores and gradients and one head's keys and values.
        scratch_bytes: |longest, head_dim| {
            let tile = 4 * TILE_ROWS * (longest + head_dim);
            4 * (tile + 2 * longest * head_dim)
        },
        threads,
    }
}
