//! Checks of the rotary embedding, SwiGLU and scaling.

use super::Case;
use super::plain::{self, Matrix};
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{Backend, DropoutKey, RopeDirection, RopeTable, TokenIds};

/// `rope`, `swiglu` and their gradients, `scale` and `dropout`.
///
/// # Errors
/// What the backend itself reports.
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
        scale(&mut suite, shape)?;
        dropout(&mut suite, shape)?;
    }
    Ok(suite.finish())
}

/// Positions in no order and repeated, as the rows of a packed batch have them, and a table that
/// covers more of them than occur.
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
    let positions_on = suite.backend.upload_index(&positions)?;
    let turned = |x: &Matrix, turn: RopeDirection| {
        let mut x = suite.tensor(x)?;
        suite.backend.rope(&mut x, &positions_on, &table, turn)?;
        Ok::<_, crate::Error>(x)
    };
    let (y, dx) = (turned(&x, RopeDirection::Forward)?, turned(&dy, RopeDirection::Backward)?);

    let what = format!("{rows} rows of {heads} heads of {head_dim}");
    let want = plain::rope(&x, &positions, &cos, &sin);
    suite.case("rope, forward").check(&what, &y, &want, Bound::roundings(4.0))?;
    let opposite = sin.clone().map(|sin| -sin);
    let want = plain::rope(&dy, &positions, &cos, &opposite);
    suite.case("rope, backward").check(&what, &dx, &want, Bound::roundings(4.0))?;
    suite.case("rope, backward, by differences").check_gradient(
        &what,
        &dx,
        &x,
        Bound::roundings(6.0).at_least(1.0),
        |x| dy.dot(&plain::rope(x, &positions, &cos, &sin)),
    )
}

/// Gates far from zero must neither overflow nor lose the result.
fn swiglu<B: Backend>(
    suite: &mut Suite<'_, B>,
    (rows, cols): (usize, usize),
    magnitude: f64,
) -> Result<()> {
    let what = format!("[{rows}, {cols}], gates of order {magnitude}");
    let gate = suite.random(rows, cols).map(|x| x * magnitude).rounded();
    let up = suite.random(rows, cols);
    let dy = suite.random(rows, cols);
    let [gate_on, up_on, dy_on] = [suite.tensor(&gate)?, suite.tensor(&up)?, suite.tensor(&dy)?];
    let y = suite.backend.swiglu(&gate_on, &up_on)?;
    suite.case("swiglu").check(
        &what,
        &y,
        &plain::swiglu(&gate, &up),
        Bound::roundings(12.0).at_least(1.0),
    )?;

    let (dgate, dup) = suite.backend.swiglu_backward(&dy_on, &gate_on, &up_on)?;
    let (want_dgate, want_dup) = plain::swiglu_backward(&dy, &gate, &up);
    // `1 − σ` is rounded as σ is, and counts gate times; beyond a gate of 17 it is nothing.
    let bound = Bound::roundings(32.0).at_least(1.0);
    suite.case("swiglu_backward, gate").check(&what, &dgate, &want_dgate, bound)?;
    suite.case("swiglu_backward, up").check(&what, &dup, &want_dup, bound)?;
    // The objective is as large as the gates, and a difference of it is rounded accordingly.
    let bound = bound.at_least(magnitude);
    suite.case("swiglu_backward, gate, by differences").check_gradient(
        &what,
        &dgate,
        &gate,
        bound,
        |gate| dy.dot(&plain::swiglu(gate, &up)),
    )?;
    suite.case("swiglu_backward, up, by differences").check_gradient(
        &what,
        &dup,
        &up,
        bound,
        |up| dy.dot(&plain::swiglu(&gate, up)),
    )
}

fn scale<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    for factor in [0.0f32, -1.0, 1.0 / 3.0, 50.0] {
        let x = suite.random(rows, cols);
        let mut y = suite.tensor(&x)?;
        suite.backend.scale(&mut y, factor)?;
        let what = format!("[{rows}, {cols}] by {factor}");
        let want = x.map(|x| x * f64::from(factor));
        suite.case("scale").check(&what, &y, &want, Bound::roundings(1.0))?;
    }
    Ok(())
}

/// Against a generator written out once more, one number at a time.
fn dropout<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let key = DropoutKey { seed: 0x1234_5678_9abc_def0, step: 7, module: 3, probability: 0.3 };
    let x = suite.random(rows, cols);
    let onto = suite.random(rows, cols);
    let (sequences, positions) = (suite.indices(rows, 1000), suite.indices(rows, 5000));
    let sequences_on = suite.backend.upload_index(&sequences)?;
    let positions_on = suite.backend.upload_index(&positions)?;
    let tokens = || TokenIds { sequences: &sequences_on, positions: &positions_on };
    let want = Matrix::from_fn(rows, cols, |row, col| {
        let counter = 16 * (col / 64) + col % 16;
        let draw =
            plain::philox(&key, counter as u32, (sequences[row], positions[row]))[col / 16 % 4];
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
