//! Settings that are saved with a model and are the defaults of later commands; interruption.

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::fixture::{Bench, LLARA, llara, rows};

fn recipe(bench: &Bench, folder: &str) -> serde_json::Value {
    serde_json::from_slice(&fs::read(bench.at(folder).join("llara.json")).unwrap()).unwrap()
}

/// The bytes of the embeddings of `texts.txt`.
fn encoded(bench: &Bench, model: &[&str], rest: &[&str]) -> Vec<u8> {
    let (input, output) = (bench.path("texts.txt"), bench.path("out.npy"));
    let mut args = vec!["encode"];
    args.extend(model);
    args.extend(["--input", &input, "--output", &output, "--role", "query"]);
    args.extend(rest);
    llara(&args).json();
    fs::read(&output).unwrap()
}

#[test]
fn an_instruction_is_saved_and_used_by_default() {
    let bench = Bench::new();
    bench.write("texts.txt", "Where does the otter sleep?\nWhere does the toad sleep?\n");
    let instruction = ["--query-instruction-for-retrieval", "Find the place: "];
    for lora in ["false", "true"] {
        let rest = ["--use-lora", lora, "--lora-rank", "2", "--overwrite-output-dir"];
        bench.finetune(&[&instruction[..], &rest].concat()).json();
        let out = bench.path("out");
        let (base, adapter) = (bench.path("base"), ["--adapter", out.as_str()]);
        let model: Vec<&str> = match lora {
            "true" => [&["--model", &base][..], &adapter].concat(),
            _ => vec!["--model", &out],
        };
        assert_eq!(recipe(&bench, "out")["query_instruction"], "Find the place: ");
        let default = encoded(&bench, &model, &[]);
        let repeated = encoded(&bench, &model, &["--instruction", "Find the place: "]);
        let without = encoded(&bench, &model, &["--instruction", ""]);
        assert!(default == repeated, "use-lora {lora}");
        assert!(default != without, "use-lora {lora}");
        fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn lengths_of_the_model_are_the_default_and_an_old_recipe_loads() {
    let bench = Bench::new();
    let mut json = recipe(&bench, "base");
    assert!(json.get("query_instruction").is_none());
    json["query_max_len"] = 61.into();
    bench.write("base/llara.json", json.to_string());
    let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path("out"));
    let common = ["finetune", "--model", &model, "--train-data", &data, "--output-dir", &out];
    let short = ["--max-steps", "1", "--train-group-size", "2", "--use-lora", "false"];
    llara(&[&common[..], &short].concat()).json();
    assert_eq!(recipe(&bench, "out")["query_max_len"], 61);
    assert_eq!(recipe(&bench, "out")["passage_max_len"], 128);
}

#[test]
fn truncated_texts_give_a_warning() {
    let bench = Bench::new();
    let (model, data) = (bench.path("base"), bench.path("train.jsonl"));
    let plan = ["plan", "--model", &model, "--train-data", &data, "--query-max-len"];
    let lengths = llara(&[&plan[..], &["64"]].concat()).json();
    let max_len = (lengths["lengths"]["query"]["p50"].as_u64().unwrap() - 1).to_string();
    let plan = llara(&[&plan[..], &[&max_len]].concat());
    assert!(plan.json()["lengths"]["query"]["cut_share"].as_f64().unwrap() >= 0.5);
    let run = bench.finetune(&["--query-max-len", &max_len, "--max-steps", "1"]);
    run.json();
    for stderr in [&run.stderr, &plan.stderr] {
        assert!(stderr.contains(" % of 12 queries are longer than --query-max-len"), "{stderr}");
        assert!(stderr.contains("increase --query-max-len"), "{stderr}");
    }
    let enough = bench.finetune(&["--max-steps", "1", "--overwrite-output-dir"]);
    enough.json();
    assert!(!enough.stderr.contains("are truncated"), "{}", enough.stderr);
}

#[test]
fn rows_without_negatives_are_trained_with_group_size_1() {
    let bench = Bench::new();
    let bare = rows(6).replace("\"neg\"", "\"other\"");
    assert!(!bare.contains("\"neg\""));
    bench.write("train.jsonl", rows(3) + &bare);
    bench.finetune(&[]).refused(&["train.jsonl:4: the row has no hard negatives"]);
    let run = bench.finetune(&["--train-group-size", "1"]);
    let loss = run.json()["loss"].as_f64().unwrap();
    assert!(loss > 0.0 && loss.is_finite(), "{loss}");
}

#[test]
fn the_error_for_another_base_model_names_the_recorded_one() {
    let bench = Bench::new();
    bench.write("texts.txt", "Where does the otter sleep?\n");
    bench.finetune(&["--use-lora", "true", "--lora-rank", "2"]).json();
    let (data, other) = (bench.path("train.jsonl"), bench.path("other"));
    let made = ["init", "--preset", "tiny", "--vocab-size", "400", "--seed", "7"];
    llara(&[&made[..], &["--train-data", &data, "--output-dir", &other]].concat()).json();
    llara(&[
        "encode",
        "--model",
        &other,
        "--adapter",
        &bench.path("out"),
        "--input",
        &bench.path("texts.txt"),
        "--role",
        "query",
        "--output",
        &bench.path("v.npy"),
    ])
    .refused(&["the adapter was trained on", &bench.path("base")]);
    // Training does not go on from a wrong base either.
    let (adapter, further) = (bench.path("out"), bench.path("further"));
    let rest = ["--model", &other, "--from-peft", &adapter, "--use-lora", "true"];
    bench
        .finetune(&[&rest[..], &["--output-dir", &further]].concat())
        .refused(&["the adapter was trained on", "a probe embedding differs"]);
    assert!(!bench.at("further").exists());
}

#[test]
fn an_interrupted_run_prints_how_to_continue() {
    for (signal, code, saved) in [("INT", 130, true), ("TERM", 143, false)] {
        let bench = Bench::new();
        let (model, data, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path("out"));
        let mut command = Command::new(LLARA);
        command.args(["finetune", "--model", &model, "--train-data", &data, "--output-dir", &out]);
        command.args(["--max-steps", "1000000", "--train-group-size", "2", "--use-lora", "false"]);
        command.args(["--save-total-limit", "1", "--logging-steps", "1"]);
        command.args(["--save-strategy", if saved { "steps" } else { "no" }, "--save-steps", "2"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let logged =
            || fs::read_to_string(bench.at("out/log.jsonl")).map_or(0, |l| l.lines().count());
        let start = Instant::now();
        while logged() < 4 && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let kill =
            Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains("stopped after step "), "{stderr}");
        assert!(stderr.contains("--resume-from-checkpoint"), "{stderr}");
        let hidden = |name: &String| name.starts_with('.');
        assert!(!bench.names("out").iter().any(hidden) && !bench.names("").iter().any(hidden));
    }
}
