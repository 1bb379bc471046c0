//! What `encode` takes: one batch, several, or nothing.

use crate::data::Batch;

/// One batch or a list of them, or nothing.
pub enum Features<'b> {
    /// Nothing to encode.
    None,
    /// Batches whose vectors are wanted end to end.
    Batches(Vec<&'b Batch>),
}

impl<'b> From<&'b Batch> for Features<'b> {
    fn from(batch: &'b Batch) -> Self {
        Features::Batches(vec![batch])
    }
}

impl<'b> From<Option<&'b Batch>> for Features<'b> {
    fn from(batch: Option<&'b Batch>) -> Self {
        batch.map_or(Features::None, Features::from)
    }
}

impl<'b> From<&'b [Batch]> for Features<'b> {
    fn from(batches: &'b [Batch]) -> Self {
        Features::Batches(batches.iter().collect())
    }
}

impl<'b> From<&'b Vec<Batch>> for Features<'b> {
    fn from(batches: &'b Vec<Batch>) -> Self {
        batches.as_slice().into()
    }
}

impl<'b, const N: usize> From<&'b [Batch; N]> for Features<'b> {
    fn from(batches: &'b [Batch; N]) -> Self {
        batches.as_slice().into()
    }
}
