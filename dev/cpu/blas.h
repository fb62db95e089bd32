/*
The matrix product underneath cublas_v2.h and cublasLt.h.

    cpu::gemm(batch, problem)   D = alpha * op(A) @ op(B) + beta * C [+ bias], float or bfloat16
    cpu::row_sums(...)          sums along the rows of a matrix: the bias gradients of cuBLASLt

All matrices are column-major, as in cuBLAS. The output is cut into a fixed grid of tiles, never
along k, and the workers take tiles. The grid is a function of m, n and k alone, so that no bit of a
result depends on the number of workers. With -DCPU_OPENBLAS a tile is one single-threaded
cblas_sgemm, else one call of the packed sgemm below. That one promises more: the bits of an element
depend on its row of A, its column of B and k, not on the place of either, so that a product done in
chunks of rows equals the whole.
*/
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <algorithm>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cuda_bf16.h"
#include "parallel.h"

#ifdef CPU_OPENBLAS
// declared here so that the OpenBLAS headers need not be on the include path
extern "C" {
void openblas_set_num_threads(int num_threads);
void cblas_sgemm(int order, int transa, int transb, int m, int n, int k, float alpha,
                 const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);
}
#endif

namespace cpu {

// ----------------------------------------------------------------------------
// scratch memory

enum ScratchSlot {
    SCRATCH_A,
    SCRATCH_B,
    SCRATCH_OUT,
    SCRATCH_PACKED_A,
    SCRATCH_PACKED_B,
    SCRATCH_SLOTS
};

struct Scratch {
    float* data[SCRATCH_SLOTS] = {};
    size_t count[SCRATCH_SLOTS] = {};
    ~Scratch() {
        for (int i = 0; i < SCRATCH_SLOTS; i++) { free(data[i]); }
    }
};

// count floats, aligned to 64 bytes, that stay this thread's until it asks for the slot again. A
// slot only grows, so that a training step allocates in its first pass and never after.
inline float* scratch(ScratchSlot slot, size_t count) {
    static thread_local Scratch s;
    if (s.count[slot] < count) {
        free(s.data[slot]);
        s.count[slot] = (count + 15) / 16 * 16;
        s.data[slot] = (float*)aligned_alloc(64, s.count[slot] * sizeof(float));
        if (s.data[slot] == NULL) {
            die("found no memory for %zu bytes of matrix scratch; use a smaller batch",
                s.count[slot] * sizeof(float));
        }
    }
    return s.data[slot];
}

// ----------------------------------------------------------------------------
// sgemm of one thread

#ifndef CPU_OPENBLAS

// A micro tile is up to MICRO_VECS vectors of rows by MICRO_COLS columns: as many accumulators as
// fit in the registers (24 of 32, or 12 of 16) beside a column of A and an element of B.
#if defined(__AVX512F__)
constexpr int VEC = 16, MICRO_COLS = 8;
#elif defined(__AVX__)
constexpr int VEC = 8, MICRO_COLS = 4;
#elif defined(__aarch64__)
constexpr int VEC = 4, MICRO_COLS = 8;
#else
constexpr int VEC = 4, MICRO_COLS = 4;
#endif
constexpr int MICRO_VECS = 3;
// a panel of B (BLOCK_K x MICRO_COLS) stays in the L1 cache, a block of A (BLOCK_M x BLOCK_K) in L2,
// a block of B (BLOCK_K x BLOCK_N) in L3
constexpr size_t BLOCK_K = 384, BLOCK_M = 4 * MICRO_VECS * VEC, BLOCK_N = 1536;

typedef float Vec __attribute__((vector_size(VEC * sizeof(float))));
typedef float Vec4 __attribute__((vector_size(16)));

// a * b + c. The build says -ffp-contract=off, so the fused form has to be asked for.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
    return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// C (rows, cols) = beta * C + alpha * A (rows, k) @ B (k, cols), rows <= V*VEC, cols <= MICRO_COLS.
// a and b are packed panels, V*VEC and MICRO_COLS floats for each of the k steps, padded with
// zeros. beta 0 does not read C.
template <int V> void micro_kernel(size_t k, const float* a, const float* b, float alpha,
                                   float beta, float* c, size_t ldc, size_t rows, size_t cols) {
    Vec acc[MICRO_COLS][V] = {};
    for (size_t p = 0; p < k; p++) {
        Vec column[V];
        #pragma GCC unroll 3
        for (int v = 0; v < V; v++) { memcpy(&column[v], a + (p * V + v) * VEC, sizeof(Vec)); }
        #pragma GCC unroll 8
        for (int j = 0; j < MICRO_COLS; j++) {
            Vec element = b[p * MICRO_COLS + j] - Vec{};
            #pragma GCC unroll 3
            for (int v = 0; v < V; v++) {
                acc[j][v] = fused_multiply_add(column[v], element, acc[j][v]);
            }
        }
    }
    #pragma GCC unroll 8
    for (int j = 0; j < MICRO_COLS; j++) {
        if ((size_t)j >= cols) { break; }
        #pragma GCC unroll 3
        for (int v = 0; v < V; v++) {
            if ((size_t)v * VEC >= rows) { break; }
            float* cv = c + j * ldc + v * VEC;
            Vec out = alpha * acc[j][v], old = {};
            bool whole = rows >= (size_t)(v + 1) * VEC;
            // a vector with rows beyond the matrix does the same arithmetic, so that the place of
            // an element does not matter
            size_t count = whole ? VEC : rows - v * VEC;
            if (beta != 0.0f) {
                if (whole) {
                    memcpy(&old, cv, sizeof(old));
                } else {
                    for (size_t i = 0; i < count; i++) { old[i] = cv[i]; }
                }
                out = fused_multiply_add(beta - Vec{}, old, out);
            }
            if (whole) {
                memcpy(cv, &out, sizeof(out));
            } else {
                for (size_t i = 0; i < count; i++) { cv[i] = out[i]; }
            }
        }
    }
}

// the floats of a and b at these places, b's numbered from 4
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int Index4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Index4{i, j, k, l})
#endif

// dst[p*WIDTH + i] = element (i, p) of the source, zero for i in [valid, WIDTH). The source is
// contiguous along i (element (i, p) at src[p*ld + i]) or along p (at src[i*ld + p]); the second is
// transposed four by four in registers.
template <int WIDTH> void pack_panel(float* dst, size_t valid, size_t k, const float* src,
                                     size_t ld, bool contiguous_i) {
    if (contiguous_i && valid == WIDTH) {
        for (size_t p = 0; p < k; p++) {
            memcpy(dst + p * WIDTH, src + p * ld, WIDTH * sizeof(float));
        }
        return;
    }
    if (contiguous_i) {
        for (size_t p = 0; p < k; p++) {
            for (size_t i = 0; i < WIDTH; i++) {
                dst[p * WIDTH + i] = i < valid ? src[p * ld + i] : 0.0f;
            }
        }
        return;
    }
    for (size_t i = 0; i < WIDTH; i += 4) {
        size_t p = 0;
        if (i + 4 <= valid) {
            for (; p + 4 <= k; p += 4) {
                Vec4 row[4];
                for (int q = 0; q < 4; q++) {
                    memcpy(&row[q], src + (i + q) * ld + p, sizeof(Vec4));
                }
                Vec4 low01 = SHUFFLE(row[0], row[1], 0, 4, 1, 5);
                Vec4 low23 = SHUFFLE(row[2], row[3], 0, 4, 1, 5);
                Vec4 high01 = SHUFFLE(row[0], row[1], 2, 6, 3, 7);
                Vec4 high23 = SHUFFLE(row[2], row[3], 2, 6, 3, 7);
                row[0] = SHUFFLE(low01, low23, 0, 1, 4, 5);
                row[1] = SHUFFLE(low01, low23, 2, 3, 6, 7);
                row[2] = SHUFFLE(high01, high23, 0, 1, 4, 5);
                row[3] = SHUFFLE(high01, high23, 2, 3, 6, 7);
                for (int q = 0; q < 4; q++) {
                    memcpy(dst + (p + q) * WIDTH + i, &row[q], sizeof(Vec4));
                }
            }
        }
        for (; p < k; p++) {
            for (size_t q = i; q < i + 4; q++) {
                dst[p * WIDTH + q] = q < valid ? src[q * ld + p] : 0.0f;
            }
        }
    }
}

#undef SHUFFLE

// C (m, n) = alpha * op(A) (m, k) @ op(B) (k, n) + beta * C, on the calling thread.
// Blocks of B and A are packed into panels in the order in which the micro kernel reads them.
inline void sgemm_thread(bool transa, bool transb, size_t m, size_t n, size_t k, float alpha,
                         const float* a, size_t lda, const float* b, size_t ldb, float beta,
                         float* c, size_t ldc) {
    // by the number of vectors of rows
    decltype(&pack_panel<VEC>) const pack[] = {pack_panel<VEC>, pack_panel<2 * VEC>, pack_panel<3 * VEC>};
    decltype(&micro_kernel<1>) const kernel[] = {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>};
    // rows in panels of equal height: 4 vectors of rows make two panels of 2, which keep the units
    // busier than 3 and 1
    size_t vecs = (std::min(m, BLOCK_M) + VEC - 1) / VEC;
    size_t panels = (vecs + MICRO_VECS - 1) / MICRO_VECS;
    size_t panel_vecs = (vecs + panels - 1) / panels;
    size_t panel_rows = panel_vecs * VEC;
    size_t block_n = std::min(n, BLOCK_N), block_k = std::min(k, BLOCK_K);
    float* packed_a = scratch(SCRATCH_PACKED_A, panels * panel_rows * block_k);
    float* packed_b =
        scratch(SCRATCH_PACKED_B, (block_n + MICRO_COLS - 1) / MICRO_COLS * MICRO_COLS * block_k);
    for (size_t n0 = 0; n0 < n; n0 += BLOCK_N) {
        size_t nb = std::min(n - n0, BLOCK_N);
        for (size_t k0 = 0; k0 < k; k0 += BLOCK_K) {
            size_t kb = std::min(k - k0, BLOCK_K);
            float block_beta = k0 == 0 ? beta : 1.0f;
            for (size_t j = 0; j < nb; j += MICRO_COLS) {
                const float* src = transb ? b + k0 * ldb + n0 + j : b + (n0 + j) * ldb + k0;
                pack_panel<MICRO_COLS>(packed_b + j * kb, std::min<size_t>(nb - j, MICRO_COLS), kb,
                                       src, ldb, transb);
            }
            for (size_t m0 = 0; m0 < m; m0 += BLOCK_M) {
                size_t mb = std::min(m - m0, BLOCK_M);
                for (size_t i = 0; i < mb; i += panel_rows) {
                    const float* src = transa ? a + (m0 + i) * lda + k0 : a + k0 * lda + m0 + i;
                    size_t rows = std::min(mb - i, panel_rows);
                    pack[(rows - 1) / VEC](packed_a + i * kb, rows, kb, src, lda, !transa);
                }
                for (size_t j = 0; j < nb; j += MICRO_COLS) {
                    for (size_t i = 0; i < mb; i += panel_rows) {
                        size_t rows = std::min(mb - i, panel_rows);
                        size_t cols = std::min<size_t>(nb - j, MICRO_COLS);
                        float* tile = c + (n0 + j) * ldc + m0 + i;
                        kernel[(rows - 1) / VEC](kb, packed_a + i * kb, packed_b + j * kb, alpha,
                                                 block_beta, tile, ldc, rows, cols);
                    }
                }
            }
        }
    }
}

#else

inline void sgemm_thread(bool transa, bool transb, size_t m, size_t n, size_t k, float alpha,
                         const float* a, size_t lda, const float* b, size_t ldb, float beta,
                         float* c, size_t ldc) {
    enum { COL_MAJOR = 102, NO_TRANS = 111, TRANS = 112 };
    // the workers are ours: OpenBLAS's own threads would fight them for the cores. Set once; a
    // static is thread-safe.
    static const bool single_threaded = (openblas_set_num_threads(1), true);
    (void)single_threaded;
    cblas_sgemm(COL_MAJOR, transa ? TRANS : NO_TRANS, transb ? TRANS : NO_TRANS, (int)m, (int)n,
                (int)k, alpha, a, (int)lda, b, (int)ldb, beta, c, (int)ldc);
}

#endif

// ----------------------------------------------------------------------------
// the product on all workers

enum MatrixType { FLOAT32, BFLOAT16 };

// d (m, n) = alpha * op(a) (m, k) @ op(b) (k, n) + beta * c (m, n) + bias (m), rounded once
// c and d have one type; c may be d. bias may be NULL. beta 0 does not read c.
struct Gemm {
    bool transa, transb;
    size_t m, n, k;
    float alpha, beta;
    const void *a, *b, *c;
    void* d;
    const void* bias;
    size_t lda, ldb, ldc, ldd;
    MatrixType a_type, b_type, d_type, bias_type;
};

// BLAS does not read A and B in this case: they may be NULL, and their NaN do not matter
inline bool without_product(const Gemm& p) { return p.k == 0 || p.alpha == 0.0f; }

inline void load_floats(float* dst, const void* src, MatrixType type, size_t first, size_t count) {
    if (type == FLOAT32) {
        memcpy(dst, (const float*)src + first, count * sizeof(float));
    } else {
        for (size_t i = 0; i < count; i++) {
            dst[i] = bf16_widen(((const uint16_t*)src)[first + i]);
        }
    }
}

// the matrix x (rows, cols) in float: x itself, or a copy in this thread's scratch, whose leading
// dimension goes to ld
inline const float* as_floats(ScratchSlot slot, const void* x, MatrixType type, size_t rows,
                              size_t cols, size_t* ld) {
    if (type == FLOAT32) { return (const float*)x; }
    float* copy = scratch(slot, rows * cols);
    size_t ldx = *ld, cols_per_task = 1 + 65536 / (rows + 1);
    parallel_for((cols + cols_per_task - 1) / cols_per_task, [=](size_t task) {
        for (size_t j = task * cols_per_task; j < cols && j < (task + 1) * cols_per_task; j++) {
            load_floats(copy + j * rows, x, type, j * ldx, rows);
        }
    });
    *ld = rows;
    return copy;
}

// one tile of p.d: rows [i, i + m), columns [j, j + n). p.a and p.b are float.
inline void gemm_tile(const Gemm& p, size_t i, size_t j, size_t m, size_t n) {
    bool direct = p.d_type == FLOAT32;
    float* out = direct ? (float*)p.d + j * p.ldd + i : scratch(SCRATCH_OUT, m * n);
    size_t ldo = direct ? p.ldd : m;
    if (p.beta != 0.0f && !(direct && p.c == p.d)) {
        for (size_t q = 0; q < n; q++) {
            load_floats(out + q * ldo, p.c, p.d_type, (j + q) * p.ldc + i, m);
        }
    }
    if (without_product(p)) {
        for (size_t q = 0; q < n; q++) {
            for (size_t r = 0; r < m; r++) {
                out[q * ldo + r] = p.beta == 0.0f ? 0.0f : p.beta * out[q * ldo + r];
            }
        }
    } else {
        const float* a = (const float*)p.a + (p.transa ? i * p.lda : i);
        const float* b = (const float*)p.b + (p.transb ? j : j * p.ldb);
        sgemm_thread(p.transa, p.transb, m, n, p.k, p.alpha, a, p.lda, b, p.ldb, p.beta, out, ldo);
    }
    if (p.bias != NULL) {
        for (size_t q = 0; q < n; q++) {
            for (size_t r = 0; r < m; r++) {
                out[q * ldo + r] += p.bias_type == FLOAT32
                                        ? ((const float*)p.bias)[i + r]
                                        : bf16_widen(((const uint16_t*)p.bias)[i + r]);
            }
        }
    }
    if (!direct) {
        for (size_t q = 0; q < n; q++) {
            uint16_t* d = (uint16_t*)p.d + (j + q) * p.ldd + i;
            for (size_t r = 0; r < m; r++) { d[r] = bf16_round(out[q * ldo + r]); }
        }
    }
}

// The tiles of an (m, n) output with inner dimension k, a function of these alone: rows x cols of
// them.
struct Grid { size_t tile_m, tile_n, rows, cols; };

inline Grid gemm_grid(size_t m, size_t n, size_t k) {
    // Every tile packs its part of A and B again, which is why tiles are few. Of the ways to cut
    // into `tiles`, the one that packs least; of the numbers of tiles, the largest that packs
    // little beside the arithmetic: one element packed again for every 100 multiplications costs a
    // tenth of the time. Up to four tiles are worth that price in any case.
    const size_t MAX_TILES = 32, MIN_WORK = 1 << 21, UNIT_M = 48, UNIT_N = 8;
    size_t units_m = (m + UNIT_M - 1) / UNIT_M, units_n = (n + UNIT_N - 1) / UNIT_N;
    double outputs = (double)m * (double)n;
    for (size_t tiles = MAX_TILES; tiles > 1; tiles /= 2) {
        if (outputs * (double)k < (double)(tiles * MIN_WORK)) { continue; }
        size_t best_rows = 0;
        double least = 0.0;
        for (size_t rows = 1; rows <= tiles; rows *= 2) {
            size_t cols = tiles / rows;
            double packed_again = (double)(cols - 1) * (double)m + (double)(rows - 1) * (double)n;
            if (rows <= units_m && cols <= units_n && (best_rows == 0 || packed_again < least)) {
                best_rows = rows;
                least = packed_again;
            }
        }
        if (best_rows > 0 && (tiles <= 4 || least <= 0.005 * outputs)) {
            size_t tile_m = (units_m + best_rows - 1) / best_rows * UNIT_M;
            size_t tile_n = (units_n + tiles / best_rows - 1) / (tiles / best_rows) * UNIT_N;
            return Grid{tile_m, tile_n, (m + tile_m - 1) / tile_m, (n + tile_n - 1) / tile_n};
        }
    }
    return Grid{m, n, 1, 1};
}

// p with a and b in float: as they are, or copies in this thread's scratch
inline Gemm with_float_operands(Gemm p) {
    if (without_product(p)) { return p; }
    p.a = as_floats(SCRATCH_A, p.a, p.a_type, p.transa ? p.k : p.m, p.transa ? p.m : p.k, &p.lda);
    p.b = as_floats(SCRATCH_B, p.b, p.b_type, p.transb ? p.n : p.k, p.transb ? p.k : p.n, &p.ldb);
    p.a_type = p.b_type = FLOAT32;
    return p;
}

// problem(i) returns the i-th of batch products; all have the same m, n, k.
template <class F> void gemm(size_t batch, F problem) {
    if (batch == 0) { return; }
    Gemm first = problem((size_t)0);
    if (first.m == 0 || first.n == 0) { return; }
    Grid grid = gemm_grid(first.m, first.n, first.k);
    if (grid.rows * grid.cols == 1) {
        // one tile each: a task takes several of the small ones, so that it is worth its start
        size_t per_task = 1 + 1000000 / (first.m * first.n * (first.k + 1));
        parallel_for((batch + per_task - 1) / per_task, [=](size_t task) {
            for (size_t i = task * per_task; i < std::min(batch, (task + 1) * per_task); i++) {
                Gemm p = with_float_operands(problem(i));
                gemm_tile(p, 0, 0, p.m, p.n);
            }
        });
        return;
    }
    for (size_t i = 0; i < batch; i++) {
        Gemm p = with_float_operands(problem(i));
        parallel_for(grid.rows * grid.cols, [=](size_t tile) {
            size_t row = tile % grid.rows * grid.tile_m, col = tile / grid.rows * grid.tile_n;
            gemm_tile(p, row, col, std::min(p.m - row, grid.tile_m),
                      std::min(p.n - col, grid.tile_n));
        });
    }
}

// out[i] = sum over j of x[i + j*ld], x (rows, cols): summed in double
inline void row_sums(void* out, MatrixType out_type, const void* x, MatrixType type, size_t rows,
                     size_t cols, size_t ld) {
    const size_t ROWS = 64;
    parallel_for((rows + ROWS - 1) / ROWS, [=](size_t task) {
        size_t first = task * ROWS, count = std::min(rows - first, ROWS);
        float column[ROWS];
        double sum[ROWS] = {};
        for (size_t j = 0; j < cols; j++) {
            load_floats(column, x, type, j * ld + first, count);
            for (size_t i = 0; i < count; i++) { sum[i] += column[i]; }
        }
        for (size_t i = 0; i < count; i++) {
            if (out_type == FLOAT32) {
                ((float*)out)[first + i] = (float)sum[i];
            } else {
                ((uint16_t*)out)[first + i] = bf16_round((float)sum[i]);
            }
        }
    });
}

}  // namespace cpu
