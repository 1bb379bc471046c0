// What a process does with the emulated device: the kernels that it loads and launches, a log for analyses.
#pragma once
#include "machine.h"

#include <string>
#include <vector>

namespace emu::record {

/// Whether nothing is executed (EMU_DRY): work is only logged, so that the launches of a large model can be counted.
__attribute__((visibility("default"))) bool dry();
/// The kernels of a module that the driver has loaded.
void loaded(const std::string& image);
/// One line of the log (EMU_LOG): the name, the size of the launch, and the argument in hexadecimal digits.
void launched(const std::string& kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::string& argument);
/// A line of the log for work that is not a kernel.
__attribute__((visibility("default"))) void log(const char* format, ...) __attribute__((format(printf, 1, 2)));
/// The checks at the end of a process, selected by environment variables. Returns whether all have passed.
bool finish();

} // namespace emu::record
