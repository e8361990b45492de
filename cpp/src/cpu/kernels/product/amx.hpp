// AMX: a tile register holds 16 rows of 64 bytes, and an instruction multiplies 16 rows of X by 16 output features over
// 64 along k. A step of 32 x 32 sums takes 4 tile loads for 4 products; a load takes about as long as half a product
// where the first-level cache has the bytes. So k goes in slices: the slice of 32 rows of X stays there while W, from
// the second-level cache, passes once.
//
// Setting the tiles up costs some hundred cycles, so small products go by AVX-512 VNNI, for whose sake X is unsigned
// here too.
#pragma once

#include "cpu/kernels/product/avx512_vnni.hpp"

namespace octavo::cpu::OCTAVO_ISA {

// The tile registers: sums 0 to 3, X 4 and 5, W 6 and 7. Assembly because the compilers' own functions leave out which
// memory they read.
struct TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

inline void configure(std::int64_t upper_rows, std::int64_t lower_rows) {
    TileConfig config;
    const std::int64_t rows[8] = {upper_rows, upper_rows, lower_rows, lower_rows, upper_rows, lower_rows, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
        config.bytes_per_row[tile] = 64;
        config.rows[tile] = static_cast<std::uint8_t>(rows[tile]);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}
inline void release() { __asm__ volatile("tilerelease"); }

template <int Tile>
void load_tile(const void* p, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
void store_tile(void* p, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int Acc, int X, int W>
void multiply_tiles() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Acc), "i"(X), "i"(W));
}

// Sums of up to 32 rows by 16 * Blocks output features over [begin, end) of k. `two` is whether there are more than 16
// rows; `start` what the sums of a row start from.
template <int Blocks>
void multiply_square(const ProductTile& tile, const std::int32_t* start, bool two, std::int64_t begin, std::int64_t end,
                     std::int64_t j) {
    constexpr std::int64_t acc_stride = tile_cols * 4;
    const std::int8_t* const x = tile.x;
    const std::int8_t* const x_lower = x + 16 * tile.x_stride;
    const std::int8_t* const w = tile.w + j / 16 * tile.w_stride;
    const std::int8_t* const w_right = w + tile.w_stride;
    std::int32_t* const acc = tile.acc + j;
    std::int32_t* const acc_lower = acc + 16 * tile_cols;
    if (begin == 0) {
        constexpr std::int64_t same_row = 0;
        load_tile<0>(start + j, same_row);
        if constexpr (Blocks == 2) load_tile<1>(start + j + 16, same_row);
        if (two) load_tile<2>(start + j, same_row);
        if constexpr (Blocks == 2) {
            if (two) load_tile<3>(start + j + 16, same_row);
        }
    } else {
        load_tile<0>(acc, acc_stride);
        if constexpr (Blocks == 2) load_tile<1>(acc + 16, acc_stride);
        if (two) load_tile<2>(acc_lower, acc_stride);
        if constexpr (Blocks == 2) {
            if (two) load_tile<3>(acc_lower + 16, acc_stride);
        }
    }
    for (std::int64_t k = begin; k < end; k += 64) {
        load_tile<6>(w + k * 16, 64);
        load_tile<4>(x + k, tile.x_stride);
        multiply_tiles<0, 4, 6>();
        if constexpr (Blocks == 2) {
            load_tile<7>(w_right + k * 16, 64);
            multiply_tiles<1, 4, 7>();
        }
        if (two) {
            load_tile<5>(x_lower + k, tile.x_stride);
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

inline void tile_product(const ProductTile& tile) {
    if (tile.rows < 4 || tile.rows * tile.cols * tile.depth < std::int64_t{1} << 17U) return dot_product<Dot>(tile);
    alignas(64) std::int32_t start[tile_cols];
    for (std::int64_t j = 0; j < tile.cols; ++j) start[j] = start_of(tile, j);
    // Up to 32 KiB of X are not worth cutting.
    const std::int64_t slice_depth = tile.depth <= 1024 ? tile.depth : 512;
    const bool two = tile.rows > 16;
    configure(two ? 16 : tile.rows, two ? tile.rows - 16 : 1);
    for (std::int64_t begin = 0; begin < tile.depth;) {
        const bool last = !two || tile.depth - begin <= slice_depth;
        const std::int64_t end = last ? tile.depth : begin + slice_depth;
        std::int64_t j = 0;
        for (; j + 32 <= tile.cols; j += 32) multiply_square<2>(tile, start, two, begin, end, j);
        if (j < tile.cols) multiply_square<1>(tile, start, two, begin, end, j);
        begin = end;
    }
    release();
}

}  // namespace octavo::cpu::OCTAVO_ISA
