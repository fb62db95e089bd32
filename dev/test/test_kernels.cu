/*
The kernels of train_deit.cu, each against plain loops in double precision, at shapes that divide nothing and at shapes that
take the vector paths. What the dumps cannot show is here: flips, ties and NaN in the ranking, rows far apart, tails of every length.

build and run: make test   (or dev/cpu's recipe on this file); the exit code is the verdict
*/

#define TESTING
#include "../../train_deit.cu"
#include "check.cuh"

#ifdef ENABLE_FP32
#define TOLERANCE 2e-5
#else
#define TOLERANCE 1e-2 // of the largest expected value; a bf16 has 8 bits
#endif

// n values on the host and their copy on the device, both as T holds them
template <class T> struct Array {
    size_t n;
    T *host, *device;
};

template <class T> static Array<T> make(size_t n) {
    Array<T> a = {n, (T*)malloc(n * sizeof(T)), NULL};
    cudaCheck(cudaMalloc((void**)&a.device, n * sizeof(T)));
    return a;
}

static unsigned draws;
template <class T> static Array<T> random_array(size_t n, double scale, double shift) {
    Array<T> a = make<T>(n);
    draws++;
    for (size_t i = 0; i < n; i++) { a.host[i] = (T)(float)(shift + scale * normal(philox(11, 98, draws, i))); }
    cudaCheck(cudaMemcpy(a.device, a.host, n * sizeof(T), cudaMemcpyHostToDevice));
    return a;
}

template <class T> static void drop(Array<T>* a) {
    free((void*)a->host);
    cudaCheck(cudaFree(a->device));
}

// largest |got - expected| over the largest |expected|; NaN where either has one
template <class T> static double error(Array<T> a, const double* expected) {
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(a.host, a.device, a.n * sizeof(T), cudaMemcpyDeviceToHost));
    double worst = 0.0, largest = 1e-30;
    for (size_t i = 0; i < a.n; i++) {
        const double difference = fabs((double)(float)a.host[i] - expected[i]);
        if (!(difference <= worst)) { worst = difference; }
        if (isnan(worst)) { return worst; }
        largest = fmax(largest, fabs(expected[i]));
    }
    return worst / largest;
}

static double* doubles(size_t n) { return (double*)calloc(n, sizeof(double)); }

static void test_layernorm(size_t rows, size_t C, size_t gap) {
    const size_t stride = C + gap;
    Array<floatX> inp = random_array<floatX>(rows * stride, 2.0, 1.0), weight = random_array<floatX>(C, 0.5, 1.0), bias = random_array<floatX>(C, 1.0, 0.0);
    Array<floatX> dout = random_array<floatX>(rows * C, 1.0, 0.1), dinp = random_array<floatX>(rows * stride, 1.0, 0.0), out = make<floatX>(rows * C);
    Array<float> mean = make<float>(rows), rstd = make<float>(rows), dweight = random_array<float>(C, 1.0, 0.0), dbias = random_array<float>(C, 1.0, 0.0);
    Array<float> partial = make<float>(2 * column_sum_scratch(rows, C));
    double *o = doubles(rows * C), *di = doubles(rows * stride), *dw = doubles(C), *db = doubles(C);
    for (size_t c = 0; c < C; c++) {
        dw[c] = dweight.host[c];
        db[c] = dbias.host[c];
    }
    for (size_t r = 0; r < rows; r++) {
        const floatX* x = inp.host + r * stride;
        double m = 0.0, v = 0.0, g_mean = 0.0, gn_mean = 0.0;
        for (size_t c = 0; c < C; c++) { m += (float)x[c] / (double)C; }
        for (size_t c = 0; c < C; c++) { v += ((float)x[c] - m) * ((float)x[c] - m) / C; }
        const double s = 1.0 / sqrt(v + 1e-6);
        for (size_t c = 0; c < C; c++) {
            const double norm = ((float)x[c] - m) * s, d = (float)dout.host[r * C + c], g = d * (float)weight.host[c];
            o[r * C + c] = norm * (float)weight.host[c] + (float)bias.host[c];
            dw[c] += d * norm;
            db[c] += d;
            g_mean += g / C;
            gn_mean += g * norm / C;
        }
        for (size_t c = 0; c < stride; c++) {
            di[r * stride + c] = (float)dinp.host[r * stride + c];
            if (c < C) {
                const double norm = ((float)x[c] - m) * s, g = (double)(float)dout.host[r * C + c] * (float)weight.host[c];
                di[r * stride + c] += s * (g - g_mean - norm * gn_mean);
            }
        }
    }
    layernorm_forward(out.device, mean.device, rstd.device, inp.device, weight.device, bias.device, rows, C, stride);
    layernorm_backward(dinp.device, dweight.device, dbias.device, partial.device, dout.device, inp.device, weight.device, mean.device, rstd.device,
                       rows, C, stride);
    const double e[] = {error(out, o), error(dinp, di), error(dweight, dw), error(dbias, db)};
    for (int i = 0; i < 4; i++) {
        const char* const what[] = {"out", "dinp", "dweight", "dbias"};
        check(e[i] <= TOLERANCE, "layernorm %zu x %zu, rows %zu apart: %s %.2g", rows, C, stride, what[i], e[i]);
    }
    drop(&inp); drop(&weight); drop(&bias); drop(&dout); drop(&dinp); drop(&out); drop(&mean); drop(&rstd); drop(&dweight); drop(&dbias); drop(&partial);
    free(o); free(di); free(dw); free(db);
}

static void test_gelu(size_t n) {
    Array<floatX> x = random_array<floatX>(n, 3.0, 0.0), d = random_array<floatX>(n, 1.0, 0.0), out = make<floatX>(n);
    double *o = doubles(n), *dx = doubles(n);
    for (size_t i = 0; i < n; i++) {
        const double v = (float)x.host[i], cdf = 0.5 * (1.0 + erf(v * M_SQRT1_2));
        o[i] = v * cdf;
        dx[i] = (float)d.host[i] * (cdf + v * exp(-0.5 * v * v) / sqrt(2.0 * M_PI));
    }
    gelu_forward(out.device, x.device, n);
    gelu_backward(d.device, x.device, n);
    const double forward = error(out, o), backward = error(d, dx);
    check(forward <= TOLERANCE && backward <= TOLERANCE, "gelu %zu: %.2g %.2g", n, forward, backward);
    drop(&x); drop(&d); drop(&out);
    free(o); free(dx);
}

static void test_column_sum(size_t rows, size_t C) {
    Array<floatX> x = random_array<floatX>(rows * C, 1.0, 0.2);
    Array<float> out = random_array<float>(C, 1.0, 0.0), partial = make<float>(column_sum_scratch(rows, C));
    double* o = doubles(C);
    for (size_t c = 0; c < C; c++) {
        o[c] = out.host[c];
        for (size_t r = 0; r < rows; r++) { o[c] += (float)x.host[r * C + c]; }
    }
    column_sum(out.device, x.device, partial.device, rows, C);
    const double e = error(out, o);
    check(e <= TOLERANCE, "column sum %zu x %zu: %.2g", rows, C, e);
    drop(&x); drop(&out); drop(&partial);
    free(o);
}

static void test_linear(size_t rows, size_t C, size_t OC) {
    Array<floatX> inp = random_array<floatX>(rows * C, 1.0, 0.0), weight = random_array<floatX>(OC * C, 0.3, 0.0), bias = random_array<floatX>(OC, 1.0, 0.0);
    Array<floatX> residual = random_array<floatX>(rows * OC, 1.0, 0.0), dout = random_array<floatX>(rows * OC, 1.0, 0.0);
    Array<floatX> out = make<floatX>(rows * OC), dinp = make<floatX>(rows * C);
    Array<float> dweight = random_array<float>(OC * C, 1.0, 0.0);
    double *o = doubles(rows * OC), *di = doubles(rows * C), *dw = doubles(OC * C);
    for (size_t i = 0; i < OC * C; i++) { dw[i] = dweight.host[i]; }
    for (size_t r = 0; r < rows; r++) {
        for (size_t k = 0; k < OC; k++) {
            const double d = (float)dout.host[r * OC + k];
            o[r * OC + k] = (double)(float)bias.host[k] + (float)residual.host[r * OC + k];
            for (size_t c = 0; c < C; c++) {
                o[r * OC + k] += (double)(float)inp.host[r * C + c] * (float)weight.host[k * C + c];
                di[r * C + c] += d * (float)weight.host[k * C + c];
                dw[k * C + c] += d * (float)inp.host[r * C + c];
            }
        }
    }
    linear_forward(out.device, inp.device, weight.device, bias.device, residual.device, rows, C, OC);
    linear_backward_input(dinp.device, dout.device, weight.device, rows, C, OC);
    linear_backward_weight(dweight.device, dout.device, inp.device, rows, C, OC);
    const double e[] = {error(out, o), error(dinp, di), error(dweight, dw)};
    check(e[0] <= TOLERANCE && e[1] <= TOLERANCE && e[2] <= TOLERANCE, "linear %zu x %zu x %zu: %.2g %.2g %.2g", rows, C, OC, e[0], e[1], e[2]);
    drop(&inp); drop(&weight); drop(&bias); drop(&residual); drop(&dout); drop(&out); drop(&dinp); drop(&dweight);
    free(o); free(di); free(dw);
}

// one image and head at a time, from the definition
static void test_attention(int images, int T, int NH, int HS) {
    const size_t C = (size_t)NH * HS, n = images * T * C, ld = CEIL_DIV(T, VEC) * VEC, squares = (size_t)images * NH * T * ld;
    Array<floatX> qkv = random_array<floatX>(3 * n, 1.0, 0.0), dout = random_array<floatX>(n, 1.0, 0.0), out = make<floatX>(n), dqkv = make<floatX>(3 * n);
    Array<float> lse = make<float>((size_t)images * NH * T), scores = make<float>(squares), dprobs = make<float>(squares);
    Array<floatX> probs = make<floatX>(squares), dscores = make<floatX>(squares);
    // the softmax kernels read the columns from T to ld, which nobody writes, and must not use them: NaN
    cudaCheck(cudaMemset(scores.device, 0xff, squares * sizeof(float)));
    cudaCheck(cudaMemset(dprobs.device, 0xff, squares * sizeof(float)));
    Array<void*> pointers = make<void*>((size_t)NUM_ATTENTION_POINTERS * images * NH);
    Attention a = {NH, T, HS, (int)ld, images, scores.device, probs.device, dprobs.device, dscores.device, pointers.device};
    if (sizeof(floatX) == sizeof(float)) { // as the trainer does
        a.probs = (floatX*)scores.device;
        a.dscores = (floatX*)dprobs.device;
    }
    double *o = doubles(n), *dx = doubles(3 * n), *p = doubles(T), *dp = doubles(T);
    const double scale = 1.0 / sqrt(HS);
    for (int b = 0; b < images; b++) {
        for (int h = 0; h < NH; h++) {
            const size_t q0 = (size_t)b * T * 3 * C + h * HS, k0 = q0 + C, v0 = q0 + 2 * C, o0 = (size_t)b * T * C + h * HS;
            for (int i = 0; i < T; i++) {
                double sum = 0.0, row = 0.0;
                for (int j = 0; j < T; j++) {
                    double s = 0.0;
                    for (int c = 0; c < HS; c++) { s += (double)(float)qkv.host[q0 + i * 3 * C + c] * (float)qkv.host[k0 + j * 3 * C + c]; }
                    p[j] = exp(s * scale);
                    sum += p[j];
                }
                for (int j = 0; j < T; j++) {
                    p[j] /= sum;
                    dp[j] = 0.0;
                    for (int c = 0; c < HS; c++) {
                        o[o0 + i * C + c] += p[j] * (float)qkv.host[v0 + j * 3 * C + c];
                        dp[j] += (double)(float)dout.host[o0 + i * C + c] * (float)qkv.host[v0 + j * 3 * C + c];
                        dx[v0 + j * 3 * C + c] += p[j] * (float)dout.host[o0 + i * C + c];
                    }
                    row += p[j] * dp[j];
                }
                for (int j = 0; j < T; j++) {
                    const double ds = p[j] * (dp[j] - row) * scale;
                    for (int c = 0; c < HS; c++) {
                        dx[q0 + i * 3 * C + c] += ds * (float)qkv.host[k0 + j * 3 * C + c];
                        dx[k0 + j * 3 * C + c] += ds * (float)qkv.host[q0 + i * 3 * C + c];
                    }
                }
            }
        }
    }
    attention_forward(out.device, lse.device, qkv.device, &a, images);
    const double forward = error(out, o);
    attention_backward(dqkv.device, dout.device, qkv.device, lse.device, &a, images);
    const double backward = error(dqkv, dx);
    check(forward <= TOLERANCE && backward <= TOLERANCE, "attention %d x %d x %d x %d: %.2g %.2g", images, T, NH, HS, forward, backward);
    drop(&qkv); drop(&dout); drop(&out); drop(&dqkv); drop(&lse); drop(&scores); drop(&dprobs); drop(&probs); drop(&dscores); drop(&pointers);
    free(o); free(dx); free(p); free(dp);
}

static void test_cross_entropy(int B, int V, double smoothing, bool hostile) {
    Array<floatX> logits = random_array<floatX>((size_t)B * V, 3.0, 0.0);
    Array<int> labels = make<int>(B), ranks = make<int>(B);
    Array<float> losses = make<float>(B);
    Array<StepResult> result = make<StepResult>(1);
    double *d = doubles((size_t)B * V), total_loss = 0.0;
    unsigned top1 = 0, top5 = 0;
    for (int b = 0; b < B; b++) {
        labels.host[b] = (int)(philox(3, 97, V, b).x % V);
        floatX* row = logits.host + (size_t)b * V;
        if (hostile && b % 3 == 0) { for (int v = 0; v < V; v++) { row[v] = (floatX)1.0f; } } // all tied: the lowest index wins
        if (hostile && b % 3 == 1) { row[labels.host[b]] = (floatX)NAN; }                     // never right
        double sum = 0.0, largest = -INFINITY, mean = 0.0;
        int before = 0;
        const double correct = (float)row[labels.host[b]];
        for (int v = 0; v < V; v++) {
            largest = fmax(largest, (float)row[v]);
            before += v < labels.host[b] ? !((float)row[v] < correct) : v > labels.host[b] ? !((float)row[v] <= correct) : 0;
        }
        for (int v = 0; v < V; v++) {
            sum += exp((float)row[v] - largest);
            mean += (float)row[v] / (double)V;
        }
        const double lse = largest + log(sum);
        for (int v = 0; v < V; v++) {
            d[(size_t)b * V + v] = (exp((float)row[v] - lse) - (v == labels.host[b] ? 1.0 - smoothing : 0.0) - smoothing / V) / B;
        }
        total_loss += (1.0 - smoothing) * (lse - correct) + smoothing * (lse - mean);
        top1 += before < 1;
        top5 += before < 5;
    }
    cudaCheck(cudaMemcpy(logits.device, logits.host, logits.n * sizeof(floatX), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(labels.device, labels.host, B * sizeof(int), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemset(result.device, 0, sizeof(StepResult)));
    cross_entropy(result.device, losses.device, ranks.device, logits.device, labels.device, B, V, (float)smoothing, 1.0f, 1.0f / B);
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(result.host, result.device, sizeof(StepResult), cudaMemcpyDeviceToHost));
    const double* sums = result.host->sums;
    check(sums[1] == top1 && sums[2] == top5, "ranks of %d x %d%s: top-1 %g top-5 %g, expected %u %u", B, V,
          hostile ? " hostile" : "", sums[1], sums[2], top1, top5);
    if (hostile) {
        check(isnan(sums[0]), "a NaN logit makes the loss NaN");
    } else {
        const double e = error(logits, d), loss = fabs(sums[0] - total_loss) / fmax(1.0, total_loss);
        check(e <= TOLERANCE && loss <= 1e-5, "cross-entropy %d x %d, smoothing %g: %.2g %.2g", B, V, smoothing, loss, e);
    }
    drop(&logits); drop(&labels); drop(&ranks); drop(&losses); drop(&result);
    free(d);
}

static void test_patchify(int B, int S, int P, int CH) {
    const size_t n = (size_t)B * S * S * CH, G = S / P;
    Array<uint8_t> images = make<uint8_t>(n);
    Array<int> flips = make<int>(B);
    Array<floatX> patches = make<floatX>(n);
    const PixelStats stats = {{0.3f, 0.4f, 0.5f, 0.6f}, {0.2f, 0.25f, 0.3f, 0.35f}};
    for (size_t i = 0; i < n; i++) { images.host[i] = (uint8_t)philox(5, 96, P, i).x; }
    for (int b = 0; b < B; b++) { flips.host[b] = b % 2; }
    double* p = doubles(n);
    size_t i = 0;
    for (int b = 0; b < B; b++) {
        for (size_t t = 0; t < G * G; t++) {
            for (int c = 0; c < CH; c++) {
                for (int k = 0; k < P * P; k++) {
                    const size_t h = t / G * P + k / P, w = t % G * P + k % P, x = flips.host[b] ? S - 1 - w : w;
                    p[i++] = (images.host[((b * (size_t)S + h) * S + x) * CH + c] / 255.0 - stats.mean[c]) / stats.std[c];
                }
            }
        }
    }
    cudaCheck(cudaMemcpy(images.device, images.host, n, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(flips.device, flips.host, B * sizeof(int), cudaMemcpyHostToDevice));
    BatchAugment none = {};
    none.lam = 1.0f;
    patchify(patches.device, images.device, flips.device, stats, none, B, S, P, CH);
    const double e = error(patches, p);
    check(e <= TOLERANCE, "patchify %d x %d / %d x %d: %.2g", B, S, P, CH, e);
    drop(&images); drop(&flips); drop(&patches);
    free(p);
}

// two steps of each optimizer, with clipping, as torch.optim writes them
static void test_optimizer(size_t n, bool adamw, double clip, bool nesterov) {
    Array<float> grads = random_array<float>(n, 1.0, 0.0), master = random_array<float>(n, 1.0, 0.0), m = make<float>(n), v = make<float>(n);
    Array<floatX> params = make<floatX>(n);
    Array<StepResult> result = make<StepResult>(1);
    Array<double> partial = make<double>(NORM_BLOCKS);
    const OptimizerConfig o = {adamw, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.8, clip, nesterov};
    double norm = 0.0, *w = doubles(n), *m1 = doubles(n), *v1 = doubles(n);
    for (size_t i = 0; i < n; i++) {
        norm += (double)grads.host[i] * grads.host[i];
        w[i] = master.host[i];
    }
    norm = sqrt(norm);
    const double factor = clip > 0.0 ? fmin(1.0, clip / (norm + 1e-6)) : 1.0;
    cudaCheck(cudaMemset(m.device, 0, n * sizeof(float)));
    cudaCheck(cudaMemset(v.device, 0, n * sizeof(float)));
    cudaCheck(cudaMemset(result.device, 0, sizeof(StepResult)));
    for (int step = 1; step <= 2; step++) {
        gradient_norm(result.device, partial.device, grads.device, n);
        optimizer_update(params.device, master.device, m.device, v.device, grads.device, n, result.device, o, o.learning_rate, step);
        for (size_t i = 0; i < n; i++) {
            double g = grads.host[i] * factor;
            if (adamw) {
                w[i] *= 1.0 - o.learning_rate * o.weight_decay;
                m1[i] = o.beta1 * m1[i] + (1.0 - o.beta1) * g;
                v1[i] = o.beta2 * v1[i] + (1.0 - o.beta2) * g * g;
                w[i] -= o.learning_rate * m1[i] / (1.0 - pow(o.beta1, step)) / (sqrt(v1[i] / (1.0 - pow(o.beta2, step))) + o.eps);
            } else {
                g += o.weight_decay * w[i];
                m1[i] = o.momentum * m1[i] + g;
                w[i] -= o.learning_rate * (nesterov ? g + o.momentum * m1[i] : m1[i]);
            }
        }
    }
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaMemcpy(result.host, result.device, sizeof(StepResult), cudaMemcpyDeviceToHost));
    const double e = error(master, w), rounded = error(params, w), norm_error = fabs(result.host->norm / norm - 1.0);
    check(e <= 2e-5 && rounded <= TOLERANCE && norm_error <= 1e-6, "%s of %zu, clip %g: master %.2g, parameters %.2g, norm %.2g",
          adamw ? "AdamW" : nesterov ? "SGD (Nesterov)" : "SGD", n, clip, e, rounded, norm_error);
    drop(&grads); drop(&master); drop(&m); drop(&v); drop(&params); drop(&result); drop(&partial);
    free(w); free(m1); free(v1);
}

// moving average and rounding; to the bit what plain loops give, where the device does not contract
static void test_average(size_t n) {
    Array<float> ema = random_array<float>(n, 1.0, 0.0), w = random_array<float>(n, 1.0, 0.0);
    Array<floatX> rounded = make<floatX>(n);
    double *e = doubles(n), *r = doubles(n);
    const double decay = 0.99996;
    for (size_t i = 0; i < n; i++) {
        e[i] = (float)decay * (double)ema.host[i] + (float)(1.0 - decay) * (double)w.host[i];
        r[i] = (float)(floatX)w.host[i];
    }
    ema_update(ema.device, w.device, n, decay);
    round_kernel<<<CEIL_DIV(n, (size_t)256 * VEC), 256, 0, main_stream>>>(rounded.device, w.device, n);
    const double ema_error = error(ema, e), rounded_error = error(rounded, r);
    check(ema_error <= 1e-6 && rounded_error == 0.0, "moving average of %zu: %.2g, rounding %.2g", n, ema_error, rounded_error);
    drop(&ema); drop(&w); drop(&rounded);
    free(e); free(r);
}

// scales of `depth` blocks, of which `images` after the first 3 are used: out = x * scale + residual, and without residual in place
static void test_drop_path(size_t images, size_t per_image, int depth, double rate) {
    const int B = (int)images + 3;
    const size_t n = images * per_image;
    Array<float> scales = make<float>(depth * 2 * B);
    Array<floatX> x = random_array<floatX>(n, 1.0, 0.0), residual = random_array<floatX>(n, 1.0, 0.5), out = make<floatX>(n);
    double *s = doubles(depth * 2 * B), *with = doubles(n), *without = doubles(n);
    size_t dropped = 0;
    double expected = 0.0;
    for (int l = 0; l < depth; l++) {
        const double p = depth > 1 ? rate * l / (depth - 1) : 0.0;
        for (int i = l * 2 * B; i < (l + 1) * 2 * B; i++) {
            const uint4 u = philox(99, RNG_DROP_PATH, 4, (unsigned long long)(i / B) << 32 | (50 + i % B));
            s[i] = uniform(u.x) < 1.0 - p ? 1.0 / (1.0 - p) : 0.0;
            dropped += s[i] == 0.0;
        }
        expected += 2 * B * p;
    }
    drop_path_scales(scales.device, depth, B, rate, 99, 4, 50);
    const float* row = scales.device + (2 * depth - 1) * B + 3;
    for (size_t i = 0; i < n; i++) {
        const double scale = s[(2 * depth - 1) * B + 3 + i / per_image];
        with[i] = (double)(float)residual.host[i] + scale * (float)x.host[i];
        without[i] = scale * (float)x.host[i];
    }
    drop_path(out.device, x.device, residual.device, row, images, per_image);
    drop_path(x.device, x.device, NULL, row, images, per_image);
    const double scales_error = error(scales, s), with_error = error(out, with), without_error = error(x, without);
    check(scales_error <= 1e-6 && with_error <= TOLERANCE && without_error <= TOLERANCE && fabs(dropped - expected) <= 4.0 * sqrt(expected) + 1.0,
          "drop-path (%zu, %zu), %d blocks, rate %g: scales %.2g, with residual %.2g, without %.2g; %zu of %d dropped", images, per_image, depth, rate,
          scales_error, with_error, without_error, dropped, depth * 2 * B);
    drop(&scales); drop(&x); drop(&residual); drop(&out);
    free(s); free(with); free(without);
}

static void test_random(void) {
    const uint4 zero = philox(0, 0, 0, 0), ones = philox(~0ull, ~0u, ~0u, ~0ull);
    const uint4 pi = philox(0x299f31d0a4093822ull, 0x03707344u, 0x13198a2eu, 0x85a308d3243f6a88ull);
    check(zero.x == 0x6627e8d5 && zero.y == 0xe169c58d && zero.z == 0xbc57ac4c && zero.w == 0x9b00dbd8 && ones.x == 0x408f276d && ones.y == 0x41c83b0e &&
          ones.z == 0xa20bc7c6 && ones.w == 0x6d5451fd && pi.x == 0xd16cfe09 && pi.y == 0x94fdcceb && pi.z == 0x5001e420 && pi.w == 0x24126ea1,
          "Philox4x32-10 gives the published known answers");
    unsigned perm[1000], seen[1000] = {0}, first[10];
    shuffle(first, 10, 1337, 0);
    const unsigned expected[10] = {4, 1, 9, 5, 8, 3, 0, 7, 6, 2}; // dev/reference/rng.py
    check(memcmp(first, expected, sizeof(first)) == 0, "the reference's permutation");
    shuffle(perm, 1000, 7, 3);
    unsigned moved = 0, once = 0;
    for (unsigned i = 0; i < 1000; i++) {
        seen[perm[i]]++;
        moved += perm[i] != i;
    }
    for (unsigned i = 0; i < 1000; i++) { once += seen[i] == 1; }
    check(once == 1000 && moved > 950, "an epoch visits every image once, in another order");
    check(crc_32(0, "123456789", 9) == 0xcbf43926u && crc_32(crc_32(0, "1234", 4), "56789", 5) == 0xcbf43926u, "CRC-32 of the check string");
}

int main(void) {
    device_open();
    cudaCheck(cudaMalloc(&cublas_workspace, CUBLAS_WORKSPACE));
    test_random();
    const size_t widths[] = {1, 5, 8, 42, 64, 192, 200, 768};
    for (size_t i = 0; i < sizeof(widths) / sizeof(widths[0]); i++) {
        test_layernorm(i % 2 ? 131 : 64, widths[i], 0);
        test_layernorm(7, widths[i], i % 2 ? 8 : 3);
        test_column_sum(i % 2 ? 129 : 64, widths[i]);
        test_gelu(widths[i] * 7);
    }
    test_column_sum(1, 64);
    test_gelu(100000);
    const size_t shapes[][3] = {{1, 1, 1}, {5, 7, 3}, {33, 42, 126}, {64, 64, 192}, {197, 96, 40}};
    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) { test_linear(shapes[i][0], shapes[i][1], shapes[i][2]); }
    test_attention(1, 1, 1, 1);
    test_attention(3, 5, 2, 7);
    test_attention(2, 33, 3, 14);
    test_attention(2, 50, 4, 16);
    test_attention(1, 197, 2, 64);
    test_cross_entropy(1, 1, 0.0, false);
    test_cross_entropy(65, 10, 0.0, false);
    test_cross_entropy(7, 100, 0.1, false);
    test_cross_entropy(33, 1000, 0.1, false);
    test_cross_entropy(30, 17, 0.0, true);
    test_patchify(3, 15, 5, 1);
    test_patchify(2, 28, 4, 1);
    test_patchify(4, 24, 6, 3);
    test_patchify(3, 48, 16, 3);
    for (int adamw = 0; adamw < 2; adamw++) {
        test_optimizer(128, adamw, 0.0, false);
        test_optimizer(131072 + 128, adamw, 1.0, false);
    }
    test_optimizer(1032, false, 1.0, true);
    test_average(8);
    test_average(131072 + 1032);
    test_drop_path(1, 1, 1, 0.3);
    test_drop_path(7, 35, 5, 0.5);
    test_drop_path(9, 320, 3, 0.2);
    test_drop_path(70, 64, 12, 0.9);
    printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
