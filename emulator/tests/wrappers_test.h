// Tests of each function of prelude.cuh against its definition. Included like attention_test.h.
#pragma once
#include "reference.h"

#include <cstdio>
#include <functional>
#include <random>
#include <string>

namespace {

inline float float_of(u32 bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline u32 bits_of(float f) {
    u32 bits;
    memcpy(&bits, &f, 4);
    return bits;
}

/// Runs a wrapper's kernel on `in` and calls `right` to check each word of the result.
bool test_wrapper(const std::string& name, const std::vector<u32>& in, size_t words,
                  const std::function<bool(size_t, u32)>& right) {
    Buffer<u32> from(in), to(words);
    struct {
        const void* in;
        u32* out;
    } args{from.data, to.data};
    launch("wrapper_" + name, dim3{1, 1, 1}, 32, 1024, args);
    for (size_t i = 0; i < words; i++)
        if (!right(i, to[i])) {
            printf("%-20s WRONG: word %zu is %08x (%g)\n", name.c_str(), i, to[i], float_of(to[i]));
            return false;
        }
    printf("%-20s ok\n", name.c_str());
    return true;
}

/// Returns the number of wrong wrappers.
int test_wrappers() {
    int wrong = 0;
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    std::vector<u32> floats;
    for (u32 special : {0u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0x7f800001u, 0x7f7fffffu, 0x00000001u,
                        0x3f808000u, 0x3f818000u, 0x3f808001u, 0x3f807fffu}) // infinities, NaNs, ties
        floats.push_back(special);
    while (floats.size() < 64) floats.push_back(bits_of(normal(random)));
    auto is_nan = [](u32 b) { return (b & 0x7fffffff) > 0x7f800000; };
    auto rounded = [](u32 b) { return (b + 0x7fff + (b >> 16 & 1)) >> 16; };
    wrong += !test_wrapper("round", floats, 64, [&](size_t i, u32 got) {
        for (u32 half = 0; half < 2; half++) {
            const u32 x = floats[i % 32 * 2 + half], y = got >> (16 * half) & 0xffff;
            if (is_nan(x) ? !is_nan(y << 16) : y != rounded(x)) return false;
        }
        return true;
    });

    std::vector<u32> pairs;
    for (int i = 0; i < 32; i++) pairs.push_back((u32)random());
    wrong += !test_wrapper("widen", pairs, 128, [&](size_t i, u32 got) {
        const u32 pair = pairs[i % 64 / 2];
        return got == (i % 2 ? pair & 0xffff0000u : pair << 16);
    });

    std::vector<u32> values{0, 0xff800000u, bits_of(-200), bits_of(1)};
    while (values.size() < 32) values.push_back(bits_of(10 * normal(random)));
    wrong += !test_wrapper("functions", values, 96, [&](size_t i, u32 got) {
        const double x = float_of(values[i % 32]), y = float_of(got);
        double want = i < 32 ? std::exp2(x) : i < 64 ? std::log2(std::abs(x)) : 1 / std::sqrt(std::abs(x));
        if (i < 32 && want < 1.2e-38) want = 0;
        const double bound = i < 32 || i >= 64 ? 4e-7 * std::abs(want) : 4e-7 * std::max(1.0, std::abs(want));
        return std::isinf(want) || want == 0 ? y == want : std::abs(y - want) <= bound;
    });

    std::vector<u32> words;
    for (int i = 0; i < 128; i++) words.push_back((u32)random());
    wrong += !test_wrapper("copies", words, 160, [&](size_t i, u32 got) {
        const bool valid = (i < 128 ? i / 4 : i) % 2 == 0;
        return got == (valid ? words[i < 128 ? i : i - 128] : 0);
    });
    auto element = [&](u32 matrix, u32 row, u32 col) {
        return words[(matrix * 8 + row) * 4 + col / 2] >> (col % 2 * 16) & 0xffff;
    };
    wrong += !test_wrapper("ldmatrix", words, 128, [&](size_t i, u32 got) {
        const u32 m = i / 32, g = i % 32 / 4, t = i % 4 * 2;
        return got == (element(m, g, t) | element(m, g, t + 1) << 16);
    });
    wrong += !test_wrapper("ldmatrix_trans", words, 128, [&](size_t i, u32 got) {
        const u32 m = i / 32, g = i % 32 / 4, t = i % 4 * 2;
        return got == (element(m, t, g) | element(m, t + 1, g) << 16);
    });

    std::vector<bf16> operands(384);
    for (bf16& x : operands) assign(x, normal(random));
    std::vector<u32> product(192 + 128);
    memcpy(product.data(), operands.data(), 768);
    for (int i = 192; i < 320; i++) product[i] = bits_of(normal(random));
    wrong += !test_wrapper("mma", product, 128, [&](size_t i, u32 got) {
        double want = float_of(product[192 + i]), terms = std::abs(want);
        for (u32 k = 0; k < 16; k++) {
            const double x = (double)value(operands[i / 8 * 16 + k]) * value(operands[256 + k * 8 + i % 8]);
            want += x, terms += std::abs(x);
        }
        return std::abs(float_of(got) - want) <= 2e-6 * terms; // tensor cores do not round every sum to nearest
    });

    std::vector<u32> lanes;
    for (int i = 0; i < 32; i++) lanes.push_back(bits_of(normal(random)));
    double sum = 0, largest = -1e30;
    u32 positive = 0;
    for (int i = 0; i < 32; i++) {
        sum += float_of(lanes[i]), largest = std::max(largest, (double)float_of(lanes[i]));
        positive |= (u32)(float_of(lanes[i]) > 0) << i;
    }
    wrong += !test_wrapper("warp", lanes, 96, [&](size_t i, u32 got) {
        if (i >= 64) return got == positive;
        return i < 32 ? std::abs(float_of(got) - sum) <= 1e-5 : float_of(got) == (float)largest;
    });
    return wrong;
}

} // namespace
