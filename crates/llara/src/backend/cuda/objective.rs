//! Cross entropy, its masks and its form for sets, distillation, the gradient norm and AdamW.

use std::ops::Range;

use super::device::{BLOCK, Cuda, Device, kernel_args};
use super::rows::octets;
use super::tensor::{Block, CudaIndex, CudaTensor, CudaWeight, elements};
use crate::Result;
use crate::backend::{AdamWStep, DistillationLoss, Dtype, ListedColumns, ScoreMask, Shape};

kernel_args!(CrossEntropyArgs {
    scores: u64,
    targets: u64,
    grad: u64,
    losses: u64,
    rows: u64,
    cols: u64,
    wide: u32,
});
kernel_args!(MaskScoresArgs {
    scores: u64,
    targets: u64,
    starts: u64,
    columns: u64,
    masked: u64,
    cols: u64,
    group: u64,
    margin: f32,
    wide: u32,
});
kernel_args!(DistillationArgs {
    scores: u64,
    firsts: u64,
    teacher: u64,
    grad: u64,
    losses: u64,
    rows: u64,
    cols: u64,
    group: u64,
    scale: f32,
    weight: f32,
});
kernel_args!(SetCrossEntropyArgs {
    logits: u64,
    starts: u64,
    columns: u64,
    grad: u64,
    losses: u64,
    bags: u64,
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
        self.mean(&losses, &loss)?;
        Ok((loss, grad))
    }

    /// The mean of f64 numbers `[rows, 2]`, which take two elements each. `[1, 1]`
    fn mean(&self, losses: &CudaTensor, mean: &CudaTensor) -> Result<()> {
        let total = TotalArgs {
            x: losses.pointer(),
            out: mean.pointer(),
            count: losses.rows() as u64,
            factor: 1.0 / losses.rows() as f64,
            add: 0,
        };
        self.launch("total", [1, 1], BLOCK, total)
    }

    pub(super) fn mask_scores(
        &self,
        scores: &CudaTensor,
        targets: &CudaIndex,
        mask: &ScoreMask<Cuda>,
    ) -> Result<CudaTensor> {
        let (rows, cols) = scores.shape();
        assert_eq!(rows, targets.len, "mask_scores: targets");
        assert_eq!(scores.dtype(), Dtype::F32, "mask_scores: dtype");
        let masked = self.unspecified(rows, cols, Dtype::F32)?;
        let (starts, columns) = match &mask.columns {
            Some(listed) => {
                assert_eq!(listed.starts.len, rows + 1, "mask_scores: listed columns");
                (listed.starts.pointer(), listed.columns.pointer())
            }
            None => (0, 0),
        };
        let aligned = [scores, &masked].map(|x| Block::from(x).is_aligned());
        let args = MaskScoresArgs {
            scores: scores.pointer(),
            targets: targets.pointer(),
            starts,
            columns,
            masked: masked.pointer(),
            cols: cols as u64,
            group: mask.group_size.unwrap_or(0) as u64,
            margin: mask.margin.unwrap_or(f32::INFINITY),
            wide: u32::from(aligned == [true, true]),
        };
        self.launch("mask_scores", [rows, 1], BLOCK, args)?;
        Ok(masked)
    }

    pub(super) fn distillation(
        &self,
        (scores, firsts): (&CudaTensor, &CudaIndex),
        teacher: &CudaTensor,
        loss: DistillationLoss,
        (weight, dscores): (f32, &mut CudaTensor),
    ) -> Result<CudaTensor> {
        let (rows, cols) = scores.shape();
        assert_eq!((rows, rows), (firsts.len, teacher.rows()), "distillation: rows");
        assert_eq!(dscores.shape(), scores.shape(), "distillation: gradient");
        let dtypes = [scores, teacher, &*dscores].map(Shape::dtype);
        assert_eq!(dtypes, [Dtype::F32; 3], "distillation: dtypes");
        let mean = self.unspecified(1, 1, Dtype::F32)?;
        let losses = self.unspecified(rows, 2, Dtype::F32)?;
        let (kernel, scale) = match loss {
            DistillationLoss::KlDivergence => ("kl_divergence", 1.0),
            DistillationLoss::MarginMse { scale } => ("margin_mse", scale),
        };
        let args = DistillationArgs {
            scores: scores.pointer(),
            firsts: firsts.pointer(),
            teacher: teacher.pointer(),
            grad: dscores.pointer(),
            losses: losses.pointer(),
            rows: rows as u64,
            cols: cols as u64,
            group: teacher.cols() as u64,
            scale,
            weight,
        };
        self.launch(kernel, [rows, 1], 32, args)?;
        self.mean(&losses, &mean)?;
        Ok(mean)
    }

    pub(super) fn set_cross_entropy(
        &self,
        logits: &CudaTensor,
        bag_rows: usize,
        sets: &ListedColumns<Cuda>,
    ) -> Result<(CudaTensor, CudaTensor)> {
        let (rows, cols) = logits.shape();
        let bags = sets.starts.len - 1;
        assert_eq!(rows, bags * bag_rows, "set_cross_entropy: rows");
        assert_eq!(logits.dtype(), Dtype::F32, "set_cross_entropy: dtype");
        let grad = self.unspecified(rows, cols, Dtype::F32)?;
        let loss = self.unspecified(1, 1, Dtype::F32)?;
        let losses = self.unspecified(bags, 2, Dtype::F32)?;
        // The start of every row is aligned if the first one and the length of a row are.
        let aligned = [logits, &grad].map(|x| Block::from(x).is_aligned());
        let args = SetCrossEntropyArgs {
            logits: logits.pointer(),
            starts: sets.starts.pointer(),
            columns: sets.columns.pointer(),
            grad: grad.pointer(),
            losses: losses.pointer(),
            bags: bags as u64,
            rows: bag_rows as u64,
            cols: cols as u64,
            wide: u32::from(aligned == [true, true]),
        };
        self.launch("set_cross_entropy", [bags, 1], BLOCK, args)?;
        self.mean(&losses, &loss)?;
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
