//! What masks and distillation change on rows with false negatives, and on rows without. Every query has two
//! answers, and only the first is its positive in training: the second is found as far as it is not trained to be
//! a negative.
//!
//! `cargo test --test objectives -- --nocapture` prints the figures of `docs/objectives.md`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::path::{Path, PathBuf};

use llara::data::{BadRows, Dataset, Sampling};
use llara::loss::{Distillation, DistillationKind, FalseNegatives, ObjectiveOptions};
use llara::train::{Observer, RunLength, StepRecord, TrainConfig, Trainer};
use llara::{BiEncoderModel, BiEncoderOptions, Result, Role};

const ROWS: usize = 24;
const STEPS: u64 = 200;

fn query(i: usize) -> String {
    format!("When was bell {i} cast?")
}

/// Two wordings, in turn the first answer: no wording is that of the negatives.
fn answers(i: usize) -> [String; 2] {
    let year = 1600 + 37 * i;
    let [first, second] =
        [format!("Bell {i} was cast in {year}."), format!("They made bell {i} in {year}.")];
    if i.is_multiple_of(2) { [first, second] } else { [second, first] }
}

/// The hard negative of a row.
#[derive(Debug, Clone, Copy)]
enum HardNegative {
    /// Its own second answer.
    OwnAnswer,
    /// The second answer of the next row, which is in the same batch.
    AnswerOfNextRow,
    /// No row's answer.
    NoAnswer,
}

fn dataset(dir: &Path, negative: HardNegative, negative_score: f32) -> Dataset {
    let row = |i: usize| {
        let negative = match negative {
            HardNegative::OwnAnswer => answers(i)[1].clone(),
            HardNegative::AnswerOfNextRow => answers((i + 1) % ROWS)[1].clone(),
            HardNegative::NoAnswer => format!("The crack of bell {i} was found in 1999."),
        };
        let row = serde_json::json!({
            "query": query(i), "pos": answers(i), "neg": [negative],
            "pos_scores": [5.0, 5.0], "neg_scores": [negative_score],
        });
        format!("{row}\n")
    };
    let path = dir.join("rows.jsonl");
    fs::write(&path, (0..ROWS).map(row).collect::<String>()).unwrap();
    Dataset::open(&[path], BadRows::Error).unwrap()
}

#[derive(Default)]
struct Losses(Vec<f32>);

impl Observer for Losses {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        self.0.push(record.loss);
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }
}

/// The losses of a run, and the share of answers that are among the first two of all answers for their query.
fn train(
    negative: HardNegative,
    negative_score: f32,
    objective: &ObjectiveOptions,
    steps: u64,
) -> (Vec<f32>, f64) {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path(), negative, negative_score);
    let config = TrainConfig {
        length: RunLength::Steps(steps),
        batch_size: 12,
        group_size: 2,
        query_max_len: 48,
        passage_max_len: 64,
        learning_rate: 2e-3,
        sampling: Sampling::Sequential,
        objective: objective.clone(),
        ..TrainConfig::new(dir.path())
    };
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
    let mut model = BiEncoderModel::from_folder(folder, BiEncoderOptions::default()).unwrap();
    let mut losses = Losses::default();
    Trainer::new(&mut model, &dataset, &config).unwrap().run(&mut losses).unwrap();

    let encode = |role, texts: &[String]| {
        model.encode(&model.batch(role, texts, 64).unwrap()).unwrap().unwrap()
    };
    let queries = encode(Role::Query, &(0..ROWS).map(query).collect::<Vec<_>>());
    let passages = encode(Role::Passage, &(0..ROWS).flat_map(answers).collect::<Vec<_>>());
    let scores = queries.dot(&passages.t());
    let found = scores.rows().into_iter().enumerate().map(|(i, scores)| {
        let own = [scores[2 * i], scores[2 * i + 1]];
        let above = |score: f32| scores.iter().filter(|&&other| other > score).count();
        own.into_iter().filter(|&score| above(score) < 2).count()
    });
    let recall = found.sum::<usize>() as f64 / (2 * ROWS) as f64;
    (losses.0, recall)
}

fn masked() -> ObjectiveOptions {
    let false_negatives = FalseNegatives { mask_equal: true, margin: None };
    ObjectiveOptions { false_negatives, ..ObjectiveOptions::default() }
}

fn distilled() -> ObjectiveOptions {
    let distillation =
        Some(Distillation { kind: DistillationKind::Kl, weight: 4.0, temperature: 1.0 });
    ObjectiveOptions { distillation, ..ObjectiveOptions::default() }
}

#[test]
fn masking_helps_where_answers_are_negatives_and_changes_nothing_elsewhere() {
    let plain = ObjectiveOptions::default();
    for negative in [HardNegative::OwnAnswer, HardNegative::AnswerOfNextRow] {
        let (_, without) = train(negative, 5.0, &plain, STEPS);
        let (_, with) = train(negative, 5.0, &masked(), STEPS);
        println!("recall@2, {negative:?} is the hard negative: {without:.3}, masked {with:.3}");
        assert!(with > without + 0.05, "{negative:?}: {with} masked, {without} without");
    }
    let (unmasked_losses, without) = train(HardNegative::NoAnswer, 5.0, &plain, STEPS / 4);
    let (masked_losses, with) = train(HardNegative::NoAnswer, 5.0, &masked(), STEPS / 4);
    println!("recall@2, NoAnswer is the hard negative: {without:.3}, masked {with:.3}");
    assert_eq!(masked_losses, unmasked_losses);
}

#[test]
fn distillation_helps_where_the_teacher_knows_more_than_the_labels() {
    let plain = ObjectiveOptions::default();
    let (_, without) = train(HardNegative::OwnAnswer, 5.0, &plain, STEPS);
    let (_, with) = train(HardNegative::OwnAnswer, 5.0, &distilled(), STEPS);
    // This teacher repeats the labels.
    let (_, repeated) = train(HardNegative::OwnAnswer, -5.0, &distilled(), STEPS);
    println!(
        "recall@2: {without:.3}, distilled {with:.3}, from a teacher that repeats the labels {repeated:.3}"
    );
    assert!(with > without + 0.2, "{with} distilled, {without} without");
    assert!(repeated < with - 0.2, "{repeated}, {with} with a better teacher");
}
