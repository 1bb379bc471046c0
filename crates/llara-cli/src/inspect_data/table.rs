//! The report of an inspection as a table, and its short form for `llara finetune`.

use std::path::Path;

use llara::inspect::{
    Basis, ByRole, ExampleReport, Finding, FindingReport, LengthReport, Report, RoleLengths,
    ScriptShare, Settings,
};

use crate::histogram;
use crate::talk::{count, counted};

/// Number of files that are listed; the JSON has all.
const MAX_FILES: usize = 20;

/// Scripts with a smaller share are summarized.
const MIN_SHARE: f64 = 0.001;

/// Number of special tokens that are listed.
const MAX_TOKENS: usize = 10;

/// The findings that `llara finetune` mentions: those that are rarely intended.
const NOTEWORTHY: [Finding; 6] = [
    Finding::EmptyTexts,
    Finding::DuplicateRows,
    Finding::PositiveInNegatives,
    Finding::PositiveInNegativesOfEqualQuery,
    Finding::FewNegatives,
    Finding::SpecialTokens,
];

/// The entire report.
pub(super) fn lines(report: &Report, settings: &Settings) -> Vec<String> {
    let mut lines = files(report);
    let texts = &report.texts;
    lines.push(format!(
        "texts     {} ({} different), {} and {} ({} different passages)",
        queries(texts.queries),
        count(texts.distinct_queries as usize),
        counted(texts.positives as usize, "positive"),
        counted(texts.negatives as usize, "negative"),
        count(texts.distinct_passages as usize),
    ));
    let ByRole { query, passage } = &report.lengths;
    for (name, lengths) in [("queries", query), ("passages", passage)] {
        lines.extend(role_lengths(name, lengths));
    }
    if report.lengths.query.tokens.is_none() {
        lines.push(
            "note: without --model lengths are in characters and words, and truncation is unknown"
                .into(),
        );
    }
    let scripts = &report.scripts;
    lines.push(format!("scripts   queries: {}", shares(&scripts.query)));
    lines.push(format!("          passages: {}", shares(&scripts.passage)));
    lines.push(String::new());
    let found: Vec<&FindingReport> = report.findings.iter().filter(|f| f.count > 0).collect();
    if found.is_empty() {
        lines.push("nothing was found".into());
    }
    for finding in found {
        lines.extend(finding_lines(finding));
        if finding.finding == Finding::SpecialTokens {
            lines.push(format!("    {}", special_tokens(report)));
        }
    }
    lines.extend(basis_notes(report, settings));
    lines
}

/// The findings that are rarely intended, in one line each, for a report on the first rows of a dataset.
/// `rows` is the number of all rows.
pub(crate) fn noteworthy(report: &Report, rows: usize) -> Vec<String> {
    let all = report.rows as usize == rows;
    let part = if all {
        String::new()
    } else {
        format!(" in the first {} rows", count(report.rows as usize))
    };
    let found = NOTEWORTHY.into_iter().map(|finding| report.finding(finding));
    found
        .filter(|finding| finding.count > 0)
        .map(|finding| {
            let first = finding.examples.first();
            let at = first.map(|e| format!(", first at {}", location(&e.file, e.line)));
            format!(
                "note: {}{part}: {}{}",
                finding.finding.description(),
                count(finding.count as usize),
                at.unwrap_or_default(),
            )
        })
        .collect()
}

/// `file:line`.
pub(super) fn location(file: &Path, line: u64) -> String {
    format!("{}:{line}", file.display())
}

fn queries(n: u64) -> String {
    format!("{} {}", count(n as usize), if n == 1 { "query" } else { "queries" })
}

fn files(report: &Report) -> Vec<String> {
    let malformed = report.finding(Finding::MalformedRows).count;
    let mut lines = vec![format!(
        "data      {} in {}, {} malformed",
        counted(report.rows as usize, "row"),
        counted(report.files.len(), "file"),
        count(malformed as usize),
    )];
    if report.files.len() > 1 {
        lines.extend(report.files.iter().take(MAX_FILES).map(|file| {
            let malformed = match file.malformed_rows {
                0 => String::new(),
                n => format!(", {} malformed", count(n as usize)),
            };
            let rows = count(file.rows as usize);
            format!("  {rows:>12}  {}{malformed}", file.path.display())
        }));
        let more = report.files.len().saturating_sub(MAX_FILES);
        if more > 0 {
            lines.push(format!("                and {}", counted(more, "more file")));
        }
    }
    lines
}

fn role_lengths(name: &str, lengths: &RoleLengths) -> Vec<String> {
    let mut lines = vec![
        String::new(),
        format!(
            "{name:<24}{:>8} {:>8} {:>8} {:>8} {:>8} {:>10}",
            "mean", "median", "90 %", "99 %", "longest", "texts"
        ),
    ];
    let line = |unit: &str, LengthReport { summary, .. }: &LengthReport| {
        format!(
            "  {unit:<22}{:>8.0} {:>8} {:>8} {:>8} {:>8} {:>10}",
            summary.mean,
            count(summary.p50),
            count(summary.p90),
            count(summary.p99),
            count(summary.max),
            count(summary.texts as usize),
        )
    };
    lines.push(line("characters", &lengths.characters));
    lines.push(line("words", &lengths.words));
    match &lengths.tokens {
        Some(tokens) => {
            lines.push(line("tokens with template", &tokens.lengths));
            let max_len = Some((tokens.max_len, tokens.truncated_share));
            lines.extend(histogram::lines(&tokens.lengths.histogram, max_len));
        }
        None => lines.extend(histogram::lines(&lengths.words.histogram, None)),
    }
    lines
}

fn shares(scripts: &[ScriptShare]) -> String {
    let (listed, rare): (Vec<_>, Vec<_>) = scripts.iter().partition(|s| s.share >= MIN_SHARE);
    let mut parts: Vec<String> =
        listed.iter().map(|s| format!("{} {:.1} %", s.script, 100.0 * s.share)).collect();
    if !rare.is_empty() {
        let characters: u64 = rare.iter().map(|s| s.characters).sum();
        let scripts = counted(rare.len(), "other script");
        parts.push(format!("{scripts} ({})", counted(characters as usize, "character")));
    }
    if parts.is_empty() { "none".into() } else { parts.join(", ") }
}

fn special_tokens(report: &Report) -> String {
    let mut tokens: Vec<(&String, &u64)> = report.special_tokens.iter().collect();
    tokens.sort_by_key(|(_, texts)| std::cmp::Reverse(**texts));
    let listed = tokens.iter().take(MAX_TOKENS);
    let mut parts: Vec<String> =
        listed.map(|(token, texts)| format!("{token} in {}", count(**texts as usize))).collect();
    let more = tokens.len().saturating_sub(MAX_TOKENS);
    if more > 0 {
        parts.push(counted(more, "more token"));
    }
    parts.join(", ")
}

fn finding_lines(report: &FindingReport) -> Vec<String> {
    let estimate = match report.basis {
        Basis::Sample { estimate, .. } => {
            format!(" in a sample; about {} in all", count(estimate as usize))
        }
        Basis::All | Basis::NotChecked => String::new(),
    };
    let mut lines = vec![format!(
        "{}: {} of {}{estimate}: {}",
        report.finding,
        count(report.count as usize),
        count(report.of as usize),
        report.finding.description(),
    )];
    lines.extend(report.examples.iter().map(|example| format!("    {}", describe(example))));
    lines
}

fn describe(example: &ExampleReport) -> String {
    let mut text = location(&example.file, example.line);
    if let Some(field) = &example.field {
        text += &format!(" {field}");
    }
    if let Some(other) = &example.other {
        text += &format!(" ~ {}", location(&other.file, other.line));
    }
    if let Some(detail) = &example.detail {
        text += &format!(" ({detail})");
    }
    if let Some(preview) = &example.text {
        text += &format!(" {preview:?}");
    }
    text
}

/// What the figures that are not exact are based on.
fn basis_notes(report: &Report, settings: &Settings) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(tokenized) = report.tokenized.filter(|sample| sample.rows < sample.of) {
        lines.push(format!(
            "note: lengths in tokens are those of {} of {} rows (--sample)",
            count(tokenized.rows as usize),
            count(tokenized.of as usize)
        ));
    }
    let near = report.finding(Finding::NearDuplicatePassages);
    if let Basis::Sample { fraction, .. } = near.basis {
        lines.push(format!(
            "note: near duplicates of passages were searched among {} different ones, {:.2} % of all",
            count(near.of as usize),
            100.0 * fraction
        ));
    }
    if !settings.near_duplicates {
        lines.push("note: near duplicates were not searched (--near-duplicates false)".into());
    }
    lines
}
