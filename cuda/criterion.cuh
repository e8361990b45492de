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

// The outliers of a row under the policy `rows`: the elements above `magnitude`, and those as large in the first
// `columns` columns.
struct RowLimit {
    std::uint32_t magnitude;
    std::int32_t columns;

    // The same, for columns that are counted from `first` on. Then a thread's are constants, and need no registers.
    __device__ RowLimit from(std::int64_t first) const {
        return {magnitude, static_cast<std::int32_t>(max(columns - first, std::int64_t{0}))};
    }
};

__device__ inline RowLimit limit_of_row(const ElementCriterion& criterion, std::int64_t row) {
    constexpr std::int32_t all = 0x7FFFFFFF;
    if (criterion.limits == nullptr) return {magnitude_of(criterion.threshold), all};
    const Limit limit = criterion.limits[row];
    const std::uint32_t columns = 0U - static_cast<std::uint32_t>(limit);  // 0: all of them, see `rank_of`
    return {static_cast<std::uint32_t>(limit >> 32),
            columns - 1 < static_cast<std::uint32_t>(all) ? static_cast<std::int32_t>(columns) : all};
}

__device__ inline bool is_outlier(float x, std::int32_t column, const RowLimit& limit) {
    return magnitude_of(x) + (column < limit.columns ? 1U : 0U) > limit.magnitude;
}

}  // namespace octavo::cuda
