// The CUDA backend: the operations of operations.hpp behind the interface of cpp/src/backend.hpp, on the device that
// the memory is on.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <span>
#include <string>
#include <string_view>

#include "check.hpp"
#include "cuda.hpp"
#include "gemm_cublaslt.hpp"
#include "memory.hpp"
#include "octavo/error.hpp"
#include "operations.hpp"

namespace octavo {
namespace {

cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

// Makes the device current, and refuses one that cannot be used; allows what a first call does while it is captured.
class OnDevice {
public:
    OnDevice(Device device, const Scratch* scratch) : guard_(device.index), scratch_(scratch) {
        static_cast<void>(cuda::device_facts());
    }

private:
    cuda::DeviceGuard guard_;
    cuda::ScratchOfCall scratch_;
    cuda::WhileCapturing while_capturing_;
};

// Does the work of `function` on a device. What the layers below say of the device begins with "CUDA: ", and does not
// name the function.
template <class Body>
void call(const char* function, Device device, const Scratch* scratch, Body&& body) {
    try {
        const OnDevice on(device, scratch);
        body();
    } catch (const Error& error) {
        const std::string_view message = error.what();
        if (error.kind() != ErrorKind::device || !message.starts_with("CUDA: ")) throw;
        throw Error(ErrorKind::device, std::string(function) + ": " + error.what());
    }
}

class Cuda final : public CudaBackend {
public:
    explicit Cuda(const Scratch* (*scratch)() noexcept) : scratch_(scratch) {}

    void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
                  Vector zeropoint, Stream stream) const override {
        call("quantize", x.device, scratch_(),
             [&] { cuda::quantize(x, options, exclude, codes, scale, zeropoint, native(stream)); });
    }
    void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale,
                         Vector zeropoint, Vector code_sums, Layout /*layout*/, const Requantization& again,
                         Stream stream) const override {
        call("quantize_weight", weight.device, scratch_(), [&] {
            cuda::quantize_weight(weight, options, codes, scale, zeropoint, code_sums, again, native(stream));
        });
    }
    void sum_codes(ConstMatrix codes, Vector code_sums, Stream stream) const override {
        call("sum_codes", codes.device, scratch_(), [&] { cuda::sum_codes(codes, code_sums, native(stream)); });
    }
    void pack(ConstMatrix codes, Vector /*packed*/, Stream /*stream*/) const override { no_packing("pack", codes); }
    void unpack(ConstVector /*packed*/, Matrix codes, Stream /*stream*/) const override { no_packing("unpack", codes); }
    void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count,
                       Stream stream) const override {
        call("find_outliers", x.device, scratch_(),
             [&] { cuda::find_outliers(x, options, columns, count, native(stream)); });
    }
    void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout /*row-major*/, Stream stream) const override {
        call("int8_matmul", a.device, scratch_(), [&] { cuda::int8_matmul(a, b, out, native(stream)); });
    }
    void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                    Stream stream) const override {
        call("dequantize", codes.device, scratch_(),
             [&] { cuda::dequantize(codes, scale, zeropoint, rotation, out, native(stream)); });
    }
    void linear(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options,
                Stream stream) const override {
        call("linear", x.device, scratch_(), [&] { cuda::linear(x, layers, options, native(stream)); });
    }
    void linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, bool uses_kept, bool int8,
                         Stream stream) const override {
        call("linear_backward", grad.device, scratch_(), [&] {
            cuda::linear_backward(grad, weight, out, uses_kept, int8 ? &gradient_options : nullptr, native(stream));
        });
    }

    [[nodiscard]] std::vector<CudaDevice> devices() const override {
        int count = 0;
        cuda::check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
        std::vector<CudaDevice> result;
        for (int index = 0; index < count; ++index) {
            cudaDeviceProp properties{};
            cuda::check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
            result.push_back({.name = properties.name,
                              .major = properties.major,
                              .minor = properties.minor,
                              .multiprocessors = properties.multiProcessorCount,
                              .memory = static_cast<std::int64_t>(properties.totalGlobalMem)});
        }
        return result;
    }
    [[nodiscard]] std::string cublaslt() const override { return cuda::cublaslt_status(); }
    [[nodiscard]] std::string wgmma() const override { return cuda::wgmma_status(); }
    [[nodiscard]] std::uint64_t capture_of(Stream stream) const noexcept override {
        return cuda::capture_of(native(stream));
    }
    void release_memory() const override { cuda::release_memory(); }

private:
    const Scratch* (*scratch_)() noexcept;  // of the calling thread

    [[noreturn]] static void no_packing(const char* function, const ConstMatrix& codes) {
        throw Error(ErrorKind::device, std::string(function) + ": codes: expected memory on the cpu, got cuda:" +
                                           std::to_string(codes.device.index));
    }
};

// Says what is missing, in words that help: the runtime's own name the driver's version in every case.
void need_a_device() {
#ifndef OCTAVO_SIMT
    void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (driver == nullptr) throw Error(ErrorKind::device, "CUDA: no driver on this machine (libcuda.so.1 not found)");
    dlclose(driver);
#endif
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver) {
        throw Error(ErrorKind::device, "CUDA: the driver is older than CUDA " + std::to_string(CUDART_VERSION / 1000) +
                                           " needs (" + cudaGetErrorString(status) + ")");
    }
    if (status == cudaErrorNoDevice || (status == cudaSuccess && count == 0)) {
        throw Error(ErrorKind::device, "CUDA: a driver, but no device that this process can use");
    }
    cuda::check(status, "cudaGetDeviceCount");
}

}  // namespace
}  // namespace octavo

extern "C" __attribute__((visibility("default"))) const octavo::CudaBackend* octavo_cuda_backend(
    const char* version, const octavo::Scratch* (*scratch)() noexcept) {
    if (std::string_view(version) != OCTAVO_VERSION) {
        throw octavo::Error(octavo::ErrorKind::device, std::string("CUDA: the CUDA backend is of octavo ") +
                                                           OCTAVO_VERSION + ", the rest of octavo " + version);
    }
    octavo::need_a_device();
    return new octavo::Cuda(scratch);  // lives as long as the process
}
