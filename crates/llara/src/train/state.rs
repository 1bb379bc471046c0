//! The state of a training run between steps, except for the weights.

use super::config::TrainConfig;
use super::flat_layout::{FlatLayout, bucket_elements};
use super::optimizer::AdamW;
use super::reduction::{GradientReduction, all_gather_gradients};
use super::step::Chunking;
use super::task::Task;
use crate::Result;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::dist::Collective;
use crate::model::Decoder;

/// The state of a run between two steps. Together with the model's trainable parameters, which are the weights
/// in f32, it determines all following steps.
///
/// - The moments and the number of updates are in the optimizer, flat and divided among ranks ([`FlatLayout`]),
///   or all on every rank.
/// - There is no generator state. Every random number is a function of the seed and of its use: the order of the
///   rows of an epoch is a function of (seed, epoch), the passages of a row of (seed, epoch, row), dropout of
///   (seed, step, module, sequence, position, feature). At step `n` the random state is (seed, `n`).
/// - The position in the data is the number of steps: the batch of step `n` is a function of (seed, `n`).
pub struct TrainState<B: Backend> {
    optimizer: AdamW<B>,
    /// Which rank sums which gradients.
    layout: FlatLayout,
    seed: u64,
}

/// The results of a step, on the device.
pub(super) struct StepResult<B: Backend> {
    /// The loss of this process, and its terms. `[1, 1 + terms]`
    pub(super) loss: B::Tensor,
    /// Global norm of the gradients and the clipping factor. `[1, 2]`
    pub(super) clip: B::Tensor,
}

impl<B: Backend> TrainState<B> {
    /// The state before the first step, of `rank` among `ranks` processes; memory for gradients and moments
    /// is allocated.
    ///
    /// # Errors
    /// If a setting of the optimizer is out of range, or the device is out of memory.
    pub fn new(
        model: &mut BiEncoderModel<B>,
        config: &TrainConfig,
        (rank, ranks): (usize, usize),
    ) -> Result<Self> {
        let backend = model.backend().clone();
        let decoder = model.decoder_mut();
        let bucket_elements = config.bucket_elements.unwrap_or(bucket_elements(ranks));
        let layout = FlatLayout::of(decoder, ranks, bucket_elements);
        let (divided, owner) = match config.shard_optimizer {
            true => (layout.clone(), rank),
            false => (FlatLayout::of(decoder, 1, bucket_elements), 0),
        };
        let optimizer = AdamW::sharded(&backend, decoder, config.adamw, divided, owner)?;
        Ok(TrainState { optimizer, layout, seed: config.seed })
    }

    /// The optimizer, mutable, to restore it.
    pub(super) fn optimizer_mut(&mut self) -> &mut AdamW<B> {
        &mut self.optimizer
    }

    /// Number of steps so far.
    pub fn step(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The seed of all random numbers.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The moments and the number of updates.
    pub fn optimizer(&self) -> &AdamW<B> {
        &self.optimizer
    }

    /// Which rank sums which gradients.
    pub fn layout(&self) -> &FlatLayout {
        &self.layout
    }

    /// Computes one step: the gradients of `input`, their sum over processes, and the update.
    ///
    /// # Errors
    /// When an operation of the device or of the group fails.
    pub(super) fn advance<T: Task<B>>(
        &mut self,
        model: &mut BiEncoderModel<B>,
        task: &T,
        input: &T::Input,
        (chunking, learning_rate): (&Chunking, f64),
        collective: &dyn Collective<B>,
    ) -> Result<StepResult<B>> {
        let backend = model.backend().clone();
        let loss = self.sum_gradients(model, task, input, chunking, collective)?;
        let decoder = model.decoder_mut();
        let clip = match self.is_sharded() {
            true => self.optimizer.step_in_group(&backend, decoder, learning_rate, collective)?,
            false => {
                self.gather_gradients(decoder, collective)?;
                self.optimizer.step(&backend, decoder, learning_rate)?
            }
        };
        Ok(StepResult { loss, clip })
    }

    /// Computes the gradients of `input` and adds them over processes. Each rank then has the sums of the elements
    /// that it owns. Returns the loss of this process, and its terms. `[1, 1 + terms]`
    ///
    /// # Errors
    /// As for [`advance`](TrainState::advance).
    pub(super) fn sum_gradients<T: Task<B>>(
        &self,
        model: &mut BiEncoderModel<B>,
        task: &T,
        input: &T::Input,
        chunking: &Chunking,
        collective: &dyn Collective<B>,
    ) -> Result<B::Tensor> {
        if collective.size() == 1 {
            return task.accumulate_gradients(model, input, chunking, &mut ());
        }
        let mut sums = GradientReduction::new(&self.layout, model.decoder(), collective)?;
        let loss = task.accumulate_gradients(model, input, chunking, &mut sums)?;
        sums.finish(model.decoder_mut())?;
        Ok(loss)
    }

    /// Gives every rank the sums of all ranks.
    ///
    /// # Errors
    /// As for [`advance`](TrainState::advance).
    pub(super) fn gather_gradients(
        &self,
        decoder: &mut Decoder<B>,
        collective: &dyn Collective<B>,
    ) -> Result<()> {
        match collective.size() {
            1 => Ok(()),
            _ => all_gather_gradients(&self.layout, decoder, collective),
        }
    }

    /// Whether each rank has the moments of a part of the parameters only.
    pub(super) fn is_sharded(&self) -> bool {
        self.optimizer.layout().ranks() > 1
    }
}
