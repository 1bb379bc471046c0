//! What of a recipe sentence-transformers can express: a prompt in front of the text, the special tokens that
//! the tokenizer itself adds, pooling of the last token, and normalization.

use std::collections::BTreeMap;

use serde_json::json;

use super::Recipe;
use crate::Result;
use crate::data::{Instructions, passage_prompt_name};
use crate::text::{PromptEncoder, Role, TextTokenizer};

/// Beginnings of texts: letters, digits, white space, punctuation, other scripts. If each of them gives the
/// same ids after a prompt as alone, no token spans the seam.
const BEGINNINGS: [&str; 12] =
    ["a", "The otter", "zzz", "7 days", "  two", "\tx", "\nline", "\"q\"", "(1)", "é", "水", "🚢"];

/// The settings of a sentence-transformers folder that gives the embeddings of a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StLayout {
    /// What is put in front of texts, by name: `query` and `passage`, and for each task its name, for queries, and
    /// its name with `-passage`.
    pub(crate) prompts: BTreeMap<String, String>,
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
        for (_, role, instruction) in named_instructions(recipe) {
            affix_obstacles(recipe, prompts, (role, instruction), &mut obstacles)?;
        }
        if !tokenizer.named_tokens().iter().any(|named| named.key == "pad_token") {
            obstacles.push(Obstacle {
                what: "tokenizer_config.json names no pad_token, which batches need".to_owned(),
                hint: Some(
                    "set `pad_token` in tokenizer_config.json, for example to the EOS token",
                ),
            });
        }
        let clash =
            recipe.tasks.keys().find(|t| recipe.tasks.contains_key(&passage_prompt_name(t)));
        if let Some(task) = clash {
            let what = format!("a task has the name of the passage prompt of the task `{task}`");
            obstacles.push(Obstacle { what, hint: None });
        }
        if !obstacles.is_empty() {
            return Ok(Err(obstacles));
        }
        let prompt = |(name, role, instruction)| {
            (name, format!("{}{instruction}", recipe.template.affixes(role).prefix))
        };
        Ok(Ok(StLayout {
            prompts: named_instructions(recipe).into_iter().map(prompt).collect(),
            max_seq_length: recipe.query_max_len.max(recipe.passage_max_len),
            normalized: recipe.normalized,
        }))
    }
}

impl StLayout {
    /// Names and contents of the files for a model with embeddings of `dimension` numbers.
    ///
    /// text-embeddings-inference reads the pooling in the spelling with one key per mode, which
    /// sentence-transformers reads, too.
    pub(crate) fn files(&self, dimension: usize) -> [(&'static str, String); 4] {
        let module = |idx: usize, path: &str, class: &str| {
            let class = format!("sentence_transformers.models.{class}");
            json!({"idx": idx, "name": idx.to_string(), "path": path, "type": class})
        };
        let mut modules = vec![module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")];
        if self.normalized {
            modules.push(module(2, "2_Normalize", "Normalize"));
        }
        let pooling = json!({
            "word_embedding_dimension": dimension,
            "pooling_mode_cls_token": false,
            "pooling_mode_mean_tokens": false,
            "pooling_mode_max_tokens": false,
            "pooling_mode_mean_sqrt_len_tokens": false,
            "pooling_mode_weightedmean_tokens": false,
            "pooling_mode_lasttoken": true,
            "include_prompt": true,
        });
        let settings = json!({
            "prompts": self.prompts,
            "default_prompt_name": null,
            "similarity_fn_name": if self.normalized { "cosine" } else { "dot" },
        });
        let length = json!({"max_seq_length": self.max_seq_length, "do_lower_case": false});
        [
            ("modules.json", format!("{:#}\n", json!(modules))),
            ("1_Pooling/config.json", format!("{pooling:#}\n")),
            ("config_sentence_transformers.json", format!("{settings:#}\n")),
            ("sentence_bert_config.json", format!("{length:#}\n")),
        ]
    }
}

/// The instructions of a recipe: the name of their prompt, their role, and the instruction.
fn named_instructions(recipe: &Recipe) -> Vec<(String, Role, &str)> {
    let general =
        [Role::Query, Role::Passage].map(|role| (role.to_string(), role, recipe.instruction(role)));
    let of_tasks = recipe.tasks.iter().flat_map(|(task, Instructions { query, passage })| {
        [
            (task.clone(), Role::Query, query.as_str()),
            (passage_prompt_name(task), Role::Passage, passage.as_str()),
        ]
    });
    general.into_iter().chain(of_tasks).collect()
}

fn affix_obstacles(
    recipe: &Recipe,
    prompts: &PromptEncoder,
    (role, instruction): (Role, &str),
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
        let (appended, wanted) = (spell(tokenizer, &trailing), &affixes.suffix);
        let what = match (trailing.is_empty(), suffix.is_empty()) {
            (true, _) => format!("the {role} suffix {wanted:?} is not appended by the tokenizer"),
            (_, true) => format!("the tokenizer appends {appended}, the {role} template nothing"),
            _ => format!("the tokenizer appends {appended}, the {role} template {wanted:?}"),
        };
        let special = suffix
            .iter()
            .all(|&id| tokenizer.token(id).is_some_and(|token| tokenizer.is_added(&token)));
        add(what, (special && !suffix.is_empty()).then_some(POST_PROCESSOR));
    }
    let prompt = format!("{}{instruction}", affixes.prefix);
    if prompt.starts_with(char::is_whitespace) {
        add(format!("the {role} prompt begins with white space, which is removed there"), None);
    }
    if let Some(what) = seam(tokenizer, &affixes.prefix, (role, instruction))? {
        add(
            what,
            Some("end the prefix with a special token of the tokenizer, or use an instruction"),
        );
    }
    Ok(())
}

/// Why the prefix of the template, which is tokenized apart from the text, is not the same as a prompt,
/// which is tokenized together with it; `None` if it is.
fn seam(
    tokenizer: &TextTokenizer,
    prefix: &str,
    (role, instruction): (Role, &str),
) -> Result<Option<String>> {
    if prefix.is_empty() {
        return Ok(None);
    }
    let apart = tokenizer.encode(prefix, false)?;
    for beginning in BEGINNINGS {
        let text = format!("{instruction}{beginning}");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Affixes, Template, train_bpe};

    /// The layout of a template for a tokenizer that appends `</s>`, that has the added token `<q>`, and that
    /// merges b and a.
    fn layout(query: &str, passage: &str, suffix: &str) -> std::result::Result<StLayout, String> {
        let special = ["</s>", "<q>"].map(str::to_owned);
        let texts = (0..9).map(|_| "ba ba ba".to_owned());
        let mut tokenizer = train_bpe(texts, 300, &special).unwrap();
        let affixes = |prefix: &str, suffix: &str| Affixes {
            prefix: prefix.to_owned(),
            suffix: suffix.to_owned(),
            special_tokens_in_prefix: true,
        };
        let mut template = Template::preset("e5-mistral").unwrap();
        tokenizer.follow_template(&template).unwrap();
        (template.query, template.passage) = (affixes(query, suffix), affixes(passage, suffix));
        let mut recipe = Recipe::new(template.clone());
        recipe.query_instruction = "find: ".to_owned();
        let task = Instructions { query: "ask: ".to_owned(), passage: "page: ".to_owned() };
        recipe.tasks.insert("nq".to_owned(), task);
        let size = tokenizer.vocab_size();
        let prompts = PromptEncoder::new(tokenizer, template, size).unwrap();
        StLayout::new(&recipe, &prompts).unwrap().map_err(|obstacles| format!("{obstacles:?}"))
    }

    #[test]
    fn instructions_and_prefixes_that_end_in_a_special_token_are_prompts() {
        let layout = layout("<q>", "", "</s>").unwrap();
        let prompts: Vec<_> =
            layout.prompts.iter().map(|(name, prompt)| (&**name, &**prompt)).collect();
        assert_eq!(
            prompts,
            [("nq", "<q>ask: "), ("nq-passage", "page: "), ("passage", ""), ("query", "<q>find: ")]
        );
        assert_eq!((layout.max_seq_length, layout.normalized), (128, true));
    }

    #[test]
    fn a_prefix_that_merges_with_a_text_is_no_prompt() {
        for (query, passage, part) in [
            ("", "b", "gives other tokens"),
            ("", "ask: ", "could be merged with some texts"),
            ("", " <q>", "begins with white space"),
        ] {
            let obstacles = layout(query, passage, "</s>").unwrap_err();
            assert!(obstacles.contains(part) && obstacles.contains("passage"), "{obstacles}");
        }
        let obstacles = layout("", "", "end</s>").unwrap_err();
        assert!(obstacles.contains("the tokenizer appends `</s>`"), "{obstacles}");
    }
}
