//! Bar charts in text: memory by category, histograms of text lengths.

use llara::train::plan::{Histogram, Plan, TextLengths};

use crate::talk::{bytes, count};

/// Width of the longest bar in characters.
const WIDTH: usize = 40;

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

/// A histogram of the lengths of each role, with the maximum length.
pub(super) fn lengths(roles: &[TextLengths]) -> Vec<String> {
    roles.iter().flat_map(histogram).collect()
}

fn histogram(texts: &TextLengths) -> Vec<String> {
    let summary = texts.summary();
    let name = match texts.role {
        llara::Role::Query => "queries",
        llara::Role::Passage => "passages",
    };
    let mut lines = vec![format!(
        "{name}: tokens of {} texts, template included: mean {:.0}, median {}, 90th percentile {}, \
         99th percentile {}, longest {}",
        count(summary.texts),
        summary.mean,
        count(summary.p50),
        count(summary.p90),
        count(summary.p99),
        count(summary.max),
    )];
    let Histogram { first, width, counts } = texts.histogram(BINS);
    let most = counts.iter().copied().max().unwrap_or(0);
    let last = counts.len() - 1;
    for (bin, &texts) in counts.iter().enumerate() {
        let (from, to) = (first + bin * width, first + (bin + 1) * width - 1);
        let range = if bin == last { format!("{from} …") } else { format!("{from} – {to}") };
        // The mark of a maximum length above all bins is in the last bin.
        let after = bin == last || summary.max_len <= to;
        let is_cut = (bin == 0 || summary.max_len >= from) && after;
        let mark = match is_cut {
            true => {
                let percent = 100.0 * summary.cut_share;
                format!("  ← maximum length {}: {percent:.1} % are truncated", summary.max_len)
            }
            false => String::new(),
        };
        let bar = bar(texts as f64, most as f64);
        lines.push(format!("{range:>14}  {:>7}  {bar}{mark}", count(texts)));
    }
    lines
}

/// A bar for the fraction `part / total`, rounded up to an eighth of a character.
fn bar(part: f64, total: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    if total <= 0.0 || part <= 0.0 {
        return String::new();
    }
    let eighths = ((part / total).min(1.0) * (8 * WIDTH) as f64).ceil() as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_proportional_and_zero_has_none() {
        assert_eq!(bar(1.0, 1.0).chars().count(), WIDTH);
        assert_eq!(bar(0.5, 1.0), "█".repeat(WIDTH / 2));
        assert_eq!(bar(1e-9, 1.0), "▏");
        assert_eq!((bar(0.0, 1.0), bar(1.0, 0.0)), (String::new(), String::new()));
    }
}
