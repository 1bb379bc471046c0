//! Low-rank adapters (Hu et al. 2021): a frozen weight plus a trainable low-rank product.

use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::backend::{Backend, Shape, View, ViewMut};

/// The projections that get an adapter, and the settings of the adapters.
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
    /// Ids of the tokens whose embeddings are trained beside the adapters, ascending: new tokens, as a rule.
    pub trained_tokens: Vec<u32>,
    /// How these embeddings are saved.
    pub saved_tokens: SavedTokens,
}

/// The form of the trained token embeddings in an adapter's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SavedTokens {
    /// Only the trained rows: `trainable_token_indices` of PEFT, since its version 0.15.
    #[default]
    TrainableTokenIndices,
    /// The embedding table with the trained rows in it: `modules_to_save` of PEFT.
    ModulesToSave,
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
            trained_tokens: Vec::new(),
            saved_tokens: SavedTokens::default(),
        }
    }
}

impl LoraConfig {
    /// Whether training uses dropout, so that equal texts get different embeddings.
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
    /// Index of this adapter in the model, for its dropout.
    pub(crate) module: u32,
}

/// `scale · drop(x) · Aᵀ`. `[T, r]`
pub(crate) struct SavedLora<B: Backend>(B::Tensor);

impl<B: Backend> Lora<B> {
    /// Adds the output of the adapter to y `[T, out]`; x `[T, in]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        y: ViewMut<'_, B::Tensor>,
    ) -> Result<SavedLora<B>> {
        let dropped = self.dropped(pass, x)?;
        let input = dropped.as_ref().unwrap_or(x).view();
        let weights = (self.a.weight(), self.b.weight());
        Ok(SavedLora(pass.backend.lora(input, weights, self.scale, y)?))
    }

    /// The gradient with respect to `drop(x) · Aᵀ`: `g = scale · dy · B`. `[T, r]`
    pub(crate) fn inner_gradient(
        &self,
        pass: &Pass<'_, B>,
        dy: View<'_, B::Tensor>,
    ) -> Result<B::Tensor> {
        pass.backend.linear_input_grad(dy, self.b.weight().view(), self.scale, None)
    }

    /// `dB += dyᵀ · hidden`, `dA += gᵀ · drop(x)`.
    pub(crate) fn backward_weights(
        &mut self,
        pass: &Pass<'_, B>,
        dy: View<'_, B::Tensor>,
        x: &B::Tensor,
        saved: SavedLora<B>,
        g: &B::Tensor,
    ) -> Result<()> {
        let backend = pass.backend;
        if let Some((db, accumulate)) = self.b.grad_of_parts(backend, 0..1)? {
            backend.linear_weight_grad(dy, saved.0.view(), db, accumulate)?;
        }
        let dropped = self.dropped(pass, x)?;
        if let Some((da, accumulate)) = self.a.grad_of_parts(backend, 0..1)? {
            let input = dropped.as_ref().unwrap_or(x).view();
            backend.linear_weight_grad(g.view(), input, da, accumulate)?;
        }
        Ok(())
    }

    /// Adds `drop(g · A)` to dx.
    pub(crate) fn backward_input(
        &self,
        pass: &Pass<'_, B>,
        g: &B::Tensor,
        dx: B::Tensor,
    ) -> Result<B::Tensor> {
        let (backend, a, g) = (pass.backend, self.a.weight().view(), g.view());
        match pass.dropout.filter(|_| self.dropout > 0.0) {
            Some(dropout) => {
                let dinput = backend.linear_input_grad(g, a, 1.0, None)?;
                let key = dropout.key(self.module, self.dropout);
                backend.dropout(&dinput, pass.rows.tokens(), &key, Some(dx))
            }
            None => backend.linear_input_grad(g, a, 1.0, Some(dx)),
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
