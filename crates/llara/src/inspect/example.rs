//! Examples of findings, while the data is read: the first few of each kind.

use super::record::{Place, Side};

/// The number of examples of each kind that are kept.
const MAX_EXAMPLES: usize = 5;

/// What an example is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    /// The row.
    Row,
    /// Its query.
    Query,
    /// The passage with this index in its list.
    Passage(Side, usize),
    /// The passage with this hash.
    Hash(Side, u128),
}

/// One occurrence of a finding.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Example {
    /// The row.
    pub(super) place: Place,
    pub(super) subject: Subject,
    /// The other row of a pair.
    pub(super) other: Option<Place>,
    /// What was found.
    pub(super) detail: Option<String>,
}

impl Example {
    pub(super) fn new(place: Place, subject: Subject) -> Self {
        Example { place, subject, other: None, detail: None }
    }

    pub(super) fn with(self, other: Place) -> Self {
        Example { other: Some(other), ..self }
    }

    pub(super) fn detail(self, detail: String) -> Self {
        Example { detail: Some(detail), ..self }
    }
}

/// How often something was found, and the first examples in the order of the data.
#[derive(Debug, Clone, Default)]
pub(super) struct Found {
    pub(super) count: u64,
    /// Ascending.
    pub(super) examples: Vec<Example>,
}

impl Found {
    /// Counts an occurrence.
    pub(super) fn add(&mut self, example: Example) {
        self.count += 1;
        self.keep(example);
    }

    /// Keeps an example that is counted separately.
    pub(super) fn keep(&mut self, example: Example) {
        let at = self.examples.partition_point(|kept| *kept < example);
        if at < MAX_EXAMPLES {
            self.examples.insert(at, example);
            self.examples.truncate(MAX_EXAMPLES);
        }
    }

    pub(super) fn merge(&mut self, other: Found) {
        self.count += other.count;
        other.examples.into_iter().for_each(|example| self.keep(example));
    }
}
