//! Training a byte-level BPE tokenizer, as GPT-2 uses.

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::TextTokenizer;
use crate::{Error, ErrorKind, Result};

/// The first three ids. BOS is prepended to every text that is encoded with special tokens.
const PAD: &str = "<|pad|>";
const BOS: &str = "<|bos|>";
const EOS: &str = "<|eos|>";

/// Every byte is a token, so every text can be encoded.
const BYTES: usize = 256;

/// Pairs that occur only once are not merged: they are not likely in other texts.
const MIN_PAIR_COUNT: u64 = 2;

/// Trains a byte-level BPE tokenizer of up to `vocab_size` entries: `<|pad|>`, `<|bos|>`, `<|eos|>`, then
/// `special_tokens` (of a template), then the 256 bytes, then merges in the order of their frequency. If
/// the texts have fewer frequent pairs, there are fewer entries. The same texts give the same tokenizer.
///
/// # Errors
/// `vocab_size` is smaller than the number of special tokens and bytes, or a special token is empty.
pub fn train_bpe(
    texts: impl Iterator<Item = String> + Send,
    vocab_size: usize,
    special_tokens: &[String],
) -> Result<TextTokenizer> {
    let mut specials: Vec<&str> = vec![PAD, BOS, EOS];
    for token in special_tokens {
        if token.is_empty() {
            return Err(Error::new(ErrorKind::Argument, "a special token is empty"));
        }
        if !specials.contains(&token.as_str()) {
            specials.push(token);
        }
    }
    let smallest = specials.len() + BYTES;
    if vocab_size < smallest || u32::try_from(vocab_size).is_err() {
        return Err(Error::new(ErrorKind::Argument, "the vocabulary size is out of range")
            .expected(format!(
                "at least {smallest}: {} special tokens and {BYTES} bytes",
                specials.len()
            ))
            .got(vocab_size));
    }

    let trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(MIN_PAIR_COUNT)
        .show_progress(false)
        .special_tokens(specials.iter().map(|&t| AddedToken::from(t, true)).collect())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = Tokenizer::new(ModelWrapper::BPE(BPE::default()));
    tokenizer.with_pre_tokenizer(Some(byte_level)).with_decoder(Some(byte_level));
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts).map_err(failed)?;

    let bos = tokenizer.token_to_id(BOS).ok_or_else(|| {
        Error::new(ErrorKind::Tokenizer, "the trained tokenizer has no BOS token")
    })?;
    let with_bos = TemplateProcessing::builder()
        .try_single(format!("{BOS} $A"))
        .and_then(|b| b.try_pair(format!("{BOS} $A $B")))
        .map_err(failed)?
        .special_tokens(vec![(BOS, bos)])
        .build()
        .map_err(failed)?;
    tokenizer.with_post_processor(Some(with_bos));
    TextTokenizer::new(tokenizer, Some(transformers_config()))
}

/// `tokenizer_config.json`. Without it `AutoTokenizer` selects the class of the model's family, which has
/// other special tokens.
fn transformers_config() -> Vec<u8> {
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "padding_side": "left",
    });
    format!("{config:#}\n").into_bytes()
}

fn failed(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Tokenizer, "cannot train the tokenizer").because(source)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Template;

    fn texts() -> impl Iterator<Item = String> + Send {
        (0..200).map(|i| {
            format!("Ship number {i} carries wheat, ship number {} carries oil.", i % 7 + 3)
        })
    }

    fn json(tokenizer: &TextTokenizer) -> String {
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        std::fs::read_to_string(dir.path().join("tokenizer.json")).unwrap()
    }

    #[test]
    fn special_tokens_come_first_and_bos_in_front() {
        let specials = Template::preset("llara").unwrap().special_tokens();
        let tokenizer = train_bpe(texts(), 320, &specials).unwrap();
        for (i, token) in [PAD, BOS, EOS, "<s1>"].into_iter().enumerate() {
            assert_eq!(tokenizer.token_id(token), Some(i as u32));
        }
        assert_eq!(tokenizer.vocab_size(), 320);
        let ids = tokenizer.encode("ship <s1><s2>", true).unwrap();
        assert_eq!(ids[0], 1);
        assert!(ids.ends_with(&[3, 4]));
        // Characters that are not in the training texts are encoded as bytes.
        assert!(!tokenizer.encode("Grüße, 世界 🚢", false).unwrap().is_empty());
        assert_eq!(tokenizer.encode("🚢", false).unwrap().len(), 4);
    }

    #[test]
    fn the_same_texts_give_the_same_bytes() {
        let first = json(&train_bpe(texts(), 400, &[]).unwrap());
        assert_eq!(first, json(&train_bpe(texts(), 400, &[]).unwrap()));
    }

    #[test]
    fn few_texts_give_few_entries_and_no_texts_only_the_bytes() {
        let tokenizer = train_bpe(texts().take(3), 30_000, &[]).unwrap();
        assert!((260..1000).contains(&tokenizer.vocab_size()));
        assert_eq!(train_bpe(std::iter::empty(), 30_000, &[]).unwrap().vocab_size(), 259);
    }

    #[test]
    fn a_vocabulary_that_is_too_small_is_refused() {
        let e = train_bpe(texts(), 260, &["<a>".into(), "<b>".into()]).err().unwrap();
        assert!(e.to_string().contains("at least 261"), "{e}");
        assert!(train_bpe(texts(), 261, &["<a>".into(), "<b>".into()]).is_ok());
        assert!(train_bpe(texts(), 400, &[String::new()]).is_err());
    }
}
