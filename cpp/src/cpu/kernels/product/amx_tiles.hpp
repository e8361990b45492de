// The instructions of AMX. Assembly because the compilers' own functions leave out which memory they read.
#pragma once

#include <cstdint>

#include "cpu/kernels/table.hpp"

namespace octavo::cpu::OCTAVO_ISA::tiles {

struct TileConfig {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t bytes_per_row[16] = {};
    std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

inline void configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config)); }
inline void release() { __asm__ volatile("tilerelease"); }

template <int Tile>
void load_tile(const void* p, std::int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(Tile) : "memory");
}
// The same for bytes that will not be wanted again soon.
template <int Tile>
void load_passing_tile(const void* p, std::int64_t stride) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
void store_tile(void* p, std::int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
void zero_tile() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
// Acc += X W.
template <int Acc, int X, int W>
void multiply_tiles() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Acc), "i"(X), "i"(W));
}

// Plan::can_begin: `count` tiles of W more, as far as there are, of what multiply_row_of_tiles<2> will go on with.
inline void begin(ProductTile& tile, std::int64_t count) {
    if (count > 0 && tile.begun == 0) {
        zero_tile<0>();
        zero_tile<1>();
    }
    for (; count > 0 && tile.begun / 2 * 64 < tile.depth; --count, ++tile.begun) {
        const std::int64_t k = tile.begun / 2 * 64;
        if (tile.begun % 2 == 0) {
            load_tile<4>(tile.x + k * 16, 64);
            load_passing_tile<6>(tile.w + k * 16, 64);
            multiply_tiles<0, 4, 6>();
        } else {
            load_passing_tile<7>(tile.w + tile.w_stride + k * 16, 64);
            multiply_tiles<1, 4, 7>();
        }
    }
}
// Where in the first block of W the rest begins, or null.
inline const std::int8_t* begin_of_rest(const ProductTile& tile) {
    const std::int64_t k = tile.begun / 2 * 64;
    return k < tile.depth ? tile.w + k * 16 : nullptr;
}

}  // namespace octavo::cpu::OCTAVO_ISA::tiles
