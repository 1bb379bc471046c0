//! A trainable matrix: its name in the model's files, its value and its gradient.

use crate::backend::{Accumulate, Backend, Dtype, Shape};
use crate::{Error, ErrorKind, Result};

/// A weight of the model and its gradient, which backward passes accumulate.
pub struct Parameter<B: Backend> {
    name: String,
    /// As in the file: `[out, in]` of a matrix, `[n]` of a vector.
    shape: Vec<usize>,
    /// `[out, in]`, or `[1, n]` for a vector.
    value: B::Tensor,
    /// A frozen parameter has no gradient and no optimizer state.
    trainable: bool,
    /// Allocated once, before the first step where there is an optimizer.
    grad: Option<B::Tensor>,
    /// Whether a backward pass has reached this parameter since the gradients were last cleared.
    reached: bool,
}

/// A value and, if it is trainable, its gradient and whether to add to it or overwrite it.
pub(crate) type ValueAndGrad<'p, B> =
    (&'p <B as Backend>::Tensor, Option<(&'p mut <B as Backend>::Tensor, Accumulate)>);

impl<B: Backend> Parameter<B> {
    pub(crate) fn new(name: String, shape: &[usize], value: B::Tensor) -> Self {
        Parameter {
            name,
            shape: shape.to_vec(),
            value,
            trainable: true,
            grad: None,
            reached: false,
        }
    }

    /// Whether it is trained.
    pub fn is_trainable(&self) -> bool {
        self.trainable
    }

    /// Makes it not trainable.
    pub(crate) fn freeze(&mut self) {
        self.trainable = false;
        self.grad = None;
    }

    /// Name within the bare decoder, such as `layers.0.mlp.up_proj.weight`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Shape as stored in files: `[out, in]` or `[n]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The weights, `[out, in]` or `[1, n]`.
    pub fn value(&self) -> &B::Tensor {
        &self.value
    }

    /// The gradient summed since it was last cleared, shaped as the value.
    ///
    /// # Errors
    /// When no backward pass has reached this parameter: a part of the model that is not trained by
    /// mistake must not go unnoticed.
    pub fn grad(&self) -> Result<&B::Tensor> {
        match &self.grad {
            Some(grad) if self.reached => Ok(grad),
            _ => Err(Error::new(
                ErrorKind::Numeric,
                format!("parameter `{}` received no gradient", self.name),
            )
            .expected("a gradient for every trainable parameter")
            .hint("run a forward and backward pass in training mode first")),
        }
    }

    /// The same, for a sum over processes.
    ///
    /// # Errors
    /// As for [`grad`](Parameter::grad).
    pub(crate) fn grad_mut(&mut self) -> Result<&mut B::Tensor> {
        self.grad()?;
        match &mut self.grad {
            Some(grad) => Ok(grad),
            None => unreachable!("grad() has just found it"),
        }
    }

    /// Makes the gradient zero, for a process that has no sequence in a step.
    pub(crate) fn set_zero_grad(&mut self, backend: &B) -> Result<()> {
        self.reserve_grad(backend)?;
        if let Some(grad) = &mut self.grad {
            backend.clear(grad)?;
            self.reached = true;
        }
        Ok(())
    }

    /// The value to read and, if trainable, the gradient to add to, for a backward pass.
    pub(crate) fn value_and_grad(
        &mut self,
        backend: &B,
    ) -> Result<(&B::Tensor, Option<&mut B::Tensor>)> {
        let (value, grad) = self.value_and_any_grad(backend)?;
        match grad {
            Some((grad, Accumulate::Overwrite)) => {
                backend.clear(grad)?;
                Ok((value, Some(grad)))
            }
            grad => Ok((value, grad.map(|(grad, _)| grad))),
        }
    }

    /// The same for a backward pass that can overwrite the gradient.
    pub(crate) fn value_and_any_grad(&mut self, backend: &B) -> Result<ValueAndGrad<'_, B>> {
        if !self.trainable {
            return Ok((&self.value, None));
        }
        let accumulate = if self.reached { Accumulate::Add } else { Accumulate::Overwrite };
        self.reserve_grad(backend)?;
        self.reached = true;
        Ok((&self.value, self.grad.as_mut().map(|grad| (grad, accumulate))))
    }

    /// Allocates the gradient, so that it does not come to lie among activations.
    pub(crate) fn reserve_grad(&mut self, backend: &B) -> Result<()> {
        if self.trainable && self.grad.is_none() {
            self.grad = Some(backend.zeros(self.value.rows(), self.value.cols())?);
        }
        Ok(())
    }

    /// Frees the gradient's memory.
    pub(crate) fn drop_grad(&mut self) {
        self.grad = None;
        self.reached = false;
    }

    /// Stores the value as bf16.
    pub(crate) fn round(&mut self, backend: &B) -> Result<()> {
        if self.value.dtype() == Dtype::Bf16 {
            return Ok(());
        }
        self.value = backend.cast(&self.value, Dtype::Bf16)?;
        Ok(())
    }

    /// The value to change and the gradient to read, for an optimizer.
    pub(crate) fn value_mut_and_grad(&mut self) -> Result<(&mut B::Tensor, &B::Tensor)> {
        self.grad()?;
        match &self.grad {
            Some(grad) => Ok((&mut self.value, grad)),
            None => unreachable!("grad() has just found it"),
        }
    }

    /// Marks the gradient as zero for the next backward pass.
    pub(crate) fn clear_grad(&mut self) {
        self.reached = false;
    }

    /// Takes the value out, to be changed as a whole and set again.
    pub(crate) fn take_value(&mut self, backend: &B) -> Result<B::Tensor> {
        Ok(std::mem::replace(&mut self.value, backend.zeros(0, 0)?))
    }

    /// Puts in a value of the same shape.
    pub(crate) fn set_value(&mut self, value: B::Tensor) {
        self.value = value;
    }

    /// Replaces value and shape, for a vocabulary that grows.
    pub(crate) fn replace(&mut self, shape: &[usize], value: B::Tensor) {
        self.shape = shape.to_vec();
        self.value = value;
        self.grad = None;
        self.reached = false;
    }
}
