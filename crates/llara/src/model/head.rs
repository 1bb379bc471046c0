//! The weight of the language-model head, which is attached to a decoder for pretraining.

use super::parameter::Parameter;
use crate::backend::Backend;

/// Name of the head's weight, in files and in memory.
pub(crate) const HEAD_WEIGHT: &str = "lm_head.weight";

/// The weight of the head.
pub(super) enum Head<B: Backend> {
    /// The embedding table.
    Tied,
    /// A parameter of its own. `[vocab_size, d]`
    Untied(Parameter<B>),
}

impl<B: Backend> Head<B> {
    /// The parameter, if it is not the embedding table.
    pub(super) fn untied(&self) -> Option<&Parameter<B>> {
        match self {
            Head::Tied => None,
            Head::Untied(weight) => Some(weight),
        }
    }

    /// The same, mutable.
    pub(super) fn untied_mut(&mut self) -> Option<&mut Parameter<B>> {
        match self {
            Head::Tied => None,
            Head::Untied(weight) => Some(weight),
        }
    }
}
