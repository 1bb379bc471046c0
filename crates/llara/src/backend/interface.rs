//! [`Backend`], and the arguments and results of its operations that contain device buffers.

use std::ops::Range;

use super::memory::DeviceMemory;
use super::operands::{
    Accumulate, AdamWStep, AttentionGradients, AttentionShape, DistillationLoss, DropoutKey,
    Epilogue, RopeDirection, ScatterRows, WeightUse,
};
use super::tensor::{Dtype, Elements, Shape, View, ViewMut};
use crate::Result;

/// A parameter's values as a backend stores them; see [`Backend::prepare`].
pub trait PreparedWeight<T>: Shape {
    /// The values: f32 for a trainable parameter, else f32 or bf16.
    fn values(&self) -> &T;
    /// The values, without the copies that were made from them.
    fn into_values(self) -> T;
}

/// A device: its buffers, and the operations that an embedding model applies to them.
pub trait Backend: Clone + Send + Sync + 'static {
    /// A row-major matrix of f32 or bf16.
    type Tensor: Shape + Send + Sync;
    /// A parameter, prepared for the operations that read it: its values, and any copies of them that
    /// matrix products read (rounded, packed, scaled). Shape and dtype are those of the values.
    type Weight: PreparedWeight<Self::Tensor> + Send + Sync;
    /// A list of u32: token ids, row numbers, offsets, positions.
    type Index: Send + Sync;
    /// State that the backward pass of attention needs in addition to the input and output.
    type AttentionState: Send + Sync;
    /// A pending copy of a matrix to the host.
    type Download: Send;

    /// A description of the device, for the log.
    fn description(&self) -> String;

    /// A description of how matrix products of activations of this dtype are computed, for the log.
    fn describe_products(&self, dtype: Dtype) -> String;

    /// The instruction sets and kernels that a model with activations of this dtype uses. If two devices
    /// differ in this string, results for the same inputs may differ in rounding.
    fn kernels(&self, activations: Dtype) -> String;

    /// Selects the kernels for bf16 named by a string that [`kernels`](Backend::kernels) returned, possibly
    /// in another process, so that later operations round as that process did. This affects only a choice of
    /// kernels that depends on a measurement and that has not been made yet in this process.
    fn use_kernels(&self, _kernels: &str) {}

    /// The dtype of activations for which this device is fastest.
    fn fastest_dtype(&self) -> Dtype;

    /// How this backend allocates memory, and how much its kernels need in addition to tensors. The memory
    /// prediction uses this.
    fn memory(&self) -> DeviceMemory;

    /// Free and total bytes of the device's own memory; `None` if tensors are in the main memory of the
    /// machine.
    ///
    /// # Errors
    /// When the device is lost.
    fn free_and_total_bytes(&self) -> Result<Option<(usize, usize)>> {
        Ok(None)
    }

    /// Returns memory of dropped tensors that the backend keeps for later ones to the system. Called between phases of a
    /// run with different needs; new tensors cost more for a while. Where the system refuses, memory is kept.
    fn release_unused_memory(&self) {}

    /// Whether calls return before the device has finished. A caller should then enqueue the next step
    /// before it reads the results of the current one.
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
    /// Copies lists of indices to the device in one transfer.
    fn upload_indices<const N: usize>(&self, lists: [&[u32]; N]) -> Result<[Self::Index; N]>;
    /// Enqueues a copy of a matrix to the host, after all operations enqueued so far, and does not wait for
    /// it.
    fn start_download(&self, x: &Self::Tensor) -> Result<Self::Download>;
    /// Waits for the copy and returns its elements, converted to f32. Operations that were enqueued after
    /// it may still be running.
    fn finish_download(&self, download: Self::Download) -> Result<Vec<f32>>;
    /// Waits for the device and copies a matrix to the host, converted to f32.
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
    /// Copies elements, converted to the dtype of `to`. Both have the same shape.
    fn copy(&self, x: View<'_, Self::Tensor>, to: ViewMut<'_, Self::Tensor>) -> Result<()>;
    /// Waits for the device and copies the elements `range` of an f32 matrix, in row-major order, to the
    /// host.
    fn read_elements(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Vec<f32>>;
    /// Overwrites `data.len()` elements of an f32 matrix, in row-major order, starting at element `start`.
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

    /// Takes the values of a parameter and makes the copies that operations reading it need.
    fn prepare(&self, values: Self::Tensor, purpose: WeightUse) -> Result<Self::Weight>;

    // ---- Products -----------------------------------------------------------------------------
    //
    // The precision is that of the left operand, x or dy: if it is bf16, the other operand is rounded
    // to bf16 before the multiplication. Weights have either dtype; biases and weight gradients are f32.
    // A view of a weight must have all of its columns.

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
    /// Gradient of [`linear`](Backend::linear) with respect to its input: `alpha · dy · w (+ onto)`, in the
    /// dtype of onto, or of dy. `[n, in]`
    fn linear_input_grad(
        &self,
        dy: View<'_, Self::Tensor>,
        w: View<'_, Self::Weight>,
        alpha: f32,
        onto: Option<Self::Tensor>,
    ) -> Result<Self::Tensor>;
    /// Gradient of [`linear`](Backend::linear) with `alpha = 1` with respect to its weight: `dw = dyᵀ · x`,
    /// or `dw += dyᵀ · x`. `[out, in]`
    fn linear_weight_grad(
        &self,
        dy: View<'_, Self::Tensor>,
        x: View<'_, Self::Tensor>,
        dw: ViewMut<'_, Self::Tensor>,
        accumulate: Accumulate,
    ) -> Result<()>;
    /// Gradient of [`linear`](Backend::linear) with respect to its bias: `db = Σ_rows dy`, or
    /// `db += Σ_rows dy`. `[1, out]`
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

    /// Row `i` of the result is row `rows[i]` of `x`; an embedding lookup if `x` is an embedding table.
    fn gather_rows(&self, x: &Self::Tensor, rows: &Self::Index) -> Result<Self::Tensor>;
    /// Gradient of [`gather_rows`](Backend::gather_rows): `dx[target] += Σ dy[source]` over the pairs of
    /// the plan. The sources of a target are added in the order of the plan.
    fn scatter_add_rows(
        &self,
        dy: &Self::Tensor,
        plan: &ScatterPlan<Self>,
        dx: &mut Self::Tensor,
    ) -> Result<()>;
    /// Row `s` of the result is the mean of rows `offsets[s]..offsets[s + 1]` of `x`. `[S, d]`
    fn segment_mean(&self, x: &Self::Tensor, offsets: &Self::Index) -> Result<Self::Tensor>;
    /// Gradient of [`segment_mean`](Backend::segment_mean): each row of segment `s` receives `dy[s]` divided
    /// by the number of rows of the segment.
    fn segment_mean_backward(
        &self,
        dy: &Self::Tensor,
        offsets: &Self::Index,
        rows: usize,
    ) -> Result<Self::Tensor>;

    // ---- Norms --------------------------------------------------------------------------------

    /// `y = x / rms(x) · w` with `rms = sqrt(mean(x²) + eps)`, over each group of `w.cols()` columns
    /// (a whole row, or one head of a row). w `[1, g]`, f32. Returns y in `dtype`, and `1 / rms`
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
    /// The same; dx overwrites dy.
    fn rms_norm_backward_in_place(
        &self,
        dy: ViewMut<'_, Self::Tensor>,
        x: View<'_, Self::Tensor>,
        w: &Self::Tensor,
        inv_rms: &Self::Tensor,
        dw: Option<&mut Self::Tensor>,
    ) -> Result<()>;
    /// `y = x / max(‖x‖₂, 1e-12)` for each row, f32. Returns y and `1 / max(‖x‖₂, 1e-12)` `[n, 1]`.
    fn normalize(&self, x: &Self::Tensor) -> Result<(Self::Tensor, Self::Tensor)>;
    /// Gradient of [`normalize`](Backend::normalize): `dx = (dy − y · (y·dy)) · inv_norm`.
    fn normalize_backward(
        &self,
        dy: View<'_, Self::Tensor>,
        y: &Self::Tensor,
        inv_norm: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    // ---- Attention and MLP --------------------------------------------------------------------

    /// Rotary position embedding, in place (Su et al. 2021): in each head, features `i` and `i + hd/2` are
    /// rotated by the angle of the row's position.
    fn rope(
        &self,
        x: ViewMut<'_, Self::Tensor>,
        positions: &Self::Index,
        table: &RopeTable<Self>,
        direction: RopeDirection,
    ) -> Result<()>;
    /// Causal self-attention within each sequence; the queries are the last rows of each sequence.
    fn attention(&self, input: &AttentionInput<'_, Self>) -> Result<AttentionOutput<Self>>;
    /// Gradients of [`attention`](Backend::attention) with respect to q, k and v. `output` is what the
    /// forward pass returned.
    fn attention_backward(
        &self,
        dout: &Self::Tensor,
        input: &AttentionInput<'_, Self>,
        output: &AttentionOutput<Self>,
    ) -> Result<AttentionGradients<Self::Tensor>>;
    /// `silu(gate) ∘ up` (Shazeer 2020): gate and up are concatenated by columns `[n, 2·i]`, result `[n, i]`.
    fn swiglu(&self, gate_up: &Self::Tensor) -> Result<Self::Tensor>;
    /// Gradient of [`swiglu`](Backend::swiglu), which overwrites `gate_up`. Also recomputes the result of
    /// [`swiglu`](Backend::swiglu), which overwrites `dy`. Returns `(dgate_up, y)`.
    fn swiglu_backward(
        &self,
        dy: Self::Tensor,
        gate_up: Self::Tensor,
    ) -> Result<(Self::Tensor, Self::Tensor)>;

    /// Dropout: each element is kept with probability `1 − p` and divided by `1 − p`, else zero
    /// `(+ onto)`. The gradient is the same function of dy. Element `(row, column)` is kept if the
    /// Philox4x32-10 generator (Salmon et al. 2011) with `key.seed` and the counter `(module · 2¹⁶ +
    /// 16 · (column / 64) + column % 16, tokens.sequences[row], tokens.positions[row], step)` gives at
    /// least `p · 2³²` in word `column / 16 % 4`: sixteen adjacent counters cover a block of 64 columns,
    /// first with their first words, then with their second words, and so on. A token therefore has the
    /// same mask in every chunk and process. At most 2¹⁶ modules and 2¹⁸ columns.
    fn dropout(
        &self,
        x: &Self::Tensor,
        tokens: TokenIds<'_, Self>,
        key: &DropoutKey,
        onto: Option<Self::Tensor>,
    ) -> Result<Self::Tensor>;

    // ---- Loss and optimizer -------------------------------------------------------------------

    /// Mean over rows of `−log softmax(scores[i])[targets[i]]`, and its gradient with respect to the scores.
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
    /// The loss of predicting a set of columns from several rows together (Llama2Vec, Li et al. 2023). The rows are
    /// divided into bags of `bag_rows` rows. With `m_v` the maximum of column `v` over the rows of a bag, and
    /// `T` the columns that `sets` lists for that bag, at least one and each once, the loss of the bag is
    /// `−1/|T| · Σ_{v ∈ T} log softmax(m)_v`.
    ///
    /// Returns the mean over the bags `[1, 1]`, and its gradient `[n · bag_rows, m]` with respect to the logits:
    /// `(softmax(m)_v − 1[v ∈ T] / |T|) / n` in the first row of the bag that has the maximum of column `v`, 0 in
    /// its other rows. A NaN among the logits of a bag makes the loss NaN.
    fn set_cross_entropy(
        &self,
        logits: &Self::Tensor,
        bag_rows: usize,
        sets: &ListedColumns<Self>,
    ) -> Result<(Self::Tensor, Self::Tensor)>;
    /// `sum[0] += Σ x²` over the elements `range` of x, in row-major order. sum `[1, 1]`
    fn add_sum_of_squares(
        &self,
        x: &Self::Tensor,
        range: Range<usize>,
        sum: &mut Self::Tensor,
    ) -> Result<()>;
    /// The norm, from its sum of squares, and the factor that clips it to `max_norm`:
    /// `[norm, min(1, max_norm / (norm + 1e-6))]`; the factor is 1 if `max_norm` is `None`. `[1, 2]`
    fn clip_factor(&self, sum: &Self::Tensor, max_norm: Option<f32>) -> Result<Self::Tensor>;
    /// One AdamW update of the elements `range` of a weight, in row-major order, and of the copies prepared
    /// from them, with the gradient `grad · clip[1]`. Does nothing if `clip[0]` is not finite, so that a
    /// failed step does not change the weights. The moments have `range.len()` elements; grad has the shape
    /// of the weight.
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
    pub columns: Option<ListedColumns<B>>,
    /// Columns whose score is larger than the target's by more than this.
    pub margin: Option<f32>,
}

/// Columns of each row, or of each bag of rows, of a matrix.
pub struct ListedColumns<B: Backend> {
    /// Those of row or bag `i` are `starts[i]..starts[i + 1]` of `columns`. `[n + 1]`
    pub starts: B::Index,
    /// Column numbers.
    pub columns: B::Index,
}

/// The sequence of each row and its position in that sequence. The rows are all rows of a packed batch, or
/// only the last rows of each sequence: a sequence may share the rows of its first positions with another one.
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

/// Cosines and sines of the rotary position embedding, one row per position. Both `[positions, hd / 2]`.
pub struct RopeTable<B: Backend> {
    /// `cos(position · inv_freq)`.
    pub cos: B::Tensor,
    /// `sin(position · inv_freq)`.
    pub sin: B::Tensor,
}

/// The input of [`Backend::attention`].
pub struct AttentionInput<'a, B: Backend> {
    /// `[rows of queries, H·hd]`
    pub q: View<'a, B::Tensor>,
    /// `[rows of keys, KV·hd]`
    pub k: View<'a, B::Tensor>,
    /// `[rows of keys, KV·hd]`
    pub v: View<'a, B::Tensor>,
    /// The rows of q: the last rows of each sequence of `keys`; the bounds give their number.
    pub queries: &'a Layout<B>,
    /// The rows of k and v: every position of each sequence.
    pub keys: &'a Layout<B>,
    /// The heads.
    pub shape: &'a AttentionShape,
}

/// The output of [`Backend::attention`], and the state that its backward pass needs.
pub struct AttentionOutput<B: Backend> {
    /// The weighted values. `[rows of q, H·hd]`
    pub out: B::Tensor,
    /// What the backend saved for the backward pass.
    pub state: B::AttentionState,
}

/// The token that each row of a matrix belongs to. It does not depend on the chunk, the process or the order
/// in which the row is computed. Both `[rows]`.
pub struct TokenIds<'i, B: Backend> {
    /// Index of the row's sequence among all sequences of the step, over all processes.
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
    /// If the device is out of memory.
    pub fn upload(rows: &ScatterRows, backend: &B) -> Result<Self> {
        let lists = [&rows.sources, &rows.targets, &rows.starts].map(Vec::as_slice);
        Ok(Self::new(rows, backend.upload_indices(lists)?))
    }

    /// The plan of `rows`, whose sources, targets and starts have been uploaded.
    pub(crate) fn new(rows: &ScatterRows, [sources, targets, starts]: [B::Index; 3]) -> Self {
        let (sources_len, targets_len) = (rows.sources.len(), rows.targets.len());
        ScatterPlan { sources, targets, starts, sources_len, targets_len }
    }
}
