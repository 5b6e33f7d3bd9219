// What the parts of the emulator's runtime share: launch.cpp (blocks, threads, barriers), warp.cpp (what lanes do
// together), copies.cpp (shared addresses, asynchronous copies), memory.cpp (who may access what, and when).
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

// Where in the program something happens: an offset into its machine code, from which addr2line gets the line.
using Site = uint32_t;

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
    const char* barrier_file;  // where the barrier is that it waits in
    int barrier_line;
    Site site;  // of the barrier or the warp operation that it waits in
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

extern "C" unsigned char emulator_dynamic_shared[];

inline Site site_of(const void* return_address) {
    return static_cast<Site>(static_cast<const unsigned char*>(return_address) - launch.image - 1);
}
#define CALLED_FROM site_of(__builtin_return_address(0))  // by an instruction of the program

// Ends the launch with an error, from within a thread. In the text, @c:number@ stands for a site, @s:number@ for an
// offset into the program where static shared memory lies: emulator.py puts words in their place.
[[noreturn]] __attribute__((format(printf, 4, 5))) void fail(const char* kind, int thread, Site site,
                                                             const char* format, ...);

// launch.cpp, for warp.cpp
void wait_as(State state, Site site);
void make_ready(int thread);

// warp.cpp, for launch.cpp
void warps_begin_block();
void warp_thread_exits(int thread);

// copies.cpp, for the others
void copies_begin_block();
unsigned char* shared_pointer(unsigned address, int thread, Site site);

// memory.cpp, for the others
void memory_begin_launch();
void memory_begin_block();
void memory_begin_interval();
void memory_warp_sync(int warp, unsigned mask);

// Of checked programs: an access of shared or registered memory, as if the thread's code had made it; where an
// asynchronous copy to shared memory begins, and where it ends.
void memory_read(const void* address, size_t bytes, int thread, Site site);
void memory_begin_copy(const void* shared, size_t bytes, Site site);
void memory_end_copy(const void* shared, size_t bytes, Site site);

// launch.cpp, for memory.cpp
bool on_a_stack(const void* address);
Index block_index();

}  // namespace emulator
