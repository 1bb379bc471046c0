// The machine behind emu.h. Never compiled with instrumentation.
#include "machine.h"

#include <cstdio>
#include <cstdlib>
#include <link.h>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <unistd.h>

// ---- Fibers ---------------------------------------------------------------------------------------

// Saves the registers that a function must keep and the stack pointer, and continues on another stack.
extern "C" void emu_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "emu_switch is written for x86-64"
#endif

namespace emu {
namespace {

// Not a power of two, because stacks at such distances would map to few sets of the cache.
constexpr size_t STACK = (64 << 10) + 9 * 64;
constexpr size_t MOST_SHARED = 227 << 10; // of a block, on compute capability 9.0

enum class State { Ready, AtWarp, AtBarrier, Done };

struct Copy {
    void* to;
    const void* from;
    u32 bytes;
    bool valid;
    const char* file;
    int line;
};

struct Fiber {
    void* stack_pointer;
    dim3 index;
    u32 number;
    State state;
    const char* file; // the place where it waits
    int line;
    std::vector<Copy> open;                // cp.async since the last commit
    std::vector<std::vector<Copy>> groups; // committed, oldest first
};

/// A warp operation that waits for all lanes.
struct Warp {
    u32 arrived = 0, lanes = 0, epoch = 0, meetings = 0;
    Op op{};
    const char* file = nullptr;
    int line = 0;
    void* payload[32] = {};
};

struct Kernel {
    Entry entry;
    std::vector<size_t> sizes;
    u32 most_threads;
    void (*locals)();
};
std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

struct Machine {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned char* stacks = nullptr;
    size_t stacks_held = 0;
    std::vector<unsigned char> shared_storage;
    unsigned char* shared = nullptr;
    Fiber* current = nullptr; // null outside a kernel
    void* host_stack_pointer = nullptr;
    u32 at_barrier = 0, done = 0, barrier_epoch = 0, block_number = 0;
    const char* barrier_file = nullptr;
    int barrier_line = 0;
    dim3 block, block_dim, grid_dim;
    u64 random = 1;
    const Kernel* kernel = nullptr;
    std::string name;
    void** arguments = nullptr;
};
Machine machine;
Options chosen;

u32 draw(u32 below) {
    u64& r = machine.random;
    r ^= r << 13, r ^= r >> 7, r ^= r << 17;
    return (u32)(r >> 33) % below;
}

/// Continues with another thread that is not blocked: the next one, or a random one.
void leave() {
    Machine& m = machine;
    Fiber* const from = m.current;
    const u32 n = m.fibers.size(), start = chosen.seed ? draw(n) : from->number + 1;
    Fiber* next = nullptr;
    for (u32 i = 0; i < n && !next; i++) {
        u32 at = start + i;
        while (at >= n) at -= n;
        if (m.fibers[at].state == State::Ready) next = &m.fibers[at];
    }
    if (!next && m.done == n) {
        void* unused;
        emu_switch(&unused, m.host_stack_pointer);
    }
    if (!next) {
        std::map<std::string, int> where;
        for (auto& f : m.fibers)
            where[f.state == State::Done ? "ended" : std::string(f.file) + ":" + std::to_string(f.line)]++;
        std::string text = "deadlock, no thread can continue:";
        for (auto& [at, count] : where) text += "\n    " + std::to_string(count) + " threads: " + at;
        fail(text);
    }
    if (next == from) return;
    m.current = next;
    emu_switch(&from->stack_pointer, next->stack_pointer);
}

void run_thread() {
    Machine& m = machine;
    m.kernel->entry(m.arguments);
    Fiber& f = *m.current;
    if (!f.open.empty() || !f.groups.empty())
        for (auto& group : f.groups)
            if (!group.empty()) fail("a thread ends before its cp.async copies have arrived");
    if (!f.open.empty()) fail("a thread ends before its cp.async copies have arrived");
    if (m.warps[f.number / 32].arrived) fail("a lane ends while others of its warp wait for it");
    f.state = State::Done;
    m.done++;
    m.warps[f.number / 32].lanes &= ~(1u << f.number % 32);
    if (m.at_barrier && m.at_barrier + m.done == m.fibers.size())
        fail("threads end while others wait at __syncthreads");
    leave();
    abort();
}

// ---- Operations of a whole warp --------------------------------------------------------------------

void mma(void** payload) {
    alignas(32) float a[16][16], b[16][8], d[16][8];
    for (u32 lane = 0; lane < 32; lane++) {
        const Mma& p = *(Mma*)payload[lane];
        const u32 g = lane / 4, t = lane % 4 * 2;
        for (u32 i = 0; i < 4; i++) { // i % 2: rows g or g + 8; i / 2: columns t or t + 8
            a[g + i % 2 * 8][t + i / 2 * 8] = bf16_low(p.a[i]);
            a[g + i % 2 * 8][t + i / 2 * 8 + 1] = bf16_high(p.a[i]);
            d[g + i / 2 * 8][t + i % 2] = p.d[i];
        }
        b[t][g] = bf16_low(p.b0), b[t + 1][g] = bf16_high(p.b0);
        b[t + 8][g] = bf16_low(p.b1), b[t + 9][g] = bf16_high(p.b1);
    }
    typedef float Row __attribute__((vector_size(32)));
    for (u32 i = 0; i < 16; i++) {
        Row sum = *(Row*)d[i];
        for (u32 k = 0; k < 16; k++) sum += a[i][k] * *(Row*)b[k];
        *(Row*)d[i] = sum;
    }
    for (u32 lane = 0; lane < 32; lane++) {
        const Mma& p = *(Mma*)payload[lane];
        const u32 g = lane / 4, t = lane % 4 * 2;
        for (u32 i = 0; i < 4; i++) p.d[i] = d[g + i / 2 * 8][t + i % 2];
    }
}

void ldmatrix(void** payload, bool transposed) {
    u16 matrices[4][8][8];
    for (u32 lane = 0; lane < 32; lane++) {
        const Ldmatrix& p = *(Ldmatrix*)payload[lane];
        memcpy(matrices[lane / 8][lane % 8], p.row, 16);
    }
    for (u32 lane = 0; lane < 32; lane++)
        for (u32 i = 0; i < 4; i++) {
            const u32 g = lane / 4, t = lane % 4 * 2;
            const u16 low = transposed ? matrices[i][t][g] : matrices[i][g][t];
            const u16 high = transposed ? matrices[i][t + 1][g] : matrices[i][g][t + 1];
            ((Ldmatrix*)payload[lane])->r[i] = low | (u32)high << 16;
        }
}

void shuffle(void** payload, u32 mask) {
    for (u32 lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        Shuffle& s = *(Shuffle*)payload[lane];
        if (!(mask >> s.from & 1)) fail("a shuffle reads from a lane that does not take part");
        s.result = ((Shuffle*)payload[s.from])->value;
    }
}

void ballot(void** payload, u32 mask) {
    u32 result = 0;
    for (u32 lane = 0; lane < 32; lane++)
        if (mask >> lane & 1 && ((Ballot*)payload[lane])->value) result |= 1u << lane;
    for (u32 lane = 0; lane < 32; lane++)
        if (mask >> lane & 1) ((Ballot*)payload[lane])->result = result;
}

} // namespace

void warp_operation(Op op, u32 mask, void* payload, const char* file, int line) {
    Machine& m = machine;
    Fiber& f = *m.current;
    const u32 lane = f.number % 32;
    Warp& w = m.warps[f.number / 32];
    // The kernels use the mask of all lanes. A missing lane (the block's last warp is not full, or
    // the lane has returned) would be an error on the device too, except for a shorter last warp.
    if (mask != FULL_WARP) fail("a warp operation with a mask other than all lanes");
    if (op == Op::Mma || op == Op::Ldmatrix || op == Op::LdmatrixTrans)
        if (w.lanes != FULL_WARP) fail("mma or ldmatrix by a warp with missing lanes");
    if (op == Op::Ldmatrix || op == Op::LdmatrixTrans) {
        const void* row = ((Ldmatrix*)payload)->row;
        if ((uintptr_t)row % 16) fail("ldmatrix: the address of a row is not a multiple of 16");
        check::access(row, 16, check::Kind::Read, file, line);
    }
    if (!w.arrived) {
        w.op = op, w.file = file, w.line = line;
    } else if (w.op != op || w.line != line || strcmp(w.file, file)) {
        fail(std::string("lanes of a warp meet at different places: ") + w.file + ":" + std::to_string(w.line) +
             " and " + file + ":" + std::to_string(line));
    }
    w.arrived |= 1u << lane;
    w.payload[lane] = payload;
    if (w.arrived != w.lanes) {
        f.state = State::AtWarp, f.file = file, f.line = line;
        leave();
        return;
    }
    switch (op) {
    case Op::Shuffle: shuffle(w.payload, w.lanes); break;
    case Op::Ballot: ballot(w.payload, w.lanes); break;
    case Op::SyncWarp: w.epoch++; break;
    case Op::Mma: mma(w.payload); break;
    case Op::Ldmatrix: ldmatrix(w.payload, false); break;
    case Op::LdmatrixTrans: ldmatrix(w.payload, true); break;
    }
    w.arrived = 0;
    w.meetings++;
    const u32 first = f.number / 32 * 32;
    for (u32 i = first; i < first + 32 && i < m.fibers.size(); i++)
        if (m.fibers[i].state == State::AtWarp) m.fibers[i].state = State::Ready;
    if (chosen.seed) leave();
}

void block_barrier(const char* file, int line) {
    Machine& m = machine;
    Fiber& f = *m.current;
    if (m.done) fail("__syncthreads after threads of the block have ended");
    if (m.at_barrier && (m.barrier_line != line || strcmp(m.barrier_file, file)))
        fail("threads of a block meet at different __syncthreads");
    m.barrier_file = file, m.barrier_line = line;
    if (++m.at_barrier < m.fibers.size()) {
        f.state = State::AtBarrier, f.file = file, f.line = line;
        leave();
        return;
    }
    m.at_barrier = 0;
    m.barrier_epoch++;
    for (auto& w : m.warps) w.meetings++;
    for (auto& other : m.fibers) other.state = State::Ready;
    if (chosen.seed) leave();
}

// ---- Asynchronous copies: they arrive when a thread waits for them, not before --------------------

void copy_async(void* to, const void* from, u32 bytes, bool valid, const char* file, int line) {
    if ((uintptr_t)to % bytes || (uintptr_t)from % bytes) fail("cp.async: an address is not aligned to the size");
    check::access(to, bytes, check::Kind::AsyncStart, file, line);
    if (valid) check::access(from, bytes, check::Kind::Read, file, line);
    memset(to, 0xff, bytes); // NaN: until the copy completes, neither the old nor the new contents are valid
    machine.current->open.push_back({to, from, bytes, valid, file, line});
}
void copy_commit() {
    Fiber& f = *machine.current;
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
void copy_wait(u32 pending) {
    Fiber& f = *machine.current;
    while (f.groups.size() > pending) {
        for (const Copy& c : f.groups.front()) {
            if (c.valid) memcpy(c.to, c.from, c.bytes);
            else memset(c.to, 0, c.bytes);
            check::access(c.to, c.bytes, check::Kind::AsyncEnd, c.file, c.line);
        }
        f.groups.erase(f.groups.begin());
    }
}

Bytes16 load16(const void* p, const char* file, int line) {
    if ((uintptr_t)p % 16) fail(std::string("load16: the address is not a multiple of 16, ") + file + ":" + std::to_string(line));
    check::access(p, 16, check::Kind::Read, file, line);
    Bytes16 v;
    memcpy(&v, p, 16);
    return v;
}
void store16(void* p, Bytes16 v, const char* file, int line) {
    if ((uintptr_t)p % 16) fail(std::string("store16: the address is not a multiple of 16, ") + file + ":" + std::to_string(line));
    check::access(p, 16, check::Kind::Write, file, line);
    memcpy(p, &v, 16);
}

bool mutant(u32 number) {
    static const u32 active = getenv("EMU_MUTANT") ? (u32)atoi(getenv("EMU_MUTANT")) : 0;
    return active == number;
}

// ---- Launches -------------------------------------------------------------------------------------

unsigned char* dynamic_shared() { return machine.shared; }
dim3 thread_index() { return machine.current->index; }
dim3 block_index() { return machine.block; }
dim3 block_size() { return machine.block_dim; }
dim3 grid_size() { return machine.grid_dim; }
Options& options() { return chosen; }
bool in_kernel() { return machine.current != nullptr; }
Place place() {
    const Machine& m = machine;
    const u32 n = m.current->number;
    const Warp& w = m.warps[n / 32];
    return {m.block_number, n, m.barrier_epoch, w.epoch, w.meetings};
}
bool on_a_stack(const void* p) {
    return p >= machine.stacks && p < machine.stacks + machine.stacks_held * STACK;
}
void fail(const std::string& what) {
    const Machine& m = machine;
    fprintf(stderr, "emulator: %s\n", what.c_str());
    if (!m.name.empty())
        fprintf(stderr, "    kernel %s, block (%u, %u, %u)", m.name.c_str(), m.block.x, m.block.y, m.block.z);
    if (m.current) fprintf(stderr, ", thread %u", m.current->number);
    fprintf(stderr, "\n");
    fflush(nullptr);
    _exit(101);
}

void add_kernel(const char* name, Entry entry, const size_t* sizes, size_t count, u32 most_threads, void (*locals)()) {
    kernels()[name] = {entry, {sizes, sizes + count}, most_threads, locals};
}
bool has_kernel(const std::string& name) { return kernels().count(name); }
const std::vector<size_t>& argument_sizes(const std::string& name) { return kernels().at(name).sizes; }

namespace {

/// The library that contains a function: its address, and the thread-local variables of this thread.
struct Library {
    const void* inside;
    const unsigned char* begin = nullptr;
    const unsigned char* end = nullptr;
    unsigned char* locals = nullptr;
    size_t locals_bytes = 0;
};
int inspect(dl_phdr_info* info, size_t, void* into) {
    Library& l = *(Library*)into;
    Library found{l.inside};
    bool holds = false;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& header = info->dlpi_phdr[i];
        const auto* at = (const unsigned char*)info->dlpi_addr + header.p_vaddr;
        if (header.p_type == PT_LOAD) {
            holds |= l.inside >= at && l.inside < at + header.p_memsz;
            if (!found.begin || at < found.begin) found.begin = at;
            if (at + header.p_memsz > found.end) found.end = at + header.p_memsz;
        }
        if (header.p_type == PT_TLS) {
            found.locals = (unsigned char*)info->dlpi_tls_data;
            found.locals_bytes = header.p_memsz;
        }
    }
    if (holds) l = found;
    return holds;
}

void run_block(u32 number, u32 threads, size_t shared_bytes, const Library& library) {
    Machine& m = machine;
    m.block = {number % m.grid_dim.x, number / m.grid_dim.x % m.grid_dim.y, number / m.grid_dim.x / m.grid_dim.y};
    m.block_number = number;
    m.at_barrier = m.done = m.barrier_epoch = 0;
    memset(m.shared, 0xff, shared_bytes); // NaN
    if (library.locals) memset(library.locals, 0xff, library.locals_bytes);
    check::begin_block(m.shared, shared_bytes, library.locals, library.locals_bytes);
    m.warps.assign((threads + 31) / 32, {});
    m.fibers.resize(threads);
    for (u32 t = 0; t < threads; t++) {
        Fiber& f = m.fibers[t];
        f.index = {t % m.block_dim.x, t / m.block_dim.x % m.block_dim.y, t / m.block_dim.x / m.block_dim.y};
        f.number = t;
        f.state = State::Ready;
        f.open.clear(), f.groups.clear();
        m.warps[t / 32].lanes |= 1u << t % 32;
        void** top = (void**)(m.stacks + (t + 1) * STACK);
        *--top = nullptr; // a function starts with its stack pointer 8 off a multiple of 16
        *--top = (void*)run_thread;
        for (int i = 0; i < 6; i++) *--top = nullptr;
        f.stack_pointer = top;
    }
    m.current = &m.fibers[chosen.seed ? draw(threads) : 0];
    emu_switch(&m.host_stack_pointer, m.current->stack_pointer);
    m.current = nullptr;
}

} // namespace

void launch(const std::string& name, dim3 grid, dim3 block, size_t shared_bytes, void** arguments) {
    static std::mutex one_at_a_time;
    std::lock_guard lock(one_at_a_time);
    Machine& m = machine;
    m.name = name;
    const auto found = kernels().find(name);
    if (found == kernels().end()) fail("there is no such kernel");
    const u64 threads = (u64)block.x * block.y * block.z, blocks = (u64)grid.x * grid.y * grid.z;
    if (threads == 0 || threads > 1024 || threads > found->second.most_threads)
        fail("a block of " + std::to_string(threads) + " threads, where the kernel allows " +
             std::to_string(found->second.most_threads));
    if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) fail("a grid of this size");
    m.kernel = &found->second, m.arguments = arguments;
    m.block_dim = block, m.grid_dim = grid;
    m.random = 0x9e3779b97f4a7c15ull * (chosen.seed + 1);
    if (m.stacks_held < threads) {
        if (m.stacks) munmap(m.stacks, m.stacks_held * STACK);
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        m.stacks = (unsigned char*)mmap(nullptr, threads * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
        if (m.stacks == MAP_FAILED) fail("no memory for the stacks of a block");
        m.stacks_held = threads;
    }
    // An odd multiple of the 1024 bytes that the prelude declares, so that the alignment is not larger by chance.
    m.shared_storage.resize(shared_bytes + 3072);
    m.shared = (unsigned char*)(((uintptr_t)m.shared_storage.data() + 2047) / 2048 * 2048 + 1024);
    Library library{(const void*)found->second.entry};
    found->second.locals();
    dl_iterate_phdr(inspect, &library);
    if (shared_bytes + library.locals_bytes / 16 > MOST_SHARED) fail("more shared memory than a block can have");
    check::begin_launch(name, library.begin, library.end - library.begin);
    for (u32 i = 0, n = (u32)blocks; i < n; i++) {
        // A random order of blocks: steps of an odd size modulo a power of two visit every block without a list.
        u32 number = i;
        if (chosen.seed) {
            static u32 at, step, range;
            if (i == 0) {
                range = 1;
                while (range < n) range *= 2;
                at = draw(range), step = draw(range) | 1;
            }
            do at = (at + step) % range;
            while (at >= n);
            number = at;
        }
        run_block(number, (u32)threads, shared_bytes, library);
    }
    check::end_launch();
    m.name.clear();
}

} // namespace emu
