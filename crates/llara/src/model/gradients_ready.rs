//! A callback, during a backward pass, for parameters whose gradients are complete.

use super::parameter::Parameter;
use crate::Result;
use crate::backend::Backend;

/// Receives parameters during a backward pass, as soon as no later part of the pass adds to their
/// gradients: those of an untied language-model head, of the final norm, then those of each layer from the last to the first, then the
/// embeddings. The sum over processes can therefore run during the rest of the pass.
///
/// `()` ignores them.
pub trait GradientsReady<B: Backend> {
    /// The gradients of the trainable ones of these parameters are complete.
    ///
    /// # Errors
    /// An error ends the backward pass.
    fn ready(&mut self, parameters: &mut dyn Iterator<Item = &mut Parameter<B>>) -> Result<()>;
}

impl<B: Backend> GradientsReady<B> for () {
    fn ready(&mut self, _: &mut dyn Iterator<Item = &mut Parameter<B>>) -> Result<()> {
        Ok(())
    }
}
