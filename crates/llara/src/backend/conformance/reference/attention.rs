//! Attention over packed sequences, one query at a time.

use std::ops::Range;

use super::matrix::{Matrix, dot, log_of_sum_of_exp};
use crate::Result;
use crate::backend::{AttentionShape, Backend, Layout};

/// A [`Layout`] on the host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Packed {
    offsets: Vec<u32>,
    positions: Vec<u32>,
}

impl Packed {
    /// Takes one list of positions per sequence.
    pub(crate) fn new(sequences: &[Vec<u32>]) -> Self {
        let mut offsets = vec![0];
        let mut positions = Vec::new();
        for sequence in sequences {
            positions.extend(sequence);
            offsets.push(positions.len() as u32);
        }
        Packed { offsets, positions }
    }

    pub(crate) fn rows(&self) -> usize {
        self.positions.len()
    }

    pub(crate) fn layout<B: Backend>(&self, backend: &B) -> Result<Layout<B>> {
        let [offsets, positions] = backend.upload_indices([&self.offsets, &self.positions])?;
        Ok(Layout {
            bounds: self.offsets.clone(),
            offsets,
            positions,
            longest: self.positions.iter().max().map_or(0, |&last| last as usize + 1),
        })
    }

    fn rows_of_each(&self) -> impl Iterator<Item = Range<usize>> {
        self.offsets.windows(2).map(|bounds| bounds[0] as usize..bounds[1] as usize)
    }
}

/// q, k and v.
type Inputs<'a> = (&'a Matrix, &'a Matrix, &'a Matrix);

/// The output of attention.
pub(crate) fn attention(
    (q, k, v): Inputs<'_>,
    queries: &Packed,
    keys: &Packed,
    shape: &AttentionShape,
) -> Matrix {
    let mut out = Matrix::zeros(q.rows, q.cols);
    for_each_query((q, k), queries, keys, shape, |query, probabilities| {
        for &(j, p) in probabilities {
            add(&mut out, query.row, &query.of_q, p, &v.row(j)[query.of_kv.clone()]);
        }
    });
    out
}

/// Gradients with respect to q, k and v. With `dp_j = dout · v_j`, the gradient of the softmax is
/// `ds_j = p_j · (dp_j − Σ_l p_l dp_l)`; dq and dk follow from `s_j = q · k_j · scale`.
pub(crate) fn attention_backward(
    dout: &Matrix,
    (q, k, v): Inputs<'_>,
    queries: &Packed,
    keys: &Packed,
    shape: &AttentionShape,
) -> (Matrix, Matrix, Matrix) {
    let mut dq = Matrix::zeros(q.rows, q.cols);
    let mut dk = Matrix::zeros(k.rows, k.cols);
    let mut dv = Matrix::zeros(v.rows, v.cols);
    let scale = f64::from(shape.scale);
    for_each_query((q, k), queries, keys, shape, |query, probabilities| {
        let Query { row, of_q, of_kv, .. } = query;
        let dout = &dout.row(row)[of_q.clone()];
        let dp: Vec<f64> =
            probabilities.iter().map(|&(j, _)| dot(dout, &v.row(j)[of_kv.clone()])).collect();
        let mean: f64 = probabilities.iter().zip(&dp).map(|((_, p), dp)| p * dp).sum();
        for (&(j, p), dp) in probabilities.iter().zip(&dp) {
            let ds = p * (dp - mean) * scale;
            add(&mut dv, j, &of_kv, p, dout);
            add(&mut dq, row, &of_q, ds, &k.row(j)[of_kv.clone()]);
            add(&mut dk, j, &of_kv, ds, &q.row(row)[of_q.clone()]);
        }
    });
    (dq, dk, dv)
}

/// One query in one head.
struct Query {
    /// Row of q.
    row: usize,
    /// Columns of its head in q.
    of_q: Range<usize>,
    /// Columns of the head of k and v that it uses.
    of_kv: Range<usize>,
}

/// Calls `visit` with each query, and with the rows and probabilities of the keys that it attends to.
fn for_each_query(
    (q, k): (&Matrix, &Matrix),
    queries: &Packed,
    keys: &Packed,
    shape: &AttentionShape,
    mut visit: impl FnMut(Query, &[(usize, f64)]),
) {
    let hd = shape.head_dim;
    let scale = f64::from(shape.scale);
    for (query_rows, key_rows) in queries.rows_of_each().zip(keys.rows_of_each()) {
        for row in query_rows {
            let i = queries.positions[row] as usize;
            let attends_to = |j: usize| j <= i && shape.window.is_none_or(|window| j + window > i);
            let visible: Vec<usize> =
                key_rows.clone().filter(|&row| attends_to(keys.positions[row] as usize)).collect();
            for head in 0..shape.heads {
                let kv_head = head / (shape.heads / shape.kv_heads);
                let of_q = head * hd..(head + 1) * hd;
                let of_kv = kv_head * hd..(kv_head + 1) * hd;
                let q = &q.row(row)[of_q.clone()];
                let score = |&j: &usize| dot(q, &k.row(j)[of_kv.clone()]) * scale;
                let scores: Vec<f64> = visible.iter().map(score).collect();
                let lse = log_of_sum_of_exp(&scores);
                let probabilities: Vec<(usize, f64)> =
                    visible.iter().zip(&scores).map(|(&j, s)| (j, (s - lse).exp())).collect();
                visit(Query { row, of_q, of_kv }, &probabilities);
            }
        }
    }
}

/// `to[row, columns] += factor · x`
fn add(to: &mut Matrix, row: usize, columns: &Range<usize>, factor: f64, x: &[f64]) {
    let to = &mut to.row_mut(row)[columns.clone()];
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}
