//! Stop words: frequent words that say little about a text. Pretraining can leave them out of its targets.

use std::collections::HashSet;
use std::path::Path;

use crate::storage::{Fingerprint, read_text_file};
use crate::{Error, ErrorKind, Result};

/// Largest file of stop words that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

/// English words with a grammatical function: articles, pronouns, prepositions, conjunctions, auxiliary verbs and a
/// few adverbs. A word with an apostrophe is listed as its parts, because words are split there.
const ENGLISH: &str = "\
a about above after again against all am an and any are aren as at be because been before being below between both \
but by can cannot could couldn d did didn do does doesn doing don down during each either else every few for from \
further had hadn has hasn have haven having he her here hers herself him himself his how i if in into is isn it its \
itself just let ll m may me might more most must mustn my myself neither no nor not now of off on once only onto or \
other others ought our ours ourselves out over own per quite rather re s same shall shan she should shouldn since so \
some such t than that the their theirs them themselves then there these they this those though through thus to too \
toward under until up upon us ve very via was wasn we were weren what when where whether which while who whom whose \
why will with within without won would wouldn yet you your yours yourself yourselves";

/// A set of words, compared in lower case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StopWords {
    words: HashSet<String>,
}

impl StopWords {
    /// The built-in list of English words.
    pub fn english() -> Self {
        StopWords { words: ENGLISH.split_whitespace().map(str::to_owned).collect() }
    }

    /// These words.
    pub fn new(words: impl IntoIterator<Item: AsRef<str>>) -> Self {
        StopWords { words: words.into_iter().map(|word| word.as_ref().to_lowercase()).collect() }
    }

    /// Reads a UTF-8 file with one word per line. Blank lines are ignored.
    ///
    /// # Errors
    /// The file cannot be read, is not UTF-8, or has no word.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = read_text_file(path, "read the stop words", MAX_BYTES)?;
        let words = text.trim_start_matches('\u{feff}').lines().map(str::trim);
        let words = Self::new(words.filter(|word| !word.is_empty()));
        match words.words.is_empty() {
            true => Err(Error::new(ErrorKind::Data, "the file has no stop words")
                .file(path)
                .expected("one word per line")),
            false => Ok(words),
        }
    }

    /// The words of a text that are not stop words, joined by blanks. A word is a run of letters and digits; all
    /// other characters separate words.
    ///
    /// ```
    /// # use llara::text::StopWords;
    /// let text = "It isn't the bell_tower, but A CLOCK!";
    /// assert_eq!(StopWords::english().removed_from(text), "bell tower CLOCK");
    /// ```
    pub fn removed_from(&self, text: &str) -> String {
        let words = text.split(|c: char| !c.is_alphanumeric());
        let kept = words
            .filter(|word| !word.is_empty() && !self.words.contains(word.to_lowercase().as_str()));
        kept.collect::<Vec<_>>().join(" ")
    }

    /// A hash of the words, the same on every machine.
    pub fn fingerprint(&self) -> u64 {
        let mut words: Vec<&String> = self.words.iter().collect();
        words.sort();
        let mut fingerprint = Fingerprint::new();
        words.iter().for_each(|word| fingerprint.add(word.as_bytes()));
        fingerprint.short()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_compared_in_lower_case_and_split_at_other_characters() {
        let words = StopWords::new(["Der", "und"]);
        assert_eq!(words.removed_from("der Fuß_UND die 3 Über-Füße\t!"), "Fuß die 3 Über Füße");
        assert_eq!(words.removed_from(" und, DER ... "), "");
    }

    #[test]
    fn files_have_one_word_per_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words.txt");
        std::fs::write(&path, "\u{feff}The\r\n\n of \n").unwrap();
        let words = StopWords::from_file(&path).unwrap();
        assert_eq!(words, StopWords::new(["the", "of"]));
        assert_eq!(words.fingerprint(), StopWords::new(["of", "the"]).fingerprint());
        assert_ne!(words.fingerprint(), StopWords::new(["of"]).fingerprint());
        std::fs::write(&path, " \n").unwrap();
        assert!(StopWords::from_file(&path).unwrap_err().to_string().contains("no stop words"));
    }
}
