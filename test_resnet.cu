/*
Tests train_resnet.cu against PyTorch, and against itself.

build and run: make test_resnet && ./test_resnet                 every dump in dev/reference/dumps/resnet_*
               ./test_resnet a.safetensors b.safetensors ...   these dumps, which dev/reference/resnet.py writes
               ./test_resnet -losses a.safetensors             three losses as bits, to compare schedules
               ./test_resnet -steps a.safetensors              a step and an evaluation a level, for sanitizers

For each dump: logits, loss, the elements that DropIT keeps, every gradient, all losses and the running
statistics that the steps leave, as PyTorch computed them in fp32; then, at every recomputation level and in two
chunk sizes, losses, gradients and running statistics that must not differ by a bit. The exit code is the verdict.

How far may a gradient in bf16 be from PyTorch's in fp32? A value near 0 passes a ReLU or not by the
rounding of its last place, and batch norm makes each of them matter to all: in the dumps, PyTorch with
its activations rounded to bf16 errs by 9 to 15 % of a gradient's norm on average, and by 42 % at worst.
So each dump measures what is possible. All steps are also taken MOVES times with parameters and pixels
moved by one unit in their last place, up or down at random. The largest distance by which this moves a
gradient, times SLACK, is the distance from PyTorch's that it is allowed. Where that is above MOST of its
norm, bf16 cannot tell a right gradient from a wrong one: it is counted as not compared, and of a dump
one in ten may be. What is smaller, and what is not compared, fp32 finds.
*/

#define TESTING
#include "train_resnet.cu"
#define DUMP_SCRIPT "dev/reference/resnet.py"
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
#define LOSSES_RTOL 0.015625 // and no less than SLACK times what moves give
#define TIE_RTOL 0.0625
#define TIE_SHARE 0.02
#endif
#define RTOL 2e-5        // fp32: of an element, plus the same of the tensor's largest
#define LEAST 0.00390625 // bf16: of a tensor's norm, where a move changes nothing
#define SLACK 2.0
#define MOST 0.7         // bf16: of a tensor's norm; more says nothing, since zeros are 1 away
#define WHOLE ((size_t)32 << 20) // bytes of a chunk: the whole batch of a dump
#define STEPS 3

typedef struct {
    const Safetensors* st;
    ResnetConfig config;
    OptimizerConfig optimizer;
    size_t B;
    int strategy, drop_all;
    double gamma;
    floatX* image; // (B, S, S, CH)
    int* labels;
} Dump;

static Dump open_dump(const char* path) {
    Safetensors* st = safetensors_open(path);
    const auto text = [&](const char* key) {
        const char* value = safetensors_metadata(st, key);
        require(value != NULL, "%s lacks the metadata %s; write it with " DUMP_SCRIPT " dump", path, key);
        return value;
    };
    const auto whole = [&](const char* key) { return (int)number(st, key, NAN); };
    require(strcmp(text("model"), "resnet") == 0, "%s is a dump of another model than resnet", path);
    require(strcmp(text("optimizer"), "sgd") == 0, "%s: the optimizer is %s, not sgd", path, text("optimizer"));
    Dump dump = {};
    ResnetConfig* c = &dump.config;
    dump.st = st;
    const bool wide = strcmp(text("block"), "bottleneck") == 0, pools = strcmp(text("stem"), "imagenet") == 0;
    *c = ResnetConfig{wide, {}, whole("width"), pools, whole("image_size"), whole("in_chans"), whole("num_classes")};
    parse_layers(c->layers, text("layers"));
    const size_t B = dump.B = whole("batch_size"), S = c->image_size, CH = c->image_channels;
    require(c->width > 0 && c->num_classes > 0 && CH > 0 && S > 0 && B > 0,
            "%s: width %d, classes %d, channels %zu, image %zu, batch %zu do not make a model", path, c->width,
            c->num_classes, CH, S, B);
    dump.strategy = MINK;
    dump.gamma = number(st, "gamma", 0.0);
    dump.drop_all = safetensors_find(st, "mask.conv1") != NULL;
    dump.optimizer = OptimizerConfig{false, number(st, "lr", NAN), 0.9, 0.999, 1e-8, number(st, "weight_decay", 0.0),
                                     number(st, "momentum", 0.9), 0.0, number(st, "nesterov", 0.0) == 1.0};
    float* image = (float*)tensor(st, "image", "F32", B * CH * S * S);
    dump.image = host_new<floatX>(B * CH * S * S, "images");
    for (size_t i = 0; i < B * CH * S * S; i++) { // of the file: (B, CH, S*S)
        const size_t b = i / (CH*S*S), c = i / (S*S) % CH, pixel = i % (S*S);
        dump.image[(b * S*S + pixel) * CH + c] = (floatX)image[i];
    }
    free(image);
    dump.labels = (int*)tensor(st, "label", "I32", B);
    for (size_t b = 0; b < B; b++) {
        const int label = dump.labels[b];
        require(label >= 0 && label < c->num_classes, "%s: label %d of image %zu", path, label, b);
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
    s->decay_all = 1;
    s->stats = stats && dump->gamma > 0.0;
    model->config = dump->config;
    model->B = dump->B;
    model->H = model->W = dump->config.image_size;
    model->CH = dump->config.image_channels;
    model->V = dump->config.num_classes;
    model->strategy = dump->strategy;
    model->chunk_bytes = chunk_bytes;
    resnet_shape(model);
    return model;
}

static Model* load_model(const Dump* dump, int recompute, size_t chunk_bytes, bool stats = false) {
    Model* model = make_model(dump, recompute, chunk_bytes, stats);
    model_allocate(model);
    float* values = host_new<float>(model->num_values, "parameters");
    const TensorSet weights = {"param.", model->master, NULL, NULL}, buffers = {"buffer.", NULL, NULL, model->fixed};
    read_tensors(model, dump->st, weights.prefix, &weights, values);
    read_tensors(model, dump->st, buffers.prefix, &buffers, values);
    set_parameters(model, values);
    free(values);
    return model;
}

// forward pass of the dump's batch, gradients zero
static void forward(Model* model, const Dump* dump, const floatX* image, bool training) {
    floatX* to = (floatX*)activation_at(model->acts.image, 0, false);
    cudaCheck(cudaMemcpy(to, image, model->acts.image->n * sizeof(floatX), cudaMemcpyHostToDevice));
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

// Puts the set of elements that the dump keeps in the place of ours, so that the gradients can be
// compared. C: its channels, which come first in the dump. judged: ours must have k elements, obey our
// own rule, and differ from the dump's within rounding only
static void take_mask(const Activation* a, const Safetensors* st, const char* name, size_t C, bool judged) {
    if (!a->dropped || safetensors_find(st, name) == NULL) { return; }
    const Dropped d = a->dropit;
    const size_t image = a->per_image, area = image / C;
    uint8_t* mask = (uint8_t*)tensor(st, name, "U8", CEIL_DIV(d.n, (size_t)8));
    const auto kept_there = [=](size_t i) { // element i, in our order
        const size_t j = i / image * image + i % C * area + i % image / C;
        return (bool)(mask[j / 8] >> (j % 8) & 1);
    };
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
        const bool kept = kept_there(i);
        if (kept != (bitmap[i / 32] >> (i % 32) & 1)) {
            differ += x[i] != 0.0f;
            if (x[i] != 0.0f) { farthest = fmax(farthest, fabs(fabs(x[i]) - smallest_kept) / largest); }
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

static void take_masks(Model* model, const Safetensors* st, bool judged) {
    auto* a = &model->acts;
    take_mask(a->image, st, "mask.conv1", model->CH, judged);
    for (size_t l = 0; l < model->L; l++) {
        const Block b = block_of(model, l);
        const struct { const Activation* a; const char* layer; size_t C; } inputs[] = {
            {&a->x[l], "conv1", b.in}, {&a->x[l], "downsample.0", b.in}, {&a->a1[l], "conv2", b.width},
            {&a->a2[l], "conv3", b.width}};
        for (const auto& i : inputs) {
            char name[96];
            snprintf(name, sizeof(name), "mask.layer%zu.%zu.%s", b.stage, b.index, i.layer);
            take_mask(i.a, st, name, i.C, judged);
        }
    }
    take_mask(a->pooled, st, "mask.fc", a->pooled->per_image, judged);
}

// logits, the gradients of the first step, the losses of all, and the buffers after them, one after another
typedef struct {
    float* values;
    size_t logits, gradients, losses, buffers; // how many
} Outcome;

// As many steps as the dump has losses. The first has the kept sets of the dump, the others their own.
// move 0: as dumped, and the kept sets are judged; else parameters and pixels are moved, for one step
static Outcome train_dump(const Dump* dump, size_t chunk_bytes, unsigned move) {
    Model* model = load_model(dump, 0, chunk_bytes, true);
    const size_t n = model->num_parameters, pixels = model->acts.image->n;
    Outcome o = {NULL, model->B * model->V, n, st_numel(safetensors_find(dump->st, "losses")),
                 model->num_buffers};
    o.values = host_new<float>(o.logits + o.gradients + o.losses + o.buffers, "an outcome");
    floatX* image = host_new<floatX>(pixels, "images");
    memcpy((void*)image, (const void*)dump->image, pixels * sizeof(floatX));
    if (move > 0) {
        floatX* moved = host_new<floatX>(n, "parameters");
        float* values = host_new<float>(model->num_values, "parameters");
        to_host(values + n, model->fixed, model->num_buffers);
        cudaCheck(cudaMemcpy(moved, model->params_memory, n * sizeof(floatX), cudaMemcpyDeviceToHost));
        move_last_place(moved, n, move, 0);
        move_last_place(image, pixels, move, 1);
        for (size_t i = 0; i < n; i++) { values[i] = (float)moved[i]; }
        set_parameters(model, values);
        free(moved);
        free(values);
    }
    for (size_t step = 0; step < o.losses; step++) {
        forward(model, dump, image, true);
        if (step == 0) {
            float* logits = to_host_floats((floatX*)model->acts.logits->data, o.logits);
            memcpy(o.values, logits, o.logits * sizeof(float));
            free(logits);
        }
        if (step == 0 && dump->gamma > 0.0) { take_masks(model, dump->st, move == 0); }
        o.values[o.logits + n + step] = (float)loss_of(model);
        backward_and_update(model, dump, (int)step + 1);
        if (step > 0) { continue; }
        float* gradients = to_host_floats(model->grads_memory, n);
        memcpy(o.values + o.logits, gradients, n * sizeof(float));
        free(gradients);
    }
    to_host(o.values + o.logits + n + o.losses, model->fixed, o.buffers);
    free(image);
    model_free(model);
    return o;
}

// how far `at` may be from PyTorch's n values, over their norm
static double allowed(const Outcome* runs, size_t at, double norm, size_t n) {
    double moved = 0.0;
    for (int m = 1; m <= MOVES; m++) {
        moved = fmax(moved, distance(1.0, runs[0].values + at, runs[m].values + at, n) / norm);
    }
    return fmax(SLACK * moved, LEAST);
}

static struct { // of a dump
    char name[96];
    double error; // largest error over what is allowed; above 1 fails
    int compared, not_compared; // tensors; bf16: those that it cannot judge
} worst;

// compares n values at `at` with PyTorch's: element by element in fp32, by distance in bf16. NaN fails
static void compare(const char* name, const Outcome* runs, size_t at, const float* expected, size_t n) {
    const float* a = runs[0].values + at;
    double error = 0.0, largest = 0.0;
    for (size_t i = 0; i < n; i++) { largest = fmax(largest, fabs(expected[i])); }
    if (MOVES == 0) {
        for (size_t i = 0; i < n; i++) {
            const double apart = fabs((double)a[i] - expected[i]);
            const double e = apart / (RTOL * (fabs(expected[i]) + largest));
            if (apart != 0.0 && !(e <= error)) { error = e; }
        }
    } else {
        const double norm = distance(0.0, a, expected, n), most = allowed(runs, at, norm, n);
        const double apart = distance(1.0, a, expected, n);
        error = apart == 0.0 ? 0.0 : apart / (norm * most);
        if (most > MOST && isfinite(apart)) {
            worst.not_compared++;
            return;
        }
    }
    worst.compared++;
    check(error <= 1.0, "%s: error over allowed %.3g", name, error);
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
    worst = {"", -1.0, 0, 0};
    float* logits = (float*)tensor(dump->st, "logits", "F32", o->logits);
    compare("logits", runs, 0, logits, o->logits);
    for (const Parameter& p : model->parameters) {
        char name[128];
        const bool trained = is_trained(&p);
        snprintf(name, sizeof(name), "%s.%s", trained ? "grad" : "after", p.name);
        float *there = (float*)tensor(dump->st, name, "F32", p.n), *expected = host_new<float>(p.n, name);
        copy_tensor(&p, expected, there, true);
        compare(name, runs, o->logits + p.offset + (trained ? 0 : o->losses), expected, p.n);
        free(there);
        free(expected);
    }
    float* losses = (float*)tensor(dump->st, "losses", "F32", o->losses);
    float* loss = (float*)tensor(dump->st, "loss", "F32", 1);
    const float* ours = o->values + o->logits + o->gradients;
    check(fabs(ours[0] / loss[0] - 1.0) <= LOSS_RTOL, "the loss is %.6g, PyTorch's is %.6g", ours[0], loss[0]);
    const double apart = distance(1.0, ours, losses, o->losses) / distance(0.0, ours, losses, o->losses);
    const double norm = distance(0.0, ours, losses, o->losses);
    const double moved = MOVES > 0 ? allowed(runs, o->logits + o->gradients, norm, o->losses) : 0.0;
    const double limit = fmax(LOSSES_RTOL, moved);
    check(apart <= limit && limit <= MOST, "losses: the error is %.3g of their norm", apart);
    check(worst.not_compared * 9 <= worst.compared, "%d of %d tensors are too uncertain in bf16 to be compared",
          worst.not_compared, worst.not_compared + worst.compared);
    printf("    chunks of %zu images: of what is allowed, losses have %.3g, %s has %.3g", model->chunk_images,
           apart / limit, worst.name, worst.error);
    if (worst.not_compared > 0) { printf(", not compared: %d tensors", worst.not_compared); }
    printf("\n");
    for (int m = 0; m <= MOVES; m++) { free(runs[m].values); }
    for (float* p : {logits, losses, loss}) { free(p); }
    model_free(model);
}

// losses of three steps with our own kept sets, the gradients of the last, and the buffers after them
static float* run_steps(Model* model, const Dump* dump, double losses[STEPS]) {
    for (int step = 0; step < STEPS; step++) {
        forward(model, dump, dump->image, true);
        losses[step] = loss_of(model);
        backward_and_update(model, dump, step + 1);
    }
    const size_t n = model->num_parameters;
    float* values = host_new<float>(n + model->num_buffers, "gradients");
    to_host(values, model->grads_memory, n);
    to_host(values + n, model->fixed, model->num_buffers);
    return values;
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
                    && memcmp(grads, g, (model->num_parameters + model->num_buffers) * sizeof(float)) == 0;
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
        forward(model, dump, dump->image, true);
        const double loss = loss_of(model);
        backward_and_update(model, dump, 1);
        forward(model, dump, dump->image, false);
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
    if (argc <= first) { glob("dev/reference/dumps/resnet_*.safetensors", 0, NULL, &files); }
    const int n = files.gl_pathc > 0 ? (int)files.gl_pathc : argc - first;
    char** paths = files.gl_pathc > 0 ? files.gl_pathv : argv + first;
    require(n > 0, "no dumps in dev/reference/dumps; run from the root of the repository, or give a dump's path");
    device_open();
    for (int i = 0; i < n; i++) {
        Dump dump = open_dump(paths[i]);
        const ResnetConfig c = dump.config;
        printf("%s: %s, layers %d,%d,%d,%d, width %d, stem %s, image %d, channels %d, classes %d, batch %zu, "
               "gamma %g\n", paths[i], c.wide ? "bottleneck" : "basic", c.layers[0], c.layers[1], c.layers[2],
               c.layers[3], c.width,
               c.pools ? "imagenet" : "cifar", c.image_size, c.image_channels, c.num_classes, dump.B, dump.gamma);
        if (only_losses) { print_losses(&dump); }
        else if (only_steps) { take_steps(&dump); }
        for (size_t chunk_bytes : {WHOLE, (size_t)1}) { // of the whole batch, of one image
            if (mode[0] != 0) { break; }
            test_against_pytorch(&dump, chunk_bytes);
            test_recomputation(dump, chunk_bytes);
        }
        if (mode[0] == 0) { test_plan(&dump); }
        safetensors_close((Safetensors*)dump.st);
        free(dump.image);
        free(dump.labels);
    }
    globfree(&files);
    if (!only_losses) { printf("%d passed, %d failed\n", passed, failed); }
    return failed == 0 && (only_losses || passed > 0) ? EXIT_SUCCESS : EXIT_FAILURE;
}
