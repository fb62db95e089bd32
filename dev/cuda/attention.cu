/*
Attention of a vision transformer: no mask, some hundreds of tokens, heads of 16, 32 or 64. One kernel where the trainer has four.

version 1: the trainer's attention_forward and attention_backward: batched matrix products of cuBLAS with softmax between them. Scores,
           probabilities and their gradients pass through memory
version 2: fused, bf16 only (wmma has no fp32): no matrix of T x T leaves the chip. A block is one head of one image and holds the head's
           keys and values in shared memory, a warp has 16 queries at a time and their scores in registers, 16x16 to a fragment. Which
           lane holds which element is not specified, so probabilities go through shared memory to become a factor of the next product
version 3: version 2 without that: the factor's fragment takes the element of the same index of the fragment of sums. So it is in nvcc
           13.0's machine code for sm_80, 89, 90 and 120 and on the CPU device, CUDA promises it nowhere, and the checks fail where it is not so

The backward pass has two kernels and no atomics. It does without the output of attention, which the trainer stores by DropIT:
- queries: a block holds keys and values; a warp of 16 queries takes D = rowsum(P * dP) in a first pass over the keys and
  dq = P * (dP - D) @ k / sqrt(HS) in a second one. So scores are made three times, 18 T*T*HS operations where 10 would do: the price
  of needing neither the output nor a row of scores in memory
- keys and values: a block holds queries and dout, a warp has 16 keys and sums dk = dS^T @ q and dv = P^T @ dout over all queries

What is fixed for a row or a column is never looked up by element: it is what a fragment of sums starts with, so S - lse and dP - D come
out of the product. For rows it is a 16x16 tile made once; for columns it rides in the padding of shared memory's rows (see pad_column).

Shared memory at T = 197, HS = 64: 2 matrices of 208 rows of 144 bytes, 2,304 bytes a warp, 1,536 more: 71.3 KiB for 5 warps, 69.0 KiB for
4. So 3 blocks fit on a multiprocessor of sm_90 and 2 of sm_80; 64 images of 6 heads are one wave on an H100. The limit on sm_90 is
T = 752, on sm_80 T = 528.

    make PRECISION=BF16 build/cpu-bf16/dev/cuda/attention && build/cpu-bf16/dev/cuda/attention
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/attention.cu -o attention -lcublas -lcublasLt && ./attention -time
*/
#include "common.cuh"

// ----------------------------------------------------------------------------
// reference: F.scaled_dot_product_attention(q, k, v) and its gradients

typedef struct {
    double *out, *lse;    // (B, T, C), (B, NH, T)
    double *dq, *dk, *dv; // (B, T, C) each
} Reference;

static double* zeros(size_t n) {
    double* p = (double*)calloc(n, sizeof(double));
    require(p != NULL, "out of host memory for %zu values", n);
    return p;
}

// qkv (B, T, 3, NH, HS), dout (B, T, NH, HS)
static Reference attention_reference(const floatX* qkv, const floatX* dout, int B, int T, int NH, int HS) {
    const size_t C = (size_t)NH * HS, n = B * T * C;
    const Reference r = {zeros(n), zeros((size_t)B * NH * T), zeros(n), zeros(n), zeros(n)};
    double *p = zeros(T), *dp = zeros(T);
    const double scale = 1.0 / sqrt(HS);
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < NH; h++) {
            const floatX *q = qkv + (size_t)b * T * 3 * C + h * HS, *k = q + C, *v = k + C;
            const size_t o = (size_t)b * T * C + h * HS;
            for (int i = 0; i < T; i++) {
                double largest = -DBL_MAX, sum = 0.0, D = 0.0;
                for (int j = 0; j < T; j++) {
                    double s = 0.0;
                    for (int c = 0; c < HS; c++) { s += (double)(float)q[i * 3 * C + c] * (float)k[j * 3 * C + c]; }
                    p[j] = s * scale;
                    largest = fmax(largest, p[j]);
                }
                for (int j = 0; j < T; j++) { sum += exp(p[j] - largest); }
                const double lse = largest + log(sum);
                r.lse[((size_t)b * NH + h) * T + i] = lse;
                for (int j = 0; j < T; j++) {
                    p[j] = exp(p[j] - lse);
                    dp[j] = 0.0;
                    for (int c = 0; c < HS; c++) {
                        r.out[o + i * C + c] += p[j] * (float)v[j * 3 * C + c];
                        r.dv[o + j * C + c] += p[j] * (float)dout[o + i * C + c];
                        dp[j] += (double)(float)dout[o + i * C + c] * (float)v[j * 3 * C + c];
                    }
                    D += p[j] * dp[j];
                }
                for (int j = 0; j < T; j++) {
                    const double ds = p[j] * (dp[j] - D) * scale;
                    for (int c = 0; c < HS; c++) {
                        r.dq[o + i * C + c] += ds * (float)k[j * 3 * C + c];
                        r.dk[o + j * C + c] += ds * (float)q[i * 3 * C + c];
                    }
                }
            }
        }
    }
    free(p); free(dp);
    return r;
}

// ----------------------------------------------------------------------------
// versions 2 and 3

#ifndef ENABLE_FP32
#include <mma.h>
using namespace nvcuda;

#define TILE 16
#define FORWARD_WARPS 5  // of a block, at most. 13 tiles of 16 tokens are three rounds for 5 and four for 4. Three blocks on a multiprocessor leave
#define BACKWARD_WARPS 4 // a thread 128 registers with 5 warps, 168 with 4: as many as the forward, as the backward kernels take without spills
#define PAD 8            // elements after each row in shared memory: the 16-byte parts of 8 rows, read together, lie in different banks
#define TILE_LD 24       // of a 16x16 tile in shared memory, float or bf16: the same
#define WARP_BYTES (TILE * TILE_LD * (sizeof(float) + sizeof(floatX))) // a warp's own: a tile of each, or 16 rows of HS + PAD <= 72
#define MASKED -1e30f    // score of a key beyond T: finite, so that no difference is NaN

typedef wmma::fragment<wmma::accumulator, TILE, TILE, TILE, float> Sums;
typedef wmma::fragment<wmma::matrix_a, TILE, TILE, TILE, floatX, wmma::row_major> Left;
typedef wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, floatX, wmma::row_major> Right;
typedef wmma::fragment<wmma::matrix_b, TILE, TILE, TILE, floatX, wmma::col_major> RightTransposed;

// load_matrix_sync from shared memory. nvcc 13.0 does not see that factors of bf16 come from there (sums and fp16 it does): it loads them by
// the generic path, 4 bytes a lane, and transposes in another instruction. Where PTX says so, all is one ldmatrix
template <class Factor> __device__ inline void load_factor(Factor& f, const floatX* p, unsigned ld) {
#ifdef __CUDA_ARCH__
#define WMMA_LOAD(kind) asm volatile("wmma.load." kind ".m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;" \
    : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(ld) : "memory")
    unsigned* x = (unsigned*)f.x;
    if constexpr (std::is_same_v<Factor, Left>) { WMMA_LOAD("a.sync.aligned.row"); }
    else if constexpr (std::is_same_v<Factor, Right>) { WMMA_LOAD("b.sync.aligned.row"); }
    else { WMMA_LOAD("b.sync.aligned.col"); }
#undef WMMA_LOAD
#else
    wmma::load_matrix_sync(f, p, ld);
#endif
}

// Of a tile in shared memory a lane reads or writes half a row: row lane/2, columns 4h to 4h+3 and 8+4h to 8+4h+3 with h = lane%2. In these
// pieces, with 24 elements a row, no two lanes of a quarter warp meet in a bank
__device__ inline int tile_row() { return threadIdx.x % 32 / 2; }
__device__ inline int tile_piece() { return tile_row() * TILE_LD + threadIdx.x % 2 * 4; }

// rows `first` to `first + n` of a matrix of T rows of HS, `stride` apart in global memory, to rows of HS + PAD; zeros from row T on, for
// zero times what memory happens to hold may be NaN. Four loads of 16 bytes are under way in a thread before the first store
template <int HS> __device__ inline void copy_rows(floatX* to, const floatX* from, size_t stride, int first, int n, int T, int thread, int threads) {
    const int packs = HS / VEC, ahead = 4;
    for (int begin = thread; begin < n * packs; begin += ahead * threads) {
        uint4 x[ahead];
        for (int j = 0; j < ahead; j++) {
            const int i = begin + j * threads, row = first + i / packs;
            x[j] = make_uint4(0, 0, 0, 0);
            if (i < n * packs && row < T) { x[j] = *(const uint4*)(from + row * stride + i % packs * VEC); }
        }
        for (int j = 0; j < ahead; j++) {
            const int i = begin + j * threads;
            if (i < n * packs) { *(uint4*)(to + i / packs * (HS + PAD) + i % packs * VEC) = x[j]; }
        }
    }
}

// a warp's 16 rows as factors, through its own shared memory
template <int HS> __device__ inline void load_rows(Left (&rows)[HS / TILE], float* own, const floatX* from, size_t stride, int first, int T) {
    floatX* staged = (floatX*)own;
    __syncwarp();
    copy_rows<HS>(staged, from, stride, first, TILE, T, threadIdx.x % 32, 32);
    __syncwarp();
    for (int d = 0; d < HS / TILE; d++) { load_factor(rows[d], staged + d * TILE, HS + PAD); }
}

// to rows `first`.. of a matrix of T rows of HS in global memory: s * scale, where scale is that of the lane's tile_row()
template <int HS> __device__ inline void store_rows(floatX* to, size_t stride, int first, int T, const Sums (&s)[HS / TILE], float scale, float* own) {
    const int row = tile_row(), c = threadIdx.x % 2 * VEC;
    for (int d = 0; d < HS / TILE; d++) {
        __syncwarp();
        wmma::store_matrix_sync(own, s[d], TILE_LD, wmma::mem_row_major);
        __syncwarp();
        float v[VEC];
        load<VEC>(v, own + row * TILE_LD + c);
        for (int j = 0; j < VEC; j++) { v[j] *= scale; }
        if (first + row < T) { store<VEC>(to + (first + row) * stride + d * TILE + c, v); }
    }
}

// s += rows @ other^T, with 16 rows of `other` in shared memory
template <int HS> __device__ inline void multiply_transposed(Sums& s, const Left (&rows)[HS / TILE], const floatX* other) {
    for (int d = 0; d < HS / TILE; d++) {
        RightTransposed b;
        load_factor(b, other + d * TILE, HS + PAD);
        wmma::mma_sync(s, rows[d], b, s);
    }
}

// s += a @ other, with 16 rows of `other` in shared memory
template <int HS> __device__ inline void multiply(Sums (&s)[HS / TILE], const Left& a, const floatX* other) {
    for (int d = 0; d < HS / TILE; d++) {
        Right b;
        load_factor(b, other + d * TILE, HS + PAD);
        wmma::mma_sync(s[d], a, b, s[d]);
    }
}

// sums, rounded, as a factor
template <bool DIRECT> __device__ inline void to_factor(Left& a, const Sums& s, float* own) {
    if constexpr (DIRECT) {
        static_assert(Left::num_elements == Sums::num_elements, "version 3 needs fragments of the same shape");
        for (int i = 0; i < Left::num_elements; i++) { a.x[i] = (floatX)s.x[i]; }
    } else {
        floatX* rounded = (floatX*)(own + TILE * TILE_LD);
        float v[8];
        __syncwarp();
        wmma::store_matrix_sync(own, s, TILE_LD, wmma::mem_row_major);
        __syncwarp();
        load<4>(v, own + tile_piece());
        load<4>(v + 4, own + tile_piece() + 8);
        store<4>(rounded + tile_piece(), v);
        store<4>(rounded + tile_piece() + 8, v + 4);
        __syncwarp();
        load_factor(a, rounded, TILE_LD);
    }
}

// a row's 16 elements joined, by the two lanes of that tile_row()
template <class Op> __device__ inline float join_row(const Sums& s, float* own, Op op) {
    float v[8];
    __syncwarp();
    wmma::store_matrix_sync(own, s, TILE_LD, wmma::mem_row_major);
    __syncwarp();
    load<4>(v, own + tile_piece());
    load<4>(v + 4, own + tile_piece() + 8);
    for (int half = 4; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) { v[j] = op(v[j], v[j + half]); }
    }
    return op(v[0], __shfl_xor_sync(0xffffffff, v[0], 1));
}

// the inverse: all elements of a row are the value that the lanes of that tile_row() have
__device__ inline void spread_row(Sums& s, float value, float* own) {
    const float v[4] = {value, value, value, value};
    __syncwarp();
    store<4>(own + tile_piece(), v);
    store<4>(own + tile_piece() + 8, v);
    __syncwarp();
    wmma::load_matrix_sync(s, own, TILE_LD, wmma::mem_row_major);
}

// s added to the last tile of scores keeps the keys beyond T out
__device__ inline void write_mask(float* mask, int T, int thread, int threads) {
    for (int i = thread; i < TILE * TILE_LD; i += threads) { mask[i] = (T - 1) / TILE * TILE + i % TILE_LD < T ? 0.0f : MASKED; }
}

// out = softmax(q @ k^T / sqrt(HS)) @ v and lse, the log of the sum of exp over each row of scores, in one pass over the keys: 64 of them at
// a time, sums so far are scaled when a row's largest score grows. out (B, T, NH, HS), lse (B, NH, T), qkv (B, T, 3, NH, HS).
// Grid (NH, B), up to FORWARD_WARPS warps that take turns at the tiles of 16 queries
template <int HS, bool DIRECT> __global__ void __launch_bounds__(32 * FORWARD_WARPS, 3) fused_forward_kernel(floatX* out, float* lse, const floatX* qkv,
                                                                                                          int NH, int T) {
    const int group = 4; // tiles of keys at a time: their scores are 32 registers
    extern __shared__ __align__(128) unsigned char shared[];
    const int head = blockIdx.x, warp = threadIdx.x / 32, warps = blockDim.x / 32, tiles = CEIL_DIV(T, TILE), rows = tiles * TILE;
    floatX *keys = (floatX*)shared, *values = keys + rows * (HS + PAD);
    float *mask = (float*)(values + rows * (HS + PAD)), *own = mask + TILE * TILE_LD + warp * (WARP_BYTES / sizeof(float));
    const size_t C = (size_t)NH * HS;
    const floatX* q = qkv + blockIdx.y * T * 3 * C + head * HS;
    copy_rows<HS>(keys, q + C, 3 * C, 0, rows, T, threadIdx.x, blockDim.x);
    copy_rows<HS>(values, q + 2 * C, 3 * C, 0, rows, T, threadIdx.x, blockDim.x);
    write_mask(mask, T, threadIdx.x, blockDim.x);
    __syncthreads();
    const float scale = 1.0f / sqrtf((float)HS), factor = scale * (float)M_LOG2E; // exp(scale * x) = 2^(factor * x)
    for (int tile = warp; tile < tiles; tile += warps) {
        Left q_rows[HS / TILE];
        load_rows<HS>(q_rows, own, q, 3 * C, tile * TILE, T);
        Sums o[HS / TILE], sum, largest;
        for (int d = 0; d < HS / TILE; d++) { wmma::fill_fragment(o[d], 0.0f); }
        wmma::fill_fragment(sum, 0.0f); // 16 partial sums a row, added up in the end
        wmma::fill_fragment(largest, MASKED);
        float row_largest = MASKED;
        for (int first = 0; first < tiles; first += group) {
            Sums s[group], m = largest;
            for (int g = 0; g < group; g++) {
                const int k = first + g;
                if (k == tiles - 1) { wmma::load_matrix_sync(s[g], mask, TILE_LD, wmma::mem_row_major); }
                else { wmma::fill_fragment(s[g], k < tiles ? 0.0f : MASKED); }
                if (k < tiles) { multiply_transposed<HS>(s[g], q_rows, keys + k * TILE * (HS + PAD)); }
            }
            for (int g = 0; g < group; g++) {
                for (int i = 0; i < m.num_elements; i++) { m.x[i] = larger(s[g].x[i], m.x[i]); }
            }
            row_largest = join_row(m, own, cg::greater<float>());
            spread_row(m, row_largest, own);
            for (int i = 0; i < m.num_elements; i++) {
                const float shrink = exp2f(factor * (largest.x[i] - m.x[i]));
                sum.x[i] *= shrink;
                for (int d = 0; d < HS / TILE; d++) { o[d].x[i] *= shrink; }
            }
            largest = m;
            for (int g = 0; g < group; g++) {
                if (first + g < tiles) {
                    for (int i = 0; i < m.num_elements; i++) {
                        s[g].x[i] = exp2f(factor * (s[g].x[i] - m.x[i]));
                        sum.x[i] += s[g].x[i];
                    }
                    Left p;
                    to_factor<DIRECT>(p, s[g], own);
                    multiply<HS>(o, p, values + (first + g) * TILE * (HS + PAD));
                }
            }
        }
        const float row_sum = join_row(sum, own, cg::plus<float>());
        const int row = tile * TILE + tile_row();
        if (threadIdx.x % 2 == 0 && row < T) { lse[((size_t)blockIdx.y * NH + head) * T + row] = scale * row_largest + logf(row_sum); }
        store_rows<HS>(out + blockIdx.y * T * C + head * HS, C, tile * TILE, T, o, 1.0f / row_sum, own);
    }
}

// p = exp(scale * p) and dp, where p += x @ z^T and dp += y @ w^T: x and z are queries and keys or keys and queries, y and w dout and
// values or values and dout. They start with -lse / scale and with -D
template <int HS> __device__ inline void rebuild(Sums& p, Sums& dp, const Left (&x)[HS / TILE], const Left (&y)[HS / TILE], const floatX* z,
                                                 const floatX* w, float factor) {
    multiply_transposed<HS>(p, x, z);
    multiply_transposed<HS>(dp, y, w);
    for (int i = 0; i < p.num_elements; i++) { p.x[i] = exp2f(factor * p.x[i]); }
}

// D = rowsum(P * dP) and dq = P * (dP - D) @ k / sqrt(HS), with P = exp(q @ k^T / sqrt(HS) - lse) and dP = dout @ v^T. D (B, NH, T),
// dout (B, T, NH, HS), qkv and dqkv (B, T, 3, NH, HS). Grid (NH, B), up to BACKWARD_WARPS warps that take turns at the tiles of 16 queries
template <int HS, bool DIRECT> __global__ void __launch_bounds__(32 * BACKWARD_WARPS, 3) fused_backward_queries_kernel(
        floatX* dqkv, float* D, const floatX* dout, const floatX* qkv, const float* lse, int NH, int T) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int head = blockIdx.x, warp = threadIdx.x / 32, warps = blockDim.x / 32, tiles = CEIL_DIV(T, TILE), rows = tiles * TILE;
    floatX *keys = (floatX*)shared, *values = keys + rows * (HS + PAD);
    float *mask = (float*)(values + rows * (HS + PAD)), *own = mask + TILE * TILE_LD + warp * (WARP_BYTES / sizeof(float));
    const size_t C = (size_t)NH * HS, in_qkv = blockIdx.y * T * 3 * C + head * HS, in_lse = ((size_t)blockIdx.y * NH + head) * T;
    const floatX* q = qkv + in_qkv;
    copy_rows<HS>(keys, q + C, 3 * C, 0, rows, T, threadIdx.x, blockDim.x);
    copy_rows<HS>(values, q + 2 * C, 3 * C, 0, rows, T, threadIdx.x, blockDim.x);
    write_mask(mask, T, threadIdx.x, blockDim.x);
    __syncthreads();
    const float scale = 1.0f / sqrtf((float)HS), factor = scale * (float)M_LOG2E;
    for (int tile = warp; tile < tiles; tile += warps) {
        Left q_rows[HS / TILE], dout_rows[HS / TILE];
        load_rows<HS>(q_rows, own, q, 3 * C, tile * TILE, T);
        load_rows<HS>(dout_rows, own, dout + blockIdx.y * T * C + head * HS, C, tile * TILE, T);
        const int row = tile * TILE + tile_row();
        Sums minus_lse, minus_D, dq[HS / TILE]; // minus_D: first 16 partial sums a row
        spread_row(minus_lse, row < T ? -lse[in_lse + row] / scale : 0.0f, own);
        wmma::fill_fragment(minus_D, 0.0f);
        for (int d = 0; d < HS / TILE; d++) { wmma::fill_fragment(dq[d], 0.0f); }
        for (int pass = 0; pass < 2; pass++) {
            for (int k = 0; k < tiles; k++) {
                const floatX* tile_keys = keys + k * TILE * (HS + PAD);
                Sums p, dp;
                if (k < tiles - 1) { wmma::fill_fragment(p, 0.0f); }
                else { wmma::load_matrix_sync(p, mask, TILE_LD, wmma::mem_row_major); } // for exp(0 - lse) is infinite where lse < -88
                for (int i = 0; i < p.num_elements; i++) {
                    p.x[i] += minus_lse.x[i];
                    dp.x[i] = pass == 0 ? 0.0f : minus_D.x[i];
                }
                rebuild<HS>(p, dp, q_rows, dout_rows, tile_keys, values + k * TILE * (HS + PAD), factor);
                if (pass == 0) {
                    for (int i = 0; i < p.num_elements; i++) { minus_D.x[i] -= p.x[i] * dp.x[i]; }
                } else {
                    Left ds;
                    for (int i = 0; i < p.num_elements; i++) { p.x[i] *= dp.x[i]; }
                    to_factor<DIRECT>(ds, p, own);
                    multiply<HS>(dq, ds, tile_keys);
                }
            }
            if (pass == 0) {
                const float sum = join_row(minus_D, own, cg::plus<float>());
                if (threadIdx.x % 2 == 0 && row < T) { D[in_lse + row] = -sum; }
                spread_row(minus_D, sum, own);
            }
        }
        store_rows<HS>(dqkv + in_qkv, 3 * C, tile * TILE, T, dq, scale, own);
    }
}

// A number for each row of a matrix in shared memory, to be added to that row's column of x @ matrix^T: three bf16, which make up a float, in
// the row's padding. The product then runs over 16 columns more, where x is (1, 1, 1, 0, ...): of the rest, zeros and the first
// elements of the next row, nothing but NaN comes through. It costs no shared memory, where tiles would take 1 KiB for 16 rows
template <int HS> __device__ inline void pad_column(floatX* row, float value) {
    const floatX high = (floatX)value, middle = (floatX)(value - (float)high);
    const float parts[VEC] = {(float)high, (float)middle, value - (float)high - (float)middle};
    store<VEC>(row + HS, parts);
}

// dk = (P * (dP - D))^T @ q / sqrt(HS) and dv = P^T @ dout; arguments and launch as above, but D is read, and a warp has 16 keys: what was rows
// there is columns here
template <int HS, bool DIRECT> __global__ void __launch_bounds__(32 * BACKWARD_WARPS, 3) fused_backward_keys_kernel(
        floatX* dqkv, const float* D, const floatX* dout, const floatX* qkv, const float* lse, int NH, int T) {
    extern __shared__ __align__(128) unsigned char shared[];
    const int head = blockIdx.x, warp = threadIdx.x / 32, warps = blockDim.x / 32, tiles = CEIL_DIV(T, TILE), rows = tiles * TILE;
    floatX *queries = (floatX*)shared, *douts = queries + rows * (HS + PAD);
    float *end = (float*)(douts + rows * (HS + PAD)), *own = end + TILE * TILE_LD + warp * (WARP_BYTES / sizeof(float));
    const size_t C = (size_t)NH * HS, in_qkv = blockIdx.y * T * 3 * C + head * HS, in_lse = ((size_t)blockIdx.y * NH + head) * T;
    const floatX* k = qkv + in_qkv + C;
    const float scale = 1.0f / sqrtf((float)HS), factor = scale * (float)M_LOG2E;
    copy_rows<HS>(queries, k - C, 3 * C, 0, rows, T, threadIdx.x, blockDim.x);
    copy_rows<HS>(douts, dout + blockIdx.y * T * C + head * HS, C, 0, rows, T, threadIdx.x, blockDim.x);
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
        pad_column<HS>(queries + row * (HS + PAD), row < T ? -lse[in_lse + row] / scale : 0.0f);
        pad_column<HS>(douts + row * (HS + PAD), row < T ? -D[in_lse + row] : 0.0f);
    }
    if (threadIdx.x == 0) { *(uint4*)end = make_uint4(0, 0, 0, 0); } // the row after the last
    __syncthreads();
    Left ones;
    floatX* staged = (floatX*)own;
    const float one = threadIdx.x % 2 == 0 ? 1.0f : 0.0f, start[4] = {one, one, one, 0.0f}, rest[4] = {0};
    store<4>(staged + tile_piece(), start);
    store<4>(staged + tile_piece() + 8, rest);
    __syncwarp();
    load_factor(ones, staged, TILE_LD);
    for (int tile = warp; tile < tiles; tile += warps) {
        Left k_rows[HS / TILE], v_rows[HS / TILE];
        load_rows<HS>(k_rows, own, k, 3 * C, tile * TILE, T);
        load_rows<HS>(v_rows, own, k + C, 3 * C, tile * TILE, T);
        Sums dk[HS / TILE], dv[HS / TILE];
        for (int d = 0; d < HS / TILE; d++) {
            wmma::fill_fragment(dk[d], 0.0f);
            wmma::fill_fragment(dv[d], 0.0f);
        }
        for (int j = 0; j < tiles; j++) {
            const floatX *tile_queries = queries + j * TILE * (HS + PAD), *tile_douts = douts + j * TILE * (HS + PAD);
            RightTransposed column;
            Sums p, dp;
            wmma::fill_fragment(p, 0.0f);
            wmma::fill_fragment(dp, 0.0f);
            load_factor(column, tile_queries + HS, HS + PAD);
            wmma::mma_sync(p, ones, column, p);
            load_factor(column, tile_douts + HS, HS + PAD);
            wmma::mma_sync(dp, ones, column, dp);
            rebuild<HS>(p, dp, k_rows, v_rows, tile_queries, tile_douts, factor);
            Left a;
            to_factor<DIRECT>(a, p, own);
            multiply<HS>(dv, a, tile_douts);
            for (int i = 0; i < p.num_elements; i++) { p.x[i] *= dp.x[i]; }
            to_factor<DIRECT>(a, p, own);
            multiply<HS>(dk, a, tile_queries);
        }
        store_rows<HS>(dqkv + in_qkv + C, 3 * C, tile * TILE, T, dk, scale, own);
        store_rows<HS>(dqkv + in_qkv + 2 * C, 3 * C, tile * TILE, T, dv, 1.0f, own);
    }
}

// as many warps as share the tiles in the fewest rounds, and no more; the carveout lets as many blocks on a multiprocessor as there is room for
#define LAUNCH_HEAD(kernel, HEAD, max_warps, ...) do { \
    const int tiles = CEIL_DIV(T, TILE), warps = CEIL_DIV(tiles, CEIL_DIV(tiles, max_warps)); \
    const size_t bytes = 2 * sizeof(floatX) * tiles * TILE * (HEAD + PAD) + sizeof(float) * TILE * TILE_LD + warps * WARP_BYTES; \
    cudaCheck(cudaFuncSetAttribute(kernel<HEAD, DIRECT>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes)); \
    cudaCheck(cudaFuncSetAttribute(kernel<HEAD, DIRECT>, cudaFuncAttributePreferredSharedMemoryCarveout, 100)); \
    kernel<HEAD, DIRECT><<<dim3(NH, B), 32 * warps, bytes, main_stream>>>(__VA_ARGS__); \
    kernelCheck(); } while (0)
#define LAUNCH_FUSED(kernel, max_warps, ...) do { \
    if (HS == 16) { LAUNCH_HEAD(kernel, 16, max_warps, __VA_ARGS__); } \
    else if (HS == 32) { LAUNCH_HEAD(kernel, 32, max_warps, __VA_ARGS__); } \
    else if (HS == 64) { LAUNCH_HEAD(kernel, 64, max_warps, __VA_ARGS__); } \
    else { require(false, "no fused attention for heads of %d", HS); } } while (0)

// rows of qkv are read 16 bytes at a time: C is a multiple of 16, since HS is
template <bool DIRECT> static void fused_forward(floatX* out, float* lse, const floatX* qkv, int B, int T, int NH, int HS) {
    LAUNCH_FUSED(fused_forward_kernel, FORWARD_WARPS, out, lse, qkv, NH, T);
}

// D (B, NH, T) is scratch
template <bool DIRECT> static void fused_backward(floatX* dqkv, float* D, const floatX* dout, const floatX* qkv, const float* lse, int B, int T, int NH,
                                                  int HS) {
    LAUNCH_FUSED(fused_backward_queries_kernel, BACKWARD_WARPS, dqkv, D, dout, qkv, lse, NH, T);
    LAUNCH_FUSED(fused_backward_keys_kernel, BACKWARD_WARPS, dqkv, D, dout, qkv, lse, NH, T);
}
#endif

// ----------------------------------------------------------------------------

typedef struct {
    int B, T, NH, HS;
    Array<floatX> qkv, dout, out, dqkv;
    Array<float> lse, D;
    Array<float> scores, dprobs; // version 1's scratch
    Array<floatX> probs, dscores;
    Array<void*> pointers;
    Attention attention;
} Case;

static Case case_new(int B, int T, int NH, int HS, double deviation) {
    const size_t n = (size_t)B * T * NH * HS, rows = (size_t)B * NH * T;
    const int ld = CEIL_DIV(T, VEC) * VEC;
    const bool own = sizeof(floatX) != sizeof(float); // else probs and dscores share the memory of scores and dprobs, as in the trainer
    Case c = {B, T, NH, HS, array_normal<floatX>(3 * n, 1, deviation), array_normal<floatX>(n, 2, 1.0), array_new<floatX>(n), array_new<floatX>(3 * n),
              array_new<float>(rows), array_new<float>(rows), array_new<float>(rows * ld), array_new<float>(rows * ld),
              array_new<floatX>(own ? rows * ld : 0), array_new<floatX>(own ? rows * ld : 0),
              array_new<void*>((size_t)NUM_ATTENTION_POINTERS * B * NH), {}};
    c.attention = {NH, T, HS, ld, B, c.scores.device, own ? c.probs.device : (floatX*)c.scores.device, c.dprobs.device,
                   own ? c.dscores.device : (floatX*)c.dprobs.device, c.pointers.device};
    return c;
}

static void case_free(const Case* c) {
    array_free(c->qkv); array_free(c->dout); array_free(c->out); array_free(c->dqkv); array_free(c->lse); array_free(c->D);
    array_free(c->scores); array_free(c->dprobs); array_free(c->probs); array_free(c->dscores); array_free(c->pointers);
}

static const int versions = sizeof(floatX) == sizeof(float) ? 1 : 3;

static void forward(const Case* c, int version) {
    if (version == 1) { attention_forward(c->out.device, c->lse.device, c->qkv.device, &c->attention, c->B); }
#ifndef ENABLE_FP32
    else if (version == 2) { fused_forward<false>(c->out.device, c->lse.device, c->qkv.device, c->B, c->T, c->NH, c->HS); }
    else { fused_forward<true>(c->out.device, c->lse.device, c->qkv.device, c->B, c->T, c->NH, c->HS); }
#endif
}

static void backward(const Case* c, int version) {
    if (version == 1) { attention_backward(c->dqkv.device, c->dout.device, c->qkv.device, c->lse.device, &c->attention, c->B); }
#ifndef ENABLE_FP32
    else if (version == 2) {
        fused_backward<false>(c->dqkv.device, c->D.device, c->dout.device, c->qkv.device, c->lse.device, c->B, c->T, c->NH, c->HS);
    } else {
        fused_backward<true>(c->dqkv.device, c->D.device, c->dout.device, c->qkv.device, c->lse.device, c->B, c->T, c->NH, c->HS);
    }
#endif
}

// lse is fp32 from exact products in both precisions
#define LSE_TOLERANCE 2e-5
#define TOLERANCE (sizeof(floatX) == sizeof(float) ? 2e-5 : 1e-2)

// hostile: in every head one query with large scores, of which exp overflows, and one whose scores are all under -88, so that exp(-lse) does
static void test_attention(int B, int T, int NH, int HS, bool hostile) {
    const Case c = case_new(B, T, NH, HS, 1.5);
    const size_t C = (size_t)NH * HS, rows = (size_t)B * T;
    if (hostile) {
        for (size_t i = 0; i < rows * NH; i++) {
            floatX* q = c.qkv.host + i / NH * 3 * C + i % NH * HS;
            const int t = (int)(i / NH % T);
            for (int d = 0; t == T - 1 && d < HS; d++) { q[d] = (floatX)(20.0f * (float)q[d]); }
            q[C] = (floatX)8.0f;
            if (t == T / 2) { q[0] = (floatX)(-25.0f * sqrtf((float)HS)); }
        }
        to_device(c.qkv);
    }
    const Reference r = attention_reference(c.qkv.host, c.dout.host, B, T, NH, HS);
    Array<floatX> part = array_new<floatX>(rows * C), again = array_new<floatX>(3 * rows * C);
    char shape[64];
    snprintf(shape, sizeof(shape), "%d x %d x %d x %d%s", B, T, NH, HS, hostile ? ", hostile" : "");
    for (int version = 1; version <= versions; version++) {
        for (int run = 0; run < 2; run++) {
            cudaCheck(cudaMemset(c.out.device, 0xff, c.out.n * sizeof(floatX)));
            cudaCheck(cudaMemset(c.lse.device, 0xff, c.lse.n * sizeof(float)));
            cudaCheck(cudaMemset(c.D.device, 0xff, c.D.n * sizeof(float)));
            cudaCheck(cudaMemset(c.dqkv.device, 0xff, c.dqkv.n * sizeof(floatX)));
            forward(&c, version);
            backward(&c, version);
            if (run == 0) {
                check_close(c.out, r.out, TOLERANCE, "version %d, %s: out", version, shape);
                check_close(c.lse, r.lse, LSE_TOLERANCE, "version %d, %s: lse", version, shape);
                to_host(c.dqkv);
                const double* const expected[] = {r.dq, r.dk, r.dv};
                for (int s = 0; s < 3; s++) {
                    for (size_t i = 0; i < rows; i++) { memcpy((void*)(part.host + i * C), c.dqkv.host + (3 * i + s) * C, C * sizeof(floatX)); }
                    to_device(part);
                    check_close(part, expected[s], TOLERANCE, "version %d, %s: d%c", version, shape, "qkv"[s]);
                }
                memcpy((void*)again.host, c.dqkv.host, 3 * rows * C * sizeof(floatX));
                memcpy((void*)part.host, c.out.host, rows * C * sizeof(floatX));
            } else {
                check_bits(c.out, part.host, "out of a second run");
                check_bits(c.dqkv, again.host, "dqkv of a second run");
            }
        }
    }
    array_free(part); array_free(again);
    free(r.out); free(r.lse); free(r.dq); free(r.dk); free(r.dv);
    case_free(&c);
}

int main(int argc, char** argv) {
    bench_open(argc, argv);
    test_attention(1, 2, 1, 16, false); // not 1: gradients of q and k would be 0, and have no largest to compare with
    test_attention(1, 16, 2, 64, false);
    test_attention(1, 17, 1, 16, false);
    test_attention(2, 50, 4, 16, false);
    test_attention(2, 65, 2, 32, false);
    test_attention(1, 83, 1, 32, true);
    test_attention(1, 197, 3, 64, false);
    test_attention(1, 272, 1, 64, false);
    time_header();
    if (timing) {
        const int B = 64, T = 197, NH = 6, HS = 64;
        const Case c = case_new(B, T, NH, HS, 1.0);
        const double heads = (double)B * NH, matrix = heads * T * HS * sizeof(floatX), lse = heads * T * sizeof(float);
        for (int version = 1; version <= versions; version++) {
            time_kernel("attention_forward", version, "64 x 197, 6 heads of 64", 4 * matrix + lse, heads * 4 * T * T * HS,
                        [&] { forward(&c, version); });
        }
        for (int version = 1; version <= versions; version++) { // from the lse of the last forward pass; 7 = qkv, dout, dqkv
            time_kernel("attention_backward", version, "64 x 197, 6 heads of 64", 7 * matrix + lse, heads * 10 * T * T * HS,
                        [&] { backward(&c, version); });
        }
        case_free(&c);
    }
    return bench_close();
}
