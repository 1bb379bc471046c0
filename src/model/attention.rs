//! Grouped-query self-attention with rotary positions, and Qwen3's norms of queries and keys.

use super::linear::Linear;
use super::norm::{RmsNorm, SavedNorm};
use super::parameter::Parameter;
use crate::Result;
use crate::backend::{Attended, AttentionShape, Backend, Layout, RopeTable, Turn};

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
    attended: Attended<B>,
}

/// Queries or keys as attention sees them, and what their norm needs to go back.
struct Heads<B: Backend> {
    /// Normed and rotated. `[T, heads·hd]`
    rotated: B::Tensor,
    /// The projection that went into the norm, and what the norm saved.
    normed: Option<(B::Tensor, SavedNorm<B>)>,
}

impl<B: Backend> Attention<B> {
    /// x (normed) and residual `[T, d]`; returns `residual + attention(x)`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        residual: &B::Tensor,
        layout: &Layout<B>,
        rope: &RopeTable<B>,
    ) -> Result<(B::Tensor, SavedAttention<B>)> {
        let q = heads_forward(backend, &self.q, self.q_norm.as_ref(), x, layout, rope)?;
        let k = heads_forward(backend, &self.k, self.k_norm.as_ref(), x, layout, rope)?;
        let v = self.v.forward(backend, x, None)?;
        let attended =
            backend.attention(&q.rotated, &k.rotated, &v, layout, layout, &self.shape)?;
        let y = self.o.forward(backend, &attended.out, Some(residual))?;
        Ok((y, SavedAttention { q, k, v, attended }))
    }

    /// Gradient by x alone; the residual's is dy itself.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: SavedAttention<B>,
        layout: &Layout<B>,
        rope: &RopeTable<B>,
    ) -> Result<B::Tensor> {
        let SavedAttention { q, k, v, attended } = saved;
        let dout = self.o.backward(backend, dy, &attended.out, None)?;
        let (dq, dk, dv) = backend.attention_backward(
            &dout,
            &q.rotated,
            &k.rotated,
            &v,
            &attended,
            layout,
            layout,
            &self.shape,
        )?;
        let back = Rotation { layout, rope };
        let dq = heads_backward(backend, self.q_norm.as_mut(), dq, q.normed, &back)?;
        let dk = heads_backward(backend, self.k_norm.as_mut(), dk, k.normed, &back)?;
        let dx = self.q.backward(backend, &dq, x, None)?;
        let dx = self.k.backward(backend, &dk, x, Some(dx))?;
        self.v.backward(backend, &dv, x, Some(dx))
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
    backend: &B,
    projection: &Linear<B>,
    norm: Option<&RmsNorm<B>>,
    x: &B::Tensor,
    layout: &Layout<B>,
    rope: &RopeTable<B>,
) -> Result<Heads<B>> {
    let projected = projection.forward(backend, x, None)?;
    let (mut rotated, normed) = match norm {
        Some(norm) => {
            let (y, saved) = norm.forward(backend, &projected)?;
            (y, Some((projected, saved)))
        }
        None => (projected, None),
    };
    backend.rope(&mut rotated, &layout.positions, rope, Turn::Forward)?;
    Ok(Heads { rotated, normed })
}

struct Rotation<'a, B: Backend> {
    layout: &'a Layout<B>,
    rope: &'a RopeTable<B>,
}

/// From the gradient by rotated heads to the gradient by the projection's output.
fn heads_backward<B: Backend>(
    backend: &B,
    norm: Option<&mut RmsNorm<B>>,
    mut grad: B::Tensor,
    normed: Option<(B::Tensor, SavedNorm<B>)>,
    rotation: &Rotation<'_, B>,
) -> Result<B::Tensor> {
    backend.rope(&mut grad, &rotation.layout.positions, rotation.rope, Turn::Backward)?;
    match (norm, normed) {
        (Some(norm), Some((projected, saved))) => {
            norm.backward(backend, &grad, &projected, &saved, None)
        }
        _ => Ok(grad),
    }
}
