//! The result of an inspection.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::finding::Finding;
use super::text_stats::ScriptShare;
use crate::data::{Histogram, LengthSummary, Lengths};

/// What an inspection found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Number of well-formed rows.
    pub rows: u64,
    /// The files, in the order in which they were read.
    pub files: Vec<FileReport>,
    /// Numbers of texts.
    pub texts: TextCounts,
    /// Lengths of queries and passages.
    pub lengths: ByRole<RoleLengths>,
    /// The rows that were tokenized; `None` without a tokenizer.
    pub tokenized: Option<SampleSize>,
    /// Unicode scripts, the most frequent one first.
    pub scripts: ByRole<Vec<ScriptShare>>,
    /// Number of texts by the special token that they contain.
    pub special_tokens: BTreeMap<String, u64>,
    /// One entry for each kind of finding, in the order of [`Finding::ALL`]. In JSON it is an object whose
    /// keys are the names.
    #[serde(serialize_with = "by_name")]
    pub findings: Vec<FindingReport>,
}

/// The rows of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The path, as it was given or found.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Number of well-formed rows.
    pub rows: u64,
    /// Number of malformed rows.
    pub malformed_rows: u64,
}

/// Numbers of texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TextCounts {
    /// All queries: one for each row.
    pub queries: u64,
    /// Different queries; equal ones with different `prompt` are different.
    pub distinct_queries: u64,
    /// All positives.
    pub positives: u64,
    /// All negatives.
    pub negatives: u64,
    /// Different passages, positives and negatives together.
    pub distinct_passages: u64,
}

/// One value for queries and one for passages.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ByRole<T> {
    /// For queries.
    pub query: T,
    /// For passages.
    pub passage: T,
}

/// Lengths of the texts of one role.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RoleLengths {
    /// Number of characters, of all texts.
    pub characters: LengthReport,
    /// Number of words, of all texts.
    pub words: LengthReport,
    /// Number of tokens, template included, of the texts in the tokenized rows; `None` without a tokenizer.
    pub tokens: Option<TokenLengths>,
}

/// Statistics and a histogram.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LengthReport {
    /// Statistics.
    #[serde(flatten)]
    pub summary: LengthSummary,
    /// Number of texts in ranges of equal width.
    pub histogram: Histogram,
}

/// Lengths in tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenLengths {
    /// Maximum length.
    pub max_len: usize,
    /// Number of longer texts, which are truncated.
    pub truncated: u64,
    /// Fraction of the texts that are truncated.
    pub truncated_share: f64,
    /// Statistics and a histogram.
    #[serde(flatten)]
    pub lengths: LengthReport,
}

/// The size of a random sample of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SampleSize {
    /// Rows in the sample.
    pub rows: u64,
    /// All rows.
    pub of: u64,
}

/// The number of findings of one kind.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FindingReport {
    /// The kind.
    #[serde(skip)]
    pub finding: Finding,
    /// How many were found.
    pub count: u64,
    /// The number of rows or texts among which they were found.
    pub of: u64,
    /// Whether this is all of the data.
    #[serde(flatten)]
    pub basis: Basis,
    /// The first ones in the order of the data.
    pub examples: Vec<ExampleReport>,
}

/// What a count is based on.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "basis", rename_all = "snake_case")]
pub enum Basis {
    /// All rows. For near duplicates: all texts were searched. Pairs of similarity 0.8 are compared with a
    /// probability of 99.9 %; the similarity of texts with more than 128 shingles is estimated, with a standard
    /// error of 0.05.
    All,
    /// A sample. `count` and `of` are those of the sample.
    Sample {
        /// The fraction of all rows (tokens) or texts (near duplicates) that is in the sample.
        fraction: f64,
        /// The estimated number in all data. For near duplicates it is too low by about a tenth: a pair of
        /// similarity s is in the sample together with probability s.
        estimate: u64,
    },
    /// Not checked, because there is no tokenizer or because near duplicates were not asked for.
    NotChecked,
}

/// An example of a finding.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ExampleReport {
    /// The file of the row.
    #[serde(serialize_with = "lossy")]
    pub file: PathBuf,
    /// The line of the row, from 1.
    pub line: u64,
    /// The text in the row: `query`, `pos[0]` or `neg[3]`; `None` if the finding is about the row.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The beginning of the text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// File and line of the other row, if the finding is about a pair.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other: Option<OtherRow>,
    /// What was found: the reason, the token, the length, the similarity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The other row of a pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OtherRow {
    /// Its file.
    #[serde(serialize_with = "lossy")]
    pub file: PathBuf,
    /// Its line, from 1.
    pub line: u64,
}

impl Report {
    /// The entry of a kind of finding.
    pub fn finding(&self, finding: Finding) -> &FindingReport {
        &self.findings[finding as usize]
    }
}

impl Basis {
    /// A sample of this fraction in which `count` were found.
    pub(super) fn sample(fraction: f64, count: u64) -> Self {
        Basis::Sample { fraction, estimate: (count as f64 / fraction).round() as u64 }
    }
}

impl LengthReport {
    /// Number of bins of a histogram.
    const BINS: usize = 12;

    pub(super) fn new(lengths: &Lengths) -> Self {
        LengthReport { summary: lengths.summary(), histogram: lengths.histogram(Self::BINS) }
    }
}

impl TokenLengths {
    pub(super) fn new(lengths: &Lengths, max_len: usize) -> Self {
        let truncated = lengths.longer_than(max_len);
        let truncated_share = truncated as f64 / lengths.texts().max(1) as f64;
        TokenLengths { max_len, truncated, truncated_share, lengths: LengthReport::new(lengths) }
    }
}

/// A path that is not UTF-8 cannot be a JSON string.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

fn by_name<S: Serializer>(findings: &[FindingReport], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(findings.len()))?;
    for report in findings {
        map.serialize_entry(report.finding.name(), report)?;
    }
    map.end()
}
