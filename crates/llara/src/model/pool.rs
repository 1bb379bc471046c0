//! From hidden states to one embedding per sequence: the mean over its pooled tokens.

use super::input::Input;
use crate::Result;
use crate::backend::Backend;

/// Mean of each sequence's pooled rows: hidden `[R, d]` → `[S, d]`.
pub fn mean_pool<B: Backend>(
    backend: &B,
    hidden: &B::Tensor,
    input: &Input<B>,
) -> Result<B::Tensor> {
    backend.segment_mean(hidden, &input.pooled.layout.offsets)
}

/// Gradient of [`mean_pool`]: `[S, d]` → `[R, d]`.
pub(crate) fn mean_pool_backward<B: Backend>(
    backend: &B,
    dembeddings: &B::Tensor,
    input: &Input<B>,
) -> Result<B::Tensor> {
    backend.segment_mean_backward(
        dembeddings,
        &input.pooled.layout.offsets,
        input.pooled.layout.rows(),
    )
}
