// Passes around the int8 product: operands copied to aligned rows before it, the parts of a deep product added after
// it.
#include "device.cuh"
#include "gemm.hpp"

namespace octavo::cuda {
namespace {

constexpr int threads = 256;

// --- aligned rows ---------------------------------------------------------------------------------------------------
//
// A block copies 64 x 64 codes by way of shared memory. They are read along the axis that is contiguous, one byte per
// thread, and written 16 bytes per thread along the rows.

constexpr int tile = 64;
constexpr int chunk = 16;
constexpr int tile_stride = tile + 4;  // rows of a column lie in different banks

__global__ void __launch_bounds__(threads)
    copy_kernel(View<const std::int8_t> codes, std::int8_t* copy, std::int64_t width, bool along_rows) {
    __shared__ std::int8_t shared[tile][tile_stride];
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t tiles_across = (width + tile - 1) / tile;
    const std::int64_t row0 = blockIdx.x / tiles_across * tile;
    const std::int64_t col0 = blockIdx.x % tiles_across * tile;
#pragma unroll 4
    for (int e = thread; e < tile * tile; e += threads) {
        const int r = along_rows ? e / tile : e % tile;
        const int c = along_rows ? e % tile : e / tile;
        const bool inside = row0 + r < codes.rows && col0 + c < codes.cols;
        shared[r][c] = inside ? *codes.at(row0 + r, col0 + c) : std::int8_t{0};
    }
    __syncthreads();
    static_assert(tile * tile == chunk * threads);
    const int r = thread / (tile / chunk);
    const int c = thread % (tile / chunk) * chunk;
    if (row0 + r >= codes.rows || col0 + c >= width) return;
    Pack<std::int8_t, chunk> pack;
#pragma unroll
    for (int e = 0; e < chunk; ++e) pack[e] = shared[r][c + e];
    store(copy + (row0 + r) * width + col0 + c, pack);
}

// --- parts of a deep product ----------------------------------------------------------------------------------------

__global__ void __launch_bounds__(threads)
    sum_kernel(const std::int32_t* acc, std::int64_t parts, View<std::int32_t> out, unsigned long long* overflow) {
    const std::int64_t size = out.rows * out.cols;
    const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * threads;
    for (std::int64_t e = static_cast<std::int64_t>(blockIdx.x) * threads + threadIdx.x; e < size; e += step) {
        std::int64_t sum = 0;
        for (std::int64_t part = 0; part < parts; ++part) sum += acc[part * size + e];
        const auto value = static_cast<std::int32_t>(sum);
        if (value != sum) atomicMin(overflow, static_cast<unsigned long long>(e));
        *out.at(e / out.cols, e % out.cols) = value;
    }
}

}  // namespace

void copy_aligned(ConstMatrix codes, std::int8_t* copy, std::int64_t width, cudaStream_t stream) {
    const std::int64_t blocks = blocks_for(codes.rows, tile) * blocks_for(width, tile);
    if (blocks == 0) return;
    launch(copy_kernel, {static_cast<unsigned>(blocks), threads}, stream, view_of<std::int8_t>(codes), copy, width,
           codes.row_stride != 1 || codes.col_stride == 1);
}

void sum_parts(const std::int32_t* acc, std::int64_t parts, Matrix out, unsigned long long* overflow,
               cudaStream_t stream) {
    constexpr std::int64_t most_blocks = 1 << 16;
    check(cudaMemsetAsync(overflow, 0xFF, sizeof *overflow, stream), "cudaMemsetAsync");
    const std::int64_t blocks = blocks_for(out.rows * out.cols, threads);
    if (blocks == 0) return;
    launch(sum_kernel, {static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks), threads}, stream, acc,
           parts, view_of<std::int32_t>(out), overflow);
}

}  // namespace octavo::cuda
