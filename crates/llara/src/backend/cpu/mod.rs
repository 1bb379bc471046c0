//! The processor as a device: f32 and bf16, products by kernels of our own, everything else vectorised
//! and spread over the current rayon pool.
//!
//! Work is split into pieces whose size does not depend on the number of threads, and partial sums
//! are added in order, so a result has the same bits on any number of threads.

mod activation;
mod attention;
mod buffer;
mod dropout;
mod element;
pub mod gemm;
mod loss;
mod norms;
mod optimizer;
mod products;
mod rope;
mod rows;
mod shared;
mod unit;
mod vector;

use std::ops::Range;
use std::sync::Arc;

pub(super) use attention::TILE_ROWS;
pub(super) use vector::rows_per_task;

use buffer::CpuTensor;
use rayon::prelude::*;
use unit::Unit;

use super::{
    Accumulate, AdamWStep, AttentionOutput, AttentionShape, Backend, DropoutKey, Dtype, Layout,
    RopeDirection, RopeTable, Shape, TokenIds,
};
use crate::Result;

/// Ends the name of kernels that multiply bf16 by instructions for bf16.
const BF16_PRODUCTS: &str = ", bf16 products by vdpbf16ps";

/// The CPU backend. Clones share one arena.
#[derive(Clone, Default)]
pub struct Cpu {
    arena: Arc<buffer::Arena>,
}

impl Cpu {
    /// A backend that computes on the current rayon pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// Checks what the environment asks for, so that a program can refuse it before it starts. Where
    /// this fails, so does every operation that allocates.
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
    /// Products of bf16 operands use the faster kernel. Both multiply exactly and add in f32, but in a
    /// different order, and `vdpbf16ps` treats denormal operands as zero, so that results differ by
    /// rounding. [`description`](Backend::description) names the kernel.
    pub fn multiplies_bf16_faster() -> bool {
        gemm::rate::multiplies_bf16_faster()
    }

    /// Decides [`multiplies_bf16_faster`](Self::multiplies_bf16_faster) without a measurement, so that products
    /// are rounded as by the `kernels` that [`Backend::kernels`] once returned for bf16. Has no effect where
    /// the decision was made already, or the processor lacks them.
    pub fn use_bf16_kernels(kernels: &str) {
        gemm::rate::decide(kernels.ends_with(BF16_PRODUCTS));
    }

    /// The element type in which a model computes fastest here: bf16 where
    /// [`multiplies_bf16_faster`](Self::multiplies_bf16_faster), else f32.
    pub fn fastest_dtype() -> Dtype {
        if Self::multiplies_bf16_faster() { Dtype::Bf16 } else { Dtype::F32 }
    }

    /// An f32 matrix whose contents the caller is about to write in full.
    fn unspecified(&self, rows: usize, cols: usize) -> Result<CpuTensor> {
        self.unspecified_of(rows, cols, Dtype::F32)
    }

    /// The same of any type.
    fn unspecified_of(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<CpuTensor> {
        CpuTensor::unspecified(&self.arena, (rows, cols), dtype)
    }

    fn zeros_tensor(&self, rows: usize, cols: usize) -> Result<CpuTensor> {
        let mut x = self.unspecified(rows, cols)?;
        x.as_mut_slice().fill(0.0);
        Ok(x)
    }
}

impl Backend for Cpu {
    type Tensor = CpuTensor;
    type Index = Vec<u32>;

    fn description(&self) -> String {
        let threads = rayon::current_num_threads();
        let plural = if threads == 1 { "" } else { "s" };
        let instructions = match Unit::active() {
            Unit::Avx512Bf16 if Self::multiplies_bf16_faster() => {
                "AVX-512, bf16 products by vdpbf16ps"
            }
            Unit::Avx512Bf16 => "AVX-512, bf16 products by the f32 kernel (faster here)",
            Unit::Avx512 => "AVX-512",
            Unit::Avx2 => "AVX2",
            Unit::Portable => "portable loops",
        };
        format!("CPU, {threads} thread{plural}, {instructions}")
    }

    fn kernels(&self, activations: Dtype) -> String {
        let unit = Unit::active();
        match (activations, unit) {
            (Dtype::F32, Unit::Avx512Bf16) => Unit::Avx512.name().to_owned(),
            (Dtype::Bf16, Unit::Avx512Bf16) if Self::multiplies_bf16_faster() => {
                format!("{}{BF16_PRODUCTS}", unit.name())
            }
            _ => unit.name().to_owned(),
        }
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<CpuTensor> {
        self.zeros_tensor(rows, cols)
    }

    fn clear(&self, x: &mut CpuTensor) -> Result<()> {
        // Zero in either type.
        x.bytes_mut().par_chunks_mut(1 << 20).for_each(|bytes| bytes.fill(0));
        Ok(())
    }

    fn upload(&self, data: &[f32], rows: usize, cols: usize) -> Result<CpuTensor> {
        assert_eq!(data.len(), rows * cols, "upload: elements");
        let mut x = self.unspecified(rows, cols)?;
        x.as_mut_slice().copy_from_slice(data);
        Ok(x)
    }

    fn upload_index(&self, data: &[u32]) -> Result<Vec<u32>> {
        buffer::copied(data)
    }

    fn download(&self, x: &CpuTensor) -> Result<Vec<f32>> {
        rows::widen(x)
    }

    fn read_elements(&self, x: &CpuTensor, range: Range<usize>) -> Result<Vec<f32>> {
        Ok(x.as_slice()[range].to_vec())
    }

    fn write_elements(&self, x: &mut CpuTensor, start: usize, data: &[f32]) -> Result<()> {
        x.as_mut_slice()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn slice_rows(&self, x: &CpuTensor, start: usize, count: usize) -> Result<CpuTensor> {
        let mut rows = self.unspecified_of(count, x.cols(), x.dtype())?;
        let row = x.cols() * x.dtype().bytes();
        rows.bytes_mut().copy_from_slice(&x.bytes()[start * row..(start + count) * row]);
        Ok(rows)
    }

    fn concat_rows(&self, parts: &[&CpuTensor]) -> Result<CpuTensor> {
        let (cols, dtype) =
            parts.first().map_or((0, Dtype::F32), |part| (part.cols(), part.dtype()));
        let mut x = self.unspecified_of(parts.iter().map(|part| part.rows()).sum(), cols, dtype)?;
        let mut rest = x.bytes_mut();
        for part in parts {
            assert_eq!((part.cols(), part.dtype()), (cols, dtype), "concat_rows: columns");
            let (to, after) = rest.split_at_mut(part.bytes().len());
            to.copy_from_slice(part.bytes());
            rest = after;
        }
        Ok(x)
    }

    fn cast(&self, x: &CpuTensor, to: Dtype) -> Result<CpuTensor> {
        rows::cast(self, x, to)
    }

    fn linear(
        &self,
        x: &CpuTensor,
        w: &CpuTensor,
        bias: Option<&CpuTensor>,
        residual: Option<&CpuTensor>,
    ) -> Result<CpuTensor> {
        products::linear(self, x, w, bias, residual)
    }

    fn linear_onto(&self, x: &CpuTensor, w: &CpuTensor, onto: CpuTensor) -> Result<CpuTensor> {
        Ok(products::linear_onto(x, w, onto))
    }

    fn linear_input_grad(
        &self,
        dy: &CpuTensor,
        w: &CpuTensor,
        onto: Option<CpuTensor>,
    ) -> Result<CpuTensor> {
        products::linear_input_grad(self, dy, w, onto)
    }

    fn linear_weight_grad(
        &self,
        dy: &CpuTensor,
        x: &CpuTensor,
        dw: &mut CpuTensor,
        accumulate: Accumulate,
    ) -> Result<()> {
        products::linear_weight_grad(dy, x, dw, accumulate);
        Ok(())
    }

    fn linear_bias_grad(&self, dy: &CpuTensor, db: &mut CpuTensor) -> Result<()> {
        products::linear_bias_grad(dy, db);
        Ok(())
    }

    fn gather_rows(&self, x: &CpuTensor, rows: &Vec<u32>) -> Result<CpuTensor> {
        rows::gather_rows(self, x, rows)
    }

    fn scatter_add_rows(&self, dy: &CpuTensor, rows: &Vec<u32>, dx: &mut CpuTensor) -> Result<()> {
        rows::scatter_add_rows(dy, rows, dx);
        Ok(())
    }

    fn segment_mean(&self, x: &CpuTensor, offsets: &Vec<u32>) -> Result<CpuTensor> {
        rows::segment_mean(self, x, offsets)
    }

    fn segment_mean_backward(
        &self,
        dy: &CpuTensor,
        offsets: &Vec<u32>,
        rows: usize,
    ) -> Result<CpuTensor> {
        rows::segment_mean_backward(self, dy, offsets, rows)
    }

    fn rms_norm(
        &self,
        x: &CpuTensor,
        w: &CpuTensor,
        eps: f32,
        to: Dtype,
    ) -> Result<(CpuTensor, CpuTensor)> {
        norms::rms_norm(self, x, w, eps, to)
    }

    fn rms_norm_backward(
        &self,
        dy: &CpuTensor,
        x: &CpuTensor,
        w: &CpuTensor,
        inv_rms: &CpuTensor,
        dw: Option<&mut CpuTensor>,
        onto: Option<CpuTensor>,
    ) -> Result<CpuTensor> {
        norms::rms_norm_backward(self, dy, (x, w, inv_rms), dw, onto)
    }

    fn normalize(&self, x: &CpuTensor) -> Result<(CpuTensor, CpuTensor)> {
        norms::normalize(self, x)
    }

    fn normalize_backward(
        &self,
        dy: &CpuTensor,
        y: &CpuTensor,
        inv_norm: &CpuTensor,
    ) -> Result<CpuTensor> {
        norms::normalize_backward(self, dy, y, inv_norm)
    }

    fn rope(
        &self,
        x: &mut CpuTensor,
        positions: &Vec<u32>,
        table: &RopeTable<Self>,
        turn: RopeDirection,
    ) -> Result<()> {
        rope::rope(x, positions, (&table.cos, &table.sin), turn);
        Ok(())
    }

    fn attention(
        &self,
        q: &CpuTensor,
        k: &CpuTensor,
        v: &CpuTensor,
        queries: &Layout<Self>,
        keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<AttentionOutput<Self>> {
        attention::attention(self, (q, k, v), queries, keys, shape)
    }

    fn attention_backward(
        &self,
        dout: &CpuTensor,
        q: &CpuTensor,
        k: &CpuTensor,
        v: &CpuTensor,
        attended: &AttentionOutput<Self>,
        queries: &Layout<Self>,
        keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<(CpuTensor, CpuTensor, CpuTensor)> {
        attention::attention_backward(self, dout, (q, k, v), attended, queries, keys, shape)
    }

    fn swiglu(&self, gate: &CpuTensor, up: &CpuTensor) -> Result<CpuTensor> {
        activation::swiglu(self, gate, up)
    }

    fn swiglu_backward(
        &self,
        dy: &CpuTensor,
        gate: &CpuTensor,
        up: &CpuTensor,
    ) -> Result<(CpuTensor, CpuTensor)> {
        activation::swiglu_backward(self, dy, gate, up)
    }

    fn dropout(
        &self,
        x: &CpuTensor,
        tokens: TokenIds<'_, Self>,
        key: &DropoutKey,
        onto: Option<CpuTensor>,
    ) -> Result<CpuTensor> {
        dropout::dropout(self, x, tokens, key, onto)
    }

    fn scale(&self, x: &mut CpuTensor, factor: f32) -> Result<()> {
        optimizer::scale(x, factor);
        Ok(())
    }

    fn cross_entropy(
        &self,
        scores: &CpuTensor,
        targets: &Vec<u32>,
    ) -> Result<(CpuTensor, CpuTensor)> {
        loss::cross_entropy(self, scores, targets)
    }

    fn add_sum_of_squares(
        &self,
        x: &CpuTensor,
        range: Range<usize>,
        sum: &mut CpuTensor,
    ) -> Result<()> {
        optimizer::add_sum_of_squares(x, range, sum);
        Ok(())
    }

    fn clip_factor(&self, sum: &CpuTensor, max_norm: Option<f32>) -> Result<CpuTensor> {
        let mut clip = self.unspecified(1, 2)?;
        optimizer::clip_factor(sum, max_norm, &mut clip);
        Ok(clip)
    }

    fn adamw(
        &self,
        param: &mut CpuTensor,
        range: Range<usize>,
        grad: &CpuTensor,
        moments: (&mut CpuTensor, &mut CpuTensor),
        clip: &CpuTensor,
        step: &AdamWStep,
    ) -> Result<()> {
        optimizer::adamw(param, range, grad, moments, clip, step);
        Ok(())
    }
}
