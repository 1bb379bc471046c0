//! `llara plan` and `plan-pretraining`, and what `finetune` says and refuses before it begins.

use std::fs;

use crate::fixture::{Bench, Outcome, llara};

fn plan(bench: &Bench, rest: &[&str]) -> Outcome {
    let (model, data) = (bench.path("base"), bench.path("train.jsonl"));
    let mut args = vec!["plan", "--model", &model, "--train-data", &data, "--max-steps", "3"];
    args.extend(["--train-group-size", "2", "--per-device-train-batch-size", "4"]);
    args.extend(["--query-max-len", "64"]);
    args.extend(rest);
    llara(&args)
}

#[test]
fn a_plan_needs_no_weights_and_writes_nothing() {
    let bench = Bench::new();
    fs::remove_file(bench.at("base/model.safetensors")).unwrap();
    let before = bench.names("");
    let planned = plan(&bench, &["--use-lora", "false"]);
    let json = planned.json();
    assert_eq!(bench.names(""), before);
    let bytes = |path: &str| json.pointer(path).and_then(|n| n.as_u64()).unwrap();
    let weights = bytes("/plan/training/weights");
    assert!(weights > 0);
    // Each tensor begins at a cache line, so small ones may differ by that.
    assert!(bytes("/plan/training/gradients").abs_diff(weights) < 1 << 12);
    assert!(bytes("/plan/training/optimizer").abs_diff(2 * weights) < 1 << 12);
    let work = &json["plan"]["work"];
    assert!(work["done_flops"].as_u64().unwrap() >= work["needed_flops"].as_u64().unwrap());
    assert!(bytes("/peak_bytes") > 4 * weights);
    assert_eq!((bytes("/plan/chunks/count"), bytes("/batch/queries")), (1, 4));
    assert_eq!((bytes("/lengths/query/texts"), bytes("/lengths/passage/texts")), (12, 36));
    assert_eq!((&json["fits"], &json["refused"]), (&true.into(), &false.into()));
    for part in ["queries: tokens of 12 texts", "passages: tokens of 36", "█", "one pass over"] {
        assert!(planned.stderr.contains(part), "no {part:?} in: {}", planned.stderr);
    }
    for part in [
        "weights",
        "optimizer",
        "saving",
        "← maximum length 128: 0.0 % are truncated",
        "usable",
        "needed",
    ] {
        assert!(planned.stderr.contains(part), "no {part:?} in: {}", planned.stderr);
    }
    assert_eq!(llara(&["plan", "--train-data", "x"]).code, Some(2));
}

#[test]
fn a_memory_limit_gives_chunks_and_a_run_with_them_has_the_same_result() {
    let bench = Bench::new();
    let whole = bench.finetune(&[]);
    assert!(whole.stderr.contains("chunks    one pass"), "{}", whole.stderr);
    let loss = whole.json()["loss"].as_f64().unwrap();
    fs::remove_dir_all(bench.at("out")).unwrap();

    let json = plan(&bench, &[]).json();
    let bytes = |path: &str| json.pointer(path).and_then(|n| n.as_u64()).unwrap();
    // Half of the activations less than needed.
    let budget = bytes("/peak_bytes") - bytes("/plan/training/activations") / 2;
    let budget = budget.to_string();
    let args = ["--memory-budget", &budget];
    let chunked = plan(&bench, &args);
    let json = chunked.json();
    assert!(json["plan"]["chunks"]["count"].as_u64().unwrap() > 1, "{}", chunked.stderr);
    let run = bench.finetune(&args);
    assert!(run.stderr.contains("chunks of at most"), "{}", run.stderr);
    let difference = (run.json()["loss"].as_f64().unwrap() - loss).abs();
    assert!(difference < 1e-4 * loss, "{difference}");
}

#[test]
fn a_run_that_cannot_fit_is_refused_with_what_would() {
    let bench = Bench::new();
    let (data, larger) = (bench.path("train.jsonl"), bench.path("larger"));
    let init = ["init", "--preset", "small", "--vocab-size", "400", "--train-data", &data];
    llara(&[&init[..], &["--output-dir", &larger]].concat()).json();
    fs::remove_dir_all(bench.at("base")).unwrap();
    fs::rename(bench.at("larger"), bench.at("base")).unwrap();

    let json = plan(&bench, &["--use-lora", "false"]).json();
    let bytes = |path: &str| json.pointer(path).and_then(|n| n.as_u64()).unwrap();
    // Moments of all weights do not fit, adapters and their moments do.
    let budget = bytes("/peak_bytes")
        - bytes("/plan/training/activations")
        - bytes("/plan/training/optimizer") / 2;
    let budget = budget.to_string();
    let args = ["--use-lora", "false", "--memory-budget", &budget];
    let refused = bench.finetune(&args);
    refused.refused(&["does not fit in", "weights", "optimizer", "with the smallest chunks"]);
    assert!(refused.stderr.contains("--use-lora true needs"), "{}", refused.stderr);
    assert!(!bench.at("out").exists());
    let planned = plan(&bench, &args);
    assert_eq!(planned.json()["refused"], true);
    assert!(planned.stderr.contains("finetune would refuse"), "{}", planned.stderr);
    let parts = ["does not fit in 1.00 MiB", "smaller model or a machine with more memory"];
    bench.finetune(&["--memory-budget", "1MiB"]).refused(&parts);
    bench.finetune(&["--memory-budget", "1MiB", "--sub-batch-size", "2"]).refused(&["does not"]);
    for args in [["--memory-budget", "some"], ["--chunk-tokens", "few"]] {
        assert_eq!(plan(&bench, &args).code, Some(2));
    }
}

#[test]
fn several_processes_are_planned_with_their_network() {
    let bench = Bench::new();
    let one = plan(&bench, &["--use-lora", "false"]).json();
    assert!(one.get("network").is_none());
    let planned = plan(
        &bench,
        &[
            "--use-lora=false",
            "--processes=4",
            "--network=1MB/s",
            "--negatives-cross-device",
            "--step-seconds=0.5",
        ],
    );
    let json = planned.json();
    let of = |name: &str| json["network"][name].as_f64().unwrap();
    let moments = one["plan"]["training"]["optimizer"].as_f64().unwrap();
    assert_eq!(of("optimizer_bytes"), json["plan"]["training"]["optimizer"].as_f64().unwrap());
    assert!((of("optimizer_bytes") / moments - 0.25).abs() < 0.01, "{json}");
    // Gradients and weights of three quarters of the parameters; embeddings of four rows of two passages.
    let expected = moments * 0.75 + 8.0 * 3.0 * 4.0 * 2.0 * 128.0;
    assert!((of("bytes_sent_per_step") / expected - 1.0).abs() < 0.05, "{json}");
    assert_eq!(of("communication_seconds"), of("bytes_sent_per_step") / 1e6);
    assert!(of("communication_share") > 0.5 && planned.stderr.contains("sent per step"));
    let wrong = plan(&bench, &["--processes", "4", "--network", "fast"]);
    assert!(wrong.code == Some(2) && wrong.stderr.contains("25GB/s"), "{}", wrong.stderr);
    let alone = plan(&bench, &["--network", "1MB/s"]);
    assert!(alone.code == Some(2) && alone.stderr.contains("--processes"), "{}", alone.stderr);
}

/// A model and short texts.
fn bench_with_texts() -> Bench {
    let bench = Bench::new();
    let piece =
        |i: usize| format!("The crane {i} rests on one leg{}. ", " and sleeps".repeat(i % 4));
    bench.write("text.txt", (0..60).map(piece).collect::<String>());
    bench
}

/// A plan of pretraining on short texts.
fn plan_pretraining(bench: &Bench, rest: &[&str]) -> Outcome {
    let (model, text) = (bench.path("base"), bench.path("text.txt"));
    let mut args = vec!["plan-pretraining", "--model", &model, "--text", &text, "--max-steps", "3"];
    args.extend(["--per-device-train-batch-size", "4", "--cutoff-len", "160"]);
    args.extend(rest);
    llara(&args)
}

#[test]
fn a_plan_of_pretraining_needs_no_weights_and_is_what_the_run_says() {
    let bench = bench_with_texts();
    let weights = fs::read(bench.at("base/model.safetensors")).unwrap();
    fs::remove_file(bench.at("base/model.safetensors")).unwrap();
    let before = bench.names("");
    let planned = plan_pretraining(&bench, &[]);
    assert_eq!(bench.names(""), before);
    let json = planned.json();
    let bytes = |path: &str| json.pointer(path).and_then(|n| n.as_u64()).unwrap();
    let weights_bytes = bytes("/plan/training/weights");
    assert!(weights_bytes > 0);
    assert!(bytes("/plan/training/gradients").abs_diff(weights_bytes) < 1 << 12);
    assert!(bytes("/plan/training/optimizer").abs_diff(2 * weights_bytes) < 1 << 12);
    assert_eq!((bytes("/batch/texts"), bytes("/plan/chunks/count")), (4, 1));
    assert!(bytes("/lengths/text/texts") > 4 && bytes("/lengths/text/max_len") < 160);
    assert_eq!((&json["fits"], &json["refused"]), (&true.into(), &false.into()));
    for part in ["texts: tokens of", "without template", "█", "one pass over", "pieces    of"] {
        assert!(planned.stderr.contains(part), "no {part:?} in: {}", planned.stderr);
    }

    // The run says the same of memory, up to that of its process, and of chunks.
    fs::write(bench.at("base/model.safetensors"), weights).unwrap();
    let (model, text, out) = (bench.path("base"), bench.path("text.txt"), bench.path("pre"));
    let mut args = vec!["pretrain", "--model", &model, "--text", &text, "--max-steps", "3"];
    args.extend(["--per-device-train-batch-size", "4", "--cutoff-len", "160"]);
    args.extend(["--output-dir", &out, "--logging-steps", "1"]);
    let run = llara(&args);
    run.json();
    let line = |stderr: &str, start: &str| {
        stderr.lines().find(|line| line.starts_with(start)).map(str::to_owned).unwrap()
    };
    assert_eq!(line(&planned.stderr, "chunks"), line(&run.stderr, "chunks"));
    let mebibytes = |stderr: &str| -> f64 {
        let line = line(stderr, "memory    peak");
        assert!(line.contains(" MiB of "), "{line}");
        line.split_whitespace().nth(2).unwrap().parse().unwrap()
    };
    let difference = mebibytes(&planned.stderr) - mebibytes(&run.stderr);
    assert!(difference.abs() < 8.0, "{difference} MiB");
    let log = fs::read_to_string(bench.at("pre/log.jsonl")).unwrap();
    let steps = log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let most = steps.map(|step| step["tokens"].as_u64().unwrap()).max();
    assert_eq!(most, Some(bytes("/plan/chunks/tokens")), "all three steps were sampled");
}

#[test]
fn a_plan_of_pretraining_is_limited_refused_and_divided_like_one_of_fine_tuning() {
    let bench = bench_with_texts();
    let json = plan_pretraining(&bench, &[]).json();
    let bytes = |path: &str| json.pointer(path).and_then(|n| n.as_u64()).unwrap();
    let budget = bytes("/plan/training/activations") / 4;
    let budget = (bytes("/peak_bytes") - budget).to_string();
    let chunked = plan_pretraining(&bench, &["--memory-budget", &budget]);
    let count = chunked.json()["plan"]["chunks"]["count"].as_u64().unwrap();
    assert!(count > 1, "{}", chunked.stderr);

    let refused = plan_pretraining(&bench, &["--memory-budget", "1MiB"]);
    assert_eq!(refused.json()["refused"], true);
    assert!(refused.stderr.contains("pretrain would refuse"), "{}", refused.stderr);

    let divided = plan_pretraining(&bench, &["--processes", "4", "--network", "1MB/s"]).json();
    let network = &divided["network"];
    let moments = bytes("/plan/training/optimizer") as f64;
    assert!((network["optimizer_bytes"].as_f64().unwrap() / moments - 0.25).abs() < 0.01);
    // Gradients and weights of three quarters of the parameters, and headers.
    let sent = network["bytes_sent_per_step"].as_f64().unwrap();
    assert!((sent / (moments * 0.75) - 1.0).abs() < 0.01, "{sent} {moments}");

    plan_pretraining(&bench, &["--cutoff-len", "20"]).refused(&["no token for the text"]);
    let model = bench.path("base");
    let without = llara(&["plan-pretraining", "--model", &model]);
    assert!(without.code == Some(2) && without.stderr.contains("--train-data or --text"));
}
