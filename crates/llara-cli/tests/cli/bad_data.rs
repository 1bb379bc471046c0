//! Training data and settings that must be refused before files are written.

use std::fs;

use crate::fixture::{Bench, llara, rows};

#[test]
fn malformed_rows_are_refused_with_file_and_line() {
    let bench = Bench::new();
    for (line, parts) in [
        (&br#"{"query": "#[..], &["not JSON"][..]),
        (b"{\"query\": \"\xff\"}", &["not UTF-8", "convert"]),
        (br#"{"pos": ["a"], "neg": ["b"]}"#, &["`query` is missing"]),
        (br#"{"query": "a", "neg": ["b"]}"#, &["`pos` is missing"]),
        (br#"{"query": "a", "pos": ["b"]}"#, &["no hard negatives", "--train-group-size 1"]),
        (br#"{"query": "a", "pos": [], "neg": ["b"]}"#, &["`pos` is empty", "at least one"]),
        (br#"{"query": "a", "pos": ["b"], "neg": []}"#, &["no hard negatives", "at least one"]),
        (br#"{"query": 7, "pos": ["b"], "neg": ["c"]}"#, &["`query` has the wrong type"]),
        (br#"{"query": "a", "pos": "b", "neg": ["c"]}"#, &["`pos` has the wrong type"]),
        (br#"{"query": "a", "pos": ["b"], "neg": [7]}"#, &["`neg[0]` has the wrong type"]),
        (br#"["a"]"#, &["not a JSON object"]),
    ] {
        bench.write("train.jsonl", [rows(4).as_bytes(), line, b"\n"].concat());
        let refused = bench.finetune(&[]);
        refused.refused(parts);
        refused.refused(&["train.jsonl:5: "]);
        assert!(!bench.at("out").exists());
    }
    let kept = bench.finetune(&["--on-bad-row", "skip"]);
    kept.json();
    assert!(kept.stderr.contains("4 rows, 1 skipped"), "{}", kept.stderr);
    assert!(kept.stderr.contains("skipped: ") && kept.stderr.contains("train.jsonl:5: "));
}

#[test]
fn empty_and_missing_files_are_refused() {
    let bench = Bench::new();
    bench.write("train.jsonl", "");
    bench.finetune(&[]).refused(&["train.jsonl: the file has no rows"]);
    fs::remove_file(bench.at("train.jsonl")).unwrap();
    bench.finetune(&[]).refused(&["train.jsonl", "hint: check the path"]);
    assert!(!bench.at("out").exists());
}

#[test]
fn invalid_settings_are_refused() {
    let bench = Bench::new();
    for (args, parts) in [
        (["--train-group-size", "0"], ["the group size is too small", "at least 1"]),
        (["--train-group-size", "18446744073709551615"], ["too large", "fewer than"]),
        (["--query-max-len", "18446744073709551615"], ["out of range", "--query-max-len 184"]),
        (["--passage-max-len", "18446744073709551615"], ["out of range", "--passage-max-len 184"]),
        (["--learning-rate", "-1e-3"], ["learning rate", "--learning-rate -0.001"]),
        (["--threads", "65535"], ["too many threads", "--threads 65535"]),
        (["--from-peft", "adapter"], ["an adapter cannot be trained further", "llara merge"]),
        (["--per-device-train-batch-size", "0"], ["batch size", "at least 1"]),
        (["--query-max-len", "10"], ["the maximum query length leaves no token", "at least"]),
        (["--passage-max-len", "1"], ["the maximum passage length leaves no token", "at least"]),
        (["--learning-rate", "nan"], ["learning rate", "positive"]),
        (["--warmup-ratio", "2"], ["warm-up ratio", "from 0 to 1"]),
        (["--temperature", "0"], ["temperature", "positive"]),
        (["--logging-steps", "0"], ["the logging interval is 0", "1 or more"]),
        (["--max-steps", "0"], ["number of steps", "positive number"]),
        (["--adam-beta1", "1"], ["beta1", "below 1"]),
        (["--temperature", "-1"], ["the temperature is out of range", "--temperature -1"]),
        (["--learning-rate", "-1"], ["learning rate", "--learning-rate -1"]),
        (["--max-grad-norm", "-1"], ["gradient norm", "--max-grad-norm -1"]),
        (["--max-grad-norm", "1e-60"], ["gradient norm", "range of f32"]),
        (["--max-steps", "-2"], ["number of steps", "--max-steps -2"]),
        (["--chunk-tokens", "0"], ["chunk size is 0", "--chunk-tokens 0"]),
        (["--passage-max-len", "2"], ["passage length leaves no token", "--passage-max-len 2"]),
        (["--template", "nope"], ["there is no template `nope`", "TOML file"]),
        (["--model", "/no/such/folder"], ["/no/such/folder", "org/name"]),
    ] {
        bench.finetune(&args).refused(&parts);
        assert!(!bench.at("out").exists(), "{args:?}");
    }
}

#[test]
fn invalid_numbers_are_refused_with_the_option() {
    let bench = Bench::new();
    for (option, value, part) in [
        ("--seed", "-1", "'-1' for '--seed <N>'"),
        ("--per-device-train-batch-size", "-3", "'-3' for '--per-device-train-batch-size <N>'"),
        ("--warmup-steps", "0.1", "--warmup-ratio"),
        ("--save-steps", "0.25", "'--save-steps <N>': a fraction of the run"),
    ] {
        let run = bench.finetune(&[option, value]);
        assert_eq!(run.code, Some(2), "{}", run.stderr);
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
}

#[test]
fn inputs_in_the_output_folder_are_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.at("out")).unwrap();
    bench.write("out/rows.jsonl", rows(4));
    let (base, rows, before) =
        (bench.path("base"), bench.path("out/rows.jsonl"), bench.names("base"));
    let overwrite = |rest: &[&str]| {
        let run = bench.finetune(&[&["--overwrite-output-dir"], rest].concat());
        run.refused(&["is in the output folder", "hint: choose another"]);
    };
    overwrite(&["--output-dir", &bench.path("./base/../base")]);
    overwrite(&["--train-data", &rows]);
    llara(&["merge", "--model", "m", "--adapter", &base, "--output-dir", &base])
        .refused(&["the adapter is in the output folder"]);
    assert_eq!((bench.names("base"), bench.names("out")), (before, vec!["rows.jsonl".into()]));
}

#[test]
fn a_run_without_a_logged_step_leaves_no_folder() {
    let bench = Bench::new();
    let diverging = ["--learning-rate", "1e30", "--max-grad-norm", "0", "--max-steps", "20"];
    bench.finetune(&[&diverging[..], &["--logging-steps", "50"]].concat()).refused(&["diverged"]);
    assert!(!bench.at("out").exists());
}

#[test]
fn a_folder_that_is_not_empty_is_not_changed() {
    let bench = Bench::new();
    fs::create_dir(bench.at("out")).unwrap();
    bench.write("out/notes.txt", "mine");
    bench.finetune(&[]).refused(&[
        "output folder is not empty",
        "notes.txt",
        "--overwrite-output-dir",
    ]);
    let (data, out) = (bench.path("train.jsonl"), bench.path("out"));
    llara(&["init", "--preset", "tiny", "--train-data", &data, "--output-dir", &out])
        .refused(&["output folder is not empty", "notes.txt"]);
    assert_eq!(bench.names("out"), ["notes.txt"]);
    // A run with --overwrite-output-dir that cannot start does not change it either.
    bench.finetune(&["--overwrite-output-dir", "--train-group-size", "0"]).refused(&[]);
    assert_eq!(bench.names("out"), ["notes.txt"]);
    bench.finetune(&["--overwrite-output-dir"]).json();
    assert_eq!(fs::read_to_string(bench.at("out/notes.txt")).unwrap(), "mine");
    bench.write("file", "");
    bench.finetune(&["--output-dir", &bench.path("file")]).refused(&["output folder", "file"]);
}

#[test]
fn a_run_that_diverges_keeps_its_log_and_writes_no_model() {
    let bench = Bench::new();
    let args = ["--learning-rate", "1e30", "--max-grad-norm", "0", "--max-steps", "20"];
    bench.finetune(&args).refused(&["training diverged at step", "train.jsonl:", "hint: lower"]);
    assert_eq!(bench.names("out"), ["log.jsonl", "report.html", "run.json", "runs"]);
}

#[test]
fn collections_and_texts_are_checked() {
    let bench = Bench::new();
    let (model, beir, texts) = (bench.path("base"), bench.path("beir"), bench.path("texts.jsonl"));
    llara(&["evaluate", "--model", &model, "--dataset", &beir, "--split", "dev"])
        .refused(&["no split `dev`", "test"]);
    bench.write("texts.jsonl", "{\"text\": \"a\"}\n{\"txt\": \"b\"}\n");
    let output = bench.path("v.npy");
    let args = ["encode", "--model", &model, "--input", &texts, "--role", "query", "--output"];
    llara(&[&args[..], &[&output]].concat()).refused(&["texts.jsonl:2: `text` is missing"]);
    bench.write("texts.jsonl", "{\"text\": \"a\"}\n");
    llara(&[&args[..], &["v.csv"]].concat()).refused(&["v.csv", ".safetensors or .npy"]);
    llara(&[&args[..], &[&output, "--max-len", "5"]].concat())
        .refused(&["query length leaves no token"]);
    assert!(!bench.at("v.npy").exists());
}
