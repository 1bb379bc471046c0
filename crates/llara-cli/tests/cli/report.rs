//! `llara report`, and the report that a training run writes of itself.

use std::fs;

use crate::fixture::{Bench, llara};

fn train(bench: &Bench, out: &str, rest: &[&str]) -> crate::fixture::Outcome {
    let (base, rows, out) = (bench.path("base"), bench.path("train.jsonl"), bench.path(out));
    let args = ["finetune", "--model", &base, "--train-data", &rows, "--output-dir", &out];
    let steps = ["--max-steps", "3", "--logging-steps", "1", "--train-group-size", "2"];
    llara(&[&args[..], &steps, rest].concat())
}

/// The parts of a page outside of its style sheet.
fn body(bench: &Bench, file: &str) -> String {
    let page = fs::read_to_string(bench.at(file)).unwrap();
    let (_, body) = page.split_once("</style>").expect("a style sheet");
    body.to_owned()
}

#[test]
fn a_run_writes_its_own_report() {
    let bench = Bench::new();
    train(&bench, "out", &["--seed", "7"]).json();
    let page = body(&bench, "out/report.html");
    for part in ["Step 3 of 3", "Loss", "Learning rate", "Gradient norm", "Tokens per second"] {
        assert!(page.contains(part), "no {part:?} in {page}");
    }
    for part in ["train.jsonl: 12 rows", "measured peak so far", "predicted peak", "<td>7</td>"] {
        assert!(page.contains(part), "no {part:?} in {page}");
    }
    // Nothing is loaded from elsewhere, and no path of the machine is shown.
    for part in ["http:", "https:", "<script", "<link", "url("] {
        assert!(!page.contains(part), "{part:?} in {page}");
    }
    assert_eq!(page.matches("<figure").count(), 6);
    assert_eq!(page.matches("<path class=\"line c0\" d=\"M").count(), 4, "{page}");
}

#[test]
fn several_runs_are_drawn_over_one_another() {
    let bench = Bench::new();
    train(&bench, "a", &[]).json();
    train(&bench, "b", &["--learning-rate", "1e-3"]).json();
    let (a, b, output) = (bench.path("a"), bench.path("b"), bench.path("both.html"));
    llara(&["report", &a, &b]).refused(&["several runs need --output", "2 folders"]);
    let made = llara(&["report", &a, &b, "--output", &output]).json();
    assert_eq!(made["runs"], serde_json::json!(["a", "b"]));
    let page = body(&bench, "both.html");
    // The settings that differ come first.
    let settings = page.split_once("Settings").unwrap().1;
    assert!(settings.find("1e-3").unwrap() < settings.find("template").unwrap(), "{settings}");
    assert_eq!(page.matches("class=\"legend\"").count(), 4);
}

#[test]
fn texts_of_the_data_are_no_markup() {
    let bench = Bench::new();
    fs::create_dir(bench.at("run")).unwrap();
    let step = r#"{"step":1,"epoch":1.0,"loss":2.0,"grad_norm":1.0,"learning_rate":1e-4,"tokens":9,"tokens_per_second":9.0,"seconds":1.0}"#;
    let eval = r#"{"step":1,"epoch":1.0,"eval_dataset":"<b>set</b>","eval_split":"dev","ndcg@10":0.5,"queries":1,"seconds":1.0}"#;
    // The last line is cut off, as while it is written; one before it is damaged.
    bench.write("run/log.jsonl", format!("{eval}\n{step}\nnoise\n{{\"step\":2,"));
    let text = "<script>alert(1)</script> & \"quoted\"";
    let passage = serde_json::json!({"id": "d<1>", "text": text, "score": 0.5, "relevance": 1});
    let query = serde_json::json!({"id": "q1", "text": text, "ndcg@10": 0.5, "found": [passage], "missed": []});
    let queries = serde_json::json!({"<b>set</b>": {"split": "dev", "step": 1, "best": [], "worst": [query]}});
    bench.write("run/eval_queries.json", queries.to_string());
    llara(&["report", &bench.path("run")]).json();
    let page = body(&bench, "run/report.html");
    assert!(!page.contains("<script") && !page.contains("<b>"), "{page}");
    assert!(
        page.contains("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quoted&quot;"),
        "{page}"
    );
    assert!(page.contains("1 line of log.jsonl could not be read"), "{page}");
    assert!(page.contains("ndcg@10") && page.contains("0.5000"), "{page}");
}

#[test]
fn other_files_and_folders_are_refused() {
    let bench = Bench::new();
    llara(&["report", &bench.path("none")]).refused(&["no log of a training run", "log.jsonl"]);
    fs::create_dir(bench.at("run")).unwrap();
    bench.write("run/log.jsonl", String::new());
    bench.write("run/report.html", "mine");
    let run = bench.path("run");
    llara(&["report", &run]).refused(&["is not a report of this program", "--overwrite"]);
    assert_eq!(fs::read_to_string(bench.at("run/report.html")).unwrap(), "mine");
    llara(&["report", &run, "--overwrite"]).json();
    assert!(body(&bench, "run/report.html").contains("No step was logged yet"));
    bench.write("run/run.json", "{}");
    llara(&["report", &run]).refused(&["the settings of the run cannot be read", "run.json"]);
    bench.write("run/run.json", "[".repeat(100_000));
    llara(&["report", &run]).refused(&["run.json"]);
}

#[test]
fn a_report_that_cannot_be_written_does_not_end_the_run() {
    let bench = Bench::new();
    fs::create_dir_all(bench.at("out/report.html")).unwrap();
    let outcome = train(&bench, "out", &["--overwrite-output-dir"]);
    outcome.json();
    assert!(outcome.stderr.contains("the report could not be written"), "{}", outcome.stderr);
    assert!(bench.at("out/adapter_model.safetensors").is_file());
}
