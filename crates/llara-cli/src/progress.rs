//! Progress of a run: a progress bar on a terminal, otherwise a line every few seconds.

use std::cell::Cell;
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressState, ProgressStyle};
use llara::inspect::{Phase, Progress};
use llara::train::{EvalEvent, Evaluation, Observer, RunLog, StepRecord};
use llara::{Error, Result};

use super::report::OwnReport;
use super::talk::{bytes, count, counted, say};
use super::{eval_report, interrupt};

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
pub(super) struct TrainingProgress<'e> {
    log: RunLog,
    report: OwnReport,
    bar: Option<ProgressBar>,
    /// The bar's text. It is not set through the bar, so that a step draws the bar only once.
    state: Arc<Mutex<String>>,
    left: TimeLeft<'e>,
    last_line: Instant,
    /// When the run stops.
    deadline: Option<Instant>,
}

impl<'e> TrainingProgress<'e> {
    /// The progress of a run that continues after step `first` and stops at `deadline`. `evaluation` is what is
    /// evaluated, and the seconds that the last evaluation before this start took, if there was one.
    pub(super) fn new(
        log: RunLog,
        report: OwnReport,
        (first, total_steps): (u64, u64),
        evaluation: Option<(&'e Evaluation, Option<f64>)>,
        deadline: Option<Instant>,
    ) -> Self {
        let state = Arc::new(Mutex::new(String::new()));
        let shown = state.clone();
        let bar = bar(total_steps, "[{bar:30}] {pos}/{len}  {state}", move |_| {
            shown.lock().unwrap_or_else(PoisonError::into_inner).clone()
        });
        if let Some(bar) = &bar {
            bar.set_position(first);
        }
        let left = TimeLeft::new((first, total_steps), evaluation);
        TrainingProgress { log, report, bar, state, left, last_line: Instant::now(), deadline }
    }

    /// Removes the bar and writes the last version of the report.
    pub(super) fn finish(mut self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        self.report.write();
    }

    fn set_state(&self, state: String) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Prints a line above the bar.
    fn print(&self, line: &str) {
        let print = || say!("{line}");
        match &self.bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }
}

/// Estimates the remaining time of a run from its time so far. Steps and evaluations are counted apart.
struct TimeLeft<'e> {
    start: Instant,
    /// Number of steps before this start of the run.
    first: u64,
    total_steps: u64,
    evaluation: Option<&'e Evaluation>,
    /// Seconds of the last evaluation.
    last_evaluation: f64,
    /// Seconds of all evaluations since the start.
    evaluations: f64,
}

impl<'e> TimeLeft<'e> {
    fn new(
        (first, total_steps): (u64, u64),
        evaluation: Option<(&'e Evaluation, Option<f64>)>,
    ) -> Self {
        TimeLeft {
            start: Instant::now(),
            first,
            total_steps,
            evaluation: evaluation.map(|(evaluation, _)| evaluation),
            last_evaluation: evaluation.and_then(|(_, seconds)| seconds).unwrap_or(0.0),
            evaluations: 0.0,
        }
    }

    fn add_evaluation(&mut self, seconds: f64) {
        self.last_evaluation = seconds;
        self.evaluations += seconds;
    }

    /// Seconds from the end of `step` to the end of the run.
    fn after(&self, step: u64) -> f64 {
        self.after_time(step, self.start.elapsed().as_secs_f64())
    }

    /// [`after`](Self::after), if `elapsed` seconds have passed since the start.
    fn after_time(&self, step: u64, elapsed: f64) -> f64 {
        let made = step.saturating_sub(self.first).max(1);
        let of_step = (elapsed - self.evaluations).max(0.0) / made as f64;
        let total = self.total_steps;
        let evaluations = self.evaluation.map_or(0, |evaluation| evaluation.remaining(step, total));
        of_step * total.saturating_sub(step) as f64 + self.last_evaluation * evaluations as f64
    }
}

fn state(record: &StepRecord) -> String {
    format!("loss {:.4}  {} tokens/s", record.loss, count(record.tokens_per_second() as usize))
}

impl Observer for TrainingProgress<'_> {
    fn on_step(&mut self, record: &StepRecord) -> Result<()> {
        if let Some(bar) = &self.bar {
            let left = clock(self.left.after(record.step));
            self.set_state(format!("{}  {left} left", state(record)));
            bar.update(|bar| bar.set_pos(record.step));
        }
        Ok(())
    }

    fn on_log(&mut self, record: &StepRecord) -> Result<()> {
        self.log.write(record)?;
        self.report.refresh();
        if self.bar.is_none() {
            let (step, total) = (record.step, record.total_steps);
            let left = clock(self.left.after(step));
            say!("step {step}/{total}  {}  {left} left", state(record));
        }
        Ok(())
    }

    fn on_evaluation_progress(&mut self, done: usize, total: usize) {
        let state = format!("evaluating {}/{} texts", count(done), count(total));
        match &self.bar {
            Some(bar) => {
                self.set_state(state);
                bar.tick();
            }
            None if self.last_line.elapsed() >= LINE_INTERVAL => {
                self.last_line = Instant::now();
                say!("{state}");
            }
            None => {}
        }
    }

    fn on_evaluate(&mut self, event: &EvalEvent<'_>) -> Result<()> {
        self.log.write_evaluation(event)?;
        self.left.add_evaluation(event.evaluated.seconds());
        eval_report::lines(event).iter().for_each(|line| self.print(line));
        Ok(())
    }

    fn on_save(&mut self, folder: &Path) -> Result<()> {
        self.print(&format!("saved {}", folder.display()));
        Ok(())
    }

    fn on_save_failed(&mut self, error: Error) -> Result<()> {
        self.print(&format!("warning: {error}"));
        Ok(())
    }

    fn stops(&mut self) -> bool {
        stops(self.deadline)
    }
}

/// The observer of a process that neither logs nor prints: it only stops the run.
pub(super) struct Follower {
    /// When the run stops.
    pub(super) deadline: Option<Instant>,
}

impl Observer for Follower {
    fn on_step(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_log(&mut self, _: &StepRecord) -> Result<()> {
        Ok(())
    }

    fn on_save(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }

    fn on_save_failed(&mut self, _: Error) -> Result<()> {
        // The first process prints it.
        Ok(())
    }

    fn stops(&mut self) -> bool {
        stops(self.deadline)
    }
}

/// Whether a signal was received, or the time of the run is over.
fn stops(deadline: Option<Instant>) -> bool {
    interrupt::received() || deadline.is_some_and(|deadline| Instant::now() >= deadline)
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
        self.set(self.done.get() + texts);
    }

    /// Sets the number of completed texts.
    pub(super) fn set(&self, done: usize) {
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

/// Shows the progress of reading files.
pub(super) struct ByteProgress {
    bar: Option<ProgressBar>,
    total: u64,
    done: Cell<u64>,
    last_line: Cell<Instant>,
}

impl ByteProgress {
    pub(super) fn new(total: u64) -> Self {
        let template = "[{bar:30}] {binary_bytes}/{binary_total_bytes}  {state}/s  {eta} left";
        let bar = bar(total, template, |bar| bytes(bar.per_sec() as u64));
        ByteProgress { bar, total, done: Cell::new(0), last_line: Cell::new(Instant::now()) }
    }

    /// Adds `read` to the number of bytes that were read.
    pub(super) fn add(&self, read: u64) {
        let done = self.done.get() + read;
        self.done.set(done);
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if self.last_line.get().elapsed() >= LINE_INTERVAL => {
                self.last_line.set(Instant::now());
                say!("{} of {} read", bytes(done), bytes(self.total));
            }
            None => {}
        }
    }

    /// Removes the bar.
    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
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

    #[test]
    fn the_time_left_has_a_part_for_each_remaining_evaluation() {
        let evaluation = Evaluation { every: Some(10), ..Evaluation::new(Vec::new()) };
        let mut left = TimeLeft::new((0, 40), Some((&evaluation, None)));
        assert_eq!(left.after_time(5, 10.0), 70.0);
        left.add_evaluation(3.0);
        // Of 33 seconds three were an evaluation; those after the steps 20, 30 and 40 remain.
        assert_eq!(left.after_time(10, 33.0), 3.0 * 30.0 + 3.0 * 3.0);
        assert_eq!(left.after_time(40, 120.0), 0.0);
        let resumed = TimeLeft::new((30, 40), Some((&evaluation, Some(4.0))));
        assert_eq!(resumed.after_time(35, 10.0), 2.0 * 5.0 + 4.0);
        assert_eq!(TimeLeft::new((0, 40), None).after_time(10, 10.0), 30.0);
    }
}
