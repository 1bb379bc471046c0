//! Low-rank adapters (Hu et al. 2021): a frozen weight plus a trainable low-rank product.

use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::backend::Backend;

/// Which projections get an adapter, and its settings. The defaults are the reference's.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraConfig {
    /// Inner size of the product, `r`.
    pub rank: usize,
    /// The product is multiplied by `alpha / rank`.
    pub alpha: f64,
    /// Dropout probability of the adapter's input in training.
    pub dropout: f32,
    /// Names of projections, such as `q_proj`.
    pub target_modules: Vec<String>,
}

/// The projections of a layer, as adapter configurations name them.
pub const PROJECTIONS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

impl Default for LoraConfig {
    fn default() -> Self {
        LoraConfig {
            rank: 64,
            alpha: 16.0,
            dropout: 0.1,
            target_modules: PROJECTIONS.map(str::to_owned).to_vec(),
        }
    }
}

impl LoraConfig {
    /// Whether training draws random numbers, so that equal texts get different embeddings.
    pub fn has_dropout(&self) -> bool {
        self.dropout > 0.0
    }

    /// `alpha / rank`
    pub fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }
}

/// `y += scale · drop(x) · Aᵀ · Bᵀ` with A `[r, in]` and B `[out, r]`.
pub(crate) struct Lora<B: Backend> {
    pub(crate) a: Parameter<B>,
    pub(crate) b: Parameter<B>,
    pub(crate) scale: f32,
    pub(crate) dropout: f32,
    /// Number of this adapter in the model, for its dropout.
    pub(crate) module: u32,
}

/// `scale · drop(x) · Aᵀ`. `[T, r]`
pub(crate) struct SavedLora<B: Backend>(B::Tensor);

impl<B: Backend> Lora<B> {
    /// Adds the adapter's part to y `[T, out]`; x `[T, in]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        y: B::Tensor,
    ) -> Result<(B::Tensor, SavedLora<B>)> {
        let dropped = self.dropped(pass, x)?;
        let input = dropped.as_ref().unwrap_or(x);
        let mut hidden = pass.backend.linear(input, self.a.value(), None, None)?;
        pass.backend.scale(&mut hidden, self.scale)?;
        let y = pass.backend.linear_onto(&hidden, self.b.value(), y)?;
        Ok((y, SavedLora(hidden)))
    }

    /// With `g = scale · dy · B`: `dB += dyᵀ · hidden`, `dA += gᵀ · drop(x)`; returns g `[T, r]`.
    pub(crate) fn backward_weights(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: SavedLora<B>,
    ) -> Result<B::Tensor> {
        let backend = pass.backend;
        let dropped = self.dropped(pass, x)?;
        let (b, db) = self.b.value_and_any_grad(backend)?;
        if let Some((db, accumulate)) = db {
            backend.linear_weight_grad(dy, &saved.0, db, accumulate)?;
        }
        let mut g = backend.linear_input_grad(dy, b, None)?;
        backend.scale(&mut g, self.scale)?;
        if let (_, Some((da, accumulate))) = self.a.value_and_any_grad(backend)? {
            backend.linear_weight_grad(&g, dropped.as_ref().unwrap_or(x), da, accumulate)?;
        }
        Ok(g)
    }

    /// Adds `drop(g · A)` to dx.
    pub(crate) fn backward_input(
        &self,
        pass: &Pass<'_, B>,
        g: &B::Tensor,
        dx: B::Tensor,
    ) -> Result<B::Tensor> {
        let (backend, a) = (pass.backend, self.a.value());
        match pass.dropout.filter(|_| self.dropout > 0.0) {
            Some(dropout) => {
                let dinput = backend.linear_input_grad(g, a, None)?;
                let key = dropout.key(self.module, self.dropout);
                backend.dropout(&dinput, pass.rows.tokens(), &key, Some(dx))
            }
            None => backend.linear_input_grad(g, a, Some(dx)),
        }
    }

    /// The input after dropout; `None` if there is no dropout.
    fn dropped(&self, pass: &Pass<'_, B>, x: &B::Tensor) -> Result<Option<B::Tensor>> {
        let dropout = pass.dropout.filter(|_| self.dropout > 0.0);
        let drop = |dropout: super::pass::Dropout| {
            let key = dropout.key(self.module, self.dropout);
            pass.backend.dropout(x, pass.rows.tokens(), &key, None)
        };
        dropout.map(drop).transpose()
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        [&self.a, &self.b].into_iter()
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        [&mut self.a, &mut self.b].into_iter()
    }
}
