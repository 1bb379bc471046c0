//! [`Backend`], and those arguments and results of its operations that hold its buffers.

use std::ops::Range;

use super::memory::DeviceMemory;
use super::operands::{
    Accumulate, AdamWStep, AttentionGradients, AttentionShape, DistillationLoss, DropoutKey,
    Epilogue, RopeDirection, ScatterRows, WeightUse,
};
use super::tensor::{Dtype, Elements, Shape, View, ViewMut};
use crate::Result;

/// A parameter's values as a backend keeps them; see [`Backend::prepare`].
pub trait PreparedWeight<T>: Shape {
    /// The values: f32 for a trainable parameter, else f32 or bf16.
    fn values(&self) -> &T;
    /// The values alone, without what was made from them.
    fn into_values(self) -> T;
}

/// A device: its buffers, and the operations of an embedding model on them.
pub trait Backend: Clone + Send + Sync + 'static {
    /// A row-major matrix of f32 or bf16.
    type Tensor: Shape + Send + Sync;
    /// A parameter, prepared for the operations that read it: its values, and whatever copies of them
    /// the device multiplies by (rounded, packed, scaled). Shape and dtype are those of the values.
    type Weight: PreparedWeight<Self::Tensor> + Send + Sync;
    /// A list of u32: token ids, row numbers, offsets, positions.
    type Index: Send + Sync;
    /// What the backward pass of an attention needs besides its input and output.
    type AttentionState: Send + Sync;
    /// A matrix on its way to the host.
    type Download: Send;

    /// What runs the kernels, in words for the log.
    fn description(&self) -> String;

    /// How products of activations of this dtype are computed, in words for the log.
    fn describe_products(&self, dtype: Dtype) -> String;

    /// The instructions and kernels that a model with activations of this dtype computes with. Where they
    /// differ, results with the same inputs may differ in rounding.
    fn kernels(&self, activations: Dtype) -> String;

    /// Makes later operations round as those of the kernels that [`kernels`](Backend::kernels) returned for
    /// bf16, perhaps in another process, as far as the choice of kernels depends on a measurement and has
    /// not been made yet.
    fn use_kernels(&self, _kernels: &str) {}

    /// The dtype of activations with which a model computes fastest on this device.
    fn fastest_dtype(&self) -> Dtype;

    /// How this backend allocates, and what its kernels take besides tensors: what a prediction of
    /// memory needs to know.
    fn memory(&self) -> DeviceMemory;

    /// Free and total bytes of the device's own memory; `None` if tensors are in the machine's main
    /// memory.
    ///
    /// # Errors
    /// When the device is lost.
    fn free_and_total_bytes(&self) -> Result<Option<(usize, usize)>> {
        Ok(None)
    }

    /// Whether calls return before the device has finished, so that a caller should ask for the next
    /// step before it reads the results of this one.
    fn is_asynchronous(&self) -> bool {
        false
    }

    // ---- Buffers ------------------------------------------------------------------------------

    /// A matrix of zeros.
    fn zeros(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<Self::Tensor>;
    /// `x = 0`, in place.
    fn clear(&self, x: &mut Self::Tensor) -> Result<()>;
    /// Copies `data` (`rows * cols` elements, row-major) to the device, in its dtype.
    fn upload<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        rows: usize,
        cols: usize,
    ) -> Result<Self::Tensor>;
    /// Copies `data` to some rows and columns of a matrix of the same dtype.
    fn upload_into<'e>(
        &self,
        data: impl Into<Elements<'e>>,
        to: ViewMut<'_, Self::Tensor>,
    ) -> Result<()>;
    /// Copies lists of indices to the device, all of them in one transfer.
    fn upload_indices<const N: usize>(&self, lists: [&[u32]; N]) -> Result<[Self::Index; N]>;
    /// Asks for a copy of a matrix on the host as it is after all operations asked for so far, without
    /// waiting for it.
    fn start_download(&self, x: &Self::Tensor) -> Result<Self::Download>;
    /// Waits for the copy and returns its elements, widened to f32. Operations that were asked for
    /// after it may still be running.
    fn finish_download(&self, download: Self::Download) -> Result<Vec<f32>>;
    /// Waits for the device and copies a matrix to the host, widened to f32.
    fn download(&self, x: &Self::Tensor) -> Result<Vec<f32>> {
        self.finish_download(self.start_download(x)?)
    }
    /// [`download`](Backend::download) of some rows and columns.
    fn download_view(&self, x: View<'_, Self::Tensor>) -> Result<Vec<f32>> {
        if x.is_whole() {
            return self.download(x.tensor);
        }
        let mut block = self.zeros(x.rows, x.cols, x.dtype())?;
        self.copy(x, block.view_mut())?;
        self.download(&block)
    }
    /// Copies elements, rounded or widened to the dtype of `to`. Both have the same shape.
    fn copy(&self, x: View<'_, Self::Tensor>, to: ViewMut<'_, Self::Tensor>) -> Result<()>;
    /// Waits for the device and copies the elements `range` of an f32 matrix, row by row, to the host.
    fn read_elements(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Vec<f32>>;
    /// Overwrites elements of an f32 matrix, row by row, from the element `start` on.
    fn write_elements(&self, x: &mut Self::Tensor, start: usize, data: &[f32]) -> Result<()>;
    /// `y += scale · x`. Both are f32 and have the same shape.
    fn add_scaled(
        &self,
        x: View<'_, Self::Tensor>,
        scale: f32,
        y: ViewMut<'_, Self::Tensor>,
    ) -> Result<()>;
    /// `x` in another dtype; bf16 is rounded to nearest, ties to even.
    fn cast(&self, x: &Self::Tensor, dtype: Dtype) -> Result<Self::Tensor>;

    // ---- Weights ------------------------------------------------------------------------------

    /// Takes the values of a parameter and makes from them what the operations that read it want.
    fn prepare(&self, values: Self::Tensor, purpose: WeightUse) -> Result<Self::Weight>;

    // ---- Products -----------------------------------------------------------------------------
    //
    // The precision is that of the left operand, x or dy: if it is bf16, the other operand is rounded
    // to bf16 before it is multiplied. Weights have either dtype; biases and weight gradients are f32.
    // A view of a weight has all of its columns.

    /// `alpha · x · wᵀ (+ bias) (+ residual)`: x `[n, in]`, w `[out, in]`, bias `[1, out]`, residual and
    /// result `[n, out]`. The result has the dtype of the residual, or of x.
    fn linear(
        &self,
        x: View<'_, Self::Tensor>,
        w: View<'_, Self::Weight>,
        alpha: f32,
        epilogue: Epilogue<'_, Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// `y += x · wᵀ`: y `[n, out]`
    fn linear_add(
        &self,
        x: View<'_, Self::Tensor>,
        w: View<'_, Self::Weight>,
        y: ViewMut<'_, Self::Tensor>,
    ) -> Result<()>;
    /// Gradient of [`linear`](Backend::linear) by its input: `alpha · dy · w (+ onto)`, in the dtype of
    /// onto, or of dy. `[n, in]`
    fn linear_input_grad(
        &self,
        dy: View<'_, Self::Tensor>,
        w: View<'_, Self::Weight>,
        alpha: f32,
        onto: Option<Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// Gradient of [`linear`](Backend::linear) with `alpha = 1` by its weight: `dw = dyᵀ · x`, or
    /// `dw += dyᵀ · x`. `[out, in]`
    fn linear_weight_grad(
        &self,
        dy: View<'_, Self::Tensor>,
        x: View<'_, Self::Tensor>,
        dw: ViewMut<'_, Self::Tensor>,
        accumulate: Accumulate,
    ) -> Result<()>;
    /// Gradient of [`linear`](Backend::linear) by its bias: `db = Σ_rows dy`, or `db += Σ_rows dy`.
    /// `[1, out]`
    fn linear_bias_grad(
        &self,
        dy: View<'_, Self::Tensor>,
        db: ViewMut<'_, Self::Tensor>,
        accumulate: Accumulate,
    ) -> Result<()>;

    /// A low-rank adapter (Hu et al. 2021): with `hidden = scale · x · aᵀ`, `y += hidden · bᵀ`. x
    /// `[n, in]`, a `[r, in]`, b `[out, r]`, y `[n, out]`; returns hidden `[n, r]`.
    fn lora(
        &self,
        x: View<'_, Self::Tensor>,
        (a, b): (&Self::Weight, &Self::Weight),
        scale: f32,
        y: ViewMut<'_, Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let hidden = self.linear(x, a.view(), scale, Epilogue::default())?;
        self.linear_add(hidden.view(), b.view(), y)?;
        Ok(hidden)
    }

    /// `scale · q · pᵀ`, f32: q `[n, d]`, p `[m, d]`, result `[n, m]`.
    fn scores(&self, q: &Self::Tensor, p: &Self::Tensor, scale: f32) -> Result<Self::Tensor>;
    /// Gradients of [`scores`](Backend::scores): `scale · ds · p` `[n, d]` and `scale · dsᵀ · q` `[m, d]`.
    fn scores_backward(
        &self,
        ds: &Self::Tensor,
        q: &Self::Tensor,
        p: &Self::Tensor,
        scale: f32,
    ) -> Result<(Self::Tensor, Self::Tensor)>;

    // ---- Rows ---------------------------------------------------------------------------------

    /// Row `rows[i]` of `x` as row `i` of the result; an embedding when `x` is a table.
    fn gather_rows(&self, x: &Self::Tensor, rows: &Self::Index) -> Result<Self::Tensor>;
    /// Gradient of [`gather_rows`](Backend::gather_rows): `dx[target] += Σ dy[source]` over the pairs of
    /// the plan. The sources of a target are added in the order of the plan.
    fn scatter_add_rows(
        &self,
        dy: &Self::Tensor,
        plan: &ScatterPlan<Self>,
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
    /// (a whole row, or one head of it). w `[1, g]`, f32. Returns y in `dtype`, and `1 / rms`
    /// `[n, cols / g]`, f32.
    fn rms_norm(
        &self,
        x: View<'_, Self::Tensor>,
        w: &Self::Tensor,
        eps: f32,
        dtype: Dtype,
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
    /// The same with dx written over dy.
    fn rms_norm_backward_in_place(
        &self,
        dy: ViewMut<'_, Self::Tensor>,
        x: View<'_, Self::Tensor>,
        w: &Self::Tensor,
        inv_rms: &Self::Tensor,
        dw: Option<&mut Self::Tensor>,
    ) -> Result<()>;
    /// `y = x / max(‖x‖₂, 1e-12)` row by row, f32. Returns y and the reciprocal `[n, 1]`.
    fn normalize(&self, x: &Self::Tensor) -> Result<(Self::Tensor, Self::Tensor)>;
    /// Gradient of [`normalize`](Backend::normalize): `dx = (dy − y · (y·dy)) · inv_norm`.
    fn normalize_backward(
        &self,
        dy: View<'_, Self::Tensor>,
        y: &Self::Tensor,
        inv_norm: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    // ---- Attention and MLP --------------------------------------------------------------------

    /// Rotary embedding in place (Su et al. 2021): in each head, features `i` and `i + hd/2` are rotated
    /// by the angle of the row's position.
    fn rope(
        &self,
        x: ViewMut<'_, Self::Tensor>,
        positions: &Self::Index,
        table: &RopeTable<Self>,
        direction: RopeDirection,
    ) -> Result<()>;
    /// Causal attention of each sequence over itself, by the last rows of each sequence.
    fn attention(&self, input: &AttentionInput<'_, Self>) -> Result<AttentionOutput<Self>>;
    /// Gradients of [`attention`](Backend::attention) by its inputs, from what it returned.
    fn attention_backward(
        &self,
        dout: &Self::Tensor,
        input: &AttentionInput<'_, Self>,
        output: &AttentionOutput<Self>,
    ) -> Result<AttentionGradients<Self::Tensor>>;
    /// `silu(gate) ∘ up` (Shazeer 2020): gate and up side by side `[n, 2·i]`, result `[n, i]`.
    fn swiglu(&self, gate_up: &Self::Tensor) -> Result<Self::Tensor>;
    /// Gradient of [`swiglu`](Backend::swiglu), written over `gate_up`; the result of
    /// [`swiglu`](Backend::swiglu) once more, written over `dy`. Returns `(dgate_up, y)`.
    fn swiglu_backward(
        &self,
        dy: Self::Tensor,
        gate_up: Self::Tensor,
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

    /// Mean over rows of `−log softmax(scores[i])[targets[i]]`, and its gradient by the scores.
    /// Returns loss `[1, 1]` and dscores `[n, m]`.
    fn cross_entropy(
        &self,
        scores: &Self::Tensor,
        targets: &Self::Index,
    ) -> Result<(Self::Tensor, Self::Tensor)>;
    /// The scores `[n, m]` with −∞ at the columns that `mask` leaves out of each row; the column
    /// `targets[i]` of row `i` always keeps its score. A score of −∞ has no part in
    /// [`cross_entropy`](Backend::cross_entropy), and its gradient is 0.
    fn mask_scores(
        &self,
        scores: &Self::Tensor,
        targets: &Self::Index,
        mask: &ScoreMask<Self>,
    ) -> Result<Self::Tensor>;
    /// A [`DistillationLoss`] of each row's group: of scores `[n, m]`, the `G` columns from `firsts[i]` on,
    /// the positive first, against the teacher's scores `[n, G]`. Returns the mean over rows `[1, 1]`, and
    /// adds `weight ·` its gradient to dscores `[n, m]`.
    fn distillation(
        &self,
        scores: &Self::Tensor,
        firsts: &Self::Index,
        teacher: &Self::Tensor,
        loss: DistillationLoss,
        weight: f32,
        dscores: &mut Self::Tensor,
    ) -> Result<Self::Tensor>;
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
    /// One AdamW update of the elements `range` of a weight, row by row, and of what was prepared from
    /// them, with `grad · clip[1]`; does nothing when `clip[0]` is not finite, so that a failed step does
    /// not change the weights. The moments have `range.len()` elements, grad has the weight's shape.
    fn adamw(
        &self,
        weight: &mut Self::Weight,
        range: Range<usize>,
        grad: &Self::Tensor,
        moments: (&mut Self::Tensor, &mut Self::Tensor),
        clip: &Self::Tensor,
        step: &AdamWStep,
    ) -> Result<()>;
}

/// The columns that [`Backend::mask_scores`] leaves out of each row.
pub struct ScoreMask<B: Backend> {
    /// All columns outside the target's group, where groups are this many consecutive columns; `None`:
    /// groups do not matter.
    pub group_size: Option<usize>,
    /// Columns that are listed.
    pub columns: Option<MaskedColumns<B>>,
    /// Columns whose score is larger than the target's by more than this.
    pub margin: Option<f32>,
}

/// Columns of each row of a matrix.
pub struct MaskedColumns<B: Backend> {
    /// Those of row `i` are `starts[i]..starts[i + 1]` of `columns`. `[n + 1]`
    pub starts: B::Index,
    /// Column numbers.
    pub columns: B::Index,
}

/// Which sequence each row belongs to, and its position there: the last rows of each sequence of a
/// packed batch, or all of them.
pub struct Layout<B: Backend> {
    /// Rows of sequence `s` are `bounds[s]..bounds[s + 1]`, on the host. `[S + 1]`
    pub bounds: Vec<u32>,
    /// The same on the device. `[S + 1]`
    pub offsets: B::Index,
    /// Position of each row in its sequence, from 0, ascending within a sequence. `[rows]`
    pub positions: B::Index,
    /// One more than the largest position.
    pub longest: usize,
}

impl<B: Backend> Layout<B> {
    /// Number of sequences, `S`.
    pub fn sequences(&self) -> usize {
        self.bounds.len() - 1
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.bounds.last().map_or(0, |&end| end as usize)
    }
}

/// Cosines and sines of the rotary embedding, one row a position. Both `[positions, hd / 2]`.
pub struct RopeTable<B: Backend> {
    /// `cos(position · inv_freq)`.
    pub cos: B::Tensor,
    /// `sin(position · inv_freq)`.
    pub sin: B::Tensor,
}

/// The input of an attention.
pub struct AttentionInput<'a, B: Backend> {
    /// `[rows of queries, H·hd]`
    pub q: View<'a, B::Tensor>,
    /// `[rows of keys, KV·hd]`
    pub k: View<'a, B::Tensor>,
    /// `[rows of keys, KV·hd]`
    pub v: View<'a, B::Tensor>,
    /// The rows of q: the last ones of each sequence of `keys`, as many as the bounds say.
    pub queries: &'a Layout<B>,
    /// The rows of k and v: every position of each sequence.
    pub keys: &'a Layout<B>,
    /// The heads.
    pub shape: &'a AttentionShape,
}

/// The output of an attention, with what its backward pass needs.
pub struct AttentionOutput<B: Backend> {
    /// The weighted values. `[rows of q, H·hd]`
    pub out: B::Tensor,
    /// What the backend saved.
    pub state: B::AttentionState,
}

/// Which token each row of a matrix belongs to. The same token has the same identity in whatever
/// chunk, process or order it is computed. Both `[rows]`.
pub struct TokenIds<'i, B: Backend> {
    /// Number of the row's sequence among all sequences of the step, over all processes.
    pub sequences: &'i B::Index,
    /// Position of the row in its sequence.
    pub positions: &'i B::Index,
}

/// [`ScatterRows`] on a device.
pub struct ScatterPlan<B: Backend> {
    /// See [`ScatterRows::sources`].
    pub sources: B::Index,
    /// See [`ScatterRows::targets`].
    pub targets: B::Index,
    /// See [`ScatterRows::starts`].
    pub starts: B::Index,
    /// Number of sources.
    pub sources_len: usize,
    /// Number of targets.
    pub targets_len: usize,
}

impl<B: Backend> ScatterPlan<B> {
    /// Copies `rows` to a device.
    ///
    /// # Errors
    /// When the device has no memory left.
    pub fn upload(rows: &ScatterRows, backend: &B) -> Result<Self> {
        let lists = [&rows.sources, &rows.targets, &rows.starts].map(Vec::as_slice);
        Ok(Self::new(rows, backend.upload_indices(lists)?))
    }

    /// `rows` whose sources, targets and starts have been uploaded.
    pub(crate) fn new(rows: &ScatterRows, [sources, targets, starts]: [B::Index; 3]) -> Self {
        let (sources_len, targets_len) = (rows.sources.len(), rows.targets.len());
        ScatterPlan { sources, targets, starts, sources_len, targets_len }
    }
}
