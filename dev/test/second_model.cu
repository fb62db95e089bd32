/*
A model of its own on the shared sections of the trainers. It uses what they promise to any model and DeiT
does not use: a FROZEN stem, blocks of different widths, of which one does not exist, running means (BUFFER),
masks of bits and bytes, a tensor that is never cached, metrics, flags and defaults of its own. The sections
lie in build/shared: the Makefile cuts them out of train_deit.cu.

The program trains as a trainer does. `second_model -check` tests it from inside, `second_model -tensors
FILE` lists the tensors of a file with their checksums; dev/test/second_model.sh runs all of it.

x = stem(pixels); of each block, x = clip(fc2(relu(fc1(x) - running mean of fc1(x)))); logits = head(x)
*/
#include "../../build/shared/head.cuh"

// ----------------------------------------------------------------------------
// kernels: a thread makes an element, or the 8 elements of a byte of bits

#define BLOCKS(n) CEIL_DIV(n, (size_t)128), 128, 0, main_stream
__global__ void pixels_kernel(floatX* pixels, const uint8_t* images, const int* flips,
                              const __grid_constant__ PixelStats stats, size_t n, size_t W, size_t CH, size_t D) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n * D) {
        const size_t b = i / D, pixel = i % D / CH, c = i % CH;
        const size_t from = flips[b] ? pixel + W - 1 - 2 * (pixel % W) : pixel;
        pixels[i] = (floatX)(((float)images[b * D + from * CH + c] / 255.0f - stats.mean[c]) / stats.std[c]);
    }
}

// v = inp - mean, mask = v > 0, out = relu(v); mask and out may be NULL. inp (rows, C), mean (C), n = rows * C
__global__ void relu_kernel(floatX* out, uint8_t* mask, const floatX* inp, const float* mean, size_t n, int C,
                            KeepLargest keep) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i < n) {
        float v[8];
        unsigned bits = 0;
        load<8>(v, inp + i);
        for (int j = 0; j < 8; j++) {
            v[j] -= mean[(i + j) % C];
            bits |= (v[j] > 0.0f) << j;
            v[j] = v[j] < 0.0f ? 0.0f : v[j]; // a NaN stays
        }
        if (mask != NULL) { mask[i / 8] = (uint8_t)bits; }
        if (out != NULL) {
            if (keep.threshold != NULL) { keep.apply<8>(v, i); }
            store<8>(out + i, v);
        }
    }
}

// x = x cut at -limit and limit, inside = what was not cut
__global__ void clip_kernel(floatX* x, uint8_t* inside, float limit, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const float v = (float)x[i];
        inside[i] = fabsf(v) <= limit;
        if (fabsf(v) > limit) { x[i] = (floatX)copysignf(limit, v); }
    }
}

// d = 0 where the mask of bits or bytes does not let through
template <int BITS> __global__ void mask_kernel(floatX* d, const uint8_t* mask, size_t n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n && !(BITS == 1 ? mask[i / 8] >> i % 8 & 1 : mask[i])) { d[i] = (floatX)0.0f; }
}

// loss = sum of (logits - onehot)^2 / 2, an error where the largest logit is not the label's; one block of 64 threads
__global__ void square_loss_kernel(StepResult* result, floatX* logits, const int* labels, int n, int V, float scale) {
    __shared__ double loss_of[64];
    __shared__ int errors_of[64];
    const int t = threadIdx.x;
    loss_of[t] = 0.0;
    errors_of[t] = 0;
    for (int b = t; b < n; b += 64) {
        floatX* row = logits + (size_t)b * V;
        int best = 0;
        for (int v = 1; v < V; v++) { best = (float)row[v] > (float)row[best] ? v : best; }
        for (int v = 0; v < V; v++) {
            const float d = (float)row[v] - (v == labels[b] ? 1.0f : 0.0f);
            loss_of[t] += 0.5 * d * d;
            row[v] = (floatX)(d * scale);
        }
        errors_of[t] += best != labels[b];
    }
    __syncthreads();
    for (int i = 0; t == 0 && i < 64; i++) {
        result->sums[0] += loss_of[i];
        result->sums[1] += errors_of[i];
    }
}

// mean moves towards sums / n, and sums become 0; one thread a channel
__global__ void mean_kernel(float* mean, float* sums, float rate, size_t n, int C) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < C) {
        mean[c] = (1.0f - rate) * mean[c] + rate * sums[c] / (float)n;
        sums[c] = 0.0f;
    }
}

// ----------------------------------------------------------------------------
// the model

#define MAX_BLOCKS 4
typedef struct { size_t in, mid, out; } Block; // widths; mid 0: the block does not exist
typedef struct { const char* name; size_t stem; Block blocks[MAX_BLOCKS]; } Config;
static const Config configs[] = {{"uneven", 64, {{64, 96, 64}, {64, 40, 48}, {0, 0, 0}, {48, 128, 32}}},
                                 {"single", 32, {{32, 16, 32}}}};

// b is block l, D the pixels of an image, F the stem's width, E the head's
#define PARAMETERS(X) \
    X(stemw, "stem.weight",              1, (F, D),         FROZEN, normal_init(0.05)) \
    X(stemb, "stem.bias",                1, (F),            FROZEN, constant_init(0.01)) \
    X(fc1w,  "stages.%d.%d.fc1.weight",  L, (b.mid, b.in),  (l < frozen ? FROZEN : DECAY), uniform_init(b.in)) \
    X(fc1b,  "stages.%d.%d.fc1.bias",    L, (b.mid),        PLAIN,  constant_init(0.1)) \
    X(mean,  "stages.%d.%d.mean",        L, (b.mid),        BUFFER, constant_init(0.05)) \
    X(fc2w,  "stages.%d.%d.fc2.weight",  L, (b.out, b.mid), DECAY,  uniform_init(b.mid)) \
    X(fc2b,  "stages.%d.%d.fc2.bias",    L, (b.out),        PLAIN,  constant_init(0.1)) \
    X(headw, "head.weight",              1, (V, E),         DECAY,  normal_init(0.05)) \
    X(headb, "head.bias",                1, (V),            PLAIN,  constant_init(0.1))
#define ACTIVATIONS(X) \
    X(x,      FLOATX, L, (B, b.in),  NEVER, KEEP) /* input of a block */ \
    X(fc1,    FLOATX, L, (B, b.mid), 0,     KEEP) /* never cached */ \
    X(mask,   BIT,    L, (B, b.mid), 2,     KEEP) /* where ReLU lets through */ \
    X(relu,   FLOATX, L, (B, b.mid), 1,     DROP) \
    X(inside, BYTE,   L, (B, b.out), NEVER, KEEP) /* where the clip lets through */ \
    X(last,   FLOATX, 1, (B, E),     NEVER, ALL) \
    X(logits, FLOATX, 1, (B, V),     NEVER, KEEP) /* and their gradient */

#define MODEL_NAMES "uneven, single"
#define DEFAULT_MODEL "uneven"
#define HELP_RECOMPUTE "0 nothing, 1 ReLU, 2 also its mask"
#define HELP_DROP_ALL "the head"
#define HELP_WEIGHTS "its own"
#define OWN_SETTINGS(X) \
    X(f, rate,   "-rate",   0.25, 0, 1,          SAME, "by which the running means move") \
    X(f, limit,  "-limit",  2.0,  0, 1e6,        SAME, "of the clip") \
    X(i, frozen, "-freeze", 0,    0, MAX_BLOCKS, SAME, "blocks whose first weight is frozen") \
    X(i, chunk,  "-images", 0,    0, 1 << 20,    ANY,  "images in a chunk, 0: by -chunk") \
    X(i, watch,  "-watch",  0,    0, 1,          ANY,  "1: say whether the ranks' buffers differ") \
    X(i, err,    "-err",    0,    0, 1,          ANY,  "1: rank 1 errs in a weight, for the test of it")
struct Augmenter {};
struct Model : Common {
    struct { OWN_SETTINGS(FIELD) } own;
    struct ImageData* images;
    Config config;
#define X(name, ...) floatX* name[MAX_BLOCKS];
    struct { PARAMETERS(X) } params;
#undef X
#define X(name, ...) float* name[MAX_BLOCKS];
    struct { PARAMETERS(X) } grads, buffers;
#undef X
#define X(name, ...) Activation name[MAX_BLOCKS];
    struct { ACTIVATIONS(X) } acts;
#undef X
    int* labels;
    floatX *pixels, *dx, *dy, *dmid; // (B, D), (B, widest), (B, widest), (I, widest mid)
    float* sums[MAX_BLOCKS];         // (mid) of fc1 over the batch
    uint32_t trained;                // -watch: CRC-32 of this rank's buffers after the last batch
    bool differed;                   // and whether the ranks' differed
};

bool buffers_differ(const Model* model, uint32_t* crc); // between ranks; CRC-32 of this rank's

// the tensor that block l writes: the input of the next block that exists, or of the head
Activation* output_of(Model* model, int l) {
    while (++l < MAX_BLOCKS) { if (model->config.blocks[l].mid > 0) { return &model->acts.x[l]; } }
    return model->acts.last;
}

#define AT(type, a) ((type*)activation_at(a, b0, recompute))
void block_forward(Model* model, int l, size_t b0, size_t nb, bool recompute, bool training) {
    const Block b = model->config.blocks[l];
    const auto* p = &model->params;
    auto* a = &model->acts;
    floatX* relu = computed(&a->relu[l], recompute) ? AT(floatX, &a->relu[l]) : NULL;
    uint8_t* mask = computed(&a->mask[l], recompute) ? AT(uint8_t, &a->mask[l]) : NULL;
    if (relu == NULL && mask == NULL) { return; }
    floatX* fc1 = AT(floatX, &a->fc1[l]);
    linear_forward(fc1, AT(floatX, &a->x[l]), p->fc1w[l], p->fc1b[l], NULL, nb, b.in, b.mid);
    const float* mean = model->buffers.mean[l];
    const size_t n = nb * b.mid;
    const KeepLargest keep = keep_largest(&a->relu[l], b0, recompute);
    relu_kernel<<<BLOCKS(n / 8)>>>(relu, mask, fc1, mean, n, (int)b.mid, keep);
    if (recompute) { return; }
    if (training) { column_sum(model->sums[l], fc1, model->partial, nb, b.mid); }
    floatX* out = AT(floatX, output_of(model, l));
    linear_forward(out, relu, p->fc2w[l], p->fc2b[l], NULL, nb, b.mid, b.out);
    clip_kernel<<<BLOCKS(nb * b.out)>>>(out, AT(uint8_t, &a->inside[l]), (float)model->own.limit, nb * b.out);
    kernelCheck();
}

void model_forward(Model* model, size_t n, bool training) {
    const size_t I = model->chunk_images, D = numel(model->H, model->W, model->CH);
    const auto* p = &model->params;
    floatX* stem = (floatX*)activation_at(output_of(model, -1), 0, false);
    floatX* last = (floatX*)activation_at(model->acts.last, 0, false);
    floatX* logits = (floatX*)model->acts.logits->data;
    linear_forward(stem, model->pixels, p->stemw[0], p->stemb[0], NULL, n, D, model->config.stem);
    for (int l = 0; l < MAX_BLOCKS; l++) {
        if (model->config.blocks[l].mid == 0) { continue; }
        for (size_t b0 = 0; b0 < n; b0 += I) { block_forward(model, l, b0, std::min(I, n - b0), false, training); }
        if (training) { drop_activations(model, {&model->acts.relu[l]}); }
    }
    linear_forward(logits, last, p->headw[0], p->headb[0], NULL, n, model->acts.last->per_image, model->V);
    if (training) { drop_activations(model, {model->acts.last}); }
}

// dx is the gradient of the block's output, and dinp gets that of its input
void block_backward(Model* model, int l, floatX* dinp, floatX* dx, size_t b0, size_t nb) {
    const Block b = model->config.blocks[l];
    const auto* g = &model->grads;
    auto* a = &model->acts;
    const bool recompute = true;
    block_forward(model, l, b0, nb, true, true);
    mask_kernel<BYTE><<<BLOCKS(nb * b.out)>>>(dx, AT(uint8_t, &a->inside[l]), nb * b.out);
    weight_gradient(model, &a->relu[l], g->fc2w[l], g->fc2b[l], dx, b0, nb, 1, b.mid, b.out);
    linear_backward_input(model->dmid, dx, model->params.fc2w[l], nb, b.mid, b.out);
    mask_kernel<BIT><<<BLOCKS(nb * b.mid)>>>(model->dmid, AT(uint8_t, &a->mask[l]), nb * b.mid);
    kernelCheck();
    if (g->fc1w[l] == NULL) { column_sum(g->fc1b[l], model->dmid, model->partial, nb, b.mid); }
    else { weight_gradient(model, &a->x[l], g->fc1w[l], g->fc1b[l], model->dmid, b0, nb, 1, b.in, b.mid); }
    linear_backward_input(dinp, model->dmid, model->params.fc1w[l], nb, b.in, b.mid);
}
#undef AT

void model_backward(Model* model) {
    const size_t B = model->B, I = model->chunk_images, V = model->V, E = model->acts.last->per_image;
    const floatX* dlogits = (const floatX*)model->acts.logits->data;
    float *dheadw = model->grads.headw[0], *dheadb = model->grads.headb[0];
    floatX *dx = model->dx, *dinp = model->dy;
    for (size_t b0 = 0; b0 < B; b0 += I) {
        weight_gradient(model, model->acts.last, dheadw, dheadb, dlogits + b0 * V, b0, std::min(I, B - b0), 1, E, V);
    }
    linear_backward_input(dx, dlogits, model->params.headw[0], B, E, V);
    for (int l = MAX_BLOCKS - 1; l >= 0; l--) {
        const Block b = model->config.blocks[l];
        for (size_t b0 = 0; b.mid > 0 && b0 < B; b0 += I) {
            block_backward(model, l, dinp + b0 * b.in, dx + b0 * b.out, b0, std::min(I, B - b0));
        }
        if (b.mid > 0) { std::swap(dx, dinp); }
        if (l > 0) { gradients_done(model, l); } // those of block 0 are left to the end of the pass
    }
}

void model_input(Model* model, const Batch* batch) {
    const size_t n = batch->n, D = numel(model->H, model->W, model->CH);
    pixels_kernel<<<BLOCKS(n * D)>>>(model->pixels, batch->images, batch->flips, batch->stats, n, model->W, model->CH,
                                     D);
    kernelCheck();
    cudaCheck(cudaMemcpyAsync(model->labels, batch->labels, n * sizeof(int), cudaMemcpyDeviceToDevice, main_stream));
    batch_used(batch);
}

const Metric model_train_metrics[] = {{"loss", 1.0, 6}, {"error", 100.0, 2}, {NULL, 0.0, 0}};
const Metric model_eval_metrics[] = {{"loss", 1.0, 6}, {"error", 100.0, 2}, {"right", 100.0, 2}, {NULL, 0.0, 0}};
const int model_best_metric = 2;

void square_loss(Model* model, size_t n, float scale) {
    floatX* logits = (floatX*)model->acts.logits->data;
    square_loss_kernel<<<1, 64, 0, main_stream>>>(model->result, logits, model->labels, (int)n, (int)model->V, scale);
    kernelCheck();
}

void model_train(Model* model, const Batch* batch, float scale) {
    model_input(model, batch);
    model_forward(model, batch->n, true);
    square_loss(model, batch->n, scale);
    model_backward(model);
    for (int l = 0; l < MAX_BLOCKS; l++) {
        const size_t mid = model->config.blocks[l].mid;
        if (mid == 0) { continue; }
        const float rate = (float)model->own.rate;
        mean_kernel<<<BLOCKS(mid)>>>(model->buffers.mean[l], model->sums[l], rate, batch->n, (int)mid);
        kernelCheck();
    }
    if (model->own.err && rank == 1) { cudaCheck(cudaMemsetAsync(model->params.headb[0], 0, sizeof(floatX), main_stream)); }
    if (model->own.watch) { model->differed = buffers_differ(model, &model->trained); }
}

floatX* model_predict(Model* model, const Batch* batch) {
    model_input(model, batch);
    model_forward(model, batch->n, false);
    return (floatX*)model->acts.logits->data;
}

void model_evaluate(Model* model, const Batch* batch) {
    model_predict(model, batch);
    square_loss(model, batch->n, 1.0f);
}

void model_plan(Model* model) {
    Plan* plan = &model->plan;
    const size_t B = model->B, L = MAX_BLOCKS, V = model->V, D = numel(model->H, model->W, model->CH);
    const size_t F = model->config.stem, frozen = model->own.frozen;
    size_t E = F, widest = F, mid = 0;
    for (const Block& b : model->config.blocks) {
        E = b.mid > 0 ? b.out : E;
        widest = std::max({widest, b.in, b.out});
        mid = std::max(mid, b.mid);
    }
    const size_t fit = std::max((size_t)1, model->chunk_bytes / (mid * sizeof(floatX)));
    const size_t I = model->chunk_images = std::min(B, model->own.chunk > 0 ? (size_t)model->own.chunk : fit);
#define X(field, name, copies, shape, kind, init) \
    for (size_t l = 0; l < (copies); l++) { \
        const Block b = model->config.blocks[l]; \
        char text[96]; \
        const char* format = name; /* of a stage and a number in it, as in a residual network */ \
        snprintf(text, sizeof(text), format, (int)l / 2, (int)l % 2); \
        add_parameter(model, &model->params.field[l], &model->grads.field[l], &model->buffers.field[l], text, (int)l, \
                      (int)(copies), kind, init, IN_PARENTHESES shape); \
        (void)b; \
    }
    PARAMETERS(X)
#undef X
#define X(field, bits, copies, shape, level, cache) \
    for (size_t l = 0; l < (copies); l++) { \
        const Block b = model->config.blocks[l]; \
        plan_activation(model, &model->acts.field[l], #field, #copies " x " #shape, (int)l, (int)(copies), bits, \
                        numel shape, level, cache); \
        (void)b; \
    }
    ACTIVATIONS(X)
#undef X
    for (int l = 0; l < MAX_BLOCKS; l++) {
        mask_unless_read(model, &model->acts.relu[l], output_of(model, l));
        plan_selection(model, {&model->acts.relu[l]});
        plan_add(plan, SCRATCH, "sums", "", "L x (mid)", &model->sums[l], model->config.blocks[l].mid * sizeof(float));
        plan_clear(plan);
    }
    plan_selection(model, {model->acts.last});
    plan_add(plan, SCRATCH, "labels", "", "(B)", &model->labels, B * sizeof(int));
    plan_add(plan, SCRATCH, "pixels", "", "(B, D)", &model->pixels, B * D * sizeof(floatX));
    plan_add(plan, SCRATCH, "dx", "", "(B, widest)", &model->dx, B * widest * sizeof(floatX));
    plan_add(plan, SCRATCH, "dy", "", "(B, widest)", &model->dy, B * widest * sizeof(floatX));
    plan_add(plan, SCRATCH, "dmid", "", "(I, mid)", &model->dmid, I * mid * sizeof(floatX));
    plan_add(plan, SCRATCH, "sum partials", "", "fp32", &model->partial,
             column_sum_scratch(I, std::max({mid, widest, V})) * sizeof(float));
    plan_images(model, NULL);
}

void model_options(Model* model) {
    auto* s = &model->own;
    OWN_SETTINGS(OPTION)
    image_options(model);
}
const char* model_defaults(const char* name) {
    return strcmp(name, "single") == 0 ? "-i data/fashion_val.bin -j data/fashion_val.bin -b 100 -l 0.05"
        : "-i data/fashion_train.bin -j data/fashion_val.bin -b 64 -opt adamw -l 2e-3 -wd 0.05";
}
const char* const model_recipes[][2] = {{"fast", "-m single -x 3 -v 0"}, {NULL, NULL}};
void model_configure(Model* model) {
    for (const Config& c : configs) { if (strcmp(model->name, c.name) == 0) { model->config = c; } }
    require(model->config.name != NULL, "-m %s is not a model; choose one of " MODEL_NAMES, model->name);
    if (model->H == 0) { model->H = model->W = 28; }
    if (model->CH == 0) { model->CH = 1; }
    if (model->V == 0) { model->V = 10; }
}
void model_check_file(const Safetensors*) {}
void model_augment(Augmenter*, const Batch*, cudaStream_t) {}
double model_flops(const Model*, size_t n) { return 1e6 * n; }
void model_print(const Model* model) { printf("model: %s\n", model->name); }
void model_pixels(const Model* model, size_t b, float* pixels) {
    const size_t D = numel(model->H, model->W, model->CH);
    floatX* x = host_new<floatX>(D, "an image");
    cudaCheck(cudaMemcpy(x, model->pixels + b * D, D * sizeof(floatX), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < D; i++) { pixels[i % model->CH * (D / model->CH) + i / model->CH] = (float)x[i]; }
    free(x);
}

#define main train_main // that of the trainers; this file has its own
#include "../../build/shared/training.cuh"
#undef main

#include "../../build/shared/machinery.cuh"

// ----------------------------------------------------------------------------
// checks
#include "check.cuh"

// where the model reads its buffers: in its own memory, or in that of their moving average
const float* buffers_in_use(const Model* model) {
    const Parameter* first = model->parameters.begin(); // they lie in the order of the table
    while (first->kind != BUFFER) { first++; }
    return *first->buffer;
}

bool buffers_differ(const Model* model, uint32_t* crc) {
    const size_t n = model->num_buffers;
    float* values = host_new<float>(n, "buffers");
    cudaCheck(cudaStreamSynchronize(main_stream));
    cudaCheck(cudaMemcpy(values, buffers_in_use(model), n * sizeof(float), cudaMemcpyDeviceToHost));
    *crc = crc_32(0, values, n * sizeof(float));
    free(values);
    double sum = *crc;
    ranks_sum(&sum, 1);
    double others = sum != (double)*crc * num_ranks;
    ranks_sum(&others, 1);
    return others != 0.0;
}

void model_scores(const Model* model, size_t images, double* scores) {
    const StepResult r = model_result(model);
    scores[0] = r.sums[0] / images;
    scores[1] = 100.0 * r.sums[1] / images;
    scores[2] = 100.0 - scores[1];
    if (model->own.watch) {
        uint32_t crc;
        const bool differ = buffers_differ(model, &crc);
        printf("buffers: %s in training, %s now, %s\n", model->differed ? "differ" : "equal",
               differ ? "differ" : "equal", crc == model->trained ? "those of rank 0" : "others");
    }
}

static int list_tensors(const char* path) {
    Safetensors* st = safetensors_open(path);
    for (const StTensor& t : st->tensors) { printf("%s %08x\n", t.name, crc_32(0, t.data, st_numel(&t) * sizeof(float))); }
    safetensors_close(st);
    return EXIT_SUCCESS;
}

// a model with these flags on the device, with initial values, and the first batch of its training data
typedef struct {
    Model* model;
    Loader* loader;
    const Batch* batch;
} Trial;

static Trial trial_new(std::initializer_list<const char*> flags) {
    char* argv[32] = {(char*)"second_model"};
    int argc = 1;
    for (const char* flag : flags) { argv[argc++] = (char*)flag; }
    Model* model = model_new();
    parse_options(model, argc, argv);
    settings_derive(model);
    Loader* loader = loader_new(model->s->train_path, model, true);
    model_allocate(model);
    init_parameters(model);
    loader_start(loader, model);
    loader_batch(loader, 0);
    return Trial{model, loader, loader_take(loader)};
}

static void trial_free(Trial* t) {
    loader_close(t->loader);
    model_free(t->model);
}

static float* host_copy(const void* device, size_t n) {
    float* host = host_new<float>(n, "a copy");
    cudaCheck(cudaStreamSynchronize(main_stream));
    cudaCheck(cudaMemcpy(host, device, n * sizeof(float), cudaMemcpyDeviceToHost));
    return host;
}

static double loss_of(Trial* t) {
    cudaCheck(cudaMemsetAsync(t->model->result, 0, sizeof(StepResult), main_stream));
    model_evaluate(t->model, t->batch);
    return model_result(t->model).sums[0] / t->model->B;
}

// the gradients of the batch; step > 0: and an update
static void train_step(Trial* t, int step) {
    zero_gradients(t->model);
    t->model->last_pass = true;
    model_train(t->model, t->batch, 1.0f / t->model->B);
    gradients_done(t->model, -1);
    const OptimizerConfig sgd = {false, 0.1, 0.9, 0.999, 1e-8, 0.1, 0.9, 0.0, false};
    if (step > 0) { model_update(t->model, sgd, 0.1, step); }
}

// has the plan one line of this name and part with memory of its own, and so many bytes?
static bool one_line(const Model* model, const char* name, const char* part, size_t bytes) {
    int n = 0;
    bool fits = false;
    for (const Allocation& a : model->plan.lines) {
        if (strcmp(a.name, name) != 0 || strcmp(a.part, part) != 0 || a.bytes == 0) { continue; }
        fits = a.bytes == align_up(bytes);
        n++;
    }
    return n == 1 && fits;
}

static void test_plan(const char* level, const char* gamma) {
    size_t before, after, total;
    const bool drops = atof(gamma) > 0.0;
    cudaCheck(cudaMemGetInfo(&before, &total));
    Trial t = trial_new({"-b", "20", "-images", "7", "-r", level, "-g", gamma, "-g_all", "1", "-ema", "0.5"});
    cudaCheck(cudaMemGetInfo(&after, &total));
    const Model* model = t.model;
    const auto* a = &model->acts;
    const size_t plan = plan_total(&model->plan), taken = before - after; // a GPU hands out pages of 2 MiB
    check(taken >= plan && taken <= plan + NUM_CATEGORIES * ((size_t)2 << 20),
          "-r %s -g %s: %zu bytes planned, %zu taken", level, gamma, plan, taken);
    check(one_line(model, "fc1", ".chunk", 7 * 128 * sizeof(floatX)), "a chunk is that of the widest copy");
    check(a->fc1[0].chunk != NULL && a->fc1[0].chunk == a->fc1[1].chunk && a->fc1[0].chunk == a->fc1[3].chunk,
          "copies share a chunk");
    check(atoi(level) >= 2 ? a->mask[0].chunk == a->mask[3].chunk : a->mask[1].data - a->mask[0].data == 256,
          "-r %s: a mask of 20 x 96 bits takes 240 bytes", level);
    const bool batch = one_line(model, "relu", ".batch", 20 * 128 * sizeof(floatX));
    check(batch == drops && a->relu[0].batch == a->relu[3].batch, "copies share a batch of the widest copy's size");
    check(a->last->dropped == drops && a->relu[3].masked == (drops && atoi(level) > 0), "-g_all 1; a masked tensor");
    int found = 0;
    for (const Parameter& p : model->parameters) { found += strncmp(p.name, "stages.1.0", 10) == 0; }
    for (const Activation* activation : model->activations) { found += activation->n == 0; }
    check(found == 0 && model->params.fc1w[2] == NULL && model->buffers.mean[2] == NULL && a->x[2].data == NULL,
          "a block that does not exist has tensors");
    trial_free(&t);
}

// of a tensor w with gradient g: loss(w + e g) - loss(w - e g) = 2 e |g|^2
static void test_gradient(Trial* t, const Parameter* p, double loss) {
    Model* model = t->model;
    floatX *device = model->params_memory + p->offset, *moved = host_new<floatX>(p->n, "a moved tensor");
    float *w = host_copy(model->master + p->offset, p->n), *g = host_copy(model->grads_memory + p->offset, p->n);
    double squares = 0.0, losses[3];
    for (size_t j = 0; j < p->n; j++) { squares += (double)g[j] * g[j]; }
    const double e = 1e-4 * loss / squares;
    for (int side = 0; side < 3; side++) { // the last one puts the tensor back
        const double by = side == 0 ? e : side == 1 ? -e : 0.0;
        for (size_t j = 0; j < p->n; j++) { moved[j] = (floatX)(float)(w[j] + by * g[j]); }
        cudaCheck(cudaMemcpy(device, moved, p->n * sizeof(floatX), cudaMemcpyHostToDevice));
        losses[side] = loss_of(t);
    }
    const double ratio = (losses[0] - losses[1]) / (2 * e * squares);
    check(fabs(ratio - 1.0) <= 0.02, "gradient of %s: the loss changes by %.4f of what it says", p->name, ratio);
    free(w);
    free(g);
    free(moved);
}

static void test_gradients(void) { // the running means stand still
    Trial t = trial_new({"-b", "20", "-images", "7", "-rate", "0", "-freeze", "1", "-limit", "0.5"});
    train_step(&t, 0);
    const double loss = loss_of(&t);
    for (const Parameter& p : t.model->parameters) { if (is_trained(&p)) { test_gradient(&t, &p, loss); } }
    check(t.model->grads.fc1w[0] == NULL && t.model->params.fc1w[0] != NULL && t.model->grads.fc1w[1] != NULL,
          "-freeze 1: a kind that depends on the copy");
    trial_free(&t);
}

// The moving average of buffers: what it holds after two steps; an evaluation sees it and gives it back.
// Frozen tensors stay as they are
static void test_average(void) {
    Trial t = trial_new({"-b", "20", "-ema", "0.9"});
    Model* model = t.model;
    const size_t frozen = model->num_frozen, n = model->num_buffers, bytes = n * sizeof(float);
    float *fixed[3], *average[3];
    for (int step = 0; step < 3; step++) {
        if (step > 0) { train_step(&t, step); }
        fixed[step] = host_copy(model->fixed, frozen + n);
        average[step] = host_copy(model->buffers_ema, n);
    }
    bool right = true, moves = false;
    for (int step = 1; step < 3; step++) {
        for (size_t i = 0; i < n; i++) {
            const float now = fixed[step][frozen + i];
            right = right && average[step][i] == average[step-1][i] * 0.9f + (float)(1.0 - 0.9) * now;
            moves = moves || now != fixed[step-1][frozen + i];
        }
        check(memcmp(fixed[step], fixed[0], frozen * sizeof(float)) == 0, "frozen tensors move in step %d", step);
    }
    check(right && moves, "the moving average of buffers");
    const double own = loss_of(&t);
    ema_enter(model);
    const double averaged = loss_of(&t);
    float* inside = host_copy(buffers_in_use(model), n);
    ema_leave(model);
    const double again = loss_of(&t);
    float* after = host_copy(buffers_in_use(model), n);
    check(memcmp(inside, average[2], bytes) == 0 && averaged != own, "ema_enter: losses %.9g, %.9g", own, averaged);
    check(memcmp(after, fixed[2] + frozen, bytes) == 0 && again == own, "ema_leave: losses %.9g, %.9g", own, again);
    for (float* p : {fixed[0], fixed[1], fixed[2], average[0], average[1], average[2], inside, after}) { free(p); }
    trial_free(&t);
}

// the name that is found when a NaN stands at this place
static void find_nan(Model* model, void* device, const char* expected) {
    float *was = host_copy(device, 1), bad = NAN;
    cudaCheck(cudaMemcpy(device, &bad, sizeof(float), cudaMemcpyHostToDevice));
    const char* name = first_not_finite(model);
    cudaCheck(cudaMemcpy(device, was, sizeof(float), cudaMemcpyHostToDevice));
    check(strcmp(name, expected) == 0, "a NaN in %s: %s is named", expected, name);
    free(was);
}

static void test_not_finite(void) {
    Trial t = trial_new({"-b", "20", "-g", "0.5"});
    Model* model = t.model;
    train_step(&t, 0);
    find_nan(model, model->params.stemw[0], "parameter stem.weight");
    find_nan(model, model->params.fc2b[3], "parameter stages.1.1.fc2.bias");
    find_nan(model, model->buffers.mean[1], "parameter stages.0.1.mean");
    find_nan(model, model->acts.x[1].data, "activation x, copy 1");
    find_nan(model, model->acts.relu[3].dropit.values, "activation relu, copy 3");
    find_nan(model, model->grads.fc1w[1], "gradient of stages.0.1.fc1.weight");
    find_nan(model, model->result, "no stored tensor");
    trial_free(&t);
}

// copies of other sizes draw numbers of their own: those that copy 1 begins with stand nowhere in copy 0
static void test_initial_values(void) {
    Trial t = trial_new({});
    const size_t n = 96 * 64;
    float *copy0 = host_copy(t.model->master + (t.model->params.fc1w[0] - t.model->params_memory), n);
    float *copy1 = host_copy(t.model->master + (t.model->params.fc1w[1] - t.model->params_memory), 2);
    bool found = false;
    for (size_t i = 0; i + 1 < n; i++) { found = found || (copy0[i] == copy1[0] && copy0[i+1] == copy1[1]); }
    check(!found && copy0[0] != copy0[1], "the initial values of copy 1 are a part of copy 0's");
    free(copy0);
    free(copy1);
    trial_free(&t);
}

int main(int argc, char** argv) {
    if (argc == 3 && strcmp(argv[1], "-tensors") == 0) { return list_tensors(argv[2]); }
    if (argc != 2 || strcmp(argv[1], "-check") != 0) { return train_main(argc, argv); }
    device_open();
    for (const char* level : {"0", "1", "2"}) {
        for (const char* gamma : {"0", "0.5"}) { test_plan(level, gamma); }
    }
    if (sizeof(floatX) == sizeof(float)) { test_gradients(); } // bf16 rounds what moves away
    test_average();
    test_not_finite();
    test_initial_values();
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
