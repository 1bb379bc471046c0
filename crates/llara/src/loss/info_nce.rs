//! InfoNCE (van den Oord et al. 2018): the cross entropy of each query's positive among all passages.
//!
//! With `s = q · pᵀ / temperature` and `t(i)` the column of query i's positive,
//! `loss = mean_i (log Σ_j exp s_ij − s_{i,t(i)})`.

use crate::Result;
use crate::backend::{Backend, ScoreMask};

/// The InfoNCE loss with a temperature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct InfoNce {
    /// Divides the similarities.
    pub temperature: f32,
}

/// Scores and loss of one batch, with the gradient that [`InfoNce::backward`] needs.
pub struct Scored<B: Backend> {
    /// `q · pᵀ / temperature`. `[n, m]`
    pub scores: B::Tensor,
    /// Mean cross entropy. `[1, 1]`
    pub loss: B::Tensor,
    /// Gradient of the loss by the scores. `[n, m]`
    pub(super) dscores: B::Tensor,
}

impl InfoNce {
    /// q `[n, d]`, p `[m, d]`; `targets[i]` is the row of p that is positive for query i. Passages that
    /// `mask` leaves out have no part in the loss.
    pub fn forward<B: Backend>(
        &self,
        backend: &B,
        q: &B::Tensor,
        p: &B::Tensor,
        targets: &B::Index,
        mask: Option<&ScoreMask<B>>,
    ) -> Result<Scored<B>> {
        let scores = backend.scores(q, p, 1.0 / self.temperature)?;
        let (loss, dscores) = match mask {
            None => backend.cross_entropy(&scores, targets)?,
            Some(mask) => {
                let masked = backend.mask_scores(&scores, targets, mask)?;
                backend.cross_entropy(&masked, targets)?
            }
        };
        Ok(Scored { scores, loss, dscores })
    }

    /// Gradients of `factor · loss` with respect to q and p, from that of the scores:
    /// `dq = dscores · p · factor / temperature`, `dp = dscoresᵀ · q · factor / temperature`.
    pub fn backward<B: Backend>(
        &self,
        backend: &B,
        q: &B::Tensor,
        p: &B::Tensor,
        dscores: &B::Tensor,
        factor: f32,
    ) -> Result<(B::Tensor, B::Tensor)> {
        backend.scores_backward(dscores, q, p, factor / self.temperature)
    }
}
