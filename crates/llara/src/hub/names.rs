//! Checks of names from users and servers before they become part of a path or a URL.

use crate::{Error, ErrorKind, Result};

/// Longest name in a repository and longest revision, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// A model of the Hub: `org/name` or `org/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelId {
    pub(super) org: String,
    pub(super) name: String,
    /// A branch, a tag or a commit.
    pub(super) revision: String,
}

impl ModelId {
    /// `None` if the Hub does not allow the name; then it is a path.
    pub(super) fn parse(model: &str) -> Option<ModelId> {
        let (id, revision) = match model.split_once('@') {
            Some((id, revision)) => (id, revision),
            None => (model, "main"),
        };
        let (org, name) = id.split_once('/')?;
        let id = ModelId { org: org.into(), name: name.into(), revision: revision.into() };
        (is_plain(org) && is_plain(name) && is_revision(revision)).then_some(id)
    }

    /// `org/name`.
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.org, self.name)
    }
}

/// Whether a part of a name has only characters that the Hub allows.
fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !part.is_empty()
        && part.len() <= MAX_NAME_BYTES
        && part.chars().all(allowed)
        && !part.starts_with(['-', '.'])
        && !part.contains("..")
}

/// Whether this is a valid revision, which becomes a path below `refs/`: parts as in a name, separated by
/// single slashes.
fn is_revision(revision: &str) -> bool {
    revision.len() <= MAX_NAME_BYTES && revision.split('/').all(is_plain)
}

/// Whether this is the full hash of a commit: 40 lower-case hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(is_lower_hex)
}

/// Whether this is the SHA-256 of a file: 64 lower-case hexadecimal digits.
pub(super) fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(is_lower_hex)
}

fn is_lower_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// Checks a commit that a server sent.
pub(super) fn commit(text: &str) -> Result<&str> {
    if is_commit(text) {
        return Ok(text);
    }
    Err(invalid("an invalid commit hash", "40 hexadecimal digits", text))
}

/// The name of a blob from an `ETag` header: without the prefix of a weak one and without quotes.
pub(super) fn etag(header: &str) -> Result<&str> {
    let tag = header.trim();
    let tag = tag.strip_prefix("W/").unwrap_or(tag);
    let tag = tag.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(tag);
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    if (1..=128).contains(&tag.len()) && tag.bytes().all(allowed) {
        return Ok(tag);
    }
    Err(invalid(
        "an ETag that is not a valid file name",
        "1 to 128 letters, digits, `-`, `_`",
        header,
    ))
}

/// Checks a file name of a repository: relative, with `/` between parts, and inside the folder.
pub(super) fn repository_file(name: &str) -> Result<&str> {
    let part = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && part.len() <= MAX_NAME_BYTES
    };
    let forbidden = |c: char| c.is_control() || c == '\\' || c == ':';
    if name.len() <= 4096 && !name.contains(forbidden) && name.split('/').all(part) {
        return Ok(name);
    }
    Err(invalid(
        "a file name outside the folder of the model",
        "a relative path without `..`, empty parts or control characters",
        name,
    ))
}

/// Whether this can be the name of a shard: a `.safetensors` file in the model's folder.
pub(super) fn is_shard(name: &str) -> bool {
    is_plain(name) && name.ends_with(".safetensors")
}

fn invalid(what: &str, expected: &str, got: &str) -> Error {
    Error::new(ErrorKind::Io, format!("the server sent {what}"))
        .expected(expected)
        .got(quote(got))
        .hint("check HF_ENDPOINT: do not use this server unless you trust it")
}

/// A server's text for an error message: at most 100 characters, control characters escaped.
pub(super) fn quote(text: &str) -> String {
    let shown: String = text.chars().take(100).collect();
    let more = if shown.len() < text.len() { "…" } else { "" };
    format!("\"{}\"{more}", shown.escape_debug())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_are_not_model_ids() {
        for path in [
            "models",
            "./a",
            "../b",
            "/a/b",
            "a/b/c",
            "a/",
            "a b/c",
            "a/.b",
            "",
            "a/b@",
            "a/b@..",
            "a/b@/x",
            "a/b@x/../y",
            "a/b@x//y",
            "a/b@-x",
            "@main",
            "a/..b",
            "a/b..c",
            "a/b@x y",
        ] {
            assert_eq!(ModelId::parse(path), None, "{path}");
        }
        let id = ModelId::parse("Qwen/Qwen3-Embedding-0.6B").unwrap();
        assert_eq!(
            (id.path().as_str(), id.revision.as_str()),
            ("Qwen/Qwen3-Embedding-0.6B", "main")
        );
        assert_eq!(ModelId::parse("a/b@refs/pr/1").unwrap().revision, "refs/pr/1");
    }

    #[test]
    fn etags_become_file_names_or_errors() {
        for (header, tag) in [("\"ab12\"", "ab12"), ("W/\"a-_9\"", "a-_9"), ("x", "x")] {
            assert_eq!(etag(header).unwrap(), tag);
        }
        let long = "a".repeat(129);
        for bad in
            ["", "\"\"", "../../x", "\"../x\"", "a/b", "a\\b", ".", "a b", "W/", "\"a", &long]
        {
            let e = etag(bad).unwrap_err().to_string();
            assert!(e.contains("ETag") && e.contains("hint"), "{e}");
        }
    }

    #[test]
    fn commits_have_forty_digits() {
        let good = "0123456789abcdef0123456789abcdef01234567";
        assert_eq!(commit(good).unwrap(), good);
        for bad in ["", "main", "../../x", &good[1..], &good.to_uppercase(), "\u{1b}[31m"] {
            let e = commit(bad).unwrap_err().to_string();
            assert!(!e.contains('\u{1b}') && e.contains("40 hexadecimal"), "{e}");
        }
    }

    #[test]
    fn file_names_stay_below_the_folder() {
        for good in ["config.json", "onnx/model.onnx", ".gitattributes", "a b.txt", "..x"] {
            assert_eq!(repository_file(good).unwrap(), good);
        }
        let long = "a/".repeat(5000);
        for bad in
            ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "a\\b", "C:x", "a\nb", "\0", &long]
        {
            assert!(repository_file(bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn accepted_names_are_normal_components(name in "[./a\\\\:\\PC]{0,12}") {
            use std::path::{Component, Path};
            let normal = |name: &str| Path::new(name).components().all(|c| matches!(c, Component::Normal(_)));
            if let Ok(name) = repository_file(&name) {
                prop_assert!(normal(name));
            }
            if let Ok(name) = etag(&name) {
                prop_assert!(normal(name) && Path::new(name).components().count() == 1);
            }
            if let Some(id) = ModelId::parse(&name) {
                prop_assert!(normal(&id.org) && normal(&id.name) && normal(&id.revision));
            }
        }
    }
}
