#include "cpu/gemm.hpp"

#include <limits>
#include <string>

#include "cpu/operations.hpp"
#include "octavo/error.hpp"
#include "octavo/runtime.hpp"

namespace octavo::cpu {

void for_each_panel(std::int64_t m, std::int64_t n, std::int64_t k, const std::function<void(const Panel&)>& work) {
    const std::int64_t column_blocks = (n + tile_cols - 1) / tile_cols;
    // Four panels a thread even out threads of unequal speed.
    const std::int64_t wanted = num_threads() > 1 ? std::int64_t{4} * num_threads() : 1;
    const std::int64_t row_groups =
        std::clamp<std::int64_t>(wanted / column_blocks, 1, (m + tile_rows - 1) / tile_rows);
    const std::int64_t tiles_per_group = ((m + tile_rows - 1) / tile_rows + row_groups - 1) / row_groups;
    const std::int64_t rows_per_group = tiles_per_group * tile_rows;
    const std::int64_t panels = column_blocks * ((m + rows_per_group - 1) / rows_per_group);
    // About a million multiplications are worth a thread's waking.
    const std::int64_t panel_work = std::min(m, rows_per_group) * tile_cols * std::max<std::int64_t>(k, 1);
    parallel_for(panels, (std::int64_t{1} << 20) / panel_work, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            const std::int64_t row = i / column_blocks * rows_per_group;
            const std::int64_t col = i % column_blocks * tile_cols;
            work({row, std::min(row + rows_per_group, m), col, std::min(col + tile_cols, n)});
        }
    });
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

void int8_matmul(ConstMatrix a, ConstMatrix b, Matrix out) {
    const ContiguousCodes a_rows(a);
    const ContiguousCodes b_rows(b);
    for_each_panel(out.rows, out.cols, a.cols, [&](const Panel& panel) {
        std::int32_t b_sums[tile_cols] = {};
        for (std::int64_t j = 0; j < panel.cols() && a.cols <= max_int32_depth; ++j) {
            b_sums[j] = kernels().sum(b_rows.row(panel.col_begin + j), a.cols);
        }
        multiply_panel(a_rows, b_rows, b_sums, panel, a.cols,
                       [&](std::int64_t row, const auto* acc) { put_row(acc, panel, row, out); });
    });
}

}  // namespace octavo::cpu
