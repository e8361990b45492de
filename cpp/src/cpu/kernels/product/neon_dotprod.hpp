// Neon with SDOT (Armv8.2), which multiplies groups of 4 neighboring bytes along k. One register of X holds 4 groups of
// a row, and the instruction picks one of them by itself, so that nothing but SDOT and loads is left to do: 4 x 16 sums
// in 16 of the 32 registers.
#pragma once

#include <arm_neon.h>

#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {

inline std::int32_t place_signed(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    __builtin_memcpy(panel + row * depth, codes, static_cast<unsigned long>(depth));
    return 0;
}

// sums[j] += the group of x by group j of w. A template because the instruction's lane must be a literal, even where
// nothing is optimized.
template <int Group>
[[gnu::always_inline]] inline void add_dots(int32x4_t& sums, int8x16_t w, int8x16_t x) {
    sums = vdotq_laneq_s32(sums, w, x, Group);
}

// `Rows` rows of X, row-major, by one block of 16 output features.
template <int Rows>
void multiply_rows(const ProductTile& tile) {
    int32x4_t sums[Rows * 4];
    unroll<Rows * 4>([&](auto i)
                         OCTAVO_INLINE { sums[i] = tile.first ? vdupq_n_s32(0) : vld1q_s32(tile.acc + i * 4); });
    for (std::int64_t k = 0; k < tile.depth; k += 16) {
        int8x16_t rows[Rows];
        unroll<Rows>([&](auto i) OCTAVO_INLINE { rows[i] = vld1q_s8(tile.x + i * tile.depth + k); });
        unroll<4>([&](auto group) OCTAVO_INLINE {
            unroll<4>([&](auto j) OCTAVO_INLINE {
                const int8x16_t features = vld1q_s8(tile.w + (k + group * 4) * 16 + j * 16);
                unroll<Rows>([&](auto i) OCTAVO_INLINE { add_dots<group>(sums[i * 4 + j], features, rows[i]); });
            });
        });
    }
    unroll<Rows * 4>([&](auto i) OCTAVO_INLINE { vst1q_s32(tile.acc + i * 4, sums[i]); });
}

inline void multiply_dots(const ProductTile& tile) {
    switch (tile.rows) {
        case 1: return multiply_rows<1>(tile);
        case 2: return multiply_rows<2>(tile);
        case 3: return multiply_rows<3>(tile);
        default: return multiply_rows<4>(tile);
    }
}

// `depth`: 8 KiB of W and 64 KiB of 128 rows of X.
constexpr Plan dot_plan(std::int64_t block_rows) {
    return {.rows = 4,
            .cols = 16,
            .depth = 512,
            .block_rows = block_rows,
            .place_row = place_signed,
            .multiply = multiply_dots};
}

}  // namespace octavo::cpu::OCTAVO_ISA
