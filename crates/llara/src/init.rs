//! Creates a small model from training data: the tokenizer is trained on the texts, the weights are
//! random.

use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use crate::backend::Backend;
use crate::biencoder::{BiEncoderModel, BiEncoderOptions, Parts, Recipe, RunFacts};
use crate::data::Dataset;
use crate::model::DecoderConfig;
use crate::model::weights::{ModelFolder, random_decoder};
use crate::text::{PromptEncoder, Role, Template, TextTokenizer, train_bpe};
use crate::{Error, Result};

/// Standard deviation of new weights, the default of Hugging Face models.
const INITIALIZER_RANGE: f32 = 0.02;
/// Longest sequence that a new model supports, in tokens (`max_position_embeddings`).
const MAX_POSITIONS: usize = 2048;

/// Sizes of a Llama model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Features of the residual stream.
    pub hidden_size: usize,
    /// Features inside the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Maximum vocabulary size of the tokenizer.
    pub vocab_size: usize,
}

impl Preset {
    /// 0.7 M parameters: trains in about a minute on a laptop.
    pub const TINY: Preset =
        Preset { hidden_size: 128, intermediate_size: 352, layers: 2, heads: 4, vocab_size: 2048 };
    /// 4.2 M parameters: for a collection of some thousand texts.
    pub const SMALL: Preset =
        Preset { hidden_size: 256, intermediate_size: 688, layers: 4, heads: 4, vocab_size: 4096 };
}

/// Creates an untrained bi-encoder: a byte-level BPE tokenizer trained on all queries and passages of
/// `dataset`, with the special tokens of `template`, and a Llama model with random weights drawn from
/// `seed`. The same input gives the same model.
///
/// # Errors
/// The vocabulary is too small for the special tokens, the data changed since it was opened, or the
/// device fails.
pub fn new_model<B: Backend>(
    backend: B,
    dataset: &Dataset,
    template: Template,
    preset: Preset,
    seed: u64,
) -> Result<BiEncoderModel<B>> {
    template.validate()?;
    let mut tokenizer = train_tokenizer(dataset, &template, preset.vocab_size)?;
    tokenizer.follow_template(&template)?;
    let json = config_json(&preset, &tokenizer);
    let config = DecoderConfig::from_json(json.to_string().as_bytes())?;
    let decoder = random_decoder(&backend, &config, INITIALIZER_RANGE, seed)?;
    let folder =
        ModelFolder::new(json).with_json("generation_config.json", &generation_config(&tokenizer));
    let prompts = PromptEncoder::new(tokenizer, template.clone(), config.vocab_size)?;
    let mut recipe = Recipe::new(template);
    recipe.make_room(&prompts);
    let parts = Parts { backend, decoder, folder, prompts: prompts.into(), recipe };
    let mut model = BiEncoderModel::new(parts, BiEncoderOptions::default())?;
    model.set_run_facts(RunFacts { steps: Some(0), ..RunFacts::default() });
    Ok(model)
}

/// Trains on every text and on the words of the template, which occur in every sequence.
fn train_tokenizer(
    dataset: &Dataset,
    template: &Template,
    vocab_size: usize,
) -> Result<TextTokenizer> {
    let special_tokens = template.special_tokens();
    let words = |role| {
        let affixes = template.affixes(role);
        let mut words = [&affixes.prefix, &affixes.suffix].map(String::clone);
        for token in &special_tokens {
            words.iter_mut().for_each(|text| *text = text.replace(token, ""));
        }
        words
    };
    let (around_query, around_passage) = (words(Role::Query), words(Role::Passage));
    // The trainer takes texts, not results: the first error is stored here and reported afterwards.
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let texts = (0..dataset.len()).flat_map(|index| match dataset.row(index) {
        Ok(row) => {
            let mut texts = Vec::with_capacity(2 + row.pos.len() + row.neg.len());
            texts.extend(around_query.iter().chain(&around_passage).cloned());
            texts.push(row.query);
            texts.extend(row.pos.into_iter().chain(row.neg));
            texts
        }
        Err(e) => {
            failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e);
            Vec::new()
        }
    });
    let tokenizer = train_bpe(texts, vocab_size, &special_tokens)?;
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(tokenizer),
    }
}

/// `config.json` as transformers 5 writes it.
fn config_json(preset: &Preset, tokenizer: &TextTokenizer) -> Value {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "dtype": "float32",
        "head_dim": preset.hidden_size / preset.heads,
        "hidden_act": "silu",
        "hidden_size": preset.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": preset.intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_bias": false,
        "model_type": "llama",
        "num_attention_heads": preset.heads,
        "num_hidden_layers": preset.layers,
        "num_key_value_heads": preset.heads,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": true,
        "use_cache": true,
        "vocab_size": tokenizer.vocab_size(),
    });
    add_token_ids(&mut config, tokenizer);
    config
}

fn generation_config(tokenizer: &TextTokenizer) -> Value {
    let mut config = json!({"_from_model_config": true});
    add_token_ids(&mut config, tokenizer);
    config
}

/// Adds the ids of the special tokens.
fn add_token_ids(config: &mut Value, tokenizer: &TextTokenizer) {
    for (key, token) in
        [("bos_token_id", "<|bos|>"), ("eos_token_id", "<|eos|>"), ("pad_token_id", "<|pad|>")]
    {
        config[key] = json!(tokenizer.token_id(token));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Cpu;
    use crate::data::BadRows;

    const SIZE: Preset =
        Preset { hidden_size: 16, intermediate_size: 24, layers: 1, heads: 2, vocab_size: 330 };

    fn dataset(dir: &tempfile::TempDir) -> Dataset {
        let path = dir.path().join("rows.jsonl");
        let row = |i| {
            format!(
                "{{\"query\": \"which bell {i}\", \"pos\": [\"a tin bell {i}\"], \"neg\": [\"owl\"]}}\n"
            )
        };
        std::fs::write(&path, (0..9).map(row).collect::<String>()).unwrap();
        Dataset::open(&[path], BadRows::Error).unwrap()
    }

    #[test]
    fn the_same_seed_gives_the_same_model_and_all_files_are_saved() {
        let dir = tempfile::tempdir().unwrap();
        let (dataset, template) = (dataset(&dir), Template::preset("llara").unwrap());
        let make = |seed| new_model(Cpu::new(), &dataset, template.clone(), SIZE, seed).unwrap();
        let saved = |seed, name: &str| {
            let path = dir.path().join(name);
            make(seed).save(&path).unwrap();
            std::fs::read(path.join("model.safetensors")).unwrap()
        };
        assert_eq!(saved(1, "a"), saved(1, "b"));
        assert_ne!(saved(1, "a"), saved(2, "c"));
        let folder = dir.path().join("a");
        for name in ["config.json", "generation_config.json", "llara.json", "llara_probes.json"] {
            assert!(folder.join(name).is_file(), "{name}");
        }
        let text: Value =
            serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
        assert_eq!((&text["pad_token_id"], &text["bos_token_id"]), (&json!(0), &json!(1)));
    }

    #[test]
    fn lengths_exceed_the_template_and_the_templates_words_are_tokens() {
        let dir = tempfile::tempdir().unwrap();
        let template = Template::preset("llara").unwrap();
        let large = Preset { vocab_size: 600, ..SIZE };
        let of =
            |preset| new_model(Cpu::new(), &dataset(&dir), template.clone(), preset, 1).unwrap();
        let (few, many) = (of(SIZE), of(large));
        let template_len = |model: &BiEncoderModel<Cpu>| {
            model.prompts().encode(Role::Query, "a", 999).unwrap().len() - 1
        };
        assert!(template_len(&many) < template_len(&few));
        // BOS, quotes, eight words, colon, space, eight tokens.
        assert!(template_len(&many) <= 24);
        assert_eq!(few.recipe().query_max_len, template_len(&few) + Recipe::MIN_TEXT_TOKENS);
    }
}
