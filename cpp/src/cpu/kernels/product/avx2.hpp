// AVX2: bytes are widened to 16 bit and multiplied by vpmaddwd, whose pair sums fit 32 bits (2 * 128 * 128). The byte
// instruction vpmaddubsw would be faster, but its 16-bit pair sums saturate. A lane holds the sum of one pair of k, so
// that two lanes are added at the end.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

struct Dot {
    static constexpr int rows = 2;
    static constexpr int blocks = 1;
    static constexpr int vectors = 4;
    using Accumulator = __m256i;
    using X = __m256i;
    using W = __m256i;
    static Accumulator zero() { return _mm256_setzero_si256(); }
    static X broadcast(const std::int8_t* p) { return _mm256_cvtepi8_epi16(_mm_set1_epi32(group_at(p))); }
    static W load(const std::int8_t* p) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void multiply_add(Accumulator& acc, X x, W w) { acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x, w)); }
    static void add(std::int32_t* p, Accumulator acc) {
        const __m128i sums = _mm_hadd_epi32(_mm256_castsi256_si128(acc), _mm256_extracti128_si256(acc, 1));
        auto* const target = reinterpret_cast<__m128i*>(p);
        _mm_storeu_si128(target, _mm_add_epi32(_mm_loadu_si128(target), sums));
    }
};

}  // namespace octavo::cpu::OCTAVO_ISA
