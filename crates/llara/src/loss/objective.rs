//! The training objective: the loss of the embeddings of a batch, and its gradient.

use std::ops::Range;
use std::sync::Arc;

use super::info_nce::{InfoNce, Scored};
use super::options::{Distillation, ObjectiveOptions};
use super::terms::{ComparedEmbeddings, Directions, Gradients, Reverse, Terms};
use super::text_keys::{ColumnLists, TextKeys};
use crate::backend::{Backend, Dtype, ListedColumns, ScatterPlan, ScatterRows, ScoreMask, Shape};
use crate::dist::Collective;
use crate::{Error, ErrorKind, Result};

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

/// What is known about the rows of one process's share of a batch, besides their embeddings.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'l> {
    /// The passage that is the positive of each query, the first of its group. `[B]`
    pub positives: &'l [u32],
    /// Keys of the texts, for [`FalseNegatives::mask_equal`](super::FalseNegatives).
    pub text_keys: Option<&'l TextKeys>,
    /// A teacher's score of each passage, for [`Distillation`](super::Distillation). `[B·G]`
    pub teacher_scores: Option<&'l [f32]>,
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
    /// The loss and its gradient. `rows` says how many rows each process has.
    ///
    /// # Errors
    /// When `labels` lack what the objective needs, or an operation of the device or of the process group
    /// fails.
    fn loss_and_gradient(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        labels: &Labels<'_>,
        rows: &RowsPerRank,
    ) -> Result<LossAndGradient<B>>;
}

/// InfoNCE against the passages of this process, or of all processes, with the terms of
/// [`ObjectiveOptions`].
pub struct Contrastive<B: Backend> {
    /// The loss with its temperature.
    pub info_nce: InfoNce,
    /// Masks, and further terms.
    pub options: ObjectiveOptions,
    /// Whether embeddings have length 1.
    pub normalized: bool,
    /// Whether queries are scored against the passages of every process.
    pub negatives_cross_device: bool,
    /// The processes that train together.
    pub collective: Arc<dyn Collective<B>>,
    /// The most scores of queries by passages that are held at a time, at least those of one query. The queries are
    /// divided into blocks for that: each query's softmax is over all of its passages, so only the order of sums over
    /// queries depends on it.
    pub block_scores: usize,
}

impl<B: Backend> Contrastive<B> {
    /// The usual limit of scores that are held at a time: 64 MiB of f32.
    pub const BLOCK_SCORES: usize = 1 << 24;

    /// Scores and InfoNCE loss of this process's queries, without masks, further terms and gradients. Every
    /// process must have the same number of rows.
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
        let targets = upload(backend, &self.targets(positives, &rows))?;
        let Exchanged { queries, passages, .. } = self.exchange(backend, embeddings, &rows)?;
        self.info_nce.forward(backend, &queries, &passages, &targets, None)
    }

    /// The embeddings that are compared in this process.
    fn exchange(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        rows: &RowsPerRank,
    ) -> Result<Exchanged<B>> {
        let Embeddings { queries, passages } = embeddings;
        if !self.negatives_cross_device {
            return Ok(Exchanged { queries, passages, all_queries: None });
        }
        let passages = self.collective.all_gather_rows(passages, &rows.passages())?;
        let all_queries = match self.options.symmetric {
            true => {
                let mut copy = backend.zeros(queries.rows(), queries.cols(), Dtype::F32)?;
                backend.copy(queries.view(), copy.view_mut())?;
                Some(self.collective.all_gather_rows(copy, &rows.queries)?)
            }
            false => None,
        };
        Ok(Exchanged { queries, passages, all_queries })
    }

    /// The positives among the passages that queries are scored against.
    fn targets(&self, positives: &[u32], rows: &RowsPerRank) -> Vec<u32> {
        let first = match self.negatives_cross_device {
            true => (rows.before(self.collective.rank()) * rows.group_size) as u32,
            false => 0,
        };
        positives.iter().map(|positive| first + positive).collect()
    }

    /// The keys of the texts of all rows that are compared, and which of these rows are this process's.
    fn exchange_keys(
        &self,
        labels: &Labels<'_>,
        rows: &RowsPerRank,
    ) -> Result<Option<(TextKeys, Range<usize>)>> {
        if !self.options.false_negatives.mask_equal {
            return Ok(None);
        }
        let own = labels.text_keys.ok_or_else(|| lacks("keys of the texts"))?;
        let count = labels.positives.len();
        if !self.negatives_cross_device {
            return Ok(Some((own.clone(), 0..count)));
        }
        let lists = self.collective.all_gather_words(&own.to_words())?;
        let first = rows.before(self.collective.rank());
        Ok(Some((TextKeys::from_words(&lists, rows.group_size)?, first..first + count)))
    }

    /// The blocks of queries whose scores by `passages` passages are held at a time.
    fn blocks(&self, queries: usize, passages: usize) -> Vec<Range<usize>> {
        let size = (self.block_scores / passages.max(1)).clamp(1, queries);
        (0..queries).step_by(size).map(|start| start..queries.min(start + size)).collect()
    }

    /// Which scores of the queries `block` are compared, on the device. `keys` are those of all rows that are
    /// compared.
    fn directions(
        &self,
        backend: &B,
        labels: &Labels<'_>,
        rows: &RowsPerRank,
        keys: Option<&(TextKeys, Range<usize>)>,
        block: Range<usize>,
    ) -> Result<Directions<B>> {
        let targets = self.targets(&labels.positives[block.clone()], rows);
        let group_size = (!self.options.in_batch_negatives).then_some(rows.group_size);
        let of_block = |own: &Range<usize>| own.start + block.start..own.start + block.end;
        let listed = keys.map(|(keys, own)| keys.false_negatives(of_block(own)));
        let reverse = match self.options.symmetric {
            false => None,
            true => {
                let listed = keys.map(|(keys, own)| keys.false_negative_queries(of_block(own)));
                let first = match self.negatives_cross_device {
                    true => rows.before(self.collective.rank()),
                    false => 0,
                };
                let first = (first + block.start) as u32;
                let queries: Vec<u32> = (first..).take(targets.len()).collect();
                Some(Reverse {
                    targets: upload(backend, &queries)?,
                    mask: self.mask(backend, None, listed)?,
                    scatter: ScatterPlan::upload(&ScatterRows::new(&targets), backend)?,
                })
            }
        };
        let teacher = match self.options.distillation {
            None => None,
            Some(Distillation { temperature, .. }) => {
                let scores = labels.teacher_scores.ok_or_else(|| lacks("scores of a teacher"))?;
                let groups = block.start * rows.group_size..block.end * rows.group_size;
                let scores: Vec<f32> =
                    scores[groups].iter().map(|score| score / temperature).collect();
                Some(backend.upload(&scores, targets.len(), rows.group_size)?)
            }
        };
        let mask = self.mask(backend, group_size, listed)?;
        Ok(Directions { rows: block, targets: upload(backend, &targets)?, mask, reverse, teacher })
    }

    /// The mask of scores, if anything is left out.
    fn mask(
        &self,
        backend: &B,
        group_size: Option<usize>,
        listed: Option<ColumnLists>,
    ) -> Result<Option<ScoreMask<B>>> {
        // Similarities were divided by the temperature.
        let margin = self.options.false_negatives.margin.map(|m| m / self.info_nce.temperature);
        let columns = match listed.filter(|listed| !listed.columns.is_empty()) {
            None => None,
            Some(listed) => {
                let [starts, columns] =
                    backend.upload_indices([&listed.starts, &listed.columns])?;
                Some(ListedColumns { starts, columns })
            }
        };
        let is_empty = group_size.is_none() && margin.is_none() && columns.is_none();
        Ok((!is_empty).then_some(ScoreMask { group_size, columns, margin }))
    }

    /// The gradient by this process's rows, from that by the gathered ones.
    fn own_rows(&self, gradient: B::Tensor, counts: &[usize]) -> Result<B::Tensor> {
        match self.negatives_cross_device {
            true => self.collective.reduce_scatter_rows(gradient, counts),
            false => Ok(gradient),
        }
    }

    /// The factor that converts the gradient of this process's loss to its part of the gradient of the global
    /// loss, which is the mean over all rows. The sum of the parts is the gradient that one process would compute,
    /// unless the scale of the reference is asked for.
    fn gradient_factor(&self, rows: &RowsPerRank) -> f32 {
        let scaled = self.options.reference_gradient_scale && self.negatives_cross_device;
        let divisor = if scaled { self.collective.size() } else { 1 };
        (rows.share(self.collective.rank()) / divisor as f64) as f32
    }
}

impl<B: Backend> Objective<B> for Contrastive<B> {
    fn loss_and_gradient(
        &self,
        backend: &B,
        embeddings: Embeddings<B>,
        labels: &Labels<'_>,
        rows: &RowsPerRank,
    ) -> Result<LossAndGradient<B>> {
        let keys = self.exchange_keys(labels, rows)?;
        let Exchanged { queries, passages, all_queries } =
            self.exchange(backend, embeddings, rows)?;
        let Gradients { loss, mut dqueries, dpassages, dall_queries } = if queries.rows() == 0 {
            // The rows of other processes still get their gradients summed.
            let zeros = |x: &B::Tensor| backend.zeros(x.rows(), x.cols(), Dtype::F32);
            Gradients {
                loss: backend.zeros(1, 1, Dtype::F32)?,
                dqueries: zeros(&queries)?,
                dpassages: zeros(&passages)?,
                dall_queries: all_queries.as_ref().map(zeros).transpose()?,
            }
        } else {
            let blocks = self.blocks(queries.rows(), passages.rows()).into_iter();
            let directions = blocks
                .map(|block| self.directions(backend, labels, rows, keys.as_ref(), block))
                .collect::<Result<Vec<_>>>()?;
            let embeddings = ComparedEmbeddings {
                queries: &queries,
                passages: &passages,
                all_queries: all_queries.as_ref(),
            };
            let Contrastive { info_nce, ref options, normalized, .. } = *self;
            let terms = Terms { info_nce, options, normalized };
            terms.evaluate(backend, &embeddings, &directions, self.gradient_factor(rows))?
        };
        let dpassages = self.own_rows(dpassages, &rows.passages())?;
        if let Some(dall_queries) = dall_queries {
            let from_positives = self.own_rows(dall_queries, &rows.queries)?;
            backend.add_scaled(from_positives.view(), 1.0, dqueries.view_mut())?;
        }
        Ok(LossAndGradient { loss, dqueries, dpassages })
    }
}

/// The embeddings that are compared in one process.
struct Exchanged<B: Backend> {
    /// This process's. `[B, d]`
    queries: B::Tensor,
    /// Those of all processes with cross-device negatives. `[M, d]`
    passages: B::Tensor,
    /// Those of all processes, if other processes' queries are compared with this one's positives. `[N, d]`
    all_queries: Option<B::Tensor>,
}

fn lacks(what: &str) -> Error {
    Error::new(ErrorKind::Argument, format!("the input of a step has no {what}"))
        .hint("make the input with the settings of the objective, as the trainer does")
}

fn upload<B: Backend>(backend: &B, rows: &[u32]) -> Result<B::Index> {
    let [rows] = backend.upload_indices([rows])?;
    Ok(rows)
}

#[cfg(test)]
mod tests;
