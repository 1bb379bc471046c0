//! Matrix products of linear layers and of scores. The precision is that of the left operand.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::device::Cpu;
use super::element::{Element, with_element};
use super::gemm::{self, Gemm, Onto, Operand, Output, Precision};
use super::vector::vectorised;
use crate::Result;
use crate::backend::{Accumulate, Dtype, Epilogue, Shape, View, ViewMut};

pub(super) fn linear(
    cpu: &Cpu,
    x: View<'_, CpuTensor>,
    w: View<'_, CpuTensor>,
    alpha: f32,
    epilogue: &Epilogue<'_, CpuTensor>,
) -> Result<CpuTensor> {
    assert_eq!(w.cols, x.cols, "linear: input features");
    let dtype = epilogue.residual.map_or(x.dtype(), Shape::dtype);
    let mut y = cpu.unspecified_of(x.rows, w.rows, dtype)?;
    with_element!(y, T => {
        let mut product = product::<T>(x.dtype()).alpha(alpha);
        if let Some(bias) = epilogue.bias {
            assert_eq!(bias.shape(), (1, w.rows), "linear: bias");
            product = product.bias(&bias.rows_of()[bias.col..bias.col + bias.cols]);
        }
        if let Some(residual) = epilogue.residual {
            assert_eq!(residual.shape(), (x.rows, w.rows), "linear: residual");
            product = product.onto(Onto::Residual(matrix(residual.view())));
        }
        product.multiply(matrix_mut::<T>(y.view_mut()), operand(x), operand(w).t());
    });
    Ok(y)
}

pub(super) fn linear_add(
    x: View<'_, CpuTensor>,
    w: View<'_, CpuTensor>,
    y: ViewMut<'_, CpuTensor>,
) {
    assert_eq!(w.cols, x.cols, "linear_add: input features");
    assert_eq!(y.shape(), (x.rows, w.rows), "linear_add: result");
    with_element!(y, T => {
        let product = product::<T>(x.dtype()).accumulate();
        product.multiply(matrix_mut(y), operand(x), operand(w).t());
    });
}

pub(super) fn linear_input_grad(
    cpu: &Cpu,
    dy: View<'_, CpuTensor>,
    w: View<'_, CpuTensor>,
    alpha: f32,
    onto: Option<CpuTensor>,
) -> Result<CpuTensor> {
    assert_eq!(w.rows, dy.cols, "linear_input_grad: output features");
    let accumulate = onto.is_some();
    let mut dx = onto.map_or_else(|| cpu.unspecified_of(dy.rows, w.cols, dy.dtype()), Ok)?;
    assert_eq!(dx.shape(), (dy.rows, w.cols), "linear_input_grad: onto");
    with_element!(dx, T => {
        let product = product::<T>(dy.dtype()).alpha(alpha);
        let product = if accumulate { product.accumulate() } else { product };
        product.multiply(matrix_mut(dx.view_mut()), operand(dy), operand(w));
    });
    Ok(dx)
}

pub(super) fn linear_weight_grad(
    dy: View<'_, CpuTensor>,
    x: View<'_, CpuTensor>,
    dw: ViewMut<'_, CpuTensor>,
    accumulate: Accumulate,
) {
    assert_eq!(x.rows, dy.rows, "linear_weight_grad: rows");
    assert_eq!(dw.shape(), (dy.cols, x.cols), "linear_weight_grad: gradient");
    let product = product::<f32>(dy.dtype());
    let product = if accumulate == Accumulate::Add { product.accumulate() } else { product };
    product.multiply(matrix_mut(dw), operand(dy).t(), operand(x));
}

/// Columns that one task sums over all rows; a multiple of the cache line.
const COLUMN_BLOCK: usize = 64;

pub(super) fn linear_bias_grad(
    dy: View<'_, CpuTensor>,
    db: ViewMut<'_, CpuTensor>,
    accumulate: Accumulate,
) {
    assert_eq!(db.shape(), (1, dy.cols), "linear_bias_grad: gradient");
    let columns = db.col..db.col + db.cols;
    let db: &mut [f32] = &mut db.rows_of()[columns];
    if accumulate == Accumulate::Overwrite {
        db.fill(0.0);
    }
    let blocks = db.par_chunks_mut(COLUMN_BLOCK).enumerate();
    with_element!(dy, T => blocks.for_each(|(block, db)| {
        let start = dy.col + block * COLUMN_BLOCK;
        add_columns::<T>(dy.rows_of(), dy.tensor.cols(), start..start + db.len(), db);
    }));
}

vectorised! {
    /// `sum[j] += Σ_rows x[row, columns.start + j]`
    fn add_columns<T: Element>(x: &[T], cols: usize, columns: Range<usize>, sum: &mut [f32]) {
        for row in x.chunks_exact(cols) {
            sum.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, x)| *sum += x.to_f32());
        }
    }
}

pub(super) fn scores(cpu: &Cpu, q: &CpuTensor, p: &CpuTensor, scale: f32) -> Result<CpuTensor> {
    linear(cpu, q.view(), p.view(), scale, &Epilogue::default())
}

pub(super) fn scores_backward(
    cpu: &Cpu,
    ds: &CpuTensor,
    q: &CpuTensor,
    p: &CpuTensor,
    scale: f32,
) -> Result<(CpuTensor, CpuTensor)> {
    assert_eq!(ds.shape(), (q.rows(), p.rows()), "scores_backward: gradient");
    let dq = linear_input_grad(cpu, ds.view(), p.view(), scale, None)?;
    let mut dp = cpu.unspecified(p.rows(), p.cols())?;
    let product = product::<f32>(ds.dtype()).alpha(scale);
    product.multiply(matrix_mut(dp.view_mut()), operand(ds.view()).t(), operand(q.view()));
    Ok((dq, dp))
}

fn product<'a, O: Output>(left: Dtype) -> Gemm<'a, O> {
    Gemm::new(match left {
        Dtype::F32 => Precision::F32,
        Dtype::Bf16 => Precision::Bf16,
    })
}

fn operand(x: View<'_, CpuTensor>) -> Operand<'_> {
    with_element!(x, T => <T as Output>::operand(matrix(x)))
}

fn matrix<T: Element>(x: View<'_, CpuTensor>) -> gemm::View<'_, T> {
    let elements = &x.rows_of()[first(x.rows, x.col)..];
    gemm::View::strided(elements, x.shape(), x.tensor.cols())
}

fn matrix_mut<T: Element>(x: ViewMut<'_, CpuTensor>) -> gemm::ViewMut<'_, T> {
    let (rows, cols, col, stride) = (x.rows, x.cols, x.col, x.tensor.cols());
    gemm::ViewMut::strided(&mut x.rows_of()[first(rows, col)..], (rows, cols), stride)
}

/// Offset of the first element of a block in its rows; 0 if there are no rows.
fn first(rows: usize, col: usize) -> usize {
    if rows == 0 { 0 } else { col }
}
