//! The tile: the part of the result that one call of a kernel computes.

use half::bf16;

use super::cell::Element;

/// Rows of a tile. Six rows of four AVX-512 vectors are 24 sums; with four vectors of columns and one of a row they
/// fill 29 of the 32 registers.
pub(super) const MR: usize = 6;
/// Columns of a tile, and of a packed panel of the right operand.
pub(super) const NR: usize = 64;

/// The rows of a left operand as a kernel reads them: cell `s` of row `r` is at
/// `start + r * row + s * step`, in bytes, not necessarily aligned.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) start: *const u8,
    pub(super) row: usize,
    pub(super) step: usize,
}

/// A matrix in memory with its row stride in elements, or none.
#[derive(Clone, Copy)]
pub(super) enum Place {
    Nowhere,
    Single(*mut f32, usize),
    Bf16(*mut bf16, usize),
}

impl Place {
    /// The same matrix from `(row, col)` on.
    ///
    /// # Safety
    /// The matrix must contain that element, or end there.
    #[inline(always)]
    pub(super) unsafe fn at(self, row: usize, col: usize) -> Place {
        // SAFETY: inside the matrix, as guaranteed by the caller.
        unsafe {
            match self {
                Place::Nowhere => Place::Nowhere,
                Place::Single(start, stride) => {
                    Place::Single(start.add(row * stride + col), stride)
                }
                Place::Bf16(start, stride) => Place::Bf16(start.add(row * stride + col), stride),
            }
        }
    }
}

/// `to = alpha · a · b + bias + onto` for up to [`MR`] rows and [`NR`] columns.
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Factor of the product.
    pub(super) alpha: f32,
    /// One for each column, or null.
    pub(super) bias: *const f32,
    /// Added; may be `to` itself.
    pub(super) onto: Place,
    pub(super) to: Place,
}

impl Tile {
    /// Writes the tile from its sums, without vector instructions.
    ///
    /// # Safety
    /// `bias`, `onto` and `to` must be valid for the tile's rows and columns.
    pub(super) unsafe fn write(&self, sums: &[[f32; NR]; MR]) {
        for (row, sums) in sums.iter().enumerate().take(self.rows) {
            for (col, &sum) in sums.iter().enumerate().take(self.cols) {
                let mut x = self.alpha * sum;
                // SAFETY: `row` and `col` are inside the tile, as guaranteed by the caller.
                unsafe {
                    if !self.bias.is_null() {
                        x += *self.bias.add(col);
                    }
                    match self.onto.at(row, col) {
                        Place::Nowhere => {}
                        Place::Single(onto, _) => x += *onto,
                        Place::Bf16(onto, _) => x += (*onto).to_f32(),
                    }
                    match self.to.at(row, col) {
                        Place::Nowhere => {}
                        Place::Single(to, _) => *to = x,
                        Place::Bf16(to, _) => *to = bf16::from_bits(x.bf16_bits() as u16),
                    }
                }
            }
        }
    }
}

/// Multiplies `steps` cells of [`MR`] rows with a packed panel and writes a tile.
///
/// # Safety
/// The processor must have the kernel's instructions; the left operand must be readable for all
/// [`MR`] rows, the panel for `steps` times [`NR`] cells (of which those past the tile's columns,
/// rounded up to 16, are not used); the tile must be valid as for [`Tile::write`].
pub(super) type Kernel = unsafe fn(steps: usize, left: Left, panel: *const u32, tile: &Tile);
