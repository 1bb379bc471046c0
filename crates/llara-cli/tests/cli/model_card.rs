//! The model card: its contents, that it leaves no trace of the machine, that a user's own is kept, and that
//! its code gives the embeddings of llara.

use std::fs;
use std::process::Command;

use llara::retrieval::read_embeddings;

use crate::fixture::{Bench, llara, outcome};

/// The model card of a folder.
pub(crate) fn card(bench: &Bench, folder: &str) -> String {
    fs::read_to_string(bench.at(folder).join("README.md")).unwrap()
}

#[test]
fn a_card_has_the_facts_of_the_run_and_no_paths() {
    let bench = Bench::new();
    assert!(card(&bench, "base").contains("not trained yet"));
    bench
        .finetune(&["--save-steps", "2", "--query-instruction-for-retrieval", "find: `a|b`\n"])
        .json();
    let root = bench.path("");
    for (folder, steps) in [("out", "3 steps"), ("out/checkpoint-2", "2 steps")] {
        let text = card(&bench, folder);
        for part in [
            "---\nlibrary_name: transformers\npipeline_tag: feature-extraction\ntags:\n- llara\n",
            "| `train.jsonl` | 12 |",
            "| `learning-rate` | `0.001` |",
            steps,
            "\"instruction\": \"find: \\u0060a|b\\u0060\\n\"",
            "| query | `\"` | `find: 'a\\|b'\\n` |",
            "POOLED_TOKENS = 8",
        ] {
            assert!(text.contains(part), "no {part:?} in {text}");
        }
        assert!(!text.contains(&root) && !text.contains("base_model"), "{text}");
    }

    let args = ["--use-lora", "true", "--lora-rank", "4", "--overwrite-output-dir"];
    bench.finetune(&args).json();
    let text = card(&bench, "out");
    for part in ["library_name: peft", "- lora\n", "PeftModel", "`lora rank` | `4`"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    assert!(!text.contains(&root), "{text}");
}

#[test]
fn a_card_of_the_user_is_kept() {
    let bench = Bench::new();
    bench.finetune(&[]).json();
    let generated = card(&bench, "out");
    bench.finetune(&["--overwrite-output-dir", "--max-steps", "2"]).json();
    assert!(card(&bench, "out").contains("2 steps"), "a generated card is replaced");
    for own in ["# Mine\n".to_owned(), generated.replace("# A text", "# My text")] {
        bench.write("out/README.md", &own);
        bench.finetune(&["--overwrite-output-dir"]).json();
        assert_eq!(card(&bench, "out"), own);
    }
}

/// The interpreter of `LLARA_PYTHON`, which has torch, transformers, peft and sentence-transformers.
pub(crate) fn python() -> Option<String> {
    let python = std::env::var("LLARA_PYTHON").ok();
    if python.is_none() {
        eprintln!("skipped: LLARA_PYTHON names no Python interpreter with transformers and peft");
    }
    python
}

/// The last block of Python code of a card, with `folders` in the place of its paths.
pub(crate) fn card_code(card: &str, folders: &[(&str, &str)]) -> String {
    let code = card.rsplit("```python\n").next().unwrap().split("```").next().unwrap();
    let mut code = code.to_owned();
    for (from, to) in folders {
        assert!(code.contains(from), "{code}");
        code = code.replace(from, to);
    }
    code
}

/// Runs the code of a card, which computes the embeddings of `texts`; returns them row after row.
pub(crate) fn run_card(
    python: &str,
    card: &str,
    folders: &[(&str, &str)],
    texts: &[&str],
) -> Vec<f32> {
    let mut code = card_code(card, folders);
    let texts = serde_json::to_string(texts).unwrap();
    code.push_str(&format!(
        "import json\nboth = [embed({texts}, role) for role in (\"query\", \"passage\")]\n\
         print(json.dumps(torch.cat(both).flatten().tolist()))\n"
    ));
    let run = outcome(Command::new(python).args(["-c", &code]).env("HF_HUB_OFFLINE", "1"));
    assert_eq!(run.code, Some(0), "{}\n{code}", run.stderr);
    serde_json::from_str(run.stdout.lines().last().unwrap()).unwrap()
}

/// The same embeddings by `llara encode`.
pub(crate) fn encode(bench: &Bench, rest: &[&str], texts: &[&str]) -> Vec<f32> {
    let line = |text: &&str| format!("{}\n", serde_json::json!({"text": text}));
    bench.write("card.jsonl", texts.iter().map(line).collect::<String>());
    let (input, output) = (bench.path("card.jsonl"), bench.path("card.npy"));
    let mut all = Vec::new();
    for role in ["query", "passage"] {
        let args = ["encode", "--input", &input, "--role", role, "--output", &output];
        llara(&[&args[..], rest].concat()).json();
        all.extend(read_embeddings(&output).unwrap());
    }
    all
}

#[track_caller]
pub(crate) fn same(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= 1e-5, "the embeddings differ by {worst}");
}

#[test]
fn the_code_of_a_card_gives_the_same_embeddings() {
    let Some(python) = python() else { return };
    let bench = Bench::new();
    let long = "the otter sleeps by the river ".repeat(40);
    let texts = ["Where does the otter sleep?", "  é 水 🚢\n", &long, "\"quoted\" `text`"];
    let instruction = ["--query-instruction-for-retrieval", "Find \"it\": "];
    bench.finetune(&instruction).json();
    let (base, out) = (bench.path("base"), bench.path("out"));
    let of_card = run_card(&python, &card(&bench, "out"), &[("path/of/this/folder", &out)], &texts);
    same(&of_card, &encode(&bench, &["--model", &out], &texts));

    let lora = ["--use-lora", "true", "--lora-rank", "4", "--overwrite-output-dir"];
    bench.finetune(&[&lora[..], &instruction].concat()).json();
    let folders = [("path/of/this/folder", &*out), ("path/of/the/base/model", &*base)];
    let of_card = run_card(&python, &card(&bench, "out"), &folders, &texts);
    same(&of_card, &encode(&bench, &["--model", &base, "--adapter", &out], &texts));
}
