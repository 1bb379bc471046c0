//! Evaluation while a model is trained by several processes, which are threads here: all ranks go the same way,
//! and the weights are those of a run without evaluation.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use llara::backend::{Backend, Cpu};
use llara::data::{BadRows, Dataset};
use llara::dist::ThreadGroup;
use llara::retrieval::BeirDataset;
use llara::train::{
    Checkpoint, EarlyStopping, EvalEvent, EvalHistory, EvalSet, Evaluation, Observer, RunLength,
    Saving, StepRecord, Summary, TrainConfig, Trainer,
};
use llara::{BiEncoderModel, BiEncoderOptions, Result};

const STEPS: u64 = 6;
const FACTS: usize = 10;

fn model() -> BiEncoderModel {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
    BiEncoderModel::from_folder(folder, BiEncoderOptions::default()).unwrap()
}

fn fact(i: usize) -> String {
    format!("Bell {i} of the tower was cast in {}.", 1600 + 37 * i)
}

fn question(i: usize) -> String {
    format!("When was bell {i} cast?")
}

fn dataset(dir: &Path) -> Dataset {
    let row = |i: usize| {
        let row = serde_json::json!({
            "query": question(i), "pos": [fact(i)], "neg": [fact(i + 1), fact(i + 2)],
        });
        format!("{row}\n")
    };
    let path = dir.join("rows.jsonl");
    fs::write(&path, (0..FACTS).map(row).collect::<String>()).unwrap();
    Dataset::open(&[path], BadRows::Error).unwrap()
}

fn collection(dir: &Path) -> EvalSet {
    let lines = |prefix: &str, text: fn(usize) -> String| -> String {
        let line = |i| serde_json::json!({ "_id": format!("{prefix}{i}"), "text": text(i) });
        (0..FACTS).map(|i| format!("{}\n", line(i))).collect()
    };
    fs::create_dir_all(dir.join("bells/qrels")).unwrap();
    fs::write(dir.join("bells/corpus.jsonl"), lines("d", fact)).unwrap();
    fs::write(dir.join("bells/queries.jsonl"), lines("q", question)).unwrap();
    let judged: String = (0..FACTS).map(|i| format!("q{i}\td{i}\t1\n")).collect();
    fs::write(dir.join("bells/qrels/dev.tsv"), judged).unwrap();
    EvalSet {
        name: "bells".to_owned(),
        split: "dev".to_owned(),
        dataset: BeirDataset::open(dir.join("bells"), "dev").unwrap(),
        ignore_identical_ids: false,
    }
}

fn config(dir: &Path, ranks: usize, learning_rate: f64) -> TrainConfig {
    TrainConfig {
        length: RunLength::Steps(STEPS),
        batch_size: 4 / ranks,
        group_size: 2,
        query_max_len: 48,
        passage_max_len: 64,
        learning_rate,
        saving: Saving { every: None, keep: Some(1), ..Saving::default() },
        ..TrainConfig::new(dir.join("out"))
    }
}

/// Stops an evaluation after this step once.
#[derive(Default)]
struct Watch {
    stop_in: Option<u64>,
    step: u64,
    evaluating: bool,
    evaluated: Vec<u64>,
}

impl Observer for Watch {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        (self.step, self.evaluating) = (record.step, false);
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn on_evaluation_progress(&mut self, done: usize, total: usize) {
        assert!(done <= total && total == 2 * FACTS);
        self.evaluating = true;
    }

    fn on_evaluate(&mut self, event: &EvalEvent<'_>) -> Result<()> {
        assert_eq!((event.reports.len(), event.total_steps), (1, STEPS));
        assert_eq!(event.history.last.as_ref(), Some(event.evaluated));
        self.evaluated.push(event.evaluated.step);
        Ok(())
    }

    fn stops(&mut self) -> bool {
        self.evaluating && self.stop_in == Some(self.step)
    }
}

/// What one rank ended with.
struct Run {
    summary: Summary,
    history: Option<EvalHistory>,
    best_checkpoint: Option<PathBuf>,
    evaluated: Vec<u64>,
    weights: Vec<Vec<f32>>,
}

/// Trains on several ranks. `stop_in` is a step in whose evaluation the last rank is told to stop.
fn train(
    dir: &Path,
    (ranks, config): (usize, &TrainConfig),
    evaluation: Option<&Evaluation>,
    stop_in: Option<u64>,
    checkpoint: Option<&Checkpoint>,
) -> Vec<Run> {
    let dataset = dataset(dir);
    let run = |rank, collective| {
        let mut model = model();
        model.set_negatives_cross_device(ranks > 1);
        let (mut trainer, _) =
            Trainer::in_group(&mut model, &dataset, config, collective, checkpoint).unwrap();
        if let Some(evaluation) = evaluation {
            trainer.set_evaluation(evaluation).unwrap();
        }
        let first = trainer.state().step();
        let stop_in = stop_in.filter(|_| rank + 1 == ranks);
        let mut watch = Watch { stop_in, step: first, ..Watch::default() };
        let summary = trainer.run(&mut watch).unwrap();
        let (history, best_checkpoint) = (trainer.history().cloned(), trainer.best_checkpoint());
        drop(trainer);
        let weights = model.decoder().trainable_parameters();
        let weights = weights.map(|p| model.backend().download(p.values()).unwrap()).collect();
        Run { summary, history, best_checkpoint, evaluated: watch.evaluated, weights }
    };
    let group = ThreadGroup::ranks(ranks, &Cpu::new(), Duration::from_secs(60));
    std::thread::scope(|scope| {
        let run = &run;
        let start = |(rank, collective)| scope.spawn(move || run(rank, Arc::new(collective)));
        let threads: Vec<_> = group.into_iter().enumerate().map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The figures without the times that they took.
fn values(history: &Option<EvalHistory>) -> Vec<Option<(u64, f64, f64)>> {
    let history = history.as_ref().unwrap();
    let of = |e: &llara::train::Evaluated| (e.step, e.value, e.records[0].mrr_at_10);
    [&history.start, &history.last, &history.best].map(|e| e.as_ref().map(of)).into()
}

#[test]
fn the_weights_are_those_of_a_run_without_evaluation() {
    for ranks in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), ranks, 1e-3);
        let plain = train(dir.path(), (ranks, &config), None, None, None);
        let evaluation =
            Evaluation { every: Some(2), ..Evaluation::new(vec![collection(dir.path())]) };
        let evaluated = train(dir.path(), (ranks, &config), Some(&evaluation), None, None);
        for (run, plain) in evaluated.iter().zip(&plain) {
            assert!(run.weights == plain.weights, "{ranks} ranks");
            assert_eq!((run.summary.steps, run.summary.tokens), (STEPS, plain.summary.tokens));
            assert_eq!(run.summary.loss.to_bits(), plain.summary.loss.to_bits());
            assert_eq!(run.evaluated, [0, 2, 4, 6]);
            assert_eq!(values(&run.history), values(&evaluated[0].history), "the ranks disagree");
            assert!(plain.history.is_none() && plain.best_checkpoint.is_none());
        }
    }
}

#[test]
fn all_ranks_end_early_and_the_best_checkpoint_has_the_best_weights() {
    let dir = tempfile::tempdir().unwrap();
    // Nothing improves: the figures after the second step are the best ones.
    let config = config(dir.path(), 2, 1e-12);
    let evaluation = Evaluation {
        every: Some(2),
        save_best: true,
        early_stopping: Some(EarlyStopping { patience: 1, threshold: 0.0 }),
        ..Evaluation::new(vec![collection(dir.path())])
    };
    let runs = train(dir.path(), (2, &config), Some(&evaluation), None, None);
    for run in &runs {
        assert_eq!((run.summary.steps, run.summary.stopped), (4, false));
        assert_eq!(run.best_checkpoint.as_deref(), Some(&*dir.path().join("out/checkpoint-2")));
    }
    let last = Checkpoint::open(&dir.path().join("out/checkpoint-4")).unwrap();
    let again = train(dir.path(), (2, &config), Some(&evaluation), None, Some(&last));
    assert_eq!((again[0].summary.steps, again[0].evaluated.len()), (4, 0));
    assert_eq!(again[0].history, runs[0].history);
}

#[test]
fn a_stop_of_one_rank_in_an_evaluation_leaves_it_to_the_resumed_run() {
    let dir = tempfile::tempdir().unwrap();
    for ranks in [1, 2] {
        let config = TrainConfig {
            output_dir: dir.path().join(format!("out-{ranks}")),
            ..config(dir.path(), ranks, 1e-3)
        };
        let evaluation =
            Evaluation { every: Some(3), ..Evaluation::new(vec![collection(dir.path())]) };
        let evaluation = Some(&evaluation);
        let whole = train(dir.path(), (ranks, &config), evaluation, None, None);
        let start = train(dir.path(), (ranks, &config), evaluation, Some(0), None);
        assert_eq!((start[0].summary.steps, start[0].summary.stopped), (0, true));
        for (step, before) in [(3, vec![0]), (6, vec![0, 3])] {
            let runs = train(dir.path(), (ranks, &config), evaluation, Some(step), None);
            for run in &runs {
                assert_eq!((run.summary.steps, run.summary.stopped), (step, true));
                assert_eq!(run.evaluated, before);
            }
            let folder = config.output_dir.join(format!("checkpoint-{step}"));
            let checkpoint = Checkpoint::open(&folder).unwrap();
            let resumed = train(dir.path(), (ranks, &config), evaluation, None, Some(&checkpoint));
            for (run, whole) in resumed.iter().zip(&whole) {
                assert_eq!((run.summary.steps, run.summary.stopped), (STEPS, false));
                assert_eq!(run.evaluated[0], step);
                assert_eq!(values(&run.history), values(&whole.history));
                assert!(run.weights == whole.weights);
            }
        }
    }
}
