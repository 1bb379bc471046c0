//! The rate of matrix products with the shapes of a training step, in GFLOP/s.
//!
//! `cargo bench --bench products -- [FILTER…]`, where a filter is a part of the name of a line, such as
//! `dw` or `576x1536`. For each product: the `gemm` crate in f32, llara in f32, llara in bf16 (bf16
//! result if it is an activation). `bench/product_rates.py` prints the same shapes for PyTorch.

mod timing;

use half::bf16;
use llara::Result;
use llara::backend::gemm::{Gemm, Output, Precision, View, ViewMut};

use timing::Cases;

/// Tokens of a batch.
const TOKENS: usize = 4000;
/// In and out features of the linear layers, the last of a larger model.
const LAYERS: [(usize, usize); 7] =
    [(576, 576), (576, 192), (576, 1536), (1536, 576), (64, 576), (576, 64), (2048, 5632)];

/// A product of a linear layer.
#[derive(Clone, Copy)]
enum Form {
    /// `y = x · wᵀ`
    Forward,
    /// `dx = dy · w`
    InputGrad,
    /// `dw += dyᵀ · x`
    WeightGrad,
}

/// Sizes of a product: `[m, k] · [k, n]`.
type Dims = (usize, usize, usize);

fn main() -> Result<()> {
    let Some(cases) = Cases::from_args() else { return Ok(()) };
    println!("layer x form          m     n     k  crate    f32   bf16");
    for (input, output) in LAYERS {
        for (form, name) in
            [(Form::Forward, "y"), (Form::InputGrad, "dx"), (Form::WeightGrad, "dw")]
        {
            let name = format!("{input}x{output} {name}");
            if !cases.include(&name) {
                continue;
            }
            let dims = match form {
                Form::Forward => (TOKENS, output, input),
                Form::InputGrad => (TOKENS, input, output),
                Form::WeightGrad => (output, input, TOKENS),
            };
            let rates = rates(form, dims)?.map(|rate| format!("{rate:6.0}")).join(" ");
            println!("{name:15} {:7} {:5} {:5} {rates}", dims.0, dims.1, dims.2);
        }
    }
    Ok(())
}

fn rates(form: Form, dims: Dims) -> Result<[f64; 3]> {
    let (m, n, k) = dims;
    let (a, b) = (values(m * k), values(k * n));
    let half = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let (a_half, b_half) = (half(&a), half(&b));
    let single = Product { form, dims, precision: Precision::F32, a: &a, b: &b };
    let half = Product { form, dims, precision: Precision::Bf16, a: &a_half, b: &b_half };
    let mut by_crate = vec![0.0; m * n];
    let (mut out, mut out_half) = (vec![0.0f32; m * n], vec![0.0f32; m * n]);
    let mut rounded = vec![bf16::ZERO; m * n];
    let gradient = matches!(form, Form::WeightGrad);

    let times = timing::in_turn([
        &mut || {
            by_the_gemm_crate(form, dims, &mut by_crate, &a, &b);
            Ok(())
        },
        &mut || single.multiply(&mut out),
        &mut || match gradient {
            true => half.multiply(&mut out_half),
            false => half.multiply(&mut rounded),
        },
    ])?;
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    Ok(times.map(|times| flops / times.median / 1e9))
}

/// Operands of type T as in a linear layer: transposed as the form requires.
struct Product<'a, T> {
    form: Form,
    dims: Dims,
    precision: Precision,
    a: &'a [T],
    b: &'a [T],
}

impl<T: Copy> Product<'_, T>
where
    for<'v> View<'v, T>: Into<llara::backend::gemm::Operand<'v>>,
{
    /// Weight gradients are accumulated.
    fn multiply<O: Output>(&self, out: &mut [O]) -> Result<()> {
        let (m, n, _) = self.dims;
        let gemm = match self.form {
            Form::WeightGrad => Gemm::new(self.precision).accumulate(),
            Form::Forward | Form::InputGrad => Gemm::new(self.precision),
        };
        gemm.multiply(ViewMut::new(out, m, n), self.left(), self.right());
        Ok(())
    }

    fn left(&self) -> View<'_, T> {
        let (m, _, k) = self.dims;
        match self.form {
            Form::WeightGrad => View::new(self.a, k, m).t(),
            Form::Forward | Form::InputGrad => View::new(self.a, m, k),
        }
    }

    fn right(&self) -> View<'_, T> {
        let (_, n, k) = self.dims;
        match self.form {
            Form::Forward => View::new(self.b, n, k).t(),
            Form::InputGrad | Form::WeightGrad => View::new(self.b, k, n),
        }
    }
}

fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 24) as f32).collect()
}

fn by_the_gemm_crate(form: Form, (m, n, k): Dims, out: &mut [f32], a: &[f32], b: &[f32]) {
    let gradient = matches!(form, Form::WeightGrad);
    let (a_col, a_row) = if gradient { (m, 1) } else { (1, k) };
    let (b_col, b_row) = if matches!(form, Form::Forward) { (k, 1) } else { (1, n) };
    // SAFETY: `out` is [m, n], `a` [m, k] and `b` [k, n] with these strides, by `rates`.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            gradient,
            a.as_ptr(),
            a_col as isize,
            a_row as isize,
            b.as_ptr(),
            b_col as isize,
            b_row as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}
