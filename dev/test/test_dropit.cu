/*
The DropIT kernels of the trainers against a plain sort, at hostile inputs: ties without end, zeros, NaN and Inf, lengths around
every block size, nothing kept and all but one kept; every strategy; unpacking and masking in chunks that begin anywhere.

build and run: make test   (or dev/cpu's recipe on this file); the exit code is the verdict
*/

#define TESTING
#include "../../train_deit.cu"
#include "check.cuh"

enum { GAUSS, EQUAL, ZERO, FEW, SIGNED_ZERO, TINY, INFINITE, NOT_A_NUMBER, RAMP, MISLEADING, NUM_INPUTS };
static const char* const input_names[NUM_INPUTS] = {"gauss", "equal", "zero", "three values", "signed zeros", "denormals", "inf", "nan", "ramp", "misleading sample"};

static floatX input_value(int kind, size_t i, size_t n) {
    const uint4 u = philox(7, 99, (unsigned)kind, i);
    const double g = normal(u);
    switch (kind) {
    case EQUAL:        return (floatX)(u.z & 1 ? 0.5f : -0.5f); // of one magnitude
    case ZERO:         return (floatX)0.0f;
    case FEW:          return (floatX)(float)((int)(u.z % 3) - 1);
    case SIGNED_ZERO:  return (floatX)(u.z % 50 == 0 ? 1.0f : u.w & 1 ? 0.0f : -0.0f);
    case TINY:         return (floatX)(float)(g * 1e-40);
    case INFINITE:     return (floatX)(u.z % 97 == 0 ? (u.w & 1 ? INFINITY : -INFINITY) : (float)g);
    case NOT_A_NUMBER: return (floatX)(u.z % 89 == 0 || i == n / 2 ? NAN : (float)g);
    case RAMP:         return (floatX)(float)i;
    default:           return (floatX)(float)g;
    }
}

static unsigned host_key(const floatX* x, size_t i, DropRule rule) {
    if (rule.strategy == RANDOM) { return philox(rule.seed, RNG_DROPIT, rule.step, i).x; }
    unsigned bits = 0;
    memcpy(&bits, &x[i], sizeof(floatX));
    return bits << (33 - 8 * sizeof(floatX)); // the sign falls off
}

static const floatX* sorted_x;
static DropRule sorted_rule;
static int by_key(const void* a, const void* b) { // largest key first, then lowest index
    const size_t i = *(const size_t*)a, j = *(const size_t*)b;
    const unsigned x = host_key(sorted_x, i, sorted_rule), y = host_key(sorted_x, j, sorted_rule);
    return x != y ? (x > y ? -1 : 1) : i < j ? -1 : i > j;
}

// kept[i] = 1 for the k largest of x[begin .. end-1]
static void keep_range(uint8_t* kept, const floatX* x, size_t begin, size_t end, size_t k, DropRule rule, size_t* index) {
    for (size_t i = begin; i < end; i++) { index[i - begin] = i; }
    sorted_x = x;
    sorted_rule = rule;
    qsort(index, end - begin, sizeof(size_t), by_key);
    for (size_t i = 0; i < k; i++) { kept[index[i]] = 1; }
}

template <class T> static T* device(size_t n) {
    T* p;
    cudaCheck(cudaMalloc((void**)&p, (n > 0 ? n : 1) * sizeof(T)));
    return p;
}

// n elements on the device, copied from the host
template <class T> static T* to_device(const T* host, size_t n) {
    T* p = device<T>(n);
    cudaCheck(cudaMemcpy(p, host, n * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

// n + 1 kept values: unpacking reads the one behind the last, which nobody writes, and does not use it
static floatX* device_values(size_t n) {
    floatX* p = device<floatX>(n + 1);
    cudaCheck(cudaMemset(p + n, 0xff, sizeof(floatX)));
    return p;
}

// zeros wherever the search for a threshold takes its sample: found by sampling two tensors whose elements name their places
static void mislead(floatX* x, size_t n) {
    floatX *place = (floatX*)malloc(n * sizeof(floatX)), *on_device = device<floatX>(n), *sample = device<floatX>(DROPIT_TILE);
    floatX* sampled = (floatX*)malloc(DROPIT_TILE * sizeof(floatX));
    size_t* index = (size_t*)calloc(DROPIT_TILE, sizeof(size_t));
    for (size_t unit = 1; unit < n; unit *= 256) { // bf16 holds integers up to 256
        for (size_t i = 0; i < n; i++) { place[i] = (floatX)(float)(i / unit % 256); }
        cudaCheck(cudaMemcpy(on_device, place, n * sizeof(floatX), cudaMemcpyHostToDevice));
        Selections all = {};
        all.tensors[0].x = on_device;
        all.tensors[0].d.n = n;
        all.tensors[0].sample = sample;
        dropit_sample_kernel<<<DROPIT_TILE / 4 / 64, 64, 0, main_stream>>>(all);
        kernelCheck();
        cudaCheck(cudaMemcpy(sampled, sample, DROPIT_TILE * sizeof(floatX), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < DROPIT_TILE; i++) { index[i] += unit * (size_t)(float)sampled[i]; }
    }
    for (size_t i = 0; i < DROPIT_TILE; i++) { x[index[i]] = (floatX)0.0f; }
    cudaCheck(cudaFree(on_device));
    cudaCheck(cudaFree(sample));
    free((void*)place);
    free((void*)sampled);
    free(index);
}

static bool same_bits(const floatX* a, const floatX* b, size_t n) { return memcmp(a, b, n * sizeof(floatX)) == 0; }

// do two arrays on the device hold the same bits?
template <class T> static bool same_on_device(const T* a, const T* b, size_t n) {
    T* host = (T*)malloc(2 * n * sizeof(T));
    cudaCheck(cudaMemcpy(host, a, n * sizeof(T), cudaMemcpyDeviceToHost));
    cudaCheck(cudaMemcpy(host + n, b, n * sizeof(T), cudaMemcpyDeviceToHost));
    const bool same = memcmp((void*)host, (void*)(host + n), n * sizeof(T)) == 0;
    free((void*)host);
    return same;
}

static void test_case(size_t n, size_t k, double gamma, int kind, int strategy) {
    const size_t tiles = dropit_tiles(n), words = dropit_words(n);
    const DropRule rule = {strategy, 0x123456789abcdefull, 5};
    floatX* x = (floatX*)malloc(n * sizeof(floatX));
    floatX* expected = (floatX*)malloc(n * sizeof(floatX));
    floatX* got = (floatX*)malloc(n * sizeof(floatX));
    uint8_t* kept = (uint8_t*)calloc(n, 1);
    size_t* index = (size_t*)malloc(n * sizeof(size_t));
    size_t bad = 0;
    for (size_t i = 0; i < n; i++) {
        x[i] = input_value(kind, i, n);
        bad += !isfinite((float)x[i]);
    }
    if (kind == MISLEADING) { mislead(x, n); }
    if (strategy == MINK) {
        keep_range(kept, x, 0, n, k, rule, index);
    } else {
        for (size_t t = 0; t < tiles; t++) {
            const size_t end = (t + 1) * DROPIT_TILE < n ? (t + 1) * DROPIT_TILE : n;
            keep_range(kept, x, t * DROPIT_TILE, end, dropit_keep(end - t * DROPIT_TILE, gamma), rule, index);
        }
    }
    for (size_t i = 0; i < n; i++) { expected[i] = kept[i] ? x[i] : (floatX)0.0f; }

    floatX *dx = device<floatX>(n), *out = device<floatX>(n);
    Dropped d = {n, k, device<Threshold>(tiles), device<unsigned>(dropit_segments(n)), device<unsigned>(words), device_values(k)};
    const size_t list = dropit_list_capacity(n);
    DropScratch s = {device<TensorSearch>(1), device<unsigned>(DROPIT_BINS), device<uint2>(tiles), device<unsigned>(tiles),
                     device<floatX>(DROPIT_TILE), device<unsigned>(2), device<floatX>(list), device<unsigned>(list), device<unsigned>(1)};
    TensorSearch search;
    unsigned not_finite = 0;
    cudaCheck(cudaMemcpy(dx, x, n * sizeof(floatX), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemset(s.not_finite, 0, sizeof(unsigned)));
    const DropChoice choice = {dx, d, rule};
    dropit_select(&choice, 1, &s, gamma, main_stream);
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(&not_finite, s.not_finite, sizeof(unsigned), cudaMemcpyDeviceToHost));
    check(not_finite == bad, "n %zu k %zu %s strategy %d: %u values that are not finite reported, expected %zu", n, k, input_names[kind], strategy,
          not_finite, bad);
    // ordinary tensors are searched in the list; those of equal elements, or where the sample errs, in x
    if (strategy == MINK && n > 40000 && k > 0 && k <= n / 2 && (kind == GAUSS || kind == EQUAL || kind == MISLEADING)) {
        cudaCheck(cudaMemcpy(&search, s.search, sizeof(TensorSearch), cudaMemcpyDeviceToHost));
        check((search.listed > 0) == (kind == GAUSS), "n %zu k %zu %s: %u elements listed", n, k, input_names[kind], search.listed);
    }
    // the bitmap, and zeros behind its end
    unsigned* bitmap = (unsigned*)malloc(words * sizeof(unsigned));
    cudaCheck(cudaMemcpy(bitmap, d.bitmap, words * sizeof(unsigned), cudaMemcpyDeviceToHost));
    size_t wrong = 0;
    for (size_t i = 0; i < words * 32; i++) { wrong += (bitmap[i / 32] >> (i % 32) & 1) != (i < n ? kept[i] : 0u); }
    check(wrong == 0, "n %zu k %zu %s strategy %d: %zu elements chosen wrongly", n, k, input_names[kind], strategy, wrong);
    // unpacked at once and in chunks that begin anywhere, and masked
    const size_t cuts[] = {n, 1, 7, 32, 1000, 16384, 30000};
    for (size_t c = 0; c < sizeof(cuts) / sizeof(cuts[0]); c++) {
        if (cuts[c] * 200 < n) { continue; }
        memset((void*)got, 0xff, n * sizeof(floatX));
        for (size_t begin = 0; begin < n; begin += cuts[c]) {
            const size_t end = begin + cuts[c] < n ? begin + cuts[c] : n;
            cudaCheck(cudaMemset(out, 0xff, n * sizeof(floatX)));
            dropit_unpack(out, &d, begin, end, main_stream);
            cudaCheck(cudaMemcpy(got + begin, out, (end - begin) * sizeof(floatX), cudaMemcpyDeviceToHost));
        }
        check(same_bits(got, expected, n), "n %zu k %zu %s strategy %d: unpacking in chunks of %zu", n, k, input_names[kind], strategy, cuts[c]);
        for (size_t begin = 0; begin < n; begin += cuts[c]) {
            const size_t end = begin + cuts[c] < n ? begin + cuts[c] : n;
            cudaCheck(cudaMemcpy(out, x + begin, (end - begin) * sizeof(floatX), cudaMemcpyHostToDevice));
            dropit_mask(out, &d, begin, end, rule, main_stream);
            cudaCheck(cudaMemcpy(got + begin, out, (end - begin) * sizeof(floatX), cudaMemcpyDeviceToHost));
        }
        check(same_bits(got, expected, n), "n %zu k %zu %s strategy %d: masking in chunks of %zu", n, k, input_names[kind], strategy, cuts[c]);
    }
    void* const on_device[] = {dx, out, d.thresholds, d.offsets, d.bitmap, d.values, s.search, s.histogram, s.tile_counts, s.tile_offsets,
                               s.sample, s.range, s.list_values, s.list_indices, s.not_finite};
    for (size_t i = 0; i < sizeof(on_device) / sizeof(on_device[0]); i++) { cudaCheck(cudaFree(on_device[i])); }
    free(x);
    free((void*)expected);
    free((void*)got);
    free(kept);
    free(index);
    free(bitmap);
}

static DropScratch scratch_new(size_t tiles, size_t list) {
    return {device<TensorSearch>(MAX_SELECTIONS), device<unsigned>(MAX_SELECTIONS * DROPIT_BINS), device<uint2>(tiles), device<unsigned>(tiles),
            device<floatX>(MAX_SELECTIONS * DROPIT_TILE), device<unsigned>(MAX_SELECTIONS * 2), device<floatX>(list), device<unsigned>(list),
            device<unsigned>(1)};
}

static void scratch_free(const DropScratch& s) {
    void* const all[] = {s.search, s.histogram, s.tile_counts, s.tile_offsets, s.sample, s.range, s.list_values, s.list_indices, s.not_finite};
    for (void* p : all) { cudaCheck(cudaFree(p)); }
}

// four tensors in the same launches, the third of which stores its threshold alone, get the bits that each gets by itself
static void test_together(int strategy) {
    const size_t sizes[4] = {50000, 33, 16384 + 1, 3 * 16384};
    const double gamma = 0.7;
    size_t tiles = 0, list = 0;
    for (size_t n : sizes) {
        tiles += dropit_tiles(n);
        list += align_up(dropit_list_capacity(n));
    }
    const DropScratch s = scratch_new(tiles, list);
    DropChoice choices[4], alone[4];
    for (int i = 0; i < 4; i++) {
        const size_t n = sizes[i];
        floatX* host = (floatX*)malloc(n * sizeof(floatX));
        for (size_t j = 0; j < n; j++) { host[j] = input_value(i == 1 ? FEW : GAUSS, j + 1000 * i, n); }
        floatX* x = to_device(host, n);
        free((void*)host);
        for (DropChoice* c : {&choices[i], &alone[i]}) {
            Dropped d = {n, dropit_k(n, gamma, strategy), device<Threshold>(dropit_tiles(n)), i == 2 ? NULL : device<unsigned>(dropit_segments(n)),
                         device<unsigned>(dropit_words(n)), device<floatX>(n + 1)};
            cudaCheck(cudaMemset(d.bitmap, 0, dropit_words(n) * sizeof(unsigned)));
            cudaCheck(cudaMemset(d.values, 0, (n + 1) * sizeof(floatX)));
            *c = {x, d, DropRule{strategy, 77ull + i, 5}};
        }
    }
    dropit_select(choices, 4, &s, gamma, main_stream);
    for (int i = 0; i < 4; i++) { dropit_select(&alone[i], 1, &s, gamma, main_stream); }
    cudaCheck(cudaDeviceSynchronize());
    for (int i = 0; i < 4; i++) {
        const size_t n = sizes[i];
        const Dropped a = choices[i].d, b = alone[i].d;
        const bool same = same_on_device(a.thresholds, b.thresholds, strategy == MINK ? 1 : dropit_tiles(n)) &&
                          same_on_device(a.bitmap, b.bitmap, dropit_words(n)) && same_on_device(a.values, b.values, n + 1) &&
                          (i == 2 || same_on_device(a.offsets, b.offsets, dropit_segments(n)));
        check(same, "strategy %d: tensor %d of four chosen together", strategy, i);
        for (const Dropped& d : {a, b}) {
            void* const all[] = {d.thresholds, d.offsets, d.bitmap, (void*)d.values};
            for (void* p : all) { cudaCheck(cudaFree(p)); }
        }
        cudaCheck(cudaFree((void*)choices[i].x));
    }
    scratch_free(s);
}

// GELU and LayerNorm that mask as they write give what masking their outputs gives, in chunks, with many ties at the threshold or none
static void test_masking_kernels(size_t rows, size_t C, bool coarse, double gamma) {
    const size_t n = rows * C, parts[] = {rows, 3};
    const DropRule rule = {MINK, 0, 0};
    const DropScratch s = scratch_new(dropit_tiles(n), dropit_list_capacity(n));
    floatX* host = (floatX*)malloc((n + 2 * C) * sizeof(floatX)); // input, weight, bias
    floatX *out = device<floatX>(n), *masked = device<floatX>(n);
    float *mean = device<float>(rows), *rstd = device<float>(rows);
    Dropped d = {n, dropit_k(n, gamma, MINK), device<Threshold>(1), NULL, NULL, NULL};
    for (size_t i = 0; i < n; i++) {
        const float g = (float)input_value(GAUSS, i, n);
        host[i] = (floatX)(coarse ? rintf(2.0f * g) / 2.0f : g);
    }
    for (size_t c = 0; c < C; c++) { host[n + c] = (floatX)1.25f, host[n + C + c] = (floatX)0.1f; }
    floatX *inp = to_device(host, n), *weight = to_device(host + n, C), *bias = to_device(host + n + C, C);
    free((void*)host);
    for (int kind = 0; kind < 2; kind++) {
        auto run = [&](floatX* to, size_t begin, size_t count, bool mask) {
            const KeepLargest keep = {mask ? d.thresholds : NULL, begin * C};
            const floatX* from = inp + begin * C;
            if (kind == 0) { gelu_forward(to, from, count * C, keep); }
            else { layernorm_forward(to, mean, rstd, from, weight, bias, count, C, C, keep); }
        };
        run(out, 0, rows, false);
        const DropChoice choice = {out, d, rule};
        dropit_select(&choice, 1, &s, gamma, main_stream);
        dropit_mask(out, &d, 0, n, rule, main_stream);
        for (size_t part : parts) {
            cudaCheck(cudaMemset(masked, 0xff, n * sizeof(floatX)));
            for (size_t begin = 0; begin < rows; begin += part) { run(masked + begin * C, begin, rows - begin < part ? rows - begin : part, true); }
            cudaCheck(cudaDeviceSynchronize());
            check(same_on_device(masked, out, n), "%s of %zu x %zu, %s, gamma %g, %zu rows at a time: masked as it is written", kind == 0 ? "gelu" : "layernorm",
                  rows, C, coarse ? "few values" : "gauss", gamma, part);
        }
    }
    void* const all[] = {(void*)inp, (void*)out, (void*)masked, (void*)weight, (void*)bias, mean, rstd, d.thresholds};
    for (void* p : all) { cudaCheck(cudaFree(p)); }
    scratch_free(s);
}

int main(int argc, char** argv) {
    const bool quick = argc > 1 && strcmp(argv[1], "-quick") == 0; // for the sanitizers, which are slow
    device_open();
    check(dropit_keep(1000, 0.9) == 99 && dropit_keep(1000, 0.5) == 500 && dropit_keep(10, 0.999) == 0, "k is int(n * (1 - gamma)) in double");
    const size_t sizes[] = {1, 31, 33, 16384, 16384 + 1, 50000, ((size_t)1 << 20) + 1};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        const size_t n = sizes[i];
        const bool few = n > (quick ? 10000 : 100000);
        if (quick && n > 100000) { continue; }
        for (int kind = 0; kind < NUM_INPUTS; kind++) {
            if (few && kind != GAUSS && kind != EQUAL && kind != NOT_A_NUMBER && kind != MISLEADING) { continue; }
            const size_t ks[] = {dropit_keep(n, 0.7), 0, n - 1, n, n / 2};
            for (size_t j = 0; j < (few ? 2 : 5); j++) { test_case(n, ks[j], 0.0, kind, MINK); }
            const double gammas[] = {0.7, 0.99999, 0.5};
            for (int j = 0; j < (few ? 1 : 3); j++) {
                test_case(n, dropit_k(n, gammas[j], FASTMINK), gammas[j], kind, FASTMINK);
                test_case(n, dropit_k(n, gammas[j], RANDOM), gammas[j], kind, RANDOM);
            }
        }
    }
    for (int strategy : {MINK, FASTMINK, RANDOM}) { test_together(strategy); }
    for (int i = 0; i < 8; i++) { test_masking_kernels(i & 1 ? 40 : 7, i & 2 ? 64 : 37, (i & 4) != 0, i == 3 ? 0.99999 : 0.7); }
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
