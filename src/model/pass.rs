//! What every layer of one pass through the model has in common.

use crate::backend::{Backend, DropoutKey, Layout, RopeTable};

/// The device, the batch's layout and its angles, and whether adapters drop parts of their input.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) layout: &'a Layout<B>,
    pub(crate) rope: &'a RopeTable<B>,
    pub(crate) dropout: Option<Dropout>,
}

/// The draw of a step's dropout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropout {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the step.
    pub step: u64,
    /// Number of the batch's first token among all tokens of the step.
    pub first_row: u32,
}

impl Dropout {
    /// The key of one module's mask.
    pub(crate) fn key(&self, module: u32, probability: f32) -> DropoutKey {
        let Dropout { seed, step, first_row } = *self;
        DropoutKey { seed, step, module, first_row, probability }
    }
}
