//! Collective communication between the processes of a training run.
//!
//! Every rank calls the same operations in the same order. One process is a group of size 1 and runs
//! the same code ([`Solo`]).

mod solo;

pub use solo::Solo;

use crate::Result;
use crate::backend::Backend;

/// A group of processes that train one model.
pub trait Collective<B: Backend>: Send + Sync {
    /// This process, from 0.
    fn rank(&self) -> usize;
    /// Number of processes, `W`.
    fn size(&self) -> usize;
    /// The rows of all ranks, in the order of ranks: `[n, d]` → `[W·n, d]`.
    fn all_gather(&self, x: B::Tensor) -> Result<B::Tensor>;
    /// The sum over ranks of this rank's share of rows: `[W·n, d]` → `[n, d]`.
    fn reduce_scatter(&self, x: B::Tensor) -> Result<B::Tensor>;
    /// The sum over ranks, in place.
    fn all_reduce(&self, x: &mut B::Tensor) -> Result<()>;
    /// Rank 0's values, in place.
    fn broadcast(&self, x: &mut B::Tensor) -> Result<()>;
    /// Waits until every rank has called it.
    fn barrier(&self) -> Result<()>;
}
