//! Tokenizers in Hugging Face's format: reading, adding special tokens, writing.

use std::borrow::Cow;
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use crate::storage::{OutputFile, read_limited};
use crate::{Error, ErrorKind, Result};

/// Bytes of a text of which one token is expected at least.
const BYTES_PER_TOKEN: usize = 16;
/// Further bytes that are tokenized.
const MARGIN_BYTES: usize = 4096;
/// Tokens before a cut that are not used.
const MARGIN_TOKENS: usize = 64;

/// A tokenizer. Truncation and padding that are stored in the file are disabled.
#[derive(Clone)]
pub struct TextTokenizer {
    pub(super) inner: Tokenizer,
    /// `tokenizer.json` as it was read; `None` if the tokenizer was changed.
    original: Option<Vec<u8>>,
    /// `tokenizer_config.json`, which transformers reads too.
    pub(super) config: Option<Vec<u8>>,
    vocab_size: usize,
}

/// The file of a folder that contains the tokenizer.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";

/// Largest tokenizer file that is read, in bytes; the largest published ones have about 40 MB.
const MAX_BYTES: u64 = 512 << 20;

/// The largest vocabulary. `config.json` has the same limit.
const MAX_VOCAB_SIZE: usize = 1 << 28;

impl TextTokenizer {
    /// Reads `tokenizer.json` of a model folder, and `tokenizer_config.json` if there is one.
    ///
    /// # Errors
    /// `tokenizer.json` is missing, cannot be read or is not a tokenizer.
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(TOKENIZER_FILE);
        let original = read_if_present(&path)?.ok_or_else(|| missing(folder))?;
        let inner = guarded(|| Tokenizer::from_bytes(&original)).map_err(|e| {
            Error::new(ErrorKind::Tokenizer, "cannot load the tokenizer")
                .file(&path)
                .because(e)
                .hint("save it again with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)")
        })?;
        let config = read_if_present(&folder.join(CONFIG_FILE))?;
        let mut tokenizer = Self::new(inner, config).map_err(|e| e.file(&path))?;
        tokenizer.original = Some(original);
        Ok(tokenizer)
    }

    /// A tokenizer that was not read from a file, and its `tokenizer_config.json`.
    pub(super) fn new(mut inner: Tokenizer, config: Option<Vec<u8>>) -> Result<Self> {
        // transformers stores the settings of its last call in the file; they would silently truncate or
        // pad texts.
        inner.with_truncation(None).map_err(|e| {
            Error::new(ErrorKind::Tokenizer, "cannot disable truncation").because(e)
        })?;
        inner.with_padding(None);
        let vocab_size = ids(&inner).max().map_or(0, |id| id as usize + 1);
        if vocab_size > MAX_VOCAB_SIZE {
            return Err(Error::new(ErrorKind::Tokenizer, "a token id is out of range")
                .expected(format!("ids below {MAX_VOCAB_SIZE}"))
                .got(vocab_size - 1)
                .hint("the file is damaged or belongs to another model: download it again"));
        }
        Ok(Self { inner, original: None, config, vocab_size })
    }

    /// The ids of `text`, without truncation. `with_special_tokens` adds the special tokens of the
    /// tokenizer's post-processor.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text, for example because it has no unknown token.
    pub fn encode(&self, text: &str, with_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding =
            guarded(|| self.inner.encode_fast(text, with_special_tokens)).map_err(cannot_encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The first `count` ids of `text`, or all if there are fewer. Only the beginning of a long text is tokenized, so
    /// that memory and time do not depend on what is cut.
    ///
    /// # Errors
    /// The tokenizer cannot encode the text.
    pub fn encode_first(&self, text: &str, count: usize) -> Result<Vec<u32>> {
        self.encode_beginning(text, count, count.saturating_mul(BYTES_PER_TOKEN))
    }

    /// [`encode_first`](Self::encode_first), which tokenizes `bytes` of the text, and more if that is not enough.
    fn encode_beginning(&self, text: &str, count: usize, mut bytes: usize) -> Result<Vec<u32>> {
        bytes = bytes.saturating_add(MARGIN_BYTES);
        loop {
            let whole = text.len() / 2 <= bytes;
            let beginning = if whole { text } else { beginning(text, bytes) };
            let mut ids = self.encode(beginning, false)?;
            // Where the text is cut, the last tokens may be others than in the whole text.
            if whole || ids.len() >= count.saturating_add(MARGIN_TOKENS) {
                ids.truncate(count);
                return Ok(ids);
            }
            bytes = bytes.saturating_mul(4);
        }
    }

    /// The special tokens that the post-processor prepends to a text: BOS or none.
    ///
    /// # Errors
    /// The tokenizer cannot encode a short text.
    pub fn leading_special_tokens(&self) -> Result<Vec<u32>> {
        // The text must not be empty: otherwise prepended and appended tokens cannot be distinguished.
        let encoding = guarded(|| self.inner.encode_fast("a", true)).map_err(cannot_encode)?;
        let special = encoding.get_special_tokens_mask().iter().take_while(|&&m| m == 1).count();
        Ok(encoding.get_ids()[..special].to_vec())
    }

    /// The id of a token of the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The special tokens, such as `</s>`: their spelling inside a text is encoded as the token.
    pub fn special_tokens(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        added.into_values().filter(|token| token.special).map(|token| token.content).collect()
    }

    /// The ids of the special tokens, without those that stand for a byte of a text (`<0x0A>`), which some
    /// tokenizers list as special.
    pub fn special_ids(&self) -> HashSet<u32> {
        let is_byte = |text: &str| {
            let digits = text.strip_prefix("<0x").and_then(|text| text.strip_suffix('>'));
            digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
        };
        let added = self.inner.get_added_tokens_decoder().into_iter();
        let special = added.filter(|(_, token)| token.special && !is_byte(&token.content));
        special.map(|(id, _)| id).collect()
    }

    /// Number of special tokens that the post-processor adds to a text.
    ///
    /// # Errors
    /// The tokenizer cannot encode a short text.
    pub fn added_special_tokens(&self) -> Result<usize> {
        let encoding = guarded(|| self.inner.encode_fast("a", true)).map_err(cannot_encode)?;
        Ok(encoding.get_special_tokens_mask().iter().filter(|&&mask| mask == 1).count())
    }

    /// The highest id plus one, added tokens included: the number of rows that an embedding matrix needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Adds `tokens` as special tokens, so that each is encoded as a single id; returns the number of new
    /// ids. Tokens that are single ids already are not changed. On an error the tokenizer is unchanged.
    ///
    /// # Errors
    /// A token is empty, the vocabulary has gaps so that a new id would be in use already, or
    /// `tokenizer_config.json` is not a JSON object.
    pub fn add_special_tokens(&mut self, tokens: &[String]) -> Result<usize> {
        if tokens.iter().any(String::is_empty) {
            return Err(Error::new(ErrorKind::Argument, "a special token is empty"));
        }
        let mut missing: Vec<&str> = Vec::new();
        for token in tokens {
            if !missing.contains(&token.as_str()) && !self.is_single_id(token)? {
                missing.push(token);
            }
        }
        if missing.is_empty() {
            return Ok(0);
        }
        let mut inner = self.inner.clone();
        guarded(|| inner.add_special_tokens(missing.iter().map(|&t| AddedToken::from(t, true))))
            .map_err(|e| Error::new(ErrorKind::Tokenizer, "cannot add tokens").because(e))?;

        // The tokenizers crate numbers new tokens from the vocabulary's size, which may be the id of another
        // token if the vocabulary has gaps.
        let mut taken: HashSet<u32> = ids(&self.inner).collect();
        let mut new = 0;
        for &token in &missing {
            if self.token_id(token).is_some() {
                continue;
            }
            match inner.token_to_id(token) {
                Some(id) if taken.insert(id) => new += 1,
                id => return Err(self.no_free_id(token, id)),
            }
        }
        let config = match &self.config {
            Some(config) => Some(with_added_tokens(config, &inner, &missing)?),
            None => None,
        };
        *self = Self::new(inner, config)?;
        Ok(new)
    }

    /// Writes `tokenizer.json` to an existing folder, with the bytes that were read if no token was added,
    /// and `tokenizer_config.json` if there was one. Each file is written atomically.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        write_file(folder, TOKENIZER_FILE, &self.contents()?)?;
        match &self.config {
            Some(config) => write_file(folder, CONFIG_FILE, config),
            None => Ok(()),
        }
    }

    /// Makes [`save`](Self::save) write the tokenizer as it is now and not the bytes that were read.
    pub(super) fn forget_original(&mut self) {
        self.original = None;
    }

    /// The bytes of `tokenizer.json`.
    pub(crate) fn contents(&self) -> Result<Cow<'_, [u8]>> {
        if let Some(original) = &self.original {
            return Ok(Cow::Borrowed(original));
        }
        let json = guarded(|| self.inner.to_string(true)).map_err(|e| {
            Error::new(ErrorKind::Tokenizer, "cannot serialize the tokenizer").because(e)
        })?;
        Ok(Cow::Owned(json.into_bytes()))
    }

    /// The error for a new `token` whose `id` another token has already.
    fn no_free_id(&self, token: &str, id: Option<u32>) -> Error {
        let what = match id {
            Some(id) => format!(
                "cannot add the token `{}`: its id would be {id}, which is the id of `{}`",
                token.escape_debug(),
                self.token(id).unwrap_or_default().escape_debug()
            ),
            None => format!("cannot add the token `{}`: it gets no id", token.escape_debug()),
        };
        let entries = self.inner.get_vocab_size(true);
        Error::new(ErrorKind::Tokenizer, what)
            .file(TOKENIZER_FILE)
            .expected("ids without gaps, because new ids start at the number of tokens")
            .got(format!("{entries} tokens with ids up to {}", self.vocab_size.saturating_sub(1)))
            .hint(
                "add the tokens with transformers (tokenizer.add_special_tokens, model.resize_token_embeddings) \
                 and save the model again, or use a template whose tokens the tokenizer has",
            )
    }

    /// Whether the token is always encoded as one id. Being in the vocabulary is not sufficient: only added
    /// tokens are never merged with adjacent characters.
    fn is_single_id(&self, token: &str) -> Result<bool> {
        let Some(&id) = self.inner.get_added_vocabulary().get_vocab().get(token) else {
            return Ok(false);
        };
        Ok(self.encode(&format!("a{token}{token}"), false)?.ends_with(&[id, id]))
    }
}

/// Calls the tokenizers crate and converts its panics, which unusual files can cause, to errors.
pub(super) fn guarded<T, E: Into<tokenizers::Error>>(
    call: impl FnOnce() -> Result<T, E>,
) -> Result<T, tokenizers::Error> {
    // Unwind safety: after a panic the caller drops everything that `call` may have modified.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(Into::into),
        Err(panic) => {
            let message = panic.downcast_ref::<String>().map(String::as_str);
            let message = message.or_else(|| panic.downcast_ref::<&str>().copied());
            let message: String =
                message.unwrap_or("no message").escape_debug().take(200).collect();
            Err(format!("the tokenizers library cannot handle this file: {message}").into())
        }
    }
}

fn ids(tokenizer: &Tokenizer) -> impl Iterator<Item = u32> {
    tokenizer.get_vocab(true).into_values()
}

pub(super) fn cannot_encode(source: tokenizers::Error) -> Error {
    Error::new(ErrorKind::Tokenizer, "cannot tokenize a text").because(source)
}

/// If `tokenizer_config.json` lists the added tokens (as transformers 4 writes it), the tokenizer classes of
/// a model family in transformers 5 read them from there, not from `tokenizer.json`: a token that is added
/// only to the latter is split again.
fn with_added_tokens(config: &[u8], tokenizer: &Tokenizer, added: &[&str]) -> Result<Vec<u8>> {
    let bad = |what: &str| Error::new(ErrorKind::Tokenizer, what).file(CONFIG_FILE);
    let mut json: Value = serde_json::from_slice(config)
        .map_err(|e| bad("not JSON").because(e).hint("repair or remove the file"))?;
    let Some(object) = json.as_object_mut() else { return Err(bad("not a JSON object")) };
    let list = match object.get_mut("added_tokens_decoder") {
        Some(Value::Object(list)) if !list.is_empty() => list,
        _ => return Ok(config.to_vec()),
    };
    for (id, token) in tokenizer.get_added_tokens_decoder() {
        if added.contains(&token.content.as_str()) {
            let entry = serde_json::to_value(&token).map_err(|e| bad("not JSON").because(e))?;
            list.insert(id.to_string(), entry);
        }
    }
    let mut entries: Vec<(String, Value)> = std::mem::take(list).into_iter().collect();
    entries.sort_by_key(|(id, _)| id.parse::<u64>().unwrap_or(u64::MAX));
    list.extend(entries);
    let mut bytes = serde_json::to_vec_pretty(&json).map_err(|e| bad("not JSON").because(e))?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn missing(folder: &Path) -> Error {
    let hint = if folder.join("tokenizer.model").exists() {
        "there is a tokenizer.model: convert it with transformers, AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    } else {
        "copy tokenizer.json from the base model's folder, or check the path"
    };
    Error::new(ErrorKind::Tokenizer, "there is no tokenizer.json")
        .file(folder.join(TOKENIZER_FILE))
        .hint(hint)
}

fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>> {
    match path.metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        _ => read_limited(path, "read the tokenizer", MAX_BYTES).map(Some),
    }
}

fn write_file(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let mut file = OutputFile::create(&folder.join(name))?;
    file.write(bytes)?;
    file.commit()
}

/// At most about `bytes` bytes of `text`, up to white space if there is any in the last half of them.
fn beginning(text: &str, bytes: usize) -> &str {
    let bytes = text.floor_char_boundary(bytes);
    let half = text.floor_char_boundary(bytes / 2);
    let space = text[half..bytes].rfind(char::is_whitespace);
    &text[..space.map_or(bytes, |at| half + at)]
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::text::train_bpe;

    /// A small tokenizer whose vocabulary has no `<s…>` tokens.
    fn small() -> TextTokenizer {
        let texts = ["the cat sat on the mat", "a cat and a mat", "the mat sat"].map(String::from);
        train_bpe(texts.into_iter(), 300, &[]).unwrap()
    }

    /// Words, runs of one letter, white space, digits and other scripts.
    fn long_text() -> String {
        let mut state = 7u32;
        let mut next = |below: u32| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % below
        };
        let mut text = String::new();
        while text.len() < 60_000 {
            match next(8) {
                0 => text.push_str("the cat sat"),
                1 => text.push_str(&"a".repeat(next(300) as usize)),
                2 => text.push_str(&" ".repeat(next(40) as usize)),
                3 => text.push_str("\n\t "),
                4 => text.push_str(&next(1_000_000).to_string()),
                5 => text.push_str("größer, 汉字没有空格 и слова "),
                6 => text.push_str(" mats’ e\u{301}"),
                _ => text.push_str(". And "),
            }
        }
        text
    }

    #[test]
    fn the_first_ids_of_a_long_text_are_those_of_the_whole() {
        let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let names = ["llama-gqa", "llama-mha", "llama3-rope", "mistral", "qwen2", "qwen3"];
        let fixtures = names.map(|name| TextTokenizer::from_folder(fixtures.join(name)).unwrap());
        let text = long_text();
        for tokenizer in fixtures.iter().chain([&small()]) {
            let all = tokenizer.encode(&text, false).unwrap();
            for count in [0, 1, 30, 200, 1000, all.len() - 1, all.len(), usize::MAX] {
                let want = &all[..all.len().min(count)];
                assert_eq!(tokenizer.encode_first(&text, count).unwrap(), want, "{count}");
                // Several attempts are needed.
                assert_eq!(tokenizer.encode_beginning(&text, count, 0).unwrap(), want, "{count}");
            }
        }
        // A word that is longer than what is tokenized first.
        let word = "ab".repeat(100_000);
        let all = small().encode(&word, false).unwrap();
        assert_eq!(small().encode_first(&word, 9).unwrap(), all[..9]);
    }

    #[test]
    fn the_beginning_of_a_text_ends_at_white_space_or_a_character() {
        assert_eq!(beginning("one two three", 9), "one two");
        assert_eq!(beginning("onetwothree", 5), "onetw");
        assert_eq!(beginning("äöü", 3), "ä");
        assert_eq!(beginning("one", 99), "one");
    }

    fn saved(tokenizer: &TextTokenizer) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        tokenizer.save(dir.path()).unwrap();
        dir
    }

    #[test]
    fn stored_truncation_and_padding_are_disabled() {
        let dir = saved(&small());
        let path = dir.path().join(TOKENIZER_FILE);
        let mut json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        json["truncation"] = serde_json::json!(
            {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        );
        json["padding"] = serde_json::json!({"strategy": {"Fixed": 64}, "direction": "Left",
            "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"});
        let bytes = serde_json::to_vec(&json).unwrap();
        fs::write(&path, &bytes).unwrap();

        let tokenizer = TextTokenizer::from_folder(dir.path()).unwrap();
        let text = "the cat sat on the mat and the cat";
        assert_eq!(tokenizer.encode(text, true).unwrap(), small().encode(text, true).unwrap());
        // An unchanged tokenizer is saved byte for byte, including these settings.
        assert_eq!(fs::read(saved(&tokenizer).path().join(TOKENIZER_FILE)).unwrap(), bytes);
    }

    #[test]
    fn added_tokens_are_single_ids_also_after_saving() {
        let mut tokenizer = small();
        let size = tokenizer.vocab_size();
        let new = ["<s1>", "<s2>", "<s1>", "<|eos|>"].map(String::from);
        assert_eq!(tokenizer.add_special_tokens(&new).unwrap(), 2);
        assert_eq!(tokenizer.add_special_tokens(&new).unwrap(), 0);
        assert_eq!(tokenizer.vocab_size(), size + 2);
        let again = TextTokenizer::from_folder(saved(&tokenizer).path()).unwrap();
        for t in [&tokenizer, &again] {
            let id = t.token_id("<s1>").unwrap();
            assert_eq!(id as usize, size);
            assert!(t.encode("the cat <s1><s2>", false).unwrap().ends_with(&[id, id + 1]));
            assert_eq!(t.token(id + 1).as_deref(), Some("<s2>"));
            assert_eq!(t.vocab_size(), size + 2);
        }
        assert!(tokenizer.add_special_tokens(&[String::new()]).is_err());
    }

    #[test]
    fn a_word_of_the_vocabulary_becomes_special_without_a_new_id() {
        let mut tokenizer = small();
        let size = tokenizer.vocab_size();
        let id = tokenizer.token_id("mat").unwrap();
        // After a space the merges prefer "Ġmat".
        assert!(!tokenizer.encode("the mat", false).unwrap().ends_with(&[id]));
        assert_eq!(tokenizer.add_special_tokens(&["mat".into()]).unwrap(), 0);
        assert_eq!(tokenizer.token_id("mat"), Some(id));
        assert!(tokenizer.encode("the mat", false).unwrap().ends_with(&[id]));
        assert_eq!(tokenizer.vocab_size(), size);
    }

    #[test]
    fn the_token_list_in_tokenizer_config_is_updated() {
        let dir = saved(&small());
        let path = dir.path().join(CONFIG_FILE);
        let config = r#"{"added_tokens_decoder": {"2": {"content": "<|eos|>"}, "10": {}}, "z": 1}"#;
        fs::write(&path, config).unwrap();
        let mut tokenizer = TextTokenizer::from_folder(dir.path()).unwrap();
        tokenizer.save(dir.path()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), config);

        tokenizer.add_special_tokens(&["<s1>".into()]).unwrap();
        tokenizer.save(dir.path()).unwrap();
        let json: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let id = tokenizer.token_id("<s1>").unwrap().to_string();
        let list = json["added_tokens_decoder"].as_object().unwrap();
        assert_eq!(list.keys().collect::<Vec<_>>(), ["2", "10", id.as_str()]);
        assert_eq!(list[&id]["content"], "<s1>");
        assert_eq!(list[&id]["special"], true);
        assert!(list[&id].get("id").is_none());
        assert_eq!(json["z"], 1);
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let e = TextTokenizer::from_folder(dir.path()).err().unwrap();
        assert_eq!(e.kind(), ErrorKind::Tokenizer);
        assert!(e.to_string().contains("tokenizer.json: there is no tokenizer.json"), "{e}");
        fs::write(dir.path().join("tokenizer.model"), "").unwrap();
        let e = TextTokenizer::from_folder(dir.path()).err().unwrap().to_string();
        assert!(e.contains("convert"), "{e}");
        for broken in ["", "{", "{}", "[1]", "{\"model\": {\"type\": \"BPE\"}}"] {
            fs::write(dir.path().join(TOKENIZER_FILE), broken).unwrap();
            let e = TextTokenizer::from_folder(dir.path()).err().unwrap();
            assert_eq!(e.kind(), ErrorKind::Tokenizer);
        }
    }

    /// A word-level tokenizer with these ids.
    fn words(vocab: Value) -> Result<TextTokenizer> {
        let dir = tempfile::tempdir().unwrap();
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        });
        fs::write(dir.path().join(TOKENIZER_FILE), json.to_string()).unwrap();
        TextTokenizer::from_folder(dir.path())
    }

    #[test]
    fn ids_with_gaps_are_explained() {
        let mut tokenizer = words(serde_json::json!({"<unk>": 0, "a": 1, "cat": 3})).unwrap();
        let e = tokenizer.add_special_tokens(&["<s1>".into()]).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Tokenizer);
        let e = e.to_string();
        assert!(e.contains("cannot add the token `<s1>`: its id would be 3"), "{e}");
        assert!(e.contains("the id of `cat`") && !e.contains("Some("), "{e}");
        assert!(e.contains("3 tokens with ids up to 3") && e.contains("hint: "), "{e}");
        assert_eq!(tokenizer.vocab_size(), 4);
    }

    #[test]
    fn an_id_beyond_any_vocabulary_is_refused() {
        let e = words(serde_json::json!({"<unk>": 0, "a": u32::MAX})).err().unwrap().to_string();
        assert!(e.contains("a token id is out of range") && e.contains("4294967295"), "{e}");
    }

    #[test]
    fn a_pipe_in_place_of_the_tokenizer_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(TOKENIZER_FILE);
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        if made.is_ok_and(|status| status.success()) {
            let e = TextTokenizer::from_folder(dir.path()).err().unwrap().to_string();
            assert!(e.contains("not a regular file"), "{e}");
        }
    }

    #[test]
    fn a_panic_of_the_library_is_an_error() {
        let e = guarded(|| -> Result<(), tokenizers::Error> { panic!("index {}", 7) });
        let e = e.unwrap_err().to_string();
        assert!(e.contains("cannot handle this file: index 7"), "{e}");
    }

    #[test]
    fn leading_special_tokens_exclude_appended_ones() {
        let mut tokenizer = small();
        assert_eq!(tokenizer.leading_special_tokens().unwrap(), [1]);
        let both = tokenizers::processors::template::TemplateProcessing::builder()
            .try_single("<|bos|> $A <|eos|>")
            .unwrap()
            .special_tokens(vec![("<|bos|>", 1), ("<|eos|>", 2)])
            .build()
            .unwrap();
        tokenizer.inner.with_post_processor(Some(both));
        assert_eq!(tokenizer.encode("", true).unwrap(), [1, 2]);
        assert_eq!(tokenizer.leading_special_tokens().unwrap(), [1]);
    }
}
