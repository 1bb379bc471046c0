//! A backend that computes nothing and counts the memory and the operations of a step.
//!
//! It allocates every result as the CPU does: the same sizes, in the same order, in place where
//! the CPU works in place. So the training code itself, run on it, predicts memory and work; an estimate
//! made in any other way would diverge from the code.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    Accumulate, AdamWStep, AttentionOutput, AttentionShape, Backend, DropoutKey, Dtype, Layout,
    OffsetAllocator, RopeDirection, RopeTable, Shape, TokenIds, cpu,
};
use crate::Result;

/// The backend that counts. Clones share one count.
///
/// ```
/// use llara::backend::{Backend, CountingBackend};
/// let counting = CountingBackend::new();
/// let (x, w) = (counting.zeros(100, 64)?, counting.zeros(32, 64)?);
/// let y = counting.linear(&x, &w, None, None)?;
/// assert_eq!(counting.flops(), 2 * 100 * 64 * 32);
/// assert_eq!(counting.taken(), 4 * (100 * 64 + 32 * 64 + 100 * 32));
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct CountingBackend {
    counts: Arc<Mutex<Counts>>,
}

#[derive(Default)]
struct Counts {
    space: OffsetAllocator,
    flops: u64,
}

/// A matrix that has a shape, a type and a place, and no elements.
pub struct CountedTensor {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    offset: usize,
    counting: CountingBackend,
}

impl CountingBackend {
    /// A device on which nothing has happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of all tensors that there are now.
    pub fn taken(&self) -> usize {
        self.lock().space.taken()
    }

    /// Bytes up to the furthest that a tensor has lain since the last
    /// [`forget_peak`](CountingBackend::forget_peak), holes included: what a process keeps.
    pub fn peak(&self) -> usize {
        self.lock().space.peak()
    }

    /// Lets the peak begin anew with the tensors that there are now.
    pub fn forget_peak(&self) {
        self.lock().space.forget_peak();
    }

    /// Operations of all matrix products and attentions, a multiplication and an addition being two.
    /// Attention counts the pairs of positions that see each other, and in its backward pass the
    /// scores that it computes again.
    pub fn flops(&self) -> u64 {
        self.lock().flops
    }

    /// Memory that the CPU's kernels take beside tensors, at most: for each thread packed panels of
    /// three operands, and in attention a tile's scores and gradients and one head's keys and values
    /// of a sequence of `longest` tokens.
    pub fn workspace(threads: usize, longest: usize, head_dim: usize) -> usize {
        const PACKED: usize = 5 << 19;
        let tile = 4 * cpu::TILE_ROWS * (longest + head_dim);
        threads * (PACKED + 4 * (tile + 2 * longest * head_dim))
    }

    fn tensor(&self, (rows, cols): (usize, usize), dtype: Dtype) -> CountedTensor {
        let offset = self.lock().space.take(rows * cols * dtype.bytes());
        CountedTensor { rows, cols, dtype, offset, counting: self.clone() }
    }

    fn like(&self, x: &CountedTensor) -> CountedTensor {
        self.tensor(x.shape(), x.dtype)
    }

    /// The product of `[m, k]` and `[k, n]`.
    fn count_product(&self, m: usize, k: usize, n: usize) {
        self.lock().flops += 2 * m as u64 * k as u64 * n as u64;
    }

    /// So many products of the queries with the keys that each sees, over all heads.
    fn count_attention(&self, products: u64, queries: &Layout<Self>, shape: &AttentionShape) {
        let seen = |&position: &u32| {
            let all = u64::from(position) + 1;
            shape.window.map_or(all, |window| all.min(window as u64))
        };
        let pairs: u64 = queries.positions.iter().map(seen).sum();
        self.lock().flops += 2 * products * pairs * (shape.heads * shape.head_dim) as u64;
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // A panic elsewhere cannot leave the counts half-changed.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for CountedTensor {
    fn drop(&mut self) {
        let bytes = self.rows * self.cols * self.dtype.bytes();
        self.counting.lock().space.put(self.offset, bytes);
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

impl Backend for CountingBackend {
    type Tensor = CountedTensor;
    type Index = Vec<u32>;

    fn kernels(&self, _: Dtype) -> String {
        self.description()
    }

    fn description(&self) -> String {
        "nothing: memory and work are counted".to_owned()
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<CountedTensor> {
        Ok(self.tensor((rows, cols), Dtype::F32))
    }

    fn clear(&self, _: &mut CountedTensor) -> Result<()> {
        Ok(())
    }

    fn upload(&self, _: &[f32], rows: usize, cols: usize) -> Result<CountedTensor> {
        self.zeros(rows, cols)
    }

    fn upload_index(&self, data: &[u32]) -> Result<Vec<u32>> {
        Ok(data.to_vec())
    }

    /// Zeros.
    fn download(&self, x: &CountedTensor) -> Result<Vec<f32>> {
        Ok(vec![0.0; x.rows * x.cols])
    }

    fn read_elements(&self, x: &CountedTensor, range: Range<usize>) -> Result<Vec<f32>> {
        assert!(range.end <= x.rows * x.cols, "read_elements: range");
        Ok(vec![0.0; range.len()])
    }

    fn write_elements(&self, x: &mut CountedTensor, start: usize, data: &[f32]) -> Result<()> {
        assert!(start + data.len() <= x.rows * x.cols, "write_elements: range");
        Ok(())
    }

    fn slice_rows(&self, x: &CountedTensor, start: usize, count: usize) -> Result<CountedTensor> {
        assert!(start + count <= x.rows, "slice_rows: rows");
        Ok(self.tensor((count, x.cols), x.dtype))
    }

    fn concat_rows(&self, parts: &[&CountedTensor]) -> Result<CountedTensor> {
        let rows = parts.iter().map(|part| part.rows).sum();
        let (cols, dtype) = parts.first().map_or((0, Dtype::F32), |part| (part.cols, part.dtype));
        Ok(self.tensor((rows, cols), dtype))
    }

    fn cast(&self, x: &CountedTensor, to: Dtype) -> Result<CountedTensor> {
        Ok(self.tensor(x.shape(), to))
    }

    fn linear(
        &self,
        x: &CountedTensor,
        w: &CountedTensor,
        _bias: Option<&CountedTensor>,
        residual: Option<&CountedTensor>,
    ) -> Result<CountedTensor> {
        assert_eq!(w.cols, x.cols, "linear: input features");
        self.count_product(x.rows, x.cols, w.rows);
        Ok(self.tensor((x.rows, w.rows), residual.unwrap_or(x).dtype))
    }

    fn linear_onto(
        &self,
        x: &CountedTensor,
        w: &CountedTensor,
        onto: CountedTensor,
    ) -> Result<CountedTensor> {
        assert_eq!(onto.shape(), (x.rows, w.rows), "linear_onto: onto");
        self.count_product(x.rows, x.cols, w.rows);
        Ok(onto)
    }

    fn linear_input_grad(
        &self,
        dy: &CountedTensor,
        w: &CountedTensor,
        onto: Option<CountedTensor>,
    ) -> Result<CountedTensor> {
        assert_eq!(w.rows, dy.cols, "linear_input_grad: output features");
        self.count_product(dy.rows, dy.cols, w.cols);
        Ok(onto.unwrap_or_else(|| self.tensor((dy.rows, w.cols), dy.dtype)))
    }

    fn linear_weight_grad(
        &self,
        dy: &CountedTensor,
        x: &CountedTensor,
        dw: &mut CountedTensor,
        _accumulate: Accumulate,
    ) -> Result<()> {
        assert_eq!(dw.shape(), (dy.cols, x.cols), "linear_weight_grad: gradient");
        self.count_product(dy.cols, dy.rows, x.cols);
        Ok(())
    }

    fn linear_bias_grad(&self, _: &CountedTensor, _: &mut CountedTensor) -> Result<()> {
        Ok(())
    }

    fn gather_rows(&self, x: &CountedTensor, rows: &Vec<u32>) -> Result<CountedTensor> {
        Ok(self.tensor((rows.len(), x.cols), x.dtype))
    }

    fn scatter_add_rows(
        &self,
        dy: &CountedTensor,
        rows: &Vec<u32>,
        dx: &mut CountedTensor,
    ) -> Result<()> {
        assert_eq!(dy.shape(), (rows.len(), dx.cols), "scatter_add_rows: gradient");
        Ok(())
    }

    fn segment_mean(&self, x: &CountedTensor, offsets: &Vec<u32>) -> Result<CountedTensor> {
        self.zeros(offsets.len() - 1, x.cols)
    }

    fn segment_mean_backward(
        &self,
        dy: &CountedTensor,
        _offsets: &Vec<u32>,
        rows: usize,
    ) -> Result<CountedTensor> {
        self.zeros(rows, dy.cols)
    }

    fn rms_norm(
        &self,
        x: &CountedTensor,
        w: &CountedTensor,
        _eps: f32,
        to: Dtype,
    ) -> Result<(CountedTensor, CountedTensor)> {
        let y = self.tensor(x.shape(), to);
        Ok((y, self.zeros(x.rows, x.cols / w.cols)?))
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
        let dx = onto.unwrap_or_else(|| self.like(x));
        // Each task sums the weight's gradient over its rows.
        let tasks = (x.rows * x.cols / w.cols).div_ceil(cpu::rows_per_task(w.cols));
        drop(self.zeros(tasks, w.cols)?);
        Ok(dx)
    }

    fn normalize(&self, x: &CountedTensor) -> Result<(CountedTensor, CountedTensor)> {
        let y = self.zeros(x.rows, x.cols)?;
        Ok((y, self.zeros(x.rows, 1)?))
    }

    fn normalize_backward(
        &self,
        dy: &CountedTensor,
        _y: &CountedTensor,
        _inv_norm: &CountedTensor,
    ) -> Result<CountedTensor> {
        self.zeros(dy.rows, dy.cols)
    }

    fn rope(
        &self,
        _: &mut CountedTensor,
        _: &Vec<u32>,
        _: &RopeTable<Self>,
        _: RopeDirection,
    ) -> Result<()> {
        Ok(())
    }

    fn attention(
        &self,
        q: &CountedTensor,
        _k: &CountedTensor,
        _v: &CountedTensor,
        queries: &Layout<Self>,
        _keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<AttentionOutput<Self>> {
        // Scores and values.
        self.count_attention(2, queries, shape);
        let out = self.like(q);
        Ok(AttentionOutput { out, log_sum_exp: self.zeros(q.rows, shape.heads)? })
    }

    fn attention_backward(
        &self,
        _dout: &CountedTensor,
        q: &CountedTensor,
        k: &CountedTensor,
        v: &CountedTensor,
        _attended: &AttentionOutput<Self>,
        queries: &Layout<Self>,
        _keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<(CountedTensor, CountedTensor, CountedTensor)> {
        // Gradients of q, k, v and probabilities, and the scores again.
        self.count_attention(5, queries, shape);
        Ok((self.like(q), self.like(k), self.like(v)))
    }

    fn swiglu(&self, gate: &CountedTensor, up: &CountedTensor) -> Result<CountedTensor> {
        assert_eq!(gate.shape(), up.shape(), "swiglu");
        Ok(self.like(gate))
    }

    fn swiglu_backward(
        &self,
        _dy: &CountedTensor,
        gate: &CountedTensor,
        up: &CountedTensor,
    ) -> Result<(CountedTensor, CountedTensor)> {
        Ok((self.like(gate), self.like(up)))
    }

    fn dropout(
        &self,
        x: &CountedTensor,
        _tokens: TokenIds<'_, Self>,
        _key: &DropoutKey,
        onto: Option<CountedTensor>,
    ) -> Result<CountedTensor> {
        Ok(onto.unwrap_or_else(|| self.like(x)))
    }

    fn scale(&self, _: &mut CountedTensor, _: f32) -> Result<()> {
        Ok(())
    }

    fn cross_entropy(
        &self,
        scores: &CountedTensor,
        _targets: &Vec<u32>,
    ) -> Result<(CountedTensor, CountedTensor)> {
        let dscores = self.like(scores);
        Ok((self.zeros(1, 1)?, dscores))
    }

    fn add_sum_of_squares(
        &self,
        _: &CountedTensor,
        _: Range<usize>,
        _: &mut CountedTensor,
    ) -> Result<()> {
        Ok(())
    }

    fn clip_factor(&self, _: &CountedTensor, _: Option<f32>) -> Result<CountedTensor> {
        self.zeros(1, 2)
    }

    fn adamw(
        &self,
        param: &mut CountedTensor,
        _range: Range<usize>,
        grad: &CountedTensor,
        _moments: (&mut CountedTensor, &mut CountedTensor),
        _clip: &CountedTensor,
        _step: &AdamWStep,
    ) -> Result<()> {
        assert_eq!(param.shape(), grad.shape(), "adamw: gradient");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Cpu;

    /// Shapes of everything that a few operations return, in order.
    fn shapes<B: Backend>(backend: &B) -> Vec<(usize, usize, Dtype)> {
        let mut seen = Vec::new();
        let mut see = |x: &B::Tensor| seen.push((x.rows(), x.cols(), x.dtype()));
        let x = backend.upload(&[0.5; 6 * 8], 6, 8).unwrap();
        let w = backend.upload(&[0.5; 4 * 8], 4, 8).unwrap();
        let y = backend.linear(&x, &w, None, None).unwrap();
        see(&y);
        see(&backend.linear_input_grad(&y, &w, None).unwrap());
        let gain = backend.upload(&[1.0; 4], 1, 4).unwrap();
        let (normed, inv_rms) = backend.rms_norm(&x, &gain, 1e-5, Dtype::F32).unwrap();
        see(&normed);
        see(&inv_rms);
        see(&backend.rms_norm_backward(&x, &x, &gain, &inv_rms, None, None).unwrap());
        let (unit, inv_norm) = backend.normalize(&x).unwrap();
        see(&unit);
        see(&inv_norm);
        see(&backend.normalize_backward(&x, &unit, &inv_norm).unwrap());
        let index = |data: &[u32]| backend.upload_index(data).unwrap();
        see(&backend.gather_rows(&x, &index(&[1, 1, 5])).unwrap());
        see(&backend.segment_mean(&x, &index(&[0, 2, 6])).unwrap());
        see(&backend.segment_mean_backward(&w, &index(&[0, 2, 5, 6, 9]), 9).unwrap());
        let layout = |rows: &[u32], positions: &[u32]| Layout::<B> {
            offsets: index(rows),
            positions: index(positions),
            sequences: 2,
            rows: positions.len(),
            longest: 4,
        };
        let (queries, keys) =
            (layout(&[0, 1, 2], &[1, 3]), layout(&[0, 2, 6], &[0, 1, 0, 1, 2, 3]));
        let shape =
            AttentionShape { heads: 4, kv_heads: 2, head_dim: 4, window: Some(3), scale: 0.5 };
        let q = backend.upload(&[0.1; 2 * 16], 2, 16).unwrap();
        let attended = backend.attention(&q, &x, &x, &queries, &keys, &shape).unwrap();
        see(&attended.out);
        see(&attended.log_sum_exp);
        let (dq, dk, dv) =
            backend.attention_backward(&q, &q, &x, &x, &attended, &queries, &keys, &shape).unwrap();
        [dq, dk, dv].iter().for_each(&mut see);
        let (loss, dscores) = backend.cross_entropy(&y, &index(&[0; 6])).unwrap();
        see(&loss);
        see(&dscores);
        see(&backend.concat_rows(&[&x, &x]).unwrap());
        see(&backend.slice_rows(&x, 1, 2).unwrap());
        see(&backend.clip_factor(&loss, None).unwrap());
        seen
    }

    #[test]
    fn results_are_shaped_as_the_cpu_shapes_them() {
        let counting = CountingBackend::new();
        assert_eq!(shapes(&counting), shapes(&Cpu::new()));
        assert_eq!(counting.taken(), 0, "a tensor kept its place");
    }

    #[test]
    fn attention_counts_the_pairs_that_see_each_other() {
        let counting = CountingBackend::new();
        let layout = |offsets: Vec<u32>, positions: Vec<u32>| Layout::<CountingBackend> {
            sequences: offsets.len() - 1,
            rows: positions.len(),
            longest: 5,
            offsets,
            positions,
        };
        let shape = AttentionShape { heads: 3, kv_heads: 1, head_dim: 4, window: None, scale: 1.0 };
        let all = layout(vec![0, 5, 7], vec![0, 1, 2, 3, 4, 0, 1]);
        let (q, kv) = (counting.zeros(7, 12).unwrap(), counting.zeros(7, 4).unwrap());
        let attended = counting.attention(&q, &kv, &kv, &all, &all, &shape).unwrap();
        assert_eq!(counting.flops(), 4 * 12 * (15 + 3));
        counting.attention_backward(&q, &q, &kv, &kv, &attended, &all, &all, &shape).unwrap();
        assert_eq!(counting.flops(), (4 + 10) * 12 * (15 + 3));
        let windowed = AttentionShape { window: Some(2), ..shape };
        let before = counting.flops();
        counting.attention(&q, &kv, &kv, &all, &all, &windowed).unwrap();
        assert_eq!(counting.flops() - before, 4 * 12 * (1 + 2 + 2 + 2 + 2 + 1 + 2));
    }

    #[test]
    fn mixed_precision_takes_half() {
        let counting = CountingBackend::new();
        let x = counting.cast(&counting.zeros(64, 32).unwrap(), Dtype::Bf16).unwrap();
        let w = counting.zeros(32, 32).unwrap();
        let residual = counting.zeros(64, 32).unwrap();
        let dtypes = [
            counting.linear(&x, &w, None, None).unwrap().dtype(),
            counting.linear(&x, &w, None, Some(&residual)).unwrap().dtype(),
            counting.linear_input_grad(&x, &w, None).unwrap().dtype(),
        ];
        assert_eq!(dtypes, [Dtype::Bf16, Dtype::F32, Dtype::Bf16]);
        drop((w, residual));
        assert_eq!(counting.taken(), 64 * 32 * 2);
        assert!(counting.peak() > counting.taken());
    }
}
