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
#include <pthread.h>
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
static double peak_flops; // of this GPU in this precision, floating-point operations a second; 0: not known

// Dense products a second in TFLOP/s, by NVIDIA's data sheets: bf16 on tensor cores, and fp32 without them, as cuBLAS is asked for.
// The first name that stands in the device's as whole words counts
typedef struct {
    const char* name;
    double bf16, fp32;
} GpuPeak;

static const GpuPeak gpu_peaks[] = {
    {"B200", 2250, 80}, {"GH200", 989, 67}, {"H200 NVL", 835, 60}, {"H200", 989, 67}, {"H100 PCIe", 756, 51}, {"H100 NVL", 835, 60},
    {"H100", 989, 67}, {"A100", 312, 19.5}, {"A40", 149.7, 37.4}, {"A30", 165, 10.3}, {"A10", 125, 31.2}, {"L40S", 362, 91.6},
    {"L40", 181, 90.5}, {"L4", 121, 30.3}, {"RTX 4090", 165, 82.6}, {"RTX 3090", 71, 35.6},
};

// peak of a device by its name in operations a second; 0: not known, as of a part of a GPU (MIG) and of a laptop's
double gpu_peak_flops(const char* device, bool bf16) {
    if (strstr(device, " MIG ") != NULL || strstr(device, "Laptop") != NULL) { return 0.0; }
    for (size_t i = 0; i < sizeof(gpu_peaks) / sizeof(gpu_peaks[0]); i++) {
        const char *name = gpu_peaks[i].name, *found = strstr(device, name);
        const char after = found != NULL ? found[strlen(name)] : 'x';
        if ((after == 0 || after == ' ' || after == '-') && (found == device || found[-1] == ' ')) {
            return 1e12 * (bf16 ? gpu_peaks[i].bf16 : gpu_peaks[i].fp32);
        }
    }
    return 0.0;
}
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

bool safetensors_is_float(const StTensor* t) {
    return strcmp(t->dtype, "F32") == 0 || strcmp(t->dtype, "F16") == 0 || strcmp(t->dtype, "BF16") == 0;
}

// out (st_numel) = the elements of a tensor of F32, F16 or BF16; float32 holds the values of all three
void safetensors_floats(const Safetensors* st, const StTensor* t, float* out) {
    const uint8_t* data = (const uint8_t*)safetensors_data(st, t);
    if (strcmp(t->dtype, "F32") == 0) { memcpy(out, data, t->end - t->begin); return; }
    const bool half = strcmp(t->dtype, "F16") == 0;
    for (size_t i = 0; i < (t->end - t->begin) / 2; i++) {
        uint16_t h;
        memcpy(&h, data + 2 * i, sizeof(h));
        const bool not_finite = (h & 0x7c00) == 0x7c00; // of F16
        // BF16 is a float's upper half. Exponent and fraction of F16, moved to a float's places, are 2^112 too small
        uint32_t bits = !half ? (uint32_t)h << 16 : not_finite ? 0x7f800000u | (uint32_t)(h & 0x3ff) << 13 : (uint32_t)(h & 0x7fff) << 13;
        memcpy(&out[i], &bits, sizeof(bits));
        if (half) { out[i] = copysignf(not_finite ? out[i] : out[i] * 0x1p112f, h & 0x8000 ? -1.0f : 1.0f); }
    }
}

// prints a shape, "(64, 1, 4, 4)"
void print_shape(FILE* out, const size_t* shape, int dims) {
    for (int d = 0; d < dims; d++) { fprintf(out, "%s%zu", d > 0 ? ", " : "(", shape[d]); }
    fprintf(out, dims > 0 ? ")" : "()");
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
        require(false, "cannot write %s: %m; what was written before is whole. Make room or choose another directory", path);
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

// verify: also compare every record with its checksum
Shard shard_open(const char* path, bool verify = true) {
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
        crc = verify ? crc_32(0, shard.file.data + e->offset, record) : e->crc;
        require(crc == e->crc, "%s: checksum of image %u is %08x, expected %08x: it is damaged; %s", path, i, crc, e->crc, hint);
        end += record;
    }
    require(end == bytes, "%s: records end at byte %llu, the file at %zu; %s", path, (unsigned long long)end, bytes, hint);
    return shard;
}
// ---- end shared: files -----------------------------------------------------

// ---- shared: pictures ------------------------------------------------------
// Pictures to look at, written as PNG
typedef struct {
    int width, height, channels; // channels: 1 grey, 3 RGB
    uint8_t* pixels;             // (height, width, channels)
} Picture;

// a picture of one level; the caller frees its pixels
Picture picture_new(int width, int height, int channels, uint8_t level) {
    const size_t bytes = numel(height, width, channels);
    require(bytes <= (size_t)1 << 30, "a picture of %d x %d pixels is too large; choose fewer images or smaller ones", width, height);
    Picture p = {width, height, channels, (uint8_t*)malloc(bytes)};
    require(p.pixels != NULL, "out of host memory for a picture of %d x %d pixels", width, height);
    memset(p.pixels, level, bytes);
    return p;
}

// writes a number with its upper left corner at (x, y): digits of 3 x 5 dots, 4 apart, a dot of scale x scale pixels. Cut off at the edges
void picture_number(Picture* p, int x, int y, unsigned number, int scale, uint8_t level) {
    static const uint16_t font[10] = {075557, 026227, 071747, 071717, 055711, 074717, 074757, 071111, 075757, 075717}; // a row is an octal digit
    char text[16];
    snprintf(text, sizeof(text), "%u", number);
    for (int i = 0; text[i] != 0; i++) {
        for (int dy = 0; dy < 5 * scale; dy++) {
            for (int dx = 0; dx < 3 * scale; dx++) {
                const int px = x + 4 * scale * i + dx, py = y + dy;
                const bool set = font[text[i] - '0'] >> (3 * (4 - dy / scale) + 2 - dx / scale) & 1;
                if (!set || px < 0 || px >= p->width || py < 0 || py >= p->height) { continue; }
                memset(p->pixels + ((size_t)py * p->width + px) * p->channels, level, p->channels);
            }
        }
    }
}

// writes v as PNG does, the highest byte first; returns what follows
uint8_t* png_number(uint8_t* p, uint32_t v) {
    for (int shift = 24; shift >= 0; shift -= 8) { *p++ = (uint8_t)(v >> shift); }
    return p;
}

// completes the chunk at p, whose n bytes of data lie at p + 8: length, type, data, CRC-32 of type and data. Returns what follows
uint8_t* png_chunk(uint8_t* p, const char* type, size_t n) {
    memcpy(png_number(p, (uint32_t)n), type, 4);
    return png_number(p + 8 + n, crc_32(0, p + 4, n + 4));
}

// A PNG file whose zlib stream is not compressed: blocks of up to 65,535 bytes as they are. Whole or as it was before
void picture_write(const char* path, const Picture* p) {
    const size_t row = (size_t)p->width * p->channels, bytes = p->height * (row + 1);
    uint8_t* const file = (uint8_t*)malloc(bytes + CEIL_DIV(bytes, (size_t)65535) * 5 + 128);
    require(file != NULL, "out of host memory for %s", path);
    memcpy(file, "\x89PNG\r\n\x1a\n", 8);
    const uint8_t format[5] = {8, (uint8_t)(p->channels == 3 ? 2 : 0), 0, 0, 0}; // bits of a sample; RGB or grey; the only methods there are
    memcpy(png_number(png_number(file + 16, p->width), p->height), format, 5);
    uint8_t *chunk = png_chunk(file + 8, "IHDR", 13), *at = chunk + 8;
    *at++ = 0x78; // zlib: deflate with a window of 32 KiB
    *at++ = 0x01;
    uint32_t a = 1, b = 0; // Adler-32
    for (size_t i = 0; i < bytes; i++) {
        if (i % 65535 == 0) {
            const size_t left = bytes - i, n = left < 65535 ? left : 65535;
            const uint8_t header[5] = {left == n, (uint8_t)n, (uint8_t)(n >> 8), (uint8_t)~n, (uint8_t)(~n >> 8)};
            memcpy(at, header, 5);
            at += 5;
        }
        *at = i % (row + 1) == 0 ? 0 : p->pixels[i / (row + 1) * row + i % (row + 1) - 1]; // each row begins with its filter, none
        a = (a + *at++) % 65521;
        b = (b + a) % 65521;
    }
    at = png_number(at, b << 16 | a);
    at = png_chunk(png_chunk(chunk, "IDAT", at - chunk - 8), "IEND", 0);
    const void* parts[] = {file};
    const size_t sizes[] = {(size_t)(at - file)};
    write_file(path, parts, sizes, 1);
    free(file);
}
// ---- end shared: pictures --------------------------------------------------

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

// whether the file of best weights at `path` is whole, of the run that `metadata` describes (but for the step, and what was best by then)
// and at least as good: a run that was killed and resumed goes through steps again, and keeps what it found later
bool checkpoint_best_stands(const char* path, const StMetadata* metadata, int num_metadata, double top1) {
    if (!checkpoint_file_whole(path)) { return false; }
    Safetensors* st = safetensors_open(path);
    const char* its = safetensors_metadata(st, "best_top1");
    bool stands = its != NULL && strtod(its, NULL) >= top1;
    for (int i = 0; stands && i < num_metadata; i++) {
        const char* was = safetensors_metadata(st, metadata[i].key);
        const bool of_step = strcmp(metadata[i].key, "step") == 0 || strncmp(metadata[i].key, "best_", 5) == 0;
        stands = of_step || (was != NULL && strcmp(was, metadata[i].value) == 0);
    }
    safetensors_close(st);
    return stands;
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
// search moves to the largest digit d with at least `remaining` elements at or above it. All threads of the block call, each for its
// bins, from `first` down: they count `mine` elements, and the bins above them `above`. `now` is the search before the digit.
// remaining == 0 keeps nothing: all digits are ones, and no key lies above
__device__ inline void search_bins(Search* search, const Search& now, const unsigned* histogram, int first, unsigned above, unsigned mine) {
    const int bits = digit_bits(&now);
    if (now.remaining == 0) {
        if (first == DROPIT_BINS - 1) { *search = {now.low, now.bits - bits, now.prefix << bits | ((1u << bits) - 1), 0}; }
    } else if (above < now.remaining && now.remaining <= above + mine) {
        int d = first;
        while (above + histogram[d] < now.remaining) { above += histogram[d--]; }
        *search = {now.low, now.bits - bits, now.prefix << bits | (unsigned)d, now.remaining - above};
    }
}

// the same by the whole block, which may go on with the search
__device__ inline void search_digit(Search* search, const unsigned* histogram, unsigned* warp_sums) {
    const Search now = *search;
    const int per_thread = DROPIT_BINS / blockDim.x, first = DROPIT_BINS - 1 - (int)threadIdx.x * per_thread; // from the largest digit down
    unsigned mine = 0, sum;
    for (int j = 0; j < per_thread; j++) { mine += histogram[first - j]; }
    const unsigned above = block_exclusive_sum(mine, warp_sums, &sum);
    search_bins(search, now, histogram, first, above, mine);
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

// range[0] and range[1] = the rank_high-th and rank_low-th largest key of the sample, the one with ones and the other with zeros in place of
// the bits that two digits leave open (10 of the 32): a wider range is a longer list, by very little, and never a wrong one.
// One block a tensor finds both, with 16 KiB of shared memory: after the first digit, which they share, each has a histogram
#define RANGE_THREADS 128
__global__ void dropit_range_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned counts[2][DROPIT_BINS];
    __shared__ unsigned long long pair_sums[32];
    __shared__ Search search[2];
    const Selection& s = all.of[blockIdx.x];
    const int per_thread = DROPIT_BINS / RANGE_THREADS, first_bin = DROPIT_BINS - 1 - (int)threadIdx.x * per_thread;
    Search high = {0, 32, 0, s.rank_high}, low = {0, 32, 0, s.rank_low};
    if (threadIdx.x == 0) { s.s.search->candidates = 0; }
    for (int b = threadIdx.x; b < DROPIT_BINS; b += RANGE_THREADS) { counts[0][b] = counts[1][b] = 0; }
    __syncthreads();
    for (int digit = 0; digit < 2; digit++) {
        const unsigned* low_counts = counts[digit];
        for (int w = threadIdx.x; w < TILE_WORDS; w += RANGE_THREADS) {
            count_word<false>(counts[0], NULL, s.s.sample, w * 32, DROPIT_TILE, DropRule{}, high, digit == 0);
            if (digit > 0) { count_word<false>(counts[1], NULL, s.s.sample, w * 32, DROPIT_TILE, DropRule{}, low, false); }
        }
        __syncthreads();
        unsigned long long mine = 0, sum; // of the lower's histogram << 32 | of the higher's
        for (int j = 0; j < per_thread; j++) { mine += (unsigned long long)low_counts[first_bin - j] << 32 | counts[0][first_bin - j]; }
        const unsigned long long above = block_exclusive_sum(mine, pair_sums, &sum);
        search_bins(&search[0], high, counts[0], first_bin, (unsigned)above, (unsigned)mine);
        search_bins(&search[1], low, low_counts, first_bin, above >> 32, mine >> 32);
        for (int j = 0; j < per_thread; j++) { counts[0][first_bin - j] = 0; } // nobody else reads them any more
        __syncthreads();
        high = search[0];
        low = search[1];
    }
    if (threadIdx.x == 0) {
        s.s.range[0] = search_key(&high) | ((1u << high.bits) - 1);
        s.s.range[1] = search_key(&low);
    }
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

// the end of a search: threshold, and how many kept elements lie before each tile. One block of 256 threads a tensor
#define OFFSETS_THREADS 256
__global__ void dropit_offsets_kernel(const __grid_constant__ Selections all) {
    __shared__ unsigned long long pair_sums[32];
    __shared__ unsigned warp_sums[32];
    __shared__ unsigned tie_tile;
    __shared__ unsigned tie_rank;
    const Selection& s = all.of[blockIdx.x];
    const unsigned key = search_key(&s.s.search->search), ties = s.s.search->search.remaining;
    Threshold* threshold = s.d.thresholds;
    if (threadIdx.x == 0) { *threshold = {key, 0}; }
    const unsigned per_thread = CEIL_DIV(s.tiles, blockDim.x), first = threadIdx.x * per_thread, last = min(first + per_thread, s.tiles);
    unsigned long long mine = 0, sum; // above << 32 | equal
#pragma unroll 4
    for (unsigned tile = first; tile < last; tile++) {
        mine += (unsigned long long)s.s.tile_counts[tile].x << 32 | s.s.tile_counts[tile].y;
    }
    const unsigned long long before = block_exclusive_sum(mine, pair_sums, &sum);
    unsigned above = before >> 32, equal = (unsigned)before;
    for (unsigned tile = first; tile < last; tile++) {
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

// Packing gives a warp 4,096 elements, in groups of 32 runs: a lane has a run of neighbours in each. In bf16 a run has 8 elements, so that a
// warp's accesses are whole lines; in fp32, where products take ten times as long and bandwidth is no concern, 32, which costs a CPU less.
// Bit b of a mask belongs to element b % PACK_RUN of the lane's run in group b / PACK_RUN of the mask's: this is where it lies from the
// lane's first element on
#define PACK_THREADS 128
#define PACK_RUN (sizeof(floatX) == 2 ? 8 : 32)
#define PACK_GROUPS (128 / PACK_RUN) // of a warp
__device__ inline size_t pack_place(int b) { return (size_t)(b / PACK_RUN) * 32 * PACK_RUN + b % PACK_RUN; }

// of the 32 elements of a mask those whose index is below end
__device__ inline unsigned below_mask(size_t first, size_t end) {
    unsigned mask = 0;
    for (int q = 0; q < 32; q += 8) {
        const size_t i = first + pack_place(q);
        mask |= (i + 8 <= end ? 255u : i < end ? (1u << (end - i)) - 1 : 0u) << q;
    }
    return mask;
}

// Kept elements of a warp's groups, of a lane or of the lanes before it. bf16: 16 fields of 8 bits, 248 at most; with the lane's own there
// may be 256, which carries into the next field, and subtracting the lane's own takes that back. fp32: 4 of 32 bits
struct GroupCounts {
    unsigned of[4];
};
struct AddGroupCounts {
    __device__ GroupCounts operator()(GroupCounts a, GroupCounts b) const {
        return {{a.of[0] + b.of[0], a.of[1] + b.of[1], a.of[2] + b.of[2], a.of[3] + b.of[3]}};
    }
};
// bits of a word that belong to group q, at the lowest places; what is above them is of other groups
__device__ inline unsigned group_bits(const unsigned* words, int q) { return words[q * PACK_RUN / 32] >> q * PACK_RUN % 32; }
__device__ inline unsigned group_count(const GroupCounts& c, int q) { return PACK_RUN == 8 ? group_bits(c.of, q) & 255 : c.of[q]; }

// the bits of each run in a word, counted
__device__ inline unsigned run_counts(unsigned word) {
    if (PACK_RUN == 32) { return __popc(word); }
    word -= word >> 1 & 0x55555555;
    word = (word & 0x33333333) + (word >> 2 & 0x33333333);
    return (word + (word >> 4)) & 0x0f0f0f0f;
}

// Bitmap, offsets and values of the kept elements. One block of 128 threads a tile. bf16: a warp lines its values up in shared memory (19 KiB
// for the block) and writes them as one run; more than MAX_STAGED, as at gamma 0.3, and those of fp32 go to their places one by one
#define MAX_STAGED 2304
template <bool HASHED> __global__ void __launch_bounds__(PACK_THREADS, 8) dropit_pack_kernel(const __grid_constant__ Selections all) {
    typedef std::conditional<PACK_RUN == 8, uint8_t, unsigned>::type RunBits;
    const int most = PACK_RUN == 8 ? MAX_STAGED : 0;
    __shared__ Pack<8> staged[PACK_THREADS / 32][most / 8 + 1 + 32 / 8]; // room for alignment, and a place a lane for what is not kept
    __shared__ unsigned starts[PACK_THREADS / 32][PACK_GROUPS + 1];      // values of the warp before each group; all of them
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    unsigned tile;
    const Selection& s = selection_of(all, blockIdx.x, &tile);
    const Threshold t = s.d.thresholds[s.rule.strategy == MINK ? 0 : tile];
    const int lane = threadIdx.x % 32, own_warp = threadIdx.x / 32;
    const size_t begin = (size_t)tile * DROPIT_TILE, end = begin + DROPIT_TILE, n = s.d.n;
    const size_t first = begin + own_warp * 4096 + lane * PACK_RUN; // the lane's first element
    // ties end before this tile or behind it, but for one tile: a single comparison decides
    const bool ties_end_here = begin < t.tie_end && t.tie_end < end, all_ties = t.tie_end >= end;
    unsigned words[4];
    GroupCounts counts;
#pragma unroll
    for (int h = 0; h < 4; h++) {
        const size_t i = first + h * 1024;
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
        counts.of[h] = run_counts(words[h]);
    }
    GroupCounts before = cg::inclusive_scan(warp, counts, AddGroupCounts());
    for (int h = 0; h < 4; h++) { before.of[h] -= counts.of[h]; }
    if (lane == 31) {
        unsigned start = 0;
#pragma unroll
        for (int q = 0; q < PACK_GROUPS; q++) {
            starts[own_warp][q] = start;
            start += group_count(before, q) + group_count(counts, q);
        }
        starts[own_warp][PACK_GROUPS] = start;
    }
    __syncthreads();
    const unsigned* group_starts = starts[own_warp];
    const unsigned count = group_starts[PACK_GROUPS];
    unsigned run = s.rule.strategy == MINK ? s.s.tile_offsets[tile] : tile * s.k_tile; // where the warp's values begin
    for (int w = 0; w < own_warp; w++) { run += starts[w][PACK_GROUPS]; }
    const floatX* from = s.x + first;
    RunBits* bits_to = (RunBits*)s.d.bitmap + first / PACK_RUN;
    if (first % DROPIT_SEGMENT == 0) {
#pragma unroll
        for (int q = 0; q < PACK_GROUPS; q++) {
            const size_t i = first + q * 32 * PACK_RUN;
            if (i < n) { s.d.offsets[i / DROPIT_SEGMENT] = run + group_starts[q] + group_count(before, q); }
        }
    }
    if (PACK_RUN == 8 && end <= n && count <= MAX_STAGED) {
        const unsigned shift = run % 8, unused = most + 8 + lane; // places in shared memory and in values are aligned alike
        floatX *own = staged[own_warp]->v, *to = s.d.values + (run - shift);
#pragma unroll
        for (int q = 0; q < PACK_GROUPS; q++) {
            const Pack<8> p = *(const Pack<8>*)(from + q * 32 * PACK_RUN); // again, from cache: in registers they would leave room for few warps
            const unsigned bits = group_bits(words, q);
            unsigned at = shift + group_starts[q] + group_count(before, q);
            bits_to[q * 32] = (RunBits)bits;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const unsigned bit = bits >> j & 1;
                own[bit ? at : unused] = p.v[j]; // no branches
                at += bit;
            }
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
#pragma unroll
        for (int q = 0; q < PACK_GROUPS; q++) {
            RunBits bits = (RunBits)group_bits(words, q);
            floatX* to = s.d.values + run + group_starts[q] + group_count(before, q);
            if ((first + q * 32 * PACK_RUN) / DROPIT_SEGMENT * DROPIT_SEGMENT < n) { bits_to[q * 32] = bits; }
            for (; bits != 0; bits &= bits - 1) { *to++ = from[q * 32 * PACK_RUN + __ffs((int)bits) - 1]; }
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
        dropit_range_kernel<<<count, RANGE_THREADS, 0, stream>>>(all);
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
// in PyTorch: F.cross_entropy(logits, label, label_smoothing=smoothing). Of images that mixup or cutmix mixed, lam < 1, -log p[label] and onehot
// are lam times those of b's label plus 1 - lam times those of image B-1-b's: timm's SoftTargetCrossEntropy with the targets of its Mixup.
// ranks[b] = how many classes come before the label's (the one of larger weight), by logit, then by index; a NaN counts as coming before.
// logits (B, V), losses (B), ranks (B), labels (B). LOSS_LANES lanes a row
__global__ void cross_entropy_kernel(float* losses, int* ranks, floatX* logits, const int* labels, int B, int V, float smoothing, float lam, float scale) {
    auto lanes = cg::tiled_partition<LOSS_LANES>(cg::this_thread_block());
    const int b = blockIdx.x * (blockDim.x / LOSS_LANES) + threadIdx.x / LOSS_LANES;
    if (b >= B) { return; }
    const int lane = (int)lanes.thread_rank(), first = labels[b], second = lam < 1.0f ? labels[B - 1 - b] : first, label = lam < 0.5f ? second : first;
    floatX* row = logits + (size_t)b * V;
    const float correct = (float)row[label], mixed = lam * (float)row[first] + (1.0f - lam) * (float)row[second];
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
    lanes.sync(); // every lane has read the labels' logits, which one of them overwrites; a reduction does not order memory
    for (int v = lane; v < V; v += LOSS_LANES) {
        const float p = expf((float)row[v] - lse);
        row[v] = (floatX)((p - (v == first ? weight : 0.0f) - (v == second ? second_weight : 0.0f) - smoothing / V) * scale);
    }
    if (lane == 0) {
        losses[b] = (1.0f - smoothing) * (lse - mixed) + smoothing * (lse - logit_sum / V);
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
                   float smoothing, float lam, float scale) {
    const int rows_per_block = 64 / LOSS_LANES;
    cross_entropy_kernel<<<CEIL_DIV(B, rows_per_block), 64, 0, main_stream>>>(losses, ranks, logits, labels, B, V, smoothing, lam, scale);
    loss_sum_kernel<<<1, 64, 0, main_stream>>>(result, losses, ranks, B);
    kernelCheck();
}
// ---- end shared: loss ------------------------------------------------------

// ---- shared: optimizer -----------------------------------------------------
typedef struct {
    bool adamw; // else SGD with momentum
    double learning_rate, beta1, beta2, eps, weight_decay, momentum;
    double clip; // largest norm of all gradients together; 0: no clipping
    bool nesterov; // SGD
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

// SGD with momentum, as torch.optim.SGD: g += weight_decay * w; m = momentum * m + g; w -= lr * m, or, by Nesterov, lr * (g + momentum * m).
// n is a multiple of VEC
__global__ void sgd_kernel(floatX* params, float* master, float* m, const float* grads, size_t n, const StepResult* result,
                           float clip, float lr, float momentum, float weight_decay, bool nesterov) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) {
        float g[VEC], mi[VEC], w[VEC];
        const float factor = clip_factor(result, clip);
        load<VEC>(g, grads + i);
        load<VEC>(mi, m + i);
        load<VEC>(w, master + i);
        for (int j = 0; j < VEC; j++) {
            const float gj = g[j] * factor + weight_decay * w[j];
            mi[j] = momentum * mi[j] + gj;
            w[j] -= lr * (nesterov ? gj + momentum * mi[j] : mi[j]);
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
            (float)o.weight_decay, o.nesterov);
    }
    kernelCheck();
}

// ema = decay * ema + rest * w with rest = 1 - decay, in that order of roundings, as timm's ModelEma. ema, w (n), n a multiple of VEC.
// A thread updates VEC elements
__global__ void ema_kernel(float* ema, const float* w, size_t n, float decay, float rest) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) {
        float e[VEC], v[VEC];
        load<VEC>(e, ema + i);
        load<VEC>(v, w + i);
        for (int j = 0; j < VEC; j++) { e[j] = e[j] * decay + rest * v[j]; }
        store<VEC>(ema + i, e);
    }
}

void ema_update(float* ema, const float* w, size_t n, double decay) {
    ema_kernel<<<CEIL_DIV(n, (size_t)256 * VEC), 256, 0, main_stream>>>(ema, w, n, (float)decay, (float)(1.0 - decay));
    kernelCheck();
}

// out = in, rounded to floatX. out, in (n), n a multiple of VEC. A thread rounds VEC elements
__global__ void round_kernel(floatX* out, const float* in, size_t n) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i < n) {
        float v[VEC];
        load<VEC>(v, in + i);
        store<VEC>(out + i, v);
    }
}

// Learning rate over a run: linear warm-up from warmup_lr to lr, a half cosine to min_lr, and min_lr from then on (cool-down).
// By steps: step t of the warm-up has the share (t + 1) / warmup of the way, and the cosine begins where the warm-up ends.
// By epochs: as timm's CosineLRScheduler(t_initial=length, warmup_t=warmup, warmup_lr_init=warmup_lr, lr_min=min_lr) under DeiT's main.py, which
// calls lr_scheduler.step(epoch) after each epoch: epoch e runs at what timm has for e - 1, so the first two at warmup_lr, and the cosine
// counts from the first epoch: what the warm-up takes of it is not seen
typedef struct {
    bool by_epochs;
    double lr, min_lr, warmup_lr;
    int warmup, length; // in steps, or in epochs; length is that of warm-up and cosine
    int epoch_steps;
} Schedule;

double learning_rate_at(const Schedule* s, int step) {
    const int epoch = step / s->epoch_steps, t = !s->by_epochs ? step : epoch > 0 ? epoch - 1 : 0;
    const int done = s->by_epochs ? t : t + 1, begin = s->by_epochs ? 0 : s->warmup;
    if (t < s->warmup) { return s->warmup_lr + (s->lr - s->warmup_lr) * done / s->warmup; }
    if (t >= s->length) { return s->min_lr; }
    return s->min_lr + 0.5 * (s->lr - s->min_lr) * (1.0 + cos(M_PI * (t - begin) / (s->length > begin ? s->length - begin : 1)));
}
// ---- end shared: optimizer -------------------------------------------------

// ---- shared: image resize --------------------------------------------------
// Crops, resizes and mirrors images as Pillow does it, to the bit: bicubic (a = -0.5) over a support that grows with the shrinking
// (antialiasing), weights computed in double and rounded to 22 bits behind the point, columns first, a rounding to bytes between the passes.
// (Pillow 13 begins with the rows where they shrink much more than the columns; there it differs by some levels from us and from all before it.)
// The host computes the weights and lays each image down turned, so that one column of one channel is a run of bytes: then a thread has a
// run of RESIZE_V neighbours in both passes, and all of them share their weights
#define RESIZE_V 64
#define RESIZE_BITS 22

// the part of an image that is wanted: a box of it, resized to full_height x full_width, of which a window of S x S, mirrored if so
typedef struct {
    int top, left, height, width; // of the box
    size_t full_height, full_width, window_top, window_left;
    bool mirror;
} ImageView;

// One image for the device; offsets in bytes
typedef struct {
    size_t staged;   // in the staging buffer: int first[S], weights[S][taps] of the columns, the same of the rows, then
    size_t pixels;   // behind staged: (columns, CH, pitch), what is needed of the box, turned
    size_t resized;  // in the staging buffer: (S * CH, pitch), the columns resized, then
    size_t straight; // behind resized: (pitch, row pitch), the same turned back
    size_t staged_bytes, scratch_bytes; // of the former two, and of the latter two
    unsigned image;  // its place in the batch
    int pitch;       // rows, filled up to a multiple of RESIZE_V
    int column_taps, row_taps;
    int first_row, rows, first_column, columns; // of the box: what the window needs
} ResizeTask;

// The pixels that pixel `at` of n, resized to full, is made of: the first and how many
inline int resize_range(int n, size_t full, size_t at, int* first) {
    const double scale = (double)n / full, support = scale < 1.0 ? 2.0 : 2.0 * scale, center = (at + 0.5) * scale;
    const int low = (int)(center - support + 0.5), high = (int)(center + support + 0.5);
    *first = low > 0 ? low : 0;
    return (high < n ? high : n) - *first;
}

// the most that resize_range returns: any further pixel would have the weight 0
inline int resize_taps(int n, size_t full) {
    const double scale = (double)n / full, support = scale < 1.0 ? 2.0 : 2.0 * scale;
    return 2.0 * support < n ? (int)ceil(2.0 * support) : n;
}

// Pillow's bicubic filter, and PyTorch's antialiased one: Keys' cubic, a = -0.5
inline double resize_filter(double x) {
    x = fabs(x);
    return x < 1.0 ? ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0 : x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
}

// first[S] and weights[S][taps] of the window of S that begins at `window`, backwards if mirrored; first counts from pixel `origin`
void resize_weights(int* first, int* weights, int taps, int n, size_t full, size_t window, int S, int origin, bool mirror) {
    const double scale = (double)n / full, filter_scale = scale < 1.0 ? 1.0 : scale, inverse = 1.0 / filter_scale;
    for (int i = 0; i < S; i++) {
        const int out = mirror ? S - 1 - i : i;
        const double center = (window + i + 0.5) * scale;
        int low, count = resize_range(n, full, window + i, &low);
        double sum = 0.0;
        if (count > taps) { count = taps; }
        for (int k = 0; k < count; k++) { sum += resize_filter((k + low - center + 0.5) * inverse); }
        first[out] = low - origin;
        for (int k = 0; k < taps; k++) {
            double w = k < count ? resize_filter((k + low - center + 0.5) * inverse) : 0.0;
            if (sum != 0.0) { w /= sum; }
            weights[(size_t)out * taps + k] = (int)(w * (1 << RESIZE_BITS) + (w < 0.0 ? -0.5 : 0.5));
        }
    }
}

// what a view needs; the caller says where: staged, resized and image
ResizeTask resize_task(const ImageView* v, int S, int CH) {
    ResizeTask t = {};
    int first;
    t.row_taps = resize_taps(v->height, v->full_height);
    t.column_taps = resize_taps(v->width, v->full_width);
    t.rows = resize_range(v->height, v->full_height, v->window_top + S - 1, &first) + first;
    resize_range(v->height, v->full_height, v->window_top, &t.first_row);
    t.rows -= t.first_row;
    t.columns = resize_range(v->width, v->full_width, v->window_left + S - 1, &first) + first;
    resize_range(v->width, v->full_width, v->window_left, &t.first_column);
    t.columns -= t.first_column;
    t.pitch = CEIL_DIV(t.rows, RESIZE_V) * RESIZE_V;
    const size_t row_pitch = CEIL_DIV((size_t)S * CH, (size_t)RESIZE_V) * RESIZE_V;
    t.pixels = align_up(numel(S, 2 + t.column_taps + t.row_taps) * sizeof(int));
    t.staged_bytes = align_up(t.pixels + numel(t.columns + t.column_taps, CH, t.pitch)); // taps of weight 0 may lie behind the last column
    t.straight = align_up(row_pitch * t.pitch);
    t.scratch_bytes = align_up(t.straight + row_pitch * (t.pitch + t.row_taps)); // or row
    return t;
}

// the bytes of a matrix of 8 x 8, r[row] >> 8 * column, change places with those beyond its diagonal
__host__ __device__ inline void turn_8x8(uint64_t* r) {
    for (int j = 0; j < 4; j++) {
        const uint64_t x = (r[j] >> 32 ^ r[j+4]) & 0x00000000FFFFFFFFull;
        r[j+4] ^= x;
        r[j] ^= x << 32;
    }
    for (int q = 0; q < 4; q++) {
        const int j = (q & 1) + (q & 2) * 2;
        const uint64_t x = (r[j] >> 16 ^ r[j+2]) & 0x0000FFFF0000FFFFull;
        r[j+2] ^= x;
        r[j] ^= x << 16;
    }
    for (int j = 0; j < 8; j += 2) {
        const uint64_t x = (r[j] >> 8 ^ r[j+1]) & 0x00FF00FF00FF00FFull;
        r[j+1] ^= x;
        r[j] ^= x << 8;
    }
}

// out[x][y] = in[y][x]: in (rows, columns) with `stride` bytes a row, out (columns, pitch)
void turn_bytes(uint8_t* out, size_t pitch, const uint8_t* in, size_t stride, size_t rows, size_t columns) {
    const size_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (size_t x = 0; x < whole_columns; x += 8) {
        for (size_t y = 0; y < whole_rows; y += 8) {
            uint64_t r[8];
            for (int j = 0; j < 8; j++) { memcpy(&r[j], in + (y + j) * stride + x, 8); }
            turn_8x8(r);
            for (int j = 0; j < 8; j++) { memcpy(out + (x + j) * pitch + y, &r[j], 8); }
        }
        for (size_t y = whole_rows; y < rows; y++) { for (int j = 0; j < 8; j++) { out[(x + j) * pitch + y] = in[y * stride + x + j]; } }
    }
    for (size_t x = whole_columns; x < columns; x++) { for (size_t y = 0; y < rows; y++) { out[x * pitch + y] = in[y * stride + x]; } }
}

// the host's part: weights and turned pixels of image (height, width, CH), as the task lays them out
void resize_stage(uint8_t* staged, const ResizeTask* t, const ImageView* v, const uint8_t* image, int width, int S, int CH) {
    int* first_column = (int*)staged;
    int* first_row = first_column + (size_t)S * (1 + t->column_taps);
    resize_weights(first_column, first_column + S, t->column_taps, v->width, v->full_width, v->window_left, S, t->first_column, v->mirror);
    resize_weights(first_row, first_row + S, t->row_taps, v->height, v->full_height, v->window_top, S, t->first_row, false);
    const size_t stride = (size_t)width * CH;
    turn_bytes(staged + t->pixels, t->pitch, image + (v->top + t->first_row) * stride + (size_t)(v->left + t->first_column) * CH, stride,
               t->rows, (size_t)t->columns * CH);
}

// resized[x, c, y] = sum over k of weights[x][k] * pixels[first[x] + k, c, y], rounded to a byte; a thread makes RESIZE_V rows y of one x, c
// grid: threads of the largest task, tasks
__global__ void resize_columns_kernel(uint8_t* staging, const ResizeTask* tasks, int S, int CH) {
    const ResizeTask t = tasks[blockIdx.y];
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)S * CH * (t.pitch / RESIZE_V)) {
        const unsigned runs = t.pitch / RESIZE_V, xc = (unsigned)i / runs, x = xc / CH, y = ((unsigned)i - xc * runs) * RESIZE_V;
        const int* first = (const int*)(staging + t.staged);
        const int* weights = first + S + (size_t)x * t.column_taps;
        const uint8_t* pixels = staging + t.staged + t.pixels + ((size_t)first[x] * CH + xc % CH) * t.pitch + y;
        int sum[RESIZE_V];
        for (int j = 0; j < RESIZE_V; j++) { sum[j] = 1 << (RESIZE_BITS - 1); }
        for (int k = 0; k < t.column_taps; k++) {
            const Pack<RESIZE_V, uint8_t>& p = *(const Pack<RESIZE_V, uint8_t>*)pixels;
            const int w = weights[k];
            for (int j = 0; j < RESIZE_V; j++) { sum[j] += w * p.v[j]; }
            pixels += (size_t)CH * t.pitch;
        }
        Pack<RESIZE_V, uint8_t>& out = *(Pack<RESIZE_V, uint8_t>*)(staging + t.resized + (size_t)xc * t.pitch + y);
        for (int j = 0; j < RESIZE_V; j++) { out.v[j] = (uint8_t)min(max(sum[j] >> RESIZE_BITS, 0), 255); }
    }
}

// straight[y][xc] = resized[xc][y], a thread turns 8 x 8 bytes; row_pitch is S * CH filled up to a multiple of RESIZE_V
__global__ void resize_turn_kernel(uint8_t* staging, const ResizeTask* tasks, int row_pitch) {
    const ResizeTask t = tasks[blockIdx.y];
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)(t.pitch / 8) * (row_pitch / 8)) {
        const unsigned runs = row_pitch / 8, yb = (unsigned)i / runs, xb = (unsigned)i - yb * runs;
        const uint8_t* in = staging + t.resized + (size_t)xb * 8 * t.pitch + yb * 8;
        uint8_t* out = staging + t.resized + t.straight + (size_t)yb * 8 * row_pitch + xb * 8;
        uint64_t r[8];
        for (int j = 0; j < 8; j++) { r[j] = *(const uint64_t*)(in + (size_t)j * t.pitch); }
        turn_8x8(r);
        for (int j = 0; j < 8; j++) { *(uint64_t*)(out + (size_t)j * row_pitch) = r[j]; }
    }
}

// images[image, y, xc] = sum over k of weights[y][k] * straight[first[y] + k][xc], rounded to a byte; a thread makes RESIZE_V of one row
// images (B, S, S, CH)
__global__ void resize_rows_kernel(uint8_t* images, const uint8_t* staging, const ResizeTask* tasks, int S, int CH, int row_pitch) {
    const ResizeTask t = tasks[blockIdx.y];
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (size_t)S * (row_pitch / RESIZE_V)) {
        const unsigned runs = row_pitch / RESIZE_V, y = (unsigned)i / runs, xc = ((unsigned)i - y * runs) * RESIZE_V, row = (unsigned)S * CH;
        const int* first = (const int*)(staging + t.staged) + (size_t)S * (1 + t.column_taps);
        const int* weights = first + S + (size_t)y * t.row_taps;
        const uint8_t* pixels = staging + t.resized + t.straight + (size_t)first[y] * row_pitch + xc;
        int sum[RESIZE_V];
        for (int j = 0; j < RESIZE_V; j++) { sum[j] = 1 << (RESIZE_BITS - 1); }
        for (int k = 0; k < t.row_taps; k++) {
            const Pack<RESIZE_V, uint8_t>& p = *(const Pack<RESIZE_V, uint8_t>*)pixels;
            const int w = weights[k];
            for (int j = 0; j < RESIZE_V; j++) { sum[j] += w * p.v[j]; }
            pixels += row_pitch;
        }
        Pack<RESIZE_V, uint8_t> bytes;
        for (int j = 0; j < RESIZE_V; j++) { bytes.v[j] = (uint8_t)min(max(sum[j] >> RESIZE_BITS, 0), 255); }
        uint8_t* out = images + ((size_t)t.image * S + y) * row + xc;
        if (row % 16 == 0) {
            for (unsigned j = 0; j < RESIZE_V && xc + j < row; j += 16) { *(Pack<16, uint8_t>*)(out + j) = *(Pack<16, uint8_t>*)(bytes.v + j); }
        } else {
            for (unsigned j = 0; j < RESIZE_V && xc + j < row; j++) { out[j] = bytes.v[j]; }
        }
    }
}

// the device's part, for n tasks whose weights and pixels are in staging; largest_pitch is that of these tasks
void resize_images(uint8_t* images, uint8_t* staging, const ResizeTask* tasks, int n, int largest_pitch, int S, int CH, cudaStream_t stream) {
    const int row_pitch = CEIL_DIV(S * CH, RESIZE_V) * RESIZE_V;
    const size_t columns = numel(S, CH, largest_pitch / RESIZE_V), blocks = numel(row_pitch / 8, largest_pitch / 8), rows = numel(S, row_pitch / RESIZE_V);
    resize_columns_kernel<<<dim3((unsigned)CEIL_DIV(columns, (size_t)128), n), 128, 0, stream>>>(staging, tasks, S, CH);
    kernelCheck();
    resize_turn_kernel<<<dim3((unsigned)CEIL_DIV(blocks, (size_t)128), n), 128, 0, stream>>>(staging, tasks, row_pitch);
    kernelCheck();
    resize_rows_kernel<<<dim3((unsigned)CEIL_DIV(rows, (size_t)128), n), 128, 0, stream>>>(images, staging, tasks, S, CH, row_pitch);
    kernelCheck();
}
// ---- end shared: image resize ----------------------------------------------

// ---- shared: augmentation --------------------------------------------------
// What timm does to a training image after crop and flip: RandAugment (Cubuk et al., arXiv 1909.13719; on bytes, as Pillow computes), random erasing (Zhong
// et al., arXiv 1708.04896), mixup (Zhang et al., arXiv 1710.09412) and cutmix (Yun et al., arXiv 1905.04899). The host draws what happens to each
// image, by Philox from its place in the epoch; the device computes it.
enum { NO_AUGMENT, AUTO_CONTRAST, EQUALIZE, INVERT, ROTATE, POSTERIZE, SOLARIZE, SOLARIZE_ADD, COLOR, CONTRAST, BRIGHTNESS, SHARPNESS, SHEAR_X, SHEAR_Y,
       TRANSLATE_X, TRANSLATE_Y, NUM_AUGMENTS }; // in the order of timm's _RAND_INCREASING_TRANSFORMS

typedef struct {
    int layers;              // RandAugment: operations an image, each applied with probability 1/2; 0: none
    int magnitude;           // 0 to 10
    double magnitude_std;
    double erase;            // probability
    double mixup, cutmix;    // alpha of their beta distributions, 0: off
    double mix, mix_cutmix;  // probabilities of mixing a batch, and of cutmix where both are on
} AugmentOptions;

typedef struct {
    int op, value;           // value: bits that stay, threshold or summand
    float factor;            // 0: the degenerate image (grey, black, blurred), 1: the image
    double matrix[6];        // input's (x, y) = matrix (2, 3) * (x, y, 1) of the output, both of pixel centres
} ImageAugment;

typedef struct {
    int top, left, height, width; // height 0: nothing is erased
} EraseBox;

typedef struct {
    uint8_t v[4];
} Pixel;

// what happens to a normalised batch: erasing, then mixing image b with image n-1-b
typedef struct {
    const EraseBox* erased;  // (n), NULL: none
    unsigned long long seed, place, place_step; // place in the epoch of the batch's first image, and from one to the next
    unsigned epoch;
    int n;
    float lam;               // weight of image b and of its label; 1: no mixing
    bool cut;                // cutmix: the pixels of a box are the other image's; else mixup: all are a weighted mean
    int top, bottom, left, right;
} BatchAugment;

// reads timm's name of a RandAugment, "rand-m9-mstd0.5-inc1"; "none"
void parse_augment(AugmentOptions* o, const char* text) {
    bool magnitude = false, increasing = false, known = strncmp(text, "rand", 4) == 0;
    o->layers = 0;
    if (strcmp(text, "none") == 0) { return; }
    o->layers = 2;
    o->magnitude_std = 0.0;
    const char* at = text + 4;
    while (known && *at == '-') {
        char* end = NULL;
        if (strncmp(++at, "mstd", 4) == 0) {
            o->magnitude_std = strtod(at + 4, &end);
            known = end > at + 4 && o->magnitude_std >= 0.0 && o->magnitude_std <= 100.0;
        } else if (strncmp(at, "inc1", 4) == 0) {
            increasing = true;
            end = (char*)at + 4;
        } else {
            const long v = *at == 'm' || *at == 'n' ? strtol(at + 1, &end, 10) : -1;
            known = end > at + 1 && (*at == 'm' ? v >= 0 && v <= 10 : v >= 1 && v <= 8);
            if (*at == 'm') {
                o->magnitude = (int)v;
                magnitude = true;
            } else {
                o->layers = (int)v;
            }
        }
        at = end;
    }
    require(known && *at == 0 && magnitude && increasing, "-aa %s is not a RandAugment that is known here; choose none or rand-mM[-nN][-mstdX]-inc1 with M up to 10, "
            "N from 1 to 8 and X up to 100, such as rand-m9-mstd0.5-inc1", text);
}

// a = timm's operation at a level of 0 to 10, for images of side S. Posterize at level 10 keeps no bit: black, as in Pillow before 10
void augment_argument(ImageAugment* a, int op, double level, bool negate, int S) {
    const double sign = negate ? -1.0 : 1.0, half = S / 2.0;
    double *m = a->matrix, angle = 0.0;
    memset(a, 0, sizeof(*a));
    a->op = op;
    m[0] = m[4] = 1.0;
    switch (op) {
    case ROTATE: // about the centre; the terms rounded to 15 decimals, as Pillow's
        angle = -sign * level / 10.0 * 30.0 * M_PI / 180.0;
        m[0] = m[4] = rint(cos(angle) * 1e15) / 1e15;
        m[1] = rint(sin(angle) * 1e15) / 1e15;
        m[3] = -m[1];
        m[2] = -half * m[0] - half * m[1] + half;
        m[5] = -half * m[3] - half * m[4] + half;
        break;
    case POSTERIZE: a->value = 4 - (int)(level / 10.0 * 4); break;
    case SOLARIZE: a->value = 256 - (int)(level / 10.0 * 256); break;
    case SOLARIZE_ADD: a->value = (int)(level / 10.0 * 110); break;
    case COLOR: case CONTRAST: case BRIGHTNESS: case SHARPNESS: a->factor = (float)fmax(0.1, 1.0 + sign * (level / 10.0) * 0.9); break;
    case SHEAR_X: m[1] = sign * (level / 10.0) * 0.3; break;
    case SHEAR_Y: m[3] = sign * (level / 10.0) * 0.3; break;
    case TRANSLATE_X: m[2] = sign * (level / 10.0) * 0.45 * S; break;
    case TRANSLATE_Y: m[5] = sign * (level / 10.0) * 0.45 * S; break;
    default: break;
    }
}

// the operation that an image of side S meets in a layer
void draw_augment(ImageAugment* a, const AugmentOptions* o, unsigned long long seed, unsigned epoch, unsigned long long place, int layer, int S) {
    const uint4 u = philox(seed, RNG_RANDAUGMENT, epoch, place << 8 | 2 * layer), v = philox(seed, RNG_RANDAUGMENT, epoch, place << 8 | (2 * layer + 1));
    const int op = 1 + (int)((unsigned long long)u.x * (NUM_AUGMENTS - 1) >> 32);
    const double level = fmin(10.0, fmax(0.0, o->magnitude + o->magnitude_std * normal(v)));
    augment_argument(a, u.y >> 31 ? NO_AUGMENT : op, level, u.z >> 31, S);
}

#define ERASE_ATTEMPTS 10
// the last 16 numbers of an image are its box's, the ones before its pixels'
unsigned long long erase_draw(unsigned long long place, int i) { return place << 32 | (0xFFFFFFF0u + i); }

// timm's RandomErasing with one rectangle: 0.02 to 1/3 of the area, its sides' ratio log-uniform in 0.3 to 1/0.3
EraseBox draw_erase(double probability, unsigned long long seed, unsigned epoch, unsigned long long place, int S) {
    EraseBox box = {0, 0, 0, 0};
    if (uniform(philox(seed, RNG_ERASE, epoch, erase_draw(place, ERASE_ATTEMPTS)).x) > probability) { return box; }
    for (int attempt = 0; attempt < ERASE_ATTEMPTS; attempt++) {
        const uint4 u = philox(seed, RNG_ERASE, epoch, erase_draw(place, attempt));
        const double area = (0.02 + (1.0 / 3.0 - 0.02) * uniform(u.x)) * S * S, ratio = exp(log(0.3) * (1.0 - 2.0 * uniform(u.y)));
        const int h = (int)rint(sqrt(area * ratio)), w = (int)rint(sqrt(area / ratio));
        if (h < S && w < S) {
            box.top = (int)((unsigned long long)u.z * (S - h + 1) >> 32);
            box.left = (int)((unsigned long long)u.w * (S - w + 1) >> 32);
            box.height = w > 0 ? h : 0;
            box.width = w;
            return box;
        }
    }
    return box;
}

// log of a draw of Gamma(alpha, 1) (Marsaglia and Tsang, ACM TOMS 26, 2000), in which a small alpha does not underflow
double draw_log_gamma(double alpha, unsigned long long seed, unsigned step, unsigned long long* i) {
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
double draw_beta(double alpha, unsigned long long seed, unsigned step, unsigned long long* i) {
    const double a = draw_log_gamma(alpha, seed, step, i), b = draw_log_gamma(alpha, seed, step, i);
    return 1.0 / (1.0 + exp(b - a));
}

// cutmix's box: a square of 1 - lam of the area about pixel (y, x), what lies in the image of it; lam becomes the rest of the image
void cutmix_box(BatchAugment* a, double lam, int y, int x, int S) {
    const int side = (int)(S * sqrt(1.0 - lam));
    a->top = y - side / 2 > 0 ? y - side / 2 : 0;
    a->left = x - side / 2 > 0 ? x - side / 2 : 0;
    a->bottom = y + (side + 1) / 2 < S ? y + (side + 1) / 2 : S;
    a->right = x + (side + 1) / 2 < S ? x + (side + 1) / 2 : S;
    a->lam = (float)(1.0 - (double)(a->bottom - a->top) * (a->right - a->left) / ((double)S * S));
}

// how this rank's images of side S of a batch are mixed: timm's Mixup, mode batch. batch counts the run's batches
void draw_mix(BatchAugment* a, const AugmentOptions* o, unsigned long long seed, unsigned batch, int S) {
    unsigned long long i = (unsigned long long)rank << 32;
    const uint4 u = philox(seed, RNG_MIX, batch, i++);
    a->lam = 1.0f;
    a->cut = o->cutmix > 0.0 && (o->mixup == 0.0 || uniform(u.y) < o->mix_cutmix);
    if ((o->mixup == 0.0 && o->cutmix == 0.0) || uniform(u.x) >= o->mix) { return; }
    const double lam = draw_beta(a->cut ? o->cutmix : o->mixup, seed, batch, &i);
    a->lam = (float)lam;
    if (a->cut) { cutmix_box(a, lam, (int)((unsigned long long)u.z * S >> 32), (int)((unsigned long long)u.w * S >> 32), S); }
}

// Normal noise of a pixel and channel that random erasing puts in place of the image's (Box and Muller; one Philox has the four channels' words)
__device__ inline float erase_noise(unsigned long long seed, unsigned epoch, unsigned long long place, unsigned pixel, unsigned c) {
    const uint4 u = philox(seed, RNG_ERASE, epoch, place << 32 | pixel);
    const float length = ((c < 2 ? u.x : u.z) + 0.5f) * 2.3283064365386963e-10f, turn = (c < 2 ? u.y : u.w) * 1.4629180792671596e-09f; // 2^-32, 2 pi 2^-32
    return sqrtf(-2.0f * logf(length)) * (c & 1 ? sinf(turn) : cosf(turn));
}

// V pixels of CH channels from pixel i on; mirrored: of the image mirrored left to right. i, S*S and the address divide by V
template <int CH, int V> __device__ inline void load_pixels(uint8_t* x, const uint8_t* image, unsigned i, unsigned S, bool mirrored) {
    if (mirrored) {
        for (int q = 0; q < V; q++) {
            const unsigned row = (i + q) / S, from = row * S + S - 1 - (i + q - row * S);
            for (int c = 0; c < CH; c++) { x[q * CH + c] = image[(size_t)from * CH + c]; }
        }
    } else {
        for (int k = 0; k < CH; k++) { *(Pack<V, uint8_t>*)(x + k * V) = *(const Pack<V, uint8_t>*)(image + (size_t)i * CH + k * V); }
    }
}

// Pillow's Image.blend of two values: truncated, never rounded; no fused operation, whose last bit would be another
__device__ inline uint8_t blend(int from, int to, float factor) {
    const float v = __fadd_rn((float)from, __fmul_rn(factor, (float)(to - from)));
    return v <= 0.0f ? 0 : v >= 255.0f ? 255 : (uint8_t)v;
}

// Pillow's conversion of R, G, B to grey
__device__ inline int luma(const uint8_t* x) { return (x[0] * 19595 + x[1] * 38470 + x[2] * 7471 + 0x8000) >> 16; }

// Pillow's cubic through four values (a = -1), between v[1] and v[2]. As a polynomial: where all are equal it gives their very value, which is then truncated
__device__ inline float cubic(float v0, float v1, float v2, float v3, float d) {
    return v1 + d * (v2 - v0 + d * (2.0f * (v0 - v1) + v2 - v3 + d * (v1 - v0 + v3 - v2)));
}

__device__ inline int clamp_index(int i, int n) { return i < 0 ? 0 : i >= n ? n - 1 : i; }

// Operations that map each value by itself become tables: tables[b, c, v] = what value v becomes in channel c of image b.
//     AutoContrast: (v - min) * 255 / (max - min)      Equalize: (step/2 + pixels below v) / step, step = (pixels - those of the largest value) / 255
//     Contrast: blend(mean grey, v)     Brightness: blend(0, v)     Posterize, Solarize, SolarizeAdd, Invert
// tables (n, CH, 256), images (n, pixels, CH), augments (n). A block of 256 threads an image. Histograms are sums of integers: their order is no matter.
// pixels and images divide by V
template <int CH, int V> __global__ void augment_table_kernel(uint8_t* tables, const uint8_t* images, const ImageAugment* augments, unsigned pixels) {
    __shared__ unsigned counts[CH][256];
    __shared__ int low[CH], high[CH]; // smallest and largest value; Equalize: low is the step; Contrast: low[0] is the mean
    const size_t b = blockIdx.x;
    const unsigned t = threadIdx.x;
    const int op = augments[b].op, value = augments[b].value;
    const float factor = augments[b].factor;
    const bool grey = op == CONTRAST && CH == 3;
    if (op == NO_AUGMENT || op == ROTATE || op == COLOR || op >= SHARPNESS) { return; }
    if (op == AUTO_CONTRAST || op == EQUALIZE || op == CONTRAST) {
        for (int c = 0; c < CH; c++) { counts[c][t] = 0; }
        __syncthreads();
        for (unsigned i = t * V; i < pixels; i += 256 * V) {
            alignas(4) uint8_t x[V * CH];
            load_pixels<CH, V>(x, images + b * pixels * CH, i, 1, false);
            for (int q = 0; q < V; q++) {
                if (grey) { atomicAdd_block(&counts[0][luma(x + q * CH)], 1u); }
                else { for (int c = 0; c < CH; c++) { atomicAdd_block(&counts[c][x[q * CH + c]], 1u); } }
            }
        }
        __syncthreads();
        if (op == CONTRAST ? t == 0 : t < CH) {
            unsigned long long sum = 0;
            unsigned below = 0, last = 0;
            low[t] = high[t] = -1;
            for (int v = 0; v < 256; v++) {
                const unsigned count = counts[t][v];
                if (count > 0) {
                    if (low[t] < 0) { low[t] = v; }
                    high[t] = v;
                    last = count;
                }
                if (op == EQUALIZE) { counts[t][v] = below; }
                below += count;
                for (int c = 0; op == CONTRAST && c < (grey ? 1 : CH); c++) { sum += (unsigned long long)counts[c][v] * v; }
            }
            if (op == EQUALIZE) { low[t] = (int)((below - last) / 255); }
            if (op == CONTRAST) { low[t] = (int)((double)sum / ((double)pixels * (grey ? 1 : CH)) + 0.5); }
        }
        __syncthreads();
    }
    for (int c = 0; c < CH; c++) {
        int v = (int)t;
        if (op == AUTO_CONTRAST && high[c] > low[c]) {
            const double scale = 255.0 / (high[c] - low[c]);
            v = (int)__dadd_rn(__dmul_rn((double)v, scale), -low[c] * scale);
            v = v < 0 ? 0 : v > 255 ? 255 : v;
        } else if (op == EQUALIZE && low[c] > 0) {
            v = (int)((low[c] / 2 + counts[c][t]) / low[c]);
            v = v > 255 ? 255 : v;
        } else if (op == INVERT) { v = 255 - v;
        } else if (op == POSTERIZE) { v &= 0xFF00 >> value;
        } else if (op == SOLARIZE) { v = v < value ? v : 255 - v;
        } else if (op == SOLARIZE_ADD) { v = v >= 128 ? v : v + value < 255 ? v + value : 255;
        } else if (op == CONTRAST) { v = blend(low[0], v, factor);
        } else if (op == BRIGHTNESS) { v = blend(0, v, factor); }
        tables[(b * CH + c) * 256 + t] = (uint8_t)v;
    }
}

// out = one operation an image, as Pillow computes it. The operation is one of a block's, so that a thread meets one case only
//     Sharpness: blend(SMOOTH, image), SMOOTH = (sum of 3 x 3 + 4 * centre) / 13 rounded, the border as it is
//     Color: blend(grey, image) of three channels, else the image      Rotate, Shear, Translate: bicubic at the matrix's place, fill outside of the image
// out, inp (n, S, S, CH), tables (n, CH, 256), augments (n), flips (n): the input is mirrored first; NULL: none. A block of 256 threads takes 256 * V
// pixels of an image, a thread V; S*S, out and inp divide by V
template <int CH, int V> __global__ void augment_kernel(uint8_t* out, const uint8_t* inp, const uint8_t* tables, const ImageAugment* augments,
                                                        const int* flips, Pixel fill, int S, unsigned image_blocks) {
    const size_t b = blockIdx.x / image_blocks;
    const unsigned pixels = (unsigned)S * S, i = ((unsigned)(blockIdx.x - b * image_blocks) * 256 + threadIdx.x) * V;
    if (i >= pixels) { return; }
    const ImageAugment* a = &augments[b];
    const uint8_t* image = inp + b * pixels * CH;
    const bool mirrored = flips != NULL && flips[b];
    alignas(4) uint8_t x[V * CH];
    switch (a->op) {
    case NO_AUGMENT: load_pixels<CH, V>(x, image, i, S, mirrored); break;
    case COLOR:
        load_pixels<CH, V>(x, image, i, S, mirrored);
        for (int q = 0; CH == 3 && q < V; q++) {
            const int grey = luma(x + q * CH);
            for (int c = 0; c < CH; c++) { x[q * CH + c] = blend(grey, x[q * CH + c], a->factor); }
        }
        break;
    case SHARPNESS:
        for (int q = 0; q < V; q++) {
            const int row = (int)(i + q) / S, column = (int)(i + q) - row * S, from = mirrored ? S - 1 - column : column;
            const bool border = row == 0 || row == S - 1 || column == 0 || column == S - 1;
            for (int c = 0; c < CH; c++) {
                const uint8_t* p = image + ((size_t)row * S + from) * CH + c;
                const int next = CH, down = S * CH; // of pixels, of rows
                x[q * CH + c] = border ? p[0] : blend((2 * (p[-down - next] + p[-down] + p[-down + next] + p[-next] + 5 * p[0] + p[next]
                    + p[down - next] + p[down] + p[down + next]) + 13) / 26, p[0], a->factor);
            }
        }
        break;
    case ROTATE: case SHEAR_X: case SHEAR_Y: case TRANSLATE_X: case TRANSLATE_Y:
        for (int q = 0; q < V; q++) {
            const int row = (int)(i + q) / S, column = (int)(i + q) - row * S;
            const double h = row + 0.5, w = column + 0.5; // a place in fp32 would be off by 1e-5 pixels
            const double u = a->matrix[0] * w + a->matrix[1] * h + a->matrix[2], v = a->matrix[3] * w + a->matrix[4] * h + a->matrix[5];
            if (!(u >= 0.0 && u < S && v >= 0.0 && v < S)) {
                for (int c = 0; c < CH; c++) { x[q * CH + c] = fill.v[c]; }
                continue;
            }
            const int left = (int)floor(u - 0.5), top = (int)floor(v - 0.5);
            const float du = (float)(u - 0.5 - left), dv = (float)(v - 0.5 - top);
            unsigned columns[4];
            const uint8_t* rows[4];
            for (int k = 0; k < 4; k++) {
                const int from = clamp_index(left - 1 + k, S);
                columns[k] = (unsigned)(mirrored ? S - 1 - from : from) * CH;
                rows[k] = image + (size_t)clamp_index(top - 1 + k, S) * S * CH;
            }
            for (int c = 0; c < CH; c++) {
                float r[4];
                for (int k = 0; k < 4; k++) {
                    const uint8_t* p = rows[k] + c;
                    r[k] = cubic(p[columns[0]], p[columns[1]], p[columns[2]], p[columns[3]], du);
                }
                const float value = cubic(r[0], r[1], r[2], r[3], dv);
                x[q * CH + c] = value <= 0.0f ? 0 : value >= 255.0f ? 255 : (uint8_t)value;
            }
        }
        break;
    default:
        load_pixels<CH, V>(x, image, i, S, mirrored);
        for (int k = 0; k < V * CH; k++) { x[k] = tables[b * CH * 256 + k % CH * 256 + x[k]]; }
    }
    for (int k = 0; k < CH; k++) { *(Pack<V, uint8_t>*)(out + b * pixels * CH + (size_t)i * CH + k * V) = *(const Pack<V, uint8_t>*)(x + k * V); }
}

template <int CH, int V> void augment_layer(uint8_t* out, const uint8_t* inp, uint8_t* tables, const ImageAugment* augments, const int* flips, size_t n,
                                            int S, Pixel fill, cudaStream_t stream) {
    const unsigned pixels = (unsigned)S * S, blocks = CEIL_DIV(pixels, 256 * V);
    augment_table_kernel<CH, V><<<(unsigned)n, 256, 0, stream>>>(tables, inp, augments, pixels);
    augment_kernel<CH, V><<<(unsigned)(n * blocks), 256, 0, stream>>>(out, inp, tables, augments, flips, fill, S, blocks);
    kernelCheck();
}

// images (n, S, S, CH) of bytes become what augments (layers, n) say, mirrored first where flips (n) say so: those become 0. scratch is as large as
// images, tables (n, CH, 256). fill: what rotation, shear and translation leave empty
void augment_images(uint8_t* images, uint8_t* scratch, uint8_t* tables, int* flips, const ImageAugment* augments, int layers, size_t n, int S, int CH,
                    Pixel fill, cudaStream_t stream) {
    uint8_t *inp = images, *out = scratch;
    for (int layer = 0; layer < layers; layer++) {
        const int* mirror = layer == 0 ? flips : NULL;
#define LAYER(channels) \
        if (CH == channels && S % 2 == 0) { augment_layer<channels, 4>(out, inp, tables, augments + layer * n, mirror, n, S, fill, stream); } \
        else if (CH == channels) { augment_layer<channels, 1>(out, inp, tables, augments + layer * n, mirror, n, S, fill, stream); }
        LAYER(1) LAYER(2) LAYER(3) LAYER(4)
#undef LAYER
        uint8_t* swap = inp;
        inp = out;
        out = swap;
    }
    if (inp != images) { cudaCheck(cudaMemcpyAsync(images, inp, n * S * S * CH, cudaMemcpyDeviceToDevice, stream)); }
    cudaCheck(cudaMemsetAsync(flips, 0, n * sizeof(int), stream));
}

// the buffers; those on the device are in the plan
typedef struct {
    ImageAugment *augments, *host_augments; // (layers, B)
    EraseBox *erased, *host_erased;         // (B)
    uint8_t *images, *tables;               // (B, S, S, CH), (B, CH, 256)
} Augmenter;

void augment_plan(Plan* plan, Augmenter* a, const AugmentOptions* o, size_t B, size_t S, size_t CH) {
    if (o->layers > 0) {
        plan_add(plan, SCRATCH, "augments", "", "(layers, B)", &a->augments, o->layers * B * sizeof(ImageAugment), 0);
        plan_add(plan, SCRATCH, "augmented images", "", "(B, S, S, CH) bytes", &a->images, B * S * S * CH, 0);
        plan_add(plan, SCRATCH, "augment tables", "", "(B, CH, 256) bytes", &a->tables, B * CH * 256, 0);
    }
    if (o->erase > 0.0) { plan_add(plan, SCRATCH, "erased", "", "(B, 4)", &a->erased, B * sizeof(EraseBox), 0); }
}

void augment_open(Augmenter* a, const AugmentOptions* o, size_t B) {
    if (o->layers > 0) { cudaCheck(cudaMallocHost((void**)&a->host_augments, o->layers * B * sizeof(ImageAugment))); }
    if (o->erase > 0.0) { cudaCheck(cudaMallocHost((void**)&a->host_erased, B * sizeof(EraseBox))); }
}

void augment_close(Augmenter* a) {
    if (a->host_augments != NULL) { cudaCheck(cudaFreeHost(a->host_augments)); }
    if (a->host_erased != NULL) { cudaCheck(cudaFreeHost(a->host_erased)); }
}

// after the images place, place + place_step, ... of an epoch were copied on the stream: RandAugment, and where they are to be erased. The last call's
// copies must be done
void augment_batch(Augmenter* a, const AugmentOptions* o, uint8_t* images, int* flips, unsigned long long seed, unsigned epoch, size_t place,
                   size_t place_step, size_t n, int S, int CH, const float* mean, cudaStream_t stream) {
    if (o->layers > 0) {
        Pixel fill = {};
        for (int c = 0; c < CH; c++) { fill.v[c] = (uint8_t)fmin(255.0, fmax(0.0, rint(255.0 * mean[c]))); }
        for (size_t i = 0; i < o->layers * n; i++) { draw_augment(&a->host_augments[i], o, seed, epoch, place + i % n * place_step, (int)(i / n), S); }
        cudaCheck(cudaMemcpyAsync(a->augments, a->host_augments, o->layers * n * sizeof(ImageAugment), cudaMemcpyHostToDevice, stream));
        augment_images(images, a->images, a->tables, flips, a->augments, o->layers, n, S, CH, fill, stream);
    }
    if (o->erase > 0.0) {
        for (size_t i = 0; i < n; i++) { a->host_erased[i] = draw_erase(o->erase, seed, epoch, place + i * place_step, S); }
        cudaCheck(cudaMemcpyAsync(a->erased, a->host_erased, n * sizeof(EraseBox), cudaMemcpyHostToDevice, stream));
    }
}
// ---- end shared: augmentation ----------------------------------------------

// ----------------------------------------------------------------------------
// kernels of the vision transformer, each followed by its launcher

typedef struct {
    float mean[4], std[4];
} PixelStats;

// x[q] = the normalised pixel (h, w+q), channel c, of image b, or what random erasing puts there
template <int V, bool AUGMENT> __device__ inline void normalised_pixels(float* x, const uint8_t* images, const int* flips, const PixelStats& stats,
                                                                        const BatchAugment& a, size_t b, int S, int CH, unsigned h, unsigned w, unsigned c) {
    const uint8_t* row = images + (b * S + h) * S * CH + c;
    const float mean = stats.mean[c], std = stats.std[c];
    const int from = flips[b] ? S - 1 - (int)w : (int)w, step = flips[b] ? -CH : CH;
    for (int q = 0; q < V; q++) { x[q] = ((float)row[(ptrdiff_t)from * CH + q * step] / 255.0f - mean) / std; }
    if (AUGMENT && a.erased != NULL && h - a.erased[b].top < (unsigned)a.erased[b].height) { // as unsigned numbers: not above it either
        for (int q = 0; q < V; q++) {
            if (w + q - a.erased[b].left < (unsigned)a.erased[b].width) { x[q] = erase_noise(a.seed, a.epoch, a.place + b * a.place_step, h * S + w + q, c); }
        }
    }
}

// cuts images into patches and normalises: patches[b, t, (c, kh, kw)] = x[b] = (image[b, h, w, c] / 255 - mean[c]) / std[c],
// with (h, w) the pixel (kh, kw) of patch t; flips[b] != 0 mirrors the image left to right. AUGMENT: random erasing replaces some, and then
//     mixup: lam * x[b] + (1 - lam) * x[n-1-b]      cutmix: x[n-1-b] in the box
// patches (B, N, CH*P*P) with N = (S/P)^2, images (B, S, S, CH) of less than 2^32 bytes each. A thread makes V elements; V divides P
template <int V, bool AUGMENT> __global__ void patchify_kernel(floatX* patches, const uint8_t* images, const int* flips,
                                                               const __grid_constant__ PixelStats stats, const __grid_constant__ BatchAugment a,
                                                               size_t n, int S, int P, int CH) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        const unsigned per_image = (unsigned)S * S * CH;
        const size_t b = i / per_image;
        unsigned j = (unsigned)(i - b * per_image);
        const unsigned kw = j % P; j /= P;
        const unsigned kh = j % P; j /= P;
        const unsigned c = j % CH; j /= CH;
        const unsigned pw = j % (S / P), ph = j / (S / P);
        const unsigned w = pw * P + kw, h = ph * P + kh;
        float x[V];
        normalised_pixels<V, AUGMENT>(x, images, flips, stats, a, b, S, CH, h, w, c);
        if (AUGMENT && a.lam < 1.0f && (!a.cut || h - a.top < (unsigned)(a.bottom - a.top))) {
            float other[V];
            normalised_pixels<V, AUGMENT>(other, images, flips, stats, a, a.n - 1 - b, S, CH, h, w, c);
            for (int q = 0; q < V; q++) {
                if (!a.cut) { x[q] = a.lam * x[q] + (1.0f - a.lam) * other[q]; }
                else if (w + q - a.left < (unsigned)(a.right - a.left)) { x[q] = other[q]; }
            }
        }
        store<V>(patches + i, x);
    }
}

// n images; augment NULL: as they are
void patchify(floatX* patches, const uint8_t* images, const int* flips, PixelStats stats, const BatchAugment* augment, size_t n, int S, int P, int CH) {
    const size_t elements = n * S * S * CH;
    const BatchAugment a = augment != NULL ? *augment : BatchAugment{};
    const bool augments = augment != NULL && (a.erased != NULL || a.lam < 1.0f);
#define PATCHIFY(V, AUGMENT) patchify_kernel<V, AUGMENT><<<CEIL_DIV(elements, (size_t)256 * V), 256, 0, main_stream>>>(patches, images, flips, stats, a, elements, S, P, CH)
    if (P % VEC == 0 && augments) { PATCHIFY(VEC, true); }
    else if (P % VEC == 0) { PATCHIFY(VEC, false); }
    else if (augments) { PATCHIFY(1, true); }
    else { PATCHIFY(1, false); }
#undef PATCHIFY
    kernelCheck();
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

// Drop-path (stochastic depth, Huang et al., ECCV 2016), as timm's DropPath: a branch of a block is left out for an image with the block's
// rate, and else divided by what is kept on average

// rate of block l of `depth`, from 0 to `last`; in PyTorch: torch.linspace(0, last, depth)[l]
__host__ __device__ inline float drop_path_rate(float last, int l, int depth) {
    if (depth == 1) { return 0.0f; }
    const float step = last / (float)(depth - 1);
    return l < depth / 2 ? step * (float)l : last - step * (float)(depth - 1 - l);
}

// scales[l, branch, b] = 0 with the probability rate(l), else 1 / (1 - rate(l)); drawn by Philox(seed, RNG_DROP_PATH, step, (2l + branch, image)),
// with image counted over all ranks. scales (L, 2, B). A thread makes one
__global__ void drop_path_scales_kernel(float* scales, int L, int B, float last, unsigned long long seed, unsigned step, unsigned first_image) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < L * 2 * B) {
        const int row = i / B;
        const double keep = 1.0 - (double)drop_path_rate(last, row / 2, L);
        const uint4 u = philox(seed, RNG_DROP_PATH, step, (unsigned long long)row << 32 | (first_image + (unsigned)(i % B)));
        scales[i] = (double)u.x + 0.5 < keep * 4294967296.0 ? 1.0f / (float)keep : 0.0f;
    }
}

void drop_path_scales(float* scales, int L, int B, double last, unsigned long long seed, unsigned step, unsigned first_image) {
    drop_path_scales_kernel<<<CEIL_DIV(L * 2 * B, 64), 64, 0, main_stream>>>(scales, L, B, (float)last, seed, step, first_image);
    kernelCheck();
}

// out = scales[b] * x + residual for each image b, without residual where that is NULL; in PyTorch: x * scales[:, None] + residual
// out, x, residual (images, per_image), n elements in all, scales (images); out may be x. V divides per_image. A thread makes V elements
template <int V> __global__ void drop_path_kernel(floatX* out, const floatX* x, const floatX* residual, const float* scales, size_t n,
                                                  size_t per_image) {
    const size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * V;
    if (i < n) {
        const float scale = scales[i / per_image];
        float v[V], r[V] = {0};
        load<V>(v, x + i);
        if (residual != NULL) { load<V>(r, residual + i); }
        for (int j = 0; j < V; j++) { v[j] = r[j] + scale * v[j]; }
        store<V>(out + i, v);
    }
}

void drop_path(floatX* out, const floatX* x, const floatX* residual, const float* scales, size_t images, size_t per_image) {
    const size_t n = images * per_image;
    if (vectorizable(per_image, out, x, residual)) {
        drop_path_kernel<VEC><<<CEIL_DIV(n, (size_t)256 * VEC), 256, 0, main_stream>>>(out, x, residual, scales, n, per_image);
    } else {
        drop_path_kernel<1><<<CEIL_DIV(n, (size_t)256), 256, 0, main_stream>>>(out, x, residual, scales, n, per_image);
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

// -recipe: what the published commands of DropIT for DeiT amount to (benchmarks/deit of its code, which is DeiT's), as flags. The
// batch is that of each of their two GPUs, -l is for 512 images where -unscale_lr is 0. timm's "sgd" is Nesterov's. That code asks
// timm for ten epochs of cool-down and then ends without them, so -cooldown is 0. Gamma is the user's choice (-g), as there. No
// command for ViT-B is published: its two recipes are DeiT's with that model
#define RECIPE_DATA " -crop 1 -crop_pct 0.875 -repeats 3 -flip 1 -aa rand-m9-mstd0.5-inc1 -reprob 0.25 -mixup 0.8 -cutmix 1 -smoothing 0.1"
#define RECIPE_TRAINING " -drop_path 0.1 -ema 0.99996 -schedule epoch -warmup_epochs 5 -warmup_lr 1e-6 -min_lr 1e-5 -cooldown 0"
#define RECIPE_IMAGENET " -b 512 -e 300 -opt adamw -l 5e-4 -unscale_lr 0 -wd 0.05 -classes 1000" RECIPE_TRAINING RECIPE_DATA
#define RECIPE_CIFAR100 " -b 384 -e 1000 -opt sgd -momentum 0.9 -nesterov 1 -l 0.01 -unscale_lr 1 -wd 1e-4 -classes 100" RECIPE_TRAINING RECIPE_DATA
static const char* const deit_recipes[][2] = {
    {"deit_ti_imagenet", "-m deit_tiny" RECIPE_IMAGENET},
    {"deit_s_cifar100",  "-m deit_small" RECIPE_CIFAR100},
    {"deit_b_cifar100",  "-m deit_base" RECIPE_CIFAR100},
    {"vit_b_imagenet",   "-m vit_base" RECIPE_IMAGENET},
    {"vit_b_cifar100",   "-m vit_base" RECIPE_CIFAR100},
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
    size_t staging_bytes;    // for images that are resized; 0: none are
    double drop_path;        // rate of the last block; 0: off
    double ema;              // decay of the moving average of the weights; 0: none
    size_t chunk_bytes;      // size of fch_gelu, the widest tensor of a block, in one chunk
    AugmentOptions augment;
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
    float* ema;            // (shard_n) moving average of master; NULL: none
    float* drop_path_scales; // (L, 2, B) of attention and mlp, under drop-path: written in the forward pass
    // scratch
    uint8_t* images;   // (B, S, S, CH) of the next batch
    int *next_labels, *flips; // (B) of the next batch
    uint8_t* staging;  // pieces of the next batch's sources, where they are resized
    ResizeTask* resize_tasks; // (B)
    Augmenter augmenter;
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
    unsigned drop_step; // counts forward passes of training, for the random strategy and drop-path
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
    if (o->ema > 0.0) { plan_add(plan, OPTIMIZER, "moving average", "", "fp32", &model->ema, shard, n * sizeof(float)); }
    if (o->drop_path > 0.0) {
        plan_add(plan, CACHED, "drop-path scales", "", "(L, 2, B)", &model->drop_path_scales, L * 2 * B * sizeof(float), L * 2 * B * sizeof(float));
    }

    // ids for the random strategy: 4 * block + (0 qkv, 1 proj, 2 fc1, 3 fc2), then the patch embedding, then the head
    int next_id[2] = {0, 4 * c.depth};
#define X(name, type, copies, shape, level, cache) \
    plan_activation(model, &model->acts.name, #name, #copies " x " #shape, sizeof(type), copies, numel shape, level, cache, next_id);
    ACTIVATIONS(X)
#undef X

    plan_add(plan, SCRATCH, "images", "", "(B, S, S, CH) bytes", &model->images, B * S * S * CH, 0);
    plan_add(plan, SCRATCH, "next labels", "", "(B)", &model->next_labels, B * sizeof(int), 0);
    plan_add(plan, SCRATCH, "image staging", "", "bytes", &model->staging, o->staging_bytes, 0);
    plan_add(plan, SCRATCH, "resize tasks", "", "(B)", &model->resize_tasks, o->staging_bytes > 0 ? B * sizeof(ResizeTask) : 0, 0);
    plan_add(plan, SCRATCH, "labels", "", "(B)", &model->labels, B * sizeof(int), 0);
    plan_add(plan, SCRATCH, "flips", "", "(B)", &model->flips, B * sizeof(int), 0);
    augment_plan(plan, &model->augmenter, &o->augment, B, S, CH);
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

// copies host values (num_parameters) to the device, as masters, rounded, and as their moving average
void deit_set_parameters(DeitModel* model, const float* values) {
    const size_t n = model->num_parameters;
    floatX* rounded = (floatX*)malloc(n * sizeof(floatX));
    require(rounded != NULL, "out of host memory for %zu parameters", n);
    for (size_t i = 0; i < n; i++) { rounded[i] = (floatX)values[i]; }
    cudaCheck(cudaMemcpy(model->params_memory, rounded, n * sizeof(floatX), cudaMemcpyHostToDevice));
    if (sizeof(floatX) != sizeof(float)) {
        cudaCheck(cudaMemcpy(model->master, values + model->shard_begin, model->shard_n * sizeof(float), cudaMemcpyHostToDevice));
    }
    if (model->ema != NULL) { // begins at the weights
        cudaCheck(cudaMemcpy(model->ema, values + model->shard_begin, model->shard_n * sizeof(float), cudaMemcpyHostToDevice));
    }
    free(rounded);
}

// initial value of element j of parameter tensor i, as timm chooses it, drawn by Philox(seed, RNG_INIT, tensor, element)
float deit_initial_value(const DeitModel* model, int i, size_t j) {
    const int init = model->specs[i].init;
    const uint4 u = philox(model->options.seed, RNG_INIT, i, j);
    const double bound = 1.0 / sqrt((double)model->specs[PARAM_patchw].n / model->specs[PARAM_patchw].shape[0]);
    return (float)(init == INIT_ONE ? 1.0
                 : init == INIT_NORMAL ? 0.02 * normal(u)
                 : init == INIT_TINY ? 1e-6 * normal(u)
                 : init == INIT_FAN_IN ? bound * (2.0 * uniform(u.x) - 1.0) : 0.0);
}

void deit_init_parameters(DeitModel* model) {
    float* values = (float*)calloc(model->num_parameters, sizeof(float));
    require(values != NULL, "out of host memory for %zu parameters", model->num_parameters);
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        for (size_t j = 0; j < s->copies * s->n; j++) { values[s->offset + j] = deit_initial_value(model, i, j); }
    }
    deit_set_parameters(model, values);
    free(values);
}

// Position embeddings for a grid of side x side patches from those of another grid: out (1 + side^2, C), in (1 + old^2, C). The class
// token's is copied, the others are interpolated along both sides with resize_filter, widened by old / side where the grid shrinks:
// timm's resample_abs_pos_embed(in, (side, side)), in PyTorch F.interpolate(in, (side, side), mode="bicubic", antialias=True)
void deit_interpolate_positions(float* out, const float* in, size_t side, size_t old, size_t C) {
    const double scale = (double)old / side, width = scale > 1.0 ? scale : 1.0;
    double* weight = (double*)malloc(side * old * sizeof(double)); // (side, old)
    double* rows = (double*)calloc(side * old * C, sizeof(double)); // (side, old, C): interpolated along the first side
    double* sum = (double*)malloc(C * sizeof(double));
    require(weight != NULL && rows != NULL && sum != NULL, "out of host memory for %zu x %zu positions", side, old);
    for (size_t i = 0; i < side; i++) {
        double total = 0.0;
        for (size_t j = 0; j < old; j++) {
            weight[i * old + j] = resize_filter((j + 0.5 - (i + 0.5) * scale) / width);
            total += weight[i * old + j];
        }
        for (size_t j = 0; j < old; j++) { weight[i * old + j] /= total; }
        for (size_t j = 0; j < old; j++) {
            for (size_t k = 0; k < old * C; k++) { rows[i * old * C + k] += weight[i * old + j] * in[C + j * old * C + k]; }
        }
    }
    memcpy(out, in, C * sizeof(float));
    for (size_t i = 0; i < side * side; i++) {
        memset(sum, 0, C * sizeof(double));
        for (size_t j = 0; j < old; j++) {
            for (size_t c = 0; c < C; c++) { sum[c] += weight[i % side * old + j] * rows[(i / side * old + j) * C + c]; }
        }
        for (size_t c = 0; c < C; c++) { out[C + i * C + c] = (float)sum[c]; }
    }
    free(weight);
    free(rows);
    free(sum);
}

// what of a file may differ from the model: nothing; the grid of the position embeddings; that and the head's number of classes
enum { ADAPT_NOTHING, ADAPT_POSITIONS, ADAPT_HEAD };

// side of the grid of position embeddings (1, 1 + side^2, C) that `t` has; 0: it has another shape
size_t deit_positions_side(const StTensor* t, size_t C) {
    if (t == NULL || t->dims != 3 || t->shape[0] != 1 || t->shape[2] != C || t->shape[1] < 2) { return 0; }
    const size_t side = (size_t)llround(sqrt((double)(t->shape[1] - 1)));
    return side * side == t->shape[1] - 1 ? side : 0;
}

// classes of the head of C inputs that two tensors are; 0: they are none
size_t deit_head_classes(const StTensor* weight, const StTensor* bias, size_t C) {
    if (weight == NULL || bias == NULL || weight->dims != 2 || bias->dims != 1 || weight->shape[1] != C) { return 0; }
    return weight->shape[0] == bias->shape[0] ? weight->shape[0] : 0;
}

// values (num_parameters) from a file, by timm's names with `prefix` before each: "" for weights, "param." in a dump, "exp_avg." for a
// moment. Every tensor under the prefix must be of the model and fit, but for what `adapt` allows; all that do not are listed
void deit_read_tensors(const DeitModel* model, const Safetensors* st, const char* prefix, float* values, int adapt) {
    const size_t C = model->options.config.channels, V = model->options.config.num_classes, N = model->T - 1;
    const StTensor* pos = safetensors_find(st, "pos_embed");
    const size_t side = (size_t)llround(sqrt((double)N)), old_side = deit_positions_side(pos, C);
    const size_t old_classes = deit_head_classes(safetensors_find(st, "head.weight"), safetensors_find(st, "head.bias"), C);
    const bool new_positions = adapt >= ADAPT_POSITIONS && old_side > 0 && old_side != side && safetensors_is_float(pos);
    const bool new_head = adapt >= ADAPT_HEAD && old_classes > 0 && old_classes != V;
    require(safetensors_find(st, "dist_token") == NULL && safetensors_find(st, "head_dist.weight") == NULL, "%s is a distilled DeiT: it has a "
            "distillation token (dist_token, head_dist) that this program does not train; take the DeiT without `distilled` in its name", st->file.path);
    bool* known = (bool*)calloc(st->num_tensors + 1, sizeof(bool));
    require(known != NULL, "out of host memory for the tensor list of %s", st->file.path);
    int wrong = 0;
    for (int i = 0; i < NUM_PARAMETER_TENSORS; i++) {
        const ParameterSpec* s = &model->specs[i];
        for (int l = 0; l < s->copies; l++) {
            char name[96];
            snprintf(name, sizeof(name), "%s%s", prefix, parameter_name(s, l));
            const StTensor* t = safetensors_find(st, name);
            float* out = values + s->offset + l * s->n;
            if (t != NULL) { known[t - st->tensors] = true; }
            if (t != NULL && safetensors_is_float(t) && t->dims == s->dims && memcmp(t->shape, s->shape, s->dims * sizeof(size_t)) == 0) {
                safetensors_floats(st, t, out);
            } else if (new_positions && i == PARAM_pos) {
                float* old = (float*)malloc(st_numel(t) * sizeof(float));
                require(old != NULL, "out of host memory for %zu positions", st_numel(t));
                safetensors_floats(st, t, old);
                deit_interpolate_positions(out, old, side, old_side, C);
                free(old);
            } else if (new_head && (i == PARAM_headw || i == PARAM_headb)) {
                for (size_t j = 0; j < s->n; j++) { out[j] = deit_initial_value(model, i, j); }
            } else {
                fprintf(stderr, "%s: %s: %s", st->file.path, name, t != NULL ? "found " : "missing");
                if (t != NULL) {
                    fprintf(stderr, "%s ", t->dtype);
                    print_shape(stderr, t->shape, t->dims);
                }
                fprintf(stderr, ", expected F32 ");
                print_shape(stderr, s->shape, s->dims);
                fprintf(stderr, "\n");
                wrong++;
            }
        }
    }
    for (int i = 0; i < st->num_tensors; i++) {
        const StTensor* t = &st->tensors[i];
        if (known[i] || strncmp(t->name, prefix, strlen(prefix)) != 0) { continue; }
        fprintf(stderr, "%s: %s: found %s ", st->file.path, t->name, t->dtype);
        print_shape(stderr, t->shape, t->dims);
        fprintf(stderr, ", expected no such tensor\n");
        wrong++;
    }
    free(known);
    require(wrong == 0, "%s: tensors that are missing, do not fit or are not of this model: %d; check -m, -size, -patch, -chans and -classes",
            st->file.path, wrong);
    if (new_positions) { printf("weights: position embeddings of %zu x %zu patches interpolated to %zu x %zu\n", old_side, old_side, side, side); }
    if (new_head) { printf("weights: the head of %zu classes is replaced by a freshly initialised one of %zu\n", old_classes, V); }
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

// parameters by their timm names
void deit_load_parameters(DeitModel* model, const Safetensors* st, const char* prefix, int adapt) {
    float* values = (float*)calloc(model->num_parameters, sizeof(float));
    require(values != NULL, "out of host memory for %zu parameters", model->num_parameters);
    deit_read_tensors(model, st, prefix, values, adapt);
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

// the states of a checkpoint: those of the optimizer under the names that torch.optim has for them (AdamW has two), the moving average of
// the weights; returns how many there are
int deit_states(const DeitModel* model, const char* names[3], float* states[3]) {
    int n = 0;
    names[n] = model->options.adamw ? "exp_avg." : "momentum_buffer.";
    states[n++] = model->m;
    if (model->v != NULL) { names[n] = "exp_avg_sq."; states[n++] = model->v; }
    if (model->ema != NULL) { names[n] = "ema."; states[n++] = model->ema; }
    return n;
}

// the weights in a file of their own. All ranks call, rank 0 writes
void deit_write_weights(const DeitModel* model, const char* path, const StMetadata* metadata, int num_metadata) {
    const char* const no_prefix[] = {""};
    const float* const master[] = {model->master};
    deit_write_tensors(model, path, metadata, num_metadata, no_prefix, master, 1);
}

// writes the checkpoint of a step; metadata: what a resume compares. All ranks call, rank 0 writes
void deit_save(const DeitModel* model, const char* directory, int step, int keep, const StMetadata* metadata, int num_metadata) {
    char path[4200];
    const char* names[3];
    float* states[3];
    const int num_states = deit_states(model, names, states);
    checkpoint_path(path, sizeof(path), directory, "model", step);
    deit_write_weights(model, path, metadata, num_metadata);
    checkpoint_path(path, sizeof(path), directory, "state", step);
    deit_write_tensors(model, path, metadata, num_metadata, names, states, num_states);
    if (rank == 0) { checkpoint_done(directory, step, keep); }
}

// writes the weights of this step as best.safetensors, if they are better than those there. metadata: as of a checkpoint. All ranks
// call, rank 0 writes
void deit_save_best(const DeitModel* model, const char* directory, const StMetadata* metadata, int num_metadata, double top1) {
    char path[4200];
    snprintf(path, sizeof(path), "%s/best.safetensors", directory);
    double stands = rank == 0 && checkpoint_best_stands(path, metadata, num_metadata, top1);
    ranks_sum(&stands, 1); // only rank 0 may see the file
    if (stands == 0.0) { deit_write_weights(model, path, metadata, num_metadata); }
}

// reads the checkpoint of a step back; every entry of metadata must be as it is in the files, an empty one becomes what it is in the first
void deit_resume(DeitModel* model, const char* directory, int step, StMetadata* metadata, int num_metadata) {
    char path[4200];
    const char* names[3];
    float* states[3];
    const int num_states = deit_states(model, names, states);
    for (int file = 0; file < 2; file++) {
        checkpoint_path(path, sizeof(path), directory, file == 0 ? "model" : "state", step);
        Safetensors* st = safetensors_open(path);
        for (int i = 0; i < num_metadata; i++) {
            const char* was = safetensors_metadata(st, metadata[i].key);
            if (was != NULL && metadata[i].value[0] == 0) { strcpy(metadata[i].value, was); }
            require(was != NULL && strcmp(was, metadata[i].value) == 0, "%s was written with %s %s, not %s; resume with the flags of the run, or "
                    "start anew with another -o", path, metadata[i].key, was != NULL ? was : "unknown", metadata[i].value);
        }
        if (file == 0) { deit_load_parameters(model, st, "", ADAPT_NOTHING); }
        for (int set = 0; file == 1 && set < num_states; set++) {
            float* values = (float*)calloc(model->num_parameters, sizeof(float));
            require(values != NULL, "out of host memory for %zu parameters", model->num_parameters);
            deit_read_tensors(model, st, names[set], values, ADAPT_NOTHING);
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

// where the drop-path scales of image b0 in a branch of block l are (0: attention, 1: mlp); NULL: the branch is never left out
const float* branch_scales(const DeitModel* model, int l, int branch, size_t b0) {
    const DeitOptions* o = &model->options;
    if (o->drop_path == 0.0 || drop_path_rate((float)o->drop_path, l, o->config.depth) == 0.0f) { return NULL; }
    return model->drop_path_scales + (2*l + branch) * o->B + b0;
}

// out = residual + linear(inp) for nb images, or + scales * linear(inp) where scales is not NULL; shapes as linear_forward
void branch_forward(floatX* out, const floatX* inp, const floatX* weight, const floatX* bias, const floatX* residual, const float* scales,
                    size_t nb, size_t T, size_t C, size_t OC) {
    linear_forward(out, inp, weight, bias, scales == NULL ? residual : NULL, nb * T, C, OC);
    if (scales != NULL) { drop_path(out, out, residual, scales, nb, T * OC); }
}

// is this activation recomputed for its weight gradient alone, so that the kernel that recomputes it can mask it? What linears read must be whole
bool masked_when_recomputed(const DeitModel* model, const Activation* a) {
    return a->dropped && !a->cached && model->options.strategy == MINK && (model->options.recompute == 1 || a == &model->acts.fch_gelu);
}

KeepLargest keep_largest(const Activation* a, int l, size_t b0) { return KeepLargest{dropped_copy(a, l).thresholds, b0 * a->per_image}; }

// Images b0 .. b0+nb-1 through block l. With recompute only what is not cached is computed, by the same calls: the same bits
// training: with drop-path
void block_forward(DeitModel* model, int l, size_t b0, size_t nb, bool recompute, bool training) {
    const size_t C = model->options.config.channels, T = model->T, rows = nb * T;
    const ParameterTensors* p = &model->params;
    ActivationTensors* acts = &model->acts;
    const int level = recompute ? model->options.recompute : NEVER;
    const float *scales = training ? branch_scales(model, l, 0, b0) : NULL, *scales2 = training ? branch_scales(model, l, 1, b0) : NULL;
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
    if (level >= 3) { branch_forward(residual2, atty, p->projw + l * C*C, p->projb + l*C, residual, scales, nb, T, C, C); }
    norm(&acts->ln2, ln2, AT(float, ln2_mean), AT(float, ln2_rstd), residual2, p->ln2w + l*C, p->ln2b + l*C);
    if (level >= 2) { linear_forward(fch, ln2, p->fc1w + l * 4*C*C, p->fc1b + l * 4*C, NULL, rows, C, 4*C); }
    if (recompute && masked_when_recomputed(model, &acts->fch_gelu)) { gelu_forward(fch_gelu, fch, rows * 4*C, keep_largest(&acts->fch_gelu, l, b0)); }
    else if (level >= 1) { gelu_forward(fch_gelu, fch, rows * 4*C); }
#undef AT
    if (!recompute) {
        floatX* out = (floatX*)activation_at(model, &acts->residual, l + 1, b0, false);
        branch_forward(out, fch_gelu, p->fc2w + l * 4*C*C, p->fc2b + l*C, residual2, scales2, nb, T, 4*C, C);
    }
}

// logits of the n <= B images whose patches and labels are on the device. training: with drop-path, and DropIT chooses from the cached inputs
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
    if (training && model->options.drop_path > 0.0) {
        drop_path_scales(model->drop_path_scales, c.depth, (int)model->options.B, model->options.drop_path, model->options.seed, model->drop_step,
                         (unsigned)(rank * model->options.B));
    }
    for (int l = 0; l < c.depth; l++) {
        for (size_t b0 = 0; b0 < n; b0 += I) { block_forward(model, l, b0, n - b0 < I ? n - b0 : I, false, training); }
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
    const float *scales = branch_scales(model, l, 0, b0), *scales2 = branch_scales(model, l, 1, b0);
    block_forward(model, l, b0, nb, true, true);
#define AT(type, name) ((type*)activation_at(model, &acts->name, l, b0, true))
    // the mlp: residual + fc2(gelu(fc1(ln2(residual2)))); dbranch, which has no use yet, takes what drop-path lets through
    const floatX* dmlp = scales2 != NULL ? dbranch : dres;
    if (scales2 != NULL) { drop_path(dbranch, dres, NULL, scales2, nb, T*C); }
    weight_gradient(model, &acts->fch_gelu, l, g->fc2w + l * 4*C*C, g->fc2b + l*C, dmlp, b0, nb, T, 4*C, C);
    linear_backward_input(dfch, dmlp, p->fc2w + l * 4*C*C, rows, 4*C, C);
    gelu_backward(dfch, AT(floatX, fch), rows * 4*C);
    weight_gradient(model, &acts->ln2, l, g->fc1w + l * 4*C*C, g->fc1b + l * 4*C, dfch, b0, nb, T, C, 4*C);
    linear_backward_input(dbranch, dfch, p->fc1w + l * 4*C*C, rows, C, 4*C);
    layernorm_backward(dres, g->ln2w + l*C, g->ln2b + l*C, model->partial, dbranch, AT(floatX, residual2), p->ln2w + l*C,
                       AT(float, ln2_mean), AT(float, ln2_rstd), rows, C, C);
    // attention: residual + proj(attention(qkv(ln1(residual)))); here dfch is free
    const floatX* dattention = scales != NULL ? dfch : dres;
    if (scales != NULL) { drop_path(dfch, dres, NULL, scales, nb, T*C); }
    weight_gradient(model, &acts->atty, l, g->projw + l * C*C, g->projb + l*C, dattention, b0, nb, T, C, C);
    linear_backward_input(dbranch, dattention, p->projw + l * C*C, rows, C, C);
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

// normalised patches of the n images in model->images, erased and mixed (augment NULL: not), and their labels: those buffers may then be filled again
void deit_patchify(DeitModel* model, PixelStats stats, const BatchAugment* augment, size_t n) {
    const DeitConfig c = model->options.config;
    floatX* patches = (floatX*)activation_at(model, &model->acts.patches, 0, 0, false);
    patchify(patches, model->images, model->flips, stats, augment, n, c.image_size, c.patch_size, c.image_channels);
    cudaCheck(cudaMemcpyAsync(model->labels, model->next_labels, n * sizeof(int), cudaMemcpyDeviceToDevice, main_stream));
}

// adds the loss of n images to model->result, and turns the logits into their gradient, scaled; lam 1: the images are not mixed
void deit_loss(DeitModel* model, size_t n, float smoothing, float lam, float scale) {
    cross_entropy(model->result, model->losses, model->ranks, (floatX*)model->acts.logits.data, model->labels, (int)n,
                  model->options.config.num_classes, smoothing, lam, scale);
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
    if (model->ema != NULL) { ema_update(model->ema, model->master, model->shard_n, model->options.ema); }
    if (model->options.sharded && num_ranks > 1) {
        ranks_gather(model->params_memory, model->params_memory + first, model->shard_n * sizeof(floatX));
    }
}

// The moving average takes the place of the weights, for an evaluation, until deit_ema_leave. The gradients have been used: their memory
// keeps the weights
void deit_ema_enter(DeitModel* model) {
    const size_t first = model->shard_begin, n = model->shard_n;
    const size_t bytes = model->num_parameters * sizeof(floatX);
    cudaCheck(cudaMemcpyAsync(model->grads_memory, model->params_memory, bytes, cudaMemcpyDeviceToDevice, main_stream));
    round_kernel<<<CEIL_DIV(n, (size_t)256 * VEC), 256, 0, main_stream>>>(model->params_memory + first, model->ema, n);
    kernelCheck();
    if (model->options.sharded && num_ranks > 1) { ranks_gather(model->params_memory, model->params_memory + first, n * sizeof(floatX)); }
}

void deit_ema_leave(DeitModel* model) {
    const size_t bytes = model->num_parameters * sizeof(floatX);
    cudaCheck(cudaMemcpyAsync(model->params_memory, model->grads_memory, bytes, cudaMemcpyDeviceToDevice, main_stream));
}

// Operations of the matrix products of a training step on n images: those of the forward pass three times. What -r computes again is not counted,
// nor is what DropIT or drop-path spare
double deit_flops(const DeitModel* model, size_t n) {
    const DeitConfig c = model->options.config;
    const double C = c.channels, T = (double)model->T, K = (double)c.image_channels * c.patch_size * c.patch_size;
    const double block = 2*T*12*C*C + 4*T*T*C; // four linears; scores and their product with v
    return 3.0 * n * (c.depth * block + 2*(T-1)*K*C + 2*C*c.num_classes);
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
    peak_flops = gpu_peak_flops(properties.name, sizeof(floatX) == 2);
    cudaCheck(cudaStreamCreate(&main_stream));
    cublasCheck(cublasCreate(&cublas_handle));
    cublasCheck(cublasSetStream(cublas_handle, main_stream));
    cublasCheck(cublasLtCreate(&cublaslt_handle));
    printf("device: %s, " PRECISION_NAME, properties.name);
    printf(num_ranks > 1 ? ", %d ranks\n" : "\n", num_ranks);
}

// ---- shared: data loader ---------------------------------------------------
// An image goes from the file (mapped) to pinned memory by a reader thread, from there to the device by the loader's stream, where it is
// resized if it must be. Threads read the next batch while the device computes this one. Both go piece by piece, so that neither pinned nor
// device memory grows with the batch or with the images. What a batch holds is a function of (seed, its number) alone
typedef struct {
    Shard* shards;     // (num_shards)
    unsigned* begin;   // (num_shards + 1): the number of each shard's first image
    int num_shards;
    unsigned images;
    uint32_t crc;      // of the headers: says which data these are
    bool verified;     // all records have been compared with their checksums
} ShardSet;

typedef struct {
    size_t B, S, CH, ranks, rank;
    unsigned long long seed;
    bool training;                // else every image once, in the order of the files, as evaluation wants it
    bool crop, flip;              // training: random resized crops; mirror half of the images
    double scale, crop_pct;       // smallest area of a random crop; evaluation: the part of the resized shorter side that is taken
    int repeats;                  // training: how often in a row an image is shown (the ranks together)
    size_t accumulation;          // training: an epoch ends with a step of so many batches
    AugmentOptions augment;       // training
} LoaderOptions;

// What the loader fills; all of it in the plan of the device's memory
typedef struct {
    uint8_t* images;     // (B, S, S, CH)
    int *labels, *flips; // (B); flips: images to be mirrored yet
    uint8_t* staging;    // pieces of sources, where images are resized
    ResizeTask* tasks;   // (B)
    Augmenter* augmenter;
} LoaderTarget;

typedef struct {
    const Shard* shard;
    unsigned number;       // of the image in its shard
    const ShardEntry* entry;
    ImageView view;
    ResizeTask task;
    uint32_t crc;          // as found
    size_t piece;          // where it is read to, counted from the first batch on
} LoaderJob;

typedef struct {
    LoaderJob* jobs;       // (B)
    unsigned epoch;
    size_t first_place, place_step; // image i stands at first_place + i * place_step of the epoch: what random choices depend on
    size_t n, pieces, first_piece, first_job;
    size_t *piece_jobs, *piece_bytes, *left; // (B): a piece's images, their bytes, and how many are still to be read
    int *labels, *flips;   // (B) pinned
    ResizeTask* tasks;     // (B) pinned
    cudaEvent_t copied;    // the batch is on the device
} LoaderBatch;

#define PIECE_BYTES ((size_t)32 << 20)
#define PIECE_SLOTS 4
#define MAX_PIECE_IMAGES 16384 // a dimension of a grid has 65,535 blocks at most
#define MAX_READERS 64

typedef struct {
    ShardSet set;
    LoaderOptions options;
    LoaderTarget target;
    bool resizes;           // else all images are S x S and only copied
    size_t epoch_images;    // of this rank
    unsigned* order;        // (images) of the current epoch
    long long epoch;        // whose order it is; -1: that of the files
    long long ahead;        // the batch that is being read; -1: none
    LoaderBatch batches[2]; // batch number planned / B % 2 is planned next
    const LoaderBatch* current; // was brought to the device last
    size_t piece_bytes, group_bytes; // images are resized in groups whose scratch fits the device's cache; the next group takes the same
    uint8_t* slots[PIECE_SLOTS];       // pinned; piece p is in slot p % PIECE_SLOTS
    cudaEvent_t emptied[PIECE_SLOTS];  // the slot has been copied to the device
    cudaStream_t stream;    // copies and resizes a batch while the step before computes
    cudaEvent_t taken;      // the target may be written again
    size_t pieces;          // planned
    // shared with the readers, under the lock
    pthread_t readers[MAX_READERS];
    int num_readers, device;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    size_t planned, next;   // jobs: how many there are, which is to be read next; job j is in batch j / B % 2
    size_t issued;          // pieces whose copy to the device has been asked for
    bool stop;
} Loader;

// path is a shard, or PREFIX of the shards PREFIX_00000.bin, PREFIX_00001.bin, ..., which must be all there and agree with one another.
// Records of up to 1 GiB are verified here; of larger sets, each when it is read
ShardSet shards_open(const char* path) {
    char name[4300], folder[4200];
    struct stat info;
    unsigned found = 0, end = 0; // shards of this prefix; one more than the largest number
    require(strlen(path) < 4096, "the name of the data has %zu characters, 4095 are allowed: %.80s...", strlen(path), path);
    const char* slash = strrchr(path, '/');
    const char* base = slash != NULL ? slash + 1 : path;
    snprintf(folder, sizeof(folder), "%.*s", slash == NULL ? 1 : slash == path ? 1 : (int)(slash - path), slash == NULL ? "." : path);
    const bool one = stat(path, &info) == 0 && S_ISREG(info.st_mode);
    DIR* directory = one ? NULL : opendir(folder);
    for (const struct dirent* e; directory != NULL && (e = readdir(directory)) != NULL; ) {
        const size_t n = strlen(base);
        unsigned number;
        int used = 0;
        if (strncmp(e->d_name, base, n) == 0 && sscanf(e->d_name + n, "_%5u.bin%n", &number, &used) == 1 && used == 10 && e->d_name[n + 10] == 0) {
            found++;
            end = number >= end ? number + 1 : end;
        }
    }
    if (directory != NULL) { closedir(directory); }
    ShardSet set = {};
    set.num_shards = found > 0 ? (int)end : 1;
    set.shards = (Shard*)malloc(set.num_shards * sizeof(Shard));
    set.begin = (unsigned*)malloc((set.num_shards + 1) * sizeof(unsigned));
    require(set.shards != NULL && set.begin != NULL, "out of host memory for %d shards", set.num_shards);
    uint64_t bytes = 0, images = 0;
    for (int i = 0; i < set.num_shards; i++) {
        snprintf(name, sizeof(name), found > 0 ? "%s_%05d.bin" : "%s", path, i);
        require(found == 0 || stat(name, &info) == 0, "%s is not there, but %u other shards up to %s_%05u.bin are; run the script that makes them again",
                name, found, path, end - 1);
        bytes += stat(name, &info) == 0 ? (uint64_t)info.st_size : 0;
    }
    snprintf(name, sizeof(name), "%s.part", path);
    require(found == 0 || stat(name, &info) != 0, "%s is there: the shards of %s are not all made yet; run data/imagenet.py again until it ends", name, path);
    set.verified = bytes <= (uint64_t)1 << 30;
    for (int i = 0; i < set.num_shards; i++) {
        snprintf(name, sizeof(name), found > 0 ? "%s_%05d.bin" : "%s", path, i);
        Shard* s = &set.shards[i];
        *s = shard_open(strdup(name), set.verified);
        const ShardHeader *h = s->header, *h0 = set.shards[0].header;
        require(h->task == h0->task && h->classes == h0->classes && h->channels == h0->channels && memcmp(h->mean, h0->mean, sizeof(h->mean)) == 0
                && memcmp(h->std, h0->std, sizeof(h->std)) == 0, "%s has task %u, %u classes, %u channels, mean %g and standard deviation %g, but %s has %u, %u, %u, "
                "%g and %g; shards of one set must agree: make them again", name, h->task, h->classes, h->channels, h->mean[0], h->std[0],
                set.shards[0].file.path, h0->task, h0->classes, h0->channels, h0->mean[0], h0->std[0]);
        set.begin[i] = (unsigned)images;
        images += h->images;
        require(images <= UINT_MAX, "%s has more than %u images; use fewer shards", path, UINT_MAX);
        set.crc = i == 0 ? h->crc : crc_32(set.crc, &h->crc, sizeof(h->crc));
    }
    set.images = set.begin[set.num_shards] = (unsigned)images;
    return set;
}

// shard s and the image's number in it: image i of a set
const Shard* set_image(const ShardSet* set, unsigned i, unsigned* number) {
    int low = 0, high = set->num_shards;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (set->begin[middle] <= i) { low = middle; } else { high = middle; }
    }
    *number = i - set->begin[low];
    return &set->shards[low];
}

// the box of a random resized crop, as timm and torchvision choose it: an area of scale to 1 of the image's, a ratio of 3/4 to 4/3, ten
// attempts, then the centre. Philox(seed, RNG_CROP, epoch, 16 * place + attempt) gives area, ratio, top and left
ImageView random_crop(int height, int width, double scale, unsigned long long seed, unsigned epoch, size_t place) {
    const double low = 3.0 / 4.0, high = 4.0 / 3.0, area = (double)height * width;
    ImageView v = {0, 0, height, width, 0, 0, 0, 0, false};
    for (int attempt = 0; attempt < 10; attempt++) {
        const uint4 u = philox(seed, RNG_CROP, epoch, 16 * (unsigned long long)place + attempt);
        const double wanted = (scale + (1.0 - scale) * uniform(u.x)) * area;
        const double ratio = exp(log(low) + (log(high) - log(low)) * uniform(u.y));
        const double w = rint(sqrt(wanted * ratio)), h = rint(sqrt(wanted / ratio));
        if (w < 1.0 || h < 1.0 || w > width || h > height) { continue; }
        v.height = (int)h;
        v.width = (int)w;
        v.top = (int)((unsigned long long)u.z * (height - v.height + 1) >> 32);
        v.left = (int)((unsigned long long)u.w * (width - v.width + 1) >> 32);
        return v;
    }
    if ((double)width / height < low) { v.height = (int)rint(width / low); }
    else if ((double)width / height > high) { v.width = (int)rint(height * high); }
    v.top = (height - v.height) / 2;
    v.left = (width - v.width) / 2;
    return v;
}

// The evaluation transform, as torchvision's Resize and CenterCrop have it: the shorter side becomes floor(S / crop_pct), the longer keeps
// the aspect, rounded down, and S x S are cut out of the middle
ImageView center_crop(int height, int width, size_t S, double crop_pct) {
    const size_t shorter = (size_t)floor(S / crop_pct);
    ImageView v = {0, 0, height, width, shorter, shorter, 0, 0, false};
    if (width <= height) { v.full_height = (size_t)((double)(shorter * height) / width); }
    else { v.full_width = (size_t)((double)(shorter * width) / height); }
    v.window_top = (size_t)rint((v.full_height - S) / 2.0);
    v.window_left = (size_t)rint((v.full_width - S) / 2.0);
    return v;
}

// What part of an image is wanted at a place of an epoch
ImageView loader_view(const LoaderOptions* o, const ShardEntry* e, unsigned epoch, size_t place) {
    const bool random = o->training && o->crop, as_it_is = o->training && e->height == o->S && e->width == o->S;
    ImageView v = random ? random_crop(e->height, e->width, o->scale, o->seed, epoch, place)
                         : center_crop(e->height, e->width, o->S, as_it_is ? 1.0 : o->crop_pct);
    if (random) { v.full_height = v.full_width = o->S; }
    v.mirror = o->training && o->flip && (philox(o->seed, RNG_AUGMENT, epoch, place).x & 1);
    return v;
}

// must images of this set be resized?
bool loader_resizes(const ShardSet* set, const LoaderOptions* o) {
    if (o->training ? o->crop : floor(o->S / o->crop_pct) != o->S) { return true; }
    for (int s = 0; s < set->num_shards; s++) {
        for (unsigned i = 0; i < set->shards[s].header->images; i++) {
            const ShardEntry* e = &set->shards[s].entries[i];
            if (e->height != o->S || e->width != o->S) { return true; }
        }
    }
    return false;
}

// Bytes of a piece: PIECE_BYTES, or the largest image of the set. 0: nothing is resized
size_t loader_staging_bytes(const ShardSet* set, const LoaderOptions* o) {
    size_t largest = 0;
    if (!loader_resizes(set, o)) { return 0; }
    for (int s = 0; s < set->num_shards; s++) {
        for (unsigned i = 0; i < set->shards[s].header->images; i++) {
            const ShardEntry* e = &set->shards[s].entries[i];
            ImageView v = {0, 0, (int)e->height, (int)e->width, o->S, o->S, 0, 0, false}; // the largest crop
            if (!(o->training && o->crop)) { v = center_crop(e->height, e->width, o->S, o->crop_pct); }
            const ResizeTask t = resize_task(&v, (int)o->S, (int)o->CH);
            if (t.staged_bytes + t.scratch_bytes > largest) { largest = t.staged_bytes + t.scratch_bytes; }
        }
    }
    return largest > PIECE_BYTES ? largest : PIECE_BYTES;
}

// Images of an epoch that this rank trains on. With repeats, as DeiT's RASampler has it: of the epoch's permutation, each image `repeats`
// times in a row, every rank takes each num_ranks-th, and floor(N / 256) * 256 / ranks of them
size_t loader_epoch_images(size_t images, size_t repeats, size_t ranks) {
    if (repeats == 1) { return images / ranks; }
    const size_t all = CEIL_DIV(images * repeats, ranks), chosen = images >= 256 ? images / 256 * 256 / ranks : CEIL_DIV(images, ranks);
    return chosen < all ? chosen : all;
}

// The place in the epoch of image i of batch `batch` of that epoch, for this rank: random choices depend on it, and one image
// stands at `repeats` places in a row
size_t loader_place(const LoaderOptions* o, size_t batch, size_t i) {
    return o->repeats > 1 ? (batch * o->B + i) * o->ranks + o->rank : (batch * o->ranks + o->rank) * o->B + i;
}

// which image that is, of so many in this order
unsigned loader_image(const LoaderOptions* o, const unsigned* order, unsigned images, size_t place) {
    return order[o->training ? place % ((size_t)images * o->repeats) / o->repeats : place];
}

// Batches of a rank's epoch, or of its part of an evaluation
size_t loader_batches(const Loader* loader) {
    const LoaderOptions* o = &loader->options;
    if (o->training) { return loader->epoch_images / (o->B * o->accumulation) * o->accumulation; }
    const size_t all = CEIL_DIV(loader->set.images, o->B);
    return all > o->rank ? CEIL_DIV(all - o->rank, o->ranks) : 0;
}

// one image from the file into its slot of pinned memory: what readers do
void loader_read(Loader* loader, LoaderJob* job) {
    const uint8_t* record = job->shard->file.data + job->entry->offset;
    const size_t bytes = numel(job->entry->height, job->entry->width, loader->options.CH) + job->entry->annotation_bytes;
    job->crc = loader->set.verified ? job->entry->crc : crc_32(0, record, bytes);
    if (job->piece >= PIECE_SLOTS) { cudaCheck(cudaEventSynchronize(loader->emptied[job->piece % PIECE_SLOTS])); }
    uint8_t* slot = loader->slots[job->piece % PIECE_SLOTS];
    if (loader->resizes) { resize_stage(slot + job->task.staged, &job->task, &job->view, record, job->entry->width, (int)loader->options.S, (int)loader->options.CH); }
    else { memcpy(slot + job->task.staged, record, bytes); }
}

// Takes the next job if its piece is `last` at most and its slot is free, and does it. Called and left with the lock held
bool loader_work(Loader* loader, size_t last) {
    if (loader->next == loader->planned) { return false; }
    const size_t B = loader->options.B;
    LoaderBatch* batch = &loader->batches[loader->next / B % 2];
    LoaderJob* job = &batch->jobs[loader->next % B];
    if (job->piece > last || job->piece >= loader->issued + PIECE_SLOTS) { return false; }
    loader->next++;
    if (loader->next - batch->first_job == batch->n) { loader->next = batch->first_job + B; } // a last batch may be shorter
    pthread_mutex_unlock(&loader->lock);
    loader_read(loader, job);
    pthread_mutex_lock(&loader->lock);
    if (--batch->left[job->piece - batch->first_piece] == 0) { pthread_cond_broadcast(&loader->changed); }
    return true;
}

void* loader_reader(void* argument) {
    Loader* loader = (Loader*)argument;
    cudaCheck(cudaSetDevice(loader->device));
    pthread_mutex_lock(&loader->lock);
    while (!loader->stop) { if (!loader_work(loader, SIZE_MAX)) { pthread_cond_wait(&loader->changed, &loader->lock); } }
    pthread_mutex_unlock(&loader->lock);
    return NULL;
}

// chooses the images of a batch, counted from 0 over the run (of this rank), and gives them to the readers
void loader_plan(Loader* loader, size_t number) {
    const LoaderOptions* o = &loader->options;
    const size_t batches = loader_batches(loader), in_epoch = number % batches, pixels = numel(o->S, o->S, o->CH);
    const unsigned epoch = (unsigned)(number / batches);
    if (o->training && loader->epoch != (long long)epoch) {
        shuffle(loader->order, loader->set.images, o->seed, epoch);
        loader->epoch = epoch;
    }
    LoaderBatch* b = &loader->batches[loader->planned / o->B % 2];
    cudaCheck(cudaEventSynchronize(b->copied)); // its pinned memory may still be read
    const size_t first = loader_place(o, in_epoch, 0), rest = loader->set.images - first;
    b->n = !o->training && rest < o->B ? rest : o->B;
    b->epoch = epoch;
    b->first_place = first;
    b->place_step = loader_place(o, in_epoch, 1) - first;
    b->pieces = 0;
    b->first_piece = loader->pieces;
    b->first_job = loader->planned;
    size_t staged = 0, scratch = 0, largest = 0; // bytes of the piece, of the group, of the piece's largest group
    for (size_t i = 0; i < b->n; i++) {
        const size_t place = loader_place(o, in_epoch, i);
        LoaderJob* job = &b->jobs[i];
        job->shard = set_image(&loader->set, loader_image(o, loader->order, loader->set.images, place), &job->number);
        job->entry = &job->shard->entries[job->number];
        job->view = loader_view(o, job->entry, epoch, place);
        job->task = ResizeTask{};
        if (loader->resizes) { job->task = resize_task(&job->view, (int)o->S, (int)o->CH); }
        else { job->task.staged_bytes = pixels; }
        if (scratch + job->task.scratch_bytes > loader->group_bytes) { scratch = 0; }
        if (scratch + job->task.scratch_bytes > largest) { largest = scratch + job->task.scratch_bytes; }
        if (b->pieces == 0 || b->piece_jobs[b->pieces - 1] == MAX_PIECE_IMAGES || staged + job->task.staged_bytes + largest > loader->piece_bytes) {
            b->piece_jobs[b->pieces++] = 0;
            staged = scratch = 0;
            largest = job->task.scratch_bytes;
        }
        assert(staged + job->task.staged_bytes + largest <= loader->piece_bytes);
        job->task.staged = staged;
        job->task.resized = scratch;
        job->task.image = (unsigned)i;
        staged += job->task.staged_bytes;
        scratch += job->task.scratch_bytes;
        b->piece_jobs[b->pieces - 1]++;
        b->piece_bytes[b->pieces - 1] = staged;
        job->piece = b->first_piece + b->pieces - 1;
        b->labels[i] = job->entry->label;
        b->flips[i] = !loader->resizes && job->view.mirror;
        if (!loader->set.verified) { // the disk begins with all of them
            const uintptr_t from = (uintptr_t)(job->shard->file.data + job->entry->offset) & ~(uintptr_t)4095;
            const uintptr_t to = (uintptr_t)(job->shard->file.data + job->entry->offset) + numel(job->entry->height, job->entry->width, o->CH);
            madvise((void*)from, to - from, MADV_WILLNEED);
        }
    }
    for (size_t i = 0; i < b->n; i++) { // what the device makes of a piece lies behind all of what is staged
        b->tasks[i] = b->jobs[i].task;
        b->tasks[i].resized += b->piece_bytes[b->jobs[i].piece - b->first_piece];
    }
    memcpy(b->left, b->piece_jobs, b->pieces * sizeof(size_t));
    loader->pieces += b->pieces;
    loader->ahead = (long long)number;
    pthread_mutex_lock(&loader->lock);
    loader->planned += o->B;
    pthread_cond_broadcast(&loader->changed);
    pthread_mutex_unlock(&loader->lock);
}

// staging: as loader_staging_bytes of the set and options says, and the plan has it
void loader_open(Loader* loader, ShardSet set, LoaderOptions options, LoaderTarget target, size_t staging, int readers) {
    memset(loader, 0, sizeof(*loader));
    if (options.training) { augment_open(target.augmenter, &options.augment, options.B); }
    const size_t B = options.B, direct = align_up(numel(B, options.S, options.S, options.CH)), image = align_up(numel(options.S, options.S, options.CH));
    loader->set = set;
    loader->options = options;
    loader->target = target;
    loader->resizes = staging > 0;
    loader->piece_bytes = staging > 0 ? staging : direct < PIECE_BYTES ? direct : image < PIECE_BYTES ? PIECE_BYTES : image;
    loader->epoch_images = loader_epoch_images(set.images, options.repeats, options.ranks);
    loader->epoch = loader->ahead = -1;
    loader->order = (unsigned*)malloc(set.images * sizeof(unsigned));
    require(loader->order != NULL, "out of host memory for the order of %u images", set.images);
    for (unsigned i = 0; i < set.images; i++) { loader->order[i] = i; }
    for (int i = 0; i < 2; i++) {
        LoaderBatch* b = &loader->batches[i];
        b->jobs = (LoaderJob*)calloc(B, sizeof(LoaderJob));
        b->piece_jobs = (size_t*)malloc(B * sizeof(size_t));
        b->piece_bytes = (size_t*)malloc(B * sizeof(size_t));
        b->left = (size_t*)malloc(B * sizeof(size_t));
        require(b->jobs != NULL && b->piece_jobs != NULL && b->piece_bytes != NULL && b->left != NULL, "out of host memory for a batch of %zu images", B);
        cudaCheck(cudaMallocHost((void**)&b->labels, B * sizeof(int)));
        cudaCheck(cudaMallocHost((void**)&b->flips, B * sizeof(int)));
        cudaCheck(cudaMallocHost((void**)&b->tasks, B * sizeof(ResizeTask)));
        cudaCheck(cudaEventCreateWithFlags(&b->copied, cudaEventDisableTiming | cudaEventBlockingSync));
    }
    for (int i = 0; i < PIECE_SLOTS; i++) {
        cudaCheck(cudaMallocHost((void**)&loader->slots[i], loader->piece_bytes));
        cudaCheck(cudaEventCreateWithFlags(&loader->emptied[i], cudaEventDisableTiming | cudaEventBlockingSync));
    }
    cudaCheck(cudaStreamCreateWithFlags(&loader->stream, cudaStreamNonBlocking));
    cudaCheck(cudaEventCreateWithFlags(&loader->taken, cudaEventDisableTiming));
    cudaCheck(cudaGetDevice(&loader->device));
    cudaDeviceProp properties;
    cudaCheck(cudaGetDeviceProperties(&properties, loader->device));
    loader->group_bytes = (size_t)properties.l2CacheSize;
    pthread_mutex_init(&loader->lock, NULL);
    pthread_cond_init(&loader->changed, NULL);
    for (loader->num_readers = 0; loader->num_readers < readers; loader->num_readers++) {
        require(pthread_create(&loader->readers[loader->num_readers], NULL, loader_reader, loader) == 0, "cannot start reader thread %d: %m; lower -threads",
                loader->num_readers + 1);
    }
}

// ends the readers and gives back the loader's memory
void loader_close(Loader* loader) {
    pthread_mutex_lock(&loader->lock);
    loader->stop = true;
    pthread_cond_broadcast(&loader->changed);
    pthread_mutex_unlock(&loader->lock);
    for (int i = 0; i < loader->num_readers; i++) { pthread_join(loader->readers[i], NULL); }
    cudaCheck(cudaStreamSynchronize(loader->stream));
    for (int i = 0; i < 2; i++) {
        LoaderBatch* b = &loader->batches[i];
        cudaCheck(cudaFreeHost(b->labels));
        cudaCheck(cudaFreeHost(b->flips));
        cudaCheck(cudaFreeHost(b->tasks));
        free(b->jobs);
        free(b->piece_jobs);
        free(b->piece_bytes);
        free(b->left);
    }
    for (int i = 0; i < PIECE_SLOTS; i++) { cudaCheck(cudaFreeHost(loader->slots[i])); }
    if (loader->options.training) { augment_close(loader->target.augmenter); }
    free(loader->order);
}

// one piece of a batch, images first .. first+n-1 of `bytes`: from pinned memory to the device, and resized, on the loader's stream
void loader_piece_to_device(Loader* loader, const LoaderBatch* b, size_t first, size_t n, size_t bytes) {
    const LoaderTarget* to = &loader->target;
    const size_t pixels = numel(loader->options.S, loader->options.S, loader->options.CH), slot = b->jobs[first].piece % PIECE_SLOTS;
    if (!loader->resizes) {
        cudaCheck(cudaMemcpyAsync(to->images + first * pixels, loader->slots[slot], bytes, cudaMemcpyHostToDevice, loader->stream));
        cudaCheck(cudaEventRecord(loader->emptied[slot], loader->stream));
        return;
    }
    for (size_t i = first, end; i < first + n; i = end) {
        int largest = b->tasks[i].pitch;
        for (end = i + 1; end < first + n && b->tasks[end].resized > b->tasks[end - 1].resized; end++) {
            if (b->tasks[end].pitch > largest) { largest = b->tasks[end].pitch; }
        }
        const size_t begin = b->tasks[i].staged, group = b->tasks[end - 1].staged + b->tasks[end - 1].staged_bytes - begin;
        cudaCheck(cudaMemcpyAsync(to->staging + begin, loader->slots[slot] + begin, group, cudaMemcpyHostToDevice, loader->stream));
        if (end == first + n) { cudaCheck(cudaEventRecord(loader->emptied[slot], loader->stream)); }
        resize_images(to->images, to->staging, to->tasks + i, (int)(end - i), largest, (int)loader->options.S, (int)loader->options.CH, loader->stream);
    }
}

// Brings batch `number` to the device, when the one before has been taken, and lets the readers go on with the next. Batches come in a row,
// from any first one on; evaluations count on. Returns how many images it has
size_t loader_batch(Loader* loader, size_t number) {
    const LoaderTarget* to = &loader->target;
    if (loader->ahead < 0) { loader_plan(loader, number); }
    assert(loader->ahead == (long long)number);
    LoaderBatch* b = &loader->batches[(loader->planned / loader->options.B - 1) % 2];
    loader_plan(loader, number + 1);
    cudaCheck(cudaStreamWaitEvent(loader->stream, loader->taken, 0));
    cudaCheck(cudaMemcpyAsync(to->labels, b->labels, b->n * sizeof(int), cudaMemcpyHostToDevice, loader->stream));
    cudaCheck(cudaMemcpyAsync(to->flips, b->flips, b->n * sizeof(int), cudaMemcpyHostToDevice, loader->stream));
    if (loader->resizes) { cudaCheck(cudaMemcpyAsync(to->tasks, b->tasks, b->n * sizeof(ResizeTask), cudaMemcpyHostToDevice, loader->stream)); }
    for (size_t p = 0, first = 0; p < b->pieces; first += b->piece_jobs[p++]) {
        pthread_mutex_lock(&loader->lock);
        while (b->left[p] > 0) { if (!loader_work(loader, b->first_piece + p)) { pthread_cond_wait(&loader->changed, &loader->lock); } }
        pthread_mutex_unlock(&loader->lock);
        for (size_t i = first; i < first + b->piece_jobs[p]; i++) {
            const LoaderJob* job = &b->jobs[i];
            require(job->crc == job->entry->crc, "%s: checksum of image %u is %08x, expected %08x: it is damaged; write the shard again",
                    job->shard->file.path, job->number, job->crc, job->entry->crc);
        }
        loader_piece_to_device(loader, b, first, b->piece_jobs[p], b->piece_bytes[p]);
        pthread_mutex_lock(&loader->lock);
        loader->issued++;
        pthread_cond_broadcast(&loader->changed);
        pthread_mutex_unlock(&loader->lock);
    }
    const LoaderOptions* o = &loader->options;
    if (o->training) {
        augment_batch(to->augmenter, &o->augment, to->images, to->flips, o->seed, b->epoch, b->first_place, b->place_step, b->n, (int)o->S, (int)o->CH,
                      loader->set.shards[0].header->mean, loader->stream);
    }
    cudaCheck(cudaEventRecord(b->copied, loader->stream));
    loader->current = b;
    return b->n;
}

PixelStats set_stats(const ShardSet* set) {
    PixelStats stats;
    memcpy(stats.mean, set->shards[0].header->mean, sizeof(stats.mean));
    memcpy(stats.std, set->shards[0].header->std, sizeof(stats.std));
    return stats;
}
// ---- end shared: data loader -----------------------------------------------

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

// recipes: names, and the flags with values that they stand for
void usage(FILE* out, const char* program, const Option* options, int n, const char* const (*recipes)[2], int num_recipes) {
    fprintf(out, "usage: %s [flag value] ...\n", program);
    for (int i = 0; i < n; i++) {
        const Option* o = &options[i];
        fprintf(out, "  %-10s %s (default ", o->flag, o->help);
        if (o->type == 'i') { fprintf(out, "%d)\n", *(int*)o->value); }
        else if (o->type == 'f') { fprintf(out, "%g)\n", *(double*)o->value); }
        else { fprintf(out, "%s)\n", **(const char***)&o->value ? *(const char**)o->value : "none"); }
    }
    fprintf(out, "recipes (-recipe NAME; flags beside it override):\n");
    for (int i = 0; i < num_recipes; i++) { fprintf(out, "  %s: %s\n", recipes[i][0], recipes[i][1]); }
}

void set_option(const Option* options, int n, const char* program, const char* flag, const char* arg) {
    const Option* o = NULL;
    for (int j = 0; j < n; j++) { if (strcmp(flag, options[j].flag) == 0) { o = &options[j]; } }
    require(o != NULL, "unknown flag %s; %s -h lists the flags", flag, program);
    require(arg != NULL, "flag %s lacks its value; %s -h lists the flags", flag, program);
    if (o->type == 's') {
        *(const char**)o->value = arg;
        return;
    }
    char* end;
    const double v = strtod(arg, &end);
    require(end != arg && *end == 0, "%s wants a number, got '%s'", o->flag, arg);
    require(v >= o->low && v <= o->high, "%s must be between %g and %g, got %s", o->flag, o->low, o->high, arg); // a NaN fails
    if (o->type == 'f') { *(double*)o->value = v; return; }
    require(v == (int)v, "%s wants a whole number, got '%s'", o->flag, arg);
    *(int*)o->value = (int)v;
}

// what a recipe stands for becomes the defaults, wherever -recipe stands; then come the flags
void parse_options(int argc, char** argv, const Option* options, int n, const char* const (*recipes)[2], int num_recipes) {
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "-recipe") != 0) { continue; }
        const char* flags = NULL;
        for (int j = 0; j < num_recipes; j++) { if (strcmp(argv[i+1], recipes[j][0]) == 0) { flags = recipes[j][1]; } }
        require(flags != NULL, "-recipe %s is not a recipe; %s -h lists them", argv[i+1], argv[0]);
        char* words = strdup(flags); // lives as long as the options do
        require(words != NULL, "out of host memory for the recipe %s", argv[i+1]);
        for (char* flag = strtok(words, " "); flag != NULL; flag = strtok(NULL, " ")) { set_option(options, n, argv[0], flag, strtok(NULL, " ")); }
    }
    for (int i = 1; i < argc; i += 2) {
        if (strcmp(argv[i], "-h") == 0) {
            usage(stdout, argv[0], options, n, recipes, num_recipes);
            exit(EXIT_SUCCESS);
        }
        set_option(options, n, argv[0], argv[i], i + 1 < argc ? argv[i+1] : NULL);
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

// shards must hold what the model takes; labelled: and classes that it knows
ShardSet open_shards(const char* path, DeitConfig c, bool labelled) {
    ShardSet set = shards_open(path);
    const ShardHeader* h = set.shards[0].header;
    require(h->task == 0, "%s is a detection shard (task %u), a classifier trains on task 0", path, h->task);
    require(h->channels == (unsigned)c.image_channels, "%s has images of %u channels, the model takes %d; set -chans", path, h->channels, c.image_channels);
    require(!labelled || h->classes == (unsigned)c.num_classes, "%s has %u classes, the model %d; set -classes", path, h->classes, c.num_classes);
    return set;
}

// the batch that the loader brought last becomes patches and labels; augment NULL: as it is
void take_batch(DeitModel* model, const Loader* loader, const BatchAugment* augment) {
    cudaCheck(cudaStreamWaitEvent(main_stream, loader->current->copied, 0));
    deit_patchify(model, set_stats(&loader->set), augment, loader->current->n);
    cudaCheck(cudaEventRecord(loader->taken, main_stream));
}

// the same for training, with erasing and mixing; `number` counts the batches of the run. Returns the weight of each image's own label
float take_training_batch(DeitModel* model, const Loader* loader, size_t number) {
    BatchAugment a = {};
    const LoaderOptions* o = &loader->options;
    a.erased = model->augmenter.erased;
    a.seed = o->seed;
    a.place = loader->current->first_place;
    a.place_step = loader->current->place_step;
    a.epoch = loader->current->epoch;
    a.n = (int)o->B;
    draw_mix(&a, &o->augment, a.seed, (unsigned)number, (int)o->S);
    take_batch(model, loader, &a);
    return a.lam;
}

typedef struct {
    double loss, top1, top5;
} Evaluation;

// mean loss and accuracies over a whole set; ranks take turns with its batches
Evaluation evaluate(DeitModel* model, Loader* loader) {
    const size_t images = loader->set.images, batches = loader_batches(loader), first = loader->ahead < 0 ? 0 : (size_t)loader->ahead;
    cudaCheck(cudaMemsetAsync(model->result, 0, sizeof(StepResult), main_stream));
    for (size_t batch = first; batch < first + batches; batch++) {
        const size_t n = loader_batch(loader, batch);
        take_batch(model, loader, NULL);
        deit_forward(model, n, false);
        deit_loss(model, n, 0.0f, 1.0f, 1.0f);
    }
    const StepResult r = deit_result(model);
    return Evaluation{r.loss / images, (double)r.top1 / images, (double)r.top5 / images};
}

// of the weights, or of their moving average: a line on stdout, in main.log and in TensorBoard's file (both may be NULL)
void report_evaluation(Evaluation e, bool averaged, int step, int epoch, FILE* log, FILE* events) {
    const double top1 = 100.0 * e.top1, top5 = 100.0 * e.top5;
    printf("eval %s epoch %d | loss %8.6f | top-1 %6.2f%% | top-5 %6.2f%%\n", averaged ? "EMA" : "", epoch, e.loss, top1, top5);
    if (log != NULL) {
        fprintf(log, averaged ? "s:%d etel:%.9g etop1:%.9g etop5:%.9g\n" : "s:%d tel:%.9g top1:%.9g top5:%.9g\n", step, e.loss, top1, top5);
        fflush(log);
    }
    events_write(events, step, averaged ? "val/ema_loss" : "val/loss", e.loss);
    events_write(events, step, averaged ? "val/ema_top1" : "val/top1", top1);
    events_write(events, step, averaged ? "val/ema_top5" : "val/top5", top5);
}

// Prints for each image of a shard the (up to) five best classes with their probabilities: softmax of the logits, in double; of two classes
// with the same logit the lower comes first. Every rank goes through all images, rank 0 is heard
void predict(DeitModel* model, Loader* loader) {
    const size_t batches = loader_batches(loader), B = model->options.B, V = model->options.config.num_classes;
    floatX* logits = (floatX*)malloc(B * V * sizeof(floatX));
    require(logits != NULL, "out of host memory for %zu x %zu logits", B, V);
    for (size_t batch = 0, first = 0; batch < batches; batch++, first += B) {
        const size_t n = loader_batch(loader, batch);
        take_batch(model, loader, NULL);
        deit_forward(model, n, false);
        cudaCheck(cudaMemcpyAsync(logits, model->acts.logits.data, n * V * sizeof(floatX), cudaMemcpyDeviceToHost, main_stream));
        cudaCheck(cudaStreamSynchronize(main_stream));
        for (size_t b = 0; b < n; b++) {
            const floatX* row = logits + b * V;
            size_t best[6], found = 0;
            double sum = 0.0;
            for (size_t v = 0; v < V; v++) {
                require(isfinite((float)row[v]), "image %zu: the logit of class %zu is not finite; the weights are damaged, or too large for "
                        PRECISION_NAME, first + b, v);
                size_t place = found; // among the best so far
                for (; place > 0 && (float)row[v] > (float)row[best[place-1]]; place--) { best[place] = best[place-1]; }
                best[place] = v;
                found += found < 5;
            }
            for (size_t v = 0; v < V; v++) { sum += exp((double)(float)row[v] - (double)(float)row[best[0]]); }
            printf("image %zu:", first + b);
            for (size_t i = 0; i < found; i++) {
                printf("%s %zu %.6f", i > 0 ? "," : "", best[i], exp((double)(float)row[best[i]] - (double)(float)row[best[0]]) / sum);
            }
            printf("\n");
        }
    }
    free(logits);
}

// Writes up to 64 images of the batch that was taken last, as the model gets them, in a grid with their labels below: level = 255 *
// (patches * std + mean), rounded, within 0 to 255. Of 2 channels the first is shown, of 4 the first three
void write_sheet(const char* path, const DeitModel* model, PixelStats stats) {
    const DeitConfig c = model->options.config;
    const int S = c.image_size, P = c.patch_size, CH = c.image_channels, channels = CH >= 3 ? 3 : 1;
    const int gap = 2, scale = 1 + S / 128, line = 5 * scale + 1, most = (int)(((size_t)1 << 29) / numel(S + gap, S + gap + line, channels));
    const int n = (int)(model->options.B < 64 ? model->options.B : 64), shown = n < most ? n : most > 1 ? most : 1;
    int columns = 1;
    while (columns * columns < shown) { columns++; }
    const size_t per_image = model->acts.patches.per_image;
    floatX* patches = (floatX*)malloc(shown * per_image * sizeof(floatX));
    int labels[64];
    require(patches != NULL, "out of host memory for %d images", shown);
    cudaCheck(cudaStreamSynchronize(main_stream));
    cudaCheck(cudaMemcpy(patches, activation_at(model, &model->acts.patches, 0, 0, false), shown * per_image * sizeof(floatX), cudaMemcpyDeviceToHost));
    cudaCheck(cudaMemcpy(labels, model->labels, shown * sizeof(int), cudaMemcpyDeviceToHost));
    Picture sheet = picture_new(columns * (S + gap) + gap, CEIL_DIV(shown, columns) * (S + gap + line) + gap, channels, 64);
    for (int b = 0; b < shown; b++) {
        const int left = gap + b % columns * (S + gap), top = gap + b / columns * (S + gap + line);
        for (int h = 0; h < S; h++) {
            for (int w = 0; w < S; w++) {
                const size_t t = (size_t)(h / P) * (S / P) + w / P;
                for (int ch = 0; ch < channels; ch++) {
                    const float x = (float)patches[b * per_image + ((t * CH + ch) * P + h % P) * P + w % P];
                    const float level = 255.0f * (x * stats.std[ch] + stats.mean[ch]) + 0.5f;
                    sheet.pixels[((size_t)(top + h) * sheet.width + left + w) * channels + ch] = (uint8_t)fminf(fmaxf(level, 0.0f), 255.0f);
                }
            }
        }
        picture_number(&sheet, left, top + S + 1, (unsigned)labels[b], scale, 255);
    }
    if (rank == 0) { picture_write(path, &sheet); }
    printf("wrote %s: the first %d images of a training batch as the model gets them%s\n", path, shown,
           CH == channels ? "" : CH == 2 ? ", the first of 2 channels" : ", the first 3 of 4 channels");
    free(sheet.pixels);
    free(patches);
}

// the table of all memory, and a line of it for programs; limit > 0: also the largest batch that fits into so many bytes
void report_plan(DeitModel* model, size_t limit) {
    deit_plan(model);
    require(model->too_large == NULL, "%s has 2^32 elements or more, too many for DropIT's 32-bit indices; use a smaller batch (-b)", model->too_large);
    plan_print(&model->plan);
    printf("plan");
    for (int c = 0; c < NUM_CATEGORIES; c++) { printf(" %s=%zu", category_names[c], model->plan.bytes[c]); }
    if (limit > 0) { printf(" max_batch=%zu", deit_largest_batch(model->options, limit)); }
    printf(" total=%zu\n", plan_total(&model->plan));
}

// times so many steps on random images, after two that warm up; free_before: bytes that were free before the model was allocated
void bench_steps(DeitModel* model, OptimizerConfig optimizer, int steps, size_t free_before) {
    const DeitConfig c = model->options.config;
    const size_t B = model->options.B, bytes = numel(B, c.image_size, c.image_size, c.image_channels);
    uint8_t* pixels = (uint8_t*)malloc(bytes);
    int* zeros = (int*)calloc(B, sizeof(int));
    double* ms = (double*)malloc(steps * sizeof(double));
    require(pixels != NULL && zeros != NULL && ms != NULL, "out of host memory for a batch of %zu images", B);
    for (size_t i = 0; i < bytes; i++) { pixels[i] = (uint8_t)philox(model->options.seed, RNG_AUGMENT, 0, i).x; }
    cudaCheck(cudaMemcpy(model->images, pixels, bytes, cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(model->next_labels, zeros, B * sizeof(int), cudaMemcpyHostToDevice));
    cudaCheck(cudaMemcpy(model->flips, zeros, B * sizeof(int), cudaMemcpyHostToDevice));
    const PixelStats no_stats = {{0.5f, 0.5f, 0.5f, 0.5f}, {0.25f, 0.25f, 0.25f, 0.25f}};
    for (int step = -2; step < steps; step++) {
        const double start = seconds();
        deit_zero_gradients(model);
        deit_patchify(model, no_stats, NULL, B);
        deit_forward(model, B, true);
        deit_loss(model, B, 0.0f, 1.0f, 1.0f / B);
        deit_backward(model);
        deit_update(model, optimizer, 0.0, step + 3);
        deit_result(model);
        if (step >= 0) { ms[step] = 1e3 * (seconds() - start); }
    }
    qsort(ms, steps, sizeof(double), by_value);
    size_t free_now, total_bytes;
    cudaCheck(cudaMemGetInfo(&free_now, &total_bytes));
    printf("bench ms_min=%.3f ms_median=%.3f images_per_s=%.2f bytes_planned=%zu bytes_used=%zu\n", ms[0], ms[steps / 2], 1e3 * B / ms[steps / 2],
           plan_total(&model->plan), free_before - free_now);
    free(pixels);
    free(zeros);
    free(ms);
}

// times loading and augmentation of so many batches, after two that warm up
void bench_loader(DeitModel* model, Loader* loader, int batches) {
    const size_t B = model->options.B;
    double start = 0.0;
    for (int batch = 0; batch < batches + 2; batch++) {
        if (batch == 2) {
            cudaCheck(cudaStreamSynchronize(main_stream));
            start = seconds();
        }
        loader_batch(loader, batch);
        take_training_batch(model, loader, batch);
    }
    cudaCheck(cudaStreamSynchronize(main_stream));
    printf("data images_per_s=%.1f batches=%d batch=%zu threads=%d\n", (double)batches * B / (seconds() - start), batches, B, loader->num_readers);
}

int main(int argc, char** argv) {
    const char *model_name = "deit_nano", *train_path = "data/fashion_train.bin", *val_path = "data/fashion_val.bin";
    const char *output = NULL, *optimizer = "adamw", *strategy = "mink", *weights = NULL, *plan = "0", *tensorboard = NULL;
    const char *predict_path = NULL, *sheet = NULL;
    const char* augment = "none";
    int B = 64, accumulation = 1, epochs = 6, max_steps = 0, drop_all = 0, recompute = 1, evaluate_every = 1, evaluate_only = 0, seed = 1;
    int size = 0, patch = 0, image_channels = 0, classes = 0, warmup = 50, flip = 0, stats = 0, bench = 0;
    int save_every = 0, keep = 0, resume = 0, sharded = 0, crop = 0, repeats = 1, threads = 2, bench_data = 0;
    double crop_scale = 0.08, crop_pct = 1.0;
    double lr = 2e-3, weight_decay = 0.05, gamma = 0.0, smoothing = 0.0, clip = 0.0, beta1 = 0.9, beta2 = 0.999, momentum = 0.9;
    double erase = 0.0, mixup = 0.0, cutmix = 0.0, mix = 1.0, mix_switch = 0.5;
    const char *recipe = NULL, *schedule_name = "step";
    int warmup_epochs = 0, cooldown = 0, unscale_lr = 1, nesterov = 0;
    double min_lr = 0.0, warmup_lr = 0.0, drop_path = 0.0, ema = 0.0;
    const Option options[] = {
        {"-recipe",   's', &recipe,         "published settings that become the defaults, listed below", 0, 0},
        {"-m",        's', &model_name,     "model: deit_nano, deit_tiny, deit_small, deit_base, vit_base", 0, 0},
        {"-i",        's', &train_path,     "training images: a shard, or PREFIX of PREFIX_00000.bin, PREFIX_00001.bin, ...", 0, 0},
        {"-j",        's', &val_path,       "validation images: a shard or a prefix", 0, 0},
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
        {"-nesterov", 'i', &nesterov,       "SGD: 1: Nesterov's momentum", 0, 1},
        {"-unscale_lr", 'i', &unscale_lr,   "1: -l is the learning rate; 0: it is that of 512 images, and grows with the images of a step", 0, 1},
        {"-schedule", 's', &schedule_name,  "learning rate by step, or by epoch, as DeiT's code steps timm's cosine", 0, 0},
        {"-warmup",   'i', &warmup,         "steps of linear warm-up before the cosine (-schedule step)", 0, 2e9},
        {"-warmup_epochs", 'i', &warmup_epochs, "epochs of linear warm-up; above 0 they take the place of -warmup", 0, 1 << 20},
        {"-warmup_lr", 'f', &warmup_lr,     "learning rate at which the warm-up begins", 0, 1e6},
        {"-min_lr",   'f', &min_lr,         "learning rate at which the cosine ends", 0, 1e6},
        {"-cooldown", 'i', &cooldown,       "epochs at -min_lr after the -e epochs", 0, 1 << 20},
        {"-drop_path", 'f', &drop_path,     "drop-path: rate of the last block, linear over depth; 0: off", 0, 0.99},
        {"-ema",      'f', &ema,            "decay of a moving average of the weights, evaluated too; 0: none", 0, 0.9999999},
        {"-clip",     'f', &clip,           "largest norm of the gradient, 0: no clipping", 0, 1e30},
        {"-smoothing", 'f', &smoothing,     "label smoothing", 0, 0.999999},
        {"-flip",     'i', &flip,           "1: mirror half of the training images", 0, 1},
        {"-crop",     'i', &crop,           "1: random resized crops of the training images", 0, 1},
        {"-scale",    'f', &crop_scale,     "smallest area of a random crop", 0.0001, 1},
        {"-crop_pct", 'f', &crop_pct,       "evaluation: the shorter side is resized to size / crop_pct, and the centre taken", 0.25, 1},
        {"-repeats",  'i', &repeats,        "repeated augmentation: how often an image is shown in a row", 1, 1024},
        {"-threads",  'i', &threads,        "threads that read images ahead", 0, MAX_READERS},
        {"-bench_data", 'i', &bench_data,   "time this many batches of loading and augmentation and exit", 0, 1 << 20},
        {"-aa",       's', &augment,        "RandAugment as timm names it: none, rand-m9-mstd0.5-inc1", 0, 0},
        {"-reprob",   'f', &erase,          "random erasing: probability", 0, 1},
        {"-mixup",    'f', &mixup,          "mixup: alpha of the beta distribution, 0: off", 0, 1000},
        {"-cutmix",   'f', &cutmix,         "cutmix: alpha of the beta distribution, 0: off", 0, 1000},
        {"-mixup_prob", 'f', &mix,          "probability that a batch is mixed", 0, 1},
        {"-mixup_switch", 'f', &mix_switch, "probability of cutmix where mixup is on too", 0, 1},
        {"-g",        'f', &gamma,          "DropIT: fraction of each cached input to drop, 0: off", 0, 0.99999999},
        {"-s",        's', &strategy,       "DropIT: mink, fastmink, random", 0, 0},
        {"-g_all",    'i', &drop_all,       "DropIT: 1: also in patch embedding and head", 0, 1},
        {"-stats",    'i', &stats,          "DropIT: report what is kept every N steps, 0: never", 0, 2e9},
        {"-r",        'i', &recompute,      "recompute in the backward pass: 0 nothing, 1 norms and GELU, 2 also qkv and fc1, 3 the block", 0, 3},
        {"-w",        's', &weights,        "initial weights: timm's or a checkpoint's model_ file (.safetensors)", 0, 0},
        {"-predict",  's', &predict_path,   "print the five best classes of each image of this shard and exit", 0, 0},
        {"-sheet",    's', &sheet,          "write a PNG of the first training batch as the model gets it, and exit", 0, 0},
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
    parse_options(argc, argv, options, num_options, deit_recipes, sizeof(deit_recipes) / sizeof(deit_recipes[0]));
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
    require((bench > 0) + (bench_data > 0) + evaluate_only + (predict_path != NULL) + (sheet != NULL) <= 1, "-bench, -bench_data, -eval, -predict and "
            "-sheet do one thing each and exit; give one of them");
    require(predict_path == NULL || weights != NULL, "-predict needs weights; give them with -w");
    require(strcmp(schedule_name, "step") == 0 || strcmp(schedule_name, "epoch") == 0, "-schedule %s is not a schedule; choose step or epoch",
            schedule_name);
    require(stats == 0 || gamma > 0.0, "-stats reports on DropIT; give -g above 0 too");
    o->B = B;
    o->gamma = gamma;
    o->drop_all = drop_all;
    o->recompute = recompute;
    o->adamw = strcmp(optimizer, "adamw") == 0;
    o->sharded = sharded;
    o->stats = stats > 0;
    o->drop_path = drop_path;
    o->ema = ema;
    o->chunk_bytes = DEFAULT_CHUNK_BYTES;
    o->seed = (unsigned long long)seed;
    parse_augment(&o->augment, augment);
    o->augment.erase = erase;
    o->augment.mixup = mixup;
    o->augment.cutmix = cutmix;
    o->augment.mix = mix;
    o->augment.mix_cutmix = mix_switch;
    const OptimizerConfig optimizer_config = {o->adamw, lr, beta1, beta2, 1e-8, weight_decay, momentum, clip, nesterov == 1};

    // everything the user gave is read and checked before anything is written
    const bool plans = strcmp(plan, "0") != 0, training = bench == 0 && !evaluate_only && predict_path == NULL;
    Loader train, val;
    ShardSet train_set = {}, val_set = {};
    if (bench == 0 && !plans) {
        if (training) { train_set = open_shards(train_path, o->config, true); }
        val_set = open_shards(predict_path != NULL ? predict_path : val_path, o->config, predict_path == NULL);
    }
    LoaderOptions val_data = {(size_t)B, (size_t)o->config.image_size, (size_t)o->config.image_channels, 1, 0, o->seed, false, false, false, crop_scale,
                              crop_pct, 1, (size_t)accumulation, o->augment};
    LoaderOptions train_data = val_data;
    train_data.training = true;
    train_data.crop = crop == 1;
    train_data.flip = flip == 1;
    train_data.repeats = repeats;
    const size_t train_staging = loader_staging_bytes(&train_set, &train_data), val_staging = loader_staging_bytes(&val_set, &val_data);
    o->staging_bytes = train_staging > val_staging ? train_staging : val_staging;
    if (plans) {
        report_plan(model, strcmp(plan, "1") == 0 ? 0 : parse_bytes(plan));
        return EXIT_SUCCESS;
    }
    device_open();
    train_data.ranks = num_ranks;
    train_data.rank = rank;
    if (predict_path == NULL) { // every rank predicts all images
        val_data.ranks = num_ranks;
        val_data.rank = rank;
    }
    const size_t images = num_ranks * loader_epoch_images(train_set.images, repeats, num_ranks); // of an epoch
    const size_t step_images = (size_t)B * num_ranks * accumulation, epoch_steps = images / step_images;
    require(!training || epoch_steps > 0, "%s has %zu images in an epoch, fewer than the %zu of one step (-b %d x %d ranks x -a %d)", train_path,
            images, step_images, B, num_ranks, accumulation);
    Safetensors* initial = weights != NULL ? safetensors_open(weights) : NULL;
    require(!training || sheet != NULL || output == NULL || resume || checkpoint_newest(output, INT_MAX) < 0, "%s holds checkpoints of another run; resume it with "
            "-y 1 or choose another -o", output);
    // What a resumed run must share with the run that wrote the checkpoint. "run" is the checksum of the weights it began with: the same
    // command twice writes the same files
    const int found = training && resume ? checkpoint_find(output) : -1, first_step = found < 0 ? 0 : found;
    ranks_agree((uint32_t)found, "newest checkpoints");
    // best_top1, in %, is that of the evaluations so far; -1: none
    StMetadata metadata[64] = {{"format", "pt"}, {"step", ""}, {"run", ""}, {"precision", PRECISION_NAME}, {"data", ""}, {"ranks", ""},
                               {"best_step", ""}, {"best_top1", ""}};
    snprintf(metadata[4].value, sizeof(metadata[4].value), "%08x", training ? train_set.crc : 0);
    snprintf(metadata[5].value, sizeof(metadata[5].value), "%d", num_ranks);
    const int num_metadata = options_metadata(metadata, 8, options, num_options, " -m -b -a -e -l -opt -wd -beta1 -beta2 -momentum -nesterov "
        "-unscale_lr -schedule -warmup -warmup_epochs -warmup_lr -min_lr -cooldown -clip -smoothing -drop_path -ema -flip -crop -scale -crop_pct "
        "-repeats -aa -reprob -mixup -cutmix -mixup_prob -mixup_switch -g -s -g_all -seed -size -patch -chans -classes ");
    size_t free_before, total_bytes;
    cudaCheck(cudaMemGetInfo(&free_before, &total_bytes));
    deit_allocate(model);
    if (found >= 0) {
        snprintf(metadata[1].value, sizeof(metadata[1].value), "%d", found);
        deit_resume(model, output, found, metadata, num_metadata);
        model->drop_step = (unsigned)(found * accumulation);
    } else if (initial != NULL) {
        deit_load_parameters(model, initial, "", evaluate_only || predict_path != NULL ? ADAPT_POSITIONS : ADAPT_HEAD);
        safetensors_close(initial);
    } else {
        deit_init_parameters(model);
    }
    if (found < 0 && save_every > 0) {
        snprintf(metadata[2].value, sizeof(metadata[2].value), "%08x", deit_fingerprint(model));
        strcpy(metadata[6].value, "0");
        strcpy(metadata[7].value, "-1");
    }

    const double MiB = 1048576.0;
    printf("model: %s, image %d, patch %d, channels %d, classes %d, width %d, depth %d, heads %d, %zu parameters\n", model_name, o->config.image_size,
           o->config.patch_size, o->config.image_channels, o->config.num_classes, o->config.channels, o->config.depth, o->config.heads,
           model->num_parameters);
    printf("DropIT: gamma %g, %s; recompute level %d\n", gamma, gamma > 0.0 ? strategy : "off", recompute);
    printf("memory:");
    for (int c = 0; c < NUM_CATEGORIES; c++) { printf(" %s %.1f MiB,", category_names[c], model->plan.bytes[c] / MiB); }
    printf(" total %.1f MiB; chunks of %zu images\n", plan_total(&model->plan) / MiB, model->chunk_images);

    if (bench > 0) {
        bench_steps(model, optimizer_config, bench, free_before);
        ranks_close();
        return EXIT_SUCCESS;
    }

    if (training) { printf("training data: %u images in %d shard%s, ", train_set.images, train_set.num_shards, train_set.num_shards > 1 ? "s" : ""); }
    printf("%s data: %u images in %d shard%s; %s\n", predict_path != NULL ? "other" : "validation", val_set.images, val_set.num_shards,
           val_set.num_shards > 1 ? "s" : "", o->staging_bytes > 0 ? "resized on the device" : "of the model's size");
    const LoaderTarget target = {model->images, model->next_labels, model->flips, model->staging, model->resize_tasks, &model->augmenter};
    if (training) { loader_open(&train, train_set, train_data, target, train_staging, threads); }
    if (bench_data > 0 || sheet != NULL) {
        if (bench_data > 0) {
            bench_loader(model, &train, bench_data);
        } else {
            loader_batch(&train, (size_t)first_step * accumulation);
            take_training_batch(model, &train, (size_t)first_step * accumulation);
            write_sheet(sheet, model, set_stats(&train_set));
        }
        loader_close(&train);
        ranks_close();
        return EXIT_SUCCESS;
    }
    loader_open(&val, val_set, val_data, target, val_staging, threads);
    if (!training) {
        if (predict_path != NULL) {
            predict(model, &val);
        } else {
            const Evaluation e = evaluate(model, &val);
            printf("final loss=%.6f top1=%.2f top5=%.2f\n", e.loss, 100.0 * e.top1, 100.0 * e.top5);
        }
        loader_close(&val);
        ranks_close();
        return EXIT_SUCCESS;
    }
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
    const int scheduled = (int)((epochs + cooldown) * epoch_steps), steps = max_steps > 0 && max_steps < scheduled ? max_steps : scheduled;
    const bool by_epochs = strcmp(schedule_name, "epoch") == 0;
    const Schedule schedule = {by_epochs, unscale_lr ? lr : lr * step_images / 512.0, min_lr, warmup_lr,
                               by_epochs ? warmup_epochs : warmup_epochs > 0 ? (int)(warmup_epochs * epoch_steps) : warmup,
                               by_epochs ? epochs : (int)(epochs * epoch_steps), (int)epoch_steps};
    Evaluation result = {};
    size_t loaded = (size_t)first_step * accumulation; // batches copied to the device
    double start = seconds(), timed = 0.0; // timed: without the first step
    if (first_step >= steps) { result = evaluate(model, &val); }
    for (int step = first_step; step < steps; step++) {
        // -x adds an evaluation that a run without it has not
        const bool planned = step + 1 == scheduled || (evaluate_every > 0 && (step + 1) % (evaluate_every * epoch_steps) == 0);
        const bool evaluates = planned || step + 1 == steps;
        model->stats_now = stats > 0 && step % stats == 0;
        deit_zero_gradients(model);
        for (int micro = 0; micro < accumulation; micro++) {
            const size_t batch = (size_t)step * accumulation + micro;
            if (loaded == batch) { loader_batch(&train, loaded++); }
            model->add_ranks = num_ranks > 1 && micro + 1 == accumulation;
            const float lam = take_training_batch(model, &train, batch);
            deit_forward(model, B, true);
            deit_loss(model, B, (float)smoothing, lam, 1.0f / (float)step_images);
            deit_backward(model);
            model->drop_step++;
            // the next batch is gathered and copied while the device computes; an evaluation needs its place on the device
            if (micro + 1 < accumulation || !evaluates) { loader_batch(&train, loaded++); }
        }
        const double rate = learning_rate_at(&schedule, step);
        deit_update(model, optimizer_config, rate, step + 1);
        const StepResult r = deit_result(model);
        const double now = seconds(), ms = 1e3 * (now - start), seen = (double)step_images, loss = r.loss / seen;
        start = now;
        timed += step > first_step ? ms : 0.0;
        const int left = (int)(1e-3 * (step > first_step ? timed / (step - first_step) : ms) * (steps - 1 - step));
        printf("step %5d/%d | loss %8.6f | acc %6.2f%% | norm %7.4f | lr %.2e | %8.2f ms | %6.0f img/s | ", step + 1, steps, loss,
               100.0 * r.top1 / seen, r.norm, rate, ms, 1e3 * seen / ms);
        const double mfu = peak_flops > 0.0 ? 100.0 * deit_flops(model, step_images / num_ranks) / (1e-3 * ms * peak_flops) : 0.0;
        if (peak_flops > 0.0) { printf("%4.1f%% MFU | ", mfu); }
        printf("left %d:%02d\n", left / 60, left % 60);
        if (log != NULL) {
            fprintf(log, "s:%d trl:%.9g lr:%.9g norm:%.9g ms:%.3f\n", step + 1, loss, rate, r.norm, ms);
            fflush(log);
        }
        events_write(events, step + 1, "train/loss", loss);
        events_write(events, step + 1, "train/top1", 100.0 * r.top1 / seen);
        events_write(events, step + 1, "train/lr", rate);
        events_write(events, step + 1, "train/gradient_norm", r.norm);
        events_write(events, step + 1, "train/images_per_s", 1e3 * seen / ms);
        if (peak_flops > 0.0) { events_write(events, step + 1, "train/mfu", mfu); }
        if (events != NULL) { fflush(events); }
        require(isfinite(loss) && r.not_finite == 0, "step %d: loss %g, and DropIT met %u values that are not finite; the first tensor that is not is: %s. "
                "Lower the learning rate (-l) or clip (-clip)", step + 1, loss, r.not_finite, deit_not_finite(model));
        if (evaluates) {
            const int epoch = (int)(step / epoch_steps) + 1;
            result = evaluate(model, &val);
            report_evaluation(result, false, step + 1, epoch, log, events);
            if (save_every > 0 && 100.0 * result.top1 > strtod(metadata[7].value, NULL)) {
                // What -x added may write the file, but later checkpoints are as if it had not been: the same bits as without -x
                StMetadata before[2] = {metadata[6], metadata[7]};
                snprintf(metadata[1].value, sizeof(metadata[1].value), "%d", step + 1);
                metadata[6] = metadata[1];
                strcpy(metadata[6].key, before[0].key);
                snprintf(metadata[7].value, sizeof(metadata[7].value), "%.17g", 100.0 * result.top1);
                deit_save_best(model, output, metadata, num_metadata, 100.0 * result.top1);
                if (!planned) { memcpy(&metadata[6], before, sizeof(before)); }
            }
            if (ema > 0.0) {
                deit_ema_enter(model);
                const Evaluation averaged = evaluate(model, &val);
                deit_ema_leave(model);
                report_evaluation(averaged, true, step + 1, epoch, log, events);
            }
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
    loader_close(&train);
    loader_close(&val);
    deit_ranks_agree(model);
    deit_free(model);
    ranks_close();
    printf("final loss=%.6f top1=%.2f top5=%.2f\n", result.loss, 100.0 * result.top1, 100.0 * result.top5);
    return EXIT_SUCCESS;
}
#endif
