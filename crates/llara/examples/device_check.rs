//! Checks the CUDA backend on a machine with an NVIDIA GPU, without a toolchain and without network access.
//!
//! ```text
//! device_check describe                      the GPU, its driver and libraries, its memory
//! device_check conform [FAMILY...]           the conformance suite, twice: same numbers, same bits
//! device_check attention                     tensor cores against plain kernels
//! device_check gradients FOLDER              embeddings and every gradient against the CPU
//! device_check objectives FOLDER             masks, distillation, chunks and pretraining against the CPU
//! device_check train FOLDER [STEPS]          losses of a training run against the CPU
//! device_check transfers                     copies that overlap with each other and with the host
//! device_check speed [MODEL [LAYERS]]        rates of products, attention and training steps
//! ```
//!
//! Prints one line per check. The exit code is 1 if a check failed, 2 if the GPU or a file could not be used.
//! `--device cpu` before the verb tests the checks on the CPU.

#[path = "device_check/attention.rs"]
mod attention;
#[path = "device_check/objectives.rs"]
mod objectives;
#[path = "device_check/speed.rs"]
mod speed;
#[path = "device_check/training.rs"]
mod training;
#[path = "device_check/transfers.rs"]
mod transfers;

use std::process::ExitCode;
use std::time::Instant;

use llara::backend::conformance::{self, Case};
use llara::backend::{Backend, Cpu, Cuda};
use llara::{Error, ErrorKind, Result};

/// Counts failed checks, and prints each check when it ends.
#[derive(Default)]
struct Report {
    checks: usize,
    failures: Vec<String>,
}

impl Report {
    /// A check of a number that must not exceed its bound; NaN fails.
    fn within(&mut self, what: &str, error: f64, bound: f64) {
        self.holds(what, error <= bound, &format!("{error:.2e} of {bound:.1e}"));
    }

    fn holds(&mut self, what: &str, holds: bool, detail: &str) {
        self.checks += 1;
        println!("{:6} {what}: {detail}", if holds { "ok" } else { "FAILED" });
        if !holds {
            self.failures.push(what.to_owned());
        }
    }
}

fn main() -> ExitCode {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let on_cpu = args.starts_with(&["--device".to_owned(), "cpu".to_owned()]);
    if on_cpu {
        args.drain(..2);
    }
    let result = if on_cpu {
        check(Cpu::new(), &args)
    } else {
        Cuda::new(0).and_then(|cuda| {
            let report = check(cuda.clone(), &args);
            println!("products without an algorithm of cuBLASLt: {}", cuda.fallback_products());
            for (name, time) in cuda.take_profile() {
                let seconds = time.total.as_secs_f64();
                let each = seconds * 1e6 / time.launches as f64;
                println!("{:10.1} ms {:6} x {each:8.1} us  {name}", seconds * 1e3, time.launches);
            }
            report
        })
    };
    match result {
        Ok(report) if report.failures.is_empty() => {
            println!("{} checks passed", report.checks);
            ExitCode::SUCCESS
        }
        Ok(report) => {
            println!("{} of {} checks FAILED:", report.failures.len(), report.checks);
            report.failures.iter().for_each(|failure| println!("  {failure}"));
            ExitCode::FAILURE
        }
        Err(e) => {
            println!("FAILED {e}");
            ExitCode::from(2)
        }
    }
}

fn check<B: Backend>(backend: B, args: &[String]) -> Result<Report> {
    let mut report = Report::default();
    let (verb, rest) = args.split_first().ok_or_else(usage)?;
    println!("device: {}", backend.description());
    match (verb.as_str(), rest) {
        ("describe", []) => {
            if let Some((free, total)) = backend.free_and_total_bytes()? {
                let used = (total - free) as f64 / f64::from(1 << 20);
                println!("memory: {used:.0} MiB in use after opening");
            }
        }
        ("conform", families) => conform(&backend, families, &mut report)?,
        ("attention", []) => attention::check(&backend, &mut report)?,
        ("gradients", [folder]) => training::gradients(&backend, folder, &mut report)?,
        ("objectives", [folder]) => objectives::check(&backend, folder, &mut report)?,
        ("transfers", []) => transfers::check(&backend, &mut report)?,
        ("train", [folder]) => training::losses(&backend, folder, 50, &mut report)?,
        ("train", [folder, steps]) => {
            let steps = steps.parse().map_err(|_| usage())?;
            training::losses(&backend, folder, steps, &mut report)?;
        }
        ("speed", rest) => speed::measure(&backend, rest)?,
        _ => return Err(usage()),
    }
    Ok(report)
}

fn usage() -> Error {
    Error::new(ErrorKind::Argument, "device_check: unknown arguments")
        .hint("describe | conform [FAMILY...] | attention | gradients FOLDER | objectives FOLDER | train FOLDER [STEPS] | transfers | speed [MODEL [LAYERS]]")
}

/// The conformance suite, each family twice.
fn conform<B: Backend>(backend: &B, families: &[String], report: &mut Report) -> Result<()> {
    type Family<B> = fn(&B) -> Result<Vec<Case>>;
    let all: [(&str, Family<B>); 7] = [
        ("products", conformance::products),
        ("rows", conformance::rows),
        ("norms", conformance::norms),
        ("attention", conformance::attention),
        ("pointwise", conformance::pointwise),
        ("objective", conformance::objective),
        ("mixed", conformance::mixed),
    ];
    for (name, family) in all {
        if !families.is_empty() && !families.iter().any(|wanted| wanted == name) {
            continue;
        }
        let start = Instant::now();
        let (first, second) = (family(backend)?, family(backend)?);
        for (first, second) in first.iter().zip(&second) {
            let same = first.bits == second.bits;
            let detail = format!(
                "{:.1e} of {:.1e} in {} checks{}",
                first.worst,
                first.allowed,
                first.checks,
                if same { "" } else { "; DIFFERENT BITS in the second run" },
            );
            report.holds(first.name, first.passed() && second.passed() && same, &detail);
            if !first.passed() {
                println!("       {}", first.detail);
            }
        }
        println!("       {name}: {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}
