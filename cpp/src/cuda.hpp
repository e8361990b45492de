// The CUDA backend as the core sees it: a shared object of its own (cuda/), loaded when CUDA memory first arrives, so
// that a machine without a driver never looks for one.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend.hpp"
#include "octavo/runtime.hpp"

namespace octavo {

class CudaBackend : public Backend {
public:
    [[nodiscard]] virtual std::vector<CudaDevice> devices() const = 0;
    // Version of the cuBLASLt in use, or why there is none; and the devices that it was found not to work with.
    [[nodiscard]] virtual std::string cublaslt() const = 0;
    [[nodiscard]] virtual std::string wgmma() const = 0;
    [[nodiscard]] virtual std::uint64_t capture_of(Stream stream) const noexcept = 0;  // octavo::capture_of
    virtual void release_memory() const = 0;
};

// What the calling thread uses (ScratchFrom), and changes for good; null: the backend's own pool.
const Scratch* scratch_in_use() noexcept;
void use_scratch(const Scratch* scratch) noexcept;

// What the shared object exports, under this name: a backend for this caller, who must be of the same build
// (`version`); `scratch` is its scratch_in_use. Throws Error (device) where the driver or a device is missing.
using CudaEntry = const CudaBackend*(const char* version, const Scratch* (*scratch)() noexcept);
inline constexpr char cuda_entry_name[] = "octavo_cuda_backend";

// Throws Error (device) saying what is missing.
const CudaBackend& cuda_backend();

}  // namespace octavo
