//! How time and memory of a training step scale with the length of sequences, batch size, layers and threads.
//!
//! `cargo bench --bench growth -- [FILTER…]`, where a filter is the name of a series. Every point is measured in a
//! separate process, because the peak memory of a process cannot be reset. Bars show the time relative to that of
//! the first point; every six characters are a factor of two. `·` marks proportional growth.

mod random_model;
mod timing;
mod training;

use std::process::Command;

use llara::backend::Dtype;
use llara::train::Chunking;
use llara::train::plan::MachineMemory;
use llara::{Error, ErrorKind, Result};

use random_model::ModelShape;
use timing::Cases;
use training::Training;

/// Passages of a query.
const PASSAGES: usize = 3;
/// The environment variable that makes this program measure one point and print it.
const POINT: &str = "LLARA_GROWTH_POINT";

/// A training step in f32 or bf16, with a number of groups of sequences of one length.
#[derive(Clone, Copy)]
struct Point {
    bf16: bool,
    length: usize,
    groups: usize,
    /// Tokens of a chunk; 0: the whole batch in one.
    chunk: usize,
    layers: usize,
    threads: usize,
}

const BASE: Point = Point { bf16: false, length: 64, groups: 2, chunk: 0, layers: 4, threads: 0 };

/// A series of points: the quantity that is multiplied, and the factors.
struct Series {
    name: &'static str,
    about: &'static str,
    factors: &'static [usize],
    point: fn(usize) -> Point,
    /// Time relative to the first point if growth is proportional.
    proportional: fn(f64) -> f64,
}

const SERIES: [Series; 4] = [
    Series {
        name: "length",
        about: "8 sequences of 32 tokens × n, in one pass",
        factors: &[1, 2, 4, 8, 16],
        point: |n| Point { length: 32 * n, ..BASE },
        proportional: |n| n,
    },
    Series {
        name: "batch",
        about: "4 sequences × n of 64 tokens, in chunks of 1,024 tokens",
        factors: &[1, 2, 4, 8, 16, 32, 64],
        point: |n| Point { groups: n, chunk: 1024, ..BASE },
        proportional: |n| n,
    },
    Series {
        name: "layers",
        about: "n layers, 16 sequences of 64 tokens",
        factors: &[1, 2, 4, 8, 16],
        point: |n| Point { layers: n, groups: 4, ..BASE },
        proportional: |n| n,
    },
    Series {
        name: "threads",
        about: "n threads, 16 sequences of 64 tokens",
        factors: &[1, 2],
        point: |n| Point { threads: n, groups: 4, ..BASE },
        proportional: |n| 1.0 / n,
    },
];

/// The measurements of a point.
#[derive(Clone, Copy)]
struct Cost {
    /// Tokens of a step.
    tokens: f64,
    seconds: f64,
    /// Peak memory of the process; 0 if the system does not report it.
    peak_megabytes: f64,
}

fn main() -> Result<()> {
    if let Some(point) = std::env::var_os(POINT) {
        let cost = measure(Point::parse(&point.to_string_lossy()).ok_or_else(malformed)?)?;
        println!("{} {} {}", cost.tokens, cost.seconds, cost.peak_megabytes);
        return Ok(());
    }
    let Some(cases) = Cases::from_args() else { return Ok(()) };
    for series in SERIES.iter().filter(|series| cases.include(series.name)) {
        for bf16 in [false, true] {
            println!("\n{}, {}: {}", series.name, if bf16 { "bf16" } else { "f32" }, series.about);
            series.print(bf16)?;
        }
    }
    Ok(())
}

impl Series {
    fn print(&self, bf16: bool) -> Result<()> {
        println!("  ×n  tokens         s              MB           time");
        let mut first = None;
        for &factor in self.factors {
            let Cost { tokens, seconds, peak_megabytes } =
                measure_apart(Point { bf16, ..(self.point)(factor) })?;
            let base = *first.get_or_insert(Cost { tokens, seconds, peak_megabytes });
            let slower = seconds / base.seconds;
            let larger = peak_megabytes / base.peak_megabytes;
            let bar = bar(slower, (self.proportional)(factor as f64));
            println!(
                "{factor:4} {tokens:7} {seconds:9.3} {slower:5.1}× {peak_megabytes:7.0} {larger:5.1}×  {bar}"
            );
        }
        Ok(())
    }
}

/// `time` as a bar on a logarithmic scale, with a dot at `proportional`.
fn bar(time: f64, proportional: f64) -> String {
    let place = |x: f64| (6.0 + 6.0 * x.log2()).round().max(0.0) as usize;
    let mut bar = vec!['█'; place(time)];
    let dot = place(proportional);
    bar.resize(bar.len().max(dot + 1), ' ');
    bar[dot] = '·';
    bar.into_iter().collect()
}

/// Runs this program in a new process for one point.
fn measure_apart(point: Point) -> Result<Cost> {
    let failed = |what: String| Error::new(ErrorKind::Backend, what);
    let program = std::env::current_exe()
        .map_err(|e| failed("cannot find the path of this program".into()).because(e))?;
    let mut command = Command::new(program);
    command.env(POINT, point.to_string());
    if point.threads > 0 {
        command.env("RAYON_NUM_THREADS", point.threads.to_string());
    }
    let output = command
        .output()
        .map_err(|e| failed("cannot start the process of a point".into()).because(e))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    match (numbers.next(), numbers.next(), numbers.next()) {
        (Some(tokens), Some(seconds), Some(peak_megabytes)) => {
            Ok(Cost { tokens, seconds, peak_megabytes })
        }
        _ => Err(failed(format!("a point failed: {}", String::from_utf8_lossy(&output.stderr)))),
    }
}

fn measure(point: Point) -> Result<Cost> {
    let shape = ModelShape {
        hidden_size: 256,
        intermediate_size: 688,
        layers: point.layers,
        heads: 4,
        kv_heads: 4,
        ..ModelShape::BENCHMARK
    };
    let mut model = shape.model()?;
    model.set_precision(if point.bf16 { Dtype::Bf16 } else { Dtype::F32 })?;
    let query = shape.batch(1, vec![point.length; point.groups])?;
    let passage = shape.batch(2, vec![point.length; point.groups * PASSAGES])?;
    let chunking = match point.chunk {
        0 => Chunking::default(),
        chunk => Chunking { max_tokens: chunk, kept_tokens: chunk, ..Chunking::default() },
    };
    let mut training = Training::new(model, (query, passage), chunking)?;
    let seconds = timing::time(|| training.step())?.median;
    Ok(Cost { tokens: training.tokens() as f64, seconds, peak_megabytes: peak_megabytes() })
}

/// The peak memory of this process; 0 if the system does not report it.
fn peak_megabytes() -> f64 {
    MachineMemory::peak_of_process().unwrap_or(0) as f64 / 1e6
}

fn malformed() -> Error {
    Error::new(ErrorKind::Argument, format!("{POINT} is not a point"))
        .expected("six numbers, as this program writes them")
}

impl std::fmt::Display for Point {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Point { bf16, length, groups, chunk, layers, threads } = self;
        write!(f, "{} {length} {groups} {chunk} {layers} {threads}", u8::from(*bf16))
    }
}

impl Point {
    /// Parses the output of [`Display`](std::fmt::Display).
    fn parse(text: &str) -> Option<Point> {
        let numbers: Option<Vec<usize>> = text.split(' ').map(|n| n.parse().ok()).collect();
        let &[bf16, length, groups, chunk, layers, threads] = numbers?.as_slice() else {
            return None;
        };
        Some(Point { bf16: bf16 == 1, length, groups, chunk, layers, threads })
    }
}
