//! Views of operands and results in memory.

use half::bf16;

/// A matrix to read: rows `stride` apart, or the transpose of such a matrix.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    lines: usize,
    length: usize,
    stride: usize,
    transposed: bool,
}

impl<'a, T: Copy> View<'a, T> {
    /// A row-major `[rows, cols]` matrix without gaps.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, (rows, cols), cols)
    }

    /// A row-major matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If `data` is too short, or rows overlap.
    pub fn strided(data: &'a [T], (rows, cols): (usize, usize), stride: usize) -> Self {
        check(data.len(), (rows, cols), stride);
        View { data, lines: rows, length: cols, stride, transposed: false }
    }

    /// The transpose, without copying.
    pub fn t(self) -> Self {
        View { transposed: !self.transposed, ..self }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        if self.transposed { self.length } else { self.lines }
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        if self.transposed { self.lines } else { self.length }
    }

    /// Whether consecutive elements of a column, not of a row, are neighbours in memory.
    pub(super) fn is_transposed(&self) -> bool {
        self.transposed
    }

    /// Elements `from..to` of a row, or of a column if transposed.
    #[inline(always)]
    pub(super) fn line(&self, line: usize, from: usize, to: usize) -> &'a [T] {
        &self.data[line * self.stride + from..line * self.stride + to]
    }

    pub(super) fn as_ptr(&self) -> *const T {
        self.data.as_ptr()
    }

    pub(super) fn stride(&self) -> usize {
        self.stride
    }
}

/// A row-major matrix to write, rows `stride` apart.
#[derive(Debug)]
pub struct ViewMut<'a, T> {
    pub(super) data: &'a mut [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) stride: usize,
}

impl<'a, T> ViewMut<'a, T> {
    /// A row-major `[rows, cols]` matrix without gaps.
    ///
    /// # Panics
    /// If `data` is too short.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::strided(data, (rows, cols), cols)
    }

    /// A row-major matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// If `data` is too short, or rows overlap.
    pub fn strided(data: &'a mut [T], (rows, cols): (usize, usize), stride: usize) -> Self {
        check(data.len(), (rows, cols), stride);
        ViewMut { data, rows, cols, stride }
    }
}

/// Checks the length and the stride. All later accesses through pointers rely on this.
fn check(len: usize, (rows, cols): (usize, usize), stride: usize) {
    assert!(cols <= stride || rows <= 1, "rows of {cols} overlap at stride {stride}");
    let end = match (rows, cols) {
        (0, _) | (_, 0) => Some(0),
        _ => (rows - 1).checked_mul(stride).and_then(|start| start.checked_add(cols)),
    };
    assert!(end.is_some_and(|end| end <= len), "{rows} x {cols} at stride {stride} from {len}");
}

/// A matrix to read, of either element type.
#[derive(Debug, Clone, Copy)]
pub enum Operand<'a> {
    /// Single precision.
    F32(View<'a, f32>),
    /// bfloat16.
    Bf16(View<'a, bf16>),
}

impl Operand<'_> {
    /// The transpose, without copying.
    pub fn t(self) -> Self {
        match self {
            Operand::F32(x) => Operand::F32(x.t()),
            Operand::Bf16(x) => Operand::Bf16(x.t()),
        }
    }

    pub(super) fn is_transposed(&self) -> bool {
        match self {
            Operand::F32(x) => x.is_transposed(),
            Operand::Bf16(x) => x.is_transposed(),
        }
    }

    /// `(rows, columns)`.
    pub fn shape(&self) -> (usize, usize) {
        match self {
            Operand::F32(x) => (x.rows(), x.cols()),
            Operand::Bf16(x) => (x.rows(), x.cols()),
        }
    }
}

impl<'a> From<View<'a, f32>> for Operand<'a> {
    fn from(view: View<'a, f32>) -> Self {
        Operand::F32(view)
    }
}

impl<'a> From<View<'a, bf16>> for Operand<'a> {
    fn from(view: View<'a, bf16>) -> Self {
        Operand::Bf16(view)
    }
}
