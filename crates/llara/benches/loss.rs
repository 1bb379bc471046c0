//! InfoNCE with its gradient over many queries and passages: time and peak memory, with scores in blocks of queries as in
//! training, and with all scores at once.
//!
//! `cargo bench --bench loss -- [FILTER…]`, where a filter is a number of queries, which is that of the passages.
//! Every point is measured in a separate process, because the peak memory of a process cannot be reset.

mod timing;

use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use llara::backend::{Backend, Cpu};
use llara::dist::Solo;
use llara::loss::{
    Contrastive, Embeddings, InfoNce, Labels, Objective, ObjectiveOptions, RowsPerRank,
};
use llara::train::plan::MachineMemory;
use llara::{Error, ErrorKind, Result};

use timing::Cases;

/// Features of an embedding.
const DIMENSION: usize = 1024;
/// Numbers of queries and of passages.
const SIZES: [usize; 4] = [4_096, 16_384, 32_768, 65_536];
/// All scores at once need 8 bytes for each: they and their gradients. Beyond this, they are not measured.
const MOST_SCORES: usize = 1 << 30;
/// The environment variable that makes this program measure one point, `QUERIES BLOCK_SCORES`, and print it.
const POINT: &str = "LLARA_LOSS_POINT";

/// The measurements of a point.
struct Cost {
    seconds: f64,
    /// Peak memory of the process; 0 if the system does not report it.
    megabytes: f64,
    /// Sum over queries and passages of the absolute gradients, to see that both forms compute the same.
    gradients: f64,
    loss: f64,
}

fn main() -> Result<()> {
    if let Ok(point) = std::env::var(POINT) {
        let mut numbers = point.split(' ').filter_map(|number| number.parse().ok());
        let (Some(queries), Some(block_scores)) = (numbers.next(), numbers.next()) else {
            return Err(Error::new(ErrorKind::Argument, "malformed point").got(point));
        };
        let Cost { seconds, megabytes, gradients, loss } = measure(queries, block_scores)?;
        println!("{seconds} {megabytes} {gradients} {loss}");
        return Ok(());
    }
    let Some(cases) = Cases::from_args() else { return Ok(()) };
    println!("d = {DIMENSION}, f32; MB: peak of the process, and embeddings with their gradients");
    println!(
        "queries × passages  embeddings    blocks of queries        all scores at once   difference"
    );
    for queries in SIZES.into_iter().filter(|queries| cases.include(&queries.to_string())) {
        let blocks = measure_apart(queries, Contrastive::<Cpu>::BLOCK_SCORES)?;
        let embeddings = 4e-6 * (queries * DIMENSION * size_of::<f32>()) as f64;
        print!("{queries:7} × {queries:8} {embeddings:8.0} MB");
        print!(" {:9.2} s {:6.0} MB", blocks.seconds, blocks.megabytes);
        if queries * queries > MOST_SCORES {
            println!("  scores need {:.0} MB", 8e-6 * (queries * queries) as f64);
            continue;
        }
        let whole = measure_apart(queries, usize::MAX)?;
        let relative = |a: f64, b: f64| (a - b).abs() / b.abs();
        println!(
            " {:9.2} s {:6.0} MB {:9.1e} {:9.1e}",
            whole.seconds,
            whole.megabytes,
            relative(blocks.loss, whole.loss),
            relative(blocks.gradients, whole.gradients)
        );
    }
    Ok(())
}

/// Runs this program in a new process for one point.
fn measure_apart(queries: usize, block_scores: usize) -> Result<Cost> {
    let failed = |what: String| Error::new(ErrorKind::Backend, what);
    let program = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
    let output = Command::new(program)
        .env(POINT, format!("{queries} {block_scores}"))
        .output()
        .map_err(|e| failed(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    match numbers[..] {
        [seconds, megabytes, gradients, loss] => Ok(Cost { seconds, megabytes, gradients, loss }),
        _ => Err(failed(format!("{}{text}", String::from_utf8_lossy(&output.stderr)))),
    }
}

fn measure(queries: usize, block_scores: usize) -> Result<Cost> {
    let backend = Cpu::new();
    let rows = RowsPerRank::one(queries, 1);
    let positives: Vec<u32> = (0..queries as u32).collect();
    let labels = Labels { positives: &positives, text_keys: None, teacher_scores: None };
    let objective = Contrastive {
        info_nce: InfoNce { temperature: 0.02 },
        options: ObjectiveOptions::default(),
        normalized: true,
        negatives_cross_device: false,
        collective: Arc::new(Solo),
        block_scores,
    };
    let embeddings = Embeddings {
        queries: backend.upload(&unit_rows(queries, 1), queries, DIMENSION)?,
        passages: backend.upload(&unit_rows(queries, 2), queries, DIMENSION)?,
    };
    let start = Instant::now();
    let result = objective.loss_and_gradient(&backend, embeddings, &labels, &rows)?;
    let seconds = start.elapsed().as_secs_f64();
    let peak = MachineMemory::peak_of_process().unwrap_or(0);
    let mut gradients = 0.0;
    for tensor in [&result.dqueries, &result.dpassages] {
        gradients += backend.download(tensor)?.iter().map(|x| f64::from(x.abs())).sum::<f64>();
    }
    Ok(Cost {
        seconds,
        megabytes: peak as f64 / 1e6,
        gradients,
        loss: f64::from(backend.download(&result.loss)?[0]),
    })
}

/// Rows of length 1. Row i of either seed is near row i of the other.
fn unit_rows(rows: usize, seed: u64) -> Vec<f32> {
    let mut values = Vec::with_capacity(rows * DIMENSION);
    for row in 0..rows as u64 {
        let (mut shared, mut own) =
            (row.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1, ((row + 1) * seed) | 1);
        let start = values.len();
        for _ in 0..DIMENSION {
            values.push(0.3 * next(&mut shared) + next(&mut own));
        }
        let norm = values[start..].iter().map(|x| x * x).sum::<f32>().sqrt();
        values[start..].iter_mut().for_each(|x| *x /= norm);
    }
    values
}

/// A number of −1..1 of a xorshift generator.
fn next(state: &mut u64) -> f32 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 40) as f32 / (1 << 23) as f32 - 1.0
}
