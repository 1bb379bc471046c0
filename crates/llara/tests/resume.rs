//! A run that is stopped and resumed gives the same bytes as an uninterrupted run, and damage is detected.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use llara::backend::{Backend, Cpu, Dtype};
use llara::data::{BadRows, Dataset};
use llara::dist::{Collective, ThreadGroup};
use llara::model::weights::SaveDtype;
use llara::model::{LoraConfig, SavedTokens};
use llara::text::Template;
use llara::train::{
    Checkpoint, Chunking, Observer, RunLength, Saving, StepRecord, Summary, TrainConfig, Trainer,
};
use llara::{BiEncoderModel, BiEncoderOptions, Error, Loader, Result};

const ROWS: usize = 11;
const STEPS: u64 = 7;

/// A training setup.
#[derive(Clone, Copy)]
struct Case {
    lora: bool,
    /// Whether the adapter trains tokens that the model lacks, and how they are saved.
    tokens: Option<SavedTokens>,
    precision: Dtype,
    save: SaveDtype,
    chunking: Chunking,
}

const WHOLE: Chunking =
    Chunking { max_tokens: usize::MAX, max_sequences: usize::MAX, kept_tokens: usize::MAX };
const FULL: Case = Case {
    lora: false,
    tokens: None,
    precision: Dtype::F32,
    save: SaveDtype::AsLoaded,
    chunking: WHOLE,
};
const LORA: Case = Case { lora: true, ..FULL };

fn model(case: Case) -> BiEncoderModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
    let mut loader = Loader::new(&folder).unwrap();
    if case.tokens.is_some() {
        let mut template = Template::preset("llara").unwrap();
        template.passage.suffix.push_str("<a1><a2>");
        loader = loader.template(template).add_special_tokens(true).vocabulary_in_adapter(true);
    }
    let outline = loader.outline().unwrap();
    let lora = LoraConfig {
        rank: 4,
        alpha: 8.0,
        dropout: 0.2,
        trained_tokens: outline.added_tokens.clone(),
        saved_tokens: case.tokens.unwrap_or_default(),
        ..LoraConfig::default()
    };
    let mut model = loader.load_weights(outline, Cpu::new(), BiEncoderOptions::default()).unwrap();
    if case.lora {
        model.attach_new_adapter(&lora, 3).unwrap();
    }
    model.set_precision(case.precision).unwrap();
    model
}

fn row(i: usize) -> String {
    let fact = |i: usize| format!("Bell {i} of the tower was cast in {}.", 1600 + 37 * i);
    let row = serde_json::json!({
        "query": format!("When was bell {i} cast?"),
        "pos": [fact(i), format!("It was in {} that bell {i} was cast.", 1600 + 37 * i)],
        "neg": [fact(i + 1), fact(i + 2), fact(i + 3)],
    });
    format!("{row}\n")
}

/// Two files, so that the one that changed can be named.
fn dataset(dir: &Path) -> Dataset {
    let paths = ["a.jsonl", "b.jsonl"].map(|name| dir.join(name));
    if !paths[0].exists() {
        fs::write(&paths[0], (0..5).map(row).collect::<String>()).unwrap();
        fs::write(&paths[1], (5..ROWS).map(row).collect::<String>()).unwrap();
    }
    Dataset::open(&paths, BadRows::Error).unwrap()
}

fn config(dir: &Path, case: Case) -> TrainConfig {
    TrainConfig {
        length: RunLength::Steps(STEPS),
        batch_size: 4,
        group_size: 3,
        query_max_len: 48,
        passage_max_len: 64,
        learning_rate: 1e-3,
        chunking: case.chunking,
        saving: Saving { every: Some(2), keep: None, dtype: case.save },
        ..TrainConfig::new(dir.join("out"))
    }
}

/// Stops the run after a step.
struct StopAfter(u64, u64);

impl Observer for StopAfter {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        assert!(record.loss.is_finite());
        self.1 = record.step;
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn stops(&mut self) -> bool {
        self.1 + 1 >= self.0
    }
}

/// Trains, from a checkpoint if there is one, and saves the model or adapter at the end.
fn train(dir: &Path, config: &TrainConfig, case: Case, stop_after: u64) -> Result<Summary> {
    let dataset = dataset(dir);
    let mut model = model(case);
    let found = Checkpoint::latest(&config.output_dir)?;
    assert!(found.skipped.is_empty() || found.checkpoint.is_some(), "{:?}", found.skipped);
    let mut trainer = match &found.checkpoint {
        Some(checkpoint) => Trainer::resumed(&mut model, &dataset, config, checkpoint)?.0,
        None => Trainer::new(&mut model, &dataset, config)?,
    };
    let first = trainer.state().step();
    let summary = trainer.run(&mut StopAfter(stop_after, first))?;
    if !summary.stopped {
        match case.lora {
            true => model.save_adapter(&config.output_dir)?,
            false => model.save_as(&config.output_dir, case.save)?,
        }
    }
    Ok(summary)
}

/// The files of a folder, without subfolders.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect()
}

fn assert_same_files(got: &Path, want: &Path) {
    let (got, want) = (files(got), files(want));
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    for (name, bytes) in &want {
        assert!(got[name] == *bytes, "{name} differs");
    }
    assert!(want.keys().any(|name| name.ends_with(".safetensors")), "{:?}", want.keys());
}

fn a_stopped_and_resumed_run_gives_the_same_bytes(case: Case) {
    let whole = tempfile::tempdir().unwrap();
    let summary = train(whole.path(), &config(whole.path(), case), case, u64::MAX).unwrap();
    assert_eq!((summary.steps, summary.stopped), (STEPS, false));
    let parts = tempfile::tempdir().unwrap();
    let config = config(parts.path(), case);
    // At a step that is saved anyway, one that is not, and twice in a row.
    for stop in [2, 3, 4] {
        let part = train(parts.path(), &config, case, stop).unwrap();
        assert_eq!((part.steps, part.stopped), (stop, true));
    }
    let resumed = train(parts.path(), &config, case, u64::MAX).unwrap();
    assert_eq!((resumed.steps, resumed.tokens), (STEPS, summary.tokens));
    assert_eq!(resumed.loss.to_bits(), summary.loss.to_bits());
    assert_same_files(&config.output_dir, &whole.path().join("out"));
    // A checkpoint of the resumed run equals that of the other, except for paths and times.
    for name in ["optimizer.safetensors", "llara.json"] {
        let [a, b] = [&parts, &whole].map(|dir| dir.path().join("out/checkpoint-6").join(name));
        assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "{name} differs");
    }
}

#[test]
fn moments_have_the_names_of_the_models_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), FULL);
    train(dir.path(), &config, FULL, 2).unwrap();
    let names = |file: &str| {
        let bytes = fs::read(config.output_dir.join("checkpoint-2").join(file)).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        tensors.names().into_iter().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let tensors = names("model.safetensors");
    assert!(tensors.iter().any(|name| name.ends_with("layers.0.self_attn.k_proj.weight")));
    let expected = tensors.iter().filter(|name| *name != "lm_head.weight").flat_map(|name| {
        let name = name.trim_start_matches("model.");
        [format!("first_moment.{name}"), format!("second_moment.{name}")]
    });
    assert_eq!(names("optimizer.safetensors"), expected.collect());
}

#[test]
fn all_weights() {
    a_stopped_and_resumed_run_gives_the_same_bytes(FULL);
}

#[test]
fn all_weights_in_bf16_and_in_chunks() {
    let chunking = Chunking { max_sequences: 4, kept_tokens: 100, ..WHOLE };
    a_stopped_and_resumed_run_gives_the_same_bytes(Case {
        precision: Dtype::Bf16,
        chunking,
        ..FULL
    });
}

#[test]
fn all_weights_saved_rounded() {
    a_stopped_and_resumed_run_gives_the_same_bytes(Case { save: SaveDtype::Bf16, ..FULL });
}

#[test]
fn adapters() {
    a_stopped_and_resumed_run_gives_the_same_bytes(LORA);
}

#[test]
fn adapters_with_tokens() {
    let tokens = Some(SavedTokens::TrainableTokenIndices);
    a_stopped_and_resumed_run_gives_the_same_bytes(Case { tokens, ..LORA });
}

#[test]
fn adapters_with_tokens_in_bf16_and_in_chunks() {
    let chunking = Chunking { max_sequences: 4, kept_tokens: 100, ..WHOLE };
    a_stopped_and_resumed_run_gives_the_same_bytes(Case {
        tokens: Some(SavedTokens::ModulesToSave),
        precision: Dtype::Bf16,
        chunking,
        ..LORA
    });
}

#[test]
fn adapters_in_bf16_and_in_chunks() {
    let chunking = Chunking { max_sequences: 4, kept_tokens: 100, ..WHOLE };
    a_stopped_and_resumed_run_gives_the_same_bytes(Case {
        precision: Dtype::Bf16,
        chunking,
        ..LORA
    });
}

#[test]
fn a_checkpoint_is_a_model_folder() {
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &config(dir.path(), FULL), FULL, 3).unwrap();
    let options = BiEncoderOptions::default();
    BiEncoderModel::from_folder(dir.path().join("out/checkpoint-3"), options).unwrap();
    let dir = tempfile::tempdir().unwrap();
    train(dir.path(), &config(dir.path(), LORA), LORA, 3).unwrap();
    let mut base = model(FULL);
    base.attach_adapter(&dir.path().join("out/checkpoint-3")).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_skipped_and_named() {
    for (file, what) in [
        ("model.safetensors", "a file of the checkpoint is damaged"),
        ("optimizer.safetensors", "a file of the checkpoint is damaged"),
        ("trainer_state.json", "a file of the checkpoint is damaged"),
        ("manifest.json", "the manifest of the checkpoint"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), FULL);
        train(dir.path(), &config, FULL, 5).unwrap();
        let path = config.output_dir.join("checkpoint-5").join(file);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
        fs::write(&path, &bytes).unwrap();
        let found = Checkpoint::latest(&config.output_dir).unwrap();
        assert_eq!(found.checkpoint.unwrap().progress().step, 4, "{file}");
        let skipped = found.skipped[0].to_string();
        assert!(skipped.contains("checkpoint-5") && skipped.contains(file), "{skipped}");
        assert!(skipped.contains(what), "{skipped}");
        // Truncated, then removed.
        fs::write(&path, &bytes[..middle]).unwrap();
        assert!(Checkpoint::open(path.parent().unwrap()).is_err());
        fs::remove_file(&path).unwrap();
        assert!(Checkpoint::open(path.parent().unwrap()).is_err());
        // The run continues from the previous checkpoint and replaces the damaged one.
        let summary = train(dir.path(), &config, FULL, 5).unwrap();
        assert!(summary.stopped);
        Checkpoint::open(path.parent().unwrap()).unwrap();
    }
}

/// Records what could not be saved or removed while the run went on.
struct Failed(Option<String>);

impl Observer for Failed {
    fn on_step(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn on_save_failed(&mut self, error: Error) -> Result<()> {
        self.0 = Some(error.to_string());
        Ok(())
    }
}

/// Checkpoints are finished in the background: a failure ends the run, unless all steps are made.
#[test]
fn a_checkpoint_that_cannot_be_finished_ends_the_run_but_does_not_lose_a_trained_model() {
    let saving = Saving { every: Some(2), keep: Some(1), dtype: SaveDtype::AsLoaded };
    for (step, ends) in [(6, false), (4, true)] {
        let dir = tempfile::tempdir().unwrap();
        let config =
            TrainConfig { length: RunLength::Steps(6), saving, ..config(dir.path(), FULL) };
        // The folder in which the checkpoint is written is a link to one in which no manifest can be written.
        let hidden = config.output_dir.join(format!(".writing-checkpoint-{step}"));
        fs::create_dir_all(dir.path().join("elsewhere/manifest.json")).unwrap();
        fs::create_dir(&config.output_dir).unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &hidden).unwrap();
        let (dataset, mut model) = (dataset(dir.path()), model(FULL));
        let mut failed = Failed(None);
        let run = Trainer::new(&mut model, &dataset, &config).unwrap().run(&mut failed);
        let before = config.output_dir.join(format!("checkpoint-{}", step - 2));
        assert!(Checkpoint::open(&before).is_ok());
        if !ends {
            assert_eq!(run.unwrap().steps, 6);
            assert!(failed.0.unwrap().contains("manifest.json"));
            continue;
        }
        let error = run.unwrap_err().to_string();
        assert!(error.contains("manifest.json") && failed.0.is_none(), "{error}");
        let whole = TrainConfig { output_dir: dir.path().join("whole"), ..config.clone() };
        train(dir.path(), &whole, FULL, u64::MAX).unwrap();
        assert_eq!(train(dir.path(), &config, FULL, u64::MAX).unwrap().steps, 6);
        assert_same_files(&config.output_dir, &whole.output_dir);
    }
}

/// An old checkpoint that cannot be removed does not end the run.
#[test]
fn a_checkpoint_that_cannot_be_removed_is_reported() {
    let saving = Saving { every: Some(2), keep: Some(1), dtype: SaveDtype::AsLoaded };
    let dir = tempfile::tempdir().unwrap();
    let config = TrainConfig { length: RunLength::Steps(6), saving, ..config(dir.path(), FULL) };
    fs::create_dir(&config.output_dir).unwrap();
    // A file in the place where an old checkpoint is moved before it is removed.
    fs::write(config.output_dir.join(".removed-checkpoint-2"), "").unwrap();
    let (dataset, mut model) = (dataset(dir.path()), model(FULL));
    let mut failed = Failed(None);
    let mut trainer = Trainer::new(&mut model, &dataset, &config).unwrap();
    assert_eq!(trainer.run(&mut failed).unwrap().steps, 6);
    assert!(failed.0.unwrap().contains("checkpoint-2"));
    assert!(Checkpoint::open(&config.output_dir.join("checkpoint-6")).is_ok());
}

#[test]
fn other_settings_and_other_data_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let good = config(dir.path(), FULL);
    train(dir.path(), &good, FULL, 3).unwrap();
    let refused = |config: &TrainConfig, case| {
        train(dir.path(), config, case, u64::MAX).unwrap_err().to_string()
    };
    let changed = TrainConfig { seed: 43, learning_rate: 2e-3, ..good.clone() };
    let text = refused(&changed, FULL);
    assert!(text.contains("2 settings differ") && text.contains("checkpoint-3"), "{text}");
    assert!(text.contains("seed: 42 in the checkpoint, 43 now"), "{text}");
    assert!(text.contains("learning-rate: 0.001 in the checkpoint, 0.002 now"), "{text}");
    let shorter = TrainConfig { length: RunLength::Steps(5), ..good.clone() };
    assert!(refused(&shorter, FULL).contains("steps: 7 in the checkpoint, 5 now"));
    assert!(refused(&good, LORA).contains("lora: null in the checkpoint"));
    assert!(refused(&good, Case { precision: Dtype::Bf16, ..FULL }).contains("dtype: \"f32\""));

    let path = dir.path().join("b.jsonl");
    let rows = fs::read_to_string(&path).unwrap();
    fs::write(&path, rows.replace("cast in 17", "cast in 18")).unwrap();
    let text = refused(&good, FULL);
    assert!(text.contains("b.jsonl: the training data changed"), "{text}");
    fs::write(&path, rows).unwrap();

    // Allowed differences: more steps, logging, saving.
    let more = TrainConfig {
        length: RunLength::Steps(9),
        logging_steps: 1,
        saving: Saving { every: Some(1), keep: Some(2), dtype: SaveDtype::AsLoaded },
        ..good
    };
    let checkpoint = Checkpoint::latest(&more.output_dir).unwrap().checkpoint.unwrap();
    let (dataset, mut model) = (dataset(dir.path()), model(FULL));
    let (mut trainer, notes) = Trainer::resumed(&mut model, &dataset, &more, &checkpoint).unwrap();
    assert!(notes.len() == 1 && notes[0].contains("9 steps instead of 7"), "{notes:?}");
    assert_eq!(trainer.run(&mut StopAfter(u64::MAX, 3)).unwrap().steps, 9);
    let mut names: Vec<_> = fs::read_dir(&more.output_dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["checkpoint-8", "checkpoint-9"], "the two newest are kept");
}

#[test]
fn saved_by_two_processes_it_is_resumed_by_one_and_by_three() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path());
    let of = |processes: usize, rows: usize| TrainConfig {
        batch_size: rows / processes,
        ..config(dir.path(), FULL)
    };
    let run = |processes: usize, stop: u64, checkpoint: Option<&Checkpoint>| {
        let config = of(processes, 6);
        let ranks = ThreadGroup::ranks(processes, &Cpu::new(), Duration::from_secs(60));
        let (data, config) = (&data, &config);
        std::thread::scope(|scope| {
            let threads: Vec<_> = ranks
                .into_iter()
                .map(|rank| {
                    scope.spawn(move || {
                        let rank: Arc<dyn Collective<Cpu>> = Arc::new(rank);
                        let mut model = model(FULL);
                        model.set_negatives_cross_device(processes > 1);
                        let (mut trainer, _) =
                            Trainer::in_group(&mut model, data, config, rank, checkpoint).unwrap();
                        let first = trainer.state().step();
                        trainer.run(&mut StopAfter(stop, first)).unwrap()
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        })
    };
    let summaries = run(2, 3, None);
    assert!(summaries.iter().all(|summary| summary.stopped && summary.steps == 3));
    let folder = dir.path().join("out/checkpoint-3");
    assert!(folder.join("optimizer-00001-of-00002.safetensors").is_file());
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let whole = run(2, u64::MAX, None);
    for processes in [1, 2, 3] {
        let resumed = run(processes, u64::MAX, Some(&checkpoint));
        assert_eq!(resumed[0].steps, STEPS);
        let (got, want) = (f64::from(resumed[0].loss), f64::from(whole[0].loss));
        if processes == 2 {
            assert_eq!(got.to_bits(), want.to_bits());
        }
        assert!((got - want).abs() <= 1e-5 * want, "{processes}: {got} instead of {want}");
    }

    // With negatives of the own process, those of a query would be others.
    let config = of(3, 6);
    let mut model = model(FULL);
    let ranks = ThreadGroup::ranks(1, &Cpu::new(), Duration::from_secs(60));
    let group: Arc<dyn Collective<Cpu>> = Arc::new(ranks.into_iter().next().unwrap());
    let error = Trainer::in_group(&mut model, &data, &config, group, Some(&checkpoint)).err();
    let error = error.unwrap().to_string();
    assert!(error.contains("negatives-of-rows: 6 in the checkpoint, 2 now"), "{error}");
}

/// The environment variable with the kernels that a process must use; the process prints those that it uses.
const KERNELS: &str = "LLARA_TEST_KERNELS";

#[test]
fn a_process_uses_the_kernels_of_a_checkpoint() {
    if let Ok(kernels) = std::env::var(KERNELS) {
        Cpu::new().use_kernels(&kernels);
        println!("kernels: {}", Cpu::new().kernels(Dtype::Bf16));
        return;
    }
    let used = |kernels: &str| {
        let mut command = std::process::Command::new(std::env::current_exe().unwrap());
        command.args(["a_process_uses_the_kernels_of_a_checkpoint", "--exact", "--nocapture"]);
        let output = command.env_remove("LLARA_CPU").env(KERNELS, kernels).output().unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.split_once("kernels: "));
        line.unwrap().1.to_owned()
    };
    // Independent of the measurement. A processor without bf16 instructions has only one choice.
    let (slow, fast) = ("avx512bf16", "avx512bf16, bf16 products by vdpbf16ps");
    match used(slow).starts_with(slow) {
        true => assert_eq!([used(slow), used(fast)], [slow, fast]),
        false => assert_eq!(used(slow), used(fast)),
    }
}
