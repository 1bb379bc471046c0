//! The figures of a run so far: those of the starting model, the last ones, the best ones.

use serde::{Deserialize, Serialize};

use super::metric::{BestMetric, EvalMetric};
use super::settings::{EarlyStopping, Evaluation};
use crate::{Error, ErrorKind, Result};

/// The figures of a model on one set, as they are in the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps after which the model was evaluated; 0: the starting model.
    pub step: u64,
    /// Epoch, with its fraction.
    pub epoch: f64,
    /// The set's name.
    #[serde(rename = "eval_dataset")]
    pub dataset: String,
    /// The set's split.
    #[serde(rename = "eval_split")]
    pub split: String,
    /// See [`EvalMetric`].
    #[serde(rename = "ndcg@10")]
    pub ndcg_at_10: f64,
    /// See [`EvalMetric`].
    #[serde(rename = "mrr@10")]
    pub mrr_at_10: f64,
    /// See [`EvalMetric`].
    #[serde(rename = "recall@100")]
    pub recall_at_100: f64,
    /// Queries in the means.
    pub queries: usize,
    /// Time of the evaluation.
    pub seconds: f64,
}

impl EvalRecord {
    /// The value of a metric.
    pub fn value(&self, metric: EvalMetric) -> f64 {
        match metric {
            EvalMetric::NdcgAt10 => self.ndcg_at_10,
            EvalMetric::MrrAt10 => self.mrr_at_10,
            EvalMetric::RecallAt100 => self.recall_at_100,
        }
    }
}

/// The figures of a model on all sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluated {
    /// Steps after which the model was evaluated; 0: the starting model.
    pub step: u64,
    /// The value of the metric for the best model.
    pub value: f64,
    /// One for each set, in the order of the sets.
    pub records: Vec<EvalRecord>,
}

impl Evaluated {
    pub(super) fn new(step: u64, metric: &BestMetric, records: Vec<EvalRecord>) -> Self {
        let is_counted = |record: &&EvalRecord| {
            metric.dataset.as_ref().is_none_or(|dataset| *dataset == record.dataset)
        };
        let values: Vec<f64> =
            records.iter().filter(is_counted).map(|record| record.value(metric.metric)).collect();
        let value = values.iter().sum::<f64>() / values.len().max(1) as f64;
        Evaluated { step, value, records }
    }

    /// Time of the evaluation.
    pub fn seconds(&self) -> f64 {
        self.records.iter().map(|record| record.seconds).sum()
    }

    /// The names and values of this model's metrics that are below those of `start`: `(set, metric, here,
    /// there)`.
    pub fn below<'e>(
        &'e self,
        start: &'e Evaluated,
    ) -> impl Iterator<Item = (&'e str, EvalMetric, f64, f64)> {
        self.records.iter().zip(&start.records).flat_map(|(here, there)| {
            let pairs = EvalMetric::ALL.into_iter().map(|m| (m, here.value(m), there.value(m)));
            let below = pairs.filter(|(_, here, there)| here < there);
            below.map(|(metric, here_value, there_value)| {
                (here.dataset.as_str(), metric, here_value, there_value)
            })
        })
    }
}

/// All that later evaluations of a run are compared with. It is part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalHistory {
    /// The metric for the best model.
    metric: String,
    /// What was evaluated.
    sets: Vec<String>,
    /// Of the starting model, if it was evaluated.
    pub start: Option<Evaluated>,
    /// The latest figures.
    pub last: Option<Evaluated>,
    /// The first step with the greatest metric. The starting model is not among them: it needs no run.
    pub best: Option<Evaluated>,
    /// How many of the latest evaluations in a row were no improvement.
    pub not_improved: u64,
}

impl EvalHistory {
    /// No figures yet.
    pub(in crate::train) fn new(evaluation: &Evaluation) -> Self {
        EvalHistory {
            metric: evaluation.metric.to_string(),
            sets: evaluation.sets.iter().map(|set| set.identity()).collect(),
            start: None,
            last: None,
            best: None,
            not_improved: 0,
        }
    }

    /// The metric for the best model, as `--metric-for-best-model` writes it.
    pub fn metric(&self) -> &str {
        &self.metric
    }

    /// Checks that figures of `evaluation` can be compared with these.
    ///
    /// # Errors
    /// When the metric or a set differs.
    pub(in crate::train) fn check(&self, evaluation: &Evaluation) -> Result<()> {
        let now = EvalHistory::new(evaluation);
        let mut changed = Vec::new();
        if self.metric != now.metric {
            changed.push(format!(
                "metric-for-best-model: {} in the checkpoint, {} now",
                self.metric, now.metric
            ));
        }
        for at in 0..self.sets.len().max(now.sets.len()) {
            let [before, after] =
                [&self.sets, &now.sets].map(|sets| sets.get(at).map_or("none", String::as_str));
            if before != after {
                changed.push(format!("eval-dataset: {before} in the checkpoint, {after} now"));
            }
        }
        match changed.is_empty() {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Argument,
                "the figures of this run cannot be compared with those in the checkpoint",
            )
            .got(format!("\n    {}", changed.join("\n    ")))
            .hint(
                "give the evaluation settings of the interrupted run, or resume without evaluation \
                 (--eval-strategy no)",
            )),
        }
    }

    /// Adds figures; returns whether they are the best so far.
    ///
    /// As in `transformers`, the best step is that with the greatest metric, but an improvement by no more
    /// than the threshold does not reset the patience of early stopping.
    pub(in crate::train) fn add(
        &mut self,
        evaluated: Evaluated,
        early_stopping: Option<EarlyStopping>,
    ) -> bool {
        self.last = Some(evaluated.clone());
        if evaluated.step == 0 {
            self.start = Some(evaluated);
            return false;
        }
        let threshold = early_stopping.map_or(0.0, |stopping| stopping.threshold);
        let gain = match &self.best {
            Some(best) => evaluated.value - best.value,
            None => f64::INFINITY,
        };
        self.not_improved = if gain > threshold { 0 } else { self.not_improved.saturating_add(1) };
        if gain > 0.0 {
            self.best = Some(evaluated);
        }
        gain > 0.0
    }

    /// Whether early stopping ends the run.
    pub fn is_exhausted(&self, early_stopping: Option<EarlyStopping>) -> bool {
        early_stopping.is_some_and(|stopping| self.not_improved >= stopping.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::tests::set;
    use super::*;

    fn record(dataset: &str, ndcg_at_10: f64) -> EvalRecord {
        EvalRecord {
            step: 1,
            epoch: 0.5,
            dataset: dataset.to_owned(),
            split: "dev".to_owned(),
            ndcg_at_10,
            mrr_at_10: 0.25,
            recall_at_100: 1.0,
            queries: 75,
            seconds: 3.5,
        }
    }

    fn evaluated(step: u64, value: f64) -> Evaluated {
        Evaluated::new(step, &BestMetric::default(), vec![record("a", value)])
    }

    #[test]
    fn a_line_of_the_log_has_these_names_in_this_order() {
        let line = serde_json::to_string(&record("cranfield", 0.4)).unwrap();
        assert_eq!(
            line,
            r#"{"step":1,"epoch":0.5,"eval_dataset":"cranfield","eval_split":"dev","ndcg@10":0.4,"mrr@10":0.25,"recall@100":1.0,"queries":75,"seconds":3.5}"#
        );
    }

    #[test]
    fn the_metric_is_that_of_one_set_or_the_mean() {
        let records = || vec![record("a", 0.25), record("b", 0.75)];
        let value = |metric: &str| Evaluated::new(1, &metric.parse().unwrap(), records()).value;
        assert_eq!((value("ndcg@10"), value("b/ndcg@10"), value("a/ndcg@10")), (0.5, 0.75, 0.25));
        assert_eq!((value("mrr@10"), value("a/recall@100")), (0.25, 1.0));
    }

    #[test]
    fn the_first_greatest_is_the_best_and_patience_counts_what_is_no_improvement() {
        let stopping = |threshold| Some(EarlyStopping { patience: 2, threshold });
        let run = |threshold: f64, values: &[f64]| {
            let mut history = EvalHistory::new(&Evaluation::new(vec![set("a", 3, 2)]));
            assert!(!history.add(evaluated(0, 0.9), stopping(threshold)));
            let mut exhausted = Vec::new();
            for (step, &value) in (1..).zip(values) {
                let best = history.add(evaluated(step, value), stopping(threshold));
                assert_eq!(best, history.best.as_ref().unwrap().step == step);
                exhausted.push(history.is_exhausted(stopping(threshold)));
            }
            assert!(!history.is_exhausted(None));
            (history.best.unwrap().step, exhausted.iter().position(|&is| is))
        };
        assert_eq!(run(0.0, &[0.1, 0.3, 0.2, 0.3, 0.4]), (5, Some(3)));
        assert_eq!(run(0.0, &[0.1, 0.2, 0.1, 0.3, 0.1]), (4, None));
        // Gains that are too small do not reset the patience, but the step is the best.
        assert_eq!(run(0.15, &[0.1, 0.2, 0.3]), (3, Some(2)));
        assert_eq!(run(0.0, &[0.0, 0.0, 0.0]), (1, Some(2)));
    }

    #[test]
    fn figures_below_the_start_are_named() {
        let (start, now) = (evaluated(0, 0.5), evaluated(3, 0.4));
        let below: Vec<_> = now.below(&start).collect();
        assert_eq!(below, [("a", EvalMetric::NdcgAt10, 0.4, 0.5)]);
        assert_eq!(start.below(&now).count() + now.below(&now).count(), 0);
    }

    #[test]
    fn a_state_comes_back_to_the_last_bit_and_others_are_refused() {
        let evaluation = Evaluation::new(vec![set("a", 3, 2)]);
        let mut history = EvalHistory::new(&evaluation);
        for (step, value) in [(1, 1.0 / 3.0), (2, 0.1 + 0.2), (3, 0.731_058_578_630_004_9)] {
            history.add(evaluated(step, value), None);
            let text = serde_json::to_string(&history).unwrap();
            assert_eq!(serde_json::from_str::<EvalHistory>(&text).unwrap(), history);
        }
        history.check(&evaluation).unwrap();
        let error = |changed: Evaluation| history.check(&changed).unwrap_err().to_string();
        let metric = "mrr@10".parse().unwrap();
        let text = error(Evaluation { metric, ..evaluation.clone() });
        assert!(text.contains("ndcg@10 in the checkpoint, mrr@10 now"), "{text}");
        let text = error(Evaluation::new(vec![set("a", 4, 2)]));
        assert!(text.contains("eval-dataset: a (dev), fingerprint"), "{text}");
        let text = error(Evaluation::new(vec![set("a", 3, 2), set("b", 3, 2)]));
        assert!(text.contains("none in the checkpoint, b (dev)"), "{text}");
    }
}
