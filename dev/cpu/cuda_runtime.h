/*
CUDA's runtime API on the CPU device, as far as the trainers use it: what is not here fails to
compile. Streams run synchronously, device memory is host memory; so that code that works here works
on a GPU too, what a GPU would not forgive is checked: fresh memory is filled with 0xFF bytes (NaN
in every float format), copies must say the right direction and stay inside one allocation, kernels
must get device pointers.
*/
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

#include "vector_types.h"
#include "engine.h"
#include "device_functions.h"
#include "math_functions.h"

#define CUDART_VERSION 12000

// what cu2cpp leaves in place
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#ifndef __noinline__
#define __noinline__ __attribute__((noinline))
#endif
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// ----------------------------------------------------------------------------
// Types

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600
} cudaError_t;

enum cudaMemcpyKind {
    cudaMemcpyHostToHost = 0,
    cudaMemcpyHostToDevice = 1,
    cudaMemcpyDeviceToHost = 2,
    cudaMemcpyDeviceToDevice = 3,
    cudaMemcpyDefault = 4
};

enum { cudaHostAllocDefault = 0, cudaStreamDefault = 0, cudaStreamNonBlocking = 1 };
enum { cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};

struct CUstream_st { unsigned flags; };
struct CUevent_st {
    bool recorded, timed;
    double ms;
};
typedef CUstream_st* cudaStream_t;
typedef CUevent_st* cudaEvent_t;

typedef enum cudaDataType_t {
    CUDA_R_32F = 0,
    CUDA_R_64F = 1,
    CUDA_R_16F = 2,
    CUDA_R_8I = 3,
    CUDA_R_8U = 8,
    CUDA_R_32I = 10,
    CUDA_R_16BF = 14
} cudaDataType;

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int warpSize, maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3];
    int major, minor, multiProcessorCount, maxThreadsPerMultiProcessor, l2CacheSize;
};

// ----------------------------------------------------------------------------
// Errors

namespace cpu {

// cudaGetLastError gives it once more
inline cudaError_t report(cudaError_t error) {
    last_error = error;
    return error;
}

struct ErrorText {
    cudaError_t code;
    const char* name;
    const char* text;
};
inline const ErrorText& error_text(cudaError_t code) {
    static const ErrorText texts[] = {
        {cudaSuccess, "cudaSuccess", "no error"},
        {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
        {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
        {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
         "invalid configuration argument"},
        {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
        {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle",
         "invalid resource handle"},
        {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    };
    static const ErrorText unknown = {code, "cudaErrorUnknown", "unrecognized error code"};
    for (const ErrorText& t : texts) {
        if (t.code == code) { return t; }
    }
    return unknown;
}

} // namespace cpu

inline const char* cudaGetErrorName(cudaError_t error) { return cpu::error_text(error).name; }
inline const char* cudaGetErrorString(cudaError_t error) { return cpu::error_text(error).text; }
inline cudaError_t cudaPeekAtLastError() { return (cudaError_t)cpu::last_error; }
inline cudaError_t cudaGetLastError() {
    const cudaError_t error = (cudaError_t)cpu::last_error;
    cpu::last_error = cudaSuccess;
    return error;
}

// ----------------------------------------------------------------------------
// Memory. A registry of all allocations says what a pointer is

namespace cpu {

enum MemoryKind { HOST, PINNED, DEVICE };
struct Allocation {
    MemoryKind kind;
    size_t bytes;
};
struct Memory {
    std::mutex lock;
    std::map<uintptr_t, Allocation> allocations; // by first address
    size_t total, used;                            // bytes of device memory
    // under CPU_PROTECT: where all device memory lies, how much of that was ever used, and how many
    // DeviceWork there are
    uintptr_t range;
    size_t range_used, working;
};

inline size_t memory_size() {
    const char* text = getenv("CPU_MEMORY");
    const size_t physical = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    if (text == NULL || *text == '\0') { return physical; }
    char* end;
    const size_t bytes = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0') {
        die("CPU_MEMORY is \"%s\"; set it to a number of bytes", text);
    }
    return bytes;
}

inline Memory& memory() {
    // never destroyed: other threads may outlive main
    static Memory* m = new Memory{{}, {}, memory_size(), 0, 0, 0, 0};
    return *m;
}

struct Place {
    MemoryKind kind;
    size_t offset, left; // from the begin of the allocation, and to its end
};

// addresses, not pointers: what lies there is not read (and the compiler need not wonder whether it
// has a value)
typedef uintptr_t Address;

// where p lies. One past the end still counts: an empty tail of a buffer is a valid argument
inline Place find(Address p) {
    Memory& m = memory();
    std::lock_guard<std::mutex> guard(m.lock);
    auto next = m.allocations.upper_bound(p);
    if (next != m.allocations.begin()) {
        --next;
        const size_t offset = p - next->first;
        if (offset <= next->second.bytes) {
            return Place{next->second.kind, offset, next->second.bytes - offset};
        }
    }
    return Place{HOST, 0, SIZE_MAX};
}

// ends the program unless [p, p + bytes) is memory that the device can reach (for the stand-ins of
// the libraries, too)
inline void require_device(const char* what, const char* argument, const void* p, size_t bytes) {
    const Place place = find((Address)p);
    if (place.kind == HOST) {
        die("%s: %s = %p is not in device memory (a host pointer, or freed); allocate it with "
            "cudaMalloc",
            what, argument, p);
    }
    if (bytes > place.left) {
        die("%s: %s needs %zu bytes at offset %zu of an allocation of %zu bytes; allocate more, or "
            "pass less",
            what, argument, bytes, place.offset, place.offset + place.left);
    }
}

// CPU_PROTECT=1: device memory is one range of addresses, [range, range + 2 * total), so that one
// call opens or closes all that was ever used of it, and its pages are huge, for the time of that
// call grows with their number. Another thread's work opens the memory to the host as well.
constexpr size_t HUGE_PAGE = 2 << 20;

// of these four functions the caller holds the lock
inline void protect(size_t first, size_t bytes, int access) {
    Memory& m = memory();
    if (bytes > 0 && mprotect((void*)(m.range + first), bytes, access) != 0) {
        die("cannot protect %zu MiB of device memory: %m; run without CPU_PROTECT", bytes >> 20);
    }
}

inline void reserve_range() {
    Memory& m = memory();
    const size_t bytes = 2 * m.total + HUGE_PAGE; // with room for gaps between allocations
    void* p = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
        die("CPU_PROTECT cannot reserve addresses for %zu MiB of device memory; set CPU_MEMORY to "
            "fewer bytes",
            m.total >> 20);
    }
    m.range = round_up((Address)p, HUGE_PAGE);
    madvise((void*)m.range, 2 * m.total, MADV_HUGEPAGE);
    catch_faults();
}

// the first gap of that many bytes, as an allocation; NULL when there is none
inline void* take_gap(size_t bytes) {
    Memory& m = memory();
    if (m.range == 0) { reserve_range(); }
    Address at = m.range;
    for (const auto& a : m.allocations) {
        if (a.second.kind != DEVICE) { continue; }
        if (a.first - at >= bytes) { break; }
        at = a.first + round_up(a.second.bytes, 256);
    }
    const size_t end = round_up(at + bytes - m.range, HUGE_PAGE);
    if (end > 2 * m.total / HUGE_PAGE * HUGE_PAGE) { return NULL; }
    if (end > m.range_used) {
        if (m.working > 0) { protect(m.range_used, end - m.range_used, PROT_READ | PROT_WRITE); }
        m.range_used = end;
    }
    m.allocations[at] = Allocation{DEVICE, bytes};
    return (void*)at;
}

inline void open_memory() {
    Memory& m = memory();
    std::lock_guard<std::mutex> guard(m.lock);
    if (m.working++ == 0) { protect(0, m.range_used, PROT_READ | PROT_WRITE); }
}

inline void close_memory() {
    Memory& m = memory();
    std::lock_guard<std::mutex> guard(m.lock);
    if (--m.working == 0) { protect(0, m.range_used, PROT_NONE); }
}

inline void die_of_host_access(Address p) {
    Memory& m = memory();
    std::lock_guard<std::mutex> guard(m.lock);
    if (p - m.range >= m.range_used) { return; }
    auto a = m.allocations.upper_bound(p);
    if (a == m.allocations.begin() || p - (--a)->first >= a->second.bytes) {
        die("the host touched device memory: address %#zx, which is in no allocation (freed, or out "
            "of bounds)",
            (size_t)p);
    }
    die("the host touched device memory: address %#zx, byte %zu of the allocation of %zu bytes at "
        "%#zx; copy it with cudaMemcpy (a debugger shows the line)",
        (size_t)p, p - a->first, a->second.bytes, (size_t)a->first);
}

constexpr size_t FILL_CHUNK = 1 << 20;

// large fills and copies are spread over the workers
inline void fill(void* p, int value, size_t bytes) {
    DeviceWork work;
    parallel_for((bytes + FILL_CHUNK - 1) / FILL_CHUNK, [=](size_t i) {
        memset((char*)p + i * FILL_CHUNK, value, std::min(FILL_CHUNK, bytes - i * FILL_CHUNK));
    });
}

inline cudaError_t allocate(void** p, size_t bytes, MemoryKind kind) {
    Memory& m = memory();
    *p = NULL;
    if (bytes == 0) { return cudaSuccess; }
    {
        std::lock_guard<std::mutex> guard(m.lock);
        if (kind == DEVICE && (bytes > m.total || m.used > m.total - bytes)) {
            return report(cudaErrorMemoryAllocation);
        }
        if (kind == DEVICE) { m.used += bytes; }
    }
    // huge pages for what is large: the first touch of a page, and a miss of the translation cache,
    // cost much
    const bool large = bytes >= 2 * HUGE_PAGE, guarded = kind == DEVICE && protects();
    if (guarded) {
        std::lock_guard<std::mutex> guard(m.lock);
        *p = take_gap(bytes);
    } else if (posix_memalign(p, large ? HUGE_PAGE : 256, bytes) != 0) {
        *p = NULL;
    }
    if (*p == NULL) {
        std::lock_guard<std::mutex> guard(m.lock);
        if (kind == DEVICE) { m.used -= bytes; }
        return report(cudaErrorMemoryAllocation);
    }
    if (large && !guarded) { madvise(*p, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE); }
    if (kind == DEVICE) { fill(*p, 0xFF, bytes); }
    std::lock_guard<std::mutex> guard(m.lock);
    m.allocations[(Address)*p] = Allocation{kind, bytes};
    return cudaSuccess;
}

inline cudaError_t release(void* p, MemoryKind kind) {
    if (p == NULL) { return cudaSuccess; }
    Memory& m = memory();
    {
        std::lock_guard<std::mutex> guard(m.lock);
        const auto found = m.allocations.find((Address)p);
        if (found == m.allocations.end() || found->second.kind != kind) {
            return report(cudaErrorInvalidValue);
        }
        if (kind == DEVICE) { m.used -= found->second.bytes; }
        m.allocations.erase(found);
    }
    if (kind == PINNED || !protects()) { free(p); }
    return cudaSuccess;
}

// one side of a copy or fill: is it the memory that the call says, and does it hold all bytes?
inline void check_side(const char* call, const char* side, Address p, size_t bytes, bool device,
                       const char* file, int line) {
    const Place place = find(p);
    // other memory may begin where an allocation ends
    const bool is_device = place.kind == DEVICE && place.left > 0;
    if (is_device != device) {
        die("%s:%d: %s: its %s %#zx is %s memory, but the call says %s; pass the kind of copy that "
            "is meant",
            file, line, call, side, (size_t)p, device ? "host (or freed)" : "device",
            device ? "device" : "host");
    }
    if (place.left > 0 && bytes > place.left) {
        die("%s:%d: %s: its %s is %zu bytes at offset %zu of an allocation of %zu bytes; copy "
            "less, or allocate more",
            file, line, call, side, bytes, place.offset, place.offset + place.left);
    }
}

inline void check_copy(const char* call, Address to, Address from, size_t bytes,
                       cudaMemcpyKind kind, const char* file, int line) {
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    check_side(call, "destination", to, bytes,
               kind == cudaMemcpyDefault ? find(to).kind == DEVICE : to_device, file, line);
    check_side(call, "source", from, bytes,
               kind == cudaMemcpyDefault ? find(from).kind == DEVICE : from_device, file, line);
}

inline void copy(void* to, const void* from, size_t bytes) {
    const char *a = (const char*)to, *b = (const char*)from;
    DeviceWork work;
    if (a < b + bytes && b < a + bytes) {
        memmove(to, from, bytes);
        return;
    }
    parallel_for((bytes + FILL_CHUNK - 1) / FILL_CHUNK, [=](size_t i) {
        memcpy((char*)to + i * FILL_CHUNK, (const char*)from + i * FILL_CHUNK,
               std::min(FILL_CHUNK, bytes - i * FILL_CHUNK));
    });
}

// What cu2cpp calls first in a kernel: names are the kernel's parameters as written, "out, in, n"
template <class T>
inline void check_argument(const char* kernel, const char* names, int i, const T& argument) {
    if constexpr (std::is_pointer_v<T>) {
        if constexpr (!std::is_function_v<std::remove_pointer_t<T>>) {
            const void* p = (const void*)argument;
            if (p == NULL || find((Address)p).kind != HOST) { return; }
            for (; i > 0; i--) { names = strchr(names, ',') + 2; }
            die("kernel %s: its argument %.*s = %p is not in device memory (a host pointer, or "
                "freed); copy the data to "
                "memory from cudaMalloc",
                kernel, (int)strcspn(names, ","), names, p);
        }
    } else {
        (void)kernel, (void)names, (void)i, (void)argument;
    }
}

template <class... T>
inline void check_arguments(const char* kernel, const char* names, const T&... arguments) {
    int i = 0;
    (check_argument(kernel, names, i++, arguments), ...);
    (void)kernel, (void)names, (void)i;
}

} // namespace cpu

template <class T> inline cudaError_t cudaMalloc(T** p, size_t bytes) {
    return cpu::allocate((void**)p, bytes, cpu::DEVICE);
}
template <class T> inline cudaError_t cudaMallocHost(T** p, size_t bytes, unsigned = 0) {
    return cpu::allocate((void**)p, bytes, cpu::PINNED);
}
template <class T> inline cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned) {
    return cudaMallocHost(p, bytes);
}
inline cudaError_t cudaFree(void* p) { return cpu::release(p, cpu::DEVICE); }
inline cudaError_t cudaFreeHost(void* p) { return cpu::release(p, cpu::PINNED); }

inline cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
    cpu::Memory& m = cpu::memory();
    std::lock_guard<std::mutex> guard(m.lock);
    *free_bytes = m.total - m.used;
    *total_bytes = m.total;
    return cudaSuccess;
}

// the defaults of file and line are the caller's
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                              const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (bytes == 0) { return cudaSuccess; }
    cpu::check_copy("cudaMemcpy", (cpu::Address)to, (cpu::Address)from, bytes, kind, file, line);
    cpu::copy(to, from, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t = 0, const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
    if (bytes == 0) { return cudaSuccess; }
    cpu::check_copy("cudaMemcpyAsync", (cpu::Address)to, (cpu::Address)from, bytes, kind, file,
                    line);
    cpu::copy(to, from, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemset(void* p, int value, size_t bytes, const char* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    if (bytes == 0) { return cudaSuccess; }
    cpu::check_side("cudaMemset", "destination", (cpu::Address)p, bytes, true, file, line);
    cpu::fill(p, value, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = 0,
                                   const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
    if (bytes == 0) { return cudaSuccess; }
    cpu::check_side("cudaMemsetAsync", "destination", (cpu::Address)p, bytes, true, file, line);
    cpu::fill(p, value, bytes);
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// Device

inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cpu::report(cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    if (device != 0) { return cpu::report(cudaErrorInvalidDevice); }
    *p = cudaDeviceProp{};
    snprintf(p->name, sizeof(p->name), "CPU, %d %s", cpu::workers(),
             cpu::workers() == 1 ? "worker" : "workers");
    p->totalGlobalMem = cpu::memory().total;
    p->sharedMemPerBlock = cpu::MAX_STATIC_SHARED;
    p->sharedMemPerBlockOptin = p->sharedMemPerMultiprocessor = cpu::MAX_SHARED;
    p->warpSize = cpu::WARP_SIZE;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = cpu::MAX_THREADS;
    p->maxThreadsDim[2] = cpu::MAX_BLOCK_Z;
    p->maxGridSize[0] = cpu::MAX_GRID_X;
    p->maxGridSize[1] = p->maxGridSize[2] = cpu::MAX_GRID_YZ;
    p->major = 9; // what it can do is what sm_90 can, as far as the trainers use it
    p->multiProcessorCount = cpu::workers();
    p->maxThreadsPerMultiProcessor = 2048;
    p->l2CacheSize = 1 << 20;
    return cudaSuccess;
}

// A kernel is a function that knows its own attributes: called in this mode it sets them and runs
// nothing
template <class... T> inline cudaError_t cudaFuncSetAttribute(void (*kernel)(T...),
                                                              cudaFuncAttribute attribute,
                                                              int value) {
    if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) { return cudaSuccess; }
    if (value < 0 || (size_t)value > cpu::MAX_SHARED) { return cpu::report(cudaErrorInvalidValue); }
    cpu::pending =
        cpu::Pending{cpu::Pending::SET_MAX_DYNAMIC_SHARED, dim3(), dim3(), (size_t)value};
    kernel(std::decay_t<T>()...);
    return cudaSuccess;
}

// ----------------------------------------------------------------------------
// Streams and events: everything is done when the call returns

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
    *stream = new CUstream_st{flags};
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    if (stream == NULL) { return cpu::report(cudaErrorInvalidResourceHandle); }
    delete stream;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned = 0) {
    return event != NULL ? cudaSuccess : cpu::report(cudaErrorInvalidResourceHandle);
}

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
    *event = new CUevent_st{false, (flags & cudaEventDisableTiming) == 0, 0.0};
    return cudaSuccess;
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event, unsigned flags = cudaEventDefault) {
    return cudaEventCreateWithFlags(event, flags);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (event == NULL) { return cpu::report(cudaErrorInvalidResourceHandle); }
    delete event;
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t = 0) {
    if (event == NULL) { return cpu::report(cudaErrorInvalidResourceHandle); }
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    event->recorded = true;
    event->ms = (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
    if (begin == NULL || end == NULL || !begin->recorded || !end->recorded || !begin->timed ||
        !end->timed) {
        return cpu::report(cudaErrorInvalidResourceHandle);
    }
    *ms = (float)(end->ms - begin->ms);
    return cudaSuccess;
}
