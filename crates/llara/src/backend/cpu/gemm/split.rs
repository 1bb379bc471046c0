//! How a product is divided among threads, and into blocks that fit the caches.
//!
//! Rows and columns are divided among threads, but not the inner dimension, whose blocks depend only on its
//! length. The bits of an element of the result therefore depend neither on the number of threads nor on the
//! other rows and columns.

use std::ops::Range;

use super::tile::{MR, NR};

/// Most steps between two passes over the result. A panel of 64 columns is then 192 KiB.
const STEPS: usize = 768;
/// Number of rows of the left operand that are multiplied with all columns of a block before the next rows.
/// `cells` is the number of packed cells of the block.
///
/// 96 rows take 288 KiB at most, and use a panel 16 times before the next panel is loaded from the L3 cache.
/// If all panels fit the L2 cache, twelve rows are better: the result is then written in longer contiguous
/// ranges, which limits the speed with a short inner dimension. This does not apply if the left operand is
/// packed, because twelve adjacent elements are less than a cache line.
pub(super) fn rows_at_once(cells: usize, in_place: bool) -> usize {
    const IN_L2: usize = 96 << 10;
    if in_place && cells <= IN_L2 { 2 * MR } else { 16 * MR }
}

/// Columns of the right operand that are packed at once: 1.8 MiB, in the L3 cache.
pub(super) const COLUMNS: usize = 10 * NR;

/// Most rows whose f32 sums a thread keeps between two blocks of the inner dimension: 5 MiB. For every further such
/// number of rows, panels are packed again, which takes a hundredth of the time to multiply them.
pub(super) const SUM_ROWS: usize = 2048;

/// Bytes of the f32 sums of a task of a product of `rows` rows, at most.
pub(in crate::backend::cpu) fn sum_bytes(rows: usize) -> usize {
    rows.min(SUM_ROWS) * COLUMNS * size_of::<f32>()
}

/// The blocks of an inner dimension of `steps` steps; at least one block.
pub(super) fn blocks(steps: usize) -> impl Iterator<Item = Range<usize>> {
    let count = steps.div_ceil(STEPS).max(1);
    let length = steps.div_ceil(count);
    (0..count).map(move |block| block * length..((block + 1) * length).min(steps))
}

/// A grid of `rows` by `columns` tasks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Grid {
    rows: usize,
    columns: usize,
    m: usize,
    n: usize,
    /// Tasks have a multiple of this many columns.
    unit: usize,
}

/// The cost of packing per element of an operand, in multiplications.
#[derive(Debug, Clone, Copy)]
pub(super) struct Costs {
    /// Of the left operand, for every column of tasks.
    pub(super) left: usize,
    /// Of the right operand, for every row of tasks.
    pub(super) right: usize,
}

/// With fewer multiplications (about 10 microseconds), several threads are slower than one.
const MIN_PARALLEL: usize = 1 << 19;

impl Grid {
    /// The grid for a product of `[m, k]` and `[k, n]`; tasks have multiples of `unit` columns.
    pub(super) fn new(
        (m, n, k): (usize, usize, usize),
        unit: usize,
        costs: Costs,
        threads: usize,
    ) -> Grid {
        let grid = |rows, columns| Grid { rows, columns, m, n, unit };
        if threads <= 1 || m * n * k < MIN_PARALLEL {
            return grid(1, 1);
        }
        // A multiple of the number of threads, so that none waits. Several tasks per thread balance threads
        // that are interrupted; fewer tasks pack operands fewer times.
        let cost = |grid: &Grid| {
            let (rows, columns) = (grid.row_range(0).len(), grid.column_range(0).len());
            let work = rows.next_multiple_of(MR) * columns.next_multiple_of(16)
                + costs.left * rows
                + costs.right * columns;
            let rounds = grid.tasks().div_ceil(threads);
            work * rounds + work / 8
        };
        let most_columns = |tasks: usize| n.div_ceil(unit).min(tasks);
        [threads, 2 * threads, 4 * threads]
            .into_iter()
            .flat_map(|tasks| (1..=most_columns(tasks)).map(move |columns| (tasks, columns)))
            .map(|(tasks, columns)| grid(tasks.div_ceil(columns).min(m.div_ceil(MR)), columns))
            .min_by_key(cost)
            .unwrap_or(grid(1, 1))
    }

    pub(super) fn tasks(&self) -> usize {
        self.rows * self.columns
    }

    /// The rows and columns of a task; some may be empty.
    pub(super) fn task(&self, task: usize) -> (Range<usize>, Range<usize>) {
        (self.row_range(task / self.columns), self.column_range(task % self.columns))
    }

    fn row_range(&self, index: usize) -> Range<usize> {
        share(self.m, MR, self.rows, index)
    }

    fn column_range(&self, index: usize) -> Range<usize> {
        share(self.n, self.unit, self.columns, index)
    }
}

/// Share `index` of `len` elements, in multiples of `unit` elements; the first shares are the largest.
fn share(len: usize, unit: usize, shares: usize, index: usize) -> Range<usize> {
    let units = len.div_ceil(unit);
    let bound = |i: usize| (units / shares * i + i.min(units % shares)) * unit;
    bound(index).min(len)..bound(index + 1).min(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_belongs_to_one_task() {
        for (m, n) in [(1, 1), (7, 65), (1000, 576), (64, 1536), (5, 10_000), (4096, 33)] {
            for threads in [1, 2, 3, 16, 61] {
                let costs = Costs { left: 1, right: 6 };
                let grid = Grid::new((m, n, 1 << 20), 32, costs, threads);
                let mut seen = vec![0u8; m * n];
                for (rows, columns) in (0..grid.tasks()).map(|task| grid.task(task)) {
                    for row in rows {
                        seen[row * n..][columns.clone()].iter_mut().for_each(|seen| *seen += 1);
                    }
                }
                assert!(seen.iter().all(|&count| count == 1), "{grid:?}");
            }
        }
    }

    #[test]
    fn blocks_cover_the_inner_dimension_in_order() {
        for steps in [0, 1, 767, 768, 769, 5632, 8001] {
            let mut end = 0;
            for block in blocks(steps) {
                assert!(block.start == end && block.len() <= STEPS);
                end = block.end;
            }
            assert_eq!(end, steps);
        }
        assert_eq!(blocks(0).count(), 1);
    }
}
