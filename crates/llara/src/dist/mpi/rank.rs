//! The operations of a group over MPI, on tensors of a device.

use std::sync::Arc;

use super::exchange::{Incoming, Outcome, Part};
use super::message::Operation;
use super::world::{MpiWorld, Pending};
use crate::backend::{Backend, Shape};
use crate::dist::{Bucket, Collective, FlatPart, GradientSum};
use crate::{Error, ErrorKind, Result};

/// Bytes of an f32.
const F32: usize = size_of::<f32>();

/// This process as a rank of its [`MpiWorld`], with the device of its tensors.
///
/// Sums are added in the order of ranks, so they have the same bits on every rank, and those of a
/// [`ThreadGroup`](crate::dist::ThreadGroup).
pub struct MpiRank<B: Backend> {
    world: Arc<MpiWorld>,
    backend: B,
}

impl<B: Backend> MpiRank<B> {
    /// The rank of this process, with tensors of `backend`.
    pub fn new(world: Arc<MpiWorld>, backend: B) -> Self {
        MpiRank { world, backend }
    }

    fn bytes(&self, x: &B::Tensor) -> Result<Vec<u8>> {
        Ok(to_bytes(&self.backend.download(x)?))
    }

    /// Bytes of the rows of each rank.
    fn lengths(&self, counts: &[usize], cols: usize) -> Vec<usize> {
        assert_eq!(counts.len(), self.world.size(), "counts of rows");
        counts.iter().map(|rows| rows * cols * F32).collect()
    }
}

impl<B: Backend> Collective<B> for MpiRank<B> {
    fn rank(&self) -> usize {
        self.world.rank()
    }

    fn size(&self) -> usize {
        self.world.size()
    }

    fn begin_step(&self, step: u64) {
        self.world.set_step(step);
    }

    fn all_gather_rows(&self, x: B::Tensor, counts: &[usize]) -> Result<B::Tensor> {
        assert_eq!(x.rows(), counts[self.world.rank()], "all_gather_rows: rows");
        let cols = x.cols();
        let lengths = Incoming::Known(self.lengths(counts, cols));
        let all = self.world.gather(Operation::AllGatherRows, self.bytes(&x)?, lengths)?;
        self.backend.upload(&values(&all), counts.iter().sum(), cols)
    }

    fn reduce_scatter_rows(&self, x: B::Tensor, counts: &[usize]) -> Result<B::Tensor> {
        assert_eq!(x.rows(), counts.iter().sum::<usize>(), "reduce_scatter_rows: rows");
        let (rank, cols) = (self.world.rank(), x.cols());
        let lengths = self.lengths(counts, cols);
        let data = Arc::new(self.bytes(&x)?);
        let mut start = 0;
        let parts = lengths.iter().map(|length| {
            let range = start..start + length;
            start = range.end;
            Part { data: Arc::clone(&data), range }
        });
        let operation = Operation::ReduceScatterRows;
        let incoming = Incoming::Known(vec![lengths[rank]; self.world.size()]);
        let pending =
            self.world.start_exchange(operation, parts.collect(), incoming, Outcome::Sum)?;
        let sum = self.world.finish_exchange(pending, operation.name())?;
        self.backend.upload(&values(&sum), counts[rank], cols)
    }

    /// Every rank sends all elements to every other one: for few elements.
    fn all_reduce(&self, x: &mut B::Tensor) -> Result<()> {
        let own = self.bytes(x)?;
        let operation = Operation::AllReduce;
        let incoming = Incoming::Known(vec![own.len(); self.world.size()]);
        let parts = vec![Part::whole(Arc::new(own)); self.world.size()];
        let pending = self.world.start_exchange(operation, parts, incoming, Outcome::Sum)?;
        let sum = self.world.finish_exchange(pending, operation.name())?;
        self.backend.write_elements(x, 0, &values(&sum))
    }

    fn broadcast(&self, x: &mut B::Tensor, root: usize) -> Result<()> {
        let (rank, size) = (self.world.rank(), self.world.size());
        let length = x.rows() * x.cols() * F32;
        let own = if rank == root { self.bytes(x)? } else { Vec::new() };
        let lengths = (0..size).map(|from| if from == root { length } else { 0 });
        let all =
            self.world.gather(Operation::Broadcast, own, Incoming::Known(lengths.collect()))?;
        self.backend.write_elements(x, 0, &values(&all[root..=root]))
    }

    fn gradient_sum(&self, bucket: &Bucket) -> Result<Box<dyn GradientSum<B>>> {
        Ok(Box::new(MpiSum {
            world: Arc::clone(&self.world),
            backend: self.backend.clone(),
            bucket: bucket.clone(),
            values: Vec::new(),
            added: 0,
            pending: None,
        }))
    }

    fn all_gather_weights(&self, bucket: &Bucket, parts: &mut [FlatPart<'_, B>]) -> Result<()> {
        let own = bucket.owned_by(self.world.rank());
        let mut data = vec![0; own.len() * F32];
        for part in &*parts {
            if let Some((elements, flat)) = part.owned(&own) {
                let values = self.backend.read_elements(part.tensor, elements)?;
                let start = (flat.start - own.start) * F32;
                data[start..start + values.len() * F32].copy_from_slice(&to_bytes(&values));
            }
        }
        let lengths = (0..self.world.size()).map(|rank| bucket.owned_by(rank).len() * F32);
        let lengths = Incoming::Known(lengths.collect());
        let all = self.world.gather(Operation::AllGatherWeights, data, lengths)?;
        let whole = values(&all);
        for part in parts {
            let within = part.within(bucket);
            self.backend.write_elements(part.tensor, part.elements.start, &whole[within])?;
        }
        Ok(())
    }

    fn all_reduce_scalars(&self, values: &mut [f64]) -> Result<()> {
        self.world.all_reduce_scalars(values)
    }

    fn all_gather_words(&self, own: &[u64]) -> Result<Vec<Vec<u64>>> {
        self.world.all_gather_words(own)
    }

    fn agree(&self, status: Result<()>) -> Result<()> {
        self.world.agree(status)
    }

    fn barrier(&self) -> Result<()> {
        self.world.barrier()
    }
}

/// A sum of gradients: every rank sends each other rank the elements that it owns.
struct MpiSum<B: Backend> {
    world: Arc<MpiWorld>,
    backend: B,
    bucket: Bucket,
    /// The gradients of the bucket as bytes, until the start.
    values: Vec<u8>,
    /// Number of elements that were added.
    added: usize,
    pending: Option<Pending>,
}

impl<B: Backend> GradientSum<B> for MpiSum<B> {
    fn add(&mut self, part: FlatPart<'_, B>) -> Result<()> {
        let data = self.backend.read_elements(part.tensor, part.elements.clone())?;
        self.values.resize(self.bucket.range.len() * F32, 0);
        let start = part.within(&self.bucket).start * F32;
        self.values[start..start + data.len() * F32].copy_from_slice(&to_bytes(&data));
        self.added += data.len();
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        assert_eq!(self.added, self.bucket.range.len(), "every part is added before the start");
        let data = Arc::new(std::mem::take(&mut self.values));
        let base = self.bucket.range.start;
        let parts = (0..self.world.size()).map(|rank| {
            let owned = self.bucket.owned_by(rank);
            let range = (owned.start - base) * F32..(owned.end - base) * F32;
            Part { data: Arc::clone(&data), range }
        });
        let own = self.bucket.owned_by(self.world.rank()).len() * F32;
        let incoming = Incoming::Known(vec![own; self.world.size()]);
        let operation = Operation::GradientSum;
        let pending =
            self.world.start_exchange(operation, parts.collect(), incoming, Outcome::Sum)?;
        self.pending = Some(pending);
        Ok(())
    }

    fn finish(self: Box<Self>, parts: &mut [FlatPart<'_, B>]) -> Result<()> {
        let Some(pending) = self.pending else {
            return Err(Error::new(ErrorKind::Distributed, "a sum of gradients was not started"));
        };
        let received = self.world.finish_exchange(pending, Operation::GradientSum.name())?;
        let sum = values(&received);
        let own = self.bucket.owned_by(self.world.rank());
        for part in parts {
            if let Some((elements, flat)) = part.owned(&own) {
                let within = flat.start - own.start..flat.end - own.start;
                self.backend.write_elements(part.tensor, elements.start, &sum[within])?;
            }
        }
        Ok(())
    }
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * F32];
    for (bytes, value) in bytes.as_chunks_mut().0.iter_mut().zip(values) {
        *bytes = value.to_le_bytes();
    }
    bytes
}

/// The values of lists of bytes, one after the other.
fn values(lists: &[Box<[u8]>]) -> Vec<f32> {
    let mut values = Vec::with_capacity(lists.iter().map(|list| list.len() / F32).sum());
    for list in lists {
        values.extend(list.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)));
    }
    values
}
