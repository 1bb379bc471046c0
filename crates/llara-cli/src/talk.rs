//! Printing results to standard output and messages to standard error, without a panic if the stream is
//! closed; and formatting of numbers.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use indicatif::{BinaryBytes, HumanCount};

/// Rank of this process.
static RANK: AtomicUsize = AtomicUsize::new(0);

/// Sets the rank of this process. Other processes than the first one print nothing but [`report`]s.
pub(super) fn set_rank(rank: usize) {
    RANK.store(rank, Ordering::Relaxed);
}

fn is_first() -> bool {
    RANK.load(Ordering::Relaxed) == 0
}

/// Prints a line to standard error on any process, with its rank unless it is the first.
pub(super) fn report(text: &str) {
    let line = match RANK.load(Ordering::Relaxed) {
        0 => text.to_owned(),
        rank => format!("rank {rank}: {text}"),
    };
    let _ = writeln!(io::stderr().lock(), "{}", llara::escape_controls(&line));
}

/// Prints a message to standard error.
macro_rules! say {
    ($($part:tt)*) => { $crate::talk::line(format_args!($($part)*)) };
}
pub(super) use say;

/// Prints a line to standard error with control characters escaped. Does nothing if it is closed, or if this is not
/// the first process.
pub(super) fn line(text: fmt::Arguments<'_>) {
    if is_first() {
        report(&text.to_string());
    }
}

/// Prints a line to standard output. A closed pipe is not an error: its reader needs no more data.
/// Does nothing if this is not the first process.
pub(super) fn print(text: impl fmt::Display) -> llara::Result<()> {
    if !is_first() {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(llara::Error::io("write", "standard output", e))
        }
        _ => Ok(()),
    }
}

/// A number with a separator of thousands: `1,234`.
pub(super) fn count(n: usize) -> String {
    HumanCount(n as u64).to_string()
}

/// A number and a noun with a regular plural.
pub(super) fn counted(n: usize, noun: &str) -> String {
    format!("{} {noun}{}", count(n), if n == 1 { "" } else { "s" })
}

/// An amount of memory in binary units: `1.50 GiB`.
pub(super) fn bytes(n: u64) -> String {
    BinaryBytes(n).to_string()
}

/// A number of floating-point operations.
pub(super) fn operations(n: u64) -> String {
    let units = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")];
    let unit = units.into_iter().find(|(unit, _)| n as f64 >= *unit);
    let (unit, prefix) = unit.unwrap_or((1.0, ""));
    format!("{:.2} {prefix}FLOP", n as f64 / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_two_decimals() {
        let texts = [0, 1023, 1 << 20, 12_900_000, 3 << 29, 700 << 30].map(bytes);
        assert_eq!(texts, ["0 B", "1023 B", "1.00 MiB", "12.30 MiB", "1.50 GiB", "700.00 GiB"]);
        assert_eq!(operations(2_345_600_000_000), "2.35 TFLOP");
    }

    #[test]
    fn thousands_are_separated() {
        let texts = [0, 999, 1000, 123_456, 1_234_567].map(count);
        assert_eq!(texts, ["0", "999", "1,000", "123,456", "1,234,567"]);
    }

    #[test]
    fn one_is_singular() {
        let texts = [0, 1, 2000].map(|n| counted(n, "text"));
        assert_eq!(texts, ["0 texts", "1 text", "2,000 texts"]);
    }
}
