// The instructions of AMX. Assembly because the compilers' own functions leave out which memory they read.
#pragma once

#include <cstdint>

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

}  // namespace octavo::cpu::OCTAVO_ISA::tiles
