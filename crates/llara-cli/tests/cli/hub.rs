//! Models from the Hub's cache without a network, and a mirror that sends paths outside the cache.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;

use crate::fixture::{Bench, LLARA, Outcome, copy_folder, outcome};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

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
    fs::write(repo.join("refs/main"), COMMIT).unwrap();
    copy_folder(&bench.at("base"), &repo.join("snapshots").join(COMMIT));
    assert_eq!(encode(&bench, "field/voles", &[]).json()["rows"], 1);

    let cache = bench.path("home/hub");
    encode(&bench, "field/voles", &["--cache-dir", &cache]).json();
    let missing = ["`field/voles` is not in the cache", "HF_HUB_OFFLINE", "hint"];
    encode(&bench, "field/voles", &["--cache-dir", &bench.path("empty")]).refused(&missing);
    fs::remove_file(repo.join("snapshots").join(COMMIT).join("model.safetensors")).unwrap();
    encode(&bench, "field/voles", &[]).refused(&missing);
    encode(&bench, "field/mice", &[]).refused(&["`field/mice` is not in the cache"]);
    encode(&bench, "field/mice", &[]).refused(&["there is no folder `field/mice`, and"]);
    encode(&bench, "tests/mice", &[]).refused(&["tests/mice: there is no such model folder"]);
    encode(&bench, "./field", &[]).refused(&["there is no such model folder", "org/name"]);
}

/// A mirror on the loopback interface that answers every request with `head`, for one test.
fn mirror(head: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().take(10) {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 4096];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(head.as_bytes());
        }
    });
    address
}

#[test]
fn paths_outside_the_cache_are_refused() {
    let list = format!(r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "config.json"}}]}}"#);
    let bad_list = list.replace(COMMIT, "../../../../out");
    let length = list.len();
    for (headers, body, parts) in [
        ("ETag: \"../../../../out\"", &list, ["ETag that is not a valid file name", "hint"]),
        ("ETag: \"a\"\r\nX-Repo-Commit: ../../x", &list, ["an invalid commit hash", "hint"]),
        ("ETag: \"a\"", &bad_list, ["an invalid commit hash", "40 hexadecimal digits"]),
    ] {
        let bench = Bench::new();
        bench.write("texts.txt", "an otter");
        let length = if body == &list { length } else { bad_list.len() };
        let head = format!(
            "HTTP/1.1 200 OK\r\n{headers}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
        );
        let before = bench.names("");
        let mut command = Command::new(LLARA);
        command.env("HF_HOME", bench.at("home")).env("HF_ENDPOINT", mirror(head));
        for name in ["HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "http_proxy", "HTTP_PROXY"] {
            command.env_remove(name);
        }
        command.args(["encode", "--role", "query", "--model", "field/voles", "--input"]);
        command.arg(bench.at("texts.txt")).arg("--output").arg(bench.at("v.npy"));
        outcome(&mut command).refused(&parts);
        let after: Vec<String> =
            bench.names("").into_iter().filter(|name| name != "home").collect();
        assert_eq!(after, before);
    }
}
