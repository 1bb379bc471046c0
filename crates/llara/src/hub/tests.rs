//! Tests of the Hub's client with a malicious mirror on the loopback interface.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The response of the mirror for a path: status line and headers, body.
type Answer = (String, Vec<u8>);

/// A server on 127.0.0.1 that sends prepared answers and records the requests, for as long as the test
/// process lives.
struct Mirror {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Mirror {
    fn start(answers: HashMap<String, Answer>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&requests);
        std::thread::spawn(move || {
            // A limit above the number of requests of any test.
            for stream in listener.incoming().take(100) {
                let Ok(stream) = stream else { return };
                stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                let _ = serve(stream, &answers, &record);
            }
        });
        Mirror { address, requests }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn serve(
    stream: TcpStream,
    answers: &HashMap<String, Answer>,
    record: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut request = String::new();
    let mut reader = BufReader::new(stream.try_clone()?);
    while !request.ends_with("\r\n\r\n") {
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
    }
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    record.lock().unwrap().push(request);
    let mut stream = stream;
    match answers.get(&path) {
        Some((head, body)) => {
            write!(stream, "HTTP/1.1 {head}\r\nConnection: close\r\n\r\n")?;
            if head.contains("x-endless") {
                // Until the client closes the connection.
                while stream.write_all(body).is_ok() {}
            } else {
                stream.write_all(body)?;
            }
        }
        None => write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?,
    }
    stream.flush()
}

fn file_path(name: &str) -> String {
    format!("/org/name/resolve/{COMMIT}/{name}")
}

fn ok(headers: &str, body: &[u8]) -> Answer {
    (format!("200 OK\r\nContent-Length: {}{headers}", body.len()), body.to_vec())
}

fn etag(tag: &str, body: &[u8]) -> Answer {
    ok(&format!("\r\nETag: \"{tag}\"\r\nX-Repo-Commit: {COMMIT}"), body)
}

fn listing(files: &[&str], sha: &str) -> Answer {
    let siblings: Vec<Value> =
        files.iter().map(|file| serde_json::json!({"rfilename": file})).collect();
    ok("", serde_json::json!({"sha": sha, "siblings": siblings}).to_string().as_bytes())
}

const LISTING: &str = "/api/models/org/name/revision/main";

/// The valid responses of a mirror of a model with three files.
fn valid_responses() -> HashMap<String, Answer> {
    let files = ["README.md", "config.json", "tokenizer.json", "model.safetensors"];
    let sha = sha256(b"weights");
    HashMap::from([
        (LISTING.to_owned(), listing(&files, COMMIT)),
        (file_path("config.json"), etag("c0", b"{}")),
        (file_path("tokenizer.json"), etag("t0", b"{\"t\": 1}")),
        (
            file_path("model.safetensors"),
            (
                format!(
                    "302 Found\r\nLocation: /cdn/w?sig=1\r\nX-Linked-Etag: \"{sha}\"\r\nX-Linked-Size: 7\r\nX-Repo-Commit: {COMMIT}\r\nContent-Length: 0"
                ),
                Vec::new(),
            ),
        ),
        ("/cdn/w?sig=1".to_owned(), ok("\r\nETag: \"other\"", b"weights")),
    ])
}

fn sha256(bytes: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

fn timeouts() -> Timeouts {
    let short = Duration::from_secs(2);
    Timeouts { connect: short, read: short, body: short }
}

/// Fetches `org/name` from a mirror into a new cache; returns the cache and the result.
fn fetch(mirror: &Mirror, token: Option<&str>) -> (tempfile::TempDir, Result<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let found = fetch_into(mirror, dir.path(), "org/name", token);
    (dir, found)
}

fn fetch_into(mirror: &Mirror, cache: &Path, model: &str, token: Option<&str>) -> Result<PathBuf> {
    let id = ModelId::parse(model).unwrap();
    let client = Client::new(&mirror.address, token.map(str::to_owned), timeouts())?;
    fetch_model(&client, &id, &RepoCache::new(cache, &id), Files::All, &mut |_| ())
}

/// Downloads from a mirror with some responses replaced. This must fail with `parts` in the message and must
/// not leave a file that a later run could use as a part of the model.
#[track_caller]
fn refused(changes: impl IntoIterator<Item = (String, Answer)>, parts: &[&str]) {
    let mut answers = valid_responses();
    answers.extend(changes);
    let (dir, found) = fetch(&Mirror::start(answers), None);
    let e = found.unwrap_err().to_string();
    for part in parts {
        assert!(e.contains(part), "no {part:?} in: {e}");
    }
    assert!(!e.contains('\u{1b}'), "{e:?}");
    let outside: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(outside.iter().all(|name| name == "models--org--name"), "{outside:?}");
    let blobs = dir.path().join("models--org--name/blobs");
    let left: Vec<_> =
        fs::read_dir(blobs).into_iter().flatten().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| ["c0", "t0"].contains(&name.to_str().unwrap())), "{left:?}");
    let cache = RepoCache::new(dir.path(), &ModelId::parse("org/name").unwrap());
    assert_eq!(cache.commit(), None, "a failed download was recorded as complete");
}

#[test]
fn a_model_is_downloaded_once() {
    let mirror = Mirror::start(valid_responses());
    let dir = tempfile::tempdir().unwrap();
    let snapshot = fetch_into(&mirror, dir.path(), "org/name", None).unwrap();
    assert_eq!(snapshot, dir.path().join("models--org--name/snapshots").join(COMMIT));
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), b"weights");
    let link = fs::read_link(snapshot.join("config.json")).unwrap();
    assert_eq!(link, Path::new("../../blobs/c0"));
    let repo = dir.path().join("models--org--name");
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    assert!(repo.join("blobs").join(sha256(b"weights")).is_file());
    assert!(!snapshot.join("README.md").exists());

    // Complete: no request is made, by branch or by commit.
    let before = mirror.requests().len();
    assert_eq!(resolve("org/name", Some(dir.path())).unwrap(), snapshot);
    assert_eq!(resolve(&format!("org/name@{COMMIT}"), Some(dir.path())).unwrap(), snapshot);
    // A second download requests only the list.
    fetch_into(&mirror, dir.path(), "org/name", None).unwrap();
    assert_eq!(mirror.requests().len(), before + 1);
    // An existing blob is linked and not downloaded again.
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    fetch_into(&mirror, dir.path(), "org/name", None).unwrap();
    assert_eq!(fs::read(snapshot.join("model.safetensors")).unwrap(), b"weights");
}

#[test]
fn a_revision_is_requested_and_recorded() {
    let mut answers = valid_responses();
    let list = answers.remove(LISTING).unwrap();
    answers.insert("/api/models/org/name/revision/refs%2Fpr%2F1".into(), list.clone());
    answers.insert(format!("/api/models/org/name/revision/{}", "f".repeat(40)), list);
    let mirror = Mirror::start(answers);
    let dir = tempfile::tempdir().unwrap();
    fetch_into(&mirror, dir.path(), "org/name@refs/pr/1", None).unwrap();
    let reference = dir.path().join("models--org--name/refs/refs/pr/1");
    assert_eq!(fs::read_to_string(reference).unwrap(), COMMIT);
    let e = fetch_into(&mirror, dir.path(), &format!("org/name@{}", "f".repeat(40)), None);
    assert!(e.unwrap_err().to_string().contains("another commit"));
}

#[test]
fn names_that_leave_the_cache_are_refused() {
    for tag in ["../../../../x", "/etc/x", "..", "a/b", "a%2fb", "a b", ""] {
        refused([(file_path("config.json"), etag(tag, b"{}"))], &["ETag", "hint"]);
        let linked = format!("\r\nX-Linked-Etag: \"{tag}\"\r\nETag: \"ok\"");
        refused([(file_path("config.json"), ok(&linked, b"{}"))], &["ETag", "hint"]);
    }
    refused([(file_path("config.json"), ok("", b"{}"))], &["sent no ETag"]);
    for sha in ["../../../x", "main", "", "0123456789ABCDEF0123456789ABCDEF01234567"] {
        let files = ["config.json", "tokenizer.json"];
        refused([(LISTING.into(), listing(&files, sha))], &["commit", "40 hexadecimal digits"]);
        let headers = format!("\r\nETag: \"c0\"\r\nX-Repo-Commit: {sha}");
        let part = if sha.is_empty() { "commit" } else { "40 hexadecimal digits" };
        refused([(file_path("config.json"), ok(&headers, b"{}"))], &["commit", part]);
    }
    let other = format!("\r\nETag: \"c0\"\r\nX-Repo-Commit: {}", "f".repeat(40));
    refused([(file_path("config.json"), ok(&other, b"{}"))], &["another commit"]);
    for name in ["../x", "/etc/x", "a\u{1b}[31m", "a/../../x", "a\\..\\x"] {
        let files = ["config.json", "tokenizer.json", "model.safetensors", name];
        refused([(LISTING.into(), listing(&files, COMMIT))], &["a file name outside the folder"]);
    }
}

#[test]
fn shards_outside_the_folder_are_refused() {
    for shard in ["../../x.safetensors", "/x.safetensors", "a/b.safetensors", "x.bin", ""] {
        let index = serde_json::json!({"weight_map": {"w": shard}}).to_string();
        let files = ["config.json", "tokenizer.json", INDEX_FILE];
        let mut answers = valid_responses();
        answers.insert(LISTING.into(), listing(&files, COMMIT));
        answers.insert(file_path(INDEX_FILE), etag("i0", index.as_bytes()));
        let (_dir, found) = fetch(&Mirror::start(answers), None);
        let e = found.unwrap_err().to_string();
        assert!(e.contains("a shard outside the model folder"), "{e}");
    }
    let index = r#"{"weight_map": {"w": "m-1.safetensors"}}"#;
    let mut answers = valid_responses();
    answers.insert(LISTING.into(), listing(&["config.json", "tokenizer.json", INDEX_FILE], COMMIT));
    answers.insert(file_path(INDEX_FILE), etag("i0", index.as_bytes()));
    let (_dir, found) = fetch(&Mirror::start(answers), None);
    assert!(found.unwrap_err().to_string().contains("the index lists a missing shard"));
}

#[test]
fn lengths_and_contents_are_verified() {
    let weights = |size: &str| {
        let headers = format!("\r\nETag: \"w0\"\r\nX-Linked-Size: {size}");
        (file_path("model.safetensors"), ok(&headers, b"weights"))
    };
    refused([weights("8")], &["two different lengths"]);
    refused([weights("-1")], &["invalid length"]);
    refused([weights("99999999999999999999")], &["invalid length"]);
    let head = |length: &str| {
        (format!("200 OK\r\nETag: \"w0\"\r\nContent-Length: {length}"), b"abc".to_vec())
    };
    refused([(file_path("model.safetensors"), head("9999999999999"))], &["too long"]);
    refused([(file_path("config.json"), head("999999999"))], &["too long"]);
    // The connection ends before the announced length.
    refused([(file_path("model.safetensors"), head("1000"))], &["resolve"]);
    // Other bytes under the name of a SHA-256.
    let other = ok("\r\nETag: \"x\"", b"Weights");
    refused([("/cdn/w?sig=1".to_owned(), other)], &["SHA-256", &sha256(b"weights")]);
}

#[test]
fn an_endless_body_ends_at_the_limit() {
    let endless = ("200 OK\r\nETag: \"e0\"\r\nx-endless: 1".to_owned(), vec![b' '; 1 << 16]);
    refused([(LISTING.to_owned(), endless.clone())], &["too long", "16777216 bytes"]);
    let client = Client::new(
        &Mirror::start(HashMap::from([(file_path("config.json"), endless)])).address,
        None,
        timeouts(),
    );
    let id = ModelId::parse("org/name").unwrap();
    let mut sink = Vec::new();
    let e = client.unwrap().download(&id, COMMIT, "config.json", 1 << 20, |_| Ok(Some(&mut sink)));
    assert!(e.unwrap_err().to_string().contains("at most 1048576 bytes"));
    assert!(sink.len() <= 1 << 20);
}

#[test]
fn a_server_without_a_response_times_out() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", silent.local_addr().unwrap());
    let short = Duration::from_millis(300);
    let timeouts = Timeouts { connect: short, read: short, body: short };
    let client = Client::new(&address, None, timeouts).unwrap();
    let start = std::time::Instant::now();
    let e = client.list(&ModelId::parse("org/name").unwrap()).unwrap_err().to_string();
    assert!(e.contains("cannot download") && e.contains("hint"), "{e}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn redirects_are_limited_and_do_not_get_the_token() {
    let to = |location: &str| {
        (format!("302 Found\r\nLocation: {location}\r\nContent-Length: 0"), Vec::new())
    };
    refused([(LISTING.to_owned(), to(LISTING))], &["too many redirects", "at most 5"]);
    for bad in ["", "ftp://127.0.0.1/x", "file:///etc/passwd", "//host/x", "http://a@127.0.0.1/"] {
        refused([(LISTING.to_owned(), to(bad))], &["an invalid address"]);
    }
    let other = Mirror::start(HashMap::from([("/w".to_owned(), ok("", b"weights"))]));
    let mut answers = valid_responses();
    let (head, _) = &answers[&file_path("model.safetensors")];
    let head = head.replace("/cdn/w?sig=1", &format!("{}/w", other.address));
    answers.insert(file_path("model.safetensors"), (head, Vec::new()));
    let mirror = Mirror::start(answers);
    let (_dir, found) = fetch(&mirror, Some("hf_secret"));
    found.unwrap();
    let with_token = |requests: Vec<String>| {
        requests
            .iter()
            .filter(|r| r.to_lowercase().contains("authorization: bearer hf_secret"))
            .count()
    };
    assert_eq!(with_token(mirror.requests()), mirror.requests().len());
    assert_eq!((with_token(other.requests()), other.requests().len()), (0, 1));
}

#[test]
fn refusals_have_a_hint() {
    let status = |status: &str, body: &[u8]| {
        let head = format!("{status}\r\nRetry-After: 17\r\nContent-Length: {}", body.len());
        (LISTING.to_owned(), (head, body.to_vec()))
    };
    refused([status("401 Unauthorized", b"")], &["401", "private or gated", "set HF_TOKEN"]);
    refused([status("403 Forbidden", b"\x1b[31mno")], &["403", "private or gated"]);
    refused([status("404 Not Found", b"")], &["404", "spelling", "revision `main`"]);
    refused([status("429 Too Many Requests", b"")], &["429", "wait 17 seconds"]);
    refused([status("503 Service Unavailable", &[b'x'; 9999])], &["503", "try again later"]);
    refused([(LISTING.to_owned(), ok("", b"<html>"))], &["list of files is not valid"]);
    let empty = listing(&["config.json", "tokenizer.json"], COMMIT);
    refused([(LISTING.to_owned(), empty)], &["not a usable model", "2 files"]);
}

#[test]
fn a_compressed_response_is_read() {
    // `{}`, by gzip.
    let small: &[u8] =
        &[31, 139, 8, 0, 0, 0, 0, 0, 2, 3, 171, 174, 5, 0, 67, 191, 166, 163, 2, 0, 0, 0];
    let mut answers = valid_responses();
    let headers = "\r\nContent-Encoding: gzip\r\nETag: \"c0\"";
    answers.insert(file_path("config.json"), ok(headers, small));
    let (_dir, found) = fetch(&Mirror::start(answers), None);
    assert_eq!(fs::read(found.unwrap().join("config.json")).unwrap(), b"{}");
}

#[test]
fn an_invalid_address_or_token_is_refused() {
    for endpoint in ["", "huggingface.co", "ftp://host", "http://", "http://u:p@host", "http://h?x"]
    {
        let e = Client::new(endpoint, None, timeouts()).err().unwrap().to_string();
        assert!(e.contains("HF_ENDPOINT"), "{endpoint}: {e}");
    }
    let e = Client::new("https://host", Some("a\r\nb".into()), timeouts()).err().unwrap();
    assert!(e.to_string().contains("HF_TOKEN") && !e.to_string().contains("a\r"), "{e}");
}

/// A cache in the layout of the Hub's tools, with copies instead of links.
fn cache(files: &[&str], index: &str) -> (tempfile::TempDir, RepoCache) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("models--org--name");
    let snapshot = model.join("snapshots").join(COMMIT);
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir_all(model.join("refs")).unwrap();
    fs::write(model.join("refs/main"), COMMIT).unwrap();
    for name in files {
        fs::write(snapshot.join(name), index).unwrap();
    }
    let repo = RepoCache::new(dir.path(), &ModelId::parse("org/name").unwrap());
    (dir, repo)
}

#[test]
fn a_snapshot_is_complete_with_all_its_shards() {
    let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
    let mut files = vec!["config.json", "tokenizer.json", INDEX_FILE, "m-1.safetensors"];
    let (dir, repo) = cache(&files, index);
    let complete = |repo: &RepoCache, files| complete_snapshot(repo, COMMIT, files);
    assert_eq!(complete(&repo, Files::All).unwrap(), None);
    assert!(complete(&repo, Files::BesideWeights).unwrap().is_some());
    drop(dir);
    files.push("m-2.safetensors");
    let (dir, repo) = cache(&files, index);
    let snapshot = dir.path().join("models--org--name/snapshots").join(COMMIT);
    assert_eq!(complete(&repo, Files::All).unwrap(), Some(snapshot.clone()));
    assert_eq!(resolve("org/name", Some(dir.path())).unwrap(), snapshot);
    let (_dir, repo) = cache(&files, r#"{"weight_map": {"a": "../m.safetensors"}}"#);
    assert!(complete(&repo, Files::All).is_err());
}

#[test]
fn an_invalid_reference_is_not_used() {
    let (dir, repo) = cache(&["config.json", "tokenizer.json", WEIGHTS_FILE], "{}");
    assert_eq!(repo.commit().as_deref(), Some(COMMIT));
    for bad in ["../../..", "main", "", "abc"] {
        fs::write(dir.path().join("models--org--name/refs/main"), bad).unwrap();
        assert_eq!(repo.commit(), None, "{bad}");
    }
}

#[test]
fn a_folder_takes_precedence_and_a_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert_eq!(resolve(path, None).unwrap(), dir.path());
    let file = dir.path().join("model.safetensors");
    fs::write(&file, "").unwrap();
    let e = resolve(file.to_str().unwrap(), None).unwrap_err();
    assert!(e.to_string().contains("not a folder"), "{e}");
}

#[test]
fn a_misspelt_path_is_not_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let e = resolve("src/no-such-model", Some(dir.path())).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::Argument);
    assert!(e.to_string().starts_with("src/no-such-model: there is no such model folder"), "{e}");
}

proptest! {
    #[test]
    fn no_index_panics(text in any::<String>()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(INDEX_FILE);
        fs::write(&path, text).unwrap();
        let _ = shards(&path);
    }
}
