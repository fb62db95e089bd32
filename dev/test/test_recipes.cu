/*
The recipes of train_deit.cu against what timm and torch make of the published commands, which
dev/reference/recipes.py wrote to dev/reference/fixtures/recipes.safetensors: learning rates of every epoch,
optimizers, the moving average, weight-decay groups, drop-path. And what belongs to no reference: learning
rates by steps, operations of a step, initial values, what is masked when it is recomputed.

build and run: make test   (or dev/cpu's recipe on this file); the exit code is the verdict
*/

#define TESTING
#include "../../train_deit.cu"
#include "check.cuh"

static Safetensors* fixture;

template <class T> static const T* values(const char* name, const char* dtype, size_t* n) {
    const StTensor* t = safetensors_find(fixture, name);
    require(t != NULL && strcmp(t->dtype, dtype) == 0, "%s lacks %s as %s; run dev/reference/recipes.py", fixture->file.path, name, dtype);
    *n = st_numel(t);
    return (const T*)t->data;
}

// value of a flag in a recipe, "" where it lacks; the same memory each time
static const char* flag_of(const char* flags, const char* flag) {
    static char value[64];
    char word[64];
    value[0] = 0;
    for (const char* p = flags; sscanf(p, " %63s %63s", word, value) == 2; value[0] = 0) {
        if (strcmp(word, flag) == 0) { break; }
        p = strstr(p, value) + strlen(value);
    }
    return value;
}

static double number_of(const char* flags, const char* flag) {
    const char* text = flag_of(flags, flag);
    char* end;
    const double v = strtod(text, &end);
    check(end != text && *end == 0, "%s of a recipe is '%s'", flag, text);
    return v;
}

static bool close_to(double a, double b, double rtol) { return fabs(a - b) <= rtol * fabs(b); } // NaN fails

static void test_recipe(const char* name, const char* flags) {
    const char *expected = safetensors_metadata(fixture, name), *names = safetensors_metadata(fixture, "flags");
    check(expected != NULL && names != NULL, "%s is not in the fixture", name);
    char flag[64], value[64];
    int compared = 0;
    for (int n = 0, m = 0; sscanf(names, " %63s%n", flag, &n) == 1 && sscanf(expected, " %63s%n", value, &m) == 1; names += n, expected += m) {
        char *end_a, *end_b;
        const char* ours = flag_of(flags, flag);
        const double a = strtod(ours, &end_a), b = strtod(value, &end_b);
        const bool numbers = end_b != value && *end_b == 0;
        const bool absent = strcmp(flag, "-momentum") == 0 && ours[0] == 0; // AdamW has none
        check(absent || (numbers ? a == b && *end_a == 0 && ours[0] != 0 : strcmp(ours, value) == 0), "%s: %s is '%s', expected %s", name, flag, ours, value);
        compared++;
    }
    check(compared == 16, "%s: %d flags compared", name, compared);
    // the published commands run on two GPUs
    const int epoch_steps = 3, epochs = (int)number_of(flags, "-e");
    const double base = number_of(flags, "-l"), lr = number_of(flags, "-unscale_lr") == 1.0 ? base : base * (number_of(flags, "-b") * 2) / 512.0;
    const Schedule s = {strcmp(flag_of(flags, "-schedule"), "epoch") == 0, lr, number_of(flags, "-min_lr"), number_of(flags, "-warmup_lr"),
                        (int)number_of(flags, "-warmup_epochs"), epochs, epoch_steps};
    char tensor[96];
    size_t n, start_n;
    snprintf(tensor, sizeof(tensor), "lr.%s", name);
    const double* rates = values<double>(tensor, "F64", &n);
    double worst = 0.0;
    for (size_t step = 0; step < n * epoch_steps; step++) {
        const double error = fabs(learning_rate_at(&s, (int)step) / rates[step / epoch_steps] - 1.0);
        if (!(error <= worst)) { worst = error; }
    }
    check(n == (size_t)epochs + (size_t)number_of(flags, "-cooldown") && worst <= 1e-12, "%s: %zu epochs, learning rates differ by %g", name, n, worst);
    // its optimizer
    const bool adamw = strcmp(flag_of(flags, "-opt"), "adamw") == 0;
    const OptimizerConfig o = {adamw, 0.01, 0.9, 0.999, 1e-8, number_of(flags, "-wd"), adamw ? 0.0 : number_of(flags, "-momentum"), 0.0,
                               strcmp(flag_of(flags, "-nesterov"), "1") == 0};
    snprintf(tensor, sizeof(tensor), "optimizer.%s", name);
    const float *start = values<float>("start", "F32", &start_n), *gradients = values<float>("gradients", "F32", &n);
    const float* after = values<float>(tensor, "F32", &n);
    const size_t bytes = start_n * sizeof(float);
    float *master, *m, *v, *g, *host = (float*)malloc(bytes);
    floatX* params;
    StepResult* result;
    cudaCheck(cudaMalloc((void**)&master, bytes));
    cudaCheck(cudaMalloc((void**)&m, bytes));
    cudaCheck(cudaMalloc((void**)&v, bytes));
    cudaCheck(cudaMalloc((void**)&g, bytes));
    cudaCheck(cudaMalloc((void**)&params, start_n * sizeof(floatX)));
    cudaCheck(cudaMalloc((void**)&result, sizeof(StepResult)));
    cudaCheck(cudaMemcpy(master, start, bytes, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemset(m, 0, bytes));
    cudaCheck(cudaMemset(v, 0, bytes));
    cudaCheck(cudaMemset(result, 0, sizeof(StepResult)));
    worst = 0.0;
    for (size_t step = 0; step < n / start_n; step++) {
        cudaCheck(cudaMemcpy(g, gradients + step * start_n, bytes, cudaMemcpyHostToDevice));
        optimizer_update(params, master, m, v, g, start_n, result, o, o.learning_rate, (int)step + 1);
        cudaCheck(cudaDeviceSynchronize());
        cudaCheck(cudaMemcpy(host, master, bytes, cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < start_n; i++) {
            const double error = fabs((double)host[i] - after[step * start_n + i]);
            if (!(error <= worst)) { worst = error; }
        }
    }
    check(worst <= 1e-6, "%s: weights after %zu steps differ by %g", name, n / start_n, worst); // weights of about 1
    cudaCheck(cudaFree(master));
    cudaCheck(cudaFree(m));
    cudaCheck(cudaFree(v));
    cudaCheck(cudaFree(g));
    cudaCheck(cudaFree(params));
    cudaCheck(cudaFree(result));
    free(host);
}

static void test_average(const char* name, double decay) {
    size_t n, steps;
    const float *start = values<float>("start", "F32", &n), *weights = values<float>("gradients", "F32", &steps), *after = values<float>(name, "F32", &steps);
    float *ema, *w, *host = (float*)malloc(n * sizeof(float));
    cudaCheck(cudaMalloc((void**)&ema, n * sizeof(float)));
    cudaCheck(cudaMalloc((void**)&w, n * sizeof(float)));
    cudaCheck(cudaMemcpy(ema, start, n * sizeof(float), cudaMemcpyHostToDevice));
    double worst = 0.0;
    for (size_t step = 0; step < steps / n; step++) {
        cudaCheck(cudaMemcpy(w, weights + step * n, n * sizeof(float), cudaMemcpyHostToDevice));
        ema_update(ema, w, n, decay);
        cudaCheck(cudaDeviceSynchronize());
        cudaCheck(cudaMemcpy(host, ema, n * sizeof(float), cudaMemcpyDeviceToHost));
        for (size_t i = 0; i < n; i++) {
            const double error = fabs((double)host[i] - after[step * n + i]);
            if (!(error <= worst)) { worst = error; }
        }
    }
    check(steps > 0 && worst <= 1e-6, "%s: averages differ by %g", name, worst);
    cudaCheck(cudaFree(ema));
    cudaCheck(cudaFree(w));
    free(host);
}

// a model of two blocks as -m would give it
static Model* small_model(const char* flags) {
    Model* model = model_new();
    set_options(model, "", flags);
    model->config = DeitConfig{32, 16, 3, 10, 192, 2, 3};
    model->strategy = strcmp(model->s->strategy, "random") == 0 ? RANDOM : MINK;
    model->adamw = strcmp(model->s->optimizer, "adamw") == 0;
    model->B = 2;
    model->H = model->W = 32;
    model->CH = 3;
    model->V = 10;
    model->seed = 5;
    model->chunk_bytes = 1;
    deit_shape(model);
    model->augment = augment_new("none");
    return model;
}

static float* to_host(const float* device, size_t n) {
    float* host = host_new<float>(n, "a tensor");
    cudaCheck(cudaStreamSynchronize(main_stream));
    cudaCheck(cudaMemcpy(host, device, n * sizeof(float), cudaMemcpyDeviceToHost));
    return host;
}

// An update with gradients of zero moves nothing but what decays, under AdamW: those tensors that timm decays, or all. The
// moving average follows the weights
static void test_decay(int decay_all) {
    Model* model = small_model("-opt adamw -ema 0.75");
    model->s->decay_all = decay_all;
    model_allocate(model);
    init_parameters(model);
    const size_t n = model->num_parameters;
    float* before = to_host(model->master, n);
    zero_gradients(model);
    model_update(model, OptimizerConfig{true, 0.1, 0.9, 0.999, 1e-8, 0.5, 0.0, 0.0, false}, 0.1, 1);
    float *after = to_host(model->master, n), *ema = to_host(model->ema, n);
    int in_fixture = 0;
    for (const Parameter& p : model->parameters) {
        char name[128];
        size_t one;
        snprintf(name, sizeof(name), "decay.%s", p.name);
        const bool decays = *values<uint8_t>(name, "U8", &one) || decay_all;
        double worst = 0.0, worst_ema = 0.0;
        for (size_t j = p.offset; j < p.offset + p.n; j++) {
            worst = fmax(worst, fabs(after[j] - (decays ? 0.95 : 1.0) * before[j]));
            worst_ema = fmax(worst_ema, fabs(ema[j] - (0.75 * before[j] + 0.25 * after[j])));
        }
        check(worst <= 1e-7 && worst_ema <= 1e-7, "%s, -wd_all %d: weights are %g, their average %g away", name,
              decay_all, worst, worst_ema);
    }
    for (const StTensor& t : fixture->tensors) { in_fixture += strncmp(t.name, "decay.", 6) == 0; }
    check(model->parameters.n == in_fixture, "%d tensors, timm's model has %d", model->parameters.n, in_fixture);
    free(before);
    free(after);
    free(ema);
    model_free(model);
}

// the products of a step: counted layer by layer, forward once and backward twice
static void test_flops(void) {
    Model* model = small_model("");
    double products = 4.0 * (3 * 16 * 16) * 192 + 192.0 * 10;
    products += 2 * 5 * (192.0 * (3 * 192 + 192 + 4 * 192 + 4 * 192) + 2.0 * 5 * 192); // of a token: linears, attention
    const double flops = model_flops(model, 7);
    check(close_to(flops, 42.0 * products, 1e-12), "operations of a step: %g, expected %g", flops, 42.0 * products);
    model_free(model);
}

// Initial values are timm's, and element i of a tensor is drawn from (seed, name of the tensor, i): a tensor that is added to
// the table changes no other
static void test_initial_values(void) {
    const double patch = 1.0 / sqrt(3.0 * 16 * 16);
    const struct { const char* name; char kind; double scale; } tensors[] = {
        {"patch_embed.proj.weight", 'u', patch}, {"patch_embed.proj.bias", 'u', patch}, {"pos_embed", 'n', 0.02},
        {"cls_token", 'n', 1e-6}, {"blocks.0.norm1.weight", 'c', 1.0}, {"blocks.1.norm1.bias", 'c', 0.0},
        {"blocks.0.attn.qkv.weight", 'n', 0.02}, {"blocks.1.attn.qkv.weight", 'n', 0.02},
        {"blocks.1.attn.qkv.bias", 'c', 0.0}, {"blocks.0.attn.proj.weight", 'n', 0.02},
        {"blocks.1.norm2.weight", 'c', 1.0}, {"blocks.1.mlp.fc1.weight", 'n', 0.02},
        {"blocks.0.mlp.fc1.bias", 'c', 0.0}, {"blocks.0.mlp.fc2.weight", 'n', 0.02}, {"norm.weight", 'c', 1.0},
        {"norm.bias", 'c', 0.0}, {"head.weight", 'n', 0.02}, {"head.bias", 'c', 0.0}};
    Model* model = small_model("-ema 0.9");
    model_allocate(model);
    init_parameters(model);
    const size_t elements = model->num_parameters;
    float *all = to_host(model->master, elements), *ema = to_host(model->ema, elements);
    check(memcmp(all, ema, elements * sizeof(float)) == 0, "the moving average begins elsewhere than the weights");
    for (const auto& t : tensors) {
        const Parameter* p = NULL;
        for (const Parameter& q : model->parameters) { if (strcmp(q.name, t.name) == 0) { p = &q; } }
        check(p != NULL, "there is no %s", t.name);
        double worst = 0.0, sum = 0.0, squares = 0.0;
        for (size_t i = 0; p != NULL && i < p->n; i++) {
            const uint4 u = philox(5, RNG_INIT, crc_32(0, t.name, strlen(t.name)), i);
            const double drawn = t.kind == 'n' ? normal(u) : t.kind == 'u' ? 2.0 * uniform(u.x) - 1.0 : 1.0;
            const double v = all[p->offset + i];
            worst = fmax(worst, fabs(v - (float)(t.scale * drawn)));
            sum += v;
            squares += v * v;
        }
        check(worst == 0.0, "%s begins %g away from the values that its name draws", t.name, worst);
        if (p == NULL || t.kind == 'c') { continue; }
        const double n = (double)p->n, deviation = t.kind == 'u' ? t.scale / sqrt(3.0) : t.scale;
        const double mean = sum / n, spread = sqrt(squares / n), limit = 4.0 / sqrt(n);
        check(fabs(mean) <= limit * deviation && fabs(spread / deviation - 1.0) <= limit,
              "%s has mean %g and deviation %g, timm's has 0 and %g", t.name, mean, spread, deviation);
    }
    free(all);
    free(ema);
    model_free(model);
}

// The kernel that recomputes a norm or GELU masks it only where no linear layer reads it again: at -r 1 all three, from -r 2
// on fc2's input alone; and only min-k's choice is one comparison
static void test_masked(void) {
    for (int recompute = 0; recompute <= 3; recompute++) {
        for (const char* flags : {"-g 0.7 -s mink", "-g 0.7 -s random", "-g 0 -s mink"}) {
            Model* model = small_model(flags);
            model->s->recompute = recompute;
            plan_model(model);
            const bool chosen = strcmp(flags, "-g 0.7 -s mink") == 0;
            const bool norms = chosen && recompute == 1, gelu = chosen && recompute >= 1;
            for (int l = 0; l < 2; l++) {
                const auto* a = &model->acts;
                const bool masked[] = {a->ln1[l].masked, a->ln2[l].masked, a->fch_gelu[l].masked, a->atty[l].masked};
                check(masked[0] == norms && masked[1] == norms && masked[2] == gelu && !masked[3],
                      "-r %d %s: masked are ln1 %d, ln2 %d, fch_gelu %d, atty %d", recompute, flags, masked[0],
                      masked[1], masked[2], masked[3]);
            }
            model_free(model);
        }
    }
}

static void test_drop_path(int number) {
    char name[64];
    size_t n, settings_n;
    snprintf(name, sizeof(name), "path.%d", number);
    const double* settings = values<double>(name, "F64", &settings_n); // rate, depth, images, seed, step, first image
    const int depth = (int)settings[1], images = (int)settings[2];
    snprintf(name, sizeof(name), "path_rates.%d", number);
    const double* rates = values<double>(name, "F64", &n);
    for (int l = 0; l < depth; l++) {
        check((int)n == depth && fabs(drop_path_rate((float)settings[0], l, depth) - rates[l]) <= 1e-7, "%s: block %d has %.9g, expected %.9g", name, l,
              drop_path_rate((float)settings[0], l, depth), rates[l]);
    }
    snprintf(name, sizeof(name), "path_scales.%d", number);
    const float* expected = values<float>(name, "F32", &n);
    float *scales, *host = (float*)malloc(n * sizeof(float));
    cudaCheck(cudaMalloc((void**)&scales, n * sizeof(float)));
    drop_path_scales(scales, depth, images, settings[0], (unsigned long long)settings[3], (unsigned)settings[4], (unsigned)settings[5]);
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(host, scales, n * sizeof(float), cudaMemcpyDeviceToHost));
    double worst = 0.0;
    for (size_t i = 0; i < n; i++) {
        const double error = host[i] == 0.0f || expected[i] == 0.0f ? (host[i] == expected[i] ? 0.0 : 1.0) : fabs(host[i] / expected[i] - 1.0);
        if (!(error <= worst)) { worst = error; }
    }
    check(n == (size_t)depth * 2 * images && worst <= 1e-6, "%s: scales differ by %g", name, worst);
    cudaCheck(cudaFree(scales));
    free(host);
}

// by steps, as the trainer had it before there were other rates than -l: the same bits; then from -warmup_lr to -min_lr and on
static void test_schedule_by_steps(void) {
    const Schedule plain = {false, 2e-3, 0.0, 0.0, 50, 936, 156}, all = {false, 1.0, 0.125, 0.25, 3, 13, 5}, none = {false, 1.0, 0.0, 0.0, 0, 4, 2};
    for (int step = 0; step < 936; step++) {
        const double was = step < 50 ? 2e-3 * (step + 1) / 50 : 0.5 * 2e-3 * (1.0 + cos(M_PI * (step - 50) / 886));
        check(learning_rate_at(&plain, step) == was, "step %d: %g, expected %g", step, learning_rate_at(&plain, step), was);
    }
    const double expected[] = {0.5, 0.75, 1.0, 1.0, 0.125 + 0.4375 * (1.0 + cos(M_PI * 0.1))};
    for (int step = 0; step < 5; step++) { check(close_to(learning_rate_at(&all, step), expected[step], 1e-14), "warm-up, step %d", step); }
    check(close_to(learning_rate_at(&all, 8), 0.5625, 1e-14) && learning_rate_at(&all, 13) == 0.125 && learning_rate_at(&all, 99) == 0.125, "end of a schedule");
    check(learning_rate_at(&none, 0) == 1.0 && close_to(learning_rate_at(&none, 2), 0.5, 1e-14), "a schedule without warm-up");
    const Schedule epochs = {true, 1.0, 0.125, 0.25, 0, 2, 4}; // without warm-up: epochs 0 and 1 at lr, 2 half way, then cool-down
    check(learning_rate_at(&epochs, 7) == 1.0 && close_to(learning_rate_at(&epochs, 8), 0.5625, 1e-14) && learning_rate_at(&epochs, 12) == 0.125, "by epochs");
}

// The random strategy draws other numbers for each tensor, on each rank, in each pass
static void test_random_streams(void) {
    Model* model = small_model("-g 0.5 -s random -g_all 1");
    unsigned long long seeds[64];
    int n = 0, equal = 0;
    plan_model(model);
    model->pass = 3;
    for (rank = 0; rank < 3; rank++) {
        for (const Activation* a : model->activations) {
            if (!a->dropped) { continue; }
            const DropRule rule = drop_rule(model, a);
            for (int i = 0; i < n; i++) { equal += seeds[i] == rule.seed; }
            seeds[n++] = rule.seed;
            check(rule.step == 3, "%s, copy %d: pass 3 draws for %u", a->name, a->copy, rule.step);
        }
    }
    rank = 0;
    check(n == 3 * 10 && equal == 0, "%d of %d random streams are equal", equal, n);
}

// The loss of a batch is that of its smoothing and its mixing: of two images, lam of the own label and 1 - lam of the other's
static void test_classifier_loss(void) {
    const floatX values[2][10] = {{0.5f, -1.0f, 2.0f}, {1.0f, 0.25f, -0.75f, 3.0f}};
    const int classes[2] = {2, 7};
    const double smoothing = 0.25, lam = 0.7;
    Model* model = small_model("");
    model_allocate(model);
    floatX* logits = (floatX*)model->acts.logits->data;
    cudaCheck(cudaMemcpy(logits, values, sizeof(values), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(model->labels, classes, sizeof(classes), cudaMemcpyHostToDevice));
    Batch batch = {};
    batch.n = 2;
    batch.smoothing = (float)smoothing;
    batch.augment.lam = (float)lam;
    zero_gradients(model);
    classifier_loss(model, logits, model->labels, &batch, 1.0f);
    double expected = 0.0;
    for (int b = 0; b < 2; b++) {
        double sum = 0.0;
        for (int v = 0; v < 10; v++) { sum += exp((double)(float)values[b][v]); }
        for (int v = 0; v < 10; v++) {
            const double hard = (v == classes[b] ? lam : 0.0) + (v == classes[1 - b] ? 1.0 - lam : 0.0);
            expected += ((1.0 - smoothing) * hard + smoothing / 10) * (log(sum) - (double)(float)values[b][v]);
        }
    }
    const double loss = model_result(model).sums[0];
    check(close_to(loss, expected, 1e-5), "a smoothed and mixed loss is %.7g, expected %.7g", loss, expected);
    model_free(model);
}

// What the trainer makes of a recipe's flags on the two GPUs that the published commands run on, and of warm-up in epochs
static void test_run_schedule(const char* name, const char* flags) {
    Model* model = small_model(flags);
    Run run = {};
    char tensor[96];
    size_t n;
    run.epoch_steps = 3;
    run.step_images = 2 * model->s->B;
    run_schedule(&run, model);
    snprintf(tensor, sizeof(tensor), "lr.%s", name);
    const double* rates = values<double>(tensor, "F64", &n);
    double worst = 0.0;
    for (size_t step = 0; step < 3 * n; step++) { worst = fmax(worst, fabs(learning_rate_at(&run.schedule, (int)step) / rates[step / 3] - 1.0)); }
    check(worst <= 1e-12, "%s: the trainer's learning rates differ by %g", name, worst);
    const OptimizerConfig o = run.optimizer;
    check(o.adamw == model->adamw && o.weight_decay == number_of(flags, "-wd") && o.nesterov == !model->adamw && o.eps == 1e-8
          && o.momentum == 0.9 && o.beta1 == 0.9 && o.beta2 == 0.999 && o.clip == 0.0, "%s: its optimizer", name);
    set_options(model, "", "-schedule step -warmup 7 -clip 2 -e 5");
    for (int epochs : {0, 4}) {
        model->s->warmup_epochs = epochs;
        run_schedule(&run, model);
        check(run.schedule.warmup == (epochs > 0 ? 12 : 7) && run.schedule.length == 15 && !run.schedule.by_epochs && run.optimizer.clip == 2.0,
              "-warmup_epochs %d: warm-up of %d of %d steps", epochs, run.schedule.warmup, run.schedule.length);
    }
}

// All flags but these say what a run computes: a resumed run must have the same. Those that are not neutral stand in the metadata
static void test_flags_of_a_run(void) {
    const char* any[] = {"-recipe", "-i", "-j", "-o", "-x", "-stats", "-r", "-w", "-predict", "-sheet", "-threads", "-z", "-n", "-keep",
                         "-y", "-v", "-eval", "-plan"};
    Model* model = small_model("");
    for (int i = 0; i < model->num_options; i++) {
        bool may_change = false;
        for (const char* flag : any) { may_change = may_change || strcmp(flag, model->options[i].flag) == 0; }
        check(model->options[i].resume == (may_change ? ANY : SAME), "%s of a resumed run", model->options[i].flag);
    }
    List<StMetadata> list = {};
    model = small_model("-clip 1 -mixup 0 -v 3 -reprob 0.5");
    options_metadata(model, &list);
    const StMetadata* m = list.of;
    check(list.n == 2 && strcmp(m[0].key, "-clip") == 0 && strcmp(m[0].value, "1") == 0 &&
          strcmp(m[1].key, "-reprob") == 0 && strcmp(m[1].value, "0.5") == 0, "%d flags in the metadata", list.n);
}

int main(void) {
    device_open();
    fixture = safetensors_open("dev/reference/fixtures/recipes.safetensors");
    int n = 0;
    for (; model_recipes[n][0] != NULL; n++) { test_recipe(model_recipes[n][0], model_recipes[n][1]); }
    check(n == 5, "%d recipes", n);
    for (int i = 0; i < n; i++) { test_run_schedule(model_recipes[i][0], model_recipes[i][1]); }
    test_average("ema.0.99996", 0.99996);
    test_average("ema.0.9", 0.9);
    test_decay(0);
    test_decay(1);
    test_flops();
    test_initial_values();
    test_masked();
    test_flags_of_a_run();
    test_random_streams();
    test_classifier_loss();
    for (int i = 0; i < 4; i++) { test_drop_path(i); }
    test_schedule_by_steps();
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
