//! The CPU backend: f32 and bf16, matrix products by the kernels of [`gemm`], all other operations as
//! vectorized loops, in parallel on the current rayon pool.
//!
//! Work is split into tasks whose size does not depend on the number of threads, and partial sums are added
//! in order, so a result has the same bits on any number of threads.

mod activation;
mod attention;
mod buffer;
mod device;
mod dropout;
mod element;
pub mod gemm;
mod loss;
mod memory;
mod norms;
mod optimizer;
mod products;
mod reserved;
mod rope;
mod rows;
mod shared;
mod unit;
mod vector;

use std::ops::Range;

pub use device::Cpu;

use buffer::CpuTensor;
use rayon::prelude::*;
use unit::Unit;

use super::{
    Accumulate, AdamWStep, AttentionGradients, AttentionInput, AttentionOutput, Backend,
    DeviceMemory, DistillationLoss, DropoutKey, Dtype, Elements, Epilogue, ListedColumns,
    RopeDirection, RopeTable, ScatterPlan, ScoreMask, TokenIds, View, ViewMut, WeightUse,
};
use crate::Result;

/// Suffix of [`Backend::kernels`] if bf16 products use `vdpbf16ps`.
const BF16_PRODUCTS: &str = ", bf16 products by vdpbf16ps";

impl Backend for Cpu {
    type Tensor = CpuTensor;
    type Weight = CpuTensor;
    type Index = Vec<u32>;
    /// The log-sum-exp of each query's scaled scores. `[rows of q, H]`
    type AttentionState = CpuTensor;
    type Download = Vec<f32>;

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

    fn describe_products(&self, dtype: Dtype) -> String {
        match dtype {
            Dtype::F32 => "f32".to_owned(),
            Dtype::Bf16 if Self::multiplies_bf16_faster() => {
                "bf16, by vdpbf16ps with f32 sums".to_owned()
            }
            Dtype::Bf16 => {
                "operands rounded to bf16, by the f32 kernel, because bf16 products are not \
                 faster on this processor: bf16 saves memory, but no time"
                    .to_owned()
            }
        }
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

    fn use_kernels(&self, kernels: &str) {
        gemm::rate::decide(kernels.ends_with(BF16_PRODUCTS));
    }

    /// bf16 where [`multiplies_bf16_faster`](Cpu::multiplies_bf16_faster), else f32.
    fn fastest_dtype(&self) -> Dtype {
        if Self::multiplies_bf16_faster() { Dtype::Bf16 } else { Dtype::F32 }
    }

    fn release_unused_memory(&self) {
        self.release_unused();
    }

    fn memory(&self) -> DeviceMemory {
        memory::device_memory(rayon::current_num_threads())
    }

    fn zeros(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<CpuTensor> {
        let mut x = self.unspecified_of(rows, cols, dtype)?;
        self.clear(&mut x)?;
        Ok(x)
    }

    fn clear(&self, x: &mut CpuTensor) -> Result<()> {
        // All bits zero is the number zero in both dtypes.
        x.bytes_mut().par_chunks_mut(1 << 20).for_each(|bytes| bytes.fill(0));
        Ok(())
    }

    fn upload<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        rows: usize,
        cols: usize,
    ) -> Result<CpuTensor> {
        let data = data.into();
        assert_eq!(data.len(), rows * cols, "upload: elements");
        let mut x = self.unspecified_of(rows, cols, data.dtype())?;
        match data {
            Elements::F32(data) => x.elements_mut().copy_from_slice(data),
            Elements::Bf16(data) => x.elements_mut().copy_from_slice(data),
        }
        Ok(x)
    }

    fn upload_into<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        to: ViewMut<'_, CpuTensor>,
    ) -> Result<()> {
        let data = data.into();
        assert_eq!(data.len(), to.rows * to.cols, "upload_into: elements");
        match data {
            Elements::F32(data) => rows::write(data, to),
            Elements::Bf16(data) => rows::write(data, to),
        }
        Ok(())
    }

    fn upload_indices<const N: usize>(&self, lists: [&[u32]; N]) -> Result<[Vec<u32>; N]> {
        let mut copies = [const { Vec::new() }; N];
        for (copy, list) in copies.iter_mut().zip(lists) {
            *copy = buffer::copied(list)?;
        }
        Ok(copies)
    }

    fn start_download(&self, x: &CpuTensor) -> Result<Vec<f32>> {
        rows::widen(x)
    }

    fn finish_download(&self, download: Vec<f32>) -> Result<Vec<f32>> {
        Ok(download)
    }

    fn read_elements(&self, x: &CpuTensor, range: Range<usize>) -> Result<Vec<f32>> {
        buffer::copied(&x.as_slice()[range])
    }

    fn write_elements(&self, x: &mut CpuTensor, start: usize, data: &[f32]) -> Result<()> {
        x.as_mut_slice()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn copy(&self, x: View<'_, CpuTensor>, to: ViewMut<'_, CpuTensor>) -> Result<()> {
        rows::copy(x, to);
        Ok(())
    }

    fn add_scaled(
        &self,
        x: View<'_, CpuTensor>,
        scale: f32,
        y: ViewMut<'_, CpuTensor>,
    ) -> Result<()> {
        rows::add_scaled(x, scale, y);
        Ok(())
    }

    fn cast(&self, x: &CpuTensor, dtype: Dtype) -> Result<CpuTensor> {
        rows::cast(self, x, dtype)
    }

    fn prepare(&self, values: CpuTensor, _: WeightUse) -> Result<CpuTensor> {
        Ok(values)
    }

    fn linear(
        &self,
        x: View<'_, CpuTensor>,
        w: View<'_, CpuTensor>,
        alpha: f32,
        epilogue: Epilogue<'_, CpuTensor>,
    ) -> Result<CpuTensor> {
        products::linear(self, x, w, alpha, &epilogue)
    }

    fn linear_add(
        &self,
        x: View<'_, CpuTensor>,
        w: View<'_, CpuTensor>,
        y: ViewMut<'_, CpuTensor>,
    ) -> Result<()> {
        products::linear_add(x, w, y);
        Ok(())
    }

    fn linear_input_grad(
        &self,
        dy: View<'_, CpuTensor>,
        w: View<'_, CpuTensor>,
        alpha: f32,
        onto: Option<CpuTensor>,
    ) -> Result<CpuTensor> {
        products::linear_input_grad(self, dy, w, alpha, onto)
    }

    fn linear_weight_grad(
        &self,
        dy: View<'_, CpuTensor>,
        x: View<'_, CpuTensor>,
        dw: ViewMut<'_, CpuTensor>,
        accumulate: Accumulate,
    ) -> Result<()> {
        products::linear_weight_grad(dy, x, dw, accumulate);
        Ok(())
    }

    fn linear_bias_grad(
        &self,
        dy: View<'_, CpuTensor>,
        db: ViewMut<'_, CpuTensor>,
        accumulate: Accumulate,
    ) -> Result<()> {
        products::linear_bias_grad(dy, db, accumulate);
        Ok(())
    }

    fn scores(&self, q: &CpuTensor, p: &CpuTensor, scale: f32) -> Result<CpuTensor> {
        products::scores(self, q, p, scale)
    }

    fn scores_backward(
        &self,
        ds: &CpuTensor,
        q: &CpuTensor,
        p: &CpuTensor,
        scale: f32,
    ) -> Result<(CpuTensor, CpuTensor)> {
        products::scores_backward(self, ds, q, p, scale)
    }

    fn gather_rows(&self, x: &CpuTensor, rows: &Vec<u32>) -> Result<CpuTensor> {
        rows::gather_rows(self, x, rows)
    }

    fn scatter_add_rows(
        &self,
        dy: &CpuTensor,
        plan: &ScatterPlan<Self>,
        dx: &mut CpuTensor,
    ) -> Result<()> {
        rows::scatter_add_rows(dy, plan, dx);
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
        x: View<'_, CpuTensor>,
        w: &CpuTensor,
        eps: f32,
        dtype: Dtype,
    ) -> Result<(CpuTensor, CpuTensor)> {
        norms::rms_norm(self, x, w, eps, dtype)
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

    fn rms_norm_backward_in_place(
        &self,
        dy: ViewMut<'_, CpuTensor>,
        x: View<'_, CpuTensor>,
        w: &CpuTensor,
        inv_rms: &CpuTensor,
        dw: Option<&mut CpuTensor>,
    ) -> Result<()> {
        norms::rms_norm_backward_in_place(self, dy, (x, w, inv_rms), dw)
    }

    fn normalize(&self, x: &CpuTensor) -> Result<(CpuTensor, CpuTensor)> {
        norms::normalize(self, x)
    }

    fn normalize_backward(
        &self,
        dy: View<'_, CpuTensor>,
        y: &CpuTensor,
        inv_norm: &CpuTensor,
    ) -> Result<CpuTensor> {
        norms::normalize_backward(self, dy, y, inv_norm)
    }

    fn rope(
        &self,
        x: ViewMut<'_, CpuTensor>,
        positions: &Vec<u32>,
        table: &RopeTable<Self>,
        direction: RopeDirection,
    ) -> Result<()> {
        rope::rope(x, positions, (&table.cos, &table.sin), direction);
        Ok(())
    }

    fn attention(&self, input: &AttentionInput<'_, Self>) -> Result<AttentionOutput<Self>> {
        attention::attention(self, input)
    }

    fn attention_backward(
        &self,
        dout: &CpuTensor,
        input: &AttentionInput<'_, Self>,
        output: &AttentionOutput<Self>,
    ) -> Result<AttentionGradients<CpuTensor>> {
        attention::attention_backward(self, dout, input, output)
    }

    fn swiglu(&self, gate_up: &CpuTensor) -> Result<CpuTensor> {
        activation::swiglu(self, gate_up)
    }

    fn swiglu_backward(&self, dy: CpuTensor, gate_up: CpuTensor) -> Result<(CpuTensor, CpuTensor)> {
        Ok(activation::swiglu_backward(dy, gate_up))
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

    fn cross_entropy(
        &self,
        scores: &CpuTensor,
        targets: &Vec<u32>,
    ) -> Result<(CpuTensor, CpuTensor)> {
        loss::cross_entropy(self, scores, targets)
    }

    fn mask_scores(
        &self,
        scores: &CpuTensor,
        targets: &Vec<u32>,
        mask: &ScoreMask<Self>,
    ) -> Result<CpuTensor> {
        loss::mask_scores(self, scores, targets, mask)
    }

    fn distillation(
        &self,
        scores: &CpuTensor,
        firsts: &Vec<u32>,
        teacher: &CpuTensor,
        loss: DistillationLoss,
        weight: f32,
        dscores: &mut CpuTensor,
    ) -> Result<CpuTensor> {
        loss::distillation(self, (scores, firsts), teacher, loss, (weight, dscores))
    }

    fn set_cross_entropy(
        &self,
        logits: &CpuTensor,
        bag_rows: usize,
        sets: &ListedColumns<Self>,
    ) -> Result<(CpuTensor, CpuTensor)> {
        loss::set_cross_entropy(self, logits, bag_rows, sets)
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
        weight: &mut CpuTensor,
        range: Range<usize>,
        grad: &CpuTensor,
        moments: (&mut CpuTensor, &mut CpuTensor),
        clip: &CpuTensor,
        step: &AdamWStep,
    ) -> Result<()> {
        optimizer::adamw(weight, range, grad, moments, clip, step);
        Ok(())
    }
}
