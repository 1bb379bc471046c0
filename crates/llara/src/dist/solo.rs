//! A group of one process.

use super::Collective;
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

    fn all_gather(&self, x: B::Tensor) -> Result<B::Tensor> {
        Ok(x)
    }

    fn reduce_scatter(&self, x: B::Tensor) -> Result<B::Tensor> {
        Ok(x)
    }

    fn all_reduce(&self, _: &mut B::Tensor) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _: &mut B::Tensor) -> Result<()> {
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }
}
