//! An inspection: rows are counted in parallel while they are read, and hashes, signatures and a sample of
//! them are kept, in bounded memory; afterwards these are compared.

use std::path::PathBuf;

use rayon::prelude::*;

use super::duplicates::{Passages, Repeated};
use super::example::{Example, Found, Subject};
use super::finding::Finding;
use super::near::NearSample;
use super::progress::{Phase, Progress};
use super::record::{Record, Side, text_hash};
use super::report::{
    Basis, ByRole, ExampleReport, FileReport, FindingReport, LengthReport, OtherRow, Report,
    RoleLengths, SampleSize, TextCounts, TokenLengths,
};
use super::settings::Settings;
use super::sorter::Sorter;
use super::sources::{Rows, Sources};
use super::special_tokens::SpecialTokens;
use super::tally::{Counting, Line, RoleCounts, Tally};
use super::tokens::{RowSample, TokenCounts};
use crate::data::{
    BadRows, DataSources, Dataset, TrainingRow, data_files, open_data_file, read_rows,
};
use crate::{Error, Result};

/// Bytes of lines that are counted at a time. One longer line is a batch of its own.
const BATCH_BYTES: usize = 4 << 20;

/// Number of lines that a thread counts at a time.
const CHUNK_LINES: usize = 32;

/// Numbers of records of rows, queries and passages in memory: 8, 8 and 32 MiB.
const RECORDS: [usize; 3] = [1 << 18, 1 << 18, 1 << 20];

/// Number of records between two reports of progress.
const PROGRESS_RECORDS: u64 = 1 << 18;

/// The longest part of a text in an example, in characters.
const PREVIEW_CHARS: usize = 80;

/// Inspects training data. Memory does not grow
/// with the size of the data, except by 16 bytes for each MiB and the temporary files, which
/// [`Settings::temp_dir`] describes. All counts are exact unless their [`Basis`] says otherwise: equal texts
/// are found by 128 bits of their BLAKE3 hashes.
///
/// ```
/// # use llara::data::DataSources;
/// # use llara::inspect::{Finding, Settings, inspect};
/// # use llara::text::Template;
/// # let folder = tempfile::tempdir().unwrap();
/// # let path = folder.path().join("rows.jsonl");
/// # std::fs::write(&path, r#"{"query": "what do bees eat", "pos": ["Bees eat nectar."]}"#).unwrap();
/// let settings = Settings { group_size: 2, ..Settings::new(Template::preset("llara")?) };
/// let report = inspect(&DataSources::read(&[path])?, &settings, &mut |_| {})?;
/// assert_eq!(report.finding(Finding::NoNegatives).count, 1);
/// # Ok::<(), llara::Error>(())
/// ```
///
/// # Errors
/// A path cannot be read; a folder has no data; a file is empty, compressed or one JSON array; a row is
/// malformed and [`Settings::on_bad_row`] is [`BadRows::Error`]; a sampled row cannot be tokenized; or the
/// temporary files cannot be written.
pub fn inspect(
    data: &DataSources,
    settings: &Settings,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report> {
    inspect_with(data, settings, RECORDS, progress)
}

/// [`inspect`] with these numbers of records of rows, queries and passages in memory.
pub(super) fn inspect_with(
    data: &DataSources,
    settings: &Settings,
    records: [usize; 3],
    progress: &mut dyn FnMut(Progress),
) -> Result<Report> {
    let special_tokens = SpecialTokens::new(&settings.special_tokens())?;
    let mut inspector = Inspector::new(settings, &special_tokens, records);
    let mut sources = Sources::default();
    let opened = data_files(&data.sources)?.into_iter().map(|(source, path)| {
        let file = open_data_file(&path)?;
        let bytes = file.metadata().map_err(|e| Error::io("read training data", &path, e))?.len();
        // Closed again: there may be more files than can be open at a time.
        Ok((source, path, bytes))
    });
    let files: Vec<(usize, PathBuf, u64)> = opened.collect::<Result<_>>()?;
    let total: u64 = files.iter().map(|(_, _, bytes)| bytes).sum();
    let mut before = 0;
    for (source, path, bytes) in files {
        let file = open_data_file(&path)?;
        sources.start(&path, &data.sources[source]);
        inspector.start_file(path.clone());
        let mut batch = Batch::default();
        read_rows(&path, &file, |line| {
            let place = sources.add(line.offset, line.number.into());
            batch.add(place, line.number.into(), line.bytes);
            if batch.bytes.len() >= BATCH_BYTES {
                inspector.add(batch.take(&path))?;
                batch.clear();
                let done = (before + line.offset).min(total);
                progress(Progress { phase: Phase::Reading, done, total });
            }
            Ok(())
        })?;
        inspector.add(batch.take(&path))?;
        before += bytes;
    }
    progress(Progress { phase: Phase::Reading, done: total, total });
    inspector.finish(&sources, progress)
}

/// Inspects the first rows of a dataset, up to `max_bytes` of their lines.
///
/// # Errors
/// A row cannot be read or tokenized, or the dataset was changed.
pub fn inspect_first_rows(
    dataset: &Dataset,
    settings: &Settings,
    max_bytes: usize,
) -> Result<Report> {
    let special_tokens = SpecialTokens::new(&settings.special_tokens())?;
    let mut inspector = Inspector::new(settings, &special_tokens, RECORDS);
    inspector.start_file(PathBuf::new());
    let mut batch = Batch::default();
    for index in 0..dataset.len() {
        let bytes = dataset.line(index)?;
        if !batch.bytes.is_empty() && batch.bytes.len() + bytes.len() > max_bytes {
            break;
        }
        batch.add(index as u64, 0, Ok(&bytes));
    }
    inspector.add(batch.take(&PathBuf::new()))?;
    inspector.finish(&dataset, &mut |_| {})
}

/// Lines that are counted together.
#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Place, line number, and the end of the line in `bytes`.
    lines: Vec<(u64, u64, Result<usize>)>,
}

impl Batch {
    fn add(&mut self, place: u64, number: u64, bytes: Result<&[u8]>) {
        let end = bytes.map(|bytes| {
            self.bytes.extend(bytes);
            self.bytes.len()
        });
        self.lines.push((place, number, end));
    }

    /// The lines, which are in the file `path`.
    fn take<'b>(&'b mut self, path: &'b std::path::Path) -> Vec<Line<'b>> {
        let mut start = 0;
        let bytes = &self.bytes;
        let lines = std::mem::take(&mut self.lines).into_iter();
        let line = |(place, number, end): (u64, u64, Result<usize>)| {
            let bytes = end.map(|end| &bytes[std::mem::replace(&mut start, end)..end]);
            Line { place, path, number, bytes }
        };
        lines.map(line).collect()
    }

    fn clear(&mut self) {
        self.bytes.clear();
        // After an unusually long line.
        self.bytes.shrink_to(2 * BATCH_BYTES);
    }
}

/// What is kept of the rows so far.
struct Inspector<'s> {
    settings: &'s Settings,
    special_tokens: &'s SpecialTokens,
    tally: Tally,
    files: Vec<FileReport>,
    rows: Sorter,
    queries: Sorter,
    passages: Sorter,
    /// Rows, queries, passages.
    near: [NearSample; 3],
    sample: RowSample,
}

impl<'s> Inspector<'s> {
    fn new(settings: &'s Settings, special_tokens: &'s SpecialTokens, records: [usize; 3]) -> Self {
        let [rows, queries, passages] =
            records.map(|records| Sorter::new(&settings.temp_dir, records));
        Inspector {
            settings,
            special_tokens,
            tally: Tally::default(),
            files: Vec::new(),
            rows,
            queries,
            passages,
            near: std::array::from_fn(|_| NearSample::new()),
            sample: RowSample::new(settings.sample_rows),
        }
    }

    fn start_file(&mut self, path: PathBuf) {
        self.files.push(FileReport { path, rows: 0, malformed_rows: 0 });
    }

    /// Counts lines of the last file.
    fn add(&mut self, lines: Vec<Line<'_>>) -> Result<()> {
        let counting = Counting {
            settings: self.settings,
            special_tokens: self.special_tokens,
            end_keys: std::array::from_fn(|i| self.near[i].end_key()),
        };
        let mut chunks: Vec<Vec<Line<'_>>> = Vec::new();
        for line in lines {
            match chunks.last_mut().filter(|chunk| chunk.len() < CHUNK_LINES) {
                Some(chunk) => chunk.push(line),
                None => chunks.push(vec![line]),
            }
        }
        let tallies: Vec<Result<Tally>> = chunks
            .into_par_iter()
            .map(|lines| {
                let mut tally = Tally::default();
                for line in lines {
                    let counted = tally.add(line, &counting);
                    if self.settings.on_bad_row == BadRows::Error {
                        counted?;
                    }
                }
                Ok(tally)
            })
            .collect();
        for tally in tallies {
            self.merge(tally?)?;
        }
        Ok(())
    }

    fn merge(&mut self, mut tally: Tally) -> Result<()> {
        if let Some(file) = self.files.last_mut() {
            file.rows += tally.rows;
            file.malformed_rows += tally.found(Finding::MalformedRows).count;
        }
        for records in std::mem::take(&mut tally.records) {
            self.sample.add(records.row.place());
            self.rows.add(records.row)?;
            self.queries.add(records.query)?;
            records.passages.into_iter().try_for_each(|record| self.passages.add(record))?;
        }
        let candidates = std::mem::take(&mut tally.candidates);
        for (sample, candidates) in self.near.iter_mut().zip(candidates) {
            sample.add(candidates);
        }
        self.tally.merge(tally);
        Ok(())
    }

    /// Compares what was kept. Examples are read again from `data`.
    fn finish(mut self, data: &impl Rows, progress: &mut dyn FnMut(Progress)) -> Result<Report> {
        let Tally { rows, positives, negatives, .. } = self.tally;
        let total = 2 * rows + positives + negatives;
        let mut done = 0;
        let mut compare = |sorter: Sorter, add: &mut dyn FnMut(Record)| {
            sorter.for_each(|record| {
                if done % PROGRESS_RECORDS == 0 {
                    progress(Progress { phase: Phase::Comparing, done, total });
                }
                done += 1;
                add(record);
            })
        };
        let mut equal_rows = Repeated::new(Subject::Row);
        compare(self.rows, &mut |record| equal_rows.add(record))?;
        let mut equal_queries = Repeated::new(Subject::Query);
        compare(self.queries, &mut |record| equal_queries.add(record))?;
        let mut passages = Passages::default();
        compare(self.passages, &mut |record| passages.add(record))?;
        let passages = passages.finish();

        let mut bases = [Basis::All; Finding::ALL.len()];
        let mut of = self.tally.totals();
        let mut set = |finding: Finding, found| self.tally.found[finding as usize] = found;
        set(Finding::DuplicateRows, equal_rows.repeated);
        set(Finding::DuplicateQueries, equal_queries.repeated);
        set(Finding::DuplicatePassages, passages.in_rows);
        set(Finding::DuplicatePassagesInRow, passages.in_row);
        set(Finding::PositiveInNegatives, passages.same_row);
        set(Finding::PositiveInNegativesOfEqualQuery, passages.equal_query);
        set(Finding::PositiveInNegativesOfOtherQuery, passages.other_query);

        let kinds = [
            Finding::NearDuplicateRows,
            Finding::NearDuplicateQueries,
            Finding::NearDuplicatePassages,
        ];
        for (finding, sample) in kinds.into_iter().zip(&self.near) {
            let found = sample.search();
            of[finding as usize] = sample.len() as u64;
            bases[finding as usize] = match sample.fraction() {
                _ if !self.settings.near_duplicates => Basis::NotChecked,
                1.0 => Basis::All,
                fraction => Basis::sample(fraction, found.count),
            };
            set(finding, found);
        }
        drop(self.near);

        let [truncated_queries, truncated_passages] =
            [Finding::TruncatedQueries, Finding::TruncatedPassages];
        let (mut tokens, mut tokenized) = (None, None);
        if let Some(prompts) = &self.settings.prompts {
            let places = self.sample.places();
            let sampled = places.len() as u64;
            let counts = TokenCounts::new(&places, data, prompts, self.settings, progress)?;
            for (finding, lengths, found) in [
                (truncated_queries, &counts.query, &counts.truncated_queries),
                (truncated_passages, &counts.passage, &counts.truncated_passages),
            ] {
                of[finding as usize] = lengths.texts();
                if sampled < rows {
                    let fraction = sampled as f64 / rows as f64;
                    bases[finding as usize] = Basis::sample(fraction, found.count);
                }
                set(finding, found.clone());
            }
            tokenized = Some(SampleSize { rows: sampled, of: rows });
            tokens = Some(counts);
        } else {
            bases[truncated_queries as usize] = Basis::NotChecked;
            bases[truncated_passages as usize] = Basis::NotChecked;
        }

        let settings = self.settings;
        let query_tokens =
            tokens.as_ref().map(|t| TokenLengths::new(&t.query, settings.query_max_len));
        let passage_tokens =
            tokens.as_ref().map(|t| TokenLengths::new(&t.passage, settings.passage_max_len));
        let found = std::mem::take(&mut self.tally.found);
        let findings = Finding::ALL.into_iter().zip(found).zip(bases).zip(of);
        let findings = findings.map(|(((finding, found), basis), of)| {
            let Found { count, examples } = found;
            let described = examples.iter().map(|example| describe(example, data));
            let examples = described.collect::<Result<_>>()?;
            Ok(FindingReport { finding, count, of, basis, examples })
        });
        Ok(Report {
            rows,
            findings: findings.collect::<Result<_>>()?,
            files: self.files,
            texts: TextCounts {
                queries: rows,
                distinct_queries: equal_queries.distinct,
                positives,
                negatives,
                distinct_passages: passages.distinct,
            },
            lengths: ByRole {
                query: lengths(&self.tally.query, query_tokens),
                passage: lengths(&self.tally.passage, passage_tokens),
            },
            tokenized,
            scripts: ByRole {
                query: self.tally.query.scripts.shares(),
                passage: self.tally.passage.scripts.shares(),
            },
            special_tokens: self.tally.special_tokens,
        })
    }
}

fn lengths(counts: &RoleCounts, tokens: Option<TokenLengths>) -> RoleLengths {
    RoleLengths {
        characters: LengthReport::new(&counts.characters),
        words: LengthReport::new(&counts.words),
        tokens,
    }
}

/// Finds the file, the line and the text of an example.
fn describe(example: &Example, data: &impl Rows) -> Result<ExampleReport> {
    let (path, line) = data.location(example.place)?;
    let (field, text) = match example.subject {
        Subject::Row => (None, None),
        subject => match find(subject, &data.row(example.place)?) {
            Some((field, text)) => (Some(field), Some(text)),
            None => (None, None),
        },
    };
    let other = example.other.map(|place| {
        data.location(place).map(|(file, line)| OtherRow { file: file.to_owned(), line })
    });
    Ok(ExampleReport {
        file: path.to_owned(),
        line,
        field,
        text,
        other: other.transpose()?,
        detail: example.detail.clone(),
    })
}

/// The name and the beginning of a text of a row.
fn find(subject: Subject, row: &TrainingRow) -> Option<(String, String)> {
    let at = |side, index: usize| {
        let (name, texts) = match side {
            Side::Pos => ("pos", &row.pos),
            Side::Neg => ("neg", &row.neg),
        };
        Some((format!("{name}[{index}]"), preview(texts.get(index)?)))
    };
    match subject {
        Subject::Row => None,
        Subject::Query => Some(("query".to_owned(), preview(&row.query))),
        Subject::Passage(side, index) => at(side, index),
        Subject::Hash(side, hash) => {
            let lists =
                [(side, true), (Side::Pos, side == Side::Neg), (Side::Neg, side == Side::Pos)];
            lists.into_iter().filter(|(_, searched)| *searched).find_map(|(side, _)| {
                let texts = if side == Side::Pos { &row.pos } else { &row.neg };
                at(side, texts.iter().position(|text| text_hash(text) == hash)?)
            })
        }
    }
}

fn preview(text: &str) -> String {
    match text.char_indices().nth(PREVIEW_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
