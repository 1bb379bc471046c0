//! The environment variables of the Hub's tools: cache, token, server.

use std::env;
use std::path::{Path, PathBuf};

use crate::{Error, ErrorKind, Result};

/// The default of `HF_ENDPOINT`.
const HUB: &str = "https://huggingface.co";

/// The folder of the cache: `given`, `HF_HUB_CACHE`, `HF_HOME/hub` or `~/.cache/huggingface/hub`.
pub(super) fn cache_folder(given: Option<&Path>) -> Result<PathBuf> {
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

/// `HF_ENDPOINT`, or the Hub itself, without a slash at the end.
pub(super) fn endpoint() -> String {
    variable("HF_ENDPOINT").unwrap_or_else(|| HUB.to_owned()).trim_end_matches('/').to_owned()
}

/// `HF_TOKEN`, or the token that the Hub's tools store at login.
pub(super) fn token() -> Option<String> {
    let stored = || {
        let path = hub_home()?.join("token");
        let bytes = crate::storage::read_limited(&path, "read the token", 1 << 16).ok()?;
        String::from_utf8(bytes).ok()
    };
    let token = variable("HF_TOKEN").or_else(stored)?;
    Some(token.trim().to_owned()).filter(|token| !token.is_empty())
}

/// Whether `HF_HUB_OFFLINE` forbids the network.
pub(super) fn is_offline() -> bool {
    let on = |v: String| ["1", "on", "yes", "true"].contains(&&*v.to_ascii_lowercase());
    variable("HF_HUB_OFFLINE").is_some_and(on)
}

/// `HF_HOME`, or the default of the Hub's tools.
fn hub_home() -> Option<PathBuf> {
    let default = || Some(env::home_dir()?.join(".cache/huggingface"));
    variable("HF_HOME").map(PathBuf::from).or_else(default)
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}
