//! Folders that sentence-transformers loads: which are written, what prevents others, and that the embeddings
//! are those of llara.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{Bench, llara, outcome};
use crate::model_card::{encode, python, same};

const TEMPLATE: &str = "name = \"last\"\npooled_tokens = 1\n[query]\nsuffix = \"</s>\"\n[passage]\nsuffix = \"</s>\"\n";
const FILES: [&str; 4] = [
    "modules.json",
    "1_Pooling/config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
];

/// Replaces the base model by one with this template.
fn with_template(bench: &Bench, template: &str) {
    bench.write("template.toml", template);
    let (data, base) = (bench.path("train.jsonl"), bench.path("base"));
    let template = bench.path("template.toml");
    let init = ["init", "--preset", "tiny", "--vocab-size", "400", "--overwrite-output-dir"];
    let rest = ["--train-data", &data, "--output-dir", &base, "--template", &template];
    llara(&[&init[..], &rest].concat()).json();
}

fn tool(bench: &Bench, folder: &str, name: &str) -> Value {
    let report = llara(&["check", &bench.path(folder)]).json();
    let tools = report["tools"].as_array().unwrap();
    tools.iter().find(|tool| tool["name"] == name).unwrap().clone()
}

#[test]
fn files_are_written_where_they_can_express_the_recipe() {
    let bench = Bench::new();
    with_template(&bench, TEMPLATE);
    let options = ["--query-instruction-for-retrieval", "Find: ", "--passage-max-len", "64"];
    bench.finetune(&options).json();
    for name in FILES {
        let read = |folder: &str| -> Value {
            serde_json::from_slice(&fs::read(bench.at(folder).join(name)).unwrap()).unwrap()
        };
        let out = read("out");
        match name {
            "config_sentence_transformers.json" => {
                assert_eq!(out["prompts"], json!({"query": "Find: ", "passage": ""}));
            }
            "1_Pooling/config.json" => assert_eq!(out["pooling_mode_lasttoken"], true),
            "sentence_bert_config.json" => assert_eq!(out["max_seq_length"], 64),
            _ => assert_eq!(out.as_array().unwrap().len(), 3),
        }
    }
    let st = tool(&bench, "out", "sentence-transformers");
    assert_eq!((&st["serves"], &st["settings"]["pooling"]), (&json!(true), &json!("lasttoken")));
    let card = fs::read_to_string(bench.at("out/README.md")).unwrap();
    assert!(card.contains("library_name: sentence-transformers"), "{card}");

    // A change of the files that gives other embeddings is an error.
    bench.write("out/config_sentence_transformers.json", "{\"prompts\": {\"query\": \"Find:\"}}");
    let report = llara(&["check", &bench.path("out")]);
    assert_eq!(report.code, Some(1));
    assert!(
        report.stderr.contains("the prompt `query` is not that of the recipe"),
        "{}",
        report.stderr
    );

    // Another template in the same folder: the files of the first are removed.
    with_template(&bench, "name = \"plain\"\npooled_tokens = 2\n[query]\n[passage]\n");
    bench.finetune(&["--overwrite-output-dir"]).json();
    for name in ["modules.json", "1_Pooling", "config_sentence_transformers.json"] {
        assert!(!bench.at("out").join(name).exists(), "{name}");
    }
}

#[test]
fn what_prevents_sentence_transformers_is_explained() {
    let bench = Bench::new();
    let same =
        |query: &str| TEMPLATE.replace("[query]\nsuffix = \"</s>\"", &format!("[query]\n{query}"));
    for (template, part) in [
        (same("suffix = \"</s>\"\nprefix = \"query: \""), "the query prefix"),
        (same("suffix = \"</s>\"\nspecial_tokens_in_prefix = false"), "the template does not"),
        (same("suffix = \".</s>\""), "not appended by the tokenizer"),
        (same(""), "not appended by the tokenizer"),
        (TEMPLATE.replace("= 1", "= 2").replace("</s>", "</s></s>"), "mean of the last 2 tokens"),
    ] {
        with_template(&bench, &template);
        let st = tool(&bench, "base", "sentence-transformers");
        assert_eq!(st["serves"], false);
        assert!(st["reasons"].to_string().contains(part), "{template}: {st}");
        assert!(!bench.at("base/modules.json").exists(), "{template}");
    }
}

#[test]
fn sentence_transformers_gives_the_same_embeddings() {
    let Some(python) = python() else { return };
    let bench = Bench::new();
    with_template(&bench, TEMPLATE);
    let long = "the otter sleeps by the river ".repeat(40);
    let texts = ["Where does the otter sleep?", "é 水 🚢\nnext", &long, "\"quoted\" `text`", "a"];
    let options = ["--query-instruction-for-retrieval", "Find \"it\": ", "--passage-max-len", "64"];
    bench.finetune(&options).json();
    let out = bench.path("out");
    let list = serde_json::to_string(&texts).unwrap();
    let code = format!(
        "import json, torch\n\
         from sentence_transformers import SentenceTransformer\n\
         model = SentenceTransformer({out:?}, device=\"cpu\")\n\
         rows = [model.encode({list}, prompt_name=name, batch_size=3) for name in (\"query\", \"passage\")]\n\
         print(json.dumps([float(x) for row in rows for x in row.flatten()]))\n"
    );
    let run = outcome(Command::new(&python).args(["-c", &code]).env("HF_HUB_OFFLINE", "1"));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let theirs: Vec<f32> = serde_json::from_str(run.stdout.lines().last().unwrap()).unwrap();
    same(&theirs, &encode(&bench, &["--model", &out], &texts));
}
