//! The tokenizer against the vocabulary of the model, and the template against the tokenizer.

use std::path::Path;

use serde::Deserialize;

use super::config::Config;
use super::report::{Finding, Findings, Status};
use crate::biencoder::{RECIPE_FILE, Recipe};
use crate::storage::read_file;
use crate::text::{PromptEncoder, Role, Template, TextTokenizer};

const TOKENIZER: &str = "tokenizer";
const TEMPLATE: &str = "template";
const RECIPE: &str = "recipe";
const FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";

/// The settings of `tokenizer.json` that other tools apply.
#[derive(Deserialize)]
struct Stored {
    truncation: Option<Truncation>,
}

#[derive(Deserialize)]
struct Truncation {
    max_length: u64,
}

/// Reads the tokenizer of `dir` and compares its ids with the vocabulary.
pub(super) fn check_tokenizer(
    dir: &Path,
    config: Option<&Config>,
    findings: &mut Findings<'_>,
) -> Option<TextTokenizer> {
    let tokenizer = match TextTokenizer::from_folder(dir) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            findings.fail(TOKENIZER, &error);
            return None;
        }
    };
    let size = tokenizer.vocab_size();
    if let Some(config) = config {
        let rows = config.decoder.vocab_size;
        let beyond = tokenizer.tokens_from(rows);
        if let Some((id, token)) = beyond.first() {
            // Texts contain an added token only where somebody writes it.
            let added = beyond.iter().all(|(_, token)| tokenizer.is_added(token));
            let status = if added { Status::Warning } else { Status::Error };
            let what = format!("{} tokens have no embedding in the model", beyond.len());
            findings.push(
                Finding::new(status, TOKENIZER, FILE, what)
                    .expected(format!("ids below the vocab_size of config.json, {rows}"))
                    .got(format!("`{}` with id {id}", token.escape_debug()))
                    .hint("use the tokenizer of this model, or enlarge its embeddings"),
            );
        } else {
            findings.ok(
                TOKENIZER,
                FILE,
                format!("ids up to {}, vocab_size {rows}", size.max(1) - 1),
            );
        }
    }
    for named in tokenizer.named_tokens() {
        if tokenizer.token_id(&named.token).is_none() {
            let what = format!("`{}` is not a token of tokenizer.json", named.key);
            findings.push(
                Finding::new(Status::Warning, TOKENIZER, CONFIG_FILE, what)
                    .got(format!("{:?}", named.token))
                    .hint(
                        "transformers would add it with an id for which the model has no embedding",
                    ),
            );
        }
    }
    let stored = read_file(&dir.join(FILE)).ok();
    let stored = stored.and_then(|text| serde_json::from_slice::<Stored>(&text).ok());
    if let Some(Truncation { max_length }) = stored.and_then(|stored| stored.truncation) {
        let what = "a truncation length is stored in the file; the tokenizers library applies it"
            .to_owned();
        findings.push(
            Finding::new(Status::Warning, TOKENIZER, FILE, what)
                .expected("\"truncation\": null")
                .got(format!("max_length {max_length}"))
                .hint("llara and transformers ignore it; set it to null for other tools"),
        );
    }
    Some(tokenizer)
}

/// Reads the recipe of `dir`. The second value is false where it is only the default.
pub(super) fn check_recipe(dir: &Path, findings: &mut Findings<'_>) -> Option<(Recipe, bool)> {
    match Recipe::read(dir) {
        Ok(Some(recipe)) => {
            let (name, pooled) = (&recipe.template.name, recipe.template.pooled_tokens);
            let what = format!(
                "template {}, mean of the last {pooled} tokens, {}, at most {} tokens of a query and {} of a \
                 passage",
                name.escape_debug(),
                if recipe.normalized { "normalized" } else { "not normalized" },
                recipe.query_max_len,
                recipe.passage_max_len
            );
            findings.ok(RECIPE, RECIPE_FILE, what);
            Some((recipe, true))
        }
        Ok(None) => {
            let what = "there is no llara.json: the template and the lengths of the training are not known";
            findings.push(
                Finding::new(Status::Warning, RECIPE, RECIPE_FILE, what.to_owned())
                    .hint("give --template to llara's verbs; template llara is the default"),
            );
            Some((Recipe::new(Template::preset("llara").ok()?), false))
        }
        Err(error) => {
            findings.fail(RECIPE, &error);
            None
        }
    }
}

/// Tokenizes the template. Where the recipe is only the default, a template that does not fit is a warning.
pub(super) fn check_template(
    (recipe, is_saved): &(Recipe, bool),
    tokenizer: TextTokenizer,
    config: &Config,
    findings: &mut Findings<'_>,
) -> Option<PromptEncoder> {
    let status = if *is_saved { Status::Error } else { Status::Warning };
    let template = recipe.template.clone();
    let prompts = match PromptEncoder::new(tokenizer, template, config.decoder.vocab_size) {
        Ok(prompts) => prompts,
        Err(error) => {
            findings.add_error(status, TEMPLATE, &error.file(findings.dir.join(FILE)));
            return None;
        }
    };
    let before = findings.list.len();
    let positions = config.decoder.max_position_embeddings;
    for role in [Role::Query, Role::Passage] {
        let max_len = recipe.max_len(role);
        if let Err(error) = prompts.check_max_len(role, max_len) {
            findings.add_error(status, TEMPLATE, &error.file(findings.dir.join(RECIPE_FILE)));
        }
        if max_len > positions {
            let what = format!("the maximum {role} length is larger than the model supports");
            findings.push(
                Finding::new(Status::Warning, TEMPLATE, RECIPE_FILE, what)
                    .expected(format!("at most {positions} tokens (max_position_embeddings)"))
                    .got(max_len)
                    .hint("embeddings of longer texts may be poor"),
            );
        }
    }
    if findings.list.len() == before {
        let tokens = recipe.template.special_tokens();
        let what = match tokens.as_slice() {
            [] => "prefix and suffix have no special tokens".to_owned(),
            [one] => format!("`{}` is a single token", one.escape_debug()),
            [first, .., last] => format!(
                "`{}` to `{}` are {} single tokens",
                first.escape_debug(),
                last.escape_debug(),
                tokens.len()
            ),
        };
        findings.ok(TEMPLATE, FILE, what);
    }
    let fits = |role| prompts.check_max_len(role, recipe.max_len(role)).is_ok();
    (fits(Role::Query) && fits(Role::Passage)).then_some(prompts)
}
