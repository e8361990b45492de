// Products of floats by int8 weights, in float32 (table.hpp says in which order).
//
// In packed order codes follow each other as the lanes of the sums do: 4 neighbors along k of one output feature, then
// those of the next. So weight_only widens as many as a register holds, and multiplies each four of them by the same
// four values of X.
#include "cpu/kernels/floats.hpp"
#include "cpu/kernels/fours.hpp"
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr std::int64_t features = 16;  // of a block

// Sums that the registers hold beside weights and a value of X, and the most rows of 4 places that they are of.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int most_sums = 24;
constexpr int most_rows = 6;
#elif defined(__AVX2__)
constexpr int most_sums = 12;
constexpr int most_rows = 6;
#else
constexpr int most_sums = 4;  // more would not be faster, and long to compile
constexpr int most_rows = 1;
#endif

// Sums of one row, for each place, and the registers of them.
template <int Places>
constexpr std::int64_t row_sums = Places == 1 ? gradient_cols : Places * features;
template <int Places>
constexpr int vectors = static_cast<int>(row_sums<Places> / width);

// Of these registers, how many are multiplied by so many rows at once.
constexpr int vectors_at_once(int rows, int all) {
    return rows * all <= most_sums ? all : vectors_at_once(rows, all / 2);
}

// The same `Places` values in all lanes.
template <int Places>
[[gnu::always_inline]] inline void repeat(const float* x, Floats& values) {
    if constexpr (Places == 1) {
        values = *x - Floats{};
    } else {
        static_assert(Places == 4);
#if defined(__AVX512F__)
        values = _mm512_maskz_broadcast_f32x4(0xFFFF, _mm_loadu_ps(x));  // with a mask: as in floats.hpp
#elif defined(__AVX2__)
        values = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
#else
        read(x, values);
#endif
    }
}

// Add sums of a slice, as multiply_square has them, to those before, if there are any.
template <int Places, int Rows, int Vectors, int First>
[[gnu::always_inline]] inline void leave_sums(const FloatTile& tile, std::int64_t i, Floats* sums) {
    float* const target = tile.sums + i * row_sums<Places> + First * width;
    const auto part = [&](auto s)
                          OCTAVO_INLINE { return target + s / Vectors * row_sums<Places> + s % Vectors * width; };
    if (tile.first) {
        unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] += Floats{}; });  // -0 becomes 0
    } else {
        unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE {
            Floats before;
            read(part(s), before);
            sums[s] += before;
        });
    }
    unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { __builtin_memcpy(part(s), &sums[s], sizeof sums[s]); });
}

// `Rows` rows of X from row i on by `Vectors` registers of weights, from number `First` on. `load` gives a register of
// the weights of a step, which is `Places` deep; numbers are part of their types, as in unroll.hpp. `fetch` is called
// before every four steps of 4 places each.
template <int Places, int Rows, int Vectors, int First, class Fetch, class Load>
void multiply_square(const FloatTile& tile, std::int64_t i, Fetch fetch, Load load) {
    constexpr int turn = Places;  // steps
    Floats sums[Rows * Vectors];
    unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] = Floats{}; });
    const std::int64_t x_stride = Places == 1 ? float_slice : tile.x_stride;
    const float* const x = tile.x + i * x_stride;
    const std::int64_t steps = tile.depth / Places;
    for (std::int64_t first = 0; first < steps; first += turn) {
        if constexpr (Places == 4)
            fetch(first, IndexConstant<First / Vectors>{}, IndexConstant<vectors<4> / Vectors>{});
        unroll<turn>([&](auto s) OCTAVO_INLINE {
            const std::int64_t step = first + s;
            const auto weights_of = [&](auto u, Floats& weights)
                                        OCTAVO_INLINE { load(step, IndexConstant<First + u>{}, weights); };
            const auto values_of = [&](auto r, Floats& values)
                                       OCTAVO_INLINE { repeat<Places>(x + r * x_stride + step * Places, values); };
            if constexpr (Rows == 1) {  // no weight waits in a register, of which AVX2 has none left
                Floats values;
                values_of(IndexConstant<0>{}, values);
                unroll<Vectors>([&](auto u) OCTAVO_INLINE {
                    Floats weights;
                    weights_of(u, weights);
                    fused_multiply_add(values, weights, sums[u]);
                });
            } else if constexpr (register_size == 32 && Rows * Vectors + Rows < 16) {  // nor here, but values
                Floats values[Rows];
                unroll<Rows>([&](auto r) OCTAVO_INLINE { values_of(r, values[r]); });
                unroll<Vectors>([&](auto u) OCTAVO_INLINE {
                    Floats weights;
                    weights_of(u, weights);
                    unroll<Rows>([&](auto r)
                                     OCTAVO_INLINE { fused_multiply_add(values[r], weights, sums[r * Vectors + u]); });
                });
            } else {
                Floats weights[Vectors];
                unroll<Vectors>([&](auto u) OCTAVO_INLINE { weights_of(u, weights[u]); });
                unroll<Rows>([&](auto r) OCTAVO_INLINE {
                    Floats values;
                    values_of(r, values);
                    unroll<Vectors>(
                        [&](auto u) OCTAVO_INLINE { fused_multiply_add(values, weights[u], sums[r * Vectors + u]); });
                });
            }
        });
    }
    leave_sums<Places, Rows, Vectors, First>(tile, i, sums);
}

// All rows from row i on: `Rows` at a time, and then the fewer that are left.
template <int Places, int Rows, class Fetch, class Load>
void multiply_rows(const FloatTile& tile, std::int64_t i, Fetch fetch, Load load) {
    constexpr int at_once = vectors_at_once(Rows, vectors<Places>);
    for (; i + Rows <= tile.rows; i += Rows) {
        unroll<vectors<Places> / at_once>(
            [&](auto part) { multiply_square<Places, Rows, at_once, part * at_once>(tile, i, fetch, load); });
    }
    if constexpr (Rows > 1) {
        if (i < tile.rows) multiply_rows<Places, Rows - 1>(tile, i, fetch, load);
    }
}

// zeropoints[j, p] = zeropoint[j]: for each sum of a row.
void repeat_zeropoint(const float* zeropoint, float* zeropoints) {
    for (std::int64_t s = 0; s < row_sums<4>; ++s) zeropoints[s] = zeropoint == nullptr ? 0.0F : zeropoint[s / 4];
}

// A register of packed codes as numbers.
[[gnu::always_inline]] inline void convert(const std::int8_t* w, Floats& numbers) {
    Ints codes;
#if defined(__aarch64__)
    std::uint32_t four = 0;
    __builtin_memcpy(&four, w, sizeof four);
    codes = vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
#else
    read_codes(w, codes);
#endif
    numbers = __builtin_convertvector(codes, Floats);
}

#if defined(__AVX512BF16__)

// Inline assembly for the reason given in product/avx512_vnni.hpp.
// NOLINTNEXTLINE(misc-const-correctness): the sums are written
[[gnu::always_inline]] inline void add_pairs(const Bits& x, const Bits& weights, Floats& sums) {
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(x), "v"(weights));
}

// The same sums where X is of bfloat16, as codes are. vdpbf16ps is two fused multiply-adds, of the upper halves of each
// lane and then of the lower ones, that round to nearest even and take subnormal numbers for 0, of which there are none
// (Kernels::pair). So with the four places of a step above those of the next it does what two steps do, at the price of
// one.
template <int Rows>
void multiply_pairs(const FloatTile& tile, std::int64_t i) {
    constexpr int all = vectors<4>;
    Floats sums[Rows * all];
    unroll<Rows * all>([&](auto s) OCTAVO_INLINE { sums[s] = Floats{}; });
    const std::int64_t x_stride = 4 * tile.x_stride;
    const std::uint16_t* const x = tile.x_pairs + i * x_stride;
    const std::int8_t* const w = tile.w;
    const std::int64_t depth = tile.depth;
    const std::int8_t* ahead = tile.ahead == nullptr ? tile.w : tile.ahead;
    for (std::int64_t k = 0; k < depth; k += 16, ahead += 64) {
        unroll<4>([&](auto block) OCTAVO_INLINE {
            __builtin_prefetch(ahead + block * tile.ahead_stride);
            __builtin_prefetch(ahead + block * tile.ahead_stride + tile.far, 0, 2);
        });
        unroll<2>([&](auto half) OCTAVO_INLINE {
            const std::int64_t at = k + 8 * half;
            Bits weights[all];
            unroll<all>([&](auto v) OCTAVO_INLINE {
                Floats first;
                Floats second;
                convert(w + at * features + v * width, first);
                convert(w + at * features + v * width + row_sums<4>, second);
                weights[v] = reinterpret_cast<Bits>(first) | reinterpret_cast<Bits>(second) >> 16U;
            });
            unroll<Rows>([&](auto r) OCTAVO_INLINE {
                Bits values;
                read(x + r * x_stride + 4 * at, values);
                unroll<all>([&](auto v) OCTAVO_INLINE { add_pairs(values, weights[v], sums[r * all + v]); });
            });
        });
    }
    leave_sums<4, Rows, all, 0>(tile, i, sums);
}

template <int Rows>
void multiply_rows_of_pairs(const FloatTile& tile, std::int64_t i) {
    for (; i + Rows <= tile.rows; i += Rows) multiply_pairs<Rows>(tile, i);
    if constexpr (Rows > 1) {
        if (i < tile.rows) multiply_rows_of_pairs<Rows - 1>(tile, i);
    }
}

#endif

}  // namespace

#if defined(__AVX512BF16__)
bool pair(const float* x, std::int64_t depth, std::uint16_t* pairs) {
    using Four [[gnu::vector_size(16)]] = std::uint32_t;
    const auto power_of_two = [](std::uint32_t exponent) { return (127U + exponent) << 23U; };
    const std::uint32_t least = power_of_two(0U - 119U);  // whose last place is a normal number
    const std::uint32_t infinity = power_of_two(128U);
    Four wrong{};
    for (std::int64_t k = 0; k < depth; k += 8) {
        Four bits[2];
        __builtin_memcpy(bits, x + k, sizeof bits);
        for (const Four& four : bits) {
            const Four magnitude = four & 0x7FFFFFFFU;
            wrong |= magnitude & reinterpret_cast<Four>(magnitude - least >= infinity - least);
        }
        const Four both = bits[0] | bits[1] >> 16U;
        for (std::int64_t copy = 0; copy < 4; ++copy) __builtin_memcpy(pairs + 4 * k + 8 * copy, &both, sizeof both);
    }
    return (wrong[0] | wrong[1] | wrong[2] | wrong[3]) == 0;
}
#endif

void widen(const std::int8_t* w, std::int64_t depth, const float* zeropoint, float* target) {
    float zeropoints[row_sums<4>];
    repeat_zeropoint(zeropoint, zeropoints);
    for (std::int64_t step = 0; step < depth / 4; ++step, w += row_sums<4>, target += row_sums<4>) {
        unroll<vectors<4>>([&](auto v) OCTAVO_INLINE {
            Floats numbers;
            convert(w + v * width, numbers);
            Floats shift;
            read(zeropoints + v * width, shift);
            numbers += shift;
            __builtin_memcpy(target + v * width, &numbers, sizeof numbers);
        });
    }
}

// All fours of codes are brought into rows before any is converted, so that no load waits for a store.
void dequantize_square(const std::int8_t* w, std::int64_t w_stride, std::int64_t count, const float* zeropoint,
                       const float* scale, float* target) {
    std::int8_t rows[float_slice * gradient_cols];
    for (std::int64_t first = 0; first < count; first += features, w += w_stride) {
        for (std::int64_t col = 0; col < gradient_cols; col += 16) {
            for (std::int64_t j = 0; j < features; j += 4) {
                transpose_fours(w + col * features + j * 4, 4 * features, rows + (first + j) * gradient_cols + col,
                                gradient_cols);
            }
        }
    }
    for (std::int64_t j = 0; j < count; ++j) {
        const Floats shift = zeropoint[j] - Floats{};
        const Floats factor = scale[j] - Floats{};
        unroll<vectors<1>>([&](auto v) OCTAVO_INLINE {
            Floats numbers;
            convert(rows + j * gradient_cols + v * width, numbers);
            numbers = (numbers + shift) * factor;
            __builtin_memcpy(target + j * gradient_cols + v * width, &numbers, sizeof numbers);
        });
    }
}

void multiply_floats(const FloatTile& tile) {
    // What a loop reads it holds by value: GCC would look for it in the tile again and again.
    const auto floats_of = [w = tile.w_floats]<int Places>(IndexConstant<Places> /*places*/) {
        return [w](std::int64_t step, auto v, Floats& weights)
                   OCTAVO_INLINE { read(w + step * row_sums<Places> + v * width, weights); };
    };
    const auto fetch_nothing = [](std::int64_t /*step*/, auto /*part*/, auto /*parts*/) OCTAVO_INLINE {};
    if (tile.places == 1) {
        return multiply_rows<1, most_sums / vectors<1>>(tile, 0, fetch_nothing, floats_of(IndexConstant<1>{}));
    }
    if (tile.w_floats != nullptr) {
        return multiply_rows<4, most_rows>(tile, 0, fetch_nothing, floats_of(IndexConstant<4>{}));
    }
    // Where there are more parts than one, each goes through the slice, and fetches its share.
    const auto fetch = [ahead = tile.ahead == nullptr ? tile.w : tile.ahead, stride = tile.ahead_stride,
                        steps = tile.depth / 4](std::int64_t step, auto part, auto parts) OCTAVO_INLINE {
        if (step % (4 * parts) != 0) return;
        const std::int8_t* const line = ahead + (part * steps + step) / (4 * parts) * 64;
        unroll<4>([&](auto block) OCTAVO_INLINE { __builtin_prefetch(line + block * stride); });
    };
#if defined(__AVX512BF16__)
    if (tile.x_pairs != nullptr) return multiply_rows_of_pairs<most_rows>(tile, 0);
#endif
    const auto codes_at = [w = tile.w](std::int64_t step, auto v, Floats& weights)
                              OCTAVO_INLINE { convert(w + step * row_sums<4> + v * width, weights); };
    if (tile.zeropoint == nullptr) return multiply_rows<4, most_rows>(tile, 0, fetch, codes_at);
    float zeropoints[row_sums<4>];
    repeat_zeropoint(tile.zeropoint, zeropoints);
    multiply_rows<4, most_rows>(
        tile, 0, fetch, [codes_at, shifts = &zeropoints[0]](std::int64_t step, auto v, Floats& weights) OCTAVO_INLINE {
            codes_at(step, v, weights);
            Floats shift;
            read(shifts + v * width, shift);
            weights += shift;
        });
}

void finish_floats(const float* sums, std::int64_t rows, const float* scale, float* y) {
    for (std::int64_t i = 0; i < rows; ++i, y += features) {
        for (std::int64_t j = 0; j < features; ++j, sums += 4) {
            y[j] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * scale[j];
        }
    }
}

}  // namespace octavo::cpu::OCTAVO_ISA
