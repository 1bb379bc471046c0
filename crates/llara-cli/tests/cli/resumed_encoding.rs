//! `llara encode --resume`: a killed run continues and gives the bytes of an uninterrupted one.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::fixture::{Bench, LLARA, Outcome, llara};

/// Blocks of 4,096 texts and a rest.
const TEXTS: usize = 2 * 4096 + 100;

/// A template without prefix and suffix, so that a block is encoded quickly.
const TEMPLATE: &str = "name = \"bare\"\npooled_tokens = 1\n[query]\n[passage]\n";

fn bench() -> Bench {
    let bench = Bench::new();
    bench.write("bare.toml", TEMPLATE);
    bench.write("texts.txt", (0..TEXTS).map(|i| format!("{}\n", i % 97)).collect::<String>());
    bench
}

fn arguments(bench: &Bench, output: &str) -> Vec<String> {
    let mut args = vec!["encode".to_owned(), "--role".into(), "passage".into()];
    for (option, file) in [
        ("--model", "base"),
        ("--template", "bare.toml"),
        ("--input", "texts.txt"),
        ("--output", output),
    ] {
        args.extend([option.to_owned(), bench.path(file)]);
    }
    args
}

fn encode(bench: &Bench, output: &str, rest: &[&str]) -> Outcome {
    let args = arguments(bench, output);
    let args: Vec<&str> = args.iter().map(String::as_str).chain(rest.iter().copied()).collect();
    llara(&args)
}

/// Kills a run as soon as it has kept something.
fn killed(bench: &Bench, output: &str) {
    let mut command = Command::new(LLARA);
    command.args(arguments(bench, output)).stdout(Stdio::null()).stderr(Stdio::null());
    let mut run = command.spawn().unwrap();
    let start = Instant::now();
    while !bench.at(&format!("{output}.partial.json")).exists() {
        assert!(start.elapsed() < Duration::from_secs(60), "nothing was kept");
        sleep(Duration::from_millis(1));
    }
    run.kill().unwrap();
    run.wait().unwrap();
    assert!(!bench.at(output).exists(), "the run was over before it could be killed");
}

#[test]
fn a_killed_run_is_resumed_with_the_same_bytes() {
    let bench = bench();
    let before = bench.names("");
    assert_eq!(encode(&bench, "whole.npy", &[]).json()["rows"], TEXTS);
    assert_eq!(bench.names("").len(), before.len() + 1);

    killed(&bench, "v.npy");
    // With other inputs it is refused and not changed.
    let other = encode(&bench, "v.npy", &["--resume", "--max-len", "7"]);
    other.refused(&["v.npy.partial: ", "expected: max_len 7", "got: max_len 128", "--resume"]);
    bench.write("bare.toml", TEMPLATE.replace("pooled_tokens = 1", "pooled_tokens = 2"));
    encode(&bench, "v.npy", &["--resume"]).refused(&["expected: pooled_tokens 2", "probe"]);
    bench.write("bare.toml", TEMPLATE);

    let resumed = encode(&bench, "v.npy", &["--resume"]);
    assert_eq!(resumed.json()["rows"], TEXTS);
    assert!(resumed.stderr.contains("continuing after "), "{}", resumed.stderr);
    assert!(!resumed.stderr.contains("after 0 "), "{}", resumed.stderr);
    let read = |name: &str| fs::read(bench.at(name)).unwrap();
    assert!(read("v.npy") == read("whole.npy"), "the resumed file is another one");
    assert_eq!(bench.names("").len(), before.len() + 2);

    // Without the option it starts over and prints a note.
    killed(&bench, "w.npy");
    let again = encode(&bench, "w.npy", &[]);
    again.json();
    assert!(again.stderr.contains("note: starting over; --resume would"), "{}", again.stderr);
    assert!(read("w.npy") == read("whole.npy"));
    assert_eq!(bench.names("").len(), before.len() + 3);
}

#[test]
fn without_an_interrupted_run_it_starts() {
    let bench = bench();
    bench.write("texts.txt", "An otter.\nA heron.\n");
    assert_eq!(encode(&bench, "v.npy", &["--resume"]).json()["rows"], 2);
    assert!(!bench.at("v.npy.partial").exists());
}

#[test]
fn damaged_embeddings_are_computed_again_and_complete_ones_are_not() {
    let bench = bench();
    encode(&bench, "whole.npy", &[]).json();
    let read = |name: &str| fs::read(bench.at(name)).unwrap();
    killed(&bench, "v.npy");
    let mut bytes = read("v.npy.partial");
    bytes[4096] ^= 1;
    bench.write("v.npy.partial", bytes);
    let resumed = encode(&bench, "v.npy", &["--resume"]);
    resumed.json();
    assert!(resumed.stderr.contains("were damaged and are recomputed"), "{}", resumed.stderr);
    assert!(read("v.npy") == read("whole.npy"), "the resumed file is another one");

    let again = encode(&bench, "v.npy", &["--resume"]);
    assert_eq!(again.json()["rows"], TEXTS);
    assert!(again.stderr.contains("already complete"), "{}", again.stderr);
    let mut bytes = read("v.npy");
    *bytes.last_mut().unwrap() ^= 1;
    bench.write("v.npy", bytes);
    encode(&bench, "v.npy", &["--resume"])
        .refused(&["differs from that of its text", "without --resume"]);
}
