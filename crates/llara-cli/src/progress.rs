//! Progress of a run: a progress bar on a terminal, otherwise a line every few seconds.

use std::cell::Cell;
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use llara::Result;
use llara::inspect::{Phase, Progress};
use llara::train::{Observer, RunLog, StepRecord};

use super::interrupt;
use super::talk::{bytes, count, counted, say};

/// Time between two lines if standard error is not a terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// A progress bar, if standard error is a terminal. `state` returns the text of its `{state}`.
fn bar(
    total: u64,
    template: &str,
    state: impl Fn(&ProgressState) -> String + Clone + Send + Sync + 'static,
) -> Option<ProgressBar> {
    let write = move |bar: &ProgressState, out: &mut dyn Write| {
        let _ = out.write_str(&state(bar));
    };
    let style = ProgressStyle::with_template(template).ok()?.progress_chars("=> ");
    let style = style.with_key("state", write);
    std::io::stderr().is_terminal().then(|| ProgressBar::new(total).with_style(style))
}

/// Writes the log of a training run and shows its progress.
pub(super) struct TrainingProgress {
    log: RunLog,
    bar: Option<ProgressBar>,
    /// The bar's text. It is not set through the bar, so that a step draws the bar only once.
    state: Arc<Mutex<String>>,
    start: Instant,
    /// Number of steps before this start of the run.
    first: u64,
    /// When the run stops.
    deadline: Option<Instant>,
}

impl TrainingProgress {
    /// The progress of a run that continues after step `first` and stops at `deadline`.
    pub(super) fn new(
        log: RunLog,
        (first, total_steps): (u64, u64),
        deadline: Option<Instant>,
    ) -> Self {
        let state = Arc::new(Mutex::new(String::new()));
        let shown = state.clone();
        let bar = bar(total_steps, "[{bar:30}] {pos}/{len}  {state}  {eta} left", move |_| {
            shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
        });
        if let Some(bar) = &bar {
            bar.set_position(first);
            bar.reset_eta();
        }
        TrainingProgress { log, bar, state, start: Instant::now(), first, deadline }
    }

    /// Removes the bar.
    pub(super) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn state(record: &StepRecord) -> String {
    format!("loss {:.4}  {} tokens/s", record.loss, count(record.tokens_per_second() as usize))
}

impl Observer for TrainingProgress {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        if let Some(bar) = &self.bar {
            *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state(record);
            bar.update(|bar| bar.set_pos(record.step));
        }
        Ok(())
    }

    fn on_log(&mut self, record: &StepRecord) -> Result<()> {
        self.log.write(record)?;
        if self.bar.is_none() {
            let (step, total) = (record.step, record.total_steps);
            let made = step.saturating_sub(self.first).max(1);
            let left = self.start.elapsed().as_secs_f64() / made as f64 * (total - step) as f64;
            say!("step {step}/{total}  {}  {} left", state(record), clock(left));
        }
        Ok(())
    }

    fn on_save(&mut self, folder: &Path) -> Result<()> {
        let report = || say!("saved {}", folder.display());
        match &self.bar {
            Some(bar) => bar.suspend(report),
            None => report(),
        }
        Ok(())
    }

    fn stops(&mut self) -> bool {
        interrupt::received() || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// Shows the progress of encoding texts.
pub(super) struct TextProgress {
    bar: Option<ProgressBar>,
    total: usize,
    done: Cell<usize>,
    start: Instant,
    last_line: Cell<Instant>,
}

impl TextProgress {
    pub(super) fn new(total: usize) -> Self {
        let template = "[{bar:30}] {pos}/{len} texts  {state}/s  {eta} left";
        let bar = bar(total as u64, template, |bar| count(bar.per_sec() as usize));
        let now = Instant::now();
        TextProgress { bar, total, done: Cell::new(0), start: now, last_line: Cell::new(now) }
    }

    /// Adds `texts` to the number of completed texts.
    pub(super) fn add(&self, texts: usize) {
        let done = self.done.get() + texts;
        self.done.set(done);
        match &self.bar {
            Some(bar) => bar.set_position(done as u64),
            None if self.last_line.get().elapsed() >= LINE_INTERVAL => {
                self.last_line.set(Instant::now());
                let left = self.start.elapsed().as_secs_f64() / done.max(1) as f64
                    * self.total.saturating_sub(done) as f64;
                say!("{done}/{} texts  {} left", self.total, clock(left));
            }
            None => {}
        }
    }

    /// Removes the bar and prints the elapsed time.
    pub(super) fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.start.elapsed().as_secs_f64();
        let done = self.done.get();
        let rate = done as f64 / seconds;
        say!("{} in {seconds:.1} s, {} texts/s", counted(done, "text"), count(rate as usize));
    }
}

/// Shows the progress of an inspection of data.
pub(super) struct InspectionProgress {
    bar: Option<ProgressBar>,
    phase: Option<Phase>,
    start: Instant,
    last_line: Instant,
}

impl InspectionProgress {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        InspectionProgress { bar: None, phase: None, start: now, last_line: now }
    }

    /// Shows how far the inspection is.
    pub(super) fn show(&mut self, Progress { phase, done, total }: Progress) {
        let amount = move |n: u64| match phase {
            Phase::Reading => bytes(n),
            Phase::Comparing | Phase::Tokenizing => count(n as usize),
        };
        let name = match phase {
            Phase::Reading => "reading",
            Phase::Comparing => "comparing hashes",
            Phase::Tokenizing => "tokenizing rows",
        };
        if self.phase != Some(phase) {
            self.remove_bar();
            let template = format!("[{{bar:30}}] {name} {{state}}  {{eta}} left");
            let state = move |bar: &ProgressState| {
                format!("{}/{}", amount(bar.pos()), amount(bar.len().unwrap_or(0)))
            };
            self.bar = bar(total, &template, state);
            self.phase = Some(phase);
            self.start = Instant::now();
        }
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.last_line.elapsed() >= LINE_INTERVAL && done > 0 => {
                self.last_line = Instant::now();
                let seconds = self.start.elapsed().as_secs_f64();
                let left = seconds / done as f64 * total.saturating_sub(done) as f64;
                say!("{name} {}/{}  {} left", amount(done), amount(total), clock(left));
            }
            None => {}
        }
    }

    /// Removes the bar.
    pub(super) fn finish(mut self) {
        self.remove_bar();
    }

    fn remove_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

/// Seconds as `h:mm:ss` or `m:ss`.
fn clock(seconds: f64) -> String {
    let s = seconds.round() as u64;
    match s / 3600 {
        0 => format!("{}:{:02}", s / 60, s % 60),
        hours => format!("{hours}:{:02}:{:02}", s / 60 % 60, s % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_carry() {
        assert_eq!([59.6, 61.0, 3723.0].map(clock), ["1:00", "1:01", "1:02:03"]);
    }
}
