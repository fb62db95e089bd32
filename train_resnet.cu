/*
Trains a ResNet image classifier with DropIT, on a GPU or (through dev/cpu) on a CPU.

DropIT (Chen et al., ICLR 2023, arXiv 2202.13808) in five lines: a convolution caches its input X for the weight
gradient, a product of its output's gradient and X. Of X we keep only the k = n*(1-gamma) elements of largest
magnitude, as a bitmap and packed values, and take the rest as zero when the weight gradient is computed. Input
gradients never read X and stay exact. See "shared: DropIT" for how the elements are chosen and stored.

build: make train_resnet  (by hand: nvcc -O3 -std=c++17 -arch=sm_90 train_resnet.cu -lcublas -lcublasLt -o train_resnet)
run:   ./train_resnet -g 0.7 (no flags are needed: without -i it trains resnet8 on the bundled Fashion-MNIST)

How to read this file, from the top:
  base        checks, precision, packs of elements, launches
  interface   a table of contents: what the code behind main() offers, and what a model defines for it
  the model   configurations, flags, the tables of its tensors, forward pass, backward pass, memory
  training    the table of flags, the training loop, main()
  kernels     of convolutions, batch norms, pools
  machinery   everything else, as an appendix: DropIT, linear layers, loss, optimizer, data, files, ranks
Sections marked "shared" stand in every trainer as the same bytes; `make check` compares them.

Four things a reader cannot guess:
- Images are (B, H, W, C) in memory: channels last. A convolution is then a matrix product over rows of C numbers, and
  its weight, (OC, C, KH, KW) in files, lies as (OC, KH, KW, C) in memory.
- Batch norm needs sums over the whole batch, so the passes go layer by layer over the whole batch; only inside of a
  layer they go in chunks of images (-chunk: 32 MiB of its widest tensor). What the backward pass recomputes, it
  recomputes in the same chunks by the same calls: the same bits.
- ReLU stores no mask where its input, a batch norm's output, can be computed again from what the norm keeps anyway.
  Only a block's output, which is a sum, has a bit an element.
- Every random choice is Philox(seed, purpose, step, index): there is no generator state to save.

B images in a batch, L blocks, V classes, H x W pixels and CH channels of an image; C channels into and OC channels out
of a convolution with a K x K kernel; H x W pixels in, OH x OW pixels out.
*/

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <libgen.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <algorithm>
#include <initializer_list>
#include <type_traits>
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef MULTI_GPU
#define OMPI_SKIP_MPICXX // the C++ interface of MPI is long gone
#include <mpi.h>
#include <nccl.h>
#endif

namespace cg = cooperative_groups;

// ---- shared: base ----------------------------------------------------------
#define CEIL_DIV(M, N) (((M) + (N) - 1) / (N))
static cudaStream_t main_stream;
static int num_multiprocessors;
static int rank = 0, num_ranks = 1; // of the processes that train together, one a GPU

// Ends the program with one sentence on stderr, and with it all ranks: they would wait for ever
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
    const int reason = errno; // for %m
    va_list arguments;
    va_start(arguments, format);
    fflush(stdout);
    flockfile(stderr); // reader threads may fail too; a sentence stays whole
    fprintf(stderr, "error: ");
    errno = reason;
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    fflush(stderr);
#ifdef MULTI_GPU
    if (num_ranks > 1) { MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE); }
#endif
    exit(EXIT_FAILURE);
}

// for what the user can get wrong (files, flags, sizes); assert() is for what only we can get wrong
#define require(cond, ...) do { if (!(cond)) { fail(__VA_ARGS__); } } while (0)
#define checkCall(call, success, reason) do { auto err_ = (call); \
    require(err_ == (success), "%s:%d: %s: %s", __FILE__, __LINE__, #call, reason(err_)); } while (0)
#define cudaCheck(call) checkCall(call, cudaSuccess, cudaGetErrorString)
#define cublasCheck(call) checkCall(call, CUBLAS_STATUS_SUCCESS, cublasGetStatusString)
#define ncclCheck(call) checkCall(call, ncclSuccess, ncclGetErrorString)
#define mpiCheck(call) require((call) == MPI_SUCCESS, "%s:%d: %s failed", __FILE__, __LINE__, #call)

// goes after every <<<>>>. With CUDA_LAUNCH_BLOCKING=1 in the environment a bad access is reported by its own kernel
#define kernelCheck() cudaCheck(cudaGetLastError())
#define LAUNCH_BLOCKS(kernel, blocks, threads, stream, ...) do { \
    kernel<<<blocks, threads, 0, stream>>>(__VA_ARGS__); kernelCheck(); } while (0)

// floatX is the type of weights and activations; weight gradients and optimizer states are fp32 in both
#ifdef ENABLE_FP32
typedef float floatX;
typedef uint32_t bitsX; // an integer of the same size
#define CUDA_FLOATX CUDA_R_32F
#define PRECISION_NAME "fp32"
#else
typedef __nv_bfloat16 floatX;
typedef uint16_t bitsX;
#define CUDA_FLOATX CUDA_R_16BF
#define PRECISION_NAME "bf16"
#endif

// V consecutive elements, moved in accesses of up to 16 bytes. Kernels are templates over V: VEC where
// sizes and pointers allow it, else 1
#define VEC 8
template <int V, class T = floatX> struct alignas(V * sizeof(T) < 16 ? V * sizeof(T) : 16) Pack { T v[V]; };

template <int V, class T> __device__ inline void load(float* out, const T* p) {
    const Pack<V, T> x = *(const Pack<V, T>*)p;
    for (int j = 0; j < V; j++) { out[j] = (float)x.v[j]; }
}

template <int V, class T> __device__ inline void store(T* p, const float* v) {
    Pack<V, T> x;
    for (int j = 0; j < V; j++) { x.v[j] = (T)v[j]; }
    *(Pack<V, T>*)p = x;
}

// V float registers added up in pairs: a chain of additions four times shorter than one after the other
template <int V> __device__ inline float total(const float* v) {
    if constexpr (V == 1) { return v[0]; }
    else { return total<V / 2>(v) + total<V / 2>(v + V / 2); }
}

// true when rows of n elements that start at these pointers can be read VEC elements at a time
template <class... Pointers> bool vectorizable(size_t n, Pointers... p) {
    return n % VEC == 0 && ((((uintptr_t)p | ...) % 16) == 0);
}

// Launches the version of a kernel for packs of VEC elements where `vector`, else the one for single
// elements. A thread handles one pack of the n elements
#define LAUNCH(kernel, vector, n, block, ...) do { \
    if (vector) { kernel<VEC><<<CEIL_DIV((n) / VEC, (size_t)(block)), block, 0, main_stream>>>(__VA_ARGS__); } \
    else { kernel<1><<<CEIL_DIV(n, (size_t)(block)), block, 0, main_stream>>>(__VA_ARGS__); } \
    kernelCheck(); } while (0)

// Kernels on rows of n elements are templates over V and LANES, the lanes that share a row. A row gets
// so few lanes that each has about four packs or more: a lane without work costs, and a single lane
// could not hide the latency of its loads. A row's sum is then one reduction over its lanes
#define LAUNCH_LANES(kernel, V, LANES, rows, ...) \
    kernel<V, LANES><<<CEIL_DIV(rows, (size_t)(128 / (LANES))), 128, 0, main_stream>>>(__VA_ARGS__)
#define LAUNCH_ROWS(kernel, vector, n, rows, ...) do { \
    if (!(vector)) { LAUNCH_LANES(kernel, 1, 8, rows, __VA_ARGS__); } \
    else if ((n) <= 12 * VEC) { LAUNCH_LANES(kernel, VEC, 2, rows, __VA_ARGS__); } \
    else if ((n) <= 32 * VEC) { LAUNCH_LANES(kernel, VEC, 4, rows, __VA_ARGS__); } \
    else { LAUNCH_LANES(kernel, VEC, 8, rows, __VA_ARGS__); } \
    kernelCheck(); } while (0)

#define ALIGNMENT 256
size_t align_up(size_t bytes) { return CEIL_DIV(bytes, (size_t)ALIGNMENT) * ALIGNMENT; }

// numel (L, 3*C, C) -> L * 3*C * C in size_t: such products overflow an int at batch sizes in use
template <class... Dims> size_t numel(Dims... dims) { return ((size_t)1 * ... * (size_t)dims); }

// n elements of host memory, all zero
template <class T> T* host_new(size_t n, const char* what) {
    T* p = (T*)calloc(n > 0 ? n : 1, sizeof(T));
    require(p != NULL, "out of host memory for %zu elements of %s", n, what);
    return p;
}

// a list on the host that grows by push: for (T& element : list)
template <class T> struct List {
    T* of;
    int n;
    T* begin() const { return of; }
    T* end() const { return of + n; }
    void push(const T& element) {
        const bool full = (n & (n - 1)) == 0; // it doubles at powers of two
        if (full) { of = (T*)realloc((void*)of, (n > 0 ? 2 * n : 1) * sizeof(T)); }
        require(of != NULL, "out of host memory for a list of %d", n + 1);
        of[n++] = element;
    }
};
// ---- end shared: base ------------------------------------------------------

// ---- shared: interface -----------------------------------------------------
// What stands behind main(), as a table of contents: types and functions that a model and the loop use

// Several GPUs: a rank is a process with a GPU of its own; ranks have the same weights and other images
void device_open(void);                                // joins the other ranks, chooses the GPU
void ranks_close(void);
typedef struct { float* data; size_t n; } Piece;
void ranks_add(const List<Piece>& pieces);             // of gradients; main_stream does not wait
void ranks_wait(void);                                 // main_stream waits until they are added up
void ranks_gather(void* full, const void* part, size_t bytes); // full: of all ranks; part may lie in it
void ranks_broadcast(void* device, size_t bytes);      // all get what rank 0 has
void ranks_sum(double* values, int n);                 // of the host: the same sums on all ranks
void ranks_agree(uint32_t value, const char* what);    // ends the run unless all ranks have this value

// Random numbers by Philox4x32-10 (Salmon et al., SC 2011): (seed, purpose, step, i) gives four words
enum { RNG_INIT = 1, RNG_SHUFFLE, RNG_DROPIT, RNG_AUGMENT, RNG_CROP, RNG_RANDAUGMENT, RNG_ERASE, RNG_MIX,
       RNG_DROP_PATH };
typedef unsigned long long u64;
__host__ __device__ inline uint4 philox(u64 seed, unsigned purpose, unsigned step, u64 i);
double uniform(unsigned u); // in (0, 1)
double normal(uint4 u);     // by Box and Muller
int draw_below(unsigned u, int n); // 0 to n-1

// Memory: every byte on the device is in a line of the plan; all are added up, then allocated, by category
enum { CACHED, SCRATCH, PARAMETERS_MEMORY, GRADIENTS, OPTIMIZER, NUM_CATEGORIES };
static const double MiB = 1048576.0;
static const char* const category_names[] = {"cached", "scratch", "parameters", "gradients", "optimizer"};
struct Allocation;
typedef struct {
    List<Allocation> lines;
    size_t bytes[NUM_CATEGORIES];
    char* blocks[NUM_CATEGORIES]; // as allocated
} Plan;
// Lines of the same name and part are printed as one. dense: bytes without DropIT and recomputation.
// shared: pointer of a line before, whose memory this line uses too; where smaller, it grows to `bytes`
template <class T> void plan_add(Plan* plan, int category, const char* name, const char* part, const char* shape,
                                 T** pointer, size_t bytes, size_t dense = 0, T** shared = NULL);
void plan_clear(Plan* plan); // the line that was added last is zero when it has been allocated
size_t plan_total(const Plan* plan);

// DropIT chooses the k elements of largest magnitude of a tensor, and stores or masks them
enum { MINK, FASTMINK, RANDOM };
// an element is kept when its key > key || (its key == key && its index < tie_end)
typedef struct { unsigned key, tie_end; } Threshold;
typedef struct {
    size_t n, k;
    Threshold* thresholds; // (1) or, for fastmink and random, (tiles)
    unsigned* offsets;     // (segments) values before each; NULL: only thresholds are stored
    unsigned* bitmap;      // (words)
    floatX* values;        // (k + 1): unpacking may read one value more than there are
} Dropped;
// What a kernel that recomputes a tensor does with V elements from element i of its chunk on
struct KeepAll { template <int V> __device__ void apply(float*, size_t) const {} };
struct KeepLargest { // min-k's masking
    const Threshold* threshold; // NULL: none; a launcher takes KeepAll instead
    size_t begin;               // element of the tensor where the chunk begins
    template <int V> __device__ void apply(float* v, size_t i) const;
};

// Linear layers, in PyTorch: F.linear(inp, weight, bias). out and dout are (rows, OC), inp and dinp
// (rows, C), weight and dweight (OC, C), bias (OC), never NULL
static cublasHandle_t cublas_handle;
// out = inp @ weight^T + bias (+ residual (rows, OC); NULL: none)
void linear_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, const floatX* residual,
                    size_t rows, size_t C, size_t OC);
// dinp = dout @ weight; dweight += dout^T @ inp
void linear_backward_input(floatX* dinp, const floatX* dout, const floatX* weight, size_t rows, size_t C, size_t OC);
void linear_backward_weight(float* dweight, const floatX* dout, const floatX* inp, size_t rows, size_t C, size_t OC);
// out (OC) += x (rows, OC) summed over rows: SLAB_ROWS rows give a row of partial (column_sum_scratch
// floats), and column_sum_finish adds up those. Columns from C on go to out2
#define SLAB_ROWS 64
size_t column_sum_scratch(size_t rows, size_t OC);
void column_sum(float* out, const floatX* x, float* partial, size_t rows, size_t OC);
void column_sum_finish(float* out, float* out2, const float* partial, size_t slabs, size_t C, size_t OC);

// What a step or an evaluation adds up on the device, over its images
#define MAX_METRICS 16
typedef struct {
    double sums[MAX_METRICS]; // as model_train_metrics names them
    unsigned not_finite; // NaNs and Infs that DropIT met
    float norm;          // of all gradients, before clipping
} StepResult;
typedef struct { const char* name; double unit; int digits; } Metric; // unit: 100 for percent
typedef struct {
    bool adamw; // else SGD with momentum
    double learning_rate, beta1, beta2, eps, weight_decay, momentum;
    double clip; // largest norm of all gradients together; 0: no clipping
    bool nesterov; // SGD
} OptimizerConfig;

// Image data: what random erasing and mixing do to a batch, and the normalisation of its pixels
typedef struct { int top, left, height, width; } EraseBox; // height 0: nothing is erased
typedef struct {
    const EraseBox* erased;  // (n), NULL: none
    u64 seed, place, place_step; // place of the first image in the epoch, and distance of the next
    unsigned epoch;
    int n;
    float lam;               // weight of image b and of its label; 1: no mixing with image n-1-b
    bool cut;                // cutmix: a box has the other image's pixels; else mixup: a weighted mean
    int top, bottom, left, right;
} BatchAugment;
typedef struct { float mean[4], std[4]; } PixelStats;
typedef struct Loader Loader;
typedef struct { // what the loader has brought to the device
    uint8_t* images;      // (n, H, W, CH)
    const int* labels;    // (n)
    int* flips;           // (n) 1: the image is still to be mirrored left to right
    size_t n;
    PixelStats stats;     // to normalise with
    float smoothing;      // training: of labels
    BatchAugment augment; // training: erasing and mixing
    const Loader* loader;
} Batch;
// normal noise of a pixel and channel that random erasing puts in place of the image's
__device__ inline float erase_noise(u64 seed, unsigned epoch, u64 place, unsigned pixel, unsigned c);
struct Model;
Loader* loader_new(const char* path, Model* model, bool training); // opens and checks the shards
void loader_start(Loader* loader, Model* model);  // once memory is allocated: threads read ahead
void loader_close(Loader* loader);                // NULL: does nothing
void loader_print(const Loader* loader, const char* what);
size_t loader_images(const Loader* loader);       // in the files
size_t loader_epoch(const Loader* loader);        // trained on in an epoch, over all ranks
size_t loader_batches(const Loader* loader);      // of a rank's epoch, or of its part of an evaluation
size_t loader_first(const Loader* loader);        // the batch that comes next; evaluations count on
uint32_t loader_crc(const Loader* loader);        // of the headers: which data these are
void loader_batch(Loader* loader, size_t number); // brings a batch to the device, beside main_stream
const Batch* loader_take(const Loader* loader);   // that batch, for what main_stream does from now on
void batch_used(const Batch* batch);              // main_stream has read it: the next may take its place

// Image classifiers: their flags and memory, and softmax cross-entropy with label smoothing and mixing,
// of which result->sums gets {loss, top1, top5}: logits (n, V) become their gradient times scale
typedef struct Augmenter Augmenter;
void image_options(Model* model);
void plan_images(Model* model, Augmenter* augmenter);
void classifier_loss(Model* model, floatX* logits, const int* labels, const Batch* batch, float scale);
void mean_scores(const Model* model, size_t images, double* scores); // of an evaluation, from its sums

// A tensor of parameters: a line of the model's table, for one copy
//   DECAY   is trained, with weight decay
//   PLAIN   is trained, with weight decay only under -wd_all 1: norms, biases
//   BUFFER  is not trained, but moves: running statistics. fp32 in both precisions
//   FROZEN  is as it was read
enum { DECAY, PLAIN, FROZEN, BUFFER, NUM_KINDS };
typedef struct { enum { CONSTANT, NORMAL, UNIFORM } kind; double scale; } Init; // value, deviation, bound
Init constant_init(double value), normal_init(double deviation), uniform_init(size_t fan_in);
typedef struct {
    char name[96];
    int kind, dims, copy, copies;
    bool added; // over the ranks, in this step
    Init init;
    size_t shape[4], n, offset; // offset: in the memory of parameters, gradients, moments and masters
    floatX** param;             // the model's pointers; NULL: a kind that has no such memory
    float **grad, **buffer;
    bool channels_last; // (OC, C, KH, KW) in files, (OC, KH, KW, C) in memory; the model sets it after adding
} Parameter;
// name: "blocks.%d.norm1.weight", %d is the copy. A tensor without elements does not exist
template <class... Dims> void add_parameter(Model* model, floatX** param, float** grad, float** buffer,
                                            const char* name, int copy, int copies, int kind, Init init, Dims... shape);
// Gives the gradients of this copy of all tensors that have several to the ranks, to be added up while
// the backward pass goes on. What no call names is added up at its end
void gradients_done(Model* model, int copy);

// A tensor of the forward pass: a line of the model's table, for one copy
//   type:  bits of an element: FLOATX, FP32, BYTE or BIT
//   level: the tensor is recomputed, and not cached, at -r level and above. NEVER: always cached
//   KEEP:  stored dense, as it is
//   DROP:  the input of a layer, read by the backward pass for the weight gradient alone: by DropIT
//   ALL:   the same, but the published DropIT leaves it dense; DROP under -g_all 1
enum { BIT = 1, BYTE = 8, FP32 = 32, FLOATX = 8 * sizeof(floatX) };
enum { KEEP, DROP, ALL };
#define NEVER 4
#define MAX_COPIES 64
#define IN_PARENTHESES(...) __VA_ARGS__ // of a table's shape
typedef struct {
    const char* name;
    int copy, copies, line, bits, cache; // line: of the table
    size_t n, per_image;  // elements, of the largest batch and of one image
    bool cached, dropped; // stored for the backward pass; chosen from by DropIT
    bool masked;          // the kernel that recomputes it masks it
    int id;               // among the dropped tensors
    size_t gradient, gradient_n; // -stats: where its weight gradient lies in the memory of gradients
    char* data;           // cached and not dropped
    char* batch;          // dropped: the whole tensor until its elements are chosen; copies share it
    char* chunk;          // recomputed or dropped: what the passes work on; copies share it
    Dropped dropit;
} Activation;
void plan_activation(Model* model, Activation* a, const char* name, const char* shape, int copy, int copies,
                     int bits, size_t n, int level, int cache);
// The kernel that recomputes `a` masks it, unless `reader`, which a layer computes from it, is
// recomputed too: that layer needs all elements
void mask_unless_read(const Model* model, Activation* a, const Activation* reader);
// tensors that drop_activations chooses from in one call
void plan_selection(Model* model, std::initializer_list<const Activation*> activations);
// where image b0 of a tensor is written in the forward pass, or recomputed and read in the backward pass
char* activation_at(const Activation* a, size_t b0, bool backward);
// is the tensor computed now? In the forward pass each is, in the backward pass what is not cached
bool computed(const Activation* a, bool backward);
// the masking of a tensor from image b0 on: none where it is not recomputed, or masked by another kernel
KeepLargest keep_largest(const Activation* a, size_t b0, bool recompute);
void drop_activations(const Model* model, std::initializer_list<const Activation*> activations);
// The input of a layer from image b0 on, as its weight gradient reads it: dense, unpacked, or recomputed and masked
const floatX* kept_input(const Model* model, const Activation* a, size_t b0, size_t nb);
// In a step that reports -stats, memory for the gradient (n) from the exact input, activation_at(a, b0, false);
// else NULL. kept: what kept_input has returned
float* exact_gradient(const Model* model, Activation* a, const floatX* kept, const float* dweight, size_t n,
                      size_t b0, size_t nb);
// dweight (OC, C) += dout^T @ X, dbias (OC) += sum of dout, for images b0 .. b0+nb-1 of `rows` rows
// each. X is kept_input
void weight_gradient(Model* model, Activation* a, float* dweight, float* dbias, const floatX* dout, size_t b0,
                     size_t nb, size_t rows, size_t C, size_t OC);

// Flags: X(type, field, flag, default, least, most, resume, help). Types: i int, f double, s string. The
// defaults are neutral: model_defaults says what a model wants. SAME: a resumed run must have the value
#define MAX_OPTIONS 96
enum { ANY, SAME };
typedef struct Option {
    const char* flag;
    char type;
    void* value;
    const char* help;
    double least, most; // of numbers
    int resume;
    char neutral[160];  // the default of the table, as text
} Option;
#define TYPE_i int
#define TYPE_f double
#define TYPE_s const char*
#define FIELD(type, field, ...) TYPE_##type field;
#define OPTION(type, field, flag, value, least, most, resume, help) \
    s->field = value; \
    add_option(model, Option{flag, *#type, &s->field, help, least, most, resume, ""});
void add_option(Model* model, Option o);

// What every model has; a trainer's Model is this and its own tensors
struct Common {
    const char* name;            // -m
    struct Settings* s;          // the flags of all trainers
    Option options[MAX_OPTIONS]; // and where their values lie, those of this model too
    int num_options;
    size_t B, H, W, CH, V;       // largest batch; height, width and channels of an image; classes
    int strategy;                // MINK, FASTMINK, RANDOM
    bool adamw;                  // two moments, else one
    unsigned long long seed;
    size_t chunk_bytes;          // of the widest tensor in a chunk
    size_t chunk_images;         // of the chunks that the passes work in: the model's plan sets it
    char** chunk_home;           // a chunk whose memory those of the next lines share; NULL: none. As chunk_images
    List<Parameter> parameters;
    List<Activation*> activations; // in the order of the table
    int num_lines;               // of the table of activations
    size_t num_parameters, num_decayed; // elements with padding of the trained; the decayed come first
    size_t num_frozen, num_buffers; // elements behind them: frozen tensors, then buffers
    size_t num_values;           // of all these
    size_t shard_begin, shard_n; // of the parameters that this rank updates; all unless -z 1
    floatX* params_memory;       // (num_parameters + num_frozen)
    float* grads_memory;         // (num_parameters)
    float *master, *m, *v, *ema; // (shard_n); in fp32 master is the shard in params_memory
    float *fixed, *buffers_ema;  // (num_frozen + num_buffers) in fp32; (num_buffers)
    float* partial;              // of column sums
    struct Scratch* scratch;     // of loader, loss, optimizer and DropIT
    StepResult* result;
    Plan plan;
    const char* too_large;       // a dropped tensor of 2^32 elements or more: indices have 32 bits
    unsigned pass;               // forward passes of training so far: their random choices depend on it
    bool stats_now, last_pass;   // this step reports -stats; gradients are complete after this pass
};

// A step, and the state that it changes
typedef struct { char key[64], value[160]; } StMetadata;
typedef struct {
    bool by_epochs;
    double lr, min_lr, warmup_lr;
    int warmup, length; // in steps, or in epochs; length is that of warm-up and cosine
    int epoch_steps;
} Schedule;
double learning_rate_at(const Schedule* s, int step);
Model* model_new(void);            // with the default flags
void plan_model(Model* model);     // fills the plan
void model_allocate(Model* model); // all of the plan
void model_free(Model* model);
void init_parameters(Model* model);
typedef struct Safetensors Safetensors;
bool safetensors_has(const Safetensors* st, const char* name); // a tensor
void check_parameters(const Model* model, const Safetensors* st); // ends the run unless they fit
void load_parameters(Model* model, const Safetensors* st, const char* prefix); // prefix: of the names
void share_buffers(Model* model);  // rank 0's running statistics are the model's
void zero_gradients(Model* model);
void model_update(Model* model, OptimizerConfig o, double lr, int step); // step counts from 1
void ema_enter(Model* model);      // the moving average takes the place of the weights, until ema_leave
void ema_leave(Model* model);
StepResult model_result(const Model* model); // over all ranks, since zero_gradients; the host waits
const char* first_not_finite(const Model* model); // name of the first stored tensor as they are computed
uint32_t fingerprint(const Model* model);         // CRC-32 of all weights
void weights_agree(const Model* model);           // over the ranks, else the run ends

// What a model defines for the code behind main(), beside struct Augmenter and the macros MODEL_NAMES,
// DEFAULT_MODEL, HELP_RECOMPUTE, HELP_DROP_ALL, HELP_WEIGHTS
void model_options(Model* model);                        // adds its flags
const char* model_defaults(const char* name);            // flags that stand before a recipe's
void model_configure(Model* model);                      // what the flags say: H, W, CH, V and its own
void model_plan(Model* model);                           // its tables, its scratch
void model_print(const Model* model);                    // says in a line what it is
// forward pass, loss and backward pass of a batch: gradients += those of scale * loss, result += sums
void model_train(Model* model, const Batch* batch, float scale);
void model_evaluate(Model* model, const Batch* batch);   // without DropIT; result += the sums
floatX* model_predict(Model* model, const Batch* batch); // classifiers: the logits (n, V)
void model_input(Model* model, const Batch* batch);      // normalised, erased, mixed: the first tensor
void model_pixels(const Model* model, size_t b, float* pixels); // classifiers: image b of it, (CH, H, W)
void model_augment(Augmenter* a, const Batch* batch, cudaStream_t stream); // classifiers: images' bytes
void model_check_file(const Safetensors* st);            // refuses weights of what it does not train
double model_flops(const Model* model, size_t n);        // of the products of a step on n images
void model_scores(const Model* model, size_t images, double* scores); // of an evaluation
extern const Metric model_train_metrics[];               // a step's sums: the loss first, NULL last
extern const Metric model_eval_metrics[];                // an evaluation's scores
extern const int model_best_metric;                      // of these: best.safetensors has the largest
extern const char* const model_recipes[][2];             // name, flags; {NULL, NULL} ends them
// ---- end shared: interface -------------------------------------------------

// ----------------------------------------------------------------------------
// the model: configurations, tensors, flags

typedef struct {
    bool wide;        // bottleneck blocks of three convolutions, their outputs 4 x width; else basic ones of two
    int layers[4];    // blocks of each stage; 0: there is no such stage
    int width;        // of stage 1; each stage doubles it
    bool pools;       // ImageNet's stem: 7 x 7, stride 2, and a max pool; else CIFAR's: 3 x 3, stride 1
    int image_size, image_channels, num_classes;
} ResnetConfig;
static const struct { const char* name; ResnetConfig config; } resnet_presets[] = {
    {"resnet8",   {false, {1, 1, 1, 0},  16, false, 28,  1, 10}}, // for the bundled data
    {"resnet18",  {false, {2, 2, 2, 2},  64, true,  224, 3, 1000}},
    {"resnet34",  {false, {3, 4, 6, 3},  64, true,  224, 3, 1000}},
    {"resnet50",  {true,  {3, 4, 6, 3},  64, true,  224, 3, 1000}},
    {"resnet101", {true,  {3, 4, 23, 3}, 64, true,  224, 3, 1000}},
};

// Block l: its stage (from 1) and its place there (from 0), channels in, between and out, stride, sides
// in and out. down: a convolution and a norm bring the block's input to the shape of its output
typedef struct { size_t stage, index, in, width, out, stride, H, W, OH, OW; bool down; } Block;

// a convolution without bias and its batch norm, with torchvision's names, and its init: Kaiming's, by
// fan-out
#define CONV_BN(X, field, conv, bn, copies, OC, C, K, gamma) \
    X(field##w, conv ".weight",     copies, (OC, C, K, K), DECAY,  normal_init(sqrt(2.0 / ((OC)*(K)*(K))))) \
    X(field##g, bn ".weight",       copies, (OC),          PLAIN,  constant_init(gamma)) \
    X(field##b, bn ".bias",         copies, (OC),          PLAIN,  constant_init(0)) \
    X(field##m, bn ".running_mean", copies, (OC),          BUFFER, constant_init(0)) \
    X(field##v, bn ".running_var",  copies, (OC),          BUFFER, constant_init(1))

// X(name, name in torchvision, copies, shape of copy l, kind, initial value). b is block l; F, E are the
// widths of stem and head, K0, K1 the kernel sides of the stem and of conv1; z2, z3 are 0 under
// -zero_init 1 in a block's last norm
#define PARAMETERS(X) \
    CONV_BN(X, stem,  "conv1",                   "bn1",                     1, F, CH, K0, 1) \
    CONV_BN(X, conv1, "layer%d.%d.conv1",        "layer%d.%d.bn1",          L, b.width, b.in, K1, 1) \
    CONV_BN(X, conv2, "layer%d.%d.conv2",        "layer%d.%d.bn2",          L, b.width, b.width, 3, z2) \
    CONV_BN(X, conv3, "layer%d.%d.conv3",        "layer%d.%d.bn3",          L, (wide ? b.out : 0), b.width, 1, z3) \
    CONV_BN(X, down,  "layer%d.%d.downsample.0", "layer%d.%d.downsample.1", L, (b.down ? b.out : 0), b.in, 1, 1) \
    X(fcw, "fc.weight", 1, (V, E), DECAY, uniform_init(E)) \
    X(fcb, "fc.bias",   1, (V),    PLAIN, uniform_init(E))

// X(name, type, copies, shape of copy l, level, cache), as the interface explains. S0, P0 are the pixels
// out of the stem's convolution and pool (0: none), H1 those of conv1; BYTES(n) holds n bits
#define ACTIVATIONS(X) \
    X(image,  FLOATX, 1, (B, model->H, model->W, CH),          NEVER,        ALL)  /* input of the stem */ \
    X(y0,     FLOATX, 1, (B, S0, F),                           NEVER,        KEEP) /* its output, input of its norm */ \
    X(argmax, BYTE,   1, (B, P0, F),                           NEVER,        KEEP) /* max pool: which of 9 */ \
    X(x,      FLOATX, L, (B, b.H, b.W, b.in),                  exact,        DROP) /* input of a block */ \
    X(input,  FLOATX, L, (B, b.H, b.W, dense ? b.in : 0),      NEVER,        KEEP) /* the same, whole: -r 3, DropIT */ \
    X(y1,     FLOATX, L, (B, H1, b.width),                     3,            KEEP) /* conv1(x) */ \
    X(a1,     FLOATX, L, (B, H1, b.width),                     1,            DROP) /* relu(bn1(y1)) */ \
    X(y2,     FLOATX, L, (B, b.OH, b.OW, b.width),             wide ? 3 : 2, KEEP) /* conv2(a1) */ \
    X(a2,     FLOATX, L, (B, b.OH, b.OW, wide ? b.width : 0),  1,            DROP) /* relu(bn2(y2)) */ \
    X(y3,     FLOATX, L, (B, b.OH, b.OW, wide ? b.out : 0),    2,            KEEP) /* conv3(a2) */ \
    X(yd,     FLOATX, L, (B, b.OH, b.OW, b.down ? b.out : 0),  3,            KEEP) /* downsample.0(x) */ \
    X(bits,   BIT,    L, (B, BYTES(b.OH * b.OW * b.out), 8),   NEVER,        KEEP) /* block's output is above 0 */ \
    X(pooled, FLOATX, 1, (B, E),                               NEVER,        DROP) /* input of the head */ \
    X(logits, FLOATX, 1, (B, V),                               NEVER,        KEEP) /* and their gradient */
#define BYTES(n) CEIL_DIV(n, (size_t)8)

#define MODEL_NAMES "resnet8, resnet18, resnet34, resnet50, resnet101"
#define DEFAULT_MODEL "resnet8"
#define HELP_RECOMPUTE "0 nothing, 1 norms and ReLU, 2 also a block's last convolution, 3 the block"
#define HELP_DROP_ALL "the stem"
#define HELP_WEIGHTS "torchvision's"
// flags of this model alone, beside those of all image classifiers
#define RESNET_SETTINGS(X) \
    X(s, block,     "-block",     "",  0, 0,     SAME, "blocks: basic or bottleneck; none: the model's") \
    X(s, layers,    "-layers",    "",  0, 0,     SAME, "blocks of each stage, as 2,2,2,2; none: the model's") \
    X(i, width,     "-width",     0,   0, 65536, SAME, "width of stage 1, 0: the model's") \
    X(s, stem,      "-stem",      "",  0, 0,     SAME, "stem: imagenet or cifar; none: the model's") \
    X(i, zero_init, "-zero_init", 0,   0, 1,     SAME, "1: the weight of a block's last norm begins at 0")

// A convolution of `images` images: inp (images, H, W, C), out (images, OH, OW, OC), weight (OC, K, K, C);
// OH = (H + 2*pad - K) / stride + 1
typedef struct { int C, OC, K, stride, pad, H, W, OH, OW; } Conv;
typedef struct { floatX* data; size_t n; } Columns; // scratch of convolutions

// The batch norm of OC channels. mean and rstd = 1 / sqrt(variance + eps) are what the passes normalise
// with: those of the batch in training, else the running ones
typedef struct {
    int C;
    const floatX *weight, *bias;
    float *dweight, *dbias, *running_mean, *running_var, *mean, *rstd;
} BatchNorm;

// a convolution and its norm, with the places of their tensors
enum { STEM, CONV1, CONV2, CONV3, DOWN, NUM_LAYERS };
typedef struct {
    Conv conv;
    BatchNorm norm;
    const floatX* weight;
    float* dweight;
    Activation *inp, *y; // input and output of the convolution
    size_t images;       // in a chunk
} Layer;

struct Augmenter {};
struct Model : Common {
    struct { RESNET_SETTINGS(FIELD) } own; // the flags
    struct ImageData* images;              // flags and memory of image classifiers
    ResnetConfig config;
    size_t L, SH, SW, PH, PW;              // blocks; sides behind the stem's convolution, and behind its pool
#define X(name, ...) floatX* name[MAX_COPIES];
    struct { PARAMETERS(X) } params;
#undef X
#define X(name, ...) float* name[MAX_COPIES];
    struct { PARAMETERS(X) } grads, buffers;
#undef X
#define X(name, ...) Activation name[MAX_COPIES];
    struct { ACTIVATIONS(X) } acts;
#undef X
    float* stats[NUM_LAYERS][MAX_COPIES];  // (2, channels) mean and rstd of each norm, written in the forward pass
    // scratch
    int* labels;           // (B)
    floatX *d[2], *da2;    // gradients over the whole batch: of blocks' inputs and a1, in turns; of a2
    floatX *dy, *dpooled;  // a chunk of the gradient of a convolution's output; (B, E)
    float *sums, *norm_partial; // (2, channels); partial sums of them
    Columns columns;
};

// ----------------------------------------------------------------------------
// its kernels' launchers, which stand behind main()

// image (n, H, W, CH) = images, mirrored where flips (n) say so, normalised, erased and mixed
void normalise_pixels(floatX* image, const uint8_t* images, const int* flips, PixelStats stats, BatchAugment augment,
                      size_t n, int H, int W, int CH);
// in PyTorch: F.conv2d(inp, weight, bias, stride, pad); bias (OC) may be NULL
void conv_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, const Conv* c,
                  size_t images, Columns columns);
// dinp = F.conv_transpose2d(dout, weight, ...), its gradient; add: dinp += it
void conv_backward_input(floatX* dinp, const floatX* dout, const floatX* weight, bool add, const Conv* c,
                         size_t images, Columns columns);
void conv_backward_weight(float* dweight, const floatX* dout, const floatX* inp, const Conv* c, size_t images,
                          Columns columns); // dweight += its gradient
// elements of columns that convolutions of `images` images want, but no more than `most` where fewer
// will do
size_t conv_columns(const Conv* c, size_t images, size_t most);
// mean and rstd of y (rows, C), and the running statistics move; in PyTorch: F.batch_norm(...,
// training=True, momentum=0.1, eps=1e-5). partial: batchnorm_scratch(rows, C) floats
void batchnorm_statistics(const BatchNorm* norm, const floatX* y, float* partial, size_t rows);
void batchnorm_inference(const BatchNorm* norm); // mean and rstd are the running ones
size_t batchnorm_scratch(size_t rows, size_t C);
// out = relu(norm(y)), or relu(norm(y) + residual), or relu(norm(y) + residual_norm(residual)); residual
// and residual_norm may be NULL. y, residual and out (images, per_image); bits (images,
// BYTES(per_image)), NULL: none: where the argument of relu is above 0. keep: DropIT's masking of out
void batchnorm_relu(floatX* out, uint8_t* bits, const floatX* y, const BatchNorm* norm, const floatX* residual,
                    const BatchNorm* residual_norm, size_t images, size_t per_image, KeepLargest keep = {});
// The first of two steps of the backward pass, over the whole batch: dz (rows, C), the gradient of
// norm(y), becomes 0 where a ReLU behind the norm does not let through. sums (2, C) = {sum of dz over
// rows, sum of dz * (y - mean) * rstd}, which are also added to the gradients of bias and weight
enum { NO_RELU, RELU_OF_NORM, RELU_BITS }; // none; relu(norm(y)); what bits say, of images of `pixels` rows each
void batchnorm_backward_sums(float* sums, floatX* dz, const floatX* y, const BatchNorm* norm, int relu,
                             const uint8_t* bits, float* partial, size_t rows, size_t pixels);
// The second, for any `rows` of the `all` rows, with xhat = (y - mean) * rstd:
//     dy = rstd * weight * (dz - sums[0] / all - xhat * sums[1] / all)
void batchnorm_backward(floatX* dy, const floatX* dz, const floatX* y, const BatchNorm* norm, const float* sums,
                        size_t rows, size_t all);
// out (images, PH, PW, C) = F.max_pool2d(F.relu(norm(y)), 3, 2, 1), y (images, H, W, C), argmax is
// kh * 3 + kw
void max_pool(floatX* out, uint8_t* argmax, const floatX* y, const BatchNorm* norm, size_t images, int H, int W);
void max_pool_backward(floatX* dinp, const floatX* dout, const uint8_t* argmax, size_t images, int H, int W, int C);
void average_pool(floatX* out, const floatX* inp, size_t images, size_t pixels, size_t C); // inp.mean((1, 2))
void average_pool_backward(floatX* dinp, const floatX* dout, size_t images, size_t pixels, size_t C);

bool reports_stats(const Model* model);     // -stats
bool keeps_only_inputs(const Model* model); // -r 3
bool drops(const Model* model);             // -g above 0

// ----------------------------------------------------------------------------
// shapes

size_t halved(size_t side) { return (side - 1) / 2 + 1; } // behind a stride of 2

Block block_of(const Model* model, size_t l) {
    const ResnetConfig* c = &model->config;
    const size_t width = c->width, out = c->wide ? 4 * width : width;
    Block b = {1, l, width, width, out, 1, model->PH, model->PW, 0, 0, false};
    size_t H = b.H, W = b.W; // of the stage's output
    for (; b.index >= (size_t)c->layers[b.stage - 1]; b.stage++) {
        b.index -= c->layers[b.stage - 1];
        b.in = b.out;
        b.width *= 2;
        b.out *= 2;
        b.H = H, b.W = W;
        H = halved(H), W = halved(W);
    }
    if (b.index > 0) { b.in = b.out, b.H = H, b.W = W; }
    b.OH = H, b.OW = W;
    b.stride = b.index == 0 && b.stage > 1 ? 2 : 1;
    b.down = b.index == 0 && (b.stride == 2 || b.in != b.out);
    return b;
}

Conv conv_of(size_t C, size_t OC, size_t K, size_t stride, size_t H, size_t W) {
    const size_t pad = K / 2; // as every convolution here has it
    return Conv{(int)C, (int)OC, (int)K, (int)stride, (int)pad, (int)H, (int)W, (int)((H + 2*pad - K) / stride + 1),
                (int)((W + 2*pad - K) / stride + 1)};
}

// a convolution of block l, or the stem's. C is 0 where the block has none
Conv conv_at(const Model* model, int which, size_t l) {
    const ResnetConfig* c = &model->config;
    const bool wide = c->wide, pools = c->pools;
    const Block b = block_of(model, l);
    const size_t H1 = wide ? b.H : b.OH, W1 = wide ? b.W : b.OW; // sides of a1
    switch (which) {
    case STEM: return conv_of(model->CH, c->width, pools ? 7 : 3, pools ? 2 : 1, model->H, model->W);
    case CONV1: return conv_of(b.in, b.width, wide ? 1 : 3, wide ? 1 : b.stride, b.H, b.W);
    case CONV2: return conv_of(b.width, b.width, 3, wide ? b.stride : 1, H1, W1);
    case CONV3: return conv_of(wide ? b.width : 0, b.out, 1, 1, b.OH, b.OW);
    default: return conv_of(b.down ? b.in : 0, b.out, 1, b.stride, b.H, b.W);
    }
}

// images in a chunk of block l, of the stem where l is -1: its widest tensor or unpacked rows take
// -chunk at most, unless one image takes more. Chunks are of nearly equal size
size_t chunk_of(const Model* model, int l) {
    size_t widest = 0;
    for (int which = l < 0 ? STEM : CONV1; which < (l < 0 ? CONV1 : NUM_LAYERS); which++) {
        const Conv c = conv_at(model, which, std::max(l, 0));
        if (c.C == 0) { continue; }
        const size_t inp = numel(c.H, c.W, c.C), out = numel(c.OH, c.OW, c.OC);
        widest = std::max({widest, inp, out, conv_columns(&c, 1, SIZE_MAX)});
    }
    const size_t chunks = CEIL_DIV(model->B * widest * sizeof(floatX), model->chunk_bytes);
    return CEIL_DIV(model->B, std::min(chunks, model->B));
}

Layer layer_of(Model* model, int which, size_t l) {
    const auto* p = &model->params;
    const auto *g = &model->grads, *s = &model->buffers;
    auto* a = &model->acts;
    Layer layer = {};
    layer.conv = conv_at(model, which, l);
    layer.images = chunk_of(model, which == STEM ? -1 : (int)l);
    const int OC = layer.conv.OC;
    float* stats = model->stats[which][l];
#define LAYER(field, input, output) do { \
        layer.norm = BatchNorm{OC, p->field##g[l], p->field##b[l], g->field##g[l], g->field##b[l], \
                               s->field##m[l], s->field##v[l], stats, stats + OC}; \
        layer.weight = p->field##w[l], layer.dweight = g->field##w[l]; \
        layer.inp = &a->input[l], layer.y = &a->output[l]; } while (0)
    switch (which) {
    case STEM: LAYER(stem, image, y0); break;
    case CONV1: LAYER(conv1, x, y1); break;
    case CONV2: LAYER(conv2, a1, y2); break;
    case CONV3: LAYER(conv3, a2, y3); break;
    case DOWN: LAYER(down, x, yd); break;
    }
#undef LAYER
    return layer;
}

// where image b0 of a convolution's output is: it is whole also where it is recomputed
floatX* output_at(const Activation* y, size_t b0) {
    return (floatX*)(y->cached ? y->data : y->chunk) + b0 * y->per_image;
}

// ----------------------------------------------------------------------------
// forward and backward passes

// The convolution's input from image b0 on, where it is computed now: relu(norm(output of the layer
// before)). before is NULL for a block's input, which is there; what DropIT shall mask is a copy of it
void layer_input(const Layer* layer, const Layer* before, size_t b0, size_t nb, bool recompute) {
    if (!computed(layer->inp, recompute)) { return; }
    floatX* inp = (floatX*)activation_at(layer->inp, b0, recompute);
    if (before == NULL) {
        const void* whole = activation_at(layer->inp, b0, false);
        const size_t bytes = recompute ? nb * layer->inp->per_image * sizeof(floatX) : 0;
        if (bytes > 0) { cudaCheck(cudaMemcpyAsync(inp, whole, bytes, cudaMemcpyDeviceToDevice, main_stream)); }
        return;
    }
    batchnorm_relu(inp, NULL, output_at(before->y, b0), &before->norm, NULL, NULL, nb, layer->inp->per_image,
                   keep_largest(layer->inp, b0, recompute));
}

// A convolution of n images and the statistics of its norm. before: the layer that its input is made of;
// NULL: the input is there
void layer_forward(Model* model, const Layer* layer, const Layer* before, size_t n, bool training) {
    for (size_t b0 = 0; b0 < n; b0 += layer->images) {
        const size_t nb = std::min(n - b0, layer->images);
        layer_input(layer, before, b0, nb, false);
        conv_forward(output_at(layer->y, b0), (floatX*)activation_at(layer->inp, b0, false), layer->weight, NULL,
                     &layer->conv, nb, model->columns);
    }
    const size_t rows = n * layer->conv.OH * layer->conv.OW;
    if (training) { batchnorm_statistics(&layer->norm, output_at(layer->y, 0), model->norm_partial, rows); }
    else { batchnorm_inference(&layer->norm); }
}

// The output of a convolution that is not cached, as the forward pass made it
void output_again(Model* model, const Layer* layer, const Layer* before) {
    for (size_t b0 = 0; !layer->y->cached && b0 < model->B; b0 += layer->images) {
        const size_t nb = std::min(model->B - b0, layer->images);
        floatX* inp = (floatX*)activation_at(layer->inp, b0, before != NULL);
        if (before != NULL) {
            batchnorm_relu(inp, NULL, output_at(before->y, b0), &before->norm, NULL, NULL, nb, layer->inp->per_image);
        }
        conv_forward(output_at(layer->y, b0), inp, layer->weight, NULL, &layer->conv, nb, model->columns);
    }
}

// the output of block l of n images: the next block's input, or model->d[0], of which the head's input
// is the mean
floatX* block_output(const Model* model, size_t l) {
    return l + 1 < model->L ? (floatX*)activation_at(&model->acts.x[l+1], 0, false) : model->d[0];
}

void block_forward(Model* model, size_t l, size_t n, bool training) {
    auto* a = &model->acts;
    const Block b = block_of(model, l);
    const Layer conv1 = layer_of(model, CONV1, l), conv2 = layer_of(model, CONV2, l), conv3 = layer_of(model, CONV3, l);
    const Layer down = layer_of(model, DOWN, l), *last = model->config.wide ? &conv3 : &conv2;
    layer_forward(model, &conv1, NULL, n, training);
    layer_forward(model, &conv2, &conv1, n, training);
    if (last == &conv3) { layer_forward(model, &conv3, &conv2, n, training); }
    // what follows may take the place of what DropIT chooses from
    if (training) {
        drop_activations(model, {&a->x[l]}); // alone: its lists are as long as those of the other two
        drop_activations(model, {&a->a1[l], &a->a2[l]});
    }
    if (b.down) {
        if (!down.y->cached) { down.y->chunk = (char*)block_output(model, l); } // of the same size, and written last
        layer_forward(model, &down, NULL, n, training);
    }
    const floatX* residual = b.down ? output_at(down.y, 0) : (floatX*)activation_at(&a->x[l], 0, false);
    batchnorm_relu(block_output(model, l), (uint8_t*)a->bits[l].data, output_at(last->y, 0), &last->norm, residual,
                   b.down ? &down.norm : NULL, n, last->y->per_image);
}

// logits of n <= B images, which are there. training: with the batch's statistics, and DropIT chooses
void model_forward(Model* model, size_t n, bool training) {
    auto* a = &model->acts;
    const size_t E = a->pooled->per_image, pixels = block_of(model, model->L - 1).OH * block_of(model, model->L - 1).OW;
    const Layer stem = layer_of(model, STEM, 0);
    for (size_t l = 0; l < model->L; l++) { if (a->input[l].n > 0) { a->x[l].batch = a->input[l].data; } }
    floatX *x = (floatX*)activation_at(a->x, 0, false), *y0 = output_at(a->y0, 0);
    floatX* pooled = (floatX*)activation_at(a->pooled, 0, false);
    layer_forward(model, &stem, NULL, n, training);
    if (training) { drop_activations(model, {a->image}); }
    if (model->config.pools) {
        max_pool(x, (uint8_t*)a->argmax->data, y0, &stem.norm, n, (int)model->SH, (int)model->SW);
    } else { batchnorm_relu(x, NULL, y0, &stem.norm, NULL, NULL, n, a->y0->per_image); }
    for (size_t l = 0; l < model->L; l++) { block_forward(model, l, n, training); }
    average_pool(pooled, block_output(model, model->L - 1), n, pixels, E);
    linear_forward((floatX*)a->logits->data, pooled, model->params.fcw[0], model->params.fcb[0], NULL, n, E, model->V);
    if (training) { drop_activations(model, {a->pooled}); }
}

// Gradients of a convolution and its norm. dz: gradient of the norm's output, or of relu(norm) where
// relu and bits say so, of which the part that passes the ReLU is left. dinp, NULL: not wanted: gradient
// of the convolution's input; add: += it
void layer_backward(Model* model, const Layer* layer, const Layer* before, floatX* dz, int relu, const uint8_t* bits,
                    floatX* dinp, bool add) {
    const Conv* c = &layer->conv;
    Activation* inp = layer->inp;
    const size_t pixels = numel(c->OH, c->OW), all = model->B * pixels;
    batchnorm_backward_sums(model->sums, dz, output_at(layer->y, 0), &layer->norm, relu, bits, model->norm_partial, all,
                            pixels);
    for (size_t b0 = 0; b0 < model->B; b0 += layer->images) {
        const size_t nb = std::min(model->B - b0, layer->images);
        batchnorm_backward(model->dy, dz + b0 * layer->y->per_image, output_at(layer->y, b0), &layer->norm, model->sums,
                           nb * pixels, all);
        layer_input(layer, before, b0, nb, true);
        const floatX *kept = kept_input(model, inp, b0, nb), *exact = (floatX*)activation_at(inp, b0, false);
        float* exact_sum = exact_gradient(model, inp, kept, layer->dweight, numel(c->OC, c->K, c->K, c->C), b0, nb);
        if (exact_sum != NULL) { conv_backward_weight(exact_sum, model->dy, exact, c, nb, model->columns); }
        conv_backward_weight(layer->dweight, model->dy, kept, c, nb, model->columns);
        if (dinp == NULL) { continue; }
        conv_backward_input(dinp + b0 * inp->per_image, model->dy, layer->weight, add, c, nb, model->columns);
    }
}

// Gradients of block l. model->d[at] is that of its output; returns where that of its input is then, 0 or 1
int block_backward(Model* model, size_t l, int at) {
    const Layer conv1 = layer_of(model, CONV1, l), conv2 = layer_of(model, CONV2, l), conv3 = layer_of(model, CONV3, l);
    const Layer down = layer_of(model, DOWN, l);
    const bool wide = model->config.wide, has_down = block_of(model, l).down;
    const uint8_t* bits = (uint8_t*)model->acts.bits[l].data;
    floatX *d = model->d[at], *other = model->d[1 - at];
    // Both conv1 and the other way through the block add to the gradient of its input. Without a
    // downsampling that is d itself, and other takes the gradient of a1. With one it is other, and d is
    // then free for a1's
    floatX *dx = has_down ? other : d, *da1 = has_down ? d : other;
    int relu = RELU_BITS;
    if (has_down) {
        if (!down.y->cached) { down.y->chunk = (wide ? conv3 : conv2).y->chunk; } // of the same size
        output_again(model, &down, NULL);
        layer_backward(model, &down, NULL, d, RELU_BITS, bits, dx, false);
        relu = NO_RELU; // d is masked
    }
    output_again(model, &conv1, NULL);
    output_again(model, &conv2, &conv1);
    if (wide) {
        output_again(model, &conv3, &conv2);
        layer_backward(model, &conv3, &conv2, d, relu, bits, model->da2, false);
        layer_backward(model, &conv2, &conv1, model->da2, RELU_OF_NORM, NULL, da1, false);
    } else { // da1 may be d: a chunk of d has been read when that of da1, of the same size, is written
        layer_backward(model, &conv2, &conv1, d, relu, bits, da1, false);
    }
    layer_backward(model, &conv1, NULL, da1, RELU_OF_NORM, NULL, dx, true);
    return has_down ? 1 - at : at;
}

// grads += gradients of the loss of a whole batch, from that of the logits
void model_backward(Model* model) {
    const size_t B = model->B, V = model->V, L = model->L;
    auto* a = &model->acts;
    const size_t E = a->pooled->per_image, pixels = block_of(model, L - 1).OH * block_of(model, L - 1).OW;
    const Layer stem = layer_of(model, STEM, 0);
    const floatX* dlogits = (const floatX*)a->logits->data;
    for (size_t b0 = 0; b0 < B; b0 += stem.images) {
        const size_t nb = std::min(B - b0, stem.images);
        weight_gradient(model, a->pooled, model->grads.fcw[0], model->grads.fcb[0], dlogits + b0 * V, b0, nb, 1, E, V);
    }
    linear_backward_input(model->dpooled, dlogits, model->params.fcw[0], B, E, V);
    average_pool_backward(model->d[0], model->dpooled, B, pixels, E);
    int at = 0;
    for (int l = (int)L - 1; l >= 0; l--) {
        at = block_backward(model, l, at);
        gradients_done(model, l);
    }
    floatX* dz = model->d[at];
    if (model->config.pools) {
        dz = model->d[1 - at];
        max_pool_backward(dz, model->d[at], (uint8_t*)a->argmax->data, B, (int)model->SH, (int)model->SW, stem.conv.OC);
    }
    layer_backward(model, &stem, NULL, dz, RELU_OF_NORM, NULL, NULL, false);
}

void model_input(Model* model, const Batch* batch) {
    floatX* image = (floatX*)activation_at(model->acts.image, 0, false);
    normalise_pixels(image, batch->images, batch->flips, batch->stats, batch->augment, batch->n, (int)model->H,
                     (int)model->W, (int)model->CH);
    const size_t bytes = batch->n * sizeof(int);
    cudaCheck(cudaMemcpyAsync(model->labels, batch->labels, bytes, cudaMemcpyDeviceToDevice, main_stream));
    batch_used(batch);
}

#define CLASSIFIER_METRICS {{"loss", 1.0, 6}, {"top1", 100.0, 2}, {"top5", 100.0, 2}, {NULL, 0.0, 0}}
const Metric model_train_metrics[] = CLASSIFIER_METRICS, model_eval_metrics[] = CLASSIFIER_METRICS;
const int model_best_metric = 1; // top1
void model_scores(const Model* model, size_t n, double* scores) { mean_scores(model, n, scores); }

void model_train(Model* model, const Batch* batch, float scale) {
    model_input(model, batch);
    model_forward(model, batch->n, true);
    classifier_loss(model, (floatX*)model->acts.logits->data, model->labels, batch, scale);
    model_backward(model);
}

floatX* model_predict(Model* model, const Batch* batch) {
    model_input(model, batch);
    model_forward(model, batch->n, false);
    return (floatX*)model->acts.logits->data;
}

void model_evaluate(Model* model, const Batch* batch) {
    classifier_loss(model, model_predict(model, batch), model->labels, batch, 1.0f);
}

// ----------------------------------------------------------------------------
// the model's memory, and what its flags say

// names in the table have the block's stage and its number there
static void plan_tables(Model* model) {
    const ResnetConfig* c = &model->config;
    const size_t B = model->B, V = model->V, L = model->L, CH = model->CH, F = c->width;
    const size_t E = block_of(model, L - 1).out, S0 = model->SH * model->SW, P0 = c->pools ? model->PH * model->PW : 0;
    const size_t K0 = c->pools ? 7 : 3, K1 = c->wide ? 1 : 3;
    const bool wide = c->wide;
    // -r 3 computes blocks again from their inputs, which are then whole; with DropIT x is made of them by masking
    const bool dense = keeps_only_inputs(model) && drops(model);
    const int exact = dense ? 3 : NEVER;
    const double z3 = model->own.zero_init ? 0.0 : 1.0, z2 = wide ? 1.0 : z3;
#define X(field, name, copies, shape, kind, init) \
    for (size_t l = 0; l < (copies); l++) { \
        const Block b = block_of(model, l); \
        const int before = model->parameters.n; \
        char text[96]; \
        const char* format = name; /* a variable: not all names have both numbers */ \
        snprintf(text, sizeof(text), format, (int)b.stage, (int)b.index); \
        add_parameter(model, &model->params.field[l], &model->grads.field[l], &model->buffers.field[l], text, (int)l, \
                      (int)(copies), kind, init, IN_PARENTHESES shape); \
        for (Parameter* p = model->parameters.of + before; p < model->parameters.end(); p++) { \
            p->channels_last = p->dims == 4; \
        } \
    }
    PARAMETERS(X)
#undef X
    // What DropIT chooses from is unpacked, and recomputed, in chunks, one at a time: they share memory.
    // Batch norm wants its input whole
    model->chunk_home = NULL;
    char** home = NULL;
#define X(field, bits, copies, shape, level, cache) \
    for (size_t l = 0; l < (copies); l++) { \
        const Block b = block_of(model, l); \
        const size_t H1 = wide ? b.H * b.W : b.OH * b.OW; \
        (void)H1; \
        const bool lodges = strcmp(#field, "yd") == 0; /* recomputed, it has no place of its own */ \
        model->chunk_images = lodges ? 0 : cache == KEEP ? B : chunk_of(model, (copies) == 1 ? -1 : (int)l); \
        Activation* a = &model->acts.field[l]; \
        model->chunk_home = cache == KEEP ? NULL : home; \
        plan_activation(model, a, #field, #copies " x " #shape, (int)l, (int)(copies), bits, numel shape, level, \
                        cache); \
        if (home == NULL && cache != KEEP && a->n > 0 && (a->dropped || !a->cached)) { home = &a->chunk; } \
    }
    ACTIVATIONS(X)
#undef X
    model->chunk_images = chunk_of(model, 0); // for the line that a run begins with
}

// elements that model->d[0] and [1] have over the batch: block_backward says which takes what
static void plan_turns(const Model* model, size_t turns[2]) {
    int at = 0;
    turns[0] = turns[1] = 0;
    const auto take = [&](int i, size_t per_image) { turns[i] = std::max(turns[i], model->B * per_image); };
    for (int l = (int)model->L - 1; l >= 0; l--) {
        const Block b = block_of(model, l);
        const size_t a1 = model->acts.a1[l].per_image;
        take(at, numel(b.OH, b.OW, b.out));
        take(b.down ? at : 1 - at, a1);
        if (b.down) { take(1 - at, numel(b.H, b.W, b.in)); }
        at = b.down ? 1 - at : at;
    }
    take(model->config.pools ? 1 - at : at, model->acts.y0->per_image);
}

void model_plan(Model* model) {
    Plan* plan = &model->plan;
    const size_t B = model->B, V = model->V, L = model->L;
    plan_tables(model);
    auto* a = &model->acts;
    size_t channels = 0, norm = 0, dy = 0, da2 = 0, columns = 0, turns[2];
    for (size_t l = 0; l < L; l++) {
        mask_unless_read(model, &a->a1[l], a->logits); // logits are always cached: output_again masks nothing, and
        mask_unless_read(model, &a->a2[l], a->logits); // layer_input makes the tensor again for the weight gradient
        plan_selection(model, {&a->x[l]});
        plan_selection(model, {&a->a1[l], &a->a2[l]});
        da2 = std::max(da2, a->a2[l].n);
        for (int which = l == 0 ? STEM : CONV1; which < NUM_LAYERS; which++) {
            const Conv c = conv_at(model, which, l);
            if (c.C == 0) { continue; }
            const size_t images = chunk_of(model, which == STEM ? -1 : (int)l), pixels = numel(c.OH, c.OW), OC = c.OC;
            plan_add(plan, CACHED, "batch statistics", "", "(2, channels)", &model->stats[which][l],
                     2 * OC * sizeof(float), 2 * OC * sizeof(float));
            channels = std::max(channels, OC);
            norm = std::max(norm, batchnorm_scratch(B * pixels, OC));
            dy = std::max(dy, numel(images, pixels, OC));
            columns = std::max(columns, conv_columns(&c, images, model->chunk_bytes / sizeof(floatX)));
        }
    }
    plan_selection(model, {a->image});
    plan_selection(model, {a->pooled});
    plan_turns(model, turns);
    // The gradients take the place of what DropIT chooses from in the forward pass, the larger that of
    // the larger; but under -stats that is still read
    const bool shared = a->x->dropped && !reports_stats(model), second = turns[1] > turns[0];
    floatX **x = shared ? (floatX**)&a->x->batch : NULL, **a1 = shared ? (floatX**)&a->a1->batch : NULL;
    const size_t d0 = turns[0] * sizeof(floatX), d1 = turns[1] * sizeof(floatX);
    plan_add(plan, SCRATCH, "d0", "", "gradients in turns", &model->d[0], d0, 0, second ? a1 : x);
    plan_add(plan, SCRATCH, "d1", "", "gradients in turns", &model->d[1], d1, 0, second ? x : a1);
    plan_add(plan, SCRATCH, "da2", "", "(B, OH, OW, width)", &model->da2, da2 * sizeof(floatX), 0,
             shared && da2 > 0 ? (floatX**)&a->a2->batch : NULL);
    plan_add(plan, SCRATCH, "labels", "", "(B)", &model->labels, B * sizeof(int));
    plan_add(plan, SCRATCH, "dy", "", "a chunk", &model->dy, dy * sizeof(floatX));
    plan_add(plan, SCRATCH, "columns", "", "unpacked rows", &model->columns.data, columns * sizeof(floatX));
    model->columns.n = columns;
    plan_add(plan, SCRATCH, "dpooled", "", "(B, E)", &model->dpooled, a->pooled->n * sizeof(floatX));
    plan_add(plan, SCRATCH, "norm sums", "", "(2, channels)", &model->sums, 2 * channels * sizeof(float));
    plan_add(plan, SCRATCH, "batch norm partials", "", "fp32", &model->norm_partial, norm * sizeof(float), 0,
             columns > 0 ? (float**)&model->columns.data : NULL); // before or after what columns are used for
    plan_add(plan, SCRATCH, "sum partials", "", "fp32", &model->partial, column_sum_scratch(B, V) * sizeof(float));
    plan_images(model, NULL);
}

void model_options(Model* model) {
    auto* s = &model->own;
    RESNET_SETTINGS(OPTION)
    image_options(model);
}

// what the bundled data want; a published model is trained by a recipe
const char* model_defaults(const char*) {
    return "-i data/fashion_train.bin -j data/fashion_val.bin -b 64 -e 6 -opt sgd -l 0.1 -wd 5e-4 -wd_all 1"
           " -warmup 50 -r 1 -chunk 14";
}
const char* const model_recipes[][2] = {{NULL, NULL}};

// the blocks of each stage from text as 2,2,2,2
static void parse_layers(int layers[4], const char* text) {
    const char* at = text;
    int stages = 0;
    memset(layers, 0, 4 * sizeof(int));
    for (bool more = true; more; stages++) {
        char* rest;
        const long blocks = strtol(at, &rest, 10);
        more = *rest == ',';
        require(stages < 4 && rest != at && (more || *rest == 0) && blocks > 0 && blocks <= MAX_COPIES,
                "-layers wants 1 to 4 numbers of blocks, each 1 to %d, as 2,2,2,2; got '%s'", MAX_COPIES, text);
        layers[stages] = (int)blocks;
        at = rest + 1;
    }
}

// blocks, and the sides behind the stem
void resnet_shape(Model* model) {
    const ResnetConfig* c = &model->config;
    model->L = c->layers[0] + c->layers[1] + c->layers[2] + c->layers[3];
    require(model->L <= MAX_COPIES, "the model has %zu blocks, this program was built for %d; raise MAX_COPIES",
            model->L, MAX_COPIES);
    model->SH = c->pools ? halved(model->H) : model->H;
    model->SW = c->pools ? halved(model->W) : model->W;
    model->PH = c->pools ? halved(model->SH) : model->SH;
    model->PW = c->pools ? halved(model->SW) : model->SW;
}

void model_configure(Model* model) {
    ResnetConfig* c = &model->config;
    const auto* own = &model->own;
    for (const auto& p : resnet_presets) { if (strcmp(model->name, p.name) == 0) { *c = p.config; } }
    require(c->width > 0, "-m %s is not a model; choose one of " MODEL_NAMES, model->name);
    const bool bottleneck = strcmp(own->block, "bottleneck") == 0, imagenet = strcmp(own->stem, "imagenet") == 0;
    require(own->block[0] == 0 || bottleneck || strcmp(own->block, "basic") == 0,
            "-block %s is not a block; choose basic or bottleneck", own->block);
    require(own->stem[0] == 0 || imagenet || strcmp(own->stem, "cifar") == 0,
            "-stem %s is not a stem; choose imagenet or cifar", own->stem);
    if (own->block[0] != 0) { c->wide = bottleneck; }
    if (own->stem[0] != 0) { c->pools = imagenet; }
    if (own->layers[0] != 0) { parse_layers(c->layers, own->layers); }
    if (own->width > 0) { c->width = own->width; }
    if (model->H == 0) { model->H = model->W = c->image_size; }
    if (model->CH == 0) { model->CH = c->image_channels; }
    if (model->V == 0) { model->V = c->num_classes; }
    resnet_shape(model);
    const Block last = block_of(model, model->L - 1);
    require(model->B * last.OH * last.OW > 1, "batch norm has one value a channel in the last block, and no variance; "
            "use a larger batch (-b) or larger images (-size)");
}

// ---- shared: training ------------------------------------------------------
// Behind main() for the functions below: checkpoints, files, flags
int checkpoint_newest(const char* directory, int below); // step with a DONE file; -1: none
int checkpoint_find(const char* directory);              // the newest whose files are whole; -1: none
void write_checkpoint(const Model* model, int step, const List<StMetadata>& metadata);
void read_checkpoint(Model* model, int step, List<StMetadata>* metadata); // refuses other flags
void write_best(const Model* model, const List<StMetadata>& metadata, const StMetadata* best);
void log_cut(FILE* log, int step); // cuts main.log behind the lines of this step
#define set_value(entry, ...) snprintf((entry)->value, sizeof((entry)->value), __VA_ARGS__)
Safetensors* safetensors_open(const char* path);
void safetensors_close(Safetensors* st);
void path_in(char path[PATH_MAX], const char* directory, const char* name);
void parse_options(Model* model, int argc, char** argv);
void settings_derive(Model* model); // checks what fits together
void options_metadata(const Model* model, List<StMetadata>* metadata); // flags that are not neutral
void report_plan(Model* model);
double seconds(void);
void write_sheet(Model* model, Loader* loader, size_t number);
void predict(Model* model, Loader* loader);

// The flags of all trainers; a model adds its own. A recipe stands for some of them; -h prints all
#define SETTINGS(X) \
    X(s, recipe, "-recipe", NULL, 0, 0, ANY, "published settings as defaults, listed below") \
    X(s, model, "-m", DEFAULT_MODEL, 0, 0, SAME, "model: " MODEL_NAMES) \
    X(s, size, "-size", "0", 0, 0, SAME, "image size, N or HxW; 0: the model's") \
    X(i, chans, "-chans", 0, 0, 4, SAME, "image channels, 0: the model's") \
    X(i, classes, "-classes", 0, 0, 1 << 24, SAME, "classes, 0: the model's") \
    X(s, train_path, "-i", NULL, 0, 0, ANY, "training images: a shard, or the prefix of a set") \
    X(s, val_path, "-j", NULL, 0, 0, ANY, "validation images: a shard or a prefix") \
    X(s, output, "-o", NULL, 0, 0, ANY, "output directory, for main.log and checkpoints") \
    X(i, B, "-b", 32, 1, 1 << 20, SAME, "batch size, of each rank") \
    X(i, accumulation, "-a", 1, 1, 1 << 20, SAME, "gradient accumulation: batches a step") \
    X(i, epochs, "-e", 1, 1, 1 << 20, SAME, "epochs") \
    X(i, max_steps, "-x", 0, 0, 2e9, ANY, "stop after this many steps, 0: after the epochs") \
    X(f, lr, "-l", 1e-3, 0, 1e6, SAME, "learning rate") \
    X(s, optimizer, "-opt", "sgd", 0, 0, SAME, "optimizer: adamw, sgd") \
    X(f, weight_decay, "-wd", 0.0, 0, 1e6, SAME, "weight decay") \
    X(i, decay_all, "-wd_all", 0, 0, 1, SAME, "1: weight decay also on norms and biases") \
    X(f, beta1, "-beta1", 0.9, 0, 0.999999, SAME, "AdamW: decay of the first moment") \
    X(f, beta2, "-beta2", 0.999, 0, 0.9999999, SAME, "AdamW: decay of the second moment") \
    X(f, momentum, "-momentum", 0.9, 0, 0.999999, SAME, "SGD: momentum") \
    X(i, nesterov, "-nesterov", 0, 0, 1, SAME, "SGD: 1: Nesterov's momentum") \
    X(i, unscale_lr, "-unscale_lr", 1, 0, 1, SAME, "0: -l is for 512 images a step, and scales") \
    X(s, schedule, "-schedule", "step", 0, 0, SAME, "learning rate by step, or by epoch as timm's scripts") \
    X(i, warmup, "-warmup", 0, 0, 2e9, SAME, "steps of linear warm-up before the cosine") \
    X(i, warmup_epochs, "-warmup_epochs", 0, 0, 1 << 20, SAME, "the same in epochs; above 0 they replace -warmup") \
    X(f, warmup_lr, "-warmup_lr", 0.0, 0, 1e6, SAME, "learning rate at which the warm-up begins") \
    X(f, min_lr, "-min_lr", 0.0, 0, 1e6, SAME, "learning rate at which the cosine ends") \
    X(i, cooldown, "-cooldown", 0, 0, 1 << 20, SAME, "epochs at -min_lr after the -e epochs") \
    X(f, ema, "-ema", 0.0, 0, 0.9999999, SAME, "decay of the weights' moving average; 0: none") \
    X(f, clip, "-clip", 0.0, 0, 1e30, SAME, "largest norm of the gradient, 0: no clipping") \
    X(f, gamma, "-g", 0.0, 0, 0.99999999, SAME, "DropIT: fraction of each cached input to drop") \
    X(s, strategy, "-s", "mink", 0, 0, SAME, "DropIT: mink, fastmink, random") \
    X(i, drop_all, "-g_all", 0, 0, 1, SAME, "DropIT: 1: also in " HELP_DROP_ALL) \
    X(i, stats, "-stats", 0, 0, 2e9, ANY, "DropIT: report what is kept every N steps, 0: never") \
    X(i, recompute, "-r", 0, 0, NEVER - 1, ANY, "backward pass recomputes: " HELP_RECOMPUTE) \
    X(i, chunk, "-chunk", 32, 1, 1 << 20, SAME, "MiB of the widest tensor in a chunk of images") \
    X(s, weights, "-w", NULL, 0, 0, ANY, "initial weights: " HELP_WEIGHTS " or a checkpoint's") \
    X(s, predict, "-predict", NULL, 0, 0, ANY, "print predictions for this shard and exit") \
    X(s, sheet, "-sheet", NULL, 0, 0, ANY, "write the first batch (for data/sheet.py) and exit") \
    X(i, threads, "-threads", 2, 0, 64, ANY, "threads that read images ahead") \
    X(i, sharded, "-z", 0, 0, 1, ANY, "1: split the optimizer's states over ranks (ZeRO-1)") \
    X(i, save_every, "-n", 0, 0, 2e9, ANY, "write a checkpoint every N steps; 0: never") \
    X(i, keep, "-keep", 0, 0, 2e9, ANY, "keep the newest N checkpoints, 0: all") \
    X(i, resume, "-y", 0, 0, 1, ANY, "1: resume from the newest checkpoint in -o") \
    X(i, evaluate_every, "-v", 1, 0, 1 << 20, ANY, "evaluate every N epochs; 0: only at the end") \
    X(i, evaluate_only, "-eval", 0, 0, 1, ANY, "1: evaluate only") \
    X(i, seed, "-seed", 1, 0, 2e9, SAME, "seed of all random choices") \
    X(s, plan, "-plan", "0", 0, 0, ANY, "1: print the memory plan; 24GiB: and the largest batch")
struct Settings { SETTINGS(FIELD) };

// A run of the program: what it reads, where it begins, what it writes
enum { TRAIN, EVALUATE, PREDICT, SHEET };
enum { FORMAT, STEP, RUN, DATA, RANKS, PRECISION, BEST_STEP, BEST }; // of the metadata
typedef struct {
    int task;
    Loader *train, *val;
    Safetensors* weights;            // -w
    size_t step_images, epoch_steps; // images of a step over all ranks, steps of an epoch
    int first_step;                  // after the checkpoint; 0: there is none
    // What a resumed run must share with the one that wrote the checkpoint; flags come last. RUN: checksum
    // of the weights it began with: the same command writes the same files. BEST: best score; -1: none
    List<StMetadata> metadata;
    OptimizerConfig optimizer;
    Schedule schedule;
    size_t loaded;                   // batches brought to the device
    double start, timed, printed;    // when the step began; ms of steps; when one was printed
    FILE* log;
    double scores[MAX_METRICS];      // of the last evaluation
} Run;

// the scores of a whole set; ranks take turns with its batches
void evaluate(Model* model, Loader* loader, double* scores) {
    const size_t first = loader_first(loader), last = first + loader_batches(loader);
    cudaCheck(cudaMemsetAsync(model->result, 0, sizeof(StepResult), main_stream));
    for (size_t number = first; number < last; number++) {
        loader_batch(loader, number);
        model_evaluate(model, loader_take(loader));
    }
    model_scores(model, loader_images(loader), scores);
}

// A step of -a batches: forward pass, loss, backward pass, update. evaluates: an evaluation follows,
// which needs the place of the next batch on the device
void training_step(Run* run, Model* model, int step, double rate, bool evaluates) {
    const int accumulation = model->s->accumulation;
    zero_gradients(model);
    for (int micro = 0; micro < accumulation; micro++) {
        const size_t number = (size_t)step * accumulation + micro;
        if (run->loaded == number) { loader_batch(run->train, run->loaded++); }
        model->last_pass = micro + 1 == accumulation;
        model_train(model, loader_take(run->train), 1.0f / (float)run->step_images);
        model->pass++;
        // the next batch is gathered and copied while the device computes
        if (micro + 1 < accumulation || !evaluates) { loader_batch(run->train, run->loaded++); }
    }
    gradients_done(model, -1);
    model_update(model, run->optimizer, rate, step + 1);
}

// name and value of each metric: for people or, with a prefix of the key (tr, e or none), for main.log
void print_metrics(FILE* out, const Metric* metric, const double* values, const char* prefix) {
    for (const Metric* m = metric; m->name != NULL; m++) {
        const char* loss = metric == model_train_metrics ? "l" : "tel";
        const char* key = strcmp(m->name, "loss") == 0 ? loss : m->name;
        if (prefix == NULL) { fprintf(out, " | %s %.*f", m->name, m->digits, values[m - metric]); }
        else { fprintf(out, " %s%s:%.9g", prefix, key, values[m - metric]); }
    }
}

// a line of the step in main.log, and on stdout: of each step where one takes long, else a few a second
void report_step(Run* run, const Model* model, const StepResult* r, int step, int steps, double rate) {
    const double now = seconds(), ms = 1e3 * (now - run->start), images = (double)run->step_images;
    const int done = step - run->first_step; // steps before this one: the first is not counted
    const Metric* m = model_train_metrics;
    double values[MAX_METRICS];
    for (int i = 0; m[i].name != NULL; i++) { values[i] = m[i].unit * (r->sums[i] / images); }
    run->start = now;
    run->timed += done > 0 ? ms : 0.0;
    if (run->log != NULL) {
        fprintf(run->log, "s:%d", step + 1);
        print_metrics(run->log, m, values, "tr");
        fprintf(run->log, " lr:%.9g norm:%.9g ms:%.3f img:%.1f\n", rate, r->norm, ms, 1e3 * images / ms);
    }
    if (done > 0 && step + 1 < steps && now - run->printed < 0.25) { return; }
    run->printed = now;
    printf("step %5d/%d", step + 1, steps);
    print_metrics(stdout, m, values, NULL);
    const int left = (int)(1e-3 * (done > 0 ? run->timed / done : ms) * (steps - 1 - step));
    const double flops = model_flops(model, run->step_images / num_ranks);
    printf(" | norm %7.4f | lr %.2e | %8.2f ms | %6.0f img/s | %.3g TFLOP/s | left %d:%02d\n", r->norm, rate,
           ms, 1e3 * images / ms, 1e-9 * flops / ms, left / 60, left % 60);
}

// of the weights, or of their moving average
void report_evaluation(const Run* run, const double* scores, bool averaged, int step) {
    printf("eval %s epoch %d", averaged ? "EMA" : "", (int)((step - 1) / run->epoch_steps) + 1);
    print_metrics(stdout, model_eval_metrics, scores, NULL);
    printf("\n");
    if (run->log == NULL) { return; }
    fprintf(run->log, "s:%d", step);
    print_metrics(run->log, model_eval_metrics, scores, averaged ? "e" : "");
    fprintf(run->log, "\n");
}

// Keeps the weights of the best evaluation so far. One that is not planned, but asked for by -x alone,
// may write the file, but leaves no trace in later checkpoints: they have the same bits as without -x
void save_best(Run* run, const Model* model, int step, bool planned) {
    StMetadata* m = run->metadata.of;
    const double score = run->scores[model_best_metric];
    if (model->s->save_every == 0 || score <= strtod(m[BEST].value, NULL)) { return; }
    const StMetadata before[2] = {m[BEST_STEP], m[BEST]};
    set_value(&m[STEP], "%d", step);
    set_value(&m[BEST_STEP], "%d", step);
    set_value(&m[BEST], "%.17g", score);
    write_best(model, run->metadata, &m[BEST]);
    if (!planned) { memcpy(&m[BEST_STEP], before, sizeof(before)); }
}

void evaluate_step(Run* run, Model* model, int step, bool planned) {
    evaluate(model, run->val, run->scores);
    report_evaluation(run, run->scores, false, step);
    save_best(run, model, step, planned);
    if (model->ema == NULL) { return; }
    ema_enter(model);
    double averaged[MAX_METRICS];
    evaluate(model, run->val, averaged);
    ema_leave(model);
    report_evaluation(run, averaged, true, step);
}

void train(Run* run, Model* model) {
    const Settings* s = model->s;
    const int scheduled = (int)((s->epochs + s->cooldown) * run->epoch_steps);
    const int steps = s->max_steps > 0 && s->max_steps < scheduled ? s->max_steps : scheduled;
    run->loaded = (size_t)run->first_step * s->accumulation;
    run->start = seconds();
    if (run->first_step >= steps) { evaluate(model, run->val, run->scores); }
    for (int step = run->first_step; step < steps; step++) {
        const size_t every = s->evaluate_every * run->epoch_steps;
        const bool last = step + 1 == steps; // of the schedule, or of -x
        const bool planned = step + 1 == scheduled || (every > 0 && (step + 1) % every == 0);
        const double rate = learning_rate_at(&run->schedule, step);
        model->stats_now = s->stats > 0 && step % s->stats == 0;
        training_step(run, model, step, rate, planned || last);
        const StepResult r = model_result(model);
        report_step(run, model, &r, step, steps, rate);
        if (!isfinite(r.sums[0]) || r.not_finite > 0) {
            fail("step %d: loss %g, and DropIT met %u values that are not finite; the first tensor that is not "
                 "is: %s. Lower the learning rate (-l) or clip (-clip)", step + 1, r.sums[0] / run->step_images,
                 r.not_finite, first_not_finite(model));
        }
        const bool saves = s->save_every > 0 && ((step + 1) % s->save_every == 0 || last);
        if (planned || last || saves) { share_buffers(model); }
        if (planned || last) { evaluate_step(run, model, step + 1, planned); }
        if (saves) {
            set_value(&run->metadata.of[STEP], "%d", step + 1);
            weights_agree(model);
            write_checkpoint(model, step + 1, run->metadata);
        }
        if (planned || last || saves) { run->start = seconds(); } // a step's time is its own
    }
    weights_agree(model);
}

// opens main.log, behind what the checkpoint knows of
FILE* log_open(const char* output, int resumed_step, const Plan* plan) {
    char path[PATH_MAX];
    require(mkdir(output, 0777) == 0 || errno == EEXIST, "cannot make the output directory %s: %m", output);
    path_in(path, output, "main.log");
    FILE* log = fopen(path, resumed_step > 0 ? "a+" : "w");
    require(log != NULL, "cannot write %s: %m", path);
    setvbuf(log, NULL, _IOLBF, BUFSIZ); // each line is there as soon as it is written
    if (resumed_step > 0) { log_cut(log, resumed_step); }
    else { fprintf(log, "s:0 cached:%zu total:%zu\n", plan->bytes[CACHED], plan_total(plan)); }
    return log;
}

// what the flags say of optimizer and schedule
void run_schedule(Run* run, const Model* model) {
    const Settings* s = model->s;
    run->optimizer = OptimizerConfig{model->adamw, s->lr, s->beta1, s->beta2, 1e-8, s->weight_decay,
                                     s->momentum, s->clip, s->nesterov == 1};
    const bool by_epochs = strcmp(s->schedule, "epoch") == 0;
    const int epoch_steps = (int)run->epoch_steps, unit = by_epochs ? 1 : epoch_steps;
    const int warmup = by_epochs || s->warmup_epochs > 0 ? s->warmup_epochs * unit : s->warmup;
    const double lr = s->unscale_lr ? s->lr : s->lr * run->step_images / 512.0;
    run->schedule = Schedule{by_epochs, lr, s->min_lr, s->warmup_lr, warmup, s->epochs * unit, epoch_steps};
}

// reads and checks all that the user gave; nothing is written yet
void run_open(Run* run, Model* model) {
    const Settings* s = model->s;
    const bool training = run->task == TRAIN || run->task == SHEET;
    device_open();
    if (s->weights != NULL) {
        run->weights = safetensors_open(s->weights);
        plan_model(model);
        check_parameters(model, run->weights);
    }
    if (training) { run->train = loader_new(s->train_path, model, true); }
    run->val = loader_new(s->predict != NULL ? s->predict : s->val_path, model, false);
    const size_t images = training ? loader_epoch(run->train) : 0;
    run->step_images = numel(s->B, num_ranks, s->accumulation);
    run->epoch_steps = images / run->step_images;
    require(!training || run->epoch_steps > 0, "%s has %zu images in an epoch, fewer than the %zu of one "
            "step (-b %d x %d ranks x -a %d)", s->train_path, images, run->step_images, s->B, num_ranks,
            s->accumulation);
    const bool fresh = run->task == TRAIN && s->output != NULL && !s->resume;
    require(!fresh || checkpoint_newest(s->output, INT_MAX) < 0, "%s holds checkpoints of another run; resume it "
            "with -y 1 or choose another -o", s->output);
    const int found = training && s->resume ? checkpoint_find(s->output) : -1;
    ranks_agree((uint32_t)found, "newest checkpoints");
    run->first_step = std::max(found, 0);
    const StMetadata first[] = {{"format", "pt"}, {"step", ""}, {"run", ""}, {"data", ""}, {"ranks", ""},
                                {"precision", PRECISION_NAME}, {"best_step", ""}, {"", ""}};
    for (const StMetadata& entry : first) { run->metadata.push(entry); }
    StMetadata* m = run->metadata.of;
    snprintf(m[BEST].key, sizeof(m->key), "best_%s", model_eval_metrics[model_best_metric].name);
    set_value(&m[DATA], "%08x", training ? loader_crc(run->train) : 0);
    set_value(&m[RANKS], "%d", num_ranks);
    run_schedule(run, model);
}

// weights, of a checkpoint, of -w or fresh; says what is trained on what; opens loaders and log
void run_begin(Run* run, Model* model) {
    const Settings* s = model->s;
    StMetadata* m = run->metadata.of;
    if (run->first_step > 0) {
        set_value(&m[STEP], "%d", run->first_step);
        read_checkpoint(model, run->first_step, &run->metadata);
        model->pass = (unsigned)(run->first_step * s->accumulation);
    } else {
        if (run->weights != NULL) { load_parameters(model, run->weights, ""); }
        else { init_parameters(model); }
        if (s->save_every > 0) {
            set_value(&m[RUN], "%08x", fingerprint(model));
            set_value(&m[BEST_STEP], "0");
            set_value(&m[BEST], "-1");
        }
    }
    options_metadata(model, &run->metadata);
    if (run->weights != NULL) { safetensors_close(run->weights); }
    model_print(model);
    const Plan* plan = &model->plan;
    const char* strategy = s->gamma > 0.0 ? s->strategy : "off";
    printf("DropIT: gamma %g, %s; recompute level %d\nmemory:", s->gamma, strategy, s->recompute);
    for (int c = 0; c < NUM_CATEGORIES; c++) { printf(" %s %.1f MiB,", category_names[c], plan->bytes[c] / MiB); }
    printf(" total %.1f MiB; chunks of %zu images\n", plan_total(plan) / MiB, model->chunk_images);
    if (run->train != NULL) { loader_print(run->train, "training"); }
    loader_print(run->val, run->task == PREDICT ? "other" : "validation");
    if (run->train != NULL) { loader_start(run->train, model); }
    loader_start(run->val, model);
    if (run->task != TRAIN) { return; }
    if (s->output != NULL && rank == 0) { run->log = log_open(s->output, run->first_step, plan); }
    if (run->first_step > 0) { printf("resuming after step %d\n", run->first_step); }
    else if (s->resume) { printf("no checkpoint in %s: starting at the first step\n", s->output); }
}

void run_close(Run* run, Model* model) {
    if (run->log != NULL) { fclose(run->log); }
    loader_close(run->train);
    loader_close(run->val);
    model_free(model);
    ranks_close();
    free(run->metadata.of);
    if (run->task != TRAIN && run->task != EVALUATE) { return; }
    printf("final");
    for (const Metric* m = model_eval_metrics; m->name != NULL; m++) {
        printf(" %s=%.*f", m->name, m->digits, run->scores[m - model_eval_metrics]);
    }
    printf("\n");
}

#ifndef TESTING // a test includes this file and has its own main()
int main(int argc, char** argv) {
    Run run = {};
    Model* model = model_new();
    parse_options(model, argc, argv);
    settings_derive(model);
    const Settings* s = model->s;
    if (strcmp(s->plan, "0") != 0) {
        report_plan(model);
        return EXIT_SUCCESS;
    }
    run.task = s->predict != NULL ? PREDICT : s->sheet != NULL ? SHEET : s->evaluate_only ? EVALUATE : TRAIN;
    run_open(&run, model); // everything the user gave is read and checked before anything is written
    model_allocate(model);
    run_begin(&run, model);
    switch (run.task) {
    case TRAIN: train(&run, model); break;
    case EVALUATE: evaluate(model, run.val, run.scores); break;
    case PREDICT: predict(model, run.val); break;
    case SHEET: write_sheet(model, run.train, (size_t)run.first_step * s->accumulation); break;
    }
    run_close(&run, model);
    return EXIT_SUCCESS;
}
#endif
// ---- end shared: training --------------------------------------------------

// ----------------------------------------------------------------------------
// kernels of this model alone, each followed by its launcher

// x = pixel (h, w), channel c, of image b, normalised, or the noise of random erasing in its place. Of
// an image that flips[b] mirrors left to right, the row is read backwards
template <bool AUGMENT> __device__ inline float normalised_pixel(
        const uint8_t* images, const int* flips, const PixelStats& s, const BatchAugment& a, size_t b, int H, int W,
        int CH, int h, int w, int c) {
    const int from = flips[b] ? W - 1 - w : w;
    if (AUGMENT && a.erased != NULL) {
        const EraseBox box = a.erased[b]; // a pixel above or left of it has a difference that is huge when unsigned
        if ((unsigned)(h - box.top) < (unsigned)box.height && (unsigned)(w - box.left) < (unsigned)box.width) {
            return erase_noise(a.seed, a.epoch, a.place + b * a.place_step, h * W + w, c);
        }
    }
    return ((float)images[((b * H + h) * W + from) * CH + c] / 255.0f - s.mean[c]) / s.std[c];
}

// out[b, h, w, c] = x[b] = (image[b, h, w, c] / 255 - mean[c]) / std[c]. With AUGMENT, random erasing
// replaces a box of x, and image b is then mixed with image n-1-b:
//     mixup: lam * x[b] + (1 - lam) * x[n-1-b]      cutmix: x[n-1-b] in a box, x[b] outside
// out and images (B, H, W, CH) have n elements, an image less than 2^31. A thread makes one
template <bool AUGMENT> __global__ void normalise_pixels_kernel(
        floatX* out, const uint8_t* images, const int* flips, const __grid_constant__ PixelStats stats,
        const __grid_constant__ BatchAugment a, size_t n, int H, int W, int CH) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) { return; }
    const int per_image = H * W * CH;
    const size_t b = i / per_image;
    const int j = (int)(i - b * per_image), c = j % CH, w = j / CH % W, h = j / CH / W;
    float x = normalised_pixel<AUGMENT>(images, flips, stats, a, b, H, W, CH, h, w, c);
    const bool boxed = h >= a.top && h < a.bottom && w >= a.left && w < a.right;
    if (AUGMENT && a.lam < 1.0f && (!a.cut || boxed)) {
        const float other = normalised_pixel<AUGMENT>(images, flips, stats, a, a.n - 1 - b, H, W, CH, h, w, c);
        x = a.cut ? other : a.lam * x + (1.0f - a.lam) * other;
    }
    out[i] = (floatX)x;
}
void normalise_pixels(floatX* image, const uint8_t* images, const int* flips, PixelStats stats, BatchAugment a,
                      size_t n, int H, int W, int CH) {
    n *= numel(H, W, CH); // elements
    const size_t blocks = CEIL_DIV(n, (size_t)256);
    if (a.erased != NULL || a.lam < 1.0f) {
        LAUNCH_BLOCKS(normalise_pixels_kernel<true>, blocks, 256, main_stream,
                      image, images, flips, stats, a, n, H, W, CH);
    } else {
        LAUNCH_BLOCKS(normalise_pixels_kernel<false>, blocks, 256, main_stream,
                      image, images, flips, stats, a, n, H, W, CH);
    }
}

// ----------------------------------------------------------------------------
// convolution, batch norm, pools. Nothing here knows the model

// columns (rows, K, K, C): what each tap (kh, kw) of the output pixels `first` to `first + rows - 1`
// reads of inp; taps beyond the border read 0. In PyTorch: F.unfold, with another order of dimensions. A
// thread copies V channels of all taps of an output pixel, n / V of them for n = rows * C; V divides C.
// n and the pixels of a batch are below 2^32
template <int V> __global__ void im2col_kernel(
        floatX* columns, const floatX* inp, const __grid_constant__ Conv c, unsigned first, unsigned n) {
    const unsigned i = (blockIdx.x * blockDim.x + threadIdx.x) * V, row = i / c.C, channel = i - row * c.C;
    if (i >= n) { return; }
    const unsigned pixel = first + row, image_row = pixel / c.OW, b = image_row / c.OH;
    const int h0 = (int)(image_row - b * c.OH) * c.stride - c.pad;
    const int w0 = (int)(pixel - image_row * c.OW) * c.stride - c.pad;
    const floatX* image = inp + (size_t)b * c.H * c.W * c.C + channel;
    floatX* to = columns + (size_t)row * c.K * c.K * c.C + channel;
    for (int h = h0; h < h0 + c.K; h++) {
        for (int w = w0; w < w0 + c.K; w++, to += c.C) {
            Pack<V> x = {};
            const bool inside = (unsigned)h < (unsigned)c.H && (unsigned)w < (unsigned)c.W;
            if (inside) { x = *(const Pack<V>*)(image + ((size_t)h * c.W + w) * c.C); }
            *(Pack<V>*)to = x;
        }
    }
}

// The same for images of few channels: a thread copies one of the n elements of columns, so that
// neighbours write neighbours. n is below 2^32
__global__ void im2col_narrow_kernel(floatX* columns, const floatX* inp, const __grid_constant__ Conv c, unsigned first,
                                     unsigned n) {
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, run = c.K * c.C, line = i / run, row = line / c.K;
    if (i >= n) { return; }
    const unsigned pixel = first + row, image_row = pixel / c.OW, b = image_row / c.OH;
    const int h = (int)((image_row - b * c.OH) * c.stride + line - row * c.K) - c.pad, j = (int)(i - line * run);
    const int w0 = (int)(pixel - image_row * c.OW) * c.stride - c.pad, w = w0 + j / c.C; // j runs on over the row
    const bool inside = (unsigned)h < (unsigned)c.H && (unsigned)w < (unsigned)c.W;
    columns[i] = inside ? inp[(((ptrdiff_t)b * c.H + h) * c.W + w0) * c.C + j] : (floatX)0.0f;
}

// dinp (images, rows h0 to h1-1 of H, W, C) = sum over the taps of columns (images, output rows from oh0
// on, OW, K, K, C) that read each pixel, in the order of kh and kw; ohn output rows an image are there.
// The inverse of im2col; in PyTorch: F.fold. add: dinp += it. A thread has V channels of a pixel; V
// divides C; n elements
template <int V> __global__ void col2im_kernel(floatX* dinp, const floatX* columns, const __grid_constant__ Conv c,
                                               int h0, int h1, int oh0, int ohn, bool add, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const size_t pixel = i / c.C, image_row = pixel / c.W, b = image_row / (h1 - h0);
    const int channel = (int)(i - pixel * c.C), w = (int)(pixel - image_row * c.W);
    const int h = h0 + (int)(image_row - b * (h1 - h0));
    floatX* out = dinp + ((b * c.H + h) * c.W + w) * c.C + channel;
    float sum[V] = {0};
    if (add) { load<V>(sum, out); }
    for (int kh = (h + c.pad) % c.stride; kh < c.K && kh <= h + c.pad; kh += c.stride) {
        const int oh = (h + c.pad - kh) / c.stride;
        if (oh >= c.OH) { continue; }
        for (int kw = (w + c.pad) % c.stride; kw < c.K && kw <= w + c.pad; kw += c.stride) {
            const int ow = (w + c.pad - kw) / c.stride;
            if (ow >= c.OW) { continue; }
            float v[V];
            load<V>(v, columns + (((b * ohn + oh - oh0) * c.OW + ow) * c.K * c.K + kh * c.K + kw) * c.C + channel);
            for (int k = 0; k < V; k++) { sum[k] += v[k]; }
        }
    }
    store<V>(out, sum);
}

void matmul(void* D, const floatX* A, const floatX* B, const floatX* bias, const void* C, size_t m, size_t n, size_t k,
            bool transA, bool transB, bool fp32_out); // of "shared: linear"

// a kernel of one pixel reads the input as it lies
static bool conv_direct(const Conv* c) { return c->K == 1 && c->stride == 1 && c->pad == 0; }
static size_t conv_taps(const Conv* c) { return numel(c->K, c->K, c->C); } // a row of columns

size_t conv_columns(const Conv* c, size_t images, size_t most) {
    if (conv_direct(c)) { return 0; }
    const size_t line = c->OW * conv_taps(c), image = c->OH * line; // of a row of output pixels, of an image
    const size_t least = std::min(CEIL_DIV(c->K, c->stride) * line, image); // what a row of input pixels is read by
    return std::max(least, std::min({images * image, most, (size_t)1 << 31})); // kernels count in 32 bits
}

// columns = what `rows` output pixels, from pixel `first` on, read of inp
static void im2col(floatX* columns, const floatX* inp, const Conv* c, size_t first, size_t rows) {
    const size_t n = rows * c->C, all = rows * conv_taps(c);
    if (c->C >= VEC) {
        LAUNCH(im2col_kernel, vectorizable(c->C, columns, inp), n, 128, columns, inp, *c, first, n);
    } else {
        const size_t blocks = CEIL_DIV(all, (size_t)256);
        LAUNCH_BLOCKS(im2col_narrow_kernel, blocks, 256, main_stream, columns, inp, *c, first, all);
    }
}

// out = columns (rows, K*K*C) @ weight^T + bias
static void conv_product(floatX* out, const floatX* columns, const floatX* weight, const floatX* bias, const Conv* c,
                         size_t rows) {
    if (bias != NULL) { linear_forward(out, columns, weight, bias, NULL, rows, conv_taps(c), c->OC); }
    else { matmul(out, weight, columns, NULL, NULL, c->OC, rows, conv_taps(c), true, false, false); }
}

void conv_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, const Conv* c,
                  size_t images, Columns columns) {
    const size_t rows = images * c->OH * c->OW, fit = conv_direct(c) ? rows : columns.n / conv_taps(c);
    if (conv_direct(c)) { conv_product(out, inp, weight, bias, c, rows); return; }
    for (size_t r = 0; r < rows; r += fit) {
        const size_t now = std::min(fit, rows - r);
        im2col(columns.data, inp, c, r, now);
        conv_product(out + r * c->OC, columns.data, weight, bias, c, now);
    }
}

void conv_backward_weight(float* dweight, const floatX* dout, const floatX* inp, const Conv* c, size_t images,
                          Columns columns) {
    const size_t rows = images * c->OH * c->OW, taps = conv_taps(c), fit = conv_direct(c) ? rows : columns.n / taps;
    if (conv_direct(c)) { linear_backward_weight(dweight, dout, inp, rows, taps, c->OC); return; }
    for (size_t r = 0; r < rows; r += fit) {
        const size_t now = std::min(fit, rows - r);
        im2col(columns.data, inp, c, r, now);
        linear_backward_weight(dweight, dout + r * c->OC, columns.data, now, taps, c->OC);
    }
}

// rows h0 to h1-1 of the gradient of `images` images, from the output rows oh0 to oh1-1 that read them
static void conv_input_rows(floatX* dinp, const floatX* dout, const floatX* weight, bool add, const Conv* c,
                            size_t images, int h0, int h1, int oh0, int oh1, floatX* columns) {
    const size_t n = images * (h1 - h0) * c->W * c->C, rows = images * (oh1 - oh0) * c->OW;
    dout += (size_t)oh0 * c->OW * c->OC;
    if (rows > 0) { linear_backward_input(columns, dout, weight, rows, conv_taps(c), c->OC); }
    LAUNCH(col2im_kernel, vectorizable(c->C, dinp, columns), n, 256, dinp, columns, *c, h0, h1, oh0, oh1 - oh0, add, n);
}

// The gradients of columns are dout @ weight; each pixel gathers those of the taps that read it. As many
// whole images at once as fit into columns or, where one does not, as many rows of input pixels whose
// output rows fit
void conv_backward_input(floatX* dinp, const floatX* dout, const floatX* weight, bool add, const Conv* c,
                         size_t images, Columns columns) {
    const size_t inp = numel(c->H, c->W, c->C), out = numel(c->OH, c->OW, c->OC);
    if (conv_direct(c)) {
        matmul(dinp, weight, dout, NULL, add ? dinp : NULL, c->C, images * c->H * c->W, c->OC, false, false, false);
        return;
    }
    const int fit = (int)std::min(columns.n / (c->OW * conv_taps(c)), images * c->OH); // output rows
    const size_t whole = fit / c->OH;                                                  // images
    for (size_t b = 0; b < images && whole > 0; b += whole) {
        conv_input_rows(dinp + b * inp, dout + b * out, weight, add, c, std::min(whole, images - b), 0, c->H, 0, c->OH,
                        columns.data);
    }
    for (size_t b = 0; b < images && whole == 0; b++) {
        for (int h0 = 0, h1; h0 < c->H; h0 = h1) {
            const int oh0 = std::min(std::max(0, (h0 + c->pad - c->K + c->stride) / c->stride), c->OH);
            int oh1 = oh0;
            for (h1 = h0; h1 < c->H; h1++) { // the output rows from oh0 on that read row h1 end at `end`
                const int end = std::min((h1 + c->pad) / c->stride + 1, c->OH);
                if (end - oh0 > fit) { break; }
                oh1 = std::max(oh1, end);
            }
            conv_input_rows(dinp + b * inp, dout + b * out, weight, add, c, 1, h0, h1, oh0, oh1, columns.data);
        }
    }
}

// Statistics over rows go in steps of SLAB_ROWS: a slab of rows, then as many slabs, then what is left
#define NORM_EPS 1e-5f
#define NORM_MOMENTUM 0.1f
size_t batchnorm_scratch(size_t rows, size_t C) {
    const size_t slabs = CEIL_DIV(rows, (size_t)SLAB_ROWS);
    return 2 * C * (slabs + CEIL_DIV(slabs, (size_t)SLAB_ROWS));
}

// partial (slabs, 2, C) = mean, and sum of squared deviations from it, of the SLAB_ROWS rows of a slab
// of y (rows, C). A thread has V columns of a slab; V divides C. It adds up deviations from the first
// row, which are of the size of the deviation itself: no digits are lost where the mean is large
template <int V> __global__ void moments_kernel(float* partial, const floatX* y, size_t rows, int C) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t packs = C / V, slab = i / packs, column = i % packs * V, begin = slab * SLAB_ROWS;
    if (begin >= rows) { return; }
    const size_t end = min(begin + SLAB_ROWS, rows);
    const float n = (float)(end - begin);
    float first[V], sum[V] = {0}, squares[V] = {0};
    load<V>(first, y + begin * C + column);
    for (size_t r = begin + 1; r < end; r++) {
        float v[V];
        load<V>(v, y + r * C + column);
        for (int j = 0; j < V; j++) {
            v[j] -= first[j];
            sum[j] += v[j];
            squares[j] += v[j] * v[j];
        }
    }
    for (int j = 0; j < V; j++) {
        squares[j] = fmaxf(squares[j] - sum[j] * (sum[j] / n), 0.0f);
        first[j] += sum[j] / n;
    }
    store<V>(partial + 2 * slab * C + column, first);
    store<V>(partial + (2 * slab + 1) * C + column, squares);
}

// Mean (x) and sum of squared deviations (y) of the union of the sets begin to end-1 of channel c, set i
// being of rows i*span to (i+1)*span - 1 of `rows` (Chan, Golub and LeVeque 1983)
__device__ inline float2 join_moments(const float* partial, size_t begin, size_t end, size_t span, size_t rows, int c,
                                      int C) {
    const float first = partial[2 * begin * C + c];
    float n = 0.0f, sum = 0.0f, squares = 0.0f;
#pragma unroll 8
    for (size_t i = begin; i < end; i++) {
        const float ni = (float)min(span, rows - i * span), apart = partial[2 * i * C + c] - first;
        n += ni;
        sum += ni * apart;
        squares += partial[(2 * i + 1) * C + c] + ni * apart * apart;
    }
    return make_float2(first + sum / n, fmaxf(squares - sum * (sum / n), 0.0f));
}

// joined (groups, 2, C): of SLAB_ROWS slabs each. A thread has a channel of a group
__global__ void moments_join_kernel(float* joined, const float* partial, size_t slabs, size_t rows, int C) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, group = i / C;
    const int c = (int)(i - group * C);
    if (group * SLAB_ROWS >= slabs) { return; }
    const size_t begin = group * SLAB_ROWS, end = min(begin + SLAB_ROWS, slabs);
    const float2 m = join_moments(partial, begin, end, SLAB_ROWS, rows, c, C);
    joined[2 * group * C + c] = m.x;
    joined[(2 * group + 1) * C + c] = m.y;
}

// mean and rstd of all rows. The running mean moves towards the mean, the running variance towards the
// unbiased variance. A thread has a channel
__global__ void moments_finish_kernel(const __grid_constant__ BatchNorm norm, const float* joined, size_t groups,
                                      size_t rows) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= norm.C) { return; }
    const float2 m = join_moments(joined, 0, groups, (size_t)SLAB_ROWS * SLAB_ROWS, rows, c, norm.C);
    norm.mean[c] = m.x;
    norm.rstd[c] = 1.0f / sqrtf(m.y / (float)rows + NORM_EPS);
    norm.running_mean[c] = (1.0f - NORM_MOMENTUM) * norm.running_mean[c] + NORM_MOMENTUM * m.x;
    norm.running_var[c] = (1.0f - NORM_MOMENTUM) * norm.running_var[c] + NORM_MOMENTUM * (m.y / (float)(rows - 1));
}
void batchnorm_statistics(const BatchNorm* norm, const floatX* y, float* partial, size_t rows) {
    const int C = norm->C;
    const size_t slabs = CEIL_DIV(rows, (size_t)SLAB_ROWS), groups = CEIL_DIV(slabs, (size_t)SLAB_ROWS);
    float* joined = partial + 2 * slabs * C;
    LAUNCH(moments_kernel, vectorizable(C, y), slabs * C, 64, partial, y, rows, C);
    const size_t blocks = CEIL_DIV(groups * C, (size_t)64);
    LAUNCH_BLOCKS(moments_join_kernel, blocks, 64, main_stream, joined, partial, slabs, rows, C);
    LAUNCH_BLOCKS(moments_finish_kernel, CEIL_DIV(C, 64), 64, main_stream, *norm, joined, groups, rows);
}

__global__ void batchnorm_inference_kernel(const __grid_constant__ BatchNorm norm) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= norm.C) { return; }
    norm.mean[c] = norm.running_mean[c];
    norm.rstd[c] = 1.0f / sqrtf(norm.running_var[c] + NORM_EPS);
}
void batchnorm_inference(const BatchNorm* norm) {
    LAUNCH_BLOCKS(batchnorm_inference_kernel, CEIL_DIV(norm->C, 64), 64, main_stream, *norm);
}

// v = (y - mean) * rstd * weight + bias for V channels from c on. A fused multiply-add by name: where
// this is positive decides what passes a ReLU, and forward and backward pass must agree on it
template <int V> __device__ inline void normalised(float* v, const floatX* y, const BatchNorm& norm, int c) {
    float mean[V], rstd[V], weight[V], bias[V];
    load<V>(v, y);
    load<V>(mean, norm.mean + c);
    load<V>(rstd, norm.rstd + c);
    load<V>(weight, norm.weight + c);
    load<V>(bias, norm.bias + c);
    for (int j = 0; j < V; j++) { v[j] = fmaf(v[j] - mean[j], rstd[j] * weight[j], bias[j]); }
}

// As the launcher says; groups of 8 elements of an image share a byte of bits, and `groups` of them make
// an image, the last may be shorter. A thread makes a group, V elements at a time; V divides C.
// RESIDUAL: 0 none, 1 as it is, 2 normalised
template <int V, int RESIDUAL, class Keep> __global__ void batchnorm_relu_kernel(
        floatX* out, uint8_t* bits, const floatX* y, const __grid_constant__ BatchNorm norm, const floatX* residual,
        const __grid_constant__ BatchNorm residual_norm, size_t images, size_t per_image, Keep keep) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, groups = (per_image + 7) / 8, b = i / groups;
    if (b >= images) { return; }
    unsigned mask = 0;
    for (int q = 0; q < 8; q += V) {
        const size_t e = (i - b * groups) * 8 + q, at = b * per_image + e;
        if (e >= per_image) { break; }
        const int c = (int)(e % norm.C);
        float v[V], r[V];
        normalised<V>(v, y + at, norm, c);
        if (RESIDUAL == 1) { load<V>(r, residual + at); }
        if (RESIDUAL == 2) { normalised<V>(r, residual + at, residual_norm, c); }
        for (int j = 0; j < V; j++) {
            if (RESIDUAL > 0) { v[j] += r[j]; }
            mask |= (unsigned)(v[j] > 0.0f) << (q + j);
            v[j] = v[j] < 0.0f ? 0.0f : v[j]; // a NaN stays
        }
        keep.template apply<V>(v, at);
        store<V>(out + at, v);
    }
    if (bits != NULL) { bits[i] = (uint8_t)mask; }
}
void batchnorm_relu(floatX* out, uint8_t* bits, const floatX* y, const BatchNorm* norm, const floatX* residual,
                    const BatchNorm* residual_norm, size_t images, size_t per_image, KeepLargest keep) {
    const size_t n = images * CEIL_DIV(per_image, (size_t)8) * VEC;
    const bool vector = vectorizable(norm->C, out, y, residual);
    const BatchNorm other = residual_norm != NULL ? *residual_norm : BatchNorm{};
#define BATCHNORM_RELU(RESIDUAL, Keep, keep) do { \
        const size_t blocks = CEIL_DIV(n / VEC, (size_t)128); \
        if (vector) { \
            batchnorm_relu_kernel<VEC, RESIDUAL, Keep><<<blocks, 128, 0, main_stream>>>( \
                out, bits, y, *norm, residual, other, images, per_image, keep); \
        } else { \
            batchnorm_relu_kernel<1, RESIDUAL, Keep><<<blocks, 128, 0, main_stream>>>( \
                out, bits, y, *norm, residual, other, images, per_image, keep); \
        } \
        kernelCheck(); } while (0)
    if (residual_norm != NULL) { BATCHNORM_RELU(2, KeepAll, KeepAll{}); }
    else if (residual != NULL) { BATCHNORM_RELU(1, KeepAll, KeepAll{}); }
    else if (keep.threshold != NULL) { BATCHNORM_RELU(0, KeepLargest, keep); }
    else { BATCHNORM_RELU(0, KeepAll, KeepAll{}); }
#undef BATCHNORM_RELU
}

// partial (slabs, 2, C) = sums over the rows of a slab of dz, and of dz * xhat, and dz is masked, as the
// launcher says. A thread has V columns of a slab; V divides C
template <int V, int RELU> __global__ void batchnorm_backward_sums_kernel(
        float* partial, floatX* dz, const floatX* y, const __grid_constant__ BatchNorm norm, const uint8_t* bits,
        size_t rows, size_t pixels) {
    const int C = norm.C;
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t packs = C / V, slab = i / packs, column = i % packs * V, begin = slab * SLAB_ROWS;
    if (begin >= rows) { return; }
    const size_t end = min(begin + SLAB_ROWS, rows), image_bytes = (pixels * C + 7) / 8;
    float mean[V], rstd[V], sum[V] = {0}, products[V] = {0};
    load<V>(mean, norm.mean + column);
    load<V>(rstd, norm.rstd + column);
    for (size_t r = begin; r < end; r++) {
        float d[V], v[V];
        load<V>(d, dz + r * C + column);
        load<V>(v, y + r * C + column);
        if (RELU == RELU_OF_NORM) {
            float z[V];
            normalised<V>(z, y + r * C + column, norm, (int)column);
            for (int j = 0; j < V; j++) { d[j] = z[j] > 0.0f ? d[j] : 0.0f; }
        }
        if (RELU == RELU_BITS) {
            const size_t b = r / pixels, e = (r - b * pixels) * C + column;
            const unsigned mask = bits[b * image_bytes + e / 8] >> (e % 8);
            for (int j = 0; j < V; j++) { d[j] = mask >> j & 1 ? d[j] : 0.0f; }
        }
        if (RELU != NO_RELU) { store<V>(dz + r * C + column, d); }
        for (int j = 0; j < V; j++) {
            sum[j] += d[j];
            products[j] += d[j] * ((v[j] - mean[j]) * rstd[j]);
        }
    }
    store<V>(partial + 2 * slab * C + column, sum);
    store<V>(partial + (2 * slab + 1) * C + column, products);
}

// out (groups, n) = sums of SLAB_ROWS rows each of partial (slabs, n). A thread has a column of a group
__global__ void slab_sum_kernel(float* out, const float* partial, size_t slabs, int n) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, group = i / n, begin = group * SLAB_ROWS;
    if (begin >= slabs) { return; }
    const size_t end = min(begin + SLAB_ROWS, slabs);
    float sum = 0.0f;
#pragma unroll 16
    for (size_t s = begin; s < end; s++) { sum += partial[s * n + (i - group * n)]; }
    out[i] = sum;
}

// sums (2, C) = column sums of grouped (groups, 2, C), also added to the gradients of bias and weight. A
// thread has one
__global__ void batchnorm_backward_finish_kernel(float* sums, const __grid_constant__ BatchNorm norm,
                                                 const float* grouped, size_t groups) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, C = norm.C;
    if (i >= 2 * C) { return; }
    float sum = 0.0f;
#pragma unroll 16
    for (size_t g = 0; g < groups; g++) { sum += grouped[g * 2 * C + i]; }
    sums[i] = sum;
    if (i < C) { norm.dbias[i] += sum; } else { norm.dweight[i - C] += sum; }
}
void batchnorm_backward_sums(float* sums, floatX* dz, const floatX* y, const BatchNorm* norm, int relu,
                             const uint8_t* bits, float* partial, size_t rows, size_t pixels) {
    const int C = norm->C;
    const size_t slabs = CEIL_DIV(rows, (size_t)SLAB_ROWS), groups = CEIL_DIV(slabs, (size_t)SLAB_ROWS);
    const size_t n = slabs * C;
    const bool vector = vectorizable(C, dz, y);
    float* grouped = partial + 2 * n;
#define SUMS(RELU) do { \
        if (vector) { \
            batchnorm_backward_sums_kernel<VEC, RELU><<<CEIL_DIV(n / VEC, (size_t)64), 64, 0, main_stream>>>( \
                partial, dz, y, *norm, bits, rows, pixels); \
        } else { \
            batchnorm_backward_sums_kernel<1, RELU><<<CEIL_DIV(n, (size_t)64), 64, 0, main_stream>>>( \
                partial, dz, y, *norm, bits, rows, pixels); \
        } \
        kernelCheck(); } while (0)
    if (relu == RELU_OF_NORM) { SUMS(RELU_OF_NORM); }
    else if (relu == RELU_BITS) { SUMS(RELU_BITS); }
    else { SUMS(NO_RELU); }
#undef SUMS
    const size_t blocks = CEIL_DIV(groups * 2 * C, (size_t)64);
    LAUNCH_BLOCKS(slab_sum_kernel, blocks, 64, main_stream, grouped, partial, slabs, 2 * C);
    LAUNCH_BLOCKS(batchnorm_backward_finish_kernel, CEIL_DIV(2 * C, 64), 64, main_stream, sums, *norm, grouped, groups);
}

// As the launcher says. A thread has V of the n elements; V divides C
template <int V> __global__ void batchnorm_backward_kernel(floatX* dy, const floatX* dz, const floatX* y,
        const __grid_constant__ BatchNorm norm, const float* sums, size_t n, float share) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const int C = norm.C, c = (int)(i % C);
    float d[V], v[V], mean[V], rstd[V], weight[V], sum[V], product[V];
    load<V>(d, dz + i);
    load<V>(v, y + i);
    load<V>(mean, norm.mean + c);
    load<V>(rstd, norm.rstd + c);
    load<V>(weight, norm.weight + c);
    load<V>(sum, sums + c);
    load<V>(product, sums + C + c);
    for (int j = 0; j < V; j++) {
        const float xhat = (v[j] - mean[j]) * rstd[j];
        d[j] = rstd[j] * weight[j] * (d[j] - share * sum[j] - xhat * (share * product[j]));
    }
    store<V>(dy + i, d);
}
void batchnorm_backward(floatX* dy, const floatX* dz, const floatX* y, const BatchNorm* norm, const float* sums,
                        size_t rows, size_t all) {
    const size_t n = rows * norm->C;
    LAUNCH(batchnorm_backward_kernel, vectorizable(norm->C, dy, dz, y), n, 128, dy, dz, y, *norm, sums, n,
           1.0f / (float)all);
}

// Of each output pixel the largest of 3 x 3 at a stride of 2, the first of equal ones, NaNs first; the
// values are those before the ReLU, which keeps their order. A thread has V channels of an output pixel;
// V divides C; n elements
template <int V> __global__ void max_pool_kernel(floatX* out, uint8_t* argmax, const floatX* y,
                                                 const __grid_constant__ BatchNorm norm, size_t n, int H, int W) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const int C = norm.C, PH = (H - 1) / 2 + 1, PW = (W - 1) / 2 + 1;
    const size_t pixel = i / C, row = pixel / PW, b = row / PH;
    const int c = (int)(i - pixel * C), pw = (int)(pixel - row * PW), ph = (int)(row - b * PH);
    float most[V];
    uint8_t which[V] = {0};
    for (int j = 0; j < V; j++) { most[j] = -INFINITY; }
    for (int kh = 0; kh < 3; kh++) {
        for (int kw = 0; kw < 3; kw++) {
            const int h = 2 * ph - 1 + kh, w = 2 * pw - 1 + kw;
            if ((unsigned)h >= (unsigned)H || (unsigned)w >= (unsigned)W) { continue; }
            float v[V];
            normalised<V>(v, y + ((b * H + h) * W + w) * C + c, norm, c);
            for (int j = 0; j < V; j++) {
                const bool more = v[j] > most[j] || isnan(v[j]);
                most[j] = more ? v[j] : most[j];
                which[j] = more ? (uint8_t)(kh * 3 + kw) : which[j];
            }
        }
    }
    for (int j = 0; j < V; j++) { most[j] = most[j] < 0.0f ? 0.0f : most[j]; }
    store<V>(out + i, most);
    Pack<V, uint8_t> taps;
    for (int j = 0; j < V; j++) { taps.v[j] = which[j]; }
    *(Pack<V, uint8_t>*)(argmax + i) = taps;
}
void max_pool(floatX* out, uint8_t* argmax, const floatX* y, const BatchNorm* norm, size_t images, int H, int W) {
    const size_t n = images * ((H - 1) / 2 + 1) * ((W - 1) / 2 + 1) * norm->C;
    LAUNCH(max_pool_kernel, vectorizable(norm->C, out, y, argmax), n, 128, out, argmax, y, *norm, n, H, W);
}

// dinp (images, H, W, C) = sum of dout (images, PH, PW, C) over the output pixels whose largest value a
// pixel was. A thread has V channels of an input pixel; V divides C; n elements
template <int V> __global__ void max_pool_backward_kernel(floatX* dinp, const floatX* dout, const uint8_t* argmax,
                                                          size_t n, int H, int W, int C) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const int PH = (H - 1) / 2 + 1, PW = (W - 1) / 2 + 1;
    const size_t pixel = i / C, row = pixel / W, b = row / H;
    const int c = (int)(i - pixel * C), w = (int)(pixel - row * W), h = (int)(row - b * H);
    float sum[V] = {0};
    for (int ph = h / 2; ph <= (h + 1) / 2 && ph < PH; ph++) { // kh = h + 1 - 2 * ph is 0 to 2
        for (int pw = w / 2; pw <= (w + 1) / 2 && pw < PW; pw++) {
            const size_t at = ((b * PH + ph) * PW + pw) * C + c;
            const int tap = (h + 1 - 2 * ph) * 3 + w + 1 - 2 * pw;
            float d[V];
            load<V>(d, dout + at);
            const Pack<V, uint8_t> taps = *(const Pack<V, uint8_t>*)(argmax + at);
            for (int j = 0; j < V; j++) { sum[j] += taps.v[j] == tap ? d[j] : 0.0f; }
        }
    }
    store<V>(dinp + i, sum);
}
void max_pool_backward(floatX* dinp, const floatX* dout, const uint8_t* argmax, size_t images, int H, int W, int C) {
    const size_t n = numel(images, H, W, C);
    LAUNCH(max_pool_backward_kernel, vectorizable(C, dinp, dout, argmax), n, 128, dinp, dout, argmax, n, H, W, C);
}

// out (images, C) = mean of inp (images, pixels, C) over pixels. A thread has V of the n outputs; V
// divides C
template <int V> __global__ void average_pool_kernel(floatX* out, const floatX* inp, size_t n, size_t pixels, int C) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const size_t b = i / C, c = i - b * C;
    float sum[V] = {0};
    for (size_t p = 0; p < pixels; p++) {
        float v[V];
        load<V>(v, inp + (b * pixels + p) * C + c);
        for (int j = 0; j < V; j++) { sum[j] += v[j]; }
    }
    for (int j = 0; j < V; j++) { sum[j] /= (float)pixels; }
    store<V>(out + i, sum);
}
void average_pool(floatX* out, const floatX* inp, size_t images, size_t pixels, size_t C) {
    const size_t n = images * C;
    LAUNCH(average_pool_kernel, vectorizable(C, out, inp), n, 64, out, inp, n, pixels, (int)C);
}

// dinp (images, pixels, C) = dout (images, C) / pixels. A thread has V of the n elements; V divides C
template <int V> __global__ void average_pool_backward_kernel(floatX* dinp, const floatX* dout, size_t n, size_t pixels,
                                                              int C) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const size_t pixel = i / C, b = pixel / pixels;
    float v[V];
    load<V>(v, dout + b * C + (i - pixel * C));
    for (int j = 0; j < V; j++) { v[j] /= (float)pixels; }
    store<V>(dinp + i, v);
}
void average_pool_backward(floatX* dinp, const floatX* dout, size_t images, size_t pixels, size_t C) {
    const size_t n = numel(images, pixels, C);
    LAUNCH(average_pool_backward_kernel, vectorizable(C, dinp, dout), n, 256, dinp, dout, n, pixels, (int)C);
}

// ----------------------------------------------------------------------------
// what is said of the model

bool reports_stats(const Model* model) { return model->s->stats > 0; }
bool keeps_only_inputs(const Model* model) { return model->s->recompute == 3; }
bool drops(const Model* model) { return model->s->gamma > 0.0; }
void model_check_file(const Safetensors*) {}
void model_augment(Augmenter*, const Batch*, cudaStream_t) {}

// three times the forward pass, whatever -r computes again and DropIT spares
double model_flops(const Model* model, size_t n) {
    double products = (double)block_of(model, model->L - 1).out * model->V;
    for (size_t l = 0; l < model->L; l++) {
        for (int which = l == 0 ? STEM : CONV1; which < NUM_LAYERS; which++) {
            const Conv c = conv_at(model, which, l);
            products += (double)numel(c.OH, c.OW, c.OC) * numel(c.K, c.K, c.C);
        }
    }
    return 3.0 * n * 2.0 * products;
}

void model_print(const Model* model) {
    const ResnetConfig* c = &model->config;
    printf("model: %s, %s blocks, layers %d", model->name, c->wide ? "bottleneck" : "basic", c->layers[0]);
    for (int i = 1; i < 4 && c->layers[i] > 0; i++) { printf(",%d", c->layers[i]); }
    printf(", width %d, stem %s, image %zu x %zu, channels %zu, classes %zu, %zu parameters\n", c->width,
           c->pools ? "imagenet" : "cifar", model->H, model->W, model->CH, model->V, model->num_parameters);
}

void model_pixels(const Model* model, size_t b, float* pixels) {
    const size_t CH = model->CH, n = model->acts.image->per_image, area = n / CH;
    floatX* image = host_new<floatX>(n, "an image"); // (H, W, CH)
    const void* device = activation_at(model->acts.image, b, false);
    cudaCheck(cudaMemcpy(image, device, n * sizeof(floatX), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) { pixels[i % CH * area + i / CH] = (float)image[i]; }
    free(image);
}

// ---- shared: DropIT --------------------------------------------------------
// DropIT (Chen et al., ICLR 2023, arXiv 2202.13808): which elements of a cached tensor x (n) are kept.
//
// Every element has a 32-bit key. Those with the largest keys are kept; of equal keys, those of the
// lowest indices. The strategy says what the key is, and where the largest are sought:
//     mink      the bits of |x|, which compare as magnitudes do; in the whole tensor
//     fastmink  the bits of |x|; in each tile of 16,384 consecutive elements
//     random    a hash of the element's index; in each tile
//
// A threshold is found digit by digit. A histogram of the keys' highest 11 bits shows in which bin the
// k-th largest key lies; of the keys in that bin, a histogram of the next 11 bits is made; and so on. In
// a whole tensor, a sample of 16,384 elements says between which two keys the threshold almost certainly
// lies. One read of x counts the elements above and lists the few between, of which the histograms are
// made; where the sample errs or many equal keys overflow the list, they are made of x. So the choice is
// always exact. Atomics add only integers, and no sum depends on the order of the list.
//
// A bitmap (bit i % 32 of word i / 32 is element i), the kept values in index order, and the number of
// values before every 256 elements are stored; of a recomputed tensor, only the thresholds.
#define DROPIT_TILE 16384
#define KEY_ZEROS (33 - 8 * (int)sizeof(floatX)) // low bits that are 0 in the key of every magnitude

// the strategy, and for the draws of `random` a seed for each tensor, and the step
struct DropRule { int strategy; unsigned long long seed; unsigned step; };
// a tensor x (d.n) to choose from, by which rule, and where the choice goes
struct DropChoice { const floatX* x; Dropped d; DropRule rule; };

#define DROPIT_DIGIT 11 // bits
#define DROPIT_BINS (1 << DROPIT_DIGIT)
#define DROPIT_THREADS 64                          // threads of a block that searches or counts a tile
#define TILE_WORDS (DROPIT_TILE / 32)              // a word stands for 32 consecutive elements
#define THREAD_WORDS (TILE_WORDS / DROPIT_THREADS) // words that one thread handles, one after the other
#define DROPIT_SEGMENT (32 * THREAD_WORDS)         // elements that one thread handles: 256

// search for the k-th largest key by digits of key - low: 11 bits each, the last may have fewer
struct Search {
    unsigned low;       // no key is below
    int bits;           // number of low bits that are not known yet
    unsigned prefix;    // the digits that are known
    unsigned remaining; // number of kept elements among those with this prefix
};
struct TensorSearch : Search {
    unsigned candidates; // elements with keys in the sampled range; the list holds those that fit
    unsigned listed;     // length of the list if the histograms are made of it, 0 if they are made of x
};

// scratch of the selections that run in the same launches, as those of a block's four linears do: their
// tiles and lists lie one after the other
#define MAX_SELECTIONS 4
struct DropScratch {
    TensorSearch* search;   // (MAX_SELECTIONS)
    unsigned* histogram;    // (MAX_SELECTIONS, DROPIT_BINS)
    uint2* tile_counts;     // (tiles) elements with a key above the threshold's, and with an equal key
    unsigned* tile_offsets; // (tiles) kept elements before each
    floatX* sample;         // (MAX_SELECTIONS, DROPIT_TILE)
    unsigned* range;        // (MAX_SELECTIONS, 2) keys around the threshold's, the higher first
    floatX* list_values;    // (list)
    unsigned* list_indices; // (list)
    unsigned* not_finite;   // (1) NaNs and Infs that selections met since it was last cleared
};

// one tensor of a launch, with its part of the scratch
struct Selection : DropChoice, DropScratch {
    unsigned k_tile, k_last;      // fastmink, random: kept of each tile, of a last one that is shorter
    unsigned first_tile, tiles;   // its blocks in a launch with one block a tile
    unsigned rank_high, rank_low; // of the range's keys in the sample; 0: none is above, or below, it
    size_t list_capacity;
};
struct Selections { Selection tensors[MAX_SELECTIONS]; };

// the smallest magnitude that rounds to a key of at least `key`, or, if `above`, to a greater one
__device__ inline float least_kept(unsigned key, bool above) {
    unsigned bits = (key >> KEY_ZEROS) + above; // of a floatX without its sign
    // bf16: half a step lower; what is halfway is rounded to even
    if (sizeof(floatX) == 2) { bits = bits > 0 ? (bits << 16) - 0x8000 + (bits & 1) : 0; }
    return __uint_as_float(min(bits, 0x7f800000u));
}

// one comparison an element, with the smallest magnitude that is kept; Inf and NaN are kept
template <int V> __device__ __forceinline__ void KeepLargest::apply(float* v, size_t i) const {
    const Threshold t = *threshold;
    const size_t first = begin + i;
    if (first + V <= t.tie_end || first >= t.tie_end) {
        const float least = least_kept(t.key, first >= t.tie_end);
        for (int j = 0; j < V; j++) { v[j] = fabsf(v[j]) < least ? 0.0f : v[j]; }
    } else {
        for (int j = 0; j < V; j++) { v[j] = fabsf(v[j]) < least_kept(t.key, first + j >= t.tie_end) ? 0.0f : v[j]; }
    }
}

size_t dropit_tiles(size_t n) { return CEIL_DIV(n, (size_t)DROPIT_TILE); }
size_t dropit_segments(size_t n) { return CEIL_DIV(n, (size_t)DROPIT_SEGMENT); }
size_t dropit_words(size_t n) { return dropit_segments(n) * THREAD_WORDS; }
// the sampled range holds at most about n / 25 elements, at gamma 0.5
size_t dropit_list_capacity(size_t n) { return n / 20 + DROPIT_TILE; }
// k of n elements, as the published int(numel * (1 - gamma)); dropit_k: of a whole tensor
size_t dropit_keep(size_t n, double gamma) { return (size_t)((double)n * (1.0 - gamma)); }
size_t dropit_k(size_t n, double gamma, int strategy) {
    if (strategy == MINK) { return dropit_keep(n, gamma); }
    return n / DROPIT_TILE * dropit_keep(DROPIT_TILE, gamma) + dropit_keep(n % DROPIT_TILE, gamma);
}

__device__ inline unsigned magnitude_key(floatX x) { return (unsigned)*(const bitsX*)&x << KEY_ZEROS; }
// the key of element i of x; HASHED: of strategy random
template <bool HASHED> __device__ inline unsigned drop_key(floatX x, size_t i, DropRule rule) {
    if constexpr (HASHED) { return philox(rule.seed, RNG_DROPIT, rule.step, i).x; }
    else { return magnitude_key(x); }
}

#define INFINITY_KEY 0xff000000u // the key of Inf; those of NaNs are above it
// keys[j] = magnitude_key(v[j]); of bf16 two at a time, as they lie in a register
__device__ inline void magnitude_keys(unsigned* keys, const floatX* v) {
    for (int j = 0; j < 32; j += 4 / (int)sizeof(floatX)) {
        unsigned bits;
        memcpy(&bits, (const void*)(v + j), sizeof(bits));
        keys[j] = bits << KEY_ZEROS;
        if (sizeof(floatX) == 2) { keys[j+1] = bits >> 16 << KEY_ZEROS; }
    }
}

// Bit j of a mask is for element j of 32: consecutive ones or, with RUNS, runs of PACK_RUN, 32 runs
// apart. Loops over them have a constant length: a GPU keeps them in registers, a CPU in vectors.
#define PACK_RUN (sizeof(floatX) == 2 ? 8 : 32)
template <bool RUNS> __device__ inline size_t place(int j) { // of element j, counted from the first
    return RUNS ? (size_t)(j / PACK_RUN) * 32 * PACK_RUN + j % PACK_RUN : (size_t)j;
}

// the mask of those of the 32 elements from element i on whose index is below end
template <bool RUNS> __device__ inline unsigned below_mask(size_t i, size_t end) {
    unsigned mask = 0;
    for (int q = 0; q < 32; q += 8) {
        const size_t at = i + place<RUNS>(q);
        mask |= (at + 8 <= end ? 255u : at < end ? (1u << (end - at)) - 1 : 0u) << q;
    }
    return mask;
}

// 32 elements of c.x from element i on, a multiple of 8, with their keys
template <bool HASHED, bool RUNS = false> struct Word {
    alignas(16) floatX v[32]; // zeros beyond the end of x
    unsigned keys[32];
    unsigned valid;           // the mask of elements of x
    __device__ inline Word(const DropChoice& c, size_t i) {
        const floatX* x = c.x + i;
        const bool whole = i + place<RUNS>(31) < c.d.n;
        if (whole) { for (int j = 0; j < 32; j += 8) { *(Pack<8>*)(v + j) = *(const Pack<8>*)(x + place<RUNS>(j)); } }
        else { for (int j = 0; j < 32; j++) { v[j] = i + place<RUNS>(j) < c.d.n ? x[place<RUNS>(j)] : (floatX)0.0f; } }
        if constexpr (HASHED) {
            unsigned hashes[32]; // nvcc does not unroll this loop: what it indexes lies in memory
            for (int j = 0; j < 32; j++) { hashes[j] = drop_key<true>(v[j], i + place<RUNS>(j), c.rule); }
            for (int j = 0; j < 32; j++) { keys[j] = hashes[j]; }
        } else { magnitude_keys(keys, v); }
        valid = whole ? ~0u : below_mask<RUNS>(i, c.d.n);
    }
};

__device__ inline unsigned above_mask(const unsigned* keys, unsigned key) {
    unsigned mask = 0;
    for (int j = 0; j < 32; j++) { mask |= keys[j] > key ? 1u << j : 0u; }
    return mask;
}
__device__ inline int count_above(const unsigned* k, unsigned x) { return __popc(above_mask(k, x)); }
// elements whose key without its lowest `shift` bits is `prefix`
__device__ inline unsigned equal_mask(const unsigned* keys, unsigned prefix, int shift) {
    unsigned mask = 0;
    for (int j = 0; j < 32; j++) { mask |= keys[j] >> shift == prefix ? 1u << j : 0u; }
    return mask;
}

// *not_finite += number of NaNs and Infs among v (32)
__device__ inline void count_not_finite(unsigned* not_finite, const floatX* v) {
    unsigned keys[32];
    magnitude_keys(keys, v);
    const unsigned bad = count_above(keys, INFINITY_KEY - 1);
    if (bad > 0) { atomicAdd(not_finite, bad); }
}

// Returns the sum of v over the threads of the block before this one; *sum is the sum over all threads.
// warp_sums (32) lies in shared memory; the caller may use it again after a barrier.
template <class T> __device__ inline T block_exclusive_sum(T v, T* warp_sums, T* sum) {
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    T before = cg::exclusive_scan(warp, v, cg::plus<T>());
    if (warp.thread_rank() == 31) { warp_sums[threadIdx.x / 32] = before + v; }
    __syncthreads();
    *sum = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) {
        if (w == threadIdx.x / 32) { before += *sum; }
        *sum += warp_sums[w];
    }
    return before;
}

__device__ inline int digit_bits(const Search* s) { return min(s->bits, DROPIT_DIGIT); }
__device__ inline unsigned search_key(const Search* s) { return s->low + (s->prefix << s->bits); }

// Moves the search by one digit: to the largest that at least `remaining` elements reach; if remaining
// is 0, to ones, above which no key lies. histogram: of the next digit. The whole block calls
__device__ inline void search_digit(Search* search, const unsigned* histogram, unsigned* warp_sums) {
    const Search now = *search;
    const int bits = digit_bits(&now), left = now.bits - bits, per_thread = DROPIT_BINS / blockDim.x;
    int d = DROPIT_BINS - 1 - (int)threadIdx.x * per_thread; // the thread's bins are d, d - 1, ...
    unsigned mine = 0, sum;
    for (int j = 0; j < per_thread; j++) { mine += histogram[d - j]; }
    unsigned above = block_exclusive_sum(mine, warp_sums, &sum);
    if (now.remaining == 0) {
        if (threadIdx.x == 0) { *search = {now.low, left, ((now.prefix + 1) << bits) - 1, 0}; }
    } else if (above < now.remaining && now.remaining <= above + mine) {
        while (above + histogram[d] < now.remaining) { above += histogram[d--]; }
        *search = {now.low, left, now.prefix << bits | (unsigned)d, now.remaining - above};
    }
    __syncthreads();
}

// *to = this key, and the index after the rank-th element with it (rank 0: no element) in the tile at
// element `begin`. The whole block calls; each thread looks through WORDS words. sums: shared memory
template <bool HASHED, int WORDS> __device__ inline
void set_threshold(Threshold* to, const DropChoice& c, size_t begin, unsigned key, unsigned rank, unsigned* sums) {
    if (threadIdx.x == 0) { *to = {key, 0}; }
    if (rank == 0) { return; }
    const size_t first = begin + threadIdx.x * WORDS * 32;
    unsigned equal[WORDS], mine = 0, sum;
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        const Word<HASHED> word(c, first + w * 32);
        equal[w] = equal_mask(word.keys, key, 0) & word.valid;
        mine += __popc(equal[w]);
    }
    unsigned before = block_exclusive_sum(mine, sums, &sum);
    for (int w = 0; w < WORDS; w++) {
        const unsigned count = __popc(equal[w]);
        if (before < rank && rank <= before + count) {
            for (unsigned i = before + 1; i < rank; i++) { equal[w] &= equal[w] - 1; } // the lowest
            to->tie_end = (unsigned)(first + w * 32 + __ffs((int)equal[w]));
        }
        before += count;
    }
}

// counts[next digit] += 1 for those of 32 elements from element i on that share the prefix. first: there
// is no prefix yet; then *bad += NaNs and Infs, unless it is NULL
template <bool HASHED> __device__ __forceinline__
void count_word(unsigned* counts, unsigned* bad, const DropChoice& c, size_t i, const Search& s, bool first) {
    Word<HASHED> w(c, i);
    const int bits = digit_bits(&s), shift = s.bits - bits;
    for (int j = 0; j < 32; j++) { w.keys[j] -= s.low; }
    if (first) {
        if (w.valid == ~0u) { for (int j = 0; j < 32; j++) { atomicAdd_block(&counts[w.keys[j] >> shift], 1u); } }
        else { for (int j = 0; j < 32 && w.valid >> j & 1; j++) { atomicAdd_block(&counts[w.keys[j] >> shift], 1u); } }
        if (bad != NULL) { count_not_finite(bad, w.v); }
    } else {
        unsigned match = equal_mask(w.keys, s.prefix, s.bits) & w.valid;
        for (; match != 0; match &= match - 1) {
            // these are few and read again: an index into keys would move keys from registers to memory
            const size_t at = i + __ffs(match) - 1;
            const unsigned key = drop_key<HASHED>(c.x[at], at, c.rule) - s.low;
            atomicAdd_block(&counts[key >> shift & ((1u << bits) - 1)], 1u);
        }
    }
}

// the tensor of this block in a launch with one block a tile, and which of its tiles
__device__ inline const Selection& selection_of(const Selections& all, unsigned block, unsigned* tile) {
    const Selection* s = all.tensors;
    while (block - s->first_tile >= s->tiles) { s++; }
    *tile = block - s->first_tile;
    return *s;
}

// sample (DROPIT_TILE) of tensor blockIdx.y = runs of 8 neighbours, one anywhere in each of 2,048 equal
// parts of x. A thread copies half a run
__global__ void dropit_sample_kernel(const __grid_constant__ Selections all) {
    const Selection& s = all.tensors[blockIdx.y];
    const unsigned half = blockIdx.x * blockDim.x + threadIdx.x, part = half / 2;
    const size_t n = s.d.n, parts = DROPIT_TILE / 8;
    const size_t length = n / parts, anywhere = length > 0 ? part * 2654435761u % length : 0;
    const size_t begin = (part * n / parts + anywhere) / 8 * 8 + half % 2 * 4;
    for (int j = 0; j < 4; j++) { s.sample[half * 4 + j] = s.x[begin + j < n ? begin + j : n - 1]; }
}

// range = the rank_high-th and the rank_low-th largest key of the sample, of which two digits are enough
// (the list is a little longer). One block a tensor, 16 KiB; both searches share the first histogram
#define RANGE_THREADS 128
__global__ void dropit_range_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned counts[2][DROPIT_BINS], warp_sums[32];
    __shared__ Search searches[2];
    const Selection& s = all.tensors[blockIdx.x];
    const DropChoice sample = {s.sample, {DROPIT_TILE, 0, NULL, NULL, NULL, NULL}, s.rule};
    const int thread = threadIdx.x;
    if (thread < 2) { searches[thread] = {0, 32, 0, thread == 0 ? s.rank_high : s.rank_low}; }
    if (thread == 0) { s.search->candidates = 0; }
    for (int digit = 0; digit < 2; digit++) {
        for (int b = thread; b < DROPIT_BINS; b += RANGE_THREADS) { counts[0][b] = counts[1][b] = 0; }
        __syncthreads();
        const Search high = searches[0], low = searches[1];
        for (int w = thread; w < TILE_WORDS; w += RANGE_THREADS) {
            count_word<false>(counts[0], NULL, sample, w * 32, high, digit == 0);
            if (digit > 0) { count_word<false>(counts[1], NULL, sample, w * 32, low, false); }
        }
        __syncthreads();
        search_digit(&searches[0], counts[0], warp_sums);
        search_digit(&searches[1], counts[digit], warp_sums);
    }
    if (thread == 0) {
        s.range[0] = search_key(&searches[0]) | ((1u << searches[0].bits) - 1);
        s.range[1] = s.rank_low > 0 ? search_key(&searches[1]) : 0;
    }
}

// tile_counts[tile] = (elements above the sampled range, 0); list = those in it, in any order;
// not_finite += NaNs and Infs. A block has a tile, and collects in 8 KiB of shared memory (fp32: 12), to
// wait once for a place in the list and write whole lines; what does not fit goes there at once
#define MAX_FOUND 2048
__global__ void dropit_candidates_kernel(const __grid_constant__ Selections all) {
    __shared__ floatX found_values[MAX_FOUND];
    __shared__ unsigned short found_places[MAX_FOUND]; // in the tile
    __shared__ unsigned found, full, above, list_begin;
    unsigned tile, mine = 0, top = 0;
    const Selection& s = selection_of(all, blockIdx.x, &tile);
    const unsigned high = s.range[0], low = s.range[1];
    const size_t begin = (size_t)tile * DROPIT_TILE, capacity = s.list_capacity;
    if (threadIdx.x == 0) { found = above = 0, full = MAX_FOUND; }
    __syncthreads();
    // neighbours in a warp read neighbouring words; a thread has two at a time, DROPIT_THREADS apart
    for (int w = 0; w < THREAD_WORDS; w += 2) {
        unsigned masks[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const Word<false> word(s, begin + ((w + h) * DROPIT_THREADS + threadIdx.x) * 32);
            unsigned between = 0; // low <= key <= high
            for (int j = 0; j < 32; j++) { between |= word.keys[j] - low <= high - low ? 1u << j : 0u; }
            masks[h] = between & word.valid;
            mine += count_above(word.keys, high);
            for (int j = 0; j < 32; j++) { top = max(top, word.keys[j]); }
        }
        const unsigned few = __popc(masks[0]) + __popc(masks[1]);
        if (few == 0) { continue; }
        unsigned at = atomicAdd_block(&found, few);
        const bool room = at + few <= MAX_FOUND;
        if (!room && at <= MAX_FOUND) { full = at; } // only one thread crosses the end
        if (!room) { at = atomicAdd(&s.search->candidates, few); }
        for (int h = 0; h < 2; h++) {
            const unsigned first = ((w + h) * DROPIT_THREADS + threadIdx.x) * 32;
            for (unsigned mask = masks[h]; mask != 0; mask &= mask - 1, at++) {
                const unsigned i = first + __ffs((int)mask) - 1;
                if (room) {
                    found_values[at] = s.x[begin + i];
                    found_places[at] = (unsigned short)i;
                } else if (at < capacity) {
                    s.list_values[at] = s.x[begin + i];
                    s.list_indices[at] = (unsigned)begin + i;
                }
            }
        }
    }
    if (mine > 0) { atomicAdd_block(&above, mine); }
    for (int w = 0; top >= INFINITY_KEY && w < THREAD_WORDS; w++) { // rare: only now are they counted
        const Word<false> word(s, begin + (w * DROPIT_THREADS + threadIdx.x) * 32);
        count_not_finite(s.not_finite, word.v);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        found = min(found, full);
        list_begin = atomicAdd(&s.search->candidates, found);
        s.tile_counts[tile] = make_uint2(above, 0);
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < found && list_begin + i < capacity; i += DROPIT_THREADS) {
        s.list_values[list_begin + i] = found_values[i];
        s.list_indices[list_begin + i] = (unsigned)begin + found_places[i];
    }
}

// starts the search for the k-th largest key: in the list if it is there, else in x. One block a tensor
__global__ void dropit_start_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned warp_sums[32];
    const Selection& s = all.tensors[blockIdx.x];
    const unsigned k = (unsigned)s.d.k, low = s.range[1];
    unsigned mine = 0, above;
    for (unsigned t = threadIdx.x; t < s.tiles; t += blockDim.x) { mine += s.tile_counts[t].x; }
    block_exclusive_sum(mine, warp_sums, &above);
    const unsigned candidates = s.search->candidates;
    const bool listed = candidates <= s.list_capacity && above < k && k - above <= candidates;
    if (threadIdx.x == 0) {
        const int bits = 32 - __clz((int)(s.range[0] - low)); // in which the list's keys differ
        *(Search*)s.search = listed ? Search{low, bits, 0, k - above} : Search{0, 32, 0, k};
        s.search->listed = listed ? candidates : 0;
    }
    for (unsigned t = threadIdx.x; t < s.tiles && !listed; t += blockDim.x) { s.tile_counts[t].x = 0; }
    for (int b = threadIdx.x; b < DROPIT_BINS; b += blockDim.x) { s.histogram[b] = 0; }
}

// histogram += counts of the next digit, of the list or of x of tensor blockIdx.y. A block counts in 8
// KiB of shared memory, and reads pieces of 4,096 elements
#define HISTOGRAM_PIECE (DROPIT_TILE / 4)
__global__ void dropit_histogram_kernel(const __grid_constant__ Selections all, bool first) {
    __shared__ Pack<4, unsigned> counts[DROPIT_BINS / 4];
    const Selection& s = all.tensors[blockIdx.y];
    const Search now = *s.search;
    const unsigned listed = s.search->listed;
    const size_t n = listed > 0 ? listed : s.d.n;
    const DropChoice from = {listed > 0 ? s.list_values : s.x, {n, 0, NULL, NULL, NULL, NULL}, s.rule};
    const size_t own = (size_t)blockIdx.x * HISTOGRAM_PIECE; // the block's first piece
    if (now.bits <= KEY_ZEROS || own >= n) { return; }
    for (int b = threadIdx.x; b < DROPIT_BINS / 4; b += blockDim.x) { counts[b] = {}; }
    __syncthreads();
    for (size_t begin = own; begin < n; begin += (size_t)gridDim.x * HISTOGRAM_PIECE) {
        for (size_t i = threadIdx.x * 32; i < HISTOGRAM_PIECE; i += DROPIT_THREADS * 32) {
            count_word<false>((unsigned*)counts, NULL, from, begin + i, now, first);
        }
        __syncthreads(); // one piece after the other, and so whole pages of memory
    }
    for (int b = threadIdx.x; b < DROPIT_BINS / 4; b += blockDim.x) {
        const Pack<4, unsigned> c = counts[b];
        for (int j = 0; j < 4; j++) { if (c.v[j] > 0) { atomicAdd(&s.histogram[4*b + j], c.v[j]); } }
    }
}

// moves the search by the digit just counted, and clears the histogram. One block a tensor
__global__ void dropit_search_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned warp_sums[32];
    const Selection& s = all.tensors[blockIdx.x];
    if (s.search->bits <= KEY_ZEROS) { return; }
    search_digit(s.search, s.histogram, warp_sums);
    for (int b = threadIdx.x; b < DROPIT_BINS; b += blockDim.x) { s.histogram[b] = 0; }
}

__device__ inline void add_counts(uint2* tile_count, unsigned above, unsigned equal) {
    if (above > 0) { atomicAdd(&tile_count->x, above); }
    if (equal > 0) { atomicAdd(&tile_count->y, equal); }
}

// tile_counts[tile] += (elements above the threshold, equal to it), of list or x. One block a tile
__global__ void dropit_count_kernel(const __grid_constant__ Selections all) {
    unsigned block;
    const Selection& s = selection_of(all, blockIdx.x, &block);
    const unsigned key = search_key(s.search), listed = s.search->listed;
    const size_t segment = (size_t)block * blockDim.x + threadIdx.x;
    if (listed == 0) {
        unsigned above = 0, equal = 0;
        for (int w = 0; w < THREAD_WORDS; w++) {
            const Word<false> word(s, segment * DROPIT_SEGMENT + w * 32);
            above += count_above(word.keys, key);
            equal += __popc(equal_mask(word.keys, key, 0) & word.valid);
        }
        add_counts(&s.tile_counts[block], above, equal);
        return;
    }
    for (size_t begin = segment * 32; begin < listed; begin += (size_t)s.tiles * blockDim.x * 32) {
        // neighbours in the list are mostly of one tile: their counts are added together
        unsigned tile = s.list_indices[begin] / DROPIT_TILE, above = 0, equal = 0;
        for (size_t i = begin; i < begin + 32 && i < listed; i++) {
            const unsigned own = s.list_indices[i] / DROPIT_TILE, x = magnitude_key(s.list_values[i]);
            if (own != tile) {
                add_counts(&s.tile_counts[tile], above, equal);
                tile = own, above = equal = 0;
            }
            above += x > key, equal += x == key;
        }
        add_counts(&s.tile_counts[tile], above, equal);
    }
}

// Ends the search: thresholds[0], and tile_offsets[tile] = kept elements before it. One block a tensor
#define OFFSETS_THREADS 256
__global__ void dropit_offsets_kernel(const __grid_constant__ Selections all) {
    __shared__ uint64_t pair_sums[32];
    __shared__ unsigned warp_sums[32];
    __shared__ uint2 last_tie; // the tile of the last kept tie, and its rank among the ties there
    const Selection& s = all.tensors[blockIdx.x];
    const unsigned key = search_key(s.search), ties = s.search->remaining;
    const unsigned per_thread = CEIL_DIV(s.tiles, blockDim.x), first = threadIdx.x * per_thread;
    const unsigned last = min(first + per_thread, s.tiles);
    uint64_t mine = 0, sum; // above << 32 | equal
#pragma unroll 4
    for (unsigned t = first; t < last; t++) { mine += (uint64_t)s.tile_counts[t].x << 32 | s.tile_counts[t].y; }
    const uint64_t before = block_exclusive_sum(mine, pair_sums, &sum);
    unsigned above = before >> 32, equal = (unsigned)before;
    for (unsigned tile = first; tile < last; tile++) {
        const uint2 count = s.tile_counts[tile];
        s.tile_offsets[tile] = above + min(equal, ties);
        if (equal < ties && ties <= equal + count.y) { last_tie = make_uint2(tile, ties - equal); }
        above += count.x, equal += count.y;
    }
    __syncthreads();
    const size_t begin = (size_t)last_tie.x * DROPIT_TILE;
    const unsigned rank = ties > 0 ? last_tie.y : 0;
    set_threshold<false, TILE_WORDS / OFFSETS_THREADS>(s.d.thresholds, s, begin, key, rank, warp_sums);
}

// fastmink and random: thresholds[tile]. One block a tile, 8 KiB of shared memory
template <bool HASHED> __global__ void dropit_tile_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned counts[DROPIT_BINS], warp_sums[32];
    __shared__ Search search;
    unsigned tile;
    const Selection& s = selection_of(all, blockIdx.x, &tile);
    const size_t begin = (size_t)tile * DROPIT_TILE;
    if (threadIdx.x == 0) { search = {0, 32, 0, begin + DROPIT_TILE <= s.d.n ? s.k_tile : s.k_last}; }
    for (bool first = true; first || search.bits > (HASHED ? 0 : KEY_ZEROS); first = false) {
        for (int b = threadIdx.x; b < DROPIT_BINS; b += blockDim.x) { counts[b] = 0; }
        __syncthreads();
        const Search now = search;
        for (int w = 0; w < THREAD_WORDS; w++) {
            const size_t i = begin + (threadIdx.x * THREAD_WORDS + w) * 32;
            count_word<HASHED>(counts, s.not_finite, s, i, now, first);
        }
        __syncthreads();
        search_digit(&search, counts, warp_sums);
    }
    const unsigned key = search_key(&search), ties = search.remaining;
    set_threshold<HASHED, THREAD_WORDS>(&s.d.thresholds[tile], s, begin, key, ties, warp_sums);
}

// A warp packs 4,096 elements: PACK_GROUPS groups of 32 runs. Lane l has run l of each group, and so
// four masks. In bf16 a run has 8 elements, so that a warp reads whole lines; in fp32 32, for CPUs
#define PACK_THREADS 128
#define PACK_GROUPS (128 / PACK_RUN)
typedef std::conditional<PACK_RUN == 8, uint8_t, unsigned>::type RunBits; // the bitmap of a run

// what group q has of four masks (the bits of its run), or of four words of counts (its count)
__device__ inline RunBits group(const unsigned* w, int q) { return w[q * PACK_RUN / 32] >> q * PACK_RUN % 32; }
// how many ones each run of a mask has
__device__ inline unsigned run_counts(unsigned word) {
    if (PACK_RUN == 32) { return __popc(word); }
    word -= word >> 1 & 0x55555555;
    word = (word & 0x33333333) + (word >> 2 & 0x33333333);
    return (word + (word >> 4)) & 0x0f0f0f0f;
}

// bitmap, offsets and values of the kept elements. One block of 128 threads a tile. bf16: a warp lines
// up to MAX_STAGED values up in shared memory (19 KiB a block) and writes them as one run. More, as at
// gamma 0.3, go to their places one by one, and so do fp32 values
#define MAX_STAGED (PACK_RUN == 8 ? 2304 : 0)
template <bool HASHED>
__global__ void __launch_bounds__(PACK_THREADS, 8) dropit_pack_kernel(const __grid_constant__ Selections all) {
    // for each warp: its values, 8 for alignment, and for each lane a place for what is not kept
    __shared__ Pack<8> staged[PACK_THREADS / 32][MAX_STAGED / 8 + 1 + 32 / 8];
    __shared__ unsigned starts[PACK_THREADS / 32][PACK_GROUPS + 1]; // values before each group, and all
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    unsigned tile;
    const Selection& s = selection_of(all, blockIdx.x, &tile);
    const Threshold t = s.d.thresholds[s.rule.strategy == MINK ? 0 : tile];
    const int lane = threadIdx.x % 32, own_warp = threadIdx.x / 32;
    const size_t n = s.d.n, begin = (size_t)tile * DROPIT_TILE;
    const size_t first = begin + own_warp * 4096 + lane * PACK_RUN; // the lane's first element
    // a tile keeps all of its ties or none, so that one comparison decides; only in one tile both occur
    const bool all_ties = t.tie_end >= begin + DROPIT_TILE, some_ties = begin < t.tie_end && !all_ties;
    unsigned words[4], counts[4], before[4]; // masks of kept elements; of lanes before this one
#pragma unroll
    for (int h = 0; h < 4; h++) {
        const size_t i = first + h * 1024;
        const Word<HASHED, true> w(s, i);
        words[h] = all_ties && t.key == 0 ? ~0u : above_mask(w.keys, t.key - all_ties);
        if (some_ties) { words[h] |= equal_mask(w.keys, t.key, 0) & below_mask<true>(i, t.tie_end); }
        words[h] &= w.valid;
        counts[h] = run_counts(words[h]);
    }
    const cg::plus<unsigned> plus;
    for (int h = 0; h < 4; h++) { before[h] = cg::exclusive_scan(warp, counts[h], plus); }
    unsigned *group_starts = starts[own_warp], start = 0;
    if (lane == 31) {
        group_starts[0] = 0;
        for (int q = 0; q < PACK_GROUPS; q++) { group_starts[q+1] = start += group(before, q) + group(counts, q); }
    }
    __syncthreads();
    const unsigned count = group_starts[PACK_GROUPS];
    unsigned run = s.rule.strategy == MINK ? s.tile_offsets[tile] : tile * s.k_tile; // of the warp
    for (int w = 0; w < own_warp; w++) { run += starts[w][PACK_GROUPS]; }
    const floatX* from = s.x + first;
    RunBits* bits_to = (RunBits*)s.d.bitmap + first / PACK_RUN;
    for (int q = 0; q < PACK_GROUPS && first % DROPIT_SEGMENT == 0; q++) {
        const size_t i = first + q * 32 * PACK_RUN;
        if (i < n) { s.d.offsets[i / DROPIT_SEGMENT] = run + group_starts[q] + group(before, q); }
    }
    if (PACK_RUN == 8 && begin + DROPIT_TILE <= n && count <= MAX_STAGED) {
        const unsigned shift = run % 8, unused = MAX_STAGED + 8 + lane; // own and to are aligned alike
        floatX *own = staged[own_warp]->v, *to = s.d.values + (run - shift);
        for (int q = 0; q < PACK_GROUPS; q++) {
            // read again, from cache: kept in registers since then, they would leave room for few warps
            const Pack<8> p = *(const Pack<8>*)(from + q * 32 * PACK_RUN);
            const RunBits bits = group(words, q);
            unsigned at = shift + group_starts[q] + group(before, q);
            bits_to[q * 32] = bits;
            for (int j = 0; j < 8; j++) {
                const unsigned bit = bits >> j & 1;
                own[bit ? at : unused] = p.v[j]; // no branches
                at += bit;
            }
        }
        __syncwarp();
        const unsigned end = shift + count;
        for (unsigned i = lane * 8; i < end; i += 32 * 8) {
            if (i >= shift && i + 8 <= end) { *(Pack<8>*)(to + i) = *(const Pack<8>*)(own + i); }
            else { for (unsigned j = max(i, shift); j < i + 8 && j < end; j++) { to[j] = own[j]; } }
        }
    } else {
        for (int q = 0; q < PACK_GROUPS; q++) {
            RunBits bits = group(words, q);
            const unsigned at = q * 32 * PACK_RUN;
            floatX* to = s.d.values + run + group_starts[q] + group(before, q);
            if ((first + at) / DROPIT_SEGMENT * DROPIT_SEGMENT < n) { bits_to[q * 32] = bits; }
            for (; bits != 0; bits &= bits - 1) { *to++ = from[at + __ffs((int)bits) - 1]; }
        }
    }
}

// out[i - begin] = i kept ? its value : 0, for begin <= i < end. A thread writes 8 elements, a warp a
// segment, whose bits before its own a thread counts. V 8: begin, end and out are aligned to 8
template <int V> __global__ void dropit_unpack_kernel(
        floatX* out, const floatX* values, const unsigned* bitmap, const unsigned* offsets, size_t begin, size_t end) {
    const size_t i = (begin / 8 + (size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i >= end) { return; }
    const size_t segment = i / DROPIT_SEGMENT;
    const unsigned at = i % DROPIT_SEGMENT / 32, word = bitmap[i / 32], byte = word >> i % 32 & 255;
    unsigned before = offsets[segment];
    for (unsigned w = 0; w < THREAD_WORDS; w++) {
        const unsigned earlier = w < at ? ~0u : w == at ? (1u << i % 32) - 1 : 0;
        before += __popc(bitmap[segment * THREAD_WORDS + w] & earlier);
    }
    const bitsX* in = (const bitsX*)values + before;
    bitsX* to = (bitsX*)out + (i - begin);
    Pack<8, bitsX> p;
    unsigned k = 0; // index in `in` of the next kept value
    for (int j = 0; j < 8; k += byte >> j & 1, j++) { // no branches: a dropped element is masked
        p.v[j] = in[k] & (0u - (byte >> j & 1));
    }
    if (V == 8) { *(Pack<8, bitsX>*)to = p; }
    else { for (int j = 0; j < 8; j++) { if (i + j >= begin && i + j < end) { to[j] = p.v[j]; } } }
}

// x[i - begin] = i kept ? itself : 0, for begin <= i < begin + n. A thread has V elements
template <bool HASHED, int V>
__global__ void dropit_mask_kernel(floatX* x, const Threshold* thresholds, size_t begin, size_t n, DropRule rule) {
    const size_t first = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (first >= n) { return; }
    const size_t i = begin + first;
    const Threshold t = thresholds[rule.strategy == MINK ? 0 : i / DROPIT_TILE];
    Pack<V> p = *(const Pack<V>*)(x + first);
    for (int j = 0; j < V; j++) {
        const unsigned key = drop_key<HASHED>(p.v[j], i + j, rule), index = (unsigned)i + j;
        p.v[j] = key > t.key || (key == t.key && index < t.tie_end) ? p.v[j] : (floatX)0.0f;
    }
    *(Pack<V>*)(x + first) = p;
}

// adds the scratch of dropit_select to the plan; the caller provides not_finite
void dropit_plan(Plan* plan, DropScratch* s, size_t tiles, size_t list) {
    const size_t m = MAX_SELECTIONS;
    plan_add(plan, SCRATCH, "search", "", "(4)", &s->search, m * sizeof(TensorSearch));
    plan_add(plan, SCRATCH, "histogram", "", "(4, 2048)", &s->histogram, m * DROPIT_BINS * 4);
    plan_add(plan, SCRATCH, "tile counts", "", "(tiles, 2)", &s->tile_counts, tiles * sizeof(uint2));
    plan_add(plan, SCRATCH, "tile offsets", "", "(tiles)", &s->tile_offsets, tiles * sizeof(unsigned));
    plan_add(plan, SCRATCH, "sample", "", "(4, 16384)", &s->sample, m * DROPIT_TILE * sizeof(floatX));
    plan_add(plan, SCRATCH, "range", "", "(4, 2)", &s->range, m * 2 * sizeof(unsigned));
    plan_add(plan, SCRATCH, "list values", "", "(list)", &s->list_values, list * sizeof(floatX));
    plan_add(plan, SCRATCH, "list indices", "", "(list)", &s->list_indices, list * sizeof(unsigned));
}

// one tensor as the kernels see it, with its own part of the scratch
Selection dropit_selection(const DropChoice* c, const DropScratch* scratch, double gamma) {
    const size_t n = c->d.n;
    // the sample has about `kept` of the k largest; the range goes 5 deviations to both sides
    const double q = (double)c->d.k / n, kept = q * DROPIT_TILE, margin = 5.0 * sqrt(kept * (1.0 - q)) + 2.0;
    const double high = kept - margin, low = kept + margin;
    return Selection{*c, *scratch, (unsigned)dropit_keep(DROPIT_TILE, gamma),
                     (unsigned)dropit_keep(n % DROPIT_TILE, gamma), 0, (unsigned)dropit_tiles(n),
                     (unsigned)(high > 0.0 ? high : 0.0), (unsigned)(low > DROPIT_TILE ? 0.0 : low),
                     dropit_list_capacity(n)};
}

// Chooses what is kept of count <= MAX_SELECTIONS tensors by one strategy: their thresholds, and bitmap,
// offsets and values where they are stored. gamma is for fastmink and random; for mink, d.k says it
void dropit_select(const DropChoice* choices, int count, const DropScratch* scratch, double gamma,
                   cudaStream_t stream) {
    const DropScratch b = *scratch;
    Selections all = {}, stored = {};
    unsigned tiles = 0, most_tiles = 0, stored_tiles = 0;
    int num_stored = 0;
    size_t list = 0;
    for (int i = 0; i < count; i++) {
        const DropScratch part = {b.search + i, b.histogram + i * DROPIT_BINS, b.tile_counts + tiles,
            b.tile_offsets + tiles, b.sample + i * DROPIT_TILE, b.range + 2 * i, b.list_values + list,
            b.list_indices + list, b.not_finite};
        Selection* s = &all.tensors[i];
        *s = dropit_selection(&choices[i], &part, gamma);
        list += align_up(s->list_capacity);
        if (s->d.offsets != NULL) {
            s->first_tile = stored_tiles, stored_tiles += s->tiles;
            stored.tensors[num_stored++] = *s;
        }
        s->first_tile = tiles, tiles += s->tiles;
        most_tiles = std::max(most_tiles, s->tiles);
    }
    const int strategy = choices[0].rule.strategy;
    if (strategy == MINK) {
        // each block ends with up to 2,048 atomic additions, so there are only as many as run at once
        const unsigned blocks = std::min(most_tiles, 16u * num_multiprocessors);
        const int digits = sizeof(floatX) == 2 ? 2 : 3; // a bf16 key has 15 bits, an fp32 key 31
        LAUNCH_BLOCKS(dropit_sample_kernel, dim3(DROPIT_TILE / 4 / 64, count), 64, stream, all);
        LAUNCH_BLOCKS(dropit_range_kernel, count, RANGE_THREADS, stream, all);
        LAUNCH_BLOCKS(dropit_candidates_kernel, tiles, DROPIT_THREADS, stream, all);
        LAUNCH_BLOCKS(dropit_start_kernel, count, 256, stream, all);
        for (int digit = 0; digit < digits; digit++) {
            LAUNCH_BLOCKS(dropit_histogram_kernel, dim3(blocks, count), DROPIT_THREADS, stream, all, digit == 0);
            LAUNCH_BLOCKS(dropit_search_kernel, count, 256, stream, all);
        }
        LAUNCH_BLOCKS(dropit_count_kernel, tiles, DROPIT_THREADS, stream, all);
        LAUNCH_BLOCKS(dropit_offsets_kernel, count, OFFSETS_THREADS, stream, all);
    } else {
        const auto kernel = strategy == RANDOM ? dropit_tile_kernel<true> : dropit_tile_kernel<false>;
        LAUNCH_BLOCKS(kernel, tiles, DROPIT_THREADS, stream, all);
    }
    if (num_stored == 0) { return; }
    const auto kernel = strategy == RANDOM ? dropit_pack_kernel<true> : dropit_pack_kernel<false>;
    LAUNCH_BLOCKS(kernel, stored_tiles, PACK_THREADS, stream, stored);
}

// out (end - begin) = elements begin .. end-1 of the tensor, with zeros for those that were dropped
void dropit_unpack(floatX* out, const Dropped* d, size_t begin, size_t end, cudaStream_t stream) {
    const size_t blocks = CEIL_DIV(CEIL_DIV(end, (size_t)8) - begin / 8, (size_t)256);
    const bool packs = vectorizable(begin | end, out);
    const auto kernel = packs ? dropit_unpack_kernel<8> : dropit_unpack_kernel<1>;
    LAUNCH_BLOCKS(kernel, blocks, 256, stream, out, d->values, d->bitmap, d->offsets, begin, end);
}

// x (end - begin) = the same, made in place of recomputed elements begin .. end-1
void dropit_mask(floatX* x, const Dropped* d, size_t begin, size_t end, DropRule rule, cudaStream_t stream) {
    const size_t n = end - begin;
    const bool hashed = rule.strategy == RANDOM, packs = !hashed && vectorizable(begin | n, x);
    const size_t blocks = CEIL_DIV(n, (size_t)256 * (packs ? VEC : 1));
    const auto kernel = hashed ? dropit_mask_kernel<true, 1> : packs ? dropit_mask_kernel<false, VEC>
                                                                     : dropit_mask_kernel<false, 1>;
    LAUNCH_BLOCKS(kernel, blocks, 256, stream, x, d->thresholds, begin, n, rule);
}
// ---- end shared: DropIT ----------------------------------------------------

// ---- shared: linear --------------------------------------------------------
// Matrix products by cuBLASLt. The plan of a product (descriptors, algorithm) is made once for each
// shape: asking for an algorithm takes longer than a small product
static cublasLtHandle_t cublaslt_handle;
#define CUBLAS_WORKSPACE ((size_t)32 << 20) // bytes; NVIDIA recommends as many for Hopper
static void* cublas_workspace;              // memory of the model's plan

typedef struct { int m, n, k, transA, transB, bias, accumulate, fp32_out; } MatmulShape;
typedef struct {
    MatmulShape shape;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t A, B, D;
    cublasLtMatmulAlgo_t algo;
} MatmulPlan;
static List<MatmulPlan> matmul_plans;

template <class T> void matmul_set(const MatmulPlan* p, cublasLtMatmulDescAttributes_t what, T value) {
    cublasCheck(cublasLtMatmulDescSetAttribute(p->desc, what, &value, sizeof(value)));
}

// the plan for a product of this shape, made at the first call
MatmulPlan* matmul_plan(const MatmulShape& s, const floatX* bias) {
    for (MatmulPlan& p : matmul_plans) { if (memcmp(&p.shape, &s, sizeof(s)) == 0) { return &p; } }
    matmul_plans.push({s, NULL, NULL, NULL, NULL, {}});
    MatmulPlan* p = matmul_plans.end() - 1;
    cublasCheck(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    matmul_set(p, CUBLASLT_MATMUL_DESC_TRANSA, s.transA ? CUBLAS_OP_T : CUBLAS_OP_N);
    matmul_set(p, CUBLASLT_MATMUL_DESC_TRANSB, s.transB ? CUBLAS_OP_T : CUBLAS_OP_N);
    if (s.bias) { // some versions of cuBLAS find an algorithm only if they know the pointer
        matmul_set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
        matmul_set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    }
    const int a = s.transA ? s.k : s.m, b = s.transB ? s.n : s.k; // rows of A and B as they are stored
    cublasCheck(cublasLtMatrixLayoutCreate(&p->A, CUDA_FLOATX, a, s.transA ? s.m : s.k, a));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->B, CUDA_FLOATX, b, s.transB ? s.k : s.n, b));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->D, s.fp32_out ? CUDA_R_32F : CUDA_FLOATX, s.m, s.n, s.m));
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    const size_t workspace = CUBLAS_WORKSPACE;
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(
        preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof(workspace)));
    cublasLtMatmulAlgoGetHeuristic(cublaslt_handle, p->desc, p->A, p->B, p->D, p->D, preference, 1, &result, &found);
    require(found > 0, "cuBLASLt has no algorithm for a product of m %d n %d k %d in " PRECISION_NAME
            "; try PRECISION=FP32", s.m, s.n, s.k);
    p->algo = result.algo;
    cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
    return p;
}

// column-major D (m, n) = op(A) (m, k) @ op(B) (k, n) + bias (m) + C (m, n). bias and C may be NULL, C
// may be D. op transposes if transA, transB say so. D is floatX, or fp32 for weight gradients.
void matmul(void* D, const floatX* A, const floatX* B, const floatX* bias, const void* C, size_t m, size_t n, size_t k,
            bool transA, bool transB, bool fp32_out) {
    const float one = 1.0f, zero = 0.0f;
    MatmulPlan* p = matmul_plan({(int)m, (int)n, (int)k, transA, transB, bias != NULL, C != NULL, fp32_out}, bias);
    if (bias != NULL) { matmul_set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias); }
    cublasCheck(cublasLtMatmul(cublaslt_handle, p->desc, &one, A, p->A, B, p->B, C != NULL ? &one : &zero,
        C != NULL ? C : D, p->D, D, p->D, &p->algo, cublas_workspace, CUBLAS_WORKSPACE, main_stream));
}

// out[r, c] += bias[c]; out (n / OC, OC). A thread has one element
__global__ void bias_add_kernel(floatX* out, const floatX* bias, size_t n, int OC) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = (floatX)((float)out[i] + (float)bias[i % OC]); }
}

// cuBLAS is column-major and sees transposes: out^T (OC, rows) = weight (OC, C) @ inp^T (C, rows)
void linear_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, const floatX* residual,
                    size_t rows, size_t C, size_t OC) {
    const bool fused = C % 8 == 0 && OC % 8 == 0; // to add a bias, cuBLASLt wants rows of whole 16 bytes
    matmul(out, weight, inp, fused ? bias : NULL, residual, OC, rows, C, true, false, false);
    if (fused) { return; }
    LAUNCH_BLOCKS(bias_add_kernel, CEIL_DIV(rows * OC, (size_t)256), 256, main_stream, out, bias, rows * OC, OC);
}
void linear_backward_input(floatX* dinp, const floatX* dout, const floatX* weight, size_t rows, size_t C, size_t OC) {
    matmul(dinp, weight, dout, NULL, NULL, C, rows, OC, false, false, false);
}
void linear_backward_weight(float* dweight, const floatX* dout, const floatX* inp, size_t rows, size_t C, size_t OC) {
    matmul(dweight, inp, dout, NULL, dweight, C, OC, rows, false, true, true);
}

// First step of sums over rows: out[slab, c] = sum of x[r, c] over the SLAB_ROWS rows r of a slab; x
// (rows, OC). A thread has V columns of one slab
template <int V> __global__ void column_sum_kernel(float* out, const floatX* x, size_t rows, int OC) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t packs = OC / V, slab = i / packs, column = i % packs * V;
    if (slab * SLAB_ROWS >= rows) { return; }
    const size_t end = min((slab + 1) * SLAB_ROWS, rows);
    float sum[V] = {0};
    for (size_t r = slab * SLAB_ROWS; r < end; r++) {
        float v[V];
        load<V>(v, x + r * OC + column);
        for (int j = 0; j < V; j++) { sum[j] += v[j]; }
    }
    store<V>(out + slab * OC + column, sum);
}

// The second: out (C), out2 (OC - C) += column sums of partial (slabs, OC). A thread has one column
__global__ void column_sum_finish_kernel(float* out, float* out2, const float* partial, size_t slabs, int C, int OC) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= OC) { return; }
    float sum = 0.0f;
#pragma unroll 16 // so that the few threads each have many loads under way
    for (size_t s = 0; s < slabs; s++) { sum += partial[s * OC + c]; }
    if (c < C) { out[c] += sum; } else { out2[c - C] += sum; }
}
void column_sum_finish(float* out, float* out2, const float* partial, size_t slabs, size_t C, size_t OC) {
    const size_t blocks = CEIL_DIV(OC, (size_t)64);
    LAUNCH_BLOCKS(column_sum_finish_kernel, blocks, 64, main_stream, out, out2, partial, slabs, C, OC);
}
size_t column_sum_scratch(size_t rows, size_t OC) { return CEIL_DIV(rows, (size_t)SLAB_ROWS) * OC; }
void column_sum(float* out, const floatX* x, float* partial, size_t rows, size_t OC) {
    const size_t slabs = CEIL_DIV(rows, (size_t)SLAB_ROWS);
    LAUNCH(column_sum_kernel, vectorizable(OC, x), slabs * OC, 64, partial, x, rows, (int)OC);
    column_sum_finish(out, NULL, partial, slabs, OC, OC);
}
// ---- end shared: linear ----------------------------------------------------

// ---- shared: loss ----------------------------------------------------------
// Softmax cross-entropy of logits (B, V) with label smoothing; its gradient replaces the logits:
//     losses[b] = (1 - smoothing) * -log p[label] + smoothing * mean(-log p),   p = softmax(logits[b])
//     logits[b] = (p - (1 - smoothing) * onehot(label) - smoothing / V) * scale
// in PyTorch: F.cross_entropy(logits, labels, label_smoothing=smoothing). If lam < 1, image b is mixed
// with image B-1-b: -log p[label] and onehot(label) are lam times those of labels[b] plus 1 - lam times
// those of labels[B-1-b], as in timm's SoftTargetCrossEntropy. ranks[b] = classes before the label (of
// larger weight) by logit, then by index; a NaN counts too. losses, ranks, labels (B)
#define LOSS_LANES 8 // that share a row
__global__ void cross_entropy_kernel(float* losses, int* ranks, floatX* logits, const int* labels, int B, int V,
                                     float smoothing, float lam, float scale) {
    auto lanes = cg::tiled_partition<LOSS_LANES>(cg::this_thread_block());
    const int b = blockIdx.x * (blockDim.x / LOSS_LANES) + threadIdx.x / LOSS_LANES;
    if (b >= B) { return; }
    const int lane = lanes.thread_rank(), first = labels[b], second = lam < 1.0f ? labels[B - 1 - b] : first;
    const int label = lam < 0.5f ? second : first;
    floatX* row = logits + (size_t)b * V;
    const float correct = (float)row[label];
    const float mixed = lam * (float)row[first] + (1.0f - lam) * (float)row[second];
    const float weight = (1.0f - smoothing) * lam, second_weight = (1.0f - smoothing) * (1.0f - lam);
    float largest = -INFINITY, sum = 0.0f, logit_sum = 0.0f;
    int before = 0;
    for (int v = lane; v < V; v += LOSS_LANES) {
        const float x = (float)row[v];
        largest = fmaxf(largest, x);
        logit_sum += x;
        before += v < label ? !(x < correct) : v > label ? !(x <= correct) : 0;
    }
    largest = cg::reduce(lanes, largest, cg::greater<float>());
    for (int v = lane; v < V; v += LOSS_LANES) { sum += expf((float)row[v] - largest); }
    sum = cg::reduce(lanes, sum, cg::plus<float>());
    logit_sum = cg::reduce(lanes, logit_sum, cg::plus<float>());
    before = cg::reduce(lanes, before, cg::plus<int>());
    const float lse = largest + logf(sum);
    lanes.sync(); // all must have read the labels' logits before one overwrites them
    for (int v = lane; v < V; v += LOSS_LANES) {
        const float one = v == first ? weight : 0.0f, other = v == second ? second_weight : 0.0f;
        row[v] = (floatX)((expf((float)row[v] - lse) - one - other - smoothing / V) * scale);
    }
    if (lane > 0) { return; }
    losses[b] = (1.0f - smoothing) * (lse - mixed) + smoothing * (lse - logit_sum / V);
    ranks[b] = before;
}

// sums += losses, images whose label is the best class, images where it is one of the best 5. One block:
// a thread adds up every 64th image, then thread 0 adds up the threads in order
__global__ void loss_sum_kernel(StepResult* result, const float* losses, const int* ranks, int B) {
    __shared__ double sums[64][3];
    double* own = sums[threadIdx.x];
    own[0] = own[1] = own[2] = 0.0;
    for (int b = threadIdx.x; b < B; b += 64) {
        own[0] += losses[b];
        own[1] += ranks[b] < 1;
        own[2] += ranks[b] < 5;
    }
    __syncthreads();
    for (int k = 0; threadIdx.x == 0 && k < 3 * 64; k++) { result->sums[k % 3] += sums[k / 3][k % 3]; }
}

// cross_entropy_kernel, and its losses and ranks added to the sums of the step
void cross_entropy(StepResult* result, float* losses, int* ranks, floatX* logits, const int* labels, int B, int V,
                   float smoothing, float lam, float scale) {
    const int blocks = CEIL_DIV(B, 64 / LOSS_LANES);
    cross_entropy_kernel<<<blocks, 64, 0, main_stream>>>(losses, ranks, logits, labels, B, V, smoothing, lam, scale);
    LAUNCH_BLOCKS(loss_sum_kernel, 1, 64, main_stream, result, losses, ranks, B);
}
// ---- end shared: loss ------------------------------------------------------

// ---- shared: optimizer -----------------------------------------------------
// partial[block] = sum over its elements of x^2, in a fixed order; x (n), partial (NORM_BLOCKS)
#define NORM_BLOCKS 256
__global__ void sum_squares_kernel(double* partial, const float* x, size_t n) {
    __shared__ double sums[4]; // of the warps
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    double sum = 0.0;
    const size_t stride = (size_t)gridDim.x * blockDim.x * 4;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n; i += stride) {
        const float4 v = *(const float4*)(x + i);
        sum += (double)(v.x * v.x + v.y * v.y) + (double)(v.z * v.z + v.w * v.w);
    }
    sum = cg::reduce(warp, sum, cg::plus<double>());
    if (warp.thread_rank() == 0) { sums[threadIdx.x / 32] = sum; }
    __syncthreads();
    if (threadIdx.x == 0) { partial[blockIdx.x] = sums[0] + sums[1] + sums[2] + sums[3]; }
}

__global__ void norm_kernel(StepResult* result, const double* partial) {
    double sum = 0.0;
    for (int b = 0; b < NORM_BLOCKS; b++) { sum += partial[b]; }
    result->norm = (float)sqrt(sum);
}

// result->norm = L2 norm of grads (n), n a multiple of 4, as torch.nn.utils.clip_grad_norm_ returns it
void gradient_norm(StepResult* result, double* partial, const float* grads, size_t n) {
    LAUNCH_BLOCKS(sum_squares_kernel, NORM_BLOCKS, 128, main_stream, partial, grads, n);
    LAUNCH_BLOCKS(norm_kernel, 1, 1, main_stream, result, partial);
}

__device__ inline float clip_factor(const StepResult* result, float clip) {
    return clip > 0.0f ? fminf(1.0f, clip / (result->norm + 1e-6f)) : 1.0f;
}

// AdamW (Loshchilov and Hutter, ICLR 2019) as torch.optim.AdamW; fixN is 1 - betaN^step:
//     m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g^2,  g = clipped gradient
//     w = w * (1 - lr * weight_decay) - lr / fix1 * m / (sqrt(v) / sqrt(fix2) + eps)
// w is master (n), params (n) are w rounded; in fp32 they are the same. A thread updates VEC of them.
__global__ void adamw_kernel(
        floatX* params, float* master, float* m, float* v, const float* grads, size_t n, const StepResult* result,
        float clip, float lr, float beta1, float beta2, float fix1, float fix2, float eps, float weight_decay) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) { return; }
    float g[VEC], mi[VEC], vi[VEC], w[VEC];
    const float factor = clip_factor(result, clip);
    load<VEC>(g, grads + i), load<VEC>(mi, m + i), load<VEC>(vi, v + i), load<VEC>(w, master + i);
    for (int j = 0; j < VEC; j++) {
        const float gj = g[j] * factor;
        mi[j] = beta1 * mi[j] + (1.0f - beta1) * gj;
        vi[j] = beta2 * vi[j] + (1.0f - beta2) * gj * gj;
        const float scale = sqrtf(vi[j]) / sqrtf(fix2) + eps;
        w[j] = w[j] * (1.0f - lr * weight_decay) - lr / fix1 * mi[j] / scale;
    }
    store<VEC>(m + i, mi), store<VEC>(v + i, vi), store<VEC>(master + i, w);
    store<VEC>(params + i, w);
}

// SGD with momentum as torch.optim.SGD, with w and g as in AdamW:
//     g += weight_decay * w,  m = momentum * m + g,  w -= lr * m; Nesterov: w -= lr * (g + momentum * m)
__global__ void sgd_kernel(floatX* params, float* master, float* m, const float* grads, size_t n,
        const StepResult* result, float clip, float lr, float momentum, float weight_decay, bool nesterov) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) { return; }
    float g[VEC], mi[VEC], w[VEC];
    const float factor = clip_factor(result, clip);
    load<VEC>(g, grads + i), load<VEC>(mi, m + i), load<VEC>(w, master + i);
    for (int j = 0; j < VEC; j++) {
        const float gj = g[j] * factor + weight_decay * w[j];
        mi[j] = momentum * mi[j] + gj;
        w[j] -= lr * (nesterov ? gj + momentum * mi[j] : mi[j]);
    }
    store<VEC>(m + i, mi), store<VEC>(master + i, w), store<VEC>(params + i, w);
}

// updates n parameters, a multiple of VEC, of one weight decay; step counts from 1
void optimizer_update(floatX* params, float* master, float* m, float* v, const float* grads, size_t n,
                      const StepResult* result, OptimizerConfig o, double lr, int step) {
    assert(n % VEC == 0);
    const size_t blocks = CEIL_DIV(n, (size_t)256 * VEC);
    if (o.adamw) {
        const double fix1 = 1.0 - pow(o.beta1, step), fix2 = 1.0 - pow(o.beta2, step);
        LAUNCH_BLOCKS(adamw_kernel, blocks, 256, main_stream, params, master, m, v, grads, n, result, o.clip, lr,
            o.beta1, o.beta2, fix1, fix2, o.eps, o.weight_decay);
    } else {
        LAUNCH_BLOCKS(sgd_kernel, blocks, 256, main_stream, params, master, m, grads, n, result, o.clip, lr,
            o.momentum, o.weight_decay, o.nesterov);
    }
}

// ema = decay * ema + rest * w, the average of weights over steps, with rest = 1 - decay, rounded in the
// order of timm's ModelEma; ema, w (n), n a multiple of VEC. A thread updates VEC elements
__global__ void ema_kernel(float* ema, const float* w, size_t n, float decay, float rest) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) { return; }
    float e[VEC], v[VEC];
    load<VEC>(e, ema + i), load<VEC>(v, w + i);
    for (int j = 0; j < VEC; j++) { e[j] = e[j] * decay + rest * v[j]; }
    store<VEC>(ema + i, e);
}
void ema_update(float* ema, const float* w, size_t n, double decay) {
    LAUNCH_BLOCKS(ema_kernel, CEIL_DIV(n, (size_t)256 * VEC), 256, main_stream, ema, w, n, decay, 1.0 - decay);
}

// out = in, rounded to floatX; out, in (n), n a multiple of VEC. A thread rounds VEC elements
__global__ void round_kernel(floatX* out, const float* in, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) { return; }
    float v[VEC];
    load<VEC>(v, in + i);
    store<VEC>(out + i, v);
}

// Learning rate of a step, counted from 0: linear warm-up from warmup_lr to lr, half a cosine to min_lr.
// By steps, step t of the warm-up has gone (t + 1) / warmup of the way, and the cosine begins after it.
// By epochs, as timm's CosineLRScheduler(t_initial=length, warmup_t=warmup, warmup_lr_init=warmup_lr,
// lr_min=min_lr), with step(epoch) after each epoch, as in DeiT's main.py: epoch e has timm's rate of e-1
double learning_rate_at(const Schedule* s, int step) {
    const int epoch = step / s->epoch_steps, t = !s->by_epochs ? step : epoch > 0 ? epoch - 1 : 0;
    const int done = s->by_epochs ? t : t + 1, begin = s->by_epochs ? 0 : s->warmup;
    const int cosine = s->length > begin ? s->length - begin : 1; // its length
    if (t < s->warmup) { return s->warmup_lr + (s->lr - s->warmup_lr) * done / s->warmup; }
    if (t >= s->length) { return s->min_lr; }
    return s->min_lr + 0.5 * (s->lr - s->min_lr) * (1.0 + cos(M_PI * (t - begin) / cosine));
}
// ---- end shared: optimizer -------------------------------------------------

// ---- shared: several GPUs --------------------------------------------------
// Data parallel: NCCL adds up the ranks' gradients on a stream of its own, layer by layer, while the
// backward pass goes on. MPI starts the ranks and adds up what is printed
#ifdef MULTI_GPU
static cudaStream_t reduce_stream;
static cudaEvent_t gradients_ready, gradients_reduced;
static ncclComm_t nccl_comm;

// joins the other ranks and chooses this rank's GPU; only rank 0 goes on printing
static void ranks_join(int devices) {
    MPI_Comm node;
    ncclUniqueId id;
    int local_rank;
    float* probe;
    mpiCheck(MPI_Init(NULL, NULL));
    mpiCheck(MPI_Comm_rank(MPI_COMM_WORLD, &rank));
    mpiCheck(MPI_Comm_size(MPI_COMM_WORLD, &num_ranks));
    mpiCheck(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node));
    mpiCheck(MPI_Comm_rank(node, &local_rank));
    mpiCheck(MPI_Comm_free(&node));
    cudaCheck(cudaSetDevice(local_rank % devices));
    if (rank == 0) { ncclCheck(ncclGetUniqueId(&id)); }
    mpiCheck(MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, MPI_COMM_WORLD));
    ncclCheck(ncclCommInitRank(&nccl_comm, num_ranks, id, rank));
    // NCCL allocates its buffers with the first sum: this one comes before the free memory is read
    cudaCheck(cudaMalloc((void**)&probe, sizeof(float)));
    cudaCheck(cudaMemset(probe, 0, sizeof(float)));
    ncclCheck(ncclAllReduce(probe, probe, 1, ncclFloat, ncclSum, nccl_comm, 0));
    cudaCheck(cudaDeviceSynchronize());
    cudaCheck(cudaFree(probe));
    cudaCheck(cudaStreamCreateWithFlags(&reduce_stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&gradients_ready, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&gradients_reduced, cudaEventDisableTiming));
    require(rank == 0 || freopen("/dev/null", "w", stdout) != NULL, "rank %d cannot open /dev/null: %m", rank);
}

void ranks_close(void) {
    int started;
    if (num_ranks > 1) { ncclCheck(ncclCommDestroy(nccl_comm)); }
    mpiCheck(MPI_Initialized(&started));
    if (started) { mpiCheck(MPI_Finalize()); }
}

void ranks_add(const List<Piece>& pieces) {
    if (num_ranks == 1) { return; }
    cudaCheck(cudaEventRecord(gradients_ready, main_stream));
    cudaCheck(cudaStreamWaitEvent(reduce_stream, gradients_ready, 0));
    ncclCheck(ncclGroupStart());
    for (const Piece& p : pieces) {
        ncclCheck(ncclAllReduce(p.data, p.data, p.n, ncclFloat, ncclSum, nccl_comm, reduce_stream));
    }
    ncclCheck(ncclGroupEnd());
    cudaCheck(cudaEventRecord(gradients_reduced, reduce_stream));
}
void ranks_wait(void) {
    if (num_ranks > 1) { cudaCheck(cudaStreamWaitEvent(main_stream, gradients_reduced, 0)); }
}
void ranks_gather(void* full, const void* part, size_t bytes) {
    ncclCheck(ncclAllGather(part, full, bytes, ncclUint8, nccl_comm, main_stream));
}
void ranks_broadcast(void* device, size_t bytes) {
    if (num_ranks > 1) { ncclCheck(ncclBroadcast(device, device, bytes, ncclUint8, 0, nccl_comm, main_stream)); }
}

// in the order of the ranks: the same sums on all
void ranks_sum(double* values, int n) {
    if (num_ranks == 1) { return; }
    double* all = host_new<double>(numel(num_ranks, n), "sums");
    mpiCheck(MPI_Allgather(values, n, MPI_DOUBLE, all, n, MPI_DOUBLE, MPI_COMM_WORLD));
    memset(values, 0, n * sizeof(double));
    for (int i = 0; i < n * num_ranks; i++) { values[i % n] += all[i]; }
    free(all);
}

void ranks_agree(uint32_t value, const char* what) {
    if (num_ranks == 1) { return; }
    uint32_t first = value;
    mpiCheck(MPI_Bcast(&first, sizeof(first), MPI_BYTE, 0, MPI_COMM_WORLD));
    require(value == first, "the %s of rank %d are not those of rank 0 (%08x, %08x)", what, rank, value, first);
    mpiCheck(MPI_Barrier(MPI_COMM_WORLD)); // rank 0, too, goes on only when all agree
}
#else
static void ranks_join(int) {
    const char* ranks = getenv("OMPI_COMM_WORLD_SIZE");
    require(ranks != NULL && strcmp(ranks, "1") == 0, "this program was built without NCCL and MPI and "
            "cannot run on several GPUs; `make` says what it misses");
    cudaCheck(cudaSetDevice(0));
}
void ranks_close(void) {}
void ranks_add(const List<Piece>&) {}
void ranks_wait(void) {}
void ranks_gather(void*, const void*, size_t) {}
void ranks_broadcast(void*, size_t) {}
void ranks_sum(double*, int) {}
void ranks_agree(uint32_t, const char*) {}
#endif

void device_open(void) {
    int device, devices = 0;
    cudaDeviceProp properties;
    const bool started = getenv("OMPI_COMM_WORLD_SIZE") || getenv("PMI_SIZE") || getenv("PMIX_RANK");
    const char* tasks = getenv("SLURM_STEP_NUM_TASKS"); // without PMIx, each would train alone
    require(started || tasks == NULL || atoi(tasks) <= 1, "%s tasks were started by srun but cannot "
            "find each other; start with srun --mpi=pmix", tasks);
    require(cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0,
            "no CUDA device was found; build with `make DEVICE=cpu` to run on the CPU");
    if (started) { ranks_join(devices); } else { cudaCheck(cudaSetDevice(0)); }
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaGetDeviceProperties(&properties, device));
    require(sizeof(floatX) == 4 || properties.major >= 8, "%s has compute capability %d.%d, bf16 needs 8.0; "
            "build with `make PRECISION=FP32`", properties.name, properties.major, properties.minor);
    num_multiprocessors = properties.multiProcessorCount;
    cudaCheck(cudaStreamCreate(&main_stream));
    cublasCheck(cublasCreate(&cublas_handle));
    cublasCheck(cublasSetStream(cublas_handle, main_stream));
    cublasCheck(cublasLtCreate(&cublaslt_handle));
    printf("device: %s, " PRECISION_NAME, properties.name);
    printf(num_ranks > 1 ? ", %d ranks\n" : "\n", num_ranks);
}
// ---- end shared: several GPUs ----------------------------------------------

// ---- shared: random --------------------------------------------------------
// dev/reference/rng.py has the same
__host__ __device__ inline uint4 philox(unsigned long long seed, unsigned purpose, unsigned step,
                                        unsigned long long i) {
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    unsigned c0 = (unsigned)i, c1 = (unsigned)(i >> 32), c2 = step, c3 = purpose;
    for (int round = 0; round < 10; round++) {
        const unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        const unsigned h0 = (unsigned)(p0 >> 32), h1 = (unsigned)(p1 >> 32);
        c0 = h1 ^ c1 ^ k0;
        c2 = h0 ^ c3 ^ k1;
        c1 = (unsigned)p1;
        c3 = (unsigned)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

double uniform(unsigned u) { return (u + 0.5) / 4294967296.0; }
double normal(uint4 u) { return sqrt(-2.0 * log(uniform(u.x))) * cos(2.0 * M_PI * uniform(u.y)); }
int draw_below(unsigned u, int n) { return (int)((unsigned long long)u * n >> 32); }

// perm = a permutation of 0..n-1 (Fisher and Yates) that depends on seed and epoch alone
void shuffle(unsigned* perm, unsigned n, unsigned long long seed, unsigned epoch) {
    for (unsigned i = 0; i < n; i++) { perm[i] = i; }
    for (unsigned i = n; i-- > 1; ) {
        const uint4 u = philox(seed, RNG_SHUFFLE, epoch, i);
        std::swap(perm[i], perm[((unsigned long long)u.y << 32 | u.x) % (i + 1)]);
    }
}
// ---- end shared: random ----------------------------------------------------

// ---- shared: memory plan ---------------------------------------------------
// A line of the plan: one tensor, or one copy of it
struct Allocation {
    const char *name, *part, *shape;
    int category, owner; // owner: number of the line whose memory this one uses; its own, unless it shares
    bool cleared;
    size_t bytes, dense; // of memory of its own; without DropIT and recomputation, 0: not counted
    void** pointer;
};

template <class T> void plan_add(Plan* plan, int category, const char* name, const char* part,
                                 const char* shape, T** pointer, size_t bytes, size_t dense, T** shared) {
    int owner = plan->lines.n;
    for (const Allocation& a : plan->lines) { if (shared != NULL && a.pointer == (void**)shared) { owner = a.owner; } }
    assert(shared == NULL || (owner < plan->lines.n && plan->lines.of[owner].category == category));
    plan->lines.push({name, part, shape, category, owner, false, 0, dense, (void**)pointer});
    size_t* had = &plan->lines.of[owner].bytes;
    const size_t more = std::max(align_up(bytes), *had) - *had;
    *had += more;
    plan->bytes[category] += more;
}

void plan_clear(Plan* plan) { plan->lines.of[plan->lines.n - 1].cleared = true; }
size_t plan_total(const Plan* plan) {
    size_t total = 0;
    for (size_t bytes : plan->bytes) { total += bytes; }
    return total;
}

// sets every pointer of the plan; the caller has made sure that plan_total() bytes are free
void plan_allocate(Plan* plan) {
    char* next[NUM_CATEGORIES] = {};
    for (int c = 0; c < NUM_CATEGORIES; c++) {
        if (plan->bytes[c] == 0) { continue; }
        cudaCheck(cudaMalloc((void**)&next[c], plan->bytes[c]));
        if (c != CACHED && c != SCRATCH) { cudaCheck(cudaMemsetAsync(next[c], 0, plan->bytes[c], main_stream)); }
        plan->blocks[c] = next[c];
    }
    for (const Allocation& a : plan->lines) { // a line shares with one before it
        const Allocation* owner = &plan->lines.of[a.owner];
        *a.pointer = owner != &a ? *owner->pointer : a.bytes > 0 ? next[a.category] : NULL;
        if (a.cleared && a.bytes > 0) { cudaCheck(cudaMemsetAsync(*a.pointer, 0, a.bytes, main_stream)); }
        next[a.category] += a.bytes;
    }
}

void plan_print(const Plan* plan) {
    const char* row = "| %-22s | %-10s | %-22s | %10.2f | %10.2f |\n";
    size_t all[NUM_CATEGORIES] = {0};
    printf("| %-22s | %-10s | %-22s | %10s | %10s |\n", "tensor", "memory", "shape", "dense MiB", "kept MiB");
    for (const Allocation& first : plan->lines) {
        size_t bytes = 0, dense = 0;
        bool printed = false; // with a line before, of the same name and part
        char name[64];
        for (const Allocation& a : plan->lines) {
            if (strcmp(a.name, first.name) != 0 || strcmp(a.part, first.part) != 0) { continue; }
            printed = printed || &a < &first;
            bytes += a.bytes;
            dense += a.dense;
        }
        snprintf(name, sizeof(name), "%s%s", first.name, first.part);
        if (!printed) { printf(row, name, category_names[first.category], first.shape, dense / MiB, bytes / MiB); }
        all[first.category] += first.dense;
    }
    for (int c = 0; c < NUM_CATEGORIES; c++) {
        printf(row, "all", category_names[c], "", all[c] / MiB, plan->bytes[c] / MiB);
    }
}
// ---- end shared: memory plan -----------------------------------------------

// ---- shared: files ---------------------------------------------------------
// Everything that a file claims is checked against its size before it is used

// CRC-32 as in zlib and PNG (polynomial 0xEDB88320) of n more bytes; crc: of the bytes before, first 0.
// table[t][b] is what byte b does to the checksum when t zero bytes follow it, so that eight bytes are
// one step. The first call fills it and must be made before there are threads
uint32_t crc_32(uint32_t crc, const void* data, size_t n) {
    static uint32_t table[8][256];
    for (uint32_t i = 0; i < 8 * 256 && table[7][255] == 0; i++) {
        uint32_t c = i < 256 ? i : table[i / 256 - 1][i % 256];
        for (int bit = 0; bit < 8; bit++) { c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1; }
        table[i / 256][i % 256] = c;
    }
    const uint8_t* p = (const uint8_t*)data;
    crc = ~crc;
    for (uint64_t x; n >= 8; n -= 8, p += 8) {
        memcpy(&x, p, 8);
        x ^= crc;
        crc = 0;
        for (int t = 0; t < 8; t++) { crc ^= table[7-t][x >> (8 * t) & 255]; }
    }
    for (; n > 0; n--, p++) { crc = table[0][(crc ^ *p) & 255] ^ (crc >> 8); }
    return ~crc;
}

typedef struct { const char* path; const uint8_t* data; size_t bytes; } MappedFile;

// Maps a whole file into memory, to be read only. hint: what the user can do when there is no such file
MappedFile map_file(const char* path, const char* hint) {
    const int fd = open(path, O_RDONLY);
    require(fd >= 0, "cannot open %s: %s; %s", path, strerror(errno), hint);
    struct stat info;
    require(fstat(fd, &info) == 0 && S_ISREG(info.st_mode), "%s is not a regular file; %s", path, hint);
    const size_t bytes = (size_t)info.st_size;
    require(bytes > 0, "%s is empty; %s", path, hint);
    void* data = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    require(data != MAP_FAILED, "cannot map %s (%zu bytes): %m", path, bytes);
    close(fd);
    return MappedFile{path, (const uint8_t*)data, bytes};
}

// A safetensors file is the length of its header (u64), a header in JSON, and the tensors' data. JSON:
// {"NAME": {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, "__metadata__": {KEY: VALUE}}.
// Unknown fields, duplicate names, data that overlap, leave holes or do not end the file are refused.
// Files of our own have the metadata crc32: the checksum of the file with zeros for its eight digits
enum { ST_MAX_DIMS = 8, ST_MAX_METADATA = 128 };
#define ST_BEFORE_DIGITS "{\"__metadata__\":{\"crc32\":\"" // how the header of a file of our own begins
typedef struct {
    char name[96], dtype[8];
    size_t shape[ST_MAX_DIMS], begin, end; // its data, in bytes from where all data begin
    int dims;
    const void* data;
} StTensor;

struct Safetensors {
    MappedFile file;
    List<StTensor> tensors; // in the order of their data
    List<StMetadata> metadata;
    size_t data_offset, at; // where the header ends and the data begin; the byte that is parsed next
};

void st_check(const Safetensors* st, bool valid, const char* what) {
    require(valid, "%s is not a valid safetensors file: %s near byte %zu; write it again", st->file.path, what, st->at);
}

// the character that comes next, -1 behind the header
int st_peek(const Safetensors* st) { return st->at < st->data_offset ? st->file.data[st->at] : -1; }
void st_skip_space(Safetensors* st) {
    while (st_peek(st) > 0 && strchr(" \t\r\n", st_peek(st)) != NULL) { st->at++; }
}

// skips white space; takes c and returns true if it comes next
bool st_take(Safetensors* st, char c) {
    st_skip_space(st);
    const bool found = st_peek(st) == (uint8_t)c;
    st->at += found;
    return found;
}
void st_expect(Safetensors* st, char c) {
    char what[] = "expected '?'";
    what[10] = c;
    st_check(st, st_take(st, c), what);
}

// Is there an element i in the list between two brackets, "[]" or "{}"? A loop over i reads one in each
// round. This takes the bracket before the first element, and the comma or bracket behind each
bool st_element(Safetensors* st, const char* brackets, int i) {
    if (i == 0) { st_expect(st, brackets[0]); }
    if (i == 0 ? !st_take(st, brackets[1]) : st_take(st, ',')) { return true; }
    if (i > 0) { st_expect(st, brackets[1]); }
    return false;
}

// reads a string of less than `size` bytes, with the escapes \", \\ and \/: names need no others
void st_string(Safetensors* st, char* out, size_t size) {
    st_expect(st, '"');
    size_t n = 0;
    for (int c; (c = st_peek(st)) != '"' && c >= 0; ) {
        st->at++;
        if (c == '\\') {
            c = st_peek(st);
            st_check(st, c == '"' || c == '\\' || c == '/', "unsupported escape");
            st->at++;
        }
        st_check(st, c >= 32, "control character in a string");
        st_check(st, n + 1 < size, "string too long");
        out[n++] = (char)c;
    }
    out[n] = 0;
    st_expect(st, '"');
}

// reads a list of at most `most` numbers, returns how many
int st_numbers(Safetensors* st, size_t* out, int most) {
    int n = 0;
    for (; st_element(st, "[]", n); n++) {
        st_check(st, n < most, "too many numbers in a list");
        st_skip_space(st);
        size_t v = 0, start = st->at;
        for (int c; (c = st_peek(st)) >= '0' && c <= '9'; st->at++) {
            st_check(st, v <= (SIZE_MAX - (c - '0')) / 10, "number too large");
            v = v * 10 + (c - '0');
        }
        st_check(st, st->at > start, "expected a number");
        out[n] = v;
    }
    return n;
}

// reads the description of a tensor, whose name has been read
void st_tensor(Safetensors* st, StTensor* t) {
    int fields = 0; // a bit for each that it has
    size_t range[2] = {0};
    for (int i = 0; st_element(st, "{}", i); i++) {
        char key[24];
        st_string(st, key, sizeof(key));
        st_expect(st, ':');
        const int field = strcmp(key, "dtype") == 0 ? 1 : strcmp(key, "shape") == 0 ? 2 : 4;
        fields |= field;
        st_check(st, field < 4 || strcmp(key, "data_offsets") == 0, "unknown field of a tensor");
        if (field == 1) { st_string(st, t->dtype, sizeof(t->dtype)); }
        else if (field == 2) { t->dims = st_numbers(st, t->shape, ST_MAX_DIMS); }
        else { st_check(st, st_numbers(st, range, 2) == 2, "data_offsets are not two numbers"); }
    }
    st_check(st, fields == 7, "a tensor lacks dtype, shape or data_offsets");
    t->begin = range[0];
    t->end = range[1];
}

// text = CRC-32 of a file whose eight bytes at `digits` count as zeros in text
void crc_without_digits(char text[9], const MappedFile* file, size_t digits) {
    const uint32_t crc = crc_32(crc_32(0, file->data, digits), "00000000", 8);
    snprintf(text, 9, "%08x", crc_32(crc, file->data + digits + 8, file->bytes - digits - 8));
}

void st_metadata(Safetensors* st) {
    for (int i = 0; st_element(st, "{}", i); i++) {
        StMetadata m;
        st_check(st, st->metadata.n < ST_MAX_METADATA, "too many metadata entries");
        st_string(st, m.key, sizeof(m.key));
        st_expect(st, ':');
        st_string(st, m.value, sizeof(m.value));
        st->metadata.push(m);
        if (strcmp(m.key, "crc32") != 0) { continue; }
        const size_t at = st->at - 9; // before the digits and their closing quote
        const bool eight = strlen(m.value) == 8 && memcmp(st->file.data + at, m.value, 8) == 0;
        st_check(st, eight, "crc32 is not of eight digits");
        char actual[9];
        crc_without_digits(actual, &st->file, at);
        require(strcmp(actual, m.value) == 0, "%s has the checksum %s, its header says %s: it is "
                "damaged; take another copy", st->file.path, actual, m.value);
    }
}

// elements of a tensor; SIZE_MAX: more than a size_t can count
size_t st_numel(const StTensor* t) {
    size_t n = 1;
    for (int i = 0; i < t->dims; i++) { if (__builtin_mul_overflow(n, t->shape[i], &n)) { return SIZE_MAX; } }
    return n;
}

// NULL: there is no such tensor
const StTensor* safetensors_find(const Safetensors* st, const char* name) {
    for (const StTensor& t : st->tensors) { if (strcmp(t.name, name) == 0) { return &t; } }
    return NULL;
}
bool safetensors_has(const Safetensors* st, const char* name) { return safetensors_find(st, name) != NULL; }

// in the order of their offsets, the tensors must follow one another from first to last byte
void st_check_tensors(Safetensors* st) {
    static const struct { const char* name; size_t bytes; } types[] = {{"F64", 8}, {"I64", 8},
        {"F32", 4}, {"I32", 4}, {"F16", 2}, {"BF16", 2}, {"U8", 1}, {"I8", 1}, {"BOOL", 1}};
    const char* path = st->file.path;
    std::stable_sort(st->tensors.begin(), st->tensors.end(), [](const StTensor& a, const StTensor& b) {
        return a.begin < b.begin || (a.begin == b.begin && a.end < b.end);
    });
    size_t end = 0, bytes = st->file.bytes - st->data_offset;
    for (StTensor& t : st->tensors) {
        size_t size = 0, n = st_numel(&t); // size: of an element
        for (const auto& type : types) { if (strcmp(type.name, t.dtype) == 0) { size = type.bytes; } }
        require(size > 0, "%s: tensor %s has the unknown type %s", path, t.name, t.dtype);
        const bool within = t.begin == end && t.end >= end && t.end <= bytes;
        require(within && n <= bytes / size && t.end - t.begin == n * size, "%s: tensor %s claims bytes "
                "%zu to %zu of %zu, expected %zu bytes from %zu (offsets overlap, leave a hole or lie "
                "outside); write the file again", path, t.name, t.begin, t.end, bytes, n * size, end);
        t.data = st->file.data + st->data_offset + end;
        end = t.end;
        require(safetensors_find(st, t.name) == &t, "%s: tensor %s appears twice", path, t.name);
    }
    require(end == bytes, "%s: its tensors end at byte %zu, its data at %zu; write the file again", path, end, bytes);
}

// NULL: there is no such entry
const char* safetensors_metadata(const Safetensors* st, const char* key) {
    for (const StMetadata& m : st->metadata) { if (strcmp(m.key, key) == 0) { return m.value; } }
    return NULL;
}

Safetensors* safetensors_open(const char* path) {
    Safetensors* st = host_new<Safetensors>(1, "a safetensors header");
    st->file = map_file(path, "give the path of a .safetensors file");
    const size_t bytes = st->file.bytes;
    require(bytes >= 8, "%s has %zu bytes, too few for a safetensors file", path, bytes);
    const uint64_t length = *(const uint64_t*)st->file.data;
    require(length <= bytes - 8 && length <= 100000000, "%s: the safetensors header claims %zu bytes, "
            "the file has %zu; it is truncated or of another format", path, length, bytes);
    st->data_offset = (st->at = 8) + length;
    for (int i = 0; st_element(st, "{}", i); i++) {
        StTensor t = {};
        st_string(st, t.name, sizeof(t.name));
        st_expect(st, ':');
        if (strcmp(t.name, "__metadata__") == 0) { st_metadata(st); continue; }
        st_tensor(st, &t);
        st->tensors.push(t);
    }
    st_skip_space(st);
    st_check(st, st->at == st->data_offset, "text after the header");
    // a checkpoint names its run, and is always written with a checksum
    require(safetensors_metadata(st, "run") == NULL || safetensors_metadata(st, "crc32") != NULL,
            "%s is of a checkpoint, but its checksum is gone: it is damaged; take another copy", path);
    st_check_tensors(st);
    return st;
}

void safetensors_close(Safetensors* st) {
    munmap((void*)st->file.data, st->file.bytes);
    free(st->metadata.of);
    free(st->tensors.of);
    free(st);
}

void path_in(char path[PATH_MAX], const char* directory, const char* name) {
    const bool fits = snprintf(path, PATH_MAX, "%s/%s", directory, name) < PATH_MAX;
    require(fits, "the name of the directory is too long: %.80s...", directory);
}

typedef struct { const void* data; size_t bytes; } FilePart;

// Writes a file so that `path` is whole or as before, whatever happens: to another name, synced, renamed
void write_file(const char* path, const List<FilePart>& parts) {
    char temporary[PATH_MAX + 4];
    snprintf(temporary, sizeof(temporary), "%s.tmp", path);
    const int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    bool written = fd >= 0;
    for (const FilePart& part : parts) {
        for (size_t at = 0; written && at < part.bytes; ) {
            const ssize_t n = write(fd, (const char*)part.data + at, part.bytes - at);
            if (n > 0) { at += (size_t)n; } else if (n == 0 || errno != EINTR) { written = false; }
        }
    }
    if (!written || fsync(fd) != 0 || close(fd) != 0 || rename(temporary, path) != 0) {
        const char* reason = strerror(errno);
        unlink(temporary);
        fail("cannot write %s: %s; what was written before is whole. Make room or choose another "
             "directory", path, reason);
    }
    const int directory = open(dirname(temporary), O_RDONLY); // without its sync a rename may be lost
    fsync(directory);
    close(directory);
}

// Writes float32 tensors, of which name, shape, dims and data are read, with metadata and crc32
void safetensors_write(const char* path, const List<StMetadata>& metadata, const List<StTensor>& tensors) {
    char *header = NULL, digits[9];
    size_t length = 0, offset = 0;
    FILE* f = open_memstream(&header, &length);
    require(f != NULL, "out of host memory for the header of %s", path);
    List<FilePart> parts = {};
    parts.push({&length, sizeof(uint64_t)});
    parts.push({NULL, 0}); // the header, once it is there
    fprintf(f, ST_BEFORE_DIGITS "00000000\"");
    for (const StMetadata& m : metadata) { fprintf(f, ",\"%s\":\"%s\"", m.key, m.value); }
    fprintf(f, "}");
    for (const StTensor& t : tensors) {
        const size_t bytes = st_numel(&t) * sizeof(float);
        parts.push({t.data, bytes});
        fprintf(f, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", t.name);
        for (int d = 0; d < t.dims; d++) { fprintf(f, "%s%zu", d > 0 ? "," : "", t.shape[d]); }
        fprintf(f, "],\"data_offsets\":[%zu,%zu]}", offset, offset + bytes);
        offset += bytes;
    }
    fprintf(f, "}");
    while (ftell(f) % 8 != 0) { fputc(' ', f); } // so that the data begin at a multiple of 8 bytes
    fclose(f);
    parts.of[1] = FilePart{header, length};
    uint32_t crc = 0;
    for (const FilePart& part : parts) { crc = crc_32(crc, part.data, part.bytes); }
    snprintf(digits, sizeof(digits), "%08x", crc);
    memcpy(header + strlen(ST_BEFORE_DIGITS), digits, 8);
    write_file(path, parts);
    free(header);
    free(parts.of);
}

// A data shard, version 1: this header, an index of an entry for each image, and the images' records.
// data/README.md has the table of bytes; classification and detection share the format
typedef struct {
    char magic[8]; // "DROPIT\r\n": a transfer in text mode breaks it
    uint32_t version, header_bytes;
    uint64_t file_bytes;
    uint32_t images, classes, channels, task;
    float mean[4], std[4];
    uint64_t index_offset, data_offset;
    uint32_t zero[9], crc; // crc: of the header before it and of the index
} ShardHeader;
typedef struct {
    uint64_t offset;
    uint32_t height, width;
    int32_t label;
    uint32_t annotation_bytes, crc, zero;
} ShardEntry;
typedef struct { MappedFile file; const ShardHeader* header; const ShardEntry* entries; } Shard;

#define SHARD_HINT "run `make data` or a script in data/ to write it again"
#define shard_check(condition, what, ...) require(condition, "%s" what "; " SHARD_HINT, path, ##__VA_ARGS__)

// Maps a shard and checks what its header and index claim. verify: and the checksum of every record
Shard shard_open(const char* path, bool verify = true) {
    const MappedFile file = map_file(path, SHARD_HINT);
    const ShardHeader* h = (const ShardHeader*)file.data;
    const ShardEntry* entries = (const ShardEntry*)(h + 1);
    const size_t bytes = file.bytes, size = sizeof(ShardHeader);
    shard_check(bytes >= size, " has %zu bytes, a shard has a header of %zu", bytes, size);
    shard_check(memcmp(h->magic, "DROPIT\r\n", 8) == 0, " does not begin with a shard's magic DROPIT");
    shard_check(h->version == 1, " is of shard version %u, this program reads version 1", h->version);
    shard_check(h->header_bytes == size && h->index_offset == size, ": header of %u bytes, index at "
                "%zu, expected %zu and %zu", h->header_bytes, h->index_offset, size, size);
    shard_check(h->file_bytes == bytes, " has %zu bytes, its header says %zu: it is truncated or "
                "damaged", bytes, h->file_bytes);
    shard_check(h->images > 0 && h->images <= (bytes - size) / sizeof(ShardEntry), " claims %u images, "
                "too %s for its %zu bytes", h->images, h->images ? "many" : "few", bytes);
    const size_t index_bytes = h->images * sizeof(ShardEntry);
    size_t end = size + index_bytes; // the records must follow one another from here to the file's end
    shard_check(h->data_offset == end, ": data at byte %zu, expected %zu", h->data_offset, end);
    uint32_t crc = crc_32(crc_32(0, h, offsetof(ShardHeader, crc)), entries, index_bytes);
    shard_check(crc == h->crc, ": checksum of header and index is %08x, expected %08x: it is damaged", crc, h->crc);
    shard_check(h->channels >= 1 && h->channels <= 4 && h->classes > 0 && h->task <= 1, ": %u channels, %u "
                "classes, task %u; expected 1 to 4, at least 1, 0 or 1", h->channels, h->classes, h->task);
    for (uint32_t c = 0; c < h->channels; c++) {
        shard_check(isfinite(h->mean[c]) && isfinite(h->std[c]) && h->std[c] > 0, ": channel %u has "
                    "mean %g and standard deviation %g", c, h->mean[c], h->std[c]);
    }
    for (uint32_t i = 0; i < h->images; i++) {
        const ShardEntry e = entries[i];
        const size_t n = (size_t)e.height * e.width * h->channels + e.annotation_bytes;
        shard_check(e.height > 0 && e.height <= 65535 && e.width > 0 && e.width <= 65535, ": image %u "
                    "is %u x %u", i, e.height, e.width);
        shard_check(e.offset == end && n <= bytes - end, ": record %u lies at %zu with %zu bytes, "
                    "expected at %zu within %zu", i, e.offset, n, end, bytes);
        shard_check(h->task != 0 || (e.label >= 0 && (uint32_t)e.label < h->classes), ": image %u has "
                    "label %d, expected 0 to %u", i, e.label, h->classes - 1);
        crc = verify ? crc_32(0, file.data + end, n) : e.crc;
        shard_check(crc == e.crc, ": checksum of image %u is %08x, expected %08x: it is damaged", i, crc, e.crc);
        end += n;
    }
    shard_check(end == bytes, ": records end at byte %zu, the file at %zu", end, bytes);
    return Shard{file, h, entries};
}
// ---- end shared: files -----------------------------------------------------

// ---- shared: checkpoints ---------------------------------------------------
// A checkpoint of step 20 is model_00000020.safetensors, state_00000020_00000.safetensors and, written
// last, an empty DONE_00000020: wherever a program is killed, every checkpoint with a DONE file is whole
void checkpoint_path(char path[PATH_MAX], const char* directory, const char* kind, int step) {
    char name[64];
    const char* end = kind[0] == 'D' ? "" : kind[0] == 's' ? "_00000.safetensors" : ".safetensors";
    snprintf(name, sizeof(name), "%s_%08d%s", kind, step, end);
    path_in(path, directory, name);
}

// Is this a file of ours whose checksum is right? Unlike safetensors_open, it may be missing or damaged
bool checkpoint_file_whole(const char* path) {
    const size_t before = strlen(ST_BEFORE_DIGITS), digits = 8 + before; // 8: the length of the header
    struct stat s;
    char actual[9];
    if (stat(path, &s) != 0 || !S_ISREG(s.st_mode) || s.st_size <= 64 || access(path, R_OK) != 0) { return false; }
    const MappedFile file = map_file(path, "");
    crc_without_digits(actual, &file, digits);
    const bool ours = memcmp(file.data + 8, ST_BEFORE_DIGITS, before) == 0;
    const bool whole = ours && memcmp(file.data + digits, actual, 8) == 0;
    munmap((void*)file.data, file.bytes);
    return whole;
}

int checkpoint_newest(const char* directory, int below) {
    int newest = -1, step, end;
    DIR* d = opendir(directory);
    for (struct dirent* e; d != NULL && (e = readdir(d)) != NULL; ) {
        const bool done = sscanf(e->d_name, "DONE_%8d%n", &step, &end) == 1 && e->d_name[end] == 0;
        if (done && step < below) { newest = std::max(newest, step); }
    }
    if (d != NULL) { closedir(d); }
    return newest;
}

// warns of checkpoints that are damaged, and ends the program if all are
int checkpoint_find(const char* directory) {
    char model[PATH_MAX], state[PATH_MAX];
    bool damaged = false;
    for (int step = INT_MAX; (step = checkpoint_newest(directory, step)) >= 0; damaged = true) {
        checkpoint_path(model, directory, "model", step);
        checkpoint_path(state, directory, "state", step);
        if (checkpoint_file_whole(model) && checkpoint_file_whole(state)) { return step; }
        fprintf(stderr, "warning: the checkpoint of step %d in %s is damaged; an older one is tried\n",
                step, directory);
    }
    require(!damaged, "no checkpoint in %s is whole; start anew with another -o", directory);
    return -1;
}

// Marks a checkpoint as whole, then removes all but the newest `keep` (0: keeps all), DONE first: what
// is left when the program is killed is no checkpoint
void checkpoint_done(const char* directory, int step, int keep) {
    char path[PATH_MAX];
    checkpoint_path(path, directory, "DONE", step);
    write_file(path, List<FilePart>{});
    int old = INT_MAX;
    for (int i = 0; keep > 0 && (old = checkpoint_newest(directory, old)) >= 0; i++) {
        for (const char* kind : {"DONE", "model", "state"}) {
            checkpoint_path(path, directory, kind, old);
            if (i >= keep) { unlink(path); }
        }
    }
}

// May the file at `path` stay, though a run has found weights with this best score? One that was resumed
// repeats steps, and must not replace what it found later: a file that is whole, as good, of the same run
bool checkpoint_best_stands(const char* path, const List<StMetadata>& metadata, const StMetadata* best) {
    if (!checkpoint_file_whole(path)) { return false; }
    Safetensors* st = safetensors_open(path);
    const char* its = safetensors_metadata(st, best->key);
    bool stands = its != NULL && strtod(its, NULL) >= strtod(best->value, NULL);
    for (const StMetadata& m : metadata) {
        const char* was = safetensors_metadata(st, m.key);
        if (strcmp(m.key, "step") == 0 || strncmp(m.key, "best_", 5) == 0) { continue; }
        stands = stands && was != NULL && strcmp(was, m.value) == 0;
    }
    safetensors_close(st);
    return stands;
}

// keeps the whole lines of steps up to `step`: a resumed run writes what followed once more
void log_cut(FILE* log, int step) {
    char line[512];
    int s;
    long end = 0;
    rewind(log);
    while (fgets(line, sizeof(line), log) != NULL && sscanf(line, "s:%d ", &s) == 1 && s <= step
           && strchr(line, '\n') != NULL) { end = ftell(log); } // else the program was killed in it
    const bool cut = ftruncate(fileno(log), end) == 0 && fseek(log, end, SEEK_SET) == 0;
    require(cut, "cannot cut main.log back to step %d: %m", step);
}
// ---- end shared: checkpoints -----------------------------------------------

// ---- shared: image resize --------------------------------------------------
// Crops, resizes and mirrors images as Pillow does, to the bit: bicubic over a support that grows with
// the shrinking, weights in double rounded to 22 bits behind the point, columns first, bytes in between.
// (Pillow 13 begins with the rows where they shrink much more.) The host computes weights and transposes
// each image: a column of one channel is a run of bytes, of which a thread makes RESIZE_V at a time
#define RESIZE_V 64
#define RESIZE_BITS 22

// An axis of an image: n pixels from `begin` on become `full`, of which S from `window` on are kept
typedef struct { int begin, n; size_t full, window; } ViewAxis;
struct ImageView { ViewAxis y, x; bool mirror = false; }; // mirror: left to right
typedef struct { int first, n, taps; } ResizeAxis; // the pixels that it needs; weights a pixel

// Resizes one image. The host writes its data at one place of the staging buffer, the device at another:
//   staged:   first (S) | weights (S, x.taps) | first (S) | weights (S, y.taps) | pixels
//             int, of the columns               int, of the rows                  transposed
//   resized:  columns resized (S * CH, pitch) | straight: the same transposed back (pitch, row pitch)
// Output pixel i is made of the input pixels from first[i] on, with the weights of row i. pixels are
// (columns, CH, pitch). pitch and row pitch: rows and S * CH, rounded up to multiples of RESIZE_V
typedef struct {
    ResizeAxis y, x;
    int image, pitch;                         // image: place in the batch
    size_t staged, resized, pixels, straight; // offsets in bytes: in the buffer, from staged, from resized
    size_t staged_bytes, scratch_bytes;       // bytes at `staged`, and at `resized`
} ResizeTask;

// how many input pixels, from *first on, make output pixel `at` of all
inline int resize_range(const ViewAxis* v, size_t at, int* first) {
    const double scale = (double)v->n / v->full, support = 2.0 * std::max(scale, 1.0), center = (at + 0.5) * scale;
    *first = std::max((int)(center - support + 0.5), 0);
    return std::min((int)(center + support + 0.5), v->n) - *first;
}

ResizeAxis resize_axis(const ViewAxis* v, int S) {
    // the most of resize_range: where that is more, the last pixel has the weight 0
    const int taps = std::min((int)ceil(4.0 * std::max((double)v->n / v->full, 1.0)), v->n);
    int first, last, count = resize_range(v, v->window + S - 1, &last);
    resize_range(v, v->window, &first);
    return ResizeAxis{first, last + count - first, taps};
}

// Pillow's bicubic filter, and PyTorch's antialiased one: Keys' cubic, a = -0.5
inline double resize_filter(double x) {
    x = fabs(x);
    if (x < 1.0) { return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0; }
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

// first (S), from a->first on, and weights (S, taps) of the window's pixels, in reverse if mirrored
void resize_weights(int* first, int* weights, const ResizeAxis* a, const ViewAxis* v, int S, bool mirror) {
    const double scale = (double)v->n / v->full, inverse = 1.0 / std::max(scale, 1.0);
    for (int i = 0; i < S; i++) {
        const int out = mirror ? S - 1 - i : i;
        const double center = (v->window + i + 0.5) * scale;
        int low, count = std::min(resize_range(v, v->window + i, &low), a->taps);
        double sum = 0.0; // positive: the pixel at the centre outweighs the negative ones
        for (int k = 0; k < count; k++) { sum += resize_filter((k + low - center + 0.5) * inverse); }
        first[out] = low - a->first;
        for (int k = 0; k < a->taps; k++) {
            const double w = k < count ? resize_filter((k + low - center + 0.5) * inverse) / sum : 0.0;
            weights[(size_t)out * a->taps + k] = (int)(w * (1 << RESIZE_BITS) + (w < 0.0 ? -0.5 : 0.5));
        }
    }
}

// the task of a view; its caller sets where the data lie (staged, resized), and image
ResizeTask resize_task(const ImageView* v, int S, int CH) {
    const size_t row_pitch = CEIL_DIV((size_t)S * CH, (size_t)RESIZE_V) * RESIZE_V;
    ResizeTask t = {};
    t.y = resize_axis(&v->y, S);
    t.x = resize_axis(&v->x, S);
    t.pitch = CEIL_DIV(t.y.n, RESIZE_V) * RESIZE_V;
    t.pixels = align_up(numel(S, 2 + t.x.taps + t.y.taps) * sizeof(int));
    // weights of 0 may reach up to `taps` pixels behind the last column, and behind the last row
    t.staged_bytes = align_up(t.pixels + numel(t.x.n + t.x.taps, CH, t.pitch));
    t.straight = align_up(row_pitch * t.pitch);
    t.scratch_bytes = align_up(t.straight + row_pitch * (t.pitch + t.y.taps));
    return t;
}

// transposes a matrix of 8 x 8 bytes; byte `column` of r[row] is r[row] >> 8 * column
__host__ __device__ inline void turn_8x8(uint64_t* r) {
    const uint64_t masks[3] = {0x00000000FFFFFFFFull, 0x0000FFFF0000FFFFull, 0x00FF00FF00FF00FFull};
    for (int level = 0; level < 3; level++) {
        const int side = 4 >> level; // exchanges the squares of this side off the diagonal
        for (int q = 0; q < 4; q++) {
            const int j = q + (q & -side);
            const uint64_t x = (r[j] >> 8 * side ^ r[j + side]) & masks[level];
            r[j + side] ^= x;
            r[j] ^= x << 8 * side;
        }
    }
}

// out[x][y] = in[y][x]: in (rows, cols) with `stride` bytes a row, out (cols, pitch)
void turn_bytes(uint8_t* out, size_t pitch, const uint8_t* in, size_t stride, size_t rows, size_t cols) {
    const size_t whole_rows = rows / 8 * 8, whole_cols = cols / 8 * 8;
    for (size_t x = 0; x < whole_cols; x += 8) {
        for (size_t y = 0; y < whole_rows; y += 8) {
            uint64_t r[8];
            for (int j = 0; j < 8; j++) { memcpy(&r[j], in + (y + j) * stride + x, 8); }
            turn_8x8(r);
            for (int j = 0; j < 8; j++) { memcpy(out + (x + j) * pitch + y, &r[j], 8); }
        }
    }
    for (size_t x = 0; x < cols; x++) { // what whole blocks of 8 x 8 leave over
        for (size_t y = x < whole_cols ? whole_rows : 0; y < rows; y++) { out[x * pitch + y] = in[y * stride + x]; }
    }
}

// the host's part: weights and transposed pixels of an image (h, w, CH), as the task lays them out
void resize_stage(uint8_t* staged, const ResizeTask* t, const ImageView* v, const uint8_t* in, int w, int S, int CH) {
    int *x = (int*)staged, *y = x + (size_t)S * (1 + t->x.taps); // first; weights lie behind it
    resize_weights(x, x + S, &t->x, &v->x, S, v->mirror);
    resize_weights(y, y + S, &t->y, &v->y, S, false);
    const size_t stride = (size_t)w * CH, top = v->y.begin + t->y.first, left = v->x.begin + t->x.first;
    turn_bytes(staged + t->pixels, t->pitch, in + top * stride + left * CH, stride, t->y.n, (size_t)t->x.n * CH);
}

// out[j] = sum over k of weights[k] * pixels[k * stride + j], rounded to a byte, for j < RESIZE_V
typedef Pack<RESIZE_V, uint8_t> ResizeRun;
__device__ inline void resize_run(ResizeRun* out, const uint8_t* pixels, size_t stride, const int* weights, int taps) {
    int sum[RESIZE_V];
    for (int j = 0; j < RESIZE_V; j++) { sum[j] = 1 << (RESIZE_BITS - 1); }
    for (int k = 0; k < taps; k++, pixels += stride) {
        const ResizeRun& p = *(const ResizeRun*)pixels;
        const int w = weights[k];
        for (int j = 0; j < RESIZE_V; j++) { sum[j] += w * p.v[j]; }
    }
    for (int j = 0; j < RESIZE_V; j++) { out->v[j] = (uint8_t)min(max(sum[j] >> RESIZE_BITS, 0), 255); }
}

// resized[x, c, y] = sum over k of weights[x][k] * pixels[first[x] + k, c, y]; a thread makes RESIZE_V
// rows y of one x, c. Grid: threads of the largest task, tasks
__global__ void resize_columns_kernel(uint8_t* staging, const ResizeTask* tasks, int S, int CH) {
    const ResizeTask t = tasks[blockIdx.y];
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned runs = t.pitch / RESIZE_V, xc = (unsigned)i / runs, x = xc / CH, y = (i - xc * runs) * RESIZE_V;
    if (i >= (size_t)S * CH * runs) { return; }
    const int *first = (const int*)(staging + t.staged), *w = first + S + (size_t)x * t.x.taps;
    const uint8_t* column = staging + t.staged + t.pixels + ((size_t)first[x] * CH + xc % CH) * t.pitch;
    uint8_t* out = staging + t.resized + (size_t)xc * t.pitch + y;
    resize_run((ResizeRun*)out, column + y, (size_t)CH * t.pitch, w, t.x.taps);
}

// straight[y][xc] = resized[xc][y]; a thread transposes 8 x 8 bytes
__global__ void resize_turn_kernel(uint8_t* staging, const ResizeTask* tasks, int row_pitch) {
    const ResizeTask t = tasks[blockIdx.y];
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)(t.pitch / 8) * (row_pitch / 8)) { return; }
    const unsigned runs = row_pitch / 8, yb = (unsigned)i / runs, xb = (unsigned)i - yb * runs;
    const uint8_t* in = staging + t.resized + (size_t)xb * 8 * t.pitch + yb * 8;
    uint8_t* out = staging + t.resized + t.straight + (size_t)yb * 8 * row_pitch + xb * 8;
    uint64_t r[8];
    for (int j = 0; j < 8; j++) { r[j] = *(const uint64_t*)(in + (size_t)j * t.pitch); }
    turn_8x8(r);
    for (int j = 0; j < 8; j++) { *(uint64_t*)(out + (size_t)j * row_pitch) = r[j]; }
}

// images[image, y, xc] = sum over k of weights[y][k] * straight[first[y] + k][xc]; images (B, S, S, CH).
// A thread makes RESIZE_V bytes of one row, written in packs of 16 where a row holds whole packs
__global__ void resize_rows_kernel(uint8_t* images, const uint8_t* staging, const ResizeTask* tasks,
                                   int S, int CH, int row_pitch) {
    const ResizeTask t = tasks[blockIdx.y];
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (size_t)S * (row_pitch / RESIZE_V)) { return; }
    const unsigned runs = row_pitch / RESIZE_V, y = (unsigned)i / runs, xc = (i - y * runs) * RESIZE_V;
    const unsigned row = S * CH, n = min(row - xc, RESIZE_V);
    const int* first = (const int*)(staging + t.staged) + (size_t)S * (1 + t.x.taps);
    const uint8_t* pixels = staging + t.resized + t.straight + (size_t)first[y] * row_pitch + xc;
    ResizeRun bytes;
    resize_run(&bytes, pixels, row_pitch, first + S + (size_t)y * t.y.taps, t.y.taps);
    uint8_t* out = images + ((size_t)t.image * S + y) * row + xc;
    for (unsigned j = 0; j < RESIZE_V; j += 16) { // of constant length, so that the bytes stay in registers
        if (row % 16 == 0 && j < n) { *(Pack<16, uint8_t>*)(out + j) = *(Pack<16, uint8_t>*)(bytes.v + j); }
    }
    for (unsigned j = 0; j < RESIZE_V; j++) { if (row % 16 != 0 && j < n) { out[j] = bytes.v[j]; } }
}

// the device's part, for n tasks (up to 65,535) whose weights and pixels are staged; pitch: the largest
void resize_images(uint8_t* images, uint8_t* staging, const ResizeTask* tasks, int n, int pitch, int S, int CH,
                   cudaStream_t stream) {
    const int row_pitch = CEIL_DIV(S * CH, RESIZE_V) * RESIZE_V;
    const auto grid = [n](size_t threads) { return dim3((unsigned)CEIL_DIV(threads, (size_t)128), n); };
    const dim3 x = grid(numel(S, CH, pitch / RESIZE_V)), y = grid(numel(S, row_pitch / RESIZE_V));
    LAUNCH_BLOCKS(resize_columns_kernel, x, 128, stream, staging, tasks, S, CH);
    LAUNCH_BLOCKS(resize_turn_kernel, grid(numel(row_pitch / 8, pitch / 8)), 128, stream, staging, tasks, row_pitch);
    LAUNCH_BLOCKS(resize_rows_kernel, y, 128, stream, images, staging, tasks, S, CH, row_pitch);
}
// ---- end shared: image resize ----------------------------------------------

// ---- shared: shard reader --------------------------------------------------
// Threads bring records (an image's bytes and annotations) from mapped files to pinned memory, the next
// batch while the device computes this one. Only the list of jobs grows with the batch. Words:
//   batch   the records of a training step. Two are planned at most: one is copied, the other is read
//   job     a record of a batch, which a thread reads, checks and stages: writes to its place in a slot
//   piece   jobs in a row of one batch that fit in a slot together; copied when all of them are done
//   slot    one of four pinned buffers. Piece p goes to slot p % 4 when piece p - 4 has been copied
//   batch      | job 0 | job 1 | job 2 | job 3 | job 4 | job 5 |
//   pieces     |       0       |           1           |   2   |    in the next batch: 3, 4, ...
//   slot 1     | job 2 | job 3 | job 4 | free |
#define PIECE_BYTES ((size_t)32 << 20)
#define PIECE_SLOTS 4
#define MAX_PIECE_JOBS 16384 // a dimension of a grid has 65,535 blocks at most
#define MAX_READERS 64

typedef struct {
    Shard* shards;     // (num_shards)
    unsigned* begin;   // (num_shards): the number of each shard's first image
    int num_shards;
    unsigned images;
    uint32_t crc;      // of the headers: says which data these are
    bool verified;     // all records have been compared with their checksums
} ShardSet;
typedef struct {
    const Shard* shard;
    const ShardEntry* entry;
    const uint8_t* record;
    size_t bytes, piece, offset; // of the record; where it is staged: piece, and byte of its slot
    uint32_t crc;      // of the record, as read
    int batch, image;  // which of the loader's two batches, and which of its images
} ReadJob;
typedef struct { uint8_t* slot; size_t first, jobs, bytes, left; } ReadPiece; // left: of its jobs, to be done

// A trainer's loader is a Reader and what it needs beyond that. Jobs and pieces are numbered over the
// run: number i is element i % ring, and the two batches that are planned have `ring` at most
struct Reader {
    ShardSet set;
    ReadJob* jobs;         // (ring)
    ReadPiece* pieces;     // (ring)
    size_t ring, piece_bytes, num_jobs, num_pieces; // of a slot; in the run so far
    uint8_t* slots[PIECE_SLOTS];      // pinned, of piece_bytes each
    cudaEvent_t emptied[PIECE_SLOTS]; // the slot has been copied to the device
    pthread_t threads[MAX_READERS];
    int num_threads, device;
    pthread_mutex_t lock;  // of what follows, which the threads share
    pthread_cond_t changed;
    size_t planned, next;  // jobs that the threads may do; the one that is done next
    size_t issued;         // pieces whose copy to the device has been asked for
    bool stop;
};

// what a loader defines: writes a record to its place in a slot. Several threads call it at once
void stage_record(const Reader* r, const ReadJob* job, uint8_t* staged);

// how many files PREFIX_NNNNN.bin there are; *end: one more than the largest number
unsigned shards_count(const char* prefix, unsigned* end) {
    const char *slash = strrchr(prefix, '/'), *base = slash != NULL ? slash + 1 : prefix;
    const size_t n = strlen(base);
    char folder[4200];
    unsigned found = *end = 0, number;
    snprintf(folder, sizeof(folder), "%.*s.", (int)(base - prefix), prefix);
    DIR* directory = opendir(folder);
    for (const struct dirent* e; directory != NULL && (e = readdir(directory)) != NULL; ) {
        int used = 0;
        const bool named = strncmp(e->d_name, base, n) == 0 && sscanf(e->d_name + n, "_%5u.bin%n", &number, &used) == 1;
        if (!named || used != 10 || e->d_name[n + 10] != 0) { continue; }
        found++;
        *end = std::max(*end, number + 1);
    }
    if (directory != NULL) { closedir(directory); }
    return found;
}

// Opens a data set. path is a file, or PREFIX of a single PREFIX.bin or of PREFIX_00000.bin, ..., all of
// which must be there and agree; both at once are an error. Of a set of up to 1 GiB, records are
// verified here; of a larger one, each when it is read
ShardSet shards_open(const char* path) {
    char name[4300];
    struct stat info;
    unsigned end = 0;
    uint64_t bytes = 0;
    const size_t length = strlen(path);
    require(length < 4096, "the name of the data has %zu characters, 4095 are allowed: %.80s...", length, path);
    const bool file = stat(path, &info) == 0 && S_ISREG(info.st_mode);
    const unsigned found = file ? 0 : shards_count(path, &end);
    snprintf(name, sizeof(name), "%s.bin", path);
    const bool single = !file && stat(name, &info) == 0;
    require(found == 0 || !single, "%s is there, and %u shards up to %s_%05u.bin; give the whole name "
            "of the first, or move it away to use the others", name, found, path, end - 1);
    const char* form = found > 0 ? "%s_%05d.bin" : single ? "%s.bin" : "%s";
    ShardSet set = {};
    set.num_shards = found > 0 ? (int)end : 1;
    set.shards = host_new<Shard>(set.num_shards, "shards");
    set.begin = host_new<unsigned>(set.num_shards, "shards");
    for (int i = 0; i < set.num_shards; i++) {
        snprintf(name, sizeof(name), form, path, i);
        if (stat(name, &info) == 0) { bytes += (uint64_t)info.st_size; continue; }
        require(found == 0, "%s is not there, but %u other shards up to %s_%05u.bin are; run the script "
                "that makes them again", name, found, path, end - 1);
    }
    snprintf(name, sizeof(name), "%s.part", path);
    require(found == 0 || stat(name, &info) != 0, "%s is there: the shards of %s are not all made yet; "
            "run data/imagenet.py again until it ends", name, path);
    set.verified = bytes <= (uint64_t)1 << 30;
    for (int i = 0; i < set.num_shards; i++) {
        snprintf(name, sizeof(name), form, path, i);
        set.shards[i] = shard_open(strdup(name), set.verified);
        const ShardHeader *h = set.shards[i].header, *h0 = set.shards[0].header;
        const size_t same = offsetof(ShardHeader, index_offset) - offsetof(ShardHeader, classes);
        require(memcmp(&h->classes, &h0->classes, same) == 0, "%s has task %u, %u classes, %u channels, "
                "mean %g and standard deviation %g, but %s has %u, %u, %u, %g and %g; shards of one set must "
                "agree: make them again", name, h->task, h->classes, h->channels, h->mean[0], h->std[0],
                set.shards[0].file.path, h0->task, h0->classes, h0->channels, h0->mean[0], h0->std[0]);
        set.begin[i] = set.images;
        require(h->images <= UINT_MAX - set.images, "%s has more than %u images; use fewer shards", path, UINT_MAX);
        set.images += h->images;
        set.crc = i == 0 ? h->crc : crc_32(set.crc, &h->crc, sizeof(h->crc));
    }
    return set;
}

// image i of a set as a job that has no place yet
ReadJob set_image(const ShardSet* set, unsigned i) {
    const size_t s = std::upper_bound(set->begin, set->begin + set->num_shards, i) - set->begin - 1;
    const Shard* shard = &set->shards[s];
    const ShardEntry* e = &shard->entries[i - set->begin[s]];
    const size_t bytes = numel(e->height, e->width, shard->header->channels) + e->annotation_bytes;
    return ReadJob{shard, e, shard->file.data + e->offset, bytes, 0, 0, 0, 0, 0};
}

// Does the next job if it is of one of the next `pieces` to be copied, else returns false. Holds the lock
bool reader_work(Reader* r, size_t pieces) {
    ReadJob* job = &r->jobs[r->next % r->ring];
    if (r->next == r->planned || job->piece >= r->issued + pieces) { return false; }
    r->next++;
    pthread_mutex_unlock(&r->lock);
    ReadPiece* piece = &r->pieces[job->piece % r->ring];
    job->crc = r->set.verified ? job->entry->crc : crc_32(0, job->record, job->bytes);
    cudaCheck(cudaEventSynchronize(r->emptied[job->piece % PIECE_SLOTS])); // at once if nothing was copied
    stage_record(r, job, piece->slot + job->offset);
    pthread_mutex_lock(&r->lock);
    if (--piece->left == 0) { pthread_cond_broadcast(&r->changed); }
    return true;
}

void* reader_thread(void* argument) {
    Reader* r = (Reader*)argument;
    cudaCheck(cudaSetDevice(r->device));
    pthread_mutex_lock(&r->lock);
    while (!r->stop) { if (!reader_work(r, PIECE_SLOTS)) { pthread_cond_wait(&r->changed, &r->lock); } }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

// gives a field that the threads share another value, and wakes them
template <class T> void reader_set(Reader* r, T* field, T value) {
    pthread_mutex_lock(&r->lock);
    *field = value;
    pthread_cond_broadcast(&r->changed);
    pthread_mutex_unlock(&r->lock);
}

// set and piece_bytes say what is read, in batches of up to max_jobs; threads 0: reader_wait reads alone
void reader_start(Reader* r, size_t max_jobs, int threads) {
    r->ring = 2 * max_jobs;
    r->jobs = host_new<ReadJob>(r->ring, "a batch");
    r->pieces = host_new<ReadPiece>(r->ring, "a batch");
    for (int i = 0; i < PIECE_SLOTS; i++) {
        cudaCheck(cudaMallocHost((void**)&r->slots[i], r->piece_bytes));
        cudaCheck(cudaEventCreateWithFlags(&r->emptied[i], cudaEventDisableTiming | cudaEventBlockingSync));
    }
    cudaCheck(cudaGetDevice(&r->device));
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->changed, NULL);
    for (int i = 0; i < threads; r->num_threads = ++i) {
        const bool started = pthread_create(&r->threads[i], NULL, reader_thread, r) == 0;
        require(started, "cannot start reader thread %d: %m; lower -threads", i + 1);
    }
}

// ends the threads and gives back the memory, but not the shards; the device has copied all slots
void reader_close(Reader* r) {
    reader_set(r, &r->stop, true);
    for (int i = 0; i < r->num_threads; i++) { pthread_join(r->threads[i], NULL); }
    for (uint8_t* slot : r->slots) { cudaCheck(cudaFreeHost(slot)); }
    free(r->jobs);
    free(r->pieces);
}

// Adds a job to a batch, of which `bytes` are staged; the threads see it when `planned` is num_jobs. It
// begins a piece where the last one has no room for these bytes and, behind all that is staged, `behind`
// more. Returns its place in the slot
size_t reader_add(Reader* r, ReadJob job, size_t bytes, size_t behind) {
    const bool first = r->num_jobs == r->planned; // of the batch
    ReadPiece* p = first ? NULL : &r->pieces[(r->num_pieces - 1) % r->ring];
    if (first || p->jobs == MAX_PIECE_JOBS || p->bytes + bytes + behind > r->piece_bytes) {
        p = &r->pieces[r->num_pieces % r->ring];
        *p = ReadPiece{r->slots[r->num_pieces++ % PIECE_SLOTS], r->num_jobs, 0, 0, 0};
    }
    job.piece = r->num_pieces - 1;
    job.offset = p->bytes;
    r->jobs[r->num_jobs++ % r->ring] = job;
    p->left = ++p->jobs;
    p->bytes += bytes;
    const size_t in_page = (uintptr_t)job.record % 4096; // the system begins to read the record from disk
    if (!r->set.verified) { madvise((void*)(job.record - in_page), in_page + job.bytes, MADV_WILLNEED); }
    return job.offset;
}

// Returns the next piece to be copied, when all its jobs are done; until then the caller reads too.
// reader_copied follows, when the stream has been asked to copy it
const ReadPiece* reader_wait(Reader* r) {
    const ReadPiece* piece = &r->pieces[r->issued % r->ring];
    pthread_mutex_lock(&r->lock);
    while (piece->left > 0) { if (!reader_work(r, 1)) { pthread_cond_wait(&r->changed, &r->lock); } }
    pthread_mutex_unlock(&r->lock);
    for (size_t i = piece->first; i < piece->first + piece->jobs; i++) {
        const ReadJob j = r->jobs[i % r->ring];
        require(j.crc == j.entry->crc, "%s: checksum of image %zu is %08x, expected %08x: it is "
                "damaged; write the shard again", j.shard->file.path, j.entry - j.shard->entries, j.crc, j.entry->crc);
    }
    return piece;
}
void reader_copied(Reader* r, cudaStream_t stream) {
    cudaCheck(cudaEventRecord(r->emptied[r->issued % PIECE_SLOTS], stream));
    reader_set(r, &r->issued, r->issued + 1);
}
// ---- end shared: shard reader ----------------------------------------------

// ---- shared: image classifiers ---------------------------------------------
// What trainers of image classifiers share: flags, batches of images, loss, predictions, a batch to look
// at. Random choices are drawn by Philox from an image's place in the epoch or from the batch's number
#define IMAGE_SETTINGS(X) \
    X(f, smoothing,  "-smoothing", 0.0, 0, 0.999999, SAME, "label smoothing") \
    X(i, flip,       "-flip", 0, 0, 1, SAME, "1: mirror half of the training images") \
    X(i, crop,       "-crop", 0, 0, 1, SAME, "1: random resized crops of the training images") \
    X(f, crop_scale, "-scale", 0.08, 0.0001, 1, SAME, "smallest area of a random crop") \
    X(f, crop_pct,   "-crop_pct", 1.0, 0.25, 1, SAME, "evaluation: part of the resized shorter side that is taken") \
    X(i, repeats,    "-repeats", 1, 1, 1024, SAME, "repeated augmentation: times that an image is shown in a row") \
    X(f, erase,      "-reprob", 0.0, 0, 1, SAME, "random erasing: probability") \
    X(f, mixup,      "-mixup", 0.0, 0, 1000, SAME, "mixup: alpha of the beta distribution, 0: off") \
    X(f, cutmix,     "-cutmix", 0.0, 0, 1000, SAME, "cutmix: alpha of the beta distribution, 0: off") \
    X(f, mix,        "-mixup_prob", 1.0, 0, 1, SAME, "probability that a batch is mixed") \
    X(f, mix_switch, "-mixup_switch", 0.5, 0, 1, SAME, "probability of cutmix where mixup is on too")
struct ImageData {
    IMAGE_SETTINGS(FIELD)
    size_t staging_bytes;  // for images that are resized on the device; 0: none are
    Augmenter* augmenter;  // what model_augment gets
    // on the device: what the loader writes
    uint8_t *images, *staging; // (B, S, S, CH): H and W are S; where images are resized
    int *labels, *flips;   // (B)
    ResizeTask* tasks;     // (B), where images are resized
    EraseBox* erased;      // (B), where images are erased
    float* losses;         // (B) of cross_entropy, as ranks (B)
    int* ranks;
};

void image_options(Model* model) {
    ImageData* s = model->images = host_new<ImageData>(1, "flags");
    IMAGE_SETTINGS(OPTION)
}

void plan_images(Model* model, Augmenter* augmenter) {
    Plan* plan = &model->plan;
    ImageData* d = model->images;
    const size_t B = model->B, tasks = d->staging_bytes > 0 ? B : 0, erased = d->erase > 0.0 ? B : 0;
    d->augmenter = augmenter;
    plan_add(plan, SCRATCH, "images", "", "(B, H, W, CH) bytes", &d->images, B * model->H * model->W * model->CH);
    plan_add(plan, SCRATCH, "next labels", "", "(B)", &d->labels, B * sizeof(int));
    plan_add(plan, SCRATCH, "flips", "", "(B)", &d->flips, B * sizeof(int));
    plan_add(plan, SCRATCH, "image staging", "", "bytes", &d->staging, d->staging_bytes);
    plan_add(plan, SCRATCH, "resize tasks", "", "(B)", &d->tasks, tasks * sizeof(ResizeTask));
    plan_add(plan, SCRATCH, "erased", "", "(B, 4)", &d->erased, erased * sizeof(EraseBox));
    plan_add(plan, SCRATCH, "losses", "", "(B)", &d->losses, B * sizeof(float));
    plan_add(plan, SCRATCH, "ranks", "", "(B)", &d->ranks, B * sizeof(int));
}

// The box of a random resized crop, as timm and torchvision choose it: an area of scale to 1 of the
// image's, a ratio of 3/4 to 4/3; after ten attempts that do not fit, the centre
ImageView random_crop(int height, int width, size_t S, double scale, u64 seed, unsigned epoch, size_t place) {
    const double low = 3.0 / 4.0, high = 4.0 / 3.0, area = (double)height * width, ratio = (double)width / height;
    for (int attempt = 0; attempt < 10; attempt++) {
        const uint4 u = philox(seed, RNG_CROP, epoch, 16 * (u64)place + attempt);
        const double wanted = (scale + (1.0 - scale) * uniform(u.x)) * area;
        const double r = exp(log(low) + (log(high) - log(low)) * uniform(u.y));
        const int w = (int)rint(sqrt(wanted * r)), h = (int)rint(sqrt(wanted / r));
        if (w < 1 || h < 1 || w > width || h > height) { continue; }
        return {{draw_below(u.z, height - h + 1), h, S, 0}, {draw_below(u.w, width - w + 1), w, S, 0}};
    }
    const int h = ratio < low ? (int)rint(width / low) : height, w = ratio > high ? (int)rint(height * high) : width;
    return {{(height - h) / 2, h, S, 0}, {(width - w) / 2, w, S, 0}};
}

// The evaluation transform, as torchvision's Resize and CenterCrop have it: the shorter side becomes
// floor(S / crop_pct), the longer keeps the aspect, rounded down, and S x S are cut out of the middle
ImageView center_crop(int height, int width, size_t S, double crop_pct) {
    const auto axis = [=](int n, int other) {
        const size_t shorter = (size_t)floor(S / crop_pct);
        const size_t full = n <= other ? shorter : (size_t)((double)(shorter * n) / other);
        return ViewAxis{0, n, full, (size_t)rint((full - S) / 2.0)};
    };
    return {axis(height, width), axis(width, height)};
}

// Random erasing (Zhong et al., arXiv 1708.04896), as timm's RandomErasing: a box of 0.02 to 1/3 of the
// area, its sides' ratio log-uniform from 0.3 to 1/0.3. The noise of its pixels has the numbers up to 0xFFFFFFEF
EraseBox draw_erase(double probability, u64 seed, unsigned epoch, u64 place, int S) {
    const auto draw = [=](int i) { return philox(seed, RNG_ERASE, epoch, place << 32 | (0xFFFFFFF0u + i)); };
    const bool drawn = uniform(draw(10).x) <= probability;
    for (int attempt = 0; drawn && attempt < 10; attempt++) {
        const uint4 u = draw(attempt);
        const double area = (0.02 + (1.0 / 3.0 - 0.02) * uniform(u.x)) * S * S;
        const double ratio = exp(log(0.3) * (1.0 - 2.0 * uniform(u.y)));
        const int h = (int)rint(sqrt(area * ratio)), w = (int)rint(sqrt(area / ratio));
        if (h >= S || w >= S) { continue; }
        return EraseBox{draw_below(u.z, S - h + 1), draw_below(u.w, S - w + 1), w > 0 ? h : 0, w};
    }
    return EraseBox{};
}

// Box and Muller; the four words of one Philox serve four channels
__device__ inline float erase_noise(u64 seed, unsigned epoch, u64 place, unsigned pixel, unsigned c) {
    const uint4 u = philox(seed, RNG_ERASE, epoch, place << 32 | pixel);
    const float length = ((c < 2 ? u.x : u.z) + 0.5f) * 2.3283064365386963e-10f; // 2^-32
    const float turn = (c < 2 ? u.y : u.w) * 1.4629180792671596e-09f;            // 2 pi 2^-32
    return sqrtf(-2.0f * logf(length)) * (c & 1 ? sinf(turn) : cosf(turn));
}

// log of a draw of Gamma(alpha, 1) (Marsaglia and Tsang, ACM TOMS 26, 2000): the draw itself underflows
// where alpha is small. *i counts the draws of this purpose and step
double draw_log_gamma(double alpha, u64 seed, unsigned step, u64* i) {
    const double d = (alpha < 1.0 ? alpha + 1.0 : alpha) - 1.0 / 3.0, c = 1.0 / sqrt(9.0 * d);
    for (;;) {
        const uint4 u = philox(seed, RNG_MIX, step, (*i)++);
        const double x = normal(u), root = 1.0 + c * x, v = root * root * root;
        if (v > 0.0 && log(uniform(u.z)) < 0.5 * x * x + d - d * v + d * log(v)) {
            return log(d * v) + (alpha < 1.0 ? log(uniform(u.w)) / alpha : 0.0);
        }
    }
}

// a draw of Beta(alpha, alpha)
double draw_beta(double alpha, u64 seed, unsigned step, u64* i) {
    const double a = draw_log_gamma(alpha, seed, step, i), b = draw_log_gamma(alpha, seed, step, i);
    return 1.0 / (1.0 + exp(b - a));
}

// cutmix's box: what lies in the image of a square of (1 - lam) * S * S pixels about (y, x)
void cutmix_box(BatchAugment* a, double lam, int y, int x, int S) {
    const int side = (int)(S * sqrt(1.0 - lam));
    a->top = std::max(y - side / 2, 0);
    a->left = std::max(x - side / 2, 0);
    a->bottom = std::min(y + (side + 1) / 2, S);
    a->right = std::min(x + (side + 1) / 2, S);
    a->lam = (float)(1.0 - (double)(a->bottom - a->top) * (a->right - a->left) / ((double)S * S));
}

// How this rank mixes its images, of side S, of the run's batch number `batch`, if it does: by mixup
// (Zhang et al., arXiv 1710.09412) or cutmix (Yun et al., arXiv 1905.04899), as timm's Mixup, mode batch
void draw_mix(BatchAugment* a, const ImageData* d, u64 seed, unsigned batch, int S) {
    u64 i = (u64)rank << 32;
    const uint4 u = philox(seed, RNG_MIX, batch, i++);
    const bool mixed = (d->mixup > 0.0 || d->cutmix > 0.0) && uniform(u.x) < d->mix;
    a->cut = d->cutmix > 0.0 && (d->mixup == 0.0 || uniform(u.y) < d->mix_switch);
    if (!mixed) { return; }
    const double lam = draw_beta(a->cut ? d->cutmix : d->mixup, seed, batch, &i);
    a->lam = (float)lam;
    if (a->cut) { cutmix_box(a, lam, draw_below(u.z, S), draw_below(u.w, S), S); }
}

// The loader: which images a batch holds, and what part of each is wanted, follow from seed and batch
// number alone. The shard reader stages the images; the loader's stream copies them to the device, piece
// by piece, and resizes them if it must, while the step before computes. A group, images in a row of one
// piece, is resized at once, with scratch at the end of the memory that stays in the device's cache:
//   staging memory  | image 0 | image 1 | image 2 | image 3 | free | scratch of 1, then 3 | 0, then 2 |
typedef struct { // what is planned of a batch beside its jobs
    Batch batch;           // as the model will see it
    ResizeTask* tasks;     // (B) in pinned memory, and behind them
    EraseBox* erased;      // (B)
    int *labels, *flips;   // (B)
    cudaEvent_t copied;    // the batch is on the device
} ImageBatch;
struct Loader : Reader {
    const Model* model;
    bool training;         // else evaluation: every image once, in the order of the files
    bool resizes;          // else all images are S x S and only copied
    size_t ranks, rank, repeats; // that share the images; times in a row that they, together, show one
    unsigned* order;       // (images) of the current epoch
    long long epoch, ahead; // of that order, -1: the files'; the batch that is being read, -1: none
    ImageBatch batches[2]; // batch b is batches[b % 2]
    size_t group_bytes;    // most scratch of a group
    cudaStream_t stream;   // copies and resizes
    cudaEvent_t released;  // what is on the device may be overwritten
};

// what part of an image is wanted at a place of an epoch
ImageView loader_view(const Loader* loader, const ShardEntry* e, unsigned epoch, size_t place) {
    const Model* m = loader->model;
    const ImageData* d = m->images;
    const bool training = loader->training, whole = training && e->height == m->H && e->width == m->H;
    ImageView v = training && d->crop
        ? random_crop(e->height, e->width, m->H, d->crop_scale, m->seed, epoch, place)
        : center_crop(e->height, e->width, m->H, whole ? 1.0 : d->crop_pct);
    v.mirror = training && d->flip && (philox(m->seed, RNG_AUGMENT, epoch, place).x & 1);
    return v;
}

// Staging memory that images of this set need on the device: PIECE_BYTES, or what the largest image
// takes. 0: all images are of the model's size, and nothing is resized
size_t loader_staging_bytes(const Loader* loader) {
    const ImageData* d = loader->model->images;
    const size_t S = loader->model->H;
    const bool crops = loader->training && d->crop;
    bool resizes = crops || (!loader->training && floor(S / d->crop_pct) != S);
    size_t largest = PIECE_BYTES;
    for (unsigned i = 0; i < loader->set.images; i++) {
        const ShardEntry* e = set_image(&loader->set, i).entry;
        const ImageView whole = {{0, (int)e->height, S, 0}, {0, (int)e->width, S, 0}};
        const ImageView v = crops ? whole : center_crop(e->height, e->width, S, d->crop_pct);
        const ResizeTask t = resize_task(&v, (int)S, (int)loader->model->CH);
        largest = std::max(largest, t.staged_bytes + t.scratch_bytes);
        resizes = resizes || e->height != S || e->width != S;
    }
    return resizes ? largest : 0;
}

Loader* loader_new(const char* path, Model* model, bool training) {
    ImageData* d = model->images;
    const size_t S = model->H, image = numel(S, S, model->CH);
    const bool alone = model->s->predict != NULL; // every rank predicts all images; only rank 0 prints
    require(path != NULL, training ? "training images are missing; give them with -i"
                                   : "validation images are missing; give them with -j");
    require(S == model->W, "images are loaded as squares, -size %s is none; it goes with -plan 1 only", model->s->size);
    Loader* loader = host_new<Loader>(1, "the loader");
    loader->set = shards_open(path);
    loader->model = model;
    loader->training = training;
    loader->ranks = alone ? 1 : num_ranks;
    loader->rank = alone ? 0 : rank;
    loader->repeats = training ? d->repeats : 1;
    loader->epoch = loader->ahead = -1;
    const ShardHeader* h = loader->set.shards[0].header;
    require(h->task == 0, "%s is a detection shard (task %u), a classifier trains on task 0", path, h->task);
    require(h->channels == model->CH, "%s has images of %u channels, the model takes %zu; set -chans", path,
            h->channels, model->CH);
    require(alone || h->classes == model->V, "%s has %u classes, the model %zu; set -classes", path,
            h->classes, model->V);
    const size_t staging = loader_staging_bytes(loader);
    loader->resizes = staging > 0; // else a piece is a batch, or PIECE_BYTES of it, or one image
    loader->piece_bytes = loader->resizes ? staging
        : std::min(align_up(model->B * image), std::max(align_up(image), PIECE_BYTES));
    d->staging_bytes = std::max(d->staging_bytes, staging);
    return loader;
}

uint32_t loader_crc(const Loader* loader) { return loader->set.crc; }
size_t loader_images(const Loader* loader) { return loader->set.images; }
size_t loader_first(const Loader* loader) { return loader->ahead < 0 ? 0 : (size_t)loader->ahead; }

// With repeats, as timm's RepeatAugSampler: each image of the permutation stands `repeats` times in a
// row; of these a rank takes each ranks-th, up to `chosen`
size_t loader_epoch(const Loader* loader) {
    const size_t images = loader->set.images, repeats = loader->repeats, ranks = loader->ranks;
    const size_t chosen = images >= 256 ? images / 256 * 256 / ranks : CEIL_DIV(images, ranks);
    return ranks * (repeats == 1 ? images / ranks : std::min(chosen, CEIL_DIV(images * repeats, ranks)));
}

// The place in the epoch of image i of a batch, for this rank; `batch` counts from the begin of the
// epoch. Random choices depend on the place, and one image stands at `repeats` places in a row
size_t loader_place(const Loader* l, size_t batch, size_t i) {
    const size_t B = l->model->B;
    return l->repeats > 1 ? (batch * B + i) * l->ranks + l->rank : (batch * l->ranks + l->rank) * B + i;
}

// which image of the set stands at a place of the epoch
unsigned loader_image(const Loader* l, size_t place) {
    return l->order[place % (l->set.images * l->repeats) / l->repeats];
}

size_t loader_batches(const Loader* l) {
    const size_t B = l->model->B, all = CEIL_DIV(l->set.images, B), accumulation = l->model->s->accumulation;
    if (l->training) { return loader_epoch(l) / l->ranks / (B * accumulation) * accumulation; } // of whole steps
    return all > l->rank ? CEIL_DIV(all - l->rank, l->ranks) : 0;
}

void loader_print(const Loader* loader, const char* what) {
    const ShardSet* set = &loader->set;
    printf("%s data: %u images in %d shard%s, %s\n", what, set->images, set->num_shards,
           set->num_shards > 1 ? "s" : "", loader->resizes ? "resized on the device" : "of the model's size");
}

void loader_start(Loader* loader, Model* model) {
    const ImageData* d = model->images;
    const size_t B = model->B;
    const PixelStats stats = *(const PixelStats*)loader->set.shards[0].header->mean; // mean, then std
    const float smoothing = loader->training ? (float)d->smoothing : 0.0f;
    loader->order = host_new<unsigned>(loader->set.images, "the order of images");
    for (unsigned i = 0; i < loader->set.images; i++) { loader->order[i] = i; }
    for (ImageBatch& b : loader->batches) {
        b.batch = Batch{d->images, d->labels, d->flips, 0, stats, smoothing, {}, loader};
        cudaCheck(cudaMallocHost((void**)&b.tasks, B * (sizeof(ResizeTask) + sizeof(EraseBox) + 2 * sizeof(int))));
        b.erased = (EraseBox*)(b.tasks + B);
        b.labels = (int*)(b.erased + B);
        b.flips = b.labels + B;
        cudaCheck(cudaEventCreateWithFlags(&b.copied, cudaEventDisableTiming | cudaEventBlockingSync));
    }
    cudaCheck(cudaStreamCreateWithFlags(&loader->stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&loader->released, cudaEventDisableTiming));
    reader_start(loader, B, model->s->threads);
    cudaDeviceProp properties;
    cudaCheck(cudaGetDeviceProperties(&properties, loader->device));
    if (loader->group_bytes == 0) { loader->group_bytes = (size_t)properties.l2CacheSize; }
}

void loader_close(Loader* loader) {
    if (loader != NULL && loader->order != NULL) { // it was started
        cudaCheck(cudaStreamSynchronize(loader->stream));
        reader_close(loader);
        for (const ImageBatch& b : loader->batches) { cudaCheck(cudaFreeHost(b.tasks)); }
        free(loader->order);
    }
    free(loader);
}

// what a thread does with a record: it becomes weights and transposed pixels, or is copied
void stage_record(const Reader* r, const ReadJob* job, uint8_t* staged) {
    const Loader* loader = static_cast<const Loader*>(r);
    const int S = (int)loader->model->H, CH = (int)loader->model->CH;
    if (!loader->resizes) { memcpy(staged, job->record, numel(S, S, CH)); return; }
    const ImageBatch* b = &loader->batches[job->batch];
    const BatchAugment* a = &b->batch.augment;
    const ImageView v = loader_view(loader, job->entry, a->epoch, a->place + job->image * a->place_step);
    resize_stage(staged, &b->tasks[job->image], &v, job->record, job->entry->width, S, CH);
}

// what holds for a whole batch (`number` counts those of this rank's run): its place, how it is mixed
void loader_plan_batch(Loader* loader, Batch* batch, size_t number) {
    const Model* m = loader->model;
    const ImageData* d = m->images;
    const size_t batches = loader_batches(loader), images = loader->set.images, at = number % batches;
    const size_t place = loader_place(loader, at, 0), step = loader_place(loader, at, 1) - place;
    const unsigned epoch = (unsigned)(number / batches);
    const EraseBox* erased = loader->training && d->erase > 0.0 ? d->erased : NULL;
    batch->n = loader->training ? m->B : std::min(m->B, images - place);
    batch->augment = BatchAugment{erased, m->seed, place, step, epoch, (int)batch->n, 1.0f, false, 0, 0, 0, 0};
    if (!loader->training) { return; }
    draw_mix(&batch->augment, d, m->seed, (unsigned)number, (int)m->H);
    if (loader->epoch != (long long)epoch) { shuffle(loader->order, (unsigned)images, m->seed, epoch); }
    loader->epoch = epoch;
}

// plans the images of a batch and gives them to the threads
void loader_plan(Loader* loader, size_t number) {
    const ImageData* d = loader->model->images;
    const int S = (int)loader->model->H, CH = (int)loader->model->CH;
    ImageBatch* b = &loader->batches[number % 2];
    const BatchAugment* a = &b->batch.augment;
    size_t group = 0, most = 0; // scratch of the group so far, and of the largest group of the piece
    cudaCheck(cudaEventSynchronize(b->copied)); // the device may still read its pinned memory
    loader_plan_batch(loader, &b->batch, number);
    for (size_t i = 0; i < b->batch.n; i++) {
        const size_t place = a->place + i * a->place_step;
        ReadJob image = set_image(&loader->set, loader_image(loader, place));
        image.batch = number % 2;
        image.image = (int)i;
        const ImageView v = loader_view(loader, image.entry, a->epoch, place);
        b->labels[i] = image.entry->label;
        b->flips[i] = !loader->resizes && v.mirror;
        if (a->erased != NULL) { b->erased[i] = draw_erase(d->erase, a->seed, a->epoch, place, S); }
        ResizeTask t = {};
        if (loader->resizes) { t = resize_task(&v, S, CH); } else { t.staged_bytes = numel(S, S, CH); }
        if (group + t.scratch_bytes > loader->group_bytes) { group = 0; } // a group begins
        group += t.scratch_bytes;
        most = std::max(most, group);
        t.staged = reader_add(loader, image, t.staged_bytes, most);
        if (t.staged == 0) { group = most = t.scratch_bytes; } // a piece begins
        assert(t.staged + t.staged_bytes + most <= loader->piece_bytes);
        t.resized = loader->piece_bytes - group;
        t.image = (int)i;
        b->tasks[i] = t;
    }
    loader->ahead = (long long)number;
    reader_set(loader, &loader->planned, loader->num_jobs);
}

// device = host (n), in pinned memory
template <class T> static void upload(T* device, const T* host, size_t n, cudaStream_t stream) {
    cudaCheck(cudaMemcpyAsync(device, host, n * sizeof(T), cudaMemcpyHostToDevice, stream));
}

// copies the next piece of batch b from its slot to the device, and resizes it group by group
void loader_copy_piece(Loader* loader, const ImageBatch* b) {
    const ReadPiece* piece = reader_wait(loader);
    const ImageData* d = loader->model->images;
    const ResizeTask *t = b->tasks + loader->jobs[piece->first % loader->ring].image, *last = t + piece->jobs;
    const int S = (int)loader->model->H, CH = (int)loader->model->CH;
    if (!loader->resizes) {
        upload(d->images + numel(t->image, S, S, CH), piece->slot, piece->bytes, loader->stream);
        reader_copied(loader, loader->stream);
        return;
    }
    for (const ResizeTask* end; t < last; t = end) {
        int pitch = t->pitch; // the largest of the group; a group begins where scratch ends with the memory
        for (end = t + 1; end < last && end->resized + end->scratch_bytes < loader->piece_bytes; end++) {
            pitch = std::max(pitch, end->pitch);
        }
        const size_t at = t->staged, bytes = (end < last ? end->staged : piece->bytes) - at;
        upload(d->staging + at, piece->slot + at, bytes, loader->stream);
        if (end == last) { reader_copied(loader, loader->stream); }
        resize_images(d->images, d->staging, d->tasks + t->image, (int)(end - t), pitch, S, CH, loader->stream);
    }
}

void loader_batch(Loader* loader, size_t number) {
    if (loader->ahead < 0) { loader_plan(loader, number); }
    assert(loader->ahead == (long long)number);
    const ImageBatch* b = &loader->batches[number % 2];
    const ImageData* d = loader->model->images;
    const size_t n = b->batch.n, pieces = loader->num_pieces; // up to the end of this batch
    loader_plan(loader, number + 1);
    cudaCheck(cudaStreamWaitEvent(loader->stream, loader->released, 0));
    upload(d->labels, b->labels, n, loader->stream);
    upload(d->flips, b->flips, n, loader->stream);
    if (loader->resizes) { upload(d->tasks, b->tasks, n, loader->stream); }
    if (b->batch.augment.erased != NULL) { upload(d->erased, b->erased, n, loader->stream); }
    while (loader->issued < pieces) { loader_copy_piece(loader, b); }
    if (loader->training) { model_augment(d->augmenter, &b->batch, loader->stream); }
    cudaCheck(cudaEventRecord(b->copied, loader->stream));
}

const Batch* loader_take(const Loader* loader) {
    const ImageBatch* b = &loader->batches[(loader->ahead + 1) % 2]; // the one before `ahead`
    cudaCheck(cudaStreamWaitEvent(main_stream, b->copied, 0));
    return &b->batch;
}
void batch_used(const Batch* batch) {
    if (batch->loader != NULL) { cudaCheck(cudaEventRecord(batch->loader->released, main_stream)); }
}

void classifier_loss(Model* model, floatX* logits, const int* labels, const Batch* batch, float scale) {
    const ImageData* d = model->images;
    cross_entropy(model->result, d->losses, d->ranks, logits, labels, (int)batch->n, (int)model->V,
                  batch->smoothing, batch->augment.lam, scale);
}

void mean_scores(const Model* model, size_t images, double* scores) {
    const StepResult r = model_result(model);
    const Metric* m = model_eval_metrics;
    for (int i = 0; m[i].name != NULL; i++) { scores[i] = m[i].unit * (r.sums[i] / images); }
}

// prints the (up to) five best classes of an image with their probabilities: softmax of the logits (V),
// in double. Of classes with the same logit the lower comes first. order (V): any order of all classes
static void print_best(size_t image, const floatX* logits, int V, int* order) {
    const auto logit = [=](int v) { return (double)(float)logits[v]; };
    const auto better = [=](int v, int w) { return logit(v) > logit(w) || (logit(v) == logit(w) && v < w); };
    double sum = 0.0;
    for (int v = 0; v < V; v++) {
        require(isfinite(logit(v)), "image %zu: the logit of class %d is not finite; the weights are damaged, or too "
                "large for " PRECISION_NAME, image, v);
    }
    std::partial_sort(order, order + std::min(V, 5), order + V, better);
    for (int v = 0; v < V; v++) { sum += exp(logit(v) - logit(order[0])); }
    printf("image %zu:", image);
    for (int i = 0; i < std::min(V, 5); i++) {
        printf("%s %d %.6f", i > 0 ? "," : "", order[i], exp(logit(order[i]) - logit(order[0])) / sum);
    }
    printf("\n");
}

void predict(Model* model, Loader* loader) {
    const size_t batches = loader_batches(loader), V = model->V;
    floatX* logits = host_new<floatX>(model->B * V, "logits");
    int* order = host_new<int>(V, "classes");
    for (size_t v = 0; v < V; v++) { order[v] = (int)v; }
    for (size_t number = 0; number < batches; number++) {
        loader_batch(loader, number);
        const Batch* batch = loader_take(loader);
        const floatX* on_device = model_predict(model, batch);
        cudaCheck(cudaStreamSynchronize(main_stream));
        cudaCheck(cudaMemcpy(logits, on_device, batch->n * V * sizeof(floatX), cudaMemcpyDeviceToHost));
        for (size_t b = 0; b < batch->n; b++) { print_best(number * model->B + b, logits + b * V, (int)V, order); }
    }
    free(logits);
    free(order);
}

// Writes up to 64 images of a training batch as the model gets them, normalised: image (n, CH, H, W),
// label (n), and mean and std (CH) of the normalisation. data/sheet.py draws the file
void write_sheet(Model* model, Loader* loader, size_t number) {
    const size_t H = model->H, W = model->W, CH = model->CH, n = std::min<size_t>(model->B, 64), pixels = H * W;
    float* images = host_new<float>(n * CH * pixels, "images");
    float labels[64];
    loader_batch(loader, number);
    const Batch* batch = loader_take(loader);
    model_input(model, batch);
    cudaCheck(cudaStreamSynchronize(main_stream));
    for (size_t b = 0; b < n; b++) {
        labels[b] = (float)loader->batches[number % 2].labels[b];
        model_pixels(model, b, images + b * CH * pixels);
    }
    StMetadata metadata = {"format", "pt"};
    const PixelStats* stats = &batch->stats;
    StTensor tensors[] = {{"image", "F32", {n, CH, H, W}, 0, 0, 4, images}, {"label", "F32", {n}, 0, 0, 1, labels},
                          {"mean", "F32", {CH}, 0, 0, 1, stats->mean}, {"std", "F32", {CH}, 0, 0, 1, stats->std}};
    if (rank == 0) { safetensors_write(model->s->sheet, {&metadata, 1}, {tensors, 4}); }
    printf("wrote %s: the first %zu images of a training batch; data/sheet.py draws them\n", model->s->sheet, n);
    free(images);
}
// ---- end shared: image classifiers -----------------------------------------

// ---- shared: command line --------------------------------------------------
// Parser, usage and the entries of a checkpoint come from one table, so that they cannot disagree

// the value of a flag as text; digits: of a double, of which 17 tell any two apart
void option_text(const Option* o, char text[160], int digits = 17) {
    if (o->type == 'i') { snprintf(text, 160, "%d", *(int*)o->value); }
    else if (o->type == 'f') { snprintf(text, 160, "%.*g", digits, *(double*)o->value); }
    else { snprintf(text, 160, "%s", *(const char**)o->value != NULL ? *(const char**)o->value : ""); }
}

void add_option(Model* model, Option o) {
    assert(model->num_options < MAX_OPTIONS);
    option_text(&o, o.neutral);
    model->options[model->num_options++] = o;
}

[[noreturn]] static void usage(const char* program, const Model* model) {
    printf("usage: %s [flag value] ...\n", program);
    for (const Option* o = model->options; o < model->options + model->num_options; o++) {
        char text[160];
        option_text(o, text, 6);
        printf("  %-10s %s (default %s)\n", o->flag, o->help, text[0] != 0 ? text : "none");
    }
    printf("recipes (-recipe NAME; flags beside it override):\n");
    for (auto recipe = model_recipes; (*recipe)[0] != NULL; recipe++) {
        printf("  %s: %s\n", (*recipe)[0], (*recipe)[1]);
    }
    exit(EXIT_SUCCESS);
}

static void set_option(Model* model, const char* program, const char* flag, const char* arg) {
    const Option *o = model->options, *end = o + model->num_options;
    while (o < end && strcmp(flag, o->flag) != 0) { o++; }
    require(o < end, "unknown flag %s; %s -h lists the flags", flag, program);
    require(arg != NULL, "flag %s lacks its value; %s -h lists the flags", flag, program);
    if (o->type == 's') {
        require(o->resume == ANY || strlen(arg) < sizeof(o->neutral), "the value of %s has %zu characters, %zu are "
                "allowed", flag, strlen(arg), sizeof(o->neutral) - 1);
        *(const char**)o->value = arg;
        return;
    }
    char* rest;
    const double v = strtod(arg, &rest);
    require(rest != arg && *rest == 0, "%s wants a number, got '%s'", flag, arg);
    const bool within = v >= o->least && v <= o->most; // a NaN is not
    require(within, "%s must be between %g and %g, got %s", flag, o->least, o->most, arg);
    if (o->type == 'f') { *(double*)o->value = v; return; }
    require(v == (int)v, "%s wants a whole number, got '%s'", flag, arg);
    *(int*)o->value = (int)v;
}

// sets the flags of a recipe, or those that a model begins with
static void set_options(Model* model, const char* program, const char* flags) {
    char* words = strdup(flags); // lives as long as the flags do
    require(words != NULL, "out of host memory for the flags %s", flags);
    for (char* flag = strtok(words, " "); flag != NULL; flag = strtok(NULL, " ")) {
        set_option(model, program, flag, strtok(NULL, " "));
    }
}

// the value that the user gave a flag last; NULL: none
static const char* given(int argc, char** argv, const char* flag) {
    const char* value = NULL;
    for (int i = 1; i + 1 < argc; i += 2) { if (strcmp(argv[i], flag) == 0) { value = argv[i+1]; } }
    return value;
}

// What a model begins with (model_defaults) and what a recipe stands for become the defaults, wherever
// -m and -recipe stand; then come the user's flags
void parse_options(Model* model, int argc, char** argv) {
    const char *recipe = given(argc, argv, "-recipe"), *name = given(argc, argv, "-m"), *flags = "";
    for (int i = 0; recipe != NULL && model_recipes[i][0] != NULL; i++) {
        if (strcmp(recipe, model_recipes[i][0]) == 0) { flags = model_recipes[i][1]; }
    }
    require(recipe == NULL || flags[0] != 0, "-recipe %s is not a recipe; %s -h lists them", recipe, argv[0]);
    set_options(model, argv[0], flags); // says which model it is
    set_options(model, argv[0], model_defaults(name != NULL ? name : model->s->model));
    set_options(model, argv[0], flags);
    for (int i = 1; i < argc; i += 2) {
        if (strcmp(argv[i], "-h") == 0) { usage(argv[0], model); }
        set_option(model, argv[0], argv[i], i + 1 < argc ? argv[i+1] : NULL);
    }
}

// "224" or "800x1067"; 0 is the model's own size
static void parse_size(const char* text, size_t* H, size_t* W) {
    char* end;
    *H = *W = strtoul(text, &end, 10);
    if (*end == 'x') { *W = strtoul(end + 1, &end, 10); }
    const bool number = text[0] >= '0' && text[0] <= '9' && *end == 0;
    require(number && *H <= 16384 && *W <= 16384 && (*H == 0) == (*W == 0), "-size wants N or HxW of at most 16384 "
            "pixels, such as 224 or 800x1067, got '%s'", text);
}

// "24GiB", "512MiB", "1000000"
static size_t parse_bytes(const char* text) {
    char* end;
    const double v = strtod(text, &end);
    const bool GiB = strcmp(end, "GiB") == 0;
    const double unit = GiB ? 1024.0 * MiB : strcmp(end, "MiB") == 0 ? MiB : *end == 0 ? 1.0 : 0.0;
    require(end != text && unit > 0.0 && v >= 0.0 && v * unit < 1e18,
            "-plan wants 1 or a memory size such as 24GiB or 512MiB, got '%s'", text);
    return (size_t)(v * unit);
}

// checks what flags mean, and what of them fits together
void settings_derive(Model* model) {
    const Settings* s = model->s;
    const char* const strategies[] = {"mink", "fastmink", "random"}; // in the order of their numbers
    require(strcmp(s->optimizer, "adamw") == 0 || strcmp(s->optimizer, "sgd") == 0,
            "-opt %s is not an optimizer; choose adamw or sgd", s->optimizer);
    model->strategy = -1;
    for (int i = 0; i < 3; i++) { if (strcmp(s->strategy, strategies[i]) == 0) { model->strategy = i; } }
    require(model->strategy >= 0, "-s %s is not a strategy; choose mink, fastmink or random", s->strategy);
    require(s->output != NULL || (s->save_every == 0 && s->resume == 0),
            "-n and -y need a directory for checkpoints; give -o");
    require(s->evaluate_only + (s->predict != NULL) + (s->sheet != NULL) <= 1,
            "-eval, -predict and -sheet do one thing each and exit; give one of them");
    require(s->predict == NULL || s->weights != NULL, "-predict needs weights; give them with -w");
    require(strcmp(s->schedule, "step") == 0 || strcmp(s->schedule, "epoch") == 0,
            "-schedule %s is not a schedule; choose step or epoch", s->schedule);
    require(s->stats == 0 || s->gamma > 0.0, "-stats reports on DropIT; give -g above 0 too");
    model->name = s->model;
    model->B = s->B;
    model->CH = s->chans;
    model->V = s->classes;
    parse_size(s->size, &model->H, &model->W);
    model->adamw = strcmp(s->optimizer, "adamw") == 0;
    model->seed = (unsigned long long)s->seed;
    model->chunk_bytes = (size_t)s->chunk << 20;
    model_configure(model);
}

// adds an entry for each flag that a resumed run must share and that is not neutral: what a later
// version adds is then not missing in the checkpoints of before
void options_metadata(const Model* model, List<StMetadata>* metadata) {
    for (const Option* o = model->options; o < model->options + model->num_options; o++) {
        StMetadata m;
        option_text(o, m.value);
        snprintf(m.key, sizeof(m.key), "%s", o->flag);
        if (o->resume == SAME && strcmp(m.value, o->neutral) != 0) { metadata->push(m); }
    }
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}
// ---- end shared: command line ----------------------------------------------
// ---- shared: tensors -------------------------------------------------------
// What a model's two tables become. Parameters begin at multiples of 128 elements, by kind: decayed,
// other trained ones, padding up to whole shards; then, in memory of their own, frozen ones and buffers
struct Scratch {
    double* norm_partial;
    DropScratch drop;
    size_t drop_tiles, drop_list; // of the selections that run together, at most
    float* stats_exact;           // (num_parameters), -stats: gradients of the exact inputs
    double* stats_sums;           // (dropped tensors, 6): of x*exact, x^2, exact^2; the same of the gradients
    size_t stats_bytes;           // of these
};

// n elements from the host to the device, and back; the host waits
template <class T> void to_device(T* device, const T* host, size_t n) {
    cudaCheck(cudaMemcpy(device, host, n * sizeof(T), cudaMemcpyHostToDevice));
}
template <class T> void to_host(T* host, const T* device, size_t n) {
    cudaCheck(cudaMemcpy(host, device, n * sizeof(T), cudaMemcpyDeviceToHost));
}

Init constant_init(double value) { return Init{Init::CONSTANT, value}; }
Init normal_init(double deviation) { return Init{Init::NORMAL, deviation}; }
Init uniform_init(size_t fan_in) { return Init{Init::UNIFORM, 1.0 / sqrt((double)fan_in)}; }
bool is_trained(const Parameter* p) { return p->kind == DECAY || p->kind == PLAIN; }

template <class... Dims> void add_parameter(Model* model, floatX** param, float** grad, float** buffer,
                                            const char* name, int copy, int copies, int kind, Init init, Dims... dims) {
    Parameter p = {"", kind, sizeof...(dims), copy, copies, false, init, {(size_t)dims...}, numel(dims...), 0,
                   kind == BUFFER ? NULL : param, grad, kind == BUFFER ? buffer : NULL, false};
    snprintf(p.name, sizeof(p.name), name, copy);
    if (!is_trained(&p)) { p.grad = NULL; }
    if (p.n > 0) { model->parameters.push(p); }
}

// gives the parameters their places
static void place_parameters(Model* model) {
    size_t ends[NUM_KINDS], offset = 0; // DECAY, PLAIN, FROZEN and BUFFER follow one another
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        for (Parameter& p : model->parameters) {
            if (p.kind != kind) { continue; }
            p.offset = offset;
            offset += CEIL_DIV(p.n, (size_t)128) * 128;
        }
        if (kind == PLAIN) { // the trained ones are split into shards of equal size
            const size_t shards = model->s->sharded ? num_ranks : 1;
            model->shard_n = CEIL_DIV(offset, 128 * shards) * 128;
            model->shard_begin = model->s->sharded ? rank * model->shard_n : 0;
            offset = shards * model->shard_n;
        }
        ends[kind] = offset;
    }
    model->num_decayed = ends[DECAY];
    model->num_parameters = ends[PLAIN];
    model->num_frozen = ends[FROZEN] - ends[PLAIN];
    model->num_buffers = ends[BUFFER] - ends[FROZEN];
    model->num_values = offset;
}

static void plan_floats(Model* model, int category, const char* name, float** pointer, size_t n, size_t dense) {
    if (n == 0) { return; }
    plan_add(&model->plan, category, name, "", "fp32", pointer, n * sizeof(float), dense * sizeof(float));
}

static void plan_parameters(Model* model) {
    const size_t n = model->num_parameters, shard = model->shard_n, buffers = model->num_buffers;
    const size_t fixed = model->num_frozen + buffers, params = (n + model->num_frozen) * sizeof(floatX);
    const bool ema = model->s->ema > 0.0, masters = sizeof(floatX) != sizeof(float);
    plan_add(&model->plan, PARAMETERS_MEMORY, "parameters", "", "with padding", &model->params_memory, params, params);
    plan_floats(model, PARAMETERS_MEMORY, "frozen, buffers", &model->fixed, fixed, fixed);
    plan_floats(model, GRADIENTS, "gradients", &model->grads_memory, n, n);
    plan_floats(model, OPTIMIZER, "momentum", &model->m, shard, n);
    plan_floats(model, OPTIMIZER, "second moment", &model->v, model->adamw ? shard : 0, n);
    plan_floats(model, OPTIMIZER, "master weights", &model->master, masters ? shard : 0, n);
    plan_floats(model, OPTIMIZER, "moving average", &model->ema, ema ? shard : 0, n);
    plan_floats(model, OPTIMIZER, "average of buffers", &model->buffers_ema, ema ? buffers : 0, buffers);
}

void plan_activation(Model* model, Activation* a, const char* name, const char* shape, int copy, int copies,
                     int bits, size_t n, int level, int cache) {
    Plan* plan = &model->plan;
    const Settings* s = model->s;
    const Activation* before = model->activations.n > 0 ? model->activations.end()[-1] : NULL;
    if (copy == 0) { model->num_lines++; }
    const bool dropped = s->gamma > 0.0 && (cache == DROP || (cache == ALL && s->drop_all));
    *a = {name, copy, copies, model->num_lines - 1, bits, cache, n, n / model->B, n > 0 && s->recompute < level,
          n > 0 && dropped, false, 0, 0, 0, NULL, NULL, NULL, {}};
    if (n == 0) { return; }
    assert(n % model->B == 0 && a->per_image * bits % 8 == 0);
    model->activations.push(a);
    // copies of a line share the memory of their chunks and batches
    const bool shares = before != NULL && before->line == a->line;
    char** chunk_of = shares ? (char**)&before->chunk : model->chunk_home;
    char** batch_of = shares ? (char**)&before->batch : NULL;
    const size_t bytes = n * bits / 8, dense = align_up(bytes), chunk = bytes / model->B * model->chunk_images;
    if (!a->dropped) {
        if (a->cached) { plan_add(plan, CACHED, name, "", shape, &a->data, bytes, dense); }
        else { plan_add(plan, SCRATCH, name, ".chunk", shape, &a->chunk, chunk, dense, chunk_of); }
        return;
    }
    if (n >= (size_t)1 << 32) { model->too_large = name; }
    Dropped* d = &a->dropit;
    d->n = n;
    d->k = dropit_k(n, s->gamma, model->strategy);
    if (a->cached) {
        plan_add(plan, CACHED, name, ".values", shape, &d->values, (d->k + 1) * sizeof(floatX), dense);
        plan_clear(plan);
        const size_t bitmap = dropit_words(n) * sizeof(unsigned), offsets = dropit_segments(n) * sizeof(unsigned);
        plan_add(plan, CACHED, name, ".bitmap", "1 bit an element", &d->bitmap, bitmap);
        plan_add(plan, CACHED, name, ".offsets", "1 bit in 8 elements", &d->offsets, offsets);
    }
    const size_t choices = (model->strategy == MINK ? 1 : dropit_tiles(n)) * sizeof(Threshold);
    plan_add(plan, CACHED, name, ".threshold", "8 bytes a choice", &d->thresholds, choices, a->cached ? 0 : dense);
    plan_add(plan, SCRATCH, name, ".batch", shape, &a->batch, bytes, 0, s->stats > 0 ? NULL : batch_of);
    plan_add(plan, SCRATCH, name, ".chunk", shape, &a->chunk, chunk, 0, chunk_of);
}

void mask_unless_read(const Model* model, Activation* a, const Activation* reader) {
    a->masked = a->dropped && !a->cached && model->strategy == MINK && reader->cached;
}

void plan_selection(Model* model, std::initializer_list<const Activation*> activations) {
    size_t tiles = 0, list = 0;
    for (const Activation* a : activations) {
        tiles += a->dropped ? dropit_tiles(a->n) : 0;
        list += a->dropped ? align_up(dropit_list_capacity(a->n)) : 0;
    }
    model->scratch->drop_tiles = std::max(model->scratch->drop_tiles, tiles);
    model->scratch->drop_list = std::max(model->scratch->drop_list, list);
}

// numbers and counts the dropped tensors: those of the published DropIT copy by copy, then those of -g_all
static int number_dropped(Model* model) {
    int lines = 0, copies = 0, extra = 0, last = -1;
    for (Activation* a : model->activations) {
        if (!a->dropped || a->cache != DROP) { continue; }
        lines += a->line != last;
        last = a->line;
        a->id = lines - 1; // the line's
        copies = std::max(copies, a->copies);
    }
    for (Activation* a : model->activations) {
        if (a->dropped) { a->id = a->cache == DROP ? lines * a->copy + a->id : lines * copies + extra++; }
    }
    return lines * copies + extra;
}

static void plan_selections(Model* model) {
    Scratch* s = model->scratch;
    const int num_dropped = number_dropped(model);
    if (s->drop_tiles > 0) { dropit_plan(&model->plan, &s->drop, s->drop_tiles, s->drop_list); }
    if (model->s->stats > 0) {
        s->stats_bytes = num_dropped * 6 * sizeof(double);
        plan_floats(model, SCRATCH, "stats exact", &s->stats_exact, model->num_parameters, 0);
        plan_add(&model->plan, SCRATCH, "stats sums", "", "(6) a tensor", &s->stats_sums, s->stats_bytes);
    }
}

char* activation_at(const Activation* a, size_t b0, bool backward) {
    const size_t offset = b0 * a->per_image * a->bits / 8;
    if (a->cached && !a->dropped) { return a->data + offset; }
    return a->dropped && !backward ? a->batch + offset : a->chunk;
}

bool computed(const Activation* a, bool backward) { return !backward || !a->cached; }
KeepLargest keep_largest(const Activation* a, size_t b0, bool recompute) {
    return {recompute && a->masked ? a->dropit.thresholds : NULL, b0 * a->per_image};
}

static DropRule drop_rule(const Model* model, const Activation* a) {
    // tensors, and ranks, differ in what the random strategy draws
    const unsigned long long tensor = (unsigned long long)(a->id + 1) << 32 ^ (unsigned long long)rank << 48;
    return DropRule{model->strategy, model->seed ^ tensor, model->pass};
}

void drop_activations(const Model* model, std::initializer_list<const Activation*> activations) {
    DropChoice choices[MAX_SELECTIONS];
    int n = 0;
    for (const Activation* a : activations) {
        if (!a->dropped) { continue; }
        assert(n < MAX_SELECTIONS);
        choices[n++] = DropChoice{(const floatX*)activation_at(a, 0, false), a->dropit, drop_rule(model, a)};
    }
    if (n > 0) { dropit_select(choices, n, &model->scratch->drop, model->s->gamma, main_stream); }
}

// sums (3) += sums of a*b, a*a and b*b over n. One block of 128 threads: for reports, not for speed
template <class T> __global__ void dot_kernel(double* sums, const T* a, const T* b, size_t n) {
    __shared__ double of[3][128];
    const int t = threadIdx.x;
    double sum[3] = {0};
    for (size_t i = t; i < n; i += 128) {
        const double x = (float)a[i], y = (float)b[i];
        sum[0] += x * y;
        sum[1] += x * x;
        sum[2] += y * y;
    }
    for (int k = 0; k < 3; k++) { of[k][t] = sum[k]; }
    __syncthreads();
    for (int i = 0; t < 3 && i < 128; i++) { sums[t] += of[t][i]; }
}

// prints what DropIT kept of a tensor, and what that does to its weight gradient, which is complete
static void stats_report(Model* model, Activation* a) {
    double *device = model->scratch->stats_sums + 6 * a->id, sums[6];
    const float *kept = model->grads_memory + a->gradient, *exact = model->scratch->stats_exact + a->gradient;
    LAUNCH_BLOCKS(dot_kernel<float>, 1, 128, main_stream, device + 3, kept, exact, a->gradient_n);
    a->gradient_n = 0; // reported
    cudaCheck(cudaStreamSynchronize(main_stream));
    to_host(sums, device, 6);
    const double elements = 100.0 * a->dropit.k / a->n, squares = 100.0 * sums[1] / sums[2];
    printf("stats %-8s copy %2d | kept %6.2f %% of the elements, %6.2f %% of the sum of squares | "
           "cosine of dW with the exact %.4f\n", a->name, a->copy, elements, squares,
           sums[3] / sqrt(sums[4] * sums[5]));
}

const floatX* kept_input(const Model* model, const Activation* a, size_t b0, size_t nb) {
    floatX* x = (floatX*)activation_at(a, b0, true);
    const size_t begin = b0 * a->per_image, end = (b0 + nb) * a->per_image;
    if (a->dropped && a->cached) { dropit_unpack(x, &a->dropit, begin, end, main_stream); }
    else if (a->dropped && !a->masked) { dropit_mask(x, &a->dropit, begin, end, drop_rule(model, a), main_stream); }
    return x;
}

float* exact_gradient(const Model* model, Activation* a, const floatX* kept, const float* dweight, size_t n,
                      size_t b0, size_t nb) {
    const Scratch* s = model->scratch;
    if (!a->dropped || !model->stats_now) { return NULL; }
    const floatX* exact = (const floatX*)activation_at(a, b0, false); // what DropIT chose from
    a->gradient = dweight - model->grads_memory;
    a->gradient_n = n;
    double* sums = s->stats_sums + 6 * a->id;
    LAUNCH_BLOCKS(dot_kernel<floatX>, 1, 128, main_stream, sums, kept, exact, nb * a->per_image);
    return s->stats_exact + a->gradient;
}

void weight_gradient(Model* model, Activation* a, float* dweight, float* dbias, const floatX* dout, size_t b0,
                     size_t nb, size_t rows, size_t C, size_t OC) {
    const floatX* x = kept_input(model, a, b0, nb);
    float* exact = exact_gradient(model, a, x, dweight, C * OC, b0, nb);
    if (exact != NULL) {
        linear_backward_weight(exact, dout, (floatX*)activation_at(a, b0, false), nb * rows, C, OC);
    }
    linear_backward_weight(dweight, dout, x, nb * rows, C, OC);
    column_sum(dbias, dout, model->partial, nb * rows, OC);
}

void gradients_done(Model* model, int copy) {
    if (!model->last_pass) { return; }
    for (Activation* a : model->activations) {
        const bool complete = copy < 0 || (a->copies > 1 && a->copy == copy);
        if (model->stats_now && complete && a->gradient_n > 0) { stats_report(model, a); }
    }
    List<Piece> pieces = {};
    for (Parameter& p : model->parameters) {
        if (!is_trained(&p) || p.added || (copy >= 0 && (p.copies == 1 || p.copy != copy))) { continue; }
        p.added = true;
        pieces.push({model->grads_memory + p.offset, p.n});
    }
    if (pieces.n > 0) { ranks_add(pieces); }
    free(pieces.of);
}

void zero_gradients(Model* model) {
    const size_t bytes = model->num_parameters * sizeof(float);
    cudaCheck(cudaMemsetAsync(model->grads_memory, 0, bytes, main_stream));
    cudaCheck(cudaMemsetAsync(model->result, 0, sizeof(StepResult), main_stream));
    for (Parameter& p : model->parameters) { p.added = false; }
    if (model->stats_now) {
        cudaCheck(cudaMemsetAsync(model->scratch->stats_exact, 0, bytes, main_stream));
        cudaCheck(cudaMemsetAsync(model->scratch->stats_sums, 0, model->scratch->stats_bytes, main_stream));
    }
}
// ---- end shared: tensors ---------------------------------------------------

// ---- shared: model state ---------------------------------------------------
// Memory, weights and optimizer states of a model as a whole
Model* model_new(void) {
    Model* model = host_new<Model>(1, "the model");
    Settings* s = model->s = host_new<Settings>(1, "flags");
    SETTINGS(OPTION)
    model_options(model);
    model->scratch = host_new<Scratch>(1, "scratch");
    return model;
}

void plan_model(Model* model) {
    Plan* plan = &model->plan;
    Scratch* s = model->scratch;
    memset(plan->bytes, 0, sizeof(plan->bytes));
    plan->lines.n = model->parameters.n = model->activations.n = model->num_lines = 0;
    model->too_large = NULL;
    s->drop_tiles = s->drop_list = 0;
    model_plan(model);
    place_parameters(model);
    plan_parameters(model);
    plan_selections(model);
    plan_add(plan, SCRATCH, "result", "", "(1)", &model->result, sizeof(StepResult));
    plan_add(plan, SCRATCH, "norm partials", "", "fp64", &s->norm_partial, NORM_BLOCKS * sizeof(double));
    plan_add(plan, SCRATCH, "cuBLAS workspace", "", "bytes", &cublas_workspace, CUBLAS_WORKSPACE);
}

// the largest batch whose plan fits into `bytes`; 0: none. When it returns, the plan is that of model->B
size_t largest_batch(Model* model, size_t bytes) {
    const size_t own = model->B;
    size_t fits = 0, limit = 64;
    // no bisection: a larger batch in smaller chunks may need less scratch. So all up to twice what fits
    for (model->B = 1; model->B <= limit; model->B++) {
        plan_model(model);
        if (plan_total(&model->plan) > bytes || model->too_large != NULL) { continue; }
        fits = model->B;
        limit = 2 * model->B + 64;
    }
    model->B = own;
    plan_model(model);
    return fits;
}

static void plan_checked(Model* model) {
    plan_model(model);
    require(model->too_large == NULL, "%s has 2^32 elements or more, too many for DropIT's 32-bit indices; use a "
            "smaller batch (-b)", model->too_large);
}

// the table of all memory, and a line of it for programs; -plan 24GiB: also the largest batch that fits
void report_plan(Model* model) {
    const bool fits = strcmp(model->s->plan, "1") != 0;
    const size_t limit = fits ? parse_bytes(model->s->plan) : 0;
    plan_checked(model);
    plan_print(&model->plan);
    printf("plan");
    for (int c = 0; c < NUM_CATEGORIES; c++) { printf(" %s=%zu", category_names[c], model->plan.bytes[c]); }
    if (fits) { printf(" max_batch=%zu", largest_batch(model, limit)); }
    printf(" total=%zu\n", plan_total(&model->plan));
}

// points the model at trained parameters and buffers: its own, or their moving averages
static void point_at(Model* model, floatX* trained, float* buffers) {
    const size_t first = model->num_parameters + model->num_frozen; // place of the first buffer
    for (Parameter& p : model->parameters) {
        if (is_trained(&p)) { *p.param = trained + p.offset; }
        if (p.buffer != NULL) { *p.buffer = buffers + (p.offset - first); }
    }
}

// allocates everything; fails with what is needed, what is there and what would fit
void model_allocate(Model* model) {
    plan_checked(model);
    size_t free_bytes, total_bytes;
    const size_t need = plan_total(&model->plan);
    cudaCheck(cudaMemGetInfo(&free_bytes, &total_bytes));
    require(need <= free_bytes, "%zu bytes of device memory are needed, %zu are free; the largest batch that fits is "
            "-b %zu, and a higher -r or -g lowers the need", need, free_bytes, largest_batch(model, free_bytes));
    plan_allocate(&model->plan);
    cublasCheck(cublasSetWorkspace(cublas_handle, cublas_workspace, CUBLAS_WORKSPACE)); // else it allocates its own
    if (sizeof(floatX) == 4) { model->master = (float*)model->params_memory + model->shard_begin; }
    for (Parameter& p : model->parameters) {
        if (p.kind == FROZEN) { *p.param = model->params_memory + p.offset; }
        if (p.grad != NULL) { *p.grad = model->grads_memory + p.offset; }
    }
    point_at(model, model->params_memory, model->fixed + model->num_frozen);
    model->scratch->drop.not_finite = &model->result->not_finite;
    cudaCheck(cudaStreamSynchronize(main_stream));
}

void model_free(Model* model) {
    for (char* block : model->plan.blocks) { cudaCheck(cudaFree(block)); }
    for (void* p : {(void*)model->plan.lines.of, (void*)model->parameters.of, (void*)model->activations.of,
                    (void*)model->scratch, (void*)model->s, (void*)model}) { free(p); }
}

// copies host values (num_values) to the device, as masters, rounded, and as their moving average
static void set_parameters(Model* model, const float* values) {
    const size_t n = model->num_parameters, rounded_n = n + model->num_frozen, buffers = model->num_buffers;
    const float* shard = values + model->shard_begin;
    floatX* rounded = host_new<floatX>(rounded_n, "parameters");
    for (size_t i = 0; i < rounded_n; i++) { rounded[i] = (floatX)values[i]; }
    to_device(model->params_memory, rounded, rounded_n);
    free(rounded);
    if (sizeof(floatX) != sizeof(float)) { to_device(model->master, shard, model->shard_n); }
    if (model->ema != NULL) { to_device(model->ema, shard, model->shard_n); }
    if (model->fixed != NULL) { to_device(model->fixed, values + n, model->num_frozen + buffers); }
    if (model->buffers_ema != NULL) { to_device(model->buffers_ema, values + rounded_n, buffers); }
}

// out (p->n) = initial values of a tensor. Its name keys the random stream, so that the other tensors do not matter
void initial_values(const Model* model, const Parameter* p, float* out) {
    const uint32_t stream = crc_32(0, p->name, strlen(p->name));
    for (size_t i = 0; i < p->n; i++) {
        const uint4 u = philox(model->seed, RNG_INIT, stream, i);
        double x = 1.0;
        if (p->init.kind == Init::NORMAL) { x = normal(u); }
        if (p->init.kind == Init::UNIFORM) { x = 2.0 * uniform(u.x) - 1.0; }
        out[i] = (float)(p->init.scale * x);
    }
}

void init_parameters(Model* model) {
    float* values = host_new<float>(model->num_values, "parameters");
    for (const Parameter& p : model->parameters) { initial_values(model, &p, values + p.offset); }
    set_parameters(model, values);
    free(values);
}

// fp32 tensors of the device that a file has under one prefix: trained ones (shard_n), frozen ones
// (num_frozen) and buffers (num_buffers). NULL: not in the file
typedef struct {
    const char* prefix; // "" for weights, "param." in a dump, "exp_avg." for a moment
    float *trained, *frozen, *buffers;
} TensorSet;

static bool in_set(const TensorSet* set, const Parameter* p) {
    return (p->kind == BUFFER ? set->buffers : p->kind == FROZEN ? set->frozen : set->trained) != NULL;
}

// The weights; then the states of a checkpoint: those of the optimizer under the names that torch.optim
// has for them (AdamW has two), the moving average of the weights. Returns how many sets there are
static int tensor_sets(const Model* model, TensorSet sets[4]) {
    int n = 0;
    sets[n++] = TensorSet{"", model->master, model->fixed, model->fixed + model->num_frozen};
    sets[n++] = TensorSet{model->adamw ? "exp_avg." : "momentum_buffer.", model->m, NULL, NULL};
    if (model->v != NULL) { sets[n++] = TensorSet{"exp_avg_sq.", model->v, NULL, NULL}; }
    if (model->ema != NULL) { sets[n++] = TensorSet{"ema.", model->ema, NULL, model->buffers_ema}; }
    return n;
}

// text = type and shape of a tensor: "F32 (64, 1, 4, 4)"
static void shape_text(char text[256], const char* dtype, const size_t* shape, int dims) {
    int n = snprintf(text, 256, "%s (", dtype);
    for (int d = 0; d < dims; d++) { n += snprintf(text + n, 256 - n, "%s%zu", d > 0 ? ", " : "", shape[d]); }
    snprintf(text + n, 256 - n, ")");
}

// Copies a tensor from the order of files to that of memory, or back. With channels last it is a stack of
// OC matrices, (C, KH*KW) in files and (KH*KW, C) in memory
static void copy_tensor(const Parameter* p, float* to, const float* from, bool to_memory) {
    if (!p->channels_last) {
        memcpy(to, from, p->n * sizeof(float));
        return;
    }
    const size_t C = p->shape[1], taps = p->shape[2] * p->shape[3];
    for (size_t i = 0; i < p->n; i++) { // i: place in the file
        const size_t oc = i / (C * taps), c = i / taps % C, tap = i % taps, j = (oc * taps + tap) * C + c;
        memcpy(to + (to_memory ? j : i), from + (to_memory ? i : j), sizeof(float)); // a file's may be unaligned
    }
}

// Values (num_values) of a set from a file. Every tensor under the prefix must be of the model and fit;
// all that do not are listed. values NULL: only checks. set NULL: all tensors of the model
static void read_tensors(const Model* model, const Safetensors* st, const char* prefix, const TensorSet* set,
                         float* values) {
    const char* path = st->file.path;
    bool* known = host_new<bool>(st->tensors.n, "the tensor list");
    char name[128], found[256], expected[256];
    int wrong = 0;
    for (const Parameter& p : model->parameters) {
        if (set != NULL && !in_set(set, &p)) { continue; }
        snprintf(name, sizeof(name), "%s%s", prefix, p.name);
        const StTensor* t = safetensors_find(st, name);
        if (t != NULL) { known[t - st->tensors.of] = true; }
        const bool fits = t != NULL && strcmp(t->dtype, "F32") == 0 && t->dims == p.dims
            && memcmp(t->shape, p.shape, p.dims * sizeof(size_t)) == 0;
        if (fits && values != NULL) { copy_tensor(&p, values + p.offset, (const float*)t->data, true); }
        if (fits) { continue; }
        if (t != NULL) { shape_text(found, t->dtype, t->shape, t->dims); }
        shape_text(expected, "F32", p.shape, p.dims);
        const char* there = t != NULL ? "found " : "missing";
        fprintf(stderr, "%s: %s: %s%s, expected %s\n", path, name, there, t != NULL ? found : "", expected);
        wrong++;
    }
    for (const StTensor& t : st->tensors) {
        const bool counts = strstr(t.name, "num_batches_tracked") != NULL; // PyTorch's batch norms; unused
        if (known[&t - st->tensors.of] || strncmp(t.name, prefix, strlen(prefix)) != 0 || counts) { continue; }
        shape_text(found, t.dtype, t.shape, t.dims);
        fprintf(stderr, "%s: %s: found %s, expected no such tensor\n", path, t.name, found);
        wrong++;
    }
    free(known);
    require(wrong == 0, "%s: tensors that are missing, do not fit or are not of this model: %d; check -m, -size, "
            "-chans and -classes. data/convert.py makes weights for another image size, number of classes or precision",
            path, wrong);
}

void check_parameters(const Model* model, const Safetensors* st) {
    model_check_file(st);
    read_tensors(model, st, "", NULL, NULL);
}

void load_parameters(Model* model, const Safetensors* st, const char* prefix) {
    float* values = host_new<float>(model->num_values, "parameters");
    read_tensors(model, st, prefix, NULL, values);
    set_parameters(model, values);
    free(values);
}

// CRC-32 of all weights, without the padding between them, which depends on the number of shards
uint32_t fingerprint(const Model* model) {
    const size_t n = model->num_parameters + model->num_frozen;
    floatX* values = host_new<floatX>(n, "parameters");
    uint32_t crc = 0;
    to_host(values, model->params_memory, n);
    for (const Parameter& p : model->parameters) {
        if (p.kind != BUFFER) { crc = crc_32(crc, values + p.offset, p.n * sizeof(floatX)); }
    }
    free(values);
    return crc;
}

void weights_agree(const Model* model) {
    if (num_ranks > 1) { ranks_agree(fingerprint(model), "weights"); }
}

// the buffers of rank 0 are the model's, as with DistributedDataParallel: all ranks get them
void share_buffers(Model* model) {
    const size_t bytes = model->num_buffers * sizeof(float);
    if (bytes == 0) { return; }
    ranks_broadcast(model->fixed + model->num_frozen, bytes);
    if (model->buffers_ema != NULL) { ranks_broadcast(model->buffers_ema, bytes); }
}

// one file of some sets. All ranks call, rank 0 writes
static void write_tensors(const Model* model, const char* path, const List<StMetadata>& metadata,
                          const TensorSet* sets, int num_sets) {
    const size_t n = model->num_parameters, frozen = model->num_frozen, all = model->num_values;
    float *values = host_new<float>(num_sets * all, "parameters"), *to = values;
    float* read = host_new<float>(all, "parameters");
    List<StTensor> tensors = {};
    for (const TensorSet* set = sets; set < sets + num_sets; set++, to += all) {
        const float* full = set->trained;
        if (model->s->sharded && num_ranks > 1) { // all ranks' parts go where the gradients were
            ranks_gather(model->grads_memory, full, model->shard_n * sizeof(float));
            full = model->grads_memory;
            cudaCheck(cudaStreamSynchronize(main_stream));
        }
        to_host(read, full, n);
        if (set->frozen != NULL) { to_host(read + n, set->frozen, frozen); }
        if (set->buffers != NULL) { to_host(read + n + frozen, set->buffers, model->num_buffers); }
        for (const Parameter& p : model->parameters) {
            if (!in_set(set, &p)) { continue; }
            copy_tensor(&p, to + p.offset, read + p.offset, false);
            StTensor t = {"", "F32", {}, 0, 0, p.dims, to + p.offset};
            snprintf(t.name, sizeof(t.name), "%s%s", set->prefix, p.name);
            memcpy(t.shape, p.shape, p.dims * sizeof(size_t));
            tensors.push(t);
        }
    }
    if (rank == 0) { safetensors_write(path, metadata, tensors); }
    free(read);
    free(values);
    free(tensors.of);
}

// writes the checkpoint of a step into -o; metadata: what a resume compares. All ranks call, 0 writes
void write_checkpoint(const Model* model, int step, const List<StMetadata>& metadata) {
    char path[PATH_MAX];
    TensorSet sets[4];
    const int num_sets = tensor_sets(model, sets);
    checkpoint_path(path, model->s->output, "model", step);
    write_tensors(model, path, metadata, sets, 1);
    checkpoint_path(path, model->s->output, "state", step);
    write_tensors(model, path, metadata, sets + 1, num_sets - 1);
    if (rank == 0) { checkpoint_done(model->s->output, step, model->s->keep); }
}

// Writes the weights of this step as best.safetensors, if they are better than those there: by `best`,
// an entry of the metadata. All ranks call, rank 0 writes
void write_best(const Model* model, const List<StMetadata>& metadata, const StMetadata* best) {
    char path[PATH_MAX];
    TensorSet sets[4];
    tensor_sets(model, sets);
    path_in(path, model->s->output, "best.safetensors");
    double stands = rank == 0 && checkpoint_best_stands(path, metadata, best);
    ranks_sum(&stands, 1); // only rank 0 may see the file
    if (stands == 0.0) { write_tensors(model, path, metadata, sets, 1); }
}

// an entry that a resumed run must share: as the file has it, and as it is
static void require_same(const char* path, const char* key, const char* was, const char* is) {
    require(was != NULL && strcmp(was, is) == 0, "%s was written with %s %s, not %s; resume with the flags of the run, "
            "or start anew with another -o", path, key, was != NULL ? was : "unknown", is);
}

// Metadata and the flags that a resumed run must share are as in the file. An empty value becomes the
// file's; a flag that the file does not name was neutral
static void check_metadata(const Model* model, const Safetensors* st, List<StMetadata>* metadata) {
    const char* path = st->file.path;
    for (StMetadata& m : *metadata) {
        const char* was = safetensors_metadata(st, m.key);
        if (was != NULL && m.value[0] == 0) { strcpy(m.value, was); }
        require_same(path, m.key, was, m.value);
    }
    for (const Option* o = model->options; o < model->options + model->num_options; o++) {
        char is[sizeof(o->neutral)];
        const char* was = safetensors_metadata(st, o->flag);
        option_text(o, is);
        if (o->resume == SAME) { require_same(path, o->flag, was != NULL ? was : o->neutral, is); }
    }
}

// reads the checkpoint of a step in -o back
void read_checkpoint(Model* model, int step, List<StMetadata>* metadata) {
    char path[PATH_MAX];
    TensorSet sets[4];
    const int num_sets = tensor_sets(model, sets);
    const size_t buffers_at = model->num_parameters + model->num_frozen;
    checkpoint_path(path, model->s->output, "model", step);
    Safetensors* st = safetensors_open(path);
    check_metadata(model, st, metadata);
    load_parameters(model, st, "");
    safetensors_close(st);
    checkpoint_path(path, model->s->output, "state", step);
    st = safetensors_open(path);
    check_metadata(model, st, metadata);
    float* values = host_new<float>(model->num_values, "parameters");
    for (const TensorSet* set = sets + 1; set < sets + num_sets; set++) {
        read_tensors(model, st, set->prefix, set, values);
        to_device(set->trained, values + model->shard_begin, model->shard_n);
        if (set->buffers != NULL) { to_device(set->buffers, values + buffers_at, model->num_buffers); }
    }
    free(values);
    safetensors_close(st);
}

void model_update(Model* model, OptimizerConfig o, double lr, int step) {
    const size_t first = model->shard_begin, last = first + model->shard_n; // of this rank
    const size_t decayed = model->s->decay_all ? model->num_parameters : model->num_decayed;
    ranks_wait();
    gradient_norm(model->result, model->scratch->norm_partial, model->grads_memory, model->num_parameters);
    for (int part = 0; part < 2; part++) { // with weight decay, without
        const size_t begin = part == 0 ? first : std::max(first, decayed), at = begin - first;
        const size_t end = part == 0 ? std::min(last, decayed) : last;
        if (begin >= end) { continue; }
        if (part == 1) { o.weight_decay = 0.0; }
        optimizer_update(model->params_memory + begin, model->master + at, model->m + at,
                         model->v == NULL ? NULL : model->v + at, model->grads_memory + begin, end - begin,
                         model->result, o, lr, step);
    }
    if (model->ema != NULL) { ema_update(model->ema, model->master, model->shard_n, model->s->ema); }
    if (model->buffers_ema != NULL) {
        ema_update(model->buffers_ema, model->fixed + model->num_frozen, model->num_buffers, model->s->ema);
    }
    if (model->s->sharded && num_ranks > 1) {
        ranks_gather(model->params_memory, model->params_memory + first, model->shard_n * sizeof(floatX));
    }
}

// The gradients have been used: their memory takes the rounded average, and the model's pointers go there
void ema_enter(Model* model) {
    const size_t n = model->shard_n;
    floatX *averaged = (floatX*)model->grads_memory, *shard = averaged + model->shard_begin;
    LAUNCH_BLOCKS(round_kernel, CEIL_DIV(n, (size_t)256 * VEC), 256, main_stream, shard, model->ema, n);
    if (model->s->sharded && num_ranks > 1) { ranks_gather(averaged, shard, n * sizeof(floatX)); }
    point_at(model, averaged, model->buffers_ema);
}

void ema_leave(Model* model) { point_at(model, model->params_memory, model->fixed + model->num_frozen); }

StepResult model_result(const Model* model) {
    StepResult result;
    cudaCheck(cudaMemcpyAsync(&result, model->result, sizeof(result), cudaMemcpyDeviceToHost, main_stream));
    cudaCheck(cudaStreamSynchronize(main_stream));
    double not_finite = result.not_finite;
    ranks_sum(&not_finite, 1);
    ranks_sum(result.sums, MAX_METRICS);
    result.not_finite = (unsigned)not_finite;
    return result;
}

// are all n elements of a tensor on the device finite?
template <class T> static bool finite(const T* device, size_t n) {
    T* host = host_new<T>(n, "a tensor");
    to_host(host, device, n);
    bool all = true;
    for (size_t i = 0; i < n; i++) { all = all && isfinite((float)host[i]); }
    free(host);
    return all;
}

static bool activation_finite(const Activation* a) {
    if (!a->cached || a->bits < 16) { return true; }
    if (a->dropped) { return finite(a->dropit.values, a->dropit.k); }
    return a->bits == FP32 ? finite((float*)a->data, a->n) : finite((floatX*)a->data, a->n);
}

// the first tensor, in the order of computation, that holds a NaN or an Inf; of those that are stored
const char* first_not_finite(const Model* model) {
    static char name[128];
    for (const Parameter& p : model->parameters) {
        if (p.kind == BUFFER ? finite(*p.buffer, p.n) : finite(*p.param, p.n)) { continue; }
        snprintf(name, sizeof(name), "parameter %s", p.name);
        return name;
    }
    // lines of one copy before the first of several, then the copies of all lines, then the other lines of one copy
    int first = INT_MAX;
    bool several = false;
    for (const Activation* a : model->activations) {
        several = several || a->copies > 1;
        const int order = a->copies > 1 ? a->copy : several ? MAX_COPIES : -1;
        if (order >= first || activation_finite(a)) { continue; }
        snprintf(name, sizeof(name), "activation %s, copy %d", a->name, a->copy);
        first = order;
    }
    if (first < INT_MAX) { return name; }
    for (const Parameter& p : model->parameters) {
        if (!is_trained(&p) || finite(*p.grad, p.n)) { continue; }
        snprintf(name, sizeof(name), "gradient of %s", p.name);
        return name;
    }
    return "no stored tensor";
}
// ---- end shared: model state -----------------------------------------------

