// Every call of the CUDA runtime is checked by this.
#pragma once

#include <cuda_runtime_api.h>

namespace octavo::cuda {

// Throws Error (device), naming the call and CUDA's own words, unless `status` is success.
void check(cudaError_t status, const char* call);

}  // namespace octavo::cuda
