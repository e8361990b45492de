// Quantization of activations and weights to int8 codes.
#pragma once

#include <limits>
#include <optional>

#include "octavo/options.hpp"
#include "octavo/types.hpp"

namespace [[gnu::visibility("default")]] octavo {

// Codes in a row of k features: with `rotation`, k up to whole blocks. The largest number where that would be larger.
[[nodiscard]] constexpr std::int64_t rotated_size(std::int64_t k, std::int32_t rotation) noexcept {
    if (rotation <= 0 || k <= 0) return k;
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    return k > most - rotation ? most : (k + rotation - 1) / rotation * rotation;
}

// Quantize a matrix, one scale per tensor or per row.
//
//   absmax    (Eq. 1):   q = clip(rint(x * 127 / absmax), -127, 127)             x ~ q * scale,  scale = absmax / 127
//   zeropoint (Eq. 2-3): nd = 254 / (max - min), zp = rint(nd * min) + 127
//                        q = clip(rint(nd * x) - zp, -127, 127)                  x ~ (q + zp) * scale,  scale = 1 / nd
//
// All in float32, round half to even, every operation rounded once. Where x * 127 (absmax) would overflow,
// (x / absmax) * 127; where max - min or nd (zeropoint) would overflow, the same formulas in float64.
//
// With `rotation` b, every block of b consecutive features (k padded with zeros to whole blocks) is first multiplied by
// H, the Sylvester-Hadamard matrix over sqrt(b), which spreads what is large in one feature over the block: in float32,
// butterflies (u, v) -> (u + v, u - v) of distance 1, 2, 4, ..., b / 2 in this order, then the factor. H is its own
// inverse and symmetric, so products of two rotated matrices are what they were. The codes of absmax are then
// clip(rint(x' * (127 / absmax)), -127, 127), one division for a group: x' has been rounded already (where 127 / absmax
// would overflow, (x' / absmax) * 127). A group in which these sums overflow is rotated times 2^-8, and its scale is
// times 2^8: every finite x has codes.
//
//   x            [m, k] f32, f16 or bf16, any strides
//   options      granularity `tensor` or `row`
//   exclude      i32 [r] or absent: columns left out of the scale, whose codes are 0 (outlier columns; any order); with
//                rotation they are 0 before it. Others than those of x are an error on the CPU and ignored on CUDA
//                devices.
//   codes        [m, rotated_size(k, rotation)] i8
//   scale        f32 [1] (`tensor`) or [m] (`row`)
//   zeropoint    f32, as `scale`, integral values; absent for `absmax`
//
// An empty or all-zero group has scale 0 and codes 0 (zeropoint: scale 1; a constant group m has scale |m| and
// reproduces m). A group holding NaN or Inf has scale NaN and codes 0, so that whatever it produces is NaN.
// CPU: returns when done. CUDA: enqueues. Throws Error (type, value, device) naming the argument.
void quantize(ConstMatrix x, const QuantizeOptions& options, ConstVector exclude, Matrix codes, Vector scale,
              Vector zeropoint, Stream stream = {});
inline void quantize(ConstMatrix x, Scheme scheme, Granularity granularity, ConstVector exclude, Matrix codes,
                     Vector scale, Vector zeropoint, Stream stream = {}) {
    quantize(x, {scheme, granularity}, exclude, codes, scale, zeropoint, stream);
}

// For a weight that is trained, whose codes are made over and over.
struct Requantization {
    // Round stochastically with this seed (octavo/stochastic.hpp): the scales are those of absmax, to which the scheme
    // and rotation 0 are bound, the element [j, h] of the weight takes the word h % 4 of words_of(j, h / 4, seed).
    // Codes depend on the seed alone, not on instruction set, device, layout or threads.
    std::optional<std::uint64_t> seed = std::nullopt;
    // On CUDA devices: only enqueue, also into a stream that is being captured. A group that holds NaN or Inf then has
    // scale NaN and codes 0, so that whatever it produces is NaN, in place of an error.
    bool enqueue = false;
};

// Quantize a weight for `linear`: as `quantize` with one scale per tensor (`tensor`, `row`) or per row (`vector`), and
// the sums of its codes, which the zeropoint product (Eq. 4-5) and the unsigned dot product instructions need.
//
//   weight     [n, k] f32, f16 or bf16, finite
//   codes      [n, rotated_size(k, rotation)] i8; with `layout` packed, which is for CPU memory, `data` is
//              octavo::packed_size of that many bytes, all of which are written, and strides are ignored
//   scale      f32 [1] (`tensor`, `row`) or [n] (`vector`)
//   zeropoint  f32, as `scale`; absent for `absmax`
//   code_sums  i32 [n]: sum of the codes of each row
//
// Throws Error (value) where the weight holds NaN or Inf; the outputs are then unspecified. Returns when done, on CUDA
// devices too; there it throws Error (device) where the stream is being captured. `again` may say otherwise.
void quantize_weight(ConstMatrix weight, const QuantizeOptions& options, Matrix codes, Vector scale, Vector zeropoint,
                     Vector code_sums, Stream stream = {}, Layout layout = Layout::row_major,
                     const Requantization& again = {});
inline void quantize_weight(ConstMatrix weight, Scheme scheme, Granularity granularity, Matrix codes, Vector scale,
                            Vector zeropoint, Vector code_sums, Stream stream = {}) {
    quantize_weight(weight, {scheme, granularity}, codes, scale, zeropoint, code_sums, stream);
}

// Sums over k of the codes `[n, k]` of a weight, i32 [n] (for weights that come from a file).
void sum_codes(ConstMatrix codes, Vector code_sums, Stream stream = {});

}  // namespace octavo
