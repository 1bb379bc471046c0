//! The arguments that every layer of one forward or backward pass shares.

use std::ops::Deref;

use super::branches::Branches;
use crate::Result;
use crate::backend::{Backend, DropoutKey, Dtype, Layout, RopeTable, ScatterPlan, Shape, TokenIds};

/// The device, the rows of the batch, their rotary angles, the dtype of activations, and the dropout of
/// adapters.
pub(crate) struct Pass<'a, B: Backend> {
    pub(crate) backend: &'a B,
    pub(crate) rows: &'a Rows<B>,
    /// The rows that sequences attend to, if some of them share rows.
    pub(crate) branches: Option<&'a Branches<B>>,
    pub(crate) rope: &'a RopeTable<B>,
    pub(crate) activations: Dtype,
    pub(crate) dropout: Option<Dropout>,
}

impl<B: Backend> Pass<'_, B> {
    /// `x` in the dtype of the activations.
    pub(crate) fn activation<'t>(&self, x: &'t B::Tensor) -> Result<Activation<'t, B>> {
        match x.dtype() == self.activations {
            true => Ok(Activation::Same(x)),
            false => Ok(Activation::Rounded(self.backend.cast(x, self.activations)?)),
        }
    }
}

/// A matrix, or its copy in the dtype of the activations.
pub(crate) enum Activation<'t, B: Backend> {
    Same(&'t B::Tensor),
    Rounded(B::Tensor),
}

impl<B: Backend> Deref for Activation<'_, B> {
    type Target = B::Tensor;

    fn deref(&self) -> &B::Tensor {
        match self {
            Activation::Same(x) => x,
            Activation::Rounded(x) => x,
        }
    }
}

/// Some or all tokens of a packed batch: the rows of a matrix.
pub(crate) struct Rows<B: Backend> {
    pub(crate) layout: Layout<B>,
    /// The index of each row's sequence in the whole step; dropout masks depend on it. `[rows]`
    pub(crate) sequences: B::Index,
}

/// The rows at which a layer is computed, if not at all rows: the pooled ones.
pub(crate) struct OutputRows<'a, B: Backend> {
    /// The pass over these rows.
    pub(crate) pass: &'a Pass<'a, B>,
    /// Indices of these rows among all rows. `[R]`
    pub(crate) rows: &'a B::Index,
    /// Adds the gradient of these rows to that of all rows.
    pub(crate) scatter: &'a ScatterPlan<B>,
}

/// The random state of a step's dropout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropout {
    /// Seed of the run.
    pub seed: u64,
    /// Index of the step.
    pub step: u64,
}

impl<B: Backend> Rows<B> {
    /// The tokens of the rows, which determine the dropout masks.
    pub(crate) fn tokens(&self) -> TokenIds<'_, B> {
        TokenIds { sequences: &self.sequences, positions: &self.layout.positions }
    }
}

impl Dropout {
    /// The key of the mask of one module.
    pub(crate) fn key(&self, module: u32, probability: f32) -> DropoutKey {
        DropoutKey { seed: self.seed, step: self.step, module, probability }
    }
}
