//! A device that computes nothing and counts: what a step takes in memory and in work.
//!
//! It gives every result its place as the CPU does: the same sizes, in the same order, in place where
//! that works in place. So the code that trains, run on it, tells what training will take; a forecast
//! made in any other way would drift from the code.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{
    AdamWStep, Attended, AttentionShape, Backend, DropoutKey, Dtype, Gather, Layout, RopeTable,
    Shape, Space, TokenIds, Turn, cpu,
};
use crate::Result;

/// The backend that counts. Clones share one count.
///
/// ```
/// use llara::backend::{Backend, Tally};
/// let tally = Tally::new();
/// let (x, w) = (tally.zeros(100, 64)?, tally.zeros(32, 64)?);
/// let y = tally.linear(&x, &w, None, None)?;
/// assert_eq!(tally.flops(), 2 * 100 * 64 * 32);
/// assert_eq!(tally.taken(), 4 * (100 * 64 + 32 * 64 + 100 * 32));
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Tally {
    counts: Arc<Mutex<Counts>>,
}

#[derive(Default)]
struct Counts {
    space: Space,
    flops: u64,
}

/// A matrix that has a shape, a type and a place, and no elements.
pub struct TallyTensor {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    offset: usize,
    tally: Tally,
}

impl Tally {
    /// A device on which nothing has happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of all tensors that there are now.
    pub fn taken(&self) -> usize {
        self.lock().space.taken()
    }

    /// Bytes up to the furthest that a tensor has lain since the last
    /// [`forget_peak`](Tally::forget_peak), holes included: what a process keeps.
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

    fn tensor(&self, (rows, cols): (usize, usize), dtype: Dtype) -> TallyTensor {
        let offset = self.lock().space.take(rows * cols * dtype.bytes());
        TallyTensor { rows, cols, dtype, offset, tally: self.clone() }
    }

    fn like(&self, x: &TallyTensor) -> TallyTensor {
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

impl Drop for TallyTensor {
    fn drop(&mut self) {
        let bytes = self.rows * self.cols * self.dtype.bytes();
        self.tally.lock().space.put(self.offset, bytes);
    }
}

impl Shape for TallyTensor {
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

impl Backend for Tally {
    type Tensor = TallyTensor;
    type Index = Vec<u32>;

    fn description(&self) -> String {
        "nothing: memory and work are counted".to_owned()
    }

    fn zeros(&self, rows: usize, cols: usize) -> Result<TallyTensor> {
        Ok(self.tensor((rows, cols), Dtype::F32))
    }

    fn clear(&self, _: &mut TallyTensor) -> Result<()> {
        Ok(())
    }

    fn upload(&self, _: &[f32], rows: usize, cols: usize) -> Result<TallyTensor> {
        self.zeros(rows, cols)
    }

    fn upload_index(&self, data: &[u32]) -> Result<Vec<u32>> {
        Ok(data.to_vec())
    }

    /// Zeros.
    fn download(&self, x: &TallyTensor) -> Result<Vec<f32>> {
        Ok(vec![0.0; x.rows * x.cols])
    }

    fn slice_rows(&self, x: &TallyTensor, start: usize, count: usize) -> Result<TallyTensor> {
        assert!(start + count <= x.rows, "slice_rows: rows");
        Ok(self.tensor((count, x.cols), x.dtype))
    }

    fn concat_rows(&self, parts: &[&TallyTensor]) -> Result<TallyTensor> {
        let rows = parts.iter().map(|part| part.rows).sum();
        let (cols, dtype) = parts.first().map_or((0, Dtype::F32), |part| (part.cols, part.dtype));
        Ok(self.tensor((rows, cols), dtype))
    }

    fn cast(&self, x: &TallyTensor, to: Dtype) -> Result<TallyTensor> {
        Ok(self.tensor(x.shape(), to))
    }

    fn linear(
        &self,
        x: &TallyTensor,
        w: &TallyTensor,
        _bias: Option<&TallyTensor>,
        residual: Option<&TallyTensor>,
    ) -> Result<TallyTensor> {
        assert_eq!(w.cols, x.cols, "linear: input features");
        self.count_product(x.rows, x.cols, w.rows);
        Ok(self.tensor((x.rows, w.rows), residual.unwrap_or(x).dtype))
    }

    fn linear_onto(
        &self,
        x: &TallyTensor,
        w: &TallyTensor,
        onto: TallyTensor,
    ) -> Result<TallyTensor> {
        assert_eq!(onto.shape(), (x.rows, w.rows), "linear_onto: onto");
        self.count_product(x.rows, x.cols, w.rows);
        Ok(onto)
    }

    fn linear_input_grad(
        &self,
        dy: &TallyTensor,
        w: &TallyTensor,
        onto: Option<TallyTensor>,
    ) -> Result<TallyTensor> {
        assert_eq!(w.rows, dy.cols, "linear_input_grad: output features");
        self.count_product(dy.rows, dy.cols, w.cols);
        Ok(onto.unwrap_or_else(|| self.tensor((dy.rows, w.cols), dy.dtype)))
    }

    fn linear_weight_grad(
        &self,
        dy: &TallyTensor,
        x: &TallyTensor,
        dw: &mut TallyTensor,
        _gather: Gather,
    ) -> Result<()> {
        assert_eq!(dw.shape(), (dy.cols, x.cols), "linear_weight_grad: gradient");
        self.count_product(dy.cols, dy.rows, x.cols);
        Ok(())
    }

    fn linear_bias_grad(&self, _: &TallyTensor, _: &mut TallyTensor) -> Result<()> {
        Ok(())
    }

    fn gather_rows(&self, x: &TallyTensor, rows: &Vec<u32>) -> Result<TallyTensor> {
        Ok(self.tensor((rows.len(), x.cols), x.dtype))
    }

    fn scatter_add_rows(
        &self,
        dy: &TallyTensor,
        rows: &Vec<u32>,
        dx: &mut TallyTensor,
    ) -> Result<()> {
        assert_eq!(dy.shape(), (rows.len(), dx.cols), "scatter_add_rows: gradient");
        Ok(())
    }

    fn segment_mean(&self, x: &TallyTensor, offsets: &Vec<u32>) -> Result<TallyTensor> {
        self.zeros(offsets.len() - 1, x.cols)
    }

    fn segment_mean_backward(
        &self,
        dy: &TallyTensor,
        _offsets: &Vec<u32>,
        rows: usize,
    ) -> Result<TallyTensor> {
        self.zeros(rows, dy.cols)
    }

    fn rms_norm(
        &self,
        x: &TallyTensor,
        w: &TallyTensor,
        _eps: f32,
        to: Dtype,
    ) -> Result<(TallyTensor, TallyTensor)> {
        let y = self.tensor(x.shape(), to);
        Ok((y, self.zeros(x.rows, x.cols / w.cols)?))
    }

    fn rms_norm_backward(
        &self,
        _dy: &TallyTensor,
        x: &TallyTensor,
        w: &TallyTensor,
        _inv_rms: &TallyTensor,
        _dw: Option<&mut TallyTensor>,
        onto: Option<TallyTensor>,
    ) -> Result<TallyTensor> {
        let dx = onto.unwrap_or_else(|| self.like(x));
        // Each task sums the weight's gradient over its rows.
        let tasks = (x.rows * x.cols / w.cols).div_ceil(cpu::rows_per_task(w.cols));
        drop(self.zeros(tasks, w.cols)?);
        Ok(dx)
    }

    fn normalize(&self, x: &TallyTensor) -> Result<(TallyTensor, TallyTensor)> {
        let y = self.zeros(x.rows, x.cols)?;
        Ok((y, self.zeros(x.rows, 1)?))
    }

    fn normalize_backward(
        &self,
        dy: &TallyTensor,
        _y: &TallyTensor,
        _inv_norm: &TallyTensor,
    ) -> Result<TallyTensor> {
        self.zeros(dy.rows, dy.cols)
    }

    fn rope(&self, _: &mut TallyTensor, _: &Vec<u32>, _: &RopeTable<Self>, _: Turn) -> Result<()> {
        Ok(())
    }

    fn attention(
        &self,
        q: &TallyTensor,
        _k: &TallyTensor,
        _v: &TallyTensor,
        queries: &Layout<Self>,
        _keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<Attended<Self>> {
        // Scores and values.
        self.count_attention(2, queries, shape);
        let out = self.like(q);
        Ok(Attended { out, log_sum_exp: self.zeros(q.rows, shape.heads)? })
    }

    fn attention_backward(
        &self,
        _dout: &TallyTensor,
        q: &TallyTensor,
        k: &TallyTensor,
        v: &TallyTensor,
        _attended: &Attended<Self>,
        queries: &Layout<Self>,
        _keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<(TallyTensor, TallyTensor, TallyTensor)> {
        // Gradients of q, k, v and probabilities, and the scores again.
        self.count_attention(5, queries, shape);
        Ok((self.like(q), self.like(k), self.like(v)))
    }

    fn swiglu(&self, gate: &TallyTensor, up: &TallyTensor) -> Result<TallyTensor> {
        assert_eq!(gate.shape(), up.shape(), "swiglu");
        Ok(self.like(gate))
    }

    fn swiglu_backward(
        &self,
        _dy: &TallyTensor,
        gate: &TallyTensor,
        up: &TallyTensor,
    ) -> Result<(TallyTensor, TallyTensor)> {
        Ok((self.like(gate), self.like(up)))
    }

    fn dropout(
        &self,
        x: &TallyTensor,
        _tokens: TokenIds<'_, Self>,
        _key: &DropoutKey,
        onto: Option<TallyTensor>,
    ) -> Result<TallyTensor> {
        Ok(onto.unwrap_or_else(|| self.like(x)))
    }

    fn scale(&self, _: &mut TallyTensor, _: f32) -> Result<()> {
        Ok(())
    }

    fn cross_entropy(
        &self,
        scores: &TallyTensor,
        _targets: &Vec<u32>,
    ) -> Result<(TallyTensor, TallyTensor)> {
        let dscores = self.like(scores);
        Ok((self.zeros(1, 1)?, dscores))
    }

    fn add_sum_of_squares(&self, _: &TallyTensor, _: &mut TallyTensor) -> Result<()> {
        Ok(())
    }

    fn clip_factor(&self, _: &TallyTensor, _: Option<f32>) -> Result<TallyTensor> {
        self.zeros(1, 2)
    }

    fn adamw(
        &self,
        param: &mut TallyTensor,
        grad: &TallyTensor,
        _moments: (&mut TallyTensor, &mut TallyTensor),
        _clip: &TallyTensor,
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
        let tally = Tally::new();
        assert_eq!(shapes(&tally), shapes(&Cpu::new()));
        assert_eq!(tally.taken(), 0, "a tensor kept its place");
    }

    #[test]
    fn attention_counts_the_pairs_that_see_each_other() {
        let tally = Tally::new();
        let layout = |offsets: Vec<u32>, positions: Vec<u32>| Layout::<Tally> {
            sequences: offsets.len() - 1,
            rows: positions.len(),
            longest: 5,
            offsets,
            positions,
        };
        let shape = AttentionShape { heads: 3, kv_heads: 1, head_dim: 4, window: None, scale: 1.0 };
        let all = layout(vec![0, 5, 7], vec![0, 1, 2, 3, 4, 0, 1]);
        let (q, kv) = (tally.zeros(7, 12).unwrap(), tally.zeros(7, 4).unwrap());
        let attended = tally.attention(&q, &kv, &kv, &all, &all, &shape).unwrap();
        assert_eq!(tally.flops(), 4 * 12 * (15 + 3));
        tally.attention_backward(&q, &q, &kv, &kv, &attended, &all, &all, &shape).unwrap();
        assert_eq!(tally.flops(), (4 + 10) * 12 * (15 + 3));
        let windowed = AttentionShape { window: Some(2), ..shape };
        let before = tally.flops();
        tally.attention(&q, &kv, &kv, &all, &all, &windowed).unwrap();
        assert_eq!(tally.flops() - before, 4 * 12 * (1 + 2 + 2 + 2 + 2 + 1 + 2));
    }

    #[test]
    fn mixed_precision_takes_half() {
        let tally = Tally::new();
        let x = tally.cast(&tally.zeros(64, 32).unwrap(), Dtype::Bf16).unwrap();
        let w = tally.zeros(32, 32).unwrap();
        let residual = tally.zeros(64, 32).unwrap();
        let dtypes = [
            tally.linear(&x, &w, None, None).unwrap().dtype(),
            tally.linear(&x, &w, None, Some(&residual)).unwrap().dtype(),
            tally.linear_input_grad(&x, &w, None).unwrap().dtype(),
        ];
        assert_eq!(dtypes, [Dtype::Bf16, Dtype::F32, Dtype::Bf16]);
        drop((w, residual));
        assert_eq!(tally.taken(), 64 * 32 * 2);
        assert!(tally.peak() > tally.taken());
    }
}
