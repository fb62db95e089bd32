/*
Checks the libraries of the CPU device against naive references in double precision: cuBLAS,
cuBLASLt, wmma and NCCL.

    test_cpu_libs                      all, with and without -DCPU_OPENBLAS; NCCL with -DMULTI_GPU
    mpirun -np 2 test_cpu_libs         with -DMULTI_GPU: NCCL alone, any number of ranks
    mpirun -np 2 test_cpu_libs large   and a buffer of more than 2^31 bytes, 5 GB a rank

One line a check, the last line counts them, and the exit code is the verdict. nvcc builds this file
too, without the parts marked CPU_DEVICE: on a GPU it checks the products that the trainers ask for,
and nothing else that only the stand-ins promise.
*/
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <algorithm>
#include <string>
#include <vector>

#include <cublas_v2.h>
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>
#ifndef __CUDACC__
#define CPU_DEVICE
const bool ON_GPU = false;
#else
const bool ON_GPU = true;
#undef MULTI_GPU // NCCL itself promises no order of summation; dev/test/ranks.sh has what trainers use
#endif
#ifdef MULTI_GPU
#include <nccl.h>
#include <mpi.h>
#endif

// sanitizers make products 50 times slower, and find in a few shapes what they find in many
#if defined(CPU_ASAN) || defined(CPU_TSAN)
const bool FEW_SHAPES = true;
#else
const bool FEW_SHAPES = false;
#endif

#define cudaCheck(x) \
    do { \
        cudaError_t e_ = (x); \
        if (e_ != cudaSuccess) { \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_)); \
            exit(1); \
        } \
    } while (0)

// ----------------------------------------------------------------------------
// verdicts

int passed = 0, failed = 0;

// prints a line and counts. Under MPI rank 0 speaks for all ranks, and one rank's failure is
// everybody's.
void check(bool ok, const char* format, ...) {
    int rank = 0;
#ifdef MULTI_GPU
    int mine = ok, all;
    MPI_Allreduce(&mine, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    ok = all != 0;
#endif
    (ok ? passed : failed)++;
    if (rank != 0) { return; }
    printf("%s ", ok ? "ok  " : "FAIL");
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
    fflush(stdout);
}

// ----------------------------------------------------------------------------
// arrays on the device with an exact copy of their values on the host

float bf16_value(uint16_t bits) {
    uint32_t u = (uint32_t)bits << 16;
    float f;
    memcpy(&f, &u, sizeof(f));
    return f;
}

// round to nearest even, written differently from what it checks: the candidates are the truncated
// value and the next one
uint16_t bf16_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, sizeof(u));
    uint16_t low = (uint16_t)(u >> 16);
    uint32_t rest = u & 0xffff;
    return rest > 0x8000 || (rest == 0x8000 && (low & 1)) ? low + 1 : low;
}

// a hash of i and seed in [-0.5, 0.5)
float uniform(size_t i, unsigned seed) {
    uint64_t x = i * 0x9E3779B97F4A7C15ull + seed * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 31)) * 0x94D049BB133111EBull;
    return (float)((x ^ (x >> 29)) >> 40) / 16777216.0f - 0.5f;
}

size_t type_size(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }

// bf16 values are held as the floats that they are
struct Array {
    cudaDataType type;
    std::vector<float> values;
    char* device;
    float operator[](size_t i) const { return values[i]; }
    size_t size() const { return values.size(); }
    void upload() const {
        std::vector<uint16_t> narrow(type == CUDA_R_32F ? 0 : size());
        for (size_t i = 0; i < narrow.size(); i++) { narrow[i] = bf16_bits(values[i]); }
        cudaCheck(cudaMemcpy(device, narrow.empty() ? (const void*)values.data() : narrow.data(),
                             size() * type_size(type), cudaMemcpyHostToDevice));
    }
    Array download() const {
        Array copy = *this;
        std::vector<uint16_t> narrow(type == CUDA_R_32F ? 0 : size());
        cudaCheck(cudaMemcpy(narrow.empty() ? (void*)copy.values.data() : narrow.data(), device,
                             size() * type_size(type), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < narrow.size(); i++) { copy.values[i] = bf16_value(narrow[i]); }
        return copy;
    }
};

// the same bits at i in both?
bool same_at(const Array& a, const Array& b, size_t i) {
    return memcmp(&a.values[i], &b.values[i], sizeof(float)) == 0;
}

Array make_array(cudaDataType type, size_t count, unsigned seed) {
    Array a = {type, std::vector<float>(count), NULL};
    for (size_t i = 0; i < count; i++) {
        float x = uniform(i, seed);
        a.values[i] = type == CUDA_R_32F ? x : bf16_value(bf16_bits(x));
    }
    cudaCheck(cudaMalloc((void**)&a.device, std::max<size_t>(1, count * type_size(type))));
    a.upload();
    return a;
}

void free_array(Array& a) { cudaCheck(cudaFree(a.device)); }

// ----------------------------------------------------------------------------
// the reference

struct Problem {
    bool transa, transb;
    size_t m, n, k, lda, ldb, ldc, ldd;
    float alpha, beta;
};

size_t size_a(const Problem& p) { return p.lda * (p.transa ? p.m : p.k); }
size_t size_b(const Problem& p) { return p.ldb * (p.transb ? p.k : p.n); }

// How far got[i, j] is from the exact result, in units of what is allowed: 1 passes. The bound is
// that of k roundings of a float sum, plus half a unit in the last place of the output type: a
// result that was rounded twice fails. On a GPU cuBLAS may cut a sum into parts and round each of
// them to the output type.
double excess(const Problem& p, const Array& a, size_t a0, const Array& b, size_t b0,
              const Array& c, size_t c0, const Array* bias, const Array& got, size_t d0, size_t i,
              size_t j) {
    double sum = 0.0, size = 0.0;
    for (size_t q = 0; q < p.k; q++) {
        double x = (double)a[a0 + (p.transa ? i * p.lda + q : q * p.lda + i)] *
                   (double)b[b0 + (p.transb ? q * p.ldb + j : j * p.ldb + q)];
        sum += x;
        size += fabs(x);
    }
    double exact = p.alpha * sum, scale = fabs(p.alpha) * size;
    if (p.beta != 0.0f) {
        exact += p.beta * (double)c[c0 + j * p.ldc + i];
        scale += fabs(p.beta * (double)c[c0 + j * p.ldc + i]);
    }
    if (bias != NULL) {
        exact += (*bias)[i];
        scale += fabs((*bias)[i]);
    }
    double tolerance = ldexp(scale, -24) * (double)(p.k + 4) + 1e-37;
    if (got.type == CUDA_R_16BF) { tolerance += ldexp(ON_GPU ? scale : fabs(exact), -8) * 1.01; }
    return fabs((double)got[d0 + j * p.ldd + i] - exact) / tolerance;
}

// the worst excess over the output, or over a sample of a large one; NaN counts as infinite
double worst_excess(const Problem& p, const Array& a, size_t a0, const Array& b, size_t b0,
                    const Array& c, size_t c0, const Array* bias, const Array& got, size_t d0) {
    const size_t SAMPLE = 300;
    bool all = p.m * p.n * p.k <= 8000000;
    size_t count = all ? p.m * p.n : SAMPLE;
    double worst = 0.0;
    for (size_t s = 0; s < count; s++) {
        size_t e = all ? s : (size_t)((uniform(s, 99) + 0.5) * (double)(p.m * p.n));
        if (!all && s == 0) { e = p.m * p.n - 1; }
        double x = excess(p, a, a0, b, b0, c, c0, bias, got, d0, e % p.m, e / p.m);
        if (!(x <= worst)) { worst = x == x ? x : INFINITY; }
    }
    return worst;
}

// every element of the output array that lies outside of the matrices is as it was
bool guards_intact(const Problem& p, const Array& before, const Array& after, size_t batch,
                   size_t stride) {
    std::vector<bool> inside(before.size(), false);
    for (size_t q = 0; q < batch; q++) {
        for (size_t j = 0; j < p.n; j++) {
            for (size_t i = 0; i < p.m; i++) { inside[q * stride + j * p.ldd + i] = true; }
        }
    }
    for (size_t i = 0; i < before.size(); i++) {
        if (!inside[i] && !same_at(before, after, i)) { return false; }
    }
    return true;
}

void fill_nan(Array& a) {
    a.values.assign(a.size(), NAN);
    a.upload();
}

cublasOperation_t op(bool trans) { return trans ? CUBLAS_OP_T : CUBLAS_OP_N; }
const char* type_name(cudaDataType type) { return type == CUDA_R_32F ? "fp32" : "bf16"; }

// ----------------------------------------------------------------------------
// cuBLAS

cublasHandle_t blas;
cublasLtHandle_t lt;

struct Types { cudaDataType in, out; };
const Types TYPES[] = {{CUDA_R_32F, CUDA_R_32F},
                       {CUDA_R_16BF, CUDA_R_16BF},
                       {CUDA_R_16BF, CUDA_R_32F}};
const float SCALES[][2] = {{1.0f, 0.0f}, {1.0f, 1.0f}, {0.5f, 0.0f}, {-1.5f, 0.75f}};

// one product by cublasGemmEx: its excess, infinite when a guard was touched or the call failed
double gemm_excess(Types types, const Problem& p) {
    Array a = make_array(types.in, size_a(p) + 3, 1), b = make_array(types.in, size_b(p) + 3, 2);
    Array c = make_array(types.out, p.ldc * p.n + 3, 3);
    if (p.beta == 0.0f) { fill_nan(c); }
    cublasStatus_t status =
        cublasGemmEx(blas, op(p.transa), op(p.transb), (int)p.m, (int)p.n, (int)p.k, &p.alpha,
                     a.device, types.in, (int)p.lda, b.device, types.in, (int)p.ldb, &p.beta,
                     c.device, types.out, (int)p.ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    Array got = c.download();
    double worst = worst_excess(p, a, 0, b, 0, c, 0, NULL, got, 0);
    bool good = status == CUBLAS_STATUS_SUCCESS && guards_intact(p, c, got, 1, 0);
    free_array(a), free_array(b), free_array(c);
    return good ? worst : INFINITY;
}

void test_gemm_shapes() {
    const std::vector<size_t> sizes = FEW_SHAPES ? std::vector<size_t>{1, 33, 197}
                                                 : std::vector<size_t>{1, 7, 17, 31, 33, 64, 197};
    for (Types types : TYPES) {
        for (int trans = 0; trans < 4; trans++) {
            double worst = 0.0;
            Problem worst_problem = {};
            int shape = 0;
            for (size_t m : sizes) {
                for (size_t n : sizes) {
                    for (size_t k : sizes) {
                        Problem p = {(trans & 1) != 0, (trans & 2) != 0, m, n, k, 0, 0, 0, 0, 0, 0};
                        p.lda = (p.transa ? k : m) + 3;
                        p.ldb = (p.transb ? n : k) + 5;
                        p.ldc = p.ldd = m + 2;
                        p.alpha = SCALES[shape % 4][0], p.beta = SCALES[shape % 4][1];
                        shape++;
                        double x = gemm_excess(types, p);
                        if (!(x <= worst)) { worst = x, worst_problem = p; }
                    }
                }
            }
            check(worst <= 1.0,
                  "gemm %s -> %s %c%c, %d shapes: error %.3f of the bound, worst at m %zu n %zu k "
                  "%zu",
                  type_name(types.in), type_name(types.out), trans & 1 ? 'T' : 'N',
                  trans & 2 ? 'T' : 'N', shape, worst, worst_problem.m, worst_problem.n,
                  worst_problem.k);
        }
    }
}

// shapes of training, cut into several tiles, and odd ones beside them
void test_gemm_large() {
    const size_t shapes[][3] = {{192, 1576, 768}, {576, 192, 1576}, {64, 12800, 256},
                                {64, 256, 12800}, {577, 193, 1577}, {1577, 97, 577},
                                {1, 4099, 1000},  {4099, 1, 1000}};
    for (auto& s : shapes) {
        if (FEW_SHAPES && s[0] * s[1] * s[2] > 10000000) { continue; }
        double worst = 0.0;
        for (int trans = 0; trans < 4; trans++) {
            for (Types types : TYPES) {
                Problem p = {(trans & 1) != 0, (trans & 2) != 0, s[0], s[1], s[2], 0, 0, s[0], s[0],
                             SCALES[trans][0], SCALES[trans][1]};
                p.lda = p.transa ? p.k : p.m;
                p.ldb = p.transb ? p.n : p.k;
                double x = gemm_excess(types, p);
                if (!(x <= worst)) { worst = x; }
            }
        }
        check(worst <= 1.0,
              "gemm %zu x %zu x %zu, all transposes and types: error %.3f of the bound", s[0], s[1],
              s[2], worst);
    }
}

// attention's products by cublasGemmStridedBatchedEx and, in another order, by cublasGemmBatchedEx.
// The trainers use the second alone, with aligned rows and beta 0
void test_gemm_batched() {
    const size_t shapes[][4] = {{50, 50, 16, 24},  {16, 50, 50, 24}, {197, 197, 64, 6},
                                {64, 197, 197, 6}, {17, 1, 5, 100},  {300, 300, 200, 3}};
    for (auto& s : shapes) {
        double worst_strided = 0.0, worst_pointers = 0.0;
        bool guards = true;
        size_t batch = s[3];
        for (int trans = 0; trans < 4; trans++) {
            for (Types types : TYPES) {
                auto padded = [](size_t rows, size_t pad) {
                    return ON_GPU ? (rows + 7) / 8 * 8 : rows + pad;
                };
                Problem p = {(trans & 1) != 0, (trans & 2) != 0, s[0], s[1], s[2], 0, 0, 0, 0,
                             SCALES[trans][0], ON_GPU ? 0.0f : SCALES[trans][1]};
                p.lda = padded(p.transa ? p.k : p.m, 1);
                p.ldb = padded(p.transb ? p.n : p.k, 2);
                p.ldc = p.ldd = padded(p.m, 1);
                // one A for all when the batch is strided, and gaps between the others
                size_t stride_a = trans == 3 && !ON_GPU ? 0 : padded(size_a(p), 8),
                       stride_b = padded(size_b(p), 4), stride_c = padded(p.ldc * p.n, 6);
                Array a = make_array(types.in, stride_a * (batch - 1) + size_a(p), 4);
                Array b = make_array(types.in, stride_b * batch, 5),
                      c = make_array(types.out, stride_c * batch, 6);
                if (p.beta == 0.0f) { fill_nan(c); }
                cublasStatus_t status;
                Array got;
#ifdef CPU_DEVICE
                status =
                    cublasGemmStridedBatchedEx(blas, op(p.transa), op(p.transb), (int)p.m, (int)p.n,
                                               (int)p.k, &p.alpha, a.device, types.in, (int)p.lda,
                                               (long long)stride_a, b.device, types.in, (int)p.ldb,
                                               (long long)stride_b, &p.beta, c.device, types.out,
                                               (int)p.ldc, (long long)stride_c, (int)batch,
                                               CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
                got = c.download();
                if (status != CUBLAS_STATUS_SUCCESS) { worst_strided = INFINITY; }
                for (size_t q = 0; q < batch; q++) {
                    double x = worst_excess(p, a, q * stride_a, b, q * stride_b, c, q * stride_c,
                                            NULL, got, q * stride_c);
                    if (!(x <= worst_strided)) { worst_strided = x; }
                }
                guards = guards && guards_intact(p, c, got, batch, stride_c);
#endif

                // pointers: problem q takes A of q / 2, B of q and C of the last but q
                std::vector<void*> pa(batch), pb(batch), pc(batch);
                for (size_t q = 0; q < batch; q++) {
                    pa[q] = a.device + q / 2 * stride_a * type_size(types.in);
                    pb[q] = b.device + q * stride_b * type_size(types.in);
                    pc[q] = c.device + (batch - 1 - q) * stride_c * type_size(types.out);
                }
                void** arrays;
                cudaCheck(cudaMalloc((void**)&arrays, 3 * batch * sizeof(void*)));
                cudaCheck(
                    cudaMemcpy(arrays, pa.data(), batch * sizeof(void*), cudaMemcpyHostToDevice));
                cudaCheck(cudaMemcpy(arrays + batch, pb.data(), batch * sizeof(void*),
                                     cudaMemcpyHostToDevice));
                cudaCheck(cudaMemcpy(arrays + 2 * batch, pc.data(), batch * sizeof(void*),
                                     cudaMemcpyHostToDevice));
                c.upload();
                status =
                    cublasGemmBatchedEx(blas, op(p.transa), op(p.transb), (int)p.m, (int)p.n,
                                        (int)p.k, &p.alpha, (const void* const*)arrays, types.in,
                                        (int)p.lda, (const void* const*)(arrays + batch), types.in,
                                        (int)p.ldb, &p.beta, arrays + 2 * batch, types.out,
                                        (int)p.ldc, (int)batch, CUBLAS_COMPUTE_32F,
                                        CUBLAS_GEMM_DEFAULT);
                got = c.download();
                if (status != CUBLAS_STATUS_SUCCESS) { worst_pointers = INFINITY; }
                for (size_t q = 0; q < batch; q++) {
                    size_t c0 = (batch - 1 - q) * stride_c;
                    double x =
                        worst_excess(p, a, q / 2 * stride_a, b, q * stride_b, c, c0, NULL, got, c0);
                    if (!(x <= worst_pointers)) { worst_pointers = x; }
                }
                guards = guards && guards_intact(p, c, got, batch, stride_c);
                cudaCheck(cudaFree(arrays));
                free_array(a), free_array(b), free_array(c);
            }
        }
        if (!ON_GPU) {
            check(worst_strided <= 1.0,
                  "strided batch of %zu: %zu x %zu x %zu: error %.3f of the bound", batch, s[0],
                  s[1], s[2], worst_strided);
        }
        check(worst_pointers <= 1.0,
              "pointer batch of %zu: %zu x %zu x %zu: error %.3f of the bound", batch, s[0], s[1],
              s[2], worst_pointers);
        check(guards, "batch of %zu: %zu x %zu x %zu: nothing written outside of the outputs",
              batch, s[0], s[1], s[2]);
    }
}

// k 0, alpha 0, empty outputs, and cublasSgemm, which is cublasGemmEx by another name
void test_gemm_corners() {
    Array a = make_array(CUDA_R_32F, 64, 1), b = make_array(CUDA_R_32F, 64, 2),
          c = make_array(CUDA_R_32F, 64, 3);
    float one = 1.0f, zero = 0.0f, half = 0.5f;
    cublasStatus_t status =
        cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 0, &one, (float*)a.device, 8,
                    (float*)b.device, 1, &half, (float*)c.device, 8);
    Array got = c.download();
    bool good = status == CUBLAS_STATUS_SUCCESS;
    for (size_t i = 0; i < 64; i++) { good = good && got[i] == 0.5f * c[i]; }
    check(good, "gemm with k 0 scales C by beta");

    fill_nan(c);
    status = cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 0, &one, (float*)a.device, 8,
                         (float*)b.device, 1, &zero, (float*)c.device, 8);
    got = c.download();
    good = status == CUBLAS_STATUS_SUCCESS;
    for (size_t i = 0; i < 64; i++) { good = good && got[i] == 0.0f; }
    check(good, "gemm with k 0 and beta 0 writes zeros over NaN");

    status = cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &zero, (float*)a.device, 8,
                         (float*)b.device, 8, &zero, (float*)c.device, 8);
    got = c.download();
    good = status == CUBLAS_STATUS_SUCCESS;
    for (size_t i = 0; i < 64; i++) { good = good && got[i] == 0.0f; }
    check(good, "gemm with alpha 0 and beta 0 writes zeros");

    c = make_array(CUDA_R_32F, 64, 3);
    good = cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 0, 8, 8, &one, (float*)a.device, 8,
                       (float*)b.device, 8, &zero, (float*)c.device, 8) == CUBLAS_STATUS_SUCCESS &&
           cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 0, 8, &one, (float*)a.device, 8,
                       (float*)b.device, 8, &zero, (float*)c.device, 8) == CUBLAS_STATUS_SUCCESS;
    check(good && c.download().values == c.values, "gemm with m 0 or n 0 writes nothing");

    Problem p = {false, true, 8, 8, 8, 8, 8, 8, 8, 0.5f, 1.0f};
    status = cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_C, 8, 8, 8, &half, (float*)a.device, 8,
                         (float*)b.device, 8, &one, (float*)c.device, 8);
    got = c.download();
    check(status == CUBLAS_STATUS_SUCCESS && worst_excess(p, a, 0, b, 0, c, 0, NULL, got, 0) <= 1.0,
          "cublasSgemm, with the conjugate of a real matrix as its transpose");
    free_array(a), free_array(b), free_array(c);
}

void test_gemm_arguments() {
    Array x = make_array(CUDA_R_32F, 4096, 1);
    float one = 1.0f;
    auto gemm = [&](cublasHandle_t handle, cublasOperation_t ta, int m, int n, int k, int lda,
                    int ldb, int ldc, const float* alpha, cudaDataType in, cudaDataType out,
                    cublasComputeType_t compute) {
        return cublasGemmEx(handle, ta, CUBLAS_OP_N, m, n, k, alpha, x.device, in, lda,
                            x.device + 4096, in, ldb, &one, x.device + 8192, out, ldc, compute,
                            CUBLAS_GEMM_DEFAULT);
    };
    const cudaDataType F = CUDA_R_32F, H = CUDA_R_16BF;
    const cublasComputeType_t S = CUBLAS_COMPUTE_32F;
    const cublasOperation_t N = CUBLAS_OP_N, T = CUBLAS_OP_T;
    check(gemm(blas, N, 8, 4, 16, 8, 16, 8, &one, F, F, S) == CUBLAS_STATUS_SUCCESS,
          "gemm with tight leading dimensions is accepted");
    check(gemm(NULL, N, 8, 4, 16, 8, 16, 8, &one, F, F, S) == CUBLAS_STATUS_NOT_INITIALIZED,
          "gemm without a handle is refused");
    check(gemm(blas, N, -1, 4, 16, 8, 16, 8, &one, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm with m -1 is refused");
    check(gemm(blas, N, 8, -1, 16, 8, 16, 8, &one, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm with n -1 is refused");
    check(gemm(blas, N, 8, 4, -1, 8, 16, 8, &one, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm with k -1 is refused");
    check(gemm(blas, N, 8, 4, 16, 7, 16, 8, &one, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm with lda < m is refused");
    check(gemm(blas, T, 8, 4, 16, 8, 16, 8, &one, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm with A transposed and lda < k is refused");
    check(gemm(blas, N, 8, 4, 16, 8, 15, 8, &one, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm with ldb < k is refused");
    check(gemm(blas, N, 8, 4, 16, 8, 16, 7, &one, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm with ldc < m is refused");
    check(gemm(blas, N, 8, 4, 16, 8, 16, 8, NULL, F, F, S) == CUBLAS_STATUS_INVALID_VALUE,
          "gemm without alpha is refused");
    check(gemm(blas, N, 8, 4, 16, 8, 16, 8, &one, F, H, S) == CUBLAS_STATUS_NOT_SUPPORTED,
          "gemm fp32 -> bf16 is not supported");
    check(gemm(blas, N, 8, 4, 16, 8, 16, 8, &one, H, H, CUBLAS_COMPUTE_16F) ==
              CUBLAS_STATUS_NOT_SUPPORTED,
          "gemm with half precision sums is not supported");
    check(strcmp(cublasGetStatusString(CUBLAS_STATUS_SUCCESS),
                 cublasGetStatusString(CUBLAS_STATUS_INVALID_VALUE)) != 0,
          "statuses have texts");
    free_array(x);
}

// ----------------------------------------------------------------------------
// cuBLASLt

struct Matmul {
    Types types;
    Problem p;
    cublasLtEpilogue_t epilogue;
    cudaDataType bias_type;
    size_t batch;
    int64_t stride_a, stride_b, stride_c, stride_d;
};

// sets up descriptors as a program does, asks for an algorithm, and multiplies with it. The first
// status that is not success.
cublasStatus_t lt_matmul(const Matmul& x, const void* a, const void* b, const void* c, void* d,
                         void* bias) {
    const Problem& p = x.p;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t la, lb, lc, ld;
    cublasLtMatmulPreference_t preference;
    cublasOperation_t transa = op(p.transa), transb = op(p.transb);
    int32_t batch = (int32_t)x.batch;
    uint64_t workspace = 0;
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    cublasLtMatrixLayoutCreate(&la, x.types.in, p.transa ? p.k : p.m, p.transa ? p.m : p.k,
                               (int64_t)p.lda);
    cublasLtMatrixLayoutCreate(&lb, x.types.in, p.transb ? p.n : p.k, p.transb ? p.k : p.n,
                               (int64_t)p.ldb);
    cublasLtMatrixLayoutCreate(&lc, x.types.out, p.m, p.n, (int64_t)p.ldc);
    cublasLtMatrixLayoutCreate(&ld, x.types.out, p.m, p.n, (int64_t)p.ldd);
    cublasLtMatmulPreferenceCreate(&preference);
    std::vector<cublasStatus_t> statuses = {
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transa, sizeof(transa)),
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSB, &transb, sizeof(transb)),
        cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &x.epilogue,
                                       sizeof(x.epilogue)),
        cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                             &workspace, sizeof(workspace))};
    if (bias != NULL) {
        statuses.push_back(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                                                          &bias, sizeof(bias)));
        statuses.push_back(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                                                          &x.bias_type, sizeof(x.bias_type)));
    }
    if (x.batch > 1) {
        const cublasLtMatrixLayout_t layouts[] = {la, lb, lc, ld};
        const int64_t strides[] = {x.stride_a, x.stride_b, x.stride_c, x.stride_d};
        for (int i = 0; i < 4; i++) {
            statuses.push_back(cublasLtMatrixLayoutSetAttribute(layouts[i],
                                                                CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                                                                &batch, sizeof(batch)));
            statuses.push_back(
                cublasLtMatrixLayoutSetAttribute(layouts[i],
                                                 CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                                 &strides[i], sizeof(strides[i])));
        }
    }
    cublasLtMatmulHeuristicResult_t result;
    int algorithms = -1;
    statuses.push_back(cublasLtMatmulAlgoGetHeuristic(lt, desc, la, lb, lc, ld, preference, 1,
                                                      &result, &algorithms));
    if (algorithms == 1) {
        statuses.push_back(cublasLtMatmul(lt, desc, &p.alpha, a, la, b, lb, &p.beta, c, lc, d, ld,
                                          &result.algo, NULL, 0, 0));
        cudaCheck(cudaDeviceSynchronize());
    } else if (algorithms != 0 || statuses.back() == CUBLAS_STATUS_SUCCESS) {
        statuses.push_back(CUBLAS_STATUS_INTERNAL_ERROR);  // no algorithm, and no reason for it
    }
    cublasLtMatmulPreferenceDestroy(preference);
    for (cublasLtMatrixLayout_t layout : {la, lb, lc, ld}) { cublasLtMatrixLayoutDestroy(layout); }
    cublasLtMatmulDescDestroy(desc);
    for (cublasStatus_t status : statuses) {
        if (status != CUBLAS_STATUS_SUCCESS) { return status; }
    }
    return CUBLAS_STATUS_SUCCESS;
}

// the excess of D, and of the bias gradient where the epilogue stores one
double lt_excess(Matmul x, bool in_place) {
    Problem& p = x.p;
    if (in_place) { p.ldc = p.ldd, x.stride_c = x.stride_d; }
    Array a = make_array(x.types.in, (size_t)x.stride_a * (x.batch - 1) + size_a(p), 1);
    Array b = make_array(x.types.in, (size_t)x.stride_b * (x.batch - 1) + size_b(p), 2);
    Array c = make_array(x.types.out, (size_t)x.stride_c * (x.batch - 1) + p.ldc * p.n + 3, 3);
    Array d = make_array(x.types.out, (size_t)x.stride_d * (x.batch - 1) + p.ldd * p.n + 3, 3);
    if (p.beta == 0.0f) { fill_nan(c), fill_nan(d); }
    bool bgrada = x.epilogue == CUBLASLT_EPILOGUE_BGRADA,
         bgradb = x.epilogue == CUBLASLT_EPILOGUE_BGRADB;
    size_t length = bgradb ? p.n : p.m;
    Array bias = make_array(x.bias_type, length + 8, 4);
    cublasStatus_t status =
        lt_matmul(x, a.device, b.device, in_place ? d.device : c.device, d.device,
                  x.epilogue == CUBLASLT_EPILOGUE_DEFAULT ? NULL : bias.device);
    Array got = d.download(), got_bias = bias.download();
    bool good =
        status == CUBLAS_STATUS_SUCCESS && guards_intact(p, d, got, x.batch, (size_t)x.stride_d);
    const Array* added = x.epilogue == CUBLASLT_EPILOGUE_BIAS ? &bias : NULL;
    double worst = 0.0;
    for (size_t q = 0; q < x.batch; q++) {
        double e =
            worst_excess(p, a, q * (size_t)x.stride_a, b, q * (size_t)x.stride_b, in_place ? d : c,
                         q * (size_t)x.stride_c, added, got, q * (size_t)x.stride_d);
        if (!(e <= worst)) { worst = e; }
    }
    for (size_t i = 0; i < bias.size(); i++) {
        if (i >= length || !(bgrada || bgradb)) {
            good = good && same_at(bias, got_bias, i);
            continue;
        }
        // the operand lies with k along its columns, whichever it is: the sum of a row
        double exact = 0.0, size = 0.0;
        for (size_t q = 0; q < p.k; q++) {
            double y = bgrada ? a[q * p.lda + i] : b[q * p.ldb + i];
            exact += y, size += fabs(y);
        }
        double tolerance = ldexp(size, -24) * (double)p.k +
                           (bias.type == CUDA_R_16BF ? ldexp(fabs(exact), -8) * 1.01 : 0.0);
        double e = fabs((double)got_bias[i] - exact) / tolerance;
        if (!(e <= worst)) { worst = e; }
    }
    free_array(a), free_array(b), free_array(c), free_array(d), free_array(bias);
    return good ? worst : INFINITY;
}

const char* epilogue_name(cublasLtEpilogue_t epilogue) {
    return epilogue == CUBLASLT_EPILOGUE_DEFAULT  ? "DEFAULT"
           : epilogue == CUBLASLT_EPILOGUE_BIAS   ? "BIAS"
           : epilogue == CUBLASLT_EPILOGUE_BGRADA ? "BGRADA"
                                                  : "BGRADB";
}

// Do the trainers ask for such a product? They use no bias gradient, no bias of a product of bf16
// that stays fp32, no product of two transposes, alpha 1 and beta 0 or 1
bool of_trainers(cublasLtEpilogue_t epilogue, Types types, const Problem& p) {
    return (epilogue == CUBLASLT_EPILOGUE_DEFAULT ||
            (epilogue == CUBLASLT_EPILOGUE_BIAS && types.in == types.out)) &&
           !(p.transa && p.transb) && p.alpha == 1.0f && p.m % 8 == 0 && p.n % 8 == 0 &&
           p.k % 8 == 0;
}

void test_lt_matmul() {
    const size_t shapes[][3] = {{1, 1, 1},    {7, 31, 17},     {64, 33, 197},
                                {48, 40, 24}, {192, 576, 200}, {576, 192, 800}};
    for (cublasLtEpilogue_t epilogue : {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS,
                                        CUBLASLT_EPILOGUE_BGRADA, CUBLASLT_EPILOGUE_BGRADB}) {
        for (Types types : TYPES) {
            double worst = 0.0;
            int count = 0;
            for (auto& s : shapes) {
                if (FEW_SHAPES && s[0] * s[1] * s[2] > 1000000) { continue; }
                for (int trans = 0; trans < 4; trans++) {
                    for (auto& scales : SCALES) {
                        Problem p = {
                            (trans & 1) != 0, (trans & 2) != 0, s[0], s[1], s[2], 0, 0, 0, 0,
                            scales[0],        scales[1]};
                        bool gradient = epilogue == CUBLASLT_EPILOGUE_BGRADA ||
                                        epilogue == CUBLASLT_EPILOGUE_BGRADB;
                        if ((epilogue == CUBLASLT_EPILOGUE_BGRADA && p.transa) ||
                            (epilogue == CUBLASLT_EPILOGUE_BGRADB && !p.transb)) {
                            continue;
                        }
                        if (ON_GPU && !of_trainers(epilogue, types, p)) { continue; }
                        auto padded = [=](size_t rows, size_t pad) {
                            return ON_GPU     ? rows
                                   : gradient ? (rows + 7) / 8 * 8 + 8
                                              : rows + pad;
                        };
                        p.lda = padded(p.transa ? p.k : p.m, 1);
                        p.ldb = padded(p.transb ? p.n : p.k, 2);
                        p.ldc = padded(p.m, 3);
                        p.ldd = padded(p.m, 4);
                        Matmul x = {types, p, epilogue, types.out, 1, 0, 0, 0, 0};
                        for (bool in_place : {false, true}) {
                            double e = lt_excess(x, in_place);
                            if (!(e <= worst)) { worst = e; }
                            count++;
                        }
                    }
                }
            }
            if (count == 0) { continue; } // on a GPU, where the trainers ask for none of these
            check(worst <= 1.0,
                  "cublasLtMatmul %s %s -> %s, %d products, D apart from C and in its place: error "
                  "%.3f of the bound",
                  epilogue_name(epilogue), type_name(types.in), type_name(types.out), count, worst);
        }
    }
    for (cublasLtEpilogue_t epilogue : {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS}) {
        if (ON_GPU) { break; }
        Problem p = {true, false, 50, 33, 16, 16, 16, 50, 50, 1.0f, 1.0f};
        Matmul x = {{CUDA_R_16BF, CUDA_R_16BF},
                    p,
                    epilogue,
                    CUDA_R_16BF,
                    9,
                    16 * 50,
                    16 * 33 + 2,
                    50 * 33 + 4,
                    50 * 33 + 6};
        double worst = std::max(lt_excess(x, false), lt_excess(x, true));
        check(worst <= 1.0, "cublasLtMatmul %s, batch of 9: error %.3f of the bound",
              epilogue_name(epilogue), worst);
    }
}

void test_lt_arguments() {
    Array x = make_array(CUDA_R_32F, 8192, 1);
    char *a = x.device, *b = a + 8192, *c = b + 8192, *bias = c + 8192;
    const Types F = {CUDA_R_32F, CUDA_R_32F}, H = {CUDA_R_16BF, CUDA_R_16BF};
    const Problem good = {false, true, 16, 24, 32, 16, 24, 16, 16, 1.0f, 0.0f};
    auto status = [&](Types types, Problem p, cublasLtEpilogue_t epilogue, cudaDataType bias_type) {
        return lt_matmul(Matmul{types, p, epilogue, bias_type, 1, 0, 0, 0, 0}, a, b, c, c, bias);
    };
    Problem p = good;
    check(status(F, p, CUBLASLT_EPILOGUE_BGRADA, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
              status(H, p, CUBLASLT_EPILOGUE_BGRADB, CUDA_R_16BF) == CUBLAS_STATUS_SUCCESS,
          "bias gradients of aligned products are accepted");
    p.lda = 15;
    check(status(F, p, CUBLASLT_EPILOGUE_DEFAULT, CUDA_R_32F) == CUBLAS_STATUS_INVALID_VALUE,
          "a layout with ld < rows is refused");
    p = good, p.transa = true, p.lda = 32;
    check(status(F, p, CUBLASLT_EPILOGUE_BGRADA, CUDA_R_32F) == CUBLAS_STATUS_NOT_SUPPORTED,
          "BGRADA with A transposed is not supported");
    p = good, p.transb = false, p.ldb = 32;
    check(status(F, p, CUBLASLT_EPILOGUE_BGRADB, CUDA_R_32F) == CUBLAS_STATUS_NOT_SUPPORTED,
          "BGRADB with B not transposed is not supported");
    p = good, p.ldb = 25;
    check(status(F, p, CUBLASLT_EPILOGUE_BGRADB, CUDA_R_32F) == CUBLAS_STATUS_NOT_SUPPORTED,
          "BGRADB with ldb 25 is not supported");
    check(status(F, p, CUBLASLT_EPILOGUE_BIAS, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS,
          "BIAS with ldb 25 is accepted");
    for (cublasLtEpilogue_t epilogue :
         {CUBLASLT_EPILOGUE_RELU, CUBLASLT_EPILOGUE_GELU_BIAS, CUBLASLT_EPILOGUE_DGELU}) {
        check(status(H, good, epilogue, CUDA_R_16BF) == CUBLAS_STATUS_NOT_SUPPORTED,
              "epilogue %d is not supported", (int)epilogue);
    }
    check(status(H, good, CUBLASLT_EPILOGUE_BIAS, CUDA_R_32F) == CUBLAS_STATUS_NOT_SUPPORTED,
          "a bias of another type than D is not supported");
    check(status(Types{CUDA_R_32F, CUDA_R_16BF}, good, CUBLASLT_EPILOGUE_DEFAULT, CUDA_R_32F) ==
              CUBLAS_STATUS_NOT_SUPPORTED,
          "fp32 -> bf16 is not supported");
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    int64_t value = 0;
    check(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &value,
                                         sizeof(value)) == CUBLAS_STATUS_INVALID_VALUE,
          "an attribute of the wrong size is refused");
    check(cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, &value,
                                         sizeof(value)) == CUBLAS_STATUS_NOT_SUPPORTED,
          "an attribute that the CPU device does not have is not supported");
    cublasLtMatmulDescDestroy(desc);
    free_array(x);
}

// ----------------------------------------------------------------------------
// wmma

using namespace nvcuda;

// one warp: d (16, 16) = a @ b + c, everything in the layouts and leading dimensions given; lanes
// of them take part
template <class LayoutA, class LayoutB>
__global__ void tile_product(float* d, const __nv_bfloat16* a, const __nv_bfloat16* b,
                             const float* c, unsigned lda, unsigned ldb, unsigned ldc, bool c_row,
                             unsigned lanes) {
    if (threadIdx.x >= lanes) { return; }
    wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, LayoutA> fa;
    wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, LayoutB> fb;
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc, fd;
    wmma::layout_t layout = c_row ? wmma::mem_row_major : wmma::mem_col_major;
    wmma::fill_fragment(fd, 1.0f);
    wmma::load_matrix_sync(fa, a, lda);
    wmma::load_matrix_sync(fb, b, ldb);
    wmma::load_matrix_sync(fc, c, ldc, layout);
    wmma::mma_sync(fd, fa, fb, fc);
    wmma::mma_sync(fd, fa, fb, fd);  // in place: d = 2 a @ b + c
    for (int i = 0; i < fd.num_elements; i++) { fd.x[i] *= 0.5f; }
    wmma::store_matrix_sync(d, fd, ldc, layout);
}

template <class LayoutA, class LayoutB>
double tile_excess(bool a_row, bool b_row, bool c_row, unsigned lanes) {
    const size_t lda = 24, ldb = 32, ldc = 20;
    // in the terms of the reference a row-major matrix is a transposed one; d is compared in its
    // own layout
    Problem p = {c_row ? !b_row : a_row,
                 c_row ? !a_row : b_row,
                 16,
                 16,
                 16,
                 c_row ? ldb : lda,
                 c_row ? lda : ldb,
                 ldc,
                 ldc,
                 1.0f,
                 0.5f};
    Array a = make_array(CUDA_R_16BF, lda * 16, 1), b = make_array(CUDA_R_16BF, ldb * 16, 2);
    Array c = make_array(CUDA_R_32F, ldc * 16, 3), d = make_array(CUDA_R_32F, ldc * 16, 4);
    tile_product<LayoutA, LayoutB><<<1, 32>>>((float*)d.device, (const __nv_bfloat16*)a.device,
                                              (const __nv_bfloat16*)b.device,
                                              (const float*)c.device, (unsigned)lda, (unsigned)ldb,
                                              (unsigned)ldc, c_row, lanes);
    cudaCheck(cudaGetLastError());
    Array got = d.download();
    // (a @ b)^T = b^T @ a^T: a row-major d is a column-major product of the operands in the other
    // order
    double worst = c_row ? worst_excess(p, b, 0, a, 0, c, 0, NULL, got, 0)
                         : worst_excess(p, a, 0, b, 0, c, 0, NULL, got, 0);
    bool good = guards_intact(p, d, got, 1, 0);
    free_array(a), free_array(b), free_array(c), free_array(d);
    return good ? worst : INFINITY;
}

void test_wmma() {
    for (bool c_row : {false, true}) {
        const double worst[] = {
            tile_excess<wmma::col_major, wmma::col_major>(false, false, c_row, 32),
            tile_excess<wmma::row_major, wmma::col_major>(true, false, c_row, 32),
            tile_excess<wmma::col_major, wmma::row_major>(false, true, c_row, 32),
            tile_excess<wmma::row_major, wmma::row_major>(true, true, c_row, 32)};
        for (int i = 0; i < 4; i++) {
            check(worst[i] <= 1.0, "wmma, A %s, B %s, C %s: error %.3f of the bound",
                  i & 1 ? "row-major" : "column-major", i & 2 ? "row-major" : "column-major",
                  c_row ? "row-major" : "column-major", worst[i]);
        }
    }
}

// ----------------------------------------------------------------------------
// what only the CPU device promises: the same bits for any number of workers, and an error where a
// GPU is silent or faults

#ifdef CPU_DEVICE

// FNV-1a over the results of products of all kinds and sizes
uint64_t products_checksum() {
    uint64_t hash = 14695981039346656037ull;
    const size_t shapes[][4] = {{192, 1576, 768, 1}, {576, 192, 1576, 1}, {64, 12800, 256, 1},
                                {64, 256, 12800, 1}, {577, 193, 1577, 1}, {50, 50, 16, 200},
                                {197, 197, 64, 30},  {33, 31, 17, 1},     {300, 300, 200, 4}};
    for (auto& s : shapes) {
        for (Types types : TYPES) {
            for (cublasLtEpilogue_t epilogue :
                 {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_BGRADA}) {
                Problem p = {false, true, s[0], s[1], s[2], s[0], s[1], s[0], s[0], 0.5f, 1.0f};
                Array a = make_array(types.in, size_a(p) * s[3], 1),
                      b = make_array(types.in, size_b(p) * s[3], 2);
                Array d = make_array(types.out, p.m * p.n * s[3], 3),
                      bias = make_array(types.out, p.m, 4);
                Matmul x = {types,
                            p,
                            epilogue,
                            types.out,
                            s[3],
                            (int64_t)size_a(p),
                            (int64_t)size_b(p),
                            (int64_t)(p.m * p.n),
                            (int64_t)(p.m * p.n)};
                // odd shapes have no bias gradient: C as it is then goes into the checksum
                lt_matmul(x, a.device, b.device, d.device, d.device,
                          epilogue == CUBLASLT_EPILOGUE_DEFAULT ? NULL : bias.device);
                for (const Array& result : {d.download(), bias.download()}) {
                    for (float x : result.values) {
                        uint32_t bits;
                        memcpy(&bits, &x, sizeof(bits));
                        hash = (hash ^ bits) * 1099511628211ull;
                    }
                }
                free_array(a), free_array(b), free_array(d), free_array(bias);
            }
        }
    }
    return hash;
}

#ifndef CPU_OPENBLAS
// the built-in product gives the same bits for a part of the rows or columns as for all of them
void test_chunks() {
    const size_t m = 577, n = 193, k = FEW_SHAPES ? 100 : 1577, chunk_m = 100, chunk_n = 37;
    for (Types types : TYPES) {
        for (int trans = 0; trans < 4; trans++) {
            bool transa = (trans & 1) != 0, transb = (trans & 2) != 0;
            Problem p = {transa, transb, m, n, k, transa ? k : m, transb ? n : k, m, m, 0.5f, 1.0f};
            Array a = make_array(types.in, m * k, 1), b = make_array(types.in, n * k, 2),
                  c = make_array(types.out, m * n, 3);
            size_t in = type_size(types.in), out = type_size(types.out);
            auto product = [&](size_t i, size_t j, size_t rows, size_t cols) {
                cublasGemmEx(blas, op(transa), op(transb), (int)rows, (int)cols, (int)k, &p.alpha,
                             a.device + (transa ? i * k : i) * in, types.in, (int)p.lda,
                             b.device + (transb ? j : j * k) * in, types.in, (int)p.ldb, &p.beta,
                             c.device + (j * m + i) * out, types.out, (int)m, CUBLAS_COMPUTE_32F,
                             CUBLAS_GEMM_DEFAULT);
            };
            product(0, 0, m, n);
            Array whole = c.download();
            c.upload();
            for (size_t i = 0; i < m; i += chunk_m) {
                for (size_t j = 0; j < n; j += chunk_n) {
                    product(i, j, std::min(chunk_m, m - i), std::min(chunk_n, n - j));
                }
            }
            check(c.download().values == whole.values,
                  "built-in gemm %s -> %s %c%c: chunks give the bits of the whole",
                  type_name(types.in), type_name(types.out), transa ? 'T' : 'N',
                  transb ? 'T' : 'N');
            free_array(a), free_array(b), free_array(c);
        }
    }
}
#endif

// runs this program as a child with one of the modes in main, and returns its exit code and all it
// prints
int run_child(const char* program, const char* environment, const char* mode, std::string* output) {
    std::string command = std::string(environment) + " '" + program + "' " + mode + " 2>&1";
    FILE* pipe = popen(command.c_str(), "r");
    char buffer[4096];
    output->clear();
    if (pipe == NULL) { return -1; }
    for (size_t n; (n = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) { output->append(buffer, n); }
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void test_children(const char* program) {
    std::string one, other;
    // under a sanitizer there is one worker only
    if (!FEW_SHAPES) { run_child(program, "OMP_NUM_THREADS=1", "checksum", &one); }
    for (const char* threads :
         {"OMP_NUM_THREADS=2", "OMP_NUM_THREADS=3", "OMP_NUM_THREADS=2 CPU_SCHEDULE=random:7"}) {
        if (FEW_SHAPES) { break; }
        int code = run_child(program, threads, "checksum", &other);
        check(code == 0 && other == one && one.rfind("checksum ", 0) == 0,
              "the same bits with OMP_NUM_THREADS=1 and %s", threads);
    }
    const struct { const char *mode, *message, *what; } deaths[] = {
        {"host-matrix", "not in device memory", "a matrix in host memory"},
        {"short-matrix", "of an allocation of", "a matrix that ends beyond its allocation"},
        {"host-pointers", "not in device memory", "an array of pointers in host memory"},
        {"missing-lane", "wmma", "a wmma product without lane 31"},
        {"missing-lanes", "wmma", "a wmma product by half a warp"},
    };
    for (auto& death : deaths) {
        int code = run_child(program, "", death.mode, &other);
        check(code != 0 && other.find(death.message) != std::string::npos,
              "%s ends the program with a message", death.what);
    }
}

// the misuse that a child is asked for; it should not return
void misuse(const char* mode) {
    float one = 1.0f, host[64] = {};
    void* host_pointers[1] = {host};
    Array x = make_array(CUDA_R_32F, 64, 1);
    float* device = (float*)x.device;
    if (strcmp(mode, "host-matrix") == 0) {
        cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, host, 8, device, 8, &one, device,
                    8);
    } else if (strcmp(mode, "short-matrix") == 0) {
        cublasSgemm(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, device, 9, device, 8, &one,
                    device, 8);
    } else if (strcmp(mode, "host-pointers") == 0) {
        cublasGemmBatchedEx(blas, CUBLAS_OP_N, CUBLAS_OP_N, 8, 8, 8, &one, host_pointers,
                            CUDA_R_32F, 8, host_pointers, CUDA_R_32F, 8, &one, host_pointers,
                            CUDA_R_32F, 8, 1, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    } else if (strcmp(mode, "missing-lane") == 0) {
        tile_excess<wmma::col_major, wmma::col_major>(false, false, false, 31);
    } else if (strcmp(mode, "missing-lanes") == 0) {
        tile_excess<wmma::col_major, wmma::col_major>(false, false, false, 16);
    } else {
        fprintf(stderr,
                "found the argument \"%s\", expected none; call test_cpu_libs without arguments\n",
                mode);
        exit(2);
    }
}

#endif

// ----------------------------------------------------------------------------
// NCCL

#ifdef MULTI_GPU

size_t nccl_size(ncclDataType_t type) {
    return type == ncclUint8                          ? 1
           : type == ncclBfloat16                     ? 2
           : type == ncclInt32 || type == ncclFloat32 ? 4
                                                      : 8;
}

double nccl_get(const char* p, ncclDataType_t type, size_t i) {
    float f;
    double d;
    int32_t n;
    int64_t l;
    uint16_t h;
    p += i * nccl_size(type);
    switch (type) {
        case ncclFloat32: memcpy(&f, p, 4); return f;
        case ncclFloat64: memcpy(&d, p, 8); return d;
        case ncclInt32: memcpy(&n, p, 4); return n;
        case ncclInt64: memcpy(&l, p, 8); return (double)l;
        case ncclBfloat16: memcpy(&h, p, 2); return bf16_value(h);
        default: return (uint8_t)*p;
    }
}

void nccl_set(char* p, ncclDataType_t type, size_t i, double x) {
    float f = (float)x;
    int32_t n = (int32_t)x;
    int64_t l = (int64_t)x;
    uint16_t h = bf16_bits((float)x);
    uint8_t u = (uint8_t)x;
    p += i * nccl_size(type);
    switch (type) {
        case ncclFloat32: memcpy(p, &f, 4); break;
        case ncclFloat64: memcpy(p, &x, 8); break;
        case ncclInt32: memcpy(p, &n, 4); break;
        case ncclInt64: memcpy(p, &l, 8); break;
        case ncclBfloat16: memcpy(p, &h, 2); break;
        default: *p = (char)u;
    }
}

// what rank q holds at i: small whole numbers for the integers, fractions that round for the others
double nccl_value(ncclDataType_t type, int q, size_t i) {
    double x = uniform(i, 1000 + (unsigned)q);
    return type == ncclUint8                        ? floor((x + 0.5) * 60)
           : type == ncclInt32 || type == ncclInt64 ? floor(x * 1e6)
                                                    : x;
}

double nccl_rounded(ncclDataType_t type, int q, size_t i) {
    char cell[8];
    nccl_set(cell, type, 0, nccl_value(type, q, i));
    return nccl_get(cell, type, 0);
}

// the values of all ranks at i combined in their order, in float for bf16, and rounded to the type
// once
double nccl_expected(ncclDataType_t type, ncclRedOp_t op, int num_ranks, size_t i) {
    char cell[8];
    double result = 0.0;
    for (int q = 0; q < num_ranks; q++) {
        double x = nccl_rounded(type, q, i);
        if (q == 0) {
            result = x;
        } else if (op == ncclMax) {
            result = std::max(result, x);
        } else if (op == ncclMin) {
            result = std::min(result, x);
        } else {
            result = op == ncclProd ? result * x : result + x;
        }
        if (type == ncclFloat32 || type == ncclBfloat16) { result = (float)result; }
        if (type == ncclUint8) { result = fmod(result, 256.0); }
    }
    if (op == ncclAvg) {
        result = type == ncclFloat32 || type == ncclBfloat16 ? (float)result / (float)num_ranks
                                                             : result / num_ranks;
        if (type == ncclInt32 || type == ncclInt64 || type == ncclUint8) { result = trunc(result); }
    }
    nccl_set(cell, type, 0, result);
    return nccl_get(cell, type, 0);
}

// a device buffer with `count` values of this rank; element i holds nccl_value(first + i)
char* nccl_buffer(ncclDataType_t type, int rank, size_t first, size_t count) {
    std::vector<char> host(count * nccl_size(type));
    for (size_t i = 0; i < count; i++) {
        nccl_set(host.data(), type, i, nccl_value(type, rank, first + i));
    }
    char* device;
    cudaCheck(cudaMalloc((void**)&device, host.size()));
    cudaCheck(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice));
    return device;
}

std::vector<char> nccl_download(const char* device, ncclDataType_t type, size_t count) {
    std::vector<char> host(count * nccl_size(type));
    cudaCheck(cudaMemcpy(host.data(), device, host.size(), cudaMemcpyDeviceToHost));
    return host;
}

// Are these bytes the same on all ranks?
bool same_on_all_ranks(const std::vector<char>& bytes) {
    uint64_t hash = 14695981039346656037ull, low, high;
    for (char byte : bytes) { hash = (hash ^ (uint8_t)byte) * 1099511628211ull; }
    MPI_Allreduce(&hash, &low, 1, MPI_UINT64_T, MPI_MIN, MPI_COMM_WORLD);
    MPI_Allreduce(&hash, &high, 1, MPI_UINT64_T, MPI_MAX, MPI_COMM_WORLD);
    return low == high;
}

void test_nccl(ncclComm_t comm, int num_ranks, int rank) {
    const struct {
        ncclDataType_t type;
        const char* name;
    } types[] = {{ncclFloat32, "fp32"}, {ncclFloat64, "fp64"}, {ncclBfloat16, "bf16"},
                 {ncclInt32, "int32"},  {ncclInt64, "int64"},  {ncclUint8, "uint8"}};
    const struct {
        ncclRedOp_t op;
        const char* name;
    } ops[] = {{ncclSum, "sum"},
               {ncclProd, "product"},
               {ncclMax, "max"},
               {ncclMin, "min"},
               {ncclAvg, "average"}};
    const size_t counts[] = {1, 2, 5, 1000, (5 << 19) + 1};  // the last one needs several pieces
    for (auto& t : types) {
        for (auto& o : ops) {
            bool exact = true, same = true, scattered = true;
            // products of three int64 are beyond what a double holds
            if (o.op == ncclProd && (t.type == ncclInt64 || t.type == ncclInt32)) { continue; }
            for (size_t count : counts) {
                if (count > 1000 && (o.op != ncclSum || t.type != ncclBfloat16)) { continue; }
                for (bool in_place : {false, true}) {
                    char *send = nccl_buffer(t.type, rank, 0, count),
                         *recv = in_place ? send : nccl_buffer(t.type, 50, 0, count);
                    exact =
                        ncclAllReduce(send, recv, count, t.type, o.op, comm, 0) == ncclSuccess &&
                        exact;
                    std::vector<char> got = nccl_download(recv, t.type, count);
                    for (size_t i = 0; i < count; i++) {
                        exact = exact && nccl_get(got.data(), t.type, i) ==
                                             nccl_expected(t.type, o.op, num_ranks, i);
                    }
                    same = same_on_all_ranks(got) && same;
                    cudaCheck(cudaFree(send));
                    if (!in_place) { cudaCheck(cudaFree(recv)); }

                    send = nccl_buffer(t.type, rank, 0, count * num_ranks);
                    recv = in_place ? send + rank * count * nccl_size(t.type)
                                    : nccl_buffer(t.type, 50, 0, count);
                    scattered = ncclReduceScatter(send, recv, count, t.type, o.op, comm, 0) ==
                                    ncclSuccess &&
                                scattered;
                    got = nccl_download(recv, t.type, count);
                    for (size_t i = 0; i < count; i++) {
                        scattered = scattered &&
                                    nccl_get(got.data(), t.type, i) ==
                                        nccl_expected(t.type, o.op, num_ranks, rank * count + i);
                    }
                    cudaCheck(cudaFree(send));
                    if (!in_place) { cudaCheck(cudaFree(recv)); }
                }
            }
            check(exact,
                  "ncclAllReduce %s %s: exactly the values combined in the order of the ranks",
                  t.name, o.name);
            check(same, "ncclAllReduce %s %s: the same bits on all ranks", t.name, o.name);
            check(scattered, "ncclReduceScatter %s %s", t.name, o.name);
        }
        bool gathered = true, sent = true;
        for (size_t count : counts) {
            if (count > 1000 && t.type != ncclBfloat16) { continue; }
            char *send = nccl_buffer(t.type, rank, 0, count),
                 *recv = nccl_buffer(t.type, 50, 0, count * num_ranks);
            for (bool in_place : {false, true}) {
                char* from = in_place ? recv + rank * count * nccl_size(t.type) : send;
                if (in_place) {
                    cudaCheck(cudaMemcpy(from, send, count * nccl_size(t.type),
                                         cudaMemcpyDeviceToDevice));
                }
                gathered =
                    ncclAllGather(from, recv, count, t.type, comm, 0) == ncclSuccess && gathered;
                std::vector<char> got = nccl_download(recv, t.type, count * num_ranks);
                for (int q = 0; q < num_ranks; q++) {
                    for (size_t i = 0; i < count; i++) {
                        gathered = gathered && nccl_get(got.data(), t.type, q * count + i) ==
                                                   nccl_rounded(t.type, q, i);
                    }
                }
            }
            int root = num_ranks - 1;
            sent = ncclBroadcast(rank == root ? send : NULL, recv, count, t.type, root, comm, 0) ==
                       ncclSuccess &&
                   sent;
            std::vector<char> got = nccl_download(recv, t.type, count);
            for (size_t i = 0; i < count; i++) {
                sent = sent && nccl_get(got.data(), t.type, i) == nccl_rounded(t.type, root, i);
            }
            cudaCheck(cudaFree(send));
            cudaCheck(cudaFree(recv));
        }
        check(gathered, "ncclAllGather %s", t.name);
        check(sent, "ncclBroadcast %s from the last rank", t.name);
    }

    float* x = (float*)nccl_buffer(ncclFloat32, rank, 0, 4);
    check(ncclGroupEnd() == ncclInvalidUsage, "ncclGroupEnd without ncclGroupStart is refused");
    bool grouped = ncclGroupStart() == ncclSuccess &&
                   ncclAllReduce(x, x, 2, ncclFloat32, ncclSum, comm, 0) == ncclSuccess &&
                   ncclAllReduce(x + 2, x + 2, 2, ncclFloat32, ncclMax, comm, 0) == ncclSuccess &&
                   ncclGroupEnd() == ncclSuccess;
    std::vector<char> got = nccl_download((char*)x, ncclFloat32, 4);
    for (size_t i = 0; i < 4; i++) {
        grouped =
            grouped && nccl_get(got.data(), ncclFloat32, i) ==
                           nccl_expected(ncclFloat32, i < 2 ? ncclSum : ncclMax, num_ranks, i);
    }
    check(grouped, "a group of two reductions");
    check(ncclAllReduce(x, x, 4, ncclFloat16, ncclSum, comm, 0) == ncclInvalidArgument,
          "a type that the CPU device does not have is refused");
    check(ncclBroadcast(x, x, 4, ncclFloat32, num_ranks, comm, 0) == ncclInvalidArgument,
          "a root that is no rank is refused");
    check(ncclAllReduce(x, x, 0, ncclFloat32, ncclSum, comm, 0) == ncclSuccess,
          "an empty reduction");
    cudaCheck(cudaFree(x));
}

// a buffer that an int cannot count
void test_nccl_large(ncclComm_t comm, int num_ranks, int rank) {
    size_t count = ((size_t)1 << 31) + 5;
    uint8_t* x;
    cudaCheck(cudaMalloc((void**)&x, count));
    cudaCheck(cudaMemset(x, rank + 1, count));
    bool good = ncclAllReduce(x, x, count, ncclUint8, ncclSum, comm, 0) == ncclSuccess;
    std::vector<uint8_t> host(count);
    cudaCheck(cudaMemcpy(host.data(), x, count, cudaMemcpyDeviceToHost));
    uint8_t expected = (uint8_t)(num_ranks * (num_ranks + 1) / 2);
    good = good && std::count(host.begin(), host.end(), expected) == (ptrdiff_t)count;
    check(good, "ncclAllReduce of %zu bytes", count);
    cudaCheck(cudaFree(x));
}

#endif

#ifdef MULTI_GPU
// checks of one rank in a world of num_ranks
void test_nccl_world(int num_ranks, int rank, bool large) {
    ncclUniqueId id;
    ncclComm_t comm;
    ncclGetUniqueId(&id);
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, MPI_COMM_WORLD);
    check(ncclCommInitRank(&comm, num_ranks + 1, id, rank) == ncclInvalidArgument,
          "a wrong number of ranks is refused");
    if (ncclCommInitRank(&comm, num_ranks, id, rank) != ncclSuccess) {
        fprintf(stderr, "found no communicator of %d ranks; start the test with mpirun\n",
                num_ranks);
        exit(1);
    }
    test_nccl(comm, num_ranks, rank);
    if (large) { test_nccl_large(comm, num_ranks, rank); }
    check(ncclCommDestroy(comm) == ncclSuccess, "ncclCommDestroy");
}
#endif

void test_products([[maybe_unused]] const char* program) {
#ifdef CPU_DEVICE
    test_children(program);
#ifndef CPU_OPENBLAS
    test_chunks();
#endif
    test_gemm_arguments();
    test_gemm_corners();
    test_gemm_shapes();
    test_gemm_large();
    test_lt_arguments();
    test_wmma();
#endif
    test_gemm_batched();
    test_lt_matmul();
}

int main([[maybe_unused]] int argc, [[maybe_unused]] char** argv) {
    int num_ranks = 1, rank = 0;
    cublasCreate(&blas);
    cublasLtCreate(&lt);
#ifdef CPU_DEVICE
    const bool large = argc > 1 && strcmp(argv[1], "large") == 0;
    if (argc > 1 && strcmp(argv[1], "checksum") == 0) {
        printf("checksum %016llx\n", (unsigned long long)products_checksum());
        return 0;
    }
    if (argc > 1 && !large) { // a child, which is no rank of MPI
        misuse(argv[1]);
        return 0;
    }
#endif
#ifdef MULTI_GPU
    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &num_ranks);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    test_nccl_world(num_ranks, rank, large);
#endif
    if (num_ranks == 1) { test_products(argv[0]); }
    cublasLtDestroy(lt);
    cublasDestroy(blas);
    if (rank == 0) { printf("%d passed, %d failed\n", passed, failed); }
#ifdef MULTI_GPU
    MPI_Finalize();
#endif
    return failed > 0;
}
