//! Packing: operands copied into the order in which kernels read them.
//!
//! The right operand becomes panels of 64 columns, `[step][column]`, so that a kernel reads it as one
//! stream. The left operand is read in place if its rows are contiguous along the inner dimension; otherwise
//! it becomes groups of six rows, `[step][row]`.

use std::ops::Range;

use super::cell::{
    Cells, Element, Format, Pairs, Rounded, Single, cells_across, cells_along, sixteen_cells,
};
use super::engine::Engine;
use super::tile::{Left, MR, NR};
use super::view::{Operand, View};
use crate::backend::cpu::vector::vectorised;

/// Calls `$pack::<T, C>(view, ...)` for the element type of an operand and the cell type of a format.
macro_rules! with_types {
    ($operand:expr, $format:expr, $pack:ident($($arg:expr),*)) => {
        match ($operand, $format) {
            (&Operand::F32(view), Format::Single) => $pack::<f32, Single>(view, $($arg),*),
            (&Operand::F32(view), Format::Rounded) => $pack::<f32, Rounded>(view, $($arg),*),
            (&Operand::F32(view), Format::Pairs) => $pack::<f32, Pairs>(view, $($arg),*),
            // bf16 needs no rounding.
            (&Operand::Bf16(view), Format::Single | Format::Rounded) => {
                $pack::<half::bf16, Single>(view, $($arg),*)
            }
            (&Operand::Bf16(view), Format::Pairs) => $pack::<half::bf16, Pairs>(view, $($arg),*),
        }
    };
}

/// Packs columns of a right operand `[k, n]` for the elements `inner` of its inner dimension, in panels
/// of 64 columns. Columns past the last are zero up to a multiple of 16, the width of the widest
/// vector.
pub(super) fn pack_panels(
    engine: &Engine,
    right: &Operand<'_>,
    inner: Range<usize>,
    columns: Range<usize>,
    panels: &mut [u32],
) {
    let along = right.is_transposed();
    match along {
        true => with_types!(right, engine.format, panels_along(engine, inner, columns, panels)),
        false => with_types!(right, engine.format, panels_across(inner, columns, panels)),
    }
}

/// The columns of a panel.
#[inline(always)]
fn panel_columns(panel: usize, columns: &Range<usize>) -> Range<usize> {
    let first = columns.start + panel * NR;
    first..(first + NR).min(columns.end)
}

vectorised! {
    /// From lines across the inner dimension: one or two lines become one step. A few steps are packed for all
    /// panels before the next steps, so that a line is read completely while it is in the cache.
    fn panels_across<T: Element, C: Cells>(
        view: View<'_, T>,
        inner: Range<usize>,
        columns: Range<usize>,
        panels: &mut [u32],
    ) {
        const STEPS: usize = 8;
        let steps = inner.len().div_ceil(C::GROUP);
        for first in (0..steps).step_by(STEPS) {
            let some = first..(first + STEPS).min(steps);
            for (i, panel) in panels.chunks_exact_mut(NR * steps).enumerate() {
                let columns = panel_columns(i, &columns);
                let len = columns.len();
                let panel = &mut panel[some.start * NR..some.end * NR];
                for (step, cells) in some.clone().zip(panel.chunks_exact_mut(NR)) {
                    let k = inner.start + step * C::GROUP;
                    let pair = Pair::new(&view, k, inner.end, columns.clone());
                    if len == NR {
                        pair.cells::<C>(cells);
                    } else {
                        pair.cells::<C>(&mut cells[..len]);
                        cells[len..len.next_multiple_of(16)].fill(0);
                    }
                }
            }
        }
    }
}

vectorised! {
    /// From lines along the inner dimension: 16 cells of 16 lines at a time.
    fn panels_along<T: Element, C: Cells>(
        view: View<'_, T>,
        engine: &Engine,
        inner: Range<usize>,
        columns: Range<usize>,
        panels: &mut [u32],
    ) {
        let steps = inner.len().div_ceil(C::GROUP);
        for (i, panel) in panels.chunks_exact_mut(NR * steps).enumerate() {
            panel_along::<T, C>(view, engine, inner.clone(), panel_columns(i, &columns), panel);
        }
    }
}

#[inline(always)]
fn panel_along<T: Element, C: Cells>(
    view: View<'_, T>,
    engine: &Engine,
    inner: Range<usize>,
    columns: Range<usize>,
    panel: &mut [u32],
) {
    let mut block = [[0; 16]; 16];
    for first in (0..columns.len()).step_by(16) {
        let lines: [&[T]; 16] = std::array::from_fn(|i| {
            let column = columns.start + first + i;
            let exists = column < columns.end;
            if exists { view.line(column, inner.start, inner.end) } else { &[] }
        });
        for (i, to) in panel.chunks_mut(16 * NR).enumerate() {
            let from = i * 16 * C::GROUP;
            for column in 0..16 {
                let (line, cells) = (lines[column], &mut block[column]);
                if let Some(line) = line.get(from..from + 16 * C::GROUP) {
                    sixteen_cells::<T, C>(line, cells);
                } else {
                    cells.fill(0);
                    cells_along::<T, C>(line.get(from..).unwrap_or_default(), cells);
                }
            }
            if to.len() == 16 * NR {
                engine.transpose(&block, &mut to[first..], NR);
            } else {
                for (step, to) in to.chunks_exact_mut(NR).enumerate() {
                    (0..16).for_each(|column| to[first + column] = block[column][step]);
                }
            }
        }
    }
}

/// The lines of one step; the second is absent past the end, and if a cell is not a pair.
struct Pair<'a, T> {
    first: &'a [T],
    second: Option<&'a [T]>,
}

impl<'a, T: Element> Pair<'a, T> {
    #[inline(always)]
    fn new(view: &View<'a, T>, k: usize, end: usize, outer: Range<usize>) -> Self {
        let second = (k + 1 < end).then(|| view.line(k + 1, outer.start, outer.end));
        Pair { first: view.line(k, outer.start, outer.end), second }
    }

    #[inline(always)]
    fn cells<C: Cells>(&self, cells: &mut [u32]) {
        cells_across::<T, C>(self.first, self.second.filter(|_| C::GROUP == 2), cells);
    }
}

/// Cells of a packed group of six rows. The last two are not read: groups are written eight cells at a time,
/// and each write overwrites the last two cells of the previous one.
pub(super) fn group_cells(steps: usize) -> usize {
    MR * steps + WRITE - MR
}

/// Cells that are written at once: one vector of AVX2, half a vector of AVX-512.
const WRITE: usize = 8;

/// Packs rows of a left operand `[m, k]` for the elements `inner` of its inner dimension, padded with
/// zeros to a multiple of six rows, in groups of six that are [`group_cells`] long.
pub(super) fn pack_rows(
    engine: &Engine,
    left: &Operand<'_>,
    rows: Range<usize>,
    inner: Range<usize>,
    cells: &mut [u32],
) -> Left {
    let steps = inner.len().div_ceil(engine.format.group());
    let across = left.is_transposed();
    if !rows.is_empty() && steps > 0 {
        match across {
            true => with_types!(left, engine.format, rows_across(rows, inner, cells)),
            false => with_types!(left, engine.format, rows_along(rows, inner, cells)),
        }
    }
    // After the last write: a write through the slice would invalidate an earlier pointer.
    let start = cells.as_ptr().cast();
    match across {
        true => Left { start, row: 4, step: 4 * MR },
        false => Left { start, row: 4 * steps, step: 4 },
    }
}

vectorised! {
    /// From lines along the inner dimension; the order within a line is kept.
    fn rows_along<T: Element, C: Cells>(
        view: View<'_, T>,
        rows: Range<usize>,
        inner: Range<usize>,
        cells: &mut [u32],
    ) {
        let steps = inner.len().div_ceil(C::GROUP);
        for (group, cells) in cells.chunks_exact_mut(group_cells(steps)).enumerate() {
            for (i, cells) in cells.chunks_exact_mut(steps).take(MR).enumerate() {
                let row = rows.start + group * MR + i;
                if row < rows.end {
                    cells_along::<T, C>(view.line(row, inner.start, inner.end), cells);
                } else {
                    cells.fill(0);
                }
            }
        }
    }
}

vectorised! {
    /// From lines across the inner dimension: 16 steps of 96 rows are converted, then distributed to their
    /// groups.
    fn rows_across<T: Element, C: Cells>(
        view: View<'_, T>,
        rows: Range<usize>,
        inner: Range<usize>,
        cells: &mut [u32],
    ) {
        /// A multiple of six and of the vector width.
        const ROWS: usize = 96;
        const STEPS: usize = 16;
        let steps = inner.len().div_ceil(C::GROUP);
        let group_len = group_cells(steps);
        // The last write of a line extends two cells beyond it.
        let mut lines = [[0; ROWS + 16]; STEPS];
        for (part, cells) in cells.chunks_mut(ROWS / MR * group_len).enumerate() {
            let from = rows.start + part * ROWS;
            let outer = from..(from + ROWS).min(rows.end);
            let len = outer.len();
            for step in (0..steps).step_by(STEPS) {
                let count = STEPS.min(steps - step);
                for (i, line) in lines[..count].iter_mut().enumerate() {
                    let k = inner.start + (step + i) * C::GROUP;
                    let pair = Pair::new(&view, k, inner.end, outer.clone());
                    if len == ROWS {
                        pair.cells::<C>(&mut line[..ROWS]);
                    } else {
                        pair.cells::<C>(&mut line[..len]);
                        line[len..].fill(0);
                    }
                }
                for (group, cells) in cells.chunks_exact_mut(group_len).enumerate() {
                    let cells = &mut cells[step * MR..(step + count) * MR + WRITE - MR];
                    for (i, line) in lines[..count].iter().enumerate() {
                        let from = line[group * MR..].first_chunk::<WRITE>();
                        let to = cells[i * MR..].first_chunk_mut::<WRITE>();
                        if let (Some(to), Some(from)) = (to, from) {
                            *to = *from;
                        }
                    }
                }
            }
        }
    }
}
