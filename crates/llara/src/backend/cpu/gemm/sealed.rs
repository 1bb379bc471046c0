//! The part of [`Output`](super::Output) that callers cannot name, so that they cannot implement it.

use half::bf16;

use super::tile;

pub trait Place: Sized {
    #[expect(private_interfaces, reason = "nobody outside can name or call it")]
    fn place(start: *mut Self, stride: usize) -> tile::Place;
}

impl Place for f32 {
    #[expect(private_interfaces, reason = "as above")]
    fn place(start: *mut f32, stride: usize) -> tile::Place {
        tile::Place::Single(start, stride)
    }
}

impl Place for bf16 {
    #[expect(private_interfaces, reason = "as above")]
    fn place(start: *mut bf16, stride: usize) -> tile::Place {
        tile::Place::Bf16(start, stride)
    }
}
