//! Grouped-query self-attention with rotary position embedding, and the query and key norms of Qwen3.

use std::ops::Range;

use super::linear::{Linear, SavedLinear};
use super::norm::{RmsNorm, SavedNorm};
use super::parameter::Parameter;
use super::pass::{OutputRows, Pass};
use crate::Result;
use crate::backend::{
    AttentionGradients, AttentionInput, AttentionOutput, AttentionShape, Backend, RopeDirection,
    Shape, View, ViewMut,
};

/// Index of q among the projections of [`Attention::qkv`].
const Q: Range<usize> = 0..1;
/// Indices of k and v among them.
const KV: Range<usize> = 1..3;

pub(crate) struct Attention<B: Backend> {
    /// q, k and v; computed by one product if every row is a query.
    pub(crate) qkv: Linear<B>,
    pub(crate) o: Linear<B>,
    /// Norms of each query and key head, before the rotation.
    pub(crate) q_norm: Option<RmsNorm<B>>,
    pub(crate) k_norm: Option<RmsNorm<B>>,
    pub(crate) shape: AttentionShape,
}

/// The projections of the input of attention.
enum Projected<B: Backend> {
    /// q, k and v concatenated by columns, if every row is a query. `[T, (H + 2·KV)·hd]`
    Fused { qkv: B::Tensor, saved: SavedLinear<B> },
    /// If only the last rows of each sequence are queries.
    Separate {
        /// `[R, H·hd]`
        q: B::Tensor,
        saved_q: SavedLinear<B>,
        /// k and v concatenated by columns. `[T, 2·KV·hd]`
        kv: B::Tensor,
        saved_kv: SavedLinear<B>,
    },
}

impl<B: Backend> Projected<B> {
    /// q, k and v.
    fn views(&self, shape: &AttentionShape) -> [View<'_, B::Tensor>; 3] {
        let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
        match self {
            Projected::Fused { qkv, .. } => {
                let [k, v] = [q_cols, q_cols + kv_cols].map(|at| at..at + kv_cols);
                [0..q_cols, k, v].map(|columns| qkv.view().with_cols(columns))
            }
            Projected::Separate { q, kv, .. } => {
                let [k, v] = [0, kv_cols].map(|at| kv.view().with_cols(at..at + kv_cols));
                [q.view(), k, v]
            }
        }
    }

    /// q, to be rotated.
    fn q_mut(&mut self, shape: &AttentionShape) -> ViewMut<'_, B::Tensor> {
        match self {
            Projected::Fused { qkv, .. } => qkv.view_mut().with_cols(0..shape.q_cols()),
            Projected::Separate { q, .. } => q.view_mut(),
        }
    }

    /// k, to be rotated.
    fn k_mut(&mut self, shape: &AttentionShape) -> ViewMut<'_, B::Tensor> {
        let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
        match self {
            Projected::Fused { qkv, .. } => qkv.view_mut().with_cols(q_cols..q_cols + kv_cols),
            Projected::Separate { kv, .. } => kv.view_mut().with_cols(0..kv_cols),
        }
    }
}

/// Queries or keys after their norm, and what the norm saved; `[n, heads·hd]`.
type Normed<B> = (<B as Backend>::Tensor, SavedNorm<B>);

pub(crate) struct SavedAttention<B: Backend> {
    /// Rotated in place if there are no norms of heads.
    projected: Projected<B>,
    /// Normed and rotated, if there are norms of heads.
    q_heads: Option<Normed<B>>,
    k_heads: Option<Normed<B>>,
    output: AttentionOutput<B>,
    saved_o: SavedLinear<B>,
}

/// The rows for which queries are computed.
pub(crate) struct QueryRows<'a, B: Backend> {
    pub(crate) pass: &'a Pass<'a, B>,
    /// Normed input of these rows. `[R, d]`
    pub(crate) x: &'a B::Tensor,
    /// The selection of these rows among all rows; `None`: all rows.
    pub(crate) selected: Option<&'a OutputRows<'a, B>>,
}

impl<B: Backend> Attention<B> {
    /// x (normed) `[T, d]` gives keys and values; the query rows give queries and the residual
    /// `[R, d]`. Returns `residual + attention`, `[R, d]`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, B>,
        x: &B::Tensor,
        queries: &QueryRows<'_, B>,
        residual: &B::Tensor,
    ) -> Result<(B::Tensor, SavedAttention<B>)> {
        let mut projected = match queries.selected {
            None => {
                let (qkv, saved) = self.qkv.forward(pass, x, self.qkv.all(), None)?;
                Projected::Fused { qkv, saved }
            }
            Some(_) => {
                let (q, saved_q) = self.qkv.forward(queries.pass, queries.x, Q, None)?;
                let (kv, saved_kv) = self.qkv.forward(pass, x, KV, None)?;
                Projected::Separate { q, saved_q, kv, saved_kv }
            }
        };
        let [q, k, _] = projected.views(&self.shape);
        let mut q_heads = normed(queries.pass, self.q_norm.as_ref(), q)?;
        let mut k_heads = normed(pass, self.k_norm.as_ref(), k)?;
        let q = match &mut q_heads {
            Some((q, _)) => q.view_mut(),
            None => projected.q_mut(&self.shape),
        };
        rotate(queries.pass, q, RopeDirection::Forward)?;
        let k = match &mut k_heads {
            Some((k, _)) => k.view_mut(),
            None => projected.k_mut(&self.shape),
        };
        rotate(pass, k, RopeDirection::Forward)?;
        let spread = self.spread(pass, &projected, &k_heads)?;
        let input = self.input(pass, queries, &projected, (&q_heads, &k_heads), spread.as_ref());
        let output = pass.backend.attention(&input)?;
        drop(spread);
        let all = self.o.all();
        let (y, saved_o) = self.o.forward(queries.pass, &output.out, all, Some(residual))?;
        Ok((y, SavedAttention { projected, q_heads, k_heads, output, saved_o }))
    }

    /// Gradient with respect to x `[T, d]`, from dy `[R, d]`; `None` if it is not `needed`. The gradient of the
    /// residual is dy.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        (x, needed): (&B::Tensor, bool),
        queries: &QueryRows<'_, B>,
        saved: SavedAttention<B>,
    ) -> Result<Option<B::Tensor>> {
        let SavedAttention { projected, q_heads, k_heads, output, saved_o } = saved;
        let all = self.o.all();
        let (dout, inner) = self.o.backward_input(queries.pass, dy, all.clone(), None)?;
        self.o.backward_weights(queries.pass, dy, &output.out, all, (saved_o, inner))?;
        let spread = self.spread(pass, &projected, &k_heads)?;
        let input = self.input(pass, queries, &projected, (&q_heads, &k_heads), spread.as_ref());
        let mut gradients = pass.backend.attention_backward(&dout, &input, &output)?;
        drop((dout, output, spread));
        if let Some(branches) = pass.branches {
            gradients = branches.gather_gradients(pass.backend, gradients, x.rows())?;
        }
        let [q, k, _] = projected.views(&self.shape);
        let (q_cols, kv_cols) = (self.shape.q_cols(), self.shape.kv_cols());
        match gradients {
            AttentionGradients::Fused(mut dqkv) => {
                let dq = (&mut dqkv, 0..q_cols);
                heads_backward(pass, self.q_norm.as_mut(), dq, q, &q_heads)?;
                let dk = (&mut dqkv, q_cols..q_cols + kv_cols);
                heads_backward(pass, self.k_norm.as_mut(), dk, k, &k_heads)?;
                let Projected::Fused { qkv, saved } = projected else {
                    unreachable!("the gradients have the form of the projections")
                };
                drop((qkv, q_heads, k_heads));
                self.backward_projections(pass, &dqkv, (x, needed), 0..3, saved)
            }
            AttentionGradients::Separate { mut dq, mut dkv } => {
                let of_q = (&mut dq, 0..q_cols);
                heads_backward(queries.pass, self.q_norm.as_mut(), of_q, q, &q_heads)?;
                let of_k = (&mut dkv, 0..kv_cols);
                heads_backward(pass, self.k_norm.as_mut(), of_k, k, &k_heads)?;
                let Projected::Separate { q, saved_q, kv, saved_kv } = projected else {
                    unreachable!("the gradients have the form of the projections")
                };
                drop((q, kv, q_heads, k_heads));
                let dx = self.backward_projections(pass, &dkv, (x, needed), KV, saved_kv)?;
                let of_queries = (queries.x, needed);
                let dx_of_queries =
                    self.backward_projections(queries.pass, &dq, of_queries, Q, saved_q)?;
                let (Some(mut dx), Some(dx_of_queries)) = (dx, dx_of_queries) else {
                    return Ok(None);
                };
                if let Some(selected) = queries.selected {
                    pass.backend.scatter_add_rows(&dx_of_queries, selected.scatter, &mut dx)?;
                }
                Ok(Some(dx))
            }
        }
    }

    /// From the gradients of some of q, k and v, computes those of their input and of their weights.
    fn backward_projections(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        (x, needed): (&B::Tensor, bool),
        which: Range<usize>,
        saved: SavedLinear<B>,
    ) -> Result<Option<B::Tensor>> {
        let (dx, inner) = match needed {
            true => {
                let (dx, inner) = self.qkv.backward_input(pass, dy, which.clone(), None)?;
                (Some(dx), inner)
            }
            false => (None, self.qkv.inner_gradients(pass, dy, which.clone())?),
        };
        self.qkv.backward_weights(pass, dy, x, which, (saved, inner))?;
        Ok(dx)
    }

    /// k and v of every position of each sequence, if some sequences share rows. `[K, 2·KV·hd]`
    fn spread(
        &self,
        pass: &Pass<'_, B>,
        projected: &Projected<B>,
        k_heads: &Option<Normed<B>>,
    ) -> Result<Option<B::Tensor>> {
        let Some(branches) = pass.branches else { return Ok(None) };
        let [_, k, v] = projected.views(&self.shape);
        let k = k_heads.as_ref().map_or(k, |(k, _)| k.view());
        branches.spread(pass.backend, k, v).map(Some)
    }

    /// The input of [`Backend::attention`], with the result of [`spread`](Self::spread).
    fn input<'a>(
        &'a self,
        pass: &'a Pass<'_, B>,
        queries: &'a QueryRows<'_, B>,
        projected: &'a Projected<B>,
        (q_heads, k_heads): (&'a Option<Normed<B>>, &'a Option<Normed<B>>),
        spread: Option<&'a B::Tensor>,
    ) -> AttentionInput<'a, B> {
        let [q, k, v] = projected.views(&self.shape);
        let input = AttentionInput {
            q: q_heads.as_ref().map_or(q, |(q, _)| q.view()),
            k: k_heads.as_ref().map_or(k, |(k, _)| k.view()),
            v,
            queries: &queries.pass.rows.layout,
            keys: &pass.rows.layout,
            shape: &self.shape,
        };
        match (spread, pass.branches) {
            (Some(kv), Some(branches)) => {
                let kv_cols = self.shape.kv_cols();
                let [k, v] = [0, kv_cols].map(|at| kv.view().with_cols(at..at + kv_cols));
                AttentionInput { k, v, keys: &branches.layout, ..input }
            }
            _ => input,
        }
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        let norms = self.q_norm.iter().chain(&self.k_norm).map(|norm| &norm.weight);
        [&self.qkv, &self.o].into_iter().flat_map(Linear::parameters).chain(norms)
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        let norms = self.q_norm.iter_mut().chain(&mut self.k_norm).map(|norm| &mut norm.weight);
        [&mut self.qkv, &mut self.o].into_iter().flat_map(Linear::parameters_mut).chain(norms)
    }
}

/// The norm of each head, if the family has one.
fn normed<B: Backend>(
    pass: &Pass<'_, B>,
    norm: Option<&RmsNorm<B>>,
    x: View<'_, B::Tensor>,
) -> Result<Option<Normed<B>>> {
    norm.map(|norm| norm.forward(pass.backend, x, pass.activations)).transpose()
}

/// Converts, in some columns and in place, the gradient of the rotated heads to that of their projection x.
fn heads_backward<B: Backend>(
    pass: &Pass<'_, B>,
    norm: Option<&mut RmsNorm<B>>,
    (grad, columns): (&mut B::Tensor, Range<usize>),
    x: View<'_, B::Tensor>,
    saved: &Option<Normed<B>>,
) -> Result<()> {
    rotate(pass, grad.view_mut().with_cols(columns.clone()), RopeDirection::Backward)?;
    if let (Some(norm), Some((_, saved))) = (norm, saved) {
        norm.backward_in_place(pass.backend, grad.view_mut().with_cols(columns), x, saved)?;
    }
    Ok(())
}

fn rotate<B: Backend>(
    pass: &Pass<'_, B>,
    x: ViewMut<'_, B::Tensor>,
    direction: RopeDirection,
) -> Result<()> {
    pass.backend.rope(x, &pass.rows.layout.positions, pass.rope, direction)
}
