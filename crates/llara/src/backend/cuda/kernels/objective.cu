// Cross entropy, the gradient norm and AdamW.
#include "elements.cuh"

/// grad = (softmax(scores) − onehot(target)) / rows, losses[row] = −log softmax(scores)[target]. One block per
/// row.
struct CrossEntropyArgs {
    const float* scores;
    const u32* targets;
    float* grad;
    double* losses;
    u64 rows;
    u64 cols;
    u32 wide;
};
KERNEL(256, 1) cross_entropy(CrossEntropyArgs a) {
    const u64 row = blockIdx.x;
    const float* scores = a.scores + row * a.cols;
    float* grad = a.grad + row * a.cols;
    float largest = -INFINITY;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float x[OCTET];
        load8(x, scores + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) if (col + j < a.cols) largest = fmaxf(largest, x[j]);
    }
    largest = block_largest(largest);
    float sum = 0.0f;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float x[OCTET];
        load8(x, scores + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) if (col + j < a.cols) sum += expf(x[j] - largest);
    }
    sum = block_total(sum);
    const u32 target = a.targets[row];
    const float share = 1.0f / (sum * (float)a.rows), one = 1.0f / (float)a.rows;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float x[OCTET];
        load8(x, scores + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) {
            x[j] = expf(x[j] - largest) * share;
            if (col + j == target) x[j] -= one;
        }
        store8(grad + col, x, a.cols - col, a.wide);
    }
    // In double, because near convergence the loss is a small difference of large terms.
    if (threadIdx.x == 0) a.losses[row] = (double)largest - (double)scores[target] + log((double)sum);
}

/// partial[block] = Σ x² over elements 16384 · block and following.
struct SquaresArgs {
    const float* x;
    double* partial;
    u64 count;
    u32 wide;
};
KERNEL(256, 1) sum_of_squares(SquaresArgs a) {
    constexpr u64 TASK = 16384;
    const u64 first = blockIdx.x * TASK;
    const u64 end = a.count - first < TASK ? a.count : first + TASK;
    double sum = 0.0;
    // Unrolled, so that the loads of four rounds overlap.
#pragma unroll 4
    for (u64 at = first + threadIdx.x * OCTET; at < end; at += blockDim.x * OCTET) {
        float x[OCTET];
        load8(x, a.x + at, end - at, a.wide);
        float part = 0.0f;
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) part += x[j] * x[j];
        sum += (double)part;
    }
    sum = block_total(sum);
    if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

/// out = Σ x · factor, or out += that. One block.
struct TotalArgs {
    const double* x;
    float* out;
    u64 count;
    double factor;
    u32 add;
};
KERNEL(256, 1) total(TotalArgs a) {
    double sum = 0.0;
    for (u64 at = threadIdx.x; at < a.count; at += blockDim.x) sum += a.x[at];
    sum = block_total(sum);
    if (threadIdx.x == 0) *a.out = (float)((a.add ? (double)*a.out : 0.0) + sum * a.factor);
}

/// out = [norm, min(1, limit / (norm + 1e-6))] of a sum of squares; factor 1 without a limit. One thread.
struct ClipArgs {
    const float* sum;
    float* out;
    float limit;
    u32 limited;
};
KERNEL(32, 1) clip_factor(ClipArgs a) {
    const float norm = sqrtf(*a.sum);
    float factor = 1.0f;
    if (a.limited) {
        factor = a.limit / (norm + 1e-6f);
        // As on the CPU, a NaN gives the factor 1; the update is then skipped.
        factor = factor < 1.0f ? factor : 1.0f;
    }
    a.out[0] = norm;
    a.out[1] = factor;
}

/// One AdamW update (Loshchilov and Hutter 2019), and the bf16 copy of the values if there is one. One
/// thread an octet.
struct AdamWArgs {
    float* value;
    bf16* working;
    const float* grad;
    float* first;
    float* second;
    const float* clip;
    u64 count;
    float decay;
    float beta1;
    float one_less_beta1;
    float beta2;
    float one_less_beta2;
    float rate;
    float inv_root_bias;
    float epsilon;
    u32 wide;
};
KERNEL(256, 1) adamw(AdamWArgs a) {
    const u64 at = thread_in_grid() * OCTET;
    if (at >= a.count) return;
    const u64 left = a.count - at;
    const float norm = a.clip[0], factor = a.clip[1];
    if (!(fabsf(norm) < INFINITY)) return;
    float value[OCTET], grad[OCTET], m[OCTET], v[OCTET];
    load8(value, a.value + at, left, a.wide);
    load8(grad, a.grad + at, left, a.wide);
    load8(m, a.first + at, left, a.wide);
    load8(v, a.second + at, left, a.wide);
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) {
        const float g = grad[j] * factor;
        m[j] = a.beta1 * m[j] + a.one_less_beta1 * g;
        v[j] = a.beta2 * v[j] + a.one_less_beta2 * g * g;
        const float root = sqrtf(v[j]) * a.inv_root_bias + a.epsilon;
        value[j] = value[j] * a.decay - a.rate * m[j] / root;
    }
    store8(a.value + at, value, left, a.wide);
    store8(a.first + at, m, left, a.wide);
    store8(a.second + at, v, left, a.wide);
    if (a.working) store8(a.working + at, value, left, a.wide);
}
