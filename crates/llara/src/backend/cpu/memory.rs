//! How this backend uses memory, for the memory prediction.

use super::attention::TILE_ROWS;
use super::gemm;
use super::vector::TASK_ELEMENTS;
use crate::backend::{DeviceMemory, Dtype, KernelSizes, OffsetAllocator};

/// Bytes of the packed panels of three operands that each thread keeps.
const PACKED_BYTES: usize = 5 << 19;

pub(super) fn device_memory(threads: usize) -> DeviceMemory {
    DeviceMemory {
        alignment: OffsetAllocator::ALIGNMENT,
        fixed_bytes: threads * PACKED_BYTES,
        attention_state: 1,
        norm_task_elements: TASK_ELEMENTS,
        has_working_copies: false,
        scratch_bytes: |&KernelSizes { rows, longest, head_dim, activations }| {
            // In attention, each thread stores the scores and gradients of a tile, and dk and dv of one head.
            let tile = 4 * TILE_ROWS * (longest + head_dim);
            let attention = 4 * (tile + 2 * longest * head_dim);
            let sums = if activations == Dtype::Bf16 { gemm::sum_bytes(rows) } else { 0 };
            attention + sums
        },
        threads,
    }
}
