//! A few texts with their vectors, kept in the model folder so that any loader can check itself.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BiEncoderModel;
use crate::backend::{Backend, Dtype};
use crate::data::Batch;
use crate::storage::Staging;
use crate::text::Role;
use crate::{Error, ErrorKind, Result};

const PROBES_FILE: &str = "llara_probes.json";

/// Largest difference of an entry, relative to the vector's largest, that the same weights may show.
const SAME_WEIGHTS: f32 = 1e-5;
/// The same after weights or activations were rounded to 16 bits; a wrong tensor or template differs by far more.
const ROUNDED_WEIGHTS: f32 = 0.1;

const TEXTS: [(Role, &str); 3] = [
    (Role::Query, "Which metal is liquid at room temperature?"),
    (Role::Passage, "Mercury is the only metal that is liquid at room temperature."),
    (Role::Passage, "The otter sleeps on its back and holds on to its neighbour's paw."),
];

/// Token ids of some texts and the vectors that the model gave them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Probes {
    /// What they were computed in.
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
    pub fn take<B: Backend>(model: &BiEncoderModel<B>) -> Result<Self> {
        let probes = TEXTS.into_iter().map(|(role, text)| {
            let input_ids = model.prompts().encode(role, text, model.recipe().max_len(role))?;
            let embedding = embed(model, &input_ids)?;
            if let Some(x) = embedding.iter().find(|x| !x.is_finite()) {
                return Err(Error::new(ErrorKind::Numeric, "the model's vectors are not finite")
                    .expected("finite numbers")
                    .got(format!("{x} for the {role} {text:?}"))
                    .hint(
                        "training has diverged: lower the learning rate or lengthen the warm-up",
                    ));
            }
            Ok(Probe { role, text: text.to_owned(), input_ids, embedding })
        });
        let probes: Vec<Probe> = probes.collect::<Result<_>>()?;
        refuse_constant(&probes)?;
        Ok(Probes { precision: model.precision(), probes })
    }

    /// The probes of a model folder, if it has them.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(PROBES_FILE);
        let text = match crate::storage::read_file(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(|e| Error::io("read the probes", &path, e))?,
        };
        let probes = serde_json::from_slice(&text).map_err(|e| {
            Error::new(ErrorKind::Config, "not a list of probes").file(&path).because(e)
        })?;
        Ok(Some(probes))
    }

    /// Writes them into a folder that is being saved.
    pub(super) fn write(&self, staging: &Staging) -> Result<()> {
        let text = serde_json::to_vec(self)
            .map_err(|e| Error::new(ErrorKind::Config, "cannot write probes").because(e))?;
        staging.write(PROBES_FILE, &text)
    }

    /// Encodes the same texts with `model` and compares, to 1e-5 of a vector's largest entry; to 0.1
    /// where one was computed in bf16 and the other not.
    ///
    /// # Errors
    /// When a text is tokenized differently or a vector differs.
    pub fn check<B: Backend>(&self, model: &BiEncoderModel<B>) -> Result<()> {
        let same = self.precision == model.precision();
        self.compare(model, if same { SAME_WEIGHTS } else { ROUNDED_WEIGHTS })
    }

    /// The same for weights that were rounded to 16 bits between the two.
    pub(super) fn check_rounded<B: Backend>(&self, model: &BiEncoderModel<B>) -> Result<()> {
        self.compare(model, ROUNDED_WEIGHTS)
    }

    fn compare<B: Backend>(&self, model: &BiEncoderModel<B>, tolerance: f32) -> Result<()> {
        let differs = |probe: &Probe, what: &str| {
            Error::new(ErrorKind::Weights, format!("the model does not answer as it did: {what}"))
                .got(format!("{} {:?}", probe.role, probe.text))
                .hint("weights, tokenizer or llara.json were changed since this folder was saved")
        };
        for probe in &self.probes {
            let max_len = model.recipe().max_len(probe.role);
            if model.prompts().encode(probe.role, &probe.text, max_len)? != probe.input_ids {
                return Err(differs(probe, "a probe text has other token ids"));
            }
            let now = embed(model, &probe.input_ids)?;
            let largest = probe.embedding.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            let differences = now.iter().zip(&probe.embedding).map(|(a, b)| (a - b).abs());
            // Unlike f32::max, this keeps a NaN.
            let worst = differences.fold(0.0f32, |m, d| if d <= m { m } else { d });
            let difference = worst / largest.max(f32::MIN_POSITIVE);
            let same = difference <= tolerance; // false of NaN
            if now.len() != probe.embedding.len() || !same {
                let what =
                    format!("a probe vector differs by {difference:.1e} of its largest entry");
                return Err(differs(probe, &what).expected(format!("at most {tolerance:.0e}")));
            }
        }
        Ok(())
    }
}

/// Refuses embeddings that are zero, or the same for different token ids: such a model was not trained.
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
