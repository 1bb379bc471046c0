//! The CUDA backend for NVIDIA GPUs: f32 and bf16, matrix products by cuBLASLt, all other operations by the
//! kernels in `kernels/`.
//!
//! The libraries are loaded when a [`Cuda`] is created, so the program builds and runs without them. The
//! kernels are embedded as source text, compiled by NVRTC for the GPU, and cached on disk. Every call enqueues
//! work on one stream and returns; only [`finish_download`](Backend::finish_download) waits, and only for its
//! copy. Sums are added in a fixed order, without atomic operations: the same inputs give the same bits
//! on the same GPU and libraries. cuBLASLt may choose another algorithm for another number of rows, so an
//! embedding depends on its batch within rounding error.

mod attention;
mod blas;
mod compile;
mod device;
mod driver;
mod memory;
mod norms;
mod objective;
mod pointwise;
mod products;
mod profile;
mod rows;
mod tensor;
mod transfer;

use std::ops::Range;
use std::sync::Arc;

pub use device::Cuda;
pub use profile::KernelTime;
pub use tensor::{CudaIndex, CudaTensor, CudaWeight};
pub use transfer::CudaDownload;

use device::Device;
use tensor::Block;

use super::{
    Accumulate, AdamWStep, AttentionGradients, AttentionInput, AttentionOutput, Backend,
    DeviceMemory, DistillationLoss, DropoutKey, Dtype, Elements, Epilogue, ListedColumns,
    RopeDirection, RopeTable, ScatterPlan, ScoreMask, Shape, TokenIds, View, ViewMut, WeightUse,
};
use crate::Result;

/// Bytes of GPU memory used by the driver's context and by the kernels of the libraries.
const CONTEXT_BYTES: usize = 600 << 20;

impl Cuda {
    /// Opens the GPU with index `ordinal` among those listed in CUDA_VISIBLE_DEVICES.
    ///
    /// # Errors
    /// If there is no driver or no such GPU, if either is too old, or if NVRTC or cuBLASLt is missing.
    pub fn new(ordinal: usize) -> Result<Self> {
        Ok(Cuda { device: Arc::new(Device::new(ordinal)?) })
    }

    /// Waits until the GPU has finished all enqueued operations.
    ///
    /// # Errors
    /// If an operation failed on the GPU.
    pub fn synchronize(&self) -> Result<()> {
        self.device.context.synchronize()
    }

    /// Free and total bytes of GPU memory.
    ///
    /// # Errors
    /// If the GPU is lost.
    pub fn memory_info(&self) -> Result<(usize, usize)> {
        self.device.context.memory_info()
    }

    /// Number of products computed by `kernels/gemm.cu` because cuBLASLt has no algorithm for them.
    pub fn fallback_products(&self) -> u64 {
        self.device.fallback_products()
    }

    /// Names and times of the kernels since the last call, the longest time first. Empty unless the
    /// environment variable `LLARA_CUDA_PROFILE` was set when the device was opened.
    pub fn take_profile(&self) -> Vec<(String, KernelTime)> {
        self.device.profile.take()
    }

    /// The memory use of this backend for the memory prediction; needs no GPU.
    pub fn device_memory() -> DeviceMemory {
        DeviceMemory {
            alignment: memory::ALIGNMENT,
            fixed_bytes: CONTEXT_BYTES + blas::WORKSPACE_BYTES,
            attention_state: attention::STATE_PER_HEAD,
            norm_task_elements: rows::SUM_TASK_ELEMENTS,
            has_working_copies: true,
            scratch_bytes: |_| 0,
            threads: 1,
        }
    }
}

impl Backend for Cuda {
    type Tensor = CudaTensor;
    type Weight = CudaWeight;
    type Index = CudaIndex;
    /// The log-sum-exp of each query's scaled scores. `[rows of q, H]`
    type AttentionState = CudaTensor;
    type Download = CudaDownload;

    fn description(&self) -> String {
        self.device.description()
    }

    fn describe_products(&self, dtype: Dtype) -> String {
        match dtype {
            Dtype::F32 => "f32".to_owned(),
            Dtype::Bf16 => "bf16, by tensor cores with f32 sums".to_owned(),
        }
    }

    fn kernels(&self, activations: Dtype) -> String {
        // cuBLASLt chooses kernels by the device and by its own version.
        format!("{}, {activations}", self.device.description())
    }

    fn fastest_dtype(&self) -> Dtype {
        Dtype::Bf16
    }

    fn memory(&self) -> DeviceMemory {
        Self::device_memory()
    }

    fn free_and_total_bytes(&self) -> Result<Option<(usize, usize)>> {
        Ok(Some(self.memory_info()?))
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn zeros(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<CudaTensor> {
        self.device.zeros(rows, cols, dtype)
    }

    fn clear(&self, x: &mut CudaTensor) -> Result<()> {
        self.device.clear(x)
    }

    fn upload<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        rows: usize,
        cols: usize,
    ) -> Result<CudaTensor> {
        let data = data.into();
        let x = self.device.unspecified(rows, cols, data.dtype())?;
        transfer::upload(&self.device.context, data, Block::from(&x))?;
        Ok(x)
    }

    fn upload_into<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        to: ViewMut<'_, CudaTensor>,
    ) -> Result<()> {
        transfer::upload(&self.device.context, data.into(), Block::from(&to))
    }

    fn upload_indices<const N: usize>(&self, lists: [&[u32]; N]) -> Result<[CudaIndex; N]> {
        let Device { context, memory, staging, .. } = &*self.device;
        transfer::upload_indices(context, memory, staging, lists)
    }

    fn start_download(&self, x: &CudaTensor) -> Result<CudaDownload> {
        transfer::start_download(&self.device.context, &self.device.staging, x.into())
    }

    fn finish_download(&self, download: CudaDownload) -> Result<Vec<f32>> {
        transfer::finish_download(&self.device.staging, download)
    }

    fn read_elements(&self, x: &CudaTensor, range: Range<usize>) -> Result<Vec<f32>> {
        let elements = tensor::elements(x, range);
        let Device { context, staging, .. } = &*self.device;
        let download = transfer::start_download(context, staging, elements)?;
        transfer::finish_download(staging, download)
    }

    fn write_elements(&self, x: &mut CudaTensor, start: usize, data: &[f32]) -> Result<()> {
        let elements = tensor::elements(x, start..start + data.len());
        transfer::upload(&self.device.context, Elements::F32(data), elements)
    }

    fn copy(&self, x: View<'_, CudaTensor>, to: ViewMut<'_, CudaTensor>) -> Result<()> {
        self.device.copy(x.into(), Block::from(&to))
    }

    fn add_scaled(
        &self,
        x: View<'_, CudaTensor>,
        scale: f32,
        y: ViewMut<'_, CudaTensor>,
    ) -> Result<()> {
        self.device.add_scaled(x.into(), scale, Block::from(&y))
    }

    fn cast(&self, x: &CudaTensor, dtype: Dtype) -> Result<CudaTensor> {
        self.device.converted(x.into(), dtype)
    }

    fn prepare(&self, values: CudaTensor, purpose: WeightUse) -> Result<CudaWeight> {
        let working = match purpose {
            WeightUse::Elementwise => None,
            WeightUse::Frozen(dtype) | WeightUse::Trainable(dtype) => {
                let rounds = dtype == Dtype::Bf16 && values.dtype() == Dtype::F32;
                rounds.then(|| self.cast(&values, dtype)).transpose()?
            }
        };
        Ok(CudaWeight { values, working })
    }

    fn linear(
        &self,
        x: View<'_, CudaTensor>,
        w: View<'_, CudaWeight>,
        alpha: f32,
        epilogue: Epilogue<'_, CudaTensor>,
    ) -> Result<CudaTensor> {
        self.device.linear(x.into(), w, alpha, &epilogue)
    }

    fn linear_add(
        &self,
        x: View<'_, CudaTensor>,
        w: View<'_, CudaWeight>,
        y: ViewMut<'_, CudaTensor>,
    ) -> Result<()> {
        self.device.linear_add(x.into(), w, Block::from(&y))
    }

    fn linear_input_grad(
        &self,
        dy: View<'_, CudaTensor>,
        w: View<'_, CudaWeight>,
        alpha: f32,
        onto: Option<CudaTensor>,
    ) -> Result<CudaTensor> {
        self.device.linear_input_grad(dy.into(), w, alpha, onto)
    }

    fn linear_weight_grad(
        &self,
        dy: View<'_, CudaTensor>,
        x: View<'_, CudaTensor>,
        dw: ViewMut<'_, CudaTensor>,
        accumulate: Accumulate,
    ) -> Result<()> {
        self.device.linear_weight_grad(dy.into(), x.into(), Block::from(&dw), accumulate)
    }

    fn linear_bias_grad(
        &self,
        dy: View<'_, CudaTensor>,
        db: ViewMut<'_, CudaTensor>,
        accumulate: Accumulate,
    ) -> Result<()> {
        self.device.linear_bias_grad(dy.into(), Block::from(&db), accumulate)
    }

    fn scores(&self, q: &CudaTensor, p: &CudaTensor, scale: f32) -> Result<CudaTensor> {
        self.device.scores(q, p, scale)
    }

    fn scores_backward(
        &self,
        ds: &CudaTensor,
        q: &CudaTensor,
        p: &CudaTensor,
        scale: f32,
    ) -> Result<(CudaTensor, CudaTensor)> {
        self.device.scores_backward(ds, q, p, scale)
    }

    fn gather_rows(&self, x: &CudaTensor, rows: &CudaIndex) -> Result<CudaTensor> {
        self.device.gather_rows(x, rows)
    }

    fn scatter_add_rows(
        &self,
        dy: &CudaTensor,
        plan: &ScatterPlan<Self>,
        dx: &mut CudaTensor,
    ) -> Result<()> {
        self.device.scatter_add_rows(dy, plan, dx)
    }

    fn segment_mean(&self, x: &CudaTensor, offsets: &CudaIndex) -> Result<CudaTensor> {
        self.device.segment_mean(x, offsets)
    }

    fn segment_mean_backward(
        &self,
        dy: &CudaTensor,
        offsets: &CudaIndex,
        rows: usize,
    ) -> Result<CudaTensor> {
        self.device.segment_mean_backward(dy, offsets, rows)
    }

    fn rms_norm(
        &self,
        x: View<'_, CudaTensor>,
        w: &CudaTensor,
        eps: f32,
        dtype: Dtype,
    ) -> Result<(CudaTensor, CudaTensor)> {
        self.device.rms_norm(x.into(), w, eps, dtype)
    }

    fn rms_norm_backward(
        &self,
        dy: &CudaTensor,
        x: &CudaTensor,
        w: &CudaTensor,
        inv_rms: &CudaTensor,
        dw: Option<&mut CudaTensor>,
        onto: Option<CudaTensor>,
    ) -> Result<CudaTensor> {
        let adds = onto.is_some();
        let (rows, cols) = x.shape();
        let dx = onto.map_or_else(|| self.device.unspecified(rows, cols, x.dtype()), Ok)?;
        let blocks = (dy.into(), x.into(), Block::from(&dx));
        self.device.rms_norm_backward(blocks, (w, inv_rms), dw, adds)?;
        Ok(dx)
    }

    fn rms_norm_backward_in_place(
        &self,
        dy: ViewMut<'_, CudaTensor>,
        x: View<'_, CudaTensor>,
        w: &CudaTensor,
        inv_rms: &CudaTensor,
        dw: Option<&mut CudaTensor>,
    ) -> Result<()> {
        let dy = Block::from(&dy);
        self.device.rms_norm_backward((dy, x.into(), dy), (w, inv_rms), dw, false)
    }

    fn normalize(&self, x: &CudaTensor) -> Result<(CudaTensor, CudaTensor)> {
        self.device.normalize(x)
    }

    fn normalize_backward(
        &self,
        dy: View<'_, CudaTensor>,
        y: &CudaTensor,
        inv_norm: &CudaTensor,
    ) -> Result<CudaTensor> {
        self.device.normalize_backward(dy.into(), y, inv_norm)
    }

    fn rope(
        &self,
        x: ViewMut<'_, CudaTensor>,
        positions: &CudaIndex,
        table: &RopeTable<Self>,
        direction: RopeDirection,
    ) -> Result<()> {
        self.device.rope(Block::from(&x), positions, table, direction)
    }

    fn attention(&self, input: &AttentionInput<'_, Self>) -> Result<AttentionOutput<Self>> {
        self.device.attention(input)
    }

    fn attention_backward(
        &self,
        dout: &CudaTensor,
        input: &AttentionInput<'_, Self>,
        output: &AttentionOutput<Self>,
    ) -> Result<AttentionGradients<CudaTensor>> {
        self.device.attention_backward(dout, input, output)
    }

    fn swiglu(&self, gate_up: &CudaTensor) -> Result<CudaTensor> {
        self.device.swiglu(gate_up)
    }

    fn swiglu_backward(
        &self,
        mut dy: CudaTensor,
        mut gate_up: CudaTensor,
    ) -> Result<(CudaTensor, CudaTensor)> {
        self.device.swiglu_backward(&mut dy, &mut gate_up)?;
        Ok((gate_up, dy))
    }

    fn dropout(
        &self,
        x: &CudaTensor,
        tokens: TokenIds<'_, Self>,
        key: &DropoutKey,
        onto: Option<CudaTensor>,
    ) -> Result<CudaTensor> {
        self.device.dropout(x, tokens, key, onto)
    }

    fn cross_entropy(
        &self,
        scores: &CudaTensor,
        targets: &CudaIndex,
    ) -> Result<(CudaTensor, CudaTensor)> {
        self.device.cross_entropy(scores, targets)
    }

    fn mask_scores(
        &self,
        scores: &CudaTensor,
        targets: &CudaIndex,
        mask: &ScoreMask<Self>,
    ) -> Result<CudaTensor> {
        self.device.mask_scores(scores, targets, mask)
    }

    fn distillation(
        &self,
        scores: &CudaTensor,
        firsts: &CudaIndex,
        teacher: &CudaTensor,
        loss: DistillationLoss,
        weight: f32,
        dscores: &mut CudaTensor,
    ) -> Result<CudaTensor> {
        self.device.distillation((scores, firsts), teacher, loss, (weight, dscores))
    }

    fn set_cross_entropy(
        &self,
        logits: &CudaTensor,
        bag_rows: usize,
        sets: &ListedColumns<Self>,
    ) -> Result<(CudaTensor, CudaTensor)> {
        self.device.set_cross_entropy(logits, bag_rows, sets)
    }

    fn add_sum_of_squares(
        &self,
        x: &CudaTensor,
        range: Range<usize>,
        sum: &mut CudaTensor,
    ) -> Result<()> {
        self.device.add_sum_of_squares(x, range, sum)
    }

    fn clip_factor(&self, sum: &CudaTensor, max_norm: Option<f32>) -> Result<CudaTensor> {
        self.device.clip_factor(sum, max_norm)
    }

    fn adamw(
        &self,
        weight: &mut CudaWeight,
        range: Range<usize>,
        grad: &CudaTensor,
        moments: (&mut CudaTensor, &mut CudaTensor),
        clip: &CudaTensor,
        step: &AdamWStep,
    ) -> Result<()> {
        self.device.adamw(weight, range, grad, moments, clip, step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without a GPU, or with fewer than a thousand.
    #[test]
    fn opening_a_missing_gpu_is_an_error() {
        let Err(error) = Cuda::new(1000) else { panic!("there are not that many") };
        let text = error.to_string();
        let causes = ["no NVIDIA driver", "no GPU 1000", "too old", "initialize the driver"];
        assert!(causes.iter().any(|said| text.contains(said)), "{text}");
        assert!(text.contains("hint: "), "{text}");
    }
}
