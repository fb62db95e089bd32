/*
Warp matrix products on the CPU: nvcuda::wmma, 16x16x16 tiles of __nv_bfloat16, float accumulators.

A tile is spread over the lanes of a warp. Which lane holds what is unspecified in CUDA; here lane l
holds the elements [8*l, 8*l + 8) of the row-major tile. As on a GPU, all 32 lanes must take part in
a load, store or product, and addresses and leading dimensions must be aligned; where a GPU would be
wrong in silence, the program ends.
*/
#pragma once

#include <stdint.h>

#include "cuda_bf16.h"
#include "engine.h"

namespace nvcuda {
namespace wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };

constexpr int TILE = 16;

template <class Use, int M, int N, int K, class T, class Layout = void> struct fragment {
    static_assert(M == TILE && N == TILE && K == TILE, "the CPU device has 16x16x16 tiles only");
    static_assert(std::is_same_v<T, float> == std::is_same_v<Use, accumulator> &&
                      (std::is_same_v<T, float> || std::is_same_v<T, __nv_bfloat16>),
                  "the CPU device multiplies __nv_bfloat16 and accumulates float");
    static constexpr int num_elements = TILE * TILE / 32;
    T x[num_elements];
};

typedef fragment<accumulator, TILE, TILE, TILE, float> Accumulator;
template <class Layout>
using FragmentA = fragment<matrix_a, TILE, TILE, TILE, __nv_bfloat16, Layout>;
template <class Layout>
using FragmentB = fragment<matrix_b, TILE, TILE, TILE, __nv_bfloat16, Layout>;

// where element i of this lane's share lies in a matrix with leading dimension ld
inline size_t element_offset(int i, unsigned ld, bool row) {
    size_t e = cpu::current_lane() * Accumulator::num_elements + i;
    return row ? e / TILE * ld + e % TILE : e % TILE * ld + e / TILE;
}

inline void require_whole_warp(uint32_t lanes) {
    if (lanes != 0xffffffff) {
        cpu::die(
            "wmma: found the lanes %08x of a warp, expected all 32; call it with whole warps, "
            "before any lane returns",
            lanes);
    }
}

// All lanes wait for each other and are counted.
inline void meet_whole_warp() {
    cpu::collective(0xffffffff, cpu::Value{}, 0,
                    [](cpu::Warp*, uint32_t lanes) { require_whole_warp(lanes); });
}

template <class T> void check_tile(const T* p, unsigned ld) {
    if ((uintptr_t)p % 32 != 0 || ld % (16 / sizeof(T)) != 0) {
        cpu::die(
            "wmma: found address %p with leading dimension %u, expected a multiple of 32 bytes and "
            "of %zu elements; pad the matrix",
            (const void*)p, ld, 16 / sizeof(T));
    }
}

template <class F, class V> inline void fill_fragment(F& f, const V& value) {
    for (int i = 0; i < F::num_elements; i++) { f.x[i] = value; }
}

template <class Use, class Layout>
inline void load_matrix_sync(fragment<Use, TILE, TILE, TILE, __nv_bfloat16, Layout>& f,
                             const __nv_bfloat16* p, unsigned ld) {
    check_tile(p, ld);
    meet_whole_warp();
    for (int i = 0; i < f.num_elements; i++) {
        f.x[i] = p[element_offset(i, ld, std::is_same_v<Layout, row_major>)];
    }
}

inline void load_matrix_sync(Accumulator& f, const float* p, unsigned ld, layout_t layout) {
    check_tile(p, ld);
    meet_whole_warp();
    for (int i = 0; i < f.num_elements; i++) {
        f.x[i] = p[element_offset(i, ld, layout == mem_row_major)];
    }
}

inline void store_matrix_sync(float* p, const Accumulator& f, unsigned ld, layout_t layout) {
    check_tile(p, ld);
    meet_whole_warp();
    for (int i = 0; i < f.num_elements; i++) {
        p[element_offset(i, ld, layout == mem_row_major)] = f.x[i];
    }
}

// a lane's shares of the four tiles of a product
struct Shares {
    float* d;
    const __nv_bfloat16 *a, *b;
    const float* c;
};

// D = A @ B + C for the whole warp. A product of two bf16 is exact in float; sums go over k in
// order.
inline void multiply_tiles(cpu::Warp* warp, uint32_t lanes) {
    require_whole_warp(lanes);
    float a[TILE * TILE], b[TILE * TILE], d[TILE * TILE];
    const int n = Accumulator::num_elements;
    for (int lane = 0; lane < 32; lane++) {
        const Shares* s = cpu::from_value<const Shares*>(warp->in[lane]);
        for (int i = 0; i < n; i++) {
            a[lane * n + i] = __bfloat162float(s->a[i]);
            b[lane * n + i] = __bfloat162float(s->b[i]);
            d[lane * n + i] = s->c[i];
        }
    }
    for (int i = 0; i < TILE; i++) {
        for (int k = 0; k < TILE; k++) {
            for (int j = 0; j < TILE; j++) { d[i * TILE + j] += a[i * TILE + k] * b[k * TILE + j]; }
        }
    }
    for (int lane = 0; lane < 32; lane++) {
        memcpy(cpu::from_value<const Shares*>(warp->in[lane])->d, d + lane * n, n * sizeof(float));
    }
}

template <class LayoutA, class LayoutB>
inline void mma_sync(Accumulator& d, const FragmentA<LayoutA>& a, const FragmentB<LayoutB>& b,
                     const Accumulator& c) {
    const Shares shares = {d.x, a.x, b.x, c.x};
    cpu::collective(0xffffffff, cpu::to_value(&shares), 0, multiply_tiles);
}

}  // namespace wmma
}  // namespace nvcuda
