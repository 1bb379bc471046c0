//! Matrix products on the CPU: f32, or bf16 with f32 accumulation.
//!
//! `out = alpha · a · b (+ bias) (+ out or residual)`, each operand row-major or transposed, f32 or bf16. The
//! bits of an element of the result depend neither on the number of threads nor on the other rows and columns
//! of the product: the inner dimension is summed in an order that depends only on its length.
//!
//! Kernels multiply packed panels (Goto and van de Geijn 2008). Reading order: `view`, then `cell`
//! and `tile` for the inputs and outputs of a kernel, `avx512` for a kernel, `pack`, and `drive` for the
//! loops around them; `engine` selects the kernel, `split` the blocks and the tasks.
//!
//! With bf16, processors with `vdpbf16ps` treat denormal operands as zero.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod cell;
mod drive;
mod engine;
mod pack;
mod portable;
pub(super) mod rate;
mod scratch;
mod sealed;
mod split;
mod tile;
mod view;

use half::bf16;

use drive::Job;
use engine::Engine;
use tile::Place;

pub use crate::backend::cpu::unit::Unit;
pub use engine::Precision;
pub(super) use split::sum_bytes;
pub use view::{Operand, View, ViewMut};

/// An element of a result: f32 or bf16.
pub trait Output: Copy + Send + Sync + sealed::Place {
    /// Precision of products whose left operand has this type.
    const PRECISION: Precision;
    /// A matrix of this type as an operand.
    fn operand(view: View<'_, Self>) -> Operand<'_>;
}

impl Output for f32 {
    const PRECISION: Precision = Precision::F32;

    fn operand(view: View<'_, f32>) -> Operand<'_> {
        Operand::F32(view)
    }
}

impl Output for bf16 {
    const PRECISION: Precision = Precision::Bf16;

    fn operand(view: View<'_, bf16>) -> Operand<'_> {
        Operand::Bf16(view)
    }
}

/// What is added to a product before it is rounded to the dtype of the result.
#[derive(Debug, Clone, Copy, Default)]
pub enum Onto<'a, O> {
    /// Nothing is added.
    #[default]
    Nothing,
    /// The previous contents of the result.
    Result,
    /// Another matrix with the shape of the result; not transposed.
    Residual(View<'a, O>),
}

/// How to multiply: `Gemm::new(Precision::F32).bias(&b).multiply(out, x, w.t())`.
#[derive(Debug, Clone, Copy)]
pub struct Gemm<'a, O> {
    precision: Precision,
    unit: Unit,
    parallel: bool,
    alpha: f32,
    bias: Option<&'a [f32]>,
    onto: Onto<'a, O>,
}

impl<'a, O: Output> Gemm<'a, O> {
    /// A product that overwrites the result, on all threads of the current rayon pool.
    pub fn new(precision: Precision) -> Self {
        let unit = rate::unit_for(precision);
        Gemm { precision, unit, parallel: true, alpha: 1.0, bias: None, onto: Onto::Nothing }
    }

    /// Computes on the current thread only.
    pub fn serial(self) -> Self {
        Gemm { parallel: false, ..self }
    }

    /// Uses the kernels of the given unit instead of the selected one.
    pub fn unit(self, unit: Unit) -> Self {
        Gemm { unit, ..self }
    }

    /// Multiplies the product, but nothing that is added to it, by `alpha`.
    pub fn alpha(self, alpha: f32) -> Self {
        Gemm { alpha, ..self }
    }

    /// Adds `bias[j]` to column `j`.
    pub fn bias(self, bias: &'a [f32]) -> Self {
        Gemm { bias: Some(bias), ..self }
    }

    /// Adds the previous contents of the result.
    pub fn accumulate(self) -> Self {
        Gemm { onto: Onto::Result, ..self }
    }

    /// Adds another matrix.
    pub fn onto(self, onto: Onto<'a, O>) -> Self {
        Gemm { onto, ..self }
    }

    /// `out = a · b`, with the selected scale and additions: a `[m, k]`, b `[k, n]`, out `[m, n]`.
    ///
    /// # Panics
    /// If shapes do not match, or this processor does not have the unit.
    pub fn multiply<'b>(
        &self,
        out: ViewMut<'_, O>,
        a: impl Into<Operand<'b>>,
        b: impl Into<Operand<'b>>,
    ) {
        let (left, right) = (a.into(), b.into());
        let engine = Engine::new(self.precision, self.unit);
        let (m, k) = left.shape();
        let (inner, n) = right.shape();
        assert_eq!(inner, k, "inner dimension of [{m}, {k}] by [{inner}, {n}]");
        assert_eq!((out.rows, out.cols), (m, n), "result of [{m}, {k}] by [{k}, {n}]");
        assert!(self.bias.is_none_or(|bias| bias.len() == n), "bias of {n} columns");
        if m == 0 || n == 0 {
            return;
        }
        let place = O::place(out.data.as_mut_ptr(), out.stride);
        let onto = match self.onto {
            Onto::Nothing => Place::Nowhere,
            Onto::Result => place,
            Onto::Residual(residual) => {
                assert!(!residual.is_transposed(), "a transposed residual");
                assert_eq!((residual.rows(), residual.cols()), (m, n), "residual");
                O::place(residual.as_ptr().cast_mut(), residual.stride())
            }
        };
        let (alpha, bias) = (self.alpha, self.bias);
        let job = Job { engine, m, n, k, left, right, alpha, bias, onto, out: place };
        let threads = if self.parallel { rayon::current_num_threads() } else { 1 };
        // SAFETY: the views own or borrow every element of their shapes, `out` mutably, so that
        // no other code accesses it; `onto` is only read.
        unsafe { job.run(threads) };
    }
}

#[cfg(test)]
mod tests;
