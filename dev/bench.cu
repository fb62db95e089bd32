/*
Times a trainer without training: steps on random images, or the loading and augmentation of batches.

    dev/bench steps N [flags of the trainer]    N training steps on one batch of random images
    dev/bench data N [flags of the trainer]     N batches brought to the device and augmented

Two more, which are not timed, warm up. `make DEVICE=cpu build/cpu-fp32/dev/bench` builds it. `steps` ends with
    bench ms_min=A ms_median=B images_per_s=C bytes_planned=D bytes_used=E
where C belongs to the median, D is the total of -plan 1, and E is by how much the allocation of the model
reduced the device's free memory. `data` ends with
    data images_per_s=A batches=N batch=B threads=T
*/
#define TESTING
#include "../train_deit.cu"

static int ascending(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return x < y ? -1 : x > y;
}

static size_t free_bytes(void) {
    size_t free_now, total;
    cudaCheck(cudaMemGetInfo(&free_now, &total));
    return free_now;
}

// B images of uniform random bytes, not mirrored, all of class 0, in memory of their own
static Batch random_batch(const Model* model) {
    const size_t bytes = numel(model->B, model->H, model->W, model->CH);
    uint8_t *host = host_new<uint8_t>(bytes, "random pixels"), *images;
    int *labels, *flips;
    for (size_t i = 0; i < bytes; i++) { host[i] = (uint8_t)philox(model->seed, RNG_AUGMENT, 0, i).x; }
    cudaCheck(cudaMalloc((void**)&images, bytes));
    cudaCheck(cudaMalloc((void**)&labels, model->B * sizeof(int)));
    cudaCheck(cudaMalloc((void**)&flips, model->B * sizeof(int)));
    cudaCheck(cudaMemcpy(images, host, bytes, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemset(labels, 0, model->B * sizeof(int)));
    cudaCheck(cudaMemset(flips, 0, model->B * sizeof(int)));
    free(host);
    const PixelStats stats = {{0.5f, 0.5f, 0.5f, 0.5f}, {0.25f, 0.25f, 0.25f, 0.25f}};
    Batch batch = {images, labels, flips, model->B, stats, 0.0f, {}, NULL};
    batch.augment.lam = 1.0f; // no mixing
    return batch;
}

// One training step. Its learning rate is 0, so that every step computes the same; reading the result waits for the
// device
static void one_step(Model* model, const Batch* batch, OptimizerConfig optimizer, int step) {
    zero_gradients(model);
    model->last_pass = true;
    model_train(model, batch, 1.0f / (float)batch->n);
    gradients_done(model, -1);
    model_update(model, optimizer, 0.0, step);
    model_result(model);
}

static void bench_steps(Model* model, int steps) {
    const Settings* s = model->s;
    const size_t free_before = free_bytes();
    model_allocate(model);
    const size_t bytes_used = free_before - free_bytes(); // read here: modules loaded later take memory too
    init_parameters(model);
    const OptimizerConfig optimizer = {model->adamw, s->lr, s->beta1, s->beta2, 1e-8, s->weight_decay,
                                       s->momentum, s->clip, s->nesterov == 1};
    const Batch batch = random_batch(model);
    double* ms = host_new<double>(steps, "times");
    for (int step = -2; step < steps; step++) {
        const double start = seconds();
        one_step(model, &batch, optimizer, step + 3);
        if (step >= 0) { ms[step] = 1e3 * (seconds() - start); }
    }
    qsort(ms, steps, sizeof(double), ascending);
    const double median = ms[steps / 2];
    printf("bench ms_min=%.3f ms_median=%.3f images_per_s=%.2f ", ms[0], median, 1e3 * model->B / median);
    printf("bytes_planned=%zu bytes_used=%zu\n", plan_total(&model->plan), bytes_used);
    free(ms);
}

static void bench_data(Model* model, int batches) {
    Loader* loader = loader_new(model->s->train_path, model, true);
    model_allocate(model);
    loader_print(loader, "training");
    loader_start(loader, model);
    double start = 0.0;
    for (int number = 0; number < batches + 2; number++) {
        if (number == 2) {
            cudaCheck(cudaStreamSynchronize(main_stream));
            start = seconds();
        }
        loader_batch(loader, number);
        model_input(model, loader_take(loader));
    }
    cudaCheck(cudaStreamSynchronize(main_stream));
    const double rate = batches * model->B / (seconds() - start);
    printf("data images_per_s=%.1f batches=%d batch=%zu threads=%d\n", rate, batches, model->B, model->s->threads);
    loader_close(loader);
}

int main(int argc, char** argv) {
    const char* mode = argc > 2 ? argv[1] : "";
    const int n = argc > 2 ? atoi(argv[2]) : 0;
    require((strcmp(mode, "steps") == 0 || strcmp(mode, "data") == 0) && n > 0,
            "usage: %s steps N or data N, then flags of the trainer; N: how many steps or batches are timed", argv[0]);
    argv[2] = argv[0]; // the trainer's flags follow the name of the program
    Model* model = model_new();
    parse_options(model, argc - 2, argv + 2);
    settings_derive(model);
    device_open();
    if (strcmp(mode, "steps") == 0) { bench_steps(model, n); } else { bench_data(model, n); }
    model_free(model);
    ranks_close();
    return EXIT_SUCCESS;
}
