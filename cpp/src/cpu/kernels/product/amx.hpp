// AMX: a tile register holds 16 rows of 64 bytes, and an instruction multiplies 16 rows of X by 16 output features over
// 64 along k. A step of 32 x 32 sums takes 4 tile loads for 4 products; a load takes about as long as half a product
// where the first-level cache has the bytes. So the slice of W for 64 output features (16 KiB) stays there, the slice
// of 32 rows of X (8 KiB) comes in once for both halves of it, and all that is read lies in tiles of 1 KiB.
//
// Setting the tiles up costs some hundred cycles, so few rows go by AVX-512 VNNI, for whose sake X is unsigned here
// too.
#pragma once

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

namespace tiles {

constexpr std::int64_t rows = 32;
constexpr std::int64_t cols = 64;
constexpr std::int64_t acc_stride = cols * 4;              // bytes
constexpr std::int64_t tile_size = std::int64_t{16} * 64;  // bytes

// The tile registers: sums 0 to 3, X 4 and 5, W 6 and 7. For panels of up to `panel_rows` rows. The last panel of more
// may have fewer: then sums are made of what its memory holds there, and nobody reads them.
inline void enter(std::int64_t panel_rows) {
    const std::int64_t upper = panel_rows < 16 ? panel_rows : 16;
    const std::int64_t lower = panel_rows > 16 ? (panel_rows < 32 ? panel_rows - 16 : 16) : 1;
    const std::int64_t of_tile[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes_per_row[tile] = 64;
        config.rows[tile] = static_cast<std::uint8_t>(of_tile[tile]);
    }
    configure(config);
}

// panel[k / 64][row][k % 64], x + 128 as an unsigned byte.
inline std::int32_t place_row(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    for (std::int64_t k = 0; k < depth; k += 64) {
        for (std::int64_t i = 0; i < 64; ++i) {
            panel[k * rows + row * 64 + i] = static_cast<std::int8_t>(codes[k + i] ^ -128);
        }
    }
    return 0;
}

// Sums of up to 32 rows by 16 * Blocks output features, from column j of the tile on. `two` is whether there are more
// than 16 rows.
template <int Blocks>
void multiply_square(const ProductTile& tile, bool two, std::int64_t j) {
    const std::int8_t* const x = tile.x;
    const std::int8_t* const w = tile.w + j / 16 * tile.w_stride;
    const std::int8_t* const w_right = w + tile.w_stride;
    std::int32_t* const acc = tile.acc + j;
    std::int32_t* const acc_lower = acc + 16 * cols;
    if (tile.first) {
        zero_tile<0>();
        if constexpr (Blocks == 2) zero_tile<1>();
        zero_tile<2>();
        if constexpr (Blocks == 2) zero_tile<3>();
    } else {
        load_tile<0>(acc, acc_stride);
        if constexpr (Blocks == 2) load_tile<1>(acc + 16, acc_stride);
        if (two) load_tile<2>(acc_lower, acc_stride);
        if constexpr (Blocks == 2) {
            if (two) load_tile<3>(acc_lower + 16, acc_stride);
        }
    }
    for (std::int64_t k = 0; k < tile.depth; k += 64) {
        load_tile<6>(w + k * 16, 64);
        load_tile<4>(x + k * rows, 64);
        multiply_tiles<0, 4, 6>();
        if constexpr (Blocks == 2) {
            load_tile<7>(w_right + k * 16, 64);
            multiply_tiles<1, 4, 7>();
        }
        if (two) {
            load_tile<5>(x + k * rows + tile_size, 64);
            multiply_tiles<2, 5, 6>();
            if constexpr (Blocks == 2) multiply_tiles<3, 5, 7>();
        }
    }
    store_tile<0>(acc, acc_stride);
    if constexpr (Blocks == 2) store_tile<1>(acc + 16, acc_stride);
    if (two) store_tile<2>(acc_lower, acc_stride);
    if constexpr (Blocks == 2) {
        if (two) store_tile<3>(acc_lower + 16, acc_stride);
    }
}

inline void multiply(const ProductTile& tile) {
    const bool two = tile.rows > 16;
    std::int64_t j = 0;
    for (; j + 32 <= tile.cols; j += 32) multiply_square<2>(tile, two, j);
    if (j < tile.cols) multiply_square<1>(tile, two, j);
}

}  // namespace tiles

constexpr Plan few = dot_plan<Dot>(3);
constexpr Plan many{.rows = tiles::rows,
                    .cols = tiles::cols,
                    .depth = 256,  // 16 KiB of W
                    .block_rows = 256,
                    .x_is_unsigned = true,
                    .place_row = tiles::place_row,
                    .multiply = tiles::multiply,
                    .enter = tiles::enter,
                    .leave = tiles::release};

}  // namespace octavo::cpu::OCTAVO_ISA
