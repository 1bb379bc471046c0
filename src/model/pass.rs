//! What every layer of one pass through the model has in common.

use crate::backend::{Backend, DropoutKey, Layout, RopeTable};

/// The device, the rows that go through, their angles, and what adapters drop of their input.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) rows: &'a Rows<B>,
    pub(crate) rope: &'a RopeTable<B>,
    pub(crate) dropout: Option<Dropout>,
}

/// Some or all tokens of a packed batch: the rows of a matrix.
pub(crate) struct Rows<B: Backend> {
    pub(crate) layout: Layout<B>,
    /// The tokens' numbers among all tokens of the step, which dropout goes by. `[rows]`
    pub(crate) numbers: B::Index,
}

/// The draw of a step's dropout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropout {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the step.
    pub step: u64,
}

impl Dropout {
    /// The key of one module's mask.
    pub(crate) fn key(&self, module: u32, probability: f32) -> DropoutKey {
        DropoutKey { seed: self.seed, step: self.step, module, probability }
    }
}
