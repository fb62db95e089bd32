/*
cuBLASLt on the CPU: descriptors and cublasLtMatmul, on top of blas.h. The epilogues are

    DEFAULT   D = alpha * op(A) @ op(B) + beta * C; C may be D
    BIAS      the same + bias (m), added in float before the one rounding
    BGRADA    as DEFAULT, and bias (m) = sum over k of A: stored, not accumulated, without alpha
    BGRADB    as DEFAULT, and bias (n) = sum over k of B: likewise

Column-major matrices, types as in cublas_v2.h, alpha and beta on the host. Any other epilogue or
attribute returns CUBLAS_STATUS_NOT_SUPPORTED, and so does what NVIDIA's documentation or its own
programs say that a GPU refuses (see matmul_problem).
*/
#pragma once

#include <limits.h>

#include "cublas_v2.h"

// ----------------------------------------------------------------------------
// enumerations and descriptors, with the values of CUDA 13

typedef enum {
    CUBLASLT_EPILOGUE_DEFAULT = 1, CUBLASLT_EPILOGUE_RELU = 2, CUBLASLT_EPILOGUE_RELU_AUX = 2 | 128,
    CUBLASLT_EPILOGUE_BIAS = 4, CUBLASLT_EPILOGUE_RELU_BIAS = 2 | 4, CUBLASLT_EPILOGUE_RELU_AUX_BIAS = 2 | 128 | 4,
    CUBLASLT_EPILOGUE_DRELU = 8 | 128, CUBLASLT_EPILOGUE_DRELU_BGRAD = 8 | 128 | 16, CUBLASLT_EPILOGUE_GELU = 32,
    CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128, CUBLASLT_EPILOGUE_GELU_BIAS = 32 | 4,
    CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4, CUBLASLT_EPILOGUE_DGELU = 64 | 128,
    CUBLASLT_EPILOGUE_DGELU_BGRAD = 64 | 128 | 16, CUBLASLT_EPILOGUE_BGRADA = 256, CUBLASLT_EPILOGUE_BGRADB = 512
} cublasLtEpilogue_t;

typedef enum {
    CUBLASLT_MATMUL_DESC_COMPUTE_TYPE = 0, CUBLASLT_MATMUL_DESC_SCALE_TYPE = 1, CUBLASLT_MATMUL_DESC_POINTER_MODE = 2,
    CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4, CUBLASLT_MATMUL_DESC_TRANSC = 5,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7, CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE = 10,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER = 11, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD = 12,
    CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE = 13, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE = 22,
    CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
} cublasLtMatmulDescAttributes_t;

typedef enum {
    CUBLASLT_MATRIX_LAYOUT_TYPE = 0, CUBLASLT_MATRIX_LAYOUT_ORDER = 1, CUBLASLT_MATRIX_LAYOUT_ROWS = 2,
    CUBLASLT_MATRIX_LAYOUT_COLS = 3, CUBLASLT_MATRIX_LAYOUT_LD = 4, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT = 5,
    CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET = 6
} cublasLtMatrixLayoutAttribute_t;

typedef enum {
    CUBLASLT_MATMUL_PREF_SEARCH_MODE = 0, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3
} cublasLtMatmulPreferenceAttributes_t;

struct cublasLtContext { int unused; };
typedef cublasLtContext* cublasLtHandle_t;

typedef struct {
    cublasComputeType_t compute_type;
    cudaDataType scale_type;
    int32_t transa, transb;  // cublasOperation_t
    uint32_t epilogue;       // cublasLtEpilogue_t
    void* bias;
    int32_t bias_type;  // cudaDataType, -1 for the type of D
} cublasLtMatmulDescOpaque_t;
typedef cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;

typedef struct {
    cudaDataType type;
    uint64_t rows, cols;
    int64_t ld;
    int32_t batch_count;
    int64_t batch_stride;
} cublasLtMatrixLayoutOpaque_t;
typedef cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;

typedef struct { uint64_t max_workspace_bytes; } cublasLtMatmulPreferenceOpaque_t;
typedef cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;

typedef struct { uint64_t data[8]; } cublasLtMatmulAlgo_t;

typedef struct {
    cublasLtMatmulAlgo_t algo;
    size_t workspaceSize;
    cublasStatus_t state;
    float wavesCount;
    int reserved[4];
} cublasLtMatmulHeuristicResult_t;

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (handle == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    *handle = new cublasLtContext{};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc,
                                               cublasComputeType_t computeType,
                                               cudaDataType scaleType) {
    if (desc == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    *desc = new cublasLtMatmulDescOpaque_t{
        computeType, scaleType, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, NULL, -1};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                                 uint64_t rows, uint64_t cols, int64_t ld) {
    if (layout == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    *layout = new cublasLtMatrixLayoutOpaque_t{type, rows, cols, ld, 1, 0};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
    if (preference == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    *preference = new cublasLtMatmulPreferenceOpaque_t{};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}

namespace cpu {

// one attribute from the caller's buffer. A size other than the attribute's own is the caller's
// mistake.
template <class T> cublasStatus_t set_attribute(T* attribute, const void* buf, size_t bytes) {
    if (buf == NULL || bytes != sizeof(T)) { return CUBLAS_STATUS_INVALID_VALUE; }
    memcpy(attribute, buf, sizeof(T));
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace cpu

inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                                     cublasLtMatmulDescAttributes_t attr,
                                                     const void* buf, size_t sizeInBytes) {
    if (desc == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    switch (attr) {
        case CUBLASLT_MATMUL_DESC_TRANSA: return cpu::set_attribute(&desc->transa, buf, sizeInBytes);
        case CUBLASLT_MATMUL_DESC_TRANSB: return cpu::set_attribute(&desc->transb, buf, sizeInBytes);
        case CUBLASLT_MATMUL_DESC_EPILOGUE: return cpu::set_attribute(&desc->epilogue, buf, sizeInBytes);
        case CUBLASLT_MATMUL_DESC_BIAS_POINTER: return cpu::set_attribute(&desc->bias, buf, sizeInBytes);
        case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: return cpu::set_attribute(&desc->bias_type, buf, sizeInBytes);
        default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

inline cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                       cublasLtMatrixLayoutAttribute_t attr,
                                                       const void* buf, size_t sizeInBytes) {
    if (layout == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    switch (attr) {
        case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: return cpu::set_attribute(&layout->batch_count, buf, sizeInBytes);
        case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET:
            return cpu::set_attribute(&layout->batch_stride, buf, sizeInBytes);
        default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attr,
    const void* buf, size_t sizeInBytes) {
    if (preference == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    switch (attr) {
        case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
            return cpu::set_attribute(&preference->max_workspace_bytes, buf, sizeInBytes);
        default: return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

// ----------------------------------------------------------------------------
// the product

namespace cpu {

// the problem that the descriptors state, without its pointers, or why it is refused
inline cublasStatus_t matmul_problem(const cublasLtMatmulDescOpaque_t* desc,
                                     const cublasLtMatrixLayoutOpaque_t* A,
                                     const cublasLtMatrixLayoutOpaque_t* B,
                                     const cublasLtMatrixLayoutOpaque_t* C,
                                     const cublasLtMatrixLayoutOpaque_t* D, Gemm* p) {
    if (desc == NULL || A == NULL || B == NULL || C == NULL || D == NULL) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (!is_operation((cublasOperation_t)desc->transa) ||
        !is_operation((cublasOperation_t)desc->transb)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    for (auto x : {A, B, C, D}) {
        if (x->rows == 0 || x->cols == 0 || x->ld < (int64_t)x->rows || x->batch_count < 1 ||
            x->batch_count != D->batch_count) {
            return CUBLAS_STATUS_INVALID_VALUE;
        }
        if (x->rows > INT_MAX || x->cols > INT_MAX || x->ld > INT_MAX) {
            return CUBLAS_STATUS_NOT_SUPPORTED;
        }
    }
    bool transa = desc->transa != CUBLAS_OP_N, transb = desc->transb != CUBLAS_OP_N;
    size_t m = D->rows, n = D->cols, k = transa ? A->rows : A->cols;
    if ((transa ? A->cols : A->rows) != m || (transb ? B->cols : B->rows) != k ||
        (transb ? B->rows : B->cols) != n || C->rows != m || C->cols != n) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    p->transa = transa, p->transb = transb;
    p->m = m, p->n = n, p->k = k;
    p->lda = (size_t)A->ld, p->ldb = (size_t)B->ld, p->ldc = (size_t)C->ld, p->ldd = (size_t)D->ld;
    if (desc->scale_type != CUDA_R_32F || C->type != D->type ||
        !gemm_types(A->type, B->type, D->type, desc->compute_type, p)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }

    p->bias_type = p->d_type;
    if (desc->epilogue == CUBLASLT_EPILOGUE_DEFAULT) { return CUBLAS_STATUS_SUCCESS; }
    // a bias or its gradient has the type of D: the exceptions concern 8-bit types
    bool bias_type_of_d = desc->bias_type == -1 || desc->bias_type == D->type;
    bool supported = desc->epilogue == CUBLASLT_EPILOGUE_BIAS;
    if (desc->epilogue == CUBLASLT_EPILOGUE_BGRADA || desc->epilogue == CUBLASLT_EPILOGUE_BGRADB) {
        // a GPU sums only the operand that it reads along its columns (A not transposed, B
        // transposed), and wants leading dimensions that divide by 8; a gradient for each problem
        // of a batch would need a stride, which is not offered
        supported = (desc->epilogue == CUBLASLT_EPILOGUE_BGRADA ? !transa : transb) &&
                    D->batch_count == 1 && p->lda % 8 == 0 && p->ldb % 8 == 0 && p->ldd % 8 == 0;
    }
    return supported && bias_type_of_d ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

}  // namespace cpu

// One algorithm, without workspace; none where the product is not supported, and the status says so
// as on a GPU.
inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t Adesc,
    cublasLtMatrixLayout_t Bdesc, cublasLtMatrixLayout_t Cdesc, cublasLtMatrixLayout_t Ddesc,
    cublasLtMatmulPreference_t preference, int requestedAlgoCount,
    cublasLtMatmulHeuristicResult_t heuristicResultsArray[], int* returnAlgoCount) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    if (preference == NULL || requestedAlgoCount <= 0 || heuristicResultsArray == NULL ||
        returnAlgoCount == NULL) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    cpu::Gemm p = {};
    cublasStatus_t status = cpu::matmul_problem(desc, Adesc, Bdesc, Cdesc, Ddesc, &p);
    *returnAlgoCount = status == CUBLAS_STATUS_SUCCESS ? 1 : 0;
    if (status == CUBLAS_STATUS_SUCCESS) {
        heuristicResultsArray[0] = cublasLtMatmulHeuristicResult_t{};
        heuristicResultsArray[0].state = CUBLAS_STATUS_SUCCESS;
        heuristicResultsArray[0].wavesCount = 1.0f;
    }
    return status;
}

inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                     const void* alpha, const void* A, cublasLtMatrixLayout_t Adesc,
                                     const void* B, cublasLtMatrixLayout_t Bdesc, const void* beta,
                                     const void* C, cublasLtMatrixLayout_t Cdesc, void* D,
                                     cublasLtMatrixLayout_t Ddesc,
                                     const cublasLtMatmulAlgo_t* /*algo*/, void* workspace,
                                     size_t workspaceSizeInBytes, cudaStream_t /*stream*/) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    cpu::Gemm shape = {};
    cublasStatus_t status = cpu::matmul_problem(desc, Adesc, Bdesc, Cdesc, Ddesc, &shape);
    if (status != CUBLAS_STATUS_SUCCESS) { return status; }
    bool has_bias = desc->epilogue != CUBLASLT_EPILOGUE_DEFAULT;
    if (alpha == NULL || beta == NULL || (has_bias && desc->bias == NULL) ||
        (workspace == NULL && workspaceSizeInBytes > 0)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    shape.alpha = *(const float*)alpha, shape.beta = *(const float*)beta;
    // C is D when the addresses are equal, and then it is updated in place; two layouts of one
    // matrix would overlap
    if (C == D && shape.beta != 0.0f &&
        (shape.ldc != shape.ldd || Cdesc->batch_stride != Ddesc->batch_stride)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    auto problem = [=](size_t i) {
        cpu::Gemm p = shape;
        p.a = cpu::element(A, p.a_type, Adesc->batch_stride * (long long)i);
        p.b = cpu::element(B, p.b_type, Bdesc->batch_stride * (long long)i);
        p.c = cpu::element(C, p.d_type, Cdesc->batch_stride * (long long)i);
        p.d = (void*)cpu::element(D, p.d_type, Ddesc->batch_stride * (long long)i);
        p.bias = desc->epilogue == CUBLASLT_EPILOGUE_BIAS ? desc->bias : NULL;
        return p;
    };
    size_t batch = (size_t)Ddesc->batch_count;
    cpu::require_device_operands("cublasLtMatmul", problem(0));
    cpu::require_device_operands("cublasLtMatmul", problem(batch - 1));
    if (has_bias) {
        size_t length = desc->epilogue == CUBLASLT_EPILOGUE_BGRADB ? shape.n : shape.m;
        cpu::require_device("cublasLtMatmul", "the bias", desc->bias,
                            length * cpu::type_bytes(shape.bias_type));
    }
    if (workspaceSizeInBytes > 0) {
        cpu::require_device("cublasLtMatmul", "workspace", workspace, workspaceSizeInBytes);
    }

    cpu::DeviceWork work;
    cpu::gemm(batch, problem);
    // the operand lies column by column with its k along the columns: a sum of columns
    if (desc->epilogue == CUBLASLT_EPILOGUE_BGRADA) {
        cpu::row_sums(desc->bias, shape.bias_type, A, shape.a_type, shape.m, shape.k, shape.lda);
    } else if (desc->epilogue == CUBLASLT_EPILOGUE_BGRADB) {
        cpu::row_sums(desc->bias, shape.bias_type, B, shape.b_type, shape.n, shape.k, shape.ldb);
    }
    return CUBLAS_STATUS_SUCCESS;
}
