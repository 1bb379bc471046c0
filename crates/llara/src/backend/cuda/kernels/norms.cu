// RMS norm and L2 normalization, and their backward passes.
//
// A group is a whole row, or one head of it. It is processed by half a warp or a warp if it is short, else by a
// block.
#include "elements.cuh"

/// y = x · inv · w with inv = 1 / sqrt(mean(x²) + eps), over each group of `group` columns. Group g is group
/// g % heads of row g / heads.
struct NormArgs {
    const void* x;
    const float* w;
    void* y;
    float* inv;
    u64 groups;
    u64 heads;
    u64 group;
    u64 x_stride;
    u64 y_stride;
    float eps;
    u32 wide;
};

/// Sum over the threads that share a group.
template <u32 LANES> DEVICE float group_total(float x) {
    if constexpr (LANES > 32) {
        return block_total(x);
    } else {
#pragma unroll
        for (int step = LANES / 2; step; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
        return x;
    }
}
/// The group of this thread. If there is none for it, `exists` is false and `number` is the last
/// group: all lanes of a warp take part in its sums.
struct Group {
    u64 number;
    bool exists;
};
template <u32 LANES> DEVICE Group group_of_thread(u64 groups) {
    const u64 g = LANES > 32 ? (u64)blockIdx.x : thread_in_grid() / LANES;
    return Group{g < groups ? g : groups - 1, g < groups};
}

template <class X, class Y, u32 LANES> DEVICE void rms_norm(const NormArgs& a) {
    const Group mine = group_of_thread<LANES>(a.groups);
    const u64 g = mine.number;
    const u32 lane = threadIdx.x % LANES;
    const Split at = split(g, a.heads);
    const X* x = (const X*)a.x + at.quotient * a.x_stride + at.remainder * a.group;
    Y* y = (Y*)a.y + at.quotient * a.y_stride + at.remainder * a.group;
    float sum = 0.0f;
    for (u64 col = lane * OCTET; mine.exists && col < a.group; col += LANES * OCTET) {
        float v[OCTET];
        load8(v, x + col, a.group - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) sum += v[j] * v[j];
    }
    const float inv = 1.0f / sqrtf(group_total<LANES>(sum) / (float)a.group + a.eps);
    if (!mine.exists) return;
    if (lane == 0) a.inv[g] = inv;
    for (u64 col = lane * OCTET; col < a.group; col += LANES * OCTET) {
        float v[OCTET], w[OCTET];
        load8(v, x + col, a.group - col, a.wide);
        load8(w, a.w + col, a.group - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) v[j] = v[j] * inv * w[j];
        store8(y + col, v, a.group - col, a.wide);
    }
}
#define RMS_NORM_BY(NAME, LANES, X, Y) \
    KERNEL(256, 1) rms_norm_##NAME(NormArgs a) { rms_norm<X, Y, LANES>(a); }
#define RMS_NORM(X_NAME, Y_NAME, X, Y)                    \
    RMS_NORM_BY(X_NAME##_##Y_NAME##_half, 16, X, Y)       \
    RMS_NORM_BY(X_NAME##_##Y_NAME##_warp, 32, X, Y)       \
    RMS_NORM_BY(X_NAME##_##Y_NAME##_block, 256, X, Y)
RMS_NORM(f32, f32, float, float)
RMS_NORM(f32, bf16, float, bf16)
RMS_NORM(bf16, f32, bf16, float)
RMS_NORM(bf16, bf16, bf16, bf16)

/// dx = inv · (dy∘w − x · inv² · mean(dy∘w∘x)), or dx += that. dx may be dy.
struct NormBackwardArgs {
    const void* dy;
    const void* x;
    const float* w;
    const float* inv;
    void* dx;
    u64 groups;
    u64 heads;
    u64 group;
    u64 dy_stride;
    u64 x_stride;
    u64 dx_stride;
    u32 add;
    u32 wide;
};
template <class G, class X, class D, u32 LANES> DEVICE void rms_norm_backward(const NormBackwardArgs& a) {
    const Group mine = group_of_thread<LANES>(a.groups);
    const u64 g = mine.number;
    const u32 lane = threadIdx.x % LANES;
    const Split at = split(g, a.heads);
    const u64 head = at.remainder * a.group;
    const G* dy = (const G*)a.dy + at.quotient * a.dy_stride + head;
    const X* x = (const X*)a.x + at.quotient * a.x_stride + head;
    D* dx = (D*)a.dx + at.quotient * a.dx_stride + head;
    float product = 0.0f;
    for (u64 col = lane * OCTET; mine.exists && col < a.group; col += LANES * OCTET) {
        float d[OCTET], v[OCTET], w[OCTET];
        load8(d, dy + col, a.group - col, a.wide);
        load8(v, x + col, a.group - col, a.wide);
        load8(w, a.w + col, a.group - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) product += d[j] * w[j] * v[j];
    }
    const float inv = a.inv[g];
    const float mean = group_total<LANES>(product) * inv * inv / (float)a.group;
    if (!mine.exists) return;
    for (u64 col = lane * OCTET; col < a.group; col += LANES * OCTET) {
        float d[OCTET], v[OCTET], w[OCTET], sum[OCTET] = {};
        load8(d, dy + col, a.group - col, a.wide);
        load8(v, x + col, a.group - col, a.wide);
        load8(w, a.w + col, a.group - col, a.wide);
        if (a.add) load8(sum, dx + col, a.group - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) sum[j] += (d[j] * w[j] - v[j] * mean) * inv;
        store8(dx + col, sum, a.group - col, a.wide);
    }
}
#define RMS_NORM_BACKWARD_BY(NAME, LANES, G, X, D) \
    KERNEL(256, 1) rms_norm_backward_##NAME(NormBackwardArgs a) { rms_norm_backward<G, X, D, LANES>(a); }
#define RMS_NORM_BACKWARD(NAME, G, X, D)             \
    RMS_NORM_BACKWARD_BY(NAME##_half, 16, G, X, D)   \
    RMS_NORM_BACKWARD_BY(NAME##_warp, 32, G, X, D)   \
    RMS_NORM_BACKWARD_BY(NAME##_block, 256, G, X, D)
// Named by the types of dy, x and dx.
RMS_NORM_BACKWARD(f32_f32_f32, float, float, float)
RMS_NORM_BACKWARD(bf16_f32_f32, bf16, float, float)
RMS_NORM_BACKWARD(f32_bf16_bf16, float, bf16, bf16)
RMS_NORM_BACKWARD(bf16_bf16_bf16, bf16, bf16, bf16)
RMS_NORM_BACKWARD(f32_bf16_f32, float, bf16, float)
RMS_NORM_BACKWARD(bf16_f32_bf16, bf16, float, bf16)

/// partial[t] = Σ dy∘x · inv over task_groups groups from t · task_groups on: the partial sums of the weight
/// gradient. Blocks and warps as in ColumnSumArgs.
struct NormWeightArgs {
    const void* dy;
    const void* x;
    const float* inv;
    float* partial;
    u64 groups;
    u64 heads;
    u64 group;
    u64 dy_stride;
    u64 x_stride;
    u64 task_groups;
    u32 wide;
};
template <class G, class X> DEVICE void rms_norm_weight(const NormWeightArgs& a) {
    __shared__ float sums[8][32 * OCTET];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u64 col = ((u64)blockIdx.y * 32 + lane) * OCTET;
    const u64 first = (u64)blockIdx.x * a.task_groups;
    const u64 end = a.groups - first < a.task_groups ? a.groups : first + a.task_groups;
    float sum[OCTET] = {};
    if (col < a.group) {
        for (u64 g = first + warp; g < end; g += 8) {
            const Split at = split(g, a.heads);
            const u64 head = at.remainder * a.group + col;
            float d[OCTET], v[OCTET];
            load8(d, (const G*)a.dy + at.quotient * a.dy_stride + head, a.group - col, a.wide);
            load8(v, (const X*)a.x + at.quotient * a.x_stride + head, a.group - col, a.wide);
            const float inv = a.inv[g];
#pragma unroll
            for (u32 j = 0; j < OCTET; j++) sum[j] += d[j] * v[j] * inv;
        }
    }
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) sums[warp][j * 32 + lane] = sum[j];
    __syncthreads();
    if (warp == 0 && col < a.group) {
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) {
            sum[j] = 0.0f;
            for (u32 w = 0; w < 8; w++) sum[j] += sums[w][j * 32 + lane];
        }
        store8(a.partial + (u64)blockIdx.x * a.group + col, sum, a.group - col, false);
    }
}
KERNEL(256, 1) rms_norm_weight_f32_f32(NormWeightArgs a) { rms_norm_weight<float, float>(a); }
KERNEL(256, 1) rms_norm_weight_f32_bf16(NormWeightArgs a) { rms_norm_weight<float, bf16>(a); }
KERNEL(256, 1) rms_norm_weight_bf16_f32(NormWeightArgs a) { rms_norm_weight<bf16, float>(a); }
KERNEL(256, 1) rms_norm_weight_bf16_bf16(NormWeightArgs a) { rms_norm_weight<bf16, bf16>(a); }

/// y = x · inv with inv = 1 / max(‖x‖, 1e-12). One block per row; y has `cols` columns.
struct NormalizeArgs {
    const void* x;
    float* y;
    float* inv;
    u64 cols;
    u32 wide;
};
template <class X> DEVICE void normalize(const NormalizeArgs& a) {
    const u64 row = blockIdx.x;
    const X* x = (const X*)a.x + row * a.cols;
    float sum = 0.0f;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float v[OCTET];
        load8(v, x + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) sum += v[j] * v[j];
    }
    const float inv = 1.0f / fmaxf(sqrtf(block_total(sum)), 1e-12f);
    if (threadIdx.x == 0) a.inv[row] = inv;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float v[OCTET];
        load8(v, x + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) v[j] *= inv;
        store8(a.y + row * a.cols + col, v, a.cols - col, a.wide);
    }
}
KERNEL(256, 1) normalize_f32(NormalizeArgs a) { normalize<float>(a); }

/// dx = (dy − y · (y·dy)) · inv. One block per row.
struct NormalizeBackwardArgs {
    const void* dy;
    const float* y;
    const float* inv;
    void* dx;
    u64 cols;
    u64 dy_stride;
    u32 wide;
};
template <class G> DEVICE void normalize_backward(const NormalizeBackwardArgs& a) {
    const u64 row = blockIdx.x;
    const G* dy = (const G*)a.dy + row * a.dy_stride;
    const float* y = a.y + row * a.cols;
    float along = 0.0f;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float d[OCTET], v[OCTET];
        load8(d, dy + col, a.cols - col, a.wide);
        load8(v, y + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) along += d[j] * v[j];
    }
    along = block_total(along);
    const float inv = a.inv[row];
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float d[OCTET], v[OCTET];
        load8(d, dy + col, a.cols - col, a.wide);
        load8(v, y + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) d[j] = (d[j] - v[j] * along) * inv;
        store8((G*)a.dx + row * a.cols + col, d, a.cols - col, a.wide);
    }
}
KERNEL(256, 1) normalize_backward_f32(NormalizeBackwardArgs a) { normalize_backward<float>(a); }
