//! Matrix products of linear layers and of scores. The precision is that of the left operand.

use std::sync::atomic::Ordering;

use super::blas::Product;
use super::device::{Device, kernel_args};
use super::rows::octets;
use super::tensor::{Block, CudaTensor, CudaWeight, block};
use crate::Result;
use crate::backend::{Accumulate, Dtype, Epilogue, Shape, View};

kernel_args!(GemmArgs {
    a: u64,
    b: u64,
    c: u64,
    d: u64,
    m: u64,
    n: u64,
    k: u64,
    a_row: u64,
    a_col: u64,
    b_row: u64,
    b_col: u64,
    c_row: u64,
    d_row: u64,
    alpha: f32,
    beta: f32,
});
kernel_args!(FinishArgs {
    product: u64,
    bias: u64,
    residual: u64,
    y: u64,
    rows: u64,
    cols: u64,
    wide: u32,
});

/// An operand in the dtype of a product, with the converted copy if one was made.
struct Operand {
    block: Block,
    _copy: Option<CudaTensor>,
}

impl Device {
    /// A block in a dtype; converted if it has another.
    fn operand(&self, x: Block, dtype: Dtype) -> Result<Operand> {
        if x.dtype == dtype {
            return Ok(Operand { block: x, _copy: None });
        }
        let copy = self.converted(x, dtype)?;
        Ok(Operand { block: Block::from(&copy), _copy: Some(copy) })
    }

    /// Some rows of a weight in a dtype: its values, its working copy, or a conversion.
    fn weight(&self, w: View<'_, CudaWeight>, dtype: Dtype) -> Result<Operand> {
        assert_eq!(w.cols, w.tensor.cols(), "a view of a weight has all of its columns");
        let working = w.tensor.working.as_ref().filter(|working| working.dtype() == dtype);
        let values = working.unwrap_or(&w.tensor.values);
        self.operand(block(values, (w.row, w.rows), (w.col, w.cols)), dtype)
    }

    fn multiply(&self, product: &Product) -> Result<()> {
        product.check();
        let Product { left, right, out, .. } = product;
        if out.is_empty() {
            return Ok(());
        }
        let inner = product.inner();
        let name = || {
            let [t, u] = [product.left_transposed, product.right_transposed]
                .map(|transposed| if transposed { "T" } else { "" });
            let (m, n, dtype) = (out.rows, out.cols, left.dtype);
            format!("product {dtype} [{m}, {inner}]{t} x [{inner}, {n}]{u} to {}", out.dtype)
        };
        let multiply = || self.blas.multiply(&self.context, product);
        if inner > 0 && self.profile.measure(&self.context, name, multiply)? {
            return Ok(());
        }
        self.fallback_products.fetch_add(1, Ordering::Relaxed);
        let strides = |x: &Block, transposed| match transposed {
            true => (1, x.stride as u64),
            false => (x.stride as u64, 1),
        };
        let (a_row, a_col) = strides(left, product.left_transposed);
        let (b_row, b_col) = strides(right, product.right_transposed);
        let onto = product.onto.unwrap_or(*out);
        let args = GemmArgs {
            a: left.pointer,
            b: right.pointer,
            c: onto.pointer,
            d: out.pointer,
            m: out.rows as u64,
            n: out.cols as u64,
            k: inner as u64,
            a_row,
            a_col,
            b_row,
            b_col,
            c_row: onto.stride as u64,
            d_row: out.stride as u64,
            alpha: product.alpha,
            beta: if product.onto.is_some() { 1.0 } else { 0.0 },
        };
        let grid = [out.rows.div_ceil(16), out.cols.div_ceil(16)];
        self.launch(&format!("gemm_{}_{}", left.dtype, out.dtype), grid, 256, args)
    }

    pub(super) fn linear(
        &self,
        x: Block,
        w: View<'_, CudaWeight>,
        alpha: f32,
        epilogue: &Epilogue<'_, CudaTensor>,
    ) -> Result<CudaTensor> {
        let w = self.weight(w, x.dtype)?;
        self.linear_by(x, w.block, alpha, epilogue)
    }

    fn linear_by(
        &self,
        x: Block,
        w: Block,
        alpha: f32,
        epilogue: &Epilogue<'_, CudaTensor>,
    ) -> Result<CudaTensor> {
        let residual = epilogue.residual;
        let dtype = residual.map_or(x.dtype, Shape::dtype);
        let y = self.unspecified(x.rows, w.rows, dtype)?;
        let Some(bias) = epilogue.bias else {
            self.linear_onto((x, w), alpha, residual.map(Block::from), Block::from(&y))?;
            return Ok(y);
        };
        let bias = Block::from(bias);
        assert_eq!((bias.shape(), bias.dtype), ((1, w.rows), Dtype::F32), "linear: bias");
        // Rounded once, with the bias and the residual added.
        let product = match dtype {
            Dtype::F32 => None,
            Dtype::Bf16 => Some(self.unspecified(x.rows, w.rows, Dtype::F32)?),
        };
        let product = Block::from(product.as_ref().unwrap_or(&y));
        self.linear_onto((x, w), alpha, None, product)?;
        let wide = [product, Block::from(&y)].iter().all(Block::is_wide)
            && bias.is_aligned()
            && residual.is_none_or(|residual| Block::from(residual).is_wide());
        if let Some(residual) = residual {
            assert_eq!(residual.shape(), y.shape(), "linear: residual");
        }
        let args = FinishArgs {
            product: product.pointer,
            bias: bias.pointer,
            residual: residual.map_or(0, CudaTensor::pointer),
            y: y.pointer(),
            rows: y.rows() as u64,
            cols: y.cols() as u64,
            wide: u32::from(wide),
        };
        let items = y.rows() * octets(y.cols());
        self.launch_items(&format!("finish_{dtype}"), items, args)?;
        Ok(y)
    }

    fn linear_onto(
        &self,
        (x, w): (Block, Block),
        alpha: f32,
        onto: Option<Block>,
        out: Block,
    ) -> Result<()> {
        self.multiply(&Product {
            left: x,
            left_transposed: false,
            right: w,
            right_transposed: true,
            alpha,
            onto,
            out,
        })
    }

    pub(super) fn linear_add(&self, x: Block, w: View<'_, CudaWeight>, y: Block) -> Result<()> {
        let w = self.weight(w, x.dtype)?;
        self.linear_onto((x, w.block), 1.0, Some(y), y)
    }

    pub(super) fn linear_input_grad(
        &self,
        dy: Block,
        w: View<'_, CudaWeight>,
        alpha: f32,
        onto: Option<CudaTensor>,
    ) -> Result<CudaTensor> {
        let w = self.weight(w, dy.dtype)?;
        self.input_grad_by(dy, w.block, alpha, onto)
    }

    fn input_grad_by(
        &self,
        dy: Block,
        w: Block,
        alpha: f32,
        onto: Option<CudaTensor>,
    ) -> Result<CudaTensor> {
        let adds = onto.is_some();
        let dx = onto.map_or_else(|| self.unspecified(dy.rows, w.cols, dy.dtype), Ok)?;
        let out = Block::from(&dx);
        self.multiply(&Product {
            left: dy,
            left_transposed: false,
            right: w,
            right_transposed: false,
            alpha,
            onto: adds.then_some(out),
            out,
        })?;
        Ok(dx)
    }

    pub(super) fn linear_weight_grad(
        &self,
        dy: Block,
        x: Block,
        dw: Block,
        accumulate: Accumulate,
    ) -> Result<()> {
        let x = self.operand(x, dy.dtype)?;
        self.multiply(&Product {
            left: dy,
            left_transposed: true,
            right: x.block,
            right_transposed: false,
            alpha: 1.0,
            onto: (accumulate == Accumulate::Add).then_some(dw),
            out: dw,
        })
    }

    pub(super) fn scores(&self, q: &CudaTensor, p: &CudaTensor, scale: f32) -> Result<CudaTensor> {
        let p = self.operand(Block::from(p), q.dtype())?;
        self.linear_by(Block::from(q), p.block, scale, &Epilogue::default())
    }

    pub(super) fn scores_backward(
        &self,
        ds: &CudaTensor,
        q: &CudaTensor,
        p: &CudaTensor,
        scale: f32,
    ) -> Result<(CudaTensor, CudaTensor)> {
        assert_eq!(ds.shape(), (q.rows(), p.rows()), "scores_backward: gradient");
        let [p_in, q_in] = [p, q].map(|x| self.operand(Block::from(x), ds.dtype()));
        let (p_in, q_in) = (p_in?, q_in?);
        let dq = self.input_grad_by(Block::from(ds), p_in.block, scale, None)?;
        let dp = self.unspecified(p.rows(), p.cols(), Dtype::F32)?;
        self.multiply(&Product {
            left: Block::from(ds),
            left_transposed: true,
            right: q_in.block,
            right_transposed: false,
            alpha: scale,
            onto: None,
            out: Block::from(&dp),
        })?;
        Ok((dq, dp))
    }
}
