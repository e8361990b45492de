// Whether an element is an outlier, by the limit that was found for its row or by the threshold.
#pragma once

#include <cstdint>

#include "device.cuh"
#include "operations.hpp"

namespace octavo::cuda {

// The magnitude as a bit pattern, which orders alike; NaN is as large as infinity.
constexpr std::uint32_t infinite_magnitude = 0x7F800000U;
__device__ inline std::uint32_t magnitude_of(float x) {
    const std::uint32_t bits = __float_as_uint(x) & 0x7FFFFFFFU;
    return bits < infinite_magnitude ? bits : infinite_magnitude;
}

// An element's place in the order of magnitudes, of equal ones the first column on top.
__host__ __device__ inline Limit rank_of(std::uint32_t magnitude, std::int64_t column) {
    return Limit{magnitude} << 32 | (0xFFFFFFFFU - static_cast<std::uint32_t>(column));
}

// Whether an element of row `row` is an outlier under the policy `rows`.
__device__ inline bool is_outlier(float x, std::int64_t row, std::int64_t column, const ElementCriterion& criterion) {
    if (criterion.limits == nullptr) return is_outlier(x, criterion.threshold);
    return rank_of(magnitude_of(x), column) >= criterion.limits[row];
}

}  // namespace octavo::cuda
