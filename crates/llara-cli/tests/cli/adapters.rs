//! Adapters and batches in chunks, from the command line.

use std::fs;

use llara::retrieval::read_embeddings;

use crate::fixture::{Bench, llara};

/// Embeddings of two texts by a model, with an adapter or without.
fn embeddings(bench: &Bench, model: &str, adapter: Option<&str>) -> Vec<f32> {
    bench.write("texts.txt", "An otter.\nA heron by the river");
    let output = bench.path("v.npy");
    let (model, input) = (bench.path(model), bench.path("texts.txt"));
    let mut args = vec!["encode", "--model", &model, "--input", &input, "--role", "passage"];
    args.extend(["--output", &output]);
    let adapter = adapter.map(|name| bench.path(name));
    if let Some(adapter) = &adapter {
        args.extend(["--adapter", adapter]);
    }
    llara(&args).json();
    read_embeddings(output).unwrap().into_iter().collect()
}

fn distance(a: &[f32], b: &[f32]) -> f32 {
    // Unlike f32::max, this keeps a NaN.
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, |m, d| if d <= m { m } else { d })
}

#[test]
fn an_adapter_is_trained_used_and_merged() {
    let bench = Bench::new();
    let run =
        bench.finetune(&["--use_lora", "--lora_rank", "4", "--save_merged_lora_model", "True"]);
    run.json();
    assert!(run.stderr.contains("adapter of rank 4"), "{}", run.stderr);
    assert!(!bench.at("out/model.safetensors").exists());
    for name in ["adapter_config.json", "adapter_model.safetensors", "llara_probes.json"] {
        assert!(bench.at("out").join(name).is_file(), "{name}");
    }

    let with = embeddings(&bench, "base", Some("out"));
    assert!(distance(&with, &embeddings(&bench, "base", None)) > 1e-4, "training changed nothing");
    assert!(distance(&with, &embeddings(&bench, "out/merged_model", None)) < 1e-5);

    let (base, out, merged) = (bench.path("base"), bench.path("out"), bench.path("merged"));
    let merge = llara(&["merge", "--model", &base, "--adapter", &out, "--output-dir", &merged]);
    assert_eq!(merge.json()["output_dir"], merged);
    assert!(distance(&with, &embeddings(&bench, "merged", None)) < 1e-5);
    llara(&["merge", "--model", &base, "--output-dir", &merged]).refused(&["--adapter"]);

    // An adapter is easily taken for a model.
    bench.write("texts.txt", "An otter.");
    let (input, embeddings) = (bench.path("texts.txt"), bench.path("none.npy"));
    llara(&[
        "encode",
        "--model",
        &out,
        "--input",
        &input,
        "--role",
        "query",
        "--output",
        &embeddings,
    ])
    .refused(&["this is an adapter", "--model BASE --adapter"]);

    // Continued from it: the same targets and rank, and the loss continues to decrease.
    fs::rename(bench.at("out"), bench.at("first")).unwrap();
    let first = bench.path("first");
    let on = bench.finetune(&["--use_lora", "True", "--peft_model_path", &first]);
    on.json();
    assert!(on.stderr.contains("adapter of rank 4"), "{}", on.stderr);
}

#[test]
fn invalid_adapter_options_are_refused() {
    let bench = Bench::new();
    for (args, part) in [
        (&["--lora-rank", "0"][..], "rank is 0"),
        (&["--lora-dropout", "1"], "dropout is out of range"),
        (&["--target-modules", "q_proj,w_proj"], "w_proj"),
        (&["--from-peft", "nowhere"], "adapter_config.json"),
        (&["--from-peft", "nowhere", "--lora-rank", "2"], "settings of an existing adapter"),
    ] {
        bench.finetune(&[&["--use-lora"], args].concat()).refused(&[part]);
        assert!(!bench.at("out").exists());
    }
}

#[test]
fn ignored_options_of_adapters_give_a_note() {
    let bench = Bench::new();
    let args = ["--use-lora", "false", "--lora-rank", "4", "--per-device-train-batch-size", "16"];
    let run = bench.finetune(&[&args[..], &["--sampling", "random", "--max-steps", "1"]].concat());
    run.json();
    for part in ["note: --use-lora is false", "16 is larger than the data: a step has only 12 rows"]
    {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
}

#[test]
fn chunks_of_a_batch_give_the_same_run() {
    let bench = Bench::new();
    let mut losses = Vec::new();
    for args in [&[][..], &["--chunk-tokens", "100"], &["--sub_batch_size", "1"]] {
        losses.push(bench.finetune(args).json()["loss"].as_f64().unwrap());
        fs::remove_dir_all(bench.at("out")).unwrap();
    }
    assert!(losses.iter().all(|loss| (loss - losses[0]).abs() < 1e-4 * losses[0]), "{losses:?}");
}
