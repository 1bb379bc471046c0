//! Dropout with a counter-based generator. It has no state, so a recomputation gives the same bits.

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::device::Cpu;
use super::element::{Element, with_element};
use super::vector::{rows_per_task, vectorised};
use crate::Result;
use crate::backend::{DropoutKey, Shape, TokenIds};

pub(super) fn dropout(
    cpu: &Cpu,
    x: &CpuTensor,
    tokens: TokenIds<'_, Cpu>,
    key: &DropoutKey,
    onto: Option<CpuTensor>,
) -> Result<CpuTensor> {
    let (rows, cols) = x.shape();
    let accumulate = onto.is_some();
    let mut y = onto.map_or_else(|| cpu.unspecified_of(rows, cols, x.dtype()), Ok)?;
    assert_eq!(y.shape(), x.shape(), "dropout: onto");
    let TokenIds { sequences, positions } = tokens;
    assert_eq!((sequences.len(), positions.len()), (rows, rows), "dropout: rows");
    assert!(key.module < 1 << 16 && cols <= 1 << 18, "dropout: modules or columns");
    let threshold = (f64::from(key.probability) * 4_294_967_296.0) as u32;
    let keep = 1.0 / (1.0 - key.probability);
    let task = rows_per_task(cols);
    let rule = Rule { key: *key, threshold, keep, accumulate };
    with_element!(x, T => {
        y.elements_mut::<T>()
            .par_chunks_mut(task * cols)
            .zip(x.elements::<T>().par_chunks(task * cols))
            .zip(sequences.par_chunks(task).zip(positions.par_chunks(task)))
            .for_each(|((y, x), (sequences, positions))| {
                let rows = y.chunks_exact_mut(cols).zip(x.chunks_exact(cols));
                for ((y, x), token) in rows.zip(sequences.iter().zip(positions)) {
                    drop_row(y, x, &rule, (*token.0, *token.1));
                }
            });
    });
    Ok(y)
}

/// Which elements are dropped, and the factor on the others.
struct Rule {
    key: DropoutKey,
    /// Draws below it are dropped.
    threshold: u32,
    /// `1 / (1 − p)`
    keep: f32,
    /// Whether the result is added to y.
    accumulate: bool,
}

/// Counters evaluated together; with four words each, they cover a block of 64 columns.
const COUNTERS: usize = 16;
const BLOCK: usize = 4 * COUNTERS;

vectorised! {
    fn drop_row<T: Element>(y: &mut [T], x: &[T], rule: &Rule, token: (u32, u32)) {
        let (y_blocks, y_rest) = y.as_chunks_mut::<BLOCK>();
        let (x_blocks, x_rest) = x.as_chunks::<BLOCK>();
        let draws_of = |block: usize| philox_block(&rule.key, (block * COUNTERS) as u32, token);
        for (block, (y, x)) in y_blocks.iter_mut().zip(x_blocks).enumerate() {
            let draws = draws_of(block);
            for i in 0..BLOCK {
                y[i] = rule.apply(draws[i], x[i], y[i]);
            }
        }
        if !x_rest.is_empty() {
            let draws = draws_of(x_blocks.len());
            for ((y, x), draw) in y_rest.iter_mut().zip(x_rest).zip(draws) {
                *y = rule.apply(draw, *x, *y);
            }
        }
    }
}

impl Rule {
    #[inline(always)]
    fn apply<T: Element>(&self, draw: u32, x: T, y: T) -> T {
        let x = x.to_f32() * if draw >= self.threshold { self.keep } else { 0.0 };
        T::from_f32(if self.accumulate { y.to_f32() + x } else { x })
    }
}

/// Philox4x32-10 for [`COUNTERS`] consecutive counters: the first words of all counters, then the second words, ...
///
/// Words are stored in 64 bits, because vector instructions multiply 32 by 32 bits to 64 bits. The upper halves
/// are never read.
#[inline(always)]
fn philox_block(key: &DropoutKey, first: u32, (sequence, position): (u32, u32)) -> [u32; BLOCK] {
    const MULTIPLIERS: [u64; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    const LOW: u64 = u32::MAX as u64;
    let mut a: [u64; COUNTERS] =
        std::array::from_fn(|lane| u64::from(key.module << 16 | (first + lane as u32)));
    let mut b = [u64::from(sequence); COUNTERS];
    let mut c = [u64::from(position); COUNTERS];
    let mut d = [key.step & LOW; COUNTERS];
    let mut round_key = [key.seed as u32, (key.seed >> 32) as u32];
    for _ in 0..10 {
        let [first_key, second_key] = round_key.map(u64::from);
        for lane in 0..COUNTERS {
            let first = (a[lane] & LOW) * MULTIPLIERS[0];
            let second = (c[lane] & LOW) * MULTIPLIERS[1];
            (a[lane], b[lane]) = (second >> 32 ^ b[lane] ^ first_key, second);
            (c[lane], d[lane]) = (first >> 32 ^ d[lane] ^ second_key, first);
        }
        round_key = [round_key[0].wrapping_add(WEYL[0]), round_key[1].wrapping_add(WEYL[1])];
    }
    let mut words = [0; BLOCK];
    for (words, word) in words.as_chunks_mut::<COUNTERS>().0.iter_mut().zip([a, b, c, d]) {
        for lane in 0..COUNTERS {
            words[lane] = word[lane] as u32;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_counter(block: [u32; BLOCK]) -> [u32; 4] {
        std::array::from_fn(|word| block[word * COUNTERS])
    }

    /// Known answers of Random123, the implementation by the authors of the paper.
    #[test]
    fn philox_gives_the_published_numbers() {
        let zeros = DropoutKey { seed: 0, step: 0, module: 0, probability: 0.1 };
        let words = first_counter(philox_block(&zeros, 0, (0, 0)));
        assert_eq!(words, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = DropoutKey { seed: u64::MAX, step: u64::MAX, module: 0xffff, ..zeros };
        let block = philox_block(&ones, 0xfff0, (u32::MAX, u32::MAX));
        // The last of the sixteen counters has all bits set.
        let words: [u32; 4] = std::array::from_fn(|word| block[word * COUNTERS + COUNTERS - 1]);
        assert_eq!(words, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }
}
