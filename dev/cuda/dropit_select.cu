/*
DropIT's choice: which k elements of x have the largest magnitude, and their bitmap, offsets and packed values.

mink, over the whole tensor:
    1  the trainer's dropit_select: sample, one read that counts and lists candidates, histograms over the list, a read that packs
    2  the classic: histograms over x, 11 bits of the key a read (3 reads, bf16 2), a read that counts, one that packs: what the list brings
fastmink, in blocks of 16,384 elements. The trainer's search gives a thread 256 consecutive elements, so that a warp's load touches 32 cache
lines: right for a CPU, on a GPU eight times the work of a coalesced load. The alternatives give a warp 1,024 consecutive elements, 16 bytes
a lane and load, turn lanes' masks into words of the bitmap by a transposition of a few shuffles, and search in shared memory:
    1  the trainer's dropit_tile_kernel (3 reads, which hit in a cache at best) and dropit_pack_kernel
    2  one kernel: a block is read once into shared memory, selected there and packed from there
    3  2 with four copies of the histogram, for most elements meet in thirty bins

All give the same bits. Bound of every whole choice: x read once, kept values, bitmap and offsets written once; 1 of mink reads x
twice by its nature. Single kernels stand with what they themselves must move.

build and run: make build/cpu-fp32/dev/cuda/dropit_select && build/cpu-fp32/dev/cuda/dropit_select [-time] [-json FILE]
by hand:       nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/dropit_select.cu -lcublas -lcublasLt -o dropit_select
*/
#include "common.cuh"

// ----------------------------------------------------------------------------
// A block of 512 threads has a tile of 16,384 elements, a warp 1,024 of them, a lane 32: packs of 16 bytes, 32 packs apart. Bit b of
// a lane's mask, as keys[b], is element b % PACKED of pack b / PACKED. Thread t also has word t of the tile's bitmap.
// Two blocks to an SM, so that one reads while the other ranks: that leaves 64 registers, not enough for 32 keys and 32 values

#define THREADS TILE_WORDS
#define PACKED (16 / (int)sizeof(floatX))             // elements of a pack: 4, bf16 8
#define PACKS (32 / PACKED)                           // of a lane; and lanes whose packs share a word of the bitmap
#define WARP_ELEMENTS 1024
#define TILE_BYTES (DROPIT_TILE * sizeof(floatX))     // 64 KiB, bf16 32 KiB

// the lane's first element, in its tile and in x
__device__ inline size_t tile_first(void) { return threadIdx.x / 32 * WARP_ELEMENTS + threadIdx.x % 32 * PACKED; }
__device__ inline size_t lane_first(void) { return (size_t)blockIdx.x * DROPIT_TILE + tile_first(); }
__device__ inline size_t lane_element(size_t first, int bit) { return first + bit / PACKED * 32 * PACKED + bit % PACKED; }

// the lane's elements whose index is below end
__device__ inline unsigned lane_below_mask(size_t first, size_t end) {
    unsigned mask = 0;
    for (int p = 0; p < PACKS; p++) {
        const size_t i = lane_element(first, p * PACKED);
        const unsigned few = i + PACKED <= end ? PACKED : i < end ? (unsigned)(end - i) : 0;
        mask |= ((1u << few) - 1) << p * PACKED;
    }
    return mask;
}

// v = the lane's elements, zero from n on; returns the mask of those below n. Fully coalesced
__device__ inline unsigned load_lane(floatX* v, const floatX* x, size_t first, size_t n) {
    if (lane_element(first, 31) < n) {
        for (int p = 0; p < PACKS; p++) { *(Pack<PACKED>*)(v + p * PACKED) = *(const Pack<PACKED>*)(x + lane_element(first, p * PACKED)); }
        return ~0u;
    }
    for (int b = 0; b < 32; b++) {
        const size_t i = lane_element(first, b);
        v[b] = i < n ? x[i] : (floatX)0.0f;
    }
    return lane_below_mask(first, n);
}

// the lane's elements to where they lie in a tile in shared memory
__device__ inline void store_lane(floatX* tile, const floatX* v) {
    const size_t first = tile_first();
    for (int p = 0; p < PACKS; p++) { *(Pack<PACKED>*)(tile + lane_element(first, p * PACKED)) = *(const Pack<PACKED>*)(v + p * PACKED); }
}

// To lane l from the masks of all lanes: the word of elements 32*l .. 32*l+31 of the warp. PACKS neighbours hold PACKS words as packs
// of PACKED bits, a square: transposed by halves (2 or 3 shuffles), then the words are put in order
__device__ inline unsigned warp_word(unsigned mask) {
    const unsigned lane = threadIdx.x % 32;
    for (int shift = PACKED; shift < 32; shift *= 2) {
        const unsigned low = ~0u / ((1u << shift) + 1), distance = shift / PACKED; // the lower ones of each two runs of packs
        const bool upper = (lane & distance) != 0;
        const unsigned other = __shfl_xor_sync(~0u, upper ? (mask & low) << shift : mask >> shift & low, distance);
        mask = (upper ? mask & ~low : mask & low) | other;
    }
    return __shfl_sync(~0u, mask, lane % PACKED * PACKS + lane / PACKED);
}

// Writes a tile's bitmap, offsets and values. word: of thread t, the kept ones of the tile's elements 32*t .. 32*t+31. tile: its elements
// in shared memory, stored by the lanes that own them. A warp moves its kept ones to the front of its 1,024, pack by pack, and writes
// them as one run. No element moves behind its place, so a row of packs may be overwritten as soon as all lanes have read theirs
__device__ inline void pack_tile(floatX* values, unsigned* bitmap, unsigned* offsets, unsigned word, unsigned tile_offset, size_t n,
                                 floatX* tile, unsigned* warp_sums) {
    const unsigned lane = threadIdx.x % 32;
    const size_t w = (size_t)blockIdx.x * TILE_WORDS + threadIdx.x;
    unsigned sum;
    const unsigned before = tile_offset + block_exclusive_sum((unsigned)__popc(word), warp_sums, &sum);
    if (w / THREAD_WORDS * DROPIT_SEGMENT < n) {
        bitmap[w] = word;
        if (w % THREAD_WORDS == 0) { offsets[w / THREAD_WORDS] = before; }
    }
    const unsigned begin = __shfl_sync(~0u, before, 0), count = __shfl_sync(~0u, before + __popc(word), 31) - begin;
    floatX* own = tile + threadIdx.x / 32 * WARP_ELEMENTS;
    for (int p = 0; p < PACKS; p++) {
        const unsigned source = p * PACKED + lane / PACKS, shift = lane % PACKS * PACKED; // whose word this pack is in, and where
        const unsigned all = __shfl_sync(~0u, word, source);
        unsigned rank = __shfl_sync(~0u, before, source) - begin + __popc(all & ((1u << shift) - 1));
        const Pack<PACKED> pack = *(const Pack<PACKED>*)(tile + lane_element(tile_first(), p * PACKED));
        __syncwarp();
        for (int j = 0; j < PACKED; j++) {
            if (all >> (shift + j) & 1) { own[rank++] = pack.v[j]; }
        }
    }
    __syncwarp();
    for (unsigned r = lane; r < count; r += 32) { values[begin + r] = own[r]; }
}

// ----------------------------------------------------------------------------
// fastmink, versions 2 and 3

// The end of a tile's search: its threshold, and the kept ones of elements 32*t .. 32*t+31 for thread t. Called by the whole block.
// Thread order is index order, so one sum over the block ranks the elements equal to the threshold's key
__device__ inline unsigned finish_tile(Threshold* threshold, const unsigned* keys, unsigned valid, const Search& s, unsigned* warp_sums) {
    const unsigned key = s.remaining > 0 ? search_key(&s) : ~0u, ties = s.remaining;
    const unsigned above = warp_word(above_mask(keys, key) & valid);
    unsigned equal = warp_word(equal_mask(keys, key, 0) & valid), sum;
    if (threadIdx.x == 0) { *threshold = {key, 0}; }
    const unsigned before = block_exclusive_sum((unsigned)__popc(equal), warp_sums, &sum);
    if (before >= ties) {
        equal = 0;
    } else if (ties <= before + __popc(equal)) { // the last kept tie is in this word
        while (__popc(equal) > (int)(ties - before)) { equal ^= 0x80000000u >> __clz((int)equal); }
        threshold->tie_end = blockIdx.x * DROPIT_TILE + threadIdx.x * 32 + 32 - __clz((int)equal);
    }
    return above | equal;
}

// Threshold, bitmap, offsets and values of each tile. Shared memory: the tile's elements, where each histogram reads
// them and where they are packed at last, and COPIES histograms of 8 KiB, one for every COPIES-th lane, interleaved so that the copies
// of a bin lie in different banks.  One block of 512 threads a tile; BLOCK_BYTES of shared memory
#define BLOCK_BYTES(COPIES) (TILE_BYTES + COPIES * DROPIT_BINS * sizeof(unsigned)) // 72 or 96 KiB, bf16 40 or 64 KiB
template <int COPIES> __global__ void __launch_bounds__(THREADS, 2) block_kernel(Threshold* thresholds, unsigned* not_finite,
        floatX* values, unsigned* bitmap, unsigned* offsets, const floatX* x, size_t n, unsigned k_tile, unsigned k_last) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ unsigned warp_sums[32], tie_sums[32];
    __shared__ Search search;
    floatX* tile = (floatX*)shared;
    unsigned* counts = (unsigned*)(shared + TILE_BYTES); // (bins, COPIES); when they are added up (bins)
    unsigned* own = counts + threadIdx.x % COPIES;
    floatX v[32];
    unsigned keys[32];
    const unsigned valid = load_lane(v, x, lane_first(), n);
    store_lane(tile, v); // a lane reads what it wrote itself: no barrier
    if (threadIdx.x == 0) { search = {0, 32, 0, ((size_t)blockIdx.x + 1) * DROPIT_TILE <= n ? k_tile : k_last}; }
    for (bool first = true; first || search.bits > KEY_ZEROS; first = false) {
        for (int b = threadIdx.x; b < COPIES * DROPIT_BINS; b += THREADS) { counts[b] = 0; }
        __syncthreads();
        const Search s = search;
        const int bits = digit_bits(&s), shift = s.bits - bits;
        load_lane(v, tile, tile_first(), DROPIT_TILE);
        magnitude_keys(keys, v);
        if (first) {
            const unsigned bad = count_above(keys, INFINITY_KEY - 1);
            if (bad > 0) { atomicAdd(not_finite, bad); }
            for (int b = 0; b < 32; b++) {
                if (valid >> b & 1) { atomicAdd_block(&own[COPIES * (keys[b] >> shift)], 1u); }
            }
        } else {
            for (unsigned match = equal_mask(keys, s.prefix, s.bits) & valid; match != 0; match &= match - 1) {
                const unsigned key = magnitude_key(tile[lane_element(tile_first(), __ffs((int)match) - 1)]);
                atomicAdd_block(&own[COPIES * (key >> shift & ((1u << bits) - 1))], 1u);
            }
        }
        __syncthreads();
        if (COPIES > 1) {
            unsigned sums[DROPIT_BINS / THREADS] = {};
            for (int b = 0; b < DROPIT_BINS / THREADS; b++) {
                const Pack<COPIES, unsigned> c = ((const Pack<COPIES, unsigned>*)counts)[b * THREADS + threadIdx.x];
                for (int j = 0; j < COPIES; j++) { sums[b] += c.v[j]; }
            }
            __syncthreads();
            for (int b = 0; b < DROPIT_BINS / THREADS; b++) { counts[b * THREADS + threadIdx.x] = sums[b]; }
            __syncthreads();
        }
        search_digit(&search, counts, warp_sums);
    }
    load_lane(v, tile, tile_first(), DROPIT_TILE);
    magnitude_keys(keys, v);
    const unsigned word = finish_tile(&thresholds[blockIdx.x], keys, valid, search, tie_sums);
    pack_tile(values, bitmap, offsets, word, blockIdx.x * k_tile, n, tile, warp_sums);
}

// ----------------------------------------------------------------------------
// one tensor: x, what is chosen of it, scratch

typedef struct {
    Array<floatX> x, values;
    Array<Threshold> thresholds;
    Array<unsigned> offsets, bitmap, not_finite;
    Array<TensorSearch> search;
    Array<unsigned> scratch[5]; // histogram, tile_counts, tile_offsets, range, list_indices
    Array<floatX> sample, list;
    Dropped d;
    DropScratch s;
    DropRule rule;
} Tensor;

static Tensor tensor_new(size_t n, size_t k, int strategy) {
    const size_t tiles = dropit_tiles(n), list = dropit_list_capacity(n);
    Tensor t;
    t.x = array_new<floatX>(n);
    t.values = array_new<floatX>(k + 1);
    t.thresholds = array_new<Threshold>(strategy == MINK ? 1 : tiles);
    t.offsets = array_new<unsigned>(dropit_segments(n));
    t.bitmap = array_new<unsigned>(dropit_words(n));
    t.not_finite = array_new<unsigned>(1);
    t.search = array_new<TensorSearch>(1);
    const size_t words[5] = {DROPIT_BINS, 2 * tiles, tiles, 2, list};
    for (int i = 0; i < 5; i++) { t.scratch[i] = array_new<unsigned>(words[i]); }
    t.sample = array_new<floatX>(DROPIT_TILE);
    t.list = array_new<floatX>(list);
    t.d = {n, k, t.thresholds.device, t.offsets.device, t.bitmap.device, t.values.device};
    t.s = {t.search.device, t.scratch[0].device, (uint2*)t.scratch[1].device, t.scratch[2].device, t.sample.device, t.scratch[3].device,
           t.list.device, t.scratch[4].device, t.not_finite.device};
    t.rule = {strategy, 0, 0};
    return t;
}

static void tensor_free(const Tensor& t) {
    for (const Array<floatX>& a : {t.x, t.values, t.sample, t.list}) { array_free(a); }
    for (const Array<unsigned>& a : {t.offsets, t.bitmap, t.not_finite}) { array_free(a); }
    for (const Array<unsigned>& a : t.scratch) { array_free(a); }
    array_free(t.thresholds);
    array_free(t.search);
}

// ----------------------------------------------------------------------------
// the versions

static DropChoice choice_of(const Tensor& t) { return {t.x.device, t.d, t.rule}; }

// as the trainer's kernels of mink see it. gamma is of the other strategies: k says it
static Selections selections_of(const Tensor& t, bool list) {
    const DropChoice choice = choice_of(t);
    Selections all = {};
    all.tensors[0] = dropit_selection(&choice, &t.s, 0.0);
    if (!list) { all.tensors[0].list_capacity = 0; }
    return all;
}

static void launch_range(const Tensor& t) {
    dropit_range_kernel<<<1, RANGE_THREADS, 0, main_stream>>>(selections_of(t, true));
    kernelCheck();
}

// with the clearing of 4 bytes before it: the list's length is an input, too
static void launch_candidates(const Tensor& t) {
    cudaCheck(cudaMemsetAsync(&t.s.search->candidates, 0, sizeof(unsigned), main_stream));
    dropit_candidates_kernel<<<(unsigned)dropit_tiles(t.d.n), DROPIT_THREADS, 0, main_stream>>>(selections_of(t, true));
    kernelCheck();
}

static void launch_histogram(const Tensor& t, bool first) {
    const unsigned tiles = (unsigned)dropit_tiles(t.d.n), full = 16 * num_multiprocessors, blocks = tiles < full ? tiles : full;
    dropit_histogram_kernel<<<dim3(blocks, 1), DROPIT_THREADS, 0, main_stream>>>(selections_of(t, true), first);
    kernelCheck();
}

static void launch_pack(const Tensor& t) {
    dropit_pack_kernel<false><<<(unsigned)dropit_tiles(t.d.n), PACK_THREADS, 0, main_stream>>>(selections_of(t, true));
    kernelCheck();
}

// up to where the histograms begin: in the list, or (version 2, which has no room for one) in x
static void start(const Tensor& t, int version) {
    const Selections all = selections_of(t, version == 1);
    if (version == 1) {
        dropit_sample_kernel<<<dim3(DROPIT_TILE / 4 / 64, 1), 64, 0, main_stream>>>(all);
        kernelCheck();
        launch_range(t);
        launch_candidates(t);
    } else {
        cudaCheck(cudaMemsetAsync(t.s.search, 0, sizeof(TensorSearch), main_stream));
        cudaCheck(cudaMemsetAsync(t.s.tile_counts, 0, dropit_tiles(t.d.n) * sizeof(uint2), main_stream));
    }
    dropit_start_kernel<<<1, 256, 0, main_stream>>>(all);
    kernelCheck();
}

static void mink(const Tensor& t, int version) {
    if (version == 1) {
        const DropChoice choice = choice_of(t);
        dropit_select(&choice, 1, &t.s, 0.0, main_stream);
        return;
    }
    const Selections all = selections_of(t, false);
    start(t, version);
    for (int digit = 0; digit < (sizeof(floatX) == 2 ? 2 : 3); digit++) {
        launch_histogram(t, digit == 0);
        dropit_search_kernel<<<1, 256, 0, main_stream>>>(all);
    }
    dropit_count_kernel<<<(unsigned)dropit_tiles(t.d.n), DROPIT_THREADS, 0, main_stream>>>(all);
    dropit_offsets_kernel<<<1, OFFSETS_THREADS, 0, main_stream>>>(all);
    kernelCheck();
    launch_pack(t);
}

static void fastmink(const Tensor& t, double gamma, int version) {
    const unsigned tiles = (unsigned)dropit_tiles(t.d.n);
    const unsigned k_tile = (unsigned)dropit_keep(DROPIT_TILE, gamma), k_last = (unsigned)dropit_keep(t.d.n % DROPIT_TILE, gamma);
    if (version == 1) {
        const DropChoice choice = choice_of(t);
        dropit_select(&choice, 1, &t.s, gamma, main_stream);
    } else if (version == 2) {
        block_kernel<1><<<tiles, THREADS, BLOCK_BYTES(1), main_stream>>>(t.d.thresholds, t.s.not_finite, t.d.values, t.d.bitmap,
                                                                               t.d.offsets, t.x.device, t.d.n, k_tile, k_last);
    } else {
        block_kernel<4><<<tiles, THREADS, BLOCK_BYTES(4), main_stream>>>(t.d.thresholds, t.s.not_finite, t.d.values, t.d.bitmap,
                                                                               t.d.offsets, t.x.device, t.d.n, k_tile, k_last);
    }
    kernelCheck();
}

// ----------------------------------------------------------------------------
// reference: a sort

enum { GAUSS, EQUAL, ZERO, FEW, NOT_FINITE, NUM_INPUTS };
static const char* const input_names[NUM_INPUTS] = {"gauss", "equal", "zero", "three values", "inf and nan"};

static floatX input_value(int kind, size_t i, size_t n) {
    const uint4 u = philox(7, 99, (unsigned)kind, i);
    const float g = (float)normal(u);
    switch (kind) {
    case EQUAL:      return (floatX)(u.z & 1 ? 0.5f : -0.5f); // of one magnitude
    case ZERO:       return (floatX)(u.z & 1 ? 0.0f : -0.0f);
    case FEW:        return (floatX)(float)((int)(u.z % 3) - 1);
    case NOT_FINITE: return (floatX)(u.z % 89 == 0 || i == n / 2 ? NAN : u.z % 97 == 0 ? -INFINITY : g);
    default:         return (floatX)g;
    }
}

static unsigned host_key(floatX x) {
    unsigned bits = 0;
    memcpy(&bits, &x, sizeof(floatX));
    return bits << (33 - 8 * sizeof(floatX)); // the sign falls off
}

static const floatX* sorted_x;
static int by_key(const void* a, const void* b) { // largest key first, then lowest index
    const size_t i = *(const size_t*)a, j = *(const size_t*)b;
    const unsigned x = host_key(sorted_x[i]), y = host_key(sorted_x[j]);
    return x != y ? (x > y ? -1 : 1) : i < j ? -1 : i > j;
}

// order = the indices begin .. end-1 of x, sorted
static void sort_range(size_t* order, const floatX* x, size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) { order[i - begin] = i; }
    sorted_x = x;
    qsort(order, end - begin, sizeof(size_t), by_key);
}

typedef struct {
    uint8_t* kept;         // (n)
    Threshold* thresholds; // (tiles)
} Expected;

// the first k of the sorted indices; a search for none ends where no key can be, in digits as many as it has
static void keep_first(Expected* e, size_t which, const size_t* order, const floatX* x, size_t k) {
    for (size_t i = 0; i < k; i++) { e->kept[order[i]] = 1; }
    e->thresholds[which] = k > 0 ? Threshold{host_key(x[order[k - 1]]), (unsigned)order[k - 1] + 1} : Threshold{~0u, 0};
}

// fresh 0xff bytes wherever a version writes, so that it cannot pass by what another one left
static void forget(const Tensor& t) {
    cudaCheck(cudaMemset(t.values.device, 0xff, t.values.n * sizeof(floatX)));
    cudaCheck(cudaMemset(t.thresholds.device, 0xff, t.thresholds.n * sizeof(Threshold)));
    for (const Array<unsigned>& a : {t.offsets, t.bitmap}) { cudaCheck(cudaMemset(a.device, 0xff, a.n * sizeof(unsigned))); }
    for (const Array<unsigned>& a : t.scratch) { cudaCheck(cudaMemset(a.device, 0xff, a.n * sizeof(unsigned))); }
    cudaCheck(cudaMemset(t.not_finite.device, 0, sizeof(unsigned)));
}

static void compare(const Tensor& t, const Expected& e, const char* what) {
    for (const Array<unsigned>& a : {t.offsets, t.bitmap, t.not_finite}) { to_host(a); }
    to_host(t.thresholds);
    to_host(t.values);
    size_t bits = 0, offsets = 0, values = 0, thresholds = 0, k = 0, bad = 0;
    for (size_t i = 0; i < 32 * t.bitmap.n; i++) {
        const bool kept = i < t.d.n && e.kept[i];
        bits += (t.bitmap.host[i / 32] >> i % 32 & 1) != kept;
        if (i % DROPIT_SEGMENT == 0) { offsets += t.offsets.host[i / DROPIT_SEGMENT] != k; }
        if (kept) { values += memcmp((const void*)&t.values.host[k], (const void*)&t.x.host[i], sizeof(floatX)) != 0; }
        k += kept;
        bad += i < t.d.n && !isfinite((float)t.x.host[i]);
    }
    bitsX after;
    memcpy(&after, (const void*)&t.values.host[k], sizeof(after));
    for (size_t i = 0; i < t.thresholds.n; i++) {
        const Threshold got = t.thresholds.host[i], right = e.thresholds[i];
        thresholds += (right.key == ~0u ? got.key < ~0u << 10 : got.key != right.key) || got.tie_end != right.tie_end; // bf16: two digits
    }
    check(bits == 0, "%s: %zu wrong bits in the bitmap", what, bits);
    check(offsets == 0, "%s: %zu wrong offsets", what, offsets);
    check(values == 0 && after == (bitsX)~0u, "%s: %zu wrong values, %x after them", what, values, (unsigned)after);
    check(thresholds == 0, "%s: %zu wrong thresholds", what, thresholds);
    if (strstr(what, "mink 2, ") != what) { // which does not count them
        check(t.not_finite.host[0] == bad, "%s: %u values that are not finite, expected %zu", what, t.not_finite.host[0], bad);
    }
}

static void check_mink(int kind, size_t n) {
    size_t* order = (size_t*)malloc(n * sizeof(size_t));
    const size_t ks[] = {n / 2, 0, n - 1};
    for (int j = 0; j < 3; j++) {
        if (j == 1 && n == 50000) { continue; }
        Tensor t = tensor_new(n, ks[j], MINK);
        Expected e = {(uint8_t*)calloc(n, 1), (Threshold*)calloc(1, sizeof(Threshold))};
        for (size_t i = 0; i < n; i++) { t.x.host[i] = input_value(kind, i, n); }
        to_device(t.x);
        if (j == 0) { sort_range(order, t.x.host, 0, n); }
        keep_first(&e, 0, order, t.x.host, ks[j]);
        for (int version = 1; version <= 2; version++) {
            char what[80];
            snprintf(what, sizeof(what), "mink %d, n %zu k %zu %s", version, n, ks[j], input_names[kind]);
            forget(t);
            mink(t, version);
            compare(t, e, what);
            to_host(t.search);
            const TensorSearch* search = t.search.host;
            if (version == 2) { check(search->listed == 0, "%s: %u are listed", what, search->listed); }
            // the checks must not pass because nothing ever comes to the list
            if (version != 2 && kind == GAUSS && n == 50000 && j == 0) { check(search->listed > 0, "%s: nothing is listed", what); }
        }
        free(e.kept);
        free(e.thresholds);
        tensor_free(t);
    }
    free(order);
}

static void check_fastmink(int kind, size_t n) {
    const size_t tiles = dropit_tiles(n);
    size_t* order = (size_t*)malloc(n * sizeof(size_t));
    const double gammas[] = {0.7, 0.99999, 1.0 / DROPIT_TILE}; // the second keeps none, the last all but one
    for (int j = 0; j < 3; j++) {
        if (j == 1 && n == 50000) { continue; }
        Tensor t = tensor_new(n, dropit_k(n, gammas[j], FASTMINK), FASTMINK);
        Expected e = {(uint8_t*)calloc(n, 1), (Threshold*)calloc(tiles, sizeof(Threshold))};
        for (size_t i = 0; i < n; i++) { t.x.host[i] = input_value(kind, i, n); }
        to_device(t.x);
        for (size_t tile = 0; tile < tiles; tile++) {
            const size_t begin = tile * DROPIT_TILE, end = begin + DROPIT_TILE < n ? begin + DROPIT_TILE : n;
            if (j == 0) { sort_range(order + begin, t.x.host, begin, end); }
            keep_first(&e, tile, order + begin, t.x.host, dropit_keep(end - begin, gammas[j]));
        }
        for (int version = 1; version <= 3; version++) {
            char what[80];
            snprintf(what, sizeof(what), "fastmink %d, n %zu gamma %g %s", version, n, gammas[j], input_names[kind]);
            forget(t);
            fastmink(t, gammas[j], version);
            compare(t, e, what);
        }
        free(e.kept);
        free(e.thresholds);
        tensor_free(t);
    }
    free(order);
}

// ----------------------------------------------------------------------------

static double kept_bytes(const Tensor& t) { return (double)t.d.k * sizeof(floatX) + 4.0 * t.bitmap.n + 4.0 * t.offsets.n; }

static void time_all(size_t n, const char* name, double gamma) {
    char shape[64];
    snprintf(shape, sizeof(shape), "%s, gamma %g", name, gamma);
    const double x_bytes = (double)n * sizeof(floatX);
    Tensor t = tensor_new(n, dropit_k(n, gamma, MINK), MINK);
    array_free(t.x);
    t.x = array_normal<floatX>(n, 1, 1.0);
    cudaCheck(cudaMemset(t.s.not_finite, 0, sizeof(unsigned)));
    for (int version : {2, 1}) { time_kernel("mink", version, shape, x_bytes + kept_bytes(t), 0.0, [&] { mink(t, version); }); }
    // the last ran in the list: its sample, range, tile offsets and threshold stand, and single kernels can run on them
    time_kernel("mink: pack", 1, shape, x_bytes + kept_bytes(t), 0.0, [&] { launch_pack(t); });
    time_kernel("mink: range in the sample", 1, shape, DROPIT_TILE * sizeof(floatX), 0.0, [&] { launch_range(t); });
    to_host(t.search);
    const double listed = t.search.host->candidates;
    time_kernel("mink: candidates", 1, shape, x_bytes + (4.0 + sizeof(floatX)) * listed, 0.0, [&] { launch_candidates(t); });
    start(t, 1); // the search is over; a new one begins
    time_kernel("mink: first histogram", 1, shape, sizeof(floatX) * listed, 0.0, [&] { launch_histogram(t, true); });
    start(t, 2);
    time_kernel("mink: first histogram", 2, shape, x_bytes, 0.0, [&] { launch_histogram(t, true); });
    const Array<floatX> x = t.x;
    t.x = array_new<floatX>(0);
    tensor_free(t);
    t = tensor_new(n, dropit_k(n, gamma, FASTMINK), FASTMINK);
    array_free(t.x);
    t.x = x;
    cudaCheck(cudaMemset(t.s.not_finite, 0, sizeof(unsigned)));
    for (int version = 1; version <= 3; version++) {
        time_kernel("fastmink", version, shape, x_bytes + kept_bytes(t), 0.0, [&] { fastmink(t, gamma, version); });
    }
    tensor_free(t);
}

int main(int argc, char** argv) {
    bench_open(argc, argv);
    cudaCheck(cudaFuncSetAttribute(block_kernel<1>, cudaFuncAttributeMaxDynamicSharedMemorySize, BLOCK_BYTES(1)));
    cudaCheck(cudaFuncSetAttribute(block_kernel<4>, cudaFuncAttributeMaxDynamicSharedMemorySize, BLOCK_BYTES(4)));
    const size_t sizes[] = {1, 31, 33, DROPIT_TILE + 1, 50000};
    for (int kind = 0; kind < NUM_INPUTS; kind++) {
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            // some of the combinations, here as in the checks: ThreadSanitizer is slow
            if (kind == EQUAL ? sizes[i] < 33 : kind != GAUSS && sizes[i] != DROPIT_TILE + 1) { continue; }
            check_mink(kind, sizes[i]);
            check_fastmink(kind, sizes[i]);
        }
    }
    time_header();
    if (timing) {
        time_all((size_t)64 * 197 * 384, "64 x 197 x 384", 0.7);
        time_all((size_t)64 * 197 * 4 * 384, "64 x 197 x 1536", 0.7);
        time_all((size_t)64 * 197 * 4 * 384, "64 x 197 x 1536", 0.9);
    }
    return bench_close();
}
