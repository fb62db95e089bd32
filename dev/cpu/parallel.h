/*
The workers of the CPU device: how many there are, a parallel loop over them, and the way out when a program is wrong.
Used by the engine (blocks of a grid), by the BLAS stand-in (tiles of a product) and by large fills and copies.
*/
#pragma once

#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

// CPU_ASAN, CPU_TSAN: which sanitizer this is built with. GCC says it with macros, clang with features
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

// prints "cpu device: ..." and ends the program. It may be called on a fiber and while other workers
// run, so destructors and exit handlers are skipped: they could wait for a worker that never comes
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

// OMP_NUM_THREADS, else the number of cores. Under a sanitizer one: the reports then repeat from run to run
inline int workers() {
#if defined(_OPENMP) && !defined(CPU_ASAN) && !defined(CPU_TSAN)
    static const int count = omp_get_max_threads() > 0 ? omp_get_max_threads() : 1;
    return count;
#else
    return 1;
#endif
}

// f(i) for every i in [0, n), in any order. A loop of one, or inside another parallel loop, runs inline:
// waking the workers takes some microseconds
template <class F> void parallel_for(size_t n, F f) {
#if defined(_OPENMP) && !defined(CPU_ASAN) && !defined(CPU_TSAN)
    if (n > 1 && workers() > 1 && !omp_in_parallel()) {
        const int count = n < (size_t)workers() ? (int)n : workers();
        #pragma omp parallel for schedule(dynamic, 1) num_threads(count)
        for (size_t i = 0; i < n; i++) { f(i); }
        return;
    }
#endif
    for (size_t i = 0; i < n; i++) { f(i); }
}

} // namespace cpu
