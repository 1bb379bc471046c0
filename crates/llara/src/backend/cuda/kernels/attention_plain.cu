// Attention for any head size up to 256, in f32 or bf16, with sums in f32 and without tensor cores. Each warp
// computes one row of one head. Lanes first divide 32 rows of the other operand, then the columns of the result.
//
// attention_forward_plain_T, T in f32, bf16: out, lse.
//   grid  (ceil(query_rows / 4), heads), block 128 threads, no dynamic shared memory
// attention_delta_T: delta, before the passes below and those of attention_backward.cu.
//   grid  (ceil(query_rows / 4), heads), block 128 threads
// attention_backward_queries_plain_T: dq.
//   grid  (ceil(query_rows / 4), heads), block 128 threads
// attention_backward_keys_plain_T: dk and dv.
//   grid  (ceil(key_rows / 4), kv_heads), block 128 threads
//
// The argument is AttentionArgs with the fields of the pass, and query_rows, key_rows, head_dim; any scale,
// any stride, pointers aligned to an element.
#include "attention.cuh"

constexpr u32 WARPS = 4, THREADS = 32 * WARPS;
constexpr u32 LARGEST_HEAD = 256, COLUMNS = LARGEST_HEAD / 32; // columns of a lane, at most

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return bf16_to_float(x); }
DEVICE void put(float* p, float x) { *p = x; }
DEVICE void put(bf16* p, float x) { *p = float_to_bf16(x); }

/// Row `number` of all query rows, or key rows, is row `index` of its sequence.
struct Row {
    Sequence s;
    u32 index;
};
DEVICE Row row_at(const AttentionArgs& a, const u32* offsets, u32 number) {
    const u32 at = find_sequence(offsets, a.sequences, number, 1, 0);
    return Row{sequence_at(a, at), number - offsets[at]};
}

template <class T> DEVICE float dot(const float* x, const T* y, u32 n) {
    float sum = 0.0f;
    for (u32 c = 0; c < n; c++) sum += x[c] * widen(y[c]);
    return sum;
}

/// Σ w[j] · rows[j][column], for the lane's columns, over the `count` rows from `rows` on.
template <class T> DEVICE void add_rows(float (&sum)[COLUMNS], const float* w, const T* rows, u32 stride, u32 count,
                                        u32 head_dim) {
    const u32 lane = threadIdx.x % 32;
    for (u32 j = 0; j < count; j++)
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++)
            if (c * 32 + lane < head_dim) sum[c] += w[j] * widen(rows[(u64)j * stride + c * 32 + lane]);
}

template <class T> DEVICE void attention_forward_plain(const AttentionArgs& a) {
    __shared__ float rows[WARPS][LARGEST_HEAD], weights[WARPS][32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x * WARPS + warp;
    if (number >= a.query_rows) return; // a whole warp; there is no barrier of the block
    const Row r = row_at(a, a.q_offsets, number);
    const u32 head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), hd = a.head_dim;
    const u32 position = r.s.first_position() + r.index;
    const T* q = (const T*)a.q + (u64)number * a.q_stride + head * hd;
    const T* k = (const T*)a.k + (u64)r.s.k_begin * a.k_stride + kv_head * hd;
    const T* v = (const T*)a.v + (u64)r.s.k_begin * a.v_stride + kv_head * hd;
    for (u32 c = lane; c < hd; c += 32) rows[warp][c] = widen(q[c]);
    __syncwarp();
    float top = -INFINITY, total = 0.0f, o[COLUMNS] = {};
    for (u32 first = a.window && position + 1 > a.window ? position + 1 - a.window : 0; first <= position; first += 32) {
        const u32 count = position + 1 - first < 32 ? position + 1 - first : 32;
        const float score =
            lane < count ? dot(rows[warp], k + (u64)(first + lane) * a.k_stride, hd) * a.scale : -INFINITY;
        const float larger = fmaxf(top, warp_max(score));
        const float w = lane < count ? expf(score - larger) : 0.0f;
        const float shrink = expf(top - larger);
        total = total * shrink + warp_sum(w);
        top = larger;
        weights[warp][lane] = w;
        __syncwarp();
#pragma unroll
        for (u32 c = 0; c < COLUMNS; c++) o[c] *= shrink;
        add_rows(o, weights[warp], v + (u64)first * a.v_stride, a.v_stride, count, hd);
        __syncwarp(); // the weights have been read
    }
    T* out = (T*)a.out + (u64)number * a.out_stride + head * hd;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; c++)
        if (c * 32 + lane < hd) put(out + c * 32 + lane, o[c] / total);
    if (lane == 0) a.lse[(u64)head * a.query_rows + number] = top + logf(total);
}

/// Σ x∘y over the warp, two elements at a time if rows of bf16 are aligned to 4 bytes.
DEVICE float warp_dot(const float* x, const float* y, u32 n) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x % 32; c < n; c += 32) sum += x[c] * y[c];
    return warp_sum(sum);
}
DEVICE float warp_dot(const bf16* x, const bf16* y, u32 n) {
    const u32 lane = threadIdx.x % 32;
    float sum = 0.0f;
    if (((u64)x | (u64)y) % 4 == 0 && n % 2 == 0) {
#pragma unroll 4
        for (u32 c = 2 * lane; c < n; c += 64) {
            const u32 a = *(const u32*)(x + c), b = *(const u32*)(y + c);
            sum += bf16_low(a) * bf16_low(b) + bf16_high(a) * bf16_high(b);
        }
    } else {
        for (u32 c = lane; c < n; c += 32) sum += bf16_to_float(x[c]) * bf16_to_float(y[c]);
    }
    return warp_sum(sum);
}

template <class T> DEVICE void attention_delta(const AttentionArgs& a) {
    const u32 lane = threadIdx.x % 32, number = blockIdx.x * WARPS + threadIdx.x / 32, head = blockIdx.y;
    if (number >= a.query_rows) return;
    const T* out = (const T*)a.out + (u64)number * a.out_stride + head * a.head_dim;
    const T* dout = (const T*)a.dout + (u64)number * a.dout_stride + head * a.head_dim;
    const float sum = warp_dot(out, dout, a.head_dim);
    if (lane == 0) a.delta[(u64)head * a.query_rows + number] = sum;
}

template <class T> DEVICE void attention_backward_queries_plain(const AttentionArgs& a) {
    __shared__ float rows[WARPS][2][LARGEST_HEAD], weights[WARPS][32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x * WARPS + warp;
    if (number >= a.query_rows) return;
    const Row r = row_at(a, a.q_offsets, number);
    const u32 head = blockIdx.y, kv_head = head / (a.heads / a.kv_heads), hd = a.head_dim;
    const u32 position = r.s.first_position() + r.index;
    const T* q = (const T*)a.q + (u64)number * a.q_stride + head * hd;
    const T* dout = (const T*)a.dout + (u64)number * a.dout_stride + head * hd;
    const T* k = (const T*)a.k + (u64)r.s.k_begin * a.k_stride + kv_head * hd;
    const T* v = (const T*)a.v + (u64)r.s.k_begin * a.v_stride + kv_head * hd;
    for (u32 c = lane; c < hd; c += 32) rows[warp][0][c] = widen(q[c]), rows[warp][1][c] = widen(dout[c]);
    __syncwarp();
    const float lse = a.lse[(u64)head * a.query_rows + number];
    const float delta = a.delta[(u64)head * a.query_rows + number];
    float dq[COLUMNS] = {};
    for (u32 first = a.window && position + 1 > a.window ? position + 1 - a.window : 0; first <= position; first += 32) {
        const u32 count = position + 1 - first < 32 ? position + 1 - first : 32;
        if (lane < count) {
            const u64 key = first + lane;
            const float p = expf(dot(rows[warp][0], k + key * a.k_stride, hd) * a.scale - lse);
            weights[warp][lane] = p * (dot(rows[warp][1], v + key * a.v_stride, hd) - delta);
        }
        __syncwarp();
        add_rows(dq, weights[warp], k + (u64)first * a.k_stride, a.k_stride, count, hd);
        __syncwarp();
    }
    T* to = (T*)a.dq + (u64)number * a.dq_stride + head * hd;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; c++)
        if (c * 32 + lane < hd) put(to + c * 32 + lane, dq[c] * a.scale);
}

template <class T> DEVICE void attention_backward_keys_plain(const AttentionArgs& a) {
    __shared__ float rows[WARPS][2][LARGEST_HEAD], weights[WARPS][2][32];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, number = blockIdx.x * WARPS + warp;
    if (number >= a.key_rows) return;
    const Row r = row_at(a, a.k_offsets, number);
    const u32 kv_head = blockIdx.y, group = a.heads / a.kv_heads, hd = a.head_dim, key = r.index;
    const T* k = (const T*)a.k + (u64)number * a.k_stride + kv_head * hd;
    const T* v = (const T*)a.v + (u64)number * a.v_stride + kv_head * hd;
    for (u32 c = lane; c < hd; c += 32) rows[warp][0][c] = widen(k[c]), rows[warp][1][c] = widen(v[c]);
    __syncwarp();
    // Queries start..end of the sequence attend to this key.
    const u32 before = r.s.first_position(), start = key > before ? key - before : 0;
    u32 end = r.s.queries;
    if (a.window) {
        const u32 seeing = key + a.window > before ? key + a.window - before : 0;
        end = seeing < end ? seeing : end;
    }
    float dk[COLUMNS] = {}, dv[COLUMNS] = {};
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const T* q = (const T*)a.q + (u64)r.s.q_begin * a.q_stride + head * hd;
        const T* dout = (const T*)a.dout + (u64)r.s.q_begin * a.dout_stride + head * hd;
        const u64 saved = (u64)head * a.query_rows + r.s.q_begin;
        for (u32 first = start; first < end; first += 32) {
            const u32 count = end - first < 32 ? end - first : 32;
            if (lane < count) {
                const u64 query = first + lane;
                const float p = expf(dot(rows[warp][0], q + query * a.q_stride, hd) * a.scale - a.lse[saved + query]);
                weights[warp][0][lane] = p;
                weights[warp][1][lane] =
                    p * (dot(rows[warp][1], dout + query * a.dout_stride, hd) - a.delta[saved + query]);
            }
            __syncwarp();
            add_rows(dv, weights[warp][0], dout + (u64)first * a.dout_stride, a.dout_stride, count, hd);
            add_rows(dk, weights[warp][1], q + (u64)first * a.q_stride, a.q_stride, count, hd);
            __syncwarp();
        }
    }
    T* to_k = (T*)a.dk + (u64)number * a.dk_stride + kv_head * hd;
    T* to_v = (T*)a.dv + (u64)number * a.dv_stride + kv_head * hd;
#pragma unroll
    for (u32 c = 0; c < COLUMNS; c++)
        if (c * 32 + lane < hd) put(to_k + c * 32 + lane, dk[c] * a.scale), put(to_v + c * 32 + lane, dv[c]);
}

#define PLAIN(pass)                                                                    \
    KERNEL(THREADS, 1) pass##_plain_f32(AttentionArgs a) { pass##_plain<float>(a); } \
    KERNEL(THREADS, 1) pass##_plain_bf16(AttentionArgs a) { pass##_plain<bf16>(a); }
PLAIN(attention_forward)
PLAIN(attention_backward_queries)
PLAIN(attention_backward_keys)
KERNEL(THREADS, 1) attention_delta_f32(AttentionArgs a) { attention_delta<float>(a); }
KERNEL(THREADS, 1) attention_delta_bf16(AttentionArgs a) { attention_delta<bf16>(a); }
