// 32-bit shared memory addresses, and asynchronous copies to shared memory, performed when their thread waits for them.
#include <cstring>
#include <vector>

#include "runtime.h"

namespace emulator {

// ---- Shared addresses -----------------------------------------------------------------------------------------------

// Addresses below STATIC_ADDRESS are offsets into dynamic shared memory, the others into static shared memory.
constexpr unsigned STATIC_ADDRESS = 1u << 24;
constexpr uintptr_t BANKS = 128;  // bytes in one row of all banks

static uintptr_t static_base() { return reinterpret_cast<uintptr_t>(launch.static_shared) & ~(BANKS - 1); }

static bool is_shared(const void* pointer, size_t bytes) {
    auto p = static_cast<const unsigned char*>(pointer);
    return (p >= emulator_dynamic_shared && p + bytes <= emulator_dynamic_shared + launch.dynamic_shared) ||
           (p >= launch.static_shared && p + bytes <= launch.image_end);
}

unsigned char* shared_pointer(unsigned address, int thread, Site site) {
    if (address >= STATIC_ADDRESS) {
        auto pointer = reinterpret_cast<unsigned char*>(static_base() + (address - STATIC_ADDRESS));
        if (!is_shared(pointer, 1)) fail("out of bounds", thread, site, "shared address %#x", address);
        return pointer;
    }
    if (address >= launch.dynamic_shared)
        fail("out of bounds", thread, site, "shared address %u, of %u bytes", address, launch.dynamic_shared);
    return emulator_dynamic_shared + address;
}

extern "C" void* emulator_shared_pointer(unsigned address) { return shared_pointer(address, current, CALLED_FROM); }

extern "C" unsigned emulator_shared_address(const void* shared) {
    auto p = static_cast<const unsigned char*>(shared);
    // one past the end is a valid address, like a pointer
    if (p >= emulator_dynamic_shared && p <= emulator_dynamic_shared + launch.dynamic_shared)
        return static_cast<unsigned>(p - emulator_dynamic_shared);
    if (!is_shared(shared, 1)) fail("out of bounds", current, CALLED_FROM, "the address is not in shared memory");
    return STATIC_ADDRESS + static_cast<unsigned>(reinterpret_cast<uintptr_t>(shared) - static_base());
}

// ---- Copies ---------------------------------------------------------------------------------------------------------

struct Copy {
    void* to;
    const void* from;  // null: zeros
    size_t bytes;
    int group;
    Site site;
};

static std::vector<Copy> copies[MAX_THREADS];  // started, not yet performed
static int committed[MAX_THREADS];             // number of groups

void copies_begin_block() {
    for (int i = 0; i < thread_count; i++) {
        copies[i].clear();
        committed[i] = 0;
    }
}

extern "C" void emulator_cp_async(void* shared, const void* global, int bytes) {
    Site site = CALLED_FROM;
    auto count = static_cast<size_t>(bytes);
    if (bytes != 4 && bytes != 8 && bytes != 16) fail("misaligned", current, site, "cp.async of %d bytes", bytes);
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % count)
        fail("misaligned", current, site, "cp.async of %d bytes, from or to an address that is no multiple", bytes);
    if (!is_shared(shared, count)) fail("out of bounds", current, site, "cp.async to what is not shared memory");
    if (launch.check) {
        if (global) memory_read(global, count, current, site);
        memory_begin_copy(shared, count, site);
    }
    copies[current].push_back({shared, global, count, committed[current], site});
}

extern "C" void emulator_cp_commit() { committed[current]++; }

extern "C" void emulator_cp_wait(int keep) {
    std::vector<Copy>& pending = copies[current];
    size_t remaining = 0;
    for (const Copy& copy : pending) {
        if (copy.group >= committed[current] - keep) {
            pending[remaining++] = copy;
            continue;
        }
        if (copy.from)
            memcpy(copy.to, copy.from, copy.bytes);
        else
            memset(copy.to, 0, copy.bytes);
        if (launch.check) memory_end_copy(copy.to, copy.bytes, copy.site);
    }
    pending.resize(remaining);
}

}  // namespace emulator
