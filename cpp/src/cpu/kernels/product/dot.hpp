// The product by an instruction that multiplies four neighboring bytes and adds them to a 32-bit lane (or by a few
// instructions that come to the same): all of x86's VNNI forms, and what AVX2 has in their stead.
//
// An instruction set supplies `Dot`:
//   rows, blocks       the register tile: rows of X by blocks of 16 output features
//   vectors            operands that a block of 16 output features by 4 along k is loaded in
//   Accumulator, zero(), X, broadcast(p), W, load(p), multiply_add(acc, x, w)
//   add(p, acc)        p[0 ... 16 / vectors - 1] += the sums of an accumulator
// A register tile is multiplied over a slice of k that keeps its part of W in the first-level cache while all rows of X
// pass by.
#pragma once

#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {

constexpr std::int64_t block_size = 64;    // bytes of 16 output features by 4 along k
constexpr std::int64_t slice_depth = 512;  // 32 KiB of W for 64 output features

// Four neighboring codes.
inline std::int32_t group_at(const std::int8_t* p) {
    std::int32_t group = 0;
    __builtin_memcpy(&group, p, sizeof group);
    return group;
}

template <class Dot, int Rows, int Blocks>
void multiply_block(const std::int8_t* x, std::int64_t x_stride, const std::int8_t* w, std::int64_t w_stride,
                    std::int64_t depth, std::int32_t* acc) {
    constexpr int steps = 2;  // of 4 along k in a turn of the loop
    constexpr std::int64_t turn = 4 * std::int64_t{steps};
    constexpr int width = Blocks * Dot::vectors;
    constexpr std::int64_t vector_size = block_size / Dot::vectors;
    typename Dot::Accumulator sums[Rows * width];
    unroll<Rows * width>([&](auto i) OCTAVO_INLINE { sums[i] = Dot::zero(); });
    for (std::int64_t k = 0; k < depth; k += turn) {
        unroll<steps>([&](auto step) OCTAVO_INLINE {
            typename Dot::W operands[width];
            unroll<width>([&](auto j) OCTAVO_INLINE {
                operands[j] =
                    Dot::load(w + j / Dot::vectors * w_stride + (k + 4 * step) * 16 + j % Dot::vectors * vector_size);
            });
            unroll<Rows>([&](auto i) OCTAVO_INLINE {
                const auto row = Dot::broadcast(x + i * x_stride + k + 4 * step);
                unroll<width>([&](auto j) OCTAVO_INLINE { Dot::multiply_add(sums[i * width + j], row, operands[j]); });
            });
        });
    }
    unroll<Rows * width>([&](auto i) OCTAVO_INLINE {
        Dot::add(acc + i / width * tile_cols + i % width * (16 / Dot::vectors), sums[i]);
    });
}

// As many rows as there are, in blocks of `Rows` and then of fewer.
template <class Dot, int Rows, int Blocks>
void multiply_rows(const std::int8_t* x, std::int64_t x_stride, std::int64_t rows, const std::int8_t* w,
                   std::int64_t w_stride, std::int64_t depth, std::int32_t* acc) {
    for (; rows >= Rows; rows -= Rows) {
        multiply_block<Dot, Rows, Blocks>(x, x_stride, w, w_stride, depth, acc);
        x += Rows * x_stride;
        acc += Rows * tile_cols;
    }
    if constexpr (Rows > 1) {
        if (rows > 0) multiply_rows<Dot, Rows - 1, Blocks>(x, x_stride, rows, w, w_stride, depth, acc);
    }
}

// What the sum of output feature j starts from: less what the 128 added to the codes of X will add too much. It may
// wrap, and will be wrapped back.
inline std::int32_t start_of(const ProductTile& tile, std::int64_t j) {
    return x_is_unsigned ? static_cast<std::int32_t>(-128U * static_cast<std::uint32_t>(tile.w_sums[j])) : 0;
}

template <class Dot>
void dot_product(const ProductTile& tile) {
    for (std::int64_t i = 0; i < tile.rows; ++i) {
        std::int32_t* const acc = tile.acc + i * tile_cols;
        for (std::int64_t j = 0; j < tile.cols; ++j) acc[j] = start_of(tile, j);
    }
    // Few rows pass once, so there is nothing to keep.
    const std::int64_t slice = tile.rows > Dot::rows ? slice_depth : tile.depth;
    const auto columns = [&](auto blocks, std::int64_t j) {
        for (std::int64_t k = 0; k < tile.depth; k += slice) {
            multiply_rows<Dot, Dot::rows, blocks>(tile.x + k, tile.x_stride, tile.rows,
                                                  tile.w + j / 16 * tile.w_stride + k * 16, tile.w_stride,
                                                  tile.depth - k < slice ? tile.depth - k : slice, tile.acc + j);
        }
    };
    std::int64_t j = 0;
    for (; j + 16 * Dot::blocks <= tile.cols; j += 16 * Dot::blocks) columns(IndexConstant<Dot::blocks>{}, j);
    if constexpr (Dot::blocks > 1) {
        for (; j < tile.cols; j += 16) columns(IndexConstant<1>{}, j);
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
