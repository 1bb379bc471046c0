//! Selects the kernel for bf16 products by a measurement of a few milliseconds.
//!
//! `vdpbf16ps` multiplies two pairs at once, but on some processors it runs at a quarter of the rate
//! of an f32 multiply-add, and the product then takes twice as long as in f32. On these, bf16 operands are
//! converted to f32 while they are packed, which is exact, and multiplied by the f32 kernel; operands that are
//! f32 are still rounded to bf16 first. The two kernels add in a different order and treat denormal
//! operands differently, so their results differ in rounding. If the rates are nearly equal, two
//! processes may decide differently; `LLARA_CPU=avx512bf16` or `LLARA_CPU=avx512` fixes the decision.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::engine::{Engine, Precision};
use super::scratch::CellBuffer;
use super::tile::{Left, MR, NR, Place, Tile};
use crate::backend::cpu::unit::Unit;

/// The unit whose kernels are used for a precision, unless a product selects another.
pub(super) fn unit_for(precision: Precision) -> Unit {
    match (precision, Unit::active()) {
        (Precision::Bf16, Unit::Avx512Bf16) if !multiplies_bf16_faster() => Unit::Avx512,
        (_, unit) => unit,
    }
}

static FASTER: OnceLock<bool> = OnceLock::new();

/// Makes the decision without a measurement, if it has not been made yet. `LLARA_CPU` takes precedence.
pub(crate) fn decide(faster: bool) {
    if Unit::active() == Unit::Avx512Bf16 && !Unit::is_forced() {
        let _ = FASTER.set(faster);
    }
}

/// Whether bf16 products use bf16 instructions, because those are faster than the f32 kernel
/// on this processor, or because `LLARA_CPU` selects them. Measured once per process.
pub(crate) fn multiplies_bf16_faster() -> bool {
    *FASTER.get_or_init(|| {
        Unit::active() == Unit::Avx512Bf16 && (Unit::is_forced() || pairs_are_faster(&measure()))
    })
}

/// The shortest time of the same product with each kernel.
#[derive(Debug)]
struct Times {
    single: Duration,
    pairs: Duration,
}

fn pairs_are_faster(times: &Times) -> bool {
    times.pairs < times.single
}

/// Elements of the inner dimension in the measured product; all operands then fit the L1 cache.
const INNER: usize = 64;
/// Kernel calls that are timed together, some 10 microseconds.
const CALLS: usize = 64;
const ROUNDS: usize = 60;
/// Rounds before the measurement: a processor may change its clock rate for wide vectors.
const WARM_UP: usize = 20;

/// Measures both kernels alternately, on packed operands.
fn measure() -> Times {
    let mut operands = [CellBuffer::default(), CellBuffer::default()];
    let [left, panel] = &mut operands;
    left.cells(MR * INNER).fill(0x3f80_3f80);
    panel.cells(NR * INNER).fill(0x3f80_3f80);
    let engines =
        [Precision::F32, Precision::Bf16].map(|precision| Engine::new(precision, Unit::Avx512Bf16));
    let mut shortest = [Duration::MAX; 2];
    for round in 0..WARM_UP + ROUNDS {
        for (engine, shortest) in engines.iter().zip(&mut shortest) {
            let start = Instant::now();
            run(engine, left.as_ptr(), panel.as_ptr());
            if round >= WARM_UP {
                *shortest = (*shortest).min(start.elapsed());
            }
        }
    }
    Times { single: shortest[0], pairs: shortest[1] }
}

fn run(engine: &Engine, left: *const u32, panel: *const u32) {
    let mut out = [0.0f32; MR * NR];
    let steps = INNER / engine.format.group();
    let to = Place::Single(out.as_mut_ptr(), NR);
    let left = Left { start: left.cast(), row: 4 * steps, step: 4 };
    let tile =
        Tile { rows: MR, cols: NR, alpha: 1.0, bias: std::ptr::null(), onto: Place::Nowhere, to };
    for _ in 0..CALLS {
        // SAFETY: `Engine::new` checked the instructions; left, panel and out have the cells of a
        // tile with INNER steps or fewer.
        unsafe { (engine.kernel)(steps, std::hint::black_box(left), panel, &tile) };
    }
    std::hint::black_box(&out);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shorter_time_decides() {
        let [short, long] = [Duration::from_micros(5), Duration::from_micros(9)];
        assert!(pairs_are_faster(&Times { single: long, pairs: short }));
        assert!(!pairs_are_faster(&Times { single: short, pairs: long }));
    }

    #[test]
    fn f32_uses_the_selected_unit_and_bf16_the_faster_one() {
        assert_eq!(unit_for(Precision::F32), Unit::active());
        let pairs = unit_for(Precision::Bf16) == Unit::Avx512Bf16;
        assert_eq!(pairs, multiplies_bf16_faster());
        if Unit::is_forced() {
            assert_eq!(unit_for(Precision::Bf16), Unit::active());
        }
    }

    #[test]
    fn the_measurement_takes_milliseconds() {
        if Unit::Avx512Bf16.is_available() {
            // The shortest of five: other load on the machine must not make the test fail.
            let shortest = (0..5).map(|_| {
                let start = Instant::now();
                let times = measure();
                assert!(times.single > Duration::ZERO && times.pairs > Duration::ZERO);
                start.elapsed()
            });
            let shortest = shortest.min().unwrap_or_default();
            assert!(shortest < Duration::from_millis(50), "{shortest:?}");
        }
    }
}
