#include "cpu/dequantize.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "backend.hpp"
#include "cpu/gemm.hpp"
#include "cpu/rows.hpp"
#include "cpu/threads.hpp"
#include "octavo/pack.hpp"

namespace octavo::cpu {

// A column rotated back is the int8 product of the codes of its block with a row of the Hadamard matrix, exact, times
// the factor and the scale. Columns of one block are multiplied together.
void rotate_back_columns(const PackedPanel& codes, std::int32_t rotation, std::int64_t cols, const float* zeropoint,
                         const float* scale, std::span<const std::int32_t> columns, std::span<float* const> targets) {
    const std::int64_t depth = padded_depth(rotation);  // what is multiplied: one block or, of small ones, several
    const float root = std::sqrt(static_cast<float>(rotation));
    const float factor = 1.0F / root;  // both powers of two
    const Scratch<std::int8_t> row(depth);
    const Scratch<std::int32_t> sums(whole_blocks(cols));
    for (float* const target : targets) std::fill(target + cols, target + whole_blocks(cols), 0.0F);
    for (std::size_t first = 0; first < columns.size();) {
        const std::int64_t begin = columns[first] / depth * depth;
        const auto end = std::ranges::lower_bound(columns, static_cast<std::int32_t>(begin + depth)) - columns.begin();
        const std::int64_t count = end - static_cast<std::int64_t>(first);
        const XPanels rows(plan_for(count), count, depth);
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t column = columns[first + static_cast<std::size_t>(i)] - begin;
            std::fill(row.data(), row.data() + depth, std::int8_t{0});
            for (std::int64_t h = 0; h < rotation; ++h) {  // Sylvester's matrix has the sign of the parity of i & h
                const auto common = static_cast<std::uint64_t>(column % rotation & h);
                row[column / rotation * rotation + h] = static_cast<std::int8_t>(1 - std::popcount(common) % 2 * 2);
            }
            rows.place(i, row.data());
        }
        const PackedPanel part = codes.from(begin);
        if (rows.plan().x_is_unsigned) sum_packed(part, whole_blocks(cols), 0, depth, sums.data());
        multiply(rows, part, sums.data(), {0, count, 0, cols}, [&](const SumsTile& tile) {
            const std::int64_t tile_cols = tile.product.cols;
            const Scratch<std::int32_t> whole(tile.product.rows * tile_cols);
            put_sums(tile, whole.data(), tile_cols * size_of(DType::i32));
            for (std::int64_t i = 0; i < tile.product.rows; ++i) {
                const std::size_t place = first + static_cast<std::size_t>(tile.row + i);
                const float of_zeropoint = columns[place] % rotation == 0 ? root : 0.0F;
                const std::int32_t* const row_sums = whole.data() + i * tile_cols;
                float* const target = targets[place] + tile.col;
                const float* const zeropoints = zeropoint + tile.col;
                const float* const scales = scale + tile.col;
                for (std::int64_t j = 0; j < tile_cols; ++j) {
                    const float rotated = static_cast<float>(row_sums[j]) * factor;
                    target[j] = (rotated + zeropoints[j] * of_zeropoint) * scales[j];
                }
            }
        });
        first = static_cast<std::size_t>(end);
    }
}

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
                kernels().rotate(row.data(), codes.cols, rotation);
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
