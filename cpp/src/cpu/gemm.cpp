#include "cpu/gemm.hpp"

#include <limits>
#include <string>

#include "cpu/operations.hpp"
#include "cpu/rows.hpp"
#include "octavo/error.hpp"
#include "octavo/runtime.hpp"

namespace octavo::cpu {

void for_each_panel(std::int64_t m, std::int64_t n, std::int64_t k, const std::function<void(const Panel&)>& work) {
    constexpr std::int64_t narrowest = 64;
    constexpr std::int64_t panel_bytes = std::int64_t{1} << 20;  // of W: half a second-level cache
    // Four panels a thread even out threads of unequal speed.
    const std::int64_t wanted = num_threads() > 1 ? std::int64_t{4} * num_threads() : 1;
    std::int64_t width = tile_cols;
    while (width > narrowest && (width * k > panel_bytes || n < width * wanted)) width /= 2;
    const std::int64_t column_panels = (n + width - 1) / width;

    const std::int64_t tile_rows = kernels().tile_rows;
    const std::int64_t row_tiles = (m + tile_rows - 1) / tile_rows;
    const std::int64_t row_groups = std::clamp<std::int64_t>(wanted / column_panels, 1, row_tiles);
    const std::int64_t group_rows = (row_tiles + row_groups - 1) / row_groups * tile_rows;
    const std::int64_t panels = column_panels * ((m + group_rows - 1) / group_rows);
    // About a million multiplications are worth a thread's waking.
    const std::int64_t panel_work = std::min(m, group_rows) * width * std::max<std::int64_t>(k, 1);
    parallel_for(panels, (std::int64_t{1} << 20) / panel_work, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t row = i / column_panels * group_rows;
            const std::int64_t col = i % column_panels * width;
            work({row, std::min(row + group_rows, m), col, std::min(col + width, n)});
        }
    });
}

void sum_packed(const PackedPanel& w, std::int64_t cols, std::int64_t begin, std::int64_t end, std::int32_t* sums) {
    if (!kernels().x_is_unsigned) return;
    // The product with a row of ones; no 128 has been added to them, so none is to be taken off.
    const std::int64_t depth = end - begin;
    const Scratch<std::int8_t> ones(depth);
    std::fill(ones.data(), ones.data() + depth, std::int8_t{1});
    const Scratch<std::int32_t> acc(tile_cols);
    std::fill(sums, sums + cols, 0);
    kernels().product({.x = ones.data(),
                       .x_stride = depth,
                       .rows = 1,
                       .w = w.data() + begin * block_cols,
                       .w_stride = w.stride(),
                       .w_sums = sums,
                       .cols = cols,
                       .depth = depth,
                       .acc = acc.data()});
    std::copy(acc.data(), acc.data() + cols, sums);
}

namespace {

void put(std::int32_t value, std::int64_t row, std::int64_t col, const Matrix& out) {
    __builtin_memcpy(at(out, row, col), &value, sizeof value);
}

void put_row(const std::int32_t* acc, const Panel& panel, std::int64_t row, const Matrix& out) {
    if (out.col_stride == 1) {
        __builtin_memcpy(at(out, row, panel.col_begin), acc, static_cast<std::size_t>(panel.cols()) * sizeof *acc);
        return;
    }
    for (std::int64_t j = 0; j < panel.cols(); ++j) put(acc[j], row, panel.col_begin + j, out);
}

void put_row(const std::int64_t* acc, const Panel& panel, std::int64_t row, const Matrix& out) {
    for (std::int64_t j = 0; j < panel.cols(); ++j) {
        const auto value = static_cast<std::int32_t>(acc[j]);
        if (value != acc[j]) {
            throw Error(ErrorKind::value, "int8_matmul: out: expected sums that fit int32, got " +
                                              std::to_string(acc[j]) + " at row " + std::to_string(row) + ", column " +
                                              std::to_string(panel.col_begin + j));
        }
        put(value, row, panel.col_begin + j, out);
    }
}

}  // namespace

void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out, Layout b_layout) {
    const XCodes x(a.rows, a.cols);
    parallel_for(a.rows, row_grain(a.cols), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            std::int8_t* const row = x.row(i);
            const std::int8_t* const source = contiguous_codes(a, i, row);
            if (source != row) std::copy(source, source + a.cols, row);
            x.finish_row(i);
        }
    });
    for_each_panel(out.rows, out.cols, a.cols, [&](const Panel& panel) {
        const PackedPanel w(b, b_layout, panel.col_begin, panel.col_end);
        std::int32_t sums[tile_cols];
        if (w.depth() <= max_int32_depth) sum_packed(w, whole_blocks(panel.cols()), 0, w.depth(), sums);
        multiply_panel(x, w, sums, panel, [&](std::int64_t row, const auto* acc) { put_row(acc, panel, row, out); });
    });
}

}  // namespace octavo::cpu
