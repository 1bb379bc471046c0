//! The products of a linear layer.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{Gemm, Onto, Precision, View, ViewMut};
use super::vector::vectorised;
use super::{Cpu, CpuTensor};
use crate::backend::Shape;

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
    let mut product = Gemm::new(Precision::F32);
    if let Some(bias) = bias {
        assert_eq!(bias.shape(), (1, output), "linear: bias");
        product = product.bias(bias.as_slice());
    }
    if let Some(residual) = residual {
        assert_eq!(residual.shape(), (n, output), "linear: residual");
        product = product.onto(Onto::Residual(view(residual)));
    }
    product.multiply(view_mut(&mut y), view(x), view(w).t());
    y
}

pub(super) fn linear_onto(x: &CpuTensor, w: &CpuTensor, mut onto: CpuTensor) -> CpuTensor {
    let (n, input) = x.shape();
    let output = w.rows();
    assert_eq!(w.cols(), input, "linear_onto: input features");
    assert_eq!(onto.shape(), (n, output), "linear_onto: onto");
    Gemm::new(Precision::F32).accumulate().multiply(view_mut(&mut onto), view(x), view(w).t());
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
    let product = Gemm::new(Precision::F32);
    let product = if accumulate { product.accumulate() } else { product };
    product.multiply(view_mut(&mut dx), view(dy), view(w));
    dx
}

pub(super) fn linear_weight_grad(dy: &CpuTensor, x: &CpuTensor, dw: &mut CpuTensor) {
    let (n, output) = dy.shape();
    let input = x.cols();
    assert_eq!(x.rows(), n, "linear_weight_grad: rows");
    assert_eq!(dw.shape(), (output, input), "linear_weight_grad: gradient");
    Gemm::new(Precision::F32).accumulate().multiply(view_mut(dw), view(dy).t(), view(x));
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

fn view(x: &CpuTensor) -> View<'_, f32> {
    View::new(x.as_slice(), x.rows(), x.cols())
}

fn view_mut(x: &mut CpuTensor) -> ViewMut<'_, f32> {
    let (rows, cols) = x.shape();
    ViewMut::new(x.as_mut_slice(), rows, cols)
}
