//! A linear layer: `y = x · Wᵀ (+ b)`, with an adapter beside it where one is attached.

use super::lora::{Lora, SavedLora};
use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::backend::Backend;

/// Weight `[out, in]` and an optional bias `[out]`.
pub(crate) struct Linear<B: Backend> {
    pub(crate) weight: Parameter<B>,
    pub(crate) bias: Option<Parameter<B>>,
    pub(crate) lora: Option<Lora<B>>,
}

/// What the adapter's backward pass needs; the layer itself needs only its input.
pub(crate) struct SavedLinear<B: Backend>(Option<SavedLora<B>>);

impl<B: Backend> Linear<B> {
    /// `x · Wᵀ (+ b) (+ residual)`: x `[n, in]`, result `[n, out]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        residual: Option<&B::Tensor>,
    ) -> Result<(B::Tensor, SavedLinear<B>)> {
        let bias = self.bias.as_ref().map(Parameter::value);
        let y = pass.backend.linear(x, self.weight.value(), bias, residual)?;
        match &self.lora {
            Some(lora) => {
                let (y, saved) = lora.forward(pass, x, y)?;
                Ok((y, SavedLinear(Some(saved))))
            }
            None => Ok((y, SavedLinear(None))),
        }
    }

    /// `dW += dyᵀ · x`, `db += Σ dy` where they learn; returns `dx = dy · W (+ onto)`.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: SavedLinear<B>,
        onto: Option<B::Tensor>,
    ) -> Result<B::Tensor> {
        let backend = pass.backend;
        let (weight, dw) = self.weight.value_and_any_grad(backend)?;
        if let Some((dw, gather)) = dw {
            backend.linear_weight_grad(dy, x, dw, gather)?;
        }
        let dx = backend.linear_input_grad(dy, weight, onto)?;
        if let Some(bias) = &mut self.bias
            && let (_, Some(db)) = bias.value_and_grad(backend)?
        {
            backend.linear_bias_grad(dy, db)?;
        }
        match (&mut self.lora, saved.0) {
            (Some(lora), Some(saved)) => lora.backward(pass, dy, x, saved, dx),
            _ => Ok(dx),
        }
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        std::iter::once(&self.weight)
            .chain(&self.bias)
            .chain(self.lora.iter().flat_map(Lora::parameters))
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        std::iter::once(&mut self.weight)
            .chain(&mut self.bias)
            .chain(self.lora.iter_mut().flat_map(Lora::parameters_mut))
    }
}
