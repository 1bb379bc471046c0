//! `llara finetune` on several processes that `mpirun` starts, against one process.
//!
//! Without `mpirun` these tests are skipped, unless `LLARA_MPI_TESTS` is `required`.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use safetensors::SafeTensors;

use crate::fixture::{Bench, LLARA, Outcome, outcome, rows};

/// Steps of a run.
pub(crate) const STEPS: usize = 20;
/// Rows of a step of all processes.
const GLOBAL_BATCH: usize = 12;

/// Whether there is `mpirun`; a failed test if there is none and it is required.
pub(crate) fn has_mpirun() -> bool {
    let found = Command::new("mpirun").arg("--version").stdout(Stdio::null()).status();
    if let Err(e) = &found {
        assert!(std::env::var_os("LLARA_MPI_TESTS").is_none(), "mpirun: {e}");
        println!("skipped: mpirun: {e}");
    }
    found.is_ok()
}

/// `mpirun` with the program; `None` if there is no `mpirun` and it is not required.
pub(crate) fn mpirun(processes: usize) -> Option<Command> {
    if !has_mpirun() {
        return None;
    }
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--tag-output", "-n"]);
    command.arg(processes.to_string()).arg(LLARA);
    Some(command)
}

/// A bench with rows that 12 does not divide: the last batch of an epoch has 2 of 50.
pub(crate) fn bench() -> Bench {
    let bench = Bench::new();
    let text = rows(50);
    let numbered = text.lines().enumerate().map(|(i, line)| {
        // Different texts, so that the loss does not fall to 0.
        let line = line.replace("sleep", &format!("sleep {i} nights")).replace("in winter", "");
        format!("{line}\n")
    });
    bench.write("train.jsonl", numbered.collect::<String>());
    bench
}

/// The arguments of a run of `processes` processes with the same global batches.
pub(crate) fn arguments(bench: &Bench, out: &str, processes: usize, rest: &[&str]) -> Vec<String> {
    let (steps, batch) = (STEPS.to_string(), (GLOBAL_BATCH / processes).to_string());
    let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path(out));
    let mut args = vec!["finetune", "--model", &model, "--train-data", &data];
    args.extend(["--output-dir", &out, "--max-steps", &steps, "--train-group-size", "2"]);
    args.extend(["--per-device-train-batch-size", &batch, "--query-max-len", "64"]);
    args.extend(["--learning-rate", "2e-5", "--logging-steps", "1", "--temperature", "0.1"]);
    args.extend(["--use-lora", "false", "--threads", "1"]);
    if processes > 1 {
        args.extend(["--negatives-cross-device", "--collective-timeout", "60s"]);
    }
    args.extend(rest);
    args.into_iter().map(str::to_owned).collect()
}

/// Runs on so many processes; `None` if there is no `mpirun`.
pub(crate) fn train(bench: &Bench, out: &str, processes: usize, rest: &[&str]) -> Option<Outcome> {
    let mut command = match processes {
        1 => Command::new(LLARA),
        _ => mpirun(processes)?,
    };
    Some(outcome(command.args(arguments(bench, out, processes, rest))))
}

/// A field of the lines of a log.
fn logged(bench: &Bench, out: &str, field: &str) -> Vec<f64> {
    let log = fs::read_to_string(bench.at(out).join("log.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.map(|line| line[field].as_f64().unwrap()).collect()
}

/// All values of a file of weights, tensor by tensor.
fn weights(path: &Path) -> Vec<(String, Vec<f64>)> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file
        .iter()
        .map(|(name, view)| {
            assert_eq!(view.dtype(), safetensors::Dtype::F32);
            let numbers = view.data().as_chunks().0.iter();
            (name.to_owned(), numbers.map(|&b| f64::from(f32::from_le_bytes(b))).collect())
        })
        .collect();
    tensors.sort_by(|a: &(String, Vec<f64>), b| a.0.cmp(&b.0));
    tensors
}

pub(crate) fn assert_equal_runs(bench: &Bench, (one, several): (&str, &str), file: &str) {
    for (field, bound) in [("loss", 1e-5), ("grad_norm", 1e-4), ("tokens", 0.0)] {
        let (want, got) = (logged(bench, one, field), logged(bench, several, field));
        assert_eq!((want.len(), got.len()), (STEPS, STEPS));
        for (step, (want, got)) in want.iter().zip(&got).enumerate() {
            let error = (got - want).abs() / want.abs();
            assert!(
                error <= bound,
                "{several}, step {step}, {field}: {got}, not {want}: {error:e}"
            );
        }
    }
    let (want, got) = (weights(&bench.at(one).join(file)), weights(&bench.at(several).join(file)));
    assert_eq!(want.len(), got.len());
    for ((name, want), (of_several, got)) in want.iter().zip(&got) {
        assert_eq!(name, of_several);
        let square = |x: f64| x * x;
        let difference: f64 = want.iter().zip(got).map(|(a, b)| square(a - b)).sum();
        let norm: f64 = want.iter().map(|x| square(*x)).sum();
        let error = (difference / norm).sqrt();
        assert!(error <= 1e-4, "{several}, {name}: {error:e}");
    }
}

/// Compares runs on 2, 3 and 4 processes with one, sharded and not.
fn agree_with_one(rest: &[&str], file: &str) {
    let bench = bench();
    train(&bench, "one", 1, rest).unwrap().json();
    let losses = logged(&bench, "one", "loss");
    // Relative errors of losses near 0 would say nothing.
    assert!(losses.iter().all(|loss| *loss > 0.02) && losses[STEPS - 2] < losses[0], "{losses:?}");
    for processes in [2, 3, 4] {
        for shard in ["true", "false"] {
            let out = format!("{processes}-{shard}");
            let rest = [rest, &["--shard-optimizer", shard]].concat();
            let Some(run) = train(&bench, &out, processes, &rest) else { return };
            assert_eq!(run.code, Some(0), "{}", run.stderr);
            assert_equal_runs(&bench, ("one", &out), file);
        }
    }
}

const CHUNKS: [&str; 2] = ["--chunk-tokens", "200"];
const ADAPTER: [&str; 8] =
    ["--use-lora", "true", "--lora-rank", "4", "--lora-dropout", "0.2", "--learning-rate", "1e-4"];

#[test]
fn all_weights() {
    agree_with_one(&[], "model.safetensors");
}

#[test]
fn all_weights_in_chunks() {
    agree_with_one(&CHUNKS, "model.safetensors");
}

#[test]
fn adapters_with_dropout() {
    agree_with_one(&ADAPTER, "adapter_model.safetensors");
}

#[test]
fn adapters_with_dropout_in_chunks() {
    agree_with_one(&[&ADAPTER[..], &CHUNKS].concat(), "adapter_model.safetensors");
}

#[test]
fn only_the_first_process_prints_and_results_are_reported() {
    let bench = bench();
    let Some(run) = train(&bench, "out", 3, &["--max-steps", "2"]) else { return };
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    // mpirun tags every line with its rank.
    assert!(run.stderr.lines().all(|line| !line.contains(",1]<") && !line.contains(",2]<")));
    assert!(run.stderr.contains("processes 3"), "{}", run.stderr);
    let json = run.stdout.split_once('{').unwrap().1;
    let result: serde_json::Value = serde_json::from_str(&format!("{{{json}")).unwrap();
    assert_eq!(result["processes"], 3);
    // Counted messages, and the formula.
    assert_eq!(result["bytes_sent_per_step"], result["expected_bytes_sent_per_step"]);
    assert!(result["bytes_sent_per_step"].as_u64().unwrap() > 1_000_000, "{result}");
}

#[test]
fn bad_data_is_reported_once() {
    let bench = bench();
    bench.write("train.jsonl", "{\"query\": \"q\"}\n");
    let Some(run) = train(&bench, "out", 3, &[]) else { return };
    assert_eq!(run.code, Some(1), "{}", run.stderr);
    assert_eq!(run.stderr.matches("error: ").count(), 1, "{}", run.stderr);
    assert!(run.stderr.contains("train.jsonl:1"), "{}", run.stderr);
    assert!(!bench.at("out").exists());
}

#[test]
fn other_verbs_and_contradictory_environments_are_refused() {
    let bench = bench();
    let Some(mut command) = mpirun(2) else { return };
    let run = outcome(command.args(["check", &bench.path("base")]));
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("this verb runs in one process"), "{}", run.stderr);

    let args = arguments(&bench, "out", 2, &[]);
    for (variables, part) in [
        (&[("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_SIZE", "2")][..], "contradicts"),
        (&[("RANK", "0"), ("WORLD_SIZE", "2")], "unsupported launcher"),
        // MPI says that it is alone.
        (&[("PMI_RANK", "1"), ("PMI_SIZE", "2")], "contradicts"),
    ] {
        let mut command = Command::new(LLARA);
        let run = outcome(command.args(&args).envs(variables.iter().copied()));
        run.refused(&[part]);
    }
}

#[test]
fn texts_are_encoded_and_evaluated_by_all_processes_as_by_one() {
    let bench = bench();
    let text =
        |i: usize| format!("The bear sleeps {i} nights in winter{}.", " and on".repeat(i % 7));
    bench.write("texts.txt", (0..50).map(|i| text(i) + "\n").collect::<String>());
    let (model, texts, beir) = (bench.path("base"), bench.path("texts.txt"), bench.path("beir"));
    let encode = |out: &str| {
        let out = bench.path(out);
        let args =
            ["encode", "--model", &model, "--input", &texts, "--role", "passage", "--output", &out];
        args.map(str::to_owned)
    };
    let evaluate = ["evaluate", "--model", &model, "--dataset", &beir, "--threads", "1"];
    outcome(Command::new(LLARA).args(encode("one.npy"))).json();
    let metrics = outcome(Command::new(LLARA).args(evaluate)).json();
    for processes in [2, 3] {
        let out = format!("{processes}.npy");
        let Some(mut command) = mpirun(processes) else { return };
        let run = outcome(command.args(encode(&out)));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert!(fs::read(bench.at(&out)).unwrap() == fs::read(bench.at("one.npy")).unwrap());
        // The output is complete.
        let Some(mut command) = mpirun(processes) else { return };
        let run = outcome(command.args(encode(&out)).arg("--resume"));
        assert!(run.code == Some(0) && run.stderr.contains("already complete"), "{}", run.stderr);

        let Some(mut command) = mpirun(processes) else { return };
        let run = outcome(command.args(evaluate));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let json = run.stdout.split_once('{').unwrap().1;
        let of_all: serde_json::Value = serde_json::from_str(&format!("{{{json}")).unwrap();
        assert_eq!(of_all, metrics);
    }

    // An error of all, and one of the process that writes.
    for (out, part) in [("texts.txt", "the input"), ("no/such/folder/out.npy", "no/such/folder")] {
        let Some(mut command) = mpirun(2) else { return };
        let run = outcome(command.args(encode(out)));
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert_eq!(run.stderr.matches("error: ").count(), 1, "{}", run.stderr);
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
}

#[test]
fn pretraining_on_several_processes_is_that_of_one() {
    let bench = bench();
    let piece =
        |i: usize| format!("The bear sleeps {i} nights in the cave{}.", " and on".repeat(i % 5));
    let row = |i: usize| {
        let row = serde_json::json!({
            "input": piece(i), "output_summarize": piece(i),
            // Some rows have no following text.
            "output_predict": if i.is_multiple_of(3) { String::new() } else { piece(i + 1) },
        });
        format!("{row}\n")
    };
    bench.write("texts.jsonl", (0..14).map(row).collect::<String>());
    let (model, data) = (bench.path("base"), bench.path("texts.jsonl"));
    let arguments = |out: &str, processes: usize, rest: &[&str]| {
        let (out, batch) = (bench.path(out), (6 / processes).to_string());
        let mut args =
            vec!["pretrain", "--model", &model, "--train-data", &data, "--output-dir", &out];
        args.extend([
            "--per-device-train-batch-size",
            &batch,
            "--max-steps",
            "20",
            "--cutoff-len",
            "96",
        ]);
        args.extend(["--learning-rate", "1e-4", "--logging-steps", "1", "--threads", "1"]);
        args.extend(rest);
        args.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    outcome(Command::new(LLARA).args(arguments("one", 1, &[]))).json();
    for (processes, rest) in [(2, &[][..]), (3, &["--shard-optimizer", "false"]), (3, &CHUNKS)] {
        let out = format!("{processes}-{}", rest.len() + rest.concat().len());
        let Some(mut command) = mpirun(processes) else { return };
        let run = outcome(command.args(arguments(&out, processes, rest)));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        assert_equal_runs(&bench, ("one", &out), "model.safetensors");
        let json = run.stdout.split_once('{').unwrap().1;
        let result: serde_json::Value = serde_json::from_str(&format!("{{{json}")).unwrap();
        assert_eq!(result["bytes_sent_per_step"], result["expected_bytes_sent_per_step"]);
    }
    // 6 rows, then 6, then 2: two of three processes have one row, and one none. A step whose rows have no following text
    // has no loss for it.
    let steps = |out: &str| {
        let log = fs::read_to_string(bench.at(out).join("log.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect::<Vec<serde_json::Value>>()
    };
    for (want, got) in steps("one").iter().zip(steps("2-0")) {
        for term in ["loss_language_model", "loss_auto_encode", "loss_auto_regress"] {
            match (want[term].as_f64(), got[term].as_f64()) {
                (Some(want), Some(got)) => {
                    assert!((want - got).abs() <= 1e-5 * want.abs(), "{term}: {got}, not {want}");
                }
                (want, got) => assert_eq!(want, got, "{term}"),
            }
        }
    }
}
