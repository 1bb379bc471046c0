//! The plan equals numbers that were computed by hand, stays within its budget, and scales as expected.

#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

use std::path::PathBuf;

use llara::backend::{Backend, Cpu, Dtype};
use llara::data::Batch;
use llara::loss::{
    Distillation, DistillationKind, FalseNegatives, MatryoshkaPrefix, ObjectiveOptions,
};
use llara::model::{DecoderConfig, LoraConfig, SavedTokens};
use llara::train::Chunking;
use llara::train::plan::{
    ChunkPolicy, DryRun, EvaluationShape, LargestBatch, Plan, PlannedTask, RunShape,
};
use llara::{BiEncoderOptions, Loader};

/// The fixture's tokenizer with a model that is large enough for activations to be a relevant part of memory.
fn shape() -> RunShape {
    let fixture = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
    let outline = Loader::new(&fixture).unwrap().outline().unwrap();
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
        precision: Dtype::F32,
        options: BiEncoderOptions::default(),
        evaluation: None,
        task: PlannedTask::Finetuning(ObjectiveOptions::default()),
        group: None,
        memory: Cpu::new().memory(),
        process_bytes: 1 << 20,
        saves_merged: false,
    }
}

/// Different sequences with different lengths.
fn batch(rows: usize, group: usize) -> LargestBatch {
    let sequence = |i: usize, length: usize| {
        (0..length).map(|at| ((i * 31 + at * 7) % 350 + 1) as u32).collect::<Vec<_>>()
    };
    let sequences = |count: usize, first: usize, length: usize| {
        Batch::from_sequences((0..count).map(|i| sequence(first + i, length + i % 5))).unwrap()
    };
    LargestBatch {
        query: sequences(rows, 0, 20),
        passage: sequences(rows * group, 1000, 50),
        steps: 1,
        sampled_steps: 1,
    }
}

fn lengths(batch: &LargestBatch) -> Vec<usize> {
    batch.query.sequences().chain(batch.passage.sequences()).map(<[u32]>::len).collect()
}

fn one_pass(shape: RunShape, batch: &LargestBatch) -> Plan {
    DryRun::new(shape).unwrap().plan(batch, Chunking::default()).unwrap()
}

/// `2 · heads · head_dim` for each pair of a query and a key: the scores that the backward pass recomputes.
fn recomputed_scores(config: &DecoderConfig, lengths: &[usize], pooled: usize) -> usize {
    let all: usize = lengths.iter().map(|n| n * (n + 1) / 2).sum();
    let unpooled: usize =
        lengths.iter().map(|n| n.saturating_sub(pooled)).map(|n| n * (n + 1) / 2).sum();
    let pairs = config.num_hidden_layers * all - unpooled;
    2 * config.num_attention_heads * config.head_dim * pairs
}

#[test]
fn needed_work_is_executed_work_without_recomputation() {
    let (shape, batch) = (shape(), batch(3, 4));
    let (config, pooled) = (shape.decoder.clone(), shape.prompts.template().pooled_tokens);
    let work = one_pass(shape, &batch).work;
    let loss = 3 * 2 * 3 * 12 * config.hidden_size;
    let again = recomputed_scores(&config, &lengths(&batch), pooled);
    assert_eq!(work.done_flops, work.needed_flops + (loss + again) as u64);
}

#[test]
fn adapters_need_no_gradient_of_the_first_input_and_of_frozen_weights() {
    let lora = LoraConfig { rank: 8, dropout: 0.0, ..LoraConfig::default() };
    let (shape, batch) = (RunShape { lora: Some(lora), ..shape() }, batch(3, 4));
    let (config, pooled) = (shape.decoder.clone(), shape.prompts.template().pooled_tokens);
    let work = one_pass(shape, &batch).work;
    let loss = 3 * 2 * 3 * 12 * config.hidden_size;
    let again = recomputed_scores(&config, &lengths(&batch), pooled);
    assert_eq!(work.done_flops, work.needed_flops + (loss + again) as u64);
}

#[test]
fn embeddings_of_new_tokens_are_counted() {
    let tokens = |count: u32| {
        let lora = LoraConfig {
            rank: 8,
            dropout: 0.0,
            trained_tokens: (1..=count).collect(),
            ..LoraConfig::default()
        };
        RunShape { lora: Some(lora), ..shape() }
    };
    let batch = batch(3, 4);
    let (config, pooled) = (shape().decoder, shape().prompts.template().pooled_tokens);
    let (without, with) = (one_pass(tokens(0), &batch), one_pass(tokens(16), &batch));
    let loss = 3 * 2 * 3 * 12 * config.hidden_size;
    let again = recomputed_scores(&config, &lengths(&batch), pooled);
    assert_eq!(with.work.done_flops, with.work.needed_flops + (loss + again) as u64);
    // The gradient of the first block's input is needed.
    assert!(with.work.needed_flops > without.work.needed_flops);
    let rows = 4 * 16 * config.hidden_size as u64;
    assert_eq!(with.training.weights, without.training.weights + rows);
    assert_eq!(with.training.gradients, without.training.gradients + rows);
    assert_eq!(with.training.optimizer, without.training.optimizer + 2 * rows);
}

#[test]
fn persistent_memory_is_that_of_the_parameters() {
    let shape = shape();
    let c = &shape.decoder;
    let (d, kv) = (c.hidden_size, c.num_key_value_heads * c.head_dim);
    let block = 2 * d * d + 2 * d * kv + 3 * d * c.intermediate_size + 2 * d;
    let parameters = (c.num_hidden_layers * block + c.vocab_size * d + d) as u64;
    let plan = one_pass(shape.clone(), &batch(2, 2));
    let parts = plan.training;
    assert_eq!(parts.weights, 4 * parameters);
    assert_eq!((parts.gradients, parts.optimizer), (4 * parameters, 8 * parameters));
    assert_eq!(parts.total(), parts.named().iter().map(|(_, part)| part).sum::<u64>());

    let lora = LoraConfig { rank: 4, dropout: 0.0, ..LoraConfig::default() };
    let frozen = one_pass(RunShape { lora: Some(lora), ..shape.clone() }, &batch(2, 2)).training;
    assert!(frozen.gradients < parts.gradients / 5);
    // While saving, one layer of the saved model is in memory beside the trained one.
    assert!(plan.saving_bytes > (1 << 20) + parts.weights + parts.weights / 10);
    assert!(plan.saving_bytes < (1 << 20) + 3 * parts.weights);
    assert!(plan.saving_bytes < parts.total());
    assert_eq!(plan.peak_phase(), "training");
    let half = one_pass(RunShape { precision: Dtype::Bf16, ..shape }, &batch(2, 2)).training;
    assert_eq!(half.weights, parts.weights);
    assert!(half.activations < parts.activations * 3 / 4);
}

#[test]
fn products_of_bf16_need_sums_of_up_to_2048_rows_in_every_thread() {
    let workspace = |precision, rows: usize, threads| {
        let mut shape = RunShape { precision, ..shape() };
        shape.memory.threads = threads;
        let batch = batch(rows, 3);
        let plan = one_pass(shape, &batch);
        (plan.chunks.tokens, plan.training.workspace as usize)
    };
    let sums = |tokens: usize| 4 * 640 * tokens.min(2048);
    for (rows, threads) in [(2, 1), (2, 5), (60, 5)] {
        let (tokens, single) = workspace(Dtype::F32, rows, threads);
        let (_, half) = workspace(Dtype::Bf16, rows, threads);
        assert_eq!(half - single, threads * sums(tokens), "{tokens} tokens, {threads} threads");
    }
}

#[test]
fn a_merged_model_is_saved_in_f32() {
    let lora = LoraConfig { rank: 4, ..LoraConfig::default() };
    let shape = RunShape { lora: Some(lora), precision: Dtype::Bf16, ..shape() };
    let saving = |saves_merged| {
        one_pass(RunShape { saves_merged, ..shape.clone() }, &batch(2, 2)).saving_bytes
    };
    let full = one_pass(RunShape { lora: None, ..shape.clone() }, &batch(2, 2)).training.weights;
    // The matrices of the adapted model are bf16.
    assert!(saving(true) > saving(false) + full / 3, "{} {}", saving(true), saving(false));
}

/// The workspace of one pass is larger than the whole budget; that of chunks is not.
#[test]
fn chunks_are_chosen_by_their_own_workspace() {
    let mut shape = RunShape { precision: Dtype::Bf16, ..shape() };
    shape.memory.threads = 16;
    let batch = batch(60, 3);
    let mut dry_run = DryRun::new(shape).unwrap();
    let whole = dry_run.plan(&batch, Chunking::default()).unwrap().training;
    let chunks = Chunking { max_tokens: 512, kept_tokens: 0, ..Chunking::default() };
    let budget = dry_run.plan(&batch, chunks).unwrap().training.total();
    assert!(budget < whole.without_activations());
    let chosen = dry_run.choose(&batch, ChunkPolicy::Auto, budget).unwrap();
    assert!(chosen.training.total() <= budget);
    assert!(chosen.chunks.largest_tokens > 256, "{:?}", chosen.chunks);
}

#[test]
fn a_checkpoint_of_a_whole_embedding_table_needs_memory_beside_that_of_training() {
    let lora = LoraConfig {
        rank: 4,
        trained_tokens: vec![3],
        saved_tokens: SavedTokens::ModulesToSave,
        ..LoraConfig::default()
    };
    let shape = RunShape { lora: Some(lora), ..shape() };
    let table = (12 * shape.decoder.vocab_size * shape.decoder.hidden_size) as u64;
    let plan = one_pass(shape, &batch(2, 2));
    assert_eq!(plan.saving_bytes, plan.training.total() + table);
    assert_eq!(plan.peak_phase(), "saving");
}

#[test]
fn chunks_cost_a_second_forward_pass() {
    let (shape, batch) = (shape(), batch(4, 3));
    let mut dry_run = DryRun::new(shape).unwrap();
    let whole = dry_run.plan(&batch, Chunking::default()).unwrap();
    let chunks = Chunking { max_tokens: 200, kept_tokens: 0, ..Chunking::default() };
    let plan = dry_run.plan(&batch, chunks).unwrap();
    assert!(plan.chunks.count > 2 && plan.chunks.largest_tokens <= 200 && plan.chunks.kept == 0);
    assert!((plan.chunks.recomputed_share - 1.0).abs() < 1e-9);
    let forward = (plan.work.done_flops - whole.work.done_flops) as f64;
    let share = forward / whole.work.done_flops as f64;
    assert!((0.3..0.34).contains(&share), "{share}");
    assert!(plan.training.activations < whole.training.activations / 2);

    let half = Chunking { kept_tokens: plan.chunks.tokens / 2, ..chunks };
    let kept = dry_run.plan(&batch, half).unwrap();
    assert!(kept.chunks.kept > 0 && kept.chunks.recomputed_share < 0.8);
    assert!(kept.work.done_flops < plan.work.done_flops);
    // A dry run can be repeated with the same result.
    assert_eq!(dry_run.plan(&batch, half).unwrap(), kept);
}

#[test]
fn one_pass_is_chosen_if_it_fits_and_more_memory_reduces_work() {
    let (shape, batch) = (shape(), batch(8, 4));
    let mut dry_run = DryRun::new(shape).unwrap();
    let whole = dry_run.plan(&batch, Chunking::default()).unwrap();
    let peak = whole.peak_bytes();
    let chosen = dry_run.choose(&batch, ChunkPolicy::Auto, peak).unwrap();
    assert_eq!((chosen.chunks.count, chosen.chunks.recomputed_share), (1, 0.0));
    assert_eq!(chosen.training, whole.training);

    let mut work = u64::MAX;
    for budget in [60, 70, 80, 90, 99].map(|percent| peak * percent / 100) {
        let plan = dry_run.choose(&batch, ChunkPolicy::Auto, budget).unwrap();
        assert!(plan.peak_bytes() <= budget, "{} of {budget}", plan.peak_bytes());
        assert!(plan.chunks.count > 1 && plan.work.done_flops <= work);
        work = plan.work.done_flops;
    }
    let given = Chunking { max_tokens: 100, kept_tokens: 0, ..Chunking::default() };
    let kept = dry_run.choose(&batch, ChunkPolicy::FixedSize(given), peak * 9 / 10).unwrap();
    assert!(kept.chunks.kept > 0 && kept.chunks.largest_tokens <= 100);
    let fixed = dry_run.choose(&batch, ChunkPolicy::Fixed(given), peak * 9 / 10).unwrap();
    assert_eq!(fixed.chunks.chunking, given);
}

#[test]
fn memory_does_not_grow_with_the_batch() {
    let mut dry_run = DryRun::new(shape()).unwrap();
    let small = batch(8, 4);
    let budget = dry_run.plan(&small, Chunking::default()).unwrap().peak_bytes();
    let mut recomputed = -1.0;
    for rows in [8, 16, 32, 64, 128] {
        let plan = dry_run.choose(&batch(rows, 4), ChunkPolicy::Auto, budget).unwrap();
        assert!(plan.peak_bytes() <= budget, "{rows}: {} of {budget}", plan.peak_bytes());
        assert!(plan.peak_bytes() > budget * 8 / 10, "{rows}: memory is not used");
        // The share grows until everything is computed twice.
        let share = plan.chunks.recomputed_share;
        assert!(share > recomputed || share == 1.0 && recomputed == 1.0, "{rows}: {share}");
        recomputed = plan.chunks.recomputed_share;
    }
}

#[test]
fn if_nothing_fits_the_smallest_memory_is_reported() {
    let mut dry_run = DryRun::new(shape()).unwrap();
    let batch = batch(4, 2);
    let plan = dry_run.choose(&batch, ChunkPolicy::Auto, 1 << 20).unwrap();
    assert!(plan.peak_bytes() > 1 << 20);
    assert!(plan.chunks.count > 1 && plan.chunks.kept == 0);
    let least = Chunking { max_tokens: 1, kept_tokens: 0, ..Chunking::default() };
    let fixed = dry_run.plan(&batch, least).unwrap();
    assert!(plan.training.total() <= fixed.training.total());
}

#[test]
fn an_evaluation_is_counted_beside_gradients_and_moments() {
    let batch = batch(2, 2);
    let peak = |batch_tokens, passages| {
        let evaluation = EvaluationShape { batch_tokens, longest: 64, queries: 10, passages };
        one_pass(RunShape { evaluation: Some(evaluation), ..shape() }, &batch)
    };
    let without = one_pass(shape(), &batch);
    assert_eq!(without.evaluation_bytes, 0);
    let (small, large) = (peak(64, 1000), peak(16_384, 1000));
    let fixed = without.training.without_activations();
    assert!(small.evaluation_bytes > fixed, "{} {fixed}", small.evaluation_bytes);
    assert_eq!((small.training, large.training), (without.training, without.training));
    // An activation of every token, of the residual stream and of a block.
    assert!(large.evaluation_bytes > small.evaluation_bytes + 16_000 * 4 * 128 * 2);
    assert_eq!((large.peak_phase(), large.peak_bytes()), ("evaluating", large.evaluation_bytes));
    // A batch has no more than all texts.
    assert!(peak(16_384, 10).evaluation_bytes < large.evaluation_bytes / 2);
}

#[test]
fn terms_of_the_objective_are_counted() {
    let batch = batch(3, 4);
    let plain = one_pass(shape(), &batch);
    let distillation = Distillation { kind: DistillationKind::Kl, weight: 1.0, temperature: 1.0 };
    let objective = ObjectiveOptions {
        false_negatives: FalseNegatives { mask_equal: true, margin: Some(0.1) },
        symmetric: true,
        matryoshka: vec![MatryoshkaPrefix { dimension: 8, weight: 1.0 }],
        distillation: Some(distillation),
        ..ObjectiveOptions::default()
    };
    let with_terms =
        one_pass(RunShape { task: PlannedTask::Finetuning(objective), ..shape() }, &batch);
    // Scores of 3 queries and 12 passages once and their gradients twice; the same for prefixes of 8 features,
    // and for 3 positives and 3 queries.
    let full = 2 * 3 * 12 * shape().decoder.hidden_size as u64 * 3;
    let prefixes = 2 * (3 * 12 + 3 * 3) * 8 * 3;
    assert_eq!(with_terms.work.done_flops + full, plain.work.done_flops + prefixes);
}
