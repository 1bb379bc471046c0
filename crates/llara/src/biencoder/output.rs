//! The input of encoding, the output of a forward pass, and similarities between embeddings, all on the host.

use ndarray::{Array2, ArrayBase, ArrayD, ArrayViewD, Axis, Data, Dimension, Ix2, IxDyn};

use crate::backend::{Backend, Cpu};
use crate::data::Batch;
use crate::{Error, ErrorKind, Result};

/// The input of encoding: one batch, a list of batches, or nothing.
pub enum Features<'b> {
    /// Nothing to encode.
    None,
    /// Batches whose embeddings are concatenated.
    Batches(Vec<&'b Batch>),
}

impl<'b> From<&'b Batch> for Features<'b> {
    fn from(batch: &'b Batch) -> Self {
        Features::Batches(vec![batch])
    }
}

impl<'b> From<Option<&'b Batch>> for Features<'b> {
    fn from(batch: Option<&'b Batch>) -> Self {
        batch.map_or(Features::None, Features::from)
    }
}

impl<'b> From<&'b [Batch]> for Features<'b> {
    fn from(batches: &'b [Batch]) -> Self {
        Features::Batches(batches.iter().collect())
    }
}

impl<'b> From<&'b Vec<Batch>> for Features<'b> {
    fn from(batches: &'b Vec<Batch>) -> Self {
        batches.as_slice().into()
    }
}

impl<'b, const N: usize> From<&'b [Batch; N]> for Features<'b> {
    fn from(batches: &'b [Batch; N]) -> Self {
        batches.as_slice().into()
    }
}

/// Embeddings, and their scores and loss if both queries and passages were given.
#[derive(Debug, Clone, PartialEq)]
pub struct EncoderOutput {
    /// Embeddings of the queries, `(B, d)`.
    pub q_reps: Option<Array2<f32>>,
    /// Embeddings of the passages, `(B·G, d)`.
    pub p_reps: Option<Array2<f32>>,
    /// Mean InfoNCE loss, in training mode.
    pub loss: Option<f32>,
    /// `(B, B·G)`; with cross-device negatives in training, `(B, W·B·G)`.
    pub scores: Option<Array2<f32>>,
}

/// Row-major values as a matrix.
pub(super) fn matrix(values: Vec<f32>, rows: usize, cols: usize) -> Array2<f32> {
    let mut matrix = Array2::zeros((rows, cols));
    matrix.iter_mut().zip(values).for_each(|(to, from)| *to = from);
    matrix
}

/// Inner products of every query with every passage: `(n, d) · (m, d)ᵀ → (n, m)`; three-dimensional
/// inputs are batched over the leading axis, `(b, n, d)` and `(b, m, d)` → `(b, n, m)`.
///
/// ```
/// use ndarray::array;
/// let scores = llara::compute_similarity(&array![[1.0, 0.0]], &array![[0.5, 2.0], [3.0, 4.0]])?;
/// assert_eq!(scores, array![[0.5, 3.0]].into_dyn());
/// # Ok::<(), llara::Error>(())
/// ```
///
/// # Errors
/// When the widths differ, the leading axes differ, or the inputs are not both of two or both of
/// three dimensions.
pub fn compute_similarity<S, T, D, E>(
    q: &ArrayBase<S, D>,
    p: &ArrayBase<T, E>,
) -> Result<ArrayD<f32>>
where
    S: Data<Elem = f32>,
    T: Data<Elem = f32>,
    D: Dimension,
    E: Dimension,
{
    let (q, p) = (q.view().into_dyn(), p.view().into_dyn());
    let fits = q.ndim() == p.ndim()
        && matches!(q.ndim(), 2 | 3)
        && q.shape().last() == p.shape().last()
        && (q.ndim() == 2 || q.shape()[0] == p.shape()[0]);
    if !fits {
        return Err(Error::new(ErrorKind::Argument, "these embeddings cannot be compared")
            .expected("(n, d) and (m, d), or (b, n, d) and (b, m, d)")
            .got(format!("{:?} and {:?}", q.shape(), p.shape())));
    }
    if q.ndim() == 2 {
        return Ok(products(q, p)?.into_dyn());
    }
    let (batch, n, m) = (q.shape()[0], q.shape()[1], p.shape()[1]);
    let mut scores = ArrayD::zeros(IxDyn(&[batch, n, m]));
    for (at, mut scores) in scores.axis_iter_mut(Axis(0)).enumerate() {
        scores.assign(&products(q.index_axis(Axis(0), at), p.index_axis(Axis(0), at))?);
    }
    Ok(scores)
}

/// One matrix of similarities; both inputs have two dimensions.
fn products(q: ArrayViewD<'_, f32>, p: ArrayViewD<'_, f32>) -> Result<Array2<f32>> {
    let cpu = Cpu::new();
    let upload = |x: &ArrayViewD<'_, f32>| {
        let x = x.as_standard_layout();
        cpu.upload(x.as_slice().unwrap_or_default(), x.shape()[0], x.shape()[1])
    };
    let scores = cpu.scores(&upload(&q)?, &upload(&p)?, 1.0)?;
    let shape = Ix2(q.shape()[0], p.shape()[0]);
    Ok(matrix(cpu.download(&scores)?, shape[0], shape[1]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::{Array3, array};

    #[test]
    fn three_dimensional_inputs_are_batched() {
        let q = Array3::from_shape_fn((2, 3, 4), |(b, i, j)| (b * 12 + i * 4 + j) as f32);
        let p = Array3::from_shape_fn((2, 5, 4), |(b, i, j)| (b + i) as f32 - j as f32);
        let all = compute_similarity(&q, &p).unwrap();
        assert_eq!(all.shape(), [2, 3, 5]);
        for b in 0..2 {
            let (q, p) = (q.index_axis(Axis(0), b), p.index_axis(Axis(0), b));
            let one = compute_similarity(&q, &p).unwrap();
            assert_eq!(all.index_axis(Axis(0), b), one);
            assert_eq!(one[[1, 2]], q.row(1).dot(&p.row(2)));
        }
    }

    #[test]
    fn shapes_that_do_not_match_are_refused() {
        let q = array![[1.0, 2.0]];
        assert!(compute_similarity(&q, &array![[1.0, 2.0, 3.0]]).is_err());
        assert!(compute_similarity(&q, &Array3::zeros((1, 1, 2))).is_err());
    }
}
