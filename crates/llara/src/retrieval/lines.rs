//! Reads numbered lines of a UTF-8 text file in bounded memory, and the fields of a JSON line.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::storage::{LineReader, MAX_LINE_BYTES, compressed, open_file};
use crate::{Error, ErrorKind, Result};

/// Reads a text file line by line. Bytes that are not UTF-8 are an error.
pub(super) struct Lines<R = BufReader<File>> {
    reader: LineReader<R>,
    path: PathBuf,
}

impl Lines {
    /// Opens a regular file. The files are read twice, which is not possible with a pipe.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path)?;
        Ok(Lines::new(BufReader::with_capacity(1 << 18, file), path))
    }
}

impl<R: BufRead> Lines<R> {
    fn new(reader: R, path: &Path) -> Self {
        Lines { reader: LineReader::new(reader), path: path.to_owned() }
    }

    /// The next line without its line ending, or `None` at the end of the file.
    pub(super) fn next_line(&mut self) -> Result<Option<Line<'_>>> {
        let path = &self.path;
        let line = self.reader.next_line().map_err(|e| Error::io("read the file", path, e))?;
        let Some(line) = line else { return Ok(None) };
        if line.number == 1
            && let Some(error) = compressed(path, line.start)
        {
            return Err(error);
        }
        let content = line.content.ok_or_else(|| {
            Error::new(ErrorKind::Data, "the line is too long")
                .line(path, line.number)
                .expected(format!("at most {} MiB", MAX_LINE_BYTES >> 20))
                .hint("check that this is a text file with one record per line")
        })?;
        match std::str::from_utf8(content) {
            Ok(text) => Ok(Some(Line { path, number: line.number, text })),
            Err(e) => Err(Error::new(ErrorKind::Data, "the line is not UTF-8")
                .line(path, line.number)
                .got(format!("an invalid byte at column {}", e.valid_up_to() + 1))
                .hint("convert the file to UTF-8")),
        }
    }
}

/// Opens a file for reading and refuses folders, pipes and devices.
pub(super) fn open_regular(path: &Path) -> Result<File> {
    open_file(path).map_err(|e| {
        let is_other_type = e.kind() == std::io::ErrorKind::InvalidInput;
        let error = Error::io("open the file", path, e);
        if is_other_type { error.hint("write the data to a regular file first") } else { error }
    })
}

/// One line and its position.
#[derive(Clone, Copy)]
pub(super) struct Line<'a> {
    path: &'a Path,
    number: u64,
    /// The line without its line ending.
    pub(super) text: &'a str,
}

impl Line<'_> {
    /// Whether the line is empty or consists of white space.
    pub(super) fn is_blank(&self) -> bool {
        self.text.trim().is_empty()
    }

    /// A data error at this line.
    pub(super) fn error(&self, what: impl Into<String>) -> Error {
        Error::new(ErrorKind::Data, what).line(self.path, self.number)
    }

    /// Parses the line as a JSON object with the fields of retrieval files.
    pub(super) fn json(&self) -> Result<Record> {
        // serde also accepts a JSON array for a struct.
        if !self.text.trim_start().starts_with('{') {
            return Err(self
                .error("the line is not a JSON object")
                .expected(r#"{"text": "…"}"#)
                .got(excerpt(self.text))
                .hint("a JSONL file has one JSON object per line"));
        }
        serde_json::from_str(self.text).map_err(|e| {
            // serde_json counts lines from the start of its input, which is this one line.
            let message = e.to_string();
            let message = message.rsplit_once(" at line ").map_or(message.as_str(), |(m, _)| m);
            self.error(format!("invalid JSON: {message} at column {}", e.column()))
                .hint("a JSONL file has one JSON object per line")
        })
    }

    /// The string in a required field.
    pub(super) fn required(&self, name: &str, value: Option<Value>) -> Result<String> {
        self.optional(name, value)?.ok_or_else(|| self.error(format!("`{name}` is missing")))
    }

    /// The string in a field that may be absent or null.
    pub(super) fn optional(&self, name: &str, value: Option<Value>) -> Result<Option<String>> {
        match value {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self
                .error(format!("`{name}` has the wrong type"))
                .expected("a string")
                .got(excerpt(&other.to_string()))),
        }
    }

    /// The identifier in a field: a string, or an integer, which is converted to decimal digits.
    pub(super) fn id(&self, name: &str, value: Option<Value>) -> Result<String> {
        match value {
            Some(Value::Number(number)) if number.is_i64() || number.is_u64() => {
                Ok(number.to_string())
            }
            Some(Value::Number(number)) => Err(self
                .error(format!("`{name}` is not a 64-bit integer"))
                .expected("a string or an integer")
                .got(number)),
            other => {
                let id = self.required(name, other)?;
                if id.is_empty() { Err(self.error(format!("`{name}` is empty"))) } else { Ok(id) }
            }
        }
    }
}

/// The fields of a line that are read. `null` counts as absent; other fields are ignored.
#[derive(Deserialize)]
pub(super) struct Record {
    /// `_id` of BEIR files.
    #[serde(rename = "_id")]
    pub(super) id: Option<Value>,
    /// The title of a passage.
    pub(super) title: Option<Value>,
    /// The text.
    pub(super) text: Option<Value>,
}

/// A passage in BEIR's format for encoders: the title, one space and the text, trimmed.
pub(super) fn join_title(title: Option<&str>, text: &str) -> String {
    match title {
        Some(title) if !title.trim().is_empty() => format!("{title} {text}").trim().to_owned(),
        _ => text.trim().to_owned(),
    }
}

/// The beginning of a text, for an error message.
pub(super) fn excerpt(text: &str) -> String {
    const CHARS: usize = 60;
    let mut chars = text.chars();
    let start: String = chars.by_ref().take(CHARS).collect();
    if chars.next().is_some() { format!("{start}…") } else { start }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn lines(bytes: &[u8]) -> Lines<Cursor<&[u8]>> {
        Lines::new(Cursor::new(bytes), Path::new("f.txt"))
    }

    fn all(bytes: &[u8]) -> Result<Vec<(u64, String)>> {
        let (mut lines, mut all) = (lines(bytes), Vec::new());
        while let Some(line) = lines.next_line()? {
            all.push((line.number, line.text.to_owned()));
        }
        Ok(all)
    }

    #[test]
    fn byte_order_mark_and_carriage_returns_are_removed() {
        let read = all(b"\xef\xbb\xbfone\r\n\r\nt\rwo\n\xef\xbb\xbfx").unwrap();
        let expected = [(1, "one"), (2, ""), (3, "t\rwo"), (4, "\u{feff}x")];
        assert_eq!(read, expected.map(|(n, t)| (n, t.to_owned())));
    }

    #[test]
    fn invalid_bytes_and_long_lines_are_refused_with_their_line() {
        let error = all(b"fine\nb\xffd\n").unwrap_err().to_string();
        assert!(error.starts_with("f.txt:2: the line is not UTF-8"), "{error}");
        let reader = LineReader::with_limit(Cursor::new(&b"abcdefgh\n"[..]), 7);
        let mut long = Lines { reader, path: "f.txt".into() };
        let error = long.next_line().err().unwrap().to_string();
        assert!(error.starts_with("f.txt:1: the line is too long"), "{error}");
    }

    #[test]
    fn compressed_files_are_named() {
        for start in [&b"\x1f\x8b\x08\x00\n"[..], b"PK\x03\x04text"] {
            let error = all(start).unwrap_err().to_string();
            assert!(error.contains("compressed") && error.contains("hint: decompress"), "{error}");
        }
    }

    #[test]
    fn identifiers_are_strings_or_integers() {
        let line = Line { path: Path::new("f"), number: 1, text: "" };
        let id = |json: &str| line.id("_id", serde_json::from_str(json).unwrap());
        assert_eq!(id("\"a b\"").unwrap(), "a b");
        assert_eq!(id("-7").unwrap(), "-7");
        assert_eq!(id("18446744073709551615").unwrap(), "18446744073709551615");
        for bad in ["1.5", "1e3", "18446744073709551616", "\"\"", "null", "[]", "true"] {
            assert!(id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn json_errors_name_line_and_column() {
        let line = Line { path: Path::new("f"), number: 9, text: r#"{"text": oops}"# };
        let error = line.json().err().unwrap().to_string();
        assert!(error.starts_with("f:9: invalid JSON: expected value at column 10"), "{error}");
        for text in [r#"["1", "t", "x"]"#, "7", "\"text\"", r#"{"text": "a", "text": "b"}"#] {
            assert!(Line { path: Path::new("f"), number: 1, text }.json().is_err(), "{text}");
        }
    }

    #[test]
    fn titles_are_joined_with_one_space() {
        assert_eq!(join_title(Some(" A"), "b "), "A b");
        assert_eq!(join_title(Some("  "), " b "), "b");
        assert_eq!(join_title(None, "b"), "b");
        assert_eq!(join_title(Some("A"), ""), "A");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            match all(&bytes) {
                Ok(read) => prop_assert!(read.len() <= bytes.len()),
                Err(e) => prop_assert_eq!(e.kind(), ErrorKind::Data),
            }
        }

        #[test]
        fn lines_are_read_back(texts in prop::collection::vec("[^\r\n\u{feff}]{0,20}", 0..10), crlf: bool) {
            let end = if crlf { "\r\n" } else { "\n" };
            let file: String = texts.iter().map(|t| format!("{t}{end}")).collect();
            let read: Vec<String> =
                all(file.as_bytes()).unwrap().into_iter().map(|(_, text)| text).collect();
            prop_assert_eq!(read, texts);
        }

        #[test]
        fn any_line_is_a_record_or_refused(text in "\\PC{0,40}|\\{\"(text|_id|title)\":\\PC{0,20}\\}") {
            let line = Line { path: Path::new("f"), number: 1, text: &text };
            if let Err(e) = line.json() {
                prop_assert_eq!(e.kind(), ErrorKind::Data);
            }
        }
    }
}
