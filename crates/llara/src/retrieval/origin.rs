//! The inputs that determine the embeddings of a file, so that a later run can check whether it would
//! compute the same.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::lines::excerpt;
use crate::storage::Fingerprint;

/// Named values that determine every bit of a file of embeddings: texts, weights, settings.
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
    /// An origin without values.
    pub fn new() -> Self {
        Origin::default()
    }

    /// Adds a value.
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.0.insert(name.to_owned(), value.into());
        self
    }

    /// Adds the hash of texts.
    #[must_use]
    pub fn with_texts<'t>(self, name: &str, texts: impl Iterator<Item = &'t str>) -> Self {
        let mut fingerprint = Fingerprint::new();
        for text in texts {
            fingerprint.add(text.as_bytes());
            fingerprint.add(b"\0");
        }
        self.with_fingerprint(name, &fingerprint)
    }

    /// A hash of all values, for comparing processes.
    pub fn hash(&self) -> u64 {
        let mut fingerprint = Fingerprint::new();
        for (name, value) in &self.0 {
            fingerprint.add(format!("{name}={value}\n").as_bytes());
        }
        fingerprint.short()
    }

    /// Adds the hash of data that is too large to be stored.
    pub(super) fn with_fingerprint(self, name: &str, fingerprint: &Fingerprint) -> Self {
        self.with(name, fingerprint.to_string())
    }

    /// The values that differ between this origin and an `earlier` one.
    pub(super) fn differences<'o>(&'o self, earlier: &'o Origin) -> Vec<Difference<'o>> {
        let removed = earlier.0.keys().filter(|name| !self.0.contains_key(*name));
        let names = self.0.keys().chain(removed);
        names
            .map(|name| Difference { name, now: self.0.get(name), before: earlier.0.get(name) })
            .filter(|difference| difference.now != difference.before)
            .collect()
    }
}

/// A value that differs between two origins.
pub(super) struct Difference<'o> {
    name: &'o str,
    now: Option<&'o Value>,
    before: Option<&'o Value>,
}

impl Difference<'_> {
    /// Name and value in the present run.
    pub(super) fn now(&self) -> impl fmt::Display {
        self.describe(self.now)
    }

    /// Name and value in the earlier run.
    pub(super) fn before(&self) -> impl fmt::Display {
        self.describe(self.before)
    }

    fn describe(&self, value: Option<&Value>) -> String {
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
    fn differences_have_the_name_and_both_values() {
        let before = Origin::new().with("role", "query").with("max_len", 32).with("old", true);
        let now = Origin::new().with("max_len", 64).with("role", "query").with("new", 1);
        let differences = now.differences(&before);
        let shown: Vec<String> =
            differences.iter().map(|d| format!("{} | {}", d.now(), d.before())).collect();
        assert_eq!(shown, ["max_len 64 | max_len 32", "new 1 | no new", "no old | old true"]);
        assert!(now.differences(&now.clone()).is_empty());
    }

    #[test]
    fn json_round_trip() {
        let origin = Origin::new().with("role", "query").with("max_len", 32);
        let json = serde_json::to_string(&origin).unwrap();
        assert_eq!(json, r#"{"role":"query","max_len":32}"#);
        assert_eq!(serde_json::from_str::<Origin>(&json).unwrap(), origin);
    }
}
