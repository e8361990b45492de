// The functions of the CUDA runtime that cuda/ and the tests use, for the emulated GPU. Work is done when it is
// enqueued.
//
// The device is OCTAVO_SIMT_ARCH (75, 80, 86, 89, 90, 100, 110 or 120; 90 by default), its code for that or for
// OCTAVO_SIMT_CODE_ARCH (as if made of older PTX), and there is one, or OCTAVO_SIMT_DEVICES. It says that it has as
// many multiprocessors as such a GPU, or OCTAVO_SIMT_MULTIPROCESSORS (few make launchers choose as for large inputs).
// With OCTAVO_SIMT_NO_CLOCK it does not know how fast its memory is. With OCTAVO_SIMT_WGMMA=wrong products of
// warpgroups are (executor.cpp). Device memory ends at a page that nobody may touch (or, where its size is not a
// multiple of 256 bytes, before bytes that are checked when it is freed); it starts as 0xFF bytes, and nobody may touch
// it after it is freed. Capture records: nothing runs until the graph is launched, and calls that wait for the device
// fail.
#include "runtime.hpp"

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "machine.hpp"

// The types behind the runtime's handles.
struct CUgraph_st {
    std::vector<std::function<void()>> nodes;
    std::vector<void*> memory;       // allocated by the graph, given back with it
    unsigned long long capture = 0;  // its number

    CUgraph_st() = default;
    ~CUgraph_st();
    CUgraph_st(const CUgraph_st&) = delete;
    CUgraph_st& operator=(const CUgraph_st&) = delete;
};
struct CUgraphExec_st {
    std::shared_ptr<CUgraph_st> graph;
};
struct CUstream_st {
    std::shared_ptr<CUgraph_st> capture;  // where it is being captured
    bool invalid = false;                 // the capture, by a call that it does not allow
    int device = 0;
};
struct CUevent_st {};
struct CUmemPoolHandle_st {
    std::size_t used = 0;
    std::size_t kept = 0;  // taken from the device, used or not
    std::uint64_t threshold = 0;
};

namespace simt {
namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t alignment = 256;
constexpr unsigned char canary = 0xC5;
constexpr std::size_t quarantine_limit = std::size_t{256} << 20;

struct Allocation {
    char* mapping = nullptr;
    std::size_t mapped = 0;
    std::size_t size = 0;
    bool on_host = false;
    cudaMemPool_t pool = nullptr;
};

struct Architecture {
    int number;
    int multiprocessors;
    std::size_t shared;  // of a block, at most
};
constexpr Architecture architectures[] = {{70, 80, 96 << 10},    {75, 40, 64 << 10},   {80, 108, 163 << 10},
                                          {86, 84, 99 << 10},    {89, 128, 99 << 10},  {90, 132, 227 << 10},
                                          {100, 148, 227 << 10}, {110, 20, 227 << 10}, {120, 170, 99 << 10}};
constexpr int without_code = 110;                  // unless a build asks for it (CMakeLists.txt)
constexpr std::size_t reserved_shared = 48 << 10;  // of a block that asks for no more
constexpr int l2_bytes = 50 << 20;
constexpr int memory_kilohertz = 1000;  // slow, so that small weights, too, are asked for in part alone (ahead.cuh)
constexpr int memory_bits = 8192;
constexpr std::size_t device_memory = std::size_t{8} << 30;

// One per process; never destroyed, because other objects' destructors may still call.
struct Runtime {
    Counters counted;
    std::map<const void*, Allocation> allocations;
    std::deque<Allocation> quarantine;  // freed, and not to be touched
    std::size_t quarantined = 0;
    std::set<cudaStream_t> streams;
    std::set<cudaEvent_t> events;
    std::map<cudaGraph_t, std::shared_ptr<CUgraph_st>> graphs;
    CUmemPoolHandle_st default_pool;
    int captures = 0;
};
Runtime& runtime() {
    static Runtime& the = *new Runtime;
    return the;
}

thread_local cudaError_t last_error = cudaSuccess;
thread_local int device = 0;
thread_local bool has_context = false;  // of the driver, on that device
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t result(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
}

int number_from_environment(const char* name, int otherwise) {
    const char* const text = std::getenv(name);
    return text == nullptr || *text == '\0' ? otherwise : std::atoi(text);
}

const Architecture& architecture() {
    static const Architecture found = [] {
        const int wanted = number_from_environment("OCTAVO_SIMT_ARCH", 90);
        for (Architecture known : architectures) {
            if (known.number != wanted) continue;
            known.multiprocessors = number_from_environment("OCTAVO_SIMT_MULTIPROCESSORS", known.multiprocessors);
            return known;
        }
        fail("OCTAVO_SIMT_ARCH: expected 70 or 110 (which has no code), 75, 80, 86, 89, 90, 100 or 120");
    }();
    return found;
}

int device_count() {
    static const int count = number_from_environment("OCTAVO_SIMT_DEVICES", 1);
    return count;
}

// --- memory ---------------------------------------------------------------------------------------------------------

void release(const Allocation& allocation) { munmap(allocation.mapping, allocation.mapped); }

// Null where there is no memory.
void* allocate(std::size_t size, bool on_host, cudaMemPool_t pool) {
    const std::size_t rounded = (std::max<std::size_t>(size, 1) + alignment - 1) / alignment * alignment;
    const std::size_t usable = (rounded + page - 1) / page * page;
    void* const mapping =
        mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (size > device_memory || mapping == MAP_FAILED) return nullptr;
    char* const begin = static_cast<char*>(mapping);
    mprotect(begin + usable, page, PROT_NONE);
    char* const memory = begin + usable - rounded;
    std::memset(memory, 0xFF, size);
    std::memset(memory + size, canary, rounded - size);
#ifdef OCTAVO_SIMT_ASAN
    __asan_poison_memory_region(memory + size, rounded - size);
#endif
    runtime().allocations[memory] = {begin, usable + page, size, on_host, pool};
    race_register(memory, size);
    return memory;
}

cudaError_t free_memory(void* memory) {
    if (memory == nullptr) return cudaSuccess;
    Runtime& the = runtime();
    const auto found = the.allocations.find(memory);
    if (found == the.allocations.end()) return cudaErrorInvalidValue;
    const Allocation allocation = found->second;
    the.allocations.erase(found);
    race_unregister(memory);
    const char* const end = static_cast<char*>(memory) + allocation.size;
    const char* const usable_end = allocation.mapping + allocation.mapped - page;
#ifdef OCTAVO_SIMT_ASAN
    __asan_unpoison_memory_region(end, static_cast<std::size_t>(usable_end - end));
#endif
    for (const char* at = end; at < usable_end; ++at) {
        if (static_cast<unsigned char>(*at) != canary) fail("a write past the end of device memory");
    }
    if (allocation.pool != nullptr) allocation.pool->used -= allocation.size;
    mprotect(allocation.mapping, allocation.mapped, PROT_NONE);
    madvise(allocation.mapping, allocation.mapped, MADV_DONTNEED);
    the.quarantine.push_back(allocation);
    the.quarantined += allocation.mapped;
    while (the.quarantined > quarantine_limit || the.quarantine.size() > 4096) {
        the.quarantined -= the.quarantine.front().mapped;
        release(the.quarantine.front());
        the.quarantine.pop_front();
    }
    return cudaSuccess;
}

const Allocation* allocation_of(const void* address) {
    const auto& all = runtime().allocations;
    auto next = all.upper_bound(address);
    if (next == all.begin()) return nullptr;
    --next;
    const auto offset =
        static_cast<std::size_t>(static_cast<const char*>(address) - static_cast<const char*>(next->first));
    return offset < next->second.size ? &next->second : nullptr;
}

// --- streams --------------------------------------------------------------------------------------------------------

bool is_stream(cudaStream_t stream) {
    return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread ||
           runtime().streams.contains(stream);
}

// The capture that `stream` takes part in, or null.
CUgraph_st* capture_of(cudaStream_t stream) {
    return runtime().streams.contains(stream) ? stream->capture.get() : nullptr;
}

// Enqueues work: does it, or records it.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work) {
    if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (CUgraph_st* const graph = capture_of(stream)) {
        if (stream->invalid) return cudaErrorStreamCaptureInvalidated;
        graph->nodes.push_back(std::move(work));
        return cudaSuccess;
    }
    // The legacy stream waits for all others, which a capture cannot have.
    if ((stream == nullptr || stream == cudaStreamLegacy) && runtime().captures > 0) {
        return cudaErrorStreamCaptureImplicit;
    }
    work();
    return cudaSuccess;
}

// For calls that no stream may be captured during: they end the captures.
bool breaks_captures() {
    if (runtime().captures == 0) return false;
    for (const cudaStream_t stream : runtime().streams) {
        if (stream->capture != nullptr) stream->invalid = true;
    }
    return true;
}

// Likewise for those that a thread may make all the same where it says so (cudaThreadExchangeStreamCaptureMode).
bool is_forbidden() { return capture_mode != cudaStreamCaptureModeRelaxed && breaks_captures(); }

cudaError_t wait_for(cudaStream_t stream) {
    if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (capture_of(stream) != nullptr || ((stream == nullptr || stream == cudaStreamLegacy) && breaks_captures())) {
        if (capture_of(stream) != nullptr) stream->invalid = true;
        return cudaErrorStreamCaptureUnsupported;
    }
    ++runtime().counted.synchronizations;
    return cudaSuccess;
}

cudaError_t copy(void* target, const void* source, std::size_t size, cudaStream_t stream) {
    return enqueue(stream, [=] {
        ++runtime().counted.copies;
        if (size > 0) std::memmove(target, source, size);
    });
}

cudaError_t set(void* target, int value, std::size_t size, cudaStream_t stream) {
    return enqueue(stream, [=] {
        ++runtime().counted.copies;
        if (size > 0) std::memset(target, value, size);
    });
}

cudaError_t copy_rows(void* target, std::size_t target_pitch, const void* source, std::size_t source_pitch,
                      std::size_t width, std::size_t height, cudaStream_t stream) {
    if (target_pitch < width || source_pitch < width) return cudaErrorInvalidPitchValue;
    return enqueue(stream, [=] {
        ++runtime().counted.copies;
        for (std::size_t row = 0; row < height && width > 0; ++row) {
            std::memcpy(static_cast<char*>(target) + row * target_pitch,
                        static_cast<const char*>(source) + row * source_pitch, width);
        }
    });
}

cudaError_t allocate_in_order(void** memory, std::size_t size, cudaMemPool_t pool, cudaStream_t stream) {
    if (memory == nullptr || pool == nullptr) return cudaErrorInvalidValue;
    if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
    *memory = nullptr;
    if (size == 0) return cudaSuccess;
    CUgraph_st* const graph = capture_of(stream);
    *memory = allocate(size, false, graph == nullptr ? pool : nullptr);
    if (*memory == nullptr) return cudaErrorMemoryAllocation;
    ++runtime().counted.pool_allocations;
    if (graph != nullptr) {
        graph->memory.push_back(*memory);
        graph->nodes.emplace_back([at = *memory, size] { std::memset(at, 0xFF, size); });
        return cudaSuccess;
    }
    pool->used += size;
    if (pool->used > pool->kept) {
        pool->kept = pool->used;
        ++runtime().counted.allocations;
    }
    return cudaSuccess;
}

cudaError_t free_in_order(void* memory, cudaStream_t stream) {
    if (!is_stream(stream)) return cudaErrorInvalidResourceHandle;
    if (CUgraph_st* const graph = capture_of(stream)) {
        // It stays the graph's, for its next launch.
        const auto found = runtime().allocations.find(memory);
        if (found == runtime().allocations.end()) return cudaErrorInvalidValue;
        graph->nodes.emplace_back([memory, size = found->second.size] { std::memset(memory, 0xFF, size); });
        return cudaSuccess;
    }
    return free_memory(memory);
}

}  // namespace

cudaError_t enqueue_kernel(cudaStream_t stream, dim3 grid, dim3 block, std::size_t shared, Call call) {
    const std::scoped_lock lock(machine_mutex());
    if (architecture().number == without_code) return result(cudaErrorNoKernelImageForDevice);
    if (const cudaError_t status = check_launch(call.kernel, grid, block, shared); status != cudaSuccess) {
        return result(status);
    }
    // Registers are not known here, so no more threads count as resident than any kernel can have.
    constexpr std::uint64_t resident_threads = 1024;
    if (call.cooperative &&
        std::uint64_t{grid.x} * grid.y * grid.z > resident_threads / (std::uint64_t{block.x} * block.y * block.z) *
                                                      static_cast<std::uint64_t>(architecture().multiprocessors)) {
        return result(cudaErrorCooperativeLaunchTooLarge);
    }
    has_context = true;
    if (runtime().streams.contains(stream) && stream->device != device) return result(cudaErrorInvalidResourceHandle);
    return result(enqueue(stream, [=, call = std::move(call)] {
        ++runtime().counted.launches;
        run_kernel(grid, block, shared, call);
    }));
}

}  // namespace simt

void simt::prefetch(const void* source, std::size_t bytes) {
    runtime().counted.prefetched += static_cast<long>(bytes);
    note(source, bytes, false, false);
}

CUgraph_st::~CUgraph_st() {
    for (void* const part : memory) simt::free_memory(part);
}

void octavo_simt_counters(simt::Counters* counters) {
    const std::scoped_lock lock(simt::machine_mutex());
    *counters = simt::runtime().counted;
}
void octavo_simt_reset_counters() {
    const std::scoped_lock lock(simt::machine_mutex());
    simt::runtime().counted = {};
}
void octavo_simt_register(void* memory, std::size_t size) {
    const std::scoped_lock lock(simt::machine_mutex());
    simt::race_register(memory, size);
}
void octavo_simt_unregister(void* memory) {
    const std::scoped_lock lock(simt::machine_mutex());
    simt::race_unregister(memory);
}

// --- the runtime's functions ----------------------------------------------------------------------------------------

#define SIMT_LOCKED const std::scoped_lock simt_lock(simt::machine_mutex())

extern "C" {
#pragma GCC visibility push(default)

// Errors.

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return simt::last_error; }
const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidPitchValue: return "cudaErrorInvalidPitchValue";
        case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
        case cudaErrorNoDevice: return "cudaErrorNoDevice";
        case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
        case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
        case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
        case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
        case cudaErrorIllegalState: return "cudaErrorIllegalState";
        default: return "an error of the emulated CUDA runtime";
    }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// Devices.

cudaError_t cudaGetDeviceCount(int* count) {
    *count = simt::device_count();
    return simt::result(*count == 0 ? cudaErrorNoDevice : cudaSuccess);
}
cudaError_t cudaGetDevice(int* device) {
    *device = simt::device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= simt::device_count()) return simt::result(cudaErrorInvalidDevice);
    SIMT_LOCKED;
    ++simt::runtime().counted.contexts;
    simt::device = device;
    simt::has_context = true;
    return cudaSuccess;
}
// Of the driver. A thread without a context is to the runtime on device 0.
int cuCtxGetCurrent(void** context) {
    *context = simt::has_context ? reinterpret_cast<void*>(std::intptr_t{1} + simt::device) : nullptr;
    return 0;
}
int cuCtxSetCurrent(void* context) {
    simt::has_context = context != nullptr;
    simt::device = simt::has_context ? static_cast<int>(reinterpret_cast<std::intptr_t>(context)) - 1 : 0;
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= simt::device_count()) return simt::result(cudaErrorInvalidDevice);
    const simt::Architecture& facts = simt::architecture();
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = facts.number / 10; break;
        case cudaDevAttrComputeCapabilityMinor: *value = facts.number % 10; break;
        case cudaDevAttrMultiProcessorCount: *value = facts.multiprocessors; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(facts.shared); break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(simt::reserved_shared); break;
        case cudaDevAttrL2CacheSize: *value = simt::l2_bytes; break;
        case cudaDevAttrMemoryClockRate:
            if (std::getenv("OCTAVO_SIMT_NO_CLOCK") != nullptr) return simt::result(cudaErrorInvalidValue);
            *value = simt::memory_kilohertz;
            break;
        case cudaDevAttrGlobalMemoryBusWidth: *value = simt::memory_bits; break;
        case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
        case cudaDevAttrWarpSize: *value = warpSize; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
        default: simt::fail("cudaDeviceGetAttribute: an attribute that tests/simt/runtime.cpp does not know");
    }
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    if (device < 0 || device >= simt::device_count()) return simt::result(cudaErrorInvalidDevice);
    const simt::Architecture& facts = simt::architecture();
    *properties = {};
    std::snprintf(properties->name, sizeof properties->name, "emulated GPU (sm_%d)", facts.number);
    properties->major = facts.number / 10;
    properties->minor = facts.number % 10;
    properties->multiProcessorCount = facts.multiprocessors;
    properties->totalGlobalMem = simt::device_memory;
    properties->sharedMemPerBlock = simt::reserved_shared;
    properties->sharedMemPerBlockOptin = facts.shared;
    properties->l2CacheSize = simt::l2_bytes;
    properties->warpSize = warpSize;
    properties->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
    SIMT_LOCKED;
    if (simt::breaks_captures()) return simt::result(cudaErrorStreamCaptureUnsupported);
    ++simt::runtime().counted.synchronizations;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

// Kernels.

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    SIMT_LOCKED;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
    if (value < 0 || static_cast<std::size_t>(value) + simt::static_shared(kernel) > simt::architecture().shared) {
        return simt::result(cudaErrorInvalidValue);
    }
    simt::allow_dynamic_shared(kernel, static_cast<std::size_t>(value));
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
    SIMT_LOCKED;
    if (simt::architecture().number == simt::without_code) return simt::result(cudaErrorNoKernelImageForDevice);
    *attributes = {};
    attributes->sharedSizeBytes = simt::static_shared(kernel);
    attributes->maxThreadsPerBlock = 1024;
    attributes->binaryVersion = simt::architecture().number;
    attributes->ptxVersion = simt::number_from_environment("OCTAVO_SIMT_CODE_ARCH", simt::architecture().number);
    return cudaSuccess;
}
// As many blocks as threads and dynamic shared memory allow: registers are unknown here.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* /*kernel*/, int threads,
                                                          size_t shared) {
    if (threads < 1 || threads > 1024) return simt::result(cudaErrorInvalidValue);
    constexpr int most_threads = 2048;
    constexpr int most_blocks = 32;
    *blocks = std::min(most_threads / threads, most_blocks);
    if (shared > 0) *blocks = std::min(*blocks, static_cast<int>(simt::architecture().shared / shared));
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads,
                                                                   size_t shared, unsigned /*flags*/) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}

// Memory.

cudaError_t cudaMalloc(void** memory, size_t size) {
    SIMT_LOCKED;
    if (simt::is_forbidden()) return simt::result(cudaErrorStreamCaptureUnsupported);
    ++simt::runtime().counted.allocations;
    *memory = size == 0 ? nullptr : simt::allocate(size, false, nullptr);
    return simt::result(size > 0 && *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaFree(void* memory) {
    SIMT_LOCKED;
    if (simt::is_forbidden()) return simt::result(cudaErrorStreamCaptureUnsupported);
    ++simt::runtime().counted.synchronizations;
    return simt::result(simt::free_memory(memory));
}
cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned /*flags*/) {
    SIMT_LOCKED;
    if (simt::is_forbidden()) return simt::result(cudaErrorStreamCaptureUnsupported);
    ++simt::runtime().counted.allocations;
    *memory = simt::allocate(size, true, nullptr);
    return simt::result(*memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaMallocHost(void** memory, size_t size) { return cudaHostAlloc(memory, size, 0); }
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }
cudaError_t cudaMallocAsync(void** memory, size_t size, cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::allocate_in_order(memory, size, &simt::runtime().default_pool, stream));
}
cudaError_t cudaMallocFromPoolAsync(void** memory, size_t size, cudaMemPool_t pool, cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::allocate_in_order(memory, size, pool, stream));
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::free_in_order(memory, stream));
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
    SIMT_LOCKED;
    if (pool == nullptr || properties == nullptr) return simt::result(cudaErrorInvalidValue);
    if (simt::is_forbidden()) return simt::result(cudaErrorStreamCaptureUnsupported);
    *pool = new CUmemPoolHandle_st;
    return cudaSuccess;
}
cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
    SIMT_LOCKED;
    if (pool == nullptr || pool->used > 0) return simt::result(cudaErrorInvalidValue);
    delete pool;
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
    if (attribute == cudaMemPoolAttrReleaseThreshold) std::memcpy(&pool->threshold, value, sizeof pool->threshold);
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, cudaMemPoolAttr attribute, void* value) {
    std::uint64_t number = 0;
    switch (attribute) {
        case cudaMemPoolAttrReleaseThreshold: number = pool->threshold; break;
        case cudaMemPoolAttrReservedMemCurrent: number = pool->kept; break;
        case cudaMemPoolAttrUsedMemCurrent: number = pool->used; break;
        default: return simt::result(cudaErrorInvalidValue);
    }
    std::memcpy(value, &number, sizeof number);
    return cudaSuccess;
}
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t size) {
    SIMT_LOCKED;
    pool->kept = std::min(pool->kept, std::max(pool->used, size));
    return cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int /*device*/) {
    *pool = &simt::runtime().default_pool;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) { return cudaDeviceGetDefaultMemPool(pool, device); }
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    *unused = *total = simt::device_memory;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    SIMT_LOCKED;
    const simt::Allocation* const allocation = simt::allocation_of(address);
    *attributes = {};
    attributes->type = allocation == nullptr ? cudaMemoryTypeUnregistered
                       : allocation->on_host ? cudaMemoryTypeHost
                                             : cudaMemoryTypeDevice;
    attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind /*kind*/,
                            cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::copy(target, source, size, stream));
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind kind) {
    SIMT_LOCKED;
    const cudaError_t status = simt::wait_for(nullptr);
    return status != cudaSuccess ? simt::result(status) : cudaMemcpyAsync(target, source, size, kind, nullptr);
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind /*kind*/, cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::copy_rows(target, target_pitch, source, source_pitch, width, height, stream));
}
cudaError_t cudaMemsetAsync(void* target, int value, size_t size, cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::set(target, value, size, stream));
}
cudaError_t cudaMemset(void* target, int value, size_t size) { return cudaMemsetAsync(target, value, size, nullptr); }

// Streams and events.

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned /*flags*/) {
    SIMT_LOCKED;
    *stream = new CUstream_st;
    (*stream)->device = simt::device;
    simt::runtime().streams.insert(*stream);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithFlags(stream, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    SIMT_LOCKED;
    if (simt::runtime().streams.erase(stream) == 0) return simt::result(cudaErrorInvalidResourceHandle);
    if (stream->capture != nullptr) --simt::runtime().captures;
    delete stream;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::wait_for(stream));
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    SIMT_LOCKED;
    if (simt::capture_of(stream) == nullptr)
        return simt::result(simt::is_stream(stream) ? cudaSuccess : cudaErrorInvalidResourceHandle);
    stream->invalid = true;
    return simt::result(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t /*stream*/, cudaEvent_t /*event*/, unsigned /*flags*/) {
    return cudaSuccess;  // work is done in the order in which it is enqueued
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned /*flags*/) {
    *event = new CUevent_st;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecord(cudaEvent_t /*event*/, cudaStream_t /*stream*/) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t /*event*/) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t /*event*/) { return cudaDeviceSynchronize(); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    delete event;
    return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    SIMT_LOCKED;
    return simt::result(simt::enqueue(stream, [=] {
        ++simt::runtime().counted.host_functions;
        function(data);
    }));
}

// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode /*mode*/) {
    SIMT_LOCKED;
    if (!simt::runtime().streams.contains(stream)) return simt::result(cudaErrorStreamCaptureUnsupported);
    if (stream->capture != nullptr) return simt::result(cudaErrorIllegalState);
    static unsigned long long captures = 0;
    stream->capture = std::make_shared<CUgraph_st>();
    stream->capture->capture = ++captures;
    stream->invalid = false;
    ++simt::runtime().captures;
    return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, simt::capture_mode);
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    SIMT_LOCKED;
    *graph = nullptr;
    if (simt::capture_of(stream) == nullptr) return simt::result(cudaErrorIllegalState);
    const std::shared_ptr<CUgraph_st> capture = std::move(stream->capture);
    --simt::runtime().captures;
    if (stream->invalid) return simt::result(cudaErrorStreamCaptureInvalidated);
    *graph = capture.get();
    simt::runtime().graphs[*graph] = capture;
    return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    SIMT_LOCKED;
    *status = cudaStreamCaptureStatusNone;
    if (!simt::is_stream(stream)) return simt::result(cudaErrorInvalidResourceHandle);
    if ((stream == nullptr || stream == cudaStreamLegacy) && simt::runtime().captures > 0) {
        return simt::result(cudaErrorStreamCaptureImplicit);
    }
    if (simt::capture_of(stream) != nullptr) {
        *status = stream->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    }
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number,
                                     cudaGraph_t* /*graph*/, const cudaGraphNode_t** /*dependencies*/,
                                     const cudaGraphEdgeData** /*edges*/, size_t* /*count*/) {
    SIMT_LOCKED;
    const cudaError_t found = cudaStreamIsCapturing(stream, status);
    if (found == cudaSuccess && *status == cudaStreamCaptureStatusActive) *number = stream->capture->capture;
    return found;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long /*flags*/) {
    SIMT_LOCKED;
    const auto found = simt::runtime().graphs.find(graph);
    if (found == simt::runtime().graphs.end()) return simt::result(cudaErrorInvalidValue);
    *executable = new CUgraphExec_st{found->second};
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    SIMT_LOCKED;
    return simt::result(simt::enqueue(stream, [graph = executable->graph] {
        for (const auto& node : graph->nodes) node();
    }));
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    SIMT_LOCKED;
    delete executable;
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    SIMT_LOCKED;
    return simt::result(simt::runtime().graphs.erase(graph) == 0 ? cudaErrorInvalidValue : cudaSuccess);
}

#pragma GCC visibility pop
}  // extern "C"
