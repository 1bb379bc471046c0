//! Arguments of backend operations that contain no device buffer.

use super::tensor::{Dtype, View};

/// How a weight is used, which determines the copies that are prepared from its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightUse {
    /// Norms, biases and embedding tables: the values are read directly.
    Elementwise,
    /// A matrix that is not trainable, multiplied by activations of this dtype. Its values keep their
    /// dtype.
    Frozen(Dtype),
    /// An f32 matrix that [`Backend::adamw`](super::Backend::adamw) updates, multiplied by activations of
    /// this dtype.
    Trainable(Dtype),
}

/// What is added to a product before it is rounded to the dtype of the result.
pub struct Epilogue<'e, T> {
    /// Added to every row. `[1, out]`
    pub bias: Option<View<'e, T>>,
    /// Added element by element. `[n, out]`
    pub residual: Option<&'e T>,
}

impl<T> Default for Epilogue<'_, T> {
    /// No bias and no residual.
    fn default() -> Self {
        Epilogue { bias: None, residual: None }
    }
}

/// The direction of [`Backend::rope`](super::Backend::rope).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeDirection {
    /// The rotation of the forward pass.
    Forward,
    /// The inverse rotation, which is its transpose: the backward pass.
    Backward,
}

/// The heads, window and scale of attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `KV`; divides `H`. Query head `h` uses key head `h / (H / KV)`.
    pub kv_heads: usize,
    /// Features of a head, `hd`.
    pub head_dim: usize,
    /// A query at position `i` attends to keys at positions `i - window < j <= i`; with `None`, to all
    /// `j <= i`.
    pub window: Option<usize>,
    /// Factor on `q · k` before the softmax, usually `1 / sqrt(hd)`.
    pub scale: f32,
}

impl AttentionShape {
    /// Columns of the queries, `H·hd`.
    pub fn q_cols(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of the keys, and of the values, `KV·hd`.
    pub fn kv_cols(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Gradients with respect to the inputs of attention.
pub enum AttentionGradients<T> {
    /// If every row is a query: dq, dk and dv concatenated by columns. `[T, (H + 2·KV)·hd]`
    Fused(T),
    /// If only some rows are queries.
    Separate {
        /// `[rows of q, H·hd]`
        dq: T,
        /// dk and dv concatenated by columns. `[T, 2·KV·hd]`
        dkv: T,
    },
}

/// Determines a dropout mask: the same key gives the same mask on every device and in every recomputation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Index of the step.
    pub step: u64,
    /// Index of the module within the model.
    pub module: u32,
    /// Probability that an element becomes zero, below 1.
    pub probability: f32,
}

/// Whether a gradient is added to the buffer or overwrites it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    /// The buffer contains values of an earlier step.
    Overwrite,
    /// The buffer contains a partial sum of the same gradient.
    Add,
}

/// Pairs of a source row and the target row that it is added to, sorted by target. A device can therefore
/// assign each target to one task, which adds its sources in a fixed order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScatterRows {
    /// Source rows, grouped by target, ascending within a target. `[n]`
    pub sources: Vec<u32>,
    /// The distinct targets, ascending. `[u]`
    pub targets: Vec<u32>,
    /// Sources of target `i` are `starts[i]..starts[i + 1]` of `sources`. `[u + 1]`
    pub starts: Vec<u32>,
}

impl ScatterRows {
    /// The plan that adds row `i` of the source to row `rows[i]` of the target.
    pub fn new(rows: &[u32]) -> Self {
        let mut sources: Vec<u32> = (0..rows.len() as u32).collect();
        sources.sort_by_key(|&source| rows[source as usize]); // stable: ascending within a target
        let (mut targets, mut starts) = (Vec::new(), Vec::new());
        for (at, &source) in (0..).zip(&sources) {
            let target = rows[source as usize];
            if targets.last() != Some(&target) {
                targets.push(target);
                starts.push(at);
            }
        }
        starts.push(rows.len() as u32);
        ScatterRows { sources, targets, starts }
    }
}

/// How a student's scores `s` of a group of passages follow a teacher's scores `t`; the positive is passage 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum DistillationLoss {
    /// `Σ_g p_g · (log p_g − log q_g)` with `p = softmax(t)` and `q = softmax(s)` (Hinton et al. 2015).
    KlDivergence,
    /// `mean_{g > 0} (scale · (s_0 − s_g) − (t_0 − t_g))²` (Hofstätter et al. 2020); 0 for a group of one.
    MarginMse {
        /// Turns scores into similarities: the temperature that they were divided by.
        scale: f32,
    },
}

/// Hyperparameters of one AdamW update (Loshchilov and Hutter 2019, algorithm 2). f64, because
/// `1 - beta2` would lose half its digits in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step, with the schedule applied.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the square root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this update, from 1, for the bias correction.
    pub step: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_plan_contains_every_pair_once(rows in prop::collection::vec(0u32..9, 0..40)) {
            let plan = ScatterRows::new(&rows);
            prop_assert!(plan.targets.is_sorted_by(|a, b| a < b));
            let mut pairs = Vec::new();
            for (bounds, &target) in plan.starts.windows(2).zip(&plan.targets) {
                let sources = &plan.sources[bounds[0] as usize..bounds[1] as usize];
                prop_assert!(!sources.is_empty() && sources.is_sorted_by(|a, b| a < b));
                pairs.extend(sources.iter().map(|&source| (source, target)));
            }
            pairs.sort_unstable();
            let want: Vec<_> = (0..).zip(rows).collect();
            prop_assert_eq!(pairs, want);
        }
    }
}
