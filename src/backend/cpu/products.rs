//! The products of a linear layer, by the `gemm` crate.

use std::ops::Range;

use gemm::Parallelism;
use rayon::prelude::*;

use super::vector::{rows_per_task, vectorised};
use super::{Cpu, CpuTensor};
use crate::backend::Shape;

/// A matrix operand: where element `(i, j)` stands is `start + i * row_stride + j * col_stride`.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    data: &'a [f32],
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Operand<'a> {
    /// A row-major matrix whose rows stand `row_stride` apart.
    pub(super) fn rows(data: &'a [f32], row_stride: usize) -> Self {
        Operand { data, row_stride, col_stride: 1 }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Operand { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn contains(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.data.len()
    }
}

/// `out = a · b`, or `out += a · b` where `accumulate`: a `[m, k]`, b `[k, n]`, out `[m, n]` with rows
/// `out_stride` apart.
pub(super) fn multiply(
    (m, n, k): (usize, usize, usize),
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
    a: Operand<'_>,
    b: Operand<'_>,
    parallelism: Parallelism,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.contains(m, k) && b.contains(k, n), "operand too short for {m} x {n} x {k}");
    assert!(n <= out_stride && (m - 1) * out_stride + n <= out.len(), "result too short");
    // SAFETY: the asserts above keep every element that gemm reads or writes inside its slice, the
    // result is borrowed mutably so it aliases neither operand, and strides fit in isize because
    // the slices do.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// All threads of the current rayon pool. gemm splits only rows and columns among them, never the
/// inner dimension, so the sums do not depend on their number.
const ALL_THREADS: Parallelism = Parallelism::Rayon(0);

pub(super) fn linear(
    cpu: &Cpu,
    x: &CpuTensor,
    w: &CpuTensor,
    bias: Option<&CpuTensor>,
    residual: Option<&CpuTensor>,
) -> CpuTensor {
    let (n, input) = x.shape();
    let output = w.rows();
    assert_eq!(w.cols(), input, "linear: input features");
    let mut y = cpu.unspecified(n, output);
    if let Some(residual) = residual {
        assert_eq!(residual.shape(), (n, output), "linear: residual");
        copy(residual.as_slice(), y.as_mut_slice());
    }
    if let Some(bias) = bias {
        assert_eq!(bias.shape(), (1, output), "linear: bias");
        let onto = residual.is_some();
        y.as_mut_slice().par_chunks_mut(rows_per_task(output) * output).for_each(|rows| {
            for row in rows.chunks_exact_mut(output) {
                if onto {
                    row.iter_mut().zip(bias.as_slice()).for_each(|(y, b)| *y += b);
                } else {
                    row.copy_from_slice(bias.as_slice());
                }
            }
        });
    }
    let accumulate = bias.is_some() || residual.is_some();
    multiply(
        (n, output, input),
        y.as_mut_slice(),
        output,
        accumulate,
        Operand::rows(x.as_slice(), input),
        Operand::rows(w.as_slice(), input).t(),
        ALL_THREADS,
    );
    y
}

pub(super) fn linear_onto(x: &CpuTensor, w: &CpuTensor, mut onto: CpuTensor) -> CpuTensor {
    let (n, input) = x.shape();
    let output = w.rows();
    assert_eq!(w.cols(), input, "linear_onto: input features");
    assert_eq!(onto.shape(), (n, output), "linear_onto: onto");
    multiply(
        (n, output, input),
        onto.as_mut_slice(),
        output,
        true,
        Operand::rows(x.as_slice(), input),
        Operand::rows(w.as_slice(), input).t(),
        ALL_THREADS,
    );
    onto
}

pub(super) fn linear_input_grad(
    cpu: &Cpu,
    dy: &CpuTensor,
    w: &CpuTensor,
    onto: Option<CpuTensor>,
) -> CpuTensor {
    let (n, output) = dy.shape();
    let input = w.cols();
    assert_eq!(w.rows(), output, "linear_input_grad: output features");
    let accumulate = onto.is_some();
    let mut dx = onto.unwrap_or_else(|| cpu.unspecified(n, input));
    assert_eq!(dx.shape(), (n, input), "linear_input_grad: onto");
    multiply(
        (n, input, output),
        dx.as_mut_slice(),
        input,
        accumulate,
        Operand::rows(dy.as_slice(), output),
        Operand::rows(w.as_slice(), input),
        ALL_THREADS,
    );
    dx
}

pub(super) fn linear_weight_grad(dy: &CpuTensor, x: &CpuTensor, dw: &mut CpuTensor) {
    let (n, output) = dy.shape();
    let input = x.cols();
    assert_eq!(x.rows(), n, "linear_weight_grad: rows");
    assert_eq!(dw.shape(), (output, input), "linear_weight_grad: gradient");
    multiply(
        (output, input, n),
        dw.as_mut_slice(),
        input,
        true,
        Operand::rows(dy.as_slice(), output).t(),
        Operand::rows(x.as_slice(), input),
        ALL_THREADS,
    );
}

/// Columns that one task sums over all rows; a multiple of the cache line.
const COLUMN_BLOCK: usize = 64;

pub(super) fn linear_bias_grad(dy: &CpuTensor, db: &mut CpuTensor) {
    let (_, output) = dy.shape();
    assert_eq!(db.shape(), (1, output), "linear_bias_grad: gradient");
    let blocks = db.as_mut_slice().par_chunks_mut(COLUMN_BLOCK).enumerate();
    blocks.for_each(|(block, db)| {
        let columns = block * COLUMN_BLOCK..block * COLUMN_BLOCK + db.len();
        vectorised(|| add_columns(dy.as_slice(), output, columns, db));
    });
}

/// `sum[j] += Σ_rows x[row, columns.start + j]`
#[inline(always)]
fn add_columns(x: &[f32], cols: usize, columns: Range<usize>, sum: &mut [f32]) {
    for row in x.chunks_exact(cols) {
        sum.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, x)| *sum += x);
    }
}

/// Copies on all threads.
pub(super) fn copy(from: &[f32], to: &mut [f32]) {
    let task = rows_per_task(1);
    to.par_chunks_mut(task)
        .zip(from.par_chunks(task))
        .for_each(|(to, from)| to.copy_from_slice(from));
}
