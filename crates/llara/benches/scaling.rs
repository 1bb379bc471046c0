//! Training on many processes, simulated from measured constants: the time of a step, and what limits it.
//!
//! ```text
//! mpirun -n 2 target/release/deps/scaling-… measure     what a message costs between these processes
//! cargo bench --bench scaling                           the simulation
//! ```
//!
//! A step is simulated as the program makes it: the backward pass completes buckets of gradients one after the other; a
//! bucket is sent when it is complete and the link is free; weights are gathered after the update; passages and their
//! gradients are exchanged before and after the loss. Every rank does the same, so one is simulated. A message costs its
//! rank a fixed time, and its bytes that of the link.

use std::sync::Arc;
use std::time::{Duration, Instant};

use llara::backend::{Backend, Cpu};
use llara::dist::{Collective, Launch, MpiRank, MpiWorld};
use llara::train::{FlatLayout, bucket_elements};
use llara::{Error, ErrorKind, Result};

/// Bytes of an f32.
const F32: f64 = 4.0;
/// Numbers of processes.
const PROCESSES: [usize; 8] = [1, 2, 8, 32, 128, 512, 1024, 4096];

/// What communication costs.
struct Network {
    name: &'static str,
    /// Seconds of a rank per message, sent and received.
    message: f64,
    /// Bytes per second that a rank sends, while it receives as many.
    bandwidth: f64,
}

/// The constants that `measure` gave for two processes of one machine with a core each, and those of a network whose
/// adapter sends 25 GB/s, with the same cost of a message.
const NETWORKS: [Network; 2] = [
    Network { name: "two processes of one machine, measured", message: MESSAGE, bandwidth: 0.25e9 },
    Network { name: "25 GB/s per process", message: MESSAGE, bandwidth: 25e9 },
];

/// Seconds of a message.
const MESSAGE: f64 = 8.3e-6;

/// A run.
struct Workload {
    name: &'static str,
    /// Trainable parameters.
    parameters: usize,
    /// Seconds that a step computes in one process. The backward pass is two thirds of it.
    seconds: f64,
}

/// Llama-2-7B with 16 rows of 8 passages per process: 16,896 tokens of 32 and 128, at the rates that were measured on an
/// H200 with adapters; with all weights half as many tokens per second are assumed.
const WORKLOADS: [Workload; 2] = [
    Workload { name: "Llama-2-7B, LoRA of rank 64", parameters: 160_000_000, seconds: 0.94 },
    Workload { name: "Llama-2-7B, all weights", parameters: 6_607_000_000, seconds: 1.5 },
];
const ROWS: usize = 16;
const GROUP: usize = 8;
const DIMENSION: usize = 4096;

fn main() -> Result<()> {
    match std::env::args().any(|argument| argument == "measure") {
        true => measure(),
        false => {
            simulate_all();
            Ok(())
        }
    }
}

/// Seconds of a step, by what they are spent on.
struct Step {
    compute: f64,
    /// Gradients that are still being sent when the backward pass ends.
    gradients: f64,
    /// Updated weights.
    weights: f64,
    /// Passages and their gradients.
    embeddings: f64,
    /// Whether all have their input, the gradients' norm, the loss.
    small: f64,
}

impl Step {
    fn total(&self) -> f64 {
        self.compute + self.gradients + self.weights + self.embeddings + self.small
    }
}

fn simulate_all() {
    for workload in &WORKLOADS {
        for network in &NETWORKS {
            println!("\n{}; {}", workload.name, network.name);
            println!(
                "processes  step s  of it: gradients  weights  embeddings  small   efficiency  messages   passages GB"
            );
            for processes in PROCESSES {
                let step = simulate(workload, network, processes);
                // Of all processes, and their gradients, which are there twice while blocks of queries are added.
                let passages = 3.0 * (processes * ROWS * GROUP * DIMENSION) as f64 * F32;
                println!(
                    "{processes:9} {:7.2} {:17.2} {:8.2} {:11.2} {:6.3} {:10.0} % {:9} {:12.2}",
                    step.total(),
                    step.gradients,
                    step.weights,
                    step.embeddings,
                    step.small,
                    100.0 * step.compute / step.total(),
                    messages(workload, processes),
                    passages / 1e9,
                );
            }
        }
    }
}

fn layout(workload: &Workload, processes: usize) -> FlatLayout {
    FlatLayout::new([workload.parameters], processes, bucket_elements(processes))
}

/// Messages that a rank sends in a step.
fn messages(workload: &Workload, processes: usize) -> usize {
    let buckets = layout(workload, processes).buckets().len();
    // Two of each bucket and of the passages, and four small ones, to every other rank.
    (processes - 1) * (2 * buckets + 2 + 4)
}

fn simulate(workload: &Workload, network: &Network, processes: usize) -> Step {
    let others = (processes - 1) as f64;
    let exchange = |bytes: f64| others * (network.message + bytes / network.bandwidth);
    let layout = layout(workload, processes);
    let buckets = layout.buckets();
    let forward = workload.seconds / 3.0;
    // The time at which the link is free.
    let mut free: f64 = forward;
    let mut weights = 0.0;
    for (number, bucket) in buckets.iter().enumerate() {
        let share = (number + 1) as f64 / buckets.len() as f64;
        let complete = forward + share * (workload.seconds - forward);
        let piece = exchange(bucket.owned_by(0).len() as f64 * F32);
        free = free.max(complete) + piece;
        weights += piece;
    }
    let passages = (ROWS * GROUP * DIMENSION) as f64 * F32;
    match processes {
        1 => Step {
            compute: workload.seconds,
            gradients: 0.0,
            weights: 0.0,
            embeddings: 0.0,
            small: 0.0,
        },
        _ => Step {
            compute: workload.seconds,
            gradients: free - workload.seconds,
            weights,
            embeddings: 2.0 * exchange(passages),
            small: 4.0 * exchange(64.0),
        },
    }
}

/// Measures what a message costs, and the bandwidth, between the processes that were started together.
fn measure() -> Result<()> {
    let launch = Launch::from_environment()?
        .ok_or_else(|| Error::new(ErrorKind::Argument, "start this with mpirun -n 2"))?;
    let world = MpiWorld::start(&launch, Duration::from_secs(60))?;
    let backend = Cpu::new();
    let group = MpiRank::new(Arc::clone(&world), backend.clone());
    let group: &dyn Collective<Cpu> = &group;
    let others = (launch.size - 1) as f64;

    let per_message = median(|| {
        let start = Instant::now();
        for _ in 0..200 {
            group.all_reduce_scalars(&mut [1.0; 3])?;
        }
        Ok(start.elapsed().as_secs_f64() / 200.0 / others)
    })?;
    let rows = 6_400;
    let counts = vec![rows; launch.size];
    let per_byte = median(|| {
        let own = backend.zeros(rows, 1024, llara::backend::Dtype::F32)?;
        let start = Instant::now();
        group.all_gather_rows(own, &counts)?;
        let bytes = (rows * 1024) as f64 * F32;
        Ok((start.elapsed().as_secs_f64() / others - per_message) / bytes)
    })?;
    if launch.rank == 0 {
        println!("a message: {:.1} us; {:.2} GB/s", per_message * 1e6, 1e-9 / per_byte);
    }
    world.finish()
}

/// The median of eleven measurements.
fn median(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut times = (0..11).map(|_| measure()).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[5])
}
