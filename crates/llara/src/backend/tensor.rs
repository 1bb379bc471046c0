//! Dtypes, shapes and views of the matrices of a [`Backend`](super::Backend).

use std::ops::Range;

use half::bf16;
use serde::{Deserialize, Serialize};

/// The dtype of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Single precision, 4 bytes.
    #[default]
    F32,
    /// bfloat16: the exponent of f32 with 8 bits of precision instead of 24, 2 bytes.
    Bf16,
}

impl Dtype {
    /// Size of an element in bytes.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        })
    }
}

/// Elements in host memory, in row-major order.
#[derive(Debug, Clone, Copy)]
pub enum Elements<'e> {
    /// Single precision.
    F32(&'e [f32]),
    /// bfloat16.
    Bf16(&'e [bf16]),
}

impl Elements<'_> {
    /// Number of elements.
    pub fn len(self) -> usize {
        match self {
            Elements::F32(x) => x.len(),
            Elements::Bf16(x) => x.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Dtype of the elements.
    pub fn dtype(self) -> Dtype {
        match self {
            Elements::F32(_) => Dtype::F32,
            Elements::Bf16(_) => Dtype::Bf16,
        }
    }
}

impl<'e> From<&'e [f32]> for Elements<'e> {
    fn from(x: &'e [f32]) -> Self {
        Elements::F32(x)
    }
}

impl<'e, const N: usize> From<&'e [f32; N]> for Elements<'e> {
    fn from(x: &'e [f32; N]) -> Self {
        Elements::F32(x)
    }
}

impl<'e> From<&'e Vec<f32>> for Elements<'e> {
    fn from(x: &'e Vec<f32>) -> Self {
        Elements::F32(x)
    }
}

impl<'e> From<&'e [bf16]> for Elements<'e> {
    fn from(x: &'e [bf16]) -> Self {
        Elements::Bf16(x)
    }
}

/// The shape and dtype of a matrix on a device.
pub trait Shape {
    /// Number of rows.
    fn rows(&self) -> usize;
    /// Number of columns.
    fn cols(&self) -> usize;
    /// Dtype of the elements.
    fn dtype(&self) -> Dtype;

    /// `(rows, cols)`.
    fn shape(&self) -> (usize, usize) {
        (self.rows(), self.cols())
    }

    /// A view of the whole matrix.
    fn view(&self) -> View<'_, Self>
    where
        Self: Sized,
    {
        View { tensor: self, row: 0, rows: self.rows(), col: 0, cols: self.cols() }
    }

    /// A mutable view of the whole matrix.
    fn view_mut(&mut self) -> ViewMut<'_, Self>
    where
        Self: Sized,
    {
        let (rows, cols) = self.shape();
        ViewMut { tensor: self, row: 0, rows, col: 0, cols }
    }
}

/// A block of adjacent rows and columns of a matrix. It refers to the matrix; nothing is copied.
#[derive(Debug)]
pub struct View<'t, T> {
    /// The matrix.
    pub tensor: &'t T,
    /// The first row.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// The first column.
    pub col: usize,
    /// Number of columns.
    pub cols: usize,
}

// Not derived, because the derived implementations would require `T: Clone` and `T: Copy`.
impl<T> Clone for View<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for View<'_, T> {}

impl<T: Shape> View<'_, T> {
    /// `(rows, cols)`.
    pub fn shape(self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Dtype of the elements.
    pub fn dtype(self) -> Dtype {
        self.tensor.dtype()
    }

    /// A view of some of these rows.
    ///
    /// # Panics
    /// If the range is not within the view.
    #[must_use]
    pub fn with_rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        View { row: self.row + rows.start, rows: rows.len(), ..self }
    }

    /// A view of some of these columns.
    ///
    /// # Panics
    /// If the range is not within the view.
    #[must_use]
    pub fn with_cols(self, cols: Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= self.cols, "cols {cols:?} of {}", self.cols);
        View { col: self.col + cols.start, cols: cols.len(), ..self }
    }

    /// Whether this is the whole matrix.
    pub fn is_whole(self) -> bool {
        self.shape() == self.tensor.shape()
    }
}

/// A mutable [`View`].
#[derive(Debug)]
pub struct ViewMut<'t, T> {
    /// The matrix.
    pub tensor: &'t mut T,
    /// The first row.
    pub row: usize,
    /// Number of rows.
    pub rows: usize,
    /// The first column.
    pub col: usize,
    /// Number of columns.
    pub cols: usize,
}

impl<T: Shape> ViewMut<'_, T> {
    /// `(rows, cols)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// Dtype of the elements.
    pub fn dtype(&self) -> Dtype {
        self.tensor.dtype()
    }

    /// A view of some of these rows.
    ///
    /// # Panics
    /// If the range is not within the view.
    #[must_use]
    pub fn with_rows(self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        ViewMut { row: self.row + rows.start, rows: rows.len(), ..self }
    }

    /// A view of some of these columns.
    ///
    /// # Panics
    /// If the range is not within the view.
    #[must_use]
    pub fn with_cols(self, cols: Range<usize>) -> Self {
        assert!(cols.start <= cols.end && cols.end <= self.cols, "cols {cols:?} of {}", self.cols);
        ViewMut { col: self.col + cols.start, cols: cols.len(), ..self }
    }

    /// Whether this is the whole matrix.
    pub fn is_whole(&self) -> bool {
        self.shape() == self.tensor.shape()
    }
}
