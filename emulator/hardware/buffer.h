// Memory and launches of a GPU, for the tests that also run in the emulator (tests/buffer.h).
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <vector>

#include <cuda_runtime.h>

inline void check_cuda(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    fprintf(stderr, "cannot %s: %s\n", doing, cudaGetErrorString(error));
    exit(1);
}

/// Memory that host and device share, filled with NaN.
template <class T> class Buffer {
  public:
    explicit Buffer(size_t count, bool = false) : count(count) {
        check_cuda(cudaMallocManaged((void**)&data, count * sizeof(T) + 256), "allocate");
        memset((void*)data, 0xff, count * sizeof(T));
    }
    Buffer(const std::vector<T>& values) : Buffer(values.size()) {
        std::copy(values.begin(), values.end(), data);
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() { cudaFree(data); }
    T& operator[](size_t i) { return data[i]; }
    const T& operator[](size_t i) const { return data[i]; }

    T* data;
    size_t count;
};

/// The kernels by name; hardware/attention.cu adds them.
inline std::map<std::string, const void*>& kernel_table() {
    static std::map<std::string, const void*> table;
    return table;
}

/// Enqueues a kernel that takes one structure.
template <class A> void start(const std::string& name, dim3 grid, u32 threads, size_t shared_bytes, A argument) {
    const auto found = kernel_table().find(name);
    if (found == kernel_table().end()) {
        fprintf(stderr, "there is no kernel %s\n", name.c_str());
        exit(1);
    }
    const auto limit = cudaFuncAttributeMaxDynamicSharedMemorySize;
    check_cuda(cudaFuncSetAttribute(found->second, limit, (int)shared_bytes), "set the size of shared memory");
    void* arguments[] = {&argument};
    check_cuda(cudaLaunchKernel(found->second, grid, dim3{threads, 1, 1}, arguments, shared_bytes, 0), name.c_str());
}
/// Runs a kernel to its end.
template <class A> void launch(const std::string& name, dim3 grid, u32 threads, size_t shared_bytes, A argument) {
    start(name, grid, threads, shared_bytes, argument);
    check_cuda(cudaDeviceSynchronize(), name.c_str());
}
/// The device determines the order.
inline void draw_order(u32) {}
