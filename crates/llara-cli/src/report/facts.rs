//! `run.json`: what is known of a run when it starts, and its peak memory while it goes on.

use std::path::Path;

use llara::data::{Histogram, LengthSummary};
use llara::{Error, ErrorKind, Result, read_text_file};
use serde::{Deserialize, Serialize};

/// Name of the file in the output folder.
pub(crate) const FACTS_FILE: &str = "run.json";
/// No such file is larger.
const MAX_BYTES: u64 = 64 << 20;

/// The start of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ReportFacts {
    /// Version of the program.
    pub(crate) llara: String,
    /// Settings by name, in the order in which they are shown.
    pub(crate) settings: Vec<(String, String)>,
    /// Names and rows of the data files.
    pub(crate) data: Vec<(String, u64)>,
    /// Steps of the run.
    pub(crate) total_steps: u64,
    /// Predicted memory of a step by category, in bytes.
    pub(crate) planned_memory: Vec<(String, u64)>,
    /// Predicted peak, in bytes, and what the process does then.
    pub(crate) planned_peak: (u64, String),
    /// Peak memory of the process so far, in bytes; `None` where the system does not report it, or where
    /// tensors are in the memory of a GPU.
    pub(crate) measured_peak: Option<u64>,
    /// Lengths of queries and passages.
    pub(crate) lengths: Vec<Lengths>,
}

/// Lengths of the texts of one role, in tokens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lengths {
    pub(crate) role: String,
    /// Maximum length.
    pub(crate) max_len: usize,
    /// Fraction of texts that are longer.
    pub(crate) truncated_share: f64,
    pub(crate) summary: LengthSummary,
    pub(crate) histogram: Histogram,
}

impl ReportFacts {
    /// The facts of a run, if the file exists.
    pub(super) fn read(path: &Path) -> Result<Option<Self>> {
        if !path.is_file() {
            return Ok(None);
        }
        let facts = serde_json::from_str(&read_text_file(path, "read the settings of the run", MAX_BYTES)?).map_err(|e| {
            Error::new(ErrorKind::Data, "the settings of the run cannot be read")
                .file(path)
                .because(e)
                .hint("the run may be of another version of this program; without the file, the report \
                     has no settings")
        })?;
        Ok(Some(facts))
    }

    /// The file's contents.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(ErrorKind::Data, "cannot write the settings").because(e))
    }
}
