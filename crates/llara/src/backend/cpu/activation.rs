//! SwiGLU and its backward.

use rayon::prelude::*;

use super::element::{Element, with_element};
use super::vector::{rows_per_task, sigmoid, vectorised};
use super::{Cpu, CpuTensor};
use crate::Result;
use crate::backend::Shape;

pub(super) fn swiglu(cpu: &Cpu, gate: &CpuTensor, up: &CpuTensor) -> Result<CpuTensor> {
    assert_eq!(gate.shape(), up.shape(), "swiglu");
    let mut y = cpu.unspecified_of(gate.rows(), gate.cols(), gate.dtype())?;
    let task = rows_per_task(1);
    with_element!(gate, T => {
        y.elements_mut::<T>()
            .par_chunks_mut(task)
            .zip(gate.elements::<T>().par_chunks(task))
            .zip(up.elements::<T>().par_chunks(task))
            .for_each(|((y, gate), up)| gate_up(y, gate, up));
    });
    Ok(y)
}

vectorised! {
    fn gate_up<T: Element>(y: &mut [T], gate: &[T], up: &[T]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            let gate = gate.single();
            *y = T::rounded(gate * sigmoid(gate) * up.single());
        }
    }
}

/// With `σ = sigmoid(gate)`: `dgate = dy ∘ up ∘ σ ∘ (1 + gate ∘ (1 − σ))`, `dup = dy ∘ gate ∘ σ`.
pub(super) fn swiglu_backward(
    cpu: &Cpu,
    dy: &CpuTensor,
    gate: &CpuTensor,
    up: &CpuTensor,
) -> Result<(CpuTensor, CpuTensor)> {
    assert_eq!(dy.shape(), gate.shape(), "swiglu_backward");
    let mut dgate = cpu.unspecified_of(gate.rows(), gate.cols(), gate.dtype())?;
    let mut dup = cpu.unspecified_of(gate.rows(), gate.cols(), gate.dtype())?;
    let task = rows_per_task(1);
    with_element!(gate, T => {
        dgate
            .elements_mut::<T>()
            .par_chunks_mut(task)
            .zip(dup.elements_mut::<T>().par_chunks_mut(task))
            .zip(dy.elements::<T>().par_chunks(task))
            .zip(gate.elements::<T>().par_chunks(task))
            .zip(up.elements::<T>().par_chunks(task))
            .for_each(|((((dgate, dup), dy), gate), up)| {
                gate_up_backward(dgate, dup, dy, gate, up);
            });
    });
    Ok((dgate, dup))
}

vectorised! {
    fn gate_up_backward<T: Element>(dgate: &mut [T], dup: &mut [T], dy: &[T], gate: &[T], up: &[T]) {
        let grads = dgate.iter_mut().zip(dup).zip(dy);
        for (((dgate, dup), dy), (gate, up)) in grads.zip(gate.iter().zip(up)) {
            let (dy, gate, up) = (dy.single(), gate.single(), up.single());
            let s = sigmoid(gate);
            *dgate = T::rounded(dy * up * s * (1.0 + gate * (1.0 - s)));
            *dup = T::rounded(dy * gate * s);
        }
    }
}
