/*
LayerNorm forward and backward, rows of up to 1,024 channels: a row fits into the registers of the lanes that share it.

forward   version 1: the trainer's. 2, 4 or 8 lanes a row that read it three times, from cache after the first
          version 2: a warp a row, which is read once, into registers; all of its loads are under way at once
          version 3: the same with 16 lanes a row: with C 384 in bf16 a row is 48 packs of 16 bytes, three for each of 16 lanes, where
                     a warp has two and leaves a quarter of its lanes idle. Up to 512 channels
backward  version 1: the trainer's. One kernel for dinp, one that sums slabs of rows for dweight and dbias, two that finish the sums:
                     dout and inp are read from memory twice
          version 2: one kernel for all, as llm.c's: a lane keeps the sums of its channels in registers over the rows that its warp
                     handles, a block adds up its warps' in shared memory; one small kernel finishes both sums. dout and inp are
                     read once: 4 passes over a row of memory, not 6
          version 3: the same with 16 lanes a row

No float atomics: partial sums have places of their own, and are added in a fixed order. There is no version with the row in shared
memory: at 1,024 channels and less registers hold it.
Versions 2 and 3 want C a multiple of 8 and pointers of 16 bytes, as the trainer's vector path; what is odd stays with version 1.

    make build/cpu-fp32/dev/cuda/layernorm && build/cpu-fp32/dev/cuda/layernorm
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/layernorm.cu -o layernorm -lcublas -lcublasLt && ./layernorm -time
*/
#include "common.cuh"

#ifdef ENABLE_FP32
#define TOLERANCE 2e-5
#else
#define TOLERANCE 1e-2
#endif

// ----------------------------------------------------------------------------
// reference. rows of inp and dinp are `stride` apart, those of out and dout C

static void layernorm_forward_reference(double* out, double* mean, double* rstd, const floatX* inp, const floatX* weight, const floatX* bias,
                                        size_t rows, size_t C, size_t stride) {
    for (size_t r = 0; r < rows; r++) {
        const floatX* x = inp + r * stride;
        double m = 0.0, v = 0.0;
        for (size_t c = 0; c < C; c++) { m += (float)x[c] / (double)C; }
        for (size_t c = 0; c < C; c++) { v += ((float)x[c] - m) * ((float)x[c] - m) / (double)C; }
        mean[r] = m;
        rstd[r] = 1.0 / sqrt(v + 1e-6);
        for (size_t c = 0; c < C; c++) { out[r * C + c] = ((float)x[c] - m) * rstd[r] * (float)weight[c] + (float)bias[c]; }
    }
}

static void layernorm_backward_reference(double* dinp, double* dweight, double* dbias, const floatX* dout, const floatX* inp, const floatX* weight,
                                         const double* mean, const double* rstd, size_t rows, size_t C, size_t stride) {
    for (size_t r = 0; r < rows; r++) {
        double g_mean = 0.0, gn_mean = 0.0;
        for (size_t c = 0; c < C; c++) {
            const double norm = ((float)inp[r * stride + c] - mean[r]) * rstd[r], d = (float)dout[r * C + c];
            dweight[c] += d * norm;
            dbias[c] += d;
            g_mean += d * (float)weight[c] / (double)C;
            gn_mean += d * (float)weight[c] * norm / (double)C;
        }
        for (size_t c = 0; c < C; c++) {
            const double norm = ((float)inp[r * stride + c] - mean[r]) * rstd[r], g = (double)(float)dout[r * C + c] * (float)weight[c];
            dinp[r * stride + c] += rstd[r] * (g - g_mean - norm * gn_mean);
        }
    }
}

// ----------------------------------------------------------------------------
// versions 2 (LANES 32) and 3 (LANES 16)

constexpr int W = 16 / sizeof(floatX); // elements that one access moves

// As layernorm_forward_kernel. Lane i of a row has packs i, i + LANES, ...: PACKS of them in registers, so C <= LANES * PACKS * W.
// Blocks of 128 threads
template <int LANES, int PACKS> __global__ void layernorm_forward_kernel2(floatX* out, float* mean, float* rstd, const floatX* inp,
                                                                          const floatX* weight, const floatX* bias, size_t rows, int C, size_t stride) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * W;
    float x[PACKS][W] = {}, sum[W] = {0}, squares[W] = {0};
    for (int p = 0; p < PACKS; p++) {
        const int c = first + p * LANES * W;
        if (c < C) { load<W>(x[p], inp + r * stride + c); }
    }
    for (int p = 0; p < PACKS; p++) {
        for (int j = 0; j < W; j++) { sum[j] += x[p][j]; }
    }
    const float m = cg::reduce(lanes, total<W>(sum), cg::plus<float>()) / C;
    for (int p = 0; p < PACKS; p++) {
        if (first + p * LANES * W < C) {
            for (int j = 0; j < W; j++) { squares[j] += (x[p][j] - m) * (x[p][j] - m); }
        }
    }
    const float s = rsqrtf(cg::reduce(lanes, total<W>(squares), cg::plus<float>()) / C + LAYERNORM_EPS);
    for (int p = 0; p < PACKS; p++) {
        const int c = first + p * LANES * W;
        if (c < C) {
            float w[W], b[W];
            load<W>(w, weight + c);
            load<W>(b, bias + c);
            for (int j = 0; j < W; j++) { x[p][j] = (x[p][j] - m) * s * w[j] + b[j]; }
            store<W>(out + r * C + c, x[p]);
        }
    }
    if (first == 0) {
        mean[r] = m;
        rstd[r] = s;
    }
}

// chooses PACKS: the fewest that hold a row
template <int LANES, int PACKS = 1> void layernorm_forward2(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                                                            const floatX* bias, size_t rows, size_t C, size_t stride) {
    if constexpr (LANES * PACKS * W <= LANES * 32) {
        if (C > LANES * PACKS * W) { return layernorm_forward2<LANES, PACKS + 1>(out, mean, rstd, inp, weight, bias, rows, C, stride); }
        layernorm_forward_kernel2<LANES, PACKS><<<CEIL_DIV(rows, (size_t)(128 / LANES)), 128, 0, main_stream>>>(out, mean, rstd, inp, weight, bias,
                                                                                                               rows, (int)C, stride);
        kernelCheck();
    } else {
        require(false, "%d lanes hold rows of up to %d channels, not %zu", LANES, LANES * 32, C);
    }
}

#define BACKWARD_THREADS 128
#define BACKWARD_ROWS 32 // that one block handles: so few that DeiT-S with 64 images makes three blocks for each multiprocessor of an H100

// partial[c] = the sum of v over the groups of LANES lanes of the block, in their order
template <int LANES, int PACKS> __device__ inline void sum_groups(float* partial, float (*sums)[LANES * PACKS * W], const float (*v)[W], int C) {
    const int first = (int)threadIdx.x % LANES * W;
    for (int p = 0; p < PACKS; p++) { store<W>(&sums[threadIdx.x / LANES][first + p * LANES * W], v[p]); }
    __syncthreads();
    for (int c = threadIdx.x; c < C; c += BACKWARD_THREADS) {
        float sum = 0.0f;
        for (int group = 0; group < BACKWARD_THREADS / LANES; group++) { sum += sums[group][c]; }
        partial[c] = sum;
    }
}

// dinp as layernorm_backward_kernel; partial[0, block, c] = sum over the block's rows of dout * norm, partial[1, block, c] = sum of dout.
// partial (2, blocks, C). One block of 128 threads for 32 rows; C <= LANES * PACKS * W. Channels beyond C count as zeros.
// inp, dout and dinp stay in the type of memory until they are used: in bf16 half the registers. A channel takes a register for each of
// its two sums, and a pack four for each of its arrays: three blocks share a multiprocessor up to where they would spill
template <int LANES, int PACKS> __global__ void __launch_bounds__(BACKWARD_THREADS, PACKS * (W + 4) <= 40 ? 3 : 2)
layernorm_backward_kernel2(floatX* dinp, float* partial, const floatX* dout, const floatX* inp, const floatX* weight, const float* mean,
                           const float* rstd, size_t rows, int C, size_t stride) {
    const int groups = BACKWARD_THREADS / LANES;
    __shared__ __align__(16) float sums[groups][LANES * PACKS * W];
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const int first = (int)lanes.thread_rank() * W;
    Pack<W> w[PACKS] = {};
    float dweight[PACKS][W] = {}, dbias[PACKS][W] = {};
    for (int p = 0; p < PACKS; p++) {
        const int c = first + p * LANES * W;
        if (c < C) { w[p] = *(const Pack<W>*)(weight + c); }
    }
    const size_t begin = (size_t)blockIdx.x * BACKWARD_ROWS, end = min(begin + BACKWARD_ROWS, rows);
    for (size_t r = begin + threadIdx.x / LANES; r < end; r += groups) {
        const float m = mean[r], s = rstd[r];
        Pack<W> x[PACKS] = {}, g[PACKS] = {}, d[PACKS] = {};
        float sum[4] = {0}, norm_sum[4] = {0};
        for (int p = 0; p < PACKS; p++) {
            const int c = first + p * LANES * W;
            if (c < C) {
                x[p] = *(const Pack<W>*)(inp + r * stride + c);
                g[p] = *(const Pack<W>*)(dout + r * C + c);
                d[p] = *(const Pack<W>*)(dinp + r * stride + c);
            }
        }
        for (int p = 0; p < PACKS; p++) {
            for (int j = 0; j < W; j++) {
                const float norm = ((float)x[p].v[j] - m) * s, gj = (float)g[p].v[j], gw = gj * (float)w[p].v[j];
                dweight[p][j] += gj * norm;
                dbias[p][j] += gj;
                sum[j % 4] += gw;
                norm_sum[j % 4] += gw * norm;
            }
        }
        const float2 all = cg::reduce(lanes, make_float2(total<4>(sum), total<4>(norm_sum)), AddPairs());
        const float g_mean = all.x / C, gn_mean = all.y / C;
        for (int p = 0; p < PACKS; p++) {
            const int c = first + p * LANES * W;
            if (c < C) {
                float out[W];
                for (int j = 0; j < W; j++) {
                    const float norm = ((float)x[p].v[j] - m) * s, gw = (float)g[p].v[j] * (float)w[p].v[j];
                    out[j] = (float)d[p].v[j] + s * (gw - g_mean - norm * gn_mean);
                }
                store<W>(dinp + r * stride + c, out);
            }
        }
    }
    sum_groups<LANES, PACKS>(partial + (size_t)blockIdx.x * C, sums, dweight, C);
    __syncthreads(); // dweight has been read from sums
    sum_groups<LANES, PACKS>(partial + ((size_t)gridDim.x + blockIdx.x) * C, sums, dbias, C);
}

// dweight[c] (blockIdx.y 0) or dbias[c] (1) += sum over blocks of partial[blockIdx.y, block, c]. A block of 1,024 threads sums 32 channels:
// thread (y, x) every 32nd partial sum of channel x, then the first warp those of all y. So a chain of sums is blocks/32 + 32 long
__global__ void layernorm_finish_kernel2(float* dweight, float* dbias, const float* partial, size_t blocks, int C) {
    __shared__ float sums[32][32];
    const int x = threadIdx.x % 32, y = threadIdx.x / 32, c = (int)blockIdx.x * 32 + x;
    float sum = 0.0f;
    if (c < C) {
        for (size_t b = y; b < blocks; b += 32) { sum += partial[(blockIdx.y * blocks + b) * C + c]; }
    }
    sums[y][x] = sum;
    __syncthreads();
    if (y == 0 && c < C) {
        for (int k = 1; k < 32; k++) { sum += sums[k][x]; }
        float* const out = blockIdx.y == 0 ? dweight : dbias;
        out[c] += sum;
    }
}

// floats that partial must hold
static size_t layernorm_backward_scratch2(size_t rows, size_t C) { return 2 * CEIL_DIV(rows, (size_t)BACKWARD_ROWS) * C; }

template <int LANES, int PACKS = 1> void layernorm_backward2(floatX* dinp, float* dweight, float* dbias, float* partial, const floatX* dout,
                                                             const floatX* inp, const floatX* weight, const float* mean, const float* rstd,
                                                             size_t rows, size_t C, size_t stride) {
    if constexpr (LANES * PACKS * W <= LANES * 32) {
        if (C > LANES * PACKS * W) {
            return layernorm_backward2<LANES, PACKS + 1>(dinp, dweight, dbias, partial, dout, inp, weight, mean, rstd, rows, C, stride);
        }
        const size_t blocks = CEIL_DIV(rows, (size_t)BACKWARD_ROWS);
        layernorm_backward_kernel2<LANES, PACKS><<<blocks, BACKWARD_THREADS, 0, main_stream>>>(dinp, partial, dout, inp, weight, mean, rstd, rows,
                                                                                               (int)C, stride);
        layernorm_finish_kernel2<<<dim3(CEIL_DIV(C, (size_t)32), 2), 1024, 0, main_stream>>>(dweight, dbias, partial, blocks, (int)C);
        kernelCheck();
    } else {
        require(false, "%d lanes hold rows of up to %d channels, not %zu", LANES, LANES * 32, C);
    }
}

// ----------------------------------------------------------------------------
// every version at one shape

typedef struct {
    size_t rows, C, stride;
    Array<floatX> inp, weight, bias, dout, out, dinp;
    Array<float> mean, rstd, dweight, dbias, partial;
} Case;

// the values that are read are there, dinp, dweight and dbias with values to add to; rows have a mean far from zero
static Case case_new(size_t rows, size_t C, size_t stride) {
    const size_t scratch1 = 2 * column_sum_scratch(rows, C), scratch2 = layernorm_backward_scratch2(rows, C);
    Case t = {rows, C, stride, array_normal<floatX>(rows * stride, 1, 2.0), array_normal<floatX>(C, 2, 1.0), array_normal<floatX>(C, 3, 1.0),
              array_normal<floatX>(rows * C, 4, 1.0), array_new<floatX>(rows * C), array_normal<floatX>(rows * stride, 5, 1.0),
              array_new<float>(rows), array_new<float>(rows), array_normal<float>(C, 6, 1.0), array_normal<float>(C, 7, 1.0),
              array_new<float>(scratch1 > scratch2 ? scratch1 : scratch2)};
    for (size_t i = 0; i < t.inp.n; i++) { t.inp.host[i] = (floatX)((float)t.inp.host[i] + 40.0f); }
    to_device(t.inp);
    return t;
}

static void case_free(const Case* t) {
    array_free(t->inp); array_free(t->weight); array_free(t->bias); array_free(t->dout); array_free(t->out); array_free(t->dinp);
    array_free(t->mean); array_free(t->rstd); array_free(t->dweight); array_free(t->dbias); array_free(t->partial);
}

// what a version takes
static bool takes(int version, size_t C, size_t stride) {
    return version == 1 || ((C | stride) % VEC == 0 && C <= (version == 2 ? 1024 : 512));
}

static void forward(const Case* t, int version) {
    if (version == 1) {
        layernorm_forward(t->out.device, t->mean.device, t->rstd.device, t->inp.device, t->weight.device, t->bias.device, t->rows, t->C, t->stride);
    } else if (version == 2) {
        layernorm_forward2<32>(t->out.device, t->mean.device, t->rstd.device, t->inp.device, t->weight.device, t->bias.device, t->rows, t->C, t->stride);
    } else {
        layernorm_forward2<16>(t->out.device, t->mean.device, t->rstd.device, t->inp.device, t->weight.device, t->bias.device, t->rows, t->C, t->stride);
    }
}

static void backward(const Case* t, int version) {
    if (version == 1) {
        layernorm_backward(t->dinp.device, t->dweight.device, t->dbias.device, t->partial.device, t->dout.device, t->inp.device, t->weight.device,
                           t->mean.device, t->rstd.device, t->rows, t->C, t->stride);
    } else if (version == 2) {
        layernorm_backward2<32>(t->dinp.device, t->dweight.device, t->dbias.device, t->partial.device, t->dout.device, t->inp.device, t->weight.device,
                                t->mean.device, t->rstd.device, t->rows, t->C, t->stride);
    } else {
        layernorm_backward2<16>(t->dinp.device, t->dweight.device, t->dbias.device, t->partial.device, t->dout.device, t->inp.device, t->weight.device,
                                t->mean.device, t->rstd.device, t->rows, t->C, t->stride);
    }
}

static void test_layernorm(size_t rows, size_t C, size_t stride) {
    double *out = (double*)calloc(rows * C, sizeof(double)), *mean = (double*)calloc(rows, sizeof(double)), *rstd = (double*)calloc(rows, sizeof(double));
    double *dinp = (double*)calloc(rows * stride, sizeof(double)), *dweight = (double*)calloc(C, sizeof(double)), *dbias = (double*)calloc(C, sizeof(double));
    for (int version = 1; version <= 3; version++) {
        if (!takes(version, C, stride)) { continue; }
        Case t = case_new(rows, C, stride);
        if (version == 1) {
            for (size_t i = 0; i < t.dinp.n; i++) { dinp[i] = (float)t.dinp.host[i]; }
            for (size_t c = 0; c < C; c++) {
                dweight[c] = t.dweight.host[c];
                dbias[c] = t.dbias.host[c];
            }
            layernorm_forward_reference(out, mean, rstd, t.inp.host, t.weight.host, t.bias.host, rows, C, stride);
            layernorm_backward_reference(dinp, dweight, dbias, t.dout.host, t.inp.host, t.weight.host, mean, rstd, rows, C, stride);
        }
        forward(&t, version);
        backward(&t, version);
        check_close(t.out, out, TOLERANCE, "forward version %d, %zu x %zu of %zu: out", version, rows, C, stride);
        check_close(t.mean, mean, 2e-6, "forward version %d, %zu x %zu of %zu: mean", version, rows, C, stride);
        check_close(t.rstd, rstd, 2e-5, "forward version %d, %zu x %zu of %zu: rstd", version, rows, C, stride);
        check_close(t.dinp, dinp, TOLERANCE, "backward version %d, %zu x %zu of %zu: dinp", version, rows, C, stride);
        check_close(t.dweight, dweight, 2e-5, "backward version %d, %zu x %zu of %zu: dweight", version, rows, C, stride);
        check_close(t.dbias, dbias, 2e-5, "backward version %d, %zu x %zu of %zu: dbias", version, rows, C, stride);
        if (rows > 64 && C < 384) { // several blocks: the second time, they may end in another order
            Case again = case_new(rows, C, stride);
            forward(&again, version);
            backward(&again, version);
            check_bits(again.out, t.out.host, "out, a second time");
            check_bits(again.dinp, t.dinp.host, "dinp, a second time");
            check_bits(again.dweight, t.dweight.host, "dweight, a second time");
            check_bits(again.dbias, t.dbias.host, "dbias, a second time");
            case_free(&again);
        }
        case_free(&t);
    }
    free(out); free(mean); free(rstd); free(dinp); free(dweight); free(dbias);
}

int main(int argc, char** argv) {
    bench_open(argc, argv);
    // rows x C, rows `stride` apart: C that fills no pack, no lane's last pack, all of them; rows that fill no block; one, and very many
    const size_t shapes[][3] = {{1, 1, 1}, {5, 7, 10}, {33, 42, 42}, {1, 8, 8}, {7, 8, 24}, {131, 64, 64}, {35, 200, 200}, {9, 256, 264},
                                {70, 384, 384}, {33, 392, 392}, {5, 512, 512}, {34, 520, 520}, {17, 1024, 1024}, {1100, 16, 16}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) { test_layernorm(shapes[i][0], shapes[i][1], shapes[i][2]); }
    time_header();
    if (timing) {
        const struct { size_t images, C; const char* name; } models[] = {
            {64, 192, "DeiT-Ti 64x197 x 192"}, {64, 384, "DeiT-S 64x197 x 384"}, {64, 768, "DeiT-B 64x197 x 768"}};
        for (size_t i = 0; i < sizeof(models) / sizeof(models[0]); i++) {
            Case t = case_new(models[i].images * 197, models[i].C, models[i].C);
            const double row = t.C * sizeof(floatX), statistics = 2 * sizeof(float); // bytes
            for (int version = 1; version <= 3; version++) {
                if (takes(version, t.C, t.C)) {
                    time_kernel("layernorm_forward", version, models[i].name, t.rows * (2 * row + statistics), 0.0, [&] { forward(&t, version); });
                }
            }
            for (int version = 1; version <= 3; version++) {
                if (takes(version, t.C, t.C)) {
                    time_kernel("layernorm_backward", version, models[i].name, t.rows * (4 * row + statistics), 0.0, [&] { backward(&t, version); });
                }
            }
            case_free(&t);
        }
    }
    return bench_close();
}
