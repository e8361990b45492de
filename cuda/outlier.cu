// Outlier columns:  O = { j : there is an i with not (|x[i, j]| < threshold) }   (paper section 3.2)
//
// X is read once. A block has a tile of columns, 512 bytes wide, and a part of the rows; its warps take rows in turn, a
// lane 16 bytes of a row, with eight rows under way. A lane keeps the largest magnitudes it has seen of its columns, as
// bit patterns; in the end they are the largest over the warps, and compared with the threshold once. That is exact:
// the largest pattern is a NaN where a column holds one, and else that of the largest magnitude.
//
// Every block writes the words of its own tile and part, so that nothing is cleared first and nothing is atomic. The
// parts are as many as give each multiprocessor a block; 64 KiB under way there cover the latency of memory.
#include <algorithm>

#include "ahead.cuh"
#include "bits.cuh"
#include "device.cuh"
#include "marks.cuh"
#include "memory.hpp"
#include "operations.hpp"
#include "ptx.cuh"

namespace octavo::cuda {
namespace {

constexpr int mark_warps = 16;
constexpr int mark_threads = mark_warps * warp_size;
constexpr int rows_under_way = 8;

// Columns of a tile: a multiple of 32, so that a word belongs to one tile.
__host__ __device__ constexpr std::int64_t tile_columns(std::int64_t bytes_of_element) {
    return warp_size * 16 / bytes_of_element;
}

// Columns of a lane: neighbours where they are read by one access, else as far apart as neighbouring lanes read
// neighbouring elements.
template <class T, bool wide>
__device__ std::int64_t column_in_tile(int lane, int index) {
    return wide ? lane * per_access<T> + index : index * warp_size + lane;
}

// The largest magnitudes of rows `row`, `row + mark_warps` and so on; `read` gives a lane's columns of a row.
template <class T, int under_way, class Read>
__device__ Quad largest_of(std::int64_t row, std::int64_t end, Read read) {
    Quad largest{};
    for (; row < end; row += mark_warps * under_way) {
        Quad quads[under_way];
#pragma unroll
        for (int r = 0; r < under_way; ++r) {
            quads[r] = Quad{};
            if (row + r * mark_warps < end) quads[r] = read(row + r * mark_warps);
        }
#pragma unroll
        for (int r = 0; r < under_way; ++r) {
#pragma unroll
            for (int w = 0; w < 4; ++w) largest[w] = max_magnitudes<T>(largest[w], quads[r][w]);
        }
    }
    return largest;
}

// One block to a multiprocessor is what the launcher asks for; for two the compiler would spill.
template <class T, bool wide>
__global__ void __launch_bounds__(mark_threads, 1)
    mark_kernel(View<const Bits<T>> x, float threshold, ColumnMarks marks, std::int64_t rows_per_part, Ahead ahead) {
    __shared__ Quad found[mark_warps][warp_size];
    let_next_launch_begin();
    ask_for(ahead);
    if (blockIdx.y >= marks.parts) return;  // it was there to ask
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
    const int warp = static_cast<int>(threadIdx.x) / warp_size;
    const std::int64_t first_column = blockIdx.x * tile_columns(sizeof(T));
    const std::int64_t begin = blockIdx.y * rows_per_part;
    const std::int64_t end = begin + rows_per_part < x.rows ? begin + rows_per_part : x.rows;

    const std::int64_t own = first_column + column_in_tile<T, wide>(lane, 0);
    Quad largest{};
    if (wide && own + per_access<T> <= x.cols) {
        largest = largest_of<T, rows_under_way>(begin + warp, end, [&](std::int64_t row) {
            return load<4>(reinterpret_cast<const std::uint32_t*>(x.row(row) + own));
        });
    } else {
        largest = largest_of<T, wide ? 1 : 2>(begin + warp, end, [&](std::int64_t row) {
            Quad quad{};
#pragma unroll
            for (int e = 0; e < per_access<T>; ++e) {
                const std::int64_t column = first_column + column_in_tile<T, wide>(lane, e);
                if (column < x.cols) put_element<T>(quad, e, *x.at(row, column));
            }
            return quad;
        });
    }
    found[warp][lane] = largest;
    __syncthreads();

    // From here on a warp has one word, a lane one column.
    if (warp >= per_access<T>) return;
    const int place = warp * warp_size + lane;
    const int owner = wide ? place / per_access<T> : lane;
    const int index = wide ? place % per_access<T> : warp;
    std::uint32_t magnitude = 0;
    for (int w = 0; w < mark_warps; ++w) {
        const std::uint32_t other = element_bits<T>(found[w][owner], index);
        magnitude = magnitude > other ? magnitude : other;
    }
    const bool is_column = begin < end && first_column + place < x.cols;
    const std::uint32_t word = __ballot_sync(whole_warp, is_column && is_outlier(number_of<T>(magnitude), threshold));
    const std::int64_t words = words_for(x.cols);
    const std::int64_t target = blockIdx.x * std::int64_t{per_access<T>} + warp;
    if (lane == 0 && target < words) marks.words[blockIdx.y * words + target] = word;
}

// A block makes `words_per_block` words, of columns that anywhere in the list are named.
constexpr int list_threads = 512;
constexpr std::int64_t words_per_block = 4096;

__global__ void __launch_bounds__(list_threads)
    mark_listed_kernel(Span<const std::int32_t> columns, std::int64_t k, std::uint32_t* words) {
    __shared__ std::uint32_t marked[words_per_block];
    const std::int64_t first = blockIdx.x * words_per_block;
    const std::int64_t rest = words_for(k) - first;
    const std::int64_t size = rest < words_per_block ? rest : words_per_block;
    for (std::int64_t w = threadIdx.x; w < size; w += list_threads) marked[w] = 0;
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < columns.size; i += list_threads) {
        const std::int64_t column = columns[i];
        const std::int64_t word = column / 32 - first;
        if (column >= 0 && column < k && word >= 0 && word < size) atomicOr(&marked[word], 1U << (column % 32));
    }
    __syncthreads();
    for (std::int64_t w = threadIdx.x; w < size; w += list_threads) words[first + w] = marked[w];
}

__global__ void __launch_bounds__(list_threads)
    list_kernel(ColumnMarks marks, std::int64_t k, Span<std::int32_t> columns, Span<std::int32_t> count) {
    list_marked(marks, k, columns, count);
}

}  // namespace

std::int64_t mark_parts(const ConstMatrix& x) {
    if (x.cols == 0) return 1;
    const std::int64_t tiles = blocks_for(x.cols, tile_columns(size_of(x.dtype)));
    const std::int64_t parts = blocks_for(device_facts().multiprocessors, tiles);
    return std::clamp<std::int64_t>(parts, 1, std::max<std::int64_t>(blocks_for(x.rows, mark_warps), 1));
}

void mark_outliers(ConstMatrix x, float threshold, ColumnMarks marks, const Ahead& ahead, cudaStream_t stream) {
    if (x.cols == 0) return;
    const std::int64_t tiles = blocks_for(x.cols, tile_columns(size_of(x.dtype)));
    const std::int64_t rows_per_part = blocks_for(x.rows, marks.parts);
    const std::int64_t parts = std::max(marks.parts, blocks_for(blocks_to_ask(ahead), tiles));
    const Grid grid{dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(parts)), mark_threads};
    with_float(x.dtype, [&]<class T>(Type<T>) {
        launch(rows_are_aligned(x, 16) ? mark_kernel<T, true> : mark_kernel<T, false>, grid, stream,
               view_of<Bits<T>>(x), threshold, marks, rows_per_part, ahead);
    });
}

void mark_listed(ConstVector columns, std::int64_t k, ColumnMarks marks, cudaStream_t stream) {
    if (k == 0) return;
    const Grid grid{static_cast<unsigned>(blocks_for(words_for(k), words_per_block)), list_threads};
    launch(mark_listed_kernel, grid, stream, span_of<std::int32_t>(columns), k, marks.words);
}

void find_outliers(ConstMatrix x, const LinearOptions& options, Vector columns, Vector count, cudaStream_t stream) {
    Workspace workspace(stream);
    const std::int64_t parts = needs_limits(options) ? criterion_parts(x.rows, false) : mark_parts(x);
    const auto words = workspace.reserve<std::uint32_t>(parts * words_for(x.cols));
    const auto maxima = workspace.reserve<std::uint32_t>(needs_limits(options) ? x.cols : 0);
    workspace.allocate();
    const ColumnMarks marks{.words = workspace.at(words), .parts = parts};
    if (needs_limits(options)) {
        apply_criterion(x, options, marks, workspace.at(maxima), nullptr, {}, stream);
    } else {
        mark_outliers(x, options.threshold, marks, {}, stream);
    }
    launch(list_kernel, Grid{1, list_threads}, stream, marks, x.cols, span_of<std::int32_t>(columns),
           span_of<std::int32_t>(count));
}

int architecture_of_code() {
    cudaFuncAttributes attributes{};
    check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(list_kernel)), "cudaFuncGetAttributes");
    return attributes.ptxVersion;
}

}  // namespace octavo::cuda
