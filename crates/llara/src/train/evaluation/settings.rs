//! What is evaluated while a model is trained, when, and what follows from the figures.

use super::metric::BestMetric;
use crate::retrieval::BeirDataset;
use crate::storage::Fingerprint;
use crate::{Error, ErrorKind, Result};

/// A test collection with a name.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalSet {
    /// Its name in logs and metrics. Unique; not empty, without `/`.
    pub name: String,
    /// The split that was read.
    pub split: String,
    /// Corpus, queries and judgments.
    pub dataset: BeirDataset,
    /// Exclude the passage with the query's id.
    pub ignore_identical_ids: bool,
}

impl EvalSet {
    /// A text that is different for a set with another name, split or contents.
    pub(super) fn identity(&self) -> String {
        let BeirDataset { corpus, queries, qrels } = &self.dataset;
        let mut fingerprint = Fingerprint::new();
        for table in [corpus, queries] {
            for (id, text) in table.ids.iter().zip(&table.texts) {
                fingerprint.add(id.as_bytes());
                fingerprint.add(text.as_bytes());
            }
        }
        for query in qrels.queries() {
            let mut judged: Vec<_> = qrels.get(query).into_iter().flatten().collect();
            judged.sort_unstable();
            fingerprint.add(query.as_bytes());
            for (document, grade) in judged {
                fingerprint.add(document.as_bytes());
                fingerprint.add(&grade.to_le_bytes());
            }
        }
        fingerprint.add(&[u8::from(self.ignore_identical_ids)]);
        format!("{} ({}), fingerprint {:016x}", self.name, self.split, fingerprint.short())
    }

    /// Number of texts that are encoded.
    pub fn texts(&self) -> usize {
        self.dataset.queries.len() + self.dataset.corpus.len()
    }
}

/// When a run ends before its last step, as the callback of `transformers` with this name decides it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EarlyStopping {
    /// Number of consecutive evaluations without an improvement after which the run ends. At least 1.
    pub patience: u64,
    /// What the metric must exceed the best value by to count as an improvement. Finite, at least 0.
    pub threshold: f64,
}

/// Evaluation of a model while it is trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// The test collections, at least one.
    pub sets: Vec<EvalSet>,
    /// Steps between two evaluations; `None`: only the trained model is evaluated. The last step is evaluated
    /// in any case.
    pub every: Option<u64>,
    /// Whether the starting model is evaluated before the first step.
    pub on_start: bool,
    /// Maximum number of tokens in a batch; see [`TextEmbedder`](crate::retrieval::TextEmbedder).
    pub batch_tokens: usize,
    /// The metric by which models are compared.
    pub metric: BestMetric,
    /// Whether a checkpoint is saved after every evaluation that is the best so far, so that its weights can
    /// be loaded at the end; see [`Trainer::best_checkpoint`](crate::train::Trainer::best_checkpoint).
    pub save_best: bool,
    /// When the run ends before its last step.
    pub early_stopping: Option<EarlyStopping>,
}

impl Evaluation {
    /// The settings of `transformers.TrainingArguments` where it has them, on these sets.
    pub fn new(sets: Vec<EvalSet>) -> Self {
        Evaluation {
            sets,
            every: None,
            on_start: true,
            batch_tokens: 8192,
            metric: BestMetric::default(),
            save_best: false,
            early_stopping: None,
        }
    }

    /// Everything that decides when an evaluation takes place and what follows, for comparing processes.
    pub(in crate::train) fn settings(&self) -> impl std::fmt::Debug + use<> {
        let sets: Vec<_> = self.sets.iter().map(EvalSet::identity).collect();
        let Evaluation { every, on_start, metric, save_best, early_stopping, .. } = self;
        (sets, *every, *on_start, metric.clone(), *save_best, *early_stopping)
    }

    /// Whether a model is evaluated after `step` of `total` steps; 0 is before the first one.
    pub fn is_due(&self, step: u64, total: u64) -> bool {
        match step {
            0 => self.on_start,
            step => step == total || self.every.is_some_and(|every| step.is_multiple_of(every)),
        }
    }

    /// Number of evaluations after `step`, up to the end of a run of `total` steps.
    pub fn remaining(&self, step: u64, total: u64) -> u64 {
        let every = self.every.unwrap_or(u64::MAX);
        let regular = total / every - step.min(total) / every;
        regular + u64::from(step < total && !total.is_multiple_of(every))
    }

    /// # Errors
    /// The first setting that is out of its range.
    pub fn check(&self) -> Result<()> {
        let invalid = |what: &str| Error::new(ErrorKind::Argument, what);
        if self.sets.is_empty() {
            return Err(
                invalid("there is nothing to evaluate").expected("one test collection or more")
            );
        }
        for (at, EvalSet { name, .. }) in self.sets.iter().enumerate() {
            if name.is_empty() || name.contains('/') || name.chars().any(char::is_control) {
                return Err(invalid("a test collection has an unusable name")
                    .expected("a name without `/`")
                    .got(format!("{name:?}")));
            }
            if self.sets[..at].iter().any(|earlier| earlier.name == *name) {
                return Err(invalid("two test collections have the same name")
                    .expected("different names: they distinguish figures in the log")
                    .got(name));
            }
        }
        if self.every == Some(0) || self.batch_tokens == 0 {
            return Err(invalid("evaluation needs a positive interval and batch size")
                .expected("1 or more")
                .got(0));
        }
        if let Some(name) = &self.metric.dataset
            && !self.sets.iter().any(|set| set.name == *name)
        {
            let names: Vec<&str> = self.sets.iter().map(|set| set.name.as_str()).collect();
            return Err(invalid("the metric for the best model names no evaluated set")
                .expected(format!("one of the sets {}", names.join(", ")))
                .got(name));
        }
        if let Some(EarlyStopping { patience, threshold }) = self.early_stopping
            && (patience == 0 || !threshold.is_finite() || threshold < 0.0)
        {
            return Err(invalid("early stopping is out of range")
                .expected("a patience of 1 or more, and a threshold of 0 or a positive number")
                .got(format!("patience {patience}, threshold {threshold}")));
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use super::*;

    /// Passages `d0`, `d1`, … and a query for each of the first ones.
    pub(in crate::train::evaluation) fn set(
        name: &str,
        passages: usize,
        queries: usize,
    ) -> EvalSet {
        let dir = tempfile::tempdir().unwrap();
        let lines = |count: usize, prefix: &str, word: &str| -> String {
            let line = |i| format!("{{\"_id\": \"{prefix}{i}\", \"text\": \"{word} {i}\"}}\n");
            (0..count).map(line).collect()
        };
        fs::create_dir(dir.path().join("qrels")).unwrap();
        fs::write(dir.path().join("corpus.jsonl"), lines(passages, "d", "Fact")).unwrap();
        fs::write(dir.path().join("queries.jsonl"), lines(queries, "q", "What about")).unwrap();
        let judged: String = (0..queries).map(|i| format!("q{i}\td{i}\t1\n")).collect();
        fs::write(dir.path().join("qrels/dev.tsv"), judged).unwrap();
        let dataset = BeirDataset::open(dir.path(), "dev").unwrap();
        EvalSet {
            name: name.to_owned(),
            split: "dev".to_owned(),
            dataset,
            ignore_identical_ids: false,
        }
    }

    #[test]
    fn remaining_evaluations_are_those_that_are_due() {
        for every in [None, Some(1), Some(3), Some(4), Some(100)] {
            let evaluation = Evaluation { every, ..Evaluation::new(Vec::new()) };
            for total in 1..20 {
                for step in 0..=total {
                    let due = (step + 1..=total).filter(|&step| evaluation.is_due(step, total));
                    let remaining = evaluation.remaining(step, total);
                    assert_eq!(remaining, due.count() as u64, "{every:?} {step} {total}");
                }
            }
        }
    }

    #[test]
    fn settings_out_of_range_are_refused_by_name() {
        let fine = Evaluation::new(vec![set("a", 3, 2), set("b", 3, 2)]);
        fine.check().unwrap();
        let of = |name: &str| Some(name.to_owned());
        let metric = BestMetric { dataset: of("c"), ..BestMetric::default() };
        let stopping = |patience, threshold| Some(EarlyStopping { patience, threshold });
        let renamed = |name: &str| vec![set("a", 3, 2), set(name, 3, 2)];
        for (bad, part) in [
            (Evaluation::new(Vec::new()), "nothing to evaluate"),
            (Evaluation::new(renamed("a")), "the same name"),
            (Evaluation::new(renamed("")), "unusable name"),
            (Evaluation::new(renamed("x/y")), "unusable name"),
            (Evaluation { every: Some(0), ..fine.clone() }, "positive interval"),
            (Evaluation { batch_tokens: 0, ..fine.clone() }, "positive interval"),
            (Evaluation { metric, ..fine.clone() }, "one of the sets a, b"),
            (Evaluation { early_stopping: stopping(0, 0.0), ..fine.clone() }, "patience 0"),
            (Evaluation { early_stopping: stopping(1, -0.1), ..fine.clone() }, "threshold -0.1"),
            (Evaluation { early_stopping: stopping(1, f64::NAN), ..fine.clone() }, "threshold NaN"),
        ] {
            let error = bad.check().unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_identity_of_a_set_depends_on_its_contents() {
        let a = set("a", 3, 2);
        assert_eq!(a.identity(), set("a", 3, 2).identity());
        let mut other = a.clone();
        other.dataset.corpus.texts[1].push('.');
        assert_ne!(a.identity(), other.identity());
        let mut other = a.clone();
        other.dataset.qrels.insert("q1", "d1", 2);
        assert_ne!(a.identity(), other.identity());
        assert_ne!(a.identity(), EvalSet { ignore_identical_ids: true, ..a.clone() }.identity());
    }
}
