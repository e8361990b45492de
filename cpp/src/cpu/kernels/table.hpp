// The inner loops of the CPU backend, one table of them per instruction set.
//
// The sources beside this header are compiled once per instruction set with other flags (CMakeLists.txt) and fill one
// table each; isa.cpp picks the table at run time. They work on contiguous rows and packed int8 blocks, know no threads
// and allocate nothing. All tables give identical codes, integers and floats: the order of every sum of floats is
// fixed, and so is which of its steps is a fused multiply-add.
//
// Rule for those sources: include no standard header with inline functions. A copy of std::max compiled for AVX-512
// could be the one the linker keeps for the whole program, and then crash on an older processor.
#pragma once

#include <cstdint>

#include "octavo/types.hpp"

namespace octavo::cpu {

// Least and greatest value of a run of floats; `finite` is false where it holds NaN or Inf (min, max then unspecified).
struct Range {
    float min;
    float max;
    bool finite;
};

// The largest of some halves (Kernels::upper_halves), and how many of them are below a bound and zero.
struct Survey {
    std::uint16_t largest;
    std::int64_t below;
    std::int64_t zeros;
};

// One register tile of the int8 product over a slice of k, or a run of them, one below the other.
struct ProductTile {
    // The slice of a panel of X, as Plan::place_row has laid it out; then the next panel's.
    const std::int8_t* x = nullptr;
    std::int64_t rows = 0;  // 1 to Plan::rows, or to Plan::run_rows where that is more
    // The slice of the first block of 16 output features: packed, or as Plan::regroup has made it.
    const std::int8_t* w = nullptr;
    std::int64_t w_stride = 0;    // bytes from block to block
    std::int64_t cols = 0;        // a multiple of 16, to Plan::cols
    std::int64_t depth = 0;       // a multiple of 64; 64 to max_int32_depth
    bool first = true;            // whether it is the first slice, which begins the sums
    std::int32_t* acc = nullptr;  // [rows, Plan::cols], cache-line aligned
    // What will be `w`, `depth` and `w_stride` next, to be fetched meanwhile; or null.
    const std::int8_t* ahead = nullptr;
    std::int64_t ahead_depth = 0;
    std::int64_t ahead_stride = 0;
    // The bytes of each block of it that fall to this panel, where there are several.
    std::int64_t ahead_begin = 0;
    std::int64_t ahead_end = 0;
    // How far ahead of itself a product of few rows asks for lines of W; 0: for those it is about to read
    // anyway, which neither helps nor costs.
    std::int64_t bytes_ahead = 0;
    // How much of it an epilogue has begun already (Plan::begin), in pieces of an instruction set's own.
    std::int64_t begun = 0;
    // Of a run: to be called for all of its rows, some of a panel at a time, as soon as their sums are whole; best
    // while the next panel is multiplied. It does not multiply itself. Or null. Sums go to `whole` then, [Plan::rows,
    // Plan::cols] for all panels, and may be missing from `acc`, which still has those of the slices before.
    void (*finish)(const void* context, std::int64_t row, std::int64_t rows) = nullptr;
    std::int32_t* whole = nullptr;
    const void* context = nullptr;
};

// How an instruction set multiplies: the shape of its tiles, what it wants of X and W, and its inner loop. What the
// driver (cpu/gemm.hpp) makes of it:
//
//   for a slice of k, `depth` deep:              the slice of `block_rows` rows of X is in the second-level cache
//       for `cols` output features:              the slice of W is in the first-level cache, or, where that is too
//                                                small, deeper (slice_of in gemm.cpp) and in the second-level cache
//           for a panel of `rows` rows of X:     the sums are in registers; of some panels they are finished at once
//
// The sums that `multiply` leaves are those of X W^T plus a number of each row and a number of each output feature,
// modulo 2^32. `place_row` tells the row's, `regroup` the feature's; unless x_is_unsigned, a plan without `regroup`
// adds nothing to either.
struct Plan {
    std::int64_t rows = 0;
    std::int64_t cols = 0;  // a multiple of 16
    std::int64_t depth = 0;
    std::int64_t block_rows = 0;
    std::int64_t run_rows = 0;   // rows that one call of `multiply` can take, a multiple of `rows`; 0: a panel
    std::int64_t x_size = 1;     // bytes of a code in a panel of X
    bool is_row_major = false;   // whether a panel of X is, so that one can begin at any row
    std::int64_t regrouped = 0;  // bytes of a code in a slice that `regroup` has made
    std::int64_t speed = 60;     // multiplications in a nanosecond, about: whether threads are worth it
    // Whether codes of X are multiplied as x + 128: 128 times the sum of a feature's codes too much.
    bool x_is_unsigned = false;
    // One row of a slice into row `row` of its panel (depth * rows * x_size bytes). What its sums will have too much.
    std::int32_t (*place_row)(const std::int8_t* codes, std::int64_t depth, std::int64_t row,
                              std::int8_t* panel) = nullptr;
    // The slice of W for one tile in the order that `multiply` wants (cols * depth * regrouped bytes, w_stride
    // 16 * depth * regrouped); offsets[j] += what the sums of output feature j will have too much. Null: the packed
    // order is what it wants.
    void (*regroup)(const std::int8_t* w, std::int64_t w_stride, std::int64_t cols, std::int64_t depth,
                    std::int8_t* target, std::int32_t* offsets) = nullptr;
    void (*multiply)(const ProductTile& tile) = nullptr;
    // Begin a product of all of k by `cols` output features, whose sums wait in registers of their own for `multiply`
    // (EpilogueTile::next): so many pieces more, as far as there are. Null: it cannot be.
    void (*begin)(ProductTile& tile, std::int64_t pieces) = nullptr;
    // Before and behind a run of `multiply` in one thread, for panels of up to `rows` rows; may be null.
    void (*enter)(std::int64_t rows) = nullptr;
    void (*leave)() = nullptr;
};

// How long the sums are that products in float32 add up: the depth of a slice at most.
inline constexpr std::int64_t float_slice = 256;

// A product in float32, of rows of X by some columns of a matrix over a slice of the depth:
//
//   sums[i, j, p] = (0 or the sum before) + s,   s = fma(x[i, k], w[k, j], s) for k = p, p + places, ...
//
// weight_only has 4 places and 16 output features of W, plus their zeropoints, as columns; linear_backward has 1 place,
// the output features as depth and Kernels::gradient_cols input features as columns.
struct FloatTile {
    const float* x = nullptr;                // row-major
    const std::uint16_t* x_pairs = nullptr;  // X as Kernels::pair has made it, which is read instead; or null
    std::int64_t x_stride = 0;               // float_slice with 1 place
    std::int64_t rows = 0;
    const std::int8_t* w = nullptr;    // a packed block; only with 4 places
    const float* w_floats = nullptr;   // as `widen` or `dequantize_square` has made it, which is read instead; or null
    const float* zeropoint = nullptr;  // [16], or null: 0; only of `w`
    std::int64_t depth = 0;            // a multiple of `places`, of `w` one of 16; at most float_slice
    std::int64_t places = 0;
    bool first = true;      // whether it is the first slice: there is no sum before
    float* sums = nullptr;  // [rows, columns, places]
    // Of `w`: four packed blocks, `ahead_stride` bytes apart, of which depth / 16 lines each will be wanted later, and
    // are fetched meanwhile, a line of each in turn; or null.
    const std::int8_t* ahead = nullptr;
    std::int64_t ahead_stride = 0;
    // With x_pairs, how many bytes behind each of them another line is fetched, into the second-level cache; 0: none.
    std::int64_t far = 0;
};

// The most columns of a block of work.
inline constexpr std::int64_t most_cols = 256;

// The distance of the rows of `dequantize_columns`: no power of two, or they would push each other out of the cache.
inline constexpr std::int64_t outlier_stride = most_cols + 16;

// What the epilogue does to a tile of sums. All arrays begin at the tile's first row or column and can be read up to
// the next multiple of 16 columns.
struct EpilogueTile {
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    // The product: acc[i, j] - row_offsets[i] - col_offsets[j], modulo 2^32, or, where both of these are null, acc[i,
    // j]. Not read where `scaled` is given.
    const std::int32_t* acc = nullptr;
    const std::int32_t* row_offsets = nullptr;
    const std::int32_t* col_offsets = nullptr;
    const float* scaled = nullptr;  // the product with its scales applied, or null
    std::int64_t stride = 0;        // of `acc` or `scaled`
    const float* scale_x = nullptr;
    const float* scale_w = nullptr;
    // Rows that share their outliers: `outliers` of each, of which number o meets row o of outlier_w, or, where
    // outlier_columns is given, the codes of that column times scale_w, of packed W from the tile's first column on.
    std::int64_t outliers = 0;
    const float* outlier_x = nullptr;  // [outliers, rows], outlier_x_stride apart
    std::int64_t outlier_x_stride = 0;
    const std::int32_t* outlier_columns = nullptr;  // or null
    const std::int8_t* w = nullptr;
    std::int64_t w_stride = 0;
    // Rows with outliers of their own, one after the other: those of row i are outlier_begin[i] to outlier_begin[i + 1]
    // of outlier_x, which meet the columns at the same places of outlier_columns, where these are given.
    const std::int64_t* outlier_begin = nullptr;   // [rows + 1], or null
    const std::int32_t* outlier_places = nullptr;  // the rows of outlier_w that they meet else
    const float* outlier_w = nullptr;              // rows outlier_w_stride apart
    std::int64_t outlier_w_stride = outlier_stride;
    const float* bias = nullptr;  // or null
    bool gelu = false;            // whether y becomes Activation::gelu of itself (octavo/linear.hpp)
    // What will be multiplied next: cache lines to be fetched beside shared outliers, so many of each of as many blocks
    // as the tile has, which are `ahead_stride` bytes apart; or the product, to be begun beside them, or null.
    const std::int8_t* ahead = nullptr;
    std::int64_t ahead_lines = 0;
    std::int64_t ahead_stride = 0;
    ProductTile* next = nullptr;
};

struct Kernels {
    const char* isa;

    // --- conversion and quantization ---------------------------------------------------------------------------------

    // dst[i] = src[i * stride] as float32; src is f32, f16 or bf16 and needs no alignment.
    void (*load)(DType dtype, const void* src, std::int64_t stride, std::int64_t size, float* dst);
    // dst[places[i] * dst_stride + j] = src[j * stride + i], likewise, for `cols` <= most_cols rows of `count` values
    // next to each other, a row of dst for each place >= 0. Up to the next multiple of 16 rows there are zeros.
    void (*load_transposed)(DType dtype, const void* src, std::int64_t stride, std::int64_t cols, std::int64_t count,
                            const std::int32_t* places, float* dst, std::int64_t dst_stride);
    // dst[i * dst_stride] = src[columns[i] * stride], likewise.
    void (*load_columns)(DType dtype, const void* src, std::int64_t stride, const std::int32_t* columns,
                         std::int64_t count, float* dst, std::int64_t dst_stride);
    // dst[i * stride] = src[i], rounded half to even to f32, f16 or bf16.
    void (*store)(const float* src, std::int64_t size, DType dtype, void* dst, std::int64_t stride);
    // size >= 1.
    Range (*range)(const float* x, std::int64_t size);
    // Magnitudes are compared as bit patterns of their dtype without the sign, which order alike, with Inf and NaN on
    // top. The largest of |x[i]|; 0 of none.
    std::uint32_t (*largest_magnitude)(DType dtype, const void* x, std::int64_t size);
    // The largest x[i] & mask[i], as bit patterns of the dtype's size.
    std::uint32_t (*largest_masked)(DType dtype, const void* x, const void* mask, std::int64_t size);
    // maxima[i] = max(maxima[i], |x[i]|), without a sign.
    void (*raise_maxima)(DType dtype, const void* x, std::int64_t size, void* maxima);
    // halves[i] = |x[i]| as a float32, its upper 16 bits. Of bf16 these are x itself, whose signs the next two ignore.
    void (*upper_halves)(DType dtype, const void* x, std::int64_t size, std::uint16_t* halves);
    // bound <= 2^15.
    Survey (*survey)(const void* halves, std::int64_t size, std::uint16_t bound);
    // The places, ascending, of the halves >= limit <= 2^15, into memory for `size`; how many they are.
    std::int64_t (*find_halves)(const void* halves, std::int64_t size, std::uint16_t limit, std::int32_t* places);
    // target = each `block` (16, 64 or 256) of x, with 0 for the `count` excluded columns, which ascend, and up to the
    // end of the last block, times the Hadamard matrix over sqrt(block) (octavo/quantize.hpp). It may be x itself. The
    // largest magnitude of what comes out, as `largest_magnitude` has it.
    std::uint32_t (*rotate)(DType dtype, const void* x, std::int64_t size, std::int64_t block,
                            const std::int32_t* excluded, std::int64_t count, float* target);
    // codes[i] = rint(x[i] * 127 / absmax), for absmax > 0 and |x[i]| <= absmax; other x[i] give any code.
    void (*encode_absmax)(DType dtype, const void* x, std::int64_t size, float absmax, std::int8_t* codes);
    // codes[i] = rint(x[i] * (127 / absmax)), likewise.
    void (*encode_rotated)(const float* x, std::int64_t size, float absmax, std::int8_t* codes);
    // codes[i] = stochastic_code(x[i], scale, words_of(row, i / 4, seed).words[i % 4]) (octavo/stochastic.hpp),
    // for |x[i] / scale| < 2^22, or a scale that is 0 or not finite.
    void (*encode_stochastic)(const float* x, std::int64_t size, float scale, std::int64_t row, std::uint64_t seed,
                              std::int8_t* codes);
    // codes[i] = clip(rint(nd * x[i]) - zeropoint, -127, 127), for finite nd * x[i].
    void (*encode_zeropoint)(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes);
    // sum_i codes[i]; size <= 2^24.
    std::int32_t (*sum)(const std::int8_t* codes, std::int64_t size);

    // --- the product -------------------------------------------------------------------------------------------------

    // One block of 16 rows in packed order: rows of `k` codes, `cols` <= 16 of them, padded with zeros.
    void (*pack)(const std::int8_t* codes, std::int64_t stride, std::int64_t cols, std::int64_t k, std::int8_t* packed);
    // The transpose of packed codes: of the first 16 input features and of `count` output features, a multiple of 16,
    // of W, `w_stride` bytes from block to block, one block of 16 rows of W^T, `count` codes deep.
    void (*transpose)(const std::int8_t* w, std::int64_t w_stride, std::int64_t count, std::int8_t* target);
    // For a call of up to few->block_rows rows of X, of up to some->block_rows, and for all others.
    const Plan* few;
    const Plan* some;
    const Plan* many;

    // --- products in float32 -----------------------------------------------------------------------------------------

    // target[k / 4, j, k % 4] = w[j, k] + zeropoint[j] (null: 0), over `depth` along k of a packed block of 16 output
    // features.
    void (*widen)(const std::int8_t* w, std::int64_t depth, const float* zeropoint, float* target);
    // The columns of a FloatTile with 1 place: 16 or 32.
    std::int64_t gradient_cols;
    // target[j, h] = (w[j, h] + zeropoint[j]) * scale[j] for the first gradient_cols input features of packed W,
    // `w_stride` bytes from block to block, and `count` output features, a multiple of 16 and at most float_slice.
    void (*dequantize_square)(const std::int8_t* w, std::int64_t w_stride, std::int64_t count, const float* zeropoint,
                              const float* scale, float* target);
    // A row of X of bfloat16 in pairs (FloatTile::x_pairs): of every eight along k the first four in the upper halves
    // of 32 bits and the second four in the lower ones, four times over; `depth` a multiple of 8. False where sums
    // could be subnormal, or a value is not finite: these pairs must not be used. Null where nothing multiplies pairs.
    bool (*pair)(const float* x, std::int64_t depth, std::uint16_t* pairs);
    void (*multiply_floats)(const FloatTile& tile);
    // y[i, j] = ((sums[i, j, 0] + sums[i, j, 1]) + (sums[i, j, 2] + sums[i, j, 3])) * scale[j] for 16 output features.
    void (*finish_floats)(const float* sums, std::int64_t rows, const float* scale, float* y);

    // --- the outliers and the end ------------------------------------------------------------------------------------

    // target[i * outlier_stride + j] = (code + zeropoint[j]) * scale[j] over `cols` entries rounded up to 16 (zeropoint
    // null: 0), for the codes of column columns[c] of packed W, `w_stride` bytes from block to block, and i = rows[c].
    void (*dequantize_columns)(const std::int8_t* w, std::int64_t w_stride, const std::int32_t* columns,
                               const std::int32_t* rows, std::int64_t count, std::int64_t cols, const float* zeropoint,
                               const float* scale, float* target);
    // target[j] = (s / sqrt(block) + zeropoint[j] * (place == 0 ? sqrt(block) : 0)) * scale[j] over `cols` entries, up
    // to the next multiple of 16 at most, s being the codes of a block (16, 64, 256) of a rotated weight, which packed
    // W begins with, times row `place` of Sylvester's matrix: column `place` of the block, rotated back.
    void (*rotate_back_column)(const std::int8_t* w, std::int64_t w_stride, std::int64_t block, std::int64_t place,
                               std::int64_t cols, const float* zeropoint, const float* scale, float* target);
    // y[i, j] = acc * (scale_x[i] * scale_w[j]), then y = fma(outlier x, outlier_w, y) for the row's outliers in order,
    // then y + bias[j], then gelu where that is asked for, in float32, in this order, rounded once to f32, f16 or bf16;
    // or, as i32, the product and no more. Rows of y are contiguous, y_stride bytes apart.
    void (*epilogue)(const EpilogueTile& tile, DType dtype, void* y, std::int64_t y_stride);
};

// Up to so many rows of a block are finished together.
inline constexpr std::int64_t few_rows = 32;

// The largest k for which a sum of products of int8 values (-128 included) fits an int32: floor((2^31 - 1) / 2^14),
// down to a multiple of 64.
inline constexpr std::int64_t max_int32_depth = 131008;

}  // namespace octavo::cpu
