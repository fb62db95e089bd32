/*
Trains a DeiT / ViT image classifier with DropIT, on a GPU or (through dev/cpu) on a CPU.

DropIT (Chen et al., ICLR 2023, arXiv 2202.13808) in five lines: a linear layer caches its input X for
the weight gradient dW = dout^T X. Of X we keep only the k = n*(1-gamma) elements of largest magnitude,
as a bitmap and packed values, and take the rest as zero when dW is computed. Input and bias gradients
never read X and stay exact. See "shared: DropIT" for how the elements are chosen and stored.

build: make train_deit     (by hand: nvcc -O3 -std=c++17 -arch=sm_90 train_deit.cu -lcublas -lcublasLt -o train_deit)
run:   ./train_deit -g 0.7 (no flags are needed: without -i it trains deit_nano on the bundled Fashion-MNIST)

Three things a reader cannot guess:
- A block's forward and backward passes run over chunks of images (about 32 MiB for the widest tensor), so
  that scratch memory does not grow with the batch and a chunk stays in the GPU's cache. What is recomputed
  in the backward pass is recomputed in the same chunks by the same calls: the same bits.
- Gradients of parameters accumulate (+=) and are fp32; gradients of activations are assigned (=), but for
  the residual stream, into which every branch adds.
- Every random choice is Philox(seed, purpose, step, index): there is no generator state to save.

B images in a batch, T tokens (patches + class token), C channels, NH heads of HS = C/NH, L blocks,
V classes, CH image channels, P patch side, OC output channels of a linear layer.
*/

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <initializer_list>
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

// ---- shared: checks --------------------------------------------------------
#define CEIL_DIV(M, N) (((M) + (N) - 1) / (N))

// for what the user can get wrong (files, flags, sizes); assert() is for what only we can get wrong
#define require(cond, ...) do { if (!(cond)) { \
    fflush(stdout); fprintf(stderr, "error: " __VA_ARGS__); fputc('\n', stderr); exit(EXIT_FAILURE); } } while (0)

#define cudaCheck(call) do { cudaError_t err_ = (call); \
    require(err_ == cudaSuccess, "%s:%d: %s: %s", __FILE__, __LINE__, #call, cudaGetErrorString(err_)); } while (0)
#define cublasCheck(call) do { cublasStatus_t err_ = (call); \
    require(err_ == CUBLAS_STATUS_SUCCESS, "%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasGetStatusString(err_)); } while (0)

#define ncclCheck(call) do { ncclResult_t err_ = (call); \
    require(err_ == ncclSuccess, "%s:%d: %s: %s", __FILE__, __LINE__, #call, ncclGetErrorString(err_)); } while (0)
#define mpiCheck(call) do { int err_ = (call); require(err_ == MPI_SUCCESS, "%s:%d: %s: MPI error %d", __FILE__, __LINE__, #call, err_); } while (0)

// goes after every <<<>>>; with -DDEBUG it also waits, so that a bad access is reported by its own kernel
#ifdef DEBUG
#define kernelCheck() do { cudaCheck(cudaGetLastError()); cudaCheck(cudaDeviceSynchronize()); } while (0)
#else
#define kernelCheck() cudaCheck(cudaGetLastError())
#endif
// ---- end shared: checks ----------------------------------------------------

// ---- shared: device --------------------------------------------------------
static cudaStream_t main_stream;
static int num_multiprocessors;
static int rank = 0, num_ranks = 1; // of the processes that train together, one a GPU
// ---- end shared: device ----------------------------------------------------

// ---- shared: several GPUs --------------------------------------------------
// Data parallel: a rank is a process with a GPU of its own. All hold the same weights and take different images; their gradients are added
// up by NCCL on a stream of its own, layer by layer, while the backward pass goes on. MPI starts the ranks and adds up what is printed.
static cudaStream_t reduce_stream;
static cudaEvent_t gradients_ready, gradients_reduced;
#ifdef MULTI_GPU
static ncclComm_t nccl_comm;
#endif

// joins the other ranks where mpirun or srun has started this process; chooses the GPU. Only rank 0 prints
void ranks_open(void) {
    int devices = 0;
    require(cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0, "no CUDA device was found; build with `make DEVICE=cpu` to run on the CPU");
    const bool started = getenv("OMPI_COMM_WORLD_SIZE") != NULL || getenv("PMI_SIZE") != NULL || getenv("PMIX_RANK") != NULL;
#ifdef MULTI_GPU
    if (started) {
        MPI_Comm node;
        ncclUniqueId id;
        int local_rank;
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
        require(rank == 0 || freopen("/dev/null", "w", stdout) != NULL, "rank %d cannot open /dev/null: %m", rank);
    }
#else
    require(!started || strcmp(getenv("OMPI_COMM_WORLD_SIZE") != NULL ? getenv("OMPI_COMM_WORLD_SIZE") : "2", "1") == 0,
            "this program was built without NCCL and MPI and cannot run on several GPUs; `make` says what it misses");
#endif
    if (num_ranks == 1) { cudaCheck(cudaSetDevice(0)); }
    cudaCheck(cudaStreamCreateWithFlags(&reduce_stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&gradients_ready, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&gradients_reduced, cudaEventDisableTiming));
}

void ranks_close(void) {
#ifdef MULTI_GPU
    if (num_ranks > 1) { ncclCheck(ncclCommDestroy(nccl_comm)); }
    int started;
    mpiCheck(MPI_Initialized(&started));
    if (started) { mpiCheck(MPI_Finalize()); }
#endif
}

// Adds up n pieces of gradients over the ranks, in place, after what main_stream does now; main_stream does not wait
void ranks_add(float* const* pieces, const size_t* sizes, int n) {
    if (num_ranks == 1) { return; }
    cudaCheck(cudaEventRecord(gradients_ready, main_stream));
    cudaCheck(cudaStreamWaitEvent(reduce_stream, gradients_ready, 0));
#ifdef MULTI_GPU
    ncclCheck(ncclGroupStart());
    for (int i = 0; i < n; i++) { ncclCheck(ncclAllReduce(pieces[i], pieces[i], sizes[i], ncclFloat, ncclSum, nccl_comm, reduce_stream)); }
    ncclCheck(ncclGroupEnd());
#else
    (void)pieces, (void)sizes, (void)n;
#endif
    cudaCheck(cudaEventRecord(gradients_reduced, reduce_stream));
}

// main_stream goes on when all that was given to ranks_add is added up
void ranks_wait(void) {
    if (num_ranks > 1) { cudaCheck(cudaStreamWaitEvent(main_stream, gradients_reduced, 0)); }
}

// Puts every rank's part of an array into its place on all: full is num_ranks parts of `bytes` each; part may lie in it
void ranks_gather(void* full, const void* part, size_t bytes) {
#ifdef MULTI_GPU
    ncclCheck(ncclAllGather(part, full, bytes, ncclUint8, nccl_comm, main_stream));
#else
    (void)full, (void)part, (void)bytes;
#endif
}

// values of the host, added up over the ranks in their order, the same on all
void ranks_sum(double* values, int n) {
#ifdef MULTI_GPU
    if (num_ranks == 1) { return; }
    double* all = (double*)malloc(num_ranks * n * sizeof(double));
    require(all != NULL, "out of host memory for %d sums", n);
    mpiCheck(MPI_Allgather(values, n, MPI_DOUBLE, all, n, MPI_DOUBLE, MPI_COMM_WORLD));
    for (int i = 0; i < n; i++) {
        values[i] = 0.0;
        for (int r = 0; r < num_ranks; r++) { values[i] += all[r * n + i]; }
    }
    free(all);
#else
    (void)values, (void)n;
#endif
}

// ends with a sentence unless the value is the same on all ranks
void ranks_agree(uint32_t value, const char* what) {
#ifdef MULTI_GPU
    uint32_t first = value;
    if (num_ranks > 1) { mpiCheck(MPI_Bcast(&first, sizeof(first), MPI_BYTE, 0, MPI_COMM_WORLD)); }
    require(value == first, "the %s of rank %d are not those of rank 0 (%08x, %08x)", what, rank, value, first);
#else
    (void)value, (void)what;
#endif
}
// ---- end shared: several GPUs ----------------------------------------------

// ---- shared: precision -----------------------------------------------------
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

// true when rows of n elements that start at these pointers can be read VEC elements at a time
template <class... Pointers> bool vectorizable(size_t n, Pointers... p) {
    return n % VEC == 0 && ((((uintptr_t)p | ...) % 16) == 0);
}

// Row-wise kernels are templates over V and LANES, the lanes that share a row: so many that each has at least some four packs, for
// a lane alone with its row hides no latency, and lanes without work cost. A row's sums are then one reduction of a group
#define LAUNCH_ROWS(kernel, vector, n, rows, ...) do { \
    if (!(vector)) { kernel<1, 8><<<CEIL_DIV(rows, (size_t)(128 / 8)), 128, 0, main_stream>>>(__VA_ARGS__); } \
    else if ((n) <= 12 * VEC) { kernel<VEC, 2><<<CEIL_DIV(rows, (size_t)(128 / 2)), 128, 0, main_stream>>>(__VA_ARGS__); } \
    else if ((n) <= 32 * VEC) { kernel<VEC, 4><<<CEIL_DIV(rows, (size_t)(128 / 4)), 128, 0, main_stream>>>(__VA_ARGS__); } \
    else { kernel<VEC, 8><<<CEIL_DIV(rows, (size_t)(128 / 8)), 128, 0, main_stream>>>(__VA_ARGS__); } \
    kernelCheck(); } while (0)

// V float registers added up in pairs: four times shorter a chain than one after the other
template <int V> __device__ inline float total(const float* v) {
    if constexpr (V == 1) { return v[0]; }
    else { return total<V / 2>(v) + total<V / 2>(v + V / 2); }
}
// ---- end shared: precision -------------------------------------------------

// ---- shared: random --------------------------------------------------------
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// A counter-based generator: the same (seed, purpose, step, i) gives the same four words everywhere,
// in the trainer as in dev/reference/rng.py
enum { RNG_INIT = 1, RNG_SHUFFLE = 2, RNG_DROPIT = 3, RNG_AUGMENT = 4, RNG_CROP = 5, RNG_RANDAUGMENT = 6, RNG_ERASE = 7, RNG_MIX = 8,
       RNG_DROP_PATH = 9 };

__host__ __device__ inline uint4 philox(unsigned long long seed, unsigned purpose, unsigned step, unsigned long long i) {
    unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
    unsigned c0 = (unsigned)i, c1 = (unsigned)(i >> 32), c2 = step, c3 = purpose;
    for (int round = 0; round < 10; round++) {
        unsigned long long p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        unsigned h0 = (unsigned)(p0 >> 32), h1 = (unsigned)(p1 >> 32);
        c0 = h1 ^ c1 ^ k0;
        c2 = h0 ^ c3 ^ k1;
        c1 = (unsigned)p1;
        c3 = (unsigned)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return make_uint4(c0, c1, c2, c3);
}

// uniform in (0, 1)
double uniform(unsigned u) { return (u + 0.5) / 4294967296.0; }

// normal, by Box and Muller
double normal(uint4 u) { return sqrt(-2.0 * log(uniform(u.x))) * cos(2.0 * M_PI * uniform(u.y)); }

// perm = a permutation of 0..n-1 (Fisher and Yates) that depends on seed and epoch alone
void shuffle(unsigned* perm, unsigned n, unsigned long long seed, unsigned epoch) {
    for (unsigned i = 0; i < n; i++) { perm[i] = i; }
    for (unsigned i = n; i-- > 1; ) {
        uint4 u = philox(seed, RNG_SHUFFLE, epoch, i);
        unsigned j = (unsigned)(((unsigned long long)u.y << 32 | u.x) % (i + 1));
        unsigned swap = perm[i];
        perm[i] = perm[j];
        perm[j] = swap;
    }
}
// ---- end shared: random ----------------------------------------------------

// ---- shared: memory plan ---------------------------------------------------
// Every byte on the device is one line of the plan. The lines are added up before anything is allocated,
// printed by -plan, and then allocated: one cudaMalloc a category, nothing later.
enum { CACHED, SCRATCH, PARAMETERS_MEMORY, GRADIENTS, OPTIMIZER, NUM_CATEGORIES };
static const char* const category_names[NUM_CATEGORIES] = {"cached", "scratch", "parameters", "gradients", "optimizer"};

typedef struct {
    char name[32];
    const char* shape;  // as written in the table, e.g. "(B, T, C)"
    int category;
    size_t bytes;       // what is allocated
    size_t dense_bytes; // what the tensor takes without DropIT and recomputation; 0: not counted
    void** pointer;
} Allocation;

#define MAX_ALLOCATIONS 160
typedef struct {
    Allocation list[MAX_ALLOCATIONS];
    int n;
    size_t bytes[NUM_CATEGORIES];
} Plan;

#define ALIGNMENT 256
size_t align_up(size_t bytes) { return CEIL_DIV(bytes, (size_t)ALIGNMENT) * ALIGNMENT; }

// numel (L, 3*C, C) -> L * 3*C * C in size_t: such products overflow an int at batch sizes in use
template <class... Dims> size_t numel(Dims... dims) { return ((size_t)1 * ... * (size_t)dims); }

template <class T> void plan_add(Plan* plan, int category, const char* name, const char* part, const char* shape,
                                 T** pointer, size_t bytes, size_t dense_bytes) {
    assert(plan->n < MAX_ALLOCATIONS);
    Allocation* a = &plan->list[plan->n++];
    snprintf(a->name, sizeof(a->name), "%s%s", name, part);
    a->shape = shape;
    a->category = category;
    a->bytes = align_up(bytes);
    a->dense_bytes = dense_bytes;
    a->pointer = (void**)pointer;
    plan->bytes[category] += a->bytes;
}

size_t plan_total(const Plan* plan) {
    size_t total = 0;
    for (int c = 0; c < NUM_CATEGORIES; c++) { total += plan->bytes[c]; }
    return total;
}

// sets every pointer of the plan; the caller has made sure that plan_total() bytes are free
void plan_allocate(Plan* plan, char* blocks[NUM_CATEGORIES]) {
    for (int c = 0; c < NUM_CATEGORIES; c++) {
        blocks[c] = NULL;
        if (plan->bytes[c] == 0) { continue; }
        cudaCheck(cudaMalloc((void**)&blocks[c], plan->bytes[c]));
        char* p = blocks[c];
        for (int i = 0; i < plan->n; i++) {
            if (plan->list[i].category != c) { continue; }
            *plan->list[i].pointer = plan->list[i].bytes > 0 ? p : NULL; // an unused tensor faults, not aliases
            p += plan->list[i].bytes;
        }
    }
}

void plan_print(const Plan* plan) {
    const double MiB = 1048576.0;
    printf("| %-22s | %-10s | %-22s | %10s | %10s |\n", "tensor", "memory", "shape", "dense MiB", "kept MiB");
    for (int i = 0; i < plan->n; i++) {
        const Allocation* a = &plan->list[i];
        printf("| %-22s | %-10s | %-22s | %10.2f | %10.2f |\n", a->name, category_names[a->category], a->shape,
               a->dense_bytes / MiB, a->bytes / MiB);
    }
    for (int c = 0; c < NUM_CATEGORIES; c++) {
        size_t dense = 0;
        for (int i = 0; i < plan->n; i++) { if (plan->list[i].category == c) { dense += plan->list[i].dense_bytes; } }
        printf("| %-22s | %-10s | %-22s | %10.2f | %10.2f |\n", "all", category_names[c], "", dense / MiB, plan->bytes[c] / MiB);
    }
}
// ---- end shared: memory plan -----------------------------------------------

// ---- shared: files ---------------------------------------------------------
// Everything that a file claims is checked against its size before it is used.

// CRC-32 of zlib and PNG (polynomial 0xEDB88320), eight bytes a step by eight tables
uint32_t crc_32(uint32_t crc, const void* data, size_t n) {
    static uint32_t table[8][256];
    if (table[0][1] == 0) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int k = 0; k < 8; k++) { c = c & 1 ? 0xEDB88320u ^ (c >> 1) : c >> 1; }
            table[0][i] = c;
        }
        for (int t = 1; t < 8; t++) {
            for (int i = 0; i < 256; i++) { table[t][i] = table[0][table[t-1][i] & 255] ^ (table[t-1][i] >> 8); }
        }
    }
    const uint8_t* p = (const uint8_t*)data;
    crc = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t x;
        memcpy(&x, p, 8);
        x ^= crc;
        crc = 0;
        for (int t = 0; t < 8; t++) { crc ^= table[7-t][x >> (8 * t) & 255]; }
    }
    for (; n > 0; n--, p++) { crc = table[0][(crc ^ *p) & 255] ^ (crc >> 8); }
    return ~crc;
}

typedef struct {
    const char* path;
    const uint8_t* data;
    size_t bytes;
} MappedFile;

// maps a whole file; hint says what to do when it is not there
MappedFile map_file(const char* path, const char* hint) {
    MappedFile file = {path, NULL, 0};
    int fd = open(path, O_RDONLY);
    require(fd >= 0, "cannot open %s: %m; %s", path, hint);
    struct stat info;
    require(fstat(fd, &info) == 0 && S_ISREG(info.st_mode), "%s is not a regular file; %s", path, hint);
    file.bytes = (size_t)info.st_size;
    require(file.bytes > 0, "%s is empty; %s", path, hint);
    void* data = mmap(NULL, file.bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    require(data != MAP_FAILED, "cannot map %s (%zu bytes): %m", path, file.bytes);
    close(fd);
    file.data = (const uint8_t*)data;
    return file;
}

void unmap_file(MappedFile* file) {
    munmap((void*)file->data, file->bytes);
    file->data = NULL;
}

// safetensors: u64 header length, a JSON object {name: {dtype, shape, data_offsets}, "__metadata__": {string: string}},
// then the tensors. The reader takes what the format allows and refuses the rest: unknown fields, duplicate names,
// and data that overlap, leave holes or do not end with the file. What we write has crc32 in its metadata, of the whole file with these
// eight digits as zeros; the reader compares it where it is there
typedef struct {
    char name[96], dtype[8];
    size_t shape[8], begin, end;
    int dims;
} StTensor;

typedef struct {
    char key[64], value[160];
} StMetadata;

typedef struct {
    MappedFile file;
    StTensor* tensors;
    int num_tensors;
    StMetadata metadata[64];
    int num_metadata;
    size_t data_offset;
    size_t at, header_end; // the parser's position
} Safetensors;

void st_fail(const Safetensors* st, const char* what) {
    require(false, "%s is not a valid safetensors file: %s near byte %zu; write it again", st->file.path, what, st->at);
}

void st_space(Safetensors* st) {
    while (st->at < st->header_end && strchr(" \t\r\n", st->file.data[st->at]) && st->file.data[st->at] != 0) { st->at++; }
}

// skips white space and takes c if it comes next
bool st_take(Safetensors* st, char c) {
    st_space(st);
    if (st->at >= st->header_end || st->file.data[st->at] != (uint8_t)c) { return false; }
    st->at++;
    return true;
}

void st_expect(Safetensors* st, char c) {
    char what[32];
    snprintf(what, sizeof(what), "expected '%c'", c);
    if (!st_take(st, c)) { st_fail(st, what); }
}

void st_string(Safetensors* st, char* out, size_t size) {
    st_expect(st, '"');
    size_t n = 0;
    while (st->at < st->header_end && st->file.data[st->at] != '"') {
        char c = (char)st->file.data[st->at++];
        if (c == '\\') { // names of tensors need no \u escapes; the simple ones stand for themselves
            if (st->at >= st->header_end || !strchr("\"\\/", st->file.data[st->at])) { st_fail(st, "unsupported escape"); }
            c = (char)st->file.data[st->at++];
        }
        if ((uint8_t)c < 32) { st_fail(st, "control character in a string"); }
        if (n + 1 >= size) { st_fail(st, "string too long"); }
        out[n++] = c;
    }
    out[n] = 0;
    st_expect(st, '"');
}

size_t st_number(Safetensors* st) {
    st_space(st);
    size_t v = 0, start = st->at;
    while (st->at < st->header_end && st->file.data[st->at] >= '0' && st->file.data[st->at] <= '9') {
        size_t digit = st->file.data[st->at++] - '0';
        if (v > (SIZE_MAX - digit) / 10) { st_fail(st, "number too large"); }
        v = v * 10 + digit;
    }
    if (st->at == start) { st_fail(st, "expected a number"); }
    return v;
}

void st_tensor(Safetensors* st, StTensor* t) {
    bool have_dtype = false, have_shape = false, have_offsets = false;
    st_expect(st, '{');
    do {
        char key[24];
        st_string(st, key, sizeof(key));
        st_expect(st, ':');
        if (strcmp(key, "dtype") == 0) {
            st_string(st, t->dtype, sizeof(t->dtype));
            have_dtype = true;
        } else if (strcmp(key, "shape") == 0) {
            st_expect(st, '[');
            t->dims = 0;
            if (!st_take(st, ']')) {
                do {
                    if (t->dims == 8) { st_fail(st, "more than 8 dims"); }
                    t->shape[t->dims++] = st_number(st);
                } while (st_take(st, ','));
                st_expect(st, ']');
            }
            have_shape = true;
        } else if (strcmp(key, "data_offsets") == 0) {
            st_expect(st, '[');
            t->begin = st_number(st);
            st_expect(st, ',');
            t->end = st_number(st);
            st_expect(st, ']');
            have_offsets = true;
        } else {
            st_fail(st, "unknown field of a tensor");
        }
    } while (st_take(st, ','));
    st_expect(st, '}');
    if (!have_dtype || !have_shape || !have_offsets) { st_fail(st, "a tensor lacks dtype, shape or data_offsets"); }
}

// CRC-32 of a file whose eight bytes at `digits` count as zeros in text
uint32_t crc_without_digits(const MappedFile* file, size_t digits) {
    const uint32_t crc = crc_32(crc_32(0, file->data, digits), "00000000", 8);
    return crc_32(crc, file->data + digits + 8, file->bytes - digits - 8);
}

// the digits end one byte before the parser's position
void st_check_crc(Safetensors* st, const char* digits) {
    char actual[9];
    if (strlen(digits) != 8 || memcmp(st->file.data + st->at - 9, digits, 8) != 0) { st_fail(st, "crc32 is not of eight digits"); }
    snprintf(actual, sizeof(actual), "%08x", crc_without_digits(&st->file, st->at - 9));
    require(strcmp(actual, digits) == 0, "%s has the checksum %s, its header says %s: it is damaged; take another copy", st->file.path, actual, digits);
}

size_t st_numel(const StTensor* t) {
    size_t n = 1;
    for (int i = 0; i < t->dims; i++) {
        if (t->shape[i] != 0 && n > SIZE_MAX / t->shape[i]) { return SIZE_MAX; }
        n *= t->shape[i];
    }
    return n;
}

int st_by_offset(const void* a, const void* b) {
    const StTensor* x = (const StTensor*)a;
    const StTensor* y = (const StTensor*)b;
    if (x->begin != y->begin) { return x->begin < y->begin ? -1 : 1; }
    return x->end < y->end ? -1 : x->end > y->end;
}

// NULL: there is no such entry
const char* safetensors_metadata(const Safetensors* st, const char* key) {
    for (int i = 0; i < st->num_metadata; i++) {
        if (strcmp(st->metadata[i].key, key) == 0) { return st->metadata[i].value; }
    }
    return NULL;
}

Safetensors* safetensors_open(const char* path) {
    Safetensors* st = (Safetensors*)calloc(1, sizeof(Safetensors));
    st->file = map_file(path, "give the path of a .safetensors file");
    uint64_t length = 0;
    require(st->file.bytes >= 8, "%s has %zu bytes, too few for a safetensors file", path, st->file.bytes);
    memcpy(&length, st->file.data, 8);
    require(length <= st->file.bytes - 8 && length <= 100000000, "%s: the safetensors header claims %llu bytes, the file has %zu; "
            "it is truncated or of another format", path, (unsigned long long)length, st->file.bytes);
    st->at = 8;
    st->header_end = st->data_offset = 8 + (size_t)length;
    int capacity = 0;
    st_expect(st, '{');
    if (!st_take(st, '}')) {
        do {
            if (st->num_tensors == capacity) {
                capacity = capacity ? 2 * capacity : 64;
                st->tensors = (StTensor*)realloc(st->tensors, capacity * sizeof(StTensor));
                require(st->tensors != NULL, "out of host memory for the tensor list of %s", path);
            }
            StTensor* t = &st->tensors[st->num_tensors];
            memset(t, 0, sizeof(*t));
            st_string(st, t->name, sizeof(t->name));
            st_expect(st, ':');
            if (strcmp(t->name, "__metadata__") == 0) {
                st_expect(st, '{');
                if (!st_take(st, '}')) {
                    do {
                        if (st->num_metadata == 64) { st_fail(st, "more than 64 metadata entries"); }
                        StMetadata* m = &st->metadata[st->num_metadata++];
                        st_string(st, m->key, sizeof(m->key));
                        st_expect(st, ':');
                        st_string(st, m->value, sizeof(m->value));
                        if (strcmp(m->key, "crc32") == 0) { st_check_crc(st, m->value); }
                    } while (st_take(st, ','));
                    st_expect(st, '}');
                }
            } else {
                st_tensor(st, t);
                st->num_tensors++;
            }
        } while (st_take(st, ','));
        st_expect(st, '}');
    }
    st_space(st);
    if (st->at != st->header_end) { st_fail(st, "text after the header"); }
    require(safetensors_metadata(st, "crc32") != NULL || safetensors_metadata(st, "run") == NULL, "%s is of a checkpoint, but its checksum is gone: "
            "it is damaged; take another copy", path);
    // in order of their offsets the tensors must follow one another from the first byte to the last
    if (st->num_tensors > 0) { qsort(st->tensors, st->num_tensors, sizeof(StTensor), st_by_offset); }
    size_t end = 0, bytes = st->file.bytes - st->data_offset;
    for (int i = 0; i < st->num_tensors; i++) {
        const StTensor* t = &st->tensors[i];
        size_t size = strcmp(t->dtype, "F64") == 0 || strcmp(t->dtype, "I64") == 0 ? 8
                    : strcmp(t->dtype, "F32") == 0 || strcmp(t->dtype, "I32") == 0 ? 4
                    : strcmp(t->dtype, "F16") == 0 || strcmp(t->dtype, "BF16") == 0 ? 2
                    : strcmp(t->dtype, "U8") == 0 || strcmp(t->dtype, "I8") == 0 || strcmp(t->dtype, "BOOL") == 0 ? 1 : 0;
        require(size > 0, "%s: tensor %s has the unknown type %s", path, t->name, t->dtype);
        size_t n = st_numel(t);
        require(t->begin == end && t->end >= t->begin && t->end <= bytes && n <= bytes / size && t->end - t->begin == n * size,
                "%s: tensor %s claims bytes %zu to %zu of %zu, expected %zu bytes from %zu (offsets overlap, leave a hole or lie outside); "
                "write the file again", path, t->name, t->begin, t->end, bytes, n * size, end);
        end = t->end;
        for (int j = 0; j < i; j++) {
            require(strcmp(st->tensors[j].name, t->name) != 0, "%s: tensor %s appears twice", path, t->name);
        }
    }
    require(end == bytes, "%s: its tensors end at byte %zu, its data at %zu; write the file again", path, end, bytes);
    return st;
}

void safetensors_close(Safetensors* st) {
    unmap_file(&st->file);
    free(st->tensors);
    free(st);
}

const StTensor* safetensors_find(const Safetensors* st, const char* name) {
    for (int i = 0; i < st->num_tensors; i++) {
        if (strcmp(st->tensors[i].name, name) == 0) { return &st->tensors[i]; }
    }
    return NULL;
}

const void* safetensors_data(const Safetensors* st, const StTensor* t) {
    return st->file.data + st->data_offset + t->begin;
}

// Writes a file so that `path` is whole or as it was before, whatever happens: to a temporary name, synced, renamed
void write_file(const char* path, const void* const* parts, const size_t* bytes, int num_parts) {
    char temporary[4200], directory[4200];
    snprintf(temporary, sizeof(temporary), "%s.tmp", path);
    snprintf(directory, sizeof(directory), "%s", path);
    char* slash = strrchr(directory, '/');
    if (slash != NULL) { slash[1] = 0; } else { strcpy(directory, "."); }
    const int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    bool written = fd >= 0;
    for (int i = 0; written && i < num_parts; i++) {
        for (size_t at = 0; written && at < bytes[i]; ) {
            const ssize_t n = write(fd, (const char*)parts[i] + at, bytes[i] - at);
            if (n > 0) { at += (size_t)n; } else if (n == 0 || errno != EINTR) { written = false; }
        }
    }
    written = written && fsync(fd) == 0 && close(fd) == 0 && rename(temporary, path) == 0;
    if (!written) {
        const int reason = errno;
        unlink(temporary);
        errno = reason;
        require(false, "cannot write %s: %m; what was written before is whole. Make room or choose another -o", path);
    }
    const int dir = open(directory, O_RDONLY);
    if (dir >= 0) { // without it a rename may be lost when the machine loses its power
        fsync(dir);
        close(dir);
    }
}

#define ST_BEFORE_DIGITS "{\"__metadata__\":{\"crc32\":\"" // how the headers that we write begin

// writes n float32 tensors (name, shape and dims are read) with their data; metadata, and crc32 of it all
void safetensors_write(const char* path, const StMetadata* metadata, int num_metadata, const StTensor* tensors, const float* const* data, int n) {
    char* header = NULL;
    size_t length = 0, offset = 0;
    FILE* f = open_memstream(&header, &length);
    const void** parts = (const void**)malloc((n + 2) * sizeof(void*));
    size_t* bytes = (size_t*)malloc((n + 2) * sizeof(size_t));
    require(f != NULL && parts != NULL && bytes != NULL, "out of host memory for the header of %s", path);
    fprintf(f, ST_BEFORE_DIGITS "00000000\"");
    for (int i = 0; i < num_metadata; i++) { fprintf(f, ",\"%s\":\"%s\"", metadata[i].key, metadata[i].value); }
    fprintf(f, "}");
    for (int i = 0; i < n; i++) {
        bytes[i+2] = st_numel(&tensors[i]) * sizeof(float);
        parts[i+2] = data[i];
        fprintf(f, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[", tensors[i].name);
        for (int d = 0; d < tensors[i].dims; d++) { fprintf(f, "%s%zu", d > 0 ? "," : "", tensors[i].shape[d]); }
        fprintf(f, "],\"data_offsets\":[%zu,%zu]}", offset, offset + bytes[i+2]);
        offset += bytes[i+2];
    }
    fprintf(f, "}");
    while (ftell(f) % 8 != 0) { fputc(' ', f); } // tensors begin 8 bytes aligned
    fclose(f);
    const uint64_t length64 = length;
    parts[0] = &length64;
    bytes[0] = sizeof(length64);
    parts[1] = header;
    bytes[1] = length;
    uint32_t crc = 0;
    for (int i = 0; i < n + 2; i++) { crc = crc_32(crc, parts[i], bytes[i]); }
    char digits[9];
    snprintf(digits, sizeof(digits), "%08x", crc);
    memcpy(header + strlen(ST_BEFORE_DIGITS), digits, 8);
    write_file(path, parts, bytes, n + 2);
    free(header);
    free(parts);
    free(bytes);
}

// Data shard, version 1; data/README.md has the byte table. One format for classification and detection
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

typedef struct {
    MappedFile file;
    const ShardHeader* header;
    const ShardEntry* entries;
} Shard;

Shard shard_open(const char* path) {
    const char* hint = "run `make data` or a script in data/ to write it again";
    Shard shard;
    shard.file = map_file(path, hint);
    const ShardHeader* h = (const ShardHeader*)shard.file.data;
    const size_t bytes = shard.file.bytes;
    require(bytes >= sizeof(ShardHeader), "%s has %zu bytes, a shard has a header of %zu; %s", path, bytes, sizeof(ShardHeader), hint);
    require(memcmp(h->magic, "DROPIT\r\n", 8) == 0, "%s does not begin with a shard's magic DROPIT; %s", path, hint);
    require(h->version == 1, "%s is of shard version %u, this program reads version 1; %s", path, h->version, hint);
    require(h->header_bytes == sizeof(ShardHeader) && h->index_offset == sizeof(ShardHeader), "%s: header of %u bytes, index at %llu, "
            "expected %zu and %zu; %s", path, h->header_bytes, (unsigned long long)h->index_offset, sizeof(ShardHeader), sizeof(ShardHeader), hint);
    require(h->file_bytes == bytes, "%s has %zu bytes, its header says %llu: it is truncated or damaged; %s", path, bytes,
            (unsigned long long)h->file_bytes, hint);
    require(h->images > 0 && h->images <= (bytes - sizeof(ShardHeader)) / sizeof(ShardEntry), "%s claims %u images, too %s for its %zu bytes; %s",
            path, h->images, h->images ? "many" : "few", bytes, hint);
    const size_t index_end = sizeof(ShardHeader) + h->images * sizeof(ShardEntry);
    require(h->data_offset == index_end, "%s: data at byte %llu, expected %zu; %s", path, (unsigned long long)h->data_offset, index_end, hint);
    uint32_t crc = crc_32(0, h, offsetof(ShardHeader, crc));
    crc = crc_32(crc, shard.file.data + sizeof(ShardHeader), index_end - sizeof(ShardHeader));
    require(crc == h->crc, "%s: checksum of header and index is %08x, expected %08x: it is damaged; %s", path, crc, h->crc, hint);
    require(h->channels >= 1 && h->channels <= 4 && h->classes > 0 && h->task <= 1, "%s: %u channels, %u classes, task %u; expected 1 to 4, "
            "at least 1, 0 or 1; %s", path, h->channels, h->classes, h->task, hint);
    for (uint32_t c = 0; c < h->channels; c++) {
        require(isfinite(h->mean[c]) && isfinite(h->std[c]) && h->std[c] > 0, "%s: channel %u has mean %g and standard deviation %g; %s",
                path, c, h->mean[c], h->std[c], hint);
    }
    shard.header = h;
    shard.entries = (const ShardEntry*)(shard.file.data + sizeof(ShardHeader));
    uint64_t end = h->data_offset;
    for (uint32_t i = 0; i < h->images; i++) {
        const ShardEntry* e = &shard.entries[i];
        require(e->height > 0 && e->height <= 65535 && e->width > 0 && e->width <= 65535, "%s: image %u is %u x %u; %s", path, i, e->height, e->width, hint);
        uint64_t record = (uint64_t)e->height * e->width * h->channels + e->annotation_bytes;
        require(e->offset == end && record <= bytes - end, "%s: record %u lies at %llu with %llu bytes, expected at %llu within %zu; %s", path, i,
                (unsigned long long)e->offset, (unsigned long long)record, (unsigned long long)end, bytes, hint);
        require(h->task != 0 || (e->label >= 0 && (uint32_t)e->label < h->classes), "%s: image %u has label %d, expected 0 to %u; %s",
                path, i, e->label, h->classes - 1, hint);
        crc = crc_32(0, shard.file.data + e->offset, record);
        require(crc == e->crc, "%s: checksum of image %u is %08x, expected %08x: it is damaged; %s", path, i, crc, e->crc, hint);
        end += record;
    }
    require(end == bytes, "%s: records end at byte %llu, the file at %zu; %s", path, (unsigned long long)end, bytes, hint);
    return shard;
}
// ---- end shared: files -----------------------------------------------------

// ---- shared: checkpoints ---------------------------------------------------
// A checkpoint in a directory is model_00000020.safetensors, state_00000020_00000.safetensors (one a rank) and, last, DONE_00000020:
// killed at any moment, a program leaves the last whole one
void checkpoint_path(char* path, size_t size, const char* directory, const char* kind, int step) {
    if (strcmp(kind, "DONE") == 0) { snprintf(path, size, "%s/DONE_%08d", directory, step); }
    else if (strcmp(kind, "state") == 0) { snprintf(path, size, "%s/state_%08d_%05d.safetensors", directory, step, 0); }
    else { snprintf(path, size, "%s/model_%08d.safetensors", directory, step); }
}

// whether the file is there and its crc32, which it must have, is right
bool checkpoint_file_whole(const char* path) {
    const int fd = open(path, O_RDONLY);
    struct stat info;
    if (fd < 0) { return false; }
    MappedFile file = {path, NULL, 0};
    bool whole = false;
    if (fstat(fd, &info) == 0 && info.st_size > 64) {
        file.bytes = (size_t)info.st_size;
        file.data = (const uint8_t*)mmap(NULL, file.bytes, PROT_READ, MAP_PRIVATE, fd, 0);
        const size_t digits = 8 + strlen(ST_BEFORE_DIGITS);
        char actual[9];
        if (file.data != MAP_FAILED && memcmp(file.data + 8, ST_BEFORE_DIGITS, strlen(ST_BEFORE_DIGITS)) == 0) {
            snprintf(actual, sizeof(actual), "%08x", crc_without_digits(&file, digits));
            whole = memcmp(actual, file.data + digits, 8) == 0;
        }
        if (file.data != MAP_FAILED) { unmap_file(&file); }
    }
    close(fd);
    return whole;
}

// the largest step below `below` with a DONE file; -1: none
int checkpoint_newest(const char* directory, int below) {
    int newest = -1, step, end;
    DIR* d = opendir(directory);
    for (struct dirent* e; d != NULL && (e = readdir(d)) != NULL; ) {
        if (sscanf(e->d_name, "DONE_%8d%n", &step, &end) == 1 && e->d_name[end] == 0 && step < below && step > newest) { newest = step; }
    }
    if (d != NULL) { closedir(d); }
    return newest;
}

// The step of the newest checkpoint whose files are whole; -1: there is no checkpoint. Names those that are damaged
int checkpoint_find(const char* directory) {
    char model[4200], state[4200];
    bool damaged = false;
    for (int step = INT_MAX; (step = checkpoint_newest(directory, step)) >= 0; damaged = true) {
        checkpoint_path(model, sizeof(model), directory, "model", step);
        checkpoint_path(state, sizeof(state), directory, "state", step);
        if (checkpoint_file_whole(model) && checkpoint_file_whole(state)) { return step; }
        fprintf(stderr, "warning: the checkpoint of step %d in %s is damaged; an older one is tried\n", step, directory);
    }
    require(!damaged, "no checkpoint in %s is whole; start anew with another -o", directory);
    return -1;
}

// marks the checkpoint as whole, then removes all but the newest `keep` (0: keeps all)
void checkpoint_done(const char* directory, int step, int keep) {
    char path[4200];
    checkpoint_path(path, sizeof(path), directory, "DONE", step);
    write_file(path, NULL, NULL, 0);
    int old = INT_MAX;
    for (int i = 0; keep > 0 && (old = checkpoint_newest(directory, old)) >= 0; i++) {
        if (i < keep) { continue; }
        const char* const kinds[] = {"DONE", "model", "state"}; // DONE first: what is half removed is no checkpoint
        for (int k = 0; k < 3; k++) {
            checkpoint_path(path, sizeof(path), directory, kinds[k], old);
            unlink(path);
        }
    }
}

// cuts main.log behind its last line of a step up to `step`: what follows happened after the checkpoint, or was cut short
void log_cut(FILE* log, int step) {
    char line[512];
    int s;
    long end = 0;
    rewind(log);
    while (fgets(line, sizeof(line), log) != NULL && sscanf(line, "s:%d ", &s) == 1 && s <= step && strchr(line, '\n') != NULL) { end = ftell(log); }
    require(ftruncate(fileno(log), end) == 0 && fseek(log, end, SEEK_SET) == 0, "cannot cut main.log back to step %d: %m", step);
}
// ---- end shared: checkpoints -----------------------------------------------

// ---- shared: DropIT --------------------------------------------------------
// Which elements of a cached tensor x of n elements are kept, and how they are stored.
//
// Every element has a 32-bit key. mink and fastmink: the bits of |x|, so that keys compare as magnitudes do.
// random: a hash of the element's index. Kept are the k elements with the largest keys, over the whole tensor
// (mink) or over every tile of 16,384 consecutive elements (fastmink, random); of equal keys those with the
// lowest indices. So an element is kept when
//     key > threshold.key || (key == threshold.key && index < threshold.tie_end)
// and 8 bytes a tensor (or tile) say it all. They are found by radix histograms of 11 bits of the key at a time.
// For a whole tensor, not of all of its keys: a sample of 16,384 elements says between which keys the threshold lies with
// near certainty; one read of x counts the elements above and lists the few between, and the histograms run over that
// list, of the bits in which its keys differ. Where the sample errs, or so many keys are equal that the list overflows,
// they run over x: the choice is always exact. Atomics add integers only, and no sum depends on the list's order: the
// choice is a function of the values alone.
//
// Storage: a bitmap (bit i%32 of word i/32), the kept values in index order, and for every 256 elements the number
// of values before them. A tensor that the backward pass recomputes stores its threshold only, and is masked by it.
enum { MINK, FASTMINK, RANDOM };

#define DROPIT_TILE 16384
#define DROPIT_THREADS 64 // of every kernel below that works on tiles
#define DROPIT_DIGIT 11 // bits
#define DROPIT_BINS (1 << DROPIT_DIGIT)
#define TILE_WORDS (DROPIT_TILE / 32)
#define THREAD_WORDS (TILE_WORDS / DROPIT_THREADS) // words of 32 elements that a thread handles, one after the other
#define DROPIT_SEGMENT (32 * THREAD_WORDS)         // so many elements, then: 256
#define KEY_ZEROS (33 - 8 * (int)sizeof(floatX))   // the lowest bits of a magnitude's key are zero: the sign's place, and what bf16 lacks

typedef struct {
    unsigned key, tie_end;
} Threshold;

// Search for the threshold, digit by digit of 11 bits (the last may have fewer). Keys count from `low`, so as digits of key - low
typedef struct {
    unsigned low;
    int bits;           // digits not yet known, in bits
    unsigned prefix;    // the digits known
    unsigned remaining; // how many elements with this prefix are kept
} Search;

// of a whole tensor
typedef struct {
    Search search;
    unsigned candidates; // elements whose keys lie in the sampled range, listed as far as there is room
    unsigned listed;     // all of them if the histograms run over the list, 0 if they run over x
} TensorSearch;

// one tensor as DropIT keeps it
typedef struct {
    size_t n, k;
    Threshold* thresholds; // (1) or, for fastmink and random, (tiles)
    unsigned* offsets;     // (segments) values before each; NULL: recomputed tensor, thresholds only
    unsigned* bitmap;      // (words)
    floatX* values;        // (k + 1): unpacking may read one past the last
} Dropped;

// what the kernels need to know of the strategy
typedef struct {
    int strategy;
    unsigned long long seed; // random: differs between tensors
    unsigned step;
} DropRule;

// Scratch of the selections that run in the same launches, as those of a block's four linears do: their kernels are small, and each waits
// for the one before. tiles, list: of all of them
#define MAX_SELECTIONS 4
typedef struct {
    TensorSearch* search;   // (MAX_SELECTIONS)
    unsigned* histogram;    // (MAX_SELECTIONS, DROPIT_BINS)
    uint2* tile_counts;     // (tiles) elements above the threshold, elements equal to it
    unsigned* tile_offsets; // (tiles) kept elements before each
    floatX* sample;         // (MAX_SELECTIONS, DROPIT_TILE)
    unsigned* range;        // (MAX_SELECTIONS, 2) keys between which the threshold lies, the higher first
    floatX* list_values;    // (list)
    unsigned* list_indices; // (list)
    unsigned* not_finite;   // (1) NaNs and Infs met by selections since it was last cleared
} DropScratch;

// one tensor of a launch: what is chosen from, where the choice goes, and its part of the scratch
typedef struct {
    const floatX* x;
    Dropped d;
    DropRule rule;
    unsigned k_tile, k_last;      // fastmink and random: kept of each tile, of the last one where it is shorter
    unsigned first_tile, tiles;   // its blocks in a launch with one a tile
    unsigned rank_high, rank_low; // of the sample's keys, between which the threshold lies. rank_high 0: no key is above the range
    bool low_is_zero;             // no key is below it
    size_t list_capacity;
    DropScratch s;
} Selection;

typedef struct {
    Selection of[MAX_SELECTIONS];
} Selections;

size_t dropit_tiles(size_t n) { return CEIL_DIV(n, (size_t)DROPIT_TILE); }
size_t dropit_segments(size_t n) { return CEIL_DIV(n, (size_t)DROPIT_SEGMENT); }
size_t dropit_list_capacity(size_t n) { return n / 20 + DROPIT_TILE; }
size_t dropit_words(size_t n) { return dropit_segments(n) * THREAD_WORDS; }

// in double, as the published int(numel * (1 - gamma)): in float, gamma 0.9 and n 1000 give 100, not 99
size_t dropit_keep(size_t n, double gamma) { return (size_t)((double)n * (1.0 - gamma)); }

// k of a whole tensor
size_t dropit_k(size_t n, double gamma, int strategy) {
    if (strategy == MINK) { return dropit_keep(n, gamma); }
    return n / DROPIT_TILE * dropit_keep(DROPIT_TILE, gamma) + dropit_keep(n % DROPIT_TILE, gamma);
}

__device__ inline unsigned magnitude_key(float x) { return __float_as_uint(x) << 1; }
__device__ inline unsigned magnitude_key(__nv_bfloat16 x) { return (unsigned)__bfloat16_as_ushort(x) << 17; }
#define INFINITY_KEY 0xff000000u // of Inf; NaNs are above it

// of element i of x
template <bool HASHED> __device__ inline unsigned drop_key(floatX x, size_t i, DropRule rule) {
    if constexpr (HASHED) { return philox(rule.seed, RNG_DROPIT, rule.step, i).x; }
    else { return magnitude_key(x); }
}

// Words: 32 consecutive elements, and masks of 32 bits with bit j for element j. Loops over words have a constant length: in
// registers on a GPU, vectors on a CPU. A word that reaches beyond the n elements of x is filled up with zeros

// reads elements i .. i+31 of x, i a multiple of 32; returns the mask of those below n
template <class T> __device__ inline unsigned load_word(T* v, const T* x, size_t i, size_t n) {
    if (i + 32 <= n) {
        for (int q = 0; q < 32; q += VEC) { *(Pack<VEC, T>*)(v + q) = *(const Pack<VEC, T>*)(x + i + q); }
        return ~0u;
    }
    for (int j = 0; j < 32; j++) { v[j] = i + j < n ? x[i + j] : (T)0.0f; }
    return i < n ? (1u << (n - i)) - 1 : 0;
}

// magnitude_key of each: two of bf16 at a time, as they lie in a register
__device__ inline void magnitude_keys(unsigned* keys, const float* v) {
    for (int j = 0; j < 32; j++) { keys[j] = magnitude_key(v[j]); }
}
__device__ inline void magnitude_keys(unsigned* keys, const __nv_bfloat16* v) {
    for (int j = 0; j < 32; j += 2) {
        unsigned two;
        memcpy(&two, (const void*)(v + j), sizeof(two));
        keys[j] = two << 17;
        keys[j+1] = two >> 16 << 17;
    }
}

template <bool HASHED> __device__ inline void word_keys(unsigned* keys, const floatX* v, size_t i, DropRule rule) {
    if constexpr (HASHED) {
        for (int j = 0; j < 32; j++) { keys[j] = drop_key<true>(v[j], i + j, rule); }
    } else {
        magnitude_keys(keys, v);
    }
}

__device__ inline unsigned above_mask(const unsigned* keys, unsigned key) {
    unsigned mask = 0;
    for (int j = 0; j < 32; j++) { mask |= keys[j] > key ? 1u << j : 0u; }
    return mask;
}

__device__ inline unsigned count_above(const unsigned* keys, unsigned key) {
    unsigned count = 0;
    for (int j = 0; j < 32; j++) { count += keys[j] > key; }
    return count;
}

// elements whose key without its lowest `shift` bits is `prefix`
__device__ inline unsigned equal_mask(const unsigned* keys, unsigned prefix, int shift) {
    unsigned mask = 0;
    for (int j = 0; j < 32; j++) { mask |= keys[j] >> shift == prefix ? 1u << j : 0u; }
    return mask;
}

// elements whose key is low, high or between
__device__ inline unsigned between_mask(const unsigned* keys, unsigned low, unsigned high) {
    unsigned mask = 0;
    for (int j = 0; j < 32; j++) { mask |= keys[j] - low <= high - low ? 1u << j : 0u; }
    return mask;
}

// the elements i .. i+31 that are kept
__device__ inline unsigned kept_mask(const unsigned* keys, size_t i, Threshold t) {
    const unsigned ties = i + 32 <= t.tie_end ? ~0u : i < t.tie_end ? (1u << (t.tie_end - i)) - 1 : 0;
    return above_mask(keys, t.key) | (equal_mask(keys, t.key, 0) & ties);
}

// sum of v over the threads of the block before this one; *sum is that over all of them.
// warp_sums: 32 words of shared memory, which the caller may use again after a barrier
template <class T> __device__ inline T block_exclusive_sum(T v, T* warp_sums, T* sum) {
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    T before = cg::exclusive_scan(warp, v, cg::plus<T>());
    if (warp.thread_rank() == 31) { warp_sums[threadIdx.x / 32] = before + v; }
    __syncthreads();
    T all = 0;
    for (unsigned w = 0; w < blockDim.x / 32; w++) {
        if (w == threadIdx.x / 32) { before += all; }
        all += warp_sums[w];
    }
    *sum = all;
    return before;
}

__device__ inline int digit_bits(const Search* s) { return min(s->bits, DROPIT_DIGIT); }
__device__ inline unsigned search_key(const Search* s) { return s->low + (s->prefix << s->bits); }

// One digit of the search. histogram (2^11) counts, by their next digit, the elements that share the prefix; the
// search moves to the largest digit d with at least `remaining` elements at or above it. All threads of the block call.
// remaining == 0 keeps nothing: all digits are ones, and no key lies above
__device__ inline void search_digit(Search* search, const unsigned* histogram, unsigned* warp_sums) {
    const Search s = *search;
    const int bits = digit_bits(&s), per_thread = DROPIT_BINS / blockDim.x;
    const int first = DROPIT_BINS - 1 - (int)threadIdx.x * per_thread; // from the largest digit down
    unsigned mine = 0, sum;
    for (int j = 0; j < per_thread; j++) { mine += histogram[first - j]; }
    unsigned above = block_exclusive_sum(mine, warp_sums, &sum);
    if (s.remaining == 0) {
        if (threadIdx.x == 0) { *search = {s.low, s.bits - bits, s.prefix << bits | ((1u << bits) - 1), 0}; }
    } else if (above < s.remaining && s.remaining <= above + mine) {
        int d = first;
        while (above + histogram[d] < s.remaining) { above += histogram[d--]; }
        *search = {s.low, s.bits - bits, s.prefix << bits | (unsigned)d, s.remaining - above};
    }
    __syncthreads();
}

// index after the rank-th (from 1) element with this key among x[begin .. begin + tile), found by the whole block
template <bool HASHED> __device__ inline void find_tie(unsigned* tie_end, const floatX* x, size_t begin, size_t n, DropRule rule,
                                                       unsigned key, unsigned rank, unsigned* warp_sums) {
    const unsigned per_thread = TILE_WORDS / blockDim.x;
    const size_t first = begin + threadIdx.x * per_thread * 32;
    floatX v[32];
    unsigned keys[32], mine = 0, sum;
    for (unsigned w = 0; w < per_thread; w++) {
        const unsigned valid = load_word(v, x, first + w * 32, n);
        word_keys<HASHED>(keys, v, first + w * 32, rule);
        mine += __popc(equal_mask(keys, key, 0) & valid);
    }
    const unsigned before = block_exclusive_sum(mine, warp_sums, &sum);
    if (before < rank && rank <= before + mine) {
        unsigned left = rank - before, w = 0, equal;
        for (; ; w++) {
            const unsigned valid = load_word(v, x, first + w * 32, n);
            word_keys<HASHED>(keys, v, first + w * 32, rule);
            equal = equal_mask(keys, key, 0) & valid;
            if (left <= (unsigned)__popc(equal)) { break; }
            left -= __popc(equal);
        }
        for (; left > 1; left--) { equal &= equal - 1; }
        *tie_end = (unsigned)(first + w * 32 + __ffs((int)equal));
    }
}

// Adds the elements i .. i+31 of x that share the prefix to the histogram of their next digit. first: there is
// no prefix; then NaN and Inf are counted, unless not_finite is NULL. counts is the block's own, in shared memory
template <bool HASHED> __device__ __forceinline__ void count_word(unsigned* counts, unsigned* not_finite, const floatX* x, size_t i, size_t n,
                                                                  DropRule rule, const Search& s, bool first) {
    floatX v[32];
    unsigned keys[32];
    const unsigned valid = load_word(v, x, i, n);
    const int bits = digit_bits(&s), shift = s.bits - bits;
    word_keys<HASHED>(keys, v, i, rule);
    for (int j = 0; j < 32; j++) { keys[j] -= s.low; }
    if (first) {
        if (valid == ~0u) {
            for (int j = 0; j < 32; j++) { atomicAdd_block(&counts[keys[j] >> shift], 1u); }
        } else {
            for (int j = 0; j < 32 && valid >> j & 1; j++) { atomicAdd_block(&counts[keys[j] >> shift], 1u); }
        }
        if (not_finite != NULL) {
            unsigned magnitudes[32];
            word_keys<false>(magnitudes, v, i, rule);
            const unsigned bad = count_above(magnitudes, INFINITY_KEY - 1);
            if (bad > 0) { atomicAdd(not_finite, bad); }
        }
    } else {
        for (unsigned match = equal_mask(keys, s.prefix, s.bits) & valid; match != 0; match &= match - 1) {
            const size_t at = i + __ffs(match) - 1; // few: read again, for an index into keys would put them all into local memory
            atomicAdd_block(&counts[(drop_key<HASHED>(x[at], at, rule) - s.low) >> shift & ((1u << bits) - 1)], 1u);
        }
    }
}

// the tensor of this block in a launch with one block a tile, and which of its tiles
__device__ inline const Selection& selection_of(const Selections& all, unsigned block, unsigned* tile) {
    int i = 0;
    while (block - all.of[i].first_tile >= all.of[i].tiles) { i++; }
    *tile = block - all.of[i].first_tile;
    return all.of[i];
}

// A sample of x (n): runs of 8 neighbours, one anywhere in each of 2,048 equal parts of x. A thread copies half a run; blockIdx.y
// is the tensor
__global__ void dropit_sample_kernel(const __grid_constant__ Selections all) {
    const Selection& s = all.of[blockIdx.y];
    const size_t n = s.d.n;
    const unsigned parts = DROPIT_TILE / 8, half = blockIdx.x * blockDim.x + threadIdx.x, part = half / 2;
    if (half < 2 * parts) {
        const size_t length = n / parts, anywhere = length > 0 ? part * 2654435761u % length : 0;
        const size_t begin = (part * n / parts + anywhere) / 8 * 8 + half % 2 * 4;
        for (int j = 0; j < 4; j++) { s.s.sample[half * 4 + j] = s.x[begin + j < n ? begin + j : n - 1]; }
    }
}

// range[0] and range[1] = the rank_high-th and rank_low-th largest key of the sample: a block of 512 threads for each, two for
// a tensor (blockIdx.y), with 8 KiB of shared memory
#define RANGE_THREADS 512 // one word of the sample each
__global__ void dropit_range_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned counts[DROPIT_BINS];
    __shared__ unsigned warp_sums[32];
    __shared__ Search search;
    const Selection& s = all.of[blockIdx.y];
    if (threadIdx.x == 0) {
        search = {0, 32, 0, blockIdx.x == 0 ? s.rank_high : s.rank_low};
        if (blockIdx.x == 0) { s.s.search->candidates = 0; }
    }
    for (bool first = true; first || search.bits > KEY_ZEROS; first = false) {
        for (int b = threadIdx.x; b < DROPIT_BINS; b += RANGE_THREADS) { counts[b] = 0; }
        __syncthreads();
        const Search now = search;
        count_word<false>(counts, NULL, s.s.sample, threadIdx.x * 32, DROPIT_TILE, DropRule{}, now, first);
        __syncthreads();
        search_digit(&search, counts, warp_sums);
    }
    if (threadIdx.x == 0) { s.s.range[blockIdx.x] = search_key(&search); }
}

// tile_counts[tile] = (elements above the sampled range, 0); lists the elements within the range, in any order. Counts NaN and Inf.
// One block a tile. A block collects what it finds in shared memory, 8 KiB (fp32: 12), so that it waits once for a place in the
// list, and writes there in whole lines; what does not fit goes there one by one
#define MAX_FOUND 2048
__global__ void dropit_candidates_kernel(const __grid_constant__ Selections all) {
    __shared__ floatX found_values[MAX_FOUND];
    __shared__ unsigned short found_places[MAX_FOUND];
    __shared__ unsigned found, full, above, list_begin;
    unsigned tile;
    const Selection& s = selection_of(all, blockIdx.x, &tile);
    const unsigned high = s.s.range[0], low = s.low_is_zero ? 0 : s.s.range[1];
    const size_t begin = (size_t)tile * DROPIT_TILE, n = s.d.n, capacity = s.list_capacity;
    unsigned mine = 0, top = 0;
    if (threadIdx.x == 0) {
        found = above = 0;
        full = MAX_FOUND;
    }
    __syncthreads();
    // neighbours in a warp read neighbouring words; a pair is two words DROPIT_THREADS apart
    for (int w = 0; w < THREAD_WORDS; w += 2) {
        unsigned words[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            floatX v[32];
            unsigned keys[32];
            const unsigned valid = load_word(v, s.x, begin + ((w + h) * DROPIT_THREADS + threadIdx.x) * 32, n);
            word_keys<false>(keys, v, 0, DropRule{});
            words[h] = between_mask(keys, low, high) & valid;
            mine += count_above(keys, high);
            for (int j = 0; j < 32; j++) { top = max(top, keys[j]); }
        }
        const unsigned few = __popc(words[0]) + __popc(words[1]);
        if (few == 0) { continue; }
        unsigned at = atomicAdd_block(&found, few);
        const bool room = at + few <= MAX_FOUND;
        if (!room && at <= MAX_FOUND) { full = at; } // of one thread: those before it had room, those behind it have none
        if (!room) { at = atomicAdd(&s.s.search->candidates, few); }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const unsigned place0 = ((w + h) * DROPIT_THREADS + threadIdx.x) * 32;
            const floatX* word_x = s.x + begin + place0;
            for (unsigned word = words[h]; word != 0; word &= word - 1, at++) {
                const unsigned j = __ffs((int)word) - 1;
                if (room) {
                    found_values[at] = word_x[j];
                    found_places[at] = (unsigned short)(place0 + j);
                } else if (at < capacity) {
                    s.s.list_values[at] = word_x[j];
                    s.s.list_indices[at] = (unsigned)begin + place0 + j;
                }
            }
        }
    }
    if (mine > 0) { atomicAdd_block(&above, mine); }
    if (top >= INFINITY_KEY) { // rare: only now are they counted
        unsigned bad = 0;
        for (int w = 0; w < THREAD_WORDS; w++) {
            floatX v[32];
            unsigned keys[32];
            load_word(v, s.x, begin + (w * DROPIT_THREADS + threadIdx.x) * 32, n);
            word_keys<false>(keys, v, 0, DropRule{});
            bad += count_above(keys, INFINITY_KEY - 1);
        }
        atomicAdd(s.s.not_finite, bad);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        found = min(found, full);
        list_begin = atomicAdd(&s.s.search->candidates, found);
        s.s.tile_counts[tile] = make_uint2(above, 0);
    }
    __syncthreads();
    for (unsigned i = threadIdx.x; i < found && list_begin + i < capacity; i += DROPIT_THREADS) {
        s.s.list_values[list_begin + i] = found_values[i];
        s.s.list_indices[list_begin + i] = (unsigned)begin + found_places[i];
    }
}

// starts the search for the k largest: in the list if that holds the threshold, else in x. One block of 256 threads a tensor
__global__ void dropit_start_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned warp_sums[32];
    const Selection& s = all.of[blockIdx.x];
    const unsigned k = (unsigned)s.d.k;
    unsigned mine = 0, above;
    for (unsigned t = threadIdx.x; t < s.tiles; t += blockDim.x) { mine += s.s.tile_counts[t].x; }
    block_exclusive_sum(mine, warp_sums, &above);
    const unsigned candidates = s.s.search->candidates, low = s.low_is_zero ? 0 : s.s.range[1];
    const bool listed = candidates <= s.list_capacity && above < k && k - above <= candidates;
    if (threadIdx.x == 0) {
        s.s.search->search = listed ? Search{low, 32 - __clz((int)(s.s.range[0] - low)), 0, k - above} : Search{0, 32, 0, k};
        s.s.search->listed = listed ? candidates : 0;
    }
    for (unsigned t = threadIdx.x; t < s.tiles && !listed; t += blockDim.x) { s.s.tile_counts[t].x = 0; }
    for (int b = threadIdx.x; b < DROPIT_BINS; b += blockDim.x) { s.s.histogram[b] = 0; }
}

// one digit of the search over a whole tensor (blockIdx.y): histogram += counts. A block counts in shared memory, 8 KiB, and reads
// 4,096 elements at a time
#define HISTOGRAM_PIECE (DROPIT_TILE / 4)
__global__ void dropit_histogram_kernel(const __grid_constant__ Selections all, bool first) {
    __shared__ uint4 counts[DROPIT_BINS / 4];
    const Selection& s = all.of[blockIdx.y];
    const Search now = s.s.search->search;
    const unsigned listed = s.s.search->listed;
    const floatX* x = listed > 0 ? s.s.list_values : s.x;
    const size_t end = listed > 0 ? listed : s.d.n;
    if (now.bits <= KEY_ZEROS) { return; }
    if ((size_t)blockIdx.x * HISTOGRAM_PIECE >= end) { return; }
    for (int b = threadIdx.x; b < DROPIT_BINS / 4; b += blockDim.x) { counts[b] = make_uint4(0, 0, 0, 0); }
    __syncthreads();
    for (size_t begin = (size_t)blockIdx.x * HISTOGRAM_PIECE; begin < end; begin += (size_t)gridDim.x * HISTOGRAM_PIECE) {
        for (size_t i = begin + threadIdx.x * 32; i < begin + HISTOGRAM_PIECE; i += DROPIT_THREADS * 32) {
            count_word<false>((unsigned*)counts, NULL, x, i, end, DropRule{}, now, first);
        }
        __syncthreads(); // the block reads its pieces one after the other, and with them whole pages
    }
    for (int b = threadIdx.x; b < DROPIT_BINS / 4; b += blockDim.x) {
        const uint4 c = counts[b];
        unsigned* to = s.s.histogram + 4 * b;
        if ((c.x | c.y | c.z | c.w) == 0) { continue; }
        if (c.x > 0) { atomicAdd(to, c.x); }
        if (c.y > 0) { atomicAdd(to + 1, c.y); }
        if (c.z > 0) { atomicAdd(to + 2, c.z); }
        if (c.w > 0) { atomicAdd(to + 3, c.w); }
    }
}

// moves the search by the digit just counted; leaves the histogram zero. One block of 256 threads a tensor
__global__ void dropit_search_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned warp_sums[32];
    const Selection& s = all.of[blockIdx.x];
    if (s.s.search->search.bits <= KEY_ZEROS) { return; }
    search_digit(&s.s.search->search, s.s.histogram, warp_sums);
    for (int b = threadIdx.x; b < DROPIT_BINS; b += blockDim.x) { s.s.histogram[b] = 0; }
}

__device__ inline void add_counts(uint2* tile_count, unsigned above, unsigned equal) {
    if (above > 0) { atomicAdd(&tile_count->x, above); }
    if (equal > 0) { atomicAdd(&tile_count->y, equal); }
}

// tile_counts[tile] += (elements above the threshold, elements equal to it), of the list or of x. One block a tile of x
__global__ void dropit_count_kernel(const __grid_constant__ Selections all) {
    unsigned block;
    const Selection& s = selection_of(all, blockIdx.x, &block);
    const unsigned key = search_key(&s.s.search->search), listed = s.s.search->listed;
    const size_t segment = (size_t)block * blockDim.x + threadIdx.x;
    unsigned above = 0, equal = 0;
    if (listed == 0) {
        for (int w = 0; w < THREAD_WORDS; w++) {
            floatX v[32];
            unsigned keys[32];
            const unsigned valid = load_word(v, s.x, segment * DROPIT_SEGMENT + w * 32, s.d.n);
            word_keys<false>(keys, v, 0, DropRule{});
            above += count_above(keys, key);
            equal += __popc(equal_mask(keys, key, 0) & valid);
        }
        add_counts(&s.s.tile_counts[block], above, equal);
    } else {
        for (size_t begin = segment * 32; begin < listed; begin += (size_t)s.tiles * blockDim.x * 32) {
            unsigned tile = s.s.list_indices[begin] / DROPIT_TILE; // neighbours in the list are mostly of one tile
            for (size_t i = begin; i < begin + 32 && i < listed; i++) {
                const unsigned own = s.s.list_indices[i] / DROPIT_TILE, own_key = magnitude_key(s.s.list_values[i]);
                if (own != tile) {
                    add_counts(&s.s.tile_counts[tile], above, equal);
                    tile = own;
                    above = equal = 0;
                }
                above += own_key > key;
                equal += own_key == key;
            }
            add_counts(&s.s.tile_counts[tile], above, equal);
            above = equal = 0;
        }
    }
}

// the end of a search: threshold, and how many kept elements lie before each tile. One block of 512 threads a tensor
#define OFFSETS_THREADS 512 // one word of a tile each
__global__ void dropit_offsets_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned long long pair_sums[32];
    __shared__ unsigned warp_sums[32];
    __shared__ unsigned tie_tile;
    __shared__ unsigned tie_rank;
    const Selection& s = all.of[blockIdx.x];
    const unsigned key = search_key(&s.s.search->search), ties = s.s.search->search.remaining;
    Threshold* threshold = s.d.thresholds;
    if (threadIdx.x == 0) { *threshold = {key, 0}; }
    const unsigned per_thread = CEIL_DIV(s.tiles, blockDim.x), first = threadIdx.x * per_thread;
    unsigned long long mine = 0, sum; // above << 32 | equal
    for (unsigned tile = first; tile < first + per_thread && tile < s.tiles; tile++) {
        mine += (unsigned long long)s.s.tile_counts[tile].x << 32 | s.s.tile_counts[tile].y;
    }
    const unsigned long long before = block_exclusive_sum(mine, pair_sums, &sum);
    unsigned above = before >> 32, equal = (unsigned)before;
    for (unsigned tile = first; tile < first + per_thread && tile < s.tiles; tile++) {
        const uint2 count = s.s.tile_counts[tile];
        s.s.tile_offsets[tile] = above + min(equal, ties);
        if (equal < ties && ties <= equal + count.y) {
            tie_tile = tile;
            tie_rank = ties - equal;
        }
        above += count.x;
        equal += count.y;
    }
    __syncthreads();
    if (ties > 0) {
        find_tie<false>(&threshold->tie_end, s.x, (size_t)tie_tile * DROPIT_TILE, s.d.n, DropRule{}, key, tie_rank, warp_sums);
    }
}

// fastmink and random: the threshold of each tile. One block a tile; 8 KiB of shared memory
template <bool HASHED> __global__ void dropit_tile_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned counts[DROPIT_BINS];
    __shared__ unsigned warp_sums[32];
    __shared__ Search search;
    unsigned tile;
    const Selection& s = selection_of(all, blockIdx.x, &tile);
    Threshold* threshold = &s.d.thresholds[tile];
    const size_t begin = (size_t)tile * DROPIT_TILE, n = s.d.n;
    if (threadIdx.x == 0) {
        search = {0, 32, 0, begin + DROPIT_TILE <= n ? s.k_tile : s.k_last};
        threshold->tie_end = 0;
    }
    for (bool first = true; first || search.bits > (HASHED ? 0 : KEY_ZEROS); first = false) {
        for (int b = threadIdx.x; b < DROPIT_BINS; b += blockDim.x) { counts[b] = 0; }
        __syncthreads();
        const Search now = search;
        for (int w = 0; w < THREAD_WORDS; w++) {
            count_word<HASHED>(counts, s.s.not_finite, s.x, begin + (threadIdx.x * THREAD_WORDS + w) * 32, n, s.rule, now, first);
        }
        __syncthreads();
        search_digit(&search, counts, warp_sums);
    }
    const Search done = search;
    if (threadIdx.x == 0) { threshold->key = search_key(&done); }
    if (done.remaining > 0) { find_tie<HASHED>(&threshold->tie_end, s.x, begin, n, s.rule, search_key(&done), done.remaining, warp_sums); }
}

// Packing gives a warp 8 segments, a lane 8 neighbouring elements of each, so that its accesses are whole lines. Bit b of a mask belongs
// to element b % 8 of the lane's part of segment b / 8, of 4 segments: this is where it lies from the lane's first element on
__device__ inline size_t pack_place(int b) { return (size_t)(b / 8) * DROPIT_SEGMENT + b % 8; }

// of the 32 elements of a mask those whose index is below end
__device__ inline unsigned below_mask(size_t first, size_t end) {
    unsigned mask = 0;
    for (int q = 0; q < 32; q += 8) {
        const size_t i = first + pack_place(q);
        mask |= (i + 8 <= end ? 255u : i < end ? (1u << (end - i)) - 1 : 0u) << q;
    }
    return mask;
}

// kept elements of 8 segments, in fields of 16 bits: of the first four, of the last four
struct SegmentCounts {
    unsigned long long of[2];
};
struct AddSegmentCounts {
    __device__ SegmentCounts operator()(SegmentCounts a, SegmentCounts b) const { return {{a.of[0] + b.of[0], a.of[1] + b.of[1]}}; }
};
__device__ inline unsigned field(const SegmentCounts& c, int q) { return (unsigned)(c.of[q / 4] >> q % 4 * 16) & 0xffff; }
__device__ inline unsigned add_fields(unsigned long long f) {
    return (unsigned)((f & 0xffff) + (f >> 16 & 0xffff) + (f >> 32 & 0xffff) + (f >> 48));
}

// Bitmap, offsets and values of the kept elements. One block of 256 threads a tile. A warp lines its values up in shared memory (20 KiB
// for the block; fp32: 40) and writes them as one run; more than MAX_STAGED, as at gamma 0.3, go to their places one by one
#define PACK_THREADS 256
#define MAX_STAGED 1280
template <bool HASHED> __global__ void __launch_bounds__(PACK_THREADS, 4) dropit_pack_kernel(const __grid_constant__ Selections all) {
    __shared__ Pack<8> staged[PACK_THREADS / 32][MAX_STAGED / 8 + 1 + 32 / 8]; // room for alignment, and a place a lane for what is not kept
    __shared__ SegmentCounts warp_counts[PACK_THREADS / 32];
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    unsigned tile;
    const Selection& s = selection_of(all, blockIdx.x, &tile);
    const Threshold t = s.d.thresholds[s.rule.strategy == MINK ? 0 : tile];
    const int lane = threadIdx.x % 32, own_warp = threadIdx.x / 32;
    const size_t begin = (size_t)tile * DROPIT_TILE, end = begin + DROPIT_TILE, n = s.d.n;
    const size_t first = begin + (own_warp * 8 * DROPIT_SEGMENT + lane * 8); // the lane's first element
    // ties end before this tile or behind it, but for one tile: a single comparison decides
    const bool ties_end_here = begin < t.tie_end && t.tie_end < end, all_ties = t.tie_end >= end;
    unsigned words[2];
    SegmentCounts counts = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const size_t i = first + h * 4 * DROPIT_SEGMENT;
        floatX v[32];
        unsigned keys[32];
        if (end <= n) {
            for (int b = 0; b < 32; b += 8) { *(Pack<8>*)(v + b) = *(const Pack<8>*)(s.x + i + pack_place(b)); }
        } else {
            for (int b = 0; b < 32; b++) { v[b] = i + pack_place(b) < n ? s.x[i + pack_place(b)] : (floatX)0.0f; }
        }
        if constexpr (HASHED) {
            for (int b = 0; b < 32; b++) { keys[b] = drop_key<true>(v[b], i + pack_place(b), s.rule); }
        } else {
            magnitude_keys(keys, v);
        }
        if (ties_end_here) { words[h] = above_mask(keys, t.key) | (equal_mask(keys, t.key, 0) & below_mask(i, t.tie_end)); }
        else if (all_ties && t.key == 0) { words[h] = ~0u; }
        else { words[h] = above_mask(keys, t.key - all_ties); }
        if (end > n) { words[h] &= below_mask(i, n); }
        for (int q = 0; q < 4; q++) { counts.of[h] |= (unsigned long long)__popc(words[h] >> 8 * q & 255) << 16 * q; }
    }
    const SegmentCounts before = cg::inclusive_scan(warp, counts, AddSegmentCounts()); // with the lane's own
    if (lane == 31) { warp_counts[own_warp] = before; }
    __syncthreads();
    unsigned long long earlier = 0; // a field holds up to 8 warps' two segments
    for (int w = 0; w < own_warp; w++) { earlier += warp_counts[w].of[0] + warp_counts[w].of[1]; }
    const unsigned tile_offset = s.rule.strategy == MINK ? s.s.tile_offsets[tile] : tile * s.k_tile;
    const unsigned run = tile_offset + add_fields(earlier); // where the warp's values begin
    const unsigned count = add_fields(warp_counts[own_warp].of[0] + warp_counts[own_warp].of[1]);
    const SegmentCounts sums = warp_counts[own_warp];
    const size_t segment = first / DROPIT_SEGMENT;
    const floatX* from = s.x + first;
    uint8_t* bytes = (uint8_t*)s.d.bitmap + first / 8;
    if (end <= n && count <= MAX_STAGED) {
        const unsigned shift = run % 8, unused = MAX_STAGED + 8 + lane; // places in shared memory and in values are aligned alike
        floatX *own = staged[own_warp]->v, *to = s.d.values + (run - shift);
        unsigned start = shift;
#pragma unroll
        for (int q = 0; q < 8; q++) {
            const Pack<8> p = *(const Pack<8>*)(from + q * DROPIT_SEGMENT); // again, from cache: in registers they would leave room for few warps
            unsigned bits = words[q / 4] >> q % 4 * 8 & 255, at = start + field(before, q) - __popc(bits);
            bytes[q * 32] = (uint8_t)bits;
            if (lane == q) { s.d.offsets[segment + q] = run + start - shift; }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const unsigned bit = bits >> j & 1;
                own[bit ? at : unused] = p.v[j]; // no branches
                at += bit;
            }
            start += field(sums, q);
        }
        __syncwarp();
        for (unsigned i = lane * 8; i < shift + count; i += 32 * 8) {
            if (i >= shift && i + 8 <= shift + count) {
                *(Pack<8>*)(to + i) = *(const Pack<8>*)(own + i);
            } else {
                for (unsigned j = max(i, shift); j < i + 8 && j < shift + count; j++) { to[j] = own[j]; }
            }
        }
    } else {
        unsigned start = run;
#pragma unroll
        for (int q = 0; q < 8; q++) {
            unsigned bits = words[q / 4] >> q % 4 * 8 & 255;
            floatX* to = s.d.values + start + field(before, q) - __popc(bits);
            if (first - lane * 8 + q * DROPIT_SEGMENT < n) {
                bytes[q * 32] = (uint8_t)bits;
                if (lane == q) { s.d.offsets[segment + q] = start; }
            }
            for (; bits != 0; bits &= bits - 1) { *to++ = from[q * DROPIT_SEGMENT + __ffs((int)bits) - 1]; }
            start += field(sums, q);
        }
    }
}

// out[i - begin] = i kept ? its value : 0, for begin <= i < end. A thread writes 8 elements, a warp a segment: it finds its values by
// counting the segment's bits before its own. V == 1: begin, end or `out` are not aligned to 8 elements
template <int V> __global__ void dropit_unpack_kernel(floatX* out, const floatX* values, const unsigned* bitmap, const unsigned* offsets,
                                                      size_t begin, size_t end) {
    const size_t i = (begin / 8 + (size_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (i < end) {
        const size_t segment = i / DROPIT_SEGMENT;
        const unsigned at = i % DROPIT_SEGMENT / 32, word = bitmap[i / 32], byte = word >> i % 32 & 255;
        unsigned before = offsets[segment];
        for (unsigned w = 0; w < THREAD_WORDS; w++) {
            const unsigned earlier = w < at ? ~0u : w == at ? (1u << i % 32) - 1 : 0;
            before += __popc(bitmap[segment * THREAD_WORDS + w] & earlier);
        }
        const bitsX* in = (const bitsX*)values + before;
        unsigned k = 0; // of the kept elements, the next
        bitsX* to = (bitsX*)out + (i - begin);
        if (V == 8) {
            const int N = 16 / sizeof(bitsX); // elements of one access
            for (int h = 0; h < 8; h += N) {
                Pack<N, bitsX> p; // no branches: a value is read whether its element is kept or not (there is room for it), and masked
                for (int j = 0; j < N; j++) {
                    const unsigned bit = byte >> (h + j) & 1;
                    p.v[j] = in[k] & (0u - bit);
                    k += bit;
                }
                *(Pack<N, bitsX>*)(to + h) = p;
            }
        } else {
            for (int j = 0; j < 8; j++) {
                const unsigned bit = byte >> j & 1;
                if (i + j >= begin && i + j < end) { to[j] = in[k] & (0u - bit); }
                k += bit;
            }
        }
    }
}

// x[i - begin] = i kept ? itself : 0, for begin <= i < begin + n: a recomputed chunk becomes what unpacking would give
template <bool HASHED, int V> __global__ void dropit_mask_kernel(floatX* x, const Threshold* thresholds, size_t begin, size_t n, DropRule rule) {
    const size_t first = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (first < n) {
        const size_t i = begin + first;
        const Threshold t = thresholds[rule.strategy == MINK ? 0 : i / DROPIT_TILE];
        Pack<V> p = *(const Pack<V>*)(x + first);
        for (int j = 0; j < V; j++) {
            const unsigned key = drop_key<HASHED>(p.v[j], i + j, rule), index = (unsigned)i + j;
            p.v[j] = key > t.key || (key == t.key && index < t.tie_end) ? p.v[j] : (floatX)0.0f;
        }
        *(Pack<V>*)(x + first) = p;
    }
}

// What a kernel that recomputes a tensor does with V elements from element i of its chunk on, before it rounds and stores them: nothing,
struct KeepAll {
    template <int V> __device__ void apply(float*, size_t) const {}
};

// or mink's masking. An element is kept when its rounded magnitude is at least the threshold's, that is when its own is at least
// the smallest that rounds to it: one comparison and one selection an element. Infs and NaNs stay
struct KeepLargest {
    const Threshold* threshold;
    size_t begin; // element of the tensor where the chunk begins
    template <int V> __device__ void apply(float* v, size_t i) const {
        const Threshold t = *threshold;
        const size_t first = begin + i;
        if (first + V <= t.tie_end || first >= t.tie_end) {
            const float least = least_kept(t.key, first >= t.tie_end);
            for (int j = 0; j < V; j++) { v[j] = fabsf(v[j]) < least ? 0.0f : v[j]; }
        } else {
            for (int j = 0; j < V; j++) { v[j] = fabsf(v[j]) < least_kept(t.key, first + j >= t.tie_end) ? 0.0f : v[j]; }
        }
    }
    // the smallest magnitude that rounds to a key of at least (above: more than) this one
    static __device__ float least_kept(unsigned key, bool above) {
        const unsigned magnitude = (key >> KEY_ZEROS) + above; // the bits of a floatX without its sign
        unsigned bits = magnitude;
        if (sizeof(floatX) == 2) { bits = magnitude > 0 ? (magnitude << 16) - 0x8000 + (magnitude & 1) : 0; } // half of a step below; ties go to even
        return __uint_as_float(min(bits, 0x7f800000u));
    }
};

// a tensor to choose from, under which rule
typedef struct {
    const floatX* x;
    Dropped d;
    DropRule rule;
} DropChoice;

// one tensor as its kernels see it
Selection dropit_selection(const DropChoice* c, const DropScratch* scratch, double gamma) {
    const size_t n = c->d.n;
    // 5 standard deviations of the number of kept elements in a sample, and 2 for rounding
    const double q = (double)c->d.k / n, kept = q * DROPIT_TILE, margin = 5.0 * sqrt(kept * (1.0 - q)) + 2.0;
    const bool low_is_zero = kept + margin > DROPIT_TILE;
    return Selection{c->x, c->d, c->rule, (unsigned)dropit_keep(DROPIT_TILE, gamma), (unsigned)dropit_keep(n % DROPIT_TILE, gamma), 0,
                     (unsigned)dropit_tiles(n), kept > margin ? (unsigned)(kept - margin) : 0, low_is_zero ? 0 : (unsigned)(kept + margin),
                     low_is_zero, dropit_list_capacity(n), *scratch};
}

// the blocks of a launch with one a tile
static unsigned place_tiles(Selections* all, int count) {
    unsigned tiles = 0;
    for (int i = 0; i < count; i++) {
        all->of[i].first_tile = tiles;
        tiles += all->of[i].tiles;
    }
    return tiles;
}

// the thresholds of up to MAX_SELECTIONS tensors under one strategy, and their bitmaps and values where they are stored
void dropit_select(const DropChoice* choices, int count, const DropScratch* scratch, double gamma, cudaStream_t stream) {
    Selections all = {}, stored = {};
    DropScratch rest = *scratch;
    unsigned most_tiles = 0;
    int num_stored = 0;
    const int strategy = choices[0].rule.strategy;
    for (int i = 0; i < count; i++) {
        const Dropped d = choices[i].d;
        const unsigned tiles = (unsigned)dropit_tiles(d.n);
        all.of[i] = dropit_selection(&choices[i], &rest, gamma);
        rest.search++;
        rest.histogram += DROPIT_BINS;
        rest.tile_counts += tiles;
        rest.tile_offsets += tiles;
        rest.sample += DROPIT_TILE;
        rest.range += 2;
        rest.list_values += align_up(dropit_list_capacity(d.n));
        rest.list_indices += align_up(dropit_list_capacity(d.n));
        if (tiles > most_tiles) { most_tiles = tiles; }
        if (d.offsets != NULL) { stored.of[num_stored++] = all.of[i]; }
    }
    const unsigned tiles = place_tiles(&all, count), stored_tiles = place_tiles(&stored, num_stored);
    if (strategy == MINK) {
        dropit_sample_kernel<<<dim3(DROPIT_TILE / 4 / 64, count), 64, 0, stream>>>(all);
        dropit_range_kernel<<<dim3(2, count), RANGE_THREADS, 0, stream>>>(all);
        dropit_candidates_kernel<<<tiles, DROPIT_THREADS, 0, stream>>>(all);
        dropit_start_kernel<<<count, 256, 0, stream>>>(all);
        const unsigned full = 16 * num_multiprocessors, blocks = most_tiles < full ? most_tiles : full; // each ends with up to 2,048 additions
        const int digits = sizeof(floatX) == 2 ? 2 : 3; // a bf16 key has 15 bits, the rest of the 32 are zero
        for (int digit = 0; digit < digits; digit++) {
            dropit_histogram_kernel<<<dim3(blocks, count), DROPIT_THREADS, 0, stream>>>(all, digit == 0);
            dropit_search_kernel<<<count, 256, 0, stream>>>(all);
        }
        dropit_count_kernel<<<tiles, DROPIT_THREADS, 0, stream>>>(all);
        dropit_offsets_kernel<<<count, OFFSETS_THREADS, 0, stream>>>(all);
    } else if (strategy == RANDOM) {
        dropit_tile_kernel<true><<<tiles, DROPIT_THREADS, 0, stream>>>(all);
    } else {
        dropit_tile_kernel<false><<<tiles, DROPIT_THREADS, 0, stream>>>(all);
    }
    if (num_stored > 0 && strategy == RANDOM) {
        dropit_pack_kernel<true><<<stored_tiles, PACK_THREADS, 0, stream>>>(stored);
    } else if (num_stored > 0) {
        dropit_pack_kernel<false><<<stored_tiles, PACK_THREADS, 0, stream>>>(stored);
    }
    kernelCheck();
}

// elements begin .. end-1 of the tensor as the weight gradient sees it
void dropit_unpack(floatX* out, const Dropped* d, size_t begin, size_t end, cudaStream_t stream) {
    const size_t blocks = CEIL_DIV(CEIL_DIV(end, (size_t)8) - begin / 8, (size_t)256);
    if (vectorizable(begin | end, out)) {
        dropit_unpack_kernel<8><<<blocks, 256, 0, stream>>>(out, d->values, d->bitmap, d->offsets, begin, end);
    } else {
        dropit_unpack_kernel<1><<<blocks, 256, 0, stream>>>(out, d->values, d->bitmap, d->offsets, begin, end);
    }
    kernelCheck();
}

// the same for a recomputed chunk x of elements begin .. end-1, in place
void dropit_mask(floatX* x, const Dropped* d, size_t begin, size_t end, DropRule rule, cudaStream_t stream) {
    const size_t n = end - begin;
    if (rule.strategy == RANDOM) {
        dropit_mask_kernel<true, 1><<<CEIL_DIV(n, (size_t)256), 256, 0, stream>>>(x, d->thresholds, begin, n, rule);
    } else if (vectorizable(begin | n, x)) {
        dropit_mask_kernel<false, VEC><<<CEIL_DIV(n, (size_t)256 * VEC), 256, 0, stream>>>(x, d->thresholds, begin, n, rule);
    } else {
        dropit_mask_kernel<false, 1><<<CEIL_DIV(n, (size_t)256), 256, 0, stream>>>(x, d->thresholds, begin, n, rule);
    }
    kernelCheck();
}
// ---- end shared: DropIT ----------------------------------------------------

// ---- shared: linear --------------------------------------------------------
// Matrix products by cuBLASLt. Plans (descriptors and algorithm) are made once for each shape and kept: asking for an
// algorithm costs the host more than a small product costs the GPU, and the same plan gives the same bits.
static cublasHandle_t cublas_handle;
static cublasLtHandle_t cublaslt_handle;
#define CUBLAS_WORKSPACE ((size_t)32 << 20) // what NVIDIA recommends for Hopper
static void* cublas_workspace;              // a line of the plan

typedef struct {
    int m, n, k;
    bool transA, transB, bias, accumulate, fp32_out;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t A, B, D;
    cublasLtMatmulAlgo_t algo;
} MatmulPlan;

#define MAX_MATMUL_PLANS 256
static MatmulPlan matmul_plans[MAX_MATMUL_PLANS];
static int num_matmul_plans;

MatmulPlan* matmul_plan(int m, int n, int k, bool transA, bool transB, bool bias, bool accumulate, bool fp32_out) {
    for (int i = 0; i < num_matmul_plans; i++) {
        MatmulPlan* p = &matmul_plans[i];
        if (p->m == m && p->n == n && p->k == k && p->transA == transA && p->transB == transB && p->bias == bias &&
            p->accumulate == accumulate && p->fp32_out == fp32_out) { return p; }
    }
    require(num_matmul_plans < MAX_MATMUL_PLANS, "more than %d shapes of matrix products", MAX_MATMUL_PLANS);
    MatmulPlan* p = &matmul_plans[num_matmul_plans++];
    *p = MatmulPlan{m, n, k, transA, transB, bias, accumulate, fp32_out, NULL, NULL, NULL, NULL, {}};
    const cublasOperation_t opA = transA ? CUBLAS_OP_T : CUBLAS_OP_N, opB = transB ? CUBLAS_OP_T : CUBLAS_OP_N;
    const cublasLtEpilogue_t epilogue = bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    cublasCheck(cublasLtMatmulDescCreate(&p->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSA, &opA, sizeof(opA)));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_TRANSB, &opB, sizeof(opB)));
    cublasCheck(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof(epilogue)));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->A, CUDA_FLOATX, transA ? k : m, transA ? m : k, transA ? k : m));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->B, CUDA_FLOATX, transB ? n : k, transB ? k : n, transB ? n : k));
    cublasCheck(cublasLtMatrixLayoutCreate(&p->D, fp32_out ? CUDA_R_32F : CUDA_FLOATX, m, n, m));
    cublasLtMatmulPreference_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    const size_t workspace = CUBLAS_WORKSPACE;
    cublasCheck(cublasLtMatmulPreferenceCreate(&preference));
    cublasCheck(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace,
                                                     sizeof(workspace)));
    cublasLtMatmulAlgoGetHeuristic(cublaslt_handle, p->desc, p->A, p->B, p->D, p->D, preference, 1, &result, &found);
    require(found > 0, "cuBLASLt has no algorithm for a product of m %d n %d k %d in " PRECISION_NAME "; try PRECISION=FP32", m, n, k);
    p->algo = result.algo;
    cublasCheck(cublasLtMatmulPreferenceDestroy(preference));
    return p;
}

// column-major D (m,n) = op(A) (m,k) @ op(B) (k,n) + bias (m) + C, where C (m,n) may be D itself, and bias and C may be NULL.
// D is floatX, or fp32 for weight gradients
void matmul(void* D, const floatX* A, const floatX* B, const floatX* bias, const void* C, size_t m, size_t n, size_t k,
            bool transA, bool transB, bool fp32_out) {
    const float one = 1.0f, zero = 0.0f;
    MatmulPlan* p = matmul_plan((int)m, (int)n, (int)k, transA, transB, bias != NULL, C != NULL, fp32_out);
    if (bias != NULL) { cublasCheck(cublasLtMatmulDescSetAttribute(p->desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias))); }
    cublasCheck(cublasLtMatmul(cublaslt_handle, p->desc, &one, A, p->A, B, p->B, C != NULL ? &one : &zero, C != NULL ? C : D, p->D,
                               D, p->D, &p->algo, cublas_workspace, CUBLAS_WORKSPACE, main_stream));
}

// out[r,c] += bias[c]; out (rows, OC)
__global__ void bias_add_kernel(floatX* out, const floatX* bias, size_t n, int OC) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) { out[i] = (floatX)((float)out[i] + (float)bias[i % OC]); }
}

// out = inp @ weight^T + bias (+ residual); in PyTorch: F.linear(inp, weight, bias) + residual
// out (rows, OC), inp (rows, C), weight (OC, C), bias (OC), residual (rows, OC) or NULL
// cuBLAS is column-major and sees transposes: out^T (OC, rows) = weight (OC, C) @ inp^T (C, rows)
void linear_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, const floatX* residual,
                    size_t rows, size_t C, size_t OC) {
    const bool fused = C % 8 == 0 && OC % 8 == 0; // the bias epilogue wants leading dimensions of whole 16 bytes
    matmul(out, weight, inp, fused ? bias : NULL, residual, OC, rows, C, true, false, false);
    if (!fused) {
        bias_add_kernel<<<CEIL_DIV(rows * OC, (size_t)256), 256, 0, main_stream>>>(out, bias, rows * OC, (int)OC);
        kernelCheck();
    }
}

// dinp (rows, C) = dout (rows, OC) @ weight (OC, C)
void linear_backward_input(floatX* dinp, const floatX* dout, const floatX* weight, size_t rows, size_t C, size_t OC) {
    matmul(dinp, weight, dout, NULL, NULL, C, rows, OC, false, false, false);
}

// Sums over rows, in two steps of fixed order: every SLAB_ROWS rows to a partial sum, then the partial sums.
// A thread adds up V columns of one slab; threads of a warp read neighbouring columns
#define SLAB_ROWS 64
template <int V> __global__ void column_sum_kernel(float* partial, const floatX* x, size_t rows, int OC) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t packs = OC / V, slab = i / packs, column = i % packs * V;
    if (slab * SLAB_ROWS < rows) {
        const size_t end = min((slab + 1) * SLAB_ROWS, rows);
        float sum[V] = {0};
        for (size_t r = slab * SLAB_ROWS; r < end; r++) {
            float v[V];
            load<V>(v, x + r * OC + column);
            for (int j = 0; j < V; j++) { sum[j] += v[j]; }
        }
        store<V>(partial + slab * OC + column, sum);
    }
}

// out[c] += sum over slabs of partial[slab, c], for the OC columns of partial; those from C on go to out2. One thread a column
__global__ void column_sum_finish_kernel(float* out, float* out2, const float* partial, size_t slabs, int C, int OC) {
    const int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c < OC) {
        float sum = 0.0f;
#pragma unroll 16 // there are few threads: each must have many loads under way
        for (size_t s = 0; s < slabs; s++) { sum += partial[s * OC + c]; }
        if (c < C) { out[c] += sum; } else { out2[c - C] += sum; }
    }
}

// partial must hold column_sum_scratch(rows, OC) floats
size_t column_sum_scratch(size_t rows, size_t OC) { return CEIL_DIV(rows, (size_t)SLAB_ROWS) * OC; }

// out (OC) += x (rows, OC) summed over rows; in PyTorch: out += x.sum(0)
void column_sum(float* out, const floatX* x, float* partial, size_t rows, size_t OC) {
    const size_t slabs = CEIL_DIV(rows, (size_t)SLAB_ROWS);
    if (vectorizable(OC, x)) {
        column_sum_kernel<VEC><<<CEIL_DIV(slabs * OC / VEC, (size_t)64), 64, 0, main_stream>>>(partial, x, rows, (int)OC);
    } else {
        column_sum_kernel<1><<<CEIL_DIV(slabs * OC, (size_t)64), 64, 0, main_stream>>>(partial, x, rows, (int)OC);
    }
    column_sum_finish_kernel<<<CEIL_DIV(OC, (size_t)64), 64, 0, main_stream>>>(out, NULL, partial, slabs, (int)OC, (int)OC);
    kernelCheck();
}

// dweight (OC, C) += dout^T (OC, rows) @ inp (rows, C), in fp32
void linear_backward_weight(float* dweight, const floatX* dout, const floatX* inp, size_t rows, size_t C, size_t OC) {
    matmul(dweight, inp, dout, NULL, dweight, C, OC, rows, false, true, true);
}
// ---- end shared: linear ----------------------------------------------------

// ---- shared: loss ----------------------------------------------------------
#define LOSS_LANES 8 // lanes that share a row of logits
// Softmax cross-entropy with label smoothing and its gradient, in place:
//     loss = (1 - smoothing) * -log p[label] + smoothing * mean over v of -log p[v],   p = softmax(logits)
//     dlogits = (p - (1 - smoothing) * onehot - smoothing / V) * scale
// in PyTorch: F.cross_entropy(logits, label, label_smoothing=smoothing)
// ranks[b] = how many classes come before the label's, by logit, then by index; a NaN counts as coming before.
// logits (B, V), losses (B), ranks (B), labels (B). LOSS_LANES lanes a row
__global__ void cross_entropy_kernel(float* losses, int* ranks, floatX* logits, const int* labels, int B, int V, float smoothing, float scale) {
    auto lanes = cg::tiled_partition<LOSS_LANES>(cg::this_thread_block());
    const int b = blockIdx.x * (blockDim.x / LOSS_LANES) + threadIdx.x / LOSS_LANES;
    if (b >= B) { return; }
    const int lane = (int)lanes.thread_rank(), label = labels[b];
    floatX* row = logits + (size_t)b * V;
    const float correct = (float)row[label];
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
    lanes.sync(); // every lane has read row[label], which one of them overwrites; a reduction does not order memory
    for (int v = lane; v < V; v += LOSS_LANES) {
        const float p = expf((float)row[v] - lse);
        row[v] = (floatX)((p - (v == label ? 1.0f - smoothing : 0.0f) - smoothing / V) * scale);
    }
    if (lane == 0) {
        losses[b] = (1.0f - smoothing) * (lse - correct) + smoothing * (lse - logit_sum / V);
        ranks[b] = before;
    }
}

// what the host reads after a step
typedef struct {
    double loss;         // sum over images
    unsigned top1, top5; // images with the label among the 1 or 5 best classes
    unsigned not_finite; // NaNs and Infs that DropIT met
    float norm;          // of all gradients, before clipping
} StepResult;

// result += the batch. One block; threads add up strided images, then thread 0 adds up the threads in order
__global__ void loss_sum_kernel(StepResult* result, const float* losses, const int* ranks, int B) {
    __shared__ double loss_of[64];
    __shared__ unsigned top1_of[64];
    __shared__ unsigned top5_of[64];
    const int t = threadIdx.x;
    loss_of[t] = 0.0;
    top1_of[t] = top5_of[t] = 0;
    for (int b = t; b < B; b += blockDim.x) {
        loss_of[t] += losses[b];
        top1_of[t] += ranks[b] < 1;
        top5_of[t] += ranks[b] < 5;
    }
    __syncthreads();
    if (t == 0) {
        for (unsigned i = 0; i < blockDim.x; i++) {
            result->loss += loss_of[i];
            result->top1 += top1_of[i];
            result->top5 += top5_of[i];
        }
    }
}

void cross_entropy(StepResult* result, float* losses, int* ranks, floatX* logits, const int* labels, int B, int V,
                   float smoothing, float scale) {
    const int rows_per_block = 64 / LOSS_LANES;
    cross_entropy_kernel<<<CEIL_DIV(B, rows_per_block), 64, 0, main_stream>>>(losses, ranks, logits, labels, B, V, smoothing, scale);
    loss_sum_kernel<<<1, 64, 0, main_stream>>>(result, losses, ranks, B);
    kernelCheck();
}
// ---- end shared: loss ------------------------------------------------------

// ---- shared: optimizer -----------------------------------------------------
typedef struct {
    bool adamw; // else SGD with momentum
    double learning_rate, beta1, beta2, eps, weight_decay, momentum;
    double clip; // largest norm of all gradients together; 0: no clipping
} OptimizerConfig;

// partial[block] = sum over its elements of x^2; fixed order. x (n), partial (NORM_BLOCKS)
#define NORM_BLOCKS 256
__global__ void sum_squares_kernel(double* partial, const float* x, size_t n) {
    __shared__ double warp_sums[4];
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    double sum = 0.0;
    const size_t stride = (size_t)gridDim.x * blockDim.x * 4;
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; i < n; i += stride) { // n is a multiple of 64
        const float4 v = *(const float4*)(x + i);
        sum += (double)(v.x * v.x + v.y * v.y) + (double)(v.z * v.z + v.w * v.w);
    }
    sum = cg::reduce(warp, sum, cg::plus<double>());
    if (warp.thread_rank() == 0) { warp_sums[threadIdx.x / 32] = sum; }
    __syncthreads();
    if (threadIdx.x == 0) { partial[blockIdx.x] = warp_sums[0] + warp_sums[1] + warp_sums[2] + warp_sums[3]; }
}

__global__ void norm_kernel(StepResult* result, const double* partial) {
    double sum = 0.0;
    for (int b = 0; b < NORM_BLOCKS; b++) { sum += partial[b]; }
    result->norm = (float)sqrt(sum);
}

// result->norm = L2 norm of grads (n); in PyTorch: torch.nn.utils.clip_grad_norm_ returns it
void gradient_norm(StepResult* result, double* partial, const float* grads, size_t n) {
    sum_squares_kernel<<<NORM_BLOCKS, 128, 0, main_stream>>>(partial, grads, n);
    norm_kernel<<<1, 1, 0, main_stream>>>(result, partial);
    kernelCheck();
}

// the factor by which torch.nn.utils.clip_grad_norm_ scales gradients
__device__ inline float clip_factor(const StepResult* result, float clip) {
    return clip > 0.0f ? fminf(1.0f, clip / (result->norm + 1e-6f)) : 1.0f;
}

// AdamW (Loshchilov and Hutter, ICLR 2019), as torch.optim.AdamW; correction1 = 1 - beta1^t, correction2 = 1 - beta2^t.
// params (n) are rounded from master (n); in fp32 master is params itself
// n is a multiple of VEC. A thread updates VEC parameters
__global__ void adamw_kernel(floatX* params, float* master, float* m, float* v, const float* grads, size_t n, const StepResult* result,
                             float clip, float lr, float beta1, float beta2, float correction1, float correction2, float eps, float weight_decay) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) {
        float g[VEC], mi[VEC], vi[VEC], w[VEC];
        const float factor = clip_factor(result, clip);
        load<VEC>(g, grads + i);
        load<VEC>(mi, m + i);
        load<VEC>(vi, v + i);
        load<VEC>(w, master + i);
        for (int j = 0; j < VEC; j++) {
            const float gj = g[j] * factor;
            mi[j] = beta1 * mi[j] + (1.0f - beta1) * gj;
            vi[j] = beta2 * vi[j] + (1.0f - beta2) * gj * gj;
            w[j] = w[j] * (1.0f - lr * weight_decay) - lr / correction1 * mi[j] / (sqrtf(vi[j]) / sqrtf(correction2) + eps);
        }
        store<VEC>(m + i, mi);
        store<VEC>(v + i, vi);
        store<VEC>(master + i, w);
        store<VEC>(params + i, w);
    }
}

// SGD with momentum, as torch.optim.SGD: g += weight_decay * w; m = momentum * m + g; w -= lr * m. n is a multiple of VEC
__global__ void sgd_kernel(floatX* params, float* master, float* m, const float* grads, size_t n, const StepResult* result,
                           float clip, float lr, float momentum, float weight_decay) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) {
        float g[VEC], mi[VEC], w[VEC];
        const float factor = clip_factor(result, clip);
        load<VEC>(g, grads + i);
        load<VEC>(mi, m + i);
        load<VEC>(w, master + i);
        for (int j = 0; j < VEC; j++) {
            mi[j] = momentum * mi[j] + (g[j] * factor + weight_decay * w[j]);
            w[j] -= lr * mi[j];
        }
        store<VEC>(m + i, mi);
        store<VEC>(master + i, w);
        store<VEC>(params + i, w);
    }
}

// updates n parameters (a multiple of VEC) that share one weight decay; step counts from 1
void optimizer_update(floatX* params, float* master, float* m, float* v, const float* grads, size_t n, const StepResult* result,
                      OptimizerConfig o, double lr, int step) {
    assert(n % VEC == 0);
    const size_t blocks = CEIL_DIV(n, (size_t)256 * VEC);
    if (o.adamw) {
        adamw_kernel<<<blocks, 256, 0, main_stream>>>(params, master, m, v, grads, n, result, (float)o.clip, (float)lr, (float)o.beta1,
            (float)o.beta2, (float)(1.0 - pow(o.beta1, step)), (float)(1.0 - pow(o.beta2, step)), (float)o.eps, (float)o.weight_decay);
    } else {
        sgd_kernel<<<blocks, 256, 0, main_stream>>>(params, master, m, grads, n, result, (float)o.clip, (float)lr, (float)o.momentum,
            (float)o.weight_decay);
    }
    kernelCheck();
}

// linear warm-up, then a half cosine to zero
double learning_rate_at(double lr, int step, int warmup, int steps) {
    if (step < warmup) { return lr * (step + 1) / warmup; }
    return 0.5 * lr * (1.0 + cos(M_PI * (step - warmup) / (steps > warmup ? steps - warmup : 1)));
}
// ---- end shared: optimizer -------------------------------------------------

// ----------------------------------------------------------------------------
// kernels of the vision transformer, each followed by its launcher

typedef struct {
    float mean[4], std[4];
} PixelStats;

// cuts images into patches and normalises: patches[b, t, (c, kh, kw)] = (image[b, h, w, c] / 255 - mean[c]) / std[c],
// with (h, w) the pixel (kh, kw) of patch t; flips[b] != 0 mirrors the image left to right
// patches (B, N, CH*P*P) with N = (S/P)^2, images (B, S, S, CH) of less than 2^32 bytes each. A thread makes V elements; V divides P
template <int V> __global__ void patchify_kernel(floatX* patches, const uint8_t* images, const int* flips,
                                                 const __grid_constant__ PixelStats stats, size_t n, int S, int P, int CH) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        const unsigned per_image = (unsigned)S * S * CH;
        const size_t b = i / per_image;
        unsigned j = (unsigned)(i - b * per_image);
        const unsigned kw = j % P; j /= P;
        const unsigned kh = j % P; j /= P;
        const unsigned c = j % CH; j /= CH;
        const unsigned pw = j % (S / P), ph = j / (S / P);
        const unsigned w = pw * P + kw;
        const uint8_t* row = images + (b * S + ph * P + kh) * S * CH + c;
        float x[V];
        for (int q = 0; q < V; q++) {
            x[q] = ((float)row[(size_t)(flips[b] ? S - 1 - (w + q) : w + q) * CH] / 255.0f - stats.mean[c]) / stats.std[c];
        }
        store<V>(patches + i, x);
    }
}

// out[b, 0] = cls + pos[0]; out[b, t] = tokens[b, t-1] + pos[t]
// out (B, T, C), tokens (B, T-1, C), cls (C), pos (T, C). A thread makes V elements
template <int V> __global__ void embed_kernel(floatX* out, const floatX* tokens, const floatX* cls, const floatX* pos, size_t n, int T, int C) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        const size_t row = i / C, b = row / T;
        const unsigned c = (unsigned)(i - row * C), t = (unsigned)(row - b * T);
        float token[V], position[V];
        load<V>(token, t == 0 ? cls + c : tokens + (b * (T - 1) + t - 1) * C + c);
        load<V>(position, pos + (size_t)t * C + c);
        for (int j = 0; j < V; j++) { token[j] += position[j]; }
        store<V>(out + i, token);
    }
}

void embed(floatX* out, const floatX* tokens, const floatX* cls, const floatX* pos, size_t B, size_t T, size_t C) {
    const size_t n = B * T * C;
    if (vectorizable(C, out, tokens, cls, pos)) {
        embed_kernel<VEC><<<CEIL_DIV(n, (size_t)256 * VEC), 256, 0, main_stream>>>(out, tokens, cls, pos, n, (int)T, (int)C);
    } else {
        embed_kernel<1><<<CEIL_DIV(n, (size_t)256), 256, 0, main_stream>>>(out, tokens, cls, pos, n, (int)T, (int)C);
    }
    kernelCheck();
}

// dtokens[b, t-1] = dout[b, t] for t > 0: the rows that the patch embedding made, next to one another. A thread copies V elements
template <int V> __global__ void embed_backward_tokens_kernel(floatX* dtokens, const floatX* dout, size_t n, int T, int C) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        const size_t row = i / C, b = row / (T - 1);
        *(Pack<V>*)(dtokens + i) = *(const Pack<V>*)(dout + (row + b + 1) * C + (i - row * C));
    }
}

void embed_backward_tokens(floatX* dtokens, const floatX* dout, size_t B, size_t T, size_t C) {
    const size_t n = B * (T-1) * C;
    if (vectorizable(C, dtokens, dout)) {
        embed_backward_tokens_kernel<VEC><<<CEIL_DIV(n, (size_t)256 * VEC), 256, 0, main_stream>>>(dtokens, dout, n, (int)T, (int)C);
    } else {
        embed_backward_tokens_kernel<1><<<CEIL_DIV(n, (size_t)256), 256, 0, main_stream>>>(dtokens, dout, n, (int)T, (int)C);
    }
    kernelCheck();
}

// dpos[t, c] += sum over b of dout[b, t, c]; dcls[c] += the same at t = 0. One thread a (t, c)
__global__ void embed_backward_positions_kernel(float* dpos, float* dcls, const floatX* dout, int B, int T, int C) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, n = (size_t)T * C;
    if (i < n) {
        float sum = 0.0f;
        for (int b = 0; b < B; b++) { sum += (float)dout[b * n + i]; }
        dpos[i] += sum;
        if (i < (size_t)C) { dcls[i] += sum; }
    }
}

// mean and sum of squared deviations of n values, and how those of two sets join (Chan, Golub and LeVeque 1983)
typedef struct {
    float n, mean, squares;
} Moments;

struct JoinMoments {
    __device__ Moments operator()(Moments a, Moments b) const {
        const float n = a.n + b.n, share = n > 0.0f ? b.n / n : 0.0f, apart = b.mean - a.mean;
        return Moments{n, a.mean + apart * share, a.squares + b.squares + apart * apart * a.n * share};
    }
};

// out = (inp - mean) * rstd * weight + bias over each row; in PyTorch: F.layer_norm(inp, (C,), weight, bias, eps)
// out (rows, C), mean (rows), rstd (rows), weight (C), bias (C); row r of inp begins at inp + r*stride.
// The row is read three times, from cache after the first. Keep: DropIT's masking of out, where it is recomputed for a weight gradient alone
#define LAYERNORM_EPS 1e-6f
template <int V, int LANES, class Keep> __global__ void layernorm_forward_kernel(floatX* out, float* mean, float* rstd, const floatX* inp,
        const floatX* weight, const floatX* bias, size_t rows, int C, size_t stride, Keep keep) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const floatX* row = inp + r * stride;
    float v[V], sum[V] = {0}, squares[V] = {0}, n = 0.0f;
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
        float w[V], b[V];
        load<V>(v, row + c);
        load<V>(w, weight + c);
        load<V>(b, bias + c);
        for (int j = 0; j < V; j++) { v[j] = (v[j] - m) * s * w[j] + b[j]; }
        keep.template apply<V>(v, r * C + c);
        store<V>(out + r * C + c, v);
    }
    if (first == 0) {
        mean[r] = m;
        rstd[r] = s;
    }
}

template <class Keep = KeepAll> void layernorm_forward(floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight,
                                                       const floatX* bias, size_t rows, size_t C, size_t stride, Keep keep = Keep()) {
    LAUNCH_ROWS(layernorm_forward_kernel, vectorizable(C | stride, out, inp, weight, bias), C, rows, out, mean, rstd, inp, weight, bias, rows,
                (int)C, stride, keep);
}

struct AddPairs {
    __device__ float2 operator()(float2 a, float2 b) const { return make_float2(a.x + b.x, a.y + b.y); }
};

// dinp += rstd * (g - mean(g) - norm * mean(g * norm)), with g = dout * weight and norm = (inp - mean) * rstd
// dinp and inp have rows `stride` apart, dout (rows, C). += : dinp is the gradient of the residual stream
template <int V, int LANES> __global__ void layernorm_backward_kernel(floatX* dinp, const floatX* dout, const floatX* inp, const floatX* weight,
                                                                      const float* mean, const float* rstd, size_t rows, int C, size_t stride) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const float m = mean[r], s = rstd[r];
    float x[V], g[V], w[V], sum[V] = {0}, norm_sum[V] = {0};
    for (int c = first; c < C; c += step) {
        load<V>(x, inp + r * stride + c);
        load<V>(g, dout + r * C + c);
        load<V>(w, weight + c);
        for (int j = 0; j < V; j++) {
            sum[j] += g[j] * w[j];
            norm_sum[j] += g[j] * w[j] * ((x[j] - m) * s);
        }
    }
    const float2 sums = cg::reduce(lanes, make_float2(total<V>(sum), total<V>(norm_sum)), AddPairs());
    const float g_mean = sums.x / C, gn_mean = sums.y / C;
    for (int c = first; c < C; c += step) {
        float d[V];
        load<V>(x, inp + r * stride + c);
        load<V>(g, dout + r * C + c);
        load<V>(w, weight + c);
        load<V>(d, dinp + r * stride + c);
        for (int j = 0; j < V; j++) { d[j] += s * (g[j] * w[j] - g_mean - (x[j] - m) * s * gn_mean); }
        store<V>(dinp + r * stride + c, d);
    }
}

// per slab of rows: partial[slab, c] = sum of dout * norm, partial[slab, C + c] = sum of dout. As column_sum_kernel
template <int V> __global__ void layernorm_weight_kernel(float* partial, const floatX* dout, const floatX* inp,
                                                         const float* mean, const float* rstd, size_t rows, int C, size_t stride) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const size_t packs = C / V, slab = i / packs, column = i % packs * V;
    if (slab * SLAB_ROWS < rows) {
        const size_t end = min((slab + 1) * SLAB_ROWS, rows);
        float dweight[V] = {0}, dbias[V] = {0};
        for (size_t r = slab * SLAB_ROWS; r < end; r++) {
            const float m = mean[r], s = rstd[r];
            float x[V], g[V];
            load<V>(x, inp + r * stride + column);
            load<V>(g, dout + r * C + column);
            for (int j = 0; j < V; j++) {
                dweight[j] += g[j] * ((x[j] - m) * s);
                dbias[j] += g[j];
            }
        }
        store<V>(partial + slab * 2*C + column, dweight);
        store<V>(partial + slab * 2*C + C + column, dbias);
    }
}

// partial holds 2 * column_sum_scratch(rows, C) floats
void layernorm_backward(floatX* dinp, float* dweight, float* dbias, float* partial, const floatX* dout, const floatX* inp,
                        const floatX* weight, const float* mean, const float* rstd, size_t rows, size_t C, size_t stride) {
    const size_t slabs = CEIL_DIV(rows, (size_t)SLAB_ROWS);
    const bool vector = vectorizable(C | stride, dinp, dout, inp, weight);
    if (vector) {
        layernorm_weight_kernel<VEC><<<CEIL_DIV(slabs * C / VEC, (size_t)64), 64, 0, main_stream>>>(partial, dout, inp, mean, rstd, rows,
                                                                                                 (int)C, stride);
    } else {
        layernorm_weight_kernel<1><<<CEIL_DIV(slabs * C, (size_t)64), 64, 0, main_stream>>>(partial, dout, inp, mean, rstd, rows, (int)C,
                                                                                           stride);
    }
    LAUNCH_ROWS(layernorm_backward_kernel, vector, C, rows, dinp, dout, inp, weight, mean, rstd, rows, (int)C, stride);
    column_sum_finish_kernel<<<CEIL_DIV(2*C, (size_t)64), 64, 0, main_stream>>>(dweight, dbias, partial, slabs, (int)C, (int)(2*C));
    kernelCheck();
}

// out = x * Phi(x), Phi the normal distribution function; in PyTorch: F.gelu(inp). out, inp (n), V elements a thread. Keep: as for LayerNorm
template <int V, class Keep> __global__ void gelu_forward_kernel(floatX* out, const floatX* inp, size_t n, Keep keep) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        float x[V];
        load<V>(x, inp + i);
        for (int j = 0; j < V; j++) { x[j] = 0.5f * x[j] * (1.0f + erff(x[j] * 0.70710678f)); }
        keep.template apply<V>(x, i);
        store<V>(out + i, x);
    }
}

// dinp = dinp * (Phi(x) + x * phi(x)), in place, phi the normal density
template <int V> __global__ void gelu_backward_kernel(floatX* dinp, const floatX* inp, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        float x[V], d[V];
        load<V>(x, inp + i);
        load<V>(d, dinp + i);
        for (int j = 0; j < V; j++) {
            d[j] *= 0.5f * (1.0f + erff(x[j] * 0.70710678f)) + x[j] * 0.39894228f * expf(-0.5f * x[j] * x[j]);
        }
        store<V>(dinp + i, d);
    }
}

template <class Keep = KeepAll> void gelu_forward(floatX* out, const floatX* inp, size_t n, Keep keep = Keep()) {
    if (vectorizable(n, out, inp)) {
        gelu_forward_kernel<VEC><<<CEIL_DIV(n / VEC, (size_t)256), 256, 0, main_stream>>>(out, inp, n, keep);
    } else {
        gelu_forward_kernel<1><<<CEIL_DIV(n, (size_t)256), 256, 0, main_stream>>>(out, inp, n, keep);
    }
    kernelCheck();
}

void gelu_backward(floatX* dinp, const floatX* inp, size_t n) {
    if (vectorizable(n, dinp, inp)) {
        gelu_backward_kernel<VEC><<<CEIL_DIV(n / VEC, (size_t)256), 256, 0, main_stream>>>(dinp, inp, n);
    } else {
        gelu_backward_kernel<1><<<CEIL_DIV(n, (size_t)256), 256, 0, main_stream>>>(dinp, inp, n);
    }
    kernelCheck();
}

// Attention of one chunk of images, as batched matrix products over (image, head) with softmax between them.
// No T x T matrix outlives its chunk: the forward pass saves the log-sum-exp of each row of scores, and the backward
// pass rebuilds the probabilities from it. Rows of T x T matrices are `ld` elements apart, T rounded up to 8, so that they
// can be read in packs; the columns from T on are never read as values.
typedef struct {
    int heads, T, HS, ld, max_images;
    float* scores;  // (images, NH, T, ld) q @ k^T / sqrt(HS)
    floatX* probs;  // (images, NH, T, ld) softmax of scores; in fp32 the same memory as scores
    float* dprobs;  // (images, NH, T, ld) gradient of probs
    floatX* dscores; // (images, NH, T, ld) gradient of scores; in fp32 the same memory as dprobs
    void** pointers; // (NUM_ATTENTION_POINTERS, images*NH) where each head's matrices begin
} Attention;

enum { PTR_Q, PTR_K, PTR_V, PTR_OUT, PTR_SCORES, PTR_PROBS, PTR_DQ, PTR_DK, PTR_DV, PTR_DPROBS, PTR_DSCORES, NUM_ATTENTION_POINTERS };

// one thread a (image, head). qkv and dqkv are (images, T, 3, NH, HS), out is (images, T, NH, HS)
__global__ void attention_pointers_kernel(Attention a, floatX* qkv, floatX* out, floatX* dqkv, int images) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, count = a.max_images * a.heads;
    if (i < images * a.heads) {
        const size_t C = (size_t)a.heads * a.HS, image = i / a.heads, head = i % a.heads;
        const size_t q = image * a.T * 3 * C + head * a.HS, square = (size_t)i * a.T * a.ld;
        a.pointers[PTR_Q * count + i] = qkv + q;
        a.pointers[PTR_K * count + i] = qkv + q + C;
        a.pointers[PTR_V * count + i] = qkv + q + 2 * C;
        a.pointers[PTR_OUT * count + i] = out + image * a.T * C + head * a.HS;
        a.pointers[PTR_SCORES * count + i] = a.scores + square;
        a.pointers[PTR_PROBS * count + i] = a.probs + square;
        if (dqkv != NULL) {
            a.pointers[PTR_DQ * count + i] = dqkv + q;
            a.pointers[PTR_DK * count + i] = dqkv + q + C;
            a.pointers[PTR_DV * count + i] = dqkv + q + 2 * C;
            a.pointers[PTR_DPROBS * count + i] = a.dprobs + square;
            a.pointers[PTR_DSCORES * count + i] = a.dscores + square;
        }
    }
}

// the largest of some scores, and the sum of exp(score - largest). No -INFINITY: a lane without scores joins as (-FLT_MAX, 0)
typedef struct {
    float largest, sum;
} ExpSum;

// one comparison, where fmaxf takes care of NaNs: here they show in the sum
__device__ inline float larger(float a, float b) { return a > b ? a : b; }

struct JoinExpSums {
    __device__ ExpSum operator()(ExpSum a, ExpSum b) const {
        const float m = larger(a.largest, b.largest);
        return ExpSum{m, a.sum * expf(a.largest - m) + b.sum * expf(b.largest - m)};
    }
};

// lse = log of the sum of exp over a row; probs = exp(scores - lse), the expression that the backward pass repeats
// scores, probs (rows, ld), lse (rows). Columns from T to ld are padding: read with the pack they are in, never used
template <int V, int LANES> __global__ void softmax_forward_kernel(floatX* probs, float* lse, const float* scores, size_t rows, int T, int ld) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const float* row = scores + r * ld;
    float v[V], largest[V], sum[V] = {0};
    for (int j = 0; j < V; j++) { largest[j] = -FLT_MAX; }
    for (int c = first; c < T; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) { largest[j] = larger(c + j < T ? v[j] : -FLT_MAX, largest[j]); }
    }
    for (int half = V / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; j++) { largest[j] = larger(largest[j + half], largest[j]); }
    }
    for (int c = first; c < T; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) {
            const float e = expf(v[j] - largest[0]);
            sum[j] += c + j < T ? e : 0.0f;
        }
    }
    const ExpSum all = cg::reduce(lanes, ExpSum{largest[0], total<V>(sum)}, JoinExpSums());
    const float log_sum = all.largest + logf(all.sum);
    for (int c = first; c < T; c += step) {
        load<V>(v, row + c);
        for (int j = 0; j < V; j++) { v[j] = expf(v[j] - log_sum); }
        store<V>(probs + r * ld + c, v);
    }
    if (first == 0) { lse[r] = log_sum; }
}

// probs = exp(scores - lse); dscores = probs * (dprobs - sum over the row of probs * dprobs). That sum is the one of
// dout * out over the head, so the backward pass needs no output of attention
template <int V, int LANES> __global__ void softmax_backward_kernel(floatX* probs, floatX* dscores, const float* scores, const float* dprobs,
                                                                    const float* lse, size_t rows, int T, int ld) {
    auto lanes = cg::tiled_partition<LANES>(cg::this_thread_block());
    const size_t r = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (r >= rows) { return; }
    const int first = (int)lanes.thread_rank() * V, step = LANES * V;
    const float log_sum = lse[r];
    float p[V], d[V], sum[V] = {0};
    for (int c = first; c < T; c += step) {
        load<V>(p, scores + r * ld + c);
        load<V>(d, dprobs + r * ld + c);
        for (int j = 0; j < V; j++) {
            const float e = expf(p[j] - log_sum) * d[j];
            sum[j] += c + j < T ? e : 0.0f;
        }
    }
    const float row_sum = cg::reduce(lanes, total<V>(sum), cg::plus<float>());
    for (int c = first; c < T; c += step) {
        load<V>(p, scores + r * ld + c);
        load<V>(d, dprobs + r * ld + c);
        for (int j = 0; j < V; j++) {
            p[j] = expf(p[j] - log_sum);
            d[j] = p[j] * (d[j] - row_sum);
        }
        store<V>(probs + r * ld + c, p);
        store<V>(dscores + r * ld + c, d);
    }
}

// column-major D = alpha * op(A) @ op(B) for every head of a chunk
void attention_matmul(const Attention* a, int images, int D, int A, int B, bool transA, bool transB, int m, int n, int k, float alpha,
                      int lda, int ldb, int ldd, cudaDataType_t D_type) {
    const float zero = 0.0f;
    const size_t count = (size_t)a->max_images * a->heads;
    cublasCheck(cublasGemmBatchedEx(cublas_handle, transA ? CUBLAS_OP_T : CUBLAS_OP_N, transB ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &alpha,
        (const void* const*)(a->pointers + A * count), CUDA_FLOATX, lda, (const void* const*)(a->pointers + B * count), CUDA_FLOATX, ldb, &zero,
        (void* const*)(a->pointers + D * count), D_type, ldd, images * a->heads, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

void attention_pointers(const Attention* a, floatX* qkv, floatX* out, floatX* dqkv, int images) {
    attention_pointers_kernel<<<CEIL_DIV(images * a->heads, 64), 64, 0, main_stream>>>(*a, qkv, out, dqkv, images);
    kernelCheck();
}

// scores (T_q, T_k) = q @ k^T / sqrt(HS); row-major matrices, that cuBLAS sees as their transposes
void attention_scores(const Attention* a, int images) {
    const int row = 3 * a->heads * a->HS; // of qkv
    attention_matmul(a, images, PTR_SCORES, PTR_K, PTR_Q, true, false, a->T, a->T, a->HS, 1.0f / sqrtf((float)a->HS), row, row, a->ld, CUDA_R_32F);
}

// out = softmax(q @ k^T / sqrt(HS)) @ v for each head; in PyTorch: F.scaled_dot_product_attention(q, k, v)
// out (images, T, C), lse (images, NH, T), qkv (images, T, 3C)
void attention_forward(floatX* out, float* lse, floatX* qkv, const Attention* a, int images) {
    const int T = a->T, C = a->heads * a->HS;
    const size_t rows = (size_t)images * a->heads * T;
    attention_pointers(a, qkv, out, NULL, images);
    attention_scores(a, images);
    LAUNCH_ROWS(softmax_forward_kernel, true, T, rows, a->probs, lse, a->scores, rows, T, a->ld); // rows are padded to whole packs
    attention_matmul(a, images, PTR_OUT, PTR_V, PTR_PROBS, false, false, a->HS, T, T, 1.0f, 3 * C, a->ld, C, CUDA_FLOATX);
}

// dqkv (images, T, 3C) from dout (images, T, C), qkv and lse
void attention_backward(floatX* dqkv, floatX* dout, floatX* qkv, const float* lse, const Attention* a, int images) {
    const int T = a->T, C = a->heads * a->HS, HS = a->HS, ld = a->ld;
    const size_t rows = (size_t)images * a->heads * T;
    const float scale = 1.0f / sqrtf((float)HS);
    attention_pointers(a, qkv, dout, dqkv, images); // PTR_OUT is dout here
    attention_scores(a, images);
    attention_matmul(a, images, PTR_DPROBS, PTR_V, PTR_OUT, true, false, T, T, HS, 1.0f, 3 * C, C, ld, CUDA_R_32F);          // dout @ v^T
    LAUNCH_ROWS(softmax_backward_kernel, true, T, rows, a->probs, a->dscores, a->scores, a->dprobs, lse, rows, T, ld);
    attention_matmul(a, images, PTR_DV, PTR_OUT, PTR_PROBS, false, true, HS, T, T, 1.0f, C, ld, 3 * C, CUDA_FLOATX);         // probs^T @ dout
    attention_matmul(a, images, PTR_DQ, PTR_K, PTR_DSCORES, false, false, HS, T, T, scale, 3 * C, ld, 3 * C, CUDA_FLOATX);   // dscores @ k
    attention_matmul(a, images, PTR_DK, PTR_Q, PTR_DSCORES, false, true, HS, T, T, scale, 3 * C, ld, 3 * C, CUDA_FLOATX);    // dscores^T @ q
}

// ----------------------------------------------------------------------------
// the model: its tables, its memory

typedef struct {
    int image_size, patch_size, image_channels, num_classes;
    int channels, depth, heads;
} DeitConfig;

typedef struct {
    const char* name;
    DeitConfig config;
} DeitPreset;

static const DeitPreset deit_presets[] = {
    {"deit_nano",  {28,  4,  1, 10,   64,  4,  4}}, // for the bundled data
    {"deit_tiny",  {224, 16, 3, 1000, 192, 12, 3}},
    {"deit_small", {224, 16, 3, 1000, 384, 12, 6}},
    {"deit_base",  {224, 16, 3, 1000, 768, 12, 12}},
    {"vit_base",   {224, 16, 3, 1000, 768, 12, 12}},
};

enum { INIT_ZERO, INIT_ONE, INIT_NORMAL, INIT_TINY, INIT_FAN_IN };

// X(name, name in timm, copies, shape of one copy, weight decay, initial value). timm initialises linear layers and positions
// from a normal distribution of 0.02, the patch embedding as any convolution: uniform up to 1/sqrt(fan-in)
#define PARAMETERS(X) \
    X(patchw, "patch_embed.proj.weight",   1, (C, CH, P, P), 1, INIT_FAN_IN) \
    X(patchb, "patch_embed.proj.bias",     1, (C),           0, INIT_FAN_IN) \
    X(cls,    "cls_token",                 1, (1, 1, C),     0, INIT_TINY)   \
    X(pos,    "pos_embed",                 1, (1, T, C),     0, INIT_NORMAL) \
    X(ln1w,   "blocks.%d.norm1.weight",    L, (C),           0, INIT_ONE)    \
    X(ln1b,   "blocks.%d.norm1.bias",      L, (C),           0, INIT_ZERO)   \
    X(qkvw,   "blocks.%d.attn.qkv.weight", L, (3*C, C),      1, INIT_NORMAL) \
    X(qkvb,   "blocks.%d.attn.qkv.bias",   L, (3*C),         0, INIT_ZERO)   \
    X(projw,  "blocks.%d.attn.proj.weight", L, (C, C),       1, INIT_NORMAL) \
    X(projb,  "blocks.%d.attn.proj.bias",  L, (C),           0, INIT_ZERO)   \
    X(ln2w,   "blocks.%d.norm2.weight",    L, (C),           0, INIT_ONE)    \
    X(ln2b,   "blocks.%d.norm2.bias",      L, (C),           0, INIT_ZERO)   \
    X(fc1w,   "blocks.%d.mlp.fc1.weight",  L, (4*C, C),      1, INIT_NORMAL) \
    X(fc1b,   "blocks.%d.mlp.fc1.bias",    L, (4*C),         0, INIT_ZERO)   \
    X(fc2w,   "blocks.%d.mlp.fc2.weight",  L, (C, 4*C),      1, INIT_NORMAL) \
    X(fc2b,   "blocks.%d.mlp.fc2.bias",    L, (C),           0, INIT_ZERO)   \
    X(lnfw,   "norm.weight",               1, (C),           0, INIT_ONE)    \
    X(lnfb,   "norm.bias",                 1, (C),           0, INIT_ZERO)   \
    X(headw,  "head.weight",               1, (V, C),        1, INIT_NORMAL) \
    X(headb,  "head.bias",                 1, (V),           0, INIT_ZERO)

// X(name, type, copies, shape of one copy, level, cache)
//   level: the tensor is recomputed, and not cached, at -r level and above. NEVER: always cached
//   KEEP:  stored dense, as it is
//   DROP:  the input of a linear layer that the backward pass reads for the weight gradient alone: stored by DropIT
//   ALL:   the same, but the published DropIT leaves it dense; DROP under -g_all 1
#define NEVER 4
#define ACTIVATIONS(X) \
    X(patches,   floatX, 1,   (B, T-1, CH*P*P), NEVER, ALL)  /* input of the patch embedding */ \
    X(residual,  floatX, L+1, (B, T, C),        NEVER, KEEP) /* input of each block, output of the last */ \
    X(ln1_mean,  float,  L,   (B, T),           3,     KEEP) \
    X(ln1_rstd,  float,  L,   (B, T),           3,     KEEP) \
    X(ln1,       floatX, L,   (B, T, C),        1,     DROP) /* input of the qkv linear */ \
    X(qkv,       floatX, L,   (B, T, 3*C),      2,     KEEP) /* input of attention */ \
    X(lse,       float,  L,   (B, NH, T),       3,     KEEP) /* log-sum-exp of the rows of scores */ \
    X(atty,      floatX, L,   (B, T, C),        3,     DROP) /* output of attention, input of the projection */ \
    X(residual2, floatX, L,   (B, T, C),        3,     KEEP) /* residual after attention */ \
    X(ln2_mean,  float,  L,   (B, T),           3,     KEEP) \
    X(ln2_rstd,  float,  L,   (B, T),           3,     KEEP) \
    X(ln2,       floatX, L,   (B, T, C),        1,     DROP) /* input of fc1 */ \
    X(fch,       floatX, L,   (B, T, 4*C),      2,     KEEP) /* output of fc1, input of GELU */ \
    X(fch_gelu,  floatX, L,   (B, T, 4*C),      1,     DROP) /* input of fc2 */ \
    X(lnf_mean,  float,  1,   (B),              NEVER, KEEP) \
    X(lnf_rstd,  float,  1,   (B),              NEVER, KEEP) \
    X(lnf,       floatX, 1,   (B, C),           NEVER, ALL)  /* input of the head */ \
    X(logits,    floatX, 1,   (B, V),           NEVER, KEEP) /* and their gradient, in the same place */

enum { KEEP, DROP, ALL };

// one line of ACTIVATIONS, with the memory that holds it
typedef struct {
    const char* name;
    size_t n, per_image;    // elements of one copy, of one image
    size_t element;         // bytes of one element
    int copies;
    bool cached, dropped;   // stored for the backward pass; chosen from by DropIT
    int id;                 // of copy 0 among all dropped tensors, for the random strategy; copy l has id + 4*l
    char* data;             // cached and not dropped: (copies, n), each copy 256 bytes aligned
    char* batch;            // dropped: the whole tensor until its elements are chosen; one, or under -stats all copies
    char* chunk;            // recomputed or dropped: what the backward pass (forward, if not dropped) works on
    Dropped dropit;         // dropped: copy 0; the others follow at these strides:
    size_t thresholds, segments, words, values;
} Activation;

enum {
#define X(name, ...) PARAM_##name,
    PARAMETERS(X)
#undef X
    NUM_PARAMETER_TENSORS
};
enum {
#define X(name, ...) ACT_##name,
    ACTIVATIONS(X)
#undef X
    NUM_ACTIVATION_TENSORS
};

typedef struct {
    const char* name; // in timm; %d is the copy
    int copies, dims, init;
    bool decay;
    size_t shape[4];
    size_t n;         // elements of one copy; copies follow one another
    size_t offset;    // of copy 0 in the memory of parameters, gradients, moments and masters alike
} ParameterSpec;

typedef struct {
#define X(name, ...) floatX* name;
    PARAMETERS(X)
#undef X
} ParameterTensors;

typedef struct {
#define X(name, ...) float* name;
    PARAMETERS(X)
#undef X
} GradientTensors;

typedef struct {
#define X(name, ...) Activation name;
    ACTIVATIONS(X)
#undef X
} ActivationTensors;

typedef struct {
    DeitConfig config;
    size_t B;                // largest batch
    double gamma;            // DropIT: fraction dropped; 0: off
    int strategy;            // MINK, FASTMINK, RANDOM
    bool drop_all;           // also in the patch embedding and the head
    int recompute;           // -r: 0 to 3
    bool adamw;              // two moments, else one
    bool sharded;            // -z 1: each rank holds its part of the optimizer's states (ZeRO-1, Rajbhandari et al., SC 2020)
    bool stats;              // -stats: exact inputs are kept beside the dropped ones
    size_t chunk_bytes;      // size of fch_gelu, the widest tensor of a block, in one chunk
    unsigned long long seed;
} DeitOptions;

#define DEFAULT_CHUNK_BYTES ((size_t)32 << 20)
#define STATS_SUMS 24 // six for each linear of a block

typedef struct {
    DeitOptions options;
    size_t T, chunk_images;
    ParameterSpec specs[NUM_PARAMETER_TENSORS];
    size_t num_parameters, num_decayed; // elements with padding; the decayed tensors come first
    size_t shard_begin, shard_n; // of the parameters that this rank updates; all unless sharded
    ParameterTensors params;
    GradientTensors grads;
    ActivationTensors acts;
    floatX* params_memory;
    float* grads_memory;
    float *master, *m, *v; // (shard_n); in fp32 master is the shard in params_memory; v is NULL for SGD
    // scratch
    uint8_t* images;   // (B, S, S, CH) of the next batch
    int *next_labels, *flips; // (B) of the next batch
    int *labels, *ranks; // (B)
    float* losses;     // (B)
    StepResult* result;
    double* norm_partial;
    floatX *tokens, *dresidual, *dbranch, *dqkv, *dfch, *dlnf;
    float* partial;    // of column sums
    Attention attention;
    DropScratch drop_scratch;
    float *stats_exact, *stats_kept; // weight gradients of one block, under -stats
    double* stats_sums;
    Plan plan;
    const char* too_large; // a dropped tensor of 2^32 elements or more: indices have 32 bits
    char* blocks[NUM_CATEGORIES];
    unsigned drop_step; // counts forward passes of training, for the random strategy
    bool stats_now;     // this step reports
    bool add_ranks;     // the gradients are complete after this backward pass: add them up over the ranks
} DeitModel;

template <class... Dims> void set_shape(ParameterSpec* s, Dims... dims) {
    const size_t shape[] = {(size_t)dims...};
    s->dims = sizeof...(dims);
    for (int i = 0; i < s->dims; i++) { s->shape[i] = shape[i]; }
    s->n = numel(dims...);
}
#define IN_PARENTHESES(...) __VA_ARGS__

// lays out the parameters: decayed tensors first, each 256 bytes aligned in floatX and in fp32
void deit_parameter_specs(DeitModel* model) {
    const DeitConfig c = model->options.config;
    const size_t C = c.channels, L = c.depth, V = c.num_classes, CH = c.image_channels, P = c.patch_size, T = model->T;
    int n = 0;
#define X(field, timm, copies_, shape_, decay_, init_) { \
        ParameterSpec* s = &model->specs[n++]; \
        s->name = timm; \
        s->copies = (int)(copies_); \
        s->decay = decay_; \
        s->init = init_; \
        set_shape(s, IN_PARENTHESES shape_); }
    PARAMETERS(X)
#undef X
    size_t offset = 0;
    for (int decay = 1; decay >= 0; decay--) {
        for (int i = 0; i < n; i++) {
            ParameterSpec* s = &model->specs[i];
            if (s->decay != (decay == 1)) { continue; }
            s->offset = offset;
            offset += CEIL_DIV(s->copies * s->n, (size_t)128) * 128;
        }
        if (decay == 1) { model->num_decayed = offset; }
    }
    const size_t shards = model->options.sharded ? num_ranks : 1;
    model->shard_n = CEIL_DIV(offset, 128 * shards) * 128;
    model->shard_begin = model->options.sharded ? rank * model->shard_n : 0;
    model->num_parameters = shards * model->shard_n;
}

void plan_activation(DeitModel* model, Activation* a, const char* name, const char* shape, size_t element, size_t copies, size_t n,
                     int level, int cache, int next_id[2]) {
    Plan* plan = &model->plan;
    const DeitOptions* o = &model->options;
    a->name = name;
    a->n = n;
    a->per_image = n / o->B;
    a->element = element;
    a->copies = (int)copies;
    a->cached = o->recompute < level;
    a->dropped = o->gamma > 0.0 && (cache == DROP || (cache == ALL && o->drop_all));
    const size_t dense = copies * align_up(n * element), chunk = model->chunk_images * a->per_image * element;
    if (!a->dropped) {
        if (a->cached) { plan_add(plan, CACHED, name, "", shape, &a->data, dense, dense); }
        else { plan_add(plan, SCRATCH, name, ".chunk", shape, &a->chunk, chunk, dense); }
        return;
    }
    if (n >= (size_t)1 << 32) { model->too_large = name; }
    Dropped* d = &a->dropit;
    a->id = next_id[cache == ALL]++;
    d->n = n;
    d->k = dropit_k(n, o->gamma, o->strategy);
    a->thresholds = o->strategy == MINK ? 1 : dropit_tiles(n);
    if (a->cached) {
        a->segments = dropit_segments(n);
        a->words = dropit_words(n);
        a->values = CEIL_DIV(d->k + 1, (size_t)128) * 128;
        plan_add(plan, CACHED, name, ".values", shape, &d->values, copies * a->values * element, dense);
        plan_add(plan, CACHED, name, ".bitmap", "1 bit an element", &d->bitmap, copies * a->words * sizeof(unsigned), 0);
        plan_add(plan, CACHED, name, ".offsets", "1 bit in 8 elements", &d->offsets, copies * a->segments * sizeof(unsigned), 0);
    }
    plan_add(plan, CACHED, name, ".threshold", "8 bytes a choice", &d->thresholds, copies * a->thresholds * sizeof(Threshold), a->cached ? 0 : dense);
    plan_add(plan, SCRATCH, name, ".batch", shape, &a->batch, (o->stats ? copies : 1) * align_up(n * element), 0);
    plan_add(plan, SCRATCH, name, ".chunk", shape, &a->chunk, chunk, 0);
}

// fills model->plan for model->options
void deit_plan(DeitModel* model) {
    const DeitOptions* o = &model->options;
    const DeitConfig c = o->config;
    Plan* plan = &model->plan;
    const size_t B = o->B, C = c.channels, L = c.depth, NH = c.heads, V = c.num_classes, CH = c.image_channels, P = c.patch_size;
    const size_t S = c.image_size, N = (S / P) * (S / P), T = N + 1;
    memset(plan, 0, sizeof(*plan));
    model->too_large = NULL;
    model->T = T;
    deit_parameter_specs(model);
    // chunks of nearly equal size, none above chunk_bytes where a single image is not
    size_t chunks = CEIL_DIV(B * T * 4*C * sizeof(floatX), o->chunk_bytes);
    if (chunks > B) { chunks = B; }
    const size_t I = model->chunk_images = CEIL_DIV(B, chunks);

    const size_t n = model->num_parameters;
    plan_add(plan, PARAMETERS_MEMORY, "parameters", "", "with padding", &model->params_memory, n * sizeof(floatX), n * sizeof(floatX));
    plan_add(plan, GRADIENTS, "gradients", "", "fp32", &model->grads_memory, n * sizeof(float), n * sizeof(float));
    const size_t shard = model->shard_n * sizeof(float);
    plan_add(plan, OPTIMIZER, "momentum", "", "fp32", &model->m, shard, n * sizeof(float));
    if (o->adamw) { plan_add(plan, OPTIMIZER, "second moment", "", "fp32", &model->v, shard, n * sizeof(float)); }
    if (sizeof(floatX) != sizeof(float)) {
        plan_add(plan, OPTIMIZER, "master weights", "", "fp32", &model->master, shard, n * sizeof(float));
    }

    // ids for the random strategy: 4 * block + (0 qkv, 1 proj, 2 fc1, 3 fc2), then the patch embedding, then the head
    int next_id[2] = {0, 4 * c.depth};
#define X(name, type, copies, shape, level, cache) \
    plan_activation(model, &model->acts.name, #name, #copies " x " #shape, sizeof(type), copies, numel shape, level, cache, next_id);
    ACTIVATIONS(X)
#undef X

    plan_add(plan, SCRATCH, "images", "", "(B, S, S, CH) bytes", &model->images, B * S * S * CH, 0);
    plan_add(plan, SCRATCH, "next labels", "", "(B)", &model->next_labels, B * sizeof(int), 0);
    plan_add(plan, SCRATCH, "labels", "", "(B)", &model->labels, B * sizeof(int), 0);
    plan_add(plan, SCRATCH, "flips", "", "(B)", &model->flips, B * sizeof(int), 0);
    plan_add(plan, SCRATCH, "ranks", "", "(B)", &model->ranks, B * sizeof(int), 0);
    plan_add(plan, SCRATCH, "losses", "", "(B)", &model->losses, B * sizeof(float), 0);
    plan_add(plan, SCRATCH, "result", "", "(1)", &model->result, sizeof(StepResult), 0);
    plan_add(plan, SCRATCH, "norm partials", "", "fp64", &model->norm_partial, NORM_BLOCKS * sizeof(double), 0);
    plan_add(plan, SCRATCH, "dresidual", "", "(B, T, C)", &model->dresidual, B * T * C * sizeof(floatX), 0);
    // I images in a chunk
    plan_add(plan, SCRATCH, "tokens", "", "(I, T-1, C)", &model->tokens, I * N * C * sizeof(floatX), 0);
    plan_add(plan, SCRATCH, "dbranch", "", "(I, T, C)", &model->dbranch, I * T * C * sizeof(floatX), 0);
    plan_add(plan, SCRATCH, "dqkv", "", "(I, T, 3*C)", &model->dqkv, I * T * 3*C * sizeof(floatX), 0);
    plan_add(plan, SCRATCH, "dfch", "", "(I, T, 4*C)", &model->dfch, I * T * 4*C * sizeof(floatX), 0);
    plan_add(plan, SCRATCH, "dlnf", "", "(B, C)", &model->dlnf, B * C * sizeof(floatX), 0);
    size_t partial = column_sum_scratch(I * T, 4*C);
    if (partial < 2 * column_sum_scratch(B, C)) { partial = 2 * column_sum_scratch(B, C); }
    if (partial < column_sum_scratch(B, V)) { partial = column_sum_scratch(B, V); }
    plan_add(plan, SCRATCH, "sum partials", "", "fp32", &model->partial, partial * sizeof(float), 0);

    Attention* a = &model->attention;
    a->heads = (int)NH;
    a->T = (int)T;
    a->HS = (int)(C / NH);
    a->ld = (int)(CEIL_DIV(T, (size_t)VEC) * VEC);
    a->max_images = (int)I;
    const size_t squares = I * NH * T * a->ld;
    plan_add(plan, SCRATCH, "scores", "", "(I, NH, T, T) fp32", &a->scores, squares * sizeof(float), 0);
    plan_add(plan, SCRATCH, "dprobs", "", "(I, NH, T, T) fp32", &a->dprobs, squares * sizeof(float), 0);
    if (sizeof(floatX) != sizeof(float)) {
        plan_add(plan, SCRATCH, "probs", "", "(I, NH, T, T)", &a->probs, squares * sizeof(floatX), 0);
        plan_add(plan, SCRATCH, "dscores", "", "(I, NH, T, T)", &a->dscores, squares * sizeof(floatX), 0);
    }
    plan_add(plan, SCRATCH, "head pointers", "", "(11, I, NH)", &a->pointers, NUM_ATTENTION_POINTERS * I * NH * sizeof(void*), 0);

    DropScratch* d = &model->drop_scratch;
    if (o->gamma > 0.0) {
        // of a block's four linears together, or of the patch embedding's
        const size_t n = B * T * C, patches = o->drop_all ? B * N * CH*P*P : 0;
        size_t tiles = 3 * dropit_tiles(n) + dropit_tiles(4 * n);
        size_t list = 3 * align_up(dropit_list_capacity(n)) + align_up(dropit_list_capacity(4 * n));
        if (tiles < dropit_tiles(patches)) { tiles = dropit_tiles(patches); }
        if (list < align_up(dropit_list_capacity(patches))) { list = align_up(dropit_list_capacity(patches)); }
        plan_add(plan, SCRATCH, "search", "", "(4)", &d->search, MAX_SELECTIONS * sizeof(TensorSearch), 0);
        plan_add(plan, SCRATCH, "histogram", "", "(4, 2048)", &d->histogram, MAX_SELECTIONS * DROPIT_BINS * sizeof(unsigned), 0);
        plan_add(plan, SCRATCH, "tile counts", "", "(tiles, 2)", &d->tile_counts, tiles * sizeof(uint2), 0);
        plan_add(plan, SCRATCH, "tile offsets", "", "(tiles)", &d->tile_offsets, tiles * sizeof(unsigned), 0);
        plan_add(plan, SCRATCH, "sample", "", "(4, 16384)", &d->sample, MAX_SELECTIONS * DROPIT_TILE * sizeof(floatX), 0);
        plan_add(plan, SCRATCH, "range", "", "(4, 2)", &d->range, MAX_SELECTIONS * 2 * sizeof(unsigned), 0);
        plan_add(plan, SCRATCH, "list values", "", "7 n/20 + 65536", &d->list_values, list * sizeof(floatX), 0);
        plan_add(plan, SCRATCH, "list indices", "", "7 n/20 + 65536", &d->list_indices, list * sizeof(unsigned), 0);
    }
    if (o->stats) {
        plan_add(plan, SCRATCH, "stats exact", "", "12 C^2 fp32", &model->stats_exact, 12 * C * C * sizeof(float), 0);
        plan_add(plan, SCRATCH, "stats kept", "", "12 C^2 fp32", &model->stats_kept, 12 * C * C * sizeof(float), 0);
        plan_add(plan, SCRATCH, "stats sums", "", "fp64", &model->stats_sums, STATS_SUMS * sizeof(double), 0);
    }
    plan_add(plan, SCRATCH, "cuBLAS workspace", "", "bytes", &cublas_workspace, CUBLAS_WORKSPACE, 0);
}

// the largest batch whose plan fits into `bytes`; 0: none
size_t deit_largest_batch(DeitOptions options, size_t bytes) {
    DeitModel* trial = (DeitModel*)calloc(1, sizeof(DeitModel));
    size_t fits = 0, limit = 64;
    // a larger batch may need less scratch, where it divides into smaller chunks: so no bisection, but a look at twice what fits
    for (size_t B = 1; B <= limit; B++) {
        options.B = B;
        trial->options = options;
        deit_plan(trial);
        if (plan_total(&trial->plan) <= bytes && trial->too_large == NULL) {
            fits = B;
            limit = 2 * B + 64;
        }
    }
    free(trial);
    return fits;
}

// allocates everything; fails with what is needed, what is there and what would fit
void deit_allocate(DeitModel* model) {
    deit_plan(model);
    require(model->too_large == NULL, "%s has 2^32 elements or more, too many for DropIT's 32-bit indices; use a smaller batch (-b)",
            model->too_large);
    size_t free_bytes, total_bytes;
    const size_t need = plan_total(&model->plan);
    cudaCheck(cudaMemGetInfo(&free_bytes, &total_bytes));
    require(need <= free_bytes, "%zu bytes of device memory are needed, %zu are free; the largest batch that fits is -b %zu, and -r %d or -g "
            "lower the need", need, free_bytes, deit_largest_batch(model->options, free_bytes), model->options.recompute < 3 ? 3 : 2);
    plan_allocate(&model->plan, model->blocks);
    cublasCheck(cublasSetWorkspace(cublas_handle, cublas_workspace, CUBLAS_WORKSPACE)); // else cuBLAS allocates its own, outside the plan
    if (sizeof(floatX) == sizeof(float)) {
        model->master = (float*)model->params_memory + model->shard_begin;
        model->attention.probs = (floatX*)model->attention.scores;
        model->attention.dscores = (floatX*)model->attention.dprobs;
    }
    int n = 0;
#define X(name, ...) \
    model->params.name = model->params_memory + model->specs[n].offset; \
    model->grads.name = model->grads_memory + model->specs[n].offset; \
    n++;
    PARAMETERS(X)
#undef X
    const size_t bytes = model->num_parameters * sizeof(float), shard_bytes = model->shard_n * sizeof(float);
    cudaCheck(cudaMemsetAsync(model->params_memory, 0, model->num_parameters * sizeof(floatX), main_stream)); // padding takes part in updates
    cudaCheck(cudaMemsetAsync(model->grads_memory, 0, bytes, main_stream));
    cudaCheck(cudaMemsetAsync(model->m, 0, shard_bytes, main_stream));
    if (model->v != NULL) { cudaCheck(cudaMemsetAsync(model->v, 0, shard_bytes, main_stream)); }
    cudaCheck(cudaMemsetAsync(model->result, 0, sizeof(StepResult), main_stream));
    model->drop_scratch.not_finite = &model->result->not_finite;
    cudaCheck(cudaStreamSynchronize(main_stream));
}

void deit_free(DeitModel* model) {
    for (int c = 0; c < NUM_CATEGORIES; c++) { cudaCheck(cudaFree(model->blocks[c])); }
}

// name of copy l of a parameter, as timm writes it
const char* parameter_name(const ParameterSpec* s, int l) {
    static char name[64];
    snprintf(name, sizeof(name), s->name, l);
    return name;
}

// copies host values (num_parameters) to the device, as masters and rounded
void deit_set_parameters(DeitModel* model, const float* values) {
    const size_t n = model->num_parameters;
    floatX* rounded = (floatX*)malloc(n * sizeof(floatX));
    require(rounded != NULL, "out of host memory for %zu parameters", n);
    for (size_t i = 0; i < n; i++) { rounded[i] = (floatX)values[i]; }
    cudaCheck(cudaMemcpy(model->params_memory, rounded, n * sizeof(floatX), cudaMemcpyHostToDevice));
    if (sizeof(floatX) != sizeof(float)) {
        cudaCheck(cudaMemcpy(model->master, values + model->shard_begin, model->shard_n * sizeof(float), cudaMemcpyHostToDevice));
    }
    free(rounded);
}

// initial values as timm chooses them, drawn by Philox(seed, RNG_INIT, tensor, element)
void deit_init_parameters(DeitModel* model) {
    float* values = (float*)calloc(model->num_parameters, sizeof(float));
    require(values != NULL, "out of host memory for %zu parameters", model->num_parameters);
    const double bound = 1.0 / sqrt((double)model->specs[PARAM_patchw].n / model->specs[PARAM_patchw].shape[0]);
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        for (size_t j = 0; j < s->copies * s->n; j++) {
            const uint4 u = philox(model->options.seed, RNG_INIT, i, j);
            values[s->offset + j] = (float)(s->init == INIT_ONE ? 1.0
                                          : s->init == INIT_NORMAL ? 0.02 * normal(u)
                                          : s->init == INIT_TINY ? 1e-6 * normal(u)
                                          : s->init == INIT_FAN_IN ? bound * (2.0 * uniform(u.x) - 1.0) : 0.0);
        }
    }
    deit_set_parameters(model, values);
    free(values);
}

// values (num_parameters) from a file, by timm's names with `prefix` before each: "" for weights, "param." in a dump, "exp_avg." for a
// moment. Returns how many tensors were read
int deit_read_tensors(const DeitModel* model, const Safetensors* st, const char* prefix, float* values) {
    int wrong = 0, found = 0;
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        for (int l = 0; l < s->copies; l++) {
            char name[96];
            snprintf(name, sizeof(name), "%s%s", prefix, parameter_name(s, l));
            const StTensor* t = safetensors_find(st, name);
            bool fits = t != NULL && strcmp(t->dtype, "F32") == 0 && t->dims == s->dims;
            for (int d = 0; fits && d < s->dims; d++) { fits = t->shape[d] == s->shape[d]; }
            if (fits) {
                memcpy(values + s->offset + l * s->n, safetensors_data(st, t), s->n * sizeof(float));
                found++;
                continue;
            }
            fprintf(stderr, "%s: %s: %s, expected F32 (", st->file.path, name, t == NULL ? "missing" : "has another type or shape");
            for (int d = 0; d < s->dims; d++) { fprintf(stderr, "%s%zu", d ? ", " : "", s->shape[d]); }
            fprintf(stderr, ")\n");
            wrong++;
        }
    }
    require(wrong == 0, "%s: %d tensors are missing or do not fit; check -m, -size, -patch, -chans and -classes", st->file.path, wrong);
    return found;
}

// CRC-32 of all weights
uint32_t deit_fingerprint(const DeitModel* model) {
    const size_t bytes = model->num_parameters * sizeof(floatX);
    void* values = malloc(bytes);
    require(values != NULL, "out of host memory for %zu parameters", model->num_parameters);
    cudaCheck(cudaMemcpy(values, model->params_memory, bytes, cudaMemcpyDeviceToHost));
    const uint32_t crc = crc_32(0, values, bytes);
    free(values);
    return crc;
}

void deit_ranks_agree(const DeitModel* model) {
    if (num_ranks > 1) { ranks_agree(deit_fingerprint(model), "weights"); }
}

// parameters by their timm names; a file without prefix must hold nothing else
void deit_load_parameters(DeitModel* model, const Safetensors* st, const char* prefix) {
    float* values = (float*)calloc(model->num_parameters, sizeof(float));
    require(values != NULL, "out of host memory for %zu parameters", model->num_parameters);
    const int found = deit_read_tensors(model, st, prefix, values);
    require(prefix[0] != 0 || st->num_tensors == found, "%s: %d of its tensors are not of this model; check -m, -size, -patch, -chans and -classes",
            st->file.path, st->num_tensors - found);
    deit_set_parameters(model, values);
    free(values);
}

// fp32 tensors of the device in one file, each set (its shard on each rank) under its prefix. All ranks call, rank 0 writes
void deit_write_tensors(const DeitModel* model, const char* path, const StMetadata* metadata, int num_metadata, const char* const* prefixes,
                        const float* const* sets, int num_sets) {
    const size_t n = model->num_parameters;
    float* values = (float*)malloc(num_sets * n * sizeof(float));
    StTensor* tensors = (StTensor*)calloc(num_sets * (size_t)NUM_PARAMETER_TENSORS * model->options.config.depth, sizeof(StTensor));
    const float** data = (const float**)malloc(num_sets * (size_t)NUM_PARAMETER_TENSORS * model->options.config.depth * sizeof(float*));
    require(values != NULL && tensors != NULL && data != NULL, "out of host memory for %zu parameters of %s", n, path);
    int count = 0;
    for (int set = 0; set < num_sets; set++) {
        const float* full = sets[set];
        if (model->options.sharded && num_ranks > 1) { // the gradients have been used: their memory takes the parts of all ranks
            ranks_gather(model->grads_memory, sets[set], model->shard_n * sizeof(float));
            full = model->grads_memory;
            cudaCheck(cudaStreamSynchronize(main_stream));
        }
        cudaCheck(cudaMemcpy(values + set * n, full, n * sizeof(float), cudaMemcpyDeviceToHost));
        for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
            const ParameterSpec* s = &model->specs[i];
            for (int l = 0; l < s->copies; l++) {
                StTensor* t = &tensors[count];
                snprintf(t->name, sizeof(t->name), "%s%s", prefixes[set], parameter_name(s, l));
                t->dims = s->dims;
                memcpy(t->shape, s->shape, s->dims * sizeof(size_t));
                data[count++] = values + set * n + s->offset + l * s->n;
            }
        }
    }
    if (rank == 0) { safetensors_write(path, metadata, num_metadata, tensors, data, count); }
    free(values);
    free(tensors);
    free(data);
}

// names of the optimizer's states in a checkpoint, as torch.optim has them; the second is AdamW's alone
void deit_state_names(const DeitModel* model, const char* names[2]) {
    names[0] = model->options.adamw ? "exp_avg." : "momentum_buffer.";
    names[1] = "exp_avg_sq.";
}

// writes the checkpoint of a step; metadata: what a resume compares. All ranks call, rank 0 writes
void deit_save(const DeitModel* model, const char* directory, int step, int keep, const StMetadata* metadata, int num_metadata) {
    char path[4200];
    const char* const no_prefix[] = {""};
    const char* names[2];
    const float* const master[] = {model->master};
    const float* const states[] = {model->m, model->v};
    deit_state_names(model, names);
    checkpoint_path(path, sizeof(path), directory, "model", step);
    deit_write_tensors(model, path, metadata, num_metadata, no_prefix, master, 1);
    checkpoint_path(path, sizeof(path), directory, "state", step);
    deit_write_tensors(model, path, metadata, num_metadata, names, states, model->v != NULL ? 2 : 1);
    if (rank == 0) { checkpoint_done(directory, step, keep); }
}

// reads the checkpoint of a step back; every entry of metadata must be as it is in the files, an empty one becomes what it is in the first
void deit_resume(DeitModel* model, const char* directory, int step, StMetadata* metadata, int num_metadata) {
    char path[4200];
    const char* names[2];
    float* const states[] = {model->m, model->v};
    deit_state_names(model, names);
    for (int file = 0; file < 2; file++) {
        checkpoint_path(path, sizeof(path), directory, file == 0 ? "model" : "state", step);
        Safetensors* st = safetensors_open(path);
        for (int i = 0; i < num_metadata; i++) {
            const char* was = safetensors_metadata(st, metadata[i].key);
            if (was != NULL && metadata[i].value[0] == 0) { strcpy(metadata[i].value, was); }
            require(was != NULL && strcmp(was, metadata[i].value) == 0, "%s was written with %s %s, not %s; resume with the flags of the run, or "
                    "start anew with another -o", path, metadata[i].key, was != NULL ? was : "unknown", metadata[i].value);
        }
        if (file == 0) { deit_load_parameters(model, st, ""); }
        for (int set = 0; file == 1 && set < (model->v != NULL ? 2 : 1); set++) {
            float* values = (float*)calloc(model->num_parameters, sizeof(float));
            require(values != NULL, "out of host memory for %zu parameters", model->num_parameters);
            deit_read_tensors(model, st, names[set], values);
            cudaCheck(cudaMemcpy(states[set], values + model->shard_begin, model->shard_n * sizeof(float), cudaMemcpyHostToDevice));
            free(values);
        }
        safetensors_close(st);
    }
}

// ----------------------------------------------------------------------------
// forward and backward passes

// where image b0 of copy l of an activation is written in the forward pass, or recomputed and read in the backward pass
char* activation_at(const DeitModel* model, const Activation* a, int l, size_t b0, bool backward) {
    if (a->cached && !a->dropped) { return a->data + l * align_up(a->n * a->element) + b0 * a->per_image * a->element; }
    if (a->dropped && !backward) { return a->batch + (model->options.stats ? l : 0) * align_up(a->n * a->element) + b0 * a->per_image * a->element; }
    return a->chunk;
}

Dropped dropped_copy(const Activation* a, int l) {
    Dropped d = a->dropit;
    d.thresholds += l * a->thresholds;
    if (a->cached) {
        d.offsets += l * a->segments;
        d.bitmap += l * a->words;
        d.values += l * a->values;
    }
    return d;
}

DropRule drop_rule(const DeitModel* model, const Activation* a, int l) {
    // tensors, and ranks, differ in what the random strategy draws
    const unsigned long long tensor = (unsigned long long)(a->id + 4 * l + 1) << 32 ^ (unsigned long long)rank << 48;
    return DropRule{model->options.strategy, model->options.seed ^ tensor, model->drop_step};
}

// chooses what is kept of copy l of up to MAX_SELECTIONS activations, once the whole tensors have been computed
void drop_activations(const DeitModel* model, std::initializer_list<const Activation*> activations, int l) {
    DropChoice choices[MAX_SELECTIONS];
    int count = 0;
    for (const Activation* a : activations) {
        if (a->dropped) { choices[count++] = {(const floatX*)activation_at(model, a, l, 0, false), dropped_copy(a, l), drop_rule(model, a, l)}; }
    }
    if (count > 0) { dropit_select(choices, count, &model->drop_scratch, model->options.gamma, main_stream); }
}

// is this activation recomputed for its weight gradient alone, so that the kernel that recomputes it can mask it? What linears read must be whole
bool masked_when_recomputed(const DeitModel* model, const Activation* a) {
    return a->dropped && !a->cached && model->options.strategy == MINK && (model->options.recompute == 1 || a == &model->acts.fch_gelu);
}

KeepLargest keep_largest(const Activation* a, int l, size_t b0) { return KeepLargest{dropped_copy(a, l).thresholds, b0 * a->per_image}; }

// Images b0 .. b0+nb-1 through block l. With recompute only what is not cached is computed, by the same calls: the same bits
void block_forward(DeitModel* model, int l, size_t b0, size_t nb, bool recompute) {
    const size_t C = model->options.config.channels, T = model->T, rows = nb * T;
    const ParameterTensors* p = &model->params;
    ActivationTensors* acts = &model->acts;
    const int level = recompute ? model->options.recompute : NEVER;
#define AT(type, name) ((type*)activation_at(model, &acts->name, l, b0, recompute))
    floatX* residual = AT(floatX, residual);
    floatX *ln1 = AT(floatX, ln1), *qkv = AT(floatX, qkv), *atty = AT(floatX, atty), *residual2 = AT(floatX, residual2);
    floatX *ln2 = AT(floatX, ln2), *fch = AT(floatX, fch), *fch_gelu = AT(floatX, fch_gelu);
    auto norm = [&](const Activation* a, floatX* out, float* mean, float* rstd, const floatX* inp, const floatX* weight, const floatX* bias) {
        if (level < 1) { return; }
        if (recompute && masked_when_recomputed(model, a)) {
            layernorm_forward(out, mean, rstd, inp, weight, bias, rows, C, C, keep_largest(a, l, b0));
        } else {
            layernorm_forward(out, mean, rstd, inp, weight, bias, rows, C, C);
        }
    };
    norm(&acts->ln1, ln1, AT(float, ln1_mean), AT(float, ln1_rstd), residual, p->ln1w + l*C, p->ln1b + l*C);
    if (level >= 2) { linear_forward(qkv, ln1, p->qkvw + l * 3*C*C, p->qkvb + l * 3*C, NULL, rows, C, 3*C); }
    if (level >= 3) { attention_forward(atty, AT(float, lse), qkv, &model->attention, (int)nb); }
    if (level >= 3) { linear_forward(residual2, atty, p->projw + l * C*C, p->projb + l*C, residual, rows, C, C); }
    norm(&acts->ln2, ln2, AT(float, ln2_mean), AT(float, ln2_rstd), residual2, p->ln2w + l*C, p->ln2b + l*C);
    if (level >= 2) { linear_forward(fch, ln2, p->fc1w + l * 4*C*C, p->fc1b + l * 4*C, NULL, rows, C, 4*C); }
    if (recompute && masked_when_recomputed(model, &acts->fch_gelu)) { gelu_forward(fch_gelu, fch, rows * 4*C, keep_largest(&acts->fch_gelu, l, b0)); }
    else if (level >= 1) { gelu_forward(fch_gelu, fch, rows * 4*C); }
#undef AT
    if (!recompute) {
        floatX* out = (floatX*)activation_at(model, &acts->residual, l + 1, b0, false);
        linear_forward(out, fch_gelu, p->fc2w + l * 4*C*C, p->fc2b + l*C, residual2, rows, 4*C, C);
    }
}

// logits of the n <= B images whose patches and labels are on the device. training: DropIT chooses from the cached inputs
void deit_forward(DeitModel* model, size_t n, bool training) {
    const DeitConfig c = model->options.config;
    const size_t C = c.channels, T = model->T, V = c.num_classes, K = (size_t)c.image_channels * c.patch_size * c.patch_size;
    const ParameterTensors* p = &model->params;
    ActivationTensors* acts = &model->acts;
    const size_t I = model->chunk_images;
    for (size_t b0 = 0; b0 < n; b0 += I) {
        const size_t nb = n - b0 < I ? n - b0 : I;
        const floatX* patches = (const floatX*)activation_at(model, &acts->patches, 0, b0, false);
        linear_forward(model->tokens, patches, p->patchw, p->patchb, NULL, nb * (T-1), K, C);
        floatX* out = (floatX*)activation_at(model, &acts->residual, 0, b0, false);
        embed(out, model->tokens, p->cls, p->pos, nb, T, C);
    }
    if (training) { drop_activations(model, {&acts->patches}, 0); }
    for (int l = 0; l < c.depth; l++) {
        for (size_t b0 = 0; b0 < n; b0 += I) { block_forward(model, l, b0, n - b0 < I ? n - b0 : I, false); }
        if (training) { drop_activations(model, {&acts->ln1, &acts->atty, &acts->ln2, &acts->fch_gelu}, l); }
    }
    // the head reads the class token alone, so the last norm is taken of that row only: rows T*C apart
    floatX* lnf = (floatX*)activation_at(model, &acts->lnf, 0, 0, false);
    layernorm_forward(lnf, (float*)acts->lnf_mean.data, (float*)acts->lnf_rstd.data,
                      (floatX*)activation_at(model, &acts->residual, c.depth, 0, false), p->lnfw, p->lnfb, n, C, T*C);
    linear_forward((floatX*)acts->logits.data, lnf, p->headw, p->headb, NULL, n, C, V);
    if (training) { drop_activations(model, {&acts->lnf}, 0); }
}

// sums[0] += sum of a*b, sums[1] += of a^2, sums[2] += of b^2. One block of 128 threads: for reports, not for speed
template <class T> __global__ void dot_kernel(double* sums, const T* a, const T* b, size_t n) {
    __shared__ double of[3][128];
    const int t = threadIdx.x;
    double ab = 0.0, aa = 0.0, bb = 0.0;
    for (size_t i = t; i < n; i += 128) {
        const double x = (float)a[i], y = (float)b[i];
        ab += x * y;
        aa += x * x;
        bb += y * y;
    }
    of[0][t] = ab;
    of[1][t] = aa;
    of[2][t] = bb;
    __syncthreads();
    if (t < 3) {
        for (int i = 0; i < 128; i++) { sums[t] += of[t][i]; }
    }
}

// -stats, for the four linears of a block: where each keeps its weight gradients in units of C^2, and their size
static const int stats_offset[4] = {0, 3, 4, 8}, stats_size[4] = {3, 1, 4, 4};

void stats_clear(DeitModel* model) {
    const size_t bytes = 12 * sizeof(float) * model->options.config.channels * model->options.config.channels;
    cudaCheck(cudaMemsetAsync(model->stats_kept, 0, bytes, main_stream));
    cudaCheck(cudaMemsetAsync(model->stats_exact, 0, bytes, main_stream));
    cudaCheck(cudaMemsetAsync(model->stats_sums, 0, STATS_SUMS * sizeof(double), main_stream));
}

// adds a chunk: x as DropIT has it, exact as it was; x and exact (rows, C), dout (rows, OC)
void stats_add(DeitModel* model, const Activation* a, const floatX* x, const floatX* exact, const floatX* dout, size_t rows,
               size_t C, size_t OC) {
    const size_t offset = stats_offset[a->id] * (size_t)model->options.config.channels * model->options.config.channels;
    linear_backward_weight(model->stats_kept + offset, dout, x, rows, C, OC);
    linear_backward_weight(model->stats_exact + offset, dout, exact, rows, C, OC);
    dot_kernel<floatX><<<1, 128, 0, main_stream>>>(model->stats_sums + 6 * a->id, x, exact, rows * C);
    kernelCheck();
}

// prints what DropIT kept of the inputs of block l, and what that does to its weight gradients
void stats_report(DeitModel* model, int l) {
    const Activation* const inputs[4] = {&model->acts.ln1, &model->acts.atty, &model->acts.ln2, &model->acts.fch_gelu};
    const size_t square = (size_t)model->options.config.channels * model->options.config.channels;
    double sums[STATS_SUMS];
    for (int i = 0; i < 4; i++) {
        dot_kernel<float><<<1, 128, 0, main_stream>>>(model->stats_sums + 6 * i + 3, model->stats_kept + stats_offset[i] * square,
                                                      model->stats_exact + stats_offset[i] * square, stats_size[i] * square);
        kernelCheck();
    }
    cudaCheck(cudaMemcpyAsync(sums, model->stats_sums, sizeof(sums), cudaMemcpyDeviceToHost, main_stream));
    cudaCheck(cudaStreamSynchronize(main_stream));
    for (int i = 0; i < 4; i++) {
        const double *x = sums + 6 * i, *dw = x + 3;
        printf("stats block %2d %-8s | kept %6.2f %% of the elements, %6.2f %% of the sum of squares | cosine of dW with the exact %.4f\n",
               l, inputs[i]->name, 100.0 * inputs[i]->dropit.k / inputs[i]->dropit.n, 100.0 * x[1] / x[2], dw[0] / sqrt(dw[1] * dw[2]));
    }
}

// dweight (OC, C) += dout^T @ X, dbias (OC) += sum of dout, for images b0 .. b0+nb-1 with `tokens` rows each.
// X is copy l of the activation as the backward pass has it: dense, unpacked, or recomputed and masked
void weight_gradient(DeitModel* model, const Activation* a, int l, float* dweight, float* dbias, const floatX* dout,
                     size_t b0, size_t nb, size_t tokens, size_t C, size_t OC) {
    floatX* x = (floatX*)activation_at(model, a, l, b0, true);
    if (a->dropped) {
        const Dropped d = dropped_copy(a, l);
        const size_t begin = b0 * a->per_image, end = (b0 + nb) * a->per_image;
        if (a->cached) { dropit_unpack(x, &d, begin, end, main_stream); }
        else if (!masked_when_recomputed(model, a)) { dropit_mask(x, &d, begin, end, drop_rule(model, a, l), main_stream); }
        if (model->stats_now && a->id < 4) { // of the blocks, not of patch embedding and head
            stats_add(model, a, x, (const floatX*)activation_at(model, a, l, b0, false), dout, nb * tokens, C, OC);
        }
    }
    linear_backward_weight(dweight, dout, x, nb * tokens, C, OC);
    column_sum(dbias, dout, model->partial, nb * tokens, OC);
}

// gradients of block l for images b0 .. b0+nb-1; dresidual holds the gradient of the block's output, and then of its input
void block_backward(DeitModel* model, int l, size_t b0, size_t nb) {
    const size_t C = model->options.config.channels, T = model->T, rows = nb * T;
    const ParameterTensors* p = &model->params;
    const GradientTensors* g = &model->grads;
    ActivationTensors* acts = &model->acts;
    floatX *dres = model->dresidual + b0 * T*C, *dbranch = model->dbranch, *dqkv = model->dqkv, *dfch = model->dfch;
    block_forward(model, l, b0, nb, true);
#define AT(type, name) ((type*)activation_at(model, &acts->name, l, b0, true))
    // the mlp: residual + fc2(gelu(fc1(ln2(residual2))))
    weight_gradient(model, &acts->fch_gelu, l, g->fc2w + l * 4*C*C, g->fc2b + l*C, dres, b0, nb, T, 4*C, C);
    linear_backward_input(dfch, dres, p->fc2w + l * 4*C*C, rows, 4*C, C);
    gelu_backward(dfch, AT(floatX, fch), rows * 4*C);
    weight_gradient(model, &acts->ln2, l, g->fc1w + l * 4*C*C, g->fc1b + l * 4*C, dfch, b0, nb, T, C, 4*C);
    linear_backward_input(dbranch, dfch, p->fc1w + l * 4*C*C, rows, C, 4*C);
    layernorm_backward(dres, g->ln2w + l*C, g->ln2b + l*C, model->partial, dbranch, AT(floatX, residual2), p->ln2w + l*C,
                       AT(float, ln2_mean), AT(float, ln2_rstd), rows, C, C);
    // attention: residual + proj(attention(qkv(ln1(residual))))
    weight_gradient(model, &acts->atty, l, g->projw + l * C*C, g->projb + l*C, dres, b0, nb, T, C, C);
    linear_backward_input(dbranch, dres, p->projw + l * C*C, rows, C, C);
    attention_backward(dqkv, dbranch, AT(floatX, qkv), AT(float, lse), &model->attention, (int)nb);
    weight_gradient(model, &acts->ln1, l, g->qkvw + l * 3*C*C, g->qkvb + l * 3*C, dqkv, b0, nb, T, C, 3*C);
    linear_backward_input(dbranch, dqkv, p->qkvw + l * 3*C*C, rows, C, 3*C);
    layernorm_backward(dres, g->ln1w + l*C, g->ln1b + l*C, model->partial, dbranch, AT(floatX, residual), p->ln1w + l*C,
                       AT(float, ln1_mean), AT(float, ln1_rstd), rows, C, C);
#undef AT
}

// gives the gradients of block l, or of all that is in no block (l < 0), to the ranks
void add_gradients(DeitModel* model, int l) {
    if (!model->add_ranks) { return; }
    float* pieces[NUM_PARAMETER_TENSORS];
    size_t sizes[NUM_PARAMETER_TENSORS];
    int n = 0;
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        const bool in_block = strncmp(s->name, "blocks.", 7) == 0;
        if (in_block != (l >= 0)) { continue; }
        pieces[n] = model->grads_memory + s->offset + (in_block ? l * s->n : 0);
        sizes[n++] = s->n;
    }
    ranks_add(pieces, sizes, n);
}

// grads += gradients of the loss, after deit_forward and deit_loss on a whole batch
void deit_backward(DeitModel* model) {
    const DeitConfig c = model->options.config;
    const size_t B = model->options.B, C = c.channels, T = model->T, V = c.num_classes;
    const size_t K = (size_t)c.image_channels * c.patch_size * c.patch_size, I = model->chunk_images;
    const ParameterTensors* p = &model->params;
    const GradientTensors* g = &model->grads;
    ActivationTensors* acts = &model->acts;
    const floatX* dlogits = (const floatX*)acts->logits.data;
    for (size_t b0 = 0; b0 < B; b0 += I) {
        weight_gradient(model, &acts->lnf, 0, g->headw, g->headb, dlogits + b0 * V, b0, B - b0 < I ? B - b0 : I, 1, C, V);
    }
    linear_backward_input(model->dlnf, dlogits, p->headw, B, C, V);
    // only the class tokens' rows of the last residual have a gradient yet
    cudaCheck(cudaMemsetAsync(model->dresidual, 0, B*T*C * sizeof(floatX), main_stream));
    layernorm_backward(model->dresidual, g->lnfw, g->lnfb, model->partial, model->dlnf,
                       (floatX*)activation_at(model, &acts->residual, c.depth, 0, true), p->lnfw, (float*)acts->lnf_mean.data,
                       (float*)acts->lnf_rstd.data, B, C, T*C);
    for (int l = c.depth - 1; l >= 0; l--) {
        if (model->stats_now) { stats_clear(model); }
        for (size_t b0 = 0; b0 < B; b0 += I) { block_backward(model, l, b0, B - b0 < I ? B - b0 : I); }
        if (model->stats_now) { stats_report(model, l); }
        add_gradients(model, l);
    }
    for (size_t b0 = 0; b0 < B; b0 += I) {
        const size_t nb = B - b0 < I ? B - b0 : I;
        const floatX* dres = model->dresidual + b0 * T*C;
        embed_backward_positions_kernel<<<CEIL_DIV(T*C, (size_t)64), 64, 0, main_stream>>>(g->pos, g->cls, dres, (int)nb, (int)T, (int)C);
        kernelCheck();
        embed_backward_tokens(model->tokens, dres, nb, T, C);
        weight_gradient(model, &acts->patches, 0, g->patchw, g->patchb, model->tokens, b0, nb, T-1, K, C);
    }
    add_gradients(model, -1);
}

// ----------------------------------------------------------------------------
// one step

// normalised patches of the n images in model->images, and their labels: those three buffers may then be filled again
void deit_patchify(DeitModel* model, PixelStats stats, size_t n) {
    const DeitConfig c = model->options.config;
    const int S = c.image_size, P = c.patch_size, CH = c.image_channels;
    const size_t elements = n * model->acts.patches.per_image;
    floatX* patches = (floatX*)activation_at(model, &model->acts.patches, 0, 0, false);
    if (P % VEC == 0) {
        patchify_kernel<VEC><<<CEIL_DIV(elements, (size_t)256 * VEC), 256, 0, main_stream>>>(patches, model->images, model->flips, stats, elements, S, P, CH);
    } else {
        patchify_kernel<1><<<CEIL_DIV(elements, (size_t)256), 256, 0, main_stream>>>(patches, model->images, model->flips, stats, elements, S, P, CH);
    }
    kernelCheck();
    cudaCheck(cudaMemcpyAsync(model->labels, model->next_labels, n * sizeof(int), cudaMemcpyDeviceToDevice, main_stream));
}

// adds the loss of n images to model->result, and turns the logits into their gradient, scaled
void deit_loss(DeitModel* model, size_t n, float smoothing, float scale) {
    cross_entropy(model->result, model->losses, model->ranks, (floatX*)model->acts.logits.data, model->labels, (int)n,
                  model->options.config.num_classes, smoothing, scale);
}

void deit_zero_gradients(DeitModel* model) {
    cudaCheck(cudaMemsetAsync(model->grads_memory, 0, model->num_parameters * sizeof(float), main_stream));
    cudaCheck(cudaMemsetAsync(model->result, 0, sizeof(StepResult), main_stream));
}

// step counts from 1
void deit_update(DeitModel* model, OptimizerConfig o, double lr, int step) {
    const size_t decayed = model->num_decayed, first = model->shard_begin, last = first + model->shard_n; // of this rank
    ranks_wait();
    gradient_norm(model->result, model->norm_partial, model->grads_memory, model->num_parameters);
    for (int part = 0; part < 2; part++) {
        const size_t begin = part == 0 || first > decayed ? first : decayed, end = part == 1 || last < decayed ? last : decayed;
        if (begin >= end) { continue; }
        OptimizerConfig config = o;
        if (part == 1) { config.weight_decay = 0.0; }
        const size_t at = begin - first;
        optimizer_update(model->params_memory + begin, model->master + at, model->m + at, model->v == NULL ? NULL : model->v + at,
                         model->grads_memory + begin, end - begin, model->result, config, lr, step);
    }
    if (model->options.sharded && num_ranks > 1) {
        ranks_gather(model->params_memory, model->params_memory + first, model->shard_n * sizeof(floatX));
    }
}

// what the devices of all ranks have added up since deit_zero_gradients; waits for them
StepResult deit_result(const DeitModel* model) {
    StepResult result;
    cudaCheck(cudaMemcpyAsync(&result, model->result, sizeof(result), cudaMemcpyDeviceToHost, main_stream));
    cudaCheck(cudaStreamSynchronize(main_stream));
    double sums[4] = {result.loss, (double)result.top1, (double)result.top5, (double)result.not_finite};
    ranks_sum(sums, 4);
    return StepResult{sums[0], (unsigned)sums[1], (unsigned)sums[2], (unsigned)sums[3], result.norm};
}

template <class T> bool all_finite(const void* device, size_t n) {
    T* host = (T*)malloc(n * sizeof(T));
    require(host != NULL, "out of host memory for %zu elements", n);
    cudaCheck(cudaMemcpy(host, device, n * sizeof(T), cudaMemcpyDeviceToHost));
    bool finite = true;
    for (size_t i = 0; i < n; i++) { finite = finite && isfinite((float)host[i]); }
    free(host);
    return finite;
}

// the first tensor, in the order of computation, that holds a NaN or an Inf; of those that are stored
const char* deit_not_finite(const DeitModel* model) {
    static char name[80];
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        for (int l = 0; l < s->copies; l++) {
            if (!all_finite<floatX>(model->params_memory + s->offset + l * s->n, s->n)) {
                snprintf(name, sizeof(name), "parameter %s", parameter_name(s, l));
                return name;
            }
        }
    }
    const Activation* acts = (const Activation*)&model->acts;
    for (int l = 0; l <= model->options.config.depth; l++) {
        for (int i = 0; i < NUM_ACTIVATION_TENSORS; i++) {
            const Activation* a = &acts[i];
            // tensors of one copy follow the last block, but for the patches, which come first
            const int copy = a->copies > 1 ? l : i == ACT_patches ? (l == 0 ? 0 : -1) : (l == model->options.config.depth ? 0 : -1);
            if (copy < 0 || copy >= a->copies || !a->cached) { continue; }
            const Dropped d = dropped_copy(a, copy);
            const bool finite = a->dropped ? all_finite<floatX>(d.values, d.k)
                              : a->element == sizeof(float) ? all_finite<float>(a->data + copy * align_up(a->n * a->element), a->n)
                                                            : all_finite<floatX>(a->data + copy * align_up(a->n * a->element), a->n);
            if (!finite) {
                snprintf(name, sizeof(name), "activation %s, copy %d", a->name, copy);
                return name;
            }
        }
    }
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        for (int l = 0; l < s->copies; l++) {
            if (!all_finite<float>(model->grads_memory + s->offset + l * s->n, s->n)) {
                snprintf(name, sizeof(name), "gradient of %s", parameter_name(s, l));
                return name;
            }
        }
    }
    return "no stored tensor";
}

void device_open(void) {
    int device;
    cudaDeviceProp properties;
    ranks_open();
    cudaCheck(cudaGetDevice(&device));
    cudaCheck(cudaGetDeviceProperties(&properties, device));
    require(sizeof(floatX) == 4 || properties.major >= 8, "%s has compute capability %d.%d, bf16 needs 8.0; build with `make PRECISION=FP32`",
            properties.name, properties.major, properties.minor);
    num_multiprocessors = properties.multiProcessorCount;
    cudaCheck(cudaStreamCreate(&main_stream));
    cublasCheck(cublasCreate(&cublas_handle));
    cublasCheck(cublasSetStream(cublas_handle, main_stream));
    cublasCheck(cublasLtCreate(&cublaslt_handle));
    printf("device: %s, " PRECISION_NAME, properties.name);
    printf(num_ranks > 1 ? ", %d ranks\n" : "\n", num_ranks);
}

#ifndef TESTING
// everything below is skipped when test_deit.cu includes this file

// ---- shared: command line --------------------------------------------------
// one table: the parser and the usage text are generated from it, so they cannot disagree
typedef struct {
    const char* flag;
    char type;        // 'i' int, 'f' double, 's' string
    void* value;      // holds the default until it is parsed
    const char* help;
    double low, high; // of numbers
} Option;

void usage(FILE* out, const char* program, const Option* options, int n) {
    fprintf(out, "usage: %s [flag value] ...\n", program);
    for (int i = 0; i < n; i++) {
        const Option* o = &options[i];
        fprintf(out, "  %-10s %s (default ", o->flag, o->help);
        if (o->type == 'i') { fprintf(out, "%d)\n", *(int*)o->value); }
        else if (o->type == 'f') { fprintf(out, "%g)\n", *(double*)o->value); }
        else { fprintf(out, "%s)\n", **(const char***)&o->value ? *(const char**)o->value : "none"); }
    }
}

void parse_options(int argc, char** argv, const Option* options, int n) {
    for (int i = 1; i < argc; i += 2) {
        if (strcmp(argv[i], "-h") == 0) {
            usage(stdout, argv[0], options, n);
            exit(EXIT_SUCCESS);
        }
        const Option* o = NULL;
        for (int j = 0; j < n; j++) { if (strcmp(argv[i], options[j].flag) == 0) { o = &options[j]; } }
        require(o != NULL, "unknown flag %s; %s -h lists the flags", argv[i], argv[0]);
        require(i + 1 < argc, "flag %s lacks its value; %s -h lists the flags", argv[i], argv[0]);
        const char* arg = argv[i+1];
        if (o->type == 's') {
            *(const char**)o->value = arg;
            continue;
        }
        char* end;
        const double v = strtod(arg, &end);
        require(end != arg && *end == 0, "%s wants a number, got '%s'", o->flag, arg);
        require(v >= o->low && v <= o->high, "%s must be between %g and %g, got %s", o->flag, o->low, o->high, arg); // a NaN fails
        if (o->type == 'f') { *(double*)o->value = v; continue; }
        require(v == (int)v, "%s wants a whole number, got '%s'", o->flag, arg);
        *(int*)o->value = (int)v;
    }
}

// appends a metadata entry for each option whose flag is in `flags` (" -a -b "), with its value
int options_metadata(StMetadata* metadata, int n, const Option* options, int num_options, const char* flags) {
    for (int i = 0; i < num_options; i++) {
        const Option* o = &options[i];
        char word[24];
        snprintf(word, sizeof(word), " %s ", o->flag);
        if (strstr(flags, word) == NULL) { continue; }
        StMetadata* m = &metadata[n++];
        snprintf(m->key, sizeof(m->key), "%s", o->flag);
        if (o->type == 'i') { snprintf(m->value, sizeof(m->value), "%d", *(int*)o->value); }
        else if (o->type == 'f') { snprintf(m->value, sizeof(m->value), "%.17g", *(double*)o->value); }
        else { snprintf(m->value, sizeof(m->value), "%s", *(const char**)o->value); }
    }
    return n;
}

// "24GiB", "512MiB", "1000000"
size_t parse_bytes(const char* text) {
    char* end;
    const double v = strtod(text, &end);
    const double unit = strcmp(end, "GiB") == 0 ? 1073741824.0 : strcmp(end, "MiB") == 0 ? 1048576.0 : *end == 0 ? 1.0 : 0.0;
    require(end != text && unit > 0.0 && v >= 0.0 && v * unit < 1e18, "-plan wants 1 or a memory size such as 24GiB or 512MiB, got '%s'", text);
    return (size_t)(v * unit);
}

double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

int by_value(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return x < y ? -1 : x > y;
}
// ---- end shared: command line ----------------------------------------------

// ---- shared: TensorBoard ---------------------------------------------------
// An event file: records of u64 length, its masked CRC, an Event in protocol buffers' wire format, its masked CRC
FILE* events_open(const char* directory, int first_step) {
    char path[4200], host[64] = "host";
    gethostname(host, sizeof(host) - 1);
    require(mkdir(directory, 0777) == 0 || errno == EEXIST, "cannot make the TensorBoard directory %s: %m", directory);
    snprintf(path, sizeof(path), "%s/events.out.tfevents.%010lld.%s.%d.%d", directory, (long long)time(NULL), host, (int)getpid(), first_step);
    FILE* f = fopen(path, "wb");
    require(f != NULL, "cannot write %s: %m", path);
    return f;
}

// CRC-32C (polynomial 0x82F63B78), rotated and offset as TFRecord files want it
uint32_t masked_crc(const void* data, size_t n) {
    uint32_t crc = ~0u;
    for (size_t i = 0; i < n; i++) {
        crc ^= ((const uint8_t*)data)[i];
        for (int k = 0; k < 8; k++) { crc = crc & 1 ? 0x82F63B78u ^ (crc >> 1) : crc >> 1; }
    }
    crc = ~crc;
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

size_t put_varint(uint8_t* out, uint64_t v) {
    size_t n = 0;
    for (; v >= 128; v >>= 7) { out[n++] = (uint8_t)(v | 128); }
    out[n++] = (uint8_t)v;
    return n;
}

// one number of a step. Event {1: wall time, 2: step, 5: Summary {1: Value {1: tag, 2: float}}}; tag NULL: {3: "brain.Event:2"}, the first record
void events_write(FILE* f, int step, const char* tag, double value) {
    if (f == NULL) { return; }
    uint8_t event[256] = {1 << 3 | 1};
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    const double wall = now.tv_sec + 1e-9 * now.tv_nsec;
    const float number = (float)value;
    const char* text = tag != NULL ? tag : "brain.Event:2";
    const size_t length = strlen(text);
    require(length < 100, "the tag %s is too long", text);
    memcpy(event + 1, &wall, 8);
    size_t n = 9;
    if (tag != NULL) {
        event[n++] = 2 << 3;
        n += put_varint(event + n, (uint64_t)step);
        const uint8_t nested[] = {5 << 3 | 2, (uint8_t)(length + 9), 1 << 3 | 2, (uint8_t)(length + 7), 1 << 3 | 2};
        memcpy(event + n, nested, sizeof(nested));
        n += sizeof(nested);
    } else {
        event[n++] = 3 << 3 | 2;
    }
    event[n++] = (uint8_t)length;
    memcpy(event + n, text, length);
    n += length;
    if (tag != NULL) {
        event[n++] = 2 << 3 | 5;
        memcpy(event + n, &number, 4);
        n += 4;
    }
    const uint64_t size = n;
    const uint32_t size_crc = masked_crc(&size, 8), event_crc = masked_crc(event, n);
    fwrite(&size, 8, 1, f);
    fwrite(&size_crc, 4, 1, f);
    fwrite(event, n, 1, f);
    fwrite(&event_crc, 4, 1, f);
}
// ---- end shared: TensorBoard -----------------------------------------------

// ---- shared: data loader ---------------------------------------------------
// Batches are consecutive slices of the epoch's permutation; what does not fill a batch at its end is dropped.
typedef struct {
    Shard shard;
    unsigned* order;      // (images) of the current epoch
    int epoch;            // whose order it is; -1: that of the file
    uint8_t* pixels;      // pinned, one batch
    int *labels, *flips;  // pinned, one batch
    cudaStream_t stream;  // copies a batch while the step before computes
    cudaEvent_t copied;   // the batch is on the device
    cudaEvent_t taken;    // the buffers on the device may be written again
} Loader;

void loader_open(Loader* loader, Shard shard, size_t B) {
    const ShardHeader* h = shard.header;
    loader->shard = shard;
    loader->epoch = -1;
    loader->order = (unsigned*)malloc(h->images * sizeof(unsigned));
    require(loader->order != NULL, "out of host memory for the order of %u images", h->images);
    for (unsigned i = 0; i < h->images; i++) { loader->order[i] = i; }
    cudaCheck(cudaMallocHost((void**)&loader->pixels, B * shard.entries[0].height * shard.entries[0].width * h->channels));
    cudaCheck(cudaMallocHost((void**)&loader->labels, B * sizeof(int)));
    cudaCheck(cudaMallocHost((void**)&loader->flips, B * sizeof(int)));
    cudaCheck(cudaStreamCreateWithFlags(&loader->stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&loader->copied, cudaEventDisableTiming));
    cudaCheck(cudaEventCreateWithFlags(&loader->taken, cudaEventDisableTiming));
}

// images first .. first+n-1 of the order, to the device; flip: mirror half of them, chosen by Philox(seed, RNG_AUGMENT, epoch, place)
void loader_batch(Loader* loader, uint8_t* images, int* labels, int* flips, size_t first, size_t n, bool flip,
                  unsigned long long seed, unsigned epoch) {
    const ShardEntry* entries = loader->shard.entries;
    const size_t bytes = (size_t)entries[0].height * entries[0].width * loader->shard.header->channels;
    cudaCheck(cudaEventSynchronize(loader->copied)); // the pinned buffers may still be read
    for (size_t i = 0; i < n; i++) {
        const ShardEntry* e = &entries[loader->order[first + i]];
        memcpy(loader->pixels + i * bytes, loader->shard.file.data + e->offset, bytes);
        loader->labels[i] = e->label;
        loader->flips[i] = flip && (philox(seed, RNG_AUGMENT, epoch, first + i).x & 1);
    }
    cudaCheck(cudaStreamWaitEvent(loader->stream, loader->taken, 0));
    cudaCheck(cudaMemcpyAsync(images, loader->pixels, n * bytes, cudaMemcpyHostToDevice, loader->stream));
    cudaCheck(cudaMemcpyAsync(labels, loader->labels, n * sizeof(int), cudaMemcpyHostToDevice, loader->stream));
    cudaCheck(cudaMemcpyAsync(flips, loader->flips, n * sizeof(int), cudaMemcpyHostToDevice, loader->stream));
    cudaCheck(cudaEventRecord(loader->copied, loader->stream));
}

PixelStats shard_stats(const Shard* shard) {
    PixelStats stats;
    memcpy(stats.mean, shard->header->mean, sizeof(stats.mean));
    memcpy(stats.std, shard->header->std, sizeof(stats.std));
    return stats;
}
// ---- end shared: data loader -----------------------------------------------

// a shard must hold what the model takes
Shard open_shard(const char* path, DeitConfig c) {
    Shard shard = shard_open(path);
    const ShardHeader* h = shard.header;
    require(h->task == 0, "%s is a detection shard (task %u), a classifier trains on task 0", path, h->task);
    require(h->channels == (unsigned)c.image_channels, "%s has images of %u channels, the model takes %d; set -chans", path, h->channels, c.image_channels);
    require(h->classes == (unsigned)c.num_classes, "%s has %u classes, the model %d; set -classes", path, h->classes, c.num_classes);
    for (uint32_t i = 0; i < h->images; i++) {
        require(shard.entries[i].height == (unsigned)c.image_size && shard.entries[i].width == (unsigned)c.image_size,
                "%s: image %u is %u x %u, the model takes %d x %d; set -size or make a shard of that size", path, i,
                shard.entries[i].height, shard.entries[i].width, c.image_size, c.image_size);
    }
    return shard;
}

// the batch that the loader copied last becomes patches and labels
void take_batch(DeitModel* model, const Loader* loader, PixelStats stats, size_t n) {
    cudaCheck(cudaStreamWaitEvent(main_stream, loader->copied, 0));
    deit_patchify(model, stats, n);
    cudaCheck(cudaEventRecord(loader->taken, main_stream));
}

// copies this rank's part of batch i of the run, counted from 0; each epoch has an order of its own
void load_batch(Loader* loader, const DeitModel* model, size_t i, size_t epoch_batches, bool flip) {
    const int epoch = (int)(i / epoch_batches);
    const unsigned long long seed = model->options.seed;
    const size_t B = model->options.B;
    if (loader->epoch != epoch) { shuffle(loader->order, loader->shard.header->images, seed, epoch); }
    loader->epoch = epoch;
    loader_batch(loader, model->images, model->next_labels, model->flips, (i % epoch_batches * num_ranks + rank) * B, B, flip, seed, epoch);
}

typedef struct {
    double loss, top1, top5;
} Evaluation;

// mean loss and accuracies over a whole shard; ranks take turns with its batches
Evaluation evaluate(DeitModel* model, Loader* loader) {
    const size_t images = loader->shard.header->images, B = model->options.B;
    const PixelStats stats = shard_stats(&loader->shard);
    cudaCheck(cudaMemsetAsync(model->result, 0, sizeof(StepResult), main_stream));
    for (size_t first = rank * B; first < images; first += num_ranks * B) {
        const size_t n = images - first < B ? images - first : B;
        loader_batch(loader, model->images, model->next_labels, model->flips, first, n, false, 0, 0);
        take_batch(model, loader, stats, n);
        deit_forward(model, n, false);
        deit_loss(model, n, 0.0f, 1.0f);
    }
    const StepResult r = deit_result(model);
    return Evaluation{r.loss / images, (double)r.top1 / images, (double)r.top5 / images};
}

int main(int argc, char** argv) {
    const char *model_name = "deit_nano", *train_path = "data/fashion_train.bin", *val_path = "data/fashion_val.bin";
    const char *output = NULL, *optimizer = "adamw", *strategy = "mink", *weights = NULL, *plan = "0", *tensorboard = NULL;
    int B = 64, accumulation = 1, epochs = 6, max_steps = 0, drop_all = 0, recompute = 1, evaluate_every = 1, evaluate_only = 0, seed = 1;
    int size = 0, patch = 0, image_channels = 0, classes = 0, warmup = 50, flip = 0, stats = 0, bench = 0;
    int save_every = 0, keep = 0, resume = 0, sharded = 0;
    double lr = 2e-3, weight_decay = 0.05, gamma = 0.0, smoothing = 0.0, clip = 0.0, beta1 = 0.9, beta2 = 0.999, momentum = 0.9;
    const Option options[] = {
        {"-m",        's', &model_name,     "model: deit_nano, deit_tiny, deit_small, deit_base, vit_base", 0, 0},
        {"-i",        's', &train_path,     "training shard", 0, 0},
        {"-j",        's', &val_path,       "validation shard", 0, 0},
        {"-o",        's', &output,         "output directory, for main.log and checkpoints", 0, 0},
        {"-b",        'i', &B,              "batch size", 1, 1 << 20},
        {"-a",        'i', &accumulation,   "gradient accumulation: batches a step", 1, 1 << 20},
        {"-e",        'i', &epochs,         "epochs", 1, 1 << 20},
        {"-x",        'i', &max_steps,      "stop after this many steps, 0: after the epochs", 0, 2e9},
        {"-l",        'f', &lr,             "learning rate", 0, 1e6},
        {"-opt",      's', &optimizer,      "optimizer: adamw, sgd", 0, 0},
        {"-wd",       'f', &weight_decay,   "weight decay", 0, 1e6},
        {"-beta1",    'f', &beta1,          "AdamW: decay of the first moment", 0, 0.999999},
        {"-beta2",    'f', &beta2,          "AdamW: decay of the second moment", 0, 0.9999999},
        {"-momentum", 'f', &momentum,       "SGD: momentum", 0, 0.999999},
        {"-warmup",   'i', &warmup,         "steps of linear warm-up before the cosine", 0, 2e9},
        {"-clip",     'f', &clip,           "largest norm of the gradient, 0: no clipping", 0, 1e30},
        {"-smoothing", 'f', &smoothing,     "label smoothing", 0, 0.999999},
        {"-flip",     'i', &flip,           "1: mirror half of the training images", 0, 1},
        {"-g",        'f', &gamma,          "DropIT: fraction of each cached input to drop, 0: off", 0, 0.99999999},
        {"-s",        's', &strategy,       "DropIT: mink, fastmink, random", 0, 0},
        {"-g_all",    'i', &drop_all,       "DropIT: 1: also in patch embedding and head", 0, 1},
        {"-stats",    'i', &stats,          "DropIT: report what is kept every N steps, 0: never", 0, 2e9},
        {"-r",        'i', &recompute,      "recompute in the backward pass: 0 nothing, 1 norms and GELU, 2 also qkv and fc1, 3 the block", 0, 3},
        {"-w",        's', &weights,        "initial weights (.safetensors)", 0, 0},
        {"-z",        'i', &sharded,        "1: each rank holds its part of the optimizer's states (ZeRO-1)", 0, 1},
        {"-tb",       's', &tensorboard,    "directory for TensorBoard's event files", 0, 0},
        {"-n",        'i', &save_every,     "write a checkpoint every N steps, and at the end; 0: never", 0, 2e9},
        {"-keep",     'i', &keep,           "keep the newest N checkpoints, 0: all", 0, 2e9},
        {"-y",        'i', &resume,         "1: resume from the newest checkpoint in -o, where there is one", 0, 1},
        {"-v",        'i', &evaluate_every, "evaluate every N epochs, and at the end; 0: only at the end", 0, 1 << 20},
        {"-eval",     'i', &evaluate_only,  "1: evaluate only", 0, 1},
        {"-seed",     'i', &seed,           "seed of all random choices", 0, 2e9},
        {"-size",     'i', &size,           "image size, 0: the model's", 0, 16384},
        {"-patch",    'i', &patch,          "patch size, 0: the model's", 0, 65535},
        {"-chans",    'i', &image_channels, "image channels, 0: the model's", 0, 4},
        {"-classes",  'i', &classes,        "classes, 0: the model's", 0, 1 << 24},
        {"-plan",     's', &plan,           "1: print the memory plan and exit; 24GiB: also the largest batch that fits", 0, 0},
        {"-bench",    'i', &bench,          "time this many steps on random images and exit", 0, 1 << 20},
    };
    const int num_options = sizeof(options) / sizeof(options[0]);
    parse_options(argc, argv, options, num_options);

    DeitModel* model = (DeitModel*)calloc(1, sizeof(DeitModel));
    DeitOptions* o = &model->options;
    bool known = false;
    for (size_t i = 0; i < sizeof(deit_presets) / sizeof(deit_presets[0]); i++) {
        if (strcmp(model_name, deit_presets[i].name) == 0) {
            o->config = deit_presets[i].config;
            known = true;
        }
    }
    require(known, "-m %s is not a model; choose deit_nano, deit_tiny, deit_small, deit_base or vit_base", model_name);
    if (size) { o->config.image_size = size; }
    if (patch) { o->config.patch_size = patch; }
    if (image_channels) { o->config.image_channels = image_channels; }
    if (classes) { o->config.num_classes = classes; }
    require(o->config.image_size % o->config.patch_size == 0, "an image of %d pixels does not divide into patches of %d; change -size or -patch",
            o->config.image_size, o->config.patch_size);
    require(strcmp(optimizer, "adamw") == 0 || strcmp(optimizer, "sgd") == 0, "-opt %s is not an optimizer; choose adamw or sgd", optimizer);
    o->strategy = strcmp(strategy, "mink") == 0 ? MINK : strcmp(strategy, "fastmink") == 0 ? FASTMINK : strcmp(strategy, "random") == 0 ? RANDOM : -1;
    require(o->strategy >= 0, "-s %s is not a strategy; choose mink, fastmink or random", strategy);
    require(output != NULL || (save_every == 0 && resume == 0), "-n and -y need a directory for checkpoints; give -o");
    require(stats == 0 || gamma > 0.0, "-stats reports on DropIT; give -g above 0 too");
    o->B = B;
    o->gamma = gamma;
    o->drop_all = drop_all;
    o->recompute = recompute;
    o->adamw = strcmp(optimizer, "adamw") == 0;
    o->sharded = sharded;
    o->stats = stats > 0;
    o->chunk_bytes = DEFAULT_CHUNK_BYTES;
    o->seed = (unsigned long long)seed;
    const OptimizerConfig optimizer_config = {o->adamw, lr, beta1, beta2, 1e-8, weight_decay, momentum, clip};

    if (strcmp(plan, "0") != 0) {
        const size_t limit = strcmp(plan, "1") == 0 ? 0 : parse_bytes(plan);
        deit_plan(model);
        require(model->too_large == NULL, "%s has 2^32 elements or more, too many for DropIT's 32-bit indices; use a smaller batch (-b)", model->too_large);
        plan_print(&model->plan);
        printf("plan");
        for (int c = 0; c < NUM_CATEGORIES; c++) { printf(" %s=%zu", category_names[c], model->plan.bytes[c]); }
        if (limit > 0) { printf(" max_batch=%zu", deit_largest_batch(*o, limit)); }
        printf(" total=%zu\n", plan_total(&model->plan));
        return EXIT_SUCCESS;
    }

    // everything the user gave is read and checked before anything is written
    Loader train, val;
    Shard train_shard = {}, val_shard = {};
    if (bench == 0) {
        if (!evaluate_only) { train_shard = open_shard(train_path, o->config); }
        val_shard = open_shard(val_path, o->config);
    }
    const size_t images = train_shard.header != NULL ? train_shard.header->images : 0;
    device_open();
    const size_t step_images = (size_t)B * num_ranks * accumulation, epoch_steps = images / step_images;
    require(bench > 0 || evaluate_only || epoch_steps > 0, "%s has %zu images, fewer than the %zu of one step (-b %d x %d ranks x -a %d)", train_path,
            images, step_images, B, num_ranks, accumulation);
    Safetensors* initial = weights != NULL ? safetensors_open(weights) : NULL;
    const bool training = bench == 0 && !evaluate_only;
    require(!training || output == NULL || resume || checkpoint_newest(output, INT_MAX) < 0, "%s holds checkpoints of another run; resume it with "
            "-y 1 or choose another -o", output);
    // What a resumed run must share with the run that wrote the checkpoint. "run" is the checksum of the weights it began with: the same
    // command twice writes the same files
    const int found = training && resume ? checkpoint_find(output) : -1, first_step = found < 0 ? 0 : found;
    ranks_agree((uint32_t)found, "newest checkpoints");
    StMetadata metadata[40] = {{"format", "pt"}, {"step", ""}, {"run", ""}, {"precision", PRECISION_NAME}, {"data", ""}, {"ranks", ""}};
    snprintf(metadata[4].value, sizeof(metadata[4].value), "%08x", training ? train_shard.header->crc : 0);
    snprintf(metadata[5].value, sizeof(metadata[5].value), "%d", num_ranks);
    const int num_metadata = options_metadata(metadata, 6, options, num_options, " -m -b -a -e -l -opt -wd -beta1 -beta2 -momentum -warmup -clip "
        "-smoothing -flip -g -s -g_all -seed -size -patch -chans -classes ");
    size_t free_before, free_now, total_bytes;
    cudaCheck(cudaMemGetInfo(&free_before, &total_bytes));
    deit_allocate(model);
    if (found >= 0) {
        snprintf(metadata[1].value, sizeof(metadata[1].value), "%d", found);
        deit_resume(model, output, found, metadata, num_metadata);
        model->drop_step = (unsigned)(found * accumulation);
    } else if (initial != NULL) {
        deit_load_parameters(model, initial, "");
        safetensors_close(initial);
    } else {
        deit_init_parameters(model);
    }
    if (found < 0 && save_every > 0) { snprintf(metadata[2].value, sizeof(metadata[2].value), "%08x", deit_fingerprint(model)); }

    const double MiB = 1048576.0;
    printf("model: %s, image %d, patch %d, channels %d, classes %d, width %d, depth %d, heads %d, %zu parameters\n", model_name, o->config.image_size,
           o->config.patch_size, o->config.image_channels, o->config.num_classes, o->config.channels, o->config.depth, o->config.heads,
           model->num_parameters);
    printf("DropIT: gamma %g, %s; recompute level %d\n", gamma, gamma > 0.0 ? strategy : "off", recompute);
    printf("memory:");
    for (int c = 0; c < NUM_CATEGORIES; c++) { printf(" %s %.1f MiB,", category_names[c], model->plan.bytes[c] / MiB); }
    printf(" total %.1f MiB; chunks of %zu images\n", plan_total(&model->plan) / MiB, model->chunk_images);

    if (bench > 0) {
        const size_t bytes = (size_t)B * o->config.image_size * o->config.image_size * o->config.image_channels;
        uint8_t* pixels = (uint8_t*)malloc(bytes);
        int* zeros = (int*)calloc(B, sizeof(int));
        double* ms = (double*)malloc(bench * sizeof(double));
        require(pixels != NULL && zeros != NULL && ms != NULL, "out of host memory for a batch of %d images", B);
        for (size_t i = 0; i < bytes; i++) { pixels[i] = (uint8_t)philox(seed, RNG_AUGMENT, 0, i).x; }
        cudaCheck(cudaMemcpy(model->images, pixels, bytes, cudaMemcpyHostToDevice));
        cudaCheck(cudaMemcpy(model->next_labels, zeros, B * sizeof(int), cudaMemcpyHostToDevice));
        cudaCheck(cudaMemcpy(model->flips, zeros, B * sizeof(int), cudaMemcpyHostToDevice));
        const PixelStats no_stats = {{0.5f, 0.5f, 0.5f, 0.5f}, {0.25f, 0.25f, 0.25f, 0.25f}};
        for (int step = -2; step < bench; step++) { // two steps warm up
            const double start = seconds();
            deit_zero_gradients(model);
            deit_patchify(model, no_stats, B);
            deit_forward(model, B, true);
            deit_loss(model, B, 0.0f, 1.0f / B);
            deit_backward(model);
            deit_update(model, optimizer_config, 0.0, step + 3);
            deit_result(model);
            if (step >= 0) { ms[step] = 1e3 * (seconds() - start); }
        }
        qsort(ms, bench, sizeof(double), by_value);
        cudaCheck(cudaMemGetInfo(&free_now, &total_bytes));
        printf("bench ms_min=%.3f ms_median=%.3f images_per_s=%.2f bytes_planned=%zu bytes_used=%zu\n", ms[0], ms[bench / 2],
               1e3 * B / ms[bench / 2], plan_total(&model->plan), free_before - free_now);
        ranks_close();
        return EXIT_SUCCESS;
    }

    loader_open(&val, val_shard, B);
    if (evaluate_only) {
        const Evaluation e = evaluate(model, &val);
        printf("final loss=%.6f top1=%.2f top5=%.2f\n", e.loss, 100.0 * e.top1, 100.0 * e.top5);
        ranks_close();
        return EXIT_SUCCESS;
    }
    loader_open(&train, train_shard, B);
    FILE *log = NULL, *events = NULL;
    if (output != NULL && rank == 0) {
        char path[4096];
        require(mkdir(output, 0777) == 0 || errno == EEXIST, "cannot make the output directory %s: %m", output);
        snprintf(path, sizeof(path), "%s/main.log", output);
        log = fopen(path, found >= 0 ? "a+" : "w");
        require(log != NULL, "cannot write %s: %m", path);
        if (found >= 0) { log_cut(log, found); }
    }
    if (tensorboard != NULL && rank == 0) {
        events = events_open(tensorboard, first_step);
        events_write(events, 0, NULL, 0.0);
        events_write(events, first_step, "memory/cached_MiB", model->plan.bytes[CACHED] / MiB);
    }
    if (found >= 0) { printf("resuming after step %d\n", found); }
    else if (resume) { printf("no checkpoint in %s: starting at the first step\n", output); }
    const PixelStats pixel_stats = shard_stats(&train.shard);
    const int scheduled = (int)(epochs * epoch_steps), steps = max_steps > 0 && max_steps < scheduled ? max_steps : scheduled;
    Evaluation result = {};
    size_t loaded = (size_t)first_step * accumulation; // batches copied to the device
    double start = seconds(), timed = 0.0; // timed: without the first step
    if (first_step >= steps) { result = evaluate(model, &val); }
    for (int step = first_step; step < steps; step++) {
        const bool evaluates = step + 1 == steps || (evaluate_every > 0 && (step + 1) % (evaluate_every * epoch_steps) == 0);
        model->stats_now = stats > 0 && step % stats == 0;
        deit_zero_gradients(model);
        for (int micro = 0; micro < accumulation; micro++) {
            const size_t batch = (size_t)step * accumulation + micro;
            if (loaded == batch) { load_batch(&train, model, loaded++, epoch_steps * accumulation, flip); }
            model->add_ranks = num_ranks > 1 && micro + 1 == accumulation;
            take_batch(model, &train, pixel_stats, B);
            deit_forward(model, B, true);
            deit_loss(model, B, (float)smoothing, 1.0f / (float)step_images);
            deit_backward(model);
            model->drop_step++;
            // the next batch is gathered and copied while the device computes; an evaluation needs its place on the device
            if (micro + 1 < accumulation || !evaluates) { load_batch(&train, model, loaded++, epoch_steps * accumulation, flip); }
        }
        const double rate = learning_rate_at(lr, step, warmup, scheduled);
        deit_update(model, optimizer_config, rate, step + 1);
        const StepResult r = deit_result(model);
        const double now = seconds(), ms = 1e3 * (now - start), seen = (double)step_images, loss = r.loss / seen;
        start = now;
        timed += step > first_step ? ms : 0.0;
        const int left = (int)(1e-3 * (step > first_step ? timed / (step - first_step) : ms) * (steps - 1 - step));
        printf("step %5d/%d | loss %8.6f | acc %6.2f%% | norm %7.4f | lr %.2e | %8.2f ms | %6.0f img/s | left %d:%02d\n", step + 1, steps, loss,
               100.0 * r.top1 / seen, r.norm, rate, ms, 1e3 * seen / ms, left / 60, left % 60);
        if (log != NULL) {
            fprintf(log, "s:%d trl:%.9g lr:%.9g norm:%.9g ms:%.3f\n", step + 1, loss, rate, r.norm, ms);
            fflush(log);
        }
        events_write(events, step + 1, "train/loss", loss);
        events_write(events, step + 1, "train/top1", 100.0 * r.top1 / seen);
        events_write(events, step + 1, "train/lr", rate);
        events_write(events, step + 1, "train/gradient_norm", r.norm);
        events_write(events, step + 1, "train/images_per_s", 1e3 * seen / ms);
        if (events != NULL) { fflush(events); }
        require(isfinite(loss) && r.not_finite == 0, "step %d: loss %g, and DropIT met %u values that are not finite; the first tensor that is not is: %s. "
                "Lower the learning rate (-l) or clip (-clip)", step + 1, loss, r.not_finite, deit_not_finite(model));
        if (evaluates) {
            const int epoch = (int)(step / epoch_steps);
            result = evaluate(model, &val);
            printf("eval  epoch %d | loss %8.6f | top-1 %6.2f%% | top-5 %6.2f%%\n", epoch + 1, result.loss, 100.0 * result.top1, 100.0 * result.top5);
            if (log != NULL) {
                fprintf(log, "s:%d tel:%.9g top1:%.9g top5:%.9g\n", step + 1, result.loss, 100.0 * result.top1, 100.0 * result.top5);
                fflush(log);
            }
            events_write(events, step + 1, "val/loss", result.loss);
            events_write(events, step + 1, "val/top1", 100.0 * result.top1);
            events_write(events, step + 1, "val/top5", 100.0 * result.top5);
        }
        if (save_every > 0 && ((step + 1) % save_every == 0 || step + 1 == steps)) {
            snprintf(metadata[1].value, sizeof(metadata[1].value), "%d", step + 1);
            deit_ranks_agree(model);
            deit_save(model, output, step + 1, keep, metadata, num_metadata);
        }
        if (evaluates || save_every > 0) { start = seconds(); } // a step's time is its own
    }
    if (log != NULL) { fclose(log); }
    if (events != NULL) { fclose(events); }
    deit_ranks_agree(model);
    deit_free(model);
    ranks_close();
    printf("final loss=%.6f top1=%.2f top5=%.2f\n", result.loss, 100.0 * result.top1, 100.0 * result.top5);
    return EXIT_SUCCESS;
}
#endif
