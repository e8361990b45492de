// LLM.int8(): the linear layer with int8 weights.
#pragma once

#include "octavo/options.hpp"
#include "octavo/types.hpp"

namespace [[gnu::visibility("default")]] octavo {

// A weight made by `quantize_weight`, plus, optionally, the original values of calibrated outlier columns.
// Views only: the memory stays the caller's.
struct WeightView {
    // [n, rotated_size(k, rotation)] i8; if packed, `data` is octavo::packed_size of that many bytes
    ConstMatrix codes;
    ConstVector scale;                            // f32 [1] or, for `vector`, [n]
    ConstVector zeropoint = absent_vector;        // f32 as `scale` for Scheme::zeropoint, absent for absmax
    ConstVector code_sums;                        // i32 [n]
    ConstVector outlier_columns = absent_vector;  // i32 [r], ascending, unique: the columns kept in 16 bit
    ConstMatrix outlier_weight{};                 // [n, r] f32, f16 or bf16: their original weights
    Scheme scheme = Scheme::absmax;
    Granularity granularity = Granularity::vector;
    Layout layout = Layout::row_major;  // of `codes`; strides are ignored where they are packed
    std::int32_t rotation = 0;          // that it was quantized with, and X is
    std::int64_t k = 0;                 // input features; 0: as many as columns of `codes`
};

// Its input features.
[[nodiscard]] constexpr std::int64_t features_of(const WeightView& weight) noexcept {
    return weight.k == 0 ? weight.codes.cols : weight.k;
}

// y[i, j] = acc[i, j] * (scale_x[i] * scale_w[j]) + sum_{o in O} x[i, o] * w[j, o] + bias[j]        (paper Eq. 8)
//
// acc is the exact int8 product over the columns not in O (zeropoint: unrolled, Eq. 4-5); w[j, o] is the kept 16-bit
// weight where column o is kept, else the dequantized one. Scales are taken over what is not in O. Everything after
// acc is float32, rounded once to the dtype of `out`.
//
// With a rotated weight, acc is the product of the codes of the rotated X, whose elements in O were 0 before; what is
// multiplied in 16 bit is not rotated: kept weights never were, dequantized ones are rotated back
// (octavo/dequantize.hpp).
//
// `Path::weight_only` computes y[i, j] = scale_w[j] * sum_k x[i, k] * (q[j, k] + zeropoint[j]) + bias[j] in float32,
// with X rotated where the weight is, and ignores outliers and kept columns.
//
//   x     [m, k] f32, f16 or bf16, any strides
//   bias  f32, f16 or bf16 [n], or absent
//   out   [m, n] f32, f16 or bf16, any strides; must not overlap an input
//
// m, n or k of 0 give an empty or bias-only result. NaN or Inf in X: under `columns` and `rows` its products propagate
// as IEEE says, in its own row only; under `none` and `static_` it makes the rows of its scaling group NaN.
// CPU: returns when done. CUDA: enqueues at most four kernels (one for `weight_only`; one more for every 131056 columns
// of a k beyond that), the product of cuBLASLt counted as one, of octavo's own with a memset before it where few blocks
// share a long k; never waits, and can be captured in a graph. It is fastest where k is a multiple of 16 and rows of
// codes begin at multiples of 16 bytes. Scratch memory comes from a pool that keeps it for further calls
// (release_cuda_memory). The values of weight.outlier_columns are checked in CPU memory only. Throws Error (type,
// value, device) naming the argument; `static_` needs weight.outlier_columns.
void linear(ConstMatrix x, const WeightView& weight, ConstVector bias, Matrix out, const LinearOptions& options = {},
            Stream stream = {});

// The faults of `weight` that `linear` would report, without a product: for whoever keeps a WeightView and wants
// to hear of mistakes when it is made. `function` is the name to use in the message.
void check_weight(const WeightView& weight, const char* function);

}  // namespace octavo
