//! The plan of a run of `llara pretrain`.

use llara::backend::Backend;
use llara::train::{Pretraining, StepTraffic};
use serde_json::json;

use super::network::NetworkArgs;
use super::planned_run::{PlannedRun, PlannedTexts};
use crate::pretrain::{self, Prepared};
use crate::processes::Processes;
use crate::talk::counted;
use crate::training::Purpose;

pub(super) fn plan<B: Backend>(
    args: &pretrain::Args,
    network: &NetworkArgs,
    backend: B,
) -> anyhow::Result<()> {
    let prepared = Prepared::new(args, Purpose::Plan, backend, &Processes::one())?;
    let forecast = pretrain::forecast(args, &prepared, network.processes())?;
    let (decoder, sample) = (&prepared.outline.decoder, &prepared.sample);
    let texts = PlannedTexts {
        name: "text",
        plural: "texts",
        template_included: false,
        max_len: sample.text_tokens,
        truncated_share: sample.truncated_share(),
        lengths: sample.lengths.clone(),
    };
    let mut notes = pretrain::length_warnings(&prepared);
    if let Some(length) = prepared.data.piece_length() {
        notes.push(format!("pieces    of at most {}", counted(length.characters(), "character")));
    }
    let network = network.plan(&forecast, |layout| {
        let (config, dimension) = (&prepared.config, decoder.hidden_size);
        StepTraffic::of_task::<B, Pretraining<B>>(config, layout, dimension, false)
    });
    let batch = prepared.config.batch_size.min(prepared.data.dataset().len());
    PlannedRun {
        verb: "pretrain",
        model: (&prepared.model_name, decoder),
        texts: &[texts],
        notes,
        batch: counted(batch, "text"),
        batch_sizes: json!({ "texts": batch }),
        forecast: &forecast,
        network,
    }
    .print()
}
