// What the stub libraries share.
#pragma once
#include "machine.h"

#include <cstdio>
#include <cstdlib>
#include <functional>

#define API extern "C" __attribute__((visibility("default"))) int

namespace emu::driver {
/// Adds work to a stream. Returns the driver's result.
__attribute__((visibility("default"))) int ask(void* stream, std::function<void()> work);
/// Stops unless these bytes are memory of the device.
__attribute__((visibility("default"))) void require_device(const void* p, size_t bytes, const char* what);
} // namespace emu::driver
