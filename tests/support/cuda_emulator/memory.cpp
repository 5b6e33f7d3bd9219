// The memory that kernels can access, and the checks of their accesses.
//
// A checked program is compiled with -fsanitize=thread, which inserts a function call before each access, and linked to
// the functions defined here. Every two bytes of shared and registered memory have a cell with the last writer and two
// readers since. Two accesses, at least one of them a write, conflict unless a barrier or __syncwarp orders them.
#include <cstdio>
#include <cstring>
#include <iterator>
#include <map>
#include <vector>

#include "runtime.h"

extern "C" {
alignas(1024) unsigned char emulator_dynamic_shared[emulator::MAX_DYNAMIC_SHARED];
}

namespace emulator {

// ---- Regions --------------------------------------------------------------------------------------------------------

struct Access {
    uint32_t interval;  // 0: none
    uint16_t thread;
    uint16_t time;  // the thread's clock, which __syncwarp advances
    Site site;
};

struct Cell {
    Access writer, readers[2];
};

constexpr uint16_t IN_FLIGHT = 0x8000;  // flag in a writer's `thread`: a cp.async that has not been waited for

struct Region {
    uintptr_t from, to;
    bool shared;
    std::vector<Cell> cells;

    bool contains(uintptr_t address) const { return address >= from && address < to; }
};

static Region dynamic_region, static_region;
static std::map<uintptr_t, Region> registered;  // by start address
static Region* latest;                          // the registered region used last

static Region* find(uintptr_t address) {
    if (dynamic_region.contains(address)) return &dynamic_region;
    if (static_region.contains(address)) return &static_region;
    if (latest && latest->contains(address)) return latest;
    auto after = registered.upper_bound(address);
    if (after == registered.begin()) return nullptr;
    Region& region = std::prev(after)->second;
    if (!region.contains(address)) return nullptr;
    return latest = &region;
}

extern "C" int emulator_register(uintptr_t from, size_t bytes) {
    auto after = registered.lower_bound(from);
    if (after != registered.end() && after->first < from + bytes) return 0;
    if (after != registered.begin() && std::prev(after)->second.to > from) return 0;
    registered[from] = {from, from + bytes, false, {}};
    return 1;
}

extern "C" int emulator_unregister(uintptr_t from) {
    latest = nullptr;
    return registered.erase(from) == 1;
}

// ---- Order of accesses ----------------------------------------------------------------------------------------------

// Time is divided into intervals: each launch, block and barrier begins a new one.
static uint32_t interval, launch_begin, block_begin;

struct BlockBegin {
    uint32_t interval;
    Index block;
};
static std::vector<BlockBegin> block_begins;  // blocks of this launch

// Within an interval, time_of counts a thread's calls of __syncwarp. seen[thread][lane] is a time of another lane of
// the warp: that lane's accesses before this time are ordered before the thread's next access.
static uint16_t time_of[MAX_THREADS];
static uint16_t seen[MAX_THREADS][WARP];
static bool warp_synchronized;

void memory_warp_sync(int warp, unsigned mask) {
    uint16_t merged[WARP] = {};
    int first = warp * WARP;
    for (int lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        seen[first + lane][lane] = ++time_of[first + lane];
        for (int k = 0; k < WARP; k++)
            if (seen[first + lane][k] > merged[k]) merged[k] = seen[first + lane][k];
    }
    for (int lane = 0; lane < WARP; lane++)
        if (mask >> lane & 1) memcpy(seen[first + lane], merged, sizeof merged);
    warp_synchronized = true;
}

void memory_begin_interval() {
    interval++;
    if (!warp_synchronized) return;
    memset(time_of, 0, sizeof time_of);
    memset(seen, 0, sizeof seen);
    warp_synchronized = false;
}

static bool comes_before(const Access& other, int thread, bool shared) {
    if (other.interval < (shared ? block_begin : launch_begin)) return true;  // each block has its own shared memory
    if (other.interval < block_begin) return false;
    if (other.interval < interval) return true;
    int owner = other.thread & ~IN_FLIGHT;
    return owner == thread || (owner / WARP == thread / WARP && seen[thread][owner % WARP] > other.time);
}

// ---- Checks ---------------------------------------------------------------------------------------------------------

struct Text {
    char text[160];
};

static Text describe_address(const Region& region, uintptr_t address) {
    Text t;
    size_t offset = address - region.from;
    if (&region == &dynamic_region)
        snprintf(t.text, sizeof t.text, "dynamic shared memory + %zu", offset);
    else if (&region == &static_region)
        snprintf(t.text, sizeof t.text, "@s:%zu@", address - reinterpret_cast<uintptr_t>(launch.image));
    else
        snprintf(t.text, sizeof t.text, "byte %zu of a buffer of %zu", offset, region.to - region.from);
    return t;
}

static Text describe_thread(const Access& other) {
    Text t;
    Index i = threads[other.thread & ~IN_FLIGHT].index;
    int used = snprintf(t.text, sizeof t.text, "thread (%u,%u,%u)", i.x, i.y, i.z);
    if (other.interval >= block_begin) return t;
    Index block{};
    for (const BlockBegin& begin : block_begins)
        if (begin.interval <= other.interval) block = begin.block;
    snprintf(t.text + used, sizeof t.text - static_cast<size_t>(used), " of block (%u,%u,%u)", block.x, block.y,
             block.z);
    return t;
}

[[noreturn]] static void fail_race(const Region& region, uintptr_t address, bool write, const Access& other, bool wrote,
                                   int thread, Site site) {
    const char* reason = other.interval < block_begin ? "" : ", and no barrier lies between";
    fail("race", thread, site, "%s of %s, which %s %s in @c:%u@%s", write ? "write" : "read",
         describe_address(region, address).text, describe_thread(other).text, wrote ? "wrote" : "read", other.site,
         reason);
}

[[noreturn]] static void fail_bounds(uintptr_t address, size_t bytes, bool write, int thread, Site site) {
    const char* what = write ? "write" : "read";
    if (address >= reinterpret_cast<uintptr_t>(emulator_dynamic_shared) &&
        address < reinterpret_cast<uintptr_t>(emulator_dynamic_shared) + MAX_DYNAMIC_SHARED)
        fail("out of bounds", thread, site, "%s of %zu bytes at %zu of %u bytes of dynamic shared memory", what, bytes,
             address - reinterpret_cast<uintptr_t>(emulator_dynamic_shared), launch.dynamic_shared);
    auto after = registered.upper_bound(address);
    if (after != registered.begin()) {
        const Region& region = std::prev(after)->second;
        size_t size = region.to - region.from;
        if (address - region.from < 2 * size + 4096)
            fail("out of bounds", thread, site, "%s of %zu bytes at byte %zu of a buffer of %zu", what, bytes,
                 address - region.from, size);
    }
    if (after != registered.end() && after->first - address < 4096)
        fail("out of bounds", thread, site, "%s of %zu bytes that begins %zu before a buffer", what, bytes,
             after->first - address);
    fail("out of bounds", thread, site, "%s of %zu bytes at address %#zx, where no memory is", what, bytes, address);
}

static Region& region_of(uintptr_t address, size_t bytes, bool write, int thread, Site site) {
    Region* region = find(address);
    if (!region || address + bytes > region->to) fail_bounds(address, bytes, write, thread, site);
    if (region->cells.empty()) region->cells.resize((region->to - region->from + 1) / 2);
    return *region;
}

// Check an access and record it in the cells.
static void check_and_record(Region& region, uintptr_t address, size_t bytes, bool write, int thread, Site site,
                             bool in_flight) {
    size_t first = (address - region.from) / 2, last = (address - region.from + bytes - 1) / 2;
    Access access{interval, static_cast<uint16_t>(thread | (in_flight ? IN_FLIGHT : 0)), time_of[thread], site};
    for (size_t i = first; i <= last; i++) {
        Cell& cell = region.cells[i];
        uintptr_t here = region.from + 2 * i;
        bool written = cell.writer.interval >= block_begin;
        if (region.shared && written && (cell.writer.thread & IN_FLIGHT))
            fail("in flight", thread, site, "%s of %s, whose copy %s began in @c:%u@ and has not waited for",
                 write ? "write" : "read", describe_address(region, here).text, describe_thread(cell.writer).text,
                 cell.writer.site);
        if (region.shared && !write && !written)
            fail("uninitialised", thread, site, "read of %s, which no thread of the block has written",
                 describe_address(region, here).text);
        if (!comes_before(cell.writer, thread, region.shared))
            fail_race(region, here, write, cell.writer, true, thread, site);
        bool first_before = comes_before(cell.readers[0], thread, region.shared);
        if (!write) {
            cell.readers[first_before ? 0 : 1] = access;  // keep a reader that this thread's later writes race with
            continue;
        }
        if (!first_before) fail_race(region, here, true, cell.readers[0], false, thread, site);
        if (!comes_before(cell.readers[1], thread, region.shared))
            fail_race(region, here, true, cell.readers[1], false, thread, site);
        cell.writer = access;
    }
}

static void access(const void* pointer, size_t bytes, bool write, int thread, Site site) {
    auto address = reinterpret_cast<uintptr_t>(pointer);
    counters.accesses++;
    if (pointer >= launch.image && pointer < launch.static_shared) return;  // the program's constants
    check_and_record(region_of(address, bytes, write, thread, site), address, bytes, write, thread, site, false);
}

void memory_read(const void* pointer, size_t bytes, int thread, Site site) {
    access(pointer, bytes, false, thread, site);
}

void memory_begin_copy(const void* shared, size_t bytes, Site site) {
    auto address = reinterpret_cast<uintptr_t>(shared);
    check_and_record(region_of(address, bytes, true, current, site), address, bytes, true, current, site, true);
}

void memory_end_copy(const void* shared, size_t bytes, Site site) {
    auto address = reinterpret_cast<uintptr_t>(shared);
    Region& region = region_of(address, bytes, true, current, site);
    Access write{interval, static_cast<uint16_t>(current), time_of[current], site};
    for (size_t i = 0; i < bytes / 2; i++) region.cells[(address - region.from) / 2 + i].writer = write;
}

// ---- Launches and blocks --------------------------------------------------------------------------------------------

void memory_begin_launch() {
    auto dynamic = reinterpret_cast<uintptr_t>(emulator_dynamic_shared);
    dynamic_region.from = dynamic;
    dynamic_region.to = dynamic + launch.dynamic_shared;
    static_region.from = reinterpret_cast<uintptr_t>(launch.static_shared);
    static_region.to = reinterpret_cast<uintptr_t>(launch.image_end);
    dynamic_region.shared = static_region.shared = true;
    if (!launch.check) return;
    for (Region* region : {&dynamic_region, &static_region}) {
        size_t cells = (region->to - region->from + 1) / 2;
        if (region->cells.size() < cells) region->cells.resize(cells);
    }
    launch_begin = interval + 1;
    block_begins.clear();
}

// Fill shared memory with NaNs.
void memory_begin_block() {
    memset(emulator_dynamic_shared, 0xff, launch.dynamic_shared);
    memset(launch.static_shared, 0xff, static_cast<size_t>(launch.image_end - launch.static_shared));
    if (!launch.check) return;
    memory_begin_interval();
    block_begin = interval;
    block_begins.push_back({interval, block_index()});
}

// ---- Functions that instrumented code calls -------------------------------------------------------------------------

struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

struct TypeName {
    uint16_t kind, information;
    char name[];
};

struct TypeMismatch {
    SourceLocation location;
    const TypeName* type;
    uint8_t log_alignment, use;
};

static void hook(const void* pointer, size_t bytes, bool write, Site site) {
    if (!on_a_stack(pointer)) access(pointer, bytes, write, current, site);
}

extern "C" {

#define HOOKS(bytes)                                                                    \
    void __tsan_read##bytes(void* p) { hook(p, bytes, false, CALLED_FROM); }            \
    void __tsan_write##bytes(void* p) { hook(p, bytes, true, CALLED_FROM); }            \
    void __tsan_unaligned_read##bytes(void* p) { hook(p, bytes, false, CALLED_FROM); }  \
    void __tsan_unaligned_write##bytes(void* p) { hook(p, bytes, true, CALLED_FROM); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { hook(p, bytes, false, CALLED_FROM); }
void __tsan_write_range(void* p, size_t bytes) { hook(p, bytes, true, CALLED_FROM); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, uintptr_t pointer) {
    fail("misaligned", current, CALLED_FROM, "access of type %s at %zu bytes past a multiple of %d",
         data->type->name, pointer & ((uintptr_t{1} << data->log_alignment) - 1), 1 << data->log_alignment);
}

void __ubsan_handle_out_of_bounds(const void*, uintptr_t index) {
    fail("out of bounds", current, CALLED_FROM, "index %zd of an array", index);
}

void __ubsan_handle_divrem_overflow(const void*, uintptr_t, uintptr_t) {
    fail("arithmetic", current, CALLED_FROM, "division by zero, or one that overflows");
}

void __ubsan_handle_shift_out_of_bounds(const void*, uintptr_t, uintptr_t) {
    fail("arithmetic", current, CALLED_FROM, "shift by more bits than there are, or a sign lost");
}

#define OVERFLOWS(name)                                                                       \
    void __ubsan_handle_##name##_overflow(const void*, uintptr_t, uintptr_t) {                \
        fail("arithmetic", current, CALLED_FROM, "an int or long long overflows by " #name); \
    }
OVERFLOWS(add)
OVERFLOWS(sub)
OVERFLOWS(mul)
OVERFLOWS(negate)

}  // extern "C"

}  // namespace emulator
