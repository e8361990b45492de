// The product by an instruction that multiplies four neighboring bytes and adds them to a 32-bit lane (or by a few
// instructions that come to the same): all of x86's VNNI forms, and what AVX2 has in their stead for few rows.
//
// An instruction set supplies `Dot`:
//   rows, blocks       the register tile: rows of X by blocks of 16 output features
//   x_size, place_row, x_is_unsigned    as Plan has them
//   vectors            operands that a block of 16 output features by 4 along k is loaded in
//   Accumulator, zero(), X, broadcast(p), W, load(p), multiply_add(acc, x, w)
//   store(p, acc)      p[0 ... 16 / vectors - 1] = the sums of an accumulator
//   add(p, acc)        the same, added
// Panels of X are row-major: a row of a slice is `depth` codes, and the next row follows.
#pragma once

#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {

constexpr std::int64_t block_size = 64;  // bytes of 16 output features by 4 along k

// Four neighboring codes.
inline std::int32_t group_at(const std::int8_t* p) {
    std::int32_t group = 0;
    __builtin_memcpy(&group, p, sizeof group);
    return group;
}

// Plan::place_row: x + 128 as an unsigned byte.
inline std::int32_t place_unsigned(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    for (std::int64_t k = 0; k < depth; ++k) panel[row * depth + k] = static_cast<std::int8_t>(codes[k] ^ -128);
    return 0;
}

// `Rows` rows of a tile by `Blocks` blocks, from column j of it on. Fetches: the part of what is ahead that falls to
// this panel, a line of each block in every turn. (Lines that are asked for all at once wait for each other, and the
// product for them.)
template <class Dot, int Rows, int Blocks, bool Fetches>
void multiply_block(const ProductTile& tile, std::int64_t j) {
    constexpr int steps = 2;  // of 4 along k in a turn of the loop
    constexpr std::int64_t turn = 4 * std::int64_t{steps};
    constexpr int width = Blocks * Dot::vectors;
    constexpr std::int64_t vector_size = block_size / Dot::vectors;
    constexpr int few = 4;  // rows that wait for memory, unless lines of W are asked for
    const std::int8_t* const x = tile.x;
    const std::int8_t* const w = tile.w + j / 16 * tile.w_stride;
    typename Dot::Accumulator sums[Rows * width];
    unroll<Rows * width>([&](auto i) OCTAVO_INLINE { sums[i] = Dot::zero(); });
    const std::int8_t* ahead = tile.ahead + tile.ahead_begin;
    const std::int8_t* const ahead_end = tile.ahead + tile.ahead_end;
    for (std::int64_t k = 0; k < tile.depth; k += turn) {
        if (Fetches && ahead < ahead_end) {
            unroll<Blocks>([&](auto b) OCTAVO_INLINE { __builtin_prefetch(ahead + b * tile.ahead_stride, 0, 2); });
            ahead += block_size;
        }
        unroll<steps>([&](auto step) OCTAVO_INLINE {
            typename Dot::W operands[width];
            unroll<width>([&](auto v) OCTAVO_INLINE {
                if constexpr (Rows <= few && !Fetches && v % Dot::vectors == 0) {
                    __builtin_prefetch(w + v / Dot::vectors * tile.w_stride + (k + 4 * step) * 16 + tile.bytes_ahead);
                }
                operands[v] = Dot::load(w + v / Dot::vectors * tile.w_stride + (k + 4 * step) * 16 +
                                        v % Dot::vectors * vector_size);
            });
            unroll<Rows>([&](auto i) OCTAVO_INLINE {
                const auto row = Dot::broadcast(x + (i * tile.depth + k + 4 * step) * Dot::x_size);
                unroll<width>([&](auto v) OCTAVO_INLINE { Dot::multiply_add(sums[i * width + v], row, operands[v]); });
            });
        });
    }
    constexpr std::int64_t stride = 16 * std::int64_t{Dot::blocks};
    std::int32_t* const acc = tile.acc + j;
    const auto leave = [&](auto put) OCTAVO_INLINE {
        unroll<Rows * width>(
            [&](auto i) OCTAVO_INLINE { put(acc + i / width * stride + i % width * (16 / Dot::vectors), sums[i]); });
    };
    if (tile.first) {
        leave([](std::int32_t* p, const auto& acc_sums) OCTAVO_INLINE { Dot::store(p, acc_sums); });
    } else {
        leave([](std::int32_t* p, const auto& acc_sums) OCTAVO_INLINE { Dot::add(p, acc_sums); });
    }
}

// As many rows as the tile has.
template <class Dot, int Blocks, bool Fetches, int Rows = Dot::rows>
void multiply_rows(const ProductTile& tile, std::int64_t j) {
    if constexpr (Rows > 1) {
        if (tile.rows < Rows) return multiply_rows<Dot, Blocks, Fetches, Rows - 1>(tile, j);
    }
    multiply_block<Dot, Rows, Blocks, Fetches>(tile, j);
}

// Plan::multiply.
template <class Dot>
void multiply_dots(const ProductTile& tile) {
    if (tile.cols < 16 * Dot::blocks) {
        for (std::int64_t j = 0; j < tile.cols; j += 16) multiply_rows<Dot, 1, false>(tile, j);
    } else if (tile.ahead_begin < tile.ahead_end) {
        multiply_rows<Dot, Dot::blocks, true>(tile, 0);
    } else {
        multiply_rows<Dot, Dot::blocks, false>(tile, 0);
    }
}

// The plan of a processor that multiplies by `Dot` whatever the number of rows.
template <class Dot>
constexpr Plan dot_plan(std::int64_t block_rows) noexcept {
    return {.rows = Dot::rows,
            .cols = 16 * std::int64_t{Dot::blocks},
            .depth = 512,  // 8 KiB of W for a block
            .block_rows = block_rows,
            .x_size = Dot::x_size,
            .is_row_major = true,
            .speed = Dot::speed,
            .x_is_unsigned = Dot::x_is_unsigned,
            .place_row = Dot::place_row,
            .multiply = multiply_dots<Dot>};
}

}  // namespace octavo::cpu::OCTAVO_ISA
