//! How fast the processor multiplies matrices of the shapes of a training step, in GFLOP/s.
//!
//! `cargo run --release --example product_rates -- [TOKENS]`. For each product: the `gemm` crate in
//! f32, ours in f32, ours in bf16 (bf16 result where it is an activation), and both with the right
//! operand packed beforehand. Medians of interleaved runs, so that what else the machine does falls on
//! all alike. `examples/product_rates.py` prints the same shapes for PyTorch.

use std::time::Instant;

use half::bf16;
use llara::backend::gemm::{Gemm, Output, PackedB, Precision, View, ViewMut};

/// Runs of each contestant.
const RUNS: usize = 11;

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

fn main() {
    let tokens = std::env::args().nth(1).and_then(|tokens| tokens.parse().ok()).unwrap_or(4000);
    println!("{} threads, {tokens} tokens", rayon::current_num_threads());
    println!("form      m     n     k  crate    f32 packed   bf16 packed");
    for (input, output) in LAYERS {
        for (name, form) in
            [("y ", Form::Forward), ("dx", Form::InputGrad), ("dw", Form::WeightGrad)]
        {
            let dims = match form {
                Form::Forward => (tokens, output, input),
                Form::InputGrad => (tokens, input, output),
                Form::WeightGrad => (output, input, tokens),
            };
            let rates = rates(form, dims).map(|rate| format!("{rate:6.0}")).join(" ");
            println!("{name}   {:5} {:5} {:5} {rates}", dims.0, dims.1, dims.2);
        }
    }
}

fn rates(form: Form, (m, n, k): (usize, usize, usize)) -> [f64; 5] {
    let (a, b) = (values(m * k), values(k * n));
    let half = |x: &[f32]| x.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>();
    let (a_half, b_half) = (half(&a), half(&b));
    let (left, right) = (left(form, &a, (m, k)), right(form, &b, (k, n)));
    let (left_half, right_half) =
        (self::left(form, &a_half, (m, k)), self::right(form, &b_half, (k, n)));
    let packed = PackedB::new(right, Precision::F32);
    let packed_half = PackedB::new(right_half, Precision::Bf16);
    let (mut out, mut out_half) = (vec![0.0f32; m * n], vec![bf16::ZERO; m * n]);
    let f32s = how::<f32>(form, Precision::F32);
    let into_f32 = how::<f32>(form, Precision::Bf16);
    let into_bf16 = how::<bf16>(form, Precision::Bf16);
    let gradient = matches!(form, Form::WeightGrad);

    let mut seconds: [Vec<f64>; 5] = Default::default();
    for _ in 0..RUNS {
        let mut time = |contestant: usize, work: &mut dyn FnMut()| {
            let start = Instant::now();
            work();
            seconds[contestant].push(start.elapsed().as_secs_f64());
        };
        time(0, &mut || by_the_gemm_crate(form, (m, n, k), &mut out, &a, &b));
        time(1, &mut || f32s.multiply(ViewMut::new(&mut out, m, n), left, right));
        time(2, &mut || f32s.multiply_packed(ViewMut::new(&mut out, m, n), left, &packed));
        time(3, &mut || match gradient {
            true => into_f32.multiply(ViewMut::new(&mut out, m, n), left_half, right_half),
            false => into_bf16.multiply(ViewMut::new(&mut out_half, m, n), left_half, right_half),
        });
        time(4, &mut || match gradient {
            true => {
                into_f32.multiply_packed(ViewMut::new(&mut out, m, n), left_half, &packed_half);
            }
            false => {
                let out = ViewMut::new(&mut out_half, m, n);
                into_bf16.multiply_packed(out, left_half, &packed_half);
            }
        });
    }
    let flops = 2.0 * m as f64 * n as f64 * k as f64;
    seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        flops / seconds[RUNS / 2] / 1e9
    })
}

/// Weight gradients gather.
fn how<O: Output>(form: Form, precision: Precision) -> Gemm<'static, O> {
    match form {
        Form::WeightGrad => Gemm::new(precision).accumulate(),
        Form::Forward | Form::InputGrad => Gemm::new(precision),
    }
}

fn left<T: Copy>(form: Form, data: &[T], (m, k): (usize, usize)) -> View<'_, T> {
    match form {
        Form::WeightGrad => View::new(data, k, m).t(),
        Form::Forward | Form::InputGrad => View::new(data, m, k),
    }
}

fn right<T: Copy>(form: Form, data: &[T], (k, n): (usize, usize)) -> View<'_, T> {
    match form {
        Form::Forward => View::new(data, n, k).t(),
        Form::InputGrad | Form::WeightGrad => View::new(data, k, n),
    }
}

fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 24) as f32).collect()
}

fn by_the_gemm_crate(
    form: Form,
    (m, n, k): (usize, usize, usize),
    out: &mut [f32],
    a: &[f32],
    b: &[f32],
) {
    let (a_col, a_row) = if matches!(form, Form::WeightGrad) { (m, 1) } else { (1, k) };
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
            matches!(form, Form::WeightGrad),
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
