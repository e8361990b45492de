// The beginning of a product of up to 16 rows by AMX, by whoever has something else to do while W comes. The
// instructions are to be included before it.
#pragma once

#include "cpu/kernels/table.hpp"

namespace octavo::cpu::OCTAVO_ISA::tiles {

// Plan::begin: `count` tiles of W more, as far as there are, of what multiply_row_of_tiles<2> will go on with.
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
