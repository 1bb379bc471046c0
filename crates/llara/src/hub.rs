//! Where a model is: a folder of this machine, or the Hugging Face Hub and its local cache.
//!
//! The environment speaks as it does to the Hub's own tools: `HF_HOME` and `HF_HUB_CACHE` (where the
//! cache is), `HF_TOKEN` (for private and gated models), `HF_ENDPOINT` (a mirror) and
//! `HF_HUB_OFFLINE` (never ask the network).

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo};
use serde_json::Value;

use crate::{Error, ErrorKind, Result};

/// Files that go with the weights, where a model has them. They are fetched before the weights, so
/// that a cache with all weights has these too.
const BESIDE_WEIGHTS: [&str; 7] = [
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "llara.json",
    "llara_probes.json",
    "tokenizer.json",
    "config.json",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The folder of `model`: itself, if there is such a folder; otherwise, if it looks like `org/name`,
/// the snapshot in the Hub's cache, into which missing files are fetched. A complete snapshot is used
/// as it is, without the network; nothing is fetched where a folder `org` is here, since a path was
/// meant then. `cache_dir` is the cache; by default `HF_HUB_CACHE`, `HF_HOME/hub`
/// or `~/.cache/huggingface/hub`.
///
/// # Errors
/// [`ErrorKind::Argument`]: neither a folder nor a model id; [`ErrorKind::Io`]: the model is not in
/// the cache and cannot be fetched.
pub fn resolve(model: &str, cache_dir: Option<&Path>) -> Result<PathBuf> {
    resolve_with(model, cache_dir, &mut |_| ())
}

/// [`resolve`], telling `on_fetch` the name of each file before it is fetched.
///
/// # Errors
/// Those of [`resolve`].
pub fn resolve_with(
    model: &str,
    cache_dir: Option<&Path>,
    on_fetch: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    resolve_files(model, cache_dir, Files::All, on_fetch)
}

/// [`resolve_with`] without the weights: the folder has at least `config.json` and `tokenizer.json`.
///
/// # Errors
/// Those of [`resolve`].
pub fn resolve_outline_with(
    model: &str,
    cache_dir: Option<&Path>,
    on_fetch: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    resolve_files(model, cache_dir, Files::BesideWeights, on_fetch)
}

/// Which files of a model are wanted.
#[derive(Clone, Copy, PartialEq)]
enum Files {
    All,
    BesideWeights,
}

fn resolve_files(
    model: &str,
    cache_dir: Option<&Path>,
    files: Files,
    on_fetch: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if path.exists() {
        return Err(Error::new(ErrorKind::Argument, "the model is not a folder")
            .file(path)
            .hint("give the folder that holds config.json, tokenizer.json and the weights"));
    }
    if !is_model_id(model) {
        return Err(Error::new(ErrorKind::Argument, "there is no such model folder")
            .file(path)
            .hint("check the path; a model of the Hugging Face Hub is written org/name"));
    }
    let cache = Cache::new(cache_folder(cache_dir)?);
    let repo = Repo::model(model.to_owned());
    let cached = cache.repo(repo.clone());
    if let Some(snapshot) = complete_snapshot(&cached, files)? {
        return Ok(snapshot);
    }
    // `models/mine` is an id by its form, but beside a folder `models` it is a path with a slip.
    if let Some((parent, _)) = model.split_once('/')
        && Path::new(parent).is_dir()
    {
        return Err(Error::new(ErrorKind::Argument, "there is no such model folder")
            .file(path)
            .hint(format!(
                "check the path; a model of the Hub is fetched where no folder is called `{parent}`"
            )));
    }
    let nowhere = format!("there is no folder `{model}`, and");
    if is_set("HF_HUB_OFFLINE") {
        return Err(Error::new(
            ErrorKind::Io,
            format!("{nowhere} the model `{model}` is not in the cache"),
        )
        .file(cache.path())
        .expected(format!("config.json, tokenizer.json and the weights of `{model}`"))
        .got("HF_HUB_OFFLINE is set, so nothing is fetched")
        .hint("fetch the model once with the network, or give a folder"));
    }
    let failed = |what: String, source: ApiError| {
        Error::new(
            ErrorKind::Io,
            format!("{nowhere} {what} of `{model}` cannot be fetched from the Hub"),
        )
        .because(source)
        .hint("check the path, the name and the network; private and gated models need HF_TOKEN")
    };
    let mut builder = ApiBuilder::from_cache(cache).with_token(token()).with_progress(false);
    if let Ok(endpoint) = env::var("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    let api = builder.build().map_err(|e| failed("the list of files".into(), e))?.repo(repo);
    let listed = api.info().map_err(|e| failed("the list of files".into(), e))?;
    let listed: BTreeSet<String> = listed.siblings.into_iter().map(|s| s.rfilename).collect();
    let mut fetch =
        |name: &str| fetch(&api, &cached, name, on_fetch).map_err(|e| failed(name.into(), e));
    for name in BESIDE_WEIGHTS.into_iter().filter(|&name| listed.contains(name)) {
        fetch(name)?;
    }
    if files == Files::BesideWeights {
        // Nothing more.
    } else if listed.contains(SINGLE) {
        fetch(SINGLE)?;
    } else if listed.contains(INDEX) {
        for shard in shards(&fetch(INDEX)?)? {
            fetch(&shard)?;
        }
    }
    complete_snapshot(&cached, files)?.ok_or_else(|| {
        Error::new(ErrorKind::Io, format!("`{model}` is not a model that can be loaded"))
            .expected(format!("config.json, tokenizer.json, and {SINGLE} or shards"))
            .got(listed.into_iter().collect::<Vec<_>>().join(", "))
            .hint("convert it once with transformers: save_pretrained of model and tokenizer")
    })
}

fn fetch(
    api: &ApiRepo,
    cached: &CacheRepo,
    name: &str,
    on_fetch: &mut dyn FnMut(&str),
) -> Result<PathBuf, ApiError> {
    match cached.get(name) {
        Some(path) => Ok(path),
        None => {
            on_fetch(name);
            api.download(name)
        }
    }
}

/// The snapshot folder, once everything without which a model cannot be loaded is in it.
fn complete_snapshot(cached: &CacheRepo, files: Files) -> Result<Option<PathBuf>> {
    let (Some(config), Some(_)) = (cached.get("config.json"), cached.get("tokenizer.json")) else {
        return Ok(None);
    };
    let weights = match (cached.get(SINGLE), cached.get(INDEX)) {
        _ if files == Files::BesideWeights => true,
        (Some(_), _) => true,
        (None, Some(index)) => shards(&index)?.iter().all(|shard| cached.get(shard).is_some()),
        (None, None) => false,
    };
    Ok(config.parent().filter(|_| weights).map(Path::to_owned))
}

/// The names of the shards that an index speaks of. Whether they are safe to open is for the loader.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = std::fs::read(index).map_err(|e| Error::io("read the index of shards", index, e))?;
    let json: Value = serde_json::from_slice(&text).map_err(|e| {
        Error::new(ErrorKind::Weights, "not an index of shards").file(index).because(e)
    })?;
    let names = json.get("weight_map").and_then(Value::as_object).into_iter().flatten();
    let names: BTreeSet<String> =
        names.filter_map(|(_, shard)| shard.as_str().map(str::to_owned)).collect();
    match names.iter().find(|name| name.contains(['/', '\\']) || name.starts_with('.')) {
        Some(name) => Err(Error::new(ErrorKind::Weights, "a shard outside the model folder")
            .file(index)
            .expected("the plain name of a .safetensors file")
            .got(format!("{name:?}"))),
        None => Ok(names),
    }
}

/// `org/name`, in the characters that the Hub allows; anything else is meant as a path.
fn is_model_id(model: &str) -> bool {
    let valid = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && part.chars().all(allowed) && !part.starts_with(['-', '.'])
    };
    matches!(model.split('/').collect::<Vec<_>>()[..], [org, name] if valid(org) && valid(name))
}

fn cache_folder(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    if let Some(cache) = variable("HF_HUB_CACHE") {
        return Ok(cache.into());
    }
    Ok(hub_home()
        .ok_or_else(|| {
            Error::new(ErrorKind::Io, "there is no home folder for the Hub's cache")
                .hint("set HF_HOME, or give a cache folder")
        })?
        .join("hub"))
}

/// `HF_HOME`, or where the Hub's tools put it.
fn hub_home() -> Option<PathBuf> {
    let default = || Some(env::home_dir()?.join(".cache/huggingface"));
    variable("HF_HOME").map(PathBuf::from).or_else(default)
}

/// `HF_TOKEN`, or what logging in with the Hub's tools has stored.
fn token() -> Option<String> {
    let stored = || std::fs::read_to_string(hub_home()?.join("token")).ok();
    let token = variable("HF_TOKEN").or_else(stored)?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}

/// Whether a switch of the environment is on, as the Hub's tools read it.
fn is_set(name: &str) -> bool {
    variable(name).is_some_and(|v| ["1", "on", "yes", "true"].contains(&&*v.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A cache as the Hub's tools lay it out.
    fn cache(files: &[&str], index: &str) -> (tempfile::TempDir, CacheRepo) {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("models--org--name");
        let snapshot = model.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::write(model.join("refs/main"), "abc").unwrap();
        for name in files {
            std::fs::write(snapshot.join(name), index).unwrap();
        }
        let repo = Cache::new(dir.path().to_owned()).model("org/name".into());
        (dir, repo)
    }

    #[test]
    fn a_snapshot_is_complete_with_all_its_shards() {
        let index = r#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#;
        let mut files = vec!["config.json", "tokenizer.json", INDEX, "m-1.safetensors"];
        let (dir, repo) = cache(&files, index);
        assert_eq!(complete_snapshot(&repo, Files::All).unwrap(), None);
        assert!(complete_snapshot(&repo, Files::BesideWeights).unwrap().is_some());
        drop(dir);
        files.push("m-2.safetensors");
        let (dir, repo) = cache(&files, index);
        let snapshot = dir.path().join("models--org--name/snapshots/abc");
        assert_eq!(complete_snapshot(&repo, Files::All).unwrap(), Some(snapshot.clone()));
        assert_eq!(resolve("org/name", Some(dir.path())).unwrap(), snapshot);
        let (_dir, repo) = cache(&files, r#"{"weight_map": {"a": "../m.safetensors"}}"#);
        assert!(complete_snapshot(&repo, Files::All).is_err());
    }

    #[test]
    fn paths_are_not_model_ids() {
        for path in ["models", "./a", "../b", "/a/b", "a/b/c", "a/", "a b/c", "a/.b", ""] {
            assert!(!is_model_id(path), "{path}");
            let e = resolve(path, None);
            assert!(e.is_err() || Path::new(path).is_dir());
        }
        assert!(is_model_id("Qwen/Qwen3-Embedding-0.6B"));
    }

    #[test]
    fn a_folder_wins_and_a_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(resolve(path, None).unwrap(), dir.path());
        let file = dir.path().join("model.safetensors");
        std::fs::write(&file, "").unwrap();
        let e = resolve(file.to_str().unwrap(), None).unwrap_err();
        assert!(e.to_string().contains("not a folder"), "{e}");
    }

    #[test]
    fn a_slip_in_a_path_is_not_fetched() {
        let dir = tempfile::tempdir().unwrap();
        let e = resolve("src/no-such-model", Some(dir.path())).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Argument);
        assert!(
            e.to_string().starts_with("src/no-such-model: there is no such model folder"),
            "{e}"
        );
    }

    proptest! {
        #[test]
        fn no_index_panics(text in any::<String>()) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(INDEX);
            std::fs::write(&path, text).unwrap();
            let _ = shards(&path);
        }
    }
}
