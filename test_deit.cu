/*
Tests train_deit.cu against PyTorch, and against itself.

build and run: make test_deit && ./test_deit                 every dump in dev/reference/dumps
               ./test_deit a.safetensors b.safetensors ...   these dumps (dev/reference/deit.py dump writes them, for any model)
               ./test_deit -losses a.safetensors             five losses as bits, to compare runs under other thread schedules
               ./test_deit -steps a.safetensors              a training step and an evaluation at each level, for the sanitizers

For each dump: logits, loss, the elements that DropIT keeps, every gradient and ten losses as PyTorch computed them; then, at every
recomputation level and in two chunk sizes, losses and gradients that must not differ by a bit. The exit code is the verdict.
*/

#define TESTING
#include "train_deit.cu"
#include <glob.h>

#ifdef ENABLE_FP32
#define RTOL 1e-4        // of an element, plus the same of the tensor's largest
#define LOSS_RTOL 1e-4
#define TIE_RTOL 1e-5    // how far from the threshold a kept set may differ from PyTorch's, over the largest element
#define TIE_SHARE 1e-3   // and in how many elements
#else
#define NORM_RTOL 0.015625 // 2^-6: norm of the difference over norm of the tensor
#define LOSS_RTOL 0.0078125
#define TIE_RTOL 0.0078125
#define TIE_SHARE 0.02
#endif

static int passed, failed;

static void check(bool ok, const char* what, const char* name, double error) {
    printf("%s %-40s %s %.3g\n", ok ? "ok    " : "NOT OK", name, what, error);
    if (ok) { passed++; } else { failed++; }
}

typedef struct {
    char name[96];
    double error; // over what is allowed: above 1 fails
} Compared;

static Compared compared[512];
static int num_compared;
static double allowed_scale = 1.0; // 2 in bf16 where the dump's parameters are not bf16 values: their rounding alone moves gradients by up to 2^-6

// compares a tensor with PyTorch's, element by element in fp32, by norms in bf16; NaN fails
static void compare(const char* name, const float* a, const float* b, size_t n) {
    double worst = 0.0, largest = 0.0;
    for (size_t i = 0; i < n; i++) { largest = fmax(largest, fabs(b[i])); }
#ifdef ENABLE_FP32
    for (size_t i = 0; i < n; i++) {
        const double allowed = RTOL * fabs(b[i]) + RTOL * largest, difference = fabs((double)a[i] - b[i]);
        const double error = difference == 0.0 ? 0.0 : difference / allowed;
        if (!(error <= worst)) { worst = error; }
        if (isnan(worst)) { break; }
    }
#else
    double difference = 0.0, norm = 0.0;
    for (size_t i = 0; i < n; i++) {
        difference += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        norm += (double)b[i] * b[i];
    }
    worst = difference == 0.0 ? 0.0 : sqrt(difference / norm) / (allowed_scale * NORM_RTOL);
#endif
    snprintf(compared[num_compared].name, sizeof(compared[0].name), "%s", name);
    compared[num_compared++].error = worst;
    check(worst <= 1.0, "error over allowed", name, worst);
}

// whether floatX holds every parameter of the dump
static bool parameters_exact(const Safetensors* st) {
    for (int i = 0; i < st->num_tensors; i++) {
        const StTensor* t = &st->tensors[i];
        if (strncmp(t->name, "param.", 6) != 0) { continue; }
        for (size_t j = 0; j < st_numel(t); j++) {
            float v;
            memcpy(&v, (const char*)safetensors_data(st, t) + j * sizeof(float), sizeof(float));
            if ((float)(floatX)v != v) { return false; }
        }
    }
    return true;
}

static int worst_first(const void* a, const void* b) {
    const double x = ((const Compared*)a)->error, y = ((const Compared*)b)->error;
    if (isnan(x) || isnan(y)) { return isnan(y) - isnan(x); }
    return x > y ? -1 : x < y;
}

// a number from the metadata, or `missing` where the key is absent
static double number(const Safetensors* st, const char* key, double missing) {
    const char* value = safetensors_metadata(st, key);
    if (value == NULL) {
        require(!isnan(missing), "%s lacks the metadata %s; write it with dev/reference/deit.py dump", st->file.path, key);
        return missing;
    }
    char* end;
    const double v = strtod(value, &end);
    require(end != value && *end == 0, "%s: metadata %s is '%s', expected a number", st->file.path, key, value);
    return v;
}

static float* tensor(const Safetensors* st, const char* name, const char* dtype, size_t n) {
    const StTensor* t = safetensors_find(st, name);
    require(t != NULL && strcmp(t->dtype, dtype) == 0 && st_numel(t) == n, "%s: tensor %s is missing or not %zu elements of %s", st->file.path,
            name, n, dtype);
    void* copy = malloc(t->end - t->begin);
    memcpy(copy, safetensors_data(st, t), t->end - t->begin);
    return (float*)copy;
}

typedef struct {
    Safetensors* st;
    DeitOptions options;
    OptimizerConfig optimizer;
    double lr;
    floatX* patches;
    int* labels;
} Dump;

static Dump open_dump(const char* path) {
    Dump dump = {};
    Safetensors* st = dump.st = safetensors_open(path);
    const char* model = safetensors_metadata(st, "model");
    require(model != NULL && strcmp(model, "deit") == 0, "%s is a dump of model '%s', this program tests deit", path, model ? model : "none");
    require(number(st, "mlp_ratio", 4.0) == 4.0, "%s has mlp_ratio %g, the trainer has 4", path, number(st, "mlp_ratio", 4.0));
    DeitConfig* c = &dump.options.config;
    c->image_size = (int)number(st, "image_size", NAN);
    c->patch_size = (int)number(st, "patch_size", NAN);
    c->image_channels = (int)number(st, "in_chans", NAN);
    c->num_classes = (int)number(st, "num_classes", NAN);
    c->channels = (int)number(st, "embed_dim", NAN);
    c->depth = (int)number(st, "depth", NAN);
    c->heads = (int)number(st, "num_heads", NAN);
    const int B = (int)number(st, "batch_size", NAN);
    require(c->image_size > 0 && c->patch_size > 0 && c->image_size % c->patch_size == 0 && c->heads > 0 && c->channels % c->heads == 0 &&
            c->depth > 0 && c->num_classes > 0 && c->image_channels > 0 && B > 0, "%s: image %d, patch %d, width %d, heads %d, depth %d, "
            "classes %d, batch %d do not make a model", path, c->image_size, c->patch_size, c->channels, c->heads, c->depth, c->num_classes, B);
    dump.options.B = B;
    dump.options.gamma = number(st, "gamma", 0.0);
    require(dump.options.gamma >= 0.0 && dump.options.gamma < 1.0, "%s: gamma is %g", path, dump.options.gamma);
    dump.options.strategy = MINK;
    dump.options.drop_path = number(st, "drop_path", 0.0); // drawn with this seed, at step 0 for the gradients, then 1, 2, ... for the losses
    dump.options.seed = (unsigned long long)number(st, "drop_path_seed", 0.0);
    dump.options.chunk_bytes = DEFAULT_CHUNK_BYTES;
    const char* optimizer = safetensors_metadata(st, "optimizer");
    dump.options.adamw = optimizer == NULL || strcmp(optimizer, "adamw") == 0;
    require(dump.options.adamw || strcmp(optimizer, "sgd") == 0, "%s: unknown optimizer %s", path, optimizer);
    dump.lr = number(st, "lr", NAN);
    dump.optimizer = OptimizerConfig{dump.options.adamw, dump.lr, number(st, "beta1", 0.9), number(st, "beta2", 0.999), number(st, "eps", 1e-8),
                                     number(st, "weight_decay", 0.0), number(st, "momentum", 0.9), 0.0, false};
    // patches by plain loops: this is also what the trainer's kernel is held against in dev/test
    const size_t S = c->image_size, P = c->patch_size, CH = c->image_channels, G = S / P, n = B * CH * S * S;
    float* image = tensor(st, "image", "F32", n);
    dump.patches = (floatX*)malloc(n * sizeof(floatX));
    size_t i = 0;
    for (size_t b = 0; b < (size_t)B; b++) {
        for (size_t t = 0; t < G * G; t++) {
            for (size_t ch = 0; ch < CH; ch++) {
                for (size_t k = 0; k < P * P; k++) {
                    const size_t h = t / G * P + k / P, w = t % G * P + k % P;
                    dump.patches[i++] = (floatX)image[((b * CH + ch) * S + h) * S + w];
                }
            }
        }
    }
    free(image);
    dump.labels = (int*)tensor(st, "label", "I32", B);
    for (int b = 0; b < B; b++) {
        require(dump.labels[b] >= 0 && dump.labels[b] < c->num_classes, "%s: label %d of image %d", path, dump.labels[b], b);
    }
    return dump;
}

static void close_dump(Dump* dump) {
    safetensors_close(dump->st);
    free(dump->patches);
    free(dump->labels);
}

static DeitModel* make_model(const Dump* dump, int recompute, size_t chunk_bytes, bool keep_exact) {
    DeitModel* model = (DeitModel*)calloc(1, sizeof(DeitModel));
    model->options = dump->options;
    model->options.recompute = recompute;
    model->options.chunk_bytes = chunk_bytes;
    model->options.stats = keep_exact && dump->options.gamma > 0.0;
    deit_allocate(model);
    deit_load_parameters(model, dump->st, "param.", ADAPT_NOTHING);
    return model;
}

static void free_model(DeitModel* model) {
    deit_free(model);
    free(model);
}

// forward pass and loss of the dump's batch, gradients zero
static void forward(DeitModel* model, const Dump* dump) {
    const size_t B = model->options.B;
    floatX* patches = (floatX*)activation_at(model, &model->acts.patches, 0, 0, false);
    cudaCheck(cudaMemcpy(patches, dump->patches, B * model->acts.patches.per_image * sizeof(floatX), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(model->labels, dump->labels, B * sizeof(int), cudaMemcpyHostToDevice));
    deit_zero_gradients(model);
    deit_forward(model, B, true);
}

static void loss_and_backward(DeitModel* model) {
    deit_loss(model, model->options.B, 0.0f, 1.0f, 1.0f / model->options.B);
    deit_backward(model);
}

static float* to_host_floats(const floatX* device, size_t n) {
    floatX* raw = (floatX*)malloc(n * sizeof(floatX));
    float* host = (float*)malloc(n * sizeof(float));
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(raw, device, n * sizeof(floatX), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) { host[i] = (float)raw[i]; }
    free(raw);
    return host;
}

// Holds the kept set of copy l against the dump's mask: exactly k, our own rule obeyed, and every element that differs within
// rounding of the threshold. Then puts the dump's set in its place, so that the gradients can be compared
static void take_mask(DeitModel* model, const Activation* a, int l, const Safetensors* st, const char* layer) {
    char name[96];
    snprintf(name, sizeof(name), "mask.blocks.%d.%s", l, layer);
    if (safetensors_find(st, name) == NULL) { return; }
    const Dropped d = dropped_copy(a, l);
    uint8_t* mask = (uint8_t*)tensor(st, name, "U8", CEIL_DIV(d.n, (size_t)8));
    float* x = to_host_floats((floatX*)activation_at(model, a, l, 0, false), d.n);
    unsigned* bitmap = (unsigned*)malloc(a->words * sizeof(unsigned));
    unsigned* offsets = (unsigned*)malloc(a->segments * sizeof(unsigned));
    floatX* values = (floatX*)malloc(a->values * sizeof(floatX));
    cudaCheck(cudaMemcpy(bitmap, d.bitmap, a->words * sizeof(unsigned), cudaMemcpyDeviceToHost));
    cudaCheck(cudaMemcpy(values, d.values, d.k * sizeof(floatX), cudaMemcpyDeviceToHost));
    double smallest_kept = INFINITY, largest_dropped = 0.0, largest = 0.0;
    size_t ours = 0, theirs = 0;
    bool values_right = true;
    for (size_t i = 0; i < d.n; i++) {
        largest = fmax(largest, fabs(x[i]));
        if (bitmap[i / 32] >> (i % 32) & 1) {
            values_right = values_right && ours < d.k && (float)values[ours] == x[i];
            smallest_kept = fmin(smallest_kept, fabs(x[i]));
            ours++;
        } else {
            largest_dropped = fmax(largest_dropped, fabs(x[i]));
        }
    }
    check(ours == d.k && values_right && smallest_kept >= largest_dropped, "elements kept:", name, (double)ours);
    size_t differ = 0;
    double farthest = 0.0;
    memset(offsets, 0, a->segments * sizeof(unsigned));
    for (size_t i = 0; i < d.n; i++) {
        const bool kept = mask[i / 8] >> (i % 8) & 1;
        if (kept != (bitmap[i / 32] >> (i % 32) & 1)) {
            differ++;
            farthest = fmax(farthest, fabs(fabs(x[i]) - smallest_kept) / largest);
            bitmap[i / 32] ^= 1u << (i % 32);
        }
        if (i % DROPIT_SEGMENT == 0) { offsets[i / DROPIT_SEGMENT] = (unsigned)theirs; }
        if (kept) {
            require(theirs < d.k, "%s keeps more than %zu elements", name, d.k);
            values[theirs++] = (floatX)x[i];
        }
    }
    if (differ > 0) { printf("       %zu of %zu elements, up to %.2g of the largest away from the threshold\n", differ, d.n, farthest); }
    check(theirs == d.k && farthest <= TIE_RTOL && differ <= TIE_SHARE * d.n + 2, "elements differ from PyTorch's:", name, (double)differ);
    cudaCheck(cudaMemcpy(d.bitmap, bitmap, a->words * sizeof(unsigned), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(d.values, values, d.k * sizeof(floatX), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(d.offsets, offsets, a->segments * sizeof(unsigned), cudaMemcpyHostToDevice));
    free(mask);
    free(x);
    free(bitmap);
    free(offsets);
    free(values);
}

// one dump against PyTorch
static void test_against_pytorch(const Dump* dump, size_t chunk_bytes) {
    num_compared = 0;
    allowed_scale = parameters_exact(dump->st) ? 1.0 : 2.0;
    DeitModel* model = make_model(dump, 0, chunk_bytes, true);
    const Safetensors* st = dump->st;
    const DeitConfig c = dump->options.config;
    const size_t B = dump->options.B, V = c.num_classes;
    forward(model, dump);
    float* logits = to_host_floats((floatX*)model->acts.logits.data, B * V);
    float* expected = tensor(st, "logits", "F32", B * V);
    compare("logits", logits, expected, B * V);
    free(logits);
    free(expected);
    if (dump->options.gamma > 0.0) {
        for (int l = 0; l < c.depth; l++) {
            take_mask(model, &model->acts.ln1, l, st, "attn.qkv");
            take_mask(model, &model->acts.atty, l, st, "attn.proj");
            take_mask(model, &model->acts.ln2, l, st, "mlp.fc1");
            take_mask(model, &model->acts.fch_gelu, l, st, "mlp.fc2");
        }
    }
    loss_and_backward(model);
    const double loss = deit_result(model).loss / B;
    expected = tensor(st, "loss", "F32", 1);
    check(fabs(loss - expected[0]) <= LOSS_RTOL * fabs(expected[0]), "relative error", "loss", fabs(loss / expected[0] - 1.0));
    free(expected);
    float* grads = (float*)malloc(model->num_parameters * sizeof(float));
    cudaCheck(cudaMemcpy(grads, model->grads_memory, model->num_parameters * sizeof(float), cudaMemcpyDeviceToHost));
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        for (int l = 0; l < s->copies; l++) {
            char name[96];
            snprintf(name, sizeof(name), "grad.%s", parameter_name(s, l));
            expected = tensor(st, name, "F32", s->n);
            compare(name, grads + s->offset + l * s->n, expected, s->n);
            free(expected);
        }
    }
    free(grads);
    // the first update uses the gradients just compared; from the second step on the kept sets are our own
    const StTensor* t = safetensors_find(st, "losses");
    require(t != NULL, "%s lacks the tensor losses", st->file.path);
    const size_t steps = st_numel(t);
    expected = tensor(st, "losses", "F32", steps);
    float* losses = (float*)malloc(steps * sizeof(float));
    double worst = 0.0;
    for (size_t step = 0; step < steps; step++) {
        if (step > 0) {
            model->drop_step++;
            forward(model, dump);
            loss_and_backward(model);
        }
        losses[step] = (float)(deit_result(model).loss / B);
        const double error = fabs(losses[step] / expected[step] - 1.0);
        if (!(error <= worst)) { worst = error; }
        deit_update(model, dump->optimizer, dump->lr, (int)step + 1);
    }
#ifdef ENABLE_FP32
    check(worst <= LOSS_RTOL, "largest relative error of all steps", "losses", worst);
#else
    compare("losses", losses, expected, steps); // a small loss late in training has few correct digits in bf16
#endif
    free(losses);
    free(expected);
    free_model(model);
    qsort(compared, num_compared, sizeof(Compared), worst_first);
    printf("worst of %d tensors:", num_compared);
    for (int i = 0; i < 3 && i < num_compared; i++) { printf(" %s %.3g;", compared[i].name, compared[i].error); }
    printf("\n");
}

#define STEPS 5

// losses of five steps with our own kept sets, and the gradients of the last
static float* run_steps(DeitModel* model, const Dump* dump, double losses[STEPS]) {
    for (int step = 0; step < STEPS; step++) {
        forward(model, dump);
        loss_and_backward(model);
        deit_update(model, dump->optimizer, dump->lr, step + 1);
        losses[step] = deit_result(model).loss / dump->options.B;
        model->drop_step++;
    }
    float* grads = (float*)malloc(model->num_parameters * sizeof(float));
    cudaCheck(cudaMemcpy(grads, model->grads_memory, model->num_parameters * sizeof(float), cudaMemcpyDeviceToHost));
    return grads;
}

// every level of recomputation gives the same bits, at three gammas and with every strategy; and so does a second run
static void test_recomputation(Dump dump, size_t chunk_bytes) {
    const double gammas[] = {0.0, 0.7, 0.9};
    for (int i = 0; i < 3; i++) {
        for (int strategy = MINK; strategy <= (i == 1 ? RANDOM : MINK); strategy++) {
            for (int drop_all = 0; drop_all <= (i == 1); drop_all++) {
                dump.options.gamma = gammas[i];
                dump.options.strategy = strategy;
                dump.options.drop_all = drop_all;
                double first[STEPS], losses[STEPS];
                float* grads = NULL;
                bool same = true;
                for (int run = 0; run < 5; run++) { // -r 0, 1, 2, 3, and 0 once more
                    DeitModel* model = make_model(&dump, run % 4, chunk_bytes, false);
                    float* g = run_steps(model, &dump, losses);
                    if (run == 0) {
                        memcpy(first, losses, sizeof(first));
                        grads = g;
                    } else {
                        same = same && memcmp(first, losses, sizeof(first)) == 0
                            && memcmp(grads, g, model->num_parameters * sizeof(float)) == 0;
                        free(g);
                    }
                    free_model(model);
                }
                free(grads);
                char name[96];
                snprintf(name, sizeof(name), "-r 0 1 2 3 0, gamma %g, strategy %d, all %d", gammas[i], strategy, drop_all);
                check(same && isfinite(first[STEPS-1]), "the same bits, loss", name, first[STEPS-1]);
            }
        }
    }
}

// the plan is what is allocated
static void test_plan(const Dump* dump) {
    size_t before, after, total;
    cudaCheck(cudaMemGetInfo(&before, &total));
    DeitModel* model = make_model(dump, 1, DEFAULT_CHUNK_BYTES, false);
    cudaCheck(cudaMemGetInfo(&after, &total));
    const size_t planned = plan_total(&model->plan), taken = before - after;
    // a GPU hands out whole pages of 2 MiB
    check(taken >= planned && taken <= planned + NUM_CATEGORIES * ((size_t)2 << 20), "bytes planned", "plan equals allocation", (double)planned);
    const size_t largest = deit_largest_batch(model->options, planned);
    check(largest == model->options.B, "images", "largest batch that fits into its own plan", (double)largest);
    free_model(model);
}

// one training step and one evaluation at every level of recomputation
static void take_steps(const Dump* dump) {
    for (int recompute = 0; recompute <= 3; recompute++) {
        DeitModel* model = make_model(dump, recompute, 1, recompute == 1);
        model->stats_now = recompute == 1 && dump->options.gamma > 0.0;
        forward(model, dump);
        loss_and_backward(model);
        deit_update(model, dump->optimizer, dump->lr, 1);
        const double loss = deit_result(model).loss / dump->options.B;
        deit_zero_gradients(model);
        deit_forward(model, dump->options.B, false);
        deit_loss(model, dump->options.B, 0.1f, 1.0f, 1.0f);
        const double after = deit_result(model).loss / dump->options.B;
        check(isfinite(loss) && isfinite(after), "loss after a step", "step and evaluation", after);
        free_model(model);
    }
}

int main(int argc, char** argv) {
    const char* mode = argc > 1 && argv[1][0] == '-' ? argv[1] : "";
    const bool only_losses = strcmp(mode, "-losses") == 0, only_steps = strcmp(mode, "-steps") == 0;
    require(mode[0] == 0 || only_losses || only_steps, "unknown mode %s; the modes are -losses and -steps", mode);
    const int first = mode[0] == 0 ? 1 : 2;
    glob_t files = {};
    if (argc <= first) { glob("dev/reference/dumps/*.safetensors", 0, NULL, &files); }
    const int n = files.gl_pathc > 0 ? (int)files.gl_pathc : argc - first;
    char** paths = files.gl_pathc > 0 ? files.gl_pathv : argv + first;
    require(n > 0, "no dumps in dev/reference/dumps; run from the root of the repository, or give the path of a dump");
    device_open();
    for (int i = 0; i < n; i++) {
        Dump dump = open_dump(paths[i]);
        const DeitConfig c = dump.options.config;
        printf("%s: image %d, patch %d, channels %d, width %d, depth %d, heads %d, classes %d, batch %zu, gamma %g, %s, drop-path %g\n", paths[i],
               c.image_size, c.patch_size, c.image_channels, c.channels, c.depth, c.heads, c.num_classes, dump.options.B, dump.options.gamma,
               dump.options.adamw ? "adamw" : "sgd", dump.options.drop_path);
        if (only_losses) {
            double losses[STEPS];
            DeitModel* model = make_model(&dump, 1, 1, false);
            free(run_steps(model, &dump, losses));
            for (int s = 0; s < STEPS; s++) { printf("%a\n", losses[s]); }
            free_model(model);
        } else if (only_steps) {
            take_steps(&dump);
        } else {
            test_against_pytorch(&dump, DEFAULT_CHUNK_BYTES);
            test_against_pytorch(&dump, 1); // a chunk of one image
            test_recomputation(dump, DEFAULT_CHUNK_BYTES);
            test_recomputation(dump, 1);
            test_plan(&dump);
        }
        close_dump(&dump);
    }
    globfree(&files);
    if (!only_losses) { printf("%d passed, %d failed\n", passed, failed); }
    return failed == 0 && (only_losses || passed > 0) ? EXIT_SUCCESS : EXIT_FAILURE;
}
