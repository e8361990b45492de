#include "cpu/operations.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {

void dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, Matrix out) {
    const bool per_row = scale.size == codes.rows;
    parallel_for(codes.rows, row_grain(codes.cols), [&](std::int64_t begin, std::int64_t end) {
        const Scratch<float> row(codes.cols);
        for (std::int64_t i = begin; i < end; ++i) {
            const auto row_scale = get<float>(scale, per_row ? i : 0);
            const auto row_zeropoint = zeropoint.present ? get<float>(zeropoint, per_row ? i : 0) : 0.0F;
            for (std::int64_t j = 0; j < codes.cols; ++j) {
                row[j] = (static_cast<float>(code_at(codes, i, j)) + row_zeropoint) * row_scale;
            }
            kernels().store(row.data(), codes.cols, out.dtype, at(out, i, 0), out.col_stride);
        }
    });
}

}  // namespace octavo::cpu
