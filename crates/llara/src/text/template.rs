//! What stands around a text, as data: prefix, suffix and how many trailing tokens are averaged.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::storage::read_limited;
use crate::{Error, ErrorKind, Result};

/// Largest template file that is read, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// Which side of the bi-encoder a text is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A text to search with.
    Query,
    /// A text to be found.
    Passage,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Query => "query",
            Role::Passage => "passage",
        })
    }
}

/// The text in front of and behind a query or a passage. Prefix, text and suffix are tokenized
/// apart, so no merge crosses a seam.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Affixes {
    /// In front of the text; may be empty.
    #[serde(default)]
    pub prefix: String,
    /// Behind the text; may be empty.
    #[serde(default)]
    pub suffix: String,
    /// Whether the sequence starts with the special tokens that the tokenizer puts in front of a
    /// text (BOS), before the prefix.
    #[serde(default = "yes")]
    pub special_tokens_in_prefix: bool,
}

fn yes() -> bool {
    true
}

/// How a model's inputs are put together and which of their tokens become the embedding.
///
/// ```
/// # use llara::text::{Role, Template};
/// let template = Template::preset("e5-mistral")?;
/// assert_eq!(template.affixes(Role::Query).suffix, "</s>");
/// assert_eq!(template.pooled_tokens, 1);
/// # Ok::<(), llara::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// What logs and saved models call it.
    pub name: String,
    /// How many trailing tokens of the whole sequence are averaged; 1 is last-token pooling. At most
    /// the number of tokens of either suffix, unless the suffix is empty.
    pub pooled_tokens: usize,
    /// Around a query.
    pub query: Affixes,
    /// Around a passage.
    pub passage: Affixes,
}

impl Template {
    /// The largest `pooled_tokens` of a valid template.
    pub const MAX_POOLED_TOKENS: usize = 1024;

    /// The names that [`Template::preset`] knows.
    pub const PRESETS: [&'static str; 3] = ["llara", "e5-mistral", "qwen3-embedding"];

    /// A template that the program ships.
    ///
    /// # Errors
    /// An unknown name.
    pub fn preset(name: &str) -> Result<Template> {
        match name {
            "llara" => Ok(llara()),
            "e5-mistral" => Ok(last_token(name, "</s>", true)),
            // Its tokenizer's own special token is the one that the suffix already spells out.
            "qwen3-embedding" => Ok(last_token(name, "<|endoftext|>", false)),
            _ => Err(Error::new(ErrorKind::Argument, format!("no template is called `{name}`"))
                .expected(format!("one of {}", Self::PRESETS.join(", ")))
                .hint("describe any other template in a TOML file and give its path")),
        }
    }

    /// Reads a template from a TOML file:
    ///
    /// ```
    /// # use llara::text::Template;
    /// # let folder = tempfile::tempdir().unwrap();
    /// # let path = folder.path().join("mean_of_two.toml");
    /// # std::fs::write(&path, r#"
    /// name = "mean-of-two"
    /// pooled_tokens = 2
    /// [query]
    /// prefix = "search: "
    /// suffix = "<a><b>"
    /// [passage]
    /// suffix = "<a><b>"
    /// # "#).unwrap();
    /// assert_eq!(Template::from_toml_file(&path)?.special_tokens(), ["<a>", "<b>"]);
    /// # Ok::<(), llara::Error>(())
    /// ```
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, has unknown or missing fields, or describes something
    /// impossible (see [`Template::validate`]).
    pub fn from_toml_file(path: impl AsRef<Path>) -> Result<Template> {
        let path = path.as_ref();
        let text = String::from_utf8(read_limited(path, "read the template", MOST_BYTES)?)
            .map_err(|e| {
                let before = &e.as_bytes()[..e.utf8_error().valid_up_to()];
                let line = 1 + before.iter().filter(|&&b| b == b'\n').count() as u64;
                Error::new(ErrorKind::Config, "bad template: not UTF-8").line(path, line)
            })?;
        let template: Template = toml::from_str(&text).map_err(|e| {
            let message: String = e.message().chars().filter(|c| !c.is_control()).collect();
            let error = Error::new(ErrorKind::Config, format!("bad template: {message}"))
                .expected("`name`, `pooled_tokens`, and tables `[query]` and `[passage]` with `prefix`, `suffix`, `special_tokens_in_prefix`");
            match e.span() {
                Some(span) => error.line(path, line_of(&text, span.start)),
                None => error.file(path),
            }
        })?;
        template.validate().map_err(|e| e.file(path))?;
        Ok(template)
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// The name is blank, `pooled_tokens` is out of its range, or a suffix spells out special tokens,
    /// but fewer than are pooled: the text in front of them would be pooled too.
    pub fn validate(&self) -> Result<()> {
        if self.name.trim().is_empty() {
            return Err(Error::new(ErrorKind::Config, "the template's `name` is blank"));
        }
        if !(1..=Self::MAX_POOLED_TOKENS).contains(&self.pooled_tokens) {
            return Err(Error::new(ErrorKind::Config, "`pooled_tokens` is out of range")
                .expected(format!("a whole number from 1 to {}", Self::MAX_POOLED_TOKENS))
                .got(self.pooled_tokens)
                .hint("the embedding is the mean over that many trailing tokens"));
        }
        for role in [Role::Query, Role::Passage] {
            let special = trailing_tokens(&self.affixes(role).suffix).len();
            if special > 0 && special < self.pooled_tokens {
                return Err(too_few_to_pool(self, role, special, "special tokens"));
            }
        }
        Ok(())
    }

    /// What stands around a text of this role.
    pub fn affixes(&self, role: Role) -> &Affixes {
        match role {
            Role::Query => &self.query,
            Role::Passage => &self.passage,
        }
    }

    /// The `<…>` tokens standing end to end at the tail of the suffixes, each once, the passage's
    /// first (LLARA: `<s1>` to `<s16>`). A tokenizer must know each as a single id, or pooling
    /// would average pieces of their spelling.
    pub fn special_tokens(&self) -> Vec<String> {
        let mut tokens: Vec<String> = Vec::new();
        for affixes in [&self.passage, &self.query] {
            for token in trailing_tokens(&affixes.suffix) {
                if !tokens.iter().any(|known| known == token) {
                    tokens.push(token.to_owned());
                }
            }
        }
        tokens
    }
}

/// The error of a template that pools more tokens than the suffix for `role` has.
pub(super) fn too_few_to_pool(template: &Template, role: Role, got: usize, what: &str) -> Error {
    let pooled = template.pooled_tokens;
    Error::new(
        ErrorKind::Config,
        format!(
            "`pooled_tokens` of template `{}` exceeds the {what} of the {role} suffix",
            template.name.escape_debug()
        ),
    )
    .expected(format!("at least {pooled} {what}, so that only the suffix is pooled"))
    .got(got)
    .hint("lower `pooled_tokens`, or add tokens to the suffix")
}

/// The maximal run of `<[^<>\s]+>` at the very end of `suffix`, in reading order.
pub(super) fn trailing_tokens(suffix: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = suffix;
    while let Some(start) = rest.rfind('<') {
        let Some(inner) = rest[start + 1..].strip_suffix('>') else { break };
        if inner.is_empty() || inner.contains(|c: char| c == '>' || c.is_whitespace()) {
            break;
        }
        tokens.push(&rest[start..]);
        rest = &rest[..start];
    }
    tokens.reverse();
    tokens
}

/// LLARA (Llama2Vec): a passage's last eight tokens predict the passage itself, a query's the
/// passage that would follow it.
fn llara() -> Template {
    let tokens =
        |ids: std::ops::RangeInclusive<u32>| -> String { ids.map(|i| format!("<s{i}>")).collect() };
    let affixes = |suffix| Affixes { prefix: "\"".into(), suffix, special_tokens_in_prefix: true };
    Template {
        name: "llara".into(),
        pooled_tokens: 8,
        query: affixes(format!(
            "\", predict the following passage within eight words: {}",
            tokens(9..=16)
        )),
        passage: affixes(format!(
            "\", summarize the above passage within eight words: {}",
            tokens(1..=8)
        )),
    }
}

/// The same on both sides: the text and one closing token, which is the embedding.
fn last_token(name: &str, suffix: &str, special_tokens_in_prefix: bool) -> Template {
    let affixes =
        Affixes { prefix: String::new(), suffix: suffix.into(), special_tokens_in_prefix };
    Template { name: name.into(), pooled_tokens: 1, query: affixes.clone(), passage: affixes }
}

fn line_of(text: &str, offset: usize) -> u64 {
    1 + text.bytes().take(offset).filter(|&b| b == b'\n').count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn llara_is_the_papers() {
        let t = Template::preset("llara").unwrap();
        assert_eq!(
            t.query.suffix,
            "\", predict the following passage within eight words: <s9><s10><s11><s12><s13><s14><s15><s16>"
        );
        assert_eq!(
            t.passage.suffix,
            "\", summarize the above passage within eight words: <s1><s2><s3><s4><s5><s6><s7><s8>"
        );
        assert_eq!(t.special_tokens(), (1..=16).map(|i| format!("<s{i}>")).collect::<Vec<_>>());
        assert_eq!((t.pooled_tokens, t.query.prefix.as_str()), (8, "\""));
    }

    #[test]
    fn presets_validate_and_round_trip() {
        for name in Template::PRESETS {
            let t = Template::preset(name).unwrap();
            t.validate().unwrap();
            assert_eq!(t.name, name);
            assert_eq!(toml::from_str::<Template>(&toml::to_string(&t).unwrap()).unwrap(), t);
            assert_eq!(
                serde_json::from_str::<Template>(&serde_json::to_string(&t).unwrap()).unwrap(),
                t
            );
        }
        let e = Template::preset("nope").unwrap_err().to_string();
        assert!(e.contains("llara, e5-mistral, qwen3-embedding"), "{e}");
        assert!(!Template::preset("qwen3-embedding").unwrap().query.special_tokens_in_prefix);
    }

    #[test]
    fn trailing_tokens_stop_at_the_first_other_character() {
        assert_eq!(trailing_tokens("x <a> <b><c>"), ["<b>", "<c>"]);
        assert_eq!(trailing_tokens("</s>"), ["</s>"]);
        assert_eq!(trailing_tokens("<|endoftext|>"), ["<|endoftext|>"]);
        for none in ["", "<a> ", "<a>.", "<>", "<a b>", "a>", "<a", "<a>>"] {
            assert!(trailing_tokens(none).is_empty(), "{none}");
        }
        assert_eq!(trailing_tokens("<<a>"), ["<a>"]);
    }

    #[test]
    fn a_bad_file_is_refused_with_its_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        let refuse = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Template::from_toml_file(&path).unwrap_err().to_string()
        };
        let e = refuse("name = \"t\"\npooled_tokens = 1\n[query]\nsufix = \"\"\n[passage]\n");
        assert!(e.contains("t.toml:4: ") && e.contains("sufix"), "{e}");
        for number in ["0", "1025", "99999999999"] {
            let e =
                refuse(&format!("name = \"t\"\npooled_tokens = {number}\n[query]\n[passage]\n"));
            assert!(e.contains("`pooled_tokens` is out of range") && e.contains(number), "{e}");
        }
        assert!(refuse("name = \" \"\npooled_tokens = 1\n[query]\n[passage]\n").contains("blank"));
        assert!(refuse("name = \"t\"\npooled_tokens = 1\n[query]\n").contains("passage"));
        std::fs::write(&path, "name = \"t\"\npooled_tokens = 1\n[query]\n[passage]\n").unwrap();
        let t = Template::from_toml_file(&path).unwrap();
        assert!(t.query.special_tokens_in_prefix && t.special_tokens().is_empty());
    }

    #[test]
    fn no_more_tokens_are_pooled_than_the_suffix_has() {
        for number in [9, 50, 100] {
            let template = Template { pooled_tokens: number, ..Template::preset("llara").unwrap() };
            let e = template.validate().unwrap_err();
            assert_eq!(e.kind(), ErrorKind::Config);
            let e = e.to_string();
            assert!(e.contains("exceeds the special tokens of the query suffix"), "{e}");
            assert!(e.contains(&format!("at least {number} special tokens")), "{e}");
            assert!(e.contains("got: 8") && e.contains("hint"), "{e}");
        }
        let fewer = Template { pooled_tokens: 3, ..Template::preset("llara").unwrap() };
        fewer.validate().unwrap();
    }

    #[test]
    fn bytes_that_are_not_utf8_are_named_with_their_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        std::fs::write(&path, b"name = \"t\"\npooled_tokens = \xff").unwrap();
        let e = Template::from_toml_file(&path).unwrap_err().to_string();
        assert!(e.contains("t.toml:2: ") && e.contains("not UTF-8"), "{e}");
    }

    proptest! {
        #[test]
        fn any_template_survives_toml(
            name in "\\PC{1,9}", pooled_tokens in 1usize..99, prefix in any::<String>(),
            suffix in any::<String>(), special_tokens_in_prefix: bool,
        ) {
            let query = Affixes { prefix, suffix, special_tokens_in_prefix };
            let t = Template { name, pooled_tokens, passage: query.clone(), query };
            t.special_tokens();
            prop_assert_eq!(&toml::from_str::<Template>(&toml::to_string(&t).unwrap()).unwrap(), &t);
        }

        #[test]
        fn joined_tokens_are_found_again(names in prop::collection::vec("[a-z|/0-9]{1,5}", 0..9)) {
            let tokens: Vec<String> = names.iter().map(|n| format!("<{n}>")).collect();
            let suffix = format!("say it: {}", tokens.concat());
            prop_assert_eq!(trailing_tokens(&suffix), tokens);
        }
    }
}
