//! A forward pass that holds the weights of one layer at a time, for a check of files that must not
//! need the memory of a second model.

use super::decoder::{Builder, Values};
use super::input::Input;
use super::pass::Pass;
use super::rope::Rope;
use super::{DecoderConfig, mean_pool};
use crate::Result;
use crate::backend::{Backend, Dtype};

/// Embeddings `[S, d]` of the sequences of `input`, before normalisation, computed in f32. `value` gives
/// each weight as f32 by name and file shape; it is dropped as soon as its layer is done.
pub(crate) fn embed_streamed<B: Backend>(
    backend: &B,
    config: &DecoderConfig,
    value: &mut Values<'_, B>,
    input: &Input<B>,
) -> Result<B::Tensor> {
    let rope = Rope::new(config.inverse_frequencies()).table(backend, input.all.layout.longest)?;
    let activations = Dtype::F32;
    let pass = Pass { backend, rows: &input.all, rope: &rope, activations, dropout: None };
    let mut builder = Builder { config, value };
    let table = builder
        .parameter("embed_tokens.weight".to_owned(), &[config.vocab_size, config.hidden_size])?;
    let mut x = backend.gather_rows(table.value(), &input.ids)?;
    drop(table);
    for layer in 0..config.num_hidden_layers {
        x = builder.block(layer)?.forward(&pass, x, None)?.0;
    }
    let pooled = backend.gather_rows(&x, &input.pooled_rows)?;
    let norm = builder.norm("norm", config.hidden_size)?;
    let hidden = norm.forward(backend, &pooled, Dtype::F32)?.0;
    mean_pool(backend, &hidden, input)
}
