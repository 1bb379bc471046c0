//! RMS norm and L2 normalisation, each with its backward.

use rayon::prelude::*;

use super::element::{Element, with_element};
use super::vector::{dot, rows_per_task, sum_pairs, vectorised};
use super::{Cpu, CpuTensor};
use crate::Result;
use crate::backend::{Dtype, Shape};

/// Smallest norm that [`normalize`] divides by.
const NORM_FLOOR: f32 = 1e-12;

/// Groups of `w.cols()` columns are contiguous, so the matrix is walked as `[n · cols / g, g]`.
pub(super) fn rms_norm(
    cpu: &Cpu,
    x: &CpuTensor,
    w: &CpuTensor,
    eps: f32,
    to: Dtype,
) -> Result<(CpuTensor, CpuTensor)> {
    let (rows, cols) = x.shape();
    let group = w.cols();
    assert_eq!(cols % group, 0, "rms_norm: groups");
    let mut y = cpu.unspecified_of(rows, cols, to)?;
    let mut inv_rms = cpu.unspecified(rows, cols / group)?;
    let task = rows_per_task(group);
    with_element!(x, X => with_element!(y, Y => {
        y.elements_mut::<Y>()
            .par_chunks_mut(task * group)
            .zip(x.elements::<X>().par_chunks(task * group))
            .zip(inv_rms.as_mut_slice().par_chunks_mut(task))
            .for_each(|((y, x), inv_rms)| norm_rows(y, x, w.as_slice(), inv_rms, eps));
    }));
    Ok((y, inv_rms))
}

vectorised! {
    fn norm_rows<Y: Element, X: Element>(y: &mut [Y], x: &[X], w: &[f32], inv_rms: &mut [f32], eps: f32) {
        let group = w.len();
        for ((y, x), inv_rms) in y.chunks_exact_mut(group).zip(x.chunks_exact(group)).zip(inv_rms) {
            let inv = 1.0 / (dot(x, x) / group as f32 + eps).sqrt();
            *inv_rms = inv;
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = Y::rounded(x.single() * inv * w);
            }
        }
    }
}

/// `dw` is summed within each task's rows, then over tasks in order: the same bits on any number of
/// threads.
pub(super) fn rms_norm_backward(
    cpu: &Cpu,
    dy: &CpuTensor,
    (x, w, inv_rms): (&CpuTensor, &CpuTensor, &CpuTensor),
    dw: Option<&mut CpuTensor>,
    onto: Option<CpuTensor>,
) -> Result<CpuTensor> {
    let (rows, cols) = x.shape();
    let group = w.cols();
    assert_eq!(dy.shape(), x.shape(), "rms_norm_backward: gradient");
    let accumulate = onto.is_some();
    let mut dx = onto.map_or_else(|| cpu.unspecified_of(rows, cols, x.dtype()), Ok)?;
    assert_eq!(dx.shape(), x.shape(), "rms_norm_backward: onto");
    let task = rows_per_task(group);
    let tasks = (rows * cols / group).div_ceil(task);
    let mut partial = cpu.zeros_tensor(tasks, group)?;
    with_element!(dy, G => with_element!(x, X => {
        dx.elements_mut::<X>()
            .par_chunks_mut(task * group)
            .zip(dy.elements::<G>().par_chunks(task * group))
            .zip(x.elements::<X>().par_chunks(task * group))
            .zip(inv_rms.as_slice().par_chunks(task))
            .zip(partial.as_mut_slice().par_chunks_mut(group))
            .for_each(|((((dx, dy), x), inv_rms), dw)| {
                norm_rows_backward(dx, dy, (x, w.as_slice(), inv_rms), dw, accumulate);
            });
    }));
    if let Some(dw) = dw {
        assert_eq!(dw.shape(), (1, group), "rms_norm_backward: weight gradient");
        for partial in partial.as_slice().chunks_exact(group) {
            dw.as_mut_slice().iter_mut().zip(partial).for_each(|(dw, p)| *dw += p);
        }
    }
    Ok(dx)
}

vectorised! {
    fn norm_rows_backward<X: Element, G: Element>(
        dx: &mut [X],
        dy: &[G],
        inputs: (&[X], &[f32], &[f32]),
        dw: &mut [f32],
        accumulate: bool,
    ) {
        let (x, w, inv_rms) = inputs;
        let group = w.len();
        let grads = dx.chunks_exact_mut(group).zip(dy.chunks_exact(group));
        for ((dx, dy), (x, &inv)) in grads.zip(x.chunks_exact(group).zip(inv_rms)) {
            norm_row_backward(dx, dy, (x, w, inv), dw, accumulate);
        }
    }
}

#[inline(always)]
fn norm_row_backward<X: Element, G: Element>(
    dx: &mut [X],
    dy: &[G],
    (x, w, inv): (&[X], &[f32], f32),
    dw: &mut [f32],
    accumulate: bool,
) {
    let mut product = 0.0;
    const BLOCK: usize = 16;
    for ((dy, x), w) in dy.chunks(BLOCK).zip(x.chunks(BLOCK)).zip(w.chunks(BLOCK)) {
        let mut weighted = [0.0f32; BLOCK];
        weighted.iter_mut().zip(dy.iter().zip(w)).for_each(|(g, (dy, w))| *g = dy.single() * w);
        product += sum_pairs(&weighted[..x.len()], x, |g, x| g * x);
    }
    let mean = product * inv * inv / x.len() as f32;
    for ((((dx, dy), x), w), dw) in dx.iter_mut().zip(dy).zip(x).zip(w).zip(dw) {
        let (dy, x) = (dy.single(), x.single());
        let grad = (dy * w - x * mean) * inv;
        *dx = X::rounded(if accumulate { dx.single() + grad } else { grad });
        *dw += dy * x * inv;
    }
}

pub(super) fn normalize(cpu: &Cpu, x: &CpuTensor) -> Result<(CpuTensor, CpuTensor)> {
    let (rows, cols) = x.shape();
    let mut y = cpu.unspecified(rows, cols)?;
    let mut inv_norm = cpu.unspecified(rows, 1)?;
    y.as_mut_slice()
        .par_chunks_mut(cols)
        .zip(x.as_slice().par_chunks(cols))
        .zip(inv_norm.as_mut_slice())
        .for_each(|((y, x), inv_norm)| *inv_norm = normalize_row(y, x));
    Ok((y, inv_norm))
}

vectorised! {
    fn normalize_row(y: &mut [f32], x: &[f32]) -> f32 {
        let inv = 1.0 / dot(x, x).sqrt().max(NORM_FLOOR);
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * inv);
        inv
    }
}

pub(super) fn normalize_backward(
    cpu: &Cpu,
    dy: &CpuTensor,
    y: &CpuTensor,
    inv_norm: &CpuTensor,
) -> Result<CpuTensor> {
    let (rows, cols) = y.shape();
    assert_eq!(dy.shape(), y.shape(), "normalize_backward: gradient");
    let mut dx = cpu.unspecified(rows, cols)?;
    dx.as_mut_slice()
        .par_chunks_mut(cols)
        .zip(dy.as_slice().par_chunks(cols))
        .zip(y.as_slice().par_chunks(cols))
        .zip(inv_norm.as_slice())
        .for_each(|(((dx, dy), y), &inv)| normalize_row_backward(dx, dy, y, inv));
    Ok(dx)
}

vectorised! {
    fn normalize_row_backward(dx: &mut [f32], dy: &[f32], y: &[f32], inv: f32) {
        let along = dot(dy, y);
        for ((dx, dy), y) in dx.iter_mut().zip(dy).zip(y) {
            *dx = (dy - y * along) * inv;
        }
    }
}
