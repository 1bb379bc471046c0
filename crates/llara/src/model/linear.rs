//! A linear layer: `y = x · Wᵀ (+ b)`, with an optional adapter.

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

    /// [`backward_weights`](Self::backward_weights); returns `dx = dy · W (+ onto)`.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: SavedLinear<B>,
        onto: Option<B::Tensor>,
    ) -> Result<B::Tensor> {
        let dhidden = self.backward_weights(pass, dy, x, saved)?;
        let dx = pass.backend.linear_input_grad(dy, self.weight.value(), onto)?;
        match (&self.lora, dhidden) {
            (Some(lora), Some(dhidden)) => lora.backward_input(pass, &dhidden, dx),
            _ => Ok(dx),
        }
    }

    /// `dW += dyᵀ · x`, `db += Σ dy` if trainable; returns the gradient inside the adapter, if there is
    /// one. This is the whole backward pass if no parameter below is trainable.
    pub(crate) fn backward_weights(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: SavedLinear<B>,
    ) -> Result<Option<B::Tensor>> {
        let backend = pass.backend;
        if let (_, Some((dw, accumulate))) = self.weight.value_and_any_grad(backend)? {
            backend.linear_weight_grad(dy, x, dw, accumulate)?;
        }
        if let Some(bias) = &mut self.bias
            && let (_, Some(db)) = bias.value_and_grad(backend)?
        {
            backend.linear_bias_grad(dy, db)?;
        }
        match (&mut self.lora, saved.0) {
            (Some(lora), Some(saved)) => lora.backward_weights(pass, dy, x, saved).map(Some),
            _ => Ok(None),
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
