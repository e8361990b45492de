// The int8 matrix product.
#pragma once

#include "octavo/types.hpp"

namespace [[gnu::visibility("default")]] octavo {

// out[i, j] = sum_k a[i, k] * b[j, k], exact.
//
//   a         [m, k] i8, any strides
//   b         [n, k] i8, any strides (as a framework's Linear.weight), or packed (octavo/pack.hpp)
//   out       [m, n] i32
//   b_layout  of b
//
// Any k: sums that do not fit 32 bits never wrap, they throw Error (value) and leave `out` unspecified (possible only
// for k > 131071). CUDA: enqueues; for k > 131056 it waits for the result, which a stream being captured refuses.
void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout = Layout::row_major, Stream stream = {});

}  // namespace octavo
