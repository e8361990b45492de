// Codes back to floating point:  out[i, j] = (codes[i, j] + zeropoint[g]) * scale[g],  g the group of row i.
//
// A thread does 16 codes at a time where both sides are contiguous and aligned, else one.
#include <algorithm>

#include "device.cuh"
#include "operations.hpp"
#include "rotation.cuh"

namespace octavo::cuda {
namespace {

constexpr int threads = 256;
constexpr std::int64_t most_blocks = 1 << 16;

template <class T, int width>
__global__ void __launch_bounds__(threads) dequantize_kernel(View<const std::int8_t> codes, Span<const float> scale,
                                                             Span<const float> zeropoint, View<T> out) {
    const std::int64_t per_row = codes.cols / width;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < codes.rows * per_row;
         i += step) {
        const std::int64_t row = i / per_row;
        const std::int64_t col = i % per_row * width;
        const float factor = scale.of_group(row);
        const float shift = zeropoint.present() ? zeropoint.of_group(row) : 0.0F;
        if constexpr (width == 1) {
            *out.at(row, col) = from_float<T>((static_cast<float>(*codes.at(row, col)) + shift) * factor);
        } else {
            const auto pack = load<width>(codes.row(row) + col);
            constexpr int part = per_access<T> < width ? per_access<T> : width;
#pragma unroll
            for (int begin = 0; begin < width; begin += part) {
                Pack<T, part> result;
#pragma unroll
                for (int e = 0; e < part; ++e) {
                    result[e] = from_float<T>((static_cast<float>(pack[begin + e]) + shift) * factor);
                }
                store(out.row(row) + col + begin, result);
            }
        }
    }
}

// Rotated codes: a thread makes one number of all codes of its block.
template <class T>
__global__ void __launch_bounds__(threads)
    dequantize_rotated_kernel(View<const std::int8_t> codes, Span<const float> scale, Span<const float> zeropoint,
                              int rotation, View<T> out) {
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; i < out.rows * out.cols;
         i += step) {
        const std::int64_t row = i / out.cols;
        const std::int64_t col = i % out.cols;
        const float shift = zeropoint.present() ? zeropoint.of_group(row) : 0.0F;
        *out.at(row, col) = from_float<T>(rotated_back(codes, row, col, rotation, shift) * scale.of_group(row));
    }
}

}  // namespace

void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                cudaStream_t stream) {
    if (rotation != 0) {
        const std::int64_t blocks = std::min(blocks_for(out.rows * out.cols, threads), most_blocks);
        with_float(out.dtype, [&]<class T>(Type<T>) {
            launch(dequantize_rotated_kernel<T>, Grid{static_cast<unsigned>(blocks), threads}, stream,
                   view_of<std::int8_t>(codes), span_of<float>(scale), span_of<float>(zeropoint), rotation,
                   view_of<T>(out));
        });
        return;
    }
    constexpr int wide = 16;
    const bool can_be_wide = codes.cols % wide == 0 && rows_are_aligned(codes, wide) && rows_are_aligned(out, wide);
    const std::int64_t work = codes.rows * codes.cols / (can_be_wide ? wide : 1);
    if (work == 0) return;
    const std::int64_t blocks = blocks_for(work, threads);
    const Grid grid{static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks), threads};
    with_float(out.dtype, [&]<class T>(Type<T>) {
        launch(can_be_wide ? dequantize_kernel<T, wide> : dequantize_kernel<T, 1>, grid, stream,
               view_of<std::int8_t>(codes), span_of<float>(scale), span_of<float>(zeropoint), view_of<T>(out));
    });
}

}  // namespace octavo::cuda
