//! Rotary embedding, SwiGLU and dropout.

use super::device::{Cuda, Device, kernel_args};
use super::rows::octets;
use super::tensor::{Block, CudaIndex, CudaTensor};
use crate::Result;
use crate::backend::{DropoutKey, RopeDirection, RopeTable, Shape, TokenIds};

kernel_args!(RopeArgs {
    x: u64,
    positions: u64,
    cosines: u64,
    sines: u64,
    rows: u64,
    heads: u64,
    half: u64,
    stride: u64,
    direction: f32,
    wide: u32,
});
kernel_args!(SwigluArgs { gate_up: u64, y: u64, rows: u64, cols: u64, wide: u32 });
kernel_args!(DropoutArgs {
    x: u64,
    y: u64,
    sequences: u64,
    positions: u64,
    rows: u64,
    cols: u64,
    seed_low: u32,
    seed_high: u32,
    step: u32,
    module: u32,
    threshold: u32,
    keep: f32,
    add: u32,
    wide: u32,
});

/// Columns whose random numbers come from the same sixteen counters.
const DROPOUT_BLOCK: usize = 64;

impl Device {
    pub(super) fn rope(
        &self,
        x: Block,
        positions: &CudaIndex,
        table: &RopeTable<Cuda>,
        direction: RopeDirection,
    ) -> Result<()> {
        let half = table.cos.cols();
        assert!(half > 0 && x.cols.is_multiple_of(2 * half), "rope: heads");
        assert_eq!(x.rows, positions.len, "rope: positions");
        assert_eq!(table.sin.shape(), table.cos.shape(), "rope: table");
        let heads = x.cols / (2 * half);
        let tables = [&table.cos, &table.sin].map(Block::from);
        let aligned = x.is_aligned() && tables.iter().all(Block::is_aligned);
        let args = RopeArgs {
            x: x.pointer,
            positions: positions.pointer(),
            cosines: table.cos.pointer(),
            sines: table.sin.pointer(),
            rows: x.rows as u64,
            heads: heads as u64,
            half: half as u64,
            stride: x.stride as u64,
            direction: if direction == RopeDirection::Forward { 1.0 } else { -1.0 },
            wide: u32::from(aligned && half.is_multiple_of(Block::OCTET)),
        };
        self.launch_items(&format!("rope_{}", x.dtype), x.rows * heads * octets(half), args)
    }

    pub(super) fn swiglu(&self, gate_up: &CudaTensor) -> Result<CudaTensor> {
        assert!(gate_up.cols().is_multiple_of(2), "swiglu: columns");
        let y = self.unspecified(gate_up.rows(), gate_up.cols() / 2, gate_up.dtype())?;
        self.swiglu_kernel("swiglu", gate_up, &y)?;
        Ok(y)
    }

    /// Overwrites `gate_up` with the gradients of gate and up, and `dy` with the result of the forward pass.
    pub(super) fn swiglu_backward(
        &self,
        dy: &mut CudaTensor,
        gate_up: &mut CudaTensor,
    ) -> Result<()> {
        assert_eq!(gate_up.shape(), (dy.rows(), 2 * dy.cols()), "swiglu_backward: shapes");
        assert_eq!(gate_up.dtype(), dy.dtype(), "swiglu_backward: dtypes");
        self.swiglu_kernel("swiglu_backward", gate_up, dy)
    }

    fn swiglu_kernel(&self, kernel: &str, gate_up: &CudaTensor, y: &CudaTensor) -> Result<()> {
        let args = SwigluArgs {
            gate_up: gate_up.pointer(),
            y: y.pointer(),
            rows: y.rows() as u64,
            cols: y.cols() as u64,
            wide: u32::from(Block::from(y).is_wide() && Block::from(gate_up).is_wide()),
        };
        let items = y.rows() * octets(y.cols());
        self.launch_items(&format!("{kernel}_{}", y.dtype()), items, args)
    }

    /// Writes y, or adds to it.
    pub(super) fn dropout(
        &self,
        x: &CudaTensor,
        tokens: TokenIds<'_, Cuda>,
        key: &DropoutKey,
        onto: Option<CudaTensor>,
    ) -> Result<CudaTensor> {
        let (rows, cols) = x.shape();
        let add = onto.is_some();
        let y = onto.map_or_else(|| self.unspecified(rows, cols, x.dtype()), Ok)?;
        assert_eq!((y.shape(), y.dtype()), (x.shape(), x.dtype()), "dropout: onto");
        let TokenIds { sequences, positions } = tokens;
        assert_eq!((sequences.len, positions.len), (rows, rows), "dropout: rows");
        assert!(key.module < 1 << 16 && cols <= 1 << 18, "dropout: modules or columns");
        let args = DropoutArgs {
            x: x.pointer(),
            y: y.pointer(),
            sequences: sequences.pointer(),
            positions: positions.pointer(),
            rows: rows as u64,
            cols: cols as u64,
            seed_low: key.seed as u32,
            seed_high: (key.seed >> 32) as u32,
            step: key.step as u32,
            module: key.module,
            threshold: (f64::from(key.probability) * 4_294_967_296.0) as u32,
            keep: 1.0 / (1.0 - key.probability),
            add: u32::from(add),
            wide: u32::from(Block::from(x).is_wide() && Block::from(&y).is_wide()),
        };
        let items = rows * 2 * cols.div_ceil(DROPOUT_BLOCK);
        self.launch_items(&format!("dropout_{}", x.dtype()), items, args)?;
        Ok(y)
    }
}
