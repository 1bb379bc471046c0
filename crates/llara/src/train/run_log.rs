//! What stays of a run: `log.jsonl`, one object a logged step, and TensorBoard events beside it.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::tensorboard::EventWriter;
use super::trainer::StepRecord;
use crate::storage::OutputFile;
use crate::{Error, Result};

/// Name of the log in the output folder.
const LOG_FILE: &str = "log.jsonl";
/// Folder of the TensorBoard events in the output folder.
const EVENTS_DIR: &str = "runs";

/// Both logs of a run; every record is on its way to the disk when [`write`](RunLog::write) returns.
pub struct RunLog {
    path: PathBuf,
    lines: BufWriter<File>,
    events: EventWriter,
}

/// Means are over the steps since the last record.
#[derive(Serialize)]
struct Line {
    step: u64,
    epoch: f64,
    loss: f32,
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
}

impl RunLog {
    /// Begins new logs in `output_dir`.
    pub fn create(output_dir: &Path) -> Result<Self> {
        let path = output_dir.join(LOG_FILE);
        let lines = File::create(&path).map_err(|e| Error::io("write the log", &path, e))?;
        Self::open(output_dir, path, lines)
    }

    /// Continues the logs of a run that is resumed after so many steps: later lines, of steps that are made
    /// again, are removed.
    pub fn resume(output_dir: &Path, steps: u64) -> Result<Self> {
        let path = output_dir.join(LOG_FILE);
        let kept = match std::fs::read_to_string(&path) {
            Ok(text) => text
                .split_inclusive('\n')
                .filter(|line| {
                    // A last line that was cut off has no end.
                    let step = serde_json::from_str::<Logged>(line).map(|logged| logged.step);
                    line.ends_with('\n') && step.is_ok_and(|step| step <= steps)
                })
                .collect(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(Error::io("read the log", &path, e)),
        };
        let mut file = OutputFile::create(&path)?;
        file.write(kept.as_bytes())?;
        file.commit()?;
        let file = File::options().append(true).open(&path);
        Self::open(
            output_dir,
            path.clone(),
            file.map_err(|e| Error::io("write the log", &path, e))?,
        )
    }

    fn open(output_dir: &Path, path: PathBuf, lines: File) -> Result<Self> {
        let events_dir = output_dir.join(EVENTS_DIR);
        std::fs::create_dir_all(&events_dir)
            .map_err(|e| Error::io("create the folder", &events_dir, e))?;
        let events = EventWriter::create(&events_dir)?;
        Ok(RunLog { path, lines: BufWriter::new(lines), events })
    }

    /// Adds one record to both.
    pub fn write(&mut self, record: &StepRecord) -> Result<()> {
        let line = Line {
            step: record.step,
            epoch: record.epoch,
            loss: record.loss,
            grad_norm: record.grad_norm,
            learning_rate: record.learning_rate,
            tokens: record.tokens,
            tokens_per_second: record.tokens_per_second(),
            seconds: record.elapsed.as_secs_f64(),
        };
        let io = |e: std::io::Error| Error::io("write the log", &self.path, e);
        serde_json::to_writer(&mut self.lines, &line).map_err(|e| io(e.into()))?;
        self.lines.write_all(b"\n").and_then(|()| self.lines.flush()).map_err(io)?;
        for (tag, value) in [
            ("train/loss", record.loss),
            ("train/grad_norm", record.grad_norm),
            ("train/learning_rate", record.learning_rate as f32),
            ("train/epoch", record.epoch as f32),
            ("speed/tokens_per_second", record.tokens_per_second() as f32),
        ] {
            self.events.scalar(record.step, tag, value)?;
        }
        self.events.flush()
    }
}
