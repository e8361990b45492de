// Products of floats by int8 weights, in float32 (table.hpp says in which order).
//
// In packed codes a lane holds 4 neighbors along k of one output feature. For weight_only each of the 4 is shifted out,
// converted, and multiplied with its value of X, for all output features of a register at once.
#include "cpu/kernels/floats.hpp"
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr std::int64_t features = 16;                        // of a block
constexpr int vectors = static_cast<int>(features / width);  // registers of a block
constexpr int pair = vectors < 2 ? vectors : 2;

// Code `place` of each lane.
template <int Place>
[[gnu::always_inline]] inline void convert(const Ints& groups, Floats& numbers) {
#if defined(__AVX512BW__)
    // As code + 128 into the lowest byte of 2^23, whose last place is 1: an instruction fewer than shifting and
    // converting.
    const __m512i from = _mm512_set4_epi32(12 + Place, 8 + Place, 4 + Place, Place);
    const __m512i codes = _mm512_xor_si512(reinterpret_cast<__m512i>(groups), _mm512_set1_epi8(-128));
    const __m512i shuffled = _mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x4B000000), 0x1111111111111111U, codes, from);
    numbers = reinterpret_cast<Floats>(shuffled) - (0x1p23F + 128.0F);
#else
    numbers = __builtin_convertvector((groups << (24 - 8 * Place)) >> 24, Floats);
#endif
}

// `Rows` rows of X from row i on by `Vectors` registers of the block, for `Places` places of `Group` along the depth.
// `load` gives the weights at (group, place, register); the last two are part of their types, as in unroll.hpp.
template <int Group, int Rows, int Places, int Vectors, int FirstPlace, int FirstVector, class Load>
void multiply_square(const FloatTile& tile, std::int64_t i, Load load) {
    Floats sums[Rows * Places * Vectors];
    unroll<Rows * Places * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] = Floats{}; });
    const float* const x = tile.x + i * tile.x_stride + FirstPlace;
    for (std::int64_t group = 0; group < tile.depth / Group; ++group) {
        unroll<Places>([&](auto p) OCTAVO_INLINE {
            Floats weights[Vectors];
            unroll<Vectors>([&](auto u) OCTAVO_INLINE {
                load(group, IndexConstant<FirstPlace + p>{}, IndexConstant<FirstVector + u>{}, weights[u]);
            });
            unroll<Rows>([&](auto r) OCTAVO_INLINE {
                const Floats value = x[r * tile.x_stride + group * Group + p] - Floats{};
                unroll<Vectors>([&](auto u) OCTAVO_INLINE {
                    fused_multiply_add(value, weights[u], sums[(r * Places + p) * Vectors + u]);
                });
            });
        });
    }
    float* const target = tile.sums + (i * Group + FirstPlace) * features + FirstVector * width;
    unroll<Rows * Places * Vectors>([&](auto s) OCTAVO_INLINE {
        constexpr int row = s / (Places * Vectors);
        constexpr int place = s / Vectors % Places;
        float* const part = target + (row * Group + place) * features + s % Vectors * width;
        Floats before{};
        if (!tile.first) read(part, before);
        before += sums[s];
        __builtin_memcpy(part, &before, sizeof before);
    });
}

// The whole width and depth of the tile, for `Rows` rows from row i on.
template <int Group, int Rows, int Places, int Vectors, class Load>
void multiply_rows(const FloatTile& tile, std::int64_t i, Load load) {
    unroll<vectors / Vectors>([&](auto v) {
        unroll<Group / Places>(
            [&](auto p) { multiply_square<Group, Rows, Places, Vectors, p * Places, v * Vectors>(tile, i, load); });
    });
}

// The squares have 8 to 16 sums: enough to keep the processor busy, and no more than registers hold.
template <class Load>
void multiply_codes(const FloatTile& tile, Load load) {
    constexpr int places = register_size == 64 ? 4 : 2;
    std::int64_t i = 0;
    for (; i + 4 <= tile.rows; i += 4) multiply_rows<4, 4, places, 1>(tile, i, load);
    switch (tile.rows - i) {
        case 3: return multiply_rows<4, 3, 4, 1>(tile, i, load);
        case 2: return multiply_rows<4, 2, 4, 1>(tile, i, load);
        case 1: return multiply_rows<4, 1, 4, pair>(tile, i, load);
        default: return;
    }
}

// The last rows with one place: at most `Rows`.
template <int Rows, class Load>
void multiply_last_rows(const FloatTile& tile, std::int64_t i, Load load) {
    if constexpr (Rows > 0) {
        if (tile.rows - i == Rows) return multiply_rows<1, Rows, 1, pair>(tile, i, load);
        multiply_last_rows<Rows - 1>(tile, i, load);
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

// Fours of codes are brought into rows before they are converted, some rows ahead, so that no load waits for a store.
void dequantize_square(const std::int8_t* w, std::int64_t w_stride, std::int64_t count, const float* zeropoint,
                       const float* scale, float* target) {
    constexpr std::int64_t columns = 16;
    std::int8_t rows[features][columns];
    for (std::int64_t first = 0; first < count; first += features, w += w_stride, target += features * columns) {
        for (std::int64_t j = 0; j < features; ++j) {
            for (std::int64_t column = 0; column < columns; column += 4) {
                __builtin_memcpy(&rows[j][column], w + column * features + j * 4, 4);
            }
        }
        for (std::int64_t j = 0; j < features; ++j) {
            const Floats shift = zeropoint[first + j] - Floats{};
            const Floats factor = scale[first + j] - Floats{};
            unroll<vectors>([&](auto v) OCTAVO_INLINE {
                Ints codes;
                read_codes(&rows[j][v * width], codes);
                const Floats numbers = (__builtin_convertvector(codes, Floats) + shift) * factor;
                __builtin_memcpy(target + j * columns + v * width, &numbers, sizeof numbers);
            });
        }
    }
}

void multiply_floats(const FloatTile& tile) {
    const auto codes_at = [&](std::int64_t group, auto place, auto v, Floats& weights) OCTAVO_INLINE {
        constexpr std::int64_t ahead = std::int64_t{40} * 64;  // bytes, so that W is there in time
        if constexpr (place == 0) __builtin_prefetch(tile.w + group * 64 + v * register_size + ahead);
        Ints codes;
        read(tile.w + group * 64 + v * register_size, codes);
        convert<place>(codes, weights);
    };
    if (tile.places == 1) {
        constexpr int most = vectors == 1 ? 12 : 6;  // rows: sums in 12 registers
        const auto load = [&](std::int64_t k, auto /*place*/, auto v, Floats& weights)
                              OCTAVO_INLINE { read(tile.w_floats + k * features + v * width, weights); };
        std::int64_t i = 0;
        for (; i + most <= tile.rows; i += most) multiply_rows<1, most, 1, pair>(tile, i, load);
        multiply_last_rows<most - 1>(tile, i, load);
    } else if (tile.w_floats != nullptr) {
        const auto load = [&](std::int64_t group, auto place, auto v, Floats& weights) OCTAVO_INLINE {
            read(tile.w_floats + (group * 4 + place) * features + v * width, weights);
        };
        std::int64_t i = 0;
        for (; i + 6 <= tile.rows; i += 6) multiply_rows<4, 6, 2 / pair, pair>(tile, i, load);
        for (; i + 2 <= tile.rows; i += 2) multiply_rows<4, 2, 2, pair>(tile, i, load);
        if (i < tile.rows) multiply_rows<4, 1, 4, pair>(tile, i, load);
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
