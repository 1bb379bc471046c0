//! What is printed about evaluations during training.

use llara::train::{EvalEvent, EvalHistory, EvalMetric, EvalRecord, Evaluated};
use serde_json::{Value, json};

/// One line for each set, and a warning if a metric is below that of the starting model.
pub(super) fn lines(event: &EvalEvent<'_>) -> Vec<String> {
    let EvalEvent { evaluated, history, total_steps, .. } = event;
    let start = history.start.as_ref().filter(|start| start.step != evaluated.step);
    let line = |(at, record): (usize, &EvalRecord)| {
        let before = start.and_then(|start| start.records.get(at));
        let figures = EvalMetric::ALL.map(|metric| {
            let value = record.value(metric);
            match before {
                Some(before) => {
                    let gain = value - before.value(metric);
                    format!("{} {value:.4} ({gain:+.4})", metric.name())
                }
                None => format!("{} {value:.4}", metric.name()),
            }
        });
        format!(
            "evaluated {}/{total_steps}  {} ({}): {}",
            record.step,
            record.dataset,
            record.split,
            figures.join(", ")
        )
    };
    let mut lines: Vec<String> = evaluated.records.iter().enumerate().map(line).collect();
    let below: Vec<String> = start
        .into_iter()
        .flat_map(|start| evaluated.below(start))
        .map(|(set, metric, here, there)| {
            format!("{set}/{} {here:.4} (start: {there:.4})", metric.name())
        })
        .collect();
    if !below.is_empty() {
        lines.push(format!(
            "warning: after step {} the model is worse than the starting model: {}",
            evaluated.step,
            below.join(", ")
        ));
    }
    lines
}

/// The figures of a run: those of the starting model, the last and the best ones.
pub(super) fn json(history: &EvalHistory) -> Value {
    json!({
        "metric": history.metric(),
        "start": history.start.as_ref().map(figures),
        "last": history.last.as_ref().map(figures),
        "best": history.best.as_ref().map(figures),
    })
}

fn figures(evaluated: &Evaluated) -> Value {
    let set = |record: &EvalRecord| {
        let mut figures = json!({ "split": record.split });
        for metric in EvalMetric::ALL {
            figures[metric.name()] = record.value(metric).into();
        }
        figures["queries"] = record.queries.into();
        (record.dataset.clone(), figures)
    };
    let sets: serde_json::Map<String, Value> = evaluated.records.iter().map(set).collect();
    json!({ "step": evaluated.step, "value": evaluated.value, "datasets": sets })
}
