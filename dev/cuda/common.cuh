/*
What the files of the workbench share: arrays, checks, timing with a cold cache, one table row a kernel.

Each file of dev/cuda is one kernel idea: a reference in plain C in double precision, versions 1..N, a check of every version at
shapes that divide nothing, and the time of every version beside its bound. It includes the trainer, so that version 1 is the very
kernel that ships; what wins moves into the trainer by hand.

    ./layernorm              checks, on any device: `make test` runs this
    ./layernorm -time        checks, then times; says so where the device is no GPU, for then the times say nothing about one
    ./layernorm -json FILE   with -time: also appends each row as a line of JSON

The exit code is the verdict of the checks.
*/
#ifndef TESTING // dev/test/workbench.cu has all programs in one
#define TESTING
#include <stdarg.h>
#include <stdlib.h>
#include "../../train_deit.cu"
#include "../test/check.cuh"

// ----------------------------------------------------------------------------
// arrays: n values on the host and their place on the device

template <class T> struct Array {
    size_t n;
    T *host, *device;
};

// filled with 0xff bytes on both sides: NaN as a float, so that what a kernel leaves out is found
template <class T> static Array<T> array_new(size_t n) {
    Array<T> a = {n, (T*)malloc((n > 0 ? n : 1) * sizeof(T)), NULL};
    require(a.host != NULL, "out of host memory for %zu values", n);
    memset((void*)a.host, 0xff, n * sizeof(T));
    cudaCheck(cudaMalloc((void**)&a.device, (n > 0 ? n : 1) * sizeof(T)));
    cudaCheck(cudaMemset(a.device, 0xff, n * sizeof(T)));
    return a;
}
template <class T> static void to_device(const Array<T>& a) { cudaCheck(cudaMemcpy(a.device, a.host, a.n * sizeof(T), cudaMemcpyHostToDevice)); }
template <class T> static void to_host(const Array<T>& a) {
    cudaCheck(cudaStreamSynchronize(main_stream));
    cudaCheck(cudaMemcpy(a.host, a.device, a.n * sizeof(T), cudaMemcpyDeviceToHost));
}
template <class T> static void array_free(const Array<T>& a) {
    free((void*)a.host);
    cudaCheck(cudaFree(a.device));
}

// normal values of this standard deviation, on both sides: Philox(7, 99, stream, element), so that they are the same everywhere
template <class T> static Array<T> array_normal(size_t n, unsigned stream, double deviation) {
    Array<T> a = array_new<T>(n);
    for (size_t i = 0; i < n; i++) { a.host[i] = (T)(float)(deviation * normal(philox(7, 99, stream, i))); }
    to_device(a);
    return a;
}

// fails unless |a-b| <= tolerance*|b| + tolerance*max|b| for all elements; a NaN fails. Reads `got` back from the device
template <class T> static void check_close(const Array<T>& got, const double* expected, double tolerance, const char* format, ...) {
    char what[200];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    to_host(got);
    double largest = 0.0;
    for (size_t i = 0; i < got.n; i++) { largest = fmax(largest, fabs(expected[i])); }
    size_t wrong = 0, worst = 0;
    for (size_t i = 0; i < got.n; i++) {
        if (!(fabs((float)got.host[i] - expected[i]) <= tolerance * (fabs(expected[i]) + largest)) && wrong++ == 0) { worst = i; }
    }
    check(wrong == 0, "%s: %zu of %zu wrong, element %zu is %g, expected %g", what, wrong, got.n, worst,
          got.n > 0 ? (double)(float)got.host[worst] : 0.0, got.n > 0 ? expected[worst] : 0.0);
}

// the same bits as a copy made before: for a second run, or another version that promises them
template <class T> static void check_bits(const Array<T>& got, const T* expected, const char* what) {
    to_host(got);
    check(memcmp((const void*)got.host, (const void*)expected, got.n * sizeof(T)) == 0, "%s: other bits", what);
}

// ----------------------------------------------------------------------------
// timing

// bandwidth in bytes/s; dense operations/s with fp32 sums in bf16 on tensor cores, and in fp32 on the others
typedef struct {
    const char* name; // a part of what the device calls itself; the first that fits counts
    double bandwidth, bf16, fp32;
} Gpu;
static const Gpu gpus[] = {
    {"H200", 4.8e12, 989e12, 67e12},
    {"H100", 3.35e12, 989e12, 67e12},
    {"A100-SXM4-80GB", 2.04e12, 312e12, 19.5e12},
    {"A100", 1.555e12, 312e12, 19.5e12},
    {"RTX 4090", 1.008e12, 165e12, 82.6e12},
};

static bool timing;
static FILE* json;
static const Gpu* gpu;             // NULL: no bound is known
static Array<uint8_t> cache_flush; // twice the L2 cache

static void bench_open(int argc, char** argv) {
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-time") == 0) { timing = true; }
        else if (strcmp(argv[i], "-json") == 0 && i + 1 < argc) {
            json = fopen(argv[++i], "a");
            require(json != NULL, "cannot write %s: %m", argv[i]);
        } else {
            require(false, "unknown argument %s; there are -time and -json FILE", argv[i]);
        }
    }
    device_open();
    cudaDeviceProp properties;
    cudaCheck(cudaGetDeviceProperties(&properties, 0));
    for (size_t i = 0; i < sizeof(gpus) / sizeof(gpus[0]) && gpu == NULL; i++) {
        if (strstr(properties.name, gpus[i].name) != NULL) { gpu = &gpus[i]; }
    }
    if (!timing) { return; }
    if (gpu == NULL) { printf("no bound is known for %s: times stand alone\n", properties.name); }
    cache_flush = array_new<uint8_t>(2 * (size_t)properties.l2CacheSize + (1 << 20));
}

static int ascending(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return x < y ? -1 : x > y;
}

// Times launch() with a cold cache: minimum and median of 20 after 3 that warm up. bytes: what must be read and written once;
// operations: on tensor cores in bf16, else fp32. The share of the bound is max(bytes/bandwidth, operations/rate) over the minimum
template <class F> static void time_kernel(const char* kernel, int version, const char* shape, double bytes, double operations, F launch) {
    if (!timing) { return; }
    const int warmup = 3, repeats = 20;
    double us[repeats];
    cudaEvent_t begin, end;
    cudaCheck(cudaEventCreate(&begin));
    cudaCheck(cudaEventCreate(&end));
    for (int i = -warmup; i < repeats; i++) {
        cudaCheck(cudaMemsetAsync(cache_flush.device, i & 255, cache_flush.n, main_stream));
        cudaCheck(cudaEventRecord(begin, main_stream));
        launch();
        cudaCheck(cudaEventRecord(end, main_stream));
        cudaCheck(cudaEventSynchronize(end));
        float ms;
        cudaCheck(cudaEventElapsedTime(&ms, begin, end));
        if (i >= 0) { us[i] = 1e3 * ms; }
    }
    cudaCheck(cudaEventDestroy(begin));
    cudaCheck(cudaEventDestroy(end));
    qsort(us, repeats, sizeof(double), ascending);
    const double rate = gpu == NULL ? 0.0 : sizeof(floatX) == 2 ? gpu->bf16 : gpu->fp32;
    const double bound = gpu == NULL ? 0.0 : 1e6 * fmax(bytes / gpu->bandwidth, operations / rate);
    printf("| %-28s | %d | " PRECISION_NAME " | %-26s | %9.1f | %9.1f | %7.0f | ", kernel, version, shape, us[0], us[repeats / 2],
           1e-3 * bytes / us[0]);
    if (gpu != NULL) { printf("%5.1f %% |\n", 100.0 * bound / us[0]); } else { printf("      - |\n"); }
    fflush(stdout);
    if (json != NULL) {
        fprintf(json, "{\"what\": \"kernel\", \"kernel\": \"%s\", \"version\": %d, \"precision\": \"" PRECISION_NAME "\", \"shape\": \"%s\", "
                "\"us_min\": %.2f, \"us_median\": %.2f, \"bytes\": %.0f, \"operations\": %.0f, \"bound_us\": %.2f}\n",
                kernel, version, shape, us[0], us[repeats / 2], bytes, operations, bound);
        fflush(json);
    }
}

static void time_header(void) {
    if (!timing) { return; }
    printf("| kernel | version | type | shape | us min | us median | GB/s | share of bound |\n|---|---|---|---|---|---|---|---|\n");
}

static int bench_close(void) {
    if (timing) { array_free(cache_flush); }
    if (json != NULL) { fclose(json); }
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
#endif
