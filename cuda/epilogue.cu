// Everything after the int8 product, in one pass over it (paper Eq. 8; zeropoint: Eq. 4-5):
//
//   y[i, j] = acc[i, j] * (scale_x[i] * scale_w[j]) + sum_{o in O} x[i, o] * w[j, o] + bias[j]
//
// in float32, rounded once. O and its size are read on the device, so the host need not wait for them.
//
// A block finishes a tile of `tile_rows` x 256. Each warp has rows of its own; a lane has columns 4 * lane .. + 3 of
// both halves of the tile, so that every access of a warp is contiguous: 16 bytes of acc, 8 or 16 of the output.
// Outlier columns come in chunks: their weights (256 columns of the tile) and their activations (rows of the tile) are
// brought to shared memory once for the block, and each lane does 4 x 8 multiplications for 8 + 4 values read from
// there. They are added one after the other in the order of the columns, from zero: adding the zeros that the policy
// `rows` makes of other rows' outliers changes nothing, so a row's result does not depend on the other rows.
#include <cfloat>

#include "criterion.cuh"
#include "device.cuh"
#include "operations.hpp"
#include "outlier_columns.cuh"

namespace octavo::cuda {
namespace {

constexpr int warps = 8;
constexpr int threads = warps * warp_size;
constexpr int tile_cols = 256;
constexpr int halves = 2;
constexpr int per_half = 4;              // columns of a lane
constexpr int mine = halves * per_half;  // all its columns
constexpr int chunk = 16;                // outlier columns at a time

template <class Y>
struct Arguments {
    const std::int32_t* acc;  // [parts, m, n]
    std::int64_t parts;
    std::int64_t depth;  // k
    CodedX coded;
    View<const std::int8_t> codes;
    Span<const float> scale_w;
    Span<const float> zeropoint_w;
    Span<const std::int32_t> code_sums;
    FloatSpan bias;
    OutlierColumns columns;
    ColumnList outliers;
    View<Y> out;
    bool wide;  // whether acc and out can be accessed 4 columns at a time
};

// What of a chunk of outlier columns a block keeps in shared memory.
template <int tile_rows, bool zeropoint>
struct Chunk {
    float weight[chunk][tile_cols];
    float x[chunk][tile_rows];
    std::int32_t column[chunk];
    int place[chunk];  // of the column among the kept ones
    // Only for zeropoint: the codes, which must be taken out of the sums over k, and for which elements.
    std::int8_t code[zeropoint ? chunk : 1][zeropoint ? tile_cols : 1];
    std::uint8_t is_outlier[zeropoint ? chunk : 1][zeropoint ? tile_rows : 1];
};

template <int tile_rows, bool zeropoint, class Y>
__device__ void load_chunk(const Arguments<Y>& a, std::int64_t begin, int count, std::int64_t row0, std::int64_t col0,
                           Chunk<tile_rows, zeropoint>& shared) {
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < count) {
        const std::int32_t column = a.outliers.columns[begin + thread];
        shared.column[thread] = column;
        shared.place[thread] = a.columns.place_of(column);
    }
    __syncthreads();
    for (int e = thread; e < count * tile_cols; e += threads) {
        const int o = e / tile_cols;
        const int c = e % tile_cols;
        const std::int64_t j = col0 + c;
        float weight = 0.0F;
        if (j < a.out.cols) {
            if constexpr (zeropoint) shared.code[o][c] = *a.codes.at(j, shared.column[o]);
            weight = shared.place[o] >= 0 ? a.columns.kept_weight(j, shared.place[o])
                                          : a.columns.dequantized(j, shared.column[o]);
        }
        shared.weight[o][c] = weight;
    }
    for (int e = thread; e < count * tile_rows; e += threads) {
        const int o = e / tile_rows;
        const int r = e % tile_rows;
        const std::int64_t i = row0 + r;
        const bool is_row = i < a.out.rows;
        const float x = is_row ? a.columns.x(i, shared.column[o]) : 0.0F;
        const bool takes_part = is_row && a.columns.takes_part(x, i, shared.column[o]);
        shared.x[o][r] = takes_part ? x : 0.0F;
        // With rotation no code is left out of the product.
        if constexpr (zeropoint) shared.is_outlier[o][r] = takes_part && a.columns.rotation == 0 ? 1 : 0;
    }
    __syncthreads();
}

// The exact sum of the products of codes, of all parts of k.
template <class Y>
__device__ void load_sums(const Arguments<Y>& a, std::int64_t i, std::int64_t j, int count,
                          std::int64_t (&sums)[per_half]) {
#pragma unroll
    for (int c = 0; c < per_half; ++c) sums[c] = 0;
    for (std::int64_t part = 0; part < a.parts; ++part) {
        const std::int32_t* const acc = a.acc + (part * a.out.rows + i) * a.out.cols + j;
        if (a.wide) {
            const auto pack = load<per_half>(acc);
#pragma unroll
            for (int c = 0; c < per_half; ++c) sums[c] += pack[c];
        } else {
#pragma unroll
            for (int c = 0; c < per_half; ++c) {
                if (c < count) sums[c] += acc[c];
            }
        }
    }
}

// acc * (scale_x * scale_w), the smaller scale first where the product of the scales alone overflows; with the other
// terms of Eq. 4-5 where there are zeropoints. Those are large and cancel, so they are added as float64, where they are
// exact unless zeropoints are beyond 2^20.
template <bool zeropoint, class Y>
__device__ float scaled(const Arguments<Y>& a, std::int64_t acc, std::int64_t i, std::int64_t j, int row_outliers,
                        std::int32_t outlier_codes) {
    const std::int64_t group = a.coded.groups == 1 ? 0 : i;
    const float scale_x = a.coded.scale[group];
    const float scale_w = a.scale_w.of_group(j);
    if constexpr (!zeropoint) {
        const float scale = scale_x * scale_w;
        if (!(scale > FLT_MAX)) return static_cast<float>(acc) * scale;
        return static_cast<float>(acc) * fminf(scale_x, scale_w) * fmaxf(scale_x, scale_w);
    }
    const double zx = a.coded.zeropoint[group];
    const double zw = a.zeropoint_w.of_group(j);
    const auto depth = static_cast<double>(a.depth - row_outliers);
    const auto sum_w = static_cast<double>(a.code_sums[j] - outlier_codes);
    const double sum = static_cast<double>(acc) + zw * a.coded.sums[i] + zx * sum_w + depth * zx * zw;
    return static_cast<float>(sum * (static_cast<double>(scale_x) * static_cast<double>(scale_w)));
}

// Two blocks to a multiprocessor.
template <int rows_per_warp, bool zeropoint, class Y>
__global__ void __launch_bounds__(threads, 2) epilogue_kernel(const Arguments<Y> a) {
    if constexpr (compiled_for < first_fused_architecture) {
        constexpr int tile_rows = warps * rows_per_warp;
        __shared__ Chunk<tile_rows, zeropoint> shared;
        const int lane = static_cast<int>(threadIdx.x) % warp_size;
        const int first_row = static_cast<int>(threadIdx.x) / warp_size * rows_per_warp;
        const std::int64_t col_tiles = (a.out.cols + tile_cols - 1) / tile_cols;
        const std::int64_t row0 = blockIdx.x / col_tiles * tile_rows;
        const std::int64_t col0 = blockIdx.x % col_tiles * tile_cols;

        float update[rows_per_warp][mine] = {};
        int row_outliers[zeropoint ? rows_per_warp : 1] = {};
        std::int32_t outlier_codes[zeropoint ? rows_per_warp : 1][zeropoint ? mine : 1] = {};
        const std::int32_t outliers = a.outliers.count != nullptr ? *a.outliers.count : 0;
        for (std::int32_t begin = 0; begin < outliers; begin += chunk) {
            const int count = outliers - begin < chunk ? outliers - begin : chunk;
            load_chunk(a, begin, count, row0, col0, shared);
            for (int o = 0; o < count; ++o) {
#pragma unroll
                for (int h = 0; h < halves; ++h) {
                    const int c0 = h * (tile_cols / halves) + per_half * lane;
                    const auto w = load<per_half>(&shared.weight[o][c0]);
#pragma unroll
                    for (int r = 0; r < rows_per_warp; ++r) {
                        const float x = shared.x[o][first_row + r];
#pragma unroll
                        for (int c = 0; c < per_half; ++c) {
                            float& sum = update[r][h * per_half + c];
                            sum = fmaf(x, w[c], sum);
                        }
                        if constexpr (zeropoint) {
                            if (shared.is_outlier[o][first_row + r] == 0) continue;
                            if (h == 0) ++row_outliers[r];
#pragma unroll
                            for (int c = 0; c < per_half; ++c) {
                                outlier_codes[r][h * per_half + c] += shared.code[o][c0 + c];
                            }
                        }
                    }
                }
            }
            __syncthreads();
        }

#pragma unroll
        for (int h = 0; h < halves; ++h) {
            const std::int64_t j0 = col0 + h * (tile_cols / halves) + per_half * lane;
            if (j0 >= a.out.cols) continue;
            const int count = a.out.cols - j0 < per_half ? static_cast<int>(a.out.cols - j0) : per_half;
#pragma unroll
            for (int r = 0; r < rows_per_warp; ++r) {
                const std::int64_t i = row0 + first_row + r;
                if (i >= a.out.rows) continue;
                std::int64_t sums[per_half];
                load_sums(a, i, j0, count, sums);
                Pack<Y, per_half> y;
#pragma unroll
                for (int c = 0; c < per_half; ++c) {
                    if (c >= count) continue;
                    const std::int64_t j = j0 + c;
                    const float product = [&] {
                        if constexpr (zeropoint) {
                            return scaled<true>(a, sums[c], i, j, row_outliers[r], outlier_codes[r][h * per_half + c]);
                        } else {
                            return scaled<false>(a, sums[c], i, j, 0, 0);
                        }
                    }();
                    const float bias = a.bias.present() ? a.bias[j] : 0.0F;
                    y[c] = from_float<Y>(product + update[r][h * per_half + c] + bias);
                }
                if (a.wide) {
                    store(a.out.at(i, j0), y);
                } else {
#pragma unroll
                    for (int c = 0; c < per_half; ++c) {
                        if (c < count) *a.out.at(i, j0 + c) = y[c];
                    }
                }
            }
        }
    } else {
        must_not_run();
    }
}

}  // namespace

void finish_linear(const std::int32_t* acc, const CodedX& coded, ConstMatrix x, const WeightView& weight,
                   ConstVector bias, const ColumnList& outliers, bool per_element, const ElementCriterion& elements,
                   Matrix out, cudaStream_t stream) {
    const bool wide = out.cols % per_half == 0 && rows_are_aligned(out, per_half * size_of(out.dtype));
    const std::int64_t col_tiles = blocks_for(out.cols, tile_cols);
    with_float(out.dtype, [&]<class Y>(Type<Y>) {
        const Arguments<Y> arguments{
            .acc = acc,
            .parts = product_parts(weight.codes.cols),
            .depth = weight.codes.cols,
            .coded = coded,
            .codes = view_of<std::int8_t>(weight.codes),
            .scale_w = span_of<float>(weight.scale),
            .zeropoint_w = span_of<float>(weight.zeropoint),
            .code_sums = span_of<std::int32_t>(weight.code_sums),
            .bias = float_span_of(bias),
            .columns = outlier_columns_of(x, weight, per_element, elements),
            .outliers = outliers,
            .out = view_of<Y>(out),
            .wide = wide,
        };
        const auto start = [&](auto kernel, int rows_per_warp) {
            const std::int64_t row_tiles = blocks_for(out.rows, std::int64_t{warps} * rows_per_warp);
            launch(kernel, {static_cast<unsigned>(col_tiles * row_tiles), threads}, stream, arguments);
        };
        // Few rows make few tiles of many rows: then smaller ones fill the device better.
        const bool few = out.rows <= 2 * warps;
        if (weight.scheme == Scheme::zeropoint) {
            start(epilogue_kernel<1, true, Y>, 1);
        } else if (few) {
            start(epilogue_kernel<1, false, Y>, 1);
        } else {
            start(epilogue_kernel<4, false, Y>, 4);
        }
    });
}

}  // namespace octavo::cuda
