// Weights as floats again.
#include <cmath>

#include "backend.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"

namespace octavo::cpu {

void Backend::dequantize(ConstMatrix codes, ConstVector scale, ConstVector zeropoint, std::int32_t rotation, Matrix out,
                         Stream /*stream*/) const {
    const bool per_row = scale.size == codes.rows;
    parallel_for(codes.rows, row_grain(codes.cols), [&](std::int64_t begin, std::int64_t end) {
        const Scratch<float> row(codes.cols);
        for (std::int64_t i = begin; i < end; ++i) {
            const auto row_scale = get<float>(scale, per_row ? i : 0);
            const auto row_zeropoint = zeropoint.present ? get<float>(zeropoint, per_row ? i : 0) : 0.0F;
            for (std::int64_t j = 0; j < codes.cols; ++j) row[j] = static_cast<float>(code_at(codes, i, j));
            if (rotation != 0) {
                rotate(row.data(), codes.cols, rotation);
                const float rotated = row_zeropoint * std::sqrt(static_cast<float>(rotation));
                for (std::int64_t j = 0; j < codes.cols; j += rotation) row[j] += rotated;
                for (std::int64_t j = 0; j < codes.cols; ++j) row[j] *= row_scale;
            } else {
                for (std::int64_t j = 0; j < codes.cols; ++j) row[j] = (row[j] + row_zeropoint) * row_scale;
            }
            kernels().store(row.data(), out.cols, out.dtype, at(out, i, 0), out.col_stride);
        }
    });
}

}  // namespace octavo::cpu
