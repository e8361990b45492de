// The exact int8 product, tile by tile, shared by `int8_matmul` and `linear`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

#include "cpu/isa.hpp"
#include "cpu/pack.hpp"
#include "cpu/scratch.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {

// A rectangle of the output that one thread computes: at most tile_cols wide, any number of rows. It begins at a
// multiple of 16 columns.
struct Panel {
    std::int64_t row_begin, row_end;
    std::int64_t col_begin, col_end;
    [[nodiscard]] std::int64_t cols() const noexcept { return col_end - col_begin; }
};

// Cut `[m, n]` into panels and share them among threads. All rows of a panel of columns stay together (its part of W
// then stays in the second-level cache) unless there are too few panels to go round.
void for_each_panel(std::int64_t m, std::int64_t n, std::int64_t k, const std::function<void(const Panel&)>& work);

// Codes of X as `product` reads them: rows apart from each other by no power of two, which would all fall into the same
// lines of the first-level cache, and zeros from k to the padded depth.
class XCodes {
public:
    XCodes(std::int64_t rows, std::int64_t k)
        : k_(k), depth_(padded_depth(k)), stride_(depth_ + 64), memory_(rows * stride_) {}

    [[nodiscard]] std::int8_t* row(std::int64_t index) const noexcept { return memory_.data() + index * stride_; }
    [[nodiscard]] std::int64_t stride() const noexcept { return stride_; }

    // Once the k codes of a row are there: the form that `product` wants.
    void finish_row(std::int64_t index) const {
        std::int8_t* const codes = row(index);
        if (kernels().x_is_unsigned) kernels().flip_sign_bits(codes, k_);
        std::fill(codes + k_, codes + depth_, std::int8_t{0});
    }

private:
    std::int64_t k_;
    std::int64_t depth_;
    std::int64_t stride_;
    Scratch<std::int8_t> memory_;
};

// sums[j] = sum of the codes of output feature j of the panel over [begin, end) of the padded depth, for a multiple of
// 16 features; nothing where the product does not ask for them.
void sum_packed(const PackedPanel& w, std::int64_t cols, std::int64_t begin, std::int64_t end, std::int32_t* sums);

// Call finish(row, acc) for every row of a panel, acc[j] = sum_k x[row, k] * w[j, k]: int32 sums for
// k <= max_int32_depth, int64 above, exact either way. `w_sums[j]` = sum_k w[j, k], with zeros up to a multiple of 16.
template <class Finish>
void multiply_panel(const XCodes& x, const PackedPanel& w, const std::int32_t* w_sums, const Panel& panel,
                    Finish finish) {
    const Kernels& table = kernels();
    const std::int64_t cols = whole_blocks(panel.cols());
    const std::int64_t most_rows = std::min(table.tile_rows, panel.row_end - panel.row_begin);
    const Scratch<std::int32_t> acc(most_rows * tile_cols);
    const auto product = [&](std::int64_t row, std::int64_t rows, std::int64_t begin, std::int64_t end,
                             const std::int32_t* sums) {
        table.product({.x = x.row(row) + begin,
                       .x_stride = x.stride(),
                       .rows = rows,
                       .w = w.data() + begin * block_cols,
                       .w_stride = w.stride(),
                       .w_sums = sums,
                       .cols = cols,
                       .depth = end - begin,
                       .acc = acc.data()});
    };
    for (std::int64_t row = panel.row_begin; row < panel.row_end; row += most_rows) {
        const std::int64_t rows = std::min(most_rows, panel.row_end - row);
        if (w.depth() <= max_int32_depth) {
            product(row, rows, 0, w.depth(), w_sums);
            for (std::int64_t i = 0; i < rows; ++i) finish(row + i, acc.data() + i * tile_cols);
            continue;
        }
        const Scratch<std::int64_t> wide(rows * tile_cols);
        std::fill(wide.data(), wide.data() + rows * tile_cols, 0);
        for (std::int64_t begin = 0; begin < w.depth(); begin += max_int32_depth) {
            const std::int64_t end = std::min(begin + max_int32_depth, w.depth());
            std::int32_t part_sums[tile_cols];
            sum_packed(w, cols, begin, end, part_sums);
            product(row, rows, begin, end, part_sums);
            for (std::int64_t i = 0; i < rows * tile_cols; ++i) wide[i] += i % tile_cols < cols ? acc[i] : 0;
        }
        for (std::int64_t i = 0; i < rows; ++i) finish(row + i, wide.data() + i * tile_cols);
    }
}

}  // namespace octavo::cpu
