/*
The workers of the CPU device: how many there are, a parallel loop over them, and the way out when a
program is wrong. Used by the engine (blocks of a grid), by the BLAS stand-in (tiles of a product)
and by large fills and copies.
*/
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sched.h>
#include <unistd.h>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#ifdef __x86_64__
#include <immintrin.h>
#endif

// CPU_ASAN, CPU_TSAN: which sanitizer this is built with. GCC says it with macros, clang with
// features
#ifdef __has_feature
#if __has_feature(address_sanitizer)
#define CPU_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define CPU_TSAN 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define CPU_ASAN 1
#endif
#ifdef __SANITIZE_THREAD__
#define CPU_TSAN 1
#endif

namespace cpu {

// prints "cpu device: ..." and ends the program. It may be called on a fiber and while other
// workers run, so destructors and exit handlers are skipped: they could wait for a worker that
// never comes
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void die(const char* format, ...) {
    fflush(stdout);
    fputs("cpu device: ", stderr);
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    fflush(stderr);
    _exit(EXIT_FAILURE);
}

// OMP_NUM_THREADS, else the number of cores that this process may use. Under a sanitizer one: the
// reports then repeat from run to run
inline int workers() {
#if defined(CPU_ASAN) || defined(CPU_TSAN)
    return 1;
#else
    static const int count = [] {
        const char* asked = getenv("OMP_NUM_THREADS");
        const int n = asked != NULL ? atoi(asked) : 0;
        if (n > 0) { return n < 256 ? n : 256; }
        cpu_set_t allowed;
        return sched_getaffinity(0, sizeof(allowed), &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
    }();
    return count;
#endif
}

inline void pause_core() {
#ifdef __x86_64__
    _mm_pause();
#endif
}

// The workers, and the loop they are at. A loop ends when every index that was claimed is done. At
// an OpenMP barrier the caller also waits for workers that claimed nothing, because the system has
// not scheduled them: on a busy machine that is most of the time.
struct Pool {
    // The number of the loop in the upper half, the next index in the lower; CLOSED while the
    // fields below change. An index is claimed by compare-and-swap, so a worker that read an old
    // loop's fields finds another number and claims nothing
    std::atomic<uint64_t> next{CLOSED};
    std::atomic<void (*)(void*, size_t)> run{NULL};
    std::atomic<void*> body{NULL};
    std::atomic<size_t> n{0}, done{0};
    std::atomic<int> asleep{0};
    std::mutex owner, sleep;
    std::condition_variable wake;
    static const uint64_t CLOSED = 0xffffffffu;

    // runs indices of the current loop while there are any; false when there were none
    bool work() {
        bool any = false;
        for (;;) {
            uint64_t claimed = next.load(std::memory_order_acquire);
            const size_t i = claimed & CLOSED;
            const auto run_claimed = run.load(std::memory_order_relaxed);
            void* const body_claimed = body.load(std::memory_order_relaxed);
            if (i >= n.load(std::memory_order_relaxed)) { return any; } // CLOSED is above every n
            if (!next.compare_exchange_strong(claimed, claimed + 1, std::memory_order_acq_rel)) {
                continue;
            }
            run_claimed(body_claimed, i);
            done.fetch_add(1, std::memory_order_release);
            any = true;
        }
    }

    // a worker spins for some 50 us, which covers the gap between two launches of a training step,
    // and then sleeps
    void live() {
        for (int spins = 0; ; spins = work() ? 0 : spins + 1) {
            pause_core();
            if (spins < 1000) { continue; }
            std::unique_lock<std::mutex> lock(sleep);
            asleep++;
            wake.wait(lock, [this] { return (next.load() & CLOSED) < n.load(); });
            asleep--;
            spins = 0;
        }
    }

    void loop(size_t count, void (*f)(void*, size_t), void* f_body) {
        const uint64_t number = (next.load() >> 32) + 1;
        next.store(number << 32 | CLOSED);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        run = f;
        body = f_body;
        n = count;
        done = 0;
        next.store(number << 32);
        if (asleep.load() > 0) {
            std::lock_guard<std::mutex> lock(sleep);
            wake.notify_all();
        }
        work();
        for (int spins = 0; done.load(std::memory_order_acquire) < count; spins++) {
            if (spins < 1000) { pause_core(); } else { sched_yield(); }
        }
    }
};

inline thread_local bool inside_loop = false; // this thread is running an iteration

// made at the first parallel loop and never freed: its workers run until the program ends
inline Pool* pool() {
    static Pool* const made = [] {
        Pool* p = new Pool;
        for (int w = 1; w < workers(); w++) {
            std::thread([p] {
                inside_loop = true;
                p->live();
            }).detach();
        }
        return p;
    }();
    return made;
}

// f(i) for every i in [0, n), in any order; n below 2^32 - 1. A loop of one, one inside another, or
// one while another thread's loop has the workers, runs inline
template <class F> void parallel_for(size_t n, F f) {
    if (n > 1 && workers() > 1 && !inside_loop && pool()->owner.try_lock()) {
        inside_loop = true;
        pool()->loop(n, [](void* body, size_t i) { (*(F*)body)(i); }, &f);
        inside_loop = false;
        pool()->owner.unlock();
    } else {
        for (size_t i = 0; i < n; i++) { f(i); }
    }
}

} // namespace cpu
