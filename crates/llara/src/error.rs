//! The library's error type: what failed, where, what was expected, what was found, and a hint.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::path::{Path, PathBuf};

/// `text` with control characters and bidirectional formatting characters replaced by escapes such as
/// `\u{1b}`, because text from files and servers must not control a terminal. Line feeds and tabs are kept.
pub fn escape_controls(text: &str) -> Cow<'_, str> {
    let needs_escape = |c: char| {
        c.is_control() && c != '\n' && c != '\t'
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(needs_escape) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if needs_escape(c) {
            escaped.extend(c.escape_unicode());
        } else {
            escaped.push(c);
        }
    }
    Cow::Owned(escaped)
}

/// The result of every fallible function of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The category of an error. Stable, for programs that react to errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Reading or writing a file failed.
    Io,
    /// A training row, corpus line or judgment is malformed.
    Data,
    /// `tokenizer.json` is missing, unreadable or lacks tokens that the template needs.
    Tokenizer,
    /// `config.json`, a run file or a template is invalid or asks for something unsupported.
    Config,
    /// Weight files are missing, damaged or do not fit the configuration.
    Weights,
    /// An option or an argument of a library call is invalid.
    Argument,
    /// A number that must be finite is not.
    Numeric,
    /// The processes of a group disagree, or there is no process group.
    Distributed,
    /// A failure of the device or of the system: out of memory, out of threads, an unsupported operation.
    Backend,
}

/// The file, line or tensor that an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Location {
    File(PathBuf),
    Line(PathBuf, u64),
    Tensor(PathBuf, String),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::File(path) => write!(f, "{}", path.display()),
            Location::Line(path, line) => write!(f, "{}:{line}", path.display()),
            Location::Tensor(path, tensor) => write!(f, "{}: tensor `{tensor}`", path.display()),
        }
    }
}

/// An error of llara. It is built in one expression:
///
/// ```
/// use llara::{Error, ErrorKind};
/// let e = Error::new(ErrorKind::Data, "`neg` is empty")
///     .line("train.jsonl", 17)
///     .expected("at least one hard negative")
///     .got("[]")
///     .hint("mine negatives first, or remove the row");
/// assert!(e.to_string().starts_with("train.jsonl:17: `neg` is empty"));
/// ```
#[derive(Debug, thiserror::Error)]
pub struct Error(Box<Report>);

/// Boxed so that `Result<T>` is at most one word larger than `T`.
#[derive(Debug)]
struct Report {
    kind: ErrorKind,
    what: String,
    location: Option<Location>,
    expected: Option<String>,
    got: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// The parts of an [`Error`]'s message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorParts<'e> {
    /// What failed, with the message of the source, if there is one.
    pub what: String,
    /// `file`, `file:line` or ``file: tensor `name` ``.
    pub location: Option<String>,
    /// The valid values.
    pub expected: Option<&'e str>,
    /// The value that was found.
    pub got: Option<&'e str>,
    /// How to fix the problem.
    pub hint: Option<&'e str>,
}

impl Error {
    /// An error of `kind`. `what` is one line without a full stop.
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Error(Box::new(Report {
            kind,
            what: what.into(),
            location: None,
            expected: None,
            got: None,
            hint: None,
            source: None,
        }))
    }

    /// A failed read or write of `path`: "cannot `action`". Adds a hint for causes that a user can fix.
    pub fn io(action: &str, path: impl AsRef<Path>, source: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let hint = match source.kind() {
            Io::NotFound => Some("check the path"),
            Io::PermissionDenied => Some("check the permissions of the file and its folder"),
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => {
                Some("free some space or choose another folder")
            }
            _ => None,
        };
        let error = Error::new(ErrorKind::Io, format!("cannot {action}: {source}")).file(path);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    /// Names the file.
    pub fn file(mut self, path: impl AsRef<Path>) -> Self {
        self.0.location = Some(Location::File(path.as_ref().to_owned()));
        self
    }

    /// Names the file and the line, counted from 1.
    pub fn line(mut self, path: impl AsRef<Path>, line: u64) -> Self {
        self.0.location = Some(Location::Line(path.as_ref().to_owned(), line));
        self
    }

    /// Names the file and the tensor in it.
    pub fn tensor(mut self, path: impl AsRef<Path>, tensor: impl Into<String>) -> Self {
        self.0.location = Some(Location::Tensor(path.as_ref().to_owned(), tensor.into()));
        self
    }

    /// States the valid values.
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.0.expected = Some(expected.to_string());
        self
    }

    /// States the value that was found.
    pub fn got(mut self, got: impl fmt::Display) -> Self {
        self.0.got = Some(got.to_string());
        self
    }

    /// States how to fix the problem.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Adds an error of another crate as the source.
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// The kind, for programs that react to it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The parts of the message, for a report that shows them apart. They are not escaped.
    pub fn parts(&self) -> ErrorParts<'_> {
        let report = &*self.0;
        let what = match &report.source {
            Some(source) => format!("{}: {source}", report.what),
            None => report.what.clone(),
        };
        ErrorParts {
            what,
            location: report.location.as_ref().map(Location::to_string),
            expected: report.expected.as_deref(),
            got: report.got.as_deref(),
            hint: report.hint.as_deref(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let report = &self.0;
        let f = &mut Escaped(f);
        if let Some(location) = &report.location {
            write!(f, "{location}: ")?;
        }
        write!(f, "{}", report.what)?;
        if let Some(source) = &report.source {
            write!(f, ": {source}")?;
        }
        for (label, text) in
            [("expected", &report.expected), ("got", &report.got), ("hint", &report.hint)]
        {
            if let Some(text) = text {
                write!(f, "\n  {label}: {text}")?;
            }
        }
        Ok(())
    }
}

/// Escapes control characters in everything that is written through it.
struct Escaped<W>(W);

impl<W: Write> Write for Escaped<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write_str(&escape_controls(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_everywhere() {
        let bad = "a\u{1b}[31m\u{202e}\r\u{9b}b";
        let text = Error::new(ErrorKind::Data, bad)
            .tensor(bad, bad)
            .expected(bad)
            .got(bad)
            .hint(bad)
            .because(std::io::Error::other(bad))
            .to_string();
        assert_eq!(text.matches("a\\u{1b}[31m\\u{202e}\\u{d}\\u{9b}b").count(), 7, "{text}");
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()), "{text:?}");
        assert_eq!(escape_controls("fine\n\té→"), "fine\n\té→");
    }

    #[test]
    fn the_parts_are_those_of_the_message() {
        let error = Error::new(ErrorKind::Data, "bad").line("f", 3).got("x");
        let parts = error.because(std::io::Error::other("why")).parts().what;
        assert_eq!(parts, "bad: why");
        let error = Error::new(ErrorKind::Data, "bad").tensor("f", "t").expected(1).hint("h");
        let parts = error.parts();
        assert_eq!(parts.location.as_deref(), Some("f: tensor `t`"));
        assert_eq!((parts.expected, parts.got, parts.hint), (Some("1"), None, Some("h")));
    }

    #[test]
    fn every_part_is_shown_in_order() {
        let text = Error::new(ErrorKind::Weights, "wrong shape")
            .tensor("model.safetensors", "norm.weight")
            .expected("[64]")
            .got("[63]")
            .hint("export the model again")
            .to_string();
        assert_eq!(
            text,
            "model.safetensors: tensor `norm.weight`: wrong shape\n  expected: [64]\n  got: [63]\n  hint: export the model again"
        );
    }
}
