//! The same numbers in f32 and in bf16, and the comparison of an operation's results on them.

use super::reference::Matrix;
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{Backend, Dtype, Shape};

/// The same numbers in both dtypes: `narrow` is bf16, `wide` is f32.
pub(super) struct Both<B: Backend> {
    pub(super) narrow: B::Tensor,
    pub(super) wide: B::Tensor,
}

pub(super) fn random<B: Backend>(
    suite: &mut Suite<'_, B>,
    rows: usize,
    cols: usize,
) -> Result<Both<B>> {
    let x = suite.random(rows, cols);
    let narrow = suite.backend.cast(&suite.tensor(&x)?, Dtype::Bf16)?;
    let wide = suite.backend.cast(&narrow, Dtype::F32)?;
    Ok(Both { narrow, wide })
}

/// A copy, for an operation that consumes its argument.
pub(super) fn copy<B: Backend>(suite: &Suite<'_, B>, x: &B::Tensor) -> Result<B::Tensor> {
    suite.backend.cast(x, x.dtype())
}

/// The bound for results that have been rounded to bf16 up to `count` times.
pub(super) fn roundings(count: f64) -> Bound {
    Bound::roundings(count * f64::from(1 << 16))
}

/// `got` must have the dtype `dtype` and equal the f32 result `want` within the bound.
pub(super) fn agree<B: Backend>(
    suite: &mut Suite<'_, B>,
    what: &str,
    got: &B::Tensor,
    want: &B::Tensor,
    (dtype, bound): (Dtype, Bound),
) -> Result<()> {
    suite.require(&format!("{what} is {dtype}"), got.dtype() == dtype);
    let (rows, cols) = want.shape();
    let want = suite.backend.download(want)?;
    let want = Matrix::from_fn(rows, cols, |i, j| f64::from(want[i * cols + j]));
    suite.check(what, got, &want, bound)
}
