// What the three parts of the emulator's runtime share: launch.cpp (blocks, threads, barriers), warp.cpp (what lanes of
// a warp do together), memory.cpp (shared and registered memory, and the checks of accesses).
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr int MAX_THREADS = 1024;
constexpr int WARP = 32;
constexpr size_t MAX_DYNAMIC_SHARED = 227 * 1024;

struct Index {
    unsigned x, y, z;
};

// Where in the source something happens: a line, or an offset into the program's machine code, for addr2line.
struct Site {
    uint32_t code;
    static Site line(int number) { return {0x80000000u | static_cast<uint32_t>(number)}; }
    static Site offset(uintptr_t bytes) { return {static_cast<uint32_t>(bytes)}; }
};

enum class State : uint8_t { fresh, ready, at_barrier, in_warp, done };

enum class Operation : uint8_t { sync, shuffle, ballot, mma, ldmatrix };
constexpr const char* OPERATION_NAMES[] = {"__syncwarp", "a shuffle", "a vote", "mma", "ldmatrix"};

// One lane's part in an operation of its warp. Input and output lie on its stack, where the lane that arrives last
// finds them.
struct WarpCall {
    Operation operation;
    unsigned mask;
    const void* input;
    void* output;
    int argument;  // shuffle: the source lane; ballot: the predicate; ldmatrix: transposed
    int bytes;     // shuffle: of the value
};

struct Thread {
    Index index;
    State state;
    int stack;
    int line;  // of the barrier or the warp operation that it waits in
    WarpCall call;
};

struct Launch {
    const char* kernel;
    void (*call)(const unsigned long long*);
    const unsigned long long* slots;
    unsigned grid[3], block[3];
    unsigned dynamic_shared;
    int check;
    unsigned char *image, *static_shared, *image_end;  // the program in memory: static shared memory is its end
};

struct Counters {  // read by Python: keep emulator.py's names in this order
    unsigned long long switches, barriers, warp_operations, mma, ldmatrix_phases, ldmatrix_conflicts, accesses;
};

extern Counters counters;
extern Launch launch;
extern Thread threads[MAX_THREADS];
extern int thread_count;
extern int current;  // the thread that runs

// Ends the launch with an error, from within a thread. In the text, @c:number@ stands for a Site, @s:number@ for an
// offset into the program where static shared memory lies: emulator.py puts words in their place.
[[noreturn]] __attribute__((format(printf, 4, 5))) void fail(const char* kind, int thread, Site site, const char* format,
                                                             ...);

// launch.cpp, for warp.cpp
void wait_as(State state, int line);
void make_ready(int thread);

// warp.cpp, for launch.cpp
void warps_begin_block();
void warp_thread_exits(int thread);

// memory.cpp, for the others
void memory_begin_launch();
void memory_begin_block();
void memory_begin_interval();
void memory_warp_sync(int warp, unsigned mask);
void memory_read_shared(int thread, const void* address, int bytes, int line);

// launch.cpp, for memory.cpp
bool on_a_stack(const void* address);
Index block_index();

}  // namespace emulator
