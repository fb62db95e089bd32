/*
expf, logf, tanhf and erff for kernels: straight-line code that the compiler vectorises inside the
loop over threads, where a call of the C library takes 20 times as long. The same bits come out
vectorised or not, so that a kernel gives the same result under every schedule: multiply-adds are
explicit, and the program is compiled with -ffp-contract=off.

Errors over all floats, against the double functions (dev/test/test_cpu_device.cu measures them):
expf, logf 1.1 ulp, tanhf, erff 1.4. NaN, infinities, denormals and overflow come out as from the C
library. The polynomials are minimax fits, made with Lawson's iteration and refitted after the
rounding of each coefficient.
*/
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <cmath>

#define CPU_MATH static inline __attribute__((always_inline))

namespace cpu {

CPU_MATH uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
CPU_MATH float bits_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// a * b + c: fused where the processor does that (there fmaf is one instruction), else rounded
// twice; never by the compiler's choice
CPU_MATH float mul_add(float a, float b, float c) {
#if defined(__FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// 1.5 * 2^23: adding it rounds a float below 2^22 to an integer, which then stands in its low bits
constexpr float ROUNDER = 12582912.0f;

// e^x = 2^n * e^r with n = round(x / ln 2) and |r| <= ln 2 / 2: gives e^r and, in the low bits of
// *n, n
CPU_MATH float exp_reduced(float x, uint32_t* n) {
    const float shifted = mul_add(x, 1.44269504f, ROUNDER);
    const float whole = shifted - ROUNDER;
    *n = float_bits(shifted) - float_bits(ROUNDER);
    // the product with the high part is exact
    const float ln2_high = 0.693145751953125f, ln2_low = 1.42860677e-06f;
    const float r = mul_add(-whole, ln2_low, mul_add(-whole, ln2_high, x));
    float p = 0.00138207618f;
    p = mul_add(p, r, 0.00836924836f);
    p = mul_add(p, r, 0.041668281f);
    p = mul_add(p, r, 0.166665167f);
    p = mul_add(p, r, 0.49999994f);
    return mul_add(p, r * r, r) + 1.0f;
}

// for |x| <= 80: no overflow, no denormal
CPU_MATH float exp_small(float x) {
    uint32_t n;
    const float p = exp_reduced(x, &n);
    return bits_float(float_bits(p) + (n << 23));
}

CPU_MATH float exp_float(float x) {
    float c = x > 89.0f ? 89.0f : x; // a NaN passes both comparisons
    c = c < -104.0f ? -104.0f : c;
    uint32_t n;
    const float p = exp_reduced(c, &n);
    // 2^n in two factors: n reaches from -150 (denormals, rounded by the last product) to 128
    // (overflow)
    const uint32_t half = (uint32_t)((int32_t)n >> 1);
    const float y = p * bits_float((half + 127u) << 23) * bits_float((n - half + 127u) << 23);
    return x != x ? x : y; // which of two NaN a sum keeps is the compiler's choice
}

// x = m * 2^e with m in [sqrt(1/2), sqrt(2)); log m by fdlibm's series in s = (m - 1) / (m + 1)
CPU_MATH float log_float(float x) {
    const bool denormal = x < 1.17549435e-38f;
    const uint32_t bits = float_bits(denormal ? x * 8388608.0f : x) + (0x3F800000u - 0x3F3504F3u);
    const float e = (float)((int32_t)(bits >> 23) - (denormal ? 127 + 23 : 127));
    const float f = bits_float((bits & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
    const float s = f / (2.0f + f), z = s * s, w = z * z, half = 0.5f * f * f;
    const float odd = w * mul_add(w, 0.24279078841f, 0.40000972152f);
    const float even = z * mul_add(w, 0.28498786688f, 0.66666662693f);
    // the product with the high part is exact
    const float ln2_high = 0.69313812256f, ln2_low = 9.0580006145e-06f;
    const float y = mul_add(e, ln2_high, f - (half - mul_add(s, half + (odd + even), e * ln2_low)));
    // infinity and NaN are themselves
    const float special = x == 0.0f ? -INFINITY : x < 0.0f ? NAN : x;
    return x > 0.0f && x < INFINITY ? y : special;
}

// x + x^3 p(x^2) near zero, else 1 - 2 / (e^2|x| + 1)
CPU_MATH float tanh_float(float x) {
    const float a = fabsf(x), z = x * x;
    float p = -0.00569802988f;
    p = mul_add(p, z, 0.020632321f);
    p = mul_add(p, z, -0.0537374355f);
    p = mul_add(p, z, 0.133314118f);
    p = mul_add(p, z, -0.333332807f);
    const float near_zero = mul_add(p * z, a, a);
    const float c = a > 10.0f ? 10.0f : a;
    const float far = 1.0f - 2.0f / (exp_small(2.0f * c) + 1.0f);
    return copysignf(a >= 0.625f ? far : near_zero, x); // a NaN is near zero
}

// x + x p(x^2) near zero, else 1 - e^-q(|x|), where q is a polynomial for -log(erfc)
CPU_MATH float erf_float(float x) {
    const float a = fabsf(x), z = x * x;
    float p = -0.000595957856f;
    p = mul_add(p, z, 0.00498735206f);
    p = mul_add(p, z, -0.0267629661f);
    p = mul_add(p, z, 0.11281731f);
    p = mul_add(p, z, -0.376124889f);
    p = mul_add(p, z, 0.128379151f);
    const float near_zero = mul_add(p, a, a);
    const float c = a > 4.0f ? 4.0f : a;
    float q = -0.000195948465f;
    q = mul_add(q, c, 0.00304331444f);
    q = mul_add(q, c, -0.0222272538f);
    q = mul_add(q, c, 0.10393218f);
    q = mul_add(q, c, 0.637181699f);
    q = mul_add(q, c, 1.12767589f);
    q = mul_add(q, c, 0.000195624074f);
    const float far = 1.0f - exp_small(-q);
    return copysignf(a >= 0.925f ? far : near_zero, x);
}

// as the C library's: of a number and a NaN the number
CPU_MATH float max_float(float a, float b) { return a > b || b != b ? a : b; }
CPU_MATH float min_float(float a, float b) { return a < b || b != b ? a : b; }

} // namespace cpu

#define fmaxf(a, b) ::cpu::max_float(a, b)
#define fminf(a, b) ::cpu::min_float(a, b)
#define expf(x) ::cpu::exp_float(x)
#define logf(x) ::cpu::log_float(x)
#define tanhf(x) ::cpu::tanh_float(x)
#define erff(x) ::cpu::erf_float(x)
