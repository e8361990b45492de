// Outlier columns: the input features that LLM.int8() multiplies in 16 bit.
#pragma once

#include "octavo/types.hpp"

namespace octavo {

// O = { j : there is an i with not (|x[i, j]| < threshold) }   (paper section 3.2)
//
// `>=`, and NaN or Inf make a column an outlier.
//
//   x          [m, k] f32, f16 or bf16, any strides
//   threshold  >= 0 (0: every column with a row; infinity: only columns with NaN or Inf)
//   columns    i32 [k]: the first `count` entries are the outlier columns, ascending; the rest is unspecified
//   count      i32 [1]
//
// CPU: returns when done. CUDA: enqueues. Throws Error (type, value, device) naming the argument.
void find_outliers(ConstMatrix x, float threshold, Vector columns, Vector count, Stream stream = {});

}  // namespace octavo
