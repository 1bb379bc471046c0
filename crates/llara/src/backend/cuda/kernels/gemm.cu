// Matrix products for shapes and alignments that cuBLASLt does not support; bias and residual after a product.
#include "elements.cuh"

/// d = alpha · a · b + beta · c: a [m, k] and b [k, n] with any strides, c and d [m, n] with adjacent
/// columns. c may be d; it is not read if beta is 0. Block (x, y): 16 columns by 16 rows of d, one thread
/// an element.
struct GemmArgs {
    const void* a;
    const void* b;
    const void* c;
    void* d;
    u64 m;
    u64 n;
    u64 k;
    u64 a_row;
    u64 a_col;
    u64 b_row;
    u64 b_col;
    u64 c_row;
    u64 d_row;
    float alpha;
    float beta;
};
template <class T, class D> DEVICE void gemm(const GemmArgs& g) {
    constexpr u32 TILE = 16;
    __shared__ float a[TILE][TILE + 1], b[TILE][TILE + 1];
    const u32 x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const u64 row = (u64)blockIdx.x * TILE + y, col = (u64)blockIdx.y * TILE + x;
    float sum = 0.0f;
    for (u64 k = 0; k < g.k; k += TILE) {
        a[y][x] = row < g.m && k + x < g.k ? widened(((const T*)g.a)[row * g.a_row + (k + x) * g.a_col]) : 0.0f;
        b[y][x] = col < g.n && k + y < g.k ? widened(((const T*)g.b)[(k + y) * g.b_row + col * g.b_col]) : 0.0f;
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < TILE; i++) sum += a[y][i] * b[i][x];
        __syncthreads();
    }
    if (row >= g.m || col >= g.n) return;
    sum *= g.alpha;
    if (g.beta != 0.0f) sum += g.beta * widened(((const D*)g.c)[row * g.c_row + col]);
    ((D*)g.d)[row * g.d_row + col] = rounded<D>(sum);
}
KERNEL(256, 1) gemm_f32_f32(GemmArgs a) { gemm<float, float>(a); }
KERNEL(256, 1) gemm_f32_bf16(GemmArgs a) { gemm<float, bf16>(a); }
KERNEL(256, 1) gemm_bf16_f32(GemmArgs a) { gemm<bf16, float>(a); }
KERNEL(256, 1) gemm_bf16_bf16(GemmArgs a) { gemm<bf16, bf16>(a); }

/// y = product + bias (+ residual), rounded once; product and y may be the same matrix. One thread per octet.
struct FinishArgs {
    const float* product;
    const float* bias;
    const void* residual;
    void* y;
    u64 rows;
    u64 cols;
    u32 wide;
};
template <class T> DEVICE void finish(const FinishArgs& a) {
    const u64 octets = octets_of(a.cols), item = thread_in_grid();
    if (item >= a.rows * octets) return;
    const Split at = split(item, octets);
    const u64 col = at.remainder * OCTET, left = a.cols - col, first = at.quotient * a.cols + col;
    float x[OCTET], bias[OCTET], more[OCTET] = {};
    load8(x, a.product + first, left, a.wide);
    load8(bias, a.bias + col, left, a.wide);
    if (a.residual) load8(more, (const T*)a.residual + first, left, a.wide);
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) x[j] += bias[j] + more[j];
    store8((T*)a.y + first, x, left, a.wide);
}
KERNEL(256, 1) finish_f32(FinishArgs a) { finish<float>(a); }
KERNEL(256, 1) finish_bf16(FinishArgs a) { finish<bf16>(a); }
