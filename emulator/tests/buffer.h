// Memory and launches of the emulated device. hardware/buffer.h is the same for a GPU.
#pragma once
#include "machine.h"

#include <algorithm>
#include <cstdlib>

/// Device memory of exactly `count` elements, filled with NaN, with a gap to the next buffer.
template <class T> class Buffer {
  public:
    explicit Buffer(size_t count, bool written = false) : count(count) {
        const size_t bytes = count * sizeof(T);
        data = (T*)aligned_alloc(256, (bytes + 511) / 256 * 256);
        memset((void*)data, 0xff, (bytes + 511) / 256 * 256);
        emu::check::add_memory(data, bytes, written);
    }
    Buffer(const std::vector<T>& values) : Buffer(values.size(), true) {
        std::copy(values.begin(), values.end(), data);
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        emu::check::remove_memory(data);
        free(data);
    }
    T& operator[](size_t i) { return data[i]; }
    const T& operator[](size_t i) const { return data[i]; }

    T* data;
    size_t count;
};

/// Runs a kernel that takes one structure.
template <class A> void launch(const std::string& name, dim3 grid, u32 threads, size_t shared_bytes, A argument) {
    void* arguments[] = {&argument};
    emu::launch(name, grid, {threads, 1, 1}, shared_bytes, arguments);
}
inline void draw_order(u32 seed) { emu::options().seed = seed; }
/// Prints the places that exceed the limits on bank conflicts and traffic, and returns their number. Exempt are the
/// plain kernels, which are for tests and unusual head sizes, and the search for a sequence, whose candidates are
/// not contiguous.
inline int check_traffic() {
    return emu::check::report(2.0, 1.3, getenv("EMU_REPORT") != nullptr, {"_plain_", "find_sequence"});
}
