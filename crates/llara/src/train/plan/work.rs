//! The number of operations that a step needs.

use crate::Result;
use crate::model::{DecoderConfig, LoraConfig};

/// The number of operations on which the result depends, for encoded sequences of these `lengths`. Only
/// matrix products and attention are counted. A multiplication and an addition are two operations.
///
/// Per token, a matrix of P weights needs 2·P operations in the forward pass, 2·P for the gradient of its
/// input and 2·P for its own gradient. A frozen matrix does not need the last, an adapter needs all three.
/// Per pair of positions, attention needs 4 operations per head feature in the forward pass and 8 in the
/// backward pass. The last block is counted only as far as the last `pooled` positions of a sequence depend on
/// it. The gradient of the first block's input is counted if token embeddings are trained.
pub(super) fn needed_flops(
    config: &DecoderConfig,
    lora: Option<&LoraConfig>,
    pooled: usize,
    lengths: &[usize],
) -> Result<u64> {
    let matrices = matrices(config)?;
    let tokens: usize = lengths.iter().sum();
    let pooled_rows: usize = lengths.iter().map(|&n| n.min(pooled)).sum();
    let mut total = 0;
    for layer in 0..config.num_hidden_layers {
        let last = layer + 1 == config.num_hidden_layers;
        for matrix in &matrices {
            let rows = if last && !matrix.of_every_token { pooled_rows } else { tokens };
            // The first block's input depends only on the token embeddings.
            let embeddings_learn = lora.is_none_or(|lora| !lora.trained_tokens.is_empty());
            let needs_input_gradient = embeddings_learn || layer > 0 || !matrix.of_block_input;
            total += rows as u64 * matrix.operations(lora, needs_input_gradient);
        }
        let from = |n: usize| if last { n.saturating_sub(pooled) } else { 0 };
        let pairs: u64 = lengths
            .iter()
            .map(|&n| pairs_in(n, config.windows[layer]) - pairs_in(from(n), config.windows[layer]))
            .sum();
        total += 12 * pairs * (config.num_attention_heads * config.head_dim) as u64;
    }
    Ok(total)
}

/// The number of pairs of a query position and a key position in a sequence of `n` tokens.
fn pairs_in(n: usize, window: Option<usize>) -> u64 {
    let n = n as u64;
    let triangle = |n: u64| n * (n + 1) / 2;
    match window.map(|w| w as u64).filter(|&w| w < n) {
        Some(w) => triangle(w) + (n - w) * w,
        None => triangle(n),
    }
}

struct Matrix {
    name: String,
    input: usize,
    output: usize,
    /// Needed for every token: the projections of keys and values.
    of_every_token: bool,
    /// Applied to the block's input: the projections of queries, keys and values.
    of_block_input: bool,
}

impl Matrix {
    /// The number of operations per token.
    fn operations(&self, lora: Option<&LoraConfig>, needs_input_gradient: bool) -> u64 {
        let (weights, sides) = (self.input * self.output, self.input + self.output);
        let gradient = usize::from(needs_input_gradient);
        let operations = match lora {
            None => 6 * weights,
            Some(lora) => {
                let frozen = (2 + 2 * gradient) * weights;
                match lora.target_modules.contains(&self.name) {
                    true => {
                        frozen
                            + lora.rank * (4 * sides + 2 * self.output + 2 * gradient * self.input)
                    }
                    false => frozen,
                }
            }
        };
        operations as u64
    }
}

/// The matrices of one layer, with the names and shapes of the decoder.
fn matrices(config: &DecoderConfig) -> Result<Vec<Matrix>> {
    let shapes = config.parameter_shapes()?.into_iter();
    let matrix = |(name, shape): (String, Vec<usize>)| {
        let projection =
            name.strip_prefix("layers.0.")?.strip_suffix(".weight")?.rsplit('.').next()?;
        let &[output, input] = shape.as_slice() else { return None };
        Some(Matrix {
            input,
            output,
            of_every_token: matches!(projection, "k_proj" | "v_proj"),
            of_block_input: matches!(projection, "q_proj" | "k_proj" | "v_proj"),
            name: projection.to_owned(),
        })
    };
    Ok(shapes.filter_map(matrix).collect())
}
