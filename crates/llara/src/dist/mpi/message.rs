//! The header of every message between ranks: which operation it belongs to, and how long its data is.

use crate::{Error, ErrorKind, Result};

/// Bytes that a message with so much data takes over MPI, its header included.
pub fn message_bytes(data: usize) -> usize {
    Header::BYTES + if data > Header::INLINE { data } else { 0 }
}

/// The operations of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    AllGatherRows,
    ReduceScatterRows,
    AllReduce,
    Broadcast,
    GradientSum,
    AllGatherWeights,
    AllReduceScalars,
    AllGatherWords,
    Choose,
    Agree,
    Barrier,
    /// The notice of a rank that it has failed.
    Failure,
}

impl Operation {
    const ALL: [Operation; 12] = [
        Operation::AllGatherRows,
        Operation::ReduceScatterRows,
        Operation::AllReduce,
        Operation::Broadcast,
        Operation::GradientSum,
        Operation::AllGatherWeights,
        Operation::AllReduceScalars,
        Operation::AllGatherWords,
        Operation::Choose,
        Operation::Agree,
        Operation::Barrier,
        Operation::Failure,
    ];

    /// The name of the method of [`Collective`](crate::dist::Collective).
    pub(super) fn name(self) -> &'static str {
        match self {
            Operation::AllGatherRows => "all_gather_rows",
            Operation::ReduceScatterRows => "reduce_scatter_rows",
            Operation::AllReduce => "all_reduce",
            Operation::Broadcast => "broadcast",
            Operation::GradientSum => "gradient_sum",
            Operation::AllGatherWeights => "all_gather_weights",
            Operation::AllReduceScalars => "all_reduce_scalars",
            Operation::AllGatherWords => "all_gather_words",
            Operation::Choose => "choose",
            Operation::Agree => "agree",
            Operation::Barrier => "barrier",
            Operation::Failure => "failure",
        }
    }
}

/// The first bytes of a header: a program of another version has others.
const MAGIC: [u8; 8] = *b"llara-1\n";

/// What a message is about. Data of at most [`Header::INLINE`] bytes is in the same message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// The rank that sent it.
    pub(super) rank: u32,
    pub(super) operation: Operation,
    /// Number of the operation, the same on every rank.
    pub(super) number: u64,
    /// Number of the training step; 0 before the first one.
    pub(super) step: u64,
    /// Bytes of data.
    pub(super) length: u64,
}

impl Header {
    /// Bytes of a message with a header.
    pub(super) const BYTES: usize = 512;
    /// Bytes of the header itself.
    const OWN: usize = 40;
    /// The most bytes of data that are in the same message.
    pub(super) const INLINE: usize = Self::BYTES - Self::OWN;

    /// The message: this header, the data if it is short, and zeros.
    pub(super) fn message(&self, data: &[u8]) -> Vec<u8> {
        let mut message = Vec::with_capacity(Self::BYTES);
        message.extend(MAGIC);
        message.extend(self.rank.to_le_bytes());
        let code = Operation::ALL.iter().position(|operation| *operation == self.operation);
        message.extend((code.unwrap_or_default() as u32).to_le_bytes());
        for number in [self.number, self.step, self.length] {
            message.extend(number.to_le_bytes());
        }
        if data.len() <= Self::INLINE {
            message.extend(data);
        }
        message.resize(Self::BYTES, 0);
        message
    }

    /// Parses a message; also returns its data, if the message has it.
    ///
    /// # Errors
    /// If it is not from this version of the program.
    pub(super) fn parse(message: &[u8]) -> Result<(Self, Option<&[u8]>)> {
        let foreign = || {
            Error::new(ErrorKind::Distributed, "a message of another program or version")
                .hint("start the same version of llara on every host")
        };
        if message.len() != Self::BYTES || message[..8] != MAGIC {
            return Err(foreign());
        }
        let number = |at: usize, bytes: usize| {
            message[at..at + bytes].iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte))
        };
        let operation = Operation::ALL.get(number(12, 4) as usize).ok_or_else(foreign)?;
        let header = Header {
            rank: number(8, 4) as u32,
            operation: *operation,
            number: number(16, 8),
            step: number(24, 8),
            length: number(32, 8),
        };
        let data = usize::try_from(header.length).ok().filter(|&length| length <= Self::INLINE);
        Ok((header, data.map(|length| &message[Self::OWN..Self::OWN + length])))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_parsed_as_they_were_written() {
        for operation in Operation::ALL {
            for length in [0, 1, Header::INLINE, Header::INLINE + 1, 1 << 20] {
                let data: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
                let header =
                    Header { rank: 7, operation, number: 1 << 40, step: 12, length: length as u64 };
                let message = header.message(&data);
                let (parsed, inline) = Header::parse(&message).unwrap();
                assert_eq!(parsed, header);
                assert_eq!(inline, (length <= Header::INLINE).then_some(&data[..]));
            }
        }
    }

    #[test]
    fn other_messages_are_refused() {
        let header = Header { rank: 0, operation: Operation::Agree, number: 0, step: 0, length: 0 };
        let message = header.message(&[]);
        for at in [0, 7, 13, 15] {
            let mut wrong = message.clone();
            wrong[at] = 0xEE;
            assert_eq!(Header::parse(&wrong).unwrap_err().kind(), ErrorKind::Distributed, "{at}");
        }
        assert!(Header::parse(&message[1..]).is_err() && Header::parse(&[]).is_err());
    }
}
