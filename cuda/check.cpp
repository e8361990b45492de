#include "check.hpp"

#include <string>

#include "octavo/error.hpp"

namespace octavo::cuda {

void check(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // an error that is not sticky must not be reported again, by the next call
    throw Error(ErrorKind::device, std::string("CUDA: ") + call + ": " + cudaGetErrorName(status) + " (" +
                                       cudaGetErrorString(status) + ")");
}

}  // namespace octavo::cuda
