//! The plan of a run of `llara finetune`.

use llara::Role;
use llara::backend::Backend;
use llara::train::{Finetuning, StepTraffic};
use serde_json::json;

use super::network::NetworkArgs;
use super::planned_run::{PlannedRun, PlannedTexts};
use crate::finetune::{self, Prepared};
use crate::processes::Processes;
use crate::talk::{count, counted};
use crate::training::Purpose;

/// Number of texts whose lengths are measured.
const TEXTS: usize = 10_000;

pub(super) fn plan<B: Backend>(
    args: &finetune::Args,
    network: &NetworkArgs,
    backend: B,
) -> anyhow::Result<()> {
    let prepared = Prepared::new(args, Purpose::Plan, backend, &Processes::one())?;
    let forecast = finetune::forecast(args, &prepared, network.processes())?;
    let decoder = &prepared.outline.decoder;
    let lengths = prepared.lengths(TEXTS)?;
    let warnings = finetune::length_warnings(&lengths, &prepared.outline.prompts)?;
    let texts = lengths.map(|texts| {
        let (name, plural) = match texts.role {
            Role::Query => ("query", "queries"),
            Role::Passage => ("passage", "passages"),
        };
        PlannedTexts {
            name,
            plural,
            template_included: true,
            max_len: texts.max_len,
            truncated_share: texts.truncated_share(),
            lengths: texts.lengths,
        }
    });
    let negatives_cross_device = args.has_cross_device_negatives();
    let network = network.plan(&forecast, |layout| {
        let (config, dimension) = (&prepared.config, decoder.hidden_size);
        StepTraffic::of_task::<B, Finetuning<B>>(config, layout, dimension, negatives_cross_device)
    });
    let batch = &forecast.batch;
    let queries = match batch.query.len() {
        1 => "1 query".to_owned(),
        queries => count(queries) + " queries",
    };
    PlannedRun {
        verb: "finetune",
        model: (&prepared.model_name, decoder),
        texts: &texts,
        notes: warnings,
        batch: format!("{queries} and {}", counted(batch.passage.len(), "passage")),
        batch_sizes: json!({ "queries": batch.query.len(), "passages": batch.passage.len() }),
        forecast: &forecast,
        network,
    }
    .print()
}
