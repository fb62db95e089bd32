/*
Tests train_deit.cu against PyTorch, and against itself.

build and run: make test_deit && ./test_deit                 every deit_* in dev/reference/dumps
               ./test_deit a.safetensors b.safetensors ...   these dumps, which dev/reference/deit.py writes
               ./test_deit -losses a.safetensors             three losses as bits, to compare schedules
               ./test_deit -steps a.safetensors              a step and an evaluation a level, for sanitizers

For each dump: logits, loss, the elements that DropIT keeps, every gradient and ten losses as PyTorch
computed them in fp32; then, at every recomputation level and in two chunk sizes, losses and gradients that
must not differ by a bit. The exit code is the verdict.

How far may a gradient in bf16 be from PyTorch's? Each dump measures it. An error in the last place of the
parameters and pixels cannot be told from the rounding of what is computed from them. So the first step is
also taken MOVES times with each of them moved by one unit in its last place, up or down at random; the
distance by which this moves a gradient, on average, is the distance from PyTorch's that it is allowed, but
MOST of its norm. It holds in any order of summation: a moved number errs by 2^-8 of its size or more, each
rounding of a result by at most 2^-9.
*/

#define TESTING
#include "train_deit.cu"
#define DUMP_SCRIPT "dev/reference/deit.py"
#include "dev/test/dump.cuh"
#include <glob.h>

#ifdef ENABLE_FP32
#define MOVES 0
#define LOSS_RTOL 1e-4
#define LOSSES_RTOL 1e-4 // of all losses, by norms
#define TIE_RTOL 1e-5    // how far from the threshold a kept set may differ from PyTorch's, over the largest element
#define TIE_SHARE 1e-3   // and in how many elements
#else
#define MOVES 4
#define LOSS_RTOL 0.0078125
#define LOSSES_RTOL 0.015625 // AdamW's first step has the same size for every gradient: rounding decides its sign
#define TIE_RTOL 0.0078125
#define TIE_SHARE 0.02
#endif
#define RTOL 2e-5        // fp32: of an element, plus the same of the tensor's largest
#define LEAST 0.00390625 // bf16: of a tensor's norm, where a move changes nothing
#define MOST 0.0225      // bf16: the same, so that a tensor that is 3 % too large or too small fails in every dump
#define WHOLE ((size_t)32 << 20) // bytes of a chunk: the whole batch of a dump
#define STEPS 3

typedef struct {
    const Safetensors* st;
    DeitConfig config;
    OptimizerConfig optimizer;
    size_t B;
    int strategy, drop_all;
    double gamma, drop_path;
    unsigned long long seed; // of drop-path: step 0 for the gradients, then 1, 2, ... for the losses
    floatX* patches;
    int* labels;
} Dump;

static Dump open_dump(const char* path) {
    Safetensors* st = safetensors_open(path);
    const char *model = safetensors_metadata(st, "model"), *optimizer = safetensors_metadata(st, "optimizer");
    require(model != NULL && strcmp(model, "deit") == 0, "%s is a dump of another model than deit", path);
    require(number(st, "mlp_ratio", 4.0) == 4.0, "%s has another mlp_ratio than the trainer's 4", path);
    const auto whole = [&](const char* key) { return (int)number(st, key, NAN); };
    Dump dump = {};
    dump.st = st;
    dump.config = DeitConfig{whole("image_size"), whole("patch_size"), whole("in_chans"), whole("num_classes"),
                             whole("embed_dim"), whole("depth"), whole("num_heads")};
    const DeitConfig c = dump.config;
    const size_t B = dump.B = whole("batch_size"), S = c.image_size, P = c.patch_size, CH = c.image_channels;
    require(c.heads > 0 && c.channels % c.heads == 0 && c.depth > 0 && c.num_classes > 0 && CH > 0 && B > 0,
            "%s: width %d, heads %d, depth %d, classes %d, batch %zu do not make a model", path, c.channels, c.heads,
            c.depth, c.num_classes, B);
    dump.strategy = MINK;
    dump.gamma = number(st, "gamma", 0.0);
    dump.drop_path = number(st, "drop_path", 0.0);
    dump.seed = (unsigned long long)number(st, "drop_path_seed", 0.0);
    const bool adamw = optimizer == NULL || strcmp(optimizer, "adamw") == 0;
    require(adamw || strcmp(optimizer, "sgd") == 0, "%s: unknown optimizer %s", path, optimizer);
    dump.optimizer = OptimizerConfig{adamw, number(st, "lr", NAN), number(st, "beta1", 0.9),
                                     number(st, "beta2", 0.999), number(st, "eps", 1e-8),
                                     number(st, "weight_decay", 0.0), number(st, "momentum", 0.9), 0.0, false};
    // patches by plain loops: test_kernels holds the trainer's kernel against the same
    float* image = (float*)tensor(st, "image", "F32", B * CH * S * S);
    dump.patches = host_new<floatX>(B * CH * S * S, "patches");
    for (size_t i = 0; i < B * CH * S * S; i++) { // patches are (B, T-1, CH, P, P), the image is (B, CH, S, S)
        const size_t b = i / (CH*S*S), t = i / (CH*P*P) % (S/P * (S/P)), ch = i / (P*P) % CH;
        const size_t h = t / (S/P) * P + i / P % P, w = t % (S/P) * P + i % P;
        dump.patches[i] = (floatX)image[((b * CH + ch) * S + h) * S + w];
    }
    free(image);
    dump.labels = (int*)tensor(st, "label", "I32", B);
    for (size_t b = 0; b < B; b++) {
        const int label = dump.labels[b];
        require(label >= 0 && label < c.num_classes, "%s: label %d of image %zu", path, label, b);
    }
    return dump;
}

// stats: memory for -stats, with which each copy keeps the exact input that DropIT chose from
static Model* make_model(const Dump* dump, int recompute, size_t chunk_bytes, bool stats) {
    Model* model = model_new();
    Settings* s = model->s;
    s->gamma = dump->gamma;
    s->recompute = recompute;
    s->drop_all = dump->drop_all;
    s->stats = stats && dump->gamma > 0.0;
    model->own.drop_path = dump->drop_path;
    model->config = dump->config;
    model->B = dump->B;
    model->H = model->W = dump->config.image_size;
    model->CH = dump->config.image_channels;
    model->V = dump->config.num_classes;
    model->strategy = dump->strategy;
    model->adamw = dump->optimizer.adamw;
    model->seed = dump->seed;
    model->chunk_bytes = chunk_bytes;
    deit_shape(model);
    model->augment = augment_new("none");
    return model;
}

static Model* load_model(const Dump* dump, int recompute, size_t chunk_bytes, bool stats = false) {
    Model* model = make_model(dump, recompute, chunk_bytes, stats);
    model_allocate(model);
    load_parameters(model, dump->st, "param.");
    return model;
}

// forward pass of the dump's batch, gradients zero
static void forward(Model* model, const Dump* dump, const floatX* patches, bool training) {
    floatX* to = (floatX*)activation_at(model->acts.patches, 0, false);
    cudaCheck(cudaMemcpy(to, patches, model->acts.patches->n * sizeof(floatX), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(model->labels, dump->labels, model->B * sizeof(int), cudaMemcpyHostToDevice));
    zero_gradients(model);
    model_forward(model, model->B, training);
}

static void backward_and_update(Model* model, const Dump* dump, int step) {
    model_backward(model);
    gradients_done(model, -1);
    model_update(model, dump->optimizer, dump->optimizer.learning_rate, step);
    model->pass++;
}

// Puts the set of elements that the dump keeps in the place of ours, so that the gradients can be compared.
// judged: ours must have k elements, obey our own rule, and differ from the dump's within rounding only
static void take_mask(const Activation* a, const Safetensors* st, const char* layer, bool judged) {
    char name[96];
    snprintf(name, sizeof(name), "mask.blocks.%d.%s", a->copy, layer);
    if (safetensors_find(st, name) == NULL) { return; }
    const Dropped d = a->dropit;
    uint8_t* mask = (uint8_t*)tensor(st, name, "U8", CEIL_DIV(d.n, (size_t)8));
    float* x = to_host_floats((floatX*)activation_at(a, 0, false), d.n);
    const size_t words = dropit_words(d.n), segments = dropit_segments(d.n);
    unsigned *bitmap = host_new<unsigned>(words, name), *offsets = host_new<unsigned>(segments, name);
    floatX* values = host_new<floatX>(d.k, name);
    cudaCheck(cudaMemcpy(bitmap, d.bitmap, words * sizeof(unsigned), cudaMemcpyDeviceToHost));
    cudaCheck(cudaMemcpy(values, d.values, d.k * sizeof(floatX), cudaMemcpyDeviceToHost));
    double smallest_kept = INFINITY, largest_dropped = 0.0, largest = 0.0, farthest = 0.0;
    size_t ours = 0, theirs = 0, differ = 0;
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
    for (size_t i = 0; i < d.n; i++) {
        const bool kept = mask[i / 8] >> (i % 8) & 1;
        if (kept != (bitmap[i / 32] >> (i % 32) & 1)) {
            differ++;
            farthest = fmax(farthest, fabs(fabs(x[i]) - smallest_kept) / largest);
            bitmap[i / 32] ^= 1u << (i % 32);
        }
        if (i % DROPIT_SEGMENT == 0) { offsets[i / DROPIT_SEGMENT] = (unsigned)theirs; }
        require(!kept || theirs < d.k, "%s keeps more than %zu elements", name, d.k);
        if (kept) { values[theirs++] = (floatX)x[i]; }
    }
    if (judged) {
        check(ours == d.k && values_right && smallest_kept >= largest_dropped,
              "%s: %zu elements are kept, k is %zu; the smallest is %g, the largest dropped %g", name, ours, d.k,
              smallest_kept, largest_dropped);
        check(theirs == d.k && farthest <= TIE_RTOL && differ <= TIE_SHARE * d.n + 2,
              "%s: %zu of %zu elements are not PyTorch's, up to %.2g of the largest away from the threshold", name,
              differ, d.n, farthest);
    }
    cudaCheck(cudaMemcpy(d.bitmap, bitmap, words * sizeof(unsigned), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(d.values, values, d.k * sizeof(floatX), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(d.offsets, offsets, segments * sizeof(unsigned), cudaMemcpyHostToDevice));
    for (void* p : {(void*)mask, (void*)x, (void*)bitmap, (void*)offsets, (void*)values}) { free(p); }
}

// logits, the gradients of the first step, and the losses of all, one after another
typedef struct {
    float* values;
    size_t logits, gradients, losses; // how many
} Outcome;

// As many steps as the dump has losses. The first has the kept sets of the dump, the others their own.
// move 0: as dumped, and the kept sets are judged; else parameters and pixels are moved, for one step
static Outcome train_dump(const Dump* dump, size_t chunk_bytes, unsigned move) {
    Model* model = load_model(dump, 0, chunk_bytes, true);
    const size_t n = model->num_parameters, pixels = model->acts.patches->n;
    Outcome o = {NULL, model->B * model->V, n, st_numel(safetensors_find(dump->st, "losses"))};
    o.values = host_new<float>(o.logits + o.gradients + o.losses, "an outcome");
    floatX* patches = host_new<floatX>(pixels, "patches");
    memcpy((void*)patches, (const void*)dump->patches, pixels * sizeof(floatX));
    if (move > 0) {
        floatX* moved = host_new<floatX>(n, "parameters");
        float* values = host_new<float>(n, "parameters");
        cudaCheck(cudaMemcpy(moved, model->params_memory, n * sizeof(floatX), cudaMemcpyDeviceToHost));
        move_last_place(moved, n, move, 0);
        move_last_place(patches, pixels, move, 1);
        for (size_t i = 0; i < n; i++) { values[i] = (float)moved[i]; }
        set_parameters(model, values);
        free(moved);
        free(values);
    }
    for (size_t step = 0; step < (move > 0 ? 1 : o.losses); step++) {
        forward(model, dump, patches, true);
        if (step == 0) {
            float* logits = to_host_floats((floatX*)model->acts.logits->data, o.logits);
            memcpy(o.values, logits, o.logits * sizeof(float));
            free(logits);
        }
        for (int l = 0; step == 0 && dump->gamma > 0.0 && l < model->config.depth; l++) {
            take_mask(&model->acts.ln1[l], dump->st, "attn.qkv", move == 0);
            take_mask(&model->acts.atty[l], dump->st, "attn.proj", move == 0);
            take_mask(&model->acts.ln2[l], dump->st, "mlp.fc1", move == 0);
            take_mask(&model->acts.fch_gelu[l], dump->st, "mlp.fc2", move == 0);
        }
        o.values[o.logits + n + step] = (float)loss_of(model);
        backward_and_update(model, dump, (int)step + 1);
        if (step > 0) { continue; }
        float* gradients = to_host_floats(model->grads_memory, n);
        memcpy(o.values + o.logits, gradients, n * sizeof(float));
        free(gradients);
    }
    free(patches);
    model_free(model);
    return o;
}

// how far `at` may be from PyTorch's n values, over their norm
static double allowed(const Outcome* runs, size_t at, double norm, size_t n) {
    double moved = 0.0;
    for (int m = 1; m <= MOVES; m++) {
        moved += distance(1.0, runs[0].values + at, runs[m].values + at, n) / (MOVES * norm);
    }
    return fmin(fmax(moved, LEAST), MOST);
}

static struct { // of a dump
    char name[96];
    double error;   // largest error over what is allowed; above 1 fails
    double planted; // smallest one of a tensor 3 % too large or too small
} worst;

// compares n values at `at` with PyTorch's: element by element in fp32, by distance in bf16. NaN fails
static void compare(const char* name, const Outcome* runs, size_t at, const float* expected, size_t n) {
    const float* a = runs[0].values + at;
    double error = 0.0, largest = 0.0, planted = 0.0;
    for (size_t i = 0; i < n; i++) { largest = fmax(largest, fabs(expected[i])); }
    if (MOVES == 0) {
        for (size_t i = 0; i < n; i++) {
            const double apart = fabs((double)a[i] - expected[i]);
            const double e = apart / (RTOL * (fabs(expected[i]) + largest));
            if (apart != 0.0 && !(e <= error)) { error = e; }
        }
    } else {
        const double norm = distance(0.0, a, expected, n), most = norm * allowed(runs, at, norm, n);
        const double apart = distance(1.0, a, expected, n);
        error = apart == 0.0 ? 0.0 : apart / most;
        planted = fmin(distance(1.03, a, expected, n), distance(0.97, a, expected, n)) / most;
        check(largest == 0.0 || planted > 1.0, "%s: 3 %% more or less would pass, with %.3g of what is allowed", name,
              planted);
    }
    check(error <= 1.0, "%s: error over allowed %.3g", name, error);
    if (largest > 0.0 && !(planted >= worst.planted)) { worst.planted = planted; }
    if (error <= worst.error) { return; }
    snprintf(worst.name, sizeof(worst.name), "%s", name);
    worst.error = error;
}

// one dump against PyTorch
static void test_against_pytorch(const Dump* dump, size_t chunk_bytes) {
    Outcome runs[MOVES + 1];
    for (int m = 0; m <= MOVES; m++) { runs[m] = train_dump(dump, chunk_bytes, (unsigned)m); }
    Model* model = make_model(dump, 0, chunk_bytes, false); // for names and places
    plan_model(model);
    const Outcome* o = &runs[0];
    worst = {"", -1.0, INFINITY};
    float* logits = (float*)tensor(dump->st, "logits", "F32", o->logits);
    compare("logits", runs, 0, logits, o->logits);
    for (const Parameter& p : model->parameters) {
        char name[128];
        snprintf(name, sizeof(name), "grad.%s", p.name);
        float* gradient = (float*)tensor(dump->st, name, "F32", p.n);
        compare(name, runs, o->logits + p.offset, gradient, p.n);
        free(gradient);
    }
    float* losses = (float*)tensor(dump->st, "losses", "F32", o->losses);
    float* loss = (float*)tensor(dump->st, "loss", "F32", 1);
    const float* ours = o->values + o->logits + o->gradients;
    check(fabs(ours[0] / loss[0] - 1.0) <= LOSS_RTOL, "the loss is %.6g, PyTorch's is %.6g", ours[0], loss[0]);
    const double apart = distance(1.0, ours, losses, o->losses) / distance(0.0, ours, losses, o->losses);
    check(apart <= LOSSES_RTOL, "losses: the error is %.3g of their norm", apart);
    printf("    chunks of %zu images: of what is allowed, losses have %.3g, %s has %.3g", model->chunk_images,
           apart / LOSSES_RTOL, worst.name, worst.error);
    if (MOVES > 0) { printf(", a tensor 3 %% larger or smaller %.3g or more", worst.planted); }
    printf("\n");
    for (int m = 0; m <= MOVES; m++) { free(runs[m].values); }
    for (float* p : {logits, losses, loss}) { free(p); }
    model_free(model);
}

// losses of three steps with our own kept sets, and the gradients of the last
static float* run_steps(Model* model, const Dump* dump, double losses[STEPS]) {
    for (int step = 0; step < STEPS; step++) {
        forward(model, dump, dump->patches, true);
        losses[step] = loss_of(model);
        backward_and_update(model, dump, step + 1);
    }
    return to_host_floats(model->grads_memory, model->num_parameters);
}

// every level of recomputation gives the same bits, at any gamma and strategy; and so does a second run
static void test_recomputation(Dump dump, size_t chunk_bytes) {
    const struct { double gamma; int strategy, drop_all; } cases[] = {
        {0.0, MINK, 0}, {0.7, MINK, 0}, {0.7, MINK, 1}, {0.7, FASTMINK, 0}, {0.7, FASTMINK, 1},
        {0.7, RANDOM, 0}, {0.7, RANDOM, 1}, {0.9, MINK, 0}};
    for (const auto& c : cases) {
        dump.gamma = c.gamma;
        dump.strategy = c.strategy;
        dump.drop_all = c.drop_all;
        double first[STEPS], losses[STEPS];
        float* grads = NULL;
        bool same = true;
        for (int recompute : {0, 1, 2, 3, 0}) {
            Model* model = load_model(&dump, recompute, chunk_bytes);
            float* g = run_steps(model, &dump, losses);
            if (grads == NULL) {
                memcpy(first, losses, sizeof(first));
                grads = g;
            } else {
                same = same && memcmp(first, losses, sizeof(first)) == 0
                    && memcmp(grads, g, model->num_parameters * sizeof(float)) == 0;
                free(g);
            }
            model_free(model);
        }
        free(grads);
        check(same && isfinite(first[STEPS-1]), "-r 0 1 2 3 0, gamma %g, strategy %d, all %d: other bits, or a loss "
              "of %g", c.gamma, c.strategy, c.drop_all, first[STEPS-1]);
    }
}

// The plan is what is allocated: each line has its own bytes of its block, and the lines fill the blocks.
// Other programs may use a GPU at the same time, so only the CPU device is asked how much memory is free
static void test_plan(const Dump* dump) {
    size_t before, after, total, filled[NUM_CATEGORIES] = {0};
    Model* model = make_model(dump, 1, WHOLE, false);
    cudaCheck(cudaMemGetInfo(&before, &total));
    model_allocate(model);
    cudaCheck(cudaMemGetInfo(&after, &total));
    const Plan* plan = &model->plan;
    const size_t planned = plan_total(plan);
#ifndef __CUDACC__
    check(before - after == planned, "%zu bytes are planned, %zu are allocated", planned, before - after);
#endif
    for (const Allocation& a : plan->lines) {
        const Allocation* owner = &plan->lines.of[a.owner];
        const bool shares = owner != &a;
        const void* own = plan->blocks[a.category] + filled[a.category];
        const bool right = *a.pointer == (shares ? *owner->pointer : own);
        check((a.bytes == 0 && !shares) || right, "%s%s is not where it is planned", a.name, a.part);
        filled[a.category] += a.bytes;
    }
    check(memcmp(filled, plan->bytes, sizeof(filled)) == 0, "the lines of the plan do not fill its blocks");
    model_free(model);
    model = make_model(dump, 1, WHOLE, false);
    const size_t largest = largest_batch(model, planned);
    check(largest == model->B, "into the plan of %zu images fit %zu", model->B, largest);
    model_free(model);
}

// one training step and one evaluation at every level of recomputation
static void take_steps(const Dump* dump) {
    for (int recompute = 0; recompute <= 3; recompute++) {
        Model* model = load_model(dump, recompute, 1, recompute == 1);
        model->last_pass = true;
        model->stats_now = model->s->stats > 0;
        forward(model, dump, dump->patches, true);
        const double loss = loss_of(model);
        backward_and_update(model, dump, 1);
        forward(model, dump, dump->patches, false);
        const double after = loss_of(model);
        check(isfinite(loss) && isfinite(after), "-r %d: losses %g, %g", recompute, loss, after);
        model_free(model);
    }
}

static void print_losses(const Dump* dump) {
    double losses[STEPS];
    Model* model = load_model(dump, 1, 1);
    free(run_steps(model, dump, losses));
    for (double loss : losses) { printf("%a\n", loss); }
    model_free(model);
}

int main(int argc, char** argv) {
    const char* mode = argc > 1 && argv[1][0] == '-' ? argv[1] : "";
    const bool only_losses = strcmp(mode, "-losses") == 0, only_steps = strcmp(mode, "-steps") == 0;
    require(mode[0] == 0 || only_losses || only_steps, "unknown mode %s; use -losses or -steps", mode);
    const int first = mode[0] == 0 ? 1 : 2;
    glob_t files = {};
    if (argc <= first) { glob("dev/reference/dumps/deit_*.safetensors", 0, NULL, &files); }
    const int n = files.gl_pathc > 0 ? (int)files.gl_pathc : argc - first;
    char** paths = files.gl_pathc > 0 ? files.gl_pathv : argv + first;
    require(n > 0, "no dumps in dev/reference/dumps; run from the root of the repository, or give a dump's path");
    device_open();
    for (int i = 0; i < n; i++) {
        Dump dump = open_dump(paths[i]);
        const DeitConfig c = dump.config;
        printf("%s: image %d, patch %d, channels %d, width %d, depth %d, heads %d, classes %d, batch %zu, gamma %g, "
               "%s, drop-path %g\n", paths[i], c.image_size, c.patch_size, c.image_channels, c.channels, c.depth,
               c.heads, c.num_classes, dump.B, dump.gamma, dump.optimizer.adamw ? "adamw" : "sgd", dump.drop_path);
        if (only_losses) { print_losses(&dump); }
        else if (only_steps) { take_steps(&dump); }
        for (size_t chunk_bytes : {WHOLE, (size_t)1}) { // of the whole batch, of one image
            if (mode[0] != 0) { break; }
            test_against_pytorch(&dump, chunk_bytes);
            test_recomputation(dump, chunk_bytes);
        }
        if (mode[0] == 0) { test_plan(&dump); }
        safetensors_close((Safetensors*)dump.st);
        free(dump.patches);
        free(dump.labels);
    }
    globfree(&files);
    if (!only_losses) { printf("%d passed, %d failed\n", passed, failed); }
    return failed == 0 && (only_losses || passed > 0) ? EXIT_SUCCESS : EXIT_FAILURE;
}
