//! Grouped-query self-attention with rotary positions, and Qwen3's norms of queries and keys.

use super::linear::{Linear, SavedLinear};
use super::norm::{RmsNorm, SavedNorm};
use super::parameter::Parameter;
use super::pass::Pass;
use crate::Result;
use crate::backend::{AttentionOutput, AttentionShape, Backend, RopeDirection};

pub(crate) struct Attention<B: Backend> {
    pub(crate) q: Linear<B>,
    pub(crate) k: Linear<B>,
    pub(crate) v: Linear<B>,
    pub(crate) o: Linear<B>,
    /// Norms of each query and key head, before the rotation.
    pub(crate) q_norm: Option<RmsNorm<B>>,
    pub(crate) k_norm: Option<RmsNorm<B>>,
    pub(crate) shape: AttentionShape,
}

pub(crate) struct SavedAttention<B: Backend> {
    q: Heads<B>,
    k: Heads<B>,
    /// `[T, KV·hd]`
    v: B::Tensor,
    attended: AttentionOutput<B>,
    /// Of v and o.
    linears: [SavedLinear<B>; 2],
}

/// Queries or keys as attention sees them, and what the way back to the input needs.
struct Heads<B: Backend> {
    /// Normed and rotated. `[T, heads·hd]`, or `[R, heads·hd]` for queries of some rows
    rotated: B::Tensor,
    /// The projection that went into the norm, and what the norm saved.
    normed: Option<(B::Tensor, SavedNorm<B>)>,
    linear: SavedLinear<B>,
}

/// The rows for which an attention computes queries.
pub(crate) struct QueryRows<'a, B: Backend> {
    pub(crate) pass: &'a Pass<'a, B>,
    /// Normed input of these rows. `[R, d]`
    pub(crate) x: &'a B::Tensor,
    /// Their indices among all rows; `None`: all rows.
    pub(crate) rows: Option<&'a B::Index>,
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
        let q = heads_forward(queries.pass, &self.q, self.q_norm.as_ref(), queries.x)?;
        let k = heads_forward(pass, &self.k, self.k_norm.as_ref(), x)?;
        let (v, saved_v) = self.v.forward(pass, x, None)?;
        let attended = pass.backend.attention(
            &q.rotated,
            &k.rotated,
            &v,
            &queries.pass.rows.layout,
            &pass.rows.layout,
            &self.shape,
        )?;
        let (y, saved_o) = self.o.forward(queries.pass, &attended.out, Some(residual))?;
        Ok((y, SavedAttention { q, k, v, attended, linears: [saved_v, saved_o] }))
    }

    /// Gradient by x alone `[T, d]`, from dy `[R, d]`, or `None` where it is not `needed`; the residual's
    /// is dy itself.
    pub(crate) fn backward(
        &mut self,
        pass: &Pass<'_, B>,
        dy: &B::Tensor,
        (x, needed): (&B::Tensor, bool),
        queries: &QueryRows<'_, B>,
        saved: SavedAttention<B>,
    ) -> Result<Option<B::Tensor>> {
        let SavedAttention { q, k, v, attended, linears: [saved_v, saved_o] } = saved;
        let dout = self.o.backward(queries.pass, dy, &attended.out, saved_o, None)?;
        let (dq, dk, dv) = pass.backend.attention_backward(
            &dout,
            &q.rotated,
            &k.rotated,
            &v,
            &attended,
            &queries.pass.rows.layout,
            &pass.rows.layout,
            &self.shape,
        )?;
        let dq = heads_backward(queries.pass, self.q_norm.as_mut(), dq, &q)?;
        let dk = heads_backward(pass, self.k_norm.as_mut(), dk, &k)?;
        if !needed {
            self.q.backward_weights(queries.pass, &dq, queries.x, q.linear)?;
            self.k.backward_weights(pass, &dk, x, k.linear)?;
            self.v.backward_weights(pass, &dv, x, saved_v)?;
            return Ok(None);
        }
        let dx = self.k.backward(pass, &dk, x, k.linear, None)?;
        let mut dx = self.v.backward(pass, &dv, x, saved_v, Some(dx))?;
        match queries.rows {
            None => self.q.backward(pass, &dq, x, q.linear, Some(dx)).map(Some),
            Some(rows) => {
                let from_queries = self.q.backward(queries.pass, &dq, queries.x, q.linear, None)?;
                pass.backend.scatter_add_rows(&from_queries, rows, &mut dx)?;
                Ok(Some(dx))
            }
        }
    }

    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter<B>> {
        let norms = self.q_norm.iter().chain(&self.k_norm).map(|norm| &norm.weight);
        [&self.q, &self.k, &self.v, &self.o].into_iter().flat_map(Linear::parameters).chain(norms)
    }

    pub(crate) fn parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        let norms = self.q_norm.iter_mut().chain(&mut self.k_norm).map(|norm| &mut norm.weight);
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o]
            .into_iter()
            .flat_map(Linear::parameters_mut)
            .chain(norms)
    }
}

/// Project, norm each head where the family does, rotate.
fn heads_forward<B: Backend>(
    pass: &Pass<'_, B>,
    projection: &Linear<B>,
    norm: Option<&RmsNorm<B>>,
    x: &B::Tensor,
) -> Result<Heads<B>> {
    let (projected, linear) = projection.forward(pass, x, None)?;
    let (mut rotated, normed) = match norm {
        Some(norm) => {
            let (y, saved) = norm.forward(pass.backend, &projected, pass.activations)?;
            (y, Some((projected, saved)))
        }
        None => (projected, None),
    };
    pass.backend.rope(
        &mut rotated,
        &pass.rows.layout.positions,
        pass.rope,
        RopeDirection::Forward,
    )?;
    Ok(Heads { rotated, normed, linear })
}

/// From the gradient by rotated heads to that by their projection.
fn heads_backward<B: Backend>(
    pass: &Pass<'_, B>,
    norm: Option<&mut RmsNorm<B>>,
    mut grad: B::Tensor,
    saved: &Heads<B>,
) -> Result<B::Tensor> {
    pass.backend.rope(
        &mut grad,
        &pass.rows.layout.positions,
        pass.rope,
        RopeDirection::Backward,
    )?;
    match (norm, &saved.normed) {
        (Some(norm), Some((projected, saved))) => {
            norm.backward(pass.backend, &grad, projected, saved, None)
        }
        _ => Ok(grad),
    }
}
