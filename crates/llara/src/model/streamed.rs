//! A forward pass with the weights of one layer in memory at a time. It checks saved files without the memory
//! of a second model.

use super::decoder::Builder;
use super::input::Input;
use super::parameter::Values;
use super::pass::Pass;
use super::rope::Rope;
use super::{DecoderConfig, mean_pool};
use crate::Result;
use crate::backend::{Backend, Dtype, Shape};

/// Embeddings `[S, d]` of the sequences of `input`, before normalization, computed in f32. `values` gives
/// each weight by name and shape in files; weights are dropped after their layer has been computed.
pub(crate) fn embed_streamed<B: Backend>(
    backend: &B,
    config: &DecoderConfig,
    values: &mut Values<'_>,
    input: &Input<B>,
) -> Result<B::Tensor> {
    let rope = Rope::new(config.inverse_frequencies()).table(backend, input.all.layout.longest)?;
    let activations = Dtype::F32;
    let branches = input.branches.as_ref();
    let pass =
        Pass { backend, rows: &input.all, branches, rope: &rope, activations, dropout: None };
    let mut builder = Builder { backend, config, values };
    let table = builder.embed_tokens()?;
    let mut x = backend.gather_rows(table.values(), &input.ids)?;
    drop(table);
    for layer in 0..config.num_hidden_layers {
        x = builder.block(layer)?.forward(&pass, x, None)?.0;
    }
    let pooled = backend.gather_rows(&x, &input.pooled_rows)?;
    let norm = builder.norm("norm", config.hidden_size)?;
    let hidden = norm.forward(backend, pooled.view(), Dtype::F32)?.0;
    mean_pool(backend, &hidden, input)
}
