// The part of cuBLASLt's C interface that gemm_cublaslt.cpp uses, so that building needs none of the 400 MB of the
// library. The same in cuBLASLt 12 and 13; tests/simt/test_cublaslt_api.cpp compares it with cublasLt.h where there is
// one.
#pragma once

#include <cuda_runtime_api.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace octavo::cuda::lt {

using Status = int;  // cublasStatus_t
inline constexpr Status success = 0;
inline constexpr Status invalid_value = 7;
inline constexpr Status arch_mismatch = 8;
inline constexpr Status not_supported = 15;

inline constexpr int compute_32i = 72;  // CUBLAS_COMPUTE_32I

// cublasOperation_t
inline constexpr std::int32_t as_is = 0;
inline constexpr std::int32_t transposed = 1;

// cublasLtMatmulDescAttributes_t
inline constexpr int desc_transa = 3;
inline constexpr int desc_transb = 4;

// cublasLtMatmulPreferenceAttributes_t
inline constexpr int preference_workspace_bytes = 1;
inline constexpr int preference_alignment_a = 5;
inline constexpr int preference_alignment_b = 6;
inline constexpr int preference_alignment_c = 7;
inline constexpr int preference_alignment_d = 8;

using Handle = struct HandleTag*;          // cublasLtHandle_t
using MatmulDesc = struct MatmulDescTag*;  // cublasLtMatmulDesc_t
using Layout = struct LayoutTag*;          // cublasLtMatrixLayout_t
using Preference = struct PreferenceTag*;  // cublasLtMatmulPreference_t

// cublasLtMatmulAlgo_t
struct Algorithm {
    std::uint64_t data[8];
};

// cublasLtMatmulHeuristicResult_t
struct Heuristic {
    Algorithm algorithm;
    std::size_t workspace;
    Status state;
    float waves;
    int reserved[4];
};

// The functions, under their names without `cublasLt`.
struct Functions {
    std::size_t (*GetVersion)();
    const char* (*GetStatusString)(Status);
    Status (*Create)(Handle*);
    Status (*MatmulDescCreate)(MatmulDesc*, int compute, cudaDataType_t scale);
    Status (*MatmulDescDestroy)(MatmulDesc);
    Status (*MatmulDescSetAttribute)(MatmulDesc, int attribute, const void* value, std::size_t size);
    Status (*MatrixLayoutCreate)(Layout*, cudaDataType_t type, std::uint64_t rows, std::uint64_t cols, std::int64_t ld);
    Status (*MatrixLayoutDestroy)(Layout);
    Status (*MatmulPreferenceCreate)(Preference*);
    Status (*MatmulPreferenceDestroy)(Preference);
    Status (*MatmulPreferenceSetAttribute)(Preference, int attribute, const void* value, std::size_t size);
    Status (*MatmulAlgoGetHeuristic)(Handle, MatmulDesc, Layout a, Layout b, Layout c, Layout d, Preference, int wanted,
                                     Heuristic* results, int* count);
    Status (*Matmul)(Handle, MatmulDesc, const void* alpha, const void* a, Layout, const void* b, Layout,
                     const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace,
                     std::size_t workspace_size, cudaStream_t);
};

}  // namespace octavo::cuda::lt
