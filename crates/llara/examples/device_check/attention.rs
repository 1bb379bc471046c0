//! Compares attention in bf16 with tensor cores to f32 with plain kernels.

use llara::Result;
use llara::backend::{
    AttentionGradients, AttentionInput, AttentionShape, Backend, Dtype, Layout, Shape,
};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

use super::Report;

/// Lengths of sequences, and the number of last positions of each that are queries.
const BATCHES: [(&[usize], usize); 6] = [
    (&[1], 1),
    (&[300], 1000),
    (&[17, 1, 33, 64, 128, 129, 65], 1000),
    (&[130, 7, 200, 256], 8),
    (&[511, 3, 77], 1),
    (&[63, 64, 65, 127, 128, 129, 255, 257], 100),
];

/// Query heads, key heads.
const HEADS: [(usize, usize); 3] = [(1, 1), (4, 2), (8, 1)];

/// The bound for the roundings to bf16: of probabilities, of gradients of scores, and of the result.
const BOUND: f64 = 1.2e-2;

pub(crate) fn check<B: Backend>(backend: &B, report: &mut Report) -> Result<()> {
    let mut generator = ChaCha8Rng::seed_from_u64(11);
    for head_dim in [64, 96, 128] {
        let mut worst = [0.0f64; 4];
        for (lengths, asked) in BATCHES {
            for (heads, kv_heads) in HEADS {
                for window in [None, Some(1), Some(70)] {
                    let scale = 1.0 / (head_dim as f32).sqrt();
                    let shape = AttentionShape { heads, kv_heads, head_dim, window, scale };
                    let errors = compare(backend, &mut generator, (lengths, asked), &shape)?;
                    for (worst, error) in worst.iter_mut().zip(errors) {
                        // NaN is kept.
                        if error > *worst || error.is_nan() {
                            *worst = error;
                        }
                    }
                }
            }
        }
        for (name, worst) in ["out", "dq", "dk", "dv"].into_iter().zip(worst) {
            report.within(&format!("attention bf16, head {head_dim}, {name}"), worst, BOUND);
        }
    }
    Ok(())
}

/// Relative norms of the differences: out, dq, dk, dv.
fn compare<B: Backend>(
    backend: &B,
    generator: &mut ChaCha8Rng,
    (lengths, asked): (&[usize], usize),
    shape: &AttentionShape,
) -> Result<[f64; 4]> {
    let queries = layout(backend, lengths, asked)?;
    let keys = layout(backend, lengths, usize::MAX)?;
    let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
    let mut random = |rows: usize, cols: usize| -> Result<(B::Tensor, B::Tensor)> {
        let data: Vec<f32> =
            (0..rows * cols).map(|_| generator.random_range(-1.7f32..1.7)).collect();
        let narrow = backend.cast(&backend.upload(&data, rows, cols)?, Dtype::Bf16)?;
        let wide = backend.cast(&narrow, Dtype::F32)?;
        Ok((narrow, wide))
    };
    let (q, dout) = (random(queries.rows(), q_cols)?, random(queries.rows(), q_cols)?);
    // k and v in one matrix, as in a model.
    let kv = random(keys.rows(), 2 * kv_cols)?;
    let run = |q: &B::Tensor, kv: &B::Tensor, dout: &B::Tensor| -> Result<[Vec<f32>; 4]> {
        let input = AttentionInput {
            q: q.view(),
            k: kv.view().with_cols(0..kv_cols),
            v: kv.view().with_cols(kv_cols..2 * kv_cols),
            queries: &queries,
            keys: &keys,
            shape,
        };
        let output = backend.attention(&input)?;
        let block = |x: &B::Tensor, first: usize, cols: usize| {
            backend.download_view(x.view().with_cols(first..first + cols))
        };
        let out = backend.download(&output.out)?;
        let (dq, dkv, first) = match backend.attention_backward(dout, &input, &output)? {
            AttentionGradients::Fused(x) => (block(&x, 0, q_cols)?, x, q_cols),
            AttentionGradients::Separate { dq, dkv } => (backend.download(&dq)?, dkv, 0),
        };
        let dk = block(&dkv, first, kv_cols)?;
        let dv = block(&dkv, first + kv_cols, kv_cols)?;
        Ok([out, dq, dk, dv])
    };
    let got = run(&q.0, &kv.0, &dout.0)?;
    let want = run(&q.1, &kv.1, &dout.1)?;
    // If a query attends to one key, dq and dk are differences of equal numbers: errors are relative to the terms.
    let terms = f64::from(shape.scale) * (shape.head_dim as f64).sqrt();
    Ok(std::array::from_fn(|i| {
        let floor = if i == 1 || i == 2 { terms * (want[i].len() as f64).sqrt() } else { 0.0 };
        difference_norm(&got[i], &want[i]) / norm(&want[i]).max(floor).max(1e-20)
    }))
}

fn layout<B: Backend>(backend: &B, lengths: &[usize], asked: usize) -> Result<Layout<B>> {
    let (mut bounds, mut positions) = (vec![0u32], Vec::new());
    for &length in lengths {
        positions.extend(length.saturating_sub(asked) as u32..length as u32);
        bounds.push(positions.len() as u32);
    }
    let [offsets, positions] = backend.upload_indices([&bounds, &positions])?;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    Ok(Layout { bounds, offsets, positions, longest })
}

/// Norm of the difference, divided by the norm of the expected values.
pub(crate) fn relative_norm(got: &[f32], want: &[f32]) -> f64 {
    difference_norm(got, want) / norm(want).max(1e-20)
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
}

/// Infinite if the lengths differ.
fn difference_norm(got: &[f32], want: &[f32]) -> f64 {
    if got.len() != want.len() {
        return f64::INFINITY;
    }
    let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
    got.iter().zip(want).map(square).sum::<f64>().sqrt()
}
