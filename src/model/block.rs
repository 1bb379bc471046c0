//! One decoder layer: attention and MLP, each behind a norm and around a residual.

use super::attention::{Attention, SavedAttention};
use super::linear::Linear;
use super::lora::PROJECTIONS;
use super::mlp::{Mlp, SavedMlp};
use super::norm::{RmsNorm, SavedNorm};
use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::backend::Backend;

pub(crate) struct Block<B: Backend> {
    pub(crate) input_norm: RmsNorm<B>,
    pub(crate) attention: Attention<B>,
    pub(crate) post_attention_norm: RmsNorm<B>,
    pub(crate) mlp: Mlp<B>,
}

/// What the backward pass of a layer needs; tensors are `[T, d]`.
pub(crate) struct SavedBlock<B: Backend> {
    /// Residual stream at the layer's entry.
    x: B::Tensor,
    /// `input_norm(x)`
    x_normed: B::Tensor,
    x_norm: SavedNorm<B>,
    attention: SavedAttention<B>,
    /// Residual stream between attention and MLP.
    middle: B::Tensor,
    /// `post_attention_norm(middle)`
    middle_normed: B::Tensor,
    middle_norm: SavedNorm<B>,
    mlp: SavedMlp<B>,
}

impl<B: Backend> Block<B> {
    /// `middle = x + attention(norm(x))`, `y = middle + mlp(norm(middle))`. All `[T, d]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: B::Tensor,
    ) -> Result<(B::Tensor, SavedBlock<B>)> {
        let (x_normed, x_norm) = self.input_norm.forward(pass.backend, &x)?;
        let (middle, attention) = self.attention.forward(pass, &x_normed, &x)?;
        let (middle_normed, middle_norm) =
            self.post_attention_norm.forward(pass.backend, &middle)?;
        let (y, mlp) = self.mlp.forward(pass, &middle_normed, &middle)?;
        let saved =
            SavedBlock { x, x_normed, x_norm, attention, middle, middle_normed, middle_norm, mlp };
        Ok((y, saved))
    }

    /// Each residual passes its gradient on unchanged, so the norm's is added to it.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: B::Tensor,
        saved: SavedBlock<B>,
    ) -> Result<B::Tensor> {
        let dnormed = self.mlp.backward(pass, &dy, &saved.middle_normed, saved.mlp)?;
        let dmiddle = self.post_attention_norm.backward(
            pass.backend,
            &dnormed,
            &saved.middle,
            &saved.middle_norm,
            Some(dy),
        )?;
        let dnormed = self.attention.backward(pass, &dmiddle, &saved.x_normed, saved.attention)?;
        self.input_norm.backward(pass.backend, &dnormed, &saved.x, &saved.x_norm, Some(dmiddle))
    }

    /// The projections, each with the name that adapters are asked for.
    pub(crate) fn projections_mut(&mut self) -> [(&'static str, &mut Linear<B>); 7] {
        let Attention { q, k, v, o, .. } = &mut self.attention;
        let Mlp { gate, up, down } = &mut self.mlp;
        let [nq, nk, nv, no, ngate, nup, ndown] = PROJECTIONS;
        [(nq, q), (nk, k), (nv, v), (no, o), (ngate, gate), (nup, up), (ndown, down)]
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        [&self.input_norm.weight, &self.post_attention_norm.weight]
            .into_iter()
            .chain(self.attention.parameters())
            .chain(self.mlp.parameters())
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        [&mut self.input_norm.weight, &mut self.post_attention_norm.weight]
            .into_iter()
            .chain(self.attention.parameters_mut())
            .chain(self.mlp.parameters_mut())
    }
}
