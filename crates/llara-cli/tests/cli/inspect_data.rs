//! `llara inspect-data`, and what `finetune` says about its data.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::fixture::{Bench, LLARA, Outcome, llara, outcome, rows};

/// Rows in which nothing is found with a group size of 2.
fn clean() -> String {
    let row = |(query, pos, neg): (&str, &str, &str)| {
        json!({"query": query, "pos": [pos], "neg": [neg]}).to_string() + "\n"
    };
    [
        ("Where does an otter sleep?", "Otters rest in burrows.", "Lynx hunt hares."),
        ("What melts at 232 degrees?", "Tin does so.", "Lead needs more heat."),
    ]
    .map(row)
    .concat()
}

fn inspect(bench: &Bench, rest: &[&str]) -> Outcome {
    let data = bench.path("rows.jsonl");
    let args = ["inspect-data", "--train-group-size", "2", "--train-data", &data];
    llara(&[&args[..], rest].concat())
}

/// Asserts that the exit code is 1, the report is printed, and the message has all `parts`.
#[track_caller]
fn denied(run: &Outcome, parts: &[&str]) -> Value {
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("error: the data has denied findings"), "{}", run.stderr);
    for part in parts {
        assert!(run.stderr.contains(part), "no {part:?} in: {}", run.stderr);
    }
    serde_json::from_str(&run.stdout).unwrap()
}

#[test]
fn clean_data_passes_every_check() {
    let bench = Bench::new();
    bench.write("rows.jsonl", clean());
    let model = bench.path("base");
    let limits = ["--query-max-len", "200", "--passage-max-len", "200"];
    let before = bench.names("");
    let run = inspect(&bench, &[&["--model", &model, "--deny", "all"], &limits[..]].concat());
    let json = run.json();
    assert_eq!(bench.names(""), before);
    assert!(run.stderr.contains("nothing was found"), "{}", run.stderr);
    assert_eq!((&json["rows"], &json["denied"]), (&2.into(), &json!([])));
    assert_eq!(json["files"][0]["path"], bench.path("rows.jsonl"));
    assert_eq!(json["tokenized"], json!({"rows": 2, "of": 2}));
    assert_eq!(json["scripts"]["query"][0]["script"], "Latin");
    let findings = json["findings"].as_object().unwrap();
    assert_eq!(findings.len(), 18);
    assert!(findings.values().all(|finding| finding["count"] == 0 && finding["basis"] == "all"));
    let tokens = &json["lengths"]["passage"]["tokens"];
    assert_eq!((&tokens["texts"], &tokens["max_len"]), (&4.into(), &200.into()));
    for part in ["tokens with template", "← maximum length 200", "Latin 100.0 %"] {
        assert!(run.stderr.contains(part), "no {part:?} in: {}", run.stderr);
    }
}

#[test]
fn lengths_are_in_tokens_only_with_a_model_and_its_recipe() {
    let bench = Bench::new();
    bench.write("rows.jsonl", clean());
    let run = inspect(&bench, &[]);
    let json = run.json();
    assert_eq!(json["lengths"]["query"]["words"]["max"], 5);
    assert_eq!(json["lengths"]["query"]["characters"]["max"], 26);
    assert_eq!(json["lengths"]["query"]["tokens"], Value::Null);
    assert_eq!(json["findings"]["truncated-queries"]["basis"], "not_checked");
    assert!(run.stderr.contains("note: without --model"), "{}", run.stderr);

    let model = bench.path("base");
    let recipe: Value =
        serde_json::from_slice(&fs::read(bench.at("base/llara.json")).unwrap()).unwrap();
    let tokens = |rest: &[&str]| {
        let json = inspect(&bench, &[&["--model", &model], rest].concat()).json();
        json["lengths"]["query"]["tokens"].clone()
    };
    assert_eq!(tokens(&[])["max_len"], recipe["query_max_len"]);
    let whole = tokens(&["--query-max-len", "100"]);
    assert_eq!((&whole["max_len"], &whole["truncated"]), (&100.into(), &0.into()));
    let longest = whole["max"].as_u64().unwrap();
    let limit = (longest - 1).to_string();
    assert!(tokens(&["--query-max-len", &limit])["truncated"].as_u64().unwrap() >= 1);
    let instructed = tokens(&["--query-instruction-for-retrieval", "find this animal: "]);
    assert!(instructed["max"].as_u64().unwrap() > longest);
    let other = inspect(&bench, &["--model", &model, "--template", "qwen3-embedding"]).json();
    assert!(other["lengths"]["query"]["tokens"]["max"].as_u64().unwrap() < longest);
}

#[test]
fn denied_findings_are_named_with_their_first_line() {
    let bench = Bench::new();
    let bad = json!({"query": "a cat", "pos": ["b c"], "neg": ["b c"]});
    bench.write("rows.jsonl", format!("{}{bad}\n{bad}\n{{\n", clean()));
    let run = inspect(&bench, &[]);
    let json = run.json();
    assert_eq!(json["findings"]["positive-in-negatives"]["count"], 2);
    assert_eq!(json["findings"]["malformed-rows"]["count"], 1);
    let example = &json["findings"]["duplicate-rows"]["examples"][0];
    assert_eq!((&example["line"], &example["other"]["line"]), (&4.into(), &3.into()));
    let expected = "positive-in-negatives: 2 of 4: negatives that are a positive of their row";
    assert!(run.stderr.contains(expected), "{}", run.stderr);
    assert!(run.stderr.contains("rows.jsonl:3 neg[0] \"b c\""), "{}", run.stderr);

    inspect(&bench, &["--deny", "no-negatives,few-negatives"]).json();
    let run = inspect(&bench, &["--deny", "positive-in-negatives,no-negatives,malformed-rows"]);
    let parts = ["positive-in-negatives: 2, first at ", "rows.jsonl:3", "malformed-rows: 1"];
    let json = denied(&run, &parts);
    assert_eq!(json["denied"], json!(["malformed-rows", "positive-in-negatives"]));
    let run = inspect(&bench, &["--deny", "all", "--allow", "malformed-rows"]);
    let json = denied(&run, &["duplicate-rows: 1", "duplicate-passages: 1"]);
    assert!(!json["denied"].as_array().unwrap().contains(&"malformed-rows".into()));
}

#[test]
fn options_that_cannot_be_used_are_refused() {
    let bench = Bench::new();
    bench.write("rows.jsonl", clean());
    let model = bench.path("base");
    for (args, parts) in [
        (&["--deny", "truncated-queries"][..], &["truncated-queries", "--model"][..]),
        (
            &["--deny", "near-duplicate-rows", "--near-duplicates", "false"],
            &["near-duplicate-rows", "--near-duplicates true"],
        ),
        (&["--deny", "all", "--allow", "all"], &["--allow contradicts --deny"]),
        (&["--train-group-size", "0"], &["the group size is too small"]),
        (&["--query-max-len", "18446744073709551615"], &["out of range", "--query-max-len"]),
        (&["--passage-max-len", "0"], &["out of range", "--passage-max-len 0"]),
        (&["--sample", "0"], &["the sample is empty"]),
        (&["--template", "nope"], &["there is no template `nope`"]),
        (&["--model", "/no/such/folder"], &["/no/such/folder"]),
        (&["--model", &model, "--query-max-len", "3"], &["leaves no token", "--query-max-len 3"]),
    ] {
        inspect(&bench, args).refused(parts);
    }
    let run = inspect(&bench, &["--deny", "duplicates"]);
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    assert!(run.stderr.contains("duplicate-rows"), "{}", run.stderr);
    assert_eq!(llara(&["inspect-data"]).code, Some(2));
}

#[test]
fn folders_and_several_files_are_inspected_together() {
    let bench = Bench::new();
    fs::create_dir(bench.at("data")).unwrap();
    bench.write("data/1.jsonl", clean());
    bench.write("data/2.json", format!("\u{feff}{}\r\n[1]\n", clean().lines().next().unwrap()));
    bench.write("data/notes.txt", "not rows");
    bench.write("more.jsonl", rows(3));
    let (folder, more) = (bench.path("data"), bench.path("more.jsonl"));
    let run = llara(&["inspect-data", "--train-data", &folder, &more]);
    let json = run.json();
    let files: Vec<(u64, u64)> = json["files"]
        .as_array()
        .unwrap()
        .iter()
        .map(|f| (f["rows"].as_u64().unwrap(), f["malformed_rows"].as_u64().unwrap()))
        .collect();
    assert_eq!(files, [(2, 0), (1, 1), (3, 0)]);
    let example = &json["findings"]["duplicate-rows"]["examples"][0];
    assert_eq!(example["file"], bench.path("data/2.json"));
    assert_eq!(example["other"]["file"], bench.path("data/1.jsonl"));
    assert!(run.stderr.contains("6 rows in 3 files, 1 malformed"), "{}", run.stderr);

    let standard_input = || {
        let mut command = Command::new(LLARA);
        command.args(["inspect-data", "--train-data", "/dev/stdin"]);
        command
    };
    let redirected = File::open(bench.at("data/1.jsonl")).unwrap();
    assert_eq!(outcome(standard_input().stdin(redirected)).json()["rows"], 2);
    outcome(standard_input().stdin(Stdio::piped())).refused(&["neither a file nor a folder"]);
}

#[test]
fn files_that_cannot_be_read_are_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.at("empty")).unwrap();
    let empty = bench.path("empty");
    llara(&["inspect-data", "--train-data", &empty]).refused(&["the folder has no training data"]);
    inspect(&bench, &[]).refused(&["rows.jsonl", "hint: check the path"]);
    for (contents, part) in [
        (&b""[..], "the file has no rows"),
        (b"\n \n", "the file has no rows"),
        (b"[{\"query\": 1}]", "rows.jsonl:1: the file is a JSON array"),
        (b"\x1f\x8b\x08\0", "compressed (gzip)"),
    ] {
        bench.write("rows.jsonl", contents);
        inspect(&bench, &[]).refused(&[part]);
    }
    bench.write("rows.jsonl", format!("{}\"a row\"\n", clean()));
    inspect(&bench, &["--on-bad-row", "error"]).refused(&["rows.jsonl:3: not a JSON object"]);
    // Nothing but malformed rows is a report, too.
    bench.write("rows.jsonl", "\"a row\"\n");
    let json = inspect(&bench, &[]).json();
    assert_eq!((&json["rows"], &json["files"][0]["malformed_rows"]), (&0.into(), &1.into()));
}

#[test]
fn control_characters_of_texts_do_not_reach_the_terminal() {
    let bench = Bench::new();
    bench.write("rows.jsonl", json!({"query": "\u{1b}[31mred", "pos": ["\u{9b}"]}).to_string());
    let run = inspect(&bench, &[]);
    assert_eq!(run.json()["findings"]["one-word-texts"]["count"], 1);
    assert!(run.stderr.chars().all(|c| c == '\n' || !c.is_control()), "{:?}", run.stderr);
}

#[test]
fn finetune_mentions_what_is_noteworthy() {
    let bench = Bench::new();
    let run = bench.finetune(&["--max-steps", "1"]);
    run.json();
    assert!(!run.stderr.contains("positive of"), "{}", run.stderr);
    fs::remove_dir_all(bench.at("out")).unwrap();
    let bad = json!({"query": "a cat", "pos": ["b <s3>"], "neg": ["b <s3>"]});
    bench.write("train.jsonl", format!("{}{bad}\n", rows(4)));
    let run = bench.finetune(&["--max-steps", "1"]);
    run.json();
    for part in [
        "note: negatives that are a positive of their row: 1, first at ",
        "note: texts that contain a special token: 2, first at ",
        "train.jsonl:5",
    ] {
        assert!(run.stderr.contains(part), "no {part:?} in: {}", run.stderr);
    }
}
