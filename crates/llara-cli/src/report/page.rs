//! The page: one self-contained HTML file without scripts.

use std::collections::BTreeSet;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::chart::{Bars, Chart, Series, number};
use super::facts::ReportFacts;
use super::run_data::{MetricName, Passage, Query, RunData, SetQueries, StepLine};
use crate::talk::{bytes, count, counted};

/// First line of every report, by which the program recognizes its own files.
pub(super) const MARK: &str = "<!-- report of llara finetune -->";

/// Colors of the style sheet.
const COLORS: usize = 8;

/// The report of one run, or of several over one another.
pub(super) fn page(runs: &[RunData]) -> String {
    let title = match runs {
        [run] => run.name.clone(),
        runs => format!("{} training runs", runs.len()),
    };
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (title) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body {
                h1 { (title) }
                @if let [run] = runs { (summary(run)) }
                @for run in runs.iter().filter(|run| run.unreadable > 0) {
                    p.warning { (run.name) ": " (counted(run.unreadable, "line")) " of log.jsonl could not be read." }
                }
                h2 { "Training" }
                div.charts { @for chart in training_charts(runs) { (chart.draw()) } }
                (evaluation(runs))
                (memory(runs))
                (lengths(runs))
                (settings(runs))
                @for run in runs { @for (name, set) in &run.queries { (queries(run, (name, set), runs.len() > 1)) } }
            }
        }
    };
    format!("{MARK}\n{}\n", page.into_string())
}

fn summary(run: &RunData) -> Markup {
    let Some(last) = run.steps.last() else {
        return html! { p.quiet { "No step was logged yet." } };
    };
    let total = run.facts.as_ref().map(|facts| facts.total_steps);
    let seconds: f64 = run.steps.iter().map(|line| line.seconds).sum();
    let tokens: f64 = run.steps.iter().map(|line| line.tokens).sum();
    html! {
        p {
            "Step " (count(last.step as usize))
            @if let Some(total) = total { " of " (count(total as usize)) }
            ", epoch " (format!("{:.2}", last.epoch)) ", loss " (format!("{:.4}", last.loss))
        }
        p.quiet {
            (duration(seconds)) " of training, "
            @if run.eval_seconds > 0.0 { (duration(run.eval_seconds)) " of evaluation, " }
            (count(tokens as usize)) " tokens, "
            (count((tokens / seconds.max(1e-9)) as usize)) " tokens/s"
        }
    }
}

fn training_charts(runs: &[RunData]) -> Vec<Chart> {
    type Value = fn(&StepLine) -> f64;
    let charts: [(&str, Value, bool); 4] = [
        ("Loss", |line| line.loss, true),
        ("Learning rate", |line| line.learning_rate, false),
        ("Gradient norm, before clipping", |line| line.grad_norm, true),
        ("Tokens per second", |line| line.tokens_per_second, true),
    ];
    let chart = |(title, value, is_noisy): (&str, Value, bool)| {
        let series = runs.iter().enumerate().map(|(i, run)| Series {
            name: run.name.clone(),
            color: i % COLORS,
            points: run.steps.iter().map(|line| (line.step, value(line))).collect(),
        });
        Chart { title: title.to_owned(), series: series.collect(), is_noisy, has_dots: false }
    };
    charts.into_iter().map(chart).collect()
}

/// One chart for each metric; a line for each set and run.
fn evaluation(runs: &[RunData]) -> Markup {
    let names: BTreeSet<&str> =
        runs.iter().flat_map(|run| run.metrics.keys()).map(|name| name.metric.as_str()).collect();
    if names.is_empty() {
        return html! {};
    }
    let charts = names.into_iter().map(|metric| {
        let lines = runs.iter().flat_map(|run| {
            let of_run = run.metrics.iter().filter(|(name, _)| name.metric == metric);
            of_run.map(|(name, points)| (line_name(run, name, runs.len()), points.clone()))
        });
        let series =
            lines.enumerate().map(|(i, (name, points))| Series { name, color: i % COLORS, points });
        Chart {
            title: metric.to_owned(),
            series: series.collect(),
            is_noisy: false,
            has_dots: true,
        }
    });
    html! {
        h2 { "Evaluation" }
        div.charts { @for chart in charts { (chart.draw()) } }
        (metric_table(runs))
    }
}

fn line_name(run: &RunData, name: &MetricName, runs: usize) -> String {
    if runs == 1 { name.set.clone() } else { format!("{}: {}", run.name, name.set) }
}

fn metric_table(runs: &[RunData]) -> Markup {
    html! {
        div.scroll { table {
            tr {
                th { "set" } th { "metric" } th.number { "first" } th.number { "last" }
                th.number { "best" } th.number { "at step" }
            }
            @for run in runs { @for (name, points) in &run.metrics {
                @if let (Some(first), Some(last), Some(best)) =
                    (points.first(), points.last(), points.iter().max_by(|a, b| a.1.total_cmp(&b.1)))
                {
                    tr {
                        td { (line_name(run, name, runs.len())) } td { (name.metric) }
                        @for value in [first.1, last.1, best.1] { td.number { (format!("{value:.4}")) } }
                        td.number { (best.0) }
                    }
                }
            } }
        } }
    }
}

/// The predicted memory by category, and the measured peak.
fn memory(runs: &[RunData]) -> Markup {
    let known = || runs.iter().filter_map(|run| Some((run, run.facts.as_ref()?)));
    if known().next().is_none() {
        return html! {};
    }
    html! {
        h2 { "Memory" }
        @for (run, facts) in known() {
            @if runs.len() > 1 { p { (run.name) } }
            div.scroll { table {
                @for (name, part) in facts.planned_memory.iter().filter(|(_, part)| *part > 0) {
                    tr {
                        td { (name) } td.number { (bytes(*part)) }
                        td { meter min="0" max=(facts.planned_peak.0) value=(part) {} }
                    }
                }
                tr { td { "predicted peak, while " (facts.planned_peak.1) } td.number { (bytes(facts.planned_peak.0)) } td {} }
                @if let Some(peak) = facts.measured_peak {
                    tr { td { "measured peak so far" } td.number { (bytes(peak)) } td { (difference(peak, facts)) } }
                }
            } }
        }
    }
}

fn difference(peak: u64, facts: &ReportFacts) -> String {
    let ratio = peak as f64 / facts.planned_peak.0.max(1) as f64;
    format!("{:+.1} %", 100.0 * (ratio - 1.0))
}

fn lengths(runs: &[RunData]) -> Markup {
    let known: Vec<_> =
        runs.iter().filter_map(|run| run.facts.as_ref()).flat_map(|facts| &facts.lengths).collect();
    // Runs that are compared usually have the same data.
    let mut shown: Vec<&super::facts::Lengths> = Vec::new();
    for lengths in known {
        if !shown.contains(&lengths) {
            shown.push(lengths);
        }
    }
    if shown.is_empty() {
        return html! {};
    }
    html! {
        h2 { "Text lengths in tokens, template included" }
        div.charts {
            @for lengths in shown {
                @let summary = &lengths.summary;
                (Bars {
                    title: format!(
                        "{}: mean {}, 90th percentile {}, longest {}, {} % truncated",
                        lengths.role, number(summary.mean), summary.p90, summary.max,
                        number((1000.0 * lengths.truncated_share).round() / 10.0)
                    ),
                    first: lengths.histogram.first,
                    width: lengths.histogram.width,
                    counts: &lengths.histogram.counts,
                    limit: lengths.max_len,
                }.draw())
            }
        }
    }
}

/// Settings by run; of several runs, those that differ come first.
fn settings(runs: &[RunData]) -> Markup {
    let known: Vec<(&RunData, &ReportFacts)> =
        runs.iter().filter_map(|run| Some((run, run.facts.as_ref()?))).collect();
    let mut names: Vec<&str> = Vec::new();
    for (_, facts) in &known {
        for (name, _) in &facts.settings {
            if !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
    }
    let mut rows: Vec<(&str, Vec<&str>)> = names
        .into_iter()
        .map(|name| {
            let value =
                |facts: &ReportFacts| facts.settings.iter().position(|(other, _)| other == name);
            let values = known
                .iter()
                .map(|(_, facts)| value(facts).map_or("", |at| facts.settings[at].1.as_str()));
            (name, values.collect())
        })
        .collect();
    rows.sort_by_key(|(_, values)| values.iter().all(|value| *value == values[0]));
    if rows.is_empty() {
        return html! {};
    }
    html! {
        h2 { "Settings" }
        div.scroll { table {
            @if known.len() > 1 { tr { th {} @for (run, _) in &known { th { (run.name) } } } }
            @for (name, values) in &rows { tr { td { (name) } @for value in values { td { (value) } } } }
            tr {
                td { "data" }
                @for (_, facts) in &known {
                    td { @for (file, rows) in &facts.data { (file) ": " (counted(*rows as usize, "row")) br; } }
                }
            }
            tr { td { "llara" } @for (_, facts) in &known { td { (facts.llara) } } }
        } }
    }
}

fn queries(run: &RunData, (name, set): (&str, &SetQueries), names_run: bool) -> Markup {
    html! {
        h2 {
            "Queries of " (name) " (" (set.split) ") at step " (set.step)
            @if names_run { ", " (run.name) }
        }
        @for (title, queries) in [("Lowest nDCG@10", &set.worst), ("Highest nDCG@10", &set.best)] {
            @if !queries.is_empty() {
                p { (title) }
                @for query in queries { (one_query(query)) }
            }
        }
    }
}

fn one_query(query: &Query) -> Markup {
    html! {
        details {
            summary { (format!("{:.3}", query.ndcg)) "  " (query.text) " " span.quiet { (query.id) } }
            p.quiet { "Found:" }
            ol { @for passage in &query.found { li { (one_passage(passage)) } } }
            @if !query.missed.is_empty() {
                p.quiet { "Relevant, but not among the first:" }
                ul { @for passage in &query.missed { li { (one_passage(passage)) } } }
            }
        }
    }
}

fn one_passage(passage: &Passage) -> Markup {
    let is_relevant = passage.relevance.is_some_and(|relevance| relevance > 0);
    html! {
        @if is_relevant { span.relevant { "relevant " } }
        span.quiet {
            (passage.id)
            @if let Some(score) = passage.score { " " (format!("{score:.4}")) }
            @if let Some(rank) = passage.rank { " rank " (rank) }
        }
        " " (passage.text)
    }
}

fn duration(seconds: f64) -> String {
    let seconds = seconds.round() as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}
