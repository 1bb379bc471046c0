//! Training on several processes gives the results of one process with the same global batches. The processes are
//! threads here, each with its own model.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use llara::backend::{Backend, Cpu};
use llara::data::{BadRows, Dataset};
use llara::dist::{Collective, Solo, ThreadGroup, ThreadRank};
use llara::loss::{
    Distillation, DistillationKind, FalseNegatives, MatryoshkaPrefix, ObjectiveOptions,
};
use llara::model::LoraConfig;
use llara::train::{
    Batching, Chunking, Observer, RunLength, StepInput, StepRecord, TrainConfig, Trainer,
    accumulate_gradients,
};
use llara::{BiEncoderModel, BiEncoderOptions, Result, Role};

/// Rows of the data. With batches of 6, every second batch has 5 rows, which 2 and 3 processes cannot divide evenly.
const ROWS: usize = 11;
const BATCH: usize = 6;
const STEPS: u64 = 8;
const TIMEOUT: Duration = Duration::from_secs(60);

fn model() -> BiEncoderModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
    BiEncoderModel::from_folder(folder, BiEncoderOptions::default()).unwrap()
}

fn dataset(dir: &Path, rows: usize) -> Dataset {
    let fact = |i: usize| format!("Bell {i} of the tower was cast in {}.", 1600 + 37 * i);
    let row = |i: usize| {
        let row = serde_json::json!({
            "query": format!("When was bell {i} cast?"),
            "pos": [fact(i), format!("It was in {} that bell {i} was cast.", 1600 + 37 * i)],
            "neg": [fact(i + 1), fact(i + 2), fact(i + 3)],
            "pos_scores": [3.0, 2.5],
            "neg_scores": [0.25 * i as f64, -1.0, 0.5],
        });
        format!("{row}\n")
    };
    let paths = [dir.join("first.jsonl"), dir.join("second.jsonl")];
    for (path, rows) in paths.iter().zip([0..4, 4..rows]) {
        fs::write(path, rows.map(row).collect::<String>()).unwrap();
    }
    Dataset::open(&paths, BadRows::Error).unwrap()
}

#[derive(Clone, Copy)]
struct Case {
    lora: bool,
    chunking: Chunking,
    cross_device: bool,
    /// Elements of a bucket of gradients.
    bucket: usize,
    /// Whether the objective has all of its terms, and batches are of one file each.
    all_terms: bool,
    /// Whether the moments are divided among the processes.
    shard: bool,
}

/// The losses and results of one rank.
struct Run {
    losses: Vec<f64>,
    norms: Vec<f64>,
    tokens: Vec<u64>,
    weights: Vec<(String, Vec<f32>)>,
}

#[derive(Default)]
struct Watch(Vec<StepRecord>);

impl Observer for Watch {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        self.0.push(*record);
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }
}

fn config(dir: &Path, batch_size: usize, case: Case) -> TrainConfig {
    TrainConfig {
        length: RunLength::Steps(STEPS),
        batch_size,
        group_size: 3,
        query_max_len: 48,
        passage_max_len: 64,
        learning_rate: 1e-3,
        chunking: case.chunking,
        objective: if case.all_terms { all_terms() } else { ObjectiveOptions::default() },
        batching: match case.all_terms {
            true => Batching::PerFile { weights: vec![1.0, 2.0] },
            false => Batching::Mixed,
        },
        shard_optimizer: case.shard,
        bucket_elements: Some(case.bucket),
        ..TrainConfig::new(dir)
    }
}

fn all_terms() -> ObjectiveOptions {
    let kind = DistillationKind::Kl;
    let prefix = |dimension, weight| MatryoshkaPrefix { dimension, weight };
    ObjectiveOptions {
        false_negatives: FalseNegatives { mask_equal: true, margin: Some(0.05) },
        symmetric: true,
        matryoshka: vec![prefix(8, 0.5), prefix(24, 1.0)],
        distillation: Some(Distillation { kind, weight: 0.5, temperature: 2.0 }),
        ..ObjectiveOptions::default()
    }
}

fn train(
    dataset: &Dataset,
    config: &TrainConfig,
    case: Case,
    collective: Arc<dyn Collective<Cpu>>,
) -> Run {
    let mut model = model();
    if case.lora {
        let lora = LoraConfig {
            rank: 4,
            alpha: 8.0,
            dropout: 0.2,
            trained_tokens: vec![20, 60, 100, 383],
            ..LoraConfig::default()
        };
        model.attach_new_adapter(&lora, 3).unwrap();
    }
    model.set_negatives_cross_device(case.cross_device && collective.size() > 1);
    let mut watch = Watch::default();
    let (mut trainer, _) =
        Trainer::in_group(&mut model, dataset, config, collective, None).unwrap();
    trainer.run(&mut watch).unwrap();
    let weights = model.decoder().trainable_parameters().map(|parameter| {
        (parameter.name().to_owned(), model.backend().download(parameter.values()).unwrap())
    });
    Run {
        losses: watch.0.iter().map(|record| f64::from(record.loss)).collect(),
        norms: watch.0.iter().map(|record| f64::from(record.grad_norm)).collect(),
        tokens: watch.0.iter().map(|record| record.tokens).collect(),
        weights: weights.collect(),
    }
}

/// Calls `f` on a thread of each rank.
fn in_group<T: Send>(size: usize, f: impl Fn(ThreadRank<Cpu>) -> T + Sync) -> Vec<T> {
    let ranks = ThreadGroup::ranks(size, &Cpu::new(), TIMEOUT);
    let f = &f;
    std::thread::scope(|scope| {
        let threads: Vec<_> = ranks.into_iter().map(|rank| scope.spawn(move || f(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn assert_close(what: &str, got: f64, want: f64, bound: f64) {
    let error = (got - want).abs();
    // The condition must be false for NaN.
    assert!(error <= bound * want.abs(), "{what}: {got} instead of {want}, off by {error:e}");
}

fn relative_norm(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 =
        got.iter().zip(want).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = want.iter().map(|x| square(f64::from(*x))).sum();
    (difference / norm).sqrt()
}

fn processes_agree_with_one(case: Case) {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path(), ROWS);
    let whole = config(dir.path(), BATCH, case);
    let alone = train(&dataset, &whole, case, Arc::new(Solo));
    assert!(alone.losses.windows(2).all(|pair| pair[0] != pair[1]), "{:?}", alone.losses);
    for size in [1, 2, 3] {
        let config = config(dir.path(), BATCH / size, case);
        let runs = in_group(size, |rank| train(&dataset, &config, case, Arc::new(rank)));
        for run in &runs {
            assert_eq!(run.losses, runs[0].losses, "the ranks disagree");
            assert_eq!(run.tokens, alone.tokens);
            for step in 0..STEPS as usize {
                let at = |what| format!("{size} processes, step {step}, {what}");
                assert_close(&at("loss"), run.losses[step], alone.losses[step], 1e-5);
                assert_close(&at("norm"), run.norms[step], alone.norms[step], 1e-4);
            }
            for ((name, got), (of_one, want)) in run.weights.iter().zip(&alone.weights) {
                assert_eq!(name, of_one);
                let error = relative_norm(got, want);
                assert!(error <= 1e-4, "{size} processes, {name}: {error:e}");
            }
            for ((name, got), (_, first)) in run.weights.iter().zip(&runs[0].weights) {
                assert!(
                    got.iter().zip(first).all(|(a, b)| a.to_bits() == b.to_bits()),
                    "{name} differs between ranks"
                );
            }
        }
        if size == 1 {
            assert_eq!(runs[0].losses, alone.losses, "a group of one is one process");
            assert_eq!(runs[0].weights, alone.weights);
        }
    }
}

const WHOLE: Chunking =
    Chunking { max_tokens: usize::MAX, max_sequences: usize::MAX, kept_tokens: usize::MAX };
const PIECES: Chunking = Chunking { max_tokens: usize::MAX, max_sequences: 4, kept_tokens: 100 };

const CASE: Case = Case {
    lora: false,
    chunking: WHOLE,
    cross_device: true,
    bucket: usize::MAX,
    all_terms: false,
    shard: true,
};

#[test]
fn all_weights_on_several_processes() {
    processes_agree_with_one(CASE);
}

#[test]
fn all_terms_of_the_objective_on_several_processes() {
    processes_agree_with_one(Case { all_terms: true, ..CASE });
}

#[test]
fn all_weights_on_several_processes_in_chunks() {
    processes_agree_with_one(Case { chunking: PIECES, bucket: 1000, ..CASE });
}

#[test]
fn moments_on_every_process() {
    processes_agree_with_one(Case { shard: false, bucket: 1000, ..CASE });
}

#[test]
fn moments_of_adapters_on_every_process() {
    let case = Case { lora: true, chunking: PIECES, shard: false, ..CASE };
    processes_agree_with_one(case);
}

#[test]
fn each_process_has_a_part_of_the_moments() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path(), ROWS);
    let elements = |size: usize, shard: bool| {
        let config = config(dir.path(), 2, Case { shard, ..CASE });
        in_group(size, |rank| {
            let mut model = model();
            let collective: Arc<dyn Collective<Cpu>> = Arc::new(rank);
            let (mut trainer, _) =
                Trainer::in_group(&mut model, &dataset, &config, collective, None).unwrap();
            trainer.state().optimizer().elements()
        })
    };
    let [all] = elements(1, true)[..] else { panic!("one process") };
    for size in [2, 4] {
        let parts = elements(size, true);
        assert_eq!(parts.iter().sum::<usize>(), all);
        // Parts are multiples of 64 elements.
        assert!(parts.iter().all(|part| part.abs_diff(all / size) <= 64 * size), "{parts:?}");
        assert!(elements(size, false).iter().all(|part| *part == all));
    }
}

#[test]
fn the_references_scale_is_the_gradient_divided_by_the_number_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path(), ROWS);
    let norms = |scaled: bool| {
        let mut config = config(dir.path(), 3, CASE);
        config.length = RunLength::Steps(1);
        config.objective.reference_gradient_scale = scaled;
        in_group(2, |rank| train(&dataset, &config, CASE, Arc::new(rank))).remove(0).norms[0]
    };
    assert_close("norm", norms(true), norms(false) / 2.0, 1e-6);
}

#[test]
fn forward_in_training_mode_returns_the_batches_of_all_processes() {
    let texts = |from: usize, count: usize| -> Vec<String> {
        (from..from + count).map(|i| format!("Bell {i} hangs in the north tower.")).collect()
    };
    let batches = |model: &BiEncoderModel, first: usize, rows: usize| {
        let query = model.batch(Role::Query, &texts(first, rows), 48).unwrap();
        (query, model.batch(Role::Passage, &texts(100 + 2 * first, 2 * rows), 64).unwrap())
    };
    let mut whole = model();
    whole.train();
    let (query, passage) = batches(&whole, 0, 6);
    let expected = whole.forward(Some(&query), Some(&passage)).unwrap();
    let outputs = in_group(3, |rank| {
        let mut model = model();
        model.set_negatives_cross_device(true);
        model.train();
        let (query, passage) = batches(&model, 2 * Collective::<Cpu>::rank(&rank), 2);
        // Without a group there are no other processes.
        assert!(model.forward(Some(&query), Some(&passage)).is_err());
        let gathered = model.forward_in_group(&query, &passage, &rank).unwrap();
        model.set_negatives_cross_device(false);
        let local = model.forward_in_group(&query, &passage, &rank).unwrap();
        assert_eq!(local.scores.unwrap().dim(), (2, 4));
        model.set_negatives_cross_device(true);
        model.eval();
        let eval = model.forward_in_group(&query, &passage, &rank).unwrap();
        assert_eq!((eval.scores.unwrap().dim(), eval.loss), ((2, 4), None));
        gathered
    });
    for output in outputs {
        assert_eq!(output.scores.as_ref().unwrap().dim(), (6, 12));
        assert_eq!(output.q_reps, expected.q_reps);
        assert_eq!(output.p_reps, expected.p_reps);
        assert_eq!((output.scores, output.loss), (expected.scores.clone(), expected.loss));
    }
}

#[test]
fn processes_with_other_settings_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path(), ROWS);
    let errors = in_group(3, |rank| {
        let mut config = config(dir.path(), 2, CASE);
        if Collective::<Cpu>::rank(&rank) == 1 {
            config.learning_rate = 2e-3;
        }
        let mut model = model();
        Trainer::in_group(&mut model, &dataset, &config, Arc::new(rank), None).err()
    });
    for error in errors {
        assert!(error.unwrap().to_string().contains("rank 1 has other settings"));
    }
}

#[test]
fn adapters_with_dropout_on_several_processes() {
    processes_agree_with_one(Case { lora: true, chunking: PIECES, bucket: 77, ..CASE });
}

#[test]
fn processes_without_a_row_take_part() {
    let case = CASE;
    let dir = tempfile::tempdir().unwrap();
    // Batches of 6 and of 2: two of three processes have no row of the second one.
    let dataset = dataset(dir.path(), 8);
    let whole = config(dir.path(), 6, case);
    let alone = train(&dataset, &whole, case, Arc::new(Solo));
    let config = config(dir.path(), 2, case);
    let runs = in_group(3, |rank| train(&dataset, &config, case, Arc::new(rank)));
    for run in runs {
        for step in 0..STEPS as usize {
            assert_close("loss", run.losses[step], alone.losses[step], 1e-5);
        }
        for ((name, got), (_, want)) in run.weights.iter().zip(&alone.weights) {
            let error = relative_norm(got, want);
            assert!(error <= 1e-4, "{name}: {error:e}");
        }
    }
}

#[test]
fn with_local_negatives_the_gradient_is_the_mean_over_processes() {
    let case = Case { cross_device: false, ..CASE };
    let dir = tempfile::tempdir().unwrap();
    let dataset = dataset(dir.path(), ROWS);
    let config = TrainConfig { length: RunLength::Steps(1), ..config(dir.path(), 3, case) };
    let runs = in_group(2, |rank| train(&dataset, &config, case, Arc::new(rank)));

    // The two halves of the first batch in sequence, each with its own negatives.
    let mut model = model();
    let sampler = config.sampler(&dataset, 2).unwrap();
    let batch = sampler.batch(0);
    let mut losses = Vec::new();
    for half in batch.chunks(3) {
        let (mut queries, mut passages) = (Vec::new(), Vec::new());
        for draw in half {
            let row = dataset.row(draw.row).unwrap();
            let group = sampler.group(draw, &row).unwrap();
            queries.push(group.query.to_owned());
            passages.extend(group.passages.iter().map(|&text| text.to_owned()));
        }
        let query = model.batch(Role::Query, &queries, config.query_max_len).unwrap();
        let passage = model.batch(Role::Passage, &passages, config.passage_max_len).unwrap();
        let input = StepInput::from_batches(&query, &passage, true, None).unwrap();
        let objective = model.objective(Arc::new(Solo)).unwrap();
        let loss = accumulate_gradients(&mut model, &objective, &input, &WHOLE).unwrap();
        losses.push(f64::from(model.backend().download(&loss).unwrap()[0]));
    }
    let mut squares = 0.0;
    for parameter in model.decoder().trainable_parameters() {
        let grad = model.backend().download(parameter.grad().unwrap()).unwrap();
        squares += grad.iter().map(|g| f64::from(*g / 2.0).powi(2)).sum::<f64>();
    }
    assert_close("loss", runs[0].losses[0], (losses[0] + losses[1]) / 2.0, 1e-5);
    assert_close("norm", runs[0].norms[0], squares.sqrt(), 1e-5);
}
