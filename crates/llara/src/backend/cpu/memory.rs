//! How this backend uses memory, for the memory prediction.

use super::attention::TILE_ROWS;
use super::vector::TASK_ELEMENTS;
use crate::backend::{DeviceMemory, OffsetAllocator};

/// Bytes of the packed panels of three operands that each thread keeps.
const PACKED_BYTES: usize = 5 << 19;

pub(super) fn device_memory(threads: usize) -> DeviceMemory {
    DeviceMemory {
        alignment: OffsetAllocator::ALIGNMENT,
        fixed_bytes: threads * PACKED_BYTES,
        attention_state: 1,
        norm_task_elements: TASK_ELEMENTS,
        has_working_copies: false,
        // In attention, each thread stores the scores and gradients of a tile, and dk and dv of one head.
        scratch_bytes: |longest, head_dim| {
            let tile = 4 * TILE_ROWS * (longest + head_dim);
            4 * (tile + 2 * longest * head_dim)
        },
        threads,
    }
}
