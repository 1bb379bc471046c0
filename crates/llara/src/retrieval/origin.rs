//! What the vectors of a file follow from, so that a later run can tell whether it would make the
//! same.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::lines::excerpt;
use crate::storage::Fingerprint;

/// Named facts that decide every bit of a file of vectors: texts, weights, settings.
///
/// ```
/// use llara::retrieval::Origin;
///
/// let origin = Origin::new().with("role", "query").with("max_len", 32);
/// assert_eq!(origin, Origin::new().with("role", "query").with("max_len", 32));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Origin(Map<String, Value>);

impl Origin {
    /// Nothing yet.
    pub fn new() -> Self {
        Origin::default()
    }

    /// The same with one fact more.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    /// The same with the fingerprint of something too large to be written down.
    pub(super) fn with_fingerprint(self, name: &str, fingerprint: Fingerprint) -> Self {
        self.with(name, fingerprint.to_string())
    }

    /// The facts of both in which they differ.
    pub(super) fn differences<'o>(&'o self, other: &'o Origin) -> Vec<Difference<'o>> {
        let names = self.0.keys().chain(other.0.keys().filter(|name| !self.0.contains_key(*name)));
        names
            .map(|name| Difference { name, ours: self.0.get(name), theirs: other.0.get(name) })
            .filter(|difference| difference.ours != difference.theirs)
            .collect()
    }
}

/// One fact that is not the same.
pub(super) struct Difference<'o> {
    name: &'o str,
    ours: Option<&'o Value>,
    theirs: Option<&'o Value>,
}

impl Difference<'_> {
    /// As it is now.
    pub(super) fn now(&self) -> impl fmt::Display {
        self.shown(self.ours)
    }

    /// As it was when the file was begun.
    pub(super) fn then(&self) -> impl fmt::Display {
        self.shown(self.theirs)
    }

    fn shown(&self, value: Option<&Value>) -> String {
        match value {
            Some(value) => format!("{} {}", self.name, excerpt(&value.to_string())),
            None => format!("no {}", self.name),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_with_both_values() {
        let then = Origin::new().with("role", "query").with("max_len", 32).with("old", true);
        let now = Origin::new().with("max_len", 64).with("role", "query").with("new", 1);
        let differences = now.differences(&then);
        let shown: Vec<String> =
            differences.iter().map(|d| format!("{} | {}", d.now(), d.then())).collect();
        assert_eq!(shown, ["max_len 64 | max_len 32", "new 1 | no new", "no old | old true"]);
        assert!(now.differences(&now.clone()).is_empty());
    }

    #[test]
    fn it_comes_back_from_json() {
        let origin = Origin::new().with("role", "query").with("max_len", 32);
        let json = serde_json::to_string(&origin).unwrap();
        assert_eq!(json, r#"{"role":"query","max_len":32}"#);
        assert_eq!(serde_json::from_str::<Origin>(&json).unwrap(), origin);
    }
}
