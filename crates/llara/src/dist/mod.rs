//! Collective communication between the processes of a training run.
//!
//! Every rank calls the same operations in the same order. One process is a group of size 1 and runs
//! the same code ([`Solo`]). [`ThreadGroup`] runs several ranks as threads of one process, [`MpiWorld`] as
//! processes that `mpirun` or `srun` started.
//!
//! Operations on tensors are ordered with the operations of the backend: they run after the operations that were
//! enqueued before them, and operations that are enqueued later use their result.

mod mpi;
mod solo;
mod threads;

use std::ops::Range;

pub use mpi::{Launch, MpiRank, MpiWorld, Placement, message_bytes};
pub use solo::Solo;
pub use threads::{ThreadGroup, ThreadRank};

use crate::Result;
use crate::backend::Backend;

/// A group of processes that train one model.
///
/// # Errors
/// Each operation fails with [`ErrorKind::Distributed`](crate::ErrorKind) if another rank has ended, does not
/// call the operation before the timeout, or calls another operation. Errors of the backend are returned too.
pub trait Collective<B: Backend>: Send + Sync {
    /// Rank of this process, from 0.
    fn rank(&self) -> usize;
    /// Number of processes, `W`.
    fn size(&self) -> usize;
    /// Sets the number of the training step, from 1, that errors of later operations name.
    fn begin_step(&self, _step: u64) {}

    /// The rows of all ranks, in the order of ranks: `[counts[rank], d]` → `[Σ counts, d]`. `counts` has
    /// the number of rows of each rank; some may be 0.
    fn all_gather_rows(&self, x: B::Tensor, counts: &[usize]) -> Result<B::Tensor>;
    /// The sum over ranks of this rank's rows: `[Σ counts, d]` → `[counts[rank], d]`.
    fn reduce_scatter_rows(&self, x: B::Tensor, counts: &[usize]) -> Result<B::Tensor>;
    /// The sum over ranks, in place.
    fn all_reduce(&self, x: &mut B::Tensor) -> Result<()>;
    /// The values of the rank `root`, in place.
    fn broadcast(&self, x: &mut B::Tensor, root: usize) -> Result<()>;

    /// Creates a sum over ranks of the gradients in `bucket`. The caller adds the parts of the bucket when they
    /// are ready and starts the communication when all have been added; it overlaps with the backward pass.
    fn gradient_sum(&self, bucket: &Bucket) -> Result<Box<dyn GradientSum<B>>>;
    /// Replaces the elements of each part by those of the rank that owns them. `parts` are all parts of
    /// `bucket`.
    fn all_gather_weights(&self, bucket: &Bucket, parts: &mut [FlatPart<'_, B>]) -> Result<()>;

    /// The sums over ranks of numbers on the host, in place and with the same bits on every rank.
    fn all_reduce_scalars(&self, values: &mut [f64]) -> Result<()>;
    /// The lists of all ranks, in the order of ranks, on the host; they may differ in length.
    ///
    /// As it is provided, every word is sent as two numbers below 2³², which a sum with zeros keeps.
    fn all_gather_words(&self, own: &[u64]) -> Result<Vec<Vec<u64>>> {
        let mut lengths = vec![0.0; self.size()];
        lengths[self.rank()] = own.len() as f64;
        self.all_reduce_scalars(&mut lengths)?;
        let mut halves = vec![0.0; 2 * lengths.iter().sum::<f64>() as usize];
        let first = 2 * lengths[..self.rank()].iter().sum::<f64>() as usize;
        for (to, word) in halves[first..].chunks_exact_mut(2).zip(own) {
            to.copy_from_slice(&[(word >> 32) as f64, (word & 0xFFFF_FFFF) as f64]);
        }
        self.all_reduce_scalars(&mut halves)?;
        let mut words = halves.chunks_exact(2).map(|pair| (pair[0] as u64) << 32 | pair[1] as u64);
        Ok(lengths.iter().map(|&length| words.by_ref().take(length as usize).collect()).collect())
    }
    /// Waits until every rank has called it with its `status`.
    ///
    /// # Errors
    /// The error of this rank; else, if another rank has one, an error with the number of that rank and
    /// its message. Either all ranks return an error or none does.
    fn agree(&self, status: Result<()>) -> Result<()>;
    /// Waits until every rank has called it.
    fn barrier(&self) -> Result<()>;
}

/// The share of a rank in a bucket is a multiple of this many elements.
const SHARE_ALIGNMENT: usize = 64;

/// A range of the flat index space of all trainable parameters, which is divided into one share for each rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bucket {
    /// Flat indices.
    pub range: Range<usize>,
    /// Number of ranks.
    pub ranks: usize,
}

impl Bucket {
    /// The flat indices of this bucket that a rank owns: equal numbers, but for the last ranks, which may own none.
    pub fn owned_by(&self, rank: usize) -> Range<usize> {
        let Range { start, end } = self.range;
        let share = (end - start).div_ceil(self.ranks).next_multiple_of(SHARE_ALIGNMENT);
        let first = |rank: usize| (start + rank * share).min(end);
        first(rank)..first(rank + 1)
    }
}

/// Consecutive elements of a tensor, in row-major order, and their position in the flat index space.
pub struct FlatPart<'t, B: Backend> {
    /// A weight or a gradient, f32.
    pub tensor: &'t mut B::Tensor,
    /// The range of its elements.
    pub elements: Range<usize>,
    /// Flat index of the first element.
    pub start: usize,
}

impl<B: Backend> FlatPart<'_, B> {
    /// The range of the part in a buffer of the bucket's elements.
    fn within(&self, bucket: &Bucket) -> Range<usize> {
        let start = self.start - bucket.range.start;
        start..start + self.elements.len()
    }

    /// The elements of the part that are in a range of flat indices: as elements of the tensor, and as flat
    /// indices.
    fn owned(&self, range: &Range<usize>) -> Option<(Range<usize>, Range<usize>)> {
        let first = self.start.max(range.start);
        let last = (self.start + self.elements.len()).min(range.end);
        let at = |flat: usize| self.elements.start + flat - self.start;
        (first < last).then(|| (at(first)..at(last), first..last))
    }
}

/// A sum of gradients over ranks, created by [`Collective::gradient_sum`].
pub trait GradientSum<B: Backend>: Send {
    /// Adds a part whose gradient is complete. The tensor must not be used again before
    /// [`finish`](GradientSum::finish).
    ///
    /// # Errors
    /// Errors of the backend.
    fn add(&mut self, part: FlatPart<'_, B>) -> Result<()>;
    /// Starts the communication; every part has been added.
    ///
    /// # Errors
    /// See [`Collective`].
    fn start(&mut self) -> Result<()>;
    /// Waits for the sum. `parts` are the same parts, in any order. The elements that this rank owns then contain
    /// the sum over ranks; the others are unspecified.
    ///
    /// # Errors
    /// See [`Collective`].
    fn finish(self: Box<Self>, parts: &mut [FlatPart<'_, B>]) -> Result<()>;
}
