//! `--config`: a run described in a file.

use crate::fixture::{Bench, llara};

#[test]
fn options_of_the_command_line_override_the_file() {
    let bench = Bench::new();
    let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path("out"));
    bench.write(
        "run.toml",
        format!(
            "model = {model:?}\ntrain_data = [{data:?}]\noutput-dir = {out:?}\nmax-steps = 5\n\
             query-max-len = 64\ntrain_group_size = 2\nlearning-rate = 1e-3\nnormalized = true\n\
             per-device-train-batch-size = 2\nuse-lora = false\n"
        ),
    );
    let file = bench.path("run.toml");
    let result = llara(&["finetune", "--config", &file, "--max_steps", "1"]).json();
    assert_eq!(result["steps"], 1);
    assert!(bench.at("out/model.safetensors").is_file());
}

#[test]
fn a_wrong_file_is_refused() {
    let bench = Bench::new();
    let (file, out) = (bench.path("run.toml"), bench.path("out"));
    for (contents, parts) in [
        ("learnin-rate = 1", ["run.toml: `learnin-rate` is not an option", "`learning-rate`?"]),
        ("seed = \"often\"", ["run.toml: invalid value 'often' for '--seed", "an integer"]),
        ("seed 1", ["run.toml:1: the run file is not valid", ""]),
    ] {
        bench.write("run.toml", contents);
        llara(&["finetune", "--config", &file, "--output-dir", &out]).refused(&parts);
        assert!(!bench.at("out").exists());
    }
    llara(&["finetune", "--config", &bench.path("none.toml")]).refused(&["none.toml", "hint"]);
    bench.write("run.toml", "seed = 1");
    let missing = llara(&["finetune", "--config", &file]);
    assert_eq!(missing.code, Some(2), "{}", missing.stderr);
    assert!(missing.stderr.contains("is required, on the command line or"), "{}", missing.stderr);
}

#[test]
fn a_pipe_as_run_file_is_refused_without_waiting() {
    let bench = Bench::new();
    let pipe = bench.path("run.toml");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    llara(&["finetune", "--config", &pipe]).refused(&["run.toml", "not a regular file"]);
    bench.write("large.toml", vec![b' '; 2 << 20]);
    llara(&["finetune", "--config", &bench.path("large.toml")]).refused(&["too large"]);
    bench.write("bytes.toml", b"seed = 1\nmodel = \"\xff\"\n");
    llara(&["finetune", "--config", &bench.path("bytes.toml")])
        .refused(&["bytes.toml:2: ", "not UTF-8"]);
}
