//! Normal use of every verb.

use std::fs;
use std::process::{Command, Stdio};

use llara::retrieval::read_embeddings;
use serde_json::Value;

use crate::fixture::{Bench, LLARA, llara, outcome};

#[test]
fn a_run_writes_a_model_a_log_and_events() {
    let bench = Bench::new();
    let result = bench.finetune(&[]).json();
    assert_eq!(result["steps"], 3);
    assert!(result["loss"].as_f64().unwrap().is_finite());
    assert_eq!(result["output_dir"], bench.path("out"));

    let log = fs::read_to_string(bench.at("out/log.jsonl")).unwrap();
    let records: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.iter().map(|r| r["step"].as_u64()).collect::<Vec<_>>(), [1, 2, 3].map(Some));
    for field in ["loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second"] {
        assert!(records.iter().all(|r| r[field].as_f64().is_some_and(f64::is_finite)), "{field}");
    }
    assert_eq!(records[0]["learning_rate"], 1e-3);
    assert!(bench.names("out/runs")[0].starts_with("events.out.tfevents."));

    let mut expected = bench.names("base");
    expected.extend(["log.jsonl", "report.html", "run.json", "runs"].map(str::to_owned));
    expected.sort();
    assert_eq!(bench.names("out"), expected);
    let weights =
        |folder: &str| fs::read(bench.at(&format!("{folder}/model.safetensors"))).unwrap();
    assert_ne!(weights("out"), weights("base"), "the weights did not change");

    fs::rename(bench.at("out"), bench.at("first")).unwrap();
    bench.finetune(&["--threads", "1"]).json();
    assert_eq!(weights("out"), weights("first"), "the same run gave other weights");
}

#[test]
fn the_given_number_of_threads_is_started_once() {
    let bench = Bench::new();
    let run = bench.finetune(&["--max-steps", "1", "--threads", "1"]);
    run.json();
    assert!(run.stderr.contains("CPU, 1 thread,"), "{}", run.stderr);
    assert!(!run.stderr.contains("note: --threads"), "{}", run.stderr);
}

#[test]
fn checkpoints_are_kept_up_to_the_limit() {
    let bench = Bench::new();
    bench.finetune(&["--save-steps", "1", "--save-total-limit", "2"]).json();
    let checkpoints: Vec<String> =
        bench.names("out").into_iter().filter(|name| name.starts_with("checkpoint")).collect();
    assert_eq!(checkpoints, ["checkpoint-2", "checkpoint-3"]);
    assert_eq!(
        fs::read(bench.at("out/checkpoint-3/model.safetensors")).unwrap(),
        fs::read(bench.at("out/model.safetensors")).unwrap()
    );
}

#[test]
fn both_formats_of_embeddings_agree_and_do_not_depend_on_the_batch() {
    let bench = Bench::new();
    let (model, input) = (bench.path("base"), bench.path("texts.txt"));
    let texts = ["An otter.", "The heron stands very still by the river for hours.", "A lynx"];
    let encode = |texts: &[&str], output: &str, rest: &[&str]| {
        bench.write("texts.txt", texts.join("\n"));
        let output = bench.path(output);
        let mut args = vec!["encode", "--model", &model, "--input", &input, "--role", "query"];
        args.extend(["--output", &output]);
        args.extend(rest);
        assert_eq!(llara(&args).json()["rows"], texts.len());
        read_embeddings(output).unwrap()
    };
    let all = encode(&texts, "v.safetensors", &[]);
    assert_eq!(all.dim(), (3, 128));
    assert_eq!(encode(&texts, "v.npy", &[]), all);
    let reversed: Vec<&str> = texts.iter().rev().copied().collect();
    let turned = encode(&reversed, "v.npy", &["--batch-tokens", "1"]);
    for (i, text) in texts.iter().enumerate() {
        let alone = encode(&[text], "v.npy", &[]);
        for other in [alone.row(0), turned.row(2 - i)] {
            let difference = (&other - &all.row(i)).iter().fold(0.0f32, |m, x| m.max(x.abs()));
            assert!(difference < 1e-6, "{text}: {difference}");
        }
        assert!((all.row(i).dot(&all.row(i)) - 1.0).abs() < 1e-5);
    }
    let raw = encode(&texts, "v.npy", &["--normalized", "False"]);
    assert!((raw.row(0).dot(&raw.row(0)) - 1.0).abs() > 1e-3);
    assert_ne!(encode(&texts, "v.npy", &["--instruction", "find: "]), all);
}

#[test]
fn a_collection_is_evaluated_and_searched() {
    let bench = Bench::new();
    let (model, beir, run) = (bench.path("base"), bench.path("beir"), bench.path("run.trec"));
    let evaluated = llara(&["evaluate", "--model", &model, "--dataset", &beir, "--run-file", &run]);
    let metrics = evaluated.json();
    assert_eq!((&metrics["queries"], &metrics["split"]), (&6.into(), &"test".into()));
    assert_eq!(metrics["recall@100"], 1.0);
    assert!(evaluated.stderr.contains("nDCG@10"));
    assert_eq!(fs::read_to_string(&run).unwrap().lines().count(), 6 * 12);

    let search = ["search", "--model", &model, "--corpus", &beir, "--top-k", "2", "--query"];
    let found = llara(&[&search[..], &["Where is the toad?", "An otter", "--json"]].concat());
    assert_eq!(found.code, Some(0), "{}", found.stderr);
    let lines: Vec<Value> =
        found.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 2);
    let hits = lines[1]["hits"].as_array().unwrap();
    assert_eq!((hits.len(), &hits[0]["rank"]), (2, &1.into()));
    assert!(hits[0]["score"].as_f64() >= hits[1]["score"].as_f64());
    let text = llara(&[&search[..], &["An otter"]].concat()).stdout;
    assert!(text.starts_with("An otter\n  1  "), "{text}");
}

#[test]
fn a_built_in_template_takes_precedence_over_a_file() {
    let bench = Bench::new();
    bench.write("llara", "not TOML");
    bench.write("texts.txt", "An otter.");
    let mut command = Command::new(LLARA);
    command.current_dir(bench.at("")).args(["encode", "--template", "llara", "--model", "base"]);
    command.args(["--input", "texts.txt", "--role", "query", "--output", "v.npy"]);
    assert_eq!(outcome(&mut command).json()["rows"], 1);
    let mut command = Command::new(LLARA);
    command.current_dir(bench.at("")).args(["encode", "--batch-tokens", "0", "--model", "base"]);
    command.args(["--input", "texts.txt", "--role", "query", "--output", "w.npy"]);
    outcome(&mut command).refused(&["`--batch-tokens` is 0"]);
}

#[test]
fn empty_passages_are_evaluated() {
    let bench = Bench::new();
    let corpus = fs::read_to_string(bench.at("beir/corpus.jsonl")).unwrap();
    bench.write(
        "beir/corpus.jsonl",
        corpus + "{\"_id\": \"none\", \"title\": \"\", \"text\": \"\"}\n",
    );
    let (model, beir) = (bench.path("base"), bench.path("beir"));
    assert_eq!(llara(&["evaluate", "--model", &model, "--dataset", &beir]).json()["queries"], 6);
}

#[test]
fn a_closed_pipe_is_not_a_failure() {
    let bench = Bench::new();
    let (model, beir) = (bench.path("base"), bench.path("beir"));
    for args in [
        &["search", "--model", &model, "--corpus", &beir, "--query", "otter"][..],
        &["finetune", "--help"],
    ] {
        let mut child = Command::new(LLARA)
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success() && !stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn usage_errors_have_their_own_exit_code() {
    for args in [
        &["finetune"][..],
        &["finetune", "--model", "m", "--train-data", "d", "--output-dir", "o", "--no-such-flag"],
        &["encode", "--role", "both"],
        &["dance"],
    ] {
        assert_eq!(llara(args).code, Some(2), "{args:?}");
    }
    assert_eq!(llara(&["--help"]).code, Some(0));
}
