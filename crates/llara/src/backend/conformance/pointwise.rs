//! Checks of the rotary embedding, SwiGLU and dropout.

use super::case::Case;
use super::reference::{self, Matrix};
use super::suite::{Bound, Suite, inner_mut};
use crate::Result;
use crate::backend::{Backend, DropoutKey, RopeDirection, RopeTable, Shape, TokenIds};

/// `rope`, `swiglu` and their gradients, and `dropout`.
///
/// # Errors
/// Errors of the backend are returned unchanged.
pub fn pointwise<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    // Rows, heads, features of a head.
    for (rows, heads, head_dim) in
        [(1, 1, 2), (17, 3, 16), (33, 2, 64), (65, 1, 80), (3, 7, 6), (0, 2, 16), (300, 4, 64)]
    {
        rope(&mut suite, (rows, heads, head_dim))?;
    }
    for shape in [(1, 1), (1, 17), (65, 1), (33, 130), (0, 17), (170, 130)] {
        for magnitude in [1.0, 50.0, 1e4] {
            swiglu(&mut suite, shape, magnitude)?;
        }
        dropout(&mut suite, shape)?;
    }
    Ok(suite.finish())
}

/// Positions are unordered and repeated, as in a packed batch, and the table has more positions than occur.
fn rope<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, heads, head_dim): (usize, usize, usize),
) -> Result<()> {
    const LONGEST: usize = 150;
    let half = head_dim / 2;
    let angle =
        |position: usize, i: usize| position as f64 * 1e4f64.powf(-(i as f64) / half as f64);
    let cos = Matrix::from_fn(LONGEST, half, |p, i| angle(p, i).cos()).rounded();
    let sin = Matrix::from_fn(LONGEST, half, |p, i| angle(p, i).sin()).rounded();
    let positions = suite.indices(rows, LONGEST - 10);
    let x = suite.random(rows, heads * head_dim);
    let dy = suite.random(rows, heads * head_dim);
    let table = RopeTable { cos: suite.tensor(&cos)?, sin: suite.tensor(&sin)? };
    let positions_on = suite.index(&positions)?;
    let rotated = |x: &Matrix, direction: RopeDirection| {
        let mut x = suite.tensor(x)?;
        suite.backend.rope(x.view_mut(), &positions_on, &table, direction)?;
        Ok::<_, crate::Error>(x)
    };
    let (y, dx) = (rotated(&x, RopeDirection::Forward)?, rotated(&dy, RopeDirection::Backward)?);

    let what = format!("{rows} rows of {heads} heads of {head_dim}");
    let want = reference::rope(&x, &positions, &cos, &sin);
    suite.case("rope, forward").check(&what, &y, &want, Bound::roundings(4.0))?;
    let mut block = suite.padded(&x)?;
    let forward = RopeDirection::Forward;
    suite.backend.rope(inner_mut(&mut block), &positions_on, &table, forward)?;
    suite.case("rope on a view").check_inner(&what, &block, &want, Bound::roundings(4.0))?;
    let opposite = sin.clone().map(|sin| -sin);
    let want = reference::rope(&dy, &positions, &cos, &opposite);
    suite.case("rope, backward").check(&what, &dx, &want, Bound::roundings(4.0))?;
    suite.case("rope, backward, by finite differences").check_gradient(
        &what,
        &dx,
        &x,
        Bound::roundings(6.0).at_least(1.0),
        |x| dy.dot(&reference::rope(x, &positions, &cos, &sin)),
    )
}

/// Gates far from zero must not overflow or underflow to a wrong result.
fn swiglu<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols): (usize, usize),
    magnitude: f64,
) -> Result<()> {
    let what = format!("[{rows}, {cols}], gates of order {magnitude}");
    let gate = suite.random(rows, cols).map(|x| x * magnitude).rounded();
    let up = suite.random(rows, cols);
    let dy = suite.random(rows, cols);
    let gate_up = gate.concat_cols(&up);
    let (gate_up_on, dy_on) = (suite.tensor(&gate_up)?, suite.tensor(&dy)?);
    let y = suite.backend.swiglu(&gate_up_on)?;
    suite.case("swiglu").check(
        &what,
        &y,
        &reference::swiglu(&gate, &up),
        Bound::roundings(12.0).at_least(1.0),
    )?;

    let (dgate_up, again) = suite.backend.swiglu_backward(dy_on, gate_up_on)?;
    let y_bits = suite.read(&y)?.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let again = suite.read(&again)?.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    suite.case("swiglu_backward, recomputed swiglu").require(&what, y_bits == again);
    let (want_dgate, want_dup) = reference::swiglu_backward(&dy, &gate, &up);
    // `1 − σ` has the rounding error of σ and is multiplied by gate; for a gate above 17 it is zero in f32.
    let bound = Bound::roundings(32.0).at_least(1.0);
    let want = want_dgate.concat_cols(&want_dup);
    suite.case("swiglu_backward").check(&what, &dgate_up, &want, bound)?;
    // The objective is of the order of the gates, and so is the rounding error of its differences.
    suite.case("swiglu_backward, by finite differences").check_gradient(
        &what,
        &dgate_up,
        &gate_up,
        bound.at_least(magnitude),
        |gate_up| {
            let half = |first: usize| Matrix::from_fn(rows, cols, |i, j| gate_up.row(i)[first + j]);
            dy.dot(&reference::swiglu(&half(0), &half(cols)))
        },
    )
}

/// Compared with the reference generator, which computes one counter at a time.
fn dropout<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let key = DropoutKey { seed: 0x1234_5678_9abc_def0, step: 7, module: 3, probability: 0.3 };
    let x = suite.random(rows, cols);
    let onto = suite.random(rows, cols);
    let (sequences, positions) = (suite.indices(rows, 1000), suite.indices(rows, 5000));
    let sequences_on = suite.index(&sequences)?;
    let positions_on = suite.index(&positions)?;
    let tokens = || TokenIds { sequences: &sequences_on, positions: &positions_on };
    let want = Matrix::from_fn(rows, cols, |row, col| {
        let counter = 16 * (col / 64) + col % 16;
        let draw =
            reference::philox(&key, counter as u32, (sequences[row], positions[row]))[col / 16 % 4];
        let kept = f64::from(draw) >= f64::from(key.probability) * 2f64.powi(32);
        if kept { x.row(row)[col] / (1.0 - f64::from(key.probability)) } else { 0.0 }
    });
    let what = format!("{rows} x {cols}");
    let y = suite.backend.dropout(&suite.tensor(&x)?, tokens(), &key, None)?;
    suite.case("dropout").check(&what, &y, &want, Bound::roundings(4.0))?;
    let onto_on = suite.tensor(&onto)?;
    let y = suite.backend.dropout(&suite.tensor(&x)?, tokens(), &key, Some(onto_on))?;
    suite.case("dropout, onto").check(&what, &y, &want.plus(&onto), Bound::roundings(4.0))
}
