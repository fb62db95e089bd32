// What the tests of trainers against PyTorch's dumps share: include it after the trainer. DUMP_SCRIPT: what writes dumps
#include "check.cuh"

// a number from the metadata, or `missing` where the key is absent
static double number(const Safetensors* st, const char* key, double missing) {
    const char* value = safetensors_metadata(st, key);
    require(value != NULL || !isnan(missing), "%s lacks the metadata %s; write it with " DUMP_SCRIPT " dump",
            st->file.path, key);
    if (value == NULL) { return missing; }
    char* end;
    const double v = strtod(value, &end);
    require(end != value && *end == 0, "%s: metadata %s is '%s', expected a number", st->file.path, key, value);
    return v;
}

// a copy of a tensor
static void* tensor(const Safetensors* st, const char* name, const char* dtype, size_t n) {
    const StTensor* t = safetensors_find(st, name);
    require(t != NULL && strcmp(t->dtype, dtype) == 0 && st_numel(t) == n,
            "%s: tensor %s is missing or not %zu elements of %s", st->file.path, name, n, dtype);
    void* copy = host_new<char>(t->end - t->begin, name);
    memcpy(copy, t->data, t->end - t->begin);
    return copy;
}

// returns the mean loss; the logits become their gradient
static double loss_of(Model* model) {
    Batch batch = {};
    batch.n = model->B;
    batch.augment.lam = 1.0f;
    classifier_loss(model, (floatX*)model->acts.logits->data, model->labels, &batch, 1.0f / (float)model->B);
    return model_result(model).sums[0] / (double)model->B;
}

template <class T> static float* to_host_floats(const T* device, size_t n) {
    T* raw = host_new<T>(n, "a tensor");
    float* host = host_new<float>(n, "a tensor");
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(raw, device, n * sizeof(T), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) { host[i] = (float)raw[i]; }
    free(raw);
    return host;
}

// moves values by one unit in their last place, up or down: as (move, which, i) draws for value i
static void move_last_place(floatX* values, size_t n, unsigned move, unsigned which) {
    for (size_t i = 0; i < n; i++) {
        bitsX bits;
        memcpy(&bits, &values[i], sizeof(bits));
        if ((float)values[i] != 0.0f) { bits += philox(move, 90, which, i).x % 2 == 0 ? 1 : -1; }
        memcpy((void*)&values[i], &bits, sizeof(bits));
    }
}

// of factor * a from b
static double distance(double factor, const float* a, const float* b, size_t n) {
    double sum = 0.0;
    for (size_t i = 0; i < n; i++) { sum += (factor * a[i] - b[i]) * (factor * a[i] - b[i]); }
    return sqrt(sum);
}
