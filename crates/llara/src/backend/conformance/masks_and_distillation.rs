//! Checks of the masks of scores and of the distillation losses.

use super::reference::{self, Matrix};
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{Backend, DistillationLoss, ListedColumns, ScoreMask};

/// A mask on the host.
#[derive(Default)]
struct HostMask {
    group_size: Option<usize>,
    /// Columns of each row.
    columns: Option<Vec<Vec<u32>>>,
    margin: Option<f32>,
}

/// `mask_scores`, alone and before `cross_entropy`.
pub(super) fn mask_scores<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    for (rows, cols, group_size) in
        [(1, 1, 1), (1, 17, 17), (17, 34, 2), (33, 65, 5), (130, 520, 4), (9, 2080, 8)]
    {
        // Many ties with the target and with the margin, because scores are multiples of 1/4.
        let scores = suite.random(rows, cols).map(|s| (s * 8.0).round() / 4.0);
        let targets = suite.indices(rows, cols);
        let counts = suite.indices(rows, 7);
        let columns = counts.iter().map(|&count| {
            let mut columns = suite.indices(count as usize, cols);
            columns.sort_unstable();
            columns.dedup();
            columns
        });
        let columns: Vec<Vec<u32>> = columns.collect();
        let masks = [
            HostMask::default(),
            HostMask { group_size: Some(group_size), ..HostMask::default() },
            HostMask { columns: Some(columns.clone()), ..HostMask::default() },
            HostMask { columns: Some(vec![Vec::new(); rows]), ..HostMask::default() },
            HostMask { margin: Some(0.5), ..HostMask::default() },
            HostMask { margin: Some(-0.25), ..HostMask::default() },
            HostMask { group_size: Some(group_size), columns: Some(columns), margin: Some(0.0) },
        ];
        for mask in masks {
            masked(suite, &scores, &targets, &mask)?;
        }
    }
    Ok(())
}

fn masked<B: Backend>(
    suite: &mut Suite<'_, B>,
    scores: &Matrix,
    targets: &[u32],
    mask: &HostMask,
) -> Result<()> {
    let (rows, cols) = scores.shape();
    let what = format!(
        "[{rows}, {cols}], groups of {:?}, listed columns: {}, margin {:?}",
        mask.group_size,
        mask.columns.is_some(),
        mask.margin
    );
    let want = Matrix::from_fn(rows, cols, |i, j| {
        let target = targets[i] as usize;
        let is_masked = mask.group_size.is_some_and(|size| j / size != target / size)
            || mask.columns.as_ref().is_some_and(|columns| columns[i].contains(&(j as u32)))
            || mask.margin.is_some_and(|m| scores.row(i)[j] > scores.row(i)[target] + f64::from(m));
        if is_masked && j != target { f64::NEG_INFINITY } else { scores.row(i)[j] }
    });
    let columns = match &mask.columns {
        None => None,
        Some(columns) => {
            let mut starts = vec![0];
            starts.extend(columns.iter().scan(0, |end, columns| {
                *end += columns.len() as u32;
                Some(*end)
            }));
            let [starts, columns] = suite.backend.upload_indices([&starts, &columns.concat()])?;
            Some(ListedColumns { starts, columns })
        }
    };
    let on_device = ScoreMask { group_size: mask.group_size, columns, margin: mask.margin };
    let targets_on = suite.index(targets)?;
    let got = suite.backend.mask_scores(&suite.tensor(scores)?, &targets_on, &on_device)?;
    let values = suite.case("mask_scores").read(&got)?;
    let same = values.iter().zip(&want.data).all(|(got, want)| f64::from(*got) == *want);
    suite.require(&what, same && values.len() == want.data.len());

    let (loss, dscores) = suite.backend.cross_entropy(&got, &targets_on)?;
    let largest = scores.max_abs();
    let mean = Matrix::from_fn(1, 1, |_, _| reference::cross_entropy(&want, targets));
    let bound = Bound::roundings(16.0).at_least(1.0 + largest);
    suite.case("cross_entropy of masked scores, loss").check(&what, &loss, &mean, bound)?;
    let bound = Bound::roundings(16.0 + 2.0 * largest).at_least(1.0 / rows as f64);
    let is_masked: Vec<bool> = want.data.iter().map(|score| score.is_infinite()).collect();
    suite.case("cross_entropy of masked scores, gradient by differences").check_gradient(
        &what,
        &dscores,
        scores,
        bound,
        |moved| {
            let mut moved = moved.clone();
            let masked = moved.data.iter_mut().zip(&is_masked).filter(|(_, masked)| **masked);
            masked.for_each(|(score, _)| *score = f64::NEG_INFINITY);
            reference::cross_entropy(&moved, targets)
        },
    )
}

/// `distillation`, added to a gradient that is there.
pub(super) fn distillation<B: Backend>(suite: &mut Suite<'_, B>) -> Result<()> {
    let losses = [DistillationLoss::KlDivergence, DistillationLoss::MarginMse { scale: 0.25 }];
    for (rows, groups, group_size) in
        [(1, 1, 1), (1, 3, 2), (17, 17, 8), (33, 5, 3), (5, 2, 70), (130, 65, 4)]
    {
        for magnitude in [1.0, 20.0] {
            let scores = suite.random(rows, groups * group_size).map(|s| s * magnitude).rounded();
            let teacher = suite.random(rows, group_size).map(|s| s * magnitude).rounded();
            let firsts = suite.indices(rows, groups);
            let firsts: Vec<u32> = firsts.iter().map(|&g| g * group_size as u32).collect();
            for loss in losses {
                distilled(suite, (&scores, &firsts), &teacher, loss)?;
            }
        }
    }
    Ok(())
}

fn distilled<B: Backend>(
    suite: &mut Suite<'_, B>,
    (scores, firsts): (&Matrix, &[u32]),
    teacher: &Matrix,
    loss: DistillationLoss,
) -> Result<()> {
    const WEIGHT: f32 = 0.5;
    let (rows, cols) = scores.shape();
    let what = format!("[{rows}, {cols}], groups of {}, {loss:?}", teacher.cols);
    let before = suite.random(rows, cols);
    let mut dscores = suite.tensor(&before)?;
    let firsts_on = suite.index(firsts)?;
    let (scores_on, teacher_on) = (suite.tensor(scores)?, suite.tensor(teacher)?);
    let mean = suite.backend.distillation(
        &scores_on,
        &firsts_on,
        &teacher_on,
        loss,
        WEIGHT,
        &mut dscores,
    )?;
    let plain = |scores: &Matrix| reference::distillation(scores, firsts, teacher, loss);
    let want = Matrix::from_fn(1, 1, |_, _| plain(scores));
    suite.case("distillation, loss").check(&what, &mean, &want, Bound::roundings(8.0))?;
    let largest = match loss {
        DistillationLoss::KlDivergence => 1.0,
        DistillationLoss::MarginMse { .. } => scores.max_abs() + teacher.max_abs(),
    };
    let bound = Bound::roundings(16.0).at_least(largest + before.max_abs());
    suite.case("distillation, gradient by differences").check_gradient(
        &what,
        &dscores,
        scores,
        bound,
        |scores| f64::from(WEIGHT) * plain(scores) + before.dot(scores),
    )
}
