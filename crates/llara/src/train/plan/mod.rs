//! Estimates of a training run before it starts: memory by category, the chunks of a batch, the work of a
//! step.
//!
//! A [`DryRun`] runs the training step on the [`CountingBackend`](crate::backend::CountingBackend),
//! which computes nothing and counts the allocations and operations of the CPU, on a batch drawn from the
//! data.

mod batch;
mod budget;
mod choose;
mod dry_run;
mod evaluation;
mod group;
mod lengths;
mod machine;
mod work;

use serde::Serialize;

pub use batch::LargestBatch;
pub use budget::MemoryBudget;
pub use choose::ChunkPolicy;
pub use dry_run::{DryRun, PlannedTask, RunShape};
pub use evaluation::EvaluationShape;
pub use group::GroupShape;
pub use lengths::TextLengths;
pub use machine::MachineMemory;

use super::step::Chunking;

/// Memory and work of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// Peak memory of a step.
    pub training: Parts,
    /// Peak memory of the process while weights are read, in bytes.
    pub loading_bytes: u64,
    /// Peak memory of the process while the trained model is saved and verified, in bytes.
    pub saving_bytes: u64,
    /// Peak memory of the process while the model is evaluated, in bytes; 0 without evaluation.
    pub evaluation_bytes: u64,
    /// The division of the batch into chunks.
    pub chunks: Chunks,
    /// Work of a step.
    pub work: Work,
}

/// Peak memory of the process during a step by category, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Parts {
    /// The model's weights.
    pub weights: u64,
    /// Gradients of the trainable parameters.
    pub gradients: u64,
    /// Optimizer state of the trainable parameters.
    pub optimizer: u64,
    /// Activations and everything else that depends on the batch.
    pub activations: u64,
    /// Temporary memory of kernels.
    pub workspace: u64,
    /// Gradients on their way between processes, and embeddings of other processes.
    pub communication: u64,
    /// The program, the tokenizer and the index of the data.
    pub process: u64,
}

impl Parts {
    /// The categories with their names.
    pub fn named(&self) -> [(&'static str, u64); 7] {
        [
            ("weights", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("workspace", self.workspace),
            ("communication", self.communication),
            ("process", self.process),
        ]
    }

    /// The memory that does not depend on the batch.
    pub fn without_activations(&self) -> u64 {
        self.total() - self.activations
    }

    /// The sum of all categories.
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }
}

/// The division of a batch into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Chunks {
    /// The setting.
    #[serde(skip)]
    pub chunking: Chunking,
    /// Number of chunks.
    pub count: usize,
    /// Number of chunks whose activations are kept from the forward to the backward pass.
    pub kept: usize,
    /// Number of tokens of the largest chunk.
    pub largest_tokens: usize,
    /// Number of encoded tokens of the batch. Equal sequences that are encoded once are counted once.
    pub tokens: usize,
    /// Fraction of these tokens whose forward pass is computed twice.
    pub recomputed_share: f64,
}

/// Floating-point operations of a step; a multiplication and an addition are two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Work {
    /// Operations on which the result depends.
    pub needed_flops: u64,
    /// Operations that are executed, including recomputation.
    pub done_flops: u64,
}

impl Plan {
    /// The peak memory of the process in bytes.
    pub fn peak_bytes(&self) -> u64 {
        let others = [self.loading_bytes, self.saving_bytes, self.evaluation_bytes];
        others.into_iter().fold(self.training.total(), u64::max)
    }

    /// The phase with the peak memory: training, evaluating, saving or loading.
    pub fn peak_phase(&self) -> &'static str {
        match self.peak_bytes() {
            peak if peak == self.training.total() => "training",
            peak if peak == self.evaluation_bytes => "evaluating",
            peak if peak == self.saving_bytes => "saving",
            _ => "loading",
        }
    }
}
