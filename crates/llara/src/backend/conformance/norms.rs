//! Checks of the RMS norm and of L2 normalisation.

use super::Case;
use super::plain::{self, Matrix};
use super::suite::{Bound, Suite, inner, inner_mut};
use crate::Result;
use crate::backend::{Backend, Dtype, Shape};

/// `rms_norm`, `normalize` and their gradients.
///
/// # Errors
/// What the backend itself reports.
pub fn norms<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    // Rows, columns, columns of a group: whole rows, or heads of them.
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
    null_vector(&mut suite)?;
    Ok(suite.finish())
}

/// Rows of all magnitudes: thousandths, where eps is most of the mean square; thousands; and every
/// fifth row zero.
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
        let (want_y, want_inv) = plain::rms_norm(&x, &w, f64::from(eps));
        suite.case("rms_norm").check(&what, &y, &want_y, bound(group).by_row())?;
        suite.check(&format!("1 / rms of {what}"), &inv_rms, &want_inv, bound(group).by_row())?;
        let x_on = suite.surrounded(&x)?;
        let (y, _) = suite.backend.rms_norm(inner(&x_on), &w_on, eps, Dtype::F32)?;
        suite.check(&format!("{what}, a view"), &y, &want_y, bound(group).by_row())?;
    }
    Ok(())
}

/// With and without each of `dw` and `onto`; `dw` twice, for it gathers.
fn rms_norm_backward<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols, group): (usize, usize, usize),
) -> Result<()> {
    let eps = 1e-2f32;
    let x = suite.random(rows, cols);
    // A zero row's gradient is far from linear within 1e-5 of it unless eps is large, as here.
    let x = Matrix::from_fn(rows, cols, |i, j| if i % 9 == 2 { 0.0 } else { x.row(i)[j] });
    let w = suite.random(1, group);
    let dy = suite.random(rows, cols);
    let (onto_x, onto_w) = (suite.random(rows, cols), suite.random(1, group));
    let [x_on, w_on, dy_on] = [suite.tensor(&x)?, suite.tensor(&w)?, suite.tensor(&dy)?];
    let (_, inv_rms) = suite.backend.rms_norm(x_on.view(), &w_on, eps, Dtype::F32)?;
    let y = |x: &Matrix, w: &Matrix| plain::rms_norm(x, w, f64::from(eps)).0;
    let (want_dx, want_dw) = plain::rms_norm_backward(&dy, &x, &w, f64::from(eps));

    for (with_dw, with_onto) in [(false, false), (true, false), (false, true), (true, true)] {
        let what = format!("[{rows}, {cols}] in groups of {group}, dw {with_dw}, onto {with_onto}");
        let mut dw = suite.maybe(with_dw.then_some(&onto_w))?;
        let onto = suite.maybe(with_onto.then_some(&onto_x))?;
        let backend = suite.backend;
        let dx = backend.rms_norm_backward(&dy_on, &x_on, &w_on, &inv_rms, dw.as_mut(), onto)?;
        let second_path = if with_onto { 1.0 } else { 0.0 };
        let want = want_dx.clone().plus(&onto_x.clone().map(|onto| onto * second_path));
        let bound_dx = bound(group).at_least(1.0);
        suite.case("rms_norm_backward").check(&what, &dx, &want, bound_dx)?;
        suite.case("rms_norm_backward by differences").check_gradient(
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
            suite.case("rms_norm_backward, weight, by differences").check_gradient(
                &what,
                &dw,
                &w,
                bound,
                |w| 2.0 * dy.dot(&y(&x, w)) + onto_w.dot(w),
            )?;
        }
    }
    let x_on = suite.surrounded(&x)?;
    let mut grad = suite.surrounded(&dy)?;
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
    let (want_y, want_inv) = plain::normalize(&x);
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
    // The part along x cancels; what it leaves is rounded by the size of dy / ‖x‖.
    let of_terms = dy.largest() * plain::normalize(&x).1.largest();
    let bound = bound(cols).at_least(of_terms);
    let what = format!("[{rows}, {cols}]");
    let want = plain::normalize_backward(&dy, &x);
    suite.case("normalize_backward").check(&what, &dx, &want, bound)?;
    suite
        .case("normalize_backward by differences")
        .check_gradient(&what, &dx, &x, bound, |x| dy.dot(&plain::normalize(x).0))
}

/// A zero row has no direction: it stays zero, and its gradient is finite, by the floor of the norm.
fn null_vector<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    let dy = suite.random(2, 33);
    let (y, inv_norm) = suite.backend.normalize(&suite.tensor(&Matrix::zeros(2, 33))?)?;
    suite.case("normalize, zero rows").check("y", &y, &Matrix::zeros(2, 33), Bound::EXACT)?;
    let dx = suite.backend.normalize_backward(suite.tensor(&dy)?.view(), &y, &inv_norm)?;
    suite.check("gradient", &dx, &dy.map(|dy| dy * 1e12), Bound::roundings(8.0))
}

/// A mean of squares, of one sign, so the sum does not cancel; then a root and two products.
fn bound(terms: usize) -> Bound {
    Bound::roundings(8.0 + (terms as f64).sqrt())
}
