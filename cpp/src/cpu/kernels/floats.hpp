// Registers of float32, and the operations on them that GCC makes of no sign.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <cstdint>

namespace octavo::cpu::OCTAVO_ISA {

// Vectors as wide as a register: GCC keeps wider ones in memory and, on Arm, converts them one number at a time.
#if defined(__AVX512F__)
constexpr int register_size = 64;
#elif defined(__AVX2__)
constexpr int register_size = 32;
#else
constexpr int register_size = 16;
#endif
using Floats [[gnu::vector_size(register_size)]] = float;
using Ints [[gnu::vector_size(register_size)]] = std::int32_t;
using Bits [[gnu::vector_size(register_size)]] = std::uint32_t;
constexpr std::int64_t width = register_size / 4;

// By reference, here and below: how such a vector is passed depends on the instruction set.
template <class Vector, class T>
void read(const T* p, Vector& vector) {
    __builtin_memcpy(&vector, p, sizeof vector);
}

// As many int8 codes, widened.
[[gnu::always_inline]] inline void read_codes(const std::int8_t* p, Ints& codes) {
#if defined(__AVX512F__)
    // With a mask of all: without one GCC 12 warns of a register that it leaves undefined.
    codes = reinterpret_cast<Ints>(
        _mm512_maskz_cvtepi8_epi32(0xFFFF, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
    codes = reinterpret_cast<Ints>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    for (std::int64_t i = 0; i < width; ++i) codes[i] = p[i];  // NOLINT(bugprone-signed-char-misuse): numbers
#endif
}

// sum = x * weight + sum, rounded once. What calls a function for that had better be in few places: a square of it
// takes a minute to compile with sanitizers.
#if defined(__AVX2__) || defined(__aarch64__)
[[gnu::always_inline]]
#else
[[gnu::noinline]]
#endif
inline void fused_multiply_add(const Floats& x, const Floats& weight, Floats& sum) {
#if defined(__AVX512F__)
    sum = _mm512_fmadd_ps(x, weight, sum);
#elif defined(__AVX2__)
    sum = _mm256_fmadd_ps(x, weight, sum);
#elif defined(__aarch64__)
    sum = vfmaq_f32(sum, x, weight);
#else
    for (std::int64_t i = 0; i < width; ++i) sum[i] = __builtin_fmaf(x[i], weight[i], sum[i]);
#endif
}

}  // namespace octavo::cpu::OCTAVO_ISA
