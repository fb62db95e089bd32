/*
The engine of the CPU device: it runs the grid of a kernel launch. cu2cpp turns

    __global__ void k(float* out, int n) { BODY }
        into a function whose body is run_free or run_fibers of a lambda
    k<<<grid, block>>>(out, n)
        into (configure(grid, block), k(out, n))

Blocks are spread over the workers (parallel.h). The threads of a block run in one of two ways:
- run_free: a kernel whose threads neither synchronise nor share memory is a plain loop over the
  threads, which vectorises because the indices are plain parameters of the lambda.
- run_fibers: every thread runs until it has to wait for others (__syncthreads, a warp operation);
  then its stack is put aside and another thread of the block continues. A block that never waits
  runs on one stack without a single switch.

A collective costs one switch a lane: every lane leaves its value and goes to sleep, the last one to
arrive computes the result of all of them, and they resume in lane order.
*/
#pragma once

#include <inttypes.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <map>
#include <string>
#include <type_traits>

#include "parallel.h"
#include "vector_types.h"

#if defined(CPU_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CPU_TSAN)
#include <sanitizer/tsan_interface.h>
// in ThreadSanitizer's runtime, but in none of its headers
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif
#if defined(__x86_64__) && !defined(CPU_UCONTEXT)
#define CPU_HAND_WRITTEN_SWITCH 1
#else
#include <ucontext.h>
#endif

// what cu2cpp writes as the parameters of a kernel's body
#define CPU_INDICES [[maybe_unused]] const uint3 threadIdx, [[maybe_unused]] const uint3 blockIdx, \
                    [[maybe_unused]] const dim3 blockDim, [[maybe_unused]] const dim3 gridDim
#define CPU_FREE_INDICES CPU_INDICES, [[maybe_unused]] const bool cpu_inside
#define CPU_NO_GUARD [](CPU_INDICES) { return false; }

// CPU_ENGINE: the engine's own memory is no business of ThreadSanitizer. A kernel's body is inlined
// into the loop over threads, except under ThreadSanitizer, where it would lose its instrumentation
// by that
#if defined(CPU_TSAN)
#define CPU_ENGINE __attribute__((no_sanitize_thread))
#define CPU_INLINING __attribute__((noinline))
#else
#define CPU_ENGINE
#define CPU_INLINING __attribute__((always_inline))
#endif
// CPU_BODY() or CPU_BODY(mutable) comes before the { of a body. The compilers want the two in
// another order
#if defined(__clang__)
#define CPU_BODY(mutability) CPU_INLINING mutability
#else
#define CPU_BODY(mutability) mutability CPU_INLINING
#endif
#if defined(__clang__)
#pragma clang diagnostic ignored "-Wpass-failed" // not every loop over threads can be vectorised
#define CPU_INDEPENDENT_THREADS _Pragma("clang loop vectorize(assume_safety)")
#define CPU_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CPU_INDEPENDENT_THREADS _Pragma("GCC ivdep")
#define CPU_UNROLL _Pragma("GCC unroll 16")
#endif

// The loops over the threads of free kernels use all of AVX-512. The rest of the program is
// compiled for half of it: there vectors are short, and a wide load of what two narrow stores have
// just written stalls
#if defined(__AVX512F__) && !defined(__clang__)
#define CPU_WIDE __attribute__((target("prefer-vector-width=512")))
#else
#define CPU_WIDE
#endif

namespace cpu {

// ----------------------------------------------------------------------------
// Limits of the device: those of sm_90

constexpr unsigned WARP_SIZE = 32;
constexpr unsigned MAX_THREADS = 1024;               // of a block
constexpr unsigned MAX_WARPS = MAX_THREADS / WARP_SIZE;
constexpr unsigned MAX_BLOCK_Z = 64;
constexpr unsigned MAX_GRID_X = 2147483647, MAX_GRID_YZ = 65535;
// also of dynamic shared memory, unless cudaFuncSetAttribute allows more
constexpr size_t MAX_STATIC_SHARED = 48 << 10;
constexpr size_t MAX_SHARED = 227 << 10;             // static and dynamic together
constexpr size_t ARENA_BYTES = 320 << 10;            // MAX_SHARED, red zones and rounding

// the codes of cudaError_t that a launch can leave behind
enum { LAUNCH_OK = 0, LAUNCH_INVALID_VALUE = 1, LAUNCH_INVALID_CONFIGURATION = 9 };
inline thread_local int last_error = LAUNCH_OK;

// ----------------------------------------------------------------------------
// Schedules: the order in which blocks and threads run. A correct kernel gives the same bits under
// each

enum ScheduleKind { NATURAL, REVERSED, RANDOM, LAST_IN };
struct Schedule {
    ScheduleKind kind;
    uint64_t seed;
};

inline Schedule read_schedule() {
    const char* text = getenv("CPU_SCHEDULE");
    if (text == NULL || *text == '\0' || strcmp(text, "natural") == 0) {
        return Schedule{NATURAL, 0};
    }
    if (strcmp(text, "reversed") == 0) { return Schedule{REVERSED, 0}; }
    if (strcmp(text, "last-in") == 0) { return Schedule{LAST_IN, 0}; }
    if (strncmp(text, "random:", 7) == 0) {
        char* end;
        const uint64_t seed = strtoull(text + 7, &end, 10);
        if (end != text + 7 && *end == '\0') { return Schedule{RANDOM, seed}; }
    }
    die("CPU_SCHEDULE is \"%s\"; set it to natural, reversed, last-in or random:SEED with a number "
        "as SEED",
        text);
}

inline const Schedule& schedule() {
    static const Schedule value = read_schedule();
    return value;
}

// splitmix64
CPU_ENGINE inline uint64_t next_random(uint64_t* state) {
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The order of n blocks without a table: i -> (i * step + start) mod n, a permutation when step and
// n have no common divisor
struct Order {
    uint64_t n, start, step;
};

inline uint64_t common_divisor(uint64_t a, uint64_t b) {
    while (b != 0) {
        const uint64_t r = a % b;
        a = b;
        b = r;
    }
    return a;
}

inline Order block_order(uint64_t n, uint64_t* random) {
    if (schedule().kind == REVERSED) { return Order{n, n - 1, n - 1}; } // n - 1 is -1 mod n
    if (schedule().kind != RANDOM) { return Order{n, 0, 1}; }
    Order order = {n, next_random(random) % n, next_random(random) % n};
    while (common_divisor(order.step, n) != 1) { order.step++; }
    return order;
}

inline uint64_t position(const Order& order, uint64_t i) {
    return (uint64_t)(((unsigned __int128)i * order.step + order.start) % order.n);
}

// the order of the threads of a block
inline void thread_order(unsigned short* order, unsigned n, uint64_t* random) {
    for (unsigned i = 0; i < n; i++) {
        order[i] = (unsigned short)(schedule().kind == REVERSED ? n - 1 - i : i);
    }
    if (schedule().kind != RANDOM) { return; }
    for (unsigned i = n; i > 1; i--) {
        const unsigned j = (unsigned)(next_random(random) % i);
        const unsigned short swap = order[i-1];
        order[i-1] = order[j];
        order[j] = swap;
    }
}

// ----------------------------------------------------------------------------
// Launches

struct Launch {
    const char* kernel;
    dim3 grid, block;
    size_t dynamic_shared;
    unsigned threads; // of a block
    uint64_t blocks;  // of the grid
};

// CPU_LAUNCHES=FILE counts launches. When the program ends, FILE gets a line for each kernel that ran,
// in the order of names: the kernel, its launches, the blocks and the threads of all of them together
struct LaunchCounts {
    struct Count {
        uint64_t launches, blocks, threads;
    };
    const char* path = getenv("CPU_LAUNCHES");
    std::map<std::string, Count> kernels;
    std::mutex mutex;

    void add(const Launch& launch) {
        if (path == NULL) { return; }
        std::lock_guard<std::mutex> lock(mutex);
        Count& count = kernels[launch.kernel];
        count.launches++;
        count.blocks += launch.blocks;
        count.threads += launch.blocks * launch.threads;
    }

    ~LaunchCounts() {
        if (path == NULL) { return; }
        FILE* file = fopen(path, "w");
        if (file == NULL) { die("CPU_LAUNCHES is \"%s\", which cannot be written: %m", path); }
        for (const auto& [kernel, c] : kernels) {
            fprintf(file, "%s %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", kernel.c_str(), c.launches,
                    c.blocks, c.threads);
        }
        if (fclose(file) != 0) { die("CPU_LAUNCHES is \"%s\", which cannot be written: %m", path); }
    }
};
inline LaunchCounts launch_counts;

// what <<<...>>> leaves for the kernel that is called next
struct Pending {
    enum { NOTHING, LAUNCH, SET_MAX_DYNAMIC_SHARED } what;
    dim3 grid, block;
    size_t shared; // of the launch, or the limit to set
};
inline thread_local Pending pending;
inline thread_local const char* running_kernel = NULL; // on this thread of the operating system

inline void configure(dim3 grid, dim3 block, size_t dynamic_shared = 0, const void* stream = NULL) {
    (void)stream; // streams run in the order in which the host calls
    pending = Pending{Pending::LAUNCH, grid, block, dynamic_shared};
}

// What a kernel does first: takes its configuration. False when there is nothing to run
inline bool begin_launch(Launch* launch, const char* kernel, size_t* max_dynamic_shared) {
    const Pending p = pending;
    pending.what = Pending::NOTHING;
    if (p.what == Pending::SET_MAX_DYNAMIC_SHARED) {
        *max_dynamic_shared = p.shared;
        return false;
    }
    if (p.what == Pending::NOTHING) {
        die("kernel %s was called like a function; launch it with %s<<<grid, block>>>(...)", kernel,
            kernel);
    }
    if (running_kernel != NULL) {
        die("kernel %s was launched from device code; launch it from the host", kernel);
    }
    const dim3 g = p.grid, b = p.block;
    const uint64_t threads = (uint64_t)b.x * b.y * b.z;
    const bool valid = b.x <= MAX_THREADS && b.y <= MAX_THREADS && b.z <= MAX_BLOCK_Z &&
                       threads > 0 && threads <= MAX_THREADS && g.x > 0 && g.y > 0 && g.z > 0 &&
                       g.x <= MAX_GRID_X && g.y <= MAX_GRID_YZ && g.z <= MAX_GRID_YZ;
    if (!valid || p.shared > *max_dynamic_shared) {
        last_error = valid ? LAUNCH_INVALID_VALUE : LAUNCH_INVALID_CONFIGURATION;
        return false;
    }
    *launch = Launch{kernel, g, b, p.shared, (unsigned)threads, (uint64_t)g.x * g.y * g.z};
    launch_counts.add(*launch);
    return true;
}

// CPU_PROTECT=1: may the host not touch device memory, as on a GPU?
inline bool protects() {
    static const bool value = [] {
        const char* text = getenv("CPU_PROTECT");
        if (text == NULL || *text == '\0' || strcmp(text, "0") == 0) { return false; }
        if (strcmp(text, "1") == 0) { return true; }
        die("CPU_PROTECT is \"%s\"; set it to 1, so that the host cannot touch device memory, or to 0",
            text);
    }();
    return value;
}

// Whatever works on device memory (a launch, a copy, a fill, a library's call) holds one of these:
// under CPU_PROTECT=1 the memory is accessible while any thread holds one. cuda_runtime.h has the
// memory, and defines these functions
void open_memory();
void close_memory();
struct DeviceWork {
    DeviceWork() { if (protects()) { open_memory(); } }
    ~DeviceWork() { if (protects()) { close_memory(); } }
    DeviceWork(const DeviceWork&) = delete;
};
// ends the program when the address lies in device memory; also in cuda_runtime.h
void die_of_host_access(uintptr_t address);

#if defined(CPU_ASAN) || defined(CPU_TSAN)
constexpr bool SANITIZED = true; // sanitizers have handlers that say more of what a kernel does
#else
constexpr bool SANITIZED = false;
#endif
inline struct sigaction fault_action_before;

// A kernel that leaves all mapped memory would end without a word, and so would a host that touches
// protected memory. The handler has a stack of its own for each worker, for the fault may be that a
// thread's stack is full
inline void on_fault(int number, siginfo_t* info, void*) {
    if (running_kernel != NULL && !SANITIZED) {
        die("kernel %s accessed address %p, where nothing is: an index out of bounds, or local "
            "variables of more than 64 KiB; `make asan` finds the line",
            running_kernel, info->si_addr);
    }
    if (running_kernel == NULL && protects()) { die_of_host_access((uintptr_t)info->si_addr); }
    sigaction(number, &fault_action_before, NULL); // not ours: the access faults again after this
}

inline void catch_faults() {
    static const bool done = [] {
        if (SANITIZED && !protects()) { return true; }
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGBUS, &action, NULL);
        sigaction(SIGSEGV, &action, &fault_action_before);
        return true;
    }();
    (void)done;
}

inline uint3 block_index(dim3 grid, uint64_t i) {
    if (grid.y == 1 && grid.z == 1) { return uint3{(unsigned)i, 0, 0}; }
    return uint3{(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                 (unsigned)(i / grid.x / grid.y)};
}

inline uint3 thread_index(dim3 block, unsigned i) {
    if (block.y == 1 && block.z == 1) { return uint3{i, 0, 0}; }
    return uint3{i % block.x, i / block.x % block.y, i / block.x / block.y};
}

// One thread. A body that changes the kernel's parameters is a mutable lambda: each thread changes
// its own copy
template <class Body, class... Inside>
CPU_ENGINE __attribute__((always_inline)) inline void run_thread(const Body& body, uint3 thread,
                                                                 uint3 block, dim3 block_dim,
                                                                 dim3 grid_dim, Inside... inside) {
    if constexpr (std::is_invocable_v<const Body&, uint3, uint3, dim3, dim3, Inside...>) {
        body(thread, block, block_dim, grid_dim, inside...);
    } else {
        Body own = body;
        own(thread, block, block_dim, grid_dim, inside...);
    }
}

// cudaFuncSetAttribute sets it. Every kernel, and every instance of a template, has a body of its
// own type
template <class Body> inline size_t max_dynamic_shared = MAX_STATIC_SHARED;

// Spreads run(first block, last block + 1) over the workers. Small blocks go in chunks: a task
// costs some 100 ns. Only the natural schedule runs on several workers; the others say in which
// order the blocks come
template <class Run> void spread_blocks(const Launch& launch, uint64_t inline_below, Run run) {
    const uint64_t n = launch.blocks;
    if (n == 1 || schedule().kind != NATURAL || n * launch.threads < inline_below) {
        run(0, n);
        return;
    }
    uint64_t chunk = n / ((uint64_t)workers() * 8);
    chunk = workers() == 1 ? n : chunk < 1 ? 1 : chunk;
    parallel_for((n + chunk - 1) / chunk,
                 [&](size_t i) { run(i * chunk, n < (i + 1) * chunk ? n : (i + 1) * chunk); });
}

// ----------------------------------------------------------------------------
// Free kernels

// What the compiler may take for granted of a grid that is not huge: then the sum in blockIdx.x *
// blockDim.x + threadIdx.x does not wrap around, and neighbouring threads access neighbouring
// memory
constexpr uint64_t MAX_FLAT_INDEX = INT32_MAX - MAX_THREADS;
__attribute__((always_inline)) inline void assume_no_wrap(uint3 b, dim3 block) {
    if (block.x > MAX_THREADS || block.y > MAX_THREADS || block.z > MAX_BLOCK_Z) {
        __builtin_unreachable();
    }
    if (b.x * block.x > MAX_FLAT_INDEX || (uint64_t)b.x * block.x > MAX_FLAT_INDEX) {
        __builtin_unreachable();
    }
}

// The copies of guard and body are what lets the compiler vectorise: a local that nobody else can
// see cannot change when the kernel stores through its pointers
template <class Guard, class Body>
CPU_WIDE __attribute__((noinline)) void free_blocks(const Launch& launch, const Guard& shared_guard,
                                                    const Body& shared_body, uint64_t first,
                                                    uint64_t last) {
    const Guard guard = shared_guard;
    const Body body = shared_body;
    const dim3 grid = launch.grid, block = launch.block;
    for (uint64_t i = first; i < last; i++) {
        const uint3 b = block_index(grid, i);
        assume_no_wrap(b, block);
        for (unsigned z = 0; z < block.z; z++) {
            for (unsigned y = 0; y < block.y; y++) {
                // a guard is a comparison of what grows evenly from thread to thread: what holds
                // for both ends holds between
                const bool inside = guard(uint3{0, y, z}, b, block, grid) &&
                                    guard(uint3{block.x - 1, y, z}, b, block, grid);
                // threads that do not synchronise may not depend on one another
                if (inside) {
                    CPU_INDEPENDENT_THREADS
                    for (unsigned x = 0; x < block.x; x++) {
                        run_thread(body, uint3{x, y, z}, b, block, grid, true);
                    }
                } else {
                    CPU_INDEPENDENT_THREADS
                    for (unsigned x = 0; x < block.x; x++) {
                        run_thread(body, uint3{x, y, z}, b, block, grid, false);
                    }
                }
            }
        }
    }
}

// one thread at a time: for the other schedules, and for huge grids
template <class Guard, class Body>
__attribute__((noinline)) void free_blocks_in_order(const Launch& launch, const Guard&,
                                                    const Body& body, uint64_t first,
                                                    uint64_t last) {
    // only the random schedule, which has one worker, changes it
    static uint64_t random = schedule().seed;
    const Order blocks = block_order(launch.blocks, &random);
    unsigned short threads[MAX_THREADS];
    for (uint64_t i = first; i < last; i++) {
        const uint3 b = block_index(launch.grid, position(blocks, i));
        thread_order(threads, launch.threads, &random);
        for (unsigned t = 0; t < launch.threads; t++) {
            run_thread(body, thread_index(launch.block, threads[t]), b, launch.block, launch.grid,
                       false);
        }
    }
}

// guard: the condition of the `if` that keeps a kernel's last threads from running over the end,
// CPU_NO_GUARD when there is none. Where it holds for all threads of a row, the body runs without
// it: masks would take the compiler half of its speed
template <class Guard, class Body>
void run_free(const char* kernel, const Guard& guard, const Body& body) {
    Launch launch;
    if (!begin_launch(&launch, kernel, &max_dynamic_shared<Body>)) { return; }
    const bool vectorise =
        schedule().kind == NATURAL && (uint64_t)launch.grid.x * launch.block.x <= MAX_FLAT_INDEX;
    auto run = vectorise ? free_blocks<Guard, Body> : free_blocks_in_order<Guard, Body>;
    DeviceWork work;
    // below some thousand threads the workers take longer to wake than one of them to do it all
    catch_faults();
    spread_blocks(launch, 4096, [&](uint64_t first, uint64_t last) {
        running_kernel = kernel;
        run(launch, guard, body, first, last);
        running_kernel = NULL;
    });
}

// ----------------------------------------------------------------------------
// Fibers: a stack each, and a switch from one to another

#if defined(CPU_ASAN) || defined(CPU_TSAN)
constexpr size_t STACK_BYTES = 256 << 10; // red zones around every local array
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif
// below each stack: running over it is a fault, not a neighbour's wrong result
constexpr size_t GUARD_BYTES = 4096;
#if defined(CPU_TSAN)
// ThreadSanitizer sees every CUDA thread as a thread of its own, with a stack of its own. Blocks of
// one launch are not ordered, so each of the next three blocks has other threads (a race of one
// thread index between blocks i and i + 3 is missed, one between i and i + 1, i + 2, i + 4 is
// found), and each of the next 64 other shared memory
constexpr unsigned THREAD_SETS = 3, ARENAS = 64, MAX_FIBERS = THREAD_SETS * MAX_THREADS;
#else
// one more: a fiber that returns runs until its successor does
constexpr unsigned ARENAS = 1, MAX_FIBERS = MAX_THREADS + 1;
#endif

struct Warp;
struct Fiber {
#if defined(CPU_HAND_WRITTEN_SWITCH)
    void* stack_pointer; // while it does not run; NULL: it has not begun
#else
    ucontext_t context;
#endif
    char* stack;         // lowest address
    unsigned thread;     // which thread of the block runs on it
    unsigned lane;       // thread % WARP_SIZE
    Warp* warp;
    uint3 index;         // threadIdx
#if defined(CPU_ASAN)
    void* fake_stack;
#endif
#if defined(CPU_TSAN)
    void* tsan_thread;
#endif
};

// 16 bytes that a lane hands in, or gets, in a warp operation. A vector type: it travels in one
// register
typedef unsigned char Value __attribute__((vector_size(16)));
typedef void (*Combine)(Warp* warp, uint32_t lanes);

struct Warp {
    uint32_t waiting;              // lanes that wait in a warp operation
    uint32_t exited;               // lanes whose thread has returned, or was never there
    uint32_t mask[WARP_SIZE];      // of a waiting lane: whom it waits for
    Combine combine[WARP_SIZE];    // and what is to be computed
    unsigned argument[WARP_SIZE];  // and with which argument
    Fiber* fiber[WARP_SIZE];
    Value in[WARP_SIZE], out[WARP_SIZE];
};

// a __shared__ variable of the block that runs; site is the address of a static beside its
// declaration
struct SharedVariable {
    const void* site;
    void* storage;
};
constexpr unsigned MAX_SHARED_VARIABLES = 64;

// Everything that a worker needs to run a block
struct Worker {
    const Launch* launch;
    void (*run)(Worker* w, const void* body);
    const void* body;
    ScheduleKind kind;
    uint64_t random;

    uint3 block;                       // blockIdx
    // of the block: all, the first that has not started, how many have returned
    unsigned threads, next, done;
    unsigned short order[MAX_THREADS]; // in which they start, unless the schedule is natural

    Fiber* current;
    // a ring; head and tail count on, and are taken modulo its size
    Fiber* ready[MAX_THREADS];
    unsigned head, tail;
    // fibers without a thread, the last used on top: its stack is in the cache
    Fiber* idle[MAX_FIBERS];
    unsigned num_idle;

    Fiber* at_barrier[MAX_THREADS];
    unsigned num_at_barrier, votes, barrier_result;
    int barrier_kind;

    char* arenas;                      // ARENAS arenas of shared memory
    // that of the block: first the dynamic part, then the static variables
    char* arena;
    size_t arena_used, static_shared;
    SharedVariable shared[MAX_SHARED_VARIABLES];
    unsigned num_shared;

    Fiber host;                        // the context that runs the grid
    Fiber fibers[MAX_FIBERS];
    Warp warps[MAX_WARPS];
#if defined(CPU_ASAN)
    const void* host_stack;
    size_t host_stack_bytes;
#endif
#if defined(CPU_TSAN)
    unsigned thread_set, barrier_number;
    // addresses that stand for an event: what was released to one happens before what acquires it
    char launched, finished, barrier_event[2], warp_event[MAX_THREADS];
#endif
};
inline thread_local Worker* worker = NULL;

CPU_ENGINE inline void fiber_main() __asm__("cpu_fiber_main");

#if defined(CPU_HAND_WRITTEN_SWITCH)
#define CPU_SAVE_STACK \
    "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t" \
    "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
// Saves what the ABI wants preserved on the stack of the one, and loads it from the stack of the
// other
__attribute__((naked, noinline)) inline void switch_stack([[maybe_unused]] void** save,
                                                          [[maybe_unused]] void* load) {
    __asm__(CPU_SAVE_STACK
            "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

// The same, to a stack on which fiber_main begins. A jump: a return to where nobody called from is
// predicted wrongly, at the price of the rest of the switch
__attribute__((naked, noinline)) inline void start_stack([[maybe_unused]] void** save,
                                                         [[maybe_unused]] void* top) {
    __asm__(CPU_SAVE_STACK "jmp cpu_fiber_main");
}
#endif

#if defined(CPU_HAND_WRITTEN_SWITCH)
// where the stack of a fiber begins. Colours: without the offset the same local of all threads falls
// into the same set of the cache. The ABI wants a return address at entry, 8 off a multiple of 16
CPU_ENGINE inline void* first_frame(Worker* w, Fiber* f) {
    const size_t color = (size_t)(f - w->fibers) % 32 * 128;
    void** top = (void**)(f->stack + STACK_BYTES - color) - 2;
    *--top = NULL;
    return top;
}
#endif

// from one fiber (or the host) to another. A leaving fiber has returned from its last thread
CPU_ENGINE inline void switch_fiber([[maybe_unused]] Worker* w, Fiber* from, Fiber* to,
                                    [[maybe_unused]] bool leaving) {
#if defined(CPU_ASAN)
    const bool to_host = to == &w->host;
    __sanitizer_start_switch_fiber(leaving ? NULL : &from->fake_stack,
                                   to_host ? w->host_stack : to->stack,
                                   to_host ? w->host_stack_bytes : STACK_BYTES);
#endif
#if defined(CPU_HAND_WRITTEN_SWITCH)
    if (to->stack_pointer == NULL) { start_stack(&from->stack_pointer, first_frame(w, to)); }
    else { switch_stack(&from->stack_pointer, to->stack_pointer); }
#else
    swapcontext(&from->context, &to->context);
#endif
#if defined(CPU_ASAN)
    __sanitizer_finish_switch_fiber(from->fake_stack, NULL, NULL);
#endif
}

// a fiber that will start in fiber_main, for the next thread of the block
CPU_ENGINE inline Fiber* new_fiber(Worker* w) {
#if defined(CPU_TSAN)
    Fiber* f = &w->fibers[w->thread_set * MAX_THREADS + w->next];
#else
    Fiber* f = w->idle[--w->num_idle];
#endif
#if defined(CPU_HAND_WRITTEN_SWITCH)
    f->stack_pointer = NULL;
#else
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK_BYTES;
    f->context.uc_link = NULL;
    makecontext(&f->context, &fiber_main, 0);
#endif
#if defined(CPU_ASAN)
    f->fake_stack = NULL;
#endif
    return f;
}

inline char* map_memory(size_t bytes, const char* what) {
    void* p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) {
        die("cannot map %zu MiB for %s; raise the limit of virtual memory (ulimit -v)", bytes >> 20,
            what);
    }
    return (char*)p;
}

// the worker of this operating system thread; it lives as long as the program
CPU_ENGINE inline Worker* this_worker() {
    if (worker != NULL) { return worker; }
    Worker* w = (Worker*)map_memory(sizeof(Worker), "a worker");
    const size_t stride = GUARD_BYTES + STACK_BYTES;
    char* stacks = map_memory(MAX_FIBERS * stride, "the stacks of the threads of a block");
    for (unsigned i = 0; i < MAX_FIBERS; i++) {
        mprotect(stacks + i * stride, GUARD_BYTES, PROT_NONE); // without it only the check is lost
        w->fibers[i].stack = stacks + i * stride + GUARD_BYTES;
        w->idle[w->num_idle++] = &w->fibers[MAX_FIBERS - 1 - i];
    }
    w->arenas = map_memory(ARENAS * ARENA_BYTES, "shared memory");
    stack_t fault_stack = {};
    fault_stack.ss_size = 64 << 10;
    fault_stack.ss_sp = map_memory(fault_stack.ss_size, "a signal handler");
    sigaltstack(&fault_stack, NULL);
    catch_faults();
    w->random = schedule().seed;
    w->kind = schedule().kind;
    return worker = w;
}

// tells ThreadSanitizer which fiber runs
CPU_ENGINE inline void tsan_running([[maybe_unused]] Fiber* f) {
#if defined(CPU_TSAN)
    __tsan_switch_to_fiber(f->tsan_thread, __tsan_switch_to_fiber_no_sync);
#endif
}

// ----------------------------------------------------------------------------
// The scheduler of a block

[[noreturn]] inline void die_of_deadlock(Worker* w) {
    char warps[256] = "";
    unsigned in_warps = 0;
    for (unsigned i = 0; i * WARP_SIZE < w->threads; i++) {
        const Warp* warp = &w->warps[i];
        if (warp->waiting == 0) { continue; }
        if (in_warps == 0) {
            const int lane = __builtin_ctz(warp->waiting);
            snprintf(warps, sizeof(warps), " (warp %u: lanes %08x wait, lane %d for %08x)", i,
                     warp->waiting, lane, warp->mask[lane]);
        }
        in_warps += (unsigned)__builtin_popcount(warp->waiting);
    }
    die("kernel %s, block (%u,%u,%u): deadlock: of %u threads %u returned, %u wait at "
        "__syncthreads, %u in warp operations%s; all threads of a block, or lanes of a mask, must "
        "reach the same one",
        w->launch->kernel, w->block.x, w->block.y, w->block.z, w->threads, w->done,
        w->num_at_barrier, in_warps, warps);
}

CPU_ENGINE inline void make_ready(Worker* w, Fiber* f) { w->ready[w->tail++ % MAX_THREADS] = f; }

// who runs next: a ready fiber, else a new one for a thread that has not started, else the host
// when the block is done
CPU_ENGINE inline Fiber* pick(Worker* w) {
    const unsigned num_ready = w->tail - w->head;
    if (num_ready > 0) {
        if (w->kind == LAST_IN) { return w->ready[--w->tail % MAX_THREADS]; }
        if (w->kind == RANDOM) {
            if (w->next < w->threads && next_random(&w->random) % 2 == 0) { return new_fiber(w); }
            const unsigned i =
                (w->head + (unsigned)(next_random(&w->random) % num_ready)) % MAX_THREADS;
            Fiber* f = w->ready[i];
            w->ready[i] = w->ready[w->head % MAX_THREADS];
            w->head++;
            return f;
        }
        return w->ready[w->head++ % MAX_THREADS];
    }
    if (w->next < w->threads) { return new_fiber(w); }
    if (w->done < w->threads) { die_of_deadlock(w); }
    return &w->host;
}

// puts the running thread to sleep until somebody makes it ready
CPU_ENGINE __attribute__((noinline)) inline void suspend(Worker* w) {
    Fiber* self = w->current;
    Fiber* next = pick(w);
    if (next != self) {
        w->current = next;
        switch_fiber(w, self, next, false);
    }
    tsan_running(self);
}

CPU_ENGINE inline void release_barrier(Worker* w) {
    const unsigned n = w->num_at_barrier;
    for (unsigned i = 0; i < n; i++) { make_ready(w, w->at_barrier[i]); }
    w->num_at_barrier = 0;
    w->barrier_result = w->votes;
    w->votes = 0;
#if defined(CPU_TSAN)
    w->barrier_number++;
#endif
}

// The lanes of one operation have all arrived: computes their results and wakes them in lane order
CPU_ENGINE inline void finish_collective(Worker* w, Warp* warp, uint32_t lanes) {
    const unsigned first = (unsigned)__builtin_ctz(lanes);
    const Combine combine = warp->combine[first];
    const uint32_t mask = warp->mask[first];
    warp->waiting &= ~lanes;
    for (uint32_t rest = lanes; rest != 0;) {
        const unsigned lane =
            (unsigned)(w->kind == REVERSED ? 31 - __builtin_clz(rest) : __builtin_ctz(rest));
        rest &= ~(1u << lane);
        if (warp->combine[lane] != combine || warp->mask[lane] != mask) {
            die("kernel %s, block (%u,%u,%u), warp %u: lanes %u and %u meet in different warp "
                "operations, or with different masks (%08x and %08x)",
                w->launch->kernel, w->block.x, w->block.y, w->block.z, (unsigned)(warp - w->warps),
                first, lane, mask, warp->mask[lane]);
        }
        make_ready(w, warp->fiber[lane]);
    }
#if defined(CPU_TSAN)
    // combine reads what the lanes hand in through pointers; the lanes themselves stand still
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    combine(warp, lanes);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#else
    combine(warp, lanes);
#endif
}

// the next thread of the block begins on the running fiber
CPU_ENGINE inline void start_thread(Worker* w) {
    const unsigned i = w->next++;
    const unsigned t = w->kind == NATURAL || w->kind == LAST_IN ? i : w->order[i];
    Fiber* f = w->current;
    f->thread = t;
    f->lane = t % WARP_SIZE;
    f->warp = &w->warps[t / WARP_SIZE];
    f->index = thread_index(w->launch->block, t);
#if defined(CPU_TSAN)
    tsan_running(f);
    __tsan_acquire(&w->launched);
#endif
}

// A thread that has returned counts as arrived wherever others wait for it, as on a GPU
CPU_ENGINE inline void finish_thread(Worker* w) {
    Warp* warp = w->current->warp;
    w->done++;
    warp->exited |= 1u << w->current->lane;
    for (uint32_t rest = warp->waiting; rest != 0; rest &= rest - 1) {
        const uint32_t lanes = warp->mask[__builtin_ctz(rest)] & ~warp->exited;
        if ((warp->waiting & lanes) == lanes) { finish_collective(w, warp, lanes); }
        rest &= ~lanes | (rest & -rest);
    }
    if (w->num_at_barrier > 0 && w->num_at_barrier + w->done == w->threads) { release_barrier(w); }
}

#if defined(CPU_TSAN)
// the locals of two threads at one address would look like a race
constexpr bool ONE_STACK_FOR_MANY = false;
#else
constexpr bool ONE_STACK_FOR_MANY = true;
#endif

// Runs threads on the current fiber, one after the other, as long as nobody else is ready
template <class Body> CPU_ENGINE void run_threads(Worker* w, const void* body) {
    do {
        start_thread(w);
        run_thread(*(const Body*)body, w->current->index, w->block, w->launch->block,
                   w->launch->grid);
        finish_thread(w);
    } while (ONE_STACK_FOR_MANY && w->next < w->threads && w->head == w->tail && w->kind != RANDOM);
}

// where every fiber begins. AddressSanitizer: its frame is never left, so it may have no red zones;
// the next thread uses the same stack
CPU_ENGINE __attribute__((used, no_sanitize_address)) inline void fiber_main() {
    Worker* w = worker;
#if defined(CPU_ASAN)
    const void* from;
    size_t bytes;
    __sanitizer_finish_switch_fiber(NULL, &from, &bytes);
    if (w->host_stack == NULL) { // the first fiber of a block is entered from the host
        w->host_stack = from;
        w->host_stack_bytes = bytes;
    }
#endif
    w->run(w, w->body);
    Fiber* self = w->current;
    Fiber* next = pick(w);
#if !defined(CPU_TSAN)
    // after pick, which could begin a new fiber on the stack we stand on
    w->idle[w->num_idle++] = self;
#endif
    w->current = next;
    switch_fiber(w, self, next, true);
    __builtin_unreachable();
}

// ----------------------------------------------------------------------------
// Shared memory. It starts as 0xFF bytes, NaN in every float format: on a GPU it starts as anything

inline constexpr size_t round_up(size_t n, size_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}

CPU_ENGINE inline void poison_bytes(void* p, size_t n) {
#if defined(CPU_TSAN)
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    memset(p, 0xFF, n);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
#else
    memset(p, 0xFF, n);
#endif
}

CPU_ENGINE inline void begin_shared(Worker* w) {
    const size_t bytes = w->launch->dynamic_shared;
    w->num_shared = 0;
    w->static_shared = 0;
    w->arena_used = round_up(bytes, 256);
#if defined(CPU_ASAN)
    ASAN_POISON_MEMORY_REGION(w->arena, ARENA_BYTES);
    ASAN_UNPOISON_MEMORY_REGION(w->arena, bytes);
#endif
    poison_bytes(w->arena, bytes);
}

CPU_ENGINE inline void* new_shared_variable(Worker* w, const void* site, size_t bytes,
                                            size_t alignment) {
    w->static_shared += bytes;
    if (w->static_shared > MAX_STATIC_SHARED ||
        w->static_shared + w->launch->dynamic_shared > MAX_SHARED) {
        die("kernel %s: %zu bytes of static and %zu of dynamic shared memory; a block may have %zu "
            "static and %zu in all",
            w->launch->kernel, w->static_shared, w->launch->dynamic_shared, MAX_STATIC_SHARED,
            MAX_SHARED);
    }
    if (w->num_shared == MAX_SHARED_VARIABLES) {
        die("kernel %s: more than %u __shared__ variables; raise MAX_SHARED_VARIABLES in "
            "dev/cpu/engine.h",
            w->launch->kernel, MAX_SHARED_VARIABLES);
    }
#if defined(CPU_ASAN)
    // a red zone, and no more alignment than the type asks for: a cast to float4 needs
    // __align__(16)
    const size_t offset =
        round_up(w->arena_used + 64, 2 * (alignment < 8 ? 8 : alignment)) + alignment;
#else
    const size_t offset = round_up(w->arena_used, alignment < 16 ? 16 : alignment);
#endif
    char* p = w->arena + offset;
    w->arena_used = offset + bytes;
#if defined(CPU_ASAN)
    ASAN_UNPOISON_MEMORY_REGION(p, bytes);
#endif
    poison_bytes(p, bytes);
    w->shared[w->num_shared++] = SharedVariable{site, p};
    return p;
}

// the storage of `__shared__ T name;` the first thread that comes by makes it, for all threads of
// the block
template <class T>
CPU_ENGINE inline T& shared_variable(const void* site, size_t alignment = alignof(T)) {
    Worker* w = worker;
    for (unsigned i = 0; i < w->num_shared; i++) {
        if (w->shared[i].site == site) { return *(T*)w->shared[i].storage; }
    }
    return *(T*)new_shared_variable(w, site, sizeof(T),
                                    alignment < alignof(T) ? alignof(T) : alignment);
}

// of `extern __shared__ T name[];`
CPU_ENGINE inline void* dynamic_shared() { return worker->arena; }

// whether p is shared memory of the block that this worker runs, which no other worker can touch
CPU_ENGINE inline bool is_shared(const void* p) {
    const Worker* w = worker;
    return w != NULL && (size_t)((const char*)p - w->arena) < ARENA_BYTES;
}

// ----------------------------------------------------------------------------
// Blocks of a fiber kernel

CPU_ENGINE inline void run_block(Worker* w, uint3 block) {
    w->block = block;
    w->next = w->done = 0;
    w->head = w->tail = 0;
    w->num_at_barrier = w->votes = 0;
    const unsigned n = w->threads;
    for (unsigned i = 0; i * WARP_SIZE < n; i++) {
        const unsigned lanes = n - i * WARP_SIZE;
        w->warps[i].waiting = 0;
        w->warps[i].exited = lanes >= WARP_SIZE ? 0 : ~0u << lanes;
    }
    if (w->kind == REVERSED || w->kind == RANDOM) { thread_order(w->order, n, &w->random); }
    begin_shared(w);
#if defined(CPU_ASAN)
    w->host_stack = NULL;
#endif
    w->current = new_fiber(w);
    switch_fiber(w, &w->host, w->current, false);
}

// ThreadSanitizer: what the host did until now happens before every thread that starts from now on
CPU_ENGINE inline void tsan_launch([[maybe_unused]] Worker* w) {
#if defined(CPU_TSAN)
    w->host.tsan_thread = __tsan_get_current_fiber();
    // those that a block of this size needs: each costs memory and time
    for (unsigned i = 0; i < MAX_FIBERS; i++) {
        Fiber* f = &w->fibers[i];
        if (i % MAX_THREADS < w->threads && f->tsan_thread == NULL) {
            f->tsan_thread = __tsan_create_fiber(0);
        }
    }
    __tsan_release(&w->launched);
#endif
}

// ThreadSanitizer: what the threads of all blocks until now did happens before what the host does
// next
CPU_ENGINE inline void tsan_join([[maybe_unused]] Worker* w, [[maybe_unused]] uint64_t blocks) {
#if defined(CPU_TSAN)
    for (unsigned i = 0; i < MAX_FIBERS; i++) {
        if (i % MAX_THREADS >= w->threads || i / MAX_THREADS >= blocks) { continue; }
        tsan_running(&w->fibers[i]);
        __tsan_release(&w->finished);
    }
    tsan_running(&w->host);
    __tsan_acquire(&w->finished);
#endif
}

CPU_ENGINE inline void fiber_blocks(const Launch& launch, void (*run)(Worker*, const void*),
                                    const void* body, uint64_t first, uint64_t last) {
    Worker* w = this_worker();
    w->launch = &launch;
    w->run = run;
    w->body = body;
    w->threads = launch.threads;
    running_kernel = launch.kernel;
    tsan_launch(w);
    const Order order = block_order(launch.blocks, &w->random);
    for (uint64_t i = first; i < last; i++) {
        w->arena = w->arenas + i % ARENAS * ARENA_BYTES;
#if defined(CPU_TSAN)
        w->thread_set = i % THREAD_SETS;
        // shared memory is used again: in order, lest that look like a race
        if (i > 0 && i % ARENAS == 0) {
            tsan_join(w, i);
            tsan_launch(w);
        }
#endif
        run_block(w, block_index(launch.grid, w->kind == NATURAL ? i : position(order, i)));
        tsan_running(&w->host);
    }
    tsan_join(w, last);
    running_kernel = NULL;
}

template <class Body> void run_fibers(const char* kernel, const Body& body) {
    Launch launch;
    if (!begin_launch(&launch, kernel, &max_dynamic_shared<Body>)) { return; }
    DeviceWork work;
    spread_blocks(launch, 0, [&](uint64_t first, uint64_t last) {
        fiber_blocks(launch, run_threads<Body>, &body, first, last);
    });
}

// ----------------------------------------------------------------------------
// What kernels and the other headers of this directory call

// threadIdx and its siblings in a __device__ function; cu2cpp declares them at the top of one that
// mentions them
CPU_ENGINE inline uint3 current_thread_index() { return worker->current->index; }
CPU_ENGINE inline uint3 current_block_index() { return worker->block; }
CPU_ENGINE inline dim3 current_block_dim() { return worker->launch->block; }
CPU_ENGINE inline dim3 current_grid_dim() { return worker->launch->grid; }
// x + y * blockDim.x + ...
CPU_ENGINE inline unsigned current_thread() { return worker->current->thread; }
CPU_ENGINE inline unsigned current_lane() { return worker->current->lane; }
CPU_ENGINE inline unsigned threads_of_block() { return worker->threads; }

// Which form of __syncthreads it is: all threads of a block must meet in the same
enum BarrierKind { BARRIER_PLAIN, BARRIER_COUNT, BARRIER_AND, BARRIER_OR };

// Waits for all threads of the block that have not returned; gives how many of them voted
CPU_ENGINE inline unsigned barrier(BarrierKind kind, bool vote) {
    Worker* w = worker;
    if (w->num_at_barrier > 0 && w->barrier_kind != kind) {
        die("kernel %s, block (%u,%u,%u): threads meet in different forms of __syncthreads",
            w->launch->kernel, w->block.x, w->block.y, w->block.z);
    }
    w->barrier_kind = kind;
    w->votes += vote;
    w->at_barrier[w->num_at_barrier++] = w->current;
#if defined(CPU_TSAN)
    // two events in turn: with one, a thread that is already at the next barrier would be ordered
    // before a thread that has yet to leave this one, and a race between the two would be missed
    char* event = &w->barrier_event[w->barrier_number & 1];
    __tsan_release(event);
#endif
    if (w->num_at_barrier + w->done == w->threads) { release_barrier(w); }
    suspend(w);
#if defined(CPU_TSAN)
    __tsan_acquire(event);
#endif
    return w->barrier_result;
}

/*
A warp operation: every lane of mask hands in a value and an argument, and sleeps. When all lanes of
mask that have not returned are there, combine(warp, lanes) runs once: for each lane of the bit set
lanes it finds what that lane handed in at warp->in[lane] and warp->argument[lane], and leaves its
result in warp->out[lane], which the lane gets. What does not fit into 16 bytes goes by pointer: the
stacks of sleeping lanes can be read and written.
*/
CPU_ENGINE inline Value collective(uint32_t mask, Value value, unsigned argument, Combine combine) {
    Worker* w = worker;
    Fiber* self = w->current;
    Warp* warp = self->warp;
    const unsigned lane = self->lane;
    warp->in[lane] = value;
    warp->argument[lane] = argument;
    warp->combine[lane] = combine;
    warp->mask[lane] = mask;
    warp->fiber[lane] = self;
    warp->waiting |= 1u << lane;
    if ((mask >> lane & 1) == 0) {
        die("kernel %s, block (%u,%u,%u): lane %u calls a warp operation with mask %08x, which it "
            "is not in",
            w->launch->kernel, w->block.x, w->block.y, w->block.z, lane, mask);
    }
    const uint32_t lanes = mask & ~warp->exited;
    if ((warp->waiting & lanes) == lanes) { finish_collective(w, warp, lanes); }
    suspend(w);
    return warp->out[lane];
}

template <class T> CPU_ENGINE inline Value to_value(const T& x) {
    static_assert(sizeof(T) <= sizeof(Value) && std::is_trivially_copyable_v<T>,
                  "a warp operation takes 16 bytes at most");
    Value v = {};
    memcpy(&v, &x, sizeof(T));
    return v;
}

template <class T> CPU_ENGINE inline T from_value(Value v) {
    T x;
    memcpy((void*)&x, &v, sizeof(T));
    return x;
}

} // namespace cpu

#if defined(CPU_ASAN)
// the leak checker does not know the fibers' stacks
extern "C" __attribute__((used, visibility("default"))) inline const char*
__asan_default_options() {
    return "detect_leaks=0";
}
#endif
