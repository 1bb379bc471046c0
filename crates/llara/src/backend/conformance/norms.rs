//! Checks of the RMS norm and of L2 normalisation.

use super::case::Case;
use super::reference::{self, Matrix};
use super::suite::{Bound, Suite, inner, inner_mut};
use crate::Result;
use crate::backend::{Backend, Dtype, Shape};

/// `rms_norm`, `normalize` and their gradients.
///
/// # Errors
/// Errors of the backend are returned unchanged.
pub fn norms<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    // Rows, columns, columns of a group (a whole row or one head).
    for (rows, cols, group) in [
        (1, 1, 1),
        (3, 17, 17),
        (33, 65, 65),
        (5, 130, 65),
        (17, 64, 16),
        (4, 160, 80),
        (7, 6, 2),
        (0, 32, 16),
        (1, 1030, 1030),
        (260, 130, 130),
        (150, 512, 64),
    ] {
        rms_norm(&mut suite, (rows, cols, group))?;
        rms_norm_backward(&mut suite, (rows, cols, group))?;
    }
    for (rows, cols) in [(1, 1), (3, 17), (33, 65), (130, 64), (1, 1030), (9, 2), (270, 130)] {
        normalize(&mut suite, (rows, cols))?;
        normalize_backward(&mut suite, (rows, cols))?;
    }
    zero_rows(&mut suite)?;
    Ok(suite.finish())
}

/// Rows of different magnitudes: thousandths, where eps is most of the mean square; thousands; and every
/// fifth row is zero.
fn uneven(x: Matrix) -> Matrix {
    let cols = x.cols;
    let factors = [1.0, 1e-3, 30.0, 1e3, 0.0];
    Matrix::from_fn(x.rows, cols, |i, j| x.row(i)[j] * factors[i % factors.len()]).rounded()
}

fn rms_norm<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols, group): (usize, usize, usize),
) -> Result<()> {
    let x = uneven(suite.random(rows, cols));
    let w = suite.random(1, group);
    for eps in [1e-6f32, 1e-2] {
        let what = format!("[{rows}, {cols}] in groups of {group}, eps {eps}");
        let (x_on, w_on) = (suite.tensor(&x)?, suite.tensor(&w)?);
        let (y, inv_rms) = suite.backend.rms_norm(x_on.view(), &w_on, eps, Dtype::F32)?;
        let (want_y, want_inv) = reference::rms_norm(&x, &w, f64::from(eps));
        suite.case("rms_norm").check(&what, &y, &want_y, bound(group).by_row())?;
        suite.check(&format!("1 / rms of {what}"), &inv_rms, &want_inv, bound(group).by_row())?;
        let x_on = suite.padded(&x)?;
        let (y, _) = suite.backend.rms_norm(inner(&x_on), &w_on, eps, Dtype::F32)?;
        suite.check(&format!("{what}, a view"), &y, &want_y, bound(group).by_row())?;
    }
    Ok(())
}

/// With and without each of `dw` and `onto`; `dw` is computed twice, because it accumulates.
fn rms_norm_backward<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols, group): (usize, usize, usize),
) -> Result<()> {
    let eps = 1e-2f32;
    let x = suite.random(rows, cols);
    // Around a zero row, the norm is close to linear within the step of 1e-5 only if eps is large, as here.
    let x = Matrix::from_fn(rows, cols, |i, j| if i % 9 == 2 { 0.0 } else { x.row(i)[j] });
    let w = suite.random(1, group);
    let dy = suite.random(rows, cols);
    let (onto_x, onto_w) = (suite.random(rows, cols), suite.random(1, group));
    let [x_on, w_on, dy_on] = [suite.tensor(&x)?, suite.tensor(&w)?, suite.tensor(&dy)?];
    let (_, inv_rms) = suite.backend.rms_norm(x_on.view(), &w_on, eps, Dtype::F32)?;
    let y = |x: &Matrix, w: &Matrix| reference::rms_norm(x, w, f64::from(eps)).0;
    let (want_dx, want_dw) = reference::rms_norm_backward(&dy, &x, &w, f64::from(eps));

    for (with_dw, with_onto) in [(false, false), (true, false), (false, true), (true, true)] {
        let what = format!("[{rows}, {cols}] in groups of {group}, dw {with_dw}, onto {with_onto}");
        let mut dw = suite.optional_tensor(with_dw.then_some(&onto_w))?;
        let onto = suite.optional_tensor(with_onto.then_some(&onto_x))?;
        let backend = suite.backend;
        let dx = backend.rms_norm_backward(&dy_on, &x_on, &w_on, &inv_rms, dw.as_mut(), onto)?;
        let second_path = if with_onto { 1.0 } else { 0.0 };
        let want = want_dx.clone().plus(&onto_x.clone().map(|onto| onto * second_path));
        let bound_dx = bound(group).at_least(1.0);
        suite.case("rms_norm_backward").check(&what, &dx, &want, bound_dx)?;
        suite.case("rms_norm_backward by finite differences").check_gradient(
            &what,
            &dx,
            &x,
            bound_dx,
            |x| dy.dot(&y(x, &w)) + second_path * onto_x.dot(x),
        )?;
        if let Some(mut dw) = dw {
            backend.rms_norm_backward(&dy_on, &x_on, &w_on, &inv_rms, Some(&mut dw), None)?;
            let want = onto_w.clone().plus(&want_dw).plus(&want_dw);
            let bound = Bound::sum(2 * rows * cols / group);
            let what = format!("{what}, twice");
            suite.case("rms_norm_backward, weight").check(&what, &dw, &want, bound)?;
            suite.case("rms_norm_backward, weight, by finite differences").check_gradient(
                &what,
                &dw,
                &w,
                bound,
                |w| 2.0 * dy.dot(&y(&x, w)) + onto_w.dot(w),
            )?;
        }
    }
    let x_on = suite.padded(&x)?;
    let mut grad = suite.padded(&dy)?;
    let mut dw = suite.tensor(&onto_w)?;
    suite.backend.rms_norm_backward_in_place(
        inner_mut(&mut grad),
        inner(&x_on),
        &w_on,
        &inv_rms,
        Some(&mut dw),
    )?;
    let what = format!("[{rows}, {cols}] in groups of {group}");
    let bound_dx = bound(group).at_least(1.0);
    suite.case("rms_norm_backward_in_place").check_inner(&what, &grad, &want_dx, bound_dx)?;
    let want = onto_w.plus(&want_dw);
    let bound = Bound::sum(1 + rows * cols / group);
    suite.case("rms_norm_backward_in_place, weight").check(&what, &dw, &want, bound)
}

fn normalize<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let x = uneven(suite.random(rows, cols));
    let what = format!("[{rows}, {cols}]");
    let (y, inv_norm) = suite.backend.normalize(&suite.tensor(&x)?)?;
    let (want_y, want_inv) = reference::normalize(&x);
    suite.case("normalize").check(&what, &y, &want_y, bound(cols).by_row())?;
    suite.check(&format!("reciprocal norm of {what}"), &inv_norm, &want_inv, bound(cols).by_row())
}

fn normalize_backward<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols): (usize, usize),
) -> Result<()> {
    let x = suite.random(rows, cols);
    let dy = suite.random(rows, cols);
    let (y, inv_norm) = suite.backend.normalize(&suite.tensor(&x)?)?;
    let dx = suite.backend.normalize_backward(suite.tensor(&dy)?.view(), &y, &inv_norm)?;
    // The component along x cancels; the remainder has a rounding error of the order of dy / ‖x‖.
    let of_terms = dy.max_abs() * reference::normalize(&x).1.max_abs();
    let bound = bound(cols).at_least(of_terms);
    let what = format!("[{rows}, {cols}]");
    let want = reference::normalize_backward(&dy, &x);
    suite.case("normalize_backward").check(&what, &dx, &want, bound)?;
    suite.case("normalize_backward by finite differences").check_gradient(
        &what,
        &dx,
        &x,
        bound,
        |x| dy.dot(&reference::normalize(x).0),
    )
}

/// A zero row stays zero, and its gradient is finite, because the norm is at least 1e-12.
fn zero_rows<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    let dy = suite.random(2, 33);
    let (y, inv_norm) = suite.backend.normalize(&suite.tensor(&Matrix::zeros(2, 33))?)?;
    suite.case("normalize, zero rows").check("y", &y, &Matrix::zeros(2, 33), Bound::EXACT)?;
    let dx = suite.backend.normalize_backward(suite.tensor(&dy)?.view(), &y, &inv_norm)?;
    suite.check("gradient", &dx, &dy.map(|dy| dy * 1e12), Bound::roundings(8.0))
}

/// A mean of squares, all of the same sign, so the sum does not cancel; then a root and two products.
fn bound(terms: usize) -> Bound {
    Bound::roundings(8.0 + (terms as f64).sqrt())
}
