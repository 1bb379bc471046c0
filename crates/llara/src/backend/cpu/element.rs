//! Elements of matrices: f32, and bf16, which is converted to f32 when read and rounded when written.

use half::bf16;

use crate::backend::Dtype;

/// The type of the elements of a matrix. Kernels are generic over it.
pub(super) trait Element: Copy + Send + Sync + 'static {
    const DTYPE: Dtype;
    /// The value as f32.
    fn to_f32(self) -> f32;
    /// The nearest bf16, ties to even, in the low half.
    fn bf16_bits(self) -> u32;
    /// The nearest element, ties to even.
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn bf16_bits(self) -> u32 {
        let bits = self.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        // Rounding could turn a NaN into an infinity; keep the sign and make it quiet.
        if self.is_nan() { bits >> 16 | 0x40 } else { rounded }
    }

    #[inline(always)]
    fn from_f32(x: f32) -> f32 {
        x
    }
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn bf16_bits(self) -> u32 {
        u32::from(self.to_bits())
    }

    #[inline(always)]
    fn from_f32(x: f32) -> bf16 {
        bf16::from_bits(x.bf16_bits() as u16)
    }
}

/// Runs `$body` with `$element` as the type of the elements of `$x`.
macro_rules! with_element {
    ($x:expr, $element:ident => $body:expr) => {
        match $x.dtype() {
            $crate::backend::Dtype::F32 => {
                type $element = f32;
                $body
            }
            $crate::backend::Dtype::Bf16 => {
                type $element = half::bf16;
                $body
            }
        }
    };
}
pub(super) use with_element;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_the_half_crate() {
        let halves = [0x3f80_8000, 0x3f81_8000, 0x3f80_7fff, 0x3f80_8001, 0x7f7f_ffff, 0x0000_8000];
        let special = [0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7f80_0001, 0xffff_ffff, 1];
        let many = (0..if cfg!(miri) { 1 << 8 } else { 1 << 16 })
            .map(|i: u32| i.wrapping_mul(0x9e37_79b9));
        for bits in halves.into_iter().chain(special).chain(many) {
            let x = f32::from_bits(bits);
            assert_eq!(x.bf16_bits(), u32::from(bf16::from_f32(x).to_bits()), "{bits:#x}");
        }
    }
}
