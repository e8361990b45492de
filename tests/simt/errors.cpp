// cuda/check.cpp for the emulator's own tests, which have kernels and no backend.
#include <cuda_runtime_api.h>

#include <string>

#include "octavo/error.hpp"

namespace octavo::cuda {

void check(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    throw Error(ErrorKind::device, std::string("CUDA: ") + call + ": " + cudaGetErrorName(status));
}

}  // namespace octavo::cuda
