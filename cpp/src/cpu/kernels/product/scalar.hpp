// Portable: plain loops.
#pragma once

#include "cpu/kernels/functions.hpp"

namespace octavo::cpu::OCTAVO_ISA {

inline std::int32_t place_signed(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    __builtin_memcpy(panel + row * depth, codes, static_cast<unsigned long>(depth));
    return 0;
}

inline void plain_product(const ProductTile& tile) {
    for (std::int64_t i = 0; i < tile.rows; ++i) {
        const std::int8_t* const x = tile.x + i * tile.depth;
        const std::int8_t* w = tile.w;
        std::int32_t* const acc = tile.acc + i * 16;
        std::int32_t sums[16] = {};
        if (!tile.first) __builtin_memcpy(sums, acc, sizeof sums);
        for (std::int64_t k = 0; k < tile.depth; k += 4, w += 64) {
            for (std::int64_t c = 0; c < 16; ++c) {
                sums[c] +=
                    x[k] * w[c * 4] + x[k + 1] * w[c * 4 + 1] + x[k + 2] * w[c * 4 + 2] + x[k + 3] * w[c * 4 + 3];
            }
        }
        __builtin_memcpy(acc, sums, sizeof sums);
    }
}

constexpr Plan many{.rows = 4,
                    .cols = 16,
                    .depth = 512,
                    .block_rows = 128,
                    .speed = 2,
                    .place_row = place_signed,
                    .multiply = plain_product};
constexpr Plan few = many;

}  // namespace octavo::cpu::OCTAVO_ISA
