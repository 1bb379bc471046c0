//! Files that verbs must not read, overwrite or trust.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::Command;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use crate::fixture::{Bench, LLARA, Outcome, llara, outcome};

fn encode(bench: &Bench, input: &str, output: &str, rest: &[&str]) -> Outcome {
    let (model, input, output) = (bench.path("base"), bench.path(input), bench.path(output));
    let args = ["encode", "--model", &model, "--role", "query", "--input", &input];
    llara(&[&args[..], &["--output", &output], rest].concat())
}

fn evaluate(bench: &Bench, rest: &[&str]) -> Outcome {
    let (model, beir) = (bench.path("base"), bench.path("beir"));
    llara(&[&["evaluate", "--model", &model, "--dataset", &beir][..], rest].concat())
}

#[test]
fn outputs_that_would_overwrite_inputs_are_refused() {
    let bench = Bench::new();
    bench.write("texts.npy", "an otter\n");
    bench.write("v.npy.partial", "an otter\n");
    std::os::unix::fs::symlink(bench.at("texts.npy"), bench.at("link.npy")).unwrap();
    fs::hard_link(bench.at("texts.npy"), bench.at("hard.npy")).unwrap();
    let weights = fs::read(bench.at("base/model.safetensors")).unwrap();
    for output in ["texts.npy", "link.npy", "hard.npy", "base/../texts.npy"] {
        let run = encode(&bench, "texts.npy", output, &["--overwrite"]);
        run.refused(&["the output and the input are the same", "hint"]);
    }
    let run = encode(&bench, "texts.npy", "base/model.safetensors", &["--overwrite"]);
    run.refused(&["the output is in the folder of the model"]);
    let run = encode(&bench, "v.npy.partial", "v.npy", &["--overwrite"]);
    run.refused(&["the output and the input are the same"]);
    assert_eq!(fs::read(bench.at("texts.npy")).unwrap(), b"an otter\n");
    assert_eq!(fs::read(bench.at("base/model.safetensors")).unwrap(), weights);

    let qrels = fs::read(bench.at("beir/qrels/test.tsv")).unwrap();
    let run = evaluate(&bench, &["--run-file", &bench.path("beir/qrels/test.tsv"), "--overwrite"]);
    run.refused(&["the output is in the folder of the dataset"]);
    assert_eq!(fs::read(bench.at("beir/qrels/test.tsv")).unwrap(), qrels);

    // A file of another program is not replaced either.
    bench.write("mine.npy", "notes");
    bench.write("mine.txt", "notes");
    encode(&bench, "texts.npy", "mine.npy", &[])
        .refused(&["not a file of embeddings", "--overwrite"]);
    evaluate(&bench, &["--run-file", &bench.path("mine.txt")]).refused(&["not a run file"]);
    assert_eq!(fs::read(bench.at("mine.npy")).unwrap(), b"notes");
    encode(&bench, "texts.npy", "mine.npy", &["--overwrite"]).json();
    encode(&bench, "texts.npy", "mine.npy", &[]).json();

    // Training: the data in the output folder, the output in the model's folder.
    let inside = bench.path("base/tuned");
    bench.finetune(&["--output-dir", &inside]).refused(&["in the folder of the model"]);
    bench.finetune(&["--output-dir", &bench.path("")]).refused(&["in the output folder"]);
}

#[test]
fn an_output_that_another_process_writes_is_refused() {
    let bench = Bench::new();
    bench.write("texts.txt", "an otter\n");
    let before = bench.names("");
    let lock = llara::OutputLock::acquire(&bench.at("v.npy")).unwrap();
    let holder = format!("process {}", std::process::id());
    let run = encode(&bench, "texts.txt", "v.npy", &[]);
    run.refused(&["another process is writing this file", &holder, "hint: wait"]);
    encode(&bench, "texts.txt", "w.npy", &[]).json();
    drop(lock);
    encode(&bench, "texts.txt", "v.npy", &[]).json();
    let mut expected = [&before[..], &["v.npy".to_owned(), "w.npy".to_owned()]].concat();
    expected.sort();
    assert_eq!(bench.names(""), expected);
}

#[test]
fn ids_and_paths_that_cannot_be_written_are_refused_before_the_work() {
    let bench = Bench::new();
    bench.write("texts.txt", "an otter\n");
    fs::remove_file(bench.at("base/model.safetensors")).unwrap();
    for end in ["v.npy/", "v.npy/.", "no/v.npy", "v.csv"] {
        let run = encode(&bench, "texts.txt", end, &[]);
        run.refused(&["v."]);
        assert!(!run.stderr.contains("no weights"), "{}", run.stderr);
    }
    evaluate(&bench, &["--run-file", &bench.path("run/")]).refused(&["the path of a folder"]);
    let corpus = fs::read_to_string(bench.at("beir/corpus.jsonl")).unwrap();
    bench.write("beir/corpus.jsonl", corpus + "{\"_id\": \"a b\", \"text\": \"x\"}\n");
    evaluate(&bench, &["--run-file", &bench.path("run")])
        .refused(&["cannot be written to a run file", "a b"]);
}

#[test]
fn paths_need_not_be_utf8() {
    let bench = Bench::new();
    bench.write("texts.txt", "an otter\n");
    let odd = |end: &str| -> OsString {
        let mut path = bench.at("").into_os_string();
        path.push(OsStr::from_bytes(b"odd\xff"));
        path.push(end);
        path
    };
    let run = |args: &[&str], output: (&str, OsString)| {
        let mut command = Command::new(LLARA);
        command.current_dir(bench.at("")).args(args).arg(output.0).arg(output.1);
        let result = outcome(&mut command);
        assert_ne!(result.code, Some(101), "{}", result.stderr);
        assert!(!result.stderr.contains("panicked"), "{}", result.stderr);
        result
    };
    let encode = ["encode", "--model", "base", "--role", "query", "--input", "texts.txt"];
    assert_eq!(run(&encode, ("--output", odd(".npy"))).json()["rows"], 1);
    let evaluate = ["evaluate", "--model", "base", "--dataset", "beir"];
    assert_eq!(run(&evaluate, ("--run-file", odd(".run"))).json()["queries"], 6);
    let init = ["init", "--preset", "tiny", "--vocab-size", "400", "--train-data", "train.jsonl"];
    run(&init, ("--output-dir", odd("")));
}

#[test]
fn pipes_and_devices_are_refused_without_waiting() {
    for name in
        ["config.json", "model.safetensors", "tokenizer.json", "llara.json", "llara_probes.json"]
    {
        let bench = Bench::new();
        bench.write("texts.txt", "an otter\n");
        let path = bench.at("base").join(name);
        fs::remove_file(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        encode(&bench, "texts.txt", "v.npy", &[]).refused(&[name, "not a regular file"]);
    }
    let bench = Bench::new();
    for name in ["rows.jsonl", "corpus.jsonl"] {
        assert!(Command::new("mkfifo").arg(bench.at(name)).status().unwrap().success());
    }
    bench.finetune(&["--train-data", &bench.path("rows.jsonl")]).refused(&["rows.jsonl"]);
    encode(&bench, "corpus.jsonl", "v.npy", &[]).refused(&["corpus.jsonl", "not a regular file"]);
}

#[test]
fn compressed_and_misnamed_files_are_recognized() {
    let bench = Bench::new();
    bench.write("rows.jsonl", b"\x1f\x8b\x08\x00\x00\x00\xff");
    let rows = bench.path("rows.jsonl");
    bench.finetune(&["--train-data", &rows]).refused(&["compressed (gzip)", "gunzip"]);
    encode(&bench, "rows.jsonl", "v.npy", &[]).refused(&["compressed (gzip)", "gunzip"]);
    bench.write("records.txt", "{\"text\": \"an otter\"}\n");
    encode(&bench, "records.txt", "v.npy", &[])
        .refused(&["JSON object", "rename the file to .jsonl"]);
    // A name in the data cannot control the terminal.
    bench.write("rows.jsonl", "{\"que\\u001b[31mry\": 1, \"query\": \"a\"}\n");
    let run = bench.finetune(&["--train-data", &rows]);
    assert!(run.code == Some(1) && !run.stderr.contains('\u{1b}'), "{:?}", run.stderr);
}

/// Gives every weight of the base model one value.
fn fill_weights(bench: &Bench, value: f32) {
    let path = bench.at("base/model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let longest = file.tensors().iter().map(|(_, t)| t.data().len()).max().unwrap();
    let data = value.to_le_bytes().repeat(longest / 4);
    let tensors = file.tensors().into_iter().map(|(name, tensor)| {
        let data = &data[..tensor.data().len()];
        (name, TensorView::new(tensor.dtype(), tensor.shape().to_vec(), data).unwrap())
    });
    let bytes = safetensors::serialize(tensors, None).unwrap();
    fs::write(path, bytes).unwrap();
    fs::remove_file(bench.at("base/llara_probes.json")).unwrap();
}

#[test]
fn models_with_invalid_weights_are_refused() {
    for (value, expected) in [(0.0, "weights are zero"), (1e38, "too large")] {
        let bench = Bench::new();
        bench.write("texts.txt", "an otter\na heron\n");
        fill_weights(&bench, value);
        let run = encode(&bench, "texts.txt", "v.npy", &["--dtype", "f32"]);
        run.refused(&["the embedding of query 1", expected, "hint"]);
        assert!(!run.stderr.contains("v.npy"), "{}", run.stderr);
        evaluate(&bench, &["--dtype", "f32"]).refused(&["the embedding of query", expected]);
        let beir = bench.path("beir");
        let search = ["search", "--corpus", &beir, "--query", "otter", "--model"];
        llara(&[&search[..], &[&bench.path("base")]].concat()).refused(&["the embedding of query"]);
        let run = bench.finetune(&[]);
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        assert!(!run.stderr.contains("saved and verified"), "{}", run.stderr);
    }
}

#[test]
fn cutoffs_and_unknown_ids() {
    let bench = Bench::new();
    let run = evaluate(&bench, &["--top-k", "1"]);
    let json = run.json();
    for key in ["ndcg@10", "mrr@10", "recall@10", "recall@100"] {
        assert!(json.get(key).is_none(), "{json}");
    }
    assert!(json["map"].as_f64().is_some_and(f64::is_finite));
    assert!(!run.stderr.contains("nDCG@10") && run.stderr.contains("--top-k 1"), "{}", run.stderr);

    let qrels = fs::read_to_string(bench.at("beir/qrels/test.tsv")).unwrap();
    bench.write("beir/qrels/test.tsv", qrels + "q0\tnone\t1\nnone\td0\t1\n");
    evaluate(&bench, &[]).refused(&["judgments of unknown", "--on-unknown-id skip"]);
    let run = evaluate(&bench, &["--on-unknown-id", "skip"]);
    let json = run.json();
    assert_eq!((&json["queries"], &json["skipped_judgments"]), (&6.into(), &2.into()));
    assert!(run.stderr.contains("2 judgments"), "{}", run.stderr);
}
