//! RMS norm and L2 normalization, and their backward passes.

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::device::Cpu;
use super::element::{Element, with_element};
use super::vector::{dot, rows_per_task, sum_pairs, vectorised};
use crate::Result;
use crate::backend::{Dtype, Shape, View, ViewMut};

/// Smallest norm that [`normalize`] divides by.
const NORM_FLOOR: f32 = 1e-12;

/// Groups of `w.cols()` columns are contiguous within a row.
pub(super) fn rms_norm(
    cpu: &Cpu,
    x: View<'_, CpuTensor>,
    w: &CpuTensor,
    eps: f32,
    dtype: Dtype,
) -> Result<(CpuTensor, CpuTensor)> {
    let (rows, cols, group) = (x.rows, x.cols, w.cols());
    assert_eq!(cols % group, 0, "rms_norm: groups");
    let groups = cols / group;
    let mut y = cpu.unspecified_of(rows, cols, dtype)?;
    let mut inv_rms = cpu.unspecified(rows, groups)?;
    let task = rows_per_task(cols);
    let (stride, columns) = (x.tensor.cols(), x.col..x.col + cols);
    with_element!(x, X => with_element!(y, Y => {
        y.elements_mut::<Y>()
            .par_chunks_mut(task * cols)
            .zip(x.rows_of::<X>().par_chunks(task * stride))
            .zip(inv_rms.as_mut_slice().par_chunks_mut(task * groups))
            .for_each(|((y, x), inv_rms)| {
                let rows = y.chunks_exact_mut(cols).zip(x.chunks_exact(stride));
                for ((y, x), inv_rms) in rows.zip(inv_rms.chunks_exact_mut(groups)) {
                    norm_groups(y, &x[columns.clone()], w.as_slice(), inv_rms, eps);
                }
            });
    }));
    Ok((y, inv_rms))
}

vectorised! {
    fn norm_groups<Y: Element, X: Element>(y: &mut [Y], x: &[X], w: &[f32], inv_rms: &mut [f32], eps: f32) {
        let group = w.len();
        for ((y, x), inv_rms) in y.chunks_exact_mut(group).zip(x.chunks_exact(group)).zip(inv_rms) {
            let inv = 1.0 / (dot(x, x) / group as f32 + eps).sqrt();
            *inv_rms = inv;
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = Y::from_f32(x.to_f32() * inv * w);
            }
        }
    }
}

/// `dw` is summed over the rows of each task, then over tasks in order, so it has the same bits on any number
/// of threads.
pub(super) fn rms_norm_backward(
    cpu: &Cpu,
    dy: &CpuTensor,
    (x, w, inv_rms): (&CpuTensor, &CpuTensor, &CpuTensor),
    dw: Option<&mut CpuTensor>,
    onto: Option<CpuTensor>,
) -> Result<CpuTensor> {
    let (rows, cols) = x.shape();
    assert_eq!(dy.shape(), x.shape(), "rms_norm_backward: gradient");
    let accumulate = onto.is_some();
    let mut dx = onto.map_or_else(|| cpu.unspecified_of(rows, cols, x.dtype()), Ok)?;
    assert_eq!(dx.shape(), x.shape(), "rms_norm_backward: onto");
    let (group, groups) = (w.cols(), cols / w.cols());
    let mut partial = Partial::new(cpu, (rows, cols), group)?;
    let task = partial.task;
    with_element!(dy, G => with_element!(x, X => {
        dx.elements_mut::<X>()
            .par_chunks_mut(task * cols)
            .zip(dy.elements::<G>().par_chunks(task * cols))
            .zip(x.elements::<X>().par_chunks(task * cols))
            .zip(inv_rms.as_slice().par_chunks(task * groups))
            .zip(partial.sums.as_mut_slice().par_chunks_mut(group))
            .for_each(|((((dx, dy), x), inv_rms), dw)| {
                norm_groups_backward(dx, dy, (x, w.as_slice(), inv_rms), dw, accumulate);
            });
    }));
    partial.add_to(dw);
    Ok(dx)
}

/// The same; dx overwrites dy.
pub(super) fn rms_norm_backward_in_place(
    cpu: &Cpu,
    dy: ViewMut<'_, CpuTensor>,
    (x, w, inv_rms): (View<'_, CpuTensor>, &CpuTensor, &CpuTensor),
    dw: Option<&mut CpuTensor>,
) -> Result<()> {
    let (rows, cols) = x.shape();
    assert_eq!(dy.shape(), x.shape(), "rms_norm_backward_in_place: gradient");
    let (group, groups) = (w.cols(), cols / w.cols());
    let mut partial = Partial::new(cpu, (rows, cols), group)?;
    let task = partial.task;
    let (x_stride, x_columns) = (x.tensor.cols(), x.col..x.col + cols);
    let (dy_stride, dy_columns) = (dy.tensor.cols(), dy.col..dy.col + cols);
    with_element!(dy, G => with_element!(x, X => {
        dy.rows_of::<G>()
            .par_chunks_mut(task * dy_stride)
            .zip(x.rows_of::<X>().par_chunks(task * x_stride))
            .zip(inv_rms.as_slice().par_chunks(task * groups))
            .zip(partial.sums.as_mut_slice().par_chunks_mut(group))
            .for_each(|(((dy, x), inv_rms), dw)| {
                let rows = dy.chunks_exact_mut(dy_stride).zip(x.chunks_exact(x_stride));
                for ((dy, x), inv_rms) in rows.zip(inv_rms.chunks_exact(groups)) {
                    let inputs = (&x[x_columns.clone()], w.as_slice(), inv_rms);
                    norm_groups_backward_in_place(&mut dy[dy_columns.clone()], inputs, dw);
                }
            });
    }));
    partial.add_to(dw);
    Ok(())
}

/// Weight gradients of each task.
struct Partial {
    /// Rows of a task.
    task: usize,
    /// `[tasks, group]`
    sums: CpuTensor,
}

impl Partial {
    fn new(cpu: &Cpu, (rows, cols): (usize, usize), group: usize) -> Result<Self> {
        let task = rows_per_task(cols);
        Ok(Partial { task, sums: cpu.zeros_tensor(rows.div_ceil(task), group)? })
    }

    /// Adds the sums to `dw`, in order.
    fn add_to(self, dw: Option<&mut CpuTensor>) {
        let Some(dw) = dw else { return };
        assert_eq!(dw.shape(), (1, self.sums.cols()), "rms_norm_backward: weight gradient");
        for partial in self.sums.as_slice().chunks_exact(self.sums.cols()) {
            dw.as_mut_slice().iter_mut().zip(partial).for_each(|(dw, p)| *dw += p);
        }
    }
}

vectorised! {
    fn norm_groups_backward<X: Element, G: Element>(
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
            let mean = mean_product(dy, (x, w, inv));
            for ((((dx, dy), x), w), dw) in dx.iter_mut().zip(dy).zip(x).zip(w).zip(&mut *dw) {
                let (dy, x) = (dy.to_f32(), x.to_f32());
                let grad = (dy * w - x * mean) * inv;
                *dx = X::from_f32(if accumulate { dx.to_f32() + grad } else { grad });
                *dw += dy * x * inv;
            }
        }
    }
}

vectorised! {
    fn norm_groups_backward_in_place<X: Element, G: Element>(
        dy: &mut [G],
        inputs: (&[X], &[f32], &[f32]),
        dw: &mut [f32],
    ) {
        let (x, w, inv_rms) = inputs;
        let group = w.len();
        for (dy, (x, &inv)) in dy.chunks_exact_mut(group).zip(x.chunks_exact(group).zip(inv_rms)) {
            let mean = mean_product(dy, (x, w, inv));
            for (((dy, x), w), dw) in dy.iter_mut().zip(x).zip(w).zip(&mut *dw) {
                let (grad, x) = (dy.to_f32(), x.to_f32());
                *dy = G::from_f32((grad * w - x * mean) * inv);
                *dw += grad * x * inv;
            }
        }
    }
}

/// `mean(dy∘w∘x̂) · inv`, with `x̂ = x · inv`.
#[inline(always)]
fn mean_product<X: Element, G: Element>(dy: &[G], (x, w, inv): (&[X], &[f32], f32)) -> f32 {
    let mut product = 0.0;
    const BLOCK: usize = 16;
    for ((dy, x), w) in dy.chunks(BLOCK).zip(x.chunks(BLOCK)).zip(w.chunks(BLOCK)) {
        let mut weighted = [0.0f32; BLOCK];
        weighted.iter_mut().zip(dy.iter().zip(w)).for_each(|(g, (dy, w))| *g = dy.to_f32() * w);
        product += sum_pairs(&weighted[..x.len()], x, |g, x| g * x);
    }
    product * inv * inv / x.len() as f32
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
    dy: View<'_, CpuTensor>,
    y: &CpuTensor,
    inv_norm: &CpuTensor,
) -> Result<CpuTensor> {
    let (rows, cols) = y.shape();
    assert_eq!(dy.shape(), y.shape(), "normalize_backward: gradient");
    assert_eq!(dy.cols, dy.tensor.cols(), "normalize_backward: whole rows");
    let mut dx = cpu.unspecified(rows, cols)?;
    dx.as_mut_slice()
        .par_chunks_mut(cols)
        .zip(dy.rows_of::<f32>().par_chunks(cols))
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
