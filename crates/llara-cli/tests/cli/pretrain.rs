//! `llara pretrain`: texts to a causal language model that `finetune` starts from.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::fixture::{Bench, LLARA, Outcome, copy_folder_deep, llara, outcome, with_fixed_kernels};

/// A text of sentences.
fn text(sentences: usize) -> String {
    let sentence = |i: usize| {
        let animal = ["otter", "heron", "lynx", "badger", "toad"][i % 5];
        format!("The {animal} number {i} sleeps under the bridge in winter. ")
    };
    (0..sentences).map(sentence).collect()
}

/// Rows in the reference's form.
fn rows(count: usize) -> String {
    let row = |i: usize| {
        let own = format!("The otter {i} sleeps.\t\n");
        let next = format!("Then it wakes {i} times.");
        let row = json!({ "input": own, "output_summarize": own, "output_predict": next });
        format!("{row}\n")
    };
    (0..count).map(row).collect()
}

/// A short run on `text.txt`, from `base` to `pre`; `rest` is appended.
fn pretrain_by(bench: &Bench, mut program: Command, rest: &[&str]) -> Outcome {
    bench.write("text.txt", text(60));
    let (model, text, out) = (bench.path("base"), bench.path("text.txt"), bench.path("pre"));
    let mut args = vec!["pretrain", "--model", &model, "--output-dir", &out, "--max-steps", "3"];
    if !rest.contains(&"--train-data") && !rest.contains(&"--text") {
        args.extend(["--text", &text]);
    }
    args.extend(["--per-device-train-batch-size", "4", "--cutoff-len", "160"]);
    args.extend(["--learning-rate", "1e-3", "--logging-steps", "1"]);
    args.extend(rest);
    outcome(program.args(args))
}

fn pretrain(bench: &Bench, rest: &[&str]) -> Outcome {
    pretrain_by(bench, Command::new(LLARA), rest)
}

fn log(bench: &Bench, out: &str) -> Vec<Value> {
    let log = fs::read_to_string(bench.at(out).join("log.jsonl")).unwrap();
    log.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_text_file_becomes_a_model_that_finetune_starts_from() {
    let bench = Bench::new();
    let result = pretrain(&bench, &[]).json();
    assert_eq!(result["steps"], 3);
    let records = log(&bench, "pre");
    assert_eq!(records.len(), 3);
    for record in &records {
        let [total, lm, encode, regress] = ["", "_language_model", "_auto_encode", "_auto_regress"]
            .map(|term| record[format!("loss{term}")].as_f64().unwrap());
        assert!((total - lm - (encode + regress) / 2.0).abs() < 1e-4, "{record}");
    }
    assert!(records[2]["loss"].as_f64() < records[0]["loss"].as_f64());
    assert!(bench.names("pre").contains(&"report.html".to_owned()));
    let config: Value =
        serde_json::from_slice(&fs::read(bench.at("pre/config.json")).unwrap()).unwrap();
    assert_eq!(config["architectures"], json!(["LlamaForCausalLM"]));

    let card = fs::read_to_string(bench.at("pre/README.md")).unwrap();
    assert!(card.contains("Pretraining on texts (Llama2Vec)"), "{card}");
    assert!(!card.contains("fine-tuned from") && !card.contains("InfoNCE"), "{card}");

    let model = bench.path("pre");
    let tuned = bench.finetune(&["--model", &model]);
    tuned.json();
    let evaluated = llara(&["evaluate", "--model", &model, "--dataset", &bench.path("beir")]);
    assert!(evaluated.json()["ndcg@10"].as_f64().is_some());

    let weights = |name: &str| fs::read(bench.at(name).join("model.safetensors")).unwrap();
    fs::rename(bench.at("pre"), bench.at("first")).unwrap();
    pretrain(&bench, &["--threads", "1"]).json();
    assert!(weights("pre") == weights("first"), "the same run gave other weights");
    fs::rename(bench.at("pre"), bench.at("second")).unwrap();
    pretrain(&bench, &["--chunk-tokens", "200", "--dtype", "bf16"]).json();
    assert!(weights("pre") != weights("first"));
}

#[test]
fn transformers_loads_the_model_as_a_causal_language_model() {
    let Ok(python) = std::env::var("LLARA_PYTHON") else {
        eprintln!("skipped: LLARA_PYTHON names no Python interpreter with transformers");
        return;
    };
    let bench = Bench::new();
    for (name, untied) in [("tied", false), ("untied", true)] {
        let base = bench.at("base");
        if untied {
            let fixtures =
                concat!(env!("CARGO_MANIFEST_DIR"), "/../llara/tests/fixtures/llama-gqa");
            fs::remove_dir_all(&base).unwrap();
            copy_folder_deep(fixtures.as_ref(), &base);
        }
        pretrain(&bench, &["--learning-rate", "1e-9", "--max-steps", "1"]).json();
        let program = format!(
            "import sys, torch\n\
             from transformers import AutoModelForCausalLM, AutoTokenizer\n\
             model, info = AutoModelForCausalLM.from_pretrained({0:?}, output_loading_info=True)\n\
             assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n\
             base = AutoModelForCausalLM.from_pretrained({1:?})\n\
             ids = torch.tensor([AutoTokenizer.from_pretrained({0:?})('The otter sleeps.')['input_ids']])\n\
             difference = (model(ids).logits - base(ids).logits).abs().max().item()\n\
             print(type(model).__name__, difference)\n\
             assert difference < 1e-4\n",
            bench.path("pre"),
            bench.path("base"),
        );
        let run = outcome(Command::new(&python).args(["-c", &program]).env("HF_HUB_OFFLINE", "1"));
        assert_eq!(run.code, Some(0), "{name}: {}", run.stderr);
        assert!(run.stdout.contains("LlamaForCausalLM"), "{}", run.stdout);
        fs::remove_dir_all(bench.at("pre")).unwrap();
    }
}

#[test]
fn a_command_line_of_the_reference_runs() {
    let bench = Bench::new();
    bench.write("rows.jsonl", rows(9));
    let data = bench.path("rows.jsonl");
    let rest = "--cutoff_len 160 --remove_stop_words True --use_lora False --num_train_epochs 1 \
        --max_steps -1 --warmup_ratio 0.1 --bf16 --gradient_checkpointing --deepspeed stage1.json \
        --dataloader_drop_last True --use_flash_attn False";
    let rest: Vec<&str> =
        ["--train-data", &data].into_iter().chain(rest.split_whitespace()).collect();
    let run = pretrain(&bench, &rest);
    assert_eq!(run.json()["steps"], 2);
    assert!(run.stderr.contains("--deepspeed has no effect"), "{}", run.stderr);
    assert!(run.stderr.contains("all words but stop words"), "{}", run.stderr);
}

#[test]
fn a_resumed_run_ends_with_the_same_bytes() {
    let bench = Bench::new();
    let fixed = ["--threads", "1", "--save-steps", "1", "--dtype", "bf16"];
    pretrain_by(&bench, with_fixed_kernels(), &fixed).json();
    fs::rename(bench.at("pre"), bench.at("whole")).unwrap();
    copy_folder_deep(&bench.at("whole/checkpoint-2"), &bench.at("pre/checkpoint-2"));
    let resume = [&fixed[..], &["--resume-from-checkpoint"]].concat();
    let resumed = pretrain_by(&bench, with_fixed_kernels(), &resume);
    resumed.json();
    assert!(resumed.stderr.contains("resumed   after step 2 of 3"), "{}", resumed.stderr);
    for name in ["model.safetensors", "config.json", "llara_probes.json", "README.md"] {
        let [got, want] = ["pre", "whole"].map(|out| fs::read(bench.at(out).join(name)).unwrap());
        assert!(got == want, "{name} differs");
    }

    fs::remove_dir_all(bench.at("pre")).unwrap();
    copy_folder_deep(&bench.at("whole/checkpoint-2"), &bench.at("pre/checkpoint-2"));
    let other = [&resume[..], &["--auto-encode-weight", "2"]].concat();
    pretrain_by(&bench, with_fixed_kernels(), &other)
        .refused(&["auto-encode-weight: 1.0 in the checkpoint"]);
}

#[test]
fn a_checkpoint_of_one_task_is_not_continued_by_the_other() {
    let bench = Bench::new();
    // The same data for both: rows with the fields of both forms.
    let row = |i: usize| {
        let text = format!("The otter {i} sleeps under the bridge.");
        let row = json!({
            "query": "Where does it sleep?", "pos": [text], "neg": ["A heron wakes."],
            "input": text, "output_summarize": text, "output_predict": "It wakes.",
        });
        format!("{row}\n")
    };
    bench.write("train.jsonl", (0..12).map(row).collect::<String>());
    let data = bench.path("train.jsonl");
    let by = |verb: &str, rest: &[&str]| match verb {
        "pretrain" => pretrain(&bench, &[&["--train-data", &data], rest].concat()),
        _ => bench.finetune(rest),
    };
    for (first, second, task) in [
        ("pretrain", "finetune", "task: \"pretraining\" in the checkpoint, not set now"),
        ("finetune", "pretrain", "task: not set in the checkpoint, \"pretraining\" now"),
    ] {
        let (from, to) = (format!("by-{first}"), format!("by-{second}-again"));
        let out = bench.path(&from);
        by(first, &["--output-dir", &out, "--save-steps", "1"]).json();
        let checkpoint = "checkpoint-2";
        copy_folder_deep(&bench.at(&from).join(checkpoint), &bench.at(&to).join(checkpoint));
        let out = bench.path(&to);
        let resume = ["--output-dir", &out, "--resume-from-checkpoint"];
        by(second, &resume).refused(&["settings differ from the checkpoint's", task]);
    }
}

#[test]
fn tokens_are_added_and_adapters_are_refused_then() {
    let bench = Bench::new();
    let (model, data) = (bench.path("plain"), bench.path("train.jsonl"));
    let args = ["init", "--preset", "tiny", "--template", "qwen3-embedding", "--train-data", &data];
    llara(&[&args[..], &["--output-dir", &model, "--vocab-size", "400"]].concat()).json();
    let plain = ["--model", &model, "--template", "llara", "--cutoff-len", "260"];
    let with = |rest: &[&str]| pretrain(&bench, &[&plain[..], rest].concat());
    with(&["--add-special-tokens", "false"]).refused(&["no single tokens for <s1>"]);
    // An adapter is no way to need less memory then.
    let too_large = with(&["--memory-budget", "10MB"]);
    too_large.refused(&["does not fit in 9.54 MiB"]);
    assert!(!too_large.stderr.contains("--use-lora"), "{}", too_large.stderr);
    with(&["--use-lora", "true"])
        .refused(&["needs a model that has all tokens of the template", "--use-lora false"]);
    // Nor from an adapter that has tokens of its own: the language-model head has no rows for them.
    let adapter = ["--use-lora", "true", "--lora-rank", "2", "--add-special-tokens"];
    let lengths = ["--query-max-len", "260", "--passage-max-len", "260", "--overwrite-output-dir"];
    bench.finetune(&[&plain[..4], &adapter, &lengths].concat()).json();
    with(&["--use-lora", "true", "--from-peft", &bench.path("out")])
        .refused(&["needs a model that has all tokens of the template", "with the adapter"]);
    with(&[]).json();
    let config = |name: &str| -> Value {
        serde_json::from_slice(&fs::read(bench.at(name).join("config.json")).unwrap()).unwrap()
    };
    let size = |name: &str| config(name)["vocab_size"].as_u64().unwrap();
    assert_eq!(size("pre"), size("plain") + 16);
    // With all tokens, an adapter can be trained.
    fs::rename(bench.at("pre"), bench.at("grown")).unwrap();
    let grown = bench.path("grown");
    pretrain(
        &bench,
        &["--model", &grown, "--use-lora", "true", "--lora-rank", "4", "--cutoff-len", "260"],
    )
    .json();
    assert!(bench.at("pre/adapter_model.safetensors").is_file());
}

#[test]
fn bad_input_is_refused_before_work_starts() {
    let bench = Bench::new();
    let refused = |rest: &[&str], parts: &[&str]| {
        pretrain(&bench, rest).refused(parts);
        assert!(!bench.at("pre").exists(), "{rest:?} left an output folder");
    };
    let rows_of = |name: &str, contents: &str| {
        bench.write(name, contents);
        bench.path(name)
    };
    let two = rows_of("two.jsonl", "{\"input\": \"a\", \"output_summarize\": \"a\"}\n");
    refused(&["--train-data", &two], &["two.jsonl:1", "`output_predict` is missing"]);
    refused(&["--train-data", &two, "--on-bad-row", "skip"], &["no training rows", "all skipped"]);
    let blank = rows_of(
        "blank.jsonl",
        "{\"input\": \" \", \"output_summarize\": \"a\", \"output_predict\": \"b\"}\n",
    );
    refused(&["--train-data", &blank], &["blank.jsonl:1", "`input` is empty"]);
    refused(
        &["--cutoff-len", "20"],
        &["no token for the text", "a cutoff of at least", "--cutoff-len 20"],
    );
    refused(&["--cutoff-len", "0"], &["the cutoff is out of range"]);
    let empty = rows_of("empty.txt", " \n\n");
    refused(&["--text", &empty], &["empty.txt", "the file has no text"]);
    let binary = bench.path("binary.txt");
    fs::write(&binary, [0xff, 0xfe, 0x00, 0x41]).unwrap();
    refused(&["--text", &binary], &["binary.txt:1", "not UTF-8"]);
    let stop = rows_of("stop.txt", "the\nsleeps\nin\nwinter\n");
    let all = rows_of(
        "all.jsonl",
        "{\"input\": \"The sleeps.\", \"output_summarize\": \"Sleeps, in winter\", \"output_predict\": \"\"}\n",
    );
    refused(
        &["--train-data", &all, "--stop-words", &stop],
        &["no row has words to predict", "stop words"],
    );
    refused(&["--stop-words", &bench.path("absent.txt")], &["absent.txt"]);
    refused(
        &["--stop-words", &stop, "--remove-stop-words", "false"],
        &["the stop words would not be removed", "omit one of them"],
    );
    refused(&["--language-model-weight", "nan"], &["weight of the language-model loss"]);
    let none =
        ["--language-model-weight", "0", "--auto-encode-weight", "0", "--auto-regress-weight", "0"];
    refused(&none, &["all weights of the loss are 0"]);
    refused(&["--piece-characters", "0"], &["the length of a piece is out of range"]);
    refused(
        &["--template", "e5-mistral", "--add-special-tokens"],
        &["cannot tell the text itself"],
    );
    refused(&["--max-steps", "0"], &["the number of steps is out of range"]);
    refused(&["--memory-budget", "10MB"], &["does not fit in 9.54 MiB"]);

    let rows = rows_of("rows.jsonl", &rows(3));
    refused(&["--train-data", &rows, "--piece-characters", "9"], &["not cut into pieces"]);
    let usage = pretrain(&bench, &["--train-data", &rows, "--text", &stop]);
    assert_eq!(usage.code, Some(2), "{}", usage.stderr);
    let without =
        outcome(Command::new(LLARA).args(["pretrain", "--model", "m", "--output-dir", "o"]));
    assert_eq!(without.code, Some(2));
    assert!(without.stderr.contains("--train-data or --text"), "{}", without.stderr);

    // A model that does not answer as it did when it was saved.
    let weights = bench.at("base/model.safetensors");
    let saved = fs::read(&weights).unwrap();
    let mut damaged = saved.clone();
    // An exponent of the last weight but some.
    let at = damaged.len() - 4000;
    damaged[at - at % 4 + 3] ^= 1;
    fs::write(&weights, damaged).unwrap();
    refused(&[], &["does not answer as it did", "base"]);
    fs::write(&weights, saved).unwrap();

    // Words to predict, but not of the losses that have a weight.
    let own = ["--language-model-weight", "0", "--auto-encode-weight", "0"];
    let alone = rows_of(
        "alone.jsonl",
        "{\"input\": \"An otter.\", \"output_summarize\": \"An otter.\", \"output_predict\": \"\"}\n",
    );
    refused(
        &[&["--train-data", &alone], &own[..]].concat(),
        &["no row has words to predict", "words of a following text", "1 sampled"],
    );

    // A bare decoder has no head.
    let config = bench.at("base/config.json");
    let text = fs::read_to_string(&config).unwrap();
    let untied = text.replace("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false");
    assert_ne!(text, untied);
    fs::write(&config, untied).unwrap();
    refused(&[], &["the model has no language-model head", "lm_head.weight"]);
}

#[test]
fn rows_without_targets_and_bad_texts_are_counted() {
    let bench = Bench::new();
    let row = |next: &str| {
        let row = json!({ "input": "An otter.", "output_summarize": "An otter.", "output_predict": next });
        format!("{row}\n")
    };
    bench.write("rows.jsonl", format!("{}{}not json\n", row("It wakes."), row("")));
    let data = bench.path("rows.jsonl");
    let run = pretrain(&bench, &["--train-data", &data, "--on-bad-row", "skip"]);
    assert!(run.json()["loss"].as_f64().unwrap().is_finite());
    assert!(
        run.stderr.contains("1 of 2 sampled rows have no words of a following text"),
        "{}",
        run.stderr
    );
    assert!(run.stderr.contains("2 rows, 1 skipped"), "{}", run.stderr);
    // Alone, a row without a following text trains too.
    bench.write("rows.jsonl", row(""));
    let run = pretrain(&bench, &["--train-data", &data, "--overwrite-output-dir"]);
    assert_eq!(log(&bench, "pre")[0]["loss_auto_regress"], Value::Null, "{}", run.stderr);
    assert!(log(&bench, "pre")[0]["loss_auto_encode"].is_f64());

    // A blank file among others.
    fs::create_dir(bench.at("texts")).unwrap();
    bench.write("texts/1.txt", " \n");
    bench.write("texts/2.txt", text(9));
    let texts = bench.path("texts");
    let skip = ["--text", &texts, "--overwrite-output-dir", "--on-bad-row"];
    pretrain(&bench, &[&skip[..], &["error"]].concat()).refused(&["1.txt", "the file has no text"]);
    let run = pretrain(&bench, &[&skip[..], &["skip"]].concat());
    run.json();
    assert!(run.stderr.contains("1 skipped"), "{}", run.stderr);
}
