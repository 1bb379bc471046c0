//! Which tools give the embeddings of the folder, with which settings, and what prevents the others.

use serde_json::{Map, Value, json};

use super::config::Config;
use super::report::{Report, Tool};
use crate::biencoder::{Obstacle, Recipe, StLayout};
use crate::model::Family;
use crate::text::Role;

const TRANSFORMERS: &str = "transformers";
const PEFT: &str = "peft";
const SENTENCE_TRANSFORMERS: &str = "sentence-transformers";
const TEXT_EMBEDDINGS_INFERENCE: &str = "text-embeddings-inference";

/// What is known of the folder after the other checks.
pub(super) struct Served<'s> {
    /// `None` where it is damaged.
    pub(super) recipe: Option<&'s Recipe>,
    /// The base model's, of an adapter.
    pub(super) config: Option<&'s Config>,
    /// What sentence-transformers can express of the recipe, or what prevents it; `None` where that is not
    /// known.
    pub(super) layout: Option<Result<StLayout, Vec<Obstacle>>>,
    /// Whether `modules.json` is in the folder and gives the embeddings of the recipe.
    pub(super) has_modules: bool,
    /// Checks that found errors, each once.
    pub(super) errors: Vec<&'static str>,
}

/// The tools for a model.
pub(super) fn tools_for_model(served: &Served<'_>) -> Vec<Tool> {
    let mut transformers = Tool {
        settings: plain_settings(served, "AutoModel"),
        ..usable(TRANSFORMERS, &served.errors)
    };
    if served.recipe.is_none() && served.errors.is_empty() {
        transformers.reasons.push("template, pooling and lengths are not known".to_owned());
    }
    vec![transformers, sentence_transformers(served), text_embeddings_inference(served)]
}

/// Token embeddings of an adapter.
pub(super) struct TokenRows {
    /// One past the largest token id with an embedding in the adapter; 0 if it has none.
    pub(super) needed: usize,
    /// Token embeddings of the base model, if that is given.
    pub(super) of_base: Option<usize>,
    /// Whether the adapter's folder has a tokenizer.
    pub(super) own_tokenizer: bool,
}

/// The tools for an adapter. `base` is the recorded base model.
pub(super) fn tools_for_adapter(
    served: &Served<'_>,
    base: Option<&str>,
    rows: &TokenRows,
) -> Vec<Tool> {
    let mut settings = plain_settings(served, "PeftModel");
    if let Some(base) = base {
        settings.insert("base_model".to_owned(), json!(base));
    }
    if rows.own_tokenizer {
        settings.insert("tokenizer".to_owned(), json!("that of the adapter's folder"));
    }
    let needed = rows.needed;
    let mut peft = usable(PEFT, &served.errors);
    match rows.of_base {
        Some(of_base) if of_base >= needed => {}
        Some(_) => {
            settings.insert("resize_token_embeddings".to_owned(), json!(needed));
            peft.reasons.push(format!(
                "the base model needs rows for the adapter's tokens: call \
                 model.resize_token_embeddings({needed}) before the adapter is loaded"
            ));
        }
        None if needed > 0 => peft.reasons.push(format!(
            "if the base model has fewer than {needed} token embeddings, call \
             model.resize_token_embeddings({needed}) before the adapter is loaded"
        )),
        None => {}
    }
    peft.settings = settings;
    let merged = |name| {
        let reason = "it is an adapter, and the tool needs a complete model".to_owned();
        Tool { reasons: vec![reason], hint: Some(MERGE.to_owned()), ..refused(name) }
    };
    vec![peft, merged(SENTENCE_TRANSFORMERS), merged(TEXT_EMBEDDINGS_INFERENCE)]
}

const MERGE: &str = "merge it first: llara merge --model BASE --adapter DIR --output-dir MERGED";

fn refused(name: &'static str) -> Tool {
    Tool { name, serves: false, settings: Map::new(), reasons: Vec::new(), hint: None }
}

/// A tool that reads the files as they are.
fn usable(name: &'static str, errors: &[&'static str]) -> Tool {
    let reasons = errors.iter().map(|check| format!("errors in: {check}")).collect();
    Tool { serves: errors.is_empty(), reasons, ..refused(name) }
}

/// What a program must do by itself with transformers or PEFT.
fn plain_settings(served: &Served<'_>, class: &str) -> Map<String, Value> {
    let Some(recipe) = served.recipe else { return Map::new() };
    let role = |role| {
        let affixes = recipe.template.affixes(role);
        json!({
            "prefix": affixes.prefix,
            "special_tokens_before_prefix": affixes.special_tokens_in_prefix,
            "instruction": recipe.instruction(role),
            "suffix": affixes.suffix,
            "max_length": recipe.max_len(role),
        })
    };
    let pooling = match recipe.template.pooled_tokens {
        1 => "the last token".to_owned(),
        tokens => format!("mean of the last {tokens} tokens"),
    };
    let settings = json!({
        "class": class,
        "pooling": pooling,
        "normalize": recipe.normalized,
        "query": role(Role::Query),
        "passage": role(Role::Passage),
    });
    match settings {
        Value::Object(settings) => settings,
        _ => Map::new(),
    }
}

fn sentence_transformers(served: &Served<'_>) -> Tool {
    let mut tool = usable(SENTENCE_TRANSFORMERS, &served.errors);
    match &served.layout {
        None if served.recipe.is_none() && served.has_modules => {
            tool.reasons.push("with the pooling and the prompts of its own files".to_owned());
        }
        None => {
            tool.serves = false;
            tool.reasons.push(match served.recipe {
                Some(_) => "template and tokenizer could not be checked".to_owned(),
                None => "neither llara.json nor modules.json says how texts become embeddings"
                    .to_owned(),
            });
        }
        Some(Err(obstacles)) => {
            tool.serves = false;
            tool.reasons.extend(obstacles.iter().map(|obstacle| obstacle.what.clone()));
            tool.hint = obstacles.iter().find_map(|obstacle| obstacle.hint.map(str::to_owned));
        }
        Some(Ok(layout)) => {
            tool.settings = layout_settings(layout);
            if !served.has_modules {
                tool.serves = false;
                tool.reasons.push(
                    "the folder has no modules.json for this recipe: the default, the mean of all tokens, \
                     gives other embeddings"
                        .to_owned(),
                );
                tool.hint = Some("save the model again with llara".to_owned());
            }
            tool.reasons.extend(one_length(served.recipe));
        }
    }
    tool
}

fn layout_settings(layout: &StLayout) -> Map<String, Value> {
    let mut settings = Map::new();
    settings.insert("pooling".to_owned(), json!("lasttoken"));
    settings.insert("prompts".to_owned(), json!(layout.prompts));
    settings.insert("max_seq_length".to_owned(), json!(layout.max_seq_length));
    settings.insert("normalize".to_owned(), json!(layout.normalized));
    settings
}

/// A note where queries and passages have different maximum lengths.
fn one_length(recipe: Option<&Recipe>) -> Option<String> {
    let recipe = recipe?;
    let (query, passage) = (recipe.query_max_len, recipe.passage_max_len);
    (query != passage).then(|| {
        let (long, short) = (query.max(passage), query.min(passage));
        format!(
            "there is one maximum length for both roles, {long} tokens: texts of the role with {short} tokens \
             are cut later than in llara"
        )
    })
}

fn text_embeddings_inference(served: &Served<'_>) -> Tool {
    let mut tool = sentence_transformers(served);
    tool.name = TEXT_EMBEDDINGS_INFERENCE;
    // Its pooling can also be given as an option.
    if !served.has_modules && matches!(served.layout, Some(Ok(_))) && served.errors.is_empty() {
        (tool.serves, tool.hint) = (true, None);
        tool.reasons = one_length(served.recipe).into_iter().collect();
    }
    if let Some(Ok(layout)) = &served.layout {
        tool.settings = Map::new();
        tool.settings.insert("--pooling".to_owned(), json!("last-token"));
        tool.settings.insert("--default-prompt".to_owned(), json!(layout.prompts));
        tool.settings.insert("normalize (of a request)".to_owned(), json!(layout.normalized));
    }
    let Some(config) = served.config else { return tool };
    let refusal = match config.decoder.family {
        Family::Qwen2 => Some(
            "it computes Qwen2 with attention in both directions and appends <|endoftext|> to every text",
        ),
        Family::Llama | Family::Mistral | Family::Qwen3 => None,
    };
    if let Some(refusal) = refusal {
        tool.serves = false;
        tool.reasons.push(refusal.to_owned());
        tool.hint.get_or_insert("serve it with transformers or sentence-transformers".to_owned());
    } else if config.json.get("rope_theta").is_none() {
        tool.reasons.push(
            "config.json has `rope_parameters` of transformers 5; releases that read `rope_theta` at the top \
             level do not load it"
                .to_owned(),
        );
    }
    let needs = match config.decoder.family {
        Family::Llama => {
            "Llama needs a release of 2026 or later, an NVIDIA GPU, float16 and flash attention"
        }
        Family::Mistral => "Mistral needs an NVIDIA GPU, float16 and flash attention",
        Family::Qwen2 | Family::Qwen3 => return tool,
    };
    tool.reasons.push(needs.to_owned());
    tool
}

/// The names of the checks that found errors, each once.
pub(super) fn checks_with_errors(report: &Report) -> Vec<&'static str> {
    let mut checks: Vec<&'static str> = Vec::new();
    for finding in &report.findings {
        if finding.status == super::Status::Error && !checks.contains(&finding.check) {
            checks.push(finding.check);
        }
    }
    checks
}
