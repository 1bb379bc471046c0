//! Training objectives: further terms, masks, batches from one file, and what is refused.

use std::fs;

use crate::fixture::{Bench, Outcome, rows};

/// All terms at once. Three passages in each group.
const TERMS: [&str; 11] = [
    "--mask-false-negatives",
    "equal,margin:0.05",
    "--symmetric",
    "--matryoshka-dims=8,32",
    "--matryoshka-weights=0.5,1",
    "--distill",
    "margin-mse",
    "--distill-weight=2",
    "--distill-temperature=10",
    "--train-group-size",
    "3",
];

/// The rows of the fixture with a teacher's scores.
fn scored_rows(count: usize) -> String {
    let scored = |(i, line): (usize, &str)| {
        let mut row: serde_json::Value = serde_json::from_str(line).unwrap();
        row["pos_scores"] = serde_json::json!([5.0 + i as f32 / 4.0]);
        row["neg_scores"] = serde_json::json!([-1.5, 0.25 * i as f32]);
        format!("{row}\n")
    };
    rows(count).lines().enumerate().map(scored).collect()
}

/// The losses of all steps.
fn losses(bench: &Bench, out: &str) -> Vec<f64> {
    let log = fs::read_to_string(bench.at(out).join("log.jsonl")).unwrap();
    let loss =
        |line: &str| serde_json::from_str::<serde_json::Value>(line).unwrap()["loss"].as_f64();
    log.lines().map(|line| loss(line).unwrap()).collect()
}

fn finetune(bench: &Bench, out: &str, rest: &[&str]) -> Outcome {
    let out = bench.path(out);
    bench.finetune(&[&["--output-dir", &out][..], rest].concat())
}

#[test]
fn every_term_changes_the_loss_and_the_defaults_do_not() {
    let bench = Bench::new();
    bench.write("train.jsonl", scored_rows(12));
    finetune(&bench, "plain", &[]).json();
    let plain = losses(&bench, "plain");
    let defaults =
        ["--in-batch-negatives", "true", "--mask-false-negatives", "none", "--symmetric", "false"];
    let batches = ["--batching", "mixed"];
    finetune(&bench, "defaults", &[&defaults[..], &batches].concat()).json();
    assert_eq!(losses(&bench, "defaults"), plain);
    let mut seen = vec![plain];
    for (at, terms) in [
        &["--in-batch-negatives", "false"][..],
        &["--mask-false-negatives", "equal"],
        &["--mask-false-negatives", "margin:-0.01"],
        &["--symmetric"],
        &["--matryoshka-dims", "8", "32"],
        &["--distill", "kl"],
        &["--distill", "margin-mse"],
    ]
    .iter()
    .enumerate()
    {
        let out = format!("out-{at}");
        finetune(&bench, &out, terms).json();
        let losses = losses(&bench, &out);
        assert!(losses.iter().all(|loss| loss.is_finite()), "{terms:?}: {losses:?}");
        assert!(!seen.contains(&losses), "{terms:?}: {losses:?}");
        seen.push(losses);
    }
}

#[test]
fn a_run_with_all_terms_and_batches_of_one_file_is_resumed_to_the_same_bytes() {
    let bench = Bench::new();
    bench.write("train.jsonl", scored_rows(9));
    bench.write("second.jsonl", scored_rows(5));
    let second = bench.path("second.jsonl");
    let batches = [
        "--train-data",
        &second,
        "--sampling",
        "random",
        "--batching",
        "per-file",
        "--file-weights=1,2",
        "--max-steps",
        "7",
        "--save-steps",
        "3",
        "--per-device-train-batch-size",
        "3",
    ];
    let all = [&TERMS[..], &batches].concat();
    finetune(&bench, "whole", &all).json();
    let checkpoint = bench.path("whole/checkpoint-3");
    let resumed = [&all[..], &["--resume-from-checkpoint", &checkpoint]].concat();
    finetune(&bench, "resumed", &resumed).json();
    let model = |out: &str| fs::read(bench.at(out).join("model.safetensors")).unwrap();
    assert!(model("whole") == model("resumed"));
    for (changed, named) in [
        (&["--symmetric", "false"][..], "symmetric"),
        (&["--mask-false-negatives", "none"], "mask-equal"),
        (&["--matryoshka-weights=1,1"], "matryoshka-dims"),
        (&["--distill-weight", "1"], "distill"),
        (&["--file-weights=2,1"], "file-weights"),
    ] {
        // Lists are appended to, so the option that changes is left out first.
        let name = changed[0].split('=').next().unwrap();
        let mut args: Vec<&str> = Vec::new();
        let mut skips = false;
        for arg in &resumed {
            if arg.starts_with("--") {
                skips = arg.split('=').next() == Some(name);
            }
            if !skips {
                args.push(arg);
            }
        }
        args.extend(changed);
        finetune(&bench, "changed", &args).refused(&["from the checkpoint's", named]);
    }
}

#[test]
fn settings_that_do_not_fit_are_refused_before_anything_is_written() {
    let bench = Bench::new();
    let scored = scored_rows(6);
    let line = rows(1);
    bench.write("train.jsonl", format!("{scored}{line}"));
    let wide = ["--matryoshka-dims", "8,100000"];
    for (args, parts) in [
        (
            &["--distill", "kl"][..],
            &["train.jsonl:7: ", "no scores of a teacher", "pos_scores"][..],
        ),
        (&["--distill-weight", "2"], &["--distill-weight has no effect"]),
        (&["--in-batch-negatives", "false", "--symmetric"], &["is not possible", "no other query"]),
        (&["--no_in_batch_negatives", "--train-group-size", "1"], &["group of one positive"]),
        (&wide, &["--matryoshka-dims", "100000"]),
        (&["--matryoshka-dims", "16,8"], &["ascending", "8 after 16"]),
        (&["--mask-false-negatives", "margin:nan"], &["margin", "not finite"]),
        (&["--file-weights", "1"], &["--batching per-file"]),
        (&["--batching", "per-file"], &["--sampling random"]),
        (
            &["--batching", "per-file", "--sampling", "random", "--file-weights", "1,2"],
            &["1 weights, in the order of", "train.jsonl"],
        ),
    ] {
        bench.finetune(args).refused(parts);
        assert!(!bench.at("out").exists(), "{args:?}");
    }
}
