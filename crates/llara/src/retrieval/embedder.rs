//! A bi-encoder as the encoder of a retrieval system: any number of texts, of any length.

use ndarray::{Array2, ArrayView2};

use super::{Embedder, Origin, Similarity, TextFile};
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::Batch;
use crate::storage::Fingerprint;
use crate::text::Role;
use crate::{Error, ErrorKind, Result};

/// Its vector stands in an [`Origin`] for all of what computes: device, number format, adapters.
const PROBE: &str = "A lighthouse keeper counts the ships that pass at night.";

/// Embeds texts with a model: tokenized in parallel, sorted by length, encoded in batches of a token
/// budget, and put back in their order.
///
/// A vector does not depend on the batch that its text was encoded in.
///
/// ```no_run
/// # use llara::{BiEncoderModel, BiEncoderOptions, Role};
/// use llara::retrieval::{Embedder, TextEmbedder};
///
/// let model = BiEncoderModel::from_folder("models/mine", BiEncoderOptions::default())?;
/// let vectors = TextEmbedder::new(&model).embed(Role::Query, &["When does tin melt?".into()])?;
/// # Ok::<(), llara::Error>(())
/// ```
pub struct TextEmbedder<'m, B: Backend> {
    /// What encodes.
    pub model: &'m BiEncoderModel<B>,
    /// Tokens that a query with its template is cut to.
    pub query_max_len: usize,
    /// Tokens that a passage with its template is cut to.
    pub passage_max_len: usize,
    /// Put in front of every query.
    pub query_instruction: String,
    /// Put in front of every passage.
    pub passage_instruction: String,
    /// Tokens encoded at a time; a longer text goes alone.
    pub batch_tokens: usize,
    /// Told after every batch how many texts were in it.
    pub on_batch: Option<&'m dyn Fn(usize)>,
}

impl<'m, B: Backend> TextEmbedder<'m, B> {
    /// Lengths and instructions of the model's recipe; 8,192 tokens at a time.
    pub fn new(model: &'m BiEncoderModel<B>) -> Self {
        TextEmbedder {
            model,
            query_max_len: model.recipe().query_max_len,
            passage_max_len: model.recipe().passage_max_len,
            query_instruction: model.recipe().query_instruction.clone(),
            passage_instruction: model.recipe().passage_instruction.clone(),
            batch_tokens: 8192,
            on_batch: None,
        }
    }

    /// What the vectors of a file follow from: where it is the same, so are the bytes, on one kind of
    /// machine. Reads all weights once.
    ///
    /// # Errors
    /// When the device fails, or the length leaves no room for text.
    pub fn origin(&self, role: Role, texts: &TextFile) -> Result<Origin> {
        let (instruction, max_len) = self.instruction_and_length(role);
        let prompts = self.model.prompts();
        let (template, affixes) = (prompts.template(), prompts.template().affixes(role));
        let mut tokenizer = Fingerprint::new();
        tokenizer.add(&prompts.tokenizer().contents()?);
        let mut weights = Fingerprint::new();
        for tensor in self.model.decoder().tensors() {
            weights.add(tensor.name().as_bytes());
            weights.add_numbers(&self.model.backend().download_view(tensor.values())?);
        }
        let mut probe = Fingerprint::new();
        for sequence in self.tokenize(role, &[PROBE.to_owned()])? {
            let vectors = self.model.encode(&Batch::from_sequences([sequence])?)?;
            vectors.iter().flatten().for_each(|&x| probe.add_numbers(&[x]));
        }
        Ok(Origin::new()
            .with("program", concat!("llara ", env!("CARGO_PKG_VERSION")))
            .with("role", role.to_string())
            .with("max_len", max_len)
            .with("instruction", instruction)
            .with("template", template.name.as_str())
            .with("prefix", affixes.prefix.as_str())
            .with("suffix", affixes.suffix.as_str())
            .with("pooled_tokens", template.pooled_tokens)
            .with("normalized", self.model.options().normalized)
            .with("batch_tokens", self.batch_tokens)
            .with_fingerprint("tokenizer", tokenizer)
            .with_fingerprint("weights", weights)
            .with_fingerprint("probe", probe)
            .with_fingerprint("input", texts.fingerprint()))
    }

    fn instruction_and_length(&self, role: Role) -> (&str, usize) {
        match role {
            Role::Query => (&self.query_instruction, self.query_max_len),
            Role::Passage => (&self.passage_instruction, self.passage_max_len),
        }
    }

    fn tokenize(&self, role: Role, texts: &[String]) -> Result<Vec<Vec<u32>>> {
        let (instruction, max_len) = self.instruction_and_length(role);
        let prompts = self.model.prompts();
        if instruction.is_empty() {
            return prompts.encode_all(role, texts, max_len);
        }
        let texts: Vec<String> = texts.iter().map(|text| format!("{instruction}{text}")).collect();
        prompts.encode_all(role, &texts, max_len)
    }
}

impl<B: Backend> Embedder for TextEmbedder<'_, B> {
    fn dimension(&self) -> usize {
        self.model.dimension()
    }

    fn embed(&self, role: Role, texts: &[String]) -> Result<Array2<f32>> {
        let sequences = self.tokenize(role, texts)?;
        let mut vectors = Array2::zeros((texts.len(), self.dimension()));
        for places in batches_by_length(&sequences, self.batch_tokens) {
            let batch = Batch::from_sequences(places.iter().map(|&place| &sequences[place]))?;
            let encoded = self.model.encode(&batch)?.ok_or_else(|| {
                Error::new(ErrorKind::Backend, "the model gave no vectors for a batch")
            })?;
            for (&place, vector) in places.iter().zip(encoded.rows()) {
                vectors.row_mut(place).assign(&vector);
            }
            if let Some(on_batch) = self.on_batch {
                on_batch(places.len());
            }
        }
        Ok(vectors)
    }
}

/// Inner products on the model's own device.
impl<B: Backend> Similarity for TextEmbedder<'_, B> {
    fn block(&self, queries: ArrayView2<f32>, passages: ArrayView2<f32>) -> Result<Array2<f32>> {
        let backend = self.model.backend();
        let upload = |x: ArrayView2<f32>| {
            let x = x.as_standard_layout();
            backend.upload(x.as_slice().unwrap_or_default(), x.nrows(), x.ncols())
        };
        let scores = backend.scores(&upload(queries)?, &upload(passages)?, 1.0)?;
        let shape = (queries.nrows(), passages.nrows());
        Array2::from_shape_vec(shape, backend.download(&scores)?)
            .map_err(|e| Error::new(ErrorKind::Backend, "scores of the wrong shape").because(e))
    }
}

/// Places of the sequences, the longest first (so that the largest batch shows at once whether memory
/// is enough), cut where the next one would go over the budget.
fn batches_by_length(sequences: &[Vec<u32>], budget: usize) -> Vec<Vec<usize>> {
    let mut places: Vec<usize> = (0..sequences.len()).collect();
    places.sort_by_key(|&place| std::cmp::Reverse(sequences[place].len()));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for place in places {
        let length = sequences[place].len();
        match batches.last_mut() {
            Some(batch) if tokens + length <= budget => batch.push(place),
            _ => {
                batches.push(vec![place]);
                tokens = 0;
            }
        }
        tokens += length;
    }
    batches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_sequence_is_in_one_batch_within_the_budget(
            lengths in prop::collection::vec(1usize..50, 0..60), budget in 0usize..200,
        ) {
            let sequences: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![0; n]).collect();
            let batches = batches_by_length(&sequences, budget);
            for batch in &batches {
                let tokens: usize = batch.iter().map(|&place| lengths[place]).sum();
                prop_assert!(tokens <= budget || batch.len() == 1);
            }
            let order = batches.concat();
            prop_assert!(order.is_sorted_by_key(|&p| (std::cmp::Reverse(lengths[p]), p)));
            let mut places = order;
            places.sort_unstable();
            prop_assert!(places.into_iter().eq(0..lengths.len()));
        }
    }
}
