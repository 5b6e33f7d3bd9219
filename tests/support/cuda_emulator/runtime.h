// Declarations shared by the parts of the emulator's runtime: launch.cpp (blocks, threads, barriers), warp.cpp (warp
// operations), copies.cpp (shared addresses, asynchronous copies) and memory.cpp (checks of memory accesses).
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

// A code location: an offset into the program's machine code, which addr2line converts to a source line.
using Site = uint32_t;

enum class State : uint8_t { fresh, ready, at_barrier, in_warp, done };

enum class Operation : uint8_t { sync, shuffle, ballot, mma, ldmatrix };
constexpr const char* OPERATION_NAMES[] = {"__syncwarp", "a shuffle", "a vote", "mma", "ldmatrix"};

// One lane's operands of a warp operation. Input and output are on the lane's stack, and the lane that arrives last
// accesses them.
struct WarpCall {
    Operation operation;
    unsigned mask;
    const void* input;
    void* output;
    int argument;  // shuffle: the source lane; ballot: the predicate; ldmatrix: transposed
    int bytes;     // shuffle: size of the value
};

struct Thread {
    Index index;
    State state;
    int stack;
    const char* barrier_file;  // location of the barrier at which the thread waits
    int barrier_line;
    Site site;  // of the barrier or warp operation in which the thread waits
    WarpCall call;
};

struct Launch {
    const char* kernel;
    void (*call)(const unsigned long long*);
    const unsigned long long* slots;
    unsigned grid[3], block[3];
    unsigned dynamic_shared;
    int check;
    unsigned char *image, *static_shared, *image_end;  // the program in memory; static shared memory is at its end
};

struct Counters {  // emulator.py lists the names in the same order
    unsigned long long switches, barriers, warp_operations, mma, ldmatrix_phases, ldmatrix_conflicts, accesses;
};

extern Counters counters;
extern Launch launch;
extern Thread threads[MAX_THREADS];
extern int thread_count;
extern int current;  // the running thread

extern "C" unsigned char emulator_dynamic_shared[];

inline Site site_of(const void* return_address) {
    return static_cast<Site>(static_cast<const unsigned char*>(return_address) - launch.image - 1);
}
#define CALLED_FROM site_of(__builtin_return_address(0))  // the program's call of this function

// End the launch with an error; called from a thread. In the text, @c:number@ denotes a site and @s:number@ an offset
// into the program, in static shared memory; emulator.py replaces them by source lines and variable names.
[[noreturn]] __attribute__((format(printf, 4, 5))) void fail(const char* kind, int thread, Site site,
                                                             const char* format, ...);

// launch.cpp, used by warp.cpp
void wait_as(State state, Site site);
void make_ready(int thread);

// warp.cpp, used by launch.cpp
void warps_begin_block();
void warp_thread_exits(int thread);

// copies.cpp, used by launch.cpp and warp.cpp
void copies_begin_block();
unsigned char* shared_pointer(unsigned address, int thread, Site site);

// memory.cpp, used by the other files
void memory_begin_launch();
void memory_begin_block();
void memory_begin_interval();
void memory_warp_sync(int warp, unsigned mask);

// For checked programs: check an access to shared or registered memory like one of the thread's own; begin and end an
// asynchronous copy to shared memory.
void memory_read(const void* address, size_t bytes, int thread, Site site);
void memory_begin_copy(const void* shared, size_t bytes, Site site);
void memory_end_copy(const void* shared, size_t bytes, Site site);

// launch.cpp, used by memory.cpp
bool on_a_stack(const void* address);
Index block_index();

}  // namespace emulator
