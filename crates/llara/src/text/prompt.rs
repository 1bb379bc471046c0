//! Encodes prefix, text and suffix as one sequence of token ids, the input of the model.

use rayon::prelude::*;

use super::template::{too_few_to_pool, trailing_tokens};
use super::{Role, Template, TextTokenizer};
use crate::{Error, ErrorKind, Result};

/// Encodes texts in a template. Prefix and suffix are tokenized once, separately from the text; truncation
/// removes tokens only from the end of the text.
pub struct PromptEncoder {
    tokenizer: TextTokenizer,
    template: Template,
    /// Number of rows of the model's embedding matrix.
    vocab_size: usize,
    query: AffixIds,
    passage: AffixIds,
}

struct AffixIds {
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl AffixIds {
    fn len(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }
}

impl PromptEncoder {
    /// Prepares a template for a tokenizer and a model with `vocab_size` token embeddings.
    ///
    /// # Errors
    /// The template is invalid, its special tokens are not single ids of the tokenizer, a suffix has fewer
    /// tokens than are pooled, or the model has no embedding for an id of the template.
    pub fn new(tokenizer: TextTokenizer, template: Template, vocab_size: usize) -> Result<Self> {
        template.validate()?;
        let missing: Vec<String> = template
            .special_tokens()
            .into_iter()
            .filter(|token| tokenizer.token_id(token).is_none())
            .collect();
        if !missing.is_empty() {
            return Err(not_single_ids(&template, &missing));
        }
        let query = affix_ids(&tokenizer, &template, Role::Query)?;
        let passage = affix_ids(&tokenizer, &template, Role::Passage)?;
        let encoder = Self { tokenizer, template, vocab_size, query, passage };
        for affixes in [&encoder.query, &encoder.passage] {
            encoder.check_ids(&affixes.prefix)?;
            encoder.check_ids(&affixes.suffix)?;
        }
        Ok(encoder)
    }

    /// The ids of prefix, `text` and suffix, at most `max_len`.
    ///
    /// # Errors
    /// `max_len` leaves no token for the text, a token is not in the model's vocabulary, or the sequence
    /// is empty.
    pub fn encode(&self, role: Role, text: &str, max_len: usize) -> Result<Vec<u32>> {
        self.check_max_len(role, max_len)?;
        let affixes = self.affix_ids(role);
        let kept = self.tokenizer.encode_first(text, max_len - affixes.len())?;
        self.check_ids(&kept)?;
        let ids = [&affixes.prefix[..], &kept, &affixes.suffix].concat();
        if ids.is_empty() {
            return Err(Error::new(ErrorKind::Data, format!("a {role} has no tokens"))
                .got(format!("{text:?} in template `{}`", self.template.name))
                .hint("remove empty texts, or use a template with a prefix or a suffix"));
        }
        Ok(ids)
    }

    /// The ids of a text alone, without its template, of at most `max_tokens` tokens; may be empty.
    ///
    /// # Errors
    /// A token is not in the model's vocabulary.
    pub fn encode_text(&self, text: &str, max_tokens: usize) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode_first(text, max_tokens)?;
        self.check_ids(&ids)?;
        Ok(ids)
    }

    /// [`PromptEncoder::encode`] for many texts, in parallel. The result has the order of `texts`.
    ///
    /// # Errors
    /// The first text, in order, that [`PromptEncoder::encode`] refuses.
    pub fn encode_all(
        &self,
        role: Role,
        texts: &[impl AsRef<str> + Sync],
        max_len: usize,
    ) -> Result<Vec<Vec<u32>>> {
        // All results are collected first: the reported error must not depend on the threads.
        let sequences: Vec<Result<Vec<u32>>> =
            texts.par_iter().map(|text| self.encode(role, text.as_ref(), max_len)).collect();
        sequences.into_iter().collect()
    }

    /// Checks that prefix, suffix and at least one token of a text fit into `max_len`.
    ///
    /// # Errors
    /// They do not. The error states the smallest valid length.
    pub fn check_max_len(&self, role: Role, max_len: usize) -> Result<()> {
        let smallest = self.affix_ids(role).len() + 1;
        if max_len >= smallest {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Argument,
            format!("the maximum {role} length leaves no token for the text"),
        )
        .expected(format!(
            "a maximum {role} length of at least {smallest}: template `{}` has {} tokens",
            self.template.name,
            smallest - 1
        ))
        .got(max_len))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        &self.tokenizer
    }

    /// The template.
    pub fn template(&self) -> &Template {
        &self.template
    }

    /// The ids of prefix (with the special tokens before it) and suffix.
    pub(crate) fn affixes(&self, role: Role) -> (&[u32], &[u32]) {
        let AffixIds { prefix, suffix } = self.affix_ids(role);
        (prefix, suffix)
    }

    fn affix_ids(&self, role: Role) -> &AffixIds {
        match role {
            Role::Query => &self.query,
            Role::Passage => &self.passage,
        }
    }

    fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocab_size) else {
            return Ok(());
        };
        let token = self.tokenizer.token(id).unwrap_or_default();
        Err(Error::new(
            ErrorKind::Tokenizer,
            format!("the model has no embedding for token `{token}` (id {id})"),
        )
        .expected(format!("ids below {}", self.vocab_size))
        .hint(
            "use the tokenizer of this model; to add a template's tokens to a model, use llara finetune \
             --add-special-tokens",
        ))
    }
}

fn affix_ids(tokenizer: &TextTokenizer, template: &Template, role: Role) -> Result<AffixIds> {
    let affixes = template.affixes(role);
    let mut prefix = if affixes.special_tokens_in_prefix {
        // Only those before a text: a tokenizer may also append EOS, which belongs after the suffix.
        tokenizer.leading_special_tokens()?
    } else {
        Vec::new()
    };
    prefix.extend(tokenizer.encode(&affixes.prefix, false)?);
    let suffix = tokenizer.encode(&affixes.suffix, false)?;

    let tokens = trailing_tokens(&affixes.suffix);
    let ids: Option<Vec<u32>> = tokens.iter().map(|token| tokenizer.token_id(token)).collect();
    if !ids.is_some_and(|ids| suffix.ends_with(&ids)) {
        return Err(not_single_ids(template, &tokens));
    }
    // Without a suffix the last tokens of the text are pooled, however many the text has.
    if !suffix.is_empty() && suffix.len() < template.pooled_tokens {
        return Err(too_few_to_pool(template, role, suffix.len(), "tokens"));
    }
    Ok(AffixIds { prefix, suffix })
}

fn not_single_ids(template: &Template, tokens: &[impl AsRef<str>]) -> Error {
    let list: Vec<&str> = tokens.iter().map(AsRef::as_ref).collect();
    Error::new(
        ErrorKind::Tokenizer,
        format!("the tokenizer has no single tokens for {}", list.join(" ")),
    )
    .expected(format!("every special token of template `{}` as one id", template.name))
    .got("several ids for each, of which only some would be pooled")
    .hint(
        "choose the template that the model was trained with (--template), or add the tokens in training: \
         llara finetune --add-special-tokens",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Affixes, train_bpe};
    use proptest::prelude::*;

    fn tokenizer(specials: &[String]) -> TextTokenizer {
        let texts = (0..50).map(|i| format!("summarize the words of passage {i} in a few words"));
        train_bpe(texts, 400, specials).unwrap()
    }

    fn llara() -> PromptEncoder {
        let template = Template::preset("llara").unwrap();
        let tokenizer = tokenizer(&template.special_tokens());
        let size = tokenizer.vocab_size();
        PromptEncoder::new(tokenizer, template, size).unwrap()
    }

    fn bare(pooled_tokens: usize) -> Template {
        let none = Affixes {
            prefix: String::new(),
            suffix: String::new(),
            special_tokens_in_prefix: false,
        };
        Template { name: "bare".into(), pooled_tokens, query: none.clone(), passage: none }
    }

    #[test]
    fn parts_are_tokenized_separately_and_concatenated() {
        let encoder = llara();
        let t = encoder.tokenizer();
        let text = "the words";
        for role in [Role::Query, Role::Passage] {
            let affixes = encoder.template().affixes(role);
            let expected = [
                t.encode(&affixes.prefix, true).unwrap(),
                t.encode(text, false).unwrap(),
                t.encode(&affixes.suffix, false).unwrap(),
            ]
            .concat();
            assert_eq!(encoder.encode(role, text, 500).unwrap(), expected);
            assert_eq!(expected[0], t.token_id("<|bos|>").unwrap());
        }
        let last = encoder.encode(Role::Passage, text, 500).unwrap();
        let s1 = t.token_id("<s1>").unwrap();
        assert_eq!(last[last.len() - 8..], (s1..s1 + 8).collect::<Vec<_>>());
    }

    #[test]
    fn a_length_without_room_for_text_is_refused_with_the_smallest_length() {
        let encoder = llara();
        let around = encoder.encode(Role::Query, "", 500).unwrap().len();
        let e = encoder.check_max_len(Role::Query, around).unwrap_err().to_string();
        assert!(e.contains(&format!("at least {}", around + 1)), "{e}");
        assert!(encoder.encode(Role::Query, "words", around).is_err());
        assert!(encoder.check_max_len(Role::Query, 0).is_err());
        assert_eq!(encoder.encode(Role::Query, "words of", around + 1).unwrap().len(), around + 1);
    }

    #[test]
    fn missing_special_tokens_are_listed_with_a_hint() {
        let template = Template::preset("llara").unwrap();
        let mut tokenizer = tokenizer(&template.special_tokens()[..14]);
        let size = tokenizer.vocab_size();
        let new = |t: &TextTokenizer, size| PromptEncoder::new(t.clone(), template.clone(), size);
        let e = new(&tokenizer, size).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Tokenizer);
        let e = e.to_string();
        assert!(e.contains("<s15> <s16>") && !e.contains("<s14>"), "{e}");
        assert!(e.contains("--add-special-tokens"), "{e}");

        assert_eq!(tokenizer.add_special_tokens(&template.special_tokens()).unwrap(), 2);
        let e = new(&tokenizer, size).err().unwrap().to_string();
        assert!(e.contains("`<s15>`") && e.contains("no embedding"), "{e}");
        assert!(new(&tokenizer, size + 2).is_ok());
    }

    #[test]
    fn last_token_templates() {
        let mut tokenizer = tokenizer(&[]);
        tokenizer.add_special_tokens(&["</s>".into()]).unwrap();
        let size = tokenizer.vocab_size();
        let e5 = Template::preset("e5-mistral").unwrap();
        let encoder = PromptEncoder::new(tokenizer.clone(), e5, size).unwrap();
        let mut expected = tokenizer.encode("few words", true).unwrap();
        expected.push(tokenizer.token_id("</s>").unwrap());
        assert_eq!(encoder.encode(Role::Query, "few words", 64).unwrap(), expected);

        let encoder = PromptEncoder::new(tokenizer, bare(1), size).unwrap();
        let e = encoder.encode(Role::Passage, "", 8).unwrap_err().to_string();
        assert!(e.contains("no tokens"), "{e}");
        assert_eq!(encoder.encode(Role::Passage, "words words words", 2).unwrap().len(), 2);
    }

    #[test]
    fn no_more_tokens_are_pooled_than_the_suffix_has() {
        let tokenizer = tokenizer(&[]);
        let size = tokenizer.vocab_size();
        let tokens = tokenizer.encode(" the end", false).unwrap().len();
        let new = |pooled_tokens| {
            let mut template = bare(pooled_tokens);
            template.passage.suffix = " the end".into();
            PromptEncoder::new(tokenizer.clone(), template, size)
        };
        assert!(new(tokens).is_ok());
        for pooled in [tokens + 1, 50, 100] {
            let e = new(pooled).err().unwrap();
            assert_eq!(e.kind(), ErrorKind::Config);
            let e = e.to_string();
            assert!(e.contains("exceeds the tokens of the passage suffix"), "{e}");
            assert!(e.contains(&format!("got: {tokens}")), "{e}");
        }
        let e = new(99_999_999_999).err().unwrap().to_string();
        assert!(e.contains("`pooled_tokens` is out of range"), "{e}");
        assert!(PromptEncoder::new(tokenizer.clone(), bare(50), size).is_ok());
    }

    #[test]
    fn a_text_token_beyond_the_vocabulary_is_named_unless_truncated() {
        let mut tokenizer = tokenizer(&[]);
        let size = tokenizer.vocab_size();
        tokenizer.add_special_tokens(&["<new>".into()]).unwrap();
        let encoder = PromptEncoder::new(tokenizer, bare(1), size).unwrap();
        let e = encoder.encode(Role::Query, "words<new>", 9).unwrap_err().to_string();
        assert!(e.contains("`<new>`"), "{e}");
        assert!(encoder.encode(Role::Query, "words<new>", 1).is_ok());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn only_the_text_is_truncated(texts in prop::collection::vec(any::<String>(), 0..5), room in 1usize..20) {
            thread_local!(static ENCODER: PromptEncoder = llara());
            ENCODER.with(|encoder| {
                for role in [Role::Query, Role::Passage] {
                    let ids = encoder.affix_ids(role);
                    let max_len = ids.len() + room;
                    let all = encoder.encode_all(role, &texts, max_len).unwrap();
                    prop_assert_eq!(all.len(), texts.len());
                    for (text, sequence) in texts.iter().zip(&all) {
                        let whole = encoder.tokenizer.encode(text, false).unwrap();
                        prop_assert_eq!(sequence.len(), ids.len() + whole.len().min(room));
                        prop_assert!(sequence.starts_with(&ids.prefix));
                        prop_assert!(sequence.ends_with(&ids.suffix));
                        let middle = &sequence[ids.prefix.len()..sequence.len() - ids.suffix.len()];
                        prop_assert!(whole.starts_with(middle));
                        prop_assert_eq!(&encoder.encode(role, text, max_len).unwrap(), sequence);
                    }
                }
                Ok(())
            })?;
        }
    }
}
