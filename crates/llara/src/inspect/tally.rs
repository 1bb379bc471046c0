//! What is counted while rows are read: sums that do not depend on how the rows are divided.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::example::{Example, Found, Subject};
use super::finding::Finding;
use super::minhash::Shingles;
use super::near::Candidate;
use super::record::{Place, RowRecords, Side, text_hash};
use super::settings::Settings;
use super::special_tokens::SpecialTokens;
use super::text_stats::{ScriptCounts, measure};
use crate::Result;
use crate::data::{Lengths, TrainingRow};

/// A line to count.
pub(super) struct Line<'l> {
    pub(super) place: Place,
    pub(super) path: &'l Path,
    pub(super) number: u64,
    /// The text, or the error if it is too long.
    pub(super) bytes: Result<&'l [u8]>,
}

/// What rows are counted with.
pub(super) struct Counting<'s> {
    pub(super) settings: &'s Settings,
    pub(super) special_tokens: &'s SpecialTokens,
    /// Texts with a key below this are candidates for near duplicates: rows, queries, passages.
    pub(super) end_keys: [u64; 3],
}

/// Counts of one role.
#[derive(Debug, Default)]
pub(super) struct RoleCounts {
    pub(super) characters: Lengths,
    pub(super) words: Lengths,
    pub(super) scripts: ScriptCounts,
}

/// Counts and records of some rows.
#[derive(Default)]
pub(super) struct Tally {
    /// Well-formed rows.
    pub(super) rows: u64,
    pub(super) positives: u64,
    pub(super) negatives: u64,
    pub(super) query: RoleCounts,
    pub(super) passage: RoleCounts,
    /// Number of texts by the special token that they contain.
    pub(super) special_tokens: BTreeMap<String, u64>,
    /// By [`Finding`].
    pub(super) found: [Found; Finding::ALL.len()],
    /// For the search for duplicates, in the order of the rows.
    pub(super) records: Vec<RowRecords>,
    /// Candidates for near duplicates, in the order of the rows: rows, queries, passages.
    pub(super) candidates: [Vec<Candidate>; 3],
}

impl Tally {
    /// Counts a line.
    ///
    /// # Errors
    /// The row is malformed. It is counted nevertheless.
    pub(super) fn add(&mut self, line: Line<'_>, counting: &Counting<'_>) -> Result<()> {
        let Line { place, path, number, bytes } = line;
        let parse = |bytes| TrainingRow::parse(bytes, path, number).map_err(|e| (e, Some(bytes)));
        match bytes.map_err(|e| (e, None)).and_then(parse) {
            Ok(row) => {
                self.add_row(place, &row, counting);
                Ok(())
            }
            Err((error, bytes)) => {
                let message = error.to_string();
                let location = format!("{}:{number}: ", path.display());
                let reason = message.strip_prefix(&location).unwrap_or(&message);
                let reason = reason.replace("\n  ", "; ");
                let example = Example::new(place, Subject::Row).detail(reason);
                self.found(Finding::MalformedRows).add(example);
                let empty = bytes.map_or(0, empty_texts);
                if empty > 0 {
                    let found = self.found(Finding::EmptyTexts);
                    found.count += empty;
                    let detail = "in a malformed row".to_owned();
                    found.keep(Example::new(place, Subject::Row).detail(detail));
                }
                Err(error)
            }
        }
    }

    /// Adds the counts of `other`, without records and candidates.
    pub(super) fn merge(&mut self, other: Tally) {
        self.rows += other.rows;
        self.positives += other.positives;
        self.negatives += other.negatives;
        for (role, other) in [(&mut self.query, &other.query), (&mut self.passage, &other.passage)]
        {
            role.characters.merge(&other.characters);
            role.words.merge(&other.words);
            role.scripts.merge(&other.scripts);
        }
        for (token, texts) in other.special_tokens {
            *self.special_tokens.entry(token).or_default() += texts;
        }
        for (found, other) in self.found.iter_mut().zip(other.found) {
            found.merge(other);
        }
    }

    /// For each [`Finding`], the number of rows or texts among which it is found.
    pub(super) fn totals(&self) -> [u64; Finding::ALL.len()] {
        let passages = self.positives + self.negatives;
        Finding::ALL.map(|finding| match finding {
            Finding::MalformedRows => self.rows + self.found[finding as usize].count,
            Finding::EmptyTexts | Finding::OneWordTexts | Finding::SpecialTokens => {
                self.rows + passages
            }
            Finding::DuplicateRows
            | Finding::DuplicateQueries
            | Finding::NoNegatives
            | Finding::FewNegatives => self.rows,
            Finding::DuplicatePassages | Finding::DuplicatePassagesInRow => passages,
            Finding::PositiveInNegatives
            | Finding::PositiveInNegativesOfEqualQuery
            | Finding::PositiveInNegativesOfOtherQuery => self.negatives,
            // Known when the samples are complete.
            Finding::NearDuplicateRows
            | Finding::NearDuplicateQueries
            | Finding::NearDuplicatePassages
            | Finding::TruncatedQueries
            | Finding::TruncatedPassages => 0,
        })
    }

    pub(super) fn found(&mut self, finding: Finding) -> &mut Found {
        &mut self.found[finding as usize]
    }

    fn add_row(&mut self, place: Place, row: &TrainingRow, counting: &Counting<'_>) {
        self.rows += 1;
        self.positives += row.pos.len() as u64;
        self.negatives += row.neg.len() as u64;
        let lists = [(Side::Pos, &row.pos), (Side::Neg, &row.neg)];
        let passages = || {
            lists.into_iter().flat_map(|(side, texts)| {
                texts.iter().enumerate().map(move |(i, text)| (Subject::Passage(side, i), text))
            })
        };
        self.add_text(place, Subject::Query, &row.query, counting);
        passages().for_each(|(subject, text)| self.add_text(place, subject, text, counting));

        let needed = counting.settings.group_size.saturating_sub(1);
        if row.neg.len() < needed {
            let finding =
                if row.neg.is_empty() { Finding::NoNegatives } else { Finding::FewNegatives };
            let detail = format!("{} of {needed}", row.neg.len());
            self.found(finding).add(Example::new(place, Subject::Row).detail(detail));
        }
        let records = RowRecords::new(row, place);
        if counting.settings.near_duplicates {
            self.add_candidates(row, &records, counting, passages());
        }
        self.records.push(records);
    }

    fn add_text(&mut self, place: Place, subject: Subject, text: &str, counting: &Counting<'_>) {
        let role = match subject {
            Subject::Query => &mut self.query,
            _ => &mut self.passage,
        };
        let size = measure(text, &mut role.scripts);
        role.characters.add(size.characters);
        role.words.add(size.words);
        match size.words {
            0 => self.found(Finding::EmptyTexts).add(Example::new(place, subject)),
            1 => self.found(Finding::OneWordTexts).add(Example::new(place, subject)),
            _ => {}
        }
        if let Some(token) = counting.special_tokens.find(text, &mut self.special_tokens) {
            let example = Example::new(place, subject).detail(token.to_owned());
            self.found(Finding::SpecialTokens).add(example);
        }
    }

    fn add_candidates<'r>(
        &mut self,
        row: &TrainingRow,
        records: &RowRecords,
        counting: &Counting<'_>,
        passages: impl Iterator<Item = (Subject, &'r String)>,
    ) {
        let place = records.row.place();
        let [end_row, end_query, end_passage] = counting.end_keys;
        let [rows, queries, all_passages] = &mut self.candidates;
        let add = |to: &mut Vec<Candidate>, end, subject, hash: u64, shingles: Shingles| {
            let signature = shingles.signature();
            if u64::from(signature.key()) < end {
                to.push(Candidate { place, subject, hash, signature });
            }
        };
        // The row's shingles are those of its query and its positives.
        let mut whole = Shingles::new(&row.query);
        let mut hash = blake3::Hasher::new();
        let mut add_to_hash = |text: u128| {
            hash.update(&text.to_le_bytes());
        };
        let query_hash = text_hash(&row.query);
        add_to_hash(query_hash);
        if let Some(shingles) = whole.clone() {
            add(queries, end_query, Subject::Query, query_hash as u64, shingles);
        }
        for ((subject, text), record) in passages.zip(&records.passages) {
            let text_hash = record.hash;
            let shingles = Shingles::new(text);
            if let Subject::Passage(Side::Pos, _) = subject {
                add_to_hash(text_hash);
                match (&mut whole, &shingles) {
                    (Some(whole), Some(shingles)) => whole.add_all(shingles),
                    (none, shingles) => *none = none.take().or_else(|| shingles.clone()),
                }
            }
            if let Some(shingles) = shingles {
                add(all_passages, end_passage, subject, text_hash as u64, shingles);
            }
        }
        if let Some(whole) = whole {
            let hash = hash.finalize();
            let short = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            add(rows, end_row, Subject::Row, short, whole);
        }
    }
}

/// The number of texts without a letter or a digit in a malformed row, as far as it can be read.
fn empty_texts(bytes: &[u8]) -> u64 {
    let Ok(Value::Object(fields)) = serde_json::from_slice(bytes) else { return 0 };
    let is_empty = |value: &Value| match value {
        Value::String(text) => u64::from(!text.contains(char::is_alphanumeric)),
        _ => 0,
    };
    let of_field = |name: &str| match fields.get(name) {
        Some(Value::Array(texts)) => texts.iter().map(is_empty).sum(),
        Some(text) => is_empty(text),
        None => 0,
    };
    ["query", "pos", "neg"].into_iter().map(of_field).sum()
}
