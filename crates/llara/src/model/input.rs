//! A packed batch on the device, with the rows that pooling will read.

use std::ops::Range;

use super::pass::{OutputRows, Pass, Rows};
use crate::Result;
use crate::backend::{Backend, Layout, ScatterPlan, ScatterRows};
use crate::data::BatchView;

/// Token ids of `S` sequences end to end, where they begin, and which rows are pooled.
pub struct Input<B: Backend> {
    /// `[T]`
    pub(crate) ids: B::Index,
    /// Adds the gradient of each token's embedding to the table's.
    pub(crate) ids_scatter: ScatterPlan<B>,
    /// All T tokens.
    pub(crate) all: Rows<B>,
    /// The R tokens that are pooled, sequence by sequence.
    pub(crate) pooled: Rows<B>,
    /// Where the pooled rows are among all. `[R]`
    pub(crate) pooled_rows: B::Index,
    /// Adds a gradient by the pooled rows to one by all rows.
    pub(crate) pooled_scatter: ScatterPlan<B>,
}

impl<B: Backend> Input<B> {
    /// Uploads `batch`, in one transfer; the last `pooled_tokens` tokens of each sequence (all, if it has
    /// fewer) are pooled. `sequence_numbers` are the numbers of the sequences in the whole step.
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
        let by_id = ScatterRows::new(batch.ids());
        let by_row = ScatterRows::new(&pooled_rows);
        let [
            ids,
            all_offsets,
            all_positions,
            all_sequences,
            pooled_offsets,
            pooled_positions,
            pooled_sequences,
            pooled_index,
            id_sources,
            id_targets,
            id_starts,
            row_sources,
            row_targets,
            row_starts,
        ] = backend.upload_indices([
            batch.ids(),
            &all.bounds,
            &all.positions,
            &all.sequences,
            &pooled.bounds,
            &pooled.positions,
            &pooled.sequences,
            &pooled_rows,
            &by_id.sources,
            &by_id.targets,
            &by_id.starts,
            &by_row.sources,
            &by_row.targets,
            &by_row.starts,
        ])?;
        let longest = batch.longest();
        Ok(Input {
            ids,
            ids_scatter: by_id.on_device([id_sources, id_targets, id_starts]),
            all: all.on_device(longest, [all_offsets, all_positions, all_sequences]),
            pooled: pooled.on_device(longest, [pooled_offsets, pooled_positions, pooled_sequences]),
            pooled_rows: pooled_index,
            pooled_scatter: by_row.on_device([row_sources, row_targets, row_starts]),
        })
    }
}

impl<B: Backend> Input<B> {
    /// The pooled rows, for a pass over them.
    pub(crate) fn selected<'a>(&'a self, pass: &'a Pass<'a, B>) -> OutputRows<'a, B> {
        OutputRows { pass, rows: &self.pooled_rows, scatter: &self.pooled_scatter }
    }
}

/// [`Rows`] before they are uploaded.
struct HostRows {
    bounds: Vec<u32>,
    positions: Vec<u32>,
    sequences: Vec<u32>,
}

impl Default for HostRows {
    fn default() -> Self {
        HostRows { bounds: vec![0], positions: Vec::new(), sequences: Vec::new() }
    }
}

impl HostRows {
    /// Some positions of the next sequence.
    fn push(&mut self, sequence: u32, positions: Range<u32>) {
        self.sequences.extend(positions.clone().map(|_| sequence));
        self.positions.extend(positions);
        self.bounds.push(self.positions.len() as u32);
    }

    /// With what was uploaded.
    fn on_device<B: Backend>(
        self,
        longest: usize,
        [offsets, positions, sequences]: [B::Index; 3],
    ) -> Rows<B> {
        let layout = Layout { bounds: self.bounds, offsets, positions, longest };
        Rows { layout, sequences }
    }
}
