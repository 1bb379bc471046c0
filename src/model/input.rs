//! A packed batch on the device, with the rows that pooling will read.

use crate::Result;
use crate::backend::{Backend, Layout};
use crate::data::Batch;

/// Token ids of `S` sequences end to end, where they begin, and which rows are pooled.
pub struct Input<B: Backend> {
    /// `[T]`
    pub(crate) ids: B::Index,
    /// All T tokens.
    pub(crate) layout: Layout<B>,
    /// Rows of the pooled tokens, sequence by sequence. `[R]`
    pub(crate) pooled_rows: B::Index,
    /// Sequence s owns pooled rows `pooled_offsets[s]..pooled_offsets[s + 1]`. `[S + 1]`
    pub(crate) pooled_offsets: B::Index,
    /// Number of pooled rows, `R`.
    pub(crate) pooled: usize,
}

impl<B: Backend> Input<B> {
    /// Uploads `batch`; the last `pooled_tokens` tokens of each sequence (all, if it has fewer) are
    /// pooled.
    pub fn new(backend: &B, batch: &Batch, pooled_tokens: usize) -> Result<Self> {
        let mut pooled_rows = Vec::with_capacity(batch.len() * pooled_tokens);
        let mut pooled_offsets = vec![0];
        for bounds in batch.offsets().windows(2) {
            let length = (bounds[1] - bounds[0]) as usize;
            pooled_rows.extend(bounds[1] - pooled_tokens.min(length) as u32..bounds[1]);
            pooled_offsets.push(pooled_rows.len() as u32);
        }
        Ok(Input {
            ids: backend.upload_index(batch.ids())?,
            layout: Layout {
                offsets: backend.upload_index(batch.offsets())?,
                positions: backend.upload_index(&batch.positions())?,
                sequences: batch.len(),
                rows: batch.tokens(),
                longest: batch.longest(),
            },
            pooled: pooled_rows.len(),
            pooled_rows: backend.upload_index(&pooled_rows)?,
            pooled_offsets: backend.upload_index(&pooled_offsets)?,
        })
    }
}
