//! What the program says: data on standard output, talk on standard error. Neither may panic when
//! nobody listens any more.

use std::fmt;
use std::io::{self, Write};

/// One line on standard error.
macro_rules! say {
    ($($part:tt)*) => { $crate::talk::line(format_args!($($part)*)) };
}
pub(super) use say;

/// One line on standard error, control characters escaped; lost where that is closed.
pub(super) fn line(text: fmt::Arguments<'_>) {
    let text = text.to_string();
    let _ = writeln!(io::stderr().lock(), "{}", llara::escape_controls(&text));
}

/// One line on standard output. A reader that has closed the pipe has what it wanted.
pub(super) fn print(text: impl fmt::Display) -> llara::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(llara::Error::io("write", "standard output", e))
        }
        _ => Ok(()),
    }
}

/// A count with its thousands apart.
pub(super) fn count(n: usize) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count of things that have a regular plural.
pub(super) fn counted(n: usize, thing: &str) -> String {
    format!("{} {thing}{}", count(n), if n == 1 { "" } else { "s" })
}

/// An amount of memory, to three digits.
pub(super) fn bytes(n: u64) -> String {
    let (unit, name) = match n {
        n if n >= 1 << 30 => (1u64 << 30, "GiB"),
        n if n >= 1 << 20 => (1 << 20, "MiB"),
        n if n >= 1 << 10 => (1 << 10, "KiB"),
        _ => return format!("{n} B"),
    };
    three_digits(n as f64 / unit as f64) + " " + name
}

/// A number of operations, to three digits.
pub(super) fn operations(n: u64) -> String {
    let units = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")];
    let unit = units.into_iter().find(|(unit, _)| n as f64 >= *unit);
    let (unit, prefix) = unit.unwrap_or((1.0, ""));
    format!("{} {prefix}FLOP", three_digits(n as f64 / unit))
}

fn three_digits(x: f64) -> String {
    let decimals = if x < 9.995 { 2 } else { usize::from(x < 99.95) };
    format!("{x:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_have_three_digits() {
        let texts = [0, 1023, 1 << 20, 12_900_000, 3 << 29, 700 << 30].map(bytes);
        assert_eq!(texts, ["0 B", "1023 B", "1.00 MiB", "12.3 MiB", "1.50 GiB", "700 GiB"]);
        assert_eq!(bytes((99.97 * f64::from(1 << 20)) as u64), "100 MiB");
        assert_eq!(operations(2_345_600_000_000), "2.35 TFLOP");
    }

    #[test]
    fn thousands_are_apart() {
        let texts = [0, 999, 1000, 123_456, 1_234_567].map(count);
        assert_eq!(texts, ["0", "999", "1,000", "123,456", "1,234,567"]);
    }

    #[test]
    fn one_is_singular() {
        let texts = [0, 1, 2000].map(|n| counted(n, "text"));
        assert_eq!(texts, ["0 texts", "1 text", "2,000 texts"]);
    }
}
