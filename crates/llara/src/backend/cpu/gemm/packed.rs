//! A right operand packed once for many products.

use std::ops::Range;

use rayon::prelude::*;

use super::cell::Format;
use super::engine::{Engine, Precision};
use super::pack::pack_panels;
use super::rate::unit_for;
use super::scratch::CellBuffer;
use super::split::blocks;
use super::tile::NR;
use super::view::Operand;
use crate::backend::cpu::unit::Unit;

/// A right operand `[k, n]` in the order in which kernels read it: a weight that is used more than
/// once between updates. For `y = x · wᵀ` pack `w.t()`, for `dx = dy · w` pack `w`.
///
/// It takes 4 bytes per element in f32, 2 in bf16 if the processor multiplies bf16, else 4.
pub struct PackedB {
    cells: CellBuffer,
    k: usize,
    n: usize,
    format: Format,
}

impl PackedB {
    /// Packs on all threads of the current rayon pool.
    pub fn new<'a>(right: impl Into<Operand<'a>>, precision: Precision) -> Self {
        Self::for_unit(right, precision, unit_for(precision))
    }

    /// Packs for the kernels of one unit; see [`super::Gemm::unit`].
    ///
    /// # Panics
    /// If this processor does not have the unit.
    pub fn for_unit<'a>(right: impl Into<Operand<'a>>, precision: Precision, unit: Unit) -> Self {
        let engine = Engine::new(precision, unit);
        let mut packed =
            PackedB { cells: CellBuffer::default(), k: 0, n: 0, format: engine.format };
        packed.fill(&engine, right.into());
        packed
    }

    /// Packs new values, of any shape, into the same memory.
    ///
    /// # Panics
    /// If this processor does not have the unit, or if its format differs from the previous one.
    pub fn update<'a>(&mut self, right: impl Into<Operand<'a>>, precision: Precision) {
        let engine = Engine::new(precision, unit_for(precision));
        self.format = engine.format;
        self.fill(&engine, right.into());
    }

    fn fill(&mut self, engine: &Engine, right: Operand<'_>) {
        (self.k, self.n) = right.shape();
        let (k, n, group) = (self.k, self.n, engine.format.group());
        let steps = k.div_ceil(group);
        let panels = n.div_ceil(NR);
        let mut rest = self.cells.cells(steps * panels * NR);
        for block in blocks(steps).filter(|block| !block.is_empty()) {
            let (cells, after) = rest.split_at_mut(block.len() * panels * NR);
            rest = after;
            let inner = block.start * group..(block.end * group).min(k);
            cells.par_chunks_exact_mut(block.len() * NR).enumerate().for_each(|(i, panel)| {
                let columns = i * NR..((i + 1) * NR).min(n);
                pack_panels(engine, &right, inner.clone(), columns, panel);
            });
        }
    }

    /// `(k, n)`
    pub fn shape(&self) -> (usize, usize) {
        (self.k, self.n)
    }

    pub(super) fn format(&self) -> Format {
        self.format
    }

    /// The panel of 64 columns from `column` on, a multiple of 64, for a block of steps.
    pub(super) fn panel(&self, block: &Range<usize>, column: usize) -> *const u32 {
        let width = self.n.next_multiple_of(NR);
        debug_assert!(column.is_multiple_of(NR) && column < width);
        // Not `add`, whose safety requires that the address is within the buffer; readers guarantee that.
        self.cells.as_ptr().wrapping_add(block.start * width + block.len() * column)
    }
}
