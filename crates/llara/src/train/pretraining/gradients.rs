//! The gradients of one step of pretraining, in bounded memory.
//!
//! Logits exist for some rows at a time: a block of rows is multiplied by the head, compared with its targets, and
//! its gradient goes back through the head before the next block is computed.

use std::sync::Arc;

use super::input::{ChunkTargets, PretrainingInput, TargetCounts};
use super::options::LossWeights;
use crate::Result;
use crate::backend::{Backend, Dtype, ListedColumns, ScatterPlan, ScatterRows, Shape};
use crate::biencoder::BiEncoderModel;
use crate::dist::Collective;
use crate::model::{Decoder, GradientsReady};
use crate::train::step::Chunking;

/// Elements of a block of logits: 16 MB.
const BLOCK_ELEMENTS: usize = 1 << 22;
/// Rows of a block at least: products with fewer would spend most of their time reading the head.
const MIN_BLOCK_ROWS: usize = 256;

/// The factor of both set losses in the reference.
const SET_LOSS_FACTOR: f64 = 0.1;

/// The loss of pretraining for the processes of a group.
pub struct PretrainingLoss<B: Backend> {
    /// Factors of its terms.
    pub weights: LossWeights,
    /// The processes that train together.
    pub collective: Arc<dyn Collective<B>>,
}

/// The factors of sums over targets: `loss = Σ factor · term`.
struct Factors {
    /// From the sum over targets to the reported term: LM, EBAE, EBAR.
    term: [f64; 3],
    /// From the reported term to the loss.
    loss: [f64; 3],
}

impl Factors {
    /// `all` are the numbers of targets of all processes.
    fn new(weights: &LossWeights, all: &TargetCounts) -> Self {
        let mean = |count: f64| if count > 0.0 { 1.0 / count } else { 0.0 };
        let both = all.sets.iter().filter(|&&count| count > 0.0).count().max(1) as f64;
        let [encode, regress] = all.sets.map(|count| SET_LOSS_FACTOR * mean(count));
        let LossWeights { language_model, auto_encode, auto_regress } = *weights;
        Factors {
            term: [mean(all.labels), encode, regress],
            loss: [
                f64::from(language_model),
                f64::from(auto_encode) / both,
                f64::from(auto_regress) / both,
            ],
        }
    }
}

/// Adds the gradient of the loss on one batch to the parameters of a model that was loaded with its language-model
/// head. `ready` receives parameters whose gradients are complete during the last chunk.
///
/// Returns this process's part of the loss, and of its terms LM, EBAE and EBAR, on the device; a term for which no
/// process has a target is NaN. `[1, 4]`
///
/// # Errors
/// The model has no head, a token id is beyond the vocabulary, or an operation of the device or the process group
/// fails.
pub fn accumulate_pretraining_gradients<B: Backend>(
    model: &mut BiEncoderModel<B>,
    loss: &PretrainingLoss<B>,
    input: &PretrainingInput,
    chunking: &Chunking,
    ready: &mut dyn GradientsReady<B>,
) -> Result<B::Tensor> {
    let backend = model.backend().clone();
    let TargetCounts { labels, sets: [encode, regress] } = input.counts();
    let mut counts = [labels, encode, regress];
    loss.collective.all_reduce_scalars(&mut counts)?;
    let [labels, encode, regress] = counts;
    let all = TargetCounts { labels, sets: [encode, regress] };
    let factors = Factors::new(&loss.weights, &all);
    // A term without targets has no value: it is NaN, in the log null.
    let has_targets = factors.term.map(|factor| factor > 0.0);
    let start = has_targets.map(|has| if has { 0.0f32 } else { f32::NAN });
    let mut terms = backend.upload(&start, 1, 3)?;
    let chunks = match input.batch.is_empty() {
        true => Vec::new(),
        false => chunking.chunks(&input.batch),
    };
    let last = chunks.len().saturating_sub(1);
    for (number, chunk) in chunks.into_iter().enumerate() {
        let sequences = input.batch.slice(chunk.clone());
        let targets = ChunkTargets::new(sequences, &input.targets[chunk.clone()], input.bag_rows);
        let numbers = &input.sequence_numbers[chunk];
        let rows = targets.output_rows.iter().copied();
        let on_device = model.input_with_output_rows(sequences, rows, numbers)?;
        let decoder = model.decoder_mut();
        let (hidden, saved) = decoder.forward_saving(&backend, &on_device, input.dropout)?;
        let dhidden = head_gradients(&backend, decoder, &hidden, &targets, &factors, &mut terms)?;
        drop(hidden);
        let ready: &mut dyn GradientsReady<B> = if number == last { ready } else { &mut () };
        decoder.head_ready(ready)?;
        decoder.backward(&backend, &on_device, &dhidden, saved, ready)?;
    }
    if input.batch.is_empty() {
        let decoder = model.decoder_mut();
        decoder.set_zero_gradients(&backend)?;
        ready.ready(&mut decoder.parameters_mut())?;
    }
    let mut losses = backend.zeros(1, 4, Dtype::F32)?;
    backend.copy(terms.view(), losses.view_mut().with_cols(1..4))?;
    for (term, factor) in factors.loss.into_iter().enumerate().filter(|(at, _)| has_targets[*at]) {
        let term = terms.view().with_cols(term..term + 1);
        backend.add_scaled(term, factor as f32, losses.view_mut().with_cols(0..1))?;
    }
    Ok(losses)
}

/// The gradient of the loss with respect to the hidden states of a chunk `[R, d]`; adds the head's own gradient,
/// and the terms `[1, 3]`.
fn head_gradients<B: Backend>(
    backend: &B,
    decoder: &mut Decoder<B>,
    hidden: &B::Tensor,
    targets: &ChunkTargets,
    factors: &Factors,
    terms: &mut B::Tensor,
) -> Result<B::Tensor> {
    let dhidden = backend.zeros(hidden.rows(), hidden.cols(), Dtype::F32)?;
    let vocab_size = decoder.config().vocab_size;
    let block_rows = (BLOCK_ELEMENTS / vocab_size.max(1)).max(MIN_BLOCK_ROWS);
    let mut pass = HeadPass { backend, decoder, hidden, dhidden, terms };
    let (rows, labels) = &targets.labels;
    for (rows, labels) in rows.chunks(block_rows).zip(labels.chunks(block_rows)) {
        let [labels] = backend.upload_indices([labels])?;
        let (loss, term) = (factors.loss[0], factors.term[0]);
        pass.block(rows, 0, rows.len(), (term, loss), |logits| {
            backend.cross_entropy(logits, &labels)
        })?;
    }
    for (bags, number) in targets.bags.iter().zip(1..) {
        let bag_rows = bags.first().map_or(1, |(rows, _)| rows.len()).max(1);
        for bags in bags.chunks((block_rows / bag_rows).max(1)) {
            let rows: Vec<u32> = bags.iter().flat_map(|(rows, _)| rows).copied().collect();
            let sets = upload_sets(backend, bags)?;
            let (loss, term) = (factors.loss[number], factors.term[number]);
            pass.block(&rows, number, bags.len(), (term, loss), |logits| {
                backend.set_cross_entropy(logits, bag_rows, &sets)
            })?;
        }
    }
    Ok(pass.dhidden)
}

fn upload_sets<B: Backend>(backend: &B, bags: &[(Vec<u32>, Vec<u32>)]) -> Result<ListedColumns<B>> {
    let (mut starts, mut columns) = (vec![0], Vec::new());
    for (_, set) in bags {
        columns.extend_from_slice(set);
        starts.push(columns.len() as u32);
    }
    let [starts, columns] = backend.upload_indices([&starts, &columns])?;
    Ok(ListedColumns { starts, columns })
}

/// The head's passes over blocks of rows of one chunk.
struct HeadPass<'p, B: Backend> {
    backend: &'p B,
    decoder: &'p mut Decoder<B>,
    /// `[R, d]`
    hidden: &'p B::Tensor,
    /// `[R, d]`
    dhidden: B::Tensor,
    /// `[1, 3]`
    terms: &'p mut B::Tensor,
}

impl<B: Backend> HeadPass<'_, B> {
    /// Forward and backward pass of some rows. `mean_loss` returns the mean over `count` targets and its gradient with
    /// respect to the logits; `factors` lead from the sum over targets to the term, and from there to the loss.
    fn block(
        &mut self,
        rows: &[u32],
        number: usize,
        count: usize,
        (term, loss): (f64, f64),
        mean_loss: impl FnOnce(&B::Tensor) -> Result<(B::Tensor, B::Tensor)>,
    ) -> Result<()> {
        let backend = self.backend;
        let scatter = ScatterRows::new(rows);
        let lists = [rows, &scatter.sources, &scatter.targets, &scatter.starts];
        let [index, sources, targets, starts] = backend.upload_indices(lists)?;
        let plan = ScatterPlan::new(&scatter, [sources, targets, starts]);
        let hidden = backend.gather_rows(self.hidden, &index)?;
        let logits = self.decoder.logits(backend, &hidden)?;
        let (mean, dlogits) = mean_loss(&logits)?;
        drop(logits);
        let share = term * count as f64;
        let scale = (share * loss) as f32;
        let dhidden = self.decoder.logits_backward(backend, dlogits, &hidden, scale)?;
        backend.scatter_add_rows(&dhidden, &plan, &mut self.dhidden)?;
        let term = self.terms.view_mut().with_cols(number..number + 1);
        backend.add_scaled(mean.view(), share as f32, term)
    }
}
