//! One operation as messages: each rank sends some bytes to each other rank, with a header.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::library::{Communicator, MAX_MESSAGE_BYTES, Request};
use super::message::{Header, Operation};
use crate::{Error, ErrorKind, Result};

/// The tag of notices of failure. Operations have two tags each, for header and data.
pub(super) const FAILURE_TAG: u16 = 0;
/// Operations with different tags; more are never in progress. Every MPI library has tags up to 32,767.
const TAGS: u64 = 16_000;
/// The most data of a message whose length its receiver does not know.
const MAX_UNKNOWN_BYTES: u64 = 1 << 32;

/// A range of bytes that is sent to a rank.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) data: Arc<Vec<u8>>,
    pub(super) range: Range<usize>,
}

impl Part {
    /// All of `data`.
    pub(super) fn whole(data: Arc<Vec<u8>>) -> Self {
        Part { range: 0..data.len(), data }
    }

    fn bytes(&self) -> &[u8] {
        &self.data[self.range.clone()]
    }
}

/// What the receiver of a message knows of it.
pub(super) enum Incoming {
    /// The number of bytes that each rank sends. `[W]` Messages without bytes are not sent.
    Known(Vec<usize>),
    /// Nothing. Also messages without bytes are sent.
    Unknown,
}

/// What becomes of the received bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Those of each rank, the own ones too. `[W]`
    Gathered,
    /// The sum of f32 values, in the order of ranks. `[1]`
    Sum,
}

/// An operation as one rank takes part in it.
pub(super) struct Exchange {
    pub(super) operation: Operation,
    /// Number of the training step.
    pub(super) step: u64,
    /// What each rank is sent, the own contribution included. `[W]`
    pub(super) outgoing: Vec<Part>,
    pub(super) incoming: Incoming,
    pub(super) outcome: Outcome,
}

/// The result of an exchange.
pub(super) type Received = Result<Vec<Box<[u8]>>>;

/// An operation in progress.
pub(super) struct Active {
    pub(super) operation: Operation,
    pub(super) step: u64,
    number: u64,
    timeout: Duration,
    deadline: Instant,
    outcome: Outcome,
    /// Messages to other ranks.
    sends: Vec<(usize, Request)>,
    /// What has arrived from each rank. `[W]`
    receives: Vec<Receive>,
    /// `None` after the result was sent; messages to other ranks may still be on their way.
    pub(super) reply: Option<Sender<Received>>,
}

/// A message from a rank.
enum Receive {
    /// The header is awaited; the length of the data is this, if it is known.
    Header(Request, Option<usize>),
    /// The data is awaited, in pieces.
    Data(Vec<Request>),
    Complete(Box<[u8]>),
}

impl Active {
    pub(super) fn start(
        exchange: Exchange,
        number: u64,
        communicator: &Communicator,
        timeout: Duration,
        sent: &AtomicU64,
    ) -> Result<Self> {
        let Exchange { operation, step, outgoing, incoming, outcome } = exchange;
        let (rank, size) = (communicator.rank(), communicator.size());
        let (header_tag, data_tag) = tags(number);
        let expected = |from: usize| match &incoming {
            Incoming::Known(lengths) => Some(lengths[from]),
            Incoming::Unknown => None,
        };
        let mut receives = Vec::with_capacity(size);
        for from in 0..size {
            receives.push(match expected(from) {
                _ if from == rank => Receive::Complete(outgoing[rank].bytes().into()),
                Some(0) => Receive::Complete(Box::default()),
                length => Receive::Header(
                    communicator.receive(Header::BYTES, Some(from), header_tag)?,
                    length,
                ),
            });
        }
        let is_known = matches!(incoming, Incoming::Known(_));
        let mut sends = Vec::new();
        // Each rank starts with the next one, so that not all send to the same rank at once.
        for to in (1..size).map(|distance| (rank + distance) % size) {
            let part = &outgoing[to];
            if is_known && part.range.is_empty() {
                continue;
            }
            let bytes = part.bytes();
            let length = bytes.len() as u64;
            let header = Header { rank: rank as u32, operation, number, step, length };
            let message = Arc::new(header.message(bytes));
            sends.push((to, communicator.send(&message, 0..message.len(), to, header_tag)?));
            sent.fetch_add(message.len() as u64, Ordering::Relaxed);
            if bytes.len() > Header::INLINE {
                for piece in pieces(part.range.clone()) {
                    sends.push((to, communicator.send(&part.data, piece, to, data_tag)?));
                }
                sent.fetch_add(length, Ordering::Relaxed);
            }
        }
        let deadline = Instant::now() + timeout;
        let reply = None;
        Ok(Active { operation, step, number, timeout, deadline, outcome, sends, receives, reply })
    }

    pub(super) fn is_complete(&self) -> bool {
        self.sends.is_empty() && self.reply.is_none()
    }

    /// Polls the messages, and sends the result when all have arrived; returns whether anything has changed.
    ///
    /// # Errors
    /// If MPI reports one, another rank calls another operation, or the timeout has passed.
    pub(super) fn progress(&mut self, communicator: &Communicator) -> Result<bool> {
        let mut changed = false;
        for from in 0..self.receives.len() {
            changed |= self.advance(from, communicator)?;
        }
        let before = self.sends.len();
        let mut failed = None;
        self.sends.retain_mut(|(_, request)| match communicator.test(request) {
            Ok(is_complete) => !is_complete,
            Err(error) => {
                failed = Some(error);
                false
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        changed |= self.sends.len() != before;
        let all = self.receives.iter().all(|receive| matches!(receive, Receive::Complete(_)));
        if let Some(reply) = self.reply.take_if(|_| all) {
            let received = self.receives.iter_mut().map(|receive| match receive {
                Receive::Complete(bytes) => std::mem::take(bytes),
                Receive::Header(..) | Receive::Data(_) => Box::default(),
            });
            let received: Vec<_> = received.collect();
            // The receiver is gone only if the program ends because of another error.
            let _ = reply.send(Ok(match self.outcome {
                Outcome::Gathered => received,
                Outcome::Sum => vec![sum(&received)],
            }));
            changed = true;
        }
        if !changed && !self.is_complete() && Instant::now() >= self.deadline {
            return Err(self.timed_out(communicator));
        }
        Ok(changed)
    }

    /// Polls the message of one rank.
    fn advance(&mut self, from: usize, communicator: &Communicator) -> Result<bool> {
        match &mut self.receives[from] {
            Receive::Complete(_) => Ok(false),
            Receive::Header(request, expected) => {
                if !communicator.test(request)? {
                    return Ok(false);
                }
                let expected = *expected;
                let done =
                    std::mem::replace(&mut self.receives[from], Receive::Complete(Box::default()));
                let Receive::Header(request, _) = done else { return Ok(false) };
                let message = request.into_received();
                let (header, inline) = Header::parse(&message)?;
                self.check(&header, from, expected, communicator)?;
                self.receives[from] = match inline {
                    Some(data) => Receive::Complete(data.into()),
                    None => {
                        let (_, data_tag) = tags(self.number);
                        let pieces = pieces(0..header.length as usize);
                        let receive = |piece: Range<usize>| {
                            communicator.receive(piece.len(), Some(from), data_tag)
                        };
                        Receive::Data(pieces.into_iter().map(receive).collect::<Result<_>>()?)
                    }
                };
                Ok(true)
            }
            Receive::Data(requests) => {
                for request in &mut *requests {
                    communicator.test(request)?;
                }
                if !requests.iter().all(Request::is_complete) {
                    return Ok(false);
                }
                let mut parts: Vec<_> =
                    std::mem::take(requests).into_iter().map(Request::into_received).collect();
                self.receives[from] = Receive::Complete(match parts.len() {
                    1 => parts.remove(0),
                    _ => parts.concat().into(),
                });
                Ok(true)
            }
        }
    }

    /// Checks that a message belongs to this operation.
    fn check(
        &self,
        header: &Header,
        from: usize,
        expected: Option<usize>,
        communicator: &Communicator,
    ) -> Result<()> {
        let rank = communicator.rank();
        if header.rank as usize != from {
            return Err(Error::new(ErrorKind::Distributed, "a message has the rank of another")
                .expected(from)
                .got(header.rank));
        }
        if (header.operation, header.number) != (self.operation, self.number) {
            let name =
                |operation: Operation, step| format!("{} of {}", operation.name(), step_name(step));
            return Err(Error::new(
                ErrorKind::Distributed,
                format!("rank {rank}: the ranks call different operations"),
            )
            .expected(format!("{} on every rank", name(self.operation, self.step)))
            .got(format!("{} on rank {from}", name(header.operation, header.step))));
        }
        let most = expected.map_or(MAX_UNKNOWN_BYTES, |length| length as u64);
        if header.length > most || expected.is_some_and(|length| header.length != length as u64) {
            return Err(Error::new(
                ErrorKind::Distributed,
                not_completed(self.operation, self.step, rank),
            )
            .expected(match expected {
                Some(length) => format!("{length} bytes from rank {from}"),
                None => format!("at most {most} bytes from rank {from}"),
            })
            .got(header.length)
            .hint("start every process with the same program, model, data and options"));
        }
        Ok(())
    }

    /// The ranks whose messages have not arrived, or else those that have not received one.
    pub(super) fn missing(&self) -> Vec<usize> {
        let is_missing = |&rank: &usize| !matches!(self.receives[rank], Receive::Complete(_));
        let mut missing: Vec<_> = (0..self.receives.len()).filter(is_missing).collect();
        if missing.is_empty() {
            missing.extend(self.sends.iter().map(|(to, _)| *to));
            missing.sort_unstable();
            missing.dedup();
        }
        missing
    }

    fn timed_out(&self, communicator: &Communicator) -> Error {
        let what = not_completed(self.operation, self.step, communicator.rank());
        let size = communicator.size();
        Error::new(ErrorKind::Distributed, what)
            .expected(format!("a call from each of {size} ranks"))
            .got(format!(
                "none from {} in {} s",
                ranks(&self.missing()),
                self.timeout.as_secs_f64()
            ))
            .hint(
                "see the messages of the ranks named; if they were only slow, increase \
                 --collective-timeout",
            )
    }
}

pub(super) fn not_completed(operation: Operation, step: u64, rank: usize) -> String {
    format!("rank {rank}: {} of {} did not complete", operation.name(), step_name(step))
}

pub(super) fn step_name(step: u64) -> String {
    match step {
        0 => "the preparation".to_owned(),
        step => format!("step {step}"),
    }
}

pub(super) fn ranks(ranks: &[usize]) -> String {
    let numbers: Vec<_> = ranks.iter().map(usize::to_string).collect();
    format!("rank {}", numbers.join(", "))
}

fn tags(number: u64) -> (u16, u16) {
    let header = 1 + 2 * (number % TAGS) as u16;
    (header, header + 1)
}

/// A range of bytes in ranges of at most the size of one message.
fn pieces(range: Range<usize>) -> Vec<Range<usize>> {
    let end = range.end;
    range.step_by(MAX_MESSAGE_BYTES).map(|at| at..end.min(at + MAX_MESSAGE_BYTES)).collect()
}

/// The sum of lists of f32 values, in the order of the lists.
fn sum(lists: &[Box<[u8]>]) -> Box<[u8]> {
    let length = lists.iter().map(|list| list.len()).max().unwrap_or_default();
    let mut sum = vec![0; length].into_boxed_slice();
    for list in lists {
        for (sum, value) in sum.as_chunks_mut().0.iter_mut().zip(list.as_chunks().0) {
            *sum = (f32::from_le_bytes(*sum) + f32::from_le_bytes(*value)).to_le_bytes();
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_added_in_the_order_of_the_lists() {
        let list = |x: f32| -> Box<[u8]> { Box::new(x.to_le_bytes()) };
        let lists = [1e8, 1.0, -1e8, 1.0].map(list);
        let expected = ((1e8f32 + 1.0) - 1e8) + 1.0;
        assert_eq!(*sum(&lists), expected.to_le_bytes());
        assert_eq!(sum(&[]).len(), 0);
    }

    #[test]
    fn large_messages_are_sent_in_pieces() {
        assert_eq!(pieces(3..10), vec![Range { start: 3, end: 10 }]);
        let end = 2 * MAX_MESSAGE_BYTES + 5;
        assert_eq!(
            pieces(4..end),
            [
                4..4 + MAX_MESSAGE_BYTES,
                4 + MAX_MESSAGE_BYTES..4 + 2 * MAX_MESSAGE_BYTES,
                4 + 2 * MAX_MESSAGE_BYTES..end
            ]
        );
    }

    #[test]
    fn operations_in_progress_have_different_tags() {
        let mut tags: Vec<u16> =
            (TAGS - 5..TAGS + 5).map(tags).flat_map(|(header, data)| [header, data]).collect();
        tags.sort_unstable();
        tags.dedup();
        assert_eq!(tags.len(), 20);
        assert!(!tags.contains(&FAILURE_TAG) && tags.iter().all(|tag| *tag < 32_767));
    }
}
