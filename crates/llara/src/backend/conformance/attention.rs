//! Checks of causal attention over packed sequences.

use super::case::Case;
use super::reference::{self, Matrix, Packed};
use super::suite::{Bound, Suite};
use crate::Result;
use crate::backend::{AttentionGradients, AttentionInput, AttentionShape, Backend, Shape};

/// The positions of a sequence that are queries.
#[derive(Debug, Clone, Copy)]
enum QueryRows {
    All,
    /// The last positions of each sequence; all of a shorter sequence.
    Last(usize),
    /// All positions of every second sequence, none of the others.
    OddSequences,
    Empty,
}

impl QueryRows {
    fn positions(self, sequence: usize, length: usize) -> Vec<u32> {
        let end = length as u32;
        match self {
            QueryRows::All => (0..end).collect(),
            QueryRows::Last(count) => (end.saturating_sub(count as u32)..end).collect(),
            QueryRows::OddSequences if sequence % 2 == 1 => (0..end).collect(),
            QueryRows::OddSequences | QueryRows::Empty => Vec::new(),
        }
    }
}

/// The sequences, queries and heads of one check.
#[derive(Debug, Clone, Copy)]
struct Setting {
    lengths: &'static [usize],
    query_rows: QueryRows,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

const fn setting(
    lengths: &'static [usize],
    query_rows: QueryRows,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    window: Option<usize>,
) -> Setting {
    Setting { lengths, query_rows, heads, kv_heads, head_dim, window }
}

/// Tiles of 16, 32, 64 and 128 queries end both within these sequences and at their ends.
const SETTINGS: [Setting; 22] = [
    setting(&[1], QueryRows::All, (1, 1, 2), None),
    setting(&[1, 1, 1], QueryRows::All, (2, 1, 16), None),
    setting(&[17, 1, 33], QueryRows::All, (4, 1, 16), None),
    setting(&[17, 1, 33], QueryRows::All, (4, 2, 16), Some(5)),
    setting(&[17, 1, 33], QueryRows::All, (4, 4, 16), Some(1)),
    setting(&[20, 3], QueryRows::All, (2, 1, 64), None),
    setting(&[20, 3], QueryRows::All, (2, 2, 80), Some(1000)),
    setting(&[3, 2, 5, 1, 7, 4, 6, 2, 1, 3, 9, 8], QueryRows::All, (3, 3, 2), None),
    setting(&[130], QueryRows::All, (2, 1, 2), None),
    setting(&[64, 128, 65], QueryRows::All, (1, 1, 2), None),
    setting(&[130, 65], QueryRows::All, (2, 2, 2), Some(5)),
    setting(&[200], QueryRows::All, (1, 1, 2), Some(64)),
    setting(&[150], QueryRows::All, (1, 1, 2), Some(1)),
    setting(&[130], QueryRows::All, (1, 1, 2), Some(1000)),
    setting(&[33, 70, 9, 1, 130], QueryRows::Last(8), (4, 2, 2), None),
    setting(&[3, 70, 9, 1, 130], QueryRows::Last(1), (2, 1, 16), Some(5)),
    setting(&[130, 5], QueryRows::Last(100), (2, 1, 2), Some(70)),
    setting(&[70, 2, 200, 3], QueryRows::Last(60), (6, 2, 4), None),
    setting(&[200], QueryRows::Last(9), (2, 2, 2), Some(5)),
    setting(&[5, 70, 3, 17, 1], QueryRows::OddSequences, (4, 2, 2), None),
    setting(&[5, 3], QueryRows::Empty, (2, 1, 16), None),
    setting(&[65, 130, 33, 64], QueryRows::All, (4, 2, 64), None),
];

/// With more elements of q than this, the reference forward pass is too slow for finite differences.
const MAX_DIFFERENCED: usize = 10_000;

/// `attention` and its gradients.
///
/// # Errors
/// Errors of the backend are returned unchanged.
pub fn attention<B: Backend>(backend: &B) -> Result<Vec<Case>> {
    let mut suite = Suite::new(backend);
    for setting in SETTINGS {
        check_attention(&mut suite, &setting, 1.0)?;
    }
    for size in [50.0, 1e4] {
        for window in [None, Some(5)] {
            let setting = setting(&[17, 70], QueryRows::All, (2, 1, 16), window);
            check_attention(&mut suite, &setting, size)?;
        }
    }
    Ok(suite.finish())
}

/// Scores are of the order of `size`.
fn check_attention<B: Backend>(
    suite: &mut Suite<'_, B>,
    setting: &Setting,
    size: f64,
) -> Result<()> {
    let &Setting { lengths, query_rows, heads, kv_heads, head_dim, window } = setting;
    // Not 1 / sqrt(head_dim), so that a kernel that ignores the given scale fails.
    let scale = (0.8 / (head_dim as f64).sqrt()) as f32;
    let shape = AttentionShape { heads, kv_heads, head_dim, window, scale };
    let sequences = |query_rows: QueryRows| {
        let each = lengths.iter().enumerate().map(|(s, &length)| query_rows.positions(s, length));
        Packed::new(&each.collect::<Vec<_>>())
    };
    let (queries, keys) = (sequences(query_rows), sequences(QueryRows::All));
    let large = |x: Matrix| x.map(|x| x * size.sqrt()).rounded();
    let q = large(suite.random(queries.rows(), heads * head_dim));
    let k = large(suite.random(keys.rows(), kv_heads * head_dim));
    let v = suite.random(keys.rows(), kv_heads * head_dim);
    let dout = suite.random(q.rows, q.cols);
    let out = |q: &Matrix, k: &Matrix, v: &Matrix| {
        reference::attention((q, k, v), &queries, &keys, &shape)
    };

    let backend = suite.backend;
    let (queries_on, keys_on) = (queries.layout(backend)?, keys.layout(backend)?);
    let dout_on = suite.tensor(&dout)?;
    // k and v are blocks of one matrix. q is a separate matrix, or a block of the same if all rows are queries.
    let fused = queries.rows() == keys.rows();
    let kv = k.concat_cols(&v);
    let matrix = suite.tensor(&if fused { q.concat_cols(&kv) } else { kv })?;
    let q_separate = suite.tensor(&q)?;
    let (q_cols, kv_cols) = (shape.q_cols(), shape.kv_cols());
    let first = if fused { q_cols } else { 0 };
    let input = AttentionInput {
        q: if fused { matrix.view().with_cols(0..q_cols) } else { q_separate.view() },
        k: matrix.view().with_cols(first..first + kv_cols),
        v: matrix.view().with_cols(first + kv_cols..first + 2 * kv_cols),
        queries: &queries_on,
        keys: &keys_on,
        shape: &shape,
    };
    let output = backend.attention(&input)?;
    let gradients = backend.attention_backward(&dout_on, &input, &output)?;
    let block = |x: &B::Tensor, start: usize, cols: usize| {
        let mut block = backend.zeros(x.rows(), cols, x.dtype())?;
        backend.copy(x.view().with_cols(start..start + cols), block.view_mut())?;
        Ok::<_, crate::Error>(block)
    };
    let (dq, dkv, first) = match gradients {
        AttentionGradients::Fused(dqkv) => (block(&dqkv, 0, q_cols)?, dqkv, q_cols),
        AttentionGradients::Separate { dq, dkv } => (dq, dkv, 0),
    };
    suite.case("attention_backward, shape").require("same number of columns as the input", {
        dkv.cols() == first + 2 * kv_cols && fused == (first > 0)
    });
    let (dk, dv) = (block(&dkv, first, kv_cols)?, block(&dkv, first + kv_cols, kv_cols)?);

    let what = format!("{setting:?}, scores of order {size}");
    let want_out = out(&q, &k, &v);
    // The relative error of a probability is the absolute error of its score and log-sum-exp.
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let roundings = 16.0 + ((head_dim + longest) as f64).sqrt() + 8.0 * size;
    let bound = Bound::roundings(roundings).at_least(1.0);
    suite.case("attention").check(&what, &output.out, &want_out, bound)?;

    // Terms of the gradients with respect to q and k are as large as k and q.
    let bound_qk = bound.at_least(size.sqrt());
    let inputs = (&q, &k, &v);
    let (want_dq, want_dk, want_dv) =
        reference::attention_backward(&dout, inputs, &queries, &keys, &shape);
    suite.case("attention_backward, q").check(&what, &dq, &want_dq, bound_qk)?;
    suite.case("attention_backward, k").check(&what, &dk, &want_dk, bound_qk)?;
    suite.case("attention_backward, v").check(&what, &dv, &want_dv, bound)?;
    if q.data.len() > MAX_DIFFERENCED {
        return Ok(());
    }
    suite.case("attention_backward, q, by finite differences").check_gradient(
        &what,
        &dq,
        &q,
        bound_qk,
        |q| dout.dot(&out(q, &k, &v)),
    )?;
    suite.case("attention_backward, k, by finite differences").check_gradient(
        &what,
        &dk,
        &k,
        bound_qk,
        |k| dout.dot(&out(&q, k, &v)),
    )?;
    suite.case("attention_backward, v, by finite differences").check_gradient(
        &what,
        &dv,
        &v,
        bound,
        |v| dout.dot(&out(&q, &k, v)),
    )
}
