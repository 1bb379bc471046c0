//! The gated MLP: `down(silu(gate(x)) ∘ up(x))`.

use super::linear::{Linear, SavedLinear};
use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::backend::Backend;

pub(crate) struct Mlp<B: Backend> {
    /// gate and up, computed by one product.
    pub(crate) gate_up: Linear<B>,
    pub(crate) down: Linear<B>,
}

pub(crate) struct SavedMlp<B: Backend> {
    /// gate and up concatenated by columns. `[T, 2 · intermediate]`
    gate_up: B::Tensor,
    saved_gate_up: SavedLinear<B>,
    saved_down: SavedLinear<B>,
}

impl<B: Backend> Mlp<B> {
    /// x and residual `[T, d]`; returns `residual + mlp(x)`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        residual: &B::Tensor,
    ) -> Result<(B::Tensor, SavedMlp<B>)> {
        let (gate_up, saved_gate_up) = self.gate_up.forward(pass, x, self.gate_up.all(), None)?;
        let hidden = pass.backend.swiglu(&gate_up)?;
        let (y, saved_down) = self.down.forward(pass, &hidden, self.down.all(), Some(residual))?;
        Ok((y, SavedMlp { gate_up, saved_gate_up, saved_down }))
    }

    /// Gradient with respect to x; the gradient of the residual is dy.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: SavedMlp<B>,
    ) -> Result<B::Tensor> {
        let SavedMlp { gate_up, saved_gate_up, saved_down } = saved;
        let (dhidden, inner) = self.down.backward_input(pass, dy, self.down.all(), None)?;
        // Recomputes `silu(gate) ∘ up`, which is cheaper than storing it.
        let (dgate_up, hidden) = pass.backend.swiglu_backward(dhidden, gate_up)?;
        self.down.backward_weights(pass, dy, &hidden, self.down.all(), (saved_down, inner))?;
        drop(hidden);
        let all = self.gate_up.all();
        let (dx, inner) = self.gate_up.backward_input(pass, &dgate_up, all.clone(), None)?;
        self.gate_up.backward_weights(pass, &dgate_up, x, all, (saved_gate_up, inner))?;
        Ok(dx)
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        [&self.gate_up, &self.down].into_iter().flat_map(Linear::parameters)
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        [&mut self.gate_up, &mut self.down].into_iter().flat_map(Linear::parameters_mut)
    }
}
