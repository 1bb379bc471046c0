//! Cross entropy, the gradient norm and AdamW.

use std::ops::Range;

use super::device::{BLOCK, Device, kernel_args};
use super::rows::octets;
use super::tensor::{Block, CudaIndex, CudaTensor, CudaWeight, elements};
use crate::Result;
use crate::backend::{AdamWStep, Dtype, Shape};

kernel_args!(CrossEntropyArgs {
    scores: u64,
    targets: u64,
    grad: u64,
    losses: u64,
    rows: u64,
    cols: u64,
    wide: u32,
});
kernel_args!(SquaresArgs { x: u64, partial: u64, count: u64, wide: u32 });
kernel_args!(TotalArgs { x: u64, out: u64, count: u64, factor: f64, add: u32 });
kernel_args!(ClipArgs { sum: u64, out: u64, limit: f32, limited: u32 });
kernel_args!(AdamWArgs {
    value: u64,
    working: u64,
    grad: u64,
    first: u64,
    second: u64,
    clip: u64,
    count: u64,
    decay: f32,
    beta1: f32,
    one_less_beta1: f32,
    beta2: f32,
    one_less_beta2: f32,
    rate: f32,
    inv_root_bias: f32,
    epsilon: f32,
    wide: u32,
});

/// Number of elements whose squares one block sums, as in `kernels/objective.cu`.
const SQUARES_TASK: usize = 16_384;

impl Device {
    pub(super) fn cross_entropy(
        &self,
        scores: &CudaTensor,
        targets: &CudaIndex,
    ) -> Result<(CudaTensor, CudaTensor)> {
        let (rows, cols) = scores.shape();
        assert_eq!(rows, targets.len, "cross_entropy: targets");
        assert_eq!(scores.dtype(), Dtype::F32, "cross_entropy: dtype");
        let grad = self.unspecified(rows, cols, Dtype::F32)?;
        let loss = self.unspecified(1, 1, Dtype::F32)?;
        // Losses are f64: two f32 elements each.
        let losses = self.unspecified(rows, 2, Dtype::F32)?;
        let args = CrossEntropyArgs {
            scores: scores.pointer(),
            targets: targets.pointer(),
            grad: grad.pointer(),
            losses: losses.pointer(),
            rows: rows as u64,
            cols: cols as u64,
            wide: u32::from(Block::from(scores).is_aligned()),
        };
        self.launch("cross_entropy", [rows, 1], BLOCK, args)?;
        let total = TotalArgs {
            x: losses.pointer(),
            out: loss.pointer(),
            count: rows as u64,
            factor: 1.0 / rows as f64,
            add: 0,
        };
        self.launch("total", [1, 1], BLOCK, total)?;
        Ok((loss, grad))
    }

    pub(super) fn add_sum_of_squares(
        &self,
        x: &CudaTensor,
        range: Range<usize>,
        sum: &mut CudaTensor,
    ) -> Result<()> {
        let squares = elements(x, range.clone());
        assert_eq!((x.dtype(), sum.dtype()), (Dtype::F32, Dtype::F32), "add_sum_of_squares: dtype");
        assert_eq!(sum.shape(), (1, 1), "add_sum_of_squares: sum");
        let tasks = range.len().div_ceil(SQUARES_TASK);
        if tasks == 0 {
            return Ok(());
        }
        let partial = self.unspecified(tasks, 2, Dtype::F32)?;
        let args = SquaresArgs {
            x: squares.pointer,
            partial: partial.pointer(),
            count: range.len() as u64,
            wide: u32::from(squares.pointer.is_multiple_of(16)),
        };
        self.launch("sum_of_squares", [tasks, 1], BLOCK, args)?;
        let total = TotalArgs {
            x: partial.pointer(),
            out: sum.pointer(),
            count: tasks as u64,
            factor: 1.0,
            add: 1,
        };
        self.launch("total", [1, 1], BLOCK, total)
    }

    pub(super) fn clip_factor(
        &self,
        sum: &CudaTensor,
        max_norm: Option<f32>,
    ) -> Result<CudaTensor> {
        let clip = self.unspecified(1, 2, Dtype::F32)?;
        let args = ClipArgs {
            sum: sum.pointer(),
            out: clip.pointer(),
            limit: max_norm.unwrap_or(0.0),
            limited: u32::from(max_norm.is_some()),
        };
        self.launch("clip_factor", [1, 1], 1, args)?;
        Ok(clip)
    }

    pub(super) fn adamw(
        &self,
        weight: &mut CudaWeight,
        range: Range<usize>,
        grad: &CudaTensor,
        (first, second): (&mut CudaTensor, &mut CudaTensor),
        clip: &CudaTensor,
        step: &AdamWStep,
    ) -> Result<()> {
        let values = &weight.values;
        assert_eq!(values.shape(), grad.shape(), "adamw: gradient");
        assert_eq!((first.len(), second.len()), (range.len(), range.len()), "adamw: moments");
        let dtypes = [values, grad, &*first, &*second, clip].map(Shape::dtype);
        assert_eq!(dtypes, [Dtype::F32; 5], "adamw: dtypes");
        assert_eq!(clip.shape(), (1, 2), "adamw: clip");
        let address = |x: &CudaTensor| elements(x, range.clone()).pointer;
        let working = weight.working.as_ref().map_or(0, address);
        let [value_at, grad_at] = [values, grad].map(address);
        let pointers = [value_at, grad_at, working, first.pointer(), second.pointer()];
        let t = step.step as f64;
        let args = AdamWArgs {
            value: value_at,
            working,
            grad: grad_at,
            first: first.pointer(),
            second: second.pointer(),
            clip: clip.pointer(),
            count: range.len() as u64,
            decay: (1.0 - step.learning_rate * step.weight_decay) as f32,
            beta1: step.beta1 as f32,
            one_less_beta1: (1.0 - step.beta1) as f32,
            beta2: step.beta2 as f32,
            one_less_beta2: (1.0 - step.beta2) as f32,
            rate: (step.learning_rate / (1.0 - step.beta1.powf(t))) as f32,
            inv_root_bias: (1.0 / (1.0 - step.beta2.powf(t)).sqrt()) as f32,
            epsilon: step.epsilon as f32,
            wide: u32::from(pointers.iter().all(|pointer| pointer.is_multiple_of(16))),
        };
        self.launch_items("adamw", octets(range.len()), args)
    }
}
