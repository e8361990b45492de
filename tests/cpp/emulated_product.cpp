// The products of VNNI and AMX with their instructions done one number at a time, so that all around those is tested on
// processors that have neither: a plan `few` (avx512_vnni's register tile), `some` and `many` (AMX), of an instruction
// set "emulated".
#define OCTAVO_ISA emulated

#include <array>
#include <cstring>

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::emulated {

struct Dot {
    static constexpr int rows = 6;
    static constexpr int blocks = 4;
    static constexpr int vectors = 1;
    static constexpr int x_size = 1;
    static constexpr int speed = 60;
    static constexpr bool x_is_unsigned = true;
    static constexpr auto place_row = place_unsigned;
    using Accumulator = std::array<std::uint32_t, 16>;  // sums wrap, as the instruction's do
    using X = std::int32_t;
    using W = const std::int8_t*;
    static Accumulator zero() { return {}; }
    static X broadcast(const std::int8_t* p) { return group_at(p); }
    static W load(const std::int8_t* p) { return p; }
    static void multiply_add(Accumulator& acc, X x, W w) {
        for (std::size_t lane = 0; lane < 16; ++lane) {
            for (std::size_t i = 0; i < 4; ++i) {
                const auto code = static_cast<std::uint8_t>(static_cast<std::uint32_t>(x) >> (8 * i));
                acc[lane] += static_cast<std::uint32_t>(code * w[lane * 4 + i]);
            }
        }
    }
    static void store(std::int32_t* p, const Accumulator& acc) { std::memcpy(p, acc.data(), sizeof acc); }
    static void add(std::int32_t* p, const Accumulator& acc) {
        for (std::size_t lane = 0; lane < 16; ++lane) {
            p[lane] = static_cast<std::int32_t>(static_cast<std::uint32_t>(p[lane]) + acc[lane]);
        }
    }
};

namespace tiles {

struct TileConfig {
    std::uint8_t palette = 1;
    std::uint16_t bytes_per_row[16] = {};
    std::uint8_t rows[16] = {};
};

struct Register {
    std::uint32_t words[16][16];
};

namespace {
Register registers[8];
TileConfig current;
}  // namespace

inline void configure(const TileConfig& config) {
    current = config;
    std::memset(registers, 0, sizeof registers);
}
inline void release() { current = {}; }

template <int Tile>
void load_tile(const void* p, std::int64_t stride) {
    std::memset(&registers[Tile], 0, sizeof registers[Tile]);
    for (std::int64_t row = 0; row < std::int64_t{current.rows[Tile]}; ++row) {
        std::memcpy(registers[Tile].words[row], static_cast<const char*>(p) + row * stride, 64);
    }
}
template <int Tile>
void load_passing_tile(const void* p, std::int64_t stride) {
    load_tile<Tile>(p, stride);
}
template <int Tile>
void store_tile(void* p, std::int64_t stride) {
    for (std::int64_t row = 0; row < std::int64_t{current.rows[Tile]}; ++row) {
        std::memcpy(static_cast<char*>(p) + row * stride, registers[Tile].words[row], 64);
    }
}
template <int Tile>
void zero_tile() {
    std::memset(&registers[Tile], 0, sizeof registers[Tile]);
}
template <int Acc, int X, int W>
void multiply_tiles() {
    for (std::int64_t row = 0; row < std::int64_t{current.rows[Acc]}; ++row) {
        for (std::int64_t col = 0; col < 16; ++col) {
            for (std::int64_t k = 0; k < 64; ++k) {
                const auto byte = static_cast<std::uint32_t>(8 * (k % 4));
                const auto x = static_cast<std::int8_t>(registers[X].words[row][k / 4] >> byte);
                const auto w = static_cast<std::int8_t>(registers[W].words[k / 4][col] >> byte);
                registers[Acc].words[row][col] += static_cast<std::uint32_t>(x * w);
            }
        }
    }
}

}  // namespace tiles
}  // namespace octavo::cpu::emulated

#include "cpu/kernels/product/amx.hpp"
