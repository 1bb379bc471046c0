//! One training step: forward, backward, AdamW.
//!
//! `cargo bench --bench step -- [FILTER…]`. The model and the batch have the shapes of `bench/compare`,
//! with random values: 4 queries of 64 tokens with 8 passages of 40 to 159 each, none of them equal.
//! A step starts with token ids.

mod random_model;
mod timing;
mod training;

use llara::Result;
use llara::backend::Dtype;
use llara::model::LoraConfig;
use llara::train::Chunking;

use random_model::ModelShape;
use timing::Cases;
use training::Training;

/// Name, precision, and whether adapters are trained instead of all weights.
const CASES: [(&str, Dtype, bool); 4] = [
    ("full f32", Dtype::F32, false),
    ("full bf16", Dtype::Bf16, false),
    ("lora f32", Dtype::F32, true),
    ("lora bf16", Dtype::Bf16, true),
];

fn main() -> Result<()> {
    let Some(cases) = Cases::from_args() else { return Ok(()) };
    println!("case        tokens   s/step     tokens/s   fastest      loss");
    for (name, precision, lora) in CASES {
        if !cases.include(name) {
            continue;
        }
        let mut training = training(precision, lora)?;
        let mut loss = 0.0;
        let times = timing::time(|| {
            loss = training.step()?;
            Ok(())
        })?;
        let (tokens, seconds) = (training.tokens(), times.median);
        let [median, fastest] = [seconds, times.fastest].map(|seconds| tokens as f64 / seconds);
        println!("{name:10} {tokens:7} {seconds:10.3} {median:10.0} {fastest:9.0} {loss:9.4}");
    }
    Ok(())
}

fn training(precision: Dtype, lora: bool) -> Result<Training> {
    let shape = ModelShape::BENCHMARK;
    let mut model = shape.model()?;
    if lora {
        model.attach_new_adapter(&LoraConfig::default(), 3)?;
    }
    model.set_precision(precision)?;
    let query = shape.batch(1, [64; 4])?;
    let passage = shape.batch(2, (0..4 * 8).map(|i| 40 + i * 37 % 120))?;
    Training::new(model, (query, passage), Chunking::default())
}
