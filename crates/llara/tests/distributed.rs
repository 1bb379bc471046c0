//! Training on several processes gives the results of one process with the same global batches. The processes are
//! threads here, each with its own model.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use llara::backend::{Backend, Cpu, Shape};
use llara::data::{BadRows, Dataset};
use llara::dist::{Bucket, Collective, FlatPart, Solo, ThreadGroup, ThreadRank};
use llara::loss::{
    Distillation, DistillationKind, FalseNegatives, MatryoshkaPrefix, ObjectiveOptions,
};
use llara::model::LoraConfig;
use llara::train::{
    Batching, Chunking, Observer, RunLength, StepInput, StepRecord, TrainConfig, Trainer,
    accumulate_gradients,
};
use llara::{BiEncoderModel, BiEncoderOptions, Error, ErrorKind, Result, Role};

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
    trainer.state().set_bucket_elements(case.bucket);
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

const CASE: Case =
    Case { lora: false, chunking: WHOLE, cross_device: true, bucket: usize::MAX, all_terms: false };

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

fn part(tensor: &mut <Cpu as Backend>::Tensor) -> FlatPart<'_, Cpu> {
    FlatPart { tensor, elements: 1..7, start: 2 }
}

#[test]
fn operations_of_a_group() {
    let results = in_group(3, |rank| {
        let backend = Cpu::new();
        let me = Collective::<Cpu>::rank(&rank);
        let counts = [2, 0, 1];
        let own: Vec<f32> = (0..counts[me] * 2).map(|i| (10 * me + i) as f32).collect();
        let x = backend.upload(&own, counts[me], 2).unwrap();
        let all = rank.all_gather_rows(x, &counts).unwrap();
        assert_eq!(all.shape(), (3, 2));
        let back = rank.reduce_scatter_rows(all, &counts).unwrap();
        let threefold: Vec<f32> = own.iter().map(|x| 3.0 * x).collect();
        assert_eq!(backend.download(&back).unwrap(), threefold);

        let mut x = backend.upload(&[me as f32, 1.0], 1, 2).unwrap();
        rank.all_reduce(&mut x).unwrap();
        assert_eq!(backend.download(&x).unwrap(), [3.0, 3.0]);
        let mut x = backend.upload(&[me as f32], 1, 1).unwrap();
        rank.broadcast(&mut x, 2).unwrap();
        assert_eq!(backend.download(&x).unwrap(), [2.0]);
        let mut totals = [0.25 * me as f64, 1.0];
        Collective::<Cpu>::all_reduce_scalars(&rank, &mut totals).unwrap();
        assert_eq!(totals, [0.75, 3.0]);

        // Flat indices 2..8 with 4 per rank: rank 0 owns 2 and 3, rank 1 the others.
        let bucket = Bucket { range: 2..8, shard: 4 };
        let mut tensor = backend.upload(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 1, 7).unwrap();
        let mut sum = rank.gradient_sum(&bucket).unwrap();
        sum.add(part(&mut tensor)).unwrap();
        sum.start().unwrap();
        // Another operation may run in between.
        Collective::<Cpu>::barrier(&rank).unwrap();
        sum.finish(&mut [part(&mut tensor)]).unwrap();
        let got = backend.download(&tensor).unwrap();
        let owned: &[f32] = [&[3.0, 6.0][..], &[9.0, 12.0, 15.0, 18.0], &[]][me];
        let range = [1..3, 3..7, 0..0][me].clone();
        assert_eq!((got[0], &got[range]), (0.0, owned));
        rank.all_gather_weights(&bucket, &mut [part(&mut tensor)]).unwrap();
        let got = backend.download(&tensor).unwrap();
        assert_eq!(got, [0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 18.0]);

        let status = if me == 1 { Err(Error::new(ErrorKind::Data, "a bad row")) } else { Ok(()) };
        Collective::<Cpu>::agree(&rank, status).unwrap_err().to_string()
    });
    assert!(results[1].contains("a bad row") && !results[1].contains("rank 1"), "{results:?}");
    for other in [&results[0], &results[2]] {
        assert!(other.contains("rank 1 failed: a bad row"), "{other}");
    }
}

#[test]
fn a_rank_that_has_ended_or_is_late_is_named() {
    let backend = Cpu::new();
    let mut ranks = ThreadGroup::ranks(3, &backend, Duration::from_millis(50));
    let error = Collective::<Cpu>::barrier(&ranks[1]).unwrap_err().to_string();
    assert!(error.contains("barrier") && error.contains("rank 0, 2"), "{error}");
    drop(ranks.remove(2));
    let error = Collective::<Cpu>::barrier(&ranks[0]).unwrap_err().to_string();
    // Rank 1 has called the operation.
    assert!(error.contains("rank 2 has ended"), "{error}");
}

#[test]
fn different_operations_are_refused() {
    let errors = in_group(2, |rank| match Collective::<Cpu>::rank(&rank) {
        0 => Collective::<Cpu>::barrier(&rank).err(),
        _ => Collective::<Cpu>::agree(&rank, Ok(())).err(),
    });
    assert!(errors.iter().all(Option::is_some));
    let texts: Vec<_> = errors.into_iter().flatten().map(|e| e.to_string()).collect();
    assert!(texts.iter().any(|text| text.contains("different operations")), "{texts:?}");
}
