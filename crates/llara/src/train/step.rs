//! The gradients of one batch, in bounded memory.
//!
//! Gradient caching (Gao et al. 2021): the batch is encoded in chunks, of which only the embeddings are kept. The
//! loss is computed from all embeddings. Then the forward pass of each chunk is repeated, now keeping its
//! activations, and its backward pass starts from the cached gradient of its embeddings. The sum over chunks is
//! the exact gradient of the whole batch. Chunks whose activations fit the limit are computed only once.

use std::ops::Range;

use super::step_input::StepInput;
use crate::Result;
use crate::backend::{Backend, Dtype, ScatterPlan, ScatterRows, Shape};
use crate::biencoder::{BiEncoderModel, Encoding};
use crate::data::Batch;
use crate::loss::{Embeddings, LossAndGradient, Objective};
use crate::model::GradientsReady;

/// How a batch is split into chunks, and how many chunks keep their activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunking {
    /// Maximum number of tokens in a chunk; a longer sequence, with those that branch off it, is a separate chunk.
    pub max_tokens: usize,
    /// Maximum number of sequences in a chunk; a sequence and those that branch off it are not separated.
    pub max_sequences: usize,
    /// Maximum number of tokens whose activations are kept for the backward pass; those of other chunks
    /// are recomputed.
    pub kept_tokens: usize,
}

impl Default for Chunking {
    /// One chunk without limits.
    fn default() -> Self {
        Chunking { max_tokens: usize::MAX, max_sequences: usize::MAX, kept_tokens: usize::MAX }
    }
}

impl Chunking {
    /// The sequences of each chunk.
    pub(super) fn chunks(&self, batch: &Batch) -> Vec<Range<usize>> {
        let mut chunks = Vec::new();
        let (mut start, mut tokens) = (0, 0);
        for tree in batch.trees() {
            let offset_of = |sequence: usize| batch.offsets()[sequence] as usize;
            let added = offset_of(tree.end) - offset_of(tree.start);
            let full = tokens + added > self.max_tokens || tree.end - start > self.max_sequences;
            if full && tree.start > start {
                chunks.push(start..tree.start);
                (start, tokens) = (tree.start, 0);
            }
            tokens += added;
        }
        chunks.push(start..batch.len());
        chunks
    }
}

/// A chunk between the two passes.
enum Chunk<B: Backend> {
    Kept(Box<Encoding<B>>),
    Recomputed,
}

/// Adds the gradient of the objective on one batch to the model's parameters; returns the loss
/// `[1, 1]`, on the device.
///
/// # Errors
/// When a token id is beyond the vocabulary, or an operation of the device or the process group fails.
pub fn accumulate_gradients<B: Backend>(
    model: &mut BiEncoderModel<B>,
    objective: &dyn Objective<B>,
    input: &StepInput,
    chunking: &Chunking,
) -> Result<B::Tensor> {
    accumulate_gradients_with(model, objective, input, chunking, &mut ())
}

/// [`accumulate_gradients`] that calls `ready` during the last chunk with parameters whose gradients are complete.
///
/// A process that has no sequence in this step takes part in the objective, and its gradient is zero.
///
/// # Errors
/// As for [`accumulate_gradients`], or what `ready` returns.
pub fn accumulate_gradients_with<B: Backend>(
    model: &mut BiEncoderModel<B>,
    objective: &dyn Objective<B>,
    input: &StepInput,
    chunking: &Chunking,
    ready: &mut dyn GradientsReady<B>,
) -> Result<B::Tensor> {
    if input.batch.is_empty() {
        return no_sequences(model, objective, input, ready);
    }
    let backend = model.backend().clone();
    let chunks = chunking.chunks(&input.batch);
    let (encoded, states) = encode_chunks(model, input, &chunks, chunking.kept_tokens)?;
    let places = Places::upload(&backend, input)?;
    let embeddings = Embeddings {
        queries: backend.gather_rows(&encoded, &places.queries)?,
        passages: backend.gather_rows(&encoded, &places.passages)?,
    };
    let LossAndGradient { loss, dqueries, dpassages } =
        objective.loss_and_gradient(&backend, embeddings, &input.labels(), &input.rows_per_rank)?;
    let mut gradient = backend.zeros(encoded.rows(), encoded.cols(), Dtype::F32)?;
    backend.scatter_add_rows(&dqueries, &places.query_scatter, &mut gradient)?;
    backend.scatter_add_rows(&dpassages, &places.passage_scatter, &mut gradient)?;
    drop((encoded, dqueries, dpassages));
    let last = chunks.len() - 1;
    for (number, (chunk, state)) in chunks.into_iter().zip(states).enumerate() {
        let gradient = gradient.view().with_rows(chunk.clone());
        let encoding = match state {
            Chunk::Kept(encoding) => *encoding,
            Chunk::Recomputed => {
                let numbers = &input.sequence_numbers[chunk.clone()];
                model.encode_saving(input.batch.slice(chunk), numbers, input.dropout)?
            }
        };
        let ready: &mut dyn GradientsReady<B> = if number == last { ready } else { &mut () };
        model.backward(encoding, gradient, ready)?;
    }
    Ok(loss)
}

/// The rows of the embeddings of all sequences that are those of the queries and passages, on the device.
struct Places<B: Backend> {
    queries: B::Index,
    passages: B::Index,
    query_scatter: ScatterPlan<B>,
    passage_scatter: ScatterPlan<B>,
}

impl<B: Backend> Places<B> {
    /// All in one transfer.
    fn upload(backend: &B, input: &StepInput) -> Result<Self> {
        let query_rows = ScatterRows::new(&input.queries);
        let passage_rows = ScatterRows::new(&input.passages);
        let [queries, passages, qs, qt, qstarts, ps, pt, pstarts] = backend.upload_indices([
            &input.queries,
            &input.passages,
            &query_rows.sources,
            &query_rows.targets,
            &query_rows.starts,
            &passage_rows.sources,
            &passage_rows.targets,
            &passage_rows.starts,
        ])?;
        Ok(Places {
            queries,
            passages,
            query_scatter: ScatterPlan::new(&query_rows, [qs, qt, qstarts]),
            passage_scatter: ScatterPlan::new(&passage_rows, [ps, pt, pstarts]),
        })
    }
}

/// The step of a process without sequences: its gradient is zero, but it takes part in communication.
fn no_sequences<B: Backend>(
    model: &mut BiEncoderModel<B>,
    objective: &dyn Objective<B>,
    input: &StepInput,
    ready: &mut dyn GradientsReady<B>,
) -> Result<B::Tensor> {
    let backend = model.backend().clone();
    let none = || backend.zeros(0, model.dimension(), Dtype::F32);
    let embeddings = Embeddings { queries: none()?, passages: none()? };
    let LossAndGradient { loss, .. } =
        objective.loss_and_gradient(&backend, embeddings, &input.labels(), &input.rows_per_rank)?;
    let decoder = model.decoder_mut();
    decoder.set_zero_gradients(&backend)?;
    ready.ready(&mut decoder.parameters_mut())?;
    Ok(loss)
}

/// The embeddings of all chunks `[S, d]`, and the state of each for its backward pass. The first chunks
/// are the kept ones, so that their memory is freed before the others are recomputed.
fn encode_chunks<B: Backend>(
    model: &BiEncoderModel<B>,
    input: &StepInput,
    chunks: &[Range<usize>],
    kept_tokens: usize,
) -> Result<(B::Tensor, Vec<Chunk<B>>)> {
    let backend = model.backend();
    let batch = &input.batch;
    let mut embeddings = backend.zeros(batch.len(), model.dimension(), Dtype::F32)?;
    let mut states = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let sequences = batch.slice(chunk.clone());
        let numbers = &input.sequence_numbers[chunk.clone()];
        let rows = embeddings.view_mut().with_rows(chunk.clone());
        if batch.offsets()[chunk.end] as usize <= kept_tokens {
            let encoding = model.encode_saving(sequences, numbers, input.dropout)?;
            backend.copy(encoding.embeddings.view(), rows)?;
            states.push(Chunk::Kept(Box::new(encoding)));
        } else {
            let chunk = model.encode_training(sequences, numbers, input.dropout)?;
            backend.copy(chunk.view(), rows)?;
            states.push(Chunk::Recomputed);
        }
    }
    Ok((embeddings, states))
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

    #[test]
    fn branches_stay_with_their_root() {
        let sequence = |tokens: usize, shared: usize| (vec![1u32; tokens], shared);
        let lengths = [(5, 0), (2, 4), (6, 0), (3, 0), (1, 2), (1, 3)];
        let batch = Batch::from_branches(lengths.map(|(n, shared)| sequence(n, shared))).unwrap();
        let chunks = |max_tokens, max_sequences| {
            Chunking { max_tokens, max_sequences, ..Chunking::default() }.chunks(&batch)
        };
        assert_eq!(chunks(1, usize::MAX), [0..2, 2..3, 3..6]);
        assert_eq!(chunks(12, usize::MAX), [0..2, 2..6]);
        assert_eq!(chunks(13, usize::MAX), [0..3, 3..6]);
        assert_eq!(chunks(usize::MAX, 1), [0..2, 2..3, 3..6]);
        assert_eq!(chunks(usize::MAX, 4), [0..3, 3..6]);
    }
}
