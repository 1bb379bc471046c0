//! A linear layer: `y = x · Wᵀ (+ b)`.

use super::parameter::Parameter;
use crate::Result;
use crate::backend::Backend;

/// Weight `[out, in]` and an optional bias `[out]`.
pub(crate) struct Linear<B: Backend> {
    pub(crate) weight: Parameter<B>,
    pub(crate) bias: Option<Parameter<B>>,
}

impl<B: Backend> Linear<B> {
    /// `x · Wᵀ (+ b) (+ residual)`: x `[n, in]`, result `[n, out]`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        residual: Option<&B::Tensor>,
    ) -> Result<B::Tensor> {
        let bias = self.bias.as_ref().map(Parameter::value);
        backend.linear(x, self.weight.value(), bias, residual)
    }

    /// `dW += dyᵀ · x`, `db += Σ dy`; returns `dx = dy · W (+ onto)`.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        dy: &B::Tensor,
        x: &B::Tensor,
        onto: Option<B::Tensor>,
    ) -> Result<B::Tensor> {
        let (weight, dw) = self.weight.value_and_grad(backend)?;
        backend.linear_weight_grad(dy, x, dw)?;
        let dx = backend.linear_input_grad(dy, weight, onto)?;
        if let Some(bias) = &mut self.bias {
            let (_, db) = bias.value_and_grad(backend)?;
            backend.linear_bias_grad(dy, db)?;
        }
        Ok(dx)
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        std::iter::once(&self.weight).chain(&self.bias)
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        std::iter::once(&mut self.weight).chain(&mut self.bias)
    }
}
