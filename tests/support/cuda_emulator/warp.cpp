// Warp operations. Each lane leaves its operands on its stack and waits; the lane that arrives last performs the
// operation for all lanes and makes them runnable.
#include <bit>
#include <cstring>

#include "runtime.h"

namespace emulator {

// The lanes that wait for one another: they have called an operation with the same mask.
struct Group {
    unsigned mask, arrived;
};

struct Warp {
    int first, lanes;
    unsigned exited;
    int group_count;
    Group groups[WARP];
};

static Warp warps[MAX_THREADS / WARP];

void warps_begin_block() {
    for (int first = 0; first < thread_count; first += WARP) {
        int lanes = thread_count - first < WARP ? thread_count - first : WARP;
        warps[first / WARP] = {first, lanes, 0, 0, {}};
    }
}

static unsigned existing(const Warp& warp) { return warp.lanes == WARP ? ~0u : (1u << warp.lanes) - 1; }

// ---- The operations ------------------------------------------------------------------------------------------------

static void shuffle_lanes(const Warp& warp, unsigned mask) {
    for (int lane = 0; lane < warp.lanes; lane++) {
        if (!(mask >> lane & 1)) continue;
        const WarpCall& call = threads[warp.first + lane].call;
        int source = call.argument;
        if (!((mask & existing(warp)) >> source & 1))
            fail("warp", warp.first + lane, threads[warp.first + lane].site,
                 "a shuffle reads lane %d, which %s", source,
                 mask >> source & 1 ? "the block does not have" : "its mask does not name");
        memcpy(call.output, threads[warp.first + source].call.input, static_cast<size_t>(call.bytes));
    }
}

static void vote(const Warp& warp, unsigned mask) {
    unsigned bits = 0;
    for (int lane = 0; lane < warp.lanes; lane++)
        if ((mask >> lane & 1) && threads[warp.first + lane].call.argument) bits |= 1u << lane;
    for (int lane = 0; lane < warp.lanes; lane++)
        if (mask >> lane & 1) *static_cast<unsigned*>(threads[warp.first + lane].call.output) = bits;
}

struct Operands {
    const unsigned *a, *b;
};

static float low(unsigned pair) { return std::bit_cast<float>(pair << 16); }
static float high(unsigned pair) { return std::bit_cast<float>(pair & 0xffff0000u); }

// D (16, 8) += A (16, 16) B (16, 8). Fragments of lane 4 g + t (PTX ISA, "Matrix fragments for mma.m16n8k16"):
//   a[0], a[1], a[2], a[3]: A at (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), and at the next column
//   b[0], b[1]: B at (2t, g), (2t + 8, g), and at the next row
//   d[0], d[1], d[2], d[3]: D at (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
static void mma(const Warp& warp) {
    float A[16][16], B[16][8], D[16][8];
    for (int lane = 0; lane < WARP; lane++) {
        const WarpCall& call = threads[warp.first + lane].call;
        auto operands = static_cast<const Operands*>(call.input);
        auto d = static_cast<const float*>(call.output);
        int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; i++) {
            A[g + i % 2 * 8][2 * t + i / 2 * 8] = low(operands->a[i]);
            A[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = high(operands->a[i]);
            D[g + i / 2 * 8][2 * t + i % 2] = d[i];
        }
        for (int i = 0; i < 2; i++) {
            B[2 * t + i * 8][g] = low(operands->b[i]);
            B[2 * t + i * 8 + 1][g] = high(operands->b[i]);
        }
    }
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) D[m][n] += A[m][k] * B[k][n];
    for (int lane = 0; lane < WARP; lane++) {
        auto d = static_cast<float*>(threads[warp.first + lane].call.output);
        for (int i = 0; i < 4; i++) d[i] = D[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
    }
    counters.mma++;
}

// Lane l receives row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1 of each matrix; transposed, column l / 4, these rows.
static void ldmatrix(const Warp& warp) {
    const unsigned char* rows[WARP];
    for (int lane = 0; lane < WARP; lane++) {
        int thread = warp.first + lane;
        unsigned address = *static_cast<const unsigned*>(threads[thread].call.input);
        if (address % 16)
            fail("misaligned", thread, threads[thread].site, "ldmatrix of a row at %u, no multiple of 16",
                 address);
        rows[lane] = shared_pointer(address, thread, threads[thread].site);
        if (launch.check) memory_read(rows[lane], 16, thread, threads[thread].site);
    }
    for (int matrix = 0; matrix < 4; matrix++) {
        unsigned taken[8] = {};  // for each 16 of the banks' 128 bytes: 1 + the address that uses them, 0 if unused
        bool conflict = false;
        for (int row = 0; row < 8; row++) {
            unsigned address = *static_cast<const unsigned*>(threads[warp.first + matrix * 8 + row].call.input);
            unsigned& other = taken[address / 16 % 8];
            conflict |= other && other != address + 1;
            other = address + 1;
        }
        counters.ldmatrix_phases++;
        counters.ldmatrix_conflicts += conflict;
    }
    for (int lane = 0; lane < WARP; lane++) {
        const WarpCall& call = threads[warp.first + lane].call;
        auto r = static_cast<unsigned*>(call.output);
        int along = lane / 4, across = 2 * (lane % 4);
        for (int matrix = 0; matrix < 4; matrix++) {
            const unsigned char* const* row = rows + matrix * 8;
            uint16_t pair[2];
            for (int i = 0; i < 2; i++)
                memcpy(pair + i, call.argument ? row[across + i] + 2 * along : row[along] + 2 * (across + i), 2);
            r[matrix] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
        }
    }
}

// ---- Waiting for the lanes of a mask -------------------------------------------------------------------------------

static void join(Operation operation, unsigned mask, const void* input, void* output, int argument, int bytes,
                 Site site) {
    Warp& warp = warps[current / WARP];
    int lane = current % WARP;
    const char* name = OPERATION_NAMES[int(operation)];
    threads[current].site = site;
    if (!(mask >> lane & 1))
        fail("warp", current, site, "%s whose mask %08x does not name the calling lane %d", name, mask, lane);
    if (mask & warp.exited)
        fail("warp", current, site, "%s whose mask %08x names lanes %08x, which have exited", name, mask,
             mask & warp.exited);
    if ((operation == Operation::mma || operation == Operation::ldmatrix) && warp.lanes < WARP)
        fail("warp", current, site, "%s in a warp of %d lanes", name, warp.lanes);
    int index = 0;
    while (index < warp.group_count && warp.groups[index].mask != mask) index++;
    Group& group = warp.groups[index];
    if (index == warp.group_count) {
        group = {mask, 0};
        warp.group_count++;
    }
    if (group.arrived) {
        const Thread& other = threads[warp.first + std::countr_zero(group.arrived)];
        if (other.call.operation != operation)
            fail("warp", current, site, "%s, where lane %d of the mask %08x is in %s, @c:%u@", name,
                 std::countr_zero(group.arrived), mask, OPERATION_NAMES[int(other.call.operation)],
                 other.site);
    }
    threads[current].call = {operation, mask, input, output, argument, bytes};
    group.arrived |= 1u << lane;
    unsigned named = mask & existing(warp);
    if (group.arrived != named) {
        wait_as(State::in_warp, site);
        return;
    }
    group = warp.groups[--warp.group_count];
    counters.warp_operations++;
    switch (operation) {
        case Operation::sync:
            if (launch.check) memory_warp_sync(current / WARP, named);
            break;
        case Operation::shuffle: shuffle_lanes(warp, mask); break;
        case Operation::ballot: vote(warp, mask); break;
        case Operation::mma: mma(warp); break;
        case Operation::ldmatrix: ldmatrix(warp); break;
    }
    for (unsigned others = named & ~(1u << lane); others; others &= others - 1)
        make_ready(warp.first + std::countr_zero(others));
}

void warp_thread_exits(int thread) {
    Warp& warp = warps[thread / WARP];
    warp.exited |= 1u << thread % WARP;
    for (int i = 0; i < warp.group_count; i++) {
        const Group& group = warp.groups[i];
        if (!(group.mask & warp.exited)) continue;
        int waiting = warp.first + std::countr_zero(group.arrived);
        fail("warp", waiting, threads[waiting].site, "%s whose mask %08x names lane %d, which exits instead",
             OPERATION_NAMES[int(threads[waiting].call.operation)], group.mask, thread % WARP);
    }
}

extern "C" {

int emulator_lane() { return current % WARP; }

void emulator_warp_sync(unsigned mask) { join(Operation::sync, mask, nullptr, nullptr, 0, 0, CALLED_FROM); }

void emulator_shuffle(unsigned mask, const void* input, void* output, int bytes, int source) {
    join(Operation::shuffle, mask, input, output, source, bytes, CALLED_FROM);
}

unsigned emulator_ballot(unsigned mask, int predicate) {
    unsigned bits;
    join(Operation::ballot, mask, nullptr, &bits, predicate, 0, CALLED_FROM);
    return bits;
}

void emulator_mma_bf16(float* d, const unsigned* a, const unsigned* b) {
    Operands operands{a, b};
    join(Operation::mma, ~0u, &operands, d, 0, 0, CALLED_FROM);
}

void emulator_ldmatrix(unsigned* r, unsigned address, bool transposed) {
    join(Operation::ldmatrix, ~0u, &address, r, transposed, 0, CALLED_FROM);
}

}  // extern "C"

}  // namespace emulator
