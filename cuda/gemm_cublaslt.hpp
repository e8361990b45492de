// The int8 product by cuBLASLt, which is found when first needed: octavo works without it.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "octavo/types.hpp"

namespace octavo::cuda {

// Whether cuBLASLt can multiply these as they lie: rows contiguous and 16-byte aligned, their strides, k and n
// multiples of 4. (Its int8 kernels for tensor cores want both operands contiguous along k and leading dimensions that
// are multiples of 4 bytes.) Says nothing about whether the library is there.
[[nodiscard]] bool cublaslt_takes(const ConstMatrix& a, const ConstMatrix& b, const Matrix& out);

// out[i, j] = sum_k a[i, k] * b[j, k] for what `cublaslt_takes`, k <= part_depth. Enqueues, and neither synchronizes
// nor allocates but from the workspace's pool: it can be captured, at first use too (while there is a WhileCapturing).
// False, and nothing was enqueued, where there is no library or it has no algorithm for this product. Throws Error
// (device) where it fails otherwise.
[[nodiscard]] bool cublaslt_multiply(const ConstMatrix& a, const ConstMatrix& b, const Matrix& out,
                                     cudaStream_t stream);

// The version and the file of the library in use, or why there is none; and the devices that calls found it cannot be
// used on. Looks for the library where that has not been done, and makes no handle: that would occupy a device.
[[nodiscard]] std::string cublaslt_status();

}  // namespace octavo::cuda
