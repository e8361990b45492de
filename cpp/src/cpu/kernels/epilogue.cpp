// What turns a tile of the int8 product into a tile of the output (paper Eq. 8), and the outlier weights that it needs.
//
// Results are the same to the bit on every instruction set: each step is written out, and the compiler may not contract
// two into one (CMakeLists.txt).
#include "cpu/kernels/floats.hpp"
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"
#if defined(__AMX_INT8__) || defined(__AMXINT8__)
#include "cpu/kernels/product/amx_tiles.hpp"

// Behind the instructions that it is made of.
#include "cpu/kernels/product/amx_begin.hpp"
#endif

namespace octavo::cpu::OCTAVO_ISA {
namespace {

using Halves [[gnu::vector_size(register_size / 2)]] = std::uint16_t;

// A vector of sums as `Type`, as in convert.hpp.
template <DType Type>
[[gnu::always_inline]] inline void write(const Floats& sum, char* y) {
    if constexpr (Type == DType::f32) {
        __builtin_memcpy(y, &sum, sizeof sum);
        return;
    }
    Bits bits;
    __builtin_memcpy(&bits, &sum, sizeof bits);
    const Bits magnitude = bits & 0x7FFFFFFFU;
    Bits result;
    if constexpr (Type == DType::bf16) {
        const Bits rounded = (bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U;
        const Bits quiet = (bits >> 16U) | 0x40U;
        result = magnitude > 0x7F800000U ? quiet : rounded;
    } else {
        const Bits normal = (magnitude - 0x38000000U + 0xFFFU + ((magnitude >> 13U) & 1U)) >> 13U;
        Floats shifted;
        __builtin_memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5F;
        Bits subnormal;
        __builtin_memcpy(&subnormal, &shifted, sizeof subnormal);
        subnormal -= 0x3F000000U;
        result = magnitude < 0x38800000U ? subnormal : normal;
        result = magnitude >= 0x477FF000U ? Bits{} + 0x7C00U : result;
        result = magnitude > 0x7F800000U ? Bits{} + 0x7E00U : result;
        result |= (bits >> 16U) & 0x8000U;
    }
    const Halves halves = __builtin_convertvector(result, Halves);
    __builtin_memcpy(y, &halves, sizeof halves);
}

#if defined(__AVX512F__)
// `Count` vectors made one, two by two.
template <int Count, class Combine>
[[gnu::always_inline]] inline Floats fold(const Floats* sums, Combine combine) {
    if constexpr (Count == 1) {
        return sums[0];
    } else {
        return combine(fold<Count / 2>(sums, combine), fold<Count - Count / 2>(sums + Count / 2, combine));
    }
}

// Whether `write_ordinary` is right for all of these numbers, as it nearly always is.
template <int Count>
[[gnu::always_inline]] inline bool are_ordinary(const Floats* sums) {
#if defined(__AVX512BF16__)
    // Its instruction takes subnormal numbers for 0. Zeros, which one comparison cannot tell from them, are rare, too.
    const auto least_magnitude = [](const Floats& a, const Floats& b) OCTAVO_INLINE {
        constexpr int of_magnitudes = 0b1010;
        return Floats(_mm512_range_ps(a, b, of_magnitudes));
    };
    return _mm512_cmp_ps_mask(fold<Count>(sums, least_magnitude), Floats{} + 0x1p-126F, _CMP_LT_OQ) == 0;
#else
    // It knows no NaN, which is what a sum with one is.
    const Floats sum = fold<Count>(sums, [](const Floats& a, const Floats& b) OCTAVO_INLINE { return a + b; });
    return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0;
#endif
}

// Two vectors rounded to bfloat16.
[[gnu::always_inline]] inline void write_ordinary(const Floats& low, const Floats& high, char* y) {
#if defined(__AVX512BF16__)
    const auto halves = _mm512_cvtne2ps_pbh(high, low);
#else
    const auto round = [](const Floats& sum, auto& rounded) OCTAVO_INLINE {
        Bits bits;
        __builtin_memcpy(&bits, &sum, sizeof bits);
        bits += ((bits >> 16U) & 1U) + 0x7FFFU;
        __builtin_memcpy(&rounded, &bits, sizeof bits);
    };
    using Words [[gnu::vector_size(register_size)]] = std::uint16_t;
    Words first;
    Words second;
    round(low, first);
    round(high, second);
    const Words halves = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29,
                                                 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
#endif
    __builtin_memcpy(y, &halves, sizeof halves);
}
#endif

// `Rows` rows of `Vectors` vectors of sums, rounded to `Type`.
template <DType Type, int Rows, int Vectors>
[[gnu::always_inline]] inline void write_square(const Floats* sums, char* y, std::int64_t y_stride) {
    unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE {
        write<Type>(sums[s], y + s / Vectors * y_stride + s % Vectors * width * size_of(Type));
    });
}

template <DType Type, int Rows, int Vectors>
[[gnu::noinline]] void write_any(const Floats* sums, char* y, std::int64_t y_stride) {
    write_square<Type, Rows, Vectors>(sums, y, y_stride);
}

// The accumulators of a square of the tile, which fit the registers. With AVX-512, whose tiles may be narrower, of half
// as many vectors twice as many rows: additions of outliers wait for the one before them, so they had better be many.
#if defined(__AVX2__) || defined(__aarch64__)
constexpr int square_vectors = register_size == 32 ? 2 : 4;
#else
constexpr int square_vectors = 1;  // it would not be faster, and long to compile
#endif
constexpr int square_rows(int vectors) { return register_size == 64 ? 4 * square_vectors / vectors : 4; }

// Byte number `place` of each group of four, with its sign.
[[gnu::always_inline]] inline void extract_byte(Bits groups, std::uint32_t place, Ints& codes) {
#if defined(__AVX512VNNI__)
    // The product with 1 there and 0 elsewhere.
    static constexpr std::int32_t ones[] = {1, 1 << 8, 1 << 16, 1 << 24};
    codes = reinterpret_cast<Ints>(
        _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(ones[place]), reinterpret_cast<__m512i>(groups)));
#else
#if defined(__AVX2__)
    // A shuffle is one instruction; a shift by a number of the program's own is three.
    struct Places {
        std::int8_t of[4][64];
    };
    static constexpr Places places = [] {
        Places made{};
        for (int p = 0; p < 4; ++p) {
            for (int i = 0; i < 64; ++i) made.of[p][i] = static_cast<std::int8_t>(i % 4 == 3 ? i % 16 - 3 + p : -128);
        }
        return made;
    }();
    Bits order;
    read(places.of[place], order);
#if defined(__AVX512BW__)
    groups = reinterpret_cast<Bits>(
        _mm512_shuffle_epi8(reinterpret_cast<__m512i>(groups), reinterpret_cast<__m512i>(order)));
#else
    groups = reinterpret_cast<Bits>(
        _mm256_shuffle_epi8(reinterpret_cast<__m256i>(groups), reinterpret_cast<__m256i>(order)));
#endif
#else
    groups <<= 24 - place * 8 - Bits{};
#endif
    read(&groups, codes);
    codes >>= 24;
#endif
}

// The weights of a column for `Vectors` vectors of output features. A cache line of packed W holds the 4 codes of each
// of 16 output features: the wanted byte goes to the top, and down again with its sign.
template <int Vectors>
[[gnu::always_inline]] inline void read_column(const std::int8_t* w, std::int64_t w_stride, std::uint32_t column,
                                               const Floats* zeropoints, const Floats* scales, Floats* weights) {
    constexpr int in_block = 16 / static_cast<int>(width);
    const std::int8_t* const line = w + column / 4 * std::int64_t{64};
    unroll<Vectors>([&](auto v) OCTAVO_INLINE {
        Bits group;
        read(line + v / in_block * w_stride + v % in_block * register_size, group);
        Ints codes;
        extract_byte(group, column % 4, codes);
        weights[v] = __builtin_convertvector(codes, Floats);
        if (zeropoints != nullptr) weights[v] += zeropoints[v];
        weights[v] *= scales[v];
    });
}

// A line of each of two blocks of W.
[[gnu::always_inline]] inline void fetch_pair(const std::int8_t* w, std::int64_t w_stride) {
    __builtin_prefetch(w, 0, 2);
    __builtin_prefetch(w + w_stride, 0, 2);
}

// The outliers of `Rows` rows from row i on, in `Vectors` vectors from column j on. A row of outlier weights is loaded
// once for all of them.
template <int Rows, int Vectors>
[[gnu::always_inline]] inline void add_shared_outliers(const EpilogueTile& tile, std::int64_t i, std::int64_t j,
                                                       const Floats* scales, Floats* sums) {
    if (tile.outliers == 0) return;
    const float* x = tile.outlier_x + i;
    const auto add = [&](auto fetch, auto read_weights) OCTAVO_INLINE {
        for (std::int64_t o = 0; o < tile.outliers; ++o, x += tile.outlier_x_stride) {
            fetch();
            Floats weights[Vectors];
            read_weights(o, weights);
            unroll<Rows>([&](auto r) OCTAVO_INLINE {
                const Floats value = x[r] - Floats{};
                unroll<Vectors>([&](auto v)
                                    OCTAVO_INLINE { fused_multiply_add(value, weights[v], sums[r * Vectors + v]); });
            });
        }
    };
    const float* row = tile.outlier_w + j;
    const std::int64_t stride = tile.outlier_w_stride;
    const auto from_floats = [&](std::int64_t /*o*/, Floats* weights) OCTAVO_INLINE {
        unroll<Vectors>([&](auto v) OCTAVO_INLINE { read(row + v * width, weights[v]); });
        row += stride;
    };
#if defined(__AMX_INT8__) || defined(__AMXINT8__)
    // First as much of the next product as has been fetched beside the square before, then as much is fetched. Not in
    // finer pieces: from an instruction of AMX on and for some 150 ns, 512 bits are multiplied half as often.
    if (Rows >= 4 && tile.next != nullptr && tile.outlier_columns == nullptr) {
        constexpr std::int64_t columns = 8;  // two lines of W each, so a tile
        tiles::begin(*tile.next, tile.outliers / columns);
        const std::int8_t* ahead = tiles::begin_of_rest(*tile.next);
        if (ahead != nullptr) {
            const auto fetch = [&]() OCTAVO_INLINE {
                fetch_pair(ahead, tile.next->w_stride);
                ahead += 64;
            };
            return add(fetch, from_floats);
        }
    }
#endif
    // This square's part of the lines to be fetched. (There are none of many rows, whom the divisions would cost.)
    std::int64_t lines = 0;
    const std::int8_t* ahead = tile.ahead;
    if (tile.ahead_lines > 0) {
        constexpr std::int64_t cols = Vectors * width;
        const std::int64_t squares_below = (tile.rows + Rows - 1) / Rows;
        const std::int64_t squares = (tile.cols + cols - 1) / cols * squares_below;
        const std::int64_t all_lines = tile.ahead_lines * ((tile.cols + 15) / 16);
        lines = (all_lines + squares * tile.outliers - 1) / (squares * tile.outliers);
        const std::int64_t first = (j / cols * squares_below + i / Rows) * tile.outliers * lines;
        ahead += first / tile.ahead_lines * tile.ahead_stride + first % tile.ahead_lines * 64;
    }
    const auto fetch = [&]() OCTAVO_INLINE {
        for (std::int64_t line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    };
    if (tile.outlier_columns == nullptr) return add(fetch, from_floats);
    const std::int8_t* const w = tile.w + j / 16 * tile.w_stride + j % 16 * 4;
    add(fetch, [&](std::int64_t o, Floats* weights) OCTAVO_INLINE {
        const auto column = static_cast<std::uint32_t>(tile.outlier_columns[o]);
        read_column<Vectors>(w, tile.w_stride, column, nullptr, scales, weights);
    });
}

// The same where each row has its own, whose weights `read_weights` reads: one of each row at a time, as long as all
// have some, since each addition waits for the one before it in its row.
template <int Rows, int Vectors, class ReadWeights>
[[gnu::always_inline]] inline void add_own_outliers(const EpilogueTile& tile, std::int64_t i, Floats* sums,
                                                    ReadWeights read_weights) {
    const std::int64_t* const begin = tile.outlier_begin + i;
    const auto add = [&](auto r, std::int64_t o) OCTAVO_INLINE {
        const Floats x = tile.outlier_x[o] - Floats{};
        Floats weights[Vectors];
        read_weights(o, weights);
        unroll<Vectors>([&](auto v) OCTAVO_INLINE { fused_multiply_add(x, weights[v], sums[r * Vectors + v]); });
    };
    std::int64_t common = begin[1] - begin[0];
    unroll<Rows>([&](auto r) OCTAVO_INLINE {
        const std::int64_t count = begin[r + 1] - begin[r];
        common = count < common ? count : common;
    });
    for (std::int64_t o = 0; o < common; ++o) unroll<Rows>([&](auto r) OCTAVO_INLINE { add(r, begin[r] + o); });
    unroll<Rows>([&](auto r) OCTAVO_INLINE {
        for (std::int64_t o = begin[r] + common; o < begin[r + 1]; ++o) add(r, o);
    });
}

template <int Rows, int Vectors>
[[gnu::always_inline]] inline void add_gathered_outliers(const EpilogueTile& tile, std::int64_t i, std::int64_t j,
                                                         Floats* sums) {
    add_own_outliers<Rows, Vectors>(tile, i, sums, [&](std::int64_t o, Floats* weights) OCTAVO_INLINE {
        const float* const row = tile.outlier_w + tile.outlier_places[o] * tile.outlier_w_stride + j;
        unroll<Vectors>([&](auto v) OCTAVO_INLINE { read(row + v * width, weights[v]); });
    });
}

// Not inline: without outliers its registers would be missed.
template <int Rows, int Vectors>
[[gnu::noinline]] void add_packed_outliers(const EpilogueTile& tile, std::int64_t i, std::int64_t j,
                                           const Floats* scales, Floats* in_memory) {
    Floats sums[Rows * Vectors];
    unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] = in_memory[s]; });
    const std::int8_t* const w = tile.w + j / 16 * tile.w_stride + j % 16 * 4;
    add_own_outliers<Rows, Vectors>(tile, i, sums, [&](std::int64_t o, Floats* weights) OCTAVO_INLINE {
        const auto column = static_cast<std::uint32_t>(tile.outlier_columns[o]);
        read_column<Vectors>(w, tile.w_stride, column, nullptr, scales, weights);
    });
    unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { in_memory[s] = sums[s]; });
}

// y = y Phi(y) (octavo/linear.hpp). Phi(y) - 1/2 is odd: y times a function of y^2, made of polynomials whose terms are
// all positive, so that no digits are lost; where it is 1/2 to the last place, that is given.
[[gnu::noinline]] void apply_gelu(Floats* sums, std::int64_t count) {
    constexpr float numerator[] = {0.398942262F,    0.0334589295F,   0.00465148455F,
                                   0.000164574143F, 6.30159366e-06F, 2.2931129e-08F};
    constexpr float denominator[] = {1.0F,           0.250535488F,    0.028416153F,
                                     0.00186064828F, 7.21671604e-05F, 1.19902779e-06F};
    constexpr float end = 5.5F;
    const auto polynomial = [](const float (&factors)[6], const Floats& square) OCTAVO_INLINE {
        Floats value = factors[5] - Floats{};
        unroll<5>([&](auto i) OCTAVO_INLINE {
            Floats next = factors[4 - i] - Floats{};
            fused_multiply_add(value, square, next);
            value = next;
        });
        return value;
    };
    for (std::int64_t s = 0; s < count; ++s) {
        const Floats y = sums[s];
        const Floats inside = y > end ? end - Floats{} : y < -end ? -end - Floats{} : y;
        const Floats square = inside * inside;
        Floats half = inside * polynomial(numerator, square) / polynomial(denominator, square);
        half = y >= end ? 0.5F - Floats{} : y <= -end ? -0.5F - Floats{} : half;
        sums[s] = 0.5F * y;
        fused_multiply_add(y, half, sums[s]);
    }
}

// `Rows` rows from row i on, by `Vectors` vectors from column j on, whose scales and bias are given, if there are any;
// y is where the first element goes.
template <DType Type, int Rows, int Vectors>
[[gnu::always_inline]] inline void finish_square(const EpilogueTile& tile, std::int64_t i, std::int64_t j,
                                                 const Floats* scales, const Floats* bias, char* y,
                                                 std::int64_t y_stride) {
    Floats sums[Rows * Vectors];
    if (tile.scaled == nullptr) {
        const std::int32_t* const acc = tile.acc + i * tile.stride + j;
        if (tile.row_offsets == nullptr) {
            unroll<Rows>([&](auto r) OCTAVO_INLINE {
                unroll<Vectors>([&](auto v) OCTAVO_INLINE {
                    Ints sum;
                    read(acc + r * tile.stride + v * width, sum);
                    sums[r * Vectors + v] = __builtin_convertvector(sum, Floats);
                });
            });
        } else {
            Bits col_offsets[Vectors];  // unsigned, so that they may wrap
            unroll<Vectors>([&](auto v) OCTAVO_INLINE { read(tile.col_offsets + j + v * width, col_offsets[v]); });
            unroll<Rows>([&](auto r) OCTAVO_INLINE {
                const Bits row_offset = static_cast<std::uint32_t>(tile.row_offsets[i + r]) - Bits{};
                unroll<Vectors>([&](auto v) OCTAVO_INLINE {
                    Bits whole;
                    read(acc + r * tile.stride + v * width, whole);
                    Ints sum;
                    read(&(whole -= row_offset + col_offsets[v]), sum);
                    sums[r * Vectors + v] = __builtin_convertvector(sum, Floats);
                });
            });
        }
        // Behind both of them: else GCC makes all of these products first, for which there are no registers.
        unroll<Rows>([&](auto r) OCTAVO_INLINE {
            const Floats scale_x = tile.scale_x[i + r] - Floats{};
            unroll<Vectors>([&](auto v) OCTAVO_INLINE { sums[r * Vectors + v] *= scale_x * scales[v]; });
        });
    } else {
        unroll<Rows>([&](auto r) OCTAVO_INLINE {
            unroll<Vectors>([&](auto v) OCTAVO_INLINE {
                read(tile.scaled + (i + r) * tile.stride + j + v * width, sums[r * Vectors + v]);
            });
        });
    }
    const auto through_memory = [&](auto change) OCTAVO_INLINE {
        Floats in_memory[Rows * Vectors];  // a copy, or the sums of every tile would go there
        unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { in_memory[s] = sums[s]; });
        change(in_memory);
        unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] = in_memory[s]; });
    };
    if (tile.outlier_begin == nullptr) {
        add_shared_outliers<Rows, Vectors>(tile, i, j, scales, sums);
    } else if (tile.outlier_columns == nullptr) {
        add_gathered_outliers<Rows, Vectors>(tile, i, j, sums);
    } else {
        through_memory([&](Floats* in_memory) OCTAVO_INLINE {
            Floats factors[Vectors];
            unroll<Vectors>([&](auto v) OCTAVO_INLINE { factors[v] = scales[v]; });
            add_packed_outliers<Rows, Vectors>(tile, i, j, factors, in_memory);
        });
    }
    if (tile.bias != nullptr) {
        unroll<Rows * Vectors>([&](auto s) OCTAVO_INLINE { sums[s] += bias[s % Vectors]; });
    }
    if (tile.gelu)
        through_memory([](Floats* in_memory) OCTAVO_INLINE { apply_gelu(in_memory, std::int64_t{Rows} * Vectors); });
#if defined(__AVX512F__)
    if constexpr (Type == DType::bf16 && Vectors % 2 == 0) {
        if (are_ordinary<Rows * Vectors>(sums)) {
            return unroll<Rows * Vectors / 2>([&](auto pair) OCTAVO_INLINE {
                write_ordinary(sums[2 * pair], sums[2 * pair + 1],
                               y + 2 * pair / Vectors * y_stride + 2 * pair % Vectors * 32);
            });
        }
        // Not inline: GCC would begin with what both have in common, for which there are no registers.
        return through_memory([&](Floats* in_memory)
                                  OCTAVO_INLINE { write_any<Type, Rows, Vectors>(in_memory, y, y_stride); });
    }
#endif
    write_square<Type, Rows, Vectors>(sums, y, y_stride);
}

// All rows, by `Vectors` vectors from column j on; of the last, with one vector, only what the tile has.
template <DType Type, int Vectors>
void finish_columns(const EpilogueTile& tile, std::int64_t j, char* y, std::int64_t y_stride) {
    Floats scales[Vectors]{};
    Floats bias[Vectors]{};
    unroll<Vectors>([&](auto v) OCTAVO_INLINE {
        if (tile.scale_w != nullptr) read(tile.scale_w + j + v * width, scales[v]);
        if (tile.bias != nullptr) read(tile.bias + j + v * width, bias[v]);
    });
    const auto finish_rows = [&](auto rows, std::int64_t i) OCTAVO_INLINE {
        char* const target = y + i * y_stride;
        if (Vectors > 1 || j + width <= tile.cols) {
            return finish_square<Type, rows, Vectors>(tile, i, j, scales, bias, target, y_stride);
        }
        char last[rows * 64];
        finish_square<Type, rows, 1>(tile, i, j, scales, bias, last, 64);
        for (std::int64_t r = 0; r < rows; ++r) {
            __builtin_memcpy(target + r * y_stride, last + r * 64,
                             static_cast<unsigned long>((tile.cols - j) * size_of(Type)));
        }
    };
    std::int64_t i = 0;
    constexpr int most = square_rows(Vectors);
    for (; i + most <= tile.rows; i += most) finish_rows(IndexConstant<most>{}, i);
    for (; most > 4 && i + 4 <= tile.rows; i += 4) finish_rows(IndexConstant<4>{}, i);
    switch (tile.rows - i) {
        case 3: return finish_rows(IndexConstant<3>{}, i);
        case 2: return finish_rows(IndexConstant<2>{}, i);
        case 1: return finish_rows(IndexConstant<1>{}, i);
        default: return;
    }
}

// Columns from j on, by `Vectors` vectors as long as there are so many, then by half as many.
template <DType Type, int Vectors = square_vectors>
void finish_tile(const EpilogueTile& tile, char* y, std::int64_t y_stride, std::int64_t j = 0) {
    constexpr std::int64_t least = Vectors > 1 ? Vectors * width : 1;
    for (; j + least <= tile.cols; j += Vectors * width) {
        finish_columns<Type, Vectors>(tile, j, y + j * size_of(Type), y_stride);
    }
    if constexpr (Vectors > 1) finish_tile<Type, Vectors / 2>(tile, y, y_stride, j);
}

// The weights of some columns for `Blocks` blocks of 16 output features.
template <int Blocks, bool HasZeropoint>
void dequantize_blocks(const std::int8_t* w, std::int64_t w_stride, const std::int32_t* columns,
                       const std::int32_t* rows, std::int64_t count, const float* zeropoint, const float* scale,
                       float* target, std::int64_t stride, const ProductTile* next) {
    constexpr int all = Blocks * 16 / static_cast<int>(width);
    Floats zeropoints[all]{};
    Floats scales[all];
    unroll<all>([&](auto v) OCTAVO_INLINE {
        if constexpr (HasZeropoint) read(zeropoint + v * width, zeropoints[v]);
        read(scale + v * width, scales[v]);
    });
    for (std::int64_t c = 0; c < count; ++c) {
        if (next != nullptr) fetch_pair(next->w + c * 64, next->w_stride);
        Floats weights[all];
        read_column<all>(w, w_stride, static_cast<std::uint32_t>(columns[c]), HasZeropoint ? zeropoints : nullptr,
                         scales, weights);
        float* const row = target + (rows == nullptr ? c : rows[c]) * stride;
        unroll<all>([&](auto v) OCTAVO_INLINE { __builtin_memcpy(row + v * width, &weights[v], sizeof weights[v]); });
    }
}

// The column at `place` of a block of a rotated weight, times the root of the block: the sum of its codes with the
// signs of a row of Sylvester's matrix, the parities of place & h.
[[gnu::always_inline]] inline void sum_signed(const std::int8_t* w, std::int64_t block, std::int64_t place,
                                              Ints& sums) {
    const auto is_odd = [&](std::int64_t h) {
        return __builtin_parityll(static_cast<unsigned long long>(place & h)) != 0;
    };
#if defined(__AVX512VNNI__)
    using Sums = Ints;
#else
    // Of each output feature's codes number 0 and 1 of 4, and of 2 and 3.
    using Sums [[gnu::vector_size(register_size)]] = std::int16_t;
#endif
    Sums sum{};
#if defined(__AVX2__)
    // Codes count as code + 128, so that one instruction multiplies them by their signs, which add up to 0 but for
    // place 0. The pairs of 256 codes fit 16 bit: 64 * 2 * 255. What number 0, 1, 2 and 3 of four groups are summed to
    // gets its sign at the end, so that the signs that codes are multiplied by are read once for all four.
    std::uint32_t signs = 0;
    for (std::int64_t h = 0; h < 4; ++h) signs |= (is_odd(h) ? 0xFFU : 1U) << static_cast<unsigned>(8 * h);
    const Bits plus = signs - Bits{};
    const Bits minus = (signs ^ 0xFEFEFEFEU) - Bits{};
    Sums parts[4]{};
    for (std::int64_t group = 0; group < block / 4; group += 4) {
        const Bits of_groups = is_odd(4 * group) ? minus : plus;
        unroll<4>([&](auto i) OCTAVO_INLINE {
            Bits codes;
            read(w + (group + i) * 64, codes);
            codes ^= 0x80808080U;
#if defined(__AVX512VNNI__)
            parts[i] = reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(parts[i]),
                                                                  reinterpret_cast<__m512i>(codes),
                                                                  reinterpret_cast<__m512i>(of_groups)));
#elif defined(__AVX512BW__)
            parts[i] += reinterpret_cast<Sums>(
                _mm512_maddubs_epi16(reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(of_groups)));
#else
            parts[i] += reinterpret_cast<Sums>(
                _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), reinterpret_cast<__m256i>(of_groups)));
#endif
        });
    }
    unroll<4>([&](auto i) OCTAVO_INLINE { sum = is_odd(4 * i) ? sum - parts[i] : sum + parts[i]; });
    const std::int32_t too_much = place == 0 ? 128 * static_cast<std::int32_t>(block) : 0;
#else
    Sums even_signs;
    Sums odd_signs;
    for (std::int64_t i = 0; i < register_size / 2; ++i) {
        even_signs[i] = is_odd(i % 2 * 2) ? -1 : 1;
        odd_signs[i] = is_odd(i % 2 * 2 + 1) ? -1 : 1;
    }
    for (std::int64_t group = 0; group < block / 4; ++group) {
        Sums codes;
        read(w + group * 64, codes);
        const Sums pair = ((codes << 8) >> 8) * even_signs + (codes >> 8) * odd_signs;
        sum = is_odd(4 * group) ? sum - pair : sum + pair;
    }
    const std::int32_t too_much = 0;
#endif
#if defined(__AVX512VNNI__)
    sums = sum - too_much;
#else
    Ints both;
    read(&sum, both);
    sums = ((both << 16) >> 16) + (both >> 16) - too_much;
#endif
}

// The sums themselves.
void put_sums(const EpilogueTile& tile, char* y, std::int64_t y_stride) {
    for (std::int64_t i = 0; i < tile.rows; ++i) {
        const std::int32_t* const acc = tile.acc + i * tile.stride;
        char* const row = y + i * y_stride;
        if (tile.row_offsets == nullptr) {
            __builtin_memcpy(row, acc, static_cast<unsigned long>(tile.cols) * 4);
            continue;
        }
        const auto row_offset = static_cast<std::uint32_t>(tile.row_offsets[i]);
        for (std::int64_t j = 0; j < tile.cols; ++j) {
            const std::uint32_t sum =
                static_cast<std::uint32_t>(acc[j]) - row_offset - static_cast<std::uint32_t>(tile.col_offsets[j]);
            __builtin_memcpy(row + j * 4, &sum, sizeof sum);
        }
    }
}

// Kernels::dequantize_columns into rows `stride` apart; `rows` null: 0, 1, 2, ... The beginning of the product that
// comes `next` is fetched meanwhile.
void dequantize(const std::int8_t* w, std::int64_t w_stride, const std::int32_t* columns, const std::int32_t* rows,
                std::int64_t count, std::int64_t cols, const float* zeropoint, const float* scale, float* target,
                std::int64_t stride, const ProductTile* next) {
    const auto of_blocks = [&](auto blocks, std::int64_t first) OCTAVO_INLINE {
        const std::int8_t* const begin = w + first / 16 * w_stride;
        if (zeropoint == nullptr) {
            dequantize_blocks<blocks, false>(begin, w_stride, columns, rows, count, nullptr, scale + first,
                                             target + first, stride, next);
        } else {
            dequantize_blocks<blocks, true>(begin, w_stride, columns, rows, count, zeropoint + first, scale + first,
                                            target + first, stride, next);
        }
    };
    constexpr std::int64_t most = square_vectors > 1 ? square_vectors * register_size / 64 : 1;
    std::int64_t first = 0;
    for (; first + 16 * (most - 1) < cols; first += 16 * most) of_blocks(IndexConstant<most>{}, first);
    for (; most > 2 && first + 16 < cols; first += 32) of_blocks(IndexConstant<2>{}, first);
    for (; first < cols; first += 16) of_blocks(IndexConstant<1>{}, first);
}

// Columns of the tiles of every plan, at most.
constexpr std::int64_t most_together = 64;

// The end of a tile whose outliers are shared and meet packed codes: so many of their columns are made float32 at a
// time that they stay in the first-level cache while all rows meet them.
void finish_packed_columns(const EpilogueTile& tile, DType dtype, void* y, std::int64_t y_stride) {
    constexpr std::int64_t most = 64;
    constexpr std::int64_t stride = most_together;
    alignas(64) float weights[most * stride];
    alignas(64) float sums[few_rows * stride];
    EpilogueTile part = tile;
    part.outlier_columns = nullptr;
    part.outlier_w = weights;
    part.outlier_w_stride = stride;
    part.bias = nullptr;
    part.gelu = false;
    std::int64_t left = tile.outliers;
    for (const std::int32_t* columns = tile.outlier_columns;; columns += most) {
        part.outliers = left < most ? left : most;
        part.ahead_lines = tile.ahead_lines * part.outliers / tile.outliers;
        dequantize(tile.w, tile.w_stride, columns, nullptr, part.outliers, tile.cols, nullptr, tile.scale_w, weights,
                   stride, columns == tile.outlier_columns ? tile.next : nullptr);
        left -= part.outliers;
        if (left == 0) break;
        epilogue(part, DType::f32, sums, stride * 4);
        part.scaled = sums;
        part.stride = stride;
        part.outlier_x += most * part.outlier_x_stride;
        part.ahead += part.ahead_lines * 64;
    }
    part.bias = tile.bias;
    part.gelu = tile.gelu;
    epilogue(part, dtype, y, y_stride);
}

}  // namespace

void dequantize_columns(const std::int8_t* w, std::int64_t w_stride, const std::int32_t* columns,
                        const std::int32_t* rows, std::int64_t count, std::int64_t cols, const float* zeropoint,
                        const float* scale, float* target) {
    dequantize(w, w_stride, columns, rows, count, cols, zeropoint, scale, target, outlier_stride, nullptr);
}

void rotate_back_column(const std::int8_t* w, std::int64_t w_stride, std::int64_t block, std::int64_t place,
                        std::int64_t cols, const float* zeropoint, const float* scale, float* target) {
    const float root = block == 16 ? 4.0F : block == 64 ? 8.0F : 16.0F;
    const Floats factor = 1.0F / root - Floats{};
    const Floats of_zeropoint = (place == 0 ? root : 0.0F) - Floats{};
    for (std::int64_t j = 0; j < cols; j += width) {
        const std::int8_t* const begin = w + j / 16 * w_stride + j % 16 * 4;
        Ints sums;
        sum_signed(begin, block, place, sums);
        Floats zeropoints;
        Floats scales;
        read(zeropoint + j, zeropoints);
        read(scale + j, scales);
        const Floats rotated = __builtin_convertvector(sums, Floats) * factor;
        const Floats weights = (rotated + zeropoints * of_zeropoint) * scales;
        __builtin_memcpy(target + j, &weights, sizeof weights);
    }
}

void epilogue(const EpilogueTile& tile, DType dtype, void* y, std::int64_t y_stride) {
    // For fewer rows each square dequantizes columns for itself, in registers.
    constexpr std::int64_t in_registers = register_size == 64 ? 8 : 4;
    const bool is_shared = tile.outliers > 0 && tile.outlier_begin == nullptr && tile.outlier_columns != nullptr;
    const bool is_small = tile.rows <= few_rows && tile.cols <= most_together && dtype != DType::i32;
    if (is_shared && is_small && (tile.rows > in_registers || tile.next != nullptr)) {
        return finish_packed_columns(tile, dtype, y, y_stride);
    }
    switch (dtype) {
        case DType::f32: return finish_tile<DType::f32>(tile, static_cast<char*>(y), y_stride);
        case DType::f16: return finish_tile<DType::f16>(tile, static_cast<char*>(y), y_stride);
        case DType::bf16: return finish_tile<DType::bf16>(tile, static_cast<char*>(y), y_stride);
        case DType::i32: return put_sums(tile, static_cast<char*>(y), y_stride);
        case DType::i8: break;  // refused by cpp/src before any kernel runs
    }
    __builtin_trap();
}

}  // namespace octavo::cpu::OCTAVO_ISA
