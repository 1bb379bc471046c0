//! Comparison with the numbers of the reference implementation: embeddings, scores, loss, every gradient and several
//! AdamW steps, for six families.
//!
//! The fixtures were created by `fixtures/generate.py` with transformers. To compare with another set in the same
//! format, give its folder, its rows, the number of rows that are used, and its passage length:
//! `LLARA_GOLDEN=dir:rows.jsonl:10:96 cargo test --test golden`. The numbers of the reference with cross-device
//! negatives on two processes, if its folder is given too: `LLARA_GOLDEN_DISTRIBUTED=dir`.
//!
//! With `LLARA_TEST_DEVICE=cuda` the tests of one process compute on a GPU.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod batch_gradients;
mod device;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use batch_gradients::batch_gradients;
use device::on_device;
use llara::backend::{Backend, Cpu};
use llara::data::{BadRows, Batch, Dataset, Sampler, SamplerConfig, Sampling};
use llara::dist::{Collective, ThreadGroup};
use llara::loss::{Contrastive, ObjectiveOptions, RowsPerRank};
use llara::train::{
    AdamW, AdamWConfig, Chunking, Decay, Observer, RunLength, StepInput, StepRecord, TrainConfig,
    Trainer, accumulate_gradients,
};
use llara::{BiEncoderModel, BiEncoderOptions, Loader, Role};
use ndarray::ArrayView2;
use safetensors::SafeTensors;

const FAMILIES: [&str; 6] = ["llama-mha", "llama-gqa", "llama3-rope", "mistral", "qwen2", "qwen3"];
const QUERY_MAX_LEN: usize = 40;
const GROUP: usize = 4;
const ROWS: usize = 3;

/// A set of golden numbers.
struct Golden {
    dir: PathBuf,
    rows: PathBuf,
    /// Number of rows, after which the steps start again with the first row.
    row_count: usize,
    passage_max_len: usize,
}

fn sets() -> Vec<Golden> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let rows = fixtures.join("rows.jsonl");
    let mut sets = vec![Golden { dir: fixtures, rows, row_count: 8, passage_max_len: 64 }];
    if let Ok(named) = std::env::var("LLARA_GOLDEN") {
        let parts: Vec<&str> = named.split(':').collect();
        let [dir, rows, row_count, passage_max_len] = parts[..] else {
            panic!("LLARA_GOLDEN=dir:rows:count:length");
        };
        // Tests run in their package's folder; paths are relative to the workspace, where `cargo test` is run.
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        sets.push(Golden {
            dir: workspace.join(dir),
            rows: workspace.join(rows),
            row_count: row_count.parse().unwrap(),
            passage_max_len: passage_max_len.parse().unwrap(),
        });
    }
    sets
}

/// Runs `check` on every family of every set.
fn on_all(check: impl Fn(&Golden, &Path)) {
    for set in sets() {
        for family in FAMILIES {
            check(&set, &set.dir.join(family));
        }
    }
}

/// The tensors of a file, f32, f64 or i64 as f64.
fn tensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f64>)> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let values = |view: &safetensors::tensor::TensorView<'_>| match view.dtype() {
        safetensors::Dtype::I64 => {
            view.data().as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect()
        }
        safetensors::Dtype::F64 => {
            view.data().as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect()
        }
        safetensors::Dtype::F32 => {
            view.data().as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect()
        }
        other => panic!("{other:?}"),
    };
    file.iter().map(|(n, v)| (n.to_owned(), (v.shape().to_vec(), values(&v)))).collect()
}

fn model<B: Backend>(backend: &B, dir: &Path, normalized: bool) -> BiEncoderModel<B> {
    let options = BiEncoderOptions { normalized, ..BiEncoderOptions::default() };
    Loader::new(dir).unwrap().load(backend.clone(), options).unwrap()
}

/// Queries and passages of rows `(ROWS * step + i) % row_count`, first positive and first negatives.
fn texts_of_step<B: Backend>(set: &Golden, model: &BiEncoderModel<B>, step: u64) -> (Batch, Batch) {
    let dataset = Dataset::open(std::slice::from_ref(&set.rows), BadRows::Error).unwrap();
    let sampler = Sampler::new(SamplerConfig {
        seed: 0,
        sampling: Sampling::Sequential,
        rows: set.row_count,
        batch_size: ROWS,
        group_size: GROUP,
        drop_last: false,
    })
    .unwrap();
    let (mut queries, mut passages) = (Vec::new(), Vec::new());
    for draw in sampler.batch(step) {
        let row = dataset.row(draw.row).unwrap();
        let group = sampler.group(&draw, &row).unwrap();
        queries.push(group.query.to_owned());
        passages.extend(group.passages.into_iter().map(str::to_owned));
    }
    (
        model.batch(Role::Query, &queries, QUERY_MAX_LEN).unwrap(),
        model.batch(Role::Passage, &passages, set.passage_max_len).unwrap(),
    )
}

fn padded(golden: &BTreeMap<String, (Vec<usize>, Vec<f64>)>, side: &str) -> Batch {
    let matrix = |name: &str| {
        let (shape, values) = &golden[&format!("{side}.{name}")];
        (shape.clone(), values.iter().map(|&x| x as i64).collect::<Vec<_>>())
    };
    let ((shape, ids), (_, mask)) = (matrix("input_ids"), matrix("attention_mask"));
    let view = |v| ArrayView2::from_shape((shape[0], shape[1]), v).unwrap();
    Batch::from_padded(view(&ids), view(&mask)).unwrap()
}

/// Largest absolute value; NaN if any is NaN, which `f64::max` would ignore.
fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, |largest, x| if x.abs() <= largest { largest } else { x.abs() })
}

/// Largest absolute difference.
fn max_difference<'a>(got: impl IntoIterator<Item = &'a f32>, want: &[f64]) -> f64 {
    let got: Vec<f64> = got.into_iter().map(|&x| f64::from(x)).collect();
    assert_eq!(got.len(), want.len());
    largest(got.iter().zip(want).map(|(a, b)| a - b))
}

/// Norm of the difference, divided by the norm of the expected values.
fn relative_norm(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    square(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - b))
        / square(&mut want.iter().copied()).max(1e-30)
}

#[track_caller]
fn within(what: &str, got: f64, bound: f64) {
    println!("{what}: {got:.2e} of {bound:.0e}");
    assert!(got <= bound, "{what}: {got:.3e} exceeds {bound:.0e}");
}

#[test]
fn prompts_have_the_reference_ids() {
    on_all(|set, dir| {
        let golden = tensors(&dir.join("golden.safetensors"));
        let (query, passage) = texts_of_step(set, &model(&Cpu::new(), dir, true), 0);
        assert_eq!(query, padded(&golden, "query"), "{}", dir.display());
        assert_eq!(passage, padded(&golden, "passage"), "{}", dir.display());
    });
}

#[test]
fn embeddings_scores_and_loss() {
    on_device!(compare_forward);
}

fn compare_forward<B: Backend>(backend: &B) {
    on_all(|_, dir| {
        let golden = tensors(&dir.join("golden.safetensors"));
        let (query, passage) = (padded(&golden, "query"), padded(&golden, "passage"));
        for (kind, normalized) in [("normlized", true), ("raw", false)] {
            let mut model = model(backend, dir, normalized);
            let want = |name: &str| golden[&format!("{kind}.{name}")].1.as_slice();
            let at = |name: &str| format!("{} {kind}.{name}", dir.display());
            let scale = |v: &[f64]| {
                if normalized { 1.0 } else { largest(v.iter().copied()) }
            };

            let eval = model.forward(Some(&query), Some(&passage)).unwrap();
            assert_eq!(eval.loss, None);
            model.train();
            let train = model.forward(Some(&query), Some(&passage)).unwrap();
            for (name, got) in [
                ("q_reps", eval.q_reps.as_ref().unwrap()),
                ("p_reps", eval.p_reps.as_ref().unwrap()),
                ("eval_scores", eval.scores.as_ref().unwrap()),
                ("q_reps", train.q_reps.as_ref().unwrap()),
            ] {
                let difference = max_difference(got, want(name)) / scale(want(name));
                within(&at(name), difference, 1e-5);
            }
            let scale = largest(want("scores").iter().copied());
            let scores = max_difference(train.scores.as_ref().unwrap(), want("scores"));
            within(&at("scores"), scores / scale, 1e-5);
            let loss = want("loss")[0];
            let difference = (f64::from(train.loss.unwrap()) - loss).abs() / loss;
            within(&at("loss"), difference, 1e-5);
        }
    });
}

#[test]
fn every_gradient() {
    on_device!(compare_gradients);
}

fn compare_gradients<B: Backend>(backend: &B) {
    on_all(|_, dir| {
        let golden = tensors(&dir.join("golden.safetensors"));
        let mut model = model(backend, dir, true);
        let (query, passage) = (padded(&golden, "query"), padded(&golden, "passage"));
        batch_gradients(&mut model, (&query, &passage), &Chunking::default(), None).unwrap();
        let mut seen = 0;
        for tensor in model.decoder().tensors() {
            let grad = model.backend().download_view(tensor.grad().unwrap()).unwrap();
            let (shape, want) = &golden[&format!("grad.{}", tensor.name())];
            assert_eq!(shape, tensor.shape());
            let what = format!("{} grad.{}", dir.display(), tensor.name());
            within(&what, relative_norm(&grad, want), 1e-4);
            seen += 1;
        }
        assert_eq!(seen, golden.keys().filter(|name| name.starts_with("grad.")).count());
    });
}

#[test]
fn adamw_steps() {
    on_device!(compare_adamw);
}

fn compare_adamw<B: Backend>(backend: &B) {
    on_all(|set, dir| {
        let golden = tensors(&dir.join("golden_train.safetensors"));
        let mut model = model(backend, dir, true);
        let config = AdamWConfig { weight_decay: 0.01, ..AdamWConfig::default() };
        let mut optimizer = AdamW::new(backend, model.decoder_mut(), config).unwrap();
        let (shape, steps) = &golden["losses_and_grad_norms"];
        assert_eq!(shape[1], 2);
        for (step, want) in steps.chunks_exact(2).enumerate() {
            let (query, passage) = texts_of_step(set, &model, step as u64);
            let loss = batch_gradients(&mut model, (&query, &passage), &Chunking::default(), None)
                .unwrap();
            let clip = optimizer.step(backend, model.decoder_mut(), 1e-3).unwrap();
            let loss = f64::from(loss);
            let norm = f64::from(backend.download(&clip).unwrap()[0]);
            let at = |what| format!("{} step {step} {what}", dir.display());
            within(&at("loss"), (loss - want[0]).abs() / want[0], 5e-5);
            within(&at("norm"), (norm - want[1]).abs() / want[1], 2e-4);
        }
        for tensor in model.decoder().tensors() {
            let value = backend.download_view(tensor.values()).unwrap();
            let (_, want) = &golden[&format!("final.{}", tensor.name())];
            let what = format!("{} final.{}", dir.display(), tensor.name());
            within(&what, relative_norm(&value, want), 1e-4);
        }
    });
}

#[test]
fn adapters() {
    on_device!(compare_adapter);
}

fn compare_adapter<B: Backend>(backend: &B) {
    on_all(|_, dir| {
        let golden = tensors(&dir.join("golden_lora.safetensors"));
        let rows = tensors(&dir.join("golden.safetensors"));
        let (query, passage) = (padded(&rows, "query"), padded(&rows, "passage"));
        let mut model = model(backend, dir, true);
        model.attach_adapter(&dir.join("lora")).unwrap();
        let at = |what: &str| format!("{} lora {what}", dir.display());

        model.train();
        let output = model.forward(Some(&query), Some(&passage)).unwrap();
        for (name, got) in [("q_reps", output.q_reps.as_ref()), ("p_reps", output.p_reps.as_ref())]
        {
            within(&at(name), max_difference(got.unwrap(), &golden[name].1), 1e-5);
        }
        let want = golden["loss"].1[0];
        within(&at("loss"), (f64::from(output.loss.unwrap()) - want).abs() / want, 1e-5);

        batch_gradients(&mut model, (&query, &passage), &Chunking::default(), None).unwrap();
        let mut seen = 0;
        for tensor in model.decoder().tensors().filter(|tensor| tensor.is_trainable()) {
            let grad = model.backend().download_view(tensor.grad().unwrap()).unwrap();
            let (_, want) = &golden[&format!("grad.base_model.model.{}", tensor.name())];
            within(&at(tensor.name()), relative_norm(&grad, want), 1e-4);
            seen += 1;
        }
        assert_eq!(seen, golden.keys().filter(|name| name.starts_with("grad.")).count());
        let frozen = model.decoder().parameters().filter(|p| !p.is_trainable());
        assert!(frozen.into_iter().all(|p| p.grad().is_err()));

        // The merged model gives the same results.
        model.merge_adapter().unwrap();
        model.eval();
        let merged = model.encode(&passage).unwrap().unwrap();
        within(&at("merged"), max_difference(&merged, &golden["p_reps"].1), 1e-5);
    });
}

/// Calls `f` on two threads, each a rank with its own model.
fn on_two_ranks<T: Send>(f: impl Fn(Arc<dyn Collective<Cpu>>) -> T + Sync) -> Vec<T> {
    let ranks = ThreadGroup::ranks(2, &Cpu::new(), Duration::from_secs(60));
    let f = &f;
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            ranks.into_iter().map(|rank| scope.spawn(move || f(Arc::new(rank)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Batches of two rows for a rank of two: rows `(4 * step + 2 * rank + i) % row_count`.
fn rows_of_rank(set: &Golden, model: &BiEncoderModel, step: usize, rank: usize) -> (Batch, Batch) {
    let dataset = Dataset::open(std::slice::from_ref(&set.rows), BadRows::Error).unwrap();
    let (mut queries, mut passages) = (Vec::new(), Vec::new());
    for i in 0..2 {
        let row = dataset.row((4 * step + 2 * rank + i) % set.row_count).unwrap();
        queries.push(row.query.clone());
        passages.extend(row.pos.iter().take(1).chain(&row.neg).take(GROUP).cloned());
    }
    assert_eq!(passages.len(), 2 * GROUP);
    (
        model.batch(Role::Query, &queries, QUERY_MAX_LEN).unwrap(),
        model.batch(Role::Passage, &passages, set.passage_max_len).unwrap(),
    )
}

/// The input of a rank, and its objective with the reference's scale of gradients.
fn step_of_rank(
    set: &Golden,
    model: &BiEncoderModel,
    step: usize,
    collective: &Arc<dyn Collective<Cpu>>,
) -> (StepInput, Contrastive<Cpu>) {
    let (query, passage) = rows_of_rank(set, model, step, collective.rank());
    let ids = |batch: &Batch| batch.sequences().map(<[u32]>::to_vec).collect::<Vec<_>>();
    let share = (RowsPerRank::divided(4, 2, 2, GROUP), collective.rank());
    let input = StepInput::share(&ids(&query), &ids(&passage), share, true, None).unwrap();
    let options =
        ObjectiveOptions { reference_gradient_scale: true, ..ObjectiveOptions::default() };
    let objective = model.objective(Arc::clone(collective)).unwrap();
    (input, Contrastive { options, ..objective })
}

fn model_of_rank(dir: &Path) -> BiEncoderModel {
    let mut model = model(&Cpu::new(), dir, true);
    model.set_negatives_cross_device(true);
    model.train();
    model
}

#[test]
fn cross_device_negatives_on_two_processes() {
    let Ok(folder) = std::env::var("LLARA_GOLDEN_DISTRIBUTED") else {
        println!("skipped: LLARA_GOLDEN_DISTRIBUTED is not set");
        return;
    };
    assert!(
        std::env::var_os("LLARA_GOLDEN").is_some(),
        "LLARA_GOLDEN names the models of the numbers"
    );
    let set = sets().pop().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(folder);
    let mut families = 0;
    for family in FAMILIES.map(|family| folder.join(family)).iter().filter(|dir| dir.is_dir()) {
        let name = family.file_name().unwrap().to_string_lossy().into_owned();
        let golden = tensors(&family.join("golden_distributed.safetensors"));
        let dir = set.dir.join(&name);
        compare_step(&set, &dir, &name, &golden);
        compare_updates(&set, &dir, &name, &golden);
        families += 1;
    }
    assert!(families > 0, "{} has no numbers", folder.display());
}

/// Embeddings, scores, loss and gradients of the first step.
fn compare_step(
    set: &Golden,
    dir: &Path,
    name: &str,
    golden: &BTreeMap<String, (Vec<usize>, Vec<f64>)>,
) {
    let ranks = on_two_ranks(|collective| {
        let mut model = model_of_rank(dir);
        let (query, passage) = rows_of_rank(set, &model, 0, collective.rank());
        let output = model.forward_in_group(&query, &passage, collective.as_ref()).unwrap();
        let (input, objective) = step_of_rank(set, &model, 0, &collective);
        accumulate_gradients(&mut model, &objective, &input, &Chunking::default()).unwrap();
        let grads: Vec<(String, Vec<f32>)> = model
            .decoder()
            .tensors()
            .map(|t| {
                let grad = model.backend().download_view(t.grad().unwrap()).unwrap();
                (t.name().to_owned(), grad)
            })
            .collect();
        (output, grads)
    });
    let want = |key: &str| golden[key].1.as_slice();
    for (rank, (output, _)) in ranks.iter().enumerate() {
        for (key, got) in [("q_reps", &output.q_reps), ("p_reps", &output.p_reps)] {
            let difference =
                max_difference(got.as_ref().unwrap(), want(&format!("rank{rank}.{key}")));
            within(&format!("{name} rank {rank} {key}"), difference, 1e-5);
        }
        let scale = largest(want("scores").iter().copied());
        let scores = max_difference(output.scores.as_ref().unwrap(), want("scores"));
        within(&format!("{name} rank {rank} scores"), scores / scale, 1e-5);
        let loss = want("losses_of_ranks")[rank];
        let difference = (f64::from(output.loss.unwrap()) - loss).abs() / loss;
        within(&format!("{name} rank {rank} loss"), difference, 1e-5);
    }
    for ((tensor, first), (_, second)) in ranks[0].1.iter().zip(&ranks[1].1) {
        let sum: Vec<f32> = first.iter().zip(second).map(|(a, b)| a + b).collect();
        let what = format!("{name} grad.{tensor}");
        within(&what, relative_norm(&sum, want(&format!("grad.{tensor}"))), 1e-4);
    }
}

/// Losses, norms and weights of all steps.
fn compare_updates(
    set: &Golden,
    dir: &Path,
    name: &str,
    golden: &BTreeMap<String, (Vec<usize>, Vec<f64>)>,
) {
    let (shape, steps) = &golden["losses_and_grad_norms"];
    // The trainer reads the rows in order, without the end of an epoch.
    let copies = tempfile::tempdir().unwrap();
    let path = copies.path().join("rows.jsonl");
    let text = std::fs::read_to_string(&set.rows).unwrap();
    let lines: Vec<&str> = text.lines().take(set.row_count).collect();
    let rows: String =
        lines.iter().cycle().take(4 * shape[0]).map(|line| format!("{line}\n")).collect();
    std::fs::write(&path, rows).unwrap();
    let dataset = Dataset::open(&[path], BadRows::Error).unwrap();
    let mut config = TrainConfig {
        length: RunLength::Steps(shape[0] as u64),
        batch_size: 2,
        group_size: GROUP,
        query_max_len: QUERY_MAX_LEN,
        passage_max_len: set.passage_max_len,
        sampling: Sampling::Sequential,
        learning_rate: 1e-3,
        decay: Decay::Constant,
        ..TrainConfig::new(copies.path())
    };
    config.objective.reference_gradient_scale = true;
    let config = &config;
    let results = on_two_ranks(|collective| {
        let mut model = model_of_rank(dir);
        let mut records = Records::default();
        let (mut trainer, _) =
            Trainer::in_group(&mut model, &dataset, config, collective, None).unwrap();
        trainer.run(&mut records).unwrap();
        let weights = model
            .decoder()
            .tensors()
            .map(|t| (t.name().to_owned(), model.backend().download_view(t.values()).unwrap()));
        (records.0, weights.collect::<Vec<_>>())
    });
    for (records, weights) in results {
        for (record, want) in records.iter().zip(steps.chunks_exact(2)) {
            let at = |what| format!("{name} step {} {what}", record.step);
            within(&at("loss"), (f64::from(record.loss) - want[0]).abs() / want[0], 5e-5);
            within(&at("norm"), (f64::from(record.grad_norm) - want[1]).abs() / want[1], 2e-4);
        }
        for (tensor, values) in weights {
            let what = format!("{name} final.{tensor}");
            within(&what, relative_norm(&values, &golden[&format!("final.{tensor}")].1), 1e-4);
        }
    }
}

#[derive(Default)]
struct Records(Vec<StepRecord>);

impl Observer for Records {
    fn on_step(&mut self, record: &StepRecord) -> llara::Result<()> {
        self.0.push(*record);
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> llara::Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> llara::Result<()> {
        Ok(())
    }
}
