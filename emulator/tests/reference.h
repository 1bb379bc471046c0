// Shared by the tests in the emulator and on a GPU: attention in f64, and the comparison of results with it.
#pragma once
#include "attention.cuh"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

inline float value(float x) { return x; }
inline float value(bf16 x) {
    const u32 bits = (u32)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) { // of finite numbers
    u32 bits;
    memcpy(&bits, &x, 4);
    to = (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// The largest error of a row of `width` elements, relative to the length of the wanted row and a fifth of
/// the length of `terms`, the sums of the absolute values that were added: if they cancel, the remainder has their
/// rounding errors. NaN if any element is NaN.
inline double row_error(const std::vector<double>& got, const std::vector<double>& want,
                        const std::vector<double>& terms, size_t width) {
    double worst = 0;
    for (size_t r = 0; r < want.size() / width; r++) {
        double error = 0, length = 0, sizes = 0;
        for (size_t i = r * width; i < (r + 1) * width; i++) {
            error += (got[i] - want[i]) * (got[i] - want[i]);
            length += want[i] * want[i];
            sizes += terms[i] * terms[i];
        }
        const double relative = std::sqrt(error) / (std::sqrt(length) + 0.2 * std::sqrt(sizes) + 1e-30);
        if (!(relative <= worst)) worst = relative;
        if (std::isnan(worst)) return worst;
    }
    return worst;
}

/// The shape of a test.
struct Shape {
    u32 head_dim, heads, kv_heads, window;
    std::vector<u32> lengths;
    u32 tail; // queries of each sequence, at most; 0: all rows are queries
    float scale = 0;
};

/// Attention and its gradients in f64, from inputs `[rows, heads · head_dim]`.
struct Reference {
    std::vector<u32> q_offsets{0}, k_offsets{0};
    std::vector<double> q, k, v, dout, out, lse, dq, dk, dv;     // lse: [heads, query rows]
    std::vector<double> out_terms, dq_terms, dk_terms, dv_terms; // see row_error

    explicit Reference(const Shape& s) {
        for (u32 length : s.lengths) {
            k_offsets.push_back(k_offsets.back() + length);
            q_offsets.push_back(q_offsets.back() + (s.tail ? std::min(s.tail, length) : length));
        }
    }
    u32 query_rows() const { return q_offsets.back(); }
    u32 key_rows() const { return k_offsets.back(); }

    void compute(const Shape& s) {
        const u32 hd = s.head_dim, H = s.heads, KV = s.kv_heads;
        out.assign(q.size(), 0), lse.assign((size_t)query_rows() * H, 0);
        for (auto* x : {&dq, &out_terms, &dq_terms}) x->assign(q.size(), 0);
        for (auto* x : {&dk, &dv, &dk_terms, &dv_terms}) x->assign(k.size(), 0);
        for (u32 at = 0; at + 1 < k_offsets.size(); at++) {
            const u32 queries = q_offsets[at + 1] - q_offsets[at], keys = k_offsets[at + 1] - k_offsets[at];
            for (u32 i = 0; i < queries; i++)
                for (u32 h = 0; h < H; h++) {
                    const u32 row = q_offsets[at] + i, position = keys - queries + i;
                    const u32 low = s.window && position + 1 > s.window ? position + 1 - s.window : 0;
                    one_query(s, ((size_t)row * H + h) * hd, k_offsets[at] + low, position + 1 - low, h / (H / KV),
                              lse[(size_t)h * query_rows() + row]);
                }
        }
    }

  private:
    void one_query(const Shape& s, size_t q_at, u32 first, u32 count, u32 kv_head, double& lse_out) {
        const u32 hd = s.head_dim;
        std::vector<double> p(count), dp(count);
        auto key_at = [&](u32 j) { return ((size_t)(first + j) * s.kv_heads + kv_head) * hd; };
        double top = -1e300, total = 0, delta = 0;
        for (u32 j = 0; j < count; j++) {
            for (u32 c = 0; c < hd; c++) p[j] += q[q_at + c] * k[key_at(j) + c];
            p[j] *= s.scale;
            top = std::max(top, p[j]);
        }
        for (double& x : p) total += x = std::exp(x - top);
        lse_out = top + std::log(total);
        for (u32 j = 0; j < count; j++) {
            p[j] /= total;
            for (u32 c = 0; c < hd; c++) {
                out[q_at + c] += p[j] * v[key_at(j) + c];
                out_terms[q_at + c] += p[j] * std::abs(v[key_at(j) + c]);
                dp[j] += dout[q_at + c] * v[key_at(j) + c];
            }
            delta += p[j] * dp[j];
        }
        double delta_terms = 0; // the error of delta is that of out, which was rounded
        for (u32 c = 0; c < hd; c++) delta_terms += std::pow(out[q_at + c] * dout[q_at + c], 2);
        delta_terms = std::sqrt(delta_terms);
        for (u32 j = 0; j < count; j++) {
            const double ds = p[j] * (dp[j] - delta) * s.scale;
            for (u32 c = 0; c < hd; c++) {
                dq[q_at + c] += ds * k[key_at(j) + c];
                dk[key_at(j) + c] += ds * q[q_at + c];
                dv[key_at(j) + c] += p[j] * dout[q_at + c];
                const double ds_terms = p[j] * (std::abs(dp[j]) + std::abs(delta) + delta_terms) * s.scale;
                dq_terms[q_at + c] += ds_terms * std::abs(k[key_at(j) + c]);
                dk_terms[key_at(j) + c] += ds_terms * std::abs(q[q_at + c]);
                dv_terms[key_at(j) + c] += p[j] * std::abs(dout[q_at + c]);
            }
        }
    }
};
