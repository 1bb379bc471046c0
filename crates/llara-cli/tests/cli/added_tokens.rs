//! Adapters on a model that lacks the template's tokens: from the command line, and against PEFT.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{Bench, copy_folder_deep, llara, outcome};
use crate::model_card::{card, card_code, encode, python, run_card, same};

const TEXTS: [&str; 2] = ["Where does the otter sleep?", "\"quoted\" `text`"];
/// Appended to a training run: a small adapter on `plain` with the tokens of LLARA.
const LORA: [&str; 8] = [
    "--use-lora",
    "true",
    "--lora-rank",
    "4",
    "--add-special-tokens",
    "--query-max-len",
    "128",
    "--overwrite-output-dir",
];

impl Bench {
    /// A model whose tokenizer lacks the tokens of LLARA's template, with tied embeddings.
    fn plain(&self) -> String {
        let (plain, data) = (self.path("plain"), self.path("train.jsonl"));
        let args = ["init", "--preset", "tiny", "--vocab-size", "400", "--template", "e5-mistral"];
        llara(&[&args[..], &["--train-data", &data, "--output-dir", &plain]].concat()).json();
        for name in ["llara.json", "llara_probes.json"] {
            fs::remove_file(self.at("plain").join(name)).unwrap();
        }
        plain
    }

    /// The same with rows for these tokens in the embedding table, but not in the tokenizer.
    fn padded(&self) -> String {
        let (plain, padded) = (self.path("plain"), self.path("padded"));
        let args = ["--add-special-tokens", "--model", &plain, "--output-dir", &padded];
        self.finetune(&args).json();
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::copy(self.at("plain").join(name), self.at("padded").join(name)).unwrap();
        }
        fs::remove_file(self.at("padded/llara.json")).unwrap();
        fs::remove_file(self.at("padded/llara_probes.json")).unwrap();
        padded
    }

    /// A fixture with an untied head, and a template whose tokens it lacks.
    fn untied(&self) -> (String, String) {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llara/tests/fixtures");
        copy_folder_deep(&fixtures.join("llama-gqa"), &self.at("untied"));
        let role = |name, suffix| {
            format!(
                "[{name}]\nprefix = \"{name}: \"\nsuffix = \"{suffix}\"\nspecial_tokens_in_prefix = true\n"
            )
        };
        let roles = [role("query", "<q1><q2>"), role("passage", "<p1><q2>")].concat();
        self.write("mine.toml", format!("name = \"mine\"\npooled_tokens = 2\n{roles}"));
        (self.path("untied"), self.path("mine.toml"))
    }
}

fn config(bench: &Bench, folder: &str) -> Value {
    serde_json::from_slice(&fs::read(bench.at(folder).join("adapter_config.json")).unwrap())
        .unwrap()
}

#[test]
fn tokens_are_added_trained_used_and_merged() {
    let bench = Bench::new();
    let plain = bench.plain();
    let model = ["--model", &plain];
    let without = [&["--use-lora", "true", "--lora-rank", "4"][..], &model].concat();
    bench.finetune(&without).refused(&["<s1> <s2>", "hint", "--add-special-tokens"]);
    assert!(!bench.at("out").exists());

    let out = bench.path("out");
    let lora = [&LORA[..], &model].concat();
    let run = bench.finetune(&lora);
    run.json();
    assert!(run.stderr.contains("adapter of rank 4 and embeddings of 16 tokens"), "{}", run.stderr);
    let ids = config(&bench, "out")["trainable_token_indices"].clone();
    assert_eq!(ids.as_array().unwrap().len(), 16, "{ids}");
    let adapted = encode(&bench, &["--model", &plain, "--adapter", &out], &TEXTS);

    let check = llara(&["check", &out, "--model", &plain]).json();
    assert_eq!(check["errors"], 0, "{check:#}");
    let rows = ids[15].as_u64().unwrap() + 1;
    let peft = &check["tools"][0];
    assert_eq!((&peft["name"], &peft["serves"]), (&json!("peft"), &json!(true)));
    assert_eq!(peft["settings"]["resize_token_embeddings"], rows, "{peft}");
    let alone = llara(&["check", &out]).json();
    assert_eq!(alone["errors"], 0, "{alone:#}");
    assert!(alone["tools"][0]["reasons"].to_string().contains(&rows.to_string()), "{alone:#}");

    let merged = bench.path("merged");
    llara(&["merge", "--model", &plain, "--adapter", &out, "--output-dir", &merged]).json();
    same(&encode(&bench, &["--model", &merged], &TEXTS), &adapted);
    assert_eq!(llara(&["check", &merged]).json()["errors"], 0);

    // The same weights in the other form, and merged at the end of the run.
    let form = ["--save-tokens-as", "modules-to-save", "--save-merged-lora-model"];
    bench.finetune(&[&lora[..], &form].concat()).json();
    assert_eq!(config(&bench, "out")["modules_to_save"], json!(["embed_tokens"]));
    assert_eq!(encode(&bench, &["--model", &plain, "--adapter", &out], &TEXTS), adapted);
    same(&encode(&bench, &["--model", &bench.path("out/merged_model")], &TEXTS), &adapted);
    assert_eq!(llara(&["check", &out, "--model", &plain]).json()["errors"], 0);

    // Trained further: the adapter has the tokens already.
    fs::rename(bench.at("out"), bench.at("first")).unwrap();
    let first = bench.path("first");
    let further = ["--use-lora", "true", "--from-peft", &first, "--add-special-tokens"];
    let run = bench.finetune(&[&further[..], &model].concat());
    run.json();
    for part in ["--add-special-tokens has no effect", "and embeddings of 16 tokens"] {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
    assert_eq!(config(&bench, "out")["modules_to_save"], json!(["embed_tokens"]));
}

#[test]
fn nothing_is_added_where_the_tokens_exist() {
    let bench = Bench::new();
    let run = bench.finetune(&[&LORA[..], &["--save-tokens-as", "modules-to-save"]].concat());
    run.json();
    for part in ["--add-special-tokens has no effect", "--save-tokens-as has no effect"] {
        assert!(run.stderr.contains(part), "{}", run.stderr);
    }
    let config = config(&bench, "out");
    assert_eq!(
        (config.get("trainable_token_indices"), config.get("modules_to_save")),
        (None, None)
    );
    assert!(!bench.at("out/tokenizer.json").exists());

    // An adapter that exists already keeps its tokens.
    fs::rename(bench.at("out"), bench.at("first")).unwrap();
    let role = |name| format!("[{name}]\nprefix = \"\"\nsuffix = \"<new>\"\n");
    let roles = [role("query"), role("passage")].concat();
    bench.write("x.toml", format!("name = \"x\"\npooled_tokens = 1\n{roles}"));
    let (first, template) = (bench.path("first"), bench.path("x.toml"));
    let further = ["--use-lora", "true", "--from-peft", &first, "--template", &template];
    let refused = bench.finetune(&[&further[..], &["--add-special-tokens"]].concat());
    refused.refused(&["tokens cannot be added to an adapter", "1 token", "llara merge"]);
    bench.finetune(&further).refused(&["<new>", "--add-special-tokens"]);
    assert!(!bench.at("out").exists());
}

#[test]
fn an_interrupted_run_with_added_tokens_is_resumed() {
    let bench = Bench::new();
    let plain = bench.plain();
    let lora = [&LORA[..], &["--model", &plain, "--save-steps", "1"]].concat();
    bench.finetune(&lora).json();
    let weights = "out/adapter_model.safetensors";
    let whole = fs::read(bench.at(weights)).unwrap();
    fs::remove_dir_all(bench.at("out/checkpoint-3")).unwrap();
    fs::remove_file(bench.at(weights)).unwrap();
    let resumed = bench.finetune(&[&lora[..], &["--resume-from-checkpoint"]].concat());
    resumed.json();
    assert!(resumed.stderr.contains("resumed   after step 2"), "{}", resumed.stderr);
    assert!(fs::read(bench.at(weights)).unwrap() == whole);
}

#[test]
fn damaged_token_embeddings_are_found_by_the_check() {
    let bench = Bench::new();
    let plain = bench.plain();
    bench.finetune(&[&LORA[..], &["--model", &plain]].concat()).json();
    let path = bench.at("out/adapter_config.json");
    let mut config = config(&bench, "out");
    let ids = config["trainable_token_indices"].as_array_mut().unwrap();
    let last = ids.pop().unwrap();
    fs::write(&path, config.to_string()).unwrap();
    let out = bench.path("out");
    for rest in [&[][..], &["--model", &plain]] {
        let run = llara(&[&["check", &out], rest].concat());
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert!(run.stdout.contains("trainable_tokens_delta"), "{}", run.stdout);
    }
    // A gap between the vocabulary of the base model and the last token.
    let ids = config["trainable_token_indices"].as_array_mut().unwrap();
    ids.push(json!(last.as_u64().unwrap() + 1));
    fs::write(&path, config.to_string()).unwrap();
    let run = llara(&["check", &out, "--model", &plain]);
    assert!(run.stdout.contains("a token has no embedding"), "{}", run.stdout);
    let (input, output) = (bench.path("card.jsonl"), bench.path("e.npy"));
    bench.write("card.jsonl", "{\"text\": \"An otter.\"}\n");
    let encode = ["encode", "--role", "query", "--input", &input, "--output", &output];
    let model = ["--model", &plain, "--adapter", &out];
    llara(&[&encode[..], &model].concat()).refused(&["a token has no embedding"]);
}

/// PEFT, by the code of the model card, gives the embeddings of llara.
#[test]
fn peft_gives_the_same_embeddings_with_added_tokens() {
    let Some(python) = python() else { return };
    let bench = Bench::new();
    let (plain, out) = (bench.plain(), bench.path("out"));
    let padded = bench.padded();
    let (untied, mine) = bench.untied();
    let mine = ["--template", &mine];
    for (base, template) in [(&plain, &[][..]), (&padded, &[]), (&untied, &mine)] {
        for form in ["trainable-token-indices", "modules-to-save"] {
            let rest = ["--model", base, "--save-tokens-as", form, "--learning-rate", "1e-2"];
            bench.finetune(&[&LORA[..], &rest, template].concat()).json();
            let card = card(&bench, "out");
            let resizes = card.contains("resize_token_embeddings");
            assert_eq!(resizes, *base != padded, "{card}");
            let folders = [("path/of/this/folder", &*out), ("path/of/the/base/model", base)];
            let of_card = run_card(&python, &card, &folders, &TEXTS);
            same(&of_card, &encode(&bench, &["--model", base, "--adapter", &out], &TEXTS));
        }
    }
}

/// llara gives the embeddings of PEFT with adapters that PEFT wrote.
#[test]
fn adapters_that_peft_wrote_with_token_embeddings_are_read() {
    let Some(python) = python() else { return };
    let bench = Bench::new();
    let (plain, out) = (bench.plain(), bench.path("out"));
    let (untied, mine) = bench.untied();
    let mine = ["--template", &mine];
    for (base, template) in [(&plain, &["--template", "llara"]), (&untied, &mine)] {
        bench.finetune(&[&LORA[..], &["--model", base], template].concat()).json();
        let ids = config(&bench, "out")["trainable_token_indices"].clone();
        let rows = ids.as_array().unwrap().last().unwrap().as_u64().unwrap() + 1;
        let folders = [("path/of/this/folder", &*out), ("path/of/the/base/model", base)];
        let mut code = card_code(&card(&bench, "out"), &folders);
        let written = bench.path("written");
        let texts = json!(TEXTS);
        code.push_str(&format!(
            "FIRST, ROWS, OUT, TEXTS = {}, {rows}, {}, {texts}\n",
            ids[0],
            json!(written)
        ));
        code.push_str(include_str!("write_adapters.py"));
        let run = outcome(Command::new(&python).args(["-c", &code]).env("HF_HUB_OFFLINE", "1"));
        assert_eq!(run.code, Some(0), "{}\n{code}", run.stderr);
        let expected: BTreeMap<String, Vec<f32>> =
            serde_json::from_str(run.stdout.lines().last().unwrap()).unwrap();
        assert_eq!(expected.len(), 9);
        for (name, expected) in expected {
            let adapter = format!("{written}/{name}");
            let model = ["--model", base, "--adapter", &adapter, "--max-len", "128"];
            same(&encode(&bench, &[&model[..], template].concat(), &TEXTS), &expected);
            let check = llara(&["check", &adapter, "--model", base]).json();
            assert_eq!(check["errors"], 0, "{name}: {check:#}");
        }
    }
}
