//! What one batch does to the gradients, in bounded memory.
//!
//! Exact gradient caching (Gao et al. 2021): the batch is encoded in chunks of which only the vectors
//! are kept; the loss is taken over all of them; then each chunk goes forward again, this time keeping
//! its activations, and backward from the cached gradient of its vectors. The sum is the gradient of
//! the whole batch, whatever the chunks. A chunk whose activations may be kept goes forward once.

use std::ops::Range;

use crate::Result;
use crate::backend::{Backend, Shape};
use crate::biencoder::{BiEncoderModel, Encoding};
use crate::data::Batch;

/// How a batch is cut, and how much of it is kept between the forward and the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// Tokens in a chunk, at most; a longer sequence is a chunk of its own.
    pub max_tokens: usize,
    /// Sequences in a chunk, at most.
    pub max_sequences: usize,
    /// Tokens whose activations may wait for their backward pass; those of other chunks are computed
    /// twice.
    pub kept_tokens: usize,
}

impl Default for Chunking {
    /// One pass over everything.
    fn default() -> Self {
        Chunking { max_tokens: usize::MAX, max_sequences: usize::MAX, kept_tokens: usize::MAX }
    }
}

impl Chunking {
    /// The sequences of each chunk.
    pub(super) fn chunks(&self, batch: &Batch) -> Vec<Range<usize>> {
        let mut chunks = Vec::new();
        let (mut start, mut tokens) = (0, 0);
        for (at, sequence) in batch.sequences().enumerate() {
            let full =
                tokens + sequence.len() > self.max_tokens || at - start >= self.max_sequences;
            if full && at > start {
                chunks.push(start..at);
                (start, tokens) = (at, 0);
            }
            tokens += sequence.len();
        }
        chunks.push(start..batch.len());
        chunks
    }
}

/// A chunk between the two passes.
enum Waiting<B: Backend> {
    Kept(Encoding<B>),
    Recomputed,
}

/// Adds the gradient of the loss of one batch to the model's parameters; returns the loss `[1, 1]`,
/// on the device. `passage` holds, query by query, a positive and its hard negatives.
///
/// # Errors
/// When the passages are not a multiple of the queries, or a token id is beyond the vocabulary.
pub fn accumulate_gradients<B: Backend>(
    model: &mut BiEncoderModel<B>,
    query: &Batch,
    passage: &Batch,
    chunking: &Chunking,
) -> Result<B::Tensor> {
    let backend = model.backend().clone();
    let both = Batch::from_sequences(query.sequences().chain(passage.sequences()))?;
    // Equal texts have equal vectors, unless something random stands between.
    let (both, places) = match model.options().shortcuts.equal_once && !model.drops() {
        true => both.distinct(),
        false => both.with_places(),
    };
    let places = backend.upload_index(&places)?;
    let chunks = chunking.chunks(&both);

    let (reps, waiting) = encode_chunks(model, &both, &chunks, chunking.kept_tokens)?;
    let all_reps = backend.gather_rows(&reps, &places)?;
    let (loss, all_dreps) = loss_of_vectors(model, &all_reps, query.len(), passage.len())?;
    let mut dreps = backend.zeros(both.len(), reps.cols())?;
    backend.scatter_add_rows(&all_dreps, &places, &mut dreps)?;
    for (chunk, waiting) in chunks.into_iter().zip(waiting) {
        let dreps = backend.slice_rows(&dreps, chunk.start, chunk.len())?;
        let encoding = match waiting {
            Waiting::Kept(encoding) => encoding,
            Waiting::Recomputed => {
                let first_token = both.offsets()[chunk.start];
                model.encode_saving(&both.slice(chunk), first_token)?
            }
        };
        model.backward(encoding, dreps)?;
    }
    Ok(loss)
}

/// The vectors of all chunks `[S, d]`, and what waits for the backward pass. The first chunks are the
/// kept ones: their memory is free again before the others are recomputed.
fn encode_chunks<B: Backend>(
    model: &BiEncoderModel<B>,
    batch: &Batch,
    chunks: &[Range<usize>],
    kept_tokens: usize,
) -> Result<(B::Tensor, Vec<Waiting<B>>)> {
    let backend = model.backend();
    let mut reps = Vec::with_capacity(chunks.len());
    let mut waiting = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let first_token = batch.offsets()[chunk.start];
        let piece = batch.slice(chunk.clone());
        if batch.offsets()[chunk.end] as usize <= kept_tokens {
            let encoding = model.encode_saving(&piece, first_token)?;
            reps.push(backend.slice_rows(&encoding.reps, 0, chunk.len())?);
            waiting.push(Waiting::Kept(encoding));
        } else {
            reps.push(model.encode_training(&piece, first_token)?);
            waiting.push(Waiting::Recomputed);
        }
    }
    Ok((backend.concat_rows(&reps.iter().collect::<Vec<_>>())?, waiting))
}

/// Loss `[1, 1]` and its gradient by all vectors `[S, d]`, queries first.
fn loss_of_vectors<B: Backend>(
    model: &BiEncoderModel<B>,
    reps: &B::Tensor,
    queries: usize,
    passages: usize,
) -> Result<(B::Tensor, B::Tensor)> {
    let backend = model.backend();
    let targets = model.targets(queries, passages)?;
    let q = backend.slice_rows(reps, 0, queries)?;
    let p = model.gather_passages(backend.slice_rows(reps, queries, passages)?)?;
    let info_nce = model.info_nce();
    let scored = info_nce.forward(backend, &q, &p, &targets)?;
    let loss = backend.slice_rows(&scored.loss, 0, 1)?;
    let factor = gradient_factor(model.collective().size());
    let (dq, dp) = info_nce.backward(backend, &q, &p, scored, factor)?;
    let dp = model.scatter_passage_grads(dp)?;
    debug_assert_eq!(dp.rows(), passages);
    Ok((loss, backend.concat_rows(&[&dq, &dp])?))
}

/// What turns the gradient of this process's loss into its part of the global loss, which is the mean
/// over processes: the parts then add up to the gradient that one process would have computed.
fn gradient_factor(processes: usize) -> f32 {
    1.0 / processes as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_batch_within_their_bounds() {
        let lengths = [5usize, 3, 9, 1, 1, 4, 30, 2];
        let batch = Batch::from_sequences(lengths.map(|n| vec![1u32; n])).unwrap();
        for max_tokens in 1..40 {
            for max_sequences in 1..9 {
                let chunking = Chunking { max_tokens, max_sequences, ..Chunking::default() };
                let chunks = chunking.chunks(&batch);
                let mut next = 0;
                for chunk in chunks {
                    assert_eq!(chunk.start, next);
                    let tokens: usize = lengths[chunk.clone()].iter().sum();
                    assert!(chunk.len() == 1 || tokens <= max_tokens);
                    assert!(!chunk.is_empty() && chunk.len() <= max_sequences);
                    next = chunk.end;
                }
                assert_eq!(next, lengths.len());
            }
        }
        let whole = Chunking::default().chunks(&batch);
        assert!(whole.len() == 1 && whole[0] == (0..8));
    }
}
