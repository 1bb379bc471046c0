//! Losses over rows of scores, each with its gradient in the same pass, and masks of scores.

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::device::Cpu;
use super::vector::{exp_scaled_sum, max, vectorised};
use crate::Result;
use crate::backend::{DistillationLoss, ListedColumns, ScoreMask, Shape};

/// `dscores = (softmax(scores) − onehot(target)) / n`.
pub(super) fn cross_entropy(
    cpu: &Cpu,
    scores: &CpuTensor,
    targets: &[u32],
) -> Result<(CpuTensor, CpuTensor)> {
    let (rows, cols) = scores.shape();
    assert_eq!(rows, targets.len(), "cross_entropy: targets");
    let mut grad = cpu.unspecified(rows, cols)?;
    let mut row_losses = vec![0.0f64; rows];
    grad.as_mut_slice()
        .par_chunks_mut(cols)
        .zip(scores.as_slice().par_chunks(cols))
        .zip(targets)
        .zip(&mut row_losses)
        .for_each(|(((grad, scores), &target), loss)| {
            *loss = row_loss(grad, scores, target as usize, rows);
        });
    let mut loss = cpu.unspecified(1, 1)?;
    loss.as_mut_slice()[0] = (row_losses.iter().sum::<f64>() / rows as f64) as f32;
    Ok((loss, grad))
}

vectorised! {
    fn row_loss(grad: &mut [f32], scores: &[f32], target: usize, rows: usize) -> f64 {
        let largest = max(scores);
        grad.copy_from_slice(scores);
        let sum = exp_scaled_sum(grad, 1.0, largest);
        let share = 1.0 / (sum * rows as f32);
        grad.iter_mut().for_each(|g| *g *= share);
        grad[target] -= 1.0 / rows as f32;
        // In f64, because near convergence the loss is a small difference of large terms.
        let above = f64::from(largest) - f64::from(scores[target]);
        above + f64::from(sum).ln()
    }
}

pub(super) fn set_cross_entropy(
    cpu: &Cpu,
    logits: &CpuTensor,
    bag_rows: usize,
    sets: &ListedColumns<Cpu>,
) -> Result<(CpuTensor, CpuTensor)> {
    let (rows, cols) = logits.shape();
    let bags = sets.starts.len() - 1;
    assert_eq!(rows, bags * bag_rows, "set_cross_entropy: rows");
    let mut grad = cpu.unspecified(rows, cols)?;
    let mut bag_losses = vec![0.0f64; bags];
    grad.as_mut_slice()
        .par_chunks_mut(bag_rows * cols)
        .zip(logits.as_slice().par_chunks(bag_rows * cols))
        .zip(sets.starts.par_windows(2))
        .zip(&mut bag_losses)
        .for_each(|(((grad, logits), bounds), loss)| {
            let set = &sets.columns[bounds[0] as usize..bounds[1] as usize];
            *loss = bag_loss(grad, logits, set, bag_rows, bags);
        });
    let mut loss = cpu.unspecified(1, 1)?;
    loss.as_mut_slice()[0] = (bag_losses.iter().sum::<f64>() / bags as f64) as f32;
    Ok((loss, grad))
}

vectorised! {
    /// The loss of one bag. The first row of `grad` holds the maxima, then their softmax, then the gradient with
    /// respect to the maxima.
    fn bag_loss(grad: &mut [f32], logits: &[f32], set: &[u32], bag_rows: usize, bags: usize) -> f64 {
        let cols = logits.len() / bag_rows;
        let (dmaxima, others) = grad.split_at_mut(cols);
        dmaxima.copy_from_slice(&logits[..cols]);
        for row in logits[cols..].chunks_exact(cols) {
            for (m, &x) in dmaxima.iter_mut().zip(row) {
                // A NaN is kept, so that the loss shows it.
                *m = if x > *m || x.is_nan() { x } else { *m };
            }
        }
        let largest = max(dmaxima);
        let of_set: f64 = set.iter().map(|&v| f64::from(dmaxima[v as usize])).sum();
        let sum = exp_scaled_sum(dmaxima, 1.0, largest);
        let share = 1.0 / (sum * bags as f32);
        dmaxima.iter_mut().for_each(|d| *d *= share);
        let one = 1.0 / (set.len() as f32 * bags as f32);
        set.iter().for_each(|&v| dmaxima[v as usize] -= one);
        spread(dmaxima, others, logits);
        f64::from(largest) + f64::from(sum).ln() - of_set / set.len() as f64
    }
}

/// Columns that [`spread`] handles together.
const SPREAD_COLUMNS: usize = 64;

/// Moves the gradient of each column from the first row to the first row that has the maximum of the column; all
/// other elements become 0. `others` are the rows after the first one.
#[inline(always)]
fn spread(first: &mut [f32], others: &mut [f32], logits: &[f32]) {
    let cols = first.len();
    for start in (0..cols).step_by(SPREAD_COLUMNS) {
        let block = start..(start + SPREAD_COLUMNS).min(cols);
        let mut maxima = [0.0f32; SPREAD_COLUMNS];
        let mut places = [0u32; SPREAD_COLUMNS];
        maxima[..block.len()].copy_from_slice(&logits[block.clone()]);
        for (row, logits) in (1..).zip(logits[cols..].chunks_exact(cols)) {
            let columns = maxima.iter_mut().zip(&mut places).zip(&logits[block.clone()]);
            for ((maximum, place), &x) in columns {
                let higher = x > *maximum;
                *maximum = if higher { x } else { *maximum };
                *place = if higher { row } else { *place };
            }
        }
        for (row, grad) in (1..).zip(others.chunks_exact_mut(cols)) {
            let columns = grad[block.clone()].iter_mut().zip(&places).zip(&first[block.clone()]);
            for ((grad, &place), &d) in columns {
                *grad = if place == row { d } else { 0.0 };
            }
        }
        for (d, &place) in first[block].iter_mut().zip(&places) {
            *d = if place == 0 { *d } else { 0.0 };
        }
    }
}

pub(super) fn mask_scores(
    cpu: &Cpu,
    scores: &CpuTensor,
    targets: &[u32],
    mask: &ScoreMask<Cpu>,
) -> Result<CpuTensor> {
    let (rows, cols) = scores.shape();
    assert_eq!(rows, targets.len(), "mask_scores: targets");
    let mut masked = cpu.unspecified(rows, cols)?;
    let all = masked.as_mut_slice().par_chunks_mut(cols).zip(scores.as_slice().par_chunks(cols));
    all.zip(targets).enumerate().for_each(|(row, ((masked, scores), &target))| {
        let target = target as usize;
        let highest = scores[target] + mask.margin.unwrap_or(f32::INFINITY);
        let group = mask.group_size.map_or(0..cols, |size| {
            let first = target - target % size;
            first..first + size
        });
        masked.fill(f32::NEG_INFINITY);
        mask_above(&mut masked[group.clone()], &scores[group], highest);
        if let Some(listed) = &mask.columns {
            let of_row = listed.starts[row] as usize..listed.starts[row + 1] as usize;
            for &column in &listed.columns[of_row] {
                masked[column as usize] = f32::NEG_INFINITY;
            }
        }
        masked[target] = scores[target];
    });
    Ok(masked)
}

vectorised! {
    fn mask_above(masked: &mut [f32], scores: &[f32], highest: f32) {
        for (masked, &score) in masked.iter_mut().zip(scores) {
            // A NaN is kept, so that the loss shows it.
            *masked = if score > highest { f32::NEG_INFINITY } else { score };
        }
    }
}

pub(super) fn distillation(
    cpu: &Cpu,
    (scores, firsts): (&CpuTensor, &[u32]),
    teacher: &CpuTensor,
    loss: DistillationLoss,
    (weight, dscores): (f32, &mut CpuTensor),
) -> Result<CpuTensor> {
    let (rows, cols) = scores.shape();
    let group_size = teacher.cols();
    assert_eq!((rows, rows), (firsts.len(), teacher.rows()), "distillation: rows");
    assert_eq!(dscores.shape(), scores.shape(), "distillation: gradient");
    let share = weight / rows as f32;
    let mut row_losses = vec![0.0f64; rows];
    dscores
        .as_mut_slice()
        .par_chunks_mut(cols)
        .zip(scores.as_slice().par_chunks(cols))
        .zip(teacher.as_slice().par_chunks(group_size))
        .zip(firsts)
        .zip(&mut row_losses)
        .for_each(|((((grad, scores), teacher), &first), row_loss)| {
            let group = first as usize..first as usize + group_size;
            let (grad, scores) = (&mut grad[group.clone()], &scores[group]);
            *row_loss = match loss {
                DistillationLoss::KlDivergence => kl_divergence(grad, scores, teacher, share),
                DistillationLoss::MarginMse { scale } => {
                    margin_mse(grad, scores, teacher, (scale, share))
                }
            };
        });
    let mut loss = cpu.unspecified(1, 1)?;
    loss.as_mut_slice()[0] = (row_losses.iter().sum::<f64>() / rows as f64) as f32;
    Ok(loss)
}

/// `grad += share · (softmax(scores) − softmax(teacher))`. In f64: groups are small, and the divergence of
/// similar distributions is a small difference.
fn kl_divergence(grad: &mut [f32], scores: &[f32], teacher: &[f32], share: f32) -> f64 {
    let (student, teacher) = (log_softmax(scores), log_softmax(teacher));
    let mut loss = 0.0;
    for (grad, (log_q, log_p)) in grad.iter_mut().zip(student.zip(teacher)) {
        let p = log_p.exp();
        *grad += (f64::from(share) * (log_q.exp() - p)) as f32;
        loss += p * (log_p - log_q);
    }
    loss
}

fn log_softmax(x: &[f32]) -> impl Iterator<Item = f64> {
    let largest = f64::from(max(x));
    let sum: f64 = x.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
    let log_of_sum = largest + sum.ln();
    x.iter().map(move |&x| f64::from(x) - log_of_sum)
}

/// With `e_g = scale · (s_0 − s_g) − (t_0 − t_g)`: `grad_g −= 2 · scale · share · e_g / (G − 1)`, and their
/// sum to `grad_0`.
fn margin_mse(
    grad: &mut [f32],
    scores: &[f32],
    teacher: &[f32],
    (scale, share): (f32, f32),
) -> f64 {
    let Some((of_positive, of_negatives)) = grad.split_first_mut() else { return 0.0 };
    let (scale, wide) = (f64::from(scale), |x: f32| f64::from(x));
    let negatives = of_negatives.len().max(1) as f64;
    let factor = 2.0 * scale * wide(share) / negatives;
    let (mut loss, mut sum) = (0.0, 0.0);
    for (grad, (s, t)) in of_negatives.iter_mut().zip(scores.iter().zip(teacher).skip(1)) {
        let margins = (wide(scores[0]) - wide(*s), wide(teacher[0]) - wide(*t));
        let error = scale * margins.0 - margins.1;
        loss += error * error / negatives;
        sum += factor * error;
        *grad -= (factor * error) as f32;
    }
    *of_positive += sum as f32;
    loss
}
