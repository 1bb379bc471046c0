//! Data for pretraining: a text, the text whose words it summarizes, and the text that follows it. Rows are read
//! from JSON Lines in the reference's form, or cut from longer texts.

use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use super::DataSource;
use super::dataset::{BadRows, Dataset};
use super::files::{ROW_FILES, RowLine, files_of, no_rows, open_data_file, read_lines};
use super::pieces::{PieceLength, TEXT_FILES, is_rows_file, piece_and_next, read_plain_text};
use super::row::Location;
use crate::storage::LineReader;
use crate::{Error, ErrorKind, Result};

/// One row: three texts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PretrainingRow {
    /// The text that is encoded. Not blank.
    pub input: String,
    /// The text whose words are predicted from the summary tokens; usually `input`. Not blank.
    pub summary: String,
    /// The text whose words are predicted from the prediction tokens: the passage that follows `input`. Blank if
    /// there is none.
    pub next: String,
}

/// Rows of pretraining data in files; the index is in memory, 24 bytes a row and 4 more for a piece of a text.
/// Texts are read from disk.
#[derive(Debug)]
pub struct PretrainingData {
    dataset: Dataset,
    /// If rows are pieces of longer texts: how they are cut, and the length of each one in bytes. The bytes of its row
    /// are the piece and the next one.
    pieces: Option<(PieceLength, Vec<u32>)>,
}

/// An example of a row in the reference's form.
const ROW: &str = "{\"input\": …, \"output_summarize\": …, \"output_predict\": …}";

impl PretrainingRow {
    /// Parses one line in the reference's form: `input`, `output_summarize`, `output_predict`. `path` and `line`
    /// (from 1) are used in errors. Unknown fields are ignored.
    ///
    /// ```
    /// # use llara::data::PretrainingRow;
    /// let line = br#"{"input": "Tin melts.", "output_summarize": "Tin melts.", "output_predict": ""}"#;
    /// assert_eq!(PretrainingRow::parse(line, "rows.jsonl", 1)?.next, "");
    /// # Ok::<(), llara::Error>(())
    /// ```
    ///
    /// # Errors
    /// The line is not UTF-8 or not a JSON object; a field is missing or not a string; or `input` or
    /// `output_summarize` is blank.
    pub fn parse(bytes: &[u8], path: impl AsRef<Path>, line: u64) -> Result<PretrainingRow> {
        let location = Location { path: path.as_ref(), line };
        let mut fields = location.fields(bytes, ROW)?;
        let mut required = |name| location.required(&mut fields, name);
        let [input, summary, next] =
            [required("input")?, required("output_summarize")?, required("output_predict")?];
        Ok(PretrainingRow {
            input: location.text("input", input)?,
            summary: location.text("output_summarize", summary)?,
            next: match next {
                serde_json::Value::String(next) => next,
                other => return Err(location.wrong_type("output_predict", "a string", &other)),
            },
        })
    }
}

impl PretrainingData {
    /// Reads and checks rows in the reference's form. Each path is a file or a folder, as for [`Dataset::open`].
    ///
    /// # Errors
    /// Those of [`Dataset::open`], for rows of this form. A blank file is a malformed row.
    pub fn open_rows(paths: &[PathBuf], on_bad_row: BadRows) -> Result<Self> {
        let dataset =
            Dataset::open_with((paths, ROW_FILES), on_bad_row, &mut |path, file, on_row| {
                let has_rows = read_lines(path, file, |line| {
                    let RowLine { number, offset, bytes } = line;
                    let checked = bytes.and_then(|bytes| {
                        PretrainingRow::parse(bytes, path, number.into()).map(|_| bytes)
                    });
                    on_row(RowLine { number, offset, bytes: checked })
                })?;
                if has_rows { Ok(()) } else { on_row(blank_file(path)) }
            })?;
        Ok(PretrainingData { dataset, pieces: None })
    }

    /// Reads texts and cuts each into consecutive pieces. A piece is a row: its own words are its summary, and the
    /// following piece of the same text is what comes next. Each path is a file, or a folder of files, with those in
    /// its subfolders. Files ending in `.jsonl` or `.json` have one object with the field `text` per line; any other
    /// file is one text.
    ///
    /// # Errors
    /// A path cannot be read; a folder has no such file; a file is compressed; a line, a piece or a file is malformed
    /// or blank and not to be skipped; or no piece remains.
    pub fn open_texts(paths: &[PathBuf], length: PieceLength, on_bad_row: BadRows) -> Result<Self> {
        let files = (paths, TEXT_FILES);
        let mut pieces = Vec::new();
        let dataset = Dataset::open_with(files, on_bad_row, &mut |path, file, on_row| {
            if !is_rows_file(path) {
                return read_plain_text(path, file, length, &mut |line, piece| {
                    pieces.extend(line.bytes.is_ok().then_some(piece));
                    on_row(line)
                });
            }
            let has_rows = read_lines(path, file, |line| {
                let RowLine { number, offset, bytes } = line;
                let bytes = match bytes {
                    Ok(bytes) => bytes,
                    Err(reason) => return on_row(RowLine { number, offset, bytes: Err(reason) }),
                };
                match text_of_line(bytes, path, number.into()) {
                    Ok(text) => length.pieces_of_line(bytes, &text).try_for_each(|piece| {
                        pieces.push(piece.length);
                        let offset = offset + piece.bytes.start as u64;
                        on_row(RowLine { number, offset, bytes: Ok(&bytes[piece.bytes]) })
                    }),
                    Err(reason) => on_row(RowLine { number, offset, bytes: Err(reason) }),
                }
            })?;
            if has_rows { Ok(()) } else { on_row(blank_file(path)) }
        })?;
        Ok(PretrainingData { dataset, pieces: Some((length, pieces)) })
    }

    /// The index of the rows: their number, files and locations.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// How texts are cut into pieces; `None` for rows in the reference's form.
    pub fn piece_length(&self) -> Option<PieceLength> {
        self.pieces.as_ref().map(|(length, _)| *length)
    }

    /// Reads a row.
    ///
    /// # Errors
    /// There is no such row, reading failed, or the file was changed since it was checked.
    pub fn row(&self, index: usize) -> Result<PretrainingRow> {
        let bytes = self.dataset.line(index)?;
        let (path, line) = self.dataset.location(index).unwrap_or((Path::new(""), 0));
        let Some((_, pieces)) = &self.pieces else {
            return PretrainingRow::parse(&bytes, path, line);
        };
        let text = match is_rows_file(path) {
            true => serde_json::from_slice(&[b"\"", &*bytes, b"\""].concat()).ok(),
            false => String::from_utf8(bytes).ok(),
        };
        let split = text.as_deref().and_then(|text| piece_and_next(text, *pieces.get(index)?));
        let Some((piece, next)) = split else {
            // The bytes are those that were checked.
            return Err(Error::new(ErrorKind::Data, "the piece is not text").line(path, line));
        };
        Ok(PretrainingRow {
            input: piece.to_owned(),
            summary: piece.to_owned(),
            next: next.to_owned(),
        })
    }
}

/// A file without a row, as a malformed row.
fn blank_file(path: &Path) -> RowLine<'static> {
    RowLine { number: 1, offset: 0, bytes: Err(no_rows(path)) }
}

/// The first characters of the texts in `paths`, about `characters` of them, to measure how long tokens are. Bad
/// lines are left out.
///
/// # Errors
/// A path cannot be read, or a folder has no file of texts.
pub fn first_characters(paths: &[PathBuf], characters: usize) -> Result<String> {
    let mut text = String::new();
    let sources: Vec<DataSource> = paths.iter().cloned().map(DataSource::from).collect();
    for (_, path) in files_of(&sources, TEXT_FILES)? {
        let file = open_data_file(&path)?;
        let failed = |e| Error::io("read training data", &path, e);
        if is_rows_file(&path) {
            let mut lines = LineReader::new(BufReader::new(&file));
            while text.len() < characters
                && let Some(line) = lines.next_line().map_err(failed)?
            {
                let of_line = |bytes| text_of_line(bytes, &path, line.number).ok();
                text.extend(line.content.and_then(of_line));
            }
        } else {
            // A text that is cut off in its last character is as good.
            let mut start = Vec::new();
            let limit = 4 * characters.saturating_sub(text.len()) as u64;
            (&file).take(limit).read_to_end(&mut start).map_err(failed)?;
            text.push_str(&String::from_utf8_lossy(&start));
        }
        if text.len() >= characters {
            break;
        }
    }
    let end = text.char_indices().nth(characters).map_or(text.len(), |(end, _)| end);
    text.truncate(end);
    Ok(text)
}

/// The field `text` of a line.
fn text_of_line(bytes: &[u8], path: &Path, line: u64) -> Result<String> {
    let location = Location { path, line };
    let mut fields = location.fields(bytes, "{\"text\": …}")?;
    let text = location.required(&mut fields, "text")?;
    location.text("text", text)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file(name: &str, text: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        (dir, path)
    }

    fn rows(data: &PretrainingData) -> Vec<(String, String)> {
        (0..data.dataset().len())
            .map(|i| {
                let row = data.row(i).unwrap();
                assert_eq!(row.input, row.summary);
                (row.input, row.next)
            })
            .collect()
    }

    #[test]
    fn rows_of_the_reference_are_read_and_bad_ones_are_refused_or_counted() {
        let good = r#"{"input": "a b", "output_summarize": "c", "output_predict": ""}"#;
        let bad = [
            r#"{"input": "a", "output_summarize": "b"}"#,
            r#"{"input": " ", "output_summarize": "b", "output_predict": "c"}"#,
            r#"{"input": "a", "output_summarize": "\t", "output_predict": "c"}"#,
            r#"{"input": "a", "output_summarize": "b", "output_predict": 3}"#,
            r#"["a"]"#,
        ];
        let (_dir, path) = file("rows.jsonl", format!("{good}\n{}\n", bad.join("\n")).as_bytes());
        let error =
            PretrainingData::open_rows(std::slice::from_ref(&path), BadRows::Error).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("rows.jsonl:2") && text.contains("`output_predict` is missing"),
            "{text}"
        );
        let data = PretrainingData::open_rows(&[path], BadRows::Skip).unwrap();
        assert_eq!((data.dataset().len(), data.dataset().skipped().count), (1, 5));
        let row = data.row(0).unwrap();
        assert_eq!((&*row.input, &*row.summary, &*row.next), ("a b", "c", ""));
    }

    #[test]
    fn a_text_is_cut_into_consecutive_pieces_in_either_form() {
        let text = "one two  three\nfour five six";
        let want =
            [("one two", "three"), ("three", "four five"), ("four five", "six"), ("six", "")];
        let length = PieceLength::new(10).unwrap();
        let (_dir, path) = file("a.txt", format!(" \n{text}\n").as_bytes());
        let plain = PretrainingData::open_texts(&[path], length, BadRows::Error).unwrap();
        let line = serde_json::json!({ "text": text }).to_string();
        let (_dir, path) = file("a.jsonl", format!("{line}\n\n{{\"text\": \"x\"}}\n").as_bytes());
        let lines = PretrainingData::open_texts(&[path], length, BadRows::Error).unwrap();
        let want: Vec<_> = want.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        assert_eq!(rows(&plain), want);
        assert_eq!(rows(&lines)[..4], want);
        assert_eq!(rows(&lines)[4], ("x".to_owned(), String::new()));
        assert_eq!(plain.dataset().location(0).unwrap().1, 2);
        assert_eq!(plain.dataset().location(2).unwrap().1, 3);
    }

    #[test]
    fn bad_texts_are_refused_or_counted() {
        let (_dir, path) =
            file("a.jsonl", b"{\"text\": \"\"}\n{\"title\": \"x\"}\n{\"text\": \"y\"}\n");
        let open = |bad| {
            PretrainingData::open_texts(
                std::slice::from_ref(&path),
                PieceLength::new(9).unwrap(),
                bad,
            )
        };
        assert!(open(BadRows::Error).unwrap_err().to_string().contains("`text` is empty"));
        let data = open(BadRows::Skip).unwrap();
        assert_eq!((data.dataset().len(), data.dataset().skipped().count), (1, 2));

        let (_dir, path) = file("a.txt", b"good text here \xff\xff\xff then more good text");
        let open = |bad| {
            PretrainingData::open_texts(
                std::slice::from_ref(&path),
                PieceLength::new(9).unwrap(),
                bad,
            )
        };
        assert!(open(BadRows::Error).unwrap_err().to_string().contains("not UTF-8"));
        let data = open(BadRows::Skip).unwrap();
        assert!(data.dataset().skipped().count > 0);
        assert!(rows(&data).iter().any(|(piece, _)| piece.contains("good")));

        let (_dir, path) = file("a.txt", b" \n ");
        let error =
            PretrainingData::open_texts(&[path], PieceLength::new(9).unwrap(), BadRows::Skip);
        assert!(error.unwrap_err().to_string().contains("no text"));
    }

    #[test]
    fn a_blank_file_is_refused_or_counted() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in
            [("1.txt", " \n"), ("2.jsonl", "\n\n"), ("3.txt", ""), ("4.txt", "some text")]
        {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let open = |bad| {
            let length = PieceLength::new(9).unwrap();
            PretrainingData::open_texts(&[dir.path().to_owned()], length, bad)
        };
        let refused = open(BadRows::Error).unwrap_err().to_string();
        assert!(refused.contains("1.txt") && refused.contains("the file has no text"), "{refused}");
        let data = open(BadRows::Skip).unwrap();
        assert_eq!((data.dataset().len(), data.dataset().skipped().count), (1, 3));
        assert_eq!(data.row(0).unwrap().input, "some text");
        assert!(data.dataset().skipped().reasons[1].contains("2.jsonl"));

        let blank = dir.path().join("2.jsonl");
        let rows = dir.path().join("5.jsonl");
        fs::write(&rows, r#"{"input": "a", "output_summarize": "a", "output_predict": ""}"#)
            .unwrap();
        let data = PretrainingData::open_rows(&[blank, rows], BadRows::Skip).unwrap();
        assert_eq!((data.dataset().len(), data.dataset().skipped().count), (1, 1));
    }

    #[test]
    fn a_row_of_a_long_line_reads_its_own_piece_only() {
        let text: String = (0..20_000).map(|i| format!("word{i} ")).collect();
        let (_dir, path) =
            file("a.jsonl", serde_json::json!({ "text": text }).to_string().as_bytes());
        let length = PieceLength::new(40).unwrap();
        let data = PretrainingData::open_texts(&[path], length, BadRows::Error).unwrap();
        let rows = data.dataset().len();
        assert!(rows > 4_000);
        let bytes: usize = (0..rows).map(|i| data.dataset().line(i).unwrap().len()).sum();
        // Each piece is in its own row and in that of the piece before it.
        assert!(bytes <= 2 * text.len(), "{bytes} {}", text.len());
        let row = data.row(rows / 2).unwrap();
        assert!(text.contains(&format!("{} {}", row.input, row.next)), "{row:?}");
    }

    #[test]
    fn the_first_characters_are_those_of_a_long_line_too() {
        let text = "long words ".repeat(200_000);
        let (_dir, path) =
            file("a.jsonl", serde_json::json!({ "text": text }).to_string().as_bytes());
        assert_eq!(first_characters(&[path], 1000).unwrap(), text[..1000]);
        let (_dir, path) = file("a.jsonl", b"bad\n{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
        assert_eq!(first_characters(&[path], 5).unwrap(), "onetw");
    }

    #[test]
    fn more_files_than_a_process_may_open_are_read() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..1100 {
            fs::write(dir.path().join(format!("{i:04}.txt")), format!("text {i}")).unwrap();
        }
        let length = PieceLength::new(99).unwrap();
        let paths = [dir.path().to_owned()];
        let data = PretrainingData::open_texts(&paths, length, BadRows::Error).unwrap();
        let descriptors = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
        assert!(descriptors < 1000, "{descriptors} files are open");
        assert!((0..1100).all(|i| data.row(i).unwrap().input == format!("text {i}")));
        // A file that is opened again must not have changed.
        fs::write(dir.path().join("1099.txt"), "text 1o99").unwrap();
        assert!(data.row(1099).unwrap_err().to_string().contains("the file was changed"));
        fs::remove_file(dir.path().join("1098.txt")).unwrap();
        assert!(data.row(1098).unwrap_err().to_string().contains("1098.txt"));
    }
}
