//! From a row to the sequences that are encoded, with what each has to predict.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use super::options::PretrainingOptions;
use crate::data::{LONGEST_MEASURED, PretrainingRow};
use crate::text::{PromptEncoder, Role, StopWords};
use crate::{Error, ErrorKind, Result};

/// Which words the pooled tokens of a sequence predict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetObjective {
    /// Those of the text itself (EBAE).
    AutoEncode,
    /// Those of the following text (EBAR).
    AutoRegress,
}

/// A sequence and its targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingSequence {
    /// Prefix, text and suffix.
    pub ids: Vec<u32>,
    /// The positions whose ids are predicted by the hidden states of the positions before them; it does not start
    /// at 0. Empty where another sequence predicts the same text.
    pub labels: Range<usize>,
    /// What `targets` are.
    pub objective: SetObjective,
    /// The distinct ids that the pooled tokens predict together, ascending; may be empty.
    pub targets: Vec<u32>,
}

/// Encodes rows.
pub struct PretrainingEncoder {
    prompts: Arc<PromptEncoder>,
    /// Tokens of a text, without prefix and suffixes.
    text_tokens: usize,
    /// Tokens of a target text, without special tokens.
    target_tokens: usize,
    stop_words: Option<StopWords>,
    /// Ids that are never targets.
    special_ids: HashSet<u32>,
}

impl PretrainingEncoder {
    /// Prepares the template of `prompts`.
    ///
    /// # Errors
    /// A suffix is empty, prefix and suffix of queries equal those of passages, `cutoff_len` leaves no token for the text, or a setting is out
    /// of its range.
    pub fn new(prompts: Arc<PromptEncoder>, options: &PretrainingOptions) -> Result<Self> {
        options.weights.check()?;
        let template = prompts.template();
        let [(query_prefix, query_suffix), (passage_prefix, passage_suffix)] =
            [Role::Query, Role::Passage].map(|role| prompts.affixes(role));
        let unfit = |what: &str| {
            Error::new(ErrorKind::Argument, what)
                .expected("a template whose queries and passages differ and end in a suffix")
                .got(format!("template `{}`", template.name))
                .hint("use the template llara, or define one in a TOML file")
        };
        if query_suffix.is_empty() || passage_suffix.is_empty() {
            return Err(unfit("the template has no suffix from which words could be predicted"));
        }
        if query_suffix == passage_suffix && query_prefix == passage_prefix {
            return Err(unfit(
                "the template of queries equals that of passages: it cannot tell the text itself from the \
                 following one",
            ));
        }
        let prefix = query_prefix.len().max(passage_prefix.len());
        let affixes = prefix + query_suffix.len() + passage_suffix.len();
        if options.cutoff_len <= affixes {
            return Err(Error::new(ErrorKind::Argument, "the cutoff leaves no token for the text")
                .expected(format!(
                    "a cutoff of at least {}: prefix and both suffixes of template `{}` have {affixes} tokens",
                    affixes + 1,
                    template.name
                ))
                .got(format!("--cutoff-len {}", options.cutoff_len)));
        }
        let tokenizer = prompts.tokenizer();
        let (special, special_ids) = (tokenizer.added_special_tokens()?, tokenizer.special_ids());
        Ok(PretrainingEncoder {
            text_tokens: options.cutoff_len - affixes,
            target_tokens: options.cutoff_len.saturating_sub(special),
            stop_words: options.stop_words.clone(),
            special_ids,
            prompts,
        })
    }

    /// Tokens of a text, without prefix and suffixes.
    pub fn text_tokens(&self) -> usize {
        self.text_tokens
    }

    /// Number of pooled tokens of a sequence, which predict its targets.
    pub fn pooled_tokens(&self) -> usize {
        self.prompts.template().pooled_tokens
    }

    /// Number of tokens of a row's text before it is cut, without template, up to [`LONGEST_MEASURED`] or what is kept.
    ///
    /// # Errors
    /// As for [`encode`](Self::encode).
    pub fn length(&self, row: &PretrainingRow) -> Result<usize> {
        let most = LONGEST_MEASURED.max(self.text_tokens + 1);
        Ok(self.prompts.encode_text(&row.input, most)?.len())
    }

    /// The sequences of a row: the passage form, and the query form if there are targets for it. None if the text
    /// has no tokens.
    ///
    /// # Errors
    /// The tokenizer rejects a text, or a token is not in the model's vocabulary.
    pub fn encode(&self, row: &PretrainingRow) -> Result<Vec<TrainingSequence>> {
        let text = self.prompts.encode_text(&row.input, self.text_tokens)?;
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let sequence = |role, objective, target: &str| -> Result<TrainingSequence> {
            let (prefix, suffix) = self.prompts.affixes(role);
            let labels = match objective {
                SetObjective::AutoEncode => prefix.len().max(1)..prefix.len() + text.len(),
                SetObjective::AutoRegress => 0..0,
            };
            Ok(TrainingSequence {
                ids: [prefix, &text, suffix].concat(),
                labels,
                objective,
                targets: self.targets(target)?,
            })
        };
        let passage = sequence(Role::Passage, SetObjective::AutoEncode, &row.summary)?;
        let query = sequence(Role::Query, SetObjective::AutoRegress, &row.next)?;
        let has_targets = |sequence: &TrainingSequence| {
            !sequence.targets.is_empty() || !sequence.labels.is_empty()
        };
        Ok([passage, query].into_iter().filter(has_targets).collect())
    }

    /// The distinct ids of a target text, ascending.
    fn targets(&self, text: &str) -> Result<Vec<u32>> {
        let ids = match &self.stop_words {
            Some(words) => {
                self.prompts.encode_text(&words.removed_from(text), self.target_tokens)?
            }
            None => self.prompts.encode_text(text, self.target_tokens)?,
        };
        let mut ids: Vec<u32> =
            ids.into_iter().filter(|id| !self.special_ids.contains(id)).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}
