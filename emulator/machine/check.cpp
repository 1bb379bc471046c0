// The checks: each memory access is compared with the recorded state of its cell. A cell is two bytes, the
// smallest element of the kernels.
#include "machine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <fnmatch.h>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <sys/mman.h>
#include <unordered_map>

namespace emu::check {
namespace {

/// All zero at first: launches are numbered from 1.
struct Cell {
    u32 w_launch, w_block, w_barrier, w_epoch; // the last write
    u16 w_thread;
    bool written, pending; // pending: target of a cp.async that has not been waited for
    u32 r_launch, r_block, r_barrier, r_epoch; // the reads since then: the last block and barrier epoch,
    u32 r_warps, r_lanes;                      // its warps, and the lanes of the last warp and warp epoch
    u16 r_warp;
    bool r_other_blocks;
};

struct Range {
    uintptr_t at = 0;
    size_t bytes = 0;
    const char* kind = "";
    Cell* cells = nullptr;

    size_t cell_bytes() const { return (bytes / 2 + 2) * sizeof(Cell); }
    void track() { // zeros; pages use memory only after a write
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        cells = (Cell*)mmap(nullptr, cell_bytes(), PROT_READ | PROT_WRITE, flags, -1, 0);
        if (cells == MAP_FAILED) fail("no memory for the checks");
    }
    void forget() {
        if (cells) munmap(cells, cell_bytes());
        cells = nullptr;
    }
    bool has(uintptr_t p) const { return p >= at && p < at + bytes; }
    Cell& cell(uintptr_t p) { return cells[(p - at) / 2]; }
};

std::map<uintptr_t, Range> device; // by first address
Range dynamic_shared, fixed_shared;
Range* last_found = nullptr;
u32 launch_number = 0;
std::string kernel;
uintptr_t code_begin, code_end;

Range* find(uintptr_t p) {
    if (dynamic_shared.has(p)) return &dynamic_shared;
    if (fixed_shared.has(p)) return &fixed_shared;
    if (last_found && last_found->has(p)) return last_found;
    auto i = device.upper_bound(p);
    if (i == device.begin()) return nullptr;
    --i;
    return i->second.has(p) ? last_found = &i->second : nullptr;
}
bool is_shared(const Range* r) { return r == &dynamic_shared || r == &fixed_shared; }

// ---- Traffic --------------------------------------------------------------------------------------

struct Request {
    u32 lanes = 0;
    uintptr_t at[32];
};
/// The accesses of a warp at one place since its last synchronization: the n-th accesses of all lanes form one request.
struct Open {
    u32 block = ~0u, meetings = 0;
    u32 count[32] = {};
    std::vector<Request> requests;
};
struct Key {
    std::string kernel;
    const char* file; // null: `line` is an address in the code
    u64 line;
    bool shared, write;
    u32 bytes;
    bool operator<(const Key& o) const {
        return std::tie(kernel, file, line, shared, write, bytes) <
               std::tie(o.kernel, o.file, o.line, o.shared, o.write, o.bytes);
    }
};
struct Site {
    u64 requests = 0, units = 0, least = 0;
    Open open[32];
};
std::map<Key, Site> sites;
struct Short { // key of a site of the running kernel, without comparing strings
    const char* file;
    u64 line;
    u32 rest;
    bool operator==(const Short& o) const { return file == o.file && line == o.line && rest == o.rest; }
};
struct HashShort {
    size_t operator()(const Short& s) const { return (size_t)s.file * 31 + s.line * 0x9e3779b97f4a7c15ull + s.rest; }
};
std::unordered_map<Short, std::pair<const Key*, Site*>, HashShort> running;

/// Wavefronts of shared memory: 16-byte accesses go eight lanes at a time, 8-byte ones sixteen.
void count_banks(const Request& r, u32 bytes, Site& s) {
    const u32 group = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
    for (u32 first = 0; first < 32; first += group) {
        std::set<uintptr_t> words;
        for (u32 lane = first; lane < first + group; lane++)
            if (r.lanes >> lane & 1)
                for (uintptr_t w = r.at[lane] / 4; w <= (r.at[lane] + bytes - 1) / 4; w++) words.insert(w);
        if (words.empty()) continue;
        u32 banks[32] = {};
        for (uintptr_t w : words) banks[w % 32]++;
        s.units += *std::max_element(banks, banks + 32);
        s.least += (words.size() + 31) / 32;
    }
}
/// Sectors of one or more requests: those of consecutive requests that touch the same sectors are counted once,
/// because L1 (reads) or L2 (writes) merges them.
struct Sectors {
    std::set<uintptr_t> sectors, items;
    u32 requests = 0;

    void add(const Request& r, u32 bytes) {
        requests++;
        for (u32 lane = 0; lane < 32; lane++)
            if (r.lanes >> lane & 1) {
                items.insert(r.at[lane]);
                for (uintptr_t x = r.at[lane] / 32; x <= (r.at[lane] + bytes - 1) / 32; x++) sectors.insert(x);
            }
    }
    bool shares_with(const Sectors& other) const {
        return std::any_of(other.sectors.begin(), other.sectors.end(), [&](uintptr_t x) { return sectors.count(x); });
    }
    void count(Site& s, u32 bytes) const {
        if (items.empty()) return;
        s.units += sectors.size();
        // The same number of contiguous bytes, from the same first address.
        const uintptr_t first = *items.begin();
        s.least += (first + items.size() * bytes - 1) / 32 - first / 32 + 1;
    }
};
constexpr u32 MERGED = 8; // most requests that are counted together: the elements of an octet
void close(const Key& key, Site& site, Open& open) {
    Sectors group;
    for (const Request& r : open.requests) {
        site.requests++;
        if (key.shared) {
            count_banks(r, key.bytes, site);
            continue;
        }
        Sectors next;
        next.add(r, key.bytes);
        if (group.requests == MERGED || !group.shares_with(next)) {
            group.count(site, key.bytes);
            group = next;
        } else {
            group.add(r, key.bytes);
        }
    }
    group.count(site, key.bytes);
    open.requests.clear();
    std::fill(open.count, open.count + 32, 0);
}
void close_all() {
    for (auto& [key, site] : running)
        for (Open& open : site.second->open) close(*site.first, *site.second, open);
}
void count(uintptr_t at, u32 bytes, bool shared, bool write, const Place& p, const char* file, u64 line) {
    const Short key{file, line, bytes << 2 | shared << 1 | (u32)write};
    auto i = running.find(key);
    if (i == running.end()) {
        auto& entry = *sites.try_emplace(Key{kernel, file, line, shared, write, bytes}).first;
        i = running.emplace(key, std::make_pair(&entry.first, &entry.second)).first;
    }
    const auto [full, site] = i->second;
    Open& open = site->open[p.thread / 32];
    if (open.block != p.block || open.meetings != p.meetings) {
        close(*full, *site, open);
        open.block = p.block, open.meetings = p.meetings;
    }
    const u32 lane = p.thread % 32, number = open.count[lane]++;
    if (open.requests.size() <= number) open.requests.resize(number + 1);
    open.requests[number].lanes |= 1u << lane;
    open.requests[number].at[lane] = at;
}

/// Places in the source of addresses in the code of one library, as "file:line in function". addr2line reads all debug
/// information at each start, so it is started once.
std::vector<std::string> places_of(const std::vector<u64>& addresses) {
    std::vector<std::string> places(addresses.size(), "unknown");
    Dl_info info;
    if (addresses.empty() || !dladdr((void*)addresses[0], &info) || !info.dli_fname) return places;
    std::string command = std::string("addr2line -f -C -e '") + info.dli_fname + "'";
    char text[512];
    for (u64 address : addresses) {
        snprintf(text, sizeof text, " %llx", address - 1 - (u64)info.dli_fbase);
        command += text;
    }
    FILE* pipe = popen(command.c_str(), "r");
    if (!pipe) return places;
    char function[512], place[512];
    for (std::string& result : places) {
        if (!fgets(function, sizeof function, pipe) || !fgets(place, sizeof place, pipe)) break;
        auto until = [](std::string s, const char* end) { return s.substr(0, s.find_first_of(end)); };
        const std::string path = until(place, " \n"), name = until(function, "(<\n");
        result = path.substr(path.rfind('/') + 1) + " in " + name.substr(name.rfind(' ') + 1);
    }
    pclose(pipe);
    return places;
}
std::string where(const char* file, u64 line) {
    if (!file) return places_of({line})[0];
    const char* slash = strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
}

[[noreturn]] void wrong(const char* what, const Range& r, uintptr_t at, const char* file, u64 line) {
    fail(std::string(what) + ": byte " + std::to_string(at - r.at) + " of " + r.kind + " memory of " +
         std::to_string(r.bytes) + " bytes, at " + where(file, line));
}

} // namespace

bool enabled() { return true; }

namespace {
void one_cell(Range& r, uintptr_t at, Kind kind, const Place& p, const char* file, u64 line) {
    Cell& c = r.cell(at);
    const u32 warp = p.thread / 32, lane = p.thread % 32;
    if (kind == Kind::AsyncEnd) {
        c.pending = false;
    } else {
        if (c.pending) wrong("access to the target of a cp.async before it was waited for", r, at, file, line);
        // Another thread's write of this launch is before this access if a barrier of both is between.
        const bool ordered = c.w_launch != launch_number || (c.w_block == p.block && c.w_thread == p.thread) ||
                             (c.w_block == p.block && (c.w_barrier != p.barrier_epoch ||
                                                       (c.w_thread / 32u == warp && c.w_epoch != p.warp_epoch)));
        if (!ordered) wrong(kind == Kind::Read ? "race: read after another thread's write"
                                               : "race: write after another thread's write", r, at, file, line);
    }
    const bool read_now = c.r_launch == launch_number && c.r_block == p.block && c.r_barrier == p.barrier_epoch;
    if (kind == Kind::Read) {
        if (!c.written) wrong("read of uninitialized memory", r, at, file, line);
        if (c.r_launch == launch_number && c.r_block != p.block) c.r_other_blocks = true;
        if (!read_now) {
            if (c.r_launch != launch_number) c.r_other_blocks = false;
            c.r_launch = launch_number, c.r_block = p.block, c.r_barrier = p.barrier_epoch;
            c.r_warps = c.r_lanes = 0;
        }
        if (c.r_warp != warp || c.r_epoch != p.warp_epoch) c.r_warp = warp, c.r_epoch = p.warp_epoch, c.r_lanes = 0;
        c.r_warps |= 1u << warp, c.r_lanes |= 1u << lane;
        return;
    }
    if (c.r_launch == launch_number) {
        if (c.r_other_blocks || c.r_block != p.block)
            wrong("race: write after another block's read", r, at, file, line);
        const bool same_epoch = c.r_warp == warp && c.r_epoch == p.warp_epoch;
        if (read_now && (c.r_warps & ~(1u << warp) || (same_epoch && c.r_lanes & ~(1u << lane))))
            wrong("race: write after another thread's read", r, at, file, line);
    }
    c.w_launch = launch_number, c.w_block = p.block, c.w_barrier = p.barrier_epoch, c.w_epoch = p.warp_epoch;
    c.w_thread = p.thread;
    c.r_launch = 0, c.r_other_blocks = false;
    c.written = kind != Kind::AsyncStart;
    c.pending = kind == Kind::AsyncStart;
}
} // namespace

void access(const void* pointer, size_t bytes, Kind kind, const char* file, u64 line) {
    if (!in_kernel() || on_a_stack(pointer)) return;
    const uintptr_t at = (uintptr_t)pointer;
    Range* r = find(at);
    if (!r || at + bytes > r->at + r->bytes) {
        if (!r && kind == Kind::Read && at >= code_begin && at < code_end) return; // a constant of the kernel
        char text[160];
        snprintf(text, sizeof text, "%s of %zu bytes outside all memory, at ", kind == Kind::Read ? "read" : "write", bytes);
        if (r) wrong("access past the end", *r, at + bytes, file, line);
        fail(text + where(file, line));
    }
    const Place p = place();
    for (uintptr_t x = at; x < at + bytes; x += 2) one_cell(*r, x, kind, p, file, line);
    if (kind != Kind::AsyncEnd) count(at, bytes, is_shared(r), kind != Kind::Read, p, file, line);
}

void add_memory(const void* at, size_t bytes, bool written) {
    Range& r = device[(uintptr_t)at];
    r.forget();
    r.at = (uintptr_t)at, r.bytes = bytes, r.kind = "device";
    r.track();
    if (written) mark_written(at, bytes);
}
void remove_memory(const void* at) {
    const auto i = device.find((uintptr_t)at);
    if (i == device.end()) return;
    if (last_found == &i->second) last_found = nullptr;
    i->second.forget();
    device.erase(i);
}
void mark_written(const void* at, size_t bytes) {
    for (uintptr_t x = (uintptr_t)at, end = x + bytes; x < end; x += 2)
        if (Range* r = find(x)) r->cell(x).written = true;
}

void begin_launch(const std::string& name, const void* code, size_t code_bytes) {
    kernel = name;
    launch_number++;
    running.clear();
    code_begin = (uintptr_t)code, code_end = code_begin + code_bytes;
}
void begin_block(const void* dynamic, size_t dynamic_bytes, const void* fixed, size_t fixed_bytes) {
    close_all();
    auto renew = [](Range& r, const void* at, size_t bytes, const char* kind) {
        r.forget();
        r.at = (uintptr_t)at, r.bytes = bytes, r.kind = kind;
        if (bytes) r.track();
    };
    renew(dynamic_shared, dynamic, dynamic_bytes, "dynamic shared");
    renew(fixed_shared, fixed, fixed_bytes, "static shared");
}
void end_launch() {
    close_all();
    running.clear();
    dynamic_shared.forget(), fixed_shared.forget();
    dynamic_shared.bytes = fixed_shared.bytes = 0;
}

int report(double bank_limit, double sector_limit, bool all, const std::vector<std::string>& exempt) {
    int above = 0;
    for (const auto& [key, site] : sites) {
        const double ratio = site.least ? (double)site.units / site.least : 1;
        bool over = ratio > (key.shared ? bank_limit : sector_limit);
        if (!all && !over) continue;
        const std::string at = where(key.file, key.line);
        for (const auto& part : exempt)
            if (key.kernel.find(part) != std::string::npos || at.find(part) != std::string::npos) over = false;
        above += over;
        if (all || over)
            printf("%s%s: %s %s, %u bytes per lane, %s: %llu requests, %llu %s, %.2f of the least\n",
                   over ? "ABOVE THE LIMIT: " : "", key.kernel.c_str(), key.shared ? "shared" : "device",
                   key.write ? "write" : "read", key.bytes, at.c_str(), site.requests,
                   site.units, key.shared ? "wavefronts" : "sectors", ratio);
    }
    return above;
}

bool within_limits(double bank_limit, double sector_limit, const char* path) {
    struct Line {
        std::string kernel, space, kind, place;
        double limit;
        bool used;
    };
    std::vector<Line> lines;
    std::ifstream file(path);
    if (!file) fail(std::string("cannot read the limits ") + path);
    for (std::string text; std::getline(file, text);) {
        std::istringstream words(text.substr(0, text.find('#')));
        Line l{};
        if (!(words >> l.kernel)) continue;
        if (!(words >> l.space >> l.kind >> l.place >> l.limit)) fail(std::string(path) + ": a line is not complete: " + text);
        lines.push_back(l);
    }
    bool passed = true;
    u64 exceptions = 0;
    auto ratio_of = [](const Site& site) { return site.least ? (double)site.units / site.least : 1; };
    std::map<u64, std::string> known; // places by their addresses
    std::vector<u64> addresses;
    for (const auto& [key, site] : sites)
        if (!key.file && ratio_of(site) > (key.shared ? bank_limit : sector_limit)) addresses.push_back(key.line);
    const std::vector<std::string> places = places_of(addresses);
    for (size_t i = 0; i < addresses.size(); i++) known[addresses[i]] = places[i];
    for (const auto& [key, site] : sites) {
        const double ratio = ratio_of(site);
        if (ratio <= (key.shared ? bank_limit : sector_limit)) continue;
        const char *space = key.shared ? "shared" : "device", *kind = key.write ? "write" : "read";
        const std::string at = key.file ? where(key.file, key.line) : known[key.line];
        // Without the line, which changes with every edit: the function, or the file where that is not known.
        const size_t in = at.find(" in ");
        const std::string place = in == std::string::npos ? at.substr(0, at.find(':')) : at.substr(in + 4);
        auto fits = [](const std::string& pattern, const std::string& text) { return !fnmatch(pattern.c_str(), text.c_str(), 0); };
        const auto line = std::find_if(lines.begin(), lines.end(), [&](const Line& l) {
            return fits(l.kernel, key.kernel) && l.space == space && l.kind == kind && fits(l.place, place);
        });
        if (line != lines.end()) line->used = true;
        if (line != lines.end() && ratio <= line->limit) {
            exceptions++;
            continue;
        }
        printf("above its limit: %s %s %s %s: %.2f of the least, %llu requests, at %s\n", key.kernel.c_str(), space, kind,
               place.c_str(), ratio, site.requests, at.c_str());
        passed = false;
    }
    for (const Line& l : lines) {
        if (l.used) continue;
        printf("%s: fits no place: %s %s %s %s\n", path, l.kernel.c_str(), l.space.c_str(), l.kind.c_str(), l.place.c_str());
        passed = false;
    }
    printf("%zu places that access memory, %llu of them are exceptions; %s\n", sites.size(), exceptions,
           passed ? "all within their limits" : "NOT all within their limits");
    return passed;
}

} // namespace emu::check
