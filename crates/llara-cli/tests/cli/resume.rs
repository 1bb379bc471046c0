//! `llara finetune --resume-from-checkpoint`: a run that is killed, stopped or disturbed goes on to the bytes of
//! one that was left alone.
//!
//! `LLARA_KILLS=200 cargo test -p llara-cli --test cli resume::killed` kills 200 times in each case.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::fixture::{Bench, LLARA, Outcome, outcome, with_fixed_kernels};

/// Arguments of a run of 10 steps that saves after each one and keeps two checkpoints. In `rest`, `BEIR` is the
/// test collection.
fn arguments(bench: &Bench, out: &str, rest: &[&str]) -> Vec<String> {
    let (model, data) = (bench.path("base"), bench.path("train.jsonl"));
    let fixed = ["finetune", "--model", &model, "--train-data", &data, "--output-dir"];
    let mut args: Vec<String> = fixed.map(str::to_owned).into();
    args.push(bench.path(out));
    let settings = "--max-steps 10 --train-group-size 2 --per-device-train-batch-size 4 \
        --query-max-len 64 --learning-rate 1e-3 --logging-steps 1 --save-steps 1 --save-total-limit 2 \
        --lora-rank 4 --threads 1 --chunk-tokens auto";
    args.extend(settings.split_whitespace().map(str::to_owned));
    args.extend(rest.iter().map(|&arg| arg.replace("BEIR", &bench.path("beir"))));
    args
}

fn run(bench: &Bench, out: &str, rest: &[&str]) -> Outcome {
    outcome(with_fixed_kernels().args(arguments(bench, out, rest)))
}

fn start(bench: &Bench, out: &str, rest: &[&str]) -> Child {
    let mut command = with_fixed_kernels();
    command.args(arguments(bench, out, rest)).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// The files of the model or adapter in a folder.
fn model_files(bench: &Bench, out: &str) -> BTreeMap<String, Vec<u8>> {
    let names = bench.names(out).into_iter();
    let files = names.filter(|name| {
        !["log.jsonl", "run.json", "report.html"].contains(&&**name)
            && bench.at(out).join(name).is_file()
    });
    files.map(|name| (name.clone(), fs::read(bench.at(out).join(&name)).unwrap())).collect()
}

fn assert_same_model(bench: &Bench, got: &str, want: &str) {
    let (got, want) = (model_files(bench, got), model_files(bench, want));
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    assert!(want.keys().any(|name| name.ends_with(".safetensors")), "{:?}", want.keys());
    for (name, bytes) in &want {
        assert!(got[name] == *bytes, "{name} differs");
    }
}

/// What the newest checkpoint says that it was computed with: a run that is not resumed may choose other
/// kernels and chunks.
fn computed_with(bench: &Bench, out: &str) -> String {
    let newest = |name: &String| name.strip_prefix("checkpoint-")?.parse::<u64>().ok();
    let name = bench.names(out).into_iter().max_by_key(newest).unwrap();
    let state = fs::read_to_string(bench.at(out).join(name).join("trainer_state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    format!("{} {}", state["identity"]["rounding"], state["chunking"])
}

/// The figures of all evaluations without the time that they took.
fn evaluated(bench: &Bench, out: &str) -> Vec<serde_json::Value> {
    let log = fs::read_to_string(bench.at(out).join("log.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut figures: Vec<_> = lines.filter(|line| line.get("eval_dataset").is_some()).collect();
    figures.iter_mut().for_each(|line| line["seconds"] = 0.into());
    figures
}

/// Waits until the log has so many lines.
fn wait_for_steps(bench: &Bench, out: &str, steps: usize) {
    let log = bench.at(out).join("log.jsonl");
    let logged = || fs::read_to_string(&log).map_or(0, |text| text.lines().count());
    wait_until("the run does not begin", || logged() >= steps);
}

fn wait_until(fault: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(120), "{fault}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Numbers from 0 to 1; not very random, and the same each time.
struct Moments(u64);

impl Moments {
    fn next(&mut self) -> f64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Kills runs with SIGKILL at moments spread over their whole time, and resumes each.
fn killed_and_resumed(rest: &[&str]) {
    let kills: usize =
        std::env::var("LLARA_KILLS").map_or(6, |count| count.parse().expect("a number of kills"));
    let bench = Bench::new();
    let begin = Instant::now();
    run(&bench, "whole", rest).json();
    let time = begin.elapsed();
    let resume = [rest, &["--resume-from-checkpoint"]].concat();
    let mut moments = Moments(kills as u64);
    let (mut killed, mut finished) = (0, 0);
    while killed < kills || finished == 0 {
        let mut child = start(&bench, "out", &resume);
        // Long enough for some runs to end, short enough for most not to.
        let wait = time.mul_f64(if killed < kills { 0.9 * moments.next() } else { 100.0 });
        let begin = Instant::now();
        while begin.elapsed() < wait && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(1));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            child.wait().unwrap();
            killed += 1;
            continue;
        }
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert!(!stderr.contains("damaged"), "{stderr}");
        assert_eq!(computed_with(&bench, "out"), computed_with(&bench, "whole"));
        assert_same_model(&bench, "out", "whole");
        assert_eq!(evaluated(&bench, "out"), evaluated(&bench, "whole"));
        finished += 1;
        fs::remove_dir_all(bench.at("out")).unwrap();
    }
}

#[test]
fn killed_at_any_moment_with_all_weights() {
    killed_and_resumed(&["--use-lora", "false"]);
}

#[test]
fn killed_at_any_moment_with_all_weights_in_bf16() {
    killed_and_resumed(&["--use-lora", "false", "--dtype", "bf16", "--save-dtype", "bf16"]);
}

#[test]
fn killed_at_any_moment_with_adapters() {
    killed_and_resumed(&["--chunk-tokens", "200"]);
}

#[test]
fn killed_at_any_moment_with_adapters_in_bf16() {
    killed_and_resumed(&["--dtype", "bf16"]);
}

/// The first evaluated step is the best one: all 12 passages are among the first 100.
#[test]
fn killed_at_any_moment_with_evaluation() {
    let eval = "--eval-dataset BEIR --eval-split test --eval-steps 1 --load-best-model-at-end \
        --metric-for-best-model recall@100 --use-lora false";
    killed_and_resumed(&eval.split_whitespace().collect::<Vec<_>>());
}

#[test]
fn signals_save_a_checkpoint_and_have_their_exit_codes() {
    let bench = Bench::new();
    let long = ["--max-steps", "100000", "--save-steps", "0", "--lr-scheduler-type", "constant"];
    let mut steps = 0;
    for (signal, code) in [("INT", 130), ("TERM", 143), ("USR1", 138)] {
        let child = start(&bench, "out", &[&long[..], &["--resume-from-checkpoint"]].concat());
        wait_for_steps(&bench, "out", steps + 2);
        let mut kill = Command::new("kill");
        let sent = kill.args([format!("-{signal}"), child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(output.stdout.is_empty(), "{stderr}");
        assert!(stderr.contains("stopped after step "), "{stderr}");
        let lines = fs::read_to_string(bench.at("out/log.jsonl")).unwrap().lines().count();
        assert!(lines > steps, "{lines} lines after {steps}");
        steps = lines;
        assert!(bench.at(&format!("out/checkpoint-{steps}/manifest.json")).is_file(), "{stderr}");
    }
    // The log has every step once, whoever made it.
    let log = fs::read_to_string(bench.at("out/log.jsonl")).unwrap();
    let logged: Vec<u64> = log
        .lines()
        .map(|line| {
            serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap()
        })
        .collect();
    assert_eq!(logged, (1..=steps as u64).collect::<Vec<_>>());
}

#[test]
fn a_second_signal_ends_the_run_at_once_and_harms_nothing() {
    let bench = Bench::new();
    let long = ["--max-steps", "100000", "--use-lora", "false"];
    for _ in 0..2 {
        let log = fs::read_to_string(bench.at("out/log.jsonl")).unwrap_or_default();
        let child = start(&bench, "out", &[&long[..], &["--resume-from-checkpoint"]].concat());
        // Once more than before: a signal before the run has begun ends it in the ordinary way.
        wait_for_steps(&bench, "out", log.lines().count() + 2);
        for _ in 0..2 {
            let id = child.id().to_string();
            // The second may come after the end.
            let _ =
                Command::new("kill").args(["-TERM", &id]).stderr(Stdio::null()).status().unwrap();
        }
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(143), "{stderr}");
        assert!(!stderr.contains("damaged"), "{stderr}");
    }
}

#[test]
fn the_time_is_limited_and_the_run_goes_on_later() {
    let bench = Bench::new();
    let args = ["--max-time", "1s", "--max-steps", "100000", "--save-steps", "0"];
    let stopped = run(&bench, "out", &args);
    assert_eq!(stopped.code, Some(75), "{}", stopped.stderr);
    assert!(stopped.stderr.contains("because --max-time has passed"), "{}", stopped.stderr);
    let checkpoint = bench.names("out").into_iter().find(|name| name.starts_with("checkpoint-"));
    let resumed = run(&bench, "out", &[&args[..], &["--resume_from_checkpoint"]].concat());
    assert_eq!(resumed.code, Some(75), "{}", resumed.stderr);
    assert!(resumed.stderr.contains(&checkpoint.unwrap()), "{}", resumed.stderr);
}

#[test]
fn without_a_checkpoint_a_new_run_starts_and_says_so() {
    let bench = Bench::new();
    let resume = ["--resume-from-checkpoint", "latest", "--max-steps", "2"];
    let first = run(&bench, "out", &resume);
    first.json();
    assert!(first.stderr.contains("this starts a new run"), "{}", first.stderr);
    // What a run leaves that was killed before its first checkpoint.
    fs::create_dir_all(bench.at("new/runs")).unwrap();
    fs::create_dir_all(bench.at("new/.writing-checkpoint-1")).unwrap();
    bench.write("new/log.jsonl", "{\"step\": 1");
    let second = run(&bench, "new", &resume);
    second.json();
    assert!(second.stderr.contains("removed"), "{}", second.stderr);
    assert!(!bench.names("new").contains(&".writing-checkpoint-1".to_owned()));
    // A model that is in the folder is not overwritten unasked.
    fs::remove_dir_all(bench.at("out/checkpoint-1")).unwrap();
    fs::remove_dir_all(bench.at("out/checkpoint-2")).unwrap();
    run(&bench, "out", &resume).refused(&["the output folder is not empty"]);
    run(&bench, "off", &["--resume-from-checkpoint", "false", "--max-steps", "1"]).json();
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_used() {
    let bench = Bench::new();
    let args = ["--use-lora", "false", "--save-total-limit", "3"];
    run(&bench, "whole", &args).json();
    let resume = [&args[..], &["--resume-from-checkpoint"]].concat();
    run(&bench, "out", &args).json();
    fs::write(bench.at("out/checkpoint-10/model.safetensors"), "gone").unwrap();
    let path = bench.at("out/checkpoint-9/optimizer.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, &bytes).unwrap();
    let resumed = run(&bench, "out", &resume);
    resumed.json();
    for part in ["checkpoint-10/model.safetensors", "checkpoint-9/optimizer.safetensors"] {
        assert!(resumed.stderr.contains(part), "{}", resumed.stderr);
    }
    assert!(resumed.stderr.contains("checkpoint-8 is used instead"), "{}", resumed.stderr);
    assert_same_model(&bench, "out", "whole");

    for step in [8, 9, 10] {
        fs::write(bench.at(&format!("out/checkpoint-{step}/manifest.json")), "{}").unwrap();
    }
    let before = bench.names("out");
    run(&bench, "out", &resume).refused(&["no checkpoint of this run", "manifest.json"]);
    assert_eq!(bench.names("out"), before, "nothing is deleted");
    // One folder by name: the error names its file.
    let folder = bench.path("out/checkpoint-9");
    run(&bench, "out", &["--resume-from-checkpoint", &folder]).refused(&[&folder, "manifest.json"]);
}

#[test]
fn changed_settings_and_data_are_refused_by_name() {
    let bench = Bench::new();
    run(&bench, "out", &["--max-steps", "3"]).json();
    let resume = ["--resume-from-checkpoint", "--max-steps", "3"];
    run(&bench, "out", &[&resume[..], &["--seed", "7", "--lora-alpha", "4"]].concat()).refused(&[
        "2 settings differ",
        "seed: 42 in the checkpoint, 7 now",
        "\"alpha\":16",
    ]);
    let text = fs::read_to_string(bench.at("train.jsonl")).unwrap();
    bench.write("train.jsonl", text.replacen("winter", "summer", 1));
    run(&bench, "out", &resume).refused(&["train.jsonl: the training data changed"]);
    bench.write("train.jsonl", text);
    let more = ["--resume-from-checkpoint", "--max-steps", "5", "--save-total-limit", "1"];
    let resumed = run(&bench, "out", &more);
    assert_eq!(resumed.json()["steps"], 5);
    assert!(resumed.stderr.contains("5 steps instead of 3"), "{}", resumed.stderr);
    let checkpoints = bench.names("out").into_iter().filter(|name| name.starts_with("checkpoint"));
    assert_eq!(checkpoints.collect::<Vec<_>>(), ["checkpoint-5"]);
}

#[test]
fn a_full_disk_leaves_the_earlier_checkpoint_and_the_run_goes_on_later() {
    let bench = Bench::new();
    let args = ["--use-lora", "false", "--save-steps", "4", "--save-total-limit", "1"];
    run(&bench, "whole", &args).json();
    let mut child = start(&bench, "out", &args);
    wait_until("there is no checkpoint", || bench.at("out/checkpoint-4").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    let newest = |names: Vec<String>| names.into_iter().find(|name| name.starts_with("checkpoint"));
    let before = newest(bench.names("out")).expect("a checkpoint after four steps");
    let script = "ulimit -f 300; exec \"$0\" \"$@\"";
    let resume = [&args[..], &["--resume-from-checkpoint"]].concat();
    let mut limited = Command::new("sh");
    limited.args(["-c", script, LLARA]).args(arguments(&bench, "out", &resume));
    outcome(&mut limited).refused(&["cannot write weights", "hint: free"]);
    assert_eq!(newest(bench.names("out")), Some(before));
    let hidden = |name: &String| name.starts_with('.');
    assert!(!bench.names("out").iter().any(hidden), "{:?}", bench.names("out"));
    run(&bench, "out", &resume).json();
    assert_same_model(&bench, "out", "whole");
}
