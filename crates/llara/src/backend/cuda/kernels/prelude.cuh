// Included first by every kernel file: fixed-width types, conversions, and the few PTX instructions that
// the kernels use, each in one function.
//
// NVRTC and nvcc compile this file without any other header. Any other compiler includes `emu.h` of the
// emulator, which defines the same names on the host, so that kernels are tested without a GPU.
#pragma once
#ifndef __CUDACC__
#include "emu.h"
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;
/// The bits of a bfloat16. Arithmetic is done in f32.
typedef unsigned short bf16;

/// 16 bytes, loaded or stored by one instruction.
struct alignas(16) Bytes16 {
    u32 x, y, z, w;
};

/// A function of kernels, always inlined.
#define DEVICE __device__ __forceinline__
/// A kernel that the host finds by its name, launched with `threads` threads per block; `blocks` is the smallest
/// number of blocks that an SM must be able to hold, which limits the registers of a thread.
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
/// Declares `name` as a pointer to the dynamic shared memory of the block, a multiple of 1024 bytes.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
/// Every lane of a warp.
#define FULL_WARP 0xffffffffu

// ---- Conversions ----------------------------------------------------------------------------------

DEVICE u32 float_to_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_to_float(u32 x) { return __uint_as_float(x); }
DEVICE float bf16_to_float(bf16 x) { return __uint_as_float((u32)x << 16); }
/// The low half of two packed bf16.
DEVICE float bf16_low(u32 x) { return __uint_as_float(x << 16); }
/// The high half of two packed bf16.
DEVICE float bf16_high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
/// Rounded to nearest, ties to even; a NaN stays a NaN.
DEVICE bf16 float_to_bf16(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(r) : "f"(x));
    return r;
}
/// Two values rounded like float_to_bf16, `low` in the low half.
DEVICE u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// ---- Functions ------------------------------------------------------------------------------------

/// 2^x, within 2 ulp; results below the normal range are zero. exp2_approx(-inf) is 0.
DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}
/// log2(x), absolute error below 2^-22 between 0.5 and 2, else relative error below 2^-22.
DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}
/// 1 / sqrt(x), relative error below 2^-22.
DEVICE float rsqrt_approx(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

// ---- Memory ---------------------------------------------------------------------------------------

/// 16 bytes from an address that is a multiple of 16.
DEVICE Bytes16 load16(const void* p) { return *(const Bytes16*)p; }
/// 16 bytes to an address that is a multiple of 16.
DEVICE void store16(void* p, Bytes16 v) { *(Bytes16*)p = v; }
/// An address in shared memory as an integer: the operand of the instructions below. It is as wide as a pointer in
/// the emulator.
typedef u32 SharedAddress;
DEVICE SharedAddress shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
/// The same address, of which the compiler knows nothing: addresses derived from it within a loop are computed there,
/// where the compiler would else keep each in a register throughout the loop.
DEVICE SharedAddress unknown(SharedAddress a) {
    asm volatile("" : "+r"(a));
    return a;
}

/// Starts an asynchronous copy of 16 bytes from global to shared memory, both addresses multiples of 16.
/// With `valid` false, zeros are written and `from` is not read.
DEVICE void cp_async16(SharedAddress to, const void* from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
/// The same for 4 bytes, both addresses multiples of 4.
DEVICE void cp_async4(SharedAddress to, const void* from, bool valid) {
    const int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
}
/// Ends a group of this thread's copies: those started since the last group ended.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Waits until all but the last N groups of this thread are complete. They are visible to other threads after a barrier.
template <int N> DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- Warps ----------------------------------------------------------------------------------------
//
// Every lane of the warp must call these together.

/// Four 8x8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix
/// l / 8, a multiple of 16. Lane l receives in r[i] elements 2·(l % 4) and + 1 of row l / 4 of matrix i.
DEVICE void ldmatrix_x4(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
/// The same, each matrix transposed.
DEVICE void ldmatrix_x4_trans(u32 (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
/// d += a · b with a [16, 16] and b [16, 8] in bf16, d [16, 8] in f32. With g = lane / 4 and t = 2·(lane % 4):
/// a[0], a[1], a[2], a[3] hold columns t, t+1 of rows g and g+8, then columns t+8, t+9 of the same rows;
/// b0 holds rows t, t+1 of column g, b1 rows t+8, t+9;
/// d[0], d[1] are columns t, t+1 of row g, d[2], d[3] of row g+8.
DEVICE void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
                 "{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

/// Sum over the warp in a fixed order, the same in every lane.
template <class T> DEVICE T warp_sum(T x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}
/// Maximum over the warp, the same in every lane. NaNs are ignored.
DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}
