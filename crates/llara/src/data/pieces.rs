//! Cutting texts into consecutive pieces, in one pass and in bounded memory.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::files::RowLine;
use crate::storage::compressed;
use crate::{Error, ErrorKind, Result};

/// Extensions of files of texts in a folder.
pub(super) const TEXT_FILES: &[&str] = &["jsonl", "json", "txt", "md"];

/// Bytes that are read from a file at a time.
const READ_BYTES: usize = 1 << 18;

/// The length of pieces, in characters. A piece ends after the last white space within it that leaves it at least
/// half as long, or after that many characters if there is none, as in scripts without spaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceLength(usize);

/// The place of a piece in its text, in bytes. For a plain text file, the text is what the row's bytes contain: the
/// piece and the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    start: u32,
    end: u32,
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

    /// Bytes in which the end of the first piece is found.
    fn window(self) -> usize {
        4 * self.0 + 4
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

    /// All pieces of a text. None is blank.
    pub(super) fn pieces(self, text: &str) -> impl Iterator<Item = Piece> {
        let mut start = blank_bytes(text.as_bytes());
        std::iter::from_fn(move || {
            let rest = text.as_bytes().get(start..).filter(|rest| !rest.is_empty())?;
            let end = start + self.end_of_first(rest);
            let piece = Piece { start: start as u32, end: end as u32 }; // a line is shorter than 4 GiB
            start = end + blank_bytes(&text.as_bytes()[end..]);
            Some(piece)
        })
    }

    /// The text of a piece and that of the piece after it, which is empty at the end of the text, both without
    /// white space around them.
    pub(super) fn piece_and_next(self, text: &str, piece: Piece) -> (&str, &str) {
        let Piece { start, end } = piece;
        let rest = text[end as usize..].trim_ascii_start();
        let next = &rest[..self.end_of_first(rest.as_bytes())];
        (text[start as usize..end as usize].trim_ascii(), next.trim_ascii_end())
    }
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

/// Calls `on_piece` with each piece of a plain text file: the bytes of the piece and the next one, and its place in
/// these.
pub(super) fn read_plain_text(
    path: &Path,
    file: &File,
    length: PieceLength,
    on_piece: &mut dyn FnMut(RowLine<'_>, Piece) -> Result<()>,
) -> Result<()> {
    /// White space between two pieces; if there is more, the second one is not found.
    const BETWEEN: usize = 1 << 12;
    let wanted = 2 * length.window() + BETWEEN;
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
        return Err(Error::new(ErrorKind::Data, "the file has no text").file(path));
    }
    while !window.unused().is_empty() {
        let text = window.unused();
        let end = length.end_of_first(text);
        let rest = end + blank_bytes(&text[end..]);
        let both = &text[..rest + length.end_of_first(&text[rest..])];
        let number = u32::try_from(window.line).map_err(|_| {
            Error::new(ErrorKind::Data, "the file has too many lines").file(path).hint("split it")
        })?;
        let bytes = std::str::from_utf8(both).map(|_| both).map_err(|e| {
            Error::new(ErrorKind::Data, "not UTF-8")
                .line(path, window.line)
                .got(format!(
                    "an invalid byte at offset {}",
                    window.offset + e.valid_up_to() as u64
                ))
                .hint("convert the file to UTF-8")
        });
        let line = RowLine { number, offset: window.offset, bytes };
        on_piece(line, Piece { start: 0, end: end as u32 })?;
        window.skip(end);
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

    proptest! {
        #[test]
        fn pieces_contain_every_character_once(text in "[ab é世\n ]{0,80}", length in 1usize..20) {
            let length = PieceLength(length);
            let pieces: Vec<Piece> = length.pieces(&text).collect();
            let mut joined = String::new();
            for (i, &piece) in pieces.iter().enumerate() {
                let (own, next) = length.piece_and_next(&text, piece);
                prop_assert!(!own.is_empty() && own.chars().count() <= length.characters());
                let following = pieces.get(i + 1).map(|&next| length.piece_and_next(&text, next).0);
                prop_assert_eq!(next, following.unwrap_or(""));
                joined.push_str(own);
            }
            let visible = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            prop_assert_eq!(visible(&joined), visible(&text));
        }
    }
}
