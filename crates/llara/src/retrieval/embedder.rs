//! Embedding any number of texts with a bi-encoder.

use ndarray::{Array2, ArrayView2};

use super::{Embedder, Origin, Similarity, TextFile};
use crate::backend::Backend;
use crate::biencoder::BiEncoderModel;
use crate::data::{Batch, Instructions};
use crate::storage::Fingerprint;
use crate::text::Role;
use crate::{Error, ErrorKind, Result};

/// A text whose embedding is part of an [`Origin`], because it depends on the device, the dtype and the adapter.
const PROBE: &str = "A lighthouse keeper counts the ships that pass at night.";

/// Embeds texts with a model: tokenizes them in parallel, sorts them by length, encodes them in batches with
/// a limited number of tokens, and restores their order.
///
/// An embedding does not depend on the batch in which its text was encoded.
///
/// ```no_run
/// # use llara::{BiEncoderModel, BiEncoderOptions, Role};
/// use llara::retrieval::{Embedder, TextEmbedder};
///
/// let model = BiEncoderModel::from_folder("models/mine", BiEncoderOptions::default())?;
/// let embeddings = TextEmbedder::new(&model).embed(Role::Query, &["When does tin melt?".into()])?;
/// # Ok::<(), llara::Error>(())
/// ```
pub struct TextEmbedder<'m, B: Backend> {
    /// The model.
    pub model: &'m BiEncoderModel<B>,
    /// Maximum length of a query in tokens, template included.
    pub query_max_len: usize,
    /// Maximum length of a passage in tokens, template included.
    pub passage_max_len: usize,
    /// Prepended to every query.
    pub query_instruction: String,
    /// Prepended to every passage.
    pub passage_instruction: String,
    /// Maximum number of tokens in a batch. A longer text is a separate batch.
    pub batch_tokens: usize,
    /// Called after every batch with the number of its texts. An error ends the embedding.
    pub on_batch: Option<&'m dyn Fn(usize) -> Result<()>>,
}

impl<'m, B: Backend> TextEmbedder<'m, B> {
    /// Uses the lengths and instructions of the model's recipe, and batches of 8,192 tokens.
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

    /// Uses these instructions.
    pub fn use_instructions(&mut self, instructions: Instructions) {
        self.query_instruction = instructions.query;
        self.passage_instruction = instructions.passage;
    }

    /// The inputs that determine the embeddings of `texts`. Files with the same origin have the same bytes on
    /// the same kind of machine. Reads all weights once.
    ///
    /// # Errors
    /// The device fails, or the maximum length leaves no token for the text.
    pub fn origin(&self, role: Role, texts: &TextFile) -> Result<Origin> {
        Ok(self.model_origin(role)?.with_fingerprint("input", texts.fingerprint()))
    }

    /// The inputs that determine the embeddings of any texts: model, kernels and settings. Reads all weights once.
    ///
    /// # Errors
    /// As for [`origin`](TextEmbedder::origin).
    pub fn model_origin(&self, role: Role) -> Result<Origin> {
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
            let embeddings = self.model.encode(&Batch::from_sequences([sequence])?)?;
            embeddings.iter().flatten().for_each(|&x| probe.add_numbers(&[x]));
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
            .with_fingerprint("tokenizer", &tokenizer)
            .with_fingerprint("weights", &weights)
            .with_fingerprint("probe", &probe))
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
        let mut embeddings = Array2::zeros((texts.len(), self.dimension()));
        for indices in batches_by_length(&sequences, self.batch_tokens) {
            let batch = Batch::from_sequences(indices.iter().map(|&index| &sequences[index]))?;
            let encoded = self.model.encode(&batch)?.ok_or_else(|| {
                Error::new(ErrorKind::Backend, "the model returned no embeddings for a batch")
            })?;
            for (&index, embedding) in indices.iter().zip(encoded.rows()) {
                embeddings.row_mut(index).assign(&embedding);
            }
            if let Some(on_batch) = self.on_batch {
                on_batch(indices.len())?;
            }
        }
        Ok(embeddings)
    }
}

/// Inner products on the model's device.
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

/// Divides the indices of the sequences, sorted by decreasing length, into batches of at most `budget`
/// tokens. The longest are first, so that a lack of memory is found at the start.
fn batches_by_length(sequences: &[Vec<u32>], budget: usize) -> Vec<Vec<usize>> {
    let mut indices: Vec<usize> = (0..sequences.len()).collect();
    indices.sort_by_key(|&index| std::cmp::Reverse(sequences[index].len()));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    let mut tokens = 0;
    for index in indices {
        let length = sequences[index].len();
        match batches.last_mut() {
            Some(batch) if tokens + length <= budget => batch.push(index),
            _ => {
                batches.push(vec![index]);
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
                let tokens: usize = batch.iter().map(|&index| lengths[index]).sum();
                prop_assert!(tokens <= budget || batch.len() == 1);
            }
            let order = batches.concat();
            prop_assert!(order.is_sorted_by_key(|&p| (std::cmp::Reverse(lengths[p]), p)));
            let mut indices = order;
            indices.sort_unstable();
            prop_assert!(indices.into_iter().eq(0..lengths.len()));
        }
    }
}
