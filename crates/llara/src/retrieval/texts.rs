//! Files of texts to embed, JSONL or plain lines: checked completely, then read block by block.

use std::io::{BufReader, Read};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::lines::{Line, Lines, join_title, open_regular};
use crate::storage::Fingerprint;
use crate::{Error, ErrorKind, Result};

/// The format of a file of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFormat {
    /// One JSON object per line with `text`, or with `title` and `text`, which are joined by a space. A text
    /// may be empty, as in some test collections: then only the template is embedded. Empty lines are
    /// skipped; texts are numbered by the order of the objects.
    Jsonl,
    /// One text per line. An empty line is an error: if it were skipped, later embeddings would not have the
    /// number of their line.
    Lines,
}

/// A file of texts whose lines were checked and counted. Text i of the file is row i of its embeddings.
#[derive(Debug, Clone)]
pub struct TextFile {
    path: PathBuf,
    format: TextFormat,
    len: usize,
    fingerprint: Fingerprint,
}

impl TextFile {
    /// Reads the file once, checks it and counts its texts.
    ///
    /// `.jsonl`, `.ndjson` and `.json` are read as JSONL and `.txt` as plain lines; any other file is JSONL
    /// if its first character other than white space is `{`.
    ///
    /// # Errors
    /// [`ErrorKind::Data`] with file and line: invalid JSON, bytes that are not UTF-8, `text` missing or not
    /// a string; or without a line: no text, or plain lines that are all JSON objects, because the name of
    /// the file is probably wrong. [`ErrorKind::Io`]: the file cannot be read or is not a regular file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let format = detect_format(&path)?;
        let mut file = TextFile { path, format, len: 0, fingerprint: Fingerprint::new() };
        let mut lines = Lines::open(&file.path)?;
        let mut only_records = file.format == TextFormat::Lines;
        while let Some(line) = lines.next_line()? {
            only_records = only_records && is_record(line.text);
            if let Some(text) = file.parse(line)? {
                file.len += 1;
                file.fingerprint.add(text.as_bytes());
            }
        }
        if file.len == 0 {
            return Err(Error::new(ErrorKind::Data, "the file contains no text").file(file.path));
        }
        if only_records {
            return Err(Error::new(ErrorKind::Data, "every line of the file is a JSON object")
                .file(file.path)
                .expected("one plain text per line, because the name does not end in .jsonl")
                .hint(
                    "to embed each `text`, rename the file to .jsonl; to embed the JSON itself, convert \
                     each line: jq -Rc '{text: .}'",
                ));
        }
        Ok(file)
    }

    /// The number of texts, at least 1.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.len
    }

    /// The hash of all texts in their order, as they were when the file was opened.
    pub(super) fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The format of the file.
    pub fn format(&self) -> TextFormat {
        self.format
    }

    /// Reads the texts in order, in blocks of `size` (the last may be shorter).
    ///
    /// # Errors
    /// [`ErrorKind::Io`], here or from the iterator. The iterator repeats the checks of
    /// [`open`](Self::open), because the file may have changed, and ends at the first error.
    pub fn chunks(&self, size: NonZeroUsize) -> Result<Chunks<'_>> {
        Ok(Chunks { file: self, lines: Some(Lines::open(&self.path)?), size: size.get() })
    }

    /// The text of a line; `None` for a line that is skipped.
    fn parse(&self, line: Line<'_>) -> Result<Option<String>> {
        match self.format {
            TextFormat::Lines if line.is_blank() => Err(line
                .error("the line is empty")
                .hint("remove empty lines: embedding i belongs to line i")),
            TextFormat::Lines => Ok(Some(line.text.to_owned())),
            TextFormat::Jsonl if line.is_blank() => Ok(None),
            TextFormat::Jsonl => {
                let record = line.json()?;
                let text = line.required("text", record.text)?;
                let title = line.optional("title", record.title)?;
                Ok(Some(match title.filter(|title| !title.trim().is_empty()) {
                    Some(title) => join_title(Some(&title), &text),
                    None => text,
                }))
            }
        }
    }
}

/// Whether a line is a JSON object with a field that usually contains a text.
fn is_record(line: &str) -> bool {
    const FIELDS: [&str; 9] =
        ["text", "title", "query", "passage", "document", "contents", "content", "sentence", "pos"];
    // A cheap test that few plain texts pass.
    if !line.trim_start().starts_with('{') {
        return false;
    }
    let object: Result<Map<String, Value>, _> = serde_json::from_str(line);
    let holds_text = |value: &Value| value.is_string() || value.is_array();
    object.is_ok_and(|object| FIELDS.iter().any(|f| object.get(*f).is_some_and(holds_text)))
}

fn detect_format(path: &Path) -> Result<TextFormat> {
    let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
    match extension.as_deref() {
        Some("jsonl" | "ndjson" | "json") => Ok(TextFormat::Jsonl),
        Some("txt") => Ok(TextFormat::Lines),
        _ => {
            let bytes = BufReader::new(open_regular(path)?).bytes();
            // Skips white space and the bytes of a byte-order mark.
            for byte in bytes {
                match byte.map_err(|e| Error::io("read the file", path, e))? {
                    b'{' => return Ok(TextFormat::Jsonl),
                    b' ' | b'\t' | b'\r' | b'\n' | 0xef | 0xbb | 0xbf => {}
                    _ => break,
                }
            }
            Ok(TextFormat::Lines)
        }
    }
}

/// Blocks of texts in the order of the file; returned by [`TextFile::chunks`].
pub struct Chunks<'a> {
    file: &'a TextFile,
    /// `None` after the end of the file or an error.
    lines: Option<Lines>,
    size: usize,
}

impl Chunks<'_> {
    /// Skips the next `count` texts, or all if there are fewer. They are checked too.
    ///
    /// # Errors
    /// Those of the iterator.
    pub fn skip_texts(mut self, count: usize) -> Result<Self> {
        let mut left = count;
        while left > 0
            && let Some(lines) = &mut self.lines
        {
            match lines.next_line()? {
                Some(line) => left -= usize::from(self.file.parse(line)?.is_some()),
                None => self.lines = None,
            }
        }
        Ok(self)
    }

    fn read(&mut self) -> Result<Vec<String>> {
        let mut texts = Vec::new();
        if let Some(lines) = &mut self.lines {
            while texts.len() < self.size {
                let Some(line) = lines.next_line()? else { break };
                texts.extend(self.file.parse(line)?);
            }
        }
        Ok(texts)
    }
}

impl Iterator for Chunks<'_> {
    type Item = Result<Vec<String>>;

    fn next(&mut self) -> Option<Self::Item> {
        let texts = self.read();
        if !matches!(&texts, Ok(texts) if texts.len() == self.size) {
            self.lines = None;
        }
        if matches!(&texts, Ok(texts) if texts.is_empty()) { None } else { Some(texts) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn size(n: usize) -> NonZeroUsize {
        NonZeroUsize::new(n).unwrap()
    }

    /// Opens a file of this name and content and reads all its texts in blocks of 2.
    fn read(name: &str, bytes: impl AsRef<[u8]>) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let file = TextFile::open(&path)?;
        let texts: Vec<String> =
            file.chunks(size(2))?.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        assert_eq!(texts.len(), file.len());
        Ok(texts)
    }

    #[test]
    fn jsonl_joins_titles_and_skips_blank_lines() {
        let file = "\u{feff}{\"text\": \" as is \"}\r\n\n{\"title\": \"T\", \"text\": \"x\", \"n\": 1}\n\
            {\"title\": \"only\", \"text\": \"\"}\n{\"title\": null, \"text\": \"y\"}\n\
            {\"title\": \"\", \"text\": \" z\"}\n{\"text\": \"\"}";
        let expected = [" as is ", "T x", "only", "y", " z", ""];
        assert_eq!(read("a.jsonl", file).unwrap(), expected);
    }

    #[test]
    fn plain_lines_are_not_changed() {
        let file = "\u{feff}one \r\n{\"text\": 2}\nthree";
        assert_eq!(read("a.txt", file).unwrap(), ["one ", "{\"text\": 2}", "three"]);
    }

    #[test]
    fn format_follows_the_extension_then_the_first_byte() {
        let json = "\u{feff}\n {\"text\": \"a\"}\n";
        for name in ["a.jsonl", "a.NDJSON", "a.json", "a", "a.data"] {
            assert_eq!(read(name, json).unwrap(), ["a"], "{name}");
        }
        for name in ["a", "a.data", "a.txt"] {
            assert_eq!(read(name, "[x] {\n").unwrap(), ["[x] {"], "{name}");
        }
    }

    #[test]
    fn records_in_a_file_of_plain_lines_are_refused() {
        let records = "{\"text\": \"a\"}\n{\"_id\": 1, \"title\": \"b\", \"text\": \"c\"}\n";
        let error = read("a.txt", records).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Data);
        assert!(error.to_string().contains("rename the file to .jsonl"), "{error}");
        for texts in ["{\"text\": \"a\"}\nplain", "{\"n\": 1}", "{a}", "{\"text\": 1}"] {
            assert_eq!(read("a.txt", texts).unwrap(), texts.split('\n').collect::<Vec<_>>());
        }
    }

    #[test]
    fn errors_name_the_line() {
        for (name, file, expected) in [
            ("a.jsonl", "{\"text\": \"a\"}\n{\"text\": }", ":2: invalid JSON"),
            ("a.jsonl", "{\"title\": \"a\"}", ":1: `text` is missing"),
            ("a.jsonl", "{\"text\": [\"a\"]}", ":1: `text` has the wrong type"),
            ("a.jsonl", "{\"text\": \"a\", \"title\": 1}", ":1: `title` has the wrong type"),
            ("a.jsonl", "\n\n", ": the file contains no text"),
            ("a.txt", "a\n \nb\n", ":2: the line is empty"),
            ("a.txt", "", ": the file contains no text"),
        ] {
            let error = read(name, file).unwrap_err().to_string();
            assert!(error.contains(&format!("{name}{expected}")), "{error}");
        }
        assert!(read("a.txt", b"a\nb\xff").unwrap_err().to_string().contains(":2: "));
        assert!(TextFile::open("/no/such/file").is_err());
        assert!(TextFile::open(tempfile::tempdir().unwrap().path()).is_err());
    }

    #[test]
    fn texts_are_skipped_by_number() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        let lines: String = (0..5).map(|i| format!("\n{{\"text\": \"{i}\"}}\n")).collect();
        std::fs::write(&path, lines).unwrap();
        let file = TextFile::open(&path).unwrap();
        for count in 0..8 {
            let chunks = file.chunks(size(2)).unwrap().skip_texts(count).unwrap();
            let rest: Vec<String> = chunks.flat_map(Result::unwrap).collect();
            assert_eq!(rest, (count..5).map(|i| i.to_string()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_fingerprint_is_of_the_texts() {
        let dir = tempfile::tempdir().unwrap();
        let of = |name: &str, contents: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, contents).unwrap();
            TextFile::open(&path).unwrap().fingerprint().to_string()
        };
        let plain = of("a.txt", "one\ntwo\n");
        assert_eq!(of("b.jsonl", "{\"text\": \"one\"}\n\n{\"text\": \"two\", \"n\": 1}"), plain);
        for other in ["two\none\n", "one\ntwo\nthree\n", "onet\nwo\n", "one\n"] {
            assert_ne!(of("c.txt", other), plain, "{other:?}");
        }
    }

    #[test]
    fn chunks_stop_at_the_first_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "1\n2\n3\n4\n").unwrap();
        let file = TextFile::open(&path).unwrap();
        let sizes: Vec<usize> =
            file.chunks(size(3)).unwrap().map(|texts| texts.unwrap().len()).collect();
        assert_eq!(sizes, [3, 1]);
        std::fs::write(&path, "1\n\n3\n").unwrap();
        let chunks: Vec<_> = file.chunks(size(1)).unwrap().collect();
        assert!(matches!(chunks.as_slice(), [Ok(_), Err(_)]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), json: bool) {
            let name = if json { "a.jsonl" } else { "a" };
            if let Err(e) = read(name, bytes) {
                prop_assert_eq!(e.kind(), ErrorKind::Data);
            }
        }

        #[test]
        fn texts_come_back(texts in prop::collection::vec("\\PC{0,12}[\r\n\t]?\\PC{0,12}x", 1..10)) {
            let file: String =
                texts.iter().map(|text| format!("{}\n", serde_json::json!({"text": text}))).collect();
            prop_assert_eq!(read("a.jsonl", file).unwrap(), texts);
        }
    }
}
