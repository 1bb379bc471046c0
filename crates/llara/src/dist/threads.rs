//! A group whose ranks are threads of one process, each with its own model.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Bucket, Collective, FlatPart, GradientSum};
use crate::backend::{Backend, Shape};
use crate::{Error, ErrorKind, Result};

/// Creates the ranks of a group of threads. Sums are added in the order of ranks, so every rank gets the same
/// bits.
#[derive(Debug)]
pub struct ThreadGroup;

impl ThreadGroup {
    /// Creates `size` ranks, each to be moved to its thread. An operation fails if not all ranks have called it
    /// within `timeout`.
    pub fn ranks<B: Backend>(size: usize, backend: &B, timeout: Duration) -> Vec<ThreadRank<B>> {
        let exchange = Arc::new(Exchange {
            size,
            timeout,
            rounds: Mutex::new(Rounds { open: BTreeMap::new(), dropped: vec![false; size] }),
            changed: Condvar::new(),
        });
        let rank = |rank| ThreadRank {
            rank,
            backend: backend.clone(),
            exchange: Arc::clone(&exchange),
            calls: Arc::default(),
        };
        (0..size).map(rank).collect()
    }
}

/// One rank of a [`ThreadGroup`]. After it is dropped, operations that wait for it fail.
pub struct ThreadRank<B: Backend> {
    rank: usize,
    backend: B,
    exchange: Arc<Exchange>,
    /// Number of operations so far; the same on every rank if all ranks call the same operations.
    calls: Arc<AtomicU64>,
}

/// The data that a rank contributes to an operation.
type Message = Arc<dyn Any + Send + Sync>;

struct Exchange {
    size: usize,
    timeout: Duration,
    rounds: Mutex<Rounds>,
    changed: Condvar,
}

struct Rounds {
    /// Operations that not every rank has finished, by number.
    open: BTreeMap<u64, Round>,
    /// Ranks that were dropped.
    dropped: Vec<bool>,
}

struct Round {
    operation: &'static str,
    messages: Vec<Option<Message>>,
    finished: usize,
}

impl Exchange {
    fn lock(&self) -> MutexGuard<'_, Rounds> {
        // A panic of another rank cannot leave the rounds inconsistent: each change is one assignment.
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(
        &self,
        number: u64,
        operation: &'static str,
        rank: usize,
        message: Message,
    ) -> Result<()> {
        let mut rounds = self.lock();
        let round = rounds.open.entry(number).or_insert_with(|| Round {
            operation,
            messages: vec![None; self.size],
            finished: 0,
        });
        if round.operation != operation {
            let error = Error::new(ErrorKind::Distributed, "the ranks call different operations")
                .expected(format!("{} on every rank", round.operation))
                .got(format!("{operation} on rank {rank}"));
            return Err(error);
        }
        round.messages[rank] = Some(message);
        self.changed.notify_all();
        Ok(())
    }

    /// Waits for the messages of all ranks, in the order of ranks.
    fn collect(&self, number: u64) -> Result<Vec<Message>> {
        let deadline = Instant::now() + self.timeout;
        let mut rounds = self.lock();
        loop {
            let dropped = rounds.dropped.clone();
            let Some(round) = rounds.open.get_mut(&number) else {
                return Err(Error::new(ErrorKind::Distributed, "an operation was not started"));
            };
            if round.messages.iter().all(Option::is_some) {
                let messages = round.messages.iter().flatten().cloned().collect();
                round.finished += 1;
                if round.finished == self.size {
                    rounds.open.remove(&number);
                }
                return Ok(messages);
            }
            let missing = |rank: &usize| round.messages[*rank].is_none();
            let left = deadline.saturating_duration_since(Instant::now());
            let ended = (0..self.size).filter(missing).find(|&rank| dropped[rank]);
            if ended.is_some() || left.is_zero() {
                let what = format!("{} did not complete", round.operation);
                let got = match ended {
                    Some(rank) => format!("rank {rank} has ended"),
                    None => {
                        let ranks: Vec<_> =
                            (0..self.size).filter(missing).map(|rank| rank.to_string()).collect();
                        let seconds = self.timeout.as_secs_f64();
                        format!("no call from rank {} in {seconds} s", ranks.join(", "))
                    }
                };
                return Err(Error::new(ErrorKind::Distributed, what)
                    .expected(format!("a call from each of {} ranks", self.size))
                    .got(got));
            }
            rounds =
                self.changed.wait_timeout(rounds, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<B: Backend> ThreadRank<B> {
    fn post<T: Any + Send + Sync>(&self, operation: &'static str, message: T) -> Result<u64> {
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        self.exchange.post(number, operation, self.rank, Arc::new(message))?;
        Ok(number)
    }

    /// The contributions of all ranks to an operation, in the order of ranks.
    fn exchange<T: Any + Send + Sync>(
        &self,
        operation: &'static str,
        message: T,
    ) -> Result<Vec<Arc<T>>> {
        messages(&self.exchange, self.post(operation, message)?)
    }

    /// The sum over ranks of numbers on the host.
    fn sum(&self, operation: &'static str, values: Vec<f32>) -> Result<Vec<f32>> {
        added(&self.exchange(operation, values)?)
    }
}

fn messages<T: Any + Send + Sync>(exchange: &Exchange, number: u64) -> Result<Vec<Arc<T>>> {
    let typed = |message: Message| {
        message.downcast().map_err(|_| {
            Error::new(ErrorKind::Distributed, "the ranks call an operation with different types")
        })
    };
    exchange.collect(number)?.into_iter().map(typed).collect()
}

/// The elementwise sum, in the order of the lists.
fn added(lists: &[Arc<Vec<f32>>]) -> Result<Vec<f32>> {
    let mut sum = vec![0.0; lists.first().map_or(0, |list| list.len())];
    for list in lists {
        if list.len() != sum.len() {
            return Err(Error::new(
                ErrorKind::Distributed,
                "the ranks sum different numbers of values",
            )
            .expected(sum.len())
            .got(list.len()));
        }
        sum.iter_mut().zip(list.iter()).for_each(|(sum, x)| *sum += x);
    }
    Ok(sum)
}

impl<B: Backend> Collective<B> for ThreadRank<B> {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.exchange.size
    }

    fn all_gather_rows(&self, x: B::Tensor, counts: &[usize]) -> Result<B::Tensor> {
        assert_eq!((x.rows(), counts.len()), (counts[self.rank], self.exchange.size), "rows");
        let parts = self.exchange("all_gather_rows", self.backend.download(&x)?)?;
        let all: Vec<f32> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        self.backend.upload(&all, counts.iter().sum(), x.cols())
    }

    fn reduce_scatter_rows(&self, x: B::Tensor, counts: &[usize]) -> Result<B::Tensor> {
        assert_eq!(x.rows(), counts.iter().sum::<usize>(), "reduce_scatter_rows: rows");
        let sum = self.sum("reduce_scatter_rows", self.backend.download(&x)?)?;
        let start = counts[..self.rank].iter().sum::<usize>() * x.cols();
        let rows = counts[self.rank];
        self.backend.upload(&sum[start..start + rows * x.cols()], rows, x.cols())
    }

    fn all_reduce(&self, x: &mut B::Tensor) -> Result<()> {
        let sum = self.sum("all_reduce", self.backend.download(x)?)?;
        self.backend.write_elements(x, 0, &sum)
    }

    fn broadcast(&self, x: &mut B::Tensor, root: usize) -> Result<()> {
        let own = if self.rank == root { self.backend.download(x)? } else { Vec::new() };
        let all = self.exchange("broadcast", own)?;
        self.backend.write_elements(x, 0, &all[root])
    }

    fn gradient_sum(&self, bucket: &Bucket) -> Result<Box<dyn GradientSum<B>>> {
        Ok(Box::new(ThreadSum {
            rank: self.rank,
            backend: self.backend.clone(),
            exchange: Arc::clone(&self.exchange),
            calls: Arc::clone(&self.calls),
            bucket: bucket.clone(),
            values: vec![0.0; bucket.range.len()],
            added: 0,
            number: None,
        }))
    }

    fn all_gather_weights(&self, bucket: &Bucket, parts: &mut [FlatPart<'_, B>]) -> Result<()> {
        let mut values = vec![0.0; bucket.range.len()];
        for part in &*parts {
            let data = self.backend.read_elements(part.tensor, part.elements.clone())?;
            values[part.within(bucket)].copy_from_slice(&data);
        }
        let own = bucket.owned_by(self.rank);
        let (start, end) = (own.start - bucket.range.start, own.end - bucket.range.start);
        let all = self.exchange("all_gather_weights", values[start..end].to_vec())?;
        let whole: Vec<f32> = all.iter().flat_map(|part| part.iter().copied()).collect();
        assert_eq!(whole.len(), bucket.range.len(), "all_gather_weights: bucket");
        for part in parts {
            let within = part.within(bucket);
            self.backend.write_elements(part.tensor, part.elements.start, &whole[within])?;
        }
        Ok(())
    }

    fn all_reduce_scalars(&self, values: &mut [f64]) -> Result<()> {
        let all = self.exchange("all_reduce_scalars", values.to_vec())?;
        for (at, value) in values.iter_mut().enumerate() {
            *value = all.iter().map(|of_rank| of_rank.get(at).copied().unwrap_or(f64::NAN)).sum();
        }
        Ok(())
    }

    fn agree(&self, status: Result<()>) -> Result<()> {
        let own = status.as_ref().err().map(|error| (error.kind(), error.to_string()));
        let all = self.exchange("agree", own)?;
        status?;
        match all
            .iter()
            .enumerate()
            .find_map(|(rank, status)| Some((rank, status.as_ref().clone()?)))
        {
            None => Ok(()),
            Some((rank, (kind, what))) => {
                Err(Error::new(kind, format!("rank {rank} failed: {what}")))
            }
        }
    }

    fn barrier(&self) -> Result<()> {
        self.exchange("barrier", ()).map(drop)
    }
}

impl<B: Backend> Drop for ThreadRank<B> {
    fn drop(&mut self) {
        self.exchange.lock().dropped[self.rank] = true;
        self.exchange.changed.notify_all();
    }
}

struct ThreadSum<B: Backend> {
    rank: usize,
    backend: B,
    exchange: Arc<Exchange>,
    calls: Arc<AtomicU64>,
    bucket: Bucket,
    values: Vec<f32>,
    added: usize,
    /// Number of the operation, after the start.
    number: Option<u64>,
}

impl<B: Backend> GradientSum<B> for ThreadSum<B> {
    fn add(&mut self, part: FlatPart<'_, B>) -> Result<()> {
        let data = self.backend.read_elements(part.tensor, part.elements.clone())?;
        self.values[part.within(&self.bucket)].copy_from_slice(&data);
        self.added += data.len();
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        assert_eq!(self.added, self.bucket.range.len(), "every part is added before the start");
        let number = self.calls.fetch_add(1, Ordering::SeqCst);
        let values = Arc::new(std::mem::take(&mut self.values));
        self.exchange.post(number, "gradient_sum", self.rank, values)?;
        self.number = Some(number);
        Ok(())
    }

    fn finish(self: Box<Self>, parts: &mut [FlatPart<'_, B>]) -> Result<()> {
        let Some(number) = self.number else {
            return Err(Error::new(ErrorKind::Distributed, "a sum of gradients was not started"));
        };
        let sum = added(&messages(&self.exchange, number)?)?;
        let own = self.bucket.owned_by(self.rank);
        for part in parts {
            if let Some((elements, flat)) = part.owned(&own) {
                let base = self.bucket.range.start;
                let within = flat.start - base..flat.end - base;
                self.backend.write_elements(part.tensor, elements.start, &sum[within])?;
            }
        }
        Ok(())
    }
}
