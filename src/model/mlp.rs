//! The gated MLP: `down(silu(gate(x)) ∘ up(x))`.

use super::linear::Linear;
use super::parameter::Parameter;
use crate::Result;
use crate::backend::Backend;

pub(crate) struct Mlp<B: Backend> {
    pub(crate) gate: Linear<B>,
    pub(crate) up: Linear<B>,
    pub(crate) down: Linear<B>,
}

/// All `[T, intermediate]`.
pub(crate) struct SavedMlp<B: Backend> {
    gate: B::Tensor,
    up: B::Tensor,
    /// `silu(gate) ∘ up`
    hidden: B::Tensor,
}

impl<B: Backend> Mlp<B> {
    /// x and residual `[T, d]`; returns `residual + mlp(x)`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        residual: &B::Tensor,
    ) -> Result<(B::Tensor, SavedMlp<B>)> {
        let gate = self.gate.forward(backend, x, None)?;
        let up = self.up.forward(backend, x, None)?;
        let hidden = backend.swiglu(&gate, &up)?;
        let y = self.down.forward(backend, &hidden, Some(residual))?;
        Ok((y, SavedMlp { gate, up, hidden }))
    }

    /// Gradient by x alone; the residual's is dy itself.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: &SavedMlp<B>,
    ) -> Result<B::Tensor> {
        let dhidden = self.down.backward(backend, dy, &saved.hidden, None)?;
        let (dgate, dup) = backend.swiglu_backward(&dhidden, &saved.gate, &saved.up)?;
        let dx = self.gate.backward(backend, &dgate, x, None)?;
        self.up.backward(backend, &dup, x, Some(dx))
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        [&self.gate, &self.up, &self.down].into_iter().flat_map(Linear::parameters)
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        [&mut self.gate, &mut self.up, &mut self.down].into_iter().flat_map(Linear::parameters_mut)
    }
}
