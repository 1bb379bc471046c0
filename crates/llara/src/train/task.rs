//! What a run learns: the input of each step, and its gradients. [`Trainer`](super::Trainer) is the same for every
//! task.

use serde_json::{Map, Value};

use super::step::Chunking;
use crate::Result;
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::{Dataset, Draw};
use crate::model::GradientsReady;

/// A task that a model is trained for.
pub trait Task<B: Backend>: Send + Sync {
    /// The input of one step on the host.
    type Input: TaskInput;

    /// Names of the terms of the loss, for the log; empty if only the loss itself is reported. At most
    /// [`LossTerms::MAX`](super::LossTerms::MAX).
    const TERMS: &'static [&'static str];

    /// Number of values that the processes add before they compute a step, such as the denominators of a loss.
    const COUNTS: usize = 0;

    /// The rows, for their number and locations.
    fn dataset(&self) -> &Dataset;

    /// Number of steps of an epoch.
    fn steps_per_epoch(&self) -> u64;

    /// The settings of the task on which its results depend, by the names of the command line's options where
    /// there are any. A checkpoint can be resumed only with the same ones.
    fn settings(&self, model: &BiEncoderModel<B>) -> Map<String, Value>;

    /// The input of this process's part of a step, counted from 0. It does not depend on other steps or on the
    /// model, so that another thread can prepare it while the model computes.
    ///
    /// # Errors
    /// If a row has changed since it was checked, or the tokenizer rejects a text.
    fn input(&self, step: u64) -> Result<Self::Input>;

    /// Adds the gradient of the global loss by this process's part to the gradients of the parameters; `ready`
    /// receives those that are complete. Returns the loss of this process, then its terms, on the device.
    /// `[1, 1 + terms]`
    ///
    /// # Errors
    /// When an operation of the device or of the process group fails.
    fn accumulate_gradients(
        &self,
        model: &mut BiEncoderModel<B>,
        input: &Self::Input,
        chunking: &Chunking,
        ready: &mut dyn GradientsReady<B>,
    ) -> Result<B::Tensor>;
}

/// What the loop needs to know of the input of a step.
pub trait TaskInput: Send {
    /// The rows of the dataset that it was made from.
    fn rows(&self) -> &[Draw];

    /// Tokens, for the speed.
    fn tokens(&self) -> u64;

    /// The factor of the loss of process `rank`, with which the losses of all processes sum to the global one.
    fn loss_weight(&self, rank: usize) -> f64;
}
