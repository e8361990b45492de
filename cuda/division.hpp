// How the products of a layer are divided among the multiprocessors of a device, by counting what that with most to do
// has to do: the tile of the int8 product and how many blocks share its depth, and the same of the weight-only one.
// Host code, of the backend and of the model of time that chooses between the two (bench/cpp/selection.cpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <numeric>

namespace octavo::cuda {

// How many of a size cover the count.
inline std::int64_t whole(std::int64_t count, std::int64_t size) { return (count + size - 1) / size; }

// --- the int8 product -----------------------------------------------------------------------------------------------

// Tiles of linear_wgmma.cu and, from `large` on, of mma_tile.cuh.
enum class Choice : std::uint8_t { wide, high, square, large, medium, tall, small };

struct TileShape {
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t granule;  // of rows that are not multiplied where m has none of them
    double rate;           // what it reaches, of what `large` does
};
// In the order of Choice. Of the peak of an H200, `large` reaches .54, `wide` .62. The other two of warpgroups, and the
// last three (mma_tile.cuh), are bound by shared memory: slower as they need it longer for each product.
inline constexpr TileShape tile_shapes[] = {
    {128, 256, 64, 1.15}, {192, 128, 64, 1.11}, {128, 128, 64, 1.04}, {256, 128, 16, 1.0},
    {128, 128, 16, 0.95}, {96, 64, 16, 0.7},    {64, 64, 16, 0.6},
};
// A tile of few rows takes the time of as many more: the rows of W go to shared memory and from there all the same.
inline constexpr double rows_more = 24.0;
// A part more: its sums go to memory and come back, meanwhile as many columns of k are multiplied.
inline constexpr double columns_of_part = 256.0;
inline constexpr std::int64_t most_parts = 16;
inline constexpr std::int64_t least_slices = 8;  // of 64 columns, that a part has

struct Division {
    Choice tile = Choice::small;
    std::int64_t parts = 1;   // blocks that share the depth of a tile
    std::int64_t height = 0;  // rows of X that a tile has: as many as it could, or fewer, so that all have the same
    double cost = std::numeric_limits<double>::infinity();
};

// What a tile takes that has so many rows, of what one takes that has all.
inline double share_of_tile(const TileShape& tile, std::int64_t present) {
    const auto rows = static_cast<double>(tile.rows);
    const auto own = static_cast<double>(whole(present, tile.granule) * tile.granule);
    return own >= rows ? 1.0 : (rows_more + (rows - rows_more) * own / rows) / rows;
}

// The columns that the multiprocessor with most work multiplies by tiles of `height` rows, where each of `parts` has
// `depth` of them.
inline double columns_of_most(const TileShape& tile, std::int64_t height, std::int64_t m, std::int64_t n,
                              std::int64_t multiprocessors, std::int64_t parts, std::int64_t depth) {
    const std::int64_t cols = whole(n, tile.cols);
    const std::int64_t full = m / height * cols;
    const std::int64_t present = m % height;
    const std::int64_t others = present > 0 ? cols : 0;  // tiles of the last rows
    // All parts of full tiles come first: the others go to multiprocessors that have one less, while there are any.
    const std::int64_t first = full * parts;
    const std::int64_t idle = first % multiprocessors > 0 ? multiprocessors - first % multiprocessors : 0;
    const std::int64_t then = whole(std::max<std::int64_t>(others * parts - idle, 0), multiprocessors);
    const double tiles = static_cast<double>(whole(first, multiprocessors)) * share_of_tile(tile, height) +
                         static_cast<double>(then) * share_of_tile(tile, present);
    return tiles * static_cast<double>(depth);
}

// The best way to divide a product by one tile, for m, n >= 1.
inline Division divide_by(Choice tile, const TileShape& shape, std::int64_t m, std::int64_t n, std::int64_t k,
                          std::int64_t multiprocessors) {
    Division best;
    const std::int64_t slices = whole(k, 64);
    const std::int64_t even = whole(whole(m, whole(m, shape.rows)), shape.granule) * shape.granule;
    for (const std::int64_t height : {shape.rows, even}) {
        for (std::int64_t parts = 1; parts <= most_parts; ++parts) {
            const std::int64_t own = whole(slices, parts);
            if (parts > 1 && (own < least_slices || whole(slices, own) != parts)) continue;
            const double columns = columns_of_most(shape, height, m, n, multiprocessors, parts, own * 64) +
                                   (parts > 1 ? columns_of_part * static_cast<double>(parts + 1) : 0.0);
            const double cost = columns * static_cast<double>(shape.rows * shape.cols) / shape.rate;
            if (cost < best.cost) best = {tile, parts, height, cost};
        }
    }
    return best;
}

// `first`: of those tiles that there are.
inline Division divide_product(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t multiprocessors,
                               Choice first) {
    Division best;
    for (auto tile = static_cast<std::size_t>(first); tile < std::size(tile_shapes); ++tile) {
        const Division own = divide_by(static_cast<Choice>(tile), tile_shapes[tile], m, n, k, multiprocessors);
        if (own.cost < best.cost) best = own;
    }
    return best;
}

// --- codes of outlier columns ---------------------------------------------------------------------------------------

// Codes of W lie 32 bytes apart, as far as memory is read. Where there are few rows of tiles, each of which reads all
// of W anyway, and few such columns, the product keeps those that it passes (linear_epilogue.cuh).
inline constexpr std::int64_t most_pickers = 8;
inline constexpr std::int64_t most_picked = 64;
inline constexpr std::int64_t most_picked_depth = 0xFF00;  // columns are listed in 16 bits, and slices end behind k

// --- W on its way while X is quantized ------------------------------------------------------------------------------

// The launches before the product leave memory idle, each for this many microseconds: meanwhile each asks for a part of
// W to be brought to the level-2 cache, of which all of them take no more than two fifths.
inline constexpr double idle_time = 1.7;
inline constexpr double share_of_cache = 0.2;
// Products of more rows of X are not bound by reading W.
inline constexpr std::int64_t most_rows_ahead = 256;
inline constexpr std::int64_t ahead_chunk = 512;  // bytes of a row of W

// Bytes for each launch; `bandwidth` is that of memory, in bytes for a microsecond.
inline double bytes_ahead(double bandwidth, double cache) {
    return std::min(bandwidth * idle_time, cache * share_of_cache);
}

// In how many chunks of W each of `launches` asks for one. What is asked for lies among what is not, whatever part of
// the rows or of their columns a block reads: so cache and memory are read at a time.
inline std::int64_t every_ahead(std::int64_t n, std::int64_t k, double of_launch, std::int64_t launches) {
    const auto wanted = static_cast<std::int64_t>(std::ceil(static_cast<double>(n * k) / of_launch));
    if (wanted <= launches) return launches;
    const std::int64_t of_row = whole(k, ahead_chunk);
    std::int64_t every = wanted;
    while (std::gcd(every, of_row) > 1) ++every;
    return every;
}

// --- the weight-only product by dot products ------------------------------------------------------------------------

// Instructions of a warp for 2048 codes, and more of them for each row of X (.ci/cuda_bounds.txt).
inline constexpr double dot_work = 245.0;
inline constexpr double dot_work_of_row = 75.0;

struct DotTile {
    std::int64_t rows;
    double work;  // of all tiles
};

// The rows of a tile, at most `most`, for m >= 1.
inline DotTile dot_tile(std::int64_t m, std::int64_t most) {
    DotTile best{1, std::numeric_limits<double>::infinity()};
    for (const std::int64_t rows : {1, 2, 4, 5, 6, 8, 9}) {
        const double work =
            static_cast<double>(whole(m, rows)) * (dot_work + dot_work_of_row * static_cast<double>(rows));
        if (rows <= most && work < best.work) best = {rows, work};
    }
    return best;
}

// --- the weight-only product by matrix instructions -----------------------------------------------------------------

// Warps of a block that share the depth, and blocks that do.
struct Split {
    std::int64_t warps = 0;  // 0: there is not enough shared memory
    std::int64_t parts = 1;
    std::int64_t blocks = 0;  // of all parts
    double read = 0.0;        // bytes, as if all multiprocessors read all the time
    double cost = std::numeric_limits<double>::infinity();
};

// The bytes that could be read while a launch more, which adds the sums of parts, takes its time.
inline constexpr double bytes_of_launch = 3.5e6;
inline constexpr std::int64_t most_split = 32;
// What instructions take of a code, and more of it for each row of the tile, as bytes that could be read meanwhile.
inline constexpr double least_work = 0.5;
inline constexpr double work_of_row = 0.0125;

// For tiles of `tile` rows; `resident`: blocks of a multiprocessor. `most_warps`: as shared memory allows. The cost is
// the bytes that could be read meanwhile. Codes are read by one block, rows of X by all that have features of their
// own. Two thirds of the multiprocessors can take all that the memory gives.
inline Split split_weight_only(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t multiprocessors,
                               std::int64_t tile, std::int64_t resident, std::int64_t most_warps) {
    Split best;
    const std::int64_t at_once = multiprocessors * resident;
    const auto all = static_cast<double>(multiprocessors);
    for (std::int64_t warps = 1; warps <= most_warps; warps *= 2) {
        if (warps > 1 && warps * 64 >= k + 64) break;  // some would have no work
        const std::int64_t blocks = whole(m, tile) * whole(n, 256 / warps);
        const std::int64_t steps = std::max<std::int64_t>(whole(k, 64 * warps), 1);
        const std::int64_t most = blocks < multiprocessors ? std::min(most_split, 2 * multiprocessors / blocks) : 1;
        for (std::int64_t parts = 1; parts <= std::max<std::int64_t>(most, 1); ++parts) {
            const std::int64_t own = whole(steps, parts);
            if (parts > 1 && whole(steps, own) != parts) continue;
            const std::int64_t count = blocks * parts;
            const std::int64_t last = count % at_once;
            const double waves =
                static_cast<double>(count - last) + (last > 0 ? std::max(static_cast<double>(last), all * 2 / 3) : 0.0);
            const auto bytes = static_cast<double>(n * k + 2 * std::min(m, tile) * k * blocks);
            const double read = bytes * waves / static_cast<double>(count) * static_cast<double>(own * parts) /
                                static_cast<double>(steps);
            const double work = (least_work + work_of_row * static_cast<double>(tile)) *
                                static_cast<double>(n * k * whole(m, tile) * whole(count, multiprocessors)) * all /
                                static_cast<double>(count);
            double cost = std::max(read, work) + 0.15 * std::min(read, work);
            if (parts > 1) cost += bytes_of_launch + static_cast<double>(8 * parts * m * n);
            if (cost < best.cost) best = {warps, parts, count, read, cost};
        }
    }
    return best;
}

}  // namespace octavo::cuda
