//! One decoder layer: attention and MLP, each behind a norm and around a residual.

use super::attention::{Attention, SavedAttention};
use super::mlp::{Mlp, SavedMlp};
use super::norm::{RmsNorm, SavedNorm};
use super::parameter::Parameter;
use crate::Result;
use crate::backend::{Backend, Layout, RopeTable};

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
        backend: &B,
        x: B::Tensor,
        layout: &Layout<B>,
        rope: &RopeTable<B>,
    ) -> Result<(B::Tensor, SavedBlock<B>)> {
        let (x_normed, x_norm) = self.input_norm.forward(backend, &x)?;
        let (middle, attention) = self.attention.forward(backend, &x_normed, &x, layout, rope)?;
        let (middle_normed, middle_norm) = self.post_attention_norm.forward(backend, &middle)?;
        let (y, mlp) = self.mlp.forward(backend, &middle_normed, &middle)?;
        let saved =
            SavedBlock { x, x_normed, x_norm, attention, middle, middle_normed, middle_norm, mlp };
        Ok((y, saved))
    }

    /// Each residual passes its gradient on unchanged, so the norm's is added to it.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        dy: B::Tensor,
        saved: SavedBlock<B>,
        layout: &Layout<B>,
        rope: &RopeTable<B>,
    ) -> Result<B::Tensor> {
        let dnormed = self.mlp.backward(backend, &dy, &saved.middle_normed, &saved.mlp)?;
        let dmiddle = self.post_attention_norm.backward(
            backend,
            &dnormed,
            &saved.middle,
            &saved.middle_norm,
            Some(dy),
        )?;
        let dnormed = self.attention.backward(
            backend,
            &dmiddle,
            &saved.x_normed,
            saved.attention,
            layout,
            rope,
        )?;
        self.input_norm.backward(backend, &dnormed, &saved.x, &saved.x_norm, Some(dmiddle))
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
