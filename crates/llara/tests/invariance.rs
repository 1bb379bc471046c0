//! An embedding does not depend on the other texts of its batch, on their order, on the division of a batch into
//! chunks, on padding, or on the number of threads: on the CPU bit for bit, on a GPU (`LLARA_TEST_DEVICE=cuda`) within
//! rounding.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

mod batch_gradients;
mod device;

use std::path::PathBuf;

use batch_gradients::batch_gradients;
use device::on_device;
use llara::backend::{Backend, Cpu, Dtype};
use llara::data::Batch;
use llara::model::{Dropout, Parameter};
use llara::train::Chunking;
use llara::{BiEncoderModel, BiEncoderOptions, Loader, Role, Shortcuts};
use ndarray::{Array2, ArrayView1};

const FAMILIES: [&str; 6] = ["llama-mha", "llama-gqa", "llama3-rope", "mistral", "qwen2", "qwen3"];

const TEXTS: [&str; 5] = [
    "Salt is taken from the sea.",
    "Bees dance to tell each other where the flowers are, and how far, and which way from the sun.",
    "Ice floats.",
    "The old bridge over the river was built of stone from the quarry north of the town, and has \
     carried carts, trams and lorries for three hundred years without a single new arch.",
    "Tea",
];

fn fixture(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

fn model<B: Backend>(backend: &B, family: &str, options: BiEncoderOptions) -> BiEncoderModel<B> {
    Loader::new(&fixture(family)).unwrap().load(backend.clone(), options).unwrap()
}

fn encode<B: Backend>(model: &BiEncoderModel<B>, texts: &[&str]) -> Array2<f32> {
    let batch = model.batch(Role::Passage, texts, 96).unwrap();
    model.encode(&batch).unwrap().unwrap()
}

/// The largest difference between features of one embedding, which has length 1. A library of products may choose
/// its algorithm by the number of rows; the sums then round differently.
fn rounding<B: Backend>(backend: &B, precision: Dtype) -> f32 {
    match (backend.is_asynchronous(), precision) {
        (false, _) => 0.0,
        (true, Dtype::F32) => 1e-6,
        (true, Dtype::Bf16) => 5e-3,
    }
}

/// Asserts finite numbers that differ by at most `rounding`; with 0, equal bits.
#[track_caller]
fn same(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>, rounding: f32) {
    assert_eq!(a.len(), b.len());
    for (at, (a, b)) in a.iter().zip(b).enumerate() {
        let close = a.to_bits() == b.to_bits() || (rounding > 0.0 && (a - b).abs() <= rounding);
        assert!(a.is_finite() && close, "feature {at}: {a:e} and {b:e}");
    }
}

fn in_both_precisions<const N: usize>(families: [&str; N]) -> impl Iterator<Item = (&str, Dtype)> {
    families.into_iter().flat_map(|family| [(family, Dtype::F32), (family, Dtype::Bf16)])
}

#[test]
fn alone_with_others_and_in_another_order() {
    on_device!(compare_batches);
}

fn compare_batches<B: Backend>(backend: &B) {
    for (family, precision) in in_both_precisions(FAMILIES) {
        let mut model = model(backend, family, BiEncoderOptions::default());
        model.set_precision(precision).unwrap();
        let rounding = rounding(backend, precision);
        let together = encode(&model, &TEXTS);
        let reversed = encode(&model, &TEXTS.iter().rev().copied().collect::<Vec<_>>());
        for (i, text) in TEXTS.iter().enumerate() {
            same(together.row(i), encode(&model, &[text]).row(0), rounding);
            same(together.row(i), reversed.row(TEXTS.len() - 1 - i), rounding);
        }
    }
}

#[test]
fn in_sub_batches_of_any_size() {
    on_device!(compare_sub_batches);
}

fn compare_sub_batches<B: Backend>(backend: &B) {
    let rounding = rounding(backend, Dtype::F32);
    let whole = encode(&model(backend, "mistral", BiEncoderOptions::default()), &TEXTS);
    for size in 1..=TEXTS.len() + 1 {
        let options = BiEncoderOptions { sub_batch_size: Some(size), ..Default::default() };
        let in_sub_batches = encode(&model(backend, "mistral", options), &TEXTS);
        let rows = whole.rows().into_iter().zip(in_sub_batches.rows());
        rows.for_each(|(a, b)| same(a, b, rounding));
    }
}

#[test]
fn padded_on_either_side() {
    let model = model(&Cpu::new(), "qwen3", BiEncoderOptions::default());
    let batch = model.batch(Role::Query, &TEXTS, 96).unwrap();
    let width = batch.longest() + 3;
    for left in [true, false] {
        let mut ids = Array2::<i64>::zeros((TEXTS.len(), width));
        let mut mask = Array2::<i64>::zeros((TEXTS.len(), width));
        for (row, sequence) in batch.sequences().enumerate() {
            let start = if left { width - sequence.len() } else { 0 };
            for (at, &id) in sequence.iter().enumerate() {
                ids[[row, start + at]] = i64::from(id);
                mask[[row, start + at]] = 1;
            }
        }
        assert_eq!(Batch::from_padded(ids.view(), mask.view()).unwrap(), batch);
    }
}

#[test]
fn fewer_tokens_than_are_pooled_are_all_pooled() {
    on_device!(pool_short_texts);
}

fn pool_short_texts<B: Backend>(backend: &B) {
    let model = model(backend, "llama-gqa", BiEncoderOptions::default());
    let batch = Batch::from_sequences([vec![5u32, 6, 7], vec![9]]).unwrap();
    let reps = model.encode(&batch).unwrap().unwrap();
    assert_eq!(reps.nrows(), 2);
    reps.rows().into_iter().for_each(|r| assert!((r.dot(&r) - 1.0).abs() < 1e-5));
}

#[test]
fn the_same_bits_on_any_number_of_threads() {
    let bits = |threads: usize, precision: Dtype| -> Vec<u32> {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut model = model(&Cpu::new(), "qwen2", BiEncoderOptions::default());
            model.set_precision(precision).unwrap();
            let query = model.batch(Role::Query, &TEXTS[..2], 64).unwrap();
            let passage = model.batch(Role::Passage, &TEXTS[1..], 96).unwrap();
            batch_gradients(&mut model, (&query, &passage), &Chunking::default(), None).unwrap();
            let backend = model.backend();
            let grads = model.decoder().parameters().map(|p| backend.download(p.grad().unwrap()));
            grads.flat_map(Result::unwrap).map(f32::to_bits).collect()
        })
    };
    for precision in [Dtype::F32, Dtype::Bf16] {
        let one = bits(1, precision);
        assert!(one == bits(2, precision) && one == bits(3, precision), "{precision}");
    }
}

#[test]
fn embeddings_and_gradients_in_bf16_are_close_to_f32() {
    on_device!(compare_precisions);
}

fn compare_precisions<B: Backend>(backend: &B) {
    for family in FAMILIES {
        let [wide, narrow] = [Dtype::F32, Dtype::Bf16].map(|precision| {
            let mut model = model(backend, family, BiEncoderOptions::default());
            model.set_precision(precision).unwrap();
            let query = model.batch(Role::Query, &TEXTS[..2], 64).unwrap();
            let passage = model.batch(Role::Passage, &TEXTS[1..], 96).unwrap();
            batch_gradients(&mut model, (&query, &passage), &PLAIN, None).unwrap();
            let download = |p: &Parameter<B>| model.backend().download(p.grad().unwrap()).unwrap();
            let gradient: Vec<f32> = model.decoder().parameters().flat_map(download).collect();
            (encode(&model, &TEXTS), gradient)
        });
        for (a, b) in wide.0.rows().into_iter().zip(narrow.0.rows()) {
            assert!(a.dot(&b) > 0.9998, "{family}: cosine {}", a.dot(&b));
            assert!(a != b, "{family}: bf16 was not used");
        }
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let lengths = (dot(&wide.1, &wide.1) * dot(&narrow.1, &narrow.1)).sqrt();
        let cosine = dot(&wide.1, &narrow.1) / lengths;
        assert!(cosine > 0.99, "{family}: the cosine of the gradients is {cosine}");
    }
}

/// How a gradient is computed.
#[derive(Debug, Clone, Copy)]
struct Way {
    chunking: Chunking,
    /// Adapters with dropout, rather than all weights.
    adapter: bool,
    shortcuts: Shortcuts,
    precision: Dtype,
}

const NO_SHORTCUTS: Shortcuts = Shortcuts { last_layer_at_pooled: false, dedup_sequences: false };

const PLAIN: Chunking =
    Chunking { max_tokens: usize::MAX, max_sequences: usize::MAX, kept_tokens: usize::MAX };

/// Every gradient of a batch in which one passage occurs twice.
fn gradients<B: Backend>(backend: &B, way: Way) -> Vec<(String, Vec<f32>)> {
    let options = BiEncoderOptions { shortcuts: way.shortcuts, ..Default::default() };
    let mut model = model(backend, "mistral", options);
    if way.adapter {
        // An adapter of PEFT whose B is not zero, with dropout added to its configuration.
        let from = fixture("mistral").join("lora");
        let dir = tempfile::tempdir().unwrap();
        let name = "adapter_model.safetensors";
        std::fs::copy(from.join(name), dir.path().join(name)).unwrap();
        let config = std::fs::read_to_string(from.join("adapter_config.json")).unwrap();
        let dropped = config.replace("\"lora_dropout\": 0.0", "\"lora_dropout\": 0.3");
        assert_ne!(config, dropped);
        std::fs::write(dir.path().join("adapter_config.json"), dropped).unwrap();
        model.attach_adapter(dir.path()).unwrap();
    }
    model.set_precision(way.precision).unwrap();
    let dropout = way.adapter.then_some(Dropout { seed: 11, step: 3 });
    let query = model.batch(Role::Query, &TEXTS[..2], 64).unwrap();
    let passages = [TEXTS[1], TEXTS[2], TEXTS[3], TEXTS[2]];
    let passage = model.batch(Role::Passage, &passages, 96).unwrap();
    batch_gradients(&mut model, (&query, &passage), &way.chunking, dropout).unwrap();
    let trainable = model.decoder().tensors().filter(|tensor| tensor.is_trainable());
    trainable
        .map(|tensor| {
            let grad = model.backend().download_view(tensor.grad().unwrap()).unwrap();
            (tensor.name().to_owned(), grad)
        })
        .collect()
}

/// Asserts that two ways give the same gradients, by the relative norm of each difference.
#[track_caller]
fn agree<B: Backend>(backend: &B, one: Way, other: Way, bound: f32) {
    for ((name, a), (_, b)) in gradients(backend, one).iter().zip(gradients(backend, other)) {
        let norm = |v: &mut dyn Iterator<Item = f32>| v.map(|x| x * x).sum::<f32>().sqrt();
        let difference = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b));
        let size = norm(&mut a.iter().copied());
        assert!(size > 0.0, "{name} has no gradient");
        assert!(difference <= bound * size, "{name}: {:e}, {other:?}", difference / size);
    }
}

#[test]
fn gradients_do_not_depend_on_the_chunks() {
    on_device!(compare_chunks);
}

fn compare_chunks<B: Backend>(backend: &B) {
    for adapter in [false, true] {
        for last_layer_at_pooled in [false, true] {
            let shortcuts = Shortcuts { last_layer_at_pooled, ..NO_SHORTCUTS };
            let way = |chunking| Way { chunking, adapter, shortcuts, precision: Dtype::F32 };
            for chunking in [
                Chunking { max_sequences: 1, kept_tokens: 0, ..PLAIN },
                Chunking { max_tokens: 50, kept_tokens: 0, ..PLAIN },
                Chunking { max_sequences: 2, kept_tokens: 90, ..PLAIN },
            ] {
                agree(backend, way(PLAIN), way(chunking), 1e-6);
            }
        }
    }
}

#[test]
fn gradients_in_bf16_do_not_depend_on_the_chunks_either() {
    on_device!(compare_chunks_in_bf16);
}

fn compare_chunks_in_bf16<B: Backend>(backend: &B) {
    for adapter in [false, true] {
        let shortcuts = Shortcuts { dedup_sequences: false, ..Shortcuts::default() };
        let way = |chunking| Way { chunking, adapter, shortcuts, precision: Dtype::Bf16 };
        // The embeddings and the gradients of activations are equal; only sums over chunks differ, in f32.
        let chunking = Chunking { max_sequences: 1, kept_tokens: 0, ..PLAIN };
        agree(backend, way(PLAIN), way(chunking), 1e-6);
    }
}

/// Products of other shapes round differently, and the softmax at temperature 0.02 amplifies the differences.
#[test]
fn avoided_work_does_not_change_gradients() {
    on_device!(compare_shortcuts);
}

fn compare_shortcuts<B: Backend>(backend: &B) {
    for adapter in [false, true] {
        let (chunking, precision) = (PLAIN, Dtype::F32);
        let way = |shortcuts| Way { chunking, adapter, shortcuts, precision };
        let dedup_sequences = Shortcuts { dedup_sequences: true, ..NO_SHORTCUTS };
        agree(backend, way(NO_SHORTCUTS), way(dedup_sequences), 5e-6);
        let last_layer_at_pooled = Shortcuts { last_layer_at_pooled: true, ..NO_SHORTCUTS };
        agree(backend, way(NO_SHORTCUTS), way(last_layer_at_pooled), 5e-6);
    }
}

/// Runs these tests with every other set of vector instructions that this processor has.
#[test]
fn on_every_vector_unit() {
    use llara::backend::gemm::Unit;
    if std::env::var_os("LLARA_CPU").is_some() {
        return;
    }
    for unit in Unit::ALL.into_iter().filter(|unit| unit.is_available()) {
        let run = std::process::Command::new(std::env::current_exe().unwrap())
            .env("LLARA_CPU", unit.name())
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&run.stdout);
        assert!(run.status.success(), "LLARA_CPU={}:\n{output}", unit.name());
        assert!(!output.contains(" 0 passed"), "LLARA_CPU={}:\n{output}", unit.name());
    }
}
