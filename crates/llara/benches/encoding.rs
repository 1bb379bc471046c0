//! Encoding texts as embeddings: tokens per second by length, in f32 and bf16.
//!
//! `cargo bench --bench encoding -- [FILTER…]`, where a filter is a length. The model is that of
//! `bench/compare`, frozen as in `llara encode`; a batch has as many sequences of one length as
//! give 4,096 tokens. The measurement starts with token ids.

mod random_model;
mod timing;

use llara::Result;
use llara::backend::Dtype;

use random_model::ModelShape;
use timing::Cases;

/// Tokens of a batch.
const TOKENS: usize = 4096;
/// Tokens of a text, template included.
const LENGTHS: [usize; 8] = [16, 32, 64, 128, 256, 512, 1024, 2048];

fn main() -> Result<()> {
    let Some(cases) = Cases::from_args() else { return Ok(()) };
    let shape = ModelShape::BENCHMARK;
    let frozen = |precision| {
        let mut model = shape.model()?;
        model.freeze()?;
        model.set_precision(precision)?;
        Ok(model)
    };
    let (single, half) = (frozen(Dtype::F32)?, frozen(Dtype::Bf16)?);
    println!("length   texts   f32 tokens/s  bf16 tokens/s   bf16 is faster");
    for length in LENGTHS {
        if !cases.include(&length.to_string()) {
            continue;
        }
        let texts = TOKENS / length;
        let batch = shape.batch(1, vec![length; texts])?;
        let times = timing::in_turn([&mut || single.encode(&batch).map(drop), &mut || {
            half.encode(&batch).map(drop)
        }])?;
        let [f32s, bf16s] = times.map(|times| TOKENS as f64 / times.median);
        println!("{length:6} {texts:7} {f32s:14.0} {bf16s:14.0} {:15.2}×", bf16s / f32s);
    }
    Ok(())
}
