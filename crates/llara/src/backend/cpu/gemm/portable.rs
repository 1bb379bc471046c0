//! The kernel for processors without AVX2.

use super::tile::{Left, MR, NR, Tile};

/// The f32 kernel in plain loops, which the compiler vectorizes for the target's baseline.
///
/// # Safety
/// As for [`Kernel`](super::tile::Kernel).
pub(super) unsafe fn single(steps: usize, left: Left, panel: *const u32, tile: &Tile) {
    let width = tile.cols.next_multiple_of(16);
    let mut sums = [[0.0; NR]; MR];
    for step in 0..steps {
        // SAFETY: step < steps, so the caller guarantees that these cells are readable in the panel.
        let columns =
            unsafe { std::slice::from_raw_parts(panel.add(step * NR).cast::<f32>(), width) };
        for (r, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as above, for the left operand.
            let row = unsafe {
                left.start.add(r * left.row + step * left.step).cast::<f32>().read_unaligned()
            };
            sums.iter_mut().zip(columns).for_each(|(sum, column)| *sum += row * column);
        }
    }
    // SAFETY: the caller guarantees a valid tile.
    unsafe { tile.write(&sums) };
}
