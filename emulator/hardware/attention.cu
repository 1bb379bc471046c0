// Tests and benchmark of the functions of prelude.cuh and of the attention kernels on a GPU: first the tests of
// the emulator, then the speed of attention.
//     attention [RUNS [FILTER]]
// README.md describes the build. Exit code 1 if a result is wrong.
#include <cmath>
#include <cstring>

#include "attention.cuh"

#include "buffer.h"

// Each file has constants of the same names.
namespace forward {
#include "attention_forward.cu"
}
namespace backward {
#include "attention_backward.cu"
}
namespace plain {
#include "attention_plain.cu"
}

namespace wrappers {
#include "../tests/wrappers.cu"
}

#include "../tests/attention_test.h"
#include "../tests/wrappers_test.h"

namespace {

void fill_table() {
    auto& table = kernel_table();
#define ADD(space, name) table[#name] = (const void*)&space::name
#define ADD_HEADS(space, name) ADD(space, name##_64), ADD(space, name##_96), ADD(space, name##_128)
#define ADD_TYPES(name) ADD(plain, name##_f32), ADD(plain, name##_bf16)
    ADD_HEADS(forward, attention_forward);
    ADD_HEADS(backward, attention_backward_queries);
    ADD_HEADS(backward, attention_backward_keys);
    for (const auto& [name, kernel] : std::map<std::string, const void*>{
             {"round", (const void*)wrappers::wrapper_round},
             {"widen", (const void*)wrappers::wrapper_widen},
             {"functions", (const void*)wrappers::wrapper_functions},
             {"copies", (const void*)wrappers::wrapper_copies},
             {"ldmatrix", (const void*)wrappers::wrapper_ldmatrix},
             {"ldmatrix_trans", (const void*)wrappers::wrapper_ldmatrix_trans},
             {"mma", (const void*)wrappers::wrapper_mma},
             {"warp", (const void*)wrappers::wrapper_warp}})
        table["wrapper_" + name] = kernel;
    ADD_TYPES(attention_forward_plain);
    ADD_TYPES(attention_delta);
    ADD_TYPES(attention_backward_queries_plain);
    ADD_TYPES(attention_backward_keys_plain);
}

/// A matrix in device memory, filled by a small generator.
template <class T> struct Matrix {
    T* data;
    explicit Matrix(size_t count) {
        std::vector<T> values(count);
        u32 state = 12345;
        for (T& x : values) {
            float sum = -6; // of twelve uniform numbers: nearly normal
            for (int i = 0; i < 12; i++) {
                state = state * 1664525u + 1013904223u;
                sum += (float)(state >> 8) / 16777216.0f;
            }
            assign(x, sum);
        }
        check_cuda(cudaMalloc((void**)&data, count * sizeof(T)), "allocate");
        check_cuda(cudaMemcpy(data, values.data(), count * sizeof(T), cudaMemcpyHostToDevice), "copy");
    }
    ~Matrix() { cudaFree(data); }
};

/// Seconds of one call, the minimum of several groups.
template <class F> double seconds(F run) {
    cudaEvent_t from, to;
    cudaEventCreate(&from), cudaEventCreate(&to);
    run();
    double best = 1e30;
    for (int group = 0; group < 5; group++) {
        cudaEventRecord(from);
        for (int i = 0; i < 4; i++) run();
        cudaEventRecord(to);
        check_cuda(cudaEventSynchronize(to), "run");
        float ms = 0;
        cudaEventElapsedTime(&ms, from, to);
        best = std::min(best, ms * 1e-3 / 4);
    }
    cudaEventDestroy(from), cudaEventDestroy(to);
    return best;
}

/// Forward and backward of `sequences` causal sequences of `length` tokens. Rates count the products that an
/// exact computation needs: two forward and five backward, over the pairs of a query and a key that it attends to.
void measure(u32 hd, u32 length, u32 sequences, u32 heads, u32 kv_heads) {
    const u32 rows = length * sequences, cols = (heads + 2 * kv_heads) * hd;
    Matrix<bf16> qkv((size_t)rows * cols), dqkv((size_t)rows * cols);
    Matrix<bf16> out((size_t)rows * heads * hd), dout((size_t)rows * heads * hd);
    Matrix<float> lse((size_t)rows * heads), delta((size_t)rows * heads);
    std::vector<u32> offsets;
    for (u32 s = 0; s <= sequences; s++) offsets.push_back(s * length);
    Buffer<u32> on_device(offsets);

    AttentionArgs a{};
    a.q = qkv.data, a.k = qkv.data + heads * hd, a.v = qkv.data + (heads + kv_heads) * hd;
    a.dq = dqkv.data, a.dk = dqkv.data + heads * hd, a.dv = dqkv.data + (heads + kv_heads) * hd;
    a.out = out.data, a.dout = dout.data, a.lse = lse.data, a.delta = delta.data;
    a.q_offsets = a.k_offsets = on_device.data;
    a.q_stride = a.k_stride = a.v_stride = a.dq_stride = a.dk_stride = a.dv_stride = cols;
    a.out_stride = a.dout_stride = heads * hd;
    a.sequences = sequences, a.query_rows = a.key_rows = rows;
    a.heads = heads, a.kv_heads = kv_heads, a.head_dim = hd, a.scale = 1 / std::sqrt((float)hd);

    const std::string suffix = "_" + std::to_string(hd);
    const u32 tiles = number_tiles(offsets, 128, a.query_tiles), key_tiles = number_tiles(offsets, 64, a.key_tiles);
    const double forward = seconds([&] { start("attention_forward" + suffix, dim3{tiles, heads, 1}, 128, 512 * hd, a); });
    const double delta_s = seconds([&] { start("attention_delta_bf16", dim3{(rows + 3) / 4, heads, 1}, 128, 0, a); });
    const double by_queries = seconds(
        [&] { start("attention_backward_queries" + suffix, dim3{tiles, heads, 1}, 128, 768 * hd, a); });
    const double by_keys = seconds([&] {
        start("attention_backward_keys" + suffix, dim3{key_tiles, kv_heads, 1}, 128, 512 * hd + 4608, a);
    });
    const double product = 2.0 * hd * heads * sequences * ((double)length * (length + 1) / 2);
    const double backward = delta_s + by_queries + by_keys;
    printf("hd %3u length %4u x %2u heads %u/%u: forward %7.1f us %5.1f TFLOP/s; backward %7.1f us %5.1f TFLOP/s "
           "(delta %.1f, queries %.1f at %.1f, keys %.1f at %.1f executed)\n",
           hd, length, sequences, heads, kv_heads, forward * 1e6, 2 * product / forward * 1e-12, backward * 1e6,
           5 * product / backward * 1e-12, delta_s * 1e6, by_queries * 1e6, 3 * product / by_queries * 1e-12,
           by_keys * 1e6, 4 * product / by_keys * 1e-12);
    fflush(stdout);
}

} // namespace

int main(int argc, char** argv) {
    cudaDeviceProp device;
    check_cuda(cudaGetDeviceProperties(&device, 0), "find a GPU");
    printf("%s, compute capability %d.%d, %d SMs\n", device.name, device.major, device.minor, device.multiProcessorCount);
    fill_table();
    int wrong = test_wrappers();
    wrong += test_attention(argc > 1 ? atoi(argv[1]) : 3, argc > 2 ? argv[2] : "");
    for (u32 hd : {64u, 96u, 128u})
        for (u32 length : {512u, 2048u}) measure(hd, length, 16384 / length, 32, 8);
    measure(128, 128, 128, 32, 32);
    return wrong != 0;
}
