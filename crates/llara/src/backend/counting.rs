//! A backend that computes nothing and counts the memory and the operations of a step.
//!
//! It allocates every result as a device does: the same sizes, in the same order, in place where the device
//! works in place. Memory and operations are therefore predicted by running the training code itself; a
//! separate formula could diverge from the code.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Accumulate, AdamWStep, AttentionGradients, AttentionInput, AttentionOutput, Backend,
    DeviceMemory, DistillationLoss, DropoutKey, Dtype, Elements, Epilogue, ListedColumns,
    OffsetAllocator, PreparedWeight, RopeDirection, RopeTable, ScatterPlan, ScoreMask, Shape,
    TokenIds, View, ViewMut, WeightUse,
};
use crate::Result;

/// A backend that counts memory and operations. Clones share the counts.
///
/// ```
/// use llara::backend::{Backend, Cpu, CountingBackend, Dtype, Epilogue, Shape, WeightUse};
/// let counting = CountingBackend::new(Cpu::new().memory());
/// let (x, w) = (counting.zeros(100, 64, Dtype::F32)?, counting.zeros(32, 64, Dtype::F32)?);
/// let w = counting.prepare(w, WeightUse::Frozen(Dtype::F32))?;
/// let y = counting.linear(x.view(), w.view(), 1.0, Epilogue::default())?;
/// assert_eq!(counting.flops(), 2 * 100 * 64 * 32);
/// assert_eq!(counting.allocated(), 4 * (100 * 64 + 32 * 64 + 100 * 32));
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Clone)]
pub struct CountingBackend {
    memory: DeviceMemory,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Default)]
struct Counts {
    allocator: OffsetAllocator,
    flops: u64,
}

/// A matrix with a shape, a dtype and an offset, but no elements.
pub struct CountedTensor {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    bytes: usize,
    offset: usize,
    counting: CountingBackend,
}

/// A parameter, and the bf16 copy that the device uses in products.
pub struct CountedWeight {
    values: CountedTensor,
    /// Kept for its size; never read.
    _working: Option<CountedTensor>,
}

impl CountingBackend {
    /// A device that allocates as `memory` describes, with all counts 0.
    pub fn new(memory: DeviceMemory) -> Self {
        CountingBackend { memory, counts: Arc::default() }
    }

    /// Bytes of all tensors that currently exist.
    pub fn allocated(&self) -> usize {
        self.lock().allocator.allocated()
    }

    /// The highest end of a tensor since the last [`reset_peak`](CountingBackend::reset_peak), in bytes, with
    /// the free blocks below it: the memory that a process has reserved.
    pub fn peak(&self) -> usize {
        self.lock().allocator.peak()
    }

    /// Resets the peak to the tensors that currently exist.
    pub fn reset_peak(&self) {
        self.lock().allocator.reset_peak();
    }

    /// Floating-point operations of all matrix products and attentions; a multiplication and an addition
    /// count as two. Attention counts only the pairs of a query and a key that it attends to; its backward
    /// pass includes the scores that it recomputes.
    pub fn flops(&self) -> u64 {
        self.lock().flops
    }

    fn tensor(&self, (rows, cols): (usize, usize), dtype: Dtype) -> CountedTensor {
        let bytes = (rows * cols * dtype.bytes()).next_multiple_of(self.memory.alignment);
        let offset = self.lock().allocator.allocate(bytes);
        CountedTensor { rows, cols, dtype, bytes, offset, counting: self.clone() }
    }

    fn f32_tensor(&self, rows: usize, cols: usize) -> CountedTensor {
        self.tensor((rows, cols), Dtype::F32)
    }

    fn zeros_like(&self, x: &CountedTensor) -> CountedTensor {
        self.tensor(x.shape(), x.dtype)
    }

    /// Counts the product of `[m, k]` and `[k, n]`.
    fn count_product(&self, m: usize, k: usize, n: usize) {
        self.lock().flops += 2 * m as u64 * k as u64 * n as u64;
    }

    /// Counts `products` products of each query with the keys that it attends to, over all heads.
    fn count_attention(&self, products: u64, input: &AttentionInput<'_, Self>) {
        let AttentionInput { queries, keys, shape, .. } = input;
        let mut pairs = 0;
        for (queries, keys) in queries.bounds.windows(2).zip(keys.bounds.windows(2)) {
            let (count, length) = (queries[1] - queries[0], keys[1] - keys[0]);
            pairs += (length - count..length)
                .map(|position| (position as usize + 1).min(shape.window.unwrap_or(usize::MAX)))
                .sum::<usize>() as u64;
        }
        self.lock().flops += 2 * products * pairs * shape.q_cols() as u64;
    }

    /// Allocates and frees the partial gradients of a norm's weight, which exist while the kernel runs.
    fn norm_partials(&self, (rows, cols): (usize, usize), group: usize) {
        let task = (self.memory.norm_task_elements / cols.max(1)).max(1);
        drop(self.f32_tensor(rows.div_ceil(task), group));
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // A panic in another thread cannot leave the counts partially updated.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CountedTensor {
    fn drop(&mut self) {
        self.counting.lock().allocator.free(self.offset, self.bytes);
    }
}

impl Shape for CountedTensor {
    fn rows(&self) -> usize {
        self.rows
    }

    fn cols(&self) -> usize {
        self.cols
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }
}

impl Shape for CountedWeight {
    fn rows(&self) -> usize {
        self.values.rows
    }

    fn cols(&self) -> usize {
        self.values.cols
    }

    fn dtype(&self) -> Dtype {
        self.values.dtype
    }
}

impl PreparedWeight<CountedTensor> for CountedWeight {
    fn values(&self) -> &CountedTensor {
        &self.values
    }

    fn into_values(self) -> CountedTensor {
        self.values
    }
}

impl Backend for CountingBackend {
    type Tensor = CountedTensor;
    type Weight = CountedWeight;
    type Index = usize;
    type AttentionState = CountedTensor;
    type Download = usize;

    fn description(&self) -> String {
        "no device: memory and operations are counted".to_owned()
    }

    fn describe_products(&self, dtype: Dtype) -> String {
        format!("{dtype}, counted")
    }

    fn kernels(&self, _: Dtype) -> String {
        self.description()
    }

    fn fastest_dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn memory(&self) -> DeviceMemory {
        self.memory
    }

    fn zeros(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<CountedTensor> {
        Ok(self.tensor((rows, cols), dtype))
    }

    fn clear(&self, _: &mut CountedTensor) -> Result<()> {
        Ok(())
    }

    fn upload<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        rows: usize,
        cols: usize,
    ) -> Result<CountedTensor> {
        Ok(self.tensor((rows, cols), data.into().dtype()))
    }

    fn upload_into<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        to: ViewMut<'_, CountedTensor>,
    ) -> Result<()> {
        assert_eq!(data.into().len(), to.rows * to.cols, "upload_into: elements");
        Ok(())
    }

    /// Only the lengths are kept: the counts do not depend on the elements.
    fn upload_indices<const N: usize>(&self, lists: [&[u32]; N]) -> Result<[usize; N]> {
        Ok(lists.map(<[u32]>::len))
    }

    fn start_download(&self, x: &CountedTensor) -> Result<usize> {
        Ok(x.rows * x.cols)
    }

    /// Zeros.
    fn finish_download(&self, elements: usize) -> Result<Vec<f32>> {
        Ok(vec![0.0; elements])
    }

    fn copy(&self, x: View<'_, CountedTensor>, to: ViewMut<'_, CountedTensor>) -> Result<()> {
        assert_eq!(to.shape(), x.shape(), "copy: shape");
        Ok(())
    }

    fn add_scaled(
        &self,
        x: View<'_, CountedTensor>,
        _scale: f32,
        y: ViewMut<'_, CountedTensor>,
    ) -> Result<()> {
        assert_eq!(y.shape(), x.shape(), "add_scaled: shape");
        Ok(())
    }

    fn read_elements(&self, x: &CountedTensor, range: Range<usize>) -> Result<Vec<f32>> {
        assert!(range.end <= x.rows * x.cols, "read_elements: range");
        Ok(vec![0.0; range.len()])
    }

    fn write_elements(&self, x: &mut CountedTensor, start: usize, data: &[f32]) -> Result<()> {
        assert!(start + data.len() <= x.rows * x.cols, "write_elements: range");
        Ok(())
    }

    fn cast(&self, x: &CountedTensor, dtype: Dtype) -> Result<CountedTensor> {
        Ok(self.tensor(x.shape(), dtype))
    }

    fn prepare(&self, values: CountedTensor, purpose: WeightUse) -> Result<CountedWeight> {
        let working = match purpose {
            WeightUse::Trainable(Dtype::Bf16) if self.memory.has_working_copies => {
                Some(self.tensor(values.shape(), Dtype::Bf16))
            }
            _ => None,
        };
        Ok(CountedWeight { values, _working: working })
    }

    fn linear(
        &self,
        x: View<'_, CountedTensor>,
        w: View<'_, CountedWeight>,
        _alpha: f32,
        epilogue: Epilogue<'_, CountedTensor>,
    ) -> Result<CountedTensor> {
        assert_eq!(w.cols, x.cols, "linear: input features");
        self.count_product(x.rows, x.cols, w.rows);
        let dtype = epilogue.residual.map_or(x.dtype(), Shape::dtype);
        Ok(self.tensor((x.rows, w.rows), dtype))
    }

    fn linear_add(
        &self,
        x: View<'_, CountedTensor>,
        w: View<'_, CountedWeight>,
        y: ViewMut<'_, CountedTensor>,
    ) -> Result<()> {
        assert_eq!(y.shape(), (x.rows, w.rows), "linear_add: result");
        self.count_product(x.rows, x.cols, w.rows);
        Ok(())
    }

    fn linear_input_grad(
        &self,
        dy: View<'_, CountedTensor>,
        w: View<'_, CountedWeight>,
        _alpha: f32,
        onto: Option<CountedTensor>,
    ) -> Result<CountedTensor> {
        assert_eq!(w.rows, dy.cols, "linear_input_grad: output features");
        self.count_product(dy.rows, dy.cols, w.cols);
        Ok(onto.unwrap_or_else(|| self.tensor((dy.rows, w.cols), dy.dtype())))
    }

    fn linear_weight_grad(
        &self,
        dy: View<'_, CountedTensor>,
        x: View<'_, CountedTensor>,
        dw: ViewMut<'_, CountedTensor>,
        _accumulate: Accumulate,
    ) -> Result<()> {
        assert_eq!(dw.shape(), (dy.cols, x.cols), "linear_weight_grad: gradient");
        self.count_product(dy.cols, dy.rows, x.cols);
        Ok(())
    }

    fn linear_bias_grad(
        &self,
        _: View<'_, CountedTensor>,
        _: ViewMut<'_, CountedTensor>,
        _: Accumulate,
    ) -> Result<()> {
        Ok(())
    }

    fn scores(&self, q: &CountedTensor, p: &CountedTensor, _scale: f32) -> Result<CountedTensor> {
        self.count_product(q.rows, q.cols, p.rows);
        Ok(self.f32_tensor(q.rows, p.rows))
    }

    fn scores_backward(
        &self,
        ds: &CountedTensor,
        q: &CountedTensor,
        p: &CountedTensor,
        _scale: f32,
    ) -> Result<(CountedTensor, CountedTensor)> {
        self.count_product(ds.rows, ds.cols, p.cols);
        self.count_product(ds.cols, ds.rows, q.cols);
        let dq = self.f32_tensor(q.rows, q.cols);
        Ok((dq, self.f32_tensor(p.rows, p.cols)))
    }

    fn gather_rows(&self, x: &CountedTensor, rows: &usize) -> Result<CountedTensor> {
        Ok(self.tensor((*rows, x.cols), x.dtype))
    }

    fn scatter_add_rows(
        &self,
        dy: &CountedTensor,
        plan: &ScatterPlan<Self>,
        dx: &mut CountedTensor,
    ) -> Result<()> {
        assert_eq!(dy.shape(), (plan.sources, dx.cols), "scatter_add_rows: gradient");
        Ok(())
    }

    fn segment_mean(&self, x: &CountedTensor, offsets: &usize) -> Result<CountedTensor> {
        Ok(self.f32_tensor(offsets - 1, x.cols))
    }

    fn segment_mean_backward(
        &self,
        dy: &CountedTensor,
        _offsets: &usize,
        rows: usize,
    ) -> Result<CountedTensor> {
        Ok(self.f32_tensor(rows, dy.cols))
    }

    fn rms_norm(
        &self,
        x: View<'_, CountedTensor>,
        w: &CountedTensor,
        _eps: f32,
        dtype: Dtype,
    ) -> Result<(CountedTensor, CountedTensor)> {
        let y = self.tensor(x.shape(), dtype);
        Ok((y, self.f32_tensor(x.rows, x.cols / w.cols)))
    }

    fn rms_norm_backward(
        &self,
        _dy: &CountedTensor,
        x: &CountedTensor,
        w: &CountedTensor,
        _inv_rms: &CountedTensor,
        _dw: Option<&mut CountedTensor>,
        onto: Option<CountedTensor>,
    ) -> Result<CountedTensor> {
        let dx = onto.unwrap_or_else(|| self.zeros_like(x));
        self.norm_partials(x.shape(), w.cols);
        Ok(dx)
    }

    fn rms_norm_backward_in_place(
        &self,
        _dy: ViewMut<'_, CountedTensor>,
        x: View<'_, CountedTensor>,
        w: &CountedTensor,
        _inv_rms: &CountedTensor,
        _dw: Option<&mut CountedTensor>,
    ) -> Result<()> {
        self.norm_partials(x.shape(), w.cols);
        Ok(())
    }

    fn normalize(&self, x: &CountedTensor) -> Result<(CountedTensor, CountedTensor)> {
        let y = self.f32_tensor(x.rows, x.cols);
        Ok((y, self.f32_tensor(x.rows, 1)))
    }

    fn normalize_backward(
        &self,
        dy: View<'_, CountedTensor>,
        _y: &CountedTensor,
        _inv_norm: &CountedTensor,
    ) -> Result<CountedTensor> {
        Ok(self.f32_tensor(dy.rows, dy.cols))
    }

    fn rope(
        &self,
        _: ViewMut<'_, CountedTensor>,
        _: &usize,
        _: &RopeTable<Self>,
        _: RopeDirection,
    ) -> Result<()> {
        Ok(())
    }

    fn attention(&self, input: &AttentionInput<'_, Self>) -> Result<AttentionOutput<Self>> {
        // Scores and values.
        self.count_attention(2, input);
        let out = self.tensor(input.q.shape(), input.q.dtype());
        let state = self.memory.attention_state * input.shape.heads;
        Ok(AttentionOutput { out, state: self.f32_tensor(input.q.rows, state) })
    }

    fn attention_backward(
        &self,
        _dout: &CountedTensor,
        input: &AttentionInput<'_, Self>,
        _output: &AttentionOutput<Self>,
    ) -> Result<AttentionGradients<CountedTensor>> {
        // Recomputed scores, dP, dq, dk, dv.
        self.count_attention(5, input);
        let AttentionInput { q, queries, keys, shape, .. } = input;
        let (q_cols, kv_cols, dtype) = (shape.q_cols(), shape.kv_cols(), q.dtype());
        if queries.rows() == keys.rows() {
            let dqkv = self.tensor((keys.rows(), q_cols + 2 * kv_cols), dtype);
            return Ok(AttentionGradients::Fused(dqkv));
        }
        let dq = self.tensor((queries.rows(), q_cols), dtype);
        let dkv = self.tensor((keys.rows(), 2 * kv_cols), dtype);
        Ok(AttentionGradients::Separate { dq, dkv })
    }

    fn swiglu(&self, gate_up: &CountedTensor) -> Result<CountedTensor> {
        Ok(self.tensor((gate_up.rows, gate_up.cols / 2), gate_up.dtype))
    }

    fn swiglu_backward(
        &self,
        dy: CountedTensor,
        gate_up: CountedTensor,
    ) -> Result<(CountedTensor, CountedTensor)> {
        assert_eq!(gate_up.shape(), (dy.rows, 2 * dy.cols), "swiglu_backward: gate and up");
        Ok((gate_up, dy))
    }

    fn dropout(
        &self,
        x: &CountedTensor,
        _tokens: TokenIds<'_, Self>,
        _key: &DropoutKey,
        onto: Option<CountedTensor>,
    ) -> Result<CountedTensor> {
        Ok(onto.unwrap_or_else(|| self.zeros_like(x)))
    }

    fn cross_entropy(
        &self,
        scores: &CountedTensor,
        _targets: &usize,
    ) -> Result<(CountedTensor, CountedTensor)> {
        let grad = self.zeros_like(scores);
        Ok((self.f32_tensor(1, 1), grad))
    }

    fn mask_scores(
        &self,
        scores: &CountedTensor,
        _targets: &usize,
        _mask: &ScoreMask<Self>,
    ) -> Result<CountedTensor> {
        Ok(self.zeros_like(scores))
    }

    fn distillation(
        &self,
        scores: &CountedTensor,
        _firsts: &usize,
        _teacher: &CountedTensor,
        _loss: DistillationLoss,
        _weight: f32,
        dscores: &mut CountedTensor,
    ) -> Result<CountedTensor> {
        assert_eq!(dscores.shape(), scores.shape(), "distillation: gradient");
        Ok(self.f32_tensor(1, 1))
    }

    fn set_cross_entropy(
        &self,
        logits: &CountedTensor,
        bag_rows: usize,
        sets: &ListedColumns<Self>,
    ) -> Result<(CountedTensor, CountedTensor)> {
        assert_eq!(logits.rows, (sets.starts - 1) * bag_rows, "set_cross_entropy: rows");
        let grad = self.zeros_like(logits);
        Ok((self.f32_tensor(1, 1), grad))
    }

    fn add_sum_of_squares(
        &self,
        _x: &CountedTensor,
        _range: Range<usize>,
        _sum: &mut CountedTensor,
    ) -> Result<()> {
        Ok(())
    }

    fn clip_factor(&self, _sum: &CountedTensor, _max_norm: Option<f32>) -> Result<CountedTensor> {
        Ok(self.f32_tensor(1, 2))
    }

    fn adamw(
        &self,
        _weight: &mut CountedWeight,
        _range: Range<usize>,
        _grad: &CountedTensor,
        _moments: (&mut CountedTensor, &mut CountedTensor),
        _clip: &CountedTensor,
        _step: &AdamWStep,
    ) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
