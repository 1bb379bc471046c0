//! A packed batch on the device, with the rows that pooling will read.

use super::pass::Rows;
use crate::Result;
use crate::backend::{Backend, Layout};
use crate::data::Batch;

/// Token ids of `S` sequences end to end, where they begin, and which rows are pooled.
pub struct Input<B: Backend> {
    /// `[T]`
    pub(crate) ids: B::Index,
    /// All T tokens.
    pub(crate) all: Rows<B>,
    /// The R tokens that are pooled, sequence by sequence.
    pub(crate) pooled: Rows<B>,
    /// Where the pooled rows stand among all. `[R]`
    pub(crate) pooled_rows: B::Index,
}

impl<B: Backend> Input<B> {
    /// Uploads `batch`; the last `pooled_tokens` tokens of each sequence (all, if it has fewer) are
    /// pooled. `first_token` is the number of its first token among all tokens of the step, where the
    /// batch is a piece of a larger one.
    pub fn new(backend: &B, batch: &Batch, pooled_tokens: usize, first_token: u32) -> Result<Self> {
        let all: Vec<u32> = (0..batch.tokens() as u32).collect();
        let mut pooled = Vec::with_capacity(batch.len() * pooled_tokens);
        let mut pooled_offsets = vec![0];
        for bounds in batch.offsets().windows(2) {
            let length = (bounds[1] - bounds[0]) as usize;
            pooled.extend(bounds[1] - pooled_tokens.min(length) as u32..bounds[1]);
            pooled_offsets.push(pooled.len() as u32);
        }
        let positions = batch.positions();
        let rows = |rows: &[u32], offsets: &[u32]| -> Result<Rows<B>> {
            let positions: Vec<u32> = rows.iter().map(|&row| positions[row as usize]).collect();
            let numbers: Vec<u32> = rows.iter().map(|row| first_token.wrapping_add(*row)).collect();
            let layout = Layout {
                offsets: backend.upload_index(offsets)?,
                positions: backend.upload_index(&positions)?,
                sequences: batch.len(),
                rows: rows.len(),
                longest: batch.longest(),
            };
            Ok(Rows { layout, numbers: backend.upload_index(&numbers)? })
        };
        Ok(Input {
            ids: backend.upload_index(batch.ids())?,
            all: rows(&all, batch.offsets())?,
            pooled: rows(&pooled, &pooled_offsets)?,
            pooled_rows: backend.upload_index(&pooled)?,
        })
    }
}
