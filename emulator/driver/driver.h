// Declarations shared by the stub libraries.
#pragma once
#include "machine.h"

#include <cstdio>
#include <cstdlib>
#include <functional>

#define API extern "C" __attribute__((visibility("default"))) int

namespace emu::driver {
/// Enqueues work on a stream. Returns the driver's result.
__attribute__((visibility("default"))) int enqueue(void* stream, std::function<void()> work);
/// Stops unless these bytes are memory of the device.
__attribute__((visibility("default"))) void require_device(const void* p, size_t bytes, const char* what);
} // namespace emu::driver
