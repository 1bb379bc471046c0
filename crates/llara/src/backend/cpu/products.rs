//! The products of a linear layer. Their precision is that of the left operand.

use std::ops::Range;

use rayon::prelude::*;

use super::element::{Element, with_element};
use super::gemm::{Gemm, Onto, Operand, Output, Precision, View, ViewMut};
use super::vector::vectorised;
use super::{Cpu, CpuTensor};
use crate::Result;
use crate::backend::{Accumulate, Dtype, Shape};

pub(super) fn linear(
    cpu: &Cpu,
    x: &CpuTensor,
    w: &CpuTensor,
    bias: Option<&CpuTensor>,
    residual: Option<&CpuTensor>,
) -> Result<CpuTensor> {
    let (n, input) = x.shape();
    let output = w.rows();
    assert_eq!(w.cols(), input, "linear: input features");
    let dtype = residual.map_or(x.dtype(), Shape::dtype);
    let mut y = cpu.unspecified_of(n, output, dtype)?;
    with_element!(y, T => {
        let mut product = product::<T>(x);
        if let Some(bias) = bias {
            assert_eq!(bias.shape(), (1, output), "linear: bias");
            product = product.bias(bias.as_slice());
        }
        if let Some(residual) = residual {
            assert_eq!(residual.shape(), (n, output), "linear: residual");
            product = product.onto(Onto::Residual(view(residual)));
        }
        product.multiply(view_mut::<T>(&mut y), operand(x), operand(w).t());
    });
    Ok(y)
}

pub(super) fn linear_onto(x: &CpuTensor, w: &CpuTensor, mut onto: CpuTensor) -> CpuTensor {
    let (n, input) = x.shape();
    let output = w.rows();
    assert_eq!(w.cols(), input, "linear_onto: input features");
    assert_eq!(onto.shape(), (n, output), "linear_onto: onto");
    with_element!(onto, T => {
        let product = product::<T>(x).accumulate();
        product.multiply(view_mut(&mut onto), operand(x), operand(w).t());
    });
    onto
}

pub(super) fn linear_input_grad(
    cpu: &Cpu,
    dy: &CpuTensor,
    w: &CpuTensor,
    onto: Option<CpuTensor>,
) -> Result<CpuTensor> {
    let (n, output) = dy.shape();
    let input = w.cols();
    assert_eq!(w.rows(), output, "linear_input_grad: output features");
    let accumulate = onto.is_some();
    let mut dx = onto.map_or_else(|| cpu.unspecified_of(n, input, dy.dtype()), Ok)?;
    assert_eq!(dx.shape(), (n, input), "linear_input_grad: onto");
    with_element!(dx, T => {
        let product = product::<T>(dy);
        let product = if accumulate { product.accumulate() } else { product };
        product.multiply(view_mut(&mut dx), operand(dy), operand(w));
    });
    Ok(dx)
}

pub(super) fn linear_weight_grad(
    dy: &CpuTensor,
    x: &CpuTensor,
    dw: &mut CpuTensor,
    accumulate: Accumulate,
) {
    let (n, output) = dy.shape();
    let input = x.cols();
    assert_eq!(x.rows(), n, "linear_weight_grad: rows");
    assert_eq!(dw.shape(), (output, input), "linear_weight_grad: gradient");
    let product = product::<f32>(dy);
    let product = if accumulate == Accumulate::Add { product.accumulate() } else { product };
    product.multiply(view_mut(dw), operand(dy).t(), operand(x));
}

/// Columns that one task sums over all rows; a multiple of the cache line.
const COLUMN_BLOCK: usize = 64;

pub(super) fn linear_bias_grad(dy: &CpuTensor, db: &mut CpuTensor) {
    let (_, output) = dy.shape();
    assert_eq!(db.shape(), (1, output), "linear_bias_grad: gradient");
    let blocks = db.as_mut_slice().par_chunks_mut(COLUMN_BLOCK).enumerate();
    with_element!(dy, T => blocks.for_each(|(block, db)| {
        let columns = block * COLUMN_BLOCK..block * COLUMN_BLOCK + db.len();
        add_columns::<T>(dy.elements(), output, columns, db);
    }));
}

vectorised! {
    /// `sum[j] += Σ_rows x[row, columns.start + j]`
    fn add_columns<T: Element>(x: &[T], cols: usize, columns: Range<usize>, sum: &mut [f32]) {
        for row in x.chunks_exact(cols) {
            sum.iter_mut().zip(&row[columns.clone()]).for_each(|(sum, x)| *sum += x.single());
        }
    }
}

fn product<'a, O: Output>(left: &CpuTensor) -> Gemm<'a, O> {
    Gemm::new(match left.dtype() {
        Dtype::F32 => Precision::F32,
        Dtype::Bf16 => Precision::Bf16,
    })
}

fn operand(x: &CpuTensor) -> Operand<'_> {
    with_element!(x, T => <T as Output>::operand(view(x)))
}

fn view<T: Element>(x: &CpuTensor) -> View<'_, T> {
    View::new(x.elements(), x.rows(), x.cols())
}

fn view_mut<T: Element>(x: &mut CpuTensor) -> ViewMut<'_, T> {
    let (rows, cols) = x.shape();
    ViewMut::new(x.elements_mut(), rows, cols)
}
