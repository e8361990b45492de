// AVX-512 VNNI: 6 x 64 sums in 24 of the 32 registers.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

struct Dot {
    static constexpr int rows = 6;
    static constexpr int blocks = 4;
    static constexpr int vectors = 1;
    static constexpr int speed = 250;
    static constexpr int x_size = 1;
    static constexpr bool x_is_unsigned = true;  // vpdpbusd multiplies unsigned by signed bytes
    static constexpr auto place_row = place_unsigned;
    using Accumulator = __m512i;
    using X = __m512i;
    using W = __m512i;
    static Accumulator zero() { return _mm512_setzero_si512(); }
    static X broadcast(const std::int8_t* p) { return _mm512_set1_epi32(group_at(p)); }
    static W load(const std::int8_t* p) { return _mm512_loadu_si512(p); }
    // Inline assembly because GCC 12 copies the accumulators of _mm512_dpbusd_epi32 through other registers, which
    // halves the speed.
    static void multiply_add(Accumulator& acc, X x, W w) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
    }
    static void store(std::int32_t* p, Accumulator acc) { _mm512_storeu_si512(p, acc); }
    static void add(std::int32_t* p, Accumulator acc) {
        _mm512_storeu_si512(p, _mm512_add_epi32(_mm512_loadu_si512(p), acc));
    }
};

}  // namespace octavo::cpu::OCTAVO_ISA
