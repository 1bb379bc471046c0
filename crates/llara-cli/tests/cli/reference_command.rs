//! A command line of the Python reference runs with only the program's name changed.

use std::process::Command;

use crate::fixture::{Bench, LLARA, outcome, rows};

#[test]
fn a_command_line_of_the_reference_runs() {
    let bench = Bench::new();
    bench.write("train.jsonl", rows(3));
    let mut command = Command::new(LLARA);
    command.current_dir(bench.at("")).args([
        "finetune",
        "--output_dir",
        "./output",
        "--model_name_or_path",
        "base",
        "--train_data",
        "train.jsonl",
        "--learning_rate",
        "3e-4",
        "--num_train_epochs",
        "1",
        "--per_device_train_batch_size",
        "1",
        "--dataloader_drop_last",
        "True",
        "--normlized",
        "True",
        "--temperature",
        "0.01",
        "--query_max_len",
        "64",
        "--passage_max_len",
        "160",
        "--train_group_size",
        "16",
        "--logging_steps",
        "10",
        "--save_steps",
        "500",
        "--save_total_limit",
        "3",
        "--ddp_find_unused_parameters",
        "False",
        "--gradient_checkpointing",
        "--deepspeed",
        "../stage1.json",
        "--warmup_ratio",
        "0.1",
        "--negatives_cross_device",
        "--no_save_safetensors",
        "--fp16",
        "--cache_dir",
        "./LMs",
    ]);
    let run = outcome(&mut command);
    assert_eq!(run.json()["steps"], 3);
    for flag in ["ddp-find-unused-parameters", "gradient-checkpointing", "deepspeed", "fp16"] {
        let lines = run.stderr.lines().filter(|line| line.starts_with(&format!("note: --{flag} ")));
        assert_eq!(lines.count(), 1, "{flag}: {}", run.stderr);
    }
    let note = "note: --negatives-cross-device has no effect with one process";
    assert!(run.stderr.contains(note), "{}", run.stderr);
    assert!(run.stderr.contains("training  adapter of rank 64"), "{}", run.stderr);
    assert!(bench.at("output/adapter_model.safetensors").is_file());
}

#[test]
fn unsupported_features_are_refused_by_name() {
    let bench = Bench::new();
    for (args, part) in [
        (&["--gradient_accumulation_steps", "4"][..], "`--gradient-accumulation-steps` is not"),
        (&["--device", "tpu"], "unknown device"),
    ] {
        bench.finetune(args).refused(&[part, "hint: "]);
        assert!(!bench.at("out").exists());
    }
}

#[test]
fn a_run_without_normalization_says_that_its_temperature_is_one() {
    let bench = Bench::new();
    let run = bench.finetune(&["--normlized=False", "--max-steps", "1"]);
    run.json();
    assert!(run.stderr.contains("the temperature is 1.0"), "{}", run.stderr);
}
