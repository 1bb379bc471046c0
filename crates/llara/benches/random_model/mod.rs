//! Models of any shape with random weights, and batches of random tokens for them.

use llara::backend::Cpu;
use llara::data::Batch;
use llara::model::DecoderConfig;
use llara::model::weights::random_decoder;
use llara::{BiEncoderModel, BiEncoderOptions, Result};
use rand::{RngExt, SeedableRng, rngs::ChaCha8Rng};
use serde_json::json;

/// Sizes of a Llama model.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ModelShape {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) layers: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) vocab_size: usize,
}

impl ModelShape {
    /// The model of `bench/compare`: 33 M parameters.
    pub(crate) const BENCHMARK: ModelShape = ModelShape {
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 8,
        heads: 9,
        kv_heads: 3,
        vocab_size: 8192,
    };

    /// A model of this shape. Its tokenizer and template are those of a test fixture, because the benchmarks start
    /// with token ids.
    pub(crate) fn model(self) -> Result<BiEncoderModel<Cpu>> {
        let config = json!({
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": true,
            "hidden_act": "silu",
        });
        let config = DecoderConfig::from_json(config.to_string().as_bytes())?;
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama-gqa");
        let mut model = BiEncoderModel::from_folder(folder, BiEncoderOptions::default())?;
        *model.decoder_mut() = random_decoder(model.backend(), &config, 0.02, 1)?;
        Ok(model)
    }

    /// Sequences of these lengths, with random tokens of the vocabulary; `seed` selects the tokens.
    pub(crate) fn batch(
        self,
        seed: u64,
        lengths: impl IntoIterator<Item = usize>,
    ) -> Result<Batch> {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut token = || generator.random_range(0..self.vocab_size as u32);
        Batch::from_sequences(
            lengths.into_iter().map(|length| (0..length).map(|_| token()).collect::<Vec<_>>()),
        )
    }
}
