/*
Planted bugs: what the CPU device and its sanitizer builds must find, and beside each the correct
twin, which must pass in silence.

    planted CASE bug | planted CASE correct      exit code 0: nothing was found

dev/test/planted.sh runs them all. Each case is a few lines, so that a report can only mean the bug
that was planted.
*/
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#include <cuda_runtime.h>

#define cudaCheck(call) \
    do { \
        cudaError_t err_ = (call); \
        if (err_ != cudaSuccess) { \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, \
                    cudaGetErrorString(err_)); \
            exit(EXIT_FAILURE); \
        } \
    } while (0)

const int N = 256; // threads of a block, and floats in each buffer
static float *in, *out; // (N) in device memory

// ----------------------------------------------------------------------------
// Races

template <bool Bug> __global__ void missing_syncthreads_kernel(float* o, const float* a) {
    __shared__ float s[N];
    s[threadIdx.x] = a[threadIdx.x];
    if (!Bug) { __syncthreads(); }
    o[threadIdx.x] = s[N - 1 - threadIdx.x];
}
template <bool Bug> void missing_syncthreads() {
    missing_syncthreads_kernel<Bug><<<1, N>>>(out, in);
}

template <bool Bug> __global__ void missing_syncwarp_kernel(float* o, const float* a) {
    __shared__ float s[32];
    s[threadIdx.x] = a[threadIdx.x];
    if (!Bug) { __syncwarp(); }
    o[threadIdx.x] = s[31 - threadIdx.x];
}
template <bool Bug> void missing_syncwarp() { missing_syncwarp_kernel<Bug><<<1, 32>>>(out, in); }

// a shuffle makes lanes meet, but does not order their memory
template <bool Bug> __global__ void shuffle_as_barrier_kernel(float* o, const float* a) {
    __shared__ float s[32];
    s[threadIdx.x] = a[threadIdx.x];
    float x = __shfl_xor_sync(0xffffffffu, a[threadIdx.x], 1);
    if (!Bug) { __syncwarp(); }
    o[threadIdx.x] = x + s[31 - threadIdx.x];
}
template <bool Bug> void shuffle_as_barrier() {
    shuffle_as_barrier_kernel<Bug><<<1, 32>>>(out, in);
}

// the loop writes again what others may still read
template <bool Bug> __global__ void reuse_kernel(float* o, const float* a) {
    __shared__ float s[N];
    float x = a[threadIdx.x];
    for (int i = 0; i < 3; i++) {
        s[threadIdx.x] = x;
        __syncthreads();
        x = s[(threadIdx.x + 33) % N];
        if (!Bug) { __syncthreads(); }
    }
    o[threadIdx.x] = x;
}
template <bool Bug> void reuse() { reuse_kernel<Bug><<<1, N>>>(out, in); }

template <bool Bug> __global__ void race_in_block_kernel(float* o) {
    if (Bug) { o[0] += 1.0f; } else { atomicAdd(&o[0], 1.0f); }
}
template <bool Bug> void race_in_block() { race_in_block_kernel<Bug><<<1, 32>>>(out); }

template <bool Bug> __global__ void race_between_blocks_kernel(float* o) {
    if (threadIdx.x != 0) { return; }
    if (Bug) { o[0] += 1.0f; } else { atomicAdd(&o[0], 1.0f); }
}
template <bool Bug> void race_between_blocks() { race_between_blocks_kernel<Bug><<<8, 32>>>(out); }

// blocks two apart share an element
template <bool Bug> __global__ void race_between_far_blocks_kernel(float* o) {
    if (threadIdx.x == 0) { o[Bug ? blockIdx.x % 2 : blockIdx.x] = (float)blockIdx.x; }
}
template <bool Bug> void race_between_far_blocks() {
    race_between_far_blocks_kernel<Bug><<<8, 32>>>(out);
}

// no race: the last block to finish reads what all have written, which the atomic counter orders
template <bool Bug> __global__ void last_block_kernel(float* o, unsigned* count) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        o[1 + blockIdx.x] = (float)blockIdx.x;
        __threadfence();
        is_last = Bug ? blockIdx.x == 3 : atomicAdd(count, 1u) == 3;
    }
    __syncthreads();
    if (is_last && threadIdx.x == 0) { o[0] = o[1] + o[2] + o[3] + o[4]; }
}
template <bool Bug> void last_block() {
    cudaCheck(cudaMemset(in, 0, sizeof(unsigned)));
    last_block_kernel<Bug><<<4, 32>>>(out, (unsigned*)in);
}

// ----------------------------------------------------------------------------
// Overruns and alignment

template <bool Bug> __global__ void global_overrun_kernel(float* o, const float* a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (Bug || i < n) { o[i] = a[i]; }
}
template <bool Bug> void global_overrun() { global_overrun_kernel<Bug><<<2, N>>>(out, in, N); }

template <bool Bug> __global__ void static_shared_overrun_kernel(float* o) {
    __shared__ float s[N];
    __shared__ float t[N];
    t[threadIdx.x] = 0.0f;
    s[threadIdx.x + (Bug ? 1 : 0)] = 1.0f;
    __syncthreads();
    o[threadIdx.x] = s[threadIdx.x] + t[threadIdx.x];
}
template <bool Bug> void static_shared_overrun() {
    static_shared_overrun_kernel<Bug><<<1, N>>>(out);
}

template <bool Bug> __global__ void dynamic_shared_overrun_kernel(float* o) {
    extern __shared__ float s[];
    s[threadIdx.x + (Bug ? 1 : 0)] = 1.0f;
    __syncthreads();
    o[threadIdx.x] = s[threadIdx.x];
}
template <bool Bug> void dynamic_shared_overrun() {
    dynamic_shared_overrun_kernel<Bug><<<1, N, N * sizeof(float)>>>(out);
}

template <bool Bug> __global__ void local_overrun_kernel(float* o) {
    float x[8];
    for (int i = 0; i < 8; i++) { x[i] = (float)i; }
    o[threadIdx.x] = x[(threadIdx.x & 7) + (Bug ? 1 + (int)o[0] : 0)];
    __syncthreads();
}
template <bool Bug> void local_overrun() { local_overrun_kernel<Bug><<<1, N>>>(out); }

template <bool Bug> void use_after_free() {
    float* p;
    float host[N];
    cudaCheck(cudaMalloc((void**)&p, sizeof(host)));
    if (Bug) { cudaCheck(cudaFree(p)); }
    cudaCheck(cudaMemcpy(host, p, sizeof(host), cudaMemcpyDeviceToHost));
}

template <bool Bug> __global__ void misaligned_vector_kernel(float* o, const float* a) {
    *(float4*)(o + threadIdx.x * 4) = *(const float4*)(a + (Bug ? 1 : 0) + threadIdx.x * 4);
}
template <bool Bug> void misaligned_vector() { misaligned_vector_kernel<Bug><<<1, 32>>>(out, in); }

template <bool Bug> __global__ void misaligned_shared_kernel(float* o) {
    __shared__ __align__(16) float s[64];
    __shared__ float t[64]; // of a float, no more
    float* p = Bug ? t : s;
    *(float4*)&p[threadIdx.x * 4] = make_float4(1.0f, 2.0f, 3.0f, 4.0f);
    o[threadIdx.x] = p[threadIdx.x];
}
template <bool Bug> void misaligned_shared() { misaligned_shared_kernel<Bug><<<1, 4>>>(out); }

template <bool Bug> __global__ void int_overflow_kernel(int* o, int n) {
    o[threadIdx.x] = n + (Bug ? (int)threadIdx.x : 0);
}
template <bool Bug> void int_overflow() {
    int_overflow_kernel<Bug><<<1, 32>>>((int*)out, 2147483647);
}

// ----------------------------------------------------------------------------
// What the device itself checks

template <bool Bug> void wrong_copy_direction() {
    float host[N];
    cudaCheck(
        cudaMemcpy(host, out, sizeof(host), Bug ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost));
}

template <bool Bug> void copy_overrun() {
    float host[2 * N];
    cudaCheck(cudaMemcpy(host, out, N * sizeof(float) + (Bug ? 4 : 0), cudaMemcpyDeviceToHost));
}

template <bool Bug> void fill_of_host() {
    float host[N];
    cudaCheck(cudaMemset(Bug ? host : out, 0, sizeof(host)));
}

__global__ void copy_kernel(float* o, const float* a) { o[threadIdx.x] = a[threadIdx.x]; }
template <bool Bug> void host_pointer() {
    float host[N] = {};
    copy_kernel<<<1, N>>>(out, Bug ? host : in);
}

template <bool Bug> void freed_pointer() {
    float* p;
    cudaCheck(cudaMalloc((void**)&p, N * sizeof(float)));
    if (Bug) { cudaCheck(cudaFree(p)); }
    copy_kernel<<<1, N>>>(out, p);
}

__global__ void nothing_kernel() {}
template <bool Bug> void too_many_threads() { nothing_kernel<<<1, Bug ? 1025 : 1024>>>(); }
template <bool Bug> void block_z() { nothing_kernel<<<1, dim3(1, 1, Bug ? 65 : 64)>>>(); }
template <bool Bug> void no_threads() { nothing_kernel<<<1, Bug ? 0 : 1>>>(); }
template <bool Bug> void empty_grid() { nothing_kernel<<<Bug ? 0 : 1, 32>>>(); }
template <bool Bug> void grid_y() { nothing_kernel<<<dim3(1, Bug ? 65536 : 65535), 1>>>(); }
template <bool Bug> void grid_z() { nothing_kernel<<<dim3(1, 1, Bug ? 65536 : 65535), 1>>>(); }
template <bool Bug> void too_much_shared() {
    nothing_kernel<<<1, 32, 48 * 1024 + (Bug ? 1 : 0)>>>();
}
template <bool Bug> void more_shared_than_there_is() {
    cudaCheck(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   227 * 1024 + (Bug ? 1 : 0)));
    nothing_kernel<<<1, 32, 227 * 1024>>>();
}

// two arrays of 28 KiB: each would do
template <bool Bug> __global__ void static_shared_kernel(float* o) {
    __shared__ float s[7 * 1024];
    __shared__ float t[Bug ? 7 * 1024 : 1];
    s[threadIdx.x] = t[0] = 1.0f;
    o[threadIdx.x] = s[threadIdx.x] + t[0];
}
template <bool Bug> void static_shared() { static_shared_kernel<Bug><<<1, 1>>>(out); }

// half of a warp waits for the block, the other half for the warp
template <bool Bug> __global__ void deadlock_kernel(float* o) {
    if (Bug && threadIdx.x < 16) { __syncthreads(); } else { __syncwarp(); }
    o[threadIdx.x] = 1.0f;
}
template <bool Bug> void deadlock() { deadlock_kernel<Bug><<<1, 32>>>(out); }

// lanes that meet in different operations
template <bool Bug> __global__ void different_operations_kernel(float* o) {
    int x = 0;
    if (Bug && threadIdx.x % 2 == 0) {
        x = __any_sync(0xffffffffu, 1);
    } else {
        x = __shfl_sync(0xffffffffu, 1, 0);
    }
    o[threadIdx.x] = (float)x;
}
template <bool Bug> void different_operations() {
    different_operations_kernel<Bug><<<1, 32>>>(out);
}

template <bool Bug> __global__ void wild_pointer_kernel(float* o, size_t far) {
    o[Bug ? far : threadIdx.x] = 1.0f; // a free kernel
}
template <bool Bug> void wild_pointer() {
    wild_pointer_kernel<Bug><<<1, 32>>>(out, (size_t)1 << 44);
}

template <bool Bug> __global__ void stack_overflow_kernel(float* o, int n) {
    float x[Bug ? 100000 : 100];
    for (int i = 0; i < n; i++) { x[i * (Bug ? 1000 : 1)] = o[i]; }
    __syncthreads();
    for (int i = 0; i < n; i++) { o[threadIdx.x] += x[i * (Bug ? 1000 : 1)]; }
}
template <bool Bug> void stack_overflow() { stack_overflow_kernel<Bug><<<1, 1>>>(out, 100); }

template <bool Bug> void double_free() {
    float* p;
    cudaCheck(cudaMalloc((void**)&p, 1024));
    cudaCheck(cudaFree(p));
    if (Bug) { cudaCheck(cudaFree(p)); }
}

template <bool Bug> void free_of_host() {
    void* p = malloc(1024);
    if (Bug) { cudaCheck(cudaFree(p)); }
    free(p);
}

// The host touches device memory: found under CPU_PROTECT=1. Device memory of several pages, host
// memory beside it
template <bool Bug> void host_read() {
    float *p, *pinned, host[N] = {};
    cudaCheck(cudaMalloc((void**)&p, 16 * sizeof(host)));
    cudaCheck(cudaMallocHost((void**)&pinned, sizeof(host)));
    cudaCheck(cudaMemset(p, 0, 16 * sizeof(host)));
    cudaCheck(cudaMemcpy(host, p + 15 * N, sizeof(host), cudaMemcpyDeviceToHost));
    pinned[0] = Bug ? p[15 * N] : host[0];
    if (pinned[0] != 0.0f) { fprintf(stderr, "%f was read\n", pinned[0]); }
    cudaCheck(cudaFreeHost(pinned));
    cudaCheck(cudaFree(p));
}

template <bool Bug> void host_write() {
    float host[N] = {};
    if (Bug) { in[1] = 1.0f; } else { host[1] = 1.0f; }
    cudaCheck(cudaMemcpy(in, host, sizeof(host), cudaMemcpyHostToDevice));
    copy_kernel<<<1, N>>>(out, in);
}

template <bool Bug> void host_after_free() {
    float* p;
    cudaCheck(cudaMalloc((void**)&p, N * sizeof(float)));
    copy_kernel<<<1, N>>>(p, in);
    cudaCheck(cudaFree(p));
    if (Bug) { p[0] = 1.0f; }
}

// Each thread works on memory of its own while the others allocate, launch, copy and free
template <bool Bug> void host_threads() {
    auto work = [](float first) {
        for (int round = 0; round < 200; round++) {
            float *p, *q, host[N], back[N] = {};
            for (int i = 0; i < N; i++) { host[i] = first + (float)(i + round); }
            cudaCheck(cudaMalloc((void**)&p, sizeof(host)));
            cudaCheck(cudaMalloc((void**)&q, sizeof(host)));
            cudaCheck(cudaMemcpyAsync(p, host, sizeof(host), cudaMemcpyHostToDevice));
            copy_kernel<<<1, N>>>(q, p);
            cudaCheck(cudaMemcpyAsync(back, q, sizeof(host), cudaMemcpyDeviceToHost));
            if (memcmp(host, back, sizeof(host)) != 0) { fprintf(stderr, "a thread read wrong values\n"); }
            cudaCheck(cudaFree(p));
            cudaCheck(cudaFree(q));
        }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; i++) { threads.emplace_back(work, 1000.0f * (float)i); }
    for (std::thread& thread : threads) { thread.join(); }
    // all work has ended, and so has the right to touch the memory
    if (Bug) { std::thread([] { out[N - 1] = 1.0f; }).join(); }
}

// reading what nobody wrote gives NaN, and NaN fails every comparison
template <bool Bug> void uninitialised_memory() {
    float* p;
    float host[N], sum = 0.0f;
    cudaCheck(cudaMalloc((void**)&p, sizeof(host)));
    if (!Bug) { cudaCheck(cudaMemset(p, 0, sizeof(host))); }
    cudaCheck(cudaMemcpy(host, p, sizeof(host), cudaMemcpyDeviceToHost));
    for (float x : host) { sum += x; }
    if (!(sum == 0.0f)) {
        fprintf(stderr, "the sum is %f\n", sum);
        exit(EXIT_FAILURE);
    }
}

template <bool Bug> __global__ void uninitialised_shared_kernel(float* o) {
    __shared__ float s[N];
    if (!Bug || threadIdx.x != 7) { s[threadIdx.x] = 1.0f; }
    __syncthreads();
    o[threadIdx.x] = s[N - 1 - threadIdx.x];
}
template <bool Bug> void uninitialised_shared() {
    float host[N];
    // what a block leaves behind is no value for the next
    uninitialised_shared_kernel<false><<<1, N>>>(out);
    uninitialised_shared_kernel<Bug><<<1, N>>>(out);
    cudaCheck(cudaMemcpy(host, out, sizeof(host), cudaMemcpyDeviceToHost));
    for (float x : host) {
        if (!(x == 1.0f)) {
            fprintf(stderr, "a value is %f\n", x);
            exit(EXIT_FAILURE);
        }
    }
}

template <bool Bug> void out_of_memory() {
    size_t available, total;
    void* p;
    cudaCheck(cudaMemGetInfo(&available, &total));
    cudaCheck(cudaMalloc(&p, Bug ? available + 1 : 4096));
}

// ----------------------------------------------------------------------------

struct Case {
    const char* name;
    void (*correct)();
    void (*bug)();
};
#define CASE(name) {#name, name<false>, name<true>}
static const Case cases[] = {
    CASE(missing_syncthreads),
    CASE(missing_syncwarp),
    CASE(shuffle_as_barrier),
    CASE(reuse),
    CASE(race_in_block),
    CASE(race_between_blocks),
    CASE(race_between_far_blocks),
    CASE(last_block),
    CASE(global_overrun),
    CASE(static_shared_overrun),
    CASE(dynamic_shared_overrun),
    CASE(local_overrun),
    CASE(use_after_free),
    CASE(misaligned_vector),
    CASE(misaligned_shared),
    CASE(int_overflow),
    CASE(wrong_copy_direction),
    CASE(copy_overrun),
    CASE(fill_of_host),
    CASE(host_pointer),
    CASE(freed_pointer),
    CASE(too_many_threads),
    CASE(block_z),
    CASE(no_threads),
    CASE(empty_grid),
    CASE(grid_y),
    CASE(grid_z),
    CASE(too_much_shared),
    CASE(more_shared_than_there_is),
    CASE(static_shared),
    CASE(deadlock),
    CASE(different_operations),
    CASE(wild_pointer),
    CASE(stack_overflow),
    CASE(double_free),
    CASE(free_of_host),
    CASE(host_read),
    CASE(host_write),
    CASE(host_after_free),
    CASE(host_threads),
    CASE(uninitialised_memory),
    CASE(uninitialised_shared),
    CASE(out_of_memory),
};

int main(int argc, char** argv) {
    for (const Case& c : cases) {
        if (argc != 3 || strcmp(argv[1], c.name) != 0) { continue; }
        cudaCheck(cudaMalloc((void**)&in, N * sizeof(float)));
        cudaCheck(cudaMalloc((void**)&out, N * sizeof(float)));
        cudaCheck(cudaMemset(in, 0, N * sizeof(float)));
        cudaCheck(cudaMemset(out, 0, N * sizeof(float)));
        if (strcmp(argv[2], "bug") == 0) { c.bug(); } else { c.correct(); }
        cudaCheck(cudaGetLastError());
        cudaCheck(cudaDeviceSynchronize());
        return EXIT_SUCCESS;
    }
    fprintf(stderr, "usage: planted CASE bug|correct\n");
    return 2;
}
