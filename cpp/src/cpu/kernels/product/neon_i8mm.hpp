// Neon with SMMLA (Armv8.6): an instruction multiplies 2 rows of X by 2 output features over 8 along k. 4 x 16 sums in
// 16 of the 32 registers, as 2 x 8 squares of 2 x 2. (GCC 12 spills the 24 registers of 6 x 16.)
//
// The packed order has only 4 along k of an output feature together. A slice of W is regrouped before all rows pass by
// it; for few rows that would cost more than SMMLA saves over SDOT, which reads W as it is.
#pragma once

#include "cpu/kernels/product/neon_dotprod.hpp"

namespace octavo::cpu::OCTAVO_ISA {

// squares[k / 8][feature / 2][feature % 2][k % 8] of the packed w[k / 4][feature][k % 4].
inline void regroup(const std::int8_t* w, std::int64_t /*w_stride*/, std::int64_t /*cols*/, std::int64_t depth,
                    std::int8_t* squares, std::int32_t* /*offsets*/) {
    for (std::int64_t k = 0; k < depth; k += 8) {
        unroll<4>([&](auto j) OCTAVO_INLINE {
            const int32x4_t before = vreinterpretq_s32_s8(vld1q_s8(w + k * 16 + j * 16));
            const int32x4_t after = vreinterpretq_s32_s8(vld1q_s8(w + k * 16 + 64 + j * 16));
            vst1q_s8(squares + k * 16 + j * 32, vreinterpretq_s8_s32(vzip1q_s32(before, after)));
            vst1q_s8(squares + k * 16 + j * 32 + 16, vreinterpretq_s8_s32(vzip2q_s32(before, after)));
        });
    }
}

// Rows (2 i, 2 i + 1) of X, i < Pairs, by 16 output features. Where the tile has one row less, the last row also takes
// the place that is left, and the same sums are written twice.
template <int Pairs>
void multiply_pairs(const ProductTile& tile) {
    const std::int8_t* x_rows[Pairs * 2];
    std::int32_t* acc_rows[Pairs * 2];
    unroll<Pairs * 2>([&](auto i) OCTAVO_INLINE {
        const std::int64_t row = i < tile.rows ? i : tile.rows - 1;
        x_rows[i] = tile.x + row * tile.depth;
        acc_rows[i] = tile.acc + row * 16;
    });
    // A register holds the square (row 0: 2 outputs, row 1: 2 outputs).
    int32x4_t sums[Pairs * 8];
    unroll<Pairs * 8>([&](auto i) OCTAVO_INLINE {
        constexpr int first = i / 8 * 2;
        constexpr int col = i % 8 * 2;
        sums[i] = tile.first ? vdupq_n_s32(0)
                             : vcombine_s32(vld1_s32(acc_rows[first] + col), vld1_s32(acc_rows[first + 1] + col));
    });
    for (std::int64_t k = 0; k < tile.depth; k += 8) {
        int8x16_t pairs[Pairs];
        unroll<Pairs>([&](auto i) OCTAVO_INLINE {
            pairs[i] = vcombine_s8(vld1_s8(x_rows[i * 2] + k), vld1_s8(x_rows[i * 2 + 1] + k));
        });
        unroll<8>([&](auto j) OCTAVO_INLINE {
            const int8x16_t features = vld1q_s8(tile.w + k * 16 + j * 16);
            unroll<Pairs>([&](auto i)
                              OCTAVO_INLINE { sums[i * 8 + j] = vmmlaq_s32(sums[i * 8 + j], pairs[i], features); });
        });
    }
    unroll<Pairs * 8>([&](auto i) OCTAVO_INLINE {
        constexpr int first = i / 8 * 2;
        constexpr int col = i % 8 * 2;
        vst1_s32(acc_rows[first] + col, vget_low_s32(sums[i]));
        vst1_s32(acc_rows[first + 1] + col, vget_high_s32(sums[i]));
    });
}

inline void multiply_squares(const ProductTile& tile) {
    if (tile.rows > 2) {
        multiply_pairs<2>(tile);
    } else {
        multiply_pairs<1>(tile);
    }
}

constexpr Plan few = dot_plan(4);
constexpr Plan many{.rows = 4,
                    .cols = 16,
                    .depth = 512,
                    .block_rows = 128,
                    .regrouped = 1,
                    .speed = 120,
                    .place_row = place_signed,
                    .regroup = regroup,
                    .multiply = multiply_squares};

}  // namespace octavo::cpu::OCTAVO_ISA
