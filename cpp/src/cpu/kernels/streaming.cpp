// Kernels that read or write each element once: conversion, ranges, quantization to codes, outlier marks.
//
// Plain loops that the compiler vectorizes for the instruction set this copy is built for. Reductions keep partial
// results in an array of lanes, because a compiler may not reorder float operations by itself.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstddef>
#include <utility>

#include "cpu/kernels/convert.hpp"
#include "cpu/kernels/fours.hpp"
#include "cpu/kernels/functions.hpp"
#include "cpu/kernels/unroll.hpp"

namespace octavo::cpu::OCTAVO_ISA {
namespace {

constexpr std::int64_t lanes = 64;

template <class T>
T read(const void* base, std::int64_t index) {
    T value;
    __builtin_memcpy(&value, static_cast<const char*>(base) + index * std::int64_t{sizeof(T)}, sizeof(T));
    return value;
}

template <class T>
void write(void* base, std::int64_t index, T value) {
    __builtin_memcpy(static_cast<char*>(base) + index * std::int64_t{sizeof(T)}, &value, sizeof(T));
}

// The two loops are the same; the first has a stride the compiler knows.
template <class T, class Convert>
void load_as(const void* src, std::int64_t stride, std::int64_t size, float* dst, Convert convert) {
    if (stride == 1) {
        for (std::int64_t i = 0; i < size; ++i) dst[i] = convert(read<T>(src, i));
    } else {
        for (std::int64_t i = 0; i < size; ++i) dst[i] = convert(read<T>(src, i * stride));
    }
}

template <class T, class Convert>
void store_as(const float* src, std::int64_t size, void* dst, std::int64_t stride, Convert convert) {
    if (stride == 1) {
        for (std::int64_t i = 0; i < size; ++i) write<T>(dst, i, convert(src[i]));
    } else {
        for (std::int64_t i = 0; i < size; ++i) write<T>(dst, i * stride, convert(src[i]));
    }
}

// rint for any finite value: adding 2^23 leaves no bits for a fraction; from 2^23 on every float is an integer.
float round_half_even(float value) {
    const float magnitude = __builtin_fabsf(value);
    const float rounded = __builtin_copysignf((magnitude + 0x1p23F) - 0x1p23F, value);
    return magnitude < 0x1p23F ? rounded : value;
}

// rint(value) as int8 for |value| <= 127.5: after adding 1.5 * 2^23 the low byte of the float is the integer.
std::int8_t to_code(float value) { return static_cast<std::int8_t>(bits_of(value + 0x1.8p23F)); }

template <class Bits>
constexpr Bits magnitude_mask = sizeof(Bits) == 2 ? 0x7FFFU : 0x7FFFFFFFU;

template <class Bits>
Bits magnitude(const void* x, std::int64_t index) {
    return static_cast<Bits>(read<Bits>(x, index) & magnitude_mask<Bits>);
}

// Integers may be reduced in any order, so that the compiler needs no lanes here.
template <class Bits>
std::uint32_t largest_magnitude_as(const void* x, std::int64_t size) {
    Bits largest = 0;
    for (std::int64_t i = 0; i < size; ++i) {
        const auto bits = magnitude<Bits>(x, i);
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

template <class Bits>
std::uint32_t largest_masked_as(const void* x, const void* mask, std::int64_t size) {
    Bits largest = 0;
    for (std::int64_t i = 0; i < size; ++i) {
        const auto bits = static_cast<Bits>(read<Bits>(x, i) & read<Bits>(mask, i));
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

template <class Bits>
void raise_as(const void* x, std::int64_t size, void* maxima) {
    for (std::int64_t i = 0; i < size; ++i) {
        const auto bits = magnitude<Bits>(x, i);
        const auto largest = read<Bits>(maxima, i);
        write<Bits>(maxima, i, bits > largest ? bits : largest);
    }
}

// The upper half of a magnitude.
std::uint16_t half_of(float value) { return static_cast<std::uint16_t>((bits_of(value) >> 16U) & 0x7FFFU); }

// Which of 64 halves are >= limit, a bit for each.
std::uint64_t marks_of(const char* halves, std::uint16_t limit) {
#if defined(__AVX512BW__)
    const auto mark = [&](std::int64_t i) {
        const __m512i magnitudes = _mm512_and_si512(_mm512_loadu_si512(halves + i), _mm512_set1_epi16(0x7FFF));
        return std::uint64_t{_mm512_cmpge_epu16_mask(magnitudes, _mm512_set1_epi16(static_cast<short>(limit)))};
    };
    return mark(0) | mark(64) << 32U;
#elif defined(__AVX2__)
    const auto mark = [&](std::int64_t i) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i));
        return _mm256_cmpgt_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7FFF)),
                                  _mm256_set1_epi16(static_cast<short>(limit - 1)));
    };
    const auto mark_two = [&](std::int64_t i) {  // which are packed by halves of a register
        const __m256i two = _mm256_permute4x64_epi64(_mm256_packs_epi16(mark(i), mark(i + 32)), 0b11011000);
        return std::uint64_t{static_cast<std::uint32_t>(_mm256_movemask_epi8(two))};
    };
    return mark_two(0) | mark_two(64) << 32U;
#else
    if (largest_magnitude_as<std::uint16_t>(halves, 64) < limit) return 0;
    std::uint64_t marks = 0;
    for (std::int64_t i = 0; i < 64; ++i) {
        marks |= (magnitude<std::uint16_t>(halves, i) >= limit ? std::uint64_t{1} : 0) << static_cast<unsigned>(i);
    }
    return marks;
#endif
}

// |x| <= absmax, so |x * 127 / absmax| <= 127 * (1 + 2^-23) and rounds to at most 127: no clip needed.
template <class T, class Convert>
void encode_by_division(const void* x, std::int64_t size, float absmax, Convert convert, std::int8_t* codes) {
    if (absmax <= 0x1.fffffep127F / 127.0F) {
        for (std::int64_t i = 0; i < size; ++i) codes[i] = to_code(convert(read<T>(x, i)) * 127.0F / absmax);
    } else {
        for (std::int64_t i = 0; i < size; ++i) {
            const float value = convert(read<T>(x, i));
            const float product = value * 127.0F;
            codes[i] = to_code(__builtin_isinf(product) ? value / absmax * 127.0F : product / absmax);
        }
    }
}

// The same quotients without a division for each element, where there is fused multiply-add: a division takes as long
// as some twenty multiplications.
//
// With b = absmax and y = 1 / b rounded, q = a * y is within 1.5 places of a / b.
//
// Of 16-bit x, a = x * 127 is exact, of at most 18 bits, and b has at most 11. So a - q * b has few enough bits to be
// exact, and q + (a - q * b) * y = a / b * (1 + e) with |e| below 2^-46. That is then rounded once, as a / b is by a
// division. The two could differ only if a number half way between two floats, of 25 bits, lay between them; but a / b,
// a fraction of 18 by 11 bits, is never such a number, and at least 2^-36 of itself away from any.
//
// Of float32, where a is rounded, the first such step leaves q less than one place away, and the second is exact
// (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990): let b be in [1, 2)
// and the last place of q be 1. What is rounded is off by |r| * |y - 1 / b| <= |r| * 2^-25, and could cross a number
// half way between two floats only next to it, where |r| = |a - q * b| is b / 2: so by b * 2^-26. But a / b is no such
// number, and a multiple of 2^-24 divided by b away: farther, as b^2 < 4.
template <class T, class Convert>
void encode_by_inverse(const void* x, std::int64_t size, float absmax, Convert convert, std::int8_t* codes) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    if (absmax >= 0x1p-100F && absmax <= 0x1p100F) {  // no step overflows, nor loses bits of what is not 0 anyway
        const float inverse = 1.0F / absmax;
        for (std::int64_t i = 0; i < size; ++i) {
            const float a = convert(read<T>(x, i)) * 127.0F;
            float quotient = a * inverse;
            quotient = __builtin_fmaf(__builtin_fmaf(-quotient, absmax, a), inverse, quotient);
            if constexpr (sizeof(T) == 4) {
                quotient = __builtin_fmaf(__builtin_fmaf(-quotient, absmax, a), inverse, quotient);
            }
            codes[i] = to_code(quotient);
        }
        return;
    }
#endif
    encode_by_division<T>(x, size, absmax, convert, codes);
}

// --- stochastic rounding: what octavo/stochastic.hpp says, many counters at a time -----------------------------------

constexpr std::int64_t counters = 32;  // more than the compiler takes apart before it would vectorize
constexpr std::int64_t drawn = 4 * counters;

std::uint32_t low(std::uint64_t value) { return static_cast<std::uint32_t>(value); }
std::uint32_t high(std::uint64_t value) { return static_cast<std::uint32_t>(value >> 32U); }

// The words of the elements from 4 * `quad` of a row on, in their order.
void draw(std::uint64_t row, std::uint64_t quad, std::uint64_t seed, std::uint32_t* words) {
    std::uint32_t a[counters];
    std::uint32_t b[counters];
    std::uint32_t c[counters];
    std::uint32_t d[counters];
    for (std::int64_t i = 0; i < counters; ++i) {
        const std::uint64_t own = quad + static_cast<std::uint64_t>(i);
        a[i] = low(own);
        b[i] = high(own);
        c[i] = low(row);
        d[i] = high(row);
    }
    std::uint32_t keys[] = {low(seed), high(seed)};
    for (int round = 0; round < 10; ++round) {
        for (std::int64_t i = 0; i < counters; ++i) {
            const std::uint64_t first = std::uint64_t{0xD2511F53U} * a[i];
            const std::uint64_t second = std::uint64_t{0xCD9E8D57U} * c[i];
            a[i] = high(second) ^ b[i] ^ keys[0];
            b[i] = low(second);
            c[i] = high(first) ^ d[i] ^ keys[1];
            d[i] = low(first);
        }
        keys[0] += 0x9E3779B9U;
        keys[1] += 0xBB67AE85U;
    }
    for (std::int64_t i = 0; i < counters; ++i) {
        words[4 * i] = a[i];
        words[4 * i + 1] = b[i];
        words[4 * i + 2] = c[i];
        words[4 * i + 3] = d[i];
    }
}

// Of sixteen elements. Vectors by name: of a loop that does the same the compiler makes branches, without AVX-512.
void round_by(const std::uint32_t* words, const float* x, float scale, std::int8_t* codes) {
    using Floats [[gnu::vector_size(64)]] = float;
    using Integers [[gnu::vector_size(64)]] = std::int32_t;
    using Words [[gnu::vector_size(64)]] = std::uint32_t;
    using Codes [[gnu::vector_size(16)]] = std::int8_t;
    Floats ratio;
    Words word;
    __builtin_memcpy(&ratio, x, sizeof ratio);
    __builtin_memcpy(&word, words, sizeof word);
    ratio /= scale;
    const Floats nearest = (ratio + 0x1.8p23F) - 0x1.8p23F;
    const Floats below = nearest + __builtin_convertvector(nearest > ratio, Floats);  // true is -1
    const Floats random = __builtin_convertvector(__builtin_convertvector(word >> 8U, Integers), Floats) * 0x1p-24F;
    Integers code = __builtin_convertvector(below, Integers) - (random < ratio - below);
    code = code > 127 ? 127 : code;
    code = code < -127 ? -127 : code;
    const Codes narrow = __builtin_convertvector(code, Codes);
    __builtin_memcpy(codes, &narrow, sizeof narrow);
}

// --- rotation --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int width = 16;
#elif defined(__AVX2__)
constexpr int width = 8;
#else
constexpr int width = 4;
#endif
using Floats [[gnu::vector_size(width * 4)]] = float;

// (u, v) -> (u + v, u - v) of the numbers of a vector that are `Distance` apart: the vector with each pair swapped,
// plus itself with the sign of the second of each pair turned; by a fused multiplication with 1 or -1, which is exact,
// where that is one instruction.
template <int Distance>
[[gnu::always_inline]] inline void butterfly(Floats& x) {
    Floats swapped;
#if defined(__AVX512F__)
    swapped =
        __builtin_shufflevector(x, x, 0 ^ Distance, 1 ^ Distance, 2 ^ Distance, 3 ^ Distance, 4 ^ Distance,
                                5 ^ Distance, 6 ^ Distance, 7 ^ Distance, 8 ^ Distance, 9 ^ Distance, 10 ^ Distance,
                                11 ^ Distance, 12 ^ Distance, 13 ^ Distance, 14 ^ Distance, 15 ^ Distance);
    Floats signs;
    for (int i = 0; i < width; ++i) signs[i] = (i & Distance) != 0 ? -1.0F : 1.0F;
    x = _mm512_fmadd_ps(x, signs, swapped);
    return;
#elif defined(__AVX2__)
    swapped = __builtin_shufflevector(x, x, 0 ^ Distance, 1 ^ Distance, 2 ^ Distance, 3 ^ Distance, 4 ^ Distance,
                                      5 ^ Distance, 6 ^ Distance, 7 ^ Distance);
#else
    swapped = __builtin_shufflevector(x, x, 0 ^ Distance, 1 ^ Distance, 2 ^ Distance, 3 ^ Distance);
#endif
    using Bits [[gnu::vector_size(width * 4)]] = std::uint32_t;
    Bits sign;
    for (int i = 0; i < width; ++i) sign[i] = (i & Distance) != 0 ? 0x80000000U : 0U;
    Bits turned;
    __builtin_memcpy(&turned, &x, sizeof x);
    turned ^= sign;
    Floats second;
    __builtin_memcpy(&second, &turned, sizeof second);
    x = swapped + second;
}

// A dtype that is part of its type.
template <DType Value>
struct TypeConstant {
    constexpr operator DType() const { return Value; }  // NOLINT(google-explicit-constructor): it stands for the dtype
};

// Largest magnitudes, lane by lane, as bit patterns.
using Magnitudes [[gnu::vector_size(width * 4)]] = std::uint32_t;

[[gnu::always_inline]] inline void raise(Magnitudes& largest, const Floats& x) {
    Magnitudes bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits &= 0x7FFFFFFFU;
#if defined(__AVX512F__)
    // With a mask of all: without one GCC 12 warns of a register that it leaves undefined.
    largest = reinterpret_cast<Magnitudes>(
        _mm512_maskz_max_epu32(0xFFFF, reinterpret_cast<__m512i>(largest), reinterpret_cast<__m512i>(bits)));
#else
    largest = bits > largest ? bits : largest;
#endif
}

// As many numbers of a row as a vector holds, from place `i` on; with `Keeps` 0 for those whose bit is not set.
template <DType Type, bool Keeps>
[[gnu::always_inline]] inline void read_floats(const void* row, std::int64_t i, std::uint32_t kept, Floats& x) {
    const char* const begin = static_cast<const char*>(row) + i * size_of(Type);
#if defined(__AVX512F__)
    // Masks are of operations on registers: those of loads, which GCC makes of others, take a Zen 5 dozens of cycles.
    const auto mask = static_cast<__mmask16>(Keeps ? kept : 0xFFFFU);
    if constexpr (Type == DType::f32) {
        x = _mm512_loadu_ps(begin);
        if constexpr (Keeps) {
            __asm__("" : "+v"(x));
            x = _mm512_maskz_mov_ps(mask, x);
        }
    } else {
        static_assert(Type == DType::bf16);
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(begin));
        x = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(mask, _mm512_maskz_cvtepu16_epi32(0xFFFF, halves), 16));
    }
#else
    if constexpr (Type == DType::f32) {
        __builtin_memcpy(&x, begin, sizeof x);
    } else {
        static_assert(Type == DType::bf16);
        using Halves [[gnu::vector_size(width * 2)]] = std::uint16_t;
        Halves halves;
        __builtin_memcpy(&halves, begin, sizeof halves);
        const Magnitudes bits = __builtin_convertvector(halves, Magnitudes) << 16U;
        __builtin_memcpy(&x, &bits, sizeof x);
    }
    if constexpr (Keeps) {
        Magnitudes lane;
        for (int j = 0; j < width; ++j) lane[j] = 1U << static_cast<unsigned>(j);
        x = (lane & kept) != 0 ? x : Floats{};
    }
#endif
}

// `Count` numbers, of one or several blocks, in registers: a step of all of them after the other, since each waits for
// the one before it. With `Keeps` those whose bit is not set, 64 in each of `kept`, count as 0.
template <DType Type, int Block, int Count, bool Keeps>
[[gnu::always_inline]] inline void rotate_in_registers(const void* x, const std::uint64_t* kept, float* target,
                                                       float factor, Magnitudes& largest) {
    Floats v[Count / width];
    const auto for_each = [&](auto change) OCTAVO_INLINE { unroll<Count / width>(change); };
    for_each([&](auto i) OCTAVO_INLINE {
        constexpr int first = i * width;
        const std::uint64_t bits = Keeps ? kept[first / 64] >> static_cast<unsigned>(first % 64) : 0;
        read_floats<Type, Keeps>(x, first, static_cast<std::uint32_t>(bits), v[i]);
    });
    for_each([&](auto i) OCTAVO_INLINE { butterfly<1>(v[i]); });
    for_each([&](auto i) OCTAVO_INLINE { butterfly<2>(v[i]); });
    if constexpr (width >= 8) for_each([&](auto i) OCTAVO_INLINE { butterfly<4>(v[i]); });
    if constexpr (width >= 16) for_each([&](auto i) OCTAVO_INLINE { butterfly<8>(v[i]); });
    unroll<6>([&](auto power) OCTAVO_INLINE {
        constexpr int distance = (1 << power) / width;  // of vectors
        if constexpr (distance > 0) {
            if constexpr (distance < Block / width) {
                unroll<Count / width / 2>([&](auto i) OCTAVO_INLINE {
                    constexpr int first = i / distance * 2 * distance + i % distance;
                    const Floats u = v[first];
                    v[first] = u + v[first + distance];
                    v[first + distance] = u - v[first + distance];
                });
            }
        }
    });
    for_each([&](auto i) OCTAVO_INLINE {
        v[i] *= factor;
        __builtin_memcpy(target + i * width, &v[i], sizeof v[i]);
        raise(largest, v[i]);
    });
}

template <DType Type, int Block, int Count, bool Keeps = false>
[[gnu::always_inline]] inline void rotate_numbers(const void* x, float* target, Magnitudes& largest,
                                                  const std::uint64_t* kept = nullptr) {
    constexpr float factor = Block == 16 ? 0.25F : Block == 64 ? 0.125F : 0.0625F;
    if constexpr (Block <= 64) return rotate_in_registers<Type, Block, Count, Keeps>(x, kept, target, factor, largest);
    Magnitudes of_part{};
    for (int part = 0; part < Block; part += 64) {
        rotate_in_registers<Type, 64, 64, false>(static_cast<const char*>(x) + part * size_of(Type), nullptr,
                                                 target + part, 1.0F, of_part);
    }
    for (int distance = 64; distance < Block; distance *= 2) {
        const float scale = distance * 2 == Block ? factor : 1.0F;
        for (int first = 0; first < Block; first += 2 * distance) {
            for (int i = first; i < first + distance; ++i) {
                const float u = target[i];
                const float v = target[i + distance];
                target[i] = (u + v) * scale;
                target[i + distance] = (u - v) * scale;
            }
        }
    }
    for (int i = 0; i < Block; i += width) {
        Floats v;
        __builtin_memcpy(&v, target + i, sizeof v);
        raise(largest, v);
    }
}

template <DType Type, int Block>
void rotate_row(const void* x, std::int64_t size, const std::int32_t* excluded, std::int64_t count, float* target,
                Magnitudes& of_all) {
    Magnitudes largest{};  // in a register
    constexpr int together = Block > 64    ? Block
                             : width == 16 ? 128
                                           : 64;  // numbers; twice as many in as many registers
    constexpr bool keeps = Block <= 64;
    const std::int32_t* const end = excluded + count;
    std::int64_t begin = 0;
    const auto rotate_next = [&](auto size_of_step) OCTAVO_INLINE {
        constexpr int step = size_of_step;
        const void* const from = static_cast<const char*>(x) + begin * size_of(Type);
        if (excluded == end || *excluded >= begin + step) {
            rotate_numbers<Type, Block, step>(from, target + begin, largest);
        } else if constexpr (keeps) {
            std::uint64_t kept[(step + 63) / 64];
            for (std::uint64_t& bits : kept) bits = ~std::uint64_t{0};
            for (; excluded != end && *excluded < begin + step; ++excluded) {
                const std::int64_t place = *excluded - begin;
                const std::uint64_t bit = std::uint64_t{1} << static_cast<unsigned>(place % 64);
                unroll<(step + 63) / 64>([&](auto w) OCTAVO_INLINE { kept[w] &= ~(place / 64 == w ? bit : 0); });
            }
            rotate_numbers<Type, Block, step, true>(from, target + begin, largest, kept);
        } else {
            return false;
        }
        begin += step;
        return true;
    };
    while (begin + together <= size && rotate_next(IndexConstant<together>{})) {
    }
    while (begin < size) {
        if (begin + Block <= size && rotate_next(IndexConstant<Block>{})) continue;
        alignas(64) float part[Block] = {};
        load(Type, static_cast<const char*>(x) + begin * size_of(Type), 1, size - begin < Block ? size - begin : Block,
             part);
        for (; excluded != end && *excluded < begin + Block; ++excluded) part[*excluded - begin] = 0.0F;
        rotate_numbers<DType::f32, Block, Block>(part, target + begin, largest);
        begin += Block;
    }
    of_all = largest;
}

}  // namespace

void load(DType dtype, const void* src, std::int64_t stride, std::int64_t size, float* dst) {
    switch (dtype) {
        case DType::f32: return load_as<float>(src, stride, size, dst, [](float v) { return v; });
        case DType::f16: return load_as<std::uint16_t>(src, stride, size, dst, from_f16);
        case DType::bf16: return load_as<std::uint16_t>(src, stride, size, dst, from_bf16);
        case DType::i8:
        case DType::i32: break;  // refused by cpp/src before any kernel runs
    }
    __builtin_trap();
}

#if defined(__AVX2__)
namespace {

using Bits = Magnitudes;             // the same lanes, of values with signs
constexpr std::int64_t square = 16;  // values of a row that are transposed at a time

// Lanes of two vectors, each of which `Order` names: those of the second follow those of the first.
template <class Order, std::size_t... Lanes>
[[gnu::always_inline]] inline void shuffle(const Bits& a, const Bits& b, Bits& result,
                                           std::index_sequence<Lanes...> /*lanes*/) {
    result = __builtin_shufflevector(a, b, Order::lane(Lanes)...);
}
template <class Order>
[[gnu::always_inline]] inline void shuffle(const Bits& a, const Bits& b, Bits& result) {
    shuffle<Order>(a, b, result, std::make_index_sequence<width>{});
}

// Within each quarter of 16 bytes: `Size` lanes of a and as many of b in turn, from the quarter's lane `First` on.
template <int Size, int First>
struct InTurn {
    static constexpr int lane(int i) {
        const int place = i % 4;
        return place / Size % 2 * width + i / 4 * 4 + First + place % Size + place / (2 * Size) * Size;
    }
};
// Every second quarter of a, from number `First` on, and then of b.
template <int First>
struct EverySecond {
    static constexpr int lane(int i) {
        constexpr int quarters = width / 4;
        const int quarter = 2 * (i / 4) + First;
        return quarter / quarters * width + quarter % quarters * 4 + i % 4;
    }
};

// Two rows, or one, of 16 bfloat16, a register of them.
template <class RowAt>
[[gnu::always_inline]] inline void read_rows(const RowAt& row_at, std::int64_t first, Bits& rows) {
#if defined(__AVX512F__)
    using Half [[gnu::vector_size(32)]] = std::uint32_t;
    Half a;
    Half b;
    __builtin_memcpy(&a, row_at(first), sizeof a);
    __builtin_memcpy(&b, row_at(first + 4), sizeof b);
    rows = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    __builtin_memcpy(&rows, row_at(first), sizeof rows);
#endif
}

// As many rows of 16 bfloat16 as a register holds float32: targets[c][row + i] = the c-th value of row_at(i). Two
// values of a row are transposed as if they were one. Registers of AVX-512 hold row i beside row i + 4.
template <class RowAt>
[[gnu::always_inline]] inline void load_square(const RowAt& row_at, float* const (&targets)[square], std::int64_t row) {
    Bits fours[4][2];  // of each pair of values, or of that and the one four behind it: rows 0 to 3, 4 to 7
    unroll<2>([&](auto half) OCTAVO_INLINE {
        constexpr std::int64_t first = half * (width == 16 ? 8 : 4);
        Bits rows[4];
        unroll<4>([&](auto i) OCTAVO_INLINE { read_rows(row_at, first + i, rows[i]); });
        unroll<2>([&](auto part) OCTAVO_INLINE {
            Bits low;
            Bits high;
            shuffle<InTurn<1, 2 * part>>(rows[0], rows[1], low);
            shuffle<InTurn<1, 2 * part>>(rows[2], rows[3], high);
            shuffle<InTurn<2, 0>>(low, high, fours[2 * part][half]);
            shuffle<InTurn<2, 2>>(low, high, fours[2 * part + 1][half]);
        });
    });
    unroll<8>([&](auto pair) OCTAVO_INLINE {
        Bits both;
        shuffle<EverySecond<pair / 4>>(fours[pair % 4][0], fours[pair % 4][1], both);
        const Bits even = both << 16U;
        const Bits odd = both & 0xFFFF0000U;
        __builtin_memcpy(targets[2 * pair] + row, &even, sizeof even);
        __builtin_memcpy(targets[2 * pair + 1] + row, &odd, sizeof odd);
    });
}

// `load_transposed` of bfloat16.
void transpose_bf16(const char* src, std::int64_t stride, std::int64_t cols, std::int64_t count,
                    const std::int32_t* places, float* dst, std::int64_t dst_stride) {
    alignas(64) float nowhere[most_cols];
    for (std::int64_t begin = 0; begin < count; begin += square) {
        const std::int64_t size = count - begin < square ? count - begin : square;
        float* targets[square];
        for (std::int64_t c = 0; c < square; ++c) {
            const std::int32_t place = c < size ? places[begin + c] : -1;
            targets[c] = place < 0 ? nowhere : dst + place * dst_stride;
        }
        const char* const first = src + begin * 2;
        // Of so many rows 16 values may be read.
        const std::int64_t whole_rows = stride < 1 ? 0 : cols - (square - size + stride - 1) / stride;
        for (std::int64_t row = 0; row < (cols + 15) / 16 * 16; row += width) {
            if (row + width <= whole_rows) {
                load_square([&](std::int64_t i) OCTAVO_INLINE { return first + (row + i) * stride * 2; }, targets, row);
                continue;
            }
            const char* rows[width];
            std::uint16_t last[width][square];
            for (std::int64_t i = 0; i < width; ++i) {
                rows[i] = first + (row + i) * stride * 2;
                if (row + i < whole_rows) continue;
                __builtin_memset(last[i], 0, sizeof last[i]);
                for (std::int64_t c = 0; c < size && row + i < cols; ++c) last[i][c] = read<std::uint16_t>(rows[i], c);
                rows[i] = reinterpret_cast<const char*>(last[i]);
            }
            load_square([&](std::int64_t i) OCTAVO_INLINE { return rows[i]; }, targets, row);
        }
    }
}

}  // namespace
#endif

// Sixteen rows at a time, a part of them, which is made float32 first: all of it at once where it lies in a row.
void load_transposed(DType dtype, const void* src, std::int64_t stride, std::int64_t cols, std::int64_t count,
                     const std::int32_t* places, float* dst, std::int64_t dst_stride) {
#if defined(__AVX2__)
    if (dtype == DType::bf16) {
        return transpose_bf16(static_cast<const char*>(src), stride, cols, count, places, dst, dst_stride);
    }
#endif
    constexpr std::int64_t together = 64;
    const bool in_a_row = stride == count && count <= together;
    const std::int64_t pitch = in_a_row ? count : together;
    alignas(64) float part[16 * together + 4];
    for (std::int64_t row = 0; row < cols; row += 16) {
        const std::int64_t rows = cols - row < 16 ? cols - row : 16;
        const auto* const values = static_cast<const char*>(src) + row * stride * size_of(dtype);
        if (rows < 16) __builtin_memset(part, 0, sizeof part);
        if (in_a_row) load(dtype, values, 1, rows * count, part);
        for (std::int64_t begin = 0; begin < count; begin += together) {
            const std::int64_t size = count - begin < together ? count - begin : together;
            for (std::int64_t j = 0; j < rows && !in_a_row; ++j) {
                load(dtype, values + (j * stride + begin) * size_of(dtype), 1, size, part + j * pitch);
            }
            for (std::int64_t i = 0; i < size; i += 4) {
                float* targets[4];
                for (std::int64_t c = 0; c < 4; ++c) {
                    const std::int32_t place = i + c < size ? places[begin + i + c] : -1;
                    targets[c] = place < 0 ? nullptr : dst + place * dst_stride + row;
                }
                for (std::int64_t j = 0; j < 16; j += 4) {
                    Quad columns[4];
                    transpose_fours(reinterpret_cast<const std::int8_t*>(part + j * pitch + i), pitch * 4, columns);
                    unroll<4>([&](auto c) OCTAVO_INLINE {
                        if (targets[c] != nullptr) __builtin_memcpy(targets[c] + j, &columns[c], sizeof columns[c]);
                    });
                }
            }
        }
    }
}

void load_columns(DType dtype, const void* src, std::int64_t stride, const std::int32_t* columns, std::int64_t count,
                  float* dst, std::int64_t dst_stride) {
    const auto gather = [&](auto read_at) {
        for (std::int64_t i = 0; i < count; ++i) dst[i * dst_stride] = read_at(columns[i] * stride);
    };
    switch (dtype) {
        case DType::f32: return gather([&](std::int64_t at) { return read<float>(src, at); });
        case DType::f16: return gather([&](std::int64_t at) { return from_f16(read<std::uint16_t>(src, at)); });
        case DType::bf16: return gather([&](std::int64_t at) { return from_bf16(read<std::uint16_t>(src, at)); });
        case DType::i8:
        case DType::i32: break;
    }
    __builtin_trap();
}

void store(const float* src, std::int64_t size, DType dtype, void* dst, std::int64_t stride) {
    switch (dtype) {
        case DType::f32: return store_as<float>(src, size, dst, stride, [](float v) { return v; });
        case DType::f16: return store_as<std::uint16_t>(src, size, dst, stride, to_f16);
        case DType::bf16: return store_as<std::uint16_t>(src, size, dst, stride, to_bf16);
        case DType::i8:
        case DType::i32: break;
    }
    __builtin_trap();
}

Range range(const float* x, std::int64_t size) {
    float low[lanes];
    float high[lanes];
    // Bits of the magnitude order like the magnitude, with Inf and NaN on top.
    std::uint32_t magnitude[lanes];
    for (std::int64_t lane = 0; lane < lanes; ++lane) {
        low[lane] = high[lane] = x[0];
        magnitude[lane] = 0;
    }
    const auto take = [&](std::int64_t lane, float value) {
        low[lane] = value < low[lane] ? value : low[lane];
        high[lane] = value > high[lane] ? value : high[lane];
        const std::uint32_t bits = bits_of(value) & 0x7FFFFFFFU;
        magnitude[lane] = bits > magnitude[lane] ? bits : magnitude[lane];
    };
    std::int64_t i = 0;
    for (; i + lanes <= size; i += lanes) {
        for (std::int64_t lane = 0; lane < lanes; ++lane) take(lane, x[i + lane]);
    }
    for (; i < size; ++i) take(0, x[i]);
    for (std::int64_t lane = 1; lane < lanes; ++lane) {
        low[0] = low[lane] < low[0] ? low[lane] : low[0];
        high[0] = high[lane] > high[0] ? high[lane] : high[0];
        magnitude[0] = magnitude[lane] > magnitude[0] ? magnitude[lane] : magnitude[0];
    }
    return {low[0], high[0], magnitude[0] < 0x7F800000U};
}

std::uint32_t largest_magnitude(DType dtype, const void* x, std::int64_t size) {
    if (dtype == DType::f32) return largest_magnitude_as<std::uint32_t>(x, size);
    return largest_magnitude_as<std::uint16_t>(x, size);
}

std::uint32_t largest_masked(DType dtype, const void* x, const void* mask, std::int64_t size) {
    if (dtype == DType::f32) return largest_masked_as<std::uint32_t>(x, mask, size);
    return largest_masked_as<std::uint16_t>(x, mask, size);
}

void raise_maxima(DType dtype, const void* x, std::int64_t size, void* maxima) {
    if (dtype == DType::f32) return raise_as<std::uint32_t>(x, size, maxima);
    return raise_as<std::uint16_t>(x, size, maxima);
}

void upper_halves(DType dtype, const void* x, std::int64_t size, std::uint16_t* halves) {
    switch (dtype) {
        case DType::f32:
            for (std::int64_t i = 0; i < size; ++i) halves[i] = half_of(read<float>(x, i));
            return;
        case DType::f16:
            for (std::int64_t i = 0; i < size; ++i) halves[i] = half_of(from_f16(read<std::uint16_t>(x, i)));
            return;
        case DType::bf16:
            for (std::int64_t i = 0; i < size; ++i) halves[i] = magnitude<std::uint16_t>(x, i);
            return;
        case DType::i8:
        case DType::i32: break;
    }
    __builtin_trap();
}

Survey survey(const void* halves, std::int64_t size, std::uint16_t bound) {
#if defined(__AVX512BW__)
    const auto* const bytes = static_cast<const char*>(halves);
    const __m512i bounds = _mm512_set1_epi16(static_cast<short>(bound));
    __m512i largest = _mm512_setzero_si512();
    std::int64_t below = 0;
    std::int64_t zeros = 0;
    const auto take = [&](std::int64_t i, std::uint64_t there) OCTAVO_INLINE {
        std::uint64_t are_below = 0;
        std::uint64_t are_zero = 0;
        unroll<2>([&](auto part) OCTAVO_INLINE {
            const auto mask = static_cast<__mmask32>(there >> (part * 32));
            const __m512i x =
                _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, bytes + i * 2 + part * 64), _mm512_set1_epi16(0x7FFF));
            largest = _mm512_maskz_max_epu16(~__mmask32{0}, largest, x);
            are_below |= std::uint64_t{_mm512_cmplt_epu16_mask(x, bounds)} << (part * 32);
            are_zero |= std::uint64_t{_mm512_testn_epi16_mask(x, x)} << (part * 32);
        });
        below += __builtin_popcountll(are_below & there);
        zeros += __builtin_popcountll(are_zero & there);
    };
    std::int64_t i = 0;
    for (; i + 64 <= size; i += 64) take(i, ~std::uint64_t{0});
    if (i < size) take(i, (std::uint64_t{1} << static_cast<unsigned>(size - i)) - 1);
    using Numbers [[gnu::vector_size(64)]] = std::uint16_t;
    using Quarter [[gnu::vector_size(16)]] = std::uint16_t;
    const auto numbers = reinterpret_cast<Numbers>(largest);
    Quarter most{};
    unroll<4>([&](auto part) OCTAVO_INLINE {
        Quarter quarter;
        __builtin_memcpy(&quarter, reinterpret_cast<const char*>(&numbers) + part * 16, sizeof quarter);
        most = quarter > most ? quarter : most;
    });
    const __m128i least = _mm_minpos_epu16(reinterpret_cast<__m128i>(~most));
    return {static_cast<std::uint16_t>(~_mm_extract_epi16(least, 0)), below, zeros};
#else
    constexpr std::int64_t most = 0xFFFF;  // of a count as narrow as the halves, so that a vector holds as many
    Survey found{};
    for (std::int64_t begin = 0; begin < size; begin += most) {
        const std::int64_t end = size - begin < most ? size : begin + most;
        std::uint16_t below = 0;
        std::uint16_t zeros = 0;
        for (std::int64_t i = begin; i < end; ++i) {
            const auto half = magnitude<std::uint16_t>(halves, i);
            found.largest = half > found.largest ? half : found.largest;
            below = static_cast<std::uint16_t>(below + (half < bound ? 1 : 0));
            zeros = static_cast<std::uint16_t>(zeros + (half == 0 ? 1 : 0));
        }
        found.below += below;
        found.zeros += zeros;
    }
    return found;
#endif
}

std::int64_t find_halves(const void* halves, std::int64_t size, std::uint16_t limit, std::int32_t* places) {
    const auto* const bytes = static_cast<const char*>(halves);
    std::int64_t count = 0;
    const auto find = [&](std::uint64_t marks, std::int64_t first) {
        for (; marks != 0; marks &= marks - 1) {
            places[count++] = static_cast<std::int32_t>(first + __builtin_ctzll(marks));
        }
    };
    std::int64_t i = 0;
    for (; i + 64 <= size; i += 64) find(marks_of(bytes + i * 2, limit), i);
    if (i < size) {
        char rest[128] = {};
        __builtin_memcpy(rest, bytes + i * 2, static_cast<unsigned long>((size - i) * 2));
        find(marks_of(rest, limit) & ((std::uint64_t{1} << static_cast<unsigned>(size - i)) - 1), i);
    }
    return count;
}

std::uint32_t rotate(DType dtype, const void* x, std::int64_t size, std::int64_t block, const std::int32_t* excluded,
                     std::int64_t count, float* target) {
    Magnitudes largest{};
    const auto by_block = [&](auto type, const void* row) {
        switch (block) {
            case 16: return rotate_row<type, 16>(row, size, excluded, count, target, largest);
            case 64: return rotate_row<type, 64>(row, size, excluded, count, target, largest);
            case 256: return rotate_row<type, 256>(row, size, excluded, count, target, largest);
            default: __builtin_trap();  // refused by cpp/src before any kernel runs
        }
    };
    if (dtype == DType::bf16) {
        by_block(TypeConstant<DType::bf16>{}, x);
    } else {
        if (dtype != DType::f32) load(dtype, x, 1, size, target);
        by_block(TypeConstant<DType::f32>{}, dtype == DType::f32 ? x : target);
    }
    std::uint32_t of_all = 0;
    for (int i = 0; i < width; ++i) of_all = largest[i] > of_all ? largest[i] : of_all;
    return of_all;
}

void encode_absmax(DType dtype, const void* x, std::int64_t size, float absmax, std::int8_t* codes) {
    switch (dtype) {
        case DType::f32: return encode_by_inverse<float>(x, size, absmax, [](float v) { return v; }, codes);
        case DType::f16: return encode_by_inverse<std::uint16_t>(x, size, absmax, from_f16, codes);
        case DType::bf16: return encode_by_inverse<std::uint16_t>(x, size, absmax, from_bf16, codes);
        case DType::i8:
        case DType::i32: break;
    }
    __builtin_trap();
}

void encode_rotated(const float* x, std::int64_t size, float absmax, std::int8_t* codes) {
    const float inverse = 127.0F / absmax;
    if (!__builtin_isinf(inverse)) {
        for (std::int64_t i = 0; i < size; ++i) codes[i] = to_code(x[i] * inverse);
    } else {
        for (std::int64_t i = 0; i < size; ++i) codes[i] = to_code(x[i] / absmax * 127.0F);
    }
}

void encode_stochastic(const float* x, std::int64_t size, float scale, std::int64_t row, std::uint64_t seed,
                       std::int8_t* codes) {
    if (!(scale > 0.0F) || !(scale <= 0x1.fffffep127F)) {
        for (std::int64_t i = 0; i < size; ++i) codes[i] = 0;
        return;
    }
    std::uint32_t words[drawn];
    float values[drawn] = {};
    std::int8_t rounded[drawn];
    for (std::int64_t begin = 0; begin < size; begin += drawn) {
        const std::int64_t count = size - begin < drawn ? size - begin : drawn;
        draw(static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(begin / 4), seed, words);
        for (std::int64_t i = 0; i < count; ++i) values[i] = x[begin + i];
        for (std::int64_t i = 0; i < drawn; i += 16) round_by(words + i, values + i, scale, rounded + i);
        for (std::int64_t i = 0; i < count; ++i) codes[begin + i] = rounded[i];
    }
}

void encode_zeropoint(const float* x, std::int64_t size, float nd, float zeropoint, std::int8_t* codes) {
    for (std::int64_t i = 0; i < size; ++i) {
        float code = round_half_even(nd * x[i]) - zeropoint;
        code = code > 127.0F ? 127.0F : code;
        code = code < -127.0F ? -127.0F : code;
        codes[i] = to_code(code);
    }
}

std::int32_t sum(const std::int8_t* codes, std::int64_t size) {
    std::int32_t total = 0;
    for (std::int64_t i = 0; i < size; ++i) total += codes[i];
    return total;
}

}  // namespace octavo::cpu::OCTAVO_ISA
