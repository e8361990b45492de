// From codes back to floating point.
#pragma once

#include "octavo/types.hpp"

namespace [[gnu::visibility("default")]] octavo {

// out[i, j] = (codes[i, j] + zeropoint[g]) * scale[g] in float32, rounded once to out's dtype, g the group of row i.
//
// With `rotation` (octavo/quantize.hpp) the rows are rotated back: (H codes + H zeropoint) * scale, in which H codes is
// exact and H zeropoint is sqrt(b) * zeropoint in the first feature of each block and 0 in the others.
//
//   codes      [m, rotated_size(k, rotation)] i8, any strides
//   scale      f32 [1] (one group) or [m] (a group per row)
//   zeropoint  f32, as `scale`, or absent
//   out        [m, k] f32, f16 or bf16
//
// A NaN scale gives NaN. CPU: returns when done. CUDA: enqueues.
void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                Stream stream = {});
inline void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, Matrix out, Stream stream = {}) {
    dequantize(codes, scale, zeropoint, 0, out, stream);
}

}  // namespace octavo
