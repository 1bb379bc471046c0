//! The pieces of a batch that cost least among those that fit.

use super::{DryRun, LargestBatch, Plan};
use crate::Result;
use crate::train::step::Chunking;

/// How freely the pieces may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// One pass, or pieces of any size of which any number is kept.
    Free,
    /// Pieces of this size, of which any number is kept.
    Size(Chunking),
    /// As it is.
    Fixed(Chunking),
}

/// Sizes that are tried. Smaller ones would lose more in products than they save in work.
const SIZES: [usize; 16] =
    [32768, 24576, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256, 128];

/// A piece costs so many tokens' work besides its own: products of fewer rows are slower, and weights
/// and their gradients go through memory once for each piece.
const TOKENS_OF_A_PIECE: f64 = 64.0;

/// What a step's work is multiplied by in pieces of this size.
fn overhead(max_tokens: usize) -> f64 {
    1.0 + TOKENS_OF_A_PIECE / max_tokens as f64
}

/// Sizes of pieces, what should cost least first: a guess from `one_pass`, memory being taken to be in
/// proportion to tokens, so that few need a dry run.
fn promising(one_pass: &Plan, budget: u64) -> Vec<usize> {
    let tokens = one_pass.chunks.tokens as f64;
    let for_activations = budget.saturating_sub(one_pass.training.without_activations()) as f64;
    let room = tokens * for_activations / one_pass.training.activations.max(1) as f64;
    let cost = |size: usize| {
        let kept = (room / size as f64).floor() * size as f64;
        // A third of what one pass does is forward.
        (1.0 + (1.0 - (kept / tokens).min(1.0)) / 3.0) * overhead(size)
    };
    let may_fit = |&size: &usize| (size as f64) < tokens.min(1.5 * room);
    let mut sizes: Vec<usize> = SIZES.into_iter().filter(may_fit).collect();
    sizes.sort_by(|&a, &b| cost(a).total_cmp(&cost(b)));
    sizes
}

impl DryRun {
    /// The cheapest way through `batch` whose steps take at most `budget` bytes of the process; where
    /// there is none, the one that takes least.
    ///
    /// # Errors
    /// When the batch is impossible.
    pub fn choose(&mut self, batch: &LargestBatch, cut: Cut, budget: u64) -> Result<Plan> {
        match cut {
            Cut::Fixed(chunking) => self.plan(batch, chunking),
            Cut::Size(chunking) => self.keep_most(batch, chunking, budget),
            Cut::Free => self.cheapest(batch, budget),
        }
    }

    fn cheapest(&mut self, batch: &LargestBatch, budget: u64) -> Result<Plan> {
        let whole = Chunking::default();
        let tokens = self.encoded(batch)?.tokens();
        // A batch that turns out larger than any that was foreseen goes in two pieces.
        let one_pass =
            self.plan(batch, Chunking { max_tokens: tokens, kept_tokens: tokens, ..whole })?;
        if one_pass.training.total() <= budget {
            return Ok(one_pass);
        }
        let mut best: Option<(f64, Plan)> = None;
        for max_tokens in promising(&one_pass, budget) {
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

    /// With as many pieces kept as fit.
    fn keep_most(&mut self, batch: &LargestBatch, chunking: Chunking, budget: u64) -> Result<Plan> {
        let encoded = self.encoded(batch)?;
        let ends: Vec<usize> = std::iter::once(0)
            .chain(chunking.chunks(&encoded).iter().map(|c| encoded.offsets()[c.end] as usize))
            .collect();
        let mut keeping =
            |kept: usize| self.plan(batch, Chunking { kept_tokens: ends[kept], ..chunking });
        let mut best = keeping(0)?;
        let left = match budget.checked_sub(best.training.total()) {
            Some(left) => left,
            None => return Ok(best),
        };
        // The first costs nothing: it is gone when the others are computed again.
        let of_a_piece = best.training.activations.max(1);
        let mut next = 1 + (left / of_a_piece) as usize;
        // Memory grows with what is kept: `fits` does, `exceeds` does not, or is beyond the last.
        let (mut fits, mut exceeds) = (0, ends.len());
        for attempt in 0.. {
            if exceeds - fits <= 1 {
                break;
            }
            let kept = next.clamp(fits + 1, exceeds - 1);
            let plan = keeping(kept)?;
            match plan.training.total() <= budget {
                true => (fits, best) = (kept, plan),
                false => exceeds = kept,
            }
            // The guess is seldom far off.
            next = match attempt {
                0 | 1 if fits == kept => kept + 1,
                0 | 1 => kept - 1,
                _ => usize::midpoint(fits, exceeds),
            };
        }
        Ok(best)
    }
}
