//! What the processes of a training run share, and how they divide the work.

use llara::Result;
use llara::train::{Chunking, TrainConfig};

use crate::processes::Processes;
use crate::talk::{counted, say};

/// The smallest chunks that any process has chosen for its memory: with equal chunks, results are equal.
pub(crate) fn smallest_chunking(chunking: Chunking, processes: &Processes) -> Result<Chunking> {
    let Chunking { max_tokens, max_sequences, kept_tokens } = chunking;
    let [max_tokens, max_sequences, kept_tokens] =
        processes.smallest([max_tokens, max_sequences, kept_tokens])?;
    Ok(Chunking { max_tokens, max_sequences, kept_tokens })
}

/// Prints how the work is divided.
pub(crate) fn announce_processes(config: &TrainConfig, processes: &Processes) {
    let (ranks, placement) = (processes.size(), processes.placement());
    say!(
        "processes {ranks}, {} on the first host with {} each by default; {} per step each; moments {}",
        placement.local_processes,
        counted(placement.threads, "thread"),
        counted(config.batch_size, "row"),
        if config.shard_optimizer { "divided among them" } else { "on every process" },
    );
}
