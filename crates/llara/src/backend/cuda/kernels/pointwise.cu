// Rotary embedding, SwiGLU and dropout.
#include "elements.cuh"

/// Rotates features i and i + half of each head by the angle of the row's position, in place; `direction` is
/// 1, or −1 for the inverse. One thread per octet of pairs.
struct RopeArgs {
    void* x;
    const u32* positions;
    const float* cosines;
    const float* sines;
    u64 rows;
    u64 heads;
    u64 half;
    u64 stride;
    float direction;
    u32 wide;
};
template <class T> DEVICE void rope(const RopeArgs& a) {
    const u64 octets = octets_of(a.half), item = thread_in_grid();
    if (item >= a.rows * a.heads * octets) return;
    const Split pair = split(item, octets), at = split(pair.quotient, a.heads);
    const u64 col = pair.remainder * OCTET, left = a.half - col;
    T* first = (T*)a.x + at.quotient * a.stride + at.remainder * 2 * a.half + col;
    const u64 angle = (u64)a.positions[at.quotient] * a.half + col;
    float x[OCTET], y[OCTET], c[OCTET], s[OCTET];
    load8(x, first, left, a.wide);
    load8(y, first + a.half, left, a.wide);
    load8(c, a.cosines + angle, left, a.wide);
    load8(s, a.sines + angle, left, a.wide);
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) {
        const float sine = s[j] * a.direction, before = x[j];
        x[j] = before * c[j] - y[j] * sine;
        y[j] = y[j] * c[j] + before * sine;
    }
    store8(first, x, left, a.wide);
    store8(first + a.half, y, left, a.wide);
}
KERNEL(256, 1) rope_f32(RopeArgs a) { rope<float>(a); }
KERNEL(256, 1) rope_bf16(RopeArgs a) { rope<bf16>(a); }

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/// y = silu(gate)∘up: gate and up are concatenated by columns in gate_up [rows, 2 · cols]. Backward: y
/// overwrites dy, and the gradients of gate and up overwrite gate_up. One thread per octet.
struct SwigluArgs {
    void* gate_up;
    void* y;
    u64 rows;
    u64 cols;
    u32 wide;
};
template <class T> DEVICE void swiglu(const SwigluArgs& a, bool backward) {
    const u64 octets = octets_of(a.cols), item = thread_in_grid();
    if (item >= a.rows * octets) return;
    const Split at = split(item, octets);
    const u64 col = at.remainder * OCTET, left = a.cols - col;
    T* gate_at = (T*)a.gate_up + at.quotient * 2 * a.cols + col;
    T* y_at = (T*)a.y + at.quotient * a.cols + col;
    float gate[OCTET], up[OCTET], y[OCTET];
    load8(gate, gate_at, left, a.wide);
    load8(up, gate_at + a.cols, left, a.wide);
    if (backward) {
        load8(y, y_at, left, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) {
            const float dy = y[j], s = sigmoid(gate[j]), silu = gate[j] * s;
            y[j] = silu * up[j];
            const float dgate = dy * up[j] * s * (1.0f + gate[j] * (1.0f - s));
            up[j] = dy * silu;
            gate[j] = dgate;
        }
        store8(gate_at, gate, left, a.wide);
        store8(gate_at + a.cols, up, left, a.wide);
    } else {
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) y[j] = gate[j] * sigmoid(gate[j]) * up[j];
    }
    store8(y_at, y, left, a.wide);
}
KERNEL(256, 1) swiglu_f32(SwigluArgs a) { swiglu<float>(a, false); }
KERNEL(256, 1) swiglu_bf16(SwigluArgs a) { swiglu<bf16>(a, false); }
KERNEL(256, 1) swiglu_backward_f32(SwigluArgs a) { swiglu<float>(a, true); }
KERNEL(256, 1) swiglu_backward_bf16(SwigluArgs a) { swiglu<bf16>(a, true); }

/// y = keep · x if the random number is at least `threshold`, else zero; or y += that. The generator is
/// Philox4x32-10 (Salmon et al. 2011). One thread per half block of 64 columns: eight counters, whose words
/// are 16 columns apart.
struct DropoutArgs {
    const void* x;
    void* y;
    const u32* sequences;
    const u32* positions;
    u64 rows;
    u64 cols;
    u32 seed_low;
    u32 seed_high;
    u32 step;
    u32 module;
    u32 threshold;
    float keep;
    u32 add;
    u32 wide;
};
DEVICE void philox(u32 (&c)[4], u32 key_0, u32 key_1) {
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        const u64 first = (u64)c[0] * 0xD2511F53u, second = (u64)c[2] * 0xCD9E8D57u;
        c[0] = (u32)(second >> 32) ^ c[1] ^ key_0;
        c[2] = (u32)(first >> 32) ^ c[3] ^ key_1;
        c[1] = (u32)second;
        c[3] = (u32)first;
        key_0 += 0x9E3779B9u;
        key_1 += 0xBB67AE85u;
    }
}
template <class T> DEVICE void dropout(const DropoutArgs& a) {
    const u64 halves = 2 * ((a.cols + 63) / 64), item = thread_in_grid();
    if (item >= a.rows * halves) return;
    const Split at = split(item, halves);
    const u64 row = at.quotient;
    const u32 block = (u32)(at.remainder / 2), lane = (u32)(at.remainder % 2) * OCTET;
    const u32 sequence = a.sequences[row], position = a.positions[row];
    u32 draws[4][OCTET];
#pragma unroll
    for (u32 j = 0; j < OCTET; j++) {
        u32 c[4] = {a.module << 16 | (16 * block + lane + j), sequence, position, a.step};
        philox(c, a.seed_low, a.seed_high);
#pragma unroll
        for (u32 word = 0; word < 4; word++) draws[word][j] = c[word];
    }
#pragma unroll
    for (u32 word = 0; word < 4; word++) {
        const u64 col = 64 * (u64)block + 16 * word + lane;
        if (col >= a.cols) break;
        float x[OCTET], y[OCTET] = {};
        load8(x, (const T*)a.x + row * a.cols + col, a.cols - col, a.wide);
        if (a.add) load8(y, (const T*)a.y + row * a.cols + col, a.cols - col, a.wide);
#pragma unroll
        for (u32 j = 0; j < OCTET; j++) y[j] += x[j] * (draws[word][j] >= a.threshold ? a.keep : 0.0f);
        store8((T*)a.y + row * a.cols + col, y, a.cols - col, a.wide);
    }
}
KERNEL(256, 1) dropout_f32(DropoutArgs a) { dropout<float>(a); }
KERNEL(256, 1) dropout_bf16(DropoutArgs a) { dropout<bf16>(a); }
