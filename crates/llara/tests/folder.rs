//! Model folders: a loaded model is saved in the same format, and invalid folders are refused.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::{Path, PathBuf};

use llara::backend::Cpu;
use llara::model::weights::{SaveDtype, WeightFiles};
use llara::text::Template;
use llara::{BiEncoderModel, BiEncoderOptions, Loader, Role};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

fn fixture(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

fn load(dir: &Path) -> llara::Result<BiEncoderModel> {
    BiEncoderModel::from_folder(dir, BiEncoderOptions::default())
}

fn embeddings(model: &BiEncoderModel) -> Vec<f32> {
    let texts = ["A lighthouse keeper counts ships.", "Rye grows on poor soil."];
    let batch = model.batch(Role::Passage, &texts, 64).unwrap();
    model.encode(&batch).unwrap().unwrap().into_iter().collect()
}

type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let own = |v: &TensorView<'_>| (v.dtype(), v.shape().to_vec(), v.data().to_vec());
    let owned = file.tensors().into_iter().map(|(name, view)| {
        let (dtype, shape, data) = own(&view);
        (name, dtype, shape, data)
    });
    owned.collect()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, dtype, shape, data)| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A copy of a fixture's model that a test can modify.
fn copy(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        fs::copy(fixture(family).join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn as_bf16(tensors: &mut Tensors) {
    for (_, dtype, _, data) in tensors {
        *dtype = Dtype::BF16;
        let values = data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
        *data = values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect();
    }
}

#[test]
fn an_untrained_model_is_saved_bit_for_bit() {
    for family in ["llama-mha", "llama3-rope", "qwen2", "qwen3"] {
        let out = tempfile::tempdir().unwrap();
        let target = out.path().join("model");
        load(&fixture(family)).unwrap().save(&target).unwrap();
        let (mut before, mut after) = (
            tensors(&fixture(family).join("model.safetensors")),
            tensors(&target.join("model.safetensors")),
        );
        before.sort();
        after.sort();
        assert!(before == after, "{family}");
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let read = |dir: &Path| fs::read(dir.join(name)).unwrap();
            assert_eq!(read(&fixture(family)), read(&target), "{family} {name}");
        }
        let config = |dir: &Path| -> serde_json::Value {
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
        };
        assert_eq!(config(&fixture(family)), config(&target));
    }
}

#[test]
fn shards_stay_shards_and_a_bare_decoder_stays_bare() {
    let dir = copy("mistral");
    let single = dir.path().join("model.safetensors");
    let expected = embeddings(&load(dir.path()).unwrap());
    let bare: Tensors = tensors(&single)
        .into_iter()
        .filter(|(name, ..)| name != "lm_head.weight")
        .map(|(name, d, s, b)| (name.strip_prefix("model.").unwrap().to_owned(), d, s, b))
        .collect();
    fs::remove_file(&single).unwrap();
    let mut weight_map = serde_json::Map::new();
    for (n, half) in bare.chunks(bare.len().div_ceil(2)).enumerate() {
        let name = format!("model-0000{}-of-00002.safetensors", n + 1);
        write(&dir.path().join(&name), &half.to_vec());
        weight_map.extend(half.iter().map(|(t, ..)| (t.clone(), name.clone().into())));
    }
    let index = serde_json::json!({"metadata": {}, "weight_map": weight_map});
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();

    let model = load(dir.path()).unwrap();
    assert_eq!(embeddings(&model), expected);
    let out = dir.path().join("out");
    model.save(&out).unwrap();
    assert!(!out.join("model.safetensors").exists());
    let saved: serde_json::Value =
        serde_json::from_slice(&fs::read(out.join("model.safetensors.index.json")).unwrap())
            .unwrap();
    assert_eq!(saved["weight_map"], index["weight_map"]);
    assert_eq!(embeddings(&load(&out).unwrap()), expected);
}

#[test]
fn bf16_weights_are_saved_in_bf16_unless_another_dtype_is_given() {
    let dir = copy("qwen2");
    let path = dir.path().join("model.safetensors");
    let mut narrow = tensors(&path);
    as_bf16(&mut narrow);
    write(&path, &narrow);
    let model = load(dir.path()).unwrap();
    let dtypes = |dtype| {
        let out = tempfile::tempdir().unwrap();
        model.save_as(out.path(), dtype).unwrap();
        assert_eq!(embeddings(&load(out.path()).unwrap()).len(), embeddings(&model).len());
        // The probes are those of the rounded weights; the tolerance is that for unrounded weights.
        let probes = llara::Probes::read(out.path()).unwrap().unwrap();
        probes.check(&load(out.path()).unwrap()).unwrap();
        let files = WeightFiles::open(out.path()).unwrap();
        let all: Vec<_> = files.names().map(|name| files.info(name).unwrap().dtype).collect();
        assert!(all.iter().all(|&d| d == all[0]));
        all[0]
    };
    assert_eq!(dtypes(SaveDtype::AsLoaded), Dtype::BF16);
    assert_eq!(dtypes(SaveDtype::F32), Dtype::F32);
    assert_eq!(dtypes(SaveDtype::F16), Dtype::F16);
}

#[test]
fn missing_tokens_are_refused_and_can_be_added() {
    let dir = tempfile::tempdir().unwrap();
    let base = copy("llama-gqa");
    let template = |tokens: &str| {
        let mut template = Template::preset("llara").unwrap();
        template.name = "mine".to_owned();
        template.pooled_tokens = 2;
        template.query.suffix = format!(" query: {tokens}");
        template.passage.suffix = format!(" passage: {tokens}");
        template
    };
    let loader = || Loader::new(base.path()).unwrap().template(template("<a1><a2>"));
    let message = loader().load(Cpu::new(), Default::default()).err().unwrap().to_string();
    assert!(message.contains("<a1>") && message.contains("add-special-tokens"), "{message}");

    let model = loader().add_special_tokens(true).load(Cpu::new(), Default::default()).unwrap();
    let rows = load(base.path()).unwrap().decoder().config().vocab_size;
    assert_eq!(model.decoder().config().vocab_size, rows + 2);
    model.save(dir.path().join("grown")).unwrap();
    let again = load(&dir.path().join("grown")).unwrap();
    assert_eq!(again.recipe().template.name, "mine");
    assert_eq!(embeddings(&again), embeddings(&model));
    let files = WeightFiles::open(&dir.path().join("grown")).unwrap();
    assert_eq!(files.info("lm_head.weight").unwrap().shape[0], rows + 2);
}

#[test]
fn all_faults_of_the_weights_are_listed_at_once() {
    let dir = copy("llama-gqa");
    let path = dir.path().join("model.safetensors");
    let mut faulty = tensors(&path);
    faulty.retain(|(name, ..)| name != "model.norm.weight");
    for (name, _, shape, data) in &mut faulty {
        if name == "model.layers.0.mlp.up_proj.weight" {
            shape.reverse();
        }
        if name == "model.layers.1.mlp.up_proj.weight" {
            *name = "model.layers.1.mlp.up_project.weight".to_owned();
        }
        assert!(!data.is_empty());
    }
    write(&path, &faulty);
    let message = load(dir.path()).err().unwrap().to_string();
    for part in [
        "missing: model.norm.weight",
        "misshapen: model.layers.0.mlp.up_proj.weight",
        "missing: model.layers.1.mlp.up_proj.weight",
        "unknown: model.layers.1.mlp.up_project.weight",
    ] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn probes_detect_weights_that_were_changed_later() {
    let out = tempfile::tempdir().unwrap();
    load(&fixture("qwen3")).unwrap().save(out.path()).unwrap();
    let probes = llara::Probes::read(out.path()).unwrap().unwrap();
    probes.check(&load(out.path()).unwrap()).unwrap();

    let path = out.path().join("model.safetensors");
    let mut changed = tensors(&path);
    for (name, _, _, data) in &mut changed {
        if name == "model.layers.0.mlp.down_proj.weight" {
            data.fill(0);
        }
    }
    write(&path, &changed);
    assert!(probes.check(&load(out.path()).unwrap()).is_err());
}

#[test]
fn saving_keeps_other_files_and_an_adapter_never_replaces_its_base() {
    let dir = copy("qwen2");
    let own = dir.path().join("corpus.safetensors");
    fs::write(&own, "embeddings of the user").unwrap();
    let mut model = load(dir.path()).unwrap();
    model.save(dir.path()).unwrap();
    assert!(own.is_file());

    let config = llara::model::LoraConfig { rank: 2, ..Default::default() };
    model.attach_new_adapter(&config, 0).unwrap();
    let message = model.save_adapter(dir.path()).unwrap_err().to_string();
    assert!(message.contains("cannot be saved in its base model's folder"), "{message}");
    assert_eq!(embeddings(&load(dir.path()).unwrap()), embeddings(&model));

    // An adapter, then a full model in the same folder: no file of the adapter remains.
    let out = dir.path().join("out");
    model.save_adapter(&out).unwrap();
    model.merge_adapter().unwrap();
    model.save(&out).unwrap();
    assert!(
        !out.join("adapter_config.json").exists()
            && !out.join("adapter_model.safetensors").exists()
    );
    assert_eq!(embeddings(&load(&out).unwrap()), embeddings(&model));
}

#[test]
fn a_model_that_has_diverged_is_not_saved() {
    let dir = copy("llama-gqa");
    let path = dir.path().join("model.safetensors");
    let mut huge = tensors(&path);
    for (name, _, _, data) in &mut huge {
        if name.ends_with("_proj.weight") {
            let values = data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b) * 1e30);
            *data = values.flat_map(f32::to_le_bytes).collect();
        }
    }
    write(&path, &huge);
    let out = dir.path().join("out");
    let message = load(dir.path()).unwrap().save(&out).unwrap_err().to_string();
    assert!(message.contains("diverged"), "{message}");
    assert!(!out.exists());

    // The weights are kept, and an earlier model in the folder is unchanged.
    let kept = dir.path().join("out.unverified-1");
    assert!(message.contains(&kept.display().to_string()), "{message}");
    let sorted = |path: &Path| {
        let mut tensors = tensors(path);
        tensors.sort();
        tensors
    };
    assert!(sorted(&kept.join("model.safetensors")) == sorted(&path));
    load(&fixture("llama-gqa")).unwrap().save(&out).unwrap();
    let before = fs::read(out.join("model.safetensors")).unwrap();
    load(dir.path()).unwrap().save(&out).unwrap_err();
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), before);
    assert!(dir.path().join("out.unverified-2/config.json").is_file());
    let hidden = |e: fs::DirEntry| e.file_name().to_string_lossy().starts_with('.');
    assert!(!fs::read_dir(&out).unwrap().any(|e| hidden(e.unwrap())));
}

#[test]
fn a_model_with_an_adapter_attached_is_not_saved_without_it() {
    let out = tempfile::tempdir().unwrap();
    let target = out.path().join("model");
    let mut model = load(&fixture("qwen3")).unwrap();
    let config = llara::model::LoraConfig { rank: 2, ..Default::default() };
    model.attach_new_adapter(&config, 0).unwrap();
    let message = model.save(&target).unwrap_err().to_string();
    for part in ["adapter attached", "save_adapter", "merge_adapter"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!target.exists());
}

#[test]
fn replacing_or_rewriting_a_weight_file_does_not_corrupt_a_loaded_model() {
    let dir = copy("llama-gqa");
    let path = dir.path().join("model.safetensors");
    let original = tensors(&path);
    let head = |tensors: &Tensors| {
        let found = tensors.iter().find(|(name, ..)| name == "lm_head.weight");
        found.unwrap().3.clone()
    };
    let mut other = original.clone();
    other.iter_mut().for_each(|(.., data)| data.fill(0));
    let model = load(dir.path()).unwrap();
    write(&dir.path().join("other"), &other);
    fs::rename(dir.path().join("other"), &path).unwrap();
    let out = dir.path().join("out");
    model.save(&out).unwrap();
    assert!(head(&tensors(&out.join("model.safetensors"))) == head(&original));

    write(&path, &original);
    let model = load(dir.path()).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend_from_slice(b"more");
    fs::write(&path, bytes).unwrap();
    let message = model.save(dir.path().join("second")).unwrap_err().to_string();
    let named = message.contains("weights changed") && message.contains("model.safetensors");
    assert!(named, "{message}");
    assert!(!dir.path().join("second").exists());
}

#[test]
fn loading_a_folder_finishes_an_interrupted_save() {
    let out = tempfile::tempdir().unwrap();
    let model = load(&fixture("qwen3")).unwrap();
    model.save(out.path()).unwrap();
    let (moving, replaced) = (out.path().join(".moving-x"), out.path().join(".replaced-x"));
    fs::create_dir(&moving).unwrap();
    fs::create_dir(&replaced).unwrap();
    fs::write(replaced.join("config.json"), "{}").unwrap();
    for name in ["config.json", "llara.json", "model.safetensors"] {
        fs::rename(out.path().join(name), moving.join(name)).unwrap();
    }
    assert_eq!(embeddings(&load(out.path()).unwrap()), embeddings(&model));
    assert!(!moving.exists() && !replaced.exists());
}
