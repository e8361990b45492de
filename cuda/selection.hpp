// How many rows the path `auto` multiplies by the weight-only product: beyond, the int8 product is worth its rounding.
// The table is that of a model of time, or of measurements, as selection_table.hpp says.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>

#include "selection_table.hpp"

namespace octavo::cuda {

// `by_mma`: whether the weight-only product is one of matrix instructions. Of architectures that the table has not, it
// is the next older one's.
inline std::int64_t most_weight_only_rows(int architecture, bool by_mma, std::int64_t k, std::int64_t n) {
    const auto place = [](std::int64_t extent) {
        const auto exponent = std::lround(2 * std::log2(static_cast<double>(std::max<std::int64_t>(extent, 1))));
        return std::clamp<std::int64_t>(exponent - first_extent, 0, extents - 1);
    };
    std::int64_t most = 0;
    for (const Selection& selection : selections) {  // the oldest first
        if (selection.by_mma != by_mma || selection.architecture > architecture) continue;
        most = selection.most[place(k)][place(n)];
    }
    return most;
}

}  // namespace octavo::cuda
