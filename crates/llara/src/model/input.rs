//! A packed batch on the device, with the rows that pooling will read.

use std::ops::Range;

use super::pass::Rows;
use crate::Result;
use crate::backend::{Backend, Layout};
use crate::data::BatchView;

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
    /// pooled. `sequence_numbers` are the numbers of the sequences in the whole step.
    pub fn new(
        backend: &B,
        batch: BatchView<'_>,
        pooled_tokens: usize,
        sequence_numbers: &[u32],
    ) -> Result<Self> {
        let mut all = HostRows::default();
        let mut pooled = HostRows::default();
        let mut pooled_rows = Vec::with_capacity(batch.len() * pooled_tokens);
        for (bounds, &number) in batch.bounds().zip(sequence_numbers) {
            let length = bounds.end - bounds.start;
            let first_pooled = length.saturating_sub(pooled_tokens as u32);
            pooled_rows.extend(bounds.start + first_pooled..bounds.end);
            pooled.push(number, first_pooled..length);
            all.push(number, 0..length);
        }
        Ok(Input {
            ids: backend.upload_index(batch.ids())?,
            all: all.upload(backend, batch.longest())?,
            pooled: pooled.upload(backend, batch.longest())?,
            pooled_rows: backend.upload_index(&pooled_rows)?,
        })
    }
}

/// [`Rows`] before they are uploaded.
struct HostRows {
    offsets: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<u32>,
}

impl Default for HostRows {
    fn default() -> Self {
        HostRows { offsets: vec![0], positions: Vec::new(), sequences: Vec::new() }
    }
}

impl HostRows {
    /// Some positions of the next sequence.
    fn push(&mut self, sequence: u32, positions: Range<u32>) {
        self.sequences.extend(positions.clone().map(|_| sequence));
        self.positions.extend(positions);
        self.offsets.push(self.positions.len() as u32);
    }

    fn upload<B: Backend>(&self, backend: &B, longest: usize) -> Result<Rows<B>> {
        let layout = Layout {
            offsets: backend.upload_index(&self.offsets)?,
            positions: backend.upload_index(&self.positions)?,
            sequences: self.offsets.len() - 1,
            rows: self.positions.len(),
            longest,
        };
        Ok(Rows { layout, sequences: backend.upload_index(&self.sequences)? })
    }
}
