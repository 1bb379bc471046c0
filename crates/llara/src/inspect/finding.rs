//! The kinds of findings, each with its name on the command line and in the report.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind};

/// A kind of finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Finding {
    /// A row that cannot be used for training.
    MalformedRows,
    /// A text without a letter or a digit. A malformed row with such a text counts, too.
    EmptyTexts,
    /// A text of one word.
    OneWordTexts,
    /// A row with the query, `prompt`, positives and negatives of an earlier row, in the same order.
    DuplicateRows,
    /// A row with the query and the `prompt` of an earlier row.
    DuplicateQueries,
    /// A passage of a row that is also a passage of an earlier row.
    DuplicatePassages,
    /// A passage that occurs again in the same list, `pos` or `neg`, of its row.
    DuplicatePassagesInRow,
    /// A row whose query and positives together nearly equal those of an earlier row.
    NearDuplicateRows,
    /// A query that nearly equals an earlier one.
    NearDuplicateQueries,
    /// A passage that nearly equals an earlier one.
    NearDuplicatePassages,
    /// A negative that is a positive of its own row.
    PositiveInNegatives,
    /// A negative that is a positive of another row with the same query and `prompt`.
    PositiveInNegativesOfEqualQuery,
    /// A negative that is a positive of a row with another query. This is common and not an error in itself.
    PositiveInNegativesOfOtherQuery,
    /// A row without negatives, although the group size is 2 or more.
    NoNegatives,
    /// A row with negatives, but fewer than a group needs: they are repeated.
    FewNegatives,
    /// A text that contains a special token of the template or the tokenizer.
    SpecialTokens,
    /// A query that is longer than its maximum length.
    TruncatedQueries,
    /// A passage that is longer than its maximum length.
    TruncatedPassages,
}

impl Finding {
    /// All kinds.
    pub const ALL: [Finding; 18] = [
        Finding::MalformedRows,
        Finding::EmptyTexts,
        Finding::OneWordTexts,
        Finding::DuplicateRows,
        Finding::DuplicateQueries,
        Finding::DuplicatePassages,
        Finding::DuplicatePassagesInRow,
        Finding::NearDuplicateRows,
        Finding::NearDuplicateQueries,
        Finding::NearDuplicatePassages,
        Finding::PositiveInNegatives,
        Finding::PositiveInNegativesOfEqualQuery,
        Finding::PositiveInNegativesOfOtherQuery,
        Finding::NoNegatives,
        Finding::FewNegatives,
        Finding::SpecialTokens,
        Finding::TruncatedQueries,
        Finding::TruncatedPassages,
    ];

    /// The name, such as `duplicate-rows`.
    pub fn name(self) -> &'static str {
        match self {
            Finding::MalformedRows => "malformed-rows",
            Finding::EmptyTexts => "empty-texts",
            Finding::OneWordTexts => "one-word-texts",
            Finding::DuplicateRows => "duplicate-rows",
            Finding::DuplicateQueries => "duplicate-queries",
            Finding::DuplicatePassages => "duplicate-passages",
            Finding::DuplicatePassagesInRow => "duplicate-passages-in-row",
            Finding::NearDuplicateRows => "near-duplicate-rows",
            Finding::NearDuplicateQueries => "near-duplicate-queries",
            Finding::NearDuplicatePassages => "near-duplicate-passages",
            Finding::PositiveInNegatives => "positive-in-negatives",
            Finding::PositiveInNegativesOfEqualQuery => "positive-in-negatives-of-equal-query",
            Finding::PositiveInNegativesOfOtherQuery => "positive-in-negatives-of-other-query",
            Finding::NoNegatives => "no-negatives",
            Finding::FewNegatives => "few-negatives",
            Finding::SpecialTokens => "special-tokens",
            Finding::TruncatedQueries => "truncated-queries",
            Finding::TruncatedPassages => "truncated-passages",
        }
    }

    /// What is counted, in one line.
    pub fn description(self) -> &'static str {
        match self {
            Finding::MalformedRows => "rows that cannot be used",
            Finding::EmptyTexts => "texts without a letter or digit",
            Finding::OneWordTexts => "texts of one word",
            Finding::DuplicateRows => "rows equal to an earlier row",
            Finding::DuplicateQueries => "rows with the query of an earlier row",
            Finding::DuplicatePassages => "passages that an earlier row has, too",
            Finding::DuplicatePassagesInRow => "passages repeated in the same list of a row",
            Finding::NearDuplicateRows => {
                "rows nearly equal to an earlier row (query and positives)"
            }
            Finding::NearDuplicateQueries => "queries nearly equal to an earlier one",
            Finding::NearDuplicatePassages => "passages nearly equal to an earlier one",
            Finding::PositiveInNegatives => "negatives that are a positive of their row",
            Finding::PositiveInNegativesOfEqualQuery => {
                "negatives that are a positive of another row with the same query"
            }
            Finding::PositiveInNegativesOfOtherQuery => {
                "negatives that are a positive of a row with another query"
            }
            Finding::NoNegatives => "rows without negatives, which the group size requires",
            Finding::FewNegatives => "rows whose negatives are repeated to fill a group",
            Finding::SpecialTokens => "texts that contain a special token",
            Finding::TruncatedQueries => "queries longer than the maximum length",
            Finding::TruncatedPassages => "passages longer than the maximum length",
        }
    }

    /// Whether the finding needs a tokenizer.
    pub fn needs_tokenizer(self) -> bool {
        matches!(self, Finding::TruncatedQueries | Finding::TruncatedPassages)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Finding {
    type Err = Error;

    /// The kind of this name.
    fn from_str(name: &str) -> Result<Self, Error> {
        Finding::ALL.into_iter().find(|finding| finding.name() == name).ok_or_else(|| {
            let names: Vec<&str> = Finding::ALL.iter().map(|finding| finding.name()).collect();
            Error::new(ErrorKind::Argument, format!("there is no finding `{name}`"))
                .expected(format!("one of {}", names.join(", ")))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_different_and_parsed() {
        for (i, finding) in Finding::ALL.into_iter().enumerate() {
            assert_eq!(finding.name().parse::<Finding>().unwrap(), finding);
            // Reports have an array with one entry for each kind.
            assert_eq!(finding as usize, i);
        }
        let e = "duplicates".parse::<Finding>().unwrap_err().to_string();
        assert!(e.contains("duplicate-rows"), "{e}");
    }
}
