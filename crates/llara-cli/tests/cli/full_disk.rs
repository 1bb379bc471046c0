//! A disk that fills up while something is saved, played by the limit on the size of files.

#![cfg(unix)]

use std::process::Command;

use crate::fixture::{Bench, LLARA, Outcome, outcome};

/// Runs the program where no file may grow beyond `blocks` (of 512 or 1,024 bytes, by the shell).
fn limited(blocks: u32, args: &[&str]) -> Outcome {
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    outcome(Command::new("sh").args(["-c", &script, LLARA]).args(args))
}

#[test]
fn incomplete_models_are_removed() {
    let bench = Bench::new();
    let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path("out"));
    // Enough for tokenizer and log, too little for the weights.
    let new = bench.path("new");
    let init = ["init", "--preset", "tiny", "--vocab-size", "400", "--train-data", &data];
    let run = limited(300, &[&init[..], &["--output-dir", &new]].concat());
    run.refused(&["cannot write weights", "model.safetensors", "the incomplete file was removed"]);
    assert!(!bench.at("new").exists());

    let finetune = ["finetune", "--model", &model, "--train-data", &data, "--output-dir", &out];
    let rest = ["--max-steps", "1", "--train-group-size", "2", "--query-max-len", "64"];
    limited(300, &[&finetune[..], &rest, &["--use-lora", "false"]].concat()).refused(&[
        "cannot write weights",
        "hint: free",
        "saved no checkpoint",
    ]);
    assert_eq!(bench.names("out"), ["log.jsonl", "report.html", "run.json", "runs"]);
}

#[test]
fn embeddings_are_written_atomically() {
    let bench = Bench::new();
    let (model, input, output) = (bench.path("base"), bench.path("texts.txt"), bench.path("v.npy"));
    bench.write("texts.txt", "an otter\n".repeat(100));
    bench.write("v.npy", "old");
    let before = bench.names("");
    let args = ["encode", "--model", &model, "--input", &input, "--role", "query", "--output"];
    limited(8, &[&args[..], &[&output, "--overwrite"]].concat()).refused(&[
        "cannot write",
        "v.npy",
        "hint: free",
    ]);
    assert_eq!(bench.names(""), before);
    assert_eq!(std::fs::read_to_string(bench.at("v.npy")).unwrap(), "old");
}
