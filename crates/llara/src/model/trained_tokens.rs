//! Trained embeddings of single tokens beside a frozen embedding table: each takes the place of the table's row,
//! or is that of a token for which the table has no row. PEFT calls them trainable tokens.
//!
//! The rows are not written to the table: it may be bf16, and the trained values stay f32.

use super::parameter::{Parameter, Values};
use crate::backend::{Backend, Dtype, ScatterPlan, ScatterRows, Shape};
use crate::{Error, ErrorKind, Result};

/// Name of the embeddings within the bare decoder, as in PEFT's files.
pub(crate) const TRAINED_TOKENS: &str = "embed_tokens.token_adapter.trainable_tokens_delta";

/// Tokens with embeddings of their own.
pub(crate) struct TrainedTokens<B: Backend> {
    /// Token ids, ascending.
    ids: Vec<u32>,
    /// Their embeddings, f32. `[ids, d]`
    pub(crate) rows: Parameter<B>,
}

/// The tokens of a batch by the source of their embeddings, on the device.
pub(crate) struct TokenLookup<B: Backend> {
    /// Tokens with a row of the table; `None` if there are none.
    from_table: Option<Placed<B>>,
    /// Tokens with a trained embedding.
    trained: Placed<B>,
    /// Positions of the latter in the batch.
    positions: B::Index,
    /// Adds their gradients to those of the trained rows.
    gradient: ScatterPlan<B>,
    /// Tokens of the batch, T.
    tokens: usize,
}

/// Rows of a matrix, and the rows of the batch that they become.
struct Placed<B: Backend> {
    rows: B::Index,
    places: ScatterPlan<B>,
}

impl<B: Backend> Placed<B> {
    fn upload(backend: &B, rows: &[u32], positions: &[u32]) -> Result<Self> {
        let places = ScatterRows::new(positions);
        let [rows, sources, targets, starts] =
            backend.upload_indices([rows, &places.sources, &places.targets, &places.starts])?;
        Ok(Placed { rows, places: ScatterPlan::new(&places, [sources, targets, starts]) })
    }
}

impl<B: Backend> TokenLookup<B> {
    /// The lookup of a batch with these token ids; `None` if no token is among `trained`, which is ascending.
    pub(crate) fn new(backend: &B, ids: &[u32], trained: &[u32]) -> Result<Option<Self>> {
        let (mut table_rows, mut table_positions) = (Vec::new(), Vec::new());
        let (mut rows, mut positions) = (Vec::new(), Vec::new());
        for (position, id) in (0..).zip(ids) {
            match trained.binary_search(id) {
                Ok(row) => {
                    rows.push(row as u32);
                    positions.push(position);
                }
                Err(_) => {
                    table_rows.push(*id);
                    table_positions.push(position);
                }
            }
        }
        if rows.is_empty() {
            return Ok(None);
        }
        let from_table = match table_rows.is_empty() {
            true => None,
            false => Some(Placed::upload(backend, &table_rows, &table_positions)?),
        };
        let gradient = ScatterRows::new(&rows);
        let [on_device] = backend.upload_indices([&positions])?;
        Ok(Some(TokenLookup {
            from_table,
            trained: Placed::upload(backend, &rows, &positions)?,
            positions: on_device,
            gradient: ScatterPlan::upload(&gradient, backend)?,
            tokens: ids.len(),
        }))
    }
}

impl<B: Backend> TrainedTokens<B> {
    /// The embeddings of `ids`, which are ascending, beside a table of shape `[table_rows, d]`. `values` returns
    /// them for the name [`TRAINED_TOKENS`].
    ///
    /// # Errors
    /// If an id below the largest one has neither a trained embedding nor a row of the table.
    pub(crate) fn new(
        backend: &B,
        ids: &[u32],
        (table_rows, d): (usize, usize),
        values: &mut Values<'_>,
    ) -> Result<Self> {
        check_gaps(ids, table_rows)?;
        let rows = Parameter::table(backend, TRAINED_TOKENS.to_owned(), [ids.len(), d], values)?;
        Ok(TrainedTokens { ids: ids.to_vec(), rows })
    }

    /// The token ids, ascending.
    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The embeddings of the tokens of a batch `[T, d]`, f32: those of the table, and the trained ones in their
    /// places. Each row is added to zeros once, so the result has the bits of its source.
    pub(crate) fn embed(
        &self,
        backend: &B,
        table: &B::Tensor,
        lookup: &TokenLookup<B>,
    ) -> Result<B::Tensor> {
        let mut x = backend.zeros(lookup.tokens, table.cols(), Dtype::F32)?;
        let sources = lookup.from_table.iter().map(|placed| (table, placed));
        for (matrix, Placed { rows, places }) in
            sources.chain(std::iter::once((self.rows.values(), &lookup.trained)))
        {
            let mut found = backend.gather_rows(matrix, rows)?;
            if found.dtype() != Dtype::F32 {
                found = backend.cast(&found, Dtype::F32)?;
            }
            backend.scatter_add_rows(&found, places, &mut x)?;
        }
        Ok(x)
    }

    /// Accumulates the gradient of the trained rows from that of the embeddings `[T, d]`. It is zero for a batch
    /// without such tokens, whose `lookup` is `None`.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        dx: &B::Tensor,
        lookup: Option<&TokenLookup<B>>,
    ) -> Result<()> {
        let (_, Some(drows)) = self.rows.values_and_grad(backend)? else { return Ok(()) };
        let Some(lookup) = lookup else { return Ok(()) };
        let dy = backend.gather_rows(dx, &lookup.positions)?;
        backend.scatter_add_rows(&dy, &lookup.gradient, drows)
    }

    /// `table`, row-major, with the trained embeddings in their places and behind its last row.
    pub(crate) fn merged_into(&self, backend: &B, mut table: Vec<f32>) -> Result<Vec<f32>> {
        let rows = backend.download(self.rows.values())?;
        place_rows(&mut table, &self.ids, &rows);
        Ok(table)
    }
}

/// Checks that `ids`, ascending, and the rows of a table leave no token without an embedding.
///
/// # Errors
/// The first id that has none, below the largest one.
pub(crate) fn check_gaps(ids: &[u32], table_rows: usize) -> Result<()> {
    let beyond = ids.iter().filter(|&&id| id as usize >= table_rows);
    let gap = beyond.zip(table_rows..).find(|(id, expected)| **id as usize != *expected);
    let Some((id, expected)) = gap else { return Ok(()) };
    Err(Error::new(ErrorKind::Weights, "a token has no embedding")
        .expected(format!("an embedding for every id from {table_rows} on"))
        .got(format!("none for {expected}, but one for {id}"))
        .hint("use the base model that the adapter was trained on"))
}

/// Overwrites the rows `ids` of `table` by `rows`, and appends those behind its last row. Both have the same
/// number of columns, and `ids` is ascending.
pub(crate) fn place_rows(table: &mut Vec<f32>, ids: &[u32], rows: &[f32]) {
    let cols = rows.len() / ids.len().max(1);
    for (&id, row) in ids.iter().zip(rows.chunks_exact(cols.max(1))) {
        let start = id as usize * cols;
        if table.len() < start + cols {
            table.resize(start + cols, 0.0);
        }
        table[start..start + cols].copy_from_slice(row);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backend::Cpu;
    use crate::data::Batch;
    use crate::model::weights::random_decoder;
    use crate::model::{Decoder, DecoderConfig, Input, LoraConfig};

    /// The table of 384 rows has a row for the first one only.
    const IDS: [u32; 3] = [7, 384, 385];

    fn decoder(backend: &Cpu) -> Decoder<Cpu> {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama-gqa");
        let config = DecoderConfig::from_file(&fixture.join("config.json")).unwrap();
        let mut decoder = random_decoder(backend, &config, 0.3, 5).unwrap();
        let lora = LoraConfig { rank: 2, trained_tokens: IDS.to_vec(), ..LoraConfig::default() };
        decoder.attach_new_adapters(backend, &lora, 1).unwrap();
        decoder
    }

    fn input(backend: &Cpu, decoder: &Decoder<Cpu>) -> Input<Cpu> {
        let batch =
            Batch::from_sequences([&[3u32, 384, 9, 385, 384][..], &[7, 7, 385], &[1, 2]]).unwrap();
        decoder.input(backend, batch.view(), [2; 3], &[0, 1, 2]).unwrap()
    }

    /// A fixed weight of each element of the output, of both signs.
    fn weights(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37 + 0.2).sin()).collect()
    }

    fn loss(backend: &Cpu, decoder: &Decoder<Cpu>, input: &Input<Cpu>) -> f64 {
        let hidden = decoder.forward(backend, input, None).unwrap();
        let hidden = backend.download(&hidden).unwrap();
        let weights = weights(hidden.len());
        hidden.iter().zip(weights).map(|(x, w)| f64::from(*x) * f64::from(w)).sum()
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let backend = Cpu::new();
        let mut decoder = decoder(&backend);
        let input = input(&backend, &decoder);
        let (hidden, saved) = decoder.forward_saving(&backend, &input, None).unwrap();
        let (rows, d) = hidden.shape();
        let dhidden = backend.upload(&weights(rows * d), rows, d).unwrap();
        decoder.backward(&backend, &input, &dhidden, saved, &mut ()).unwrap();
        let tokens = decoder.trained_tokens().unwrap();
        let values = backend.download(tokens.rows.values()).unwrap();
        let grad = backend.download(tokens.rows.grad().unwrap()).unwrap();
        for (at, id) in IDS.iter().enumerate() {
            let row = at * d..(at + 1) * d;
            let norm = grad[row.clone()].iter().map(|g| g * g).sum::<f32>().sqrt();
            assert!(norm > 0.1, "{id}: {norm}");
            // Along the gradient, the loss grows with its norm.
            let mut moved = |step: f32| {
                let mut values = values.clone();
                for i in row.clone() {
                    values[i] += step * grad[i] / norm;
                }
                let matrix = backend.upload(&values, IDS.len(), d).unwrap();
                let rows = decoder.parameters_mut().find(|p| p.name() == TRAINED_TOKENS).unwrap();
                rows.set_values(&backend, matrix).unwrap();
                loss(&backend, &decoder, &input)
            };
            let step = 2e-3;
            let slope = (moved(step) - moved(-step)) / f64::from(2.0 * step);
            let error = (slope / f64::from(norm) - 1.0).abs();
            assert!(error < 5e-3, "{id}: {slope} instead of {norm}");
        }
    }

    #[test]
    fn looked_up_rows_have_the_bits_of_their_source() {
        let backend = Cpu::new();
        let mut decoder = decoder(&backend);
        let input = input(&backend, &decoder);
        let expected = |decoder: &Decoder<Cpu>| {
            let table = backend.download(decoder.embeddings().values()).unwrap();
            let tokens = decoder.trained_tokens().unwrap();
            let d = decoder.config().hidden_size;
            let merged = tokens.merged_into(&backend, table).unwrap();
            let ids = [3, 384, 9, 385, 384, 7, 7, 385, 1, 2];
            ids.iter().flat_map(|id| merged[id * d..][..d].to_vec()).collect::<Vec<f32>>()
        };
        let found = backend.download(&decoder.embed(&backend, &input).unwrap()).unwrap();
        assert_eq!(found, expected(&decoder));
        // The table is rounded, the trained rows are not.
        decoder.set_activations(&backend, Dtype::Bf16, true).unwrap();
        assert_eq!(decoder.embeddings().values().dtype(), Dtype::Bf16);
        assert_eq!(decoder.trained_tokens().unwrap().rows.values().dtype(), Dtype::F32);
        let rounded = backend.download(&decoder.embed(&backend, &input).unwrap()).unwrap();
        assert_eq!(rounded, expected(&decoder));
        let d = decoder.config().hidden_size;
        assert!(rounded[..d] != found[..d] && rounded[d..2 * d] == found[d..2 * d]);
    }

    #[test]
    fn a_gap_between_the_table_and_the_tokens_is_named() {
        check_gaps(&[2, 5, 6], 5).unwrap();
        check_gaps(&[2, 3], 5).unwrap();
        check_gaps(&[], 5).unwrap();
        for ids in [&[6u32][..], &[5, 7], &[1, 6]] {
            let message = check_gaps(ids, 5).unwrap_err().to_string();
            assert!(message.contains("a token has no embedding"), "{message}");
        }
    }
}
