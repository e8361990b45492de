#include "cpu/rows.hpp"

#include <algorithm>

namespace octavo::cpu {

float magnitude_of(DType dtype, std::uint32_t bits) {
    float value = 0.0F;
    const auto narrow = static_cast<std::uint16_t>(bits);
    kernels().load(dtype, dtype == DType::f32 ? static_cast<const void*>(&bits) : &narrow, 1, 1, &value);
    return value;
}

void sort_unique(std::vector<std::int32_t>& columns) {
    std::ranges::sort(columns);
    // Not std::ranges::unique: Clang 14 cannot compile the ranges of GCC 12's library that it returns.
    columns.erase(std::unique(columns.begin(), columns.end()), columns.end());  // NOLINT(modernize-use-ranges)
}

const std::int8_t* contiguous_codes(const ConstMatrix& codes, std::int64_t row, std::int8_t* copy) {
    if (codes.col_stride == 1) return static_cast<const std::int8_t*>(at(codes, row, 0));
    for (std::int64_t j = 0; j < codes.cols; ++j) copy[j] = code_at(codes, row, j);
    return copy;
}

}  // namespace octavo::cpu
