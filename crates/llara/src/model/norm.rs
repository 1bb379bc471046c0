//! RMS norm (Zhang and Sennrich 2019) with a learned weight.

use super::parameter::Parameter;
use crate::Result;
use crate::backend::{Backend, Dtype};

/// Weight `[g]`; normalises rows in groups of g columns (whole rows, or heads).
pub(crate) struct RmsNorm<B: Backend> {
    pub(crate) weight: Parameter<B>,
    pub(crate) eps: f32,
}

/// `1 / rms` of every group, `[n, cols / g]`.
pub(crate) struct SavedNorm<B: Backend> {
    inv_rms: B::Tensor,
}

impl<B: Backend> RmsNorm<B> {
    /// `y = x / rms(x) · w`, in the dtype `to`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        to: Dtype,
    ) -> Result<(B::Tensor, SavedNorm<B>)> {
        let (y, inv_rms) = backend.rms_norm(x, self.weight.value(), self.eps, to)?;
        Ok((y, SavedNorm { inv_rms }))
    }

    /// `dw += Σ dy ∘ x / rms`; returns dx (+ onto). x is the forward pass's input.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: &SavedNorm<B>,
        onto: Option<B::Tensor>,
    ) -> Result<B::Tensor> {
        let (weight, dw) = self.weight.value_and_grad(backend)?;
        backend.rms_norm_backward(dy, x, weight, &saved.inv_rms, dw, onto)
    }
}
