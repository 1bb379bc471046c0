//! Gathering, scattering, averaging, converting and summing rows.

use cudarc::driver::sys as cu;

use super::device::{Cuda, Device, kernel_args};
use super::driver::check;
use super::tensor::{Block, CudaIndex, CudaTensor};
use crate::Result;
use crate::backend::{Accumulate, Dtype, ScatterPlan, Shape};

kernel_args!(CopyArgs {
    x: u64,
    y: u64,
    rows: u64,
    cols: u64,
    x_stride: u64,
    y_stride: u64,
    wide: u32,
});
kernel_args!(AddScaledArgs {
    x: u64,
    y: u64,
    rows: u64,
    cols: u64,
    x_stride: u64,
    y_stride: u64,
    scale: f32,
    wide: u32,
});
kernel_args!(GatherArgs { x: u64, rows: u64, y: u64, n: u64, cols: u64, wide: u32 });
kernel_args!(ScatterArgs {
    dy: u64,
    sources: u64,
    targets: u64,
    starts: u64,
    dx: u64,
    cols: u64,
    wide: u32,
});
kernel_args!(SegmentArgs { x: u64, offsets: u64, y: u64, cols: u64, wide: u32 });
kernel_args!(ColumnSumArgs {
    x: u64,
    partial: u64,
    rows: u64,
    cols: u64,
    stride: u64,
    task_rows: u64,
    wide: u32,
});
kernel_args!(ColumnFinishArgs { partial: u64, sum: u64, tasks: u64, cols: u64, add: u32 });

/// Octets of a row per block, in kernels whose blocks process a part of one row.
const ROW_BLOCK: u32 = 128;

impl Device {
    /// Fills a matrix with zero bytes, which are zeros in either dtype.
    pub(super) fn clear(&self, x: &mut CudaTensor) -> Result<()> {
        if x.bytes() == 0 {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: the tensor has that many bytes.
        let result =
            unsafe { cu::cuMemsetD8Async(x.pointer(), 0, x.bytes(), self.context.stream()) };
        check(result, "fill GPU memory")
    }

    pub(super) fn zeros(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<CudaTensor> {
        let mut x = self.unspecified(rows, cols, dtype)?;
        self.clear(&mut x)?;
        Ok(x)
    }

    /// `y = x`, converted.
    pub(super) fn copy(&self, x: Block, y: Block) -> Result<()> {
        assert_eq!(x.shape(), y.shape(), "copy: shapes");
        if x.is_empty() {
            return Ok(());
        }
        // If both are contiguous, they are copied as one long row, of which only the last octet is incomplete.
        let whole = x.rows * x.cols;
        let (x, y) = match (x.reshaped(whole), y.reshaped(whole)) {
            (Some(x), Some(y)) => (x, y),
            _ => (x, y),
        };
        let args = CopyArgs {
            x: x.pointer,
            y: y.pointer,
            rows: x.rows as u64,
            cols: x.cols as u64,
            x_stride: x.stride as u64,
            y_stride: y.stride as u64,
            wide: u32::from(x.is_aligned() && y.is_aligned()),
        };
        let kernel = format!("copy_{}_{}", x.dtype, y.dtype);
        self.launch_items(&kernel, x.rows * octets(x.cols), args)
    }

    /// `y += scale · x`
    pub(super) fn add_scaled(&self, x: Block, scale: f32, y: Block) -> Result<()> {
        assert_eq!(x.shape(), y.shape(), "add_scaled: shapes");
        assert_eq!((x.dtype, y.dtype), (Dtype::F32, Dtype::F32), "add_scaled: dtypes");
        let args = AddScaledArgs {
            x: x.pointer,
            y: y.pointer,
            rows: x.rows as u64,
            cols: x.cols as u64,
            x_stride: x.stride as u64,
            y_stride: y.stride as u64,
            scale,
            wide: u32::from(x.is_aligned() && y.is_aligned()),
        };
        self.launch_items("add_scaled", x.rows * octets(x.cols), args)
    }

    /// A copy of the elements as a new matrix, in a dtype.
    pub(super) fn converted(&self, x: Block, dtype: Dtype) -> Result<CudaTensor> {
        let y = self.unspecified(x.rows, x.cols, dtype)?;
        self.copy(x, Block::from(&y))?;
        Ok(y)
    }

    pub(super) fn gather_rows(&self, x: &CudaTensor, rows: &CudaIndex) -> Result<CudaTensor> {
        let y = self.unspecified(rows.len, x.cols(), x.dtype())?;
        let args = GatherArgs {
            x: x.pointer(),
            rows: rows.pointer(),
            y: y.pointer(),
            n: rows.len as u64,
            cols: x.cols() as u64,
            wide: u32::from(Block::from(x).is_wide() && Block::from(&y).is_wide()),
        };
        let kernel = format!("gather_{}", x.dtype());
        self.launch_items(&kernel, rows.len * octets(x.cols()), args)?;
        Ok(y)
    }

    pub(super) fn scatter_add_rows(
        &self,
        dy: &CudaTensor,
        plan: &ScatterPlan<Cuda>,
        dx: &mut CudaTensor,
    ) -> Result<()> {
        assert_eq!(dy.shape(), (plan.sources_len, dx.cols()), "scatter_add_rows: gradient");
        assert_eq!(plan.sources.len, plan.sources_len, "scatter_add_rows: sources");
        assert_eq!(plan.targets.len, plan.targets_len, "scatter_add_rows: targets");
        assert_eq!(plan.starts.len, plan.targets_len + 1, "scatter_add_rows: starts");
        let args = ScatterArgs {
            dy: dy.pointer(),
            sources: plan.sources.pointer(),
            targets: plan.targets.pointer(),
            starts: plan.starts.pointer(),
            dx: dx.pointer(),
            cols: dx.cols() as u64,
            wide: u32::from(Block::from(dy).is_wide() && Block::from(&*dx).is_wide()),
        };
        let kernel = format!("scatter_{}_{}", dy.dtype(), dx.dtype());
        let (grid, block) = row_grid(plan.targets_len, dx.cols());
        self.launch(&kernel, grid, block, args)
    }

    pub(super) fn segment_mean(&self, x: &CudaTensor, offsets: &CudaIndex) -> Result<CudaTensor> {
        let segments = offsets.len - 1;
        let y = self.unspecified(segments, x.cols(), x.dtype())?;
        self.segments("segment_mean", (x, &y), offsets, x.cols())?;
        Ok(y)
    }

    pub(super) fn segment_mean_backward(
        &self,
        dy: &CudaTensor,
        offsets: &CudaIndex,
        rows: usize,
    ) -> Result<CudaTensor> {
        assert_eq!(dy.rows(), offsets.len - 1, "segment_mean_backward: segments");
        let dx = self.zeros(rows, dy.cols(), dy.dtype())?;
        self.segments("segment_mean_backward", (dy, &dx), offsets, dy.cols())?;
        Ok(dx)
    }

    fn segments(
        &self,
        kernel: &str,
        (x, y): (&CudaTensor, &CudaTensor),
        offsets: &CudaIndex,
        cols: usize,
    ) -> Result<()> {
        assert_eq!(x.dtype(), Dtype::F32, "{kernel}: dtype");
        let args = SegmentArgs {
            x: x.pointer(),
            offsets: offsets.pointer(),
            y: y.pointer(),
            cols: cols as u64,
            wide: u32::from(Block::from(x).is_wide() && Block::from(y).is_wide()),
        };
        let (grid, block) = row_grid(offsets.len - 1, cols);
        self.launch(&format!("{kernel}_f32"), grid, block, args)
    }

    /// `db (+)= Σ_rows dy`
    pub(super) fn linear_bias_grad(
        &self,
        dy: Block,
        db: Block,
        accumulate: Accumulate,
    ) -> Result<()> {
        assert_eq!(db.shape(), (1, dy.cols), "linear_bias_grad: gradient");
        assert_eq!(db.dtype, Dtype::F32, "linear_bias_grad: dtype");
        let task_rows = sum_task_rows(dy.cols);
        let tasks = dy.rows.div_ceil(task_rows);
        let partial = self.unspecified(tasks, dy.cols, Dtype::F32)?;
        let args = ColumnSumArgs {
            x: dy.pointer,
            partial: partial.pointer(),
            rows: dy.rows as u64,
            cols: dy.cols as u64,
            stride: dy.stride as u64,
            task_rows: task_rows as u64,
            wide: u32::from(dy.is_aligned()),
        };
        let grid = [tasks, octets(dy.cols).div_ceil(32)];
        self.launch(&format!("column_sum_{}", dy.dtype), grid, 256, args)?;
        self.finish_column_sum(&partial, db.pointer, accumulate == Accumulate::Add)
    }

    /// Adds the rows of `partial` up, in order, to `cols` elements at `sum`.
    pub(super) fn finish_column_sum(
        &self,
        partial: &CudaTensor,
        sum: u64,
        add: bool,
    ) -> Result<()> {
        let args = ColumnFinishArgs {
            partial: partial.pointer(),
            sum,
            tasks: partial.rows() as u64,
            cols: partial.cols() as u64,
            add: u32::from(add),
        };
        self.launch_items("column_finish", partial.cols(), args)
    }
}

/// Elements of a matrix that are summed by columns into one partial sum.
pub(super) const SUM_TASK_ELEMENTS: usize = 1 << 18;

/// Rows that are summed into one partial sum.
pub(super) fn sum_task_rows(cols: usize) -> usize {
    (SUM_TASK_ELEMENTS / cols.max(1)).max(1)
}

/// Octets of a row; the last one may be incomplete.
pub(super) fn octets(cols: usize) -> usize {
    cols.div_ceil(Block::OCTET)
}

/// Grid and block size for one row per block in x and its columns in y.
fn row_grid(rows: usize, cols: usize) -> ([usize; 2], u32) {
    let octets = octets(cols);
    let block = (octets.next_multiple_of(32) as u32).min(ROW_BLOCK);
    ([rows, octets.div_ceil(block.max(1) as usize)], block.max(32))
}
