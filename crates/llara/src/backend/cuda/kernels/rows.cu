// Copying, gathering, scattering and averaging rows; sums of columns.
#include "elements.cuh"

/// y = x, converted. One thread per octet of a row.
struct CopyArgs {
    const void* x;
    void* y;
    u64 rows;
    u64 cols;
    u64 x_stride;
    u64 y_stride;
    u32 wide;
};
template <class X, class Y> DEVICE void copy(const CopyArgs& a) {
    const u64 octets = octets_of(a.cols), item = thread_in_grid();
    if (item >= a.rows * octets) return;
    const Split at = split(item, octets);
    const u64 row = at.quotient, col = at.remainder * OCTET;
    float x[OCTET];
    load8(x, (const X*)a.x + row * a.x_stride + col, a.cols - col, a.wide);
    store8((Y*)a.y + row * a.y_stride + col, x, a.cols - col, a.wide);
}
KERNEL(256, 1) copy_f32_f32(CopyArgs a) { copy<float, float>(a); }
KERNEL(256, 1) copy_f32_bf16(CopyArgs a) { copy<float, bf16>(a); }
KERNEL(256, 1) copy_bf16_f32(CopyArgs a) { copy<bf16, float>(a); }
KERNEL(256, 1) copy_bf16_bf16(CopyArgs a) { copy<bf16, bf16>(a); }

/// y += scale · x. One thread per octet of a row.
struct AddScaledArgs {
    const float* x;
    float* y;
    u64 rows;
    u64 cols;
    u64 x_stride;
    u64 y_stride;
    float scale;
    u32 wide;
};
KERNEL(256, 1) add_scaled(AddScaledArgs a) {
    const u64 octets = octets_of(a.cols), item = thread_in_grid();
    if (item >= a.rows * octets) return;
    const Split at = split(item, octets);
    const u64 row = at.quotient, col = at.remainder * OCTET, left = a.cols - col;
    float x[OCTET], y[OCTET];
    load8(x, a.x + row * a.x_stride + col, left, a.wide);
    load8(y, a.y + row * a.y_stride + col, left, a.wide);
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) y[j] += a.scale * x[j];
    store8(a.y + row * a.y_stride + col, y, left, a.wide);
}

/// y[i] = x[rows[i]]: x and y have `cols` columns, y has n rows. One thread per octet.
struct GatherArgs {
    const void* x;
    const u32* rows;
    void* y;
    u64 n;
    u64 cols;
    u32 wide;
};
template <class T> DEVICE void gather(const GatherArgs& a) {
    const u64 octets = octets_of(a.cols), item = thread_in_grid();
    if (item >= a.n * octets) return;
    const Split at = split(item, octets);
    const u64 col = at.remainder * OCTET;
    float x[OCTET];
    load8(x, (const T*)a.x + (u64)a.rows[at.quotient] * a.cols + col, a.cols - col, a.wide);
    store8((T*)a.y + at.quotient * a.cols + col, x, a.cols - col, a.wide);
}
KERNEL(256, 1) gather_f32(GatherArgs a) { gather<float>(a); }
KERNEL(256, 1) gather_bf16(GatherArgs a) { gather<bf16>(a); }

/// dx[targets[i]] += Σ dy[sources[j]] over starts[i] <= j < starts[i + 1], in this order. Block (i, b) has
/// octets blockDim.x · b and following of target i.
struct ScatterArgs {
    const void* dy;
    const u32* sources;
    const u32* targets;
    const u32* starts;
    void* dx;
    u64 cols;
    u32 wide;
};
template <class G, class X> DEVICE void scatter(const ScatterArgs& a) {
    const u64 col = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * OCTET;
    if (col >= a.cols) return;
    const u64 left = a.cols - col;
    const G* dy = (const G*)a.dy + col;
    X* dx = (X*)a.dx + (u64)a.targets[blockIdx.x] * a.cols + col;
    const u32 end = a.starts[blockIdx.x + 1];
    u32 at = a.starts[blockIdx.x];
    float sum[OCTET];
    load8(sum, dx, left, a.wide);
    // The loads of several sources overlap; the order of the additions does not change.
    constexpr u32 BATCH = 4;
    for (; at + BATCH <= end; at += BATCH) {
        float more[BATCH][OCTET];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) load8(more[i], dy + (u64)a.sources[at + i] * a.cols, left, a.wide);
#pragma unroll
        for (u32 i = 0; i < BATCH; i++)
#pragma unroll
            for (u32 j = 0; j < OCTET; j++) sum[j] += more[i][j];
    }
    for (; at < end; at++) {
        float more[OCTET];
        load8(more, dy + (u64)a.sources[at] * a.cols, left, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) sum[j] += more[j];
    }
    store8(dx, sum, left, a.wide);
}
KERNEL(128, 1) scatter_f32_f32(ScatterArgs a) { scatter<float, float>(a); }
KERNEL(128, 1) scatter_f32_bf16(ScatterArgs a) { scatter<float, bf16>(a); }
KERNEL(128, 1) scatter_bf16_f32(ScatterArgs a) { scatter<bf16, float>(a); }
KERNEL(128, 1) scatter_bf16_bf16(ScatterArgs a) { scatter<bf16, bf16>(a); }

/// Forward: y[s] = mean of rows offsets[s]..offsets[s + 1] of x, zeros if there are none. Backward: each
/// of these rows of y becomes x[s] divided by their number. Block (s, b) as in ScatterArgs.
struct SegmentArgs {
    const void* x;
    const u32* offsets;
    void* y;
    u64 cols;
    u32 wide;
};
template <class T> DEVICE void segment_mean(const SegmentArgs& a) {
    const u64 col = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * OCTET;
    if (col >= a.cols) return;
    const u64 left = a.cols - col;
    const u32 start = a.offsets[blockIdx.x], end = a.offsets[blockIdx.x + 1];
    float sum[OCTET] = {};
    for (u32 row = start; row < end; row++) {
        float x[OCTET];
        load8(x, (const T*)a.x + (u64)row * a.cols + col, left, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) sum[j] += x[j];
    }
    const float share = end > start ? 1.0f / (float)(end - start) : 0.0f;
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) sum[j] *= share;
    store8((T*)a.y + (u64)blockIdx.x * a.cols + col, sum, left, a.wide);
}
KERNEL(128, 1) segment_mean_f32(SegmentArgs a) { segment_mean<float>(a); }

template <class T> DEVICE void segment_mean_backward(const SegmentArgs& a) {
    const u64 col = ((u64)blockIdx.y * blockDim.x + threadIdx.x) * OCTET;
    if (col >= a.cols) return;
    const u64 left = a.cols - col;
    const u32 start = a.offsets[blockIdx.x], end = a.offsets[blockIdx.x + 1];
    if (start == end) return;
    const float share = 1.0f / (float)(end - start);
    float x[OCTET];
    load8(x, (const T*)a.x + (u64)blockIdx.x * a.cols + col, left, a.wide);
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) x[j] *= share;
    for (u32 row = start; row < end; row++) store8((T*)a.y + (u64)row * a.cols + col, x, left, a.wide);
}
KERNEL(128, 1) segment_mean_backward_f32(SegmentArgs a) { segment_mean_backward<float>(a); }

/// partial[t] = Σ x[row] over rows t · task_rows and the following task_rows, with x as f32. Block (t, b) has
/// octets 32 · b and following; each of its eight warps sums every eighth row.
struct ColumnSumArgs {
    const void* x;
    float* partial;
    u64 rows;
    u64 cols;
    u64 stride;
    u64 task_rows;
    u32 wide;
};
template <class T> DEVICE void column_sum(const ColumnSumArgs& a) {
    __shared__ float sums[8][32 * OCTET];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 col = ((u64)blockIdx.y * 32 + lane) * OCTET;
    const u64 first = (u64)blockIdx.x * a.task_rows;
    const u64 end = a.rows - first < a.task_rows ? a.rows : first + a.task_rows;
    float sum[OCTET] = {};
    if (col < a.cols) {
        for (u64 row = first + warp; row < end; row += 8) {
            float x[OCTET];
            load8(x, (const T*)a.x + row * a.stride + col, a.cols - col, a.wide);
#pragma unroll
            for (u32 j = 0; j < OCTET; j++) sum[j] += x[j];
        }
    }
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) sums[warp][j * 32 + lane] = sum[j];
    __syncthreads();
    if (warp == 0 && col < a.cols) {
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) {
            sum[j] = 0.0f;
            for (u32 w = 0; w < 8; w++) sum[j] += sums[w][j * 32 + lane];
        }
        store8(a.partial + (u64)blockIdx.x * a.cols + col, sum, a.cols - col, false);
    }
}
KERNEL(256, 1) column_sum_f32(ColumnSumArgs a) { column_sum<float>(a); }
KERNEL(256, 1) column_sum_bf16(ColumnSumArgs a) { column_sum<bf16>(a); }

/// sum = Σ partial[t] over all tasks, or sum += that. One thread per column; eight sums of every eighth task,
/// then their sum, so that loads overlap.
struct ColumnFinishArgs {
    const float* partial;
    float* sum;
    u64 tasks;
    u64 cols;
    u32 add;
};
KERNEL(256, 1) column_finish(ColumnFinishArgs a) {
    const u64 col = thread_in_grid();
    if (col >= a.cols) return;
    float sums[8] = {};
    u64 task = 0;
    for (; task + 8 <= a.tasks; task += 8)
#pragma unroll
        for (u32 i = 0; i < 8; i++) sums[i] += a.partial[(task + i) * a.cols + col];
#pragma unroll
    for (u32 i = 0; i < 8; i++) if (task + i < a.tasks) sums[i] += a.partial[(task + i) * a.cols + col];
    float total = 0.0f;
#pragma unroll
    for (u32 i = 0; i < 8; i++) total += sums[i];
    a.sum[col] = a.add ? a.sum[col] + total : total;
}
