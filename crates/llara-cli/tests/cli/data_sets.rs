//! Data set files: weights and instructions of the files of training rows.

use std::fs;

use serde_json::{Value, json};

use crate::fixture::{Bench, llara, rows};

const DATA_SET: &str = r#"
batching = "per-file"
query_instruction = "general: "

[[files]]
path = "data/animals.jsonl"
weight = 1.0

[[files]]
path = "data/plants"
weight = 2.0
query_instruction = "Name the plant: "
passage_instruction = "Plant: "
"#;

/// Rows of two topics, and a data set file for them.
fn bench() -> Bench {
    let bench = Bench::new();
    fs::create_dir_all(bench.at("data/plants")).unwrap();
    bench.write("data/animals.jsonl", rows(8));
    bench.write("data/plants/a.jsonl", rows(4));
    bench.write("data/plants/b.jsonl", rows(4));
    bench.write("data.toml", DATA_SET);
    bench
}

fn finetune(bench: &Bench, data: &[&str], out: &str, rest: &[&str]) -> crate::fixture::Outcome {
    let (model, out) = (bench.path("base"), bench.path(out));
    let data: Vec<String> = data.iter().map(|name| bench.path(name)).collect();
    let mut args = vec!["finetune", "--model", &model, "--output-dir", &out, "--train-data"];
    args.extend(data.iter().map(String::as_str));
    args.extend(["--max-steps", "3", "--train-group-size", "2", "--use-lora", "false"]);
    args.extend(["--per-device-train-batch-size", "2", "--logging-steps", "1"]);
    args.extend(rest);
    llara(&args)
}

fn weights(bench: &Bench, out: &str) -> Vec<u8> {
    fs::read(bench.at(out).join("model.safetensors")).unwrap()
}

/// The rows with the instructions in them.
fn spelled_out(rows: &str, prompt: &str, passage: &str) -> String {
    let spell = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        row["prompt"] = prompt.into();
        for field in ["pos", "neg"] {
            for text in row[field].as_array_mut().unwrap() {
                *text = format!("{passage}{}", text.as_str().unwrap()).into();
            }
        }
        format!("{row}\n")
    };
    rows.lines().map(spell).collect()
}

#[test]
fn instructions_of_files_are_those_of_their_rows() {
    let bench = bench();
    finetune(&bench, &["data.toml"], "by-files", &[]).json();

    for (name, prompt, passage) in [
        ("data/animals.jsonl", "general: ", ""),
        ("data/plants/a.jsonl", "Name the plant: ", "Plant: "),
        ("data/plants/b.jsonl", "Name the plant: ", "Plant: "),
    ] {
        let text = fs::read_to_string(bench.at(name)).unwrap();
        bench.write(name, spelled_out(&text, prompt, passage));
    }
    let weighted = ["--batching", "per-file", "--file-weights", "1,1,1"];
    finetune(&bench, &["data/animals.jsonl", "data/plants"], "by-rows", &weighted).json();
    assert!(weights(&bench, "by-files") == weights(&bench, "by-rows"));
    let other = ["--batching", "per-file", "--file-weights", "2,1,1"];
    finetune(&bench, &["data/animals.jsonl", "data/plants"], "other", &other).json();
    assert!(weights(&bench, "by-files") != weights(&bench, "other"));
}

#[test]
fn tasks_are_saved_with_the_model_and_used_by_name() {
    let bench = bench();
    let rest = ["--save-steps", "2"];
    finetune(&bench, &["data.toml"], "out", &rest).json();
    let recipe: Value =
        serde_json::from_slice(&fs::read(bench.at("out/llara.json")).unwrap()).unwrap();
    assert_eq!(recipe["query_instruction"], "general: ");
    let task = json!({"query": "Name the plant: ", "passage": "Plant: "});
    assert_eq!(recipe["tasks"], json!({ "plants": task }));
    let card = fs::read_to_string(bench.at("out/README.md")).unwrap();
    assert!(card.contains("| `plants` | `Name the plant: ` | `Plant: ` |"), "{card}");

    bench.write("texts.txt", "Where does the otter sleep?\n");
    let encoded = |rest: &[&str]| {
        let [model, input, output] = ["out", "texts.txt", "out.npy"].map(|name| bench.path(name));
        let args = ["encode", "--model", &model, "--input", &input, "--output", &output];
        llara(&[&args[..], rest].concat()).json();
        fs::read(output).unwrap()
    };
    for (role, instruction) in [("query", "Name the plant: "), ("passage", "Plant: ")] {
        let by_task = encoded(&["--role", role, "--task", "plants"]);
        assert!(by_task == encoded(&["--role", role, "--instruction", instruction]));
        assert!(by_task != encoded(&["--role", role]));
    }
    let [model, input, output] = ["out", "texts.txt", "x.npy"].map(|name| bench.path(name));
    let args = ["encode", "--model", &model, "--input", &input, "--output", &output];
    llara(&[&args[..], &["--role", "query", "--task", "fungi"]].concat()).refused(&[
        "no instructions for this task",
        "plants",
        "fungi",
    ]);

    // Another run of the same command with another instruction is another run.
    bench.write("data.toml", DATA_SET.replace("Name the", "Which"));
    let resume = ["--save-steps", "2", "--max-steps", "9", "--resume-from-checkpoint"];
    finetune(&bench, &["data.toml"], "out", &resume).refused(&["instructions-of-files", "Which"]);
}

#[test]
fn the_data_set_file_is_inspected_and_planned_with_its_instructions() {
    let bench = bench();
    let (model, data) = (bench.path("base"), bench.path("data.toml"));
    let lengths = || {
        let args = ["inspect-data", "--model", &model, "--train-data", &data];
        let json = llara(&[&args[..], &["--train-group-size", "2"]].concat()).json();
        assert_eq!(json["rows"], 16);
        json["lengths"]["passage"]["tokens"]["mean"].as_f64().unwrap()
    };
    let long = lengths();
    let planned = || {
        let args = ["plan", "--model", &model, "--train-data", &data, "--train-group-size", "2"];
        llara(&args).json()
    };
    let plan = planned();
    bench.write("data.toml", DATA_SET.replace("passage_instruction", "#"));
    assert!(lengths() < long);
    assert_ne!(planned()["lengths"]["passage"], plan["lengths"]["passage"]);
}

#[test]
fn an_evaluation_set_with_the_name_of_a_task_has_its_instructions() {
    let bench = bench();
    let sets = bench.path("beir");
    let evaluated = |set: &str| {
        let set = format!("{set}={sets}");
        let rest = ["--eval-dataset", &set, "--eval-split", "test", "--overwrite-output-dir"];
        let outcome = finetune(&bench, &["data.toml"], "out", &rest);
        let shown = outcome.stderr.contains("with the instructions of this task");
        let queries = fs::read_to_string(bench.at("out/eval_queries.json")).unwrap();
        let json: Value = serde_json::from_str(&queries).unwrap();
        let found = json.as_object().unwrap().values().next().unwrap()["worst"].clone();
        (shown, found, outcome.json()["loss"].clone())
    };
    let (plants, other) = (evaluated("plants"), evaluated("other"));
    assert!(plants.0 && !other.0);
    // The scores of passages differ, and training does not.
    assert_ne!(plants.1, other.1);
    assert_eq!(plants.2, other.2);
}

#[test]
fn faults_of_a_data_set_file_are_named() {
    let bench = bench();
    let refused = |text: &str, rest: &[&str], parts: &[&str]| {
        bench.write("data.toml", text);
        finetune(&bench, &["data.toml"], "out", rest).refused(parts);
        assert!(!bench.at("out").exists());
    };
    refused("[[file]]", &[], &["data.toml:1: the data set file is not valid", "[[files]]"]);
    refused("[[files]]\npath = \"gone.jsonl\"", &[], &["gone.jsonl", "check the path"]);
    refused(DATA_SET, &["--file-weights", "1,2"], &["given twice"]);
    refused(DATA_SET, &["--batching", "mixed"], &["no effect on mixed batches", "data set file"]);
    let mixed = DATA_SET.replace("per-file", "mixed");
    refused(&mixed, &[], &["no effect on mixed batches"]);
    bench.write("data.toml", "[[files]]\npath = \"data\"");
    let data = bench.path("data.toml");
    let model = bench.path("base");
    let inside = bench.path("data/out");
    let args = ["finetune", "--model", &model, "--train-data", &data, "--output-dir", &inside];
    llara(&args).refused(&["training data"]);
}
