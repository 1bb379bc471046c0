//! Rotary position embedding, in place.

use rayon::prelude::*;

use super::buffer::CpuTensor;
use super::element::{Element, with_element};
use super::vector::{rows_per_task, vectorised};
use crate::backend::{RopeDirection, Shape, ViewMut};

/// The table has `hd / 2` columns. Within a head, features `i` and `i + hd/2` are one pair (the
/// "rotate half" order in which Hugging Face stores projections).
pub(super) fn rope(
    x: ViewMut<'_, CpuTensor>,
    positions: &[u32],
    (cos, sin): (&CpuTensor, &CpuTensor),
    direction: RopeDirection,
) {
    let (rows, cols) = x.shape();
    let half = cos.cols();
    assert_eq!(cols % (2 * half), 0, "rope: heads");
    assert_eq!(rows, positions.len(), "rope: positions");
    let sign = if direction == RopeDirection::Forward { 1.0 } else { -1.0 };
    let task = rows_per_task(cols);
    with_element!(x, T => {
        let (stride, columns) = (x.tensor.cols(), x.col..x.col + cols);
        let tasks = x.rows_of::<T>().par_chunks_mut(task * stride);
        tasks.zip(positions.par_chunks(task)).for_each(|(rows, positions)| {
            for (row, &position) in rows.chunks_exact_mut(stride).zip(positions) {
                let at = position as usize * half;
                let angles = (&cos.as_slice()[at..at + half], &sin.as_slice()[at..at + half]);
                rotate_row(&mut row[columns.clone()], angles, sign);
            }
        });
    });
}

vectorised! {
    fn rotate_row<T: Element>(row: &mut [T], angles: (&[f32], &[f32]), sign: f32) {
        let (cos, sin) = angles;
        let half = cos.len();
        for head in row.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for ((x, y), (c, s)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                let (a, b, s) = (x.to_f32(), y.to_f32(), s * sign);
                *x = T::from_f32(a * c - b * s);
                *y = T::from_f32(b * c + a * s);
            }
        }
    }
}
