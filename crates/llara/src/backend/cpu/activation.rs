//! SwiGLU and its backward pass; gate and up are concatenated by columns.

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::device::Cpu;
use super::element::{Element, with_element};
use super::vector::{rows_per_task, sigmoid, vectorised};
use crate::Result;
use crate::backend::Shape;

pub(super) fn swiglu(cpu: &Cpu, gate_up: &CpuTensor) -> Result<CpuTensor> {
    let (rows, cols) = (gate_up.rows(), gate_up.cols() / 2);
    assert_eq!(gate_up.cols(), 2 * cols, "swiglu: gate and up");
    let mut y = cpu.unspecified_of(rows, cols, gate_up.dtype())?;
    let task = rows_per_task(cols);
    with_element!(gate_up, T => {
        y.elements_mut::<T>()
            .par_chunks_mut(task * cols)
            .zip(gate_up.elements::<T>().par_chunks(2 * task * cols))
            .for_each(|(y, gate_up)| activate_rows(y, gate_up, cols));
    });
    Ok(y)
}

vectorised! {
    fn activate_rows<T: Element>(y: &mut [T], gate_up: &[T], cols: usize) {
        for (y, gate_up) in y.chunks_exact_mut(cols).zip(gate_up.chunks_exact(2 * cols)) {
            let (gate, up) = gate_up.split_at(cols);
            for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
                let gate = gate.to_f32();
                *y = T::from_f32(gate * sigmoid(gate) * up.to_f32());
            }
        }
    }
}

/// With `σ = sigmoid(gate)`: `dgate = dy ∘ up ∘ σ ∘ (1 + gate ∘ (1 − σ))`, `dup = dy ∘ gate ∘ σ`,
/// which overwrite gate and up; `y = gate ∘ σ ∘ up` overwrites dy. Each element is read before it is written.
pub(super) fn swiglu_backward(mut dy: CpuTensor, mut gate_up: CpuTensor) -> (CpuTensor, CpuTensor) {
    let (rows, cols) = dy.shape();
    assert_eq!(gate_up.shape(), (rows, 2 * cols), "swiglu_backward: gate and up");
    let task = rows_per_task(cols);
    with_element!(gate_up, T => {
        dy.elements_mut::<T>()
            .par_chunks_mut(task * cols)
            .zip(gate_up.elements_mut::<T>().par_chunks_mut(2 * task * cols))
            .for_each(|(dy, gate_up)| activate_rows_backward(dy, gate_up, cols));
    });
    (gate_up, dy)
}

/// Elements that are read before any of them is written. The compiler cannot know that gate, up and dy do not
/// overlap; with one element at a time it makes no vector instructions.
const BLOCK: usize = 32;

vectorised! {
    fn activate_rows_backward<T: Element>(dy: &mut [T], gate_up: &mut [T], cols: usize) {
        for (dy, gate_up) in dy.chunks_exact_mut(cols).zip(gate_up.chunks_exact_mut(2 * cols)) {
            let (gate, up) = gate_up.split_at_mut(cols);
            let blocks = dy.chunks_mut(BLOCK).zip(gate.chunks_mut(BLOCK)).zip(up.chunks_mut(BLOCK));
            for ((dy_y, gate_dgate), up_dup) in blocks {
                let (dy, gate, up) = (read(dy_y), read(gate_dgate), read(up_dup));
                let (mut y, mut dgate, mut dup) = ([0.0; BLOCK], [0.0; BLOCK], [0.0; BLOCK]);
                for i in 0..BLOCK {
                    let s = sigmoid(gate[i]);
                    y[i] = gate[i] * s * up[i];
                    dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
                    dup[i] = dy[i] * gate[i] * s;
                }
                write(dy_y, &y);
                write(gate_dgate, &dgate);
                write(up_dup, &dup);
            }
        }
    }
}

/// At most [`BLOCK`] elements, and zeros for the others.
#[inline(always)]
fn read<T: Element>(from: &[T]) -> [f32; BLOCK] {
    let mut block = [0.0; BLOCK];
    block.iter_mut().zip(from).for_each(|(x, from)| *x = from.to_f32());
    block
}

#[inline(always)]
fn write<T: Element>(to: &mut [T], block: &[f32; BLOCK]) {
    to.iter_mut().zip(block).for_each(|(to, &x)| *to = T::from_f32(x));
}
