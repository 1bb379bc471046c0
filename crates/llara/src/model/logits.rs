//! Logits of the vocabulary from hidden states, for pretraining.
//!
//! `logits = hidden · Wᵀ`, with `W` the embedding table if the model ties both, else `lm_head.weight`. Products
//! have the precision of the activations; logits and their gradient are f32.

use super::decoder::Decoder;
use super::gradients_ready::GradientsReady;
use super::head::{HEAD_WEIGHT, Head};
use super::parameter::{Parameter, Values};
use crate::backend::{Backend, Dtype, Epilogue, Shape};
use crate::{Error, ErrorKind, Result};

impl<B: Backend> Decoder<B> {
    /// Attaches the head. `values` returns those of `lm_head.weight`; it is not called if the head is tied.
    ///
    /// # Errors
    /// What `values` returns, or the device is out of memory.
    pub(crate) fn attach_head(&mut self, backend: &B, values: &mut Values<'_>) -> Result<()> {
        let head = match self.config().tie_word_embeddings {
            true => {
                self.embed_tokens.set_multiplied();
                Head::Tied
            }
            false => {
                let shape = [self.config().vocab_size, self.config().hidden_size];
                let part = vec![(HEAD_WEIGHT.to_owned(), shape)];
                Head::Untied(Parameter::stacked(backend, part, values)?)
            }
        };
        self.head = Some(head);
        let activations = self.activations();
        self.set_activations(backend, activations, false)
    }

    /// Whether the language-model head is attached.
    pub fn has_head(&self) -> bool {
        self.head.is_some()
    }

    fn head_weight(&self) -> Result<&Parameter<B>> {
        match &self.head {
            Some(Head::Tied) => Ok(&self.embed_tokens),
            Some(Head::Untied(weight)) => Ok(weight),
            None => Err(no_head()),
        }
    }

    /// `hidden · Wᵀ`: hidden states `[n, d]` after the final norm, logits `[n, vocab_size]`, both f32.
    ///
    /// # Errors
    /// No head is attached.
    pub(crate) fn logits(&self, backend: &B, hidden: &B::Tensor) -> Result<B::Tensor> {
        let weight = self.head_weight()?.weight();
        if self.activations() == Dtype::F32 {
            return backend.linear(hidden.view(), weight.view(), 1.0, Epilogue::default());
        }
        // A product of bf16 matrices that is not rounded: it is added to f32 zeros.
        let hidden = backend.cast(hidden, self.activations())?;
        let mut logits = backend.zeros(hidden.rows(), weight.rows(), Dtype::F32)?;
        backend.linear_add(hidden.view(), weight.view(), logits.view_mut())?;
        Ok(logits)
    }

    /// From the gradient dlogits `[n, vocab_size]` and the input of [`logits`](Self::logits): returns `scale ·
    /// dlogits · W` `[n, d]`, and adds `scale · dlogitsᵀ · hidden` to the gradient of a trainable weight.
    ///
    /// # Errors
    /// No head is attached.
    pub(crate) fn logits_backward(
        &mut self,
        backend: &B,
        mut dlogits: B::Tensor,
        hidden: &B::Tensor,
        scale: f32,
    ) -> Result<B::Tensor> {
        let activations = self.activations();
        // The scale is applied to the hidden states: they are smaller than the logits.
        let mut scaled = backend.zeros(hidden.rows(), hidden.cols(), Dtype::F32)?;
        backend.add_scaled(hidden.view(), scale, scaled.view_mut())?;
        let mut onto = None;
        if activations != Dtype::F32 {
            dlogits = backend.cast(&dlogits, activations)?;
            scaled = backend.cast(&scaled, activations)?;
            onto = Some(backend.zeros(hidden.rows(), hidden.cols(), Dtype::F32)?);
        }
        let weight = self.head_weight()?.weight();
        let dhidden = backend.linear_input_grad(dlogits.view(), weight.view(), scale, onto)?;
        let weight = match &mut self.head {
            Some(Head::Tied) => &mut self.embed_tokens,
            Some(Head::Untied(weight)) => weight,
            None => return Err(no_head()),
        };
        if let Some((dw, accumulate)) = weight.grad_of_parts(backend, 0..1)? {
            backend.linear_weight_grad(dlogits.view(), scaled.view(), dw, accumulate)?;
        }
        Ok(dhidden)
    }

    /// Reports the head's gradient as complete. A tied one is complete at the end of [`Decoder::backward`], which
    /// reports it.
    pub(crate) fn head_ready(&mut self, ready: &mut dyn GradientsReady<B>) -> Result<()> {
        ready.ready(&mut self.head.iter_mut().filter_map(Head::untied_mut))
    }
}

fn no_head() -> Error {
    Error::new(ErrorKind::Argument, "the model was loaded without its language-model head")
}
