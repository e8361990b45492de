#include "check.hpp"

#include <string>

#include "octavo/error.hpp"

namespace octavo::cuda {

namespace {

// What the runtime's own words leave open.
std::string hint(cudaError_t status) {
    if (status != cudaErrorNoKernelImageForDevice) return "";
    // 11.0 runs neither the machine code of 10.0 nor the PTX of 12.0.
    return "; this build of octavo is for the compute capabilities " OCTAVO_CUDA_ARCHITECTURES
           " (11.0 needs code of its own: 110-real among OCTAVO_CUDA_ARCHITECTURES)";
}

}  // namespace

void check(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error that is not sticky must not be reported again, by the next call
    throw Error(ErrorKind::device, std::string("CUDA: ") + call + ": " + cudaGetErrorName(status) + " (" +
                                       cudaGetErrorString(status) + ")" + hint(status));
}

}  // namespace octavo::cuda
