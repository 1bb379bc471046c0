//! Selects the kernel for a vector unit and a precision.

use super::cell::Format;
use super::portable;
use super::tile::Kernel;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::backend::cpu::unit::Unit;

/// How operands are rounded before the multiplication. Sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// No rounding.
    F32,
    /// Rounded to bf16, ties to even; bf16 operands are not changed.
    Bf16,
}

/// A kernel, the format of its packed operands, and the transposition that packing uses.
#[derive(Clone, Copy)]
pub(super) struct Engine {
    pub(super) format: Format,
    pub(super) kernel: Kernel,
    transpose: unsafe fn(&[[u32; 16]; 16], &mut [u32], usize),
}

impl Engine {
    /// # Panics
    /// If this processor does not have the unit: running its kernel would be undefined behavior.
    pub(super) fn new(precision: Precision, unit: Unit) -> Self {
        assert!(unit.is_available(), "{unit:?} is not a unit of this processor");
        let format = match (precision, unit) {
            (Precision::F32, _) => Format::Single,
            (Precision::Bf16, Unit::Avx512Bf16) => Format::Pairs,
            (Precision::Bf16, _) => Format::Rounded,
        };
        #[cfg(target_arch = "x86_64")]
        let (kernel, transpose) = match unit {
            Unit::Avx512Bf16 if format == Format::Pairs => {
                (avx512::pairs as Kernel, avx512::transpose as _)
            }
            Unit::Avx512Bf16 | Unit::Avx512 => (avx512::single as Kernel, avx512::transpose as _),
            Unit::Avx2 => (avx2::single as Kernel, transpose as _),
            Unit::Portable => (portable::single as Kernel, transpose as _),
        };
        #[cfg(not(target_arch = "x86_64"))]
        let (kernel, transpose) = (portable::single as Kernel, transpose as _);
        Engine { format, kernel, transpose }
    }

    /// `to[c * stride + r] = from[r][c]`
    pub(super) fn transpose(&self, from: &[[u32; 16]; 16], to: &mut [u32], stride: usize) {
        // SAFETY: `new` checked that the processor has the instructions.
        unsafe { (self.transpose)(from, to, stride) }
    }
}

/// The portable transposition.
fn transpose(from: &[[u32; 16]; 16], to: &mut [u32], stride: usize) {
    for (r, row) in from.iter().enumerate() {
        row.iter().enumerate().for_each(|(c, &cell)| to[c * stride + r] = cell);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_transpositions_agree() {
        let from: [[u32; 16]; 16] =
            std::array::from_fn(|r| std::array::from_fn(|c| (r * 16 + c) as u32));
        for unit in Unit::ALL.into_iter().filter(|unit| unit.is_available()) {
            let mut to = vec![u32::MAX; 15 * 19 + 16];
            Engine::new(Precision::F32, unit).transpose(&from, &mut to, 19);
            for (c, line) in to.chunks(19).enumerate() {
                for (r, &cell) in line.iter().enumerate() {
                    assert_eq!(cell, if r < 16 { from[r][c] } else { u32::MAX }, "{unit:?}");
                }
            }
        }
    }
}
