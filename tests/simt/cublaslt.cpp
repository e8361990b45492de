// A stand-in for the part of cuBLASLt that an int8 product uses, on the CPU: exact, and as strict as the library is
// documented to be ("regular" ordering of IMMA kernels), so that what a GPU would refuse is refused here.
//
// The environment variable OCTAVO_SIMT_CUBLASLT makes it fail as the real one can:
//   missing        the library is not found
//   no-function    it is, but lacks a function
//   no-handle      no handle can be made for the device
//   no-algorithm   the heuristic finds none
//   refuses        the heuristic finds algorithms, which are then not supported
//   refuses-first  so is the first of them
//   fails          the product fails to start
#include "cublaslt.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>

#include "cublaslt_api.hpp"

namespace lt = octavo::cuda::lt;

// What the opaque types of the interface stand for.
namespace octavo::cuda::lt {
struct HandleTag {
    int device = 0;
};
struct MatmulDescTag {
    int compute = 0;
    int scale = 0;
    std::int32_t transa = as_is;
    std::int32_t transb = as_is;
};
struct LayoutTag {
    int type = 0;
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::int64_t ld = 0;
};
struct PreferenceTag {
    std::uint64_t workspace = 0;
    std::map<int, std::uint32_t> alignment;
};
}  // namespace octavo::cuda::lt

namespace {

constexpr lt::Status not_initialized = 1;
constexpr lt::Status execution_failed = 13;

// Marks the algorithms that the heuristic made.
constexpr std::uint64_t genuine = 0x0C7A40;
constexpr std::size_t workspace_size = 4096;

bool mode_is(std::string_view mode) {
    const char* const text = std::getenv("OCTAVO_SIMT_CUBLASLT");
    return text != nullptr && mode == text;
}

// Whether the documentation promises int8 kernels for this.
lt::Status check_product(lt::MatmulDesc desc, lt::Layout a, lt::Layout b, lt::Layout c, lt::Layout d) {
    if (desc->compute != lt::compute_32i || desc->scale != CUDA_R_32I) return lt::not_supported;
    if (a->type != CUDA_R_8I || b->type != CUDA_R_8I || c->type != CUDA_R_32I || d->type != CUDA_R_32I) {
        return lt::not_supported;
    }
    if (desc->transa != lt::transposed || desc->transb != lt::as_is) return lt::not_supported;
    if (a->rows != b->rows || a->cols != d->rows || b->cols != d->cols) return lt::invalid_value;
    if (c->rows != d->rows || c->cols != d->cols || c->ld != d->ld) return lt::invalid_value;
    for (const lt::Layout layout : {a, b, d}) {
        if (layout->ld < layout->rows || layout->rows == 0 || layout->cols == 0) return lt::invalid_value;
        if (layout->ld % 4 != 0) return lt::not_supported;
    }
    return a->rows % 4 == 0 && d->rows % 4 == 0 ? lt::success : lt::not_supported;
}

// --- functions of the interface -------------------------------------------------------------------------------------

std::size_t get_version() { return 130102; }

const char* get_status_string(lt::Status status) {
    return status == execution_failed ? "the GPU program failed to execute" : "another status";
}

lt::Status create(lt::Handle* handle) {
    if (mode_is("no-handle")) return not_initialized;
    *handle = new lt::HandleTag;
    return cudaGetDevice(&(*handle)->device) == cudaSuccess ? lt::success : not_initialized;
}

lt::Status create_desc(lt::MatmulDesc* desc, int compute, cudaDataType_t scale) {
    *desc = new lt::MatmulDescTag{.compute = compute, .scale = scale};
    return lt::success;
}

lt::Status destroy_desc(lt::MatmulDesc desc) {
    delete desc;
    return lt::success;
}

lt::Status set_desc(lt::MatmulDesc desc, int attribute, const void* value, std::size_t size) {
    std::int32_t* const target = attribute == lt::desc_transa   ? &desc->transa
                                 : attribute == lt::desc_transb ? &desc->transb
                                                                : nullptr;
    if (target == nullptr || size != sizeof *target) return lt::invalid_value;
    std::memcpy(target, value, size);
    return lt::success;
}

lt::Status create_layout(lt::Layout* layout, cudaDataType_t type, std::uint64_t rows, std::uint64_t cols,
                         std::int64_t ld) {
    *layout = new lt::LayoutTag{type, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(cols), ld};
    return lt::success;
}

lt::Status destroy_layout(lt::Layout layout) {
    delete layout;
    return lt::success;
}

lt::Status create_preference(lt::Preference* preference) {
    *preference = new lt::PreferenceTag;
    return lt::success;
}

lt::Status destroy_preference(lt::Preference preference) {
    delete preference;
    return lt::success;
}

lt::Status set_preference(lt::Preference preference, int attribute, const void* value, std::size_t size) {
    if (attribute == lt::preference_workspace_bytes) {
        if (size != sizeof preference->workspace) return lt::invalid_value;
        std::memcpy(&preference->workspace, value, size);
        return lt::success;
    }
    if (attribute < lt::preference_alignment_a || attribute > lt::preference_alignment_d) return lt::invalid_value;
    std::uint32_t alignment = 0;
    if (size != sizeof alignment) return lt::invalid_value;
    std::memcpy(&alignment, value, size);
    preference->alignment[attribute] = alignment;
    return lt::success;
}

lt::Status get_heuristic(lt::Handle /*handle*/, lt::MatmulDesc desc, lt::Layout a, lt::Layout b, lt::Layout c,
                         lt::Layout d, lt::Preference preference, int wanted, lt::Heuristic* results, int* count) {
    *count = 0;
    if (wanted < 1) return lt::invalid_value;
    if (mode_is("no-algorithm")) return lt::not_supported;
    if (const lt::Status status = check_product(desc, a, b, c, d); status != lt::success) return status;
    std::uint64_t least = 256;  // what the library assumes of pointers, unless it is told otherwise
    if (preference->alignment.size() == 4) {
        for (const auto& [operand, alignment] : preference->alignment)
            least = std::min<std::uint64_t>(least, alignment);
    }
    *count = std::min(wanted, 3);
    for (int i = 0; i < *count; ++i) {
        results[i] = {};
        results[i].algorithm.data[0] = genuine;
        results[i].algorithm.data[1] = least;
        results[i].algorithm.data[2] = static_cast<std::uint64_t>(i);
        results[i].workspace = std::min<std::uint64_t>(workspace_size, preference->workspace);
        results[i].waves = 1;
    }
    return lt::success;
}

lt::Status matmul(lt::Handle handle, lt::MatmulDesc desc, const void* alpha, const void* a, lt::Layout a_layout,
                  const void* b, lt::Layout b_layout, const void* beta, const void* c, lt::Layout c_layout, void* d,
                  lt::Layout d_layout, const lt::Algorithm* algorithm, void* workspace, std::size_t size,
                  cudaStream_t stream) {
    int device = -1;
    if (cudaGetDevice(&device) != cudaSuccess || device != handle->device) return lt::invalid_value;
    if (mode_is("refuses")) return lt::not_supported;
    if (mode_is("fails")) return execution_failed;
    if (const lt::Status status = check_product(desc, a_layout, b_layout, c_layout, d_layout); status != lt::success) {
        return status;
    }
    if (algorithm == nullptr || algorithm->data[0] != genuine) return lt::invalid_value;
    if (mode_is("refuses-first") && algorithm->data[2] == 0) return lt::not_supported;
    for (const void* const pointer : {a, b, c, static_cast<const void*>(d)}) {
        if (reinterpret_cast<std::uintptr_t>(pointer) % algorithm->data[1] != 0) return lt::not_supported;
    }
    if (workspace == nullptr || size < workspace_size || reinterpret_cast<std::uintptr_t>(workspace) % 256 != 0) {
        return lt::invalid_value;
    }
    std::int32_t factor = 0;
    std::int32_t kept = 0;
    std::memcpy(&factor, alpha, sizeof factor);
    std::memcpy(&kept, beta, sizeof kept);
    if (factor != 1 || kept != 0) return lt::not_supported;  // scale type 32I: 0 or 1; others than these are not used

    // Done in the order of the stream, as often as a graph is launched.
    const auto work = [a, b, d, workspace, from_a = *a_layout, from_b = *b_layout, to = *d_layout] {
        std::memset(workspace, 0xA5, workspace_size);
        const auto* const codes_a = static_cast<const std::int8_t*>(a);
        const auto* const codes_b = static_cast<const std::int8_t*>(b);
        for (std::int64_t col = 0; col < to.cols; ++col) {
            for (std::int64_t row = 0; row < to.rows; ++row) {
                std::int32_t sum = 0;
                for (std::int64_t h = 0; h < from_a.rows; ++h) {
                    sum += codes_a[row * from_a.ld + h] * codes_b[col * from_b.ld + h];
                }
                static_cast<std::int32_t*>(d)[col * to.ld + row] = sum;
            }
        }
    };
    static std::mutex mutex;
    static std::deque<std::function<void()>> all;  // kept: a graph that holds one may be launched at any time
    const std::scoped_lock lock(mutex);
    all.emplace_back(work);
    const cudaError_t status =
        cudaLaunchHostFunc(stream, [](void* one) { (*static_cast<std::function<void()>*>(one))(); }, &all.back());
    return status == cudaSuccess ? lt::success : execution_failed;
}

template <class Function>
void* address_of(Function* function) {
    return reinterpret_cast<void*>(function);
}

}  // namespace

bool simt::has_cublaslt() { return !mode_is("missing"); }

void* simt::cublaslt_symbol(const char* name) {
    const std::map<std::string, void*> functions = {
        {"cublasLtGetVersion", address_of(get_version)},
        {"cublasLtGetStatusString", address_of(get_status_string)},
        {"cublasLtCreate", address_of(create)},
        {"cublasLtMatmulDescCreate", address_of(create_desc)},
        {"cublasLtMatmulDescDestroy", address_of(destroy_desc)},
        {"cublasLtMatmulDescSetAttribute", address_of(set_desc)},
        {"cublasLtMatrixLayoutCreate", address_of(create_layout)},
        {"cublasLtMatrixLayoutDestroy", address_of(destroy_layout)},
        {"cublasLtMatmulPreferenceCreate", address_of(create_preference)},
        {"cublasLtMatmulPreferenceDestroy", address_of(destroy_preference)},
        {"cublasLtMatmulPreferenceSetAttribute", address_of(set_preference)},
        {"cublasLtMatmulAlgoGetHeuristic", address_of(get_heuristic)},
        {"cublasLtMatmul", address_of(matmul)},
    };
    if (mode_is("no-function") && name == std::string_view("cublasLtMatmul")) return nullptr;
    const auto found = functions.find(name);
    return found == functions.end() ? nullptr : found->second;
}
