//! Causal attention over packed sequences, in tiles of queries.
//!
//! A task is one sequence and one key head with the query heads that share it, so no two tasks write the
//! same element, and results do not depend on the other sequences of the batch. A task computes one tile of
//! queries at a time, with only the keys that these queries attend to, and stores only the scores of that
//! tile. The backward pass recomputes them from the saved log-sum-exp (Dao et al. 2022, section 3.1).

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::device::Cpu;
use super::element::{Element, with_element};
use super::gemm::{self, Gemm, Operand, Output};
use super::shared::SharedSlice;
use super::vector::{dot, exp_scaled_sum, max, vectorised};
use crate::Result;
use crate::backend::{AttentionGradients, AttentionInput, AttentionOutput, Shape, View};

/// Rows of a tile, over all heads that share keys: enough that packing is a small part of a product, and few
/// enough that only a small part of the scores is masked. A multiple of the six rows of a kernel.
pub(super) const TILE_ROWS: usize = 72;

/// A tile of queries of one sequence and the keys that any of them attends to.
struct Tile {
    /// Rows of q, global.
    queries: Range<usize>,
    /// Rows of k and v, global.
    keys: Range<usize>,
    /// For each query, the columns of the tile that it attends to.
    visible: Vec<Range<usize>>,
}

/// The layout of the heads of a matrix: head `h` of row `r` starts at `r · stride + column + h · hd`.
#[derive(Clone, Copy)]
struct Heads {
    stride: usize,
    column: usize,
    head_dim: usize,
}

impl Heads {
    fn of(x: View<'_, CpuTensor>, head_dim: usize) -> Self {
        Heads { stride: x.tensor.cols(), column: x.col, head_dim }
    }

    /// The elements of one row and head.
    fn span(self, row: usize, head: usize) -> Range<usize> {
        let start = row * self.stride + self.column + head * self.head_dim;
        start..start + self.head_dim
    }
}

/// The heads of a matrix, with its elements.
#[derive(Clone, Copy)]
struct HeadsOf<'x, T> {
    elements: &'x [T],
    heads: Heads,
}

impl<'x, T: Element + Output> HeadsOf<'x, T> {
    fn new(x: View<'x, CpuTensor>, head_dim: usize) -> Self {
        HeadsOf { elements: x.rows_of(), heads: Heads::of(x, head_dim) }
    }

    /// Some rows of one head as an operand. `[rows, hd]`
    fn rows(self, rows: &Range<usize>, head: usize) -> Operand<'x> {
        let (start, hd) = (self.heads.span(rows.start, head).start, self.heads.head_dim);
        let x = &self.elements[start..];
        T::operand(gemm::View::strided(x, (rows.len(), hd), self.heads.stride))
    }
}

/// The input that all tasks of one call share.
struct Plan<'a> {
    input: &'a AttentionInput<'a, Cpu>,
}

impl Plan<'_> {
    fn group(&self) -> usize {
        self.input.shape.heads / self.input.shape.kv_heads
    }

    /// Every (sequence, key head), each exactly once.
    fn tasks(&self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
        let kv_heads = self.input.shape.kv_heads;
        (0..self.input.queries.sequences() * kv_heads)
            .into_par_iter()
            .map(move |task| (task / kv_heads, task % kv_heads))
    }

    fn key_rows(&self, sequence: usize) -> Range<usize> {
        let bounds = &self.input.keys.bounds;
        bounds[sequence] as usize..bounds[sequence + 1] as usize
    }

    fn tiles(&self, sequence: usize) -> impl Iterator<Item = Tile> {
        let bounds = &self.input.queries.bounds;
        let (start, end) = (bounds[sequence] as usize, bounds[sequence + 1] as usize);
        let keys = self.key_rows(sequence);
        let window = self.input.shape.window;
        let at_once = (TILE_ROWS / self.group()).max(1);
        // Queries are the last rows of their sequence.
        let before = keys.len() - (end - start);
        (start..end).step_by(at_once).map(move |first| {
            let queries = first..(first + at_once).min(end);
            let lowest = |position: usize| window.map_or(0, |w| (position + 1).saturating_sub(w));
            let positions = queries.start - start + before..queries.end - start + before;
            let from = lowest(positions.start);
            let visible = positions.clone().map(|p| lowest(p) - from..p + 1 - from).collect();
            Tile { queries, keys: keys.start + from..keys.start + positions.end, visible }
        })
    }

    /// The rows of a tile of q, out or dout, with the heads stacked vertically: `[group · queries, hd]`. All
    /// heads that share keys are then computed by one larger product.
    fn stack<T: Element>(
        &self,
        tile: &Tile,
        kv_head: usize,
        x: HeadsOf<'_, T>,
        stacked: &mut Vec<T>,
    ) {
        stacked.clear();
        for head in self.query_heads(kv_head) {
            for row in tile.queries.clone() {
                stacked.extend_from_slice(&x.elements[x.heads.span(row, head)]);
            }
        }
    }

    /// The inverse of [`stack`](Self::stack).
    ///
    /// # Safety
    /// No other task may access these rows of these heads.
    unsafe fn unstack<T: Element>(
        &self,
        tile: &Tile,
        kv_head: usize,
        stacked: &[T],
        (x, heads): (&SharedSlice<'_, T>, Heads),
    ) {
        let mut rows = stacked.chunks_exact(self.input.shape.head_dim);
        for head in self.query_heads(kv_head) {
            for (row, from) in tile.queries.clone().zip(&mut rows) {
                let span = heads.span(row, head);
                // SAFETY: guaranteed by the caller.
                unsafe { x.slice_mut(span.start, span.len()) }.copy_from_slice(from);
            }
        }
    }

    fn query_heads(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.group()..(kv_head + 1) * self.group()
    }
}

/// `out = a · b` on the thread of the task.
fn multiply<T: Output, O: Element + Output>(
    out: &mut Vec<O>,
    (m, n): (usize, usize),
    a: Operand<'_>,
    b: Operand<'_>,
) {
    out.resize(m * n, O::from_f32(0.0));
    Gemm::new(T::PRECISION).serial().multiply(gemm::ViewMut::new(out, m, n), a, b);
}

/// A whole buffer as a row-major operand.
fn matrix<T: Output>(x: &[T], cols: usize) -> Operand<'_> {
    T::operand(gemm::View::new(x, x.len() / cols.max(1), cols))
}

pub(super) fn attention(
    cpu: &Cpu,
    input: &AttentionInput<'_, Cpu>,
) -> Result<AttentionOutput<Cpu>> {
    let AttentionInput { q, k, v, queries, keys, shape } = input;
    assert_eq!(q.shape(), (queries.rows(), shape.q_cols()), "attention: queries");
    assert_eq!(k.shape(), (keys.rows(), shape.kv_cols()), "attention: keys");
    assert_eq!(v.shape(), k.shape(), "attention: values");
    let mut out = cpu.unspecified_of(q.rows, q.cols, q.dtype())?;
    let mut state = cpu.unspecified(q.rows, shape.heads)?;
    with_element!(q, T => attend::<T>(&Plan { input }, &mut out, &mut state));
    Ok(AttentionOutput { out, state })
}

/// Writes the output and the log-sum-exp of each query's scaled scores. `[rows, H]`
fn attend<T: Element + Output>(plan: &Plan<'_>, out: &mut CpuTensor, log_sum_exp: &mut CpuTensor) {
    let AttentionInput { q, k, v, shape, .. } = *plan.input;
    let (heads, hd) = (shape.heads, shape.head_dim);
    let [q, k, v] = [q, k, v].map(|x| HeadsOf::<T>::new(x, hd));
    let out_heads = Heads::of(out.view(), hd);
    let shared_out = SharedSlice::new(out.elements_mut::<T>());
    let shared_lse = SharedSlice::new(log_sum_exp.as_mut_slice());
    plan.tasks().for_each(|(sequence, kv_head)| {
        let (mut tile_q, mut tile_out, mut p) = (Vec::new(), Vec::new(), Vec::new());
        let (mut scores, mut lse) = (Vec::new(), Vec::new());
        for tile in plan.tiles(sequence) {
            let (m, n) = (plan.group() * tile.queries.len(), tile.keys.len());
            plan.stack(&tile, kv_head, q, &mut tile_q);
            let keys = k.rows(&tile.keys, kv_head);
            multiply::<T, f32>(&mut scores, (m, n), matrix(&tile_q, hd), keys.t());
            p.resize(m * n, T::from_f32(0.0));
            lse.resize(m, 0.0);
            softmax(&mut p, &mut lse, &mut scores, &tile.visible, shape.scale);
            let values = v.rows(&tile.keys, kv_head);
            multiply::<T, T>(&mut tile_out, (m, hd), matrix(&p, n), values);
            // SAFETY: only this task accesses the rows of its sequence in its heads.
            unsafe { plan.unstack(&tile, kv_head, &tile_out, (&shared_out, out_heads)) };
            let mut lse = lse.iter();
            for head in plan.query_heads(kv_head) {
                for (row, &lse) in tile.queries.clone().zip(&mut lse) {
                    // SAFETY: as above.
                    unsafe { shared_lse.slice_mut(row * heads + head, 1)[0] = lse };
                }
            }
        }
    });
}

vectorised! {
    /// Softmax of the visible scores of each row, and zero elsewhere; also their log-sum-exp. Overwrites the
    /// scores.
    fn softmax<T: Element>(
        p: &mut [T],
        log_sum_exp: &mut [f32],
        scores: &mut [f32],
        visible: &[Range<usize>],
        scale: f32,
    ) {
        let n = scores.len() / log_sum_exp.len();
        let rows = p.chunks_exact_mut(n).zip(scores.chunks_exact_mut(n));
        let visible = visible.iter().cycle(); // the same queries in every head
        for ((p, scores), (lse, visible)) in rows.zip(log_sum_exp.iter_mut().zip(visible)) {
            clear_outside(p, visible);
            let scores = &mut scores[visible.clone()];
            let largest = max(scores) * scale;
            let sum = exp_scaled_sum(scores, scale, largest);
            let share = 1.0 / sum;
            let p = p[visible.clone()].iter_mut();
            p.zip(scores).for_each(|(p, e)| *p = T::from_f32(*e * share));
            *lse = largest + sum.ln();
        }
    }
}

#[inline(always)]
fn clear_outside<T: Element>(row: &mut [T], visible: &Range<usize>) {
    row[..visible.start].fill(T::from_f32(0.0));
    row[visible.end..].fill(T::from_f32(0.0));
}

/// With `P` the softmax, `dP = dout · vᵀ` and `D = Σ dout∘out` per query:
/// `dS = P ∘ (dP − D) · scale`, `dq = dS · k`, `dk = dSᵀ · q`, `dv = Pᵀ · dout`.
pub(super) fn attention_backward(
    cpu: &Cpu,
    dout: &CpuTensor,
    input: &AttentionInput<'_, Cpu>,
    output: &AttentionOutput<Cpu>,
) -> Result<AttentionGradients<CpuTensor>> {
    let AttentionInput { q, queries, keys, shape, .. } = input;
    assert_eq!(dout.shape(), q.shape(), "attention_backward: gradient");
    let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
    let (q_rows, rows) = (queries.rows(), keys.rows());
    let hd = shape.head_dim;
    let plan = Plan { input };
    if q_rows == rows {
        let stride = q_cols + 2 * kv_cols;
        let mut dqkv = cpu.unspecified_of(rows, stride, q.dtype())?;
        let at = |column| Heads { stride, column, head_dim: hd };
        let heads = [at(0), at(q_cols), at(q_cols + kv_cols)];
        with_element!(q, T => {
            let shared = SharedSlice::new(dqkv.elements_mut::<T>());
            attend_backward::<T>(&plan, dout, output, [&shared; 3], heads);
        });
        return Ok(AttentionGradients::Fused(dqkv));
    }
    let mut dq = cpu.unspecified_of(q_rows, q_cols, q.dtype())?;
    let mut dkv = cpu.unspecified_of(rows, 2 * kv_cols, q.dtype())?;
    let at = |stride, column| Heads { stride, column, head_dim: hd };
    let heads = [at(q_cols, 0), at(2 * kv_cols, 0), at(2 * kv_cols, kv_cols)];
    with_element!(q, T => {
        let shared_dq = SharedSlice::new(dq.elements_mut::<T>());
        let shared_dkv = SharedSlice::new(dkv.elements_mut::<T>());
        attend_backward::<T>(&plan, dout, output, [&shared_dq, &shared_dkv, &shared_dkv], heads);
    });
    Ok(AttentionGradients::Separate { dq, dkv })
}

/// Writes dq, dk and dv, each into its heads of a matrix.
fn attend_backward<T: Element + Output>(
    plan: &Plan<'_>,
    dout: &CpuTensor,
    output: &AttentionOutput<Cpu>,
    [shared_dq, shared_dk, shared_dv]: [&SharedSlice<'_, T>; 3],
    [dq_heads, dk_heads, dv_heads]: [Heads; 3],
) {
    let AttentionInput { q, k, v, shape, .. } = *plan.input;
    let (heads, hd) = (shape.heads, shape.head_dim);
    let [q, k, v, out, dout] =
        [q, k, v, output.out.view(), dout.view()].map(|x| HeadsOf::<T>::new(x, hd));
    let log_sum_exp = output.state.as_slice();
    plan.tasks().for_each(|(sequence, kv_head)| {
        let key_rows = plan.key_rows(sequence);
        // Accumulated over tiles in f32.
        let mut task_dk = vec![0.0f32; key_rows.len() * hd];
        let mut task_dv = vec![0.0f32; key_rows.len() * hd];
        let [mut tile_q, mut tile_out, mut tile_dout, mut tile_dq] = [(); 4].map(|()| Vec::new());
        let (mut scores, mut dp) = (Vec::new(), Vec::new());
        let (mut p, mut ds, mut lse) = (Vec::new(), Vec::new(), Vec::new());
        for tile in plan.tiles(sequence) {
            let (m, n) = (plan.group() * tile.queries.len(), tile.keys.len());
            plan.stack(&tile, kv_head, q, &mut tile_q);
            plan.stack(&tile, kv_head, out, &mut tile_out);
            plan.stack(&tile, kv_head, dout, &mut tile_dout);
            lse.clear();
            for head in plan.query_heads(kv_head) {
                lse.extend(tile.queries.clone().map(|row| log_sum_exp[row * heads + head]));
            }
            let keys = k.rows(&tile.keys, kv_head);
            let values = v.rows(&tile.keys, kv_head);
            multiply::<T, f32>(&mut scores, (m, n), matrix(&tile_q, hd), keys.t());
            multiply::<T, f32>(&mut dp, (m, n), matrix(&tile_dout, hd), values.t());
            p.resize(m * n, T::from_f32(0.0));
            ds.resize(m * n, T::from_f32(0.0));
            let saved = SavedSoftmax {
                scale: shape.scale,
                log_sum_exp: &lse,
                out: &tile_out,
                dout: &tile_dout,
                visible: &tile.visible,
            };
            softmax_backward((&mut p, &mut ds), (&mut scores, &dp), &saved);
            multiply::<T, T>(&mut tile_dq, (m, hd), matrix(&ds, n), keys);
            // SAFETY: only this task accesses the rows of its sequence in its heads.
            unsafe { plan.unstack(&tile, kv_head, &tile_dq, (shared_dq, dq_heads)) };
            let at = (tile.keys.start - key_rows.start) * hd;
            for (weights, rows, grad) in
                [(&ds, &tile_q, &mut task_dk), (&p, &tile_dout, &mut task_dv)]
            {
                let out = gemm::ViewMut::new(&mut grad[at..], n, hd);
                let product = Gemm::new(T::PRECISION).serial().accumulate();
                product.multiply(out, matrix(weights, n).t(), matrix(rows, hd));
            }
        }
        for (grad, shared, heads) in
            [(&task_dk, shared_dk, dk_heads), (&task_dv, shared_dv, dv_heads)]
        {
            for (row, from) in key_rows.clone().zip(grad.chunks_exact(hd)) {
                // SAFETY: only this task accesses the keys of its sequence in its head.
                let to = unsafe { shared.slice_mut(heads.span(row, kv_head).start, hd) };
                to.iter_mut().zip(from).for_each(|(to, from)| *to = T::from_f32(*from));
            }
        }
    });
}

/// The results of the forward pass for the stacked queries of a tile.
struct SavedSoftmax<'a, T> {
    scale: f32,
    log_sum_exp: &'a [f32],
    /// `[group · queries, hd]`
    out: &'a [T],
    dout: &'a [T],
    visible: &'a [Range<usize>],
}

vectorised! {
    /// Probabilities p and `dS` from raw scores and `dP`; zero where not visible. Overwrites the scores.
    fn softmax_backward<T: Element>(
        results: (&mut [T], &mut [T]),
        inputs: (&mut [f32], &[f32]),
        saved: &SavedSoftmax<'_, T>,
    ) {
        let ((p, ds), (scores, dp)) = (results, inputs);
        let m = saved.log_sum_exp.len();
        let (n, hd) = (scores.len() / m, saved.out.len() / m);
        let results = p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n));
        let inputs = scores.chunks_exact_mut(n).zip(dp.chunks_exact(n));
        for (row, ((p, ds), (scores, dp))) in results.zip(inputs).enumerate() {
            let of_row = row * hd..(row + 1) * hd;
            let delta = dot(&saved.dout[of_row.clone()], &saved.out[of_row]);
            let visible = saved.visible[row % saved.visible.len()].clone();
            clear_outside(p, &visible);
            clear_outside(ds, &visible);
            let (scores, dp) = (&mut scores[visible.clone()], &dp[visible.clone()]);
            exp_scaled_sum(scores, saved.scale, saved.log_sum_exp[row]);
            let results = p[visible.clone()].iter_mut().zip(&mut ds[visible]);
            for ((p, ds), (e, dp)) in results.zip(scores.iter().zip(dp)) {
                *p = T::from_f32(*e);
                *ds = T::from_f32(*e * (dp - delta) * saved.scale);
            }
        }
    }
}
