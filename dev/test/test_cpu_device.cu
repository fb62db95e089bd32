/*
Checks every operation of the CPU device against the CUDA C++ Programming Guide, one line a check;
the last line counts them, and the exit code is the verdict. dev/test/schedules.sh runs it under
every schedule: the line "all results" must be the same.

    test_cpu_device          the checks
    test_cpu_device bench    what kernels and operations cost, beside plain C

Only CUDA's own API is used outside of #ifdef CPU_DEVICE, so that nvcc builds it too and a GPU can
confirm what it expects.
*/
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <vector>

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifndef __CUDACC__
#define CPU_DEVICE
#endif

namespace cg = cooperative_groups;

#define cudaCheck(call) \
    do { \
        cudaError_t err_ = (call); \
        if (err_ != cudaSuccess) { \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                    cudaGetErrorString(err_)); \
            exit(EXIT_FAILURE); \
        } \
    } while (0)

// ----------------------------------------------------------------------------
// Verdicts, and memory

static int passed = 0, failed = 0;
// FNV-1a of everything that kernels gave back
static uint64_t all_results = 14695981039346656037ull;

static void check(bool ok, const char* format, ...) {
    (ok ? passed : failed)++;
    printf("%s ", ok ? "ok  " : "FAIL");
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

template <class T> T* device_zeros(size_t n) {
    T* p;
    cudaCheck(cudaMalloc((void**)&p, n * sizeof(T)));
    cudaCheck(cudaMemset(p, 0, n * sizeof(T)));
    return p;
}

template <class T> T* to_device(const std::vector<T>& host) {
    T* p = device_zeros<T>(host.size());
    cudaCheck(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

// what the launches before left in p, which it frees
template <class T> std::vector<T> take(T* p, size_t n) {
    std::vector<T> host(n);
    cudaCheck(cudaGetLastError());
    cudaCheck(cudaMemcpy(host.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    cudaCheck(cudaFree(p));
    const unsigned char* bytes = (const unsigned char*)host.data();
    for (size_t i = 0; i < n * sizeof(T); i++) {
        all_results = (all_results ^ bytes[i]) * 1099511628211ull;
    }
    return host;
}

template <class T> bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Four { float x, y, z, w; }; // 16 bytes: the widest value of a warp operation
__host__ __device__ inline bool operator!=(const Four& a, const Four& b) {
    return a.x != b.x || a.y != b.y || a.z != b.z || a.w != b.w;
}

// values that tell lanes apart, exact in float
__host__ __device__ inline int value_of(int thread) { return (thread * 2654435761u >> 20) & 4095; }

// ----------------------------------------------------------------------------
// Warp operations

enum { SHFL, UP, DOWN, XOR, SHUFFLES };
const char* shuffle_names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                               "__shfl_xor_sync"};

template <class T> __device__ T make(int v);
template <> __device__ inline int make<int>(int v) { return v; }
template <> __device__ inline double make<double>(int v) { return v + 0.5; }
template <> __device__ inline unsigned long long make<unsigned long long>(int v) {
    return (unsigned long long)v << 40 | (unsigned)v;
}

// out[k] = number of errors of thread k: each lane computes what it must get
template <class T> __global__ void shuffle_kernel(int* out, int kind, int width) {
    const int thread = threadIdx.x, lane = thread % 32, base = thread - lane,
              segment = lane & ~(width - 1);
    int errors = 0;
    for (int d = 0; d < 32; d++) {
        const T mine = make<T>(value_of(thread) + d);
        T got = mine;
        int source = lane;
        if (kind == SHFL) {
            got = __shfl_sync(0xffffffffu, mine, d, width);
            source = segment + (d & (width - 1));
        } else if (kind == UP) {
            got = __shfl_up_sync(0xffffffffu, mine, (unsigned)d, width);
            source = lane - d < segment ? lane : lane - d;
        } else if (kind == DOWN) {
            got = __shfl_down_sync(0xffffffffu, mine, (unsigned)d, width);
            source = lane + d >= segment + width ? lane : lane + d;
        } else {
            got = __shfl_xor_sync(0xffffffffu, mine, d, width);
            source = (lane ^ d) >= segment + width ? lane : lane ^ d;
        }
        if (got != make<T>(value_of(base + source) + d)) { errors++; }
    }
    out[thread] = errors;
}

template <class T> void test_shuffles(const char* type) {
    for (int kind = 0; kind < SHUFFLES; kind++) {
        int errors = 0;
        for (int width = 1; width <= 32; width *= 2) {
            int* out = device_zeros<int>(96);
            shuffle_kernel<T><<<1, 96>>>(out, kind, width);
            for (int e : take(out, 96)) { errors += e; }
        }
        check(errors == 0, "%s of %s, widths 1 to 32", shuffle_names[kind], type);
    }
}

// a mask of some lanes, and a block whose last warp is not full
__global__ void masks_kernel(unsigned* out) {
    const unsigned thread = threadIdx.x, lane = thread % 32;
    const unsigned mask = thread < 32 ? 0x0f0f0f0fu : 0xffu; // of the second warp 8 lanes exist
    unsigned result = 0;
    if (mask >> lane & 1) {
        result = __ballot_sync(mask, lane % 2 == 0);
        result += __shfl_sync(mask, thread, 3) * 3;
        result += __any_sync(mask, lane == 1) ? 5 : 0;
        result += __all_sync(mask, lane == 1) ? 1000 : 7;
        result += __reduce_add_sync(mask, 1u);
    }
    out[thread] = result;
}

void test_masks() {
    const std::vector<unsigned> got = take(
        [] {
            unsigned* p = device_zeros<unsigned>(40);
            masks_kernel<<<1, 40>>>(p);
            return p;
        }(),
        40);
    bool ok = true;
    for (unsigned i = 0; i < 40; i++) {
        const unsigned mask = i < 32 ? 0x0f0f0f0fu : 0xffu;
        const unsigned want =
            (mask & 0x55555555u) + (i < 32 ? 3 : 35) * 3 + 5 + 7 + __builtin_popcount(mask);
        ok = ok && got[i] == (mask >> i % 32 & 1 ? want : 0);
    }
    check(ok, "warp operations of some lanes, and of a warp that is not full");
}

__global__ void votes_kernel(unsigned* out) {
    const unsigned lane = threadIdx.x;
    out[lane * 6 + 0] = __ballot_sync(0xffffffffu, value_of((int)lane) & 1);
    out[lane * 6 + 1] = (unsigned)__any_sync(0xffffffffu, lane == 31);
    out[lane * 6 + 2] = (unsigned)__any_sync(0xffffffffu, lane == 32);
    out[lane * 6 + 3] = (unsigned)__all_sync(0xffffffffu, lane < 32);
    out[lane * 6 + 4] = (unsigned)__all_sync(0xffffffffu, lane != 17);
    out[lane * 6 + 5] = __ballot_sync(0xffffffffu, 1);
}

void test_votes() {
    unsigned* out = device_zeros<unsigned>(32 * 6);
    votes_kernel<<<1, 32>>>(out);
    const std::vector<unsigned> got = take(out, 32 * 6);
    unsigned ballot = 0;
    for (int i = 0; i < 32; i++) { ballot |= (unsigned)(value_of(i) & 1) << i; }
    bool ok = true;
    for (int i = 0; i < 32; i++) {
        const unsigned* g = &got[i * 6];
        ok = ok && g[0] == ballot && g[1] != 0 && g[2] == 0 && g[3] != 0 && g[4] == 0 &&
             g[5] == 0xffffffffu;
    }
    check(ok, "__ballot_sync, __any_sync, __all_sync");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
__global__ void reduce_sync_kernel(unsigned* out) {
    const int x = value_of((int)threadIdx.x) - 2048;
    const unsigned u = (unsigned)value_of((int)threadIdx.x);
    unsigned* o = out + threadIdx.x * 9;
    o[0] = (unsigned)__reduce_add_sync(0xffffffffu, x);
    o[1] = (unsigned)__reduce_min_sync(0xffffffffu, x);
    o[2] = (unsigned)__reduce_max_sync(0xffffffffu, x);
    o[3] = __reduce_add_sync(0xffffffffu, u);
    o[4] = __reduce_min_sync(0xffffffffu, u);
    o[5] = __reduce_max_sync(0xffffffffu, u);
    o[6] = __reduce_and_sync(0xffffffffu, u | 64u);
    o[7] = __reduce_or_sync(0xffffffffu, u);
    o[8] = __reduce_xor_sync(0xffffffffu, u);
}
#endif

void test_reduce_sync() {
    unsigned* out = device_zeros<unsigned>(32 * 9);
    reduce_sync_kernel<<<1, 32>>>(out);
    const std::vector<unsigned> got = take(out, 32 * 9);
    int sum = 0, low = INT_MAX, high = INT_MIN;
    unsigned usum = 0, ulow = UINT_MAX, uhigh = 0, all = ~0u, any = 0, parity = 0;
    for (int i = 0; i < 32; i++) {
        const int x = value_of(i) - 2048;
        const unsigned u = (unsigned)value_of(i);
        sum += x, low = x < low ? x : low, high = x > high ? x : high;
        usum += u, ulow = u < ulow ? u : ulow, uhigh = u > uhigh ? u : uhigh, all &= u | 64u,
                   any |= u, parity ^= u;
    }
    const unsigned want[9] = {(unsigned)sum, (unsigned)low, (unsigned)high, usum, ulow, uhigh,
                              all,           any,           parity};
    bool ok = true;
    for (int i = 0; i < 32 * 9; i++) { ok = ok && got[i] == want[i % 9]; }
    check(ok, "__reduce_add/min/max/and/or/xor_sync");
}

// ----------------------------------------------------------------------------
// Cooperative groups

struct AddFour {
    __host__ __device__ Four operator()(Four a, Four b) const {
        return Four{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
    }
};

// errors of each thread; want: what plain loops over the tile give
template <int N> __global__ void tile_kernel(int* errors, float* sums) {
    cg::thread_block block = cg::this_thread_block();
    cg::thread_block_tile<N> tile = cg::tiled_partition<N>(block);
    const int thread = threadIdx.x, rank = thread % N, base = thread - rank;
    const int mine = value_of(thread);
    int e = 0;
    e += (int)block.thread_rank() != thread || (int)block.size() != (int)blockDim.x;
    e += (int)tile.thread_rank() != rank || (int)tile.size() != N ||
         (int)tile.meta_group_rank() != thread / N;
    e += (int)tile.meta_group_size() != (int)blockDim.x / N;
    int sum = 0, low = INT_MAX, high = INT_MIN, before = 0, most = INT_MIN;
    unsigned ballot = 0;
    for (int i = 0; i < N; i++) {
        const int v = value_of(base + i);
        sum += v;
        low = v < low ? v : low;
        high = v > high ? v : high;
        before += i < rank ? v : 0;
        most = i <= rank && v > most ? v : most;
        ballot |= (unsigned)(v & 1) << i;
    }
    e += cg::reduce(tile, mine, cg::plus<int>()) != sum;
    e += cg::reduce(tile, mine, cg::less<int>()) != low;
    e += cg::reduce(tile, mine, cg::greater<int>()) != high;
    const Four four = cg::reduce(tile, Four{(float)mine, 1.0f, (float)rank, 0.0f}, AddFour());
    e += four != Four{(float)sum, (float)N, (float)(N * (N - 1) / 2), 0.0f};
    e += cg::inclusive_scan(tile, mine) != before + mine;
    e += cg::exclusive_scan(tile, mine) != before;
    e += cg::inclusive_scan(tile, mine, cg::greater<int>()) != most;
    e += cg::exclusive_scan(tile, mine, cg::plus<int>()) != before;
    e += tile.ballot(mine & 1) != ballot || tile.any(mine & 1) != (ballot != 0);
    e += tile.all(mine & 1) != (ballot == (N == 32 ? ~0u : (1u << (N % 32)) - 1));
    e += tile.shfl(mine, N - 1) != value_of(base + N - 1);
    e += tile.shfl_up(mine, 1) != value_of(rank > 0 ? thread - 1 : thread);
    e += tile.shfl_down(mine, 1) != value_of(rank < N - 1 ? thread + 1 : thread);
    e += tile.shfl_xor(mine, N / 2) != value_of(base + (rank ^ N / 2));
    const Four wide = tile.shfl(Four{(float)thread, 1.0f, 2.0f, (float)-thread}, 0);
    e += wide != Four{(float)base, 1.0f, 2.0f, (float)-base};
    tile.sync();
    block.sync();
    errors[thread] = e;
    sums[thread] = cg::reduce(tile, 1.0f / (1.0f + (float)mine), cg::plus<float>());
}

template <int N> void test_tile() {
    const int threads = 128;
    int* errors = device_zeros<int>(threads);
    float* sums = device_zeros<float>(threads);
    tile_kernel<N><<<1, threads>>>(errors, sums);
    int total = 0;
    for (int e : take(errors, threads)) { total += e; }
    check(total == 0, "cg::tiled_partition<%d>: ranks, reduce, scans, votes, shuffles", N);
    const std::vector<float> got = take(sums, threads);
#ifdef CPU_DEVICE
    bool ok = true;
    for (int base = 0; base < threads; base += N) {
        float v[N];
        for (int i = 0; i < N; i++) { v[i] = 1.0f / (1.0f + (float)value_of(base + i)); }
        for (int half = N / 2; half > 0; half /= 2) {
            for (int i = 0; i < half; i++) { v[i] += v[i + half]; }
        }
        for (int i = 0; i < N; i++) { ok = ok && got[base + i] == v[0]; }
    }
    check(ok, "cg::reduce of floats over %d lanes has the bits of a butterfly", N);
#endif
}

// tiles of one warp do different things: one must not wait for another
__global__ void tiles_alone_kernel(int* out) {
    auto tile = cg::tiled_partition<8>(cg::this_thread_block());
    int x = (int)tile.thread_rank();
    for (unsigned i = 0; i <= tile.meta_group_rank(); i++) {
        x = cg::reduce(tile, x, cg::greater<int>()) + (int)tile.thread_rank();
    }
    out[threadIdx.x] = x;
}

void test_tiles_alone() {
    int* out = device_zeros<int>(32);
    tiles_alone_kernel<<<1, 32>>>(out);
    const std::vector<int> got = take(out, 32);
    bool ok = true;
    for (int i = 0; i < 32; i++) {
        int top = 0; // the largest of a tile
        for (int round = 0; round <= i / 8; round++) { top = round == 0 ? 7 : top + 7; }
        ok = ok && got[i] == top + i % 8;
    }
    check(ok, "tiles of one warp that reduce a different number of times");
}

// ----------------------------------------------------------------------------
// Barriers

__global__ void barriers_kernel(int* out, int limit) {
    __shared__ int s[256];
    const int t = (int)threadIdx.x;
    if (t >= limit) { return; } // threads that have returned count as arrived
    int errors = 0;
    for (int round = 0; round < 5; round++) {
        s[t] = t * 10 + round;
        __syncthreads();
        errors += s[limit - 1 - t] != (limit - 1 - t) * 10 + round;
        errors += __syncthreads_count(t % 3 == 0) != (limit + 2) / 3;
        errors += (__syncthreads_or(t == limit - 1) != 0) != true;
        errors += (__syncthreads_or(t == limit) != 0) != false;
        errors += (__syncthreads_and(t < limit) != 0) != true;
        errors += (__syncthreads_and(t != 5) != 0) != false;
    }
    out[blockIdx.x * 256 + t] = errors + 1;
}

void test_barriers() {
    for (int limit : {256, 200, 33}) {
        int* out = device_zeros<int>(3 * 256);
        barriers_kernel<<<3, 256>>>(out, limit);
        const std::vector<int> got = take(out, 3 * 256);
        bool ok = true;
        for (int i = 0; i < 3 * 256; i++) { ok = ok && got[i] == (i % 256 < limit ? 1 : 0); }
        check(ok, "__syncthreads, _count, _or, _and where %d of 256 threads have returned",
              256 - limit);
    }
}

__global__ void syncwarp_kernel(int* out) {
    __shared__ int s[64];
    const int t = (int)threadIdx.x;
    int x = t;
    for (int i = 0; i < 4; i++) {
        s[t] = x;
        __syncwarp();
        x = s[t ^ 1] + i;
        __syncwarp();
    }
    out[t] = x;
}

void test_syncwarp() {
    int* out = device_zeros<int>(64);
    syncwarp_kernel<<<1, 64>>>(out);
    const std::vector<int> got = take(out, 64);
    bool ok = true;
    for (int i = 0; i < 64; i++) { ok = ok && got[i] == i + 6; }
    check(ok, "__syncwarp orders shared memory");
}

// ----------------------------------------------------------------------------
// Atomics

template <class T> __global__ void atomic_add_kernel(T* sum) {
    __shared__ T s;
    if (threadIdx.x == 0) { s = 0; }
    __syncthreads();
    atomicAdd(&s, (T)1);
    atomicAdd(&sum[threadIdx.x % 4], (T)(threadIdx.x % 4 + 1));
    __syncthreads();
    if (threadIdx.x == 0) { atomicAdd(&sum[4], s); }
}

// the same without shared memory: a free kernel
template <class T> __global__ void atomic_add_free_kernel(T* sum) {
    const int t = (int)threadIdx.x;
    atomicAdd(&sum[t % 4], (T)(t % 4 + 1));
    atomicAdd(&sum[4], (T)1);
}

template <class T> void test_atomic_add(const char* type) {
    for (int is_free = 0; is_free < 2; is_free++) {
        T* sum = device_zeros<T>(5);
        if (is_free) {
            atomic_add_free_kernel<T><<<100, 128>>>(sum);
        } else {
            atomic_add_kernel<T><<<100, 128>>>(sum);
        }
        const std::vector<T> got = take(sum, 5);
        bool ok = got[4] == (T)12800;
        for (int i = 0; i < 4; i++) { ok = ok && got[i] == (T)(3200 * (i + 1)); }
        check(ok, "atomicAdd of %s by 100 blocks%s", type, is_free ? ", in a free kernel" : "");
    }
}

__global__ void atomics_kernel(int* i, unsigned* u, unsigned long long* l, float* f) {
    const int t = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicSub(&i[0], 2);
    atomicMax(&i[1], value_of(t) - 2000);
    atomicMin(&i[2], value_of(t) - 2000);
    atomicMax(&u[0], (unsigned)value_of(t));
    atomicAnd(&u[1], ~(1u << (t % 31)));
    atomicOr(&u[2], 1u << (t % 31));
    atomicXor(&u[3], (unsigned)t);
    atomicMax(&l[0], (unsigned long long)t << 33);
    const int old = atomicExch(&i[3], t);
    if (old < 0) { atomicAdd(&u[4], 1u); } // one thread finds the first value
    unsigned* bits = (unsigned*)f;
    for (unsigned seen = atomicOr(bits, 0u), was = ~seen; was != seen;) {
        was = atomicCAS(bits, seen, __float_as_uint(__uint_as_float(seen) + 1.0f));
        if (was != seen) {
            seen = was;
            was = ~seen;
        }
    }
}

void test_atomics() {
    const int n = 50 * 64;
    int* i = to_device<int>({0, INT_MIN, INT_MAX, -1});
    unsigned* u = to_device<unsigned>({0, ~0u, 0, 0, 0});
    unsigned long long* l = device_zeros<unsigned long long>(1);
    float* f = device_zeros<float>(1);
    atomics_kernel<<<50, 64>>>(i, u, l, f);
    int low = INT_MAX, high = INT_MIN;
    unsigned parity = 0;
    for (int t = 0; t < n; t++) {
        const int v = value_of(t) - 2000;
        low = v < low ? v : low, high = v > high ? v : high, parity ^= (unsigned)t;
    }
    std::vector<int> gi(4);
    // gi[3] depends on the order: not a result
    cudaCheck(cudaMemcpy(gi.data(), i, 16, cudaMemcpyDeviceToHost));
    const std::vector<unsigned> gu = take(u, 5);
    check(gi[0] == -2 * n && gi[1] == high && gi[2] == low,
          "atomicSub, atomicMax, atomicMin of int");
    check(gu[0] == (unsigned)(high + 2000) && take(l, 1)[0] == (unsigned long long)(n - 1) << 33,
          "atomicMax of unsigned, of unsigned long long");
    check(gu[1] == 0x80000000u && gu[2] == 0x7fffffffu && gu[3] == parity,
          "atomicAnd, atomicOr, atomicXor");
    check(gi[3] >= 0 && gi[3] < n && gu[4] == 1, "atomicExch");
    check(take(f, 1)[0] == (float)n, "atomicCAS in a loop");
    cudaCheck(cudaFree(i));
}

// the last block to finish adds up what all blocks have left
__global__ void last_block_kernel(int* sums, unsigned* count, int* total) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = (int)blockIdx.x;
        __threadfence();
        last = atomicAdd(count, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        __threadfence();
        int sum = 0;
        for (unsigned i = 0; i < gridDim.x; i++) { sum += ((volatile int*)sums)[i]; }
        *total = sum;
    }
}

void test_last_block() {
    int* sums = device_zeros<int>(200);
    unsigned* count = device_zeros<unsigned>(1);
    int* total = device_zeros<int>(1);
    last_block_kernel<<<200, 32>>>(sums, count, total);
    check(take(total, 1)[0] == 199 * 200 / 2,
          "the last block to finish sees what all have written");
    take(sums, 200);
    take(count, 1);
}

// ----------------------------------------------------------------------------
// Shared memory

template <int N> __device__ int sum_of_instance(int x) { // each instance has storage of its own
    __shared__ int s[N];
    if (threadIdx.x < N) { s[threadIdx.x] = x; }
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < N; i++) { sum += s[i]; }
    return sum;
}

__global__ void static_shared_kernel(int* out) {
    __shared__ int tile[8][33], other[4];
    __shared__ float one;
    __shared__ __align__(16) unsigned char bytes[64];
    const int x = (int)threadIdx.x, y = (int)threadIdx.y;
    tile[y][x] = y * 100 + x;
    if (x == 0 && y < 4) { other[y] = y; }
    if (x == 1 && y == 1) { one = 1.5f; }
    if (x < 4 && y == 0) { ((float4*)bytes)[x] = make_float4((float)x, 1.0f, 2.0f, 3.0f); }
    __syncthreads();
    int errors = tile[7 - y][31 - x] != (7 - y) * 100 + 31 - x;
    errors += other[y % 4] != y % 4 || one != 1.5f || ((float4*)bytes)[y % 4].x != (float)(y % 4);
    __syncthreads();
    if (y == 0) {
        out[blockIdx.x * 32 + x] = errors;
    } else if (errors) {
        atomicAdd(&out[blockIdx.x * 32 + x], 1000);
    }
}

__global__ void instances_kernel(int* out) {
    const int a = sum_of_instance<4>(1), b = sum_of_instance<8>(2);
    __syncthreads();
    out[threadIdx.x] = a * 100 + b;
}

template <class T> __global__ void dynamic_shared_kernel(T* out, int n) {
    extern __shared__ __align__(16) unsigned char raw[];
    T* s = (T*)raw;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) { s[i] = (T)(i + (int)blockIdx.x); }
    __syncthreads();
    T sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) { sum += s[n - 1 - i]; }
    out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// the sum of all that n elements give is known
template <class T> void test_dynamic_shared(int n) {
    T* out = device_zeros<T>(2 * 64);
    if (n * sizeof(T) > 48 * 1024) {
        cudaCheck(cudaFuncSetAttribute(dynamic_shared_kernel<T>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       n * (int)sizeof(T)));
    }
    dynamic_shared_kernel<T><<<2, 64, n * sizeof(T)>>>(out, n);
    double sum = 0.0;
    for (T x : take(out, 2 * 64)) { sum += (double)x; }
    check(sum == (double)n * (n - 1) + n, "%zu bytes of dynamic shared memory", n * sizeof(T));
}

void test_shared() {
    int* out = device_zeros<int>(4 * 32);
    static_shared_kernel<<<4, dim3(32, 8)>>>(out);
    int errors = 0;
    for (int e : take(out, 4 * 32)) { errors += e; }
    check(errors == 0,
          "static shared memory: several, two-dimensional, scalar and aligned variables");
    int* sums = device_zeros<int>(64);
    instances_kernel<<<1, 64>>>(sums);
    bool ok = true;
    for (int x : take(sums, 64)) { ok = ok && x == 416; }
    check(ok, "static shared memory of two instances of a __device__ function");
    test_dynamic_shared<int>(1000);
    test_dynamic_shared<double>(6144);
    test_dynamic_shared<float>(227 * 256);
}

#ifdef CPU_DEVICE
__global__ void poison_kernel(float* out) {
    __shared__ float s[64];
    extern __shared__ float d[];
    out[blockIdx.x * 128 + threadIdx.x * 2] = s[threadIdx.x];
    out[blockIdx.x * 128 + threadIdx.x * 2 + 1] = d[threadIdx.x];
    __syncthreads();
    s[threadIdx.x] = d[threadIdx.x] = 0.0f; // not what the next block finds
}

void test_poison() {
    float* p;
    std::vector<float> host(100);
    cudaCheck(cudaMalloc((void**)&p, 400));
    cudaCheck(cudaMemcpy(host.data(), p, 400, cudaMemcpyDeviceToHost));
    bool ok = true;
    for (float x : host) { ok = ok && isnan(x); }
    check(ok, "fresh device memory is NaN");
    cudaCheck(cudaFree(p));
    float* out = device_zeros<float>(5 * 128);
    poison_kernel<<<5, 64, 256>>>(out);
    ok = true;
    for (float x : take(out, 5 * 128)) { ok = ok && isnan(x); }
    check(ok, "shared memory of every block starts as NaN");
}
#endif

// ----------------------------------------------------------------------------
// Grids and kernels of all forms

__device__ uint64_t code_of_thread() { // a __device__ function may mention the indices
    const uint64_t block =
        blockIdx.x + (uint64_t)gridDim.x * (blockIdx.y + (uint64_t)gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    return block * blockDim.x * blockDim.y * blockDim.z + thread;
}

__global__ void grid_kernel(uint64_t* out) {
    const uint64_t block =
        blockIdx.x + (uint64_t)gridDim.x * (blockIdx.y + (uint64_t)gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const uint64_t i = block * blockDim.x * blockDim.y * blockDim.z + thread;
    out[i] += (i << 30) + (threadIdx.x << 20) + (threadIdx.y << 10) + threadIdx.z + 1;
}

__global__ void grid_fibers_kernel(uint64_t* out) {
    const uint64_t i = code_of_thread();
    __syncthreads();
    out[i] += (i << 30) + (threadIdx.x << 20) + (threadIdx.y << 10) + threadIdx.z + 1;
}

void test_grids() {
    const dim3 shapes[][2] = {{dim3(1), dim3(1)},
                              {dim3(7), dim3(33)},
                              {dim3(3, 5), dim3(17, 3)},
                              {dim3(2, 3, 4), dim3(5, 6, 7)},
                              {dim3(1, 1, 70), dim3(1, 1, 64)},
                              {dim3(1, 300), dim3(2, 512)},
                              {dim3(10000), dim3(3)}};
    for (const dim3* shape : shapes) {
        const dim3 g = shape[0], b = shape[1];
        const size_t threads = b.x * b.y * b.z, n = threads * g.x * g.y * g.z;
        for (int fibers = 0; fibers < 2; fibers++) {
            uint64_t* out = device_zeros<uint64_t>(n);
            if (fibers) { grid_fibers_kernel<<<g, b>>>(out); } else { grid_kernel<<<g, b>>>(out); }
            const std::vector<uint64_t> got = take(out, n);
            bool ok = true;
            for (size_t i = 0; i < n; i++) {
                const size_t t = i % threads;
                ok = ok && got[i] == (i << 30) + (t % b.x << 20) + (t / b.x % b.y << 10) +
                                         t / b.x / b.y + 1;
            }
            check(ok, "grid %u x %u x %u of blocks %u x %u x %u%s", g.x, g.y, g.z, b.x, b.y, b.z,
                  fibers ? " with a barrier" : "");
        }
    }
}

template <class T, int K> __global__ void template_kernel(T* out, T x) { out[threadIdx.x] = x + K; }
namespace space {
template <class T> struct Holder {
    static void run(T* out) { template_kernel<T, sizeof(T)><<<1, 1>>>(out, 1); }
};
__global__ void kernel(int* out) { *out = 42; }
}
__global__ void no_arguments_kernel() {}
__global__ void pointers_kernel(int* out, const int* absent, const float* also) {
    *out = absent == NULL && also == NULL;
}
struct Pair { int a, b; };
__global__ void __launch_bounds__(32) pair_kernel(Pair pair, int* out) {
    *out = pair.a * 10 + pair.b;
}
__global__ void changes_its_parameters_kernel(int* out, const int* in, int n, Pair pair) {
    out += threadIdx.x;
    in += threadIdx.x;
    while (n > 0) { n -= 10; }
    pair.a += (int)threadIdx.x;
    *out = *in + n + pair.a;
}
__global__ void changes_its_parameters_fibers_kernel(int* out, const int* in, int n) {
    out += threadIdx.x;
    in += threadIdx.x;
    n += (int)threadIdx.x;
    __syncthreads();
    *out = *in + n;
}
struct Table { const int* in[4]; int n[4]; }; // by value, and indexed
__global__ void table_kernel(int* out, Table table) {
    out[threadIdx.x] = table.in[threadIdx.x % 4][0] + table.n[threadIdx.x % 4];
}
#define LAUNCH(kernel, blocks, ...) kernel<<<blocks, 1>>>(__VA_ARGS__)

void test_forms() {
    const int configuration[] = {1, 1};
    int* out = device_zeros<int>(32);
    int host[32];
    auto result = [&] {
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaMemcpy(host, out, sizeof(host), cudaMemcpyDeviceToHost));
        return host[0];
    };
    template_kernel<int, (3 > 2) ? 5 : 6><<<1, 1>>>(out, 1);
    check(result() == 6, "a template kernel with > among its arguments");
    space::Holder<int>::run(out);
    check(result() == 5, "a launch in a template, of a kernel that depends on it");
    space::kernel<<<configuration[0], dim3(configuration[1]),
                    0>>>( // a comment with ) and >>>
        out);
    check(result() == 42, "a kernel in a namespace, launched over several lines");
    no_arguments_kernel<<<1, 1>>>();
    pointers_kernel<<<1, 1>>>(out, 0, NULL);
    check(result() == 1, "a literal 0 and NULL as pointer arguments");
    pair_kernel<<<1, 1>>>({4, 2}, out);
    check(result() == 42, "an argument in braces");
    void (*pointer)(int*, int) = template_kernel<int, 7>;
    pointer<<<1, 1>>>(out, 1 << 1);
    check(result() == 9, "a launch through a function pointer");
    LAUNCH(space::kernel, 1, out);
    LAUNCH(no_arguments_kernel, 2);
    check(result() == 42, "a launch in a macro");
    std::vector<int> numbers(32);
    for (int i = 0; i < 32; i++) { numbers[i] = value_of(i); }
    int* in = to_device(numbers);
    changes_its_parameters_kernel<<<1, 32>>>(out, in, 25, Pair{100, 0});
    bool ok = result() == numbers[0] + 95;
    for (int i = 0; i < 32; i++) { ok = ok && host[i] == numbers[i] + 95 + i; }
    changes_its_parameters_fibers_kernel<<<1, 32>>>(out, in, 25);
    ok = ok && result() == numbers[0] + 25;
    for (int i = 0; i < 32; i++) { ok = ok && host[i] == numbers[i] + 25 + i; }
    check(ok, "every thread has its own copy of the parameters");
    table_kernel<<<1, 32>>>(out, Table{{in, in + 1, in + 2, in + 3}, {1, 2, 3, 4}});
    ok = result() == numbers[0] + 1;
    for (int i = 0; i < 32; i++) { ok = ok && host[i] == numbers[i % 4] + i % 4 + 1; }
    check(ok, "a struct of pointers by value");
    cudaCheck(cudaFree(out));
    cudaCheck(cudaFree(in));
}

// ----------------------------------------------------------------------------
// Arithmetic

__global__ void bits_kernel(int* e) {
    int errors = 0;
    errors += __popc(0xf0f0u) != 8 || __popcll(0xf0f0000000000000ull) != 8;
    errors += __ffs(0) != 0 || __ffs(8) != 4 || __ffsll(1ll << 40) != 41;
    errors += __clz(0) != 32 || __clz(1) != 31 || __clz(-1) != 0 || __clzll(1) != 63;
    errors += __brev(1u) != 0x80000000u || __brev(0x12345678u) != 0x1e6a2c48u;
    errors += __float_as_uint(1.0f) != 0x3f800000u || __uint_as_float(0xc0000000u) != -2.0f ||
              __float_as_int(-0.0f) != INT_MIN;
    errors += __umulhi(0x80000000u, 6u) != 3u || __umul64hi(1ull << 63, 6ull) != 3ull;
    errors += min(3, -4) != -4 || max(3u, 4u) != 4u || min(1.0f, 2.0f) != 1.0f ||
              max(-1.0, 1.0) != 1.0 || max(1, 2u) != 2u;
    errors += rsqrtf(4.0f) != 0.5f;
    *e = errors;
}

template <class T> __global__ void hints_kernel(T* out, const T* in) {
    const int t = (int)threadIdx.x;
    __stcs(&out[t * 2], __ldg(&in[t]));
    __stcg(&out[t * 2 + 1], __ldcs(&in[t]));
}

void test_arithmetic() {
    int* e = device_zeros<int>(1);
    bits_kernel<<<1, 1>>>(e);
    check(take(e, 1)[0] == 0, "__popc, __ffs, __clz, __brev, casts, __umulhi, min, max, rsqrtf");
    float* in = to_device<float>({1, 2, 3, 4, 5, 6, 7, 8});
    float* out = device_zeros<float>(16);
    hints_kernel<<<1, 8>>>(out, in);
    float4* wide = (float4*)device_zeros<float>(16);
    hints_kernel<<<1, 2>>>(wide, (const float4*)in);
    bool ok = same(take(out, 16), {1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8});
    ok = ok && same(take((float*)wide, 16), {1, 2, 3, 4, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8});
    check(ok, "__ldg, __ldcs, __stcs, __stcg of float and float4");
    cudaCheck(cudaFree(in));
    check(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(float2) == 8 &&
              sizeof(uint3) == 12 && alignof(__nv_bfloat162) == 4,
          "sizes and alignments of vector types");
}

__global__ void round_kernel(unsigned short* out, float* back, const unsigned* bits, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const __nv_bfloat16 b = __float2bfloat16(__uint_as_float(bits[i]));
        out[i] = __bfloat16_as_ushort(b);
        back[i] = __bfloat162float(b);
    }
}

void test_bf16() {
    // around every bf16 value: itself, just below and above the middle to the next, and the middle:
    // a tie
    const size_t n = 65536 * 4;
    std::vector<unsigned> bits(n);
    for (size_t i = 0; i < n; i++) {
        const unsigned tails[4] = {0, 0x7fff, 0x8000, 0x8001};
        bits[i] = (unsigned)(i / 4) << 16 | tails[i % 4];
    }
    unsigned* d = to_device(bits);
    unsigned short* out = device_zeros<unsigned short>(n);
    float* back = device_zeros<float>(n);
    round_kernel<<<(unsigned)((n + 255) / 256), 256>>>(out, back, d, n);
    const std::vector<unsigned short> got = take(out, n);
    const std::vector<float> wide = take(back, n);
    size_t wrong = 0;
    for (size_t i = 0; i < n; i++) {
        const unsigned upper = (unsigned)(i / 4);
        float x, y;
        memcpy(&x, &bits[i], 4);
        const unsigned short want =
            (unsigned short)(upper + (i % 4 == 3 || (i % 4 == 2 && upper % 2 == 1)));
        const unsigned widened = (unsigned)got[i] << 16;
        memcpy(&y, &widened, 4);
        wrong += isnan(x) ? !isnan(y) || !isnan(wide[i]) : got[i] != want || y != wide[i];
    }
    check(wrong == 0, "bf16 rounds to nearest, ties to even, and keeps NaN: %zu of %zu wrong",
          wrong, n);
    const __nv_bfloat162 pair = __floats2bfloat162_rn(1.5f, -2.0f);
    const float2 floats = __bfloat1622float2(pair);
    check(floats.x == 1.5f && floats.y == -2.0f &&
              (float)__ushort_as_bfloat16(0x4049) == 3.140625f && __low2float(pair) == 1.5f,
          "bf16 pairs and raw bits");
    cudaCheck(cudaFree(d));
}

enum { EXP, LOG, TANH, ERF, FUNCTIONS };
__device__ inline float apply(int function, float x) {
    return function == EXP    ? expf(x)
           : function == LOG  ? logf(x)
           : function == TANH ? tanhf(x)
                              : erff(x);
}
template <int Function> __global__ void function_kernel(float* out, const float* in, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = apply(Function, in[i]); }
}
template <int Function>
__global__ void function_fibers_kernel(float* out, const float* in, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    __syncthreads();
    if (i < n) { out[i] = apply(Function, in[i]); }
}

// every 997th float, and the same bits from the vectorised loop and from single threads
template <int Function>
void test_function(const char* name, double (*reference)(double), double allowed) {
    std::vector<float> x;
#if defined(CPU_ASAN) || defined(CPU_TSAN)
    const uint64_t step = 9973 * 1009; // under a sanitizer every thread is a fiber
#else
    const uint64_t step = 997;
#endif
    for (uint64_t bits = 0; bits < (uint64_t)1 << 32; bits += step) {
        const uint32_t b = (uint32_t)bits;
        x.resize(x.size() + 1);
        memcpy(&x.back(), &b, 4);
    }
    for (float special : {0.0f, -0.0f, 1.0f, -1.0f, INFINITY, -INFINITY, NAN, FLT_MIN, FLT_MAX,
                          88.7228317f, 88.7228394f, -103.97f, -104.0f}) {
        x.push_back(special);
    }
    const size_t n = x.size();
    float* in = to_device(x);
    float *out = device_zeros<float>(n), *out_fibers = device_zeros<float>(n);
    function_kernel<Function><<<(unsigned)((n + 255) / 256), 256>>>(out, in, n);
    function_fibers_kernel<Function><<<(unsigned)((n + 255) / 256), 256>>>(out_fibers, in, n);
    const std::vector<float> y = take(out, n), z = take(out_fibers, n);
    double worst = 0.0;
    float at = 0.0f;
    size_t special = 0, differ = 0;
    for (size_t i = 0; i < n; i++) {
        const double want = reference((double)x[i]);
        const float rounded = (float)want;
        differ += memcmp(&y[i], &z[i], 4) != 0;
        if (isnan(rounded) || isinf(rounded) || isinf(y[i]) || rounded == 0.0f) {
            special += isnan(rounded) ? !isnan(y[i])
                                      : y[i] != rounded || signbit(y[i]) != signbit(rounded);
            continue;
        }
        int exponent;
        frexp(want, &exponent);
        const double error =
            fabs((double)y[i] - want) / ldexp(1.0, (exponent < -125 ? -125 : exponent) - 24);
        if (!(error <= worst)) { worst = error, at = x[i]; }
    }
    check(worst <= allowed && special == 0,
          "%s: error at most %.2f ulp (at %g), %zu special values wrong, of %zu floats", name,
          worst, at, special, n);
    check(differ == 0, "%s: the same bits in a vectorised loop and in single threads", name);
    cudaCheck(cudaFree(in));
}

// ----------------------------------------------------------------------------
// Runtime

__global__ void count_kernel(int* count) { atomicAdd(count, 1); }

void test_errors() {
    int* count = device_zeros<int>(1);
    count_kernel<<<1, 1025>>>(count);
    check(cudaPeekAtLastError() == cudaErrorInvalidConfiguration &&
              cudaGetLastError() == cudaErrorInvalidConfiguration &&
              cudaGetLastError() == cudaSuccess,
          "a block of 1,025 threads is an error, until it is read");
    count_kernel<<<0, 32>>>(count);
    check(cudaGetLastError() == cudaErrorInvalidConfiguration, "an empty grid is an error");
    count_kernel<<<1, 1, 227 * 1024>>>(count);
    check(cudaGetLastError() == cudaErrorInvalidValue,
          "more than 48 KiB of dynamic shared memory must be asked for");
    check(take(count, 1)[0] == 0, "a launch that fails runs no thread");
    check(cudaFree((void*)0x1234) == cudaErrorInvalidValue &&
              cudaGetLastError() == cudaErrorInvalidValue,
          "cudaFree of what is no allocation");
    check(cudaFree(NULL) == cudaSuccess, "cudaFree of NULL");
    check(strcmp(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation") == 0 &&
              strcmp(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory") == 0,
          "names of errors");
}

void test_memory() {
    size_t before, during, after, total;
    void* p;
    cudaCheck(cudaMemGetInfo(&before, &total));
    cudaCheck(cudaMalloc(&p, 64 << 20));
    cudaCheck(cudaMemGetInfo(&during, &total));
    cudaCheck(cudaFree(p));
    cudaCheck(cudaMemGetInfo(&after, &total));
    check(before - during == 64 << 20 && after == before && total >= before,
          "cudaMemGetInfo counts 64 MiB");
    check(cudaMalloc(&p, total + 1) == cudaErrorMemoryAllocation && p == NULL &&
              cudaGetLastError() == cudaErrorMemoryAllocation,
          "cudaMalloc beyond the device's memory of %zu MiB", total >> 20);
#ifdef CPU_DEVICE
    check(total == (size_t)256 << 20, "CPU_MEMORY sets the size of the device's memory");
#endif
    int *pinned, *d = device_zeros<int>(100), back[100];
    cudaCheck(cudaMallocHost((void**)&pinned, 400));
    for (int i = 0; i < 100; i++) { pinned[i] = i; }
    int* e = device_zeros<int>(100);
    cudaCheck(cudaMemcpyAsync(d, pinned, 400, cudaMemcpyHostToDevice, 0));
    cudaCheck(cudaMemcpy(e, d, 400, cudaMemcpyDeviceToDevice));
    cudaCheck(cudaMemsetAsync(e, 0xff, 4, 0));
    cudaCheck(cudaMemcpy(back, e, 400, cudaMemcpyDefault));
    bool ok = back[0] == -1;
    for (int i = 1; i < 100; i++) { ok = ok && back[i] == i; }
    check(ok, "copies in all directions, and cudaMemset");
    cudaCheck(cudaFreeHost(pinned));
    take(d, 100);
    take(e, 100);
}

void test_streams() {
    cudaStream_t stream;
    cudaEvent_t begin, end, never;
    float ms = -1.0f;
    int* count = device_zeros<int>(1);
    cudaCheck(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreate(&begin));
    cudaCheck(cudaEventCreate(&end));
    cudaCheck(cudaEventCreateWithFlags(&never, cudaEventDisableTiming));
    cudaCheck(cudaStreamWaitEvent(stream, never, 0));
    cudaCheck(cudaEventRecord(begin, stream));
    for (int i = 0; i < 100; i++) { count_kernel<<<100, 32, 0, stream>>>(count); }
    cudaCheck(cudaEventRecord(end, stream));
    cudaCheck(cudaEventSynchronize(end));
    cudaCheck(cudaEventElapsedTime(&ms, begin, end));
    check(cudaEventQuery(end) == cudaSuccess && ms > 0.0f && ms < 60000.0f,
          "events measure a positive time");
    check(cudaEventElapsedTime(&ms, begin, never) == cudaErrorInvalidResourceHandle,
          "an event that was not recorded measures nothing");
    cudaGetLastError();
    cudaCheck(cudaStreamSynchronize(stream));
    check(take(count, 1)[0] == 100 * 100 * 32, "100 launches on a stream");
    cudaCheck(cudaEventDestroy(begin));
    cudaCheck(cudaEventDestroy(end));
    cudaCheck(cudaEventDestroy(never));
    cudaCheck(cudaStreamDestroy(stream));
    int device = -1, devices = 0;
    cudaDeviceProp properties;
    cudaCheck(cudaGetDeviceCount(&devices));
    cudaCheck(cudaSetDevice(0));
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaGetDeviceProperties(&properties, device));
    check(devices >= 1 && device == 0 && properties.warpSize == 32 &&
              properties.maxThreadsPerBlock == 1024 && properties.name[0] != 0,
          "device properties of \"%s\"", properties.name);
}

// ----------------------------------------------------------------------------
// What it costs

// elements: three buffers fit into the second cache, so that no time is memory's
const size_t BENCH_N = 1 << 16;

static double seconds() {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// the best of 50, in ns per unit
template <class F> double best_ns(double units, F run) {
    double best = 1e9;
    for (int i = 0; i < 50; i++) {
        const double begin = seconds();
        run();
        cudaCheck(cudaDeviceSynchronize());
        const double took = seconds() - begin;
        best = took < best ? took : best;
    }
    return best * 1e9 / units;
}

template <class T> __attribute__((noinline)) void plain_add(T* __restrict__ out,
                                                            const T* __restrict__ a,
                                                            const T* __restrict__ b) {
    for (size_t i = 0; i < BENCH_N; i++) { out[i] = (T)((float)a[i] + (float)b[i]); }
}
__host__ __device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
template <class T>
__attribute__((noinline)) void plain_gelu(T* __restrict__ out, const T* __restrict__ a) {
    for (size_t i = 0; i < BENCH_N; i++) { out[i] = (T)gelu((float)a[i]); }
}

template <int V, class T> struct alignas(V * sizeof(T)) Pack { T v[V]; };
template <int V, class T>
__global__ void bench_add_kernel(T* out, const T* a, const T* b, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        const Pack<V, T> x = *(const Pack<V, T>*)(a + i), y = *(const Pack<V, T>*)(b + i);
        Pack<V, T> z;
        for (int j = 0; j < V; j++) { z.v[j] = (T)((float)x.v[j] + (float)y.v[j]); }
        *(Pack<V, T>*)(out + i) = z;
    }
}
template <int V, class T> __global__ void bench_gelu_kernel(T* out, const T* a, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        Pack<V, T> x = *(const Pack<V, T>*)(a + i);
        for (int j = 0; j < V; j++) { x.v[j] = (T)gelu((float)x.v[j]); }
        *(Pack<V, T>*)(out + i) = x;
    }
}
__global__ void bench_barrier_kernel(int rounds) {
    for (int i = 0; i < rounds; i++) { __syncthreads(); }
}
__global__ void bench_shuffle_kernel(float* out, int rounds) {
    float x = (float)threadIdx.x;
    for (int i = 0; i < rounds; i++) { x = __shfl_xor_sync(0xffffffffu, x, 1) + 1.0f; }
    if (x < 0.0f) { *out = x; }
}
template <int N> __global__ void bench_reduce_kernel(float* out, int rounds) {
    auto tile = cg::tiled_partition<N>(cg::this_thread_block());
    float x = (float)threadIdx.x;
    for (int i = 0; i < rounds; i++) { x = cg::reduce(tile, x, cg::plus<float>()) * 0.01f; }
    if (x < 0.0f) { *out = x; }
}
__global__ void bench_scan_kernel(float* out, int rounds) {
    auto tile = cg::tiled_partition<32>(cg::this_thread_block());
    float x = (float)threadIdx.x;
    for (int i = 0; i < rounds; i++) { x = cg::inclusive_scan(tile, x) * 0.01f; }
    if (x < 0.0f) { *out = x; }
}
__global__ void bench_atomic_kernel(int* out, int rounds) {
    for (int i = 0; i < rounds; i++) { atomicAdd(out, 1); }
}

// a and b are copies of host on the device
template <int V, class T> void bench_elements(T* out, const T* a, const T* b, const std::vector<T>& host,
                                              const char* type) {
    std::vector<T> host_out(BENCH_N);
    const unsigned blocks = (unsigned)((BENCH_N / V + 255) / 256);
    const double add =
        best_ns(BENCH_N, [&] { bench_add_kernel<V><<<blocks, 256>>>(out, a, b, BENCH_N); });
    const double c_add = best_ns(BENCH_N, [&] { plain_add(host_out.data(), host.data(), host.data()); });
    const double act =
        best_ns(BENCH_N, [&] { bench_gelu_kernel<V><<<blocks, 256>>>(out, a, BENCH_N); });
    const double c_act = best_ns(BENCH_N, [&] { plain_gelu(host_out.data(), host.data()); });
    printf("| residual add, %d %s a thread | %.3f | %.3f | %.2f |\n", V, type, add, c_add,
           add / c_add);
    printf("| GELU, %d %s a thread | %.3f | %.3f | %.2f |\n", V, type, act, c_act, act / c_act);
}

template <class T> void bench_type(const char* type) {
    std::vector<T> host(BENCH_N);
    for (size_t i = 0; i < BENCH_N; i++) { host[i] = (T)((float)(i % 1001) / 500.0f - 1.0f); }
    T *a = to_device(host), *b = to_device(host), *out = device_zeros<T>(BENCH_N);
    bench_elements<1>(out, a, b, host, type);
    bench_elements<16 / sizeof(T)>(out, a, b, host, type);
    cudaCheck(cudaFree(a));
    cudaCheck(cudaFree(b));
    cudaCheck(cudaFree(out));
}

void bench() {
    const int rounds = 100;
    const double operations = 8.0 * 256 * rounds; // of 8 blocks of 256 threads
    float* out = device_zeros<float>(1);
    printf("| ns an element | kernel | plain C | ratio |\n|---|---|---|---|\n");
    bench_type<float>("float");
    bench_type<__nv_bfloat16>("bf16");
    printf("\n| operation | ns a thread |\n|---|---|\n");
    printf("| __syncthreads, 256 threads | %.1f |\n",
           best_ns(operations, [&] { bench_barrier_kernel<<<8, 256>>>(rounds); }));
    printf("| __shfl_xor_sync | %.1f |\n",
           best_ns(operations, [&] { bench_shuffle_kernel<<<8, 256>>>(out, rounds); }));
    printf("| cg::reduce, tile of 8 floats | %.1f |\n",
           best_ns(operations, [&] { bench_reduce_kernel<8><<<8, 256>>>(out, rounds); }));
    printf("| cg::reduce, tile of 32 floats | %.1f |\n",
           best_ns(operations, [&] { bench_reduce_kernel<32><<<8, 256>>>(out, rounds); }));
    printf("| cg::inclusive_scan, tile of 32 floats | %.1f |\n",
           best_ns(operations, [&] { bench_scan_kernel<<<8, 256>>>(out, rounds); }));
    printf("| atomicAdd, all threads to one address | %.1f |\n",
           best_ns(operations, [&] { bench_atomic_kernel<<<8, 256>>>((int*)out, rounds); }));
    printf("| launch of one empty block | %.1f |\n",
           best_ns(1.0, [&] { no_arguments_kernel<<<1, 1>>>(); }));
    printf("| launch of 10,000 empty blocks, a block | %.2f |\n",
           best_ns(1e4, [&] { no_arguments_kernel<<<10000, 32>>>(); }));
    cudaCheck(cudaFree(out));
}

int main(int argc, char** argv) {
    if (argc == 2 && strcmp(argv[1], "bench") == 0) {
        bench();
        return EXIT_SUCCESS;
    }
#ifdef CPU_DEVICE
    setenv("CPU_MEMORY", "268435456", 1);
#endif
    test_shuffles<int>("int");
    test_shuffles<double>("double");
    test_shuffles<unsigned long long>("unsigned long long");
    test_masks();
    test_votes();
    test_reduce_sync();
    test_tile<1>();
    test_tile<2>();
    test_tile<4>();
    test_tile<8>();
    test_tile<16>();
    test_tile<32>();
    test_tiles_alone();
    test_barriers();
    test_syncwarp();
    test_atomic_add<int>("int");
    test_atomic_add<unsigned>("unsigned");
    test_atomic_add<unsigned long long>("unsigned long long");
    test_atomic_add<float>("float");
    test_atomic_add<double>("double");
    test_atomics();
    test_last_block();
    test_shared();
#ifdef CPU_DEVICE
    test_poison();
#endif
    test_grids();
    test_forms();
    test_arithmetic();
    test_bf16();
    test_function<EXP>("expf", exp, 2.0);
    test_function<LOG>("logf", log, 2.0);
    test_function<TANH>("tanhf", tanh, 4.0);
    test_function<ERF>("erff", erf, 4.0);
    test_errors();
    test_memory();
    test_streams();
    printf("all results %016llx\n", (unsigned long long)all_results);
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
