//! Cells: the 32-bit unit in which kernels read packed operands.
//!
//! One step of a kernel's inner loop multiplies one cell of each row with one cell of each column. A
//! cell is an f32, or a pair of bf16 neighbours along the inner dimension, which is what `vdpbf16ps`
//! multiplies and adds at once. As both are 32 bits wide, packing, loops and tiles are the same for
//! both.
//!
//! The loops use counters instead of zipped iterators, which are not always inlined into code compiled for a
//! vector unit; packing would then take twice the time.

pub(super) use crate::backend::cpu::element::Element;

/// The contents of the cells of a product's packed operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// f32.
    Single,
    /// f32 that has been rounded to bf16: bf16 products on processors without `vdpbf16ps`.
    Rounded,
    /// Pairs of bf16, the earlier one in the low half.
    Pairs,
}

impl Format {
    /// Elements of the inner dimension in a cell.
    pub(super) fn group(self) -> usize {
        if self == Format::Pairs { 2 } else { 1 }
    }
}

/// A [`Format`] as a type, so that packing loops are compiled for each.
pub(super) trait Cells {
    const GROUP: usize;
    /// `second` is the next element along the inner dimension, or zero; only pairs use it.
    fn cell<T: Element>(first: T, second: Option<T>) -> u32;
}

pub(super) struct Single;
pub(super) struct Rounded;
pub(super) struct Pairs;

impl Cells for Single {
    const GROUP: usize = 1;
    #[inline(always)]
    fn cell<T: Element>(first: T, _: Option<T>) -> u32 {
        first.to_f32().to_bits()
    }
}

impl Cells for Rounded {
    const GROUP: usize = 1;
    #[inline(always)]
    fn cell<T: Element>(first: T, _: Option<T>) -> u32 {
        first.bf16_bits() << 16
    }
}

impl Cells for Pairs {
    const GROUP: usize = 2;
    #[inline(always)]
    fn cell<T: Element>(first: T, second: Option<T>) -> u32 {
        first.bf16_bits() | second.map_or(0, T::bf16_bits) << 16
    }
}

/// Cells of a line along the inner dimension.
#[inline(always)]
pub(super) fn cells_along<T: Element, C: Cells>(line: &[T], cells: &mut [u32]) {
    let whole = line.len() / C::GROUP;
    let (full, rest) = cells.split_at_mut(whole);
    let (line, last) = line.split_at(whole * C::GROUP);
    for i in 0..whole {
        let second = (C::GROUP == 2).then(|| line[C::GROUP * i + C::GROUP - 1]);
        full[i] = C::cell(line[C::GROUP * i], second);
    }
    if let (Some(cell), &[first]) = (rest.first_mut(), last) {
        *cell = C::cell(first, None);
    }
}

/// [`cells_along`] for the number of cells of an AVX-512 vector. The fixed number allows vectorization.
#[inline(always)]
pub(super) fn sixteen_cells<T: Element, C: Cells>(line: &[T], cells: &mut [u32; 16]) {
    let line = &line[..16 * C::GROUP];
    for i in 0..16 {
        let second = (C::GROUP == 2).then(|| line[C::GROUP * i + C::GROUP - 1]);
        cells[i] = C::cell(line[C::GROUP * i], second);
    }
}

/// Cells of one step from lines across the inner dimension; `second` is absent past the end.
#[inline(always)]
pub(super) fn cells_across<T: Element, C: Cells>(
    first: &[T],
    second: Option<&[T]>,
    cells: &mut [u32],
) {
    let len = cells.len();
    let first = &first[..len];
    if let Some(second) = second {
        let second = &second[..len];
        for i in 0..len {
            cells[i] = C::cell(first[i], Some(second[i]));
        }
    } else {
        for i in 0..len {
            cells[i] = C::cell(first[i], None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_odd_element_is_paired_with_zero() {
        let mut cells = [0; 2];
        cells_along::<f32, Pairs>(&[1.0, 2.0, 4.0], &mut cells);
        assert_eq!(cells, [0x4000_3f80, 0x0000_4080]);
        cells_across::<f32, Pairs>(&[1.0, 2.0], None, &mut cells);
        assert_eq!(cells, [0x3f80, 0x4000]);
    }
}
