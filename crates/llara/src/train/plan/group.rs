//! The memory of one of several processes, as far as it differs from that of a single one.

use crate::train::flat_layout::{FlatLayout, bucket_elements};

/// Bytes of an f32.
const F32: u64 = size_of::<f32>() as u64;
/// The most scores that are held at a time; see [`Contrastive::BLOCK_SCORES`](crate::loss::Contrastive::BLOCK_SCORES).
const BLOCK_SCORES: u64 = 1 << 24;

/// The processes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupShape {
    /// Number of processes.
    pub ranks: usize,
    /// Whether the moments are divided among them.
    pub shard_optimizer: bool,
    /// Whether queries are scored against the passages of all processes.
    pub negatives_cross_device: bool,
    /// Rows of a step of one process.
    pub batch_size: usize,
    /// Passages of a row.
    pub group_size: usize,
}

impl GroupShape {
    /// Bytes of the moments of this process, of `all` bytes.
    pub(super) fn optimizer(&self, all: u64) -> u64 {
        if !self.shard_optimizer || self.ranks == 1 {
            return all;
        }
        let elements = (all / (2 * F32)) as usize;
        let layout = FlatLayout::new([elements], self.ranks, bucket_elements(self.ranks));
        2 * F32 * layout.owned_elements(0) as u64
    }

    /// Bytes of gradients on their way, and of the passages of other processes with their gradients and scores. A
    /// process has `gradients` bytes of gradients; an embedding has `dimension` features.
    pub(super) fn communication(&self, gradients: u64, dimension: usize) -> u64 {
        if self.ranks == 1 {
            return 0;
        }
        // A copy that is sent, and what is received.
        let buffers = 2 * gradients;
        if !self.negatives_cross_device {
            return buffers;
        }
        let others = ((self.ranks - 1) * self.batch_size * self.group_size) as u64;
        let scores = (self.batch_size as u64 * others).min(BLOCK_SCORES);
        // Their gradients are there twice while blocks of queries are added.
        buffers + F32 * (3 * others * dimension as u64 + 2 * scores)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupShape = GroupShape {
        ranks: 4,
        shard_optimizer: true,
        negatives_cross_device: true,
        batch_size: 8,
        group_size: 2,
    };

    #[test]
    fn moments_are_divided() {
        let all = 2 * F32 * 40_000_000;
        let error = GROUP.optimizer(all).abs_diff(all / 4);
        assert!(error <= all / 1000, "{error}");
        assert_eq!(GroupShape { shard_optimizer: false, ..GROUP }.optimizer(all), all);
        assert_eq!(GroupShape { ranks: 1, ..GROUP }.optimizer(all), all);
    }

    #[test]
    fn passages_of_others_and_gradients_on_their_way_are_counted() {
        assert_eq!(GroupShape { ranks: 1, ..GROUP }.communication(1000, 64), 0);
        let own = GroupShape { negatives_cross_device: false, ..GROUP };
        assert_eq!(own.communication(1000, 64), 2000);
        let others = 3 * 8 * 2;
        let expected = 2000 + 4 * (3 * others * 64 + 2 * 8 * others);
        assert_eq!(GROUP.communication(1000, 64), expected);
    }
}
