// cuda/cublaslt_api.hpp against NVIDIA's own header: built where there is one, and nothing but this is to be run.
#include <cublasLt.h>

#include <cstddef>
#include <type_traits>

#include "cublaslt_api.hpp"

namespace lt = octavo::cuda::lt;

static_assert(sizeof(lt::Status) == sizeof(cublasStatus_t));
static_assert(lt::success == CUBLAS_STATUS_SUCCESS);
static_assert(lt::invalid_value == CUBLAS_STATUS_INVALID_VALUE);
static_assert(lt::arch_mismatch == CUBLAS_STATUS_ARCH_MISMATCH);
static_assert(lt::not_supported == CUBLAS_STATUS_NOT_SUPPORTED);
static_assert(lt::compute_32i == CUBLAS_COMPUTE_32I);
static_assert(lt::as_is == CUBLAS_OP_N && lt::transposed == CUBLAS_OP_T);
static_assert(sizeof(lt::transposed) == sizeof(cublasOperation_t));
static_assert(lt::desc_transa == CUBLASLT_MATMUL_DESC_TRANSA && lt::desc_transb == CUBLASLT_MATMUL_DESC_TRANSB);
static_assert(lt::preference_workspace_bytes == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(lt::preference_alignment_a == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(lt::preference_alignment_b == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(lt::preference_alignment_c == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
static_assert(lt::preference_alignment_d == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);

static_assert(sizeof(lt::Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(lt::Heuristic) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(lt::Heuristic, workspace) == offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize));
static_assert(offsetof(lt::Heuristic, state) == offsetof(cublasLtMatmulHeuristicResult_t, state));
static_assert(offsetof(lt::Heuristic, waves) == offsetof(cublasLtMatmulHeuristicResult_t, wavesCount));

// Functions are alike where they take as many arguments, of which each is passed alike: pointers as pointers (to
// whatever), numbers of the same size as numbers.
template <class A, class B>
constexpr bool passed_alike =
    sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B> &&
    std::is_floating_point_v<A> == std::is_floating_point_v<B> && std::is_class_v<A> == std::is_class_v<B>;

template <class Ours, class Theirs>
struct Alike;
template <class Result, class... Ours, class Other, class... Theirs>
struct Alike<Result (*)(Ours...), Other (*)(Theirs...)> {
    static constexpr bool value = [] {
        if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
            return passed_alike<Result, Other> && (passed_alike<Ours, Theirs> && ...);
        } else {
            return false;
        }
    }();
};

#define ALIKE(name) static_assert(Alike<decltype(lt::Functions::name), decltype(&cublasLt##name)>::value)
ALIKE(GetVersion);
ALIKE(GetStatusString);
ALIKE(Create);
ALIKE(MatmulDescCreate);
ALIKE(MatmulDescDestroy);
ALIKE(MatmulDescSetAttribute);
ALIKE(MatrixLayoutCreate);
ALIKE(MatrixLayoutDestroy);
ALIKE(MatmulPreferenceCreate);
ALIKE(MatmulPreferenceDestroy);
ALIKE(MatmulPreferenceSetAttribute);
ALIKE(MatmulAlgoGetHeuristic);
ALIKE(Matmul);

int main() { return 0; }
