//! RMS norm and L2 normalization, and their backward passes.

use super::device::{BLOCK, Device, kernel_args};
use super::rows::{octets, sum_task_rows};
use super::tensor::{Block, CudaTensor};
use crate::Result;
use crate::backend::{Dtype, Shape};

kernel_args!(NormArgs {
    x: u64,
    w: u64,
    y: u64,
    inv: u64,
    groups: u64,
    heads: u64,
    group: u64,
    x_stride: u64,
    y_stride: u64,
    eps: f32,
    wide: u32,
});
kernel_args!(NormBackwardArgs {
    dy: u64,
    x: u64,
    w: u64,
    inv: u64,
    dx: u64,
    groups: u64,
    heads: u64,
    group: u64,
    dy_stride: u64,
    x_stride: u64,
    dx_stride: u64,
    add: u32,
    wide: u32,
});
kernel_args!(NormWeightArgs {
    dy: u64,
    x: u64,
    inv: u64,
    partial: u64,
    groups: u64,
    heads: u64,
    group: u64,
    dy_stride: u64,
    x_stride: u64,
    task_groups: u64,
    wide: u32,
});
kernel_args!(NormalizeArgs { x: u64, y: u64, inv: u64, cols: u64, wide: u32 });
kernel_args!(NormalizeBackwardArgs {
    dy: u64,
    y: u64,
    inv: u64,
    dx: u64,
    cols: u64,
    dy_stride: u64,
    wide: u32,
});

/// Groups of up to this many columns are processed by half a warp: one octet per lane.
const HALF_WARP_GROUP: usize = 128;
/// Groups of up to this many columns are processed by one warp: at most four octets per lane.
const WARP_GROUP: usize = 1024;

/// The groups of a norm: groups per row, columns per group.
struct Groups {
    heads: usize,
    group: usize,
    count: usize,
}

impl Groups {
    fn new((rows, cols): (usize, usize), w: &CudaTensor) -> Self {
        let group = w.cols();
        assert!(w.rows() == 1 && group > 0 && cols.is_multiple_of(group), "rms_norm: groups");
        assert_eq!(w.dtype(), Dtype::F32, "rms_norm: dtype of the weight");
        let heads = cols / group;
        Groups { heads, group, count: rows * heads }
    }

    /// Whether octets of all blocks can be loaded 16 bytes at a time.
    fn is_wide(&self, blocks: &[Block]) -> u32 {
        let whole = self.heads == 1 || self.group.is_multiple_of(Block::OCTET);
        u32::from(whole && blocks.iter().all(Block::is_aligned))
    }

    /// Suffix of the kernel's name, and its grid.
    fn plan(&self) -> (&'static str, [usize; 2]) {
        let block = BLOCK as usize;
        if self.group <= HALF_WARP_GROUP {
            ("half", [self.count.div_ceil(block / 16), 1])
        } else if self.group <= WARP_GROUP {
            ("warp", [self.count.div_ceil(block / 32), 1])
        } else {
            ("block", [self.count, 1])
        }
    }
}

impl Device {
    pub(super) fn rms_norm(
        &self,
        x: Block,
        w: &CudaTensor,
        eps: f32,
        dtype: Dtype,
    ) -> Result<(CudaTensor, CudaTensor)> {
        let groups = Groups::new(x.shape(), w);
        let y = self.unspecified(x.rows, x.cols, dtype)?;
        let inv = self.unspecified(x.rows, groups.heads, Dtype::F32)?;
        let args = NormArgs {
            x: x.pointer,
            w: w.pointer(),
            y: y.pointer(),
            inv: inv.pointer(),
            groups: groups.count as u64,
            heads: groups.heads as u64,
            group: groups.group as u64,
            x_stride: x.stride as u64,
            y_stride: x.cols as u64,
            eps,
            wide: groups.is_wide(&[x, Block::from(&y), Block::from(w)]),
        };
        let (suffix, grid) = groups.plan();
        self.launch(&format!("rms_norm_{}_{dtype}_{suffix}", x.dtype), grid, BLOCK, args)?;
        Ok((y, inv))
    }

    /// Writes dx, or adds to it; dx may be dy. Adds to dw first.
    pub(super) fn rms_norm_backward(
        &self,
        (dy, x, dx): (Block, Block, Block),
        (w, inv): (&CudaTensor, &CudaTensor),
        dw: Option<&mut CudaTensor>,
        add: bool,
    ) -> Result<()> {
        let groups = Groups::new(x.shape(), w);
        assert_eq!(dy.shape(), x.shape(), "rms_norm_backward: gradient");
        assert_eq!(dx.shape(), x.shape(), "rms_norm_backward: result");
        assert_eq!(inv.shape(), (x.rows, groups.heads), "rms_norm_backward: inv_rms");
        if let Some(dw) = dw {
            self.rms_norm_weight_grad((dy, x), inv, &groups, dw)?;
        }
        let args = NormBackwardArgs {
            dy: dy.pointer,
            x: x.pointer,
            w: w.pointer(),
            inv: inv.pointer(),
            dx: dx.pointer,
            groups: groups.count as u64,
            heads: groups.heads as u64,
            group: groups.group as u64,
            dy_stride: dy.stride as u64,
            x_stride: x.stride as u64,
            dx_stride: dx.stride as u64,
            add: u32::from(add),
            wide: groups.is_wide(&[dy, x, dx, Block::from(w)]),
        };
        let (suffix, grid) = groups.plan();
        let kernel = format!("rms_norm_backward_{}_{}_{}_{suffix}", dy.dtype, x.dtype, dx.dtype);
        self.launch(&kernel, grid, BLOCK, args)
    }

    fn rms_norm_weight_grad(
        &self,
        (dy, x): (Block, Block),
        inv: &CudaTensor,
        groups: &Groups,
        dw: &mut CudaTensor,
    ) -> Result<()> {
        assert_eq!(dw.shape(), (1, groups.group), "rms_norm_backward: weight gradient");
        let task_groups = sum_task_rows(groups.group);
        let tasks = groups.count.div_ceil(task_groups);
        let partial = self.unspecified(tasks, groups.group, Dtype::F32)?;
        let args = NormWeightArgs {
            dy: dy.pointer,
            x: x.pointer,
            inv: inv.pointer(),
            partial: partial.pointer(),
            groups: groups.count as u64,
            heads: groups.heads as u64,
            group: groups.group as u64,
            dy_stride: dy.stride as u64,
            x_stride: x.stride as u64,
            task_groups: task_groups as u64,
            wide: groups.is_wide(&[dy, x]),
        };
        let grid = [tasks, octets(groups.group).div_ceil(32)];
        self.launch(&format!("rms_norm_weight_{}_{}", dy.dtype, x.dtype), grid, 256, args)?;
        self.finish_column_sum(&partial, dw.pointer(), true)
    }

    pub(super) fn normalize(&self, x: &CudaTensor) -> Result<(CudaTensor, CudaTensor)> {
        assert_eq!(x.dtype(), Dtype::F32, "normalize: dtype");
        let y = self.unspecified(x.rows(), x.cols(), Dtype::F32)?;
        let inv = self.unspecified(x.rows(), 1, Dtype::F32)?;
        let args = NormalizeArgs {
            x: x.pointer(),
            y: y.pointer(),
            inv: inv.pointer(),
            cols: x.cols() as u64,
            wide: u32::from(Block::from(x).is_aligned() && Block::from(&y).is_aligned()),
        };
        self.launch("normalize_f32", [x.rows(), 1], BLOCK, args)?;
        Ok((y, inv))
    }

    pub(super) fn normalize_backward(
        &self,
        dy: Block,
        y: &CudaTensor,
        inv: &CudaTensor,
    ) -> Result<CudaTensor> {
        assert_eq!(dy.shape(), y.shape(), "normalize_backward: gradient");
        assert_eq!(inv.shape(), (y.rows(), 1), "normalize_backward: inv_norm");
        assert_eq!(dy.dtype, Dtype::F32, "normalize_backward: dtype");
        let dx = self.unspecified(dy.rows, dy.cols, dy.dtype)?;
        let blocks = [dy, Block::from(y), Block::from(&dx)];
        let args = NormalizeBackwardArgs {
            dy: dy.pointer,
            y: y.pointer(),
            inv: inv.pointer(),
            dx: dx.pointer(),
            cols: dy.cols as u64,
            dy_stride: dy.stride as u64,
            wide: u32::from(blocks.iter().all(Block::is_aligned)),
        };
        self.launch("normalize_backward_f32", [dy.rows, 1], BLOCK, args)?;
        Ok(dx)
    }
}
