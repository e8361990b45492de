// AVX-VNNI, the 256-bit form of processors without AVX-512: 6 x 16 sums in 12 of the 16 registers.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/product/dot.hpp"

namespace octavo::cpu::OCTAVO_ISA {

struct Dot {
    static constexpr int rows = 6;
    static constexpr int blocks = 1;
    static constexpr int vectors = 2;
    static constexpr int speed = 120;
    static constexpr int x_size = 1;
    static constexpr bool x_is_unsigned = true;  // vpdpbusd multiplies unsigned by signed bytes
    static constexpr auto place_row = place_unsigned;
    using Accumulator = __m256i;
    using X = __m256i;
    using W = __m256i;
    static Accumulator zero() { return _mm256_setzero_si256(); }
    static X broadcast(const std::int8_t* p) { return _mm256_set1_epi32(group_at(p)); }
    static W load(const std::int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    // {vex}: without it assemblers take the AVX-512 form. Assembly for the reason given in avx512_vnni.hpp.
    static void multiply_add(Accumulator& acc, X x, W w) {
        __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(x), "x"(w));
    }
    static void store(std::int32_t* p, Accumulator acc) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), acc); }
    static void add(std::int32_t* p, Accumulator acc) {
        auto* const target = reinterpret_cast<__m256i*>(p);
        _mm256_storeu_si256(target, _mm256_add_epi32(_mm256_loadu_si256(target), acc));
    }
};

constexpr Plan many = dot_plan<Dot>(192);
constexpr Plan few = many;

}  // namespace octavo::cpu::OCTAVO_ISA
