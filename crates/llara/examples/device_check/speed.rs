//! Rates of products, attention and training steps. There is no pass or fail; the output is for reading.

use std::sync::Arc;
use std::time::Instant;

use llara::backend::{
    AttentionInput, AttentionShape, Backend, Dtype, Epilogue, Layout, Shape, WeightUse,
};
use llara::data::Batch;
use llara::dist::Solo;
use llara::model::{Decoder, DecoderConfig, Dropout, LoraConfig, ParameterValues};
use llara::train::{AdamW, AdamWConfig, Chunking, StepInput, accumulate_gradients};
use llara::{BiEncoderModel, BiEncoderOptions, Error, ErrorKind, Loader, Result};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use rayon::prelude::*;
use serde_json::json;

/// Hidden and intermediate size, heads, key heads, head size, layers, vocabulary.
struct ModelShape {
    family: &'static str,
    hidden: usize,
    intermediate: usize,
    heads: (usize, usize, usize),
    layers: usize,
    vocabulary: usize,
}

fn shape_of(name: &str) -> Result<ModelShape> {
    let shape = |family, hidden, intermediate, heads, layers, vocabulary| ModelShape {
        family,
        hidden,
        intermediate,
        heads,
        layers,
        vocabulary,
    };
    match name {
        "llama-7b" => Ok(shape("llama", 4096, 11008, (32, 32, 128), 32, 32016)),
        "qwen3-0.6b" => Ok(shape("qwen3", 1024, 3072, (16, 8, 128), 28, 151936)),
        "small" => Ok(shape("llama", 256, 768, (4, 2, 64), 2, 512)),
        _ => Err(Error::new(ErrorKind::Argument, "unknown model")
            .got(name)
            .expected("llama-7b, qwen3-0.6b or small")),
    }
}

/// `[MODEL [LAYERS [FOLDER [lora|full]]]]`: the tokenizer is that of the folder.
pub(crate) fn measure<B: Backend>(backend: &B, args: &[String]) -> Result<()> {
    let Some(name) = args.first() else {
        products(backend)?;
        return attention(backend);
    };
    let shape = shape_of(name)?;
    let number = |text: &String| {
        text.parse().map_err(|_| Error::new(ErrorKind::Argument, "not a number").got(text))
    };
    let layers = args.get(1).map(number).transpose()?.unwrap_or(shape.layers);
    let folder = args.get(2).map_or("crates/llara/tests/fixtures/llama-gqa", String::as_str);
    let only = args.get(3).map(String::as_str);
    for (name, lora) in [("lora", true), ("full", false)] {
        if only.is_none_or(|only| only == name) {
            steps(backend, &shape, layers, folder, (lora, 128))?;
        }
    }
    Ok(())
}

/// Seconds of one call: the median of several, with synchronization after each.
fn seconds<B: Backend>(backend: &B, mut run: impl FnMut() -> Result<B::Tensor>) -> Result<f64> {
    const REPEATS: usize = 10;
    let wait = |x: &B::Tensor| backend.download_view(x.view().with_rows(0..1).with_cols(0..1));
    wait(&run()?)?;
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let mut last = run()?;
        for _ in 1..REPEATS {
            last = run()?;
        }
        wait(&last)?;
        times.push(start.elapsed().as_secs_f64() / REPEATS as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn random<B: Backend>(backend: &B, rows: usize, cols: usize, dtype: Dtype) -> Result<B::Tensor> {
    let mut generator = ChaCha8Rng::seed_from_u64(5);
    let data: Vec<f32> = (0..rows * cols).map(|_| generator.random_range(-1.0f32..1.0)).collect();
    backend.cast(&backend.upload(&data, rows, cols)?, dtype)
}

fn products<B: Backend>(backend: &B) -> Result<()> {
    for (n, input, output) in [(16384, 4096, 4096), (16384, 4096, 11008), (16384, 1024, 3072)] {
        for dtype in [Dtype::Bf16, Dtype::F32] {
            let x = random(backend, n, input, dtype)?;
            let w = backend
                .prepare(random(backend, output, input, dtype)?, WeightUse::Frozen(dtype))?;
            let time =
                seconds(backend, || backend.linear(x.view(), w.view(), 1.0, Epilogue::default()))?;
            let rate = 2.0 * (n * input * output) as f64 / time / 1e12;
            println!(
                "linear {dtype} {n} x {input} -> {output}: {:.3} ms, {rate:.0} TFLOP/s",
                time * 1e3
            );
        }
    }
    Ok(())
}

fn attention<B: Backend>(backend: &B) -> Result<()> {
    for (length, head_dim, heads, kv_heads) in [
        (128, 128, 32, 32),
        (512, 64, 32, 8),
        (512, 128, 32, 8),
        (2048, 64, 32, 8),
        (2048, 128, 32, 8),
    ] {
        let sequences = 16384 / length;
        let rows = sequences * length;
        let bounds: Vec<u32> = (0..=sequences).map(|s| (s * length) as u32).collect();
        let positions: Vec<u32> = (0..rows).map(|row| (row % length) as u32).collect();
        let [offsets, positions] = backend.upload_indices([&bounds, &positions])?;
        let layout = Layout::<B> { bounds, offsets, positions, longest: length };
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { heads, kv_heads, head_dim, window: None, scale };
        let q = random(backend, rows, shape.q_cols(), Dtype::Bf16)?;
        let k = random(backend, rows, shape.kv_cols(), Dtype::Bf16)?;
        let input = AttentionInput {
            q: q.view(),
            k: k.view(),
            v: k.view(),
            queries: &layout,
            keys: &layout,
            shape: &shape,
        };
        let forward = seconds(backend, || Ok(backend.attention(&input)?.out))?;
        let output = backend.attention(&input)?;
        let backward = seconds(backend, || {
            use llara::backend::AttentionGradients::{Fused, Separate};
            match backend.attention_backward(&q, &input, &output)? {
                Fused(x) => Ok(x),
                Separate { dq, .. } => Ok(dq),
            }
        })?;
        // Two products of half of all pairs; five in the backward pass.
        let flops = 2.0 * (rows * length * shape.q_cols()) as f64;
        println!(
            "attention bf16 {sequences} x {length}, heads {heads}/{kv_heads} of {head_dim}: forward {:.3} ms, {:.0} TFLOP/s; backward {:.3} ms, {:.0} TFLOP/s",
            forward * 1e3,
            flops / forward / 1e12,
            backward * 1e3,
            2.5 * flops / backward / 1e12,
        );
    }
    Ok(())
}

/// Matrices of uniform numbers with a standard deviation of 0.02, from a hash, on all threads; vectors of ones.
fn weights(shape: &[usize]) -> Vec<f32> {
    if shape.len() == 1 {
        return vec![1.0; shape[0]];
    }
    let uniform = |i: u64| {
        let x = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((x ^ x >> 27) >> 40) as f32 / (1 << 24) as f32
    };
    let elements = (shape[0] * shape[1]) as u64;
    (0..elements).into_par_iter().map(|i| (uniform(i + 1) - 0.5) * 0.069).collect()
}

/// Training steps of 8 queries and 128 passages.
fn steps<B: Backend>(
    backend: &B,
    shape: &ModelShape,
    layers: usize,
    folder: &str,
    (lora, tokens): (bool, usize),
) -> Result<()> {
    let (heads, kv_heads, head_dim) = shape.heads;
    let config = json!({
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "hidden_act": "silu",
    });
    let config = DecoderConfig::from_json(config.to_string().as_bytes())?;
    let loader = Loader::new(std::path::Path::new(folder))?;
    let mut model: BiEncoderModel<B> = loader.load(backend.clone(), BiEncoderOptions::default())?;
    *model.decoder_mut() = Decoder::build(backend, config, &mut |_, shape| {
        let frozen_matrix = lora && shape.len() == 2;
        let dtype = if frozen_matrix { Dtype::Bf16 } else { Dtype::F32 };
        Ok(ParameterValues::rounded(weights(shape), dtype))
    })?;
    if lora {
        model.attach_new_adapter(&LoraConfig::default(), 3)?;
    }
    model.set_precision(Dtype::Bf16)?;
    model.train();
    let mut optimizer = AdamW::new(backend, model.decoder_mut(), AdamWConfig::default())?;
    let mut generator = ChaCha8Rng::seed_from_u64(9);
    let mut batch = |sequences: usize, length: usize| {
        let mut token = || generator.random_range(0..shape.vocabulary as u32);
        let ids = (0..sequences).map(|_| (0..length).map(|_| token()).collect());
        Batch::from_sequences(ids.collect::<Vec<Vec<u32>>>())
    };
    let (query, passage) = (batch(8, 32)?, batch(128, tokens)?);
    let total = query.tokens() + passage.tokens();
    let mut times = Vec::new();
    let mut last = None;
    for step in 0..8 {
        let start = Instant::now();
        let dropout = lora.then_some(Dropout { seed: 42, step });
        let input = StepInput::from_batches(&query, &passage, true, dropout)?;
        let objective = model.objective(Arc::new(Solo))?;
        let loss = accumulate_gradients(&mut model, &objective, &input, &Chunking::default())?;
        optimizer.step(backend, model.decoder_mut(), 1e-4)?;
        let asked = start.elapsed().as_secs_f64();
        last = Some(backend.download(&loss)?[0]);
        times.push((start.elapsed().as_secs_f64(), asked));
    }
    let (time, asked) =
        times[3..].iter().copied().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or_default();
    let attention = 2 * shape.hidden * head_dim * (heads + kv_heads);
    let matrices = layers * (attention + 3 * shape.hidden * shape.intermediate);
    // Forward pass and gradients of inputs; in full fine-tuning also gradients of weights.
    let per_token = if lora { 4.0 } else { 6.0 } * matrices as f64;
    println!(
        "{} {layers} layers of {}, {total} tokens: {:.1} ms per step (enqueued in {:.1} ms), {:.0} tokens/s, {:.0} TFLOP/s of needed products, loss {:.4}",
        if lora { "LoRA" } else { "full" },
        shape.hidden,
        time * 1e3,
        asked * 1e3,
        total as f64 / time,
        per_token * total as f64 / time / 1e12,
        last.unwrap_or(f32::NAN),
    );
    Ok(())
}
