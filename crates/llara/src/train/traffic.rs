//! The bytes that a process sends in a step, as a formula.

use super::config::TrainConfig;
use super::flat_layout::FlatLayout;
use super::task::Task;
use crate::backend::Backend;
use crate::dist::message_bytes;
use crate::loss::RowsPerRank;

/// Bytes of an f32.
const F32: usize = 4;

/// A step on several processes, as far as its communication depends on it. In fine-tuning the objective is InfoNCE
/// without masks of equal texts and without the symmetric term, which exchange keys and queries as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepTraffic {
    /// The trainable parameters, divided among ranks.
    pub layout: FlatLayout,
    /// How many rows each process has.
    pub rows: RowsPerRank,
    /// Features of an embedding, `d`.
    pub dimension: usize,
    /// Whether queries are scored against the passages of all processes.
    pub negatives_cross_device: bool,
    /// Whether the moments are divided among processes.
    pub shard_optimizer: bool,
    /// Terms of the loss that are reported beside it.
    pub loss_terms: usize,
    /// Values that are added over processes before a step is computed.
    pub counts: usize,
}

impl StepTraffic {
    /// A step of task `T` with a full batch, on the processes of `layout`.
    pub fn of_task<B: Backend, T: Task<B>>(
        config: &TrainConfig,
        layout: FlatLayout,
        dimension: usize,
        negatives_cross_device: bool,
    ) -> Self {
        let TrainConfig { batch_size, group_size, shard_optimizer, .. } = *config;
        let ranks = layout.ranks();
        StepTraffic {
            layout,
            rows: RowsPerRank::divided(batch_size * ranks, batch_size, ranks, group_size),
            dimension,
            negatives_cross_device,
            shard_optimizer,
            loss_terms: T::TERMS.len(),
            counts: T::COUNTS,
        }
    }

    /// Bytes of all messages that a rank sends, headers included.
    ///
    /// With `W` ranks, `N` trainable parameters and `b` rows of `G` passages each per rank, that is about
    /// `8·N·(W − 1)/W` for the gradients and the weights, and `8·(W − 1)·b·G·d` for the embeddings of passages and
    /// their gradients.
    pub fn bytes_sent(&self, rank: usize) -> u64 {
        let others = self.layout.ranks() - 1;
        let to_each = |bytes: usize| (others * message_bytes(bytes)) as u64;
        // Messages of known length without data are not sent.
        let known = |bytes: usize| if bytes == 0 { 0 } else { message_bytes(bytes) as u64 };
        let mut sent = 0;

        // Whether all have their input; loss and terms, tokens and the wish to stop.
        sent += to_each(0) + to_each((3 + self.loss_terms) * size_of::<f64>());
        if self.counts > 0 {
            sent += to_each(self.counts * size_of::<f64>());
        }
        if self.negatives_cross_device {
            let passages = self.rows.passages();
            let bytes = |of: usize| passages[of] * self.dimension * F32;
            // Every rank gets the own passages, and their gradients come from every rank.
            sent += others as u64 * known(bytes(rank));
            sent += self.other_ranks(rank).map(|to| known(bytes(to))).sum::<u64>();
        }
        for bucket in self.layout.buckets() {
            let bytes = |of: usize| bucket.owned_by(of).len() * F32;
            sent += self.other_ranks(rank).map(|to| known(bytes(to))).sum::<u64>();
            // Weights, or else the summed gradients.
            sent += others as u64 * known(bytes(rank));
        }
        if self.shard_optimizer {
            // The square of the gradients' norm.
            sent += to_each(F32);
        }
        sent
    }

    fn other_ranks(&self, rank: usize) -> impl Iterator<Item = usize> {
        (0..self.layout.ranks()).filter(move |other| *other != rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_and_weights_dominate_with_many_parameters() {
        let parameters = 10_000_000;
        for ranks in [2, 4, 16] {
            let traffic = StepTraffic {
                layout: FlatLayout::new([parameters], ranks, 1 << 20),
                rows: RowsPerRank::divided(8 * ranks, 8, ranks, 2),
                dimension: 64,
                negatives_cross_device: true,
                shard_optimizer: true,
                loss_terms: 0,
                counts: 0,
            };
            let share = (ranks - 1) as f64 / ranks as f64;
            let embeddings = 8.0 * (ranks - 1) as f64 * 8.0 * 2.0 * 64.0;
            // Two messages per bucket and some others, each with a header.
            let headers = ((ranks - 1) * (2 * 10 + 5) * message_bytes(0)) as f64;
            let expected = 8.0 * parameters as f64 * share + embeddings + headers;
            let sent = traffic.bytes_sent(1) as f64;
            assert!((sent / expected - 1.0).abs() < 2e-3, "{ranks}: {sent} {expected}");
        }
    }

    #[test]
    fn ranks_without_rows_send_no_passages() {
        let traffic = |rows: usize| StepTraffic {
            layout: FlatLayout::new([100], 2, 100),
            rows: RowsPerRank::divided(rows, 4, 2, 2),
            dimension: 1000,
            negatives_cross_device: true,
            shard_optimizer: false,
            loss_terms: 3,
            counts: 3,
        };
        let difference = traffic(8).bytes_sent(1) - traffic(4).bytes_sent(1);
        assert_eq!(difference, (message_bytes(4 * 2 * 1000 * 4)) as u64);
    }
}
