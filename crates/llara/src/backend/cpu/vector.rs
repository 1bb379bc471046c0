//! Loops over slices, compiled for the vector unit found at run time.
//!
//! All functions are `#[inline(always)]`, so that they are compiled again inside a [`vectorised`] function,
//! where the compiler may use AVX2 or AVX-512. Sums use sixteen partial sums: this allows vectorization and
//! makes the order of additions independent of the vector width.

use super::element::Element;

/// Compiles a function for each vector unit, and calls the version for the active [`Unit`](super::unit::Unit).
///
/// A macro and not a function that takes a closure: the compiler does not inline large closures, and would
/// then compile them for the baseline instructions of the target.
macro_rules! vectorised {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident $(<$($type:ident: $bound:path),+>)?
        ($($arg:ident: $of:ty),* $(,)?) $(-> $to:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name $(<$($type: $bound),+>)? ($($arg: $of),*) $(-> $to)? {
            #[inline(always)]
            fn plain $(<$($type: $bound),+>)? ($($arg: $of),*) $(-> $to)? $body

            #[cfg(all(target_arch = "x86_64", not(miri)))]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn avx512 $(<$($type: $bound),+>)? ($($arg: $of),*) $(-> $to)? {
                    plain $(::<$($type),+>)? ($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2 $(<$($type: $bound),+>)? ($($arg: $of),*) $(-> $to)? {
                    plain $(::<$($type),+>)? ($($arg),*)
                }
                use $crate::backend::cpu::unit::Unit;
                match Unit::active() {
                    // SAFETY: a unit is active only if this processor has its instructions.
                    Unit::Avx512Bf16 | Unit::Avx512 => return unsafe { avx512 $(::<$($type),+>)? ($($arg),*) },
                    // SAFETY: as above.
                    Unit::Avx2 => return unsafe { avx2 $(::<$($type),+>)? ($($arg),*) },
                    Unit::Portable => {}
                }
            }
            plain $(::<$($type),+>)? ($($arg),*)
        }
    };
}
pub(super) use vectorised;

/// Elements that one parallel task handles, fixed so that results do not depend on thread counts.
pub(super) const TASK_ELEMENTS: usize = 1 << 14;

/// Rows of `cols` elements that one parallel task handles.
pub(super) fn rows_per_task(cols: usize) -> usize {
    (TASK_ELEMENTS / cols.max(1)).max(1)
}

const LANES: usize = 16;

/// `Σ f(a[i], b[i])`
#[inline(always)]
pub(super) fn sum_pairs<A: Element, B: Element>(
    a: &[A],
    b: &[B],
    f: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += f(a[lane].to_f32(), b[lane].to_f32());
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| f(a.to_f32(), b.to_f32())).sum();
    fold(lanes, |a, b| a + b) + rest
}

/// `Σ a[i] · b[i]`
#[inline(always)]
pub(super) fn dot<A: Element, B: Element>(a: &[A], b: &[B]) -> f32 {
    sum_pairs(a, b, |a, b| a * b)
}

/// The largest element; `-∞` for an empty slice.
#[inline(always)]
pub(super) fn max(a: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = a.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    rest.iter().fold(fold(lanes, f32::max), |m, &x| m.max(x))
}

/// `x[i] = exp(x[i] · scale − shift)`; returns the sum of the results.
#[inline(always)]
pub(super) fn exp_scaled_sum(x: &mut [f32], scale: f32, shift: f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            chunk[lane] = exp(chunk[lane] * scale - shift);
            lanes[lane] += chunk[lane];
        }
    }
    let mut sum = fold(lanes, |a, b| a + b);
    for x in rest {
        *x = exp(*x * scale - shift);
        sum += *x;
    }
    sum
}

/// Combines lanes as a tree.
#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = f(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// `e^x` to about one unit in the last place. Exactly 0 where the result would be below the smallest
/// normal f32, as for a masked score of -∞; `e^88` for everything above 88; NaN for NaN.
///
/// Range reduction of Cody and Waite with the Cephes polynomial: without branches, so that it can be
/// vectorized, unlike the function of the C library.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// Adding this rounds to an integer, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// `ln(2^-126)`, rounded up: the smallest argument with a normal result.
    const LOWEST: f32 = -87.336_54;
    let underflows = x < LOWEST;
    let x = x.clamp(LOWEST, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e_r = p * r * r + r + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let result = e_r * f32::from_bits(exponent);
    if underflows { 0.0 } else { result }
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate() {
        let step = if cfg!(miri) { 997 } else { 1 };
        for i in (-87_336..=88_000).step_by(step) {
            let x = i as f32 / 1000.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= want * 2.5e-7, "exp({x}): {got} against {want}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0).to_bits(), 1.0f32.to_bits());
    }

    #[test]
    fn exp_of_a_masked_score_is_exactly_zero() {
        for x in [f32::NEG_INFINITY, f32::MIN, -1e9, -1000.0, -88.0, -87.34] {
            assert_eq!(exp(x).to_bits(), 0, "exp({x})");
        }
        let mut scores = [0.0, f32::NEG_INFINITY, -1.0, f32::NEG_INFINITY];
        let sum = exp_scaled_sum(&mut scores, 1.0, 0.0);
        assert_eq!(scores, [1.0, 0.0, exp(-1.0), 0.0]);
        assert_eq!(sum, 1.0 + exp(-1.0));
        assert!(exp_scaled_sum(&mut [f32::NAN; 17], 1.0, 0.0).is_nan());
        assert_eq!(sigmoid(f32::INFINITY), 1.0);
    }

    #[test]
    fn reductions_equal_sequential_sums_at_every_length() {
        for len in 0..70 {
            let a: Vec<f32> = (0..len).map(|i| (i as f32 * 0.7).sin()).collect();
            let plain: f64 = a.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            assert!((f64::from(dot(&a, &a)) - plain).abs() < 1e-5);
            let largest = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&a), largest);
        }
    }
}
