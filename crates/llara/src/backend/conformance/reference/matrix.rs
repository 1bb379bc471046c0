//! Matrices of f64, and functions of rows that several operations use.

/// A row-major matrix on the host.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// `rows * cols` elements.
    pub(crate) data: Vec<f64>,
}

impl Matrix {
    pub(crate) fn zeros(rows: usize, cols: usize) -> Self {
        Matrix { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Element `(i, j)` is `f(i, j)`.
    pub(crate) fn from_fn(
        rows: usize,
        cols: usize,
        mut f: impl FnMut(usize, usize) -> f64,
    ) -> Self {
        let data = (0..rows * cols).map(|at| f(at / cols, at % cols)).collect();
        Matrix { rows, cols, data }
    }

    pub(crate) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    pub(crate) fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    pub(crate) fn row_mut(&mut self, i: usize) -> &mut [f64] {
        &mut self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// Each element as the nearest f32.
    pub(crate) fn rounded(self) -> Self {
        self.map(|x| f64::from(x as f32))
    }

    pub(crate) fn map(mut self, f: impl Fn(f64) -> f64) -> Self {
        self.data.iter_mut().for_each(|x| *x = f(*x));
        self
    }

    pub(crate) fn transposed(&self) -> Self {
        Matrix::from_fn(self.cols, self.rows, |i, j| self.row(j)[i])
    }

    /// The columns of this matrix, then those of the other.
    pub(crate) fn concat_cols(&self, other: &Matrix) -> Self {
        assert_eq!(self.rows, other.rows);
        Matrix::from_fn(self.rows, self.cols + other.cols, |i, j| {
            if j < self.cols { self.row(i)[j] } else { other.row(i)[j - self.cols] }
        })
    }

    pub(crate) fn plus(mut self, other: &Matrix) -> Self {
        assert_eq!(self.shape(), other.shape());
        self.data.iter_mut().zip(&other.data).for_each(|(a, b)| *a += b);
        self
    }

    /// Sum of the products of corresponding elements.
    pub(crate) fn dot(&self, other: &Matrix) -> f64 {
        assert_eq!(self.shape(), other.shape());
        dot(&self.data, &other.data)
    }

    /// The largest absolute value of an element.
    pub(crate) fn max_abs(&self) -> f64 {
        // Unlike f64::max, this keeps a NaN.
        self.data.iter().fold(0.0, |m, x| if x.abs() <= m { m } else { x.abs() })
    }
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `log Σ exp(x)`, computed without overflow.
pub(super) fn log_of_sum_of_exp(x: &[f64]) -> f64 {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    largest + x.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}
