//! The report that a training run writes of itself while it goes on.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use llara::train::plan::MachineMemory;
use llara::{Result, refresh_file};

use super::facts::{FACTS_FILE, ReportFacts};
use super::page::page;
use super::run_data::RunData;
use super::{REPORT_FILE, check_is_own};
use crate::talk::say;

/// Least time between two versions.
const INTERVAL: Duration = Duration::from_secs(10);
/// Writing the report takes at most this share of the time.
const SHARE: u32 = 50;

/// Writes `run.json` and `report.html` now and then. A failure is a warning: it must not end the run.
pub(crate) struct OwnReport {
    folder: PathBuf,
    facts: ReportFacts,
    /// Whether tensors are in the memory of the process, so that its peak is that of the run.
    measures_process: bool,
    next: Instant,
    failed: bool,
}

impl OwnReport {
    /// The report of a run that starts.
    pub(crate) fn new(folder: PathBuf, facts: ReportFacts, measures_process: bool) -> Self {
        OwnReport { folder, facts, measures_process, next: Instant::now(), failed: false }
    }

    /// Writes a new version if the last one is old enough.
    pub(crate) fn refresh(&mut self) {
        if Instant::now() >= self.next {
            self.write();
        }
    }

    /// Writes the last version.
    pub(crate) fn write(&mut self) {
        let start = Instant::now();
        if let Err(error) = self.try_write()
            && !std::mem::replace(&mut self.failed, true)
        {
            say!("warning: the report could not be written: {error}");
        }
        self.next = Instant::now() + INTERVAL.max(start.elapsed() * SHARE);
    }

    fn try_write(&mut self) -> Result<()> {
        if self.measures_process {
            self.facts.measured_peak = MachineMemory::peak_of_process();
        }
        check_is_own(&self.folder.join(REPORT_FILE))?;
        refresh_file(&self.folder.join(FACTS_FILE), &self.facts.to_json()?)?;
        let page = page(&[RunData::read(&self.folder)?]);
        refresh_file(&self.folder.join(REPORT_FILE), page.as_bytes())
    }
}
