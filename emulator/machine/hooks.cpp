// The functions that g++ -fsanitize=thread calls at every access to memory, in place of its own library.
#include "machine.h"

using emu::check::Kind;
#define HERE (u64) __builtin_return_address(0)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
#define ACCESSES(bytes)                                                                                      \
    void __tsan_read##bytes(void* p) { emu::check::access(p, bytes, Kind::Read, nullptr, HERE); }             \
    void __tsan_write##bytes(void* p) { emu::check::access(p, bytes, Kind::Write, nullptr, HERE); }           \
    void __tsan_unaligned_read##bytes(void* p) { emu::check::access(p, bytes, Kind::Read, nullptr, HERE); }   \
    void __tsan_unaligned_write##bytes(void* p) { emu::check::access(p, bytes, Kind::Write, nullptr, HERE); } \
    void __tsan_read##bytes##_pc(void* p, void*) { emu::check::access(p, bytes, Kind::Read, nullptr, HERE); } \
    void __tsan_write##bytes##_pc(void* p, void*) { emu::check::access(p, bytes, Kind::Write, nullptr, HERE); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, unsigned long n) { emu::check::access(p, n, Kind::Read, nullptr, HERE); }
void __tsan_write_range(void* p, unsigned long n) { emu::check::access(p, n, Kind::Write, nullptr, HERE); }
void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
    emu::check::access(from, n, Kind::Read, nullptr, HERE);
    emu::check::access(to, n, Kind::Write, nullptr, HERE);
    return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, unsigned long n) {
    emu::check::access(to, n, Kind::Write, nullptr, HERE);
    return memset(to, value, n);
}
}
