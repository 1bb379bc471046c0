//! What a run will take, before it begins: memory by part, the pieces of a batch, the work of a step.
//!
//! Nothing here describes the model a second time. A [`DryRun`] runs the step itself on the device
//! that counts ([`CountingBackend`](crate::backend::CountingBackend)), on a batch drawn from the data; what it counts is
//! what the CPU will do.

mod batch;
mod budget;
mod choose;
mod dry_run;
mod lengths;
mod machine;
mod work;

use serde::Serialize;

pub use batch::LargestBatch;
pub use budget::MemoryBudget;
pub use choose::Cut;
pub use dry_run::{DryRun, RunShape};
pub use lengths::{Histogram, LengthSummary, TextLengths};
pub use machine::MachineMemory;

use super::step::Chunking;

/// What a run will take.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Memory at the peak of a step.
    pub training: Parts,
    /// Memory of the process while weights are read, in bytes.
    pub loading_bytes: u64,
    /// Memory of the process while the trained model is saved and read again, in bytes.
    pub saving_bytes: u64,
    /// How the batch goes through the model.
    pub chunks: Chunks,
    /// Work of a step.
    pub work: Work,
}

/// Memory of the process at the peak of a step, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// The model's weights.
    pub weights: u64,
    /// Copies of weights in the order in which products read them.
    pub packed_copies: u64,
    /// Gradients of what learns.
    pub gradients: u64,
    /// Moments of what learns.
    pub optimizer: u64,
    /// Everything that depends on the batch.
    pub activations: u64,
    /// What kernels use while they run.
    pub workspace: u64,
    /// The program, the tokenizer and the index of the data.
    pub process: u64,
}

impl Parts {
    /// Each part with its name.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights),
            ("packed copies", self.packed_copies),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("workspace", self.workspace),
            ("process", self.process),
        ]
    }

    /// What is there whatever the batch is.
    pub fn without_activations(&self) -> u64 {
        self.total() - self.activations
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// How a batch goes through the model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Chunks {
    /// The setting.
    #[serde(skip)]
    pub chunking: Chunking,
    /// Number of pieces.
    pub count: usize,
    /// Pieces whose activations are kept from the forward to the backward pass.
    pub kept: usize,
    /// Tokens of the largest piece.
    pub largest_tokens: usize,
    /// Tokens of the batch, equal sequences counted once where they are encoded once.
    pub tokens: usize,
    /// Share of these tokens whose forward pass is made twice.
    pub recomputed_share: f64,
}

/// Operations of a step; a multiplication and an addition are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Work {
    /// What the result depends on.
    pub needed_flops: u64,
    /// What is done, with all that is computed twice.
    pub done_flops: u64,
}

impl Plan {
    /// The most memory that the process will take, in bytes.
    pub fn peak_bytes(&self) -> u64 {
        self.training.total().max(self.loading_bytes).max(self.saving_bytes)
    }

    /// What the peak belongs to.
    pub fn peak_phase(&self) -> &'static str {
        match self.peak_bytes() {
            peak if peak == self.training.total() => "training",
            peak if peak == self.saving_bytes => "saving",
            _ => "loading",
        }
    }
}
