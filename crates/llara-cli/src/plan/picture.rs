//! Bar charts in text: memory by category, histograms of text lengths.

use llara::train::plan::Plan;

use super::planned_run::PlannedTexts;
use crate::histogram::{self, bar};
use crate::talk::{bytes, count};

/// Number of bins of a histogram.
const BINS: usize = 12;

/// One line per category with a bar for its fraction, then the peak memory of the phases.
pub(super) fn memory(plan: &Plan) -> Vec<String> {
    let total = plan.training.total();
    let row = |name: &str, part: u64, bar: String| format!("{name:<14}{:>10}  {bar}", bytes(part));
    let mut lines: Vec<String> = plan
        .training
        .named()
        .into_iter()
        .filter(|&(_, part)| part > 0)
        .map(|(name, part)| row(name, part, bar(part as f64, total as f64)))
        .collect();
    lines.push(row("training", total, "peak while training".into()));
    lines.push(row("loading", plan.loading_bytes, "peak while weights are read".into()));
    let saving = "peak while the trained model is saved and verified";
    lines.push(row("saving", plan.saving_bytes, saving.into()));
    if plan.evaluation_bytes > 0 {
        let evaluation = "peak while the model is evaluated during training";
        lines.push(row("evaluation", plan.evaluation_bytes, evaluation.into()));
    }
    lines
}

/// A histogram of the lengths of texts, with the maximum length.
pub(super) fn lengths(texts: &PlannedTexts) -> Vec<String> {
    let summary = texts.lengths.summary();
    let PlannedTexts { plural, template_included, .. } = texts;
    let template = if *template_included { "template included" } else { "without template" };
    let mut lines = vec![format!(
        "{plural}: tokens of {} texts, {template}: mean {:.0}, median {}, 90th percentile {}, \
         99th percentile {}, longest {}",
        count(summary.texts as usize),
        summary.mean,
        count(summary.p50),
        count(summary.p90),
        count(summary.p99),
        count(summary.max),
    )];
    let max_len = (texts.max_len, texts.truncated_share);
    lines.extend(histogram::lines(&texts.lengths.histogram(BINS), Some(max_len)));
    lines
}
