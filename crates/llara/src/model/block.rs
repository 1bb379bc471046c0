//! One decoder layer: attention and MLP, each with a norm before it and a residual connection.

use super::attention::{Attention, QueryRows, SavedAttention};
use super::linear::Linear;
use super::mlp::{Mlp, SavedMlp};
use super::norm::RmsNorm;
use super::parameter::Parameter;
use super::pass::{OutputRows, Pass};
use crate::Result;
use crate::backend::{Backend, Dtype, Shape};

pub(crate) struct Block<B: Backend> {
    pub(crate) input_norm: RmsNorm<B>,
    pub(crate) attention: Attention<B>,
    pub(crate) post_attention_norm: RmsNorm<B>,
    pub(crate) mlp: Mlp<B>,
}

/// The state that the backward pass of a layer needs. Tensors are `[T, d]` before attention and `[R, d]` after
/// it; R is T if the layer is computed at all positions. The residual stream is f32. Outputs of norms are not
/// stored, because recomputing one needs no more memory traffic than storing and loading it.
pub(crate) struct SavedBlock<B: Backend> {
    /// Residual stream at the input of the layer.
    x: B::Tensor,
    attention: SavedAttention<B>,
    /// Residual stream between attention and MLP.
    middle: B::Tensor,
    mlp: SavedMlp<B>,
}

impl<B: Backend> Block<B> {
    /// `middle = x + attention(norm(x))`, `y = middle + mlp(norm(middle))`: x `[T, d]`, y `[R, d]` at
    /// the selected rows, or `[T, d]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: B::Tensor,
        selected: Option<&OutputRows<'_, B>>,
    ) -> Result<(B::Tensor, SavedBlock<B>)> {
        let backend = pass.backend;
        let (x_normed, _) = self.input_norm.forward(backend, x.view(), pass.activations)?;
        let pick = |x: &B::Tensor| selected.map(|w| backend.gather_rows(x, w.rows)).transpose();
        let (queries, residual) = (pick(&x_normed)?, pick(&x)?);
        let (middle, attention) = self.attention.forward(
            pass,
            &x_normed,
            &query_rows(pass, &x_normed, queries.as_ref(), selected),
            residual.as_ref().unwrap_or(&x),
        )?;
        let pass = selected.map_or(pass, |w| w.pass);
        let (middle_normed, _) =
            self.post_attention_norm.forward(backend, middle.view(), pass.activations)?;
        let (y, mlp) = self.mlp.forward(pass, &middle_normed, &middle)?;
        Ok((y, SavedBlock { x, attention, middle, mlp }))
    }

    /// The gradient passes a residual connection unchanged, so the norm's gradient is added to it. dy
    /// `[R, d]`, result `[T, d]`, or `None` if no parameter below this layer is trainable.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: B::Tensor,
        saved: SavedBlock<B>,
        selected: Option<&OutputRows<'_, B>>,
        below_learns: bool,
    ) -> Result<Option<B::Tensor>> {
        let backend = pass.backend;
        let at = selected.map_or(pass, |w| w.pass);
        let to = pass.activations;
        let (normed, norm) = self.post_attention_norm.forward(backend, saved.middle.view(), to)?;
        let dnormed = self.mlp.backward(at, &*at.activation(&dy)?, &normed, saved.mlp)?;
        let dmiddle =
            self.post_attention_norm.backward(backend, &dnormed, &saved.middle, &norm, Some(dy))?;
        let (normed, norm) = self.input_norm.forward(backend, saved.x.view(), to)?;
        let picked = selected.map(|w| backend.gather_rows(&normed, w.rows)).transpose()?;
        let queries = query_rows(pass, &normed, picked.as_ref(), selected);
        let dnormed = {
            let dmiddle = pass.activation(&dmiddle)?;
            let needed = below_learns || self.input_norm.weight.is_trainable();
            let x = (&normed, needed);
            self.attention.backward(pass, &dmiddle, x, &queries, saved.attention)?
        };
        let Some(dnormed) = dnormed else { return Ok(None) };
        let dresidual = match selected {
            None => dmiddle,
            Some(selected) => {
                let rows = pass.rows.layout.rows();
                let mut all = backend.zeros(rows, dmiddle.cols(), Dtype::F32)?;
                backend.scatter_add_rows(&dmiddle, selected.scatter, &mut all)?;
                all
            }
        };
        let dx = self.input_norm.backward(backend, &dnormed, &saved.x, &norm, Some(dresidual))?;
        Ok(below_learns.then_some(dx))
    }

    /// The layers that adapters can be attached to.
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear<B>; 4] {
        let Attention { qkv, o, .. } = &mut self.attention;
        let Mlp { gate_up, down } = &mut self.mlp;
        [qkv, o, gate_up, down]
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

/// The rows whose queries are computed: the selected ones, or all.
fn query_rows<'a, B: Backend>(
    pass: &'a Pass<'a, B>,
    x_normed: &'a B::Tensor,
    picked: Option<&'a B::Tensor>,
    selected: Option<&'a OutputRows<'a, B>>,
) -> QueryRows<'a, B> {
    match (picked, selected) {
        (Some(x), Some(selected)) => QueryRows { pass: selected.pass, x, selected: Some(selected) },
        _ => QueryRows { pass, x: x_normed, selected: None },
    }
}
