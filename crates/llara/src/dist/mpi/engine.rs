//! The thread that makes all calls of MPI: it exchanges the messages of operations while the caller computes.
//!
//! Every operation is one exchange: each rank sends some bytes to each other rank, over nonblocking messages that
//! are polled. Hence an operation can have a timeout that names the ranks whose messages are missing, several can
//! be in progress at a time, and sums are added in the order of ranks, whatever the order of arrival.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use super::exchange::{Active, Exchange, FAILURE_TAG, Received, not_completed, ranks, step_name};
use super::library::{Communicator, Request};
use super::message::{Header, Operation};
use crate::{Error, ErrorKind, Result};

/// Polls without a pause, before the thread sleeps between two of them.
const BUSY_POLLS: u32 = 100;
/// Time between two polls.
const PAUSE: Duration = Duration::from_micros(100);
/// Time between two polls while there is no operation, for notices of other ranks.
const IDLE_PAUSE: Duration = Duration::from_millis(100);

pub(super) enum Command {
    Exchange(Exchange, Sender<Received>),
    /// Tells all other ranks that this one has failed, why, and in which step.
    Fail(String, u64),
    /// Asks what the operation that has been in progress for the longest time waits for, or why all have failed.
    Describe(Sender<Option<String>>),
    /// Shuts MPI down and ends the thread.
    Finish(Sender<Result<()>>),
    /// Ends all processes with this exit code.
    Abort(u8),
}

/// Why no operation can be completed any more.
struct Failure {
    expected: String,
    got: String,
    hint: Option<String>,
}

pub(super) struct Engine {
    communicator: Communicator,
    commands: Receiver<Command>,
    timeout: Duration,
    /// Bytes of all messages sent.
    sent: Arc<AtomicU64>,
    /// In the order in which they were started.
    active: Vec<Active>,
    /// Number of the next operation.
    number: u64,
    /// Receives the notice of another rank.
    notice: Option<Request>,
    /// Notices to other ranks that are being sent.
    notices: Vec<Request>,
    failure: Option<Failure>,
}

impl Engine {
    /// # Errors
    /// If MPI reports one.
    pub(super) fn new(
        communicator: Communicator,
        commands: Receiver<Command>,
        timeout: Duration,
        sent: Arc<AtomicU64>,
    ) -> Result<Self> {
        let notice = Some(communicator.receive(Header::BYTES, None, FAILURE_TAG)?);
        Ok(Engine {
            communicator,
            commands,
            timeout,
            sent,
            active: Vec::new(),
            number: 0,
            notice,
            notices: Vec::new(),
            failure: None,
        })
    }

    /// Runs until it is told to finish, or the other side of the channel is gone.
    pub(super) fn run(mut self) {
        let mut idle = 0;
        loop {
            match self.next_command(idle) {
                Ok(Some(Command::Exchange(exchange, reply))) => {
                    self.start(exchange, reply);
                    idle = 0;
                }
                Ok(Some(Command::Fail(why, step))) => self.send_notices(&why, step),
                Ok(Some(Command::Describe(reply))) => drop(reply.send(self.describe())),
                Ok(Some(Command::Abort(code))) => self.communicator.abort(code),
                Ok(Some(Command::Finish(reply))) => {
                    let _ = reply.send(self.finish());
                    return;
                }
                Ok(None) => {}
                Err(()) => return,
            }
            idle = if self.progress() { 0 } else { idle.saturating_add(1) };
        }
    }

    /// The next command, if there is one. Waits for it for a time if there is nothing else to do.
    fn next_command(&self, idle: u32) -> Result<Option<Command>, ()> {
        if self.active.is_empty() && self.notices.is_empty() {
            return match self.commands.recv_timeout(IDLE_PAUSE) {
                Ok(command) => Ok(Some(command)),
                Err(RecvTimeoutError::Timeout) => Ok(None),
                Err(RecvTimeoutError::Disconnected) => Err(()),
            };
        }
        if idle < BUSY_POLLS {
            std::thread::yield_now();
            return match self.commands.try_recv() {
                Ok(command) => Ok(Some(command)),
                Err(TryRecvError::Empty) => Ok(None),
                Err(TryRecvError::Disconnected) => Err(()),
            };
        }
        match self.commands.recv_timeout(PAUSE) {
            Ok(command) => Ok(Some(command)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(()),
        }
    }

    fn start(&mut self, exchange: Exchange, reply: Sender<Received>) {
        let number = self.number;
        self.number += 1;
        if let Some(failure) = &self.failure {
            let error = failure.error(exchange.operation, exchange.step, &self.communicator);
            // Nobody waits for it any more if this fails.
            let _ = reply.send(Err(error));
            return;
        }
        let started = Active::start(exchange, number, &self.communicator, self.timeout, &self.sent);
        match started {
            Ok(mut active) => {
                active.reply = Some(reply);
                self.active.push(active);
            }
            Err(error) => {
                self.fail(&error);
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Polls everything; returns whether anything has changed.
    fn progress(&mut self) -> bool {
        let mut changed = false;
        if let Err(error) = self.read_notice() {
            self.fail(&error);
        }
        let mut failed = None;
        for active in &mut self.active {
            match active.progress(&self.communicator) {
                Ok(progressed) => changed |= progressed,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = failed {
            self.fail(&error);
        }
        self.active.retain(|active| !active.is_complete());
        let communicator = &self.communicator;
        self.notices.retain_mut(|notice| matches!(communicator.test(notice), Ok(false)));
        changed
    }

    /// Whether another rank has sent a notice of its failure.
    fn read_notice(&mut self) -> Result<()> {
        // Taken first, so that an error is reported once.
        let Some(mut notice) = self.notice.take() else { return Ok(()) };
        if !self.communicator.test(&mut notice)? {
            self.notice = Some(notice);
            return Ok(());
        }
        let message = notice.into_received();
        let (header, text) = Header::parse(&message)?;
        let why = String::from_utf8_lossy(text.unwrap_or_default()).into_owned();
        let Header { rank, step, .. } = header;
        self.end(Failure {
            expected: "no failure of another rank".into(),
            got: format!("rank {rank} failed in {}: {why}", step_name(step)),
            hint: None,
        });
        Ok(())
    }

    /// Ends all operations because of an error of this rank, and tells the others.
    fn fail(&mut self, error: &Error) {
        let parts = error.parts();
        let why = match parts.got {
            Some(got) => format!("{}: {got}", parts.what),
            None => parts.what.clone(),
        };
        self.send_notices(&why, self.active.first().map_or(0, |active| active.step));
        self.end(Failure {
            expected: parts.expected.unwrap_or("no failure").to_owned(),
            got: parts.got.map_or(parts.what.clone(), str::to_owned),
            hint: parts.hint.map(str::to_owned),
        });
    }

    fn end(&mut self, failure: Failure) {
        for active in self.active.drain(..) {
            if let Some(reply) = active.reply {
                let error = failure.error(active.operation, active.step, &self.communicator);
                let _ = reply.send(Err(error));
            }
        }
        self.failure.get_or_insert(failure);
    }

    fn send_notices(&mut self, why: &str, step: u64) {
        let mut end = why.len().min(Header::INLINE);
        while !why.is_char_boundary(end) {
            end -= 1;
        }
        let (rank, size) = (self.communicator.rank(), self.communicator.size());
        let header = Header {
            rank: rank as u32,
            operation: Operation::Failure,
            number: self.number,
            step,
            length: end as u64,
        };
        let message = Arc::new(header.message(&why.as_bytes()[..end]));
        for to in (0..size).filter(|&to| to != rank) {
            let sent = self.communicator.send(&message, 0..message.len(), to, FAILURE_TAG);
            // A rank that cannot be told finds out by its timeout.
            self.notices.extend(sent.ok());
        }
    }

    /// `None`: there is no operation.
    fn describe(&self) -> Option<String> {
        match (self.active.first(), &self.failure) {
            (Some(active), _) => {
                let name = active.operation.name();
                let step = step_name(active.step);
                Some(format!("{name} of {step} waits for {}", ranks(&active.missing())))
            }
            (None, failure) => failure.as_ref().map(|failure| failure.got.clone()),
        }
    }

    fn finish(mut self) -> Result<()> {
        let deadline = Instant::now() + self.timeout;
        while !self.active.is_empty() && Instant::now() < deadline {
            self.progress();
            std::thread::yield_now();
        }
        if let Some(notice) = self.notice.take() {
            self.communicator.cancel(notice)?;
        }
        self.communicator.finalize()
    }
}

impl Failure {
    fn error(&self, operation: Operation, step: u64, communicator: &Communicator) -> Error {
        let what = not_completed(operation, step, communicator.rank());
        let error =
            Error::new(ErrorKind::Distributed, what).expected(&self.expected).got(&self.got);
        match &self.hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}
