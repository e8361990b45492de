#include "gemm_cublaslt.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <compare>
#include <cstdint>
#include <limits>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "cublaslt_api.hpp"
#include "memory.hpp"
#include "octavo/error.hpp"

#ifdef OCTAVO_SIMT
#include "cublaslt.hpp"
#endif

namespace octavo::cuda {
namespace {

// What pointers are multiples of. No int8 kernel reads or writes more at a time, so better aligned ones gain nothing.
constexpr std::int64_t alignment = 16;

// --- the library ----------------------------------------------------------------------------------------------------

struct Library {
    lt::Functions functions{};
    bool found = false;
    std::string status;
};

#ifdef OCTAVO_SIMT

void* open_library(std::string& error) {
    if (simt::has_cublaslt()) return &error;  // any that is not null
    error = "none for the emulated GPU";
    return nullptr;
}

void* find_symbol(void* /*library*/, const char* name) { return simt::cublaslt_symbol(name); }

#else

// The folder of the shared object that this code is in.
std::string own_folder() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || info.dli_fname == nullptr) return ".";
    const std::string path = info.dli_fname;
    const std::size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

// In this order: the copy that the process has (PyTorch's), one that the loader finds (our RUNPATH, the system's), one
// of NVIDIA's packages beside octavo's. That of the CUDA which this is built with comes first: a newer one may need a
// newer driver.
void* open_library(std::string& error) {
    constexpr int flags = RTLD_LAZY | RTLD_LOCAL;
    struct Version {
        const char* name;
        const char* package;  // its folder
    };
    std::array versions = {Version{"libcublasLt.so.13", "cu13/lib/"}, Version{"libcublasLt.so.12", "cublas/lib/"}};
    if constexpr (CUDART_VERSION < 13000) std::swap(versions[0], versions[1]);
    for (const Version& version : versions) {
        if (void* const library = dlopen(version.name, flags | RTLD_NOLOAD)) return library;
    }
    std::vector<std::string> paths;
    for (const Version& version : versions) {
        paths.emplace_back(version.name);
        paths.push_back(own_folder() + "/../nvidia/" + version.package + version.name);
    }
    for (const std::string& path : paths) {
        if (void* const library = dlopen(path.c_str(), flags)) return library;
        const char* const why = dlerror();
        if (error.empty() && why != nullptr) error = why;
    }
    return nullptr;
}

void* find_symbol(void* library, const char* name) { return dlsym(library, name); }

#endif

Library load() {
    Library result;
    std::string error;
    void* const library = open_library(error);
    if (library == nullptr) {
        result.status = "not found (" + error + ")";
        return result;
    }
    std::string missing;
    const auto get = [&]<class Function>(Function*& function, const char* name) {
        void* const symbol = find_symbol(library, name);
        if (symbol == nullptr && missing.empty()) missing = name;
        function = reinterpret_cast<Function*>(symbol);
    };
    lt::Functions& f = result.functions;
    get(f.GetVersion, "cublasLtGetVersion");
    get(f.GetStatusString, "cublasLtGetStatusString");
    get(f.Create, "cublasLtCreate");
    get(f.MatmulDescCreate, "cublasLtMatmulDescCreate");
    get(f.MatmulDescDestroy, "cublasLtMatmulDescDestroy");
    get(f.MatmulDescSetAttribute, "cublasLtMatmulDescSetAttribute");
    get(f.MatrixLayoutCreate, "cublasLtMatrixLayoutCreate");
    get(f.MatrixLayoutDestroy, "cublasLtMatrixLayoutDestroy");
    get(f.MatmulPreferenceCreate, "cublasLtMatmulPreferenceCreate");
    get(f.MatmulPreferenceDestroy, "cublasLtMatmulPreferenceDestroy");
    get(f.MatmulPreferenceSetAttribute, "cublasLtMatmulPreferenceSetAttribute");
    get(f.MatmulAlgoGetHeuristic, "cublasLtMatmulAlgoGetHeuristic");
    get(f.Matmul, "cublasLtMatmul");
    if (!missing.empty()) {
        result.status = "unusable (no function " + missing + ")";
        return result;
    }
    const std::size_t version = f.GetVersion();  // 130102 is 13.1.2
    result.status = std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
                    std::to_string(version % 100);
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(f.Matmul), &info) != 0 && info.dli_fname != nullptr) {
        result.status += std::string(" (") + info.dli_fname + ")";
    }
    result.found = true;
    return result;
}

// Never closed: descriptors in static storage may outlive anything.
const Library& library() {
    static const Library& result = *new Library(load());
    return result;
}

void check_lt(lt::Status status, const char* call) {
    if (status == lt::success) return;
    throw Error(ErrorKind::device, std::string("CUDA: ") + call + ": status " + std::to_string(status) + " (" +
                                       library().functions.GetStatusString(status) + ")");
}

// --- descriptors ----------------------------------------------------------------------------------------------------

struct DestroyDesc {
    void operator()(lt::MatmulDesc desc) const { library().functions.MatmulDescDestroy(desc); }
};
struct DestroyLayout {
    void operator()(lt::Layout layout) const { library().functions.MatrixLayoutDestroy(layout); }
};
struct DestroyPreference {
    void operator()(lt::Preference preference) const { library().functions.MatmulPreferenceDestroy(preference); }
};
template <class Pointer, class Destroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy>;
using Desc = Owned<lt::MatmulDesc, DestroyDesc>;
using Layout = Owned<lt::Layout, DestroyLayout>;
using Preference = Owned<lt::Preference, DestroyPreference>;

Desc make_desc() {
    const lt::Functions& f = library().functions;
    lt::MatmulDesc created = nullptr;
    check_lt(f.MatmulDescCreate(&created, lt::compute_32i, CUDA_R_32I), "cublasLtMatmulDescCreate");
    Desc desc(created);
    const auto set = [&](int attribute, std::int32_t value) {
        check_lt(f.MatmulDescSetAttribute(desc.get(), attribute, &value, sizeof value),
                 "cublasLtMatmulDescSetAttribute");
    };
    set(lt::desc_transa, lt::transposed);
    set(lt::desc_transb, lt::as_is);
    return desc;
}

Layout make_layout(cudaDataType_t type, std::int64_t rows, std::int64_t cols, std::int64_t ld) {
    lt::Layout created = nullptr;
    check_lt(library().functions.MatrixLayoutCreate(&created, type, static_cast<std::uint64_t>(rows),
                                                    static_cast<std::uint64_t>(cols), ld),
             "cublasLtMatrixLayoutCreate");
    return Layout(created);
}

Preference make_preference(std::uint64_t workspace) {
    const lt::Functions& f = library().functions;
    lt::Preference created = nullptr;
    check_lt(f.MatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate");
    Preference preference(created);
    const auto set = [&](int attribute, const auto& value) {
        check_lt(f.MatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value),
                 "cublasLtMatmulPreferenceSetAttribute");
    };
    set(lt::preference_workspace_bytes, workspace);
    for (const int operand : {lt::preference_alignment_a, lt::preference_alignment_b, lt::preference_alignment_c,
                              lt::preference_alignment_d}) {
        set(operand, static_cast<std::uint32_t>(alignment));
    }
    return preference;
}

// --- plans ----------------------------------------------------------------------------------------------------------

// What a plan depends on, in row-major terms. (Pointers do not matter: all are known to be aligned alike.)
struct Key {
    int device = 0;
    std::int64_t m = 0;
    std::int64_t n = 0;
    std::int64_t k = 0;
    std::int64_t stride_a = 0;
    std::int64_t stride_b = 0;
    std::int64_t stride_out = 0;
    friend auto operator<=>(const Key&, const Key&) = default;
};

// How to multiply: the row-major out = a b^T is, in cuBLASLt's column-major words, out^T = b a^T, with b^T and a^T as
// they lie.
struct Plan {
    Desc desc;
    Layout a;  // of what cuBLASLt calls so: our b
    Layout b;
    Layout out;
    std::vector<lt::Heuristic> algorithms;        // best first
    mutable std::atomic<std::size_t> refused{0};  // so many of them, the first: not tried again
};

constexpr int most_algorithms = 8;

std::uint64_t most_workspace() {
    constexpr std::uint64_t mib = std::uint64_t{1} << 20;
    return device_facts().architecture >= 90 ? 32 * mib : 8 * mib;
}

std::shared_ptr<const Plan> make_plan(lt::Handle handle, const Key& key) {
    auto plan = std::make_shared<Plan>();
    plan->desc = make_desc();
    plan->a = make_layout(CUDA_R_8I, key.k, key.n, key.stride_b);
    plan->b = make_layout(CUDA_R_8I, key.k, key.m, key.stride_a);
    plan->out = make_layout(CUDA_R_32I, key.n, key.m, key.stride_out);
    const Preference preference = make_preference(most_workspace());
    plan->algorithms.resize(most_algorithms);
    int count = 0;
    const lt::Status status = library().functions.MatmulAlgoGetHeuristic(
        handle, plan->desc.get(), plan->a.get(), plan->b.get(), plan->out.get(), plan->out.get(), preference.get(),
        most_algorithms, plan->algorithms.data(), &count);
    if (status != lt::success && status != lt::not_supported && status != lt::invalid_value &&
        status != lt::arch_mismatch) {
        check_lt(status, "cublasLtMatmulAlgoGetHeuristic");
    }
    plan->algorithms.resize(status == lt::success ? static_cast<std::size_t>(std::clamp(count, 0, most_algorithms))
                                                  : 0);
    std::erase_if(plan->algorithms, [](const lt::Heuristic& found) { return found.state != lt::success; });
    return plan;
}

// The plans made last. A model has few shapes of W; m, the number of tokens, can be any.
class Plans {
public:
    std::shared_ptr<const Plan> of(lt::Handle handle, const Key& key) {
        const std::scoped_lock lock(mutex_);
        if (const auto found = places_.find(key); found != places_.end()) {
            plans_.splice(plans_.begin(), plans_, found->second);
            return found->second->second;
        }
        plans_.emplace_front(key, make_plan(handle, key));
        places_[key] = plans_.begin();
        if (plans_.size() > most) {
            places_.erase(plans_.back().first);
            plans_.pop_back();
        }
        return plans_.front().second;
    }

private:
    static constexpr std::size_t most = 4096;
    using Entries = std::list<std::pair<Key, std::shared_ptr<const Plan>>>;
    std::mutex mutex_;
    Entries plans_;  // the one used last in front
    std::map<Key, Entries::iterator> places_;
};

// A handle for each device, null where the library refuses to make one. Never destroyed: the driver may be gone by
// then.
struct DeviceHandle {
    std::once_flag once;
    lt::Handle handle = nullptr;
    std::atomic<lt::Status> status{lt::success};  // of making it; success where that was not tried
};

std::array<DeviceHandle, most_devices>& handles() {
    static std::array<DeviceHandle, most_devices>& all = *new std::array<DeviceHandle, most_devices>;
    return all;
}

lt::Handle handle_of(int device) {
    DeviceHandle& entry = handles().at(static_cast<std::size_t>(device));
    std::call_once(entry.once, [&] {
        entry.status = library().functions.Create(&entry.handle);
        if (entry.status != lt::success) entry.handle = nullptr;
    });
    return entry.handle;
}

bool takes_operand(const ConstMatrix& matrix) {
    return (matrix.col_stride == 1 || matrix.cols == 1) && (matrix.rows == 1 || matrix.row_stride >= matrix.cols) &&
           (matrix.rows == 1 || matrix.row_stride % 4 == 0) &&
           reinterpret_cast<std::uintptr_t>(matrix.data) % static_cast<std::uintptr_t>(alignment) == 0;
}

// The distance of rows; that of a single row does not matter, but must be a possible one.
std::int64_t leading_dimension(const ConstMatrix& matrix) { return matrix.rows == 1 ? matrix.cols : matrix.row_stride; }

}  // namespace

bool cublaslt_takes(const ConstMatrix& a, const ConstMatrix& b, const Matrix& out) {
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    return a.cols > 0 && a.cols % 4 == 0 && out.cols % 4 == 0 && out.rows <= most && out.cols <= most &&
           a.cols <= most && takes_operand(a) && takes_operand(b) && takes_operand(out);
}

bool cublaslt_multiply(const ConstMatrix& a, const ConstMatrix& b, const Matrix& out, cudaStream_t stream) {
    const Library& found = library();
    if (!found.found) return false;
    const int device = current_device();
    const lt::Handle handle = handle_of(device);
    if (handle == nullptr) return false;
    static Plans& plans = *new Plans;
    const auto plan = plans.of(handle, {device, out.rows, out.cols, a.cols, leading_dimension(a), leading_dimension(b),
                                        leading_dimension(out)});
    for (std::size_t i = plan->refused; i < plan->algorithms.size(); ++i) {
        const lt::Heuristic& chosen = plan->algorithms[i];
        Workspace workspace(stream);
        const auto scratch = workspace.reserve<std::byte>(static_cast<std::int64_t>(chosen.workspace));
        workspace.allocate();
        const std::int32_t one = 1;
        const std::int32_t zero = 0;
        const lt::Status status =
            found.functions.Matmul(handle, plan->desc.get(), &one, b.data, plan->a.get(), a.data, plan->b.get(), &zero,
                                   out.data, plan->out.get(), out.data, plan->out.get(), &chosen.algorithm,
                                   chosen.workspace > 0 ? workspace.at(scratch) : nullptr, chosen.workspace, stream);
        if (status == lt::not_supported || status == lt::invalid_value || status == lt::arch_mismatch) {
            plan->refused = i + 1;  // the heuristic was wrong; another thread may find the same
            continue;
        }
        check_lt(status, "cublasLtMatmul");
        return true;
    }
    return false;
}

std::string cublaslt_status() {
    const Library& found = library();
    std::string text = found.status;
    for (std::size_t device = 0; device < handles().size(); ++device) {
        const lt::Status status = handles()[device].status;
        if (status == lt::success) continue;
        text += "; no handle for device " + std::to_string(device) + ": status " + std::to_string(status) + " (" +
                found.functions.GetStatusString(status) + ")";
    }
    return text;
}

}  // namespace octavo::cuda
