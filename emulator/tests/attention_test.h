// Tests of the attention kernels against f64, in the emulator or on a GPU: the file that includes this one includes
// a buffer.h first. Results must be within bounds, and have the same bits for every random order, or in every run.
#pragma once
#include "reference.h"

#include <chrono>
#include <cstdio>
#include <random>
#include <string>

namespace {

/// Inputs and results on the device. q, k and v are column blocks of one matrix if every row is a query,
/// as in a model, and so are their gradients; else q is a separate matrix.
template <class T> struct Device {
    bool fused;
    u32 q_cols, kv_cols, q_stride, kv_stride;
    Buffer<T> qkv, q_alone, out, dout, dqkv, dq_alone;
    Buffer<float> lse, delta;
    Buffer<u32> q_offsets, k_offsets;

    Device(const Shape& s, const Reference& r)
        : fused(s.tail == 0), q_cols(s.heads * s.head_dim), kv_cols(s.kv_heads * s.head_dim),
          q_stride(fused ? q_cols + 2 * kv_cols : q_cols), kv_stride(fused ? q_stride : 2 * kv_cols),
          qkv((size_t)r.key_rows() * kv_stride, true), q_alone(fused ? 0 : (size_t)r.query_rows() * q_cols, true),
          out((size_t)r.query_rows() * q_cols), dout((size_t)r.query_rows() * q_cols, true),
          dqkv((size_t)r.key_rows() * kv_stride), dq_alone(fused ? 0 : (size_t)r.query_rows() * q_cols),
          lse((size_t)r.query_rows() * s.heads), delta((size_t)r.query_rows() * s.heads), q_offsets(r.q_offsets),
          k_offsets(r.k_offsets) {}

    T* q() { return fused ? qkv.data : q_alone.data; }
    T* k() { return qkv.data + (fused ? q_cols : 0); }
    T* v() { return k() + kv_cols; }
    T* dq() { return fused ? dqkv.data : dq_alone.data; }
    T* dk() { return dqkv.data + (fused ? q_cols : 0); }
    T* dv() { return dk() + kv_cols; }
    AttentionArgs args(const Shape& s, const Reference& r) {
        AttentionArgs a{};
        a.q = q(), a.k = k(), a.v = v(), a.out = out.data, a.lse = lse.data, a.dout = dout.data;
        a.delta = delta.data, a.dq = dq(), a.dk = dk(), a.dv = dv();
        a.q_offsets = q_offsets.data, a.k_offsets = k_offsets.data;
        a.q_stride = a.dq_stride = q_stride, a.k_stride = a.v_stride = a.dk_stride = a.dv_stride = kv_stride;
        a.out_stride = a.dout_stride = q_cols;
        a.sequences = s.lengths.size(), a.query_rows = r.query_rows(), a.key_rows = r.key_rows();
        a.heads = s.heads, a.kv_heads = s.kv_heads, a.head_dim = s.head_dim, a.window = s.window, a.scale = s.scale;
        return a;
    }
};

/// Random values of T in `values` and, the same, in a matrix on the device.
template <class T>
void fill(std::vector<double>& values, T* to, u32 rows, u32 cols, u32 stride, std::mt19937& random) {
    std::normal_distribution<float> normal;
    values.clear();
    for (u32 r = 0; r < rows; r++)
        for (u32 c = 0; c < cols; c++) {
            assign(to[(size_t)r * stride + c], normal(random));
            values.push_back(value(to[(size_t)r * stride + c]));
        }
}
template <class T> std::vector<double> read(const T* from, u32 rows, u32 cols, u32 stride) {
    std::vector<double> values;
    for (u32 r = 0; r < rows; r++)
        for (u32 c = 0; c < cols; c++) values.push_back(value(from[(size_t)r * stride + c]));
    return values;
}

/// The numbers of tiles of `tile` rows, and into `per_sequence` how they are numbered: by sequence, unless a search needs
/// fewer blocks (see block_tile).
inline u32 number_tiles(const std::vector<u32>& offsets, u32 tile, u32& per_sequence) {
    const u32 sequences = offsets.size() - 1, with_search = offsets.back() / tile + sequences;
    u32 longest = 1;
    for (u32 s = 0; s < sequences; s++) longest = std::max(longest, offsets[s + 1] - offsets[s]);
    per_sequence = (longest + tile - 1) / tile;
    if (per_sequence * sequences <= with_search) return per_sequence * sequences;
    per_sequence = 0;
    return with_search;
}

/// The launches of a forward and a backward pass, as the kernel files describe them.
template <class T> void run_kernels(const Shape& s, const Reference& r, Device<T>& d, bool plain) {
    AttentionArgs a = d.args(s, r);
    const std::string type = sizeof(T) == 4 ? "f32" : "bf16";
    const u32 hd = s.head_dim, rows = (a.query_rows + 3) / 4;
    const std::string suffix = plain ? "plain_" + type : std::to_string(hd);
    if (plain) {
        launch("attention_forward_" + suffix, dim3{rows, s.heads, 1}, 128, 0, a);
        launch("attention_delta_" + type, dim3{rows, s.heads, 1}, 128, 0, a);
        launch("attention_backward_queries_" + suffix, dim3{rows, s.heads, 1}, 128, 0, a);
        launch("attention_backward_keys_" + suffix, dim3{(a.key_rows + 3) / 4, s.kv_heads, 1}, 128, 0, a);
        return;
    }
    const u32 queries = number_tiles(r.q_offsets, 128, a.query_tiles), keys = number_tiles(r.k_offsets, 64, a.key_tiles);
    launch("attention_forward_" + suffix, dim3{queries, s.heads, 1}, 128, 512 * hd, a);
    launch("attention_delta_" + type, dim3{rows, s.heads, 1}, 128, 0, a);
    launch("attention_backward_queries_" + suffix, dim3{queries, s.heads, 1}, 128, 768 * hd, a);
    launch("attention_backward_keys_" + suffix, dim3{keys, s.kv_heads, 1}, 128, 512 * hd + 4608, a);
}

template <class T> bool test(Shape s, bool plain, u32 seeds, const std::string& name) {
    if (s.scale == 0) s.scale = 1 / std::sqrt((float)s.head_dim);
    Reference r(s);
    std::mt19937 random(7);
    std::vector<unsigned char> first_bits;
    bool ok = true;
    for (u32 seed = 0; seed < seeds; seed++) {
        Device<T> d(s, r);
        random.seed(7);
        fill(r.q, d.q(), r.query_rows(), d.q_cols, d.q_stride, random);
        fill(r.k, d.k(), r.key_rows(), d.kv_cols, d.kv_stride, random);
        fill(r.v, d.v(), r.key_rows(), d.kv_cols, d.kv_stride, random);
        fill(r.dout, d.dout.data, r.query_rows(), d.q_cols, d.q_cols, random);
        draw_order(seed);
        const auto start = std::chrono::steady_clock::now();
        run_kernels(s, r, d, plain);
        const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

        std::vector<unsigned char> bits;
        auto append = [&](const void* p, size_t n) { bits.insert(bits.end(), (const unsigned char*)p, (const unsigned char*)p + n); };
        append(d.out.data, d.out.count * sizeof(T)), append(d.dqkv.data, d.dqkv.count * sizeof(T));
        append(d.dq_alone.data, d.dq_alone.count * sizeof(T)), append(d.lse.data, d.lse.count * 4);
        if (seed == 0) {
            r.compute(s);
            first_bits = bits;
            const u32 hd = s.head_dim;
            const double errors[] = {
                row_error(read(d.out.data, r.query_rows(), d.q_cols, d.q_cols), r.out, r.out_terms, hd),
                row_error(read(d.dq(), r.query_rows(), d.q_cols, d.q_stride), r.dq, r.dq_terms, hd),
                row_error(read(d.dk(), r.key_rows(), d.kv_cols, d.kv_stride), r.dk, r.dk_terms, hd),
                row_error(read(d.dv(), r.key_rows(), d.kv_cols, d.kv_stride), r.dv, r.dv_terms, hd),
            };
            double lse = 0;
            for (size_t i = 0; i < r.lse.size(); i++) {
                const double e = std::abs(d.lse[i] - r.lse[i]) / std::max(1.0, std::abs(r.lse[i]));
                if (!(e <= lse)) lse = e;
            }
            // A rounding to bf16 changes a value by at most 2^-9, 0.002 of it; p, dS, out and the gradients are
            // rounded. f32 sums of a few hundred products are within 5e-6. With large scores, one key has nearly all the
            // weight of a query, and dP - delta nearly cancels.
            const double bound = (sizeof(T) == 4 ? 5e-6 : 1e-2) * (s.scale >= 1 ? 2.5 : 1);
            for (const double& e : errors) ok &= e < (&e == errors + 1 ? 2 * bound : bound); // dq has the largest errors
            ok &= lse < 1e-5;
            printf("%-44s out %.1e dq %.1e dk %.1e dv %.1e lse %.1e  %.2f s  %s\n", name.c_str(), errors[0], errors[1],
                   errors[2], errors[3], lse, seconds, ok ? "ok" : "WRONG");
        } else if (bits != first_bits) {
            printf("%-44s WRONG: order %u gives different bits\n", name.c_str(), seed);
            ok = false;
        }
        fflush(stdout);
    }
    return ok;
}

/// Runs the cases whose name contains `filter`, each `seeds` times. Returns the number of wrong ones, or 1 if
/// none was run.
int test_attention(u32 seeds, const std::string& filter) {
    int wrong = 0, run = 0;
    auto add = [&](const char* what, Shape s, bool plain, bool f32) {
        char name[128];
        snprintf(name, sizeof name, "%s hd %u heads %u/%u window %u %s", what, s.head_dim, s.heads, s.kv_heads, s.window,
                 f32 ? "f32" : plain ? "bf16 plain" : "bf16");
        if (std::string(name).find(filter) == std::string::npos) return;
        run++;
        wrong += !(f32 ? test<float>(s, plain, seeds, name) : test<bf16>(s, plain, seeds, name));
    };
    for (u32 hd : {64u, 96u, 128u}) {
        add("lengths 1..300", {hd, 4, 2, 0, {1, 7, 64, 65, 128, 300, 2}, 0}, false, false);
        add("one sequence", {hd, 2, 2, 0, {129}, 0}, false, false);
        add("similar lengths", {hd, 2, 1, 0, {130, 150}, 0}, false, false);
        add("window", {hd, 2, 1, 50, {1, 7, 64, 65, 130, 200}, 0}, false, false);
        add("narrow window", {hd, 3, 1, 1, {3, 33, 140}, 0}, false, false);
        add("tails", {hd, 4, 1, 0, {3, 0, 100, 129, 0}, 5}, false, false);
        add("tails and window", {hd, 2, 1, 7, {3, 300, 64}, 70}, false, false);
        add("large scores", {hd, 2, 1, 0, {1, 150, 300}, 0, 1}, false, false);
        add("window wider than all", {hd, 2, 2, 0x80000000u, {40, 70}, 0}, false, false);
    }
    add("many short", {64, 2, 1, 0, std::vector<u32>(70, 9), 0}, false, false);
    for (bool f32 : {true, false}) {
        add("plain", {8, 2, 1, 0, {1, 5, 33, 70}, 0}, true, f32);
        add("plain tails and window", {80, 4, 2, 9, {3, 40, 0, 65}, 6}, true, f32);
        add("plain", {256, 2, 2, 0, {2, 40}, 0}, true, f32);
        add("plain", {34, 3, 3, 4, {20}, 0}, true, f32);
        add("plain", {128, 2, 1, 0, {1, 40}, 0}, true, f32);
    }
    printf("%d cases, %u orders each, %d wrong\n", run, seeds, wrong);
    return run ? wrong : 1;
}

} // namespace
