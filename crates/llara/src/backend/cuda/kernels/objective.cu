// Cross entropy, its masks and its form for sets, distillation, the gradient norm and AdamW.
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

/// masked = scores, with −∞ outside the target's group of `group` columns (0: no groups), above the target's score
/// + margin, and at columns[starts[row]] to columns[starts[row + 1]] (starts may be null); the target keeps its
/// score. A NaN is kept, so that the loss shows it. One block a row.
struct MaskScoresArgs {
    const float* scores;
    const u32* targets;
    const u32* starts;
    const u32* columns;
    float* masked;
    u64 cols;
    u64 group;
    float margin;
    u32 wide;
};
KERNEL(256, 1) mask_scores(MaskScoresArgs a) {
    const u64 row = blockIdx.x;
    const float* scores = a.scores + row * a.cols;
    float* masked = a.masked + row * a.cols;
    const u64 target = a.targets[row];
    const float highest = scores[target] + a.margin;
    const u64 first = a.group ? target - target % a.group : 0, end = a.group ? first + a.group : a.cols;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float x[OCTET];
        load8(x, scores + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) {
            const u64 at = col + j;
            if (at != target && (at < first || at >= end || x[j] > highest)) x[j] = -INFINITY;
        }
        store8(masked + col, x, a.cols - col, a.wide);
    }
    if (!a.starts) return;
    __syncthreads(); // the row is written
    for (u64 i = a.starts[row] + threadIdx.x; i < a.starts[row + 1]; i += blockDim.x)
        if (a.columns[i] != target) masked[a.columns[i]] = -INFINITY;
}

/// A loss of a row's group: the `group` columns from firsts[row] on, the positive first, against teacher
/// [rows, group]. Adds weight / rows · its gradient to `grad`; losses[row] is the loss. One warp a row; a group is
/// small.
struct DistillationArgs {
    const float* scores;
    const u32* firsts;
    const float* teacher;
    float* grad;
    double* losses;
    u64 rows;
    u64 cols;
    u64 group;
    float scale;
    float weight;
};
/// In f64 up to the divergence, which is a small difference where both distributions are similar.
DEVICE double log_of_sum_of_exp(const float* x, u64 count) {
    float largest = -INFINITY;
    for (u64 g = threadIdx.x; g < count; g += 32) largest = fmaxf(largest, x[g]);
    largest = warp_max(largest);
    double sum = 0.0;
    for (u64 g = threadIdx.x; g < count; g += 32) sum += exp((double)x[g] - (double)largest);
    return (double)largest + log(warp_sum(sum));
}
KERNEL(32, 1) kl_divergence(DistillationArgs a) {
    const u64 row = blockIdx.x, first = row * a.cols + a.firsts[row];
    const float *scores = a.scores + first, *teacher = a.teacher + row * a.group;
    float* grad = a.grad + first;
    const double student_lse = log_of_sum_of_exp(scores, a.group);
    const double teacher_lse = log_of_sum_of_exp(teacher, a.group);
    const double share = (double)(a.weight / (float)a.rows);
    double loss = 0.0;
    for (u64 g = threadIdx.x; g < a.group; g += 32) {
        const double log_q = (double)scores[g] - student_lse, log_p = (double)teacher[g] - teacher_lse;
        const double p = exp(log_p);
        grad[g] += (float)(share * (exp(log_q) - p));
        loss += p * (log_p - log_q);
    }
    loss = warp_sum(loss);
    if (threadIdx.x == 0) a.losses[row] = loss;
}
KERNEL(32, 1) margin_mse(DistillationArgs a) {
    const u64 row = blockIdx.x, first = row * a.cols + a.firsts[row];
    const float *scores = a.scores + first, *teacher = a.teacher + row * a.group;
    float* grad = a.grad + first;
    const double scale = (double)a.scale, negatives = a.group > 1 ? (double)(a.group - 1) : 1.0;
    const double factor = 2.0 * scale * (double)(a.weight / (float)a.rows) / negatives;
    double loss = 0.0, of_positive = 0.0;
    for (u64 g = 1 + threadIdx.x; g < a.group; g += 32) {
        const double error = scale * ((double)scores[0] - (double)scores[g]) - ((double)teacher[0] - (double)teacher[g]);
        loss += error * error / negatives;
        of_positive += factor * error;
        grad[g] -= (float)(factor * error);
    }
    loss = warp_sum(loss), of_positive = warp_sum(of_positive);
    if (threadIdx.x == 0) a.losses[row] = loss, grad[0] += (float)of_positive;
}

/// The loss of a bag of rows and the set columns[starts[bag]] to columns[starts[bag + 1]]: losses[bag] = −mean over the
/// set of log softmax(m), with m the maximum of each column over the rows of the bag. grad = (softmax(m) − 1[in the
/// set] / size of the set) / bags in the first row that has the maximum, else 0. The first row of grad holds m at
/// first. One block a bag.
struct SetCrossEntropyArgs {
    const float* logits;
    const u32* starts;
    const u32* columns;
    float* grad;
    double* losses;
    u64 bags;
    u64 rows;
    u64 cols;
    u32 wide;
};
/// The first row that has the maximum of a column.
DEVICE u64 row_of_maximum(const float* column, u64 rows, u64 cols) {
    u64 place = 0;
    float largest = column[0];
    for (u64 row = 1; row < rows; row++) {
        const float x = column[row * cols];
        if (x > largest) largest = x, place = row;
    }
    return place;
}
KERNEL(256, 1) set_cross_entropy(SetCrossEntropyArgs a) {
    const u64 bag = blockIdx.x;
    const float* logits = a.logits + bag * a.rows * a.cols;
    float* grad = a.grad + bag * a.rows * a.cols;
    const u32 first = a.starts[bag], end = a.starts[bag + 1];
    float largest = -INFINITY;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float m[OCTET];
        load8(m, logits + col, a.cols - col, a.wide);
        for (u64 row = 1; row < a.rows; row++) {
            float x[OCTET];
            load8(x, logits + row * a.cols + col, a.cols - col, a.wide);
            // A NaN is kept, so that the loss shows it.
#pragma unroll
            for (u32 j = 0; j < OCTET; j++) m[j] = x[j] > m[j] || x[j] != x[j] ? x[j] : m[j];
        }
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) if (col + j < a.cols) largest = fmaxf(largest, m[j]);
        store8(grad + col, m, a.cols - col, a.wide);
    }
    largest = block_largest(largest); // the maxima are written
    double of_set = 0.0;
    for (u64 i = first + threadIdx.x; i < end; i += blockDim.x) of_set += (double)grad[a.columns[i]];
    of_set = block_total(of_set);
    float sum = 0.0f;
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float m[OCTET];
        load8(m, grad + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) if (col + j < a.cols) sum += expf(m[j] - largest);
    }
    sum = block_total(sum);
    const float share = 1.0f / (sum * (float)a.bags);
    for (u64 col = threadIdx.x * OCTET; col < a.cols; col += blockDim.x * OCTET) {
        float d[OCTET], maxima[OCTET];
        u32 places[OCTET];
        load8(d, grad + col, a.cols - col, a.wide);
        load8(maxima, logits + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) d[j] = expf(d[j] - largest) * share, places[j] = 0;
        for (u64 row = 1; row < a.rows; row++) {
            float x[OCTET];
            load8(x, logits + row * a.cols + col, a.cols - col, a.wide);
#pragma unroll
            for (u32 j = 0; j < OCTET; j++) if (x[j] > maxima[j]) maxima[j] = x[j], places[j] = (u32)row;
        }
        for (u64 row = 0; row < a.rows; row++) {
            float x[OCTET];
#pragma unroll
            for (u32 j = 0; j < OCTET; j++) x[j] = places[j] == row ? d[j] : 0.0f;
            store8(grad + row * a.cols + col, x, a.cols - col, a.wide);
        }
    }
    __syncthreads(); // the gradient without the set is written
    const float one = 1.0f / ((float)(end - first) * (float)a.bags);
    for (u64 i = first + threadIdx.x; i < end; i += blockDim.x) {
        const u64 col = a.columns[i];
        grad[row_of_maximum(logits + col, a.rows, a.cols) * a.cols + col] -= one;
    }
    if (threadIdx.x == 0)
        a.losses[bag] = (double)largest + log((double)sum) - of_set / (double)(end - first);
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
