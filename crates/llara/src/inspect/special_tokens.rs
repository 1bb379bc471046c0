//! Special tokens inside texts: the tokenizer would read them as the tokens themselves.

use std::collections::BTreeMap;

use aho_corasick::{AhoCorasick, MatchKind};

use crate::{Error, ErrorKind, Result};

/// Finds special tokens in texts.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    tokens: Vec<String>,
    /// `None` without tokens.
    search: Option<AhoCorasick>,
}

impl SpecialTokens {
    /// A search for `tokens`; empty ones are ignored.
    ///
    /// # Errors
    /// The tokens are too many or too long.
    pub(super) fn new(tokens: &[String]) -> Result<Self> {
        let tokens: Vec<String> =
            tokens.iter().filter(|token| !token.is_empty()).cloned().collect();
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&tokens);
        let search = (!tokens.is_empty()).then(build).transpose().map_err(|e| {
            Error::new(ErrorKind::Tokenizer, "cannot search for the special tokens").because(e)
        })?;
        Ok(SpecialTokens { tokens, search })
    }

    /// The first token in `text`. Adds 1 to the number of texts of every token that it contains.
    pub(super) fn find(&self, text: &str, texts: &mut BTreeMap<String, u64>) -> Option<&str> {
        let search = self.search.as_ref()?;
        let mut found: Vec<usize> = Vec::new();
        for occurrence in search.find_iter(text) {
            let token = occurrence.pattern().as_usize();
            if !found.contains(&token) {
                found.push(token);
            }
        }
        for &token in &found {
            match texts.get_mut(&self.tokens[token]) {
                Some(count) => *count += 1,
                None => drop(texts.insert(self.tokens[token].clone(), 1)),
            }
        }
        found.first().map(|&token| self.tokens[token].as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_counts_once_per_text() {
        let tokens = ["<s1>", "<s", "", "</s>"].map(String::from);
        let search = SpecialTokens::new(&tokens).unwrap();
        let mut texts = BTreeMap::new();
        assert_eq!(search.find("a <s1> b <s1></s>", &mut texts), Some("<s1>"));
        assert_eq!(search.find("a <s> b", &mut texts), Some("<s"));
        assert_eq!(search.find("a < s1 >", &mut texts), None);
        let counts: Vec<_> = texts.iter().map(|(token, n)| (token.as_str(), *n)).collect();
        assert_eq!(counts, [("</s>", 1), ("<s", 1), ("<s1>", 1)]);
        assert_eq!(SpecialTokens::new(&[]).unwrap().find("<s1>", &mut texts), None);
    }
}
