// What the int8 product is made of (gemm.cpp chooses). Enqueues on `stream` of the current device and returns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "octavo/types.hpp"

namespace octavo::cuda {

// --- gemm_mma.cu ----------------------------------------------------------------------------------------------------

// Whether the product reads these operands 16 bytes at a time. Contiguous rows that are not aligned take it five words
// for that, and codes that lie apart are read byte by byte.
bool reads_wide(const ConstMatrix& a, const ConstMatrix& b);

// out[i, j] = sum_k a[i, k] * b[j, k], exact.
//   a, b  [m, k], [n, k] i8, any strides; 0 <= k <= part_depth
//   out   [m, n] i32, any strides
void mma_multiply(ConstMatrix a, ConstMatrix b, Matrix out, cudaStream_t stream);

// --- gemm_copies.cu -------------------------------------------------------------------------------------------------

// Copies codes of any strides to rows of `width` bytes, a multiple of 16, of which those from k on are zeroed.
void copy_aligned(ConstMatrix codes, std::int8_t* copy, std::int64_t width, cudaStream_t stream);

// What `sum_parts` leaves in `overflow` where all sums fit.
inline constexpr unsigned long long no_overflow = ~0ULL;

// out[i, j] = sum_p acc[p, i, j], in 64 bits. `overflow` (on the device) receives i * n + j of the first sum that does
// not fit int32, else no_overflow.
//   acc  [parts, m, n], contiguous
//   out  [m, n] i32, any strides
void sum_parts(const std::int32_t* acc, std::int64_t parts, Matrix out, unsigned long long* overflow,
               cudaStream_t stream);

}  // namespace octavo::cuda
