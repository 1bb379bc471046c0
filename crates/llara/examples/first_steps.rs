//! An introduction to the bi-encoder: load, forward on random ids, encode, compare, save, load again.
//!
//! `cargo run --release --example first_steps -- MODEL_FOLDER`; without a folder, one of the tests'
//! tiny models is used.

use std::path::PathBuf;

use llara::data::Batch;
use llara::{BiEncoderModel, BiEncoderOptions, compute_similarity};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};

/// Queries in the batch.
const B: usize = 4;
/// Passages of each query: one positive, seven hard negatives.
const G: usize = 8;

fn main() -> llara::Result<()> {
    let folder = std::env::args_os().nth(1).map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama-gqa")),
        PathBuf::from,
    );
    let mut model = BiEncoderModel::from_folder(&folder, BiEncoderOptions::default())?;

    let vocab_size = model.decoder().config().vocab_size as u32;
    let mut generator = ChaCha8Rng::seed_from_u64(0);
    let mut random_batch = |sequences: usize, length: usize| {
        let ids = (0..sequences).map(|_| {
            (0..length).map(|_| generator.random_range(0..vocab_size)).collect::<Vec<_>>()
        });
        Batch::from_sequences(ids)
    };
    let query = random_batch(B, 32)?;
    let passage = random_batch(B * G, 128)?;

    model.train();
    let output = model.forward(Some(&query), Some(&passage))?;
    println!("loss    {:?}", output.loss);
    println!("q_reps  {:?}", output.q_reps.map(|reps| reps.dim()));
    println!("p_reps  {:?}", output.p_reps.map(|reps| reps.dim()));
    println!("scores  {:?}", output.scores.map(|scores| scores.dim()));

    model.eval();
    let (Some(q), Some(p)) = (model.encode(&query)?, model.encode(&passage)?) else {
        return Ok(()); // encode(None) gives None; these were batches
    };
    println!("similarities {:?}", compute_similarity(&q, &p)?.shape());

    let saved = std::env::temp_dir().join("llara-first-steps");
    model.save(&saved)?;
    let again = BiEncoderModel::from_folder(&saved, BiEncoderOptions::default())?;
    let unchanged = again.encode(&query)? == Some(q);
    println!(
        "saved to {}; loaded again, it gives the same embeddings: {unchanged}",
        saved.display()
    );
    Ok(())
}
