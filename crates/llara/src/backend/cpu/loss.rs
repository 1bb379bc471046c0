//! Mean cross entropy over rows of scores, with its gradient in the same pass.

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::device::Cpu;
use super::vector::{exp_scaled_sum, max, vectorised};
use crate::Result;
use crate::backend::Shape;

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
