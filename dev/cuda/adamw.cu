/*
The optimizers' updates, AdamW and SGD with momentum: pure traffic, every array read and written once.

version 1: the trainer's adamw_kernel and sgd_kernel, eight consecutive parameters a thread: in fp32 arrays two accesses of 16 bytes,
           of which a warp has every second 16 bytes at a time, so that it touches every 32-byte sector twice
version 2: four consecutive parameters a thread: an access of a warp is 512 contiguous bytes (256 of bf16 parameters)
version 3: two such groups a thread, a block's width apart, all loads before the first use: contiguous, and as many bytes under way in
           a warp as version 1 has

All give the same bits. Versions 2 and 3 want n a multiple of 4, version 1 of 8; the trainer's are multiples of 128.

    make build/cpu-fp32/dev/cuda/adamw && build/cpu-fp32/dev/cuda/adamw
    nvcc -O3 -std=c++17 -arch=sm_90 dev/cuda/adamw.cu -o adamw -lcublas -lcublasLt && ./adamw -time
*/
#include "common.cuh"

// ----------------------------------------------------------------------------
// reference: torch.optim.AdamW and torch.optim.SGD, with gradients scaled by clip / norm where norm is the larger

static double clip_reference(const OptimizerConfig* o, double norm) { return o->clip > 0.0 ? fmin(1.0, o->clip / (norm + 1e-6)) : 1.0; }

static void adamw_reference(double* w, double* m, double* v, const float* grads, size_t n, double norm, const OptimizerConfig* o, int step) {
    const double factor = clip_reference(o, norm), correction1 = 1.0 - pow(o->beta1, step), correction2 = 1.0 - pow(o->beta2, step);
    for (size_t i = 0; i < n; i++) {
        const double g = grads[i] * factor;
        m[i] = o->beta1 * m[i] + (1.0 - o->beta1) * g;
        v[i] = o->beta2 * v[i] + (1.0 - o->beta2) * g * g;
        w[i] -= o->learning_rate * o->weight_decay * w[i];
        w[i] -= o->learning_rate * (m[i] / correction1) / (sqrt(v[i] / correction2) + o->eps);
    }
}

static void sgd_reference(double* w, double* m, const float* grads, size_t n, double norm, const OptimizerConfig* o) {
    for (size_t i = 0; i < n; i++) {
        m[i] = o->momentum * m[i] + grads[i] * clip_reference(o, norm) + o->weight_decay * w[i];
        w[i] -= o->learning_rate * m[i];
    }
}

// ----------------------------------------------------------------------------
// versions 2 (GROUPS 1) and 3 (GROUPS 2)

// As adamw_kernel, the same expressions. A thread has GROUPS groups of four neighbours, blockDim.x groups apart. All loads come before
// the first store: the compiler cannot move them there, since it must expect that the arrays overlap (in fp32 params is master)
template <int GROUPS> __global__ void adamw_kernel2(floatX* params, float* master, float* m, float* v, const float* grads, size_t n,
                                                    const StepResult* result, float clip, float lr, float beta1, float beta2,
                                                    float correction1, float correction2, float eps, float weight_decay) {
    const size_t first = ((size_t)blockIdx.x * GROUPS * blockDim.x + threadIdx.x) * 4, apart = (size_t)blockDim.x * 4;
    const float factor = clip_factor(result, clip);
    float g[GROUPS][4] = {}, mi[GROUPS][4] = {}, vi[GROUPS][4] = {}, w[GROUPS][4] = {};
    for (int k = 0; k < GROUPS; k++) {
        const size_t i = first + k * apart;
        if (i < n) {
            load<4>(g[k], grads + i);
            load<4>(mi[k], m + i);
            load<4>(vi[k], v + i);
            load<4>(w[k], master + i);
        }
    }
    for (int k = 0; k < GROUPS; k++) {
        const size_t i = first + k * apart;
        if (i < n) {
            for (int j = 0; j < 4; j++) {
                const float gi = g[k][j] * factor;
                mi[k][j] = beta1 * mi[k][j] + (1.0f - beta1) * gi;
                vi[k][j] = beta2 * vi[k][j] + (1.0f - beta2) * gi * gi;
                w[k][j] = w[k][j] * (1.0f - lr * weight_decay) - lr / correction1 * mi[k][j] / (sqrtf(vi[k][j]) / sqrtf(correction2) + eps);
            }
            store<4>(m + i, mi[k]);
            store<4>(v + i, vi[k]);
            store<4>(master + i, w[k]);
            store<4>(params + i, w[k]);
        }
    }
}

// as sgd_kernel, in the same way
template <int GROUPS> __global__ void sgd_kernel2(floatX* params, float* master, float* m, const float* grads, size_t n,
                                                  const StepResult* result, float clip, float lr, float momentum, float weight_decay) {
    const size_t first = ((size_t)blockIdx.x * GROUPS * blockDim.x + threadIdx.x) * 4, apart = (size_t)blockDim.x * 4;
    const float factor = clip_factor(result, clip);
    float g[GROUPS][4] = {}, mi[GROUPS][4] = {}, w[GROUPS][4] = {};
    for (int k = 0; k < GROUPS; k++) {
        const size_t i = first + k * apart;
        if (i < n) {
            load<4>(g[k], grads + i);
            load<4>(mi[k], m + i);
            load<4>(w[k], master + i);
        }
    }
    for (int k = 0; k < GROUPS; k++) {
        const size_t i = first + k * apart;
        if (i < n) {
            for (int j = 0; j < 4; j++) {
                mi[k][j] = momentum * mi[k][j] + (g[k][j] * factor + weight_decay * w[k][j]);
                w[k][j] -= lr * mi[k][j];
            }
            store<4>(m + i, mi[k]);
            store<4>(master + i, w[k]);
            store<4>(params + i, w[k]);
        }
    }
}

template <int GROUPS> void update2(floatX* params, float* master, float* m, float* v, const float* grads, size_t n, const StepResult* result,
                                   const OptimizerConfig* o, int step) {
    assert(n % 4 == 0);
    const size_t blocks = CEIL_DIV(n, (size_t)(256 * 4 * GROUPS));
    if (o->adamw) {
        adamw_kernel2<GROUPS><<<blocks, 256, 0, main_stream>>>(params, master, m, v, grads, n, result, (float)o->clip, (float)o->learning_rate,
            (float)o->beta1, (float)o->beta2, (float)(1.0 - pow(o->beta1, step)), (float)(1.0 - pow(o->beta2, step)), (float)o->eps,
            (float)o->weight_decay);
    } else {
        sgd_kernel2<GROUPS><<<blocks, 256, 0, main_stream>>>(params, master, m, grads, n, result, (float)o->clip, (float)o->learning_rate,
            (float)o->momentum, (float)o->weight_decay);
    }
    kernelCheck();
}

// updates state s by a version. In fp32 params are master, as in the trainer
typedef struct {
    Array<float> master, m, v, grads;
    Array<floatX> params;
    Array<StepResult> result;
} State;

static void update(const State* s, int version, size_t n, const OptimizerConfig* o, int step) {
    floatX* params = sizeof(floatX) == sizeof(float) ? (floatX*)s->master.device : s->params.device;
    if (version == 1) {
        optimizer_update(params, s->master.device, s->m.device, s->v.device, s->grads.device, n, s->result.device, *o, o->learning_rate, step);
    } else if (version == 2) {
        update2<1>(params, s->master.device, s->m.device, s->v.device, s->grads.device, n, s->result.device, o, step);
    } else {
        update2<2>(params, s->master.device, s->m.device, s->v.device, s->grads.device, n, s->result.device, o, step);
    }
}

static State state_new(size_t n, float norm) {
    State s = {array_normal<float>(n, 1, 1.0), array_normal<float>(n, 2, 0.5), array_normal<float>(n, 3, 1.0), array_normal<float>(n, 4, 1.0),
               array_new<floatX>(n), array_new<StepResult>(1)};
    for (size_t i = 0; i < n; i++) { s.v.host[i] *= s.v.host[i]; }
    to_device(s.v);
    s.result.host->norm = norm;
    to_device(s.result);
    return s;
}

static void state_free(const State* s) {
    array_free(s->master); array_free(s->m); array_free(s->v); array_free(s->grads); array_free(s->params); array_free(s->result);
}

// two steps of every version on the first n of n + 64 values: those behind must stay as they were
static void test_update(size_t n, bool adamw, double clip) {
    const size_t all = n + 64;
    const char* const name = adamw ? "adamw" : "sgd";
    const float norm = 3.0f;
    const OptimizerConfig o = {adamw, 0.05, 0.9, 0.99, 0.01, 0.1, 0.8, clip, false};
    State first = {};
    for (int version = 1; version <= 3; version++) {
        State s = state_new(all, norm);
        double *w = (double*)malloc(all * sizeof(double)), *m = (double*)malloc(all * sizeof(double)), *v = (double*)malloc(all * sizeof(double));
        for (size_t i = 0; i < all; i++) {
            w[i] = s.master.host[i];
            m[i] = s.m.host[i];
            v[i] = s.v.host[i];
        }
        for (int step = 3; step <= 4; step++) {
            update(&s, version, n, &o, step);
            if (adamw) { adamw_reference(w, m, v, s.grads.host, n, norm, &o, step); } else { sgd_reference(w, m, s.grads.host, n, norm, &o); }
        }
        check_close(s.master, w, 2e-6, "%s version %d, n %zu, clip %g: master", name, version, n, clip);
        check_close(s.m, m, 2e-6, "%s version %d, n %zu, clip %g: m", name, version, n, clip);
        check_close(s.v, v, 2e-6, "%s version %d, n %zu, clip %g: v", name, version, n, clip);
        if (sizeof(floatX) != sizeof(float)) { // each is its master, rounded
            to_host(s.params);
            size_t wrong = 0;
            for (size_t i = 0; i < n; i++) { wrong += (float)s.params.host[i] != (float)(floatX)s.master.host[i]; }
            check(wrong == 0, "%s version %d, n %zu: %zu parameters are not their masters, rounded", name, version, n, wrong);
        }
        if (version == 1) {
            first = s;
        } else {
            check_bits(s.master, first.master.host, "master, as version 1's");
            check_bits(s.m, first.m.host, "m, as version 1's");
            check_bits(s.v, first.v.host, "v, as version 1's");
            to_host(first.params);
            check_bits(s.params, first.params.host, "parameters, as version 1's");
            state_free(&s);
        }
        free(w); free(m); free(v);
    }
    state_free(&first);
}

int main(int argc, char** argv) {
    bench_open(argc, argv);
    // odd multiples of 8 and of 128, on both sides of what a block takes: 1,024 in version 2, 2,048 in the others
    const size_t sizes[] = {8, 24, 128, 384, 1016, 1024, 1032, 2040, 2056, 1024 + 3 * 128, 2048 + 1024, 10 * 1024 + 7 * 128};
    for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        test_update(sizes[i], true, i % 2 ? 1.0 : 0.0);
        test_update(sizes[i], false, i % 2 ? 0.0 : 1.0);
    }
    time_header();
    if (timing) {
        const size_t n = 22050688; // DeiT-S, 1,000 classes
        State s = state_new(n, 3.0f);
        for (int adamw = 1; adamw >= 0; adamw--) {
            const OptimizerConfig o = {adamw == 1, 1e-4, 0.9, 0.999, 1e-8, 0.05, 0.9, 1.0, false};
            // gradient, master and moments are read, all but the gradient written; a bf16 parameter is an array of its own
            const double bytes = n * ((adamw ? 7.0 : 5.0) * sizeof(float) + (sizeof(floatX) == 2 ? sizeof(floatX) : 0));
            for (int version = 1; version <= 3; version++) {
                time_kernel(adamw ? "adamw" : "sgd", version, "22.05 M parameters", bytes, 0.0, [&] { update(&s, version, n, &o, 100); });
            }
        }
        state_free(&s);
    }
    return bench_close();
}
