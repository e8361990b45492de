#include "cpu/rows.hpp"

#include <cstring>

#include "cpu/threads.hpp"

namespace octavo::cpu {

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
