// Quantization of rows with elements left out, shared by `quantize`, `quantize_weight` and `linear`.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

#include "octavo/types.hpp"

namespace octavo::cpu {

// The columns of a row that take no part in its quantization, ascending and unique.
using ExcludedColumns = std::function<std::span<const std::int32_t>(std::int64_t row)>;

// octavo::quantize with the excluded columns chosen row by row. `code_sums` (i32 [m], or absent) receives the sum of
// each row's codes.
void quantize_rows(ConstMatrix x, Scheme scheme, Granularity granularity, const ExcludedColumns& excluded, Matrix codes,
                   Vector scale, Vector zeropoint, Vector code_sums);

}  // namespace octavo::cpu
