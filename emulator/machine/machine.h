// The interface of the emulated device for host programs: launches, memory, and reports of the checks.
#pragma once
#include "emu.h"

#include <string>
#include <vector>

namespace emu {

struct Options {
    /// 0 runs threads in order; any other value is the seed of a random order of blocks, and of threads between
    /// synchronizations.
    u64 seed = 0;
};
Options& options();

bool has_kernel(const std::string& name);
/// The sizes of a kernel's arguments, in bytes.
const std::vector<size_t>& argument_sizes(const std::string& name);
/// Runs a kernel to its end. An invalid launch or a defect that is found in the kernel is printed, and the process
/// exits with code 101.
void launch(const std::string& name, dim3 grid, dim3 block, size_t shared_bytes, void** arguments);

/// The place of the running thread, for the checks.
struct Place {
    u32 block, thread;
    u32 barrier_epoch; // __syncthreads so far
    u32 warp_epoch;    // __syncwarp of its warp so far
    u32 meetings;      // warp operations and barriers of its warp so far
};
bool in_kernel();
Place place();
bool on_a_stack(const void* p);
[[noreturn]] void fail(const std::string& what);

} // namespace emu

/// The checks: bounds, reads of uninitialized memory, races, bank conflicts and memory traffic. They apply to
/// memory that was registered with add_memory. In a build without checks these functions do nothing.
namespace emu::check {

bool enabled();
/// Registers memory of the device; `written` says whether its contents may be read.
void add_memory(const void* at, size_t bytes, bool written);
void remove_memory(const void* at);
/// The host has written these bytes.
void mark_written(const void* at, size_t bytes);

/// Memory of a block: dynamic and static shared memory, unwritten.
void begin_block(const void* dynamic, size_t dynamic_bytes, const void* fixed, size_t fixed_bytes);
void begin_launch(const std::string& kernel, const void* code, size_t code_bytes);
void end_launch();

enum class Kind { Read, Write, AsyncStart, AsyncEnd };
/// Without a file, `line` is the address of the code.
void access(const void* at, size_t bytes, Kind kind, const char* file, u64 line);

/// Prints the places in the source that access memory, with the requests of warps and how many wavefronts
/// (shared memory) or sectors of 32 bytes (device memory) they took: all places, or those above `bank_limit`
/// times the least wavefronts or `sector_limit` times the least sectors. Returns the number of the latter.
/// Not counted are kernels and functions whose name contains an element of `exempt`.
int report(double bank_limit, double sector_limit, bool all, const std::vector<std::string>& exempt);

/// Compares all places with both limits, and prints those that exceed them and are not among the exceptions of a file.
/// A line of it is
///     KERNEL shared|device read|write PLACE LIMIT # reason
/// KERNEL and PLACE are patterns with *; a place is a function, or a file where the function is not known. The first
/// line that fits a place has its limit. Returns false if a place exceeds its limit, or if a line fits no place.
bool within_limits(double bank_limit, double sector_limit, const char* path);

} // namespace emu::check
