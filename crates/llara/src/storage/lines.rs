//! Reads a file as numbered lines in bounded memory.

use std::io::{BufRead, Read, Result};

/// The longest line that is read into memory, in bytes. No row or text is that long. The limit stops a
/// file of another kind from filling the memory before it is refused.
pub(crate) const MAX_LINE_BYTES: u64 = 64 << 20;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads a file line by line. A byte-order mark and the `\r` of `\r\n` are removed.
pub(crate) struct LineReader<R> {
    reader: R,
    buffer: Vec<u8>,
    /// Bytes read so far.
    offset: u64,
    /// Lines read so far.
    number: u64,
    max_bytes: u64,
    /// Whether the last line was too long and its rest must still be skipped.
    within_line: bool,
}

/// One line and its position.
pub(crate) struct NumberedLine<'l> {
    /// Line number, from 1.
    pub(crate) number: u64,
    /// Offset of its first byte from the start of the file.
    pub(crate) offset: u64,
    /// The line without its line ending; `None` if it is too long.
    pub(crate) content: Option<&'l [u8]>,
    /// The first bytes of the line, also if it is too long.
    pub(crate) start: &'l [u8],
}

impl<R: BufRead> LineReader<R> {
    pub(crate) fn new(reader: R) -> Self {
        Self::with_limit(reader, MAX_LINE_BYTES)
    }

    /// Reads lines of at most `max_bytes`, line endings not counted.
    pub(crate) fn with_limit(reader: R, max_bytes: u64) -> Self {
        let buffer = Vec::new();
        LineReader { reader, buffer, offset: 0, number: 0, max_bytes, within_line: false }
    }

    /// The next line, or nothing at the end of the file.
    pub(crate) fn next_line(&mut self) -> Result<Option<NumberedLine<'_>>> {
        if std::mem::take(&mut self.within_line) {
            self.offset += self.reader.skip_until(b'\n')? as u64;
        }
        self.buffer.clear();
        // Includes a byte-order mark and the line ending. What exceeds it is too long without them.
        let limit = self.max_bytes.saturating_add(BYTE_ORDER_MARK.len() as u64 + 2);
        let mut limited = (&mut self.reader).take(limit);
        let read = limited.read_until(b'\n', &mut self.buffer)? as u64;
        if read == 0 {
            return Ok(None);
        }
        self.within_line = read == limit && self.buffer.last() != Some(&b'\n');
        let mut offset = self.offset;
        self.offset += read;
        self.number += 1;
        let mut content = self.buffer.as_slice();
        content = content.strip_suffix(b"\n").unwrap_or(content);
        content = content.strip_suffix(b"\r").unwrap_or(content);
        if self.number == 1
            && let Some(rest) = content.strip_prefix(BYTE_ORDER_MARK)
        {
            content = rest;
            offset += BYTE_ORDER_MARK.len() as u64;
        }
        let start = content;
        let content = Some(content).filter(|content| content.len() as u64 <= self.max_bytes);
        Ok(Some(NumberedLine { number: self.number, offset, content, start }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Number, offset and content of every line.
    fn all(bytes: &[u8], max_bytes: u64) -> Vec<(u64, usize, Option<Vec<u8>>)> {
        let mut lines = LineReader::with_limit(bytes, max_bytes);
        let mut all = Vec::new();
        while let Some(line) = lines.next_line().unwrap() {
            all.push((line.number, line.offset as usize, line.content.map(<[u8]>::to_vec)));
        }
        all
    }

    #[test]
    fn byte_order_marks_and_line_endings_are_removed() {
        let read = all(b"\xef\xbb\xbfone\r\n\r\nt\rwo\n\xef\xbb\xbfx", 99);
        let expected: [(u64, usize, &[u8]); 4] =
            [(1, 3, b"one"), (2, 8, b""), (3, 10, b"t\rwo"), (4, 15, b"\xef\xbb\xbfx")];
        assert_eq!(read, expected.map(|(number, at, text)| (number, at, Some(text.to_vec()))));
        assert!(all(b"", 99).is_empty());
    }

    #[test]
    fn a_line_beyond_the_limit_is_skipped() {
        for end in ["\n", "\r\n"] {
            for mark in ["", "\u{feff}"] {
                let file = format!("{mark}abcdefgh{end}{}{end}x", "-".repeat(40));
                let contents = |max| -> Vec<Option<Vec<u8>>> {
                    all(file.as_bytes(), max).into_iter().map(|(_, _, content)| content).collect()
                };
                let (first, last) = (Some(b"abcdefgh".to_vec()), Some(b"x".to_vec()));
                assert_eq!(contents(8), [first, None, last.clone()]);
                assert_eq!(contents(7), [None, None, last]);
            }
        }
    }

    proptest! {
        #[test]
        fn offsets_are_those_of_the_lines(
            lines in prop::collection::vec("[a\r\u{feff}]{0,9}", 0..9), max_bytes in 0u64..20,
        ) {
            let file = lines.join("\n");
            let read = all(file.as_bytes(), max_bytes);
            // A line ending at the end of the file does not start another line.
            let count = file.split_terminator('\n').count();
            prop_assert_eq!(read.len(), count);
            let mut start = 0;
            for ((number, offset, content), line) in read.into_iter().zip(lines) {
                let text = line.strip_suffix('\r').unwrap_or(&line);
                let unmarked = text.strip_prefix('\u{feff}').filter(|_| number == 1);
                let text = unmarked.unwrap_or(text);
                prop_assert_eq!(content.is_some(), text.len() as u64 <= max_bytes);
                prop_assert_eq!(&file.as_bytes()[offset..offset + text.len()], text.as_bytes());
                if let Some(content) = content {
                    prop_assert_eq!(content, text.as_bytes());
                }
                prop_assert!((start..start + 4).contains(&offset));
                start += line.len() + 1;
            }
        }
    }
}
