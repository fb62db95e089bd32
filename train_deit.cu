/*
Trains a DeiT / ViT image classifier with DropIT, on a GPU or (through dev/cpu) on a CPU.

DropIT (Chen et al., ICLR 2023, arXiv 2202.13808) in five lines: a linear layer caches its input X for the weight
gradient dW = dout^T X. Of X we keep only the k = n*(1-gamma) elements of largest magnitude, as a bitmap and packed
values, and take the rest as zero when dW is computed. Input and bias gradients never read X and stay exact. See
"shared: DropIT" for how the elements are chosen and stored.

build: make train_deit     (by hand: nvcc -O3 -std=c++17 -arch=sm_90 train_deit.cu -lcublas -lcublasLt -o train_deit)
run:   ./train_deit -g 0.7 (no flags are needed: without -i it trains deit_nano on the bundled Fashion-MNIST)

How to read this file, from the top:
  base        checks, precision, packs of elements, launches
  interface   a table of contents: what the code behind main() offers, and what a model defines for it
  the model   configurations, flags, the tables of its tensors, forward pass, backward pass, memory
  training    the table of flags, the training loop, main()
  kernels     of this model
  machinery   everything else, as an appendix: DropIT, linear layers, loss, optimizer, data, files, ranks
Sections marked "shared" stand in every trainer as the same bytes; `make check` compares them.

Three things a reader cannot guess:
- A block's forward and backward passes run over chunks of images (-chunk: 32 MiB of the widest tensor), so that
  scratch memory does not grow with the batch and a chunk stays in the GPU's cache. What is recomputed in the backward
  pass is recomputed in the same chunks by the same calls: the same bits.
- Gradients of parameters accumulate (+=) and are fp32; gradients of activations are assigned (=), but for the
  residual stream, into which every branch adds.
- Every random choice is Philox(seed, purpose, step, index): there is no generator state to save.

B images in a batch, T tokens (patches + class token), C channels, NH heads of HS = C/NH channels, L blocks, V classes,
H x W pixels and CH channels of an image, P patch side, OC output channels of a linear layer.
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
    int image_size, patch_size, image_channels, num_classes, channels, depth, heads;
} DeitConfig;
static const struct { const char* name; DeitConfig config; } deit_presets[] = {
    {"deit_nano",  {28,  4,  1, 10,   64,  4,  4}}, // for the bundled data
    {"deit_tiny",  {224, 16, 3, 1000, 192, 12, 3}},
    {"deit_small", {224, 16, 3, 1000, 384, 12, 6}},
    {"deit_base",  {224, 16, 3, 1000, 768, 12, 12}},
    {"vit_base",   {224, 16, 3, 1000, 768, 12, 12}},
};

// X(name, name in timm, copies, shape of copy l, kind, initial value). timm draws linear layers and
// positions from a normal distribution; the patch embedding begins as PyTorch's convolutions: uniform
#define PARAMETERS(X) \
    X(patchw, "patch_embed.proj.weight",    1, (C, CH, P, P), DECAY, uniform_init(CH*P*P)) \
    X(patchb, "patch_embed.proj.bias",      1, (C),           PLAIN, uniform_init(CH*P*P)) \
    X(cls,    "cls_token",                  1, (1, 1, C),     PLAIN, normal_init(1e-6)) \
    X(pos,    "pos_embed",                  1, (1, T, C),     PLAIN, normal_init(0.02)) \
    X(ln1w,   "blocks.%d.norm1.weight",     L, (C),           PLAIN, constant_init(1)) \
    X(ln1b,   "blocks.%d.norm1.bias",       L, (C),           PLAIN, constant_init(0)) \
    X(qkvw,   "blocks.%d.attn.qkv.weight",  L, (3*C, C),      DECAY, normal_init(0.02)) \
    X(qkvb,   "blocks.%d.attn.qkv.bias",    L, (3*C),         PLAIN, constant_init(0)) \
    X(projw,  "blocks.%d.attn.proj.weight", L, (C, C),        DECAY, normal_init(0.02)) \
    X(projb,  "blocks.%d.attn.proj.bias",   L, (C),           PLAIN, constant_init(0)) \
    X(ln2w,   "blocks.%d.norm2.weight",     L, (C),           PLAIN, constant_init(1)) \
    X(ln2b,   "blocks.%d.norm2.bias",       L, (C),           PLAIN, constant_init(0)) \
    X(fc1w,   "blocks.%d.mlp.fc1.weight",   L, (4*C, C),      DECAY, normal_init(0.02)) \
    X(fc1b,   "blocks.%d.mlp.fc1.bias",     L, (4*C),         PLAIN, constant_init(0)) \
    X(fc2w,   "blocks.%d.mlp.fc2.weight",   L, (C, 4*C),      DECAY, normal_init(0.02)) \
    X(fc2b,   "blocks.%d.mlp.fc2.bias",     L, (C),           PLAIN, constant_init(0)) \
    X(lnfw,   "norm.weight",                1, (C),           PLAIN, constant_init(1)) \
    X(lnfb,   "norm.bias",                  1, (C),           PLAIN, constant_init(0)) \
    X(headw,  "head.weight",                1, (V, C),        DECAY, normal_init(0.02)) \
    X(headb,  "head.bias",                  1, (V),           PLAIN, constant_init(0))

// X(name, type, copies, shape of copy l, level, cache), as the interface explains
#define ACTIVATIONS(X) \
    X(patches,   FLOATX, 1,   (B, T-1, CH*P*P), NEVER, ALL)  /* input of the patch embedding */ \
    X(residual,  FLOATX, L+1, (B, T, C),        NEVER, KEEP) /* input of a block, output of the last */ \
    X(ln1_mean,  FP32,   L,   (B, T),           3,     KEEP) \
    X(ln1_rstd,  FP32,   L,   (B, T),           3,     KEEP) \
    X(ln1,       FLOATX, L,   (B, T, C),        1,     DROP) /* input of the qkv linear */ \
    X(qkv,       FLOATX, L,   (B, T, 3*C),      2,     KEEP) /* input of attention */ \
    X(lse,       FP32,   L,   (B, NH, T),       3,     KEEP) /* log-sum-exp of the rows of scores */ \
    X(atty,      FLOATX, L,   (B, T, C),        3,     DROP) /* input of the projection */ \
    X(residual2, FLOATX, L,   (B, T, C),        3,     KEEP) /* residual after attention */ \
    X(ln2_mean,  FP32,   L,   (B, T),           3,     KEEP) \
    X(ln2_rstd,  FP32,   L,   (B, T),           3,     KEEP) \
    X(ln2,       FLOATX, L,   (B, T, C),        1,     DROP) /* input of fc1 */ \
    X(fch,       FLOATX, L,   (B, T, 4*C),      2,     KEEP) /* output of fc1, input of GELU */ \
    X(fch_gelu,  FLOATX, L,   (B, T, 4*C),      1,     DROP) /* input of fc2 */ \
    X(lnf_mean,  FP32,   1,   (B),              NEVER, KEEP) \
    X(lnf_rstd,  FP32,   1,   (B),              NEVER, KEEP) \
    X(lnf,       FLOATX, 1,   (B, C),           NEVER, ALL)  /* input of the head */ \
    X(logits,    FLOATX, 1,   (B, V),           NEVER, KEEP) /* and their gradient, in the same place */

#define MODEL_NAMES "deit_nano, deit_tiny, deit_small, deit_base, vit_base"
#define DEFAULT_MODEL "deit_nano"
#define HELP_RECOMPUTE "0 nothing, 1 norms and GELU, 2 also qkv and fc1, 3 the block"
#define HELP_DROP_ALL "patch embedding and head"
#define HELP_WEIGHTS "timm's"
// flags of this model alone, beside those of all image classifiers
#define DEIT_SETTINGS(X) \
    X(i, patch,     "-patch",     0,      0, 65535, SAME, "patch size, 0: the model's") \
    X(f, drop_path, "-drop_path", 0.0,    0, 0.99,  SAME, "drop-path: rate of the last block; 0: off") \
    X(s, augment,   "-aa",        "none", 0, 0,     SAME, "RandAugment: none, rand-m9-mstd0.5-inc1 (timm's names)")

// Attention of one chunk of images: batched matrix products over (image, head) with softmax in between.
// No T x T matrix outlives its chunk: the forward pass saves the log-sum-exp of each row of scores, and
// the backward pass rebuilds the probabilities from it. Rows of T x T matrices are `ld` elements apart, T
// rounded up to VEC, so that they can be read in packs; columns from T on are never used as values
typedef struct {
    int heads, T, HS, ld, max_images;
    float* scores;   // (images, NH, T, ld) q @ k^T / sqrt(HS)
    floatX* probs;   // (images, NH, T, ld) softmax of scores; in fp32 the same memory as scores
    float* dprobs;   // (images, NH, T, ld) gradient of probs
    floatX* dscores; // (images, NH, T, ld) gradient of scores; in fp32 the same memory as dprobs
    void** pointers; // (NUM_ATTENTION_POINTERS, images*NH) where each head's matrices begin
} Attention;
enum { PTR_Q, PTR_K, PTR_V, PTR_OUT, PTR_SCORES, PTR_PROBS, PTR_DQ, PTR_DK, PTR_DV, PTR_DPROBS,
       PTR_DSCORES, NUM_ATTENTION_POINTERS };

// RandAugment by its name in timm, and its memory
Augmenter* augment_new(const char* name);
void augment_plan(Plan* plan, Augmenter* a, size_t B, size_t S, size_t CH);

struct Model : Common {
    struct { DEIT_SETTINGS(FIELD) } own; // the flags
    struct ImageData* images;            // flags and memory of image classifiers
    DeitConfig config;
    size_t T;
#define X(name, ...) floatX* name[MAX_COPIES];
    struct { PARAMETERS(X) } params;
#undef X
#define X(name, ...) float* name[MAX_COPIES];
    struct { PARAMETERS(X) } grads;
#undef X
#define X(name, ...) Activation name[MAX_COPIES + 1];
    struct { ACTIVATIONS(X) } acts;
#undef X
    float* drop_path_scales; // (L, 2, B) of attention and mlp, written in the forward pass
    // scratch
    int* labels; // (B)
    floatX *tokens, *dresidual, *dbranch, *dqkv, *dfch, *dlnf;
    Attention attention;
    Augmenter* augment;
};

// ----------------------------------------------------------------------------
// its kernels' launchers, which stand behind main()

// patches (B, T-1, CH*P*P) = images (B, S, S, CH), mirrored where flips (B) say so, normalised, erased and mixed
void patchify(floatX* patches, const uint8_t* images, const int* flips, PixelStats stats, BatchAugment augment,
              size_t n, int S, int P, int CH);
// out[b] = concatenation of cls and tokens[b] (T-1, C), plus pos (T, C)
void embed(floatX* out, const floatX* tokens, const floatX* cls, const floatX* pos, size_t B, size_t T, size_t C);
void embed_backward(floatX* dtokens, float* dpos, float* dcls, const floatX* dout, size_t B, size_t T, size_t C);
// in PyTorch: F.layer_norm(inp, (C,), weight, bias, eps). out (rows, C), mean and rstd (rows); row r of
// inp begins at inp + r*stride. keep: DropIT's masking of out
void layernorm_forward(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                       const floatX* bias, size_t rows, size_t C, size_t stride, KeepLargest keep = {});
// dinp += its gradient, as dinp is the residual stream's; partial (2 * column_sum_scratch(rows, C))
void layernorm_backward(floatX* dinp, float* dweight, float* dbias, float* partial, const floatX* dout,
                        const floatX* inp, const floatX* weight, const float* mean, const float* rstd, size_t rows,
                        size_t C, size_t stride);
void gelu_forward(floatX* out, const floatX* inp, size_t n, KeepLargest keep = {});
void gelu_backward(floatX* dinp, const floatX* inp, size_t n); // dinp *= derivative of F.gelu at inp
// in PyTorch: F.scaled_dot_product_attention(q, k, v); out (images, T, C), lse (images, NH, T), qkv (images, T, 3C)
void attention_forward(floatX* out, float* lse, floatX* qkv, const Attention* a, int images);
void attention_backward(floatX* dqkv, floatX* dout, floatX* qkv, const float* lse, const Attention* a, int images);
// rate of drop-path (stochastic depth) in block l, from 0 to `last`; in PyTorch: torch.linspace(0, last, depth)[l]
__host__ __device__ inline float drop_path_rate(float last, int l, int depth) {
    if (depth == 1) { return 0.0f; }
    const float step = last / (float)(depth - 1);
    return l < depth / 2 ? step * (float)l : last - step * (float)(depth - 1 - l);
}
// scales (L, 2, B) are 0 or 1 / (1 - rate); out = scales[image] * x + residual
void drop_path_scales(float* scales, int L, int B, double last, u64 seed, unsigned step, unsigned first);
void drop_path(floatX* out, const floatX* x, const floatX* residual, const float* scales, size_t images,
               size_t per_image);

// ----------------------------------------------------------------------------
// forward and backward passes

// the drop-path scales from image b0 on, in a branch of block l (0: attention, 1: mlp); NULL: all are 1
const float* branch_scales(const Model* model, int l, int branch, size_t b0) {
    const double last = model->own.drop_path;
    if (last == 0.0 || drop_path_rate((float)last, l, model->config.depth) == 0.0f) { return NULL; }
    return model->drop_path_scales + (2*l + branch) * model->B + b0;
}

// out = residual + linear(inp) for nb images, or + scales * linear(inp) where scales is not NULL
void branch_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, const floatX* residual,
                    const float* scales, size_t nb, size_t T, size_t C, size_t OC) {
    linear_forward(out, inp, weight, bias, scales == NULL ? residual : NULL, nb * T, C, OC);
    if (scales != NULL) { drop_path(out, out, residual, scales, nb, T * OC); }
}

// Images b0 .. b0+nb-1 through block l. recompute: only what is not cached, by the same calls: same bits
void block_forward(Model* model, int l, size_t b0, size_t nb, bool recompute, bool training) {
    const size_t C = model->config.channels, T = model->T, rows = nb * T;
    const auto* p = &model->params;
    auto* a = &model->acts;
    const float *scales = NULL, *scales2 = NULL;
    if (training) { scales = branch_scales(model, l, 0, b0), scales2 = branch_scales(model, l, 1, b0); }
#define AT(type, name) ((type*)activation_at(&a->name[l], b0, recompute))
#define NOW(name) computed(&a->name[l], recompute)
    floatX *residual = AT(floatX, residual), *ln1 = AT(floatX, ln1), *qkv = AT(floatX, qkv);
    floatX *atty = AT(floatX, atty), *residual2 = AT(floatX, residual2), *ln2 = AT(floatX, ln2);
    floatX *fch = AT(floatX, fch), *gelu = AT(floatX, fch_gelu);
    if (NOW(ln1)) {
        layernorm_forward(ln1, AT(float, ln1_mean), AT(float, ln1_rstd), residual, p->ln1w[l], p->ln1b[l], rows, C, C,
                          keep_largest(&a->ln1[l], b0, recompute));
    }
    if (NOW(qkv)) { linear_forward(qkv, ln1, p->qkvw[l], p->qkvb[l], NULL, rows, C, 3*C); }
    if (NOW(atty)) { attention_forward(atty, AT(float, lse), qkv, &model->attention, (int)nb); }
    if (NOW(residual2)) { branch_forward(residual2, atty, p->projw[l], p->projb[l], residual, scales, nb, T, C, C); }
    if (NOW(ln2)) {
        layernorm_forward(ln2, AT(float, ln2_mean), AT(float, ln2_rstd), residual2, p->ln2w[l], p->ln2b[l], rows, C, C,
                          keep_largest(&a->ln2[l], b0, recompute));
    }
    if (NOW(fch)) { linear_forward(fch, ln2, p->fc1w[l], p->fc1b[l], NULL, rows, C, 4*C); }
    if (NOW(fch_gelu)) { gelu_forward(gelu, fch, rows * 4*C, keep_largest(&a->fch_gelu[l], b0, recompute)); }
#undef NOW
#undef AT
    if (recompute) { return; }
    floatX* out = (floatX*)activation_at(&a->residual[l+1], b0, false);
    branch_forward(out, gelu, p->fc2w[l], p->fc2b[l], residual2, scales2, nb, T, 4*C, C);
}

// logits of n <= B images, whose patches are there. training: with drop-path, and DropIT chooses
void model_forward(Model* model, size_t n, bool training) {
    const DeitConfig c = model->config;
    const size_t C = c.channels, T = model->T, V = model->V, I = model->chunk_images;
    const size_t K = model->CH * c.patch_size * c.patch_size;
    const auto* p = &model->params;
    auto* a = &model->acts;
    for (size_t b0 = 0; b0 < n; b0 += I) {
        const size_t nb = std::min(n - b0, I);
        const floatX* patches = (floatX*)activation_at(a->patches, b0, false);
        linear_forward(model->tokens, patches, p->patchw[0], p->patchb[0], NULL, nb * (T-1), K, C);
        embed((floatX*)activation_at(a->residual, b0, false), model->tokens, p->cls[0], p->pos[0], nb, T, C);
    }
    if (training) { drop_activations(model, {a->patches}); }
    if (training && model->own.drop_path > 0.0) {
        drop_path_scales(model->drop_path_scales, c.depth, (int)model->B, model->own.drop_path, model->seed,
                         model->pass, (unsigned)(rank * model->B));
    }
    for (int l = 0; l < c.depth; l++) {
        for (size_t b0 = 0; b0 < n; b0 += I) {
            block_forward(model, l, b0, std::min(n - b0, I), false, training);
        }
        if (!training) { continue; }
        drop_activations(model, {&a->ln1[l], &a->atty[l], &a->ln2[l], &a->fch_gelu[l]});
    }
    // the head reads the class token alone, so the last norm is taken of that row only: rows T*C apart
    floatX* lnf = (floatX*)activation_at(a->lnf, 0, false);
    layernorm_forward(lnf, (float*)a->lnf_mean->data, (float*)a->lnf_rstd->data,
                      (floatX*)activation_at(&a->residual[c.depth], 0, false), p->lnfw[0], p->lnfb[0], n, C, T*C);
    linear_forward((floatX*)a->logits->data, lnf, p->headw[0], p->headb[0], NULL, n, C, V);
    if (training) { drop_activations(model, {a->lnf}); }
}

// gradients of block l for images b0 .. b0+nb-1. dresidual: that of the block's output becomes that of its input
void block_backward(Model* model, int l, size_t b0, size_t nb) {
    const size_t C = model->config.channels, T = model->T, rows = nb * T;
    const auto* p = &model->params;
    const auto* g = &model->grads;
    auto* a = &model->acts;
    floatX *dres = model->dresidual + b0 * T*C, *dbranch = model->dbranch, *dqkv = model->dqkv, *dfch = model->dfch;
    const float *scales = branch_scales(model, l, 0, b0), *scales2 = branch_scales(model, l, 1, b0);
    block_forward(model, l, b0, nb, true, true);
#define AT(type, name) ((type*)activation_at(&a->name[l], b0, true))
    // the mlp: residual + fc2(gelu(fc1(ln2(residual2)))); dbranch is free for what drop-path leaves
    const floatX* dmlp = scales2 != NULL ? dbranch : dres;
    if (scales2 != NULL) { drop_path(dbranch, dres, NULL, scales2, nb, T*C); }
    weight_gradient(model, &a->fch_gelu[l], g->fc2w[l], g->fc2b[l], dmlp, b0, nb, T, 4*C, C);
    linear_backward_input(dfch, dmlp, p->fc2w[l], rows, 4*C, C);
    gelu_backward(dfch, AT(floatX, fch), rows * 4*C);
    weight_gradient(model, &a->ln2[l], g->fc1w[l], g->fc1b[l], dfch, b0, nb, T, C, 4*C);
    linear_backward_input(dbranch, dfch, p->fc1w[l], rows, C, 4*C);
    layernorm_backward(dres, g->ln2w[l], g->ln2b[l], model->partial, dbranch, AT(floatX, residual2), p->ln2w[l],
                       AT(float, ln2_mean), AT(float, ln2_rstd), rows, C, C);
    // attention: residual + proj(attention(qkv(ln1(residual)))); here dfch is free
    const floatX* dattention = scales != NULL ? dfch : dres;
    if (scales != NULL) { drop_path(dfch, dres, NULL, scales, nb, T*C); }
    weight_gradient(model, &a->atty[l], g->projw[l], g->projb[l], dattention, b0, nb, T, C, C);
    linear_backward_input(dbranch, dattention, p->projw[l], rows, C, C);
    attention_backward(dqkv, dbranch, AT(floatX, qkv), AT(float, lse), &model->attention, (int)nb);
    weight_gradient(model, &a->ln1[l], g->qkvw[l], g->qkvb[l], dqkv, b0, nb, T, C, 3*C);
    linear_backward_input(dbranch, dqkv, p->qkvw[l], rows, C, 3*C);
    layernorm_backward(dres, g->ln1w[l], g->ln1b[l], model->partial, dbranch, AT(floatX, residual), p->ln1w[l],
                       AT(float, ln1_mean), AT(float, ln1_rstd), rows, C, C);
#undef AT
}

// grads += gradients of the loss of a whole batch, from that of the logits
void model_backward(Model* model) {
    const DeitConfig c = model->config;
    const size_t B = model->B, C = c.channels, T = model->T, V = model->V, I = model->chunk_images;
    const size_t K = model->CH * c.patch_size * c.patch_size;
    const auto* p = &model->params;
    const auto* g = &model->grads;
    auto* a = &model->acts;
    const floatX* dlogits = (const floatX*)a->logits->data;
    for (size_t b0 = 0; b0 < B; b0 += I) {
        const size_t nb = std::min(B - b0, I);
        weight_gradient(model, a->lnf, g->headw[0], g->headb[0], dlogits + b0 * V, b0, nb, 1, C, V);
    }
    linear_backward_input(model->dlnf, dlogits, p->headw[0], B, C, V);
    // only the class tokens' rows of the last residual have a gradient yet
    cudaCheck(cudaMemsetAsync(model->dresidual, 0, B*T*C * sizeof(floatX), main_stream));
    layernorm_backward(model->dresidual, g->lnfw[0], g->lnfb[0], model->partial, model->dlnf,
                       (floatX*)activation_at(&a->residual[c.depth], 0, true), p->lnfw[0],
                       (float*)a->lnf_mean->data, (float*)a->lnf_rstd->data, B, C, T*C);
    for (int l = c.depth - 1; l >= 0; l--) {
        for (size_t b0 = 0; b0 < B; b0 += I) { block_backward(model, l, b0, std::min(B - b0, I)); }
        gradients_done(model, l);
    }
    for (size_t b0 = 0; b0 < B; b0 += I) {
        const size_t nb = std::min(B - b0, I);
        const floatX* dres = model->dresidual + b0 * T*C;
        embed_backward(model->tokens, g->pos[0], g->cls[0], dres, nb, T, C);
        weight_gradient(model, a->patches, g->patchw[0], g->patchb[0], model->tokens, b0, nb, T-1, K, C);
    }
}

void model_input(Model* model, const Batch* batch) {
    patchify((floatX*)activation_at(model->acts.patches, 0, false), batch->images, batch->flips, batch->stats,
             batch->augment, batch->n, (int)model->H, model->config.patch_size, (int)model->CH);
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

void model_plan(Model* model) {
    const DeitConfig c = model->config;
    Plan* plan = &model->plan;
    const size_t B = model->B, C = c.channels, L = c.depth, NH = c.heads, V = model->V, T = model->T;
    const size_t CH = model->CH, P = c.patch_size;
    // chunks of nearly equal size, none above chunk_bytes where a single image is not
    const size_t chunks = CEIL_DIV(B * T * 4*C * sizeof(floatX), model->chunk_bytes);
    const size_t I = model->chunk_images = CEIL_DIV(B, chunks < B ? chunks : B);
#define X(field, name, copies, shape, kind, init) \
    for (size_t l = 0; l < (copies); l++) { \
        add_parameter(model, &model->params.field[l], &model->grads.field[l], NULL, name, (int)l, (int)(copies), \
                      kind, init, IN_PARENTHESES shape); \
    }
    PARAMETERS(X)
#undef X
#define X(field, bits, copies, shape, level, cache) \
    for (size_t l = 0; l < (copies); l++) { \
        plan_activation(model, &model->acts.field[l], #field, #copies " x " #shape, (int)l, (int)(copies), bits, \
                        numel shape, level, cache); \
    }
    ACTIVATIONS(X)
#undef X
    auto* a = &model->acts;
    for (size_t l = 0; l < L; l++) {
        mask_unless_read(model, &a->ln1[l], &a->qkv[l]);
        mask_unless_read(model, &a->ln2[l], &a->fch[l]);
        mask_unless_read(model, &a->fch_gelu[l], &a->residual[l+1]);
    }
    plan_selection(model, {&a->ln1[0], &a->atty[0], &a->ln2[0], &a->fch_gelu[0]});
    plan_selection(model, {a->patches});
    plan_selection(model, {a->lnf});
    if (model->own.drop_path > 0.0) {
        const size_t bytes = L * 2 * B * sizeof(float);
        plan_add(plan, CACHED, "drop-path scales", "", "(L, 2, B)", &model->drop_path_scales, bytes, bytes);
    }
    // scratch, for I images in a chunk
    plan_add(plan, SCRATCH, "labels", "", "(B)", &model->labels, B * sizeof(int));
    plan_add(plan, SCRATCH, "dresidual", "", "(B, T, C)", &model->dresidual, B * T * C * sizeof(floatX));
    plan_add(plan, SCRATCH, "tokens", "", "(I, T-1, C)", &model->tokens, I * (T-1) * C * sizeof(floatX));
    plan_add(plan, SCRATCH, "dbranch", "", "(I, T, C)", &model->dbranch, I * T * C * sizeof(floatX));
    plan_add(plan, SCRATCH, "dqkv", "", "(I, T, 3*C)", &model->dqkv, I * T * 3*C * sizeof(floatX));
    plan_add(plan, SCRATCH, "dfch", "", "(I, T, 4*C)", &model->dfch, I * T * 4*C * sizeof(floatX));
    plan_add(plan, SCRATCH, "dlnf", "", "(B, C)", &model->dlnf, B * C * sizeof(floatX));
    plan_add(plan, SCRATCH, "sum partials", "", "fp32", &model->partial, sizeof(float) *
             std::max({column_sum_scratch(I * T, 4*C), 2 * column_sum_scratch(B, C), column_sum_scratch(B, V)}));
    Attention* t = &model->attention;
    const size_t ld = CEIL_DIV(T, (size_t)VEC) * VEC, squares = I * NH * T * ld;
    *t = Attention{(int)NH, (int)T, (int)(C / NH), (int)ld, (int)I, NULL, NULL, NULL, NULL, NULL};
    const bool fp32 = sizeof(floatX) == sizeof(float); // then probs and scores share memory, dscores and dprobs
    plan_add(plan, SCRATCH, "scores", "", "(I, NH, T, T) fp32", &t->scores, squares * sizeof(float));
    plan_clear(plan); // the padding of its rows is read
    plan_add(plan, SCRATCH, "dprobs", "", "(I, NH, T, T) fp32", &t->dprobs, squares * sizeof(float));
    plan_clear(plan);
    plan_add(plan, SCRATCH, "probs", "", "(I, NH, T, T)", &t->probs, squares * sizeof(floatX), 0,
             fp32 ? (floatX**)&t->scores : NULL);
    plan_add(plan, SCRATCH, "dscores", "", "(I, NH, T, T)", &t->dscores, squares * sizeof(floatX), 0,
             fp32 ? (floatX**)&t->dprobs : NULL);
    plan_add(plan, SCRATCH, "head pointers", "", "(11, I, NH)", &t->pointers,
             NUM_ATTENTION_POINTERS * I * NH * sizeof(void*));
    plan_images(model, model->augment);
    augment_plan(plan, model->augment, B, model->H, CH);
}

void model_options(Model* model) {
    auto* s = &model->own;
    DEIT_SETTINGS(OPTION)
    image_options(model);
}

// what the bundled data want; a published model is trained by a recipe
const char* model_defaults(const char*) {
    return "-i data/fashion_train.bin -j data/fashion_val.bin -b 64 -e 6 -opt adamw -l 2e-3 -wd 0.05 -warmup 50"
           " -r 1";
}

// -recipe: what the published commands of DropIT for DeiT amount to (benchmarks/deit of its code, which
// is DeiT's), as flags. The batch is that of each of their two GPUs, -l is for 512 images where
// -unscale_lr is 0. timm's "sgd" is Nesterov's. That code asks timm for ten epochs of cool-down and then
// ends without them, so -cooldown is 0. Gamma is the user's choice (-g), as there. No command for ViT-B
// is published: its two recipes are DeiT's with that model
#define RECIPE " -drop_path 0.1 -ema 0.99996 -schedule epoch -warmup_epochs 5 -warmup_lr 1e-6 -min_lr 1e-5" \
    " -cooldown 0 -crop 1 -crop_pct 0.875 -repeats 3 -flip 1 -aa rand-m9-mstd0.5-inc1 -reprob 0.25" \
    " -mixup 0.8 -cutmix 1 -smoothing 0.1"
#define RECIPE_IMAGENET " -b 512 -e 300 -opt adamw -l 5e-4 -unscale_lr 0 -wd 0.05 -classes 1000" RECIPE
#define RECIPE_CIFAR100 " -b 384 -e 1000 -opt sgd -momentum 0.9 -nesterov 1 -l 0.01 -unscale_lr 1" \
    " -wd 1e-4 -classes 100" RECIPE
const char* const model_recipes[][2] = {
    {"deit_ti_imagenet", "-m deit_tiny" RECIPE_IMAGENET},
    {"deit_s_cifar100",  "-m deit_small" RECIPE_CIFAR100},
    {"deit_b_cifar100",  "-m deit_base" RECIPE_CIFAR100},
    {"vit_b_imagenet",   "-m vit_base" RECIPE_IMAGENET},
    {"vit_b_cifar100",   "-m vit_base" RECIPE_CIFAR100},
    {NULL, NULL}
};

// the tokens of an image, and what can be wrong with a configuration
void deit_shape(Model* model) {
    const size_t P = model->config.patch_size;
    require(P > 0 && model->H % P == 0 && model->W % P == 0, "an image of %zu x %zu pixels does not divide "
            "into patches of %zu; change -size or -patch", model->H, model->W, P);
    require(model->config.depth <= MAX_COPIES, "the model has %d blocks, this program was built for %d; "
            "raise MAX_COPIES", model->config.depth, MAX_COPIES);
    model->T = (model->H / P) * (model->W / P) + 1;
}

void model_configure(Model* model) {
    DeitConfig* c = &model->config;
    for (const auto& p : deit_presets) { if (strcmp(model->name, p.name) == 0) { *c = p.config; } }
    require(c->depth > 0, "-m %s is not a model; choose one of " MODEL_NAMES, model->name);
    if (model->own.patch > 0) { c->patch_size = model->own.patch; }
    if (model->H == 0) { model->H = model->W = c->image_size; }
    if (model->CH == 0) { model->CH = c->image_channels; }
    if (model->V == 0) { model->V = c->num_classes; }
    deit_shape(model);
    model->augment = augment_new(model->own.augment);
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
// kernels of the vision transformer, each followed by its launcher

// x[q] = pixel (h, w+q), channel c, of image b, normalised, or the noise of random erasing in its place.
// Of an image that flips[b] mirrors left to right, the row is read backwards
template <int V, bool AUGMENT> __device__ inline void normalised_pixels(
        float* x, const uint8_t* images, const int* flips, const PixelStats& s, const BatchAugment& a,
        size_t b, int S, int CH, unsigned h, unsigned w, unsigned c) {
    const int from = flips[b] ? S - 1 - (int)w : (int)w, step = flips[b] ? -CH : CH;
    const uint8_t* row = images + (b * S + h) * S * CH + c + (ptrdiff_t)from * CH;
    for (int q = 0; q < V; q++) { x[q] = ((float)row[q * step] / 255.0f - s.mean[c]) / s.std[c]; }
    if (!AUGMENT || a.erased == NULL) { return; }
    const EraseBox box = a.erased[b]; // a pixel above it has a difference that is huge when unsigned
    for (int q = 0; q < V; q++) {
        if (h - box.top >= (unsigned)box.height || w + q - box.left >= (unsigned)box.width) { continue; }
        x[q] = erase_noise(a.seed, a.epoch, a.place + b * a.place_step, h * S + w + q, c);
    }
}

// out[b, t, (c, kh, kw)] = x[b] = (image[b, h, w, c] / 255 - mean[c]) / std[c], (h, w) in patch t. With
// AUGMENT, random erasing replaces a box of x, and image b is then mixed with image n-1-b:
//     mixup: lam * x[b] + (1 - lam) * x[n-1-b]      cutmix: x[n-1-b] in a box, x[b] outside
// out (B, (S/P)^2, CH*P*P) has n elements, an image (S, S, CH) less than 2^32. A thread makes V; V
// divides P. AUGMENT is a template argument because noise and a second image need registers
template <int V, bool AUGMENT> __global__ void patchify_kernel(
        floatX* out, const uint8_t* images, const int* flips, const __grid_constant__ PixelStats stats,
        const __grid_constant__ BatchAugment a, size_t n, int S, int P, int CH, std::bool_constant<AUGMENT>) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const unsigned per_image = (unsigned)S * S * CH;
    const size_t b = i / per_image;
    const unsigned j = (unsigned)(i - b * per_image), patch = j / (CH * P * P), c = j / (P * P) % CH;
    const unsigned w = patch % (S / P) * P + j % P, h = patch / (S / P) * P + j / P % P;
    float x[V], other[V];
    normalised_pixels<V, AUGMENT>(x, images, flips, stats, a, b, S, CH, h, w, c);
    if (AUGMENT && a.lam < 1.0f && (!a.cut || h - a.top < (unsigned)(a.bottom - a.top))) {
        normalised_pixels<V, AUGMENT>(other, images, flips, stats, a, a.n - 1 - b, S, CH, h, w, c);
        for (int q = 0; q < V; q++) {
            if (!a.cut) { x[q] = a.lam * x[q] + (1.0f - a.lam) * other[q]; }
            else if (w + q - a.left < (unsigned)(a.right - a.left)) { x[q] = other[q]; }
        }
    }
    store<V>(out + i, x);
}
void patchify(floatX* out, const uint8_t* images, const int* flips, PixelStats stats, BatchAugment a,
              size_t n, int S, int P, int CH) {
    n *= S * S * CH; // elements
    const bool packs = P % VEC == 0;
    if (a.erased != NULL || a.lam < 1.0f) {
        LAUNCH(patchify_kernel, packs, n, 256, out, images, flips, stats, a, n, S, P, CH, std::true_type());
    } else { LAUNCH(patchify_kernel, packs, n, 256, out, images, flips, stats, a, n, S, P, CH, std::false_type()); }
}

// out[b, 0] = cls + pos[0], out[b, t] = tokens[b, t-1] + pos[t]; in PyTorch: cat([cls, tokens], 1) + pos
// out (B, T, C) has n elements, tokens (B, T-1, C), cls (C), pos (T, C). V divides C; a thread makes V
template <int V> __global__ void embed_kernel(
        floatX* out, const floatX* tokens, const floatX* cls, const floatX* pos, size_t n, int T, int C) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const size_t row = i / C, b = row / T;
    const unsigned c = (unsigned)(i - row * C), t = (unsigned)(row - b * T);
    float token[V], position[V];
    load<V>(token, t == 0 ? cls + c : tokens + (b * (T - 1) + t - 1) * C + c);
    load<V>(position, pos + (size_t)t * C + c);
    for (int j = 0; j < V; j++) { token[j] += position[j]; }
    store<V>(out + i, token);
}
void embed(floatX* out, const floatX* tokens, const floatX* cls, const floatX* pos, size_t B, size_t T, size_t C) {
    const size_t n = B * T * C;
    LAUNCH(embed_kernel, vectorizable(C, out, tokens, cls, pos), n, 256, out, tokens, cls, pos, n, T, C);
}

// Gradients of embed: dtokens = dout[:, 1:].contiguous(), dpos (T, C) += dout.sum(0), dcls (C) +=
// dout[:, 0].sum(0). dout (B, T, C), dtokens (B, T-1, C). A thread has one (t, c) of all images
__global__ void embed_backward_kernel(
        floatX* dtokens, float* dpos, float* dcls, const floatX* dout, int B, int T, int C) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = (size_t)T * C;
    if (i >= n) { return; }
    float sum = 0.0f;
    for (int b = 0; b < B; b++) {
        const floatX d = dout[b * n + i];
        if (i >= (size_t)C) { dtokens[b * (n - C) + i - C] = d; }
        sum += (float)d;
    }
    dpos[i] += sum;
    if (i < (size_t)C) { dcls[i] += sum; }
}
void embed_backward(floatX* dtokens, float* dpos, float* dcls, const floatX* dout, size_t B, size_t T, size_t C) {
    const size_t blocks = CEIL_DIV(T * C, (size_t)64);
    LAUNCH_BLOCKS(embed_backward_kernel, blocks, 64, main_stream, dtokens, dpos, dcls, dout, B, T, C);
}

// Mean and sum of squared deviations of n values, 0 of a lane without packs; JoinMoments gives those of
// the union of two sets (Chan, Golub and LeVeque 1983)
typedef struct { float n, mean, squares; } Moments;
struct JoinMoments {
    __device__ Moments operator()(Moments a, Moments b) const {
        const float n = a.n + b.n, share = n > 0.0f ? b.n / n : 0.0f, apart = b.mean - a.mean;
        return Moments{n, a.mean + apart * share, a.squares + b.squares + apart * apart * a.n * share};
    }
};

// out = (inp - mean) * rstd * weight + bias for each row, with rstd = 1 / sqrt(variance + eps). weight,
// bias (C). LANES threads share a row, each takes every LANES-th pack of V elements; V divides C and
// stride. A lane takes deviations from the mean of its own elements, so one reduction is enough
#define LAYERNORM_EPS 1e-6f
template <int V, int LANES, class Keep> __global__ void layernorm_forward_kernel(floatX* out, float* mean, float* rstd,
        const floatX* inp, const floatX* weight, const floatX* bias, size_t rows, int C, size_t stride, Keep keep) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const floatX* row = inp + r * stride;
    float v[V], w[V], b[V], sum[V] = {0}, squares[V] = {0}, n = 0.0f;
    for (int c = first; c < C; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) { sum[j] += v[j]; }
        n += V;
    }
    const float lane_mean = n > 0.0f ? total<V>(sum) / n : 0.0f;
    for (int c = first; c < C; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) { squares[j] += (v[j] - lane_mean) * (v[j] - lane_mean); }
    }
    const Moments all = cg::reduce(lanes, Moments{n, lane_mean, total<V>(squares)}, JoinMoments());
    const float m = all.mean, s = rsqrtf(all.squares / C + LAYERNORM_EPS);
    for (int c = first; c < C; c += step) {
        load<V>(v, row + c), load<V>(w, weight + c), load<V>(b, bias + c);
        for (int j = 0; j < V; j++) { v[j] = (v[j] - m) * s * w[j] + b[j]; }
        keep.template apply<V>(v, r * C + c);
        store<V>(out + r * C + c, v);
    }
    if (first != 0) { return; }
    mean[r] = m;
    rstd[r] = s;
}
void layernorm_forward(floatX* out, float* mean, float* rstd, const floatX* x, const floatX* w, const floatX* b,
                       size_t rows, size_t C, size_t stride, KeepLargest keep) {
    const bool vec = vectorizable(C | stride, out, x, w, b);
    if (keep.threshold == NULL) {
        LAUNCH_ROWS(layernorm_forward_kernel, vec, C, rows, out, mean, rstd, x, w, b, rows, C, stride, KeepAll());
    } else { LAUNCH_ROWS(layernorm_forward_kernel, vec, C, rows, out, mean, rstd, x, w, b, rows, C, stride, keep); }
}

struct AddPairs { __device__ float2 operator()(float2 a, float2 b) const { return {a.x + b.x, a.y + b.y}; } };

// dinp += rstd * (g - mean(g) - norm * mean(g * norm)) for each row, with g = dout * weight and
// norm = (inp - mean) * rstd. Rows of dinp and inp begin `stride` apart; dout (rows, C). Lanes as above
template <int V, int LANES> __global__ void layernorm_backward_kernel(
        floatX* dinp, const floatX* dout, const floatX* inp, const floatX* weight, const float* mean,
        const float* rstd, size_t rows, int C, size_t stride) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const float m = mean[r], s = rstd[r];
    float x[V], g[V], w[V], d[V], sum[V] = {0}, norm_sum[V] = {0};
    for (int c = first; c < C; c += step) {
        load<V>(x, inp + r * stride + c), load<V>(g, dout + r * C + c), load<V>(w, weight + c);
        for (int j = 0; j < V; j++) { sum[j] += g[j] * w[j]; }
        for (int j = 0; j < V; j++) { norm_sum[j] += g[j] * w[j] * ((x[j] - m) * s); }
    }
    const float2 sums = cg::reduce(lanes, make_float2(total<V>(sum), total<V>(norm_sum)), AddPairs());
    const float g_mean = sums.x / C, gn_mean = sums.y / C;
    for (int c = first; c < C; c += step) {
        load<V>(x, inp + r * stride + c), load<V>(g, dout + r * C + c), load<V>(w, weight + c);
        load<V>(d, dinp + r * stride + c);
        for (int j = 0; j < V; j++) { d[j] += s * (g[j] * w[j] - g_mean - (x[j] - m) * s * gn_mean); }
        store<V>(dinp + r * stride + c, d);
    }
}

// First step of the gradients of weight and bias, by slabs as in column_sum_kernel: partial[slab, c] =
// sum of dout * norm, partial[slab, C + c] = sum of dout. A thread sums V columns; V divides C, stride
template <int V> __global__ void layernorm_weight_kernel(float* partial, const floatX* dout, const floatX* inp,
        const float* mean, const float* rstd, size_t rows, int C, size_t stride) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t packs = C / V, slab = i / packs, column = i % packs * V;
    if (slab * SLAB_ROWS >= rows) { return; }
    const size_t end = min((slab + 1) * SLAB_ROWS, rows);
    float x[V], g[V], dweight[V] = {0}, dbias[V] = {0};
    for (size_t r = slab * SLAB_ROWS; r < end; r++) {
        const float m = mean[r], s = rstd[r];
        load<V>(x, inp + r * stride + column), load<V>(g, dout + r * C + column);
        for (int j = 0; j < V; j++) { dweight[j] += g[j] * ((x[j] - m) * s); }
        for (int j = 0; j < V; j++) { dbias[j] += g[j]; }
    }
    store<V>(partial + slab * 2*C + column, dweight);
    store<V>(partial + slab * 2*C + C + column, dbias);
}
void layernorm_backward(floatX* dinp, float* dweight, float* dbias, float* partial, const floatX* dout,
        const floatX* x, const floatX* w, const float* mean, const float* rstd, size_t rows, size_t C, size_t stride) {
    const size_t slabs = CEIL_DIV(rows, (size_t)SLAB_ROWS);
    const bool vec = vectorizable(C | stride, dinp, dout, x, w);
    LAUNCH(layernorm_weight_kernel, vec, slabs * C, 64, partial, dout, x, mean, rstd, rows, C, stride);
    LAUNCH_ROWS(layernorm_backward_kernel, vec, C, rows, dinp, dout, x, w, mean, rstd, rows, C, stride);
    column_sum_finish(dweight, dbias, partial, slabs, C, 2*C);
}

// in PyTorch: F.gelu(inp), x * Phi(x) with the normal distribution Phi(x) = (1 + erf(x / sqrt(2))) / 2.
// out, inp (n). A thread makes V elements; V divides n
template <int V, class Keep> __global__ void gelu_forward_kernel(floatX* out, const floatX* inp, size_t n, Keep keep) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    float x[V];
    load<V>(x, inp + i);
    for (int j = 0; j < V; j++) { x[j] = 0.5f * x[j] * (1.0f + erff(x[j] * 0.70710678f)); }
    keep.template apply<V>(x, i);
    store<V>(out + i, x);
}

// dinp *= Phi(x) + x * phi(x), with x = inp and the normal density phi(x) = exp(-x^2 / 2) / sqrt(2 pi).
// dinp, inp (n). A thread makes V elements; V divides n
template <int V> __global__ void gelu_backward_kernel(floatX* dinp, const floatX* inp, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    float x[V], d[V];
    load<V>(x, inp + i), load<V>(d, dinp + i);
    for (int j = 0; j < V; j++) {
        d[j] *= 0.5f * (1.0f + erff(x[j] * 0.70710678f)) + x[j] * 0.39894228f * expf(-0.5f * x[j] * x[j]);
    }
    store<V>(dinp + i, d);
}
void gelu_forward(floatX* out, const floatX* inp, size_t n, KeepLargest keep) {
    const bool packs = vectorizable(n, out, inp);
    if (keep.threshold == NULL) { LAUNCH(gelu_forward_kernel, packs, n, 256, out, inp, n, KeepAll()); }
    else { LAUNCH(gelu_forward_kernel, packs, n, 256, out, inp, n, keep); }
}
void gelu_backward(floatX* dinp, const floatX* inp, size_t n) {
    LAUNCH(gelu_backward_kernel, vectorizable(n, dinp, inp), n, 256, dinp, inp, n);
}

// scales[l, branch, b] = 0 with probability rate(l), else 1 / (1 - rate(l)), as timm (Huang et al., ECCV
// 2016). scales (L, 2, B). A thread draws one, for image first + b of all ranks
__global__ void drop_path_scales_kernel(
        float* scales, int L, int B, float last, uint64_t seed, unsigned step, unsigned first) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= L * 2 * B) { return; }
    const double keep = 1.0 - (double)drop_path_rate(last, i / B / 2, L);
    const uint4 u = philox(seed, RNG_DROP_PATH, step, (uint64_t)(i / B) << 32 | (first + i % B));
    scales[i] = (double)u.x + 0.5 < keep * 4294967296.0 ? 1.0f / (float)keep : 0.0f;
}
void drop_path_scales(float* out, int L, int B, double last, unsigned long long seed, unsigned step, unsigned first) {
    const int blocks = CEIL_DIV(L * 2 * B, 64);
    LAUNCH_BLOCKS(drop_path_scales_kernel, blocks, 64, main_stream, out, L, B, last, seed, step, first);
}

// out = scales[b] * x (+ add where it is not NULL) for each image b; out may be x. out, x, add
// (images, image) have n elements, scales (images). V divides `image`; a thread makes V
template <int V> __global__ void drop_path_kernel(
        floatX* out, const floatX* x, const floatX* add, const float* scales, size_t n, size_t image) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i >= n) { return; }
    const float scale = scales[i / image];
    float v[V], r[V] = {0};
    load<V>(v, x + i);
    if (add != NULL) { load<V>(r, add + i); }
    for (int j = 0; j < V; j++) { v[j] = r[j] + scale * v[j]; }
    store<V>(out + i, v);
}
void drop_path(floatX* out, const floatX* x, const floatX* add, const float* scales, size_t images, size_t image) {
    const size_t n = images * image;
    LAUNCH(drop_path_kernel, vectorizable(image, out, x, add), n, 256, out, x, add, scales, n, image);
}

// Writes where each head's matrices begin: cublasGemmBatchedEx reads q, k and v where they lie in qkv.
// qkv, dqkv (images, T, 3, NH, HS), out (images, T, NH, HS). A thread has one of num (image, head) pairs
__global__ void attention_pointers_kernel(Attention a, floatX* qkv, floatX* out, floatX* dqkv, int num) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, count = a.max_images * a.heads;
    if (i >= num) { return; }
    const size_t C = (size_t)a.heads * a.HS, square = (size_t)i * a.T * a.ld;
    const size_t image = i / a.heads * a.T * C, o = image + i % a.heads * a.HS, q = o + 2 * image;
    void* const begins[NUM_ATTENTION_POINTERS] = { // in the order of PTR_
        qkv + q, qkv + q + C, qkv + q + 2 * C, out + o, a.scores + square, a.probs + square,
        dqkv + q, dqkv + q + C, dqkv + q + 2 * C, a.dprobs + square, a.dscores + square};
    for (int p = 0; p < NUM_ATTENTION_POINTERS; p++) { a.pointers[p * count + i] = begins[p]; }
}
void attention_pointers(const Attention* a, floatX* qkv, floatX* out, floatX* dqkv, int images) {
    const int num = images * a->heads;
    LAUNCH_BLOCKS(attention_pointers_kernel, CEIL_DIV(num, 64), 64, main_stream, *a, qkv, out, dqkv, num);
}

// largest of some scores (of none -FLT_MAX: -INFINITY would give NaN), sum of exp(score - largest)
typedef struct { float largest, sum; } ExpSum;
// one comparison; fmaxf has more to do, to pass over NaNs. A NaN score still shows, in the sum
__device__ inline float larger(float a, float b) { return a > b ? a : b; }
struct JoinExpSums {
    __device__ ExpSum operator()(ExpSum a, ExpSum b) const {
        const float m = larger(a.largest, b.largest);
        return ExpSum{m, a.sum * expf(a.largest - m) + b.sum * expf(b.largest - m)};
    }
};

// lse = scores.logsumexp(-1), probs = exp(scores - lse) = scores.softmax(-1). scores, probs (rows, ld),
// lse (rows). Lanes as above; V divides ld. The last pack may reach into columns T to ld, which
// allocation clears. A lane subtracts its own largest score, so one reduction is enough
template <int V, int LANES> __global__ void softmax_forward_kernel(float* lse, Attention a, size_t rows) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const float* row = a.scores + r * a.ld;
    float v[V], largest[V], sum[V] = {0};
    for (int j = 0; j < V; j++) { largest[j] = -FLT_MAX; }
    for (int c = first; c < a.T; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) { largest[j] = larger(c + j < a.T ? v[j] : -FLT_MAX, largest[j]); }
    }
    for (int half = V / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) { largest[j] = larger(largest[j + half], largest[j]); }
    }
    for (int c = first; c < a.T; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) { v[j] = expf(v[j] - largest[0]); }
        for (int j = 0; j < V; j++) { sum[j] += c + j < a.T ? v[j] : 0.0f; }
    }
    const ExpSum all = cg::reduce(lanes, ExpSum{largest[0], total<V>(sum)}, JoinExpSums());
    const float log_sum = all.largest + logf(all.sum);
    for (int c = first; c < a.T; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) { v[j] = expf(v[j] - log_sum); }
        store<V>(a.probs + r * a.ld + c, v);
    }
    if (first == 0) { lse[r] = log_sum; }
}

// probs = exp(scores - lse), dscores = probs * (dprobs - sum over the row of probs * dprobs), without
// the output of attention, of which DropIT keeps only a part. Shapes, lanes and padding as above
template <int V, int LANES> __global__ void softmax_backward_kernel(const float* lse, Attention a, size_t rows) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const float log_sum = lse[r];
    float p[V], d[V], sum[V] = {0};
    for (int c = first; c < a.T; c += step) {
        load<V>(p, a.scores + r * a.ld + c), load<V>(d, a.dprobs + r * a.ld + c);
        for (int j = 0; j < V; j++) { p[j] = expf(p[j] - log_sum) * d[j]; }
        for (int j = 0; j < V; j++) { sum[j] += c + j < a.T ? p[j] : 0.0f; }
    }
    const float row_sum = cg::reduce(lanes, total<V>(sum), cg::plus<float>());
    for (int c = first; c < a.T; c += step) {
        load<V>(p, a.scores + r * a.ld + c), load<V>(d, a.dprobs + r * a.ld + c);
        for (int j = 0; j < V; j++) { p[j] = expf(p[j] - log_sum); }
        for (int j = 0; j < V; j++) { d[j] = p[j] * (d[j] - row_sum); }
        store<V>(a.probs + r * a.ld + c, p), store<V>(a.dscores + r * a.ld + c, d);
    }
}

// Row-major D = op(X) @ op(Y) for every head of a chunk, over sqrt(HS) for scores, dq and dk. op
// transposes under transX, transY. D, X, Y are rows of `pointers`; scores, probs and their gradients are
// (T, T), others (T, HS); only a (T, T) X is transposed. Column-major cuBLAS makes D^T = op(Y)^T @ op(X)^T
void attention_matmul(const Attention* a, int images, int D, int X, bool transX, int Y, bool transY) {
    const int T = a->T, HS = a->HS, C = a->heads * HS, count = a->max_images * a->heads;
    auto fp32 = [](int p) { return p == PTR_SCORES || p == PTR_DPROBS; };
    auto square = [&](int p) { return fp32(p) || p == PTR_PROBS || p == PTR_DSCORES; };
    const auto type = fp32(D) ? CUDA_R_32F : CUDA_FLOATX;
    auto stride = [&](int p) { return square(p) ? a->ld : p == PTR_OUT ? C : 3 * C; }; // from row to row
    const auto op_x = transX ? CUBLAS_OP_T : CUBLAS_OP_N, op_y = transY ? CUBLAS_OP_T : CUBLAS_OP_N;
    void **d = a->pointers + D * count, **x = a->pointers + X * count, **y = a->pointers + Y * count;
    const bool scaled = D == PTR_SCORES || D == PTR_DQ || D == PTR_DK;
    const float alpha = scaled ? 1.0f / sqrtf((float)HS) : 1.0f, zero = 0.0f;
    cublasCheck(cublasGemmBatchedEx(cublas_handle, op_y, op_x, square(D) ? T : HS, T, square(X) ? T : HS,
        &alpha, y, CUDA_FLOATX, stride(Y), x, CUDA_FLOATX, stride(X), &zero, d,
        type, stride(D), images * a->heads, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

void attention_forward(floatX* out, float* lse, floatX* qkv, const Attention* a, int images) {
    const size_t rows = (size_t)images * a->heads * a->T;
    attention_pointers(a, qkv, out, qkv, images); // the pointers to gradients are not used
    attention_matmul(a, images, PTR_SCORES, PTR_Q, false, PTR_K, true);    // scores = q @ k^T / sqrt(HS)
    // `true`: packs can always be read, because rows begin a multiple of VEC elements apart
    LAUNCH_ROWS(softmax_forward_kernel, true, a->T, rows, lse, *a, rows);
    attention_matmul(a, images, PTR_OUT, PTR_PROBS, false, PTR_V, false);  // out = probs @ v
}

void attention_backward(floatX* dqkv, floatX* dout, floatX* qkv, const float* lse, const Attention* a, int images) {
    const size_t rows = (size_t)images * a->heads * a->T;
    attention_pointers(a, qkv, dout, dqkv, images); // PTR_OUT is dout here
    attention_matmul(a, images, PTR_SCORES, PTR_Q, false, PTR_K, true);    // scores = q @ k^T / sqrt(HS)
    attention_matmul(a, images, PTR_DPROBS, PTR_OUT, false, PTR_V, true);  // dprobs = dout @ v^T
    LAUNCH_ROWS(softmax_backward_kernel, true, a->T, rows, lse, *a, rows); // the same probs, and dscores
    attention_matmul(a, images, PTR_DV, PTR_PROBS, true, PTR_OUT, false);  // dv = probs^T @ dout
    attention_matmul(a, images, PTR_DQ, PTR_DSCORES, false, PTR_K, false); // dq = dscores @ k / sqrt(HS)
    attention_matmul(a, images, PTR_DK, PTR_DSCORES, true, PTR_Q, false);  // dk = dscores^T @ q / sqrt(HS)
}

// ----------------------------------------------------------------------------
// what else the model tells the code around it

void model_check_file(const Safetensors* st) {
    require(!safetensors_has(st, "dist_token") && !safetensors_has(st, "head_dist.weight"),
            "these are the weights of a distilled DeiT, which has a distillation token (dist_token, head_dist) "
            "that this program does not train; take the DeiT without `distilled` in its name");
}

// three times the forward pass, whatever -r computes again, and DropIT or drop-path spare
double model_flops(const Model* model, size_t n) {
    const DeitConfig c = model->config;
    const double C = c.channels, T = model->T, K = (double)model->CH * c.patch_size * c.patch_size;
    const double block = 2*T*12*C*C + 4*T*T*C; // four linears; scores and their product with v
    return 3.0 * n * (c.depth * block + 2*(T-1)*K*C + 2*C*model->V);
}

void model_print(const Model* model) {
    const DeitConfig c = model->config;
    printf("model: %s, image %zu x %zu, patch %d, channels %zu, classes %zu, width %d, depth %d, "
           "heads %d, %zu parameters\n", model->name, model->H, model->W, c.patch_size, model->CH, model->V,
           c.channels, c.depth, c.heads, model->num_parameters);
}

void model_pixels(const Model* model, size_t b, float* pixels) {
    const Activation* a = model->acts.patches;
    const size_t P = model->config.patch_size, CH = model->CH, W = model->W, n = a->per_image;
    floatX* patches = host_new<floatX>(n, "an image"); // (T-1, CH, P, P)
    cudaCheck(cudaMemcpy(patches, activation_at(a, b, false), n * sizeof(floatX), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < n; i++) {
        const size_t t = i / (CH*P*P), h = t / (W/P) * P + i / P % P, w = t % (W/P) * P + i % P;
        pixels[(i / (P*P) % CH * model->H + h) * W + w] = (float)patches[i];
    }
    free(patches);
}

// ----------------------------------------------------------------------------
// RandAugment (Cubuk et al., arXiv 1909.13719): what timm does to the bytes of a training image after
// crop and flip, as Pillow computes it. The host draws the operations of each image, by Philox from its
// place in the epoch; the device applies them, a layer of operations a launch

// in the order of timm's _RAND_INCREASING_TRANSFORMS
enum { NO_AUGMENT, AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR,
       CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y, TRANSLATE_X, TRANSLATE_Y, NUM_AUGMENTS };
struct Augmenter {
    int layers;    // operations an image, each applied with probability 1/2; 0: none
    int magnitude; // 0 to 10
    double magnitude_std;
    size_t S, CH;
    struct ImageAugment *augments, *host_augments; // (layers, B); the second is pinned
    uint8_t *images, *tables;                      // (B, S, S, CH), (B, CH, 256)
};
typedef struct ImageAugment {
    int op, value;    // value: bits that stay, threshold or summand
    float factor;     // 0: the degenerate image (grey, black, blurred), 1: the image
    double matrix[6]; // (2, 3): (x, y) of the input = matrix * (x, y, 1) of the output, at pixel centres
} ImageAugment;
typedef struct { uint8_t v[4]; } Pixel;

Augmenter* augment_new(const char* text) {
    Augmenter* o = host_new<Augmenter>(1, "RandAugment");
    bool increasing = false, known = strncmp(text, "rand", 4) == 0;
    if (strcmp(text, "none") == 0) { return o; }
    o->layers = 2;
    o->magnitude = -1;
    const char* at = text + 4;
    for (int used = 0; known && *at == '-'; at += used) {
        used = strncmp(at, "-inc1", 5) == 0 ? 5 : 0;
        increasing = increasing || used > 0;
        known = used > 0 || sscanf(at, "-mstd%lf%n", &o->magnitude_std, &used) == 1 ||
            sscanf(at, "-m%3d%n", &o->magnitude, &used) == 1 || sscanf(at, "-n%3d%n", &o->layers, &used) == 1;
        known = known && o->magnitude <= 10 && o->layers >= 1 && o->layers <= 8 &&
            o->magnitude_std >= 0.0 && o->magnitude_std <= 100.0;
    }
    require(known && *at == 0 && o->magnitude >= 0 && increasing,
            "-aa %s is not a RandAugment that is known here; choose none or rand-mM[-nN][-mstdX]-inc1 with M "
            "up to 10, N from 1 to 8 and X up to 100, such as rand-m9-mstd0.5-inc1", text);
    return o;
}

// a = timm's operation at a level of 0 to 10, for images of side S. Posterize at 10 keeps no bit: black
void augment_argument(ImageAugment* a, int op, double level, bool negate, int S) {
    const double part = level / 10.0, shift = negate ? -part : part, half = S / 2.0;
    const double angle = -shift * 30.0 * M_PI / 180.0;
    double* m = a->matrix;
    *a = ImageAugment{op, 0, 0.0f, {1.0, 0.0, 0.0, 0.0, 1.0, 0.0}};
    switch (op) {
    case ROTATE: // about the centre; the terms are rounded to 15 decimals, as Pillow's
        m[0] = m[4] = rint(cos(angle) * 1e15) / 1e15;
        m[1] = rint(sin(angle) * 1e15) / 1e15, m[3] = -m[1];
        m[2] = -half * m[0] - half * m[1] + half;
        m[5] = -half * m[3] - half * m[4] + half;
        break;
    case POSTERIZE: a->value = 4 - (int)(part * 4); break;
    case SOLARIZE: a->value = 256 - (int)(part * 256); break;
    case SOLARIZE_ADD: a->value = (int)(part * 110); break;
    case COLOR: case CONTRAST: case BRIGHTNESS: case SHARPNESS: a->factor = fmax(0.1, 1.0 + shift * 0.9); break;
    case SHEAR_X: m[1] = shift * 0.3; break;
    case SHEAR_Y: m[3] = shift * 0.3; break;
    case TRANSLATE_X: m[2] = shift * 0.45 * S; break;
    case TRANSLATE_Y: m[5] = shift * 0.45 * S; break;
    }
}

// the operation that an image of side S meets in a layer
void draw_augment(ImageAugment* a, const Augmenter* o, uint64_t seed, unsigned epoch, uint64_t place,
                  int layer, int S) {
    const uint4 u = philox(seed, RNG_RANDAUGMENT, epoch, place << 8 | 2 * layer);
    const uint4 v = philox(seed, RNG_RANDAUGMENT, epoch, place << 8 | (2 * layer + 1));
    const int op = 1 + draw_below(u.x, NUM_AUGMENTS - 1);
    const double level = fmin(10.0, fmax(0.0, o->magnitude + o->magnitude_std * normal(v)));
    augment_argument(a, u.y >> 31 ? NO_AUGMENT : op, level, u.z >> 31, S);
}

// V pixels from pixel i on, of the image mirrored left to right if `flip`. V divides i, S*S, address
template <int CH, int V>
__device__ inline void load_pixels(uint8_t* x, const uint8_t* image, unsigned i, unsigned S, bool flip) {
    for (int q = 0; flip && q < V; q++) {
        const unsigned row = (i + q) / S, from = row * S + S - 1 - (i + q - row * S);
        for (int c = 0; c < CH; c++) { x[q * CH + c] = image[(size_t)from * CH + c]; }
    }
    for (int k = 0; !flip && k < CH; k++) {
        *(Pack<V, uint8_t>*)(x + k * V) = *(const Pack<V, uint8_t>*)(image + (size_t)i * CH + k * V);
    }
}

// Pillow's Image.blend of two values: truncated, not rounded; fused, it would have another last bit
__device__ inline uint8_t blend(int from, int to, float factor) {
    const float v = __fadd_rn((float)from, __fmul_rn(factor, (float)(to - from)));
    return v <= 0.0f ? 0 : v >= 255.0f ? 255 : (uint8_t)v;
}

// Pillow's conversion of R, G, B to grey
__device__ inline int luma(const uint8_t* x) { return (x[0] * 19595 + x[1] * 38470 + x[2] * 7471 + 32768) >> 16; }

// Pillow's cubic through four values (a = -1), between v1 and v2. As a polynomial of d it is exact where
// all four are equal; the caller truncates it
__device__ inline float cubic(float v0, float v1, float v2, float v3, float d) {
    return v1 + d * (v2 - v0 + d * (2.0f * (v0 - v1) + v2 - v3 + d * (v1 - v0 + v3 - v2)));
}

// Operations that map each value by itself: tables[b, c, v] = what v becomes in channel c of image b.
//     AutoContrast: (v - min) * 255 / (max - min)   Brightness: blend(0, v)   Contrast: blend(mean, v)
//     Equalize: (step/2 + pixels below v) / step, step = (pixels - those of the largest value) / 255
//     Posterize, Solarize, SolarizeAdd, Invert
// tables (n, CH, 256), images (n, pixels, CH), augments (n). A block of 256 threads an image. V divides pixels
template <int CH, int V> __global__ void augment_table_kernel(
        uint8_t* tables, const uint8_t* images, const ImageAugment* augments, unsigned pixels) {
    __shared__ unsigned counts[CH][256];
    __shared__ int low[CH], high[CH]; // least and largest value; low: Equalize's step, Contrast's mean
    const size_t b = blockIdx.x;
    const unsigned t = threadIdx.x;
    const int op = augments[b].op, value = augments[b].value;
    const bool grey = op == CONTRAST && CH == 3;
    const int planes = grey ? 1 : CH; // that are counted
    if (op == NO_AUGMENT || op == ROTATE || op == COLOR || op >= SHARPNESS) { return; }
    if (op == AUTO_CONTRAST || op == EQUALIZE || op == CONTRAST) {
        for (int c = 0; c < CH; c++) { counts[c][t] = 0; }
        __syncthreads();
        for (unsigned i = t * V; i < pixels; i += 256 * V) {
            alignas(4) uint8_t x[V * CH];
            load_pixels<CH, V>(x, images + b * pixels * CH, i, 1, false);
            for (int q = 0; grey && q < V; q++) { atomicAdd_block(&counts[0][luma(x + q * CH)], 1u); }
            for (int k = 0; !grey && k < V * CH; k++) { atomicAdd_block(&counts[k % CH][x[k]], 1u); }
        }
        __syncthreads();
        if (op == CONTRAST ? t == 0 : t < CH) {
            uint64_t sum = 0, below = 0, last = 0;
            low[t] = high[t] = -1;
            for (int v = 0; v < 256; v++) {
                const unsigned count = counts[t][v];
                if (count > 0 && low[t] < 0) { low[t] = v; }
                if (count > 0) { high[t] = v, last = count; }
                if (op == EQUALIZE) { counts[t][v] = (unsigned)below; }
                below += count;
                for (int c = 0; op == CONTRAST && c < planes; c++) { sum += (uint64_t)counts[c][v] * v; }
            }
            if (op == EQUALIZE) { low[t] = (int)((below - last) / 255); }
            if (op == CONTRAST) { low[t] = (int)((double)sum / ((double)pixels * planes) + 0.5); }
        }
        __syncthreads();
    }
    for (int c = 0; c < CH; c++) {
        int v = (int)t;
        if (op == AUTO_CONTRAST && high[c] > low[c]) {
            const double scale = 255.0 / (high[c] - low[c]);
            v = min(max((int)__dadd_rn(__dmul_rn((double)v, scale), -low[c] * scale), 0), 255);
        } else if (op == EQUALIZE && low[c] > 0) {
            v = min((int)((low[c] / 2 + counts[c][t]) / low[c]), 255);
        } else if (op == INVERT) { v = 255 - v;
        } else if (op == POSTERIZE) { v &= 0xFF00 >> value;
        } else if (op == SOLARIZE) { v = v < value ? v : 255 - v;
        } else if (op == SOLARIZE_ADD) { v = v >= 128 ? v : v + value < 255 ? v + value : 255;
        } else if (op == CONTRAST) { v = blend(low[0], v, augments[b].factor);
        } else if (op == BRIGHTNESS) { v = blend(0, v, augments[b].factor); }
        tables[(b * CH + c) * 256 + t] = (uint8_t)v;
    }
}

// x (CH) = the image (S, S, CH), or outside of it `fill`, at the place of output pixel i in it, bicubic
template <int CH> __device__ inline void affine_pixel(
        uint8_t* x, const uint8_t* image, const double* m, unsigned i, int S, bool flip, Pixel fill) {
    const int row = (int)i / S, column = (int)i - row * S;
    const double h = row + 0.5, w = column + 0.5; // in fp32 the place would be off by 1e-5 pixels
    const double u = m[0] * w + m[1] * h + m[2], v = m[3] * w + m[4] * h + m[5];
    if (!(u >= 0.0 && u < S && v >= 0.0 && v < S)) {
        for (int c = 0; c < CH; c++) { x[c] = fill.v[c]; }
        return;
    }
    const int left = (int)floor(u - 0.5), top = (int)floor(v - 0.5);
    const float du = (float)(u - 0.5 - left), dv = (float)(v - 0.5 - top);
    unsigned columns[4];
    const uint8_t* rows[4];
    for (int k = 0; k < 4; k++) {
        const int from = min(max(left - 1 + k, 0), S - 1);
        columns[k] = (unsigned)(flip ? S - 1 - from : from) * CH;
        rows[k] = image + (size_t)min(max(top - 1 + k, 0), S - 1) * S * CH;
    }
    for (int c = 0; c < CH; c++) {
        float r[4];
        for (int k = 0; k < 4; k++) {
            const uint8_t* p = rows[k] + c;
            r[k] = cubic(p[columns[0]], p[columns[1]], p[columns[2]], p[columns[3]], du);
        }
        const float value = cubic(r[0], r[1], r[2], r[3], dv);
        x[c] = value <= 0.0f ? 0 : value >= 255.0f ? 255 : (uint8_t)value;
    }
}

// x (CH) = blend(smooth, image) at pixel i, smooth = (sum of 3 x 3 + 4 * centre) / 13; the border stays
template <int CH> __device__ inline void sharp_pixel(
        uint8_t* x, const uint8_t* image, float factor, unsigned i, int S, bool mirrored) {
    const int row = (int)i / S, column = (int)i - row * S;
    const uint8_t* p = image + ((size_t)row * S + (mirrored ? S - 1 - column : column)) * CH;
    const bool border = row == 0 || row == S - 1 || column == 0 || column == S - 1;
    for (int c = 0; c < CH; c++, p++) {
        int sum = 4 * p[0];
        for (int k = 0; !border && k < 9; k++) { sum += p[(k / 3 - 1) * S * CH + (k % 3 - 1) * CH]; }
        x[c] = border ? p[0] : blend((2 * sum + 13) / 26, p[0], factor);
    }
}

// out = one operation an image, as Pillow computes it. All threads of a block have the same operation.
//     Color: blend(grey, image) of three channels, else the image      Sharpness: sharp_pixel
//     Rotate, Shear, Translate: affine_pixel                           the others: tables
// out, inp (n, S, S, CH), tables (n, CH, 256), augments (n), flips (n): the input is mirrored first;
// NULL: none. A block of 256 threads takes 256 * V pixels of an image; V divides S*S, out and inp
template <int CH, int V> __global__ void augment_kernel(uint8_t* out, const uint8_t* inp, const uint8_t* tables,
        const ImageAugment* augments, const int* flips, Pixel fill, int S, unsigned blocks) {
    const size_t b = blockIdx.x / blocks;
    const unsigned pixels = (unsigned)S * S, i = (blockIdx.x % blocks * 256 + threadIdx.x) * V;
    if (i >= pixels) { return; }
    const ImageAugment* a = &augments[b];
    const uint8_t* image = inp + b * pixels * CH;
    const bool flip = flips != NULL && flips[b];
    const int op = a->op;
    alignas(4) uint8_t x[V * CH];
    if (op == SHARPNESS) {
        for (int q = 0; q < V; q++) { sharp_pixel<CH>(x + q * CH, image, a->factor, i + q, S, flip); }
    } else if (op == ROTATE || op > SHARPNESS) {
        for (int q = 0; q < V; q++) { affine_pixel<CH>(x + q * CH, image, a->matrix, i + q, S, flip, fill); }
    } else {
        load_pixels<CH, V>(x, image, i, S, flip);
        if (op == COLOR) {
            for (int q = 0; CH == 3 && q < V; q++) {
                const int grey = luma(x + q * CH);
                for (int c = 0; c < CH; c++) { x[q * CH + c] = blend(grey, x[q * CH + c], a->factor); }
            }
        } else if (op != NO_AUGMENT) {
            for (int k = 0; k < V * CH; k++) { x[k] = tables[(b * CH + k % CH) * 256 + x[k]]; }
        }
    }
    typedef Pack<V, uint8_t> Bytes;
    Bytes* to = (Bytes*)(out + (b * pixels + i) * CH);
    for (int k = 0; k < CH; k++) { to[k] = *(const Bytes*)(x + k * V); }
}
template <int CH, int V> void augment_layer(uint8_t* out, const uint8_t* inp, uint8_t* tables, const ImageAugment* ops,
        const int* flips, unsigned n, int S, Pixel fill, cudaStream_t stream) {
    const unsigned pixels = (unsigned)S * S, blocks = CEIL_DIV(pixels, 256 * V);
    augment_table_kernel<CH, V><<<n, 256, 0, stream>>>(tables, inp, ops, pixels);
    augment_kernel<CH, V><<<n * blocks, 256, 0, stream>>>(out, inp, tables, ops, flips, fill, S, blocks);
    kernelCheck();
}

// images (n, S, S, CH) become what augments (layers, n) say, mirrored first where flips (n) say so;
// those become 0. scratch is as large as images, tables (n, CH, 256). fill: of what is left empty
void augment_images(uint8_t* images, uint8_t* scratch, uint8_t* tables, int* flips, const ImageAugment* augments,
                    int layers, size_t n, int S, int CH, Pixel fill, cudaStream_t stream) {
    uint8_t *inp = images, *out = scratch;
    for (int layer = 0; layer < layers; layer++, augments += n) {
        const int* mirror = layer == 0 ? flips : NULL;
#define AUGMENT(C, V) augment_layer<C, V>(out, inp, tables, augments, mirror, n, S, fill, stream)
#define AUGMENT_OF(C) case C: if (S % 2 == 0) { AUGMENT(C, 4); } else { AUGMENT(C, 1); } break;
        switch (CH) { AUGMENT_OF(1) AUGMENT_OF(2) AUGMENT_OF(3) AUGMENT_OF(4) }
        std::swap(inp, out);
    }
    if (inp != images) { cudaCheck(cudaMemcpyAsync(images, inp, n * S * S * CH, cudaMemcpyDeviceToDevice, stream)); }
    cudaCheck(cudaMemsetAsync(flips, 0, n * sizeof(int), stream));
}

void augment_plan(Plan* plan, Augmenter* a, size_t B, size_t S, size_t CH) {
    const size_t layers = a->layers;
    a->S = S;
    a->CH = CH;
    if (layers == 0) { return; }
    plan_add(plan, SCRATCH, "augments", "", "(layers, B)", &a->augments, layers * B * sizeof(ImageAugment));
    plan_add(plan, SCRATCH, "augmented images", "", "(B, S, S, CH) bytes", &a->images, B * S * S * CH);
    plan_add(plan, SCRATCH, "augment tables", "", "(B, CH, 256) bytes", &a->tables, B * CH * 256);
}

// the loader's hook (see "shared: image classifiers"): RandAugment
void model_augment(Augmenter* a, const Batch* batch, cudaStream_t stream) {
    const BatchAugment* b = &batch->augment;
    const int S = (int)a->S, CH = (int)a->CH, layers = a->layers;
    const size_t n = batch->n, bytes = layers * n * sizeof(ImageAugment);
    if (layers == 0) { return; }
    ImageAugment** drawn = &a->host_augments;
    if (*drawn == NULL) { cudaCheck(cudaMallocHost((void**)drawn, bytes)); } // n is B in training
    Pixel fill = {};
    for (int c = 0; c < CH; c++) { fill.v[c] = (uint8_t)fmin(255.0, fmax(0.0, rint(255.0 * batch->stats.mean[c]))); }
    for (size_t i = 0; i < layers * n; i++) {
        const uint64_t place = b->place + i % n * b->place_step;
        draw_augment(*drawn + i, a, b->seed, b->epoch, place, (int)(i / n), S);
    }
    cudaCheck(cudaMemcpyAsync(a->augments, *drawn, bytes, cudaMemcpyHostToDevice, stream));
    augment_images(batch->images, a->images, a->tables, batch->flips, a->augments, layers, n, S, CH, fill, stream);
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

