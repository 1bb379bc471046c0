//! Cutting texts into consecutive pieces, in one pass and in bounded memory.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

use super::files::{FilesOfFolder, RowLine};
use crate::storage::compressed;
use crate::{Error, ErrorKind, Result};

/// Files of texts.
pub(super) const TEXT_FILES: FilesOfFolder =
    FilesOfFolder { extensions: &["jsonl", "json", "txt", "md"], subfolders: true };

/// Bytes that are read from a file at a time.
const READ_BYTES: usize = 1 << 18;

/// The length of pieces, in characters. A piece ends after the last white space within it that leaves it at least
/// half as long, or after that many characters if there is none, as in scripts without spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceLength(usize);

/// White space between two pieces, in bytes. What comes after more of it does not count as following: a row has the
/// bytes of its piece and of the next one, and must not grow with the space between them.
const BETWEEN: usize = 1 << 12;

/// The first piece of a text and the next one, which may be empty: byte positions in the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pair {
    /// End of the first piece.
    first: usize,
    /// End of the next piece.
    both: usize,
}

/// A piece of a text in a line of JSON.
pub(super) struct JsonPiece {
    /// The bytes of the line with this piece and the next one: a part of the value of `text`, with its escapes.
    pub(super) bytes: Range<usize>,
    /// Length of the piece without escapes, in bytes.
    pub(super) length: u32,
}

impl PieceLength {
    /// The longest piece, in characters.
    pub const MAX: usize = 1 << 22;

    /// Pieces of at most `characters`.
    ///
    /// # Errors
    /// The length is 0 or larger than [`MAX`](Self::MAX).
    pub fn new(characters: usize) -> Result<Self> {
        match characters {
            1..=Self::MAX => Ok(PieceLength(characters)),
            _ => Err(Error::new(ErrorKind::Argument, "the length of a piece is out of range")
                .expected(format!("1 to {} characters", Self::MAX))
                .got(characters)),
        }
    }

    /// The length in characters.
    pub fn characters(self) -> usize {
        self.0
    }

    /// Bytes in which a piece and the next one are found.
    fn window(self) -> usize {
        2 * (4 * self.0 + 4) + BETWEEN
    }

    /// The end of the first piece of `text`, in bytes. Bytes that are not UTF-8 count as characters.
    fn end_of_first(self, text: &[u8]) -> usize {
        let starts = |&byte: &u8| byte & 0xC0 != 0x80;
        let mut characters = text.iter().enumerate().filter(|(_, byte)| starts(byte));
        let Some((limit, _)) = characters.nth(self.0) else { return text.len() };
        let blank = text[limit / 2..limit].iter().rposition(u8::is_ascii_whitespace);
        // A piece of continuation bytes alone must not be empty.
        blank.map_or(limit, |at| limit / 2 + at + 1).max(1)
    }

    /// The first piece of a text that does not start with white space, and the next one.
    fn pair(self, text: &[u8]) -> Pair {
        let first = self.end_of_first(text);
        let blank = blank_bytes(&text[first..]);
        let both = match blank <= BETWEEN {
            true => first + blank + self.end_of_first(&text[first + blank..]),
            false => first,
        };
        Pair { first, both }
    }

    /// The pieces of `text`, the value of the field `text` of a line of JSON. None is blank.
    pub(super) fn pieces_of_line(self, line: &[u8], text: &str) -> impl Iterator<Item = JsonPiece> {
        let mut place =
            text_value(line).map(|value| EscapedText { line, at: value.start, decoded: 0 });
        let mut start = blank_bytes(text.as_bytes());
        std::iter::from_fn(move || {
            let place = place.as_mut()?;
            loop {
                let rest = text.as_bytes().get(start..).filter(|rest| !rest.is_empty())?;
                let Pair { first, both } = self.pair(rest);
                let piece = start..start + first;
                let from = place.seek(piece.start);
                // The position of the next piece is found again from this end.
                let end = place.seek(piece.end);
                let mut ahead = EscapedText { line, at: end, decoded: piece.end };
                let to = ahead.seek(start + both);
                start = piece.end + blank_bytes(&text.as_bytes()[piece.end..]);
                if !text[piece.clone()].trim().is_empty() {
                    return Some(JsonPiece { bytes: from..to, length: piece.len() as u32 });
                }
            }
        })
    }
}

/// Splits the text of a row into its first piece, of `length` bytes, and the next one, which is empty at the end of a
/// text; both without white space around them.
pub(super) fn piece_and_next(text: &str, length: u32) -> Option<(&str, &str)> {
    let (piece, next) = text.split_at_checked(length as usize)?;
    Some((piece.trim(), next.trim()))
}

/// A position in a string of JSON, between its quotes.
struct EscapedText<'l> {
    line: &'l [u8],
    /// Byte of the line.
    at: usize,
    /// The same position in the text without escapes.
    decoded: usize,
}

impl EscapedText<'_> {
    /// Moves on to a position of the text without escapes, which is between two characters; returns the byte of the
    /// line.
    fn seek(&mut self, decoded: usize) -> usize {
        while self.decoded < decoded && self.at < self.line.len() {
            let rest = &self.line[self.at..];
            let (bytes, of_text) = match rest {
                [b'\\', b'u', ..] => match unit(rest) {
                    // Two units of UTF-16 are one character.
                    0xD800..=0xDFFF => (12, 4),
                    unit => (6, char::from_u32(unit).map_or(1, char::len_utf8)),
                },
                [b'\\', ..] => (2, 1),
                _ => (1, 1),
            };
            self.at += bytes;
            self.decoded += of_text;
        }
        self.at
    }
}

/// The number in an escape such as `\u00e9`.
fn unit(escape: &[u8]) -> u32 {
    let digits = escape.get(2..6).and_then(|digits| std::str::from_utf8(digits).ok());
    digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0)
}

/// The value of the last field `text` of a line that is a JSON object with it, without its quotes.
fn text_value(line: &[u8]) -> Option<Range<usize>> {
    let (mut depth, mut at) = (0, 0);
    let (mut is_text, mut value) = (false, None);
    while let Some(&byte) = line.get(at) {
        match byte {
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            b'"' => {
                let start = at + 1;
                at = start;
                while line.get(at).is_some_and(|&byte| byte != b'"') {
                    at += if line[at] == b'\\' { 2 } else { 1 };
                }
                let end = at.min(line.len());
                let is_key = line.get(end + 1..)?.trim_ascii_start().starts_with(b":");
                if depth == 1 && is_key {
                    let key = serde_json::from_slice::<String>(&line[start - 1..end + 1]);
                    is_text = key.is_ok_and(|key| key == "text");
                } else if depth == 1 && is_text {
                    value = Some(start..end);
                }
            }
            _ => {}
        }
        at += 1;
    }
    value
}

/// Whether a file has one JSON object per line.
pub(super) fn is_rows_file(path: &Path) -> bool {
    matches!(path.extension().and_then(|e| e.to_str()), Some("jsonl" | "json"))
}

/// Number of bytes of white space at the start.
fn blank_bytes(text: &[u8]) -> usize {
    text.len() - text.trim_ascii_start().len()
}

/// The unread part of a file, from its current piece on.
struct Window<'f> {
    path: &'f Path,
    file: &'f File,
    bytes: Vec<u8>,
    /// Bytes that have been used.
    used: usize,
    /// Offset of the first unused byte in the file.
    offset: u64,
    /// Its line, from 1.
    line: u64,
    at_end: bool,
}

impl Window<'_> {
    fn unused(&self) -> &[u8] {
        &self.bytes[self.used..]
    }

    /// Reads on until there are `wanted` unused bytes, or all that remain.
    fn fill(&mut self, wanted: usize) -> Result<()> {
        while self.unused().len() < wanted && !self.at_end {
            self.bytes.drain(..std::mem::take(&mut self.used));
            let read = self.file.take(READ_BYTES as u64).read_to_end(&mut self.bytes);
            let read = read.map_err(|e| Error::io("read training data", self.path, e))?;
            self.at_end = read == 0;
        }
        Ok(())
    }

    fn skip(&mut self, bytes: usize) {
        let skipped = &self.unused()[..bytes];
        self.line += skipped.iter().filter(|&&byte| byte == b'\n').count() as u64;
        self.offset += bytes as u64;
        self.used += bytes;
    }

    /// Skips white space, however much there is.
    fn skip_blank(&mut self, wanted: usize) -> Result<()> {
        loop {
            self.fill(wanted)?;
            let blank = blank_bytes(self.unused());
            self.skip(blank);
            if !self.unused().is_empty() || self.at_end {
                return self.fill(wanted);
            }
        }
    }
}

/// Calls `on_piece` with each piece of a plain text file that is not blank: the bytes of the piece and the next one,
/// and the length of the piece.
pub(super) fn read_plain_text(
    path: &Path,
    file: &File,
    length: PieceLength,
    on_piece: &mut dyn FnMut(RowLine<'_>, u32) -> Result<()>,
) -> Result<()> {
    let wanted = length.window();
    let (bytes, at_end) = (Vec::new(), false);
    let mut window = Window { path, file, bytes, used: 0, offset: 0, line: 1, at_end };
    window.fill(wanted)?;
    if let Some(error) = compressed(path, window.unused()) {
        return Err(error);
    }
    if window.unused().starts_with(b"\xef\xbb\xbf") {
        window.skip(3);
    }
    window.skip_blank(wanted)?;
    if window.unused().is_empty() {
        let error = Error::new(ErrorKind::Data, "the file has no text").file(path);
        return on_piece(RowLine { number: 1, offset: 0, bytes: Err(error) }, 0);
    }
    while !window.unused().is_empty() {
        let text = window.unused();
        let Pair { first, both } = length.pair(text);
        let number = u32::try_from(window.line).map_err(|_| {
            Error::new(ErrorKind::Data, "the file has too many lines").file(path).hint("split it")
        })?;
        let (piece, both) = (&text[..first], &text[..both]);
        let bytes = std::str::from_utf8(both).map(|_| both).map_err(|e| {
            Error::new(ErrorKind::Data, "not UTF-8")
                .line(path, window.line)
                .got(format!(
                    "an invalid byte at offset {}",
                    window.offset + e.valid_up_to() as u64
                ))
                .hint("convert the file to UTF-8")
        });
        // White space beyond ASCII.
        if !std::str::from_utf8(piece).is_ok_and(|piece| piece.trim().is_empty()) {
            let line = RowLine { number, offset: window.offset, bytes };
            on_piece(line, first as u32)?;
        }
        window.skip(first);
        window.skip_blank(wanted)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn pieces_end_at_white_space_in_their_second_half() {
        let ends = |length: usize, text: &str| PieceLength(length).end_of_first(text.as_bytes());
        assert_eq!(ends(10, "short"), 5);
        assert_eq!(ends(10, "seven words"), 6);
        assert_eq!(ends(10, "a bcdefghijklm"), 10);
        assert_eq!(ends(4, "ééééé"), 8);
        assert!(PieceLength::new(0).is_err() && PieceLength::new(PieceLength::MAX + 1).is_err());
    }

    /// Rows of a text: each piece, and the next one. In a line of JSON, and in a plain text file.
    fn rows(text: &str, length: PieceLength) -> [Vec<(String, String)>; 2] {
        let split = |row: &str, length| {
            let (piece, next) = piece_and_next(row, length).unwrap();
            (piece.to_owned(), next.to_owned())
        };
        let line = serde_json::json!({ "a": {"text": "no"}, "text": text, "b": ["text"] });
        let line = line.to_string();
        let lines = length.pieces_of_line(line.as_bytes(), text).map(|piece| {
            let escaped = format!("\"{}\"", &line[piece.bytes]);
            split(&serde_json::from_str::<String>(&escaped).unwrap(), piece.length)
        });
        let lines = lines.collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let mut plain = Vec::new();
        let open = File::open(file.path()).unwrap();
        read_plain_text(file.path(), &open, length, &mut |line, length| {
            // A blank file is an error.
            plain.extend(
                line.bytes.ok().map(|row| split(std::str::from_utf8(row).unwrap(), length)),
            );
            Ok(())
        })
        .unwrap();
        [lines, plain]
    }

    #[test]
    fn the_value_of_text_is_found_in_any_line() {
        for (line, want) in [
            (r#"{"text": "a \" b"}"#, Some(r#"a \" b"#)),
            (r#" { "title" : "text" , "\u0074ext" :"x\\" } "#, Some(r"x\\")),
            (r#"{"n": 1, "meta": {"text": "no", "l": ["text", "no"]}, "text": ""}"#, Some("")),
            (r#"{"text": "first", "text": "last"}"#, Some("last")),
            (r#"{"title": "text"}"#, None),
        ] {
            let found = text_value(line.as_bytes()).map(|value| &line[value]);
            assert_eq!(found, want, "{line}");
        }
    }

    #[test]
    fn escapes_do_not_move_pieces() {
        let text = "caf\u{e9} \u{1f600}\u{1f600} \"q\" \\ end\ttab";
        let line = r#"{"text": "caf\u00e9 \ud83d\ude00\u{1f600} \"q\" \\ end\ttab"}"#;
        let line = line.replace("\\u{1f600}", "\u{1f600}");
        let decoded: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(decoded["text"], text);
        let pieces: Vec<String> = PieceLength(5)
            .pieces_of_line(line.as_bytes(), text)
            .map(|piece| {
                let row = serde_json::from_str::<String>(&format!("\"{}\"", &line[piece.bytes]));
                piece_and_next(&row.unwrap(), piece.length).unwrap().0.to_owned()
            })
            .collect();
        assert_eq!(pieces, ["caf\u{e9}", "\u{1f600}\u{1f600}", "\"q\"", "\\ end", "tab"]);
    }

    #[test]
    fn long_white_space_separates_pieces_and_is_not_part_of_a_row() {
        // The first piece has one blank of its own.
        for (blank, next) in [(BETWEEN + 1, "two"), (BETWEEN + 2, ""), (3 * READ_BYTES, "")] {
            let text = format!("one{}two", " ".repeat(blank));
            for rows in rows(&text, PieceLength(4)) {
                let want = [("one", next), ("two", "")];
                assert_eq!(rows, want.map(|(a, b)| (a.to_owned(), b.to_owned())), "{blank}");
            }
            let line = format!("{{\"text\": \"{text}\"}}");
            let bytes = |piece: JsonPiece| piece.bytes.len();
            let longest = PieceLength(4).pieces_of_line(line.as_bytes(), &text).map(bytes).max();
            assert!(longest.unwrap() <= BETWEEN + 7);
        }
        // White space beyond ASCII is no piece either.
        for rows in rows(&format!("one {} two", "\u{3000}".repeat(20)), PieceLength(4)) {
            let pieces: Vec<&str> = rows.iter().map(|(piece, _)| &**piece).collect();
            assert_eq!(pieces, ["one", "two"]);
        }
        assert_eq!(rows("\u{3000}\u{a0}", PieceLength(4)), [vec![], vec![]]);
    }

    proptest! {
        #[test]
        fn pieces_contain_every_character_once(text in "[ab é世\n \"\\\\\u{1f600}]{0,80}", length in 1usize..20) {
            let length = PieceLength(length);
            let [lines, plain] = rows(&text, length);
            prop_assert_eq!(&lines, &plain);
            let mut joined = String::new();
            for (i, (own, next)) in lines.iter().enumerate() {
                prop_assert!(!own.is_empty() && own.chars().count() <= length.characters());
                let following = lines.get(i + 1).map(|(next, _)| next.as_str());
                prop_assert_eq!(next, following.unwrap_or(""));
                joined.push_str(own);
            }
            let visible = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            prop_assert_eq!(visible(&joined), visible(&text));
        }
    }
}
