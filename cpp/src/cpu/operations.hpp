// The operations of the CPU backend: the stems of the public headers, which document them.
#pragma once

#include <cstdint>

#include "octavo/linear.hpp"
#include "octavo/types.hpp"

namespace octavo::cpu {

void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
              Vector zeropoint);
void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale, Vector zeropoint,
                     Vector code_sums);
void sum_codes(ConstMatrix codes, Vector code_sums);
void pack(ConstMatrix codes, std::int8_t* packed);
void unpack(const std::int8_t* packed, Matrix codes);
void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count);
void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout);
void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out);
void linear(ConstMatrix x, const WeightView& weight, ConstVector bias, Matrix out, const LinearOptions& options);

}  // namespace octavo::cpu
