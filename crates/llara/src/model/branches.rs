//! Attention of sequences that share the rows of their first tokens.
//!
//! A row exists once in every matrix of a layer but the input of attention: there, each sequence needs the keys and
//! values of all its positions next to each other. They are copied for attention, and their gradients are added up in
//! the order of the copies. Queries need no copy: those of a sequence that branches off another one are its own rows,
//! the last ones of the sequence.

use crate::Result;
use crate::backend::{AttentionGradients, Backend, Layout, ScatterPlan, ScatterRows, Shape, View};
use crate::data::BatchView;

/// The rows of each sequence, where some sequences share rows.
pub(crate) struct Branches<B: Backend> {
    /// Every position of each sequence: the rows of [`spread`](Self::spread).
    pub(crate) layout: Layout<B>,
    /// Index of each of these rows among the `T` rows of the batch. `[K]`
    rows: B::Index,
    /// Adds the gradients of the copies of a row.
    scatter: ScatterPlan<B>,
}

impl<B: Backend> Branches<B> {
    /// The branches of a batch; `None` if no sequence shares tokens.
    pub(super) fn new(backend: &B, batch: BatchView<'_>) -> Result<Option<Self>> {
        if batch.shared().iter().all(|&shared| shared == 0) {
            return Ok(None);
        }
        let (mut rows, mut positions, mut bounds) = (Vec::new(), Vec::new(), vec![0]);
        let mut root = 0;
        for (own, &shared) in batch.bounds().zip(batch.shared()) {
            if shared == 0 {
                root = own.start;
            }
            positions.extend(0..shared + own.end - own.start);
            rows.extend((root..root + shared).chain(own));
            bounds.push(rows.len() as u32);
        }
        let plan = ScatterRows::new(&rows);
        let lists = [&rows, &positions, &bounds, &plan.sources, &plan.targets, &plan.starts];
        let [rows, positions, offsets, sources, targets, starts] =
            backend.upload_indices(lists.map(Vec::as_slice))?;
        let layout = Layout { bounds, offsets, positions, longest: batch.longest() };
        let scatter = ScatterPlan::new(&plan, [sources, targets, starts]);
        Ok(Some(Branches { layout, rows, scatter }))
    }

    /// Keys and values of every position of each sequence: k and v `[T, KV·hd]`; result `[K, 2·KV·hd]`, concatenated
    /// by columns.
    pub(super) fn spread(
        &self,
        backend: &B,
        k: View<'_, B::Tensor>,
        v: View<'_, B::Tensor>,
    ) -> Result<B::Tensor> {
        let mut kv = backend.zeros(k.rows, k.cols + v.cols, k.dtype())?;
        backend.copy(k, kv.view_mut().with_cols(0..k.cols))?;
        backend.copy(v, kv.view_mut().with_cols(k.cols..k.cols + v.cols))?;
        backend.gather_rows(&kv, &self.rows)
    }

    /// The gradients with respect to q, k and v of the `rows` rows of the batch, from those with respect to q and the
    /// result of [`spread`](Self::spread). They are [`AttentionGradients::Fused`] if every row is a query.
    pub(super) fn gather_gradients(
        &self,
        backend: &B,
        gradients: AttentionGradients<B::Tensor>,
        rows: usize,
    ) -> Result<AttentionGradients<B::Tensor>> {
        let AttentionGradients::Separate { dq, dkv: of_copies } = gradients else {
            unreachable!("there are more keys than queries")
        };
        let mut dkv = backend.zeros(rows, of_copies.cols(), of_copies.dtype())?;
        backend.scatter_add_rows(&of_copies, &self.scatter, &mut dkv)?;
        drop(of_copies);
        if dq.rows() < rows {
            return Ok(AttentionGradients::Separate { dq, dkv });
        }
        let (q_cols, kv_cols) = (dq.cols(), dkv.cols());
        let mut dqkv = backend.zeros(rows, q_cols + kv_cols, dq.dtype())?;
        backend.copy(dq.view(), dqkv.view_mut().with_cols(0..q_cols))?;
        backend.copy(dkv.view(), dqkv.view_mut().with_cols(q_cols..q_cols + kv_cols))?;
        Ok(AttentionGradients::Fused(dqkv))
    }
}
