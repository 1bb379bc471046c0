//! What a run has left in its output folder: its log, its settings, its evaluation queries.

use std::collections::BTreeMap;
use std::path::Path;

use llara::{Error, ErrorKind, Result, read_text_file};
use serde::Deserialize;
use serde_json::Value;

use super::facts::{FACTS_FILE, ReportFacts};

const LOG_FILE: &str = "log.jsonl";
/// No log is larger; a record has about 200 bytes.
const MAX_LOG_BYTES: u64 = 1 << 30;
const QUERIES_FILE: &str = "eval_queries.json";
const MAX_QUERIES_BYTES: u64 = 64 << 20;

/// One run.
pub(super) struct RunData {
    /// Name of the output folder.
    pub(super) name: String,
    /// Training records by step.
    pub(super) steps: Vec<StepLine>,
    /// Evaluations by set and metric.
    pub(super) metrics: BTreeMap<MetricName, Vec<(f64, f64)>>,
    /// Seconds of all evaluations.
    pub(super) eval_seconds: f64,
    /// Settings and predictions; `None` for a run of an earlier version.
    pub(super) facts: Option<ReportFacts>,
    /// Best and worst queries of the last evaluation of each set, by its name.
    pub(super) queries: BTreeMap<String, SetQueries>,
    /// Lines of the log that could not be read.
    pub(super) unreadable: usize,
}

/// A metric of an evaluation set, such as (`cranfield`, `ndcg@10`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct MetricName {
    pub(super) metric: String,
    pub(super) set: String,
}

/// A training record. Means are over the steps since the last one.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub(super) struct StepLine {
    pub(super) step: f64,
    pub(super) epoch: f64,
    pub(super) loss: f64,
    pub(super) grad_norm: f64,
    pub(super) learning_rate: f64,
    pub(super) tokens: f64,
    pub(super) tokens_per_second: f64,
    pub(super) seconds: f64,
}

/// The queries of one evaluation set.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct SetQueries {
    pub(super) split: String,
    pub(super) step: u64,
    #[serde(default)]
    pub(super) best: Vec<Query>,
    #[serde(default)]
    pub(super) worst: Vec<Query>,
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Query {
    pub(super) id: String,
    pub(super) text: String,
    #[serde(rename = "ndcg@10")]
    pub(super) ndcg: f64,
    #[serde(default)]
    pub(super) found: Vec<Passage>,
    #[serde(default)]
    pub(super) missed: Vec<Passage>,
}

/// A passage that was found, or a relevant one that was missed.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Passage {
    pub(super) id: String,
    pub(super) text: String,
    #[serde(default)]
    pub(super) score: Option<f64>,
    /// Judged relevance.
    #[serde(default)]
    pub(super) relevance: Option<i64>,
    /// Rank at which it was found, from 1.
    #[serde(default)]
    pub(super) rank: Option<u64>,
}

impl RunData {
    /// Reads an output folder. A line of the log that is cut off, as of a run that goes on, is left out.
    ///
    /// # Errors
    /// When the folder has no log of a run, or a file cannot be read.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(LOG_FILE);
        if !path.is_file() {
            return Err(Error::new(ErrorKind::Io, "the folder has no log of a training run")
                .file(&path)
                .expected("the output folder of `llara finetune`"));
        }
        let resolved = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        let name = resolved.file_name().unwrap_or(folder.as_os_str());
        let mut run = RunData {
            name: name.to_string_lossy().into_owned(),
            steps: Vec::new(),
            metrics: BTreeMap::new(),
            eval_seconds: 0.0,
            facts: ReportFacts::read(&folder.join(FACTS_FILE))?,
            queries: read_queries(&folder.join(QUERIES_FILE))?,
            unreadable: 0,
        };
        for line in read_text_file(&path, "read the log", MAX_LOG_BYTES)?.split_inclusive('\n') {
            match serde_json::from_str::<Value>(line) {
                Ok(line) => run.add(&line),
                Err(_) if !line.ends_with('\n') => {}
                Err(_) => run.unreadable += 1,
            }
        }
        Ok(run)
    }

    fn add(&mut self, line: &Value) {
        let number = |key: &str| line.get(key).and_then(Value::as_f64).filter(|x| x.is_finite());
        let Some(set) = line.get("eval_dataset").and_then(Value::as_str) else {
            match StepLine::deserialize(line) {
                Ok(line) => self.steps.push(line),
                Err(_) => self.unreadable += 1,
            }
            return;
        };
        let (Some(step), Some(fields)) = (number("step"), line.as_object()) else {
            self.unreadable += 1;
            return;
        };
        self.eval_seconds += number("seconds").unwrap_or(0.0);
        for metric in fields.keys().filter(|key| key.contains('@') || *key == "map") {
            if let Some(value) = number(metric) {
                let name = MetricName { metric: metric.clone(), set: set.to_owned() };
                self.metrics.entry(name).or_default().push((step, value));
            }
        }
    }
}

fn read_queries(path: &Path) -> Result<BTreeMap<String, SetQueries>> {
    if !path.is_file() {
        return Ok(BTreeMap::new());
    }
    let text = read_text_file(path, "read the evaluation queries", MAX_QUERIES_BYTES)?;
    serde_json::from_str(&text).map_err(|e| {
        Error::new(ErrorKind::Data, "the evaluation queries cannot be read").file(path).because(e)
    })
}
