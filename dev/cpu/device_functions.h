/*
What CUDA offers to device code: barriers, warp operations, atomics, bit operations, casts and cache
hints. Everything here means what the CUDA C++ Programming Guide says; the engine does the waiting.
*/
#pragma once

#include <math.h>
#include <type_traits>

#include "engine.h"

constexpr int warpSize = 32;

// ----------------------------------------------------------------------------
// Barriers

static inline void __syncthreads() { cpu::barrier(cpu::BARRIER_PLAIN, false); }
static inline int __syncthreads_count(int predicate) {
    return (int)cpu::barrier(cpu::BARRIER_COUNT, predicate != 0);
}
static inline int __syncthreads_or(int predicate) {
    return cpu::barrier(cpu::BARRIER_OR, predicate != 0) != 0;
}
static inline int __syncthreads_and(int predicate) {
    return cpu::barrier(cpu::BARRIER_AND, predicate == 0) == 0;
}

// ----------------------------------------------------------------------------
// Warp operations. As on a GPU only __syncwarp orders memory: a shuffle or a vote does not

namespace cpu {

CPU_ENGINE inline void combine_sync([[maybe_unused]] Warp* warp, [[maybe_unused]] uint32_t lanes) {
#if defined(CPU_TSAN)
    // the last lane to arrive learns what all have done, and hands it to each
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        __tsan_acquire(&worker->warp_event[warp->fiber[__builtin_ctz(rest)]->thread]);
    }
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        __tsan_release(&worker->warp_event[warp->fiber[__builtin_ctz(rest)]->thread]);
    }
#endif
}

CPU_ENGINE inline void sync_warp(uint32_t mask) {
#if defined(CPU_TSAN)
    char* event = &worker->warp_event[current_thread()];
    __tsan_release(event);
    collective(mask, Value{}, 0, combine_sync);
    __tsan_acquire(event);
#else
    collective(mask, Value{}, 0, combine_sync);
#endif
}

// argument: the lane to read from. One that takes no part gives 0xFF bytes: its value is undefined
// on a GPU
CPU_ENGINE inline void combine_shuffle(Warp* warp, uint32_t lanes) {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const unsigned lane = (unsigned)__builtin_ctz(rest), source = warp->argument[lane];
        warp->out[lane] = lanes >> source & 1 ? warp->in[source] : ~Value{};
    }
}

CPU_ENGINE inline void combine_ballot(Warp* warp, uint32_t lanes) {
    uint32_t votes = 0;
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        const unsigned lane = (unsigned)__builtin_ctz(rest);
        votes |= warp->argument[lane] << lane;
    }
    const Value result = to_value(votes);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        warp->out[__builtin_ctz(rest)] = result;
    }
}

CPU_ENGINE inline uint32_t ballot(uint32_t mask, bool vote) {
    return from_value<uint32_t>(collective(mask, Value{}, vote, combine_ballot));
}

// Reductions have the order of an exclusive-or butterfly, whatever the schedule: of N lanes the
// first N / 2 take in the others, then the first N / 4 of those, ... This is what lane I holds when
// lanes I, I + Stride, I + 2 Stride, ... are in it. Written out by the compiler, it keeps all
// values in registers
template <class T, class Op, unsigned N, unsigned I, unsigned Stride>
CPU_ENGINE inline T butterfly(const Value* in) {
    if constexpr (Stride == N) {
        return from_value<T>(in[I]);
    } else {
        return Op()(butterfly<T, Op, N, I, 2 * Stride>(in),
                    butterfly<T, Op, N, I + Stride, 2 * Stride>(in));
    }
}

// a butterfly of n lanes of which some are absent: they add nothing
template <class T, class Op>
CPU_ENGINE T butterfly_of_some(const Value* in, uint32_t present, unsigned n) {
    T v[WARP_SIZE];
    for (uint32_t rest = present; rest != 0; rest &= rest - 1) {
        const unsigned i = (unsigned)__builtin_ctz(rest);
        v[i] = from_value<T>(in[i]);
    }
    for (unsigned half = n / 2; half > 0; half /= 2) {
        for (unsigned i = 0; i < half; i++) {
            if ((present >> (i + half) & 1) == 0) { continue; }
            v[i] = present >> i & 1 ? Op()(v[i], v[i + half]) : v[i + half];
        }
        present = (present | present >> half) & ((1u << half) - 1);
    }
    return v[0];
}

// over the smallest aligned group that holds all lanes
template <class T, class Op> CPU_ENGINE void combine_reduce(Warp* warp, uint32_t lanes) {
    const unsigned first = (unsigned)__builtin_ctz(lanes),
                   last = 31 - (unsigned)__builtin_clz(lanes);
    const unsigned n = first == last ? 1 : 2u << (31 - __builtin_clz(first ^ last));
    const unsigned base = first & ~(n - 1);
    const Value* in = warp->in + base;
    const bool all = lanes >> base == ~0u >> (32 - n);
    const T result = !all      ? butterfly_of_some<T, Op>(in, lanes >> base, n)
                     : n == 32 ? butterfly<T, Op, 32, 0, 1>(in)
                     : n == 16 ? butterfly<T, Op, 16, 0, 1>(in)
                     : n == 8  ? butterfly<T, Op, 8, 0, 1>(in)
                     : n == 4  ? butterfly<T, Op, 4, 0, 1>(in)
                     : n == 2  ? butterfly<T, Op, 2, 0, 1>(in)
                               : from_value<T>(in[0]);
    const Value value = to_value(result);
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
        warp->out[__builtin_ctz(rest)] = value;
    }
}

// prefix sums from the lowest lane up; argument: whether a lane's own value counts
template <class T, class Op> CPU_ENGINE void combine_scan(Warp* warp, uint32_t lanes) {
    const unsigned first = (unsigned)__builtin_ctz(lanes);
    T sum = from_value<T>(warp->in[first]);
    if (warp->argument[first]) { warp->out[first] = to_value(sum); }
    else { warp->out[first] = to_value(T()); }
    for (uint32_t rest = lanes & (lanes - 1); rest != 0; rest &= rest - 1) {
        const unsigned lane = (unsigned)__builtin_ctz(rest);
        const T before = sum;
        sum = Op()(sum, from_value<T>(warp->in[lane]));
        warp->out[lane] = to_value(warp->argument[lane] ? sum : before);
    }
}

template <class T, class Op> CPU_ENGINE inline T reduce(uint32_t mask, const T& value, Op) {
    return from_value<T>(collective(mask, to_value(value), 0, combine_reduce<T, Op>));
}

template <class T, class Op>
CPU_ENGINE inline T scan(uint32_t mask, const T& value, Op, bool inclusive) {
    return from_value<T>(collective(mask, to_value(value), inclusive, combine_scan<T, Op>));
}

// what __shfl_sync and its siblings take on a GPU, too; bfloat16 adds itself
template <class T> constexpr bool can_shuffle = std::is_arithmetic_v<T>;
#define CPU_CHECK_SHUFFLE(T) \
    static_assert(cpu::can_shuffle<T>, \
                  "__shfl_sync takes numbers; a struct goes through a tile of cooperative groups")

template <class T> CPU_ENGINE inline T shuffle(uint32_t mask, const T& value, unsigned source) {
    return from_value<T>(collective(mask, to_value(value), source % WARP_SIZE, combine_shuffle));
}

struct Add { template <class T> T operator()(T a, T b) const { return (T)(a + b); } };
struct Max { template <class T> T operator()(T a, T b) const { return a < b ? b : a; } };
struct Min { template <class T> T operator()(T a, T b) const { return b < a ? b : a; } };
struct And { template <class T> T operator()(T a, T b) const { return a & b; } };
struct Or { template <class T> T operator()(T a, T b) const { return a | b; } };
struct Xor { template <class T> T operator()(T a, T b) const { return a ^ b; } };

} // namespace cpu

static inline void __syncwarp(unsigned mask = 0xffffffffu) { cpu::sync_warp(mask); }

template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    CPU_CHECK_SHUFFLE(T);
    const int lane = (int)cpu::current_lane();
    return cpu::shuffle(mask, value, (unsigned)((lane & ~(width - 1)) | (source & (width - 1))));
}

template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    CPU_CHECK_SHUFFLE(T);
    const int lane = (int)cpu::current_lane(), source = lane - (int)delta;
    return cpu::shuffle(mask, value, (unsigned)(source < (lane & ~(width - 1)) ? lane : source));
}

template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    CPU_CHECK_SHUFFLE(T);
    const int lane = (int)cpu::current_lane();
    return cpu::shuffle(mask, value,
                        (lane & (width - 1)) + (int)delta >= width ? (unsigned)lane
                                                                   : (unsigned)lane + delta);
}

template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    CPU_CHECK_SHUFFLE(T);
    const int lane = (int)cpu::current_lane(), source = lane ^ lane_mask;
    return cpu::shuffle(mask, value,
                        (unsigned)(source >= (lane & ~(width - 1)) + width ? lane : source));
}

static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return cpu::ballot(mask, predicate != 0);
}
static inline int __any_sync(unsigned mask, int predicate) {
    return cpu::ballot(mask, predicate != 0) != 0;
}
static inline int __all_sync(unsigned mask, int predicate) {
    return cpu::ballot(mask, predicate == 0) == 0;
}

static inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
    return cpu::reduce(mask, value, cpu::Add());
}
static inline int __reduce_add_sync(unsigned mask, int value) {
    return (int)cpu::reduce(mask, (unsigned)value, cpu::Add());
}
static inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
    return cpu::reduce(mask, value, cpu::Min());
}
static inline int __reduce_min_sync(unsigned mask, int value) {
    return cpu::reduce(mask, value, cpu::Min());
}
static inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
    return cpu::reduce(mask, value, cpu::Max());
}
static inline int __reduce_max_sync(unsigned mask, int value) {
    return cpu::reduce(mask, value, cpu::Max());
}
static inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
    return cpu::reduce(mask, value, cpu::And());
}
static inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return cpu::reduce(mask, value, cpu::Or());
}
static inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
    return cpu::reduce(mask, value, cpu::Xor());
}

// ----------------------------------------------------------------------------
// Atomics. They are relaxed, as CUDA's are, and real where another worker may come to the same
// address: not in shared memory, and not with one worker, for fibers are never interrupted

namespace cpu {

#if defined(CPU_TSAN)
constexpr int ATOMIC_ORDER = __ATOMIC_ACQ_REL; // see __threadfence
#else
constexpr int ATOMIC_ORDER = __ATOMIC_RELAXED;
#endif
inline const bool several_workers = workers() > 1;

CPU_ENGINE inline bool needs_atomic([[maybe_unused]] const void* p) {
#if defined(CPU_TSAN)
    return true;
#else
    return several_workers && !is_shared(p);
#endif
}

// *p = op(*p); gives what was there before
template <class T, class Op> __attribute__((always_inline)) inline T atomic_update(T* p, Op op) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8,
                  "atomics are of 2, 4 or 8 bytes");
    if (!needs_atomic(p)) {
        const T old = *p;
        *p = op(old);
        // keeps the loop over threads of a free kernel from being vectorised
        __asm__ volatile("" : "+m"(*p));
        return old;
    }
    typedef std::conditional_t<sizeof(T) == 2, uint16_t,
                               std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>
        Bits;
    Bits old_bits = __atomic_load_n((Bits*)p, __ATOMIC_RELAXED), new_bits;
    T old;
    do {
        memcpy((void*)&old, &old_bits, sizeof(T));
        const T updated = op(old);
        memcpy(&new_bits, &updated, sizeof(T));
    } while (!__atomic_compare_exchange_n((Bits*)p, &old_bits, new_bits, true, ATOMIC_ORDER,
                                          __ATOMIC_RELAXED));
    return old;
}

template <class T> using Same = std::common_type_t<T>; // its argument is converted, not deduced

} // namespace cpu

template <class T> static inline T atomicAdd(T* p, cpu::Same<T> value) {
    if constexpr (std::is_integral_v<T>) {
        if (cpu::needs_atomic(p)) { return __atomic_fetch_add(p, value, cpu::ATOMIC_ORDER); }
    }
    return cpu::atomic_update(p, [value](T old) { return (T)(old + value); });
}
// for memory that no other block uses: a block has one worker
template <class T> static inline T atomicAdd_block(T* p, cpu::Same<T> value) {
#if defined(CPU_TSAN)
    return atomicAdd(p, value);
#else
    const T old = *p;
    *p = (T)(old + value);
    __asm__ volatile("" : "+m"(*p)); // as in atomic_update
    return old;
#endif
}
template <class T> static inline T atomicSub(T* p, cpu::Same<T> value) {
    return cpu::atomic_update(p, [value](T old) { return (T)(old - value); });
}
template <class T> static inline T atomicMax(T* p, cpu::Same<T> value) {
    return cpu::atomic_update(p, [value](T old) { return old < value ? value : old; });
}
template <class T> static inline T atomicMin(T* p, cpu::Same<T> value) {
    return cpu::atomic_update(p, [value](T old) { return value < old ? value : old; });
}
template <class T> static inline T atomicAnd(T* p, cpu::Same<T> value) {
    return cpu::atomic_update(p, [value](T old) { return (T)(old & value); });
}
template <class T> static inline T atomicOr(T* p, cpu::Same<T> value) {
    return cpu::atomic_update(p, [value](T old) { return (T)(old | value); });
}
template <class T> static inline T atomicXor(T* p, cpu::Same<T> value) {
    return cpu::atomic_update(p, [value](T old) { return (T)(old ^ value); });
}
template <class T> static inline T atomicExch(T* p, cpu::Same<T> value) {
    return cpu::atomic_update(p, [value](T) { return value; });
}
template <class T> static inline T atomicCAS(T* p, cpu::Same<T> expected, cpu::Same<T> value) {
    return cpu::atomic_update(p,
                              [expected, value](T old) { return old == expected ? value : old; });
}

// What a worker wrote before the fence is seen by the others after it. ThreadSanitizer does not
// know fences: under it every atomic orders memory, as fence and atomic together do in the kernels
// that hand over to the last block
static inline void __threadfence_block() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence() {
#if !defined(CPU_TSAN)
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
#endif
}
static inline void __threadfence_system() { __threadfence(); }

// ----------------------------------------------------------------------------
// Bits and casts

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
static inline int __clzll(long long x) {
    return x == 0 ? 64 : __builtin_clzll((unsigned long long)x);
}

static inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

static inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
static inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
static inline long long __double_as_longlong(double x) { long long y; memcpy(&y, &x, 8); return y; }
static inline double __longlong_as_double(long long x) { double y; memcpy(&y, &x, 8); return y; }

// float arithmetic that is never contracted, as it is spelled in CUDA
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// min and max of two arguments of one type, and of the mixed integer types that CUDA has
#define CPU_MIN_MAX(type) \
    static inline type min(type a, type b) { return b < a ? b : a; } \
    static inline type max(type a, type b) { return a < b ? b : a; }
#define CPU_MIN_MAX_MIXED(left, right, result) \
    static inline result min(left a, right b) { return min((result)a, (result)b); } \
    static inline result min(right a, left b) { return min((result)a, (result)b); } \
    static inline result max(left a, right b) { return max((result)a, (result)b); } \
    static inline result max(right a, left b) { return max((result)a, (result)b); }
CPU_MIN_MAX(int)
CPU_MIN_MAX(unsigned)
CPU_MIN_MAX(long)
CPU_MIN_MAX(unsigned long)
CPU_MIN_MAX(long long)
CPU_MIN_MAX(unsigned long long)
CPU_MIN_MAX_MIXED(int, unsigned, unsigned)
CPU_MIN_MAX_MIXED(long, unsigned long, unsigned long)
CPU_MIN_MAX_MIXED(long long, unsigned long long, unsigned long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }
CPU_MIN_MAX_MIXED(float, double, double)

// ----------------------------------------------------------------------------
// Cache hints: a load is a load

template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldca(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline void __stcg(T* p, cpu::Same<T> value) { *p = value; }
template <class T> static inline void __stcs(T* p, cpu::Same<T> value) { *p = value; }
template <class T> static inline void __stwb(T* p, cpu::Same<T> value) { *p = value; }
