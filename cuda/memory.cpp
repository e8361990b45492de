#include "memory.hpp"

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <string>
#include <string_view>

#include "check.hpp"
#include "octavo/error.hpp"
#include "operations.hpp"

#ifdef OCTAVO_SIMT
extern "C" {
int cuCtxGetCurrent(void** context);
int cuCtxSetCurrent(void* context);
}
#endif

namespace octavo::cuda {
namespace {

constexpr int oldest_architecture = 75;

// What is kept per device, made at its first use and, as the driver may be gone by then, never destroyed.
struct DeviceState {
    std::once_flag facts_once;
    std::atomic<bool> facts_known{false};
    DeviceFacts facts;
    std::once_flag pool_once;
    std::atomic<cudaMemPool_t> pool{nullptr};
};

std::array<DeviceState, most_devices>& states() {
    static std::array<DeviceState, most_devices>& all = *new std::array<DeviceState, most_devices>;
    return all;
}

DeviceState& state_of(int index) { return states().at(static_cast<std::size_t>(index)); }

int checked(int index) {
    if (index >= most_devices) {
        throw Error(ErrorKind::device,
                    "CUDA: expected a device below " + std::to_string(most_devices) + ", got " + std::to_string(index));
    }
    return index;
}

// The functions of the driver for the calling thread's context, of which the runtime says nothing.
struct Driver {
    int (*get_context)(void** context);
    int (*set_context)(void* context);
};

const Driver& driver() {
    static const Driver found = [] {
#ifdef OCTAVO_SIMT
        return Driver{&cuCtxGetCurrent, &cuCtxSetCurrent};
#else
        void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
        const auto find = [&]<class Function>(Function*& function, const char* name) {
            function = library == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(library, name));
            if (function == nullptr) throw Error(ErrorKind::device, std::string("CUDA: the driver has no ") + name);
        };
        Driver result{};
        find(result.get_context, "cuCtxGetCurrent");
        find(result.set_context, "cuCtxSetCurrent");
        return result;
#endif
    }();
    return found;
}

int attribute(cudaDeviceAttr name, int device) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
}

bool is_off(const char* variable) {
    const char* const value = std::getenv(variable);
    return value != nullptr && std::string_view(value) == "0";
}

// Of the device's memory at its peak, in bytes for a microsecond; infinite where it does not say.
double bandwidth_of(int device) {
    int kilohertz = 0;  // data comes at both edges
    int bits = 0;
    if (cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess) {
        cudaGetLastError();  // forgotten: newer drivers need not know these
    }
    const double bandwidth = 2.0 * kilohertz * bits / 8.0 / 1e3;
    return bandwidth > 0.0 ? bandwidth : std::numeric_limits<double>::infinity();
}

DeviceFacts read_facts(int index) {
    DeviceFacts facts;
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, index);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, index);
    if (10 * major + minor < oldest_architecture) {
        throw Error(ErrorKind::device, "CUDA: expected a GPU of compute capability 7.5 or newer, got " +
                                           std::to_string(major) + "." + std::to_string(minor) + " (device " +
                                           std::to_string(index) + ")");
    }
    facts.architecture = architecture_of_code();
    facts.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
    facts.shared = static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    // Other devices cannot run what is compiled for 9.0a.
    const bool may_have_wgmma = 10 * major + minor == wgmma_architecture && facts.architecture == wgmma_architecture;
    if (may_have_wgmma && !is_off("OCTAVO_CUDA_WGMMA")) facts.wgmma = try_wgmma();
    if (!is_off("OCTAVO_CUDA_PREFETCH")) {
        facts.bytes_ahead = bytes_ahead(bandwidth_of(index), attribute(cudaDevAttrL2CacheSize, index));
    }
    return facts;
}

thread_local const Scratch* scratch_of_call = nullptr;

cudaMemPool_t make_pool(int index) {
    if (attribute(cudaDevAttrMemoryPoolsSupported, index) == 0) {
        throw Error(ErrorKind::device, "CUDA: device " + std::to_string(index) + " has no memory pools");
    }
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = index;
    cudaMemPool_t pool = nullptr;
    check(cudaMemPoolCreate(&pool, &properties), "cudaMemPoolCreate");
    std::uint64_t keep_everything = UINT64_MAX;
    check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_everything), "cudaMemPoolSetAttribute");
    return pool;
}

cudaMemPool_t pool_of(int index) {
    DeviceState& state = state_of(index);
    std::call_once(state.pool_once, [&] { state.pool = make_pool(index); });
    return state.pool;
}

}  // namespace

int current_device() {
    int index = 0;
    check(cudaGetDevice(&index), "cudaGetDevice");
    return checked(index);
}

DeviceGuard::DeviceGuard(int index) {
    if (driver().get_context(&outer_) != 0) outer_ = nullptr;
    changed_ = outer_ == nullptr || current_device() != checked(index);
    if (changed_) check(cudaSetDevice(index), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
    if (changed_) driver().set_context(outer_);
}

const DeviceFacts& device_facts() {
    const int index = current_device();
    DeviceState& state = state_of(index);
    std::call_once(state.facts_once, [&] {
        state.facts = read_facts(index);
        state.facts_known = true;
    });
    return state.facts;
}

std::string wgmma_status() {
    std::string text;
    for (std::size_t index = 0; index < states().size(); ++index) {
        const DeviceState& state = states()[index];
        if (!state.facts_known) continue;
        text += text.empty() ? "device " : "; device ";
        text += std::to_string(index) + ": ";
        switch (state.facts.wgmma) {
            case Wgmma::none: text += "none"; break;
            case Wgmma::right: text += "used"; break;
            case Wgmma::wrong: text += "not used, because products were wrong"; break;
        }
    }
    return text.empty() ? "no device was used so far" : text;
}

ScratchOfCall::ScratchOfCall(const Scratch* scratch) noexcept { scratch_of_call = scratch; }

ScratchOfCall::~ScratchOfCall() { scratch_of_call = nullptr; }

void Workspace::allocate() {
    if (size_ == 0) return;
    device_ = current_device();
    owner_ = scratch_of_call;
    if (owner_ == nullptr) {
        check(cudaMallocFromPoolAsync(&memory_, size_, pool_of(device_), stream_), "cudaMallocFromPoolAsync");
        return;
    }
    memory_ = owner_->allocate(owner_->context, size_, device_, stream_);
    if (memory_ == nullptr || reinterpret_cast<std::uintptr_t>(memory_) % alignment != 0) {
        throw Error(ErrorKind::device, "CUDA: scratch: expected " + std::to_string(size_) +
                                           " bytes aligned to 256 of the caller's allocator, got " +
                                           (memory_ == nullptr ? "none" : "others"));
    }
}

Workspace::~Workspace() {
    if (memory_ == nullptr) return;
    if (owner_ != nullptr) {
        owner_->release(owner_->context, memory_, size_, device_, stream_);
    } else {
        cudaFreeAsync(memory_, stream_);
    }
}

void release_memory() {
    for (const DeviceState& state : states()) {
        const cudaMemPool_t pool = state.pool;
        if (pool != nullptr) check(cudaMemPoolTrimTo(pool, 0), "cudaMemPoolTrimTo");
    }
}

WhileCapturing::WhileCapturing() {
    check(cudaThreadExchangeStreamCaptureMode(&mode_), "cudaThreadExchangeStreamCaptureMode");
}

WhileCapturing::~WhileCapturing() { cudaThreadExchangeStreamCaptureMode(&mode_); }

std::uint64_t capture_of(cudaStream_t stream) noexcept {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long number = 0;
    if (cudaStreamGetCaptureInfo(stream, &status, &number) != cudaSuccess) {
        cudaGetLastError();  // it is of no later call
        return 0;
    }
    return status == cudaStreamCaptureStatusNone ? 0 : number;
}

void refuse_capture(cudaStream_t stream, const char* function) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
    if (status == cudaStreamCaptureStatusNone) return;
    throw Error(ErrorKind::device, std::string(function) +
                                       ": expected a stream that is not being captured, because this call reads a "
                                       "result back, got one that is");
}

}  // namespace octavo::cuda
