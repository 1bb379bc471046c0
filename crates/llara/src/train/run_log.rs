//! What stays of a run: `log.jsonl`, one object a logged step and one an evaluated set, TensorBoard events
//! beside it, and `eval_queries.json`, the best and the worst queries of the last evaluation.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::evaluation::{EvalMetric, SetReport};
use super::observer::{EvalEvent, StepRecord};
use super::tensorboard::EventWriter;
use crate::storage::{refresh_file, remove_unfinished_file};
use crate::{Error, Result};

/// Name of the log in the output folder.
const LOG_FILE: &str = "log.jsonl";
/// Folder of the TensorBoard events in the output folder.
const EVENTS_DIR: &str = "runs";

/// The reports of the last evaluation.
const QUERIES_FILE: &str = "eval_queries.json";

/// Both logs of a run; every record is on its way to the disk when [`write`](RunLog::write) returns.
pub struct RunLog {
    path: PathBuf,
    queries: PathBuf,
    lines: BufWriter<File>,
    events: EventWriter,
}

/// Means are over the steps since the last record.
#[derive(Serialize)]
struct Line {
    step: u64,
    epoch: f64,
    loss: f32,
    /// `loss_NAME` of each term; null without a value.
    #[serde(flatten)]
    terms: Map<String, Value>,
    grad_norm: f32,
    learning_rate: f64,
    tokens: u64,
    tokens_per_second: f64,
    seconds: f64,
}

/// What is read of a line.
#[derive(Deserialize)]
struct Logged {
    step: u64,
    /// Of an evaluation.
    eval_dataset: Option<String>,
}

impl RunLog {
    /// Begins new logs in `output_dir`. Reports of an earlier run are removed.
    pub fn create(output_dir: &Path) -> Result<Self> {
        let queries = output_dir.join(QUERIES_FILE);
        match std::fs::remove_file(&queries) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &queries, e));
            }
            _ => {}
        }
        let path = output_dir.join(LOG_FILE);
        let lines = File::create(&path).map_err(|e| Error::io("write the log", &path, e))?;
        Self::open(output_dir, path, lines)
    }

    /// Continues the logs of a run that is resumed after `steps` steps, of which the last evaluated one is
    /// `evaluated`: lines of steps and evaluations that are made again are removed.
    pub fn resume(output_dir: &Path, steps: u64, evaluated: Option<u64>) -> Result<Self> {
        let path = output_dir.join(LOG_FILE);
        let kept = match std::fs::read_to_string(&path) {
            Ok(text) => text
                .split_inclusive('\n')
                .filter(|line| {
                    // A last line that was cut off has no end.
                    let stays = |logged: Logged| match logged.eval_dataset {
                        Some(_) => evaluated.is_some_and(|last| logged.step <= last),
                        None => logged.step <= steps,
                    };
                    line.ends_with('\n') && serde_json::from_str(line).is_ok_and(stays)
                })
                .collect(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io("read the log", &path, e)),
        };
        refresh_file(&path, kept.as_bytes())?;
        let file = File::options().append(true).open(&path);
        Self::open(
            output_dir,
            path.clone(),
            file.map_err(|e| Error::io("write the log", &path, e))?,
        )
    }

    fn open(output_dir: &Path, path: PathBuf, lines: File) -> Result<Self> {
        let queries = output_dir.join(QUERIES_FILE);
        [&path, &queries].into_iter().for_each(|path| remove_unfinished_file(path));
        let events_dir = output_dir.join(EVENTS_DIR);
        std::fs::create_dir_all(&events_dir)
            .map_err(|e| Error::io("create the folder", &events_dir, e))?;
        let events = EventWriter::create(&events_dir)?;
        Ok(RunLog { path, queries, lines: BufWriter::new(lines), events })
    }

    /// Adds one record to both.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        let named = |(name, value)| (format!("loss_{name}"), Value::from(value));
        let line = Line {
            step: record.step,
            epoch: record.epoch,
            loss: record.loss,
            terms: record.terms.iter().map(named).collect(),
            grad_norm: record.grad_norm,
            learning_rate: record.learning_rate,
            tokens: record.tokens,
            tokens_per_second: record.tokens_per_second(),
            seconds: record.elapsed.as_secs_f64(),
        };
        self.write_line(&line)?;
        for (tag, value) in [
            ("train/loss", record.loss),
            ("train/grad_norm", record.grad_norm),
            ("train/learning_rate", record.learning_rate as f32),
            ("train/epoch", record.epoch as f32),
            ("speed/tokens_per_second", record.tokens_per_second() as f32),
        ] {
            self.events.scalar(record.step, tag, value)?;
        }
        for (name, value) in record.terms.iter().filter(|(_, value)| !value.is_nan()) {
            self.events.scalar(record.step, &format!("train/loss_{name}"), value)?;
        }
        self.events.flush()
    }

    /// Adds the figures of an evaluation to both and replaces the reports.
    pub fn write_evaluation(&mut self, event: &EvalEvent<'_>) -> Result<()> {
        let records = &event.evaluated.records;
        for record in records {
            self.write_line(record)?;
            for metric in EvalMetric::ALL {
                let tag = format!("eval/{}/{}", record.dataset, metric.name());
                self.events.scalar(record.step, &tag, record.value(metric) as f32)?;
            }
        }
        self.events.flush()?;
        SetReport::write(event.reports, records, &self.queries)
    }

    fn write_line(&mut self, line: &impl Serialize) -> Result<()> {
        let io = |e: std::io::Error| Error::io("write the log", &self.path, e);
        serde_json::to_writer(&mut self.lines, line).map_err(|e| io(e.into()))?;
        self.lines.write_all(b"\n").and_then(|()| self.lines.flush()).map_err(io)
    }
}
