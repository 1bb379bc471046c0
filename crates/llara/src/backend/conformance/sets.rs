//! Checks of the loss of sets of columns.

use super::reference::{self, Matrix};
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{Backend, ListedColumns};

/// `set_cross_entropy`, with sets from one column to all of them.
pub(super) fn set_cross_entropy<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    for (bags, bag_rows, cols) in
        [(1, 1, 1), (1, 8, 17), (3, 8, 64), (2, 3, 65), (5, 8, 520), (17, 2, 130), (2, 8, 2085)]
    {
        for magnitude in [1.0, 50.0, 1e4] {
            let logits = suite.random(bags * bag_rows, cols).map(|x| x * magnitude).rounded();
            let sets = sets(suite, bags, cols);
            bags_of(suite, &logits, bag_rows, &sets)?;
        }
        let logits = suite.random(bags * bag_rows, cols).map(|x| x + 1e4).rounded();
        let all = vec![(0..cols as u32).collect(); bags];
        bags_of(suite, &logits, bag_rows, &all)?;
    }
    ties(suite)?;
    not_finite(suite)
}

/// Distinct columns in ascending order, at least one of each bag.
fn sets<B: Backend>(suite: &mut Suite<'_, B>, bags: usize, cols: usize) -> Vec<Vec<u32>> {
    let counts = suite.indices(bags, cols);
    let set = |count: u32| {
        let mut set = suite.indices(count as usize + 1, cols);
        set.sort_unstable();
        set.dedup();
        set
    };
    counts.into_iter().map(set).collect()
}

fn listed<B: Backend>(suite: &Suite<'_, B>, sets: &[Vec<u32>]) -> Result<ListedColumns<B>> {
    let mut starts = vec![0];
    starts.extend(sets.iter().scan(0, |end, set| {
        *end += set.len() as u32;
        Some(*end)
    }));
    let [starts, columns] = suite.backend.upload_indices([&starts, &sets.concat()])?;
    Ok(ListedColumns { starts, columns })
}

fn bags_of<B: Backend>(
    suite: &mut Suite<'_, B>,
    logits: &Matrix,
    bag_rows: usize,
    sets: &[Vec<u32>],
) -> Result<()> {
    let magnitude = logits.max_abs();
    let (bags, cols) = (sets.len(), logits.cols);
    let what = format!("{bags} bags of [{bag_rows}, {cols}], logits to {magnitude:.1}");
    let columns = listed(suite, sets)?;
    let (loss, dlogits) =
        suite.backend.set_cross_entropy(&suite.tensor(logits)?, bag_rows, &columns)?;
    let plain = |logits: &Matrix| reference::set_cross_entropy(logits, bag_rows, sets);
    let want = Matrix::from_fn(1, 1, |_, _| plain(logits));
    // As for cross_entropy: the rounding error of differences of logits is relative to their size.
    let bound = Bound::roundings(16.0).at_least(1.0 + magnitude);
    suite.case("set_cross_entropy, loss").check(&what, &loss, &want, bound)?;
    let bound = Bound::roundings(16.0 + magnitude).at_least(1.0 / bags as f64);
    let want = reference::set_cross_entropy_grad(logits, bag_rows, sets);
    suite.case("set_cross_entropy, gradient").check(&what, &dlogits, &want, bound)?;
    // A step of a difference may change which row has the maximum only if two are closer than the step.
    let bound = Bound::roundings(16.0 + 2.0 * magnitude).at_least(1.0 / bags as f64);
    suite
        .case("set_cross_entropy, gradient by finite differences")
        .check_gradient(&what, &dlogits, logits, bound, plain)
}

/// Rows with equal maxima: the first one gets the gradient.
fn ties<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    let (bags, bag_rows, cols) = (3, 8, 70);
    let logits = suite.random(bags * bag_rows, cols).map(|x| (x * 2.0).round());
    let sets = sets(suite, bags, cols);
    let columns = listed(suite, &sets)?;
    let (_, dlogits) =
        suite.backend.set_cross_entropy(&suite.tensor(&logits)?, bag_rows, &columns)?;
    let want = reference::set_cross_entropy_grad(&logits, bag_rows, &sets);
    let bound = Bound::roundings(24.0).at_least(1.0 / bags as f64);
    suite.case("set_cross_entropy, ties").check("[24, 70]", &dlogits, &want, bound)
}

fn not_finite<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    for place in [0, 3, 7] {
        let mut logits = suite.random(8, 33);
        logits.row_mut(place)[20] = f64::NAN;
        let columns = listed(suite, &[vec![1, 2]])?;
        let (loss, _) = suite.backend.set_cross_entropy(&suite.tensor(&logits)?, 8, &columns)?;
        let loss = suite.case("set_cross_entropy, loss").read(&loss)?[0];
        suite.require(&format!("loss with a NaN in row {place} is NaN"), loss.is_nan());
    }
    Ok(())
}
