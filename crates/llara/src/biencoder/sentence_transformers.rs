//! What of a recipe sentence-transformers can express: a prompt in front of the text, the special tokens that
//! the tokenizer itself adds, pooling of the last token, and normalization.

use super::Recipe;
use crate::Result;
use crate::text::{PromptEncoder, Role, TextTokenizer};

/// Beginnings of texts: letters, digits, white space, punctuation, other scripts. If each of them gives the
/// same ids after a prompt as alone, no token spans the seam.
const BEGINNINGS: [&str; 12] =
    ["a", "The otter", "zzz", "7 days", "  two", "\tx", "\nline", "\"q\"", "(1)", "é", "水", "🚢"];

/// The settings of a sentence-transformers folder that gives the embeddings of a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StLayout {
    /// In front of queries.
    pub(crate) query_prompt: String,
    /// In front of passages.
    pub(crate) passage_prompt: String,
    /// One length for both roles, in tokens, special tokens included: the larger one.
    pub(crate) max_seq_length: usize,
    /// Whether embeddings are L2-normalized.
    pub(crate) normalized: bool,
}

/// A property of a recipe or tokenizer that sentence-transformers cannot express.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Obstacle {
    /// What, in one sentence without a full stop.
    pub(crate) what: String,
    /// What to do.
    pub(crate) hint: Option<&'static str>,
}

const POST_PROCESSOR: &str = "the tokenizer must add these tokens itself: start the training from a model whose \
    tokenizer.json has them in its post-processor (TemplateProcessing), as Qwen3-Embedding has";

impl StLayout {
    /// The layout for a recipe, or everything that prevents it.
    ///
    /// # Errors
    /// The tokenizer cannot encode short texts.
    pub(crate) fn new(
        recipe: &Recipe,
        prompts: &PromptEncoder,
    ) -> Result<std::result::Result<Self, Vec<Obstacle>>> {
        let mut obstacles = Vec::new();
        if recipe.template.pooled_tokens != 1 {
            obstacles.push(Obstacle {
                what: format!(
                    "the embedding is the mean of the last {} tokens; the pooling modes are the first token, \
                     the last one, or all",
                    recipe.template.pooled_tokens
                ),
                hint: Some("use transformers; README.md of a saved model has the code"),
            });
        }
        let tokenizer = prompts.tokenizer();
        for role in [Role::Query, Role::Passage] {
            affix_obstacles(recipe, prompts, role, &mut obstacles)?;
        }
        if !tokenizer.named_tokens().iter().any(|named| named.key == "pad_token") {
            obstacles.push(Obstacle {
                what: "tokenizer_config.json names no pad_token, which batches need".to_owned(),
                hint: Some(
                    "set `pad_token` in tokenizer_config.json, for example to the EOS token",
                ),
            });
        }
        if !obstacles.is_empty() {
            return Ok(Err(obstacles));
        }
        let prompt =
            |role| format!("{}{}", recipe.template.affixes(role).prefix, recipe.instruction(role));
        Ok(Ok(StLayout {
            query_prompt: prompt(Role::Query),
            passage_prompt: prompt(Role::Passage),
            max_seq_length: recipe.query_max_len.max(recipe.passage_max_len),
            normalized: recipe.normalized,
        }))
    }
}

fn affix_obstacles(
    recipe: &Recipe,
    prompts: &PromptEncoder,
    role: Role,
    obstacles: &mut Vec<Obstacle>,
) -> Result<()> {
    let (template, tokenizer) = (&recipe.template, prompts.tokenizer());
    let affixes = template.affixes(role);
    let mut add = |what: String, hint| {
        let obstacle = Obstacle { what, hint };
        // Both roles often have the same one.
        if !obstacles.contains(&obstacle) {
            obstacles.push(obstacle);
        }
    };
    let leading = tokenizer.leading_special_tokens()?;
    if !affixes.special_tokens_in_prefix && !leading.is_empty() {
        let shown = spell(tokenizer, &leading);
        add(format!("the tokenizer prepends {shown}, the template does not"), None);
    }
    let (trailing, (_, suffix)) = (tokenizer.trailing_special_tokens()?, prompts.affixes(role));
    if trailing != suffix {
        let (appended, wanted) = (spell(tokenizer, &trailing), spell(tokenizer, suffix));
        let what = match (trailing.is_empty(), suffix.is_empty()) {
            (true, _) => format!("the suffix {wanted} is not appended by the tokenizer"),
            (_, true) => format!("the tokenizer appends {appended}, the template nothing"),
            _ => format!("the tokenizer appends {appended}, the template {wanted}"),
        };
        let special = suffix
            .iter()
            .all(|&id| tokenizer.token(id).is_some_and(|token| tokenizer.is_added(&token)));
        add(what, if special { Some(POST_PROCESSOR) } else { None });
    }
    let prompt = format!("{}{}", affixes.prefix, recipe.instruction(role));
    if prompt.starts_with(char::is_whitespace) {
        add(format!("the {role} prompt begins with white space, which is removed there"), None);
    }
    if let Some(what) = seam(tokenizer, recipe, role)? {
        add(
            what,
            Some("end the prefix with a special token of the tokenizer, or use an instruction"),
        );
    }
    Ok(())
}

/// Why the prefix of the template, which is tokenized apart from the text, is not the same as a prompt,
/// which is tokenized together with it; `None` if it is.
fn seam(tokenizer: &TextTokenizer, recipe: &Recipe, role: Role) -> Result<Option<String>> {
    let prefix = &recipe.template.affixes(role).prefix;
    if prefix.is_empty() {
        return Ok(None);
    }
    let apart = tokenizer.encode(prefix, false)?;
    for beginning in BEGINNINGS {
        let text = format!("{}{beginning}", recipe.instruction(role));
        let expected = [&apart[..], &tokenizer.encode(&text, false)?].concat();
        if tokenizer.encode(&format!("{prefix}{text}"), false)? != expected {
            return Ok(Some(format!(
                "the {role} prefix {prefix:?} is tokenized apart from the text; together with {text:?} it \
                 gives other tokens"
            )));
        }
    }
    // Only an added token is never merged with the characters after it; the texts above are examples.
    let last = apart.last().and_then(|&id| tokenizer.token(id));
    Ok(match last.is_some_and(|token| tokenizer.is_added(&token)) {
        true => None,
        false => Some(format!("the {role} prefix {prefix:?} could be merged with some texts")),
    })
}

/// Tokens for a message.
fn spell(tokenizer: &TextTokenizer, ids: &[u32]) -> String {
    let token = |&id: &u32| tokenizer.token(id).unwrap_or_else(|| format!("id {id}"));
    ids.iter().map(|id| format!("`{}`", token(id).escape_debug())).collect::<Vec<_>>().join(" ")
}
