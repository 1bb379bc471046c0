//! Gathering, scattering and averaging rows.

use rayon::prelude::*;

use super::vector::{rows_per_task, vectorised};
use super::{Cpu, CpuTensor};
use crate::backend::Shape;

pub(super) fn gather_rows(cpu: &Cpu, x: &CpuTensor, rows: &[u32]) -> CpuTensor {
    let cols = x.cols();
    let mut y = cpu.unspecified(rows.len(), cols);
    let task = rows_per_task(cols);
    y.as_mut_slice().par_chunks_mut(task * cols).zip(rows.par_chunks(task)).for_each(
        |(y, rows)| {
            for (y, &row) in y.chunks_exact_mut(cols).zip(rows) {
                let start = row as usize * cols;
                y.copy_from_slice(&x.as_slice()[start..start + cols]);
            }
        },
    );
    y
}

/// Rows may repeat (a token does), so tasks split the columns: each then adds the rows in order,
/// and no two write the same element.
pub(super) fn scatter_add_rows(dy: &CpuTensor, rows: &[u32], dx: &mut CpuTensor) {
    const COLUMN_BLOCK: usize = 64;
    let cols = dx.cols();
    assert_eq!(dy.shape(), (rows.len(), cols), "scatter_add_rows: gradient");
    let target = super::shared::SharedSlice::new(dx.as_mut_slice());
    (0..cols.div_ceil(COLUMN_BLOCK)).into_par_iter().for_each(|block| {
        let start = block * COLUMN_BLOCK;
        let width = COLUMN_BLOCK.min(cols - start);
        for (dy, &row) in dy.as_slice().chunks_exact(cols).zip(rows) {
            // SAFETY: this task alone touches columns `start..start + width` of any row.
            let dx = unsafe { target.slice_mut(row as usize * cols + start, width) };
            dx.iter_mut().zip(&dy[start..start + width]).for_each(|(dx, dy)| *dx += dy);
        }
    });
}

pub(super) fn segment_mean(cpu: &Cpu, x: &CpuTensor, offsets: &[u32]) -> CpuTensor {
    let cols = x.cols();
    let segments = offsets.len() - 1;
    let mut y = cpu.unspecified(segments, cols);
    y.as_mut_slice().par_chunks_mut(cols).zip(offsets.par_windows(2)).for_each(|(y, bounds)| {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        let share = 1.0 / (end - start) as f32;
        vectorised(|| {
            y.fill(0.0);
            for row in x.as_slice()[start * cols..end * cols].chunks_exact(cols) {
                y.iter_mut().zip(row).for_each(|(y, x)| *y += x);
            }
            y.iter_mut().for_each(|y| *y *= share);
        });
    });
    y
}

pub(super) fn segment_mean_backward(
    cpu: &Cpu,
    dy: &CpuTensor,
    offsets: &[u32],
    rows: usize,
) -> CpuTensor {
    let cols = dy.cols();
    let mut dx = cpu.zeros_tensor(rows, cols);
    for (dy, bounds) in dy.as_slice().chunks_exact(cols).zip(offsets.windows(2)) {
        let (start, end) = (bounds[0] as usize, bounds[1] as usize);
        let share = 1.0 / (end - start) as f32;
        for dx in dx.as_mut_slice()[start * cols..end * cols].chunks_exact_mut(cols) {
            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx = dy * share);
        }
    }
    dx
}
