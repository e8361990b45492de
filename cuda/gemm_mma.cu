// The int8 product by itself, exact in int32: tiles of mma_tile.cuh, whose sums are stored.
#include <type_traits>

#include "gemm.hpp"
#include "memory.hpp"
#include "mma_tile.cuh"
#include "operations.hpp"

namespace octavo::cuda {
namespace {

// --- what becomes of the sums ---------------------------------------------------------------------------------------

// Stores them.
struct StoreSums {
    View<std::int32_t> out;
    bool wide;  // whether four columns can be stored at once

    // Columns j to j + count - 1 of row i.
    __device__ void operator()(std::int64_t i, std::int64_t j, int count,
                               const Pack<std::int32_t, together>& sums) const {
        if (wide) {
            store(out.at(i, j), sums);
            return;
        }
#pragma unroll
        for (int c = 0; c < together; ++c) {
            if (c < count) *out.at(i, j + c) = sums[c];
        }
    }
};

// Adds them to what is there: where several blocks share a tile's k. Integers, so their order does not matter.
struct AddSums {
    View<std::int32_t> out;

    __device__ void operator()(std::int64_t i, std::int64_t j, int count,
                               const Pack<std::int32_t, together>& sums) const {
#pragma unroll
        for (int c = 0; c < together; ++c) {
            if (c < count) atomicAdd(out.at(i, j + c), sums[c]);
        }
    }
};

template <class Tile, class Finish>
__device__ void finish_tile(const Sums<Tile>& sums, const Job& job, std::int64_t m, std::int64_t n,
                            const Finish& finish) {
    const Place<Tile> place;
    const std::int64_t i0 = job.row0 + place.row + place.lane / 4;
    const std::int64_t j0 = job.col0 + place.col + place.lane % 4 * together;
#pragma unroll
    for (int u = 0; u < Tile::col_fragments; u += 2) {
        const std::int64_t j = j0 + u / 2 * bundle;
        if (j >= n) continue;
        const int count = n - j < together ? static_cast<int>(n - j) : together;
#pragma unroll
        for (int t = 0; t < Tile::row_fragments; ++t) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const std::int64_t i = i0 + t * 16 + half * 8;
                if (i >= m) continue;
                finish(i, j, count,
                       {{sums[t][u][2 * half], sums[t][u][2 * half + 1], sums[t][u + 1][2 * half],
                         sums[t][u + 1][2 * half + 1]}});
            }
        }
    }
}

// --- kernel ---------------------------------------------------------------------------------------------------------

template <class Tile, SliceCopy copy, class Finish>
__global__ void __launch_bounds__(Tile::threads, copy == SliceCopy::async ? Tile::resident : 1)
    mma_kernel(Operand a, Operand b, std::int64_t k, Parts parts, Finish finish) {
    if constexpr (is_used<copy>) {
        OCTAVO_DYNAMIC_SHARED(std::int8_t, shared);
        const Job job = job_of<Tile>(a.rows, b.rows, k, parts);
        Sums<Tile> sums = {};
        sum_products<Tile, copy>(a, b, job, shared, sums);
        finish_tile<Tile>(sums, job, a.rows, b.rows, finish);
    } else {
        must_not_run();
    }
}

// --- launch ---------------------------------------------------------------------------------------------------------

// `parts`: how many blocks share the depth of a tile.
template <class Tile, SliceCopy copy, class Finish>
void start(const ConstMatrix& a, const ConstMatrix& b, std::int64_t parts, const Finish& finish, cudaStream_t stream) {
    static_assert(Tile::row_fragments * Tile::col_fragments * 4 <= 128, "half of a thread's registers");
    constexpr std::size_t shared = shared_of<Tile, copy>;
    const auto kernel = mma_kernel<Tile, copy, Finish>;
    if constexpr (shared > std::size_t{48} << 10) {
        static OncePerDevice set_up;
        set_up([&] { allow_shared(kernel, shared); });
    }
    const Parts own = parts_of(a.cols, parts, Tile::rows);
    const auto blocks = static_cast<unsigned>(tiles_of<Tile>(a.rows, b.rows) * own.count);
    launch(kernel, {blocks, Tile::threads, shared}, stream, operand_of(a), operand_of(b), a.cols, own, finish);
}

template <SliceCopy copy, class Finish>
void start(const ConstMatrix& a, const ConstMatrix& b, Size size, const Finish& finish, cudaStream_t stream) {
    if constexpr (copy == SliceCopy::async) {
        if (size == Size::large) return start<Large, copy>(a, b, 1, finish, stream);
    }
    if (size == Size::medium) {
        return start<std::conditional_t<copy == SliceCopy::async, Medium, Turing>, copy>(a, b, 1, finish, stream);
    }
    start<Small, copy>(a, b, 1, finish, stream);
}

bool is_contiguous(const Matrix& matrix) {
    return (matrix.cols <= 1 || matrix.col_stride == 1) && (matrix.rows <= 1 || matrix.row_stride == matrix.cols);
}

}  // namespace

bool reads_wide(const ConstMatrix& a, const ConstMatrix& b) {
    return rows_are_aligned(a, chunk) && rows_are_aligned(b, chunk);
}

void mma_multiply(ConstMatrix a, ConstMatrix b, Matrix out, cudaStream_t stream) {
    const SliceCopy copy = copy_for(a, b);
    const Size size = size_for(a.rows, b.rows, copy);
    const std::int64_t parts = parts_for(a.rows, b.rows, a.cols);
    if (size == Size::small && parts > 1 && is_contiguous(out)) {
        const AddSums add{view_of<std::int32_t>(out)};
        check(
            cudaMemsetAsync(out.data, 0, static_cast<std::size_t>(out.rows * out.cols) * sizeof(std::int32_t), stream),
            "cudaMemsetAsync");
        switch (copy) {
            case SliceCopy::async: return start<Small, SliceCopy::async>(a, b, parts, add, stream);
            case SliceCopy::wide: return start<Small, SliceCopy::wide>(a, b, parts, add, stream);
            case SliceCopy::shifted: return start<Small, SliceCopy::shifted>(a, b, parts, add, stream);
            case SliceCopy::bytes: return start<Small, SliceCopy::bytes>(a, b, parts, add, stream);
        }
    }
    const StoreSums store{view_of<std::int32_t>(out), writes_wide(out)};
    switch (copy) {
        case SliceCopy::async: return start<SliceCopy::async>(a, b, size, store, stream);
        case SliceCopy::wide: return start<SliceCopy::wide>(a, b, size, store, stream);
        case SliceCopy::shifted: return start<SliceCopy::shifted>(a, b, size, store, stream);
        case SliceCopy::bytes: return start<Small, SliceCopy::bytes>(a, b, 1, store, stream);
    }
}

}  // namespace octavo::cuda
