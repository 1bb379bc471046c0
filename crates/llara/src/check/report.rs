//! The result of a check: findings about files, and which tools can serve the folder.

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::Error;

/// How a finding affects the use of the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Usable, but some tool or text may get an unexpected result.
    Warning,
    /// Loading fails or gives wrong embeddings.
    Error,
}

/// One property of the folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// How it affects the use of the folder.
    pub status: Status,
    /// What was checked: `folder`, `checkpoint`, `config`, `weights`, `tokenizer`, `recipe`, `template`,
    /// `adapter`, `probes` or `sentence-transformers`.
    pub check: &'static str,
    /// The file, relative to the folder, with the line or tensor.
    pub file: String,
    /// The finding in one line.
    pub what: String,
    /// The valid values.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// The value that was found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub got: Option<String>,
    /// How to fix it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Finding {
    pub(super) fn new(status: Status, check: &'static str, file: &str, what: String) -> Self {
        let (expected, got, hint) = (None, None, None);
        Finding { status, check, file: file.to_owned(), what, expected, got, hint }
    }

    pub(super) fn expected(mut self, expected: impl ToString) -> Self {
        self.expected = Some(expected.to_string());
        self
    }

    pub(super) fn got(mut self, got: impl ToString) -> Self {
        self.got = Some(got.to_string());
        self
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Whether a tool gives the embeddings of this folder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tool {
    /// `transformers`, `peft`, `sentence-transformers` or `text-embeddings-inference`.
    pub name: &'static str,
    /// Whether the tool gives the same embeddings.
    pub serves: bool,
    /// What must be set, or is set in the folder: pooling, prompts, lengths.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub settings: Map<String, Value>,
    /// Why it does not serve the folder, or what to observe.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// What to do instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// What a folder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FolderKind {
    /// A model.
    Model,
    /// An adapter.
    Adapter,
    /// Neither.
    Unknown,
}

/// The result of [`check_folder`](super::check_folder).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// What the folder is.
    pub kind: FolderKind,
    /// Whether it is a checkpoint of a training run.
    pub checkpoint: bool,
    /// In the order of the checks.
    pub findings: Vec<Finding>,
    /// Tools that load such folders.
    pub tools: Vec<Tool>,
}

impl Report {
    /// Number of findings with this status.
    pub fn count(&self, status: Status) -> usize {
        self.findings.iter().filter(|finding| finding.status == status).count()
    }
}

/// The largest number of findings of one kind; a model of another size has hundreds.
const MOST_OF_A_KIND: usize = 20;

/// Collects findings about a folder.
pub(super) struct Findings<'d> {
    pub(super) dir: &'d Path,
    pub(super) list: Vec<Finding>,
}

impl<'d> Findings<'d> {
    pub(super) fn new(dir: &'d Path) -> Self {
        Findings { dir, list: Vec::new() }
    }

    pub(super) fn push(&mut self, finding: Finding) {
        self.list.push(finding);
    }

    pub(super) fn ok(&mut self, check: &'static str, file: &str, what: impl Into<String>) {
        self.push(Finding::new(Status::Ok, check, file, what.into()));
    }

    /// Adds an error of the library, with its file relative to the folder.
    pub(super) fn fail(&mut self, check: &'static str, error: &Error) {
        self.add_error(Status::Error, check, error);
    }

    /// [`fail`](Self::fail) with another status.
    pub(super) fn add_error(&mut self, status: Status, check: &'static str, error: &Error) {
        let parts = error.parts();
        let location = parts.location.unwrap_or_default();
        let dir = self.dir.display().to_string();
        let relative = location.strip_prefix(&dir).map(|rest| rest.trim_start_matches('/'));
        let file = match relative {
            Some("") => ".",
            Some(relative) => relative,
            None => &location,
        };
        let finding = Finding::new(status, check, file, parts.what);
        let text = |text: Option<&str>| text.map(str::to_owned);
        let (expected, got, hint) = (text(parts.expected), text(parts.got), text(parts.hint));
        self.push(Finding { expected, got, hint, ..finding });
    }

    /// Adds the first 20 of many findings of one kind, and the number of the others.
    pub(super) fn push_many(&mut self, mut findings: Vec<Finding>) {
        let more = findings.len().saturating_sub(MOST_OF_A_KIND);
        findings.truncate(MOST_OF_A_KIND);
        let last = findings.last().cloned();
        self.list.extend(findings);
        if let Some(last) = last.filter(|_| more > 0) {
            let what = format!("{more} more like these");
            self.push(Finding { what, expected: None, got: None, ..last });
        }
    }

    /// Whether one of these checks has found an error.
    pub(super) fn has_errors(&self, checks: &[&str]) -> bool {
        let error = |f: &Finding| f.status == Status::Error && checks.contains(&f.check);
        self.list.iter().any(error)
    }
}
