// The inner loops of the CPU backend, one table of them per instruction set.
//
// The sources beside this header are compiled once per instruction set with other flags (CMakeLists.txt) and fill one
// table each; isa.cpp picks the table at run time. They work on contiguous rows and packed int8 blocks, know no threads
// and allocate nothing. All tables give identical codes and integers; sums of floats may differ in the last place,
// where an instruction set has fused multiply-add.
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

// Magnitudes of a run of floats as bit patterns of their dtype without the sign, which order like the magnitudes, with
// Inf and NaN on top: the largest, and the largest of those below a limit (0 where there is none).
struct Magnitudes {
    std::uint32_t largest;
    std::uint32_t largest_below;
};

// A tile of the int8 product. X is row-major, `depth` bytes of each row are read; W is packed (cpu/packed.hpp).
struct ProductTile {
    const std::int8_t* x;        // codes, + 128 where Kernels::x_is_unsigned
    std::int64_t x_stride;       // bytes from row to row
    std::int64_t rows;           // 1 to Kernels::tile_rows
    const std::int8_t* w;        // the first block of 16 output features
    std::int64_t w_stride;       // bytes from block to block
    const std::int32_t* w_sums;  // of each output feature's codes over `depth`
    std::int64_t cols;           // a multiple of 16, to Kernels::tile_cols
    std::int64_t depth;          // a multiple of 64; at most max_int32_depth
    std::int32_t* acc;           // [rows, tile_cols], cache-line aligned
};

// What the epilogue does to one row of a tile.
struct EpilogueRow {
    const std::int32_t* acc;  // the product; not read where `scaled` is given
    const float* scaled;      // the product with its scales applied, or null
    float scale_x;
    const float* scale_w;
    std::int64_t outliers;               // of the row
    const float* outlier_x;              // [outliers]
    const std::int32_t* outlier_places;  // [outliers]: their rows of outlier_w; null: 0, 1, 2, ...
    const float* outlier_w;              // [..., tile_cols]
    const float* bias;                   // or null
};

struct Kernels {
    const char* isa;

    // --- conversion and quantization ---------------------------------------------------------------------------------

    // dst[i] = src[i * stride] as float32; src is f32, f16 or bf16 and needs no alignment.
    void (*load)(DType dtype, const void* src, std::int64_t stride, std::int64_t size, float* dst);
    // dst[i * stride] = src[i], rounded half to even to f32, f16 or bf16.
    void (*store)(const float* src, std::int64_t size, DType dtype, void* dst, std::int64_t stride);
    // size >= 1.
    Range (*range)(const float* x, std::int64_t size);
    // `limit` is a bit pattern of the dtype.
    Magnitudes (*magnitudes)(DType dtype, const void* x, std::int64_t size, std::uint32_t limit);
    // mask[i] |= the bit pattern of |x[i]| >= limit
    void (*mark_outliers)(DType dtype, const void* x, std::int64_t size, std::uint32_t limit, std::uint8_t* mask);
    // codes[i] = rint(x[i] * 127 / absmax), for absmax > 0 and |x[i]| <= absmax; other x[i] give any code.
    void (*encode_absmax)(DType dtype, const void* x, std::int64_t size, float absmax, std::int8_t* codes);
    // codes[i] = clip(rint(nd * x[i]) - zeropoint, -127, 127), for finite nd * x[i].
    void (*encode_zeropoint)(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes);
    // codes[i] + 128 as an unsigned byte, or back.
    void (*flip_sign_bits)(std::int8_t* codes, std::int64_t size);
    // sum_i codes[i]; size <= 2^24.
    std::int32_t (*sum)(const std::int8_t* codes, std::int64_t size);
    // sum_i a[i] * b[i] in float32, over 64 interleaved partial sums.
    float (*dot)(const float* a, const float* b, std::int64_t size);

    // --- the product -------------------------------------------------------------------------------------------------

    // One block of 16 rows in packed order: rows of `k` codes, `cols` <= 16 of them, padded with zeros.
    void (*pack)(const std::int8_t* codes, std::int64_t stride, std::int64_t cols, std::int64_t k, std::int8_t* packed);
    // acc[i, j] = sum_k x[i, k] * w[j, k], the 128 of unsigned codes taken off again.
    void (*product)(const ProductTile& tile);
    bool x_is_unsigned;
    std::int64_t tile_rows;  // the most that a call of `product` takes, and what suits it best
    // target[j] = (code + zeropoint[j]) * scale[j] over `cols` entries rounded up to 16, for the codes of column `col`
    // of W (as in ProductTile).
    void (*dequantize_column)(const std::int8_t* w, std::int64_t w_stride, std::int64_t col, std::int64_t cols,
                              const float* zeropoint, const float* scale, float* target);
    // y = acc * (scale_x * scale_w) + sum_o outlier_x[o] * outlier_w[o] + bias in float32, over `cols` entries (up to
    // the next multiple of 16 are read), rounded once to contiguous f32, f16 or bf16.
    void (*epilogue)(const EpilogueRow& row, std::int64_t cols, DType dtype, void* y);
};

// The most columns of a tile, and the distance of the rows of `acc` and `outlier_w`.
inline constexpr std::int64_t tile_cols = 256;

// The largest k for which a sum of products of int8 values (-128 included) fits an int32: floor((2^31 - 1) / 2^14),
// down to a multiple of 64.
inline constexpr std::int64_t max_int32_depth = 131008;

}  // namespace octavo::cpu
