//! Checks of the products of a linear layer.

use super::Case;
use super::plain::{self, Matrix};
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{Accumulate, Backend};

/// Rows, input and output features.
type Dims = (usize, usize, usize);

/// The last is large enough for products to be shared among threads.
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

/// Small enough for every coordinate to be differenced.
const DIFFERENCED: [Dims; 5] = [(1, 1, 1), (1, 17, 3), (17, 1, 5), (5, 3, 1), (9, 17, 11)];

/// `linear` and its gradients by input, weight and bias.
///
/// # Errors
/// What the backend itself reports.
pub fn products<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    for dims in SHAPES {
        forward(&mut suite, dims)?;
        backward(&mut suite, dims)?;
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
    let product = plain::linear(&x, &w, None, None);
    let y = suite.backend.linear_onto(
        &suite.tensor(&x)?,
        &suite.tensor(&w)?,
        suite.tensor(&residual)?,
    )?;
    let what = format!("{n} x {input} to {output}");
    let want = product.clone().plus(&residual);
    suite.case("linear_onto").check(&what, &y, &want, Bound::sum(input).at_least(1.0))?;
    for (with_bias, with_residual) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut want = product.clone();
        if with_bias {
            want = want.plus(&Matrix::from_fn(n, output, |_, j| bias.row(0)[j]));
        }
        if with_residual {
            want = want.plus(&residual);
        }
        let bias = suite.maybe(with_bias.then_some(&bias))?;
        let residual = suite.maybe(with_residual.then_some(&residual))?;
        let y = suite.backend.linear(
            &suite.tensor(&x)?,
            &suite.tensor(&w)?,
            bias.as_ref(),
            residual.as_ref(),
        )?;
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
    let [x_on, w_on, dy_on] = [suite.tensor(&x)?, suite.tensor(&w)?, suite.tensor(&dy)?];

    let dx = plain::product(&dy, &w);
    let onto = suite.random(n, input);
    for before in [None, Some(&onto)] {
        let what = format!("[{n}, {output}] by [{output}, {input}], onto {}", before.is_some());
        let got = backend.linear_input_grad(&dy_on, &w_on, suite.maybe(before)?)?;
        let want = before.map_or(dx.clone(), |onto| dx.clone().plus(onto));
        suite.case("linear_input_grad").check(&what, &got, &want, Bound::sum(output))?;
    }

    // Twice, onto what is there already: a gradient gathers over calls.
    let what = format!("[{output}, {n}] by [{n}, {input}] twice");
    let before = suite.random(output, input);
    let mut dw = suite.tensor(&before)?;
    backend.linear_weight_grad(&dy_on, &x_on, &mut dw, Accumulate::Add)?;
    backend.linear_weight_grad(&dy_on, &x_on, &mut dw, Accumulate::Add)?;
    let once = plain::product(&dy.transposed(), &x);
    let want = before.plus(&once).plus(&once);
    suite.case("linear_weight_grad").check(&what, &dw, &want, Bound::sum(2 * n))?;
    let mut dw = suite.tensor(&once.clone().map(|_| f64::NAN))?;
    backend.linear_weight_grad(&dy_on, &x_on, &mut dw, Accumulate::Overwrite)?;
    suite.check(&format!("{what}, then overwritten"), &dw, &once, Bound::sum(n))?;

    let what = format!("[{n}, {output}] twice");
    let before = suite.random(1, output);
    let mut db = suite.tensor(&before)?;
    backend.linear_bias_grad(&dy_on, &mut db)?;
    backend.linear_bias_grad(&dy_on, &mut db)?;
    let once = plain::sum_of_rows(&dy);
    let want = before.plus(&once).plus(&once);
    suite.case("linear_bias_grad").check(&what, &db, &want, Bound::sum(2 * n))
}

/// A gradient that is there already is that of a second path, `onto∘x`, to the same input.
fn differences<B: Backend>(suite: &mut Suite<'_, B>, (n, input, output): Dims) -> Result<()> {
    let x = suite.random(n, input);
    let w = suite.random(output, input);
    let bias = suite.random(1, output);
    let dy = suite.random(n, output);
    let [onto_x, onto_w, onto_bias] =
        [suite.random(n, input), suite.random(output, input), suite.random(1, output)];
    let backend = suite.backend;
    let [x_on, w_on, dy_on] = [suite.tensor(&x)?, suite.tensor(&w)?, suite.tensor(&dy)?];
    let y = |x: &Matrix, w: &Matrix, bias: &Matrix| plain::linear(x, w, Some(bias), None);
    let what = format!("[{n}, {input}] by [{output}, {input}]");

    let dx = backend.linear_input_grad(&dy_on, &w_on, Some(suite.tensor(&onto_x)?))?;
    suite.case("linear_input_grad by differences").check_gradient(
        &what,
        &dx,
        &x,
        Bound::sum(output),
        |x| dy.dot(&y(x, &w, &bias)) + onto_x.dot(x),
    )?;
    let mut dw = suite.tensor(&onto_w)?;
    backend.linear_weight_grad(&dy_on, &x_on, &mut dw, Accumulate::Add)?;
    suite.case("linear_weight_grad by differences").check_gradient(
        &what,
        &dw,
        &w,
        Bound::sum(n),
        |w| dy.dot(&y(&x, w, &bias)) + onto_w.dot(w),
    )?;
    let mut db = suite.tensor(&onto_bias)?;
    backend.linear_bias_grad(&dy_on, &mut db)?;
    suite.case("linear_bias_grad by differences").check_gradient(
        &what,
        &db,
        &bias,
        Bound::sum(n),
        |bias| dy.dot(&y(&x, &w, bias)) + onto_bias.dot(bias),
    )
}
