/*
DropIT's unpacking: out[i - begin] = i kept ? its value : 0, for begin <= i < end.

    1  the trainer's dropit_unpack: a thread writes 8 elements and reads their values one by one, each where the one before ended
    2  4 bytes a lane and step (1 element, bf16 2): a warp writes a word of the bitmap (bf16 two) as one line and reads its run of values as
       one; no shared memory, all steps of a segment independent of one another
    3  a segment's values come to shared memory as one run; lanes gather them there and write 16 bytes a step

A segment is 256 elements; its offset is stored, so no version sums over more than its words. Bound: the chunk's values, bitmap and
offsets read once, the dense chunk written once.

build and run: make build/cpu-fp32/dev/cuda/dropit_unpack && build/cpu-fp32/dev/cuda/dropit_unpack [-time] [-json FILE]
by hand:       nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/dropit_unpack.cu -lcublas -lcublasLt -o dropit_unpack
*/
#include "common.cuh"

#define PACKED (16 / (int)sizeof(floatX)) // elements of 16 bytes: 4, bf16 8
#define PAIRED (4 / (int)sizeof(floatX))  // elements of 4 bytes: 1, bf16 2

// the words of a segment of the bitmap: 32 bytes, the same for all lanes of a warp
__device__ inline void load_segment(unsigned* words, const unsigned* bitmap, size_t segment) {
    *(Pack<THREAD_WORDS, unsigned>*)words = *(const Pack<THREAD_WORDS, unsigned>*)(bitmap + segment * THREAD_WORDS);
}

// One warp a segment, from that of `begin` on. V == PAIRED: begin, end and out are aligned to so many elements; else V == 1
template <int V> __global__ void unpack_kernel2(floatX* out, const floatX* values, const unsigned* bitmap, const unsigned* offsets,
                                                size_t begin, size_t end) {
    const size_t thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t segment = begin / DROPIT_SEGMENT + thread / 32;
    if (segment * DROPIT_SEGMENT < end) {
        const unsigned lane = thread % 32;
        unsigned words[THREAD_WORDS], before = offsets[segment];
        load_segment(words, bitmap, segment);
        for (int step = 0; step < DROPIT_SEGMENT / (32 * V); step++) {
            const size_t i = segment * DROPIT_SEGMENT + (step * 32 + lane) * V;
            const unsigned first = words[step * V], last = words[step * V + V - 1]; // one word, or two
            const unsigned word = lane * V < 32 ? first : last, shift = lane * V % 32;
            unsigned k = before + __popc(word & ((1u << shift) - 1)) + (lane * V < 32 ? 0 : __popc(first));
            before += __popc(first) + (V == 2 ? __popc(last) : 0);
            Pack<V, bitsX> p;
            for (int j = 0; j < V; j++) { // no branches: a value is read whether its element is kept or not (there is room for it), and masked
                const unsigned bit = word >> (shift + j) & 1;
                p.v[j] = ((const bitsX*)values)[k] & (0u - bit);
                k += bit;
            }
            if (i >= begin && i < end) { *(Pack<V, bitsX>*)((bitsX*)out + (i - begin)) = p; }
        }
    }
}

// One warp a segment, from that of `begin` on, 8 warps a block. V == PACKED: begin, end and out are aligned to so many elements; else V == 1
template <int V> __global__ void unpack_kernel3(floatX* out, const floatX* values, const unsigned* bitmap, const unsigned* offsets,
                                                size_t begin, size_t end) {
    __shared__ bitsX stage[8][DROPIT_SEGMENT + 1]; // one more: a gather may read one past the last
    const unsigned lane = threadIdx.x % 32;
    bitsX* own = stage[threadIdx.x / 32];
    const size_t segment = begin / DROPIT_SEGMENT + (size_t)blockIdx.x * 8 + threadIdx.x / 32;
    if (segment * DROPIT_SEGMENT >= end) { return; } // the whole warp
    unsigned words[THREAD_WORDS], count = 0;
    load_segment(words, bitmap, segment);
    const bitsX* run = (const bitsX*)values + offsets[segment];
    for (int w = 0; w < THREAD_WORDS; w++) { count += __popc(words[w]); }
    for (int r = 0; r < DROPIT_SEGMENT; r += 32) {
        if (r + lane <= count) { own[r + lane] = run[r + lane]; }
    }
    if (lane == 0 && count == DROPIT_SEGMENT) { own[count] = 0; }
    __syncwarp();
    for (int step = 0; step < DROPIT_SEGMENT / (32 * PACKED); step++) {
        const unsigned place = (step * 32 + lane) * PACKED, at = place / 32;
        const size_t i = segment * DROPIT_SEGMENT + place;
        unsigned k = 0, word = 0;
        for (unsigned w = 0; w < THREAD_WORDS; w++) { // selects, for an index into words would put them into local memory
            word = w == at ? words[w] : word;
            k += __popc(words[w] & (w < at ? ~0u : w == at ? (1u << place % 32) - 1 : 0));
        }
        Pack<PACKED, bitsX> p;
        for (int j = 0; j < PACKED; j++) {
            const unsigned bit = word >> (place % 32 + j) & 1;
            p.v[j] = own[k] & (0u - bit);
            k += bit;
        }
        bitsX* to = (bitsX*)out + (i - begin); // where i < begin, only elements from begin on are written
        if (V == 1) {
            for (int j = 0; j < PACKED; j++) {
                if (i + j >= begin && i + j < end) { to[j] = p.v[j]; }
            }
        } else if (i >= begin && i < end) {
            *(Pack<PACKED, bitsX>*)to = p;
        }
    }
}

static void unpack(floatX* out, const Dropped* d, size_t begin, size_t end, int version) {
    const size_t segments = CEIL_DIV(end, (size_t)DROPIT_SEGMENT) - begin / DROPIT_SEGMENT, blocks = CEIL_DIV(segments, (size_t)8);
    const bool aligned = vectorizable(begin | end, out);
    if (version == 1) { dropit_unpack(out, d, begin, end, main_stream); }
    else if (version == 2 && aligned) { unpack_kernel2<PAIRED><<<blocks, 256, 0, main_stream>>>(out, d->values, d->bitmap, d->offsets, begin, end); }
    else if (version == 2) { unpack_kernel2<1><<<blocks, 256, 0, main_stream>>>(out, d->values, d->bitmap, d->offsets, begin, end); }
    else if (aligned) { unpack_kernel3<PACKED><<<blocks, 256, 0, main_stream>>>(out, d->values, d->bitmap, d->offsets, begin, end); }
    else { unpack_kernel3<1><<<blocks, 256, 0, main_stream>>>(out, d->values, d->bitmap, d->offsets, begin, end); }
    kernelCheck();
}

// ----------------------------------------------------------------------------
// a tensor of which a share is kept, without a selection: its values are any

typedef struct {
    Array<unsigned> bitmap, offsets;
    Array<floatX> values; // normal; the one past the last is NaN
    Dropped d;
} Kept;

// element i is kept when a random number is below share: 0 none, 1 all
static Kept kept_new(size_t n, double share) {
    Kept t;
    t.bitmap = array_new<unsigned>(dropit_words(n));
    t.offsets = array_new<unsigned>(dropit_segments(n));
    memset(t.bitmap.host, 0, t.bitmap.n * sizeof(unsigned));
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        if (i % DROPIT_SEGMENT == 0) { t.offsets.host[i / DROPIT_SEGMENT] = (unsigned)k; }
        if (uniform(philox(7, 99, 1, i).x) < share) {
            t.bitmap.host[i / 32] |= 1u << i % 32;
            k++;
        }
    }
    to_device(t.bitmap);
    to_device(t.offsets);
    t.values = array_normal<floatX>(k + 1, 2, 1.0);
    memset((void*)&t.values.host[k], 0xff, sizeof(floatX));
    to_device(t.values);
    t.d = {n, k, NULL, t.offsets.device, t.bitmap.device, t.values.device};
    return t;
}

static void kept_free(const Kept& t) {
    array_free(t.bitmap);
    array_free(t.offsets);
    array_free(t.values);
}

// reference: walks over the bitmap from the tensor's first element, without the offsets
static void unpack_reference(floatX* out, const Kept& t, size_t begin, size_t end) {
    size_t k = 0;
    for (size_t i = 0; i < end; i++) {
        const bool kept = t.bitmap.host[i / 32] >> i % 32 & 1;
        if (i >= begin) { out[i - begin] = kept ? t.values.host[k] : (floatX)0.0f; }
        k += kept;
    }
}

// gap: elements before out in its array. Before and behind the chunk nothing may change
static void check_chunk(const Kept& t, size_t begin, size_t end, size_t gap, double share) {
    Array<floatX> out = array_new<floatX>(gap + end - begin + 16);
    floatX* expected = (floatX*)malloc(out.n * sizeof(floatX));
    memset((void*)expected, 0xff, out.n * sizeof(floatX));
    unpack_reference(expected + gap, t, begin, end);
    for (int version = 1; version <= 3; version++) {
        char what[120];
        snprintf(what, sizeof(what), "unpack %d, n %zu, %zu .. %zu, gap %zu, share %g", version, t.d.n, begin, end, gap, share);
        cudaCheck(cudaMemset(out.device, 0xff, out.n * sizeof(floatX)));
        unpack(out.device + gap, &t.d, begin, end, version);
        check_bits(out, expected, what);
    }
    array_free(out);
    free((void*)expected);
}

static void check_tensor(size_t n, double share) {
    Kept t = kept_new(n, share);
    const size_t begins[] = {0, 1, 8, 31, 250, 256, 1000, 16384}, lengths[] = {1, 7, 8, 255, 256, 2048, 5001, n};
    for (size_t i = 0; i < sizeof(begins) / sizeof(begins[0]); i++) {
        for (size_t j = 0; j < sizeof(lengths) / sizeof(lengths[0]); j++) {
            if (begins[i] < n && (begins[i] + lengths[j] <= n || j == 7)) {
                const size_t end = begins[i] + lengths[j] < n ? begins[i] + lengths[j] : n;
                check_chunk(t, begins[i], end, 0, share);
                if (i == 2) { check_chunk(t, begins[i], end, 3, share); } // begin is aligned, out is not
            }
        }
    }
    kept_free(t);
}

static void time_chunk(size_t n, size_t begin, size_t end, const char* name, double share) {
    char shape[64];
    snprintf(shape, sizeof(shape), "%s, %g kept", name, share);
    Kept t = kept_new(n, share);
    Array<floatX> out = array_new<floatX>(end - begin);
    const double length = (double)(end - begin), bytes = length * sizeof(floatX) * (1.0 + share) + length / 8 + 4.0 * length / DROPIT_SEGMENT;
    for (int version = 1; version <= 3; version++) {
        time_kernel("dropit_unpack", version, shape, bytes, 0.0, [&] { unpack(out.device, &t.d, begin, end, version); });
    }
    array_free(out);
    kept_free(t);
}

int main(int argc, char** argv) {
    bench_open(argc, argv);
    const size_t sizes[] = {1, 31, 33, 256, 16384 + 1, 20000};
    const double shares[] = {0.3, 0.0, 1.0};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        for (int s = 0; s < 3; s++) { check_tensor(sizes[i], shares[s]); }
    }
    time_header();
    if (timing) {
        // whole tensors of DeiT-S, and a chunk as the trainer unpacks it: 32 MiB or so of the widest tensor
        const size_t row = 197 * 4 * 384, chunk = 32 * row;
        time_chunk(64 * row / 4, 0, 64 * row / 4, "64 x 197 x 384", 0.3);
        time_chunk(64 * row, 0, 64 * row, "64 x 197 x 1536", 0.3);
        time_chunk(64 * row, 0, 64 * row, "64 x 197 x 1536", 0.1);
        time_chunk(64 * row, chunk, 2 * chunk, "images 32 .. 63 of 1536", 0.3);
    }
    return bench_close();
}
