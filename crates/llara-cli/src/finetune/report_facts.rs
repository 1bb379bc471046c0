//! What the report of a run says about its settings, data and predicted memory.

use llara::backend::Backend;
use llara::loss::{Distillation, ObjectiveOptions};
use llara::train::plan::TextLengths;
use llara::train::{Batching, TrainConfig};

use super::{Args, Prepared};
use crate::report::{Lengths, ReportFacts};
use crate::training::{Forecast, adapter_setting, common_settings};

/// Bins of the histograms of text lengths.
const BINS: usize = 24;

/// The facts of a run that is about to start.
///
/// # Errors
/// When the adapter that it continues from, or its schedule, is invalid.
pub(super) fn facts<B: Backend>(
    args: &Args,
    prepared: &Prepared<B>,
    forecast: &Forecast,
    lengths: &[TextLengths],
) -> llara::Result<ReportFacts> {
    let Prepared { config, dataset, .. } = prepared;
    let steps_per_epoch = config.sampler(dataset, prepared.ranks)?.steps_per_epoch();
    let plan = &forecast.plan;
    let memory = plan.training.named().map(|(name, part)| (name.to_owned(), part));
    let files = dataset.files().into_iter().map(|file| {
        let name = file.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (name, file.rows)
    });
    Ok(ReportFacts {
        llara: env!("CARGO_PKG_VERSION").to_owned(),
        settings: settings(args, prepared, config)?,
        data: files.collect(),
        total_steps: config.length.steps(steps_per_epoch)?,
        planned_memory: memory.into(),
        planned_peak: (plan.peak_bytes(), plan.peak_phase().to_owned()),
        measured_peak: None,
        lengths: lengths
            .iter()
            .map(|lengths| Lengths {
                role: match lengths.role {
                    llara::Role::Query => "queries".to_owned(),
                    llara::Role::Passage => "passages".to_owned(),
                },
                max_len: lengths.max_len,
                truncated_share: lengths.truncated_share(),
                summary: lengths.lengths.summary(),
                histogram: lengths.lengths.histogram(BINS),
            })
            .collect(),
    })
}

fn settings<B: Backend>(
    args: &Args,
    prepared: &Prepared<B>,
    config: &TrainConfig,
) -> llara::Result<Vec<(String, String)>> {
    let recipe = &prepared.recipe;
    let mut rows = vec![
        ("model", prepared.model_name.clone()),
        ("adapter", adapter_setting(prepared.lora()?)),
        ("device", prepared.backend.description()),
        ("dtype", prepared.precision.to_string()),
        ("template", recipe.template.name.clone()),
        ("queries per step", config.batch_size.saturating_mul(prepared.ranks).to_string()),
        ("passages per query", config.group_size.to_string()),
        ("query max length", config.query_max_len.to_string()),
        ("passage max length", config.passage_max_len.to_string()),
        ("query instruction", config.query_instruction.clone()),
        ("passage instruction", config.passage_instruction.clone()),
        ("objective", objective(&config.objective)),
        ("temperature", args.contrastive.temperature.to_string()),
        ("normalized", recipe.normalized.to_string()),
        ("batching", batching(&config.batching)),
    ];
    rows.extend(common_settings(config));
    let given = rows.into_iter().filter(|(_, value)| !value.is_empty());
    Ok(given.map(|(name, value)| (name.to_owned(), value)).collect())
}

fn batching(batching: &Batching) -> String {
    match batching {
        Batching::Mixed => "mixed".to_owned(),
        Batching::PerFile { weights } if weights.is_empty() => "per file".to_owned(),
        Batching::PerFile { weights } => {
            let weights: Vec<String> = weights.iter().map(f64::to_string).collect();
            format!("per file, weights {}", weights.join(", "))
        }
    }
}

/// The terms of the loss.
fn objective(options: &ObjectiveOptions) -> String {
    let ObjectiveOptions {
        in_batch_negatives,
        false_negatives,
        symmetric,
        matryoshka,
        distillation,
        reference_gradient_scale,
    } = options;
    let mut parts = vec![if *symmetric { "symmetric InfoNCE" } else { "InfoNCE" }.to_owned()];
    if !in_batch_negatives {
        parts.push("negatives of the own row only".to_owned());
    }
    if false_negatives.mask_equal {
        parts.push("equal false negatives masked".to_owned());
    }
    if let Some(margin) = false_negatives.margin {
        parts.push(format!("false negatives masked above a margin of {margin}"));
    }
    if !matryoshka.is_empty() {
        let dimensions: Vec<String> =
            matryoshka.iter().map(|prefix| prefix.dimension.to_string()).collect();
        parts.push(format!("Matryoshka dimensions {}", dimensions.join(", ")));
    }
    if let Some(Distillation { kind, weight, temperature }) = distillation {
        let kind = format!("{kind:?}").to_lowercase();
        parts.push(format!("distillation {kind}, weight {weight}, temperature {temperature}"));
    }
    if *reference_gradient_scale {
        parts.push("gradients scaled as in the reference".to_owned());
    }
    parts.join("; ")
}
