//! The gated MLP: `down(silu(gate(x)) ∘ up(x))`.

use super::linear::{Linear, SavedLinear};
use super::parameter::Parameter;
use super::pass::Pass;
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
    /// Of gate, up and down.
    linears: [SavedLinear<B>; 3],
}

impl<B: Backend> Mlp<B> {
    /// x and residual `[T, d]`; returns `residual + mlp(x)`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        residual: &B::Tensor,
    ) -> Result<(B::Tensor, SavedMlp<B>)> {
        let (gate, saved_gate) = self.gate.forward(pass, x, None)?;
        let (up, saved_up) = self.up.forward(pass, x, None)?;
        let hidden = pass.backend.swiglu(&gate, &up)?;
        let (y, saved_down) = self.down.forward(pass, &hidden, Some(residual))?;
        Ok((y, SavedMlp { gate, up, linears: [saved_gate, saved_up, saved_down] }))
    }

    /// Gradient by x alone; the residual's is dy itself.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: SavedMlp<B>,
    ) -> Result<B::Tensor> {
        let SavedMlp { gate, up, linears: [saved_gate, saved_up, saved_down] } = saved;
        // `silu(gate) ∘ up` again: cheaper than to keep the widest matrix of the layer a third time.
        let hidden = pass.backend.swiglu(&gate, &up)?;
        let dhidden = self.down.backward(pass, dy, &hidden, saved_down, None)?;
        let (dgate, dup) = pass.backend.swiglu_backward(&dhidden, &gate, &up)?;
        let dx = self.gate.backward(pass, &dgate, x, saved_gate, None)?;
        self.up.backward(pass, &dup, x, saved_up, Some(dx))
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        [&self.gate, &self.up, &self.down].into_iter().flat_map(Linear::parameters)
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        [&mut self.gate, &mut self.up, &mut self.down].into_iter().flat_map(Linear::parameters_mut)
    }
}
