//! Operations that a step needs, whatever is done.

use crate::model::{DecoderConfig, LoraConfig};

/// Operations that the result depends on, for sequences of these `lengths`, each encoded: matrices and
/// attention alone, everything else being bound by memory. A multiplication and an addition are two.
///
/// A matrix of P weights takes 2·P a token forward, 2·P for the gradient of its input and 2·P for its
/// own; a frozen one not the last, an adapter all three. A pair of positions takes 4 operations a
/// feature of the heads forward and 8 backward. Of the last block only what the last `pooled` positions
/// of a sequence read is needed, and where all weights but adapters are frozen no gradient of the first
/// block's input.
pub(super) fn needed_flops(
    config: &DecoderConfig,
    lora: Option<&LoraConfig>,
    pooled: usize,
    lengths: &[usize],
) -> u64 {
    let tokens: usize = lengths.iter().sum();
    let pooled_rows: usize = lengths.iter().map(|&n| n.min(pooled)).sum();
    let mut total = 0;
    for layer in 0..config.num_hidden_layers {
        let last = layer + 1 == config.num_hidden_layers;
        for matrix in matrices(config) {
            let rows = if last && !matrix.of_every_token { pooled_rows } else { tokens };
            // Below the first block nothing learns but the embeddings.
            let input_learns = lora.is_none() || layer > 0 || !matrix.of_block_input;
            total += rows as u64 * matrix.operations(lora, input_learns);
        }
        let from = |n: usize| if last { n.saturating_sub(pooled) } else { 0 };
        let pairs: u64 = lengths
            .iter()
            .map(|&n| seen(n, config.windows[layer]) - seen(from(n), config.windows[layer]))
            .sum();
        total += 12 * pairs * (config.num_attention_heads * config.head_dim) as u64;
    }
    total
}

/// Pairs of positions that see each other in a sequence of `n` tokens.
fn seen(n: usize, window: Option<usize>) -> u64 {
    let n = n as u64;
    let triangle = |n: u64| n * (n + 1) / 2;
    match window.map(|w| w as u64).filter(|&w| w < n) {
        Some(w) => triangle(w) + (n - w) * w,
        None => triangle(n),
    }
}

struct Matrix {
    name: &'static str,
    input: usize,
    output: usize,
    /// Keys and values.
    of_every_token: bool,
    /// Queries, keys and values.
    of_block_input: bool,
}

impl Matrix {
    /// Operations for a token.
    fn operations(&self, lora: Option<&LoraConfig>, input_learns: bool) -> u64 {
        let (weights, sides) = (self.input * self.output, self.input + self.output);
        let gradient = usize::from(input_learns);
        let operations = match lora {
            None => 6 * weights,
            Some(lora) => {
                let frozen = (2 + 2 * gradient) * weights;
                match lora.target_modules.iter().any(|name| name == self.name) {
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

fn matrices(config: &DecoderConfig) -> [Matrix; 7] {
    let (d, inner) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let matrix = |name, input, output| Matrix {
        name,
        input,
        output,
        of_every_token: matches!(name, "k_proj" | "v_proj"),
        of_block_input: matches!(name, "q_proj" | "k_proj" | "v_proj"),
    };
    [
        matrix("q_proj", d, q),
        matrix("k_proj", d, kv),
        matrix("v_proj", d, kv),
        matrix("o_proj", q, d),
        matrix("gate_proj", d, inner),
        matrix("up_proj", d, inner),
        matrix("down_proj", inner, d),
    ]
}
