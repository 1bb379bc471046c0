//! The identity of a run: the settings, the data and the model on which its results depend. A checkpoint can be
//! resumed only by a run with the same identity.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::backend::Backend;
use crate::biencoder::{BiEncoderModel, BiEncoderOptions, RunFacts, Shortcuts, setting};
use crate::data::{DataFile, DataSource, Dataset};
use crate::loss::{
    Distillation, DistillationKind, FalseNegatives, MatryoshkaPrefix, ObjectiveOptions,
};
use crate::model::LoraConfig;
use crate::storage::Fingerprint;
use crate::train::config::{Batching, TrainConfig};
use crate::train::task::Task;
use crate::{Error, ErrorKind, Result};

/// The inputs on which the results of a run depend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::train) struct Identity {
    /// Number of steps of the run. A resumed run may have more; the schedule then uses the new number.
    pub(super) total_steps: u64,
    /// Must be equal.
    pub(super) settings: Map<String, Value>,
    /// Must be equal, except for the paths.
    pub(super) data: Vec<DataFile>,
    /// Settings that affect rounding; a difference gives a note.
    pub(super) rounding: Map<String, Value>,
}

impl Identity {
    /// The identity of a run of `task`.
    pub(in crate::train) fn of<B: Backend, T: Task<B>>(
        model: &BiEncoderModel<B>,
        task: &T,
        config: &TrainConfig,
        (total_steps, processes): (u64, usize),
    ) -> Result<Self> {
        let mut rounding = Map::new();
        rounding.insert("llara".to_owned(), env!("CARGO_PKG_VERSION").into());
        rounding.insert("kernels".to_owned(), model.backend().kernels(model.precision()).into());
        rounding.insert("processes".to_owned(), processes.into());
        if !config.shard_optimizer && processes > 1 {
            rounding.insert("shard-optimizer".to_owned(), false.into());
        }
        Ok(Identity {
            total_steps,
            settings: settings(model, config, processes)?
                .into_iter()
                .chain(task.settings(model))
                .collect(),
            data: task.dataset().files(),
            rounding,
        })
    }

    /// A hash of everything that must be equal on the processes of a run; the paths of the data may differ.
    pub(in crate::train) fn hash(&self) -> u64 {
        let Identity { total_steps, settings, data, rounding } = self;
        let data: Vec<_> = data.iter().map(|file| (file.rows, file.fingerprint)).collect();
        let mut fingerprint = Fingerprint::new();
        fingerprint.add(json!([total_steps, settings, data, rounding]).to_string().as_bytes());
        fingerprint.short()
    }

    /// Compares the identity of a checkpoint with that of the run that resumes it; returns notes about
    /// harmless differences.
    ///
    /// # Errors
    /// All settings that differ, or the first data file that does.
    pub(super) fn check(&self, now: &Identity, checkpoint: &Path) -> Result<Vec<String>> {
        let mut changed = differences(&self.settings, &now.settings);
        if now.total_steps < self.total_steps {
            changed.push(format!(
                "steps: {} in the checkpoint, {} now",
                self.total_steps, now.total_steps
            ));
        }
        if !changed.is_empty() {
            let what = match changed.len() {
                1 => "a setting differs from the checkpoint's".to_owned(),
                count => format!("{count} settings differ from the checkpoint's"),
            };
            return Err(Error::new(ErrorKind::Argument, what)
                .file(checkpoint)
                .got(format!("\n    {}", changed.join("\n    ")))
                .hint(
                    "give the settings of the interrupted run (more steps, and other settings of logging \
                     and saving, are allowed); or start a new run from the checkpoint's weights",
                ));
        }
        self.check_data(&now.data)?;
        let mut notes = Vec::new();
        if now.total_steps > self.total_steps {
            notes.push(format!(
                "the run has {} steps instead of {}: from here on the learning rate follows the longer \
                 schedule",
                now.total_steps, self.total_steps
            ));
        }
        for difference in differences(&self.rounding, &now.rounding) {
            notes.push(format!(
                "{difference}: results may differ in rounding from those of an uninterrupted run"
            ));
        }
        Ok(notes)
    }

    /// Data and settings for the model card. Paths are left out.
    pub(in crate::train) fn facts(&self) -> RunFacts {
        // The card has these elsewhere, or they are hashes.
        const ELSEWHERE: [&str; 8] = [
            "base-model",
            "vocabulary",
            "template",
            "normalized",
            "query-max-len",
            "passage-max-len",
            "query-instruction",
            "passage-instruction",
        ];
        let name =
            |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let settings = self.settings.iter().filter(|(key, _)| !ELSEWHERE.contains(&key.as_str()));
        RunFacts {
            data: self.data.iter().map(|file| (name(&file.path), file.rows)).collect(),
            settings: settings
                .filter_map(|(key, value)| Some((key.clone(), setting(value)?)))
                .collect(),
            steps: None,
            loss: None,
        }
    }

    /// # Errors
    /// The first file whose rows are not those that the checkpoint was trained on.
    pub(super) fn check_data(&self, now: &[DataFile]) -> Result<()> {
        let describe = |file: Option<&DataFile>| match file {
            Some(file) => {
                format!("{} rows, fingerprint {:016x}", file.rows, file.fingerprint)
            }
            None => "no file".to_owned(),
        };
        let same = |a: &DataFile, b: &DataFile| (a.rows, a.fingerprint) == (b.rows, b.fingerprint);
        for at in 0..self.data.len().max(now.len()) {
            let (before, now) = (self.data.get(at), now.get(at));
            if let (Some(before), Some(now)) = (before, now)
                && same(before, now)
            {
                continue;
            }
            let path = now.or(before).map(|file| file.path.clone()).unwrap_or_default();
            return Err(Error::new(
                ErrorKind::Data,
                "the training data changed since the checkpoint",
            )
            .file(path)
            .expected(format!("{} in place {}", describe(before), at + 1))
            .got(describe(now))
            .hint("give the same files in the same order, or start a new run"));
        }
        Ok(())
    }
}

/// One line for each key whose value differs.
fn differences(before: &Map<String, Value>, now: &Map<String, Value>) -> Vec<String> {
    let show = |value: Option<&Value>| value.map_or("not set".to_owned(), Value::to_string);
    let keys = before.keys().chain(now.keys().filter(|key| !before.contains_key(*key)));
    keys.filter(|key| !same(before.get(*key), now.get(*key)))
        .map(|key| {
            format!(
                "{key}: {} in the checkpoint, {} now",
                show(before.get(key)),
                show(now.get(key))
            )
        })
        .collect()
}

/// Whether two settings are equal. A fraction that was written to JSON and read may differ in its last bit.
fn same(a: Option<&Value>, b: Option<&Value>) -> bool {
    match (a, b) {
        (Some(Value::Number(a)), Some(Value::Number(b))) if a != b => {
            match (a.as_f64(), b.as_f64(), a.is_f64() && b.is_f64()) {
                (Some(a), Some(b), true) => (a - b).abs() <= 4.0 * f64::EPSILON * a.abs(),
                _ => false,
            }
        }
        _ => a == b,
    }
}

/// The settings that the results of any task depend on, by the names of the command line's options where there are
/// any; [`finetuning_settings`] has the rest of the same structures.
///
/// The structures are destructured, so that a new field must be added here or explicitly omitted.
fn settings<B: Backend>(
    model: &BiEncoderModel<B>,
    config: &TrainConfig,
    processes: usize,
) -> Result<Map<String, Value>> {
    let TrainConfig {
        output_dir: _,
        length: _,
        batch_size,
        group_size: _,
        query_max_len: _,
        passage_max_len: _,
        objective: _,
        sampling,
        batching: _,
        drop_last,
        seed,
        learning_rate,
        decay,
        warmup,
        adamw,
        query_instruction: _,
        passage_instruction: _,
        chunking,
        logging_steps: _,
        saving: _,
        shard_optimizer: _, // in `rounding`
        bucket_elements: _,
    } = config;
    let BiEncoderOptions {
        normalized: _,
        negatives_cross_device: _,
        temperature: _,
        sub_batch_size: _, // of encoding only
        shortcuts: Shortcuts { last_layer_at_pooled, dedup_sequences: _ },
    } = model.options();
    let unlimited = |limit: usize| (limit != usize::MAX).then_some(limit);
    let lora = model.adapter().map(|lora| {
        let LoraConfig { rank, alpha, dropout, target_modules, trained_tokens, saved_tokens: _ } = lora;
        let mut value = json!({
            "rank": rank, "alpha": alpha, "dropout": decimal(*dropout), "target-modules": target_modules,
        });
        // Checkpoints of versions without trained tokens can be resumed.
        if !trained_tokens.is_empty() {
            value["trained-tokens"] = json!(trained_tokens);
        }
        value
    });
    let value = json!({
        "base-model": model.source().map(fingerprint).transpose()?,
        "vocabulary": model.decoder().config().vocab_size,
        "template": model.recipe().template,
        "last-layer-at-pooled": last_layer_at_pooled,
        "lora": lora,
        "dtype": model.precision(),
        "batch-size": batch_size * processes,
        "sampling": sampling,
        "dataloader-drop-last": drop_last,
        "seed": seed,
        "learning-rate": learning_rate,
        "lr-scheduler-type": format!("{decay:?}").to_lowercase(),
        "warmup": format!("{warmup:?}"),
        "adam-beta1": adamw.beta1,
        "adam-beta2": adamw.beta2,
        "adam-epsilon": adamw.epsilon,
        "weight-decay": adamw.weight_decay,
        "max-grad-norm": adamw.max_grad_norm.map(decimal),
        "chunk-tokens": unlimited(chunking.max_tokens),
        "chunk-sequences": unlimited(chunking.max_sequences),
        "kept-tokens": unlimited(chunking.kept_tokens),
    });
    let mut settings = object(value);
    // An adapter's tokenizer is not in the folder of the base model.
    if model.has_own_tokenizer()? {
        let mut tokenizer = Fingerprint::new();
        tokenizer.add(&model.prompts().tokenizer().contents()?);
        settings.insert("tokenizer".to_owned(), tokenizer.to_string().into());
    }
    Ok(settings)
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        _ => unreachable!("`json!` was given an object"),
    }
}

/// The settings that only the results of fine-tuning depend on.
pub(in crate::train) fn finetuning_settings(
    options: &BiEncoderOptions,
    config: &TrainConfig,
    dataset: &Dataset,
    processes: usize,
) -> Map<String, Value> {
    let across = options.negatives_cross_device;
    // The rows whose passages are the negatives of a query: with another number of processes, other ones than before
    // are another loss, but one process with all rows has those of several with negatives across them.
    let negatives = match config.objective.in_batch_negatives {
        true if across => config.batch_size * processes,
        true => config.batch_size,
        false => 1,
    };
    let mut settings = object(json!({
        "normalized": options.normalized,
        "temperature": decimal(options.effective_temperature()),
        "negatives-of-rows": negatives,
        "dedup-sequences": options.shortcuts.dedup_sequences,
        "train-group-size": config.group_size,
        "query-max-len": config.query_max_len,
        "passage-max-len": config.passage_max_len,
        "query-instruction": config.query_instruction,
        "passage-instruction": config.passage_instruction,
    }));
    settings.extend(objective_settings(&config.objective));
    if config.objective.reference_gradient_scale && across {
        settings.insert("reference-gradient-scale".to_owned(), processes.into());
    }
    settings.extend(data_settings(&config.batching, dataset));
    settings
}

/// The settings of a data set file: batching, and task and instructions of each file.
fn data_settings(batching: &Batching, dataset: &Dataset) -> Map<String, Value> {
    let mut settings = Map::new();
    if let Batching::PerFile { weights } = batching {
        settings.insert("batching".to_owned(), "per-file".into());
        settings.insert("file-weights".to_owned(), weights.as_slice().into());
    }
    let instructions = |source: &DataSource| {
        json!([source.task, source.query_instruction, source.passage_instruction])
    };
    let none = instructions(&DataSource::default());
    let all: Vec<Value> = dataset.sources_of_files().map(instructions).collect();
    if all.iter().any(|of_file| *of_file != none) {
        settings.insert("instructions-of-files".to_owned(), all.into());
    }
    settings
}

/// The settings of the objective that are not the default: checkpoints of versions without them can be resumed.
fn objective_settings(objective: &ObjectiveOptions) -> impl Iterator<Item = (String, Value)> {
    let ObjectiveOptions {
        in_batch_negatives,
        false_negatives: FalseNegatives { mask_equal, margin },
        symmetric,
        matryoshka,
        distillation,
        reference_gradient_scale: _, // with the number of processes, by the caller
    } = objective;
    let prefix = |&MatryoshkaPrefix { dimension, weight }: &MatryoshkaPrefix| json!({ "dimension": dimension, "weight": decimal(weight) });
    let distill = |&Distillation { kind, weight, temperature }: &Distillation| {
        let kind = match kind {
            DistillationKind::Kl => "kl",
            DistillationKind::MarginMse => "margin-mse",
        };
        json!({ "loss": kind, "weight": decimal(weight), "temperature": decimal(temperature) })
    };
    let settings = [
        ("in-batch-negatives", (!in_batch_negatives).then_some(json!(false))),
        ("mask-equal", mask_equal.then_some(json!(true))),
        ("mask-margin", margin.map(|margin| json!(decimal(margin)))),
        ("symmetric", symmetric.then_some(json!(true))),
        (
            "matryoshka-dims",
            (!matryoshka.is_empty()).then(|| matryoshka.iter().map(prefix).collect()),
        ),
        ("distill", distillation.as_ref().map(distill)),
    ];
    settings.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)))
}

/// The decimal number that the user wrote, such as 0.1, instead of the digits of the nearest f32.
pub(in crate::train) fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(f64::from(x))
}

/// Bytes at the start and at the end of a weight file that are hashed.
const ENDS: u64 = 1 << 20;

/// A hash of a model folder: of its configuration and tokenizer, and of the length and both ends of each weight
/// file; not of all weights, because they are gigabytes.
fn fingerprint(dir: &Path) -> Result<String> {
    let io = |e| Error::io("read the model", dir, e);
    let mut names: Vec<_> = std::fs::read_dir(dir)
        .map_err(io)?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<std::io::Result<_>>()
        .map_err(io)?;
    names.retain(|name| {
        let name = name.to_string_lossy();
        name.ends_with(".safetensors") || name == "config.json" || name == "tokenizer.json"
    });
    names.sort();
    let mut fingerprint = Fingerprint::new();
    for name in names {
        let path = dir.join(&name);
        let part = || -> std::io::Result<(u64, Vec<u8>)> {
            let mut file = File::open(&path)?;
            let length = file.metadata()?.len();
            let mut bytes = Vec::new();
            if !name.to_string_lossy().ends_with(".safetensors") || length <= 2 * ENDS {
                file.read_to_end(&mut bytes)?;
            } else {
                (&mut file).take(ENDS).read_to_end(&mut bytes)?;
                file.seek(SeekFrom::End(-(ENDS as i64)))?;
                file.read_to_end(&mut bytes)?;
            }
            Ok((length, bytes))
        };
        let (length, bytes) = part().map_err(|e| Error::io("read the model", &path, e))?;
        fingerprint.add(name.as_encoded_bytes());
        fingerprint.add(&length.to_le_bytes());
        fingerprint.add(&bytes);
    }
    Ok(fingerprint.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn differences_are_listed_except_in_the_last_bit() {
        let before = map(json!({"a": 0.1, "b": 1, "c": "x", "gone": true, "seed": u64::MAX}));
        let after = map(json!({
            "a": 0.1 + f64::EPSILON / 16.0, "b": 2, "c": "x", "new": null, "seed": u64::MAX - 1,
        }));
        let seed = format!("seed: {} in the checkpoint, {} now", u64::MAX, u64::MAX - 1);
        assert_eq!(
            differences(&before, &after),
            [
                "b: 1 in the checkpoint, 2 now",
                "gone: true in the checkpoint, not set now",
                &seed,
                "new: not set in the checkpoint, null now",
            ]
        );
        assert_eq!(differences(&before, &before), [""; 0]);
        assert!(!same(Some(&json!(0.1)), Some(&json!(0.1000001))));
    }

    #[test]
    fn the_fingerprint_depends_on_both_ends_of_a_weight_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let mut bytes = vec![7u8; 3 << 20];
        std::fs::write(&path, &bytes).unwrap();
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        let first = fingerprint(dir.path()).unwrap();
        std::fs::write(dir.path().join("README.md"), "x").unwrap();
        assert_eq!(fingerprint(dir.path()).unwrap(), first);
        for at in [0, (3 << 20) - 1] {
            bytes[at] ^= 1;
            std::fs::write(&path, &bytes).unwrap();
            assert_ne!(fingerprint(dir.path()).unwrap(), first);
            bytes[at] ^= 1;
        }
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(fingerprint(dir.path()).unwrap(), first);
        std::fs::write(dir.path().join("config.json"), "{ }").unwrap();
        assert_ne!(fingerprint(dir.path()).unwrap(), first);
    }
}
