//! A packed batch on the device, its pooled rows, and pooling: the embedding of a sequence is the mean of the
//! hidden states of its pooled tokens.

use std::ops::Range;

use super::branches::Branches;
use super::pass::{OutputRows, Pass, Rows};
use super::trained_tokens::TokenLookup;
use crate::Result;
use crate::backend::{Backend, Layout, ScatterPlan, ScatterRows};
use crate::data::BatchView;

/// Concatenated token ids of `S` sequences, their offsets, and the rows that are pooled.
pub struct Input<B: Backend> {
    /// `[T]`
    pub(crate) ids: B::Index,
    /// Adds the gradient of each token's embedding to the gradient of the embedding table.
    pub(crate) ids_scatter: ScatterPlan<B>,
    /// Where the embeddings are, if some tokens have one of their own.
    pub(crate) lookup: Option<TokenLookup<B>>,
    /// All T tokens.
    pub(crate) all: Rows<B>,
    /// The rows of each sequence, if some sequences share rows.
    pub(crate) branches: Option<Branches<B>>,
    /// The R pooled tokens, grouped by sequence.
    pub(crate) pooled: Rows<B>,
    /// Indices of the pooled rows among all rows. `[R]`
    pub(crate) pooled_rows: B::Index,
    /// Adds the gradient of the pooled rows to that of all rows.
    pub(crate) pooled_scatter: ScatterPlan<B>,
}

impl<B: Backend> Input<B> {
    /// Uploads `batch`, in one transfer (besides those of trained tokens and of branches). The last `counts[s]` tokens
    /// of each sequence (all of its own, if it has fewer) are pooled: the decoder returns their hidden states.
    /// `sequence_numbers` are the indices of the sequences in the whole step. The tokens `trained`, ascending, have
    /// embeddings of their own.
    pub(crate) fn new(
        backend: &B,
        batch: BatchView<'_>,
        counts: impl IntoIterator<Item = usize>,
        sequence_numbers: &[u32],
        trained: &[u32],
    ) -> Result<Self> {
        let mut all = HostRows::default();
        let mut pooled = HostRows::default();
        let mut pooled_rows = Vec::new();
        let sequences = batch.bounds().zip(batch.shared()).zip(sequence_numbers);
        for (((bounds, &shared), &number), count) in sequences.zip(counts) {
            let length = bounds.end - bounds.start;
            let first_pooled = length.saturating_sub(count as u32);
            pooled_rows.extend(bounds.start + first_pooled..bounds.end);
            pooled.push(number, shared + first_pooled..shared + length);
            all.push(number, shared..shared + length);
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
            lookup: TokenLookup::new(backend, batch.ids(), trained)?,
            ids_scatter: ScatterPlan::new(&by_id, [id_sources, id_targets, id_starts]),
            branches: Branches::new(backend, batch)?,
            all: all.on_device(longest, [all_offsets, all_positions, all_sequences]),
            pooled: pooled.on_device(longest, [pooled_offsets, pooled_positions, pooled_sequences]),
            pooled_rows: pooled_index,
            pooled_scatter: ScatterPlan::new(&by_row, [row_sources, row_targets, row_starts]),
        })
    }
}

impl<B: Backend> Input<B> {
    /// The pooled rows, for a layer that is computed only at these.
    pub(crate) fn selected<'a>(&'a self, pass: &'a Pass<'a, B>) -> OutputRows<'a, B> {
        OutputRows { pass, rows: &self.pooled_rows, scatter: &self.pooled_scatter }
    }
}

/// Mean of each sequence's pooled rows: hidden `[R, d]` → `[S, d]`.
pub fn mean_pool<B: Backend>(
    backend: &B,
    hidden: &B::Tensor,
    input: &Input<B>,
) -> Result<B::Tensor> {
    backend.segment_mean(hidden, &input.pooled.layout.offsets)
}

/// Gradient of [`mean_pool`]: `[S, d]` → `[R, d]`.
pub(crate) fn mean_pool_backward<B: Backend>(
    backend: &B,
    dembeddings: &B::Tensor,
    input: &Input<B>,
) -> Result<B::Tensor> {
    backend.segment_mean_backward(
        dembeddings,
        &input.pooled.layout.offsets,
        input.pooled.layout.rows(),
    )
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
    /// Appends positions of the next sequence.
    fn push(&mut self, sequence: u32, positions: Range<u32>) {
        self.sequences.extend(positions.clone().map(|_| sequence));
        self.positions.extend(positions);
        self.bounds.push(self.positions.len() as u32);
    }

    /// The rows with their uploaded indices.
    fn on_device<B: Backend>(
        self,
        longest: usize,
        [offsets, positions, sequences]: [B::Index; 3],
    ) -> Rows<B> {
        let layout = Layout { bounds: self.bounds, offsets, positions, longest };
        Rows { layout, sequences }
    }
}
