//! Gathering, scattering, averaging and converting rows.

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::buffer::{copied, with_capacity};
use super::device::Cpu;
use super::element::{Element, with_element};
use super::shared::SharedSlice;
use super::vector::{rows_per_task, vectorised};
use crate::Result;
use crate::backend::{Dtype, ScatterPlan, Shape, View, ViewMut};

pub(super) fn gather_rows(cpu: &Cpu, x: &CpuTensor, rows: &[u32]) -> Result<CpuTensor> {
    let cols = x.cols();
    let mut y = cpu.unspecified_of(rows.len(), cols, x.dtype())?;
    let task = rows_per_task(cols);
    with_element!(x, T => {
        let x = x.elements::<T>();
        let tasks = y.elements_mut::<T>().par_chunks_mut(task * cols).zip(rows.par_chunks(task));
        tasks.for_each(|(y, rows)| {
            for (y, &row) in y.chunks_exact_mut(cols).zip(rows) {
                let start = row as usize * cols;
                y.copy_from_slice(&x[start..start + cols]);
            }
        });
    });
    Ok(y)
}

/// Each target belongs to one task, which adds its sources in the order of the plan.
pub(super) fn scatter_add_rows(dy: &CpuTensor, plan: &ScatterPlan<Cpu>, dx: &mut CpuTensor) {
    let cols = dx.cols();
    assert_eq!(dy.shape(), (plan.sources.len(), cols), "scatter_add_rows: gradient");
    let bounds = plan.starts.par_windows(2).zip(&plan.targets);
    with_element!(dy, G => with_element!(dx, X => {
        let dy = dy.elements::<G>();
        let shared = SharedSlice::new(dx.elements_mut::<X>());
        bounds.with_min_len(rows_per_task(cols)).for_each(|(bounds, &target)| {
            // SAFETY: a plan contains each target once, so only this task accesses the row.
            let dx = unsafe { shared.slice_mut(target as usize * cols, cols) };
            for &source in &plan.sources[bounds[0] as usize..bounds[1] as usize] {
                let start = source as usize * cols;
                add(dx, &dy[start..start + cols]);
            }
        });
    }));
}

vectorised! {
    fn add<X: Element, G: Element>(x: &mut [X], more: &[G]) {
        x.iter_mut().zip(more).for_each(|(x, more)| *x = X::from_f32(x.to_f32() + more.to_f32()));
    }
}

pub(super) fn cast(cpu: &Cpu, x: &CpuTensor, dtype: Dtype) -> Result<CpuTensor> {
    let mut y = cpu.unspecified_of(x.rows(), x.cols(), dtype)?;
    copy(x.view(), y.view_mut());
    Ok(y)
}

pub(super) fn copy(x: View<'_, CpuTensor>, to: ViewMut<'_, CpuTensor>) {
    assert_eq!(to.shape(), x.shape(), "copy: shape");
    let (x_stride, x_columns) = (x.tensor.cols(), x.col..x.col + x.cols);
    let (y_stride, y_columns) = (to.tensor.cols(), to.col..to.col + to.cols);
    if x.rows == 0 || x.cols == 0 {
        return;
    }
    let task = rows_per_task(x.cols);
    with_element!(x, X => with_element!(to, Y => {
        let tasks = to.rows_of::<Y>().par_chunks_mut(task * y_stride);
        tasks.zip(x.rows_of::<X>().par_chunks(task * x_stride)).for_each(|(y, x)| {
            for (y, x) in y.chunks_exact_mut(y_stride).zip(x.chunks_exact(x_stride)) {
                convert(&mut y[y_columns.clone()], &x[x_columns.clone()]);
            }
        });
    }));
}

pub(super) fn add_scaled(x: View<'_, CpuTensor>, scale: f32, y: ViewMut<'_, CpuTensor>) {
    assert_eq!(y.shape(), x.shape(), "add_scaled: shape");
    if x.rows == 0 || x.cols == 0 {
        return;
    }
    let (x_stride, x_columns) = (x.tensor.cols(), x.col..x.col + x.cols);
    let (y_stride, y_columns) = (y.tensor.cols(), y.col..y.col + y.cols);
    let task = rows_per_task(x.cols);
    let tasks = y.rows_of::<f32>().par_chunks_mut(task * y_stride);
    tasks.zip(x.rows_of::<f32>().par_chunks(task * x_stride)).for_each(|(y, x)| {
        for (y, x) in y.chunks_exact_mut(y_stride).zip(x.chunks_exact(x_stride)) {
            add_row(&mut y[y_columns.clone()], &x[x_columns.clone()], scale);
        }
    });
}

vectorised! {
    fn add_row(y: &mut [f32], x: &[f32], scale: f32) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y += scale * x);
    }
}

/// Copies row-major elements from the host.
pub(super) fn write<T: Element>(data: &[T], to: ViewMut<'_, CpuTensor>) {
    let (cols, stride, columns) = (to.cols, to.tensor.cols(), to.col..to.col + to.cols);
    if cols == 0 {
        return;
    }
    let rows = to.rows_of().chunks_exact_mut(stride).zip(data.chunks_exact(cols));
    rows.for_each(|(row, data)| row[columns.clone()].copy_from_slice(data));
}

vectorised! {
    fn convert<Y: Element, X: Element>(y: &mut [Y], x: &[X]) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = Y::from_f32(x.to_f32()));
    }
}

/// A copy in host memory, converted to f32.
pub(super) fn widen(x: &CpuTensor) -> Result<Vec<f32>> {
    match x.dtype() {
        Dtype::F32 => copied(x.as_slice()),
        Dtype::Bf16 => {
            let mut wide = with_capacity(x.rows() * x.cols())?;
            wide.extend(x.elements::<half::bf16>().iter().map(|x| x.to_f32()));
            Ok(wide)
        }
    }
}

pub(super) fn segment_mean(cpu: &Cpu, x: &CpuTensor, offsets: &[u32]) -> Result<CpuTensor> {
    let cols = x.cols();
    let segments = offsets.len() - 1;
    let mut y = cpu.unspecified(segments, cols)?;
    y.as_mut_slice().par_chunks_mut(cols).zip(offsets.par_windows(2)).for_each(|(y, bounds)| {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        mean(y, &x.as_slice()[start * cols..end * cols]);
    });
    Ok(y)
}

vectorised! {
    fn mean(y: &mut [f32], rows: &[f32]) {
        let share = 1.0 / (rows.len() / y.len()) as f32;
        y.fill(0.0);
        for row in rows.chunks_exact(y.len()) {
            y.iter_mut().zip(row).for_each(|(y, x)| *y += x);
        }
        y.iter_mut().for_each(|y| *y *= share);
    }
}

pub(super) fn segment_mean_backward(
    cpu: &Cpu,
    dy: &CpuTensor,
    offsets: &[u32],
    rows: usize,
) -> Result<CpuTensor> {
    let cols = dy.cols();
    let mut dx = cpu.zeros_tensor(rows, cols)?;
    for (dy, bounds) in dy.as_slice().chunks_exact(cols).zip(offsets.windows(2)) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        let share = 1.0 / (end - start) as f32;
        for dx in dx.as_mut_slice()[start * cols..end * cols].chunks_exact_mut(cols) {
            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = dy * share);
        }
    }
    Ok(dx)
}
