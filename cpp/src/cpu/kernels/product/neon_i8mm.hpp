// Neon with SMMLA (Armv8.6): an instruction multiplies 2 rows of X by 2 output features over 8 along k. 4 x 16 sums in
// 16 of the 32 registers, as 2 x 8 squares of 2 x 2.
#pragma once

#include <arm_neon.h>

#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {

// Rows (2 i, 2 i + 1) of X for i < Pairs, one block of 16 output features. `last_row` stands in for a row beyond it.
template <int Pairs>
void multiply_pairs(const std::int8_t* x, std::int64_t x_stride, std::int64_t rows, const std::int8_t* w,
                    std::int64_t depth, std::int32_t* acc) {
    int32x4_t sums[Pairs * 8];
    unroll<Pairs * 8>([&](auto i) OCTAVO_INLINE { sums[i] = vdupq_n_s32(0); });
    const std::int8_t* row[Pairs * 2];
    for (std::int64_t i = 0; i < Pairs * 2; ++i) row[i] = x + (i < rows ? i : rows - 1) * x_stride;
    for (std::int64_t k = 0; k < depth; k += 8) {
        int8x16_t pairs[Pairs];
        unroll<Pairs>([&](auto i) OCTAVO_INLINE {
            pairs[i] = vcombine_s8(vld1_s8(row[i * 2] + k), vld1_s8(row[i * 2 + 1] + k));
        });
        // The packed order has 4 along k to an output feature: bring the 4 before and the 4 after together.
        unroll<4>([&](auto j) OCTAVO_INLINE {
            const int32x4_t before = vreinterpretq_s32_s8(vld1q_s8(w + k * 16 + j * 16));
            const int32x4_t after = vreinterpretq_s32_s8(vld1q_s8(w + k * 16 + 64 + j * 16));
            const int8x16_t first = vreinterpretq_s8_s32(vzip1q_s32(before, after));
            const int8x16_t second = vreinterpretq_s8_s32(vzip2q_s32(before, after));
            unroll<Pairs>([&](auto i) OCTAVO_INLINE {
                sums[i * 8 + j * 2] = vmmlaq_s32(sums[i * 8 + j * 2], pairs[i], first);
                sums[i * 8 + j * 2 + 1] = vmmlaq_s32(sums[i * 8 + j * 2 + 1], pairs[i], second);
            });
        });
    }
    // A register holds the square (row 0: 2 outputs, row 1: 2 outputs).
    unroll<Pairs * 8>([&](auto i) OCTAVO_INLINE {
        constexpr std::int64_t pair = i / 8;
        constexpr std::int64_t col = i % 8 * 2;
        vst1_s32(acc + pair * 2 * tile_cols + col, vget_low_s32(sums[i]));
        if (pair * 2 + 1 < rows) vst1_s32(acc + (pair * 2 + 1) * tile_cols + col, vget_high_s32(sums[i]));
    });
}

inline void matrix_product(const ProductTile& tile) {
    for (std::int64_t j = 0; j < tile.cols; j += 16) {
        const std::int8_t* const w = tile.w + j / 16 * tile.w_stride;
        for (std::int64_t i = 0; i < tile.rows; i += 4) {
            const std::int64_t rows = tile.rows - i < 4 ? tile.rows - i : 4;
            const std::int8_t* const x = tile.x + i * tile.x_stride;
            std::int32_t* const acc = tile.acc + i * tile_cols + j;
            if (rows > 2) {
                multiply_pairs<2>(x, tile.x_stride, rows, w, tile.depth, acc);
            } else {
                multiply_pairs<1>(x, tile.x_stride, rows, w, tile.depth, acc);
            }
        }
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
