//! `llara check`: intact folders have no errors, and every fault of a damaged one is in the report.

use std::fs;
use std::process::Command;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use crate::fixture::{Bench, LLARA, Outcome, llara, outcome};

/// Runs the check and parses its report; the exit code must be that of the number of errors.
#[track_caller]
fn check(bench: &Bench, folder: &str, rest: &[&str]) -> Value {
    let folder = bench.path(folder);
    report(llara(&[&["check", &folder], rest].concat()))
}

#[track_caller]
fn report(run: Outcome) -> Value {
    assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
    let report: Value =
        serde_json::from_str(&run.stdout).unwrap_or_else(|e| panic!("{e}: {}", run.stderr));
    let code = if report["errors"] == 0 { 0 } else { 1 };
    assert_eq!(run.code, Some(code), "{}", run.stderr);
    report
}

/// Findings of a status, as `check file: what`.
fn findings(report: &Value, status: &str) -> Vec<String> {
    let findings = report["findings"].as_array().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    findings
        .filter(|finding| finding["status"] == status)
        .map(|f| format!("{} {}: {}", text(&f["check"]), text(&f["file"]), text(&f["what"])))
        .collect()
}

#[track_caller]
fn has(findings: &[String], parts: &[&str]) {
    let found = |finding: &String| parts.iter().all(|part| finding.contains(part));
    assert!(findings.iter().any(found), "no {parts:?} in {findings:#?}");
}

fn tool<'r>(report: &'r Value, name: &str) -> &'r Value {
    let tools = report["tools"].as_array().unwrap();
    tools.iter().find(|tool| tool["name"] == name).unwrap()
}

fn edit(bench: &Bench, name: &str, edit: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(bench.at(name)).unwrap()).unwrap();
    edit(&mut json);
    bench.write(name, json.to_string());
}

#[test]
fn an_intact_model_has_no_errors_and_the_tools_are_explained() {
    let bench = Bench::new();
    let report = check(&bench, "base", &[]);
    assert_eq!((&report["kind"], &report["errors"]), (&json!("model"), &json!(0)));
    assert_eq!(report["warnings"], 0, "{report:#}");
    let ok = findings(&report, "ok");
    for parts in [
        ["config", "2 layers"],
        ["weights model.safetensors", "all values are finite"],
        ["tokenizer", "vocab_size"],
        ["template", "16 single tokens"],
        ["probes llara_probes.json", "3 texts"],
    ] {
        has(&ok, &parts);
    }
    let transformers = tool(&report, "transformers");
    assert_eq!(transformers["serves"], true);
    assert_eq!(transformers["settings"]["pooling"], "mean of the last 8 tokens");
    let st = tool(&report, "sentence-transformers");
    assert_eq!(st["serves"], false);
    assert!(st["reasons"].to_string().contains("mean of the last 8 tokens"), "{st}");
    let tei = tool(&report, "text-embeddings-inference");
    assert!(tei["serves"] == false && tei["reasons"].to_string().contains("Llama needs"), "{tei}");
}

/// Writes the weights of `base` again, changed tensor by tensor.
fn rewrite(bench: &Bench, change: impl Fn(&str, &mut Vec<usize>, &mut Vec<u8>) -> bool) {
    let bytes = fs::read(bench.at("base/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .filter_map(|(name, view)| {
            let (mut shape, mut data) = (view.shape().to_vec(), view.data().to_vec());
            change(&name, &mut shape, &mut data).then(|| (name, view.dtype(), shape, data))
        })
        .collect();
    let views = owned.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    bench.write("base/model.safetensors", safetensors::serialize(views, None).unwrap());
}

#[test]
fn all_faults_of_a_model_are_in_one_report() {
    let bench = Bench::new();
    rewrite(&bench, |name, shape, data| {
        if name == "model.layers.0.mlp.up_proj.weight" {
            shape.reverse();
        }
        if name == "model.layers.1.mlp.down_proj.weight" {
            data[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
            data[80..84].copy_from_slice(&f32::INFINITY.to_le_bytes());
        }
        if name == "model.layers.1.self_attn.q_proj.weight" {
            data.fill(0);
        }
        name != "model.norm.weight"
    });
    edit(&bench, "base/config.json", |config| config["pad_token_id"] = json!(100_000));
    edit(&bench, "base/llara.json", |recipe| recipe["query_max_len"] = json!(5));
    edit(&bench, "base/tokenizer_config.json", |config| config["eos_token"] = json!("</none>"));
    edit(&bench, "base/tokenizer.json", |tokenizer| {
        tokenizer["truncation"] = json!(
            {"direction": "Right", "max_length": 17, "strategy": "LongestFirst", "stride": 0}
        );
    });
    bench.write("base/generation_config.json", "{");
    fs::create_dir(bench.at("base/.partial-old")).unwrap();

    let report = check(&bench, "base", &[]);
    let errors = findings(&report, "error");
    for parts in [
        &["weights", "`model.layers.0.mlp.up_proj.weight`", "another shape"][..],
        &["weights", "`model.layers.1.mlp.down_proj.weight`", "2 values are not finite"],
        &["weights", "`model.norm.weight`", "missing"],
        &["template llara.json", "no token for the text"],
        &["folder generation_config.json", "not JSON"],
    ] {
        has(&errors, parts);
    }
    let warnings = findings(&report, "warning");
    for parts in [
        &["folder .partial-old", "interrupted"][..],
        &["config config.json", "`pad_token_id`"],
        &["weights", "`model.layers.1.self_attn.q_proj.weight`", "zero"],
        &["tokenizer tokenizer_config.json", "`eos_token`"],
        &["tokenizer tokenizer.json", "truncation"],
        &["probes", "not compared"],
    ] {
        has(&warnings, parts);
    }
    let nan =
        report["findings"].as_array().unwrap().iter().find(|f| f["got"] == "NaN at element 10");
    assert!(nan.is_some(), "{report:#}");
    assert_eq!(tool(&report, "transformers")["serves"], false);
    assert_eq!(report["errors"], errors.len());
    assert!(bench.at("base/.partial-old").is_dir(), "a check changes nothing");
}

#[test]
fn a_changed_model_does_not_have_its_probes() {
    let bench = Bench::new();
    rewrite(&bench, |name, _, data| {
        if name == "model.layers.0.mlp.down_proj.weight" {
            data[..4].copy_from_slice(&5f32.to_le_bytes());
        }
        true
    });
    let errors = findings(&check(&bench, "base", &[]), "error");
    assert_eq!(errors.len(), 1, "{errors:?}");
    has(&errors, &["probes llara_probes.json", "does not answer as it did"]);
}

#[test]
fn an_adapter_is_checked_alone_and_with_its_base() {
    let bench = Bench::new();
    bench
        .finetune(&[
            "--use-lora",
            "true",
            "--lora-rank",
            "4",
            "--target-modules",
            "q_proj,down_proj",
        ])
        .json();
    let alone = check(&bench, "out", &[]);
    assert_eq!((&alone["kind"], &alone["errors"]), (&json!("adapter"), &json!(0)), "{alone:#}");
    has(&findings(&alone, "ok"), &["adapter", "8 matrices fit the rank"]);
    has(&findings(&alone, "warning"), &["adapter", "not compared with its base model"]);

    let base = bench.path("base");
    let with = check(&bench, "out", &["--model", &base]);
    assert_eq!(with["errors"], 0, "{with:#}");
    has(&findings(&with, "ok"), &["adapter", "8 matrices fit the base model"]);
    has(&findings(&with, "ok"), &["probes", "3 texts"]);
    assert_eq!(tool(&with, "peft")["settings"]["base_model"], base);
    let st = tool(&with, "sentence-transformers");
    assert!(st["hint"].as_str().unwrap().contains("llara merge"), "{st}");

    // Another base model of the same shape: only the probes tell.
    let (data, other) = (bench.path("train.jsonl"), bench.path("other"));
    let init =
        ["init", "--preset", "tiny", "--vocab-size", "400", "--seed", "7", "--train-data", &data];
    llara(&[&init[..], &["--output-dir", &other]].concat()).json();
    let wrong = findings(&check(&bench, "out", &["--model", &other]), "error");
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    has(&wrong, &["probes", "does not answer as it did"]);

    edit(&bench, "out/adapter_config.json", |config| {
        config["r"] = json!(5);
        config["target_modules"] = json!(["q_proj", "v_proj"]);
    });
    let errors = findings(&check(&bench, "out", &[]), "error");
    has(&errors, &["lora_A.weight", "does not have the rank"]);
    has(&errors, &["down_proj", "no target of adapter_config.json"]);
    has(&errors, &["no matrices for the target v_proj"]);
    let errors = findings(&check(&bench, "out", &["--model", &base]), "error");
    has(&errors, &["v_proj.lora_B.weight", "missing"]);
    has(&errors, &["q_proj.lora_A.weight", "another shape"]);
    has(&errors, &["down_proj", "no target of the base model"]);
}

#[test]
fn every_damaged_file_of_a_checkpoint_is_named() {
    let bench = Bench::new();
    bench.finetune(&["--save-steps", "2"]).json();
    let intact = check(&bench, "out/checkpoint-2", &[]);
    assert_eq!((&intact["checkpoint"], &intact["errors"]), (&json!(true), &json!(0)), "{intact:#}");
    has(&findings(&intact, "ok"), &["checkpoint manifest.json"]);
    for name in ["optimizer.safetensors", "model.safetensors"] {
        let path = bench.at("out/checkpoint-2").join(name);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let errors = findings(&check(&bench, "out/checkpoint-2", &[]), "error");
    for name in ["optimizer.safetensors", "model.safetensors"] {
        has(&errors, &["checkpoint", name, "damaged"]);
    }
}

#[test]
fn hostile_folders_are_reported() {
    let bench = Bench::new();
    fs::create_dir(bench.at("empty")).unwrap();
    let empty = check(&bench, "empty", &[]);
    assert_eq!(empty["kind"], "unknown");
    has(&findings(&empty, "error"), &["neither a model nor an adapter"]);
    llara(&["check", &bench.path("nowhere")]).refused(&["there is no such folder", "hint"]);

    let lfs = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n";
    bench.write("base/model.safetensors", lfs);
    fs::remove_file(bench.at("base/tokenizer.json")).unwrap();
    let fifo = bench.at("base/tokenizer.json");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    fs::remove_file(bench.at("base/llara.json")).unwrap();
    fs::create_dir(bench.at("base/llara.json")).unwrap();
    bench.write("base/llara_probes.json", "[".repeat(100_000));
    bench.write(
        "base/modules.json",
        json!([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "../beir"}])
            .to_string(),
    );
    bench.write("base/\u{1b}[31m.json", "{");
    let run = outcome(Command::new(LLARA).args(["check", &bench.path("base")]));
    assert!(!run.stderr.contains('\u{1b}') && !run.stdout.contains('\u{1b}'), "{}", run.stderr);
    let errors = findings(&report(run), "error");
    for parts in [
        &["folder model.safetensors", "Git LFS pointer"][..],
        &["weights model.safetensors"],
        &["folder tokenizer.json", "not a regular file"],
        &["tokenizer tokenizer.json", "not a regular file"],
        &["recipe llara.json"],
        &["probes llara_probes.json"],
        &["sentence-transformers modules.json", "outside"],
    ] {
        has(&errors, parts);
    }
}

#[test]
fn modules_that_pool_otherwise_are_an_error() {
    let bench = Bench::new();
    bench.write(
        "base/modules.json",
        json!([{"type": "sentence_transformers.models.Transformer", "path": ""},
               {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}])
        .to_string(),
    );
    fs::create_dir(bench.at("base/1_Pooling")).unwrap();
    bench
        .write("base/1_Pooling/config.json", json!({"pooling_mode_mean_tokens": true}).to_string());
    bench.write("base/sentence_bert_config.json", json!({"max_seq_length": 64}).to_string());
    let report = check(&bench, "base", &[]);
    has(
        &findings(&report, "error"),
        &["sentence-transformers modules.json", "cannot give the embeddings"],
    );
    assert_eq!(tool(&report, "transformers")["serves"], true);
}

#[test]
fn a_model_of_other_tools_has_warnings_and_its_own_modules_are_used() {
    let bench = Bench::new();
    for name in ["llara.json", "llara_probes.json"] {
        fs::remove_file(bench.at("base").join(name)).unwrap();
    }
    let report = check(&bench, "base", &[]);
    assert_eq!(report["errors"], 0, "{report:#}");
    has(&findings(&report, "warning"), &["recipe llara.json", "there is no llara.json"]);
    let reasons = tool(&report, "sentence-transformers")["reasons"].to_string();
    assert!(reasons.contains("neither llara.json nor modules.json"), "{reasons}");

    let modules =
        json!([{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]);
    bench.write("base/modules.json", modules.to_string());
    fs::create_dir(bench.at("base/1_Pooling")).unwrap();
    bench.write("base/1_Pooling/config.json", "{\"pooling_mode\": \"lasttoken\"}");
    bench.write("base/sentence_bert_config.json", "{\"max_seq_length\": 64}");
    let report = check(&bench, "base", &[]);
    assert_eq!(
        (&report["errors"], &tool(&report, "sentence-transformers")["serves"]),
        (&json!(0), &json!(true))
    );
    fs::remove_file(bench.at("base/1_Pooling/config.json")).unwrap();
    has(
        &findings(&check(&bench, "base", &[]), "error"),
        &["sentence-transformers", "1_Pooling/config.json"],
    );
}
