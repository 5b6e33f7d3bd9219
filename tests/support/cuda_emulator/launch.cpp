// Runs the blocks of a grid one after another on one system thread. Each CUDA thread is a fiber: it runs until it waits
// at a barrier or in a warp operation; then the next runnable fiber continues.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "context.h"
#include "runtime.h"

extern "C" {
emulator::Index threadIdx, blockIdx, blockDim, gridDim;  // emulator.h declares them const
}

namespace emulator {

Counters counters;
Launch launch;
Thread threads[MAX_THREADS];
int thread_count;
int current;

static Context contexts[MAX_THREADS];  // saved contexts of waiting threads
static Context launcher, discarded;
static char error[2048];   // empty if there is no error
static int alive;          // number of threads of the block that have not exited

Index block_index() { return blockIdx; }

// ---- Stacks ---------------------------------------------------------------------------------------------------------

// Guard pages below each stack detect overflow. Stacks start at different offsets to avoid conflicts in the CPU cache.
constexpr size_t STACK = 256 * 1024;
constexpr size_t GUARD = 64 * 1024;
static unsigned char* stacks;
static std::vector<int> free_stacks;

static bool allocate_stacks() {
    if (stacks) return true;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED) return false;
    stacks = static_cast<unsigned char*>(memory);
    for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + i * STACK, GUARD, PROT_NONE);
    return true;
}

bool on_a_stack(const void* address) {
    auto p = static_cast<const unsigned char*>(address);
    return p >= stacks && p < stacks + MAX_THREADS * STACK;
}

// ---- Order ----------------------------------------------------------------------------------------------------------

static bool shuffled;
static uint64_t random_state;

static unsigned random_below(unsigned bound) {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<unsigned>((random_state * 0x2545f4914f6cdd1dull >> 32) * bound >> 32);
}

template <class T> static void shuffle(T* items, unsigned count) {
    for (unsigned i = count; i > 1; i--) std::swap(items[i - 1], items[random_below(i)]);
}

static int order[MAX_THREADS];  // order in which threads start, and continue after a barrier

// FIFO queue of runnable threads.
static int queue[MAX_THREADS];
static int queue_head, queue_length;

static void enqueue(int thread) { queue[(queue_head + queue_length++) % MAX_THREADS] = thread; }

static int dequeue() {
    int thread = queue[queue_head];
    queue_head = (queue_head + 1) % MAX_THREADS;
    queue_length--;
    return thread;
}

// ---- Threads --------------------------------------------------------------------------------------------------------

static void run_threads();

static void activate(int thread) {
    current = thread;
    threadIdx = threads[thread].index;
}

static void assign_stack(int thread) {
    int stack = threads[thread].stack = free_stacks.back();
    free_stacks.pop_back();
    unsigned char* top = stacks + (stack + 1) * STACK - stack % 61 * 192;
    begin_context(contexts[thread], stacks + stack * STACK + GUARD, top, run_threads);
}

[[noreturn]] static void end_launch() {
    switch_context(discarded, launcher);
    __builtin_unreachable();
}

[[noreturn]] static void deadlock() {
    char text[1024];
    size_t used = 0;
    int shown = 0, example = current;
    bool listed[MAX_THREADS] = {};
    for (int i = 0; i < thread_count && shown < 4; i++) {  // group threads that wait at the same place
        Thread& first = threads[i];
        if (listed[i] || (first.state != State::at_barrier && first.state != State::in_warp)) continue;
        if (!shown) example = i;
        int waiting = 0;
        for (int k = i; k < thread_count; k++) {
            if (threads[k].state != first.state || threads[k].site != first.site) continue;
            listed[k] = true;
            waiting++;
        }
        const char* what = first.state == State::at_barrier ? "a barrier" : OPERATION_NAMES[int(first.call.operation)];
        used += static_cast<size_t>(snprintf(text + used, sizeof text - used, "%s%d from (%u,%u,%u) on in %s, @c:%u@",
                                             shown++ ? "; " : "", waiting, first.index.x, first.index.y, first.index.z,
                                             what, first.site));
    }
    fail("deadlock", example, threads[example].site, "no thread can go on; these wait: %s", text);
}

static void run_next(Context& from) {
    if (!queue_length) deadlock();
    int next = dequeue();
    if (threads[next].state == State::fresh) assign_stack(next);
    counters.switches++;
    activate(next);
    switch_context(from, contexts[next]);
}

void wait_as(State state, Site site) {
    threads[current].state = state;
    threads[current].site = site;
    run_next(contexts[current]);
}

void make_ready(int thread) {
    threads[thread].state = State::ready;
    enqueue(thread);
}

void fail(const char* kind, int thread, Site site, const char* format, ...) {
    Index t = threads[thread].index, b = blockIdx;
    int used = snprintf(error, sizeof error, "%s: %s, block (%u,%u,%u), thread (%u,%u,%u), @c:%u@: ", kind,
                        launch.kernel, b.x, b.y, b.z, t.x, t.y, t.z, site);
    va_list values;
    va_start(values, format);
    vsnprintf(error + used, sizeof error - static_cast<size_t>(used), format, values);
    va_end(values);
    end_launch();
}

// ---- Barriers -------------------------------------------------------------------------------------------------------

static struct {
    int arrived, holding;  // number of threads, and of those whose predicate holds
    int first;             // the thread that arrived first
    int all, any, count;   // results of the last barrier
} barrier;

static void release_barrier() {
    barrier.all = barrier.holding == barrier.arrived;
    barrier.any = barrier.holding > 0;
    barrier.count = barrier.holding;
    barrier.arrived = barrier.holding = 0;
    counters.barriers++;
    if (launch.check) memory_begin_interval();
    if (shuffled) shuffle(order, static_cast<unsigned>(thread_count));
    for (int i = 0; i < thread_count; i++)
        if (threads[order[i]].state == State::at_barrier) make_ready(order[i]);
}

extern "C" int emulator_barrier(int predicate, int* any, int* count, const char* file, int line) {
    Site site = CALLED_FROM;
    if (!barrier.arrived) barrier.first = current;
    threads[current].barrier_file = file;
    threads[current].barrier_line = line;
    Thread& first = threads[barrier.first];
    if (first.barrier_line != line || strcmp(first.barrier_file, file))
        fail("divergent barrier", current, site, "thread (%u,%u,%u) waits at another barrier, @c:%u@", first.index.x,
             first.index.y, first.index.z, first.site);
    barrier.arrived++;
    barrier.holding += predicate != 0;
    if (barrier.arrived == alive)
        release_barrier();
    else
        wait_as(State::at_barrier, site);
    *any = barrier.any;
    *count = barrier.count;
    return barrier.all;
}

// ---- Blocks ---------------------------------------------------------------------------------------------------------

// The function that a fiber runs: one thread, then, on the same stack, following threads that have not started.
static void run_threads() {
    for (;;) {
        Thread& thread = threads[current];
        thread.state = State::ready;
        launch.call(launch.slots);
        thread.state = State::done;
        warp_thread_exits(current);
        alive--;
        if (alive && barrier.arrived == alive) release_barrier();
        if (queue_length && threads[queue[queue_head]].state == State::fresh) {
            int next = dequeue();
            threads[next].stack = thread.stack;
            activate(next);
            continue;
        }
        free_stacks.push_back(thread.stack);
        if (!alive) end_launch();
        run_next(discarded);
    }
}

static bool run_block() {
    for (int i = 0; i < thread_count; i++) threads[i].state = State::fresh;
    alive = thread_count;
    barrier = {};
    queue_head = queue_length = 0;
    if (shuffled) shuffle(order, static_cast<unsigned>(thread_count));
    for (int i = 0; i < thread_count; i++) enqueue(order[i]);
    warps_begin_block();
    copies_begin_block();
    memory_begin_block();
    run_next(launcher);
    return !error[0];
}

extern "C" const char* emulator_run(const Launch* parameters) {
    launch = *parameters;
    blockDim = {launch.block[0], launch.block[1], launch.block[2]};
    gridDim = {launch.grid[0], launch.grid[1], launch.grid[2]};
    thread_count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    error[0] = 0;
    free_stacks.clear();  // a failed launch does not return its stacks
    for (int i = MAX_THREADS - 1; i >= 0; i--) free_stacks.push_back(i);
    if (!allocate_stacks()) return "launch: no memory for the threads' stacks";
    for (unsigned i = 0; i < static_cast<unsigned>(thread_count); i++) {
        threads[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
        order[i] = static_cast<int>(i);
    }
    uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
    std::vector<uint64_t> block_order(shuffled ? blocks : 0);
    for (uint64_t i = 0; i < block_order.size(); i++) block_order[i] = i;
    if (shuffled) shuffle(block_order.data(), static_cast<unsigned>(blocks));
    memory_begin_launch();
    for (uint64_t i = 0; i < blocks; i++) {
        uint64_t block = shuffled ? block_order[i] : i;
        blockIdx.x = static_cast<unsigned>(block % gridDim.x);
        blockIdx.y = static_cast<unsigned>(block / gridDim.x % gridDim.y);
        blockIdx.z = static_cast<unsigned>(block / gridDim.x / gridDim.y);
        if (!run_block()) return error;
    }
    return nullptr;
}

extern "C" void emulator_schedule(int enabled, uint64_t seed) {
    shuffled = enabled != 0;
    random_state = seed * 0x9e3779b97f4a7c15ull + 88172645463325252ull;
}

extern "C" void emulator_counters(Counters* values) {
    *values = counters;
    counters = {};
}

}  // namespace emulator
