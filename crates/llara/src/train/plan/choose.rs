//! Chooses the division of a batch into chunks with the least work among those that fit into memory.

use super::{DryRun, LargestBatch, Plan, PlannedTask};
use crate::Result;
use crate::train::step::Chunking;

/// Which properties of the chunks are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChunkPolicy {
    /// The size of the chunks and the number of chunks whose activations are kept.
    Auto,
    /// The number of chunks whose activations are kept; the size is given.
    FixedSize(Chunking),
    /// None: the chunks are given.
    Fixed(Chunking),
}

/// Chunk sizes that are tried, in tokens. With smaller ones, slower products would cost more than is saved.
const SIZES: [usize; 16] =
    [32768, 24576, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128];

/// The overhead of a chunk, in tokens of work: products with fewer rows are slower, and each chunk reads the
/// weights and their gradients once.
const CHUNK_OVERHEAD_TOKENS: f64 = 64.0;

/// Size of chunks that need nothing of each other, in tokens: larger ones would be no faster.
const LARGEST_INDEPENDENT: usize = 8192;

/// The factor by which chunks of this size increase the work of a step.
fn overhead(max_tokens: usize) -> f64 {
    1.0 + CHUNK_OVERHEAD_TOKENS / max_tokens as f64
}

/// Chunk sizes by increasing estimated cost. The estimate assumes that the activations of `one_pass` are
/// proportional to the number of tokens; `fixed` is the memory that a run with small chunks needs beside them. It reduces
/// the number of dry runs.
fn candidate_sizes(one_pass: &Plan, fixed: u64, budget: u64) -> Vec<usize> {
    let tokens = one_pass.chunks.tokens as f64;
    let for_activations = budget.saturating_sub(fixed) as f64;
    let tokens_in_budget = tokens * for_activations / one_pass.training.activations.max(1) as f64;
    let cost = |size: usize| {
        let kept = (tokens_in_budget / size as f64).floor() * size as f64;
        // The forward pass is a third of the work.
        (1.0 + (1.0 - (kept / tokens).min(1.0)) / 3.0) * overhead(size)
    };
    let may_fit = |&size: &usize| (size as f64) < tokens.min(1.5 * tokens_in_budget);
    let mut sizes: Vec<usize> = SIZES.into_iter().filter(may_fit).collect();
    sizes.sort_by(|&a, &b| cost(a).total_cmp(&cost(b)));
    sizes
}

impl DryRun {
    /// The plan with the least work for which the process needs at most `budget` bytes during a step. If
    /// there is none, the plan with the least memory.
    ///
    /// # Errors
    /// The batch is not valid.
    pub fn choose(
        &mut self,
        batch: &LargestBatch,
        policy: ChunkPolicy,
        budget: u64,
    ) -> Result<Plan> {
        match policy {
            ChunkPolicy::Fixed(chunking) => self.plan(batch, chunking),
            ChunkPolicy::FixedSize(chunking) if self.shape().task == PlannedTask::Pretraining => {
                self.plan(batch, chunking)
            }
            ChunkPolicy::FixedSize(chunking) => self.keep_most(batch, chunking, budget),
            ChunkPolicy::Auto => self.cheapest(batch, budget),
        }
    }

    fn cheapest(&mut self, batch: &LargestBatch, budget: u64) -> Result<Plan> {
        let whole = Chunking::default();
        let tokens = self.encoded(batch)?.tokens();
        if self.shape().task == PlannedTask::Pretraining {
            return self.largest(batch, budget);
        }
        // A batch that is larger than the expected one is divided into two chunks.
        let one_pass =
            self.plan(batch, Chunking { max_tokens: tokens, kept_tokens: tokens, ..whole })?;
        if one_pass.training.total() <= budget {
            return Ok(one_pass);
        }
        let smallest = Chunking { max_tokens: 1, kept_tokens: 0, ..whole };
        let fixed = self.plan(batch, smallest)?.training.without_activations();
        let mut best: Option<(f64, Plan)> = None;
        for max_tokens in candidate_sizes(&one_pass, fixed, budget) {
            let plan = self.keep_most(batch, Chunking { max_tokens, ..whole }, budget)?;
            let cost = plan.work.done_flops as f64 * overhead(max_tokens);
            if plan.training.total() > budget {
                continue;
            }
            match &best {
                Some((least, _)) if *least <= cost => break,
                _ => best = Some((cost, plan)),
            }
        }
        match best {
            Some((_, plan)) => Ok(plan),
            None => self.keep_most(batch, Chunking { max_tokens: 1, ..whole }, budget),
        }
    }

    /// The plan with the largest chunks that fit, up to [`LARGEST_INDEPENDENT`]: chunks of pretraining cost nothing
    /// but slower products. If none fits, that with the smallest ones.
    fn largest(&mut self, batch: &LargestBatch, budget: u64) -> Result<Plan> {
        for max_tokens in SIZES.into_iter().filter(|&size| size <= LARGEST_INDEPENDENT) {
            let plan = self.plan(batch, Chunking { max_tokens, ..Chunking::default() })?;
            if plan.training.total() <= budget {
                return Ok(plan);
            }
        }
        self.plan(batch, Chunking { max_tokens: 1, ..Chunking::default() })
    }

    /// The plan that keeps the activations of as many chunks as fit.
    fn keep_most(&mut self, batch: &LargestBatch, chunking: Chunking, budget: u64) -> Result<Plan> {
        let encoded = self.encoded(batch)?;
        let ends: Vec<usize> = std::iter::once(0)
            .chain(chunking.chunks(&encoded).iter().map(|c| encoded.offsets()[c.end] as usize))
            .collect();
        let mut plan_with =
            |kept: usize| self.plan(batch, Chunking { kept_tokens: ends[kept], ..chunking });
        let mut best = plan_with(0)?;
        let left = match budget.checked_sub(best.training.total()) {
            Some(left) => left,
            None => return Ok(best),
        };
        // The first kept chunk needs no additional memory: it is freed before the others are recomputed.
        let chunk_bytes = best.training.activations.max(1);
        let mut next = 1 + (left / chunk_bytes) as usize;
        // A search between a number of kept chunks that fits and one that does not, or exceeds the last.
        let (mut fits, mut exceeds) = (0, ends.len());
        for attempt in 0.. {
            if exceeds - fits <= 1 {
                break;
            }
            let kept = next.clamp(fits + 1, exceeds - 1);
            let plan = plan_with(kept)?;
            match plan.training.total() <= budget {
                true => (fits, best) = (kept, plan),
                false => exceeds = kept,
            }
            // The estimate is usually close, so its neighbors are tried before bisection.
            next = match attempt {
                0 | 1 if fits == kept => kept + 1,
                0 | 1 => kept - 1,
                _ => usize::midpoint(fits, exceeds),
            };
        }
        Ok(best)
    }
}
