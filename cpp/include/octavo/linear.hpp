// LLM.int8(): the linear layer with int8 weights.
#pragma once

#include <span>

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
// CPU: returns when done. CUDA: enqueues at most three kernels (two for `none` and `static_`, one or two for
// `weight_only`; before compute capability 8.0 one more, and one for every 131056 columns of a k beyond that); never
// waits, and can be captured in a graph. It is fastest where k is a multiple of 16 and rows of codes begin at multiples
// of 16 bytes. Scratch memory comes from a pool that keeps it for further calls (release_cuda_memory). The values of
// weight.outlier_columns are checked in CPU memory only. Throws Error (type, value, device) naming the argument;
// `static_` needs weight.outlier_columns.
void linear(ConstMatrix x, const WeightView& weight, ConstVector bias, Matrix out, const LinearOptions& options = {},
            Stream stream = {});

// What becomes of y before it is rounded to the dtype of `out`.
//
//   gelu:  y * Phi(y),   Phi(y) = (1 + erf(y / sqrt(2))) / 2
//
// in float32, with a rational function of degree 5 in y^2 for Phi, whose steps are fixed: it is off by less than 2e-7
// times |y|. -Inf gives NaN. On the CPU only: on CUDA devices anything but none is an Error (value).
enum class Activation : std::uint8_t { none, gelu };

// A layer of `linear_many`: what `linear` is called with, and an activation.
struct LinearLayer {
    WeightView weight;
    ConstVector bias = absent_vector;
    Matrix out{};
    Activation activation = Activation::none;
};

// `linear` of one X for several weights, each with the outputs that it has alone, bit for bit, or their activations. X
// is quantized once for weights that follow each other and quantize it in the same way: with equal scheme, rotation and
// `tensor` or not, and for `static_` the same kept columns (on CUDA devices: the same memory of them; and at most four
// weights at a time). CPU: threads share the products of all of these, whose parts would be too small for them alone.
// CUDA: it enqueues a kernel for each layer, after those that make ready for them all. Errors name the layer,
// "linear_many[1]: ...".
void linear_many(ConstMatrix x, std::span<const LinearLayer> layers, const LinearOptions& options = {},
                 Stream stream = {});

// The gradient of a loss with respect to the X of `linear`, from that with respect to its Y:
//
//   out[i, h] = sum_j grad[i, j] * w[j, h]
//
// w is the weight as `dequantize` gives it in float32, with the kept values in kept columns where `options` has them
// multiplied: unless they say Outliers::none or Path::weight_only. Rounding X to codes is passed over, as is usual
// (a straight-through estimator). Sums are float32, of 256 output features at a time in ascending order, then over
// these; with a rotated weight the sums are rotated back before kept columns are put in. Rounded once to the dtype of
// `out`; equal bit for bit on every instruction set and on CUDA devices, with any number of threads and rows.
//
// `Path::int8`, with Scheme::absmax, takes the int8 product instead: the scales of W, which are those of what is summed
// over here, go to the gradient, and the codes stay what they are,
//
//   out[i, h] = acc[i, h] * scale_g[i] + sum_{j in O_i} (grad[i, j] * scale_w[j]) * codes[j, h]
//
// The rows of grad * scale_w (float32) are quantized as `linear` does it, with Outliers::rows: O_i, the elements of row
// i from 20 times the median magnitude of those that are not 0 (`relative` 6.3), at most 2 % of n, are multiplied in
// float32, and so are kept columns. Gradients have such elements where units are gated or saturate: without O the error
// would be twice as large. acc is the exact int8 product, with the transposed codes; the order of the epilogue is that
// of `linear`. A row does not depend on the others.
//
//   grad  [m, n] f32, f16 or bf16, any strides
//   out   [m, k] f32, f16 or bf16, any strides; must not overlap an input
//
// n of 0 gives zeros. NaN and Inf propagate as IEEE says, in their own row. W is dequantized a tile at a time. CPU:
// returns when done; scratch memory is at most 0.5 MiB for each thread, whatever the shape (with rotation more where
// many columns are kept); of the int8 product, n * k bytes for the transposed codes and what `linear` takes beside 4 *
// m * n bytes. CUDA: enqueues one kernel, with kept columns two, and takes no scratch memory; of the int8 product, two
// and those of `linear`, with rotation one more. Throws Error (type, value, device) naming the argument.
void linear_backward(ConstMatrix grad, const WeightView& weight, Matrix out, const LinearOptions& options = {},
                     Stream stream = {});

// The faults of `weight` that `linear` would report, without a product: for whoever keeps a WeightView and wants
// to hear of mistakes when it is made. `function` is the name to use in the message.
void check_weight(const WeightView& weight, const char* function);

}  // namespace octavo
