//! Adapters that train the embeddings of added tokens: training, both forms of saving, loading, merging.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod batch_gradients;

use std::fs;
use std::path::{Path, PathBuf};

use batch_gradients::batch_gradients;
use llara::backend::{Backend, Cpu, Dtype};
use llara::model::{LoraConfig, SavedTokens};
use llara::text::Template;
use llara::train::{AdamW, AdamWConfig, Chunking};
use llara::{BiEncoderModel, BiEncoderOptions, Loader, Role};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const DELTA: &str = "embed_tokens.token_adapter.trainable_tokens_delta";
const QUERIES: [&str; 2] = ["What do owls eat?", "Where does amber come from?"];
const PASSAGES: [&str; 4] = [
    "Owls eat mice and voles.",
    "Owls can turn their heads far round.",
    "Amber is the resin of ancient trees.",
    "Amber was traded along rivers.",
];

/// A model of 384 tokens that lacks those of the template.
fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa")
}

fn template() -> Template {
    let mut template = Template::preset("llara").unwrap();
    template.name = "mine".to_owned();
    template.pooled_tokens = 2;
    template.query.suffix = " query: <a1><a2>".to_owned();
    template.passage.suffix = " passage: <a3><a2>".to_owned();
    template
}

fn loader(base: &Path) -> Loader<'_> {
    Loader::new(base).unwrap().template(template()).add_special_tokens(true)
}

/// A model with a new adapter that trains the tokens that it lacks.
fn with_adapter(base: &Path, saved_tokens: SavedTokens, precision: Dtype) -> BiEncoderModel {
    let loader = loader(base).vocabulary_in_adapter(true).matrices(precision);
    let outline = loader.outline().unwrap();
    let trained_tokens = outline.added_tokens.clone();
    let mut model = loader.load_weights(outline, Cpu::new(), BiEncoderOptions::default()).unwrap();
    let lora =
        LoraConfig { rank: 4, dropout: 0.0, trained_tokens, saved_tokens, ..LoraConfig::default() };
    model.attach_new_adapter(&lora, 7).unwrap();
    model.set_precision(precision).unwrap();
    model
}

fn new_model() -> BiEncoderModel {
    with_adapter(&fixture(), SavedTokens::default(), Dtype::F32)
}

/// The model with the adapter in `adapter`, loaded as the program does.
fn load(base: &Path, adapter: &Path, precision: Dtype) -> llara::Result<BiEncoderModel> {
    let loader = Loader::new(base)?.template(template()).with_adapter(adapter).matrices(precision);
    let mut model = loader.load(Cpu::new(), BiEncoderOptions::default())?;
    model.attach_adapter(adapter)?;
    model.freeze()?;
    model.set_precision(precision)?;
    Ok(model)
}

fn embeddings(model: &BiEncoderModel) -> Vec<f32> {
    let batch = model.batch(Role::Passage, &PASSAGES, 64).unwrap();
    model.encode(&batch).unwrap().unwrap().into_iter().collect()
}

fn gradients(model: &mut BiEncoderModel, chunking: &Chunking) -> Vec<(String, Vec<f32>)> {
    let query = model.batch(Role::Query, &QUERIES, 48).unwrap();
    let passage = model.batch(Role::Passage, &PASSAGES, 64).unwrap();
    batch_gradients(model, (&query, &passage), chunking, None).unwrap();
    let tensors = model.decoder().tensors().filter(|tensor| tensor.is_trainable());
    let grad = |tensor: llara::model::NamedTensor<'_, Cpu>| {
        let grad = model.backend().download_view(tensor.grad().unwrap()).unwrap();
        (tensor.name().to_owned(), grad)
    };
    tensors.map(grad).collect()
}

fn train(model: &mut BiEncoderModel, steps: usize) {
    let backend = model.backend().clone();
    let mut optimizer = AdamW::new(&backend, model.decoder_mut(), AdamWConfig::default()).unwrap();
    for _ in 0..steps {
        gradients(model, &Chunking::default());
        optimizer.step(&backend, model.decoder_mut(), 1e-2).unwrap();
    }
}

fn values(model: &BiEncoderModel, name: &str) -> Vec<f32> {
    let tensor = model.decoder().tensors().find(|tensor| tensor.name() == name).unwrap();
    model.backend().download_view(tensor.values()).unwrap()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let square = |x: f64| x * x;
    let pairs = a.iter().zip(b);
    let difference: f64 = pairs.map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = b.iter().map(|b| square(f64::from(*b))).sum();
    assert!(a.len() == b.len() && norm > 0.0);
    (difference / norm).sqrt()
}

fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut json = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

#[test]
fn new_tokens_start_as_in_training_of_all_weights_and_are_trained() {
    let grown = loader(&fixture()).load(Cpu::new(), BiEncoderOptions::default()).unwrap();
    let mut model = new_model();
    assert_eq!(model.adapter().unwrap().trained_tokens, [384, 385, 386]);
    assert_eq!(model.decoder().config().vocab_size, 387);
    assert_eq!(embeddings(&model), embeddings(&grown));
    let (table, rows) = (values(&model, "embed_tokens.weight"), values(&model, DELTA));
    train(&mut model, 3);
    assert!(values(&model, "embed_tokens.weight") == table, "the frozen table changed");
    let d = model.dimension();
    for (before, after) in rows.chunks(d).zip(values(&model, DELTA).chunks(d)) {
        assert!(distance(after, before) > 1e-3, "a row was not trained");
    }
}

#[test]
fn with_all_tokens_the_gradient_is_that_of_the_embedding_table() {
    let model = || BiEncoderModel::from_folder(fixture(), BiEncoderOptions::default()).unwrap();
    let of_table = gradients(&mut model(), &Chunking::default());
    let of_table = &of_table.iter().find(|(name, _)| name == "embed_tokens.weight").unwrap().1;
    let mut adapted = model();
    let trained_tokens = (0..384).collect();
    let lora = LoraConfig { rank: 4, dropout: 0.0, trained_tokens, ..LoraConfig::default() };
    // A new adapter does not change the output, so the gradients are comparable.
    adapted.attach_new_adapter(&lora, 1).unwrap();
    let of_rows = gradients(&mut adapted, &Chunking::default());
    let of_rows = &of_rows.iter().find(|(name, _)| name == DELTA).unwrap().1;
    let error = distance(of_rows, of_table);
    assert!(error < 1e-6, "{error:e}");
}

#[test]
fn gradients_do_not_depend_on_chunks() {
    let mut model = new_model();
    let whole = gradients(&mut model, &Chunking::default());
    model.decoder_mut().clear_gradients();
    let chunking = Chunking { max_sequences: 1, kept_tokens: 40, ..Chunking::default() };
    for ((name, got), (_, want)) in gradients(&mut model, &chunking).iter().zip(&whole) {
        // B is zero, so the gradient of A is too.
        assert!(want.iter().all(|x| *x == 0.0) || distance(got, want) < 1e-5, "{name}");
    }
}

#[test]
fn both_forms_are_saved_loaded_and_merged() {
    for saved_tokens in [SavedTokens::TrainableTokenIndices, SavedTokens::ModulesToSave] {
        for precision in [Dtype::F32, Dtype::Bf16] {
            let mut trained = with_adapter(&fixture(), saved_tokens, precision);
            train(&mut trained, 3);
            let (expected, rows) = (embeddings(&trained), values(&trained, DELTA));
            let table = values(&trained, "embed_tokens.weight");
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("adapter");
            trained.save_adapter(&dir).unwrap();
            assert_eq!(embeddings(&trained), expected, "saving changed the model");

            let bytes = fs::read(dir.join("adapter_model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let config: Value =
                serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap())
                    .unwrap();
            let [indices, modules] =
                ["trainable_token_indices", "modules_to_save"].map(|key| config.get(key));
            let shape = |name: &str| {
                let found = file.tensor(&format!("base_model.model.{name}"));
                found.map(|tensor| tensor.shape().to_vec()).ok()
            };
            match saved_tokens {
                SavedTokens::TrainableTokenIndices => {
                    assert_eq!((indices, modules), (Some(&json!([384, 385, 386])), None));
                    assert_eq!(shape(DELTA), Some(vec![3, 32]));
                    assert_eq!(shape("embed_tokens.weight"), None);
                }
                SavedTokens::ModulesToSave => {
                    assert_eq!((indices, modules), (None, Some(&json!(["embed_tokens"]))));
                    assert_eq!(shape("embed_tokens.weight"), Some(vec![387, 32]));
                    assert_eq!(shape(DELTA), None);
                }
            }

            let loaded = load(&fixture(), &dir, precision).unwrap();
            assert_eq!(embeddings(&loaded), expected);
            assert_eq!(values(&loaded, DELTA), rows);
            assert_eq!(loaded.adapter().unwrap(), trained.adapter().unwrap());

            let merged = root.path().join("merged");
            let mut loaded = load(&fixture(), &dir, Dtype::F32).unwrap();
            let unmerged = embeddings(&loaded);
            loaded.merge_adapter().unwrap();
            loaded.save(&merged).unwrap();
            let merged = BiEncoderModel::from_folder(&merged, BiEncoderOptions::default()).unwrap();
            assert!(distance(&embeddings(&merged), &unmerged) < 1e-5);
            let grown = values(&merged, "embed_tokens.weight");
            assert_eq!(grown.len(), table.len() + rows.len());
            assert_eq!(grown[table.len()..], rows);
            assert!(precision == Dtype::Bf16 || grown[..table.len()] == table);
        }
    }
}

#[test]
fn an_adapter_without_new_tokens_is_saved_as_before() {
    let root = tempfile::tempdir().unwrap();
    let mut model = BiEncoderModel::from_folder(fixture(), BiEncoderOptions::default()).unwrap();
    model.attach_new_adapter(&LoraConfig::default(), 7).unwrap();
    // An earlier adapter's tokenizer does not stay in the folder.
    let dir = root.path().join("adapter");
    let mut trained = new_model();
    trained.save_adapter(&dir).unwrap();
    assert!(dir.join("tokenizer.json").is_file() && dir.join("tokenizer_config.json").is_file());
    model.save_adapter(&dir).unwrap();
    assert!(!dir.join("tokenizer.json").exists() && !dir.join("tokenizer_config.json").exists());
    let config = fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    assert!(!config.contains("trainable_token") && !config.contains("modules_to_save"), "{config}");
}

#[test]
fn a_new_token_is_trained_where_the_table_has_a_spare_row() {
    let root = tempfile::tempdir().unwrap();
    let base = root.path().join("padded");
    let mut many = template();
    many.query.suffix = format!(" query: {}<a1><a2>", ["<b1>", "<b2>", "<b3>", "<b4>"].concat());
    let fixture = fixture();
    let padded = Loader::new(&fixture).unwrap().template(many).add_special_tokens(true);
    padded.load(Cpu::new(), BiEncoderOptions::default()).unwrap().save(&base).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture.join(name), base.join(name)).unwrap();
    }
    for saved_tokens in [SavedTokens::TrainableTokenIndices, SavedTokens::ModulesToSave] {
        let mut model = with_adapter(&base, saved_tokens, Dtype::F32);
        assert_eq!(model.adapter().unwrap().trained_tokens, [384, 385, 386]);
        assert_eq!(model.decoder().config().vocab_size, 391);
        let table = values(&model, "embed_tokens.weight");
        let d = model.dimension();
        assert_eq!(values(&model, DELTA), table[384 * d..387 * d]);
        train(&mut model, 2);
        assert!(distance(&values(&model, DELTA), &table[384 * d..387 * d]) > 1e-3);
        let dir = root.path().join("adapter");
        model.save_adapter(&dir).unwrap();
        let loaded = load(&base, &dir, Dtype::F32).unwrap();
        assert_eq!(embeddings(&loaded), embeddings(&model));
        assert_eq!(loaded.adapter().unwrap().trained_tokens, [384, 385, 386]);
    }
}

#[test]
fn a_saved_adapter_is_trained_further_with_the_same_tokens() {
    for saved_tokens in [SavedTokens::TrainableTokenIndices, SavedTokens::ModulesToSave] {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("first");
        let mut model = with_adapter(&fixture(), saved_tokens, Dtype::F32);
        train(&mut model, 1);
        model.save_adapter(&dir).unwrap();
        let base = fixture();
        let loader = Loader::new(&base).unwrap().template(template()).with_adapter(&dir);
        let mut further = loader.load(Cpu::new(), BiEncoderOptions::default()).unwrap();
        further.attach_adapter(&dir).unwrap();
        train(&mut model, 2);
        train(&mut further, 2);
        assert_eq!(values(&further, DELTA), values(&model, DELTA));
        further.save_adapter(&root.path().join("second")).unwrap();
        let [first, second] =
            ["first", "second"].map(|name| root.path().join(name).join("adapter_config.json"));
        assert_eq!(fs::read(first).unwrap(), fs::read(second).unwrap());
    }
}

#[test]
fn damaged_token_embeddings_are_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("adapter");
    for (key, value, parts) in [
        ("trainable_token_indices", json!([384, 385]), &["misshapen", DELTA, "[3, 32]"][..]),
        ("trainable_token_indices", json!([384, 385, 385]), &["occurs twice", "385"]),
        ("trainable_token_indices", json!([384, 385, -1]), &["trainable_token_indices", "-1"]),
        ("trainable_token_indices", json!([384, 385, 4294967295u32]), &["4294967295"]),
        ("trainable_token_indices", json!([384, 385, 1.5]), &["1.5"]),
        ("trainable_token_indices", json!(7), &["is not a list", "7"]),
        ("trainable_token_indices", json!({"wte": [384, 385, 386]}), &["wte"]),
        ("trainable_token_indices", json!([384, 386, 388]), &["no embedding", "none for 385"]),
        // Its tokenizer has tokens for which there are no embeddings.
        ("trainable_token_indices", Value::Null, &["no embedding for token `<a1>`"]),
        ("modules_to_save", json!(["embed_tokens"]), &["modules_to_save", "embed_tokens"]),
        ("modules_to_save", json!(["q_proj"]), &["modules_to_save", "q_proj"]),
        ("modules_to_save", json!("embed_tokens"), &["modules_to_save"]),
    ] {
        new_model().save_adapter(&dir).unwrap();
        edit(&dir.join("adapter_config.json"), |config| config[key] = value.clone());
        let message = load(&fixture(), &dir, Dtype::F32).err().unwrap().to_string();
        for part in parts {
            assert!(message.contains(part), "{value}: no {part:?} in {message}");
        }
    }
    // Of PEFT's two forms of the list, both are read, in any order.
    let mut trained = new_model();
    train(&mut trained, 1);
    trained.save_adapter(&dir).unwrap();
    for indices in [json!({"embed_tokens": [384, 385, 386]}), json!([386, 385, 384])] {
        edit(&dir.join("adapter_config.json"), |config| {
            config["trainable_token_indices"] = indices.clone();
        });
        let rows = values(&load(&fixture(), &dir, Dtype::F32).unwrap(), DELTA);
        let mut expected = values(&trained, DELTA);
        if indices.is_array() {
            expected = expected.chunks(32).rev().flatten().copied().collect();
        }
        assert_eq!(rows, expected);
    }
    let mut of_table = with_adapter(&fixture(), SavedTokens::ModulesToSave, Dtype::F32);
    of_table.save_adapter(&dir).unwrap();
    let weights = dir.join("adapter_model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    tensors.retain(|(name, _)| !name.contains("embed_tokens"));
    fs::write(&weights, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let message = load(&fixture(), &dir, Dtype::F32).err().unwrap().to_string();
    assert!(message.contains("missing: base_model.model.embed_tokens.weight"), "{message}");
}
