//! The metrics of an evaluation, and the one by which models are compared.

use std::fmt;
use std::str::FromStr;

use crate::{Error, ErrorKind};

/// A metric of an evaluation, from 0 to 1. Greater is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EvalMetric {
    /// nDCG of the first 10 passages.
    NdcgAt10,
    /// Reciprocal rank of the first relevant passage among the first 10.
    MrrAt10,
    /// Fraction of the relevant passages that are among the first 100.
    RecallAt100,
}

impl EvalMetric {
    /// All metrics, in the order of the log.
    pub const ALL: [EvalMetric; 3] =
        [EvalMetric::NdcgAt10, EvalMetric::MrrAt10, EvalMetric::RecallAt100];

    /// The name in the log.
    pub fn name(self) -> &'static str {
        match self {
            EvalMetric::NdcgAt10 => "ndcg@10",
            EvalMetric::MrrAt10 => "mrr@10",
            EvalMetric::RecallAt100 => "recall@100",
        }
    }
}

/// The metric by which models are compared.
///
/// Its text is that of `--metric-for-best-model`: `ndcg@10` is the mean over all sets, `NAME/ndcg@10` the
/// metric of one set. As in `transformers`, `eval_ndcg@10` is the same as `ndcg@10`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BestMetric {
    /// The name of a set; `None`: the mean over all sets.
    pub dataset: Option<String>,
    /// The metric.
    pub metric: EvalMetric,
}

impl Default for BestMetric {
    fn default() -> Self {
        BestMetric { dataset: None, metric: EvalMetric::NdcgAt10 }
    }
}

impl fmt::Display for BestMetric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.dataset {
            Some(dataset) => write!(f, "{dataset}/{}", self.metric.name()),
            None => f.write_str(self.metric.name()),
        }
    }
}

impl FromStr for BestMetric {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let (dataset, name) = match text.rsplit_once('/') {
            Some((dataset, name)) => (Some(dataset.to_owned()), name),
            None => (None, text.strip_prefix("eval_").unwrap_or(text)),
        };
        let metric = EvalMetric::ALL.into_iter().find(|metric| metric.name() == name);
        let metric = metric.ok_or_else(|| {
            let names = EvalMetric::ALL.map(EvalMetric::name).join(", ");
            Error::new(ErrorKind::Argument, "this is not a metric of an evaluation")
                .expected(format!("{names}, or NAME/METRIC for the set NAME"))
                .got(text)
        })?;
        Ok(BestMetric { dataset, metric })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_log_and_of_transformers() {
        for text in ["ndcg@10", "mrr@10", "recall@100", "nfcorpus/mrr@10"] {
            assert_eq!(text.parse::<BestMetric>().unwrap().to_string(), text);
        }
        assert_eq!("eval_ndcg@10".parse::<BestMetric>().unwrap(), BestMetric::default());
        for text in ["", "loss", "eval_loss", "ndcg@5", "a/loss", "ndcg@10/a", "/"] {
            let error = text.parse::<BestMetric>().unwrap_err().to_string();
            assert!(error.contains("ndcg@10, mrr@10, recall@100"), "{error}");
        }
    }
}
