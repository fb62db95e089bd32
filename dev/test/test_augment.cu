/*
The augmentation of train_deit.cu: RandAugment against Pillow and timm, mixup, cutmix and their loss against timm and PyTorch (the fixture is
dev/reference/augment.py's), and what is drawn against the formulas. Prints for each operation how far it is from Pillow.

build and run: make test   (or dev/cpu's recipe on this file); the exit code is the verdict
*/

#define TESTING
#include "../../train_deit.cu"
#include "check.cuh"

static const char* const names[NUM_AUGMENTS] = {"none", "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color",
    "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"};
#ifdef ENABLE_FP32
#define TOLERANCE 1e-6
#else
#define TOLERANCE 4e-3 // half a unit of bf16's last place
#endif

static bool is_affine(int op) { return op == ROTATE || op >= SHEAR_X; }

template <class T> static T* to_device(const T* host, size_t n) {
    T* p;
    cudaCheck(cudaMalloc((void**)&p, n * sizeof(T)));
    cudaCheck(cudaMemcpy(p, host, n * sizeof(T), cudaMemcpyHostToDevice));
    return p;
}

template <class T> static T* to_host(T* device, size_t n) {
    T* p = (T*)malloc(n * sizeof(T));
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(p, device, n * sizeof(T), cudaMemcpyDeviceToHost));
    cudaCheck(cudaFree(device));
    return p;
}

static const void* fixture(const Safetensors* st, const char* group, int i, const char* name, size_t* shape = NULL) {
    char key[64];
    if (i >= 0) { snprintf(key, sizeof(key), "%s.%d.%s", group, i, name); } else { snprintf(key, sizeof(key), "%s%s", group, name); }
    const StTensor* t = safetensors_find(st, key);
    require(t != NULL, "the fixture has no %s; run dev/reference/augment.py", key);
    for (int k = 0; shape != NULL && k < t->dims; k++) { shape[k] = t->shape[k]; }
    return t->data;
}

// augments (layers, n) on n images of the host; flips NULL: none
static uint8_t* augmented(const uint8_t* images, const int* flips, const ImageAugment* augments, int layers, size_t n, int S, int CH, Pixel fill) {
    const size_t bytes = n * S * S * CH;
    uint8_t *device = to_device(images, bytes), *scratch = to_device(images, bytes), *tables;
    int* none = (int*)calloc(n, sizeof(int));
    int* device_flips = to_device(flips != NULL ? flips : none, n);
    ImageAugment* device_augments = to_device(augments, layers * n);
    cudaCheck(cudaMalloc((void**)&tables, n * CH * 256));
    augment_images(device, scratch, tables, device_flips, device_augments, layers, n, S, CH, fill, main_stream);
    uint8_t* out = to_host(device, bytes);
    int* left = to_host(device_flips, n);
    check(memcmp(left, none, n * sizeof(int)) == 0, "flips stay after augment_images");
    cudaCheck(cudaFree(scratch));
    cudaCheck(cudaFree(tables));
    cudaCheck(cudaFree(device_augments));
    free(none);
    free(left);
    return out;
}

typedef struct {
    double sum;
    size_t n, different;
    int largest;
} Distance;

// every operation at several levels and both signs, against Pillow
static void test_operations(const Safetensors* st, int picture, Distance* distances) {
    size_t shape[4], cases_shape[2];
    const uint8_t* image = (const uint8_t*)fixture(st, "op", picture, "image", shape);
    const float* cases = (const float*)fixture(st, "op", picture, "cases", cases_shape);
    const int* fills = (const int*)fixture(st, "op", picture, "fill");
    const uint8_t* expected = (const uint8_t*)fixture(st, "op", picture, "expected");
    const size_t n = cases_shape[0], S = shape[0], CH = shape[2], bytes = S * S * CH;
    uint8_t* images = (uint8_t*)malloc(n * bytes);
    ImageAugment* augments = (ImageAugment*)malloc(n * sizeof(ImageAugment));
    Pixel fill = {};
    for (size_t c = 0; c < CH; c++) { fill.v[c] = (uint8_t)fills[c]; }
    for (size_t i = 0; i < n; i++) {
        memcpy(images + i * bytes, image, bytes);
        augment_argument(&augments[i], (int)cases[3 * i], cases[3 * i + 1], cases[3 * i + 2] != 0.0f, (int)S);
    }
    uint8_t* out = augmented(images, NULL, augments, 1, n, (int)S, (int)CH, fill);
    for (size_t i = 0; i < n; i++) {
        Distance d = {};
        for (size_t j = 0; j < bytes; j++) {
            const int difference = abs((int)out[i * bytes + j] - (int)expected[i * bytes + j]);
            d.sum += difference;
            d.different += difference > 0;
            d.largest = difference > d.largest ? difference : d.largest;
        }
        const int op = augments[i].op;
        check(is_affine(op) ? d.largest <= 1 && d.different <= bytes / 1000 : d.largest == 0, "%s at level %g%s of picture %d: %zu of %zu values differ, by up to %d",
              names[op], cases[3 * i + 1], cases[3 * i + 2] != 0.0f ? ", negated," : "", picture, d.different, bytes, d.largest);
        distances[op].sum += d.sum;
        distances[op].n += bytes;
        distances[op].different += d.different;
        distances[op].largest = d.largest > distances[op].largest ? d.largest : distances[op].largest;
    }
    free(images);
    free(augments);
    free(out);
}

static uint8_t* noise_images(size_t n) {
    uint8_t* images = (uint8_t*)malloc(n);
    for (size_t i = 0; i < n; i++) { images[i] = (uint8_t)(philox(9, 95, 0, i / 7).x % 200 + philox(9, 95, 1, i).x % 56); }
    return images;
}

// layers in one call are layers one after the other, a flag to mirror is a mirrored image, and channels go their own ways where the operation lets them
static void test_composition(int S, int CH) {
    const int n = 2 * NUM_AUGMENTS + 3, layers = 3;
    const size_t pixels = (size_t)S * S, bytes = pixels * CH;
    const Pixel fill = {{7, 200, 31, 255}};
    uint8_t *images = noise_images(n * bytes), *mirrored = (uint8_t*)malloc(n * bytes);
    ImageAugment* augments = (ImageAugment*)malloc(layers * n * sizeof(ImageAugment));
    int* flips = (int*)malloc(n * sizeof(int));
    for (int i = 0; i < layers * n; i++) { augment_argument(&augments[i], (i / n * 5 + i % n) % NUM_AUGMENTS, i % 11, i % 3 == 0, S); }
    for (int b = 0; b < n; b++) {
        flips[b] = b % 2;
        for (size_t j = 0; j < bytes; j++) {
            const size_t c = j % CH, w = j / CH % S, h = j / CH / S;
            mirrored[b * bytes + j] = images[b * bytes + (h * S + (flips[b] ? S - 1 - w : w)) * CH + c];
        }
    }
    uint8_t *at_once = augmented(images, flips, augments, layers, n, S, CH, fill), *one_by_one = mirrored;
    for (int layer = 0; layer < layers; layer++) {
        uint8_t* next = augmented(one_by_one, NULL, augments + layer * n, 1, n, S, CH, fill);
        if (layer == 0 && CH > 1) {
            uint8_t* channel = (uint8_t*)malloc(n * pixels);
            for (int c = 0; c < CH; c++) {
                for (size_t j = 0; j < n * pixels; j++) { channel[j] = one_by_one[j * CH + c]; }
                uint8_t* alone = augmented(channel, NULL, augments, 1, n, S, 1, Pixel{{fill.v[c]}});
                for (int b = 0; b < n; b++) {
                    size_t different = 0;
                    for (size_t j = b * pixels; j < (b + 1) * pixels; j++) { different += alone[j] != next[j * CH + c]; }
                    const int op = augments[b].op;
                    check(op == CONTRAST || (op == COLOR && CH == 3) || different == 0, "%s, channel %d of %d at size %d: %zu values are not those of the "
                          "channel alone", names[op], c, CH, S, different);
                }
                free(alone);
            }
            free(channel);
        }
        free(one_by_one);
        one_by_one = next;
    }
    for (int b = 0; b < n; b++) {
        check(memcmp(at_once + b * bytes, one_by_one + b * bytes, bytes) == 0, "three layers at once, %s first, are not three calls: size %d, %d channels",
              names[augments[b].op], S, CH);
    }
    free(images);
    free(at_once);
    free(one_by_one);
    free(augments);
    free(flips);
}

// a batch's images depend on their places alone, not on the batch
static void test_batch(int S, int CH) {
    const size_t n = 9, bytes = (size_t)S * S * CH, half = 4;
    Augmenter a = *augment_new("rand-m9-mstd0.5-n3-inc1");
    Plan plan = {};
    augment_plan(&plan, &a, n, S, CH);
    for (const Allocation& line : plan.lines) { cudaCheck(cudaMalloc(line.pointer, line.bytes)); }
    uint8_t *images = noise_images(n * bytes), *whole = to_device(images, n * bytes), *halves = to_device(images, n * bytes);
    int *flips = (int*)calloc(n, sizeof(int)), *device_flips = to_device(flips, n);
    const PixelStats stats = {{0.5f, 0.2f, 1.5f, 0.0f}, {1.0f, 1.0f, 1.0f, 1.0f}};
    const BatchAugment from0 = {NULL, 5, 100, 3, 2, 0, 1.0f, false, 0, 0, 0, 0};
    BatchAugment from_half = from0;
    from_half.place += 3 * half;
    const Batch batches[3] = {{whole, NULL, device_flips, n, stats, 0.0f, from0, NULL}, {halves, NULL, device_flips, half, stats, 0.0f, from0, NULL},
                              {halves + half * bytes, NULL, device_flips, n - half, stats, 0.0f, from_half, NULL}};
    for (const Batch& batch : batches) {
        model_augment(&a, &batch, main_stream);
        cudaCheck(cudaDeviceSynchronize());
    }
    uint8_t *out = to_host(whole, n * bytes), *again = to_host(halves, n * bytes);
    check(memcmp(out, again, n * bytes) == 0, "two half batches are not the batch");
    check(memcmp(out, images, n * bytes) != 0, "nothing was augmented");
    for (const Allocation& line : plan.lines) { cudaCheck(cudaFree(*line.pointer)); }
    cudaCheck(cudaFree(device_flips));
    cudaCheck(cudaFreeHost(a.host_augments));
    free(images);
    free(out);
    free(again);
    free(flips);
}

// pixel (h, w), channel c of image b in patches
static size_t patch_index(size_t b, size_t h, size_t w, size_t c, size_t S, size_t P, size_t CH) {
    return ((b * (S / P) * (S / P) + h / P * (S / P) + w / P) * CH + c) * P * P + h % P * P + w % P;
}

// mixed batches, the loss of their targets and its gradient, against timm; P divides the 15 pixels
static void test_mix(const Safetensors* st, int P) {
    size_t shape[4], params_shape[2], logits_shape[3];
    const uint8_t* images = (const uint8_t*)fixture(st, "mix.", -1, "images", shape);
    const int* labels = (const int*)fixture(st, "mix.", -1, "labels");
    const float* params = (const float*)fixture(st, "mix.", -1, "params", params_shape);
    const float *mixed = (const float*)fixture(st, "mix.", -1, "mixed"), *logits = (const float*)fixture(st, "mix.", -1, "logits", logits_shape);
    const float *losses = (const float*)fixture(st, "mix.", -1, "losses"), *grads = (const float*)fixture(st, "mix.", -1, "grads");
    const float* targets = (const float*)fixture(st, "mix.", -1, "targets");
    const size_t B = shape[0], S = shape[1], CH = shape[3], n = B * S * S * CH, V = logits_shape[2];
    const PixelStats stats = {{0.485f, 0.456f, 0.406f}, {0.229f, 0.224f, 0.225f}};
    for (size_t i = 0; i < params_shape[0]; i++) {
        const float* p = params + 7 * i;
        BatchAugment a = {};
        a.n = (int)B;
        a.lam = p[0];
        a.cut = p[1] != 0.0f;
        a.top = (int)p[3], a.bottom = (int)p[4], a.left = (int)p[5], a.right = (int)p[6];
        int *flips = (int*)calloc(B, sizeof(int)), *device_flips = to_device(flips, B), *device_labels = to_device(labels, B);
        uint8_t* device_images = to_device(images, n);
        floatX *patches, *x = (floatX*)malloc(B * V * sizeof(floatX));
        cudaCheck(cudaMalloc((void**)&patches, n * sizeof(floatX)));
        patchify(patches, device_images, device_flips, stats, a, B, (int)S, P, (int)CH);
        floatX* out = to_host(patches, n);
        double worst = 0.0;
        for (size_t j = 0; j < n; j++) {
            const size_t w = j % S, h = j / S % S, c = j / S / S % CH, b = j / S / S / CH;
            const double e = fabs((double)(float)out[patch_index(b, h, w, c, S, P, CH)] - mixed[i * n + j]) / fmax(1.0, fabs(mixed[i * n + j]));
            if (!(e <= worst)) { worst = e; }
        }
        printf("mix    lam %.4f%s, patches of %d: %.2g from timm\n", p[0], a.cut ? ", cut" : "", P, worst);
        check(worst <= TOLERANCE, "batch %zu mixed: %.2g", i, worst);

        for (size_t j = 0; j < B * V; j++) { x[j] = (floatX)logits[i * B * V + j]; }
        floatX* device_logits = to_device(x, B * V);
        StepResult zero = {}, *result = to_device(&zero, 1);
        float* image_losses;
        int* image_ranks;
        cudaCheck(cudaMalloc((void**)&image_losses, B * sizeof(float)));
        cudaCheck(cudaMalloc((void**)&image_ranks, B * sizeof(int)));
        cross_entropy(result, image_losses, image_ranks, device_logits, device_labels, (int)B, (int)V, p[2], a.lam, 1.0f / B);
        floatX* d = to_host(device_logits, B * V);
        StepResult* r = to_host(result, 1);
        unsigned top1 = 0, top5 = 0;
        double gradient = 0.0, target = 0.0;
        for (size_t b = 0; b < B; b++) {
            const int label = labels[a.lam < 0.5f ? B - 1 - b : b];
            double sum = 0.0;
            unsigned before = 0;
            for (size_t v = 0; v < V; v++) {
                before += (float)x[b * V + v] > (float)x[b * V + label] || ((float)x[b * V + v] == (float)x[b * V + label] && (int)v < label);
                sum += exp((float)x[b * V + v]);
            }
            top1 += before < 1;
            top5 += before < 5;
            for (size_t v = 0; v < V; v++) {
                const size_t j = b * V + v;
                gradient = fmax(gradient, fabs((float)d[j] - grads[i * B * V + j]));
                target = fmax(target, fabs(exp((float)x[j]) / sum - B * (double)(float)d[j] - targets[i * B * V + j]));
                if (isnan((float)d[j])) { gradient = NAN; }
            }
        }
        const double loss = fabs(r->sums[0] / B - losses[i]);
        check(gradient <= TOLERANCE, "gradient of mixed targets %zu: %.2g from PyTorch", i, gradient);
        check(loss <= TOLERANCE * 5, "loss of mixed targets %zu: %.2g from PyTorch", i, loss);
        check(target <= B * TOLERANCE, "targets %zu: %.2g from timm", i, target);
        check(r->sums[1] == top1 && r->sums[2] == top5, "ranks of mixed targets %zu: %u %u, expected %u %u", i, (unsigned)r->sums[1], (unsigned)r->sums[2], top1, top5);
        cudaCheck(cudaFree(device_images));
        cudaCheck(cudaFree(device_flips));
        cudaCheck(cudaFree(device_labels));
        cudaCheck(cudaFree(image_losses));
        cudaCheck(cudaFree(image_ranks));
        free(flips);
        free(out);
        free(x);
        free(d);
        free(r);
    }
}

static void test_boxes(const Safetensors* st) {
    size_t shape[2];
    const double* rows = (const double*)fixture(st, "boxes", -1, "", shape);
    for (size_t i = 0; i < shape[0]; i++) {
        const double* r = rows + 9 * i;
        BatchAugment a = {};
        cutmix_box(&a, r[0], (int)r[2], (int)r[3], (int)r[1]);
        check(a.top == r[4] && a.bottom == r[5] && a.left == r[6] && a.right == r[7] && a.lam == (float)r[8], "cutmix box of lam %g at (%g, %g) of %g: %d-%d %d-%d %g",
              r[0], r[2], r[3], r[1], a.top, a.bottom, a.left, a.right, a.lam);
    }
}

// erasing and mixing in patchify, flips too, against plain loops
static void test_erase(int B, int S, int P, int CH, float lam, bool cut) {
    const size_t n = (size_t)B * S * S * CH;
    const PixelStats stats = {{0.3f, 0.4f, 0.5f, 0.6f}, {0.2f, 0.25f, 0.3f, 0.35f}};
    uint8_t *images = noise_images(n), *device_images = to_device(images, n);
    int* flips = (int*)malloc(B * sizeof(int));
    EraseBox* boxes = (EraseBox*)malloc(B * sizeof(EraseBox));
    for (int b = 0; b < B; b++) {
        flips[b] = b % 2;
        boxes[b] = draw_erase(b == 0 ? 0.0 : 1.0, 3, 1, b, S);
    }
    int* device_flips = to_device(flips, B);
    EraseBox* device_boxes = to_device(boxes, B);
    const BatchAugment a = {device_boxes, 8, 1ull << 31, 3, 4, B, lam, cut, S / 3, S - 1, 2, S / 2};
    floatX *patches, *out;
    cudaCheck(cudaMalloc((void**)&patches, n * sizeof(floatX)));
    patchify(patches, device_images, device_flips, stats, a, B, S, P, CH);
    out = to_host(patches, n);
    double worst = 0.0;
    for (int b = 0; b < B; b++) {
        for (int j = 0; j < S * S * CH; j++) {
            const int w = j % S, h = j / S % S, c = j / S / S;
            double x[2];
            for (int k = 0; k < 2; k++) {
                const int i = k == 0 ? b : B - 1 - b;
                const EraseBox e = boxes[i];
                x[k] = (images[(((size_t)i * S + h) * S + (flips[i] ? S - 1 - w : w)) * CH + c] / 255.0 - stats.mean[c]) / stats.std[c];
                if (h >= e.top && h < e.top + e.height && w >= e.left && w < e.left + e.width) {
                    const uint4 u = philox(8, RNG_ERASE, 4, ((1ull << 31) + 3 * i) << 32 | (unsigned)(h * S + w));
                    const double length = sqrt(-2.0 * log(uniform(c < 2 ? u.x : u.z))), turn = 2.0 * M_PI * (c < 2 ? u.y : u.w) / 4294967296.0;
                    x[k] = length * (c % 2 ? sin(turn) : cos(turn));
                }
            }
            const double expected = !cut ? (double)lam * x[0] + (1.0 - lam) * x[1] : x[h >= a.top && h < a.bottom && w >= a.left && w < a.right && lam < 1.0f];
            const double e = fabs((double)(float)out[patch_index(b, h, w, c, S, P, CH)] - expected) / fmax(1.0, fabs(expected));
            if (!(e <= worst)) { worst = e; }
        }
    }
    check(worst <= 3 * TOLERANCE, "patchify with erasing, %d x %d / %d x %d, lam %g: %.2g", B, S, P, CH, lam, worst);
    cudaCheck(cudaFree(device_images));
    cudaCheck(cudaFree(device_flips));
    cudaCheck(cudaFree(device_boxes));
    free(images);
    free(flips);
    free(boxes);
    free(out);
}

static int ascending(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return x < y ? -1 : x > y;
}

// largest distance between n sorted draws and a distribution's values there, in units in which 1.95 is exceeded once in 1000 times (Kolmogorov, Smirnov)
static double kolmogorov(const double* cdf, size_t n) {
    double worst = 0.0;
    for (size_t i = 0; i < n; i++) { worst = fmax(worst, fmax(cdf[i] - (double)i / n, (i + 1.0) / n - cdf[i])); }
    return worst * sqrt((double)n);
}

// integral of t^(alpha-1) (1-t)^(alpha-1) from 0 to x <= 1/2: Simpson's rule in t^alpha, in which nothing is infinite
static double half_beta(double alpha, double x) {
    const int pieces = 60;
    const double end = pow(x, alpha), step = end / pieces;
    double sum = 0.0;
    for (int i = 0; i <= pieces; i++) {
        sum += (i == 0 || i == pieces ? 1.0 : i % 2 ? 4.0 : 2.0) * pow(1.0 - pow(i * step, 1.0 / alpha), alpha - 1.0);
    }
    return sum * step / 3.0 / alpha;
}

static void test_beta(double alpha) {
    const size_t n = 20000;
    double *draws = (double*)malloc(n * sizeof(double)), mean = 0.0, variance = 0.0;
    for (size_t i = 0; i < n; i++) {
        unsigned long long at = 0;
        draws[i] = draw_beta(alpha, 6, (unsigned)i, &at);
        mean += draws[i] / n;
    }
    for (size_t i = 0; i < n; i++) { variance += (draws[i] - mean) * (draws[i] - mean) / n; }
    qsort(draws, n, sizeof(double), ascending);
    const bool inside = draws[0] >= 0.0 && draws[n-1] <= 1.0;
    const double expected = 1.0 / (4.0 * (2.0 * alpha + 1.0)), whole = 2.0 * half_beta(alpha, 0.5);
    for (size_t i = 0; i < n; i++) { draws[i] = draws[i] < 0.5 ? half_beta(alpha, draws[i]) / whole : 1.0 - half_beta(alpha, 1.0 - draws[i]) / whole; }
    const double d = kolmogorov(draws, n);
    printf("beta   alpha %g: mean %.4f, variance %.5f of %.5f, distance %.2f\n", alpha, mean, variance, expected, d);
    check(inside && fabs(mean - 0.5) <= 4.0 * sqrt(expected / n) && fabs(variance / expected - 1.0) <= 0.04 && d <= 1.95, "Beta(%g): mean %g, variance %g of %g, "
          "distance %g", alpha, mean, variance, expected, d);
    free(draws);
}

// a count of n draws of probability p is where it should be, but once in 15000 times
static bool likely(double count, double n, double p) { return fabs(count - n * p) <= 4.0 * sqrt(n * p * (1.0 - p)) + 1e-9; }

static void test_draws(const Safetensors* st) {
    const Augmenter* o = augment_new("rand-m9-mstd0.5-inc1");
    check(o->layers == 2 && o->magnitude == 9 && o->magnitude_std == 0.5, "rand-m9-mstd0.5-inc1 is %d layers, magnitude %d, deviation %g", o->layers, o->magnitude, o->magnitude_std);
    const int n = 60000;
    unsigned counts[NUM_AUGMENTS] = {}, negated = 0, signs = 0, top = 0, pairs = 0;
    double level = 0.0, square = 0.0;
    ImageAugment a, b;
    for (int i = 0; i < n; i++) {
        draw_augment(&a, o, 1, 3, (unsigned long long)i, 0, 224);
        draw_augment(&b, o, 1, 3, (unsigned long long)i, 1, 224);
        counts[a.op]++;
        pairs += a.op != NO_AUGMENT && a.op == b.op;
        if (a.op == TRANSLATE_X || a.op == TRANSLATE_Y) {
            const double l = (a.op == TRANSLATE_X ? a.matrix[2] : a.matrix[5]) / (0.45 * 224) * 10.0;
            signs++;
            negated += l < 0.0;
            top += fabs(l) == 10.0;
            level += fabs(l);
            square += l * l;
        }
    }
    check(likely(counts[NO_AUGMENT], n, 0.5), "%u of %d operations are left out", counts[NO_AUGMENT], n);
    for (int op = 1; op < NUM_AUGMENTS; op++) { check(likely(counts[op], n, 0.5 / 15), "%s is drawn %u times of %d", names[op], counts[op], n); }
    check(likely(pairs, n, 0.25 / 15), "%u of %d images meet an operation twice", pairs, n);
    level /= signs;
    // of a normal (9, 0.5) clipped at 10: P(10) = 0.02275, mean 8.99575, deviation 0.48876
    const double deviation = sqrt(square / signs - level * level);
    printf("draws  %u of %u negated, level %.3f +- %.3f, %u at the top\n", negated, signs, level, deviation, top);
    check(likely(negated, signs, 0.5) && likely(top, signs, 0.0227501) && fabs(level - 8.99575) <= 4.0 * 0.489 / sqrt(signs) && fabs(deviation - 0.48876) <= 0.025,
          "magnitudes: %u negated, %u at the top of %u, mean %g, deviation %g", negated, top, signs, level, deviation);

    size_t shape[2];
    const double* rows = (const double*)fixture(st, "erase", -1, "", shape);
    for (size_t i = 0; i < shape[0]; i++) { // S, n, share, means and deviations of height, width, top, left
        const double* r = rows + 11 * i;
        const int S = (int)r[0], count = 40000;
        double sum[4] = {}, erased = 0.0;
        bool inside = true;
        for (int j = 0; j < count; j++) {
            const EraseBox e = draw_erase(0.25, 2, 5, (unsigned long long)j, S);
            const double x[4] = {(double)e.height, (double)e.width, (double)e.top, (double)e.left};
            erased += e.height > 0;
            inside = inside && e.top >= 0 && e.left >= 0 && e.top + e.height <= S && e.left + e.width <= S && e.height < S && e.width < S;
            for (int k = 0; k < 4; k++) { sum[k] += x[k]; }
        }
        printf("erase  size %d: %.4f erased, height %.2f width %.2f top %.2f left %.2f; timm %.4f %.2f %.2f %.2f %.2f\n", S, erased / count, sum[0] / erased, sum[1] / erased,
               sum[2] / erased, sum[3] / erased, r[2], r[3], r[4], r[5], r[6]);
        check(inside && likely(erased, count, 0.25), "boxes of size %d: %g of %d", S, erased, count);
        for (int k = 0; k < 4; k++) {
            check(fabs(sum[k] / erased - r[3 + k]) <= 4.0 * r[7 + k] * sqrt(1.0 / erased + 1.0 / (r[1] * r[2])), "boxes of size %d: mean %d is %g, timm's %g", S, k,
                  sum[k] / erased, r[3 + k]);
        }
    }

    ImageData mix = {};
    mix.mix = 0.7;
    mix.mix_switch = 0.3;
    unsigned mixes = 0, cuts = 0, equal = 0, off = 0;
    BatchAugment m = {};
    for (int kind = 0; kind < 4; kind++) { // mixup 1, cutmix 2
        mix.mixup = kind & 1 ? 0.8 : 0.0;
        mix.cutmix = kind & 2 ? 1.0 : 0.0;
        for (int i = 0; i < 20000; i++) {
            m.lam = 1.0f;
            draw_mix(&m, &mix, 4, i, 224);
            if (kind == 3) {
                mixes += m.lam < 1.0f;
                cuts += m.cut && m.lam < 1.0f;
                const float lam = m.lam;
                rank = 1;
                m.lam = 1.0f;
                draw_mix(&m, &mix, 4, i, 224);
                equal += m.lam == lam && lam < 1.0f;
                rank = 0;
            } else if (kind == 0 ? m.lam < 1.0f : m.cut != (kind == 2)) { off++; }
        }
    }
    printf("mix    %u of 20000 batches, %u by cutmix\n", mixes, cuts);
    check(likely(mixes, 20000, 0.7) && likely(cuts, mixes, 0.3) && off == 0 && equal < 20, "%u batches mixed, %u cut, %u wrong, %u alike on two ranks", mixes, cuts, off, equal);
}

// the noise of erased pixels is normal, and another in each channel
static void test_noise(void) {
    const int S = 40, CH = 4, P = 8, count = S * S * CH;
    uint8_t *pixels = noise_images(count), *images = to_device(pixels, count);
    const int flip = 0;
    int* flips = to_device(&flip, 1);
    const EraseBox all = {0, 0, S, S};
    EraseBox* box = to_device(&all, 1);
    const PixelStats stats = {{0, 0, 0, 0}, {1, 1, 1, 1}};
    const BatchAugment a = {box, 1, 0, 1, 0, 1, 1.0f, false, 0, 0, 0, 0};
    floatX* patches;
    cudaCheck(cudaMalloc((void**)&patches, count * sizeof(floatX)));
    patchify(patches, images, flips, stats, a, 1, S, P, CH);
    floatX* out = to_host(patches, count);
    double *x = (double*)malloc(count * sizeof(double));
    for (int c = 0; c < CH; c++) {
        for (int i = 0; i < S * S; i++) { x[c * S * S + i] = (float)out[patch_index(0, i / S, i % S, c, S, P, CH)]; }
    }
    for (int c = 0; c < CH; c++) {
        for (int other = 0; other < c; other++) {
            double product = 0.0;
            for (int i = 0; i < S * S; i++) { product += x[c * S * S + i] * x[other * S * S + i]; }
            check(fabs(product) <= 4.0 * S, "noise of erased pixels: channels %d and %d are correlated by %g", c, other, product / (S * S));
        }
    }
    qsort(x, count, sizeof(double), ascending);
    for (int i = 0; i < count; i++) { x[i] = 0.5 * erfc(-x[i] / sqrt(2.0)); }
    const double d = kolmogorov(x, count);
    check(d <= 1.95, "noise of erased pixels: distance %g from the normal distribution", d);
    free(x);
    free(out);
    free(pixels);
    cudaCheck(cudaFree(images));
    cudaCheck(cudaFree(flips));
    cudaCheck(cudaFree(box));
}

int main(void) {
    device_open();
    const Safetensors* st = safetensors_open("dev/reference/fixtures/augment.safetensors");
    Distance distances[NUM_AUGMENTS] = {};
    for (int picture = 0; picture < 3; picture++) { test_operations(st, picture, distances); }
    for (int op = 1; op < NUM_AUGMENTS; op++) {
        printf("op     %-12s mean %.6f levels from Pillow, largest %d, %zu of %zu values differ\n", names[op], distances[op].sum / distances[op].n, distances[op].largest,
               distances[op].different, distances[op].n);
        check(distances[op].n > 0, "%s is not in the fixture", names[op]);
    }
    for (int CH = 1; CH <= 4; CH++) {
        test_composition(19, CH);
        test_composition(22, CH);
    }
    test_batch(33, 3);
    test_batch(36, 1);
    test_mix(st, 5);
    test_mix(st, 15);
    test_boxes(st);
    test_erase(5, 21, 7, 3, 1.0f, false);
    test_erase(6, 28, 4, 1, 0.3f, false);
    test_erase(5, 32, 8, 4, 0.6f, true);
    test_erase(3, 48, 16, 3, 0.9f, false);
    test_noise();
    for (double alpha : {0.25, 0.8, 1.0, 4.0}) { test_beta(alpha); }
    test_draws(st);
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
