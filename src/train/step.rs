//! What one batch does to the gradients.

use crate::Result;
use crate::backend::{Backend, Shape};
use crate::biencoder::BiEncoderModel;
use crate::data::Batch;

/// Adds the gradient of the loss of one batch to the model's parameters; returns the loss `[1, 1]`,
/// on the device. `passage` holds, query by query, a positive and its hard negatives.
///
/// Queries and passages go through the decoder as one packed batch.
///
/// # Errors
/// When the passages are not a multiple of the queries, or a token id is beyond the vocabulary.
pub fn accumulate_gradients<B: Backend>(
    model: &mut BiEncoderModel<B>,
    query: &Batch,
    passage: &Batch,
) -> Result<B::Tensor> {
    let backend = model.backend().clone();
    let targets = model.targets(query.len(), passage.len())?;
    let both = Batch::from_sequences(query.sequences().chain(passage.sequences()))?;
    let encoding = model.encode_saving(&both)?;

    let q = backend.slice_rows(&encoding.reps, 0, query.len())?;
    let p = backend.slice_rows(&encoding.reps, query.len(), passage.len())?;
    let p = model.gather_passages(p)?;
    let info_nce = model.info_nce();
    let scored = info_nce.forward(&backend, &q, &p, &targets)?;
    let loss = backend.slice_rows(&scored.loss, 0, 1)?;

    let factor = gradient_factor(model.collective().size());
    let (dq, dp) = info_nce.backward(&backend, &q, &p, scored, factor)?;
    let dp = model.scatter_passage_grads(dp)?;
    debug_assert_eq!(dp.rows(), passage.len());
    let dreps = backend.concat_rows(&[&dq, &dp])?;
    model.backward(encoding, dreps)?;
    Ok(loss)
}

/// What turns the gradient of this process's loss into its part of the global loss, which is the mean
/// over processes: the parts then add up to the gradient that one process would have computed.
fn gradient_factor(processes: usize) -> f32 {
    1.0 / processes as f32
}
