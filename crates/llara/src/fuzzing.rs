//! Entry points for fuzzing: one function per input format. Each reads arbitrary bytes and may fail, but
//! must not panic.
//!
//! Not part of the public interface: compiled only for tests and with the feature `fuzzing`. The fuzz
//! targets that call these functions are in `fuzz/` at the root of the repository.

use std::path::Path;

use crate::Result;
use crate::biencoder::Recipe;
use crate::data::{
    BadRows, DataSources, Dataset, Instructions, PieceLength, PretrainingData, TrainingRow,
};
use crate::model::{DecoderConfig, LoraConfig};
use crate::retrieval::{EmbeddingWriter, Origin, Qrels, TextFile};
use crate::storage::SafetensorsFile;
use crate::text::{PromptEncoder, Template, TextTokenizer, train_bpe};
use crate::train::{Checkpoint, write_checkpoint_manifest};

/// A function that reads one format.
pub type Target = fn(&[u8]);

/// All targets with their names, which are also those of their corpora.
pub const TARGETS: [(&str, Target); 13] = [
    ("config", config),
    ("safetensors", safetensors),
    ("tokenizer", tokenizer),
    ("adapter_config", adapter_config),
    ("recipe", recipe),
    ("template", template),
    ("data_set", data_set),
    ("rows", rows),
    ("qrels", qrels),
    ("manifest", manifest),
    ("checkpoint_manifest", checkpoint_manifest),
    ("trainer_state", trainer_state),
    ("hub_listing", hub_listing),
];

/// Largest head dimension for which the rope frequencies are computed here.
const MAX_HEAD_DIM: usize = 1 << 16;

/// `config.json`.
pub fn config(bytes: &[u8]) {
    if let Ok(config) = DecoderConfig::from_json(bytes) {
        assert_eq!(config.windows.len(), config.num_hidden_layers);
        assert!(config.windows.iter().all(|&window| window != Some(0)));
        if config.head_dim < MAX_HEAD_DIM {
            let frequencies = config.inverse_frequencies();
            assert!(frequencies.iter().all(|f| f.is_finite() && *f >= 0.0), "{config:?}");
        }
    }
}

/// A safetensors file: the header and all tensors.
pub fn safetensors(bytes: &[u8]) {
    in_folder("model.safetensors", bytes, |dir| {
        if let Ok(file) = SafetensorsFile::open(&dir.join("model.safetensors")) {
            for name in file.names() {
                let _ = file.read_f32(&name);
            }
        }
    });
}

/// `tokenizer.json`: loading it, encoding, adding tokens, and a template on top of it.
pub fn tokenizer(bytes: &[u8]) {
    in_folder("tokenizer.json", bytes, |dir| {
        let Ok(mut tokenizer) = TextTokenizer::from_folder(dir) else { return };
        for text in ["", "the cat", "Grüße <s1> 世界 \u{0}\u{301}"] {
            let _ = tokenizer.encode(text, true);
            let _ = tokenizer.encode(text, false);
        }
        let _ = tokenizer.leading_special_tokens();
        for name in Template::PRESETS {
            let Ok(template) = Template::preset(name) else { continue };
            let _ = tokenizer.add_special_tokens(&template.special_tokens());
            let size = tokenizer.vocab_size();
            if let Ok(prompts) = PromptEncoder::new(tokenizer.clone(), template, size) {
                let _ = prompts.encode(crate::Role::Query, "a cat", 64);
            }
        }
        let _ = tokenizer.contents();
    });
}

/// `adapter_config.json`.
pub fn adapter_config(bytes: &[u8]) {
    in_folder("adapter_config.json", bytes, |dir| {
        if let Ok(config) = LoraConfig::from_peft(dir) {
            assert!(config.alpha.is_finite() && config.rank > 0, "{config:?}");
        }
    });
}

/// `llara.json`.
pub fn recipe(bytes: &[u8]) {
    in_folder("llara.json", bytes, |dir| {
        if let Ok(Some(recipe)) = Recipe::read(dir) {
            encode_with(recipe.template);
        }
    });
}

/// A template in TOML.
pub fn template(bytes: &[u8]) {
    in_folder("template.toml", bytes, |dir| {
        if let Ok(template) = Template::from_toml_file(dir.join("template.toml")) {
            encode_with(template);
        }
    });
}

/// A data set file.
pub fn data_set(bytes: &[u8]) {
    in_folder("data.toml", bytes, |dir| {
        if let Ok(data) = DataSources::read(&[dir.join("data.toml")]) {
            assert!(!data.sources.is_empty());
            let weighted = data.sources.iter().filter(|source| source.weight.is_some()).count();
            assert!([0, data.sources.len()].contains(&weighted));
            let _ = data.tasks(&Instructions::default());
        }
    });
}

/// JSON lines: as one training row, as a file of rows and as a file of texts.
pub fn rows(bytes: &[u8]) {
    let _ = TrainingRow::parse(bytes, "rows.jsonl", 1);
    in_folder("rows.jsonl", bytes, |dir| {
        let path = dir.join("rows.jsonl");
        let _ = TextFile::open(&path);
        if let Ok(dataset) = Dataset::open(&[path], BadRows::Skip) {
            for index in 0..dataset.len() {
                let _ = dataset.row(index);
            }
        }
    });
    pretraining(bytes);
}

/// Rows and texts of pretraining. What was indexed can be read.
fn pretraining(bytes: &[u8]) {
    let read = |data: Result<PretrainingData>| {
        if let Ok(data) = data {
            for index in 0..data.dataset().len() {
                assert!(data.row(index).is_ok(), "row {index}");
            }
        }
    };
    let Ok(length) = PieceLength::new(20) else { return };
    for name in ["texts.jsonl", "text.txt"] {
        in_folder(name, bytes, |dir| {
            let path = [dir.join(name)];
            read(PretrainingData::open_rows(&path, BadRows::Skip));
            read(PretrainingData::open_texts(&path, length, BadRows::Skip));
        });
    }
}

/// Relevance judgments.
pub fn qrels(bytes: &[u8]) {
    in_folder("test.tsv", bytes, |dir| {
        let _ = Qrels::read_tsv(dir.join("test.tsv"));
    });
}

/// The manifest of an interrupted run. Its incomplete file of embeddings has two of three rows.
pub fn manifest(bytes: &[u8]) {
    in_folder("e.npy.partial.json", bytes, |dir| {
        let path = dir.join("e.npy");
        let whole = dir.join("whole.npy");
        let written = EmbeddingWriter::create(&whole, 3, 2).and_then(|mut writer| {
            writer.append(&[0.5; 6])?;
            writer.finish()
        });
        let data = written.ok().and_then(|()| std::fs::read(&whole).ok()).unwrap_or_default();
        let kept = data.len().saturating_sub(2 * size_of::<f32>());
        if std::fs::write(dir.join("e.npy.partial"), &data[..kept]).is_err() {
            return;
        }
        let _ = EmbeddingWriter::kept(&path);
        let _ = EmbeddingWriter::resume(&path, 3, 2, Origin::new().with("role", "query"));
        let _ = std::fs::remove_file(dir.join("e.npy.partial"));
    });
}

/// `manifest.json` of a checkpoint with one file.
pub fn checkpoint_manifest(bytes: &[u8]) {
    in_folder("manifest.json", bytes, |dir| {
        if std::fs::write(dir.join("config.json"), "{}").is_ok() {
            let _ = Checkpoint::open(dir);
        }
        let _ = std::fs::remove_file(dir.join("config.json"));
    });
}

/// `trainer_state.json` of a checkpoint whose manifest agrees with it.
pub fn trainer_state(bytes: &[u8]) {
    in_folder("trainer_state.json", bytes, |dir| {
        if let Ok(()) = write_checkpoint_manifest(dir)
            && let Ok(checkpoint) = Checkpoint::open(dir)
        {
            let _ = (checkpoint.kernels(), checkpoint.chunking(), checkpoint.dtype());
        }
        let _ = std::fs::remove_file(dir.join("manifest.json"));
    });
}

/// The Hub's response to a request for a model's list of files.
pub fn hub_listing(bytes: &[u8]) {
    crate::hub::fuzz_listing(bytes);
}

/// Encodes a text with a template and a small tokenizer.
fn encode_with(template: Template) {
    thread_local!(static TOKENIZER: Option<TextTokenizer> = {
        let specials = Template::preset("llara").map(|t| t.special_tokens()).unwrap_or_default();
        train_bpe(std::iter::empty(), 400, &specials).ok()
    });
    TOKENIZER.with(|tokenizer| {
        let Some(tokenizer) = tokenizer else { return };
        let size = tokenizer.vocab_size();
        if let Ok(prompts) = PromptEncoder::new(tokenizer.clone(), template, size) {
            for role in [crate::Role::Query, crate::Role::Passage] {
                if let Ok(ids) = prompts.encode(role, "a cat", 4096) {
                    assert!(!ids.is_empty());
                }
            }
        }
    });
}

/// Calls `f` with a folder that contains `bytes` as the file `name`.
fn in_folder(name: &str, bytes: &[u8], f: impl FnOnce(&Path)) {
    thread_local!(static FOLDER: Option<tempfile::TempDir> = tempfile::tempdir().ok());
    FOLDER.with(|folder| {
        let Some(folder) = folder else { return };
        let path = folder.path().join(name);
        if std::fs::write(&path, bytes).is_ok() {
            f(folder.path());
        }
        let _ = std::fs::remove_file(&path);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::PathBuf;

    /// The files of a target's corpus, by name.
    fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        paths.sort();
        paths.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
    }

    #[test]
    fn the_corpus_never_panics() {
        for (name, target) in TARGETS {
            let files = corpus(name);
            for (path, bytes) in files {
                let run = std::panic::catch_unwind(|| target(&bytes));
                assert!(run.is_ok(), "{} panics", path.display());
            }
        }
    }

    /// Mutates an input: replaces a byte, removes or repeats a range, replaces a number, or truncates.
    fn change(bytes: &mut Vec<u8>, (kind, at, length, byte): (u8, usize, usize, u8)) {
        const NUMBERS: [&str; 8] =
            ["0", "-1", "99999999999", "18446744073709551615", "1e-300", "1e999", "null", "\"\""];
        if bytes.is_empty() {
            return;
        }
        let at = at % bytes.len();
        let end = at + length % 16.min(bytes.len() - at + 1);
        let end = end.min(bytes.len());
        match kind % 5 {
            0 => bytes[at] = byte,
            1 => drop(bytes.drain(at..end)),
            2 => {
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            3 => {
                // From the next digit on.
                let Some(start) = (at..bytes.len()).find(|&i| bytes[i].is_ascii_digit()) else {
                    return;
                };
                let digits = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
                let number = NUMBERS[byte as usize % NUMBERS.len()];
                bytes.splice(start..start + digits, number.bytes());
            }
            _ => bytes.truncate(at),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn arbitrary_bytes_never_panic(
            target in 0..TARGETS.len(), bytes in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            (TARGETS[target].1)(&bytes);
        }

        #[test]
        fn changed_inputs_never_panic(
            pick in any::<usize>(),
            changes in prop::collection::vec((any::<u8>(), any::<usize>(), any::<usize>(), any::<u8>()), 1..4),
        ) {
            for (name, target) in TARGETS {
                let files = corpus(name);
                if let Some((_, bytes)) = files.get(pick % files.len().max(1)) {
                    let mut bytes = bytes.clone();
                    changes.iter().for_each(|&c| change(&mut bytes, c));
                    target(&bytes);
                }
            }
        }
    }
}
