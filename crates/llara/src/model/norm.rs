//! RMS norm (Zhang and Sennrich 2019) with a trainable weight.

use super::parameter::Parameter;
use crate::Result;
use crate::backend::{Backend, Dtype, View, ViewMut};

/// Weight `[g]`; normalizes rows in groups of g columns (whole rows, or heads).
pub(crate) struct RmsNorm<B: Backend> {
    pub(crate) weight: Parameter<B>,
    pub(crate) eps: f32,
}

/// `1 / rms` of every group, `[n, cols / g]`.
pub(crate) struct SavedNorm<B: Backend> {
    inv_rms: B::Tensor,
}

impl<B: Backend> RmsNorm<B> {
    /// `y = x / rms(x) · w`, in `dtype`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: View<'_, B::Tensor>,
        dtype: Dtype,
    ) -> Result<(B::Tensor, SavedNorm<B>)> {
        let (y, inv_rms) = backend.rms_norm(x, self.weight.values(), self.eps, dtype)?;
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
        let (weight, dw) = self.weight.values_and_grad(backend)?;
        backend.rms_norm_backward(dy, x, weight, &saved.inv_rms, dw, onto)
    }

    /// The same; dx overwrites dy.
    pub(crate) fn backward_in_place(
        &mut self,
        backend: &B,
        dy: ViewMut<'_, B::Tensor>,
        x: View<'_, B::Tensor>,
        saved: &SavedNorm<B>,
    ) -> Result<()> {
        let (weight, dw) = self.weight.values_and_grad(backend)?;
        backend.rms_norm_backward_in_place(dy, x, weight, &saved.inv_rms, dw)
    }
}
