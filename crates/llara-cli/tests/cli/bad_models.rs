//! Model folders that must be refused, each with a location and a hint.

use std::fs;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::fixture::{Bench, copy_folder, llara};

/// Trains and encodes with a damaged model: both must be refused, and write nothing.
#[track_caller]
fn refused(bench: &Bench, parts: &[&str]) {
    bench.finetune(&[]).refused(parts);
    assert!(!bench.at("out").exists());
    bench.write("texts.txt", "an otter");
    let (model, input, output) = (bench.path("base"), bench.path("texts.txt"), bench.path("v.npy"));
    let args = ["encode", "--model", &model, "--input", &input, "--role", "query", "--output"];
    llara(&[&args[..], &[&output]].concat()).refused(parts);
    assert!(!bench.at("v.npy").exists());
}

fn edit_json(bench: &Bench, name: &str, edit: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(bench.at(name)).unwrap()).unwrap();
    edit(&mut json);
    bench.write(name, json.to_string());
}

#[test]
fn damaged_weight_files() {
    const WEIGHTS: &str = "base/model.safetensors";
    let bench = Bench::new();
    let whole = fs::read(bench.at(WEIGHTS)).unwrap();

    bench.write(WEIGHTS, &whole[..whole.len() / 2]);
    refused(&bench, &["model.safetensors: the weights are truncated", "fetch or export it again"]);

    bench.write(WEIGHTS, [&u64::MAX.to_le_bytes(), &whole[8..]].concat());
    refused(&bench, &["model.safetensors: the header is longer than the file", "hint"]);

    let nan = f32::NAN.to_le_bytes();
    bench.write(WEIGHTS, [&whole[..whole.len() - 4], &nan].concat());
    refused(&bench, &["weights that are not finite", "tensor `model.", "NaN at element", "hint"]);

    fs::remove_file(bench.at(WEIGHTS)).unwrap();
    refused(&bench, &["no weights in this folder", "model.safetensors", "hint"]);

    let index = json!({"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}});
    bench.write("base/model.safetensors.index.json", index.to_string());
    refused(&bench, &["a shard outside the model folder", "elsewhere", "hint"]);
}

#[test]
fn tensors_that_do_not_fit_are_listed_together() {
    let bench = Bench::new();
    let bytes = fs::read(bench.at("base/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<(String, TensorView)> = file
        .tensors()
        .into_iter()
        .filter(|(name, _)| name != "model.norm.weight")
        .map(|(name, view)| match name.as_str() {
            "model.layers.0.mlp.up_proj.weight" => {
                let turned = view.shape().iter().rev().copied().collect();
                (name, TensorView::new(view.dtype(), turned, view.data()).unwrap())
            }
            "model.layers.1.input_layernorm.weight" => {
                (name, TensorView::new(Dtype::F64, vec![128], &[0; 8 * 128]).unwrap())
            }
            _ => (name, TensorView::new(view.dtype(), view.shape().to_vec(), view.data()).unwrap()),
        })
        .collect();
    let extra = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    tensors.push(("model.layers.9.extra".into(), extra));
    bench.write("base/model.safetensors", safetensors::serialize(tensors, None).unwrap());
    refused(
        &bench,
        &[
            "do not fit config.json in 4 places",
            "missing: model.norm.weight [128]",
            "misshapen: model.layers.0.mlp.up_proj.weight: expected [352, 128], got [128, 352]",
            "unsupported dtype: model.layers.1.input_layernorm.weight: F64",
            "unknown: model.layers.9.extra",
            "hint",
        ],
    );
}

#[test]
fn another_architecture() {
    let bench = Bench::new();
    edit_json(&bench, "base/config.json", |config| config["model_type"] = json!("mamba"));
    refused(&bench, &["config.json: unknown architecture `mamba`", "llama, mistral", "hint"]);
    bench.write("base/config.json", "{");
    refused(&bench, &["config.json: not a model configuration"]);
}

#[test]
fn a_tokenizer_without_the_templates_tokens() {
    let bench = Bench::new();
    bench.write("plain.toml", "name = \"plain\"\npooled_tokens = 1\n[query]\n[passage]\n");
    let (data, base, plain) =
        (bench.path("train.jsonl"), bench.path("base"), bench.path("plain.toml"));
    let init = ["init", "--preset", "tiny", "--vocab-size", "300", "--overwrite-output-dir"];
    let rest = ["--train-data", &data, "--output-dir", &base, "--template", &plain];
    llara(&[&init[..], &rest].concat()).json();
    let refused = bench.finetune(&["--template", "llara"]);
    refused.refused(&[
        "has no single tokens for <s1> <s2>",
        "single tokens",
        "llara finetune --add-special-tokens",
    ]);
    assert!(!bench.at("out").exists());

    // This small vocabulary has no words, so the template needs many tokens.
    let lengths = ["--query-max-len", "128", "--passage-max-len", "128"];
    let grown = ["--template", "llara", "--add-special-tokens"];
    bench.finetune(&[&grown[..], &lengths].concat()).json();
    let config: Value =
        serde_json::from_slice(&fs::read(bench.at("out/config.json")).unwrap()).unwrap();
    assert_eq!(config["vocab_size"], 300 + 16);
}

#[test]
fn tokens_beyond_the_vocabulary() {
    let bench = Bench::new();
    let (data, larger) = (bench.path("train.jsonl"), bench.path("larger"));
    // Words that are only in these texts, so their ids are the last ones.
    let words: String = (0..40)
        .map(|_| "{\"query\": \"quokka\", \"pos\": [\"zyzzyva xylophone\"], \"neg\": [\"jukebox\"]}\n")
        .collect();
    let config: Value =
        serde_json::from_slice(&fs::read(bench.at("base/config.json")).unwrap()).unwrap();
    let vocabulary = config["vocab_size"].as_u64().unwrap();
    bench.write("train.jsonl", crate::fixture::rows(12) + &words);
    let size = (vocabulary + 100).to_string();
    let args = ["init", "--preset", "tiny", "--vocab-size", &size, "--train-data", &data];
    llara(&[&args[..], &["--output-dir", &larger]].concat()).json();
    fs::copy(bench.at("larger/tokenizer.json"), bench.at("base/tokenizer.json")).unwrap();
    let refused = bench.finetune(&[]);
    refused.refused(&["train.jsonl:", "no embedding for token", "ids below", "hint"]);
    assert!(!bench.at("out").exists());
}

#[test]
fn a_model_that_was_changed_since_it_was_saved() {
    let bench = Bench::new();
    copy_folder(&bench.at("base"), &bench.at("changed"));
    edit_json(&bench, "changed/llara.json", |recipe| {
        recipe["template"]["query"]["prefix"] = json!("'");
    });
    bench.write("texts.txt", "an otter");
    let (model, input, output) =
        (bench.path("changed"), bench.path("texts.txt"), bench.path("v.npy"));
    let args = ["encode", "--model", &model, "--input", &input, "--role", "query", "--output"];
    let run = llara(&[&args[..], &[&output]].concat());
    run.refused(&["does not answer as it did", "changed", "hint"]);
    assert!(!bench.at("v.npy").exists());
    // A template that is given explicitly is not an error.
    llara(&[&args[..], &[&output, "--template", "llara"]].concat()).json();
}

#[test]
fn impossible_numbers_of_pooled_tokens_are_refused() {
    let bench = Bench::new();
    for (pooled, part) in [
        ("99999999999", "`pooled_tokens` is out of range"),
        ("50", "exceeds the"),
        ("0", "out of range"),
    ] {
        let number: u64 = pooled.parse().unwrap();
        edit_json(&bench, "base/llara.json", |recipe| {
            recipe["template"]["pooled_tokens"] = json!(number)
        });
        refused(&bench, &["pooled_tokens", part, "hint"]);
    }
}
