//! Planted findings, a set without any, and counts against an implementation that keeps all texts.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::data::{BadRows, DataSources, Dataset, TrainingRow};
use crate::text::{PromptEncoder, Template, train_bpe};

fn settings() -> Settings {
    Settings { group_size: 3, ..Settings::new(Template::preset("llara").unwrap()) }
}

fn with_tokenizer() -> Settings {
    let template = settings().template;
    let texts = (0..50).map(|i| format!("the otter number {i} sleeps by the river in winter"));
    let tokenizer = train_bpe(texts, 400, &template.special_tokens()).unwrap();
    let size = tokenizer.vocab_size();
    let prompts = PromptEncoder::new(tokenizer, template, size).unwrap();
    Settings {
        prompts: Some(Arc::new(prompts)),
        query_max_len: 100,
        passage_max_len: 100,
        ..settings()
    }
}

/// Rows in which nothing is found.
fn clean() -> Vec<String> {
    [
        (
            "Where does an otter sleep?",
            "Otters rest in burrows.",
            "Lynx hunt hares.",
            "Old oak trees.",
        ),
        ("What melts at 232 degrees?", "Tin does so.", "Lead needs more heat.", "Zinc boils late."),
        (
            "Who painted the night watch?",
            "It was Rembrandt.",
            "Vermeer lived in Delft.",
            "Hals did not.",
        ),
    ]
    .iter()
    .map(|(query, pos, a, b)| json!({"query": query, "pos": [pos], "neg": [a, b]}).to_string())
    .collect()
}

fn inspect_lines(lines: &[String], settings: &Settings) -> Report {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    inspect(&DataSources::read(&[path]).unwrap(), settings, &mut |_| {}).unwrap()
}

/// The findings with their counts, without those that were not found.
fn found(report: &Report) -> Vec<(Finding, u64)> {
    let found = report.findings.iter().filter(|finding| finding.count > 0);
    found.map(|finding| (finding.finding, finding.count)).collect()
}

#[test]
fn nothing_is_found_in_clean_data() {
    let report = inspect_lines(&clean(), &with_tokenizer());
    assert_eq!(found(&report), []);
    assert_eq!(report.rows, 3);
    let TextCounts { queries, distinct_queries, positives, negatives, distinct_passages } =
        report.texts;
    assert_eq!((queries, distinct_queries, positives, negatives), (3, 3, 3, 6));
    assert_eq!(distinct_passages, 9);
    assert!(report.findings.iter().all(|finding| finding.basis == Basis::All && finding.of > 0));
    assert_eq!(report.tokenized, Some(SampleSize { rows: 3, of: 3 }));
    assert_eq!(report.scripts.query[0].script, "Latin");
    assert_eq!(report.scripts.query[0].share, 1.0);
}

/// Adds `line` to clean rows and expects these findings, whose first example is in this line.
#[track_caller]
fn planted(line: impl ToString, expected: &[(Finding, u64)], settings: &Settings) -> Report {
    let mut lines = clean();
    lines.push(line.to_string());
    let report = inspect_lines(&lines, settings);
    assert_eq!(found(&report), expected);
    for (finding, _) in expected {
        let example = &report.finding(*finding).examples[0];
        assert_eq!((example.line, example.file.ends_with("rows.jsonl")), (4, true), "{finding}");
    }
    report
}

#[test]
fn malformed_rows_and_empty_texts_are_found() {
    let report = planted("{\"query\": ", &[(Finding::MalformedRows, 1)], &settings());
    let detail = report.finding(Finding::MalformedRows).examples[0].detail.as_deref().unwrap();
    assert!(detail.starts_with("not JSON at column"), "{detail}");
    assert_eq!((report.files[0].rows, report.files[0].malformed_rows), (3, 1));

    let empty = json!({"query": "a cat", "pos": ["b c"], "neg": ["", "d e"]});
    let expected = [(Finding::MalformedRows, 1), (Finding::EmptyTexts, 1)];
    planted(empty, &expected, &settings());
    let dots = json!({"query": "a cat", "pos": ["b c"], "neg": ["…", "d e"]});
    let report = planted(dots, &[(Finding::EmptyTexts, 1)], &settings());
    let example = &report.finding(Finding::EmptyTexts).examples[0];
    assert_eq!((example.field.as_deref(), example.text.as_deref()), (Some("neg[0]"), Some("…")));
}

#[test]
fn a_malformed_row_ends_the_inspection_if_asked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, format!("{}\n[1]\n{{\n", clean().join("\n"))).unwrap();
    let settings = Settings { on_bad_row: BadRows::Error, ..settings() };
    let e = inspect(&DataSources::read(&[path]).unwrap(), &settings, &mut |_| {})
        .unwrap_err()
        .to_string();
    assert!(e.contains("rows.jsonl:4: not a JSON object"), "{e}");
}

#[test]
fn one_word_texts_are_found() {
    let row = json!({"query": "tin", "pos": ["a metal"], "neg": ["an oak", "a river"]});
    planted(row, &[(Finding::OneWordTexts, 1)], &settings());
}

#[test]
fn equal_rows_and_queries_are_found() {
    let same = [(Finding::DuplicateRows, 1), (Finding::DuplicateQueries, 1)];
    let passages = [(Finding::DuplicatePassages, 3)];
    let report = planted(&clean()[1], &[&same[..], &passages].concat(), &settings());
    let examples = &report.finding(Finding::DuplicateRows).examples;
    assert_eq!(examples[0].other.as_ref().unwrap().line, 2);

    let mut row: serde_json::Value = serde_json::from_str(&clean()[1]).unwrap();
    row["pos"] = json!(["another passage"]);
    row["neg"] = json!(["which has", "some words"]);
    planted(&row, &[(Finding::DuplicateQueries, 1)], &settings());
    // With another instruction it is another query, whose shingles are the same.
    row["prompt"] = json!("find it: ");
    planted(&row, &[], &settings());
}

#[test]
fn repeated_passages_are_found() {
    let row = json!({"query": "a cat", "pos": ["b c"], "neg": ["d e", "d e"]});
    planted(row, &[(Finding::DuplicatePassagesInRow, 1)], &settings());
    let row = json!({"query": "a cat", "pos": ["b c"], "neg": ["Lynx hunt hares.", "d e"]});
    let report = planted(row, &[(Finding::DuplicatePassages, 1)], &settings());
    let example = &report.finding(Finding::DuplicatePassages).examples[0];
    assert_eq!(example.field.as_deref(), Some("neg[0]"));
    assert_eq!(example.other.as_ref().unwrap().line, 1);
}

#[test]
fn near_duplicates_are_found() {
    let row = json!({"query": "where does an Otter sleep", "pos": ["b c"], "neg": ["d e", "f g"]});
    let report = planted(row, &[(Finding::NearDuplicateQueries, 1)], &settings());
    let example = &report.finding(Finding::NearDuplicateQueries).examples[0];
    assert_eq!(example.detail.as_deref(), Some("similarity 1.00"));
    assert_eq!(example.other.as_ref().unwrap().line, 1);
    let row = json!({"query": "a cat", "pos": ["b c"], "neg": ["vermeer lived in delft", "f g"]});
    planted(row, &[(Finding::NearDuplicatePassages, 1)], &settings());
    let row = json!({
        "query": "where does an otter sleep", "pos": ["otters rest in burrows"], "neg": ["a b", "c d"]
    });
    let near =
        [Finding::NearDuplicateRows, Finding::NearDuplicateQueries, Finding::NearDuplicatePassages];
    planted(&row, &near.map(|finding| (finding, 1)), &settings());
    let settings = Settings { near_duplicates: false, ..settings() };
    let report = planted(&row, &[], &settings);
    assert!(near.iter().all(|&finding| report.finding(finding).basis == Basis::NotChecked));
}

#[test]
fn positives_among_negatives_are_found_by_their_row() {
    let row = json!({"query": "a cat", "pos": ["b c"], "neg": ["b c", "d e"]});
    let report = planted(row, &[(Finding::PositiveInNegatives, 1)], &settings());
    let example = &report.finding(Finding::PositiveInNegatives).examples[0];
    assert_eq!((example.field.as_deref(), example.text.as_deref()), (Some("neg[0]"), Some("b c")));

    let row = json!({
        "query": "Where does an otter sleep?", "pos": ["b c"], "neg": ["Otters rest in burrows.", "d e"]
    });
    let expected = [
        (Finding::DuplicateQueries, 1),
        (Finding::DuplicatePassages, 1),
        (Finding::PositiveInNegativesOfEqualQuery, 1),
    ];
    let report = planted(row, &expected, &settings());
    let example = &report.finding(Finding::PositiveInNegativesOfEqualQuery).examples[0];
    assert_eq!(example.other.as_ref().unwrap().line, 1);

    let row = json!({"query": "a cat", "pos": ["b c"], "neg": ["Otters rest in burrows.", "d e"]});
    let expected = [(Finding::DuplicatePassages, 1), (Finding::PositiveInNegativesOfOtherQuery, 1)];
    let report = planted(row, &expected, &settings());
    let example = &report.finding(Finding::PositiveInNegativesOfOtherQuery).examples[0];
    assert_eq!(example.other.as_ref().unwrap().line, 1);
}

#[test]
fn short_groups_are_found() {
    let row = json!({"query": "a cat", "pos": ["b c"]});
    planted(&row, &[(Finding::NoNegatives, 1)], &settings());
    planted(&row, &[], &Settings { group_size: 1, ..settings() });
    let row = json!({"query": "a cat", "pos": ["b c"], "neg": ["d e"]});
    let report = planted(row, &[(Finding::FewNegatives, 1)], &settings());
    let example = &report.finding(Finding::FewNegatives).examples[0];
    assert_eq!(example.detail.as_deref(), Some("1 of 2"));
}

#[test]
fn special_tokens_of_template_and_tokenizer_are_found() {
    let row = json!({"query": "a cat <s9>", "pos": ["b c"], "neg": ["d e", "<|eos|> f"]});
    let report = planted(&row, &[(Finding::SpecialTokens, 1)], &settings());
    assert_eq!(report.special_tokens, BTreeMap::from([("<s9>".to_owned(), 1)]));
    let report = planted(&row, &[(Finding::SpecialTokens, 2)], &with_tokenizer());
    assert_eq!(report.special_tokens["<|eos|>"], 1);
}

#[test]
fn truncated_texts_are_found_with_a_tokenizer() {
    let long = "the otter sleeps by the river ".repeat(30);
    let row = json!({"query": &long, "pos": ["b c"], "neg": ["d e", &long]});
    let expected = [(Finding::TruncatedQueries, 1), (Finding::TruncatedPassages, 1)];
    let report = planted(&row, &expected, &with_tokenizer());
    let tokens = report.lengths.query.tokens.as_ref().unwrap();
    assert_eq!((tokens.truncated, tokens.truncated_share, tokens.max_len), (1, 0.25, 100));
    let example = &report.finding(Finding::TruncatedPassages).examples[0];
    assert_eq!(example.field.as_deref(), Some("neg[1]"));
    let report = planted(&row, &[], &settings());
    assert_eq!(report.finding(Finding::TruncatedQueries).basis, Basis::NotChecked);
    assert!(report.lengths.query.tokens.is_none());

    let sampled = Settings { sample_rows: 2, ..with_tokenizer() };
    let report = inspect_lines(&vec![row.to_string(); 8], &sampled);
    let truncated = report.finding(Finding::TruncatedQueries);
    assert_eq!((truncated.count, truncated.of), (2, 2));
    assert_eq!(truncated.basis, Basis::Sample { fraction: 0.25, estimate: 8 });
}

#[test]
fn the_first_rows_of_a_dataset_have_the_same_findings() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    let row = json!({"query": "a cat", "pos": ["b c"], "neg": ["b c", "d e"]}).to_string();
    let lines = [&clean()[..], &[row]].concat();
    std::fs::write(&path, lines.join("\n")).unwrap();
    let dataset = Dataset::open(std::slice::from_ref(&path), BadRows::Error).unwrap();
    let whole = inspect(&DataSources::read(&[path]).unwrap(), &settings(), &mut |_| {}).unwrap();
    let first = inspect_first_rows(&dataset, &settings(), 1 << 20).unwrap();
    assert_eq!(first.findings, whole.findings);
    let bytes = lines[..3].iter().map(String::len).sum();
    let first = inspect_first_rows(&dataset, &settings(), bytes).unwrap();
    assert_eq!((first.rows, found(&first)), (3, vec![]));
    assert_eq!(inspect_first_rows(&dataset, &settings(), 0).unwrap().rows, 1);
}

#[test]
fn progress_ends_at_the_total_of_every_phase() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.jsonl");
    std::fs::write(&path, clean().join("\n")).unwrap();
    let mut last = BTreeMap::new();
    let mut progress = |p: Progress| {
        last.insert(format!("{:?}", p.phase), (p.done, p.total));
    };
    inspect(&DataSources::read(&[path]).unwrap(), &with_tokenizer(), &mut progress).unwrap();
    assert_eq!(last["Tokenizing"], (3, 3));
    assert!(last["Reading"].0 > 0 && last["Reading"].0 == last["Reading"].1);
    assert_eq!(last["Comparing"].1, 2 * 3 + 9);
}

/// The counts from their definitions, with all texts in memory.
fn naive(rows: &[TrainingRow], group_size: usize) -> Vec<(Finding, u64)> {
    let mut counts: BTreeMap<Finding, u64> = BTreeMap::new();
    let mut add = |finding, n: usize| *counts.entry(finding).or_default() += n as u64;
    let passages = |row: &TrainingRow| -> BTreeSet<String> {
        row.pos.iter().chain(&row.neg).cloned().collect()
    };
    let distinct = |texts: &[String]| -> BTreeSet<String> { texts.iter().cloned().collect() };
    for (i, row) in rows.iter().enumerate() {
        let earlier = &rows[..i];
        let same_query =
            |other: &TrainingRow| (&other.query, &other.prompt) == (&row.query, &row.prompt);
        let others = || rows.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, other)| other);
        add(
            Finding::DuplicateRows,
            usize::from(
                earlier.iter().any(|e| same_query(e) && e.pos == row.pos && e.neg == row.neg),
            ),
        );
        add(Finding::DuplicateQueries, usize::from(earlier.iter().any(same_query)));
        let again = |text: &&String| earlier.iter().any(|e| passages(e).contains(*text));
        add(Finding::DuplicatePassages, passages(row).iter().filter(again).count());
        for list in [&row.pos, &row.neg] {
            add(Finding::DuplicatePassagesInRow, list.len() - distinct(list).len());
        }
        for text in distinct(&row.neg) {
            add(Finding::PositiveInNegatives, usize::from(row.pos.contains(&text)));
            let mut equal = others().filter(|o| same_query(o));
            let in_equal = equal.any(|o| o.pos.contains(&text));
            add(Finding::PositiveInNegativesOfEqualQuery, usize::from(in_equal));
            let in_other = others().any(|o| !same_query(o) && o.pos.contains(&text));
            add(Finding::PositiveInNegativesOfOtherQuery, usize::from(in_other));
        }
        add(Finding::NoNegatives, usize::from(row.neg.is_empty() && group_size > 1));
        let few = !row.neg.is_empty() && row.neg.len() < group_size - 1;
        add(Finding::FewNegatives, usize::from(few));
        for text in [&row.query].into_iter().chain(&row.pos).chain(&row.neg) {
            let words = text.split_whitespace().filter(|word| word.contains(char::is_alphanumeric));
            match words.count() {
                0 => add(Finding::EmptyTexts, 1),
                1 => add(Finding::OneWordTexts, 1),
                _ => {}
            }
            add(Finding::SpecialTokens, usize::from(text.contains("<s2>")));
        }
    }
    counts.into_iter().filter(|(_, count)| *count > 0).collect()
}

/// The number of texts that nearly equal an earlier different text, if every pair is compared.
fn naive_near(texts: &[&String]) -> u64 {
    let mut signatures: Vec<minhash::Signature> = Vec::new();
    let mut count = 0;
    for (i, text) in texts.iter().enumerate() {
        if texts[..i].contains(text) {
            continue;
        }
        let Some(shingles) = minhash::Shingles::new(text) else { continue };
        let signature = shingles.signature();
        count += u64::from(signatures.iter().any(|s| s.similarity(&signature) >= near::NEAR));
        signatures.push(signature);
    }
    count
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => prop::sample::select(vec!["a b", "b c", "c d", "d e", "A b", "x", "-", "a <s2> b"])
            .prop_map(String::from),
        1 => "[a-d] [a-d]{1,4}",
    ]
}

fn row() -> impl Strategy<Value = serde_json::Value> {
    let texts = |least| prop::collection::vec(text(), least..4);
    let prompt = prop::sample::select(vec![None, None, Some(""), Some("find: ")]);
    (text(), texts(1), texts(0), prompt).prop_map(|(query, pos, neg, prompt)| {
        json!({"query": query, "pos": pos, "neg": neg, "prompt": prompt})
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn counts_are_those_of_the_definitions(
        rows in prop::collection::vec(row(), 1..25), group_size in 1usize..5, files in 1usize..4, spill: bool,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut paths: Vec<PathBuf> = Vec::new();
        for (i, part) in rows.chunks(rows.len().div_ceil(files)).enumerate() {
            paths.push(folder.path().join(format!("{i}.jsonl")));
            let lines: Vec<String> = part.iter().map(ToString::to_string).collect();
            std::fs::write(&paths[i], lines.join("\n") + "\n").unwrap();
        }
        let settings = Settings { group_size, ..settings() };
        let records = if spill { [3, 3, 3] } else { [99, 99, 999] };
        let report = inspector::inspect_with(&DataSources::read(&paths).unwrap(), &settings, records, &mut |_| {}).unwrap();
        let parsed: Vec<TrainingRow> = rows
            .iter()
            .map(|row| TrainingRow::parse(row.to_string().as_bytes(), Path::new("r"), 1).unwrap())
            .collect();
        let near = [
            Finding::NearDuplicateRows, Finding::NearDuplicateQueries, Finding::NearDuplicatePassages,
        ];
        let exact: Vec<_> = found(&report).into_iter().filter(|(f, _)| !near.contains(f)).collect();
        prop_assert_eq!(exact, naive(&parsed, group_size));
        let queries: Vec<&String> = parsed.iter().map(|row| &row.query).collect();
        prop_assert_eq!(report.finding(near[1]).count, naive_near(&queries));
        let passages: Vec<&String> =
            parsed.iter().flat_map(|row| row.pos.iter().chain(&row.neg)).collect();
        prop_assert_eq!(report.finding(near[2]).count, naive_near(&passages));
        let distinct: BTreeSet<&String> = passages.iter().copied().collect();
        prop_assert_eq!(report.texts.distinct_passages as usize, distinct.len());
        let files: Vec<u64> = report.files.iter().map(|file| file.rows).collect();
        prop_assert_eq!(files.iter().sum::<u64>() as usize, rows.len());
        // Every example is in a row that its finding can be about.
        for example in report.findings.iter().flat_map(|finding| &finding.examples) {
            prop_assert!(paths.contains(&example.file) && example.line >= 1);
            let about_row = matches!(example.detail.as_deref(), Some(d) if d.contains(" of "));
            prop_assert!(example.field.is_some() || example.other.is_some() || about_row);
        }
    }
}
