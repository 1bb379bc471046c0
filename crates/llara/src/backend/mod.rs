//! The operations that a device must provide for a model to be trained on it.
//!
//! A backend owns its memory: [`Backend::Tensor`] and [`Backend::Index`] are opaque, and nothing
//! above this module reads an element of one inside a training step. The loss and the gradient norm
//! of a step stay on the device until [`Backend::download`] is called.
//!
//! Every matrix is row-major `[rows, cols]`. `T` is the number of tokens in a packed batch,
//! `S` the number of its sequences, `d` the hidden size, `H` and `KV` the query and key/value
//! heads, `hd` the head size. Shapes that do not match are programming errors and panic; what a
//! user can cause (out of memory, a lost device) is an [`Error`](crate::Error).
//!
//! Elements are f32, or bf16 where a model computes in mixed precision: then activations and their
//! gradients are bf16; the residual stream and its gradient, the embeddings, the loss, trainable
//! parameters, their gradients and their moments stay f32. An operation converts its inputs to f32,
//! accumulates in f32, and rounds once, when it stores the result. The output has the dtype of the
//! first input unless the operation says otherwise.
//!
//! Backward functions take `onto: Option<Tensor>`: a gradient of the same input from another path
//! (a residual connection, a second projection). It is consumed, added to and returned.
//!
//! [`conformance`] runs the same checks on any backend: a new device implements [`Backend`] and passes
//! that suite.

pub mod conformance;
mod counting;
mod cpu;
mod memory;

pub use counting::{CountedTensor, CountingBackend};
pub use cpu::{Cpu, gemm};
pub use memory::OffsetAllocator;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Result;

/// The dtype of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// Single precision, 4 bytes.
    #[default]
    F32,
    /// bfloat16: the exponent of f32 with 8 bits of precision instead of 24, 2 bytes.
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "f32",
            Dtype::Bf16 => "bf16",
        })
    }
}

/// The shape of a matrix on a device, and the type of its elements.
pub trait Shape {
    /// Number of rows.
    fn rows(&self) -> usize;
    /// Number of columns.
    fn cols(&self) -> usize;
    /// Type of the elements.
    fn dtype(&self) -> Dtype;
    /// `(rows, cols)`.
    fn shape(&self) -> (usize, usize) {
        (self.rows(), self.cols())
    }
}

/// Which sequence each row belongs to, and its position there.
///
/// Usually all tokens of a packed batch; the queries of an attention may be some of them.
pub struct Layout<B: Backend> {
    /// Rows of sequence `s` are `offsets[s]..offsets[s + 1]`. `[S + 1]`
    pub offsets: B::Index,
    /// Position of each row in its sequence, from 0, ascending within a sequence. `[rows]`
    pub positions: B::Index,
    /// Number of sequences, `S`.
    pub sequences: usize,
    /// Number of rows.
    pub rows: usize,
    /// One more than the largest position.
    pub longest: usize,
}

/// Cosines and sines of the rotary embedding, one row a position. Both `[positions, hd / 2]`.
pub struct RopeTable<B: Backend> {
    /// `cos(position · inv_freq)`.
    pub cos: B::Tensor,
    /// `sin(position · inv_freq)`.
    pub sin: B::Tensor,
}

/// The direction of [`Backend::rope`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeDirection {
    /// The rotation of the forward pass.
    Forward,
    /// The inverse rotation, which is its transpose: the backward pass.
    Backward,
}

/// The heads of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `KV`; divides `H`. Query head `h` reads key head `h / (H / KV)`.
    pub kv_heads: usize,
    /// Features of a head, `hd`.
    pub head_dim: usize,
    /// A query at position `i` sees keys at positions `i - window < j <= i`; `None` sees all `j <= i`.
    pub window: Option<usize>,
    /// Factor on `q · k` before the softmax, usually `1 / sqrt(hd)`.
    pub scale: f32,
}

/// Selects the mask of a dropout: the same key gives the same mask on every device and in every
/// recomputation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the step.
    pub step: u64,
    /// Number of the module within the model.
    pub module: u32,
    /// Probability that an element becomes zero, below 1.
    pub probability: f32,
}

/// Which token each row of a matrix belongs to. The same token has the same identity in whatever
/// chunk, process or order it is computed. Both `[rows]`.
pub struct TokenIds<'i, B: Backend> {
    /// Number of the row's sequence among all sequences of the step, over all processes.
    pub sequences: &'i B::Index,
    /// Position of the row in its sequence.
    pub positions: &'i B::Index,
}

/// Whether a gradient is added to the buffer or overwrites it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accumulate {
    /// The buffer holds values of an earlier step.
    Overwrite,
    /// The buffer holds a part of the same gradient.
    Add,
}

/// The output of an attention, with what its backward pass needs.
pub struct AttentionOutput<B: Backend> {
    /// The weighted values. `[rows of q, H · hd]`
    pub out: B::Tensor,
    /// Log of the sum of exponentials of each query's scaled scores. `[rows of q, H]`, f32
    pub log_sum_exp: B::Tensor,
}

/// Hyperparameters of one AdamW update (Loshchilov and Hutter 2019, algorithm 2). f64, because
/// `1 - beta2` would lose half its digits in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Learning rate of this step, schedule applied.
    pub learning_rate: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this update, from 1, for the bias correction.
    pub step: u64,
}

/// A device: its buffers, and the operations of an embedding model on them.
pub trait Backend: Clone + Send + Sync + 'static {
    /// A row-major matrix of f32 or bf16.
    type Tensor: Shape + Send + Sync;
    /// A list of u32: token ids, row numbers, offsets, positions.
    type Index: Send + Sync;

    /// What runs the kernels, in words for the log.
    fn description(&self) -> String;

    /// The instructions and kernels that a model with activations of this dtype computes with: what the bits
    /// of a result depend on besides its inputs.
    fn kernels(&self, activations: Dtype) -> String;

    /// Whether calls return before the device has finished, so that a caller should ask for the next
    /// step before it reads the results of this one.
    fn is_asynchronous(&self) -> bool {
        false
    }

    // ---- Buffers ------------------------------------------------------------------------------

    /// A matrix of zeros, f32.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;
    /// `x = 0`, in place.
    fn clear(&self, x: &mut Self::Tensor) -> Result<()>;
    /// Copies `data` (`rows * cols` elements, row-major) to the device, as f32.
    fn upload(&self, data: &[f32], rows: usize, cols: usize) -> Result<Self::Tensor>;
    /// Copies a list of indices to the device.
    fn upload_index(&self, data: &[u32]) -> Result<Self::Index>;
    /// Waits for the device and copies a matrix to the host, widened.
    fn download(&self, x: &Self::Tensor) -> Result<Vec<f32>>;
    /// Rows `start..start + count` of `x`.
    fn slice_rows(&self, x: &Self::Tensor, start: usize, count: usize) -> Result<Self::Tensor>;
    /// The rows of all `parts`, concatenated.
    fn concat_rows(&self, parts: &[&Self::Tensor]) -> Result<Self::Tensor>;

    /// Waits for the device and copies the elements `range` of an f32 matrix, row by row, to the host.
    fn read_elements(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Vec<f32>>;
    /// Overwrites elements of an f32 matrix, row by row, from the element `start` on.
    fn write_elements(&self, x: &mut Self::Tensor, start: usize, data: &[f32]) -> Result<()>;

    /// `x` in another dtype; bf16 is rounded to nearest, ties to even.
    fn cast(&self, x: &Self::Tensor, to: Dtype) -> Result<Self::Tensor>;

    // ---- Products -----------------------------------------------------------------------------
    //
    // The precision is that of the left operand, x or dy: if it is bf16, the other operand is rounded
    // to bf16 before it is multiplied. Weights have either dtype; biases and weight gradients are f32.

    /// `x · wᵀ (+ bias) (+ residual)`: x `[n, in]`, w `[out, in]`, bias `[1, out]`, residual and
    /// result `[n, out]`. The result has the dtype of the residual, or of x.
    fn linear(
        &self,
        x: &Self::Tensor,
        w: &Self::Tensor,
        bias: Option<&Self::Tensor>,
        residual: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// `onto + x · wᵀ`, written over onto. `[n, out]`
    fn linear_onto(
        &self,
        x: &Self::Tensor,
        w: &Self::Tensor,
        onto: Self::Tensor,
    ) -> Result<Self::Tensor>;
    /// Gradient of [`linear`](Backend::linear) by its input: `dy · w (+ onto)`, in the dtype of onto,
    /// or of dy. `[n, in]`
    fn linear_input_grad(
        &self,
        dy: &Self::Tensor,
        w: &Self::Tensor,
        onto: Option<Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// Gradient of [`linear`](Backend::linear) by its weight: `dw = dyᵀ · x`, or `dw += dyᵀ · x`.
    /// `[out, in]`
    fn linear_weight_grad(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        dw: &mut Self::Tensor,
        accumulate: Accumulate,
    ) -> Result<()>;
    /// Gradient of [`linear`](Backend::linear) by its bias: `db += Σ_rows dy`. `[1, out]`
    fn linear_bias_grad(&self, dy: &Self::Tensor, db: &mut Self::Tensor) -> Result<()>;

    // ---- Rows ---------------------------------------------------------------------------------

    /// Row `rows[i]` of `x` as row `i` of the result; an embedding when `x` is a table.
    fn gather_rows(&self, x: &Self::Tensor, rows: &Self::Index) -> Result<Self::Tensor>;
    /// Gradient of [`gather_rows`](Backend::gather_rows): `dx[rows[i]] += dy[i]`; rows may repeat.
    fn scatter_add_rows(
        &self,
        dy: &Self::Tensor,
        rows: &Self::Index,
        dx: &mut Self::Tensor,
    ) -> Result<()>;
    /// Mean of rows `offsets[s]..offsets[s + 1]` as row `s`. `[S, d]`
    fn segment_mean(&self, x: &Self::Tensor, offsets: &Self::Index) -> Result<Self::Tensor>;
    /// Gradient of [`segment_mean`](Backend::segment_mean): each row gets its share of `dy[s]`.
    fn segment_mean_backward(
        &self,
        dy: &Self::Tensor,
        offsets: &Self::Index,
        rows: usize,
    ) -> Result<Self::Tensor>;

    // ---- Norms --------------------------------------------------------------------------------

    /// `y = x / rms(x) · w` with `rms = sqrt(mean(x²) + eps)`, over each group of `w.cols()` columns
    /// (a whole row, or one head of it). w `[1, g]`, f32. Returns y in the dtype `to`, and `1 / rms`
    /// `[n, cols / g]`, f32.
    fn rms_norm(
        &self,
        x: &Self::Tensor,
        w: &Self::Tensor,
        eps: f32,
        to: Dtype,
    ) -> Result<(Self::Tensor, Self::Tensor)>;
    /// Gradients of [`rms_norm`](Backend::rms_norm), with `x̂ = x · inv_rms`:
    /// `dx = inv_rms · (dy∘w − x̂ · mean(dy∘w∘x̂)) (+ onto)`, in the dtype of x, and
    /// `dw += Σ_rows dy∘x̂`.
    fn rms_norm_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Tensor,
        inv_rms: &Self::Tensor,
        dw: Option<&mut Self::Tensor>,
        onto: Option<Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// `y = x / max(‖x‖₂, 1e-12)` row by row, f32. Returns y and the reciprocal `[n, 1]`.
    fn normalize(&self, x: &Self::Tensor) -> Result<(Self::Tensor, Self::Tensor)>;
    /// Gradient of [`normalize`](Backend::normalize): `dx = (dy − y · (y·dy)) · inv_norm`.
    fn normalize_backward(
        &self,
        dy: &Self::Tensor,
        y: &Self::Tensor,
        inv_norm: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    // ---- Attention and MLP --------------------------------------------------------------------

    /// Rotary embedding in place (Su et al. 2021): in each head, features `i` and `i + hd/2` are rotated
    /// by the angle of the row's position.
    fn rope(
        &self,
        x: &mut Self::Tensor,
        positions: &Self::Index,
        table: &RopeTable<Self>,
        turn: RopeDirection,
    ) -> Result<()>;
    /// Causal attention of each sequence over itself. q `[rows of queries, H·hd]`, k and v
    /// `[rows of keys, KV·hd]`; `keys` holds every position of its sequences.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        queries: &Layout<Self>,
        keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<AttentionOutput<Self>>;
    /// Gradients of [`attention`](Backend::attention) by q, k and v, from what it returned.
    #[expect(clippy::too_many_arguments, reason = "the operation's own inputs, each once")]
    fn attention_backward(
        &self,
        dout: &Self::Tensor,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        attended: &AttentionOutput<Self>,
        queries: &Layout<Self>,
        keys: &Layout<Self>,
        shape: &AttentionShape,
    ) -> Result<(Self::Tensor, Self::Tensor, Self::Tensor)>;
    /// `silu(gate) ∘ up` (Shazeer 2020).
    fn swiglu(&self, gate: &Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor>;
    /// Gradients of [`swiglu`](Backend::swiglu) by gate and up.
    fn swiglu_backward(
        &self,
        dy: &Self::Tensor,
        gate: &Self::Tensor,
        up: &Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor)>;

    /// Each element of x with probability `1 − p` and divided by it, else zero `(+ onto)`; also its own
    /// gradient. Element `(row, column)` is kept where the Philox4x32-10 generator (Salmon et al.
    /// 2011) with `key.seed` and the counter `(module · 2¹⁶ + 16 · (column / 64) + column % 16,
    /// tokens.sequences[row], tokens.positions[row], step)` draws at least `p · 2³²` in word
    /// `column / 16 % 4`: sixteen counters side by side make a block of 64 columns, their first words,
    /// then their second. So a token has the same mask in whatever chunk or process it is computed.
    /// At most 2¹⁶ modules and 2¹⁸ columns.
    fn dropout(
        &self,
        x: &Self::Tensor,
        tokens: TokenIds<'_, Self>,
        key: &DropoutKey,
        onto: Option<Self::Tensor>,
    ) -> Result<Self::Tensor>;

    // ---- Loss and optimizer -------------------------------------------------------------------

    /// `x *= factor`.
    fn scale(&self, x: &mut Self::Tensor, factor: f32) -> Result<()>;
    /// Mean over rows of `−log softmax(scores[i])[targets[i]]`, and its gradient by the scores.
    /// Returns loss `[1, 1]` and dscores `[n, m]`.
    fn cross_entropy(
        &self,
        scores: &Self::Tensor,
        targets: &Self::Index,
    ) -> Result<(Self::Tensor, Self::Tensor)>;
    /// `sum[0] += Σ x²` over the elements `range` of x, row by row. sum `[1, 1]`
    fn add_sum_of_squares(
        &self,
        x: &Self::Tensor,
        range: Range<usize>,
        sum: &mut Self::Tensor,
    ) -> Result<()>;
    /// From a sum of squares, the norm and the factor that clips it to `max_norm`:
    /// `[norm, min(1, max_norm / (norm + 1e-6))]`, or factor 1 without a limit. `[1, 2]`
    fn clip_factor(&self, sum: &Self::Tensor, max_norm: Option<f32>) -> Result<Self::Tensor>;
    /// One AdamW update of the elements `range` of `param`, row by row, with `grad · clip[1]`; does
    /// nothing when `clip[0]` is not finite, so that a failed step does not change the weights. The
    /// moments have `range.len()` elements, grad has the parameter's shape.
    fn adamw(
        &self,
        param: &mut Self::Tensor,
        range: Range<usize>,
        grad: &Self::Tensor,
        moments: (&mut Self::Tensor, &mut Self::Tensor),
        clip: &Self::Tensor,
        step: &AdamWStep,
    ) -> Result<()>;
}
