//! LoRA adapters through the public API: a new adapter does not change the output, a training step changes only the
//! adapter, and a saved adapter is loaded with the same weights.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod batch_gradients;

use std::fs;
use std::path::PathBuf;

use batch_gradients::batch_gradients;
use llara::backend::Backend;
use llara::model::{Dropout, LoraConfig};
use llara::train::{AdamW, AdamWConfig, Chunking};
use llara::{BiEncoderModel, BiEncoderOptions, Role};

fn model() -> BiEncoderModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen3");
    BiEncoderModel::from_folder(folder, BiEncoderOptions::default()).unwrap()
}

fn config(dropout: f32) -> LoraConfig {
    LoraConfig { rank: 4, dropout, ..LoraConfig::default() }
}

const QUERIES: [&str; 2] = ["What do owls eat?", "Where does amber come from?"];
const PASSAGES: [&str; 4] = [
    "Owls eat mice and voles.",
    "Owls can turn their heads far round.",
    "Amber is the resin of ancient trees.",
    "Amber was traded along rivers.",
];

fn embeddings(model: &BiEncoderModel) -> Vec<f32> {
    let batch = model.batch(Role::Passage, &PASSAGES, 64).unwrap();
    model.encode(&batch).unwrap().unwrap().into_iter().collect()
}

fn step(
    model: &mut BiEncoderModel,
    optimizer: &mut AdamW<llara::backend::Cpu>,
    dropout: Option<Dropout>,
) -> f32 {
    let query = model.batch(Role::Query, &QUERIES, 48).unwrap();
    let passage = model.batch(Role::Passage, &PASSAGES, 64).unwrap();
    let loss = batch_gradients(model, (&query, &passage), &Chunking::default(), dropout).unwrap();
    let backend = model.backend().clone();
    optimizer.step(&backend, model.decoder_mut(), 1e-2).unwrap();
    loss
}

#[test]
fn training_changes_only_the_adapter() {
    let mut model = model();
    let before = embeddings(&model);
    let weights = |model: &BiEncoderModel| -> Vec<Vec<f32>> {
        let frozen = model.decoder().parameters().filter(|p| !p.is_trainable());
        frozen.map(|p| model.backend().download(p.values()).unwrap()).collect()
    };
    model.attach_new_adapter(&config(0.0), 7).unwrap();
    assert_eq!(embeddings(&model), before, "a new adapter changes nothing");
    let base = weights(&model);

    let backend = model.backend().clone();
    let mut optimizer = AdamW::new(&backend, model.decoder_mut(), AdamWConfig::default()).unwrap();
    let losses: Vec<f32> = (0..8).map(|_| step(&mut model, &mut optimizer, None)).collect();
    assert!(losses[7] < losses[0], "{losses:?}");
    let changed = embeddings(&model).iter().zip(&before).any(|(a, b)| (a - b).abs() > 1e-3);
    assert!(changed, "training changed nothing");
    assert!(weights(&model) == base, "frozen weights changed");
}

#[test]
fn a_saved_or_merged_adapter_gives_the_same_embeddings() {
    let mut trained = model();
    trained.attach_new_adapter(&config(0.1), 7).unwrap();
    let backend = trained.backend().clone();
    let mut optimizer =
        AdamW::new(&backend, trained.decoder_mut(), AdamWConfig::default()).unwrap();
    for at in 0..3 {
        step(&mut trained, &mut optimizer, Some(Dropout { seed: 1, step: at }));
    }
    let expected = embeddings(&trained);
    let dir = tempfile::tempdir().unwrap();
    trained.save_adapter(&dir.path().join("adapter")).unwrap();
    let saved = std::fs::read_to_string(dir.path().join("adapter/adapter_config.json")).unwrap();
    assert!(saved.contains("\"lora_dropout\": 0.1,"), "{saved}");
    assert_eq!(embeddings(&trained), expected, "saving changed the model");

    let mut loaded = model();
    loaded.attach_adapter(&dir.path().join("adapter")).unwrap();
    assert_eq!(embeddings(&loaded), expected);

    trained.merge_adapter().unwrap();
    let near = |a: &[f32]| a.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(near(&embeddings(&trained)));
    trained.save(dir.path().join("merged")).unwrap();
    let merged =
        BiEncoderModel::from_folder(dir.path().join("merged"), BiEncoderOptions::default());
    assert!(near(&embeddings(&merged.unwrap())));
}

#[test]
fn adapters_are_merged_only_into_unrounded_weights() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen3");
    let mut trained = model();
    trained.attach_new_adapter(&config(0.0), 7).unwrap();
    let backend = trained.backend().clone();
    let mut optimizer =
        AdamW::new(&backend, trained.decoder_mut(), AdamWConfig::default()).unwrap();
    step(&mut trained, &mut optimizer, None);
    let dir = tempfile::tempdir().unwrap();
    trained.save_adapter(&dir.path().join("adapter")).unwrap();
    trained.merge_adapter().unwrap();
    trained.save(dir.path().join("f32")).unwrap();

    let loader = llara::Loader::new(&folder).unwrap().matrices(llara::backend::Dtype::Bf16);
    let mut rounded = loader.load(backend, BiEncoderOptions::default()).unwrap();
    rounded.attach_adapter(&dir.path().join("adapter")).unwrap();
    rounded.merge_adapter().unwrap();
    rounded.save(dir.path().join("bf16")).unwrap();
    let weights = |name: &str| fs::read(dir.path().join(name).join("model.safetensors")).unwrap();
    assert!(weights("f32") == weights("bf16"), "merged into rounded weights");

    // The unrounded values of weights that were trained and then rounded are in no file.
    let mut other = model();
    let backend = other.backend().clone();
    let mut optimizer = AdamW::new(&backend, other.decoder_mut(), AdamWConfig::default()).unwrap();
    step(&mut other, &mut optimizer, None);
    other.attach_new_adapter(&config(0.0), 7).unwrap();
    other.set_precision(llara::backend::Dtype::Bf16).unwrap();
    let message = other.merge_adapter().unwrap_err().to_string();
    assert!(message.contains("rounded to bf16") && message.contains("hint"), "{message}");
    assert!(other.adapter().is_some());
}

#[test]
fn dropout_is_deterministic_and_differs_between_steps() {
    let gradients = |step: u64| -> Vec<u32> {
        let mut model = model();
        model.attach_new_adapter(&config(0.5), 7).unwrap();
        let dropout = Some(Dropout { seed: 3, step });
        let query = model.batch(Role::Query, &QUERIES, 48).unwrap();
        let passage = model.batch(Role::Passage, &PASSAGES, 64).unwrap();
        batch_gradients(&mut model, (&query, &passage), &Chunking::default(), dropout).unwrap();
        let backend = model.backend();
        let grads = model.decoder().trainable_parameters();
        grads.flat_map(|p| backend.download(p.grad().unwrap()).unwrap()).map(f32::to_bits).collect()
    };
    assert!(gradients(5) == gradients(5));
    assert!(gradients(5) != gradients(6));
}

#[test]
fn all_mismatches_are_listed() {
    let mut wrong = model();
    let unknown = LoraConfig { target_modules: vec!["q_project".into()], ..config(0.0) };
    let message = wrong.attach_new_adapter(&unknown, 0).unwrap_err().to_string();
    assert!(message.contains("q_project") && message.contains("q_proj"), "{message}");

    let dir = tempfile::tempdir().unwrap();
    let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa/lora");
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(from.join(name), dir.path().join(name)).unwrap();
    }
    let message = model().attach_adapter(dir.path()).unwrap_err().to_string();
    assert!(message.contains("misshapen: base_model.model.layers.0.self_attn.q_proj"), "{message}");

    let path = dir.path().join("adapter_config.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"use_dora\": false", "\"use_dora\": true")).unwrap();
    let message = model().attach_adapter(dir.path()).unwrap_err().to_string();
    assert!(message.contains("use_dora"), "{message}");
}
