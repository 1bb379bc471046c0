//! The processes of a run: starting MPI, and operations on the host that need no device.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::engine::{Command, Engine};
use super::exchange::{Exchange, Incoming, Outcome, Part, Received, step_name};
use super::launch::Launch;
use super::library::Communicator;
use super::message::Operation;
use crate::{Error, ErrorKind, Result};

/// Whether MPI was started: a process can do so once.
static STARTED: AtomicBool = AtomicBool::new(false);

/// Whether the initialization of MPI has not returned in time.
static INITIALIZING: AtomicBool = AtomicBool::new(false);

/// The longest time that a process waits for its last messages to be sent before it ends all processes, so that
/// the others can print why they fail.
const GRACE: Duration = Duration::from_secs(2);

/// All processes that a launcher started together, connected over MPI.
///
/// The methods are those of [`Collective`](crate::dist::Collective) that need no device;
/// [`MpiRank`](super::MpiRank) has all. Every rank calls the same operations in the same order.
pub struct MpiWorld {
    rank: usize,
    size: usize,
    timeout: Duration,
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Number of the training step.
    step: AtomicU64,
    /// Bytes of all messages sent.
    sent: Arc<AtomicU64>,
    /// Whether an operation has failed, after which no other can succeed.
    has_failed: AtomicBool,
    /// Whether all ranks have agreed on an error.
    agreed_on_error: AtomicBool,
    /// Whether it is printed by another rank.
    reported_elsewhere: AtomicBool,
}

/// An operation that was started.
pub(super) struct Pending {
    reply: Receiver<Received>,
}

impl MpiWorld {
    /// Loads and initializes MPI. Every operation fails if it is not completed within `timeout`.
    ///
    /// # Errors
    /// If MPI cannot be loaded or initialized within the timeout, or its ranks are not those of `launch`.
    pub fn start(launch: &Launch, timeout: Duration) -> Result<Arc<Self>> {
        if STARTED.swap(true, Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Distributed, "MPI was already started"));
        }
        let (commands, receiver) = channel();
        let (started, starts) = channel();
        let sent = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&sent);
        let run = move || {
            let engine = Communicator::initialize().and_then(|communicator| {
                let place = (communicator.rank(), communicator.size());
                Ok((Engine::new(communicator, receiver, timeout, counter)?, place))
            });
            match engine {
                Ok((engine, place)) => {
                    if started.send(Ok(place)).is_ok() {
                        engine.run();
                    }
                }
                Err(error) => drop(started.send(Err(error))),
            }
        };
        let thread = std::thread::Builder::new().name("mpi".into()).spawn(run).map_err(|e| {
            Error::new(ErrorKind::Backend, "cannot start a thread for MPI").because(e)
        })?;
        let answer = starts.recv_timeout(timeout);
        INITIALIZING.store(answer.is_err(), Ordering::SeqCst);
        let (rank, size) = answer.map_err(|_| {
            Error::new(ErrorKind::Distributed, "MPI was not initialized in time")
                .expected(format!(
                    "all {} processes within {} s",
                    launch.size,
                    timeout.as_secs_f64()
                ))
                .hint("check that every host can reach the others; mpirun's own messages say more")
        })??;
        launch.check(rank, size)?;
        Ok(Arc::new(MpiWorld {
            rank,
            size,
            timeout,
            commands,
            thread: Mutex::new(Some(thread)),
            step: AtomicU64::new(0),
            sent,
            has_failed: AtomicBool::new(false),
            agreed_on_error: AtomicBool::new(false),
            reported_elsewhere: AtomicBool::new(false),
        }))
    }

    /// Whether [`start`](Self::start) has given up while MPI was still being initialized. Such a process must be ended
    /// without the exit handlers of MPI, which can wait for that.
    pub fn is_initializing() -> bool {
        INITIALIZING.load(Ordering::SeqCst)
    }

    /// Rank of this process, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of processes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Bytes of all messages that this rank has sent, headers included.
    pub fn bytes_sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Sets the number of the training step, from 1, that errors name.
    pub fn set_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// The operation that waits for another rank, its step and the ranks it waits for, in words.
    pub fn describe(&self) -> String {
        let (reply, answer) = channel();
        let asked = self.commands.send(Command::Describe(reply)).ok();
        let answer = asked.and_then(|()| answer.recv_timeout(Duration::from_millis(200)).ok()?);
        let step = self.step.load(Ordering::Relaxed);
        let none = || format!("in {}, no operation of the group is in progress", step_name(step));
        format!("rank {}: {}", self.rank, answer.unwrap_or_else(none))
    }

    /// Starts an operation.
    pub(super) fn start_exchange(
        &self,
        operation: Operation,
        outgoing: Vec<Part>,
        incoming: Incoming,
        outcome: Outcome,
    ) -> Result<Pending> {
        let step = self.step.load(Ordering::Relaxed);
        let exchange = Exchange { operation, step, outgoing, incoming, outcome };
        let (reply, receiver) = channel();
        self.commands
            .send(Command::Exchange(exchange, reply))
            .map_err(|_| self.thread_has_ended(operation.name()))?;
        Ok(Pending { reply: receiver })
    }

    /// Waits for the result of an operation. The thread of MPI watches the timeout.
    pub(super) fn finish_exchange(&self, pending: Pending, name: &str) -> Result<Vec<Box<[u8]>>> {
        let result = match pending.reply.recv() {
            Ok(result) => result,
            Err(_) => Err(self.thread_has_ended(name)),
        };
        if result.is_err() {
            self.has_failed.store(true, Ordering::SeqCst);
        }
        result
    }

    fn thread_has_ended(&self, name: &str) -> Error {
        self.has_failed.store(true, Ordering::SeqCst);
        Error::new(
            ErrorKind::Distributed,
            format!("rank {}: {name} was called after the thread of MPI ended", self.rank),
        )
    }

    /// The bytes of all ranks, in the order of ranks. `incoming`: how many each rank has.
    pub(super) fn gather(
        &self,
        operation: Operation,
        own: Vec<u8>,
        incoming: Incoming,
    ) -> Result<Vec<Box<[u8]>>> {
        let part = Part::whole(Arc::new(own));
        let outgoing = vec![part; self.size];
        let pending = self.start_exchange(operation, outgoing, incoming, Outcome::Gathered)?;
        self.finish_exchange(pending, operation.name())
    }

    /// The sums over ranks, in place and with the same bits on every rank.
    ///
    /// # Errors
    /// See [`Collective`](crate::dist::Collective).
    pub fn all_reduce_scalars(&self, values: &mut [f64]) -> Result<()> {
        let own: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let lengths = Incoming::Known(vec![own.len(); self.size]);
        let all = self.gather(Operation::AllReduceScalars, own, lengths)?;
        for (at, value) in values.iter_mut().enumerate() {
            let of_rank = |bytes: &[u8]| {
                let word = bytes.chunks_exact(8).nth(at).and_then(|word| word.try_into().ok());
                word.map_or(f64::NAN, f64::from_le_bytes)
            };
            *value = all.iter().map(|bytes| of_rank(bytes)).sum();
        }
        Ok(())
    }

    /// The lists of all ranks, in the order of ranks; they may differ in length.
    ///
    /// # Errors
    /// See [`Collective`](crate::dist::Collective).
    pub fn all_gather_words(&self, own: &[u64]) -> Result<Vec<Vec<u64>>> {
        let own = own.iter().flat_map(|word| word.to_le_bytes()).collect();
        let all = self.gather(Operation::AllGatherWords, own, Incoming::Unknown)?;
        let words = |bytes: &[u8]| {
            let words = bytes.chunks_exact(8).filter_map(|word| word.try_into().ok());
            words.map(u64::from_le_bytes).collect()
        };
        Ok(all.iter().map(|bytes| words(bytes)).collect())
    }

    /// The text of rank 0, on every rank: a choice that depends on the process and must be the same for all.
    ///
    /// # Errors
    /// See [`Collective`](crate::dist::Collective).
    pub fn choose(&self, own: &str) -> Result<String> {
        let all = self.gather(Operation::Choose, own.as_bytes().to_vec(), Incoming::Unknown)?;
        Ok(String::from_utf8_lossy(&all[0]).into_owned())
    }

    /// Waits until every rank has called it with its `status`.
    ///
    /// # Errors
    /// See [`Collective::agree`](crate::dist::Collective::agree).
    pub fn agree(&self, status: Result<()>) -> Result<()> {
        self.agreed_on_error.store(false, Ordering::SeqCst);
        self.reported_elsewhere.store(false, Ordering::SeqCst);
        let own = match &status {
            Ok(()) => Vec::new(),
            Err(error) => {
                let mut bytes = vec![code(error.kind())];
                bytes.extend(error.to_string().into_bytes());
                bytes
            }
        };
        let all = match self.gather(Operation::Agree, own, Incoming::Unknown) {
            Ok(all) => all,
            // The own error is the cause, or as good.
            Err(failure) => return status.and(Err(failure)),
        };
        let failed = all.iter().enumerate().find_map(|(rank, bytes)| {
            let (code, text) = bytes.split_first()?;
            Some((rank, kind(*code), String::from_utf8_lossy(text).into_owned()))
        });
        let first = failed.as_ref().map(|(rank, ..)| *rank);
        self.agreed_on_error.store(first.is_some(), Ordering::SeqCst);
        self.reported_elsewhere
            .store(first.is_some_and(|rank| rank != self.rank), Ordering::SeqCst);
        status?;
        match failed {
            None => Ok(()),
            Some((rank, kind, text)) => {
                Err(Error::new(kind, format!("rank {rank} failed: {text}")))
            }
        }
    }

    /// Waits until every rank has called it.
    ///
    /// # Errors
    /// See [`Collective`](crate::dist::Collective).
    pub fn barrier(&self) -> Result<()> {
        self.gather(Operation::Barrier, Vec::new(), Incoming::Unknown).map(drop)
    }

    /// Whether the last [`agree`](Self::agree) has returned an error of a rank on every rank: the group is then
    /// still in order, and can be ended by [`finish`](Self::finish).
    pub fn has_agreed_on_error(&self) -> bool {
        self.agreed_on_error.load(Ordering::SeqCst)
    }

    /// Whether another rank, which failed too, prints the error that [`agree`](Self::agree) has returned.
    pub fn is_reported_elsewhere(&self) -> bool {
        self.reported_elsewhere.load(Ordering::SeqCst)
    }

    /// Ends the group after all ranks have finished, or have agreed on an error.
    ///
    /// # Errors
    /// If not all ranks call it within the timeout.
    pub fn finish(&self) -> Result<()> {
        self.barrier()?;
        let (reply, answer) = channel();
        self.commands.send(Command::Finish(reply)).map_err(|_| self.thread_has_ended("finish"))?;
        let late = |_| {
            Error::new(ErrorKind::Distributed, format!("rank {}: MPI was not shut down", self.rank))
                .expected(format!("within {} s", self.timeout.as_secs_f64()))
        };
        answer.recv_timeout(self.timeout).map_err(late)??;
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic of the thread after its last message has no effect.
            let _ = thread.join();
        }
        Ok(())
    }

    /// Ends all processes because of an error that this process has alone: the others are told why, so that each
    /// can print it, and have a moment for that. Returns only if MPI cannot end the processes.
    pub fn abort(&self, why: &str, exit_code: u8) {
        let end = Instant::now() + GRACE;
        // After a failed operation the thread has sent the notice.
        if !self.has_failed.load(Ordering::SeqCst) {
            let step = self.step.load(Ordering::SeqCst);
            let _ = self.commands.send(Command::Fail(why.to_owned(), step));
        }
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
        if self.commands.send(Command::Abort(exit_code)).is_ok() {
            std::thread::sleep(GRACE);
        }
    }

    /// Whether an operation has failed, after which no other can succeed.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::SeqCst)
    }
}

/// Kinds of errors, by their code in messages.
const KINDS: [ErrorKind; 9] = [
    ErrorKind::Io,
    ErrorKind::Data,
    ErrorKind::Tokenizer,
    ErrorKind::Config,
    ErrorKind::Weights,
    ErrorKind::Argument,
    ErrorKind::Numeric,
    ErrorKind::Distributed,
    ErrorKind::Backend,
];

fn code(kind: ErrorKind) -> u8 {
    let at = KINDS.iter().position(|known| *known == kind);
    at.unwrap_or(KINDS.len() - 1) as u8
}

fn kind(code: u8) -> ErrorKind {
    KINDS.get(usize::from(code)).copied().unwrap_or(ErrorKind::Distributed)
}
