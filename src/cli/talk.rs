//! What the program says: data on standard output, talk on standard error. Neither may panic when
//! nobody listens any more.

use std::fmt;
use std::io::{self, Write};

/// One line on standard error.
macro_rules! say {
    ($($part:tt)*) => { $crate::cli::talk::line(format_args!($($part)*)) };
}
pub(super) use say;

/// One line on standard error; lost where that is closed.
pub(super) fn line(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
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

#[cfg(test)]
mod tests {
    use super::*;

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
