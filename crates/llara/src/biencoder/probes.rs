//! Probes: a few texts with their embeddings, saved in the model folder to verify it when it is loaded.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{BiEncoderModel, Recipe};
use crate::backend::{Backend, Dtype};
use crate::data::Batch;
use crate::model::{DecoderConfig, Input, Values, embed_streamed};
use crate::storage::Staging;
use crate::text::{PromptEncoder, Role};
use crate::{Error, ErrorKind, Result};

pub(crate) const PROBES_FILE: &str = "llara_probes.json";

/// Tolerance for the same weights: largest difference of an element, relative to the largest element of the
/// embedding.
pub(crate) const SAME_WEIGHTS: f32 = 1e-5;
/// Tolerance if one of the embeddings was computed with bf16 activations and the other was not.
const ROUNDED_ACTIVATIONS: f32 = 0.1;

const TEXTS: [(Role, &str); 3] = [
    (Role::Query, "Which metal is liquid at room temperature?"),
    (Role::Passage, "Mercury is the only metal that is liquid at room temperature."),
    (Role::Passage, "The otter sleeps on its back and holds on to its neighbour's paw."),
];

/// Token ids of some texts and the embeddings that the model computed for them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Probes {
    /// The dtype of the activations.
    #[serde(default, skip_serializing_if = "is_f32")]
    precision: Dtype,
    probes: Vec<Probe>,
}

fn is_f32(precision: &Dtype) -> bool {
    *precision == Dtype::F32
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Probe {
    role: Role,
    text: String,
    input_ids: Vec<u32>,
    embedding: Vec<f32>,
}

impl Probes {
    /// Encodes the probe texts with `model`.
    ///
    /// # Errors
    /// If an embedding is zero or not finite, or different texts have the same embedding.
    pub fn take<B: Backend>(model: &BiEncoderModel<B>) -> Result<Self> {
        let mut probes = tokenized(model)?;
        for probe in &mut probes {
            probe.embedding = embed(model, &probe.input_ids)?;
        }
        Self::checked(model.precision(), probes)
    }

    /// The same for `model` with other weights, in f32: `values` returns each weight by name and shape in files.
    /// Only the weights of one layer are in memory at a time.
    pub(super) fn take_streamed<B: Backend>(
        model: &BiEncoderModel<B>,
        values: &mut Values<'_>,
    ) -> Result<Self> {
        let mut probes = tokenized(model)?;
        let batch = Batch::from_sequences(probes.iter().map(|probe| &probe.input_ids))?;
        let embeddings = model.embed_with(&batch, values)?;
        for (probe, embedding) in probes.iter_mut().zip(embeddings.chunks_exact(model.dimension()))
        {
            probe.embedding = embedding.to_vec();
        }
        Self::checked(Dtype::F32, probes)
    }

    /// Probes whose embeddings are finite, not zero, and not the same for different texts.
    fn checked(precision: Dtype, probes: Vec<Probe>) -> Result<Self> {
        for Probe { role, text, embedding, .. } in &probes {
            if let Some(x) = embedding.iter().find(|x| !x.is_finite()) {
                return Err(Error::new(
                    ErrorKind::Numeric,
                    "the model's embeddings are not finite: training has diverged",
                )
                .expected("finite numbers")
                .got(format!("{x} for the {role} {text:?}"))
                .hint("lower the learning rate or lengthen the warm-up"));
            }
        }
        refuse_constant(&probes)?;
        Ok(Probes { precision, probes })
    }

    /// The probes of a model folder, if it has them.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(PROBES_FILE);
        let text = match crate::storage::read_file(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|e| Error::io("read the probes", &path, e))?,
        };
        let probes = serde_json::from_slice(&text).map_err(|e| {
            Error::new(ErrorKind::Config, "the file is not a list of probes").file(&path).because(e)
        })?;
        Ok(Some(probes))
    }

    /// Writes the probes to a folder that is being saved.
    pub(super) fn write(&self, staging: &Staging) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|e| Error::new(ErrorKind::Config, "cannot write probes").because(e))?;
        staging.write(PROBES_FILE, &text)
    }

    /// Encodes the same texts with `model` and compares the embeddings. The tolerance is 1e-5 of the largest
    /// element of an embedding; 0.1 if one was computed in bf16 and the other was not.
    ///
    /// # Errors
    /// If a text is tokenized differently or an embedding differs.
    pub fn check<B: Backend>(&self, model: &BiEncoderModel<B>) -> Result<()> {
        self.check_tokens(model.prompts(), model.recipe())?;
        self.check_embeddings(model)
    }

    /// Recomputes the embeddings from the saved token ids, for a model whose maximum lengths may be others.
    ///
    /// # Errors
    /// An embedding differs, or cannot be computed.
    pub fn check_embeddings<B: Backend>(&self, model: &BiEncoderModel<B>) -> Result<()> {
        let same = self.precision == model.precision();
        let tolerance = if same { SAME_WEIGHTS } else { ROUNDED_ACTIVATIONS };
        self.probes
            .iter()
            .try_for_each(|probe| probe.compare(&embed(model, &probe.input_ids)?, tolerance))
    }

    /// Compares with probes of the same texts; the tolerance is 1e-5 of the largest element of an embedding.
    pub(super) fn compare_with(&self, other: &Probes) -> Result<()> {
        let same_texts = self.probes.len() == other.probes.len();
        for (probe, other) in self.probes.iter().zip(&other.probes) {
            if !same_texts || probe.input_ids != other.input_ids {
                return Err(probe.differs("the token ids of a probe text differ"));
            }
            probe.compare(&other.embedding, SAME_WEIGHTS)?;
        }
        Ok(())
    }

    /// Whether `prompts` gives the same token ids.
    pub(super) fn check_tokens(&self, prompts: &PromptEncoder, recipe: &Recipe) -> Result<()> {
        for probe in &self.probes {
            let max_len = recipe.max_len(probe.role);
            if prompts.encode(probe.role, &probe.text, max_len)? != probe.input_ids {
                return Err(probe.differs("the token ids of a probe text differ"));
            }
        }
        Ok(())
    }

    /// [`check`](Self::check) of the model whose weights `values` gives by name and shape in files. No more
    /// than the weights of one layer are in memory at a time. `tolerance` is relative to a vector's largest
    /// entry; probes that were computed in bf16 are compared to 0.1.
    ///
    /// # Errors
    /// A text is tokenized differently, a vector differs, or a weight cannot be read.
    pub(crate) fn check_streamed<B: Backend>(
        &self,
        backend: &B,
        config: &DecoderConfig,
        (prompts, recipe): (&PromptEncoder, &Recipe),
        (values, tolerance): (&mut Values<'_>, f32),
    ) -> Result<()> {
        if self.probes.is_empty() {
            return Err(Error::new(ErrorKind::Config, "the file has no probes"));
        }
        self.check_tokens(prompts, recipe)?;
        let batch = Batch::from_sequences(self.probes.iter().map(|probe| &probe.input_ids))?;
        let sequences = vec![0; batch.len()];
        let pooled_tokens = recipe.template.pooled_tokens;
        let counts = sequences.iter().map(|_| pooled_tokens);
        let input = Input::new(backend, batch.view(), counts, &sequences, &[])?;
        let mut embeddings = embed_streamed(backend, config, values, &input)?;
        if recipe.normalized {
            embeddings = backend.normalize(&embeddings)?.0;
        }
        let embeddings = backend.download(&embeddings)?;
        let tolerance = if self.precision == Dtype::F32 { tolerance } else { ROUNDED_ACTIVATIONS };
        let rows = embeddings.chunks_exact(config.hidden_size);
        self.probes.iter().zip(rows).try_for_each(|(probe, now)| probe.compare(now, tolerance))
    }

    /// Number of texts.
    pub(crate) fn len(&self) -> usize {
        self.probes.len()
    }
}

impl Probe {
    fn differs(&self, what: &str) -> Error {
        Error::new(ErrorKind::Weights, format!("the model does not answer as it did: {what}"))
            .got(format!("{} {:?}", self.role, self.text))
            .hint("weights, tokenizer or llara.json were changed since this folder was saved")
    }

    fn compare(&self, now: &[f32], tolerance: f32) -> Result<()> {
        let largest = self.embedding.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let differences = now.iter().zip(&self.embedding).map(|(a, b)| (a - b).abs());
        // Unlike f32::max, this keeps a NaN.
        let worst = differences.fold(0.0f32, |m, d| if d <= m { m } else { d });
        let difference = worst / largest.max(f32::MIN_POSITIVE);
        let same = difference <= tolerance; // false for NaN
        if now.len() == self.embedding.len() && same {
            return Ok(());
        }
        let what = format!("a probe embedding differs by {difference:.1e} of its largest element");
        Err(self.differs(&what).expected(format!("at most {tolerance:.0e}")))
    }
}

/// The probe texts and their token ids; embeddings are still empty.
fn tokenized<B: Backend>(model: &BiEncoderModel<B>) -> Result<Vec<Probe>> {
    let probes = TEXTS.into_iter().map(|(role, text)| {
        let input_ids = model.prompts().encode(role, text, model.recipe().max_len(role))?;
        Ok(Probe { role, text: text.to_owned(), input_ids, embedding: Vec::new() })
    });
    probes.collect()
}

/// Rejects embeddings that are zero, or the same for different token ids: such a model is not usable.
fn refuse_constant(probes: &[Probe]) -> Result<()> {
    const HINT: &str = "the weights are zero or damaged: start again from an intact model";
    let error = |what: &str, probe: &Probe| {
        Error::new(ErrorKind::Numeric, what)
            .got(format!("the {} {:?}", probe.role, probe.text))
            .hint(HINT)
    };
    for (i, probe) in probes.iter().enumerate() {
        if probe.embedding.iter().all(|&x| x == 0.0) {
            return Err(error("the model's embedding of a text is zero", probe));
        }
        let same = |other: &Probe| {
            other.embedding == probe.embedding && other.input_ids != probe.input_ids
        };
        if probes[..i].iter().any(same) {
            return Err(error("the model gives different texts the same embedding", probe));
        }
    }
    Ok(())
}

fn embed<B: Backend>(model: &BiEncoderModel<B>, ids: &[u32]) -> Result<Vec<f32>> {
    let batch = Batch::from_sequences([ids])?;
    model.backend().download(&model.encode_batch(&batch)?)
}
