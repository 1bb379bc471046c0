//! A group of one process.

use super::{Bucket, Collective, FlatPart, GradientSum};
use crate::Result;
use crate::backend::Backend;

/// World size 1: every operation is the identity.
#[derive(Debug, Clone, Copy, Default)]
pub struct Solo;

impl<B: Backend> Collective<B> for Solo {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_gather_rows(&self, x: B::Tensor, _: &[usize]) -> Result<B::Tensor> {
        Ok(x)
    }

    fn reduce_scatter_rows(&self, x: B::Tensor, _: &[usize]) -> Result<B::Tensor> {
        Ok(x)
    }

    fn all_reduce(&self, _: &mut B::Tensor) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: &mut B::Tensor, _: usize) -> Result<()> {
        Ok(())
    }

    fn gradient_sum(&self, _: &Bucket) -> Result<Box<dyn GradientSum<B>>> {
        Ok(Box::new(Solo))
    }

    fn all_gather_weights(&self, _: &Bucket, _: &mut [FlatPart<'_, B>]) -> Result<()> {
        Ok(())
    }

    fn all_reduce_scalars(&self, _: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn agree(&self, status: Result<()>) -> Result<()> {
        status
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}

impl<B: Backend> GradientSum<B> for Solo {
    fn add(&mut self, _: FlatPart<'_, B>) -> Result<()> {
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        Ok(())
    }

    fn finish(self: Box<Self>, _: &mut [FlatPart<'_, B>]) -> Result<()> {
        Ok(())
    }
}
