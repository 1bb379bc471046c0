//! Conversion between f32 and the number formats of weight files.

use half::{bf16, f16};
use safetensors::Dtype;

/// Whether weights of this type can be read.
pub(crate) fn is_readable(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16)
}

/// Little-endian bytes of a readable type as f32.
pub(super) fn to_f32(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    fn each<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|&chunk| read(chunk)).collect()
    }
    match dtype {
        Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        _ => each(bytes, f32::from_le_bytes),
    }
}

/// Values rounded to a readable type, as f32; unchanged if the type cannot represent all of them.
pub(crate) fn rounded(values: Vec<f32>, dtype: Dtype) -> Vec<f32> {
    match from_f32(&values, dtype) {
        Ok(bytes) if dtype != Dtype::F32 => to_f32(&bytes, dtype),
        _ => values,
    }
}

/// f32 values rounded to a readable type, as little-endian bytes. `Err` is the position of the first
/// value that is not finite or that the type cannot represent (the largest f16 is 65,504).
pub(super) fn from_f32(values: &[f32], dtype: Dtype) -> Result<Vec<u8>, usize> {
    fn each<const N: usize>(
        values: &[f32],
        write: impl Fn(f32) -> ([u8; N], bool),
    ) -> Result<Vec<u8>, usize> {
        let mut bytes = Vec::with_capacity(values.len() * N);
        for (at, &value) in values.iter().enumerate() {
            let (encoded, finite) = write(value);
            if !finite {
                return Err(at);
            }
            bytes.extend_from_slice(&encoded);
        }
        Ok(bytes)
    }
    match dtype {
        Dtype::F16 => each(values, |x| {
            let x = f16::from_f32(x);
            (x.to_le_bytes(), x.is_finite())
        }),
        Dtype::BF16 => each(values, |x| {
            let x = bf16::from_f32(x);
            (x.to_le_bytes(), x.is_finite())
        }),
        _ => each(values, |x| (x.to_le_bytes(), x.is_finite())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn values_that_a_type_cannot_represent_are_found() {
        assert_eq!(from_f32(&[1.0, 70_000.0], Dtype::F16), Err(1));
        assert_eq!(from_f32(&[f32::NAN], Dtype::F32), Err(0));
    }

    proptest! {
        #[test]
        fn f32_is_exact_and_narrow_types_are_close(values in prop::collection::vec(-1e4f32..1e4, 0..50)) {
            let round_trip = |dtype| to_f32(&from_f32(&values, dtype).unwrap(), dtype);
            prop_assert_eq!(&round_trip(Dtype::F32), &values);
            for (dtype, error) in [(Dtype::F16, 1e-3), (Dtype::BF16, 4e-3)] {
                for (a, b) in round_trip(dtype).iter().zip(&values) {
                    prop_assert!((a - b).abs() <= b.abs() * error + 1e-6);
                }
            }
        }
    }
}
