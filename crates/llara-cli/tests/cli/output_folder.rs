//! The output folder: locking, earlier checkpoints, interrupted saves, disk space, unusual names.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::fixture::{Bench, LLARA, llara, outcome};

#[test]
fn a_folder_that_another_process_writes_to_is_refused() {
    let bench = Bench::new();
    let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path("out"));
    let lock = llara::FolderLock::acquire(&bench.at("out")).unwrap();
    let holder = format!("process {}", std::process::id());
    let parts = ["another process is writing to this folder", &holder, "hint: wait"];
    bench.finetune(&["--overwrite-output-dir"]).refused(&parts);
    let args = ["--overwrite-output-dir", "--output-dir", &out];
    llara(&[&["init", "--preset", "tiny", "--train-data", &data], &args[..]].concat())
        .refused(&parts);
    llara(&[&["merge", "--model", &model, "--adapter", &bench.path("none")], &args[..]].concat())
        .refused(&parts);
    assert_eq!(bench.names("out"), [".llara.lock"]);
    drop(lock);
    assert!(!bench.at("out").exists());
}

#[test]
fn the_lock_of_a_killed_run_is_free_again() {
    let bench = Bench::new();
    let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path("out"));
    let mut first = Command::new(LLARA)
        .args(["finetune", "--model", &model, "--train-data", &data, "--output-dir", &out])
        .args(["--max-steps", "100000", "--train-group-size", "2", "--query-max-len", "64"])
        .args(["--logging-steps", "1", "--save-steps", "0"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let begun = || fs::metadata(bench.at("out/log.jsonl")).is_ok_and(|log| log.len() > 0);
    while !begun() {
        assert!(start.elapsed() < Duration::from_secs(120), "the first run does not begin");
        std::thread::sleep(Duration::from_millis(20));
    }
    let holder = format!("process {}", first.id());
    bench.finetune(&["--overwrite-output-dir"]).refused(&["another process", &holder]);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(bench.at("out/.llara.lock").exists());
    bench.finetune(&["--overwrite-output-dir"]).json();
    assert!(!bench.at("out/.llara.lock").exists());
}

#[test]
fn checkpoints_of_an_earlier_run_are_removed() {
    let bench = Bench::new();
    bench.finetune(&["--max-steps", "5", "--save-steps", "1"]).json();
    fs::create_dir(bench.at("out/checkpoint-99")).unwrap();
    bench.write("out/checkpoint-99/notes.txt", "no model");
    let again = ["--save-steps", "1", "--save-total-limit", "1", "--overwrite-output-dir"];
    let run = bench.finetune(&again);
    run.json();
    assert!(run.stderr.contains("checkpoint-5, a checkpoint of an earlier run"), "{}", run.stderr);
    let names = bench.names("out");
    let checkpoints: Vec<_> = names.iter().filter(|n| n.starts_with("checkpoint")).collect();
    assert_eq!(checkpoints, ["checkpoint-3", "checkpoint-99"]);
}

#[test]
fn insufficient_disk_space_is_an_error_before_training() {
    let bench = Bench::new();
    let run = bench.finetune(&["--max-steps", "4000000000", "--save-steps", "1"]);
    run.refused(&["not enough free disk space", "4,000,000,000 checkpoints", "--save-total-limit"]);
    assert!(!bench.at("out").exists());
}

#[test]
fn the_error_warns_that_checkpoints_would_be_deleted() {
    let bench = Bench::new();
    fs::create_dir_all(bench.at("out/checkpoint-20")).unwrap();
    bench.write("out/checkpoint-20/config.json", "{}");
    bench.finetune(&["--max-steps", "1"]).refused(&[
        "the output folder is not empty",
        "checkpoint-20",
        "--overwrite-output-dir deletes the checkpoints",
    ]);
    assert!(bench.at("out/checkpoint-20/config.json").is_file());
}

#[test]
fn an_interrupted_save_does_not_prevent_the_next_one() {
    let bench = Bench::new();
    fs::create_dir_all(bench.at("new/.partial-Xy1")).unwrap();
    bench.write("new/.partial-Xy1/model.safetensors", "half");
    bench.write("new/.llara.lock", "4000000000\n");
    let (data, new) = (bench.path("train.jsonl"), bench.path("new"));
    let init = ["init", "--preset", "tiny", "--vocab-size", "400", "--train-data", &data];
    let run = llara(&[&init[..], &["--output-dir", &new]].concat());
    run.json();
    assert!(run.stderr.contains(".partial-Xy1, incomplete files"), "{}", run.stderr);
    assert_eq!(bench.names("new"), bench.names("base"));
}

#[test]
fn a_path_that_is_not_utf_8_is_written_to() {
    let bench = Bench::new();
    let folder = |name: &[u8]| bench.at("").join(OsStr::from_bytes(name));
    let mut init = Command::new(LLARA);
    init.args(["init", "--preset", "tiny", "--vocab-size", "400", "--train-data"]);
    init.arg(bench.at("train.jsonl")).arg("--output-dir").arg(folder(b"m\xff"));
    assert!(outcome(&mut init).json()["output_dir"].is_string());
    assert!(folder(b"m\xff").join("config.json").is_file());

    bench.finetune(&["--use-lora", "true", "--lora-rank", "2", "--max-steps", "1"]).json();
    let mut merge = Command::new(LLARA);
    merge.arg("merge").arg("--model").arg(bench.at("base")).arg("--adapter").arg(bench.at("out"));
    merge.arg("--output-dir").arg(folder(b"merged\xff"));
    assert!(outcome(&mut merge).json()["output_dir"].is_string());
    assert!(folder(b"merged\xff").join("config.json").is_file());
}
