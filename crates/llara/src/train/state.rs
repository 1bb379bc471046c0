//! Everything that a training run carries from one step to the next, besides the weights.

use super::config::TrainConfig;
use super::optimizer::AdamW;
use super::reduction::{BUCKET_ELEMENTS, GradientReduction};
use super::step::{Chunking, accumulate_gradients, accumulate_gradients_with};
use super::step_input::StepInput;
use crate::Result;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::dist::Collective;
use crate::loss::Objective;

/// The state of a run between two steps: with the model's trainable parameters, which hold the weights in
/// f32, all that the following steps depend on.
///
/// - The moments and the number of updates are in the optimizer, flat and divided among ranks
///   ([`FlatLayout`](super::FlatLayout)).
/// - No random state is kept. Every draw is a function of the seed and of what it is for: the order of an
///   epoch's rows of (seed, epoch), a row's passages of (seed, epoch, row), dropout of (seed, step, module,
///   sequence, position, feature). At step `n` the random state is (seed, `n`).
/// - The position in the data is the number of steps: the batch of step `n` is a function of (seed, `n`).
pub struct TrainState<B: Backend> {
    optimizer: AdamW<B>,
    seed: u64,
    bucket_elements: usize,
}

/// What a step left on the device.
pub(super) struct StepResult<B: Backend> {
    /// Mean loss of this process's rows. `[1, 1]`
    pub(super) loss: B::Tensor,
    /// Global norm of the gradients and what they were multiplied by. `[1, 2]`
    pub(super) clip: B::Tensor,
}

impl<B: Backend> TrainState<B> {
    /// The state before the first step, of `rank` among `ranks` processes; memory for gradients and moments
    /// is allocated.
    ///
    /// # Errors
    /// When a setting of the optimizer is out of its range, or the device has no memory left.
    pub fn new(
        model: &mut BiEncoderModel<B>,
        config: &TrainConfig,
        (rank, ranks): (usize, usize),
    ) -> Result<Self> {
        let backend = model.backend().clone();
        let optimizer = AdamW::sharded(&backend, model.decoder_mut(), config.adamw, (rank, ranks))?;
        Ok(TrainState { optimizer, seed: config.seed, bucket_elements: BUCKET_ELEMENTS })
    }

    /// The optimizer, to be restored.
    pub(super) fn optimizer_mut(&mut self) -> &mut AdamW<B> {
        &mut self.optimizer
    }

    /// Steps made so far.
    pub fn step(&self) -> u64 {
        self.optimizer.steps()
    }

    /// The seed of all random draws.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The moments and the number of updates.
    pub fn optimizer(&self) -> &AdamW<B> {
        &self.optimizer
    }

    /// Sets the number of elements of a bucket, whose gradients are summed over processes at once.
    pub fn set_bucket_elements(&mut self, elements: usize) {
        self.bucket_elements = elements;
    }

    /// Makes one step: gradients of `input`, their sum over processes, and the update.
    ///
    /// # Errors
    /// When an operation of the device or of the group fails.
    pub(super) fn advance(
        &mut self,
        model: &mut BiEncoderModel<B>,
        objective: &dyn Objective<B>,
        input: &StepInput,
        (chunking, learning_rate): (&Chunking, f64),
        collective: &dyn Collective<B>,
    ) -> Result<StepResult<B>> {
        let backend = model.backend().clone();
        let loss = match collective.size() {
            1 => accumulate_gradients(model, objective, input, chunking)?,
            _ => {
                let layout = self.optimizer.layout();
                let decoder = model.decoder();
                let mut sums =
                    GradientReduction::new(layout, decoder, collective, self.bucket_elements)?;
                let loss = accumulate_gradients_with(model, objective, input, chunking, &mut sums)?;
                sums.finish(model.decoder_mut())?;
                loss
            }
        };
        let decoder = model.decoder_mut();
        let clip = self.optimizer.step_in_group(&backend, decoder, learning_rate, collective)?;
        Ok(StepResult { loss, clip })
    }
}
