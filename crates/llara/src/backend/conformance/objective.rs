//! Checks of the loss, of clipping and of AdamW.

use std::ops::Range;

use super::case::Case;
use super::masks_and_distillation::{distillation, mask_scores};
use super::reference::{self, Matrix};
use super::sets::set_cross_entropy;
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{AdamWStep, Backend, Dtype, Epilogue, PreparedWeight, Shape, WeightUse};

/// `cross_entropy`, `mask_scores`, `distillation`, `set_cross_entropy`, `add_sum_of_squares`, `clip_factor` and `adamw`.
///
/// # Errors
/// Errors of the backend are returned unchanged.
pub fn objective<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    for shape in [(1, 1), (1, 17), (17, 1), (33, 65), (17, 130), (130, 520)] {
        for magnitude in [1.0, 50.0, 1e4] {
            let scores = suite.random(shape.0, shape.1).map(|s| s * magnitude).rounded();
            cross_entropy(&mut suite, &scores)?;
        }
        // Scores of the same size: the result depends on their small differences.
        for shift in [1e4, -1e4] {
            let scores = suite.random(shape.0, shape.1).map(|s| s + shift).rounded();
            cross_entropy(&mut suite, &scores)?;
        }
    }
    for shape in [(1, 1), (1, 17), (65, 33), (0, 5), (130, 400)] {
        sum_of_squares(&mut suite, shape)?;
    }
    clip_factor(&mut suite)?;
    for shape in [(1, 1), (17, 33), (130, 140)] {
        for max_norm in [None, Some(0.5), Some(1e4)] {
            adamw(&mut suite, shape, max_norm)?;
        }
    }
    part_of_a_weight(&mut suite)?;
    for ends in [(0, 1), (5, 6), (33, 66), (100, 561), (0, 561)] {
        part_of_a_parameter(&mut suite, ends.0..ends.1)?;
    }
    failed_step(&mut suite)?;
    mask_scores(&mut suite)?;
    distillation(&mut suite)?;
    set_cross_entropy(&mut suite)?;
    Ok(suite.finish())
}

fn cross_entropy<B: Backend>(suite: &mut Suite<'_, B>, scores: &Matrix) -> Result<()> {
    let (rows, cols) = scores.shape();
    let magnitude = scores.max_abs();
    let what = format!("[{rows}, {cols}], scores to {magnitude:.1}");
    let targets = suite.indices(rows, cols);
    let targets_on = suite.index(&targets)?;
    let (loss, dscores) = suite.backend.cross_entropy(&suite.tensor(scores)?, &targets_on)?;

    let want = Matrix::from_fn(1, 1, |_, _| reference::cross_entropy(scores, &targets));
    // The scores are exact, but the rounding error of their differences is relative to the size of the scores.
    let bound = Bound::roundings(16.0).at_least(1.0 + magnitude);
    suite.case("cross_entropy, loss").check(&what, &loss, &want, bound)?;
    let bound = Bound::roundings(16.0 + magnitude).at_least(1.0 / rows as f64);
    let want = reference::cross_entropy_grad(scores, &targets);
    suite.case("cross_entropy, gradient").check(&what, &dscores, &want, bound)?;
    suite.case("cross_entropy, gradient by finite differences").check_gradient(
        &what,
        &dscores,
        scores,
        // A finite difference contains the rounding error of the loss.
        Bound::roundings(16.0 + 2.0 * magnitude).at_least(1.0 / rows as f64),
        |scores| reference::cross_entropy(scores, &targets),
    )
}

fn sum_of_squares<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols): (usize, usize),
) -> Result<()> {
    let (first, second) = (suite.random(rows, cols), suite.random(3, 17));
    let mut sum = suite.backend.zeros(1, 1, Dtype::F32)?;
    suite.backend.add_sum_of_squares(&suite.tensor(&first)?, 0..rows * cols, &mut sum)?;
    suite.backend.add_sum_of_squares(&suite.tensor(&second)?, 0..51, &mut sum)?;
    let want = Matrix::from_fn(1, 1, |_, _| first.dot(&first) + second.dot(&second));
    let bound = Bound::roundings(8.0 + ((rows * cols) as f64).sqrt());
    let what = format!("[{rows}, {cols}], then [3, 17]");
    suite.case("add_sum_of_squares").check(&what, &sum, &want, bound)?;
    let range = rows * cols / 3..rows * cols - rows * cols / 4;
    let mut sum = suite.backend.zeros(1, 1, Dtype::F32)?;
    suite.backend.add_sum_of_squares(&suite.tensor(&first)?, range.clone(), &mut sum)?;
    let of_range = first.data[range].iter().map(|x| x * x).sum();
    let want = Matrix::from_fn(1, 1, |_, _| of_range);
    suite.check(&format!("a part of [{rows}, {cols}]"), &sum, &want, bound)
}

fn clip_factor<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    suite.case("clip_factor");
    for sum in [0.0, 1e-8, 0.25, 1.0, 9.0, 1e10] {
        for max_norm in [None, Some(0.5f32), Some(1.0), Some(1e3)] {
            let sum = Matrix::from_fn(1, 1, |_, _| sum).rounded();
            let clip = suite.backend.clip_factor(&suite.tensor(&sum)?, max_norm)?;
            let norm = sum.data[0].sqrt();
            let factor = factor_of(norm, max_norm);
            let want = Matrix { rows: 1, cols: 2, data: vec![norm, factor] };
            let what = format!("sum {:e}, limit {max_norm:?}", sum.data[0]);
            suite.check(&what, &clip, &want, Bound::roundings(4.0))?;
        }
    }
    for sum in [f64::NAN, f64::INFINITY] {
        let sum_on = suite.tensor(&Matrix::from_fn(1, 1, |_, _| sum))?;
        let clip = suite.backend.clip_factor(&sum_on, Some(1.0))?;
        let norm = suite.read(&clip)?[0];
        suite.require(&format!("norm of sum {sum} is not finite"), !norm.is_finite());
    }
    Ok(())
}

fn factor_of(norm: f64, max_norm: Option<f32>) -> f64 {
    max_norm.map_or(1.0, |max_norm| (f64::from(max_norm) / (norm + 1e-6)).min(1.0))
}

/// Hyperparameters of update `step`. Epsilon is of the order of the gradients and the weight decay is large,
/// so that a missing term fails the check.
fn hyperparameters(step: u64) -> AdamWStep {
    AdamWStep {
        learning_rate: 0.05 / step as f64,
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 0.1,
        weight_decay: 0.3,
        step,
    }
}

/// Five updates, with the gradient norm clipped as in a training step.
fn adamw<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols): (usize, usize),
    max_norm: Option<f32>,
) -> Result<()> {
    let backend = suite.backend;
    let mut want = reference::AdamW::new(suite.random(rows, cols));
    let mut param = trainable(suite, &want.param)?;
    let mut first = backend.zeros(rows, cols, Dtype::F32)?;
    let mut second = backend.zeros(rows, cols, Dtype::F32)?;
    for step in 1..=5 {
        let grad = suite.random(rows, cols);
        let grad_on = suite.tensor(&grad)?;
        let mut sum = backend.zeros(1, 1, Dtype::F32)?;
        let all = 0..rows * cols;
        backend.add_sum_of_squares(&grad_on, all.clone(), &mut sum)?;
        let clip = backend.clip_factor(&sum, max_norm)?;
        let hyper = hyperparameters(step);
        backend.adamw(&mut param, all, &grad_on, (&mut first, &mut second), &clip, &hyper)?;
        let factor = factor_of(grad.dot(&grad).sqrt(), max_norm);
        want.update(&grad, factor, &hyper);

        // Every element contains the rounding error of the long sum through the clipping factor.
        let rounding = 8.0 + ((rows * cols) as f64).sqrt();
        let what = format!("[{rows}, {cols}], limit {max_norm:?}, step {step}");
        let bound = Bound::roundings(8.0 + 4.0 * step as f64);
        suite.case("adamw").check(&what, param.values(), &want.param, bound)?;
        let bound = Bound::roundings(rounding).at_least(0.1 * factor * grad.max_abs());
        suite.case("adamw, first moment").check(&what, &first, &want.first, bound)?;
        let bound = Bound::roundings(2.0 * rounding);
        suite.case("adamw, second moment").check(&what, &second, &want.second, bound)?;
    }
    Ok(())
}

/// Updating a range of a parameter gives the same bits as updating all of it; other elements do not change.
fn part_of_a_parameter<B: Backend>(suite: &mut Suite<'_, B>, range: Range<usize>) -> Result<()> {
    const SHAPE: (usize, usize) = (17, 33);
    let backend = suite.backend;
    let (param, grad) = (suite.random(SHAPE.0, SHAPE.1), suite.random(SHAPE.0, SHAPE.1));
    let grad_on = suite.tensor(&grad)?;
    let mut sum = backend.zeros(1, 1, Dtype::F32)?;
    backend.add_sum_of_squares(&grad_on, range.clone(), &mut sum)?;
    let squares = grad.data[range.clone()].iter().map(|x| x * x).sum();
    let bound = Bound::roundings(8.0 + (range.len() as f64).sqrt());
    suite.case("add_sum_of_squares, of a range").check(
        &format!("{range:?}"),
        &sum,
        &Matrix::from_fn(1, 1, |_, _| squares),
        bound,
    )?;
    let clip = backend.clip_factor(&sum, None)?;
    let [mut whole, mut part] = [trainable(suite, &param)?, trainable(suite, &param)?];
    let mut moments = [
        backend.zeros(SHAPE.0, SHAPE.1, Dtype::F32)?,
        backend.zeros(SHAPE.0, SHAPE.1, Dtype::F32)?,
    ];
    let mut part_moments =
        [backend.zeros(1, range.len(), Dtype::F32)?, backend.zeros(1, range.len(), Dtype::F32)?];
    for step in 1..=2 {
        let update = hyperparameters(step);
        let [first, second] = &mut moments;
        backend.adamw(&mut whole, 0..561, &grad_on, (first, second), &clip, &update)?;
        let [first, second] = &mut part_moments;
        backend.adamw(&mut part, range.clone(), &grad_on, (first, second), &clip, &update)?;
    }
    let of = |tensor: &B::Tensor| -> Result<Vec<f64>> {
        Ok(backend.read_elements(tensor, 0..561)?.into_iter().map(f64::from).collect())
    };
    let mut want = param.data;
    want[range.clone()].copy_from_slice(&of(whole.values())?[range.clone()]);
    let want = Matrix { rows: SHAPE.0, cols: SHAPE.1, data: want };
    suite.case("adamw, of a range").check(
        &format!("{range:?}"),
        part.values(),
        &want,
        Bound::EXACT,
    )?;
    for (name, whole, part) in
        [("first", &moments[0], &part_moments[0]), ("second", &moments[1], &part_moments[1])]
    {
        let data = of(whole)?[range.clone()].to_vec();
        let want = Matrix { rows: 1, cols: range.len(), data };
        suite.check(&format!("{range:?}, {name} moment"), part, &want, Bound::EXACT)?;
    }

    let written: Vec<f32> = (0..range.len()).map(|i| i as f32).collect();
    let mut part = part.into_values();
    let mut want = backend.read_elements(&part, 0..561)?;
    backend.write_elements(&mut part, range.start, &written)?;
    want[range.clone()].copy_from_slice(&written);
    let data = want.into_iter().map(f64::from).collect();
    let want = Matrix { rows: SHAPE.0, cols: SHAPE.1, data };
    suite.case("write_elements").check(&format!("{range:?}"), &part, &want, Bound::EXACT)
}

/// A gradient that is not finite must leave parameters and moments exactly as they were.
fn failed_step<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    let backend = suite.backend;
    let (param, first) = (suite.random(17, 33), suite.random(17, 33));
    let second = suite.random(17, 33).map(f64::abs);
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e30] {
        for max_norm in [None, Some(1.0)] {
            let mut grad = suite.random(17, 33);
            grad.data[100] = bad;
            let grad = suite.tensor(&grad)?;
            let mut sum = backend.zeros(1, 1, Dtype::F32)?;
            let all = 0..17 * 33;
            backend.add_sum_of_squares(&grad, all.clone(), &mut sum)?;
            let clip = backend.clip_factor(&sum, max_norm)?;
            let mut param_on = trainable(suite, &param)?;
            let mut moments = [suite.tensor(&first)?, suite.tensor(&second)?];
            let [first_on, second_on] = &mut moments;
            let hyper = hyperparameters(3);
            backend.adamw(&mut param_on, all, &grad, (first_on, second_on), &clip, &hyper)?;
            let after = [param_on.values(), &moments[0], &moments[1]];
            suite.case("adamw, norm not finite");
            for (name, (after, before)) in ["parameters", "first moment", "second moment"]
                .into_iter()
                .zip(after.into_iter().zip([&param, &first, &second]))
            {
                let what = format!("{name} after a gradient of {bad}, limit {max_norm:?}");
                suite.check(&what, after, before, Bound::EXACT)?;
            }
        }
    }
    Ok(())
}

fn trainable<B: Backend>(suite: &Suite<'_, B>, x: &Matrix) -> Result<B::Weight> {
    suite.backend.prepare(suite.tensor(x)?, WeightUse::Trainable(Dtype::F32))
}

/// One update of a part of a weight: the rest does not change, and products use the new values in
/// either precision.
fn part_of_a_weight<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    let backend = suite.backend;
    let (rows, cols) = (17, 40);
    let part = 123..456;
    let param = suite.random(rows, cols);
    let grad = suite.random(rows, cols);
    let x = suite.random(9, cols);
    // A step so large that products with the old values are wrong by more than their rounding.
    let hyper = AdamWStep { learning_rate: 0.5, ..hyperparameters(1) };
    let mut want = reference::AdamW::new(param.clone());
    want.update(&grad, 1.0, &hyper);
    for at in (0..rows * cols).filter(|at| !part.contains(at)) {
        want.param.data[at] = param.data[at];
    }
    let clip = suite.tensor(&Matrix::from_fn(1, 2, |_, _| 1.0))?;
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let what = format!("elements {part:?} of [{rows}, {cols}], products in {dtype}");
        let mut weight = backend.prepare(suite.tensor(&param)?, WeightUse::Trainable(dtype))?;
        let mut first = backend.zeros(1, part.len(), Dtype::F32)?;
        let mut second = backend.zeros(1, part.len(), Dtype::F32)?;
        let grad = suite.tensor(&grad)?;
        let moments = (&mut first, &mut second);
        backend.adamw(&mut weight, part.clone(), &grad, moments, &clip, &hyper)?;
        let bound = Bound::roundings(12.0);
        suite.case("adamw, a part").check(&what, weight.values(), &want.param, bound)?;
        let x_on = backend.cast(&suite.tensor(&x)?, dtype)?;
        let y = backend.linear(x_on.view(), weight.view(), 1.0, Epilogue::default())?;
        let want = reference::linear(&x, &want.param, None, None);
        let coarser = if dtype == Dtype::Bf16 { f64::from(1 << 16) } else { 4.0 };
        let bound = Bound::roundings(4.0 * coarser).at_least((cols as f64).sqrt());
        suite.case("linear after adamw").check(&what, &y, &want, bound)?;
    }
    Ok(())
}
