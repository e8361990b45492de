#include "cpu/rows.hpp"

#include <algorithm>

#include "cpu/threads.hpp"

namespace octavo::cpu {

void sort_unique(std::vector<std::int32_t>& columns) {
    std::ranges::sort(columns);
    // Not std::ranges::unique: Clang 14 cannot compile the ranges of GCC 12's library that it returns.
    columns.erase(std::unique(columns.begin(), columns.end()), columns.end());  // NOLINT(modernize-use-ranges)
}

ContiguousCodes::ContiguousCodes(const ConstMatrix& codes)
    : data_(static_cast<const std::int8_t*>(codes.data)), stride_(codes.row_stride) {
    if (codes.col_stride == 1 || codes.cols <= 1) return;
    copy_ = std::make_unique<Scratch<std::int8_t>>(codes.rows * codes.cols);
    parallel_for(codes.rows, row_grain(codes.cols), [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
            std::int8_t* const row = copy_->data() + i * codes.cols;
            for (std::int64_t j = 0; j < codes.cols; ++j) row[j] = code_at(codes, i, j);
        }
    });
    data_ = copy_->data();
    stride_ = codes.cols;
}

}  // namespace octavo::cpu
