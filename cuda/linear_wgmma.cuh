// The tiles of linear_wgmma.cu, and what launches them.
#pragma once

#include "division.hpp"
#include "linear_epilogue.cuh"
#include "memory.hpp"
#include "mma_tile.cuh"

namespace octavo::cuda {

// Of warps each of which has 16 rows of the tile, whole, so that the registers hold what those of a tile of
// mma_tile.cuh of such warps do. Slices are of 128 bytes.
template <int rows_, int cols_, int stages_, int resident_>
struct GroupTile : Tile<rows_, cols_, 16, cols_, resident_> {
    static constexpr int stages = stages_;
    static constexpr int slice = 128;
    static constexpr int stage_bytes = (rows_ + cols_) * slice;
};
using Wide = GroupTile<128, 256, 4, 1>;
using High = GroupTile<192, 128, 5, 1>;
using Square = GroupTile<128, 128, 3, 2>;

// `a` and `b`: rows aligned to 16 bytes.
template <class Tile>
void start_wgmma(const ConstMatrix& a, const ConstMatrix& b, const Division& division, const Rest& rest,
                 cudaStream_t stream);

}  // namespace octavo::cuda
