// Neon with SDOT (Armv8.2), which multiplies groups of 4 neighboring bytes along k. One register of X holds 4 groups of
// a row, and the instruction picks one of them by itself, so that nothing but SDOT and loads is left to do: 4 x 16 sums
// in 16 of the 32 registers.
#pragma once

#include <arm_neon.h>

#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {

// 8 KiB of a block of 16 output features and 24 KiB of 48 rows of X, which fit a first-level cache of 64 KiB together.
constexpr std::int64_t slice_depth = 512;

// sums[j] += the group of x by group j of w. A template because the instruction's lane must be a literal, even where
// nothing is optimized.
template <int Group>
[[gnu::always_inline]] inline void add_dots(int32x4_t& sums, int8x16_t w, int8x16_t x) {
    sums = vdotq_laneq_s32(sums, w, x, Group);
}

// acc += X W^T for `Rows` rows of X and one block of 16 output features.
template <int Rows>
void multiply_rows(const std::int8_t* x, std::int64_t x_stride, const std::int8_t* w, std::int64_t depth,
                   std::int32_t* acc) {
    int32x4_t sums[Rows * 4];
    unroll<Rows * 4>([&](auto i) OCTAVO_INLINE { sums[i] = vld1q_s32(acc + i / 4 * tile_cols + i % 4 * 4); });
    for (std::int64_t k = 0; k < depth; k += 16) {
        int8x16_t rows[Rows];
        unroll<Rows>([&](auto i) OCTAVO_INLINE { rows[i] = vld1q_s8(x + i * x_stride + k); });
        unroll<4>([&](auto group) OCTAVO_INLINE {
            unroll<4>([&](auto j) OCTAVO_INLINE {
                const int8x16_t features = vld1q_s8(w + (k + group * 4) * 16 + j * 16);
                unroll<Rows>([&](auto i) OCTAVO_INLINE { add_dots<group>(sums[i * 4 + j], features, rows[i]); });
            });
        });
    }
    unroll<Rows * 4>([&](auto i) OCTAVO_INLINE { vst1q_s32(acc + i / 4 * tile_cols + i % 4 * 4, sums[i]); });
}

inline void dot_product(const ProductTile& tile) {
    for (std::int64_t j = 0; j < tile.cols; j += 16) {
        std::int32_t* const acc = tile.acc + j;
        for (std::int64_t i = 0; i < tile.rows; ++i) __builtin_memset(acc + i * tile_cols, 0, 16 * sizeof *acc);
        for (std::int64_t k = 0; k < tile.depth; k += slice_depth) {
            const std::int64_t depth = tile.depth - k < slice_depth ? tile.depth - k : slice_depth;
            const std::int8_t* const w = tile.w + j / 16 * tile.w_stride + k * 16;
            const auto rows_at = [&](auto rows, std::int64_t i) {
                multiply_rows<rows>(tile.x + i * tile.x_stride + k, tile.x_stride, w, depth, acc + i * tile_cols);
            };
            std::int64_t i = 0;
            for (; i + 4 <= tile.rows; i += 4) rows_at(IndexConstant<4>{}, i);
            switch (tile.rows - i) {
                case 3: rows_at(IndexConstant<3>{}, i); break;
                case 2: rows_at(IndexConstant<2>{}, i); break;
                case 1: rows_at(IndexConstant<1>{}, i); break;
                default: break;
            }
        }
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
