// The exact int8 product, tile by tile, shared by `int8_matmul` and `linear`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "cpu/isa.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {

// Sides of a tile of the output. 64 rows of B by a few thousand k fit a second-level cache; many rows of A make worth
// while what a kernel prepares of them.
inline constexpr std::int64_t tile_rows = 256;
inline constexpr std::int64_t tile_cols = 64;

// A rectangle of the output that one thread computes: at most tile_cols wide, any number of rows.
struct Panel {
    std::int64_t row_begin, row_end;
    std::int64_t col_begin, col_end;
    [[nodiscard]] std::int64_t cols() const noexcept { return col_end - col_begin; }
};

// Cut `[m, n]` into panels and share them among threads. All rows of a column block stay together (what is prepared
// for its columns then serves them all) unless there are too few column blocks to go round.
void for_each_panel(std::int64_t m, std::int64_t n, std::int64_t k, const std::function<void(const Panel&)>& work);

// Call finish(row, acc) for every row of a panel, acc[j] = sum_k a[row, k] * b[col_begin + j, k]: int32 sums for
// k <= max_int32_depth, int64 above, exact either way. `b_sums[j]` = sum_k b[col_begin + j, k].
template <class Finish>
void multiply_panel(const ContiguousCodes& a, const ContiguousCodes& b, const std::int32_t* b_sums, const Panel& panel,
                    std::int64_t k, Finish finish) {
    const Scratch<std::int32_t> acc(std::min(tile_rows, panel.row_end - panel.row_begin) * tile_cols);
    for (std::int64_t row = panel.row_begin; row < panel.row_end; row += tile_rows) {
        const std::int64_t rows = std::min(tile_rows, panel.row_end - row);
        if (k <= max_int32_depth) {
            kernels().gemm(a.row(row), a.stride(), b.row(panel.col_begin), b.stride(), b_sums, rows, panel.cols(), k,
                           acc.data(), tile_cols);
            for (std::int64_t i = 0; i < rows; ++i) finish(row + i, acc.data() + i * tile_cols);
            continue;
        }
        const Scratch<std::int64_t> wide(rows * tile_cols);
        std::fill(wide.data(), wide.data() + rows * tile_cols, 0);
        for (std::int64_t depth = 0; depth < k; depth += max_int32_depth) {
            const std::int64_t part = std::min(max_int32_depth, k - depth);
            std::int32_t part_sums[tile_cols];
            for (std::int64_t j = 0; j < panel.cols(); ++j) {
                part_sums[j] = kernels().sum(b.row(panel.col_begin + j) + depth, part);
            }
            kernels().gemm(a.row(row) + depth, a.stride(), b.row(panel.col_begin) + depth, b.stride(), part_sums, rows,
                           panel.cols(), part, acc.data(), tile_cols);
            for (std::int64_t i = 0; i < rows; ++i) {
                for (std::int64_t j = 0; j < panel.cols(); ++j) wide[i * tile_cols + j] += acc[i * tile_cols + j];
            }
        }
        for (std::int64_t i = 0; i < rows; ++i) finish(row + i, wide.data() + i * tile_cols);
    }
}

}  // namespace octavo::cpu
