//! A training run: preparing batches in advance does not change the results.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod batch_gradients;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use batch_gradients::batch_gradients;
use llara::data::{BadRows, Dataset, Sampler, SamplerConfig, Sampling};
use llara::train::{AdamW, Observer, RunLength, Schedule, StepRecord, TrainConfig, Trainer};
use llara::{BiEncoderModel, BiEncoderOptions, Result, Role};

const ROWS: usize = 9;

fn model() -> BiEncoderModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
    BiEncoderModel::from_folder(folder, BiEncoderOptions::default()).unwrap()
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

fn write_rows(dir: &Path) -> PathBuf {
    let path = dir.join("rows.jsonl");
    fs::write(&path, (0..ROWS).map(row).collect::<String>()).unwrap();
    path
}

fn config(dir: &Path, sampling: Sampling, batch_size: usize) -> TrainConfig {
    TrainConfig {
        length: RunLength::Steps(ROWS as u64),
        batch_size,
        group_size: 3,
        query_max_len: 48,
        passage_max_len: 64,
        sampling,
        learning_rate: 1e-3,
        ..TrainConfig::new(dir)
    }
}

/// Records the losses, and calls a function after each step.
struct Watch<F: FnMut(u64)> {
    losses: Vec<f32>,
    after_step: F,
}

impl<F: FnMut(u64)> Observer for Watch<F> {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        assert_eq!(record.step, self.losses.len() as u64 + 1);
        self.losses.push(record.loss);
        (self.after_step)(record.step);
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }
}

/// The losses of the same run, with each batch prepared at the start of its step.
fn losses_without_prefetching(dataset: &Dataset, config: &TrainConfig) -> Vec<f32> {
    let mut model = model();
    model.train();
    let sampler = Sampler::new(SamplerConfig {
        seed: config.seed,
        sampling: config.sampling,
        rows: dataset.len(),
        batch_size: config.batch_size,
        group_size: config.group_size,
        drop_last: config.drop_last,
    })
    .unwrap();
    let backend = model.backend().clone();
    let mut optimizer = AdamW::new(&backend, model.decoder_mut(), config.adamw).unwrap();
    let schedule =
        Schedule::new(config.learning_rate, config.decay, config.warmup, ROWS as u64).unwrap();
    (0..ROWS as u64)
        .map(|step| {
            let (mut queries, mut passages) = (Vec::new(), Vec::new());
            for draw in sampler.batch(step) {
                let row = dataset.row(draw.row).unwrap();
                let group = sampler.group(&draw, &row).unwrap();
                queries.push(group.query.to_owned());
                passages.extend(group.passages.iter().map(|&text| text.to_owned()));
            }
            let query = model.batch(Role::Query, &queries, config.query_max_len).unwrap();
            let passage = model.batch(Role::Passage, &passages, config.passage_max_len).unwrap();
            let loss =
                batch_gradients(&mut model, (&query, &passage), &config.chunking, None).unwrap();
            optimizer.step(&backend, model.decoder_mut(), schedule.rate(step)).unwrap();
            loss
        })
        .collect()
}

#[test]
fn prefetched_batches_are_those_of_their_steps() {
    let dir = tempfile::tempdir().unwrap();
    let rows = write_rows(dir.path());
    let dataset = Dataset::open(&[rows], BadRows::Error).unwrap();
    for sampling in [Sampling::Random, Sampling::Sequential] {
        let config = config(dir.path(), sampling, 4);
        let mut model = model();
        let mut watch = Watch { losses: Vec::new(), after_step: |_| () };
        Trainer::new(&mut model, &dataset, &config).unwrap().run(&mut watch).unwrap();
        let expected = losses_without_prefetching(&dataset, &config);
        assert_eq!(watch.losses, expected, "{sampling:?}");
        assert!(expected.windows(2).all(|pair| pair[0] != pair[1]), "{expected:?}");
    }
}

#[test]
fn a_row_that_changes_during_a_run_stops_it_at_the_step_of_that_row() {
    const CHANGED: usize = 6;
    let dir = tempfile::tempdir().unwrap();
    let rows = write_rows(dir.path());
    let dataset = Dataset::open(std::slice::from_ref(&rows), BadRows::Error).unwrap();
    let config = config(dir.path(), Sampling::Sequential, 1);
    let mut model = model();
    let change = |step| {
        if step == 1 {
            // In place, because a file that is truncated and rewritten is incomplete for a moment.
            let offset: usize = (0..CHANGED).map(|i| row(i).len()).sum();
            let file = fs::File::options().write(true).open(&rows).unwrap();
            file.write_all_at(row(CHANGED).replace("cast", "lost").as_bytes(), offset as u64)
                .unwrap();
        }
    };
    let mut watch = Watch { losses: Vec::new(), after_step: change };
    let error = Trainer::new(&mut model, &dataset, &config).unwrap().run(&mut watch).unwrap_err();
    let expected = format!("rows.jsonl:{}: the file was changed", CHANGED + 1);
    assert!(error.to_string().contains(&expected), "{error}");
    assert_eq!(watch.losses.len(), CHANGED);
}
