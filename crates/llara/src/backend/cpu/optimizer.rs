//! Gradient norm, clipping and AdamW, each in one pass over the parameters.

use std::ops::Range;

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::vector::{dot, rows_per_task, vectorised};
use crate::backend::{AdamWStep, Shape};

/// The sums of tasks are added in order, in f64.
pub(super) fn add_sum_of_squares(x: &CpuTensor, range: Range<usize>, sum: &mut CpuTensor) {
    let tasks = x.as_slice()[range].par_chunks(rows_per_task(1));
    let partial: Vec<f32> = tasks.map(sum_of_squares).collect();
    let total: f64 = partial.iter().map(|&x| f64::from(x)).sum();
    let sum = &mut sum.as_mut_slice()[0];
    *sum = (f64::from(*sum) + total) as f32;
}

vectorised! {
    fn sum_of_squares(x: &[f32]) -> f32 {
        dot(x, x)
    }
}

/// `[norm, factor]` as PyTorch's `clip_grad_norm_` defines it.
pub(super) fn clip_factor(sum: &CpuTensor, max_norm: Option<f32>, out: &mut CpuTensor) {
    let norm = sum.as_slice()[0].sqrt();
    let factor = max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0));
    out.as_mut_slice().copy_from_slice(&[norm, factor]);
}

pub(super) fn adamw(
    param: &mut CpuTensor,
    range: Range<usize>,
    grad: &CpuTensor,
    (first, second): (&mut CpuTensor, &mut CpuTensor),
    clip: &CpuTensor,
    step: &AdamWStep,
) {
    assert_eq!(param.shape(), grad.shape(), "adamw: gradient");
    for moments in [&*first, &*second] {
        assert_eq!(moments.rows() * moments.cols(), range.len(), "adamw: moments");
    }
    let [norm, factor] = [clip.as_slice()[0], clip.as_slice()[1]];
    if !norm.is_finite() {
        return;
    }
    let update = Update::new(step, factor);
    let task = rows_per_task(1);
    param.as_mut_slice()[range.clone()]
        .par_chunks_mut(task)
        .zip(grad.as_slice()[range].par_chunks(task))
        .zip(first.as_mut_slice().par_chunks_mut(task))
        .zip(second.as_mut_slice().par_chunks_mut(task))
        .for_each(|(((param, grad), first), second)| {
            update_all(param, grad, first, second, &update);
        });
}

/// The coefficients of one update, computed in f64 and rounded once.
struct Update {
    factor: f32,
    decay: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// Learning rate divided by the bias correction of the first moment.
    rate: f32,
    /// Reciprocal square root of the bias correction of the second moment.
    inv_root_bias: f32,
    epsilon: f32,
}

impl Update {
    fn new(step: &AdamWStep, factor: f32) -> Self {
        let t = step.step as f64;
        Update {
            factor,
            decay: (1.0 - step.learning_rate * step.weight_decay) as f32,
            beta1: step.beta1 as f32,
            one_minus_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_minus_beta2: (1.0 - step.beta2) as f32,
            rate: (step.learning_rate / (1.0 - step.beta1.powf(t))) as f32,
            inv_root_bias: (1.0 / (1.0 - step.beta2.powf(t)).sqrt()) as f32,
            epsilon: step.epsilon as f32,
        }
    }
}

vectorised! {
    fn update_all(
        param: &mut [f32],
        grad: &[f32],
        first: &mut [f32],
        second: &mut [f32],
        u: &Update,
    ) {
        let moments = first.iter_mut().zip(second);
        for ((param, grad), (m, v)) in param.iter_mut().zip(grad).zip(moments) {
            let g = grad * u.factor;
            *m = u.beta1 * *m + u.one_minus_beta1 * g;
            *v = u.beta2 * *v + u.one_minus_beta2 * g * g;
            let root = v.sqrt() * u.inv_root_bias + u.epsilon;
            *param = *param * u.decay - u.rate * *m / root;
        }
    }
}
