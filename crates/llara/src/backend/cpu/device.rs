//! The CPU device: its memory and its capabilities.

use std::sync::Arc;

use super::buffer::{Arena, CpuTensor};
use super::gemm::rate::multiplies_bf16_faster;
use super::unit::Unit;
use crate::Result;
use crate::backend::Dtype;

/// The CPU backend. Clones share one arena.
#[derive(Clone, Default)]
pub struct Cpu {
    arena: Arc<Arena>,
}

impl Cpu {
    /// A backend that computes on the current rayon pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks the environment variable `LLARA_CPU`, so that a program can report an error before it starts
    /// work. If this fails, every operation that allocates fails too.
    ///
    /// # Errors
    /// If `LLARA_CPU` names vector instructions that do not exist or that this processor lacks.
    pub fn check_environment() -> Result<()> {
        Unit::selected().map(drop)
    }

    /// Whether this processor multiplies bf16 faster than f32. Measured once per process, in a few
    /// milliseconds, where it has `vdpbf16ps`; `LLARA_CPU` overrides the measurement: with
    /// `avx512bf16` this is true, with every other value false.
    ///
    /// Products of bf16 operands use the faster kernel. Both kernels multiply exactly and accumulate in f32,
    /// but in a different order, and `vdpbf16ps` treats denormal operands as zero, so results differ in
    /// rounding. [`description`](crate::backend::Backend::description) names the kernel.
    pub fn multiplies_bf16_faster() -> bool {
        multiplies_bf16_faster()
    }

    /// An f32 matrix with unspecified contents; the caller must write every element.
    pub(super) fn unspecified(&self, rows: usize, cols: usize) -> Result<CpuTensor> {
        self.unspecified_of(rows, cols, Dtype::F32)
    }

    /// The same for any dtype.
    pub(super) fn unspecified_of(
        &self,
        rows: usize,
        cols: usize,
        dtype: Dtype,
    ) -> Result<CpuTensor> {
        CpuTensor::unspecified(&self.arena, (rows, cols), dtype)
    }

    pub(super) fn release_unused(&self) {
        self.arena.release_unused();
    }

    pub(super) fn zeros_tensor(&self, rows: usize, cols: usize) -> Result<CpuTensor> {
        let mut x = self.unspecified(rows, cols)?;
        x.as_mut_slice().fill(0.0);
        Ok(x)
    }
}
