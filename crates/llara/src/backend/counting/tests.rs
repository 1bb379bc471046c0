//! Checks of the counting backend: the shapes of the CPU backend, the counts of operations and of memory.

use super::*;
use crate::backend::{AttentionShape, Cpu, Layout, ScatterPlan, ScatterRows};

fn counting() -> CountingBackend {
    CountingBackend::new(Cpu::new().memory())
}

/// A batch of sequences; each range gives the positions of one sequence.
fn layout<B: Backend>(backend: &B, sequences: &[Range<u32>]) -> Layout<B> {
    let positions: Vec<u32> = sequences.iter().cloned().flatten().collect();
    let ends = sequences.iter().scan(0, |end, sequence| {
        *end += sequence.len() as u32;
        Some(*end)
    });
    let bounds: Vec<u32> = std::iter::once(0).chain(ends).collect();
    let [offsets, positions] = backend.upload_indices([&bounds, &positions]).unwrap();
    Layout { bounds, offsets, positions, longest: 4 }
}

/// The shapes and dtypes of the results of several operations, in order.
fn shapes<B: Backend>(backend: &B) -> Vec<(usize, usize, Dtype)> {
    let mut shapes = Vec::new();
    let mut record = |x: &B::Tensor| shapes.push((x.rows(), x.cols(), x.dtype()));
    let x = backend.upload(&[0.5; 6 * 8], 6, 8).unwrap();
    let w = backend.upload(&[0.5; 4 * 8], 4, 8).unwrap();
    let weight = backend.prepare(w, WeightUse::Trainable(Dtype::F32)).unwrap();
    let y = backend.linear(x.view(), weight.view(), 1.0, Epilogue::default()).unwrap();
    record(&y);
    record(&backend.linear_input_grad(y.view(), weight.view(), 1.0, None).unwrap());
    let gain = backend.upload(&[1.0; 4], 1, 4).unwrap();
    let (normed, inv_rms) = backend.rms_norm(x.view(), &gain, 1e-5, Dtype::F32).unwrap();
    record(&normed);
    record(&inv_rms);
    record(&backend.rms_norm_backward(&x, &x, &gain, &inv_rms, None, None).unwrap());
    let (unit, inv_norm) = backend.normalize(&x).unwrap();
    record(&unit);
    record(&inv_norm);
    record(&backend.normalize_backward(x.view(), &unit, &inv_norm).unwrap());
    let index = |data: &[u32]| backend.upload_indices([data]).unwrap().map(Some)[0].take().unwrap();
    record(&backend.gather_rows(&x, &index(&[1, 1, 5])).unwrap());
    record(&backend.segment_mean(&x, &index(&[0, 2, 6])).unwrap());
    record(&backend.segment_mean_backward(weight.values(), &index(&[0, 2, 5, 6, 9]), 9).unwrap());
    let mut table = backend.zeros(6, 8, Dtype::F32).unwrap();
    let plan = ScatterPlan::upload(&ScatterRows::new(&[1, 0, 1, 5, 5, 2]), backend).unwrap();
    backend.scatter_add_rows(&x, &plan, &mut table).unwrap();
    let keys = layout(backend, &[0..2, 0..4]);
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 4, window: Some(3), scale: 0.5 };
    for queries in [layout(backend, &[1..2, 3..4]), layout(backend, &[0..2, 0..4])] {
        let rows = queries.rows();
        let q = backend.upload(&vec![0.1; rows * 16], rows, 16).unwrap();
        let input = AttentionInput {
            q: q.view(),
            k: x.view(),
            v: x.view(),
            queries: &queries,
            keys: &keys,
            shape: &shape,
        };
        let output = backend.attention(&input).unwrap();
        record(&output.out);
        match backend.attention_backward(&q, &input, &output).unwrap() {
            AttentionGradients::Fused(dqkv) => record(&dqkv),
            AttentionGradients::Separate { dq, dkv } => [dq, dkv].iter().for_each(&mut record),
        }
    }
    let gate_up = backend.upload(&[0.5; 6 * 8], 6, 8).unwrap();
    let hidden = backend.swiglu(&gate_up).unwrap();
    record(&hidden);
    let (dgate_up, hidden) = backend.swiglu_backward(hidden, gate_up).unwrap();
    [dgate_up, hidden].iter().for_each(&mut record);
    let scores = backend.scores(&x, &unit, 2.0).unwrap();
    record(&scores);
    let (loss, dscores) = backend.cross_entropy(&scores, &index(&[0; 6])).unwrap();
    record(&loss);
    record(&dscores);
    let mask = ScoreMask { group_size: Some(2), columns: None, margin: Some(0.5) };
    record(&backend.mask_scores(&scores, &index(&[0; 6]), &mask).unwrap());
    let teacher = backend.zeros(6, 2, Dtype::F32).unwrap();
    let mut grad = backend.zeros(6, 6, Dtype::F32).unwrap();
    let kl = DistillationLoss::KlDivergence;
    record(&backend.distillation(&scores, &index(&[0; 6]), &teacher, kl, 1.0, &mut grad).unwrap());
    backend.add_scaled(scores.view(), 0.5, grad.view_mut()).unwrap();
    let (dq, dp) = backend.scores_backward(&dscores, &x, &unit, 2.0).unwrap();
    [dq, dp].iter().for_each(&mut record);
    record(&backend.clip_factor(&loss, None).unwrap());
    shapes
}

#[test]
fn results_have_the_shapes_of_the_cpu_backend() {
    let counting = counting();
    assert_eq!(shapes(&counting), shapes(&Cpu::new()));
    assert_eq!(counting.allocated(), 0, "a tensor was not freed");
}

#[test]
fn attention_counts_only_the_keys_that_queries_attend_to() {
    let counting = counting();
    let all = layout(&counting, &[0..5, 0..2]);
    let shape = AttentionShape { heads: 3, kv_heads: 1, head_dim: 4, window: None, scale: 1.0 };
    let matrix = |cols| counting.zeros(7, cols, Dtype::F32).unwrap();
    let (q, kv) = (matrix(12), matrix(4));
    let input = AttentionInput {
        q: q.view(),
        k: kv.view(),
        v: kv.view(),
        queries: &all,
        keys: &all,
        shape: &shape,
    };
    let output = counting.attention(&input).unwrap();
    assert_eq!(counting.flops(), 4 * 12 * (15 + 3));
    counting.attention_backward(&q, &input, &output).unwrap();
    assert_eq!(counting.flops(), (4 + 10) * 12 * (15 + 3));
    let windowed = AttentionShape { window: Some(2), ..shape };
    let before = counting.flops();
    counting.attention(&AttentionInput { shape: &windowed, ..input }).unwrap();
    assert_eq!(counting.flops() - before, 4 * 12 * (1 + 2 + 2 + 2 + 2 + 1 + 2));
}

#[test]
fn bf16_takes_half_the_memory() {
    let counting = counting();
    let zeros = |rows, dtype| counting.zeros(rows, 32, dtype).unwrap();
    let (x, residual) = (zeros(64, Dtype::Bf16), zeros(64, Dtype::F32));
    let w = counting.prepare(zeros(32, Dtype::F32), WeightUse::Trainable(Dtype::Bf16)).unwrap();
    let added = Epilogue { residual: Some(&residual), ..Epilogue::default() };
    let dtypes = [
        counting.linear(x.view(), w.view(), 1.0, Epilogue::default()).unwrap().dtype(),
        counting.linear(x.view(), w.view(), 1.0, added).unwrap().dtype(),
        counting.linear_input_grad(x.view(), w.view(), 1.0, None).unwrap().dtype(),
    ];
    assert_eq!(dtypes, [Dtype::Bf16, Dtype::F32, Dtype::Bf16]);
    drop((w, residual));
    assert_eq!(counting.allocated(), 64 * 32 * 2);
    assert!(counting.peak() > counting.allocated());
}

#[test]
fn bf16_copies_of_trainable_weights_are_counted() {
    let memory = DeviceMemory { has_working_copies: true, ..Cpu::new().memory() };
    let counting = CountingBackend::new(memory);
    let prepare = |purpose| {
        let values = counting.zeros(8, 16, Dtype::F32).unwrap();
        let _weight = counting.prepare(values, purpose).unwrap();
        counting.allocated()
    };
    assert_eq!(prepare(WeightUse::Elementwise), 4 * 128);
    assert_eq!(prepare(WeightUse::Trainable(Dtype::F32)), 4 * 128);
    assert_eq!(prepare(WeightUse::Trainable(Dtype::Bf16)), (4 + 2) * 128);
}
