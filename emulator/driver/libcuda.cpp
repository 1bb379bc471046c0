// A stub of libcuda.so.1 whose device is the emulator: the functions of the driver that llara calls, with the driver's
// types written out, so that no NVIDIA header is needed.
//
// Work stays in its stream until the host waits for it, which is as late as the driver may run it, so that missing
// synchronization is detected. With a seed, a random part of the waiting work runs at each call. Environment variables:
//     EMU_SEED=N          seed of a random order of threads and blocks; 0 or unset: in order
//     EMU_EAGER=1         runs work when it is enqueued, which is as early as the driver may run it
//     EMU_CAPABILITY=9.0  the compute capability that the device has
//     EMU_MEMORY=BYTES    the memory that the device has, 8 GiB if not given
//     EMU_REPORT=1        prints bank conflicts and memory traffic at the end (build with checks)
//     EMU_LIMITS=FILE     compares them with the limits and with the exceptions of FILE; exit code 103 if one fails
//     EMU_COVERAGE=1      prints the kernels that were loaded and never launched; exit code 103 if there are any
//     EMU_LOG=FILE        writes a line for each launch, product, copy and fill
//     EMU_DRY=1           executes nothing; for logs of models that are too large to be computed
#include "driver.h"
#include "record.h"

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sys/mman.h>
#include <unistd.h>

namespace {

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
};
enum DeviceAttribute {
    MULTIPROCESSOR_COUNT = 16,
    WARP_SIZE = 10,
    CAPABILITY_MAJOR = 75,
    CAPABILITY_MINOR = 76,
    SHARED_MEMORY_OPTIN = 97,
    VIRTUAL_ADDRESS_MANAGEMENT = 102,
    MEMORY_POOLS = 115,
};
constexpr int FUNCTION_MAX_DYNAMIC_SHARED = 8;
constexpr size_t GRANULARITY = 2 << 20;

typedef std::function<void()> Work;
struct Stream {
    std::deque<Work> work;
    u64 enqueued = 0, done = 0; // number of operations
};
struct Event {
    Stream* stream = nullptr;
    u64 number = 0; // reached when the stream has completed this many operations
};
struct Module {
    std::string image;
};
struct Function {
    std::string name;
    int dynamic_shared = 48 << 10;
};
struct Block { // of device memory
    size_t bytes;
};
struct Pinned {
    size_t bytes;
    int uses; // copies that have not run
};

std::recursive_mutex everything;
#define LOCK std::lock_guard<std::recursive_mutex> lock(everything)

bool initialized;
Stream* const default_stream = new Stream;
std::set<Stream*> streams{default_stream};
std::map<u64, Block> memory;   // by first address
std::map<u64, Pinned> pinned;  // by first address
std::map<u64, size_t> created; // handles of physical memory
std::map<u64, size_t> reserved;
size_t used;
u64 next_handle = 1;
char the_context, the_pool;
thread_local void* current;

size_t total_memory() {
    static const size_t bytes = getenv("EMU_MEMORY") ? strtoull(getenv("EMU_MEMORY"), nullptr, 10) : 8ull << 30;
    return bytes;
}
int capability() { // 90 for 9.0
    const char* text = getenv("EMU_CAPABILITY");
    return text ? (int)(atof(text) * 10 + 0.5) : 90;
}
bool eager() {
    static const bool yes = getenv("EMU_EAGER") != nullptr;
    return yes;
}

void run_until(Stream* s, u64 number) {
    while (s->done < number) {
        Work work = std::move(s->work.front());
        s->work.pop_front();
        work();
        s->done++;
    }
}
Stream* stream_of(void* handle) { return (uintptr_t)handle > 2 ? (Stream*)handle : default_stream; }

/// How much of the waiting work of a stream runs now.
u64 progress(const Stream* s) {
    const u64 waiting = s->enqueued - s->done;
    if (eager()) return waiting;
    if (!emu::options().seed) return 0;
    static u64 random = 0x9e3779b97f4a7c15ull * (emu::options().seed + 1);
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return random >> 33 & 7 ? 0 : (random >> 40) % (waiting + 1);
}
Result enqueue(void* handle, Work work) {
    LOCK;
    Stream* s = stream_of(handle);
    if (!current) return INVALID_CONTEXT;
    if (!streams.count(s)) return INVALID_HANDLE;
    s->work.push_back(std::move(work));
    s->enqueued++;
    run_until(s, s->done + progress(s));
    return SUCCESS;
}

template <class T> typename std::map<u64, T>::iterator block_with(std::map<u64, T>& blocks, u64 address) {
    auto i = blocks.upper_bound(address);
    if (i == blocks.begin()) return blocks.end();
    --i;
    return address < i->first + i->second.bytes ? i : blocks.end();
}
/// Aborts unless these bytes are device memory. They may span adjacent mapped blocks.
void require_device(u64 address, size_t bytes, const char* what) {
    for (u64 at = address; at < address + bytes;) {
        const auto i = block_with(memory, at);
        if (i == memory.end()) emu::fail(std::string(what) + " outside the memory of the device");
        at = i->first + i->second.bytes;
    }
}

Result take(u64* pointer, size_t bytes) {
    LOCK;
    if (!current) return INVALID_CONTEXT;
    if (!bytes) return INVALID_VALUE;
    if (used + bytes > total_memory()) return OUT_OF_MEMORY;
    const size_t room = (bytes + 511) / 256 * 256; // a gap, so that an access past the end finds no other block
    void* at = aligned_alloc(256, room);
    if (!at) return OUT_OF_MEMORY;
    if (!emu::record::dry()) memset(at, 0xff, room); // NaN
    *pointer = (u64)at;
    memory[*pointer] = {bytes};
    used += bytes;
    emu::check::add_memory(at, bytes, false);
    return SUCCESS;
}
void give_back(u64 pointer) {
    const auto i = memory.find(pointer);
    if (i == memory.end()) emu::fail("device memory is freed that was not allocated, or twice");
    used -= i->second.bytes;
    memory.erase(i);
    emu::check::remove_memory((void*)pointer);
    free((void*)pointer);
}

/// The architecture of a cubin, such as 90 for sm_90; 0 if this is not a cubin.
int target_of(const std::string& image) {
    if (image.compare(0, 4, "\177ELF") != 0) return 0;
    u32 flags;
    memcpy(&flags, image.data() + 48, 4);
    const int low = flags & 0xff, high = flags >> 8 & 0xff; // before CUDA 13, and since
    return low >= 80 && low <= 130 ? low : high;
}

struct AtExit {
    ~AtExit() {
        if (emu::record::finish()) return;
        fflush(nullptr);
        _exit(103);
    }
} at_exit;

} // namespace

// ---- For libcublasLt ------------------------------------------------------------------------------

namespace emu::driver {
int enqueue(void* stream, std::function<void()> work) { return ::enqueue(stream, std::move(work)); }
void require_device(const void* p, size_t bytes, const char* what) { ::require_device((u64)p, bytes, what); }
} // namespace emu::driver

// ---- Devices and contexts -------------------------------------------------------------------------

API cuInit(unsigned) {
    initialized = true;
    if (const char* seed = getenv("EMU_SEED")) emu::options().seed = strtoull(seed, nullptr, 10);
    return SUCCESS;
}
API cuDriverGetVersion(int* version) {
    *version = 13000;
    return SUCCESS;
}
API cuDeviceGetCount(int* count) {
    if (!initialized) return NOT_INITIALIZED;
    *count = 1;
    return SUCCESS;
}
API cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal ? INVALID_DEVICE : SUCCESS;
}
API cuDeviceGetName(char* name, int size, int) {
    snprintf(name, size, "emulated device");
    return SUCCESS;
}
API cuDeviceTotalMem_v2(size_t* bytes, int) {
    *bytes = total_memory();
    return SUCCESS;
}
API cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
    case CAPABILITY_MAJOR: *value = capability() / 10; break;
    case CAPABILITY_MINOR: *value = capability() % 10; break;
    case MULTIPROCESSOR_COUNT: *value = 132; break;
    case WARP_SIZE: *value = 32; break;
    case SHARED_MEMORY_OPTIN: *value = 227 << 10; break;
    case VIRTUAL_ADDRESS_MANAGEMENT:
    case MEMORY_POOLS: *value = 1; break;
    default: *value = 0;
    }
    return SUCCESS;
}
API cuDevicePrimaryCtxRetain(void** context, int) {
    *context = &the_context;
    return SUCCESS;
}
API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void* context) {
    current = context;
    return SUCCESS;
}
API cuCtxGetCurrent(void** context) {
    *context = current;
    return SUCCESS;
}
API cuCtxSynchronize() {
    LOCK;
    for (Stream* s : streams) run_until(s, s->enqueued);
    return SUCCESS;
}
API cuGetErrorName(int error, const char** name) {
    static thread_local char text[32];
    snprintf(text, sizeof text, "CUDA error %d", error);
    *name = text;
    return SUCCESS;
}
API cuGetErrorString(int error, const char** name) { return cuGetErrorName(error, name); }
// NVRTC requests tables from a loaded driver, but does not need them.
API cuGetExportTable(const void** table, const void*) {
    *table = nullptr;
    return NOT_FOUND;
}

// ---- Streams and events ---------------------------------------------------------------------------

API cuStreamCreate(void** stream, unsigned) {
    LOCK;
    if (!current) return INVALID_CONTEXT;
    Stream* s = new Stream;
    streams.insert(s);
    *stream = s;
    return SUCCESS;
}
API cuStreamDestroy_v2(void* stream) {
    LOCK;
    Stream* s = stream_of(stream);
    if (!streams.count(s)) return INVALID_HANDLE;
    run_until(s, s->enqueued);
    streams.erase(s);
    return SUCCESS;
}
API cuStreamSynchronize(void* stream) {
    LOCK;
    Stream* s = stream_of(stream);
    if (!streams.count(s)) return INVALID_HANDLE;
    run_until(s, s->enqueued);
    return SUCCESS;
}
API cuStreamWaitEvent(void* stream, void* event, unsigned) {
    LOCK;
    const Event e = *(Event*)event;
    return enqueue(stream, [e] {
        if (e.stream && streams.count(e.stream)) run_until(e.stream, e.number);
    });
}
API cuEventCreate(void** event, unsigned) {
    *event = new Event;
    return SUCCESS;
}
API cuEventDestroy_v2(void* event) {
    delete (Event*)event;
    return SUCCESS;
}
API cuEventRecord(void* event, void* stream) {
    LOCK;
    Stream* s = stream_of(stream);
    if (!streams.count(s)) return INVALID_HANDLE;
    *(Event*)event = {s, s->enqueued};
    return SUCCESS;
}
API cuEventSynchronize(void* event) {
    LOCK;
    const Event& e = *(Event*)event;
    if (e.stream && streams.count(e.stream)) run_until(e.stream, e.number);
    return SUCCESS;
}
API cuEventQuery(void* event) {
    LOCK;
    const Event& e = *(Event*)event;
    if (!e.stream || !streams.count(e.stream) || e.stream->done >= e.number) return SUCCESS;
    run_until(e.stream, e.stream->done + 1); // so that a polling loop ends
    return NOT_READY;
}

// ---- Memory ---------------------------------------------------------------------------------------

API cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
    LOCK;
    *total = total_memory();
    *free_bytes = *total - used;
    return SUCCESS;
}
API cuMemAlloc_v2(u64* pointer, size_t bytes) { return take(pointer, bytes); }
API cuMemFree_v2(u64 pointer) {
    cuCtxSynchronize();
    LOCK;
    give_back(pointer);
    return SUCCESS;
}
API cuMemAllocAsync(u64* pointer, size_t bytes, void*) { return take(pointer, bytes); }
API cuMemFreeAsync(u64 pointer, void* stream) {
    LOCK;
    const Stream* s = stream_of(stream);
    const bool idle = streams.count(stream_of(stream)) && s->done == s->enqueued;
    const Result result = enqueue(stream, [pointer] { give_back(pointer); });
    // An idle stream does it at once, also if work that uses the memory waits in another one.
    if (!result && idle) run_until(stream_of(stream), s->enqueued);
    return result;
}
API cuDeviceGetDefaultMemPool(void** pool, int) {
    *pool = &the_pool;
    return SUCCESS;
}
API cuMemPoolSetAttribute(void*, int, void*) { return SUCCESS; }

API cuMemGetAllocationGranularity(size_t* bytes, const void*, int) {
    *bytes = GRANULARITY;
    return SUCCESS;
}
API cuMemAddressReserve(u64* pointer, size_t bytes, size_t, u64, u64) {
    LOCK;
    if (!bytes || bytes % GRANULARITY) return INVALID_VALUE;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char* at = (char*)mmap(nullptr, bytes + GRANULARITY, PROT_NONE, flags, -1, 0);
    if (at == MAP_FAILED) return OUT_OF_MEMORY;
    const u64 aligned = ((u64)at + GRANULARITY - 1) / GRANULARITY * GRANULARITY;
    munmap(at, aligned - (u64)at);
    munmap((void*)(aligned + bytes), (u64)at + GRANULARITY - aligned);
    reserved[*pointer = aligned] = bytes;
    return SUCCESS;
}
API cuMemAddressFree(u64 pointer, size_t bytes) {
    LOCK;
    if (!reserved.count(pointer) || reserved[pointer] != bytes) return INVALID_VALUE;
    if (memory.lower_bound(pointer) != memory.lower_bound(pointer + bytes)) return INVALID_VALUE; // still mapped
    munmap((void*)pointer, bytes);
    reserved.erase(pointer);
    return SUCCESS;
}
API cuMemCreate(u64* handle, size_t bytes, const void*, u64) {
    LOCK;
    if (!bytes || bytes % GRANULARITY) return INVALID_VALUE;
    if (used + bytes > total_memory()) return OUT_OF_MEMORY;
    used += bytes;
    created[*handle = next_handle++] = bytes;
    return SUCCESS;
}
API cuMemRelease(u64 handle) {
    LOCK;
    if (!created.count(handle)) return INVALID_VALUE;
    used -= created[handle];
    created.erase(handle);
    return SUCCESS;
}
API cuMemMap(u64 pointer, size_t bytes, size_t offset, u64 handle, u64) {
    LOCK;
    if (!created.count(handle) || offset || created[handle] != bytes) return INVALID_VALUE;
    const auto range = reserved.upper_bound(pointer);
    if (range == reserved.begin()) return INVALID_VALUE;
    const auto& [first, size] = *std::prev(range);
    if (pointer + bytes > first + size || block_with(memory, pointer) != memory.end()) return INVALID_VALUE;
    memory[pointer] = {bytes};
    return SUCCESS;
}
API cuMemSetAccess(u64 pointer, size_t bytes, const void*, size_t) {
    LOCK;
    if (!memory.count(pointer) || memory[pointer].bytes != bytes) return INVALID_VALUE;
    mprotect((void*)pointer, bytes, PROT_READ | PROT_WRITE);
    if (!emu::record::dry()) memset((void*)pointer, 0xff, bytes); // NaN
    emu::check::add_memory((void*)pointer, bytes, false);
    return SUCCESS;
}
API cuMemUnmap(u64 pointer, size_t bytes) {
    LOCK;
    if (!memory.count(pointer) || memory[pointer].bytes != bytes) return INVALID_VALUE;
    for (Stream* s : streams)
        if (s->done < s->enqueued) emu::fail("memory is unmapped while work waits in a stream");
    emu::check::remove_memory((void*)pointer);
    madvise((void*)pointer, bytes, MADV_DONTNEED);
    mprotect((void*)pointer, bytes, PROT_NONE);
    memory.erase(pointer);
    return SUCCESS;
}

API cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    LOCK;
    if (!current) return INVALID_CONTEXT;
    *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    pinned[(u64)*pointer] = {bytes, 0};
    return SUCCESS;
}
API cuMemFreeHost(void* pointer) {
    LOCK;
    const auto i = pinned.find((u64)pointer);
    if (i == pinned.end()) return INVALID_VALUE;
    if (i->second.uses) emu::fail("pinned memory is freed before the copies that use it have run");
    pinned.erase(i);
    free(pointer);
    return SUCCESS;
}

// Pinned memory is read and written when the copy runs; other memory before the call returns.
API cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, void* stream) {
    LOCK;
    emu::record::log("upload %zu", bytes);
    if (emu::record::dry()) return SUCCESS;
    auto run = [to, bytes](const void* from) {
        require_device(to, bytes, "a copy to the device");
        memcpy((void*)to, from, bytes);
        emu::check::mark_written((void*)to, bytes);
    };
    const auto block = block_with(pinned, (u64)from);
    if (block == pinned.end()) {
        auto copy = std::make_shared<std::string>((const char*)from, bytes);
        return enqueue(stream, [=] { run(copy->data()); });
    }
    const u64 key = block->first;
    block->second.uses++;
    return enqueue(stream, [=] {
        run(from);
        pinned[key].uses--;
    });
}
API cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, void* stream) {
    LOCK;
    emu::record::log("download %zu", bytes);
    if (emu::record::dry()) return SUCCESS;
    auto run = [=] {
        require_device(from, bytes, "a copy from the device");
        memcpy(to, (const void*)from, bytes);
    };
    const auto block = block_with(pinned, (u64)to);
    if (block == pinned.end()) {
        const int result = enqueue(stream, run);
        return result ? result : cuStreamSynchronize(stream);
    }
    memset(to, 0xee, bytes); // a read before the wait does not find the result
    const u64 key = block->first;
    block->second.uses++;
    return enqueue(stream, [=] {
        run();
        pinned[key].uses--;
    });
}
API cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, void* stream) {
    return enqueue(stream, [=] {
        require_device(from, bytes, "a copy from the device");
        require_device(to, bytes, "a copy to the device");
        memmove((void*)to, (const void*)from, bytes);
        emu::check::mark_written((void*)to, bytes);
    });
}
API cuMemsetD8Async(u64 to, unsigned char value, size_t bytes, void* stream) {
    emu::record::log("fill %zu", bytes);
    if (emu::record::dry()) return SUCCESS;
    return enqueue(stream, [=] {
        require_device(to, bytes, "a memset");
        memset((void*)to, value, bytes);
        emu::check::mark_written((void*)to, bytes);
    });
}

// ---- Modules and launches -------------------------------------------------------------------------

// A cubin must be for the right architecture; only the names of its kernels are used. The code that runs is the
// same source compiled for the host.
API cuModuleLoadData(void** module, const void* image) {
    if (!current) return INVALID_CONTEXT;
    const char* p = (const char*)image;
    if (memcmp(p, "\177ELF", 4)) return INVALID_IMAGE;
    u64 sections; // the section headers are last
    u16 size, count;
    memcpy(&sections, p + 40, 8), memcpy(&size, p + 58, 2), memcpy(&count, p + 60, 2);
    auto* m = new Module{std::string(p, sections + (u64)size * count)};
    const int target = target_of(m->image);
    // A cubin runs on devices of its major version and the same or a higher minor one.
    if (target / 10 != capability() / 10 || target > capability()) {
        fprintf(stderr, "emulated driver: a cubin for sm_%d on a device of sm_%d\n", target, capability());
        delete m;
        return NO_BINARY_FOR_GPU;
    }
    emu::record::loaded(m->image);
    *module = m;
    return SUCCESS;
}
API cuModuleUnload(void* module) {
    delete (Module*)module;
    return SUCCESS;
}
API cuModuleGetFunction(void** function, void* module, const char* name) {
    const std::string section = std::string(".text.") + name;
    if (((Module*)module)->image.find(std::string(section.c_str(), section.size() + 1)) == std::string::npos)
        return NOT_FOUND;
    if (!emu::has_kernel(name)) {
        fprintf(stderr, "emulated driver: the kernel %s is not compiled into libkernels.so\n", name);
        return NOT_FOUND;
    }
    *function = new Function{name};
    return SUCCESS;
}
API cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != FUNCTION_MAX_DYNAMIC_SHARED) return SUCCESS;
    if (value < 0 || value > 227 << 10) return INVALID_VALUE;
    ((Function*)function)->dynamic_shared = value;
    return SUCCESS;
}
API cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void**) {
    const Function& f = *(Function*)function;
    if (!gx || !gy || !gz || gx > 0x7fffffff || gy > 65535 || gz > 65535) return INVALID_VALUE;
    if (!bx || !by || !bz || (u64)bx * by * bz > 1024 || (int)shared > f.dynamic_shared) return INVALID_VALUE;
    auto arguments = std::make_shared<std::vector<std::string>>(); // copied at the call, as by the driver
    for (size_t bytes : emu::argument_sizes(f.name))
        arguments->emplace_back((const char*)parameters[arguments->size()], bytes);
    emu::record::launched(f.name, {gx, gy, gz}, {bx, by, bz}, shared, arguments->empty() ? "" : arguments->front());
    if (emu::record::dry()) return SUCCESS;
    return enqueue(stream, [=, name = f.name] {
        std::vector<void*> pointers;
        for (auto& x : *arguments) pointers.push_back(x.data());
        emu::launch(name, {gx, gy, gz}, {bx, by, bz}, shared, pointers.data());
    });
}
