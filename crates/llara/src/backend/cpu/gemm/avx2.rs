//! The AVX2 kernel: the 64 columns of a panel in four passes of 6 x 16 sums in 12 registers.

use std::arch::x86_64::*;

use super::tile::{Left, MR, NR, Tile};

/// Columns of one pass.
const PASS: usize = 16;

/// The f32 kernel.
///
/// # Safety
/// As for [`Kernel`](super::tile::Kernel), with AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn single(steps: usize, left: Left, panel: *const u32, tile: &Tile) {
    let mut sums = [[0.0; NR]; MR];
    for first in (0..tile.cols).step_by(PASS) {
        // SAFETY: columns up to the next multiple of 16 are in the panel.
        let pass = unsafe { pass(steps, left, panel.add(first).cast()) };
        for (sums, pass) in sums.iter_mut().zip(pass) {
            // SAFETY: `first` is a multiple of 16 below 64, so 16 elements are left.
            unsafe {
                _mm256_storeu_ps(sums.as_mut_ptr().add(first), pass[0]);
                _mm256_storeu_ps(sums.as_mut_ptr().add(first + 8), pass[1]);
            }
        }
    }
    // SAFETY: the caller guarantees a valid tile.
    unsafe { tile.write(&sums) };
}

/// # Safety
/// As for [`single`], with 16 columns of the panel.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn pass(steps: usize, left: Left, panel: *const f32) -> [[__m256; 2]; MR] {
    let mut sums = [[_mm256_setzero_ps(); 2]; MR];
    for step in 0..steps {
        // SAFETY: step < steps, so the caller guarantees that these cells are readable.
        unsafe {
            let column = panel.add(step * NR);
            let columns = [_mm256_loadu_ps(column), _mm256_loadu_ps(column.add(8))];
            let cell = left.start.add(step * left.step);
            for (r, sums) in sums.iter_mut().enumerate() {
                let row = _mm256_set1_ps(cell.add(r * left.row).cast::<f32>().read_unaligned());
                for (sum, &column) in sums.iter_mut().zip(&columns) {
                    *sum = _mm256_fmadd_ps(row, column, *sum);
                }
            }
        }
    }
    sums
}
