// Portable: plain loops.
#pragma once

#include "cpu/kernels/functions.hpp"

namespace octavo::cpu::OCTAVO_ISA {

inline void plain_product(const ProductTile& tile) {
    for (std::int64_t i = 0; i < tile.rows; ++i) {
        const std::int8_t* const x = tile.x + i * tile.x_stride;
        for (std::int64_t j = 0; j < tile.cols; j += 16) {
            const std::int8_t* w = tile.w + j / 16 * tile.w_stride;
            std::int32_t sums[16] = {};
            for (std::int64_t k = 0; k < tile.depth; k += 4, w += 64) {
                for (std::int64_t c = 0; c < 16; ++c) {
                    sums[c] +=
                        x[k] * w[c * 4] + x[k + 1] * w[c * 4 + 1] + x[k + 2] * w[c * 4 + 2] + x[k + 3] * w[c * 4 + 3];
                }
            }
            __builtin_memcpy(tile.acc + i * tile_cols + j, sums, sizeof sums);
        }
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
