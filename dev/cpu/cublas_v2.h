/*
cuBLAS on the CPU: handles, and the matrix products that the trainers call, on top of blas.h.

Enumerators, signatures and error codes are those of CUDA 13; what is absent here fails to compile.
Sums are FP32, alpha and beta lie on the host. FP32 inputs give an FP32 output, BF16 inputs a BF16
or FP32 output; every other combination returns CUBLAS_STATUS_NOT_SUPPORTED. TF32 is accepted and
computes in full FP32. A matrix that is not in device memory ends the program: a GPU would fault.
*/
#pragma once

#include <stddef.h>

#include "cuda_runtime.h"
#include "blas.h"

// ----------------------------------------------------------------------------
// enumerations

typedef enum {
    CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1, CUBLAS_STATUS_ALLOC_FAILED = 3,
    CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_ARCH_MISMATCH = 8, CUBLAS_STATUS_MAPPING_ERROR = 11,
    CUBLAS_STATUS_EXECUTION_FAILED = 13, CUBLAS_STATUS_INTERNAL_ERROR = 14, CUBLAS_STATUS_NOT_SUPPORTED = 15,
    CUBLAS_STATUS_LICENSE_ERROR = 16
} cublasStatus_t;

typedef enum { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1, CUBLAS_OP_C = 2 } cublasOperation_t;

typedef enum { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 } cublasGemmAlgo_t;

typedef enum {
    CUBLAS_DEFAULT_MATH = 0, CUBLAS_TENSOR_OP_MATH = 1, CUBLAS_PEDANTIC_MATH = 2, CUBLAS_TF32_TENSOR_OP_MATH = 3,
    CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
} cublasMath_t;

typedef enum {
    CUBLAS_COMPUTE_16F = 64, CUBLAS_COMPUTE_16F_PEDANTIC = 65,
    CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_64F = 70, CUBLAS_COMPUTE_64F_PEDANTIC = 71,
    CUBLAS_COMPUTE_32I = 72, CUBLAS_COMPUTE_32I_PEDANTIC = 73,
    CUBLAS_COMPUTE_32F_FAST_16F = 74, CUBLAS_COMPUTE_32F_FAST_16BF = 75, CUBLAS_COMPUTE_32F_FAST_TF32 = 77
} cublasComputeType_t;

inline const char* cublasGetStatusString(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
        case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_ARCH_MISMATCH: return "CUBLAS_STATUS_ARCH_MISMATCH";
        case CUBLAS_STATUS_MAPPING_ERROR: return "CUBLAS_STATUS_MAPPING_ERROR";
        case CUBLAS_STATUS_EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_INTERNAL_ERROR: return "CUBLAS_STATUS_INTERNAL_ERROR";
        case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
        case CUBLAS_STATUS_LICENSE_ERROR: return "CUBLAS_STATUS_LICENSE_ERROR";
    }
    return "<unknown cuBLAS status>";
}

// ----------------------------------------------------------------------------
// handle

struct cublasContext { cudaStream_t stream; };
typedef cublasContext* cublasHandle_t;

inline cublasStatus_t cublasCreate(cublasHandle_t* handle) {
    if (handle == NULL) { return CUBLAS_STATUS_INVALID_VALUE; }
    *handle = new cublasContext{};
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}

// The workspace is not needed here, but a wrong one is an error on the GPU too.
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t handle, void* workspace, size_t bytes) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    if ((workspace == NULL && bytes > 0) || (uintptr_t)workspace % 256 != 0) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (bytes > 0) { cpu::require_device("cublasSetWorkspace", "workspace", workspace, bytes); }
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    int base = mode & ~CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    return base <= CUBLAS_TF32_TENSOR_OP_MATH ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

// ----------------------------------------------------------------------------
// what the products have in common

namespace cpu {

inline size_t type_bytes(MatrixType type) {
    return type == FLOAT32 ? sizeof(float) : sizeof(uint16_t);
}

// element `offset` of an array of this type
inline const void* element(const void* p, MatrixType type, long long offset) {
    return (const char*)p + offset * (long long)type_bytes(type);
}

inline bool is_operation(cublasOperation_t op) {
    return op == CUBLAS_OP_N || op == CUBLAS_OP_T || op == CUBLAS_OP_C;
}

// false for types that are not computed here, or not by cuBLAS
inline bool gemm_types(cudaDataType a, cudaDataType b, cudaDataType d, cublasComputeType_t compute,
                       Gemm* p) {
    bool fp32 = a == CUDA_R_32F && b == CUDA_R_32F && d == CUDA_R_32F;
    bool bf16 = a == CUDA_R_16BF && b == CUDA_R_16BF && (d == CUDA_R_16BF || d == CUDA_R_32F);
    bool plain = compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC;
    bool fast = compute == CUBLAS_COMPUTE_32F_FAST_TF32 || compute == CUBLAS_COMPUTE_32F_FAST_16F ||
                compute == CUBLAS_COMPUTE_32F_FAST_16BF;
    p->a_type = p->b_type = fp32 ? FLOAT32 : BFLOAT16;
    p->d_type = d == CUDA_R_32F ? FLOAT32 : BFLOAT16;
    return (fp32 && (plain || fast)) || (bf16 && plain);
}

inline void require_device_matrix(const char* call, const char* argument, const void* p,
                                  MatrixType type, size_t rows, size_t cols, size_t ld) {
    require_device(call, argument, p, ((cols - 1) * ld + rows) * type_bytes(type));
}

// the matrices that the product reads or writes, from the first to the last element
inline void require_device_operands(const char* call, const Gemm& p) {
    if (!without_product(p)) {
        require_device_matrix(call, "A", p.a, p.a_type, p.transa ? p.k : p.m, p.transa ? p.m : p.k,
                              p.lda);
        require_device_matrix(call, "B", p.b, p.b_type, p.transb ? p.n : p.k, p.transb ? p.k : p.n,
                              p.ldb);
    }
    if (p.beta != 0.0f && p.c != p.d) {
        require_device_matrix(call, "C", p.c, p.d_type, p.m, p.n, p.ldc);
    }
    require_device_matrix(call, "the output", p.d, p.d_type, p.m, p.n, p.ldd);
}

// the arguments that cublasSgemm and the three below share, checked as cuBLAS does and put into p
inline cublasStatus_t gemm_arguments(cublasHandle_t handle, cublasOperation_t transa,
                                     cublasOperation_t transb, int m, int n, int k,
                                     const void* alpha, int lda, int ldb, const void* beta, int ldc,
                                     int batch, Gemm* p) {
    if (handle == NULL) { return CUBLAS_STATUS_NOT_INITIALIZED; }
    if (!is_operation(transa) || !is_operation(transb) || m < 0 || n < 0 || k < 0 || batch < 0 ||
        lda < std::max(1, transa == CUBLAS_OP_N ? m : k) ||
        ldb < std::max(1, transb == CUBLAS_OP_N ? k : n) || ldc < std::max(1, m) || alpha == NULL ||
        beta == NULL) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    p->transa = transa != CUBLAS_OP_N, p->transb = transb != CUBLAS_OP_N;
    p->m = (size_t)m, p->n = (size_t)n, p->k = (size_t)k;
    p->alpha = *(const float*)alpha, p->beta = *(const float*)beta;
    p->lda = (size_t)lda, p->ldb = (size_t)ldb, p->ldc = p->ldd = (size_t)ldc;
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace cpu

// ----------------------------------------------------------------------------
// products: C (m, n) = alpha * op(A) (m, k) @ op(B) (k, n) + beta * C, column-major

inline cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n, int k,
    const void* alpha, const void* A, cudaDataType Atype, int lda, long long int strideA,
    const void* B, cudaDataType Btype, int ldb, long long int strideB, const void* beta, void* C,
    cudaDataType Ctype, int ldc, long long int strideC, int batchCount,
    cublasComputeType_t computeType, cublasGemmAlgo_t /*algo*/) {
    cpu::Gemm shape = {};
    cublasStatus_t status = cpu::gemm_arguments(handle, transa, transb, m, n, k, alpha, lda, ldb,
                                                beta, ldc, batchCount, &shape);
    if (status != CUBLAS_STATUS_SUCCESS) { return status; }
    if (!cpu::gemm_types(Atype, Btype, Ctype, computeType, &shape)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (m == 0 || n == 0 || batchCount == 0) { return CUBLAS_STATUS_SUCCESS; }
    auto problem = [=](size_t i) {
        cpu::Gemm p = shape;
        p.a = cpu::element(A, p.a_type, strideA * (long long)i);
        p.b = cpu::element(B, p.b_type, strideB * (long long)i);
        p.c = p.d = (void*)cpu::element(C, p.d_type, strideC * (long long)i);
        return p;
    };
    cpu::DeviceWork work;
    cpu::require_device_operands("cuBLAS", problem(0));
    cpu::require_device_operands("cuBLAS", problem((size_t)batchCount - 1));
    cpu::gemm((size_t)batchCount, problem);
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasGemmBatchedEx(cublasHandle_t handle, cublasOperation_t transa,
                                          cublasOperation_t transb, int m, int n, int k,
                                          const void* alpha, const void* const Aarray[],
                                          cudaDataType Atype, int lda, const void* const Barray[],
                                          cudaDataType Btype, int ldb, const void* beta,
                                          void* const Carray[], cudaDataType Ctype, int ldc,
                                          int batchCount, cublasComputeType_t computeType,
                                          cublasGemmAlgo_t /*algo*/) {
    cpu::Gemm shape = {};
    cublasStatus_t status = cpu::gemm_arguments(handle, transa, transb, m, n, k, alpha, lda, ldb,
                                                beta, ldc, batchCount, &shape);
    if (status != CUBLAS_STATUS_SUCCESS) { return status; }
    if (!cpu::gemm_types(Atype, Btype, Ctype, computeType, &shape)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    if (m == 0 || n == 0 || batchCount == 0) { return CUBLAS_STATUS_SUCCESS; }
    const size_t array_bytes = (size_t)batchCount * sizeof(void*);
    cpu::require_device("cublasGemmBatchedEx", "Aarray", Aarray, array_bytes);
    cpu::require_device("cublasGemmBatchedEx", "Barray", Barray, array_bytes);
    cpu::require_device("cublasGemmBatchedEx", "Carray", Carray, array_bytes);
    auto problem = [=](size_t i) {
        cpu::Gemm p = shape;
        p.a = Aarray[i];
        p.b = Barray[i];
        p.c = p.d = Carray[i];
        return p;
    };
    cpu::DeviceWork work; // the arrays of pointers lie in device memory, too
    for (int i = 0; i < batchCount; i++) {
        cpu::require_device_operands("cublasGemmBatchedEx", problem((size_t)i));
    }
    cpu::gemm((size_t)batchCount, problem);
    return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa,
                                   cublasOperation_t transb, int m, int n, int k, const void* alpha,
                                   const void* A, cudaDataType Atype, int lda, const void* B,
                                   cudaDataType Btype, int ldb, const void* beta, void* C,
                                   cudaDataType Ctype, int ldc, cublasComputeType_t computeType,
                                   cublasGemmAlgo_t algo) {
    return cublasGemmStridedBatchedEx(handle, transa, transb, m, n, k, alpha, A, Atype, lda, 0, B,
                                      Btype, ldb, 0, beta, C, Ctype, ldc, 0, 1, computeType, algo);
}

inline cublasStatus_t cublasSgemm(cublasHandle_t handle, cublasOperation_t transa,
                                  cublasOperation_t transb, int m, int n, int k, const float* alpha,
                                  const float* A, int lda, const float* B, int ldb,
                                  const float* beta, float* C, int ldc) {
    return cublasGemmEx(handle, transa, transb, m, n, k, alpha, A, CUDA_R_32F, lda, B, CUDA_R_32F,
                        ldb, beta, C, CUDA_R_32F, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}
