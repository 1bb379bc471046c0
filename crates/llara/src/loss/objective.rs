//! The training objective: the loss of the embeddings of a batch, and its gradient.

use std::sync::Arc;

use super::info_nce::{InfoNce, Scored};
use crate::Result;
use crate::backend::{Backend, Dtype, Shape};
use crate::dist::Collective;

/// The embeddings of the part of a batch that one process has.
pub struct Embeddings<B: Backend> {
    /// `[B, d]`
    pub queries: B::Tensor,
    /// `[B·G, d]`: grouped by query, the positive first.
    pub passages: B::Tensor,
}

/// How the rows of a step are divided among processes. Rank `r` has `queries[r]` consecutive rows of the
/// global batch, after those of the ranks before it; a rank may have none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowsPerRank {
    /// Queries of each rank. `[W]`
    pub queries: Vec<usize>,
    /// Passages of a query, `G`.
    pub group_size: usize,
}

impl RowsPerRank {
    /// All rows of a step on one rank.
    pub fn one(queries: usize, group_size: usize) -> Self {
        RowsPerRank { queries: vec![queries], group_size }
    }

    /// Divides a global batch of `rows` rows among `ranks` ranks with at most `batch_size` rows each. The last
    /// ranks of an incomplete batch have fewer rows, or none.
    pub fn divided(rows: usize, batch_size: usize, ranks: usize, group_size: usize) -> Self {
        let of = |rank: usize| rows.saturating_sub(rank * batch_size).min(batch_size);
        RowsPerRank { queries: (0..ranks).map(of).collect(), group_size }
    }

    /// Rows of the global batch.
    pub fn total(&self) -> usize {
        self.queries.iter().sum()
    }

    /// Rows of the ranks before `rank`.
    pub fn before(&self, rank: usize) -> usize {
        self.queries[..rank].iter().sum()
    }

    /// Passages of each rank. `[W]`
    pub fn passages(&self) -> Vec<usize> {
        self.queries.iter().map(|queries| queries * self.group_size).collect()
    }

    /// The fraction of the global batch that a rank has. The mean over a global batch is the sum over ranks of
    /// this fraction times the mean over the rows of the rank.
    pub fn share(&self, rank: usize) -> f64 {
        self.queries[rank] as f64 / self.total().max(1) as f64
    }
}

/// The result of an objective. Gradients have the shapes of the embeddings.
pub struct LossAndGradient<B: Backend> {
    /// Mean loss of this process's queries, on the device; 0 if it has none. `[1, 1]`
    pub loss: B::Tensor,
    /// Gradient of the global loss by this process's queries. `[B, d]`
    pub dqueries: B::Tensor,
    /// Gradient of the global loss by this process's passages. `[B·G, d]`
    pub dpassages: B::Tensor,
}

/// A loss over embeddings. It includes all computation between the embeddings and their gradient: temperature,
/// collective communication, and the factor that converts the gradient of a process to its part of the global
/// gradient. The model only encodes, and runs its backward pass from the gradient.
pub trait Objective<B: Backend>: Send + Sync {
    /// The loss and its gradient. `positives[i]` is the row of `embeddings.passages` that is the
    /// positive of query `i`; `rows` says how many rows each process has.
    ///
    /// # Errors
    /// When an operation of the device or of the process group fails.
    fn loss_and_gradient(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
        rows: &RowsPerRank,
    ) -> Result<LossAndGradient<B>>;
}

/// InfoNCE against the passages of this process, or of all processes.
pub struct Contrastive<B: Backend> {
    /// The loss with its temperature.
    pub info_nce: InfoNce,
    /// Whether queries are scored against the passages of every process.
    pub negatives_cross_device: bool,
    /// The processes that train together.
    pub collective: Arc<dyn Collective<B>>,
}

impl<B: Backend> Contrastive<B> {
    /// Scores and loss of this process's queries, without gradients. Every process must have
    /// the same number of rows.
    ///
    /// # Errors
    /// As for [`Objective::loss_and_gradient`].
    pub fn score(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
    ) -> Result<Scored<B>> {
        let rows = RowsPerRank {
            queries: vec![embeddings.queries.rows(); self.collective.size()],
            group_size: embeddings.passages.rows() / embeddings.queries.rows().max(1),
        };
        let (queries, passages, targets) = self.gather(backend, embeddings, positives, &rows)?;
        self.info_nce.forward(backend, &queries, &passages, &targets)
    }

    /// The passages with which queries are compared, and the columns of the positives among them.
    fn gather(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
        rows: &RowsPerRank,
    ) -> Result<(B::Tensor, B::Tensor, B::Index)> {
        let Embeddings { queries, passages } = embeddings;
        if !self.negatives_cross_device {
            return Ok((queries, passages, upload(backend, positives)?));
        }
        let first = (rows.before(self.collective.rank()) * rows.group_size) as u32;
        let targets: Vec<u32> = positives.iter().map(|positive| first + positive).collect();
        let targets = upload(backend, &targets)?;
        let passages = self.collective.all_gather_rows(passages, &rows.passages())?;
        Ok((queries, passages, targets))
    }

    /// The gradient of this process's passages, from that of all passages that were scored.
    fn own_passages(&self, dpassages: B::Tensor, rows: &RowsPerRank) -> Result<B::Tensor> {
        match self.negatives_cross_device {
            true => self.collective.reduce_scatter_rows(dpassages, &rows.passages()),
            false => Ok(dpassages),
        }
    }

    /// The factor that converts the gradient of this process's loss to its part of the gradient of the global
    /// loss, which is the mean over all rows. The sum of the parts is the gradient that one process would compute.
    fn gradient_factor(&self, rows: &RowsPerRank) -> f32 {
        rows.share(self.collective.rank()) as f32
    }
}

impl<B: Backend> Objective<B> for Contrastive<B> {
    fn loss_and_gradient(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        positives: &[u32],
        rows: &RowsPerRank,
    ) -> Result<LossAndGradient<B>> {
        let (queries, passages, targets) = self.gather(backend, embeddings, positives, rows)?;
        if queries.rows() == 0 {
            // A process without queries still takes part in the sum of the passage gradients.
            let dqueries = backend.zeros(0, queries.cols(), Dtype::F32)?;
            let dpassages = self
                .own_passages(backend.zeros(passages.rows(), passages.cols(), Dtype::F32)?, rows)?;
            return Ok(LossAndGradient {
                loss: backend.zeros(1, 1, Dtype::F32)?,
                dqueries,
                dpassages,
            });
        }
        let Scored { loss, dscores, .. } =
            self.info_nce.forward(backend, &queries, &passages, &targets)?;
        let factor = self.gradient_factor(rows);
        let (dqueries, dpassages) =
            self.info_nce.backward(backend, &queries, &passages, &dscores, factor)?;
        let dpassages = self.own_passages(dpassages, rows)?;
        Ok(LossAndGradient { loss, dqueries, dpassages })
    }
}

fn upload<B: Backend>(backend: &B, rows: &[u32]) -> Result<B::Index> {
    let [rows] = backend.upload_indices([rows])?;
    Ok(rows)
}
