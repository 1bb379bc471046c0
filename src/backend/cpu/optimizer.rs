//! Norms, clipping and AdamW: one pass over the parameters each.

use rayon::prelude::*;

use super::CpuTensor;
use super::vector::{dot, rows_per_task, vectorised};
use crate::backend::{AdamWStep, Shape};

pub(super) fn scale(x: &mut CpuTensor, factor: f32) {
    x.as_mut_slice()
        .par_chunks_mut(rows_per_task(1))
        .for_each(|x| vectorised(|| x.iter_mut().for_each(|x| *x *= factor)));
}

/// Tasks' sums are added in order and in f64.
pub(super) fn add_sum_of_squares(x: &CpuTensor, sum: &mut CpuTensor) {
    let partial: Vec<f32> =
        x.as_slice().par_chunks(rows_per_task(1)).map(|x| vectorised(|| dot(x, x))).collect();
    let total: f64 = partial.iter().map(|&x| f64::from(x)).sum();
    let sum = &mut sum.as_mut_slice()[0];
    *sum = (f64::from(*sum) + total) as f32;
}

/// `[norm, factor]` as PyTorch's `clip_grad_norm_` defines it.
pub(super) fn clip_factor(sum: &CpuTensor, max_norm: Option<f32>, out: &mut CpuTensor) {
    let norm = sum.as_slice()[0].sqrt();
    let factor = max_norm.map_or(1.0, |max_norm| (max_norm / (norm + 1e-6)).min(1.0));
    out.as_mut_slice().copy_from_slice(&[norm, factor]);
}

pub(super) fn adamw(
    param: &mut CpuTensor,
    grad: &CpuTensor,
    (first, second): (&mut CpuTensor, &mut CpuTensor),
    clip: &CpuTensor,
    step: &AdamWStep,
) {
    assert_eq!(param.shape(), grad.shape(), "adamw: gradient");
    let [norm, factor] = [clip.as_slice()[0], clip.as_slice()[1]];
    if !norm.is_finite() {
        return;
    }
    let t = step.step as f64;
    let decay = (1.0 - step.learning_rate * step.weight_decay) as f32;
    let (beta1, one_less_beta1) = (step.beta1 as f32, (1.0 - step.beta1) as f32);
    let (beta2, one_less_beta2) = (step.beta2 as f32, (1.0 - step.beta2) as f32);
    let rate = (step.learning_rate / (1.0 - step.beta1.powf(t))) as f32;
    let inv_root_correction = (1.0 / (1.0 - step.beta2.powf(t)).sqrt()) as f32;
    let epsilon = step.epsilon as f32;
    let task = rows_per_task(1);
    param
        .as_mut_slice()
        .par_chunks_mut(task)
        .zip(grad.as_slice().par_chunks(task))
        .zip(first.as_mut_slice().par_chunks_mut(task))
        .zip(second.as_mut_slice().par_chunks_mut(task))
        .for_each(|(((param, grad), first), second)| {
            vectorised(|| {
                let moments = first.iter_mut().zip(second);
                for ((param, grad), (m, v)) in param.iter_mut().zip(grad).zip(moments) {
                    let g = grad * factor;
                    *m = beta1 * *m + one_less_beta1 * g;
                    *v = beta2 * *v + one_less_beta2 * g * g;
                    let root = v.sqrt() * inv_root_correction + epsilon;
                    *param = *param * decay - rate * *m / root;
                }
            });
        });
}
