//! The probes: texts whose embeddings were saved with the model are encoded again, layer by layer.

use std::path::Path;

use super::adapter::AdapterFiles;
use super::config::Config;
use super::report::{Finding, Findings, Status};
use crate::Result;
use crate::backend::{Backend, Dtype, Shape, WeightUse};
use crate::biencoder::{PROBES_FILE, Probes, Recipe, SAME_WEIGHTS};
use crate::model::ParameterValues;
use crate::model::weights::{WeightFiles, prefix_of};
use crate::text::PromptEncoder;

const CHECK: &str = "probes";
/// Largest difference with an adapter: here it is added to the weights, in training it was applied beside
/// them.
const WITH_ADAPTER: f32 = 1e-4;

/// What the probes are encoded with.
pub(super) struct Encoder<'e> {
    pub(super) config: &'e Config,
    pub(super) weights: &'e WeightFiles,
    pub(super) adapter: Option<&'e AdapterFiles>,
    pub(super) prompts: &'e PromptEncoder,
    pub(super) recipe: &'e Recipe,
}

/// Compares the probes of `dir` with those that `encoder` gives. `encoder` is `None` where a part is
/// missing or damaged.
pub(super) fn check_probes<B: Backend>(
    backend: &B,
    dir: &Path,
    encoder: Option<&Encoder<'_>>,
    (expects_probes, findings): (bool, &mut Findings<'_>),
    on_bytes: &dyn Fn(u64),
) {
    let probes = match Probes::read(dir) {
        Ok(Some(probes)) => probes,
        Ok(None) => {
            if expects_probes {
                let what = "there are no probes to compare the embeddings with".to_owned();
                findings.push(Finding::new(Status::Warning, CHECK, PROBES_FILE, what));
            }
            return;
        }
        Err(error) => return findings.fail(CHECK, &error),
    };
    let Some(encoder) = encoder else {
        let what = "the probes were not compared, because other parts are missing or have errors";
        findings.push(Finding::new(Status::Warning, CHECK, PROBES_FILE, what.to_owned()));
        return;
    };
    let tolerance = if encoder.adapter.is_some() { WITH_ADAPTER } else { SAME_WEIGHTS };
    let prefix = prefix_of(encoder.weights);
    let values = &mut |name: &str, shape: &[usize]| {
        let values = encoder.weights.read_f32(&format!("{prefix}{name}"))?;
        on_bytes(4 * values.len() as u64);
        let values = match encoder.adapter {
            Some(adapter) if name == "embed_tokens.weight" => {
                adapter.with_tokens(values, encoder.config.decoder.hidden_size)?
            }
            Some(adapter) => with_adapter(backend, adapter, (name, shape), values)?,
            None => values,
        };
        Ok(ParameterValues::F32(values))
    };
    let inputs = (encoder.prompts, encoder.recipe);
    let checked =
        probes.check_streamed(backend, &encoder.config.decoder, inputs, (values, tolerance));
    match checked {
        Ok(()) => {
            let what =
                format!("the embeddings of {} texts are those that were saved", probes.len());
            findings.ok(CHECK, PROBES_FILE, what);
        }
        Err(error) => findings.fail(CHECK, &error.file(dir.join(PROBES_FILE))),
    }
}

/// `W + scale · B · A`, if the adapter has matrices for this weight.
fn with_adapter<B: Backend>(
    backend: &B,
    adapter: &AdapterFiles,
    (name, shape): (&str, &[usize]),
    weight: Vec<f32>,
) -> Result<Vec<f32>> {
    let (Some((a, b)), [rows, cols]) = (adapter.matrices(name)?, shape) else { return Ok(weight) };
    let rank = adapter.config.lora.rank;
    let weight = backend.upload(&weight, *rows, *cols)?;
    let a = backend.upload(&a, rank, *cols)?;
    let a = backend.prepare(a, WeightUse::Trainable(Dtype::F32))?;
    let b = backend.upload(&b, *rows, rank)?;
    let scale = adapter.config.lora.scale();
    let sum = backend.linear_input_grad(b.view(), a.view(), scale, Some(weight))?;
    backend.download(&sum)
}
