// Outlier columns, and the range that each column has, in one pass over X: what one scale for the whole matrix needs to
// know before it can leave out columns that are outliers anywhere. With a scale for each row it is not needed, as a
// row's range is found when the columns are known (quantize.cu).
//
// A block has 32 columns, one word of marks, and a part of the rows; its warps take rows in turn. The columns' ranges
// are combined by those who read them.
#include "device.cuh"
#include "memory.hpp"
#include "operations.hpp"
#include "ranges.cuh"

namespace octavo::cuda {
namespace {

constexpr int warps = 16;
constexpr int threads = warps * warp_size;

template <class T, Scheme scheme>
__global__ void __launch_bounds__(threads, 1)
    column_ranges_kernel(View<const Bits<T>> x, Outliers outliers, float threshold, Span<const std::int32_t> listed,
                         ColumnMarks marks, Range* ranges, std::int64_t rows_per_part) {
    __shared__ Range found[warps][warp_size];
    __shared__ std::uint32_t found_marks[warps];
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const std::int64_t column = std::int64_t{blockIdx.x} * warp_size + lane;
    const std::int64_t begin = blockIdx.y * rows_per_part;
    const std::int64_t end = begin + rows_per_part < x.rows ? begin + rows_per_part : x.rows;

    Range range;
    bool is_marked = false;
    if (outliers == Outliers::static_) {
        for (std::int64_t i = warp; i < listed.size; i += warps) is_marked |= listed[i] == column;
    }
    if (column < x.cols) {
#pragma unroll 4
        for (std::int64_t row = begin + warp; row < end; row += warps) {
            const Bits<T> bits = *x.at(row, column);
            if (outliers != Outliers::static_ && !(fabsf(number_of<T>(bits)) < threshold)) {
                is_marked = true;
                if (outliers == Outliers::rows) continue;
            }
            widen<T, scheme>(range, bits);
        }
    }
    found[warp][lane] = range;
    const std::uint32_t word = __ballot_sync(whole_warp, is_marked && column < x.cols);
    if (lane == 0) found_marks[warp] = word;
    __syncthreads();
    if (warp > 0) return;
    for (int w = 1; w < warps; ++w) widen(range, found[w][lane]);
    if (column < x.cols) ranges[blockIdx.y * x.cols + column] = range;
    if (lane > 0) return;
    std::uint32_t all = 0;
    for (const std::uint32_t other : found_marks) all |= other;
    marks.words[blockIdx.y * words_for(x.cols) + blockIdx.x] = all;
}

}  // namespace

void find_column_ranges(ConstMatrix x, Scheme scheme, Outliers outliers, float threshold, ConstVector listed,
                        ColumnMarks marks, Range* ranges, cudaStream_t stream) {
    if (x.cols == 0) return;
    const Grid grid{dim3(static_cast<unsigned>(words_for(x.cols)), static_cast<unsigned>(marks.parts)), threads};
    with_float(x.dtype, [&]<class T>(Type<T>) {
        launch(scheme == Scheme::absmax ? column_ranges_kernel<T, Scheme::absmax>
                                        : column_ranges_kernel<T, Scheme::zeropoint>,
               grid, stream, view_of<Bits<T>>(x), outliers, threshold, span_of<std::int32_t>(listed), marks, ranges,
               blocks_for(x.rows, marks.parts));
    });
}

}  // namespace octavo::cuda
