// The product of activations as they are by int8 weights, in float32 (table.hpp says in which order).
//
// A lane holds 4 neighbors along k of one output feature, which is how packed codes lie in memory. Each of the 4 is
// shifted out, converted, and multiplied with its value of X, for all output features of a register at once.
#include "cpu/kernels/floats.hpp"
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr std::int64_t features = 16;
constexpr int vectors = static_cast<int>(features / width);  // registers of a block
constexpr int pair = vectors < 2 ? vectors : 2;

// Code `place` of each lane.
template <int Place>
[[gnu::always_inline]] inline void convert(const Ints& groups, Floats& numbers) {
    numbers = __builtin_convertvector((groups << (24 - 8 * Place)) >> 24, Floats);
}

// `Rows` rows of X from row i on by `Vectors` registers of the block, for `Places` places of 4 along k. `load` gives
// the weights at (group of 4, place, register); the last two are part of their types, as in unroll.hpp.
template <int Rows, int Places, int Vectors, int FirstPlace, int FirstVector, class Load>
void multiply_square(const FloatTile& tile, std::int64_t i, Load load) {
    Floats sums[Rows * Places * Vectors];
    unroll<Rows * Places * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] = Floats{}; });
    const float* const x = tile.x + i * tile.x_stride + FirstPlace;
    for (std::int64_t group = 0; group < tile.depth / 4; ++group) {
        unroll<Places>([&](auto p) OCTAVO_INLINE {
            Floats weights[Vectors];
            unroll<Vectors>([&](auto u) OCTAVO_INLINE {
                load(group, IndexConstant<FirstPlace + p>{}, IndexConstant<FirstVector + u>{}, weights[u]);
            });
            unroll<Rows>([&](auto r) OCTAVO_INLINE {
                const Floats value = x[r * tile.x_stride + group * 4 + p] - Floats{};
                unroll<Vectors>([&](auto u) OCTAVO_INLINE {
                    fused_multiply_add(value, weights[u], sums[(r * Places + p) * Vectors + u]);
                });
            });
        });
    }
    float* const target = tile.sums + (i * 4 + FirstPlace) * features + FirstVector * width;
    unroll<Rows * Places * Vectors>([&](auto s) OCTAVO_INLINE {
        constexpr int row = s / (Places * Vectors);
        constexpr int place = s / Vectors % Places;
        float* const part = target + (row * 4 + place) * features + s % Vectors * width;
        Floats before{};
        if (!tile.first) read(part, before);
        before += sums[s];
        __builtin_memcpy(part, &before, sizeof before);
    });
}

// The whole width and depth of the tile, for `Rows` rows from row i on.
template <int Rows, int Places, int Vectors, class Load>
void multiply_rows(const FloatTile& tile, std::int64_t i, Load load) {
    unroll<vectors / Vectors>([&](auto v) {
        unroll<4 / Places>(
            [&](auto p) { multiply_square<Rows, Places, Vectors, p * Places, v * Vectors>(tile, i, load); });
    });
}

// The squares have 8 to 12 sums: enough to keep the processor busy, and no more than registers hold.
template <class Load>
void multiply_codes(const FloatTile& tile, Load load) {
    std::int64_t i = 0;
    for (; i + 4 <= tile.rows; i += 4) multiply_rows<4, 2, 1>(tile, i, load);
    switch (tile.rows - i) {
        case 3: return multiply_rows<3, 4, 1>(tile, i, load);
        case 2: return multiply_rows<2, 4, 1>(tile, i, load);
        case 1: return multiply_rows<1, 4, pair>(tile, i, load);
        default: return;
    }
}

}  // namespace

void widen(const std::int8_t* w, std::int64_t depth, const float* zeropoint, float* target) {
    for (std::int64_t group = 0; group < depth / 4; ++group, target += 4 * features) {
        unroll<vectors>([&](auto v) OCTAVO_INLINE {
            Ints codes;
            read(w + group * 64 + v * register_size, codes);
            unroll<4>([&](auto place) OCTAVO_INLINE {
                Floats numbers;
                convert<place>(codes, numbers);
                if (zeropoint != nullptr) {
                    Floats zeropoints;
                    read(zeropoint + v * width, zeropoints);
                    numbers += zeropoints;
                }
                __builtin_memcpy(target + place * features + v * width, &numbers, sizeof numbers);
            });
        });
    }
}

void multiply_floats(const FloatTile& tile) {
    const auto codes_at = [&](std::int64_t group, auto place, auto v, Floats& weights) OCTAVO_INLINE {
        constexpr std::int64_t ahead = 20 * 64;  // bytes, so that W is there in time
        if constexpr (place == 0) __builtin_prefetch(tile.w + group * 64 + v * register_size + ahead);
        Ints codes;
        read(tile.w + group * 64 + v * register_size, codes);
        convert<place>(codes, weights);
    };
    if (tile.w_floats != nullptr) {
        const auto load = [&](std::int64_t group, auto place, auto v, Floats& weights) OCTAVO_INLINE {
            read(tile.w_floats + (group * 4 + place) * features + v * width, weights);
        };
        std::int64_t i = 0;
        for (; i + 6 <= tile.rows; i += 6) multiply_rows<6, 2 / pair, pair>(tile, i, load);
        for (; i + 2 <= tile.rows; i += 2) multiply_rows<2, 2, pair>(tile, i, load);
        if (i < tile.rows) multiply_rows<1, 4, pair>(tile, i, load);
    } else if (tile.zeropoint == nullptr) {
        multiply_codes(tile, codes_at);
    } else {
        multiply_codes(tile, [&](std::int64_t group, auto place, auto v, Floats& weights) OCTAVO_INLINE {
            codes_at(group, place, v, weights);
            Floats zeropoints;
            read(tile.zeropoint + v * width, zeropoints);
            weights += zeropoints;
        });
    }
}

void finish_floats(const float* sums, std::int64_t rows, const float* scale, float* y) {
    for (std::int64_t i = 0; i < rows; ++i, sums += 4 * features, y += features) {
        for (std::int64_t j = 0; j < features; ++j) {
            const float* const places = sums + j;
            y[j] = ((places[0] + places[features]) + (places[2 * features] + places[3 * features])) * scale[j];
        }
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
