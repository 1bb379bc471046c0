//! `llara finetune --eval-dataset`: figures, reports, the best model, early stopping, and what they do not change.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::fixture::{Bench, LLARA, Outcome, copy_folder_deep, llara, outcome, with_fixed_kernels};

const METRICS: [&str; 3] = ["ndcg@10", "mrr@10", "recall@100"];

/// A run of six steps that evaluates on the split `test` of `beir` after every second one.
fn finetune(bench: &Bench, rest: &[&str]) -> Outcome {
    let beir = bench.path("beir");
    let mut args = vec!["--max-steps", "6", "--eval-dataset", &beir, "--eval-split", "test"];
    args.extend(["--eval-steps", "2", "--save-steps", "2"]);
    args.extend(rest);
    bench.finetune_by(with_fixed_kernels(), &args)
}

/// The lines of the log about evaluations.
fn figures(bench: &Bench, out: &str) -> Vec<Value> {
    let log = fs::read_to_string(bench.at(out).join("log.jsonl")).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str(line).unwrap());
    lines.filter(|line: &Value| line.get("eval_dataset").is_some()).collect()
}

/// `figures` as `(step, set, nDCG@10)`.
fn values(bench: &Bench, out: &str) -> Vec<(u64, String, f64)> {
    let value = |line: &Value| {
        let set = line["eval_dataset"].as_str().unwrap().to_owned();
        (line["step"].as_u64().unwrap(), set, line["ndcg@10"].as_f64().unwrap())
    };
    figures(bench, out).iter().map(value).collect()
}

fn weights(bench: &Bench, folder: &str) -> Vec<u8> {
    let adapter = bench.at(folder).join("adapter_model.safetensors");
    let file = if adapter.is_file() { adapter } else { bench.at(folder).join("model.safetensors") };
    fs::read(file).unwrap()
}

#[test]
fn figures_are_those_of_evaluate_on_the_saved_models() {
    let bench = Bench::new();
    for lora in ["false", "true"] {
        let rest = ["--use-lora", lora, "--lora-rank", "4", "--overwrite-output-dir"];
        let result = finetune(&bench, &[&rest[..], &["--learning-rate", "5e-3"]].concat());
        let eval = &result.json()["eval"];
        let lines = figures(&bench, "out");
        let steps: Vec<u64> = lines.iter().map(|line| line["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [0, 2, 4, 6]);
        for line in &lines {
            let step = line["step"].as_u64().unwrap();
            let folder = match step {
                0 => bench.path("base"),
                step => bench.path(&format!("out/checkpoint-{step}")),
            };
            let (base, beir) = (bench.path("base"), bench.path("beir"));
            // An adapter is trained with the lengths of this run, which the starting model does not know.
            let mut args = vec!["evaluate", "--dataset", &beir, "--query-max-len", "64", "--model"];
            match lora == "true" && step > 0 {
                true => args.extend([base.as_str(), "--adapter", &folder]),
                false => args.push(&folder),
            }
            let expected = llara(&args).json();
            for metric in METRICS {
                assert_eq!(line[metric], expected[metric], "{metric} after {step}");
            }
            assert_eq!(
                (&line["queries"], &line["eval_split"]),
                (&expected["queries"], &"test".into())
            );
            assert!(line["seconds"].as_f64().unwrap() > 0.0 && line["epoch"].is_number());
        }
        assert_eq!((&eval["start"]["step"], &eval["last"]["step"]), (&0.into(), &6.into()));
        assert_eq!(eval["start"]["datasets"]["beir"]["mrr@10"], lines[0]["mrr@10"]);
        assert_eq!(eval["last"]["value"], lines[3]["ndcg@10"]);
        let best =
            lines[1..].iter().map(|line| line["ndcg@10"].as_f64().unwrap()).fold(0.0, f64::max);
        assert_eq!((&eval["best"]["value"], &eval["metric"]), (&best.into(), &"ndcg@10".into()));
        assert!(
            result.stderr.contains("evaluated 0/6  beir (test): ndcg@10 "),
            "{}",
            result.stderr
        );
    }
    let runs = bench.names("out/runs");
    let events = fs::read(bench.at("out/runs").join(&runs[0])).unwrap();
    let has = |text: &str| events.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(METRICS.iter().all(|metric| has(&format!("eval/beir/{metric}"))));
}

#[test]
fn the_report_has_the_best_and_the_worst_queries_of_the_last_evaluation() {
    let bench = Bench::new();
    finetune(&bench, &[]).json();
    let report: Value =
        serde_json::from_slice(&fs::read(bench.at("out/eval_queries.json")).unwrap()).unwrap();
    let set = &report["beir"];
    assert_eq!((&set["step"], &set["split"]), (&6.into(), &"test".into()));
    let (best, worst) = (set["best"].as_array().unwrap(), set["worst"].as_array().unwrap());
    assert_eq!((best.len(), worst.len()), (6, 6));
    let mean: f64 = best.iter().map(|query| query["ndcg@10"].as_f64().unwrap() / 6.0).sum();
    let last = figures(&bench, "out").pop().unwrap()["ndcg@10"].as_f64().unwrap();
    assert!((mean - last).abs() < 1e-9, "{mean} {last}");
    assert!(best[0]["ndcg@10"].as_f64() >= worst[0]["ndcg@10"].as_f64());
    let found = best[0]["found"].as_array().unwrap();
    assert_eq!(found.len(), 5);
    assert!(found[0]["score"].as_f64() >= found[4]["score"].as_f64());
    assert!(found[0]["text"].as_str().unwrap().starts_with("The "));
    // Of an earlier run nothing stays.
    bench.finetune(&["--overwrite-output-dir"]).json();
    assert!(!bench.at("out/eval_queries.json").exists());
}

#[test]
fn evaluation_does_not_change_training() {
    let bench = Bench::new();
    for rest in [
        &["--use-lora", "false"][..],
        &["--use-lora", "true", "--lora-rank", "4", "--lora-dropout", "0.2"],
        &["--use-lora", "false", "--dtype", "bf16", "--chunk-tokens", "200"],
    ] {
        let without = [rest, &["--max-steps", "6", "--overwrite-output-dir"]].concat();
        bench.finetune_by(with_fixed_kernels(), &without).json();
        let before = weights(&bench, "out");
        finetune(&bench, &[rest, &["--eval-steps", "1", "--overwrite-output-dir"]].concat()).json();
        assert!(weights(&bench, "out") == before, "{rest:?}");
    }
}

/// A run whose first evaluated step is the best one: all 12 passages are among the first 100.
const FIRST_IS_BEST: [&str; 7] = [
    "--metric-for-best-model",
    "recall@100",
    "--eval-steps",
    "1",
    "--save-steps",
    "500",
    "--load-best-model-at-end",
];

#[test]
fn the_best_model_is_saved_at_the_end_and_its_checkpoint_kept() {
    let bench = Bench::new();
    let run = |rest: &[&str]| finetune(&bench, &[&FIRST_IS_BEST[..], rest].concat());
    let result = run(&["--save-total-limit", "1"]);
    let best = &result.json()["eval"]["best"];
    assert_eq!((&best["step"], &best["value"]), (&1.into(), &1.0.into()));
    let folder = "out/checkpoint-1";
    assert!(weights(&bench, "out") == weights(&bench, folder));
    assert!(result.stderr.contains(&format!("from {}", bench.path(folder))), "{}", result.stderr);
    // The last step is kept beside the best one.
    let checkpoints = bench.names("out").into_iter().filter(|name| name.starts_with("checkpoint"));
    assert_eq!(checkpoints.collect::<Vec<_>>(), ["checkpoint-1", "checkpoint-6"]);
    assert!(weights(&bench, "out") != weights(&bench, "out/checkpoint-6"));
    let (beir, out) = (bench.path("beir"), bench.path("out"));
    let evaluated = llara(&["evaluate", "--model", &out, "--dataset", &beir]).json();
    assert_eq!(evaluated["ndcg@10"], best["datasets"]["beir"]["ndcg@10"]);

    // A run that ended, and one that lost its model after the last step, end with the same.
    let whole = weights(&bench, "out");
    let log = figures(&bench, "out");
    let again = run(&["--save-total-limit", "1", "--resume-from-checkpoint"]);
    assert_eq!(again.json()["eval"], result.json()["eval"]);
    assert!(weights(&bench, "out") == whole);
    assert_eq!(figures(&bench, "out"), log);

    // Without its checkpoint the best model cannot be loaded.
    fs::rename(bench.at(folder), bench.at("elsewhere")).unwrap();
    run(&["--resume-from-checkpoint"]).refused(&["checkpoint-1", "--load-best-model-at-end false"]);
}

#[test]
fn a_run_without_improvement_ends_early_and_stays_ended() {
    let bench = Bench::new();
    let rest = ["--learning-rate", "1e-12", "--early-stopping-patience", "2", "--max-steps", "100"];
    let stop = |more: &[&str]| finetune(&bench, &[&rest[..], more].concat());
    let first = stop(&["--load-best-model-at-end"]);
    let result = first.json();
    // The figures after 2 steps are the best, those after 4 and 6 are no better.
    assert_eq!((&result["steps"], &result["eval"]["best"]["step"]), (&6.into(), &2.into()));
    assert!(first.stderr.contains("stopped early, after step 6 of 100"), "{}", first.stderr);
    assert!(weights(&bench, "out") == weights(&bench, "out/checkpoint-2"));
    let again = stop(&["--load-best-model-at-end", "--resume-from-checkpoint"]).json();
    assert_eq!((&again["steps"], &again["eval"]), (&result["steps"], &result["eval"]));
    // With more patience the run goes on, and the patience counts on.
    let more = ["--resume-from-checkpoint", "--early-stopping-patience", "4"];
    let later = stop(&more);
    assert_eq!(later.json()["steps"], 10);
    assert!(later.stderr.contains("without --load-best-model-at-end"), "{}", later.stderr);
}

#[test]
fn several_sets_have_names_and_the_metric_is_their_mean_or_that_of_one() {
    let bench = Bench::new();
    let (beir, second) = (bench.path("beir"), format!("second={}", bench.path("beir2")));
    copy_folder_deep(&bench.at("beir"), &bench.at("beir2"));
    bench.write("beir2/qrels/test.tsv", "q0\td1\t2\nq3\td3\t1\n");
    let rest = ["--eval-dataset", &second, "--eval-strategy", "epoch"];
    let result = finetune(&bench, &[&rest[..], &["--eval-on-start", "false"]].concat()).json();
    let lines = values(&bench, "out");
    let names: Vec<(u64, &str)> =
        lines.iter().map(|(step, set, _)| (*step, set.as_str())).collect();
    // Three steps of four rows are an epoch of twelve.
    assert_eq!(names, [(3, "beir"), (3, "second"), (6, "beir"), (6, "second")]);
    let last = &result["eval"]["last"];
    let mean = f64::midpoint(lines[2].2, lines[3].2);
    assert!((last["value"].as_f64().unwrap() - mean).abs() < 1e-12, "{last} {lines:?}");
    assert_eq!(result["eval"]["start"], Value::Null);
    assert_eq!(last["datasets"]["second"]["queries"], 2);

    bench.write(
        "run.toml",
        format!(
            "eval-dataset = [{beir:?}, {second:?}]\neval_split = \"test\"\n\
             metric_for_best_model = \"second/mrr@10\"\neval-steps = 3\n"
        ),
    );
    let config = bench.path("run.toml");
    let result = bench.finetune(&["--config", &config, "--overwrite-output-dir"]).json();
    assert_eq!(result["eval"]["metric"], "second/mrr@10");
    let last = &result["eval"]["last"];
    assert_eq!(last["value"], last["datasets"]["second"]["mrr@10"]);
    assert_eq!(values(&bench, "out").len(), 4);
}

#[test]
fn wrong_sets_and_settings_are_refused_before_training() {
    let bench = Bench::new();
    let beir = bench.path("beir");
    bench.write("beir/qrels/other.tsv", "q0\tnone\t1\nq1\td1\t1\n");
    let with = |rest: &[&str]| bench.finetune(&[&["--eval-dataset", &beir], rest].concat());
    with(&[]).refused(&["there is no split `dev`", "other, test"]);
    with(&["--eval-split", "other"]).refused(&["unknown documents", "--on-unknown-id skip"]);
    let test = ["--eval-split", "test"];
    let split = |rest: &[&str]| with(&[&test[..], rest].concat());
    split(&["--metric-for-best-model", "loss"]).refused(&["ndcg@10, mrr@10, recall@100", "loss"]);
    split(&["--metric-for-best-model", "x/ndcg@10"]).refused(&["one of the sets beir"]);
    split(&["--eval-dataset", &beir]).refused(&["the same name", "beir"]);
    split(&["--early-stopping-patience", "0"]).refused(&["patience 0"]);
    split(&["--early-stopping-patience", "1", "--early-stopping-threshold", "nan"])
        .refused(&["threshold NaN"]);
    split(&["--greater-is-better", "false"]).refused(&["`--greater-is-better` is not supported"]);
    bench.finetune(&["--load-best-model-at-end"]).refused(&["--eval-dataset DIR"]);
    bench.finetune(&["--eval-dataset", &bench.path("none")]).refused(&["none/qrels"]);
    let inside = bench.path("beir/out");
    split(&["--output-dir", &inside]).refused(&["the evaluation data"]);
    bench.write("beir/corpus.jsonl", "\n");
    split(&[]).refused(&["corpus.jsonl: the file contains no record"]);
    assert!(!bench.at("out").join("log.jsonl").exists());
    let skipped = ["--eval-split", "other", "--on-unknown-id", "skip"];
    fs::copy(bench.at("beir/queries.jsonl"), bench.at("beir/corpus.jsonl")).unwrap();
    bench.write("beir/qrels/other.tsv", "q0\tnone\t1\nq1\tq1\t1\n");
    let result = with(&skipped);
    assert_eq!(result.json()["eval"]["last"]["datasets"]["beir"]["queries"], 1);
    assert!(result.stderr.contains("beir: 1 judgment of unknown"), "{}", result.stderr);
}

#[test]
fn a_resumed_run_with_another_metric_or_set_is_refused() {
    let bench = Bench::new();
    finetune(&bench, &["--max-steps", "2"]).json();
    let resumed = |rest: &[&str]| finetune(&bench, &[&["--resume-from-checkpoint"], rest].concat());
    resumed(&["--metric-for-best-model", "mrr@10"])
        .refused(&["ndcg@10 in the checkpoint, mrr@10 now", "--eval-strategy no"]);
    bench.write("beir/qrels/test.tsv", "q0\td0\t1\n");
    resumed(&[]).refused(&["eval-dataset: beir (test), fingerprint "]);
    // Without evaluation the run goes on and its figures are kept.
    let result = resumed(&["--eval-strategy", "no", "--max-steps", "4"]);
    assert_eq!(result.json().get("eval"), None);
    assert!(result.stderr.contains("--eval-strategy no has no effect"), "{}", result.stderr);
    let state = fs::read_to_string(bench.at("out/checkpoint-4/trainer_state.json")).unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    assert_eq!(state["evaluation"]["last"]["step"], 2);
}

#[test]
fn an_interrupted_evaluation_is_made_when_the_run_is_resumed() {
    let bench = Bench::new();
    let passages: String = (0..4000)
        .map(|i| format!("{{\"_id\": \"d{i}\", \"text\": \"The otter {i} sleeps.\"}}\n"))
        .collect();
    bench.write("beir/corpus.jsonl", passages);
    let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path("out"));
    let beir = bench.path("beir");
    let mut args = vec!["finetune", "--model", &model, "--train-data", &data, "--output-dir", &out];
    args.extend(["--use-lora", "false", "--train-group-size", "2", "--logging-steps", "1"]);
    args.extend(["--max-steps", "2", "--query-max-len", "64", "--resume-from-checkpoint"]);
    args.extend(["--eval-dataset", &beir, "--eval-split", "test", "--eval-on-start", "false"]);
    let mut command = Command::new(LLARA);
    command.args(&args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // The second step is the last one, and its evaluation follows.
    let logged =
        || fs::read_to_string(bench.at("out/log.jsonl")).map_or(0, |log| log.lines().count());
    let start = Instant::now();
    while logged() < 2 && start.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(143), "{stderr}");
    assert!(stderr.contains("stopped after step 2 of 2"), "{stderr}");
    assert_eq!(figures(&bench, "out").len(), 0);
    assert!(bench.at("out/checkpoint-2/manifest.json").is_file(), "{stderr}");
    assert!(!bench.at("out/model.safetensors").exists());
    let result = outcome(Command::new(LLARA).args(&args)).json();
    assert_eq!((&result["steps"], &result["eval"]["last"]["step"]), (&2.into(), &2.into()));
    assert_eq!(figures(&bench, "out").len(), 1);
    assert!(weights(&bench, "out") == weights(&bench, "out/checkpoint-2"));
}
