// Outlier columns, and the range that each column has, in one pass over X: what one scale for the whole matrix needs to
// know before it can leave out columns that are outliers anywhere. With a scale for each row it is not needed, as a
// row's range is found when the columns are known (quantize.cu).
//
// A block has 32 columns, one word of marks, and a part of the rows. A lane reads 16 bytes of a row, so a few lanes
// have one and a warp has several at a time (where elements lie apart: one element, and one row), with eight of these
// under way. Narrow tiles of many rows, because the columns' ranges are combined by those who read them: each of those
// reads the ranges of all parts.
#include <algorithm>
#include <type_traits>

#include "ahead.cuh"
#include "bits.cuh"
#include "device.cuh"
#include "memory.hpp"
#include "operations.hpp"
#include "ranges.cuh"

namespace octavo::cuda {
namespace {

constexpr int warps = 16;
constexpr int threads = warps * warp_size;
constexpr int rows_under_way = 8;

// What of X a lane has seen of its columns. Bit e of `marks`: the e-th of them has an outlier.
template <class T, Scheme scheme, int columns>
struct Seen {
    Range ranges[columns];
    std::uint32_t marks = 0;

    __device__ void take(int e, Bits<T> bits, bool per_element, float threshold) {
        if (is_outlier(number_of<T>(bits), threshold)) {
            marks |= 1U << e;
            if (per_element) return;
        }
        widen<T, scheme>(ranges[e], bits);
    }

    // Takes in what the lanes have seen that have other rows of the same columns.
    __device__ void combine() {
#pragma unroll
        for (int distance = warp_size / columns; distance < warp_size; distance *= 2) {
#pragma unroll
            for (int e = 0; e < columns; ++e) {
                Range& range = ranges[e];
                widen(range.high, __shfl_xor_sync(whole_warp, range.high, distance));
                if (scheme == Scheme::zeropoint) widen(range.low, __shfl_xor_sync(whole_warp, range.low, distance));
            }
        }
    }
};

template <class T, Scheme scheme, bool wide>
__global__ void __launch_bounds__(threads, 1)
    column_ranges_kernel(View<const Bits<T>> x, bool per_element, float threshold, ColumnMarks marks, Range* ranges,
                         std::int64_t rows_per_part, Ahead ahead) {
    constexpr int own = wide ? per_access<T> : 1;  // columns of a lane, and rows of a warp
    constexpr int across = warp_size / own;        // lanes of a row
    __shared__ Range found[warps][warp_size];
    __shared__ std::uint32_t found_marks[warps];
    ask_for(ahead);
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const std::int64_t first_column = std::int64_t{blockIdx.x} * warp_size;
    const int place = lane % across * own;  // of the lane's columns among the 32
    const std::int64_t column = first_column + place;
    const std::int64_t begin = blockIdx.y * rows_per_part;
    const std::int64_t end = begin + rows_per_part < x.rows ? begin + rows_per_part : x.rows;
    constexpr std::int64_t step = warps * own;

    Seen<T, scheme, own> seen;
    if (wide && column + own <= x.cols) {
        for (std::int64_t row = begin + warp * own + lane / across; row < end; row += rows_under_way * step) {
            Quad quads[rows_under_way];
#pragma unroll
            for (int r = 0; r < rows_under_way; ++r) {
                const std::int64_t at = row + r * step;
                quads[r] = Quad{};
                if (at < end) quads[r] = load<4>(reinterpret_cast<const std::uint32_t*>(x.row(at) + column));
            }
#pragma unroll
            for (int r = 0; r < rows_under_way; ++r) {
                if (row + r * step >= end) continue;
#pragma unroll
                for (int e = 0; e < own; ++e) {
                    seen.take(e, static_cast<Bits<T>>(element_bits<T>(quads[r], e)), per_element, threshold);
                }
            }
        }
    } else {
#pragma unroll
        for (int e = 0; e < own; ++e) {
            if (column + e >= x.cols) continue;
#pragma unroll rows_under_way
            for (std::int64_t row = begin + warp * own + lane / across; row < end; row += step) {
                seen.take(e, *x.at(row, column + e), per_element, threshold);
            }
        }
    }
    seen.combine();
    if (lane < across) {
#pragma unroll
        for (int e = 0; e < own; ++e) found[warp][place + e] = seen.ranges[e];
    }
    std::uint32_t word = seen.marks << place;
    word = reduce_warp(word, [](std::uint32_t a, std::uint32_t b) { return a | b; });
    if (lane == 0) found_marks[warp] = word;
    __syncthreads();
    if (warp > 0) return;
    Range range = found[0][lane];
    for (int w = 1; w < warps; ++w) widen(range, found[w][lane]);
    if (first_column + lane < x.cols) ranges[blockIdx.y * x.cols + first_column + lane] = range;
    if (lane > 0) return;
    std::uint32_t all = 0;
    for (const std::uint32_t other : found_marks) all |= other;
    marks.words[blockIdx.y * words_for(x.cols) + blockIdx.x] = all;
}

}  // namespace

std::int64_t range_parts(const ConstMatrix& x) {
    if (x.cols == 0) return 1;
    const std::int64_t parts = blocks_for(device_facts().multiprocessors, words_for(x.cols));
    return std::clamp<std::int64_t>(parts, 1, std::max<std::int64_t>(blocks_for(x.rows, warps), 1));
}

void find_column_ranges(ConstMatrix x, Scheme scheme, bool per_element, float threshold, ColumnMarks marks,
                        Range* ranges, const Ahead& ahead, cudaStream_t stream) {
    if (x.cols == 0) return;
    const Grid grid{dim3(static_cast<unsigned>(words_for(x.cols)), static_cast<unsigned>(marks.parts)), threads};
    const bool wide = rows_are_aligned(x, 16);
    with_float(x.dtype, [&]<class T>(Type<T>) {
        const auto start = [&]<Scheme s>(std::integral_constant<Scheme, s>) {
            launch(wide ? column_ranges_kernel<T, s, true> : column_ranges_kernel<T, s, false>, grid, stream,
                   view_of<Bits<T>>(x), per_element, threshold, marks, ranges, blocks_for(x.rows, marks.parts), ahead);
        };
        switch (scheme) {
            case Scheme::absmax: return start(std::integral_constant<Scheme, Scheme::absmax>{});
            case Scheme::zeropoint: return start(std::integral_constant<Scheme, Scheme::zeropoint>{});
        }
    });
}

}  // namespace octavo::cuda
