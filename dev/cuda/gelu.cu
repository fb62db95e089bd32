/*
GELU, the exact one, alone and together with its neighbours: the bias before it and the bias' gradient behind its backward.

gelu forward    version 1: the trainer's, after a product whose epilogue adds the bias. Beside the product's own write of fch it reads
                           n values and writes n
                version 2: the product without bias; one kernel adds it and writes both fch and gelu(fch): it reads n and writes 2n.
                           So it moves n values more than version 1 with the epilogue, and n fewer than bias_add_kernel and
                           gelu_forward, which is what the trainer does where C or OC is no multiple of 8. It wins only where the
                           epilogue costs the product more than a write of fch. In bf16 fch is rounded once more, before the bias
gelu backward   version 1: the trainer's gelu_backward, then column_sum: reads 3n values and writes n
                version 2: one kernel for both: the column sums come from what it holds in registers. Reads 2n, writes n
                version 3: version 1 with Phi from the exponential that the density needs anyway. Of version 1 nvcc makes some 45
                           instructions an element in bf16 for sm_90, of this one 34. While an H200 moves the 6 bytes of an element
                           it can issue about 40. (Forward this saves nothing: 31 instructions either way)

n = rows * OC. Timed with and without the product, for the product's epilogue is part of the choice.

    make build/cpu-fp32/dev/cuda/gelu && build/cpu-fp32/dev/cuda/gelu
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/gelu.cu -o gelu -lcublas -lcublasLt && ./gelu -time
*/
#include "common.cuh"

#ifdef ENABLE_FP32
#define TOLERANCE 2e-5
#else
#define TOLERANCE 1e-2
#endif

// ----------------------------------------------------------------------------
// reference

// fch = product + bias, out = fch * Phi(fch)
static void bias_gelu_reference(double* fch, double* out, const floatX* product, const floatX* bias, size_t rows, size_t OC) {
    for (size_t i = 0; i < rows * OC; i++) {
        fch[i] = (double)(float)product[i] + (float)bias[i % OC];
        out[i] = 0.5 * fch[i] * (1.0 + erf(fch[i] * M_SQRT1_2));
    }
}

// dfch = dout * (Phi(fch) + fch * phi(fch)), dbias += dfch summed over rows
static void gelu_backward_reference(double* dfch, double* dbias, const floatX* dout, const floatX* fch, size_t rows, size_t OC) {
    for (size_t i = 0; i < rows * OC; i++) {
        const double x = (float)fch[i];
        dfch[i] = (float)dout[i] * (0.5 * (1.0 + erf(x * M_SQRT1_2)) + x * exp(-0.5 * x * x) / sqrt(2.0 * M_PI));
        dbias[i % OC] += dfch[i];
    }
}

// ----------------------------------------------------------------------------
// forward, version 2

// fch += bias; out = gelu(fch). fch, out (rows, OC), fewer than 2^32 packs; bias (OC). V elements a thread.
// GELU is taken of fch as stored: from the same fch, out has the bits that gelu_forward gives, and so has a recomputed one
template <int V> __global__ void bias_gelu_forward_kernel2(floatX* out, floatX* fch, const floatX* bias, unsigned packs, unsigned packs_per_row) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < packs) {
        float x[V], b[V];
        load<V>(x, fch + (size_t)i * V);
        load<V>(b, bias + i % packs_per_row * V);
        for (int j = 0; j < V; j++) { x[j] = (float)(floatX)(x[j] + b[j]); }
        store<V>(fch + (size_t)i * V, x);
        for (int j = 0; j < V; j++) { x[j] = 0.5f * x[j] * (1.0f + erff(x[j] * 0.70710678f)); }
        store<V>(out + (size_t)i * V, x);
    }
}

static void bias_gelu_forward2(floatX* out, floatX* fch, const floatX* bias, size_t rows, size_t OC) {
    const bool vector = vectorizable(OC, out, fch, bias);
    const size_t packs = rows * OC / (vector ? VEC : 1);
    assert(packs <= UINT32_MAX - 256);
    const unsigned blocks = (unsigned)CEIL_DIV(packs, (size_t)256);
    if (vector) {
        bias_gelu_forward_kernel2<VEC><<<blocks, 256, 0, main_stream>>>(out, fch, bias, (unsigned)packs, (unsigned)(OC / VEC));
    } else {
        bias_gelu_forward_kernel2<1><<<blocks, 256, 0, main_stream>>>(out, fch, bias, (unsigned)packs, (unsigned)OC);
    }
    kernelCheck();
}

// ----------------------------------------------------------------------------
// backward, version 2

#define GELU_WARPS 8 // a block has so many, each with rows of its own
#define GELU_ROWS 64 // that a block handles: as many as a slab, so that the trainer's scratch is enough

// dinp = dinp * (Phi(inp) + inp * phi(inp)), in place; partial[slab, c] = sum of dinp over the slab's rows, before bf16 rounds it.
// dinp, inp (rows, OC), partial (slabs, OC). One block for 32 * V columns (blockIdx.y) of 64 rows (blockIdx.x): a lane has V columns, warp w
// rows w, w + 8, ...; then the sums of the warps are added in their order
template <int V> __global__ void __launch_bounds__(32 * GELU_WARPS) gelu_backward_kernel2(floatX* dinp, float* partial, const floatX* inp,
                                                                                           size_t rows, int OC) {
    __shared__ __align__(16) float sums[GELU_WARPS][32 * V];
    const int warp = threadIdx.x / 32, begin = (int)blockIdx.y * 32 * V, column = begin + (int)threadIdx.x % 32 * V;
    const size_t end = min(((size_t)blockIdx.x + 1) * GELU_ROWS, rows);
    float sum[V] = {0};
    if (column < OC) {
        for (size_t r = (size_t)blockIdx.x * GELU_ROWS + warp; r < end; r += GELU_WARPS) {
            float x[V], d[V];
            load<V>(x, inp + r * OC + column);
            load<V>(d, dinp + r * OC + column);
            for (int j = 0; j < V; j++) {
                d[j] *= 0.5f * (1.0f + erff(x[j] * 0.70710678f)) + x[j] * 0.39894228f * expf(-0.5f * x[j] * x[j]);
                sum[j] += d[j];
            }
            store<V>(dinp + r * OC + column, d);
        }
    }
    store<V>(&sums[warp][threadIdx.x % 32 * V], sum);
    __syncthreads();
    for (int c = threadIdx.x; c < 32 * V && begin + c < OC; c += blockDim.x) {
        float total_sum = 0.0f;
        for (int w = 0; w < GELU_WARPS; w++) { total_sum += sums[w][c]; }
        partial[(size_t)blockIdx.x * OC + begin + c] = total_sum;
    }
}

// dbias[c] += sum over slabs of partial[slab, c]. A block of 1,024 threads sums 32 columns: thread (y, x) every 32nd partial sum of column x,
// then the first warp those of all y: a chain of slabs/32 + 32 additions, where the trainer's column_sum_finish_kernel has one of slabs
__global__ void gelu_finish_kernel2(float* dbias, const float* partial, size_t slabs, int OC) {
    __shared__ float sums[32][32];
    const int x = threadIdx.x % 32, y = threadIdx.x / 32, c = (int)blockIdx.x * 32 + x;
    float sum = 0.0f;
    if (c < OC) {
        for (size_t s = y; s < slabs; s += 32) { sum += partial[s * OC + c]; }
    }
    sums[y][x] = sum;
    __syncthreads();
    if (y == 0 && c < OC) {
        for (int k = 1; k < 32; k++) { sum += sums[k][x]; }
        dbias[c] += sum;
    }
}

// partial holds column_sum_scratch(rows, OC) floats
static void gelu_backward2(floatX* dinp, float* dbias, float* partial, const floatX* inp, size_t rows, size_t OC) {
    static_assert(GELU_ROWS == SLAB_ROWS, "column_sum_scratch counts slabs");
    const size_t slabs = CEIL_DIV(rows, (size_t)GELU_ROWS);
    if (vectorizable(OC, dinp, inp)) {
        gelu_backward_kernel2<VEC><<<dim3(slabs, CEIL_DIV(OC, (size_t)(32 * VEC))), 32 * GELU_WARPS, 0, main_stream>>>(dinp, partial, inp, rows, (int)OC);
    } else {
        gelu_backward_kernel2<1><<<dim3(slabs, CEIL_DIV(OC, (size_t)32)), 32 * GELU_WARPS, 0, main_stream>>>(dinp, partial, inp, rows, (int)OC);
    }
    gelu_finish_kernel2<<<CEIL_DIV(OC, (size_t)32), 1024, 0, main_stream>>>(dbias, partial, slabs, (int)OC);
    kernelCheck();
}

// ----------------------------------------------------------------------------
// backward, version 3

// As gelu_backward_kernel, with erfc by formula 7.1.26 of Abramowitz and Stegun, a polynomial times exp(-x^2/2): Phi errs by at most
// 7.5e-8. 1/y is rsqrt(y^2), for a division must be rounded correctly
template <int V> __global__ void gelu_backward_kernel3(floatX* dinp, const floatX* inp, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        float x[V], d[V];
        load<V>(x, inp + i);
        load<V>(d, dinp + i);
        for (int j = 0; j < V; j++) {
            const float y = 1.0f + 0.23164189f * fabsf(x[j]), t = rsqrtf(y * y), e = expf(-0.5f * x[j] * x[j]);
            const float tail = e * (t * (0.127414796f + t * (-0.142248368f + t * (0.710706871f + t * (-0.726576014f + t * 0.530702715f)))));
            d[j] *= (x[j] < 0.0f ? tail : 1.0f - tail) + x[j] * 0.39894228f * e;
        }
        store<V>(dinp + i, d);
    }
}

static void gelu_backward3(floatX* dinp, const floatX* inp, size_t n) {
    if (vectorizable(n, dinp, inp)) {
        gelu_backward_kernel3<VEC><<<CEIL_DIV(n / VEC, (size_t)256), 256, 0, main_stream>>>(dinp, inp, n);
    } else {
        gelu_backward_kernel3<1><<<CEIL_DIV(n, (size_t)256), 256, 0, main_stream>>>(dinp, inp, n);
    }
    kernelCheck();
}

// ----------------------------------------------------------------------------
// checks

// as the trainer does where the epilogue cannot add the bias, and version 2
static void forward(int version, floatX* out, floatX* fch, const floatX* bias, size_t rows, size_t OC) {
    if (version == 1) {
        bias_add_kernel<<<CEIL_DIV(rows * OC, (size_t)256), 256, 0, main_stream>>>(fch, bias, rows * OC, (int)OC);
        kernelCheck();
        gelu_forward(out, fch, rows * OC);
    } else {
        bias_gelu_forward2(out, fch, bias, rows, OC);
    }
}

static void backward(int version, floatX* dinp, float* dbias, float* partial, const floatX* inp, size_t rows, size_t OC) {
    if (version == 1) {
        gelu_backward(dinp, inp, rows * OC);
        column_sum(dbias, dinp, partial, rows, OC);
    } else if (version == 3) {
        gelu_backward3(dinp, inp, rows * OC);
        column_sum(dbias, dinp, partial, rows, OC);
    } else {
        gelu_backward2(dinp, dbias, partial, inp, rows, OC);
    }
}

static void test_forward(size_t rows, size_t OC) {
    const size_t n = rows * OC;
    Array<floatX> bias = array_normal<floatX>(OC, 2, 1.0), first_fch = {}, first_out = {};
    double *fch_expected = (double*)calloc(n, sizeof(double)), *expected = (double*)calloc(n, sizeof(double));
    for (int version = 1; version <= 2; version++) {
        Array<floatX> fch = array_normal<floatX>(n, 1, 2.0), out = array_new<floatX>(n);
        bias_gelu_reference(fch_expected, expected, fch.host, bias.host, rows, OC);
        forward(version, out.device, fch.device, bias.device, rows, OC);
        check_close(fch, fch_expected, TOLERANCE, "forward version %d, %zu x %zu: fch", version, rows, OC);
        check_close(out, expected, TOLERANCE, "forward version %d, %zu x %zu: out", version, rows, OC);
        if (version == 1) {
            first_fch = fch;
            first_out = out;
        } else {
            check_bits(fch, first_fch.host, "fch, as version 1's");
            check_bits(out, first_out.host, "out, as version 1's");
            array_free(fch); array_free(out);
        }
    }
    array_free(bias); array_free(first_fch); array_free(first_out);
    free(fch_expected); free(expected);
}

static void test_backward(size_t rows, size_t OC) {
    const size_t n = rows * OC;
    Array<floatX> inp = array_normal<floatX>(n, 1, 2.0), first = {};
    double *expected = (double*)calloc(n, sizeof(double)), *dbias_expected = (double*)calloc(OC, sizeof(double));
    for (int version = 1; version <= 3; version++) {
        Array<float> first_dbias = {};
        for (int run = 0; run < 2; run++) {
            Array<floatX> dinp = array_normal<floatX>(n, 3, 1.0);
            Array<float> dbias = array_normal<float>(OC, 4, 1.0), partial = array_new<float>(column_sum_scratch(rows, OC));
            for (size_t c = 0; c < OC; c++) { dbias_expected[c] = dbias.host[c]; }
            gelu_backward_reference(expected, dbias_expected, dinp.host, inp.host, rows, OC);
            backward(version, dinp.device, dbias.device, partial.device, inp.device, rows, OC);
            check_close(dinp, expected, TOLERANCE, "backward version %d, %zu x %zu: dinp", version, rows, OC);
            // version 2 sums in fp32 what version 1 sums after it was rounded
            check_close(dbias, dbias_expected, version == 2 ? 2e-5 : TOLERANCE, "backward version %d, %zu x %zu: dbias", version, rows, OC);
            if (version == 2) { check_bits(dinp, first.host, "dinp, as version 1's"); }
            if (run == 1) { check_bits(dbias, first_dbias.host, "dbias, a second time"); }
            array_free(partial);
            if (version == 1 && run == 0) { first = dinp; } else { array_free(dinp); }
            if (run == 0) { first_dbias = dbias; } else { array_free(dbias); }
        }
        array_free(first_dbias);
    }
    array_free(inp); array_free(first);
    free(expected); free(dbias_expected);
}

// backward version 3 in the tails, where its two halves meet, at -0 and NaN
static void test_tails(void) {
    const size_t n = 4096;
    Array<floatX> inp = array_new<floatX>(n), dinp = array_new<floatX>(n);
    for (size_t i = 0; i < n; i++) {
        inp.host[i] = (floatX)((float)i / 128.0f - 16.0f);
        dinp.host[i] = (floatX)1.0f;
    }
    inp.host[n - 2] = (floatX)-0.0f;
    inp.host[n - 1] = (floatX)NAN;
    to_device(inp);
    to_device(dinp);
    gelu_backward3(dinp.device, inp.device, n);
    to_host(dinp);
    size_t wrong = 0;
    for (size_t i = 0; i < n - 2; i++) {
        const double x = (float)inp.host[i], slope = 0.5 * erfc(-x * M_SQRT1_2) + x * exp(-0.5 * x * x) / sqrt(2.0 * M_PI);
        const double rounding = sizeof(floatX) == 2 ? fabs(slope) / 256 : 0.0; // of a bf16
        wrong += !(fabs((float)dinp.host[i] - slope) <= 4e-7 + rounding);
    }
    check(wrong == 0, "backward version 3 from -16 to 16: %zu of %zu wrong", wrong, n - 2);
    check((float)dinp.host[n - 2] == 0.5f, "backward version 3 at -0 is %g", (float)dinp.host[n - 2]);
    check(isnan((float)dinp.host[n - 1]), "backward version 3 at NaN is %g", (float)dinp.host[n - 1]);
    array_free(inp); array_free(dinp);
}

int main(int argc, char** argv) {
    bench_open(argc, argv);
    // rows that fill no block and no warp's turn, columns that fill no pack, no block of 256, one and several of them
    const size_t shapes[][2] = {{1, 1}, {7, 3}, {65, 33}, {130, 42}, {1, 8}, {9, 40}, {63, 248}, {64, 256}, {131, 264}, {70, 768}, {3, 1536}, {2100, 8}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        test_forward(shapes[i][0], shapes[i][1]);
        test_backward(shapes[i][0], shapes[i][1]);
    }
    test_tails();
    time_header();
    if (timing) {
        const size_t C = 384, OC = 4 * C, rows = 64 * 197, n = rows * OC;
        const char* const shape = "DeiT-S 64x197 x 1536";
        cudaCheck(cudaMalloc(&cublas_workspace, CUBLAS_WORKSPACE));
        Array<floatX> ln2 = array_normal<floatX>(rows * C, 1, 1.0), weight = array_normal<floatX>(OC * C, 2, 0.05), bias = array_normal<floatX>(OC, 3, 0.1);
        Array<floatX> fch = array_normal<floatX>(n, 4, 1.0), out = array_new<floatX>(n), dinp = array_normal<floatX>(n, 5, 0.1);
        Array<float> dbias = array_normal<float>(OC, 6, 1.0), partial = array_new<float>(column_sum_scratch(rows, OC));
        const double pass = (double)n * sizeof(floatX), operations = 2.0 * n * C, product = (rows * C + OC * C) * sizeof(floatX) + pass;
        time_kernel("gelu_forward", 1, shape, 2 * pass, 0.0, [&] { gelu_forward(out.device, fch.device, n); });
        time_kernel("gelu_forward + bias", 2, shape, 3 * pass, 0.0, [&] { forward(2, out.device, fch.device, bias.device, rows, OC); });
        time_kernel("fc1 + bias, gelu", 1, shape, product + 2 * pass, operations, [&] {
            linear_forward(fch.device, ln2.device, weight.device, bias.device, NULL, rows, C, OC);
            gelu_forward(out.device, fch.device, n);
        });
        time_kernel("fc1, bias + gelu", 2, shape, product + 3 * pass, operations, [&] {
            matmul(fch.device, weight.device, ln2.device, NULL, NULL, OC, rows, C, true, false, false);
            forward(2, out.device, fch.device, bias.device, rows, OC);
        });
        time_kernel("gelu_backward alone", 1, shape, 3 * pass, 0.0, [&] { gelu_backward(dinp.device, fch.device, n); });
        time_kernel("gelu_backward alone", 3, shape, 3 * pass, 0.0, [&] { gelu_backward3(dinp.device, fch.device, n); });
        time_kernel("gelu_backward, column sum", 1, shape, 4 * pass, 0.0,
                    [&] { backward(1, dinp.device, dbias.device, partial.device, fch.device, rows, OC); });
        time_kernel("gelu_backward + column sum", 2, shape, 3 * pass, 0.0,
                    [&] { backward(2, dinp.device, dbias.device, partial.device, fch.device, rows, OC); });
        array_free(ln2); array_free(weight); array_free(bias); array_free(fch); array_free(out); array_free(dinp); array_free(dbias); array_free(partial);
        cudaCheck(cudaFree(cublas_workspace));
    }
    return bench_close();
}
