//! The training objective: what is computed from the embeddings of a batch.

use std::sync::Arc;

use super::info_nce::{InfoNce, Scored};
use crate::Result;
use crate::backend::{Backend, Shape};
use crate::dist::Collective;

/// The embeddings of one process's share of a batch.
pub struct Embeddings<B: Backend> {
    /// `[B, d]`
    pub queries: B::Tensor,
    /// `[B·G, d]`: query by query, the positive first.
    pub passages: B::Tensor,
}

/// What an objective makes of embeddings. Gradients have the shapes of the embeddings.
pub struct LossAndGradient<B: Backend> {
    /// This process's loss, on the device. `[1, 1]`
    pub loss: B::Tensor,
    /// Gradient of the global loss by this process's queries. `[B, d]`
    pub dqueries: B::Tensor,
    /// Gradient of the global loss by this process's passages. `[B·G, d]`
    pub dpassages: B::Tensor,
}

/// A loss over embeddings. It owns everything between the embeddings and their gradient: temperature,
/// the exchange with other processes, and the factor that turns a process's gradient into its share
/// of the global one. The model only encodes, and runs backward from the gradient.
pub trait Objective<B: Backend>: Send + Sync {
    /// The loss and its gradient. `positives[i]` is the row of `embeddings.passages` that is the
    /// positive of query `i`.
    ///
    /// # Errors
    /// When an operation of the device or of the process group fails.
    fn loss_and_gradient(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
    ) -> Result<LossAndGradient<B>>;
}

/// InfoNCE against the passages of this process, or of all processes.
pub struct Contrastive<B: Backend> {
    /// The loss at its temperature.
    pub info_nce: InfoNce,
    /// Whether queries are scored against the passages of every process.
    pub negatives_cross_device: bool,
    /// The processes that train together.
    pub collective: Arc<dyn Collective<B>>,
}

impl<B: Backend> Contrastive<B> {
    /// Scores and loss of this process's queries, for a caller that needs no gradient.
    ///
    /// # Errors
    /// As for [`Objective::loss_and_gradient`].
    pub fn score(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
    ) -> Result<Scored<B>> {
        let (queries, passages, targets) = self.gather(backend, embeddings, positives)?;
        self.info_nce.forward(backend, &queries, &passages, &targets)
    }

    /// The passages that queries are scored against, and the columns of the positives among them.
    fn gather(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
    ) -> Result<(B::Tensor, B::Tensor, B::Index)> {
        let Embeddings { queries, passages } = embeddings;
        if !self.negatives_cross_device {
            return Ok((queries, passages, upload(backend, positives)?));
        }
        let first = (self.collective.rank() * passages.rows()) as u32;
        let targets: Vec<u32> = positives.iter().map(|positive| first + positive).collect();
        let targets = upload(backend, &targets)?;
        Ok((queries, self.collective.all_gather(passages)?, targets))
    }

    /// What turns the gradient of this process's loss into its part of the global loss, which is the
    /// mean over processes: the parts then add up to the gradient that one process would compute.
    fn gradient_factor(&self) -> f32 {
        1.0 / self.collective.size() as f32
    }
}

impl<B: Backend> Objective<B> for Contrastive<B> {
    fn loss_and_gradient(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
    ) -> Result<LossAndGradient<B>> {
        let (queries, passages, targets) = self.gather(backend, embeddings, positives)?;
        let Scored { loss, dscores, .. } =
            self.info_nce.forward(backend, &queries, &passages, &targets)?;
        let factor = self.gradient_factor();
        let (dqueries, dpassages) =
            self.info_nce.backward(backend, &queries, &passages, &dscores, factor)?;
        let dpassages = match self.negatives_cross_device {
            true => self.collective.reduce_scatter(dpassages)?,
            false => dpassages,
        };
        Ok(LossAndGradient { loss, dqueries, dpassages })
    }
}

fn upload<B: Backend>(backend: &B, rows: &[u32]) -> Result<B::Index> {
    let [rows] = backend.upload_indices([rows])?;
    Ok(rows)
}
