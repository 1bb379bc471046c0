//! Templates: prefix and suffix of a text, and the number of trailing tokens that are averaged.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::storage::read_toml;
use crate::{Error, ErrorKind, Result};

/// What a template file contains, for errors.
const EXPECTED: &str = "`name`, `pooled_tokens`, and tables `[query]` and `[passage]` with `prefix`, `suffix`, \
    `special_tokens_in_prefix`";

/// Whether a text is a query or a passage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// A text that passages are searched for.
    Query,
    /// A text that is searched.
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

/// The prefix and the suffix of a query or a passage. Prefix, text and suffix are tokenized separately,
/// so no token spans two of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Affixes {
    /// Prepended to the text; may be empty.
    #[serde(default)]
    pub prefix: String,
    /// Appended to the text; may be empty.
    #[serde(default)]
    pub suffix: String,
    /// Whether the sequence starts with the special tokens that the tokenizer prepends to a text (BOS),
    /// followed by the prefix.
    #[serde(default = "yes")]
    pub special_tokens_in_prefix: bool,
}

fn yes() -> bool {
    true
}

/// The format of a model's inputs, and the tokens whose hidden states give the embedding.
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
    /// Name, for logs and saved models.
    pub name: String,
    /// Number of trailing tokens of the sequence that are averaged; 1 is last-token pooling. At most the
    /// number of tokens of either suffix, unless the suffix is empty.
    pub pooled_tokens: usize,
    /// Prefix and suffix of a query.
    pub query: Affixes,
    /// Prefix and suffix of a passage.
    pub passage: Affixes,
}

impl Template {
    /// The largest `pooled_tokens` of a valid template.
    pub const MAX_POOLED_TOKENS: usize = 1024;

    /// The names that [`Template::preset`] accepts.
    pub const PRESETS: [&'static str; 3] = ["llara", "e5-mistral", "qwen3-embedding"];

    /// A built-in template.
    ///
    /// # Errors
    /// [`ErrorKind::Argument`]: there is no such template.
    pub fn preset(name: &str) -> Result<Template> {
        match name {
            "llara" => Ok(llara()),
            "e5-mistral" => Ok(last_token(name, "</s>", true)),
            // Its tokenizer appends the token that the suffix already contains.
            "qwen3-embedding" => Ok(last_token(name, "<|endoftext|>", false)),
            _ => Err(Error::new(ErrorKind::Argument, format!("there is no template `{name}`"))
                .expected(format!("one of {}", Self::PRESETS.join(", ")))
                .hint(
                    "to use another template, define it in a TOML file and give the file's path",
                )),
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
    /// The file cannot be read, is not TOML, has unknown or missing fields, or is not valid (see
    /// [`Template::validate`]).
    pub fn from_toml_file(path: impl AsRef<Path>) -> Result<Template> {
        let path = path.as_ref();
        let template: Template = read_toml(path, "the template", EXPECTED)?;
        template.validate().map_err(|e| e.file(path))?;
        Ok(template)
    }

    /// Checks the values of the fields.
    ///
    /// # Errors
    /// The name is empty or white space, `pooled_tokens` is out of range, or a suffix ends in fewer special
    /// tokens than are pooled: tokens of the text would be pooled too.
    pub fn validate(&self) -> Result<()> {
        if self.name.trim().is_empty() {
            return Err(Error::new(ErrorKind::Config, "the template's `name` is empty"));
        }
        if !(1..=Self::MAX_POOLED_TOKENS).contains(&self.pooled_tokens) {
            return Err(Error::new(ErrorKind::Config, "`pooled_tokens` is out of range")
                .expected(format!("an integer from 1 to {}", Self::MAX_POOLED_TOKENS))
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

    /// Prefix and suffix of a text of this role.
    pub fn affixes(&self, role: Role) -> &Affixes {
        match role {
            Role::Query => &self.query,
            Role::Passage => &self.passage,
        }
    }

    /// The consecutive `<…>` tokens at the end of the suffixes, each once, first those of the passage
    /// (LLARA: `<s1>` to `<s16>`). Each must be a single id of the tokenizer; otherwise the tokens of its
    /// spelling would be pooled.
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

/// LLARA (Llama2Vec): the last eight tokens of a passage summarize the passage; those of a query predict
/// the passage that follows.
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

/// The same for both roles: the text and one token, whose hidden state gives the embedding.
fn last_token(name: &str, suffix: &str, special_tokens_in_prefix: bool) -> Template {
    let affixes =
        Affixes { prefix: String::new(), suffix: suffix.into(), special_tokens_in_prefix };
    Template { name: name.into(), pooled_tokens: 1, query: affixes.clone(), passage: affixes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_llara_template_is_that_of_the_paper() {
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
        assert!(
            refuse("name = \" \"\npooled_tokens = 1\n[query]\n[passage]\n").contains("is empty")
        );
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
        fn any_template_round_trips_through_toml(
            name in "\\PC{1,9}", pooled_tokens in 1usize..99, prefix in any::<String>(),
            suffix in any::<String>(), special_tokens_in_prefix: bool,
        ) {
            let query = Affixes { prefix, suffix, special_tokens_in_prefix };
            let t = Template { name, pooled_tokens, passage: query.clone(), query };
            t.special_tokens();
            prop_assert_eq!(&toml::from_str::<Template>(&toml::to_string(&t).unwrap()).unwrap(), &t);
        }

        #[test]
        fn concatenated_tokens_are_split(names in prop::collection::vec("[a-z|/0-9]{1,5}", 0..9)) {
            let tokens: Vec<String> = names.iter().map(|n| format!("<{n}>")).collect();
            let suffix = format!("say it: {}", tokens.concat());
            prop_assert_eq!(trailing_tokens(&suffix), tokens);
        }
    }
}
