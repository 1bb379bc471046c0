//! Checks of the products of a linear layer, and of scores.

use super::case::Case;
use super::reference::{self, Matrix};
use super::suite::{Bound, Suite, inner, inner_mut};
use crate::Result;
use crate::backend::{Accumulate, Backend, Epilogue, Shape};

/// Rows, input and output features.
type Dims = (usize, usize, usize);

/// The last is large enough that products are split among threads.
const SHAPES: [Dims; 9] = [
    (1, 1, 1),
    (1, 17, 33),
    (3, 1, 65),
    (65, 130, 1),
    (33, 65, 17),
    (0, 17, 33),
    (17, 130, 64),
    (130, 33, 130),
    (270, 390, 131),
];

/// Small enough for finite differences of every coordinate.
const DIFFERENCED: [Dims; 5] = [(1, 1, 1), (1, 17, 3), (17, 1, 5), (5, 3, 1), (9, 17, 11)];

/// `linear` and its gradients with respect to input, weight and bias, `lora`, and `scores`.
///
/// # Errors
/// Errors of the backend are returned unchanged.
pub fn products<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    for dims in SHAPES {
        forward(&mut suite, dims)?;
        backward(&mut suite, dims)?;
    }
    for dims in SHAPES {
        views(&mut suite, dims)?;
        scores(&mut suite, dims)?;
    }
    for dims in DIFFERENCED {
        differences(&mut suite, dims)?;
    }
    Ok(suite.finish())
}

fn forward<B: Backend>(suite: &mut Suite<'_, B>, (n, input, output): Dims) -> Result<()> {
    let x = suite.random(n, input);
    let w = suite.random(output, input);
    let bias = suite.random(1, output);
    let residual = suite.random(n, output);
    let product = reference::linear(&x, &w, None, None);
    for (with_bias, with_residual) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut want = product.clone();
        if with_bias {
            want = want.plus(&Matrix::from_fn(n, output, |_, j| bias.row(0)[j]));
        }
        if with_residual {
            want = want.plus(&residual);
        }
        let bias = suite.optional_tensor(with_bias.then_some(&bias))?;
        let residual = suite.optional_tensor(with_residual.then_some(&residual))?;
        let epilogue =
            Epilogue { bias: bias.as_ref().map(Shape::view), residual: residual.as_ref() };
        let (x, w) = (suite.tensor(&x)?, suite.weight(&w)?);
        let y = suite.backend.linear(x.view(), w.view(), 1.0, epilogue)?;
        let what = format!(
            "[{n}, {input}] by [{output}, {input}], bias {with_bias}, residual {with_residual}"
        );
        suite.case("linear").check(&what, &y, &want, Bound::sum(input))?;
    }
    Ok(())
}

fn backward<B: Backend>(suite: &mut Suite<'_, B>, (n, input, output): Dims) -> Result<()> {
    let x = suite.random(n, input);
    let w = suite.random(output, input);
    let dy = suite.random(n, output);
    let backend = suite.backend;
    let (x_on, w_on, dy_on) = (suite.tensor(&x)?, suite.weight(&w)?, suite.tensor(&dy)?);

    let dx = reference::product(&dy, &w);
    let onto = suite.random(n, input);
    for before in [None, Some(&onto)] {
        let what = format!("[{n}, {output}] by [{output}, {input}], onto {}", before.is_some());
        let onto = suite.optional_tensor(before)?;
        let got = backend.linear_input_grad(dy_on.view(), w_on.view(), -1.5, onto)?;
        let want = dx.clone().map(|dx| -1.5 * dx);
        let want = before.map_or(want.clone(), |onto| want.clone().plus(onto));
        suite.case("linear_input_grad").check(&what, &got, &want, Bound::sum(output))?;
    }

    // Twice, into a buffer that is not zero: gradients accumulate over calls.
    let what = format!("[{output}, {n}] by [{n}, {input}] twice");
    let before = suite.random(output, input);
    let mut dw = suite.tensor(&before)?;
    backend.linear_weight_grad(dy_on.view(), x_on.view(), dw.view_mut(), Accumulate::Add)?;
    backend.linear_weight_grad(dy_on.view(), x_on.view(), dw.view_mut(), Accumulate::Add)?;
    let once = reference::product(&dy.transposed(), &x);
    let want = before.plus(&once).plus(&once);
    suite.case("linear_weight_grad").check(&what, &dw, &want, Bound::sum(2 * n))?;
    let mut dw = suite.tensor(&once.clone().map(|_| f64::NAN))?;
    backend.linear_weight_grad(dy_on.view(), x_on.view(), dw.view_mut(), Accumulate::Overwrite)?;
    suite.check(&format!("{what}, then overwritten"), &dw, &once, Bound::sum(n))?;

    let what = format!("[{n}, {output}] twice");
    let before = suite.random(1, output);
    let mut db = suite.tensor(&before)?;
    backend.linear_bias_grad(dy_on.view(), db.view_mut(), Accumulate::Add)?;
    backend.linear_bias_grad(dy_on.view(), db.view_mut(), Accumulate::Add)?;
    let once = reference::sum_of_rows(&dy);
    let want = before.plus(&once).plus(&once);
    suite.case("linear_bias_grad").check(&what, &db, &want, Bound::sum(2 * n))?;
    let mut db = suite.tensor(&once.clone().map(|_| f64::NAN))?;
    backend.linear_bias_grad(dy_on.view(), db.view_mut(), Accumulate::Overwrite)?;
    suite.check(&format!("{what}, then overwritten"), &db, &once, Bound::sum(n))
}

/// The same on blocks of larger matrices, with scale factors.
fn views<B: Backend>(suite: &mut Suite<'_, B>, (n, input, output): Dims) -> Result<()> {
    let what = format!("[{n}, {input}] by [{output}, {input}]");
    let (x, dy) = (suite.random(n, input), suite.random(n, output));
    let (w, bias) = (suite.random(output + 4, input), suite.random(1, output));
    let rows = 3..3 + output;
    let block = Matrix::from_fn(output, input, |i, j| w.row(i + 3)[j]);
    let backend = suite.backend;
    let (x_on, dy_on) = (suite.padded(&x)?, suite.padded(&dy)?);
    let (w_on, bias_on) = (suite.weight(&w)?, suite.padded(&bias)?);
    let w_on = w_on.view().with_rows(rows);
    let scaled = |x: Matrix| x.map(|x| 0.75 * x);
    let product = reference::linear(&x, &block, None, None);

    let epilogue = Epilogue { bias: Some(inner(&bias_on)), residual: None };
    let y = backend.linear(inner(&x_on), w_on, 0.75, epilogue)?;
    let want = scaled(product.clone()).plus(&Matrix::from_fn(n, output, |_, j| bias.row(0)[j]));
    suite.case("linear on views").check(&what, &y, &want, Bound::sum(input))?;

    let before = suite.random(n, output);
    let mut y = suite.padded(&before)?;
    backend.linear_add(inner(&x_on), w_on, inner_mut(&mut y))?;
    let want = product.plus(&before);
    let bound = Bound::sum(input).at_least(1.0);
    suite.case("linear_add").check_inner(&what, &y, &want, bound)?;

    let dx = backend.linear_input_grad(inner(&dy_on), w_on, 0.75, None)?;
    let want = scaled(reference::product(&dy, &block));
    suite.case("linear_input_grad on views").check(&what, &dx, &want, Bound::sum(output))?;

    let before = suite.random(output, input);
    let once = reference::product(&dy.transposed(), &x);
    for accumulate in [Accumulate::Add, Accumulate::Overwrite] {
        let mut dw = suite.padded(&before)?;
        let (dy, x) = (inner(&dy_on), inner(&x_on));
        backend.linear_weight_grad(dy, x, inner_mut(&mut dw), accumulate)?;
        let want = match accumulate {
            Accumulate::Add => once.clone().plus(&before),
            Accumulate::Overwrite => once.clone(),
        };
        let bound = Bound::sum(n + 1);
        suite.case("linear_weight_grad on views").check_inner(&what, &dw, &want, bound)?;
    }
    let mut db = suite.padded(&bias)?;
    backend.linear_bias_grad(inner(&dy_on), inner_mut(&mut db), Accumulate::Add)?;
    let want = bias.plus(&reference::sum_of_rows(&dy));
    suite.case("linear_bias_grad on views").check_inner(&what, &db, &want, Bound::sum(n + 1))?;

    let (a, b) = (suite.random(5, input), suite.random(output, 5));
    let before = suite.random(n, output);
    let mut y = suite.padded(&before)?;
    let (a_on, b_on) = (suite.weight(&a)?, suite.weight(&b)?);
    let hidden = backend.lora(inner(&x_on), (&a_on, &b_on), 0.75, inner_mut(&mut y))?;
    let want_hidden = scaled(reference::linear(&x, &a, None, None));
    let want = reference::linear(&want_hidden, &b, None, None).plus(&before);
    let size = (input as f64).sqrt();
    suite.case("lora, hidden").check(&what, &hidden, &want_hidden, Bound::sum(input))?;
    suite.case("lora").check_inner(&what, &y, &want, Bound::sum(input + 5).at_least(size))
}

/// Between n queries and `output` passages of `input` features.
fn scores<B: Backend>(suite: &mut Suite<'_, B>, (n, input, output): Dims) -> Result<()> {
    let what = format!("[{n}, {input}] by [{output}, {input}]");
    let (q, p, ds) = (suite.random(n, input), suite.random(output, input), suite.random(n, output));
    let backend = suite.backend;
    let [q_on, p_on, ds_on] = [suite.tensor(&q)?, suite.tensor(&p)?, suite.tensor(&ds)?];
    let scaled = |x: Matrix| x.map(|x| 50.0 * x);
    let got = backend.scores(&q_on, &p_on, 50.0)?;
    let want = scaled(reference::linear(&q, &p, None, None));
    suite.case("scores").check(&what, &got, &want, Bound::sum(input).at_least(50.0))?;
    let (dq, dp) = backend.scores_backward(&ds_on, &q_on, &p_on, 50.0)?;
    let want = scaled(reference::product(&ds, &p));
    suite.case("scores_backward, q").check(&what, &dq, &want, Bound::sum(output).at_least(50.0))?;
    let want = scaled(reference::product(&ds.transposed(), &q));
    suite.case("scores_backward, p").check(&what, &dp, &want, Bound::sum(n).at_least(50.0))
}

/// The initial value of a gradient stands for a second path to the same input, with the objective `onto∘x`.
fn differences<B: Backend>(suite: &mut Suite<'_, B>, (n, input, output): Dims) -> Result<()> {
    let x = suite.random(n, input);
    let w = suite.random(output, input);
    let bias = suite.random(1, output);
    let dy = suite.random(n, output);
    let [onto_x, onto_w, onto_bias] =
        [suite.random(n, input), suite.random(output, input), suite.random(1, output)];
    let backend = suite.backend;
    let (x_on, w_on, dy_on) = (suite.tensor(&x)?, suite.weight(&w)?, suite.tensor(&dy)?);
    let y = |x: &Matrix, w: &Matrix, bias: &Matrix| reference::linear(x, w, Some(bias), None);
    let what = format!("[{n}, {input}] by [{output}, {input}]");

    let onto = Some(suite.tensor(&onto_x)?);
    let dx = backend.linear_input_grad(dy_on.view(), w_on.view(), 1.0, onto)?;
    suite.case("linear_input_grad by finite differences").check_gradient(
        &what,
        &dx,
        &x,
        Bound::sum(output),
        |x| dy.dot(&y(x, &w, &bias)) + onto_x.dot(x),
    )?;
    let mut dw = suite.tensor(&onto_w)?;
    backend.linear_weight_grad(dy_on.view(), x_on.view(), dw.view_mut(), Accumulate::Add)?;
    suite.case("linear_weight_grad by finite differences").check_gradient(
        &what,
        &dw,
        &w,
        Bound::sum(n),
        |w| dy.dot(&y(&x, w, &bias)) + onto_w.dot(w),
    )?;
    let mut db = suite.tensor(&onto_bias)?;
    backend.linear_bias_grad(dy_on.view(), db.view_mut(), Accumulate::Add)?;
    suite.case("linear_bias_grad by finite differences").check_gradient(
        &what,
        &db,
        &bias,
        Bound::sum(n),
        |bias| dy.dot(&y(&x, &w, bias)) + onto_bias.dot(bias),
    )
}
