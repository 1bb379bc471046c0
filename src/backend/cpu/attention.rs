//! Causal attention over packed sequences, in tiles of queries.
//!
//! A task is one sequence and one key head with the query heads that share it, so no two tasks write
//! the same element and nothing depends on what else is in the batch. Within a task a tile of
//! queries meets only the keys it can see; the scores of one tile are all that is ever held. The
//! backward pass computes them again from the saved log-sum-exp (Dao et al. 2022, section 3.1).

use std::ops::Range;

use rayon::prelude::*;

use super::element::{Element, with_element};
use super::gemm::{Gemm, Operand, View, ViewMut};
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
    /// head's first column: raw scores from q and k, `dP` from dout and v. `[queries, keys]`, f32
    fn products<T: Element>(
        &self,
        tile: &Tile,
        (a, a_at): (&[T], usize),
        (b, b_at): (&[T], usize),
        out: &mut Vec<f32>,
    ) {
        let (m, n) = (tile.queries.len(), tile.keys.len());
        out.resize(m * n, 0.0);
        let a = self.query_rows(tile, a, a_at);
        let b = self.key_rows_of(tile, b, b_at);
        Gemm::new(T::PRECISION).serial().multiply(ViewMut::new(out, m, n), a, b.t());
    }

    /// One head of the tile's rows of a query-side matrix. `[queries, hd]`
    fn query_rows<'x, T: Element>(&self, tile: &Tile, x: &'x [T], at: usize) -> Operand<'x> {
        let (stride, shape) = (self.q_cols(), (tile.queries.len(), self.shape.head_dim));
        T::operand(View::strided(&x[tile.queries.start * stride + at..], shape, stride))
    }

    /// One head of the tile's rows of a key-side matrix. `[keys, hd]`
    fn key_rows_of<'x, T: Element>(&self, tile: &Tile, x: &'x [T], at: usize) -> Operand<'x> {
        let (stride, shape) = (self.kv_cols(), (tile.keys.len(), self.shape.head_dim));
        T::operand(View::strided(&x[tile.keys.start * stride + at..], shape, stride))
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
    let mut out = cpu.unspecified_of(queries.rows, plan.q_cols(), q.dtype());
    let mut log_sum_exp = cpu.unspecified(queries.rows, shape.heads);
    with_element!(q, T => attend::<T>(
        &plan,
        (q.elements(), k.elements(), v.elements()),
        out.elements_mut(),
        log_sum_exp.as_mut_slice(),
    ));
    Attended { out, log_sum_exp }
}

fn attend<T: Element>(
    plan: &Plan<'_>,
    (q, k, v): (&[T], &[T], &[T]),
    out: &mut [T],
    log_sum_exp: &mut [f32],
) {
    let (heads, hd, q_cols) = (plan.shape.heads, plan.shape.head_dim, plan.q_cols());
    let (shared_out, shared_lse) = (SharedSlice::new(out), SharedSlice::new(log_sum_exp));
    plan.tasks().for_each(|(sequence, kv_head)| {
        let kv_at = kv_head * hd;
        let (mut scores, mut lse) = (Vec::new(), Vec::new());
        let (mut p, mut tile_out) = (Vec::new(), Vec::new());
        for tile in plan.tiles(sequence) {
            let (m, n) = (tile.queries.len(), tile.keys.len());
            for head in kv_head * plan.group()..(kv_head + 1) * plan.group() {
                plan.products(&tile, (q, head * hd), (k, kv_at), &mut scores);
                p.resize(m * n, T::rounded(0.0));
                lse.resize(m, 0.0);
                softmax(&mut p, &mut lse, &mut scores, &tile.visible, plan.shape.scale);
                for (row, &lse) in lse.iter().enumerate() {
                    let at = (tile.queries.start + row) * heads + head;
                    // SAFETY: this task alone writes the rows of its sequence in its heads.
                    unsafe { shared_lse.slice_mut(at, 1)[0] = lse };
                }
                tile_out.resize(m * hd, T::rounded(0.0));
                Gemm::new(T::PRECISION).serial().multiply(
                    ViewMut::new(&mut tile_out, m, hd),
                    T::operand(View::new(&p, m, n)),
                    plan.key_rows_of(&tile, v, kv_at),
                );
                for (row, from) in tile_out.chunks_exact(hd).enumerate() {
                    let at = (tile.queries.start + row) * q_cols + head * hd;
                    // SAFETY: as above.
                    unsafe { shared_out.slice_mut(at, hd) }.copy_from_slice(from);
                }
            }
        }
    });
}

vectorised! {
    /// Softmax of each row's visible scores, which are used up, and zero elsewhere; and their
    /// log-sum-exp.
    fn softmax<T: Element>(
        p: &mut [T],
        log_sum_exp: &mut [f32],
        scores: &mut [f32],
        visible: &[Range<usize>],
        scale: f32,
    ) {
        let n = scores.len() / visible.len();
        let rows = p.chunks_exact_mut(n).zip(scores.chunks_exact_mut(n));
        for ((p, scores), (lse, visible)) in rows.zip(log_sum_exp.iter_mut().zip(visible)) {
            clear_outside(p, visible);
            let scores = &mut scores[visible.clone()];
            let largest = max(scores) * scale;
            let sum = exp_scaled_sum(scores, scale, largest);
            let share = 1.0 / sum;
            let p = p[visible.clone()].iter_mut();
            p.zip(scores).for_each(|(p, e)| *p = T::rounded(*e * share));
            *lse = largest + sum.ln();
        }
    }
}

#[inline(always)]
fn clear_outside<T: Element>(row: &mut [T], visible: &Range<usize>) {
    row[..visible.start].fill(T::rounded(0.0));
    row[visible.end..].fill(T::rounded(0.0));
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
    assert_eq!(dout.shape(), (queries.rows, plan.q_cols()), "attention_backward: gradient");
    let mut dq = cpu.unspecified_of(queries.rows, plan.q_cols(), q.dtype());
    let [mut dk, mut dv] = [k, v].map(|x| cpu.unspecified_of(keys.rows, plan.kv_cols(), x.dtype()));
    with_element!(q, T => attend_backward::<T>(
        &plan,
        &Forward {
            inputs: (q.elements(), k.elements(), v.elements()),
            out: attended.out.elements(),
            log_sum_exp: attended.log_sum_exp.as_slice(),
            dout: dout.elements(),
        },
        (dq.elements_mut(), dk.elements_mut(), dv.elements_mut()),
    ));
    (dq, dk, dv)
}

/// What went in, what came out, and the gradient of that.
struct Forward<'a, T> {
    inputs: (&'a [T], &'a [T], &'a [T]),
    out: &'a [T],
    log_sum_exp: &'a [f32],
    dout: &'a [T],
}

fn attend_backward<T: Element>(
    plan: &Plan<'_>,
    forward: &Forward<'_, T>,
    (dq, dk, dv): (&mut [T], &mut [T], &mut [T]),
) {
    let &Forward { inputs: (q, k, v), out, log_sum_exp, dout } = forward;
    let (heads, hd) = (plan.shape.heads, plan.shape.head_dim);
    let (q_cols, kv_cols) = (plan.q_cols(), plan.kv_cols());
    let [shared_dq, shared_dk, shared_dv] = [dq, dk, dv].map(SharedSlice::new);
    plan.tasks().for_each(|(sequence, kv_head)| {
        let kv_at = kv_head * hd;
        let key_rows = plan.key_rows(sequence);
        // Summed over tiles and heads in f32.
        let mut task_dk = vec![0.0f32; key_rows.len() * hd];
        let mut task_dv = vec![0.0f32; key_rows.len() * hd];
        let (mut scores, mut dp) = (Vec::new(), Vec::new());
        let (mut p, mut ds, mut tile_dq) = (Vec::new(), Vec::new(), Vec::new());
        for tile in plan.tiles(sequence) {
            let (m, n) = (tile.queries.len(), tile.keys.len());
            let local_keys = (tile.keys.start - key_rows.start) * hd;
            for head in kv_head * plan.group()..(kv_head + 1) * plan.group() {
                let q_at = head * hd;
                plan.products(&tile, (q, q_at), (k, kv_at), &mut scores);
                plan.products(&tile, (dout, q_at), (v, kv_at), &mut dp);
                p.resize(m * n, T::rounded(0.0));
                ds.resize(m * n, T::rounded(0.0));
                let softmax = SavedSoftmax {
                    scale: plan.shape.scale,
                    log_sum_exp: (&log_sum_exp[tile.queries.start * heads + head..], heads),
                    out: (&out[tile.queries.start * q_cols + q_at..], q_cols),
                    dout: (&dout[tile.queries.start * q_cols + q_at..], q_cols),
                    head_dim: hd,
                    visible: &tile.visible,
                };
                softmax_backward((&mut p, &mut ds), (&mut scores, &dp), &softmax);
                tile_dq.resize(m * hd, T::rounded(0.0));
                Gemm::new(T::PRECISION).serial().multiply(
                    ViewMut::new(&mut tile_dq, m, hd),
                    T::operand(View::new(&ds, m, n)),
                    plan.key_rows_of(&tile, k, kv_at),
                );
                for (row, from) in tile_dq.chunks_exact(hd).enumerate() {
                    let at = (tile.queries.start + row) * q_cols + q_at;
                    // SAFETY: this task alone writes the rows of its sequence in its heads.
                    unsafe { shared_dq.slice_mut(at, hd) }.copy_from_slice(from);
                }
                for (weights, rows, grad) in [(&ds, q, &mut task_dk), (&p, dout, &mut task_dv)] {
                    Gemm::new(T::PRECISION).serial().accumulate().multiply(
                        ViewMut::new(&mut grad[local_keys..], n, hd),
                        T::operand(View::new(weights, m, n).t()),
                        plan.query_rows(&tile, rows, q_at),
                    );
                }
            }
        }
        for (grad, shared) in [(&task_dk, &shared_dk), (&task_dv, &shared_dv)] {
            for (row, from) in key_rows.clone().zip(grad.chunks_exact(hd)) {
                // SAFETY: as above.
                let to = unsafe { shared.slice_mut(row * kv_cols + kv_at, hd) };
                to.iter_mut().zip(from).for_each(|(to, from)| *to = T::rounded(*from));
            }
        }
    });
}

/// What the softmax of a tile's queries was, in one head. Rows are strided: each with its stride.
struct SavedSoftmax<'a, T> {
    scale: f32,
    log_sum_exp: (&'a [f32], usize),
    out: (&'a [T], usize),
    dout: (&'a [T], usize),
    head_dim: usize,
    visible: &'a [Range<usize>],
}

vectorised! {
    /// From raw scores, which are used up, and `dP`: probabilities p and `dS`, zero where not visible.
    fn softmax_backward<T: Element>(
        results: (&mut [T], &mut [T]),
        inputs: (&mut [f32], &[f32]),
        saved: &SavedSoftmax<'_, T>,
    ) {
        let ((p, ds), (scores, dp)) = (results, inputs);
        let n = scores.len() / saved.visible.len();
        let results = p.chunks_exact_mut(n).zip(ds.chunks_exact_mut(n));
        let inputs = scores.chunks_exact_mut(n).zip(dp.chunks_exact(n));
        for (row, ((p, ds), (scores, dp))) in results.zip(inputs).enumerate() {
            let of_row = |(_, stride): (&[T], usize)| row * stride..row * stride + saved.head_dim;
            let delta = dot(&saved.dout.0[of_row(saved.dout)], &saved.out.0[of_row(saved.out)]);
            let log_sum_exp = saved.log_sum_exp.0[row * saved.log_sum_exp.1];
            let visible = saved.visible[row].clone();
            clear_outside(p, &visible);
            clear_outside(ds, &visible);
            let (scores, dp) = (&mut scores[visible.clone()], &dp[visible.clone()]);
            exp_scaled_sum(scores, saved.scale, log_sum_exp);
            let results = p[visible.clone()].iter_mut().zip(&mut ds[visible]);
            for ((p, ds), (e, dp)) in results.zip(scores.iter().zip(dp)) {
                *p = T::rounded(*e);
                *ds = T::rounded(*e * (dp - delta) * saved.scale);
            }
        }
    }
}
