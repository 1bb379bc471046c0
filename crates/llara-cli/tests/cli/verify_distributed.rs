//! `llara verify-distributed`.

use std::process::Command;

use crate::fixture::{Bench, LLARA, Outcome, outcome, rows};
use crate::processes::has_mpirun;

const LAUNCHER: &str = "mpirun --allow-run-as-root --oversubscribe -n {}";

fn bench() -> Bench {
    let bench = Bench::new();
    let text = rows(16);
    let numbered = text.lines().enumerate();
    let different =
        numbered.map(|(i, line)| line.replace("sleep", &format!("sleep {i} nights")) + "\n");
    bench.write("train.jsonl", different.collect::<String>());
    bench
}

fn verify(bench: &Bench, rest: &[&str]) -> Outcome {
    let (model, data) = (bench.path("base"), bench.path("train.jsonl"));
    let mut command = Command::new(LLARA);
    command.args([
        "verify-distributed",
        "--model",
        &model,
        "--train-data",
        &data,
        "--threads",
        "1",
    ]);
    command.args(["--train-group-size", "2", "--per-device-train-batch-size", "4", "--steps", "2"]);
    command.args(["--query-max-len", "64", "--temperature", "0.1"]).args(rest);
    outcome(&mut command)
}

#[test]
fn runs_on_several_processes_are_equal_to_one() {
    if !has_mpirun() {
        return;
    }
    let bench = bench();
    let adapter = ["--lora-rank", "4", "--lora-dropout", "0.2", "--launcher", LAUNCHER];
    let result = verify(&bench, &[&adapter[..], &["--processes", "1,2"]].concat()).json();
    assert_eq!(result["equal"], true, "{result}");
    let runs = result["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 1 + 4 + 4);
    let differences = |run: &serde_json::Value| {
        ["loss", "gradients", "weights"].map(|what| run[what].as_f64().unwrap())
    };
    for run in runs {
        assert!(differences(run)[1] <= 1e-4, "{run}");
    }
    // Sums in another order are not equal to the last bit, so zeros alone would mean that nothing was compared.
    assert!(runs.iter().any(|run| differences(run).iter().sum::<f64>() > 0.0), "{result}");
}

#[test]
fn a_difference_is_reported() {
    if !has_mpirun() {
        return;
    }
    let bench = bench();
    // Several processes train with another temperature than one.
    let script = "number=$1; shift; exec mpirun --allow-run-as-root --oversubscribe -n $number \"$@\" --temperature=0.2";
    bench.write("launch.sh", script);
    let launcher = format!("sh {} {{}}", bench.path("launch.sh"));
    let rest = ["--use-lora", "false", "--processes", "2", "--launcher", &launcher];
    let run = verify(&bench, &rest);
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert!(run.stderr.contains("DIFFERENT"), "{}", run.stderr);
    let result: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(result["equal"], false);
    // The first run has one process.
    let (one, several) = result["runs"].as_array().unwrap().split_first().unwrap();
    assert_eq!(one["equal"], true, "{result}");
    assert!(several.len() == 8 && several.iter().all(|run| run["equal"] == false), "{result}");
}

#[test]
fn what_cannot_be_run_is_an_error() {
    let bench = bench();
    verify(&bench, &["--processes", "3"]).refused(&["multiple of 3 processes", "got"]);
    verify(&bench, &["--processes", "2", "--launcher", "no-such-launcher {}"]).refused(&[
        "cannot start a run",
        "2 processes",
        "no-such-launcher",
    ]);
    verify(&bench, &["--processes", "2", "--work-dir", "/no/such/folder"])
        .refused(&["/no/such/folder"]);
    // An error of a run is shown with its messages.
    bench.write("train.jsonl", "{\"query\": \"q\"}\n");
    verify(&bench, &["--processes", "1"]).refused(&["a run failed: 1 process", "train.jsonl:1"]);
    let usage = verify(&bench, &["--launcher", "mpirun -n 4"]);
    assert_eq!(usage.code, Some(2), "{}", usage.stderr);
}
