// AVX-512 without VNNI: codes of 16 bit, which vpmaddwd multiplies and adds two by two, exactly: 8 x 32 sums in 16 of
// the 32 registers. W is widened as it is loaded, once for all rows of a tile. (The pairs of avx2.hpp have as many
// instructions here, and all of them take the same two ports.)
#pragma once

#include <immintrin.h>

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

// Plan::place_row: panel[row][k / 4][(0, 2), (1, 3)] in 16 bit.
inline std::int32_t place_words(const std::int8_t* codes, std::int64_t depth, std::int64_t row, std::int8_t* panel) {
    std::int8_t* const target = panel + 2 * row * depth;
    for (std::int64_t k = 0; k < depth; k += 16) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k));
        const __m128i even = _mm_srai_epi16(_mm_slli_epi16(x, 8), 8);
        const __m128i odd = _mm_srai_epi16(x, 8);
        auto* const groups = reinterpret_cast<__m128i*>(target + 2 * k);
        _mm_storeu_si128(groups, _mm_unpacklo_epi32(even, odd));
        _mm_storeu_si128(groups + 1, _mm_unpackhi_epi32(even, odd));
    }
    return 0;
}

struct Dot {
    struct Words {
        __m512i even;
        __m512i odd;
    };
    static constexpr int rows = 8;
    static constexpr int blocks = 2;
    static constexpr int vectors = 1;
    static constexpr int speed = 70;
    static constexpr int x_size = 2;
    static constexpr bool x_is_unsigned = false;
    static constexpr auto place_row = place_words;
    using Accumulator = __m512i;
    using X = Words;
    using W = Words;
    static Accumulator zero() { return _mm512_setzero_si512(); }
    static X broadcast(const std::int8_t* p) {
        return {_mm512_set1_epi32(group_at(p)), _mm512_set1_epi32(group_at(p + 4))};
    }
    static W load(const std::int8_t* p) {
        const __m512i codes = _mm512_loadu_si512(p);
        return {_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 8), _mm512_srai_epi16(codes, 8)};
    }
    static void multiply_add(Accumulator& acc, const X& x, const W& w) {
        acc = _mm512_add_epi32(acc, _mm512_madd_epi16(x.even, w.even));
        acc = _mm512_add_epi32(acc, _mm512_madd_epi16(x.odd, w.odd));
    }
    static void store(std::int32_t* p, Accumulator acc) { _mm512_storeu_si512(p, acc); }
    static void add(std::int32_t* p, Accumulator acc) {
        _mm512_storeu_si512(p, _mm512_add_epi32(_mm512_loadu_si512(p), acc));
    }
};

constexpr Plan many = dot_plan<Dot>(192);
constexpr Plan few = many;

}  // namespace octavo::cpu::OCTAVO_ISA
