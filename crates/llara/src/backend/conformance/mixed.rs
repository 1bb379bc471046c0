//! Checks of mixed precision: with bf16 inputs, every operation must give the result of the same numbers in
//! f32, rounded once, in the dtype that [`Backend`] documents.

use super::both::{agree, copy, random, roundings};
use super::case::Case;
use super::dtypes::dtypes;
use super::reference::Matrix;
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{
    Accumulate, AttentionGradients, AttentionInput, AttentionShape, Backend, DropoutKey, Dtype,
    Epilogue, Layout, RopeDirection, RopeTable, ScatterPlan, ScatterRows, Shape, TokenIds,
    WeightUse,
};

/// The operations of a training step on bf16 matrices.
///
/// # Errors
/// Errors of the backend are returned unchanged.
pub fn mixed<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    for shape in [(1, 1), (3, 17), (33, 65), (70, 130), (0, 16), (130, 64)] {
        conversion(&mut suite, shape)?;
        rows(&mut suite, shape)?;
        swiglu(&mut suite, shape)?;
        dropout(&mut suite, shape)?;
        norms(&mut suite, shape)?;
    }
    for sizes in [(1, 1, 1), (5, 7, 3), (33, 64, 65), (100, 130, 70), (700, 33, 2)] {
        products(&mut suite, sizes)?;
    }
    for lengths in [&[1usize][..], &[17, 1, 33], &[64, 128, 65], &[130]] {
        attention(&mut suite, lengths, 16)?;
    }
    // Head sizes for which a device may use tensor cores.
    for head_dim in [64, 96, 128] {
        attention(&mut suite, &[17, 1, 70, 129], head_dim)?;
    }
    dtypes(&mut suite)?;
    Ok(suite.finish())
}

fn conversion<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let x = suite.random(rows, cols);
    let what = format!("[{rows}, {cols}]");
    let narrow = suite.backend.cast(&suite.tensor(&x)?, Dtype::Bf16)?;
    let wide = suite.backend.cast(&narrow, Dtype::F32)?;
    // Converted from f32, because `from_f64` of the half crate uses only the upper 32 bits and rounds a
    // number just above a tie down.
    let nearest = x.map(|x| half::bf16::from_f32(x as f32).to_f64());
    suite.case("mixed, cast").check(&what, &narrow, &nearest, Bound::EXACT)?;
    suite.check(&what, &wide, &nearest, Bound::EXACT)?;
    let mut cleared = copy(suite, &narrow)?;
    suite.backend.clear(&mut cleared)?;
    suite.check(&format!("{what}, cleared"), &cleared, &Matrix::zeros(rows, cols), Bound::EXACT)
}

fn rows<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let what = format!("[{rows}, {cols}]");
    let (x, y) = (random(suite, rows, cols)?, random(suite, rows, cols)?);
    let places = suite.indices(if rows == 0 { 0 } else { 50 }, rows.max(1));
    let plan = ScatterPlan::upload(&ScatterRows::new(&places), suite.backend)?;
    let places = suite.index(&places)?;
    let backend = suite.backend;
    let exact = (Dtype::Bf16, Bound::EXACT);
    suite.case("mixed, rows");
    let [got, want] = [&x.narrow, &x.wide].map(|x| backend.gather_rows(x, &places));
    let (got, want) = (got?, want?);
    agree(suite, &format!("{what}, gathered"), &got, &want, exact)?;
    let (mut narrow, mut wide) = (copy(suite, &y.narrow)?, copy(suite, &y.wide)?);
    let mut single = copy(suite, &y.wide)?;
    let (from, from_wide) =
        (backend.gather_rows(&x.narrow, &places)?, backend.gather_rows(&x.wide, &places)?);
    backend.scatter_add_rows(&from, &plan, &mut narrow)?;
    backend.scatter_add_rows(&from, &plan, &mut single)?;
    backend.scatter_add_rows(&from_wide, &plan, &mut wide)?;
    agree(suite, &format!("{what}, scattered"), &single, &wide, (Dtype::F32, Bound::EXACT))?;
    // Rounded once for each source that is added to a row.
    agree(suite, &format!("{what}, scattered"), &narrow, &wide, (Dtype::Bf16, roundings(60.0)))
}

fn swiglu<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let what = format!("[{rows}, {cols}]");
    let (gate_up, dy) = (random(suite, rows, 2 * cols)?, random(suite, rows, cols)?);
    let backend = suite.backend;
    let bound = (Dtype::Bf16, roundings(1.0));
    let got = backend.swiglu(&gate_up.narrow)?;
    let want = backend.swiglu(&gate_up.wide)?;
    suite.case("mixed, swiglu");
    agree(suite, &what, &got, &want, bound)?;
    let got = backend.swiglu_backward(dy.narrow, gate_up.narrow)?;
    let want = backend.swiglu_backward(dy.wide, gate_up.wide)?;
    agree(suite, &format!("{what}, gradient"), &got.0, &want.0, bound)?;
    agree(suite, &format!("{what}, recomputed swiglu"), &got.1, &want.1, bound)
}

fn dropout<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let what = format!("[{rows}, {cols}]");
    let (x, onto) = (random(suite, rows, cols)?, random(suite, rows, cols)?);
    let (sequences, positions) = (suite.indices(rows, 5000), suite.indices(rows, 100));
    let sequences = suite.index(&sequences)?;
    let positions = suite.index(&positions)?;
    let tokens = || TokenIds { sequences: &sequences, positions: &positions };
    let key = DropoutKey { seed: 3, step: 5, module: 7, probability: 0.3 };
    let backend = suite.backend;
    let bound = (Dtype::Bf16, roundings(1.0));
    suite.case("mixed, dropout");
    for with_onto in [false, true] {
        let onto_of = |onto| if with_onto { copy(suite, onto).map(Some) } else { Ok(None) };
        let got = backend.dropout(&x.narrow, tokens(), &key, onto_of(&onto.narrow)?)?;
        let want = backend.dropout(&x.wide, tokens(), &key, onto_of(&onto.wide)?)?;
        agree(suite, &format!("{what}, onto {with_onto}"), &got, &want, bound)?;
    }
    Ok(())
}

fn norms<B: Backend>(suite: &mut Suite<'_, B>, (rows, cols): (usize, usize)) -> Result<()> {
    let what = format!("[{rows}, {cols}]");
    let (x, dy) = (random(suite, rows, cols)?, random(suite, rows, cols)?);
    let w = suite.random(1, cols);
    let w = suite.tensor(&w)?;
    let backend = suite.backend;
    let (want, inv_rms) = backend.rms_norm(x.wide.view(), &w, 1e-5, Dtype::F32)?;
    suite.case("mixed, rms_norm");
    for x in [&x.narrow, &x.wide] {
        let (got, inv) = backend.rms_norm(x.view(), &w, 1e-5, Dtype::Bf16)?;
        agree(suite, &what, &got, &want, (Dtype::Bf16, roundings(1.0)))?;
        agree(suite, &what, &inv, &inv_rms, (Dtype::F32, Bound::EXACT))?;
    }
    suite.case("mixed, rms_norm_backward");
    for with_onto in [false, true] {
        let what = format!("{what}, onto {with_onto}");
        let onto = || if with_onto { copy(suite, &dy.wide).map(Some) } else { Ok(None) };
        let mut dw = backend.zeros(1, cols, Dtype::F32)?;
        let want =
            backend.rms_norm_backward(&dy.wide, &x.wide, &w, &inv_rms, Some(&mut dw), onto()?)?;
        let mut dw_got = backend.zeros(1, cols, Dtype::F32)?;
        let dy_on = &dy.narrow;
        let got =
            backend.rms_norm_backward(dy_on, &x.wide, &w, &inv_rms, Some(&mut dw_got), onto()?)?;
        agree(suite, &what, &got, &want, (Dtype::F32, Bound::EXACT))?;
        agree(suite, &format!("{what}, dw"), &dw_got, &dw, (Dtype::F32, Bound::EXACT))?;
    }
    let want = backend.rms_norm_backward(&dy.wide, &x.wide, &w, &inv_rms, None, None)?;
    let got = backend.rms_norm_backward(&dy.narrow, &x.narrow, &w, &inv_rms, None, None)?;
    agree(suite, &what, &got, &want, (Dtype::Bf16, roundings(1.0)))
}

/// n rows of `input` features to `output`. Weights are given in f32 and in bf16; they are rounded before
/// the multiplication, so the result is the same.
fn products<B: Backend>(
    suite: &mut Suite<'_, B>,
    (n, input, output): (usize, usize, usize),
) -> Result<()> {
    let what = format!("n {n}, {input} -> {output}");
    let (x, dy) = (random(suite, n, input)?, random(suite, n, output)?);
    let w = random(suite, output, input)?;
    let (onto_y, onto_x) = (random(suite, n, output)?, random(suite, n, input)?);
    let bias = suite.random(1, output);
    let bias = suite.tensor(&bias)?;
    let backend = suite.backend;
    let magnitude = (input.max(output) as f64).sqrt();
    let (bf16, f32) = (
        (Dtype::Bf16, roundings(1.1).at_least(magnitude)),
        (Dtype::F32, Bound::sum(input).at_least(magnitude)),
    );
    let wide = backend.prepare(copy(suite, &w.wide)?, WeightUse::Frozen(Dtype::F32))?;
    let wide = wide.view();
    let with_bias = || Epilogue { bias: Some(bias.view()), residual: None };
    let with_residual = || Epilogue { bias: None, residual: Some(&onto_y.wide) };
    for (values, purpose) in [
        (&w.narrow, WeightUse::Frozen(Dtype::Bf16)),
        (&w.wide, WeightUse::Frozen(Dtype::Bf16)),
        (&w.wide, WeightUse::Trainable(Dtype::Bf16)),
    ] {
        let what = format!("{what}, weight in {}, {purpose:?}", values.dtype());
        let weight = backend.prepare(copy(suite, values)?, purpose)?;
        let (weight, x_on, dy_on) = (weight.view(), x.narrow.view(), dy.narrow.view());
        suite.case("mixed, linear");
        let want = backend.linear(x.wide.view(), wide, 1.0, with_bias())?;
        let got = backend.linear(x_on, weight, 1.0, with_bias())?;
        agree(suite, &what, &got, &want, bf16)?;
        let want = backend.linear(x.wide.view(), wide, 1.0, with_residual())?;
        let got = backend.linear(x_on, weight, 1.0, with_residual())?;
        agree(suite, &format!("{what}, residual"), &got, &want, f32)?;
        let mut got = copy(suite, &onto_y.narrow)?;
        backend.linear_add(x_on, weight, got.view_mut())?;
        agree(suite, &format!("{what}, added"), &got, &want, bf16)?;
        let mut got = copy(suite, &onto_y.wide)?;
        backend.linear_add(x_on, weight, got.view_mut())?;
        agree(suite, &format!("{what}, added in f32"), &got, &want, f32)?;
        suite.case("mixed, linear_input_grad");
        let want = backend.linear_input_grad(dy.wide.view(), wide, 1.0, None)?;
        let got = backend.linear_input_grad(dy_on, weight, 1.0, None)?;
        agree(suite, &what, &got, &want, bf16)?;
        let onto = Some(copy(suite, &onto_x.wide)?);
        let want = backend.linear_input_grad(dy.wide.view(), wide, 1.0, onto)?;
        let onto = Some(copy(suite, &onto_x.narrow)?);
        let got = backend.linear_input_grad(dy_on, weight, 1.0, onto)?;
        agree(suite, &format!("{what}, onto"), &got, &want, bf16)?;
        let onto = Some(copy(suite, &onto_x.wide)?);
        let got = backend.linear_input_grad(dy_on, weight, 1.0, onto)?;
        let f32 = (Dtype::F32, Bound::sum(output).at_least(magnitude));
        agree(suite, &format!("{what}, onto f32"), &got, &want, f32)?;
    }
    suite.case("mixed, linear_weight_grad");
    let (mut got, mut want) = (copy(suite, &w.wide)?, copy(suite, &w.wide)?);
    let (dy_on, x_on) = (dy.narrow.view(), x.narrow.view());
    let (dy_wide, x_wide) = (dy.wide.view(), x.wide.view());
    for accumulate in [Accumulate::Add, Accumulate::Overwrite] {
        backend.linear_weight_grad(dy_on, x_on, got.view_mut(), accumulate)?;
        backend.linear_weight_grad(dy_wide, x_wide, want.view_mut(), accumulate)?;
        let what = format!("{what}, {accumulate:?}");
        agree(suite, &what, &got, &want, (Dtype::F32, Bound::sum(n)))?;
    }
    let zeros = || backend.zeros(1, output, Dtype::F32);
    let (mut got, mut want) = (zeros()?, zeros()?);
    backend.linear_bias_grad(dy_on, got.view_mut(), Accumulate::Overwrite)?;
    backend.linear_bias_grad(dy_wide, want.view_mut(), Accumulate::Overwrite)?;
    agree(suite, &format!("{what}, bias"), &got, &want, (Dtype::F32, Bound::EXACT))
}

fn attention<B: Backend>(
    suite: &mut Suite<'_, B>,
    lengths: &[usize],
    head_dim: usize,
) -> Result<()> {
    let scale = 1.0 / (head_dim as f32).sqrt();
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim, window: None, scale };
    let (rows, longest) = (lengths.iter().sum(), lengths.iter().copied().max().unwrap_or(0));
    let cols = shape.q_cols() + 2 * shape.kv_cols();
    let (mut qkv, dout) = (random(suite, rows, cols)?, random(suite, rows, shape.q_cols())?);
    let backend = suite.backend;
    let mut bounds = vec![0u32];
    bounds.extend(lengths.iter().scan(0, |end, length| {
        *end += *length as u32;
        Some(*end)
    }));
    let positions: Vec<u32> = lengths.iter().flat_map(|&length| 0..length as u32).collect();
    let [offsets, positions] = backend.upload_indices([&bounds, &positions])?;
    let layout = Layout { bounds, offsets, positions, longest };
    // Rotated first, so that rope is checked as well.
    let half = shape.head_dim / 2;
    let angle = |p: usize, i: usize| p as f64 * 100f64.powf(-(i as f64) / half as f64);
    let cos = Matrix::from_fn(longest, half, |p, i| angle(p, i).cos()).rounded();
    let sin = Matrix::from_fn(longest, half, |p, i| angle(p, i).sin()).rounded();
    let table = RopeTable { cos: suite.tensor(&cos)?, sin: suite.tensor(&sin)? };
    for x in [&mut qkv.narrow, &mut qkv.wide] {
        let q = x.view_mut().with_cols(0..shape.q_cols());
        backend.rope(q, &layout.positions, &table, RopeDirection::Forward)?;
    }
    suite.case("mixed, rope");
    agree(suite, "queries", &qkv.narrow, &qkv.wide, (Dtype::Bf16, roundings(1.0)))?;
    let wide = backend.cast(&qkv.narrow, Dtype::F32)?;
    let input = |qkv| attention_input(qkv, &layout, &shape);
    let want = backend.attention(&input(&wide))?;
    let got = backend.attention(&input(&qkv.narrow))?;
    let what = format!("head {head_dim}, lengths {lengths:?}");
    suite.case("mixed, attention");
    agree(suite, &what, &got.out, &want.out, (Dtype::Bf16, roundings(2.0)))?;
    let want = backend.attention_backward(&dout.wide, &input(&wide), &want)?;
    let got = backend.attention_backward(&dout.narrow, &input(&qkv.narrow), &got)?;
    // The gradient depends on the rounding of the output through `Σ dout∘out`.
    let bound = (Dtype::Bf16, roundings(8.0).at_least(1.0));
    suite.case("mixed, attention_backward");
    match (got, want) {
        (AttentionGradients::Fused(got), AttentionGradients::Fused(want)) => {
            agree(suite, &what, &got, &want, bound)
        }
        _ => {
            suite.require(&format!("{what}: q, k and v in one matrix"), false);
            Ok(())
        }
    }
}

/// q, k and v are blocks of columns of one matrix.
fn attention_input<'a, B: Backend>(
    qkv: &'a B::Tensor,
    layout: &'a Layout<B>,
    shape: &'a AttentionShape,
) -> AttentionInput<'a, B> {
    let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
    let columns = |start, count| qkv.view().with_cols(start..start + count);
    AttentionInput {
        q: columns(0, q_cols),
        k: columns(q_cols, kv_cols),
        v: columns(q_cols + kv_cols, kv_cols),
        queries: layout,
        keys: layout,
        shape,
    }
}
