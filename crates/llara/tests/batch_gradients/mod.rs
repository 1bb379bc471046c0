//! The gradients of one batch with the model's own objective, as the trainer computes them.

use std::sync::Arc;

use llara::BiEncoderModel;
use llara::backend::Backend;
use llara::data::Batch;
use llara::dist::Solo;
use llara::model::Dropout;
use llara::train::{Chunking, StepInput, accumulate_gradients};

/// Accumulates the gradients of the model's parameters; returns the loss.
pub(crate) fn batch_gradients<B: Backend>(
    model: &mut BiEncoderModel<B>,
    (query, passage): (&Batch, &Batch),
    chunking: &Chunking,
    dropout: Option<Dropout>,
) -> llara::Result<f32> {
    let deduplicate = model.options().shortcuts.dedup_sequences;
    let input = StepInput::from_batches(query, passage, deduplicate, dropout)?;
    let objective = model.objective(Arc::new(Solo))?;
    let loss = accumulate_gradients(model, &objective, &input, chunking)?;
    Ok(model.backend().download(&loss)?[0])
}
