//! Causal attention over packed sequences, in tiles of queries.
//!
//! A task is one sequence and one key head with the query heads that share it, so no two tasks write
//! the same element and nothing depends on what else is in the batch. Within a task a tile of
//! queries meets only the keys it can see; the scores of one tile are all that is ever held. The
//! backward pass computes them again from the saved log-sum-exp (Dao et al. 2022, section 3.1).

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Gemm, Precision, View, ViewMut};
use super::shared::SharedSlice;
use super::vector::{dot, exp_scaled_sum, max, vectorised};
use super::{Cpu, CpuTensor};
use crate::backend::{Attended, AttentionShape, Layout, Shape};

/// Queries whose scores are held at once.
const QUERY_TILE: usize = 64;

/// A tile of queries of one sequence and the keys that any of them sees.
struct Tile {
    /// Rows of q, global.
    queries: Range<usize>,
    /// Rows of k and v, global.
    keys: Range<usize>,
    /// For each query, the columns of the tile that it sees.
    visible: Vec<Range<usize>>,
}

/// What the tasks of one call have in common.
struct Plan<'a> {
    queries: &'a Layout<Cpu>,
    keys: &'a Layout<Cpu>,
    shape: &'a AttentionShape,
}

impl Plan<'_> {
    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn q_cols(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    fn kv_cols(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    /// Every (sequence, key head), each exactly once.
    fn tasks(&self) -> impl IndexedParallelIterator<Item = (usize, usize)> {
        let kv_heads = self.shape.kv_heads;
        (0..self.queries.sequences * kv_heads)
            .into_par_iter()
            .map(move |task| (task / kv_heads, task % kv_heads))
    }

    fn key_rows(&self, sequence: usize) -> Range<usize> {
        let offsets = &self.keys.offsets;
        offsets[sequence] as usize..offsets[sequence + 1] as usize
    }

    fn tiles(&self, sequence: usize) -> impl Iterator<Item = Tile> {
        let offsets = &self.queries.offsets;
        let (start, end) = (offsets[sequence] as usize, offsets[sequence + 1] as usize);
        let first_key = self.key_rows(sequence).start;
        (start..end).step_by(QUERY_TILE).map(move |first| {
            let queries = first..(first + QUERY_TILE).min(end);
            let positions = &self.queries.positions[queries.clone()];
            let lowest = |position: u32| match self.shape.window {
                Some(window) => (position as usize + 1).saturating_sub(window),
                None => 0,
            };
            let from = lowest(positions[0]);
            let to = positions[positions.len() - 1] as usize + 1;
            Tile {
                queries,
                keys: first_key + from..first_key + to,
                visible: positions
                    .iter()
                    .map(|&p| lowest(p) - from..p as usize + 1 - from)
                    .collect(),
            }
        })
    }

    /// `a · bᵀ` for the tile's rows of a query-side matrix a and a key-side matrix b, each with its
    /// head's first column: raw scores from q and k, `dP` from dout and v. `[queries, keys]`
    fn products(
        &self,
        tile: &Tile,
        (a, a_at): (&CpuTensor, usize),
        (b, b_at): (&CpuTensor, usize),
        out: &mut Vec<f32>,
    ) {
        let (m, n) = (tile.queries.len(), tile.keys.len());
        out.resize(m * n, 0.0);
        let a = &a.as_slice()[tile.queries.start * self.q_cols() + a_at..];
        let b = &b.as_slice()[tile.keys.start * self.kv_cols() + b_at..];
        let head = self.shape.head_dim;
        let a = View::strided(a, (m, head), self.q_cols());
        let b = View::strided(b, (n, head), self.kv_cols());
        product().multiply(ViewMut::new(out, m, n), a, b.t());
    }
}

pub(super) fn attention(
    cpu: &Cpu,
    (q, k, v): (&CpuTensor, &CpuTensor, &CpuTensor),
    queries: &Layout<Cpu>,
    keys: &Layout<Cpu>,
    shape: &AttentionShape,
) -> Attended<Cpu> {
    let plan = Plan { queries, keys, shape };
    assert_eq!(q.shape(), (queries.rows, plan.q_cols()), "attention: queries");
    assert_eq!(k.shape(), (keys.rows, plan.kv_cols()), "attention: keys");
    assert_eq!(v.shape(), k.shape(), "attention: values");
    let mut out = cpu.unspecified(queries.rows, plan.q_cols());
    let mut log_sum_exp = cpu.unspecified(queries.rows, shape.heads);
    let shared_out = SharedSlice::new(out.as_mut_slice());
    let shared_lse = SharedSlice::new(log_sum_exp.as_mut_slice());
    plan.tasks().for_each(|(sequence, kv_head)| {
        let hd = shape.head_dim;
        let kv_at = kv_head * hd;
        let mut p = Vec::new();
        let mut tile_out = Vec::new();
        for tile in plan.tiles(sequence) {
            let (m, n) = (tile.queries.len(), tile.keys.len());
            for head in kv_head * plan.group()..(kv_head + 1) * plan.group() {
                plan.products(&tile, (q, head * hd), (k, kv_at), &mut p);
                for (row, visible) in tile.visible.iter().enumerate() {
                    let p = &mut p[row * n..(row + 1) * n];
                    let lse = vectorised(|| softmax(p, visible.clone(), shape.scale));
                    let at = (tile.queries.start + row) * shape.heads + head;
                    // SAFETY: this task alone writes the rows of its sequence in its heads.
                    unsafe { shared_lse.slice_mut(at, 1)[0] = lse };
                }
                tile_out.resize(m * hd, 0.0);
                let values = &v.as_slice()[tile.keys.start * plan.kv_cols() + kv_at..];
                let values = View::strided(values, (n, hd), plan.kv_cols());
                let out = ViewMut::new(&mut tile_out, m, hd);
                product().multiply(out, View::new(&p, m, n), values);
                for (row, from) in tile_out.chunks_exact(hd).enumerate() {
                    let at = (tile.queries.start + row) * plan.q_cols() + head * hd;
                    // SAFETY: as above.
                    unsafe { shared_out.slice_mut(at, hd) }.copy_from_slice(from);
                }
            }
        }
    });
    Attended { out, log_sum_exp }
}

/// A product within a task, which has one thread.
fn product<'a>() -> Gemm<'a, f32> {
    Gemm::new(Precision::F32).serial()
}

/// Softmax of the visible scores in place, zero elsewhere; returns their log-sum-exp.
#[inline(always)]
fn softmax(scores: &mut [f32], visible: Range<usize>, scale: f32) -> f32 {
    scores[..visible.start].fill(0.0);
    scores[visible.end..].fill(0.0);
    let scores = &mut scores[visible];
    let largest = max(scores) * scale;
    let sum = exp_scaled_sum(scores, scale, largest);
    let share = 1.0 / sum;
    scores.iter_mut().for_each(|p| *p *= share);
    largest + sum.ln()
}

/// With `P` the softmax, `dP = dout · vᵀ` and `D = Σ dout∘out` per query:
/// `dS = P ∘ (dP − D) · scale`, `dq = dS · k`, `dk = dSᵀ · q`, `dv = Pᵀ · dout`.
pub(super) fn attention_backward(
    cpu: &Cpu,
    dout: &CpuTensor,
    (q, k, v): (&CpuTensor, &CpuTensor, &CpuTensor),
    attended: &Attended<Cpu>,
    queries: &Layout<Cpu>,
    keys: &Layout<Cpu>,
    shape: &AttentionShape,
) -> (CpuTensor, CpuTensor, CpuTensor) {
    let plan = Plan { queries, keys, shape };
    let (q_cols, kv_cols) = (plan.q_cols(), plan.kv_cols());
    assert_eq!(dout.shape(), (queries.rows, q_cols), "attention_backward: gradient");
    let mut dq = cpu.unspecified(queries.rows, q_cols);
    let mut dk = cpu.unspecified(keys.rows, kv_cols);
    let mut dv = cpu.unspecified(keys.rows, kv_cols);
    let shared_dq = SharedSlice::new(dq.as_mut_slice());
    let shared_dk = SharedSlice::new(dk.as_mut_slice());
    let shared_dv = SharedSlice::new(dv.as_mut_slice());
    plan.tasks().for_each(|(sequence, kv_head)| {
        let hd = shape.head_dim;
        let kv_at = kv_head * hd;
        let key_rows = plan.key_rows(sequence);
        let mut task_dk = vec![0.0; key_rows.len() * hd];
        let mut task_dv = vec![0.0; key_rows.len() * hd];
        let (mut p, mut ds, mut tile_dq) = (Vec::new(), Vec::new(), Vec::new());
        for tile in plan.tiles(sequence) {
            let (m, n) = (tile.queries.len(), tile.keys.len());
            let local_keys = (tile.keys.start - key_rows.start) * hd;
            for head in kv_head * plan.group()..(kv_head + 1) * plan.group() {
                let q_at = head * hd;
                plan.products(&tile, (q, q_at), (k, kv_at), &mut p);
                plan.products(&tile, (dout, q_at), (v, kv_at), &mut ds);
                for (row, visible) in tile.visible.iter().enumerate() {
                    let at = tile.queries.start + row;
                    let lse = attended.log_sum_exp.as_slice()[at * shape.heads + head];
                    let span = at * q_cols + q_at..at * q_cols + q_at + hd;
                    let delta = vectorised(|| {
                        dot(&dout.as_slice()[span.clone()], &attended.out.as_slice()[span])
                    });
                    let p = &mut p[row * n..(row + 1) * n];
                    let ds = &mut ds[row * n..(row + 1) * n];
                    vectorised(|| {
                        softmax_backward(p, ds, visible.clone(), (shape.scale, lse, delta));
                    });
                }
                tile_dq.resize(m * hd, 0.0);
                let k_rows = &k.as_slice()[tile.keys.start * kv_cols + kv_at..];
                let k_rows = View::strided(k_rows, (n, hd), kv_cols);
                let out = ViewMut::new(&mut tile_dq, m, hd);
                product().multiply(out, View::new(&ds, m, n), k_rows);
                for (row, from) in tile_dq.chunks_exact(hd).enumerate() {
                    let at = (tile.queries.start + row) * q_cols + q_at;
                    // SAFETY: this task alone writes the rows of its sequence in its heads.
                    unsafe { shared_dq.slice_mut(at, hd) }.copy_from_slice(from);
                }
                let first = tile.queries.start * q_cols + q_at;
                for (weights, rows, grad) in [(&ds, q, &mut task_dk), (&p, dout, &mut task_dv)] {
                    let rows = View::strided(&rows.as_slice()[first..], (m, hd), q_cols);
                    let out = ViewMut::new(&mut grad[local_keys..], n, hd);
                    product().accumulate().multiply(out, View::new(weights, m, n).t(), rows);
                }
            }
        }
        for (grad, shared) in [(&task_dk, &shared_dk), (&task_dv, &shared_dv)] {
            for (row, from) in key_rows.clone().zip(grad.chunks_exact(hd)) {
                // SAFETY: as above.
                unsafe { shared.slice_mut(row * kv_cols + kv_at, hd) }.copy_from_slice(from);
            }
        }
    });
    (dq, dk, dv)
}

/// Turns raw scores into probabilities `p`, and `dP` in `ds` into `dS`; both zero where not visible.
#[inline(always)]
fn softmax_backward(
    p: &mut [f32],
    ds: &mut [f32],
    visible: Range<usize>,
    (scale, log_sum_exp, delta): (f32, f32, f32),
) {
    for x in [&mut *p, &mut *ds] {
        x[..visible.start].fill(0.0);
        x[visible.end..].fill(0.0);
    }
    let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
    exp_scaled_sum(p, scale, log_sum_exp);
    ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = *p * (*ds - delta) * scale);
}
