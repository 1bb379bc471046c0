//! Resolves a model's name to a local folder: a path, or a snapshot in the cache of the Hugging Face Hub,
//! into which missing files are downloaded.
//!
//! The environment variables are those of the Hub's own tools: `HF_HOME` and `HF_HUB_CACHE` (the location of
//! the cache), `HF_TOKEN` (for private and gated models), `HF_ENDPOINT` (a mirror) and `HF_HUB_OFFLINE` (use
//! only the cache).
//!
//! The server is not trusted. Every name that it sends is checked before it becomes part of a path, and every
//! length before memory or disk space is used for it. Contents are compared with the SHA-256 that the server
//! announced.

mod cache;
mod client;
mod names;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use self::cache::RepoCache;
use self::client::{Client, Listing, Timeouts};
use self::names::ModelId;
use crate::storage::{INDEX_FILE, WEIGHTS_FILE, read_limited};
use crate::{Error, ErrorKind, Result};

/// Files other than the weights; not every model has all of them. They are downloaded before the weights, so
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

/// Largest weight file, in bytes.
const MAX_WEIGHT_BYTES: u64 = 1 << 40;
/// Largest other file.
const MAX_OTHER_BYTES: u64 = 512 << 20;
/// Largest index of shards.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The folder of `model`. If `model` is the path of a folder, the result is that path. If it has the form
/// `org/name` or `org/name@revision`, the result is the snapshot in the Hub's cache, into which missing files
/// are downloaded. The revision is a branch, a tag or a commit; the default is `main`. A complete snapshot is
/// used without network access. Nothing is downloaded if the current folder has a folder `org`, because then
/// `model` is probably a misspelt path. `cache_dir` is the cache; the default is `HF_HUB_CACHE`,
/// `HF_HOME/hub` or `~/.cache/huggingface/hub`.
///
/// # Errors
/// [`ErrorKind::Argument`]: `model` is neither a folder nor a model id; [`ErrorKind::Io`]: the model is not
/// in the cache and cannot be downloaded.
pub fn resolve(model: &str, cache_dir: Option<&Path>) -> Result<PathBuf> {
    resolve_with(model, cache_dir, &mut |_| ())
}

/// Like [`resolve`]; calls `on_fetch` with the name of each file before it is downloaded.
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

/// Like [`resolve_with`], but without the weights: the folder has at least `config.json` and
/// `tokenizer.json`.
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

/// The name on the Hub, `org/name`, of a model that is given as it is for [`resolve`]; `None` for a folder, and
/// for a revision other than `main`, which the name does not denote.
///
/// ```
/// # use llara::hub::model_name;
/// assert_eq!(model_name("org/name@main").as_deref(), Some("org/name"));
/// assert_eq!(model_name("org/name@v2"), None);
/// assert_eq!(model_name("/models/mine"), None);
/// ```
pub fn model_name(model: &str) -> Option<String> {
    if Path::new(model).is_dir() {
        return None;
    }
    let id = ModelId::parse(model)?;
    (id.revision == "main").then(|| id.path())
}

/// Which files of a model are needed.
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
            .hint("give the folder that contains config.json, tokenizer.json and the weights"));
    }
    let Some(id) = ModelId::parse(model) else {
        return Err(Error::new(ErrorKind::Argument, "there is no such model folder").file(path).hint(
            "check the path; models of the Hugging Face Hub are named org/name or org/name@revision",
        ));
    };
    let folder = settings::cache_folder(cache_dir)?;
    let cache = RepoCache::new(&folder, &id);
    if let Some(commit) = cache.commit()
        && let Some(snapshot) = complete_snapshot(&cache, &commit, files)?
    {
        return Ok(snapshot);
    }
    // `models/mine` has the form of a model id, but if there is a folder `models`, it is a misspelt path.
    if Path::new(&id.org).is_dir() {
        return Err(Error::new(ErrorKind::Argument, "there is no such model folder")
            .file(path)
            .hint(format!(
                "check the path; to download `{}` from the Hub, run in a folder without a folder `{}`",
                id.path(),
                id.org
            )));
    }
    if settings::is_offline() {
        return Err(Error::new(
            ErrorKind::Io,
            format!("there is no folder `{model}`, and the model `{model}` is not in the cache"),
        )
        .file(&folder)
        .expected(format!("config.json, tokenizer.json and the weights of `{model}`"))
        .got("HF_HUB_OFFLINE is set, so nothing is downloaded")
        .hint("download the model once without HF_HUB_OFFLINE, or give a folder"));
    }
    let timeouts = Timeouts::default();
    let client = Client::new(&settings::endpoint(), settings::token(), timeouts)?;
    fetch_model(&client, &id, &cache, files, on_fetch)
}

/// Downloads the files of a model that are not in the cache yet.
fn fetch_model(
    client: &Client,
    id: &ModelId,
    cache: &RepoCache,
    files: Files,
    on_fetch: &mut dyn FnMut(&str),
) -> Result<PathBuf> {
    let Listing { commit, files: listed } = client.list(id)?;
    let listed: BTreeSet<String> = listed.into_iter().collect();
    let mut fetch = |name: &str| match cache.file(&commit, name) {
        Some(path) => Ok(path),
        None => {
            on_fetch(name);
            fetch_file(client, id, cache, &commit, name)
        }
    };
    for name in BESIDE_WEIGHTS.into_iter().filter(|&name| listed.contains(name)) {
        fetch(name)?;
    }
    if files == Files::BesideWeights {
        // Nothing more.
    } else if listed.contains(WEIGHTS_FILE) {
        fetch(WEIGHTS_FILE)?;
    } else if listed.contains(INDEX_FILE) {
        let index = fetch(INDEX_FILE)?;
        for shard in shards(&index)? {
            if !listed.contains(&shard) {
                return Err(Error::new(ErrorKind::Weights, "the index lists a missing shard")
                    .file(&index)
                    .expected(format!("a file of `{}`", id.path()))
                    .got(names::quote(&shard)));
            }
            fetch(&shard)?;
        }
    }
    let Some(snapshot) = complete_snapshot(cache, &commit, files)? else {
        let shown: Vec<String> = listed.iter().take(30).map(|name| names::quote(name)).collect();
        return Err(Error::new(ErrorKind::Io, format!("`{}` is not a usable model", id.path()))
            .expected(format!("config.json, tokenizer.json, and {WEIGHTS_FILE} or shards"))
            .got(format!("{} files: {}", listed.len(), shown.join(", ")))
            .hint("convert it with transformers: save_pretrained of model and tokenizer"));
    };
    // Last: until then the revision refers to the commit that was downloaded before.
    cache.write_commit(&commit)?;
    Ok(snapshot)
}

/// Downloads one file into the cache, unless the cache has its blob already.
fn fetch_file(
    client: &Client,
    id: &ModelId,
    cache: &RepoCache,
    commit: &str,
    name: &str,
) -> Result<PathBuf> {
    names::repository_file(name)?;
    let limit = match name {
        INDEX_FILE => MAX_INDEX_BYTES,
        name if name.ends_with(".safetensors") => MAX_WEIGHT_BYTES,
        _ => MAX_OTHER_BYTES,
    };
    let mut blob = cache.new_blob()?;
    let mut needed = true;
    let head = client.download(id, commit, name, limit, |head| {
        needed = !head.length.is_some_and(|length| cache.has_blob(&head.etag, length));
        Ok(if needed { Some(blob.as_file_mut()) } else { None })
    })?;
    if needed {
        cache.keep_blob(blob, &head.etag)?;
    }
    cache.link(commit, name, &head.etag)
}

/// The snapshot folder, if it has all files that are needed to load the model.
fn complete_snapshot(cache: &RepoCache, commit: &str, files: Files) -> Result<Option<PathBuf>> {
    let file = |name: &str| cache.file(commit, name);
    if file("config.json").is_none() || file("tokenizer.json").is_none() {
        return Ok(None);
    }
    let weights = match (file(WEIGHTS_FILE), file(INDEX_FILE)) {
        _ if files == Files::BesideWeights => true,
        (Some(_), _) => true,
        (None, Some(index)) => shards(&index)?.iter().all(|shard| file(shard).is_some()),
        (None, None) => false,
    };
    Ok(weights.then(|| cache.snapshot(commit)))
}

/// The names of the shards in an index.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let text = read_limited(index, "read the index of shards", MAX_INDEX_BYTES)?;
    let json: Value = serde_json::from_slice(&text).map_err(|e| {
        Error::new(ErrorKind::Weights, "the index of shards is not valid JSON")
            .file(index)
            .because(e)
    })?;
    let names = json.get("weight_map").and_then(Value::as_object).into_iter().flatten();
    let names: BTreeSet<String> =
        names.filter_map(|(_, shard)| shard.as_str().map(str::to_owned)).collect();
    match names.iter().find(|name| !names::is_shard(name)) {
        Some(name) => {
            Err(Error::new(ErrorKind::Weights, "the index lists a shard outside the model folder")
                .file(index)
                .expected("the name of a .safetensors file, without a folder")
                .got(names::quote(name)))
        }
        None => Ok(names),
    }
}

/// Parses a server's list of files, for fuzzing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_listing(bytes: &[u8]) {
    if let Ok(listing) = client::parse_listing(bytes) {
        assert!(names::is_commit(&listing.commit));
        for file in listing.files {
            let path = Path::new(&file);
            assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
        }
    }
}
