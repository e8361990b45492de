// Columns of a rotated weight as floats, for the 16-bit product.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/pack.hpp"

namespace octavo::cpu {

// Columns of `codes`, ascending, rotated back in blocks of `rotation` as octavo/dequantize.hpp has it, the first `cols`
// output features of each into its target (up to a multiple of 16 are written). zeropoint and scale are of the output
// features, as far.
void rotate_back_columns(const PackedPanel& codes, std::int32_t rotation, std::int64_t cols, const float* zeropoint,
                         const float* scale, std::span<const std::int32_t> columns, std::span<float* const> targets);

}  // namespace octavo::cpu
