//! Models from the Hub's cache, without a network.

use std::fs;
use std::process::Command;

use crate::fixture::{Bench, LLARA, Outcome, copy_folder, outcome};

fn encode(bench: &Bench, model: &str, rest: &[&str]) -> Outcome {
    bench.write("texts.txt", "an otter");
    let mut command = Command::new(LLARA);
    command.env("HF_HOME", bench.at("home")).env("HF_HUB_OFFLINE", "1").env_remove("HF_HUB_CACHE");
    command.args(["encode", "--role", "query", "--model", model, "--input"]);
    command.arg(bench.at("texts.txt")).arg("--output").arg(bench.at("v.npy")).args(rest);
    outcome(&mut command)
}

#[test]
fn a_cached_model_needs_no_network() {
    let bench = Bench::new();
    let repo = bench.at("home/hub/models--field--voles");
    fs::create_dir_all(repo.join("refs")).unwrap();
    fs::write(repo.join("refs/main"), "0123abcd").unwrap();
    copy_folder(&bench.at("base"), &repo.join("snapshots/0123abcd"));
    assert_eq!(encode(&bench, "field/voles", &[]).json()["rows"], 1);

    let cache = bench.path("home/hub");
    encode(&bench, "field/voles", &["--cache-dir", &cache]).json();
    let missing = ["`field/voles` is not in the cache", "HF_HUB_OFFLINE", "hint"];
    encode(&bench, "field/voles", &["--cache-dir", &bench.path("empty")]).refused(&missing);
    fs::remove_file(repo.join("snapshots/0123abcd/model.safetensors")).unwrap();
    encode(&bench, "field/voles", &[]).refused(&missing);
    encode(&bench, "field/mice", &[]).refused(&["`field/mice` is not in the cache"]);
    encode(&bench, "field/mice", &[]).refused(&["there is no folder `field/mice`, and"]);
    encode(&bench, "tests/mice", &[]).refused(&["tests/mice: there is no such model folder"]);
    encode(&bench, "./field", &[]).refused(&["there is no such model folder", "org/name"]);
}
