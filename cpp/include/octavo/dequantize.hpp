// From codes back to floating point.
#pragma once

#include "octavo/types.hpp"

namespace octavo {

// out[i, j] = (codes[i, j] + zeropoint[g]) * scale[g] in float32, rounded once to out's dtype, g the group of row i.
//
//   codes      [m, k] i8, any strides
//   scale      f32 [1] (one group) or [m] (a group per row)
//   zeropoint  f32, as `scale`, or absent
//   out        [m, k] f32, f16 or bf16
//
// A NaN scale gives NaN. CPU: returns when done. CUDA: enqueues.
void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, Matrix out, Stream stream = {});

}  // namespace octavo
