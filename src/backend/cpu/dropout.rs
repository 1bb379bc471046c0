//! Dropout from a counter-based generator: no state, so a replay repeats it bit for bit.

use rayon::prelude::*;

use super::element::with_element;
use super::vector::{rows_per_task, vectorised};
use super::{Cpu, CpuTensor};
use crate::backend::{DropoutKey, Shape};

pub(super) fn dropout(
    cpu: &Cpu,
    x: &CpuTensor,
    numbers: &[u32],
    key: &DropoutKey,
    onto: Option<CpuTensor>,
) -> CpuTensor {
    let (rows, cols) = x.shape();
    let accumulate = onto.is_some();
    let mut y = onto.unwrap_or_else(|| cpu.unspecified_of(rows, cols, x.dtype()));
    assert_eq!(y.shape(), x.shape(), "dropout: onto");
    assert_eq!(numbers.len(), rows, "dropout: rows");
    let threshold = (f64::from(key.probability) * 4_294_967_296.0) as u32;
    let keep = 1.0 / (1.0 - key.probability);
    let task = rows_per_task(cols);
    let rule = Rule { key: *key, threshold, keep, accumulate };
    with_element!(x, T => {
        y.elements_mut::<T>()
            .par_chunks_mut(task * cols)
            .zip(x.elements::<T>().par_chunks(task * cols))
            .zip(numbers.par_chunks(task))
            .for_each(|((y, x), numbers)| {
                let rows = y.chunks_exact_mut(cols).zip(x.chunks_exact(cols));
                for ((y, x), &number) in rows.zip(numbers) {
                    drop_row(y, x, &rule, number);
                }
            });
    });
    y
}

/// What is dropped, and what becomes of the rest.
struct Rule {
    key: DropoutKey,
    /// Draws below it are dropped.
    threshold: u32,
    /// `1 / (1 − p)`
    keep: f32,
    /// Whether the result is added to.
    accumulate: bool,
}

/// Sixteen generators run side by side, so that the compiler can use vectors of them.
const GENERATORS: usize = 16;

vectorised! {
    fn drop_row<T>(y: &mut [T], x: &[T], rule: &Rule, number: u32) {
        let blocks = y.chunks_mut(4 * GENERATORS).zip(x.chunks(4 * GENERATORS));
        for (block, (y, x)) in blocks.enumerate() {
            let draws = philox_block(&rule.key, (block * GENERATORS) as u32, number);
            for (at, (y, x)) in y.iter_mut().zip(x).enumerate() {
                let kept = draws[at % 4][at / 4] >= rule.threshold;
                let x = x.single() * if kept { rule.keep } else { 0.0 };
                *y = T::rounded(if rule.accumulate { y.single() + x } else { x });
            }
        }
    }
}

/// Philox4x32-10 for [`GENERATORS`] consecutive counters; `result[i]` holds word i of each.
#[inline(always)]
fn philox_block(key: &DropoutKey, first: u32, number: u32) -> [[u32; GENERATORS]; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut counter = [
        std::array::from_fn(|lane| first.wrapping_add(lane as u32)),
        [number; GENERATORS],
        [key.step as u32; GENERATORS],
        [key.module; GENERATORS],
    ];
    let mut round_key = [key.seed as u32, (key.seed >> 32) as u32];
    for _ in 0..10 {
        let [a, b, c, d] = &mut counter;
        for (((a, b), c), d) in a.iter_mut().zip(b).zip(c).zip(d) {
            let first = u64::from(MULTIPLIERS[0]) * u64::from(*a);
            let second = u64::from(MULTIPLIERS[1]) * u64::from(*c);
            (*a, *b) = ((second >> 32) as u32 ^ *b ^ round_key[0], second as u32);
            (*c, *d) = ((first >> 32) as u32 ^ *d ^ round_key[1], first as u32);
        }
        round_key = [round_key[0].wrapping_add(WEYL[0]), round_key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123, the authors' own implementation.
    #[test]
    fn philox_gives_the_published_numbers() {
        let zeros = DropoutKey { seed: 0, step: 0, module: 0, probability: 0.1 };
        let words = philox_block(&zeros, 0, 0).map(|word| word[0]);
        assert_eq!(words, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = DropoutKey { seed: u64::MAX, step: u64::MAX, module: u32::MAX, ..zeros };
        let words = philox_block(&ones, u32::MAX, u32::MAX).map(|word| word[0]);
        assert_eq!(words, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }
}
