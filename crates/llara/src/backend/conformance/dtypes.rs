//! Checks of operations for every combination of dtypes and every size for which a backend may have a separate kernel.

use super::both::{Both, agree, copy, random, roundings};
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{Backend, Dtype, Epilogue, ScatterPlan, ScatterRows, Shape, WeightUse};

/// All checks of this file.
pub(super) fn dtypes<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    // A short row, one of some hundred columns, and a long one; with whole octets and without.
    for cols in [24, 65, 304, 301, 1160, 1033] {
        norms(suite, (5, cols))?;
    }
    for cols in [1, 40, 131] {
        rows(suite, cols)?;
    }
    for sizes in [(3, 8, 16), (17, 31, 33)] {
        products(suite, sizes)?;
    }
    equal_shapes(suite)?;
    Ok(())
}

/// Both matrices of a pair.
fn each<B: Backend>(x: &Both<B>) -> [&B::Tensor; 2] {
    [&x.narrow, &x.wide]
}

fn bound_of(dtype: Dtype, roundings_of_bf16: f64) -> (Dtype, Bound) {
    match dtype {
        Dtype::F32 => (dtype, Bound::roundings(4.0)),
        Dtype::Bf16 => (dtype, roundings(roundings_of_bf16)),
    }
}

fn norms<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let (x, dy) = (random(suite, rows, cols)?, random(suite, rows, cols)?);
    let onto = random(suite, rows, cols)?;
    let w = suite.random(1, cols);
    let w = suite.tensor(&w)?;
    let backend = suite.backend;
    let (want, inv) = backend.rms_norm(x.wide.view(), &w, 1e-5, Dtype::F32)?;
    suite.case("dtypes, rms_norm");
    for x in each(&x) {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let what = format!("[{rows}, {cols}], {} to {dtype}", x.dtype());
            let (got, got_inv) = backend.rms_norm(x.view(), &w, 1e-5, dtype)?;
            agree(suite, &what, &got, &want, bound_of(dtype, 1.0))?;
            agree(suite, &what, &got_inv, &inv, (Dtype::F32, Bound::roundings(4.0)))?;
        }
    }
    suite.case("dtypes, rms_norm_backward");
    let mut dw = backend.zeros(1, cols, Dtype::F32)?;
    let want = backend.rms_norm_backward(&dy.wide, &x.wide, &w, &inv, Some(&mut dw), None)?;
    let added = Some(copy(suite, &onto.wide)?);
    let sum = backend.rms_norm_backward(&dy.wide, &x.wide, &w, &inv, None, added)?;
    for x in each(&x) {
        for dy in each(&dy) {
            let what = format!("[{rows}, {cols}], {} by {}", dy.dtype(), x.dtype());
            let mut got_dw = backend.zeros(1, cols, Dtype::F32)?;
            let got = backend.rms_norm_backward(dy, x, &w, &inv, Some(&mut got_dw), None)?;
            agree(suite, &what, &got, &want, bound_of(x.dtype(), 1.0))?;
            let bound = (Dtype::F32, Bound::roundings(8.0).at_least(1.0));
            agree(suite, &format!("{what}, dw"), &got_dw, &dw, bound)?;
            let onto = if x.dtype() == Dtype::F32 { &onto.wide } else { &onto.narrow };
            let onto = Some(copy(suite, onto)?);
            let got = backend.rms_norm_backward(dy, x, &w, &inv, None, onto)?;
            agree(suite, &format!("{what}, onto"), &got, &sum, bound_of(x.dtype(), 1.0))?;
            let mut got = copy(suite, dy)?;
            backend.rms_norm_backward_in_place(got.view_mut(), x.view(), &w, &inv, None)?;
            agree(suite, &format!("{what}, in place"), &got, &want, bound_of(dy.dtype(), 1.0))?;
        }
    }
    Ok(())
}

fn rows<B: Backend>(suite: &mut Suite<'_, B>, cols: usize) -> Result<()> {
    const ROWS: usize = 11;
    let (x, y) = (random(suite, ROWS, cols)?, random(suite, 3, cols)?);
    let what = format!("{cols} columns, f32 onto bf16");
    let backend = suite.backend;
    suite.case("dtypes, rows");
    // f32 rows added to bf16 ones.
    let plan = ScatterPlan::upload(&ScatterRows::new(&[2, 0, 2, 1, 2, 2, 2, 0, 2, 1, 2]), backend)?;
    let (mut got, mut want) = (copy(suite, &y.narrow)?, copy(suite, &y.wide)?);
    backend.scatter_add_rows(&x.wide, &plan, &mut got)?;
    backend.scatter_add_rows(&x.wide, &plan, &mut want)?;
    agree(suite, &what, &got, &want, bound_of(Dtype::Bf16, 11.0))
}

/// Products of f32 operands that are added to bf16 matrices.
fn products<B: Backend>(
    suite: &mut Suite<'_, B>,
    (n, input, output): (usize, usize, usize),
) -> Result<()> {
    let (x, w) = (random(suite, n, input)?, random(suite, output, input)?);
    let onto = random(suite, n, output)?;
    let backend = suite.backend;
    let weight = backend.prepare(copy(suite, &w.wide)?, WeightUse::Frozen(Dtype::F32))?;
    let epilogue = Epilogue { bias: None, residual: Some(&onto.wide) };
    let want = backend.linear(x.wide.view(), weight.view(), 1.0, epilogue)?;
    let epilogue = Epilogue { bias: None, residual: Some(&onto.narrow) };
    let got = backend.linear(x.wide.view(), weight.view(), 1.0, epilogue)?;
    let bound = (Dtype::Bf16, roundings(1.1).at_least((input as f64).sqrt()));
    suite.case("dtypes, linear");
    agree(suite, &format!("n {n}, {input} -> {output}"), &got, &want, bound)
}

/// Products of equal shapes whose results have different dtypes, or whose rows are at different distances: a backend
/// that chooses an algorithm by the shapes must not confuse them.
fn equal_shapes<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    let (n, input, output, aside) = (17, 64, 48, 128);
    let (x, w) = (random(suite, n, input)?, random(suite, output, input)?);
    let bias = suite.random(1, output);
    let backend = suite.backend;
    let bias = suite.tensor(&bias)?;
    let zeros = backend.zeros(1, output, Dtype::F32)?;
    let weight = backend.prepare(copy(suite, &w.narrow)?, WeightUse::Frozen(Dtype::Bf16))?;
    let wide = backend.prepare(copy(suite, &w.wide)?, WeightUse::Frozen(Dtype::F32))?;
    let mut block = backend.zeros(n, aside + input, Dtype::Bf16)?;
    let columns = aside..aside + input;
    backend.copy(x.narrow.view(), block.view_mut().with_cols(columns.clone()))?;
    let bound = (Dtype::Bf16, roundings(1.1).at_least((input as f64).sqrt()));
    suite.case("dtypes, products of equal shapes");
    for (what, bias) in [("without a bias", &zeros), ("with a bias", &bias)] {
        // Bias and product are rounded once, so that the product itself is f32.
        let epilogue = || Epilogue { bias: Some(bias.view()), residual: None };
        let want = backend.linear(x.wide.view(), wide.view(), 1.0, epilogue())?;
        let got = backend.linear(x.narrow.view(), weight.view(), 1.0, epilogue())?;
        agree(suite, &format!("{what}, f32 product"), &got, &want, bound)?;
    }
    let want = backend.linear(x.wide.view(), wide.view(), 1.0, Epilogue::default())?;
    // The weight is converted for this product.
    let got = backend.linear(x.wide.view(), weight.view(), 1.0, Epilogue::default())?;
    let exact = (Dtype::F32, Bound::sum(input).at_least((input as f64).sqrt()));
    agree(suite, "a bf16 weight, f32", &got, &want, exact)?;
    for (what, x) in [("a matrix", x.narrow.view()), ("a block", block.view().with_cols(columns))] {
        let got = backend.linear(x, weight.view(), 1.0, Epilogue::default())?;
        agree(suite, what, &got, &want, bound)?;
    }
    Ok(())
}
