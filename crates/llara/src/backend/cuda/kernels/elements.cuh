// Rows of f32 or bf16 elements, eight at a time, and sums over a warp or a block in a fixed order.
//
// Every kernel converts to f32 when it loads and rounds once when it stores. The order of its sums depends
// only on the number of columns, not on the dtype or the alignment of rows.
#pragma once
#include "prelude.cuh"

/// Elements that one thread loads at a time.
constexpr u32 OCTET = 8;

DEVICE float widened(float x) { return x; }
DEVICE float widened(bf16 x) { return bf16_to_float(x); }
template <class T> DEVICE T rounded(float x);
template <> DEVICE float rounded<float>(float x) { return x; }
template <> DEVICE bf16 rounded<bf16>(float x) { return float_to_bf16(x); }

/// x[i] = p[i] for i < count, zeros beyond. With `wide`, p is a multiple of 16 bytes.
DEVICE void load8(float (&x)[OCTET], const float* p, u64 count, bool wide) {
    if (wide && count >= OCTET) {
        const Bytes16 low = load16(p), high = load16(p + 4);
        x[0] = bits_to_float(low.x), x[1] = bits_to_float(low.y);
        x[2] = bits_to_float(low.z), x[3] = bits_to_float(low.w);
        x[4] = bits_to_float(high.x), x[5] = bits_to_float(high.y);
        x[6] = bits_to_float(high.z), x[7] = bits_to_float(high.w);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < OCTET; i++) x[i] = i < count ? p[i] : 0.0f;
}
DEVICE void load8(float (&x)[OCTET], const bf16* p, u64 count, bool wide) {
    if (wide && count >= OCTET) {
        const Bytes16 v = load16(p);
        x[0] = bf16_low(v.x), x[1] = bf16_high(v.x), x[2] = bf16_low(v.y), x[3] = bf16_high(v.y);
        x[4] = bf16_low(v.z), x[5] = bf16_high(v.z), x[6] = bf16_low(v.w), x[7] = bf16_high(v.w);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < OCTET; i++) x[i] = i < count ? bf16_to_float(p[i]) : 0.0f;
}
/// p[i] = x[i], rounded, for i < count.
DEVICE void store8(float* p, const float (&x)[OCTET], u64 count, bool wide) {
    if (wide && count >= OCTET) {
        store16(p, Bytes16{float_to_bits(x[0]), float_to_bits(x[1]), float_to_bits(x[2]), float_to_bits(x[3])});
        store16(p + 4, Bytes16{float_to_bits(x[4]), float_to_bits(x[5]), float_to_bits(x[6]), float_to_bits(x[7])});
        return;
    }
#pragma unroll
    for (u32 i = 0; i < OCTET; i++) if (i < count) p[i] = x[i];
}
DEVICE void store8(bf16* p, const float (&x)[OCTET], u64 count, bool wide) {
    if (wide && count >= OCTET) {
        store16(p, Bytes16{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7])});
        return;
    }
#pragma unroll
    for (u32 i = 0; i < OCTET; i++) if (i < count) p[i] = float_to_bf16(x[i]);
}

/// Octets of `columns`; the last one may be incomplete.
DEVICE u64 octets_of(u64 columns) { return (columns + OCTET - 1) / OCTET; }

/// Quotient and remainder, by 32-bit division if that is sufficient: it is several times faster.
struct Split { u64 quotient, remainder; };
DEVICE Split split(u64 x, u64 by) {
    if ((x | by) >> 32) return Split{x / by, x % by};
    const u32 q = (u32)x / (u32)by;
    return Split{q, (u32)x - q * (u32)by};
}

/// Index of this thread in the grid.
DEVICE u64 thread_in_grid() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

/// Sum over the block, the same in every thread: within warps, then over warps in order. All threads call.
template <class T> DEVICE T block_total(T x) {
    __shared__ T parts[32];
    x = warp_sum(x);
    __syncthreads(); // an earlier sum has been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    T total = 0;
    for (u32 warp = 0; warp < (blockDim.x + 31) / 32; warp++) total += parts[warp];
    return total;
}
DEVICE float block_largest(float x) {
    __shared__ float parts[32];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float largest = parts[0];
    for (u32 warp = 1; warp < (blockDim.x + 31) / 32; warp++) largest = fmaxf(largest, parts[warp]);
    return largest;
}
