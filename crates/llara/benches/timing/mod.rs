//! Timing for the benches: warm-up, then alternating runs; the median and the minimum.

#![allow(dead_code, reason = "not every bench uses all items")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use llara::Result;
use llara::backend::gemm::Unit;

/// Minimum and maximum number of measured runs, and the time limit of a case between the two.
const FEWEST_RUNS: usize = 3;
const MOST_RUNS: usize = 101;
const TIME: Duration = Duration::from_millis(500);

/// The selected cases: `cargo bench --bench NAME -- FILTER…` runs those whose names contain one of the filters, or
/// all without a filter.
pub(crate) struct Cases {
    filters: Vec<String>,
}

impl Cases {
    /// From the command line; prints the number of threads and the vector instructions in use. `None` if
    /// the program was not started by `cargo bench`: `cargo test --all-targets` should not wait for it.
    pub(crate) fn from_args() -> Option<Cases> {
        let (flags, filters): (Vec<_>, _) =
            std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
        if !flags.iter().any(|flag| flag == "--bench") {
            return None;
        }
        let unit = match Unit::selected() {
            Ok(unit) => unit,
            Err(error) => {
                eprintln!("error: {error}");
                std::process::exit(1);
            }
        };
        println!("{} threads, {unit:?}{}", rayon::current_num_threads(), load());
        Some(Cases { filters })
    }

    /// Whether the case of this name is selected.
    pub(crate) fn include(&self, name: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|filter| name.contains(filter))
    }
}

/// The load of the machine, if it is reported: measurements on a busy machine are not valid.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    match text.split_whitespace().next().and_then(|load| load.parse::<f32>().ok()) {
        Some(load) if load > 0.5 => format!(", BUSY: load {load:.1} at the start"),
        _ => String::new(),
    }
}

/// Seconds of the runs of one workload. If the two differ much, the machine was busy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Times {
    pub(crate) median: f64,
    pub(crate) fastest: f64,
}

/// Measures one workload. The first run is not counted.
pub(crate) fn time<T>(mut work: impl FnMut() -> Result<T>) -> Result<Times> {
    let mut work = || work().map(|result| drop(black_box(result)));
    in_turn([&mut work]).map(|[times]| times)
}

/// The same for several workloads, which run alternately, so that other load on the machine affects all equally.
pub(crate) fn in_turn<const N: usize>(
    mut contestants: [&mut dyn FnMut() -> Result<()>; N],
) -> Result<[Times; N]> {
    let mut seconds = [const { Vec::new() }; N];
    contestants.iter_mut().try_for_each(|work| work())?;
    let begin = Instant::now();
    for run in 0..MOST_RUNS {
        if run >= FEWEST_RUNS && begin.elapsed() > TIME * N as u32 {
            break;
        }
        for (work, seconds) in contestants.iter_mut().zip(&mut seconds) {
            let start = Instant::now();
            work()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        Times { median: seconds[seconds.len() / 2], fastest: seconds[0] }
    }))
}
