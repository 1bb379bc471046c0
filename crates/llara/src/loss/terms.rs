//! The terms of the objective, from embeddings that are all in this process to their gradients.
//!
//! Queries are compared in blocks, one after another, so that the memory of scores does not grow with the product of
//! queries and passages.

use std::ops::Range;

use super::info_nce::{InfoNce, Scored};
use super::options::ObjectiveOptions;
use crate::Result;
use crate::backend::{Backend, Dtype, ScatterPlan, ScoreMask, Shape};

/// Embeddings that are compared. All have the same number of columns.
pub(super) struct ComparedEmbeddings<'v, B: Backend> {
    /// The queries of this process. `[B, d]`
    pub(super) queries: &'v B::Tensor,
    /// The passages that they are scored against. `[M, d]`
    pub(super) passages: &'v B::Tensor,
    /// The queries that positives are scored against, if these are not `queries`. `[N, d]`
    pub(super) all_queries: Option<&'v B::Tensor>,
}

/// The mean loss of this process's rows, and `factor ·` its gradients.
pub(super) struct Gradients<B: Backend> {
    /// `[1, 1]`
    pub(super) loss: B::Tensor,
    /// `[B, d]`
    pub(super) dqueries: B::Tensor,
    /// `[M, d]`
    pub(super) dpassages: B::Tensor,
    /// `[N, d]`
    pub(super) dall_queries: Option<B::Tensor>,
}

/// Which scores of a block of queries are compared in which softmax.
pub(super) struct Directions<B: Backend> {
    /// The `b` queries of the block.
    pub(super) rows: Range<usize>,
    /// The positive of each query among the passages. `[b]`
    pub(super) targets: B::Index,
    /// Passages that are left out.
    pub(super) mask: Option<ScoreMask<B>>,
    /// Positives against queries, for the symmetric loss.
    pub(super) reverse: Option<Reverse<B>>,
    /// The teacher's scores of each query's group, divided by its temperature. `[b, G]`
    pub(super) teacher: Option<B::Tensor>,
}

/// The direction from positives to queries.
pub(super) struct Reverse<B: Backend> {
    /// The query of each positive among the queries. `[b]`
    pub(super) targets: B::Index,
    /// Queries that are left out.
    pub(super) mask: Option<ScoreMask<B>>,
    /// Adds gradients of positives `[b, d]` to those of passages.
    pub(super) scatter: ScatterPlan<B>,
}

/// The settings of the terms.
pub(super) struct Terms<'t> {
    pub(super) info_nce: InfoNce,
    pub(super) options: &'t ObjectiveOptions,
    /// Whether embeddings have length 1; prefixes are then normalized, too.
    pub(super) normalized: bool,
}

impl Terms<'_> {
    /// Loss and `factor ·` gradients; of the weighted sum over prefixes of the embeddings, if there are
    /// any (Matryoshka representation learning, Kusupati et al. 2022).
    pub(super) fn evaluate<B: Backend>(
        &self,
        backend: &B,
        embeddings: &ComparedEmbeddings<'_, B>,
        directions: &[Directions<B>],
        factor: f32,
    ) -> Result<Gradients<B>> {
        if self.options.matryoshka.is_empty() {
            return self.evaluate_whole(backend, embeddings, directions, factor);
        }
        let zeros = |x: &B::Tensor| backend.zeros(x.rows(), x.cols(), Dtype::F32);
        let mut sum = Gradients::<B> {
            loss: backend.zeros(1, 1, Dtype::F32)?,
            dqueries: zeros(embeddings.queries)?,
            dpassages: zeros(embeddings.passages)?,
            dall_queries: embeddings.all_queries.map(zeros).transpose()?,
        };
        for prefix in &self.options.matryoshka {
            let cut = |x| Prefix::new(backend, x, prefix.dimension, self.normalized);
            let (queries, passages) = (cut(embeddings.queries)?, cut(embeddings.passages)?);
            let all_queries = embeddings.all_queries.map(cut).transpose()?;
            let embeddings = ComparedEmbeddings {
                queries: &queries.values,
                passages: &passages.values,
                all_queries: all_queries.as_ref().map(|prefix| &prefix.values),
            };
            let factor = factor * prefix.weight;
            let of_prefix = self.evaluate_whole(backend, &embeddings, directions, factor)?;
            backend.add_scaled(of_prefix.loss.view(), prefix.weight, sum.loss.view_mut())?;
            queries.add_gradient(backend, of_prefix.dqueries, &mut sum.dqueries)?;
            passages.add_gradient(backend, of_prefix.dpassages, &mut sum.dpassages)?;
            if let (Some(prefix), Some(gradient), Some(sum)) =
                (&all_queries, of_prefix.dall_queries, &mut sum.dall_queries)
            {
                prefix.add_gradient(backend, gradient, sum)?;
            }
        }
        Ok(sum)
    }

    /// The sum over blocks of queries, with the blocks' shares of the rows as weights.
    fn evaluate_whole<B: Backend>(
        &self,
        backend: &B,
        embeddings: &ComparedEmbeddings<'_, B>,
        directions: &[Directions<B>],
        factor: f32,
    ) -> Result<Gradients<B>> {
        let ComparedEmbeddings { queries, passages, all_queries } = *embeddings;
        if let [all] = directions {
            return self.evaluate_block(backend, queries, embeddings, all, factor);
        }
        let zeros = |x: &B::Tensor| backend.zeros(x.rows(), x.cols(), Dtype::F32);
        let mut sum = Gradients::<B> {
            loss: backend.zeros(1, 1, Dtype::F32)?,
            dqueries: zeros(queries)?,
            dpassages: zeros(passages)?,
            dall_queries: all_queries.map(zeros).transpose()?,
        };
        for block in directions {
            let rows = block.rows.clone();
            let share = rows.len() as f32 / queries.rows() as f32;
            let mut own = backend.zeros(rows.len(), queries.cols(), Dtype::F32)?;
            backend.copy(queries.view().with_rows(rows.clone()), own.view_mut())?;
            let of_block = self.evaluate_block(backend, &own, embeddings, block, factor * share)?;
            backend.add_scaled(of_block.loss.view(), share, sum.loss.view_mut())?;
            let dqueries = sum.dqueries.view_mut().with_rows(rows);
            backend.add_scaled(of_block.dqueries.view(), 1.0, dqueries)?;
            backend.add_scaled(of_block.dpassages.view(), 1.0, sum.dpassages.view_mut())?;
            if let Some(dcandidates) = of_block.dall_queries {
                // Positives are compared with the queries of all blocks.
                let target = sum.dall_queries.as_mut().unwrap_or(&mut sum.dqueries);
                backend.add_scaled(dcandidates.view(), 1.0, target.view_mut())?;
            }
        }
        Ok(sum)
    }

    /// The queries of a block against passages; with `reverse`, the mean of that and of their positives against
    /// queries.
    ///
    /// `dqueries` are those of the block. `dall_queries` are those that positives are scored against, if these are not
    /// exactly `queries`.
    fn evaluate_block<B: Backend>(
        &self,
        backend: &B,
        queries: &B::Tensor,
        embeddings: &ComparedEmbeddings<'_, B>,
        directions: &Directions<B>,
        factor: f32,
    ) -> Result<Gradients<B>> {
        let ComparedEmbeddings { queries: own, passages, all_queries } = *embeddings;
        let weight = if directions.reverse.is_some() { 0.5 } else { 1.0 };
        let (loss, dscores) = self.forward(backend, (queries, passages), directions, weight)?;
        let (mut dqueries, mut dpassages) =
            self.info_nce.backward(backend, queries, passages, &dscores, factor * weight)?;
        drop(dscores);
        let Some(reverse) = &directions.reverse else {
            return Ok(Gradients { loss, dqueries, dpassages, dall_queries: None });
        };
        let positives = backend.gather_rows(passages, &directions.targets)?;
        let candidates = all_queries.unwrap_or(own);
        let Scored { loss: of_reverse, dscores, .. } = self.info_nce.forward(
            backend,
            &positives,
            candidates,
            &reverse.targets,
            reverse.mask.as_ref(),
        )?;
        let (dpositives, dcandidates) =
            self.info_nce.backward(backend, &positives, candidates, &dscores, factor * weight)?;
        backend.scatter_add_rows(&dpositives, &reverse.scatter, &mut dpassages)?;
        let dall_queries = match all_queries.is_none() && queries.rows() == own.rows() {
            true => {
                backend.add_scaled(dcandidates.view(), 1.0, dqueries.view_mut())?;
                None
            }
            false => Some(dcandidates),
        };
        let loss = weighted_sum(backend, [(&loss, weight), (&of_reverse, weight)])?;
        Ok(Gradients { loss, dqueries, dpassages, dall_queries })
    }

    /// The loss of queries against passages, with distillation, and its gradient by the scores. Both are
    /// multiplied by `weight` later, which distillation must not be.
    fn forward<B: Backend>(
        &self,
        backend: &B,
        (queries, passages): (&B::Tensor, &B::Tensor),
        directions: &Directions<B>,
        weight: f32,
    ) -> Result<(B::Tensor, B::Tensor)> {
        let Scored { scores, loss, mut dscores } = self.info_nce.forward(
            backend,
            queries,
            passages,
            &directions.targets,
            directions.mask.as_ref(),
        )?;
        let (Some(distillation), Some(teacher)) = (self.options.distillation, &directions.teacher)
        else {
            return Ok((loss, dscores));
        };
        let kind = distillation.kind.loss(self.info_nce.temperature);
        let scale = distillation.weight / weight;
        // A group begins with its positive.
        let firsts = &directions.targets;
        let distance = backend.distillation(&scores, firsts, teacher, kind, scale, &mut dscores)?;
        Ok((weighted_sum(backend, [(&loss, 1.0), (&distance, scale)])?, dscores))
    }
}

/// The first features of some embeddings.
struct Prefix<B: Backend> {
    /// `[n, dimension]`
    values: B::Tensor,
    /// Reciprocal lengths before normalization. `[n, 1]`
    inv_norm: Option<B::Tensor>,
}

impl<B: Backend> Prefix<B> {
    fn new(backend: &B, x: &B::Tensor, dimension: usize, normalized: bool) -> Result<Self> {
        let mut values = backend.zeros(x.rows(), dimension, Dtype::F32)?;
        backend.copy(x.view().with_cols(0..dimension), values.view_mut())?;
        if !normalized {
            return Ok(Prefix { values, inv_norm: None });
        }
        let (values, inv_norm) = backend.normalize(&values)?;
        Ok(Prefix { values, inv_norm: Some(inv_norm) })
    }

    /// Adds to the gradient by the whole embeddings, from that by the prefix.
    fn add_gradient(&self, backend: &B, gradient: B::Tensor, sum: &mut B::Tensor) -> Result<()> {
        let gradient = match &self.inv_norm {
            Some(inv_norm) => {
                backend.normalize_backward(gradient.view(), &self.values, inv_norm)?
            }
            None => gradient,
        };
        let columns = 0..gradient.cols();
        backend.add_scaled(gradient.view(), 1.0, sum.view_mut().with_cols(columns))
    }
}

/// `Σ weight · loss`. `[1, 1]`
fn weighted_sum<B: Backend, const N: usize>(
    backend: &B,
    losses: [(&B::Tensor, f32); N],
) -> Result<B::Tensor> {
    let mut sum = backend.zeros(1, 1, Dtype::F32)?;
    for (loss, weight) in losses {
        backend.add_scaled(loss.view(), weight, sum.view_mut())?;
    }
    Ok(sum)
}
