//! What a tokenizer does with special tokens by itself: the ones that it appends, and the ones that
//! `tokenizer_config.json` names.

use serde_json::Value;

use super::TextTokenizer;
use super::tokenizer::{cannot_encode, guarded};
use tokenizers::processors::template::TemplateProcessing;

use super::Template;
use crate::{Error, ErrorKind, Result};

/// A token and its role in `tokenizer_config.json`, such as `pad_token`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NamedToken {
    pub(crate) key: &'static str,
    pub(crate) token: String,
}

impl TextTokenizer {
    /// The special tokens that the post-processor appends to a text: EOS or none.
    ///
    /// # Errors
    /// The tokenizer cannot encode a short text.
    pub fn trailing_special_tokens(&self) -> Result<Vec<u32>> {
        // The text must not be empty: otherwise prepended and appended tokens cannot be distinguished.
        let encoding = guarded(|| self.inner.encode_fast("a", true)).map_err(cannot_encode)?;
        let mask = encoding.get_special_tokens_mask().iter().rev();
        let special = mask.take_while(|&&m| m == 1).count();
        let ids = encoding.get_ids();
        Ok(ids[ids.len() - special..].to_vec())
    }

    /// Makes the post-processor add what `template` has around a text, as far as it can: special tokens in
    /// front only if the template has them, and a suffix of one special token. Every tool then encodes a text
    /// as the model needs it. For a tokenizer of a new model, which nobody else uses.
    ///
    /// # Errors
    /// The post-processor cannot be built.
    pub(crate) fn follow_template(&mut self, template: &Template) -> Result<()> {
        let failed = |e: tokenizers::Error| {
            Error::new(ErrorKind::Tokenizer, "cannot set the post-processor").because(e)
        };
        let roles = [&template.query, &template.passage];
        let mut leading = self.leading_special_tokens()?;
        if !roles.iter().any(|affixes| affixes.special_tokens_in_prefix) {
            leading.clear();
        }
        let suffix = &template.query.suffix;
        // Other characters have a meaning in the description of a post-processor.
        let is_plain = !suffix.contains([':', '$']) && !suffix.contains(char::is_whitespace);
        let appended = (template.passage.suffix == *suffix && is_plain)
            .then(|| self.token_id(suffix))
            .flatten()
            .filter(|_| self.is_added(suffix));
        let token = |id: &u32| Some((self.token(*id)?, *id));
        let before: Vec<(String, u32)> = leading.iter().filter_map(token).collect();
        let after: Vec<(String, u32)> = appended.iter().filter_map(token).collect();
        let around = |text: &str| {
            let names = |tokens: &[(String, u32)]| -> Vec<String> {
                tokens.iter().map(|(token, _)| token.clone()).collect()
            };
            [names(&before), vec![text.to_owned()], names(&after)].concat().join(" ")
        };
        let mut special = [before.clone(), after.clone()].concat();
        special.dedup();
        let processor = TemplateProcessing::builder()
            .try_single(around("$A"))
            .and_then(|builder| builder.try_pair(around("$A $B")))
            .map_err(|e| failed(e.into()))?
            .special_tokens(special)
            .build()
            .map_err(|e| failed(e.into()))?;
        self.inner.with_post_processor(Some(processor));
        self.forget_original();
        Ok(())
    }

    /// BOS, EOS, unknown and padding token as `tokenizer_config.json` names them.
    pub(crate) fn named_tokens(&self) -> Vec<NamedToken> {
        let config = self.config.as_deref().unwrap_or(b"{}");
        let config: Value = serde_json::from_slice(config).unwrap_or_default();
        let named = ["bos_token", "eos_token", "unk_token", "pad_token"].map(|key| {
            let value = config.get(key)?;
            // A string, or an object of an added token.
            let token = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some(NamedToken { key, token: token.to_owned() })
        });
        named.into_iter().flatten().collect()
    }

    /// Whether a token is never merged with adjacent characters.
    pub(crate) fn is_added(&self, token: &str) -> bool {
        self.inner.get_added_vocabulary().get_vocab().contains_key(token)
    }

    /// Tokens with ids of at least `limit`, in the order of their ids.
    pub(crate) fn tokens_from(&self, limit: usize) -> Vec<(u32, String)> {
        let vocabulary = self.inner.get_vocab(true).into_iter();
        let mut tokens: Vec<(u32, String)> = vocabulary
            .filter(|(_, id)| *id as usize >= limit)
            .map(|(token, id)| (id, token))
            .collect();
        tokens.sort();
        tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::train_bpe;

    #[test]
    fn appended_tokens_are_told_from_prepended_ones() {
        let texts = ["the cat sat", "the mat"].map(String::from);
        let mut tokenizer = train_bpe(texts.into_iter(), 300, &[]).unwrap();
        assert!(tokenizer.trailing_special_tokens().unwrap().is_empty());
        let both = TemplateProcessing::builder()
            .try_single("<|bos|> $A <|eos|>")
            .unwrap()
            .special_tokens(vec![("<|bos|>", 1), ("<|eos|>", 2)])
            .build()
            .unwrap();
        tokenizer.inner.with_post_processor(Some(both));
        assert_eq!(tokenizer.trailing_special_tokens().unwrap(), [2]);
        assert_eq!(tokenizer.tokens_from(tokenizer.vocab_size() - 1).len(), 1);
        assert!(tokenizer.is_added("<|eos|>") && !tokenizer.is_added("t"));
    }

    #[test]
    fn a_new_tokenizer_adds_what_the_template_has() {
        for (name, leading, trailing) in
            [("llara", 1, 0), ("e5-mistral", 1, 1), ("qwen3-embedding", 0, 1)]
        {
            let template = Template::preset(name).unwrap();
            let special = template.special_tokens();
            let mut tokenizer = train_bpe(std::iter::empty(), 400, &special).unwrap();
            tokenizer.follow_template(&template).unwrap();
            assert_eq!(tokenizer.leading_special_tokens().unwrap().len(), leading, "{name}");
            assert_eq!(tokenizer.trailing_special_tokens().unwrap().len(), trailing, "{name}");
        }
    }

    #[test]
    fn tokens_are_named_by_strings_and_objects() {
        let mut tokenizer = train_bpe(std::iter::empty(), 300, &[]).unwrap();
        let config =
            br#"{"pad_token": {"content": "<p>"}, "eos_token": "</s>", "bos_token": null}"#;
        tokenizer.config = Some(config.to_vec());
        let named = |key, token: &str| NamedToken { key, token: token.to_owned() };
        assert_eq!(
            tokenizer.named_tokens(),
            [named("eos_token", "</s>"), named("pad_token", "<p>")]
        );
        tokenizer.config = Some(b"[".to_vec());
        assert!(tokenizer.named_tokens().is_empty());
    }
}
