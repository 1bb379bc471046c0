//! The model card, `README.md`: metadata of the Hub, how the model was trained, and code that gives the same
//! embeddings with transformers, PEFT or sentence-transformers.

use std::fmt::Write;

use serde_json::json;

use super::run_facts::RunFacts;
use super::{BiEncoderModel, StLayout};
use crate::Result;
use crate::backend::{Backend, Shape};
use crate::storage::with_seal;
use crate::text::Role;

/// Texts of the examples.
const QUERY: &str = "When does tin melt?";
const PASSAGES: [&str; 2] = ["Tin melts at 232 °C.", "Owls hunt at night."];

/// The model card of `model`.
///
/// # Errors
/// The tokenizer cannot encode short texts.
pub(super) fn model_card<B: Backend>(model: &BiEncoderModel<B>) -> Result<String> {
    let layout = StLayout::new(model.recipe(), model.prompts())?.ok();
    // An adapter is not a folder that sentence-transformers loads.
    let layout = layout.filter(|_| model.adapter.is_none());
    let mut card = front_matter(model, layout.is_some());
    let name = model.base_name.as_deref();
    let trained = if is_pretrained(model) { "pretrained" } else { "fine-tuned" };
    let of = name.map(|name| format!(", {trained} from `{name}`")).unwrap_or_default();
    let kind = if model.adapter.is_some() {
        "A LoRA adapter for text embeddings"
    } else {
        "A text-embedding model"
    };
    write(&mut card, format_args!("\n# {kind}\n\n{kind}{of}, made with llara. "));
    write(
        &mut card,
        format_args!(
            "Queries and passages become embeddings of {} dimensions, {}.\n",
            model.dimension(),
            match model.recipe().normalized {
                true => "normalized to length 1; compare them by their inner product",
                false => "not normalized; compare them by their inner product",
            }
        ),
    );
    card.push_str("\n## Usage\n\n");
    if let Some(layout) = &layout {
        sentence_transformers_usage(&mut card, layout, model);
    }
    transformers_usage(&mut card, model)?;
    inputs(&mut card, model);
    tasks(&mut card, model);
    training(&mut card, model);
    Ok(with_seal(card))
}

/// Whether the model was trained by `llara pretrain`: only that trains with a language-model head.
fn is_pretrained<B: Backend>(model: &BiEncoderModel<B>) -> bool {
    model.decoder().has_head()
}

fn write(card: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = card.write_fmt(text);
}

fn front_matter<B: Backend>(model: &BiEncoderModel<B>, in_sentence_transformers: bool) -> String {
    let (library, task) = match (model.adapter.is_some(), in_sentence_transformers) {
        (true, _) => ("peft", "feature-extraction"),
        (false, true) => ("sentence-transformers", "sentence-similarity"),
        (false, false) => ("transformers", "feature-extraction"),
    };
    let mut text = format!("---\nlibrary_name: {library}\npipeline_tag: {task}\n");
    if let Some(base) = &model.base_name {
        write(&mut text, format_args!("base_model: {base}\n"));
        let relation = if model.adapter.is_some() { "adapter" } else { "finetune" };
        write(&mut text, format_args!("base_model_relation: {relation}\n"));
    }
    text.push_str("tags:\n");
    let lora = if model.adapter.is_some() { "lora" } else { "" };
    for tag in ["llara", "text-embeddings-inference", "sentence-similarity", "retrieval", lora] {
        // The Hub offers to serve models with this tag by text-embeddings-inference.
        let unfit = tag == "text-embeddings-inference" && !in_sentence_transformers;
        if !tag.is_empty() && !unfit {
            write(&mut text, format_args!("- {tag}\n"));
        }
    }
    text.push_str("---\n");
    text
}

/// A Python literal of a text. JSON's string literals are valid in Python; backticks could end the block of
/// code.
fn python(text: &str) -> String {
    json!(text).to_string().replace('`', "\\u0060")
}

fn sentence_transformers_usage<B: Backend>(
    card: &mut String,
    layout: &StLayout,
    model: &BiEncoderModel<B>,
) {
    let passages = PASSAGES.map(python).join(", ");
    write(
        card,
        format_args!(
            "With [sentence-transformers](https://sbert.net):\n\n\
         ```python\n\
         from sentence_transformers import SentenceTransformer\n\n\
         model = SentenceTransformer(\"path/of/this/folder\")\n\
         queries = model.encode([{}], prompt_name=\"query\")\n\
         passages = model.encode([{passages}], prompt_name=\"passage\")\n\
         print(queries @ passages.T)\n\
         ```\n\n",
            python(QUERY)
        ),
    );
    let recipe = model.recipe();
    if recipe.query_max_len != recipe.passage_max_len {
        write(
            card,
            format_args!(
                "There, queries and passages have one maximum length, {} tokens.\n\n",
                layout.max_seq_length
            ),
        );
    }
}

fn transformers_usage<B: Backend>(card: &mut String, model: &BiEncoderModel<B>) -> Result<()> {
    let recipe = model.recipe();
    let leading = model.prompts().tokenizer().leading_special_tokens()?;
    let mut roles = String::new();
    for role in [Role::Query, Role::Passage] {
        let affixes = recipe.template.affixes(role);
        let before: &[u32] = if affixes.special_tokens_in_prefix { &leading } else { &[] };
        write(
            &mut roles,
            format_args!(
                "    \"{role}\": {{\n        \"special_tokens\": {before:?},\n        \"prefix\": {},\n        \
             \"instruction\": {},\n        \"suffix\": {},\n        \"max_length\": {},\n    }},\n",
                python(&affixes.prefix),
                python(recipe.instruction(role)),
                python(&affixes.suffix),
                recipe.max_len(role),
            ),
        );
    }
    let (import, load) = match (&model.adapter, &model.base_name) {
        (None, _) => (
            "",
            "MODEL = \"path/of/this/folder\"\n\
             tokenizer = AutoTokenizer.from_pretrained(MODEL)\n\
             model = AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()\n"
                .to_owned(),
        ),
        (Some(_), base) => (
            "from peft import PeftModel\n",
            format!(
                "BASE = {}\n\
                 ADAPTER = \"path/of/this/folder\"\n\
                 tokenizer = AutoTokenizer.from_pretrained({})\n\
                 model = AutoModel.from_pretrained(BASE, dtype=torch.float32)\n\
                 {}model = PeftModel.from_pretrained(model, ADAPTER).eval()\n",
                python(base.as_deref().unwrap_or("path/of/the/base/model")),
                if model.has_own_tokenizer()? { "ADAPTER" } else { "BASE" },
                resize_embeddings(model)
            ),
        ),
    };
    let (pooled, normalize) = (recipe.template.pooled_tokens, recipe.normalized);
    let embeddings = match normalize {
        true => "torch.nn.functional.normalize(torch.stack(embeddings), dim=-1)",
        false => "torch.stack(embeddings)",
    };
    let passages = PASSAGES.map(python).join(", ");
    let with = if model.adapter.is_some() { "transformers and PEFT" } else { "transformers" };
    write(
        card,
        format_args!(
            "With {with}; prefix, text and suffix are tokenized apart, and the embedding is the mean of the last \
         hidden states of the last {pooled} tokens:\n\n\
         ```python\n\
         import torch\n\
         {import}from transformers import AutoModel, AutoTokenizer\n\n\
         {load}\n\
         TEMPLATE = {{\n{roles}}}\n\
         POOLED_TOKENS = {pooled}\n\n\n\
         def token_ids(text):\n    \
             return list(tokenizer(text, add_special_tokens=False)[\"input_ids\"])\n\n\n\
         @torch.no_grad()\n\
         def embed(texts, role):\n    \
             template = TEMPLATE[role]\n    \
             before = template[\"special_tokens\"] + token_ids(template[\"prefix\"])\n    \
             after = token_ids(template[\"suffix\"])\n    \
             room = template[\"max_length\"] - len(before) - len(after)\n    \
             embeddings = []\n    \
             for text in texts:\n        \
                 ids = before + token_ids(template[\"instruction\"] + text)[:room] + after\n        \
                 hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0]\n        \
                 embeddings.append(hidden[-POOLED_TOKENS:].mean(dim=0))\n    \
             return {embeddings}\n\n\n\
         queries = embed([{}], \"query\")\n\
         passages = embed([{passages}], \"passage\")\n\
         print(queries @ passages.T)\n\
         ```\n",
            python(QUERY)
        ),
    );
    Ok(())
}

/// The line that an adapter with more tokens than its base model needs: PEFT does not add rows by itself.
fn resize_embeddings<B: Backend>(model: &BiEncoderModel<B>) -> String {
    let (rows, needed) =
        (model.decoder.embeddings().values().rows(), model.decoder.config().vocab_size);
    match rows < needed {
        true => format!(
            "# Rows for the added tokens; their values are in the adapter.\n\
             model.resize_token_embeddings({needed}, mean_resizing=False)\n"
        ),
        false => String::new(),
    }
}

/// A text of a table, in which bars and line feeds would be markup.
fn cell(text: &str) -> String {
    let escaped = text.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'");
    format!("`{}`", escaped.replace('`', "'").replace('|', "\\|"))
}

fn inputs<B: Backend>(card: &mut String, model: &BiEncoderModel<B>) {
    let recipe = model.recipe();
    write(
        card,
        format_args!(
            "\n## Inputs\n\nTemplate {}, mean of the last {} tokens.\n\n\
         | | prefix | instruction | suffix | maximum tokens |\n|---|---|---|---|---|\n",
            cell(&recipe.template.name),
            recipe.template.pooled_tokens
        ),
    );
    for role in [Role::Query, Role::Passage] {
        let affixes = recipe.template.affixes(role);
        let shown = |text: &str| if text.is_empty() { "none".to_owned() } else { cell(text) };
        write(
            card,
            format_args!(
                "| {role} | {} | {} | {} | {} |\n",
                shown(&affixes.prefix),
                shown(recipe.instruction(role)),
                shown(&affixes.suffix),
                recipe.max_len(role)
            ),
        );
    }
}

/// The instructions of tasks.
fn tasks<B: Backend>(card: &mut String, model: &BiEncoderModel<B>) {
    let tasks = &model.recipe().tasks;
    if tasks.is_empty() {
        return;
    }
    card.push_str(
        "\nThe data of some tasks had instructions of their own; use them in place of those above:\n\n\
         | task | query instruction | passage instruction |\n|---|---|---|\n",
    );
    let shown = |text: &str| if text.is_empty() { "none".to_owned() } else { cell(text) };
    for (name, instructions) in tasks {
        let (query, passage) = (shown(&instructions.query), shown(&instructions.passage));
        write(card, format_args!("| {} | {query} | {passage} |\n", cell(name)));
    }
}

fn training<B: Backend>(card: &mut String, model: &BiEncoderModel<B>) {
    let RunFacts { data, settings, steps, loss } = &model.run_facts;
    if data.is_empty() && settings.is_empty() && steps.is_none() && model.adapter.is_none() {
        return;
    }
    if *steps == Some(0) {
        card.push_str("\n## Training\n\nThe weights are random: the model is not trained yet.\n");
        return;
    }
    card.push_str("\n## Training\n\n");
    card.push_str(match is_pretrained(model) {
        true => {
            "Pretraining on texts (Llama2Vec), before contrastive fine-tuning: `llara finetune` continues from here"
        }
        false => "Contrastive fine-tuning (InfoNCE)",
    });
    if let Some(steps) = steps {
        write(card, format_args!(", {steps} steps"));
    }
    if let Some(loss) = loss.filter(|loss| loss.is_finite()) {
        write(card, format_args!(", loss of the last step {loss:.4}"));
    }
    card.push_str(".\n");
    if !data.is_empty() {
        card.push_str("\n| data | rows |\n|---|---|\n");
        for (name, rows) in data {
            write(card, format_args!("| {} | {rows} |\n", cell(name)));
        }
    }
    let lora = model.adapter.iter().flat_map(|lora| {
        let tokens = lora.trained_tokens.len();
        let mut facts = vec![
            ("lora rank", lora.rank.to_string()),
            ("lora alpha", lora.alpha.to_string()),
            ("lora dropout", lora.dropout.to_string()),
            ("lora targets", lora.target_modules.join(", ")),
        ];
        facts.extend((tokens > 0).then(|| ("tokens with trained embeddings", tokens.to_string())));
        facts
    });
    let lora: Vec<(String, String)> = lora.map(|(name, value)| (name.to_owned(), value)).collect();
    if !(settings.is_empty() && lora.is_empty()) {
        card.push_str("\n| setting | value |\n|---|---|\n");
        for (name, value) in settings.iter().chain(&lora) {
            write(card, format_args!("| {} | {} |\n", cell(name), cell(value)));
        }
    }
}
