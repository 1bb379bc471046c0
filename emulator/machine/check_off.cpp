// Empty checks, for the build without checks.
#include "machine.h"

namespace emu::check {
bool enabled() { return false; }
void add_memory(const void*, size_t, bool) {}
void remove_memory(const void*) {}
void mark_written(const void*, size_t) {}
void begin_block(const void*, size_t, const void*, size_t) {}
void begin_launch(const std::string&, const void*, size_t) {}
void end_launch() {}
void access(const void*, size_t, Kind, const char*, u64) {}
int report(double, double, bool, const std::vector<std::string>&) { return 0; }
bool within_limits(double, double, const char*) { return true; }
} // namespace emu::check
