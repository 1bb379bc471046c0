//! Causal attention over packed sequences, in tiles of queries.
//!
//! A task is one sequence and one key head with the query heads that share it, so no two tasks write
//! the same element and nothing depends on what else is in the batch. Within a task a tile of
//! queries meets only the keys it can see; the scores of one tile are all that is ever held. The
//! backward pass computes them again from the saved log-sum-exp (Dao et al. 2022, section 3.1).

use std::ops::Range;

use rayon::prelude::*;

use super::element::{Element, with_element};
use super::gemm::{Gemm, Operand, Output, View, ViewMut};
use super::shared::SharedSlice;
use super::vector::{dot, exp_scaled_sum, max, vectorised};
use super::{Cpu, CpuTensor};
use crate::Result;
use crate::backend::{AttentionOutput, AttentionShape, Layout, Shape};

/// Rows of a tile, over all heads that share keys: enough to make a product worth its packing, few
/// enough that little is computed which no query sees. A multiple of a kernel's six rows.
pub(in crate::backend) const TILE_ROWS: usize = 72;

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
        let at_once = (TILE_ROWS / self.group()).max(1);
        (start..end).step_by(at_once).map(move |first| {
            let queries = first..(first + at_once).min(end);
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

    /// The tile's rows of a query-side matrix, head under head: `[group · queries, hd]`. What shares keys
    /// then takes one product, and a larger one.
    fn stack<T: Element>(&self, tile: &Tile, kv_head: usize, x: &[T], stacked: &mut Vec<T>) {
        stacked.clear();
        for head in self.query_heads(kv_head) {
            for row in tile.queries.clone() {
                stacked.extend_from_slice(&x[self.span(row, head)]);
            }
        }
    }

    /// The opposite of [`stack`](Self::stack).
    ///
    /// # Safety
    /// Nobody else may have these rows of these heads.
    unsafe fn unstack<T: Element>(
        &self,
        tile: &Tile,
        kv_head: usize,
        stacked: &[T],
        x: &SharedSlice<'_, T>,
    ) {
        let mut rows = stacked.chunks_exact(self.shape.head_dim);
        for head in self.query_heads(kv_head) {
            for (row, from) in tile.queries.clone().zip(&mut rows) {
                let span = self.span(row, head);
                // SAFETY: the caller's promise.
                unsafe { x.slice_mut(span.start, span.len()) }.copy_from_slice(from);
            }
        }
    }

    fn query_heads(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.group()..(kv_head + 1) * self.group()
    }

    /// The elements of one row and head of a query-side matrix.
    fn span(&self, row: usize, head: usize) -> Range<usize> {
        let start = row * self.q_cols() + head * self.shape.head_dim;
        start..start + self.shape.head_dim
    }

    /// One head of the tile's rows of a key-side matrix. `[keys, hd]`
    fn keys_of<'x, T: Output>(&self, tile: &Tile, kv_head: usize, x: &'x [T]) -> Operand<'x> {
        let (hd, stride) = (self.shape.head_dim, self.kv_cols());
        let x = &x[tile.keys.start * stride + kv_head * hd..];
        T::operand(View::strided(x, (tile.keys.len(), hd), stride))
    }
}

/// `out = a · b` within a task, which has one thread.
fn multiply<T: Output, O: Element + Output>(
    out: &mut Vec<O>,
    (m, n): (usize, usize),
    a: Operand<'_>,
    b: Operand<'_>,
) {
    out.resize(m * n, O::rounded(0.0));
    Gemm::new(T::PRECISION).serial().multiply(ViewMut::new(out, m, n), a, b);
}

/// All of a buffer as a row-major operand.
fn matrix<T: Output>(x: &[T], cols: usize) -> Operand<'_> {
    T::operand(View::new(x, x.len() / cols.max(1), cols))
}

pub(super) fn attention(
    cpu: &Cpu,
    (q, k, v): (&CpuTensor, &CpuTensor, &CpuTensor),
    queries: &Layout<Cpu>,
    keys: &Layout<Cpu>,
    shape: &AttentionShape,
) -> Result<AttentionOutput<Cpu>> {
    let plan = Plan { queries, keys, shape };
    assert_eq!(q.shape(), (queries.rows, plan.q_cols()), "attention: queries");
    assert_eq!(k.shape(), (keys.rows, plan.kv_cols()), "attention: keys");
    assert_eq!(v.shape(), k.shape(), "attention: values");
    let mut out = cpu.unspecified_of(queries.rows, plan.q_cols(), q.dtype())?;
    let mut log_sum_exp = cpu.unspecified(queries.rows, shape.heads)?;
    with_element!(q, T => attend::<T>(
        &plan,
        (q.elements(), k.elements(), v.elements()),
        out.elements_mut(),
        log_sum_exp.as_mut_slice(),
    ));
    Ok(AttentionOutput { out, log_sum_exp })
}

fn attend<T: Element + Output>(
    plan: &Plan<'_>,
    (q, k, v): (&[T], &[T], &[T]),
    out: &mut [T],
    log_sum_exp: &mut [f32],
) {
    let (heads, hd) = (plan.shape.heads, plan.shape.head_dim);
    let (shared_out, shared_lse) = (SharedSlice::new(out), SharedSlice::new(log_sum_exp));
    plan.tasks().for_each(|(sequence, kv_head)| {
        let (mut tile_q, mut tile_out, mut p) = (Vec::new(), Vec::new(), Vec::new());
        let (mut scores, mut lse) = (Vec::new(), Vec::new());
        for tile in plan.tiles(sequence) {
            let (m, n) = (plan.group() * tile.queries.len(), tile.keys.len());
            plan.stack(&tile, kv_head, q, &mut tile_q);
            let keys = plan.keys_of(&tile, kv_head, k);
            multiply::<T, f32>(&mut scores, (m, n), matrix(&tile_q, hd), keys.t());
            p.resize(m * n, T::rounded(0.0));
            lse.resize(m, 0.0);
            softmax(&mut p, &mut lse, &mut scores, &tile.visible, plan.shape.scale);
            let values = plan.keys_of(&tile, kv_head, v);
            multiply::<T, T>(&mut tile_out, (m, hd), matrix(&p, n), values);
            // SAFETY: this task alone has the rows of its sequence in its heads.
            unsafe { plan.unstack(&tile, kv_head, &tile_out, &shared_out) };
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
    /// Softmax of each row's visible scores, which are used up, and zero elsewhere; and their
    /// log-sum-exp.
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
    attended: &AttentionOutput<Cpu>,
    queries: &Layout<Cpu>,
    keys: &Layout<Cpu>,
    shape: &AttentionShape,
) -> Result<(CpuTensor, CpuTensor, CpuTensor)> {
    let plan = Plan { queries, keys, shape };
    assert_eq!(dout.shape(), (queries.rows, plan.q_cols()), "attention_backward: gradient");
    let mut dq = cpu.unspecified_of(queries.rows, plan.q_cols(), q.dtype())?;
    let mut dk = cpu.unspecified_of(keys.rows, plan.kv_cols(), k.dtype())?;
    let mut dv = cpu.unspecified_of(keys.rows, plan.kv_cols(), v.dtype())?;
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
    Ok((dq, dk, dv))
}

/// What went in, what came out, and the gradient of that.
struct Forward<'a, T> {
    inputs: (&'a [T], &'a [T], &'a [T]),
    out: &'a [T],
    log_sum_exp: &'a [f32],
    dout: &'a [T],
}

fn attend_backward<T: Element + Output>(
    plan: &Plan<'_>,
    forward: &Forward<'_, T>,
    (dq, dk, dv): (&mut [T], &mut [T], &mut [T]),
) {
    let &Forward { inputs: (q, k, v), out, log_sum_exp, dout } = forward;
    let (heads, hd, kv_cols) = (plan.shape.heads, plan.shape.head_dim, plan.kv_cols());
    let [shared_dq, shared_dk, shared_dv] = [dq, dk, dv].map(SharedSlice::new);
    plan.tasks().for_each(|(sequence, kv_head)| {
        let key_rows = plan.key_rows(sequence);
        // Summed over tiles in f32.
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
            let keys = plan.keys_of(&tile, kv_head, k);
            let values = plan.keys_of(&tile, kv_head, v);
            multiply::<T, f32>(&mut scores, (m, n), matrix(&tile_q, hd), keys.t());
            multiply::<T, f32>(&mut dp, (m, n), matrix(&tile_dout, hd), values.t());
            p.resize(m * n, T::rounded(0.0));
            ds.resize(m * n, T::rounded(0.0));
            let saved = SavedSoftmax {
                scale: plan.shape.scale,
                log_sum_exp: &lse,
                out: &tile_out,
                dout: &tile_dout,
                visible: &tile.visible,
            };
            softmax_backward((&mut p, &mut ds), (&mut scores, &dp), &saved);
            multiply::<T, T>(&mut tile_dq, (m, hd), matrix(&ds, n), keys);
            // SAFETY: this task alone has the rows of its sequence in its heads.
            unsafe { plan.unstack(&tile, kv_head, &tile_dq, &shared_dq) };
            let at = (tile.keys.start - key_rows.start) * hd;
            for (weights, rows, grad) in
                [(&ds, &tile_q, &mut task_dk), (&p, &tile_dout, &mut task_dv)]
            {
                let out = ViewMut::new(&mut grad[at..], n, hd);
                let product = Gemm::new(T::PRECISION).serial().accumulate();
                product.multiply(out, matrix(weights, n).t(), matrix(rows, hd));
            }
        }
        for (grad, shared) in [(&task_dk, &shared_dk), (&task_dv, &shared_dv)] {
            for (row, from) in key_rows.clone().zip(grad.chunks_exact(hd)) {
                // SAFETY: this task alone has the keys of its sequence in its head.
                let to = unsafe { shared.slice_mut(row * kv_cols + kv_head * hd, hd) };
                to.iter_mut().zip(from).for_each(|(to, from)| *to = T::rounded(*from));
            }
        }
    });
}

/// What the softmax of a tile's stacked queries was.
struct SavedSoftmax<'a, T> {
    scale: f32,
    log_sum_exp: &'a [f32],
    /// `[group · queries, hd]`
    out: &'a [T],
    dout: &'a [T],
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
                *p = T::rounded(*e);
                *ds = T::rounded(*e * (dp - delta) * saved.scale);
            }
        }
    }
}
