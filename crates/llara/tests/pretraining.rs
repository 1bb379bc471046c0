//! Pretraining: the loss is that of its formula, chunks and processes change nothing, memory does not grow with the
//! batch.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use llara::backend::{Backend, Cpu, Dtype};
use llara::data::{BadRows, Batch, PieceLength, PretrainingData};
use llara::dist::{Collective, Solo, ThreadGroup};
use llara::model::{DecoderConfig, LoraConfig};
use llara::train::plan::{ChunkPolicy, DryRun, LargestBatch, PlannedTask, RunShape};
use llara::train::{
    Chunking, LossWeights, Observer, Pretraining, PretrainingInput, PretrainingLoss,
    PretrainingOptions, RunLength, SetObjective, StepRecord, TrainConfig, Trainer,
    TrainingSequence, accumulate_pretraining_gradients,
};
use llara::{BiEncoderModel, BiEncoderOptions, Loader, Result};

/// Families with an untied and with a tied head.
const FAMILIES: [&str; 2] = ["llama-gqa", "qwen2"];
const BAG: usize = 8;

fn fixture(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

fn model(family: &str) -> BiEncoderModel {
    let dir = fixture(family);
    let loader = Loader::new(&dir).unwrap().language_model_head(true);
    loader.load(Cpu::new(), BiEncoderOptions::default()).unwrap()
}

/// Rows of different lengths; some without a target of one objective.
fn rows() -> Vec<Vec<TrainingSequence>> {
    let ids = |row: usize, length: usize| {
        (0..length).map(|at| ((row * 37 + at * at * 5) % 300 + 20) as u32).collect::<Vec<_>>()
    };
    let row = |row: usize| {
        let length = 20 + 3 * row;
        let set = |count: usize, step: u32| (0..count as u32).map(|i| 20 + i * step).collect();
        let passage = TrainingSequence {
            ids: ids(row, length),
            labels: 2..length - 10,
            objective: SetObjective::AutoEncode,
            targets: if row == 2 { Vec::new() } else { set(1 + row, 7) },
        };
        let query = TrainingSequence {
            ids: [&ids(row, length - 10)[..], &ids(row + 50, 10)].concat(),
            labels: 0..0,
            objective: SetObjective::AutoRegress,
            targets: set(3 + row, 11),
        };
        if row == 3 { vec![passage] } else { vec![passage, query] }
    };
    (0..6).map(row).collect()
}

fn input(rows: &[Vec<TrainingSequence>]) -> PretrainingInput {
    PretrainingInput::new(rows, BAG, None).unwrap()
}

fn accumulate(
    model: &mut BiEncoderModel,
    input: &PretrainingInput,
    chunking: &Chunking,
) -> Vec<f32> {
    let weights = LossWeights { language_model: 1.0, auto_encode: 0.5, auto_regress: 2.0 };
    let loss = PretrainingLoss { weights, collective: Arc::new(Solo) };
    let losses = accumulate_pretraining_gradients(model, &loss, input, chunking, &mut ()).unwrap();
    Cpu::download(model.backend(), &losses).unwrap()
}

fn gradients(model: &BiEncoderModel) -> Vec<(String, Vec<f32>)> {
    let gradient = |tensor: llara::model::NamedTensor<'_, Cpu>| {
        let grad = model.backend().download_view(tensor.grad().unwrap()).unwrap();
        (tensor.name().to_owned(), grad)
    };
    model.decoder().tensors().map(gradient).collect()
}

fn relative_norm(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |x: f64| x * x;
    let difference: f64 =
        got.iter().zip(want).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = want.iter().map(|x| square(f64::from(*x))).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// Log-softmax in f64.
fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|x| (x - largest).exp()).sum();
    logits.iter().map(|x| x - largest - sum.ln()).collect()
}

/// The terms by their formulas, from the hidden states of each sequence alone.
fn terms_by_formula(model: &BiEncoderModel, rows: &[Vec<TrainingSequence>]) -> [f64; 3] {
    let config = model.decoder().config();
    let name = if config.tie_word_embeddings { "embed_tokens.weight" } else { "lm_head.weight" };
    let head = model.decoder().tensors().find(|tensor| tensor.name() == name).unwrap();
    let head = model.backend().download_view(head.values()).unwrap();
    let wide = |x: &f32| f64::from(*x);
    let (mut label_losses, mut set_losses) = (Vec::new(), [Vec::new(), Vec::new()]);
    for sequence in rows.iter().flatten() {
        let batch = Batch::from_sequences([&sequence.ids]).unwrap();
        let lengths = [sequence.ids.len()];
        let on_device =
            model.decoder().input(model.backend(), batch.view(), lengths, &[0]).unwrap();
        let hidden = model.decoder().forward(model.backend(), &on_device, None).unwrap();
        let hidden = Cpu::download(model.backend(), &hidden).unwrap();
        let logits: Vec<Vec<f64>> = hidden
            .chunks_exact(config.hidden_size)
            .map(|hidden| {
                let product = |row: &[f32]| -> f64 {
                    row.iter().zip(hidden).map(|(w, h)| wide(w) * wide(h)).sum()
                };
                head.chunks_exact(config.hidden_size).map(product).collect()
            })
            .collect();
        for label in sequence.labels.clone() {
            label_losses.push(-log_softmax(&logits[label - 1])[sequence.ids[label] as usize]);
        }
        if !sequence.targets.is_empty() {
            let bag = &logits[logits.len() - BAG..];
            let of_column = |v: usize| bag.iter().map(|row| row[v]).fold(f64::MIN, f64::max);
            let maxima: Vec<f64> = (0..config.vocab_size).map(of_column).collect();
            let log_softmax = log_softmax(&maxima);
            let sum: f64 = sequence.targets.iter().map(|&v| -log_softmax[v as usize]).sum();
            set_losses[sequence.objective as usize].push(sum / sequence.targets.len() as f64);
        }
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let [encode, regress] = &set_losses;
    [mean(&label_losses), 0.1 * mean(encode), 0.1 * mean(regress)]
}

#[test]
fn losses_are_those_of_the_formula() {
    for family in FAMILIES {
        let mut model = model(family);
        let rows = rows();
        let want = terms_by_formula(&model, &rows);
        let got = accumulate(&mut model, &input(&rows), &Chunking::default());
        for (got, want) in got[1..].iter().zip(want) {
            assert!((f64::from(*got) - want).abs() <= 1e-5 * want, "{family}: {got} {want}");
        }
        let total = want[0] + (0.5 * want[1] + 2.0 * want[2]) / 2.0;
        assert!((f64::from(got[0]) - total).abs() <= 1e-5 * total, "{family}: {} {total}", got[0]);
    }
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    for family in FAMILIES {
        let mut model = model(family);
        let input = input(&rows());
        accumulate(&mut model, &input, &Chunking::default());
        let gradients = gradients(&model);
        let norm = |grad: &[f32]| grad.iter().map(|g| f64::from(g * g)).sum::<f64>().sqrt();
        // Each tensor is moved along its own gradient.
        for (at, (name, gradient)) in gradients.iter().enumerate() {
            let length = norm(gradient);
            let step = 2e-2 / length.max(1e-3);
            let mut loss_at = |scale: f64| {
                let backend = model.backend().clone();
                model.decoder_mut().clear_gradients();
                let moved = |model: &mut BiEncoderModel, scale: f64| {
                    let mut first = 0;
                    for parameter in model.decoder_mut().parameters_mut() {
                        let count = parameter.tensors().count();
                        if (first..first + count).contains(&at) {
                            let offset: usize =
                                parameter.tensors().take(at - first).map(|t| t.elements()).sum();
                            add(&backend, parameter, offset, gradient, scale);
                        }
                        first += count;
                    }
                };
                moved(&mut model, scale);
                let loss = accumulate(&mut model, &input, &Chunking::default())[0];
                moved(&mut model, -scale);
                f64::from(loss)
            };
            let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
            let want = length * length;
            assert!(
                (slope - want).abs() <= 0.02 * want + 2e-4 / step,
                "{family} {name}: {slope} {want}"
            );
        }
    }
}

/// `values += scale · gradient`, for the elements from `offset` on.
fn add(
    backend: &Cpu,
    parameter: &mut llara::model::Parameter<Cpu>,
    offset: usize,
    gradient: &[f32],
    scale: f64,
) {
    let mut values = Cpu::download(backend, parameter.values()).unwrap();
    let moved = values[offset..].iter_mut().zip(gradient);
    moved.for_each(|(value, g)| *value += (scale * f64::from(*g)) as f32);
    parameter.write_values(backend, &values).unwrap();
}

#[test]
fn chunks_change_nothing() {
    for family in FAMILIES {
        let input = input(&rows());
        let mut whole = model(family);
        let losses = accumulate(&mut whole, &input, &Chunking::default());
        let want = gradients(&whole);
        for (max_tokens, max_sequences) in [(1, usize::MAX), (70, usize::MAX), (usize::MAX, 5)] {
            let mut model = model(family);
            let chunking = Chunking { max_tokens, max_sequences, kept_tokens: 0 };
            let got = accumulate(&mut model, &input, &chunking);
            assert!(relative_norm(&got, &losses) <= 1e-6, "{family}: {got:?} {losses:?}");
            let got = gradients(&model);
            let all = |gradients: &[(String, Vec<f32>)]| -> Vec<f32> {
                gradients.iter().flat_map(|(_, gradient)| gradient).copied().collect()
            };
            let error = relative_norm(&all(&got), &all(&want));
            assert!(error <= 1e-6, "{family} in chunks of {max_tokens}: {error:e}");
            // A small gradient of a norm is a sum of terms that cancel.
            for ((name, got), (_, want)) in got.iter().zip(&want) {
                let error = relative_norm(got, want);
                assert!(error <= 3e-6, "{family} {name} in chunks of {max_tokens}: {error:e}");
            }
        }
    }
}

/// The rows with each sequence as a row of its own, so that no tokens are shared.
fn apart(rows: &[Vec<TrainingSequence>]) -> Vec<Vec<TrainingSequence>> {
    rows.iter().flatten().map(|sequence| vec![sequence.clone()]).collect()
}

#[test]
fn one_pass_over_a_text_equals_two() {
    // With groups of heads, windows, biases, and norms of heads.
    for family in ["llama-gqa", "llama3-rope", "mistral", "qwen2", "qwen3"] {
        let (once, twice) = (input(&rows()), input(&apart(&rows())));
        assert!(once.batch().tokens() < twice.batch().tokens() * 3 / 4);
        assert_eq!(once.batch().len(), twice.batch().len());
        for lora in [false, true] {
            for last_block_at_pooled_rows in [true, false] {
                let run = |input: &PretrainingInput| {
                    let mut model = model(family);
                    model.decoder_mut().set_last_block_at_pooled_rows(last_block_at_pooled_rows);
                    if lora {
                        let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
                        model.attach_new_adapter(&lora, 3).unwrap();
                    }
                    let losses = accumulate(&mut model, input, &Chunking::default());
                    let trainable = model.decoder().trainable_parameters();
                    let gradients = trainable.flat_map(|parameter| parameter.tensors());
                    let gradients = gradients.map(|tensor| {
                        let grad = model.backend().download_view(tensor.grad().unwrap()).unwrap();
                        (tensor.name().to_owned(), grad)
                    });
                    (losses, gradients.collect::<Vec<_>>())
                };
                let ((got, got_gradients), (want, want_gradients)) = (run(&once), run(&twice));
                let what = format!("{family}, lora {lora}, pooled {last_block_at_pooled_rows}");
                assert!(relative_norm(&got, &want) <= 1e-6, "{what}: {got:?} {want:?}");
                assert!(!got_gradients.is_empty());
                for ((name, got), (_, want)) in got_gradients.iter().zip(&want_gradients) {
                    let error = relative_norm(got, want);
                    assert!(error <= 5e-6, "{what}, {name}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn every_row_may_predict_something() {
    // Without a prefix token before the first label, and with branches of pooled tokens only.
    let passage = |sequence: &TrainingSequence| TrainingSequence {
        labels: 1..sequence.ids.len() - BAG,
        ..sequence.clone()
    };
    let query = |sequence: &TrainingSequence| TrainingSequence {
        ids: [&sequence.ids[..sequence.ids.len() - BAG], &[50; BAG]].concat(),
        labels: 0..0,
        objective: SetObjective::AutoRegress,
        targets: vec![21, 40],
    };
    let alone: Vec<_> = rows().iter().map(|row| vec![passage(&row[0])]).collect();
    let both: Vec<_> = rows().iter().map(|row| vec![passage(&row[0]), query(&row[0])]).collect();
    for rows in [alone, both] {
        let gradients_of = |on: bool| {
            let mut model = model("llama-gqa");
            model.decoder_mut().set_last_block_at_pooled_rows(on);
            accumulate(&mut model, &input(&rows), &Chunking::default());
            gradients(&model)
        };
        for ((name, got), (_, want)) in gradients_of(true).iter().zip(gradients_of(false)) {
            let error = relative_norm(got, &want);
            assert!(error <= 5e-6, "{name}: {error:e}");
        }
    }
}

#[test]
fn one_pass_in_bf16_follows_f32_as_two_do() {
    for family in ["llama-gqa", "mistral", "qwen3"] {
        let run = |input: &PretrainingInput, dtype| {
            let mut model = model(family);
            model.set_precision(dtype).unwrap();
            accumulate(&mut model, input, &Chunking::default());
            gradients(&model).into_iter().flat_map(|(_, gradient)| gradient).collect::<Vec<f32>>()
        };
        let (once, twice) = (input(&rows()), input(&apart(&rows())));
        let want = run(&twice, Dtype::F32);
        let [of_once, of_twice] =
            [&once, &twice].map(|input| relative_norm(&run(input, Dtype::Bf16), &want));
        assert!(of_once <= 1.2 * of_twice && of_twice < 0.1, "{family}: {of_once} {of_twice}");
    }
}

#[test]
fn sequences_that_do_not_fit_together_are_refused() {
    let refused = |change: &dyn Fn(&mut Vec<TrainingSequence>), part: &str| {
        let mut rows = rows();
        change(&mut rows[1]);
        let error = PretrainingInput::new(&rows, BAG, None).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    refused(&|row| row[0].labels = 2..99, "row 1: labels beyond the sequence");
    refused(&|row| row[0].labels = 0..5, "labels beyond the sequence");
    refused(&|row| row[1].ids.truncate(BAG - 1), "without room for the pooled tokens");
    refused(&|row| row[1].objective = SetObjective::AutoEncode, "too many sequences");
    refused(&|row| row.push(row[0].clone()), "too many sequences");
    let empty = |row: &mut Vec<TrainingSequence>| {
        row[0].ids.clear();
        (row[0].labels, row[0].targets) = (0..0, Vec::new());
    };
    refused(&empty, "sequence 2 is empty");
}

#[test]
fn a_term_without_targets_has_no_value() {
    let mut rows = rows();
    rows.iter_mut().for_each(|row| row.truncate(1));
    let mut model = model("llama-gqa");
    let losses = accumulate(&mut model, &input(&rows), &Chunking::default());
    assert!(losses[3].is_nan(), "{losses:?}");
    // EBAE is not halved.
    let total = losses[1] + 0.5 * losses[2];
    assert!((losses[0] - total).abs() <= 1e-6 * total, "{losses:?}");
}

#[test]
fn bf16_follows_f32() {
    for family in FAMILIES {
        let input = input(&rows());
        let mut model = model(family);
        let want = accumulate(&mut model, &input, &Chunking::default());
        model.decoder_mut().drop_gradients();
        model.set_precision(Dtype::Bf16).unwrap();
        let got = accumulate(&mut model, &input, &Chunking::default());
        assert_ne!(got, want);
        assert!(relative_norm(&got, &want) < 5e-3, "{family}: {got:?} {want:?}");
        assert!(gradients(&model).iter().all(|(_, grad)| grad.iter().all(|g| g.is_finite())));
    }
}

#[test]
fn a_model_without_its_head_is_refused() {
    let mut model =
        BiEncoderModel::from_folder(fixture("qwen2"), BiEncoderOptions::default()).unwrap();
    let loss = PretrainingLoss { weights: LossWeights::default(), collective: Arc::new(Solo) };
    let (input, chunking) = (input(&rows()), Chunking::default());
    let result = accumulate_pretraining_gradients(&mut model, &loss, &input, &chunking, &mut ());
    assert!(result.err().unwrap().to_string().contains("without its language-model head"));
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

fn texts(dir: &Path) -> PretrainingData {
    let fact = |i: usize| format!("Bell {i} of the tower was cast in {}. ", 1600 + 37 * i);
    let text: String = (0..25).map(fact).collect();
    let path = dir.join("bells.txt");
    std::fs::write(&path, text).unwrap();
    PretrainingData::open_texts(&[path], PieceLength::new(90).unwrap(), BadRows::Error).unwrap()
}

/// Losses, gradient norms and final weights of one process.
type Trained = (Vec<f64>, Vec<f64>, Vec<(String, Vec<f32>)>);

fn train(
    data: &PretrainingData,
    batch_size: usize,
    lora: bool,
    collective: Arc<dyn Collective<Cpu>>,
) -> Trained {
    let mut model = model("llama-gqa");
    if lora {
        let lora = LoraConfig { rank: 4, alpha: 8.0, dropout: 0.2, ..LoraConfig::default() };
        model.attach_new_adapter(&lora, 3).unwrap();
    }
    let config = TrainConfig {
        length: RunLength::Steps(5),
        batch_size,
        group_size: 1,
        learning_rate: 1e-3,
        chunking: Chunking { max_tokens: 150, ..Chunking::default() },
        bucket_elements: Some(5000),
        ..TrainConfig::new("")
    };
    let options = PretrainingOptions { cutoff_len: 120, ..PretrainingOptions::default() };
    let task = Pretraining::new(&model, data, &config, &options, Arc::clone(&collective)).unwrap();
    let (mut trainer, _) = Trainer::with_task(&mut model, task, &config, collective, None).unwrap();
    let mut watch = Watch::default();
    trainer.run(&mut watch).unwrap();
    for record in &watch.0 {
        let names: Vec<_> = record.terms.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["language_model", "auto_encode", "auto_regress"]);
        let [lm, encode, regress] =
            [0, 1, 2].map(|i| record.terms.iter().nth(i).map(|(_, value)| value).unwrap());
        assert!((record.loss - lm - (encode + regress) / 2.0).abs() < 1e-5 * record.loss);
    }
    let weights = model.decoder().trainable_parameters().map(|parameter| {
        (parameter.name().to_owned(), model.backend().download(parameter.values()).unwrap())
    });
    let records = watch.0.iter();
    (
        records.clone().map(|record| f64::from(record.loss)).collect(),
        records.map(|record| f64::from(record.grad_norm)).collect(),
        weights.collect(),
    )
}

#[test]
fn several_processes_train_like_one() {
    let dir = tempfile::tempdir().unwrap();
    let data = texts(dir.path());
    // The last piece has no next one, and the last batch of an epoch cannot be divided evenly.
    assert_eq!(data.dataset().len() % 4, 3, "{}", data.dataset().len());
    for lora in [false, true] {
        let (losses, norms, weights) = train(&data, 4, lora, Arc::new(Solo));
        assert!(losses.iter().all(|loss| loss.is_finite()));
        for size in [2, 4] {
            let ranks = ThreadGroup::ranks(size, &Cpu::new(), Duration::from_secs(60));
            let runs: Vec<Trained> = std::thread::scope(|scope| {
                let start = |rank| scope.spawn(|| train(&data, 4 / size, lora, Arc::new(rank)));
                let threads: Vec<_> = ranks.into_iter().map(start).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            for (of_rank, of_norms, of_weights) in &runs {
                for (got, want) in of_rank.iter().zip(&losses).chain(of_norms.iter().zip(&norms)) {
                    assert!((got - want).abs() <= 1e-4 * want, "{size}: {got} {want}");
                }
                for ((name, got), (_, want)) in of_weights.iter().zip(&weights) {
                    let error = relative_norm(got, want);
                    assert!(error <= 1e-3, "{size} processes, {name}: {error:e}");
                }
            }
        }
    }
}

fn shape(dtype: Dtype) -> RunShape {
    let dir = fixture("llama-gqa");
    let outline = Loader::new(&dir).unwrap().outline().unwrap();
    let decoder = DecoderConfig {
        hidden_size: 128,
        intermediate_size: 320,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        windows: vec![None; 4],
        ..outline.decoder
    };
    RunShape {
        decoder,
        prompts: outline.prompts,
        lora: None,
        precision: dtype,
        options: BiEncoderOptions::default(),
        evaluation: None,
        task: PlannedTask::Pretraining,
        group: None,
        memory: Cpu::new().memory(),
        process_bytes: 1 << 20,
        saves_merged: false,
    }
}

fn largest(rows: usize) -> LargestBatch {
    let none = Batch::from_sequences(Vec::<Vec<u32>>::new()).unwrap();
    // 100 tokens of text with its prefix, 15 of each suffix.
    let sequences = (0..2 * rows).map(|at| match at % 2 {
        0 => (vec![30; 115], 0),
        _ => (vec![31; 15], 100),
    });
    let passage = Batch::from_branches(sequences).unwrap();
    LargestBatch { query: none, passage, steps: 1, sampled_steps: 1 }
}

#[test]
fn memory_does_not_grow_with_the_batch() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let mut dry_run = DryRun::new(shape(dtype)).unwrap();
        let of = |dry_run: &mut DryRun, rows| {
            dry_run.choose(&largest(rows), ChunkPolicy::Auto, u64::MAX).unwrap()
        };
        let (small, large) = (of(&mut dry_run, 64), of(&mut dry_run, 16 * 64));
        assert!(small.chunks.count > 1 && large.chunks.count > 8 * small.chunks.count);
        let ratio = large.training.total() as f64 / small.training.total() as f64;
        assert!((0.99..1.01).contains(&ratio), "{ratio}");
        assert!(large.work.done_flops > 15 * small.work.done_flops);

        // The smallest chunks need less, and a budget is kept.
        let budget = small.training.total() * 7 / 10;
        let fitting = dry_run.choose(&largest(64), ChunkPolicy::Auto, budget).unwrap();
        assert!(fitting.training.total() <= budget);
        assert_eq!(fitting.chunks.recomputed_share, 0.0);
        assert!(fitting.work.done_flops < small.work.done_flops * 101 / 100);
    }
}
