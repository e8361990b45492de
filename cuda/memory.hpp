// Scratch memory of a call, in stream order, the device it is on, and captures of streams.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "octavo/runtime.hpp"

namespace octavo::cuda {

// What is kept per device has this many places.
inline constexpr int most_devices = 64;

// The calling thread's. Throws Error (device) where there are more than `most_devices` before it.
int current_device();

// While it lives, the calling thread's current device is `index`. What is restored is the driver's context, where the
// thread had one, or that it had none: to make a device current is to make a context on it, of hundreds of megabytes.
class DeviceGuard {
public:
    explicit DeviceGuard(int index);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    void* outer_ = nullptr;  // null: none
    bool changed_ = false;
};

// What is known of the products of warpgroups (linear_wgmma.cu): that the code has none of them, that they are right,
// or that they are not, and are not used.
enum class Wgmma : std::int32_t { none, right, wrong };

// Facts of a device that launchers choose by; read once.
struct DeviceFacts {
    int multiprocessors = 0;
    int architecture = 0;    // of the code that it runs, 10 * major + minor: 90 for compute capability 9.0
    std::size_t shared = 0;  // bytes of shared memory that a block can have
    Wgmma wgmma = Wgmma::none;
    double bytes_ahead = 0.0;  // of W, that a launch before the product asks for (division.hpp)
};

// Of the current device. Throws Error (device) where it is older than compute capability 7.5, or there is no code for
// it.
const DeviceFacts& device_facts();

// On which devices, of those that were used so far, products of warpgroups are used, or why not.
std::string wgmma_status();

// Whether launches on the current device may begin before the one before them has ended (Grid::early): from sm_90 on.
inline bool begins_early() { return device_facts().architecture >= 90; }

// Does something once for each device, with that device current: what sets up a kernel, whatever thread comes first.
class OncePerDevice {
public:
    template <class Body>
    void operator()(Body&& body) {
        std::call_once(done_[static_cast<std::size_t>(current_device())], std::forward<Body>(body));
    }

private:
    std::array<std::once_flag, most_devices> done_;
};

// While it lives, calls of this thread that a capture forbids (loading of kernels, making of pools and handles) are
// allowed, although a stream is being captured: they are no part of what is captured.
class WhileCapturing {
public:
    WhileCapturing();
    ~WhileCapturing();
    WhileCapturing(const WhileCapturing&) = delete;
    WhileCapturing& operator=(const WhileCapturing&) = delete;

private:
    cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// While it lives, the calling thread's workspaces are of the caller's memory; null: of our own pool. They do not nest.
class ScratchOfCall {
public:
    explicit ScratchOfCall(const Scratch* scratch) noexcept;
    ~ScratchOfCall();
    ScratchOfCall(const ScratchOfCall&) = delete;
    ScratchOfCall& operator=(const ScratchOfCall&) = delete;
};

// Memory that a call needs between its kernels: reserved part by part, then allocated at once, and given back, all in
// the order of a stream. Where the caller gives none, it comes from a pool that keeps what is given back, so that after
// the first call of a shape nothing is allocated; allocating neither synchronizes nor breaks the capture of a graph.
class Workspace {
public:
    explicit Workspace(cudaStream_t stream) noexcept : stream_(stream) {}
    ~Workspace();
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    // A place for `count` elements.
    template <class T>
    struct Part {
        std::size_t offset = 0;
        bool present = false;
    };
    template <class T>
    Part<T> reserve(std::int64_t count) {
        const std::size_t offset = size_;
        size_ += (static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment * alignment;
        return {offset, true};
    }

    // Throws Error (device) where there is not enough memory.
    void allocate();

    // The memory of a part, aligned to 256 bytes and of unknown contents; null for a part that was not reserved.
    template <class T>
    T* at(const Part<T>& part) const noexcept {
        return part.present ? reinterpret_cast<T*>(static_cast<std::byte*>(memory_) + part.offset) : nullptr;
    }

private:
    static constexpr std::size_t alignment = 256;
    cudaStream_t stream_;
    std::size_t size_ = 0;
    void* memory_ = nullptr;
    const Scratch* owner_ = nullptr;  // null: our own pool
    int device_ = 0;
};

// Give back to the driver what the pools of all devices hold and no call uses.
void release_memory();

// octavo::capture_of
std::uint64_t capture_of(cudaStream_t stream) noexcept;

// Throws Error (device) naming `function` where `stream` is being captured: for the calls that must read a result back.
void refuse_capture(cudaStream_t stream, const char* function);

}  // namespace octavo::cuda
