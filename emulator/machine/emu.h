// The CUDA names that the kernels use, defined on the host. `prelude.cuh` includes this file instead of
// defining them when the compiler is not a CUDA compiler.
//
// The threads of a block are fibers of one host thread. An operation of a whole warp (shuffles, mma, ldmatrix)
// is done for all lanes when the last lane calls it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;
typedef unsigned short bf16;
typedef uintptr_t SharedAddress;
struct alignas(16) Bytes16 {
    u32 x, y, z, w;
};
struct dim3 {
    u32 x = 1, y = 1, z = 1;
};

#ifdef EMU_SCAN // register_kernels.py reads these marks in the preprocessed text
#define __global__ EMU_GLOBAL
#define __launch_bounds__(...) EMU_BOUNDS(__VA_ARGS__)
#else
#define __global__ __attribute__((visibility("default")))
#define __launch_bounds__(...)
#endif
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define DEVICE __forceinline__
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define __constant__ static const
// The thread-local variables of the kernel library are contiguous, so that the machine can find them.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) unsigned char* name = emu::dynamic_shared()
#define FULL_WARP 0xffffffffu

namespace emu {

/// Operations that a warp executes when all its lanes have called them.
enum class Op { Shuffle, Ballot, SyncWarp, Mma, Ldmatrix, LdmatrixTrans };
struct Shuffle {
    u64 value;
    u32 from;
    u64 result;
};
struct Ballot {
    bool value;
    u32 result;
};
struct Mma {
    float* d;
    const u32* a;
    u32 b0, b1;
};
struct Ldmatrix {
    u32* r;
    const void* row;
};

unsigned char* dynamic_shared();
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
void warp_operation(Op op, u32 mask, void* payload, const char* file, int line);
void block_barrier(const char* file, int line);
void copy_async(void* to, const void* from, u32 bytes, bool valid, const char* file, int line);
void copy_commit();
void copy_wait(u32 pending);
Bytes16 load16(const void* p, const char* file, int line);
/// Whether the defect of this number is active (EMU_MUTANT); mutants/run.py inserts calls into the kernels.
bool mutant(u32 number);
void store16(void* p, Bytes16 v, const char* file, int line);

// ---- Kernels by name ----

typedef void (*Entry)(void** arguments);
/// `locals` touches the thread-local variables of the kernel's library, so that they exist in this thread.
void add_kernel(const char* name, Entry entry, const size_t* sizes, size_t count, u32 most_threads, void (*locals)());
template <auto F> struct Registration;
template <class... A, void (*F)(A...)> struct Registration<F> {
    template <size_t... I>
    __attribute__((no_sanitize("thread"))) static void call(void** p, std::integer_sequence<size_t, I...>) {
        F(*(A*)p[I]...);
    }
    __attribute__((no_sanitize("thread"))) static void entry(void** p) {
        call(p, std::make_index_sequence<sizeof...(A)>());
    }
    Registration(const char* name, u32 most_threads, void (*locals)()) {
        const size_t sizes[] = {sizeof(A)...};
        add_kernel(name, entry, sizes, sizeof...(A), most_threads, locals);
    }
};

} // namespace emu

#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
// Functions, so that the checks do not treat the machine's variables as device memory.
#define threadIdx emu::thread_index()
#define blockIdx emu::block_index()
#define blockDim emu::block_size()
#define gridDim emu::grid_size()

// ---- Warps and blocks ----

inline void __syncthreads(EMU_HERE) { emu::block_barrier(file, line); }
inline void __syncwarp(u32 mask = FULL_WARP, EMU_HERE) {
    emu::warp_operation(emu::Op::SyncWarp, mask, nullptr, file, line);
}
inline u32 __ballot_sync(u32 mask, bool value, EMU_HERE) {
    emu::Ballot b{value, 0};
    emu::warp_operation(emu::Op::Ballot, mask, &b, file, line);
    return b.result;
}
inline bool __any_sync(u32 mask, bool value, EMU_HERE) { return __ballot_sync(mask, value, file, line) != 0; }
inline bool __all_sync(u32 mask, bool value, EMU_HERE) { return __ballot_sync(mask, !value, file, line) == 0; }
template <class T> inline T emu_shuffle(u32 mask, T value, u32 from, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    emu::Shuffle s{0, from, 0};
    memcpy(&s.value, &value, sizeof(T));
    emu::warp_operation(emu::Op::Shuffle, mask, &s, file, line);
    memcpy(&value, &s.result, sizeof(T));
    return value;
}
template <class T> inline T __shfl_sync(u32 mask, T v, int from, EMU_HERE) {
    return emu_shuffle(mask, v, (u32)from & 31, file, line);
}
template <class T> inline T __shfl_xor_sync(u32 mask, T v, int x, EMU_HERE) {
    return emu_shuffle(mask, v, (threadIdx.x & 31) ^ (u32)x, file, line);
}
template <class T> inline T __shfl_down_sync(u32 mask, T v, u32 d, EMU_HERE) {
    const u32 lane = threadIdx.x & 31;
    return emu_shuffle(mask, v, lane + d < 32 ? lane + d : lane, file, line);
}
inline void mma_16816(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, EMU_HERE) {
    emu::Mma m{d, a, b0, b1};
    emu::warp_operation(emu::Op::Mma, FULL_WARP, &m, file, line);
}
inline void ldmatrix_x4(u32 (&r)[4], SharedAddress row, EMU_HERE) {
    emu::Ldmatrix l{r, (const void*)row};
    emu::warp_operation(emu::Op::Ldmatrix, FULL_WARP, &l, file, line);
}
inline void ldmatrix_x4_trans(u32 (&r)[4], SharedAddress row, EMU_HERE) {
    emu::Ldmatrix l{r, (const void*)row};
    emu::warp_operation(emu::Op::LdmatrixTrans, FULL_WARP, &l, file, line);
}

// ---- Memory ----

inline SharedAddress shared_address(const void* p) { return (SharedAddress)p; }
inline SharedAddress unknown(SharedAddress a) { return a; }
inline Bytes16 load16(const void* p, EMU_HERE) { return emu::load16(p, file, line); }
inline void store16(void* p, Bytes16 v, EMU_HERE) { emu::store16(p, v, file, line); }
inline void cp_async16(SharedAddress to, const void* from, bool valid, EMU_HERE) {
    emu::copy_async((void*)to, from, 16, valid, file, line);
}
inline void cp_async4(SharedAddress to, const void* from, bool valid, EMU_HERE) {
    emu::copy_async((void*)to, from, 4, valid, file, line);
}
inline void cp_async_commit() { emu::copy_commit(); }
template <int N> inline void cp_async_wait() { emu::copy_wait(N); }

// ---- Conversions and functions ----

inline u32 float_to_bits(float x) {
    u32 b;
    memcpy(&b, &x, 4);
    return b;
}
inline float bits_to_float(u32 x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline float bf16_to_float(bf16 x) { return bits_to_float((u32)x << 16); }
inline float bf16_low(u32 x) { return bits_to_float(x << 16); }
inline float bf16_high(u32 x) { return bits_to_float(x & 0xffff0000u); }
inline bf16 float_to_bf16(float x) {
    const u32 b = float_to_bits(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return 0x7fff; // the hardware converts every NaN to this
    return (bf16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
inline u32 pack_bf16(float low, float high) { return float_to_bf16(low) | (u32)float_to_bf16(high) << 16; }
// The approximations of the hardware are not reproduced bit for bit, but results below the normal range become
// zero as on the hardware.
inline float exp2_approx(float x) {
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}
inline float log2_approx(float x) { return log2f(x); }
inline float rsqrt_approx(float x) { return 1.0f / sqrtf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __clz(u32 x) { return x ? __builtin_clz(x) : 32; }
inline u32 __umulhi(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
