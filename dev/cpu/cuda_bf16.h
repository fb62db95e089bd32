/*
bfloat16: the upper half of a float. Conversion from float rounds to nearest, ties to even, and
keeps NaN, as on a GPU. Arithmetic is done in float and rounded once.
*/
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda_runtime.h"

struct __nv_bfloat16_raw { unsigned short x; };

namespace cpu {

inline float bf16_widen(unsigned short bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

// without branches, so that loops over it vectorise: to add half of the last place kept, less one
// where it is even, rounds to even
inline unsigned short bf16_round(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return (unsigned short)(is_nan ? 0x7FFFu : rounded); // CUDA's NaN
}

} // namespace cpu

struct __nv_bfloat16 {
    unsigned short bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : bits(cpu::bf16_round(x)) {}
    __nv_bfloat16(double x) : bits(cpu::bf16_round((float)x)) {}
    __nv_bfloat16(int x) : bits(cpu::bf16_round((float)x)) {}
    __nv_bfloat16(unsigned x) : bits(cpu::bf16_round((float)x)) {}
    __nv_bfloat16(const __nv_bfloat16_raw& raw) : bits(raw.x) {}
    operator float() const { return cpu::bf16_widen(bits); }
    operator __nv_bfloat16_raw() const { return __nv_bfloat16_raw{bits}; }
    __nv_bfloat16& operator+=(const __nv_bfloat16& y) {
        return *this = __nv_bfloat16((float)*this + (float)y);
    }
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

namespace cpu {
template <> constexpr bool can_shuffle<__nv_bfloat16> = true;
template <> constexpr bool can_shuffle<__nv_bfloat162> = true;
}

typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

static inline float __bfloat162float(__nv_bfloat16 x) { return (float)x; }
static inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
static inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
static inline short __bfloat16_as_short(__nv_bfloat16 x) { return (short)x.bits; }
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) {
    return __nv_bfloat16_raw{bits};
}
static inline __nv_bfloat16 __short_as_bfloat16(short bits) {
    return __nv_bfloat16_raw{(unsigned short)bits};
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return __nv_bfloat162{x, y};
}
static inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __nv_bfloat162{v.x, v.y}; }
static inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __nv_bfloat162{x, x}; }
static inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return __nv_bfloat162{x, y};
}
static inline float2 __bfloat1622float2(__nv_bfloat162 v) { return float2{(float)v.x, (float)v.y}; }
static inline float __low2float(__nv_bfloat162 v) { return (float)v.x; }
static inline float __high2float(__nv_bfloat162 v) { return (float)v.y; }
