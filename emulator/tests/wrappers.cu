// A kernel for each function of prelude.cuh that is a separate instruction, so that a failed test shows
// which one is wrong. One block of one warp each; lane l writes out[l] and following.
#include "prelude.cuh"

struct WrapperArgs {
    const void* in;
    u32* out;
};

KERNEL(32, 1) wrapper_round(WrapperArgs a) { // 64 floats to 64 bf16, singly and in pairs
    const float* x = (const float*)a.in;
    const u32 lane = threadIdx.x;
    a.out[lane] = float_to_bf16(x[2 * lane]) | (u32)float_to_bf16(x[2 * lane + 1]) << 16;
    a.out[32 + lane] = pack_bf16(x[2 * lane], x[2 * lane + 1]);
}
KERNEL(32, 1) wrapper_widen(WrapperArgs a) { // 64 bf16 to 64 floats, three ways
    const u32 lane = threadIdx.x, pair = ((const u32*)a.in)[lane];
    a.out[2 * lane] = float_to_bits(bf16_low(pair));
    a.out[2 * lane + 1] = float_to_bits(bf16_high(pair));
    a.out[64 + 2 * lane] = float_to_bits(bf16_to_float((bf16)(pair & 0xffff)));
    a.out[64 + 2 * lane + 1] = float_to_bits(bf16_to_float((bf16)(pair >> 16)));
}
KERNEL(32, 1) wrapper_functions(WrapperArgs a) { // of 32 floats: exp2, log2, 1 / sqrt
    const float x = ((const float*)a.in)[threadIdx.x];
    a.out[threadIdx.x] = float_to_bits(exp2_approx(x));
    a.out[32 + threadIdx.x] = float_to_bits(log2_approx(fabsf(x)));
    a.out[64 + threadIdx.x] = float_to_bits(rsqrt_approx(fabsf(x)));
}
KERNEL(32, 1) wrapper_copies(WrapperArgs a) { // 16-byte and 4-byte copies; odd lanes copy zeros
    DYNAMIC_SHARED(shared);
    const u32 lane = threadIdx.x;
    const bool valid = lane % 2 == 0;
    cp_async16(shared_address(shared + lane * 16), (const unsigned char*)a.in + lane * 16, valid);
    cp_async4(shared_address(shared + 512 + lane * 4), (const unsigned char*)a.in + lane * 4, valid);
    cp_async_commit();
    cp_async_wait<0>();
    __syncwarp();
    const u32 other = 31 - lane; // what another lane has copied
    const Bytes16 v = load16(shared + other * 16);
    store16(a.out + other * 4, v);
    a.out[128 + other] = *(const u32*)(shared + 512 + other * 4);
}
template <bool TRANSPOSED> DEVICE void ldmatrix_test(WrapperArgs a) { // four 8x8 matrices, one after another
    DYNAMIC_SHARED(matrices);
    const u32 lane = threadIdx.x;
    store16(matrices + lane * 16, load16((const unsigned char*)a.in + lane * 16));
    __syncwarp();
    u32 r[4];
    if (TRANSPOSED) ldmatrix_x4_trans(r, shared_address(matrices + lane * 16));
    else ldmatrix_x4(r, shared_address(matrices + lane * 16));
    for (u32 i = 0; i < 4; i++) a.out[i * 32 + lane] = r[i];
}
KERNEL(32, 1) wrapper_ldmatrix(WrapperArgs a) { ldmatrix_test<false>(a); }
KERNEL(32, 1) wrapper_ldmatrix_trans(WrapperArgs a) { ldmatrix_test<true>(a); }
KERNEL(32, 1) wrapper_mma(WrapperArgs a) { // in: a [16, 16], b [16, 8] in bf16, d [16, 8] in f32; out: d
    const bf16 *left = (const bf16*)a.in, *right = left + 256;
    const float* sums = (const float*)(right + 128);
    const u32 g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
    auto two = [](bf16 low, bf16 high) { return low | (u32)high << 16; };
    u32 l[4];
    float d[4];
    for (u32 i = 0; i < 4; i++) {
        const u32 row = g + i % 2 * 8, col = t + i / 2 * 8;
        l[i] = two(left[row * 16 + col], left[row * 16 + col + 1]);
        d[i] = sums[(g + i / 2 * 8) * 8 + t + i % 2];
    }
    mma_16816(d, l, two(right[t * 8 + g], right[(t + 1) * 8 + g]), two(right[(t + 8) * 8 + g], right[(t + 9) * 8 + g]));
    for (u32 i = 0; i < 4; i++) a.out[(g + i / 2 * 8) * 8 + t + i % 2] = float_to_bits(d[i]);
}
KERNEL(32, 1) wrapper_warp(WrapperArgs a) { // of 32 floats: sum, maximum; the lanes with a positive one
    const float x = ((const float*)a.in)[threadIdx.x];
    a.out[threadIdx.x] = float_to_bits(warp_sum(x));
    a.out[32 + threadIdx.x] = float_to_bits(warp_max(x));
    a.out[64 + threadIdx.x] = __ballot_sync(FULL_WARP, x > 0.0f);
}
