//! The AVX-512 kernels: 6 x 64 sums in 24 registers.
//!
//! Each step loads four vectors of the packed panel and broadcasts six cells of the left operand for
//! 24 multiplications, so that the kernel is limited by arithmetic and not by loads: on Zen 4 a 512-bit
//! multiplication can start every cycle and has a latency of 4 (f32) or 6 (bf16) cycles.

use std::arch::x86_64::*;
use std::mem::transmute;

use super::tile::{Left, MR, NR, Place, Tile};

/// Elements of a vector.
const LANES: usize = 16;

/// The f32 kernel.
///
/// # Safety
/// As for [`Kernel`](super::tile::Kernel), with AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn single(steps: usize, left: Left, panel: *const u32, tile: &Tile) {
    // SAFETY: the callees have the same safety requirements as this function.
    unsafe {
        prefetch(tile);
        match tile.cols.div_ceil(LANES) {
            1 => write(sums_single::<1>(steps, left, panel), tile),
            2 => write(sums_single::<2>(steps, left, panel), tile),
            3 => write(sums_single::<3>(steps, left, panel), tile),
            _ => write(sums_single::<4>(steps, left, panel), tile),
        }
    }
}

/// The kernel for pairs of bf16.
///
/// # Safety
/// As for [`Kernel`](super::tile::Kernel), with AVX-512 F, BW, VL and BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn pairs(steps: usize, left: Left, panel: *const u32, tile: &Tile) {
    // SAFETY: the callees have the same safety requirements as this function.
    unsafe {
        prefetch(tile);
        match tile.cols.div_ceil(LANES) {
            1 => write(sums_pairs::<1>(steps, left, panel), tile),
            2 => write(sums_pairs::<2>(steps, left, panel), tile),
            3 => write(sums_pairs::<3>(steps, left, panel), tile),
            _ => write(sums_pairs::<4>(steps, left, panel), tile),
        }
    }
}

/// Prefetches the memory that [`write`] will read and write, during the computation of the products.
#[inline]
fn prefetch(tile: &Tile) {
    const LINE: usize = 64;
    for place in [tile.onto, tile.to] {
        let (start, stride, row) = match place {
            Place::Nowhere => continue,
            Place::Single(start, stride) => (start.cast::<i8>(), 4 * stride, 4 * tile.cols),
            Place::Bf16(start, stride) => (start.cast::<i8>(), 2 * stride, 2 * tile.cols),
        };
        for at in (0..tile.rows).flat_map(|i| (0..row).step_by(LINE).map(move |at| i * stride + at))
        {
            // SAFETY: a prefetch is valid for any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(at)) };
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn multiply_single(sum: __m512, row: __m512i, column: __m512i) -> __m512 {
    _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(column), sum)
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply_pairs(sum: __m512, row: __m512i, column: __m512i) -> __m512 {
    // SAFETY: all 512 bits, without invariants.
    let row = unsafe { transmute::<__m512i, __m512bh>(row) };
    // SAFETY: as above.
    let column = unsafe { transmute::<__m512i, __m512bh>(column) };
    _mm512_dpbf16_ps(sum, row, column)
}

macro_rules! sums {
    ($name:ident, $features:literal, $multiply:ident) => {
        /// # Safety
        /// As for [`Kernel`](super::tile::Kernel), with the target features.
        #[inline]
        #[target_feature(enable = $features)]
        unsafe fn $name<const VECTORS: usize>(
            steps: usize,
            left: Left,
            panel: *const u32,
        ) -> [[__m512; VECTORS]; MR] {
            // Counted loops are unrolled and keep the sums in registers; iterators and closures are
            // not unrolled, and ten times slower.
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; MR];
            for step in 0..steps {
                // SAFETY: step < steps, so the caller guarantees that these cells are readable of the left operand
                // and of the panel.
                unsafe {
                    let column = panel.add(step * NR);
                    let mut columns = [_mm512_setzero_si512(); VECTORS];
                    for v in 0..VECTORS {
                        columns[v] = _mm512_loadu_si512(column.add(v * LANES).cast());
                    }
                    let cell = left.start.add(step * left.step);
                    for r in 0..MR {
                        let row = cell.add(r * left.row).cast::<i32>().read_unaligned();
                        let row = _mm512_set1_epi32(row);
                        for v in 0..VECTORS {
                            sums[r][v] = $multiply(sums[r][v], row, columns[v]);
                        }
                    }
                }
            }
            sums
        }
    };
}

sums!(sums_single, "avx512f", multiply_single);
sums!(sums_pairs, "avx512f,avx512bf16", multiply_pairs);

/// # Safety
/// As for [`Tile::write`], with the target features.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[expect(clippy::needless_range_loop, reason = "unrolled, so that sums stay in registers")]
unsafe fn write<const VECTORS: usize>(sums: [[__m512; VECTORS]; MR], tile: &Tile) {
    let alpha = _mm512_set1_ps(tile.alpha);
    for row in 0..MR {
        if row >= tile.rows {
            break;
        }
        for v in 0..VECTORS {
            let mut x = _mm512_mul_ps(sums[row][v], alpha);
            let col = v * LANES;
            let lanes = (tile.cols - col).min(LANES);
            let mask = (u32::MAX >> (32 - lanes)) as u16;
            // SAFETY: the mask selects only columns of the tile, and `row` is one of its rows, whose
            // validity the caller guarantees.
            unsafe {
                if !tile.bias.is_null() {
                    x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, tile.bias.add(col)));
                }
                match tile.onto.at(row, col) {
                    Place::Nowhere => {}
                    Place::Single(onto, _) => {
                        x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, onto));
                    }
                    Place::Bf16(onto, _) => {
                        let onto = _mm256_maskz_loadu_epi16(mask, onto.cast());
                        let onto = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(onto));
                        x = _mm512_add_ps(x, _mm512_castsi512_ps(onto));
                    }
                }
                match tile.to.at(row, col) {
                    Place::Nowhere => {}
                    Place::Single(to, _) if lanes == LANES => _mm512_storeu_ps(to, x),
                    Place::Single(to, _) => _mm512_mask_storeu_ps(to, mask, x),
                    Place::Bf16(to, _) => {
                        _mm256_mask_storeu_epi16(to.cast(), mask, round(x));
                    }
                }
            }
        }
    }
}

/// The nearest bf16, ties to even. Not `vcvtneps2bf16`, which not all AVX-512 processors have and
/// which flushes denormal numbers.
#[inline]
#[target_feature(enable = "avx512f")]
fn round(x: __m512) -> __m256i {
    let bits = _mm512_castps_si512(x);
    let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
    let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x40_0000));
    let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
    let rounded = _mm512_mask_mov_epi32(rounded, nan, quiet);
    _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
}

/// Transposes 16 x 16 cells: `to[c * stride + r] = from[r][c]`.
///
/// # Safety
/// The processor must have AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn transpose(from: &[[u32; 16]; 16], to: &mut [u32], stride: usize) {
    assert!(to.len() >= 15 * stride + 16);
    let mut rows = [_mm512_setzero_si512(); 16];
    for r in 0..16 {
        // SAFETY: each row is 64 bytes.
        rows[r] = unsafe { _mm512_loadu_si512(from[r].as_ptr().cast()) };
    }
    // Four rows to lanes: `lanes[4 g + j]` holds columns j, 4 + j, 8 + j, 12 + j of rows 4 g...
    let mut lanes = rows;
    for g in (0..16).step_by(4) {
        let [a, b, c, d] = [rows[g], rows[g + 1], rows[g + 2], rows[g + 3]];
        let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
        lanes[g] = _mm512_unpacklo_epi64(ab_low, cd_low);
        lanes[g + 1] = _mm512_unpackhi_epi64(ab_low, cd_low);
        lanes[g + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
        lanes[g + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
    }
    for j in 0..4 {
        const EVEN: i32 = 0x88;
        const ODD: i32 = 0xdd;
        let (top, bottom) = ((lanes[j], lanes[4 + j]), (lanes[8 + j], lanes[12 + j]));
        let (top_even, bottom_even) = (
            _mm512_shuffle_i32x4::<EVEN>(top.0, top.1),
            _mm512_shuffle_i32x4::<EVEN>(bottom.0, bottom.1),
        );
        let (top_odd, bottom_odd) = (
            _mm512_shuffle_i32x4::<ODD>(top.0, top.1),
            _mm512_shuffle_i32x4::<ODD>(bottom.0, bottom.1),
        );
        let columns = [
            (j, _mm512_shuffle_i32x4::<EVEN>(top_even, bottom_even)),
            (4 + j, _mm512_shuffle_i32x4::<EVEN>(top_odd, bottom_odd)),
            (8 + j, _mm512_shuffle_i32x4::<ODD>(top_even, bottom_even)),
            (12 + j, _mm512_shuffle_i32x4::<ODD>(top_odd, bottom_odd)),
        ];
        for (column, vector) in columns {
            // SAFETY: inside `to` by the assert.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().add(column * stride).cast(), vector) };
        }
    }
}
