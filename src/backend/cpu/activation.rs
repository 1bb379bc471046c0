//! SwiGLU and its backward.

use rayon::prelude::*;

use super::vector::{rows_per_task, sigmoid, vectorised};
use super::{Cpu, CpuTensor};
use crate::backend::Shape;

pub(super) fn swiglu(cpu: &Cpu, gate: &CpuTensor, up: &CpuTensor) -> CpuTensor {
    assert_eq!(gate.shape(), up.shape(), "swiglu");
    let mut y = cpu.unspecified(gate.rows(), gate.cols());
    let task = rows_per_task(1);
    y.as_mut_slice()
        .par_chunks_mut(task)
        .zip(gate.as_slice().par_chunks(task))
        .zip(up.as_slice().par_chunks(task))
        .for_each(|((y, gate), up)| {
            vectorised(|| {
                for ((y, &gate), up) in y.iter_mut().zip(gate).zip(up) {
                    *y = gate * sigmoid(gate) * up;
                }
            });
        });
    y
}

/// With `σ = sigmoid(gate)`: `dgate = dy ∘ up ∘ σ ∘ (1 + gate ∘ (1 − σ))`, `dup = dy ∘ gate ∘ σ`.
pub(super) fn swiglu_backward(
    cpu: &Cpu,
    dy: &CpuTensor,
    gate: &CpuTensor,
    up: &CpuTensor,
) -> (CpuTensor, CpuTensor) {
    assert_eq!(dy.shape(), gate.shape(), "swiglu_backward");
    let mut dgate = cpu.unspecified(gate.rows(), gate.cols());
    let mut dup = cpu.unspecified(gate.rows(), gate.cols());
    let task = rows_per_task(1);
    dgate
        .as_mut_slice()
        .par_chunks_mut(task)
        .zip(dup.as_mut_slice().par_chunks_mut(task))
        .zip(dy.as_slice().par_chunks(task))
        .zip(gate.as_slice().par_chunks(task))
        .zip(up.as_slice().par_chunks(task))
        .for_each(|((((dgate, dup), dy), gate), up)| {
            vectorised(|| {
                let grads = dgate.iter_mut().zip(dup.iter_mut()).zip(dy);
                for (((dgate, dup), dy), (&gate, up)) in grads.zip(gate.iter().zip(up)) {
                    let s = sigmoid(gate);
                    *dgate = dy * up * s * (1.0 + gate * (1.0 - s));
                    *dup = dy * gate * s;
                }
            });
        });
    (dgate, dup)
}
