//! The loops around the kernels (Goto and van de Geijn 2008; van Zee and van de Geijn 2015).
//!
//! ```text
//! for columns of the task, 640 at a time
//!   for blocks of the inner dimension                pack B: 640 columns, in L2 or L3
//!     for rows of the task, 12 or 96 at a time       pack A if needed: 96 rows, in L2
//!       for panels of 64 columns                     one stream from L2 or L3
//!         for groups of 6 rows                       in L1
//!           kernel: 6 x 64 sums in registers
//! ```

use std::ops::Range;

use rayon::prelude::*;

use super::cell::Format;
use super::engine::Engine;
use super::pack::{group_cells, pack_panels, pack_rows};
use super::scratch::{Scratch, with_scratch};
use super::split::{COLUMNS, Costs, Grid, SUM_ROWS, blocks, rows_at_once};
use super::tile::{Left, MR, NR, Place, Tile};
use super::view::Operand;

/// A product whose shapes have been checked.
pub(super) struct Job<'a> {
    pub(super) engine: Engine,
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) left: Operand<'a>,
    pub(super) right: Operand<'a>,
    pub(super) alpha: f32,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) onto: Place,
    pub(super) out: Place,
}

// SAFETY: the pointers are those of `onto` and `out`, valid for `[m, n]` during the lifetime of the job. Tasks
// write disjoint parts of `out`; they read only elements of `onto` that no other task writes.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Multiplies on `threads` threads of the current rayon pool.
    ///
    /// # Safety
    /// `out` must be writable and `onto` readable for `[m, n]`, and no other code may access `out`.
    pub(super) unsafe fn run(&self, threads: usize) {
        // Packing one element takes as long as this many multiplications.
        const PACKED: usize = 24;
        const READ: usize = 8;
        let in_place = self.in_place(0).is_some();
        let left = if in_place { READ } else { PACKED };
        // Half panels balance the load better, but without whole panels every operand would be packed.
        let unit = if in_place { NR } else { NR / 2 };
        let costs = Costs { left, right: PACKED };
        let grid = Grid::new((self.m, self.n, self.k), unit, costs, threads);
        let run = |task| {
            let (rows, columns) = grid.task(task);
            if !rows.is_empty() && !columns.is_empty() {
                // SAFETY: guaranteed by the caller; the tasks of a grid do not overlap.
                with_scratch(|scratch| unsafe { self.task(scratch, rows, columns) });
            }
        };
        match grid.tasks() {
            1 => run(0),
            tasks => (0..tasks).into_par_iter().with_max_len(1).for_each(run),
        }
    }

    /// The left operand from element `k` of the inner dimension on, if kernels can read it without packing.
    fn in_place(&self, k: usize) -> Option<Left> {
        match (&self.left, self.engine.format) {
            (Operand::F32(x), Format::Single) if !x.is_transposed() => Some(Left {
                start: x.as_ptr().wrapping_add(k).cast(),
                row: 4 * x.stride(),
                step: 4,
            }),
            // With an odd inner dimension, the last element has no second element of a pair.
            (Operand::Bf16(x), Format::Pairs) if !x.is_transposed() && self.k.is_multiple_of(2) => {
                Some(Left {
                    start: x.as_ptr().wrapping_add(k).cast(),
                    row: 2 * x.stride(),
                    step: 4,
                })
            }
            _ => None,
        }
    }

    /// # Safety
    /// As for [`run`](Job::run), for the rows and columns of this task.
    unsafe fn task(&self, scratch: &mut Scratch, rows: Range<usize>, columns: Range<usize>) {
        let several_blocks = blocks(self.k.div_ceil(self.engine.format.group())).nth(1).is_some();
        // f32 results accumulate in place; bf16 ones would be rounded in between.
        let with_sums = several_blocks && matches!(self.out, Place::Bf16(..));
        let most_rows = if with_sums { SUM_ROWS } else { rows.len().max(1) };
        for column in columns.clone().step_by(COLUMNS) {
            let columns = column..(column + COLUMNS).min(columns.end);
            for row in rows.clone().step_by(most_rows) {
                let rows = row..(row + most_rows).min(rows.end);
                // SAFETY: guaranteed by the caller, for a part of its rows and columns.
                unsafe { self.band(scratch, rows, columns.clone(), with_sums) };
            }
        }
    }

    /// At most [`COLUMNS`] columns of a task, and with sums at most [`SUM_ROWS`] rows.
    ///
    /// # Safety
    /// As for [`task`](Job::task).
    unsafe fn band(
        &self,
        scratch: &mut Scratch,
        rows: Range<usize>,
        columns: Range<usize>,
        with_sums: bool,
    ) {
        let group = self.engine.format.group();
        let steps = self.k.div_ceil(group);
        let last = blocks(steps).last().unwrap_or_default();
        let out = Region { place: self.out, row: 0, column: 0 };
        let sums = match with_sums {
            true => {
                let stride = columns.len().next_multiple_of(NR);
                let sums = scratch.sums.cells(rows.len() * stride).as_mut_ptr().cast::<f32>();
                let place = Place::Single(sums, stride);
                Region { place, row: rows.start, column: columns.start }
            }
            false => out,
        };
        for block in blocks(steps) {
            let inner = block.start * group..(block.end * group).min(self.k);
            let cells = scratch.right.cells(columns.len().next_multiple_of(NR) * block.len());
            if !block.is_empty() {
                pack_panels(&self.engine, &self.right, inner.clone(), columns.clone(), cells);
            }
            let pass = Pass {
                first: block.start == 0,
                from: sums,
                to: if block == last { out } else { sums },
                inner,
                block,
                columns: columns.clone(),
            };
            let in_place = self.in_place(0).is_some();
            let at_once = rows_at_once(pass.block.len() * pass.columns.len(), in_place);
            for row in rows.clone().step_by(at_once) {
                let rows = row..(row + at_once).min(rows.end);
                // SAFETY: guaranteed by the caller, for a part of its rows and columns.
                unsafe { self.rows(scratch, &pass, rows) };
            }
        }
    }

    /// Multiplies some rows with the columns and the block of a pass.
    ///
    /// # Safety
    /// As for [`task`](Job::task), and `scratch` must contain the panels of the pass.
    unsafe fn rows(&self, scratch: &mut Scratch, pass: &Pass, rows: Range<usize>) {
        let steps = pass.block.len();
        let in_place = self.in_place(pass.inner.start);
        // A group of less than six rows is always packed, because the kernel reads six rows.
        let whole = if in_place.is_some() { rows.len() / MR * MR } else { 0 };
        let rest = rows.start + whole..rows.end;
        let cells = scratch.left.cells(rest.len().div_ceil(MR) * group_cells(steps));
        let packed = pack_rows(&self.engine, &self.left, rest, pass.inner.clone(), cells);
        for column in pass.columns.clone().step_by(NR) {
            let panel = scratch.right.as_ptr().wrapping_add(steps * (column - pass.columns.start));
            let cols = NR.min(pass.columns.end - column);
            for i in (0..rows.len()).step_by(MR) {
                let row = rows.start + i;
                let left = match in_place {
                    Some(left) if i < whole => {
                        Left { start: left.start.wrapping_add(row * left.row), ..left }
                    }
                    _ => {
                        let group = (i - whole) / MR * group_cells(steps);
                        Left { start: packed.start.wrapping_add(4 * group), ..packed }
                    }
                };
                // SAFETY: row and column are inside the task, as guaranteed by the caller; the
                // processor supports the kernel (`Engine::new`); the panel was packed for this block,
                // and so was the left operand unless six whole rows of it are read in place.
                unsafe {
                    let onto = Region { place: self.onto, row: 0, column: 0 };
                    let onto = if pass.first { onto } else { pass.from };
                    let bias = if pass.first { self.bias } else { None };
                    let tile = Tile {
                        rows: MR.min(rows.end - row),
                        cols,
                        alpha: self.alpha,
                        bias: bias.map_or(std::ptr::null(), |bias| bias[column..].as_ptr()),
                        onto: onto.at(row, column),
                        to: pass.to.at(row, column),
                    };
                    (self.engine.kernel)(steps, left, panel, &tile);
                }
            }
        }
    }
}

/// One block of the inner dimension for some columns.
struct Pass {
    /// Steps.
    block: Range<usize>,
    /// The same in elements.
    inner: Range<usize>,
    columns: Range<usize>,
    /// Whether bias and `onto` are still to be added; if not, the sums so far are in `from`.
    first: bool,
    from: Region,
    to: Region,
}

/// A matrix in memory that contains the product from a row and a column on: the whole product, or the part of
/// a task. It does not store a pointer to row 0, which would be outside the allocation and therefore undefined
/// behavior, even if it is never read.
#[derive(Clone, Copy)]
struct Region {
    place: Place,
    row: usize,
    column: usize,
}

impl Region {
    /// The matrix from `(row, column)` of the product on.
    ///
    /// # Safety
    /// The region must contain that element.
    unsafe fn at(self, row: usize, column: usize) -> Place {
        // SAFETY: guaranteed by the caller.
        unsafe { self.place.at(row - self.row, column - self.column) }
    }
}
