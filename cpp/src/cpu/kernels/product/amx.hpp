// AMX: a tile register holds 16 rows of 64 bytes, and an instruction multiplies 16 rows of X by 16 output features over
// 64 along k. A step of 32 x 32 sums takes 4 tile loads for 4 products, which hides behind the products as long as the
// lines come from the first-level cache, and does not where all of them come from the second. So
//
//   the slice of W for 32 output features (32 KiB) stays in the first-level cache. X and the sums pass by it with the
//   hint that they will not be wanted soon (tileloaddt1), without which they would push W out;
//   the sums of a panel are stored among the first products of the next one: 64 lines in a row would hold these up;
//   and finished among the others, on units of the processor that products leave idle; whole sums of all panels go to
//   the same place for that, so that they stay in the first-level cache;
//   the slice of W that comes next is fetched into the second-level cache meanwhile.
//
// Up to 16 rows are one row of tiles, by which W passes, while X stays in the first-level cache. Setting the tiles up
// costs some hundred cycles, so fewer still go by AVX-512 VNNI.
#pragma once

#include "cpu/kernels/product/amx_begin.hpp"
#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

namespace tiles {

constexpr std::int64_t rows = 32;
constexpr std::int64_t cols = 32;
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

// panel[k / 64][row][k % 64]
inline std::int32_t place_row(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    for (std::int64_t k = 0; k < depth; k += 64) __builtin_memcpy(panel + k * rows + row * 64, codes + k, 64);
    return 0;
}

// Sums number Tile of the panel before are put away, those of this one fetched.
template <int Tile>
void change_sums(std::int32_t* before, std::int32_t* acc, bool first) {
    constexpr std::int64_t place = std::int64_t{Tile / 2} * 16 * cols + std::int64_t{Tile % 2} * 16;
    if (before != nullptr) store_tile<Tile>(before + place, acc_stride);
    if (acc == nullptr) return;
    if (first) {
        zero_tile<Tile>();
    } else {
        load_passing_tile<Tile>(acc + place, acc_stride);
    }
}

// All panels of a run by 16 * Blocks output features.
template <int Blocks>
void multiply_panels(const ProductTile& run) {
    const std::int8_t* const w = run.w;
    const std::int8_t* const w_right = w + run.w_stride;
    const std::int8_t* ahead = run.ahead;
    const std::int64_t steps = (run.rows + rows - 1) / rows * (run.depth / 64);
    const std::int64_t lines_of_step = ahead == nullptr ? 0 : (run.ahead_depth / 4 + steps - 1) / steps;
    constexpr std::int64_t together = 16;  // rows that are finished at a time
    std::int64_t finished = 0;
    const auto finish = [&](std::int64_t end) {
        if (run.finish == nullptr || end <= finished) return;
        run.finish(run.context, finished, end - finished);
        finished = end;
    };
    std::int32_t* before = nullptr;  // where the sums of the panel before go
    std::int32_t* acc = run.acc;
    const std::int8_t* x = run.x;
    for (std::int64_t row = 0; row < run.rows; row += rows, x += rows * run.depth, acc += rows * cols) {
        const bool two = run.rows - row > 16;
        for (std::int64_t k = 0; k < run.depth; k += 64) {
            const bool changes = k == 0;
            load_tile<6>(w + k * 16, 64);
            load_passing_tile<4>(x + k * rows, 64);
            if (changes) change_sums<0>(before, acc, run.first);
            multiply_tiles<0, 4, 6>();
            if constexpr (Blocks == 2) {
                load_tile<7>(w_right + k * 16, 64);
                if (changes) change_sums<1>(before, acc, run.first);
                multiply_tiles<1, 4, 7>();
            }
            for (std::int64_t line = 0; line < lines_of_step; ++line, ahead += 64) {
                __builtin_prefetch(ahead, 0, 2);
                if constexpr (Blocks == 2) __builtin_prefetch(ahead + run.ahead_stride, 0, 2);
            }
            if (two) load_passing_tile<5>(x + k * rows + tile_size, 64);
            if (changes) {
                change_sums<2>(before, two ? acc : nullptr, run.first);
                if constexpr (Blocks == 2) change_sums<3>(before, two ? acc : nullptr, run.first);
            }
            if (two) {
                multiply_tiles<2, 5, 6>();
                if constexpr (Blocks == 2) multiply_tiles<3, 5, 7>();
            }
            if (before == nullptr) continue;
            const bool is_last = k + 64 == run.depth;
            finish(row - rows + (is_last ? rows : rows * k / (run.depth - 64) / together * together));
        }
        before = run.finish != nullptr ? run.whole : acc;
    }
    const bool two = (run.rows - 1) % rows >= 16;
    change_sums<0>(before, nullptr, false);
    if constexpr (Blocks == 2) change_sums<1>(before, nullptr, false);
    if (two) {
        change_sums<2>(before, nullptr, false);
        if constexpr (Blocks == 2) change_sums<3>(before, nullptr, false);
    }
    finish(run.rows);
}

// panel[k / 64][row][k % 64] of up to 16 rows: in panels of 32 they would lie in half of the sets of a cache.
inline std::int32_t place_row_of_16(const std::int8_t* codes, std::int64_t depth, std::int64_t row,
                                    std::int8_t* panel) {
    for (std::int64_t k = 0; k < depth; k += 64) __builtin_memcpy(panel + k * 16 + row * 64, codes + k, 64);
    return 0;
}

// Up to 16 rows by 16 * Blocks output features. Lines of W come from the first to the last, which the processor fetches
// ahead by itself: what was also fetched here would come by the caches' ports twice.
template <int Blocks>
void multiply_row_of_tiles(const ProductTile& tile) {
    if (tile.begun == 0) {
        change_sums<0>(nullptr, tile.acc, tile.first);
        if constexpr (Blocks == 2) change_sums<1>(nullptr, tile.acc, tile.first);
    }
    const auto step = [&](std::int64_t k, bool left) OCTAVO_INLINE {
        load_tile<4>(tile.x + k * 16, 64);
        if (left) {
            load_passing_tile<6>(tile.w + k * 16, 64);
            multiply_tiles<0, 4, 6>();
        }
        if constexpr (Blocks == 2) {
            load_passing_tile<7>(tile.w + tile.w_stride + k * 16, 64);
            multiply_tiles<1, 4, 7>();
        }
    };
    std::int64_t k = tile.begun / Blocks * 64;
    if (tile.begun % Blocks != 0) {
        step(k, false);
        k += 64;
    }
    for (; k < tile.depth; k += 64) step(k, true);
    change_sums<0>(tile.acc, nullptr, false);
    if constexpr (Blocks == 2) change_sums<1>(tile.acc, nullptr, false);
}

inline void multiply_few(const ProductTile& tile) {
    tile.cols == cols ? multiply_row_of_tiles<2>(tile) : multiply_row_of_tiles<1>(tile);
}

inline void multiply(const ProductTile& run) { run.cols == cols ? multiply_panels<2>(run) : multiply_panels<1>(run); }

}  // namespace tiles

constexpr Plan few = dot_plan<Dot>(3);
constexpr Plan some{.rows = 16,
                    .cols = tiles::cols,
                    .depth = 1024,
                    .block_rows = 16,
                    .speed = 1100,
                    .place_row = tiles::place_row_of_16,
                    .multiply = tiles::multiply_few,
                    .begin = tiles::begin,
                    .enter = tiles::enter,
                    .leave = tiles::release};
constexpr Plan many{.rows = tiles::rows,
                    .cols = tiles::cols,
                    .depth = 1024,  // 32 KiB of W
                    .block_rows = 256,
                    .run_rows = 256,
                    .speed = 1100,
                    .place_row = tiles::place_row,
                    .multiply = tiles::multiply,
                    .enter = tiles::enter,
                    .leave = tiles::release};

}  // namespace octavo::cpu::OCTAVO_ISA
